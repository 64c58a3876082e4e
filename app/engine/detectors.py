"""Where the faces are: SCRFD through InsightFace's class, YuNet through OpenCV's."""

import importlib
import threading
from collections.abc import Callable, Iterable
from typing import Protocol, cast

import cv2
import numpy as np
import numpy.typing as npt

from app.domain.faces import Face, Pixels
from app.engine.sessions import Session
from app.errors import ModelUnavailable

#: InsightFace's own threshold (SCRFD.det_thresh).
SCRFD_SCORE = 0.5
#: OpenCV's sample asks 0.9, which loses turned and covered faces; see docs/models.md for what 0.6 finds.
YUNET_SCORE = 0.6
_YUNET_OVERLAP, _YUNET_CANDIDATES = 0.3, 500
#: YuNet draws upright landmarks on faces that lie on their side and gives them 0.84 or so; upright portraits get 0.905 at
#: least (108 people). Between them, the quarter turn with the highest score is right.
YUNET_SURE_SCORE = 0.88

#: A face of a fifth of the long side is 64 pixels high in a search at 320; a second one of a quarter of its area,
#: which decides on `multiple-faces`, still has the 32 that SCRFD finds reliably. Smaller: look again at the next size.
SURE_SHARE = 0.2
#: Beyond this turn of the eye line, landmarks of an upright search are not believed (SCRFD on photos lying on their side).
PLAUSIBLE_ROLL_DEGREES = 60.0
#: Quarter turns, counter-clockwise, that are tried when a photo shows no believable face; on the side first.
_TURNS = (1, 3, 2)


class Detector(Protocol):
    """Finds faces."""

    def detect(self, pixels: Pixels) -> list[Face]:
        """All faces, largest first; safe from several threads at once."""


class _Scrfd(Protocol):
    def detect(
        self, img: Pixels, *, input_size: tuple[int, int], det_thresh: float
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]: ...


class ScrfdDetector:
    """SCRFD at several sizes: the first that shows a large enough face is taken.

    The network is run and decoded by InsightFace's SCRFD class (insightface 2.x, MIT).
    """

    def __init__(self, session: Session, sizes: tuple[int, ...]) -> None:
        # Loaded here and not at the top: the package brings SciPy and scikit-image, 1.1 s and 50 MB that a process which
        # only needs the model's card must not pay.
        scrfd = importlib.import_module("insightface.model_zoo.scrfd")
        self._network: _Scrfd = scrfd.SCRFD(session=session, static_shape_sessions=False)
        self._sizes = sizes

    def detect(self, pixels: Pixels) -> list[Face]:
        """All faces, largest first; turned copies are searched when the photo as it stands shows no believable face."""
        faces = self._upright(pixels, self._sizes)
        if any(is_believable(face) for face in faces):
            return faces
        return best_turn(pixels, lambda turned: self._upright(turned, self._sizes[:1])) or faces

    def _upright(self, pixels: Pixels, sizes: Iterable[int]) -> list[Face]:
        best: list[Face] = []
        for size in sizes:
            found = self._at(pixels, size)
            if found and max(found[0].box[2:]) >= SURE_SHARE * max(pixels.shape[:2]):
                return found
            # Small faces: the larger search has them all, with better landmarks.
            if found and (not best or len(found) >= len(best)):
                best = found
        return best

    def _at(self, pixels: Pixels, size: int) -> list[Face]:
        small, scale = shrunk(pixels, size)
        bgr = np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2BGR), dtype=np.uint8)
        boxes, landmarks = self._network.detect(bgr, input_size=(size, size), det_thresh=SCRFD_SCORE)
        if landmarks is None:
            return []
        return largest_first(
            Face(
                box=_box(*(float(value) / scale for value in box[:4])),
                landmarks=(points / scale).astype(np.float32),
                detection_score=min(1.0, float(box[4])),
            )
            for box, points in zip(boxes, landmarks, strict=True)
        )


