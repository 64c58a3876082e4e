"""Keep the evidence store complete: what it has lost is written again from MongoDB."""

from typing import Final

import structlog
from prometheus_client import Gauge

from app.kept_outside import lacks_something, lost, write_again
from app.runtime import Runtime
from storage.evidence import EvidenceUnavailable

log = structlog.get_logger(__name__)

MISSING = Gauge(
    "idem_evidence_missing",
    "Keys, tree heads and lines of the ledger that the evidence store had lost when it was last compared",
)
#: Names that a log line gives; all are counted.
NAMED: Final = 3


async def keep_evidence(runtime: Runtime, *, whole: bool) -> int:
    """Compare and write again; returns how many were missing. whole: else only where a look at a few finds one missing."""
    count, names = 0, list[str]()
    try:
        if not whole and not await lacks_something(runtime.evidence):
            return 0
        async for one in lost(runtime.evidence, runtime.keys):
            await write_again(runtime.evidence, one)
            count += 1
            names += [one.name] if len(names) < NAMED else []
    except EvidenceUnavailable as error:  # it is away, and may have lost nothing; the next sweep goes on
        log.warning("evidence_not_compared", written=count, error=str(error))
        return count
    MISSING.set(count)
    if count:
        log.error("evidence_written_again", count=count, names=names)
    return count
