"""Back up: everything in MongoDB as it stood at one moment, and the photos that it names, while the service goes on.

Documents are read at one cluster time, so they fit each other whatever is written meanwhile; each part is remembered when it is
done, and a run that was cut off goes on at the same moment, as long as MongoDB still knows it. Photos never change under their
key: each is copied once, whatever the number of backups.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import bson
import pymongo
import structlog
from bson import Timestamp
from bson.raw_bson import RawBSONDocument
from pydantic import BaseModel, ConfigDict, ValidationError
from pymongo.errors import OperationFailure

from app.audit import by_system, record
from app.backups import (
    HISTORY_SECONDS,
    LEFT_OUT,
    RAW,
    OpenSet,
    OtherKey,
    PhotoName,
    Tell,
    history_kept,
    in_groups,
    new_set_key,
    open_set_key,
    prove_all,
)
from app.documents.base import new_id, now
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.stores import Store
from app.runtime import DOCUMENTS, Runtime
from storage.archive import Archive, BackupBroken, BackupMissing, Manifest, Part, PhotoRow
from storage.photos import PhotoNotFound

log = structlog.get_logger(__name__)

#: A part that is this large is closed: so much is read again after an interruption.
PART_BYTES: Final = 32 * 1024 * 1024
#: Of one part, or of the answer to one question.
READ_SECONDS: Final = 300
#: SnapshotTooOld, SnapshotUnavailable
_MOMENT_IS_GONE: Final = frozenset({239, 246})
LISTED_MISSING: Final = 100
DOCUMENTS_READ: Final = 1000


class MomentGone(Exception):
    """MongoDB does not know the moment of the backup any more; the next run takes a new one, and keeps the photos."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a run came to.

    photos: that the set holds; copied: of these, by this run. missing: named, not in the photo store, though their people are
    not erased; identities: some of those that they belong to.
    """

    id: str
    made_at: datetime
    documents: int
    photos: int
    copied: int
    missing: int
    identities: tuple[str, ...]
    bytes: int


class _Progress(BaseModel):
    """How far an unfinished set has come. at: its cluster time; after: the last id of a collection begun, as BSON in hex."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    id: str
    database: str
    store: str | None = None
    made_at: datetime
    at: tuple[int, int]
    key: bytes
    parts: list[Part] = []
    after: dict[str, str] = {}
    finished: list[str] = []
    photos: list[Part] = []
    copied: int = 0
    missing: int = 0
    identities: list[str] = []


async def back_up(runtime: Runtime, folder: Path, tell: Tell, *, keep: int | None = None) -> Made:
    """Make a set in the folder, or go on with one that was cut off; read what was written once more before it counts.

    keep: how many sets stay, this one included; None: all. Raises BackupBusy, MomentGone, OtherKey, BackupBroken, OSError and
    PyMongoError.
    """
    archive = Archive(folder)
    with archive.writing():
        async with history_kept(runtime.mongo):
            progress = await _begun(runtime, archive)
            key = open_set_key(runtime.keys, progress.id, progress.key)
            run = _Run(runtime, archive, progress, key, tell)
            await run.documents()
        await run.photos()
        made = await run.finish()
        ours, _ = _sets(runtime, archive, await Store.ids())
        for old in ours[:-keep] if keep else []:
            await asyncio.to_thread(archive.drop, old)
    log.info("backup_made", id=made.id, documents=made.documents, photos=made.photos)
    return made


async def verify(runtime: Runtime, folder: Path, set_id: str | None, tell: Tell) -> OpenSet:
    """Prove a set, or the newest, to the last byte. Raises BackupMissing, BackupBroken, OtherKey."""
    archive = Archive(folder)
    opened = OpenSet.of(runtime.keys, archive, set_id)
    # A ledger of erasures only grows: the newest set's holds all that the others' hold.
    newest = OpenSet.of(runtime.keys, archive)
    await prove_all(opened, await newest.erased(), tell)
    return opened


async def _begun(runtime: Runtime, archive: Archive) -> _Progress:
    """The set that an interruption left, when it can still be gone on with, else a new one."""
    for set_id in reversed(archive.unfinished()):
        progress = await _left(runtime, archive, set_id)
        if progress is not None:
            log.info("backup_goes_on", id=set_id)
            return progress
        await asyncio.to_thread(_drop_left, archive, set_id, await Store.ids(), runtime.settings.mongodb_database)
    set_id = new_id()
    _, sealed = new_set_key(runtime.keys, set_id)
    # First the event: whoever takes everything out is in the log, in the backup's own log too.
    await record(None, by_system("backup.make"), subject_kind="backup", subject_id=set_id)
    moment = (await _asked(runtime, None))["cursor"]["atClusterTime"]
    progress = _Progress(
        id=set_id, database=runtime.settings.mongodb_database, made_at=now(), at=(moment.time, moment.inc), key=sealed,
        store=runtime.places.owner.id,
    )  # fmt: skip
    archive.begin(set_id)
    archive.write_state(set_id, progress.model_dump_json())
    return progress


