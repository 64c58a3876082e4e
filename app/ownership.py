"""The places of this process's store: photos, index, copies of the index, evidence. Each place has one owner.

A process checks the owners when it starts. It refuses to start with a place of another store. If a place does not answer at the
start, its owner is checked before the first write. So is a photo store that this store marked before and that is empty now: its
share may not be mounted. The evidence store is an exception: a process starts although another store owns it. The process then
reads it, because a restore needs that, and writes nothing there.
"""

import asyncio
import errno
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal

import structlog
from prometheus_client import Gauge

from app.config import PlaceRefused, Settings
from app.documents.base import now
from app.documents.deletions import LEDGER
from app.documents.stores import Store
from app.documents.tree import HEADS, KEYS, AuditKey
from storage.evidence import EvidenceExists, EvidenceNotFound, EvidenceStore, EvidenceUnavailable
from storage.generations import is_generation
from storage.ownership import FolderPlace, Guard, Mark, Owner, Place, Standing
from storage.photos import LocalPhotoStore, MinioPhotoStore, PhotoStoreUnavailable

log = structlog.get_logger(__name__)

#: Names that a log line shows.
SHOWN: Final = 5

FOREIGN = Gauge(
    "idem_index_foreign",
    "Names in the index folder and in this host's copies that do not belong to this store and are left unchanged",
)

PlaceName = Literal["photos", "index", "copies"]
#: The names that operators use for the places.
PLACES: Final = ("photos", "index", "copies", "evidence")

#: Prefix of the owner marks in the evidence store. Nothing can be replaced there, so the last mark counts.
MARKS: Final = "store/"
#: First parts of the names in the evidence store.
EVIDENCE_NAMES: Final = frozenset(name.rstrip("/") for name in (MARKS, HEADS, KEYS, LEDGER))
#: How long a check of the evidence store's owner counts.
EVIDENCE_SECONDS: Final = 60.0


def owner_of(settings: Settings, store: Store) -> Owner:
    """The store that a process with these settings works for."""
    folders: dict[Path, frozenset[str]] = {}
    for path in (settings.vector_db_path, settings.index_copies_of(store.store_id), settings.storage_path):
        folders[path.absolute()] = frozenset()
    if not settings.evidence_bucket:
        folders[settings.evidence_path.absolute()] = EVIDENCE_NAMES
    return Owner(
        store.store_id,
        set(store.galleries),
        folders,
        set(store.places),
        reads_foreign=settings.foreign_stores == "read",
    )


def guards_of(settings: Settings, owner: Owner, photos: LocalPhotoStore | MinioPhotoStore) -> dict[PlaceName, Guard]:
    """A guard for each place except the evidence store. Also gives the photo store its guard."""
    if isinstance(photos, LocalPhotoStore):
        photo_place: Place = FolderPlace("STORAGE_PATH", settings.storage_path)
    else:
        shared = EVIDENCE_NAMES if settings.evidence_bucket == settings.minio_bucket else frozenset()
        photo_place = photos.place("MINIO_BUCKET", own_names=shared)
    photos.guard = Guard(photo_place, owner, is_remembered=True)
    copies = settings.index_copies_of(owner.id)
    return {
        "photos": photos.guard,
        "index": Guard(FolderPlace("VECTOR_DB_PATH", settings.vector_db_path), owner),
        "copies": Guard(FolderPlace("INDEX_CACHE_PATH", copies), owner),
    }


class OwnedEvidence:
    """An evidence store that only its owner adds to."""

    def __init__(self, store: EvidenceStore, owner: Owner, setting: str, where: str) -> None:
        self._store = store
        self._owner = owner
        self._setting, self._where = setting, where
        self._asked_at = -EVIDENCE_SECONDS
        #: The result of the last check; None before the first one.
        self.standing: Standing | None = None

    async def append(self, name: str, data: bytes) -> None:
        """See EvidenceStore. Also raises EvidenceUnavailable unless this store owns the evidence store."""
        if time.monotonic() - self._asked_at >= EVIDENCE_SECONDS or self.standing is None:
            await self.claim()
        if self.standing is not None and self.standing.state != "ours":
            raise EvidenceUnavailable(errno.EPERM, self.standing.sentence)
        await self._store.append(name, data)

    async def read(self, name: str) -> bytes:
        """See EvidenceStore."""
        return await self._store.read(name)

    async def names(self, prefix: str = "") -> list[str]:
        """See EvidenceStore."""
        return await self._store.names(prefix)

    async def entries(self, folder: str = "") -> list[str]:
        """See EvidenceStore."""
        return await self._store.entries(folder)

    async def close(self) -> None:
        """See EvidenceStore."""
        await self._store.close()

    def away(self, trouble: str) -> Standing:
        """The standing of an evidence store that does not answer."""
        return Standing(self._setting, self._where, "away", trouble=trouble)

    @property
    def refusal(self) -> str | None:
        """Why nothing is written there. None unless a check found another owner, or found no mark and unknown keys."""
        return self.standing.sentence if self.standing is not None and self.standing.is_refused else None

    async def look(self) -> Standing:
        """Find out who owns the evidence store. Writes nothing. Raises EvidenceUnavailable."""
        marks = await self._store.names(MARKS)
        told = partial(Standing, self._setting, self._where)
        if marks:
            mark = _mark_of(marks[-1], await self._store.read(marks[-1]))
            return told("ours" if mark.store == self._owner.id else "foreign", mark.store, mark.marked_at)
        keys = {name.removeprefix(KEYS).partition(".")[0]: name for name in await self._store.names(KEYS)}
        if not keys or await AuditKey.find({"_id": {"$in": sorted(keys)}}).limit(1).count():
            return told("free")
        return told("unmarked", unknown=tuple(keys.values()))

    async def claim(self) -> Standing:
        """Find out who owns the evidence store. Marks it when it is free. Raises EvidenceUnavailable."""
        self.standing = await self.look()
        if self.standing.state == "free":
            await self._mark(1)
            self.standing = await self.look()  # another store may have marked it first
        self._asked_at = time.monotonic()
        return self.standing

    async def adopt(self) -> Standing:
        """Take the evidence store over for this store, also from another owner. Raises EvidenceUnavailable."""
        marks = await self._store.names(MARKS)
        await self._mark(_number_of(marks[-1]) + 1 if marks else 1)
        return await self.claim()

    async def _mark(self, number: int) -> None:
        mark = Mark(store=self._owner.id, marked_at=now())
        with suppress(EvidenceExists):  # another process of this store was quicker
            await self._store.append(f"{MARKS}{number:06}-{self._owner.id}.json", mark.model_dump_json().encode())


