"""If a gallery asks for two officers, erasures and changes of references are proposed first."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from pymongo.read_concern import ReadConcern

from app.documents.budgets import Erasures
from app.documents.events import AuditEvent, Personal
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.proposals import IdentityProposal
from app.documents.sealed import data_key, seal_patch
from app.domain.log_export import personal_hash
from app.runtime import Runtime
from app.use_cases.trace_reference import trace_reference
from tests.builders import active, default_gallery, enrolled, known, portrait, screened, with_sample
from tests.support.callers import app_on, former_officer_of, http_of, token_of

Page = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Desk:
    """Three officers, an officer of another gallery, and an application that had the officer's role."""

    one: httpx.AsyncClient
    two: httpx.AsyncClient
    three: httpx.AsyncClient
    stranger: httpx.AsyncClient
    machine: httpx.AsyncClient


@pytest.fixture
async def desk(runtime: Runtime, cheap_passwords: None) -> AsyncIterator[Desk]:
    """The desk of a gallery that asks for two officers."""
    await runtime.create_gallery("elsewhere", runtime.starting_policy())
    await _second_review(needed=True)
    app = app_on(runtime)
    tokens = [
        await token_of(runtime, app, "one", "officer", None),
        await token_of(runtime, app, "two", "officer", None),
        await token_of(runtime, app, "three", "officer", None),
        await token_of(runtime, app, "stranger", "officer", ("elsewhere",)),
        await former_officer_of(runtime, app, "machine"),
    ]
    opened = Desk(*(http_of(app, token) for token in tokens))
    yield opened
    for one in (opened.one, opened.two, opened.three, opened.stranger, opened.machine):
        await one.aclose()


async def _second_review(*, needed: bool) -> None:
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"policy.second_review": needed}})


async def _id_of(caller: httpx.AsyncClient) -> str:
    return str((await caller.get("/v1/auth/me")).json()["id"])


async def _erasure(caller: httpx.AsyncClient, identity: Identity, **headers: str) -> httpx.Response:
    return await caller.delete(f"/v1/identities/{identity.id}", params={"reason": "asked for"}, headers=headers)


async def _proposed(answer: httpx.Response) -> str:
    assert answer.status_code == 202, answer.text
    assert set(answer.json()) == {"proposal_id"}
    assert answer.headers["location"] == f"/v1/proposals/{answer.json()['proposal_id']}"
    return str(answer.json()["proposal_id"])


async def _agreed(caller: httpx.AsyncClient, proposal_id: str, **headers: str) -> httpx.Response:
    return await caller.post(f"/v1/proposals/{proposal_id}/agree", headers=headers)


async def _events(action: str) -> list[AuditEvent]:
    return await AuditEvent.find({"action": action, "outcome": "success"}).sort("_id").to_list()


async def _with_reference(runtime: Runtime, face: str, reference: str | None) -> Identity:
    return await screened(runtime, await enrolled(runtime, face, external_ref=reference))


async def test_a14_an_erasure_needs_a_second_officer_where_decisions_do(runtime: Runtime, desk: Desk) -> None:
    ann = await active(runtime, "ann")
    proposal_id = await _proposed(await _erasure(desk.one, ann))
    assert (await known(ann)).status == "active"
    page = (await desk.two.get(f"/v1/proposals/{proposal_id}")).json()
    assert (page["kind"], page["state"], page["identity_id"], page["samples"], page["reason"], page["is_current"]) == (
        "erasure", "open", ann.id, 1, "asked for", True,
    )  # fmt: skip
    assert page["proposed_by"] == await _id_of(desk.one)
    answer = await _agreed(desk.two, proposal_id)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["state"], answer.json()["receipt"]["identity_id"]) == ("agreed", ann.id)
    assert await Identity.living(ann.id) is None
    (event,) = await _events("identity.erase")
    assert (event.actor.id, event.detail["proposed_by"]) == (await _id_of(desk.two), await _id_of(desk.one))
    assert answer.json()["receipt"]["audit_event_id"] == event.id


async def test_without_second_review_an_erasure_is_done_at_once_and_needs_a_reason(
    runtime: Runtime, desk: Desk
) -> None:
    await _second_review(needed=False)
    ann = await active(runtime, "ann")
    for params in ({}, {"reason": ""}):
        assert (await desk.one.delete(f"/v1/identities/{ann.id}", params=params)).status_code == 422
    assert (await _erasure(desk.one, ann)).status_code == 200


