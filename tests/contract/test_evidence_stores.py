"""What every evidence store promises, asked of each of them: a folder, and a bucket with versions and object lock."""

import asyncio
import io
import stat
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from minio import Minio
from minio.deleteobjects import DeleteObject

from app.devstack.servers import free_port
from storage import evidence
from storage.evidence import (
    BucketEvidence,
    EvidenceExists,
    EvidenceNotFound,
    EvidenceStore,
    EvidenceUnavailable,
    FolderEvidence,
)
from tests.support.services import Server

NAME = "heads/2026-11-21/000000000042-key.json"


def bucket_evidence(port: int, bucket: str, *, retention_days: int = 30, needs_lock: bool = False) -> BucketEvidence:
    return BucketEvidence(
        endpoint=f"127.0.0.1:{port}", access_key="a-key", secret_key="a-secret-key", bucket=bucket, region="us-east-1",
        secure=False, retention_days=retention_days, needs_lock=needs_lock, timeout_seconds=9,
    )  # fmt: skip


@pytest.fixture(params=["folder", "bucket"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EvidenceStore]:
    made: EvidenceStore
    if request.param == "folder":
        made = FolderEvidence(tmp_path / "evidence")
    else:
        server: Server = request.getfixturevalue("s3_server")
        made = bucket_evidence(server.port, f"evidence-{uuid.uuid4()}")
    yield made
    await made.close()


async def test_what_is_kept_is_read_again_and_listed_in_order(store: EvidenceStore) -> None:
    assert await store.names() == []
    for name in (NAME, "heads/2026-11-20/000000000041-key.json", "deletions/20261121T093000.123Z-someone.json"):
        await store.append(name, name.encode())
    assert await store.read(NAME) == NAME.encode()
    assert await store.names("heads/") == ["heads/2026-11-20/000000000041-key.json", NAME]
    assert await store.names("heads/2026-11-2") == await store.names("heads/")
    assert len(await store.names()) == 3
    assert await store.names("other") == []
    with pytest.raises(EvidenceNotFound):
        await store.read("heads/none")


async def test_a_listing_tells_what_lies_right_below_and_goes_no_deeper(store: EvidenceStore) -> None:
    assert await store.entries("heads/") == []
    for name in (
        "heads/2026-11-20/a.json",
        "heads/2026-11-20/b.json",
        "heads/2026-11-21/c.json",
        "heads/note.txt",
        "top",
    ):
        await store.append(name, b"x")
    assert await store.entries("heads/") == ["2026-11-20/", "2026-11-21/", "note.txt"]
    assert await store.entries("heads/2026-11-20/") == ["a.json", "b.json"]
    assert await store.entries() == ["heads/", "top"]
    assert await store.names("heads/2026-11-2") == await store.names("heads/2")
    with pytest.raises(ValueError, match="folder"):
        await store.entries("heads")


async def test_a_listing_of_many_has_time_for_each_step_and_not_for_the_whole(
    store: EvidenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(f"heads/2026-11-2{i % 3}/{i:04d}.json" for i in range(12))
    for name in names:
        await store.append(name, b"x")
    monkeypatch.setattr(evidence, "LISTED_AT_ONCE", 2)
    monkeypatch.setattr(evidence, "_DEADLINE_SECONDS", 0.5)
    listed = evidence.islice

    def slow(listing: Iterator[object], count: int) -> Iterator[object]:
        time.sleep(0.15)
        return listed(listing, count)

    monkeypatch.setattr(evidence, "islice", slow)
    began = time.monotonic()
    assert await store.names("heads/") == names
    assert time.monotonic() - began > 0.5


async def test_the_same_bytes_again_are_fine_and_other_bytes_are_refused(store: EvidenceStore) -> None:
    await store.append(NAME, b"first")
    await store.append(NAME, b"first")
    for other in (b"second", b"firs", b"first and more"):
        if other.startswith(b"first") and isinstance(store, FolderEvidence):
            continue  # it would complete what a crash tore off: a head's JSON is never the beginning of another's
        with pytest.raises(EvidenceExists):
            await store.append(NAME, other)
    assert await store.read(NAME) == b"first"


async def test_of_many_at_once_under_one_name_exactly_one_wins(store: EvidenceStore) -> None:
    ended = await asyncio.gather(*(store.append(NAME, f"{i}".encode()) for i in range(8)), return_exceptions=True)
    assert sorted(type(e).__name__ for e in ended if e is not None) == ["EvidenceExists"] * 7
    assert (await store.read(NAME)).decode() in "01234567"


@pytest.mark.parametrize(
    "name", ["", "../up", "/root", "a//b", "a/../b", ".hidden", "a/.b", "ä", "a\n", "a/" * 9 + "b"]
)
async def test_names_that_could_lead_elsewhere_are_refused(store: EvidenceStore, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        await store.append(name, b"x")
    with pytest.raises(ValueError, match="name"):
        await store.read(name)
    with pytest.raises(ValueError, match="not empty"):
        await store.append("good", b"")
    if name:
        with pytest.raises(ValueError, match="prefix"):
            await store.names(name)


async def test_a_folder_is_its_owners_only_and_completes_what_a_crash_tore_off(tmp_path: Path) -> None:
    store = FolderEvidence(tmp_path / "evidence")
    await store.append(NAME, b"the whole of it")
    path = tmp_path / "evidence" / NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (path.parent, path.parent.parent)} == {0o700}
    path.write_bytes(b"the wh")
    await store.append(NAME, b"the whole of it")
    assert await store.read(NAME) == b"the whole of it"
    outside = tmp_path / "outside"
    outside.write_bytes(b"")
    (path.parent / "link.json").symlink_to(outside)
    with pytest.raises(EvidenceUnavailable):
        await store.append(f"{NAME.rpartition('/')[0]}/link.json", b"x")
    assert outside.read_bytes() == b""
    await store.close()


async def test_a_folder_that_cannot_be_used_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "evidence").write_bytes(b"a file")
    store = FolderEvidence(tmp_path / "evidence")
    with pytest.raises(EvidenceUnavailable):
        await store.append(NAME, b"x")
    (tmp_path / "evidence").unlink()
    await store.append("folder/x", b"x")
    with pytest.raises(EvidenceNotFound):
        await store.read("folder")
    with pytest.raises(EvidenceNotFound):
        await store.read("folder/x/y")
    await store.close()


async def test_a_bucket_speaks_its_first_version_whatever_is_written_or_deleted_over_it(s3_server: Server) -> None:
    bucket = f"evidence-{uuid.uuid4()}"
    store = bucket_evidence(s3_server.port, bucket)
    await store.append(NAME, b"first")
    plain = Minio(
        f"127.0.0.1:{s3_server.port}", "a-key", "a-secret-key", secure=False, region="us-east-1"
    )  # whoever has the keys of the server

    def tamper() -> None:
        plain.put_object(bucket, NAME, io.BytesIO(b"forged"), 6)
        plain.put_object(bucket, "heads/", io.BytesIO(b"-"), 1)  # as tools show an empty folder
        plain.remove_object(bucket, NAME)

    await asyncio.to_thread(tamper)
    assert await store.read(NAME) == b"first"
    assert await store.names() == [NAME]
    assert await store.entries("heads/") == ["2026-11-21/"]
    with pytest.raises(EvidenceExists):
        await store.append(NAME, b"forged")
    versions = [v for v in plain.list_objects(bucket, NAME, include_version=True) if not v.is_delete_marker]
    oldest = versions[-1].version_id
    assert oldest is not None
    refused = list(plain.remove_objects(bucket, [DeleteObject(NAME, oldest)]))
    assert refused, "the server does not delete it before its time"
    await store.close()


async def test_a_bucket_without_lock_or_without_a_period_is_used_as_it_is(s3_server: Server) -> None:
    bucket = f"evidence-{uuid.uuid4()}"
    plain = Minio(f"127.0.0.1:{s3_server.port}", "a-key", "a-secret-key", secure=False, region="us-east-1")
    plain.make_bucket(bucket)
    for store in (bucket_evidence(s3_server.port, bucket), bucket_evidence(s3_server.port, bucket, retention_days=0)):
        await store.append(NAME, b"first")
        assert await store.read(NAME) == b"first"
        assert not await store.is_locked()
        await store.close()


async def test_a_bucket_without_lock_keeps_nothing_where_a_lock_is_asked_for(s3_server: Server) -> None:
    bucket = f"evidence-{uuid.uuid4()}"
    plain = Minio(f"127.0.0.1:{s3_server.port}", "a-key", "a-secret-key", secure=False, region="us-east-1")
    plain.make_bucket(bucket)
    store = bucket_evidence(s3_server.port, bucket, needs_lock=True)
    for _ in range(2):
        with pytest.raises(EvidenceUnavailable, match="no object lock"):
            await store.append(NAME, b"first")
    assert await store.names() == []
    await store.close()
    made = bucket_evidence(s3_server.port, f"evidence-{uuid.uuid4()}", needs_lock=True)
    assert await made.is_locked()
    await made.append(NAME, b"first")
    await made.close()


async def test_a_server_that_is_away_is_unavailable() -> None:
    store = bucket_evidence(free_port(), "evidence")
    for call in (store.append(NAME, b"x"), store.read(NAME), store.names(), store.entries()):
        with pytest.raises(EvidenceUnavailable):
            await call
    await store.close()