def _number_of(name: str) -> int:
    text = name.removeprefix(MARKS).partition("-")[0]
    return int(text) if text.isascii() and text.isdigit() else 0


def _mark_of(name: str, data: bytes) -> Mark:
    try:
        return Mark.model_validate_json(data)
    except ValueError:  # the mark cannot be read, but its name states the store
        return Mark(store=name.partition("-")[2].removesuffix(".json") or name, marked_at=now())


@dataclass(slots=True)
class Places:
    """All places of one process."""

    owner: Owner
    guards: Mapping[PlaceName, Guard]
    evidence: OwnedEvidence
    timeout_seconds: float
    _strangers: list[str] = field(default_factory=list)

    async def standings(self) -> list[Standing]:
        """The standing of each place. Writes nothing."""
        return await self._each(Guard.look, self.evidence.look)

    async def claim(self) -> None:
        """Mark the places that are free. Raises PlaceRefused when a place belongs to another store, or may belong to one."""
        standings = await self._each(self._claimed, self.evidence.claim)
        await self.remember()
        for standing in standings:
            if standing.state == "emptied":
                log.error("place_emptied", setting=standing.setting, reason=standing.sentence)
        refused = [standing for standing in standings if standing.is_refused]
        for standing in refused:
            log.critical("place_of_another_store", setting=standing.setting, reason=standing.sentence)
        if stops := [one.sentence for one in refused if not self._may_stay(one)]:
            raise PlaceRefused("; ".join(stops))

    async def adopt(self, names: AbstractSet[str]) -> list[Standing]:
        """Take these places over for this store, also from another owner. names: of PLACES. Returns their new standings."""
        standings = await self._each(Guard.adopt, self.evidence.adopt, names)
        await self.remember()
        return standings

    async def remember(self) -> None:
        """Store which places carry this store's mark, as far as this process knows. Later starts do not mark them again."""
        await Store.remember_places(self.owner.places)

    async def require_photos(self) -> None:
        """Raises PhotoStoreUnavailable unless this store owns the photo store now, or there is none yet."""
        standing = await self._in_time(self.guards["photos"], Guard.claim)
        if standing.state not in {"ours", "absent"}:
            raise PhotoStoreUnavailable(errno.EPERM, standing.sentence)

    def note_strangers(self, names: list[str]) -> None:
        """Report names among the index files that do not belong to this store. Logs them only when they have changed."""
        FOREIGN.set(len(names))
        if names and names != self._strangers:
            log.warning("foreign_index_files_left_alone", count=len(names), examples=names[:SHOWN])
        self._strangers = names

    def is_own_key(self, key: str) -> bool:
        """Whether a key of the photo store belongs to another place of this store in the same folder or bucket."""
        first, _, rest = key.partition("/")
        photos, index = self.guards["photos"].place, self.guards["index"].place
        return first in photos.own_names(self.owner) or (photos.where == index.where and is_generation(rest))

    def _claimed(self, guard: Guard) -> Standing:
        """Claim a place. A missing index folder is not created: it may be a share that is not mounted."""
        return guard.claim(make=guard is not self.guards["index"])

    def _may_stay(self, standing: Standing) -> bool:
        """Whether a process may start with a place that another store owns or may own. It writes nothing there."""
        return self.owner.reads_foreign or standing is self.evidence.standing

    async def _each(
        self,
        work: Callable[[Guard], Standing],
        evidence: Callable[[], Awaitable[Standing]],
        names: AbstractSet[str] = frozenset(PLACES),
    ) -> list[Standing]:
        async def asked() -> Standing:
            try:
                return await evidence()
            except (EvidenceUnavailable, EvidenceNotFound) as error:
                return self.evidence.away(str(error))

        waits: list[Awaitable[Standing]] = [
            self._in_time(guard, work) for name, guard in self.guards.items() if name in names
        ]
        if "evidence" in names:
            waits.append(asked())
        return await asyncio.gather(*waits)

    async def _in_time(self, guard: Guard, work: Callable[[Guard], Standing]) -> Standing:
        """Do blocking work in a daemon thread, so that work that hangs does not keep the process from ending."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Standing] = loop.create_future()
        away = partial(Standing, guard.place.setting, guard.place.where, "away")

        def carry_out() -> None:
            try:
                result = work(guard)
            except OSError as error:
                result = away(trouble=str(error))
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(hand_over, result)

        def hand_over(result: Standing) -> None:
            if not ended.done():  # it is done when the wait has timed out
                ended.set_result(result)

        threading.Thread(target=carry_out, name="ownership", daemon=True).start()
        try:
            async with asyncio.timeout(self.timeout_seconds):
                return await ended
        except TimeoutError:
            return away(trouble="it did not answer in time")
