"""The crop that is compared shows what people see: every photo pixel under it counts."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from app.domain.alignment import CROP_SIDE, TEMPLATE, aligned_crop, hides_another_picture, sampled_crop
from app.domain.faces import Pixels
from app.domain.photo import PhotoReader
from tests.support.disguises import disguised, enlarged
from tests.support.photos import ASTRONAUT, HANKS, pixels_of

READER = PhotoReader()

#: Where the eyes, nose and mouth of the two photos are.
ASTRONAUT_LANDMARKS = np.array([[202, 104], [249, 105], [226, 134], [205, 153], [247, 154]], dtype=np.float32)
HANKS_LANDMARKS = np.array([[102, 114], [146, 113], [125, 139], [106, 158], [145, 157]], dtype=np.float32)


def scene(long_side: int) -> tuple[Pixels, np.ndarray]:
    shown = pixels_of(ASTRONAUT)
    return enlarged(shown, long_side), (ASTRONAUT_LANDMARKS * (long_side / 512)).astype(np.float32)


def other_face() -> Pixels:
    return aligned_crop(pixels_of(HANKS), HANKS_LANDMARKS)


def apart(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(int) - other).mean())


@pytest.mark.parametrize("long_side", [1600, 2400, 3100])
def test_a_face_hidden_between_the_pixels_is_averaged_away_and_noticed(long_side: int) -> None:
    photo, landmarks = scene(long_side)
    hidden = disguised(photo, other_face(), lambda _: landmarks)
    assert apart(sampled_crop(hidden, landmarks), other_face()) < 2, "the attack works on a crop that samples"
    seen = aligned_crop(photo, landmarks)
    assert apart(aligned_crop(hidden, landmarks), seen) < 0.35 * apart(other_face(), seen)
    assert hides_another_picture(hidden, landmarks)
    assert not hides_another_picture(photo, landmarks)


def test_a_hidden_face_is_noticed_after_jpeg() -> None:
    photo, landmarks = scene(3000)
    hidden = disguised(photo, other_face(), lambda _: landmarks)
    buffer = io.BytesIO()
    Image.fromarray(hidden).save(buffer, "JPEG", quality=92, subsampling=0)
    assert hides_another_picture(READER.decode(buffer.getvalue()).pixels, landmarks)


def test_noise_and_halftone_are_no_hidden_face() -> None:
    photo, landmarks = scene(2000)
    chance = np.random.default_rng(3)
    for strength in (10, 30, 60):
        noisy = np.clip(photo + chance.standard_normal(photo.shape, np.float32) * strength, 0, 255).astype(np.uint8)
        assert not hides_another_picture(noisy, landmarks)
    dots = ((np.indices(photo.shape[:2]).sum(axis=0) % 4) * 64)[..., None]
    assert not hides_another_picture(np.where(photo > dots, 255, 0).astype(np.uint8), landmarks)


def test_every_pixel_under_the_crop_has_about_the_same_weight() -> None:
    """A bright spot changes the crop by the same amount at every position."""
    landmarks = (TEMPLATE * 7.3 + 40).astype(np.float32)
    side = round(CROP_SIDE * 7.3 + 80)
    weights = []
    for x, y in np.random.default_rng(4).integers(300, 600, (40, 2)):
        photo = np.zeros((side, side, 3), np.uint8)
        photo[y - 3 : y + 4, x - 3 : x + 4] = 255  # 49 pixels: a single one would be lost in rounding
        weights.append(float(aligned_crop(photo, landmarks).sum()))
    assert max(weights) < 1.25 * min(weights)


def test_a_photo_no_finer_than_the_crop_is_read_as_arcface_was_taught() -> None:
    photo = pixels_of(ASTRONAUT)
    landmarks = ASTRONAUT_LANDMARKS
    small = np.asarray(cv2.resize(photo, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    landmarks = (landmarks * 0.7).astype(np.float32)
    assert np.array_equal(aligned_crop(small, landmarks), sampled_crop(small, landmarks))


def test_a_face_at_the_border_or_outside_is_black_there() -> None:
    photo = np.full((900, 900, 3), 200, np.uint8)
    crop = aligned_crop(photo, (TEMPLATE * 6 - 300).astype(np.float32))
    assert crop[:40, :40].max() == 0
    assert crop[70:, 70:].min() >= 199
    assert aligned_crop(photo, (TEMPLATE * 6 + 5000).astype(np.float32)).max() == 0


def test_averaging_moves_nothing() -> None:
    """A large photo and its own reduction give the same crop."""
    photo, landmarks = scene(2048)
    small = np.asarray(cv2.resize(photo, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    on_small = ((landmarks + 0.5) * 0.25 - 0.5).astype(np.float32)
    assert apart(aligned_crop(photo, landmarks), aligned_crop(small, on_small)) < 1.5
