"""Erasure: what it destroys, and whom it sets free."""

import asyncio
import io
import time
from datetime import timedelta

import numpy as np
import pytest
from PIL import Image

from app.documents.cases import Case, Pair
from app.documents.events import AuditEvent
from app.documents.galleries import GalleryChange
from app.documents.identities import Identity
from app.domain.alignment import CROP_SIDE, TEMPLATE, aligned_crop
from app.domain.faces import Face, Pixels
from app.errors import NoFace, NotFound, PhotoMissing
from app.runtime import Runtime
from app.use_cases import screen
from app.use_cases.verify import Claim, Verification, verify
from app.use_cases.view_photo import view_crop, view_photo
from storage.photos import PhotoNotFound
from tests.builders import (
    active,
    another_process,
    by_app,
    by_officer,
    decided,
    default_gallery,
    enrolled,
    erased,
    identified,
    known,
    portrait,
    screened,
    settled,
    suspected,
)
from tests.fakes import DIMENSION, FACE_AT


def pixels_of_bytes(data: bytes) -> Pixels:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


async def claimed(process: Runtime, identity: Identity, person: str, capture: int) -> Verification:
    """A claim on the identity as it was when the caller read it."""
    claim = Claim(identity, audience=None, nonce=None)
    return await verify(
        process, by_app("face.verify"), await default_gallery(), claim, portrait(person, capture=capture)
    )


