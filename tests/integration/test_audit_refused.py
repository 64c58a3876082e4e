"""A log that takes no events: whatever is asked for does not happen, and says so with 503."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI

from app.api import audit as doors
from app.api.dependencies import Acting
from app.api.envelope import Envelope
from app.api.problems import install
from app.audit import by_system, rotate_key
from app.documents.accounts import Login, User
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.tree import AuditKey
from app.domain.callers import Caller, Role
from app.errors import AuditRefused
from app.runtime import Runtime
from app.use_cases import compare, galleries, standing, update
from app.use_cases.view_photo import view_photo
from tests.builders import (
    active,
    by_officer,
    decided,
    default_gallery,
    enrolled,
    erased,
    identified,
    known,
    portrait,
    screened,
    suspected,
    verified,
    with_sample,
)
from tests.support.accounts import ADMIN, PASSWORD, AccountService, bearer


@asynccontextmanager
async def _no_events(runtime: Runtime) -> AsyncIterator[None]:
    """The store refuses every event, as if its disk were full."""
    database = runtime.mongo[runtime.settings.mongodb_database]
    await database.command("collMod", "audit_events", validator={"_id": "none is this"})
    yield
    await database.command("collMod", "audit_events", validator={})


async def _picture(runtime: Runtime) -> dict[str, list[dict[str, object]]]:
    """Everything in the database but what may change without an action."""
    database = runtime.mongo[runtime.settings.mongodb_database]
    free = {"once", "stranger_counts", "leases", "idempotency_claims", "face_budgets", "failed_logins"}
    # These are written before the action, so that a sweep can prove which store owns a photo. The action may still be refused.
    free |= {"stores", "enrolments_begun"}
    names = sorted(set(await database.list_collection_names()) - free)
    return {name: await database[name].find().sort("_id").to_list() for name in names}


async def test_h97_without_its_event_nothing_happens_and_nothing_is_told(runtime: Runtime) -> None:
    gallery = await default_gallery()
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    waiting = await enrolled(runtime, "cid")
    _, case = await suspected(runtime, "bob")
    policy = gallery.policy.model_copy(update={"second_face_prominence": 0.5})
    asked: dict[str, Callable[[], Awaitable[object]]] = {
        "enrol": lambda: enrolled(runtime, "dan"),
        "screen": lambda: screened(runtime, waiting),
        "decide": lambda: decided(runtime, case, "distinct"),
        "verify": lambda: verified(runtime, ann, "ann"),
        "identify": lambda: identified(runtime, "ann"),
        "compare": lambda: compare.compare(runtime, by_officer("face.compare"), gallery, portrait("ann"), portrait("bob")),
        "photo": lambda: view_photo(runtime, by_officer("identity.photo.view"), gallery, ann, ann.samples[0].id),
        "update": lambda: update.update(
            runtime, by_officer("identity.update"), gallery, ann.id, {"full_name": "Ann"}, None
        ),
        "sample": lambda: with_sample(runtime, bob, "bob"),
        "revoke": lambda: standing.revoke(runtime, by_officer("identity.revoke"), gallery, ann.id, "lost"),
        "erase": lambda: erased(runtime, ann),
        "gallery": lambda: galleries.create(runtime, by_officer("gallery.create"), "north", None, gallery.policy),
        "policy": lambda: galleries.update(runtime, by_officer("gallery.update"), gallery, policy, ()),
        "key": lambda: runtime.transaction(
            lambda session: rotate_key(session, runtime.keys, by_system("audit.rotate_key"), "why not")
        ),
    }  # fmt: skip
    before = await _picture(runtime)
    async with _no_events(runtime):
        for name, ask in asked.items():
            with pytest.raises(AuditRefused):
                await ask()
                pytest.fail(name)
    assert await _picture(runtime) == before
    assert (await known(ann)).status == "active"
    await asked["revoke"]()
    assert (await known(ann)).status == "revoked"


async def test_h97_h93_without_its_event_nobody_logs_in_and_no_account_is_made(service: AccountService) -> None:
    admin = bearer((await service.log_in()).access)
    logins, users = await Login.count(), await User.count()
    body = {"username": "zoe", "password": PASSWORD, "roles": ["auditor"]}
    async with _no_events(service.runtime):
        answers = [
            await service.try_password(ADMIN, PASSWORD),
            await service.http.post("/v1/users", json=body, headers=admin),
        ]
    for answer in answers:
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:idem:problem/dependency-unavailable")
        assert "Retry-After" in answer.headers
    assert (await Login.count(), await User.count()) == (logins, users)
    assert (await service.http.post("/v1/users", json=body, headers=admin)).status_code == 201


async def test_h97_h93_without_its_event_nothing_of_the_log_is_exported(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await active(runtime, "ann")

    async def authenticated(_: Acting, request: object) -> Caller:
        del _, request
        return Caller("auditor-1", "user", "Aud Itor", frozenset({Role.AUDITOR}), None, "token")

    monkeypatch.setattr(Acting, "_authenticated", authenticated)
    app = FastAPI()
    app.state.runtime = runtime
    app.include_router(doors.router)
    install(app)
    app.add_middleware(Envelope, body_limit=runtime.settings.max_json_bytes)
    transport = httpx.ASGITransport(app)
    async with _no_events(runtime), httpx.AsyncClient(transport=transport, base_url="http://idem.test") as http:
        answer = await http.get("/v1/audit/export", headers=bearer("x"))
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:idem:problem/dependency-unavailable")
    assert await AuditEvent.find({"action": "audit.export"}).count() == 0
    assert await Gallery.count() == 1
    assert await Identity.count() == 1
    assert await AuditKey.count() == 1
