"""Hosts with a wrong clock, and a MongoDB with a right one. No one is erased too soon, and all requests are answered."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from arq import cron
from fastapi import FastAPI
from pydantic import SecretStr

from app.api import operations
from app.clock import Clock, steady_seconds
from app.config import Settings, random_secret
from app.devstack.servers import free_port
from app.documents.base import new_id, now
from app.documents.events import AuditEvent
from app.documents.failed_logins import FailedLogins, Waits
from app.documents.galleries import Gallery
from app.documents.heartbeats import ALIVE_FOR, Heartbeat
from app.documents.identities import Identity
from app.documents.leases import Lease
from app.documents.tree import AuditTree, TreeHead
from app.domain.callers import Role
from app.leases import Held
from app.queue import decode_job, encode_job, redis_settings
from app.runtime import Runtime, open_runtime
from app.use_cases import keep_users, tend_log
from app.use_cases.keep_users import UserFields
from tests.builders import active, by_officer, default_gallery, enrolled, known, portrait
from tests.fakes import FakeEngine
from tests.support import services, skew
from tests.support.fault_stories import PASSWORD
from tests.support.nursery import Nursery
from workers import jobs
from workers.steady import SteadyWorker

DAY = 86_400.0
SetClock = Callable[[float], None]
WRONG = [40 * DAY, -3 * DAY, 600.0]
#: A verdict takes about 0.3 s. A busy machine may need ten times as long. Earlier, it took as long as the worker was behind.
VERDICT_SECONDS = 5.0
STARTS_WITHIN_SECONDS = 60.0
#: Checks that are measured every few seconds have changed by then.
SEEN_WITHIN_SECONDS = 15.0

# arq closes its connections with a method that redis deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated close:DeprecationWarning")


# ---- actions that cannot be undone ----


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[SetClock]:
    """Sets this host's clock a number of seconds ahead of the true time."""
    real = time.time
    with monkeypatch.context() as patched:
        yield lambda seconds: patched.setattr(time, "time", lambda: real() + seconds)


async def _enrolled_days_ago(identity: Identity, days: float) -> None:
    moment = now() - timedelta(days=days)
    await Identity.get_pymongo_collection().update_one({"_id": identity.id}, {"$set": {"created_at": moment}})


async def _keeps_thirty_days() -> None:
    await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.retention_days": 30}})


@pytest.mark.parametrize("wrong", [*WRONG, -600.0])
async def test_a_host_whose_clock_is_wrong_erases_nobody(runtime: Runtime, host: SetClock, wrong: float) -> None:
    young, due = await active(runtime, "young"), await active(runtime, "due")
    await _keeps_thirty_days()
    await _enrolled_days_ago(due, 31)
    host(wrong)
    await jobs.sweep_erasures({"runtime": runtime})
    assert [(await known(one)).status for one in (young, due)] == ["active", "active"]
    host(0)
    await jobs.sweep_erasures({"runtime": runtime})
    assert [await Identity.living(one.id) is None for one in (young, due)] == [False, True]


