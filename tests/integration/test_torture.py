"""Slices of `make torture`: seeded fault plans at the boundaries, and parts that are killed under load."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, by_system, record
from app.documents.events import AuditEvent
from app.runtime import Runtime
from app.use_cases import adjudicate, enrol, screen, sequence
from tests.support import services
from tests.support.desks import broken_log
from tests.support.fault_stories import Outcome, play_all, story_settings
from tests.support.killing import KillPlan, kill_parts

#: Other seeds than those of `make torture`, which begins at 1.
SEEDS = range(1_000_001, 1_000_013)
KILLS = 7


async def _played(
    mongo: services.Server, redis: services.Server, database: str, home: Path, seeds: range
) -> list[Outcome]:
    settings = story_settings(mongo.url, redis.url, database, home)
    return [outcome async for outcome in play_all(settings, seeds)]


async def test_h74_h76_h77_h78_h82_h85_under_seeded_faults_nothing_acknowledged_is_lost_doubled_or_unrecorded(
    mongo_server: services.Server, redis_server: services.Server, database_name: str, tmp_path: Path
) -> None:
    outcomes = await _played(mongo_server, redis_server, database_name, tmp_path, SEEDS)
    assert {outcome.seed: outcome.broken for outcome in outcomes if outcome.broken} == {}
    assert len(outcomes) == len(SEEDS)
    assert sum(outcome.faults.total() for outcome in outcomes) > len(SEEDS), "there were faults to bear"
    assert sum(outcome.answered.total() for outcome in outcomes) > len(SEEDS), "and work got through"


@pytest.mark.parametrize("module", [enrol, screen], ids=["an enrolment's event", "a verdict's event"])
async def test_the_torture_finds_an_event_that_is_written_outside_of_its_transaction(
    module: object,
    monkeypatch: pytest.MonkeyPatch,
    mongo_server: services.Server,
    redis_server: services.Server,
    database_name: str,
    tmp_path: Path,
) -> None:
    async def beside(session: AsyncClientSession | None, action: Action, **fields: Any) -> AuditEvent:  # noqa: ANN401
        await record(None, replace(action, claim=None), **fields)
        return await record(session, action, **fields)

    monkeypatch.setattr(module, "record", beside)
    outcomes = await _played(mongo_server, redis_server, database_name, tmp_path, SEEDS[:2])
    assert any("events" in what for outcome in outcomes for what in outcome.broken)


async def test_the_torture_finds_two_active_look_alikes(
    monkeypatch: pytest.MonkeyPatch,
    mongo_server: services.Server,
    redis_server: services.Server,
    database_name: str,
    tmp_path: Path,
) -> None:
    for module in (screen, adjudicate):
        monkeypatch.setattr(module, "may_activate", lambda *_: True)
    monkeypatch.setattr(screen._Verdict, "_case", lambda *_: None)
    outcomes = await _played(mongo_server, redis_server, database_name, tmp_path, SEEDS[:4])
    assert any("both active" in what for outcome in outcomes for what in outcome.broken)


async def test_a_log_that_grows_while_it_is_looked_at_is_no_fault(runtime: Runtime) -> None:
    async with sequence.kept_up(runtime):
        looking = asyncio.create_task(_looked_at(runtime, times=20))
        while not looking.done():
            await record(None, by_system("x"), subject_kind="none", subject_id=None)
        assert looking.result() == []


async def _looked_at(runtime: Runtime, times: int) -> list[str]:
    return [what for _ in range(times) for what in await broken_log(runtime)]


async def test_h74_h82_h84_parts_that_are_killed_under_load_lose_double_and_hide_nothing(tmp_path: Path) -> None:
    report = await kill_parts(tmp_path / "kills", KillPlan(seed=1_000_001, kills=KILLS, desks=6))
    assert report.broken == []
    assert report.kills.total() == KILLS
    assert {"redis", "mongod"} < set(report.kills)
    assert report.answered["enrol"] >= KILLS, "work got through between the kills"