async def _left(runtime: Runtime, archive: Archive, set_id: str) -> _Progress | None:
    """How far an interrupted set has come; None when it is of no use: of another store or key, or of a moment long past."""
    try:
        progress = _Progress.model_validate_json(archive.read_state(set_id) or b"")
        open_set_key(runtime.keys, set_id, progress.key)
        if set(progress.finished) < set(_collections()):
            await _asked(runtime, Timestamp(*progress.at))
    except (ValidationError, OtherKey, OperationFailure):
        return None
    is_ours = progress.database == runtime.settings.mongodb_database and progress.store in {
        None,
        runtime.places.owner.id,
    }
    return progress if is_ours else None


def _drop_left(archive: Archive, set_id: str, stores: set[str], database: str) -> None:
    """Remove an unfinished set of this store that cannot be continued. One of another store stays: it may be in progress."""
    try:
        progress = _Progress.model_validate_json(archive.read_state(set_id) or b"")
    except ValidationError:
        if not archive.drop_empty(set_id):
            log.warning("foreign_backup_left_alone", id=set_id, store=None)
        return
    if progress.store in stores or (progress.store is None and progress.database == database):
        archive.drop(set_id)
    else:
        log.warning("foreign_backup_left_alone", id=set_id, store=progress.store)


def _sets(runtime: Runtime, archive: Archive, stores: set[str]) -> tuple[list[str], list[str]]:
    """The finished sets of this store, and those of other stores. A store whose places this one took over is no other store.

    A set whose manifest cannot be read is in neither list.
    """
    ours: list[str] = []
    foreign: list[str] = []
    for set_id in archive.finished():
        try:
            manifest = archive.unproved(set_id)
        except (BackupBroken, BackupMissing):
            continue
        (ours if _is_ours(runtime, manifest, stores) else foreign).append(set_id)
    return ours, foreign


def _is_ours(runtime: Runtime, manifest: Manifest, stores: set[str]) -> bool:
    store = manifest.facts.get("store")
    if store is not None:
        return store in stores
    # Earlier versions did not name the store.
    try:
        open_set_key(runtime.keys, manifest.id, manifest.key)
    except OtherKey:
        return False
    return manifest.facts.get("database") == runtime.settings.mongodb_database


async def _asked(runtime: Runtime, at: Timestamp | None) -> Any:  # noqa: ANN401 - a reply of any shape
    """The answer to a small question as of that moment, or of now; it tells of which moment it is."""
    concern = {"level": "snapshot"} | ({} if at is None else {"atClusterTime": at})
    question = {"find": Identity.get_collection_name(), "limit": 1, "singleBatch": True, "readConcern": concern}
    with pymongo.timeout(READ_SECONDS):
        return await _database(runtime).command(question)


def _database(runtime: Runtime) -> Any:  # noqa: ANN401 - the driver's, of documents of any shape
    return runtime.mongo[runtime.settings.mongodb_database]


def _collections() -> list[str]:
    """The names of what a backup holds."""
    names = [document.get_collection_name() for document in DOCUMENTS]
    return [name for name in names if name not in LEFT_OUT]