async def test_who_may_agree_and_who_may_withdraw(runtime: Runtime, desk: Desk) -> None:
    ann = await active(runtime, "ann")
    proposal_id = await _proposed(await _erasure(desk.one, ann))
    for caller, status in ((desk.one, 409), (desk.machine, 403), (desk.stranger, 404)):
        assert (await _agreed(caller, proposal_id)).status_code == status
    path = f"/v1/proposals/{proposal_id}"
    assert (await desk.stranger.get(path)).status_code == 404
    assert (await desk.stranger.get("/v1/proposals")).json()["items"] == []
    assert (await desk.two.post(f"{path}/withdraw")).status_code == 403
    assert (await desk.one.post(f"{path}/withdraw")).json()["state"] == "withdrawn"
    assert (await desk.one.post(f"{path}/withdraw")).status_code == 409
    assert (await _agreed(desk.two, proposal_id)).status_code == 409
    assert (await known(ann)).status == "active"
    assert len(await _events("proposal.withdraw")) == 1


async def test_an_application_proposes_nothing(runtime: Runtime, desk: Desk) -> None:
    ann = await active(runtime, "ann")
    assert (await _erasure(desk.machine, ann)).status_code == 403


async def test_a_proposal_about_a_changed_identity_cannot_be_agreed_to(runtime: Runtime, desk: Desk) -> None:
    ann = await active(runtime, "ann")
    first = await _proposed(await _erasure(desk.one, ann))
    changed = await desk.one.patch(f"/v1/identities/{ann.id}", json={"full_name": "Ann Other"})
    assert changed.status_code == 200, "a name needs no second officer"
    answer = await _agreed(desk.two, first)
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (409, "conflict")
    assert (await desk.two.get(f"/v1/proposals/{first}")).json()["is_current"] is False
    second = await _proposed(await _erasure(desk.one, ann))
    assert second != first
    assert (await desk.two.get(f"/v1/proposals/{first}")).json()["state"] == "stale"
    assert (await _agreed(desk.two, second)).status_code == 200


async def test_proposing_the_same_again_gives_the_same_proposal(runtime: Runtime, desk: Desk) -> None:
    ann = await active(runtime, "ann")
    first = await _proposed(await _erasure(desk.one, ann))
    assert await _proposed(await _erasure(desk.one, ann)) == first
    assert await _proposed(await _erasure(desk.two, ann)) == first
    assert (await _agreed(desk.two, first)).status_code == 200


async def test_two_officers_who_ask_at_once_make_one_proposal(runtime: Runtime, desk: Desk) -> None:
    ann = await active(runtime, "ann")
    answers = await asyncio.gather(*(_erasure(one, ann) for one in (desk.one, desk.two, desk.three)))
    assert len({await _proposed(answer) for answer in answers}) == 1
    assert await IdentityProposal.find_all().count() == 1


async def test_a_key_repeats_the_proposal_and_the_agreement(runtime: Runtime, desk: Desk) -> None:
    ann = await active(runtime, "ann")
    key = {"Idempotency-Key": "one-erasure"}
    answers = [await _erasure(desk.one, ann, **key) for _ in range(2)]
    assert await _proposed(answers[0]) == await _proposed(answers[1])
    assert len(await _events("proposal.create")) == 1
    proposal_id = answers[0].json()["proposal_id"]
    agreed = [await _agreed(desk.two, proposal_id, **{"Idempotency-Key": "one-agreement"}) for _ in range(2)]
    assert [one.status_code for one in agreed] == [200, 200]
    assert agreed[0].json() == agreed[1].json()
    patch = {"external_ref": "NID-1"}
    bob = await active(runtime, "bob")
    key = {"Idempotency-Key": "one-change"}
    changes = [await desk.one.patch(f"/v1/identities/{bob.id}", json=patch, headers=key) for _ in range(2)]
    assert await _proposed(changes[0]) == await _proposed(changes[1])


async def test_two_agreements_at_once_erase_once(runtime: Runtime, desk: Desk) -> None:
    ann = await active(runtime, "ann")
    proposal_id = await _proposed(await _erasure(desk.three, ann))
    answers = await asyncio.gather(_agreed(desk.one, proposal_id), _agreed(desk.two, proposal_id))
    first, second = sorted(one.status_code for one in answers)
    assert first == 200
    assert second in (404, 409)
    assert len(await _events("identity.erase")) == 1


