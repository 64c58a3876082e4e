"""Slow probing: one caller that asks about many people with one face, or in vain again and again."""

import pytest

from app.audit import Action
from app.documents.budgets import FaceBudget, NonMatches
from app.documents.events import AuditEvent
from app.documents.identities import Identity
from app.errors import RateLimited
from app.runtime import Runtime
from app.use_cases.verify import Claim, Verification, verify
from tests.builders import active, by_app, by_officer, coded_anew, default_gallery, known, portrait

PEOPLE = ("ann", "bob", "cat", "dan", "eve", "fay")


async def _ask(runtime: Runtime, identity: Identity, photo: bytes, action: Action | None = None) -> Verification:
    claim = Claim(await known(identity), audience=None, nonce=None)
    return await verify(runtime, action or by_app("face.verify"), await default_gallery(), claim, photo)


@pytest.fixture
async def everybody(runtime: Runtime) -> list[Identity]:
    """Six people, of whom a caller may ask about four with one face."""
    runtime.settings.probe_identities_per_hour = 4
    return [await active(runtime, person) for person in PEOPLE]


async def test_h66_one_face_for_many_people_is_refused_after_the_budget(
    runtime: Runtime, everybody: list[Identity]
) -> None:
    face = portrait("impostor", capture=1)
    for number, person in enumerate(everybody[:4]):
        assert not (await _ask(runtime, person, coded_anew(face, number))).match
    for person in everybody[4:]:
        with pytest.raises(RateLimited) as refused:
            await _ask(runtime, person, coded_anew(face, 7))
        assert refused.value.retry_after_seconds is not None
        assert 0 < refused.value.retry_after_seconds <= 3601
        assert (await known(person)).attempts.consecutive == 0, "nothing was compared"
    assert not (await _ask(runtime, everybody[0], coded_anew(face, 8))).match, "about those of before it may ask on"


async def test_h66_another_caller_and_another_face_have_budgets_of_their_own(
    runtime: Runtime, everybody: list[Identity]
) -> None:
    face = portrait("impostor", capture=1)
    for person in everybody[:4]:
        await _ask(runtime, person, face)
    with pytest.raises(RateLimited):
        await _ask(runtime, everybody[4], face)
    assert (await _ask(runtime, everybody[4], portrait("eve", capture=3))).match
    assert not (await _ask(runtime, everybody[4], face, by_officer("face.verify"))).match


async def test_h66_the_budget_does_not_tell_who_was_asked_about(runtime: Runtime, everybody: list[Identity]) -> None:
    await _ask(runtime, everybody[0], portrait("impostor"))
    collection = FaceBudget.get_pymongo_collection()
    (kept,) = await collection.find().to_list()
    assert everybody[0].id not in str(kept)
    assert "app-1" not in str(kept)


async def test_h66_many_non_matches_of_one_caller_raise_one_alarm_and_refuse_nothing(
    runtime: Runtime, everybody: list[Identity]
) -> None:
    runtime.settings.non_matches_alarm_per_hour = 3
    for capture in range(5):
        assert not (await _ask(runtime, everybody[capture], portrait("impostor", capture=capture))).match
    assert (await _ask(runtime, everybody[0], portrait("ann", capture=3))).match
    (counted,) = await NonMatches.find_all().to_list()
    assert counted.total == 5
    (alarm,) = await AuditEvent.find({"action": "face.alarm"}).to_list()
    assert (alarm.actor.kind, alarm.subject.kind, alarm.subject.id) == ("system", "client", "app-1")
    assert alarm.detail == {"non_matches": 3}
