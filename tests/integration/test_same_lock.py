"""1:N has the locks of 1:1 for relying applications: attempts, budgets, nonces, replays, and no score to climb."""

import asyncio
import hashlib
import io
from dataclasses import replace

import pytest
from PIL import Image

from app.audit import Action
from app.documents.base import now
from app.documents.budgets import FaceBudget
from app.documents.claims import Once
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.domain.callers import Role
from app.domain.policy import thresholds_for
from app.errors import NonceInvalid, RateLimited, ReplayedPhoto
from app.runtime import Runtime
from app.use_cases.challenge import challenge
from app.use_cases.identify import Identification, identify
from app.use_cases.verify import Claim, verify
from tests.builders import (
    APP,
    active,
    another_process,
    by_app,
    by_officer,
    coded_anew,
    default_gallery,
    identified,
    in_another_file,
    known,
    portrait,
    revoked,
    verified,
)

#: With so many faces mixed in, a photo is alike enough to be found, and not clearly.
STRANGERS = tuple(f"stranger-{number}" for number in range(6))


async def _found(
    runtime: Runtime, photo: bytes, nonce: str | None = None, *, action: Action | None = None, limit: int = 10
) -> Identification:
    """What a relying application is answered."""
    return await identify(
        runtime, action or by_app("face.identify"), await default_gallery(), photo, limit, nonce
    )  # fmt: skip


async def _ids(runtime: Runtime, photo: bytes, nonce: str | None = None) -> list[str]:
    return [one.identity_id for one in (await _found(runtime, photo, nonce)).candidates]


async def _set(**policy: object) -> None:
    fields = {f"policy.{name}": value for name, value in policy.items()}
    await Gallery.get_pymongo_collection().update_one({}, {"$set": fields})


async def _nonce(runtime: Runtime, identity_id: str | None = None, action: Action | None = None) -> str:
    given = action or by_app("face.challenge")
    return (await challenge(runtime, given, await default_gallery(), identity_id)).nonce


async def _attempts(identity: Identity, consecutive: int) -> None:
    fields = {"attempts.consecutive": consecutive, "attempts.last_failure": now()}
    await Identity.get_pymongo_collection().update_one({"_id": identity.id}, {"$set": fields})