@dataclass(slots=True)
class _Run:
    runtime: Runtime
    archive: Archive
    progress: _Progress
    key: bytes
    tell: Tell
    expected: int = 0

    async def documents(self) -> None:
        """Read every collection to its end."""
        counts = {name: await self._count(name) for name in _collections()}
        done = sum(part.documents for part in self.progress.parts)
        total = max(done, sum(counts.values()))
        self.tell("documents", done, total)
        for name in counts:
            while name not in self.progress.finished:
                try:
                    done += await self._part(name)
                except OperationFailure as error:
                    if error.code not in _MOMENT_IS_GONE:
                        raise
                    message = (
                        "MongoDB does not know the moment of this backup any more: raise its parameter "
                        f"minSnapshotHistoryWindowInSeconds to {HISTORY_SECONDS}, and run the same command again"
                    )
                    raise MomentGone(message) from error
                self.tell("documents", done, max(done, total))

    async def photos(self) -> None:
        """Copy the photos that the identities of the set name, and list them."""
        parts = [part for part in self.progress.parts if part.collection == Identity.get_collection_name()]
        # As of now, and so about as many as at the set's moment: it is for the bar only.
        self.expected = sum([gallery.samples async for gallery in Gallery.find_all()])
        former = _Former(self._former())
        for number, part in enumerate(parts):
            if number >= len(self.progress.photos):
                await self._list(number, part, former)
        done = sum(part.documents for part in self.progress.photos)
        self.tell("photos", done, done)

    async def finish(self) -> Made:
        """Read all parts once more, write the manifest, and let go of the photos of whoever is erased."""
        progress = self.progress
        manifest = Manifest(
            id=progress.id, made_at=progress.made_at, key=progress.key, parts=tuple(progress.parts),
            photos=tuple(progress.photos),
            facts={
                "database": progress.database, "version": version("idem"), "cluster_time": progress.at[0],
                "missing_photos": progress.missing, "store": progress.store,
            },
        )  # fmt: skip
        opened = OpenSet(self.archive, manifest, self.key)
        parts = [*manifest.parts, *manifest.photos]
        done, total = 0, sum(part.size for part in parts)
        for part in parts:
            async for _ in opened.batches(part):
                pass
            done += part.size
            self.tell("reading again", done, total)
        await asyncio.to_thread(self.archive.finish, manifest, self.key)
        await self._drop_erased(await opened.erased())
        return Made(
            id=manifest.id, made_at=manifest.made_at, documents=manifest.documents,
            photos=sum(part.documents for part in manifest.photos), copied=progress.copied, missing=progress.missing,
            identities=tuple(progress.identities), bytes=total,
        )  # fmt: skip

    async def _drop_erased(self, erased: dict[str, str]) -> None:
        """Delete the photos of erased people from the archive. Deletes none if other stores have sets there and may need them."""
        _, foreign = _sets(self.runtime, self.archive, await Store.ids())
        if foreign:
            log.warning("foreign_backups_left_alone", count=len(foreign), examples=foreign[:5])
            return
        for identity_id, gallery_id in erased.items():
            await asyncio.to_thread(self.archive.drop_photos, f"{gallery_id}/{identity_id}")

    async def _count(self, name: str) -> int:
        with pymongo.timeout(READ_SECONDS):
            return int(await _database(self.runtime)[name].estimated_document_count())

    async def _part(self, name: str) -> int:
        """Read on in a collection until the part is full or nothing is left; how many documents."""
        file = f"{name}-{sum(part.collection == name for part in self.progress.parts):05}.part"
        writer = self.archive.write_part(self.progress.id, self.key, file, name)
        text = self.progress.after.get(name)
        last = None if text is None else RawBSONDocument(bytes.fromhex(text))["_id"]
        is_full = False
        try:
            with pymongo.timeout(READ_SECONDS):
                async with await self._found(name, last) as cursor:
                    while cursor.alive and not is_full:
                        documents = await cursor.to_list(DOCUMENTS_READ)
                        if documents and documents[0]["_id"] == last:  # the bound is part of what is found
                            documents = documents[1:]
                        await asyncio.to_thread(writer.add, [document.raw for document in documents])
                        last = documents[-1]["_id"] if documents else last
                        is_full = writer.size >= PART_BYTES
            part = await asyncio.to_thread(writer.close) if writer.documents else None
        finally:
            writer.abandon()
        if part is not None:
            self.progress.parts.append(part)
            self.progress.after[name] = bson.encode({"_id": last}).hex()
        if not is_full:
            self.progress.finished.append(name)
        await self._remember()
        return writer.documents

    async def _found(self, name: str, after: object) -> Any:  # noqa: ANN401 - the driver's cursor, of any documents
        """The documents from that id on, as they stood at the set's moment, in the order of their ids."""
        by_id = {"_id": 1}
        bound = {} if after is None else {"min": {"_id": after}}
        concern = {"level": "snapshot", "atClusterTime": Timestamp(*self.progress.at)}
        raw = _database(self.runtime).with_options(codec_options=RAW)  # of the database, or later batches are decoded
        return await raw.cursor_command(
            "find", name, codec_options=RAW, filter={}, sort=by_id, hint=by_id, batchSize=DOCUMENTS_READ,
            readConcern=concern, **bound,
        )  # fmt: skip

    async def _list(self, number: int, part: Part, former: "_Former") -> None:
        """Copy the photos that a part's identities name, and write the list of them."""
        opened = OpenSet(self.archive, _unfinished(self.progress), self.key)
        file = f"photos-{number:05}.part"
        writer = self.archive.write_part(self.progress.id, self.key, file, "photos")
        copied, lost, before = 0, [], sum(listed.documents for listed in self.progress.photos)
        try:
            async for keys in in_groups(_photo_keys(opened, part)):
                known = [await former.row(key) for key in keys]
                kept = await asyncio.gather(*(self._kept(key, row) for key, row in zip(keys, known, strict=True)))
                copied += sum(is_copied for row, is_copied in kept if row is not None)
                lost += [key for key, (row, _) in zip(keys, kept, strict=True) if row is None]
                rows = [bson.encode(row._asdict()) for row, _ in kept if row is not None]
                await asyncio.to_thread(writer.add, rows)
                done = before + writer.documents
                self.tell("photos", done, max(done, self.expected))
            listed = await asyncio.to_thread(writer.close)
        finally:
            writer.abandon()
        await self._note_lost(lost)
        self.progress.photos.append(listed)
        self.progress.copied += copied
        await self._remember()

    async def _kept(self, key: str, known: PhotoRow | None) -> tuple[PhotoRow | None, bool]:
        """A photo in the folder, and whether it was copied just now; None when the photo store does not hold it."""
        if known is not None and await asyncio.to_thread(self.archive.size_of_photo, key) == known.size:
            return known, False  # as the former set has it: what was changed since is found by its digest
        if known is None and (there := await asyncio.to_thread(self.archive.photo, key)) is not None:
            return there, False  # copied by the run that was cut off
        try:
            data = await self.runtime.photos.get(key)
        except PhotoNotFound:
            return None, False
        return await asyncio.to_thread(self.archive.keep_photo, key, data), True

    async def _note_lost(self, keys: list[str]) -> None:
        """Tell of the photos that are not there; those of people erased since the set's moment are not expected to be."""
        owners = sorted({PhotoName.of(key).identity_id for key in keys})
        living = await Identity.living_among(owners)
        for key in keys:
            owner = living.get(PhotoName.of(key).identity_id)
            if owner is None or key not in {sample.photo_key for sample in owner.samples}:
                continue
            self.progress.missing += 1
            if owner.id not in self.progress.identities and len(self.progress.identities) < LISTED_MISSING:
                self.progress.identities.append(owner.id)

    def _former(self) -> OpenSet | None:
        """The newest finished set: what it says of a photo need not be worked out again."""
        try:
            return OpenSet.of(self.runtime.keys, self.archive)
        except BackupMissing:
            return None
        except (BackupBroken, OtherKey) as error:
            log.warning("former_backup_unusable", reason=str(error))
            return None

    async def _remember(self) -> None:
        text = self.progress.model_dump_json()
        await asyncio.to_thread(self.archive.write_state, self.progress.id, text)


