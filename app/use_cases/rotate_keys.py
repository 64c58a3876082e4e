"""Rotate keys while the service runs: a gallery's key with its people's data keys, and what the key-encryption key has sealed.

Every step is one that readers and writers may meet at any moment; a rotation that was cut off goes on where it stopped, because
what is left to do stands in the documents themselves. See docs/adr/0030.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import pymongo
import structlog
from pymongo import UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, record
from app.documents.base import new_id, now
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.leases import Lease, re_embedding, rekeying
from app.documents.master_sealed import MASTER_SEALED, SealedValue
from app.documents.sealed import gallery_key
from app.errors import Conflict, NotFound, NotReady
from app.keys import GalleryKey, SealBroken, WrappedKeys, master_key_of
from app.leases import Held, LeaseLost, held
from app.runtime import Runtime

log = structlog.get_logger(__name__)

Stage = Literal["sealing", "waiting", "wrapping"]
Tell = Callable[[Stage, int, int], Awaitable[None]]

LEASE_SECONDS: Final = 15
#: Longer than any request holds what it has read (an enrolment gives up after as long, `?wait=` ends after half of it): so long
#: a generation is known before it wraps, and stays after nothing is wrapped with it any more.
SETTLE_SECONDS: Final = 60.0
REWRAPPED_AT_ONCE: Final = 500
RESEALED_AT_ONCE: Final = 100
#: Nobody waits for a batch: a store under load may take its time.
BATCH_SECONDS: Final = 30


@dataclass(frozen=True, slots=True)
class KeyUse:
    """How many values each key-encryption key has sealed. known: whether this process has the key; newest: seals here."""

    key_id: str
    values: int
    known: bool
    newest: bool


@dataclass(frozen=True, slots=True)
class GalleryKeyUse:
    """A gallery's generations, which of them wraps, and how many data keys each has wrapped."""

    gallery: str
    sealing: int
    generations: dict[int, int]


async def key_use(runtime: Runtime) -> list[KeyUse]:
    """Which key-encryption keys the store still needs, and those that nothing needs any more; the newest first."""
    counts = dict.fromkeys(runtime.keys.key_ids, 0)
    for place in MASTER_SEALED:
        async for value in place.values():
            name = master_key_of(value.sealed)
            counts[name] = counts.get(name, 0) + 1
    return [
        KeyUse(name, count, known=name in runtime.keys.key_ids, newest=name == runtime.keys.key_id)
        for name, count in counts.items()
    ]


async def gallery_key_use(name: str | None = None) -> list[GalleryKeyUse]:
    """The keys of one gallery, or of all. Raises NotFound."""
    return [
        GalleryKeyUse(
            gallery.name, gallery.wrapped_keys.sealing,
            dict.fromkeys(gallery.wrapped_keys.numbers, 0) | await Identity.count_by_generation(gallery.id),
        )
        for gallery in await chosen(name)
    ]  # fmt: skip


async def chosen(name: str | None) -> list[Gallery]:
    """The gallery of that name, or all. Raises NotFound."""
    if name is None:
        return await Gallery.find_all().sort("name").to_list()
    return [await Gallery.require(name)]


async def rewrap(runtime: Runtime, action: Action, tell: Tell | None = None) -> int:
    """Seal anew, under the newest key-encryption key, whatever another one has sealed; how many values.

    Raises SealBroken when a value was sealed under a key that is not known here.
    """
    old = [v for place in MASTER_SEALED async for v in place.values() if master_key_of(v.sealed) != runtime.keys.key_id]
    done = 0
    for first in range(0, len(old), RESEALED_AT_ONCE):
        some = old[first : first + RESEALED_AT_ONCE]
        done += await runtime.transaction(partial(_reseal, runtime, action, some))
        if tell is not None:
            await tell("sealing", min(first + RESEALED_AT_ONCE, len(old)), len(old))
    log.info("keys_rewrapped", values=done, key=runtime.keys.key_id)
    return done


async def _reseal(runtime: Runtime, action: Action, values: list[SealedValue], session: AsyncClientSession) -> int:
    """Put the resealed values in place of those that were read; what was changed meanwhile is newer, and stays."""
    keys, done = runtime.keys, 0
    for value in values:
        sealed = keys.seal_with_master(keys.open_with_master(value.sealed, value.bound), value.bound)
        result = await value.document.get_pymongo_collection().update_one(
            {"_id": value.id, value.field: value.sealed}, {"$set": {value.field: sealed}}, session=session
        )
        done += result.modified_count
    await record(
        session, action, subject_kind="key", subject_id=keys.key_id,
        detail={"values": done, "collections": ",".join(sorted({v.document.get_collection_name() for v in values}))},
    )  # fmt: skip
    return done


