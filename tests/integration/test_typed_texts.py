"""What people type (reasons, nonces, things in the place of an id) is in no leaf of the audit log, and erasure deletes it."""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import jwt
import pytest

from app.documents.cases import Case
from app.documents.deletions import Deletion
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.migrations import migrate
from app.domain.log_check import check_export
from app.runtime import Runtime
from app.use_cases.sequence import grow, kept_up, sign
from tests.builders import active, enrolled, known, portrait, screened, suspected
from tests.support.callers import app_on, http_of, token_of

Page = dict[str, Any]

#: Stands for what people type: a name, a session, an address.
SECRET = "secret-7f3a"


@dataclass(frozen=True, slots=True)
class Office:
    """Two officers, an application and an auditor."""

    one: httpx.AsyncClient
    two: httpx.AsyncClient
    app: httpx.AsyncClient
    auditor: httpx.AsyncClient


@pytest.fixture
async def office(runtime: Runtime, cheap_passwords: None) -> AsyncIterator[Office]:
    app = app_on(runtime)
    roles = {"one": "officer", "two": "officer", "app": "relying_app", "auditor": "auditor"}
    opened = Office(
        **{name: http_of(app, await token_of(runtime, app, name, role, None)) for name, role in roles.items()}
    )
    yield opened
    for caller in (opened.one, opened.two, opened.app, opened.auditor):
        await caller.aclose()


async def _second_review(*, needed: bool) -> None:
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"policy.second_review": needed}})


def _selfie(person: str, capture: int) -> Page:
    return {"photo": ("photo.png", portrait(person, capture=capture))}


async def _verified(office: Office, identity: Identity, person: str, capture: int, **headers: str) -> httpx.Response:
    fields = {"identity_id": identity.id, "nonce": f"{SECRET}-nonce"}
    return await office.app.post(
        "/v1/verifications", data=fields, files=_selfie(person, capture), headers=headers
    )  # fmt: skip


async def _lived(runtime: Runtime, office: Office) -> Identity:
    """Somebody about whom everything was typed that can be: at a revocation, a decision, a verification, a proposal."""
    ann = await screened(runtime, await enrolled(runtime, "ann", photos=2))
    newcomer, case = await suspected(runtime, "ann")
    typed = {"reason": f"{SECRET} looked"}
    answers = [
        await office.one.post(f"/v1/dedup/cases/{case.id}/decision", json={"decision": "distinct", **typed}),
        await office.one.post(f"/v1/identities/{ann.id}/revoke", json=typed),
        await office.one.post(f"/v1/identities/{ann.id}/reinstate", json=typed),
        await office.one.delete(f"/v1/identities/{ann.id}/samples/{ann.samples[1].id}", params=typed),
        await _verified(office, ann, "ann", 7),
    ]
    await _second_review(needed=True)
    answers += [
        proposed := await office.one.delete(f"/v1/identities/{ann.id}", params=typed),
        await office.one.post(f"/v1/proposals/{proposed.json()['proposal_id']}/withdraw"),
    ]
    third, open_case = await suspected(runtime, "ann", capture=3)
    about = {"decision": "distinct", "identity_id": newcomer.id, **typed}
    answers.append(await office.one.post(f"/v1/dedup/cases/{open_case.id}/decision", json=about))
    await _second_review(needed=False)
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 200, 202, 200, 200], answers
    assert answers[4].json()["match"] is True
    assert third.status == "suspected_duplicate"
    return await known(ann)


async def _stored(runtime: Runtime, *collections: str) -> dict[str, str]:
    """All documents as text, by collection; of the given ones only, where some are given."""
    database = runtime.mongo[runtime.settings.mongodb_database]
    names = collections or tuple(await database.list_collection_names())
    return {name: repr([row async for row in database[name].find()]) for name in names}


