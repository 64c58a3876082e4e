"""The audit log over HTTP: every action and every refusal, found again, without anything that must not be there."""

import csv
import io
import json
import time
from datetime import datetime, timedelta

import httpx
import pytest

from app.domain.log_check import Head, check_export
from app.domain.merkle import proves_inclusion
from tests.e2e.builders import (
    NOBODY,
    Page,
    Service,
    enrol,
    identify,
    part,
    people,
    problem,
    unique,
    user_with,
    verify,
)

EVENT_FIELDS = {
    "id", "seq", "time", "actor", "action", "subject", "outcome", "gallery", "request_id", "detail", "leaf_hash",
}  # fmt: skip
#: What stands in an export besides, to check it with.
PROVING_FIELDS = {"personal", "skipped", "end"}


NUMBERED_WITHIN_SECONDS = 10.0


def events(service: Service, **query: str) -> list[Page]:
    """The newest events that fit."""
    answer = service.auditor.get("/v1/audit/events", params=query)
    assert answer.status_code == 200, answer.text
    found: list[Page] = answer.json()["items"]
    return found


def numbered(service: Service, **query: str) -> list[Page]:
    """The newest events that fit, once each has its place in the log."""
    deadline = time.monotonic() + NUMBERED_WITHIN_SECONDS
    while True:
        found = events(service, **query)
        if all(event["seq"] is not None for event in found):
            return found
        assert time.monotonic() < deadline
        time.sleep(0.1)


def audit_keys(service: Service) -> dict[str, bytes]:
    """The public keys of tree heads."""
    keys = service.auditor.get("/v1/audit/keys").json()["keys"]
    return {key["key_id"]: bytes.fromhex(key["public_key"]) for key in keys}


def me(caller: httpx.Client) -> str:
    """The caller's id."""
    return str(caller.get("/v1/auth/me").json()["id"])


