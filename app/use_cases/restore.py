"""Restore: put a backup in place of what the store holds, whole or not at all.

    loading     documents into collections beside those in use, photos into their store; the service goes on meanwhile
    closing     everybody who serves leaves, and nobody else begins; what only this database knows is set aside
    switching   the collections change places: each in one step, all of them within a second
    mending     what a backup cannot know: who was erased since, and what the log had become

Each state is written down before its first step, and each step may be done twice: the same command goes on after any
interruption. Up to `closing` nothing in use was touched. Galleries get a new epoch, so that neither a file of the index nor
anything in a process's memory is taken for theirs.
"""

import asyncio
import os
import platform
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import bson
import pymongo
import structlog
from bson.raw_bson import RawBSONDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import BulkWriteError
from pymongo.write_concern import WriteConcern

from app.audit import by_system, record, rotate_key
from app.backups import (
    AWARE,
    EMPTIED,
    LEFT_OUT,
    OpenSet,
    OtherKey,
    PhotoName,
    Tell,
    in_groups,
    photo_row,
    prove_all,
)
from app.documents.accounts import Client, User
from app.documents.base import new_id
from app.documents.deletions import LEDGER, Deletion
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.restores import Restore
from app.documents.stores import EnrolmentBegun
from app.documents.tree import AuditTree
from app.domain.policy_changes import WAIT
from app.heads_outside import misfits_outside
from app.leases import held
from app.restoring import still_here
from app.runtime import DOCUMENTS, Runtime
from storage.archive import Archive, BackupBroken, BackupMissing, Part
from storage.evidence import EvidenceNotFound, EvidenceUnavailable
from storage.photos import PhotoNotFound, PhotosNotOurs

log = structlog.get_logger(__name__)

LEASE: Final = "restore"
LEASE_SECONDS: Final = 15
STAGED: Final = "restoring."
#: The ledger of the database that is replaced, from before the switch until its erasures were carried out again.
SET_ASIDE: Final = "replaced.deletions"
#: Of one batch of documents, and of the building of one collection's indexes.
WRITE_SECONDS: Final = 300
INDEX_SECONDS: Final = 6 * 3600
#: How long, beyond the time that they have for what they are doing, those who serve may take to leave.
LEAVE_SECONDS: Final = 20
POLL_SECONDS: Final = 0.25
NAMES_AT_ONCE: Final = 1000
DUPLICATE_KEY: Final = 11000
#: How far the clock of a host that enrols may differ from that of a host that backs up.
CLOCKS_APART: Final = timedelta(hours=1)
#: What callers' versions rise by: drawn, so that no change since the backup has led to the same; far from 2^53 for many restores.
VERSION_STEPS: Final = range(2**32, 2**40)


class NotEmpty(Exception):
    """The store holds people or users, and nobody said that they are to be replaced."""


class StillServing(Exception):
    """Processes that work on the database do not leave; nothing in use was touched."""


class EvidenceAway(Exception):
    """What the replaced database alone knows cannot be kept outside of it; nothing in use was touched."""


class RestoreBusy(Exception):
    """Another process is restoring."""


@dataclass(frozen=True, slots=True)
class Restored:
    """The result of a restore.

    photos_missing: photos that a restore drill did not find, and must not write. erased_again: people of the backup who were
    erased again, because a ledger lists them. unreadable: ledger lines that were not applied, because they are torn or, in the
    evidence store, lack this store's tag. log_size: events in the log of the backup.
    log: mismatches with the heads in the evidence store, one sentence each. evidence: why nothing is written to the evidence
    store; None if it is written to.
    """

    set_id: str
    made_at: datetime
    documents: int
    photos: int
    photos_missing: int
    erased_again: int
    unreadable: tuple[str, ...]
    log_size: int
    log: tuple[str, ...]
    galleries: tuple[str, ...]
    evidence: str | None = None


Opened = Callable[[], AbstractAsyncContextManager[Runtime]]
#: Carries out an erasure of the ledger once more; whether there was anything left of the person.
EraseAgain = Callable[[Runtime, Deletion], Awaitable[bool]]
#: Numbers every event, signs the tree, and brings its heads outside; how many heads still wait.
CloseLog = Callable[[Runtime], Awaitable[int]]


