"""Every route of the service by every role, on one's own galleries and on foreign ones: no unexpected success.

The routes come from the app itself: one that is not in the table, or names something that the scene has not, fails.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.audit import by_system
from app.documents.base import now
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.proposals import IdentityProposal
from app.domain.callers import Role
from app.domain.policy import GalleryPolicy
from app.errors import NotReady
from app.main import create_app
from app.runtime import Runtime
from app.use_cases.keep_clients import ClientFields, create_client
from app.use_cases.keep_users import UserFields, create_user
from app.use_cases.scan import start
from app.use_cases.sequence import kept_up
from tests.builders import by_officer, case_about, enrolled, portrait, screened
from tests.support.callers import NEW_PASSWORD, http_of, token_of

Json = dict[str, Any]

ROLES = ("admin", "officer", "auditor", "relying_app", "enroller")
ADMIN, OFFICER, AUDITOR, APP, ENROLLER = ({role} for role in ROLES)
ANYBODY, NEEDS_NOBODY = set(ROLES), {*ROLES, ""}
PEOPLE = ANYBODY - APP - ENROLLER

#: Who may call what; "" stands for a caller without a token.
MAY: dict[str, set[str]] = {
    "POST /v1/auth/token": NEEDS_NOBODY,
    "POST /v1/auth/revoke": NEEDS_NOBODY,
    "GET /.well-known/jwks.json": NEEDS_NOBODY,
    "GET /health": NEEDS_NOBODY,
    "GET /ready": NEEDS_NOBODY,
    "GET /metrics": NEEDS_NOBODY,
    "GET /v1/auth/me": ANYBODY,
    "POST /v1/auth/password": PEOPLE,
    "POST /v1/auth/totp": PEOPLE,
    "POST /v1/auth/totp/confirm": PEOPLE,
    "DELETE /v1/auth/totp": PEOPLE,
    "GET /v1/users": ADMIN,
    "POST /v1/users": ADMIN,
    "GET /v1/users/{user_id}": ADMIN,
    "PATCH /v1/users/{user_id}": ADMIN,
    "DELETE /v1/users/{user_id}": ADMIN,
    "GET /v1/clients": ADMIN,
    "POST /v1/clients": ADMIN,
    "GET /v1/clients/{client_id}": ADMIN,
    "PATCH /v1/clients/{client_id}": ADMIN,
    "DELETE /v1/clients/{client_id}": ADMIN,
    "POST /v1/clients/{client_id}/rotate": ADMIN,
    "GET /v1/galleries": ADMIN | OFFICER | APP | ENROLLER,
    "GET /v1/galleries/{name}": ADMIN | OFFICER | APP | ENROLLER,
    "POST /v1/galleries": ADMIN,
    "PATCH /v1/galleries/{name}": ADMIN,
    "POST /v1/galleries/{name}/pending/agree": OFFICER,
    "POST /v1/galleries/{name}/pending/cancel": ADMIN | OFFICER,
    "DELETE /v1/galleries/{name}": ADMIN,
    "POST /v1/identities": OFFICER | ENROLLER,
    "GET /v1/identities": OFFICER,
    "GET /v1/identities/{identity_id}": OFFICER | ENROLLER,
    "PATCH /v1/identities/{identity_id}": OFFICER,
    "DELETE /v1/identities/{identity_id}": OFFICER,
    "POST /v1/identities/{identity_id}/samples": OFFICER,
    "DELETE /v1/identities/{identity_id}/samples/{sample_id}": OFFICER,
    "GET /v1/identities/{identity_id}/samples/{sample_id}/photo": OFFICER,
    "GET /v1/identities/{identity_id}/samples/{sample_id}/crop": OFFICER,
    "POST /v1/identities/{identity_id}/screen": OFFICER,
    "POST /v1/identities/{identity_id}/revoke": OFFICER,
    "POST /v1/identities/{identity_id}/reinstate": OFFICER,
    "POST /v1/identities/{identity_id}/attempts:reset": OFFICER,
    "GET /v1/identities/{identity_id}/export": OFFICER,
    "POST /v1/identities/import": OFFICER,
    "GET /v1/imports/{import_id}": OFFICER,
    "GET /v1/imports/{import_id}/results": OFFICER,
    "GET /v1/proposals": OFFICER,
    "GET /v1/proposals/{proposal_id}": OFFICER,
    "POST /v1/proposals/{proposal_id}/agree": OFFICER,
    "POST /v1/proposals/{proposal_id}/withdraw": OFFICER,
    "POST /v1/verifications": OFFICER | APP,
    "POST /v1/identifications": OFFICER | APP,
    "POST /v1/comparisons": OFFICER | APP,
    "POST /v1/faces/detect": OFFICER | APP | ENROLLER,
    "POST /v1/faces/quality": OFFICER | APP | ENROLLER,
    "POST /v1/challenges": OFFICER | APP,
    "POST /v1/faces/detect:batch": OFFICER | APP,
    "POST /v1/verifications:batch": OFFICER | APP,
    "GET /v1/dedup/jobs/{job_id}": OFFICER | ENROLLER,
    "GET /v1/dedup/cases": OFFICER,
    "GET /v1/dedup/cases/{case_id}": OFFICER,
    "POST /v1/dedup/cases/{case_id}/decision": OFFICER,
    "POST /v1/dedup/scans": OFFICER,
    "GET /v1/dedup/scans/{scan_id}": OFFICER,
    "GET /v1/dedup/scans/{scan_id}/pairs": OFFICER,
    "GET /v1/dedup/scans/{scan_id}/clusters": OFFICER,
    "POST /v1/dedup/scans/{scan_id}/pause": OFFICER,
    "POST /v1/dedup/scans/{scan_id}/resume": OFFICER,
    "POST /v1/dedup/scans/{scan_id}/cancel": OFFICER,
    "POST /v1/dedup/scans/{scan_id}/cases": OFFICER,
    "GET /v1/audit/events": AUDITOR | ADMIN,
    "GET /v1/audit/events/{event}": AUDITOR | ADMIN,
    "GET /v1/audit/checkpoint": AUDITOR | ADMIN,
    "GET /v1/audit/keys": AUDITOR | ADMIN,
    "GET /v1/audit/proofs/inclusion": AUDITOR | ADMIN,
    "GET /v1/audit/proofs/consistency": AUDITOR | ADMIN,
    "GET /v1/audit/export": AUDITOR | ADMIN,
    "GET /v1/system": ADMIN,
}
#: What names nothing in a gallery, so that those bound to another one are answered: lists of their own, and themselves.
OF_NO_GALLERY = {
    "GET /v1/auth/me",
    "GET /v1/users",
    "GET /v1/clients",
    "GET /v1/galleries",
    "GET /v1/identities",
    "GET /v1/proposals",
    "GET /v1/dedup/cases",
    "POST /v1/faces/detect",
    "GET /v1/audit/events",
    "GET /v1/audit/export",
    "GET /v1/audit/checkpoint",
    "GET /v1/audit/keys",
    "GET /v1/audit/proofs/consistency",
    "GET /v1/audit/proofs/inclusion",
    "GET /v1/system",
}
#: What an enroller may read only where it is its own (test_enrollers.py); the scene's is an officer's.
OF_THE_ENROLLER = {"GET /v1/identities/{identity_id}", "GET /v1/dedup/jobs/{job_id}"}
#: To which galleries callers are bound: to none, to the scene's own one, to another one.
BOUND: dict[str, tuple[str, ...] | None] = {"all": None, "theirs": ("theirs-7",), "mine": ("mine-7",)}
#: What is not there in the scene either.
NOT_THERE = {"GET /v1/imports/{import_id}", "GET /v1/imports/{import_id}/results"}
#: What asks for a password or a code besides the token.
WITH_PROOF = {"POST /v1/auth/password", "POST /v1/auth/totp", "POST /v1/auth/totp/confirm", "DELETE /v1/auth/totp"}
NOBODY = "01a1fc00-0000-7000-8000-000000000000"
#: Parameters of a path, and whose id stands there.
NAMED = {
    "user_id": "user", "client_id": "client", "name": "gallery", "identity_id": "identity", "sample_id": "sample",
    "proposal_id": "proposal", "job_id": "job", "case_id": "case", "scan_id": "scan", "event": "event", "import_id": "nobody",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scene:
    """One gallery with somebody in it who was enrolled twice: the ids of everything that a call can name."""

    app: FastAPI
    ids: dict[str, str]
    marks: tuple[str, ...]
    callers: dict[tuple[str, str], httpx.AsyncClient]


def routes() -> list[str]:
    """Every call of the service, as its OpenAPI document names them."""
    paths = create_app().openapi()["paths"]
    return [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]


CALLS = routes()


def request(call: str, ids: dict[str, str]) -> tuple[str, str, Json]:
    """The call on these ids, with a body that would do harm if it were let in: method, path, and the rest."""
    method, _, path = call.partition(" ")
    for name in re.findall(r"{(\w+)}", path):
        path = path.replace(f"{{{name}}}", ids[NAMED[name]])
    photo = ("photo", ("photo.png", portrait("ann", capture=3)))
    with_photo: dict[str, Json] = {
        "POST /v1/identities": {"gallery": ids["gallery"]},
        "POST /v1/identities/{identity_id}/samples": {},
        "POST /v1/verifications": {"identity_id": ids["identity"]},
        "POST /v1/identifications": {"gallery": ids["gallery"]},
        "POST /v1/faces/detect": {},
        "POST /v1/faces/quality": {"gallery": ids["gallery"]},
    }
    if call in with_photo:
        return method, path, {"files": [photo], "data": with_photo[call]}
    if call == "POST /v1/comparisons":
        both = [("photo_a", photo[1]), ("photo_b", photo[1])]
        return method, path, {"files": both, "data": {"gallery": ids["gallery"]}}
    proof = {"current_password": "a wrong horse"}
    bodies: dict[str, Json] = {
        "POST /v1/auth/token": {"data": {"grant_type": "refresh_token", "refresh_token": "x"}},
        "POST /v1/auth/revoke": {"data": {"token": "x"}},
        "POST /v1/auth/password": {"json": proof | {"new_password": "an even better horse"}},
        "POST /v1/auth/totp": {"json": proof},
        "POST /v1/auth/totp/confirm": {"json": {"otp": "000000"}},
        "DELETE /v1/auth/totp": {"json": proof},
        "POST /v1/users": {
            "json": {
                "username": "intruder",
                "password": NEW_PASSWORD,
                "roles": ["admin"],
                "galleries": [ids["gallery"]],
            }
        },
        "POST /v1/clients": {"json": {"name": "intruder", "galleries": [ids["gallery"]]}},
        "PATCH /v1/users/{user_id}": {"json": {"roles": ["admin"]}},
        "PATCH /v1/clients/{client_id}": {"json": {"galleries": None}},
        "POST /v1/clients/{client_id}/rotate": {"json": {}},
        "POST /v1/galleries": {"json": {"name": ids["gallery"]}},
        "PATCH /v1/galleries/{name}": {"json": {"policy": {"verify_threshold": 0.01}}},
        "PATCH /v1/identities/{identity_id}": {"json": {"full_name": "Intruder"}},
        "DELETE /v1/identities/{identity_id}": {"params": {"reason": "x"}},
        "POST /v1/identities/{identity_id}/revoke": {"json": {"reason": "x"}},
        "POST /v1/identities/{identity_id}/reinstate": {"json": {"reason": "x"}},
        "DELETE /v1/identities/{identity_id}/samples/{sample_id}": {"params": {"reason": "x"}},
        "POST /v1/challenges": {"json": {"gallery": ids["gallery"], "identity_id": ids["identity"]}},
        "POST /v1/dedup/cases/{case_id}/decision": {"json": {"decision": "distinct", "reason": "x"}},
        "POST /v1/dedup/scans": {"json": {"gallery": ids["gallery"]}},
        "GET /v1/audit/proofs/inclusion": {"params": {"seq": 0}},
        "GET /v1/audit/proofs/consistency": {"params": {"from": 0}},
    }
    return method, path, bodies.get(call, {})


@pytest.fixture
async def scene(runtime: Runtime, cheap_passwords: None) -> AsyncIterator[Scene]:
    """A gallery `theirs-7` full of things, an empty one `mine-7`, and a caller of each role bound to either, and to none."""
    policy = GalleryPolicy(verify_fmr=1e-4, identify_fpir=1e-3, dedup_fpir=1e-3, liveness="off", quality="off")
    theirs = await runtime.create_gallery("theirs-7", policy)
    await runtime.create_gallery("mine-7", policy)
    await opened(runtime, theirs)
    ann = await screened(
        runtime, await enrolled(runtime, "ann", gallery=theirs, external_ref="NID-THEIRS", full_name="Ann Theirs")
    )
    suspect = await screened(runtime, await enrolled(runtime, "ann", capture=1, gallery=theirs))
    case = await case_about(suspect)
    scan = await start(runtime, by_officer("dedup.scan"), theirs, None)
    system = by_system("user.create")
    user = await create_user(runtime, system, UserFields("their-user", (Role.OFFICER,), ("theirs-7",)), NEW_PASSWORD)
    client, _ = await create_client(runtime, system, ClientFields("their-client", (Role.RELYING_APP,), ("theirs-7",)))
    proposal = await proposed(theirs, ann)
    app = create_app(runtime.settings)
    app.state.runtime = runtime
    ids = {
        "gallery": "theirs-7", "identity": ann.id, "sample": ann.samples[0].id, "job": ann.screenings[0].job_id,
        "case": case.id, "proposal": proposal.id, "scan": scan.id, "user": user.id, "client": client.id, "nobody": NOBODY,
        "event": await _event_about(ann.id),
    }  # fmt: skip
    callers: dict[tuple[str, str], httpx.AsyncClient] = {("", ""): http_of(app, None)}
    for bound, galleries in BOUND.items():
        for role in ROLES:
            callers[role, bound] = http_of(app, await token_of(runtime, app, f"{role}-{bound}", role, galleries))
    marks = (*(ids[key] for key in ids if key != "nobody"), suspect.id, "NID-THEIRS", "Ann Theirs", "their-user")
    yield Scene(app, ids, marks, callers)
    for http in callers.values():
        await http.aclose()


async def proposed(gallery: Gallery, identity: Identity) -> IdentityProposal:
    """An erasure that waits for a second officer."""
    proposal = IdentityProposal(
        gallery_id=gallery.id, identity_id=identity.id, identity_version=identity.version, kind="erasure",
        reason="moved away", proposed_by="officer-1", created_at=now(),
    )  # fmt: skip
    await proposal.insert()
    return proposal


@pytest.fixture
async def numbered(runtime: Runtime) -> AsyncIterator[None]:
    """Events get their numbers, for which an export waits."""
    async with kept_up(runtime):
        yield


async def opened(runtime: Runtime, gallery: Gallery) -> None:
    """Wait until the gallery can be searched: the first search of a process compiles what it needs."""
    async with asyncio.timeout(60):
        while True:
            try:
                await runtime.search.warm(gallery)
            except NotReady:
                await asyncio.sleep(0.2)
            else:
                return


async def _event_about(identity_id: str) -> str:
    event = await AuditEvent.find_one({"subject.id": identity_id})
    assert event is not None
    return event.id


async def ask(scene: Scene, call: str, role: str, bound: str, ids: dict[str, str]) -> httpx.Response:
    """The call by somebody of that role who is bound to those galleries."""
    method, path, rest = request(call, ids)
    return await scene.callers[role, bound].request(method, path, **rest)


def slug(answer: httpx.Response) -> str:
    """The refusal's name."""
    return str(answer.json()["type"]).rpartition("/")[2]


