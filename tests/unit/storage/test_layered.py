"""A published base with a tail answers as one exact index would."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.layered import LayeredIndex
from storage.onebit import OneBitIndex
from storage.rows import RowsWriter
from storage.vectors import ExactIndex, Halves, VectorIndex, Vectors, halved, widened

DIMENSION, BASE = 96, 400


def turned_vectors(count: int, seed: int) -> Halves:
    rows = np.random.default_rng(seed).normal(size=(count, DIMENSION))
    return halved((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


VECTORS = turned_vectors(1_000, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    with RowsWriter(path) as writer:
        writer.append(np.arange(BASE) * 2, VECTORS[:BASE])
    OneBitIndex.build(path)
    return path


def bases(folder: Path) -> list[VectorIndex]:
    exact = ExactIndex(DIMENSION)
    exact.add(np.arange(BASE) * 2, VECTORS[:BASE])
    return [exact, OneBitIndex.open(folder, DIMENSION), OneBitIndex.open(folder, DIMENSION, compiled=False)]


def assert_same(index: VectorIndex, oracle: VectorIndex, queries: Vectors) -> None:
    for ask in (lambda one: one.range(queries, 0.3), lambda one: one.search(queries, 5)):
        for found, expected in zip(ask(index), ask(oracle), strict=True):
            assert found.ids.tolist() == expected.ids.tolist()
            assert found.scores.tobytes() == expected.scores.tobytes()
    assert index.exact_range(queries[:1], 0.3).ids.tolist() == oracle.range(queries[:1], 0.3)[0].ids.tolist()
    (ids, vectors), (expected_ids, expected_vectors) = index.within(100, 900), oracle.within(100, 900)
    assert ids.tolist() == expected_ids.tolist()
    assert vectors.tobytes() == expected_vectors.tobytes()
    assert len(index) == len(oracle)


@settings(max_examples=25, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(["add", "remove"]), st.lists(st.integers(0, 999), min_size=1, max_size=60)),
        max_size=6,
    ),
    one_bit_above=st.sampled_from([5, 50, 5_000]),
)
def test_after_any_changes_it_answers_as_an_exact_index(
    folder: Path, changes: list[tuple[str, list[int]]], one_bit_above: int
) -> None:
    for base in bases(folder):
        index, oracle = LayeredIndex(DIMENSION, base, one_bit_above=one_bit_above), ExactIndex(DIMENSION)
        oracle.add(np.arange(BASE) * 2, VECTORS[:BASE])
        banned: set[int] = set()
        for change, listed in changes:
            ids = np.array(listed, np.int64)
            if change == "remove":
                assert index.remove(ids) == oracle.remove(ids)
                banned.update(listed)
            else:
                index.add(ids, VECTORS[ids])
                fresh = ids[[one not in banned and not (one % 2 == 0 and one < 2 * BASE) for one in listed]]
                oracle.add(fresh, VECTORS[fresh])
        assert_same(index, oracle, widened(VECTORS[::97]))


def test_what_the_base_holds_is_not_added_twice(folder: Path) -> None:
    for base in bases(folder):
        index = LayeredIndex(DIMENSION, base)
        index.add(np.array([2, 3]), VECTORS[[1, 999]])
        assert (len(index), index.tail_size) == (BASE + 1, 1)
        assert index.range(widened(VECTORS[1:2]), 0.9)[0].ids.tolist() == [2]


def test_a_removal_wins_over_a_later_addition(folder: Path) -> None:
    for base in bases(folder):
        index = LayeredIndex(DIMENSION, base)
        assert index.remove(np.array([2, 901])) == 1
        index.add(np.array([2, 901, 903]), VECTORS[[1, 501, 502]])
        assert index.removed == 2
        assert len(index) == BASE
        assert index.holds(np.array([2, 4, 901, 903])).tolist() == [False, True, False, True]
        assert index.search(widened(VECTORS[1:2]), 1)[0].ids.tolist() != [2]


def test_a_large_tail_is_scanned_by_its_signs_and_answers_the_same() -> None:
    index, oracle = LayeredIndex(DIMENSION, one_bit_above=100), ExactIndex(DIMENSION)
    for start in range(0, 1_000, 60):
        ids = np.arange(start, min(start + 60, 1_000))
        index.add(ids, VECTORS[ids])
        oracle.add(ids, VECTORS[ids])
        assert isinstance(index._tail, OneBitIndex if start >= 60 else ExactIndex)
        assert_same(index, oracle, widened(VECTORS[:5]))
    assert index.tail_size == 1_000


def test_a_base_of_another_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="base of 32"):
        LayeredIndex(DIMENSION, ExactIndex(32))


def test_a_search_beside_changes_sees_each_of_them_whole(folder: Path) -> None:
    """Groups of ten come, and go from base and tail at once; the tail changes its kind meanwhile."""
    index, is_done = LayeredIndex(DIMENSION, OneBitIndex.open(folder, DIMENSION), one_bit_above=100), threading.Event()
    query = widened(VECTORS[:1])

    def look() -> int:
        searches = 0
        while not is_done.is_set() or not searches:
            assert len(index.range(query, -1.0)[0].ids) % 10 == 0
            searches += 1
        return searches

    with ThreadPoolExecutor(3) as pool:
        lookers = [pool.submit(look) for _ in range(2)]
        try:
            for group in range(30):
                fresh = np.arange(10) + 2_000 + 10 * group
                index.add(fresh, VECTORS[400 + 10 * group : 410 + 10 * group])
                index.remove(np.concatenate([fresh[:5], np.arange(5) * 2 + 10 * group]))
        finally:
            is_done.set()
        assert all(looker.result(timeout=30) for looker in lookers)
    assert len(index) == BASE
