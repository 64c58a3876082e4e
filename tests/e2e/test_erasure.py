"""Erasure over HTTP: unmatchable at once, gone from every answer, unreadable where it lay."""

import re
from datetime import datetime, timedelta

import jwt
import pymongo
import pytest

from tests.e2e.builders import (
    NOBODY,
    Page,
    Service,
    again,
    enrol,
    identify,
    part,
    people,
    problem,
    unique,
    verify,
)
from tests.support.stacks import RunningStack


def erase(service: Service, identity_id: str) -> Page:
    """The receipt."""
    answer = service.officer.delete(f"/v1/identities/{identity_id}", params={"reason": "asked for"})
    assert answer.status_code == 200, answer.text
    page: Page = answer.json()
    return page


def test_h71_the_receipt_tells_what_was_erased_and_what_remains_until_when(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[1].photo)
    receipt = erase(service, made["id"])
    assert set(receipt) == {
        "identity_id", "erased_at", "samples", "photos", "audit_event_id", "index_purge_by", "remains", "receipt",
    }  # fmt: skip
    assert (receipt["remains"][0]["what"], receipt["remains"][0]["until"]) == ("index_files", receipt["index_purge_by"])
    jwks = service.anonymous.get("/.well-known/jwks.json").json()
    header = jwt.get_unverified_header(receipt["receipt"])
    (key,) = [key for key in jwks["keys"] if key["kid"] == header["kid"]]
    signed = jwt.decode(receipt["receipt"], jwt.PyJWK(key).key, ["EdDSA"])
    assert (signed["sub"], signed["index_purge_by"]) == (made["id"], receipt["index_purge_by"])
    assert (receipt["identity_id"], receipt["samples"], receipt["photos"]) == (made["id"], 1, 1)
    erased_at, purge_by = (datetime.fromisoformat(receipt[name]) for name in ("erased_at", "index_purge_by"))
    assert purge_by - erased_at == timedelta(hours=24)
    event = service.auditor.get(f"/v1/audit/events/{receipt['audit_event_id']}").json()
    assert (event["action"], event["subject"]["id"]) == ("identity.erase", made["id"])
    assert re.fullmatch("[0-9a-f]{64}", event["detail"]["reason"]), "what was typed about the person is forgotten"


def test_an_erased_person_is_unmatchable_and_not_found_ever_after(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo, external_ref="R1")
    erase(service, made["id"])
    found = identify(service.app, person.selfie, gallery=gallery)
    assert (found.status_code, found.json().get("candidates")) == (200, []), found.text
    problem(verify(service.app, person.selfie, identity_id=made["id"]), 404, "not-found")
    problem(verify(service.app, person.selfie, external_ref="R1", gallery=gallery), 404, "not-found")
    path = f"/v1/identities/{made['id']}"
    for method, call in (
        ("GET", ""), ("DELETE", "?reason=again"), ("GET", f"/samples/{made['samples'][0]['id']}/photo"), ("POST", "/screen"),
    ):  # fmt: skip
        problem(service.officer.request(method, path + call), 404, "not-found")
    problem(service.officer.post(f"{path}/samples", files=[part(person.selfie)]), 404, "not-found")
    problem(service.officer.get(f"/v1/dedup/jobs/{made['dedup']['job_id']}"), 404, "not-found")
    assert service.officer.get("/v1/identities", params={"gallery": gallery}).json()["items"] == []
    assert service.officer.get(f"/v1/galleries/{gallery}").json()["counts"] == {"identities": 0, "samples": 0}


def test_h70_an_erased_person_may_come_back_under_the_same_reference(service: Service, gallery: str) -> None:
    person = people()[1]
    erase(service, enrol(service, gallery, person.photo, external_ref="R1")["id"])
    assert enrol(service, gallery, person.photo, external_ref="R1")["status"] == "active"


def test_h71_nothing_readable_of_the_person_stays(service: Service, stack: RunningStack, gallery: str) -> None:
    made = enrol(service, gallery, people()[1].photo, full_name="Nobody Anymore")
    photos = [path for path in stack.data_dir.rglob("*") if made["samples"][0]["id"] in path.name]
    assert len(photos) == 1
    erase(service, made["id"])
    assert not photos[0].exists()
    with pymongo.MongoClient[Page](stack.ready.mongo_uri) as mongo:
        (document,) = mongo["idem"]["identities"].find({"_id": made["id"]})
        changes = list(mongo["idem"]["gallery_changes"].find({"identity_id": made["id"]}))
    assert (document["wrapped_key"], document["attributes"], document["samples"]) == (None, None, [])
    assert (document["external_ref_hash"], document["status"]) == (None, "erased")
    assert {row["kind"] for row in changes} == {"remove"}


@pytest.mark.parametrize("state", ["pending", "suspected_duplicate", "duplicate", "revoked"])
def test_an_identity_can_be_erased_in_any_state(service: Service, gallery: str, state: str) -> None:
    first = enrol(service, gallery, people()[1].photo)
    if state == "pending":
        sent = service.officer.post("/v1/identities", files=[part(people()[2].photo)], data={"gallery": gallery})
        made = sent.json()
    elif state == "revoked":
        made = service.officer.post(f"/v1/identities/{first['id']}/revoke", json={"reason": "x"}).json()
    else:
        made = enrol(service, gallery, again(people()[1].photo))
        if state == "duplicate":
            decision = {"decision": "duplicate", "identity_id": first["id"], "reason": "x"}
            service.officer.post(f"/v1/dedup/cases/{made['dedup']['case_id']}/decision", json=decision)
    erase(service, made["id"])
    problem(service.officer.get(f"/v1/identities/{made['id']}"), 404, "not-found")


def test_an_erasure_repeated_with_its_key_gets_the_same_receipt(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[1].photo)
    path, headers = f"/v1/identities/{made['id']}", {"Idempotency-Key": unique("key")}
    why = {"reason": "asked for"}
    first = service.officer.delete(path, params=why, headers=headers)
    assert first.status_code == 200
    again_asked = service.officer.delete(path, params=why, headers=headers)
    assert (again_asked.status_code, again_asked.json()) == (200, first.json())
    problem(service.officer.delete(path, params=why), 404, "not-found")
    other = service.officer.delete(f"/v1/identities/{NOBODY}", params=why, headers=headers)
    problem(other, 422, "idempotency-key-reused")
