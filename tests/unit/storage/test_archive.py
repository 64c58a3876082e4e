"""Backups on a disk: what was written comes back, and nothing else ever does."""

import os
import uuid
from datetime import UTC, datetime
from pathlib import Path

import bson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import archive
from storage.archive import MANIFEST, Archive, BackupBroken, BackupBusy, BackupMissing, Manifest, Part

KEY = bytes(range(32))
SET = str(uuid.UUID(int=1))


@pytest.fixture
def kept(tmp_path: Path) -> Archive:
    """A folder with one set begun."""
    made = Archive(tmp_path / "backups")
    with made.writing():
        made.begin(SET)
    return made


def _part(kept: Archive, documents: list[bytes], name: str = "people-00000.part") -> Part:
    writer = kept.write_part(SET, KEY, name, "people")
    writer.add(documents)
    return writer.close()


def _finished(kept: Archive, *parts: Part) -> Manifest:
    manifest = Manifest(
        id=SET, made_at=datetime.now(UTC), key=b"sealed", parts=parts, photos=(), facts={"version": "1", "missing": 0}
    )
    kept.finish(manifest, KEY)
    return manifest


def _flipped(path: Path, place: int, bit: int = 1) -> bytes:
    """The file with one bit flipped; returns what it was."""
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
    return whole


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 300), max_size=40), chunk=st.integers(1, 200), runs=st.integers(1, 5),
)  # fmt: skip
def test_documents_come_back_as_they_were_whatever_the_chunks(
    kept: Archive, sizes: list[int], chunk: int, runs: int
) -> None:
    documents = [bson.encode({"_id": i, "data": os.urandom(size)}) for i, size in enumerate(sizes)]
    before, archive.CHUNK_BYTES = archive.CHUNK_BYTES, chunk  # type: ignore[misc]
    try:
        writer = kept.write_part(SET, KEY, "people-00000.part", "people")
        for run in range(runs):
            writer.add(documents[run::runs])
        part = writer.close()
        expected = [document for run in range(runs) for document in documents[run::runs]]
        assert list(kept.read_part(SET, KEY, part)) == expected
        assert part.size == (kept.folder / "sets" / SET / part.name).stat().st_size
    finally:
        archive.CHUNK_BYTES = before  # type: ignore[misc]


def test_every_flipped_byte_of_a_part_is_found(kept: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "CHUNK_BYTES", 100)
    part = _part(kept, [bson.encode({"_id": i}) for i in range(20)])
    path = kept.folder / "sets" / SET / part.name
    for place in range(part.size):
        whole = _flipped(path, place, 1 << place % 8)
        with pytest.raises(BackupBroken):
            list(kept.read_part(SET, KEY, part))
        path.write_bytes(whole)
    assert len(list(kept.read_part(SET, KEY, part))) == 20


def test_every_flipped_byte_of_a_manifest_is_found(kept: Archive) -> None:
    manifest = _finished(kept, _part(kept, [bson.encode({"_id": 1})]))
    assert kept.prove(SET, KEY) == manifest
    path = kept.folder / "sets" / SET / MANIFEST
    for place in range(path.stat().st_size):
        for bit in (1, 32):  # 32: another case of a letter, a blank for a line's end
            whole = _flipped(path, place, bit)
            with pytest.raises(BackupBroken):
                kept.prove(SET, KEY)
            path.write_bytes(whole)


def test_a_part_that_is_cut_longer_gone_or_anothers_is_found(kept: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "CHUNK_BYTES", 64)
    documents = [bson.encode({"_id": i}) for i in range(20)]
    part, other = _part(kept, documents), _part(kept, documents, "people-00001.part")
    folder = kept.folder / "sets" / SET
    whole = (folder / part.name).read_bytes()
    chunk = 64 + 16
    head = len(whole) - (len(whole) - 42) % chunk if (len(whole) - 42) % chunk else len(whole) - chunk
    spoilt = [
        b"", whole[:20], whole[:42], whole[:-1], whole[:head], whole + b"\0", whole + whole[42 : 42 + chunk],
        whole[:42] + whole[42 + chunk :], whole[:42] + whole[42 + chunk : 42 + 2 * chunk] + whole[42 : 42 + chunk] +
        whole[42 + 2 * chunk :], (folder / other.name).read_bytes(),
    ]  # fmt: skip
    for data in spoilt:
        (folder / part.name).write_bytes(data)
        with pytest.raises(BackupBroken):
            list(kept.read_part(SET, KEY, part))
    (folder / part.name).unlink()
    with pytest.raises(BackupBroken, match="cannot be read"):
        list(kept.read_part(SET, KEY, part))