async def test_a9_what_people_type_is_in_no_leaf(runtime: Runtime, office: Office) -> None:
    await _lived(runtime, office)
    await office.one.post(f"/v1/identities/{SECRET}-id/revoke", json={"reason": SECRET})
    events = await AuditEvent.find_all().to_list()
    leaves = [json.dumps(event.leaf(0)) for event in events]
    assert not [leaf for leaf in leaves if SECRET in leaf]
    shown = (await office.auditor.get("/v1/audit/events", params={"limit": 200})).json()["items"]
    told = [(event["action"], text) for event in shown for text in _texts(event["detail"]) if SECRET in text]
    assert sorted(told) == sorted([
        ("dedup.decide", f"{SECRET} looked"), ("dedup.decide", f"{SECRET} looked"), ("face.verify", f"{SECRET}-nonce"),
        ("identity.reinstate", f"{SECRET} looked"), ("identity.revoke", f"{SECRET} looked"),
        ("proposal.create", f"{SECRET} looked"), ("sample.remove", f"{SECRET} looked"),
    ])  # fmt: skip


def _texts(detail: Page) -> list[str]:
    inner = [text for value in detail.values() if isinstance(value, dict) for text in _texts(value)]
    return inner + [value for value in detail.values() if isinstance(value, str)]


async def test_a9_erasing_the_person_deletes_what_was_typed_about_them(runtime: Runtime, office: Office) -> None:
    ann = await _lived(runtime, office)
    answer = await office.one.delete(f"/v1/identities/{ann.id}", params={"reason": f"{SECRET} asked for it"})
    assert answer.status_code == 200, answer.text
    assert [name for name, rows in (await _stored(runtime)).items() if SECRET in rows] == []
    remains = {one["what"]: one["note"] for one in answer.json()["remains"]}
    assert set(remains) == {"index_files", "wrapped_keys", "audit_events", "ledger"}
    claims = jwt.decode(answer.json()["receipt"], options={"verify_signature": False})
    assert claims["remains"][-1] == "ledger"


async def test_a9_an_agreed_erasure_deletes_its_reason_too(runtime: Runtime, office: Office) -> None:
    ann = await active(runtime, "ann")
    await _second_review(needed=True)
    proposed = await office.one.delete(f"/v1/identities/{ann.id}", params={"reason": SECRET})
    answer = await office.two.post(f"/v1/proposals/{proposed.json()['proposal_id']}/agree")
    assert answer.status_code == 200, answer.text
    assert [name for name, rows in (await _stored(runtime)).items() if SECRET in rows] == []


async def test_a9_the_receipt_says_what_events_of_an_older_version_keep(runtime: Runtime, office: Office) -> None:
    """An event is never changed: a reason that stands in its leaf stays there."""
    ann = await active(runtime, "ann")
    await office.one.post(f"/v1/identities/{ann.id}/revoke", json={"reason": "moved"})
    older = {"$set": {"detail.reason": f"{SECRET} moved", "personal.texts": []}}
    await AuditEvent.get_pymongo_collection().update_one({"action": "identity.revoke"}, older)
    answer = await office.one.delete(f"/v1/identities/{ann.id}", params={"reason": "asked for"})
    (note,) = [one["note"] for one in answer.json()["remains"] if one["what"] == "audit_texts"]
    assert "in the clear" in note
    claims = jwt.decode(answer.json()["receipt"], options={"verify_signature": False})
    assert "audit_texts" in claims["remains"]


async def test_a9_people_erased_by_an_older_version_are_forgotten_at_the_start(
    runtime: Runtime, office: Office
) -> None:
    ann = await active(runtime, "ann")
    _, case = await suspected(runtime, "ann")
    typed = {"decision": "distinct", "reason": f"{SECRET} looked"}
    assert (await office.one.post(f"/v1/dedup/cases/{case.id}/decision", json=typed)).status_code == 200
    event = await AuditEvent.find_one({"action": "dedup.decide"})
    assert event is not None
    assert event.personal is not None
    assert (await office.one.delete(f"/v1/identities/{ann.id}", params={"reason": "asked"})).status_code == 200
    # As the older version left it.
    await Case.get_pymongo_collection().update_one({"_id": case.id}, {"$set": {"reason": f"{SECRET} looked"}})
    await AuditEvent.get_pymongo_collection().update_one(
        {"_id": event.id}, {"$set": {"personal": event.personal.model_dump()}}
    )
    await Deletion.get_pymongo_collection().update_many({}, {"$unset": {"plain_texts": 1}})
    database = runtime.mongo[runtime.settings.mongodb_database]
    await migrate(database)
    assert [name for name, rows in (await _stored(runtime)).items() if SECRET in rows] == []
    before = await _stored(runtime)
    await migrate(database)
    assert await _stored(runtime) == before


