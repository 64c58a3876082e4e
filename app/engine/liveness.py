"""Is this a live face, or a photo of a photo? Two MiniFASNet models by Minivision (Silent-Face-Anti-Spoofing, Apache-2.0).

The crop follows the project's `CropImage`: the box scaled about its centre, no further than the photo allows, and shifted
to stay inside. Input is BGR, 0..255: dividing by 255 makes both models call every face an attack. Class 1 is real.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from app.domain.faces import Face, Pixels
from app.engine.packs import Weights, sha256_of
from app.engine.sessions import Device, Session, open_session

#: Crop scale by the SHA-256 of the model file. Both must be there: alone, each errs on what the other sees.
SCALES = {
    "23c35d6762dca2a07e17979b0f76263cc9ffea6e3d55c7ded23108a625bd79f7": 2.7,
    "993e41cad1ca54f02ae4a67bb3f6f41e8091ebc5310f295fa823c51747649384": 4.0,
}
FOLDER = "liveness"
_SIDE = 80
_REAL = 1


@dataclass(frozen=True, slots=True)
class LivenessWeights:
    """One model file and the scale of its crop."""

    weights: Weights
    scale: float


def find_liveness(model_dir: Path) -> tuple[LivenessWeights, ...]:
    """The two models of `liveness/`, known by their SHA-256; empty unless both are there."""
    folder = model_dir / FOLDER
    if not folder.is_dir():
        return ()
    digests = {sha256_of(file): file for file in sorted(folder.glob("*.onnx"))}
    found = tuple(LivenessWeights(Weights(digests[sha], sha), scale) for sha, scale in SCALES.items() if sha in digests)
    return found if len(found) == len(SCALES) else ()


class LivenessModels:
    """The loaded models; safe from several threads at once."""

    def __init__(self, files: Sequence[LivenessWeights], device: Device) -> None:
        self._models: list[tuple[Session, float]] = [
            (open_session(file.weights.read(), device=device, what=file.weights.path.name), file.scale)
            for file in files
        ]

    def score(self, pixels: Pixels, face: Face) -> float:
        """The mean of the models' probability that the face is live, in [0, 1]."""
        return float(np.mean([_real(session, _crop(pixels, face, scale)) for session, scale in self._models]))


def _real(session: Session, crop: Pixels) -> float:
    batch = np.ascontiguousarray(crop.transpose(2, 0, 1)[None], dtype=np.float32)
    logits = session.run(None, {session.get_inputs()[0].name: batch})[0][0].astype(np.float64)
    odds = np.exp(logits - logits.max())
    return float(odds[_REAL] / odds.sum())


def _crop(pixels: Pixels, face: Face, scale: float) -> Pixels:
    height, width = pixels.shape[:2]
    x, y, w, h = face.box
    w, h = max(w, 1.0), max(h, 1.0)
    scale = min((height - 1) / h, (width - 1) / w, scale)
    half_width, half_height = w * scale / 2, h * scale / 2
    centre_x = min(max(x + w / 2, half_width), width - 1 - half_width)
    centre_y = min(max(y + h / 2, half_height), height - 1 - half_height)
    left, top = max(0, int(centre_x - half_width)), max(0, int(centre_y - half_height))
    right, bottom = min(width - 1, int(centre_x + half_width)), min(height - 1, int(centre_y + half_height))
    region = pixels[top : bottom + 1, left : right + 1]
    # Shrinking averages. The original reads four pixels of many, and another picture can hide in those four.
    method = cv2.INTER_AREA if min(region.shape[:2]) > _SIDE else cv2.INTER_LINEAR
    # Squares of two pixels are averaged ten times faster than other sizes.
    while min(region.shape[:2]) >= 4 * _SIDE:
        rows, columns = (length // 2 for length in region.shape[:2])
        region = np.asarray(cv2.resize(region[: 2 * rows, : 2 * columns], (columns, rows), interpolation=method))
    crop = cv2.resize(region, (_SIDE, _SIDE), interpolation=method)
    return np.asarray(cv2.cvtColor(crop, cv2.COLOR_RGB2BGR), dtype=np.uint8)
