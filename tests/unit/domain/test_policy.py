"""A gallery's rules as laws: what must hold for any score, any size, any mixture of look-alikes."""

from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.domain.policy import (
    SMALLEST_GALLERY,
    AttemptLimits,
    Decision,
    GalleryPolicy,
    LookAlike,
    Status,
    effective_size,
    margin_of,
    may_activate,
    thresholds_for,
    wait_before_attempt,
)
from app.domain.thresholds import fmr_at, fpir_at
from tests.fakes import CARD

rates = st.floats(1e-9, 0.5)
sizes = st.integers(0, 10**7)
scores = st.floats(-1, 1)
decisions: st.SearchStrategy[Decision | None] = st.sampled_from([None, *get_args(Decision)])
look_alikes = st.builds(LookAlike, st.uuids().map(str), st.sampled_from(get_args(Status)), decisions)
NOW = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
LIMITS = AttemptLimits(before_wait=5, wait=timedelta(seconds=30), before_reset=50)


@st.composite
def policies(draw: st.DrawFn) -> GalleryPolicy:
    by_hand = st.none() | st.floats(0.01, 0.99)
    return GalleryPolicy(
        verify_fmr=draw(rates), identify_fpir=draw(rates), dedup_fpir=draw(rates), verify_threshold=draw(by_hand),
        identify_threshold=draw(by_hand), dedup_threshold=draw(by_hand),
    )  # fmt: skip


@given(policies(), sizes, sizes)
def test_thresholds_never_fall_as_a_gallery_grows(policy: GalleryPolicy, one: int, other: int) -> None:
    small, large = sorted((one, other))
    before, after = thresholds_for(policy, CARD, small), thresholds_for(policy, CARD, large)
    assert after.identify >= before.identify
    assert after.dedup >= before.dedup
    assert after.verify == before.verify, "1:1 does not depend on how many others there are"


@given(policies(), sizes)
def test_a_later_photo_meets_a_stricter_threshold_than_a_selfie_and_an_anchor_a_looser_one(
    policy: GalleryPolicy, size: int
) -> None:
    known = thresholds_for(policy, CARD, size)
    assert known.anchor <= known.verify <= known.join
    if policy.verify_threshold is None and 1e-8 < policy.verify_fmr < 0.01:
        assert fmr_at(CARD, known.join) == pytest.approx(policy.verify_fmr / 10)
        assert fmr_at(CARD, known.anchor) == pytest.approx(policy.verify_fmr * 10)


def test_a_decision_covers_scores_up_to_where_strangers_are_a_hundred_times_as_rare() -> None:
    assert margin_of(CARD) == pytest.approx(0.08)
    assert fmr_at(CARD, 0.24 + margin_of(CARD)) == pytest.approx(fmr_at(CARD, 0.24) / 100)


@given(policies(), sizes, scores, scores)
def test_a_higher_score_never_weakens_an_answer(policy: GalleryPolicy, size: int, one: float, other: float) -> None:
    lower, higher = sorted((one, other))
    known = thresholds_for(policy, CARD, size)
    for threshold in (known.verify, known.identify, known.dedup):
        assert (higher >= threshold) >= (lower >= threshold)
    assert fmr_at(CARD, higher) <= fmr_at(CARD, lower)
    assert fpir_at(CARD, higher, size) <= fpir_at(CARD, lower, size)


@given(rates, rates, sizes)
def test_a_stricter_rate_never_gives_a_lower_threshold(one: float, other: float, size: int) -> None:
    strict, loose = sorted((one, other))
    strictly = thresholds_for(GalleryPolicy(verify_fmr=strict, identify_fpir=strict, dedup_fpir=strict), CARD, size)
    loosely = thresholds_for(GalleryPolicy(verify_fmr=loose, identify_fpir=loose, dedup_fpir=loose), CARD, size)
    assert strictly.verify >= loosely.verify
    assert strictly.identify >= loosely.identify
    assert strictly.dedup >= loosely.dedup


@given(policies(), sizes)
def test_a_threshold_set_by_hand_wins_over_the_rate(policy: GalleryPolicy, size: int) -> None:
    known = thresholds_for(policy, CARD, size)
    for by_hand, in_force in (
        (policy.verify_threshold, known.verify),
        (policy.identify_threshold, known.identify),
        (policy.dedup_threshold, known.dedup),
    ):
        assert by_hand is None or in_force == by_hand
    all_by_hand = None not in (policy.verify_threshold, policy.identify_threshold, policy.dedup_threshold)
    assert known.source == ("manual" if all_by_hand else "model_card")