async def restore(
    opened: Opened,
    erase_again: EraseAgain,
    close_log: CloseLog,
    folder: Path,
    tell: Tell,
    *,
    set_id: str | None = None,
    replace: bool = False,
) -> Restored:
    """Put a set, by default the folder's newest, in place, or go on where a former try stopped.

    opened: a Runtime for restoring; two are opened, because the second one has the keys and callers of the backup. Raises
    NotEmpty, StillServing, EvidenceAway, RestoreBusy, BackupMissing, BackupBroken, OtherKey; and whatever a store raises
    that is away.
    """
    archive = Archive(folder)
    async with opened() as runtime, _alone():
        standing = await Restore.standing()
        is_past = standing is not None and standing.state in {"switching", "mending"}
        if standing is not None and is_past and set_id not in {None, standing.set_id}:
            message = f"the restore of {standing.set_id} must come to its end first"
            raise RestoreBusy(message)
        if set_id is None and standing is not None:
            set_id = standing.set_id
        backup = OpenSet.of(runtime.keys, archive, set_id)
        if standing is None or not is_past:
            loading = _Loading(runtime, backup, close_log, tell)
            standing = await loading.run(standing, replace=replace)
        if standing.state != "mending":
            await _switch(runtime, standing, tell)
    async with opened() as runtime, _alone():
        backup = OpenSet.of(runtime.keys, archive, backup.manifest.id)
        return await _mend(runtime, erase_again, backup, standing, tell)


async def abandon(runtime: Runtime) -> bool:
    """Forget a restore that has not gone beyond loading; False when there is none. Raises RestoreBusy when it is past that."""
    async with _alone():
        standing = await Restore.standing()
        if standing is None:
            return False
        if standing.state in {"switching", "mending"}:
            message = f"the restore of {standing.set_id} can only come to its end"
            raise RestoreBusy(message)
        await _clear(runtime)
        await Restore.end()
        return True


@asynccontextmanager
async def _alone() -> AsyncIterator[None]:
    """Be the only one who restores. One that was killed is waited for. Raises RestoreBusy."""
    holder = f"{platform.node()}:{os.getpid()}:{new_id()}"
    deadline = time.monotonic() + LEASE_SECONDS + 1
    while True:
        async with held(LEASE, holder, LEASE_SECONDS) as lease:
            if lease is not None:
                yield
                return
        if time.monotonic() > deadline:
            message = "another process is restoring"
            raise RestoreBusy(message)
        await asyncio.sleep(POLL_SECONDS)


def _database(runtime: Runtime) -> Any:  # noqa: ANN401 - the driver's, of documents of any shape
    return runtime.mongo[runtime.settings.mongodb_database]


def _collections() -> list[str]:
    """The names of what a backup holds."""
    names = [document.get_collection_name() for document in DOCUMENTS]
    return [name for name in names if name not in LEFT_OUT]


async def _staged(runtime: Runtime) -> set[str]:
    """The collections that lie beside those in use, by the names that they will have."""
    names = await _database(runtime).list_collection_names()
    return {name.removeprefix(STAGED) for name in names if name.startswith(STAGED)}


async def _clear(runtime: Runtime) -> None:
    for name in [SET_ASIDE, *(STAGED + name for name in await _staged(runtime))]:
        with pymongo.timeout(WRITE_SECONDS):
            await _database(runtime).drop_collection(name)


