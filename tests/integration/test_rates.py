"""Rates over HTTP and across processes, with a real Redis: shared, away, frozen, back again."""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from redis.asyncio import Redis

from app.api.bodies import admission_of
from app.api.dependencies import Acting, Admission
from app.config import RateClass, Settings
from app.documents.events import AuditEvent
from app.keys import KeyRing
from app.limits import RateLimits
from app.main import create_app
from app.runtime import Runtime
from tests.support import services
from tests.support.accounts import ADMIN, PASSWORD, AccountService, bearer

#: What asks nobody who they are, and is not counted: it costs nothing.
UNCOUNTED = {"/", "/health"}
#: How long Redis is waited for where it does not answer, and then left alone.
FREEZE_SECONDS, PAUSE_SECONDS = 0.5, 2.0
#: More than this and something waits that should not: the package's two questions take half a millisecond.
MOST_MILLISECONDS = 5.0


def _keys() -> KeyRing:
    keys = KeyRing("a key-encryption key of a test, long enough")
    keys.adopt_root(bytes(32))
    return keys


@asynccontextmanager
async def _processes(url: str, number: int = 1, **rates: object) -> AsyncIterator[list[RateLimits]]:
    patient = {"redis_url": url, "queue_timeout_seconds": 5}
    settings = Settings(_env_file=None).model_copy(update=patient | rates)
    opened = [RateLimits(settings, _keys()) for _ in range(number)]
    try:
        yield opened
    finally:
        for one in opened:
            await one.close()


async def test_all_processes_count_together(redis_server: services.Server) -> None:
    async with _processes(redis_server.url, 3, rate_login="10/hour", rate_read="10/hour") as processes:
        kinds: tuple[RateClass, ...] = ("login", "read")
        for kind in kinds:
            spent = await asyncio.gather(*(one.spend(kind, "together") for one in processes for _ in range(10)))
            assert sum(one.is_granted for one in spent) == 10
            refused = await processes[0].spend(kind, "together")
            assert (refused.is_granted, refused.remaining, refused.limit) == (False, 0, 10)
            assert 1 <= refused.reset_seconds <= 3600


async def test_what_stands_in_redis_names_nobody_and_goes_by_itself(redis_server: services.Server) -> None:
    async with _processes(redis_server.url) as (limits,):
        await limits.spend("read", "address:192.0.2.77")
    async with Redis.from_url(redis_server.url, decode_responses=True) as redis:
        names = await redis.keys("idem:rates*")
        lives = [await redis.ttl(name) for name in names]
    assert names
    assert "192.0.2" not in str(names)
    assert all(0 < life <= 7200 for life in lives)


async def test_counting_is_quick(redis_server: services.Server) -> None:
    async with _processes(redis_server.url) as (limits,):
        await limits.spend("read", "warm")
        took = []
        for _ in range(300):
            began = time.perf_counter()
            await limits.spend("read", "quick")
            took.append((time.perf_counter() - began) * 1000)
    assert statistics.median(took) < MOST_MILLISECONDS


async def test_a_frozen_redis_keeps_one_request_for_a_moment_and_the_others_not_at_all(tmp_path: Path) -> None:
    server = services.redis_server(tmp_path)
    try:
        async with _processes(
            server.url, rate_read="3/hour", queue_timeout_seconds=FREEZE_SECONDS, boundary_pause_seconds=PAUSE_SECONDS
        ) as (limits,):
            assert (await limits.spend("read", "ann")).is_granted
            with server.process.frozen():
                began = time.monotonic()
                assert (await limits.spend("read", "ann")).is_granted
                assert time.monotonic() - began < FREEZE_SECONDS + 1
                began = time.monotonic()
                alone = [await limits.spend("read", "ann") for _ in range(3)]
                assert time.monotonic() - began < FREEZE_SECONDS
                assert [one.is_granted for one in alone] == [True, True, False], (
                    "the process counts by itself meanwhile"
                )
            await asyncio.sleep(PAUSE_SECONDS + 0.1)
            # What Redis had counted still counts; also what was asked of it while it was frozen.
            assert (await limits.spend("read", "ann")).remaining < 2
    finally:
        server.process.close()


@pytest.fixture
def settings(settings: Settings, redis_server: services.Server) -> Settings:
    """As everywhere, with a Redis and low rates."""
    return settings.model_copy(
        update={
            "redis_url": redis_server.url,
            "queue_timeout_seconds": 5,
            "rate_login": "20/hour",
            "rate_face": "3/hour",
            "rate_write": "4/hour",
            "rate_read": "6/hour",
            "login_failures_before_wait": 100,
            "login_failures_before_wait_address": 1000,
        }
    )


def _limited(answer: httpx.Response) -> bool:
    if answer.status_code != 429:
        return False
    page = answer.json()
    assert page["type"].endswith("rate-limited")
    assert answer.headers["ratelimit-remaining"] == "0"
    assert answer.headers["retry-after"] == answer.headers["ratelimit-reset"] != "0"
    return True


async def test_h56_logins_from_one_address_have_a_rate_whoever_is_tried(service: AccountService) -> None:
    answers = [await service.try_password(f"nobody {number}") for number in range(21)]
    assert [_limited(one) for one in answers] == [False] * 20 + [True]
    assert answers[0].headers["ratelimit-limit"] == "20"
    assert answers[0].headers["ratelimit-remaining"] == "19"
    async with service.at("198.51.100.20") as elsewhere:
        assert (await elsewhere.try_password(ADMIN, PASSWORD)).status_code == 200


