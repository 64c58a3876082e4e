"""Calibration: pairs lie where they should, the margin is the smallest that finds them, and the figures are honest."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import calibration
from storage.calibration import (
    BAND,
    LARGEST_MARGIN,
    SMALLEST_MARGIN,
    SPARE_MARGIN,
    Pairs,
    Recall,
    calibrate,
    pairs_to_show,
    planted_pairs,
    probe_curve,
    real_pairs,
)
from storage.onebit import OneBitIndex, can_compile
from storage.rows import RowsWriter
from storage.vectors import Halves, cosines, halved, widened

DIMENSION = 128


def turned_vectors(count: int, seed: int) -> Halves:
    rows = np.random.default_rng(seed).normal(size=(count, DIMENSION))
    return halved((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


def built(folder: Path, vectors: Halves) -> Path:
    with RowsWriter(folder) as writer:
        writer.append(np.arange(len(vectors)) + 100, vectors)
    OneBitIndex.build(folder)
    return folder


def nobody_twice(vectors: Halves) -> np.ndarray:  # type: ignore[type-arg]
    return np.arange(len(vectors))


@pytest.mark.parametrize("threshold", [0.3, 0.46, 0.85])
def test_planted_pairs_lie_just_above_the_threshold(threshold: float) -> None:
    vectors = turned_vectors(500, seed=1)
    pairs = planted_pairs(vectors, threshold, 400, np.random.default_rng(2))
    scores = np.array([cosines(vectors[row : row + 1], query)[0] for query, row in zip(pairs.queries, pairs.rows)])  # noqa: B905
    assert np.all(scores >= np.float32(threshold))
    assert np.all(scores <= threshold + BAND + 1e-6)
    assert scores.std() > BAND / 5
    assert np.linalg.norm(pairs.queries, axis=1) == pytest.approx(1, abs=1e-6)


def test_real_pairs_are_the_samples_of_one_identity_that_reach_the_threshold() -> None:
    vectors = turned_vectors(60, seed=3)
    alike = widened(vectors[:1]) + 0.05 * widened(vectors[1:2])
    vectors[[10, 40]] = halved(alike / np.linalg.norm(alike))
    people = np.arange(60)
    people[[0, 10, 40, 59]] = 7  # and row 7 itself, which is nothing like them
    pairs = real_pairs(vectors, people, 0.5, np.random.default_rng(4))
    found = {
        frozenset((int(np.argmax(widened(vectors) @ query)), row))
        for query, row in zip(pairs.queries, pairs.rows.tolist(), strict=True)
    }
    assert len(pairs) == 3
    assert {row for pair in found for row in pair} <= {0, 10, 40}


def test_real_pairs_are_not_more_than_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST_REAL_PAIRS", 25)
    same = np.repeat(turned_vectors(1, seed=5), 50, axis=0)
    assert len(real_pairs(same, np.zeros(50, np.int64), 0.5, np.random.default_rng(6))) == 25


def test_no_miss_of_six_thousand_bounds_the_recall() -> None:
    assert Recall(6_000, 0).lower_bound == pytest.approx(0.9995, abs=1e-5)
    assert Recall(6_000, 0).lower_bound >= 0.9995
    # Clopper and Pearson's own way: quantiles of the beta distribution, from tables
    assert Recall(100, 5).lower_bound == pytest.approx(0.8977, abs=1e-4)
    assert Recall(10, 10).lower_bound == 0


@given(pairs=st.integers(1, 5_000), misses=st.integers(0, 200))
def test_more_misses_lower_the_bound_and_it_lies_below_the_share(pairs: int, misses: int) -> None:
    misses = min(misses, pairs)
    bound = Recall(pairs, misses).lower_bound
    assert 0 <= bound <= 1 - misses / pairs
    assert misses == 0 or bound < Recall(pairs, misses - 1).lower_bound


@pytest.mark.parametrize("target", [0.9, 0.999, 0.9995])
def test_so_many_pairs_show_a_target(target: float) -> None:
    count = pairs_to_show(target)
    assert Recall(count, 0).lower_bound >= target > Recall(count - 1, 0).lower_bound


def test_the_margin_found_misses_no_fresh_pair(tmp_path: Path) -> None:
    vectors = turned_vectors(3_000, seed=7)
    told: list[tuple[int, int]] = []
    found = calibrate(
        built(tmp_path, vectors), DIMENSION, people=nobody_twice(vectors), threshold=0.5, target=0.998, pairs=500,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    count = pairs_to_show(0.998)
    assert set(found.recall) == ({"faiss", "compiled"} if can_compile() else {"faiss"})
    assert all(recall == Recall(count, 0) and recall.lower_bound >= 0.998 for recall in found.recall.values())
    assert (found.lists, found.probes) == (1, None)
    assert 5.0 == SMALLEST_MARGIN + SPARE_MARGIN <= found.margin.faiss <= LARGEST_MARGIN
    assert told[-1] == (count, count)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    fresh = planted_pairs(vectors, 0.5, 300, np.random.default_rng(8))
    for compiled in (True, False):
        index = OneBitIndex.open(tmp_path, DIMENSION, margin=found.margin, compiled=compiled)
        for hits, row in zip(index.range(fresh.queries, 0.5), fresh.rows.tolist(), strict=True):
            assert row + 100 in hits.ids


def test_what_stays_missed_is_reported_and_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of other vectors' signs: no margin that is allowed finds the pairs."""
    vectors = turned_vectors(1_000, seed=9)
    monkeypatch.setattr(calibration, "LARGEST_MARGIN", -4.0)
    monkeypatch.setattr(calibration, "SMALLEST_MARGIN", -4.0)
    monkeypatch.setattr(calibration, "SPARE_MARGIN", 0.0)
    found = calibrate(
        built(tmp_path, vectors), DIMENSION, people=nobody_twice(vectors), threshold=0.5, target=0.99, pairs=300
    )
    for recall in found.recall.values():
        assert recall.misses > 10
        assert recall.lower_bound < 0.99


