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


def test_heads_and_keys_that_cannot_be_read_are_no_silent_success(folder: Path) -> None:
    broken = folder / "evidence" / "heads" / "broken.json"
    broken.write_text('{"size": 5')
    ended = verify(folder, "audit.ndjson", "--heads", str(folder / "evidence"))
    assert ended.exit_code == 1
    assert "broken.json does not hold a signed tree head" in ended.output
    for text in ("", "key-1\n", "key-1 zz\n", "key-1 abcd\n"):
        (folder / "keys").write_text(text)
        assert verify(folder, "audit.ndjson").exit_code == 2
    assert verify(folder, "audit.ndjson", "--format", "xml").exit_code == 2


def test_a_head_that_ends_within_a_gap_is_counted_as_not_compared(folder: Path) -> None:
    (folder / "late.ndjson").write_bytes(b"".join(as_file(LOG.exported([10, 11]))))
    ended = verify(folder, "late.ndjson", "--partial", "--heads", str(folder / "evidence"))
    assert ended.exit_code == 0, ended.output
    assert "1 heads end where this export tells nothing" in ended.output


def test_the_program_that_shares_nothing_with_the_product_says_the_same(folder: Path) -> None:
    def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(SCRIPT), name, "--key", "keys", "--heads", "evidence/heads", *options]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    good = run("audit.ndjson")
    assert (good.returncode, good.stdout) == (0, "whole: every event as it was signed\n")
    assert run("part.ndjson", "--partial").returncode == 0
    lines = (folder / "audit.ndjson").read_text().splitlines(keepends=True)
    (folder / "audit.ndjson").write_text("".join(lines[:-1]))
    bad = run("audit.ndjson")
    assert (bad.returncode, bad.stdout) == (1, "event 11: cut off\n")


def test_the_stand_alone_program_is_short_and_imports_nothing_but_python() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) < 200
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= sys.stdlib_module_names