async def test_a9_a_repeated_verification_has_its_nonce_also_when_the_log_has_forgotten_it(
    runtime: Runtime, office: Office
) -> None:
    ann = await active(runtime, "ann")
    first = await _verified(office, ann, "ann", 7, **{"Idempotency-Key": "k-1"})
    again = await _verified(office, ann, "ann", 7, **{"Idempotency-Key": "k-1"})
    assert await AuditEvent.forget_personal({}) > 0
    later = await _verified(office, ann, "ann", 7, **{"Idempotency-Key": "k-1"})
    assert first.json() == again.json() == later.json()
    claims = jwt.decode(later.json()["assertion"], options={"verify_signature": False})
    assert claims["nonce"] == f"{SECRET}-nonce"


@pytest.mark.parametrize("form", ["ndjson", "csv"])
async def test_a9_an_export_shows_typed_texts_and_is_proved_with_and_without_them(
    runtime: Runtime, office: Office, form: str
) -> None:
    await _lived(runtime, office)
    older = {"$set": {"detail": {"reason": "of an older version"}, "personal.texts": []}}
    await AuditEvent.get_pymongo_collection().update_one({"action": "identity.revoke"}, older)
    for _ in range(2):
        while await grow(runtime):
            pass
        await sign(runtime)
        (key,) = (await office.auditor.get("/v1/audit/keys")).json()["keys"]
        text = (await _export(runtime, office, form)).content
        report = check_export(text.splitlines(keepends=True), form, {key["key_id"]: bytes.fromhex(key["public_key"])})  # type: ignore[arg-type]
        assert report.findings == []
        assert b"of an older version" in text
        assert (SECRET.encode() in text) == (await AuditEvent.find({"personal.texts.0": {"$exists": True}}).count() > 0)
        await AuditEvent.forget_personal({})


async def _export(runtime: Runtime, office: Office, form: str) -> httpx.Response:
    async with kept_up(runtime):
        answer = await office.auditor.get("/v1/audit/export", params={"format": form})
    assert answer.status_code == 200, answer.text
    return answer


async def test_an_event_without_typed_text_is_stored_as_older_versions_read_it(
    runtime: Runtime, office: Office
) -> None:
    await office.one.get("/v1/identities")
    await _verified(office, await active(runtime, "ann"), "ann", 7)
    rows = await AuditEvent.get_pymongo_collection().find({"personal": {"$ne": None}}).to_list()
    kept = {row["action"]: set(row["personal"]) for row in rows}
    assert kept["auth.login"] == {"salt", "actor_name", "actor_ip", "request_id"}
    assert kept["face.verify"] == {"salt", "actor_name", "actor_ip", "request_id", "texts"}


async def test_an_access_request_shows_the_reasons_that_were_given(runtime: Runtime, office: Office) -> None:
    ann = await active(runtime, "ann")
    await office.one.post(f"/v1/identities/{ann.id}/revoke", json={"reason": "moved away"})
    page = (await office.one.get(f"/v1/identities/{ann.id}/export")).json()
    (revoked,) = [event for event in page["events"] if event["action"] == "identity.revoke"]
    assert revoked["detail"]["reason"] == "moved away"


