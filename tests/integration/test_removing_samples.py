"""One sample of an identity is removed: no search finds it any more, and everything else stays."""

from datetime import timedelta

import pytest

from app.audit import by_system
from app.documents.cases import Case, Pair
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.removals import SampleRemoval
from app.errors import Conflict, NotFound
from app.runtime import Runtime
from app.use_cases import enrol, screen
from app.use_cases.check import check
from app.use_cases.export_subject import export_subject
from app.use_cases.publish import publish
from app.use_cases.remove_sample import remove_sample, settle_removals
from storage.photos import PhotoNotFound, PhotoStoreUnavailable
from tests.builders import (
    active,
    another_process,
    by_officer,
    case_about,
    decided,
    default_gallery,
    enrolled,
    erased,
    identified,
    known,
    portrait,
    reinstated,
    revoked,
    screened,
    suspected,
    verified,
    with_sample,
)


async def removed(runtime: Runtime, identity: Identity, number: int) -> SampleRemoval:
    """Remove the identity's sample with this number."""
    sample = (await known(identity)).samples[number]
    gallery = await default_gallery()
    return await remove_sample(runtime, by_officer("sample.remove"), gallery, identity.id, sample.id, "not the person")


async def findings(runtime: Runtime) -> dict[str, int]:
    """What `idem check` finds."""
    return dict((await check(runtime, lambda *_: None)).counts)


async def _ann_with_two(runtime: Runtime) -> Identity:
    return await with_sample(runtime, await active(runtime, "ann"), "ann", "bob")


async def test_a_removed_sample_answers_nothing_at_once_on_every_process(runtime: Runtime) -> None:
    ann = await _ann_with_two(runtime)
    async with another_process(runtime) as other:
        for process in (runtime, other):
            (found,) = (await identified(process, "ann", "bob", capture=30)).candidates
            assert found.score == pytest.approx(0.8, abs=0.1)
        sample = ann.samples[1]
        removal = await removed(runtime, ann, 1)
        for process in (runtime, other):
            (found,) = (await identified(process, "ann", "bob", capture=31)).candidates
            assert found.score == pytest.approx(0.57, abs=0.1)
    answer = await verified(runtime, ann, "ann", "bob", capture=32)
    assert answer.score == pytest.approx(0.57, abs=0.1)
    left = await known(ann)
    assert [s.id for s in left.samples] == [ann.samples[0].id]
    assert (left.status, removal.id, removal.identity_id) == ("active", sample.id, ann.id)
    with pytest.raises(PhotoNotFound):
        await runtime.photos.get(sample.photo_key)
    (event,) = await AuditEvent.find({"action": "sample.remove"}).to_list()
    assert (event.id, event.subject.id, event.detail["sample_id"]) == (removal.event_id, ann.id, sample.id)
    assert event.told["reason"] == "not the person"
    assert await findings(runtime) == {}


async def test_a_removal_purges_the_index_files_with_the_vector(runtime: Runtime) -> None:
    ann = await _ann_with_two(runtime)
    await publish(runtime, by_system("index.publish"), (await default_gallery()).id, holder="test")
    removal = await removed(runtime, ann, 1)
    head = await default_gallery()
    assert head.purge_by == removal.index_purge_by
    assert (head.identities, head.samples, head.removed) == (1, 1, 1)
    await publish(runtime, by_system("index.publish"), head.id, holder="test")
    head = await default_gallery()
    assert head.published is not None
    assert (head.published.count, head.purge_by) == (1, None) or head.previous is not None
    (found,) = (await identified(runtime, "ann", "bob", capture=31)).candidates
    assert found.score == pytest.approx(0.57, abs=0.1)
    assert await findings(runtime) == {}


async def test_the_last_sample_of_an_enrolment_cannot_be_removed(runtime: Runtime) -> None:
    gallery = await default_gallery()
    ann = await screened(runtime, await enrolled(runtime, "ann", photos=2))
    ann = await with_sample(runtime, ann, "ann")
    await removed(runtime, ann, 0)
    with pytest.raises(Conflict, match="last photo"):
        await removed(runtime, ann, 0)
    left = await known(ann)
    assert [s.id for s in left.samples] == [s.id for s in ann.samples[1:]]
    assert [s.id for s in left.enrolment_samples] == [ann.samples[1].id]
    assert (await verified(runtime, ann, "ann")).match
    with pytest.raises(NotFound):
        await remove_sample(runtime, by_officer("sample.remove"), gallery, ann.id, ann.samples[0].id, "again")
    assert (await with_sample(runtime, ann, "ann", capture=8)).samples[-1].status == "active"


async def test_a_sample_stays_while_a_case_about_it_is_open(runtime: Runtime) -> None:
    bob = await active(runtime, "bob")
    ann = await with_sample(runtime, await active(runtime, "ann"), "ann")
    ann = await with_sample(runtime, ann, "ann", "bob", capture=6)
    case = await case_about(ann)
    with pytest.raises(Conflict, match="case"):
        await removed(runtime, ann, 2)
    assert len((await known(ann)).samples) == 3
    await removed(runtime, ann, 1)
    await decided(runtime, case, "distinct")
    await removed(runtime, ann, 1)
    assert len((await known(ann)).samples) == 1
    (pair,) = await Pair.of(bob.id)
    assert (pair.decision, pair.score) == ("distinct", case.candidates[0].score), "pairs and their scores stay"