@pytest.mark.parametrize(("before", "after"), [(None, "NID-2"), ("NID-1", "NID-2"), ("NID-1", None)])
async def test_a19_a_reference_is_set_changed_and_removed_by_two_officers(
    runtime: Runtime, desk: Desk, before: str | None, after: str | None
) -> None:
    ann = await _with_reference(runtime, "ann", before)
    path = f"/v1/identities/{ann.id}"
    answer = await desk.one.patch(path, json={"external_ref": after, "full_name": "Ann"})
    proposal_id = await _proposed(answer)
    assert (await desk.one.get(path)).json() | {"external_ref": before, "full_name": None} == (
        await desk.one.get(path)
    ).json(), "no part of the patch applies yet"
    (listed,) = (await desk.two.get("/v1/proposals", params={"state": "open", "gallery": "default"})).json()["items"]
    assert listed["changes"]["external_ref"] == {"old": before, "new": after}
    assert (await _agreed(desk.two, proposal_id)).status_code == 200
    page = (await desk.one.get(path)).json()
    assert (page["external_ref"], page["full_name"]) == (after, "Ann")
    (event,) = await _events("identity.update")
    assert (event.actor.id, event.detail["proposed_by"]) == (await _id_of(desk.two), await _id_of(desk.one))


async def test_the_same_reference_written_again_needs_no_second_officer(runtime: Runtime, desk: Desk) -> None:
    ann = await _with_reference(runtime, "ann", "NID-1")
    answer = await desk.one.patch(f"/v1/identities/{ann.id}", json={"external_ref": "NID-1", "full_name": "Ann"})
    assert answer.status_code == 200


async def test_another_change_waits_for_the_first_one(runtime: Runtime, desk: Desk) -> None:
    ann = await _with_reference(runtime, "ann", "NID-1")
    path = f"/v1/identities/{ann.id}"
    await _proposed(await desk.one.patch(path, json={"external_ref": "NID-2"}))
    assert (await desk.two.patch(path, json={"external_ref": "NID-3"})).status_code == 409


@pytest.mark.parametrize(
    "refused",
    [
        {"external_ref": "NID-2", "date_of_birth": "2533-01-31"},
        {"external_ref": "\ue000"},
        {"external_ref": "NID-2", "date_of_birth": 0},
    ],
    ids=str,
)
async def test_a_proposal_that_older_rules_let_in_does_not_take_the_others_along(
    runtime: Runtime, desk: Desk, refused: dict[str, Any]
) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    gallery = await default_gallery()
    for one in (ann, bob):
        await _proposed(await desk.one.patch(f"/v1/identities/{one.id}", json={"external_ref": f"NID-{one.id}"}))
    sealed = seal_patch(data_key(runtime.keys, gallery, ann), json.dumps(refused).encode(), gallery.id, ann.id)
    await IdentityProposal.get_pymongo_collection().update_one(
        {"identity_id": ann.id}, {"$set": {"sealed_patch": sealed}}
    )
    listed = await desk.two.get("/v1/proposals")
    assert listed.status_code == 200, listed.text
    changes = {item["identity_id"]: item["changes"] for item in listed.json()["items"]}
    assert changes[ann.id] is None
    assert changes[bob.id]["external_ref"]["new"] == f"NID-{bob.id}"
    path = "/v1/proposals/" + next(item["id"] for item in listed.json()["items"] if item["identity_id"] == ann.id)
    assert (await desk.two.get(path)).status_code == 200
    assert (await desk.two.post(f"{path}/agree")).status_code == 422
    again = {"external_ref": "NID-3"}
    assert (await desk.one.patch(f"/v1/identities/{ann.id}", json=again)).status_code == 409
    assert (await desk.one.post(f"{path}/withdraw")).status_code == 200
    await _proposed(await desk.one.patch(f"/v1/identities/{ann.id}", json=again))


async def test_a_reference_that_was_given_before_the_agreement_is_not_given_twice(runtime: Runtime, desk: Desk) -> None:
    ann, bob = await _with_reference(runtime, "ann", None), await _with_reference(runtime, "bob", "NID-1")
    taken = await desk.one.patch(f"/v1/identities/{ann.id}", json={"external_ref": "nid-1"})
    assert (taken.status_code, taken.json()["type"].rpartition("/")[2]) == (409, "external-ref-taken")
    proposal_id = await _proposed(await desk.one.patch(f"/v1/identities/{ann.id}", json={"external_ref": "NID-2"}))
    await _second_review(needed=False)
    assert (await desk.one.patch(f"/v1/identities/{bob.id}", json={"external_ref": "NID-2"})).status_code == 200
    answer = await _agreed(desk.two, proposal_id)
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (409, "external-ref-taken")


