"""Keep the evidence store complete: write lost objects again, from MongoDB."""

from typing import Final

import structlog
from prometheus_client import Gauge

from app.kept_outside import lacks_something, lost, write_again
from app.runtime import Runtime
from storage.evidence import EvidenceUnavailable

log = structlog.get_logger(__name__)

MISSING = Gauge(
    "idem_evidence_missing",
    "Keys, tree heads and ledger lines that were missing from the evidence store when it was last compared",
)
#: How many names a log line shows. All lost objects are counted.
NAMED: Final = 3


async def keep_evidence(runtime: Runtime, *, whole: bool) -> int:
    """Write missing objects again. Returns how many were missing.

    whole: compare all objects. Otherwise check a few, and compare all only if one of the few is missing.
    """
    count, names = 0, list[str]()
    try:
        if not whole and not await lacks_something(runtime.evidence):
            return 0
        async for one in lost(runtime.evidence, runtime.keys):
            await write_again(runtime.evidence, one)
            count += 1
            names += [one.name] if len(names) < NAMED else []
    except EvidenceUnavailable as error:  # the store does not answer, but may be complete; the next sweep tries again
        log.warning("evidence_not_compared", written=count, error=str(error))
        return count
    MISSING.set(count)
    if count:
        log.error("evidence_written_again", count=count, names=names)
    return count
