"""Idempotency keys over HTTP: the same request is done once, and answered the same every time."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta

import httpx
import pytest
from fastapi import FastAPI

from app.api import auth, dependencies, faces, galleries, identities
from app.api.envelope import Envelope
from app.api.problems import TYPE_BASE, install
from app.audit import by_system
from app.documents import claims
from app.documents.base import now
from app.documents.claims import CLAIM_LEASE, IdempotencyClaim
from app.documents.events import AuditEvent
from app.documents.identities import Identity
from app.domain.callers import Role
from app.engine.reading import read_face
from app.runtime import Runtime
from app.use_cases.keep_users import UserFields, create_user
from tests.builders import active, known, portrait

PASSWORD = "correct horse battery"


@dataclass(frozen=True, slots=True)
class Door:
    """The API as an officer reaches it."""

    runtime: Runtime
    http: httpx.AsyncClient

    async def enrol(self, key: str | None, *people: str, capture: int = 0, **fields: str) -> httpx.Response:
        """POST /v1/identities."""
        headers = {} if key is None else {"Idempotency-Key": key}
        files = {"photo": ("photo.png", portrait(*people, capture=capture), "image/png")}
        return await self.http.post("/v1/identities", data=fields, files=files, headers=headers)

    async def verify(self, key: str | None, identity_id: str, *people: str, capture: int = 9) -> httpx.Response:
        """POST /v1/verifications."""
        headers = {} if key is None else {"Idempotency-Key": key}
        files = {"photo": ("photo.png", portrait(*people, capture=capture), "image/png")}
        fields = {"identity_id": identity_id}
        return await self.http.post("/v1/verifications", data=fields, files=files, headers=headers)


@pytest.fixture
async def door(runtime: Runtime) -> AsyncIterator[Door]:
    await runtime.access.load_keys()
    app = FastAPI()
    app.state.runtime = runtime
    for part in (auth, galleries, identities, faces):
        app.include_router(part.router)
    install(app)
    app.add_middleware(Envelope, body_limit=runtime.settings.max_json_bytes)
    for name in ("olga", "otto"):
        fields = UserFields(name, (Role.OFFICER,), None)
        await create_user(runtime, by_system("user.create"), fields, PASSWORD)
    transport = httpx.ASGITransport(app, client=("192.0.2.7", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://idem.test") as http:
        http.headers["Authorization"] = f"Bearer {await _token(http, 'olga')}"
        yield Door(runtime, http)


async def _token(http: httpx.AsyncClient, name: str) -> str:
    form = {"grant_type": "password", "username": name, "password": PASSWORD}
    answer = await http.post("/v1/auth/token", data=form)
    token: str = answer.json()["access_token"]
    return token


def _slug(answer: httpx.Response) -> str:
    return str(answer.json()["type"]).removeprefix(TYPE_BASE)


async def _let_the_lease_run_out() -> None:
    """As if the process that held the key had died a while ago."""
    gone = {"$set": {"lease_until": now() - timedelta(seconds=1)}}
    await IdempotencyClaim.get_pymongo_collection().update_many({}, gone)


async def _until_it_would_be_over() -> None:
    """Wait as long as the key's present lease lasts."""
    claim = await IdempotencyClaim.find_one()
    assert claim is not None
    await asyncio.sleep((claim.lease_until - now()).total_seconds() + 0.01)


async def _in_progress() -> None:
    """As it is while the first request runs."""
    running = {"$set": {"state": "running", "event_id": None}}
    await IdempotencyClaim.get_pymongo_collection().update_many({}, running)


async def test_h69_the_same_request_with_the_same_key_is_done_once(door: Door) -> None:
    first = await door.enrol("key-1", "ann", external_ref="NID-1")
    again = await door.enrol("key-1", "ann", external_ref="NID-1")
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert await Identity.count() == 1
    assert await AuditEvent.find({"action": "identity.enrol", "outcome": "success"}).count() == 1


