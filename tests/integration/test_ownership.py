"""Owners of folders and buckets: two databases with the same places, foreign files, restore drills and copied databases."""

import asyncio
import os
import shutil
import time
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pymongo
import pytest
from pydantic import SecretStr

from app.audit import by_system
from app.backups import Tell
from app.config import PlaceRefused, Settings
from app.documents.base import new_id
from app.documents.deletions import LEDGER, Deletion
from app.documents.galleries import Gallery
from app.documents.stores import EnrolmentBegun, Store
from app.orphans import FOREIGN
from app.runtime import Runtime, open_runtime
from app.use_cases import back_up, erase, galleries, restore, sequence, sweep_photos
from app.use_cases import check as checking
from app.use_cases.publish import keep_promises, publish
from storage.ownership import MARK
from storage.photos import PhotosNotOurs, PhotoStoreUnavailable
from tests.builders import active, by_officer, default_gallery, enrolled, erased, identified, known
from tests.fakes import FakeEngine
from tests.support.logs import captured_logs
from tests.support.services import Server
from workers import jobs

DAYS_AGO = time.time() - 2 * 24 * 3600
#: Files that earlier versions deleted according to reports, and variants.
FOREIGN_FILES = (
    "gallery/identity/sample", "home/ann/thesis.txt", "notes.txt", "notes", "deep/a/b/c/d/e/f", "photos/a", "other_index/b",
    f"{new_id()}/{new_id()}/{new_id()}", f"{new_id()}/{new_id()}-3/MANIFEST.json", f"{new_id().upper()}/x", "empty/folder/",
    ".hidden/file", ".incoming/thesis.txt",
)  # fmt: skip


def plant(root: Path, names: tuple[str, ...] = FOREIGN_FILES) -> set[str]:
    """Put foreign files there that are two days old. Returns the content afterwards."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(b"foreign")
            os.utime(path, (DAYS_AGO, DAYS_AGO))
    (root / "link").symlink_to("/")
    return content(root)


def content(root: Path) -> set[str]:
    """Every file, link and folder below it, except files that only serve the store itself."""
    found = {str(path.relative_to(root)) for path in root.rglob("*")}
    return {name for name in found if name != ".incoming" and not name.startswith(MARK) and not name.endswith(".lock")}


def places(settings: Settings) -> list[Path]:
    return [settings.storage_path, settings.vector_db_path, settings.index_cache_path]


async def swept(runtime: Runtime) -> None:
    """Run everything that deletes files without being asked."""
    await jobs.sweep_orphan_photos(jobs.Context(runtime=runtime))
    await keep_promises(runtime)
    published = {gallery.id for gallery in await Gallery.find_all().to_list() if gallery.published is not None}
    runtime.search.store.drop_other_copies(published)
    await checking.check(runtime, lambda *_: None, repair=True)
    await erase.settle_overdue(runtime)
    await runtime.photos.check()


def copied(settings: Settings, another: Settings) -> None:
    """Copy the database as mongodump and mongorestore do. The copy has the same store id."""
    with pymongo.MongoClient[dict[str, Any]](settings.mongodb_uri) as client:
        source, target = client[settings.mongodb_database], client[another.mongodb_database]
        for name in source.list_collection_names():
            if documents := list(source[name].find()):
                target[name].insert_many(documents)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.search.PATIENCE_SECONDS", 30.0)


@pytest.fixture
def another(settings: Settings) -> Iterator[Settings]:
    """The settings of another database with the same places."""
    name = settings.mongodb_database.replace("test", "two")
    yield settings.model_copy(update={"mongodb_database": name})
    with pymongo.MongoClient[dict[str, object]](settings.mongodb_uri) as client:
        client.drop_database(name)


@pytest.fixture
async def published(settings: Settings) -> set[str]:
    """The content of a stopped store's places. The store has people, photos, an index and copies."""
    async with open_runtime(settings, FakeEngine()) as runtime:
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
        await active(runtime, "ann")
        await erased(runtime, await active(runtime, "bob"))
        gallery = await default_gallery()
        await publish(runtime, by_system("index.publish"), gallery.id, holder="test")
        async with asyncio.timeout(30):  # until this host has its copy
            while (state := runtime.search.state(gallery.id)) is None or state.generation is None:
                await runtime.search.warm(await default_gallery())
                await asyncio.sleep(0.05)
    return {f"{root}/{name}" for root in places(settings) for name in content(root)}


