"""From a network's raw output to an embedding."""

import numpy as np
import numpy.typing as npt

from app.domain.faces import Embedding
from app.errors import Advice, LowQuality

#: A raw vector shorter than this has no direction; ordinary photos give 1.2 (dlib) to 25 (ArcFace).
MINIMUM_LENGTH = 1e-3


def unit_embedding(raw: npt.NDArray[np.float32], centring_mean: Embedding | None) -> tuple[Embedding, float]:
    """The unit vector, centred where the contract has a mean, and the raw vector's length.

    raw: (d,). Raises LowQuality when the vector is not finite or has no length: such a template would match anybody or
    nobody, so it is never made.
    """
    length = float(np.linalg.norm(raw))
    if not np.isfinite(length) or length < MINIMUM_LENGTH:
        raise _no_features()
    unit = raw / np.float32(length)
    if centring_mean is not None:
        centred = unit - centring_mean
        distance = float(np.linalg.norm(centred))
        if distance < MINIMUM_LENGTH:
            raise _no_features()
        unit = centred / np.float32(distance)
    return np.ascontiguousarray(unit, dtype=np.float32), length


def _no_features() -> LowQuality:
    advice = Advice("photo", "no-features", "Nothing of the face can be told apart. Take a new photo in even light.")
    return LowQuality("The face gives no usable features.", errors=(advice,))
