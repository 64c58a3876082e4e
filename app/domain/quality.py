"""How good a face photo is, and what the person in front of the camera can do about it.

Measures carry the names of ISO/IEC 29794-5 where it has one. They are taken from the upright crop that the recogniser sees
(112 pixels), so they mean the same at any size of photo. Limits were set on first photos of 431 people (public portraits,
among them grey ones of 92 x 112 pixels) and on spoiled ones: each constant names what it lies between.
"""

import math
from typing import Annotated, Literal, Self

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from app.domain.alignment import aligned_crop
from app.domain.faces import Face, Pixels
from app.errors import Advice

Level = Literal["strict", "standard", "off"]
Share = Annotated[float, Field(ge=0, le=1)]

#: The face without hair and background on the crop: rows, columns.
_FACE_ROWS, _FACE_COLUMNS = slice(24, 104), slice(20, 92)

#: Variance of the Laplacian at the median of ordinary photos; `sharpness` is v / (v + this), 0.5 there.
USUAL_LAPLACIAN = 160.0
#: Luminance from which a pixel counts as burnt out.
BURNT = 250

#: Sharpness, by level. 10 in variance: strong Gaussian blur 4, the softest ordinary photo 14; strict: 1% of ordinary photos.
_SHARPNESS = {"standard": 10 / (10 + USUAL_LAPLACIAN), "strict": 40 / (40 + USUAL_LAPLACIAN)}
#: Mean luminance of 0..1. Too dark: 0.05 seen on a blackened photo, 0.27 the darkest ordinary one. Too bright: 0.98 and 0.77.
_DARKEST = {"standard": 0.08, "strict": 0.25}
_BRIGHTEST = {"standard": 0.92, "strict": 0.82}
#: Degrees of |yaw| and |pitch|; the estimate from five points is good to about ten degrees.
_MOST_YAW = {"standard": 65.0, "strict": 30.0}
_MOST_PITCH = {"standard": 60.0, "strict": 35.0}
#: Degrees of |roll|: aligned away before recognition, so it only matters to people who look at the photo.
_MOST_ROLL = {"standard": 180.0, "strict": 20.0}
#: Pixels of the face's shorter side: see `subject.MINIMUM_FACE_SIDE`; strict: the recogniser's own 112 without enlarging.
_SMALLEST_FACE = {"standard": 40.0, "strict": 90.0}
#: `score` that strict asks for: the weakest tenth of ordinary photos falls under it.
_STRICT_SCORE = 0.25

# What no number of the report shows has one limit for both levels, and stands in `issues` where it is passed.
#: Share of burnt-out pixels: 0.88 on an overexposed photo, 0.12 the most on an ordinary one.
MOST_BURNT = 0.3
#: Deviation of luminance (of 255): 3 on a blackened photo, 19 the flattest ordinary one.
LEAST_CONTRAST = 8.0
#: The raw vector's length as a share of the card's 1% point: 0.79 on strong blur, 0.92 the lowest ordinary photo.
SHORTEST_LENGTH = 0.85

_ADVICE = {
    "sharpness": "The photo is blurred. Hold still, wipe the lens, and take it again.",
    "under-exposure": "It is too dark. Turn towards a window or a lamp.",
    "over-exposure": "It is too bright. Step out of direct light, and do not use a flash up close.",
    "luminance-mean": "It is too bright. Step out of direct light.",
    "dynamic-range": "The face has too little contrast. Take the photo in even, brighter light.",
    "head-pose-yaw": "Turn your face straight to the camera.",
    "head-pose-pitch": "Hold the camera at the height of your eyes and look straight into it.",
    "head-pose-roll": "Hold your head and the camera upright.",
    "head-size": "Come closer to the camera.",
    "quality-score": "The photo is only just usable. Come closer, face the camera, and take it in even light.",
    "unified-quality": "The face is hard to recognise. Take off a mask or dark glasses, and take the photo in even light.",
}

#: A head in units of the distance between the eyes, seen from the front: x to the right of the image, y down, z towards the
#: camera. x and y are ArcFace's template; depths are those of an average adult head (nose tip 28 mm before the eyes, mouth
#: corners 8 mm, at 63 mm between the pupils).
_HEAD: npt.NDArray[np.float64] = np.array(
    [[-0.5, 0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.57, 0.44], [-0.414, 1.155, 0.13], [0.414, 1.155, 0.13]]
)


