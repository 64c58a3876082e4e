"""Enrolment over HTTP, and what may be done with an identity."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from PIL import Image

from tests.e2e.builders import (
    DEDUP_FIELDS,
    IDENTITY_FIELDS,
    NOBODY,
    QUALITY_FIELDS,
    SAMPLE_FIELDS,
    Page,
    Service,
    again,
    base64_of,
    enrol,
    identity,
    new_gallery,
    part,
    people,
    portrayed,
    problem,
    unique,
)

VERDICT_WITHIN_SECONDS = 20.0


def send(service: Service, gallery: str, *photos: bytes, key: str | None = None, **fields: str) -> httpx.Response:
    """An enrolment that does not wait for its verdict."""
    headers = {} if key is None else {"Idempotency-Key": key}
    files = [part(photo) for photo in photos]
    return service.officer.post("/v1/identities", files=files, data={"gallery": gallery, **fields}, headers=headers)


def judged(service: Service, identity_id: str) -> Page:
    """The identity once it has its verdict."""
    deadline = time.monotonic() + VERDICT_WITHIN_SECONDS
    while (page := identity(service, identity_id))["status"] == "pending":
        assert time.monotonic() < deadline, page
    return page


def is_moment(text: str) -> bool:
    """Whether it is a time as the contract writes it: RFC 3339, UTC, milliseconds."""
    return text == datetime.fromisoformat(text).astimezone(UTC).isoformat(timespec="milliseconds").replace(
        "+00:00", "Z"
    )


def test_somebody_new_is_enrolled_and_becomes_active(service: Service, gallery: str) -> None:
    answer = service.officer.post(
        "/v1/identities",
        params={"wait": 30},
        files=[part(people()[0].photo)],
        data={
            "gallery": gallery, "external_ref": "NID-0001", "full_name": "Zoë Ångström", "date_of_birth": "1990-01-31",
            "metadata": '{"site": "north", "tags": ["a", 1, null]}',
        },
    )  # fmt: skip
    assert answer.status_code == 201, answer.text
    page = answer.json()
    assert answer.headers["location"] == f"/v1/identities/{page['id']}"
    assert answer.headers["etag"] == f'"{page["version"]}"'
    assert set(page) == IDENTITY_FIELDS
    assert (page["gallery"], page["external_ref"], page["full_name"]) == (gallery, "NID-0001", "Zoë Ångström")
    assert (page["date_of_birth"], page["metadata"]) == ("1990-01-31", {"site": "north", "tags": ["a", 1, None]})
    assert page["status"] == "active"
    (sample,) = page["samples"]
    assert set(sample) == SAMPLE_FIELDS
    assert set(sample["quality"]) == QUALITY_FIELDS
    assert sample["status"] == "active"
    assert sample["liveness"] is None or set(sample["liveness"]) == {"score", "passed"}
    assert set(page["dedup"]) == DEDUP_FIELDS
    assert (page["dedup"]["state"], page["dedup"]["verdict"]) == ("done", "unique")
    assert (page["dedup"]["case_id"], page["dedup"]["candidate_count"]) == (None, 0)
    assert all(is_moment(page[name]) for name in ("created_at", "updated_at"))
    assert page["created_by"] == service.officer.get("/v1/auth/me").json()["id"]
    assert service.officer.get(answer.headers["location"]).json() == page


def test_without_waiting_the_answer_is_202_and_the_verdict_follows(service: Service, gallery: str) -> None:
    answer = send(service, gallery, people()[0].photo)
    assert answer.status_code == 202
    page = answer.json()
    assert set(page) == IDENTITY_FIELDS
    assert (page["status"], page["dedup"]["state"], page["dedup"]["verdict"]) == ("pending", "queued", None)
    assert (page["external_ref"], page["full_name"], page["date_of_birth"], page["metadata"]) == (None, None, None, {})
    assert (page["version"], answer.headers["etag"]) == (1, '"1"')
    later = judged(service, page["id"])
    assert (later["status"], later["dedup"]["verdict"]) == ("active", "unique")
    assert later["version"] > page["version"]
    job = service.officer.get(f"/v1/dedup/jobs/{page['dedup']['job_id']}").json()
    assert set(job) == {
        "id", "kind", "state", "progress", "verdict", "candidates", "as_of_seq", "started_at", "finished_at",
    }  # fmt: skip
    assert (job["id"], job["kind"], job["state"]) == (page["dedup"]["job_id"], "enrolment", "done")
    assert (job["progress"], job["verdict"], job["candidates"]) == ({"done": 1, "total": 1}, "unique", [])
    assert is_moment(job["started_at"])
    assert is_moment(job["finished_at"])


def test_every_pair_of_photos_of_one_person_is_suspected_and_no_two_people_are_mixed_up(
    service: Service, gallery: str
) -> None:
    everybody = list(portrayed())
    enrolled = {person.name: enrol(service, gallery, person.photo, external_ref=person.name) for person in everybody}
    assert {name for name, page in enrolled.items() if page["status"] != "active"} == set()
    for person in everybody:
        second = enrol(service, gallery, person.selfie)
        assert second["status"] == "suspected_duplicate", person.name
        case = service.officer.get(f"/v1/dedup/cases/{second['dedup']['case_id']}").json()
        assert [c["identity"]["external_ref"] for c in case["candidates"]] == [person.name]


def test_h68_two_enrolments_of_one_person_at_the_same_moment_end_as_one_active_and_one_suspected(
    service: Service,
) -> None:
    person = people()[1]
    for _ in range(5):
        gallery = new_gallery(service)
        with ThreadPoolExecutor(2) as both:
            pages = list(both.map(lambda photo, g=gallery: enrol(service, g, photo), (person.photo, person.selfie)))
        assert sorted(page["status"] for page in pages) == ["active", "suspected_duplicate"]


def test_photos_may_come_as_json(service: Service, gallery: str) -> None:
    one, two = people()[:2]
    answer = service.officer.post(
        "/v1/identities", json={"gallery": gallery, "photo_base64": base64_of(one.photo), "metadata": {"a": {"b": 1}}}
    )
    assert answer.status_code == 202, answer.text
    assert answer.json()["metadata"] == {"a": {"b": 1}}
    several = {"gallery": gallery, "photos_base64": [base64_of(two.photo), base64_of(two.selfie)]}
    answer = service.officer.post("/v1/identities", params={"wait": 30}, json=several)
    assert answer.status_code == 201, answer.text
    assert [sample["status"] for sample in answer.json()["samples"]] == ["active", "active"]


def test_one_to_five_photos_are_taken_and_not_more(service: Service, gallery: str) -> None:
    photo = people()[2].photo
    assert len(send(service, gallery, *(again(photo) for _ in range(5))).json()["samples"]) == 5
    problem(send(service, gallery, *(again(photo) for _ in range(6))), 422, "validation")
    problem(send(service, gallery), 415, "unsupported-media-type")
    no_photo = service.officer.post("/v1/identities", json={"gallery": gallery})
    assert problem(no_photo, 422, "validation")["errors"][0]["field"] == "photo"


def test_photos_of_different_people_are_refused_and_leave_nothing(service: Service, gallery: str) -> None:
    refused = send(service, gallery, people()[0].photo, people()[1].photo)
    assert problem(refused, 422, "different-people")["errors"]
    assert service.officer.get("/v1/identities", params={"gallery": gallery}).json()["items"] == []
    assert service.officer.get(f"/v1/galleries/{gallery}").json()["counts"] == {"identities": 0, "samples": 0}


def test_a_reference_belongs_to_one_identity_of_its_gallery_however_it_is_spelt(service: Service, gallery: str) -> None:
    first = enrol(service, gallery, people()[0].photo, external_ref="Alice-1")
    for spelling in ("Alice-1", "alice-1", "Ａlice-1", " Alice-1 "):
        problem(send(service, gallery, people()[1].photo, external_ref=spelling), 409, "external-ref-taken")
    found = service.officer.get("/v1/identities", params={"gallery": gallery, "external_ref": "ALICE-1"}).json()
    assert [page["id"] for page in found["items"]] == [first["id"]]
    enrol(service, new_gallery(service), people()[1].photo, external_ref="Alice-1")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"external_ref": "\u3164"}, "external_ref"),
        ({"external_ref": "x" * 129}, "external_ref"),
        ({"external_ref": "a\x00b"}, "external_ref"),
        ({"full_name": "\u202eevil"}, "full_name"),
        ({"full_name": "a\nb"}, "full_name"),
        ({"date_of_birth": "1990-02-31"}, "date_of_birth"),
        ({"date_of_birth": "yesterday"}, "date_of_birth"),
        ({"metadata": "[]"}, "metadata"),
        ({"metadata": "{"}, "metadata"),
        ({"metadata": '{"$where": 1}'}, "metadata"),
        ({"metadata": '{"a.b": 1}'}, "metadata"),
        ({"metadata": '{"a": {"b": {"c": {}}}}'}, "metadata"),
        ({"metadata": '{"a": "' + "x" * 4096 + '"}'}, "metadata"),
        ({"metadata": "{" + ",".join(f'"k{n}": 1' for n in range(33)) + "}"}, "metadata"),
        ({"status": "active"}, "status"),
        ({"role": "admin"}, "role"),
    ],
)
def test_fields_that_do_not_fit_are_named(service: Service, gallery: str, fields: dict[str, str], field: str) -> None:
    page = problem(send(service, gallery, people()[0].photo, **fields), 422, "validation")
    assert {error["field"].partition(".")[0] for error in page["errors"]} == {field}


def test_a_gallery_that_is_not_there_is_not_found(service: Service) -> None:
    problem(send(service, "nowhere", people()[0].photo), 404, "not-found")


@pytest.mark.parametrize("wait", ["-1", "31", "NaN", "inf", "x"])
def test_waiting_is_bounded(service: Service, gallery: str, wait: str) -> None:
    answer = service.officer.post(
        "/v1/identities", params={"wait": wait}, files=[part(people()[0].photo)], data={"gallery": gallery}
    )
    assert problem(answer, 422, "validation")["errors"][0]["field"] == "wait"


def test_h69_the_same_request_with_the_same_key_enrols_once(service: Service, gallery: str) -> None:
    key, photo = unique("key"), people()[3].photo
    first = send(service, gallery, photo, key=key, full_name="A")
    second = send(service, gallery, photo, key=key, full_name="A")
    assert (first.status_code, second.status_code) == (202, 202)
    assert second.json()["id"] == first.json()["id"]
    assert second.headers["location"] == first.headers["location"]
    assert service.officer.get(f"/v1/galleries/{gallery}").json()["counts"]["identities"] == 1
    problem(send(service, gallery, photo, key=key, full_name="B"), 422, "idempotency-key-reused")
    problem(send(service, gallery, people()[4].photo, key=key, full_name="A"), 422, "idempotency-key-reused")


def test_a_refusal_is_not_kept_under_its_key(service: Service, gallery: str) -> None:
    key = unique("key")
    problem(send(service, gallery, people()[0].photo, people()[1].photo, key=key), 422, "different-people")
    assert send(service, gallery, people()[0].photo, key=key).status_code == 202


def test_h69_ten_equal_requests_at_once_with_one_key_enrol_once(service: Service, gallery: str) -> None:
    key, photo = unique("key"), people()[3].photo
    with ThreadPoolExecutor(10) as crowd:
        answers = list(crowd.map(lambda _: send(service, gallery, photo, key=key), range(10)))
    assert {answer.json()["id"] for answer in answers if answer.status_code == 202} != set()
    for answer in answers:
        assert answer.status_code == 202 or problem(answer, 409, "idempotency-in-progress")
    assert service.officer.get(f"/v1/galleries/{gallery}").json()["counts"]["identities"] == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
def test_a_key_has_1_to_255_printable_characters(service: Service, gallery: str, key: str) -> None:
    problem(send(service, gallery, people()[0].photo, key=key), 422, "validation")


def test_lists_are_newest_first_in_pages_that_neither_repeat_nor_miss_anyone(service: Service, gallery: str) -> None:
    made = [send(service, gallery, again(people()[0].photo)).json()["id"] for _ in range(5)]
    seen: list[str] = []
    query = {"gallery": gallery, "limit": "2"}
    while True:
        page = service.officer.get("/v1/identities", params=query).json()
        assert set(page) == {"items", "next_cursor"}
        assert len(page["items"]) <= 2
        seen += [item["id"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    assert seen == made[::-1]


def test_a_cursor_serves_its_own_query_and_caller_only(service: Service, gallery: str) -> None:
    for _ in range(2):
        send(service, gallery, again(people()[0].photo))
    query = {"gallery": gallery, "limit": "1"}
    cursor = service.officer.get("/v1/identities", params=query).json()["next_cursor"]
    forged = [cursor[:-2] + ("AA" if cursor[-2:] != "AA" else "BB"), "abc", "", "\x00", cursor + "AAAA"]
    for bad in forged:
        problem(service.officer.get("/v1/identities", params={**query, "cursor": bad}), 422, "validation")
    for other in ({"limit": "1"}, {**query, "status": "active"}):
        problem(service.officer.get("/v1/identities", params={**other, "cursor": cursor}), 422, "validation")
    problem(service.admin.get("/v1/users", params={"cursor": cursor}), 422, "validation")


def test_lists_are_filtered_by_status_time_and_reference(service: Service, gallery: str) -> None:
    person = people()[0]
    first = enrol(service, gallery, person.photo, external_ref="R1")
    second = enrol(service, gallery, person.selfie)

    def found(**query: str) -> list[str]:
        answer = service.officer.get("/v1/identities", params={"gallery": gallery, **query})
        assert answer.status_code == 200, answer.text
        return [page["id"] for page in answer.json()["items"]]

    assert found(status="active") == [first["id"]]
    assert found(status="suspected_duplicate") == [second["id"]]
    assert found(external_ref="R1") == [first["id"]]
    assert found(external_ref="R2") == []
    assert found(created_after=second["created_at"]) == [second["id"]]
    assert found(created_before=second["created_at"]) == [first["id"]]
    problem(service.officer.get("/v1/identities", params={"status": "erased"}), 422, "validation")
    problem(service.officer.get("/v1/identities", params={"created_after": "soon"}), 422, "validation")
    problem(service.officer.get("/v1/identities", params={"gallery": "nowhere"}), 404, "not-found")


def test_attributes_are_changed_by_merge_patch_at_the_named_version(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[0].photo, external_ref="R1", full_name="A", metadata='{"a": 1, "b": 2}')
    path = f"/v1/identities/{made['id']}"
    etag = service.officer.get(path).headers["etag"]
    patch = {"full_name": None, "metadata": {"a": None, "c": {"d": 3}}, "date_of_birth": "2000-02-29"}
    changed = service.officer.patch(path, json=patch, headers={"If-Match": etag})
    assert changed.status_code == 200, changed.text
    page = changed.json()
    assert (page["full_name"], page["external_ref"], page["date_of_birth"]) == (None, "R1", "2000-02-29")
    assert page["metadata"] == {"b": 2, "c": {"d": 3}}
    assert page["version"] == made["version"] + 1
    assert changed.headers["etag"] == f'"{page["version"]}"'
    problem(
        service.officer.patch(path, json={"full_name": "B"}, headers={"If-Match": etag}), 412, "precondition-failed"
    )
    problem(service.officer.patch(path, json={"status": "active"}), 422, "validation")
    problem(service.officer.patch(path, json={"gallery": "default"}), 422, "validation")
    other = enrol(service, gallery, people()[1].photo, external_ref="R2")
    problem(
        service.officer.patch(f"/v1/identities/{other['id']}", json={"external_ref": "r1"}), 409, "external-ref-taken"
    )
    assert identity(service, made["id"]) == page


def test_an_identity_is_revoked_and_reinstated_and_nothing_else(service: Service, gallery: str) -> None:
    path = f"/v1/identities/{enrol(service, gallery, people()[0].photo)['id']}"
    problem(service.officer.post(f"{path}/reinstate", json={"reason": "x"}), 409, "conflict")
    problem(service.officer.post(f"{path}/revoke", json={}), 422, "validation")
    problem(service.officer.post(f"{path}/revoke", json={"reason": ""}), 422, "validation")
    assert service.officer.post(f"{path}/revoke", json={"reason": "lost"}).json()["status"] == "revoked"
    problem(service.officer.post(f"{path}/revoke", json={"reason": "lost"}), 409, "conflict")
    problem(service.officer.post(f"{path}/samples", files=[part(people()[0].selfie)]), 409, "conflict")
    assert service.officer.post(f"{path}/reinstate", json={"reason": "found"}).json()["status"] == "active"
    problem(service.officer.post(f"{path}/screen"), 409, "conflict")


def test_a_later_photo_serves_once_it_is_screened(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    path = f"/v1/identities/{made['id']}/samples"
    problem(service.officer.post(path, files=[part(people()[2].photo)]), 409, "different-person")
    answer = service.officer.post(path, files=[part(person.selfie)])
    assert answer.status_code == 202, answer.text
    assert len(answer.json()["samples"]) == 2
    deadline = time.monotonic() + VERDICT_WITHIN_SECONDS
    while {s["status"] for s in identity(service, made["id"])["samples"]} != {"active"}:
        assert time.monotonic() < deadline


def test_a_later_photo_is_removed_with_a_receipt(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    path = f"/v1/identities/{made['id']}/samples"
    added = service.officer.post(path, files=[part(person.selfie)]).json()["samples"][1]["id"]
    sample = f"{path}/{added}"
    problem(service.officer.delete(sample), 422, "validation")
    problem(service.officer.delete(f"{path}/{made['samples'][0]['id']}", params={"reason": "x"}), 409, "conflict")
    headers = {"Idempotency-Key": f"remove-{added}"}
    answer = service.officer.delete(sample, params={"reason": "not hers"}, headers=headers)
    assert answer.status_code == 200, answer.text
    receipt = answer.json()
    assert set(receipt) == {"identity_id", "sample_id", "removed_at", "photos", "audit_event_id", "index_purge_by"}
    assert (receipt["identity_id"], receipt["sample_id"], receipt["photos"]) == (made["id"], added, 1)
    again_answered = service.officer.delete(sample, params={"reason": "not hers"}, headers=headers)
    assert (again_answered.status_code, again_answered.json()) == (200, receipt)
    problem(service.officer.delete(sample, params={"reason": "not hers"}), 404, "not-found")
    problem(service.officer.get(f"{sample}/photo"), 404, "not-found")
    assert [s["id"] for s in identity(service, made["id"])["samples"]] == [made["samples"][0]["id"]]
    assert service.officer.get(f"/v1/galleries/{gallery}").json()["counts"] == {"identities": 1, "samples": 1}


def test_the_stored_photo_is_our_own_encoding_and_is_kept_by_nobody(service: Service, gallery: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    sent = io.BytesIO()
    Image.open(io.BytesIO(people()[0].photo)).save(sent, "JPEG", exif=exif.tobytes(), quality=95)
    assert b"a secret place" in sent.getvalue()
    made = enrol(service, gallery, sent.getvalue())
    path = f"/v1/identities/{made['id']}/samples/{made['samples'][0]['id']}/photo"
    answer = service.officer.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    assert "no-store" in answer.headers["cache-control"]
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert b"a secret place" not in answer.content
    assert len(Image.open(io.BytesIO(answer.content)).getexif()) == 0
    problem(service.officer.get(f"/v1/identities/{made['id']}/samples/{NOBODY}/photo"), 404, "not-found")
    crop = service.officer.get(path.replace("/photo", "/crop"))
    assert (crop.status_code, crop.headers["content-type"]) == (200, "image/png")
    assert "no-store" in crop.headers["cache-control"]
    assert Image.open(io.BytesIO(crop.content)).size == (112, 112)
    problem(service.app.get(path.replace("/photo", "/crop")), 403, "forbidden")


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("GET", ""), ("PATCH", ""), ("DELETE", "?reason=x"), ("POST", "/samples"), ("GET", f"/samples/{NOBODY}/photo"),
        ("DELETE", f"/samples/{NOBODY}?reason=x"),
        ("POST", "/screen"), ("POST", "/revoke"), ("POST", "/reinstate"), ("POST", "/attempts:reset"), ("GET", "/export"),
    ],
)  # fmt: skip
def test_an_identity_that_is_not_there_is_not_found(service: Service, method: str, call: str) -> None:
    bodies: dict[str, Page] = {
        "/samples": {"files": [part(people()[0].photo)]},
        "/revoke": {"json": {"reason": "x"}},
        "/reinstate": {"json": {"reason": "x"}},
        "": {"json": {"full_name": "x"}} if method == "PATCH" else {},
    }
    problem(service.officer.request(method, f"/v1/identities/{NOBODY}{call}", **bodies.get(call, {})), 404, "not-found")


def test_times_are_half_open(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[0].photo)
    moment = datetime.fromisoformat(made["created_at"])

    def count(after: datetime, before: datetime) -> int:
        query = {"gallery": gallery, "created_after": after.isoformat(), "created_before": before.isoformat()}
        return len(service.officer.get("/v1/identities", params=query).json()["items"])

    step = timedelta(milliseconds=1)
    assert (count(moment, moment + step), count(moment - step, moment), count(moment, moment)) == (1, 0, 0)