async def test_h70_erasing_the_candidate_of_an_open_case_sets_its_newcomer_free(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    held, case = await suspected(runtime, "ann")
    await erased(runtime, ann)
    waiting = await known(held)
    assert (waiting.status, waiting.screenings[0].state, waiting.screenings[0].case_id) == ("pending", "queued", None)
    assert waiting.outbox_at is not None, "the sweep must find it"
    closed = await Case.get(case.id)
    assert closed is not None
    assert (closed.state, closed.decided_by) == ("decided", None)
    assert (await screened(runtime, waiting)).status == "active"


async def test_a_newcomer_set_free_still_meets_its_other_look_alikes(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    first, _ = await suspected(runtime, "ann")
    second, _ = await suspected(runtime, "ann", capture=2)
    await erased(runtime, ann)
    freed = [await known(i) for i in (first, second)]
    assert [i.status for i in freed] == ["pending", "pending"]
    async with another_process(runtime) as other:
        await asyncio.gather(screened(runtime, freed[0]), screened(other, freed[1]))
    assert [(await known(i)).status for i in freed] == ["active", "suspected_duplicate"]


async def test_what_was_called_distinct_stays_so_when_a_third_one_is_erased(runtime: Runtime) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    newcomer, case = await suspected(runtime, "ann", "bob")
    await decided(runtime, case, "distinct", about=ann)
    await erased(runtime, bob)
    assert (await screened(runtime, newcomer)).status == "active"


async def test_erasing_the_newcomer_only_closes_its_case(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    newcomer, case = await suspected(runtime, "ann")
    await erased(runtime, newcomer)
    closed = await Case.get(case.id)
    assert closed is not None
    assert (closed.state, closed.decided_by) == ("decided", None)
    untouched = await known(ann)
    assert (untouched.status, untouched.version) == ("active", ann.version)
    assert await Pair.count() == 0


async def test_h70_an_erased_newcomer_gets_no_verdict(runtime: Runtime) -> None:
    newcomer = await enrolled(runtime, "ann")
    await erased(runtime, newcomer)
    await screen.screen(runtime, newcomer.id, newcomer.screenings[0].job_id)
    assert await AuditEvent.find({"action": "dedup.verdict"}).count() == 0


async def test_h71_nothing_that_opens_is_left_of_an_erased_person(runtime: Runtime) -> None:
    ann = await enrolled(runtime, "ann", photos=2, external_ref="NID-1", full_name="Ann Example")
    receipt = await erased(runtime, ann)
    assert (receipt.samples, receipt.photos, receipt.identity_id) == (2, 2, ann.id)
    assert receipt.index_purge_by - receipt.erased_at < timedelta(hours=runtime.settings.index_purge_hours, seconds=1)
    left = await Identity.get(ann.id)
    assert left is not None
    assert (left.status, left.samples, left.screenings, left.outbox_at) == ("erased", [], [], None)
    assert (left.wrapped_key, left.attributes, left.external_ref_hash) == (None, None, None)
    assert (left.name_tags, left.key_generation, left.attempts.consecutive) == ([], None, 0)
    for sample in ann.samples:
        with pytest.raises(PhotoNotFound):
            await runtime.photos.get(sample.photo_key)
    rows = await GalleryChange.find_all().sort("seq").to_list()
    assert [(r.seq, r.kind, r.identity_id) for r in rows] == [
        (1, "blank", None), (2, "blank", None), (3, "remove", ann.id), (4, "remove", ann.id),
    ]  # fmt: skip
    gallery = await default_gallery()
    assert (gallery.seq, gallery.identities, gallery.samples) == (4, 0, 0)
    event = await AuditEvent.get(receipt.audit_event_id)
    assert event is not None
    assert (event.action, event.subject.id) == ("identity.erase", ann.id)


async def test_h70_an_erased_person_is_unmatchable_within_a_second_on_every_process(runtime: Runtime) -> None:
    async with another_process(runtime) as second, another_process(runtime) as third:
        processes = (runtime, second, third)
        ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
        for process in processes:  # with the vectors in memory of each
            assert [c.identity_id for c in (await identified(process, "ann")).candidates] == [ann.id]
        await erased(runtime, ann)
        found = await asyncio.gather(
            *(identified(process, "ann") for process in processes)
        )  # at once, and not after a second
        assert [answer.candidates for answer in found] == [[], [], []]
        for process in processes:
            with pytest.raises(NotFound):
                await claimed(process, ann, "ann", capture=9)
            assert [c.identity_id for c in (await identified(process, "bob")).candidates] == [bob.id]


async def test_h70_whoever_authenticates_during_an_erasure_matches_before_it_or_is_unknown(runtime: Runtime) -> None:
    async with another_process(runtime) as other:
        for race in range(4):
            ann = await active(runtime, f"ann{race}")

            async def ask(capture: int, ann: Identity = ann, race: int = race) -> tuple[bool, float]:
                began = time.monotonic()
                try:
                    return (await claimed(other, ann, f"ann{race}", capture=capture)).match, began
                except NotFound:
                    return False, began

            async def take(ann: Identity = ann) -> float:
                await asyncio.sleep(0.02)
                await erased(runtime, ann)
                return time.monotonic()

            *answers, gone = await asyncio.gather(*(ask(100 + i) for i in range(6)), take())
            assert isinstance(gone, float)
            answers.append(await ask(200))  # type: ignore[arg-type]
            late = [matched for matched, began in answers if began > gone]  # type: ignore[misc]
            assert late
            assert not any(late)


async def test_an_erased_identity_is_unknown_ever_after(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await erased(runtime, ann)
    with pytest.raises(NotFound):
        await erased(runtime, ann)
    assert await Identity.living(ann.id) is None
    assert (await identified(runtime, "ann")).candidates == []


async def test_h70_an_erased_reference_and_face_may_be_enrolled_anew(runtime: Runtime) -> None:
    await erased(runtime, await active(runtime, "ann", external_ref="NID-1"))
    again = await settled(runtime, "ann", capture=1, external_ref="NID-1")
    assert again.status == "active"


async def test_h70_two_erasures_at_once_give_one_receipt(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    async with another_process(runtime) as other:
        ended = await asyncio.gather(erased(runtime, ann), erased(other, ann), return_exceptions=True)
    assert [type(e) for e in ended if isinstance(e, BaseException)] == [NotFound]
    gallery = await default_gallery()
    assert (gallery.identities, gallery.samples) == (0, 0)


@pytest.mark.parametrize("race", range(5))
async def test_h70_an_erasure_racing_with_a_verdict_never_leaves_a_case_about_nobody(
    runtime: Runtime, race: int
) -> None:
    async with another_process(runtime) as other:
        ann = await active(runtime, "ann")
        newcomer = await enrolled(runtime, "ann", capture=1)
        await asyncio.gather(screened(runtime, newcomer), erased(other, ann))
    newcomer = await known(newcomer)
    assert newcomer.status in ("pending", "active"), race
    assert await Case.find({"state": "open"}).count() == 0
    assert (await screened(runtime, newcomer)).status == "active"


async def test_the_crop_that_is_compared_can_be_seen_and_each_view_is_an_event(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await active(runtime, "ann")
    (sample,), gallery, viewing = ann.samples, await default_gallery(), by_officer("identity.photo.view")
    photo = pixels_of_bytes(await view_photo(runtime, viewing, gallery, ann, sample.id))
    whole = aligned_crop(photo, (TEMPLATE + FACE_AT).astype(np.float32))
    crop = await view_crop(runtime, viewing, gallery, ann, sample.id)
    assert np.array_equal(pixels_of_bytes(crop), whole)
    events = await AuditEvent.find({"action": "identity.photo.view"}).sort("_id").to_list()
    assert [event.detail for event in events] == [
        {"sample_id": sample.id, "people": 1},
        {"sample_id": sample.id, "people": 1, "crop": True},
    ]
    # A sample of an older version does not say where its face is, so the face is searched for again.
    old = ann.model_copy(update={"samples": [sample.model_copy(update={"landmarks": None})]})
    small, large = (
        Face((0.0, 0.0, side, side), (TEMPLATE * side / CROP_SIDE).astype(np.float32), 0.9) for side in (50.0, 100.0)
    )
    monkeypatch.setattr(runtime.engine, "detect", lambda *_, **__: [small, large])
    monkeypatch.setattr(runtime.engine, "embed", lambda *_: (np.eye(1, DIMENSION, dtype=np.float32)[0], 25.0))
    again = await view_crop(runtime, viewing, gallery, old, sample.id)
    assert np.array_equal(pixels_of_bytes(again), aligned_crop(photo, large.landmarks))
    monkeypatch.setattr(runtime.engine, "detect", lambda *_, **__: [])
    with pytest.raises(NoFace):
        await view_crop(runtime, viewing, gallery, old, sample.id)
    await runtime.photos.delete([sample.photo_key])
    with pytest.raises(PhotoMissing):
        await view_crop(runtime, viewing, gallery, ann, sample.id)
    with pytest.raises(NotFound):
        await view_crop(runtime, viewing, gallery, ann, "another")


async def test_a_photo_that_the_store_lost_or_changed_is_missing(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    (sample,), gallery, viewing = ann.samples, await default_gallery(), by_officer("identity.photo.view")
    assert (await view_photo(runtime, viewing, gallery, ann, sample.id)).startswith(b"\xff\xd8")
    sealed = await runtime.photos.get(sample.photo_key)
    await runtime.photos.put(sample.photo_key, sealed[:-1] + bytes([sealed[-1] ^ 1]))
    with pytest.raises(PhotoMissing):
        await view_photo(runtime, viewing, gallery, ann, sample.id)
    await runtime.photos.delete([sample.photo_key])
    with pytest.raises(PhotoMissing):
        await view_photo(runtime, viewing, gallery, ann, sample.id)
    assert await AuditEvent.find({"action": "identity.photo.view"}).count() == 1
