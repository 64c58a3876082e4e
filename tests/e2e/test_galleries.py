"""Galleries over HTTP: populations that are kept apart, with their policies."""

import pytest

from tests.e2e.builders import (
    Service,
    app_with,
    enrol,
    identify,
    new_gallery,
    people,
    problem,
    unique,
    user_with,
    verify,
)

POLICY_FIELDS = {
    "verify_fmr", "identify_fpir", "dedup_fpir", "verify_threshold", "identify_threshold", "dedup_threshold", "liveness",
    "quality", "faces", "second_face_prominence", "recall_target", "require_nonce", "near_copies", "second_review",
    "retention_days",
}  # fmt: skip


def test_the_gallery_default_is_there_from_the_start(service: Service) -> None:
    page = service.app.get("/v1/galleries/default").json()
    assert set(page) == {"id", "name", "model", "policy", "pending", "thresholds", "counts", "index"}
    assert set(page["model"]) == {"pack", "dimension", "contract", "licence"}
    assert page["model"]["contract"].startswith("sha256:")
    assert set(page["policy"]) == POLICY_FIELDS
    assert set(page["thresholds"]) == {"verify", "identify", "dedup", "source"}
    assert page["thresholds"]["source"] in ("calibrated", "model_card", "manual")
    assert set(page["counts"]) == {"identities", "samples"}
    assert set(page["index"]) == {"kind", "generation", "vectors", "tail", "recall"}
    assert page["index"]["kind"] in ("exact", "faiss", "milvus")
    has_liveness = service.anonymous.get("/ready").json()["checks"]["model"]["liveness"]
    assert page["policy"]["liveness"] == ("observe" if has_liveness else "off")
    problem(service.admin.delete("/v1/galleries/default"), 409, "conflict")


def test_a_gallery_is_made_with_a_location_and_is_listed(service: Service) -> None:
    name = unique("made")
    pack = service.admin.get("/v1/galleries/default").json()["model"]["pack"]
    answer = service.admin.post("/v1/galleries", json={"name": name, "pack": pack, "policy": {"quality": "strict"}})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/galleries/{name}"
    page = answer.json()
    assert (page["name"], page["policy"]["quality"], page["counts"]) == (
        name,
        "strict",
        {"identities": 0, "samples": 0},
    )
    assert service.officer.get(answer.headers["location"]).json() == page
    listed = service.officer.get("/v1/galleries", params={"limit": 1}).json()
    assert [gallery["name"] for gallery in listed["items"]] == [name]
    problem(service.admin.post("/v1/galleries", json={"name": name}), 409, "conflict")


@pytest.mark.parametrize("name", ["", "Ann", "-a", "a b", "a/b", "a" * 64, "é", "a\n", "../a", "a.b", "$a"])
def test_a_name_is_short_and_plain(service: Service, name: str) -> None:
    assert problem(service.admin.post("/v1/galleries", json={"name": name}), 422, "validation")["errors"]


@pytest.mark.parametrize(
    "policy",
    [
        {"verify_fmr": 0},
        {"verify_fmr": 1},
        {"identify_fpir": -1},
        {"verify_threshold": -1},
        {"verify_threshold": 1.1},
        {"liveness": "maybe"},
        {"quality": "high"},
        {"retention_days": 0},
        {"second_face_prominence": 0},
        {"second_face_share": 0.25},
        {"faces": "several"},
        {"recall_target": 2},
        {"colour": "blue"},
        {"verify_fmr": "often"},
    ],
)
def test_a_policy_that_does_not_fit_is_refused_by_field(service: Service, policy: dict[str, object]) -> None:
    for answer in (
        service.admin.post("/v1/galleries", json={"name": unique("bad"), "policy": policy}),
        service.admin.patch("/v1/galleries/default", json={"policy": policy}),
    ):
        errors = problem(answer, 422, "validation")["errors"]
        assert {error["field"] for error in errors} == {f"policy.{name}" for name in policy}


def test_a_policy_is_merged_and_a_threshold_by_hand_wins_over_its_rate(service: Service, gallery: str) -> None:
    path = f"/v1/galleries/{gallery}"
    before = service.admin.get(path).json()
    changed = service.admin.patch(path, json={"policy": {"verify_threshold": 0.77, "quality": "strict"}})
    assert changed.status_code == 200, changed.text
    page = changed.json()
    assert page["policy"] == before["policy"] | {"verify_threshold": 0.77, "quality": "strict"}
    assert page["thresholds"]["verify"] == 0.77
    assert page["thresholds"]["identify"] == before["thresholds"]["identify"]
    back = service.admin.patch(path, json={"policy": {"verify_threshold": None, "quality": None}}).json()
    assert (back["policy"], back["thresholds"]) == (before["policy"], before["thresholds"])
    stricter = service.admin.patch(path, json={"policy": {"verify_fmr": before["policy"]["verify_fmr"] / 100}}).json()
    assert stricter["thresholds"]["verify"] > before["thresholds"]["verify"]
    problem(service.admin.patch(path, json={"name": "other"}), 422, "validation")