async def rotate_gallery_key(
    runtime: Runtime,
    action: Action,
    gallery_id: str,
    tell: Tell | None = None,
    *,
    settle_seconds: float = SETTLE_SECONDS,
) -> int:
    """Give the gallery's key a new generation, wrap all data keys with it, destroy the older ones; how many were wrapped anew.

    A rotation that was cut off is finished, instead of a further one begun. settle_seconds: see SETTLE_SECONDS. Raises Conflict
    while another one is at it or the gallery is moved to another model, NotFound, SealBroken, NotReady when the lease was lost.
    """
    try:
        async with held(rekeying(gallery_id), f"rekey:{new_id()}", LEASE_SECONDS) as lease:
            if lease is None:
                raise Conflict("The gallery's key is being rotated already.")
            if await Lease.alive(re_embedding(gallery_id)):
                raise Conflict("The gallery is being moved to another model. Rotate its key when the move has ended.")
            return await _Rotation(runtime, action, gallery_id, lease, tell, settle_seconds).run()
    except LeaseLost as error:
        raise NotReady("The rotation was too slow, and another one took over; what it did is kept.") from error


@dataclass(slots=True)
class _Rotation:
    runtime: Runtime
    action: Action
    gallery_id: str
    lease: Held
    tell: Tell | None
    settle_seconds: float

    async def run(self) -> int:
        gallery = await self._gallery()
        if len(gallery.wrapped_keys.generations) == 1:
            gallery = await self._change(self._with_another)
        newest = gallery.wrapped_keys.numbers[-1]
        if gallery.wrapped_keys.sealing != newest:
            # Known before it is used: whoever has read the gallery before this is through by then.
            await self._settle()
            gallery = await self._change(lambda keys: keys.model_copy(update={"sealing": newest}))
        wrapped = await self._wrap_anew(gallery)
        await self._settle()
        await self._destroy_older(newest, wrapped)
        log.info("gallery_key_rotated", gallery=gallery.name, generation=newest, identities=wrapped)
        return wrapped

    def _with_another(self, keys: WrappedKeys) -> WrappedKeys:
        number = str(keys.numbers[-1] + 1)
        fresh = {number: self.runtime.keys.new_generation(self.gallery_id)}
        return keys.model_copy(update={"generations": keys.generations | fresh})

    async def _change(self, changed: Callable[[WrappedKeys], WrappedKeys]) -> Gallery:
        """Put the gallery's keys in another state, as they are at this moment."""

        async def commit(session: AsyncClientSession) -> None:
            await self.lease.require(session)
            gallery = await Gallery.get(self.gallery_id, session=session)
            if gallery is None:
                raise NotFound
            await _put(gallery, changed(gallery.wrapped_keys), session)

        await self.runtime.transaction(commit)
        return await self._gallery()

    async def _wrap_anew(self, gallery: Gallery) -> int:
        """Wrap with the sealing generation what an older one wrapped. From here on nothing more can come."""
        key = gallery_key(self.runtime.keys, gallery)
        done, total = 0, gallery.identities
        while True:
            with pymongo.timeout(BATCH_SECONDS):
                some = await Identity.wrapped_before(gallery.id, key.sealing, REWRAPPED_AT_ONCE)
                if not some:
                    return done
                updates = await asyncio.to_thread(_rewrapped, key, some)
                result = await Identity.get_pymongo_collection().bulk_write(updates, ordered=False)
            # What did not match was erased meanwhile, and needs nothing.
            done += result.modified_count
            await self._say("wrapping", done, max(total, done))

    async def _settle(self) -> None:
        whole = int(self.settle_seconds)
        for second in range(whole):
            await self._say("waiting", second, whole)
            await asyncio.sleep(1)
        await asyncio.sleep(self.settle_seconds - whole)

    async def _say(self, stage: Stage, done: int, total: int) -> None:
        self.lease.report(stage, done, total)
        if self.tell is not None:
            await self.tell(stage, done, total)

    async def _destroy_older(self, newest: int, wrapped: int) -> None:
        async def commit(session: AsyncClientSession) -> None:
            await self.lease.require(session)
            gallery = await Gallery.get(self.gallery_id, session=session)
            if gallery is None:
                raise NotFound
            if await Identity.wrapped_before(gallery.id, newest, 1, session):
                raise NotReady("A data key is wrapped with the former generation still; rotate again to go on.")
            keys = gallery.wrapped_keys
            left = {str(newest): keys.generations[str(newest)]}
            await _put(gallery, keys.model_copy(update={"generations": left}), session)
            await record(
                session, self.action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name,
                detail={"generation": newest, "identities": wrapped},
            )  # fmt: skip

        await self.runtime.transaction(commit)

    async def _gallery(self) -> Gallery:
        gallery = await Gallery.get(self.gallery_id)
        if gallery is None:
            raise NotFound
        return gallery


async def _put(gallery: Gallery, keys: WrappedKeys, session: AsyncClientSession) -> None:
    await gallery.get_pymongo_collection().update_one(
        {"_id": gallery.id}, {"$set": {"wrapped_keys": keys.model_dump(), "updated_at": now()}}, session=session
    )


def _rewrapped(key: GalleryKey, some: list[tuple[str, bytes]]) -> list[UpdateOne]:
    """The updates that put newly wrapped data keys in place of these. Raises SealBroken, telling whose does not open."""
    updates = []
    for identity_id, wrapped in some:
        try:
            data_key = key.unwrap(wrapped, identity_id)
        except SealBroken as error:
            raise SealBroken(f"identity {identity_id}: {error}") from error
        fields = {"wrapped_key": key.wrap(data_key, identity_id), "key_generation": key.sealing}
        updates.append(UpdateOne({"_id": identity_id, "wrapped_key": wrapped}, {"$set": fields}))
    return updates
