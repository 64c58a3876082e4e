"""Quality: what spoils a photo must show, and only that."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.alignment import TEMPLATE, aligned_crop, similarity_to_template
from app.domain.faces import Face, Pixels
from app.domain.quality import head_pose, judge, measure
from tests.support.photos import ASTRONAUT, pixels_of

PORTRAIT = pixels_of(ASTRONAUT)
#: Where SCRFD sees her.
LANDMARKS = np.array([[206, 109], [247, 111], [231, 137], [205, 150], [243, 152]], dtype=np.float32)
FACE = Face((175.0, 65.0, 92.0, 120.0), LANDMARKS, 0.9)
CONTRACT_FIELDS = {"score", "sharpness", "brightness", "yaw", "pitch", "roll", "face_size", "issues"}


def codes(pixels: Pixels, level: str = "standard", length: float | None = None) -> set[str]:
    report = measure(pixels, FACE, length, usual_length=(19.0, 24.0, 27.0))
    return {advice.code for advice in judge(report, level)}  # type: ignore[arg-type]


def turned(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    head = np.array([[-0.5, 0, 0], [0.5, 0, 0], [0, 0.57, 0.44], [-0.414, 1.155, 0.13], [0.414, 1.155, 0.13]])
    y, p, r = np.radians([yaw, pitch, roll])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(p), np.sin(p)], [0, -np.sin(p), np.cos(p)]])
    flat = (head @ (about_x @ about_y).T)[:, :2]
    about_z = np.array([[np.cos(r), np.sin(r)], [-np.sin(r), np.cos(r)]])
    return (flat @ about_z * 50 + 100).astype(np.float32)


def test_a_good_photo_passes_and_has_the_contracts_fields() -> None:
    report = measure(PORTRAIT, FACE, 24.0, usual_length=(19.0, 24.0, 27.0))
    assert set(report.model_dump()) == CONTRACT_FIELDS
    assert judge(report, "standard") == ()
    assert 0.4 < report.score <= 1
    assert report.face_size == 92


def test_h26_strong_blur_is_refused() -> None:
    assert "sharpness" in codes(cv2.GaussianBlur(PORTRAIT, (0, 0), 6))


def test_h26_a_black_photo_is_refused() -> None:
    assert {"under-exposure", "dynamic-range"} <= codes((PORTRAIT * 0.04).astype(np.uint8))


def test_h26_an_overexposed_photo_is_refused() -> None:
    assert "over-exposure" in codes(np.clip(PORTRAIT.astype(int) * 3 + 120, 0, 255).astype(np.uint8))


def test_h26_one_even_colour_is_refused() -> None:
    assert {"sharpness", "dynamic-range"} <= codes(np.full_like(PORTRAIT, 140))


def test_a_short_raw_vector_is_refused_where_the_usual_length_is_known() -> None:
    assert "unified-quality" in codes(PORTRAIT, length=15.0)
    assert "unified-quality" not in codes(PORTRAIT, length=19.0)
    assert judge(measure(PORTRAIT, FACE, 15.0), "standard") == ()


def test_a_longer_raw_vector_never_scores_lower() -> None:
    found = [measure(PORTRAIT, FACE, length, usual_length=(19.0, 24.0, 27.0)).score for length in (16, 18, 20, 22, 26)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_nothing_is_refused_when_quality_is_off() -> None:
    assert codes(np.zeros_like(PORTRAIT), "off", 1.0) == set()


def test_what_standard_refuses_strict_refuses_too() -> None:
    for spoiled in (
        PORTRAIT,
        cv2.GaussianBlur(PORTRAIT, (0, 0), 3),
        (PORTRAIT * 0.1).astype(np.uint8),
        np.zeros_like(PORTRAIT),
    ):
        assert codes(spoiled, "standard") <= codes(spoiled, "strict")


def test_every_issue_of_the_report_is_what_strict_refuses() -> None:
    report = measure((PORTRAIT * 0.15).astype(np.uint8), FACE)
    assert report.issues
    assert {advice.code for advice in judge(report, "strict")} == set(report.issues)
    assert all(advice.field == "photo" and advice.message for advice in judge(report, "strict"))


@given(st.floats(-40, 40), st.floats(-30, 30))
def test_the_pose_of_a_rigid_head_is_found(yaw: float, pitch: float) -> None:
    found_yaw, found_pitch, _ = head_pose(turned(yaw, pitch))
    assert found_yaw == pytest.approx(yaw, abs=12)
    assert found_pitch == pytest.approx(pitch, abs=12)


@given(st.floats(-170, 170))
def test_roll_is_found_and_does_not_disturb_the_rest(roll: float) -> None:
    yaw, pitch, found = head_pose(turned(20, 10, roll))
    assert found == pytest.approx(roll + head_pose(turned(20, 10))[2], abs=0.5) or abs(abs(found - roll) - 360) < 5
    assert yaw == pytest.approx(head_pose(turned(20, 10))[0], abs=0.5)
    assert pitch == pytest.approx(head_pose(turned(20, 10))[1], abs=0.5)


def test_a_nose_to_the_right_of_the_image_is_a_positive_yaw() -> None:
    to_the_right = TEMPLATE.copy()
    to_the_right[2, 0] += 10
    assert head_pose(to_the_right)[0] > 10


@given(st.floats(-180, 180), st.floats(0.2, 8), st.floats(-500, 500), st.floats(-500, 500))
def test_alignment_undoes_any_turn_scale_and_shift(angle: float, scale: float, x: float, y: float) -> None:
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = (TEMPLATE @ turn.T + np.array([x, y])).astype(np.float32)
    matrix = similarity_to_template(moved)
    assert moved @ matrix[:, :2].T + matrix[:, 2] == pytest.approx(TEMPLATE, abs=0.05)


def test_landmarks_in_one_point_cannot_be_aligned() -> None:
    with pytest.raises(ValueError, match="one point"):
        aligned_crop(PORTRAIT, np.full((5, 2), 7, dtype=np.float32))