@given(sizes)
def test_an_effective_size_is_a_power_of_two_that_everybody_fits_into(samples: int) -> None:
    size = effective_size(samples)
    assert size >= max(samples, SMALLEST_GALLERY)
    assert size & (size - 1) == 0
    assert size < 2 * max(samples, SMALLEST_GALLERY)


@pytest.mark.parametrize("samples", [127, 128, 129, 255, 256, 257, 1 << 20, (1 << 20) + 1])
def test_thresholds_move_only_when_a_gallery_doubles(samples: int) -> None:
    expected = {127: 128, 128: 128, 129: 256, 255: 256, 256: 256, 257: 512, 1 << 20: 1 << 20, (1 << 20) + 1: 1 << 21}
    assert effective_size(samples) == expected[samples]


@pytest.mark.parametrize(
    "field",
    ["verify_fmr", "identify_fpir", "dedup_fpir", "verify_threshold", "identify_threshold", "dedup_threshold"],
)
@pytest.mark.parametrize("value", [-1, 0, 1, -0.1, 1.1, float("nan"), float("inf"), float("-inf")])
def test_h72_a_policy_refuses_rates_and_thresholds_that_mean_nothing(field: str, value: float) -> None:
    with pytest.raises(ValidationError):
        GalleryPolicy.model_validate({field: value})


def test_a_policy_knows_no_other_fields() -> None:
    with pytest.raises(ValidationError):
        GalleryPolicy.model_validate({"verify_fnmr": 0.1})


@given(st.lists(look_alikes), st.lists(look_alikes))
def test_whoever_may_be_activated_meets_nobody_active_whom_nobody_called_distinct(
    own: list[LookAlike], pairs: list[LookAlike]
) -> None:
    if may_activate(own, pairs):
        assert not [p for p in pairs if p.status == "active" and p.decision != "distinct"]
        assert not [c for c in own if c.decision is None and c.status not in ("erased", "duplicate")]


@given(st.lists(look_alikes), st.lists(look_alikes), look_alikes)
def test_one_more_look_alike_never_makes_anybody_active(
    own: list[LookAlike], pairs: list[LookAlike], more: LookAlike
) -> None:
    if not may_activate(own, pairs):
        assert not may_activate([*own, more], pairs)
        assert not may_activate(own, [*pairs, more])


@given(st.lists(look_alikes), st.lists(look_alikes))
def test_calling_everybody_distinct_always_lets_activate(own: list[LookAlike], pairs: list[LookAlike]) -> None:
    def distinct(others: list[LookAlike]) -> list[LookAlike]:
        return [LookAlike(o.identity_id, o.status, "distinct") for o in others]

    assert may_activate(distinct(own), distinct(pairs))


@pytest.mark.parametrize("status", get_args(Status))
def test_an_undecided_candidate_stands_in_the_way_unless_it_is_erased_or_a_duplicate(status: Status) -> None:
    excused = status in ("erased", "duplicate")
    assert may_activate([LookAlike("a", status, None)], []) == excused


@pytest.mark.parametrize("status", get_args(Status))
@pytest.mark.parametrize("decision", [None, "duplicate"])
def test_a_recorded_look_alike_stands_in_the_way_while_it_is_active(status: Status, decision: Decision | None) -> None:
    assert may_activate([], [LookAlike("a", status, decision)]) == (status != "active")


@given(st.integers(0, 200), st.integers(0, 10**6))
def test_waiting_never_makes_an_attempt_harder(consecutive: int, seconds: int) -> None:
    failed = NOW
    now_wait = wait_before_attempt(consecutive, failed, NOW, LIMITS)
    later = wait_before_attempt(consecutive, failed, NOW + timedelta(seconds=seconds), LIMITS)
    assert (now_wait is None) == (later is None) == (consecutive >= LIMITS.before_reset)
    if now_wait is not None and later is not None:
        assert timedelta(0) <= later <= now_wait <= LIMITS.wait


@pytest.mark.parametrize(
    ("consecutive", "seconds_ago", "expected"),
    [(0, 0, 0), (4, 0, 0), (5, 0, 30), (5, 10, 20), (5, 30, 0), (49, 29, 1), (50, 10**6, None), (51, 0, None)],
)
def test_five_non_matches_cost_a_wait_and_fifty_an_officer(
    consecutive: int, seconds_ago: int, expected: int | None
) -> None:
    wait = wait_before_attempt(consecutive, NOW - timedelta(seconds=seconds_ago), NOW, LIMITS)
    assert wait == (None if expected is None else timedelta(seconds=expected))


def test_whoever_never_failed_need_not_wait() -> None:
    assert wait_before_attempt(0, None, NOW, LIMITS) == timedelta(0)
