"""Number the events, grow the Merkle tree, sign its heads, and bring them and their keys to the evidence store.

Any process may do any of it at any moment: the tree's own document decides who was first. A lease only spares the others the
work.
"""

import asyncio
import os
import platform
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Final

import structlog
from pymongo import UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from app.audit import by_system, rotate_key
from app.clock import APART_SECONDS
from app.documents.base import as_text, new_id, now
from app.documents.events import AuditEvent
from app.documents.tree import AuditKey, AuditTree, TreeHead, TreeNode
from app.domain.log_check import CLOCK_AHEAD
from app.domain.log_export import canonical
from app.domain.merkle import leaf_hash
from app.errors import DependencyUnavailable, NotReady
from app.leases import LeaseLost, held
from app.runtime import Runtime
from storage.evidence import EvidenceExists, EvidenceUnavailable

log = structlog.get_logger(__name__)

LEASE: Final = "audit:sequence"
#: How long the log stands still when the process that numbers it was killed.
LEASE_SECONDS: Final = 3.0
#: One transaction's worth: some 50 ms, and far from what MongoDB takes in one.
BATCH: Final = 500
POLL_SECONDS: Final = 0.2
#: How often the others look whether they are needed.
TAKE_OVER_SECONDS: Final = 1.0
#: Nobody waits for it as for a request; still less than a stopping process has left.
PATIENCE_SECONDS: Final = 5.0
#: How far ahead of now a head may be dated: clocks are corrected by small steps now and then.
SIGNED_AHEAD: Final = timedelta(seconds=APART_SECONDS)
#: How long an export waits until its own event has a number.
NUMBERED_WITHIN_SECONDS: Final = 5.0


async def grow(runtime: Runtime) -> int:
    """Number the next events and put them into the tree; returns how many. At most BATCH in one transaction.

    The order is that in which they were found committed, not that of any clock.
    """
    if not await AuditEvent.unnumbered(1):
        return 0

    async def body(session: AsyncClientSession) -> int:
        tree = await AuditTree.current(session)
        events = await AuditEvent.unnumbered(BATCH, session)
        growth, numbered, nodes = tree.growth(), [], []
        for event in events:
            seq = growth.size
            hash_ = leaf_hash(canonical(event.leaf(seq)))
            nodes += [{"_id": TreeNode.name(node), "hash": value} for node, value in growth.add(hash_)]
            fields = {"$set": {"seq": seq, "leaf_hash": hash_.hex()}}
            numbered.append(UpdateOne({"_id": event.id, "seq": None}, fields))
        if not numbered:
            return 0
        # Two that grow it at once conflict here; who comes second starts over from what the first has left.
        grown = await AuditTree.get_pymongo_collection().update_one(
            {"_id": tree.id, "size": tree.size},
            {"$set": {"size": growth.size, "peaks": growth.peaks}},
            session=session,
        )
        given = await AuditEvent.get_pymongo_collection().bulk_write(numbered, ordered=False, session=session)
        if (grown.matched_count, given.matched_count) != (1, len(numbered)):
            message = "the tree or an event changed within the transaction that numbers it"
            raise RuntimeError(message)
        if nodes:
            await TreeNode.get_pymongo_collection().insert_many(nodes, session=session)
        return len(numbered)

    return await runtime.transaction(body, seconds=PATIENCE_SECONDS)


async def sign(runtime: Runtime) -> TreeHead:
    """The signed head over the current tree. Signs one if there is none yet.

    Raises SealBroken. Raises NotReady while this host's clock and MongoDB's differ, because a head states when it was signed.
    """
    if (difference := runtime.clock.difference) is not None:
        message = f"Checkpoints are not signed here: {difference}"
        raise NotReady(message, retry_after_seconds=5)

    async def body(session: AsyncClientSession) -> TreeHead:
        tree, key = await AuditTree.current(session), await AuditKey.active(session)
        if (tree.signed_size, tree.signed_by) == (tree.size, key.id):
            newest = await TreeHead.find({"size": tree.size, "key_id": key.id}, session=session).first_or_none()
            if newest is not None:
                return newest
        # Heads of one key grow with their times: to an auditor, a later head over fewer events means a log that was set back.
        time = now() if tree.signed_at is None else max(now(), tree.signed_at + timedelta(milliseconds=1))
        if time - now() > SIGNED_AHEAD:
            # The clock was ahead and is right again. A head of the same key would be dated before the last one, so a new key
            # begins a new order.
            reason = f"{CLOCK_AHEAD}: its heads are dated up to {as_text(time)}"
            key, time = await rotate_key(session, runtime.keys, by_system("audit.rotate_key"), reason), now()
            log.error("audit_key_replaced", key=key.id, reason=reason)
        head = TreeHead.signed(tree, key, runtime.keys, time)
        await head.insert(session=session)
        signed = {"signed_size": head.size, "signed_at": head.time, "signed_by": head.key_id}
        await AuditTree.get_pymongo_collection().update_one({"_id": tree.id}, {"$set": signed}, session=session)
        return head

    return await runtime.transaction(body)


