"""A thin coroutine per job. Arguments are ids; every job is safe to run twice."""

import asyncio
import os
import platform
import sys
from typing import TypedDict

import structlog
from arq import Retry
from pymongo.errors import ConnectionFailure, PyMongoError
from redis.exceptions import RedisError

from app.documents.base import new_id, now
from app.documents.galleries import Gallery
from app.documents.leases import Lease
from app.errors import DependencyUnavailable, ModelMismatch, NotReady
from app.leases import LeaseLost, release_of
from app.runtime import Runtime
from app.use_cases import scan as scanning
from app.use_cases import screen as screening
from app.use_cases.erase import erase_expired, settle_overdue
from app.use_cases.galleries import take_effect
from app.use_cases.keep_evidence import keep_evidence
from app.use_cases.publish import due, keep_promises
from app.use_cases.remove_sample import settle_removals
from app.use_cases.renew_lookups import renew_lookups
from app.use_cases.sweep_photos import sweep_photos
from app.use_cases.tend_log import tend
from storage.photos import PhotoStoreUnavailable

log = structlog.get_logger(__name__)

#: Stores that are away are waited for, and a wait does not count as a failed try.
AWAY = (
    ConnectionFailure,
    RedisError,
    PhotoStoreUnavailable,
    NotReady,
    DependencyUnavailable,
    ModelMismatch,  # during a change of model, a worker of the right one will come
    OSError,
    TimeoutError,
)
RETRY_SECONDS = 1
#: How soon a publication that came to nothing is asked for again.
PUBLISH_PERIOD_SECONDS = 15


class Context(TypedDict):
    """What arq hands to each job."""

    runtime: Runtime


async def screen(context: Context, identity_id: str, job_id: str) -> None:
    """Give an identity, or one of its later samples, its verdict."""
    runtime = context["runtime"]
    try:
        await screening.screen(runtime, identity_id, job_id)
    except Exception as error:
        if _is_away(error):
            log.warning("screening_waits", identity=identity_id, job=job_id, error=type(error).__name__)
            raise Retry(defer=RETRY_SECONDS) from error
        log.exception("screening_failed", identity=identity_id, job=job_id)
        reason = type(error).__name__
        if not await screening.note_failure(runtime, identity_id, job_id, reason):
            raise Retry(defer=RETRY_SECONDS) from error


def _is_away(error: Exception) -> bool:
    """Whether a store is away, as against one that answers and refuses: waiting for that would never end."""
    if isinstance(error, PyMongoError) and (error.timeout or error.has_error_label("TransientTransactionError")):
        return True
    return isinstance(error, AWAY)


async def sweep_overdue(context: Context) -> None:
    """Queue screenings that the queue lost."""
    try:
        await screening.sweep_overdue(context["runtime"])
    except (*AWAY, PyMongoError) as error:
        log.warning("sweep_waits", error=type(error).__name__)


async def publish(context: Context, gallery_id: str) -> None:
    """Publish a gallery's next index generation, in a process of its own: neither searches nor jobs wait for it."""
    del context
    holder = f"{platform.node()}:{os.getpid()}:{new_id()}"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "workers.publisher", gallery_id, holder, stdin=asyncio.subprocess.DEVNULL
    )
    try:
        status = await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if status:
        log.error("publication_failed", gallery=gallery_id, status=status)
        gallery = await Gallery.get(gallery_id)
        if gallery is not None:
            await release_of(gallery.publishing, holder)  # a killed one could not


async def sweep_index(context: Context) -> None:
    """Ask for the generations that are due, and clear away the files that should be gone."""
    runtime = context["runtime"]
    try:
        for gallery, reason in await due(runtime):
            if not await Lease.alive(gallery.publishing):
                log.info("publication_due", gallery=gallery.name, reason=reason)
                await runtime.queue.enqueue_publication(
                    gallery.id, again=f":{int(now().timestamp() / PUBLISH_PERIOD_SECONDS)}"
                )
        await keep_promises(runtime)
    except (*AWAY, PyMongoError) as error:
        log.warning("sweep_waits", error=type(error).__name__)


async def scan(context: Context, scan_id: str) -> None:
    """Carry a whole-gallery scan on for a few seconds; asks for the next slice itself."""
    runtime = context["runtime"]
    try:
        await scanning.run(runtime, scan_id)
    except Exception as error:
        if _is_away(error):
            log.warning("scan_waits", scan=scan_id, error=type(error).__name__)
            raise Retry(defer=RETRY_SECONDS) from error
        raise


async def sweep_scans(context: Context) -> None:
    """Queue scans whose worker died, or that the queue lost."""
    try:
        await scanning.sweep(context["runtime"])
    except (*AWAY, PyMongoError) as error:
        log.warning("sweep_waits", error=type(error).__name__)


async def sweep_erasures(context: Context) -> None:
    """Erase people whose retention time is over, and finish earlier erasures that a store could not finish.

    Pending policy changes take effect here, before they erase anybody.
    """
    # A failure in one sweep must not stop the others.
    for sweep in (settle_overdue, settle_removals, take_effect, erase_expired):
        try:
            await sweep(context["runtime"])
        except (*AWAY, PyMongoError) as error:
            log.warning("sweep_waits", error=type(error).__name__)
        except Exception:
            log.exception("sweep_failed", sweep=sweep.__name__)


async def sweep_lookups(context: Context) -> None:
    """Make the hashes that people are found by again, where older rules made them."""
    try:
        await renew_lookups(context["runtime"])
    except (*AWAY, PyMongoError, LeaseLost) as error:
        log.warning("sweep_waits", error=type(error).__name__)


async def sweep_audit_log(context: Context) -> None:
    """Tell of strangers' refusals, and forget the names in old events."""
    try:
        await tend(context["runtime"])
    except (*AWAY, PyMongoError) as error:
        log.warning("sweep_waits", error=type(error).__name__)


async def sweep_evidence(context: Context) -> None:
    """Check a few objects of the evidence store. If one is lost, write all lost objects again."""
    await _keep_evidence(context, whole=False)


async def sweep_all_evidence(context: Context) -> None:
    """Compare the whole evidence store with MongoDB, and write all lost objects again."""
    await _keep_evidence(context, whole=True)


async def _keep_evidence(context: Context, *, whole: bool) -> None:
    try:
        await keep_evidence(context["runtime"], whole=whole)
    except (*AWAY, PyMongoError) as error:
        log.warning("sweep_waits", error=type(error).__name__)


async def sweep_orphan_photos(context: Context) -> None:
    """Delete this store's photos that no document names, and report photos that may not be its own."""
    try:
        await sweep_photos(context["runtime"])
    except (*AWAY, PyMongoError) as error:
        log.warning("sweep_waits", error=type(error).__name__, reason=str(error)[:500])
