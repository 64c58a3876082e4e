"""`idem backup`, `idem restore` and `idem check` as an operator types them."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from app import runtime
from app.cli import audit, backup, build_app, check
from app.config import Settings
from app.documents.galleries import Gallery
from app.runtime import open_runtime
from app.use_cases import sequence
from tests.builders import active
from tests.fakes import FakeEngine
from tests.support.backup_process import environment_of


@pytest.fixture
def command(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """A terminal with the settings of the store, and an engine that reads names."""
    opened = lambda *_, **__: SimpleNamespace(engine=FakeEngine(), reason="it reads names")  # noqa: E731
    monkeypatch.setattr(runtime, "open_engine", opened)
    for module in (audit, backup, check):  # the terminal of a test is closed before those of others
        monkeypatch.setattr(module, "configure_logging", lambda _: None)
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    return CliRunner()


def idem(command: CliRunner, *words: str, **terminal: str) -> Result:
    """What the command came to."""
    return command.invoke(build_app(words[0]), list(words), input=terminal.get("typed"))


def test_a_backup_is_made_proved_put_in_place_and_checked(
    settings: Settings, command: CliRunner, tmp_path: Path
) -> None:
    async def people() -> str:
        async with open_runtime(settings, FakeEngine()) as opened:
            await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
            return (await active(opened, "ann")).id

    ann = asyncio.run(people())
    folder = str(tmp_path / "backups")
    empty = idem(command, "backup", folder, "--verify")
    assert (empty.exit_code, "holds no finished backup" in empty.output) == (1, True)
    made = idem(command, "backup", folder, "--json")
    assert made.exit_code == 0, made.output
    page = json.loads(made.stdout.splitlines()[-1])
    assert (page["photos"], page["copied"], page["missing"]) == (1, 1, 0)
    proved = idem(command, "backup", folder, "--verify")
    assert (proved.exit_code, f"Backup {page['id']} of" in proved.stdout) == (0, True)

    refused = idem(command, "restore", folder)
    assert (refused.exit_code, "holds people or users" in refused.output) == (1, True)
    wrong = idem(command, "restore", folder, "--replace", typed="no\n")
    assert (wrong.exit_code, "Nothing was done" in wrong.output) == (1, True)
    done = idem(command, "restore", folder, "--replace", typed=f"{settings.mongodb_database}\n")
    assert done.exit_code == 0, done.output
    assert "is in place: " in done.stdout
    assert "Accounts are those of the backup now" in done.stdout.splitlines()[-1]
    nothing = idem(command, "restore", folder, "--abandon")
    assert (nothing.exit_code, "No restore is under way" in nothing.stdout) == (0, True)

    photo = next((settings.storage_path).rglob(f"*/{ann}/*"))
    assert idem(command, "check").exit_code == 0
    photo.unlink()
    looked = idem(command, "check", "--json")
    assert looked.exit_code == 1
    assert [(one["kind"], one["subject"]) for one in json.loads(looked.stdout.splitlines()[-1])["findings"]] == [
        ("photo-missing", ann)
    ]
    told = idem(command, "check")
    assert (told.exit_code, f"photo-missing: default {ann}: " in told.stdout) == (1, True)
    assert idem(command, "check", "--no-photos").exit_code == 0
    again = idem(command, "backup", folder)
    assert again.exit_code == 0
    assert "Backup " in again.stdout


def test_h100_a_second_restore_forgets_a_key_that_the_evidence_keeps_and_the_check_finds_nothing(
    settings: Settings, command: CliRunner, tmp_path: Path
) -> None:
    async def logged(*people: str) -> str:
        """Somebody more, and a head over it outside; the key that signs."""
        async with open_runtime(settings, FakeEngine()) as opened:
            await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
            for person in people:
                await active(opened, person)
            while await sequence.grow(opened):
                pass
            head = await sequence.sign(opened)
            assert await sequence.deliver(opened) == 0
            return head.key_id

    folder = str(tmp_path / "backups")
    signed_by = [asyncio.run(logged("ann"))]
    assert idem(command, "backup", folder).exit_code == 0
    for person in ("bob", "cleo"):
        asyncio.run(logged(person))
        done = idem(command, "restore", folder, "--replace", typed=f"{settings.mongodb_database}\n")
        assert (done.exit_code, "are lost" in done.output) == (0, True)
        signed_by.append(asyncio.run(logged()))
    assert len(set(signed_by)) == 3
    known = [line.split()[0] for line in idem(command, "audit", "key").stdout.splitlines()]
    assert signed_by[1] not in known
    kept = (settings.evidence_path / "keys").iterdir()
    assert {line.split()[0] for path in kept for line in path.read_text().splitlines()} == set(signed_by)
    looked = idem(command, "check", "--no-photos")
    assert looked.exit_code == 0, looked.output
