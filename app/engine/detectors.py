"""Where the faces are: SCRFD through InsightFace's class, YuNet through OpenCV's."""

import importlib
import threading
from collections.abc import Iterable
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
#: From this detection score on, a face counts as upright. SCRFD gives 99% of upside-down faces at most 0.75, and half of the
#: upright ones at least 0.78. YuNet gives 99% of upside-down faces at most 0.89, and 99% of upright ones at least 0.90.
SCRFD_UPRIGHT_SCORE, YUNET_UPRIGHT_SCORE = 0.76, 0.895
#: The same for a face with a long vector: SCRFD's score says little then.
SCRFD_UPRIGHT_SCORE_OF_LONG = 0.6

#: A face of a fifth of the long side is 64 pixels high in a search at 320; a second one of a quarter of its area,
#: which decides on `multiple-faces`, still has the 32 that SCRFD finds reliably. Smaller: look again at the next size.
SURE_SHARE = 0.2


class Detector(Protocol):
    """Finds faces.

    upright_score: from this score on, a face counts as upright; upright_score_of_long: the same if its vector has a usual length.
    """

    upright_score: float
    upright_score_of_long: float

    def detect(self, pixels: Pixels, *, quick: bool = False) -> list[Face]:
        """All upright faces, largest first; safe from several threads at once. quick: large ones are enough."""


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

    def detect(self, pixels: Pixels, *, quick: bool = False) -> list[Face]:
        """All upright faces, largest first. quick: at the first size only."""
        sizes = self._sizes[:1] if quick else self._sizes
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

    upright_score = YUNET_UPRIGHT_SCORE
    upright_score_of_long = YUNET_UPRIGHT_SCORE

    def __init__(self, weights: bytes, sizes: tuple[int, ...]) -> None:
        self._weights = np.frombuffer(weights, dtype=np.uint8)
        self._longest = max(sizes)
        self._own = threading.local()

    def detect(self, pixels: Pixels, *, quick: bool = False) -> list[Face]:
        """All upright faces, largest first. There is one search, quick or not."""
        del quick
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


def surest(faces: list[Face]) -> float:
    """The highest detection score; there must be a face."""
    return max(face.detection_score for face in faces)


def _box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
    return (float(left), float(top), float(right - left), float(bottom - top))