def test_a_shorter_retention_waits_for_a_week_and_an_officer(service: Service, gallery: str) -> None:
    path = f"/v1/galleries/{gallery}"
    enrol(service, gallery, people()[0].photo)
    asked = service.admin.patch(path, json={"policy": {"retention_days": 1}})
    assert asked.status_code == 200, asked.text
    page = asked.json()
    assert page["policy"]["retention_days"] is None
    assert (page["pending"]["value"], page["pending"]["people"], page["pending"]["agreed_by"]) == (1, 1, None)
    assert service.officer.get(path).json()["pending"] == page["pending"]
    problem(service.admin.post(f"{path}/pending/agree"), 403, "forbidden")
    agreed = service.officer.post(f"{path}/pending/agree")
    assert agreed.status_code == 200, agreed.text
    assert agreed.json()["pending"]["agreed_by"] == service.officer.get("/v1/auth/me").json()["id"]
    cancelled = service.officer.post(f"{path}/pending/cancel")
    assert (cancelled.status_code, cancelled.json()["pending"]) == (200, None)
    problem(service.officer.post(f"{path}/pending/cancel"), 409, "conflict")


def test_only_an_empty_gallery_can_be_removed(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[0].photo)
    path = f"/v1/galleries/{gallery}"
    problem(service.admin.delete(path), 409, "conflict")
    service.officer.delete(f"/v1/identities/{made['id']}", params={"reason": "asked for"})
    assert service.admin.delete(path).status_code == 204
    problem(service.admin.get(path), 404, "not-found")
    problem(service.admin.delete(path), 404, "not-found")


def test_a_gallery_removed_and_made_again_knows_nobody(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    service.officer.delete(f"/v1/identities/{made['id']}", params={"reason": "asked for"})
    assert service.admin.delete(f"/v1/galleries/{gallery}").status_code == 204
    assert service.admin.post("/v1/galleries", json={"name": gallery}).status_code == 201
    assert identify(service.app, person.selfie, gallery=gallery).json()["candidates"] == []
    assert enrol(service, gallery, person.selfie)["status"] == "active"


def test_galleries_are_kept_apart(service: Service, gallery: str) -> None:
    other, person = new_gallery(service), people()[1]
    made = enrol(service, gallery, person.photo, external_ref="R1")
    assert enrol(service, other, person.selfie, external_ref="R1")["status"] == "active"
    found = identify(service.app, person.selfie, gallery=gallery).json()["candidates"]
    assert [page["identity_id"] for page in found] == [made["id"]]


def test_a_caller_sees_only_the_galleries_that_are_theirs(service: Service, gallery: str) -> None:
    foreign, person = new_gallery(service), people()[1]
    theirs = enrol(service, foreign, person.photo, external_ref="R1")
    ours = enrol(service, gallery, person.photo, external_ref="R1")
    with user_with(service, "officer", galleries=[gallery]) as officer:
        assert [page["name"] for page in officer.get("/v1/galleries").json()["items"]] == [gallery]
        assert [page["id"] for page in officer.get("/v1/identities").json()["items"]] == [ours["id"]]
        problem(officer.get(f"/v1/galleries/{foreign}"), 404, "not-found")
        problem(officer.get("/v1/identities", params={"gallery": foreign}), 404, "not-found")
        unknown = problem(officer.get(f"/v1/identities/{theirs['id'][:-1]}z"), 404, "not-found")
        hidden = problem(officer.get(f"/v1/identities/{theirs['id']}"), 404, "not-found")
        assert {k: hidden[k] for k in ("title", "detail", "errors")} == {
            k: unknown[k] for k in ("title", "detail", "errors")
        }
    with app_with(service, galleries=[gallery]) as app:
        problem(identify(app, person.selfie, gallery=foreign), 404, "not-found")
        problem(verify(app, person.selfie, identity_id=theirs["id"]), 404, "not-found")
        problem(verify(app, person.selfie, external_ref="R1", gallery=foreign), 404, "not-found")
        assert verify(app, person.selfie, identity_id=ours["id"]).json()["match"]
    with app_with(service, galleries=[]) as app:
        assert app.get("/v1/galleries").json()["items"] == []
        problem(identify(app, person.selfie, gallery=gallery), 404, "not-found")


def test_a_gallery_is_made_once_by_a_repeated_request(service: Service) -> None:
    body, headers = {"name": unique("once")}, {"Idempotency-Key": unique("key")}
    first = service.admin.post("/v1/galleries", json=body, headers=headers)
    second = service.admin.post("/v1/galleries", json=body, headers=headers)
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json() == first.json()


def test_a_pack_that_does_not_run_is_refused(service: Service) -> None:
    answer = service.admin.post("/v1/galleries", json={"name": unique("pack"), "pack": "another"})
    assert problem(answer, 422, "validation")["errors"][0]["field"] == "pack"


@pytest.mark.parametrize("protection", [{"require_nonce": True}, {"second_review": True}, {"near_copies": "refuse"}])
def test_a_gallery_s_protections_are_switched_on(service: Service, gallery: str, protection: dict[str, object]) -> None:
    answer = service.admin.patch(f"/v1/galleries/{gallery}", json={"policy": protection})
    assert answer.status_code == 200, answer.text
    assert protection.items() <= service.admin.get(f"/v1/galleries/{gallery}").json()["policy"].items()