def test_the_story_of_a_person_stands_in_the_log(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    path = f"/v1/identities/{made['id']}"
    service.officer.patch(path, json={"full_name": "A"})
    service.officer.get(f"{path}/samples/{made['samples'][0]['id']}/photo")
    service.officer.post(f"{path}/samples", files=[part(person.selfie)])
    verify(service.app, person.selfie, identity_id=made["id"])
    service.officer.post(f"{path}/revoke", json={"reason": "lost"})
    service.officer.delete(path, params={"reason": "asked for"})
    told = events(service, subject=made["id"])
    actions = [event["action"] for event in reversed(told)]
    assert actions.pop(-3 - actions[::-1].index("dedup.verdict") + 2) == "dedup.verdict"
    assert [action for action in actions if action != "dedup.verdict"] == [
        "identity.enrol", "identity.update", "identity.photo.view", "sample.add", "face.verify", "identity.revoke",
        "identity.erase",
    ]  # fmt: skip
    for event in told:
        assert set(event) == EVENT_FIELDS
        assert set(event["actor"]) == {"kind", "id", "name", "ip"}
        assert event["subject"] == {"kind": "identity", "id": made["id"]}
        assert (event["outcome"], event["gallery"]) == ("success", gallery)
    by_whom = {event["action"]: event["actor"] for event in told}
    assert by_whom["identity.enrol"]["id"] == me(service.officer)
    assert (by_whom["face.verify"]["kind"], by_whom["face.verify"]["id"]) == ("client", service.client_id)
    assert (by_whom["dedup.verdict"]["kind"], by_whom["dedup.verdict"]["id"]) == ("system", None)
    ip = by_whom["identity.enrol"]["ip"]
    assert len(bytes.fromhex(ip)) == 32, "the erasure forgot names and addresses in the events about the person"
    (login,) = events(service, action="auth.login", actor=me(service.officer), limit="1")
    assert login["actor"]["ip"] == "127.0.0.1"


def test_face_operations_are_events_that_the_answer_names(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[1].photo)
    decision = verify(service.app, people()[1].selfie, identity_id=made["id"]).json()["decision_id"]
    event = service.auditor.get(f"/v1/audit/events/{decision}").json()
    assert (event["action"], event["subject"]["id"]) == ("face.verify", made["id"])
    assert event["detail"]["match"] is True
    assert event["detail"]["score"] == round(event["detail"]["score"], 2)
    decision = identify(service.app, people()[1].photo, gallery=gallery).json()["decision_id"]
    assert service.auditor.get(f"/v1/audit/events/{decision}").json()["action"] == "face.identify"


def test_refusals_are_events_too(service: Service, gallery: str) -> None:
    with user_with(service, "officer", galleries=[]) as stranger:
        made = enrol(service, gallery, people()[0].photo)
        problem(stranger.delete(f"/v1/identities/{made['id']}", params={"reason": "asked for"}), 404, "not-found")
        problem(stranger.get("/v1/users"), 403, "forbidden")
        problem(stranger.get("/v1/audit/events"), 403, "forbidden")
        told = {
            (e["action"], e["outcome"]): e for e in events(service, actor=me(stranger)) if e["action"] != "auth.login"
        }
    assert set(told) == {("identity.erase", "failure"), ("user.list", "denied"), ("audit.read", "denied")}
    assert told["user.list", "denied"]["detail"] == {"problem": "forbidden", "status": 403}
    assert told["identity.erase", "failure"]["subject"]["id"] == made["id"]


def test_a_refused_photo_is_an_event(service: Service, gallery: str) -> None:
    request_id = unique("rid")
    answer = service.officer.post(
        "/v1/identities",
        files=[part(b"\xff\xd8\xff no photo")],
        data={"gallery": gallery},
        headers={"X-Request-ID": request_id},
    )
    problem(answer, 422, "undecodable-image")
    newest = events(service, action="identity.enrol", outcome="failure", gallery=gallery)[0]
    assert newest["request_id"] == request_id
    assert newest["detail"]["problem"] == "undecodable-image"


def test_logins_are_events_and_failed_ones_name_the_account(service: Service) -> None:
    name, password = unique("user"), unique("a long password")
    body = {"username": name, "password": password, "roles": ["officer"]}
    user_id = service.admin.post("/v1/users", json=body).json()["id"]

    def log_in(secret: str) -> int:
        form = {"grant_type": "password", "username": name, "password": secret}
        return service.anonymous.post("/v1/auth/token", data=form).status_code

    assert (log_in("wrong password"), log_in(password)) == (400, 200)
    assert [e["outcome"] for e in events(service, action="auth.login", subject=user_id)] == ["success", "denied"]


def test_events_are_filtered_and_paged(service: Service, gallery: str) -> None:
    made = [enrol(service, gallery, person.photo)["id"] for person in people()[:3]]
    query = {"gallery": gallery, "action": "identity.enrol", "outcome": "success", "actor": me(service.officer)}
    told = numbered(service, **query)
    assert [event["subject"]["id"] for event in told] == made[::-1]
    page = service.auditor.get("/v1/audit/events", params={**query, "limit": "2"}).json()
    rest = service.auditor.get("/v1/audit/events", params={**query, "limit": "2", "cursor": page["next_cursor"]}).json()
    assert page["items"] + rest["items"] == told
    assert rest["next_cursor"] is None
    middle = told[1]["time"]
    assert events(service, **query, after=middle) == told[:2]
    assert events(service, **query, before=middle) == told[2:]
    assert events(service, **query, subject=made[0]) == told[2:]
    problem(service.auditor.get("/v1/audit/events", params={"outcome": "maybe"}), 422, "validation")
    problem(service.auditor.get("/v1/audit/events", params={"after": "soon"}), 422, "validation")
    problem(service.auditor.get(f"/v1/audit/events/{NOBODY}"), 404, "not-found")
    problem(service.auditor.get("/v1/audit/events/123456789"), 404, "not-found")


def test_the_export_holds_every_event_of_a_time_and_is_an_event_itself(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[1].photo)
    told = events(service, subject=made["id"])
    after = told[-1]["time"]
    before = (datetime.fromisoformat(told[0]["time"]) + timedelta(milliseconds=1)).isoformat()
    answer = service.auditor.get("/v1/audit/export", params={"after": after, "before": before})
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert {frozenset(line) for line in lines} == {frozenset(EVENT_FIELDS | PROVING_FIELDS)}
    numbered = events(service, subject=made["id"])
    shown = [{name: line[name] for name in EVENT_FIELDS} for line in lines if line["subject"]["id"] == made["id"]]
    assert shown == sorted(numbered, key=lambda event: event["seq"])
    assert [line["seq"] for line in lines] == sorted(line["seq"] for line in lines)
    assert (
        check_export(answer.content.splitlines(keepends=True), "ndjson", audit_keys(service), is_partial=True).findings
        == []
    )
    exports = events(service, action="audit.export", actor=me(service.auditor))
    assert exports[0]["detail"] == {"format": "ndjson"}
    problem(service.auditor.get("/v1/audit/export", params={"format": "xml"}), 422, "validation")


def test_h96_the_whole_log_is_proved_against_a_head_that_was_signed_before(service: Service, gallery: str) -> None:
    enrol(service, gallery, people()[2].photo)
    head = Head.of(service.auditor.get("/v1/audit/checkpoint").json())
    lines = service.auditor.get("/v1/audit/export").content.splitlines(keepends=True)
    report = check_export(lines, "ndjson", audit_keys(service), [head])
    assert (report.findings, report.heads, report.left_out) == ([], 2, [])
    event = json.loads(lines[-1])
    proof = service.auditor.get("/v1/audit/proofs/inclusion", params={"seq": event["seq"]}).json()
    path = [bytes.fromhex(hash_) for hash_ in proof["path"]]
    newest = service.auditor.get("/v1/audit/checkpoint").json()
    if proof["size"] == newest["size"]:
        root = bytes.fromhex(newest["root_hash"])
        assert proves_inclusion(bytes.fromhex(event["leaf_hash"]), event["seq"], proof["size"], path, root)


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)"])
def test_h45_a_sheet_runs_nothing_of_the_export(service: Service, name: str) -> None:
    body = {"username": name, "password": unique("a long password"), "roles": ["officer"]}
    made = service.admin.post("/v1/users", json=body)
    assert made.status_code == 201, made.text
    form = {"grant_type": "password", "username": name, "password": body["password"]}
    assert service.anonymous.post("/v1/auth/token", data=form).status_code == 200
    user_id = made.json()["id"]
    after = events(service, subject=user_id)[-1]["time"]
    answer = service.auditor.get("/v1/audit/export", params={"format": "csv", "after": after})
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.reader(io.StringIO(answer.text)))
    assert set(rows[0]) == EVENT_FIELDS | PROVING_FIELDS
    cells = [cell for row in rows[1:] for cell in row]
    assert [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))] == []
    assert service.admin.delete(f"/v1/users/{user_id}").status_code == 204


