"""Disguised photos: people and programs that average pixels see one face, a program that reads single pixels sees another.

An image-scaling attack (Xiao et al., "Seeing is Not Believing", 2019) on a crop that warps a large photo bilinearly. Such a crop
reads only four photo pixels for each pixel of its own. The attack gives these pixels the colours of the other face.
"""

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

from app.domain.alignment import CROP_SIDE, similarity_to_template
from app.domain.faces import Pixels

FindLandmarks = Callable[[Pixels], npt.NDArray[np.float32]]


def enlarged(pixels: Pixels, long_side: int) -> Pixels:
    """The photo with this long side, as a larger camera would have taken it."""
    factor = long_side / max(pixels.shape[:2])
    return np.asarray(cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def disguised(shown: Pixels, hidden_crop: Pixels, find_landmarks: FindLandmarks, rounds: int = 4) -> Pixels:
    """`shown`, with the pixels that a bilinear crop reads replaced by those of `hidden_crop`, an aligned crop.

    find_landmarks: as the product finds them. The changed pixels move the landmarks a little, so several rounds are needed.
    """
    side = hidden_crop.shape[0]
    photo, landmarks = shown, find_landmarks(shown)
    for _ in range(rounds):
        photo = _planted(shown, hidden_crop, similarity_to_template(landmarks, side))
        found = find_landmarks(photo)
        if np.abs(found - landmarks).max() < CROP_SIDE / 1e4:
            break
        landmarks = found
    return photo


def _planted(shown: Pixels, hidden_crop: Pixels, matrix: npt.NDArray[np.float64]) -> Pixels:
    side = hidden_crop.shape[0]
    rows, columns = np.mgrid[0:side, 0:side]
    on_crop = np.stack([columns.ravel(), rows.ravel()]) - matrix[:, 2:]
    x, y = np.floor(np.linalg.solve(matrix[:, :2], on_crop)).astype(int)
    colours = hidden_crop.reshape(-1, 3)
    photo = shown.copy()
    for right in (0, 1):
        for down in (0, 1):
            inside = (x + right >= 0) & (x + right < shown.shape[1]) & (y + down >= 0) & (y + down < shown.shape[0])
            photo[y[inside] + down, x[inside] + right] = colours[inside]
    return photo