def test_the_table_names_every_call_of_the_service_and_no_other() -> None:
    assert set(CALLS) == set(MAY)


async def test_h42_whoever_may_not_call_is_refused_whatever_they_send(scene: Scene) -> None:
    refused = 0
    for call in CALLS:
        callers = [one for one in scene.callers if one[0] not in MAY[call]]
        answers = await asyncio.gather(*(ask(scene, call, role, bound, scene.ids) for role, bound in callers))
        for caller, answer in zip(callers, answers, strict=True):
            expected = (403, "forbidden") if caller[0] else (401, "unauthenticated")
            assert (answer.status_code, slug(answer)) == expected, (call, caller, answer.text)
            refused += 1
    assert refused > 500


@pytest.mark.usefixtures("numbered")
async def test_whoever_may_call_is_let_in(scene: Scene) -> None:
    # On nobody and nothing, so that nothing is changed: what counts is that the role is not in the way.
    nobody = dict.fromkeys(scene.ids, NOBODY)
    for call in CALLS:
        if call in WITH_PROOF:
            continue  # a wrong proof is refused with the status of a wrong role
        for role in MAY[call] - {""}:
            answer = await ask(scene, call, role, "all", nobody)
            assert answer.status_code not in (401, 403, 405, 500, 503), (call, role, answer.text)


