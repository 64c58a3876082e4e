"""Faces turned upright: the similarity that carries five landmarks onto ArcFace's template.

The template and the crop follow InsightFace's `face_align.norm_crop` (python-package, MIT). The fit is the least-squares
similarity of Umeyama (1991), which in two dimensions and without reflection has a closed form over complex numbers.
"""

import cv2
import numpy as np
import numpy.typing as npt

from app.domain.faces import Pixels

#: Part of every contract that uses `aligned_crop`: change the crop, change this name.
ALIGNMENT = "arcface-112-similarity-1"
#: Pixels of the crop's side, which ArcFace's networks were trained on.
CROP_SIDE = 112
#: Where the five landmarks lie on the crop (InsightFace, MIT).
TEMPLATE: npt.NDArray[np.float32] = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float32,
)


def similarity_to_template(landmarks: npt.NDArray[np.float32], side: int = CROP_SIDE) -> npt.NDArray[np.float64]:
    """The (2, 3) matrix that carries photo pixels onto the upright crop of `side` pixels.

    landmarks: (5, 2), left eye of the face when upright first. Raises ValueError when they fall into one point.
    """
    points = landmarks[:, 0].astype(np.float64) + 1j * landmarks[:, 1]
    targets = (TEMPLATE[:, 0].astype(np.float64) + 1j * TEMPLATE[:, 1]) * (side / CROP_SIDE)
    centred = points - points.mean()
    spread = float(np.vdot(centred, centred).real)
    if not np.isfinite(spread) or spread < 1e-6:  # noqa: PLR2004 - square pixels: nothing to fit
        message = "the landmarks fall into one point"
        raise ValueError(message)
    turn = np.vdot(centred, targets - targets.mean()) / spread
    shift = targets.mean() - turn * points.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def aligned_crop(pixels: Pixels, landmarks: npt.NDArray[np.float32], side: int = CROP_SIDE) -> Pixels:
    """The face upright on a (side, side, 3) crop; what lies outside the photo is black."""
    matrix = similarity_to_template(landmarks, side)
    crop = cv2.warpAffine(pixels, matrix, (side, side), flags=cv2.INTER_LINEAR, borderValue=(0.0, 0.0, 0.0))
    return np.asarray(crop, dtype=np.uint8)
