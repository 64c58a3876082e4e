"""Screening on a real MongoDB: the verdicts, and the races between them."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest

from app.documents.cases import Case, Pair
from app.documents.events import AuditEvent
from app.documents.identities import Identity
from app.runtime import Runtime
from app.use_cases import screen
from tests.builders import (
    active,
    another_process,
    case_about,
    enrolled,
    erased,
    known,
    screened,
    settled,
    suspected,
)

RACES = 20


async def _verdicts(identity: Identity) -> list[AuditEvent]:
    return await AuditEvent.find({"action": "dedup.verdict", "subject.id": identity.id}).to_list()


async def test_a_first_enrolment_is_unique_and_becomes_active_with_its_samples(runtime: Runtime) -> None:
    waiting = await enrolled(runtime, "ann", photos=3)
    assert (waiting.status, {s.status for s in waiting.samples}) == ("pending", {"pending"})
    ann = await screened(runtime, waiting)
    assert (ann.status, {s.status for s in ann.samples}) == ("active", {"active"})
    (screening,) = ann.screenings
    assert (screening.state, screening.verdict, screening.case_id, screening.candidates) == ("done", "unique", None, [])
    assert screening.as_of_seq == 3
    assert ann.outbox_at is None
    assert ann.version == waiting.version + 1
    (event,) = await _verdicts(ann)
    assert (event.outcome, event.detail["verdict"], event.actor.kind) == ("success", "unique", "system")


async def test_a_second_enrolment_of_the_same_face_is_suspected_with_a_pair_and_a_case(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    again = await settled(runtime, "ann", capture=1)
    assert (again.status, again.samples[0].status) == ("suspected_duplicate", "pending")
    case = await case_about(again)
    (candidate,) = case.candidates
    assert (case.newcomer_id, case.sample_id, candidate.identity_id, candidate.rank) == (again.id, None, ann.id, 1)
    assert candidate.score == pytest.approx(0.8, abs=0.05)
    (pair,) = await Pair.of(ann.id)
    assert (pair.other_side(ann.id), pair.decision, pair.score) == (again.id, None, candidate.score)
    assert (again.screenings[0].verdict, again.screenings[0].case_id) == ("suspected_duplicate", case.id)
    (event,) = await _verdicts(again)
    assert (event.detail["case_id"], event.detail["candidates"]) == (case.id, 1)
    assert (await known(ann)).status == "active"


async def test_candidates_are_ranked_by_their_best_score_over_all_samples(runtime: Runtime) -> None:
    both = await active(runtime, "ann", "bob")
    ann = await settled(runtime, "ann")
    again = await settled(runtime, "ann", capture=1)
    candidates = (await case_about(again)).candidates
    assert [(c.identity_id, c.rank) for c in candidates] == [(ann.id, 1), (both.id, 2)]
    assert candidates[0].score > candidates[1].score


async def test_a_newcomer_is_compared_with_everybody_whatever_their_status(runtime: Runtime) -> None:
    pending = await enrolled(runtime, "ann")
    held = await settled(runtime, "ann", capture=1)
    newcomer = await settled(runtime, "ann", capture=2)
    assert held.status == newcomer.status == "suspected_duplicate"
    assert {c.identity_id for c in (await case_about(newcomer)).candidates} == {pending.id, held.id}


async def test_whoever_came_first_is_active_though_screened_last(runtime: Runtime) -> None:
    first = await enrolled(runtime, "ann")
    second = await settled(runtime, "ann", capture=1)
    assert second.status == "suspected_duplicate"
    assert (await screened(runtime, first)).status == "active"


async def test_screening_twice_changes_nothing(runtime: Runtime) -> None:
    await active(runtime, "ann")
    once, case = await suspected(runtime, "ann")
    twice = await screened(runtime, once)
    assert twice == once
    assert await Case.find_all().to_list() == [case]
    assert len(await _verdicts(once)) == 1


async def test_h85_one_job_run_by_two_workers_at_once_gives_one_verdict(runtime: Runtime) -> None:
    await active(runtime, "ann")
    newcomer = await enrolled(runtime, "ann", capture=1)
    job = newcomer.screenings[0].job_id
    async with another_process(runtime) as other:
        await asyncio.gather(screen.screen(runtime, newcomer.id, job), screen.screen(other, newcomer.id, job))
    assert await Case.count() == 1
    assert len(await _verdicts(newcomer)) == 1


@pytest.fixture
async def other(runtime: Runtime) -> AsyncIterator[Runtime]:
    async with another_process(runtime) as opened:
        yield opened


@pytest.mark.parametrize("order", ["first first", "second first", "at once"])
async def test_h68_of_two_simultaneous_enrolments_exactly_one_ends_active(
    runtime: Runtime, other: Runtime, order: str
) -> None:
    for race in range(RACES):
        person = f"person-{race}"
        pair = await asyncio.gather(enrolled(runtime, person), enrolled(other, person, capture=1))
        doors = [runtime, other]
        if order == "at once":
            await asyncio.gather(*(screened(door, newcomer) for door, newcomer in zip(doors, pair, strict=True)))
        else:
            earlier_first = sorted(pair, key=lambda newcomer: newcomer.enrol_seq)
            for newcomer in earlier_first if order == "first first" else reversed(earlier_first):
                await screened(doors[race % 2], newcomer)
        ended = [(await known(newcomer)).status for newcomer in pair]
        assert sorted(ended) == ["active", "suspected_duplicate"], (race, ended)
    assert await Case.count() == RACES


async def test_h68_of_six_simultaneous_enrolments_exactly_one_ends_active(runtime: Runtime, other: Runtime) -> None:
    doors = itertools.cycle([runtime, other])
    newcomers = await asyncio.gather(*(enrolled(next(doors), "ann", capture=i) for i in range(6)))
    await asyncio.gather(*(screened(next(doors), newcomer) for newcomer in newcomers))
    statuses = sorted([(await known(newcomer)).status for newcomer in newcomers])
    assert statuses == ["active", *["suspected_duplicate"] * 5]


async def test_a_candidate_erased_between_search_and_verdict_starts_the_job_over(
    runtime: Runtime, other: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await active(runtime, "ann")
    newcomer = await enrolled(runtime, "ann", capture=1)
    searches = 0
    search = runtime.search.range

    async def search_then_erase(*args: object) -> object:
        nonlocal searches
        searches += 1
        hits = await search(*args)
        if searches == 1:
            assert [hit.identity_id for hit in hits.items if hit.identity_id == ann.id] == [ann.id]
            await erased(other, ann)
        return hits

    monkeypatch.setattr(type(runtime.search), "range", lambda _, *args: search_then_erase(*args))
    assert (await screened(runtime, newcomer)).status == "active"
    assert searches == 2
    assert await Case.count() == await Pair.count() == 0


async def test_an_active_look_alike_of_an_earlier_screening_stands_in_the_way(runtime: Runtime) -> None:
    """Its own search finds nobody before it, but somebody after it became active and the pair is recorded."""
    first = await enrolled(runtime, "ann")
    second, case = await suspected(runtime, "ann")
    collection = Identity.get_pymongo_collection()
    await collection.update_one({"_id": second.id}, {"$set": {"status": "active"}, "$inc": {"version": 1}})
    held = await screened(runtime, first)
    assert held.status == "suspected_duplicate"
    assert [c.identity_id for c in (await case_about(held)).candidates] == [second.id]
    assert case.newcomer_id == second.id
