"""Copies of earlier photos: the same bytes are refused, near copies are flagged or refused."""

import asyncio
from datetime import timedelta

import jwt
import pytest

from app.documents.base import now
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.probes import KEPT, Probe
from app.errors import ReplayedPhoto
from app.runtime import Runtime
from app.use_cases.challenge import challenge
from app.use_cases.verify import Claim, Verification, verify
from tests.builders import (
    active,
    another_process,
    by_app,
    coded_anew,
    default_gallery,
    known,
    portrait,
    revoked,
    verified,
)
from tests.fakes import FakeEngine


async def _presented(runtime: Runtime, identity: Identity, photo: bytes) -> Verification:
    claim = Claim(await known(identity), audience=None, nonce=None)
    return await verify(runtime, by_app("face.verify"), await default_gallery(), claim, photo)


async def _set(**policy: object) -> None:
    fields = {f"policy.{name}": value for name, value in policy.items()}
    await Gallery.get_pymongo_collection().update_one({}, {"$set": fields})


async def test_h61_the_same_selfie_bytes_are_refused_whatever_they_showed(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    for person in ("ann", "impostor"):
        selfie = portrait(person, capture=3)
        await _presented(runtime, ann, selfie)
        with pytest.raises(ReplayedPhoto):
            await _presented(runtime, ann, selfie)
    assert (await known(ann)).attempts.consecutive == 1, "a replay costs no attempt"


async def test_h62_a_selfie_coded_anew_is_flagged(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    selfie = portrait("ann", capture=3)
    first, second = await _presented(runtime, ann, selfie), await _presented(runtime, ann, coded_anew(selfie))
    assert (first.match, first.flags) == (True, ())
    assert (second.match, second.flags) == (True, ("near-copy",))
    event = await AuditEvent.get(second.decision_id)
    assert event is not None
    assert event.detail["flags"] == "near-copy"


async def test_h62_of_copies_sent_at_once_all_but_one_are_flagged(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    copies = [coded_anew(portrait("ann", capture=3), level) for level in range(5)]
    async with another_process(runtime) as other:
        doors = [runtime, other, runtime, other, runtime]
        answers = await asyncio.gather(*(_presented(d, ann, c) for d, c in zip(doors, copies, strict=True)))
    assert sorted(answer.flags for answer in answers) == [(), *[("near-copy",)] * 4]


async def test_h62_h63_a_gallery_may_refuse_near_copies(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await _set(near_copies="refuse")
    selfie = portrait("ann", capture=3)
    assert (await _presented(runtime, ann, selfie)).match
    for copy in (coded_anew(selfie), coded_anew(portrait("ann"))):
        with pytest.raises(ReplayedPhoto):
            await _presented(runtime, ann, copy)
    assert (await verified(runtime, ann, "ann", capture=4)).flags == ()


async def test_h63_the_enrolment_photo_as_selfie_is_flagged(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    answer = await _presented(runtime, ann, portrait("ann"))
    assert (answer.match, answer.flags) == (True, ("probe-equals-reference",))
    again = await _presented(runtime, ann, coded_anew(portrait("ann")))
    assert again.flags == ("near-copy", "probe-equals-reference")


async def test_other_photos_and_other_identities_are_not_flagged(runtime: Runtime) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    for capture in range(2, 6):
        assert (await verified(runtime, ann, "ann", capture=capture)).flags == ()
    assert (await _presented(runtime, bob, portrait("ann", capture=2))).flags == ()


async def test_a_near_copy_may_come_again_after_the_window(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    selfie = portrait("ann", capture=3)
    await _presented(runtime, ann, selfie)
    (kept,) = await Probe.find_all().to_list()
    hours = runtime.settings.replay_window_hours
    assert abs(kept.expires_at - kept.presented_at - timedelta(hours=hours)) < timedelta(seconds=1)
    await Probe.get_pymongo_collection().update_many({}, {"$set": {"expires_at": now()}})
    assert (await _presented(runtime, ann, coded_anew(selfie))).flags == ()


async def test_the_newest_probes_are_kept_and_non_matches_do_not_push_out_matches(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    selfie = portrait("ann", capture=3)
    await _presented(runtime, ann, selfie)
    for capture in range(KEPT + 2):
        await Identity.get_pymongo_collection().update_one({"_id": ann.id}, {"$set": {"attempts.consecutive": 0}})
        await verified(runtime, ann, "impostor", capture=capture)
    kept = await Probe.recent(ann.id)
    assert len(kept) == KEPT + 1
    assert (await _presented(runtime, ann, coded_anew(selfie))).flags == ("near-copy",)
    oldest, newest = portrait("impostor", capture=0), portrait("impostor", capture=KEPT + 1)
    assert (await _presented(runtime, ann, coded_anew(oldest))).flags == ()
    assert (await _presented(runtime, ann, coded_anew(newest))).flags == ("near-copy",)


async def test_nothing_is_remembered_of_a_claim_that_was_not_compared(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await revoked(runtime, ann)
    assert (await verified(runtime, ann, "ann")).flags == ()
    assert await Probe.find_all().count() == 0


async def test_probes_of_an_identity_are_forgotten_together_and_alone(runtime: Runtime) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    for capture in range(3, 6):
        await verified(runtime, ann, "ann", capture=capture)
    await verified(runtime, bob, "bob")
    assert await runtime.transaction(lambda session: Probe.forget(ann.id, session)) == 3
    assert [probe.identity_id for probe in await Probe.find_all().to_list()] == [bob.id]


async def test_a18_the_assertion_tells_what_is_doubtful_about_the_photo(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who presents the photo is the suspect, and the relying party sees the assertion only."""
    ann = await active(runtime, "ann")

    async def told(photo: bytes, nonce: str | None = None) -> dict[str, object]:
        claim = Claim(await known(ann), audience=None, nonce=nonce)
        answer = await verify(runtime, by_app("face.verify"), await default_gallery(), claim, photo)
        assert answer.assertion is not None
        claims = jwt.decode(answer.assertion, options={"verify_signature": False})
        return {name: claims[name] for name in ("flags", "live", "challenged")}

    given = await challenge(runtime, by_app("face.challenge"), await default_gallery(), None)
    plain = {"flags": [], "live": None, "challenged": False}
    assert await told(portrait("ann", capture=3)) == plain
    assert await told(portrait("ann", capture=4), "a nonce of its own") == plain
    assert await told(portrait("ann", capture=5), given.nonce) == plain | {"challenged": True}
    assert await told(portrait("ann")) == plain | {"flags": ["probe-equals-reference"]}
    assert await told(coded_anew(portrait("ann", capture=3))) == plain | {"flags": ["near-copy"]}
    await _set(liveness="observe")
    for score, live in ((0.01, False), (0.99, True)):
        monkeypatch.setattr(FakeEngine, "liveness", lambda *_, score=score: score)
        assert await told(portrait("ann", capture=10 + live)) == plain | {"live": live}
