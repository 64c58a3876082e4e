"""Leases with fencing epochs: who may publish or sweep. MongoDB's clock judges every expiry, never a holder's own.

A lease alone stops nobody who was asleep while it expired. What the holder commits is therefore written in a transaction that
also asks `Held.require`, and fails when another has acquired the lease since.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Final, Self

import structlog
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError, PyMongoError

from app.clock import APART_SECONDS, from_now
from app.documents.base import now
from app.documents.leases import Lease, LeaseProgress

log = structlog.get_logger(__name__)

_ALIVE: Final = {"$gt": ["$expires_at", "$$NOW"]}
#: A lease that has run out. A renewal dated more than a minute ahead was written while MongoDB's clock was ahead: its lease is
#: free as well. A living holder renews within seconds, and a holder whose lease is taken cannot commit.
_IS_FREE: Final = {
    "$or": [{"$lte": ["$expires_at", "$$NOW"]}, {"$gt": ["$updated_at", from_now(timedelta(seconds=APART_SECONDS))]}]
}
#: A third of the time: two renewals may be lost before a lease is.
_RENEWALS: Final = 3
#: Progress is written at most so often.
_TICK_SECONDS: Final = 1.0


class LeaseLost(Exception):
    """The lease has expired or is another's: what was done under it must not be committed."""


class Held:
    """A lease that was acquired; `fence` is higher than that of every holder before."""

    def __init__(self, name: str, holder: str, fence: int, ttl_seconds: float) -> None:
        self.name = name
        self.holder = holder
        self.fence = fence
        self.ttl_seconds = ttl_seconds
        self.progress: LeaseProgress | None = None
        self._mine = {"_id": name, "holder": holder, "fence": fence}

    @classmethod
    async def acquire(cls, name: str, holder: str, ttl_seconds: float) -> Self | None:
        """Take the lease; None while it is held, be it by the same holder.

        holder: unique to the process or child that does the work, so that nobody else can be taken for it.
        """
        fence = {"$add": [{"$ifNull": ["$fence", 0]}, 1]}
        fresh = {"holder": {"$literal": holder}, "fence": fence, "checks": 0, "progress": None}
        update = _renewed(ttl_seconds, fresh)
        leases = Lease.get_pymongo_collection()
        taken = await leases.find_one_and_update(
            {"_id": name, "$expr": _IS_FREE}, update, return_document=ReturnDocument.AFTER
        )
        if taken is None:
            # It is held, or was never acquired: an insertion of the first, which the id of a standing one prevents. One
            # statement cannot do both, because MongoDB takes no `$expr` in an upsert.
            try:
                await leases.update_one({"_id": name, "fence": {"$exists": False}}, update, upsert=True)
            except DuplicateKeyError:
                return None
        return cls(name, holder, 1 if taken is None else int(taken["fence"]), ttl_seconds)

    def report(self, stage: str, done: int, total: int) -> None:
        """Say how far the work is, from any thread; written with the next renewal."""
        before = self.progress
        started_at = before.started_at if before is not None and before.stage == stage else now()
        self.progress = LeaseProgress(stage=stage, done=done, total=total, started_at=started_at)

    async def renew(self) -> bool:
        """Hold it for another `ttl_seconds` from now, and write the progress; False when it is lost.

        One that expired and that nobody took since is still ours.
        """
        progress = None if self.progress is None else self.progress.model_dump()
        fields: dict[str, object] = {"progress": {"$literal": progress}}
        renewed = await Lease.get_pymongo_collection().update_one(self._mine, _renewed(self.ttl_seconds, fields))
        return bool(renewed.matched_count)

    async def require(self, session: AsyncClientSession) -> None:
        """Let this transaction commit only while the lease is ours. Raises LeaseLost.

        It writes to the lease, so that an acquisition by another and this transaction cannot both pass each other by.
        """
        checked = await Lease.get_pymongo_collection().update_one(
            {**self._mine, "$expr": _ALIVE}, {"$inc": {"checks": 1}}, session=session
        )
        if not checked.matched_count:
            raise LeaseLost(f"{self.name} is no longer held with fence {self.fence}")

    async def release(self) -> None:
        """Let the next one have it at once; nothing happens when it is lost already."""
        await Lease.get_pymongo_collection().update_one(self._mine, _renewed(0, _FREE))


_FREE: Final[Mapping[str, object]] = {"holder": None, "progress": None}


async def release_of(name: str, holder: str) -> bool:
    """Give back the lease of a child process that died; False when it was not that child's."""
    freed = await Lease.get_pymongo_collection().update_one({"_id": name, "holder": holder}, _renewed(0, _FREE))
    return bool(freed.matched_count)


@asynccontextmanager
async def held(name: str, holder: str, ttl_seconds: float = 30) -> AsyncIterator[Held | None]:
    """Hold a lease for as long as the body runs; None when somebody else does.

    It is renewed in the background with what the body reports, and given back at the end. When it is lost, or cannot be renewed
    in time, the body is cancelled and LeaseLost raised in its place.
    """
    lease = await Held.acquire(name, holder, ttl_seconds)
    if lease is None:
        yield None
        return
    is_over = asyncio.Event()
    try:
        async with asyncio.timeout(None) as limit:
            renewing = asyncio.create_task(_keep(lease, limit, is_over))
            try:
                yield lease
            finally:
                # Asked, not cancelled: the driver may turn a cancellation into an error of the connection, which a
                # renewal outlives, and then it would be renewed for ever.
                is_over.set()
                await asyncio.gather(renewing, return_exceptions=True)
    except Exception as error:
        if limit.expired():
            raise LeaseLost(f"{name} was lost while its holder worked") from error
        raise
    finally:
        try:
            await lease.release()
        except PyMongoError as error:  # it will expire
            log.warning("lease_not_released", lease=name, error=type(error).__name__)


async def _keep(lease: Held, limit: asyncio.Timeout, is_over: asyncio.Event) -> None:
    """Renew it in time, and sooner when there is progress to tell; end the body's time when it is lost."""
    period = lease.ttl_seconds / _RENEWALS
    tick = min(_TICK_SECONDS, period)
    told, renewed, is_ours = lease.progress, time.monotonic(), True
    while is_ours:
        with suppress(TimeoutError):
            async with asyncio.timeout(tick):
                await is_over.wait()
        if is_over.is_set():
            return
        progress, asked = lease.progress, time.monotonic()
        if progress is told and asked - renewed < period - tick / 2:
            continue
        try:
            is_ours = await lease.renew()
        except PyMongoError as error:
            log.warning("lease_not_renewed", lease=lease.name, error=type(error).__name__)
            is_ours = time.monotonic() - renewed < lease.ttl_seconds
        else:
            told, renewed = progress, asked
    if is_over.is_set():
        return
    log.warning("lease_lost", lease=lease.name, fence=lease.fence)
    limit.reschedule(asyncio.get_running_loop().time())


def _renewed(ttl_seconds: float, fields: Mapping[str, object]) -> Sequence[Mapping[str, object]]:
    """The update that sets `fields`, and the expiry to so many seconds from now."""
    expires_at = {"$add": ["$$NOW", int(ttl_seconds * 1000)]}
    return [{"$set": {**fields, "expires_at": expires_at, "updated_at": "$$NOW"}}]