@pytest.mark.usefixtures("numbered")
async def test_whoever_is_bound_to_a_gallery_is_let_in_to_all_of_it(scene: Scene) -> None:
    read, in_it = 0, dict.fromkeys(scene.ids, NOBODY) | {"gallery": scene.ids["gallery"]}
    for call in CALLS:
        for role in MAY[call] if "" not in MAY[call] and call not in WITH_PROOF else ():
            if role == "enroller" and call in OF_THE_ENROLLER:
                answer = await ask(scene, call, role, "theirs", scene.ids)
                assert answer.status_code == 404, (call, role, answer.text)
            elif call.startswith("GET") and call not in NOT_THERE:
                answer = await ask(scene, call, role, "theirs", scene.ids)
                assert answer.status_code == 200, (call, role, answer.text)
                read += 1
            elif call != "POST /v1/galleries":  # for admins who are bound to none
                answer = await ask(scene, call, role, "theirs", in_it)
                assert answer.status_code not in (401, 403, 405, 500, 503), (call, role, answer.text)
    assert read > 30


@pytest.mark.usefixtures("numbered")
async def test_h41_nobody_reaches_anything_of_a_gallery_that_they_may_not_see(scene: Scene) -> None:
    tried, nobody = 0, dict.fromkeys(scene.ids, NOBODY)
    for call in CALLS:
        for role in MAY[call] if "" not in MAY[call] else ():
            answer = await ask(scene, call, role, "mine", scene.ids)
            if answer.status_code < 400:
                assert call in OF_NO_GALLERY, (call, role, answer.text)
                assert not any(mark in answer.text for mark in scene.marks), (call, role, answer.text)
            elif call not in WITH_PROOF:
                like = await ask(scene, call, role, "mine", nobody)
                assert (answer.status_code, slug(answer)) == (like.status_code, slug(like)), (call, role, answer.text)
                tried += 1
    assert tried > 40


