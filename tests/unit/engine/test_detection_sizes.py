"""SCRFD searches at several sizes. Which of them decides."""

from types import SimpleNamespace

import numpy as np
import pytest

from app.domain.faces import Face
from app.engine.detectors import ScrfdDetector

SIDE = 1000
PIXELS = np.zeros((SIDE, SIDE, 3), np.uint8)


def face(side: float, score: float) -> Face:
    return Face((100.0, 100.0, side, side), np.zeros((5, 2), np.float32), score)


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> ScrfdDetector:
    """Without a network: the tests say what each search finds."""
    monkeypatch.setattr(
        "app.engine.detectors.importlib", SimpleNamespace(import_module=lambda _: SimpleNamespace(SCRFD=_Network))
    )
    return ScrfdDetector(None, (320, 640, 160))  # type: ignore[arg-type] # there is no network


class _Network:
    def __init__(self, **_: object) -> None:
        """Takes what SCRFD's class takes."""


def searches(monkeypatch: pytest.MonkeyPatch, detector: ScrfdDetector, found: dict[int, list[Face]]) -> list[int]:
    asked: list[int] = []

    def at(_: object, size: int) -> list[Face]:
        asked.append(size)
        return found[size]

    monkeypatch.setattr(detector, "_at", at)
    return asked


def test_small_faces_have_the_landmarks_of_the_largest_search(
    detector: ScrfdDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches(monkeypatch, detector, {320: [face(150, 0.7)], 640: [face(150, 0.8)], 160: [face(150, 0.6)]})
    assert detector.detect(PIXELS)[0].detection_score == 0.8


def test_a_face_that_fills_the_photo_is_found_by_the_smallest_search(
    detector: ScrfdDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches(monkeypatch, detector, {320: [face(50, 0.5)], 640: [], 160: [face(900, 0.8)]})
    assert [one.box[2] for one in detector.detect(PIXELS)] == [900]


def test_a_large_face_ends_the_search(detector: ScrfdDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = searches(monkeypatch, detector, {320: [face(400, 0.8)]})
    detector.detect(PIXELS)
    assert asked == [320]
