"""Which face of a photo is meant. One rule for enrolment, probes, comparison, quality and measurements.

The subject is the most prominent face: large, near the centre, surely a face. A photo with a second face that is nearly as
prominent is refused: a person could not say either who is meant. Everything here is measured on the photo as it was sent, so
the answer does not depend on how the photo was reduced. The figures come from scripts/bystanders.py; see
docs/adr/0040-the-subject-of-a-photo.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from app.domain.alignment import similarity_to_template
from app.domain.faces import Box, PhotoFace, rounded
from app.errors import Advice, FaceCropped, FaceTooSmall, MultipleFaces, NoFace, Problem

Faces = Literal["prominent", "single"]
#: Whether two faces of one photo show the same person. It is asked only where the answer decides.
SamePerson = Callable[[PhotoFace, PhotoFace], bool]

#: Shorter side of a face's box, in pixels of the photo as it was sent. At 40 pixels the second photos of 123 people match as
#: at full size; at 24 one in eleven falls under the threshold of de-duplication, at 16 four in ten (docs/models.md).
MINIMUM_FACE_SIDE = 40.0
#: Share of the face, eyebrows to chin, that must lie inside the photo. The tightest crop among 431 portraits shows 98%, two
#: photos with a third of the face cut off 76 and 82%. Measured on the landmarks: detectors draw boxes around what they see.
MINIMUM_VISIBLE_SHARE = 0.9
#: Eyebrows to chin and cheek to cheek on the aligned crop: left, right, top, bottom.
_FACE_ON_CROP = (20.0, 92.0, 30.0, 108.0)
_GRID = 24

#: A face's weight is (1 - pull * distance) squared. The distance is that of its centre from the photo's centre, in photo sides.
#: The second figure is the least value in the brackets. Measured on 7,701 photos of Labeled Faces in the Wild.
_CENTRE_PULL, _LEAST_WEIGHT = 1.5, 0.05
#: The centre says who is meant if a person framed the face: the side of the face, in short sides of the photo. Below the first
#: figure the photo shows a scene, and the centre says nothing. Portraits of 425 of 431 people lie above the second figure,
#: 24 group photos at or below it.
_SCENE, _PORTRAIT = 0.12, 0.27
#: A detection score, as a share of the photo's best one. Below the first figure it is hardly a face, from the second one on a
#: face for sure: false detections lie at 0.50 to 0.56, where the real face has 0.72 to 0.82.
_DOUBTFUL, _SURE = 0.6, 0.8
_LEAST_CONFIDENCE = 0.2
#: With `faces: single`, a second face of this share of the subject's area refuses: a fifth of its length.
_TINY = 0.04
_QUARTER = 0.25
#: Two faces of one person: the larger one is meant where the other has at most this share of its area (0.85 of its length).
#: Twins side by side, and two prints of one photo, stay undecided.
_CLEARLY_SMALLER = 0.72
#: A card has one or two more portraits of its holder. Each comparison costs an embedding.
_MOST_PORTRAITS = 2


class SubjectRule(Protocol):
    """What a gallery's policy says of other faces on a photo."""

    @property
    def faces(self) -> Faces:
        """`prominent`: there may be other faces. `single`: there may be no other face."""

    @property
    def second_face_prominence(self) -> float:
        """The share of the subject's prominence from which on a second face refuses the photo."""


class FoundFace(BaseModel):
    """What answers and samples say of the face that was taken.

    faces_found: how many faces the photo shows, the taken one included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    faces_found: int
    box: Box


@dataclass(frozen=True, slots=True)
class MainFace:
    """The face that is meant, on the photo as it was sent. faces_found: how many faces the photo shows, this one included."""

    face: PhotoFace
    faces_found: int

    @property
    def report(self) -> FoundFace:
        """What answers say of it."""
        return FoundFace(faces_found=self.faces_found, box=rounded(self.face.box))


@dataclass(frozen=True, slots=True)
class _Ranked:
    face: PhotoFace
    area: float
    prominence: float


def find_main_face(
    faces: Sequence[PhotoFace], size: tuple[int, int], rule: SubjectRule, is_same_person: SamePerson | None = None
) -> MainFace:
    """The face that is meant.

    size: width and height of the upright photo as it was sent. is_same_person: lets a second portrait of the subject pass, as
    identity cards have one; without it every second face is another person's. Raises NoFace, MultipleFaces, FaceTooSmall,
    FaceCropped.
    """
    ranked = _ranked(faces, size)
    if not ranked:
        raise _refusal(NoFace, "no-face", "No face was found.", "Face the camera, with your whole face in the picture.")
    found = sum(_is_likely(one.face, faces) for one in ranked)
    face = _alone(ranked) if rule.faces == "single" else _prominent(ranked, rule.second_face_prominence, is_same_person)
    _require_usable(face, size)
    return MainFace(face, max(found, 1))


def refuses_small_faces(rule: SubjectRule) -> bool:
    """Whether a face of less than a quarter of the subject's area may refuse a photo."""
    return rule.faces == "single" or rule.second_face_prominence < _QUARTER


def prominences(faces: Sequence[PhotoFace], size: tuple[int, int]) -> list[tuple[PhotoFace, float]]:
    """The faces that lie inside the photo, the most prominent first, each with its share of the first one's prominence."""
    ranked = _ranked(faces, size)
    return [(one.face, one.prominence / ranked[0].prominence) for one in ranked]


