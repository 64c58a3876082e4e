"""Sets of a backup and their keys: what of the store is in one, how it is opened, and what proves that it is whole."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NamedTuple, Self, TypeVar

import bson
import structlog
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo import AsyncMongoClient
from pymongo.errors import OperationFailure

from app.keys import KeyRing, SealBroken
from storage.archive import KEY_BYTES, Archive, BackupBroken, BackupMissing, Manifest, Part, PhotoRow

log = structlog.get_logger(__name__)

#: Collections that a backup leaves out, and that a restore empties: sessions must not come back to life, and an idempotency
#: key must not point at what was set back. Templates for a move to another model are made again from the photos.
EMPTIED: Final = frozenset({"logins", "refresh_tokens", "idempotency_claims", "challenges", "renewals"})
#: Collections that a backup leaves out, and that a restore leaves as they are: turns, and what passes by itself within a day and
#: only makes the service stricter until then. The store's id and the proofs that photos are its own are never copied.
UNTOUCHED: Final = frozenset(
    {
        "leases",
        "heartbeats",
        "restores",
        "stores",
        "enrolments_begun",
        "revoked_tokens",
        "once",
        "probes",
        "face_budgets",
        "non_matches",
        "unknown_names",
        "finds",
        "erasures",
        "people_read",
        "failed_logins",
    }
)
LEFT_OUT: Final = EMPTIED | UNTOUCHED

#: Photos that are read or written side by side: each has at most some megabytes.
PHOTOS_AT_ONCE: Final = 8
DOCUMENTS_AT_ONCE: Final = 500

#: For so long MongoDB is asked to know a past moment; its own default of five minutes is too short for a large store.
HISTORY_SECONDS: Final = 2 * 3600
DEFAULT_HISTORY_SECONDS: Final = 300

RAW: Final[CodecOptions[RawBSONDocument]] = CodecOptions(document_class=RawBSONDocument)
#: Times as the documents have them: with their zone, UTC.
AWARE: Final[CodecOptions[dict[str, Any]]] = CodecOptions(tz_aware=True)

#: What a long step tells as it goes on: its name, how much is done, and of how much.
Tell = Callable[[str, int, int], None]
T = TypeVar("T")


class OtherKey(Exception):
    """The backup was made under another key-encryption key."""


class PhotoName(NamedTuple):
    """Whose photo lies under a key of the photo store."""

    gallery_id: str
    identity_id: str
    sample_id: str

    @classmethod
    def of(cls, key: str) -> Self:
        """The three parts of the key. Raises ValueError."""
        gallery_id, identity_id, sample_id = key.split("/")
        return cls(gallery_id, identity_id, sample_id)


def new_set_key(keys: KeyRing, set_id: str) -> tuple[bytes, bytes]:
    """A fresh key for a set, and its form to be stored, under the key-encryption key."""
    key = os.urandom(KEY_BYTES)
    return key, keys.seal_with_master(key, _bound(set_id))


def open_set_key(keys: KeyRing, set_id: str, sealed: bytes) -> bytes:
    """A set's key. Raises OtherKey."""
    try:
        return keys.open_with_master(sealed, _bound(set_id))
    except SealBroken as error:
        message = f"backup {set_id} was made under another key-encryption key, or its manifest was changed"
        raise OtherKey(message) from error


def _bound(set_id: str) -> bytes:
    return f"idem/1|backup|{set_id}".encode()


@dataclass(frozen=True, slots=True)
class OpenSet:
    """A finished set whose manifest is proved. Its parts and photos are proved as they are read."""

    archive: Archive
    manifest: Manifest
    key: bytes

    @classmethod
    def of(cls, keys: KeyRing, archive: Archive, set_id: str | None = None) -> Self:
        """The set of that id, or the newest. Raises BackupMissing, BackupBroken, OtherKey."""
        if set_id is None:
            finished = archive.finished()
            if not finished:
                message = f"{archive.folder} holds no finished backup"
                raise BackupMissing(message)
            set_id = finished[-1]
        key = open_set_key(keys, set_id, archive.unproved(set_id).key)
        return cls(archive, archive.prove(set_id, key), key)

    def documents(self, part: Part) -> Iterator[bytes]:
        """A part's documents, as BSON. Raises BackupBroken."""
        return self.archive.read_part(self.manifest.id, self.key, part)

    async def batches(self, part: Part) -> AsyncIterator[list[bytes]]:
        """A part's documents, some at a time, read off the event loop. Raises BackupBroken."""
        documents = self.documents(part)
        while batch := await asyncio.to_thread(lambda: list(islice(documents, DOCUMENTS_AT_ONCE))):
            yield batch

    async def photo_rows(self) -> AsyncIterator[PhotoRow]:
        """The photos of the set."""
        for part in self.manifest.photos:
            async for batch in self.batches(part):
                for row in map(photo_row, batch):
                    yield row

    async def erased(self) -> dict[str, str]:
        """The ids of whoever was erased before this set was made, with their galleries'."""
        found: dict[str, str] = {}
        for part in self.manifest.parts_of("deletions"):
            async for batch in self.batches(part):
                found |= {row["_id"]: row["gallery_id"] for row in (bson.decode(document) for document in batch)}
        return found


def photo_row(document: bytes) -> PhotoRow:
    """A photo of a list, as a set keeps it."""
    row: dict[str, Any] = bson.decode(document)
    return PhotoRow(row["key"], row["size"], row["sha256"])


async def prove_all(opened: OpenSet, erased: Collection[str], tell: Tell) -> None:
    """Read a set through, documents and photos. Raises BackupBroken at the first that is not as it was written.

    erased: the ids of those whose photos have left the folder since.
    """
    manifest, done = opened.manifest, 0
    parts = [*manifest.parts, *manifest.photos]
    total = sum(part.size for part in parts)
    for part in parts:
        async for _ in opened.batches(part):
            pass
        done += part.size
        tell("reading documents", done, total)
    done, total = 0, sum(part.documents for part in manifest.photos)

    async def prove(row: PhotoRow) -> None:
        try:
            await asyncio.to_thread(opened.archive.read_photo, row)
        except BackupMissing as error:
            if PhotoName.of(row.key).identity_id not in erased:
                raise BackupBroken(str(error)) from error

    async for some in in_groups(opened.photo_rows()):
        await asyncio.gather(*map(prove, some))
        done += len(some)
        tell("reading photos", done, total)


async def in_groups(rows: AsyncIterator[T], size: int = PHOTOS_AT_ONCE) -> AsyncIterator[list[T]]:
    """The rows, so many at a time."""
    group: list[T] = []
    async for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


@asynccontextmanager
async def history_kept(mongo: "AsyncMongoClient[Any]") -> AsyncIterator[None]:
    """Have MongoDB know past moments for longer, where it lets us; afterwards as it was."""
    admin, name = mongo.admin, "minSnapshotHistoryWindowInSeconds"
    before = None
    try:
        before = int((await admin.command({"getParameter": 1, name: 1}))[name])
        if before < HISTORY_SECONDS:
            await admin.command({"setParameter": 1, name: HISTORY_SECONDS})
    except OperationFailure as error:
        log.warning("history_not_kept", seconds=before, reason=str(error.details or error)[:200])
        before = None
    try:
        yield
    finally:
        if before is not None and before <= HISTORY_SECONDS:
            # As long as this is left by a run that was killed.
            back = DEFAULT_HISTORY_SECONDS if before == HISTORY_SECONDS else before
            await admin.command({"setParameter": 1, name: back})
