"""Where the faces are: SCRFD through InsightFace's class, YuNet through OpenCV's."""

import importlib
import math
import threading
from collections.abc import Iterable
from typing import Protocol, cast

import cv2
import numpy as np
import numpy.typing as npt

from app.domain.faces import Box, Face, Pixels
from app.engine.port import Search
from app.engine.sessions import Session
from app.errors import ModelUnavailable

#: InsightFace's own threshold (SCRFD.det_thresh).
SCRFD_SCORE = 0.5
#: OpenCV's sample asks 0.9, which loses turned and covered faces; see docs/models.md for what 0.6 finds.
YUNET_SCORE = 0.6
_YUNET_OVERLAP, _YUNET_CANDIDATES = 0.3, 500
#: From this detection score on, a face counts as upright. SCRFD gives 99% of upside-down faces at most 0.75, and half of the
#: upright ones at least 0.78. YuNet gives 99% of upside-down faces at most 0.89, and 99% of upright ones at least 0.90.
SCRFD_UPRIGHT_SCORE, YUNET_UPRIGHT_SCORE = 0.76, 0.895
#: The same for a face with a long vector: SCRFD's score says little then.
SCRFD_UPRIGHT_SCORE_OF_LONG = 0.6

#: A face of a fifth of the long side is 64 pixels high in a search at 320; a second one of a quarter of its area,
#: which decides on `multiple-faces`, still has the 32 that SCRFD finds reliably. Smaller: look again at the next size.
SURE_SHARE = 0.2

#: A thorough search finds faces of this share of the largest face's length, if they have so many pixels at its size.
_SMALL_SHARE, SMALL_PIXELS = 0.2, 32
#: Sizes of SCRFD are multiples of it.
_STRIDE = 32
#: Longest side of a thorough search. It takes 16 times as long as a search at 320.
_LARGEST_SEARCH = 1280
#: A box that lies in another one by more than this share shows the same face, or a part of it.
_SAME_FACE_SHARE = 0.5


class Detector(Protocol):
    """Finds faces.

    upright_score: from this score on, a face counts as upright; upright_score_of_long: the same if its vector has a usual length.
    """

    upright_score: float
    upright_score_of_long: float

    def detect(self, pixels: Pixels, *, search: Search = "usual") -> list[Face]:
        """All upright faces, largest first; safe from several threads at once."""


class _Scrfd(Protocol):
    def detect(
        self, img: Pixels, *, input_size: tuple[int, int], det_thresh: float
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]: ...


class ScrfdDetector:
    """SCRFD at several sizes: the first that shows a large enough face is taken.

    The network is run and decoded by InsightFace's SCRFD class (insightface 2.x, MIT).
    """

    upright_score = SCRFD_UPRIGHT_SCORE
    upright_score_of_long = SCRFD_UPRIGHT_SCORE_OF_LONG

    def __init__(self, session: Session, sizes: tuple[int, ...]) -> None:
        # Loaded here and not at the top: the package brings SciPy and scikit-image, 1.1 s and 50 MB that a process which
        # only needs the model's card must not pay.
        scrfd = importlib.import_module("insightface.model_zoo.scrfd")
        self._network: _Scrfd = scrfd.SCRFD(session=session, static_shape_sessions=False)
        self._sizes = sizes

    def detect(self, pixels: Pixels, *, search: Search = "usual") -> list[Face]:
        """All upright faces, largest first. A quick search is one at the first size."""
        best: list[Face] = []
        reached = 0
        for size in self._sizes[:1] if search == "quick" else self._sizes:
            found = self._at(pixels, size)
            # Small faces: the larger search has them all, with better landmarks. A smaller one is for faces that fill the photo.
            if found and (not best or (size > reached and len(found) >= len(best))):
                best, reached = found, size
            if found and max(found[0].box[2:]) >= SURE_SHARE * max(pixels.shape[:2]):
                best, reached = found, size
                break
        if search == "thorough" and best and (larger := size_for_small_faces(best[0], pixels)) > reached:
            return with_others(best, self._at(pixels, larger))
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

    upright_score = YUNET_UPRIGHT_SCORE
    upright_score_of_long = YUNET_UPRIGHT_SCORE

    def __init__(self, weights: bytes, sizes: tuple[int, ...]) -> None:
        self._weights = np.frombuffer(weights, dtype=np.uint8)
        self._longest = max(sizes)
        self._own = threading.local()

    def detect(self, pixels: Pixels, *, search: Search = "usual") -> list[Face]:
        """All upright faces, largest first. A quick search is a usual one."""
        usual = min(self._longest, max(pixels.shape[:2]))
        found = self._at(pixels, usual)
        if search == "thorough" and found and (larger := size_for_small_faces(found[0], pixels)) > usual:
            return with_others(found, self._at(pixels, larger))
        return found

    def _at(self, pixels: Pixels, long_side: int) -> list[Face]:
        small, scale = shrunk(pixels, long_side)
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


def size_for_small_faces(largest: Face, pixels: Pixels, smallest: int = SMALL_PIXELS) -> int:
    """The long side of a search for faces that are small beside the largest one. smallest: what the detector finds, in pixels."""
    share = max(largest.box[2:]) / float(max(pixels.shape[:2]))
    return min(_LARGEST_SEARCH, _STRIDE * math.ceil(smallest / (_SMALL_SHARE * share) / _STRIDE))


def with_others(faces: list[Face], others: list[Face]) -> list[Face]:
    """The faces, and those of the others that are not among them. So a thorough search does not change the subject's template."""
    new = [one for one in others if all(_overlap(one.box, face.box) <= _SAME_FACE_SHARE for face in faces)]
    return largest_first([*faces, *new])


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


def surest(faces: list[Face]) -> float:
    """The highest detection score; there must be a face."""
    return max(face.detection_score for face in faces)


def _overlap(one: Box, other: Box) -> float:
    """The area that both boxes cover, as a share of the smaller one."""
    across = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    down = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, down) / min(one[2] * one[3], other[2] * other[3])


def _box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
    return (float(left), float(top), float(right - left), float(bottom - top))