async def test_nobody_is_erased_after_all_clocks_were_set_together(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    due = await active(runtime, "due")
    await _keeps_thirty_days()
    await _enrolled_days_ago(due, 31)
    # As if MongoDB and this host had been 40 days behind until now.
    monkeypatch.setattr(runtime.clock, "_base", runtime.clock.time() - 40 * DAY - steady_seconds())
    await jobs.sweep_erasures({"runtime": runtime})
    assert (await known(due)).status == "active"
    assert runtime.clock.agrees
    seen = await operations._clock(runtime)
    assert seen["status"] == "degraded"
    assert seen["reason"].startswith("MongoDB's clock was set ahead by 40 days")


async def test_mongodb_decides_whether_the_retention_time_is_over(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    young = await active(runtime, "young")
    await _keeps_thirty_days()
    ahead = now() + timedelta(days=40)
    monkeypatch.setattr("app.use_cases.erase.now", lambda: ahead)  # this process believes a wrong time
    await jobs.sweep_erasures({"runtime": runtime})
    assert (await known(young)).status == "active"


@pytest.mark.parametrize("wrong", [400 * DAY, -3 * DAY])
async def test_a_host_whose_clock_is_wrong_forgets_no_names(runtime: Runtime, host: SetClock, wrong: float) -> None:
    await active(runtime, "ann")
    host(wrong)
    assert await tend_log.forget_old_names(runtime) == 0
    assert (await AuditTree.current()).forgotten_until is None
    host(0)
    await tend_log.forget_old_names(runtime)
    assert await AuditEvent.find({"personal": None, "actor.kind": "user"}).count() == 0


async def test_names_are_forgotten_again_after_a_clock_that_was_ahead(runtime: Runtime) -> None:
    await active(runtime, "ann")
    events, tree = AuditEvent.get_pymongo_collection(), AuditTree.get_pymongo_collection()
    await events.update_many({}, {"$set": {"time": now() - timedelta(days=400)}})
    await tree.update_one({}, {"$set": {"forgotten_until": now() + timedelta(days=40)}})
    assert await tend_log.forget_old_names(runtime) > 0
    assert ((await AuditTree.current()).forgotten_until or now()) < now() - timedelta(days=300)


@pytest.mark.parametrize("wrong", WRONG[:2])
async def test_a_host_whose_clock_is_wrong_deletes_no_photos(runtime: Runtime, host: SetClock, wrong: float) -> None:
    ann = await enrolled(runtime, "ann")
    fresh = f"{ann.gallery_id}/{ann.id}/{new_id()}"
    await runtime.photos.put(fresh, b"its document is about to be committed")
    host(wrong)
    await jobs.sweep_orphan_photos({"runtime": runtime})
    assert await runtime.photos.get(fresh)


@pytest.mark.parametrize("wrong", WRONG)
async def test_stored_times_are_mongodbs_even_if_the_hosts_clock_is_wrong(
    runtime: Runtime, host: SetClock, wrong: float
) -> None:
    true = time.time()
    host(wrong)
    ann = await enrolled(runtime, "ann")
    event = await AuditEvent.find_one({"action": "identity.enrol"})
    assert event is not None
    for moment in (ann.created_at, event.time):
        assert abs(moment.timestamp() - true) < 30


async def test_times_stored_by_a_clock_that_was_ahead_block_nothing(runtime: Runtime) -> None:
    ahead = now() + timedelta(days=40)
    held = await Held.acquire("publish:x", "a holder that has died", 30)
    assert held is not None
    await Lease.get_pymongo_collection().update_one({}, {"$set": {"updated_at": ahead, "expires_at": ahead}})
    taken = await Held.acquire("publish:x", "another", 30)
    assert taken is not None
    assert taken.fence == held.fence + 1
    assert await Held.acquire("publish:x", "a third", 30) is None
    for _ in range(2):
        await FailedLogins.note_failure("ann", Waits(1, 30, 900, 3600))
    assert 0 < (await FailedLogins.remembered(["ann"]))["ann"].left_seconds <= 60
    await FailedLogins.get_pymongo_collection().update_one({}, {"$set": {"wait_until": ahead}})
    assert (await FailedLogins.remembered(["ann"]))["ann"].left_seconds == 0
    ann = await enrolled(runtime, "ann")
    await Identity.get_pymongo_collection().update_one({"_id": ann.id}, {"$set": {"outbox_at": ahead}})
    assert [identity.id for identity in await Identity.overdue(now(), 10)] == [ann.id]


# ---- sweeps and heartbeats ----


@pytest.fixture
async def steady(settings: Settings, redis_server: services.Server, database_name: str) -> AsyncIterator[SteadyWorker]:
    """A worker with one sweep, every five seconds. The test runs its steps."""

    async def sweep(context: dict[str, Any]) -> None:
        del context

    given = settings.model_copy(update={"redis_url": redis_server.url})
    worker = SteadyWorker(
        functions=[], cron_jobs=[cron(sweep, name="sweep", second=set(range(0, 60, 5)), run_at_startup=True)],
        queue_name=database_name, redis_settings=redis_settings(given), job_serializer=encode_job,
        job_deserializer=decode_job, handle_signals=False, burst=True, poll_delay=0.02,
    )  # fmt: skip
    await worker.async_run()
    yield worker
    await worker.close()


async def test_sweeps_neither_stop_nor_pile_up_when_the_clock_is_set(steady: SteadyWorker) -> None:
    async def queued(moment: datetime) -> int:
        await steady.pool.delete(steady.queue_name)
        for _ in range(20):
            await steady.run_cron(moment, 0.5)
        return int(await steady.pool.zcard(steady.queue_name))

    start = now()
    await queued(start + timedelta(seconds=5))
    assert await queued(start + timedelta(seconds=10)) == 1
    assert await queued(start + timedelta(days=40)) == 1, "one sweep, and not one for each five seconds of forty days"
    assert await queued(start + timedelta(seconds=20)) == 0, "the clock was set back: the sweep is not due yet"
    assert await queued(start + timedelta(seconds=26)) == 1


async def test_only_one_of_two_workers_carries_out_a_sweep(steady: SteadyWorker) -> None:
    await steady.pool.delete(steady.queue_name)
    due = now() + timedelta(seconds=5)
    job = steady.cron_jobs[0]
    for _ in range(2):
        job.next_run = due
        await steady.run_cron(due, 0.5)
        assert await steady.pool.zcard(steady.queue_name) == 1
        await steady.pool.delete(steady.queue_name)
        await steady.pool.zadd(steady.queue_name, {"kept": 1})


async def test_workers_of_two_stores_carry_out_their_own_sweeps(steady: SteadyWorker) -> None:
    due = now() + timedelta(seconds=5)
    for queue in (f"{steady.queue_name}:one", f"{steady.queue_name}:two"):
        steady.serve(queue)
        steady.cron_jobs[0].next_run = due
        await steady.run_cron(due, 0.5)
        assert await steady.pool.zcard(queue) == 1


async def test_a_worker_that_no_longer_looks_at_its_queue_has_no_heartbeat(
    runtime: Runtime, steady: SteadyWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.steady.BEAT_SECONDS", 0.05)
    monkeypatch.setattr("workers.steady.LOOKS_WITHIN_SECONDS", 0.5)

    async def beaten() -> object:
        await asyncio.sleep(0.2)
        row = await Heartbeat.get_pymongo_collection().find_one({"_id": steady.name})
        return None if row is None else row["beat_at"]

    async with steady.beating(runtime.clock):
        first = await beaten()
        await steady.heart_beat()
        assert first != await beaten()
        await asyncio.sleep(0.6)
        last = await beaten()
        assert last == await beaten(), "the process runs, but does not look at its queue"
    assert await Heartbeat.count() == 0


@pytest.fixture
async def doors(runtime: Runtime) -> AsyncIterator[httpx.AsyncClient]:
    """/ready and /metrics of one process."""
    app = FastAPI()
    app.state.runtime = runtime
    app.include_router(operations.router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
        yield http


async def _checks(doors: httpx.AsyncClient) -> dict[str, Any]:
    answer = await doors.get("/ready")
    assert answer.status_code == httpx.codes.OK, "degraded, never 503"
    checks: dict[str, Any] = answer.json()["checks"]
    return checks


async def test_r9_ready_says_whether_a_worker_lives(runtime: Runtime, doors: httpx.AsyncClient) -> None:
    worker = (await _checks(doors))["worker"]
    assert (worker["status"], worker["alive"]) == ("degraded", 0)
    await Heartbeat.beat("one", 0.0)
    await Heartbeat.beat("two", 0.0)
    worker = (await _checks(doors))["worker"]
    assert (worker["status"], worker["alive"], worker["overdue_seconds"]) == ("ok", 2, 0)
    await Heartbeat.get_pymongo_collection().update_many(
        {}, {"$set": {"beat_at": now() - ALIVE_FOR - timedelta(seconds=1)}}
    )
    assert (await _checks(doors))["worker"]["status"] == "degraded"


@pytest.mark.parametrize("swept", [False, True], ids=["no sweeps", "only the sweeps run"])
async def test_r9_ready_says_when_a_verdict_is_overdue(runtime: Runtime, doors: httpx.AsyncClient, swept: bool) -> None:
    await Heartbeat.beat("hung", 0.0)
    ann = await enrolled(runtime, "ann")
    assert (await _checks(doors))["worker"]["status"] == "ok"
    long_ago = now() - timedelta(seconds=40)
    due = {"screenings.0.due_at": long_ago, "outbox_at": now() + timedelta(seconds=5) if swept else long_ago}
    await Identity.get_pymongo_collection().update_one({"_id": ann.id}, {"$set": due})
    worker = (await _checks(doors))["worker"]
    assert worker["status"] == "degraded"
    assert 39 < worker["overdue_seconds"] < 60
    assert worker["reason"].startswith("A verdict is overdue by ")


async def test_r9_ready_says_when_numbers_are_overdue(runtime: Runtime, doors: httpx.AsyncClient) -> None:
    await Heartbeat.beat("hung", 0.0)
    await active(runtime, "ann")
    await AuditEvent.get_pymongo_collection().update_many({}, {"$set": {"time": now() - timedelta(seconds=50)}})
    worker = (await _checks(doors))["worker"]
    assert (worker["status"], worker["reason"].startswith("An event's number is overdue")) == ("degraded", True)


@pytest.mark.parametrize("wrong", WRONG)
async def test_ready_says_how_far_the_hosts_clock_is_off(
    runtime: Runtime, doors: httpx.AsyncClient, host: SetClock, wrong: float
) -> None:
    assert (await _checks(doors))["clock"]["status"] == "ok"
    host(wrong)
    clock = (await _checks(doors))["clock"]
    assert clock["status"] == "degraded"
    assert clock["offset_seconds"] == pytest.approx(wrong, abs=5)
    assert "The host's clock is" in clock["reason"]
    figures = (await doors.get("/metrics")).text
    (told,) = [line for line in figures.splitlines() if line.startswith("idem_clock_offset_seconds ")]
    assert float(told.split()[1]) == pytest.approx(wrong, abs=5)
    host(0)
    assert (await _checks(doors))["clock"]["status"] == "ok"


async def test_ready_says_how_far_a_workers_clock_is_off(runtime: Runtime, doors: httpx.AsyncClient) -> None:
    await Heartbeat.beat("right", 0.2)
    await Heartbeat.beat("wrong", 40 * DAY)
    clock = (await _checks(doors))["clock"]
    assert (clock["status"], clock["worker_offset_seconds"]) == ("degraded", 40 * DAY)
    assert clock["reason"].startswith("A worker's clock is 40 days, 0:00:00 ahead of MongoDB's.")


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A host with a time zone, like a developer's."""
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


async def test_the_time_is_that_of_a_real_mongod_in_any_time_zone(runtime: Runtime, in_tokyo: None) -> None:
    clock = Clock(lambda: 0.0)  # a host whose clock says 1970
    await clock.measure(runtime.mongo)
    assert abs(clock.time() - time.time()) < 2
    assert not clock.agrees


# ---- processes whose clocks are set while they run ----


@dataclass(slots=True)
class Hosts:
    """Two API processes and a worker, each with its own clock."""

    clocks: dict[str, skew.Skew]
    ports: dict[str, int]
    http: httpx.AsyncClient
    nursery: Nursery
    settings: Settings
    tokens: list[str] = field(default_factory=list)
    people: int = 0

    async def get(self, api: str, path: str, token: str = "") -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return await self.http.get(f"http://127.0.0.1:{self.ports[api]}{path}", headers=headers)

    async def log_in(self, api: str) -> str:
        form = {"grant_type": "password", "username": "olga", "password": PASSWORD}
        answer = await self.http.post(f"http://127.0.0.1:{self.ports[api]}/v1/auth/token", data=form)
        assert answer.is_success, answer.text
        token: str = answer.json()["access_token"]
        return token

    async def enrol(self, api: str, token: str) -> float:
        """Enrol a new person. Returns how many seconds the verdict took."""
        self.people += 1
        began = time.monotonic()
        answer = await self.http.post(
            f"http://127.0.0.1:{self.ports[api]}/v1/identities", params={"wait": 25},
            headers={"Authorization": f"Bearer {token}"},
            files={"photo": ("photo.png", portrait(f"person-{self.people}"), "image/png")},
        )  # fmt: skip
        assert answer.status_code == httpx.codes.CREATED, answer.text
        return time.monotonic() - began

    async def until(self, api: str, check: str, status: str) -> dict[str, Any]:
        """Wait until a check of /ready has this status. Returns the check."""
        seen: dict[str, Any] = {}
        async with asyncio.timeout(SEEN_WITHIN_SECONDS):
            while seen.get("status") != status:
                with suppress(httpx.HTTPError):
                    seen = (await self.get(api, "/ready")).json()["checks"][check]
                await asyncio.sleep(0.1)
        return seen

    def set(self, seconds: float, *names: str) -> None:
        for name in names or self.clocks:
            self.clocks[name].set(seconds)


@pytest.fixture(scope="module")
async def hosts(
    mongo_server: services.Server, redis_server: services.Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Hosts]:
    home = tmp_path_factory.mktemp("clocks")
    database = home.name
    settings = Settings(
        mongodb_uri=mongo_server.url, mongodb_database=database, mongodb_min_pool_size=0, redis_url=redis_server.url,
        queue_name=database, key_encryption_key=SecretStr(random_secret()), storage_path=home / "photos",
        vector_db_path=home / "index", index_cache_path=home / "index-copies", evidence_path=home / "evidence",
    )  # fmt: skip
    async with open_runtime(settings, FakeEngine()) as runtime:
        olga = UserFields("olga", (Role.OFFICER, Role.AUDITOR), None)
        await keep_users.create_user(runtime, by_officer("user.create"), olga, PASSWORD)
        await (await default_gallery()).get_pymongo_collection().update_one({}, {"$set": {"policy.quality": "off"}})
    names = ("api-1", "api-2", "worker")
    clocks = {name: skew.Skew(home / f"{name}.clock") for name in names}
    ports = {name: free_port() for name in names[:2]}
    nursery = await Nursery.open(home, lambda _: None, skew.preloaded(home))
    listening = asyncio.create_task(nursery.listen())
    for name in names:
        environment = {
            "MONGODB_URI": settings.mongodb_uri, "MONGODB_DATABASE": database, "MONGODB_MIN_POOL_SIZE": "0",
            "REDIS_URL": settings.redis_url, "QUEUE_NAME": database, "STORAGE_PATH": str(settings.storage_path),
            "KEY_ENCRYPTION_KEY": settings.key_encryption_secret(), "VECTOR_DB_PATH": str(settings.vector_db_path),
            "INDEX_CACHE_PATH": str(settings.index_cache_path), "EVIDENCE_PATH": str(settings.evidence_path),
            "PUBLIC_URL": "http://clocks.test", "LOG_LEVEL": "warning", skew.VARIABLE: str(clocks[name].path),
        }  # fmt: skip
        if name in ports:
            environment["API_PORT"] = str(ports[name])
        await nursery.start(name, ["serve" if name in ports else "worker", "--wait", "60"], environment)
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        made = Hosts(clocks, ports, http, nursery, settings)
        async with asyncio.timeout(STARTS_WITHIN_SECONDS):
            for api in ports:
                while True:
                    with suppress(httpx.HTTPError):
                        if (await made.get(api, "/ready")).json()["status"] == "ready":
                            break
                    await asyncio.sleep(0.1)
        await made.enrol("api-1", await made.log_in("api-1"))
        yield made
    await nursery.close()
    await listening


@pytest.mark.parametrize("behind", [20.0, 90.0])
async def test_r10_a_verdict_does_not_wait_for_a_worker_whose_clock_is_behind(hosts: Hosts, behind: float) -> None:
    token = await hosts.log_in("api-1")
    hosts.set(-behind, "worker")
    assert await hosts.enrol("api-1", token) < VERDICT_SECONDS
    if behind > 60:
        seen = await hosts.until("api-2", "clock", "degraded")
        assert seen["worker_offset_seconds"] == pytest.approx(-behind, abs=5)
    hosts.set(0)
    assert await hosts.enrol("api-1", token) < VERDICT_SECONDS
    await hosts.until("api-2", "clock", "ok")


@pytest.mark.parametrize("wrong", WRONG[:2])
async def test_hosts_whose_clocks_differ_accept_each_others_tokens(hosts: Hosts, wrong: float) -> None:
    before = await hosts.log_in("api-1")
    hosts.set(wrong, "api-1")
    tokens = [before, await hosts.log_in("api-1"), await hosts.log_in("api-2")]
    for api in hosts.ports:
        for token in tokens:
            assert (await hosts.get(api, "/v1/identities", token)).status_code == httpx.codes.OK
    assert await hosts.enrol("api-1", tokens[2]) < VERDICT_SECONDS
    seen = await hosts.until("api-1", "clock", "degraded")
    assert seen["offset_seconds"] == pytest.approx(wrong, abs=5)
    assert (await hosts.get("api-2", "/ready")).json()["checks"]["clock"]["status"] == "ok"
    hosts.set(0)
    for token in tokens:
        assert (await hosts.get("api-1", "/v1/identities", token)).status_code == httpx.codes.OK
    await hosts.until("api-1", "clock", "ok")


@pytest.mark.parametrize("wrong", WRONG[:2])
async def test_while_every_hosts_clock_is_wrong_no_head_is_signed_and_afterwards_none_is_dated_ahead(
    hosts: Hosts, wrong: float
) -> None:
    token = await hosts.log_in("api-1")
    hosts.set(wrong)
    await asyncio.sleep(1)  # a head may be in progress
    async with open_runtime(hosts.settings, FakeEngine()):
        signed = await TreeHead.count()
        assert await hosts.enrol("api-2", token) < VERDICT_SECONDS
        await asyncio.sleep(2)
        assert await TreeHead.count() == signed
        assert await AuditEvent.unnumbered(1) == [], "events are numbered in spite of the clocks"
        checkpoint = await hosts.get("api-1", "/v1/audit/checkpoint", token)
        assert checkpoint.is_success, "the answer is the newest head that exists"
        hosts.set(0)
        async with asyncio.timeout(SEEN_WITHIN_SECONDS):
            while (tree := await AuditTree.current()).signed_size != tree.size:
                await asyncio.sleep(0.1)
        times = [head.time for head in await TreeHead.find_all().sort("size").to_list()]
        assert times == sorted(times)
        assert times[-1] <= now()
    assert await hosts.enrol("api-2", token) < VERDICT_SECONDS
    await hosts.until("api-1", "worker", "ok")
    await hosts.until("api-1", "clock", "ok")


def test_without_a_compiler_pythons_own_clock_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import arq.connections
    import arq.utils
    import arq.worker

    clock = skew.Skew(tmp_path / "clock")
    true = time.time()
    for module, name in ((time, "time"), (arq.utils, "time"), (arq.worker, "time"), (arq.worker, "datetime")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    skew._move_pythons(str(clock.path))
    clock.set(40 * DAY)
    assert time.time() - true == pytest.approx(40 * DAY, abs=5)
    assert arq.connections.timestamp_ms() / 1000 - true == pytest.approx(40 * DAY, abs=5)
    assert arq.worker.datetime.now().timestamp() - true == pytest.approx(40 * DAY, abs=5)