async def test_h69_ten_requests_with_one_key_at_once_enrol_one_identity(door: Door) -> None:
    answers = await asyncio.gather(*(door.enrol("key-1", "ann") for _ in range(10)))
    assert {a.status_code for a in answers} <= {202, 409}
    assert {_slug(a) for a in answers if a.status_code == 409} <= {"idempotency-in-progress"}
    assert len({a.json()["id"] for a in answers if a.status_code == 202}) == 1
    assert await Identity.count() == 1


@pytest.mark.parametrize("other", ["field", "photo", "query"])
async def test_h69_another_request_under_the_same_key_is_refused(door: Door, other: str) -> None:
    await door.enrol("key-1", "ann", external_ref="NID-1")
    if other == "field":
        answer = await door.enrol("key-1", "ann", external_ref="NID-2")
    elif other == "photo":
        answer = await door.enrol("key-1", "ann", capture=1, external_ref="NID-1")
    else:
        files = {"photo": ("photo.png", portrait("ann"), "image/png")}
        answer = await door.http.post(
            "/v1/identities?wait=0.01",
            data={"external_ref": "NID-1"},
            files=files,
            headers={"Idempotency-Key": "key-1"},
        )
    assert (answer.status_code, _slug(answer)) == (422, "idempotency-key-reused")
    assert await Identity.count() == 1


async def test_a_key_belongs_to_its_caller(door: Door) -> None:
    await door.enrol("key-1", "ann")
    door.http.headers["Authorization"] = f"Bearer {await _token(door.http, 'otto')}"
    answer = await door.enrol("key-1", "bob")
    assert answer.status_code == 202
    assert await Identity.count() == 2


async def test_h69_while_the_first_request_runs_the_second_is_told_so(door: Door) -> None:
    await door.enrol("key-1", "ann")
    await _in_progress()
    answer = await door.enrol("key-1", "ann")
    assert (answer.status_code, _slug(answer)) == (409, "idempotency-in-progress")
    assert 1 <= int(answer.headers["retry-after"]) <= CLAIM_LEASE.total_seconds()
    assert await IdempotencyClaim.count() == 1, "the refusal gave away a key that was not its own"


async def test_h69_a_request_whose_process_died_is_completed_once(door: Door) -> None:
    """The first one held the key and did nothing: after its lease others may, and exactly one does."""
    await door.enrol("key-1", "ann", external_ref="NID-1")
    (identity,) = await Identity.find_all().to_list()
    await identity.delete()
    await _in_progress()
    await _let_the_lease_run_out()
    answers = await asyncio.gather(*(door.enrol("key-1", "ann", external_ref="NID-1") for _ in range(4)))
    assert min(a.status_code for a in answers) == 202
    assert {a.status_code for a in answers} <= {202, 409}
    assert await Identity.count() == 1
    again = await door.enrol("key-1", "ann", external_ref="NID-1")
    assert again.json()["id"] == next(a for a in answers if a.status_code == 202).json()["id"]


@dataclass(frozen=True, slots=True)
class SlowReading:
    """The first photo that is read takes until `may_go_on`."""

    begun: asyncio.Event
    may_go_on: asyncio.Event


@pytest.fixture
def slow_reading(monkeypatch: pytest.MonkeyPatch) -> SlowReading:
    made = SlowReading(asyncio.Event(), asyncio.Event())
    compute = Runtime.compute_long

    async def slow(runtime: Runtime, caller: str, work: object, /, *args: object, **kwargs: object) -> object:
        if work is read_face and not made.begun.is_set():
            made.begun.set()
            await made.may_go_on.wait()
        return await compute(runtime, caller, work, *args, **kwargs)

    monkeypatch.setattr(Runtime, "compute_long", slow)
    return made