def test_no_event_holds_a_secret_or_a_fine_score(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo, full_name="Zebedee Quux", external_ref="PASSPORT-XYZ")
    verify(service.officer, person.selfie, identity_id=made["id"])
    identify(service.officer, person.selfie, gallery=gallery)
    password = unique("a long password")
    with user_with(service, "officer") as officer:
        token = officer.headers["Authorization"].removeprefix("Bearer ")
    form = {"grant_type": "password", "username": "nobody", "password": password}
    service.anonymous.post("/v1/auth/token", data=form)
    whole = service.auditor.get("/v1/audit/export").text
    for secret in ("Zebedee", "PASSPORT-XYZ", password, token):
        assert secret not in whole
    for line in map(json.loads, whole.splitlines()):
        for name in ("score", "best_score"):
            score = line["detail"].get(name)
            assert score is None or score == round(score, 2)


def test_an_auditor_reads_the_log_and_sees_nobody(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[1].photo)
    sample = made["samples"][0]["id"]
    for path in (
        "/v1/identities", f"/v1/identities/{made['id']}", f"/v1/identities/{made['id']}/samples/{sample}/photo",
        "/v1/galleries", "/v1/dedup/cases", f"/v1/dedup/jobs/{made['dedup']['job_id']}", "/v1/users", "/v1/system",
    ):  # fmt: skip
        problem(service.auditor.get(path), 403, "forbidden")


def test_an_auditor_of_one_gallery_reads_its_events_only(service: Service, gallery: str) -> None:
    enrol(service, gallery, people()[1].photo)
    other = events(service, action="auth.login")[0]
    with user_with(service, "auditor", galleries=[gallery]) as auditor:
        told = auditor.get("/v1/audit/events").json()["items"]
        assert {event["gallery"] for event in told} == {gallery}
        problem(auditor.get("/v1/audit/events", params={"gallery": "default"}), 404, "not-found")
        problem(auditor.get(f"/v1/audit/events/{other['id']}"), 404, "not-found")
        lines = auditor.get("/v1/audit/export").text.splitlines()
        assert {json.loads(line)["gallery"] for line in lines} == {gallery}
