"""What an officer can ask of a person over HTTP: who begins like this, and everything that is kept about one."""

import base64
import io
import json
from datetime import date
from typing import Any

import httpx
import pytest
from PIL import Image

from app.documents.events import AuditEvent
from app.documents.identities import Identity
from app.documents.sealed import LOOKUP_RULES, asked_tags, gallery_key
from app.runtime import Runtime
from tests.builders import active, default_gallery, enrolled, erased, known, screened, verified
from tests.fakes import embedding_of


async def named(http: httpx.AsyncClient, q: str, **more: str | int) -> list[str]:
    """The names that a search finds, newest first, over all its pages."""
    found: list[str] = []
    cursor: str | None = None
    while True:
        page = {"cursor": cursor} if cursor else {}
        answer = await http.get("/v1/identities", params={"q": q, **more, **page})
        assert answer.status_code == 200, answer.text
        found += [item["full_name"] for item in answer.json()["items"]]
        cursor = answer.json()["next_cursor"]
        if cursor is None:
            return found


async def test_people_are_found_by_the_beginning_of_a_name_while_it_is_theirs(
    runtime: Runtime, officer: httpx.AsyncClient
) -> None:
    ann = await enrolled(runtime, "ann", full_name="Ann Example")
    await enrolled(runtime, "bob", full_name="Bob Anderson")
    await enrolled(runtime, "cid", full_name="Cid")
    await enrolled(runtime, "dan")
    assert await named(officer, "AN") == ["Bob Anderson", "Ann Example"]
    assert await named(officer, "an", limit=1) == ["Bob Anderson", "Ann Example"]
    assert await named(officer, "ann ex") == ["Ann Example"]
    assert await named(officer, "exa", status="pending", gallery="default") == ["Ann Example"]
    assert await named(officer, "(q+)+$") == await named(officer, "xyz") == await named(officer, "nn") == []
    changed = await officer.patch(f"/v1/identities/{ann.id}", json={"full_name": "Zoë Example"})
    assert changed.status_code == 200
    assert (await named(officer, "ann"), await named(officer, "zoe\u0308")) == ([], ["Zoë Example"])
    await officer.patch(f"/v1/identities/{ann.id}", json={"full_name": None})
    assert (await known(ann)).name_tags == [LOOKUP_RULES]
    await officer.patch(f"/v1/identities/{ann.id}", json={"full_name": "Ann Example"})
    await erased(runtime, await known(ann))
    assert await named(officer, "ann") == []


async def test_names_that_share_their_first_letters_only_are_told_apart_over_all_pages(
    runtime: Runtime, officer: httpx.AsyncClient
) -> None:
    for number in range(6):
        await enrolled(
            runtime, f"p{number}", full_name=f"Wolfeschlegel{'steinhausen' if number % 3 == 0 else 'berger'} {number}"
        )
    expected = ["Wolfeschlegelsteinhausen 3", "Wolfeschlegelsteinhausen 0"]
    for limit in (1, 2, 5):
        assert await named(officer, "wolfeschlegelst", limit=limit) == expected


async def test_somebody_is_found_by_the_reference_in_any_spelling(runtime: Runtime, officer: httpx.AsyncClient) -> None:
    await enrolled(runtime, "ann", external_ref="NID-1", full_name="Ann")
    await enrolled(runtime, "bob", external_ref="NID-2", full_name="Bob")
    for asked, expected in (("nid-1", ["Ann"]), ("ＮＩＤ-2", ["Bob"]), ("NID", [])):
        page = (await officer.get("/v1/identities", params={"external_ref": asked})).json()
        assert [item["full_name"] for item in page["items"]] == expected


async def test_a_tag_that_is_somebody_elses_by_chance_brings_nobody(
    runtime: Runtime, officer: httpx.AsyncClient
) -> None:
    ann = await enrolled(runtime, "ann", full_name="Ann")
    (tag,) = asked_tags(gallery_key(runtime.keys, await default_gallery()), "bob")
    await Identity.get_pymongo_collection().update_one({"_id": ann.id}, {"$push": {"name_tags": tag}})
    assert await named(officer, "bob") == []


