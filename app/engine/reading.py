"""From a photo's bytes to the one face that it is about, measured and embedded."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from app.domain.alignment import hides_another_picture
from app.domain.alteration import Signs, is_altered
from app.domain.faces import Box, Embedding, Face, Landmarks, PhotoFace, Pixels, rounded
from app.domain.photo import Photo, PhotoReader
from app.domain.policy import GalleryPolicy
from app.domain.quality import QualityReport, judge, measure
from app.domain.subject import MainFace, find_main_face, refuses_small_faces
from app.domain.thresholds import threshold_at_fmr
from app.engine.close_up import close_up
from app.engine.looking import Searched, look
from app.engine.port import FaceEngine
from app.errors import Advice, LowQuality, NoFace, NotLive, PhotoRefused

Asked = Literal["required", "observe", "off"]
#: The passive models' mean probability of a live face from which on a photo passes: their own decision boundary.
LIVE_FROM = 0.5
#: Another detector's landmarks of the same face lie within this multiple of the landmarks' own spread (docs/adr/0041).
_SAME_FACE = 0.6
#: Half the side of a close-up, in spreads: a face has about a quarter of its side.
_AROUND = 10.0


@dataclass(frozen=True, slots=True)
class FaceReading:
    """One photo's face: embedding (d,), quality, and liveness in [0, 1] where it was asked for and can be measured.

    pixels: what was compared, upright: the photo, or the surroundings of a small face, less reduced. face: where it lies
    there. main: where it lies on the photo as it was sent, turned upright, and how many faces that photo shows.
    """

    pixels: Pixels
    face: Face
    main: MainFace
    embedding: Embedding
    quality: QualityReport
    liveness: float | None

    @property
    def stored_box(self) -> Box:
        """Where the face lies on the photo that is stored: on `pixels`."""
        return rounded(self.face.box)

    @property
    def is_live(self) -> bool:
        """Whether the passive models pass it; True where none was asked."""
        return self.liveness is None or self.liveness >= LIVE_FROM


@dataclass(frozen=True, slots=True)
class StoredFace:
    """The face of a stored photo. pixels: upright. face: where it lies there. landmarks: on the photo as it is stored."""

    pixels: Pixels
    face: Face
    landmarks: Landmarks


@dataclass(frozen=True, slots=True)
class Subject:
    """The face that a photo is about.

    photo: the photo, or a part of it, turned by quarters counter-clockwise until the face is upright. face: where the face is in
    the pixels of `photo`. main: where the face is on the photo as it was sent. vector: embedding and raw length.
    """

    photo: Photo
    main: MainFace
    face: Face
    vector: tuple[Embedding, float]
    signs: Signs
    quarters: int


def read_face(engine: FaceEngine, data: bytes, policy: GalleryPolicy, reader: PhotoReader) -> FaceReading:
    """Decode, find the face, measure, judge, embed. Blocking.

    Raises the photo's Problem: UnsupportedMediaType, TooManyPixels, or a PhotoRefused.
    """
    seen = subject_in(engine, data, policy, reader)
    pixels, face, (embedding, length) = seen.photo.pixels, seen.face, seen.vector
    usual = engine.card.usual_length
    quality = measure(pixels, face, length, usual_length=usual, reduction=seen.photo.reduction)
    advice = judge(quality, policy.quality) or unfit(engine, seen)
    if advice:
        raise LowQuality("; ".join(one.message for one in advice), errors=advice)
    liveness = _liveness(engine, pixels, face, policy.liveness)
    if advice := why_not_live(liveness, policy.liveness):
        raise NotLive(advice[0].message, errors=advice)
    return FaceReading(pixels, face, seen.main, embedding, quality, liveness)


def subject_in(engine: FaceEngine, data: bytes, policy: GalleryPolicy, reader: PhotoReader) -> Subject:
    """The face that is meant. A small face in a large photo is read from its surroundings, less reduced. Blocking.

    Raises what `PhotoReader.decode` and `subject_of` raise.
    """
    seen = subject_of(engine, reader.decode(data), policy)
    near = close_up(data, seen.photo, seen.main.face, reader)
    if near is None:
        return seen
    try:
        closer = subject_of(engine, near.photo, policy)
    except PhotoRefused:
        # Another person is close by, or the face is not found again: the whole photo has answered that already.
        return seen
    is_the_same = closer.quarters == 0 and near.shows(closer.main.face)
    return replace(closer, main=seen.main, quarters=seen.quarters) if is_the_same else seen


def subject_of(engine: FaceEngine, photo: Photo, policy: GalleryPolicy) -> Subject:
    """The face that is meant by the gallery's rule, on the photo turned so that it stands upright. Blocking.

    Raises NoFace, MultipleFaces, FaceTooSmall, FaceCropped; LowQuality where the face has no features.
    """
    alike = threshold_at_fmr(engine.card, policy.verify_fmr)

    def choose(searched: Searched, faces: list[Face]) -> MainFace:
        turned = searched.photo

        def is_same_person(one: PhotoFace, other: PhotoFace) -> bool:
            try:
                (a, _), (b, _) = (searched.embed(turned.in_pixels(face)) for face in (one, other))
            except LowQuality:
                return False
            return float(a @ b) >= alike

        found = [turned.in_photo(face) for face in faces]
        return find_main_face(found, (turned.width, turned.height), policy, is_same_person)

    seen = look(engine, photo, choose, "thorough" if refuses_small_faces(policy) else "usual")
    vector, main, face, marks = seen.vector, seen.main, seen.face, seen.signs
    if vector is None or main is None or face is None or marks is None:
        problem = seen.problem or NoFace()
        del seen, vector, main, face, marks
        try:
            raise problem
        finally:
            del problem  # else the error and this frame keep each other in memory
    return Subject(seen.photo, main, face, vector, marks, seen.quarters)


def unfit(engine: FaceEngine, seen: Subject) -> tuple[Advice, ...]:
    """Why the photo cannot serve for recognition, at any level of quality; empty if it can."""
    if hides_another_picture(seen.photo.pixels, seen.face.landmarks):
        message = "The photo shows another picture when it is made smaller. Send a photo as the camera took it."
        return (Advice("photo", "hidden-detail", message),)
    usual = engine.card.usual_length
    if is_altered(seen.signs, None if usual is None else seen.vector[1] / usual[0]):
        message = "The picture looks filtered or drawn. Send an ordinary photo, as the camera took it."
        return (Advice("photo", "altered-picture", message),)
    return ()


def stored_face(engine: FaceEngine, pixels: Pixels, near: Landmarks | None = None) -> StoredFace:
    """The face of a photo that was accepted at enrolment. It is not judged again. Blocking.

    near: its landmarks as they were found at enrolment. A face elsewhere is not the enrolled one. A sample without landmarks
    comes from an older version, which took the largest face, and stored sideways photos as they came. Raises NoFace.
    """
    if near is None:
        height, width = pixels.shape[:2]
        photo = Photo(pixels=pixels, format="jpeg", width=width, height=height, reduction=1)
        seen = look(engine, photo, _largest)
        if seen.face is None:
            raise NoFace("No face is found on the stored photo.")
        return StoredFace(seen.photo.pixels, seen.face, as_stored(seen.face.landmarks, seen.quarters, (width, height)))
    face = _face_at(near, engine.detect(pixels)) or _face_at(near, _faces_around(engine, pixels, near))
    if face is None:
        raise NoFace("The face that was enrolled is not found on the stored photo.")
    return StoredFace(pixels, face, face.landmarks)


def _face_at(near: Landmarks, faces: list[Face]) -> Face | None:
    """The face with these landmarks, as far as two detectors agree."""

    def distance(face: Face) -> float:
        return float(np.hypot(*(face.landmarks - near).T).mean())

    face = min(faces, key=distance, default=None)
    return None if face is None or distance(face) > _SAME_FACE * _spread(near) else face


def _faces_around(engine: FaceEngine, pixels: Pixels, near: Landmarks) -> list[Face]:
    """The faces in a close-up around these landmarks. Some detectors do not find small faces in a large photo."""
    (x, y), half = near.mean(axis=0), _AROUND * _spread(near)
    left, top = max(0, int(x - half)), max(0, int(y - half))
    around = np.ascontiguousarray(pixels[top : int(y + half), left : int(x + half)])
    corner = np.array([left, top], np.float32)
    return [
        Face((face.box[0] + left, face.box[1] + top, *face.box[2:]), face.landmarks + corner, face.detection_score)
        for face in engine.detect(around)
    ]


def _spread(landmarks: Landmarks) -> float:
    """The root mean square distance of the landmarks from their centre. Unlike the eyes' distance, it is not small in profile."""
    return float(np.sqrt(((landmarks - landmarks.mean(axis=0)) ** 2).sum(axis=1).mean()))


def as_stored(landmarks: Landmarks, quarters: int, size: tuple[int, int]) -> Landmarks:
    """Move landmarks from a photo that was turned by `quarters` counter-clockwise to the photo before. size: of that photo."""
    x, y = landmarks[:, 0], landmarks[:, 1]
    width, height = size
    points = {0: (x, y), 1: (width - y, x), 2: (width - x, height - y), 3: (y, height - x)}[quarters % 4]
    return np.column_stack(points).astype(np.float32)


def _largest(searched: Searched, faces: list[Face]) -> MainFace:
    if not faces:
        raise NoFace
    return MainFace(searched.photo.in_photo(max(faces, key=lambda face: face.area)), len(faces))


def why_not_live(liveness: float | None, asked: Asked) -> tuple[Advice, ...]:
    """What a gallery that requires a live face has against this score; without a model to ask, nobody is live there."""
    if asked != "required" or (liveness is not None and liveness >= LIVE_FROM):
        return ()
    return (
        Advice("photo", "not-live", "Please look into the camera yourself; a photo of a photo or screen is not taken."),
    )


def _liveness(engine: FaceEngine, pixels: Pixels, face: Face, asked: Asked) -> float | None:
    return None if asked == "off" else engine.liveness(pixels, face)
