"""Galleries in which a decision needs two officers: the first proposes, another one agrees or proposes otherwise."""

import asyncio
from dataclasses import replace

import pytest

from app.documents.cases import Case, Pair
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.domain.policy import Status
from app.errors import Conflict, Forbidden, Validation
from app.runtime import Runtime
from tests.builders import (
    SECOND_OFFICER,
    active,
    another_process,
    decided,
    erased,
    known,
    suspected,
    with_sample,
)


@pytest.fixture(autouse=True)
async def _two_officers_must_agree(runtime: Runtime) -> None:
    await _set_second_review(needed=True)


async def _set_second_review(*, needed: bool) -> None:
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"policy.second_review": needed}})


async def _statuses(*people: Identity) -> list[Status]:
    return [(await known(person)).status for person in people]


async def _twins(runtime: Runtime) -> tuple[Identity, Identity, Case]:
    ann = await active(runtime, "ann")
    return ann, *await suspected(runtime, "ann")


async def test_h73_a_decision_counts_when_a_second_officer_decides_the_same(runtime: Runtime) -> None:
    ann, newcomer, case = await _twins(runtime)
    case = await decided(runtime, case, "distinct")
    assert (case.state, case.decided_by, case.version) == ("open", None, 2)
    assert [(p.decision, p.identity_id, p.by) for p in case.proposals] == [("distinct", ann.id, "officer-1")]
    assert await _statuses(ann, newcomer) == ["active", "suspected_duplicate"]
    assert [pair.decision for pair in await Pair.of(ann.id)] == [None]
    case = await decided(runtime, case, "distinct", about=ann, by=SECOND_OFFICER)
    assert (case.state, case.proposed_by, case.decided_by) == ("decided", "officer-1", "officer-2")
    assert case.proposals == []
    assert await _statuses(ann, newcomer) == ["active", "active"]


async def test_h73_both_officers_stand_in_the_log_and_on_the_pair(runtime: Runtime) -> None:
    ann, _, case = await _twins(runtime)
    await decided(runtime, case, "distinct")
    await decided(runtime, case, "distinct", by=SECOND_OFFICER)
    proposal, decision = await AuditEvent.find({"action": "dedup.decide"}).sort("_id").to_list()
    assert (proposal.actor.id, proposal.detail["step"], proposal.detail["decided"]) == ("officer-1", "proposal", False)
    assert (decision.actor.id, decision.detail["proposed_by"], decision.detail["decided"]) == (
        "officer-2", "officer-1", True,
    )  # fmt: skip
    (pair,) = await Pair.of(ann.id)
    assert (pair.decision, pair.proposed_by, pair.decided_by) == ("distinct", "officer-1", "officer-2")


async def test_h73_the_same_officer_is_not_a_second_one(runtime: Runtime) -> None:
    ann, newcomer, case = await _twins(runtime)
    await decided(runtime, case, "distinct")
    with pytest.raises(Conflict):
        await decided(runtime, case, "distinct")
    with pytest.raises(Conflict):
        await decided(runtime, case, "duplicate", about=ann)
    assert await _statuses(ann, newcomer) == ["active", "suspected_duplicate"]


async def test_an_application_is_not_a_second_officer(runtime: Runtime) -> None:
    ann, newcomer, case = await _twins(runtime)
    await decided(runtime, case, "distinct")
    with pytest.raises(Forbidden):
        await decided(runtime, case, "distinct", by=replace(SECOND_OFFICER, kind="client"))
    assert await _statuses(ann, newcomer) == ["active", "suspected_duplicate"]


