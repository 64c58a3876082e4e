"""Signs that a picture is no ordinary photo of a face: light and dark swapped, only edges left, or few tones.

Thresholds of recognisers are measured on photos. A negative, a solarised or an edge-filtered picture gives a vector that fits
nobody, or every other picture of its kind. No sign alone refuses a photo, except bare edges: unusual light can cause each of
them. They are taken from the aligned crop; figures in docs/adr/0039.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from app.domain.faces import Pixels

#: The face without hair and background on the crop: rows, columns.
_FACE = np.s_[24:104, 20:92]
_EYES = (np.s_[48:55, 34:43], np.s_[48:55, 69:78])
_CHEEKS = (np.s_[66:78, 28:40], np.s_[66:78, 72:84])
_NOSE = (np.s_[60:72, 52:60],)

#: How far eyes are darker than nose and cheeks, in deviations of the face: -0.15 at most for 99% of photos (median -1.3), 1.3 the
#: median of negatives.
_DARKER = -0.2
#: Coarse detail against fine detail (ratio of deviations at blur 4, and at blur 1.5). Least of 1,080 photos: 0.85 and 1.94.
#: Edge-filtered ones: 0.75 and 1.65 (medians).
_COARSE_OVER_FINE, _MIDDLE_OVER_FINE = 0.84, 1.92
#: The same ratios for bare edges, which are enough by themselves.
_HARDLY_COARSE, _HARDLY_MIDDLE = 0.78, 1.75
#: Share of the face in the five most frequent neighbouring tones: 0.16 at most for 99% of photos; 0.26 to 0.7 with two to four
#: tones (medians).
_FEW_TONES = 0.2
#: Deviation of luminance (of 255). Under the first figure there is nothing to judge; under the second one a photo has few
#: tones as well, because it is dull.
_FLAT, _DULL = 8.0, 25.0
#: A raw vector shorter than this share of the card's 1% point is a doubt. A sixth of ordinary photos have one.
_SHORT = 1.12
_DOUBTS = 2


@dataclass(frozen=True, slots=True)
class Signs:
    """What is unusual about a crop."""

    are_eyes_light: bool
    is_mostly_edges: bool
    is_only_edges: bool
    has_few_tones: bool


def is_altered(found: Signs, relative_length: float | None) -> bool:
    """Whether the picture is no ordinary photo; never by one sign alone, except for bare edges.

    relative_length: of the raw vector, as a share of the card's 1% point; None where the card has none. Light eyes count only
    with a very short vector: very dark skin shows them too, and its photos have vectors of the usual length.
    """
    is_short = relative_length is not None and relative_length < _SHORT
    is_very_short = relative_length is not None and relative_length < 1
    doubts = (found.is_mostly_edges, found.is_only_edges, found.has_few_tones, is_short)
    return sum(doubts) + (is_very_short and found.are_eyes_light) >= _DOUBTS


def signs(crop: Pixels) -> Signs:
    """What is unusual about an aligned crop of CROP_SIDE."""
    luminance = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY).astype(np.float32)
    face = luminance[_FACE]
    if float(face.std()) < _FLAT:
        return Signs(are_eyes_light=False, is_mostly_edges=False, is_only_edges=False, has_few_tones=False)
    coarse = _over_fine(luminance, 4.0)
    middle = _over_fine(luminance, 1.5)
    tones = np.bincount(face.astype(np.uint8).ravel(), minlength=256) / face.size
    return Signs(
        are_eyes_light=_are_eyes_light(luminance),
        is_mostly_edges=coarse < _COARSE_OVER_FINE and middle < _MIDDLE_OVER_FINE,
        is_only_edges=coarse < _HARDLY_COARSE and middle < _HARDLY_MIDDLE,
        has_few_tones=float(face.std()) >= _DULL and float(np.convolve(tones, np.ones(5), "same").max()) > _FEW_TONES,
    )


def _are_eyes_light(luminance: npt.NDArray[np.float32]) -> bool:
    """Whether the eyes are hardly darker than nose or cheeks, (CROP_SIDE, CROP_SIDE)."""
    smooth = np.asarray(cv2.GaussianBlur(luminance, (0, 0), 2.5), dtype=np.float32)
    eyes, cheeks, nose = (_mean(smooth, places) for places in (_EYES, _CHEEKS, _NOSE))
    return max(eyes - cheeks, eyes - nose) / float(luminance[_FACE].std()) > _DARKER


def _mean(luminance: npt.NDArray[np.float32], places: tuple[tuple[slice, slice], ...]) -> float:
    return float(np.mean([luminance[place].mean() for place in places]))


def _over_fine(luminance: npt.NDArray[np.float32], blur: float) -> float:
    smooth = np.asarray(cv2.GaussianBlur(luminance, (0, 0), blur), dtype=np.float32)[_FACE]
    return float(smooth.std()) / (float((luminance[_FACE] - smooth).std()) + 0.5)
