"""The join finds what numpy finds, by either way, and its scores are an index's."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import join
from storage.join import Joined, Way, is_compiled, pairs_above
from storage.vectors import Halves, cosines, halved

#: The extra `fast` is among what the tests install: without it the compiled way would go untested.
WAYS: list[Way] = ["matrix", "compiled"]
Pairs = set[tuple[int, int]]


def crowd(seed: int, count: int, dimension: int) -> Halves:
    """Unit vectors that point anywhere."""
    drawn = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return halved(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))


def lookalikes(seed: int, of: Halves, cosine: npt.NDArray[np.float32] | float) -> Halves:
    """To each row one at about this cosine, in a direction of its own."""
    own = of.astype(np.float32)
    other = crowd(seed, *of.shape).astype(np.float32)
    other -= np.sum(own * other, axis=1, keepdims=True) / np.sum(own * own, axis=1, keepdims=True) * own
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    share = np.reshape(np.asarray(cosine, np.float32), (-1, 1))
    mixed = share * own / np.linalg.norm(own, axis=1, keepdims=True) + np.sqrt(1 - share**2) * other
    return halved(mixed / np.linalg.norm(mixed, axis=1, keepdims=True))


def exact(
    left: Halves, right: Halves, threshold: float, *, same: bool = False
) -> tuple[Pairs, dict[tuple[int, int], float]]:
    """The oracle: all scores in float64, given as float32."""
    sums = left.astype(np.float64) @ right.astype(np.float64).T
    scores = np.clip(sums, -1, 1).astype(np.float32)
    rows = np.argwhere(scores >= np.float32(threshold))
    pairs = {(int(one), int(other)) for one, other in rows if not same or one < other}
    return pairs, {pair: float(scores[pair]) for pair in pairs}


def pairs_of(joined: Joined) -> Pairs:
    return set(zip(joined.rows_left.tolist(), joined.rows_right.tolist(), strict=True))


def assert_exact(joined: Joined, left: Halves, right: Halves, threshold: float, *, same: bool = False) -> None:
    pairs, scores = exact(left, right, threshold, same=same)
    assert pairs_of(joined) == pairs
    assert len(joined.scores) == len(pairs)
    named = zip(joined.rows_left.tolist(), joined.rows_right.tolist(), joined.scores.tolist(), strict=True)
    assert {(one, other): score for one, other, score in named} == scores


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count_left=st.integers(0, 70),
    count_right=st.integers(0, 300),
    dimension=st.sampled_from([64, 100, 128, 256, 512, 1000]),
    threshold=st.floats(0.2, 0.8),
)
def test_the_pairs_are_those_of_numpy(
    way: Way, seed: int, count_left: int, count_right: int, dimension: int, threshold: float
) -> None:
    left = crowd(seed, count_left, dimension)
    right = crowd(seed + 1, count_right, dimension)
    planted = min(count_left, count_right)
    right[:planted] = lookalikes(seed + 2, left[:planted], threshold + 0.02)
    assert_exact(pairs_above(left, right, threshold, way=way), left, right, threshold)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 300),
    dimension=st.sampled_from([64, 200, 512]),
    threshold=st.floats(0.2, 0.8),
)
def test_within_one_block_a_pair_is_named_once(
    way: Way, seed: int, count: int, dimension: int, threshold: float
) -> None:
    block = crowd(seed, count, dimension)
    half = count // 2
    block[half : 2 * half] = lookalikes(seed + 2, block[:half], threshold + 0.02)
    assert_exact(pairs_above(block, block, threshold, same=True, way=way), block, block, threshold, same=True)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dimension=st.integers(1, 70), threshold=st.floats(-1, 1))
def test_any_dimension_and_any_threshold_is_right(seed: int, dimension: int, threshold: float) -> None:
    left, right = crowd(seed, 20, dimension), crowd(seed + 1, 50, dimension)
    assert_exact(pairs_above(left, right, threshold), left, right, threshold)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threshold", [0.35, 0.46])
@pytest.mark.parametrize("dimension", [128, 256, 512])
def test_no_planted_pair_just_over_the_threshold_is_missed(way: Way, threshold: float, dimension: int) -> None:
    left = crowd(1, 3000, dimension)
    right = lookalikes(2, left, np.linspace(threshold, threshold + 0.1, len(left), dtype=np.float32))
    found = pairs_above(left, right, threshold, way=way)
    assert pairs_of(found) == exact(left, right, threshold)[0]
    assert len(found.scores) > 0.99 * len(left)


@pytest.mark.parametrize("way", WAYS)
def test_a_score_is_the_bits_of_an_index(way: Way) -> None:
    left = crowd(3, 50, 512)
    right = lookalikes(4, left, 0.6)
    joined = pairs_above(left, right, 0.5, way=way)
    asked = [cosines(right[[other]], left[one].astype(np.float32))[0] for one, other in sorted(pairs_of(joined))]
    assert joined.scores.tolist() == [float(score) for score in asked]
    assert joined.scores.dtype == np.float32


@pytest.mark.parametrize("way", WAYS)
def test_a_pair_at_the_very_threshold_is_in_and_one_below_it_is_not(way: Way) -> None:
    left = crowd(5, 200, 256)
    right = lookalikes(6, left, 0.5)
    scores = np.array([exact(left[[row]], right[[row]], -1)[1][0, 0] for row in range(200)], np.float32)
    threshold = float(np.sort(scores)[100])
    joined = pairs_above(left, right, threshold, way=way)
    assert threshold in joined.scores.tolist()
    over = pairs_above(left, right, float(np.nextafter(np.float32(threshold), np.float32(1))), way=way)
    assert len(over.scores) == len(joined.scores) - int(np.sum(scores == np.float32(threshold)))


def test_both_ways_give_the_same_and_in_the_same_order() -> None:
    block = crowd(7, 2500, 512)
    block[1200:2400] = lookalikes(8, block[:1200], 0.5)
    by_bits, by_products = (pairs_above(block, block, 0.45, same=True, way=way) for way in ("compiled", "matrix"))
    assert np.array_equal(by_bits.rows_left, by_products.rows_left)
    assert np.array_equal(by_bits.rows_right, by_products.rows_right)
    assert np.array_equal(by_bits.scores, by_products.scores)
    assert np.all(np.diff(by_bits.rows_left) >= 0)


@pytest.mark.parametrize("same", [False, True])
def test_where_most_pairs_pass_the_bits_the_rest_goes_to_products_of_matrices(
    same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "_STRIPE", 32)
    handed_over = []
    by_products = join._by_products

    def counted(left: Halves, right: Halves, least: float, *, same: bool) -> join._Pairs:
        handed_over.append(len(left))
        return by_products(left, right, least, same=same)

    monkeypatch.setattr(join, "_by_products", counted)
    left = crowd(9, 100, 128)
    right = left if same else crowd(10, 90, 128)
    joined = pairs_above(left, right, 0.1, same=same, way="compiled")
    assert handed_over == [68]
    assert_exact(joined, left, right, 0.1, same=same)


def test_far_more_pairs_than_there_is_room_for_at_first_are_all_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "_MOST_PASSING", 1.0)
    left = np.repeat(crowd(11, 1, 64), 300, axis=0)
    joined = pairs_above(left, left, 0.9, way="compiled")
    assert len(joined.scores) == 300 * 300


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spoilt", [np.nan, np.inf, 0.0, 2.0, 60_000.0])
def test_what_is_no_unit_vector_is_refused(way: Way, spoilt: float) -> None:
    left, right = crowd(12, 10, 64), crowd(13, 10, 64)
    right[7] = spoilt
    with pytest.raises(ValueError, match="unit length"):
        pairs_above(left, right, 0.5, way=way)


@pytest.mark.parametrize(
    ("left", "right", "threshold", "same"),
    [
        (crowd(0, 5, 64), crowd(1, 5, 65), 0.5, False),
        (crowd(0, 5, 64), crowd(1, 6, 64), 0.5, True),
        (crowd(0, 5, 64)[0], crowd(1, 5, 64), 0.5, False),
        (crowd(0, 5, 64).astype(np.float32), crowd(1, 5, 64), 0.5, False),
        (crowd(0, 5, 64), crowd(1, 5, 64), math.nan, False),
    ],
    ids=["dimensions", "not the same", "one row", "another type", "no threshold"],
)
def test_what_does_not_fit_is_refused(left: Halves, right: Halves, threshold: float, same: bool) -> None:
    with pytest.raises(ValueError):
        pairs_above(left, right, threshold, same=same)


def test_few_dimensions_go_to_products_of_matrices() -> None:
    assert not is_compiled(8)
    with pytest.raises(ValueError, match="no compiled join"):
        pairs_above(crowd(0, 5, 8), crowd(1, 5, 8), 0.5, way="compiled")


def test_without_numba_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    left = crowd(14, 100, 128)
    right = lookalikes(15, left, 0.6)
    fast = pairs_above(left, right, 0.5)
    monkeypatch.setattr(join, "_has_numba", lambda: False)
    plain = pairs_above(left, right, 0.5)
    assert np.array_equal(fast.rows_right, plain.rows_right)
    assert np.array_equal(fast.scores, plain.scores)
