"""1:N, comparison and detection over HTTP."""

import httpx
import pytest
from PIL import Image

from tests.e2e.builders import (
    QUALITY_FIELDS,
    Page,
    Service,
    again,
    base64_of,
    enrol,
    identify,
    jpeg,
    meadow,
    new_gallery,
    opened,
    part,
    people,
    portrayed,
    problem,
    side_by_side,
)


def candidates(answer: httpx.Response) -> list[Page]:
    """Who it may be."""
    assert answer.status_code == 200, answer.text
    found: list[Page] = answer.json()["candidates"]
    return found


def compared(caller: httpx.Client, one: bytes, other: bytes, **fields: str) -> httpx.Response:
    """Ask whether two photos show one person."""
    return caller.post("/v1/comparisons", files=[part(one, "photo_a"), part(other, "photo_b")], data=fields)


def test_everybody_is_found_at_rank_one_and_alone(service: Service, gallery: str) -> None:
    everybody = list(portrayed())
    ids = {person.name: enrol(service, gallery, person.photo)["id"] for person in everybody}
    for person in everybody:
        found = candidates(identify(service.app, person.selfie, gallery=gallery))
        assert [page["identity_id"] for page in found] == [ids[person.name]], person.name


def test_an_answer_names_candidates_threshold_and_what_it_saw(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[1].photo, external_ref="R1")
    enrol(service, gallery, people()[2].photo)
    answer = identify(service.app, people()[1].selfie, gallery=gallery, limit="3")
    page = answer.json()
    assert set(page) == {
        "candidates", "threshold", "gallery_size", "as_of_seq", "faces_found", "box", "decision_id",
    }  # fmt: skip
    assert (page["gallery_size"], page["as_of_seq"]) == (2, 2)
    (best,) = page["candidates"]
    assert best == {
        "identity_id": made["id"], "external_ref": "R1", "band": "strong", "score": None, "rank": 1, "fpir": None,
    }  # fmt: skip
    (full,) = candidates(identify(service.officer, people()[1].selfie, gallery=gallery))
    assert full["band"] == "strong"
    assert full["score"] >= page["threshold"]
    assert 0 <= full["fpir"] <= 1


def test_a12_searches_have_the_nonces_and_replay_rules_of_the_gallery(service: Service) -> None:
    gallery = new_gallery(service, require_nonce=True, near_copies="refuse")
    made, selfie = enrol(service, gallery, people()[1].photo), people()[1].selfie

    def nonce(**whom: str) -> str:
        return str(service.app.post("/v1/challenges", json={"gallery": gallery, **whom}).json()["nonce"])

    for wrong in ({}, {"nonce": "4711"}, {"nonce": nonce(identity_id=made["id"])}):
        problem(identify(service.app, selfie, gallery=gallery, **wrong), 409, "nonce-invalid")
    # Whoever the photo shows, nobody, or somebody by a copy of the enrolment.
    stranger = people()[2].photo
    assert candidates(identify(service.app, stranger, gallery=gallery, nonce=nonce())) == []
    for sent in (stranger, stranger + b"behind it", people()[1].photo, jpeg(opened(people()[1].photo), quality=80)):
        problem(identify(service.app, sent, gallery=gallery, nonce=nonce()), 409, "replayed-photo")
    assert candidates(identify(service.officer, selfie, gallery=gallery))


def test_a_stranger_is_nobody(service: Service, gallery: str) -> None:
    enrol(service, gallery, people()[1].photo)
    assert candidates(identify(service.app, people()[2].photo, gallery=gallery)) == []
    assert candidates(identify(service.app, people()[1].photo, gallery=new_gallery(service))) == []


def test_only_the_active_are_found(service: Service, gallery: str) -> None:
    person = people()[1]
    first = enrol(service, gallery, person.photo)
    assert enrol(service, gallery, person.selfie)["status"] == "suspected_duplicate"
    found = candidates(identify(service.app, person.selfie, gallery=gallery, limit="1"))
    assert [page["identity_id"] for page in found] == [first["id"]]
    service.officer.post(f"/v1/identities/{first['id']}/revoke", json={"reason": "lost"})
    assert candidates(identify(service.app, person.selfie, gallery=gallery)) == []


def test_whoever_was_answered_active_is_found_at_once_by_every_process(service: Service, gallery: str) -> None:
    for person in people()[:4]:
        made = enrol(service, gallery, person.photo)
        for _ in range(4):
            with httpx.Client(base_url=service.url, headers=service.app.headers, timeout=30) as anew:
                found = candidates(identify(anew, person.selfie, gallery=gallery))
            assert [page["identity_id"] for page in found] == [made["id"]]


