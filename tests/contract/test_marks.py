"""What a place promises about its mark: a folder, and a bucket on an S3 server."""

import errno
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from minio import Minio

from storage.ownership import MARK, BucketPlace, FolderPlace, Guard, Mark, NotOurs, Owner, Place
from storage.photos import LocalPhotoStore, MinioPhotoStore, PhotosNotOurs
from tests.support.services import Server

GALLERY = str(uuid.uuid4())
PUT = Callable[[str], None]


def client_of(server: Server) -> Minio:
    return Minio(f"127.0.0.1:{server.port}", "a-key", "a-secret-key", secure=False, region="us-east-1")


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place that does not exist yet."""
    if request.param == "folder":
        return FolderPlace("STORAGE_PATH", tmp_path / "photos")
    server: Server = request.getfixturevalue("s3_server")
    return BucketPlace("MINIO_BUCKET", client_of(server), f"bucket-{uuid.uuid4()}", own_names=["heads"])


@pytest.fixture
def put(place: Place, request: pytest.FixtureRequest) -> PUT:
    """Puts a foreign file into the place, without its guard."""

    def put_there(name: str) -> None:
        place.make()
        if isinstance(place, FolderPlace):
            path = Path(place.where) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"foreign")
        else:
            import io

            client = client_of(request.getfixturevalue("s3_server"))
            client.put_object(place.where, name, io.BytesIO(b"foreign"), 7)

    return put_there


def unmarked(place: Place) -> None:
    """Delete the mark."""
    if isinstance(place, FolderPlace):
        (Path(place.where) / MARK).unlink()
    else:
        assert isinstance(place, BucketPlace)
        place._client.remove_object(place.where, MARK)


def guard(place: Place, store: str = "mine", *galleries: str) -> Guard:
    return Guard(place, Owner(store, set(galleries)))


def test_a_missing_place_is_absent_until_something_is_written(place: Place) -> None:
    mine = guard(place)
    assert mine.claim().state == "absent"
    assert not place.exists()
    mine.require()
    assert mine.look().state == "ours"


def test_an_empty_place_is_marked_once_and_refused_to_others(place: Place) -> None:
    place.make()
    assert guard(place).claim().state == "ours"
    marked = place.mark()
    other = guard(place, "another")
    standing = other.claim()
    assert (standing.state, standing.store) == ("foreign", "mine")
    for word in (place.setting, place.where, "mine", "idem stores adopt", "FOREIGN_STORES=read"):
        assert word in standing.sentence
    with pytest.raises(NotOurs):
        other.require()
    place.put_mark(Mark(store="another", marked_at=datetime.now(UTC)))
    assert place.mark() == marked, "a mark is written once"


@pytest.mark.parametrize(
    "name",
    ["notes.txt", f"{uuid.uuid4()}/identity/sample", "home/ann/thesis.txt", f"{GALLERY.upper()}/a/b", "photos/x"],
)
def test_a_place_with_unknown_content_is_not_marked(place: Place, put: PUT, name: str) -> None:
    put(name)
    mine = guard(place, "mine", GALLERY)
    standing = mine.claim()
    assert (standing.state, standing.unknown) == ("unmarked", (name.partition("/")[0],))
    assert name.partition("/")[0] in standing.sentence
    with pytest.raises(NotOurs):
        mine.require()
    assert place.mark() is None


def test_a_place_with_known_galleries_only_is_marked(place: Place, put: PUT) -> None:
    for name in (f"{GALLERY}/a/b", f"{GALLERY}/c", ".incoming/half"):
        put(name)
    assert guard(place, "mine", GALLERY).claim().state == "ours"


def test_adopting_takes_a_place_over_and_deletes_nothing(place: Place, put: PUT) -> None:
    put("notes.txt")
    former = guard(place, "former")
    assert former.adopt().state == "ours"
    assert guard(place, "mine").adopt().state == "ours"
    assert former.claim().state == "foreign"
    assert place.unknown(Owner("mine")) == ["notes.txt"]


def test_a_marked_place_that_is_empty_without_its_mark_is_not_marked_again(place: Place, put: PUT) -> None:
    """It may be the mount point of a share that is not mounted."""
    place.make()
    assert guard(place).claim().state == "ours"
    mine = Guard(place, Owner("mine", {GALLERY}, places={f"{place.setting} {place.where}"}), is_remembered=True)
    unmarked(place)
    standing = mine.claim()
    assert standing.state == "emptied"
    for word in (place.setting, place.where, "if it is a share, mount it", "idem stores adopt"):
        assert word in standing.sentence
    with pytest.raises(OSError, match="if it is a share, mount it"):
        mine.require()
    assert place.mark() is None
    put(f"{GALLERY}/a/b")
    assert mine.claim().state == "ours", "content of the store proves the place"
    unmarked(place)
    put("notes.txt")
    assert mine.claim().state == "unmarked"
    assert mine.adopt().state == "ours"


def test_a_place_that_this_process_marked_is_remembered(place: Place) -> None:
    mine = Guard(place, Owner("mine"), is_remembered=True)
    mine.require()
    unmarked(place)
    assert mine.claim().state == "emptied"


def test_a_place_whose_content_can_be_made_again_is_marked_again(place: Place) -> None:
    mine = guard(place)
    mine.require()
    unmarked(place)
    assert mine.claim().state == "ours"


def test_a_disk_that_is_full_when_a_removed_folder_is_made_leaves_no_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = FolderPlace("STORAGE_PATH", tmp_path / "photos")
    mine = Guard(place, Owner("mine"), is_remembered=True)
    mine.require()
    shutil.rmtree(tmp_path / "photos")
    with monkeypatch.context() as full:

        def refused(*_: object) -> None:
            raise OSError(errno.ENOSPC, "no space left on device")

        full.setattr(FolderPlace, "_write", refused)
        with pytest.raises(OSError, match="no space left"):
            mine.require()
    assert list(tmp_path.iterdir()) == []
    mine.require()
    assert mine.look().state == "ours"


def test_a_mark_that_was_lost_in_a_power_cut_does_not_lock_the_store_out(tmp_path: Path) -> None:
    place = FolderPlace("STORAGE_PATH", tmp_path / "photos")
    mine = Guard(place, Owner("mine"), is_remembered=True)
    mine.require()
    (tmp_path / "photos" / MARK).write_bytes(bytes(100))
    mine.require()
    assert mine.look().state == "ours"


def test_threads_that_make_a_removed_folder_again_all_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = FolderPlace("STORAGE_PATH", tmp_path / "photos")
    mine = Guard(place, Owner("mine"), is_remembered=True)
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.005)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    for _ in range(20):
        with ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(mine.require) for _ in range(8)]:
                done.result()
        shutil.rmtree(tmp_path / "photos")


def test_a_place_that_is_marked_during_a_look_is_not_called_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, owner = FolderPlace("STORAGE_PATH", tmp_path / "photos"), Owner("mine")
    quicker, looking = (
        Guard(FolderPlace("STORAGE_PATH", tmp_path / "photos"), owner, is_remembered=True),
        Guard(place, owner, is_remembered=True),
    )
    real = place.exists

    def overtaken() -> bool:
        quicker.require()
        return real()

    monkeypatch.setattr(place, "exists", overtaken)
    assert looking.look().state == "ours"


def test_one_store_owns_the_place_when_many_claim_it_at_once(place: Place) -> None:
    place.make()
    guards = [guard(place, f"store-{number % 2}") for number in range(8)]
    threads = [threading.Thread(target=one.claim) for one in guards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owner = place.mark()
    assert owner is not None
    assert [one.look().state == "ours" for one in guards] == [one.owner.id == owner.store for one in guards]


def test_an_unreadable_mark_counts_as_another_stores(place: Place, put: PUT) -> None:
    put(MARK)
    assert guard(place).claim().state == "foreign"


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links, for example an SMB share. A mark is created empty there, and then filled."""

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)


