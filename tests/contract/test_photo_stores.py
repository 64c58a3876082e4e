"""What every photo store promises, asked of each of them: local files, and the MinIO client's code on an S3 server."""

import asyncio
import os
import stat
import sys
import time
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from minio import Minio
from minio.commonconfig import ENABLED
from minio.versioningconfig import VersioningConfig

from app.devstack.servers import free_port
from storage.photos import (
    LocalPhotoStore,
    MinioPhotoStore,
    PhotoNotFound,
    PhotoStore,
    PhotoStoreUnavailable,
    StoredPhoto,
)
from tests.support.services import Server

#: Two seconds of silence, and what a busy machine of two cores adds.
FAILS_WITHIN_SECONDS = 3.5
#: A refused connection is known at once.
REFUSED_WITHIN_SECONDS = 1.0


def new_key(gallery: str | None = None) -> str:
    return f"{gallery or uuid.uuid4()}/{uuid.uuid4()}/{uuid.uuid4()}"


def new_bucket() -> str:
    return f"bucket-{uuid.uuid4()}"


def minio_store(port: int, bucket: str, *, region: str = "us-east-1") -> MinioPhotoStore:
    return MinioPhotoStore(
        endpoint=f"127.0.0.1:{port}",
        access_key="a-key",
        secret_key="a-secret-key",
        bucket=bucket,
        region=region,
        secure=False,
    )


def plain_client(server: Server) -> Minio:
    return Minio(f"127.0.0.1:{server.port}", "a-key", "a-secret-key", secure=False, region="us-east-1")


async def listed(store: PhotoStore, prefix: str = "") -> list[StoredPhoto]:
    return [photo async for photo in store.list(prefix)]


async def listed_keys(store: PhotoStore, prefix: str = "") -> set[str]:
    return {photo.key for photo in await listed(store, prefix)}