async def deliver(runtime: Runtime) -> int:
    """Upload the newest signed head of each key to the evidence store, public keys first.

    Earlier heads of that key need no file of their own: a head over more events proves them. Returns how many heads still wait.
    """
    try:
        for key in await AuditKey.undelivered():
            await _append(runtime, *key.evidence)
            await key.get_pymongo_collection().update_one({"_id": key.id}, {"$set": {"is_delivered": True}})
        while (head := await TreeHead.undelivered()) is not None:
            await _append(runtime, *head.evidence)
            await head.delivered()
    except EvidenceUnavailable as error:
        left = await TreeHead.waiting()
        log.warning("audit_heads_undelivered", waiting=left, error=str(error))
        return left
    return 0


async def _append(runtime: Runtime, name: str, data: bytes) -> None:
    try:
        await runtime.evidence.append(name, data)
    except EvidenceExists:
        # Another writer used this name: an auditor must see it, and later heads must not wait.
        log.critical("audit_head_contradicted", name=name)


async def _is_delivery_due(runtime: Runtime) -> bool:
    """Whether a key or a head must be uploaded now. All workers together upload one head in AUDIT_CHECKPOINT_SECONDS."""
    if await AuditKey.undelivered():
        return True
    if await TreeHead.undelivered() is None:
        return False
    newest = await TreeHead.newest_outside()
    return newest is None or not newest.time <= now() <= newest.time + timedelta(
        seconds=runtime.settings.audit_checkpoint_seconds
    )


async def close(runtime: Runtime) -> int:
    """Have every event in the tree, signed and delivered: another log is about to take this one's place.

    Returns how many heads still wait. A log that is broken is closed as far as it goes.
    """
    try:
        while await grow(runtime):
            pass
        if (await AuditTree.current()).size:
            await sign(runtime)
    except Exception:
        log.exception("audit_log_not_closed")
    return await deliver(runtime)


async def head_over(runtime: Runtime, event_id: str) -> TreeHead:
    """A signed head over a tree that holds this event. Raises NotReady when nobody numbers events at the moment."""
    # By the clock and not by a cancellation, which the driver may swallow.
    until = time.monotonic() + NUMBERED_WITHIN_SECONDS
    while time.monotonic() < until:
        event = await AuditEvent.get(event_id)
        if event is not None and event.seq is not None:
            newest = await TreeHead.newest()
            if newest is not None and newest.size > event.seq:
                return newest
            if runtime.clock.agrees:
                return await sign(runtime)
            # A worker on another host signs within a second.
        await asyncio.sleep(POLL_SECONDS / 4)
    message = runtime.clock.difference or "Events are not being numbered at the moment; is a worker running?"
    raise NotReady(message, retry_after_seconds=5)


@asynccontextmanager
async def kept_up(runtime: Runtime) -> AsyncIterator[None]:
    """While the body runs: number events as they come (or wait to take over from who does), and deliver the heads."""
    stopping = asyncio.Event()
    tasks = [asyncio.create_task(_number(runtime, stopping)), asyncio.create_task(_deliver(runtime, stopping))]
    try:
        yield
    finally:
        # Asked, not cancelled, for the lease's sake; what hangs is cut off when its time limit is over.
        stopping.set()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _number(runtime: Runtime, stopping: asyncio.Event) -> None:
    holder = f"{platform.node()}:{os.getpid()}:{new_id()}"
    unsigned = _Unsigned(runtime.settings.audit_head_seconds)
    while not stopping.is_set():
        try:
            async with held(LEASE, holder, LEASE_SECONDS) as lease:
                if lease is not None:
                    await _number_on(runtime, stopping)
                elif runtime.clock.agrees and unsigned.is_overdue(await AuditTree.current()):
                    await sign(runtime)
        except (PyMongoError, DependencyUnavailable, LeaseLost, TimeoutError) as error:
            log.warning("audit_log_waits", error=type(error).__name__)
        except Exception:
            # An event that cannot be numbered holds up all behind it; nothing here could put that right.
            log.exception("audit_log_stands_still")
        await _wait(stopping, TAKE_OVER_SECONDS)


class _Unsigned:
    """Whether another worker must sign: the one that numbers the events signs nothing while its clock differs."""

    def __init__(self, head_seconds: float) -> None:
        self._patience = 3 * head_seconds + TAKE_OVER_SECONDS
        self._seen: int | None = None
        self._since = time.monotonic()

    def is_overdue(self, tree: AuditTree) -> bool:
        """Whether the tree has grown for too long since its last head."""
        if tree.signed_size == tree.size or tree.signed_size != self._seen:
            self._seen, self._since = tree.signed_size, time.monotonic()
        return time.monotonic() - self._since > self._patience


async def _number_on(runtime: Runtime, stopping: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    next_head = loop.time()
    while not stopping.is_set():
        count = await grow(runtime)
        if loop.time() >= next_head:
            tree, key = await AuditTree.current(), await AuditKey.active()
            if (tree.signed_size, tree.signed_by) != (tree.size, key.id) and runtime.clock.agrees:
                await sign(runtime)
                next_head = loop.time() + runtime.settings.audit_head_seconds
        if count < BATCH:
            await _wait(stopping, POLL_SECONDS)


async def _deliver(runtime: Runtime, stopping: asyncio.Event) -> None:
    while not stopping.is_set():
        try:
            if await _is_delivery_due(runtime):
                await deliver(runtime)
        except (PyMongoError, DependencyUnavailable) as error:
            log.warning("audit_delivery_waits", error=type(error).__name__)
        except Exception:
            log.exception("audit_delivery_failed")
        await _wait(stopping, runtime.settings.audit_head_seconds)


async def _wait(stopping: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stopping.wait()