@pytest.mark.usefixtures("without_links")
def test_a_mark_that_another_process_is_writing_is_waited_for(tmp_path: Path) -> None:
    mark = tmp_path / MARK
    mark.touch()
    text = Mark(store="mine", marked_at=datetime.now(UTC)).model_dump_json()
    writer = threading.Timer(0.3, mark.write_text, [text])
    writer.start()
    assert guard(FolderPlace("STORAGE_PATH", tmp_path)).claim().state == "ours"
    writer.join()


@pytest.mark.usefixtures("without_links")
@pytest.mark.parametrize("content", [b"", bytes(100)], ids=["nothing", "zeros"])
def test_an_empty_mark_of_a_process_that_died_counts_as_none(tmp_path: Path, content: bytes) -> None:
    """Zeros are what a file system may have after a power cut."""
    (tmp_path / MARK).write_bytes(content)
    assert guard(FolderPlace("STORAGE_PATH", tmp_path)).claim().state == "ours"
    assert guard(FolderPlace("STORAGE_PATH", tmp_path), "another").claim().state == "foreign"


@pytest.mark.usefixtures("without_links")
def test_an_empty_mark_does_not_open_a_place_with_unknown_content(tmp_path: Path) -> None:
    (tmp_path / MARK).touch()
    (tmp_path / "notes.txt").write_bytes(b"foreign")
    assert guard(FolderPlace("STORAGE_PATH", tmp_path)).claim().state == "unmarked"


