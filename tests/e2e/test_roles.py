"""Every call by every role, on one's own galleries and on foreign ones: no unexpected success."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.e2e.builders import (
    NOBODY,
    Page,
    Service,
    again,
    app_with,
    enrol,
    new_gallery,
    part,
    people,
    problem,
    user_with,
)

ROLES = ("admin", "officer", "auditor", "relying_app")
ADMIN, OFFICER, AUDITOR, APP = ({role} for role in ROLES)
ANYBODY, NEEDS_NOBODY = set(ROLES), {*ROLES, ""}

#: Who may call what; "" stands for a caller without a token.
MAY = {
    "POST /v1/auth/token": NEEDS_NOBODY,
    "POST /v1/auth/revoke": NEEDS_NOBODY,
    "GET /.well-known/jwks.json": NEEDS_NOBODY,
    "GET /health": NEEDS_NOBODY,
    "GET /ready": NEEDS_NOBODY,
    "GET /metrics": NEEDS_NOBODY,
    "GET /v1/auth/me": ANYBODY,
    "GET /v1/users": ADMIN,
    "POST /v1/users": ADMIN,
    "GET /v1/users/{}": ADMIN,
    "PATCH /v1/users/{}": ADMIN,
    "DELETE /v1/users/{}": ADMIN,
    "GET /v1/clients": ADMIN,
    "POST /v1/clients": ADMIN,
    "GET /v1/clients/{}": ADMIN,
    "PATCH /v1/clients/{}": ADMIN,
    "DELETE /v1/clients/{}": ADMIN,
    "POST /v1/clients/{}/rotate": ADMIN,
    "GET /v1/galleries": ADMIN | OFFICER | APP,
    "GET /v1/galleries/{}": ADMIN | OFFICER | APP,
    "POST /v1/galleries": ADMIN,
    "PATCH /v1/galleries/{}": ADMIN,
    "DELETE /v1/galleries/{}": ADMIN,
    "POST /v1/identities": OFFICER,
    "GET /v1/identities": OFFICER,
    "GET /v1/identities/{}": OFFICER,
    "PATCH /v1/identities/{}": OFFICER,
    "DELETE /v1/identities/{}": OFFICER,
    "POST /v1/identities/{}/samples": OFFICER,
    "GET /v1/identities/{}/samples/{}/photo": OFFICER,
    "POST /v1/identities/{}/screen": OFFICER,
    "POST /v1/identities/{}/revoke": OFFICER,
    "POST /v1/identities/{}/reinstate": OFFICER,
    "POST /v1/identities/{}/attempts:reset": OFFICER,
    "GET /v1/identities/{}/export": OFFICER,
    "POST /v1/identities/import": OFFICER,
    "GET /v1/imports/{}": OFFICER,
    "GET /v1/imports/{}/results": OFFICER,
    "POST /v1/verifications": OFFICER | APP,
    "POST /v1/identifications": OFFICER | APP,
    "POST /v1/comparisons": OFFICER | APP,
    "POST /v1/faces/detect": OFFICER | APP,
    "POST /v1/faces/quality": OFFICER | APP,
    "POST /v1/challenges": OFFICER | APP,
    "POST /v1/faces/detect:batch": OFFICER | APP,
    "POST /v1/verifications:batch": OFFICER | APP,
    "GET /v1/dedup/jobs/{}": OFFICER,
    "GET /v1/dedup/cases": OFFICER,
    "GET /v1/dedup/cases/{}": OFFICER,
    "POST /v1/dedup/cases/{}/decision": OFFICER,
    "POST /v1/dedup/scans": OFFICER,
    "GET /v1/dedup/scans/{}": OFFICER,
    "GET /v1/dedup/scans/{}/pairs": OFFICER,
    "GET /v1/dedup/scans/{}/clusters": OFFICER,
    "POST /v1/dedup/scans/{}/pause": OFFICER,
    "POST /v1/dedup/scans/{}/resume": OFFICER,
    "POST /v1/dedup/scans/{}/cancel": OFFICER,
    "POST /v1/dedup/scans/{}/cases": OFFICER,
    "GET /v1/audit/events": AUDITOR | ADMIN,
    "GET /v1/audit/events/{}": AUDITOR | ADMIN,
    "GET /v1/audit/checkpoint": AUDITOR | ADMIN,
    "GET /v1/audit/proofs/inclusion": AUDITOR | ADMIN,
    "GET /v1/audit/proofs/consistency": AUDITOR | ADMIN,
    "GET /v1/audit/export": AUDITOR | ADMIN,
    "GET /v1/system": ADMIN,
}


@dataclass(frozen=True, slots=True)
class Scene:
    """Somebody in a gallery, with a suspect and a case about them: what paths and bodies name."""

    gallery: str
    identity: Page
    suspect: Page

    def path(self, call: str) -> str:
        """The call's path with this scene's ids."""
        path = call.partition(" ")[2]
        ids = {
            "/v1/galleries/{}": [self.gallery],
            "/v1/dedup/jobs/{}": [self.identity["dedup"]["job_id"]],
            "/v1/dedup/cases/{}": [self.suspect["dedup"]["case_id"]],
            "/v1/identities/{}": [self.identity["id"], self.identity["samples"][0]["id"]],
        }
        found = next((ids[start] for start in ids if path.startswith(start)), [NOBODY, NOBODY])
        for one in found:
            path = path.replace("{}", one, 1)
        return path

    def request(self, call: str) -> Page:
        """A body that would do harm, or good, if the caller were let in."""
        photo = people()[1].photo
        with_photo = {
            "POST /v1/identities": {"gallery": self.gallery},
            "POST /v1/identities/{}/samples": {},
            "POST /v1/verifications": {"identity_id": self.identity["id"]},
            "POST /v1/identifications": {"gallery": self.gallery},
            "POST /v1/faces/detect": {},
            "POST /v1/faces/quality": {"gallery": self.gallery},
        }
        if call in with_photo:
            return {"files": [part(again(photo))], "data": with_photo[call]}
        if call == "POST /v1/comparisons":
            both = [part(photo, "photo_a"), part(photo, "photo_b")]
            return {"files": both, "data": {"gallery": self.gallery}}
        bodies: dict[str, Page] = {
            "POST /v1/users": {"username": "intruder", "password": "a long password", "roles": ["admin"]},
            "POST /v1/clients": {"name": "intruder"},
            "PATCH /v1/users/{}": {"roles": ["admin"]},
            "PATCH /v1/clients/{}": {"galleries": None},
            "POST /v1/galleries": {"name": "intruder"},
            "PATCH /v1/galleries/{}": {"policy": {"verify_threshold": 0.01}},
            "PATCH /v1/identities/{}": {"full_name": "Intruder"},
            "POST /v1/identities/{}/revoke": {"reason": "x"},
            "POST /v1/identities/{}/reinstate": {"reason": "x"},
            "POST /v1/dedup/cases/{}/decision": {"decision": "distinct", "reason": "x"},
        }
        return {"json": bodies[call]} if call in bodies else {}


@pytest.fixture(scope="module")
def scene(service: Service) -> Scene:
    """A gallery with somebody in it who was enrolled twice."""
    return set_up(service)


def set_up(service: Service) -> Scene:
    """Build it."""
    gallery, person = new_gallery(service), people()[1]
    return Scene(gallery, enrol(service, gallery, person.photo), enrol(service, gallery, person.selfie))


@pytest.fixture(scope="module")
def callers(service: Service) -> Iterator[dict[str, httpx.Client]]:
    """One caller per role, all of whom may see every gallery; and one without a token."""
    with (
        user_with(service, "admin") as admin,
        user_with(service, "officer") as officer,
        user_with(service, "auditor") as auditor,
        app_with(service) as app,
    ):
        yield {"admin": admin, "officer": officer, "auditor": auditor, "relying_app": app, "": service.anonymous}


def test_the_table_names_every_call_of_the_service(service: Service) -> None:
    paths = service.anonymous.get("/openapi.json").json()["paths"]
    offered = {f"{m.upper()} {re.sub(r'{[^}]*}', '{}', path)}" for path, methods in paths.items() for m in methods}
    # One's own password is changed in a test of its own: it would end the caller's other logins.
    assert offered - {"POST /v1/auth/password"} == set(MAY)


@pytest.mark.parametrize("call", [call for call, roles in MAY.items() if roles != NEEDS_NOBODY])
def test_whoever_may_not_call_is_refused_whatever_they_send(
    callers: dict[str, httpx.Client], scene: Scene, call: str
) -> None:
    method = call.partition(" ")[0]
    for role, caller in callers.items():
        if role in MAY[call]:
            continue
        status, slug = (403, "forbidden") if role else (401, "unauthenticated")
        answer = caller.request(method, scene.path(call), **scene.request(call))
        problem(answer, status, slug)
        assert ("www-authenticate" in answer.headers) == (status == 401)


@pytest.mark.parametrize("call", [call for call, roles in MAY.items() if roles != NEEDS_NOBODY])
def test_whoever_may_call_is_let_in(service: Service, callers: dict[str, httpx.Client], call: str) -> None:
    method, _, path = call.partition(" ")
    # On nobody and nothing, so that nothing is changed: what counts is that the role is not in the way.
    path = path.replace("{}", NOBODY)
    for role in MAY[call]:
        answer = callers[role].request(method, path)
        assert answer.status_code in {200, 404, 409, 415, 422, 501, 503} - {503}, (role, answer.text)


@pytest.mark.parametrize("role", ["officer", "relying_app", "admin"])
def test_what_lies_in_a_foreign_gallery_is_not_found_whatever_is_asked(
    service: Service, scene: Scene, role: str
) -> None:
    starts = ("/v1/galleries/", "/v1/identities/{}", "/v1/dedup/jobs", "/v1/dedup/cases/")
    foreign = [
        call
        for call, roles in MAY.items()
        if role in roles
        and (
            call.partition(" ")[2].startswith(starts)
            or call == "POST /v1/verifications"
            or "gallery" in scene.request(call).get("data", {})
        )
    ]
    assert foreign
    own = new_gallery(service)
    seen_by = app_with(service, galleries=[own]) if role == "relying_app" else user_with(service, role, galleries=[own])
    with seen_by as caller:
        for call in foreign:
            answer = caller.request(call.partition(" ")[0], scene.path(call), **scene.request(call))
            problem(answer, 404, "not-found")


def test_refused_requests_change_nothing(service: Service, scene: Scene) -> None:
    assert service.officer.get(f"/v1/identities/{scene.identity['id']}").json() == scene.identity
    assert service.officer.get(f"/v1/identities/{scene.suspect['id']}").json() == scene.suspect
    case = service.officer.get(f"/v1/dedup/cases/{scene.suspect['dedup']['case_id']}").json()
    assert (case["state"], case["version"]) == ("open", 1)
    names = {user["username"] for user in service.admin.get("/v1/users", params={"limit": 200}).json()["items"]}
    assert "intruder" not in names
    problem(service.admin.get("/v1/galleries/intruder"), 404, "not-found")


def test_two_roles_may_do_what_either_may(service: Service) -> None:
    with user_with(service, "officer", "auditor") as both:
        assert both.get("/v1/identities").status_code == 200
        assert both.get("/v1/audit/events").status_code == 200
        problem(both.get("/v1/users"), 403, "forbidden")
        assert both.get("/v1/auth/me").json()["roles"] == ["auditor", "officer"]


def test_a_role_taken_away_or_an_account_removed_ends_at_once(service: Service) -> None:
    with user_with(service, "officer") as officer:
        user_id = officer.get("/v1/auth/me").json()["id"]
        assert officer.get("/v1/identities").status_code == 200
        service.admin.patch(f"/v1/users/{user_id}", json={"roles": ["auditor"]})
        settled(officer, "/v1/identities")
    with user_with(service, "officer") as officer:
        user_id = officer.get("/v1/auth/me").json()["id"]
        assert service.admin.delete(f"/v1/users/{user_id}").status_code == 204
        settled(officer, "/v1/auth/me")


def settled(caller: httpx.Client, path: str) -> None:
    """The token stops to hold within the second that the contract of a revocation gives every process."""
    began = httpx.get(f"{caller.base_url}/health").elapsed
    for _ in range(400):
        answer = caller.get(path)
        if answer.status_code != 200:
            problem(answer, 401, "unauthenticated")
            return
    raise AssertionError(f"still let in, {began} a request")
