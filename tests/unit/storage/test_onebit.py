"""The one-bit index: what it maps, what it refuses, and that no pair slips through its sieves."""

import math
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest

from storage.calibration import planted_pairs
from storage.onebit import (
    CODES_FILE,
    DEFAULT_MARGIN,
    Margin,
    OneBitIndex,
    can_compile,
    differing_signs,
    estimate_noise,
    sign_noise,
)
from storage.rows import IDS_FILE, VECTORS_FILE, RowsWriter
from storage.vectors import ExactIndex, Halves, Ids, VectorIndex, halved, widened

DIMENSION = 512


def turned_vectors(count: int, dimension: int, seed: int) -> Halves:
    rows = np.random.default_rng(seed).normal(size=(count, dimension))
    return halved((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


def built(folder: Path, ids: Ids, vectors: Halves, *, lists: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    with RowsWriter(folder) as writer:
        writer.append(ids, vectors)
    OneBitIndex.build(folder, lists=lists)
    return folder


@pytest.fixture(scope="module")
def vectors() -> Halves:
    return turned_vectors(6_000, DIMENSION, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vectors: Halves) -> Path:
    return built(tmp_path_factory.mktemp("index"), np.arange(6_000) * 3 + 5, vectors)


def exact_of(index: VectorIndex) -> ExactIndex:
    exact, every = ExactIndex(index.dimension), np.iinfo(np.int64)
    exact.add(*index.within(every.min, every.max))
    return exact


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("threshold", [0.2, 0.345, 0.46])
def test_of_planted_pairs_none_is_missed(folder: Path, vectors: Halves, threshold: float, compiled: bool) -> None:
    index = OneBitIndex.open(folder, DIMENSION, compiled=compiled)
    pairs = planted_pairs(vectors, threshold, 300, np.random.default_rng(2))
    exact = exact_of(index)
    for found, expected, row in zip(
        index.range(pairs.queries, threshold), exact.range(pairs.queries, threshold), pairs.rows.tolist(), strict=True
    ):
        assert row * 3 + 5 in found.ids
        assert (found.ids.tobytes(), found.scores.tobytes()) == (expected.ids.tobytes(), expected.scores.tobytes())


@pytest.mark.parametrize("dimension", [64, 100, 191, 256])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_mapped_index_of_any_dimension_answers_as_the_exact_one(
    tmp_path: Path, dimension: int, compiled: bool
) -> None:
    vectors = turned_vectors(2_000, dimension, seed=3)
    index = OneBitIndex.open(built(tmp_path, np.arange(2_000), vectors), dimension, compiled=compiled)
    exact, queries = exact_of(index), planted_pairs(vectors, 0.4, 20, np.random.default_rng(4)).queries
    for found, expected in zip(
        index.range(queries, 0.4) + index.search(queries, 7),
        exact.range(queries, 0.4) + exact.search(queries, 7),
        strict=True,
    ):
        assert (found.ids.tobytes(), found.scores.tobytes()) == (expected.ids.tobytes(), expected.scores.tobytes())


def test_the_compiled_scan_is_used_where_it_can_be(folder: Path) -> None:
    assert OneBitIndex(DIMENSION).uses_compiled == can_compile()
    assert OneBitIndex.open(folder, DIMENSION).uses_compiled == can_compile()
    assert not OneBitIndex.open(folder, DIMENSION, compiled=False).uses_compiled
    assert not OneBitIndex(32).uses_compiled


@pytest.mark.parametrize("missing", ["numba", "llvmlite"])
def test_without_the_extra_faiss_scans(folder: Path, missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from pathlib import Path; from storage.onebit import OneBitIndex;"
        f"index = OneBitIndex.open(Path({str(folder)!r}), {DIMENSION}); assert not index.uses_compiled;"
        "query = index.within(5, 5)[1].astype('float32'); print(index.range(query, 0.9)[0].ids.tolist())"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == "[5]\n"


def test_the_extra_is_not_loaded_before_it_is_needed() -> None:
    subprocess.run(
        [sys.executable, "-c", "import storage.layered, storage.calibration, sys; assert 'numba' not in sys.modules"],
        check=True,
    )


def test_a_layout_that_is_not_known_is_left_to_faiss(
    folder: Path, vectors: Halves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.onebit._is_layout_known", lambda _: False)
    index = OneBitIndex.open(folder, DIMENSION)
    assert not index.uses_compiled
    assert index.range(widened(vectors[:1]), 0.9)[0].ids.tolist() == [5]


@pytest.mark.parametrize("compiled", [True, False])
def test_a_margin_of_nothing_misses_pairs(folder: Path, vectors: Halves, compiled: bool) -> None:
    """So a margin does decide what is found, and measuring it means something."""
    pairs = planted_pairs(vectors, 0.46, 100, np.random.default_rng(5))
    index = OneBitIndex.open(folder, DIMENSION, margin=Margin(faiss=-3.0, compiled=-3.0), compiled=compiled)
    found = sum(
        row * 3 + 5 in hits.ids for row, hits in zip(pairs.rows.tolist(), index.range(pairs.queries, 0.46), strict=True)
    )
    assert found < 80


@pytest.mark.parametrize("dimension", [64, 128, 512])
@pytest.mark.parametrize("cosine", [0.2, 0.46, 0.7])
def test_the_noise_of_the_signs_is_what_the_formulas_say(dimension: int, cosine: float) -> None:
    random = np.random.default_rng(6)
    left, aside = random.normal(size=(2, 20_000, dimension))
    left /= np.linalg.norm(left, axis=1, keepdims=True)
    aside -= np.sum(aside * left, axis=1, keepdims=True) * left
    right = cosine * left + math.sqrt(1 - cosine**2) * aside / np.linalg.norm(aside, axis=1, keepdims=True)
    differing = np.count_nonzero((left > 0) != (right > 0), axis=1)
    estimates = np.sum(right * np.sign(left), axis=1) / np.abs(left).sum(axis=1)
    assert differing.mean() == pytest.approx(differing_signs(cosine, dimension), rel=0.01)
    assert differing.std() == pytest.approx(sign_noise(cosine, dimension), rel=0.05)
    assert estimates.mean() == pytest.approx(cosine, abs=0.003)
    assert estimates.std() == pytest.approx(estimate_noise(cosine, dimension), rel=0.05)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_removed_are_not_found_in_a_mapped_index_and_its_files_stay_as_they_are(
    folder: Path, vectors: Halves, compiled: bool
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    index = OneBitIndex.open(folder, DIMENSION, compiled=compiled)
    query = widened(vectors[:1])
    assert index.remove(np.array([5, 8, 6, -1, 10**9, 5])) == 2
    assert index.remove(np.array([5])) == 0
    assert len(index) == 5_998
    for hits in (*index.range(query, -1.0), *index.search(query, 6_000), index.exact_range(query, -1.0)):
        assert len(hits.ids) == 5_998
        assert not np.isin(hits.ids, [5, 8]).any()
    assert index.within(0, 11)[0].tolist() == [11]
    assert index.holds(np.array([5, 8, 11, 12])).tolist() == [False, False, True, False]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_mapped_index_is_not_added_to(folder: Path, vectors: Halves) -> None:
    index = OneBitIndex.open(folder, DIMENSION)
    with pytest.raises(ValueError, match="not added to"):
        index.add(np.array([1]), vectors[:1])


def _without_last_row(folder: Path) -> None:
    for name, size in ((IDS_FILE, 8), (VECTORS_FILE, 2 * DIMENSION)):
        (folder / name).write_bytes((folder / name).read_bytes()[:-size])


def _with_another_order(folder: Path) -> None:
    rows = np.fromfile(folder / VECTORS_FILE, np.float16).reshape(-1, DIMENSION)
    rows[::-1].tofile(folder / VECTORS_FILE)


def _with_a_cut_file(folder: Path) -> None:
    (folder / CODES_FILE).write_bytes((folder / CODES_FILE).read_bytes()[:1_000])


def _with_another_kind(folder: Path) -> None:
    faiss.write_index(faiss.IndexFlatIP(DIMENSION), str(folder / CODES_FILE))


@pytest.mark.parametrize("harm", [_without_last_row, _with_another_order, _with_a_cut_file, _with_another_kind])
def test_files_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, folder: Path, harm: Callable[[Path], None]
) -> None:
    harmed = Path(shutil.copytree(folder, tmp_path / "harmed"))
    harm(harmed)
    with pytest.raises(ValueError, match=CODES_FILE):
        OneBitIndex.open(harmed, DIMENSION)


def test_another_dimension_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="vectors of 256"):
        OneBitIndex.open(folder, 256)


def test_no_rows_make_no_index(tmp_path: Path) -> None:
    with RowsWriter(tmp_path):
        pass
    with pytest.raises(ValueError, match="no rows"):
        OneBitIndex.build(tmp_path)


def test_lists_are_looked_into_as_far_as_asked(tmp_path: Path) -> None:
    """Eight tight groups: one list in eight finds the neighbours, and all lists find everything."""
    random = np.random.default_rng(7)
    centres = random.normal(size=(8, 128))
    rows = np.repeat(centres, 200, axis=0) + 0.3 * random.normal(size=(1_600, 128))
    vectors = halved((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    built(tmp_path, np.arange(1_600), vectors, lists=8)
    query = widened(vectors[:1])
    exact, probing = OneBitIndex.open(tmp_path, 128), OneBitIndex.open(tmp_path, 128, probes=1)
    assert not probing.uses_compiled
    group = exact.exact_range(query, 0.7).ids.tolist()
    assert group == exact.range(query, 0.7)[0].ids.tolist() == probing.range(query, 0.7)[0].ids.tolist()
    assert len(exact.range(query, -1.0)[0].ids) == 1_600
    assert len(probing.range(query, -1.0)[0].ids) < 800


def test_new_ids_may_come_in_any_order(vectors: Halves) -> None:
    index, queries = OneBitIndex(DIMENSION), widened(vectors[:60])
    order = np.random.default_rng(8).permutation(60)
    for some in np.split(order, 6):
        index.add(some, vectors[some])
    index.add(order[:20], vectors[order[:20]])
    assert len(index) == 60
    assert [hits.ids[0] for hits in index.search(queries, 1)] == list(range(60))
    assert [hits.ids.tolist() for hits in index.range(queries, 0.9)] == [[one] for one in range(60)]


def test_searches_beside_removals_see_each_removal_whole(folder: Path, vectors: Halves) -> None:
    index = OneBitIndex.open(folder, DIMENSION, margin=DEFAULT_MARGIN)
    query, is_done = widened(vectors[:1]), threading.Event()

    def look() -> int:
        seen = 6_000
        while not is_done.is_set():
            found = len(index.range(query, -1.0)[0].ids)
            assert found <= seen
            assert found % 10 == 0
            seen = found
        return seen

    with ThreadPoolExecutor(3) as pool:
        lookers = [pool.submit(look) for _ in range(2)]
        for start in range(0, 500, 10):
            assert index.remove(np.arange(start, start + 10) * 3 + 5) == 10
        is_done.set()
        assert all(looker.result(timeout=30) >= 5_500 for looker in lookers)