def test_the_limit_cuts_after_the_best(service: Service) -> None:
    gallery = new_gallery(service, dedup_threshold=0.9999, identify_threshold=0.01)
    for person in people()[:4]:
        enrol(service, gallery, person.photo)
    everyone = candidates(identify(service.officer, people()[0].selfie, gallery=gallery))
    scores = [page["score"] for page in everyone]
    assert scores == sorted(scores, reverse=True)
    assert [page["rank"] for page in everyone] == list(range(1, len(everyone) + 1))
    cut = candidates(identify(service.officer, people()[0].selfie, gallery=gallery, limit="1"))
    assert [page["identity_id"] for page in cut] == [everyone[0]["identity_id"]]


@pytest.mark.parametrize("limit", ["0", "-1", "51", "x", "1e999", "NaN"])
def test_the_limit_is_one_to_fifty(service: Service, gallery: str, limit: str) -> None:
    answer = identify(service.app, people()[0].photo, gallery=gallery, limit=limit)
    assert problem(answer, 422, "validation")["errors"][0]["field"] == "limit"


def test_two_photos_are_compared_and_nothing_is_kept(service: Service, gallery: str) -> None:
    one, other = people()[1:3]
    same = compared(service.app, one.photo, one.selfie, gallery=gallery).json()
    assert set(same) == {"match", "score", "threshold", "fmr", "photo_a", "photo_b"}
    assert same["match"]
    assert same["score"] == round(same["score"], 2)
    different = compared(service.app, one.photo, other.photo, gallery=gallery).json()
    assert not different["match"]
    assert different["score"] < same["threshold"] <= same["score"]
    assert different["fmr"] > same["fmr"]
    assert service.app.get(f"/v1/galleries/{gallery}").json()["counts"] == {"identities": 0, "samples": 0}
    in_json = {"photo_a_base64": base64_of(one.photo), "photo_b_base64": base64_of(one.selfie), "gallery": gallery}
    assert service.app.post("/v1/comparisons", json=in_json).json() == same


def test_a_comparison_needs_both_photos(service: Service) -> None:
    for name in ("photo_a", "photo_b"):
        answer = service.app.post("/v1/comparisons", files=[part(people()[0].photo, name)])
        missing = problem(answer, 422, "validation")["errors"][0]["field"]
        assert {name, missing} == {"photo_a", "photo_b"}


def test_all_faces_of_a_photo_are_found_with_their_places(service: Service) -> None:
    picture = side_by_side(people()[2].photo, people()[3].photo)
    answer = service.app.post("/v1/faces/detect", files=[part(jpeg(picture))])
    page = answer.json()
    assert set(page) == {"faces", "width", "height"}
    assert (page["width"], page["height"]) == picture.size
    assert len(page["faces"]) == 2
    for face in page["faces"]:
        assert set(face) == {"box", "landmarks", "detection_score", "quality", "liveness"}
        assert set(face["quality"]) == QUALITY_FIELDS
        assert 0 <= face["detection_score"] <= 1
        x, y, width, height = face["box"]
        assert len(face["landmarks"]) == 5
        for across, down in face["landmarks"]:
            assert x <= across <= x + width
            assert y <= down <= y + height
        assert face["landmarks"][0][0] < face["landmarks"][1][0]
    halves = {face["box"][0] + face["box"][2] / 2 > picture.width / 2 for face in page["faces"]}
    assert halves == {True, False}


def test_places_are_told_in_pixels_of_the_upright_photo(service: Service) -> None:
    upright = opened(people()[2].photo)
    lying = jpeg(upright.transpose(Image.Transpose.ROTATE_90), orientation=6)

    def seen(photo: bytes) -> Page:
        page: Page = service.app.post("/v1/faces/detect", files=[part(photo)]).json()
        return page

    straight, turned = seen(jpeg(upright)), seen(lying)
    assert (turned["width"], turned["height"]) == (straight["width"], straight["height"]) == upright.size
    one, other = straight["faces"][0]["box"], turned["faces"][0]["box"]
    assert all(abs(a - b) < 0.05 * upright.width for a, b in zip(one, other, strict=True))


def test_a_photo_without_faces_has_none(service: Service) -> None:
    page = service.app.post("/v1/faces/detect", files=[part(jpeg(meadow()))]).json()
    assert page == {"faces": [], "width": 640, "height": 480}


def test_a_face_s_quality_is_told_with_advice(service: Service) -> None:
    strict, lenient = new_gallery(service, quality="strict"), new_gallery(service, quality="off")
    grainy = again(jpeg(opened(people()[1].photo).point(lambda value: value // 6)))

    def asked(gallery: str) -> Page:
        answer = service.app.post("/v1/faces/quality", files=[part(grainy)], data={"gallery": gallery})
        assert answer.status_code == 200, answer.text
        page: Page = answer.json()
        return page

    page = asked(strict)
    assert set(page["quality"]) == QUALITY_FIELDS
    assert not page["accepted"]
    assert {"under-exposure"} <= {advice["code"] for advice in page["advice"]}
    assert all(advice["message"] for advice in page["advice"])
    assert asked(lenient)["accepted"]