@pytest.mark.parametrize("typed", [f"{SECRET}-RSSMRA80A01H501U", f"{SECRET}{'x' * 28_000}"])
async def test_a24_what_stands_in_an_ids_place_is_not_found_and_not_kept(
    runtime: Runtime, office: Office, typed: str
) -> None:
    admin = http_of(app_on(runtime), await token_of(runtime, app_on(runtime), "admin", "admin", None))
    for path, methods in app_on(runtime).openapi()["paths"].items():
        if "{" not in path:
            continue
        named = re.sub(r"{\w+}", typed, path)
        for method, call in methods.items():
            required = [one["name"] for one in call.get("parameters", []) if one["in"] == "query" and one["required"]]
            for caller in (office.one, office.auditor, admin):
                params, body = dict.fromkeys(required, "asked for"), _body_of(path)
                answer = await caller.request(method.upper(), named, params=params, **body)
                assert answer.status_code in (403, 404, 422, 501), (path, answer.text)
                if caller is office.one and "identity_id" in path and path.count("{") == 1:
                    assert answer.status_code == 404, (path, answer.text)
    fields = {"identity_id": typed[:64]}
    answer = await office.app.post("/v1/verifications", data=fields, files=_selfie("ann", 1))
    assert answer.status_code == 404
    answer = await office.app.post("/v1/challenges", json={"gallery": "default", **fields})
    assert answer.status_code == 404
    assert SECRET not in (await _stored(runtime, "audit_events"))["audit_events"]
    await admin.aclose()


def _body_of(path: str) -> Page:
    if path.endswith("/samples"):
        return {"files": _selfie("ann", 1)}
    bodies: dict[str, Page] = {
        "revoke": {"reason": "x"},
        "reinstate": {"reason": "x"},
        "decision": {"decision": "distinct", "reason": "x"},
    }
    return {"json": bodies.get(path.rpartition("/")[2], {})}


@pytest.mark.parametrize("typed", ["line\none", "paid \u202e001", "\x1b[2J", "nul\x00", "  ", "x" * 1001])
async def test_a24_typed_text_is_refused_where_it_hides_something(runtime: Runtime, office: Office, typed: str) -> None:
    ann = await active(runtime, "ann")
    _, case = await suspected(runtime, "ann")
    answers = [
        await office.one.post(f"/v1/identities/{ann.id}/revoke", json={"reason": typed}),
        await office.one.post(f"/v1/identities/{ann.id}/reinstate", json={"reason": typed}),
        await office.one.delete(f"/v1/identities/{ann.id}", params={"reason": typed}),
        await office.one.delete(f"/v1/identities/{ann.id}/samples/{ann.samples[0].id}", params={"reason": typed}),
        await office.one.post(f"/v1/dedup/cases/{case.id}/decision", json={"decision": "distinct", "reason": typed}),
        await office.one.post("/v1/galleries/default/pending/agree", json={"reason": typed}),
        await office.app.post(
            "/v1/verifications", data={"identity_id": ann.id, "nonce": typed}, files=_selfie("ann", 1)
        ),
    ]
    # A blank field of a form is as good as none.
    asked = answers if typed.strip() else answers[:-1]
    assert [answer.status_code for answer in asked] == [422] * len(asked)
    assert (await known(ann)).version == ann.version


async def test_a9_a_nonce_of_a_search_is_deleted_with_the_person_whom_it_found(
    runtime: Runtime, office: Office
) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    for person in ("ann", "bob"):
        fields = {"gallery": "default", "nonce": f"{SECRET}-{person}"}
        answer = await office.app.post("/v1/identifications", data=fields, files=_selfie(person, 5))
        assert [one["rank"] for one in answer.json()["candidates"]] == [1], answer.text
    answer = await office.one.delete(f"/v1/identities/{ann.id}", params={"reason": "asked"})
    assert answer.status_code == 200
    stored = (await _stored(runtime, "audit_events"))["audit_events"]
    assert (f"{SECRET}-ann" in stored, f"{SECRET}-bob" in stored) == (False, True)
    asked = {"detail.best_identity_id": {"$in": [bob.id], "$type": "string"}, "personal": {"$ne": None}}
    plan = await AuditEvent.get_pymongo_collection().find(asked).explain()
    assert plan["executionStats"]["totalDocsExamined"] == 1
