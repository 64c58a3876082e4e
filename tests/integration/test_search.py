"""Search by processes that each keep a copy of the vectors: what one answered, every other one sees."""

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from app import vectors
from app.documents.base import new_id
from app.documents.galleries import Change, Gallery, GalleryChange
from app.errors import ModelMismatch, NotReady
from app.runtime import Runtime
from app.search import OPENED_AT_ONCE
from app.use_cases import screen
from tests.builders import (
    active,
    another_process,
    default_gallery,
    enrolled,
    erased,
    identified,
    revoked,
    screened,
    settled,
    suspected,
    verified,
)
from tests.fakes import CARD, FakeEngine, embedding_of


@pytest.fixture
async def other(runtime: Runtime) -> AsyncIterator[Runtime]:
    async with another_process(runtime) as opened:
        yield opened


async def _everybody(runtime: Runtime) -> set[str]:
    """Identities whose vectors the process finds, whatever they look like."""
    hits = await runtime.search.range(await default_gallery(), embedding_of(("nobody",), 0), -1.0)
    return {hit.identity_id for hit in hits.items}


async def test_another_process_sees_an_enrolment_at_once_and_loses_an_erased_one_at_once(
    runtime: Runtime, other: Runtime
) -> None:
    for i in range(5):
        person = f"person-{i}"
        identity = await active(runtime, person)
        found = await identified(other, person)
        assert [c.identity_id for c in found.candidates] == [identity.id]
        assert found.as_of_seq == (await default_gallery()).seq
        await erased(runtime, identity)
        assert (await identified(other, person)).candidates == []
    assert other.search.size((await default_gallery()).id) == 0


async def test_a_pending_enrolment_is_searched_by_screening_and_not_named_by_identification(
    runtime: Runtime, other: Runtime
) -> None:
    pending = await enrolled(runtime, "ann")
    assert (await identified(other, "ann")).candidates == []
    assert pending.id in await _everybody(other)


async def test_only_the_active_are_named_and_others_do_not_crowd_them_out(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    for capture in range(1, 5):
        await suspected(runtime, "ann", capture=capture)
    found = await identified(runtime, "ann", capture=1, limit=1)
    assert [(c.identity_id, c.rank) for c in found.candidates] == [(ann.id, 1)]
    await revoked(runtime, ann)
    assert (await identified(runtime, "ann")).candidates == []


async def test_a_process_that_starts_late_knows_everybody(runtime: Runtime) -> None:
    people = [await enrolled(runtime, f"person-{i}") for i in range(6)]
    await erased(runtime, people[2])
    async with another_process(runtime) as late:
        assert await _everybody(late) == {p.id for i, p in enumerate(people) if i != 2}


async def test_many_searches_at_once_on_a_cold_process_agree(runtime: Runtime, other: Runtime) -> None:
    people = {(await enrolled(runtime, f"person-{i}")).id for i in range(5)}
    assert await asyncio.gather(*(_everybody(other) for _ in range(8))) == [people] * 8


async def test_a_gallery_without_files_is_searched_while_those_of_others_come_slowly(runtime: Runtime) -> None:
    has_come = threading.Event()
    for _ in range(OPENED_AT_ONCE):
        runtime.search._aside.submit(has_come.wait)
    try:
        ann = await active(runtime, "ann")
        assert [c.identity_id for c in (await identified(runtime, "ann")).candidates] == [ann.id]
    finally:
        has_come.set()


async def _take_away_the_middle_row() -> GalleryChange:
    row = await GalleryChange.find_one({"seq": 2})
    assert row is not None
    await row.delete()
    return row


async def test_a_hole_in_the_rows_is_waited_for_and_then_refused(
    runtime: Runtime, other: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "HOLE_RETRIES", 3)
    for i in range(3):
        await active(runtime, f"person-{i}")
    await _take_away_the_middle_row()
    with pytest.raises(NotReady):
        await identified(other, "person-0")
    newcomer = await enrolled(runtime, "person-4")
    with pytest.raises(NotReady):
        await screen.screen(other, newcomer.id, newcomer.screenings[0].job_id)


async def test_a_hole_that_closes_while_a_search_waits_hides_nobody(
    runtime: Runtime, other: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = {(await active(runtime, f"person-{i}")).id for i in range(3)}
    row = await _take_away_the_middle_row()
    reads = 0
    after = GalleryChange.after

    async def after_counted(*args: int) -> list[Change]:
        nonlocal reads
        reads += 1
        if reads == 4:
            await row.insert()
        return await after(*args)

    monkeypatch.setattr(GalleryChange, "after", after_counted)
    assert await _everybody(other) == people
    assert reads > 3


async def test_rows_are_applied_in_batches(runtime: Runtime, other: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "ROWS_AT_ONCE", 2)
    people = [await enrolled(runtime, f"person-{i}") for i in range(5)]
    await erased(runtime, people[0])
    assert await _everybody(other) == {p.id for p in people[1:]}


async def test_another_epoch_drops_the_copy_in_memory(runtime: Runtime) -> None:
    """After a restore the same numbers stand for other people."""
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    assert await _everybody(runtime) == {ann.id, bob.id}
    changes = GalleryChange.get_pymongo_collection()
    await changes.delete_many({"seq": 2})
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"epoch": new_id(), "seq": 1}})
    assert await _everybody(runtime) == {ann.id}


async def test_an_enrolment_into_a_gallery_of_another_epoch_takes_no_number(runtime: Runtime) -> None:
    stale = await default_gallery()
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"epoch": new_id()}})
    async with runtime.mongo.start_session() as session, await session.start_transaction():
        assert await stale.take_seq(session, 1) is None
        assert not await stale.stands(session)
    assert (await default_gallery()).seq == 0


async def test_a_verdict_searched_in_another_epoch_is_not_written(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    newcomer = await enrolled(runtime, "ann")
    ranged = runtime.search.range

    async def range_then_restore(*args: object) -> object:
        hits = await ranged(*args)
        await Gallery.get_pymongo_collection().update_one({}, {"$set": {"epoch": new_id()}})
        return hits

    monkeypatch.setattr(type(runtime.search), "range", lambda _, *args: range_then_restore(*args))
    with pytest.raises(NotReady):
        await screen.screen(runtime, newcomer.id, newcomer.screenings[0].job_id)
    monkeypatch.undo()
    assert (await screened(runtime, newcomer)).status == "active"


async def test_h72_a_gallery_of_another_model_is_refused(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    runtime.engine = FakeEngine(replace(CARD, contract="sha256:newer"))
    with pytest.raises(ModelMismatch):
        await identified(runtime, "ann")
    with pytest.raises(ModelMismatch):
        await verified(runtime, ann, "ann")
    with pytest.raises(ModelMismatch):
        await settled(runtime, "bob")