async def test_a_slow_first_request_that_lost_its_key_does_nothing(door: Door, slow_reading: SlowReading) -> None:
    """It had the key for longer than the lease, and another request completed the work."""
    first = asyncio.create_task(door.enrol("key-1", "ann"))
    await slow_reading.begun.wait()
    await _let_the_lease_run_out()
    second = await door.enrol("key-1", "ann")
    slow_reading.may_go_on.set()
    answer = await first
    assert second.status_code == 202
    assert (answer.status_code, _slug(answer)) == (409, "idempotency-in-progress")
    assert await Identity.count() == 1


async def test_r6_a_key_is_held_for_as_long_as_its_request_runs_and_free_soon_after_its_owner_died(
    door: Door, slow_reading: SlowReading, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The lease is renewed ten times in its life, so that a busy machine may be late.
    monkeypatch.setattr(claims, "CLAIM_LEASE", timedelta(seconds=1.5))
    monkeypatch.setattr(dependencies, "RENEW_SECONDS", 0.15)
    first = asyncio.create_task(door.enrol("key-1", "ann"))
    await slow_reading.begun.wait()
    await _until_it_would_be_over()
    meanwhile = await door.enrol("key-1", "ann")
    assert (meanwhile.status_code, _slug(meanwhile)) == (409, "idempotency-in-progress")
    first.cancel()  # as if its process had died: the lease is no longer renewed
    await asyncio.gather(first, return_exceptions=True)
    await _in_progress()
    await _until_it_would_be_over()
    again = await door.enrol("key-1", "ann")
    assert again.status_code == 202
    assert await Identity.count() == 1


async def test_a_refusal_is_not_stored(door: Door) -> None:
    refused = await door.enrol("key-1")
    assert (refused.status_code, _slug(refused)) == (422, "no-face")
    assert await IdempotencyClaim.count() == 0
    assert (await door.enrol("key-1", "ann")).status_code == 202


async def test_a_key_serves_again_after_its_time(door: Door) -> None:
    await door.enrol("key-1", "ann")
    collection = IdempotencyClaim.get_pymongo_collection()
    await collection.update_many({}, {"$set": {"expires_at": now() - timedelta(seconds=1)}})
    assert (await door.enrol("key-1", "bob")).status_code == 202
    assert await Identity.count() == 2


async def test_the_answer_is_not_stored_only_a_reference_is(door: Door) -> None:
    await door.enrol("key-1", "ann", full_name="Ann Example")
    (claim,) = await IdempotencyClaim.get_pymongo_collection().find().to_list()
    assert set(claim) >= {"_id", "fingerprint", "event_id", "state"}
    assert b"key-1" not in str(claim).encode()
    assert "Ann Example" not in str(claim)
    event = await AuditEvent.get(claim["event_id"])
    assert event is not None
    assert event.action == "identity.enrol"


async def test_a_verification_repeated_with_its_key_gets_the_same_answer_and_is_no_replay(door: Door) -> None:
    ann = await active(door.runtime, "ann")
    first = await door.verify("key-1", ann.id, "ann")
    again = await door.verify("key-1", ann.id, "ann")
    assert first.status_code == 200
    assert first.json()["match"] is True
    assert again.json() == first.json()
    replayed = await door.verify("key-2", ann.id, "ann")
    assert (replayed.status_code, _slug(replayed)) == (409, "replayed-photo")
    assert (await known(ann)).attempts.consecutive == 0


async def test_a_non_match_repeated_with_its_key_counts_once(door: Door) -> None:
    ann = await active(door.runtime, "ann")
    answers = [await door.verify("key-1", ann.id, "impostor") for _ in range(3)]
    assert [a.json()["match"] for a in answers] == [False] * 3
    assert (await known(ann)).attempts.consecutive == 1


async def test_a_key_is_printable_and_not_too_long(door: Door) -> None:
    assert (await door.enrol("k" * 255, "ann")).status_code == 202
    assert (await door.enrol("k" * 256, "bob")).status_code == 422
    assert await Identity.count() == 1