async def test_h73_a_different_decision_takes_the_proposal_s_place(runtime: Runtime) -> None:
    ann, newcomer, case = await _twins(runtime)
    await decided(runtime, case, "distinct")
    case = await decided(runtime, case, "duplicate", about=ann, by=SECOND_OFFICER)
    assert [(p.decision, p.keep, p.by) for p in case.proposals] == [("duplicate", ann.id, "officer-2")]
    (_, second) = await AuditEvent.find({"action": "dedup.decide"}).sort("_id").to_list()
    assert second.detail["contradicts"] == "officer-1"
    with pytest.raises(Conflict):
        await decided(runtime, case, "duplicate", about=ann, by=SECOND_OFFICER)
    case = await decided(runtime, case, "duplicate", about=ann)
    assert (case.state, case.proposed_by, case.decided_by) == ("decided", "officer-2", "officer-1")
    assert await _statuses(ann, newcomer) == ["active", "duplicate"]


async def test_whom_to_keep_is_part_of_what_two_officers_agree_on(runtime: Runtime) -> None:
    ann, newcomer, case = await _twins(runtime)
    await decided(runtime, case, "duplicate", about=ann, keep=newcomer)
    case = await decided(runtime, case, "duplicate", about=ann, by=SECOND_OFFICER)
    assert case.state == "open"
    case = await decided(runtime, case, "duplicate", about=ann, keep=ann)
    assert case.state == "decided", "the older one by default, and the older one by name, are the same decision"
    assert await _statuses(ann, newcomer) == ["active", "duplicate"]


async def test_each_candidate_has_a_proposal_of_its_own(runtime: Runtime) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    newcomer, case = await suspected(runtime, "ann", "bob")
    await decided(runtime, case, "distinct", about=ann)
    case = await decided(runtime, case, "distinct", about=bob)
    assert {p.identity_id for p in case.proposals} == {ann.id, bob.id}
    case = await decided(runtime, case, "distinct", about=ann, by=SECOND_OFFICER)
    assert (case.state, [p.identity_id for p in case.proposals]) == ("open", [bob.id])
    assert await _statuses(newcomer) == ["suspected_duplicate"]
    case = await decided(runtime, case, "distinct", by=SECOND_OFFICER)
    assert (case.state, await _statuses(newcomer)) == ("decided", ["active"])


async def test_a_proposal_must_fit_its_case(runtime: Runtime) -> None:
    ann, newcomer, case = await _twins(runtime)
    with pytest.raises(Validation):
        await decided(runtime, case, "duplicate")
    with pytest.raises(Validation):
        await decided(runtime, case, "duplicate", about=newcomer)
    await erased(runtime, newcomer)
    with pytest.raises(Conflict):
        await decided(runtime, case, "distinct", about=ann)


async def test_of_two_equal_decisions_at_once_one_is_the_proposal_and_the_other_counts(runtime: Runtime) -> None:
    ann, newcomer, case = await _twins(runtime)
    async with another_process(runtime) as other:
        ended = await asyncio.gather(
            decided(runtime, case, "distinct"), decided(other, case, "distinct", by=SECOND_OFFICER)
        )
    assert {one.id for one in ended} == {case.id}
    assert await _statuses(ann, newcomer) == ["active", "active"]
    events = await AuditEvent.find({"action": "dedup.decide"}).to_list()
    assert sorted(str(event.detail["decided"]) for event in events) == ["False", "True"]


async def test_a_later_sample_s_case_needs_two_officers_as_well(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    both = await active(runtime, "bob")
    both = await with_sample(runtime, both, "bob", "ann")
    (case,) = await Case.find({"state": "open"}).to_list()
    assert (await decided(runtime, case, "distinct")).state == "open"
    assert (await known(both)).samples[1].status == "pending"
    assert (await decided(runtime, case, "distinct", by=SECOND_OFFICER)).state == "decided"
    assert (await known(both)).samples[1].status == "active"
    assert (await known(ann)).status == "active"


async def test_once_the_policy_is_lifted_one_officer_decides_alone(runtime: Runtime) -> None:
    ann, newcomer, case = await _twins(runtime)
    await decided(runtime, case, "distinct")
    await _set_second_review(needed=False)
    case = await decided(runtime, case, "duplicate", about=ann)
    assert (case.state, case.proposed_by, case.decided_by, case.proposals) == ("decided", None, "officer-1", [])
    assert await _statuses(ann, newcomer) == ["active", "duplicate"]