@pytest.mark.parametrize("side", ["newcomer", "candidate"])
async def test_an_open_case_about_the_person_keeps_every_sample(runtime: Runtime, side: str) -> None:
    ann = await _ann_with_two(runtime)
    bob, case = await suspected(runtime, "bob", "ann")
    if side == "newcomer":
        await Case.get_pymongo_collection().update_one(
            {"_id": case.id}, {"$set": {"newcomer_id": ann.id, "candidates": []}}
        )
    else:
        assert [one.identity_id for one in case.candidates] == [ann.id]
    with pytest.raises(Conflict, match="case"):
        await removed(runtime, ann, 1)
    await Case.get_pymongo_collection().update_one({"_id": case.id}, {"$set": {"state": "decided"}})
    await removed(runtime, ann, 1)
    assert bob.id


async def test_only_samples_of_active_and_revoked_identities_can_be_removed(runtime: Runtime) -> None:
    held = await screened(runtime, await enrolled(runtime, "ann", photos=2))
    other = await screened(runtime, await enrolled(runtime, "ann", photos=2, capture=5))
    assert (held.status, other.status) == ("active", "suspected_duplicate")
    waiting = await enrolled(runtime, "cid", photos=2)
    for identity in (other, waiting):
        with pytest.raises(Conflict):
            await removed(runtime, identity, 0)
    alone = await screened(runtime, await enrolled(runtime, "dan", photos=2))
    await revoked(runtime, alone)
    await removed(runtime, alone, 0)
    assert len((await known(alone)).samples) == 1


async def test_a_sample_that_waits_for_its_screening_is_removed_with_it(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    photo = portrait("ann", capture=5)
    waiting = await enrol.add_sample(runtime, by_officer("sample.add"), await default_gallery(), ann, photo)
    await removed(runtime, waiting, 1)
    left = await known(ann)
    assert (left.screenings[1].state, left.screenings[1].verdict, left.outbox_at is None) == ("done", None, True)
    await screened(runtime, waiting)
    assert [s.status for s in (await known(ann)).samples] == ["active"]
    await revoked(runtime, ann)
    assert (await reinstated(runtime, ann)).status == "active"
    assert await findings(runtime) == {}


async def test_a_removed_sample_whose_screening_failed_is_not_screened_again(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    gallery, photo = await default_gallery(), portrait("ann", capture=5)
    waiting = await enrol.add_sample(runtime, by_officer("sample.add"), gallery, ann, photo)
    job_id = waiting.screenings[1].job_id
    while not await screen.note_failure(runtime, ann.id, job_id, "test"):
        pass
    await removed(runtime, ann, 1)
    assert (await known(ann)).screenings[1].state == "done"
    with pytest.raises(Conflict, match="nothing to screen"):
        await screen.screen_again(runtime, by_officer("identity.screen"), gallery, ann.id)


async def test_a_person_with_a_removed_sample_can_be_erased(runtime: Runtime) -> None:
    ann = await _ann_with_two(runtime)
    await removed(runtime, ann, 1)
    receipt = await erased(runtime, ann)
    assert receipt.samples == 1
    head = await default_gallery()
    assert (head.identities, head.samples, head.removed) == (0, 0, 2)
    assert (await identified(runtime, "ann", "bob", capture=31)).candidates == []
    assert await findings(runtime) == {}


async def test_a_photo_that_the_store_could_not_delete_is_deleted_later(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await _ann_with_two(runtime)
    key = ann.samples[1].photo_key
    with monkeypatch.context() as away:

        async def fails(keys: list[str]) -> int:
            raise PhotoStoreUnavailable(str(len(keys)))

        away.setattr(runtime.photos, "delete", fails)
        removal = await removed(runtime, ann, 1)
        await SampleRemoval.get_pymongo_collection().update_many(
            {}, {"$set": {"unsettled_since": ann.created_at - timedelta(minutes=1)}}
        )
        assert await settle_removals(runtime) == 0
    assert await runtime.photos.get(key)
    assert await settle_removals(runtime) == 0, "the removal is put off, so that others come first"
    await SampleRemoval.get_pymongo_collection().update_many(
        {}, {"$set": {"unsettled_since": ann.created_at - timedelta(minutes=1)}}
    )
    assert await settle_removals(runtime) == 1
    with pytest.raises(PhotoNotFound):
        await runtime.photos.get(key)
    settled = await SampleRemoval.get(removal.id)
    assert settled is not None
    assert (settled.photo_key, settled.unsettled_since) == (None, None)


async def test_a_verdict_after_a_removal_leaves_the_removed_sample_out(runtime: Runtime) -> None:
    """A screening that was asked for before the removal writes no verdict about the removed sample."""
    ann = await active(runtime, "ann")
    await active(runtime, "bob")
    photo = portrait("ann", "bob", capture=5)
    waiting = await enrol.add_sample(runtime, by_officer("sample.add"), await default_gallery(), ann, photo)
    await removed(runtime, waiting, 1)
    await screened(runtime, waiting)
    assert await Case.count() == 0
    assert await Pair.count() == 0


async def test_an_export_names_removed_samples_by_their_time_alone(runtime: Runtime) -> None:
    ann = await _ann_with_two(runtime)
    await removed(runtime, ann, 1)
    pieces = await export_subject(runtime, by_officer("identity.export"), await default_gallery(), ann.id)
    text = b"".join([piece async for piece in pieces]).decode()
    assert text.count('"removed_at"') == 1


async def test_a_gallery_whose_samples_were_removed_is_counted_right(runtime: Runtime) -> None:
    ann = await _ann_with_two(runtime)
    await removed(runtime, ann, 1)
    head = await Gallery.get((await default_gallery()).id)
    assert head is not None
    assert head.samples == await Identity.find({"status": "active"}).count()
