"""Backup and restore on a real mongod: what comes back, what must not, and what an interruption leaves."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import bson
import pymongo
import pytest
from pydantic import SecretStr
from pymongo import AsyncMongoClient

from app import restoring
from app.audit import by_system, record
from app.backups import EMPTIED, LEFT_OUT, UNTOUCHED, OpenSet, OtherKey, Tell
from app.config import Settings, random_secret
from app.documents.accounts import Client, Login, User
from app.documents.audiences import AudienceClaim
from app.documents.base import new_id, now
from app.documents.claims import IdempotencyClaim
from app.documents.deletions import LEDGER, Deletion
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery, PendingChange
from app.documents.identities import Identity
from app.documents.restores import COLLECTION, RESTORE, Restore
from app.documents.tree import AuditKey, AuditTree
from app.domain.callers import Role
from app.domain.ownership import SortedKeys
from app.errors import NotReady, Unauthenticated
from app.orphans import sorted_by_owner
from app.runtime import DOCUMENTS, Runtime, open_runtime
from app.use_cases import back_up as backing_up
from app.use_cases import check as checking
from app.use_cases import erase, sequence
from app.use_cases import restore as restoring_all
from app.use_cases import sweep_photos as sweeping
from app.use_cases.back_up import Made, back_up, verify
from app.use_cases.check import check
from app.use_cases.erase import erase_again
from app.use_cases.galleries import take_effect
from app.use_cases.publish import publish
from app.use_cases.restore import EvidenceAway, NotEmpty, RestoreBusy, Restored, StillServing, abandon, restore
from app.use_cases.sweep_photos import sweep_photos
from storage.archive import Archive, BackupBroken, BackupMissing
from storage.evidence import EvidenceUnavailable
from storage.photos import PhotoStoreUnavailable
from tests.builders import (
    active,
    default_gallery,
    enrolled,
    erased,
    identified,
    known,
    screened,
    settled,
    suspected,
    with_sample,
)
from tests.fakes import FakeEngine
from tests.support.backup_process import KILL_AT, environment_of

REPOSITORY = Path(__file__).parents[2]


class Cut(BaseException):
    """The end of a process, as far as a test within one can tell."""


def silent(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Runtime]:
    """A process that serves, with an empty gallery `default` whose photos need no quality."""
    async with open_runtime(settings, FakeEngine()) as runtime:
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
        yield runtime


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first search opens its gallery, and nothing here is about how long that may take."""
    monkeypatch.setattr("app.search.PATIENCE_SECONDS", 30.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the backups go."""
    return tmp_path / "backups"


@pytest.fixture
def elsewhere(settings: Settings, tmp_path: Path) -> Iterator[Settings]:
    """Another machine: nothing there yet but the same key, and the evidence, which is outside of what was lost."""
    name = settings.mongodb_database.replace("test", "two")  # no longer than a name may be
    folders = {"storage_path": "photos-b", "vector_db_path": "index-b", "index_cache_path": "index-copies-b"}
    yield settings.model_copy(
        update={"mongodb_database": name, **{field: tmp_path / folder for field, folder in folders.items()}}
    )
    with pymongo.MongoClient[dict[str, object]](settings.mongodb_uri) as client:
        client.drop_database(name)


async def restored(
    settings: Settings, folder: Path, tell: Tell = silent, *, set_id: str | None = None, replace: bool = False
) -> Restored:
    """The backup in place, in the database of these settings."""
    return await restore(
        lambda: open_runtime(settings, FakeEngine(), restoring=True),
        erase_again,
        sequence.close,
        folder,
        tell,
        set_id=set_id,
        replace=replace,
    )


async def logged(runtime: Runtime) -> int:
    """Every event in the tree, with a signed head outside; the size of the log."""
    while await sequence.grow(runtime):
        pass
    head = await sequence.sign(runtime)
    await sequence.deliver(runtime)
    return head.size


async def names_found(runtime: Runtime, *people: str) -> list[str]:
    """Who is found by a fresh photo of these people."""
    return [candidate.identity_id for candidate in (await identified(runtime, *people)).candidates]


async def test_h100_yesterdays_backup_is_put_in_place_and_the_erased_stay_erased(
    settings: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        ann, bob = await active(runtime, "ann", external_ref="NID-1"), await active(runtime, "bob")
        held, _ = await suspected(runtime, "bob", capture=3)
        before = await logged(runtime)
        made = await back_up(runtime, folder, silent)
        # What happens after it: an erasure, which must outlive the restore, and an enrolment, which is lost with the store.
        await erased(runtime, ann)
        lost = await active(runtime, "cleo")
        lost_size = await logged(runtime)
        key_before = (await AuditKey.active()).id
    assert (made.photos, made.copied, made.missing) == (3, 3, 0)

    done = await restored(settings, folder, replace=True)

    assert (done.set_id, done.erased_again, done.unreadable) == (made.id, 1, ())
    assert done.log_size == before
    assert len(done.log) == 1
    assert f"events {before} to {lost_size - 1} are lost" in done.log[0]
    async with opened(settings) as runtime:
        assert await names_found(runtime, "ann") == []
        assert await names_found(runtime, "bob") == [bob.id]
        assert await names_found(runtime, "cleo") == []
        assert await Identity.living(ann.id) is None
        assert await Identity.get(lost.id) is None
        assert (await known(held)).status == "suspected_duplicate"
        left = await Identity.get(ann.id)
        assert left is not None
        assert (left.status, left.wrapped_key, left.samples) == ("erased", None, [])
        assert not [photo.key async for photo in runtime.photos.list() if ann.id in photo.key]
        event = await AuditEvent.find_one({"action": "backup.restore"})
        assert event is not None
        assert (event.subject.id, event.detail["log_size"], event.detail["erased_again"]) == (made.id, before, 1)
        assert "are lost" in str(event.detail["log"])
        assert (await AuditKey.active()).id != key_before
        again = await settled(runtime, "ann", capture=1, external_ref="NID-1")
        assert again.status == "active"
        await logged(runtime)
        shutil.rmtree(settings.storage_path / (await default_gallery()).id / lost.id)  # what the sweep of orphans does
        found = await check(runtime, silent)
        assert found.findings == []
        assert found.looked_at["photos"] == 3


async def test_a_backup_comes_back_on_another_machine_with_everything_that_counts(
    settings: Settings, elsewhere: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def enqueue(self: object, gallery_id: str, *, again: str = "") -> bool:
        asked.append(gallery_id)
        return True

    monkeypatch.setattr("app.queue.Queue.enqueue_publication", enqueue)
    async with opened(settings) as runtime:
        ann = await active(runtime, "ann")
        await publish(runtime, by_system("index.publish"), (await default_gallery()).id, holder="test")
        waiting = await enrolled(runtime, "bob")
        await User(username="olga", username_key="olga", password_hash="x", roles=["officer"]).insert()
        await back_up(runtime, folder, silent)
        names = [document.get_collection_name() for document in DOCUMENTS]
        database = runtime.mongo[settings.mongodb_database]
        kept = {name: [r async for r in database[name].find().sort("_id")] for name in names if name not in LEFT_OUT}
        photos = {photo.key: await runtime.photos.get(photo.key) async for photo in runtime.photos.list()}
        epoch = (await default_gallery()).epoch
    await restored(elsewhere, folder)
    assert asked == [ann.gallery_id], "a gallery that had an index gets one"
    async with opened(elsewhere) as runtime:
        database = runtime.mongo[elsewhere.mongodb_database]
        for name, rows in kept.items():
            if name in {"galleries", "users", "audit_events", "audit_keys"}:
                continue
            assert [r async for r in database[name].find().sort("_id")] == rows, name
        assert photos == {photo.key: await runtime.photos.get(photo.key) async for photo in runtime.photos.list()}
        gallery = await default_gallery()
        assert gallery.epoch != epoch
        assert (gallery.seq, gallery.identities, gallery.samples) == (2, 2, 2)
        olga = await User.find_one({"username": "olga"})
        assert olga is not None
        assert olga.access_version > 2**32, "a token of before is refused"
        assert (await known(ann)).status == "active"
        pending = await known(waiting)
        assert pending.outbox_at is not None, "the sweep finds who was waiting for a verdict"
        assert (await screened(runtime, pending)).status == "active"
        await logged(runtime)
        assert (await check(runtime, silent)).findings == []


async def test_a_backup_of_a_busy_service_is_of_one_moment(
    settings: Settings, elsewhere: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing_up, "PART_BYTES", 2000)
    monkeypatch.setattr(backing_up, "DOCUMENTS_READ", 2)
    async with opened(settings) as runtime:
        for number in range(6):
            await active(runtime, f"early {number}")
        await logged(runtime)

        async def busy() -> int:
            count = 0
            while True:
                someone = await active(runtime, f"late {count}")
                if count % 3 == 0:
                    await erased(runtime, someone)
                await sequence.grow(runtime)
                count += 1

        working = asyncio.create_task(busy())
        await asyncio.sleep(0.3)
        made = await back_up(runtime, folder, silent)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        people = await Identity.find_all().count()
        parts = OpenSet.of(runtime.keys, Archive(folder)).manifest.parts_of("identities")
    assert len(parts) > 3
    assert made.missing == 0
    await restored(elsewhere, folder)
    async with opened(elsewhere) as runtime:
        assert 6 < await Identity.find_all().count() < people
        await logged(runtime)
        found = await check(runtime, silent)
        assert found.findings == []


async def test_a_backup_that_is_cut_off_anywhere_goes_on_at_the_same_moment(
    settings: Settings, elsewhere: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing_up, "PART_BYTES", 3000)
    monkeypatch.setattr(backing_up, "DOCUMENTS_READ", 2)
    async with opened(settings) as runtime:
        for number in range(5):
            await active(runtime, f"early {number}")
        words: list[str] = []
        allowed = 1

        def cut(stage: str, done: int, total: int) -> None:
            words.append(stage)
            if len(words) == allowed:
                raise Cut

        made, ids = None, set()
        while made is None:
            words.clear()
            try:
                made = await back_up(runtime, folder, cut)
            except Cut:
                ids |= set(Archive(folder).unfinished())
                await active(runtime, f"late {allowed}")  # in no part of the set, however often it goes on
                allowed += 7
        assert len(ids) == 1
        assert allowed > 21
        assert made.id in ids
        assert made.photos == 5
        assert await AuditEvent.find({"action": "backup.make"}).count() == 1
    await restored(elsewhere, folder)
    async with opened(elsewhere) as runtime:
        assert await Identity.find_all().count() == 5
        await logged(runtime)
        assert (await check(runtime, silent)).findings == []


async def test_a_set_whose_moment_mongodb_has_forgotten_is_begun_anew(settings: Settings, folder: Path) -> None:
    async with opened(settings) as runtime:
        await active(runtime, "ann")

        def cut(stage: str, done: int, total: int) -> None:
            raise Cut

        with pytest.raises(Cut):
            await back_up(runtime, folder, cut)
        archive = Archive(folder)
        (old,) = archive.unfinished()
        state = json.loads(archive.read_state(old) or b"")
        useless = [
            json.dumps(state | {"at": [state["at"][0] - 100_000, 1]}), json.dumps(state | {"at": [state["at"][0] * 2, 1]}),
            json.dumps(state | {"database": "another"}), json.dumps(state | {"key": "AAAA"}),
        ]  # fmt: skip
        for text in useless:
            archive.begin(old)
            archive.write_state(old, text)
            made = await back_up(runtime, folder, silent)
            assert made.id != old
            assert archive.unfinished() == []
        for text in (json.dumps(state | {"store": "another"}), "torn"):
            archive.begin(old)
            archive.write_state(old, text)
            assert (await back_up(runtime, folder, silent)).id != old
            assert archive.unfinished() == [old], "its store is unknown, so it stays"


async def test_photos_are_copied_once_and_leave_the_folder_when_their_person_is_erased(
    settings: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
        first = await back_up(runtime, folder, silent)
        await active(runtime, "cleo")
        second = await back_up(runtime, folder, silent)
        assert (first.copied, second.photos, second.copied) == (2, 3, 1)
        gallery = await default_gallery()
        assert (folder / "photos" / gallery.id / ann.id).is_dir()
        await erased(runtime, ann)
        third = await back_up(runtime, folder, silent)
        assert (third.photos, third.copied, third.missing) == (2, 0, 0)
        assert not (folder / "photos" / gallery.id / ann.id).exists()
        assert (await verify(runtime, folder, first.id, silent)).manifest.id == first.id
        shutil.rmtree(folder / "photos" / gallery.id / bob.id)
        with pytest.raises(BackupBroken, match=bob.id):
            await verify(runtime, folder, first.id, silent)
        mended = await back_up(runtime, folder, silent, keep=2)
        assert mended.copied == 1
        assert Archive(folder).finished() == [third.id, mended.id]
        await verify(runtime, folder, None, silent)


async def test_h79_a_photo_that_is_missing_is_told_of_and_holds_nothing_up(settings: Settings, folder: Path) -> None:
    async with opened(settings) as runtime:
        ann = await active(runtime, "ann")
        await active(runtime, "bob")
        await runtime.photos.delete([ann.samples[0].photo_key])
        made = await back_up(runtime, folder, silent)
        assert (made.photos, made.missing, made.identities) == (1, 1, (ann.id,))


async def test_a_backup_with_any_byte_changed_is_refused_before_anything_is_touched(
    settings: Settings, elsewhere: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        await active(runtime, "ann")
        await back_up(runtime, folder, silent)
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
        assert len(files) > 8
        for path in files:
            whole = path.read_bytes()
            for place in {0, len(whole) // 3, len(whole) - 1}:
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
                with pytest.raises((BackupBroken, OtherKey)):
                    await verify(runtime, folder, None, silent)
            path.unlink()
            with pytest.raises((BackupBroken, BackupMissing)):
                await verify(runtime, folder, None, silent)
            path.write_bytes(whole)
        await verify(runtime, folder, None, silent)
    part = next(path for path in files if path.name.startswith("identities"))
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    with pytest.raises(BackupBroken):
        await restored(elsewhere, folder)
    async with opened(elsewhere) as runtime:
        assert await Identity.find_all().count() == 0
        assert not [
            n for n in await runtime.mongo[elsewhere.mongodb_database].list_collection_names() if "restoring" in n
        ]


async def test_another_key_encryption_key_opens_no_backup(
    settings: Settings, elsewhere: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        await active(runtime, "ann")
        await back_up(runtime, folder, silent)
    other = elsewhere.model_copy(update={"key_encryption_key": SecretStr(random_secret())})
    with pytest.raises(OtherKey):
        await restored(other, folder)
    async with opened(other) as runtime:
        with pytest.raises(OtherKey):
            await verify(runtime, folder, None, silent)
        assert await Identity.find_all().count() == 0


async def test_a_backup_of_before_a_change_of_the_key_opens_with_the_former_key_given(
    settings: Settings, elsewhere: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        ann = await active(runtime, "ann")
        await back_up(runtime, folder, silent)
    keys = {
        "key_encryption_key": SecretStr(random_secret()),
        "key_encryption_key_previous": settings.key_encryption_key,
    }
    later = elsewhere.model_copy(update=keys)
    await restored(later, folder)
    async with opened(later) as runtime:
        assert await names_found(runtime, "ann") == [ann.id]


async def test_a6_a_restored_policy_erases_nobody_before_a_week_and_an_officer(
    settings: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        ann = await active(runtime, "ann")
        long_ago = now() - timedelta(days=100)
        await Identity.get_pymongo_collection().update_one({"_id": ann.id}, {"$set": {"created_at": long_ago}})
        due = PendingChange(
            id=new_id(), field="retention_days", old=30, value=1, asked_by="admin-1", asked_at=long_ago,
            effective_at=now() - timedelta(days=1), agreed_by="officer-1", agreed_at=long_ago,
        )  # fmt: skip
        policy = {"policy.retention_days": 30, "pending": due.model_dump()}
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": policy})
        await back_up(runtime, folder, silent)
    await restored(settings, folder, replace=True)
    async with opened(settings) as runtime:
        assert await take_effect(runtime) == 0
        assert await erase.erase_expired(runtime) == 0, "the retention may have been removed since the backup"
        gallery = await default_gallery()
        assert gallery.pending is not None
        assert (gallery.pending.value, gallery.pending.agreed_by) == (1, None)
        week = now() + timedelta(days=6)
        assert gallery.pending.effective_at > week
        assert gallery.retention_held_until is not None
        assert gallery.retention_held_until > week
        over = {"retention_held_until": now() - timedelta(seconds=1)}
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": over})
        assert await erase.erase_expired(runtime) == 1


async def test_a_store_that_holds_people_is_replaced_only_when_that_is_said(settings: Settings, folder: Path) -> None:
    async with opened(settings) as runtime:
        await active(runtime, "ann")
        await back_up(runtime, folder, silent)
        bob = await active(runtime, "bob")
    with pytest.raises(NotEmpty):
        await restored(settings, folder)
    async with opened(settings) as runtime:
        assert (await known(bob)).status == "active"


async def test_a_restore_that_is_cut_off_anywhere_goes_on_and_lets_nobody_serve_before_its_end(
    settings: Settings, elsewhere: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing_up, "PART_BYTES", 3000)
    async with opened(settings) as runtime:
        people = [await active(runtime, f"number {number}") for number in range(4)]
        made = await back_up(runtime, folder, silent)
        await erased(runtime, people[0])
    words: set[tuple[str, int, int]] = set()
    done, closed, cuts = None, 0, 0

    def cut(*word: str | int) -> None:
        known = len(words)
        words.add(word)  # type: ignore[arg-type]
        if len(words) > known and len(words) % 8 == 0:
            raise Cut

    async with AsyncMongoClient[dict[str, Any]](settings.mongodb_uri) as client:
        database = client[elsewhere.mongodb_database]
        while done is None:
            try:
                done = await restored(elsewhere, folder, cut)
            except Cut:
                cuts += 1
                standing = await database[COLLECTION].find_one({"_id": RESTORE})
                if standing is not None and standing["state"] in {"closing", "switching", "mending"}:
                    closed += 1
                    with pytest.raises(NotReady, match="restore"):
                        async with opened(elsewhere):
                            pass
                else:
                    assert not await database["identities"].find_one()
    assert cuts > 5
    assert closed >= 2
    assert done.set_id == made.id
    async with opened(elsewhere) as runtime:
        assert await Restore.standing() is None
        assert await Identity.living(people[0].id) is None
        assert [(await known(person)).status for person in people[1:]] == ["active"] * 3
        assert await AuditEvent.find({"action": "backup.restore"}).count() == 1
        await logged(runtime)
        assert (await check(runtime, silent)).findings == []


def _killed(settings: Settings, *words: str, at: str) -> None:
    """Run the command, and have it die by SIGKILL at that word."""
    command = [sys.executable, "-m", "tests.support.backup_process", *words]
    environment = environment_of(settings) | {KILL_AT: at}
    ended = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=90, check=False
    )
    assert ended.returncode == -9, ended.stdout + ended.stderr


async def test_commands_that_are_killed_go_on_when_they_are_called_again(
    settings: Settings, elsewhere: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    _killed(settings, "backup", str(folder), at="documents:12")
    (begun,) = Archive(folder).unfinished()
    async with opened(settings) as runtime:
        await active(runtime, "cleo")
        made = await back_up(runtime, folder, silent)
        assert (made.id, made.photos, made.missing) == (begun, 2, 0)
    _killed(elsewhere, "restore", str(folder), at="switching:5")
    with pytest.raises(NotReady):
        async with opened(elsewhere):
            pass
    await restored(elsewhere, folder)
    async with opened(elsewhere) as runtime:
        assert await names_found(runtime, "ann") == [ann.id]
        assert await names_found(runtime, "bob") == [bob.id]
        assert await names_found(runtime, "cleo") == []
        await logged(runtime)
        assert (await check(runtime, silent)).findings == []


async def test_a_restore_that_is_cut_off_between_accounts_and_galleries_keeps_what_accounts_may_see(
    settings: Settings, elsewhere: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        gallery = await runtime.create_gallery("bank", runtime.starting_policy())
        app = Client(
            name="kiosk", secret_hash=b"", roles=[Role.RELYING_APP], galleries=[gallery.id], audiences=["bank"]
        )
        await app.insert()
        await back_up(runtime, folder, silent)

    def cut(stage: str, done: int, total: int) -> None:
        if stage == "switching" and "clients" in switched(elsewhere):
            raise Cut

    with pytest.raises(Cut):
        await restored(elsewhere, folder, cut)
    await restored(elsewhere, folder)
    async with opened(elsewhere):
        again = await Client.get(app.id)
        assert again is not None
        assert again.galleries == [gallery.id]
        assert await AudienceClaim.usable_by(again) == (app.id, "bank")


def switched(settings: Settings) -> list[str]:
    """The collections of a restore that have changed places already."""
    with pymongo.MongoClient[dict[str, object]](settings.mongodb_uri) as client:
        names = client[settings.mongodb_database].list_collection_names()
    return [name for name in names if not name.startswith("restoring.") and f"restoring.{name}" not in names]


async def test_who_serves_is_waited_for_and_a_restore_gives_way_when_they_stay(
    settings: Settings, elsewhere: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring_all, "LEAVE_SECONDS", -elsewhere.shutdown_grace_seconds + 0.6)
    async with opened(settings) as runtime:
        await active(runtime, "ann")
        await back_up(runtime, folder, silent)
    name = restoring.application_name(elsewhere.mongodb_database)
    async with AsyncMongoClient[dict[str, Any]](settings.mongodb_uri, appname=name) as serving:
        await serving.admin.command("ping")
        with pytest.raises(StillServing, match="processes on"):
            await restored(elsewhere, folder)
        assert not await restoring.is_closed(serving[elsewhere.mongodb_database])
        assert not await serving[elsewhere.mongodb_database]["identities"].find_one()
    await restored(elsewhere, folder)
    async with opened(elsewhere):
        assert await Identity.find_all().count() == 1


async def test_a_serving_process_ends_itself_when_a_backup_is_put_in_place(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, "LOOK_SECONDS", 0.05)
    ended: list[int] = []
    monkeypatch.setattr(restoring.os, "kill", lambda _, number: ended.append(number))
    database = runtime.mongo[runtime.settings.mongodb_database]
    async with restoring.leaving_for_a_restore(database):
        standing = await Restore.begin("a set")
        await asyncio.sleep(0.2)
        assert ended == []  # loading disturbs nobody
        await standing.turn("closing")
        await asyncio.sleep(0.2)
        assert ended == [15]
    waiting = asyncio.create_task(restoring.admitted(database, waits=True))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    with pytest.raises(NotReady):
        await restoring.admitted(database, waits=False)
    await Restore.end()
    async with asyncio.timeout(2):
        await waiting


async def test_a_restore_that_only_loads_can_be_forgotten(
    settings: Settings, elsewhere: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        await active(runtime, "ann")
        await back_up(runtime, folder, silent)

    def cut(stage: str, done: int, total: int) -> None:
        if stage == "indexes":
            raise Cut

    with pytest.raises(Cut):
        await restored(elsewhere, folder, cut)
    async with opened(elsewhere) as runtime:
        assert (await check(runtime, silent)).counts == {"restore-unfinished": 1}
        assert await abandon(runtime)
        assert not await abandon(runtime)
        names = await runtime.mongo[elsewhere.mongodb_database].list_collection_names()
        assert not [name for name in names if name.startswith("restoring.")]
        standing = await Restore.begin("a set")
        await standing.turn("mending")
        with pytest.raises(RestoreBusy):
            await abandon(runtime)


async def test_photos_that_a_loading_restore_relies_on_are_not_swept(settings: Settings, folder: Path) -> None:
    async with opened(settings) as runtime:
        await active(runtime, "ann")
        without_bob = await back_up(runtime, folder, silent)
        bob = await active(runtime, "bob")
        with_bob = await back_up(runtime, folder, silent)
    await restored(settings, folder, set_id=without_bob.id, replace=True)
    _made_days_ago(settings.storage_path)

    def cut(stage: str, done: int, total: int) -> None:
        if stage == "indexes":
            raise Cut

    with pytest.raises(Cut):
        await restored(settings, folder, cut, set_id=with_bob.id, replace=True)
    async with opened(settings) as runtime:
        assert await sweep_photos(runtime) == 0
        assert (await check(runtime, silent, repair=True)).standing == len(("photo-orphan", "restore-unfinished"))
    await restored(settings, folder, replace=True)
    async with opened(settings) as runtime:
        assert await runtime.photos.get((await known(bob)).samples[0].photo_key)


async def test_a_sweep_asks_for_a_restore_before_each_deletion(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def begins(keys: list[str], galleries: set[str]) -> SortedKeys:
        found = await sorted_by_owner(keys, galleries)
        await Restore.begin("a set")
        return found

    async with opened(settings) as runtime:
        ann = await active(runtime, "ann")
        await runtime.photos.put(f"{ann.gallery_id}/{ann.id}/{new_id()}", b"left")
        _made_days_ago(settings.storage_path)
        for module in (checking, sweeping):
            monkeypatch.setattr(module, "sorted_by_owner", begins)
        assert await sweep_photos(runtime) == 0
        await Restore.end()
        await check(runtime, silent, repair=True)
        await Restore.end()
        monkeypatch.setattr(sweeping, "sorted_by_owner", sorted_by_owner)
        assert await sweep_photos(runtime) == 1


def _made_days_ago(place: Path) -> None:
    moment = time.time() - 3 * 86400
    for path in place.rglob("*"):
        os.utime(path, (moment, moment))


async def test_sessions_answered_requests_and_tokens_do_not_come_back(
    settings: Settings, elsewhere: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        await active(runtime, "ann")
        database = runtime.mongo[settings.mongodb_database]
        for name in LEFT_OUT - {"leases", "restores"}:
            await database[name].insert_one({"_id": "left", "purge_at": None})
        bank = Client(name="Bank", secret_hash=b"x", roles=["relying_app"])
        await bank.insert()
        await back_up(runtime, folder, silent)
        tokens: list[str] = []
        for version in (1, 2, 3):  # after so many changes of the client since the backup
            tokens.append((await runtime.access.issue(bank.model_copy(update={"access_version": version}))).text)
            await Client.get_pymongo_collection().update_one({"_id": bank.id}, {"$set": {"access_version": version}})
            assert (await runtime.access.authenticate(tokens[-1])).id == bank.id
    await restored(elsewhere, folder)
    async with AsyncMongoClient[dict[str, Any]](settings.mongodb_uri) as client:
        there = client[elsewhere.mongodb_database]
        for name in LEFT_OUT:
            assert not await there[name].find_one({"_id": "left"}), name
        raised = await there["clients"].find_one()
        assert raised is not None
        assert 2**32 < raised["access_version"] <= 2**40
    await restored(settings, folder, replace=True)
    async with opened(settings) as runtime:
        for token in tokens:
            with pytest.raises(Unauthenticated):
                await runtime.access.authenticate(token)
        again = await Client.get(bank.id)
        assert again is not None
        assert again.access_version != raised["access_version"]
        assert (await runtime.access.authenticate((await runtime.access.issue(again)).text)).id == bank.id
    async with AsyncMongoClient[dict[str, Any]](settings.mongodb_uri) as client:
        there = client[settings.mongodb_database]
        for name in EMPTIED:
            assert not await there[name].find_one(), name
        for name in UNTOUCHED - {"leases", "restores"}:
            assert await there[name].find_one(), name


async def test_the_ledger_of_a_later_backup_counts_where_the_one_outside_was_lost(
    settings: Settings, elsewhere: Settings, folder: Path, tmp_path: Path
) -> None:
    async with opened(settings) as runtime:
        ann = await active(runtime, "ann")
        first = await back_up(runtime, folder, silent)
        await erased(runtime, ann)
        await back_up(runtime, folder, silent)
    torn = tmp_path / "nothing" / "deletions" / "20261121T120000000Z-someone.json"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    alone = elsewhere.model_copy(update={"evidence_path": tmp_path / "nothing"})
    done = await restored(alone, folder, set_id=first.id)
    assert (done.set_id, done.erased_again, done.log) == (first.id, 1, ())
    assert done.unreadable == (f"deletions/{torn.name}",), "what cannot be read is told of"
    async with opened(alone):
        assert await Identity.living(ann.id) is None
        assert await Deletion.get(ann.id) is not None


async def _erased_but_not_outside(runtime: Runtime, identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    """Erase somebody while neither the photo nor the evidence store answers: the database alone knows of it."""

    async def failing(*_: object) -> None:
        raise EvidenceUnavailable("gone")

    async def keeps(*_: object) -> int:
        raise PhotoStoreUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(runtime.evidence, "append", failing)
        patch.setattr(runtime.photos, "delete", keeps)
        await erased(runtime, identity)
    assert await runtime.evidence.names(LEDGER) == []


async def test_h100_an_erasure_that_only_the_database_knew_outlives_its_replacement_however_often_that_is_cut_off(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(settings) as runtime:
        ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
        await back_up(runtime, folder, silent)
        ann = await with_sample(runtime, ann, "ann")  # a photo that the backup does not know
        await _erased_but_not_outside(runtime, ann, monkeypatch)
        first = await Deletion.get(ann.id)
        assert first is not None
    for word in ("waiting for the service to leave", "switching", "erasures"):

        def cut(stage: str, done: int, total: int, word: str = word) -> None:
            if stage == word and done == total:
                raise Cut

        with pytest.raises(Cut):
            await restored(settings, folder, cut, replace=True)
    await restored(settings, folder, replace=True)
    async with opened(settings) as runtime:
        left = await Identity.get(ann.id)
        assert left is not None
        assert (left.status, left.wrapped_key, left.samples) == ("erased", None, [])
        assert await names_found(runtime, "ann") == []
        assert await names_found(runtime, "bob") == [bob.id]
        deletion = await Deletion.get(ann.id)
        assert deletion is not None
        assert (deletion.receipt, deletion.erased_at) == (first.receipt, first.erased_at), (
            "the receipt stays as it was given"
        )
        await erase.settle_overdue(runtime)
        assert [
            Deletion.from_ledger(await runtime.evidence.read(n), runtime.keys).id
            for n in await runtime.evidence.names(LEDGER)
        ] == [ann.id]
        names = await runtime.mongo[settings.mongodb_database].list_collection_names()
        assert not [name for name in names if "." in name], "nothing of the database of before is left"
        assert [photo.key async for photo in runtime.photos.list()] == [bob.samples[0].photo_key]


async def test_h100_no_log_is_replaced_before_a_head_over_all_of_it_is_outside(
    settings: Settings, folder: Path, tmp_path: Path
) -> None:
    async with opened(settings) as runtime:
        await active(runtime, "ann")
        before = await logged(runtime)
        await back_up(runtime, folder, silent)
        bob = await active(runtime, "bob")
        while await sequence.grow(runtime):
            pass
        undelivered = await sequence.sign(runtime)
        await runtime.transaction(
            lambda session: record(session, by_system("test"), subject_kind="none", subject_id=None)
        )
        events = await AuditEvent.find_all().count()  # the last one is in no head, and without a number
        assert undelivered.size < events
    blocked = tmp_path / "a file"
    blocked.write_bytes(b"where the evidence's folder should be")
    with pytest.raises(EvidenceAway, match="nothing in use was touched"):
        await restored(settings.model_copy(update={"evidence_path": blocked}), folder, replace=True)
    async with opened(settings) as runtime:  # the service is back meanwhile
        assert (await known(bob)).status == "active"
    done = await restored(settings, folder, replace=True)
    async with opened(settings) as runtime:
        assert await Identity.get(bob.id) is None
        heads = await runtime.evidence.names("heads/")
        assert [int(name.rpartition("/")[2].split("-")[1]) for name in heads] == [before, events]
    assert f"events {before} to {events - 1} are lost" in done.log[0]


async def test_a_log_that_cannot_be_numbered_is_closed_as_far_as_it_goes(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await sequence.close(runtime) == 0
    assert await runtime.evidence.names("heads/") == [], "nothing was ever written into it"
    await active(runtime, "ann")
    await sequence.grow(runtime)
    await sequence.sign(runtime)
    await active(runtime, "bob")

    async def broken(_: Runtime) -> int:
        raise ValueError("an event that has no canonical JSON")

    monkeypatch.setattr(sequence, "grow", broken)
    assert await sequence.close(runtime) == 0
    assert len(await runtime.evidence.names("heads/")) == 1


async def test_h100_who_can_add_a_line_to_the_ledger_can_neither_have_somebody_erased_nor_hide_an_erasure(
    settings: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        ann, bob, cleo = [await active(runtime, name) for name in ("ann", "bob", "cleo")]
        await back_up(runtime, folder, silent)
        await erased(runtime, ann)
        (genuine,) = await runtime.evidence.names(LEDGER)
        line = json.loads(await runtime.evidence.read(genuine))
        forged = {
            f"{LEDGER}20261121T120000000Z-{bob.id}.json": {k: v for k, v in line.items() if k != "tag"} | {"identity_id": bob.id},
            f"{LEDGER}20261121T120000000Z-{cleo.id}.json": line | {"identity_id": cleo.id},
            f"{LEDGER}29991231T120000000Z-{ann.id}.json": line | {"erased_at": "2999-12-31T12:00:00Z"},
        }  # fmt: skip
        for name, content in forged.items():
            await runtime.evidence.append(name, json.dumps(content).encode())
        # As in a store that was lost; and a row that nobody can read holds up nothing.
        await Deletion.get_pymongo_collection().delete_many({})
        await Deletion.get_pymongo_collection().insert_one({"_id": "torn", "erased_at": "once"})
    done = await restored(settings, folder, replace=True)
    torn = "the replaced database's of torn"
    assert (done.erased_again, sorted(done.unreadable)) == (1, [*sorted(forged), torn]), "told of, and not obeyed"
    async with opened(settings) as runtime:
        assert await Identity.living(ann.id) is None
        assert [(await known(one)).status for one in (bob, cleo)] == ["active", "active"]
        assert [row.id for row in await Deletion.find_all().to_list()] == [ann.id]


async def test_h90_index_files_of_before_a_restore_are_never_taken_for_the_restored_gallerys(
    settings: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        ann = await active(runtime, "ann")
        gallery = await default_gallery()
        await back_up(runtime, folder, silent)
        bob = await active(runtime, "bob")
        generation = await publish(runtime, by_system("index.publish"), gallery.id, holder="test")
        assert generation.watermark == 2  # newer than the documents will be
        assert await names_found(runtime, "bob") == [bob.id]
    await restored(settings, folder, replace=True)
    async with opened(settings) as runtime:
        restored_gallery = await default_gallery()
        assert (restored_gallery.published, restored_gallery.seq) == (None, 1)
        assert restored_gallery.epoch != gallery.epoch
        assert await names_found(runtime, "ann") == [ann.id]
        cleo = await active(runtime, "cleo")  # takes the `seq` that was bob's
        assert cleo.samples[0].seq == bob.samples[0].seq
        assert await names_found(runtime, "bob") == []
        assert await names_found(runtime, "cleo") == [cleo.id]
        again = await publish(runtime, by_system("index.publish"), gallery.id, holder="test")
        assert again.count == 2
        assert await names_found(runtime, "bob") == []
        assert await names_found(runtime, "cleo") == [cleo.id]


async def test_a_backup_of_an_older_version_is_migrated_where_it_is_put_in_place(
    settings: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        await Gallery.get_pymongo_collection().update_one(
            {"name": "default"},
            {"$set": {"policy.second_face_share": 0.5}, "$unset": {"policy.second_face_prominence": 1}},
        )
        await active(runtime, "ann")
        await logged(runtime)
        await back_up(runtime, folder, silent)
    await restored(settings, folder, replace=True)
    async with opened(settings) as runtime:
        assert (await default_gallery()).policy.second_face_prominence == 0.5
        stored = await Gallery.get_pymongo_collection().find_one({"name": "default"})
        assert stored is not None
        assert "second_face_share" not in stored["policy"]
        assert len(await names_found(runtime, "ann")) == 1


def test_of_every_collection_somebody_has_decided_whether_it_is_backed_up() -> None:
    """A new document: put it here, or into what is left out, with the reason."""
    kept = {
        "audience_claims", "audit_events", "audit_heads", "audit_keys", "audit_nodes", "audit_tree", "cases", "clients",
        "deletions", "galleries", "gallery_changes", "identities", "pairs", "proposals", "root_secrets", "sample_removals",
        "scan_clusters", "scan_pairs", "scans", "signing_keys", "stranger_counts", "users",
    }  # fmt: skip
    names = {document.Settings.name for document in DOCUMENTS}  # type: ignore[attr-defined]
    assert names == kept | LEFT_OUT
    assert not kept & LEFT_OUT


async def test_how_long_mongodb_remembers_is_as_before_once_a_backup_is_made(runtime: Runtime, folder: Path) -> None:
    name = "minSnapshotHistoryWindowInSeconds"

    async def window() -> int:
        return int((await runtime.mongo.admin.command({"getParameter": 1, name: 1}))[name])

    seen: list[int] = []

    async def looked() -> None:
        seen.append(await window())

    before = await window()
    tasks: list[asyncio.Task[None]] = []
    await back_up(runtime, folder, lambda *_: tasks.append(asyncio.create_task(looked())))
    await asyncio.gather(*tasks)
    assert max(seen) == 7200
    assert await window() == before == 300


async def test_a_backup_made_by_a_newer_version_is_refused(
    settings: Settings, elsewhere: Settings, folder: Path
) -> None:
    async with opened(settings) as runtime:
        await back_up(runtime, folder, silent)
        old = OpenSet.of(runtime.keys, Archive(folder))
        writer = old.archive.write_part(old.manifest.id, old.key, "wonders-00000.part", "wonders")
        writer.add([bson.encode({"_id": 1})])
        parts = (*old.manifest.parts, writer.close())
        old.archive.finish(old.manifest.model_copy(update={"parts": parts}), old.key)
    with pytest.raises(BackupBroken, match="wonders"):
        await restored(elsewhere, folder)


async def test_two_backups_at_once_into_one_folder_are_refused(runtime: Runtime, folder: Path) -> None:
    from storage.archive import BackupBusy

    both = await asyncio.gather(
        back_up(runtime, folder, silent), back_up(runtime, folder, silent), return_exceptions=True
    )
    assert {type(one) for one in both} == {Made, BackupBusy}
    assert (await AuditTree.current()).size == 0
    assert (await Login.find_all().count(), await IdempotencyClaim.find_all().count()) == (0, 0)
