"""A photo is turned upright by its main face, and only if the first look is not sure."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from app.domain.alignment import TEMPLATE
from app.domain.faces import Embedding, Face, Pixels
from app.domain.photo import Photo
from app.domain.policy import GalleryPolicy
from app.engine.looking import is_believable
from app.engine.port import Search
from app.engine.reading import as_stored, subject_of
from app.errors import FaceTooSmall, LowQuality, MultipleFaces, NoFace, PhotoRefused
from tests.fakes import FakeEngine

WIDTH, HEIGHT = 400, 300


@dataclass(frozen=True)
class Seen:
    """A face that the stub finds in one position: score, length, side. lies: whether its landmarks lie on their side."""

    score: float
    length: float
    side: float = 120
    lies: bool = False
    at: tuple[float, float] = (90, 80)


@dataclass
class Turning(FakeEngine):
    """Finds other faces in each position of a photo. A white corner shows the position."""

    seen: dict[int, list[Seen]]
    inverted: list[Seen] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)
    embedded: list[tuple[bytes, tuple[float, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def detect(self, pixels: Pixels, *, search: Search = "usual") -> list[Face]:
        self.searches.append(search)
        return [_face(one) for one in self._at(pixels)]

    def embed(self, pixels: Pixels, face: Face) -> tuple[Embedding, float]:
        self.embedded.append((pixels.tobytes(), face.box[:2]))
        length = next(one.length for one in self._at(pixels) if one.score == face.detection_score)
        return np.eye(1, 256, dtype=np.float32)[0], length

    def is_upright(self, face: Face, length: float | None) -> bool:
        return face.detection_score >= 0.75 if length is None else length >= 21

    def _at(self, pixels: Pixels) -> list[Seen]:
        return self.inverted if pixels.mean() > 127 else self.seen.get(_position(pixels), [])


def _position(pixels: Pixels) -> int:
    corners = [pixels[0, 0], pixels[-1, 0], pixels[-1, -1], pixels[0, -1]]
    return next(index for index, corner in enumerate(corners) if corner[0] == 255)


def _face(one: Seen) -> Face:
    landmarks = TEMPLATE * (one.side / 112) + one.at
    if one.lies:
        landmarks = landmarks[:, ::-1]
    return Face((*one.at, one.side, one.side), landmarks.astype(np.float32), one.score)


def photo() -> Photo:
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[0, 0] = 255
    return Photo(pixels=pixels, format="png", width=WIDTH, height=HEIGHT, reduction=1)


def position_of(engine: Turning) -> int:
    found = subject_of(engine, photo(), GalleryPolicy())
    assert found.photo.pixels.shape[:2] == (found.photo.height, found.photo.width)
    return _position(found.photo.pixels)


SURE, DOUBTFUL = Seen(0.8, 24), Seen(0.6, 15)


def test_a_sure_face_takes_one_search() -> None:
    engine = Turning({0: [SURE], 2: [Seen(0.95, 27)]})
    assert position_of(engine) == 0
    assert engine.searches == ["usual"]


@pytest.mark.parametrize("policy", [GalleryPolicy(faces="single"), GalleryPolicy(second_face_prominence=0.2)])
def test_a_gallery_that_refuses_small_second_faces_searches_thoroughly(policy: GalleryPolicy) -> None:
    engine = Turning({0: [DOUBTFUL], 2: [SURE]})
    subject_of(engine, photo(), policy)
    assert engine.searches == ["thorough", "quick", "quick", "quick", "thorough"]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_position_with_the_higher_score_and_the_longer_vector_is_taken(turns: int) -> None:
    engine = Turning({0: [DOUBTFUL], turns: [SURE]})
    assert position_of(engine) == turns
    assert engine.searches == ["usual", "quick", "quick", "quick", "usual"], (
        "and the turned photo is searched as fully as an upright one"
    )


@pytest.mark.parametrize("turned", [Seen(0.55, 24), Seen(0.7, 14)])
def test_a_doubtful_photo_stays_where_no_turn_is_better_by_both(turned: Seen) -> None:
    assert position_of(Turning({0: [DOUBTFUL], 2: [turned]})) == 0


def test_landmarks_of_a_lying_face_are_not_believable() -> None:
    lying = Seen(0.9, 24, lies=True)
    assert not is_believable(_face(lying))
    assert position_of(Turning({0: [lying], 1: [Seen(0.6, 22)]})) == 1


def test_an_upright_bystander_does_not_hide_a_lying_subject() -> None:
    bystander = Seen(0.85, 24, side=48, at=(10, 10))
    assert position_of(Turning({0: [bystander], 3: [Seen(0.8, 23, side=150)]})) == 3
    assert position_of(Turning({0: [bystander], 3: [Seen(0.8, 15, side=150)]})) == 0, (
        "the vector there is too short for a face"
    )
    assert position_of(Turning({0: [bystander], 3: [Seen(0.8, 23, side=60)]})) == 0, "it is not clearly larger"


def test_many_copies_of_one_face_are_refused_after_two_comparisons() -> None:
    copies = [Seen(0.8, 24, side=80, at=(100.0 + 10 * x, 60.0 + 10 * y)) for x in range(12) for y in range(12)]
    engine = Turning({0: [Seen(0.8, 24, side=100, at=(150, 100)), *copies]})
    with pytest.raises(MultipleFaces):
        subject_of(engine, photo(), GalleryPolicy())
    assert len(engine.embedded) <= 3


@pytest.mark.parametrize("turns", [0, 2])
def test_no_face_is_embedded_twice(turns: int) -> None:
    first = [DOUBTFUL, Seen(0.59, 15, side=80, at=(215, 90))]
    turned = [SURE, Seen(0.79, 24, side=80, at=(215, 90))]
    engine = Turning({0: first, 2: turned if turns else []}, inverted=first)
    assert position_of(engine) == turns
    assert len(engine.embedded) == len(set(engine.embedded)) == 4


def test_a_photo_whose_inverted_copy_is_the_better_face_is_refused_as_a_negative() -> None:
    engine = Turning({0: [DOUBTFUL]}, inverted=[SURE])
    with pytest.raises(LowQuality) as refused:
        subject_of(engine, photo(), GalleryPolicy())
    assert [advice.code for advice in refused.value.errors] == ["negative"]
    assert position_of(Turning({0: [DOUBTFUL]}, inverted=[Seen(0.5, 24)])) == 0
    assert position_of(Turning({0: [DOUBTFUL]}, inverted=[Seen(0.95, 16)])) == 0, "a score alone is not enough"
    assert position_of(Turning({0: [SURE]}, inverted=[Seen(0.9, 27)])) == 0, "a sure face is not looked at again"


def test_a_photo_without_a_face_is_searched_in_every_position() -> None:
    engine = Turning({})
    with pytest.raises(NoFace):
        subject_of(engine, photo(), GalleryPolicy())
    assert engine.searches == ["usual", "quick", "quick", "quick"]


@pytest.mark.parametrize(
    ("faces", "problem"),
    [
        ([Seen(0.9, 24, at=(20, 80)), Seen(0.91, 24, at=(240, 80))], MultipleFaces),
        ([Seen(0.9, 24, side=30)], FaceTooSmall),
    ],
)
def test_a_refused_photo_is_refused_by_what_its_upright_position_shows(
    faces: list[Seen], problem: type[PhotoRefused]
) -> None:
    with pytest.raises(problem):
        subject_of(Turning({0: faces, 2: [DOUBTFUL]}), photo(), GalleryPolicy())
    upside_down = [Seen(one.score - 0.25, 12, one.side, at=one.at) for one in faces[:1]]
    with pytest.raises(problem):
        subject_of(Turning({0: upside_down, 2: faces}), photo(), GalleryPolicy())


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_landmarks_of_a_turned_photo_are_known_on_the_photo_before(quarters: int) -> None:
    chance = np.random.default_rng(quarters)
    before = photo().pixels
    rows, columns = chance.permutation(HEIGHT)[:5], chance.permutation(WIDTH)[:5]
    for index, (row, column) in enumerate(zip(rows, columns, strict=True)):
        before[row, column] = 10 * (index + 1)
    after = np.rot90(before, quarters)[..., 0]
    found = np.array([np.argwhere(after == 10 * (index + 1))[0][::-1] + 0.5 for index in range(5)], np.float32)
    back = as_stored(found, quarters, (WIDTH, HEIGHT))
    assert np.allclose(back, np.column_stack([columns, rows]) + 0.5)
