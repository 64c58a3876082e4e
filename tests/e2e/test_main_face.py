"""One rule chooses the face on every path, and every answer says which face was taken."""

import jwt
import pytest
from PIL import Image

from tests.e2e.builders import (
    Page,
    Service,
    again,
    enrol,
    identify,
    jpeg,
    new_gallery,
    opened,
    part,
    people,
    problem,
    side_by_side,
    verify,
)

Box = tuple[float, float, float, float]


def with_bystander(photo: bytes, bystander: bytes) -> bytes:
    """A photo that is not cropped around its subject: a smaller person is in the background, on the right."""
    wide = Image.new("RGB", (1000, 700), (150, 150, 150))
    wide.paste(opened(photo).resize((650, 650)), (100, 40))
    wide.paste(opened(bystander).resize((230, 230)), (760, 100))
    return jpeg(wide)


@pytest.fixture(scope="module")
def crowded() -> bytes:
    """The subject of all these tests, with a person in the background."""
    return with_bystander(people()[2].photo, people()[3].photo)


def lies_on_the_subject(box: list[float]) -> bool:
    x, y, width, height = box
    return x >= 100 and x + width <= 750 and y >= 40 and y + height <= 690


def test_every_answer_names_the_face_that_was_taken(service: Service, gallery: str, crowded: bytes) -> None:
    made = enrol(service, gallery, crowded)
    answers: list[Page] = [made["samples"][0]]
    answers.append(verify(service.app, again(crowded), identity_id=made["id"]).json())
    answers.append(identify(service.officer, crowded, gallery=gallery).json())
    photos = [part(crowded, "photo_a"), part(people()[2].selfie, "photo_b")]
    compared = service.app.post("/v1/comparisons", files=photos, data={"gallery": gallery}).json()
    assert compared["match"]
    answers.append(compared["photo_a"])
    measured = service.app.post("/v1/faces/quality", files=[part(crowded)], data={"gallery": gallery}).json()
    answers.append(measured)
    for answer in answers:
        assert answer["faces_found"] == 2
        assert lies_on_the_subject(answer["box"])
        assert answer["box"] == pytest.approx(answers[0]["box"], abs=2), "marked photos differ a little"
    assert compared["photo_b"]["faces_found"] == 1
    seen = service.app.post("/v1/faces/detect", files=[part(crowded)]).json()["faces"]
    assert answers[0]["box"] in [face["box"] for face in seen]


def test_a_verification_among_others_says_so_in_its_flags_and_its_assertion(
    service: Service, gallery: str, crowded: bytes
) -> None:
    person = people()[2]
    made = enrol(service, gallery, person.photo)

    def asked(photo: bytes) -> tuple[bool, bool]:
        page = verify(service.app, photo, identity_id=made["id"]).json()
        assert page["match"]
        claims = jwt.decode(page["assertion"], options={"verify_signature": False})
        assert claims["flags"] == page["flags"]
        return "other-faces" in page["flags"], page["faces_found"] > 1

    assert asked(again(crowded)) == (True, True)
    assert asked(again(person.selfie)) == (False, False)


def test_a_repetition_gets_the_same_face(service: Service, gallery: str, crowded: bytes) -> None:
    made = enrol(service, gallery, people()[2].photo)
    photo, headers = again(crowded), {"Idempotency-Key": made["id"]}
    one, other = (
        service.app.post(
            "/v1/verifications", files=[part(photo)], data={"identity_id": made["id"]}, headers=headers
        ).json()
        for _ in range(2)
    )
    assert one == other


def test_a_gallery_of_passport_photos_refuses_photos_with_other_people(service: Service, crowded: bytes) -> None:
    strict = new_gallery(service, faces="single")
    assert service.officer.get(f"/v1/galleries/{strict}").json()["policy"]["faces"] == "single"
    for path in ("/v1/identities", "/v1/identifications", "/v1/faces/quality"):
        problem(service.officer.post(path, files=[part(crowded)], data={"gallery": strict}), 422, "multiple-faces")
    enrol(service, strict, people()[2].photo)


def test_two_people_side_by_side_are_refused_on_every_path(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[2].photo)
    both = jpeg(side_by_side(people()[2].photo, people()[3].photo))
    problem(verify(service.app, both, identity_id=made["id"]), 422, "multiple-faces")
    for path in ("/v1/identities", "/v1/identifications", "/v1/faces/quality"):
        problem(service.officer.post(path, files=[part(both)], data={"gallery": gallery}), 422, "multiple-faces")
    photos = [part(people()[2].photo, "photo_a"), part(both, "photo_b")]
    refused = problem(
        service.app.post("/v1/comparisons", files=photos, data={"gallery": gallery}), 422, "multiple-faces"
    )
    assert refused["errors"][0]["field"] == "photo_b"


def test_the_former_name_of_the_policy_is_unknown(service: Service) -> None:
    answer = service.admin.patch("/v1/galleries/default", json={"policy": {"second_face_share": 0.5}})
    assert problem(answer, 422, "validation")["errors"][0]["field"] == "policy.second_face_share"
