"""`idem audit verify` and the stand-alone program at the command line: what they say, and how they end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.cli.audit import app
from tests.support.audit_exports import Log, as_file

SCRIPT = Path(__file__).parents[2] / "scripts" / "verify_audit.py"
LOG = Log(seed=1)
LOG.grow(5).sign()
LOG.grow(7).sign()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export, a file of keys, and an evidence folder with the signed heads."""
    (tmp_path / "audit.ndjson").write_bytes(b"".join(as_file(LOG.exported())))
    (tmp_path / "audit.csv").write_bytes(b"".join(as_file(LOG.exported(), "csv")))
    (tmp_path / "part.ndjson").write_bytes(b"".join(as_file(LOG.exported([4, 5, 9]))))
    (tmp_path / "keys").write_text("".join(f"{key_id} {key.hex()}\n" for key_id, key in LOG.keys.items()))
    heads = tmp_path / "evidence" / "heads" / "2026-11-21"
    heads.mkdir(parents=True)
    for head in LOG.heads:
        (heads / f"{head.size}.json").write_text(json.dumps(head.as_json()))
    (tmp_path / "evidence" / "deletions").mkdir()
    (tmp_path / "evidence" / "deletions" / "someone.json").write_text("{}")
    return tmp_path


def verify(folder: Path, name: str, *options: str) -> Result:
    """Run `idem audit verify`."""
    return CliRunner().invoke(app, ["verify", str(folder / name), "--key", str(folder / "keys"), *options])


def test_a_whole_export_ends_with_zero_and_says_up_to_where(folder: Path) -> None:
    for name in ("audit.ndjson", "audit.csv"):
        ended = verify(folder, name, "--heads", str(folder / "evidence"))
        assert ended.exit_code == 0, ended.output
        assert "12 events read, 3 signed heads fit" in ended.output
        assert "whole up to the head of 2026-11-21T10:00:01.000Z, over 12 events" in ended.output


def test_h96_a_changed_export_ends_with_one_and_names_the_event(folder: Path) -> None:
    lines = (folder / "audit.ndjson").read_text().splitlines(keepends=True)
    (folder / "audit.ndjson").write_text("".join([*lines[:7], *lines[8:]]))
    ended = verify(folder, "audit.ndjson", "--heads", str(folder / "evidence"))
    assert ended.exit_code == 1
    assert "event 7: event 7 was missing" in ended.output
    assert "whole" not in ended.output


def test_an_export_of_a_part_says_what_is_not_in_it(folder: Path) -> None:
    assert verify(folder, "part.ndjson").exit_code == 1
    ended = verify(
        folder, "part.ndjson", "--partial", "--heads", str(folder / "evidence" / "heads" / "2026-11-21" / "5.json")
    )
    assert ended.exit_code == 0, ended.output
    assert "left out of the export, and unchanged by their hashes: 0 to 3" in ended.output


def test_keys_that_cannot_be_read_are_no_silent_success(folder: Path) -> None:
    for text in ("", "key-1\n", "key-1 zz\n", "key-1 abcd\n"):
        (folder / "keys").write_text(text)
        assert verify(folder, "audit.ndjson").exit_code == 2
    assert verify(folder, "audit.ndjson", "--format", "xml").exit_code == 2


def test_a_head_that_ends_within_a_gap_is_counted_as_not_compared(folder: Path) -> None:
    (folder / "late.ndjson").write_bytes(b"".join(as_file(LOG.exported([10, 11]))))
    ended = verify(folder, "late.ndjson", "--partial", "--heads", str(folder / "evidence"))
    assert ended.exit_code == 0, ended.output
    assert "1 heads end where this export tells nothing" in ended.output


def alone(folder: Path, name: str, *options: str) -> tuple[int, str]:
    """Run the stand-alone program; how it ends, and what it says."""
    command = [sys.executable, "-I", str(SCRIPT), name, "--key", "keys", *options]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stdout or ended.stderr


UP_TO = "up to the head of 2026-11-21T10:00:01.000Z, over 12 events"