async def test_a_second_database_with_the_same_places_does_not_start(
    settings: Settings, another: Settings, published: set[str]
) -> None:
    with pytest.raises(PlaceRefused) as refused:
        async with open_runtime(another, FakeEngine()):
            pass
    for setting in ("STORAGE_PATH", "VECTOR_DB_PATH", "INDEX_CACHE_PATH"):
        assert f"{setting} " in str(refused.value)
    assert "belongs to another store" in str(refused.value)
    assert {f"{root}/{name}" for root in places(settings) for name in content(root)} == published
    async with open_runtime(settings, FakeEngine()) as runtime:
        assert (await identified(runtime, "ann")).candidates


@pytest.mark.parametrize("place", ["storage_path", "vector_db_path", "index_cache_path"])
async def test_foreign_files_are_never_deleted_whatever_is_done_with_the_place(settings: Settings, place: str) -> None:
    root: Path = getattr(settings, place)
    planted = plant(root)
    with pytest.raises(
        PlaceRefused, match="has no mark of a store, and contains names that this database does not know"
    ):
        async with open_runtime(settings, FakeEngine()):
            pass
    assert content(root) == planted
    async with open_runtime(settings, FakeEngine(), claims=False) as runtime:
        assert {one.state for one in await runtime.places.adopt({"photos", "index", "copies"})} == {"ours"}
    async with open_runtime(settings, FakeEngine()) as runtime:
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
        ann = await active(runtime, "ann")
        await publish(runtime, by_system("index.publish"), ann.gallery_id, holder="test")
        await identified(runtime, "ann")
        with captured_logs() as logs:
            await swept(runtime)
        assert content(root) >= planted, planted - content(root)
        told = "foreign_photos_left_alone" if place == "storage_path" else "foreign_index_files_left_alone"
        (line,) = [line for line in logs if line["event"] == told]
        assert line["count"] >= 5
        assert line["examples"]
        kinds = (await checking.check(runtime, lambda *_: None)).counts
        assert kinds["photo-foreign" if place == "storage_path" else "index-foreign"] == line["count"]
        assert (await identified(runtime, "ann")).candidates


