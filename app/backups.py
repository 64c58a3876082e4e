"""Sets of a backup and their keys: what of the store is in one, how it is opened, and what proves that it is whole.

Here is also how the log is compared with the signed heads outside of the database, which a restore and a check both do.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Any, Final, NamedTuple, Self, TypeVar

import bson
import structlog
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo import AsyncMongoClient
from pymongo.errors import OperationFailure

from app.documents.base import as_text
from app.documents.events import AuditEvent
from app.documents.tree import HEADS, AuditKey, AuditTree, KeptHead, node_hashes
from app.domain.log_check import Head
from app.domain.merkle import fold, subtrees
from app.keys import KeyRing, SealBroken
from storage.archive import KEY_BYTES, Archive, BackupBroken, BackupMissing, Manifest, Part, PhotoRow
from storage.evidence import EvidenceNotFound, EvidenceStore

log = structlog.get_logger(__name__)

#: Collections that a backup leaves out, and that a restore empties: sessions must not come back to life, and an idempotency
#: key must not point at what was set back.
EMPTIED: Final = frozenset({"logins", "refresh_tokens", "idempotency_claims", "challenges"})
#: Collections that a backup leaves out, and that a restore leaves as they are: turns, and what passes by itself within a day and
#: only makes the service stricter until then.
UNTOUCHED: Final = frozenset(
    {
        "leases",
        "restores",
        "revoked_tokens",
        "once",
        "probes",
        "face_budgets",
        "non_matches",
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

#: Days of heads that a restore lists at most to find one of the log that it puts in place.
DAYS_BACK: Final = 7
#: Heads have the time of the host that signed them, a restore has its own host's.
CLOCKS_APART: Final = timedelta(hours=1)

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


@dataclass(slots=True)
class HeadsOutside:
    """What the names of the heads outside tell, whatever lies under them.

    last: of each day the last one over no more events than were asked about. misfits: what contradicts the log already.
    """

    last: list[KeptHead] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)


async def heads_outside(evidence: EvidenceStore, size: int, tell: Tell) -> HeadsOutside:
    """Look at the names of all heads outside, day by day: each has the size of the log then. size: of the log to be compared."""
    found, strays = HeadsOutside(), list[str]()
    restores, days = await _Restores.known(), await _days(evidence, strays)
    before: KeptHead | None = None
    largest: KeptHead | None = None
    for done, day in enumerate(days, start=1):
        heads = [head for head in await _heads_of(evidence, day, strays) if not restores.excuse(head)]
        for head in heads:
            if before is not None and head.size < before.size:
                found.misfits.append(
                    f"the log was set back from {before.size} events ({before.name}) to {head.size} ({head.name})"
                )
            before = head
            if largest is None or head.size > largest.size:
                largest = head
        found.last += [head for head in heads if head.size <= size][-1:]
        tell("tree heads outside, days", done, len(days))
    if largest is not None:  # the log may have grown while they were listed
        found.misfits += _cut_off(largest, (await AuditTree.current()).size)
    found.misfits += _told(strays)
    return found


async def misfit_of(evidence: EvidenceStore, kept: KeptHead, root: bytes | None) -> str | None:
    """What is wrong with a head outside, in words. root: of the log's first events, as many as it is over; None: not known."""
    try:
        head = Head.of(json.loads(await evidence.read(kept.name)))
    except (ValueError, RecursionError, EvidenceNotFound):
        return f"{kept.name} is no tree head"
    if KeptHead.name_of(head) != kept.name:
        return f"{kept.name} holds the head of another time, size or key"
    key = await AuditKey.get(head.key_id)
    if key is None:
        return f"{kept.name} is signed by key {head.key_id}, which the store does not know"
    if not head.is_signed_by(key.public):
        return f"{kept.name} does not bear the signature of its key"
    if root is None or root.hex() != head.root_hash:
        return f"the first {kept.size} events are not those that {kept.name} was signed over"
    return None