def test_the_program_that_shares_nothing_with_the_product_says_the_same(folder: Path) -> None:
    whole = f"whole: every event as it was signed, {UP_TO}; "
    assert alone(folder, "audit.ndjson") == (0, f"{whole}1 heads fit, 0 could not be compared\n")
    for heads in ("evidence", "evidence/heads", "evidence/heads/2026-11-21"):
        assert alone(folder, "audit.ndjson", "--heads", heads) == (0, f"{whole}3 heads fit, 0 could not be compared\n")
    one = alone(folder, "audit.ndjson", "--heads", "evidence/heads/2026-11-21/5.json")
    assert one == (0, f"{whole}2 heads fit, 0 could not be compared\n")
    assert alone(folder, "part.ndjson", "--partial", "--heads", "evidence")[0] == 0
    assert alone(folder, "part.ndjson") == (1, "line 1, event 0: left out, with all up to 3\nnot read any further\n")
    lines = (folder / "audit.ndjson").read_text().splitlines(keepends=True)
    (folder / "audit.ndjson").write_text("".join(lines[:-1]))
    assert alone(folder, "audit.ndjson") == (1, "event 11: cut off here: there is no end\nnothing is proved\n")


def test_h96_both_programs_tell_what_an_older_export_leaves_out_and_take_the_auditors_word_for_when_it_was(
    folder: Path,
) -> None:
    (folder / "older.ndjson").write_bytes(b"".join(as_file(LOG.exported(head=LOG.heads[0]))))
    asked = ["older.ndjson", "--heads", str(folder / "evidence")]
    ended = verify(folder, *asked)
    assert ended.exit_code == 1
    assert "event 5: events 5 to 11 were cut off: 12 were signed at 2026-11-21T10:00:01.000Z" in ended.output
    assert "say when (--at)" in ended.output
    assert "the export's own head is that of 2026-11-21T10:00:00.000Z, over 5 events" in ended.output
    status, said = alone(folder, *asked)
    assert (status, said.splitlines()) == (1, [
        "event 5: cut off, with all behind it: 12 were signed at 2026-11-21T10:00:01.000Z",
        "up to the head of 2026-11-21T10:00:00.000Z, over 5 events; 2 heads fit, 1 could not be compared",
    ])  # fmt: skip
    for moment in ("2026-11-21T10:00:00Z", "2026-11-21T12:00:00.5+02:00"):
        ended = verify(folder, *asked, "--at", moment)
        assert ended.exit_code == 0, ended.output
        assert "1 heads were signed after it was taken" in ended.output
        assert "whole up to the head of 2026-11-21T10:00:00.000Z, over 5 events" in ended.output
        assert alone(folder, *asked, "--at", moment)[0] == 0
    assert verify(folder, *asked, "--at", "2026-11-21T10:00:01Z").exit_code == 1
    assert alone(folder, *asked, "--at", "2026-11-21T10:00:01Z")[0] == 1
    for wrong in ("yesterday", "2026-11-21T10:00:01", "2026-11-21"):
        assert verify(folder, *asked, "--at", wrong).exit_code == 2
        assert alone(folder, *asked, "--at", wrong)[0] == 2


def test_public_keys_are_taken_as_the_service_answers_them(folder: Path) -> None:
    keys = [{"key_id": key_id, "public_key": key.hex(), "created_at": "x"} for key_id, key in LOG.keys.items()]
    (folder / "keys").write_text(json.dumps({"keys": keys}))
    assert verify(folder, "audit.ndjson").exit_code == 0
    assert alone(folder, "audit.ndjson")[0] == 0
    for text in ("{}", '{"keys": [{"key_id": "key-1"}]}', '{"keys": 1}', "{"):
        (folder / "keys").write_text(text)
        assert verify(folder, "audit.ndjson").exit_code == 2
        assert alone(folder, "audit.ndjson")[0] == 2, text


def test_files_that_are_torn_or_not_there_are_named(folder: Path) -> None:
    torn = ['{"size": 5', "", "[]", "[" * 100_000, '{"time": "\\ud800"}', '{"size": NaN}']
    for number, text in enumerate(torn):
        (folder / "evidence" / "heads" / f"torn-{number}.json").write_text(text)
    ended = verify(folder, "audit.ndjson", "--heads", str(folder / "evidence"))
    status, said = alone(folder, "audit.ndjson", "--heads", "evidence")
    assert (ended.exit_code, status) == (1, 1)
    for number in range(len(torn)):
        assert f"torn-{number}.json does not hold a signed tree head" in ended.output
        assert f"evidence/heads/torn-{number}.json: " in said
    assert f"{UP_TO}; 3 heads fit, 0 could not be compared" in said, "the others are compared all the same"
    (folder / "empty").mkdir()
    for heads in ("empty", "nowhere"):
        assert verify(folder, "audit.ndjson", "--heads", str(folder / heads)).exit_code == 2
        assert alone(folder, "audit.ndjson", "--heads", heads)[0] == 2
    assert alone(folder, "nowhere.ndjson")[0] == 2


def test_the_stand_alone_program_is_short_and_imports_nothing_but_python() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) < 200
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= sys.stdlib_module_names
