"""Enrollers enrol, read the verdicts of their own enrolments, and see nothing else about people."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest

from app.documents.accounts import Client
from app.runtime import Runtime
from tests.builders import enrolled, known, portrait, screened, with_sample
from tests.support.callers import app_on, http_of, machine_token_of, token_of


@dataclass(frozen=True, slots=True)
class Desk:
    """Two enrollers and an officer."""

    runtime: Runtime
    mine: httpx.AsyncClient
    others: httpx.AsyncClient
    officer: httpx.AsyncClient


@pytest.fixture
async def desk(runtime: Runtime, cheap_passwords: None) -> AsyncIterator[Desk]:
    """A service with an empty gallery `default`, and its callers."""
    app = app_on(runtime)
    tokens = [await machine_token_of(runtime, app, name, "enroller", None) for name in ("mine", "others")]
    tokens.append(await token_of(runtime, app, "olga", "officer", None))
    callers = [http_of(app, token) for token in tokens]
    yield Desk(runtime, *callers)
    for http in callers:
        await http.aclose()


async def enrol(
    http: httpx.AsyncClient, who: str, capture: int = 0, key: str | None = None, **fields: str
) -> httpx.Response:
    """The answer about an enrolment."""
    photo = ("photo.png", portrait(who, capture=capture) if who else b"no photo")
    headers = {} if key is None else {"Idempotency-Key": key}
    return await http.post("/v1/identities", files={"photo": photo}, data=fields, headers=headers)


async def test_an_enroller_enrols_and_reads_its_verdicts(desk: Desk) -> None:
    made = await enrol(desk.mine, "ann", key="k1", external_ref="NID-1", full_name="Ann")
    assert made.status_code == 202
    ann = made.json()
    assert (ann["external_ref"], ann["full_name"], ann["status"]) == ("NID-1", "Ann", "pending")
    again = await enrol(desk.mine, "ann", key="k1", external_ref="NID-1", full_name="Ann")
    assert again.json() == ann
    await screened(desk.runtime, await known(ann["id"]))
    seen = (await desk.mine.get(f"/v1/identities/{ann['id']}")).json()
    assert (seen["status"], seen["dedup"]["state"], seen["dedup"]["verdict"]) == ("active", "done", "unique")
    job = (await desk.mine.get(f"/v1/dedup/jobs/{seen['dedup']['job_id']}")).json()
    assert (job["kind"], job["state"], job["verdict"], job["candidates"]) == ("enrolment", "done", "unique", None)
    assert (await desk.mine.post("/v1/faces/detect", files={"photo": ("p", portrait("ann"))})).status_code == 200
    assert (await desk.mine.post("/v1/faces/quality", files={"photo": ("p", portrait("ann"))})).status_code == 200
    assert (await desk.mine.get("/v1/galleries/default")).status_code == 200


async def test_an_enroller_learns_a_verdict_and_nothing_about_the_look_alikes(desk: Desk) -> None:
    first = await screened(
        desk.runtime, await enrolled(desk.runtime, "ann", external_ref="NID-1", full_name="Ann First")
    )
    ann = (await enrol(desk.mine, "ann", capture=1)).json()
    identity = await screened(desk.runtime, await known(ann["id"]))
    (candidate,) = identity.screenings[0].candidates
    assert candidate.identity_id == first.id
    case_id = identity.screenings[0].case_id
    assert case_id is not None
    answers = [
        await desk.mine.get(f"/v1/identities/{ann['id']}"),
        await desk.mine.get(f"/v1/dedup/jobs/{ann['dedup']['job_id']}"),
    ]
    assert answers[0].json()["status"] == "suspected_duplicate"
    assert answers[0].json()["dedup"] == {
        "job_id": ann["dedup"]["job_id"], "state": "done", "verdict": "suspected_duplicate", "case_id": None,
        "candidate_count": None,
    }  # fmt: skip
    for answer in answers:
        assert answer.status_code == 200
        for secret in (first.id, "NID-1", "Ann First", case_id, str(round(candidate.score, 3))):
            assert secret not in answer.text
    # The officer sees it all.
    full = (await desk.officer.get(f"/v1/identities/{ann['id']}")).json()
    assert (full["dedup"]["case_id"], full["dedup"]["candidate_count"]) == (case_id, 1)


async def test_an_enroller_does_not_see_what_officers_change_or_add_later(desk: Desk) -> None:
    ann = (await enrol(desk.mine, "ann", full_name="Ann")).json()
    identity = await screened(desk.runtime, await known(ann["id"]))
    patch = {"full_name": "Ann Other", "metadata": {"note": "x"}}
    assert (await desk.officer.patch(f"/v1/identities/{ann['id']}", json=patch)).status_code == 200
    later = await with_sample(desk.runtime, identity, "ann")
    seen = (await desk.mine.get(f"/v1/identities/{ann['id']}")).json()
    assert (seen["full_name"], seen["external_ref"], seen["date_of_birth"], seen["metadata"]) == (None, None, None, {})
    assert [sample["id"] for sample in seen["samples"]] == [identity.samples[0].id]
    assert seen["dedup"]["job_id"] == ann["dedup"]["job_id"]
    assert (await desk.mine.get(f"/v1/dedup/jobs/{later.screenings[-1].job_id}")).status_code == 404
    assert (await desk.officer.get(f"/v1/dedup/jobs/{later.screenings[-1].job_id}")).status_code == 200


async def test_an_enroller_reads_no_enrolment_of_others(desk: Desk) -> None:
    ann = (await enrol(desk.mine, "ann")).json()
    officers = await enrolled(desk.runtime, "bob")
    for path in (
        f"/v1/identities/{ann['id']}", f"/v1/dedup/jobs/{ann['dedup']['job_id']}",
        f"/v1/identities/{officers.id}", f"/v1/dedup/jobs/{officers.screenings[0].job_id}", "/v1/dedup/jobs/nobodys",
    ):  # fmt: skip
        assert (await desk.others.get(path)).status_code == 404, path
    key = await enrol(desk.others, "ann", key="k1")
    assert key.json()["id"] != ann["id"]


async def test_worthless_photos_do_not_tell_an_enroller_which_references_are_taken(desk: Desk) -> None:
    await enrolled(desk.runtime, "ann", external_ref="NID-1")
    answers = [await enrol(desk.mine, "", external_ref=reference) for reference in ("NID-1", "NID-2")]
    assert [answer.status_code for answer in answers] == [answers[0].status_code] * 2
    assert answers[0].json()["type"] == answers[1].json()["type"]
    assert (await enrol(desk.mine, "bob", external_ref="NID-1")).status_code == 409
    assert (await enrol(desk.officer, "", external_ref="NID-1")).status_code == 409


async def test_an_application_with_both_roles_verifies_people_whom_others_enrolled(desk: Desk) -> None:
    bob = await screened(desk.runtime, await enrolled(desk.runtime, "bob"))
    await Client.get_pymongo_collection().update_one({"name": "mine"}, {"$set": {"roles": ["enroller", "relying_app"]}})
    desk.runtime.access.forget()
    photo = {"photo": ("photo.png", portrait("bob", capture=1))}
    answer = await desk.mine.post("/v1/verifications", files=photo, data={"identity_id": bob.id})
    assert (answer.status_code, answer.json().get("match")) == (200, True)
    # To read about them is another right.
    assert (await desk.mine.get(f"/v1/identities/{bob.id}")).status_code == 404
