"""The service compares the photo that people see: upright, in its ordinary colours, and without a hidden face."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from app.domain.alignment import aligned_crop
from tests.e2e.builders import Page, Service, encoded, enrol, identity, jpeg, opened, part, people, problem
from tests.support.disguises import disguised, enlarged

TURNS = {
    "on its left side": Image.Transpose.ROTATE_90,
    "upside down": Image.Transpose.ROTATE_180,
    "on its right side": Image.Transpose.ROTATE_270,
    "flipped": Image.Transpose.FLIP_TOP_BOTTOM,
}


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS.keys())
def test_turning_the_photo_does_not_enrol_a_person_twice(service: Service, gallery: str, turn: Image.Transpose) -> None:
    for person in people()[2:4]:
        first = enrol(service, gallery, person.photo)
        turned = jpeg(opened(person.photo).transpose(turn))
        second = enrol(service, gallery, turned)
        assert identity(service, second["id"])["status"] == "suspected_duplicate"
        photos = [part(person.photo, "photo_a"), part(turned, "photo_b")]
        assert service.app.post("/v1/comparisons", files=photos, data={"gallery": gallery}).json()["match"]
        stored = [stored_photo(service, one) for one in (first, second)]
        assert stored[0].size == stored[1].size
        if turn != Image.Transpose.FLIP_TOP_BOTTOM:
            difference = np.abs(np.asarray(stored[0], int) - np.asarray(stored[1], int))
            assert difference.mean() < 4, "it is stored upright"


def test_upside_down_strangers_do_not_match(service: Service, gallery: str) -> None:
    turned = [jpeg(opened(one.photo).transpose(Image.Transpose.ROTATE_180)) for one in people()[2:4]]
    photos = [part(turned[0], "photo_a"), part(turned[1], "photo_b")]
    assert not service.app.post("/v1/comparisons", files=photos, data={"gallery": gallery}).json()["match"]


def test_detection_answers_in_pixels_of_the_upright_photo(service: Service) -> None:
    picture = opened(people()[2].photo).crop((0, 0, 400, 440))
    upright = service.app.post("/v1/faces/detect", files=[part(encoded(picture, "PNG"))]).json()
    assert (upright["width"], upright["height"]) == picture.size
    for turn in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270):
        turned = encoded(picture.transpose(turn), "PNG")
        assert service.app.post("/v1/faces/detect", files=[part(turned)]).json() == upright


def test_a_negative_is_refused_by_name(service: Service, gallery: str) -> None:
    negative = jpeg(ImageOps.invert(opened(people()[2].photo)))
    answer = service.officer.post("/v1/identities", files=[part(negative)], data={"gallery": gallery})
    # dlib finds no face there.
    assert answer.status_code == 422
    assert {error["code"] for error in answer.json()["errors"]} <= {"negative", "no-face"}


def test_a_face_hidden_between_the_pixels_is_refused(service: Service, gallery: str) -> None:
    person, stranger = people()[2], people()[3]
    shown = enlarged(np.asarray(opened(person.photo)), 2400)
    on_shown, on_other = (landmarks(service, one) for one in (shown, np.asarray(opened(stranger.photo))))
    hidden = disguised(shown, aligned_crop(np.asarray(opened(stranger.photo)), on_other), lambda _: on_shown)
    for photo in (encoded(Image.fromarray(hidden), "PNG"), jpeg(Image.fromarray(hidden), quality=95)):
        answer = service.officer.post("/v1/identities", files=[part(photo)], data={"gallery": gallery})
        found = problem(answer, 422, "low-quality")
        assert [error["code"] for error in found["errors"]] == ["hidden-detail"]


def landmarks(service: Service, pixels: np.ndarray) -> np.ndarray:
    photo = encoded(Image.fromarray(pixels), "PNG")
    (face,) = service.app.post("/v1/faces/detect", files=[part(photo)]).json()["faces"]
    return np.array(face["landmarks"], np.float32)


def stored_photo(service: Service, made: Page) -> Image.Image:
    answer = service.officer.get(f"/v1/identities/{made['id']}/samples/{made['samples'][0]['id']}/photo")
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content)).convert("RGB")