class QualityReport(BaseModel):
    """One face's quality, as it is stored and answered.

    score: the weakest of its parts, 0 at what `standard` refuses, 1 at what good photos have. sharpness, brightness: in
    [0, 1]. yaw: degrees, positive when the nose points to the right of the image; pitch: positive when it points down;
    roll: positive when the head is turned clockwise. face_size: the shorter side of the face in pixels. issues: codes of
    what `strict` refuses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: Share
    sharpness: Share
    brightness: Share
    yaw: float
    pitch: float
    roll: float
    face_size: int
    issues: tuple[str, ...] = ()

    def coarse(self) -> Self:
        """With two decimals, as events and relying applications may have it."""
        shares = {name: round(getattr(self, name), 2) for name in ("score", "sharpness", "brightness")}
        return self.model_copy(update=shares)


def measure(
    pixels: Pixels,
    face: Face,
    embedding_length: float | None = None,
    *,
    usual_length: tuple[float, float, float] | None = None,
    reduction: int = 1,
) -> QualityReport:
    """The quality of one face.

    embedding_length: of the raw vector, the best single predictor of a missed match; it counts where the model's card
    gives its usual_length (1%, 50% and 99% points). reduction: of the photo, so that face_size is in the photo's own pixels.
    """
    crop = aligned_crop(pixels, face.landmarks)
    luminance = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)[_FACE_ROWS, _FACE_COLUMNS]
    laplacian = float(cv2.Laplacian(luminance, cv2.CV_64F).var())
    burnt = float((luminance >= BURNT).mean())
    contrast = float(luminance.std())
    yaw, pitch, roll = head_pose(face.landmarks)
    side = min(face.box[2:]) * reduction
    sharpness, brightness = laplacian / (laplacian + USUAL_LAPLACIAN), float(luminance.mean()) / 255
    relative = None if embedding_length is None or usual_length is None else embedding_length / usual_length[0]
    parts = [
        _ramp(sharpness, _SHARPNESS["standard"], 0.5),
        _ramp(brightness, _DARKEST["standard"], 0.35),
        _ramp(brightness, _BRIGHTEST["standard"], 0.7),
        _ramp(burnt, MOST_BURNT, 0.02),
        _ramp(contrast, LEAST_CONTRAST, 35.0),
        _ramp(abs(yaw), _MOST_YAW["standard"], 10.0),
        _ramp(abs(pitch), _MOST_PITCH["standard"], 15.0),
        _ramp(side, _SMALLEST_FACE["standard"], 112.0),
    ]
    if relative is not None and usual_length is not None:
        parts.append(_ramp(relative, SHORTEST_LENGTH, usual_length[1] / usual_length[0]))
    hidden = [
        ("over-exposure", burnt > MOST_BURNT),
        ("dynamic-range", contrast < LEAST_CONTRAST),
        ("unified-quality", relative is not None and relative < SHORTEST_LENGTH),
    ]
    report = QualityReport(
        score=round(min(parts), 3),
        sharpness=round(sharpness, 3),
        brightness=round(brightness, 3),
        yaw=round(yaw, 1),
        pitch=round(pitch, 1),
        roll=round(roll, 1),
        face_size=round(side),
        issues=tuple(code for code, is_met in hidden if is_met),
    )
    return report.model_copy(update={"issues": _faults(report, "strict")})


def judge(report: QualityReport, level: Level) -> tuple[Advice, ...]:
    """What is not good enough at this level, with advice to the person; empty when all is. `off` finds nothing."""
    if level == "off":
        return ()
    return tuple(Advice("photo", code, _ADVICE[code]) for code in _faults(report, level))


def head_pose(landmarks: npt.NDArray[np.float32]) -> tuple[float, float, float]:
    """Yaw, pitch and roll in degrees, from the five landmarks and a rigid head seen from afar.

    A scaled orthographic fit (DeMenthon and Davis, 1995, first step): good to about ten degrees up to 50, because noses differ.
    """
    eyes = landmarks[1].astype(np.float64) - landmarks[0]
    roll = math.atan2(float(eyes[1]), float(eyes[0]))
    cosine, sine = math.cos(-roll), math.sin(-roll)
    upright = landmarks.astype(np.float64) @ np.array([[cosine, sine], [-sine, cosine]])
    head = _HEAD - _HEAD.mean(axis=0)
    rows, *_ = np.linalg.lstsq(head, upright - upright.mean(axis=0), rcond=None)
    across, down = rows[:, 0], rows[:, 1]
    size = max(float(np.linalg.norm(across)), float(np.linalg.norm(down)), 1e-9)
    yaw = math.degrees(math.atan2(float(across[2]), max(float(across[0]), 1e-9 * size)))
    pitch = math.degrees(math.atan2(float(down[2]), max(float(down[1]), 1e-9 * size)))
    return yaw, pitch, math.degrees(roll)


def _faults(report: QualityReport, level: Literal["strict", "standard"]) -> tuple[str, ...]:
    found = {
        "sharpness": report.sharpness < _SHARPNESS[level],
        "under-exposure": report.brightness < _DARKEST[level],
        "luminance-mean": report.brightness > _BRIGHTEST[level],
        "over-exposure": "over-exposure" in report.issues,
        "dynamic-range": "dynamic-range" in report.issues,
        "head-pose-yaw": abs(report.yaw) > _MOST_YAW[level],
        "head-pose-pitch": abs(report.pitch) > _MOST_PITCH[level],
        "head-pose-roll": abs(report.roll) > _MOST_ROLL[level],
        "head-size": report.face_size < _SMALLEST_FACE[level],
    }
    codes = [code for code, is_met in found.items() if is_met]
    if "unified-quality" in report.issues:
        codes.append("unified-quality")
    # Only where nothing says more: it has the least to tell the person.
    if level == "strict" and not codes and report.score < _STRICT_SCORE:
        codes.append("quality-score")
    return tuple(codes)


def _ramp(value: float, zero: float, one: float) -> float:
    """0 at `zero`, 1 at `one`, a straight line between, on either side of each other."""
    return min(1.0, max(0.0, (value - zero) / (one - zero)))
