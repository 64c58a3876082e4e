"""What an engine finds on a photo, and what is known of the model that found it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: uint8 (height, width, 3), RGB, upright.
Pixels = npt.NDArray[np.uint8]
#: float32 (d,), unit length; or (n, d) for several.
Embedding = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Face:
    """One face on a photo.

    box: x, y, width, height; landmarks: (5, 2) float32, left eye of the image first, then right eye, nose,
    left and right mouth corner; both in pixels of the upright photo. detection_score in [0, 1].
    """

    box: tuple[float, float, float, float]
    landmarks: npt.NDArray[np.float32]
    detection_score: float

    @property
    def area(self) -> float:
        """Square pixels of the box."""
        return self.box[2] * self.box[3]


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
