"""From a photo's bytes to the one face that it is about, measured and embedded."""

from dataclasses import dataclass
from typing import Literal

from app.domain.faces import Embedding, Face, Pixels
from app.domain.photo import choose_face, decode
from app.domain.policy import GalleryPolicy
from app.domain.quality import QualityReport, judge, measure
from app.engine.port import FaceEngine
from app.errors import Advice, LowQuality, NotLive

Asked = Literal["required", "observe", "off"]
#: The passive models' mean probability of a live face from which on a photo passes: their own decision boundary.
LIVE_FROM = 0.5


@dataclass(frozen=True, slots=True)
class FaceReading:
    """One photo's face: embedding (d,), quality, and liveness in [0, 1] where it was asked for and can be told."""

    pixels: Pixels
    face: Face
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
    face = choose_face(engine.detect(pixels), pixels.shape, policy.second_face_share)
    embedding, length = engine.embed(pixels, face)
    usual = engine.card.usual_length
    quality = measure(pixels, face, length, usual_length=usual, reduction=photo.reduction)
    advice = judge(quality, policy.quality)
    if advice:
        raise LowQuality("; ".join(one.message for one in advice), errors=advice)
    liveness = _liveness(engine, pixels, face, policy.liveness)
    if advice := why_not_live(liveness, policy.liveness):
        raise NotLive(advice[0].message, errors=advice)
    return FaceReading(pixels, face, embedding, quality, liveness)


def why_not_live(liveness: float | None, asked: Asked) -> tuple[Advice, ...]:
    """What a gallery that requires a live face has against this score; without a model to ask, nobody is live there."""
    if asked != "required" or (liveness is not None and liveness >= LIVE_FROM):
        return ()
    return (
        Advice("photo", "not-live", "Please look into the camera yourself; a photo of a photo or screen is not taken."),
    )


def _liveness(engine: FaceEngine, pixels: Pixels, face: Face, asked: Asked) -> float | None:
    return None if asked == "off" else engine.liveness(pixels, face)
