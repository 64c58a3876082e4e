"""Reads that show people's attributes are events, one a page; whoever reads many people in an hour raises an alarm."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from app.documents.base import new_id
from app.documents.budgets import PeopleRead
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.runtime import Runtime
from app.use_cases.scan import start
from tests.builders import active, by_officer, default_gallery, enrolled, portrait, screened, suspected
from tests.support.callers import app_on, http_of, token_of
from workers import jobs

Page = dict[str, Any]


@pytest.fixture
async def officer(runtime: Runtime, cheap_passwords: None) -> AsyncIterator[httpx.AsyncClient]:
    app = app_on(runtime)
    async with http_of(app, await token_of(runtime, app, "olga", "officer", None)) as http:
        yield http


async def _id_of(caller: httpx.AsyncClient) -> str:
    return str((await caller.get("/v1/auth/me")).json()["id"])


async def _readings() -> list[AuditEvent]:
    names = ["identity.list", "identity.read", "case.list", "case.read", "scan.read", "proposal.list", "proposal.read"]
    return await AuditEvent.find({"action": {"$in": names}}).sort("_id").to_list()


async def _read(caller: httpx.AsyncClient, path: str, **params: str) -> AuditEvent | None:
    """Read the page; the one event of it, or None."""
    before = len(await _readings())
    answer = await caller.get(path, params=params)
    assert answer.status_code == 200, answer.text
    events = await _readings()
    assert len(events) - before <= 1
    return events[-1] if len(events) > before else None


async def test_a11_each_page_of_people_is_an_event_that_counts_them(
    runtime: Runtime, officer: httpx.AsyncClient
) -> None:
    ann = await screened(runtime, await enrolled(runtime, "ann", external_ref="NID-1", full_name="Ann Lee"))
    bob = await screened(runtime, await enrolled(runtime, "bob", full_name="Bob Lee"))
    for params, query, people in (
        ({}, "all", 2), ({"q": "ann"}, "name", 1), ({"q": "zed"}, "name", 0), ({"external_ref": "nid-1"}, "reference", 1),
        ({"status": "active", "gallery": "default"}, "status", 2), ({"external_ref": "NID-2"}, "reference", 0),
        ({"status": "active", "created_after": "2020-01-01T00:00:00Z"}, "status,time", 2), ({"limit": "1"}, "all", 1),
    ):  # fmt: skip
        event = await _read(officer, "/v1/identities", **params)
        assert event is not None
        assert (event.action, event.outcome, event.detail) == (
            "identity.list",
            "success",
            {"people": people, "query": query},
        )
        assert event.actor.id == await _id_of(officer)
        assert event.gallery == ("default" if people or "gallery" in params else None)
    event = await _read(officer, f"/v1/identities/{ann.id}")
    assert event is not None
    assert (event.action, event.subject.id, event.gallery, event.detail) == (
        "identity.read",
        ann.id,
        "default",
        {"people": 1},
    )
    stored = "".join([event.model_dump_json().lower() for event in await _readings()])
    assert not [text for text in ("nid-1", "ann", "lee", "zed", bob.id) if text in stored]


async def test_a11_cases_scans_and_proposals_show_people_too(runtime: Runtime, officer: httpx.AsyncClient) -> None:
    ann = await active(runtime, "ann")
    newcomer, case = await suspected(runtime, "ann")
    event = await _read(officer, "/v1/dedup/cases", state="open")
    assert event is not None
    assert (event.action, event.gallery, event.detail) == (
        "case.list",
        "default",
        {"people": 2, "query": "state", "cases": 1},
    )
    event = await _read(officer, f"/v1/dedup/cases/{case.id}")
    assert event is not None
    assert (event.action, event.subject.id, event.detail) == ("case.read", case.id, {"people": 2})
    known = await start(runtime, by_officer("dedup.scan"), await default_gallery(), None)
    await jobs.scan({"runtime": runtime}, known.id)
    for part in ("pairs", "clusters"):
        event = await _read(officer, f"/v1/dedup/scans/{known.id}/{part}")
        assert event is not None
        assert (event.action, event.subject.id, event.detail) == ("scan.read", known.id, {"people": 2, "shown": part})
    assert await _read(officer, f"/v1/dedup/scans/{known.id}") is None
    assert await _read(officer, f"/v1/dedup/jobs/{newcomer.screenings[0].job_id}") is None, "a job shows no attributes"
    assert await _read(officer, "/v1/proposals") is None, "nobody is shown"
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"policy.second_review": True}})
    answer = await officer.patch(f"/v1/identities/{ann.id}", json={"external_ref": "NID-1"})
    assert answer.status_code == 202, answer.text
    event = await _read(officer, "/v1/proposals")
    assert event is not None
    assert (event.action, event.detail) == ("proposal.list", {"people": 1, "query": "all"})
    event = await _read(officer, f"/v1/proposals/{answer.json()['proposal_id']}")
    assert event is not None
    assert (event.action, event.detail) == ("proposal.read", {"people": 1})


async def test_a11_a_page_over_several_galleries_counts_each(runtime: Runtime, officer: httpx.AsyncClient) -> None:
    north = await runtime.create_gallery("north", (await default_gallery()).policy)
    await active(runtime, "ann")
    await enrolled(runtime, "bob", gallery=north)
    event = await _read(officer, "/v1/identities")
    assert event is not None
    assert (event.gallery, event.detail) == (
        None, {"people": 2, "query": "all", "galleries": {"default": 1, "north": 1}},
    )  # fmt: skip


async def test_a11_a_repeated_write_that_does_nothing_is_a_reading(
    runtime: Runtime, officer: httpx.AsyncClient
) -> None:
    ann = await active(runtime, "ann")
    for _ in range(2):
        answer = await officer.post(
            f"/v1/identities/{ann.id}/revoke", json={"reason": "moved"}, headers={"Idempotency-Key": "k-1"}
        )
        assert answer.status_code == 200, answer.text
    (event,) = await _readings()
    assert (event.action, event.detail) == ("identity.read", {"people": 1, "answer_to": "identity.revoke"})


async def test_whoever_asks_for_their_own_verdict_fills_no_log(runtime: Runtime, officer: httpx.AsyncClient) -> None:
    files = {"photo": ("photo.png", portrait("ann"))}
    made = (await officer.post("/v1/identities", files=files)).json()
    for _ in range(3):
        assert await _read(officer, f"/v1/identities/{made['id']}") is None
    other = app_on(runtime)
    async with http_of(other, await token_of(runtime, other, "otto", "officer", None)) as otto:
        assert await _read(otto, f"/v1/identities/{made['id']}") is not None, "somebody else reads"
    identity = await Identity.get(made["id"])
    assert identity is not None
    await screened(runtime, identity)
    assert await _read(officer, f"/v1/identities/{made['id']}") is not None


async def test_a11_nobody_is_shown_what_the_log_does_not_take(runtime: Runtime, officer: httpx.AsyncClient) -> None:
    ann = await active(runtime, "ann")
    _, case = await suspected(runtime, "ann")
    database = runtime.mongo[runtime.settings.mongodb_database]
    await database.command("collMod", "audit_events", validator={"action": {"$not": {"$regex": "read|list"}}})
    try:
        for path in ("/v1/identities", f"/v1/identities/{ann.id}", "/v1/dedup/cases", f"/v1/dedup/cases/{case.id}"):
            answer = await officer.get(path)
            assert (answer.status_code, answer.headers["retry-after"] != "") == (503, True), path
    finally:
        await database.command("collMod", "audit_events", validator={})


async def _crowd(people: int) -> list[str]:
    """Copies of the first identity under ids of their own."""
    row = await Identity.get_pymongo_collection().find_one({})
    assert row is not None
    ids = [new_id() for _ in range(people)]
    empty = {"attributes": None, "external_ref_hash": None, "screenings": row["screenings"]}
    await Identity.get_pymongo_collection().insert_many([{**row, **empty, "_id": id_} for id_ in ids])
    return ids


async def _alarms() -> list[AuditEvent]:
    return await AuditEvent.find({"action": "identity.bulk_read"}).to_list()


def _alarms_counted() -> float:
    return REGISTRY.get_sample_value("idem_bulk_reading_alarms_total") or 0


async def test_a11_an_officer_who_reads_1000_people_in_an_hour_is_seen(
    runtime: Runtime, officer: httpx.AsyncClient
) -> None:
    await active(runtime, "ann")
    await _crowd(999)
    counted = _alarms_counted()
    cursor, pages, read = None, 0, 0
    while pages == 0 or cursor is not None:
        page = (
            await officer.get("/v1/identities", params={"limit": 100, **({"cursor": cursor} if cursor else {})})
        ).json()
        cursor, pages, read = page["next_cursor"], pages + 1, read + len(page["items"])
    assert (pages, read) == (10, 1000)
    (alarm,) = await _alarms()
    assert (alarm.subject.kind, alarm.subject.id, alarm.detail) == ("user", await _id_of(officer), {"people": 500})
    assert alarm.actor.kind == "system"
    assert _alarms_counted() == counted + 1
    assert [event.detail["people"] for event in await _readings()] == [100] * 10


async def test_a11_reading_the_same_people_again_is_no_bulk_reading(
    runtime: Runtime, officer: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.settings, "people_read_alarm_per_hour", 5)
    ann = await active(runtime, "ann")
    ids = await _crowd(3)
    for _ in range(4):
        await officer.get("/v1/identities")
    assert await _alarms() == []
    await _crowd(1)
    await officer.get(f"/v1/identities/{ann.id}")
    await officer.get("/v1/identities")
    assert len(await _alarms()) == 1
    await _crowd(20)
    await officer.get("/v1/identities")
    assert len(await _alarms()) == 1, "once an hour"
    (kept,) = await PeopleRead.find_all().to_list()
    assert len(kept.people) == 5, "no more is kept than the alarm needs"
    assert not [id_ for id_ in [ann.id, *ids] if id_.encode() in repr(kept).encode()]


async def test_a11_pages_read_at_one_moment_raise_one_alarm(
    runtime: Runtime, officer: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.settings, "people_read_alarm_per_hour", 4)
    await active(runtime, "ann")
    ids = await _crowd(8)
    answers = await asyncio.gather(*(officer.get(f"/v1/identities/{id_}") for id_ in ids))
    assert {answer.status_code for answer in answers} == {200}
    assert len(await _alarms()) == 1
    assert len(await _readings()) == 8


async def test_a11_photos_and_exports_count_as_people_read(
    runtime: Runtime, officer: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.settings, "people_read_alarm_per_hour", 2)
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    assert (await officer.get(f"/v1/identities/{ann.id}/samples/{ann.samples[0].id}/photo")).status_code == 200
    assert await _alarms() == []
    assert (await officer.get(f"/v1/identities/{bob.id}/export")).status_code == 200
    assert len(await _alarms()) == 1


async def test_a11_people_whom_the_answer_to_a_write_shows_count_as_read(
    runtime: Runtime, officer: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.settings, "people_read_alarm_per_hour", 4)
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    assert (await officer.patch(f"/v1/identities/{ann.id}", json={})).status_code == 200
    assert (await officer.post(f"/v1/identities/{bob.id}/attempts:reset")).status_code == 200
    files = {"photo": ("photo.png", portrait("cleo"))}
    assert (await officer.post("/v1/identities", files=files)).status_code == 202, "what they send themselves"
    _, case = await suspected(runtime, "ann")
    assert await _alarms() == []
    body = {"decision": "distinct", "reason": "sisters"}
    assert (await officer.post(f"/v1/dedup/cases/{case.id}/decision", json=body)).status_code == 200
    assert await _alarms() == [], "three people, one of them twice"
    dan = await active(runtime, "dan")
    assert (await officer.post(f"/v1/identities/{dan.id}/revoke", json={"reason": "moved"})).status_code == 200
    assert len(await _alarms()) == 1
    assert await _readings() == [], "each has an event already"


async def test_an_unknown_action_in_a_filter_is_refused(runtime: Runtime, cheap_passwords: None) -> None:
    app = app_on(runtime)
    async with http_of(app, await token_of(runtime, app, "aud", "auditor", None)) as auditor:
        known = await auditor.get("/v1/audit/events", params={"action": "identity.list"})
        slip = await auditor.get("/v1/audit/events", params={"action": "identity.lists"})
    assert (known.status_code, slip.status_code, slip.json()["errors"][0]["field"]) == (200, 422, "action")
