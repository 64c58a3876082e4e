"""Seeded stories of one gallery under a fault plan: the real API and the real screening over real stores, in this process.

Two Runtimes stand for two processes, each behind an app of its own. A story is a desk's work of a few minutes in a few hundred
milliseconds; its faults are drawn by the same seed. In the end the faults stop, what is in doubt is asked for again, and the
promises are looked at.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import httpx
from arq import Retry
from pydantic import SecretStr
from pymongo.errors import ConnectionFailure, PyMongoError

from app.access import callers
from app.config import Settings, random_secret
from app.documents import claims
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.domain.callers import Role
from app.errors import DependencyUnavailable
from app.main import create_app
from app.runtime import Runtime, open_runtime
from app.use_cases import galleries, sequence
from app.use_cases.keep_users import UserFields, create_user
from tests.builders import another_process, by_officer
from tests.fakes import FakeEngine
from tests.support.desks import NOT_YET, Desk, broken_log, broken_promises
from tests.support.fault_plans import FaultPlan
from workers import jobs

PASSWORD = "correct horse battery"
DEEDS = 5
#: Fewer enrolments than at a desk of days: a story is short.
KINDS = {
    "enrol": 22,
    "enrol_two": 14,
    "decide": 26,
    "verify": 8,
    "erase": 12,
    "stand": 6,
    "add_sample": 8,
    "identify": 2,
}
TRIES = 4
#: Not the product's: a story has no minute to wait for a dead request's key.
CLAIM_LEASE = timedelta(seconds=0.3)
#: A transaction whose end was lost holds its documents for so long, and half of it again.
TRANSACTION_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """Two processes in one: their Runtimes, and an officer's way to each."""

    runtimes: tuple[Runtime, Runtime]
    doors: tuple[httpx.AsyncClient, httpx.AsyncClient]


@dataclass(slots=True)
class Outcome:
    """What came of one seed. trace: every stretch of work and every fault that it met, in order."""

    seed: int
    broken: list[str]
    faults: Counter[str]
    answered: Counter[str]
    trace: list[str] = field(default_factory=list)


def story_settings(mongo_url: str, redis_url: str, database: str, home: Path) -> Settings:
    """Time limits that suit stories of milliseconds."""
    return Settings(
        mongodb_uri=mongo_url,
        mongodb_database=database,
        mongodb_min_pool_size=0,
        redis_url=redis_url,
        queue_name=database,
        key_encryption_key=SecretStr(random_secret()),
        storage_path=home / "photos",
        vector_db_path=home / "index",
        index_cache_path=home / "index-copies",
        evidence_path=home / "evidence",
        photo_timeout_seconds=0.3,
        queue_timeout_seconds=0.3,
        share_timeout_seconds=0.3,
        boundary_pause_seconds=0.02,
        log_level="error",
        index_shadow_every=0,
    )


@asynccontextmanager
async def stage(settings: Settings) -> AsyncIterator[Stage]:
    """Both processes, open, and an officer logged in at both."""
    async with AsyncExitStack() as opened:
        # Looked up at each request, so that a seed meets the same calls whatever the clock says.
        opened.enter_context(patch.object(callers, "STANDING_SECONDS", 0.0))
        opened.enter_context(patch.object(claims, "CLAIM_LEASE", CLAIM_LEASE))
        one = await opened.enter_async_context(open_runtime(settings, FakeEngine()))
        other = await opened.enter_async_context(another_process(one))
        await one.mongo.admin.command("setParameter", 1, transactionLifetimeLimitSeconds=TRANSACTION_SECONDS)
        fields = UserFields("olga", (Role.OFFICER,), None)
        await create_user(one, by_officer("user.create"), fields, PASSWORD)
        doors = []
        for runtime in (one, other):
            app = create_app(settings)
            app.state.runtime = runtime
            transport = httpx.ASGITransport(app, client=("192.0.2.7", 1))
            doors.append(
                await opened.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://idem.test"))
            )
        form = {"grant_type": "password", "username": "olga", "password": PASSWORD}
        token = (await doors[0].post("/v1/auth/token", data=form)).json()["access_token"]
        for door in doors:
            door.headers["Authorization"] = f"Bearer {token}"
        yield Stage((one, other), (doors[0], doors[1]))


