"""Operations: is it alive, is it ready, how is it doing."""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated, Any, Literal

import pymongo
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest
from pydantic import BaseModel
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError

from app.api.audit import refresh_figures
from app.api.dependencies import CurrentRuntime, Strangers, acting
from app.api.problems import problems
from app.audit import Action
from app.clock import APART_SECONDS, OFFSET, in_words
from app.documents.base import now
from app.documents.events import AuditEvent
from app.documents.galleries import DEFAULT_GALLERY, Gallery
from app.documents.heartbeats import Heartbeat
from app.documents.identities import Identity
from app.documents.leases import Lease
from app.domain.callers import Role
from app.errors import Forbidden, NotFound, Problem, Unauthenticated, Validation
from app.keys import SealBroken
from app.runtime import Runtime
from app.use_cases import examine
from storage.photos import PhotoStoreUnavailable

router = APIRouter(tags=["operations"])

CHECK_SECONDS = 1.0
#: The most galleries that one check names.
NAMED_AT_MOST = 5
#: Due work starts within a second or two. A sweep finds lost work within fifteen.
OVERDUE_SECONDS = 30.0
NOTHING_IS_ERASED = "Nobody is erased and no checkpoint is signed there until the clocks agree."
NOTHING_IS_ERASED_FOR_A_DAY = "Nothing is erased by time for a day, or until the clock is set to what it was."
FAILED_SCREENINGS = Gauge(
    "idem_screenings_failed",
    "Identities whose screening was given up after five tries: alert on any, they wait for a person",
)
WORKERS = Gauge("idem_workers_alive", "Workers that wrote a heartbeat lately: alert on none, verdicts wait")
WORKER_OFFSET = Gauge(
    "idem_worker_clock_offset_seconds",
    "The worker's clock that is farthest from MongoDB's: alert beyond a minute, it erases nobody then",
)
VERSION = version("idem")

CheckStatus = Literal["ok", "degraded", "down"]
Seen = dict[str, str | int | float | bool | None]


