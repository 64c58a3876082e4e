"""Faces turned upright: the similarity that carries five landmarks onto ArcFace's template.

The template and the crop follow InsightFace's `face_align.norm_crop` (python-package, MIT). The fit is the least-squares
similarity of Umeyama (1991), which in two dimensions and without reflection has a closed form over complex numbers.
"""

import threading
import weakref
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from app.domain.faces import Pixels

#: Part of every contract that uses `aligned_crop`: change the crop, change this name.
ALIGNMENT = "arcface-112-similarity-2"
#: Pixels of the crop's side, which ArcFace's networks were trained on.
CROP_SIDE = 112
#: Samples per crop pixel, each way, where the photo is finer than the crop. The photo is averaged down to that grid first.
OVERSAMPLING = 2
#: Photo pixels per crop pixel. Up to this number, a crop that reads four photo pixels for each of its own leaves out hardly any.
_NOTHING_BETWEEN = 1.5
#: Side, in crop pixels, of the squares in which two crops are compared.
_COARSE = 7
#: The part of the crop that is compared: whole squares of the face, without the borders of tightly cut photos.
_FACE = np.s_[21:105, 21:91]
#: Mean difference of the squares (of 255): 0.6 the most of 1,080 ordinary photos; 2.1 the least of planted faces.
_HIDDEN = 2.0
#: And its share of the mean difference of pixels: 0.15 for white noise of any strength, 0.11 at most for a halftone print;
#: 0.6 at least for planted faces.
_MORE_THAN_NOISE = 0.4
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
    """The face upright on a (side, side, 3) crop; what lies outside the photo is black.

    Every photo pixel under the crop counts, with about the same weight. A crop that reads a few pixels of each hundred
    can show another face than the photo does (Xiao et al., "Seeing is Not Believing: Camouflage Attacks on Image Scaling
    Algorithms", 2019). Recogniser, quality and fingerprint need the same crop one after the other. So each thread keeps its last
    crop, and returns it again for the same photo. The crop is read-only.
    """
    last: _LastCrop | None = getattr(_last, "crop", None)
    if last is not None and last.is_of(pixels, landmarks, side):
        return last.crop
    crop = _averaged(pixels, landmarks, side)
    crop.flags.writeable = False
    _last.crop = _LastCrop(weakref.ref(pixels), landmarks.copy(), side, crop)
    return crop


@dataclass(frozen=True, slots=True)
class _LastCrop:
    photo: "weakref.ref[Pixels]"
    landmarks: npt.NDArray[np.float32]
    side: int
    crop: Pixels

    def is_of(self, pixels: Pixels, landmarks: npt.NDArray[np.float32], side: int) -> bool:
        return self.photo() is pixels and self.side == side and np.array_equal(self.landmarks, landmarks)


_last = threading.local()


def _averaged(pixels: Pixels, landmarks: npt.NDArray[np.float32], side: int) -> Pixels:
    matrix = similarity_to_template(landmarks, side)
    step = _photo_pixels_per_crop_pixel(matrix)
    if step <= 1:
        return _warped(pixels, matrix, side)
    region, left, top = _region_under(pixels, matrix, side)
    if not region.size:
        return np.zeros((side, side, 3), dtype=np.uint8)
    factor = min(1.0, OVERSAMPLING / step)
    height, width = (max(1, round(length * factor)) for length in region.shape[:2])
    small = region
    if (height, width) != region.shape[:2]:
        small = np.asarray(cv2.resize(region, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    # The photo ends at the edge of its last pixel, not at its centre.
    small = np.asarray(cv2.copyMakeBorder(small, 1, 1, 1, 1, cv2.BORDER_REPLICATE), dtype=np.uint8)
    # A pixel's centre lies half a pixel from its edge on every grid.
    scale = np.array([region.shape[1] / width, region.shape[0] / height])
    from_small = np.diag([*scale, 1.0])
    from_small[:2, 2] = np.array([left, top]) - scale / 2 - 0.5
    onto_fine = OVERSAMPLING * matrix @ from_small
    onto_fine[:, 2] += (OVERSAMPLING - 1) / 2
    fine = _warped(small, onto_fine, side * OVERSAMPLING)
    return np.asarray(cv2.resize(fine, (side, side), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def sampled_crop(pixels: Pixels, landmarks: npt.NDArray[np.float32], side: int = CROP_SIDE) -> Pixels:
    """The face upright on a crop that reads only the four photo pixels nearest to each crop pixel.

    It differs from `aligned_crop` where the photo has detail finer than the crop. So it shows what is hidden in single pixels.
    """
    return _warped(pixels, similarity_to_template(landmarks, side), side)


def hides_another_picture(pixels: Pixels, landmarks: npt.NDArray[np.float32]) -> bool:
    """Whether single photo pixels show another face than their average does.

    Noise and texture differ between `sampled_crop` and `aligned_crop` as well, but evenly: their difference averages out over
    squares of the crop. A planted picture stays. Figures: docs/adr/0039.
    """
    if _photo_pixels_per_crop_pixel(similarity_to_template(landmarks)) < _NOTHING_BETWEEN:
        return False
    difference = (sampled_crop(pixels, landmarks).astype(np.float32) - aligned_crop(pixels, landmarks))[_FACE]
    height, width = (length // _COARSE for length in difference.shape[:2])
    squares = cv2.resize(difference, (width, height), interpolation=cv2.INTER_AREA)
    coarse, fine = float(np.abs(squares).mean()), float(np.abs(difference).mean())
    return coarse >= _HIDDEN and coarse >= _MORE_THAN_NOISE * fine


def _warped(pixels: Pixels, matrix: npt.NDArray[np.float64], side: int) -> Pixels:
    crop = cv2.warpAffine(pixels, matrix, (side, side), flags=cv2.INTER_LINEAR, borderValue=(0.0, 0.0, 0.0))
    return np.asarray(crop, dtype=np.uint8)


def _photo_pixels_per_crop_pixel(matrix: npt.NDArray[np.float64]) -> float:
    return 1 / max(float(np.hypot(matrix[0, 0], matrix[1, 0])), 1e-9)


def _region_under(pixels: Pixels, matrix: npt.NDArray[np.float64], side: int) -> tuple[Pixels, int, int]:
    """The part of the photo that lies under the crop, with a margin; and the column and row where it begins."""
    corners = np.array([[-1, side, -1, side], [-1, -1, side, side]], dtype=np.float64) - matrix[:, 2:]
    x, y = np.linalg.solve(matrix[:, :2], corners)
    margin = 2 * _photo_pixels_per_crop_pixel(matrix)
    height, width = pixels.shape[:2]
    left, right = (int(np.clip(edge, 0, width)) for edge in (x.min() - margin, x.max() + margin + 1))
    top, bottom = (int(np.clip(edge, 0, height)) for edge in (y.min() - margin, y.max() + margin + 1))
    return pixels[top:bottom, left:right], left, top