def test_the_real_pairs_of_the_gallery_are_asked_for_too(tmp_path: Path) -> None:
    vectors = np.repeat(turned_vectors(500, seed=10), 2, axis=0)
    found = calibrate(
        built(tmp_path, vectors), DIMENSION, people=np.repeat(np.arange(500), 2), threshold=0.5, target=0.99, pairs=300
    )
    assert all(recall == Recall(300 + 250, 0) for recall in found.recall.values())


def grouped(groups: int, each: int, seed: int) -> Halves:
    random = np.random.default_rng(seed)
    rows = np.repeat(random.normal(size=(groups, DIMENSION)), each, axis=0)
    rows += 0.1 * random.normal(size=rows.shape)
    return halved((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


def test_a_probe_curve_tells_groups_from_a_crowd() -> None:
    random = np.random.default_rng(11)
    apart, crowd = grouped(40, 50, seed=12), turned_vectors(2_000, seed=13)
    curves = [
        probe_curve(vectors, planted_pairs(vectors, 0.5, 500, random), lists=40, at=(0.95, 1.0))
        for vectors in (apart, crowd)
    ]
    assert curves[0].shares[0.95] < 0.25 < curves[1].shares[1.0]
    for curve in curves:
        assert 1 <= curve.probes[0.95] <= curve.probes[1.0] <= 40
        assert curve.shares[0.95] <= curve.shares[1.0] <= 1


def test_only_a_gallery_of_groups_is_divided_and_then_finds_its_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "DIVIDED_ABOVE", 1_000)
    monkeypatch.setattr(calibration, "can_compile", lambda: False)
    kinds = {"apart": grouped(40, 50, seed=14), "crowd": turned_vectors(2_000, seed=15)}
    for name, vectors in kinds.items():
        folder = tmp_path / name
        folder.mkdir()
        found = calibrate(
            built(folder, vectors), DIMENSION, people=nobody_twice(vectors), threshold=0.6, target=0.99, pairs=300
        )
        index = OneBitIndex.open(folder, DIMENSION, margin=found.margin, probes=found.probes)
        fresh: Pairs = planted_pairs(vectors, 0.6, 200, np.random.default_rng(16))
        missed = sum(
            row + 100 not in hits.ids
            for hits, row in zip(index.range(fresh.queries, 0.6), fresh.rows.tolist(), strict=True)
        )
        assert missed <= 1
        assert found.recall["faiss"].misses <= 1
        if name == "crowd":
            assert (found.lists, found.probes) == (1, None)
        else:
            assert found.lists > 1
            assert found.probes is not None
            assert found.probes < found.lists
