"""Who asks about names that nobody has: counted, with an alarm, and beyond the budget no answer tells who is known."""

from collections.abc import AsyncIterator

import httpx
import pytest

from app.documents.base import now
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.runtime import Runtime
from tests.builders import active, portrait
from tests.support.callers import app_on, http_of, token_of

BLANK, STRANGER = portrait(), portrait("stranger", capture=7)
NOBODY = "01a1fc00-0000-7000-8000-000000000000"


@pytest.fixture
async def application(runtime: Runtime, cheap_passwords: None) -> AsyncIterator[httpx.AsyncClient]:
    """A relying application that may see the gallery `default`, and ask about five unknown names an hour."""
    runtime.settings.unknown_names_per_hour = 5
    app = app_on(runtime)
    async with http_of(app, await token_of(runtime, app, "kiosk", "relying_app", ("default",))) as http:
        yield http


async def _claim(
    http: httpx.AsyncClient, photo: bytes, headers: dict[str, bytes] | None = None, **fields: str
) -> tuple[int, str]:
    answer = await http.post("/v1/verifications", data=fields, files={"photo": photo}, headers=headers)
    return answer.status_code, str(answer.json().get("type", "")).rpartition("/")[2]


async def test_a20_references_tried_with_a_blank_photo_run_into_the_budget_and_raise_an_alarm(
    runtime: Runtime, application: httpx.AsyncClient
) -> None:
    await active(runtime, "ann", external_ref="NID-399")
    answers = [(await _claim(application, BLANK, external_ref=f"NID-{number}")) for number in range(400)]
    assert answers[:5] == [(404, "not-found")] * 5
    assert answers[5:] == [(429, "rate-limited")] * 395, "the known one among them too"
    (alarm,) = await AuditEvent.find({"action": "face.alarm"}).to_list()
    assert (alarm.subject.kind, alarm.detail) == ("client", {"unknown_names": 5})
    events = await AuditEvent.find({"action": "face.verify"}).to_list()
    assert len(events) == 400
    assert not any("NID-" in event.model_dump_json() for event in events)


async def test_a20_beyond_the_budget_one_face_asks_about_few_names_known_or_not(
    runtime: Runtime, application: httpx.AsyncClient
) -> None:
    runtime.settings.probe_identities_per_hour = 3
    known = [await active(runtime, name, external_ref=f"NID-{name}") for name in ("ann", "bob", "cat", "dan")]
    for number in range(5):
        await _claim(application, STRANGER, external_ref=f"NID-{number}")
    names = ["NID-ann", "NID-6", "NID-7", "NID-8", "NID-bob", "NID-cat", "NID-9"]
    answers = [(await _claim(application, STRANGER, external_ref=name))[0] for name in names]
    assert answers == [200, 404, 404, 429, 429, 429, 429]
    assert (await _claim(application, portrait("dan", capture=8), external_ref="NID-dan"))[0] == 200, (
        "honest ones go on"
    )
    assert known


@pytest.mark.parametrize("policy", [{}, {"require_nonce": True}])
async def test_a20_beyond_the_budget_no_fault_of_a_claim_tells_who_is_known(
    runtime: Runtime, application: httpx.AsyncClient, policy: dict[str, object]
) -> None:
    await active(runtime, "ann", external_ref="NID-ann")
    for number in range(5):
        await _claim(application, BLANK, external_ref=f"NID-{number}")
    fields = {f"policy.{name}": value for name, value in policy.items()}
    if fields:
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": fields})
    faults: list[dict[str, str]] = [{}, {"audience": "https://other.example"}, {"nonce": "idem-nonce-made-up"}]
    for fault in faults:
        known, unknown = [
            await _claim(application, BLANK, external_ref=name, **fault) for name in ("NID-ann", "NID-77")
        ]  # fmt: skip
        assert known == unknown
        assert known[0] in {409, 422, 429}


@pytest.mark.parametrize("key", ["used before", "unprintable \xa0"])
async def test_a20_an_idempotency_key_does_not_tell_who_is_known(
    application: httpx.AsyncClient, runtime: Runtime, key: str
) -> None:
    for name in ("ann", "bob"):
        await active(runtime, name, external_ref=f"NID-{name}")
    headers = {"Idempotency-Key": key.encode("latin-1")}
    await _claim(application, portrait("bob", capture=3), headers, external_ref="NID-bob")
    for budget_is_spent in (False, True):
        if budget_is_spent:
            for number in range(5):
                await _claim(application, BLANK, external_ref=f"NID-{number}")
        known, unknown = [
            await _claim(application, BLANK, headers, external_ref=name) for name in ("NID-ann", "NID-77")
        ]
        assert known == unknown
        assert known[0] == 422


async def test_a20_beyond_the_budget_used_up_attempts_do_not_tell_who_is_known(
    runtime: Runtime, application: httpx.AsyncClient
) -> None:
    ann = await active(runtime, "ann", external_ref="NID-ann")
    spent = {"attempts.consecutive": 50, "attempts.last_failure": now()}
    await type(ann).get_pymongo_collection().update_one({"_id": ann.id}, {"$set": spent})
    assert (await _claim(application, BLANK, external_ref="NID-ann")) == (429, "attempts-exhausted")
    for number in range(5):
        await _claim(application, BLANK, external_ref=f"NID-{number}")
    known, unknown = [await _claim(application, BLANK, external_ref=name) for name in ("NID-ann", "NID-77")]
    assert known == unknown == (429, "rate-limited")


async def test_a20_foreign_and_unknown_ids_count_as_unknown_names(
    runtime: Runtime, application: httpx.AsyncClient
) -> None:
    other = await runtime.create_gallery("other", runtime.starting_policy())
    ann = await active(runtime, "ann")
    await type(ann).get_pymongo_collection().update_one({"_id": ann.id}, {"$set": {"gallery_id": other.id}})
    for id_ in (ann.id, NOBODY, "no id", ann.id, NOBODY):
        assert await _claim(application, STRANGER, identity_id=id_) == (404, "not-found")
    for id_ in (ann.id, NOBODY):
        assert await _claim(application, BLANK, identity_id=id_) == (429, "rate-limited")


async def test_a20_challenges_about_unknown_people_count_and_others_go_on(
    runtime: Runtime, application: httpx.AsyncClient
) -> None:
    ann = await active(runtime, "ann")

    async def asked(**fields: str) -> int:
        return (await application.post("/v1/challenges", json={"gallery": "default", **fields})).status_code

    assert await asked(identity_id=ann.id) == 201
    assert [await asked(identity_id=NOBODY) for _ in range(7)] == [404] * 5 + [429] * 2
    assert await asked(identity_id=ann.id) == 429, "known or not"
    assert await asked() == 201


async def test_a20_officers_have_no_such_budget(runtime: Runtime, cheap_passwords: None) -> None:
    runtime.settings.unknown_names_per_hour = 2
    app = app_on(runtime)
    async with http_of(app, await token_of(runtime, app, "desk", "officer", None)) as http:
        answers = {(await _claim(http, BLANK, external_ref=f"NID-{number}"))[0] for number in range(5)}
    assert answers == {404}
    assert await AuditEvent.find({"action": "face.alarm"}).count() == 0
