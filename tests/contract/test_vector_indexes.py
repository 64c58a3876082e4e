"""What every index of vectors promises, asked of each of them, with numpy's float64 as the judge."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.vectors import ExactIndex, Hits, Ids, VectorIndex, Vectors

MakeIndex = Callable[[int], VectorIndex]
#: Reported scores are float32, and each index may round once.
ROUNDING = 1e-6


@pytest.fixture(params=[ExactIndex])
def make_index(request: pytest.FixtureRequest) -> MakeIndex:
    make: MakeIndex = request.param
    return make


def unit(rows: npt.ArrayLike) -> Vectors:
    values = np.asarray(rows, np.float64)
    scaled: Vectors = (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)
    return scaled


def random_vectors(count: int, dimension: int, seed: int) -> Vectors:
    return unit(np.random.default_rng(seed).normal(size=(count, dimension)))


def ids_of(*ids: int) -> Ids:
    return np.array(ids, np.int64)


def cosines(queries: Vectors, vectors: Vectors) -> npt.NDArray[np.float64]:
    return queries.astype(np.float64) @ vectors.astype(np.float64).T


def assert_ordered(hits: Hits) -> None:
    assert hits.ids.dtype == np.int64
    assert hits.scores.dtype == np.float32
    assert hits.ids.shape == hits.scores.shape
    assert np.array_equal(np.lexsort((hits.ids, -hits.scores)), np.arange(len(hits.ids)))


def test_an_empty_index_finds_nothing(make_index: MakeIndex) -> None:
    index = make_index(8)
    queries = random_vectors(3, 8, seed=1)
    assert len(index) == 0
    assert index.dimension == 8
    for found in (index.search(queries, 5), index.range(queries, -1.0)):
        assert [len(hits.ids) for hits in found] == [0, 0, 0]
    assert index.remove(ids_of(1, 2)) == 0


def test_no_queries_bring_no_hits(make_index: MakeIndex) -> None:
    index = make_index(8)
    index.add(np.arange(50), random_vectors(50, 8, seed=1))
    nothing = np.empty((0, 8), np.float32)
    assert index.search(nothing, 3) == []
    assert index.range(nothing, 0.0) == []


def test_no_vectors_may_be_added_and_removed(make_index: MakeIndex) -> None:
    index = make_index(8)
    index.add(ids_of(), np.empty((0, 8), np.float32))
    assert index.remove(ids_of()) == 0
    assert len(index) == 0


@pytest.mark.parametrize("count", [1, 40])  # FAISS multiplies matrices from 20 queries on
def test_the_nearest_are_found_with_their_cosines(make_index: MakeIndex, count: int) -> None:
    index, vectors = make_index(512), random_vectors(3_000, 512, seed=2)
    queries = unit(vectors[:count] + 0.03 * np.random.default_rng(3).normal(size=(count, 512)))
    index.add(np.arange(3_000) * 10 - 7, vectors)
    truth = cosines(queries, vectors)
    for position, hits in enumerate(index.search(queries, 5)):
        assert_ordered(hits)
        assert hits.ids.tolist() == (np.argsort(-truth[position])[:5] * 10 - 7).tolist()
        assert hits.scores == pytest.approx(np.sort(truth[position])[::-1][:5], abs=ROUNDING)


def test_fewer_vectors_than_asked_for_are_all_found(make_index: MakeIndex) -> None:
    index = make_index(8)
    index.add(np.arange(5), random_vectors(5, 8, seed=4))
    (hits,) = index.search(random_vectors(1, 8, seed=5), 100)
    assert set(hits.ids.tolist()) == set(range(5))
    assert_ordered(hits)


def test_a_score_exactly_at_the_threshold_is_found(make_index: MakeIndex) -> None:
    index = make_index(4)
    index.add(ids_of(1, 2, 3), unit([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, -1]]))
    query = unit([[1, 0, 0, 0]])
    assert index.range(query, 0.5)[0].ids.tolist() == [1, 2, 3]
    assert index.range(query, float(np.nextafter(np.float32(0.5), np.float32(1))))[0].ids.tolist() == [1]
    assert index.range(query, 1.0)[0].ids.tolist() == [1]
    assert index.range(query, 1.5)[0].ids.tolist() == []
    assert index.range(-query, -1.0)[0].ids.tolist() == [2, 3, 1]


def test_a_reported_score_is_its_own_threshold(make_index: MakeIndex) -> None:
    """Whoever asks again with a score that was reported gets that vector again: nothing is lost to rounding."""
    index, queries = make_index(128), random_vectors(30, 128, seed=7)
    index.add(np.arange(400), random_vectors(400, 128, seed=6))
    for position, hits in enumerate(index.search(queries, 20)):
        again = index.range(queries[position : position + 1], float(hits.scores[-1]))[0]
        assert again.ids.tolist() == hits.ids.tolist()
        assert again.scores.tolist() == hits.scores.tolist()


def test_equal_scores_come_by_rising_id_and_the_lowest_ids_fit_in(make_index: MakeIndex) -> None:
    index, same = make_index(64), random_vectors(1, 64, seed=8)
    shuffled = np.random.default_rng(9).permutation(200)
    index.add(shuffled, np.repeat(same, 200, axis=0))
    assert index.search(same, 7)[0].ids.tolist() == list(range(7))
    assert index.range(same, 0.9)[0].ids.tolist() == list(range(200))


def test_a_score_does_not_depend_on_the_batch_or_on_the_rest_of_the_index(make_index: MakeIndex) -> None:
    vectors, queries = random_vectors(300, 512, seed=10), random_vectors(64, 512, seed=11)
    small, large = make_index(512), make_index(512)
    small.add(ids_of(5), vectors[5:6])
    large.add(np.arange(300), vectors)
    for position, hits in enumerate(large.range(queries, -1.0)):
        among_many = hits.scores[hits.ids == 5]
        alone = small.search(queries[position : position + 1], 1)[0].scores
        assert among_many.tobytes() == alone.tobytes()


def test_no_score_leaves_the_range_of_a_cosine(make_index: MakeIndex) -> None:
    vectors = random_vectors(500, 512, seed=12) * np.float32(1.0005)
    index = make_index(512)
    index.add(np.arange(500), vectors)
    for hits in (*index.search(vectors, 1), *index.search(-vectors, 500)):
        assert hits.scores.max() <= 1
        assert hits.scores.min() >= -1


def test_adding_again_replaces_and_the_last_of_a_call_wins(make_index: MakeIndex) -> None:
    index = make_index(4)
    first, second, third = (unit([row]) for row in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]))
    index.add(ids_of(7), first)
    index.add(ids_of(7), first)
    assert len(index) == 1
    index.add(ids_of(7, 8, 7), np.concatenate([second, first, third]))
    assert len(index) == 2
    assert index.range(third, 0.9)[0].ids.tolist() == [7]
    assert index.range(first, 0.9)[0].ids.tolist() == [8]
    assert index.range(second, 0.9)[0].ids.tolist() == []


def test_removed_vectors_are_never_found_again(make_index: MakeIndex) -> None:
    index, vectors = make_index(32), random_vectors(500, 32, seed=13)
    index.add(np.arange(500), vectors)
    gone = np.arange(0, 500, 3)
    assert index.remove(np.concatenate([gone, gone, ids_of(10_000, -1)])) == len(gone)
    assert index.remove(gone) == 0
    assert len(index) == 500 - len(gone)
    for hits in index.range(vectors, -1.0):
        assert not np.isin(hits.ids, gone).any()
        assert len(hits.ids) == len(index)
    kept = np.setdiff1d(np.arange(500), gone)
    assert [hits.ids[0] for hits in index.search(vectors[kept], 1)] == kept.tolist()
    index.add(gone, vectors[gone])
    assert [hits.ids[0] for hits in index.search(vectors, 1)] == list(range(500))


def test_an_index_emptied_by_removals_can_be_filled_again(make_index: MakeIndex) -> None:
    index, vectors = make_index(16), random_vectors(10, 16, seed=14)
    for _ in range(3):
        index.add(np.arange(10), vectors)
        assert index.remove(np.arange(10)) == 10
        assert index.range(vectors[:1], -1.0)[0].ids.tolist() == []


def test_the_index_keeps_its_own_copy(make_index: MakeIndex) -> None:
    index, vectors, ids = make_index(16), random_vectors(5, 16, seed=15), np.arange(5)
    before = vectors.copy()
    index.add(ids, vectors)
    vectors[:] = vectors[::-1].copy()
    ids[:] = 99
    assert [hits.ids[0] for hits in index.search(before, 1)] == list(range(5))


@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_the_memory_layout_does_not_matter(make_index: MakeIndex, order: str) -> None:
    index, vectors = make_index(16), random_vectors(40, 16, seed=16)
    shaped = vectors if order == "C" else np.asfortranarray(vectors)
    if order == "strided":
        shaped = np.repeat(vectors, 2, axis=0)[::2]
    index.add(np.arange(40), shaped)
    assert [hits.ids[0] for hits in index.search(shaped, 1)] == list(range(40))


ONE = unit([[1, 0, 0, 0]])


@pytest.mark.parametrize(
    "vectors",
    [
        ONE.astype(np.float64),
        ONE.astype(np.float16),
        ONE[0],
        ONE[None],
        ONE[:, :3],
        ONE * np.float32(2),
        ONE * np.float32(0.99),
        ONE * np.float32(0),
        np.full((1, 4), np.nan, np.float32),
        np.array([[np.inf, 0, 0, 0]], np.float32),
        np.array([[1, np.nan, 0, 0]], np.float32),
        np.full((1, 4), 3e38, np.float32),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_vectors_that_are_no_unit_vectors_are_refused(make_index: MakeIndex, vectors: Vectors) -> None:
    index = make_index(4)
    index.add(ids_of(1), ONE)
    with pytest.raises(ValueError, match="vectors are"):
        index.add(ids_of(2), vectors)
    with pytest.raises(ValueError, match="vectors are"):
        index.search(vectors, 1)
    with pytest.raises(ValueError, match="vectors are"):
        index.range(vectors, 0.5)
    assert len(index) == 1


def test_ids_that_do_not_fit_are_refused(make_index: MakeIndex) -> None:
    index = make_index(4)
    for wrong in (np.array([1], np.int32), np.array([1.0]), np.array([[1]]), np.array(1)):
        with pytest.raises(ValueError, match="ids"):
            index.add(wrong, ONE)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="ids"):
            index.remove(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 ids came with 1 vectors"):
        index.add(ids_of(1, 2), ONE)


def test_questions_without_sense_are_refused(make_index: MakeIndex) -> None:
    index = make_index(4)
    for k in (0, -1):
        with pytest.raises(ValueError, match="k is"):
            index.search(ONE, k)
    for threshold in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="threshold"):
            index.range(ONE, threshold)
    with pytest.raises(ValueError, match="dimension"):
        make_index(0)


#: Small whole numbers before scaling: many exact ties, many repeats.
small_rows = st.lists(st.tuples(*[st.integers(-2, 2)] * 3).filter(any), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from(["add", "remove"]), st.lists(st.integers(0, 40), min_size=1, max_size=12), small_rows
        ),
        max_size=12,
    ),
    queries=small_rows,
    k=st.integers(1, 20),
    threshold=st.floats(-1, 1),
)
@pytest.mark.parametrize("make", [ExactIndex])
def test_after_any_changes_the_answers_are_those_of_a_plain_scan(
    make: MakeIndex,
    changes: list[tuple[str, list[int], list[tuple[int, int, int]]]],
    queries: list[tuple[int, int, int]],
    k: int,
    threshold: float,
) -> None:
    index, expected = make(3), dict[int, npt.NDArray[np.float32]]()
    for kind, ids, rows in changes:
        count = min(len(ids), len(rows))
        vectors = unit(rows[:count])
        if kind == "add":
            index.add(np.array(ids[:count], np.int64), vectors)
            expected.update(zip(ids[:count], vectors, strict=True))
        else:
            assert index.remove(np.array(ids, np.int64)) == len(set(ids) & set(expected))
            expected = {one: vector for one, vector in expected.items() if one not in ids}
    assert len(index) == len(expected)
    known = np.array(sorted(expected), np.int64)
    matrix = np.array([expected[one] for one in sorted(expected)], np.float32).reshape(-1, 3)
    probes = unit(queries)
    # float32 scores as every index reports them, so that ties are ties here too
    truth = np.clip(np.einsum("nd,qd->qn", matrix, probes, dtype=np.float64), -1, 1).astype(np.float32)
    for position, (nearest, above) in enumerate(
        zip(index.search(probes, k), index.range(probes, threshold), strict=True)
    ):
        order = np.lexsort((known, -truth[position]))
        assert nearest.ids.tolist() == known[order][:k].tolist()
        assert above.ids.tolist() == known[order][truth[position][order] >= np.float32(threshold)].tolist()
        assert nearest.scores.tolist() == truth[position][order][:k].tolist()


def test_threads_that_add_remove_and_search_never_see_half_a_change(make_index: MakeIndex) -> None:
    """Pairs of twins come and go together; a search must find both or none, and the residents always."""
    dimension, pairs, rounds = 64, 20, 60
    residents, twins = random_vectors(400, dimension, seed=20), random_vectors(pairs, dimension, seed=21)
    index = make_index(dimension)
    index.add(np.arange(400), residents)
    is_done = threading.Event()

    def come_and_go(worker: int) -> None:
        generator = np.random.default_rng(worker)
        for _ in range(rounds):
            pair = int(generator.integers(worker, pairs, endpoint=False) // 2 * 2 + worker)
            ids = ids_of(1_000 + pair, 2_000 + pair)
            index.add(ids, np.repeat(twins[pair : pair + 1], 2, axis=0))
            assert index.range(twins[pair : pair + 1], 0.99)[0].ids.tolist() == ids.tolist()
            assert index.remove(ids) == 2

    def look(worker: int) -> int:
        generator, searches = np.random.default_rng(100 + worker), 0
        while not is_done.is_set() or not searches:
            pair, resident = int(generator.integers(pairs)), int(generator.integers(400))
            assert index.range(twins[pair : pair + 1], 0.99)[0].ids.tolist() in ([], [1_000 + pair, 2_000 + pair])
            assert index.search(residents[resident : resident + 1], 3)[0].ids[0] == resident
            searches += 1
        return searches

    with ThreadPoolExecutor(6) as pool:
        lookers = [pool.submit(look, worker) for worker in range(4)]
        try:
            for writer in [pool.submit(come_and_go, worker) for worker in range(2)]:
                writer.result(timeout=60)
        finally:
            is_done.set()
        assert all(looker.result(timeout=60) for looker in lookers)
    assert len(index) == 400