@dataclass(slots=True)
class _Loading:
    runtime: Runtime
    backup: OpenSet
    close_log: CloseLog
    tell: Tell

    async def run(self, standing: Restore | None, *, replace: bool) -> Restore:
        """Bring everything in beside what is in use; then have everybody leave."""
        manifest = self.backup.manifest
        if unknown := {part.collection for part in manifest.parts} - set(_collections()):
            message = f"the backup holds {', '.join(sorted(unknown))}, which this version does not know"
            raise BackupBroken(message)
        if not replace and (await Identity.find_all().limit(1).count() or await User.find_all().limit(1).count()):
            database = self.runtime.settings.mongodb_database
            message = f"database {database} holds people or users; a restore would put the backup in their place"
            raise NotEmpty(message)
        newest = OpenSet.of(self.runtime.keys, self.backup.archive)
        erased = await newest.erased()
        if standing is None or standing.set_id != manifest.id:
            await prove_all(self.backup, erased, self.tell)
            await _clear(self.runtime)
            standing = await Restore.begin(manifest.id)
        await self._documents(standing)
        await self._photos(standing, erased)
        await self._prepare(standing)
        await self._leave(standing)
        await self._close_log(standing)
        await self._set_aside()
        return standing

    async def _documents(self, standing: Restore) -> None:
        done, total = 0, self.backup.manifest.documents
        for part in self.backup.manifest.parts:
            if part.name not in standing.parts:
                await self._part(part)
                await standing.loaded("parts", part.name)
            done += part.documents
            self.tell("documents", done, total)

    async def _part(self, part: Part) -> None:
        # Durable with the note that the part is in: one node's journal is written in the order of the writes.
        staged = _database(self.runtime)[STAGED + part.collection].with_options(write_concern=WriteConcern(1))
        async for batch in self.backup.batches(part):
            try:
                with pymongo.timeout(WRITE_SECONDS):
                    await staged.insert_many([RawBSONDocument(document) for document in batch], ordered=False)
            except BulkWriteError as error:  # brought in by the try that was cut off
                if any(problem["code"] != DUPLICATE_KEY for problem in error.details["writeErrors"]):
                    raise

    async def _photos(self, standing: Restore, erased: dict[str, str]) -> None:
        done, total = 0, sum(part.documents for part in self.backup.manifest.photos)
        for part in self.backup.manifest.photos:
            if part.name in standing.photos:
                done += part.documents
                continue
            missing = 0
            async for batch in self.backup.batches(part):
                async for some in in_groups(_each(batch)):
                    missing += (await asyncio.gather(*(self._photo(one, erased) for one in some))).count(False)
                    done += len(some)
                    self.tell("photos", done, total)
            await standing.loaded("photos", part.name, missing)

    async def _photo(self, document: bytes, erased: dict[str, str]) -> bool:
        """Put the photo in the store. Returns False if it is missing there and another store owns the place."""
        row = photo_row(document)
        if PhotoName.of(row.key).identity_id in erased:
            return True
        data = await asyncio.to_thread(self.backup.archive.read_photo, row)
        try:
            if await self.runtime.photos.get(row.key) == data:
                return True
        except PhotoNotFound:
            pass
        try:
            await self.runtime.photos.put(row.key, data)
        except PhotosNotOurs:
            if not self.runtime.places.owner.reads_foreign:
                raise
            return False  # the other store has deleted it since, for example for an erasure
        return True

    async def _prepare(self, standing: Restore) -> None:
        """Have every collection there with its indexes, and nothing of the old epochs or of sessions believed."""
        database, there = _database(self.runtime), await _staged(self.runtime)
        models = {document.get_collection_name(): document for document in DOCUMENTS}
        names = _collections()
        for done, name in enumerate(names):
            self.tell("indexes", done, len(names))
            with pymongo.timeout(INDEX_SECONDS):
                if name not in there:
                    await database.create_collection(STAGED + name)
                if indexes := [known.index for known in models[name].get_settings().indexes]:
                    await database[STAGED + name].create_indexes(indexes)
        self.tell("indexes", len(names), len(names))
        galleries = database[STAGED + Gallery.get_collection_name()]
        rows = [row async for row in galleries.find({}, {"published": 1})]
        if published := [row["_id"] for row in rows if row["published"] is not None]:
            await standing.publish_later(published)
        for row in rows:
            fields = {"epoch": new_id(), "published": None, "previous": None, "fault": None, "purge_by": None}
            await galleries.update_one({"_id": row["_id"]}, {"$set": fields})
        await _hold_policies(galleries)
        for callers in (User, Client):  # whoever holds a token gets another one
            staged = database[STAGED + callers.get_collection_name()]
            step = VERSION_STEPS.start + secrets.randbelow(len(VERSION_STEPS))
            await staged.update_many({}, {"$inc": {"access_version": step}})

    async def _leave(self, standing: Restore) -> None:
        """Have all that serve end themselves. Raises StillServing."""
        await standing.turn("closing")
        self.tell("waiting for the service to leave", 0, 1)
        settings = self.runtime.settings
        deadline = time.monotonic() + settings.shutdown_grace_seconds + LEAVE_SECONDS
        while there := await still_here(self.runtime.mongo, settings.mongodb_database):
            if time.monotonic() > deadline:
                await standing.turn("loading")
                message = (
                    f"processes on {', '.join(dict.fromkeys(there))} still work on the database; stop them, then go on"
                )
                raise StillServing(message)
            await asyncio.sleep(POLL_SECONDS)
        self.tell("waiting for the service to leave", 1, 1)

    async def _close_log(self, standing: Restore) -> None:
        """Have a head over the whole log outside, so that it is told how much of it is lost. Raises EvidenceAway."""
        if (refusal := self.runtime.places.evidence.refusal) is not None:
            log.warning("log_not_closed_outside", reason=refusal)
            return
        try:
            # The ledger out there will be asked for when there is no way back.
            await self.runtime.evidence.names(LEDGER)
            left = await self.close_log(self.runtime)
            trouble = f"{left} tree heads of the log could not be written outside" if left else None
        except EvidenceUnavailable as error:
            trouble = str(error)
        if trouble is not None:
            await standing.turn("loading")
            message = f"{trouble}; nothing in use was touched: go on when the evidence store can be written to"
            raise EvidenceAway(message)

    async def _set_aside(self) -> None:
        """Keep the ledger of this database through the switch: the evidence store may not have all of it yet.

        Also keep the proof that photos of people who came after the backup belong to this store: no document names them then.
        """
        ledger = _database(self.runtime)[Deletion.get_collection_name()]
        newer = {"created_at": {"$gte": self.backup.manifest.made_at - CLOCKS_APART}}
        with pymongo.timeout(WRITE_SECONDS):
            async for _ in await ledger.aggregate([{"$merge": {"into": SET_ASIDE}}]):
                pass
            await EnrolmentBegun.note_all(newer)