async def play(at: Stage, seed: int) -> Outcome:
    """One story from its first enrolment to its last verdict."""
    plan = FaultPlan(seed)
    name = f"story-{seed}"
    policy = at.runtimes[0].starting_policy().model_copy(update={"quality": "off"})
    gallery = await galleries.create(at.runtimes[0], by_officer("gallery.create"), name, None, policy)
    dice = Random(f"story {seed}")  # noqa: S311 - chance, not secrecy
    desk = Desk(name, dice, _Asking(at, plan), faces=2, deeds=KINDS)
    with plan.at(*(runtime.boundaries for runtime in at.runtimes)):
        for number in range(DEEDS):
            await desk.work()
            if dice.random() < 0.7:
                desk.broken += await _screen(at, gallery, plan, f"screening {number}", both=dice.random() < 0.3)
        if dice.random() < 0.5:
            desk.broken += await _number(at, plan)
    await desk.settle()
    for number in itertools.count():
        if not await _due(gallery) or number > jobs.screening.RESTARTS:
            break
        desk.broken += await _screen(at, gallery, plan, f"last screening {number}", both=False)
    broken = await broken_promises(at.runtimes[0], desk)
    for runtime in at.runtimes:
        runtime.search._copies.pop(gallery.id, None)
    return Outcome(seed, broken, plan.seen, desk.answered, plan.trace)


async def play_all(settings: Settings, seeds: Iterable[int]) -> AsyncIterator[Outcome]:
    """Each of these stories, one after another on one stage."""
    async with stage(settings) as at:
        outcome = None
        for seed in seeds:
            if outcome is not None:
                yield outcome
            outcome = await play(at, seed)
        while await sequence.grow(at.runtimes[0]):
            pass
        await sequence.sign(at.runtimes[0])
        await sequence.deliver(at.runtimes[0])
        if outcome is not None:  # the log is everybody's; what is wrong with it is told of the last
            outcome.broken += await broken_log(at.runtimes[0])
            yield outcome


@dataclass(slots=True)
class _Asking:
    """A caller who tries again at the other door, under the plan's faults while it stands."""

    at: Stage
    plan: FaultPlan
    _count: int = 0

    async def __call__(
        self,
        method: str,
        path: str,
        *,
        key: str,
        **content: Any,  # noqa: ANN401 - httpx's
    ) -> httpx.Response | None:
        """See tests.support.desks.Ask."""
        self._count += 1
        name = f"{self._count} {method} {path.removeprefix('/v1/')}"
        headers = {"Idempotency-Key": key} if key else {}
        for attempt in range(TRIES):
            with self.plan.armed(f"{name} {attempt}"):
                answer = await self.at.doors[attempt % 2].request(method, path, headers=headers, **content)
            if not is_not_yet(answer):
                return answer
            await asyncio.sleep(0.03)
        return None


def is_not_yet(answer: httpx.Response) -> bool:
    """Whether to try again: a part is away, or an earlier try is still being worked on."""
    return answer.status_code in NOT_YET or "idempotency-in-progress" in answer.text


async def _due(gallery: Gallery) -> list[Identity]:
    due = {"gallery_id": gallery.id, "outbox_at": {"$ne": None}, "status": {"$in": ["pending", "active"]}}
    while True:
        try:
            return await Identity.find(due).sort("enrol_seq").to_list()
        except ConnectionFailure:  # the boundary may still rest from the deed before
            await asyncio.sleep(0.03)


async def _number(at: Stage, plan: FaultPlan) -> list[str]:
    """Number events through both processes at once, as when a lease has just changed hands."""

    async def run(runtime: Runtime, who: int) -> None:
        with plan.armed(f"numbering {who}"):
            await sequence.grow(runtime)
            await sequence.sign(runtime)
            await sequence.deliver(runtime)

    ended = await asyncio.gather(*(run(runtime, n) for n, runtime in enumerate(at.runtimes)), return_exceptions=True)
    away = (PyMongoError, DependencyUnavailable, TimeoutError)
    return [f"numbering: {e!r}" for e in ended if e is not None and not isinstance(e, away)]


async def _screen(at: Stage, gallery: Gallery, plan: FaultPlan, stretch: str, *, both: bool) -> list[str]:
    """Run what is due as the workers do, in some stories the same job in two workers at once; what should not come out of it."""
    broken = []
    for number, identity in enumerate(await _due(gallery)):
        for screening in identity.screenings:
            if screening.state not in ("queued", "running"):
                continue

            async def run(runtime: Runtime, who: str, ids: tuple[str, str] = (identity.id, screening.job_id)) -> None:
                with plan.armed(f"{stretch} {number} {who}"):  # noqa: B023 - awaited below, in the same round
                    await jobs.screen(jobs.Context(runtime=runtime), *ids)

            workers = at.runtimes if both else at.runtimes[:1]
            ended = await asyncio.gather(
                *(run(runtime, f"worker {n}") for n, runtime in enumerate(workers)), return_exceptions=True
            )
            broken += [f"screening: {e!r}" for e in ended if e is not None and not isinstance(e, Retry)]
    return broken
