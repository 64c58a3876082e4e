"""Near copies as laws: a copy is known again however it was made, another photo is none."""

import io

import cv2
import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.domain.alignment import CROP_SIDE, TEMPLATE
from app.domain.faces import Embedding, Pixels
from app.domain.near_copies import (
    FINGERPRINT_BYTES,
    NEAR_BITS,
    NEAR_COSINE,
    Likeness,
    bits_between,
    bucket,
    fingerprint,
    is_near_copy,
    likeness,
)

DIMENSION = 128
SEED = b"\x01" * 32
seeds = st.integers(0, 2**32 - 1)
marks = st.binary(min_size=FINGERPRINT_BYTES, max_size=FINGERPRINT_BYTES)


def picture(seed: int, side: int = 2 * CROP_SIDE) -> Pixels:
    """Something like a face to a fingerprint: strong in low frequencies, weak in high ones."""
    noise = np.random.default_rng(seed).normal(0, 255, (side, side)).astype(np.float32)
    layers = [cv2.GaussianBlur(noise, (0, 0), sigma) * sigma for sigma in (24, 12, 6, 3)]
    grey = np.sum(layers, axis=0)
    grey = 128 + 50 * (grey - grey.mean()) / grey.std()
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def landmarks_on(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Those of a face that fills the picture."""
    return (TEMPLATE * (pixels.shape[0] / CROP_SIDE)).astype(np.float32)


def mark_of(pixels: Pixels) -> bytes:
    """The picture's fingerprint."""
    mark = fingerprint(pixels, landmarks_on(pixels))
    assert mark is not None
    return mark


def unit(seed: int) -> Embedding:
    """A direction."""
    vector = np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)
    return vector / np.linalg.norm(vector)


def turned(embedding: Embedding, cosine: float, seed: int) -> Embedding:
    """An embedding at this cosine to the other."""
    aside = unit(seed)
    aside = aside - (aside @ embedding) * embedding
    aside /= np.linalg.norm(aside)
    return (cosine * embedding + np.sqrt(1 - cosine**2) * aside).astype(np.float32)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_h62_a_photo_coded_again_keeps_its_fingerprint(seed: int) -> None:
    pixels, buffer = picture(seed), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
    copy = np.asarray(Image.open(buffer).convert("RGB"))
    assert bits_between(mark_of(pixels), mark_of(copy)) <= NEAR_BITS


@given(seeds, st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=25, deadline=None)
def test_h62_a_mirrored_photo_is_known_again_although_its_face_is_found_a_little_elsewhere(
    seed: int, right: float, down: float
) -> None:
    pixels = picture(seed)
    mirror = np.ascontiguousarray(pixels[:, ::-1])
    landmarks = landmarks_on(pixels)[[1, 0, 2, 4, 3]]
    landmarks[:, 0] = pixels.shape[1] - 1 - landmarks[:, 0]
    found = landmarks + np.array([right, down], np.float32)  # on a picture of twice the crop's side
    assert bits_between(mark_of(pixels), fingerprint(mirror, found) or b"") > NEAR_BITS
    assert is_near_copy(likeness(mirror, found, unit(1)), Likeness(unit(2), mark_of(pixels)))


@given(seeds, seeds)
@settings(max_examples=50, deadline=None)
def test_two_pictures_have_two_fingerprints(one: int, other: int) -> None:
    if one != other:
        new, known = picture(one), Likeness(unit(2), mark_of(picture(other)))
        assert not is_near_copy(likeness(new, landmarks_on(new), unit(1)), known)


@given(marks, marks)
def test_the_distance_of_two_fingerprints_does_not_depend_on_their_order(one: bytes, other: bytes) -> None:
    assert bits_between(one, one) == 0
    assert bits_between(one, other) == bits_between(other, one)


def test_a_flat_picture_has_no_fingerprint_and_is_nobody_s_copy() -> None:
    flat = np.full((160, 160, 3), 128, np.uint8)
    assert fingerprint(flat, landmarks_on(flat)) is None
    nothing = likeness(flat, landmarks_on(flat), unit(1))
    assert nothing.fingerprint is None
    assert not is_near_copy(nothing, Likeness(unit(2), None))
    assert not is_near_copy(nothing, Likeness(unit(2), bytes(FINGERPRINT_BYTES)))


@given(seeds, st.floats(-1, 1))
def test_h62_embeddings_that_are_all_but_equal_are_one_photo_s(seed: int, cosine: float) -> None:
    one = unit(seed)
    other = turned(one, cosine, seed + 1)
    known = is_near_copy(Likeness(one, None), Likeness(other, None))
    assert known == (float(one @ other) >= NEAR_COSINE)


def test_h66_copies_of_a_face_share_a_bucket_and_strangers_do_not() -> None:
    buckets = {bucket(unit(seed), SEED) for seed in range(1000)}
    assert len(buckets) > 980
    assert all(0 <= number < 1 << 16 for number in buckets)
    shared = [bucket(unit(s), SEED) == bucket(turned(unit(s), 0.999, s + 9000), SEED) for s in range(500)]
    assert 0.7 < np.mean(shared) < 0.9, "(1 - angle/pi)^16 is 0.8"
    assert sum(bucket(unit(s), SEED) == bucket(unit(s), b"\x02" * 32) for s in range(100)) < 3