async def test_h41_what_is_in_a_foreign_gallery_is_told_as_what_does_not_exist_in_the_same_time(scene: Scene) -> None:
    officer = scene.callers["officer", "mine"]
    calls = [call for call in CALLS if "{identity_id}" in call and call.startswith("GET")]

    async def asked(call: str, ids: dict[str, str]) -> tuple[float, Json]:
        method, path, rest = request(call, ids)
        began = time.perf_counter()
        answer = await officer.request(method, path, **rest)
        seconds = time.perf_counter() - began
        page: Json = answer.json()
        assert answer.status_code == 404, answer.text
        return seconds, {name: page[name] for name in page if name not in ("instance", "request_id")}

    for call in calls:
        pairs = [(await asked(call, scene.ids), await asked(call, dict.fromkeys(scene.ids, NOBODY))) for _ in range(40)]
        assert all(foreign[1] == unknown[1] for foreign, unknown in pairs), call
        # The least of many: what a busy machine adds says nothing.
        foreign_seconds, unknown_seconds = (min(pair[side][0] for pair in pairs) for side in (0, 1))
        assert abs(foreign_seconds - unknown_seconds) < max(0.005, unknown_seconds / 2), call


async def test_an_admin_bound_to_galleries_makes_none_and_learns_of_no_others(scene: Scene) -> None:
    everybodys, bound = scene.callers["admin", "all"], scene.callers["admin", "mine"]
    for name in ("theirs-7", "mine-7", "brand-new"):
        answer = await bound.post("/v1/galleries", json={"name": name})
        assert (answer.status_code, slug(answer)) == (403, "forbidden"), name
    assert (await everybodys.delete("/v1/galleries/mine-7")).status_code == 204
    # The rights to it are gone with it.
    assert (await bound.post("/v1/galleries", json={"name": "mine-7"})).status_code == 403
    assert (await everybodys.post("/v1/galleries", json={"name": "brand-new"})).status_code == 201


