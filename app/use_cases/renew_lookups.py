"""Renew lookups: make the hashes that people are found by again, where older rules of spelling made them.

After an upgrade, and after the restore of an older backup, a worker does this in the background; so it does with what a process
of an older version still writes. Until then references are looked up by the hashes of both rules, and names by the tags of both.
Each identity is changed in one update, and carries the mark of the rules in it: a pass that was cut off goes on where it stopped,
and several at once do no harm. See docs/adr/0051.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

import pymongo
import structlog
from pymongo.errors import DuplicateKeyError

from app.documents.base import new_id
from app.documents.galleries import Gallery
from app.documents.identities import Identity, LookedAt, ReferenceHashes, SealedLookups
from app.documents.leases import renewing_lookups
from app.documents.sealed import LOOKUP_RULES, gallery_key, name_tags, open_attributes, reference_hashes
from app.keys import GalleryKey, SealBroken
from app.leases import Held, held
from app.runtime import Runtime

log = structlog.get_logger(__name__)

PEOPLE_AT_ONCE: Final = 500
#: Nobody waits for a batch: a store under load may take its time.
BATCH_SECONDS: Final = 30
LEASE_SECONDS: Final = 15


@dataclass(frozen=True, slots=True)
class _Renewed:
    """Somebody's lookups under today's rules. hashes: of the reference, if there is one."""

    known: SealedLookups
    tags: list[bytes]
    hashes: ReferenceHashes | None

    @property
    def moves(self) -> bool:
        """Whether the reference has another hash than before. An older process leaves the shared hash of a former one."""
        if self.hashes is not None and self.known.external_ref_hash != self.hashes.equal:
            return True
        return self.known.external_ref_equal is not None


async def renew_lookups(runtime: Runtime, *, wait_seconds: float = LEASE_SECONDS + 1) -> int:
    """Renew what is due in all galleries; how many people. A gallery that another process renews is left to it.

    wait_seconds: how long the lease of a process that was killed may still be alive.
    """
    done = 0
    for gallery in await Gallery.find_all().to_list():
        try:
            if await _is_due(gallery):
                done += await _renew(runtime, gallery, wait_seconds)
        except SealBroken as error:  # a key that this process does not have; other galleries have other keys
            log.warning("lookups_not_renewed", gallery=gallery.name, reason=str(error))
    return done


async def _is_due(gallery: Gallery) -> bool:
    with pymongo.timeout(BATCH_SECONDS):
        await Identity.forget_stray_references(gallery.id)
        return await Identity.count_tagged(gallery.id, LOOKUP_RULES) < gallery.identities


async def _renew(runtime: Runtime, gallery: Gallery, wait_seconds: float) -> int:
    for pause in (wait_seconds, None):
        async with held(renewing_lookups(gallery.id), f"lookups:{new_id()}", LEASE_SECONDS) as lease:
            if lease is not None:
                return await renew_gallery(runtime, gallery.id, lease)
        if pause is not None:
            await asyncio.sleep(pause)
    return 0


async def renew_gallery(runtime: Runtime, gallery_id: str, lease: Held | None = None) -> int:
    """Renew what is due in one gallery; how many people. lease: reports the progress."""
    done = 0
    place: LookedAt | None = None
    is_first = True
    while is_first or place is not None:
        is_first = False
        with pymongo.timeout(BATCH_SECONDS):
            gallery = await Gallery.get(gallery_id)  # again for each batch: its keys may be rotated meanwhile
            if gallery is None:
                break
            some, place = await Identity.look_through(gallery_id, LOOKUP_RULES, place, PEOPLE_AT_ONCE)
            renewed = await asyncio.to_thread(_renewed, gallery_key(runtime.keys, gallery), some)
            done += await Identity.renew_lookups([(r.known, {"name_tags": r.tags}) for r in renewed if not r.moves])
            for one in renewed:
                if one.moves:
                    done += await _move(gallery, one)
        if lease is not None:
            lease.report("renewing lookups", done, gallery.identities)
    if done:
        log.info("lookups_renewed", gallery=gallery_id, people=done)
    return done


async def _move(gallery: Gallery, one: _Renewed) -> int:
    """Give a reference its new hash. Where another spelling has that already, the hash of this very spelling stays."""
    equal, exact = (None, None) if one.hashes is None else (one.hashes.equal, one.hashes.exact)
    fields = {"name_tags": one.tags, "external_ref_hash": equal, "external_ref_equal": None}
    try:
        return await Identity.renew_lookup(one.known, fields)
    except DuplicateKeyError:
        log.warning("reference_twice", gallery=gallery.name, identity=one.known.identity_id)
        return await Identity.renew_lookup(
            one.known, fields | {"external_ref_hash": exact, "external_ref_equal": equal}
        )


def _renewed(key: GalleryKey, some: list[SealedLookups]) -> list[_Renewed]:
    """The lookups of these people. Those whose attributes do not open are left as they are: `idem check` names them."""
    renewed = []
    for known in some:
        try:
            attributes = open_attributes(
                key.unwrap(known.wrapped_key or b"", known.identity_id),
                known.attributes,
                key.gallery_id,
                known.identity_id,
            )
        except (SealBroken, ValueError) as error:
            log.warning("lookups_not_renewed", identity=known.identity_id, reason=str(error)[:200])
            continue
        reference = attributes.external_ref
        hashes = None if reference is None else reference_hashes(key, reference)
        renewed.append(_Renewed(known, name_tags(key, attributes), hashes))
    return renewed