async def _hold_policies(galleries: Any) -> None:  # noqa: ANN401 - the driver's, of documents of any shape
    """Keep the backup's policies from acting on people at once: they may have been changed or cancelled since the backup.

    Retention erases no one for as long as a shorter retention would have to wait. A pending change waits again for its time and
    for an officer's agreement.
    """
    later = {"$dateAdd": {"startDate": "$$NOW", "unit": "day", "amount": WAIT.days}}
    await galleries.update_many({"policy.retention_days": {"$ne": None}}, [{"$set": {"retention_held_until": later}}])
    waits = {"pending.effective_at": later, "pending.agreed_by": None, "pending.agreed_at": None}
    await galleries.update_many({"pending": {"$type": "object"}}, [{"$set": waits}])


async def _switch(runtime: Runtime, standing: Restore, tell: Tell) -> None:
    """Let the collections change places; those that have done so already are there no more."""
    await standing.turn("switching")
    database = _database(runtime)
    staged = sorted(await _staged(runtime))
    for done, name in enumerate(staged):
        tell("switching", done, len(staged))
        with pymongo.timeout(WRITE_SECONDS):
            await runtime.mongo.admin.command(
                {
                    "renameCollection": f"{database.name}.{STAGED}{name}",
                    "to": f"{database.name}.{name}",
                    "dropTarget": True,
                }
            )
    tell("switching", len(staged), len(staged))
    for name in sorted(EMPTIED):
        with pymongo.timeout(WRITE_SECONDS):
            await database[name].delete_many({})
    await standing.turn("mending")