async def misfits_outside(evidence: EvidenceStore, tree: AuditTree) -> list[str]:
    """What of the newest heads outside the log as it stands does not bear out, in words: a restore waits for the answer.

    The newest of all tells what is lost; the newest within the log, what was changed. No more days are listed than must be.
    """
    strays: list[str] = []
    days = (await _days(evidence, strays))[::-1]
    # The log tells itself when its last head was signed.
    until = None if tree.signed_at is None else KeptHead.names_at(as_text(tree.signed_at))
    nearby = [day for day in days if until is None or day <= until]
    newest: KeptHead | None = None
    within: KeptHead | None = None
    for day in dict.fromkeys([*days[:1], *nearby[:DAYS_BACK], *days[1:DAYS_BACK]]):
        heads = await _heads_of(evidence, day, strays)
        if heads and (newest is None or heads[-1].name > newest.name):
            newest = heads[-1]
        if within is None:
            within = next((head for head in reversed(heads) if 0 < head.size <= tree.size), None)
        if newest is not None and within is not None:
            break
    misfits = [] if newest is None else _cut_off(newest, tree.size)
    if within is not None:
        misfit = await misfit_of(evidence, within, await _root(within.size))
        misfits += [] if misfit is None else [misfit]
    return misfits + _told(strays)


@dataclass(frozen=True, slots=True)
class _Restores:
    """The restores that the log tells of. Each left honest heads behind, over events that are lost."""

    active: str
    known_keys: frozenset[str]
    #: How names of heads begin that were surely signed after it, and how much of the log was in its backup.
    by: tuple[tuple[str, int], ...]

    @classmethod
    async def known(cls) -> Self:
        """By the log as it stands."""
        told = AuditEvent.find({"action": "backup.restore", "outcome": "success"})
        by = [(KeptHead.names_at(as_text(one.time + CLOCKS_APART)), one.detail.get("log_size")) async for one in told]
        sizes = [(after, size) for after, size in by if isinstance(size, int)]
        keys = frozenset([key.id async for key in AuditKey.find_all()])
        return cls((await AuditKey.active()).id, keys, tuple(sizes))

    def excuse(self, head: KeptHead) -> bool:
        """Whether the log need not bear out this head. Never one of the key in use, for each restore brings a new one.

        A key that the documents do not know was made in a log that a later restore put away wholly.
        """
        if head.key_id == self.active:
            return False
        is_foreign = head.key_id not in self.known_keys
        return any(head.name < after and (is_foreign or head.size > size) for after, size in self.by)


async def _days(evidence: EvidenceStore, strays: list[str]) -> list[str]:
    """The folders of heads, a day each, from the oldest."""
    found = [HEADS + entry for entry in await evidence.entries(HEADS)]
    strays += [name for name in found if not name.endswith("/")]
    return [name for name in found if name.endswith("/")]


async def _heads_of(evidence: EvidenceStore, day: str, strays: list[str]) -> list[KeptHead]:
    """A day's heads, from the oldest; strays: names there that no head has."""
    named = [(name, KeptHead.named(name)) for name in await evidence.names(day)]
    strays += [name for name, head in named if head is None]
    return [head for _, head in named if head is not None]


def _cut_off(head: KeptHead, size: int) -> list[str]:
    if head.size <= size:
        return []
    lost = f"event {size} is lost" if head.size - 1 == size else f"events {size} to {head.size - 1} are lost"
    return [f"the log ends after {size} events, and a head over {head.size} is known ({head.name}): {lost}"]


def _told(strays: list[str]) -> list[str]:
    if not strays:
        return []
    more = f", nor are {len(strays) - 1} more names there" if strays[1:] else ""
    return [f"{strays[0]} is no tree head{more}"]


async def _root(size: int) -> bytes | None:
    """The root over the first events, from the tree's own nodes; None when some of them are gone."""
    nodes = list(subtrees(0, size))
    try:
        hashes = await node_hashes(nodes)
    except KeyError:
        return None
    return fold([hashes[node] for node in nodes])