async def test_an_erasure_ends_the_proposals_about_the_person(runtime: Runtime, desk: Desk) -> None:
    ann = await _with_reference(runtime, "ann", "NID-1")
    change = await _proposed(await desk.one.patch(f"/v1/identities/{ann.id}", json={"external_ref": "NID-SECRET"}))
    erasure = await _proposed(await _erasure(desk.one, ann))
    assert (await _agreed(desk.two, erasure)).status_code == 200
    assert (await _agreed(desk.two, change)).status_code in (404, 409)
    stored = {one.id: one for one in await IdentityProposal.find_all().to_list()}
    assert (stored[change].state, stored[erasure].state) == ("stale", "agreed")
    assert {(one.sealed_patch, one.reason) for one in stored.values()} == {(None, None)}


async def test_proposals_are_listed_page_by_page(runtime: Runtime, desk: Desk) -> None:
    made = [await _proposed(await _erasure(desk.one, await active(runtime, name))) for name in ("ann", "bob", "cid")]
    found: list[str] = []
    cursor: str | None = None
    while True:
        page = (
            await desk.two.get("/v1/proposals", params={"limit": 2} | ({"cursor": cursor} if cursor else {}))
        ).json()
        found += [one["id"] for one in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == made[::-1]


def _personal(event: AuditEvent) -> Personal:
    assert event.personal is not None
    return event.personal


async def test_a19_the_log_shows_who_had_a_reference_until_the_person_is_erased(runtime: Runtime, desk: Desk) -> None:
    await _second_review(needed=False)
    ann, bob = await _with_reference(runtime, "ann", "NID-7"), await _with_reference(runtime, "bob", None)
    for identity, reference in ((ann, None), (bob, "NID-7")):
        answer = await desk.one.patch(f"/v1/identities/{identity.id}", json={"external_ref": reference})
        assert answer.status_code == 200
    photo = {"photo": ("photo.png", portrait("bob", capture=3))}
    answer = await desk.one.post("/v1/verifications", data={"external_ref": "nid-7", "gallery": "default"}, files=photo)
    assert answer.json()["match"] is True
    by_id = await desk.one.post(
        "/v1/verifications", data={"identity_id": ann.id}, files={"photo": portrait("ann", capture=4)}
    )
    assert by_id.status_code == 200
    enrolments = await _events("identity.enrol")
    taken, given = await _events("identity.update")
    claimed, unnamed = await _events("face.verify")
    ref_hash = (await known(bob)).external_ref_hash
    assert ref_hash is not None

    def hashed(event: AuditEvent) -> str:
        return personal_hash(_personal(event).salt, ref_hash.hex())

    assert taken.detail["changes"] == {"external_ref": {"old": hashed(taken), "new": None}}
    assert given.detail["changes"] == {"external_ref": {"old": None, "new": hashed(given)}}
    assert (claimed.subject.id, claimed.detail["external_ref"]) == (bob.id, hashed(claimed))
    assert unnamed.detail["external_ref"] is None
    assert [event.detail["external_ref"] for event in enrolments] == [hashed(enrolments[0]), None]
    assert len({hashed(event) for event in (taken, given, claimed)}) == 3, "each event has its own salt"
    stored = [event.model_dump_json().lower() for event in await AuditEvent.find_all().to_list()]
    assert not any("nid-7" in text or ref_hash.hex() in text for text in stored)
    traced = [(named.event.id, named.place) async for named in trace_reference(runtime, "default", "nid-7")]
    assert traced == [(enrolments[0].id, "given"), (taken.id, "old"), (given.id, "new"), (claimed.id, "given")]
    assert (await _erasure(desk.one, bob)).status_code == 200
    assert [(await AuditEvent.get(event.id)).personal for event in (given, claimed)] == [None, None]  # type: ignore[union-attr]


async def test_a19_a_reference_lent_for_one_verification_is_told_by_the_log(runtime: Runtime, desk: Desk) -> None:
    """A's reference goes to B, somebody is verified by it, and it comes back. Nothing else shows it afterwards."""
    await _second_review(needed=False)
    ann, bob = await _with_reference(runtime, "ann", "NID-7"), await _with_reference(runtime, "bob", "NID-8")

    async def give(identity: Identity, reference: str | None) -> None:
        answer = await desk.one.patch(f"/v1/identities/{identity.id}", json={"external_ref": reference})
        assert answer.status_code == 200, answer.text

    await give(ann, None)
    await give(bob, "NID-7")
    photo = {"photo": ("photo.png", portrait("bob", capture=3))}
    answer = await desk.one.post("/v1/verifications", data={"external_ref": "NID-7", "gallery": "default"}, files=photo)
    assert (answer.json()["match"], answer.json()["identity_id"]) == (True, bob.id)
    await give(bob, "NID-8")
    await give(ann, "NID-7")
    told = [
        (named.event.action, named.place, named.event.subject.id, named.event.actor.id)
        async for named in trace_reference(runtime, "default", "NID-7")
    ]
    officer = await _id_of(desk.one)
    assert told[1:] == [
        ("identity.update", "old", ann.id, officer), ("identity.update", "new", bob.id, officer),
        ("face.verify", "given", bob.id, officer), ("identity.update", "old", bob.id, officer),
        ("identity.update", "new", ann.id, officer),
    ]  # fmt: skip
    assert told[0][:3] == ("identity.enrol", "given", ann.id)


async def test_a14_many_erasures_of_one_officer_raise_an_alarm(
    runtime: Runtime, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _second_review(needed=False)
    monkeypatch.setattr(runtime.settings, "erasures_alarm_per_hour", 2)
    for name in ("ann", "bob", "cid"):
        assert (await _erasure(desk.one, await active(runtime, name))).status_code == 200
    (alarm,) = await _events("identity.erase.alarm")
    assert (alarm.subject.id, alarm.detail["erasures"]) == (await _id_of(desk.one), 2)
    await _second_review(needed=True)
    proposal_id = await _proposed(await _erasure(desk.one, await active(runtime, "dan")))
    assert (await _agreed(desk.two, proposal_id)).status_code == 200
    alarms = await _events("identity.erase.alarm")
    assert [event.detail["erasures"] for event in alarms] == [2, 4], (
        "the erasure counts for the officer who proposed it too"
    )
    # A count is acknowledged by one node: a majority may learn of it a moment later.
    counted = Erasures.get_pymongo_collection().with_options(read_concern=ReadConcern("local"))
    assert await counted.count_documents({}) == 2


async def test_a14_erasures_have_a_rate_of_their_own(
    runtime: Runtime, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _second_review(needed=False)
    people = [await active(runtime, name) for name in ("ann", "bob", "cid")]
    monkeypatch.setitem(runtime.limits._rates, "erase", runtime.limits._rates["erase"].__class__(2, 1))
    assert [(await _erasure(desk.one, person)).status_code for person in people] == [200, 200, 429]
    renamed = await desk.one.patch(f"/v1/identities/{people[2].id}", json={"full_name": "Cid"})
    assert renamed.status_code == 200, "other writes go on"
    assert (await default_gallery()).identities == 1


async def test_a_sample_is_removed_by_two_officers(runtime: Runtime, desk: Desk) -> None:
    ann = await with_sample(runtime, await active(runtime, "ann"), "ann")
    path = f"/v1/identities/{ann.id}/samples/{ann.samples[1].id}"
    last = await desk.one.delete(f"/v1/identities/{ann.id}/samples/{ann.samples[0].id}", params={"reason": "x"})
    assert last.status_code == 409, "an action that must be refused is not proposed"
    headers = {"Idempotency-Key": "remove-1"}
    answers = [await desk.one.delete(path, params={"reason": "not hers"}, headers=headers) for _ in range(2)]
    proposal_id = await _proposed(answers[0])
    assert await _proposed(answers[1]) == proposal_id
    assert len((await known(ann)).samples) == 2
    page = (await desk.two.get(f"/v1/proposals/{proposal_id}")).json()
    assert (page["kind"], page["sample_id"], page["samples"]) == ("sample_removal", ann.samples[1].id, 1)
    assert (await _agreed(desk.one, proposal_id)).status_code == 409
    answer = await _agreed(desk.two, proposal_id)
    assert (answer.status_code, answer.json()["state"]) == (200, "agreed"), answer.text
    assert [sample.id for sample in (await known(ann)).samples] == [ann.samples[0].id]
    (event,) = await _events("sample.remove")
    assert (event.actor.id, event.detail["proposed_by"]) == (await _id_of(desk.two), await _id_of(desk.one))
    assert (event.detail["sample_id"], event.told["reason"]) == (ann.samples[1].id, "not hers")
