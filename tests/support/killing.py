"""`kill -9` over API processes, workers, Redis and MongoDB while officers work, and what is true afterwards.

Each desk (`tests.support.desks`) has a gallery of its own. Parts die in an order of chance, and are started again at once, as a
supervisor does; between two kills some deed must have been answered.
"""

import asyncio
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
from pydantic import SecretStr

from app.config import Settings, random_secret
from app.devstack.servers import free_port
from app.documents.events import AuditEvent
from app.documents.identities import Identity
from app.domain.callers import Role
from app.runtime import Runtime, open_runtime
from app.use_cases import galleries, keep_users
from app.use_cases.keep_users import UserFields
from tests.builders import by_officer
from tests.fakes import FakeEngine
from tests.support import services
from tests.support.desks import Desk, broken_log, broken_promises
from tests.support.fault_stories import PASSWORD, is_not_yet
from tests.support.nursery import Nursery

#: What is killed, and how often. Stores take everybody's work away for a second; processes come back sooner.
PARTS = {"api-1": 13, "api-2": 13, "api-3": 13, "worker-1": 12, "worker-2": 12, "redis": 17, "mongod": 20}
SHORTEST_GAP_SECONDS = 0.3
LONGEST_GAP_SECONDS = 10.0
#: A caller who has no answer by then puts the deed aside.
PATIENCE_SECONDS = 8.0
STARTS_WITHIN_SECONDS = 60.0
SETTLES_WITHIN_SECONDS = 120.0
LOGIN_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class KillPlan:
    """One slice: so many kills, in the order that the seed gives."""

    seed: int
    kills: int = 50
    desks: int = 8
    faces: int = 12