async def _mend(runtime: Runtime, erase_again: EraseAgain, backup: OpenSet, standing: Restore, tell: Tell) -> Restored:
    """Put right what the backup cannot know, tell of it in the log, and let everybody serve."""
    manifest = backup.manifest
    erased, unreadable = await _replay(runtime, erase_again, backup, tell)
    tree = await AuditTree.current()
    misfits = await misfits_outside(runtime.evidence, tree)
    for misfit in misfits:
        log.warning("restored_log_does_not_fit", reason=misfit)

    async def note(session: AsyncClientSession) -> None:
        told = {"action": "backup.restore", "subject.id": manifest.id, "time": {"$gte": standing.started_at}}
        if await AuditEvent.find_one(told, session=session) is not None:
            return  # by the try that was cut off
        action = by_system("backup.restore")
        # Two honest heads of one size must not contradict each other under one key.
        await rotate_key(session, runtime.keys, by_system("audit.rotate_key"), f"backup {manifest.id} was restored")
        await record(
            session, action, subject_kind="backup", subject_id=manifest.id,
            detail={
                "made_at": manifest.made_at.isoformat(timespec="seconds"), "log_size": tree.size, "erased_again": erased,
                "unreadable": len(unreadable), "log": "; ".join(misfits) or None, "policies_held_days": WAIT.days,
            },
        )  # fmt: skip

    await runtime.transaction(note)
    await _clear(runtime)
    for gallery_id in standing.to_publish:
        await runtime.queue.enqueue_publication(gallery_id, again=f":{manifest.id}")
    names = sorted([gallery.name async for gallery in Gallery.find_all()])
    await Restore.end()
    log.info("backup_restored", id=manifest.id, documents=manifest.documents, erased_again=erased)
    return Restored(
        set_id=manifest.id, made_at=manifest.made_at, documents=manifest.documents,
        photos=sum(part.documents for part in manifest.photos) - standing.photos_missing,
        photos_missing=standing.photos_missing, erased_again=erased, unreadable=tuple(unreadable),
        log_size=tree.size, log=tuple(misfits), galleries=tuple(names),
        evidence=runtime.places.evidence.refusal,
    )  # fmt: skip


async def _replay(runtime: Runtime, erase_again: EraseAgain, backup: OpenSet, tell: Tell) -> tuple[int, list[str]]:
    """Erase again whoever was erased since, by three ledgers: of the database replaced, of later backups, and the one outside."""
    erased, unreadable = 0, []
    aside = _database(runtime)[SET_ASIDE]
    later = await _later(runtime, backup)
    names = await runtime.evidence.names(LEDGER)
    done, total = 0, await aside.count_documents({}) + len(later) + len(names)
    async for rows in in_groups(aside.find(), NAMES_AT_ONCE):
        known = await _known(row["_id"] for row in rows)
        for row in (row for row in rows if row["_id"] not in known):
            try:
                deletion = Deletion.model_validate(row)
            except ValueError:
                unreadable.append(f"the replaced database's of {row['_id']}")
                continue
            erased += await erase_again(runtime, deletion)
        done += len(rows)
        tell("erasures", done, total)
    for deletion in later:
        erased += await erase_again(runtime, deletion)
        done += 1
        tell("erasures", done, total)
    for first in range(0, len(names), NAMES_AT_ONCE):
        # More than one name may end in the same id, and only one of them be true.
        some = [(name, _identity_of(name)) for name in names[first : first + NAMES_AT_ONCE]]
        known = await _known(identity_id for _, identity_id in some)
        for name in (name for name, identity_id in some if identity_id not in known):
            try:
                deletion = Deletion.from_ledger(await runtime.evidence.read(name), runtime.keys)
            except (ValueError, EvidenceNotFound):
                unreadable.append(name)
                continue
            erased += await erase_again(runtime, deletion)
        done += len(some)
        tell("erasures", done, total)
    for name in unreadable:
        log.warning("ledger_line_not_obeyed", name=name)
    return erased, unreadable


async def _known(identity_ids: Iterable[str]) -> set[str]:
    """Those of them whom the documents know as erased: they are erased in them, for both are written in one transaction."""
    rows = Deletion.get_pymongo_collection().find({"_id": {"$in": list(identity_ids)}}, {"_id": 1})
    return {row["_id"] async for row in rows}


def _identity_of(name: str) -> str:
    """Whose erasure a line of the ledger outside tells of, by its name alone."""
    return name.rpartition("Z-")[2].removesuffix(".json")


async def _later(runtime: Runtime, backup: OpenSet) -> list[Deletion]:
    """Whoever the folder's newest set knows as erased, and this one does not."""
    finished = backup.archive.finished()
    if finished[-1] == backup.manifest.id:
        return []
    try:
        newest = OpenSet.of(runtime.keys, backup.archive, finished[-1])
        known, found = await backup.erased(), []
        for part in newest.manifest.parts_of(Deletion.get_collection_name()):
            async for batch in newest.batches(part):
                rows = [bson.decode(document, AWARE) for document in batch]
                found += [Deletion.model_validate(row) for row in rows if row["_id"] not in known]
    except (BackupBroken, BackupMissing, OtherKey) as error:
        log.warning("later_backup_unusable", reason=str(error))
        return []
    return found


async def _each(batch: list[bytes]) -> AsyncIterator[bytes]:
    for document in batch:
        yield document
