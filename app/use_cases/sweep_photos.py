"""Sweep the photo store: delete this store's photos that no document names, and report photos that may not be its own."""

from datetime import timedelta
from typing import Final

import structlog

from app.documents.restores import Restore
from app.documents.stores import EnrolmentBegun
from app.orphans import FOREIGN, ORPHAN_AGE, SHOWN, known_galleries, old_keys, sorted_by_owner
from app.runtime import Runtime

log = structlog.get_logger(__name__)

#: After this time, a sweep has seen every photo of an enrolment that was never committed.
PROOF_AGE: Final = ORPHAN_AGE + timedelta(hours=24)
PROOFS_AT_ONCE: Final = 1000


async def sweep_photos(runtime: Runtime) -> int:
    """Delete the orphans that are older than a day. Returns how many. Other photos without a document stay, and are reported.

    Deletes nothing while a restore is under way. Raises PhotoStoreUnavailable when the photo store does not answer or belongs to
    another store.
    """
    await runtime.places.require_photos()
    await runtime.clock.measure(runtime.mongo)
    if not runtime.clock.may_erase:
        # A photo may look old although its document is about to be committed.
        log.error("orphan_photos_wait_for_the_clock", **runtime.clock.why_not)
        return 0
    galleries = await known_galleries()
    deleted, foreign, examples = 0, 0, list[str]()
    async for keys in old_keys(runtime.photos, age=ORPHAN_AGE):
        found = await sorted_by_owner(keys, galleries)
        if found.orphans:
            if await Restore.standing() is not None:
                # The backup that is being loaded may name these photos.
                log.warning("orphan_photos_wait_for_the_restore", deleted=deleted)
                return deleted
            deleted += await runtime.photos.delete(found.orphans)
        strange = [key for key in found.foreign if not runtime.places.is_own_key(key)]
        foreign += len(strange)
        examples += strange[: SHOWN - len(examples)]
    FOREIGN.set(foreign)
    if deleted:
        log.info("orphan_photos_deleted", count=deleted)
    if foreign:
        log.warning("foreign_photos_left_alone", count=foreign, examples=examples)
    while proofs := await EnrolmentBegun.older_than(PROOF_AGE, PROOFS_AT_ONCE):
        await EnrolmentBegun.forget([proof.id for proof in proofs])
    return deleted
