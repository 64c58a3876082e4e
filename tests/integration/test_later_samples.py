"""Photos that are added later: references once screened, and held back while they look like somebody else."""

import pytest

from app.documents.cases import Case, Pair
from app.documents.identities import Identity
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


async def test_a_pending_sample_names_nobody(runtime: Runtime) -> None:
    ann, bob, case = await _ann_with_a_photo_like_bob(runtime)
    found = await identified(runtime, "bob", capture=7)
    assert [c.identity_id for c in found.candidates] == [bob.id]
    await decided(runtime, case, "distinct")
    found = await identified(runtime, "bob", capture=8)
    assert [c.identity_id for c in found.candidates] == [bob.id, ann.id]


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
