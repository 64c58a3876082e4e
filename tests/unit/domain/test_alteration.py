"""Several signs show that a picture is altered. Ordinary photos show none of them."""

import cv2
import numpy as np
import pytest

from app.domain.alignment import aligned_crop
from app.domain.alteration import Signs, is_altered, signs
from app.domain.faces import Pixels
from tests.support.photos import ASTRONAUT, pixels_of
from tests.unit.domain.test_quality import LANDMARKS

CROP = aligned_crop(pixels_of(ASTRONAUT), LANDMARKS)
NOTHING = Signs(are_eyes_light=False, is_mostly_edges=False, is_only_edges=False, has_few_tones=False)


def edges(crop: Pixels) -> Pixels:
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY).astype(np.float32)
    strength = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    return np.repeat((255 - np.clip(strength, 0, 255)).astype(np.uint8)[..., None], 3, axis=2)


def posterised(crop: Pixels, tones: int) -> Pixels:
    return (crop.astype(int) * tones // 256 * 255 // (tones - 1)).astype(np.uint8)


def test_an_ordinary_photo_shows_no_sign() -> None:
    for gain, offset in ((1, 0), (0.4, 10), (0.7, 70), (1.2, 0)):
        assert not is_altered(signs(np.clip(CROP * gain + offset, 0, 255).astype(np.uint8)), 1.05)
    assert not is_altered(signs(np.ascontiguousarray(CROP[:, ::-1])), 1.05)


def test_a_flat_crop_shows_no_sign() -> None:
    assert signs(np.full_like(CROP, 128)) == NOTHING


def test_in_a_negative_eyes_are_light() -> None:
    assert signs(np.bitwise_not(CROP)).are_eyes_light


@pytest.mark.parametrize("tones", [2, 3, 4])
def test_a_posterised_picture_has_few_tones(tones: int) -> None:
    assert signs(posterised(CROP, tones)).has_few_tones


def test_an_edge_filtered_picture_is_altered_whatever_its_vector() -> None:
    assert is_altered(signs(edges(CROP)), None)


def test_no_other_sign_refuses_alone() -> None:
    few = Signs(are_eyes_light=False, is_mostly_edges=False, is_only_edges=False, has_few_tones=True)
    assert not is_altered(few, 1.2)
    assert not is_altered(few, None)
    assert is_altered(few, 1.05)
    assert not is_altered(NOTHING, 0.9)


def test_light_eyes_count_only_with_a_very_short_vector() -> None:
    light = Signs(are_eyes_light=True, is_mostly_edges=False, is_only_edges=False, has_few_tones=False)
    assert not is_altered(light, 1.05)
    assert not is_altered(light, None)
    assert is_altered(light, 0.95)
