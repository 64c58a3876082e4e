"""A person decides: who stays, who becomes a duplicate, and what may not be decided yet."""

import asyncio

import pytest

from app.documents.cases import Case, Pair
from app.documents.events import AuditEvent
from app.documents.identities import Identity
from app.domain.policy import Status
from app.errors import Conflict, NotFound, UndecidedCandidates, Validation
from app.runtime import Runtime
from app.use_cases import screen
from tests.builders import (
    active,
    another_process,
    case_about,
    decided,
    enrolled,
    erased,
    known,
    reinstated,
    revoked,
    screened,
    suspected,
    with_sample,
)


async def _put(identity: Identity, status: Status) -> None:
    collection = Identity.get_pymongo_collection()
    await collection.update_one({"_id": identity.id}, {"$set": {"status": status}, "$inc": {"version": 1}})


async def _status(identity: Identity) -> Status:
    return (await known(identity)).status


async def _two_look_alikes_and_a_newcomer(runtime: Runtime) -> tuple[Identity, Identity, Identity, Case]:
    """Ann and bob, strangers to each other, and somebody who looks like both."""
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    newcomer, case = await suspected(runtime, "ann", "bob")
    assert {c.identity_id for c in case.candidates} == {ann.id, bob.id}
    return ann, bob, newcomer, case


async def test_distinct_from_all_makes_the_newcomer_active_with_its_samples(runtime: Runtime) -> None:
    _, _, newcomer, case = await _two_look_alikes_and_a_newcomer(runtime)
    case = await decided(runtime, case, "distinct")
    assert (case.state, case.decided_by, case.reason) == ("decided", "officer-1", "looked")
    assert {c.decision for c in case.candidates} == {"distinct"}
    newcomer = await known(newcomer)
    assert (newcomer.status, newcomer.samples[0].status) == ("active", "active")
    assert {pair.decision for pair in await Pair.of(newcomer.id)} == {"distinct"}
    (event,) = await AuditEvent.find({"action": "dedup.decide"}).to_list()
    assert (event.subject.id, event.detail["decision"], event.detail["decided"]) == (case.id, "distinct", True)


async def test_distinct_from_one_leaves_the_case_open_for_the_others(runtime: Runtime) -> None:
    ann, bob, newcomer, case = await _two_look_alikes_and_a_newcomer(runtime)
    case = await decided(runtime, case, "distinct", about=ann)
    assert (case.state, await _status(newcomer)) == ("open", "suspected_duplicate")
    case = await decided(runtime, case, "distinct", about=bob)
    assert (case.state, await _status(newcomer)) == ("decided", "active")


async def test_a_duplicate_keeps_the_older_one_by_default(runtime: Runtime) -> None:
    ann, bob, newcomer, case = await _two_look_alikes_and_a_newcomer(runtime)
    case = await decided(runtime, case, "duplicate", about=ann)
    assert case.state == "decided"
    assert [await _status(i) for i in (ann, bob, newcomer)] == ["active", "active", "duplicate"]
    assert (await known(newcomer)).samples[0].status == "pending"


