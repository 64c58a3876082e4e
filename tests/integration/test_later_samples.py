"""Photos that are added later: references once screened, and held back while they look like somebody else."""

import pytest

from app.documents.cases import Case, Pair
from app.documents.identities import Identity
from app.domain.attributes import GivenAttributes
from app.domain.policy import margin_of
from app.errors import Conflict, DifferentPerson, NotFound, UndecidedCandidates
from app.runtime import Runtime
from app.use_cases import enrol
from tests.builders import (
    active,
    by_officer,
    case_about,
    decided,
    default_gallery,
    erased,
    identified,
    known,
    portrait,
    reinstated,
    revoked,
    screened,
    settled,
    suspected,
    verified,
    with_sample,
)


async def _statuses(identity: Identity) -> list[str]:
    return [sample.status for sample in (await known(identity)).samples]


async def _ann_with_a_photo_like_bob(runtime: Runtime) -> tuple[Identity, Identity, Case]:
    bob = await active(runtime, "bob")
    ann = await with_sample(runtime, await active(runtime, "ann"), "ann", "bob")
    assert ann.status == "active"
    return ann, bob, await case_about(ann)


async def test_a_later_sample_serves_once_it_is_screened(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    photo = portrait("ann", capture=5)
    waiting = await enrol.add_sample(runtime, by_officer("sample.add"), await default_gallery(), ann, photo)
    assert (waiting.status, await _statuses(ann)) == ("active", ["active", "pending"])
    await screened(runtime, waiting)
    assert await _statuses(ann) == ["active", "active"]
    assert await Case.count() == 0


async def test_a_photo_of_somebody_else_is_refused_at_once(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    with pytest.raises(DifferentPerson):
        await with_sample(runtime, ann, "bob")
    assert await _statuses(ann) == ["active"]


async def _walked(runtime: Runtime) -> tuple[Identity, list[bool]]:
    """Ann after photos that show her less and less, and at last bob. Also returns which photos were taken."""
    ann, taken = await active(runtime, "ann"), []
    for number, parts in enumerate([("ann", "ann", "bob"), ("ann", "bob"), ("ann", "bob", "bob"), ("bob",)]):
        try:
            ann = await with_sample(runtime, ann, *parts, capture=20 + number)
        except DifferentPerson:
            taken.append(False)
        else:
            taken.append(True)
    return ann, taken


async def test_small_steps_do_not_lead_to_another_person(runtime: Runtime) -> None:
    ann, taken = await _walked(runtime)
    assert taken == [True, True, True, False], "each photo is compared with the enrolment, not with the photo before"
    assert len(ann.active_samples) == 4


async def test_another_person_does_not_match_by_samples_that_show_both(runtime: Runtime) -> None:
    ann, _ = await _walked(runtime)
    answer = await verified(runtime, ann, "bob")
    assert not answer.match
    assert answer.score is not None
    assert answer.score < answer.threshold, "the answer shows the score with the enrolment"
    assert (await identified(runtime, "bob")).candidates == []
    assert (await verified(runtime, ann, "ann")).match
    assert [c.identity_id for c in (await identified(runtime, "ann")).candidates] == [ann.id]


async def test_every_photo_of_the_enrolment_counts(runtime: Runtime) -> None:
    """A person was enrolled by two photos. One of them also shows an accomplice."""
    photos = [portrait("ann"), portrait("ann", "bob", capture=1)]
    action = by_officer("identity.enrol")
    ann = await screened(
        runtime, await enrol.enrol(runtime, action, await default_gallery(), photos, GivenAttributes())
    )
    assert ann.status == "active"
    with pytest.raises(DifferentPerson):
        await with_sample(runtime, ann, "bob")
    assert not (await verified(runtime, ann, "bob")).match
    assert (await identified(runtime, "bob")).candidates == []
    assert (await verified(runtime, ann, "ann")).match


async def test_photos_are_added_to_active_identities_only(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    held, _ = await suspected(runtime, "ann")
    with pytest.raises(Conflict):
        await with_sample(runtime, held, "ann")
    await revoked(runtime, ann)
    with pytest.raises(Conflict):
        await with_sample(runtime, ann, "ann")


async def test_an_identity_erased_while_its_photo_is_read_gets_no_sample(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await erased(runtime, ann)
    with pytest.raises(NotFound):
        await enrol.add_sample(
            runtime, by_officer("sample.add"), await default_gallery(), ann, portrait("ann", capture=5)
        )
    assert await Identity.living(ann.id) is None


async def test_a_later_sample_that_looks_like_somebody_else_stays_pending_and_opens_a_case(runtime: Runtime) -> None:
    ann, bob, case = await _ann_with_a_photo_like_bob(runtime)
    assert await _statuses(ann) == ["active", "pending"]
    assert (case.sample_id, [c.identity_id for c in case.candidates]) == (ann.samples[1].id, [bob.id])
    assert ann.screenings[1].verdict == "suspected_duplicate"
    assert [pair.decision for pair in await Pair.of(ann.id)] == [None]
    assert (await known(bob)).status == "active"


async def test_a_pending_sample_gives_no_score(runtime: Runtime) -> None:
    ann, bob, case = await _ann_with_a_photo_like_bob(runtime)
    for capture, score in ((7, 0.57), (8, 0.8)):
        found = await identified(runtime, "ann", "bob", capture=capture)
        scores = {c.identity_id: c.score for c in found.candidates}
        assert set(scores) == {ann.id, bob.id}
        assert scores[ann.id] == pytest.approx(score, abs=0.1)
        if capture == 7:
            await decided(runtime, case, "distinct")


async def test_a_newcomer_meets_a_pending_sample_too(runtime: Runtime) -> None:
    ann, bob, _ = await _ann_with_a_photo_like_bob(runtime)
    newcomer = await settled(runtime, "bob", capture=3)
    assert {c.identity_id for c in (await case_about(newcomer)).candidates} == {ann.id, bob.id}


async def test_distinct_makes_the_later_sample_serve(runtime: Runtime) -> None:
    ann, bob, case = await _ann_with_a_photo_like_bob(runtime)
    case = await decided(runtime, case, "distinct")
    assert (case.state, await _statuses(ann)) == ("decided", ["active", "active"])
    assert [(await known(i)).status for i in (ann, bob)] == ["active", "active"]


async def test_a_look_alike_called_distinct_before_holds_no_later_sample_back(runtime: Runtime) -> None:
    ann, _, case = await _ann_with_a_photo_like_bob(runtime)
    await decided(runtime, case, "distinct")
    ann = await with_sample(runtime, ann, "ann", "bob", capture=6)
    assert await _statuses(ann) == ["active", "active", "active"]
    assert await Case.find({"state": "open"}).count() == 0


async def _distinct_by_a_low_score(runtime: Runtime) -> tuple[Identity, Identity, Pair]:
    """Ann, and a person who looks a little like her. An officer called the two distinct."""
    ann = await active(runtime, "ann")
    cid, case = await suspected(runtime, "ann", "bob", "cid", "dan")
    await decided(runtime, case, "distinct")
    (pair,) = await Pair.of(ann.id)
    return ann, await known(cid), pair


async def test_a_decision_keeps_the_score_and_the_model_that_it_was_made_on(runtime: Runtime) -> None:
    _, _, pair = await _distinct_by_a_low_score(runtime)
    assert pair.decided_score == pair.score == pytest.approx(0.4, abs=0.1)
    assert pair.decided_contract == pair.contract == runtime.engine.card.contract


@pytest.mark.parametrize("is_old", [False, True], ids=["new", "from before scores were kept"])
async def test_a_better_score_than_the_one_decided_on_asks_again(runtime: Runtime, is_old: bool) -> None:
    ann, cid, before = await _distinct_by_a_low_score(runtime)
    if is_old:
        unset = {"$unset": {"decided_score": 1, "decided_contract": 1, "contract": 1}}
        await Pair.get_pymongo_collection().update_one({"_id": before.id}, unset)
    cid = await with_sample(runtime, cid, "ann", "ann", "bob", "cid", "dan")
    case = await case_about(cid)
    assert (case.sample_id, [c.identity_id for c in case.candidates]) == (cid.samples[1].id, [ann.id])
    assert await _statuses(cid) == ["active", "pending"]
    assert case.candidates[0].score > before.score + margin_of(runtime.engine.card)
    await revoked(runtime, cid)
    with pytest.raises(UndecidedCandidates):
        await reinstated(runtime, cid)
    await decided(runtime, case, "distinct")
    await reinstated(runtime, cid)
    (pair,) = await Pair.of(ann.id)
    assert pair.decided_score == pair.score == case.candidates[0].score
    cid = await with_sample(runtime, cid, "ann", "ann", "bob", "cid", "dan", capture=7)
    assert await _statuses(cid) == ["active", "active", "active"], "the newer decision covers the newer score"


async def test_an_equal_score_is_covered_and_the_decision_is_not_made_wider_by_it(runtime: Runtime) -> None:
    ann, cid, before = await _distinct_by_a_low_score(runtime)
    cid = await with_sample(runtime, cid, "ann", "bob", "cid", "dan", capture=6)
    assert await _statuses(cid) == ["active", "active"]
    (pair,) = await Pair.of(ann.id)
    assert pair.decided_score == before.score


async def test_a_score_of_another_model_asks_again_and_earlier_decisions_stay(runtime: Runtime) -> None:
    ann, cid, before = await _distinct_by_a_low_score(runtime)
    other = {"$set": {"decided_contract": "sha256:other", "contract": "sha256:other"}}
    await Pair.get_pymongo_collection().update_one({"_id": before.id}, other)
    await revoked(runtime, cid)
    assert (await reinstated(runtime, cid)).status == "active", "no score was measured since"
    cid = await with_sample(runtime, cid, "ann", "bob", "cid", "dan", capture=6)
    assert (await case_about(cid)).candidates[0].identity_id == ann.id
    (pair,) = await Pair.of(ann.id)
    assert pair.contract == runtime.engine.card.contract, "scores of two models are not compared"


async def test_a_pair_that_is_measured_again_keeps_its_decision(runtime: Runtime) -> None:
    ann, cid, before = await _distinct_by_a_low_score(runtime)
    other = {
        "$set": {"decided_contract": "sha256:other", "contract": "sha256:other", "decided_score": 0.9, "score": 0.9}
    }
    await Pair.get_pymongo_collection().update_one({"_id": before.id}, other)
    await Pair.measured_anew({(before.low, before.high): before.score}, runtime.engine.card.contract)
    cid = await with_sample(runtime, cid, "ann", "bob", "cid", "dan", capture=6)
    assert await _statuses(cid) == ["active", "active"]
    assert (await Pair.of(ann.id))[0].decided_score == before.score


async def test_duplicate_by_a_later_sample_keeps_the_older_identity(runtime: Runtime) -> None:
    ann, bob, case = await _ann_with_a_photo_like_bob(runtime)
    case = await decided(runtime, case, "duplicate", about=bob)
    assert [(await known(i)).status for i in (ann, bob)] == ["duplicate", "active"]
    assert (case.state, await _statuses(ann)) == ("decided", ["active", "pending"])


async def test_duplicate_by_a_later_sample_may_keep_the_one_whose_sample_it_is(runtime: Runtime) -> None:
    ann, bob, case = await _ann_with_a_photo_like_bob(runtime)
    await decided(runtime, case, "duplicate", about=bob, keep=ann)
    assert [(await known(i)).status for i in (ann, bob)] == ["active", "duplicate"]
    assert await _statuses(ann) == ["active", "active"]


async def test_erasing_the_candidate_of_a_later_sample_has_it_screened_again(runtime: Runtime) -> None:
    ann, bob, case = await _ann_with_a_photo_like_bob(runtime)
    await erased(runtime, bob)
    closed = await Case.get(case.id)
    assert closed is not None
    assert closed.state == "decided"
    waiting = await known(ann)
    assert (waiting.status, waiting.screenings[1].state) == ("active", "queued")
    await screened(runtime, waiting)
    assert await _statuses(ann) == ["active", "active"]


async def test_a_revoked_identity_with_an_undecided_later_sample_is_not_reinstated(runtime: Runtime) -> None:
    ann, _, case = await _ann_with_a_photo_like_bob(runtime)
    await revoked(runtime, ann)
    with pytest.raises(UndecidedCandidates):
        await reinstated(runtime, ann)
    await decided(runtime, case, "distinct")
    assert (await reinstated(runtime, ann)).status == "active"


async def test_a_later_sample_of_a_revoked_identity_is_screened_after_its_reinstatement(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    photo = portrait("ann", capture=5)
    waiting = await enrol.add_sample(runtime, by_officer("sample.add"), await default_gallery(), ann, photo)
    await revoked(runtime, ann)
    await screened(runtime, waiting)
    assert await _statuses(ann) == ["active", "pending"]
    back = await reinstated(runtime, ann)
    assert back.outbox_at is not None, "the sweep must find it"
    await screened(runtime, back)
    assert await _statuses(ann) == ["active", "active"]


async def test_an_identity_holds_no_more_samples_than_the_setting_says(runtime: Runtime) -> None:
    runtime.settings.max_samples = 2
    ann = await with_sample(runtime, await active(runtime, "ann"), "ann")
    with pytest.raises(Conflict):
        await with_sample(runtime, ann, "ann", capture=6)
    assert await _statuses(ann) == ["active", "active"]