@pytest.mark.parametrize("q", ["", " ", "\u00a0", "x" * 257])
async def test_a_name_prefix_has_a_letter_and_an_end(officer: httpx.AsyncClient, q: str) -> None:
    answer = await officer.get("/v1/identities", params={"q": q})
    assert answer.status_code == 422


async def _export(http: httpx.AsyncClient, identity_id: str) -> dict[str, Any]:
    answer = await http.get(f"/v1/identities/{identity_id}/export")
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "application/json"
    page: dict[str, Any] = answer.json()
    return page


async def test_an_export_holds_everything_about_the_person_and_of_others_ids_only(
    runtime: Runtime, officer: httpx.AsyncClient
) -> None:
    twin = await screened(runtime, await enrolled(runtime, "ann", external_ref="NID-2", full_name="Secret Twin"))
    ann = await enrolled(
        runtime,
        "ann",
        capture=1,
        photos=2,
        external_ref="NID-1",
        full_name="Ann Example",
        date_of_birth=date(1990, 1, 31),
    )
    ann = await screened(runtime, ann)
    page = await _export(officer, ann.id)
    person = page["identity"]
    assert (person["full_name"], person["external_ref"], person["date_of_birth"]) == (
        "Ann Example",
        "NID-1",
        "1990-01-31",
    )
    assert (person["id"], person["status"], person["gallery"]) == (ann.id, "suspected_duplicate", "default")
    assert [sample["id"] for sample in page["samples"]] == [sample.id for sample in ann.samples]
    for sample in page["samples"]:
        assert Image.open(io.BytesIO(base64.b64decode(sample["photo_base64"]))).size == (160, 160)
        assert sample["template"] == {"model": "sha256:fake", "bytes": len(ann.samples[0].template), "given": False}
    (screening,) = page["screenings"]
    assert [candidate["identity_id"] for candidate in screening["candidates"]] == [twin.id]
    assert [pair["identity_id"] for pair in page["pairs"]] == [twin.id]
    (case,) = page["cases"]
    assert (case["newcomer_id"], [c["identity_id"] for c in case["candidates"]]) == (ann.id, [twin.id])
    assert [event["action"] for event in page["events"]][:2] == ["identity.enrol", "dedup.verdict"]
    assert page["events"][-1]["action"] == "identity.export", "the export tells of itself"
    text = json.dumps(page)
    for foreign in ("Secret Twin", "NID-2", "Olga", "192.0.2"):
        assert foreign not in text, foreign
    template = base64.b64encode(embedding_of(("ann",), 1).astype("<f4").tobytes()).decode()
    assert template[:60] not in text
    theirs = await _export(officer, twin.id)
    (their_case,) = theirs["cases"]
    assert [c["identity_id"] for c in their_case["candidates"]] == [twin.id]
    assert "Ann Example" not in json.dumps(theirs)
    assert await AuditEvent.find({"action": "identity.export", "outcome": "success"}).count() == 2


async def test_an_export_tells_of_a_photo_that_is_missing_and_of_what_is_remembered_for_a_day(
    runtime: Runtime, officer: httpx.AsyncClient
) -> None:
    ann = await active(runtime, "ann")
    await verified(runtime, ann, "ann")
    await runtime.photos.delete([ann.samples[0].photo_key])
    page = await _export(officer, ann.id)
    assert page["samples"][0]["photo_base64"] is None
    assert page["probes"] == {"count": 1, "kept_hours": runtime.settings.replay_window_hours}
    assert page["deletion"]["retention_days"] is None


async def test_nothing_is_exported_of_the_erased_and_the_unknown(runtime: Runtime, officer: httpx.AsyncClient) -> None:
    ann = await active(runtime, "ann")
    await erased(runtime, ann)
    for identity_id in (ann.id, "nobody"):
        answer = await officer.get(f"/v1/identities/{identity_id}/export")
        assert answer.status_code == 404
