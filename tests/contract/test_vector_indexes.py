"""What every index of vectors promises, asked of each of them, with numpy's float64 as the judge."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import storage.onebit
import storage.vectors
from storage.gpu import GpuIndex, can_use_gpu
from storage.layered import LayeredIndex
from storage.onebit import OneBitIndex
from storage.vectors import ExactIndex, Halves, Hits, Ids, VectorIndex, Vectors, halved
from storage.vectors import cosines as exact_scores

MakeIndex = Callable[[int], VectorIndex]
#: Reported scores are float32, and each index may round once.
ROUNDING = 1e-6


#: Those in which what was removed may come back.
REVIVING: dict[str, MakeIndex] = {
    "exact": ExactIndex,
    "faiss": partial(OneBitIndex, compiled=False),
    "compiled": OneBitIndex,
    # The processor's flat index in a card's place; and a card, where there is one.
    "gpu-logic": partial(GpuIndex, device=faiss.IndexFlatIP),
    **({"gpu": GpuIndex} if can_use_gpu() else {}),
}
#: Those in which a removal is final: nothing beneath, the tail compared exactly or soon scanned by its signs.
FINAL: dict[str, MakeIndex] = {
    "layered": LayeredIndex,
    "layered-onebit": partial(LayeredIndex, one_bit_above=5),
}
KINDS = REVIVING | FINAL


@pytest.fixture(params=KINDS)
def make_index(request: pytest.FixtureRequest) -> MakeIndex:
    return KINDS[request.param]


@pytest.fixture(params=REVIVING)
def make_reviving_index(request: pytest.FixtureRequest) -> MakeIndex:
    return REVIVING[request.param]


def unit(rows: npt.ArrayLike) -> Vectors:
    values = np.asarray(rows, np.float64)
    scaled: Vectors = (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)
    return scaled


def random_vectors(count: int, dimension: int, seed: int) -> Vectors:
    return unit(np.random.default_rng(seed).normal(size=(count, dimension)))


def random_halves(count: int, dimension: int, seed: int) -> Halves:
    return halved(random_vectors(count, dimension, seed))


def ids_of(*ids: int) -> Ids:
    return np.array(ids, np.int64)


def cosines(queries: Vectors, vectors: Halves) -> npt.NDArray[np.float64]:
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
    index.add(np.arange(50), random_halves(50, 8, seed=1))
    nothing = np.empty((0, 8), np.float32)
    assert index.search(nothing, 3) == []
    assert index.range(nothing, 0.0) == []


def test_no_vectors_may_be_added_and_removed(make_index: MakeIndex) -> None:
    index = make_index(8)
    index.add(ids_of(), np.empty((0, 8), np.float16))
    assert index.remove(ids_of()) == 0
    assert len(index) == 0


@pytest.mark.parametrize("count", [1, 40])  # FAISS multiplies matrices from 20 queries on
def test_the_nearest_are_found_with_their_cosines(make_index: MakeIndex, count: int) -> None:
    index, vectors = make_index(512), random_halves(3_000, 512, seed=2)
    queries = unit(vectors[:count] + 0.03 * np.random.default_rng(3).normal(size=(count, 512)))
    index.add(np.arange(3_000) * 10 - 7, vectors)
    truth = cosines(queries, vectors)
    for position, hits in enumerate(index.search(queries, 5)):
        assert_ordered(hits)
        assert hits.ids.tolist() == (np.argsort(-truth[position])[:5] * 10 - 7).tolist()
        assert hits.scores == pytest.approx(np.sort(truth[position])[::-1][:5], abs=ROUNDING)


def test_fewer_vectors_than_asked_for_are_all_found(make_index: MakeIndex) -> None:
    index = make_index(8)
    index.add(np.arange(5), random_halves(5, 8, seed=4))
    (hits,) = index.search(random_vectors(1, 8, seed=5), 100)
    assert set(hits.ids.tolist()) == set(range(5))
    assert_ordered(hits)


def test_a_score_exactly_at_the_threshold_is_found(make_index: MakeIndex) -> None:
    index = make_index(4)
    index.add(ids_of(1, 2, 3), halved(unit([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, -1]])))
    query = unit([[1, 0, 0, 0]])
    assert index.range(query, 0.5)[0].ids.tolist() == [1, 2, 3]
    assert index.range(query, float(np.nextafter(np.float32(0.5), np.float32(1))))[0].ids.tolist() == [1]
    assert index.range(query, 1.0)[0].ids.tolist() == [1]
    assert index.range(query, 1.5)[0].ids.tolist() == []
    assert index.range(-query, -1.0)[0].ids.tolist() == [2, 3, 1]


def test_a_reported_score_is_its_own_threshold(make_index: MakeIndex) -> None:
    """Whoever asks again with a score that was reported gets that vector again: nothing is lost to rounding."""
    index, queries = make_index(128), random_vectors(30, 128, seed=7)
    index.add(np.arange(400), random_halves(400, 128, seed=6))
    for position, hits in enumerate(index.search(queries, 20)):
        again = index.range(queries[position : position + 1], float(hits.scores[-1]))[0]
        assert again.ids.tolist() == hits.ids.tolist()
        assert again.scores.tolist() == hits.scores.tolist()


def test_equal_scores_come_by_rising_id_and_the_lowest_ids_fit_in(make_index: MakeIndex) -> None:
    index, same = make_index(64), random_vectors(1, 64, seed=8)
    shuffled = np.random.default_rng(9).permutation(200)
    index.add(shuffled, halved(np.repeat(same, 200, axis=0)))
    assert index.search(same, 7)[0].ids.tolist() == list(range(7))
    assert index.range(same, 0.9)[0].ids.tolist() == list(range(200))


def test_a_score_does_not_depend_on_the_batch_or_on_the_rest_of_the_index(make_index: MakeIndex) -> None:
    vectors, queries = random_halves(300, 512, seed=10), random_vectors(64, 512, seed=11)
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
    index.add(np.arange(500), halved(vectors))
    for hits in (*index.search(vectors, 1), *index.search(-vectors, 500)):
        assert hits.scores.max() <= 1
        assert hits.scores.min() >= -1


def test_scores_cut_to_one_are_equal_and_those_cut_to_minus_one_are_found(make_index: MakeIndex) -> None:
    """Rounding makes a vector a little too long: its product with itself is over 1, its score is not."""
    index, vector = make_index(64), random_vectors(1, 64, seed=24)
    lengths = np.array([1.0001, 1.0002, 1.0003, 1.0009], np.float32)[:, np.newaxis]
    index.add(np.arange(4), halved(vector * lengths))
    assert index.search(vector, 2)[0].ids.tolist() == [0, 1]
    assert index.range(-vector, -1.0)[0].ids.tolist() == [0, 1, 2, 3]
    assert index.search(-vector, 3)[0].ids.tolist() == [0, 1, 2]


def test_adding_again_replaces_and_the_last_of_a_call_wins(make_index: MakeIndex) -> None:
    index = make_index(4)
    first, second, third = (unit([row]) for row in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]))
    index.add(ids_of(7), halved(first))
    index.add(ids_of(7), halved(first))
    assert len(index) == 1
    index.add(ids_of(7, 8, 7), halved(np.concatenate([second, first, third])))
    assert len(index) == 2
    assert index.range(third, 0.9)[0].ids.tolist() == [7]
    assert index.range(first, 0.9)[0].ids.tolist() == [8]
    assert index.range(second, 0.9)[0].ids.tolist() == []


def test_removed_vectors_are_never_found_again(make_index: MakeIndex) -> None:
    index, vectors = make_index(64), random_vectors(500, 64, seed=13)
    index.add(np.arange(500), halved(vectors))
    gone = np.arange(0, 500, 3)
    assert index.remove(np.concatenate([gone, gone, ids_of(10_000, -1)])) == len(gone)
    assert index.remove(gone) == 0
    assert len(index) == 500 - len(gone)
    for hits in (*index.range(vectors, -1.0), *index.search(vectors, 500), index.exact_range(vectors[:1], -1.0)):
        assert not np.isin(hits.ids, gone).any()
        assert len(hits.ids) == len(index)
    kept = np.setdiff1d(np.arange(500), gone)
    assert [hits.ids[0] for hits in index.search(vectors[kept], 1)] == kept.tolist()
    assert index.within(0, 500)[0].tolist() == kept.tolist()
    assert np.flatnonzero(index.holds(np.arange(500))).tolist() == kept.tolist()


def test_what_was_removed_may_come_back(make_reviving_index: MakeIndex) -> None:
    index, vectors = make_reviving_index(64), random_vectors(500, 64, seed=13)
    index.add(np.arange(500), halved(vectors))
    gone = np.arange(0, 500, 3)
    index.remove(gone)
    index.add(gone, halved(vectors[gone]))
    assert [hits.ids[0] for hits in index.search(vectors, 1)] == list(range(500))


def test_an_index_emptied_by_removals_can_be_filled_again(make_reviving_index: MakeIndex) -> None:
    index, vectors = make_reviving_index(64), random_vectors(10, 64, seed=14)
    for _ in range(3):
        index.add(np.arange(10), halved(vectors))
        assert index.remove(np.arange(10)) == 10
        assert index.range(vectors[:1], -1.0)[0].ids.tolist() == []
        assert index.search(vectors[:1], 3)[0].ids.tolist() == []


def test_vectors_are_given_back_by_rising_id_as_they_came(make_index: MakeIndex) -> None:
    index, vectors = make_index(64), random_halves(40, 64, seed=17)
    shuffled = np.random.default_rng(18).permutation(40)
    for some in np.split(shuffled, 4):
        index.add(some * 2, vectors[some])
    index.remove(ids_of(10))
    ids, given = index.within(7, 40)
    expected = np.setdiff1d(np.arange(4, 21), ids_of(5))
    assert ids.tolist() == (expected * 2).tolist()
    assert given.dtype == np.float16
    assert given.tobytes() == vectors[expected].tobytes()
    assert len(index.within(81, 90)[0]) == 0
    assert index.holds(ids_of(8, 9, 10, 12, 500)).tolist() == [True, False, False, True, False]


def test_the_index_keeps_its_own_copy(make_index: MakeIndex) -> None:
    index, before, ids = make_index(64), random_vectors(5, 64, seed=15), np.arange(5)
    vectors = halved(before)
    index.add(ids, vectors)
    vectors[:] = vectors[::-1].copy()
    ids[:] = 99
    assert [hits.ids[0] for hits in index.search(before, 1)] == list(range(5))


@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_the_memory_layout_does_not_matter(make_index: MakeIndex, order: str) -> None:
    index, vectors = make_index(64), random_vectors(40, 64, seed=16)
    shaped, held = vectors, halved(vectors)
    if order == "F":
        shaped, held = np.asfortranarray(vectors), np.asfortranarray(held)
    if order == "strided":
        shaped, held = np.repeat(vectors, 2, axis=1)[:, ::2], np.repeat(held, 2, axis=1)[:, ::2]
    index.add(np.arange(40), held)
    assert [hits.ids[0] for hits in index.search(shaped, 1)] == list(range(40))


ONE = unit([[1, 0, 0, 0]])
NO_UNIT_VECTORS = [
    ONE.astype(np.float64),
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
]


@pytest.mark.parametrize("vectors", [*NO_UNIT_VECTORS, halved(ONE)])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_questions_that_are_no_unit_vectors_are_refused(make_index: MakeIndex, vectors: Vectors) -> None:
    index = make_index(4)
    index.add(ids_of(1), halved(ONE))
    with pytest.raises(ValueError, match="vectors are"):
        index.search(vectors, 1)
    with pytest.raises(ValueError, match="vectors are"):
        index.range(vectors, 0.5)
    with pytest.raises(ValueError, match=r"vectors are|one query"):
        index.exact_range(vectors, 0.5)


@pytest.mark.parametrize("vectors", [*(one.astype(np.float16) for one in NO_UNIT_VECTORS[1:-1]), ONE])
def test_vectors_that_are_no_unit_vectors_are_refused(make_index: MakeIndex, vectors: Halves) -> None:
    index = make_index(4)
    index.add(ids_of(1), halved(ONE))
    with pytest.raises(ValueError, match="vectors are"):
        index.add(ids_of(2), vectors)
    assert len(index) == 1


def test_ids_that_do_not_fit_are_refused(make_index: MakeIndex) -> None:
    index = make_index(4)
    for wrong in (np.array([1], np.int32), np.array([1.0]), np.array([[1]]), np.array(1)):
        with pytest.raises(ValueError, match="ids"):
            index.add(wrong, halved(ONE))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="ids"):
            index.remove(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 ids came with 1 vectors"):
        index.add(ids_of(1, 2), halved(ONE))


def test_questions_without_sense_are_refused(make_index: MakeIndex) -> None:
    index = make_index(4)
    for k in (0, -1):
        with pytest.raises(ValueError, match="k is"):
            index.search(ONE, k)
    for threshold in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="threshold"):
            index.range(ONE, threshold)
    with pytest.raises(ValueError, match="one query"):
        index.exact_range(np.repeat(ONE, 2, axis=0), 0.5)
    with pytest.raises(ValueError, match="dimension"):
        make_index(0)


#: Small whole numbers before scaling: many exact ties, many repeats.
small_rows = st.lists(st.tuples(*[st.integers(-2, 2)] * 3).filter(any), min_size=1, max_size=30)
#: Three dimensions turned into 64, for an index that looks at signs first needs a random direction.
TURN = np.linalg.qr(np.random.default_rng(30).normal(size=(64, 3)))[0].T


def turned(rows: npt.ArrayLike) -> Vectors:
    return unit(unit(rows).astype(np.float64) @ TURN)


def test_more_hits_than_a_card_finds_at_once_are_all_found(make_reviving_index: MakeIndex) -> None:
    index, same, other = make_reviving_index(64), random_halves(1, 64, seed=22), random_halves(1_500, 64, seed=23)
    index.add(np.arange(3_000), np.repeat(same, 3_000, axis=0))
    index.add(np.arange(1_500) + 5_000, other)
    index.remove(np.arange(100))
    query = unit(same)
    assert index.range(query, 0.9)[0].ids.tolist() == list(range(100, 3_000))
    assert index.search(query, 2_500)[0].ids.tolist() == list(range(100, 2_600))
    assert index.range(unit(other[:1]), 0.9)[0].ids.tolist() == [5_000]


@settings(max_examples=100, deadline=None)
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
@pytest.mark.parametrize("kind", KINDS)
def test_after_any_changes_the_answers_are_those_of_a_plain_scan(
    kind: str,
    changes: list[tuple[str, list[int], list[tuple[int, int, int]]]],
    queries: list[tuple[int, int, int]],
    k: int,
    threshold: float,
) -> None:
    index, expected, banned = KINDS[kind](64), dict[int, npt.NDArray[np.float16]](), set[int]()
    for change, ids, rows in changes:
        count = min(len(ids), len(rows))
        vectors = halved(turned(rows[:count]))
        if change == "add":
            index.add(np.array(ids[:count], np.int64), vectors)
            expected.update((one, v) for one, v in zip(ids[:count], vectors, strict=True) if one not in banned)
        else:
            assert index.remove(np.array(ids, np.int64)) == len(set(ids) & set(expected))
            expected = {one: vector for one, vector in expected.items() if one not in ids}
            banned.update(ids if kind in FINAL else [])
    assert len(index) == len(expected)
    known = np.array(sorted(expected), np.int64)
    matrix = np.array([expected[one] for one in sorted(expected)], np.float16).reshape(-1, 64)
    probes = turned(queries)
    # float32 scores as every index reports them, so that ties are ties here too
    products = matrix.astype(np.float64)[np.newaxis] * probes.astype(np.float64)[:, np.newaxis]
    truth = np.clip([[math.fsum(pair) for pair in query] for query in products.tolist()], -1, 1).astype(np.float32)
    truth = truth.reshape(len(probes), len(known))
    for position, (nearest, above) in enumerate(
        zip(index.search(probes, k), index.range(probes, threshold), strict=True)
    ):
        order = np.lexsort((known, -truth[position]))
        assert nearest.ids.tolist() == known[order][:k].tolist()
        assert nearest.scores.tolist() == truth[position][order][:k].tolist()
        assert above.ids.tolist() == known[order][truth[position][order] >= np.float32(threshold)].tolist()
        exactly = index.exact_range(probes[position : position + 1], threshold)
        assert exactly.ids.tolist() == above.ids.tolist()
        assert exactly.scores.tobytes() == above.scores.tobytes()


@settings(max_examples=30, deadline=None)
@given(
    dimension=st.sampled_from([8, 64, 65, 100, 127, 128, 200, 256, 512]),
    count=st.integers(1, 600),
    seed=st.integers(0, 2**32),
    threshold=st.floats(0.1, 0.8),
)
@pytest.mark.parametrize("kind", KINDS)
def test_any_dimension_gives_the_bits_of_the_exact_kind(
    kind: str, dimension: int, count: int, seed: int, threshold: float
) -> None:
    random = np.random.default_rng(seed)
    vectors = random_halves(count, dimension, seed)
    queries = unit(vectors[:3] + random.normal(size=(min(3, count), dimension)) * random.uniform(0, 2) / dimension**0.5)
    index, exact = KINDS[kind](dimension), ExactIndex(dimension)
    for part in np.array_split(np.arange(count), 3):
        index.add(part, vectors[part])
    exact.add(np.arange(count), vectors)
    truth = cosines(queries, vectors)
    for position, (found, expected) in enumerate(
        zip(index.range(queries, threshold), exact.range(queries, threshold), strict=True)
    ):
        assert_ordered(found)
        assert (found.ids.tobytes(), found.scores.tobytes()) == (expected.ids.tobytes(), expected.scores.tobytes())
        assert set(np.flatnonzero(truth[position] >= threshold + 1e-6)) <= set(found.ids.tolist())
        assert set(found.ids.tolist()) <= set(np.flatnonzero(truth[position] >= threshold - 1e-6))
    for found, expected in zip(index.search(queries, 4), exact.search(queries, 4), strict=True):
        assert (found.ids.tobytes(), found.scores.tobytes()) == (expected.ids.tobytes(), expected.scores.tobytes())


def test_threads_that_add_remove_and_search_never_see_half_a_change(make_reviving_index: MakeIndex) -> None:
    """Pairs of twins come and go together; a search must find both or none, and the residents always."""
    dimension, pairs, rounds = 64, 20, 60
    residents, twins = random_vectors(400, dimension, seed=20), random_vectors(pairs, dimension, seed=21)
    index = make_reviving_index(dimension)
    index.add(np.arange(400), halved(residents))
    is_done = threading.Event()

    def come_and_go(worker: int) -> None:
        generator = np.random.default_rng(worker)
        for _ in range(rounds):
            pair = int(generator.integers(worker, pairs, endpoint=False) // 2 * 2 + worker)
            ids = ids_of(1_000 + pair, 2_000 + pair)
            index.add(ids, halved(np.repeat(twins[pair : pair + 1], 2, axis=0)))
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


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An exact scan takes 20 rows at a time, and some milliseconds for them; set when the first of them are done."""
    has_begun = threading.Event()

    def slowly(vectors: Halves | Vectors, query: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        scores = exact_scores(vectors, query)
        has_begun.set()
        time.sleep(0.005)
        return scores

    for module in (storage.vectors, storage.onebit):
        monkeypatch.setattr(module, "cosines", slowly)
    monkeypatch.setattr(storage.vectors, "_ROWS_AT_ONCE", 20)
    monkeypatch.setattr(storage.onebit, "_BLOCK", 20)
    return has_begun


def test_a_removal_and_a_search_do_not_wait_for_the_end_of_an_exact_range(
    make_index: MakeIndex, slow_steps: threading.Event
) -> None:
    index, vectors = make_index(64), random_vectors(1_000, 64, seed=24)
    index.add(np.arange(1_000), halved(vectors))
    with ThreadPoolExecutor(1) as pool:
        exact = pool.submit(index.exact_range, vectors[:1], -1.0)
        assert slow_steps.wait(timeout=10)
        assert index.remove(ids_of(1)) == 1
        assert index.range(vectors[:1], 0.9)[0].ids.tolist() == [0]
        assert not exact.done()
        assert exact.result(timeout=30).ids.tolist() != []


def test_an_exact_range_finds_all_that_stays_and_nothing_that_is_gone_at_its_end(
    make_index: MakeIndex, slow_steps: threading.Event
) -> None:
    """Rows go from among those that it has seen and those that it has not, and others come between them."""
    index, vectors = make_index(64), random_vectors(1_200, 64, seed=25)
    index.add(np.arange(0, 2_000, 2), halved(vectors[:1_000]))
    gone = set[int]()
    with ThreadPoolExecutor(1) as pool:
        exact = pool.submit(index.exact_range, vectors[:1], -1.0)
        assert slow_steps.wait(timeout=10)
        for step in range(8):
            ids = np.array([2 * step, 1_000 + 2 * step, 1_998 - 2 * step])
            assert index.remove(ids) == 3
            gone.update(ids.tolist())
            index.add(ids_of(20 * step + 1, 1_999 - 20 * step), halved(vectors[1_000 + 2 * step : 1_002 + 2 * step]))
        assert not exact.done()
        found = exact.result(timeout=30).ids.tolist()
    assert len(found) == len(set(found))
    assert set(range(0, 2_000, 2)) - gone <= set(found)
    assert not gone & set(found)


def test_an_index_tells_its_memory_which_grows_with_it(make_index: MakeIndex) -> None:
    index, vectors = make_index(512), random_halves(3_000, 512, seed=26)
    assert index.bytes == 0
    index.add(np.arange(1_000), vectors[:1_000])
    before = index.bytes
    index.add(np.arange(1_000, 3_000), vectors[1_000:])
    assert index.bytes > 2 * before
    assert 3_000 * 2 * 512 < index.bytes < 3_000 * 5 * 512


def test_an_index_tells_its_size_while_it_is_being_changed(make_index: MakeIndex) -> None:
    """An event loop asks for it, and must not stand still."""
    index = make_index(64)
    index.add(np.arange(10), random_halves(10, 64, seed=27))
    with ThreadPoolExecutor(1) as pool, index._lock.writing():  # type: ignore[attr-defined]
        told = pool.submit(lambda: (len(index), index.dimension, index.bytes > 0))
        assert told.result(timeout=10) == (10, 64, True)
