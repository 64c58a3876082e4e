"""Keep the evidence store complete: write lost objects again, from MongoDB."""

from typing import Final

import structlog
from prometheus_client import Gauge

from app.documents.base import new_id
from app.documents.stores import STORE, Store
from app.kept_outside import lacks_something, lost, write_again
from app.leases import LeaseLost, held
from app.runtime import Runtime
from storage.evidence import EvidenceUnavailable

log = structlog.get_logger(__name__)

MISSING = Gauge(
    "idem_evidence_missing",
    "Keys, tree heads and ledger lines that were missing from the evidence store when it was last compared",
)
#: How many names a log line shows. All lost objects are counted.
NAMED: Final = 3
LEASE: Final = "evidence"
#: A killed sweep is continued after this time.
LEASE_SECONDS: Final = 30


async def keep_evidence(runtime: Runtime, *, whole: bool) -> int:
    """Write missing objects again. Returns how many were missing; 0 while another sweep does it.

    whole: compare all objects. Otherwise check a few, and compare all only if one of the few is missing, or if an earlier sweep
    did not finish. Compares a few only if this store may write to the evidence store.
    """
    if not whole and runtime.places.evidence.refusal is not None:
        return 0  # nothing may be written there before it is adopted
    try:
        if not (whole or await _is_unfinished() or await lacks_something(runtime.evidence)):
            return 0
        # Writing thousands of files again takes minutes, and every 20 seconds another sweep starts.
        async with held(LEASE, f"evidence:{new_id()}", LEASE_SECONDS) as lease:
            return 0 if lease is None else await _write_lost_again(runtime)
    except LeaseLost:
        log.warning("evidence_sweep_given_up")
    except EvidenceUnavailable as error:  # the store does not answer, but may be complete; the next sweep tries again
        log.warning("evidence_not_compared", error=str(error))
    return 0


async def _is_unfinished() -> bool:
    store = await Store.get(STORE)
    return store is not None and store.lacks_evidence


async def _write_lost_again(runtime: Runtime) -> int:
    """Compare all objects. Raises EvidenceUnavailable."""
    count, names = 0, list[str]()
    async for one in lost(runtime.evidence, runtime.keys):
        if not count:
            await Store.note_evidence(lacks_some=True)
        await write_again(runtime.evidence, one)
        count += 1
        names += [one.name] if len(names) < NAMED else []
    await Store.note_evidence(lacks_some=False)
    MISSING.set(count)
    if count:
        log.error("evidence_written_again", count=count, names=names)
    return count