async def test_a_duplicate_may_keep_the_newer_one(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    newcomer, case = await suspected(runtime, "ann")
    await decided(runtime, case, "duplicate", about=ann, keep=newcomer)
    assert [await _status(i) for i in (ann, newcomer)] == ["duplicate", "active"]
    assert (await known(newcomer)).samples[0].status == "active"


async def test_older_means_enrolled_earlier_not_screened_earlier(runtime: Runtime) -> None:
    first = await enrolled(runtime, "ann")
    second, case = await suspected(runtime, "ann")
    await decided(runtime, case, "duplicate", about=first)
    assert [await _status(i) for i in (first, second)] == ["pending", "duplicate"]
    assert (await screened(runtime, first)).status == "active"


@pytest.mark.parametrize("status", ["pending", "suspected_duplicate", "active", "revoked", "failed"])
async def test_the_loser_becomes_a_duplicate_from_any_status(runtime: Runtime, status: Status) -> None:
    ann = await active(runtime, "ann")
    newcomer, case = await suspected(runtime, "ann")
    await _put(ann, status)
    await decided(runtime, case, "duplicate", about=ann, keep=newcomer)
    assert [await _status(i) for i in (ann, newcomer)] == ["duplicate", "active"]


async def test_a_pending_loser_never_gets_a_verdict_and_is_not_swept(runtime: Runtime) -> None:
    first = await enrolled(runtime, "ann")
    second, case = await suspected(runtime, "ann")
    await decided(runtime, case, "duplicate", about=first, keep=second)
    await screened(runtime, first)
    assert [await _status(i) for i in (first, second)] == ["duplicate", "active"]
    await Identity.get_pymongo_collection().update_many({}, {"$min": {"outbox_at": first.created_at}})
    assert await screen.sweep_overdue(runtime) == 0


async def test_the_losers_own_open_case_ends_with_it(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    held, own = await suspected(runtime, "ann")
    newcomer, case = await suspected(runtime, "ann", capture=2)
    await decided(runtime, case, "duplicate", about=held)
    assert [await _status(i) for i in (ann, held, newcomer)] == ["active", "suspected_duplicate", "duplicate"]
    third, case = await suspected(runtime, "ann", capture=3)
    await decided(runtime, case, "distinct", about=ann)
    await decided(runtime, case, "distinct", about=newcomer)
    await decided(runtime, case, "duplicate", about=held, keep=third)
    assert [await _status(i) for i in (held, third)] == ["duplicate", "active"]
    closed = await Case.get(own.id)
    assert closed is not None
    assert (closed.state, closed.decided_by) == ("decided", None)


async def test_a_decided_case_stays_as_it_is(runtime: Runtime) -> None:
    ann, _, newcomer, case = await _two_look_alikes_and_a_newcomer(runtime)
    case = await decided(runtime, case, "distinct")
    with pytest.raises(Conflict, match="decided already") as refused:
        await decided(runtime, case, "duplicate", about=ann)
    assert type(refused.value) is Conflict
    assert await Case.get(case.id) == case
    assert await _status(newcomer) == "active"


async def test_a_candidate_is_decided_once(runtime: Runtime) -> None:
    ann, _, _, case = await _two_look_alikes_and_a_newcomer(runtime)
    await decided(runtime, case, "distinct", about=ann)
    with pytest.raises(Conflict, match="decided already"):
        await decided(runtime, case, "duplicate", about=ann)


async def test_of_two_decisions_at_once_exactly_one_holds(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    newcomer, case = await suspected(runtime, "ann")
    async with another_process(runtime) as other:
        ended = await asyncio.gather(
            decided(runtime, case, "distinct"),
            decided(other, case, "duplicate", about=ann),
            return_exceptions=True,
        )
    (refused,) = [e for e in ended if isinstance(e, BaseException)]
    assert isinstance(refused, Conflict)
    (stands,) = [e for e in ended if isinstance(e, Case)]
    assert await _status(newcomer) == ("active" if stands.candidates[0].decision == "distinct" else "duplicate")
    assert await AuditEvent.find({"action": "dedup.decide"}).count() == 1


async def test_a_judgement_must_fit_the_case(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    stranger = await active(runtime, "cid")
    _, case = await suspected(runtime, "ann")
    with pytest.raises(Validation):
        await decided(runtime, case, "duplicate")
    with pytest.raises(Validation):
        await decided(runtime, case, "distinct", about=stranger)
    with pytest.raises(Validation):
        await decided(runtime, case, "duplicate", about=ann, keep=stranger)
    with pytest.raises(NotFound):
        await decided(runtime, case.model_copy(update={"id": "nothing"}), "distinct")
    assert await Case.get(case.id) == case


async def test_keeping_the_newcomer_waits_for_its_other_candidates(runtime: Runtime) -> None:
    ann, bob, newcomer, case = await _two_look_alikes_and_a_newcomer(runtime)
    with pytest.raises(UndecidedCandidates):
        await decided(runtime, case, "duplicate", about=ann, keep=newcomer)
    assert [await _status(i) for i in (ann, bob, newcomer)] == ["active", "active", "suspected_duplicate"]
    assert await Case.get(case.id) == case
    assert {pair.decision for pair in await Pair.of(newcomer.id)} == {None}
    await decided(runtime, case, "distinct", about=bob)
    await decided(runtime, case, "duplicate", about=ann, keep=newcomer)
    assert [await _status(i) for i in (ann, bob, newcomer)] == ["duplicate", "active", "active"]


async def test_keeping_the_newcomer_waits_for_a_candidate_that_is_still_pending(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    pending = await enrolled(runtime, "ann", capture=1)
    newcomer, case = await suspected(runtime, "ann", capture=2)
    with pytest.raises(UndecidedCandidates):
        await decided(runtime, case, "duplicate", about=ann, keep=newcomer)
    assert [await _status(i) for i in (ann, pending, newcomer)] == ["active", "pending", "suspected_duplicate"]


async def test_newcomers_that_look_like_each_other_are_decided_as_well(runtime: Runtime) -> None:
    """Calling both distinct from ann says nothing about the two."""
    ann = await active(runtime, "ann")
    one, first = await suspected(runtime, "ann")
    other, second = await suspected(runtime, "ann", capture=2)
    await decided(runtime, first, "distinct")
    await decided(runtime, second, "distinct", about=ann)
    assert [await _status(i) for i in (one, other)] == ["active", "suspected_duplicate"]
    await decided(runtime, second, "distinct", about=one)
    assert [await _status(i) for i in (one, other)] == ["active", "active"]


@pytest.mark.parametrize("keep_the_newcomer", [False, True])
async def test_an_active_look_alike_outside_of_the_case_blocks_the_newcomer(
    runtime: Runtime, keep_the_newcomer: bool
) -> None:
    """Another screening recorded the pair: that of a later sample of bob, which looked like the newcomer."""
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    newcomer, case = await suspected(runtime, "ann")
    await with_sample(runtime, bob, "bob", "ann")
    later = await case_about(bob)
    assert newcomer.id in {c.identity_id for c in later.candidates}
    assert [c.identity_id for c in case.candidates] == [ann.id]
    with pytest.raises(UndecidedCandidates):
        if keep_the_newcomer:
            await decided(runtime, case, "duplicate", about=ann, keep=newcomer)
        else:
            await decided(runtime, case, "distinct")
    assert [await _status(i) for i in (ann, bob, newcomer)] == ["active", "active", "suspected_duplicate"]
    assert await Case.get(case.id) == case
    await decided(runtime, later, "distinct", about=newcomer)
    await decided(runtime, case, "distinct")
    assert await _status(newcomer) == "active"


async def test_a_candidate_that_is_a_duplicate_by_now_need_not_be_decided(runtime: Runtime) -> None:
    ann, bob, newcomer, case = await _two_look_alikes_and_a_newcomer(runtime)
    await _put(bob, "duplicate")
    case = await decided(runtime, case, "distinct", about=ann)
    assert (case.state, await _status(newcomer)) == ("decided", "active")


async def test_two_activations_at_once_of_undecided_look_alikes_do_not_both_succeed(runtime: Runtime) -> None:
    """Two revoked look-alikes that nobody called distinct are reinstated in the same moment, twenty times."""
    ann = await active(runtime, "ann")
    newcomer, case = await suspected(runtime, "ann")
    async with another_process(runtime) as other:
        for _ in range(20):
            await _put(ann, "revoked")
            await _put(newcomer, "revoked")
            await Case.get_pymongo_collection().delete_many({})
            ended = await asyncio.gather(reinstated(runtime, ann), reinstated(other, newcomer), return_exceptions=True)
            refused = [e for e in ended if isinstance(e, BaseException)]
            assert [type(e) for e in refused] == [UndecidedCandidates]
            assert sorted([await _status(ann), await _status(newcomer)]) == ["active", "revoked"]
    assert case.newcomer_id == newcomer.id


async def test_revocation_takes_out_of_service_and_reinstatement_brings_back(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    assert (await revoked(runtime, ann)).status == "revoked"
    with pytest.raises(Conflict):
        await revoked(runtime, ann)
    assert (await reinstated(runtime, ann)).status == "active"
    with pytest.raises(Conflict):
        await reinstated(runtime, ann)
    actions = [e.action for e in await AuditEvent.find({"subject.id": ann.id}).sort("_id").to_list()]
    assert actions == ["identity.enrol", "dedup.verdict", "identity.revoke", "identity.reinstate"]


async def test_reinstatement_is_refused_while_an_undecided_look_alike_is_active(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await revoked(runtime, ann)
    newcomer, case = await suspected(runtime, "ann")
    assert (await reinstated(runtime, ann)).status == "active", "a look-alike that is only suspected is in nobody's way"
    await revoked(runtime, ann)
    await _put(newcomer, "active")
    with pytest.raises(UndecidedCandidates):
        await reinstated(runtime, ann)
    assert await _status(ann) == "revoked"
    await _put(newcomer, "suspected_duplicate")
    await decided(runtime, case, "distinct")
    assert await _status(newcomer) == "active"
    assert (await reinstated(runtime, ann)).status == "active"


async def test_a_decision_that_would_bring_a_duplicate_back_is_refused(runtime: Runtime) -> None:
    """The newcomer's status changed since its case was opened: a distinct decision must not make it active."""
    await active(runtime, "ann")
    newcomer, case = await suspected(runtime, "ann")
    await _put(newcomer, "duplicate")
    with pytest.raises(Conflict):
        await decided(runtime, case, "distinct")
    assert await _status(newcomer) == "duplicate"


async def test_a_case_whose_newcomer_was_erased_cannot_be_decided(runtime: Runtime) -> None:
    await active(runtime, "ann")
    newcomer, case = await suspected(runtime, "ann")
    await erased(runtime, newcomer)
    with pytest.raises(Conflict):
        await decided(runtime, case, "distinct")