@pytest.mark.usefixtures("without_links")
def test_a_mark_is_written_once_without_hard_links(tmp_path: Path) -> None:
    place = FolderPlace("STORAGE_PATH", tmp_path)
    assert guard(place).claim().state == "ours"
    assert guard(place, "another").claim().state == "foreign"
    assert [path.name for path in tmp_path.iterdir()] == [MARK]


def test_a_folder_of_a_fresh_file_system_is_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    assert guard(FolderPlace("STORAGE_PATH", tmp_path)).claim().state == "ours"


def test_other_places_of_the_store_may_lie_within(tmp_path: Path) -> None:
    (tmp_path / "data/photos").mkdir(parents=True)
    owner = Owner("mine", folders={tmp_path: frozenset({"heads"}), tmp_path / "data/photos": frozenset()})
    (tmp_path / "heads").mkdir()
    assert Guard(FolderPlace("VECTOR_DB_PATH", tmp_path), owner).claim().state == "ours"
    (tmp_path / MARK).unlink()
    (tmp_path / "database").mkdir()
    assert Guard(FolderPlace("VECTOR_DB_PATH", tmp_path), owner).claim().unknown == ("database",)


def test_a_link_is_not_accepted_as_a_mark(tmp_path: Path) -> None:
    """A link in the place of the mark must not make the process read or write another file."""
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / MARK).symlink_to(elsewhere)
    mine = guard(FolderPlace("STORAGE_PATH", tmp_path / "photos"))
    assert mine.claim().state == "away"
    assert not elsewhere.exists()


@pytest.mark.parametrize("kind", ["local", "minio"])
async def test_a_photo_store_changes_nothing_in_a_place_of_another_store(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store: LocalPhotoStore | MinioPhotoStore
    if kind == "local":
        store = LocalPhotoStore(tmp_path)
        place: Place = FolderPlace("STORAGE_PATH", tmp_path)
    else:
        port = request.getfixturevalue("s3_server").port
        store = MinioPhotoStore(
            endpoint=f"127.0.0.1:{port}", access_key="a-key", secret_key="a-secret-key", bucket=f"bucket-{uuid.uuid4()}",
            region="us-east-1", secure=False,
        )  # fmt: skip
        place = store.place("MINIO_BUCKET")
    await store.put("a/b/c", b"theirs")
    guard(place, "theirs").adopt()
    store.guard = guard(place, "mine")
    for change in (store.put("a/b/d", b"mine"), store.delete(["a/b/c"]), store.check()):
        with pytest.raises(PhotosNotOurs, match="belongs to another store"):
            await change
    assert await store.get("a/b/c") == b"theirs", "it may be read"
    assert [photo.key async for photo in store.list()] == ["a/b/c"], "the mark does not count as a photo"
    store.guard.adopt()
    await store.put("a/b/d", b"mine")
    assert await store.delete(["a/b/c"]) == 1
    guard(place, "theirs").adopt()  # while the process runs
    if kind == "minio":
        with pytest.raises(PhotosNotOurs):
            await store.check()
    with pytest.raises(PhotosNotOurs):
        await store.put("a/b/e", b"mine")
    await store.close()


async def test_a_folder_that_was_removed_while_the_service_runs_comes_back_marked(tmp_path: Path) -> None:
    store = LocalPhotoStore(tmp_path / "photos")
    store.guard = guard(FolderPlace("STORAGE_PATH", tmp_path / "photos"))
    await store.put("a/b/c", b"x")
    (tmp_path / "photos").rename(tmp_path / "away")
    await store.put("a/b/d", b"x")
    assert store.guard.look().state == "ours"
    await store.close()
