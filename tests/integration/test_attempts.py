"""Verification: replays, budgets of attempts, and what changes while a selfie is being read."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import jwt
import pytest

from app.documents.base import now
from app.documents.claims import Once
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.domain.faces import RatePoint
from app.domain.thresholds import threshold_at_fmr
from app.errors import AttemptsExhausted, NotFound, ReplayedPhoto
from app.probing import A_DAY_SECONDS
from app.runtime import Runtime
from app.use_cases import standing, verify
from tests.builders import (
    active,
    another_process,
    by_officer,
    default_gallery,
    erased,
    identified,
    known,
    portrait,
    revoked,
    suspected,
    verified,
)


async def _let_time_pass(identity: Identity, seconds: int) -> None:
    """As if the last failure were so much longer ago."""
    (attempts,) = [(await known(identity)).attempts]
    assert attempts.last_failure is not None
    earlier = attempts.last_failure - timedelta(seconds=seconds)
    collection = Identity.get_pymongo_collection()
    await collection.update_one({"_id": identity.id}, {"$set": {"attempts.last_failure": earlier}})


async def _fail(runtime: Runtime, identity: Identity, first: int, times: int) -> None:
    for capture in range(first, first + times):
        assert not (await verified(runtime, identity, "impostor", capture=capture)).match


async def test_the_person_matches_and_a_stranger_does_not(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    yes, no = await verified(runtime, ann, "ann"), await verified(runtime, ann, "impostor")
    assert (yes.match, no.match) == (True, False)
    assert yes.assertion is not None
    assert no.assertion is None
    assert yes.score is not None
    assert no.score is not None
    assert yes.score > yes.threshold > no.score
    assert yes.score == round(yes.score, 2)
    events = await AuditEvent.find({"action": "face.verify"}).sort("_id").to_list()
    assert [(e.id, e.detail["match"]) for e in events] == [(yes.decision_id, True), (no.decision_id, False)]


async def test_h67_no_event_holds_a_score_finer_than_two_decimals(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A curve that is still falling at the scores of one person, as those of real models are.
    curve = (RatePoint(fmr=1e-2, threshold=0.1), RatePoint(fmr=1e-6, threshold=0.9))
    monkeypatch.setattr(runtime.engine, "card", replace(runtime.engine.card, impostor_curve=curve))
    ann = await active(runtime, "ann")
    claim = verify.Claim(ann, audience="officer-1", nonce=None)
    action = by_officer("face.verify")
    answer = await verify.verify(runtime, action, await default_gallery(), claim, portrait("ann", capture=9))
    found = await identified(runtime, "ann")
    assert answer.score is not None
    assert answer.score != round(answer.score, 2), "an officer sees all of it"
    assert found.candidates[0].score != round(found.candidates[0].score, 2)
    for event in await AuditEvent.find({"action": {"$in": ["face.verify", "face.identify"]}}).to_list():
        score = event.detail.get("score", event.detail.get("best_score"))
        assert isinstance(score, float)
        assert score == round(score, 2)
    # The rate leads back to the score that it stands for: in the event, the answer and the assertion that is the coarse one.
    assert answer.assertion is not None
    told = jwt.decode(answer.assertion, options={"verify_signature": False})
    event = await AuditEvent.get(answer.decision_id)
    assert event is not None
    for fmr in (event.detail["fmr"], answer.fmr, told["fmr"]):
        assert threshold_at_fmr(runtime.engine.card, float(fmr or 0)) == pytest.approx(told["score"], abs=1e-9)
    assert told["score"] == round(answer.score, 2)


async def test_h67_a_search_shows_nothing_below_the_threshold(runtime: Runtime) -> None:
    await active(runtime, "ann")
    found = await identified(runtime, "impostor")
    assert found.candidates == []


async def test_a_claim_on_somebody_who_is_not_active_is_no_match_without_a_score(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    held, _ = await suspected(runtime, "ann")
    answer = await verified(runtime, held, "ann")
    assert (answer.match, answer.score, answer.assertion) == (False, None, None)
    answer = await verified(runtime, await revoked(runtime, ann), "ann")
    assert (answer.match, answer.score, answer.assertion) == (False, None, None)
    assert (await known(ann)).attempts.consecutive == 0


async def test_h61_the_same_selfie_is_taken_once_for_an_identity(runtime: Runtime) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    assert (await verified(runtime, ann, "ann")).match
    with pytest.raises(ReplayedPhoto):
        await verified(runtime, ann, "ann")
    assert not (await verified(runtime, bob, "ann")).match
    assert await AuditEvent.find({"action": "face.verify"}).count() == 2


async def test_h61_of_the_same_selfie_sent_ten_times_at_once_one_is_taken(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    async with another_process(runtime) as other:
        doors = [runtime, other] * 5
        ended = await asyncio.gather(*(verified(door, ann, "ann") for door in doors), return_exceptions=True)
    assert sorted(type(e).__name__ for e in ended) == ["ReplayedPhoto"] * 9 + ["Verification"]


async def test_a_selfie_may_come_again_after_the_window(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await verified(runtime, ann, "ann")
    await Once.get_pymongo_collection().update_many({}, {"$set": {"expires_at": now()}})
    assert (await verified(runtime, ann, "ann")).match
    with pytest.raises(ReplayedPhoto):
        await verified(runtime, ann, "ann")


async def test_h65_five_non_matches_are_followed_by_a_wait(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await _fail(runtime, ann, 0, 5)
    with pytest.raises(AttemptsExhausted) as refused:
        await verified(runtime, ann, "ann", capture=50)
    assert refused.value.retry_after_seconds is not None
    assert 28 <= refused.value.retry_after_seconds <= 31
    await _let_time_pass(ann, 30)
    await _fail(runtime, ann, 5, 1)
    with pytest.raises(AttemptsExhausted):
        await verified(runtime, ann, "ann", capture=51)
    await _let_time_pass(ann, 30)
    assert (await verified(runtime, ann, "ann", capture=52)).match


async def test_a_match_forgets_the_non_matches_before_it(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    for attempt in range(3):
        await _fail(runtime, ann, 10 * attempt, 4)
        assert (await verified(runtime, ann, "ann", capture=50 + attempt)).match
    assert (await known(ann)).attempts.consecutive == 0


async def test_h65_attempts_on_one_identity_do_not_hold_up_another(runtime: Runtime) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    await _fail(runtime, ann, 0, 5)
    assert (await verified(runtime, bob, "bob")).match


async def test_h65_after_fifty_non_matches_an_officer_must_reset(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await _fail(runtime, ann, 0, 1)
    collection = Identity.get_pymongo_collection()
    await collection.update_one({"_id": ann.id}, {"$set": {"attempts.consecutive": 49}})
    await _let_time_pass(ann, 30)
    await _fail(runtime, ann, 1, 1)
    await _let_time_pass(ann, 24 * 3600)
    with pytest.raises(AttemptsExhausted) as refused:
        await verified(runtime, ann, "ann")
    assert refused.value.retry_after_seconds == A_DAY_SECONDS
    reset = await standing.reset_attempts(
        runtime, by_officer("identity.attempts.reset"), await default_gallery(), ann.id
    )
    assert reset.attempts.consecutive == 0
    assert (await verified(runtime, ann, "ann")).match


async def test_h65_attempts_made_at_once_share_one_budget(runtime: Runtime) -> None:
    """Otherwise hundreds of guesses sent in one moment would all be compared before the first is counted."""
    ann = await active(runtime, "ann")
    async with another_process(runtime) as other:
        tries = [verified([runtime, other][i % 2], ann, "impostor", capture=i) for i in range(20)]
        ended = await asyncio.gather(*tries, return_exceptions=True)
    assert sorted(type(e).__name__ for e in ended) == ["AttemptsExhausted"] * 15 + ["Verification"] * 5
    assert (await known(ann)).attempts.consecutive == 5


@pytest.mark.parametrize("change", ["revoked", "erased"])
async def test_what_happens_to_the_identity_while_the_selfie_is_read_counts(runtime: Runtime, change: str) -> None:
    ann = await active(runtime, "ann")
    claim = verify.Claim(ann, audience=None, nonce=None)
    await (revoked(runtime, ann) if change == "revoked" else erased(runtime, ann))
    action = by_officer("face.verify")
    answering = verify.verify(runtime, action, await default_gallery(), claim, portrait("ann", capture=9))
    if change == "erased":
        with pytest.raises(NotFound):
            await answering
        return
    answer = await answering
    assert (answer.match, answer.score, answer.assertion) == (False, None, None)


async def test_a_higher_threshold_set_by_hand_holds_at_once(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    assert (await verified(runtime, ann, "ann")).match
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"policy.verify_threshold": 0.99}})
    answer = await verified(runtime, ann, "ann", capture=10)
    assert (answer.match, answer.threshold) == (False, 0.99)
