"""Detect and assess: what faces are on a photo, and is one good enough?"""

from dataclasses import dataclass

from app.audit import Action, record
from app.documents.galleries import Gallery
from app.documents.identities import Liveness
from app.domain.faces import Face, PhotoFace
from app.domain.photo import PhotoReader
from app.domain.policy import GalleryPolicy
from app.domain.quality import QualityReport, judge, measure
from app.domain.subject import MainFace, prominences
from app.engine.looking import Searched, look
from app.engine.port import FaceEngine
from app.engine.reading import LIVE_FROM, subject_in, unfit, why_not_live
from app.errors import Advice, NoFace
from app.runtime import Runtime

#: Only the largest faces are measured, so that a photo of a crowd does not occupy a thread for long.
MOST_FACES = 50


@dataclass(frozen=True, slots=True)
class MeasuredFace:
    """A face with its measures."""

    face: PhotoFace
    quality: QualityReport
    liveness: Liveness | None


@dataclass(frozen=True, slots=True)
class Detection:
    """The faces of a photo, largest first, at most MOST_FACES. width, height: of the upright photo."""

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
    """Find and measure the faces, at most MOST_FACES. Without a face, the list is empty. Nothing is stored."""
    found = await runtime.compute_long(action.actor_id, _detect, runtime.engine, photo, runtime.reader)
    await record(None, action, subject_kind="photo", subject_id=None, detail={"faces": len(found.faces)})
    return found


async def assess(runtime: Runtime, action: Action, gallery: Gallery, photo: bytes) -> Assessment:
    """Measure the one face by the gallery's rules. Raises the photo's Problems, except for poor quality: that is the answer."""
    found = await runtime.compute_long(
        action.actor_id, assessment, runtime.engine, photo, gallery.policy, runtime.reader
    )
    await record(
        None, action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name,
        detail={"accepted": not found.advice, "score": round(found.quality.score, 2)},
    )  # fmt: skip
    return found


def _detect(engine: FaceEngine, photo: bytes, reader: PhotoReader) -> Detection:
    seen = look(engine, reader.decode(photo), _most_prominent)
    faces = [
        MeasuredFace(
            seen.photo.in_photo(face),
            measure(seen.photo.pixels, face, reduction=seen.photo.reduction),
            _liveness(engine.liveness(seen.photo.pixels, face)),
        )
        for face in seen.faces[:MOST_FACES]
    ]
    return Detection(faces, seen.photo.width, seen.photo.height)


def _most_prominent(searched: Searched, faces: list[Face]) -> MainFace:
    """The face by which the photo is turned upright. Raises NoFace."""
    photo = searched.photo
    ranked = prominences([photo.in_photo(face) for face in faces], (photo.width, photo.height))
    if not ranked:
        raise NoFace
    return MainFace(ranked[0][0], len(faces))


def assessment(engine: FaceEngine, photo: bytes, policy: GalleryPolicy, reader: PhotoReader) -> Assessment:
    """The one face's measures, and all that a gallery with this policy would refuse it for. Blocking."""
    seen = subject_in(engine, photo, policy, reader)
    pixels, face, (_, length) = seen.photo.pixels, seen.face, seen.vector
    usual = engine.card.usual_length
    quality = measure(pixels, face, length, usual_length=usual, reduction=seen.photo.reduction)
    live = None if policy.liveness == "off" else engine.liveness(pixels, face)
    # As the gallery would refuse the photo.
    advice = (judge(quality, policy.quality) or unfit(engine, seen)) + why_not_live(live, policy.liveness)
    return Assessment(seen.main, quality, _liveness(live), advice)


def _liveness(score: float | None) -> Liveness | None:
    return None if score is None else Liveness(score=round(score, 2), passed=score >= LIVE_FROM)