@pytest.fixture(params=["local", "minio"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[PhotoStore]:
    made: PhotoStore
    if request.param == "local":
        made = LocalPhotoStore(tmp_path / "photos")
    else:
        server: Server = request.getfixturevalue("s3_server")
        made = minio_store(server.port, new_bucket())
    yield made
    await made.close()


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[LocalPhotoStore]:
    made = LocalPhotoStore(tmp_path / "photos")
    yield made
    await made.close()


async def test_a_photo_comes_back_as_it_was_put(store: PhotoStore) -> None:
    key, data = new_key(), os.urandom(100_000)
    await store.put(key, data)
    assert await store.get(key) == data


@pytest.mark.parametrize("size", [0, 1, 11 * 1024 * 1024])
async def test_size_does_not_matter(store: PhotoStore, size: int) -> None:
    key, data = new_key(), os.urandom(size)
    await store.put(key, data)
    assert await store.get(key) == data


async def test_a_second_put_replaces_the_first(store: PhotoStore) -> None:
    key = new_key()
    await store.put(key, b"first")
    await store.put(key, b"second")
    assert await store.get(key) == b"second"
    assert len(await listed(store)) == 1


async def test_a_missing_photo_is_not_found(store: PhotoStore) -> None:
    with pytest.raises(PhotoNotFound):
        await store.get(new_key())
    key = new_key()
    await store.put(key, b"photo")
    for near in (key.rpartition("/")[0], f"{key}/deeper", f"{key}0"):
        with pytest.raises(PhotoNotFound):
            await store.get(near)


async def test_deleted_photos_are_gone_and_counted(store: PhotoStore) -> None:
    keys = [new_key("gallery") for _ in range(20)]
    kept = new_key("gallery")
    for key in (*keys, kept):
        await store.put(key, b"photo")
    assert await store.delete([*keys, new_key(), keys[0].rpartition("/")[0]]) == len(keys)
    assert await listed_keys(store) == {kept}
    with pytest.raises(PhotoNotFound):
        await store.get(keys[0])
    assert await store.delete(keys) == 0
    assert await store.delete([]) == 0


async def test_an_empty_store_lists_and_deletes_nothing(store: PhotoStore) -> None:
    assert await listed(store) == []
    assert await store.delete([new_key()]) == 0


async def test_a_listing_keeps_to_its_prefix(store: PhotoStore) -> None:
    keys = ["one/ann/1", "one/ann/2", "one/anna/1", "one/bob/1", "two/ann/1", "one-more/ann/1"]
    for key in keys:
        await store.put(key, b"photo")
    for prefix in ("", "one/", "one/ann/", "one/ann", "one", "one/ann/2", "three/", "one/ann/1/"):
        assert await listed_keys(store, prefix) == {key for key in keys if key.startswith(prefix)}, prefix


async def test_a_listing_tells_when_a_photo_was_put(store: PhotoStore) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)  # S3 tells whole seconds
    await store.put(new_key(), b"photo")
    (photo,) = await listed(store)
    assert before <= photo.modified <= datetime.now(UTC) + timedelta(seconds=2)
    assert photo.modified.utcoffset() == timedelta(0)


async def test_a_listing_longer_than_a_page_is_complete(store: PhotoStore) -> None:
    keys = {f"gallery/identity-{number % 7}/{number:04}" for number in range(1_050)}
    for start in range(0, len(keys), 50):
        await asyncio.gather(*(store.put(key, b"") for key in sorted(keys)[start : start + 50]))
    found = await listed(store)
    assert len(found) == len(keys)
    assert {photo.key for photo in found} == keys


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a/..",
        "a//b",
        "a/",
        "./a",
        ".incoming/x",
        "a\\b",
        "a\0b",
        "a\n",
    ],
)
async def test_a_key_that_could_leave_the_store_is_refused(store: PhotoStore, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        await store.put(key, b"photo")
    with pytest.raises(ValueError, match="key"):
        await store.get(key)
    with pytest.raises(ValueError, match="key"):
        await store.delete([key])


@pytest.mark.parametrize("prefix", ["..", "../", "/", "a/../", "a//", ".incoming/"])
async def test_a_prefix_that_could_leave_the_store_is_refused(store: PhotoStore, prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        await listed(store, prefix)


async def test_many_callers_at_once_get_their_own_photos(store: PhotoStore) -> None:
    photos = {new_key("gallery"): os.urandom(2_000) for _ in range(60)}
    await asyncio.gather(*(store.put(key, data) for key, data in photos.items()))
    assert await asyncio.gather(*(store.get(key) for key in photos)) == list(photos.values())
    deleted = await asyncio.gather(*(store.delete([key]) for key in photos))
    assert deleted == [1] * len(photos)


async def test_puts_and_deletes_of_one_identity_do_not_disturb_each_other(store: PhotoStore) -> None:
    """Deleting an identity's last photo removes its folder, in the middle of another put into it."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads meet at every line

    async def come_and_go(key: str) -> None:
        for _ in range(30):
            await store.put(key, b"photo")
            assert await store.delete([key]) == 1

    try:
        await asyncio.gather(*(come_and_go(f"gallery/identity/{number}") for number in range(6)))
    finally:
        sys.setswitchinterval(usual)
    assert await listed(store) == []


async def test_many_writers_of_one_key_leave_one_whole_photo(local: LocalPhotoStore) -> None:
    key, photos = new_key(), [bytes([number]) * 200_000 for number in range(12)]
    await asyncio.gather(*(local.put(key, photo) for photo in photos))
    assert await local.get(key) in photos


async def test_a_store_that_works_passes_its_check(store: PhotoStore) -> None:
    await store.check()
    await store.put(new_key(), b"photo")
    await store.check()
    assert len(await listed(store)) == 1


async def test_files_and_folders_are_for_their_owner_only(local: LocalPhotoStore, tmp_path: Path) -> None:
    key = new_key()
    await local.put(key, b"photo")
    paths = [tmp_path / "photos", *(tmp_path / "photos").rglob("*")]
    modes = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert {mode for path, mode in modes.items() if (tmp_path / path).is_dir()} == {0o700}
    assert modes[Path("photos", key)] == 0o600


async def test_no_trace_of_a_deleted_identity_stays_in_the_folders(local: LocalPhotoStore, tmp_path: Path) -> None:
    await local.put("gallery/identity/1", b"photo")
    await local.put("gallery/identity/2", b"photo")
    await local.delete(["gallery/identity/1"])
    assert (tmp_path / "photos/gallery/identity").exists()
    await local.delete(["gallery/identity/2"])
    assert [path.name for path in (tmp_path / "photos").rglob("*")] == [".incoming"]


async def test_a_put_that_fails_leaves_nothing(local: LocalPhotoStore, tmp_path: Path) -> None:
    await local.put("gallery/identity", b"a file where a folder should be")
    with pytest.raises(PhotoStoreUnavailable):
        await local.put("gallery/identity/1", b"photo")
    assert await listed_keys(local) == {"gallery/identity"}
    assert list((tmp_path / "photos/.incoming").iterdir()) == []


async def test_a_root_that_cannot_be_used_is_reported(tmp_path: Path) -> None:
    (tmp_path / "photos").write_bytes(b"a file where the folder should be")
    store = LocalPhotoStore(tmp_path / "photos")
    with pytest.raises(PhotoStoreUnavailable):
        await store.check()
    with pytest.raises(PhotoStoreUnavailable):
        await store.put(new_key(), b"photo")
    await store.close()


async def test_what_a_killed_process_left_half_written_is_removed_in_time(
    local: LocalPhotoStore, tmp_path: Path
) -> None:
    await local.check()
    incoming = tmp_path / "photos/.incoming"
    old, new, foreign = uuid.uuid4().hex, uuid.uuid4().hex, "thesis.txt"
    two_hours_ago = time.time() - 7200
    for name in (old, new, foreign):
        (incoming / name).write_bytes(b"half a pho")
        if name != new:
            os.utime(incoming / name, (two_hours_ago, two_hours_ago))
    await local.check()
    assert {path.name for path in incoming.iterdir()} == {new, foreign}, "a file that no put has written stays"
    assert await listed(local) == []


async def test_h71_every_version_of_an_object_is_deleted(s3_server: Server) -> None:
    bucket, key = new_bucket(), new_key()
    client = plain_client(s3_server)
    client.make_bucket(bucket)
    client.set_bucket_versioning(bucket, VersioningConfig(ENABLED))
    store = minio_store(s3_server.port, bucket)
    other = f"{key}0"
    for data in (b"first", b"second", b"third"):
        await store.put(key, data)
    await store.put(other, b"its key begins alike")
    assert await store.delete([key]) == 1
    left = [found.object_name for found in client.list_objects(bucket, recursive=True, include_version=True)]
    assert left == [other]
    client.remove_object(bucket, other)  # hides it behind a delete marker
    assert await store.delete([other]) == 1
    assert list(client.list_objects(bucket, recursive=True, include_version=True)) == []
    await store.close()


async def test_a_missing_bucket_is_made_by_the_first_put_or_check(s3_server: Server) -> None:
    by_put, by_check = new_bucket(), new_bucket()
    # Outside us-east-1 S3 refuses to make a bucket a second time, and eight puts all find it missing.
    first, second = (minio_store(s3_server.port, bucket, region="eu-west-1") for bucket in (by_put, by_check))
    await asyncio.gather(*(first.put(new_key(), b"photo") for _ in range(8)))
    await second.check()
    assert {by_put, by_check} <= {bucket.name for bucket in plain_client(s3_server).list_buckets()}
    assert len(await listed(first)) == 8
    await first.close()
    await second.close()


async def test_what_others_keep_in_the_bucket_is_not_listed(s3_server: Server) -> None:
    bucket = new_bucket()
    store = minio_store(s3_server.port, bucket)
    await store.put("gallery/identity/1", b"photo")
    plain_client(s3_server).fput_object(bucket, "not ours/any more.txt", __file__)
    assert await listed_keys(store) == {"gallery/identity/1"}
    await store.close()


CALLS = ("put", "get", "delete", "list", "check")


async def call(store: PhotoStore, name: str) -> None:
    key = "gallery/identity/sample"
    match name:
        case "put":
            await store.put(key, os.urandom(2_000_000))
        case "get":
            await store.get(key)
        case "delete":
            await store.delete([key])
        case "list":
            await listed(store)
        case _:
            await store.check()


@pytest.mark.parametrize("name", CALLS)
async def test_h77_h81_a_server_that_is_away_is_reported_at_once(name: str) -> None:
    store = minio_store(free_port(), new_bucket())
    started = time.monotonic()
    with pytest.raises(PhotoStoreUnavailable):
        await call(store, name)
    assert time.monotonic() - started < REFUSED_WITHIN_SECONDS
    await store.close()


@pytest.mark.parametrize("connected", [True, False])
async def test_h81_a_frozen_server_fails_every_call_soon_and_serves_again_when_it_thaws(
    s3_server: Server, *, connected: bool
) -> None:
    """A hundred callers wait no longer than one does, whether they wait for the server or behind each other."""
    store = minio_store(s3_server.port, new_bucket())
    if connected:
        await store.put("gallery/identity/sample", b"photo")
    with s3_server.process.frozen():
        started = time.monotonic()
        results = await asyncio.gather(*(call(store, name) for name in CALLS * 20), return_exceptions=True)
        took = time.monotonic() - started
    assert {type(result) for result in results} == {PhotoStoreUnavailable}
    assert took < FAILS_WITHIN_SECONDS
    later = new_key()  # what was sent to the frozen server may still be done now
    await store.put(later, b"photo")
    assert await store.get(later) == b"photo"
    await store.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n\xff\xfe\xfd\xfc",
        b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: 5\r\n\r\n<half",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\ncut",
        b"not HTTP at all\r\n\r\n",
        b"",
    ],
)
async def test_an_answer_that_is_no_s3_answer_is_reported(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        store = minio_store(server.sockets[0].getsockname()[1], new_bucket())
        for name in ("put", "get", "list"):
            with pytest.raises(PhotoStoreUnavailable):
                await call(store, name)
        await store.close()


async def test_an_idle_connection_that_the_server_closes_is_no_fault() -> None:
    """Each connection answers once, promises to stay open, and is closed when the next request comes."""
    dropped = 0

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal dropped
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        dropped += bool(await reader.read(1))
        writer.close()

    async with await asyncio.start_server(answer_once, "127.0.0.1", 0) as server:
        store = minio_store(server.sockets[0].getsockname()[1], new_bucket())
        for _ in range(5):
            await store.check()
        await store.close()
    assert dropped > 0


@given(key=st.text(max_size=60))
def test_whatever_the_key_a_local_path_stays_below_the_root(key: str) -> None:
    root = Path("/srv/photos")
    try:
        path = LocalPhotoStore(root)._path(key)
    except ValueError:
        return
    assert path.is_relative_to(root)
    assert path.resolve() == path
    assert path != root