async def test_photos_of_unknown_people_in_a_known_gallery_stay_and_are_counted(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    keys = [f"{ann.gallery_id}/{new_id()}/{new_id()}", f"{new_id()}/{ann.id}/{new_id()}"]
    for key in keys:
        await runtime.photos.put(key, b"x")
        os.utime(runtime.settings.storage_path / key, (DAYS_AGO, DAYS_AGO))
    assert await sweep_photos.sweep_photos(runtime) == 0
    assert FOREIGN._value.get() == 2
    assert {photo.key async for photo in runtime.photos.list()} == {*keys, ann.samples[0].photo_key}


async def test_existing_places_without_marks_are_taken_into_use_without_an_operator(
    settings: Settings, published: set[str]
) -> None:
    for root in (*places(settings), settings.evidence_path):
        (root / MARK).unlink(missing_ok=True)
    shutil.rmtree(settings.evidence_path / "store")
    async with open_runtime(settings, FakeEngine()) as runtime:
        assert {one.state for one in await runtime.places.standings()} == {"ours"}
        await swept(runtime)
        assert (await identified(runtime, "ann")).candidates


async def test_one_folder_for_everything_belongs_to_one_store(settings: Settings, tmp_path: Path) -> None:
    one = tmp_path / "one"
    paths = {"storage_path": one, "vector_db_path": one, "index_cache_path": one / "copies", "evidence_path": one}
    together = settings.model_copy(update=paths)
    for _ in range(2):
        async with open_runtime(together, FakeEngine()) as runtime:
            await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
            ann = await active(runtime, "ann")
            await publish(runtime, by_system("index.publish"), ann.gallery_id, holder="test")
            while await sequence.grow(runtime):
                pass
            await sequence.sign(runtime)
            await sequence.deliver(runtime)
            for path in one.rglob("*"):
                os.utime(path, (DAYS_AGO, DAYS_AGO))
            await swept(runtime)
            assert (await checking.check(runtime, lambda *_: None)).findings == []
            assert await runtime.photos.get(ann.samples[0].photo_key)
            await erased(runtime, ann)
        (one / MARK).unlink()


async def test_a_drill_reads_the_photos_of_another_store_and_changes_nothing(
    settings: Settings, another: Settings, published: set[str], tmp_path: Path
) -> None:
    async with open_runtime(settings, FakeEngine()) as runtime:
        await back_up.back_up(runtime, tmp_path / "backups", lambda *_: None)
    drill = another.model_copy(update={"foreign_stores": "read"})
    await restore.restore(
        lambda: open_runtime(drill, FakeEngine(), restoring=True), erase.erase_again, sequence.close,
        tmp_path / "backups", lambda *_: None,
    )  # fmt: skip
    for root in places(settings):
        for path in root.rglob("*"):
            os.utime(path, (DAYS_AGO, DAYS_AGO), follow_symlinks=False)
    async with open_runtime(drill, FakeEngine()) as runtime:
        (candidate,) = (await identified(runtime, "ann")).candidates
        ann = await known(candidate.identity_id)
        assert await runtime.photos.get(ann.samples[0].photo_key)
        with pytest.raises(PhotosNotOurs):
            await enrolled(runtime, "cleo")
        await erased(runtime, ann)
        await jobs.sweep_orphan_photos(jobs.Context(runtime=runtime))
        await jobs.sweep_index(jobs.Context(runtime=runtime))
        await erase.settle_overdue(runtime)
        with pytest.raises(PhotoStoreUnavailable):
            await checking.check(runtime, lambda *_: None, repair=True)
        assert await runtime.evidence.names(LEDGER), "the ledger is read"
    assert {f"{root}/{name}" for root in places(settings) for name in content(root)} == published
    async with open_runtime(settings, FakeEngine()) as runtime:
        assert not [name for name in await runtime.evidence.names(LEDGER) if ann.id in name], (
            "the ledger erases no one here"
        )
        assert (await identified(runtime, "ann")).candidates


async def test_a_drill_counts_the_photos_that_the_other_store_has_deleted_since_the_backup(
    settings: Settings, another: Settings, tmp_path: Path
) -> None:
    async with open_runtime(settings, FakeEngine()) as runtime:
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
        ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
        await back_up.back_up(runtime, tmp_path / "backups", lambda *_: None)
        await erased(runtime, bob)
    before = content(settings.storage_path)

    def cut(stage: str, *_: int) -> None:
        if stage == "indexes":
            raise RuntimeError

    async def drilled(tell: Tell) -> restore.Restored:
        drill = another.model_copy(update={"foreign_stores": "read"})
        return await restore.restore(
            lambda: open_runtime(drill, FakeEngine(), restoring=True), erase.erase_again, sequence.close,
            tmp_path / "backups", tell,
        )  # fmt: skip

    with pytest.raises(RuntimeError):
        await drilled(cut)
    done = await drilled(lambda *_: None)
    assert (done.photos, done.photos_missing, done.erased_again) == (1, 1, 1)
    assert content(settings.storage_path) == before
    async with open_runtime(another.model_copy(update={"foreign_stores": "read"}), FakeEngine()) as runtime:
        assert await runtime.photos.get(ann.samples[0].photo_key)


async def test_a_copied_database_is_a_store_of_its_own(
    settings: Settings, another: Settings, published: set[str]
) -> None:
    copied(settings, another)
    with pytest.raises(PlaceRefused, match="belongs to another store"):
        async with open_runtime(another, FakeEngine()):
            pass
    async with open_runtime(another, FakeEngine(), claims=False):
        copy = await Store.get("store")
    async with open_runtime(settings, FakeEngine()):
        original = await Store.get("store")
    assert copy is not None
    assert original is not None
    assert copy.copied_from == [original.store_id]


def unmount(folder: Path) -> Path:
    """Put an empty folder in its place. Returns where the content is now."""
    mounted = folder.with_name(f"{folder.name}-mounted")
    folder.rename(mounted)
    folder.mkdir()
    return mounted


def mount(mounted: Path, folder: Path) -> None:
    folder.rmdir()
    mounted.rename(folder)


async def test_a_photo_share_that_is_not_mounted_at_the_start_is_left_alone_until_it_is_back(
    settings: Settings, published: set[str]
) -> None:
    folder = settings.storage_path
    mounted = unmount(folder)
    with captured_logs() as logs:
        async with open_runtime(settings, FakeEngine()) as runtime:
            (line,) = [line for line in logs if line["event"] == "place_emptied"]
            assert f"{folder} was marked by this store before, and is empty now" in line["reason"]
            assert (await identified(runtime, "ann")).candidates, "searches continue"
            await keep_promises(runtime)
            with pytest.raises(PhotoStoreUnavailable, match="if it is a share, mount it"):
                await enrolled(runtime, "cleo")
            with pytest.raises(PhotoStoreUnavailable, match="if it is a share, mount it"):
                await sweep_photos.sweep_photos(runtime)
            assert (await checking.check(runtime, lambda *_: None)).counts["place-foreign"] == 1
            assert content(folder) == set()
            assert not (folder / MARK).exists()
            mount(mounted, folder)
            await enrolled(runtime, "dan")
    assert published <= {f"{root}/{name}" for root in places(settings) for name in content(root)} | {
        name for name in published if name.startswith(str(settings.index_cache_path))
    }


async def test_an_emptied_folder_of_the_index_is_filled_again_after_a_start(
    settings: Settings, published: set[str]
) -> None:
    unmount(settings.vector_db_path)
    async with open_runtime(settings, FakeEngine()) as runtime:
        assert {one.state for one in await runtime.places.standings()} == {"ours"}
        await publish(runtime, by_system("index.publish"), (await default_gallery()).id, holder="test")
        assert (await identified(runtime, "ann")).candidates


async def test_an_emptied_place_is_taken_into_use_again_by_adopting_it(settings: Settings, published: set[str]) -> None:
    unmount(settings.storage_path)
    async with open_runtime(settings, FakeEngine(), claims=False) as runtime:
        assert {one.setting: one.state for one in await runtime.places.standings()}["STORAGE_PATH"] == "emptied"
        assert {one.state for one in await runtime.places.adopt({"photos"})} == {"ours"}
    async with open_runtime(settings, FakeEngine()) as runtime:
        assert {one.state for one in await runtime.places.standings()} == {"ours"}
        await enrolled(runtime, "cleo")


async def test_a_folder_that_is_missing_at_the_start_is_made_again(settings: Settings, published: set[str]) -> None:
    for root in (*places(settings), settings.evidence_path):
        shutil.rmtree(root)
    async with open_runtime(settings, FakeEngine()) as runtime:
        await enrolled(runtime, "cleo")
        await publish(runtime, by_system("index.publish"), (await default_gallery()).id, holder="test")
        assert {one.state for one in await runtime.places.standings()} == {"ours"}


async def test_an_empty_folder_for_copies_is_new_on_each_host(settings: Settings, published: set[str]) -> None:
    unmount(settings.index_cache_path)
    async with open_runtime(settings, FakeEngine()) as runtime:
        assert {one.state for one in await runtime.places.standings()} == {"ours"}


async def test_a_copied_database_does_not_remember_the_places_of_its_original(
    settings: Settings, another: Settings, published: set[str]
) -> None:
    """It was moved to a machine with the same paths."""
    copied(settings, another)
    for root in (*places(settings), settings.evidence_path):
        unmount(root)
    async with open_runtime(another, FakeEngine()) as runtime:
        assert {one.state for one in await runtime.places.standings()} == {"ours"}


async def test_a_restore_in_place_keeps_the_store_and_its_proofs(settings: Settings, tmp_path: Path) -> None:
    async with open_runtime(settings, FakeEngine()) as runtime:
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
        ann = await active(runtime, "ann")
        await back_up.back_up(runtime, tmp_path / "backups", lambda *_: None)
        bob = await active(runtime, "bob")
        await EnrolmentBegun.forget([bob.id])  # it was long ago
        before = runtime.places.owner.id
    await restore.restore(
        lambda: open_runtime(settings, FakeEngine(), restoring=True), erase.erase_again, sequence.close,
        tmp_path / "backups", lambda *_: None, replace=True,
    )  # fmt: skip
    for path in settings.storage_path.rglob("*"):
        os.utime(path, (DAYS_AGO, DAYS_AGO))
    async with open_runtime(settings, FakeEngine()) as runtime:
        assert runtime.places.owner.id == before
        assert await sweep_photos.sweep_photos(runtime) == 1
        assert [photo.key async for photo in runtime.photos.list()] == [ann.samples[0].photo_key]


async def test_proofs_of_enrolments_are_deleted_when_they_are_no_longer_needed(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await active(runtime, "ann")
    assert await EnrolmentBegun.get(ann.id) is not None
    await sweep_photos.sweep_photos(runtime)
    assert await EnrolmentBegun.get(ann.id) is not None
    monkeypatch.setattr(sweep_photos, "PROOF_AGE", timedelta(0))
    await sweep_photos.sweep_photos(runtime)
    assert await EnrolmentBegun.find_all().count() == 0


async def test_index_files_of_a_removed_gallery_are_deleted_and_foreign_files_stay(runtime: Runtime) -> None:
    gallery = await galleries.create(runtime, by_officer("gallery.create"), "north", None, runtime.starting_policy())
    await publish(runtime, by_system("index.publish"), gallery.id, holder="test")
    share = runtime.settings.vector_db_path
    foreign = share / new_id() / f"{new_id()}-1" / "MANIFEST.json"
    within = share / gallery.id / "notes.txt"
    for path in (foreign, within):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"foreign")
    await galleries.delete(runtime, by_officer("gallery.delete"), gallery)
    await keep_promises(runtime)
    assert [path.name for path in (share / gallery.id).iterdir()] == ["notes.txt"]
    assert foreign.exists()
    within.unlink()
    await keep_promises(runtime)
    assert not (share / gallery.id).exists()


async def test_processes_that_start_at_once_mark_the_same_evidence(runtime: Runtime) -> None:
    mark = next((runtime.settings.evidence_path / "store").iterdir())
    for _ in range(5):
        mark.unlink()
        places = [replace(runtime.places, evidence=copy(runtime.places.evidence)) for _ in range(8)]
        await asyncio.gather(*(one.claim() for one in places))
        assert {one.evidence.standing.state for one in places if one.evidence.standing is not None} == {"ours"}


async def test_the_evidence_of_another_store_is_read_and_never_written(settings: Settings, another: Settings) -> None:
    async with open_runtime(settings, FakeEngine()) as runtime:
        await runtime.evidence.append("heads/2026-11-21/one.json", b"theirs")
    alone = another.model_copy(
        update={
            "storage_path": settings.storage_path.with_name("photos-b"),
            "vector_db_path": settings.storage_path.with_name("index-b"),
            "index_cache_path": settings.storage_path.with_name("copies-b"),
        }
    )
    async with open_runtime(alone, FakeEngine()) as runtime:
        assert await runtime.evidence.read("heads/2026-11-21/one.json") == b"theirs"
        with pytest.raises(OSError, match="belongs to another store"):
            await runtime.evidence.append("heads/2026-11-21/two.json", b"mine")
        (standing,) = await runtime.places.adopt({"evidence"})
        assert standing.state == "ours"
        await runtime.evidence.append("heads/2026-11-21/two.json", b"mine")
    async with open_runtime(settings, FakeEngine()) as runtime:
        with pytest.raises(OSError, match="belongs to another store"):
            await runtime.evidence.append("heads/2026-11-21/three.json", b"theirs")


async def test_a_bucket_that_staging_and_production_share_belongs_to_production(
    settings: Settings, another: Settings, s3_server: Server
) -> None:
    server: dict[str, object] = {
        "photo_store": "minio", "minio_endpoint": f"127.0.0.1:{s3_server.port}", "minio_access_key": "key",
        "minio_secret_key": SecretStr("secret-key"), "minio_secure": False, "minio_bucket": f"photos-{new_id()}",
        "evidence_bucket": f"evidence-{new_id()}",
    }  # fmt: skip
    apart = {"vector_db_path": settings.storage_path / "b", "index_cache_path": settings.storage_path / "c"}
    production, staging = settings.model_copy(update=server), another.model_copy(update=server | apart)
    async with open_runtime(production, FakeEngine()) as runtime:
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
        ann = await active(runtime, "ann")
        assert {one.state for one in await runtime.places.standings() if "BUCKET" in one.setting} == {"ours"}
    with pytest.raises(PlaceRefused, match=r"^MINIO_BUCKET photos-.* belongs to another store"):
        async with open_runtime(staging, FakeEngine()):
            pass
    # The S3 server does not answer when staging starts, so the owner is checked before the first change.
    closed = staging.model_copy(update={"minio_endpoint": "127.0.0.1:1"})
    async with open_runtime(closed, FakeEngine()) as runtime:
        with pytest.raises(PhotoStoreUnavailable):
            await sweep_photos.sweep_photos(runtime)
    with s3_server.process.frozen():
        async with open_runtime(staging, FakeEngine()) as away:
            await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
            s3_server.process.thaw()
            with pytest.raises(PhotosNotOurs):
                await enrolled(away, "bob")
            with pytest.raises(PhotoStoreUnavailable, match="belongs to another store"):
                await sweep_photos.sweep_photos(away)
    async with open_runtime(production, FakeEngine()) as runtime:
        assert await runtime.photos.get(ann.samples[0].photo_key)


async def test_each_store_has_its_own_default_place_of_copies(settings: Settings, another: Settings) -> None:
    fields = settings.model_dump(exclude={"index_cache_path"}, exclude_unset=True)
    default = Settings(_env_file=None, **fields)  # type: ignore[call-arg]
    first, second = default.index_copies_of("one"), default.index_copies_of("two")
    assert first != second
    assert first.parent == second.parent == default.index_cache_path
    assert settings.index_copies_of("one") == settings.index_cache_path, (
        "a path that an operator sets is used unchanged"
    )


async def test_copies_of_an_earlier_version_in_the_default_place_are_deleted(
    settings: Settings, published: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    fields = settings.model_dump(exclude={"index_cache_path"}, exclude_unset=True)
    default = Settings(_env_file=None, **fields)  # type: ignore[call-arg]
    former = default.index_cache_path
    assert former.is_relative_to(home)
    shutil.copytree(settings.index_cache_path, former, ignore=shutil.ignore_patterns(MARK))
    foreign = former / new_id() / f"{new_id()}-1" / "MANIFEST.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"foreign")
    async with open_runtime(default, FakeEngine(), keep_up=True) as runtime:
        gallery = await default_gallery()
        assert not (former / gallery.id).exists()
        assert foreign.exists()
        assert (former / runtime.places.owner.id / MARK).exists()


@pytest.mark.parametrize("how", ["copied", "restored"])
async def test_a_drill_leaves_the_former_copies_of_its_original(
    settings: Settings,
    another: Settings,
    published: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """The original is of an earlier version, and its copies are in the default place."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    alone = {name: tmp_path / name for name in ("storage_path", "vector_db_path", "evidence_path")}
    fields = another.model_copy(update=alone).model_dump(exclude={"index_cache_path"}, exclude_unset=True)
    drill = Settings(_env_file=None, **fields)  # type: ignore[call-arg]
    former = drill.index_cache_path
    shutil.copytree(settings.index_cache_path, former, ignore=shutil.ignore_patterns(MARK))
    before = content(former)
    if how == "copied":
        copied(settings, another)
    else:
        async with open_runtime(settings, FakeEngine()) as runtime:
            await back_up.back_up(runtime, tmp_path / "backups", lambda *_: None)
        await restore.restore(
            lambda: open_runtime(drill, FakeEngine(), restoring=True), erase.erase_again, sequence.close,
            tmp_path / "backups", lambda *_: None,
        )  # fmt: skip
    async with open_runtime(drill, FakeEngine(), keep_up=True) as runtime:
        assert (await default_gallery()).id in {path.name for path in former.iterdir()}
        assert before <= content(former)
        assert runtime.places.owner.id not in before


async def test_a_deletion_that_the_ledger_alone_knows_proves_a_photo(runtime: Runtime) -> None:
    """An erased person of a deleted gallery. Only the ledger still knows them."""
    gallery = await default_gallery()
    identity_id = new_id()
    await Deletion(id=identity_id, gallery_id=gallery.id, erased_at=gallery.created_at, event_id=new_id()).insert()
    key = f"{gallery.id}/{identity_id}/{new_id()}"
    await runtime.photos.put(key, b"x")
    os.utime(runtime.settings.storage_path / key, (DAYS_AGO, DAYS_AGO))
    assert await sweep_photos.sweep_photos(runtime) == 1


async def test_backups_of_another_store_in_the_same_folder_stay(
    settings: Settings, another: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "backups"
    async with open_runtime(settings, FakeEngine()) as runtime:
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
        ann = await active(runtime, "ann")
        theirs = await back_up.back_up(runtime, folder, lambda *_: None)
    drill = another.model_copy(update={"foreign_stores": "read"})
    await restore.restore(
        lambda: open_runtime(drill, FakeEngine(), restoring=True), erase.erase_again, sequence.close, folder,
        lambda *_: None,
    )  # fmt: skip
    async with open_runtime(drill, FakeEngine()) as runtime:
        await erased(runtime, await known(ann.id))
        mine = [(await back_up.back_up(runtime, folder, lambda *_: None, keep=1)).id for _ in range(2)]
    assert {path.name for path in (folder / "sets").iterdir()} == {theirs.id, mine[-1]}
    async with open_runtime(settings, FakeEngine()) as runtime:
        await back_up.verify(runtime, folder, theirs.id, lambda *_: None)
        assert (folder / "photos" / ann.samples[0].photo_key).exists()
