"""On a stored photo the face that was enrolled is found again, and no other one."""

from dataclasses import dataclass

import numpy as np
import pytest

from app.domain.alignment import TEMPLATE
from app.domain.faces import Embedding, Face, Landmarks, Pixels
from app.engine.port import Search
from app.engine.reading import stored_face
from app.errors import NoFace
from tests.fakes import FakeEngine

WIDTH, HEIGHT = 1600, 1200
SUBJECT, BYSTANDER = (700.0, 500.0, 120.0), (860.0, 480.0, 130.0)
Place = tuple[float, float, float]


def landmarks(place: Place) -> Landmarks:
    left, top, side = place
    return (TEMPLATE * (side / 112) + (left, top)).astype(np.float32)


@dataclass
class Places(FakeEngine):
    """Finds faces at these places, if they have at least a share of the long side. `photo()` shows where a close-up lies."""

    places: list[Place]
    least_share: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()

    def detect(self, pixels: Pixels, *, search: Search = "usual") -> list[Face]:
        del search
        left, top = _origin(pixels)
        height, width = pixels.shape[:2]
        found = []
        for x, y, side in self.places:
            is_inside = left <= x and x + side <= left + width and top <= y and y + side <= top + height
            if is_inside and side >= self.least_share * max(height, width):
                place = x - left, y - top, side
                found.append(Face((*place, side), landmarks(place), 0.9))
        return sorted(found, key=lambda face: face.area, reverse=True)

    def embed(self, pixels: Pixels, face: Face) -> tuple[Embedding, float]:
        del pixels, face
        return np.eye(1, 256, dtype=np.float32)[0], 20.0


def photo() -> Pixels:
    """Each pixel says where it is."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.dstack([columns % 256, rows % 256, columns // 256 * 16 + rows // 256]).astype(np.uint8)


def _origin(pixels: Pixels) -> tuple[int, int]:
    low_x, low_y, high = (int(value) for value in pixels[0, 0])
    return high // 16 * 256 + low_x, high % 16 * 256 + low_y


def moved(place: Place, share: float) -> Place:
    """The place as another detector sees it: the landmarks lie off by this share of the face's side."""
    left, top, side = place
    return left + share * side, top, side


def test_the_face_nearest_to_the_enrolled_landmarks_is_taken() -> None:
    other_detector = moved(SUBJECT, 0.1)
    stored = stored_face(Places([BYSTANDER, other_detector]), photo(), landmarks(SUBJECT))
    assert np.array_equal(stored.landmarks, landmarks(other_detector))
    assert stored.face.box[:2] == other_detector[:2]


@pytest.mark.parametrize(
    "other",
    [
        BYSTANDER,
        moved(SUBJECT, 0.35),
        (SUBJECT[0] + 50, SUBJECT[1] + 50, 20.0),  # a picture on the subject's face
        (SUBJECT[0] - 120, SUBJECT[1] - 120, 360.0),  # a large face behind
    ],
)
def test_a_bystander_does_not_replace_a_subject_who_is_not_found(other: Place) -> None:
    with pytest.raises(NoFace):
        stored_face(Places([other]), photo(), landmarks(SUBJECT))


@pytest.mark.parametrize("place", [SUBJECT, (4.0, 6.0, 60.0), (1530.0, 1120.0, 64.0)])
def test_a_subject_who_is_small_for_the_detector_is_found_in_a_close_up(place: Place) -> None:
    engine = Places([BYSTANDER, place], least_share=0.15)
    stored = stored_face(engine, photo(), landmarks(place))
    assert stored.pixels.shape == (HEIGHT, WIDTH, 3)
    assert np.allclose(stored.landmarks, landmarks(place), atol=0.01)
    assert stored.face.box == pytest.approx((*place, place[2]))


def test_the_largest_face_is_taken_where_the_landmarks_are_not_known() -> None:
    stored = stored_face(Places([SUBJECT, BYSTANDER]), photo())
    assert np.array_equal(stored.landmarks, landmarks(BYSTANDER))