async def test_a_known_caller_is_counted_by_who_they_are_from_wherever(service: AccountService) -> None:
    tokens_of_ann, tokens_of_bob = [await _logged_in(service, name) for name in ("ann", "bob")]
    for number in range(6):
        async with service.at(f"198.51.100.{number}") as elsewhere:
            assert (await elsewhere.http.get("/v1/auth/me", headers=bearer(tokens_of_ann))).status_code == 200
    assert _limited(await service.http.get("/v1/auth/me", headers=bearer(tokens_of_ann)))
    assert not _limited(await service.http.get("/v1/auth/me", headers=bearer(tokens_of_bob)))


async def _logged_in(service: AccountService, name: str) -> str:
    await service.user(name)
    return (await service.log_in(name)).access


async def test_h105_guesses_are_counted_by_address_and_no_forged_header_dodges_it(service: AccountService) -> None:
    answers = [
        await service.http.get(
            "/v1/auth/me", headers={"X-Forwarded-For": f"10.0.0.{number}", "X-Real-IP": f"10.0.0.{number}"}
        )
        for number in range(7)
    ]
    assert [one.status_code for one in answers] == [401] * 6 + [429]
    honest = await _logged_in(service, "carla")
    assert (await service.http.get("/v1/auth/me", headers=bearer(honest))).status_code == 200, "behind the same address"


async def test_a_caller_over_the_rate_becomes_one_event_not_many(service: AccountService) -> None:
    token = (await service.log_in()).access
    body = {"name": "kiosk", "galleries": None}
    answers = [await service.http.post("/v1/clients", json=body, headers=bearer(token)) for _ in range(9)]
    assert [one.status_code for one in answers] == [201] * 4 + [429] * 5
    events = await AuditEvent.find({"action": "client.create", "outcome": "failure"}).to_list()
    assert [one.detail["problem"] for one in events] == ["rate-limited"]


# Every door.


def _app(runtime: Runtime) -> FastAPI:
    app = create_app(runtime.settings)
    app.state.runtime = runtime
    return app


@dataclass(frozen=True, slots=True)
class Entrance:
    """One method of one route, at its whole path."""

    method: str
    path: str
    route: APIRoute

    @property
    def admission(self) -> Admission | None:
        """Whom it lets in."""
        return admission_of(self.route)


def _doors(app: FastAPI) -> list[Entrance]:
    found = [
        Entrance(method, context.path, context.original_route)
        for context in iter_route_contexts(app.routes)
        if isinstance(context.original_route, APIRoute) and context.path is not None
        for method in sorted(context.methods or ())
    ]
    assert len(found) > 60
    return found


def _without_pages() -> FastAPI:
    return create_app(Settings(_env_file=None, docs_enabled=False))


def test_every_route_counts_who_comes_in() -> None:
    uncounted = {door.path for door in _doors(_without_pages()) if door.admission is None}
    assert uncounted == UNCOUNTED


def test_whatever_takes_a_photo_counts_as_looking_at_faces_and_passwords_as_logins() -> None:
    takes_photos, is_face, is_login = set[str](), set[str](), set[str]()
    for door in _doors(_without_pages()):
        admission = door.admission
        kind = admission.kind_of(door.method) if isinstance(admission, Acting) else getattr(admission, "kind", None)
        name = f"{door.method} {door.path}"
        takes_photos |= {name} if "multipart/form-data" in str(door.route.openapi_extra) else set()
        is_face |= {name} if kind == "face" else set()
        is_login |= {name} if kind == "login" else set()
    assert takes_photos
    assert takes_photos <= is_face
    assert {"POST /v1/auth/token", "POST /v1/auth/password"} <= is_login
    assert not is_face & is_login


async def test_a_stranger_is_told_so_before_anything_that_they_bring_is_looked_at(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = runtime.settings.model_copy(update={"rate_read": "900000/hour"})
    await runtime.limits.close()
    monkeypatch.setattr(runtime, "limits", limits := RateLimits(wide, runtime.keys))
    app = _app(runtime)
    said = {}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://idem") as client:
        for door in _doors(app):
            if not isinstance(door.admission, Acting):
                continue
            path = door.path.replace("{", "").replace("}", "")
            kind = (
                "multipart/form-data" if "multipart/form-data" in str(door.route.openapi_extra) else "application/json"
            )
            answer = await client.request(
                door.method, f"{path}?limit=x", content=b"{", headers={"Content-Type": kind, "If-Match": "x"}
            )
            said[f"{door.method} {door.path}"] = answer.status_code
    await limits.close()
    assert len(said) > 50
    assert {what: status for what, status in said.items() if status != 401} == {}


async def test_the_body_of_somebody_who_may_not_come_in_is_not_even_read(service: AccountService) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"x" * 65536
        pytest.fail("somebody reads all of it")

    for kind in ({"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}):
        assert (await service.http.post("/v1/users", content=b"x", headers=kind)).status_code == 401
    answer = await service.http.post("/v1/users", content=endless(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 401
    assert answer.headers["connection"] == "close"

    # A caller without the role neither.
    token = await _logged_in(service, "dora")
    answer = await service.http.post(
        "/v1/users", content=b"{", headers=bearer(token) | {"Content-Type": "application/json"}
    )
    assert answer.status_code == 403
    assert json.loads(answer.text)["type"].endswith("forbidden")
