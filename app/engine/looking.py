"""Find the face that a photo is about, and turn the photo so that this face is upright.

Cameras and editors also save photos sideways or upside down. Detectors find faces there too, and draw upright landmarks on
them. The recogniser then gives vectors that fit nobody, or every other upside-down face. So if the first search is not sure,
turned copies are searched as well. The upright copy has the higher detection score and the longer vector: figures in
docs/adr/0039.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from app.domain.alignment import aligned_crop
from app.domain.alteration import Signs, signs
from app.domain.faces import Box, Embedding, Face
from app.domain.photo import Photo
from app.domain.subject import MainFace
from app.engine.port import FaceEngine, Search
from app.errors import Advice, LowQuality, PhotoRefused


@dataclass(frozen=True, slots=True)
class Searched:
    """A photo as it came, turned or inverted. The embedding of each of its faces is computed once."""

    engine: FaceEngine
    photo: Photo
    _known: dict[tuple[Box, bytes], tuple[Embedding, float]] = field(default_factory=dict, init=False)

    def embed(self, face: Face) -> tuple[Embedding, float]:
        """The face's embedding and the raw vector's length. Raises LowQuality if the face has no features."""
        key = face.box, face.landmarks.tobytes()
        if key not in self._known:
            self._known[key] = self.engine.embed(self.photo.pixels, face)
        return self._known[key]


#: Chooses the face that is meant. Raises NoFace, MultipleFaces, FaceTooSmall, FaceCropped.
Choose = Callable[[Searched, list[Face]], MainFace]

#: Quarter turns, counter-clockwise. Upside down comes first: if it is right, it is mostly the only one that shows a face.
_TURNS = (2, 1, 3)
#: If the eye line is turned by more than this, landmarks of an upright search are not trusted (SCRFD on sideways photos).
PLAUSIBLE_ROLL_DEGREES = 60.0
#: A face below this share of the long side may be an upright bystander, on a photo whose subject lies sideways.
_SMALL = 0.2
#: The area of a sideways subject is at least this multiple of the area of the upright bystander.
_LARGER = 2.0
#: A detection score that is higher by this much decides alone, without the lengths of the vectors.
_FAR_SURER = 0.25
#: The inverted copy of a negative has a vector that is longer by a third (median).
_CLEARLY_LONGER = 1.15


@dataclass
class Look:
    """The result of one search, on the photo as it came or turned.

    searched: turned counter-clockwise by `quarters`. main: the face that is meant, else `problem`.
    """

    searched: Searched
    faces: list[Face]
    main: MainFace | None
    problem: PhotoRefused | None
    quarters: int

    @property
    def photo(self) -> Photo:
        """The photo in which the faces were found."""
        return self.searched.photo

    @cached_property
    def face(self) -> Face | None:
        """The face that is meant, in the pixels that were searched."""
        return None if self.main is None else self.photo.in_pixels(self.main.face)

    @cached_property
    def vector(self) -> tuple[Embedding, float] | None:
        """The face's embedding and the raw vector's length; None without a face, or if the face gives no features."""
        if self.face is None:
            return None
        try:
            return self.searched.embed(self.face)
        except LowQuality as problem:
            self.main, self.problem, self.face = None, problem.with_traceback(None), None
            return None

    @cached_property
    def signs(self) -> Signs | None:
        """What is unusual about the face; None without one."""
        if self.face is None:
            return None
        try:
            return signs(aligned_crop(self.photo.pixels, self.face.landmarks))
        except ValueError:  # the landmarks fall into one point
            return None

    @property
    def score(self) -> float:
        """The detection score of the face that is meant; without one, that of the surest upright face."""
        if self.face is not None:
            return self.face.detection_score if is_believable(self.face) else 0.0
        return max((face.detection_score for face in self.faces if is_believable(face)), default=0.0)

    @property
    def length(self) -> float:
        """The length of the raw vector; 0 if there is none."""
        return 0.0 if self.vector is None else self.vector[1]

    @property
    def _is_long(self) -> bool:
        """Whether the vector reaches the median length of ordinary photos. No negative does (551 photos)."""
        usual = self.searched.engine.card.usual_length
        return usual is not None and self.length >= usual[1]

    @property
    def is_sure(self) -> bool:
        """Whether the face is surely upright; for a refused photo, whether any of its faces is."""
        if self.face is not None:
            is_upright = is_believable(self.face) and self.searched.engine.is_upright(self.face, self.length or None)
            return is_upright and self.signs is not None and (not self.signs.are_eyes_light or self._is_long)
        return any(is_believable(face) and self.searched.engine.is_upright(face, None) for face in self.faces)


def look(engine: FaceEngine, photo: Photo, choose: Choose, search: Search = "usual") -> Look:
    """Search the photo, turned so that the face that is meant is upright. Blocking.

    A negative is refused. Its inverted copy has the higher score, and light eyes or a much longer vector confirm it.
    """
    seen = _upright(engine, photo, choose, search)
    if seen.face is None or seen.is_sure:
        return seen
    inverted = _look(Searched(engine, seen.photo.inverted()), choose, "usual")
    if _stands_better(inverted, seen) and _shows_a_negative(inverted, seen):
        return replace(seen, main=None, problem=_negative())
    return seen


def _upright(engine: FaceEngine, photo: Photo, choose: Choose, search: Search) -> Look:
    first = _look(Searched(engine, photo), choose, search)
    is_small = first.face is not None and max(first.face.box[2:]) < _SMALL * max(photo.pixels.shape[:2])
    if first.is_sure and not is_small:
        return first
    turned = [_look(Searched(engine, photo.turned(turns)), choose, "quick", turns) for turns in _TURNS]
    best = max(turned, key=lambda one: one.score)
    if best.score == 0:
        return first
    wins = _is_the_larger_subject(best, first) if first.is_sure else _stands_better(best, first)
    # Searched as fully as a photo that came upright, so that both give the same template.
    return _look(best.searched, choose, search, best.quarters) if wins else first


def is_believable(face: Face) -> bool:
    """Whether the eyes are above the mouth, and the eye line is turned by PLAUSIBLE_ROLL_DEGREES at most."""
    eyes = face.landmarks[1] - face.landmarks[0]
    down = face.landmarks[3:].mean(axis=0) - face.landmarks[:2].mean(axis=0)
    roll = abs(float(np.degrees(np.arctan2(eyes[1], eyes[0]))))
    return roll <= PLAUSIBLE_ROLL_DEGREES and float(eyes[0] * down[1] - eyes[1] * down[0]) > 0


def _look(searched: Searched, choose: Choose, search: Search, quarters: int = 0) -> Look:
    faces = searched.engine.detect(searched.photo.pixels, search=search)
    try:
        return Look(searched, faces, choose(searched, faces), None, quarters)
    except PhotoRefused as problem:
        # Without its traceback: the frames there refer to this look, and would keep the pixels until garbage collection.
        return Look(searched, faces, None, problem.with_traceback(None), quarters)


def _stands_better(turned: Look, first: Look) -> bool:
    """Whether a turned copy is the upright one. The vectors are compared only where both copies show the face."""
    if turned.score <= first.score:
        return False
    if first.score == 0 or first.face is None or turned.face is None or turned.score > first.score + _FAR_SURER:
        return True
    return turned.length > first.length


def _shows_a_negative(inverted: Look, seen: Look) -> bool:
    """Whether more than the detection score indicates a negative: light eyes, or a clearly longer vector."""
    are_eyes_light = seen.signs is not None and seen.signs.are_eyes_light
    return are_eyes_light or inverted.length > _CLEARLY_LONGER * seen.length


def _negative() -> LowQuality:
    message = "Light and dark are swapped, as in a negative. Send the photo with its ordinary colours."
    return LowQuality("The photo is a negative.", errors=(Advice("photo", "negative", message),))


def _is_the_larger_subject(turned: Look, first: Look) -> bool:
    if turned.face is None or first.face is None or turned.face.area < _LARGER * first.face.area:
        return False
    return turned.is_sure
