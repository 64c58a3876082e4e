"""What an engine finds on a photo, and what is known of the model that found it."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

#: uint8 (height, width, 3), RGB, upright.
Pixels = npt.NDArray[np.uint8]
#: float32 (d,), unit length; or (n, d) for several.
Embedding = npt.NDArray[np.float32]
#: float32 (5, 2): x and y of the left eye of the image, right eye, nose, left and right mouth corner.
Landmarks = npt.NDArray[np.float32]
#: x, y, width, height.
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Face:
    """One face in the pixels that an engine looks at.

    box: x, y, width, height; landmarks: (5, 2) float32, left eye of the image first, then right eye, nose,
    left and right mouth corner; both in those pixels. detection_score in [0, 1]. The pixels of a large photo are reduced, so
    nothing here is a size of the photo: PhotoFace is.
    """

    box: Box
    landmarks: npt.NDArray[np.float32]
    detection_score: float

    @property
    def area(self) -> float:
        """Square pixels of the box."""
        return self.box[2] * self.box[3]


@dataclass(frozen=True, slots=True)
class PhotoFace:
    """One face on the upright photo as it was sent. Rules, messages and answers use it.

    The same as Face, but in pixels of that photo. Engines take a Face, which `in_pixels` returns.
    """

    box: Box
    landmarks: npt.NDArray[np.float32]
    detection_score: float

    @classmethod
    def of(cls, face: Face, reduction: int) -> Self:
        """The face that was found in pixels which are `reduction` times smaller than the photo."""
        x, y, width, height = (float(value) * reduction for value in face.box)
        landmarks = (face.landmarks * np.float32(reduction)).astype(np.float32)
        return cls((x, y, width, height), landmarks, face.detection_score)

    def in_pixels(self, reduction: int) -> Face:
        """Where it lies in pixels which are `reduction` times smaller than the photo."""
        x, y, width, height = (value / reduction for value in self.box)
        landmarks = (self.landmarks / np.float32(reduction)).astype(np.float32)
        return Face((x, y, width, height), landmarks, self.detection_score)


def rounded(box: Box) -> Box:
    """The box as answers state it."""
    x, y, width, height = (round(float(value), 2) for value in box)
    return x, y, width, height


@dataclass(frozen=True, slots=True)
class RatePoint:
    """One measured point of a model's impostor curve: at `threshold`, a share `fmr` of impostor pairs would match."""

    fmr: float
    threshold: float


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What must be known of a model before its scores mean anything.

    contract: "sha256:..." over detector, recogniser, alignment, normalisation and centring; embeddings of two
    contracts are never compared. impostor_curve: falling in fmr, rising in threshold, at least two points; `source` says
    where it was measured. verify_fmr, identify_fpir, dedup_fpir: the rates that a gallery of this pack starts with.
    usual_length: the raw vector's length at the 1%, 50% and 99% points of ordinary photos; None where never measured.
    """

    pack: str
    kind: str
    dimension: int
    contract: str
    licence: str
    commercial_use: bool
    impostor_curve: tuple[RatePoint, ...]
    source: str
    verify_fmr: float = 1e-4
    identify_fpir: float = 1e-3
    dedup_fpir: float = 1e-3
    notes: str = ""
    usual_length: tuple[float, float, float] | None = None