async def test_an_admin_bound_to_a_gallery_gives_and_keeps_no_more_than_it(scene: Scene) -> None:
    admin, everybodys = scene.callers["admin", "mine"], scene.callers["admin", "all"]
    new = {"username": "fresh", "password": NEW_PASSWORD, "roles": ["officer"]}
    for galleries in (None, ["theirs-7"], ["mine-7", "theirs-7"], ["nobodys-7"]):
        for path, body in (("/v1/users", new), ("/v1/clients", {"name": "fresh"})):
            answer = await admin.post(path, json=body | {"galleries": galleries})
            assert (answer.status_code, slug(answer)) == (403, "forbidden"), (path, galleries)
    made = await admin.post("/v1/users", json=new | {"galleries": ["mine-7"]})
    assert made.status_code == 201
    wider = await admin.patch(f"/v1/users/{made.json()['id']}", json={"galleries": None})
    assert wider.status_code == 403
    me = (await admin.get("/v1/auth/me")).json()["id"]
    assert (await admin.patch(f"/v1/users/{me}", json={"galleries": None})).status_code == 403
    # The password of somebody who may do more would be a way to become them.
    boss = (await everybodys.get("/v1/auth/me")).json()["id"]
    for method in ("GET", "PATCH", "DELETE"):
        answer = await admin.request(method, f"/v1/users/{boss}", json={"password": NEW_PASSWORD})
        assert answer.status_code == 404, method
    names = {user["username"] for user in (await admin.get("/v1/users")).json()["items"]}
    assert names == {"admin-mine", "officer-mine", "auditor-mine", "fresh"}
    client = await admin.post("/v1/clients", json={"name": "fresh", "galleries": ["mine-7"]})
    assert client.status_code == 201
    wider = await admin.patch(f"/v1/clients/{client.json()['id']}", json={"galleries": ["theirs-7"]})
    assert wider.status_code == 403
    listed = (await admin.get("/v1/clients")).json()["items"]
    assert {one["name"] for one in listed} == {"relying_app-mine", "enroller-mine", "fresh"}
