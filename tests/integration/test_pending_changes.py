"""A policy change that acts on enrolled people waits for seven days and for an officer who is another user."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from app.documents.accounts import User
from app.documents.base import now
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.runtime import Runtime
from app.use_cases import galleries
from app.use_cases.erase import erase_expired
from tests.builders import active, default_gallery, known
from tests.support.callers import app_on, former_officer_of, http_of, token_of
from workers import jobs

PATH = "/v1/galleries/default"
Page = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Callers:
    """Callers who act on a policy. both: an admin who is also an officer. stranger: an officer of another gallery."""

    admin: httpx.AsyncClient
    officer: httpx.AsyncClient
    stranger: httpx.AsyncClient
    both: httpx.AsyncClient
    machine: httpx.AsyncClient


@pytest.fixture
async def callers(runtime: Runtime, cheap_passwords: None) -> AsyncIterator[Callers]:
    """An admin, officers of this and of another gallery, a user with both roles, and an application that was an officer."""
    await runtime.create_gallery("elsewhere", runtime.starting_policy())
    app = app_on(runtime)
    tokens = [
        await token_of(runtime, app, "ada", "admin", None),
        await token_of(runtime, app, "olga", "officer", None),
        await token_of(runtime, app, "sven", "officer", ("elsewhere",)),
        await token_of(runtime, app, "bo", "admin", None),
        await former_officer_of(runtime, app, "machine"),
    ]
    await User.find_one(User.username == "bo").update({"$set": {"roles": ["admin", "officer"]}})
    opened = Callers(*(http_of(app, token) for token in tokens))
    yield opened
    for one in (opened.admin, opened.officer, opened.stranger, opened.both, opened.machine):
        await one.aclose()


async def _patched(caller: httpx.AsyncClient, **policy: object) -> Page:
    answer = await caller.patch(PATH, json={"policy": policy})
    assert answer.status_code == 200, answer.text
    page: Page = answer.json()
    return page


async def _agreed(caller: httpx.AsyncClient, **body: object) -> httpx.Response:
    return await caller.post(f"{PATH}/pending/agree", json=body) if body else await caller.post(f"{PATH}/pending/agree")


async def _days_ago(identity: Identity, days: float) -> None:
    moment = now() - timedelta(days=days)
    await Identity.get_pymongo_collection().update_one({"_id": identity.id}, {"$set": {"created_at": moment}})


async def _let_the_time_come() -> None:
    await Gallery.get_pymongo_collection().update_one(
        {"name": "default"}, {"$set": {"pending.effective_at": now() - timedelta(seconds=1)}}
    )


async def _events(action: str) -> list[AuditEvent]:
    return await AuditEvent.find({"action": action, "outcome": "success"}).sort("_id").to_list()


async def _swept(runtime: Runtime) -> None:
    await jobs.sweep_erasures({"runtime": runtime})


async def test_a6_a_retention_erases_nobody_before_its_time_and_without_a_second_person(
    runtime: Runtime, callers: Callers
) -> None:
    old, young = await active(runtime, "old"), await active(runtime, "young")
    await _days_ago(old, 100)
    page = await _patched(callers.admin, retention_days=30)
    assert page["policy"]["retention_days"] is None
    pending = page["pending"]
    assert set(pending) == {"field", "value", "from", "people", "agreed_by"}
    assert (pending["field"], pending["value"], pending["people"], pending["agreed_by"]) == (
        "retention_days", 30, 1, None,
    )  # fmt: skip
    wait = datetime.fromisoformat(pending["from"]) - now()
    assert timedelta(days=7) - timedelta(seconds=60) < wait <= timedelta(days=7)
    assert (await callers.officer.get(PATH)).json()["pending"] == pending
    await _swept(runtime)
    assert (await known(old)).status == "active", "it is too early, and no officer has agreed"

    await _let_the_time_come()
    await _swept(runtime)
    assert (await known(old)).status == "active", "no officer has agreed"

    answer = await _agreed(callers.officer)
    assert answer.status_code == 200, answer.text
    me = (await callers.officer.get("/v1/auth/me")).json()["id"]
    assert answer.json()["pending"]["agreed_by"] == me
    await _swept(runtime)
    assert await Identity.living(old.id) is None
    assert (await known(young)).status == "active"
    page = (await callers.admin.get(PATH)).json()
    assert (page["policy"]["retention_days"], page["pending"]) == (30, None)


async def test_a6_an_agreement_does_not_shorten_the_wait(runtime: Runtime, callers: Callers) -> None:
    old = await active(runtime, "old")
    await _days_ago(old, 100)
    await _patched(callers.admin, retention_days=1)
    assert (await _agreed(callers.officer)).status_code == 200
    await _swept(runtime)
    assert (await known(old)).status == "active"
    assert (await default_gallery()).policy.retention_days is None


async def test_the_wait_goes_by_mongodb_s_clock_and_not_by_the_host_s(
    runtime: Runtime, callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("app.documents.base", "app.documents.galleries", "app.use_cases.galleries"):
        monkeypatch.setattr(f"{module}.now", lambda: now() - timedelta(days=40))
    page = await _patched(callers.admin, retention_days=1)
    assert datetime.fromisoformat(page["pending"]["from"]) > now() + timedelta(days=6)
    assert (await _agreed(callers.officer)).status_code == 200
    for module in ("app.documents.base", "app.documents.galleries", "app.use_cases.galleries"):
        monkeypatch.setattr(f"{module}.now", lambda: now() + timedelta(days=40))
    assert await galleries.take_effect(runtime) == 0


async def test_a6_an_event_records_each_step_with_old_and_new_values(runtime: Runtime, callers: Callers) -> None:
    await _patched(callers.admin, retention_days=3000, verify_threshold=0.6)
    await _agreed(callers.officer, field="retention_days", value=3000, reason="as the law asks")
    await _let_the_time_come()
    await _swept(runtime)
    asked, effect = await _events("gallery.update")
    assert asked.detail["changes"] == {"verify_threshold": {"old": None, "new": 0.6}}
    pending = asked.detail["pending"]
    assert isinstance(pending, dict)
    assert (pending["field"], pending["old"], pending["new"], pending["people"]) == ("retention_days", None, 3000, 0)
    (agreement,) = await _events("gallery.pending.agree")
    # A reason stands hashed in the leaf, and clear where the event is shown.
    assert agreement.detail["pending"]["reason"] != "as the law asks"  # type: ignore[index,call-overload]
    assert agreement.shown()["detail"]["pending"]["reason"] == "as the law asks"  # type: ignore[index,call-overload]
    assert effect.detail["changes"] == {"retention_days": {"old": None, "new": 3000}}
    assert (effect.actor.kind, effect.detail["pending"]["asked_by"]) == ("system", asked.actor.id)  # type: ignore[index,call-overload]
    assert effect.detail["pending"]["agreed_by"] == agreement.actor.id  # type: ignore[index,call-overload]


async def test_who_may_agree(callers: Callers) -> None:
    await _patched(callers.both, retention_days=30)
    for caller, status in (
        (callers.admin, 403),  # not an officer
        (callers.machine, 403),  # not a person
        (callers.stranger, 404),  # of another gallery
        (callers.both, 409),  # asked for it
    ):
        answer = await _agreed(caller)
        assert answer.status_code == status, answer.text
    assert (await _agreed(callers.officer)).status_code == 200
    again = await _agreed(callers.officer)
    assert (again.status_code, again.json()["type"].rpartition("/")[2]) == (409, "conflict")


async def test_an_officer_agrees_to_what_they_saw(callers: Callers) -> None:
    await _patched(callers.admin, retention_days=30)
    assert (await _agreed(callers.officer, field="retention_days", value=31)).status_code == 409
    assert (await _agreed(callers.officer, field="second_review")).status_code == 409
    assert (await _agreed(callers.officer, field="retention_days", value=30)).status_code == 200


async def test_a6_a_pending_change_is_cancelled_by_an_officer_or_an_admin(runtime: Runtime, callers: Callers) -> None:
    for caller in (callers.officer, callers.admin):
        await _patched(callers.admin, retention_days=1)
        await _agreed(callers.officer)
        answer = await caller.post(f"{PATH}/pending/cancel")
        assert (answer.status_code, answer.json()["pending"]) == (200, None), answer.text
        assert (await caller.post(f"{PATH}/pending/cancel")).status_code == 409
        assert (await _agreed(callers.officer)).status_code == 409
    assert (await callers.stranger.post(f"{PATH}/pending/cancel")).status_code == 404
    assert len(await _events("gallery.pending.cancel")) == 2
    assert await galleries.take_effect(runtime) == 0


async def test_switching_second_review_off_waits_as_well(runtime: Runtime, callers: Callers) -> None:
    on = await _patched(callers.admin, second_review=True)
    assert (on["policy"]["second_review"], on["pending"]) == (True, None)
    off = await _patched(callers.admin, second_review=False)
    assert off["policy"]["second_review"] is True
    assert (off["pending"]["field"], off["pending"]["value"], off["pending"]["people"]) == ("second_review", False, 0)
    await _let_the_time_come()
    assert await galleries.take_effect(runtime) == 0
    await _agreed(callers.officer)
    assert await galleries.take_effect(runtime) == 1
    assert (await default_gallery()).policy.second_review is False


async def test_null_does_not_avoid_the_wait(callers: Callers) -> None:
    await _patched(callers.admin, second_review=True)
    page = await _patched(callers.admin, second_review=None)
    assert (page["policy"]["second_review"], page["pending"]["field"]) == (True, "second_review")


async def test_one_change_waits_at_a_time(callers: Callers) -> None:
    await _patched(callers.admin, second_review=True)
    both = await callers.admin.patch(PATH, json={"policy": {"second_review": False, "retention_days": 3}})
    assert both.status_code == 422, both.text
    assert both.json()["errors"][0]["field"] == "policy.second_review"
    first = await _patched(callers.admin, retention_days=30)
    await _agreed(callers.officer)
    for policy in ({"retention_days": 29}, {"second_review": False}):
        answer = await callers.admin.patch(PATH, json={"policy": policy})
        assert answer.status_code == 409, answer.text
    again = await _patched(callers.admin, retention_days=30, verify_threshold=0.5)
    assert again["pending"]["from"] == first["pending"]["from"], "the same change keeps its time"
    assert again["pending"]["agreed_by"] is not None, "and its agreement"
    assert again["policy"]["verify_threshold"] == 0.5


async def test_a_longer_retention_applies_at_once_and_cancels_a_pending_shorter_one(callers: Callers) -> None:
    await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.retention_days": 100}})
    shorter = await _patched(callers.admin, retention_days=50)
    assert (shorter["policy"]["retention_days"], shorter["pending"]["value"]) == (100, 50)
    longer = await _patched(callers.admin, retention_days=200)
    assert (longer["policy"]["retention_days"], longer["pending"]) == (200, None)
    await _patched(callers.admin, retention_days=150)
    none = await _patched(callers.admin, retention_days=None)
    assert (none["policy"]["retention_days"], none["pending"]) == (None, None)
    cancelled = [event.detail["cancelled"] for event in await _events("gallery.update") if "cancelled" in event.detail]
    assert [one["new"] for one in cancelled if isinstance(one, dict)] == [50, 150]


async def test_the_retention_of_a_new_gallery_applies_at_once_because_it_is_empty(callers: Callers) -> None:
    made = await callers.admin.post("/v1/galleries", json={"name": "young", "policy": {"retention_days": 30}})
    assert (made.json()["policy"]["retention_days"], made.json()["pending"]) == (30, None)
    (event,) = await _events("gallery.create")
    assert event.detail["policy"]["retention_days"] == 30  # type: ignore[index,call-overload]


@pytest.mark.parametrize("change", [None, {"disabled": True}, {"roles": ["auditor"]}, {"galleries": ["elsewhere"]}])
async def test_an_agreement_lapses_with_its_officer(
    runtime: Runtime, callers: Callers, change: dict[str, object] | None
) -> None:
    await _patched(callers.admin, retention_days=1)
    await _agreed(callers.officer)
    users = User.get_pymongo_collection()
    if change is None:
        await users.delete_one({"username": "olga"})
    else:
        await users.update_one({"username": "olga"}, {"$set": change})
    await _let_the_time_come()
    assert await galleries.take_effect(runtime) == 0
    page = (await callers.admin.get(PATH)).json()
    assert (page["policy"]["retention_days"], page["pending"]["agreed_by"]) == (None, None)
    assert len(await _events("gallery.pending.lapse")) == 1


async def test_a_sweep_stops_when_the_retention_is_lifted(
    runtime: Runtime, callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = [await active(runtime, name) for name in ("ann", "bob", "cid")]
    for person in people:
        await _days_ago(person, 100)
    await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.retention_days": 30}})
    stale = await default_gallery()
    found = await Identity.kept_since_before(stale.id, now(), 10)

    async def lifted(*_: object) -> list[str]:
        await _patched(callers.admin, retention_days=None)
        return found

    monkeypatch.setattr(Identity, "kept_since_before", lifted)
    assert await erase_expired(runtime) == 0


async def test_agreement_and_cancellation_repeat_with_their_key(callers: Callers) -> None:
    await _patched(callers.admin, retention_days=30)
    for verb in ("agree", "cancel"):
        headers = {"Idempotency-Key": f"once-{verb}"}
        answers = [await callers.officer.post(f"{PATH}/pending/{verb}", headers=headers) for _ in range(2)]
        assert [one.status_code for one in answers] == [200, 200], answers[1].text
        assert answers[0].json() == answers[1].json()
