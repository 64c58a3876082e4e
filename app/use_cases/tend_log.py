"""What the audit log asks for from time to time: that strangers' refusals are told, and old names forgotten."""

from datetime import timedelta
from typing import Final

import structlog

from app.audit import tell_of_strangers
from app.documents.base import now
from app.documents.events import AuditEvent
from app.documents.tree import AuditTree
from app.runtime import Runtime

log = structlog.get_logger(__name__)

#: More addresses than these wait for the next time.
TOLD_AT_ONCE: Final = 500


async def tend(runtime: Runtime) -> None:
    """Both; safe to run at any moment, twice at once too."""
    for _ in range(TOLD_AT_ONCE):
        if not await runtime.transaction(tell_of_strangers):
            break
    await forget_old_names(runtime)


async def forget_old_names(runtime: Runtime) -> int:
    """Delete the salts and clear values of events older than AUDIT_PERSONAL_DAYS; returns of how many events.

    Deletes nothing while this host's clock and MongoDB's differ, and for a day after MongoDB's was set: a deletion is final.
    """
    await runtime.clock.measure(runtime.mongo)
    if not runtime.clock.may_erase:
        return 0
    tree = await AuditTree.current()
    until = now() - timedelta(days=runtime.settings.audit_personal_days)
    # Looks only at events that became old enough since the last time. A clock that was ahead may have stored a later moment.
    since = {} if tree.forgotten_until is None or tree.forgotten_until > until else {"$gte": tree.forgotten_until}
    count = await AuditEvent.forget_personal({"time": {**since, "$lt": until}})
    await AuditTree.get_pymongo_collection().update_one({"_id": tree.id}, {"$set": {"forgotten_until": until}})
    if count:
        log.info("audit_names_forgotten", events=count)
    return count
