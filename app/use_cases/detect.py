"""Detect and assess: what faces are on a photo, and is one good enough?"""

from dataclasses import dataclass

from app.audit import Action, record
from app.documents.galleries import Gallery
from app.documents.identities import Liveness
from app.domain.faces import PhotoFace
from app.domain.photo import decode
from app.domain.policy import GalleryPolicy
from app.domain.quality import QualityReport, judge, measure
from app.domain.subject import MainFace
from app.engine.port import FaceEngine
from app.engine.reading import LIVE_FROM, main_face, unfit, why_not_live
from app.errors import Advice
from app.runtime import Runtime

#: The largest ones are measured: one request must not hold a thread for as long as a crowd has faces.
MOST_FACES = 50


@dataclass(frozen=True, slots=True)
class MeasuredFace:
    """A face with its measures."""

    face: PhotoFace
    quality: QualityReport
    liveness: Liveness | None


@dataclass(frozen=True, slots=True)
class Detection:
    """The faces of a photo, largest first, MOST_FACES at most; its size when upright."""

    faces: list[MeasuredFace]
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Assessment:
    """One face's quality and what to do better; nothing when it is good enough."""

    main: MainFace
    quality: QualityReport
    liveness: Liveness | None
    advice: tuple[Advice, ...]


async def detect(runtime: Runtime, action: Action, photo: bytes) -> Detection:
    """Find and measure the faces, MOST_FACES at most; none is an empty list. Nothing is kept."""
    pixels = runtime.settings.max_photo_pixels
    found = await runtime.compute_long(action.actor_id, _detect, runtime.engine, photo, pixels)
    await record(None, action, subject_kind="photo", subject_id=None, detail={"faces": len(found.faces)})
    return found


async def assess(runtime: Runtime, action: Action, gallery: Gallery, photo: bytes) -> Assessment:
    """Measure the one face by the gallery's rules. Raises the photo's Problems, except for poor quality: that is the answer."""
    pixels = runtime.settings.max_photo_pixels
    found = await runtime.compute_long(action.actor_id, assessment, runtime.engine, photo, gallery.policy, pixels)
    await record(
        None, action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name,
        detail={"accepted": not found.advice, "score": round(found.quality.score, 2)},
    )  # fmt: skip
    return found


def _detect(engine: FaceEngine, photo: bytes, max_pixels: int) -> Detection:
    decoded = decode(photo, max_pixels=max_pixels)
    faces = []
    for face in engine.detect(decoded.pixels)[:MOST_FACES]:
        live = engine.liveness(decoded.pixels, face)
        faces.append(
            MeasuredFace(
                decoded.in_photo(face), measure(decoded.pixels, face, reduction=decoded.reduction), _liveness(live)
            )
        )
    return Detection(faces, decoded.width, decoded.height)


def assessment(engine: FaceEngine, photo: bytes, policy: GalleryPolicy, max_pixels: int) -> Assessment:
    """The one face's measures, and all that a gallery with this policy would refuse it for. Blocking."""
    decoded = decode(photo, max_pixels=max_pixels)
    pixels = decoded.pixels
    main = main_face(engine, decoded, policy)
    face = decoded.in_pixels(main.face)
    _, length = engine.embed(pixels, face)
    usual = engine.card.usual_length
    quality = measure(pixels, face, length, usual_length=usual, reduction=decoded.reduction)
    live = None if policy.liveness == "off" else engine.liveness(pixels, face)
    # As the gallery would refuse the photo.
    advice = (unfit(pixels, face) or judge(quality, policy.quality)) + why_not_live(live, policy.liveness)
    return Assessment(main, quality, _liveness(live), advice)


def _liveness(score: float | None) -> Liveness | None:
    return None if score is None else Liveness(score=round(score, 2), passed=score >= LIVE_FROM)
