"""From a photo's bytes to the one face that it is about, measured and embedded."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from app.domain.alignment import hides_another_picture
from app.domain.faces import Embedding, Face, Landmarks, PhotoFace, Pixels
from app.domain.photo import Photo, decode
from app.domain.policy import GalleryPolicy
from app.domain.quality import QualityReport, judge, measure
from app.domain.subject import MainFace, find_main_face
from app.domain.thresholds import threshold_at_fmr
from app.engine.port import FaceEngine
from app.errors import Advice, LowQuality, NoFace, NotLive

Asked = Literal["required", "observe", "off"]
#: The passive models' mean probability of a live face from which on a photo passes: their own decision boundary.
LIVE_FROM = 0.5


@dataclass(frozen=True, slots=True)
class FaceReading:
    """One photo's face: embedding (d,), quality, and liveness in [0, 1] where it was asked for and can be told.

    face: where it lies in `pixels`. main: the same on the photo as it was sent, and how many faces that shows.
    """

    pixels: Pixels
    face: Face
    main: MainFace
    embedding: Embedding
    quality: QualityReport
    liveness: float | None

    @property
    def is_live(self) -> bool:
        """Whether the passive models pass it; True where none was asked."""
        return self.liveness is None or self.liveness >= LIVE_FROM


def read_face(engine: FaceEngine, data: bytes, policy: GalleryPolicy, max_pixels: int) -> FaceReading:
    """Decode, find the face, measure, judge, embed. Blocking.

    Raises the photo's Problem: UnsupportedMediaType, TooManyPixels, or a PhotoRefused.
    """
    photo = decode(data, max_pixels=max_pixels)
    pixels = photo.pixels
    main = main_face(engine, photo, policy)
    face = photo.in_pixels(main.face)
    embedding, length = engine.embed(pixels, face)
    usual = engine.card.usual_length
    quality = measure(pixels, face, length, usual_length=usual, reduction=photo.reduction)
    advice = unfit(pixels, face) or judge(quality, policy.quality)
    if advice:
        raise LowQuality("; ".join(one.message for one in advice), errors=advice)
    liveness = _liveness(engine, pixels, face, policy.liveness)
    if advice := why_not_live(liveness, policy.liveness):
        raise NotLive(advice[0].message, errors=advice)
    return FaceReading(pixels, face, main, embedding, quality, liveness)


def main_face(engine: FaceEngine, photo: Photo, policy: GalleryPolicy) -> MainFace:
    """The face that is meant by the gallery's rule. Raises NoFace, MultipleFaces, FaceTooSmall, FaceCropped. Blocking."""
    alike = threshold_at_fmr(engine.card, policy.verify_fmr)

    def is_same_person(one: PhotoFace, other: PhotoFace) -> bool:
        try:
            (a, _), (b, _) = (engine.embed(photo.pixels, photo.in_pixels(face)) for face in (one, other))
        except LowQuality:
            return False
        return float(a @ b) >= alike

    faces = [photo.in_photo(face) for face in engine.detect(photo.pixels)]
    return find_main_face(faces, (photo.width, photo.height), policy, is_same_person)


def unfit(pixels: Pixels, face: Face) -> tuple[Advice, ...]:
    """Why this is no photo to recognise anybody by, at any level of quality; empty where it is one."""
    if not hides_another_picture(pixels, face.landmarks):
        return ()
    message = "The photo shows another picture when it is made smaller. Send a photo as the camera took it."
    return (Advice("photo", "hidden-detail", message),)


def stored_face(engine: FaceEngine, pixels: Pixels, near: Landmarks | None = None) -> Face:
    """The face of a photo that was accepted already, and so is judged no more. Blocking.

    near: its landmarks as they were found at enrolment. A sample without them comes from a version whose rule was: the largest
    face. Raises NoFace.
    """
    faces = engine.detect(pixels)
    if not faces:
        raise NoFace("No face is found on the stored photo.")
    if near is None:
        return max(faces, key=lambda face: face.area)
    return min(faces, key=lambda face: float(np.abs(face.landmarks - near).mean()))


def why_not_live(liveness: float | None, asked: Asked) -> tuple[Advice, ...]:
    """What a gallery that requires a live face has against this score; without a model to ask, nobody is live there."""
    if asked != "required" or (liveness is not None and liveness >= LIVE_FROM):
        return ()
    return (
        Advice("photo", "not-live", "Please look into the camera yourself; a photo of a photo or screen is not taken."),
    )


def _liveness(engine: FaceEngine, pixels: Pixels, face: Face, asked: Asked) -> float | None:
    return None if asked == "off" else engine.liveness(pixels, face)
