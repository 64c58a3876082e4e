"""Cases with many candidates: a list shows the first ones, a single case shows pages, and each person is opened once."""

from collections import Counter
from collections.abc import AsyncIterator
from itertools import pairwise

import httpx
import pytest

from app.api import dedup, identities
from app.documents.identities import Identity
from app.runtime import Runtime
from tests.builders import erased, known, settled
from tests.support.callers import app_on, http_of, token_of

LOOK_ALIKES = 13


@pytest.fixture
async def officer(runtime: Runtime, cheap_passwords: None) -> AsyncIterator[httpx.AsyncClient]:
    app = app_on(runtime)
    async with http_of(app, await token_of(runtime, app, "olga", "officer", None)) as http:
        yield http


@pytest.fixture
async def crowd(runtime: Runtime) -> list[Identity]:
    """One face that is enrolled many times. Each identity looks like all before it."""
    return [await settled(runtime, "ann", capture=number) for number in range(LOOK_ALIKES)]


async def test_a_list_shows_the_first_ten_candidates_and_their_count(
    officer: httpx.AsyncClient, crowd: list[Identity]
) -> None:
    cases = (await officer.get("/v1/dedup/cases")).json()["items"]
    assert [case["candidate_count"] for case in cases] == list(range(1, LOOK_ALIKES))
    assert [len(case["candidates"]) for case in cases] == [min(n, 10) for n in range(1, LOOK_ALIKES)]
    assert [c["rank"] for c in cases[-1]["candidates"]] == list(range(1, 11))
    assert cases[-1]["newcomer"]["id"] == crowd[-1].id
    assert cases[-1]["candidates"][0]["identity"]["status"] in ("active", "suspected_duplicate")
    assert cases[-1]["candidates_next_cursor"] is None


async def test_each_person_of_a_page_is_opened_once(
    officer: httpx.AsyncClient, crowd: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Counter[str] = Counter()
    view = identities.view

    def counted(runtime: Runtime, gallery: dedup.Gallery, identity: Identity) -> identities.IdentityView:
        opened[identity.id] += 1
        return view(runtime, gallery, identity)

    monkeypatch.setattr(identities, "view", counted)
    assert (await officer.get("/v1/dedup/cases")).status_code == 200
    assert len(opened) == len(crowd)
    assert set(opened.values()) == {1}


async def test_the_candidates_of_a_case_come_page_by_page(
    runtime: Runtime, officer: httpx.AsyncClient, crowd: list[Identity]
) -> None:
    newcomer = await known(crowd[-1])
    path = f"/v1/dedup/cases/{newcomer.screenings[0].case_id}"
    whole = (await officer.get(path)).json()
    assert len(whole["candidates"]) == whole["candidate_count"] == LOOK_ALIKES - 1
    assert whole["candidates_next_cursor"] is None
    assert all(a["score"] >= b["score"] for a, b in pairwise(whole["candidates"]))
    found, cursor = [], None
    while True:
        query = {"limit": 5} | ({} if cursor is None else {"cursor": cursor})
        page = (await officer.get(path, params=query)).json()
        found += page["candidates"]
        cursor = page["candidates_next_cursor"]
        if cursor is None:
            break
        assert len(page["candidates"]) == 5
        assert {**page, "candidates": None, "candidates_next_cursor": None} == {**whole, "candidates": None}
    assert found == whole["candidates"]


async def test_a_cursor_of_one_case_is_refused_by_another(officer: httpx.AsyncClient, crowd: list[Identity]) -> None:
    cases = [(await known(identity)).screenings[0].case_id for identity in crowd[-2:]]
    cursor = (await officer.get(f"/v1/dedup/cases/{cases[0]}", params={"limit": 1})).json()["candidates_next_cursor"]
    answer = await officer.get(f"/v1/dedup/cases/{cases[1]}", params={"cursor": cursor})
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (422, "bad-cursor")


async def test_an_erased_candidate_is_null(runtime: Runtime, officer: httpx.AsyncClient, crowd: list[Identity]) -> None:
    case_id = (await known(crowd[-1])).screenings[0].case_id
    body = {"decision": "distinct", "reason": "looked"}
    answer = await officer.post(f"/v1/dedup/cases/{case_id}/decision", json={**body, "identity_id": crowd[3].id})
    assert answer.status_code == 200
    assert answer.json()["candidate_count"] == LOOK_ALIKES - 1
    (decided,) = [c for c in answer.json()["candidates"] if c["decision"] == "distinct"]
    assert decided["identity"]["id"] == crowd[3].id
    await officer.post(f"/v1/dedup/cases/{case_id}/decision", json=body)
    await erased(runtime, crowd[3])
    case = (await officer.get(f"/v1/dedup/cases/{case_id}")).json()
    assert sum(c["identity"] is None for c in case["candidates"]) == 1
