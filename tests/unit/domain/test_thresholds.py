"""Rates and scores: the laws that any impostor curve must keep."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.faces import ModelCard, RatePoint
from app.domain.thresholds import fmr_at, fmr_for_fpir, fpir_at, threshold_at_fmr, threshold_at_fpir
from app.engine.cards import known_recognisers


def card(*points: tuple[float, float]) -> ModelCard:
    curve = tuple(RatePoint(fmr, threshold) for fmr, threshold in points)
    return ModelCard(
        "made-up", "onnx", 128, "sha256:0", "none", commercial_use=True, impostor_curve=curve, source="test"
    )


ORDINARY = card((1e-1, 0.1), (1e-2, 0.18), (1e-3, 0.24), (1e-4, 0.3))

rates = st.floats(1e-11, 0.5)
scores = st.floats(-1, 1)
sizes = st.integers(0, 10**8)


@st.composite
def cards(draw: st.DrawFn) -> ModelCard:
    steps = draw(st.lists(st.tuples(st.floats(0.3, 3), st.floats(0.01, 0.15)), min_size=2, max_size=6))
    log_rate, score, points = 0.0, draw(st.floats(-0.3, 0.1)), []
    for fall, rise in steps:
        log_rate, score = log_rate - fall, score + rise
        points.append((math.exp(log_rate), score))
    return card(*points)


@given(cards(), scores, scores)
def test_a_higher_score_never_has_a_larger_rate(model: ModelCard, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert fmr_at(model, high) <= fmr_at(model, low)


@given(cards(), rates, rates)
def test_a_smaller_rate_never_has_a_lower_threshold(model: ModelCard, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert threshold_at_fmr(model, small) >= threshold_at_fmr(model, large)


@given(cards(), rates)
def test_score_and_rate_are_each_others_inverse(model: ModelCard, rate: float) -> None:
    score = threshold_at_fmr(model, rate)
    if -1 < score < 1:  # at the ends of the scale there is nothing left to tell apart
        assert fmr_at(model, score) == pytest.approx(rate, rel=1e-6)


@given(cards(), rates, sizes, sizes)
def test_a_larger_gallery_never_has_a_lower_threshold(model: ModelCard, rate: float, one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert threshold_at_fpir(model, rate, large) >= threshold_at_fpir(model, rate, small)


@given(st.floats(1e-6, 0.5), st.integers(1, 10**6))
def test_the_rate_of_a_search_comes_back_from_its_threshold(fpir: float, size: int) -> None:
    score = threshold_at_fpir(ORDINARY, fpir, size)
    if score < 1 and fmr_for_fpir(fpir, size) > 1e-12:
        assert fpir_at(ORDINARY, score, size) == pytest.approx(fpir, rel=1e-5)


@given(cards(), scores, sizes)
def test_every_rate_is_a_probability(model: ModelCard, score: float, size: int) -> None:
    assert 0 < fmr_at(model, score) <= 1
    assert 0 <= fpir_at(model, score, size) <= 1


def test_a_measured_point_is_met_exactly() -> None:
    assert threshold_at_fmr(ORDINARY, 1e-3) == pytest.approx(0.24)
    assert fmr_at(ORDINARY, 0.18) == pytest.approx(1e-2)


def test_between_two_points_the_logarithm_is_a_line() -> None:
    assert threshold_at_fmr(ORDINARY, math.sqrt(1e-3 * 1e-4)) == pytest.approx(0.27)


def test_beyond_the_last_point_the_tail_goes_on() -> None:
    assert threshold_at_fmr(ORDINARY, 1e-5) == pytest.approx(0.36)


def test_a_search_of_one_is_a_verification() -> None:
    assert fmr_for_fpir(1e-3, 1) == pytest.approx(1e-3)
    assert fmr_for_fpir(1e-3, 0) == pytest.approx(1e-3)


def test_a_thousand_strangers_share_the_rate() -> None:
    fmr = fmr_for_fpir(1e-3, 1000)
    assert 1 - (1 - fmr) ** 1000 == pytest.approx(1e-3)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0])
def test_what_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        threshold_at_fmr(ORDINARY, rate)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fmr_for_fpir(rate, 10)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="a number"):
        fmr_at(ORDINARY, math.nan)


def test_a_curve_that_does_not_fall_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fall"):
        threshold_at_fmr(card((1e-2, 0.2), (1e-1, 0.3)), 1e-3)
    with pytest.raises(ValueError, match="no impostor curve"):
        threshold_at_fmr(card((1e-2, 0.2)), 1e-3)


@pytest.mark.parametrize("known", known_recognisers(), ids=lambda known: known.title)
def test_every_built_in_curve_falls_and_says_where_it_was_measured(known: object) -> None:
    curve = known.impostor_curve  # type: ignore[attr-defined]
    assert all(later[0] < earlier[0] and later[1] > earlier[1] for earlier, later in pairwise(curve))
    assert known.source.startswith(("measured ", "provisional: "))  # type: ignore[attr-defined]