def _ranked(faces: Sequence[PhotoFace], size: tuple[int, int]) -> list[_Ranked]:
    areas = [(face, _visible_area(face, size)) for face in faces]
    areas = [(face, area) for face, area in areas if area > 0]
    if not areas:
        return []
    best = max(face.detection_score for face, _ in areas)

    def by_prominence(pull: float) -> list[_Ranked]:
        rows = [
            _Ranked(face, area, area * _weight(face, size, pull) * _confidence(face.detection_score, best))
            for face, area in areas
        ]
        # The order of equally prominent faces does not depend on the detector.
        return sorted(rows, key=lambda row: (-row.prominence, row.face.box))

    foremost = by_prominence(_CENTRE_PULL)[0].face
    framed = _ramp(min(foremost.box[2:]) / min(size), _SCENE, _PORTRAIT)
    return by_prominence(_CENTRE_PULL * framed)


def _prominent(ranked: Sequence[_Ranked], share: float, is_same_person: SamePerson | None) -> PhotoFace:
    """The first face, unless another one is nearly as prominent. Raises MultipleFaces."""
    first, *others = ranked
    portraits = 0
    while others:
        second = max(others, key=lambda row: row.prominence)
        if second.prominence < share * first.prominence:
            break
        larger, smaller = (first, second) if first.area >= second.area else (second, first)
        is_second_portrait = (
            is_same_person is not None
            and portraits < _MOST_PORTRAITS
            and smaller.area <= _CLEARLY_SMALLER * larger.area
            and is_same_person(larger.face, smaller.face)
        )
        if not is_second_portrait:
            detail = (
                f"{len(ranked)} faces were found; the second is {second.prominence / first.prominence:.0%} as prominent "
                "as the first."
            )
            raise _several(detail)
        portraits += 1
        others = [row for row in others if row is not second]
        first = larger
    return first.face


def _alone(ranked: Sequence[_Ranked]) -> PhotoFace:
    """The first face, unless another one is more than tiny. Raises MultipleFaces."""
    first, *others = ranked
    largest = max((row.area for row in others), default=0.0)
    if largest >= _TINY * first.area:
        raise _several(f"{len(ranked)} faces were found; this gallery takes photos of one person alone.")
    return first.face


def _several(detail: str) -> Problem:
    return _refusal(MultipleFaces, "multiple-faces", detail, "Take the photo alone, with nobody beside or behind you.")


def _require_usable(face: PhotoFace, size: tuple[int, int]) -> None:
    side = min(face.box[2:])
    if side < MINIMUM_FACE_SIDE:
        # Rounded down, so that the message never says that a refused face is large enough.
        detail = f"The face is {math.floor(side)} pixels wide; {MINIMUM_FACE_SIDE:.0f} are needed."
        raise _refusal(FaceTooSmall, "face-too-small", detail, "Come closer to the camera, or send a larger photo.")
    share = _visible_share(face, size)
    if share < MINIMUM_VISIBLE_SHARE:
        detail = f"Only {share:.0%} of the face lies inside the photo."
        raise _refusal(FaceCropped, "face-cropped", detail, "Move back until your whole face is in the picture.")


def _visible_area(face: PhotoFace, size: tuple[int, int]) -> float:
    x, y, width, height = face.box
    across = min(x + width, float(size[0])) - max(x, 0.0)
    down = min(y + height, float(size[1])) - max(y, 0.0)
    return max(0.0, across) * max(0.0, down)


def _weight(face: PhotoFace, size: tuple[int, int], pull: float) -> float:
    x, y, width, height = face.box
    distance = math.hypot((x + width / 2) / size[0] - 0.5, (y + height / 2) / size[1] - 0.5)
    return max(_LEAST_WEIGHT, 1 - pull * distance) ** 2


def _confidence(score: float, best: float) -> float:
    return max(_LEAST_CONFIDENCE, _ramp(score, _DOUBTFUL * best, _SURE * best))


def _is_likely(face: PhotoFace, faces: Sequence[PhotoFace]) -> bool:
    return face.detection_score >= _DOUBTFUL * max(one.detection_score for one in faces)


def _visible_share(face: PhotoFace, size: tuple[int, int]) -> float:
    """The share of the face's surface, eyebrows to chin, that lies inside the photo."""
    try:
        onto_crop = similarity_to_template(face.landmarks)
    except ValueError:
        return 0.0
    left, right, top, bottom = _FACE_ON_CROP
    across, down = np.meshgrid(np.linspace(left, right, _GRID), np.linspace(top, bottom, _GRID))
    on_crop = np.stack([across.ravel(), down.ravel()]) - onto_crop[:, 2:]
    x, y = np.linalg.solve(onto_crop[:, :2], on_crop)
    return float(((x >= 0) & (x <= size[0]) & (y >= 0) & (y <= size[1])).mean())


def _ramp(value: float, zero: float, one: float) -> float:
    return min(1.0, max(0.0, (value - zero) / (one - zero))) if one > zero else float(value >= one)


def _refusal(problem: type[Problem], code: str, detail: str, advice: str) -> Problem:
    return problem(detail, errors=(Advice("photo", code, advice),))