@dataclass(slots=True)
class KillReport:
    """What came of a slice. broken: empty is what is hoped for."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    events: int = 0
    doubtful: int = 0
    seconds: float = 0.0
    settled_seconds: float = 0.0
    broken: list[str] = field(default_factory=list)

    @property
    def deeds_per_kill(self) -> float:
        """How much work got through between two kills."""
        return round(self.answered.total() / max(1, self.kills.total()), 1)


async def kill_parts(home: Path, plan: KillPlan) -> KillReport:
    """Run one slice on stores of its own in that folder."""
    for name in ("mongo", "redis", "logs"):
        (home / name).mkdir(parents=True)
    mongo = await asyncio.to_thread(services.mongo_server, home / "mongo")
    try:
        redis = await asyncio.to_thread(services.redis_server, home / "redis")
        try:
            return await _Torture(home, plan, mongo, redis).run()
        finally:
            await asyncio.to_thread(redis.process.close)
    finally:
        await asyncio.to_thread(mongo.process.close)


class _Torture:
    """One slice at work."""

    def __init__(self, home: Path, plan: KillPlan, mongo: services.Server, redis: services.Server) -> None:
        self.home, self.plan, self.mongo, self.redis = home, plan, mongo, redis
        self.report = KillReport(plan.seed)
        self.dice = Random(f"kills {plan.seed}")  # noqa: S311 - chance, not secrecy
        self.ports = {f"api-{n}": free_port() for n in (1, 2, 3)}
        self.settings = Settings(
            mongodb_uri=mongo.url, mongodb_database="torture", mongodb_min_pool_size=0, redis_url=redis.url,
            key_encryption_key=SecretStr(random_secret()), storage_path=home / "photos", vector_db_path=home / "index",
            index_cache_path=home / "index-copies", evidence_path=home / "evidence", sweep_interval_seconds=1,
            log_level="error",
        )  # fmt: skip
        self.http = httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS)
        self.token = ""
        self.logins = 0
        self.desks: list[Desk] = []
        self.nursery: Nursery | None = None
        self.is_over = False
        self.tasks: set[asyncio.Task[None]] = set()
        self.down: set[str] = set()

    async def run(self) -> KillReport:
        began = time.monotonic()
        async with open_runtime(self.settings, FakeEngine()) as runtime:
            await self._furnish(runtime)
        self.nursery = await Nursery.open(self.home / "logs", self._restart)
        listening = asyncio.create_task(self.nursery.listen())
        try:
            await asyncio.gather(*(self._start(name) for name in PARTS if name[-1].isdigit()))
            await self._until_served()
            await self._load()
            settling = time.monotonic()
            await self._settle()
            self.report.settled_seconds = round(time.monotonic() - settling, 1)
        finally:
            self.is_over = True
            await self.nursery.close()
            await listening
            await self.http.aclose()
        for desk in self.desks:
            self.report.answered += desk.answered
        self.report.seconds = round(time.monotonic() - began, 1)
        return self.report

    async def _furnish(self, runtime: Runtime) -> None:
        await keep_users.create_user(
            runtime, by_officer("user.create"), UserFields("olga", (Role.OFFICER,), None), PASSWORD
        )
        policy = runtime.starting_policy().model_copy(update={"quality": "off"})
        for number in range(self.plan.desks):
            name = f"desk-{number}"
            await galleries.create(runtime, by_officer("gallery.create"), name, None, policy)
            dice = Random(f"desk {self.plan.seed} {number}")  # noqa: S311
            self.desks.append(Desk(name, dice, _Calling(self, number), self.plan.faces))

    async def _start(self, name: str) -> None:
        assert self.nursery is not None
        settings = self.settings
        environment = {
            "MONGODB_URI": settings.mongodb_uri,
            "MONGODB_DATABASE": settings.mongodb_database,
            "MONGODB_MIN_POOL_SIZE": "0",
            "REDIS_URL": settings.redis_url,
            "KEY_ENCRYPTION_KEY": settings.key_encryption_secret(),
            "STORAGE_PATH": str(settings.storage_path),
            "VECTOR_DB_PATH": str(settings.vector_db_path),
            "INDEX_CACHE_PATH": str(settings.index_cache_path),
            "EVIDENCE_PATH": str(settings.evidence_path),
            "SWEEP_INTERVAL_SECONDS": str(settings.sweep_interval_seconds),
            "PUBLIC_URL": "http://torture.test",
            "LOG_LEVEL": "warning",
        }
        if name in self.ports:
            environment["API_PORT"] = str(self.ports[name])
        await self.nursery.start(name, ["serve" if name in self.ports else "worker", "--wait", "60"], environment)

    def _restart(self, name: str) -> None:
        """As a supervisor does, whatever it died of: a worker ends when Redis does."""

        async def again() -> None:
            await asyncio.sleep(0.1)
            await self._start(name)

        if not self.is_over:
            self._in_the_background(again())

    def _in_the_background(self, work: Any) -> None:  # noqa: ANN401 - a coroutine
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _until_served(self) -> None:
        async with asyncio.timeout(STARTS_WITHIN_SECONDS), httpx.AsyncClient(trust_env=False) as http:
            for port in self.ports.values():
                while True:
                    with suppress(httpx.HTTPError):
                        if (await http.get(f"http://127.0.0.1:{port}/ready", timeout=2)).is_success:
                            break
                    await asyncio.sleep(0.05)
            while not self.token:
                await self._log_in(http)

    async def _load(self) -> None:
        """All desks at work, and parts that die."""
        stop = asyncio.Event()

        async def at_work(desk: Desk) -> None:
            while not stop.is_set():
                await desk.work()

        async def logging_in() -> None:
            async with httpx.AsyncClient(trust_env=False) as http:
                while not stop.is_set():
                    await asyncio.sleep(LOGIN_SECONDS)
                    await self._log_in(http)

        async with asyncio.TaskGroup() as group:
            for desk in self.desks:
                group.create_task(at_work(desk))
            group.create_task(logging_in())
            first = ["api-1", "worker-1", "redis", "mongod"]  # one of each kind, however short the slice
            self.dice.shuffle(first)
            try:
                while self.report.kills.total() < self.plan.kills:
                    await self._some_work()
                    await self._kill(first.pop() if first else self.dice.choices(list(PARTS), list(PARTS.values()))[0])
            finally:
                stop.set()

    async def _some_work(self) -> None:
        """Until something was answered since the last kill."""
        before, began = self._answered(), time.monotonic()
        await asyncio.sleep(SHORTEST_GAP_SECONDS + self.dice.random() * SHORTEST_GAP_SECONDS)
        while self._answered() == before and time.monotonic() - began < LONGEST_GAP_SECONDS:
            await asyncio.sleep(0.02)

    def _answered(self) -> int:
        return sum(desk.answered.total() for desk in self.desks)

    async def _kill(self, part: str) -> None:
        if part in self.ports or part.startswith("worker"):
            pid = self.nursery.pids.get(part) if self.nursery is not None else None
            if pid is None:  # on its way back from the last one
                return
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.report.kills[part] += 1
            return
        if part in self.down:
            return
        self.down.add(part)
        server = self.mongo if part == "mongod" else self.redis
        await asyncio.to_thread(server.process.kill)
        self.report.kills[part] += 1

        async def back() -> None:
            await asyncio.to_thread(server.process.start)
            self.down.discard(part)

        self._in_the_background(back())

    async def _log_in(self, http: httpx.AsyncClient) -> None:
        form = {"grant_type": "password", "username": "olga", "password": PASSWORD}
        port = self.dice.choice(list(self.ports.values()))
        try:
            answer = await http.post(f"http://127.0.0.1:{port}/v1/auth/token", data=form, timeout=PATIENCE_SECONDS)
        except httpx.HTTPError:
            return
        if answer.is_success:
            self.token = answer.json()["access_token"]
            self.logins += 1
            self.report.answered["login"] += 1

    async def _settle(self) -> None:
        """Everything up again, nothing in doubt, every verdict there; then look."""
        self.report.doubtful = sum(len(desk.doubtful) for desk in self.desks)
        async with asyncio.timeout(SETTLES_WITHIN_SECONDS):
            while self.down:
                await asyncio.sleep(0.05)
            await self._until_served()
            await asyncio.gather(*(desk.settle() for desk in self.desks))
        async with open_runtime(self.settings, FakeEngine()) as runtime:
            due = {"outbox_at": {"$ne": None}, "status": {"$in": ["pending", "active"]}}
            deadline = time.monotonic() + SETTLES_WITHIN_SECONDS
            while (waiting := await Identity.find(due).count()) and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
            if waiting:
                self.report.broken.append(f"{waiting} wait for their verdict")
            for desk in self.desks:
                self.report.broken += [f"{desk.gallery}: {what}" for what in await broken_promises(runtime, desk)]
            while (unnumbered := await AuditEvent.unnumbered(1)) and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
            if unnumbered:
                self.report.broken.append("events wait for their numbers")
            self.report.broken += await broken_log(runtime)
            self.report.events = await AuditEvent.count()
            logins = await AuditEvent.find({"action": "auth.login", "outcome": "success"}).count()
            if logins < self.logins:
                self.report.broken.append(f"{self.logins} logins were answered, and {logins} have an event")


@dataclass(slots=True)
class _Calling:
    """A caller who tries again, at the next door each time, until the patience is over."""

    torture: _Torture
    number: int

    async def __call__(
        self,
        method: str,
        path: str,
        *,
        key: str,
        **content: Any,  # noqa: ANN401 - httpx's
    ) -> httpx.Response | None:
        """See tests.support.desks.Ask."""
        headers = {"Authorization": f"Bearer {self.torture.token}"} | ({"Idempotency-Key": key} if key else {})
        deadline = time.monotonic() + PATIENCE_SECONDS
        ports = list(self.torture.ports.values())
        while time.monotonic() < deadline:
            self.number += 1
            url = f"http://127.0.0.1:{ports[self.number % len(ports)]}{path}"
            try:
                answer = await self.torture.http.request(method, url, headers=headers, **content)
            except httpx.HTTPError:
                await asyncio.sleep(0.05)
                continue
            if not is_not_yet(answer):
                return answer
            await asyncio.sleep(0.1)
        return None