def test_even_with_the_digest_of_its_own_bytes_a_cut_part_does_not_open(
    kept: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "CHUNK_BYTES", 64)
    part = _part(kept, [bson.encode({"_id": i}) for i in range(20)])
    path = kept.folder / "sets" / SET / part.name
    path.write_bytes(path.read_bytes()[: 42 + 2 * 80])
    with pytest.raises(BackupBroken, match="chunk 1"):
        list(kept.read_part(SET, KEY, part))


def test_another_key_opens_neither_part_nor_manifest(kept: Archive) -> None:
    part = _part(kept, [bson.encode({"_id": 1})])
    _finished(kept, part)
    with pytest.raises(BackupBroken, match="chunk 0"):
        list(kept.read_part(SET, bytes(32), part))
    with pytest.raises(BackupBroken, match="changed"):
        kept.prove(SET, bytes(32))


def test_a_set_counts_once_its_manifest_is_there(kept: Archive) -> None:
    part = _part(kept, [])
    kept.write_state(SET, "{}")
    assert (kept.finished(), kept.unfinished(), kept.read_state(SET)) == ([], [SET], b"{}")
    with pytest.raises(BackupMissing):
        kept.prove(SET, KEY)
    _finished(kept, part)
    assert (kept.finished(), kept.unfinished(), kept.read_state(SET)) == ([SET], [], None)
    kept.drop(SET)
    assert kept.finished() == []


def test_a_manifest_under_another_name_is_no_manifest_of_that(kept: Archive) -> None:
    _finished(kept, _part(kept, []))
    other = str(uuid.UUID(int=2))
    (kept.folder / "sets" / SET).rename(kept.folder / "sets" / other)
    with pytest.raises(BackupBroken, match="that of"):
        kept.prove(other, KEY)


def test_a_part_half_written_leaves_no_trace(kept: Archive) -> None:
    writer = kept.write_part(SET, KEY, "people-00000.part", "people")
    writer.add([bson.encode({"_id": 1})])
    writer.abandon()
    assert list((kept.folder / "sets" / SET).iterdir()) == []


def test_a_photo_is_given_back_only_as_it_was(kept: Archive) -> None:
    row = kept.keep_photo("gallery/ann/one", b"sealed photo")
    assert (kept.photo(row.key), kept.size_of_photo(row.key), kept.read_photo(row)) == (row, 12, b"sealed photo")
    path = kept.folder / "photos" / row.key
    for data in (b"sealed phot0", b"sealed photo.", b""):
        path.write_bytes(data)
        with pytest.raises(BackupBroken):
            kept.read_photo(row)
    assert kept.drop_photos("gallery/ann")
    assert not kept.drop_photos("gallery/ann")
    assert (kept.photo(row.key), kept.size_of_photo(row.key)) == (None, None)
    with pytest.raises(BackupMissing):
        kept.read_photo(row)


@pytest.mark.parametrize("key", ["../out", "a/../../out", "/etc/passwd", "a//b", ".hidden/x", ""])
def test_no_key_leads_out_of_the_folder(kept: Archive, key: str) -> None:
    with pytest.raises(BackupBroken):
        kept.keep_photo(key, b"x")


def test_one_process_at_a_time_writes(kept: Archive) -> None:
    with kept.writing(), pytest.raises(BackupBusy), Archive(kept.folder).writing():
        pass
    with kept.writing():
        pass


def test_files_and_folders_are_their_owners(kept: Archive) -> None:
    _finished(kept, _part(kept, [bson.encode({"_id": 1})]))
    kept.keep_photo("gallery/ann/one", b"sealed photo")
    for path in [kept.folder, *kept.folder.rglob("*")]:
        if path.name != ".lock":
            assert path.stat().st_mode & 0o077 == 0, path
