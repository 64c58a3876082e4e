"""Near copies: is this another photo of the face, or the same photo once more, coded again, cut or mirrored?

Two marks tell. Embeddings of the very same pixels are all but equal. And the fingerprint: signs of the low spatial frequencies
of the upright crop (after the DCT hash of Zauner, 2010), most of which stay when a photo is coded again. A mirror image is
turned back for it, several ways: its landmarks are found a little elsewhere. Figures: docs/adr/0028.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from app.domain.alignment import CROP_SIDE, aligned_crop
from app.domain.faces import Embedding, Pixels

#: Cosine of two embeddings from which on the photos count as one.
NEAR_COSINE: Final = 0.999
#: A fingerprint is made of so many frequencies each way, from a crop reduced to DCT_SIDE.
FREQUENCIES: Final = 24
DCT_SIDE: Final = 48
FINGERPRINT_BYTES: Final = FREQUENCIES * FREQUENCIES // 8
#: Of the 576 signs so many at most differ between copies; and between a photo and the best of its mirror image's turns.
NEAR_BITS: Final = 96
NEAR_MIRRORED_BITS: Final = 136
#: Pixels of the crop and degrees by which a mirror image is moved and turned, each way.
SHIFT: Final = 2.0
TURN: Final = 2.0
#: Deviation of luminance (of 255) under which a crop shows nothing to take a fingerprint of.
FLAT: Final = 2.0
#: How many directions a face is sorted by into buckets.
BUCKET_BITS: Final = 16
#: Of a picture's rows every so many are hashed. Two photos of a camera differ in the noise of each row, and all rows of a large
#: photo take 8 ms.
DIGEST_ROWS: Final = 4

_Crop = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Likeness:
    """What of a photo tells its copies: the face's embedding (d,) and the crop's fingerprint; None of a flat crop.

    mirrors: fingerprints of the mirror image, of a photo that has just come; they are not kept.
    """

    embedding: Embedding
    fingerprint: bytes | None
    mirrors: tuple[bytes, ...] = ()


def likeness(pixels: Pixels, landmarks: npt.NDArray[np.float32], embedding: Embedding) -> Likeness:
    """All that tells whether a photo that has just come is a copy; some milliseconds."""
    crop = _reduced(pixels, landmarks)
    if crop is None:
        return Likeness(embedding, None)
    turned = np.ascontiguousarray(crop[:, ::-1])
    return Likeness(embedding, _signs(crop), tuple(_signs(_moved(turned, *way)) for way in _WAYS))


def picture_digest(pixels: Pixels) -> bytes:
    """SHA-256 of a picture as it was decoded, upright. The same file gives the same one, whatever lies behind its picture.

    Another EXIF block, another container of the same pixels, or bytes at the end do not change it.
    """
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels[::DIGEST_ROWS]).data)
    return digest.digest()


def fingerprint(pixels: Pixels, landmarks: npt.NDArray[np.float32]) -> bytes | None:
    """The upright face's fingerprint, FINGERPRINT_BYTES long; None where there is nothing to see."""
    crop = _reduced(pixels, landmarks)
    return None if crop is None else _signs(crop)


def bits_between(one: bytes, other: bytes) -> int:
    """How many signs of two fingerprints differ."""
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()


def is_near_copy(new: Likeness, known: Likeness) -> bool:
    """Whether a photo that has just come is a known one, as far as either mark can tell."""
    if float(new.embedding @ known.embedding) >= NEAR_COSINE:
        return True
    if new.fingerprint is None or known.fingerprint is None:
        return False
    mark = known.fingerprint
    return bits_between(new.fingerprint, mark) <= NEAR_BITS or any(
        bits_between(mirror, mark) <= NEAR_MIRRORED_BITS for mirror in new.mirrors
    )


def bucket(embedding: Embedding, seed: bytes) -> int:
    """Which of 2^16 parts of the space the face lies in, cut by secret planes: copies mostly share one, strangers do not.

    seed: of the planes (Charikar, 2002: two faces at an angle share a part with probability (1 - angle/pi)^16).
    """
    return int.from_bytes(np.packbits(_planes(seed, len(embedding)) @ embedding > 0).tobytes(), "big")


@lru_cache(maxsize=8)
def _planes(seed: bytes, dimension: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(list(seed)).standard_normal((BUCKET_BITS, dimension), np.float32)


def _reduced(pixels: Pixels, landmarks: npt.NDArray[np.float32]) -> _Crop | None:
    luminance = cv2.cvtColor(aligned_crop(pixels, landmarks), cv2.COLOR_RGB2GRAY)
    if float(luminance.std()) < FLAT:
        return None
    return cv2.resize(luminance, (DCT_SIDE, DCT_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)


def _signs(crop: _Crop) -> bytes:
    waves = cv2.dct(crop)[:FREQUENCIES, :FREQUENCIES]
    waves[0, 0] = 0  # how bright it is
    return np.packbits(waves > 0).tobytes()


_STEPS: Final = (0, -1, 1)
_WAYS: Final = tuple(product(_STEPS, repeat=3))


def _moved(crop: _Crop, right: int, down: int, turn: int) -> _Crop:
    """The crop moved by so many steps and turned about its centre."""
    matrix = cv2.getRotationMatrix2D((DCT_SIDE / 2, DCT_SIDE / 2), turn * TURN, 1)
    step = SHIFT * DCT_SIDE / CROP_SIDE
    matrix[0, 2] += right * step
    matrix[1, 2] += down * step
    moved = cv2.warpAffine(crop, matrix, (DCT_SIDE, DCT_SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(moved, np.float32)