class YunetDetector:
    """YuNet at the photo's own size, its long side at most the given one.

    `cv2.FaceDetectorYN` keeps state while it runs, so every thread has its own.
    """

    def __init__(self, weights: bytes, sizes: tuple[int, ...]) -> None:
        self._weights = np.frombuffer(weights, dtype=np.uint8)
        self._longest = max(sizes)
        self._own = threading.local()

    def detect(self, pixels: Pixels) -> list[Face]:
        """All faces, largest first; turned copies are searched when the photo as it stands shows no believable face."""
        faces = self._upright(pixels)
        believable = [face for face in faces if is_believable(face)]
        if believable and surest(believable) >= YUNET_SURE_SCORE:
            return faces
        turned = best_turn(pixels, self._upright)
        return turned if turned and (not believable or surest(turned) > surest(believable)) else faces

    def _upright(self, pixels: Pixels) -> list[Face]:
        small, scale = shrunk(pixels, min(self._longest, max(pixels.shape[:2])))
        network = self._network()
        network.setInputSize((small.shape[1], small.shape[0]))
        # OpenCV's stubs promise rows; where there is no face it gives None.
        rows = cast("npt.NDArray[np.float32] | None", network.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))[1])
        if rows is None:
            return []
        faces = []
        for row in rows:
            x, y, width, height = (float(value) / scale for value in row[:4])
            landmarks = (row[4:14].reshape(5, 2) / scale).astype(np.float32)
            faces.append(Face(box=(x, y, width, height), landmarks=landmarks, detection_score=min(1.0, float(row[14]))))
        return largest_first(faces)

    def _network(self) -> cv2.FaceDetectorYN:
        if not hasattr(self._own, "network"):
            try:
                self._own.network = cv2.FaceDetectorYN.create(
                    "onnx",
                    self._weights,
                    np.empty(0, np.uint8),
                    (320, 320),
                    YUNET_SCORE,
                    _YUNET_OVERLAP,
                    _YUNET_CANDIDATES,
                )
            except cv2.error as error:
                message = f"YuNet does not load: {error}"
                raise ModelUnavailable(message) from error
        network: cv2.FaceDetectorYN = self._own.network
        return network


def largest_first(faces: Iterable[Face]) -> list[Face]:
    """Faces with finite numbers and an area, largest first."""
    sound = (face for face in faces if face.area > 0 and bool(np.isfinite(face.landmarks).all()))
    return sorted(sound, key=lambda face: face.area, reverse=True)


def shrunk(pixels: Pixels, long_side: int) -> tuple[Pixels, float]:
    """The photo scaled so that its long side is `long_side`, and the factor by which its coordinates were multiplied.

    Averages over areas where it shrinks: landmarks stay where they are when a large photo is searched at 320.
    """
    height, width = pixels.shape[:2]
    scale = long_side / max(height, width)
    if scale == 1:
        return pixels, 1.0
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, size, interpolation=method), dtype=np.uint8), scale


def is_believable(face: Face) -> bool:
    """Whether eyes stand over the mouth and the eye line is not on end."""
    eyes = face.landmarks[1] - face.landmarks[0]
    down = face.landmarks[3:].mean(axis=0) - face.landmarks[:2].mean(axis=0)
    roll = abs(float(np.degrees(np.arctan2(eyes[1], eyes[0]))))
    return roll <= PLAUSIBLE_ROLL_DEGREES and float(eyes[0] * down[1] - eyes[1] * down[0]) > 0


def best_turn(pixels: Pixels, detect: Callable[[Pixels], list[Face]]) -> list[Face]:
    """Faces of the quarter turn that shows the surest believable one, in pixels of the photo as it stands."""
    best: list[Face] = []
    for turns in _TURNS:
        found = [face for face in detect(np.ascontiguousarray(np.rot90(pixels, turns))) if is_believable(face)]
        if found and (not best or surest(found) > surest(best)):
            best = [_turned_back(face, turns, pixels.shape[1], pixels.shape[0]) for face in found]
    return largest_first(best)


def surest(faces: list[Face]) -> float:
    """The highest detection score; there must be a face."""
    return max(face.detection_score for face in faces)


def _turned_back(face: Face, turns: int, width: int, height: int) -> Face:
    """A face found on a copy turned counter-clockwise by quarter turns; width, height: of the photo as it stands.

    Landmarks keep their order, so the first is the eye that is left when the face is upright: alignment needs that.
    """
    x, y, w, h = face.box
    corners = np.array([[x, y], [x + w, y + h]], dtype=np.float64)
    points = np.vstack([corners, face.landmarks.astype(np.float64)])
    if turns == 1:
        points = np.column_stack([width - points[:, 1], points[:, 0]])
    elif turns == 2:  # noqa: PLR2004 - half a turn
        points = np.column_stack([width - points[:, 0], height - points[:, 1]])
    else:
        points = np.column_stack([points[:, 1], height - points[:, 0]])
    (left, top), (right, bottom) = points[:2].min(axis=0), points[:2].max(axis=0)
    return Face(_box(left, top, right, bottom), points[2:].astype(np.float32), face.detection_score)


def _box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
    return (float(left), float(top), float(right - left), float(bottom - top))