class _Former:
    """The photos of the former set, looked up in the order in which identities are read, with few of them in memory."""

    def __init__(self, opened: OpenSet | None) -> None:
        self._rows = None if opened is None else opened.photo_rows()
        self._ahead: PhotoRow | None = None
        self._owner = ""
        self._mine: dict[str, PhotoRow] = {}

    async def row(self, key: str) -> PhotoRow | None:
        """What the former set says of the photo; it must not be asked for identities in falling order."""
        owner = PhotoName.of(key).identity_id
        if owner != self._owner:
            self._owner, self._mine = owner, {}
            while (row := await self._next(owner)) is not None:
                self._mine[row.key] = row
        return self._mine.get(key)

    async def _next(self, owner: str) -> PhotoRow | None:
        """The next row that is the owner's; those of identities before are passed over."""
        while self._rows is not None:
            if self._ahead is None:
                self._ahead = await self._read()
            if self._ahead is None:
                self._rows = None
            elif (whose := PhotoName.of(self._ahead.key).identity_id) > owner:
                return None
            else:
                row, self._ahead = self._ahead, None
                if whose == owner:
                    return row
        return None

    async def _read(self) -> PhotoRow | None:
        try:
            return None if self._rows is None else await anext(self._rows, None)
        except BackupBroken as error:
            log.warning("former_backup_unusable", reason=str(error))
            return None


def _unfinished(progress: _Progress) -> Manifest:
    return Manifest(id=progress.id, made_at=progress.made_at, key=progress.key, parts=(), photos=(), facts={})


async def _photo_keys(opened: OpenSet, part: Part) -> AsyncIterator[str]:
    """The photos that a part's identities name."""
    async for batch in opened.batches(part):
        for document in batch:
            for sample in RawBSONDocument(document)["samples"]:
                yield sample["photo_key"]