class Health(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class Readiness(BaseModel):
    """Whether requests can be served, and how each part is."""

    status: Literal["ready", "degraded", "not_ready"]
    checks: dict[str, dict[str, Any]]


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> Health:
    """Alive; in constant time, asking nobody."""
    return Health()


async def _model(runtime: Runtime) -> Seen:
    card = runtime.engine.card
    return {"pack": card.pack, "dimension": card.dimension, "liveness": runtime.engine.has_liveness}


async def _mongo(runtime: Runtime) -> Seen:
    with pymongo.timeout(CHECK_SECONDS):
        hello = await runtime.mongo.admin.command("hello")
    if not hello.get("isWritablePrimary"):
        raise NotFound("no primary")
    return {"replica_set": hello.get("setName")}


async def _queue(runtime: Runtime) -> Seen:
    return {"waiting": await runtime.queue.depth()}


async def _photos(runtime: Runtime) -> Seen:
    await runtime.photos.check()
    return {"kind": runtime.settings.photo_store}


async def _index(runtime: Runtime) -> Seen:
    with pymongo.timeout(CHECK_SECONDS):
        gallery = await Gallery.named(DEFAULT_GALLERY)
        if gallery is None:
            raise NotFound("no gallery")
        contract = runtime.engine.card.contract
        others = await Gallery.of_another_model(contract)
        try:
            vectors = await runtime.search.warm(gallery) if gallery.contract == contract else 0
        except SealBroken:  # told below: nobody is found in this gallery, and the others serve
            vectors = runtime.search.size(gallery.id)
        # Any gallery's trouble is told here, whichever of them is asked most.
        troubles = [_of_another_model(others)] if others else []
        troubles += [state.trouble for state in await examine.heads() if state.trouble is not None]
        troubles += [f"{name}: a template does not open" for name in sorted(runtime.search.unreadable)]
        some = await Gallery.find_one({"published": {"$ne": None}})
    if some is not None and not await runtime.search.shares(some):
        troubles.append("the folder of the index is away: nothing can be published")
    published = gallery.published
    seen: Seen = {
        "pack": gallery.pack, "kind": "exact" if published is None else published.kind, "vectors": vectors, "seq": gallery.seq,
        "generation": None if published is None else published.number, "tail": gallery.seq - gallery.watermark,
        "recall": 1.0 if published is None else published.recall,
        "recall_bound": 1.0 if published is None else published.recall_bound,
        "recall_target": gallery.policy.recall_target,
    }  # fmt: skip
    if troubles:
        seen |= {"status": "degraded", "galleries_in_trouble": len(troubles), "reason": troubles[0]}
    return seen


def _of_another_model(galleries: list[Gallery]) -> str:
    names = ", ".join(gallery.name for gallery in galleries[:NAMED_AT_MOST])
    more = len(galleries) - NAMED_AT_MOST
    names += f" and {more} more" if more > 0 else ""
    return f"made by another face model and not served: {names}; `idem models re-embed` moves them to this model"


async def _clock(runtime: Runtime) -> Seen:
    """Whether the clocks of this host and of the workers' hosts are MongoDB's."""
    clock = runtime.clock
    age = clock.measured_seconds_ago
    seen: Seen = {
        "offset_seconds": round(clock.offset_seconds, 3), "measured_seconds_ago": None if age is None else round(age, 1)
    }  # fmt: skip
    differs = None if clock.difference is None else f"{clock.difference} {NOTHING_IS_ERASED}"
    with suppress(PyMongoError), pymongo.timeout(CHECK_SECONDS / 2):
        offsets = [beat.clock_offset_seconds for beat in await Heartbeat.alive()]
        farthest = max(offsets, key=abs, default=0.0)
        seen["worker_offset_seconds"] = round(farthest, 3)
        if differs is None and abs(farthest) > APART_SECONDS:
            differs = f"A worker's clock is {in_words(farthest)} MongoDB's. {NOTHING_IS_ERASED}"
    if differs is None and clock.jump is not None:
        differs = f"{clock.jump} {NOTHING_IS_ERASED_FOR_A_DAY}"
    return seen if differs is None else seen | {"status": "degraded", "reason": differs}


async def _worker(runtime: Runtime) -> Seen:
    """Whether a worker is alive, and for how long due work has waited."""
    with pymongo.timeout(CHECK_SECONDS):
        alive = len(await Heartbeat.alive())
        waiting = {
            "a verdict": await Identity.longest_due(),
            "an event's number": await AuditEvent.longest_unnumbered(),
        }
    overdue = {what: (now() - due).total_seconds() for what, due in waiting.items() if due is not None}
    what = max(overdue, key=overdue.__getitem__, default="")
    seconds = max(0.0, overdue.get(what, 0.0))
    seen: Seen = {"alive": alive, "overdue_seconds": round(seconds, 1)}
    if not alive:
        seen |= {"status": "degraded", "reason": "No worker is alive: verdicts, event numbers and erasures wait."}
    elif seconds > OVERDUE_SECONDS:
        seen |= {"status": "degraded", "reason": f"{what.capitalize()} is overdue by {seconds:.0f} seconds."}
    return seen


async def _checked(look: Callable[[Runtime], Awaitable[Seen]], runtime: Runtime) -> dict[str, Any]:
    """One check under its own time limit; names what failed, never where it lies."""
    started = time.perf_counter()
    status: CheckStatus = "ok"
    seen: Seen
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            seen = await look(runtime)
    except (PyMongoError, RedisError, PhotoStoreUnavailable, Problem, OSError, TimeoutError) as error:
        status, seen = "down", {"error": type(error).__name__}
    return {"status": status, "latency_ms": round((time.perf_counter() - started) * 1000, 1), **seen}


@router.head("/ready", include_in_schema=False, dependencies=[Depends(Strangers("read"))])
@router.get(
    "/ready",
    responses={503: {"model": Readiness, "description": "Not ready"}},
    dependencies=[Depends(Strangers("read"))],
)
async def ready(runtime: CurrentRuntime, response: Response) -> Readiness:
    """200 when model, MongoDB and index serve. Still 200, but degraded: queue, photos or workers fail, or clocks differ."""
    looks = {
        "model": _model, "mongo": _mongo, "queue": _queue, "photos": _photos, "index": _index, "worker": _worker, "clock": _clock,
    }  # fmt: skip
    results = await asyncio.gather(*(_checked(look, runtime) for look in looks.values()))
    checks = dict(zip(looks, results, strict=True))
    for name, state in runtime.boundaries.states().items():
        if name in checks:
            checks[name]["boundary"] = state
    response.headers["Cache-Control"] = "no-store"
    if any(checks[name]["status"] == "down" for name in ("model", "mongo", "index")):
        response.status_code = 503
        return Readiness(status="not_ready", checks=checks)
    whole = all(check["status"] == "ok" for check in checks.values())
    return Readiness(status="ready" if whole else "degraded", checks=checks)


@router.get(
    "/metrics",
    response_class=Response,
    responses=problems(NotFound, http_200={"content": {"text/plain": {}}}),
    dependencies=[Depends(Strangers("read"))],
)
async def metrics(runtime: CurrentRuntime) -> Response:
    """Figures of this process for Prometheus."""
    if not runtime.settings.shows_metrics:
        raise NotFound
    with suppress(PyMongoError), pymongo.timeout(CHECK_SECONDS):
        FAILED_SCREENINGS.set(await Identity.count_failed())
        beats = await Heartbeat.alive()
        WORKERS.set(len(beats))
        WORKER_OFFSET.set(max((beat.clock_offset_seconds for beat in beats), key=abs, default=0.0))
        OFFSET.set(runtime.clock.offset_seconds)
        await refresh_figures(runtime.settings)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


class ModelCardView(BaseModel):
    """What must be known of the model before its scores mean anything."""

    pack: str
    kind: str
    dimension: int
    contract: str
    licence: str
    commercial_use: bool
    source: str
    notes: str
    chosen_because: str
    liveness: bool


class SystemView(BaseModel):
    """The service as its operator sees it."""

    version: str
    environment: str
    model: ModelCardView
    index: list[dict[str, Any]]
    leases: list[dict[str, Any]]
    settings: dict[str, Any]


#: Settings that matter and hold no secret.
SHOWN_SETTINGS = (
    "workers", "photo_store", "mongodb_database", "mongodb_max_pool_size", "mongodb_min_pool_size",
    "mongodb_timeout_seconds", "queue_timeout_seconds", "boundary_failures", "boundary_pause_seconds",
    "photo_timeout_seconds", "worker_max_jobs", "sweep_interval_seconds", "max_photo_bytes",
    "photo_formats", "max_photo_pixels", "max_jpeg_pixels", "max_photo_side", "max_samples",
    "access_token_expire_minutes", "refresh_token_sliding_hours",
    "refresh_token_absolute_hours", "attempts_before_wait", "attempts_wait_seconds", "attempts_before_reset",
    "replay_window_hours", "challenge_seconds", "probe_identities_per_hour", "unknown_names_per_hour",
    "finds_per_identity_per_hour", "non_matches_alarm_per_hour", "idempotency_hours", "index_purge_hours",
    "index_tail_rows", "index_memory_mib", "index_shadow_every", "shutdown_grace_seconds",
)  # fmt: skip


@router.get("/v1/system", responses=problems(Unauthenticated, Forbidden, Validation))
async def system(
    runtime: CurrentRuntime, action: Annotated[Action, Depends(acting("system.read", Role.ADMIN, is_read=True))]
) -> SystemView:
    """Version, model card, index, leases and the settings that matter."""
    card = runtime.engine.card
    return SystemView(
        version=VERSION,
        environment=runtime.settings.environment,
        model=ModelCardView(
            pack=card.pack, kind=card.kind, dimension=card.dimension, contract=card.contract, licence=card.licence,
            commercial_use=card.commercial_use, source=card.source, notes=card.notes,
            chosen_because=runtime.engine_reason, liveness=runtime.engine.has_liveness,
        ),
        index=[
            dataclasses.asdict(state) | {"vectors_in_this_process": runtime.search.size(state.gallery_id)}
            for state in await examine.states(runtime)
            if action.caller is not None and action.caller.may_see(state.gallery_id)
        ],
        leases=[
            {"name": lease.id, "holder": lease.holder, "fence": lease.fence, "progress": lease.progress}
            for lease in await Lease.alive()
        ],
        settings={name: getattr(runtime.settings, name) for name in SHOWN_SETTINGS},
    )  # fmt: skip


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Idem</title>
<style>body{font:16px/1.6 system-ui,sans-serif;max-width:40rem;margin:4rem auto;padding:0 1rem;color:#1b1f24}
a{color:#0b57d0}@media(prefers-color-scheme:dark){body{background:#14171a;color:#e6e9ec}a{color:#8ab4f8}}</style>
<h1>Idem</h1><p>One person, one identity.%s</p>
<ul>%s<li><a href="/ready">Is everything there?</a></li></ul></html>
"""
FRONT_PAGE = PAGE % ("", "")
#: Where the pages of the document are shown.
OPEN_FRONT_PAGE = PAGE % (
    f" Version {VERSION}.",
    """<li><a href="/docs">The API, to try out</a></li><li><a href="/redoc">The API, to read</a></li>
<li><a href="/metrics">Figures</a></li>
""",
)


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def front_page(request: Request) -> HTMLResponse:
    """Where to go from here; in production without what is not shown outside."""
    return HTMLResponse(FRONT_PAGE if request.app.openapi_url is None else OPEN_FRONT_PAGE)