async def test_a12_a_locked_victim_is_never_found_and_no_score_is_read(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await _set(require_nonce=True, near_copies="refuse")
    await _attempts(ann, 50)
    read: list[float | None] = []
    for capture in range(80):
        mixed = portrait("ann", *STRANGERS[: capture % 6], capture=capture)
        answer = await _found(runtime, mixed, await _nonce(runtime))
        read += [one.score for one in answer.candidates]
    assert read == []
    assert (await known(ann)).attempts.consecutive == 50, "a search neither uses attempts up nor gives them back"
    events = await AuditEvent.find({"action": "face.identify"}).to_list()
    assert len(events) == 80
    told = [event.detail["withheld"] for event in events]
    assert told.count({ann.id: "attempts"}) > 14, "the log tells whom the photos showed"
    officers = await identified(runtime, "ann", capture=90)
    assert [one.identity_id for one in officers.candidates] == [ann.id], "officers are rated, and find everybody"


async def test_a12_the_same_photo_ten_times_is_answered_once_where_copies_are_refused(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await _set(near_copies="refuse")
    selfie = portrait("ann", capture=3)
    assert await _ids(runtime, selfie) == [ann.id]
    nobody = portrait("nobody", capture=3)
    assert await _ids(runtime, nobody) == []
    for number in range(10):
        for again in (selfie, coded_anew(selfie, number), nobody, in_another_file(nobody, number)):
            with pytest.raises(ReplayedPhoto):
                await _found(runtime, again)
    for _ in range(2):
        assert (await _found(runtime, selfie, action=by_officer("face.identify"))).candidates, (
            "not checked for officers"
        )


async def test_a12_of_one_photo_sent_ten_times_at_once_one_is_answered(runtime: Runtime) -> None:
    await active(runtime, "ann")
    await _set(near_copies="refuse")
    selfie = portrait("ann", capture=3)
    async with another_process(runtime) as other:
        doors = [runtime, other] * 5
        ended = await asyncio.gather(*(_found(door, selfie) for door in doors), return_exceptions=True)
    assert sorted(type(e).__name__ for e in ended) == ["Identification"] + ["ReplayedPhoto"] * 9


async def test_a12_a_copy_of_a_photo_of_the_other_door_is_refused(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await _set(near_copies="refuse")
    assert (await verified(runtime, ann, "ann", capture=3)).match
    for copy in (portrait("ann", capture=3), coded_anew(portrait("ann"))):
        with pytest.raises(ReplayedPhoto):
            await _found(runtime, copy)
    assert await _ids(runtime, portrait("ann", capture=4)) == [ann.id]
    with pytest.raises(ReplayedPhoto):
        await verified(runtime, ann, "ann", capture=4)


async def test_a12_a_gallery_that_flags_copies_answers_a_search_again(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    for _ in range(2):
        assert await _ids(runtime, portrait("ann", capture=3)) == [ann.id]


async def test_a12_a_search_needs_a_nonce_of_its_gallery_and_caller_where_verifications_do(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await _set(require_nonce=True)
    officers = await _nonce(runtime, action=by_officer("face.challenge"))
    for wrong in (None, "4711", "idem-nonce-made-up", officers, await _nonce(runtime, ann.id)):
        with pytest.raises(NonceInvalid):
            await _found(runtime, portrait("ann", capture=3), wrong)
    assert await AuditEvent.find({"action": "face.identify"}).count() == 0
    nonce = await _nonce(runtime)
    assert await _ids(runtime, portrait("ann", capture=3), nonce) == [ann.id]
    with pytest.raises(NonceInvalid):
        await _found(runtime, portrait("ann", capture=4), nonce)
    assert (await _found(runtime, portrait("ann"), action=by_officer("face.identify"))).candidates, "officers need none"


async def test_a12_of_one_nonce_sent_with_ten_photos_at_once_one_is_answered(runtime: Runtime) -> None:
    await active(runtime, "ann")
    await _set(require_nonce=True)
    nonce = await _nonce(runtime)
    tries = (_found(runtime, portrait("ann", capture=capture), nonce) for capture in range(10))
    ended = await asyncio.gather(*tries, return_exceptions=True)
    assert sorted(type(e).__name__ for e in ended) == ["Identification"] + ["NonceInvalid"] * 9


async def test_a12_relying_applications_get_bands_and_officers_scores(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    limits = thresholds_for((await default_gallery()).policy, runtime.engine.card, 1)
    mixed = [portrait("ann", *STRANGERS, capture=capture) for capture in range(20)]
    scores = [(await _found(runtime, photo, action=by_officer("face.identify"))).candidates for photo in mixed]
    close = next(p for p, one in zip(mixed, scores, strict=True) if one and (one[0].score or 1) < limits.strong - 0.01)
    for photo, band in ((portrait("ann", capture=3), "strong"), (close, "near")):
        (shown,) = (await _found(runtime, photo)).candidates
        assert (shown.identity_id, shown.band, shown.score, shown.fpir, shown.rank) == (ann.id, band, None, None, 1)
        (full,) = (await _found(runtime, photo, action=by_officer("face.identify"))).candidates
        assert full.band == band
        assert full.score is not None
        assert full.fpir is not None
        assert (full.score >= limits.strong) == (band == "strong")
    event = (await AuditEvent.find({"action": "face.identify", "actor.id": "app-1"}).sort("_id").to_list())[-1]
    assert full.score is not None
    assert event.detail["found"] == {ann.id: {"rank": 1, "band": "near", "score": round(full.score, 2)}}


@pytest.mark.parametrize("role", [Role.ADMIN, Role.AUDITOR])
async def test_a12_another_role_beside_it_does_not_show_scores(runtime: Runtime, role: Role) -> None:
    await active(runtime, "ann")
    both = replace(by_app("face.identify"), caller=replace(APP, roles=frozenset({Role.RELYING_APP, role})))
    (shown,) = (await _found(runtime, portrait("ann", capture=3), action=both)).candidates
    assert shown.score is None


async def test_a12_the_order_of_near_candidates_tells_nothing(runtime: Runtime) -> None:
    """Else a photo between two people tells which of their scores is the higher one."""
    people = [await active(runtime, name) for name in ("ann", "bob")]
    await _set(identify_threshold=0.2)
    by_score, by_id = set(), set()
    for capture in range(40):
        photo = portrait("ann", "bob", *(f"{name}-{capture}" for name in range(9)), capture=capture)
        full = (await _found(runtime, photo, action=by_officer("face.identify"))).candidates
        if [one.band for one in full] != ["near", "near"]:
            continue
        by_score.add(tuple(one.identity_id for one in full))
        by_id.add(tuple(await _ids(runtime, photo)))
    assert len(by_score) == 2, "the scores have both orders"
    assert by_id == {tuple(sorted(person.id for person in people))}


async def test_a12_a_person_found_too_often_is_not_found_for_the_hour(runtime: Runtime) -> None:
    runtime.settings.finds_per_identity_per_hour = 3
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    found = [await _ids(runtime, portrait("ann", capture=capture)) for capture in range(6)]
    assert found == [[ann.id]] * 3 + [[]] * 3
    assert await _ids(runtime, portrait("bob", capture=1)) == [bob.id], "others are found"
    assert (await verified(runtime, ann, "ann", capture=8)).match, "a claim has its own lock"
    assert (await identified(runtime, "ann")).candidates, "officers are not counted"
    (alarm,) = await AuditEvent.find({"action": "face.alarm"}).to_list()
    assert (alarm.subject.kind, alarm.subject.id) == ("client", "app-1")
    assert alarm.detail == {"identity_id": ann.id, "finds": 3}


async def test_a12_searches_at_the_same_moment_share_one_count(runtime: Runtime) -> None:
    runtime.settings.finds_per_identity_per_hour = 3
    ann = await active(runtime, "ann")
    async with another_process(runtime) as other:
        doors = [runtime, other] * 6
        photos = [portrait("ann", capture=capture) for capture in range(12)]
        answers = await asyncio.gather(*(_ids(door, photo) for door, photo in zip(doors, photos, strict=True)))
    assert sorted(answers) == [[]] * 9 + [[ann.id]] * 3


async def test_a12_a_spent_face_is_refused_whether_it_shows_anybody_or_not(runtime: Runtime) -> None:
    runtime.settings.probe_identities_per_hour = 2
    ann, bob, cat = [await active(runtime, name) for name in ("ann", "bob", "cat")]
    for person in (ann, bob):
        await verified(runtime, person, "cat", capture=3)
        await verified(runtime, person, "nobody", capture=3)
    for face in (portrait("cat", capture=3), portrait("nobody", capture=3)):
        with pytest.raises(RateLimited):
            await _found(runtime, face)
    assert (await _found(runtime, portrait("cat", capture=3), action=by_officer("face.identify"))).candidates
    assert await _ids(runtime, portrait("ann", capture=3)) == [ann.id]
    assert (await known(cat)).attempts.consecutive == 0


async def test_a12_what_a_search_finds_counts_as_asked_about(runtime: Runtime) -> None:
    runtime.settings.probe_identities_per_hour = 1
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    assert await _ids(runtime, portrait("ann", capture=3)) == [ann.id]
    claim = Claim(await known(bob), audience=None, nonce=None)
    with pytest.raises(RateLimited):
        await verify(
            runtime, by_app("face.verify"), await default_gallery(), claim, coded_anew(portrait("ann", capture=3))
        )


async def test_a12_somebody_whose_attempts_wait_is_found_again_afterwards(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await _attempts(ann, 5)
    assert await _ids(runtime, portrait("ann", capture=3)) == []
    await Identity.get_pymongo_collection().update_one({"_id": ann.id}, {"$set": {"attempts.consecutive": 4}})
    assert await _ids(runtime, portrait("ann", capture=3)) == [ann.id]
    await revoked(runtime, ann)
    assert await _ids(runtime, portrait("ann", capture=3)) == []


# What counts as the same photo.


def _in_other_files(photo: bytes) -> list[bytes]:
    """The same picture in other files: with bytes at the end, a note, and turned back by its orientation."""
    picture, buffer = Image.open(io.BytesIO(photo)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.rotate(180).save(buffer, "PNG", exif=exif)
    return [photo + b"!", in_another_file(photo), buffer.getvalue()]


async def test_the_same_picture_is_a_replay_in_any_file(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    selfie = portrait("ann", capture=3)
    claim = Claim(await known(ann), audience=None, nonce=None)
    assert (await verify(runtime, by_app("face.verify"), await default_gallery(), claim, selfie)).match
    for again in _in_other_files(selfie):
        with pytest.raises(ReplayedPhoto):
            await verify(runtime, by_app("face.verify"), await default_gallery(), claim, again)
    assert (await verified(runtime, ann, "ann", capture=4)).match


async def test_what_an_older_version_remembered_of_a_photo_still_counts(runtime: Runtime) -> None:
    """Older versions, which may still run beside this one, know a photo by its bytes."""
    ann = await active(runtime, "ann")
    selfie, later = portrait("ann", capture=3), portrait("ann", capture=4)

    def mark_of(photo: bytes) -> str:
        digest = ann.id.encode() + hashlib.sha256(photo).digest()
        return runtime.keys.keyed_hash("presented", digest).hex()

    await Once(id=mark_of(selfie), expires_at=now().replace(year=2100)).insert()
    with pytest.raises(ReplayedPhoto):
        await verified(runtime, ann, "ann", capture=3)
    assert (await verified(runtime, ann, "ann", capture=4)).match
    assert await Once.get(mark_of(later)) is not None


async def test_a_search_s_event_has_the_nonce_hashed_in_its_leaf_and_tells_what_was_answered(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await _found(runtime, portrait("ann", capture=3), "ann@example.org")
    (event,) = await AuditEvent.find({"action": "face.identify"}).to_list()
    assert "example.org" not in str(event.leaf(0))
    assert event.detail["nonce"]
    assert event.detail["challenged"] is False
    assert event.detail["flags"] == ""
    assert event.detail["withheld"] == {}
    found = event.detail["found"]
    assert isinstance(found, dict)
    assert list(found) == [ann.id]
    await _attempts(ann, 50)
    await _found(runtime, portrait("ann", capture=4), "ann@example.org")
    withheld = (await AuditEvent.find({"action": "face.identify"}).sort("_id").to_list())[-1]
    assert withheld.detail["found"] == {}
    assert withheld.detail["best_identity_id"] == ann.id, "by it an erasure finds the event"


async def test_the_first_requests_of_an_hour_that_come_at_once_all_find_room(runtime: Runtime) -> None:
    keys = runtime.keys
    for hour in range(20):
        finds = (FaceBudget.admits_finds(keys, f"kiosk-{hour}", 1, [f"id-{n}"], 100) for n in range(8))
        claims = (FaceBudget.admits(keys, f"bank-{hour}", 1, f"id-{n}", 100, None) for n in range(8))
        assert all(await asyncio.gather(*finds, *claims))
    assert [await FaceBudget.admits(keys, "small", 1, f"id-{n}", 2, None) for n in range(3)] == [True, True, False]
    assert [await FaceBudget.admits_finds(keys, "few", 1, [f"id-{n}"], 2) for n in range(3)] == [True, True, False]
