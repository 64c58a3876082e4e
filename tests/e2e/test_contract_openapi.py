"""The generated OpenAPI document agrees with the contract: every call is there, and tells what it may answer."""

import re
from collections.abc import Iterator

import pytest

from tests.e2e.builders import Page, Service

#: Every call of the contract, by the status of its success. 501: part of the contract, not built yet.
CALLS = {
    "POST /v1/auth/token": 200,
    "POST /v1/auth/revoke": 200,
    "GET /v1/auth/me": 200,
    "POST /v1/auth/totp": 201,
    "POST /v1/auth/totp/confirm": 204,
    "DELETE /v1/auth/totp": 204,
    "POST /v1/auth/password": 204,
    "GET /.well-known/jwks.json": 200,
    "GET /v1/users": 200,
    "POST /v1/users": 201,
    "GET /v1/users/{}": 200,
    "PATCH /v1/users/{}": 200,
    "DELETE /v1/users/{}": 204,
    "GET /v1/clients": 200,
    "POST /v1/clients": 201,
    "GET /v1/clients/{}": 200,
    "PATCH /v1/clients/{}": 200,
    "DELETE /v1/clients/{}": 204,
    "POST /v1/clients/{}/rotate": 200,
    "GET /v1/galleries": 200,
    "POST /v1/galleries": 201,
    "GET /v1/galleries/{}": 200,
    "PATCH /v1/galleries/{}": 200,
    "POST /v1/galleries/{}/pending/agree": 200,
    "POST /v1/galleries/{}/pending/cancel": 200,
    "DELETE /v1/galleries/{}": 204,
    "POST /v1/identities": 202,
    "GET /v1/identities": 200,
    "GET /v1/identities/{}": 200,
    "PATCH /v1/identities/{}": 200,
    "DELETE /v1/identities/{}": 200,
    "POST /v1/identities/{}/samples": 202,
    "DELETE /v1/identities/{}/samples/{}": 200,
    "GET /v1/identities/{}/samples/{}/photo": 200,
    "GET /v1/identities/{}/samples/{}/crop": 200,
    "POST /v1/identities/{}/screen": 202,
    "POST /v1/identities/{}/revoke": 200,
    "POST /v1/identities/{}/reinstate": 200,
    "POST /v1/identities/{}/attempts:reset": 200,
    "GET /v1/identities/{}/export": 200,
    "POST /v1/identities/import": 501,
    "GET /v1/imports/{}": 501,
    "GET /v1/imports/{}/results": 501,
    "GET /v1/proposals": 200,
    "GET /v1/proposals/{}": 200,
    "POST /v1/proposals/{}/agree": 200,
    "POST /v1/proposals/{}/withdraw": 200,
    "POST /v1/verifications": 200,
    "POST /v1/identifications": 200,
    "POST /v1/comparisons": 200,
    "POST /v1/faces/detect": 200,
    "POST /v1/faces/quality": 200,
    "POST /v1/challenges": 201,
    "POST /v1/faces/detect:batch": 501,
    "POST /v1/verifications:batch": 501,
    "GET /v1/dedup/jobs/{}": 200,
    "GET /v1/dedup/cases": 200,
    "GET /v1/dedup/cases/{}": 200,
    "POST /v1/dedup/cases/{}/decision": 200,
    "POST /v1/dedup/scans": 202,
    "GET /v1/dedup/scans/{}": 200,
    "GET /v1/dedup/scans/{}/pairs": 200,
    "GET /v1/dedup/scans/{}/clusters": 200,
    "POST /v1/dedup/scans/{}/pause": 200,
    "POST /v1/dedup/scans/{}/resume": 200,
    "POST /v1/dedup/scans/{}/cancel": 200,
    "POST /v1/dedup/scans/{}/cases": 200,
    "GET /v1/audit/events": 200,
    "GET /v1/audit/events/{}": 200,
    "GET /v1/audit/checkpoint": 200,
    "GET /v1/audit/keys": 200,
    "GET /v1/audit/proofs/inclusion": 200,
    "GET /v1/audit/proofs/consistency": 200,
    "GET /v1/audit/export": 200,
    "GET /health": 200,
    "GET /ready": 200,
    "GET /metrics": 200,
    "GET /v1/system": 200,
}
OPEN_TO_ALL = {"/v1/auth/token", "/v1/auth/revoke", "/.well-known/jwks.json", "/health", "/ready", "/metrics"}
TAKES_PHOTOS = {
    "POST /v1/identities", "POST /v1/identities/{}/samples", "POST /v1/verifications", "POST /v1/identifications",
    "POST /v1/comparisons", "POST /v1/faces/detect", "POST /v1/faces/quality",
}  # fmt: skip
PHOTO_SLUGS = {
    "no-face", "multiple-faces", "face-too-small", "face-cropped", "low-quality", "not-live", "undecodable-image",
    "animated-image",
}  # fmt: skip


@pytest.fixture(scope="module")
def calls(service: Service) -> dict[str, Page]:
    """The documented operations by `METHOD /path/{}`."""
    document = service.anonymous.get("/openapi.json").json()

    def listed() -> Iterator[tuple[str, Page]]:
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                yield f"{method.upper()} {re.sub(r'{[^}]*}', '{}', path)}", operation

    return dict(listed())


def test_the_document_holds_the_contract_s_calls_and_no_others(calls: dict[str, Page]) -> None:
    assert set(calls) == set(CALLS)


def test_each_call_tells_the_status_of_its_success(calls: dict[str, Page]) -> None:
    assert {call: str(status) for call, status in CALLS.items() if str(status) not in calls[call]["responses"]} == {}


def test_each_guarded_call_tells_that_it_may_refuse_the_caller(calls: dict[str, Page]) -> None:
    for call, operation in calls.items():
        path = call.partition(" ")[2]
        documented = {"401", "403"} & set(operation["responses"])
        assert path in OPEN_TO_ALL or documented == {"401", "403"}, call
        assert path in OPEN_TO_ALL or operation["security"], call


def test_each_call_about_one_thing_tells_that_it_may_be_missing(calls: dict[str, Page]) -> None:
    for call, operation in calls.items():
        assert "{}" not in call or "404" in operation["responses"] or CALLS[call] == 501, call


def test_each_call_that_takes_photos_tells_how_photos_are_refused(calls: dict[str, Page]) -> None:
    for call in TAKES_PHOTOS:
        answers = calls[call]["responses"]
        assert {"413", "415", "422", "503"} <= set(answers), call
        assert set(re.findall(r"`([^`]*)`", answers["422"]["description"])) >= PHOTO_SLUGS, call
        assert set(calls[call]["requestBody"]["content"]) == {"multipart/form-data", "application/json"}


def test_problems_are_documented_with_their_media_type(calls: dict[str, Page]) -> None:
    for call, operation in calls.items():
        for status, answer in operation["responses"].items():
            is_ours = status >= "400" and call not in ("GET /ready", "POST /v1/auth/token")
            assert not is_ours or "application/problem+json" in answer["content"], (call, status)


def test_the_pages_of_the_document_need_no_other_server(service: Service) -> None:
    for page in ("/docs", "/redoc"):
        answer = service.anonymous.get(page)
        assert answer.status_code == 200
        assert re.findall(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", answer.text) == []
    assert service.anonymous.get("/").headers["content-type"].startswith("text/html")
