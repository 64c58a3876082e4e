"""SIGTERM for the product's own processes while they work."""

import asyncio
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx

from app.devstack.servers import free_port
from app.documents.claims import IdempotencyClaim
from app.documents.events import AuditEvent
from app.documents.identities import Identity
from app.domain.callers import Role
from app.errors import NotReady
from app.runtime import Runtime, open_runtime
from app.use_cases import screen
from app.use_cases.keep_users import UserFields, create_user
from tests.builders import by_officer, default_gallery, portrait
from tests.fakes import FakeEngine
from tests.support import services
from tests.support.fault_stories import PASSWORD, story_settings
from tests.support.nursery import Nursery

IN_FLIGHT = 50
GRACE_SECONDS = 4
VERDICTS = 5


async def test_h98_a_process_with_fifty_requests_in_flight_answers_all_of_them_and_neither_it_nor_a_worker_leaves_one_half_done(
    mongo_server: services.Server, redis_server: services.Server, database_name: str, tmp_path: Path
) -> None:
    settings = story_settings(mongo_server.url, redis_server.url, database_name, tmp_path)
    async with open_runtime(settings, FakeEngine()) as runtime:
        await create_user(runtime, by_officer("user.create"), UserFields("olga", (Role.OFFICER,), None), PASSWORD)
        gallery = await default_gallery()
        await gallery.get_pymongo_collection().update_one({}, {"$set": {"policy.quality": "off"}})
        port, ended = free_port(), asyncio.Event()
        nursery = await Nursery.open(tmp_path, lambda _: ended.set())
        listening = asyncio.create_task(nursery.listen())
        environment = {
            "MONGODB_URI": settings.mongodb_uri,
            "MONGODB_DATABASE": settings.mongodb_database,
            "REDIS_URL": settings.redis_url,
            "QUEUE_NAME": settings.queue_name,
            "KEY_ENCRYPTION_KEY": settings.key_encryption_secret(),
            "STORAGE_PATH": str(settings.storage_path),
            "VECTOR_DB_PATH": str(settings.vector_db_path),
            "INDEX_CACHE_PATH": str(settings.index_cache_path),
            "EVIDENCE_PATH": str(settings.evidence_path),
            "API_PORT": str(port),
            "SHUTDOWN_GRACE_SECONDS": str(GRACE_SECONDS),
        }
        await nursery.start("api", ["serve"], environment)
        limits = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=90, limits=limits
        ) as http:
            await _until_ready(http)
            form = {"grant_type": "password", "username": "olga", "password": PASSWORD}
            token = (await http.post("/v1/auth/token", data=form)).json()["access_token"]

            async def enrol(number: int) -> httpx.Response:
                # Nobody screens here yet: all of them wait for their verdict, far beyond the grace.
                while True:
                    answer = await http.post(
                        "/v1/identities",
                        params={"wait": 30},
                        headers={"Authorization": f"Bearer {token}", "Idempotency-Key": str(number)},
                        data={"external_ref": f"ref-{number}"},
                        files={"photo": ("photo.png", portrait(f"person-{number}"), "image/png")},
                    )
                    # A slow machine may not take fifty at once at the first try.
                    if stopping.is_set() or answer.is_success:
                        return answer

            await _warm(runtime)
            stopping = asyncio.Event()
            calls = [asyncio.create_task(enrol(number)) for number in range(IN_FLIGHT)]
            async with asyncio.timeout(40):
                while await Identity.count() < IN_FLIGHT:
                    await asyncio.sleep(0.05)
            began = time.monotonic()
            stopping.set()
            os.kill(nursery.pids["api"], signal.SIGTERM)
            for identity in await Identity.find_all().limit(VERDICTS).to_list():
                await screen.screen(runtime, identity.id, identity.screenings[0].job_id)
            answers = await asyncio.gather(*calls)
            await asyncio.wait_for(ended.wait(), GRACE_SECONDS + 3)
            assert time.monotonic() - began < GRACE_SECONDS + 3
        await _stop_a_worker_in_mid_work(nursery, environment, ended)
        await nursery.close()
        await listening
        statuses = Counter(answer.status_code for answer in answers)
        assert {201, 503} <= set(statuses) <= {201, 202, 503}, statuses
        stored = {identity.id for identity in await Identity.find_all().to_list()}
        assert {answer.json()["id"] for answer in answers if answer.status_code == httpx.codes.CREATED} <= stored
        events = await AuditEvent.find({"action": "identity.enrol", "outcome": "success"}).to_list()
        assert {event.subject.id for event in events} == stored, "whole or not at all"
        assert (await default_gallery()).identities == len(stored) == len(events) == IN_FLIGHT
        claims = await IdempotencyClaim.find({"state": "done"}).to_list()
        assert {claim.event_id for claim in claims} == {event.id for event in events}, (
            "a second try is answered the same"
        )


async def _warm(runtime: Runtime) -> None:
    """So that the verdicts come at once."""
    async with asyncio.timeout(30):
        while True:
            with suppress(NotReady):
                await runtime.search.warm(await default_gallery())
                return


async def _stop_a_worker_in_mid_work(nursery: Nursery, environment: dict[str, str], ended: asyncio.Event) -> None:
    """It finds the others' screenings in the queue, and each of them is done or not begun."""
    ended.clear()
    await nursery.start("worker", ["worker"], environment)
    async with asyncio.timeout(40):
        while await Identity.find({"status": "active"}).count() <= VERDICTS:
            await asyncio.sleep(0.01)
    os.kill(nursery.pids["worker"], signal.SIGTERM)
    await asyncio.wait_for(ended.wait(), GRACE_SECONDS + 3)
    verdicts = await AuditEvent.find({"action": "dedup.verdict"}).to_list()
    active = await Identity.find({"status": "active"}).to_list()
    assert sorted(str(event.subject.id) for event in verdicts) == sorted(identity.id for identity in active)


async def _until_ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                if (await http.get("/ready")).is_success:
                    return
            except httpx.HTTPError:
                await asyncio.sleep(0.05)
