"""The index measured beside what else one could do on the same machine, in the same run.

Vectors are drawn, not faces: unit vectors whose impostor cosines have the mean and the spread of real embeddings, turned by
a random rotation as a gallery's are. Queries lie just above the threshold that a gallery of that size asks for, where an
index misses first. What is told of one thread is measured in processes of their own, whose BLAS has one thread.
"""

import gc
import importlib
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import faiss
import numpy as np
import numpy.typing as npt
import psutil
from pydantic import AwareDatetime, BaseModel, ConfigDict

from app.devstack.bench import quantile
from app.domain.faces import ModelCard, RatePoint
from app.domain.publication import kind_for
from app.domain.thresholds import threshold_at_fpir
from app.domain.tiles import tile, tile_count
from app.engine.cards import known_recognisers
from storage.calibration import calibrate, planted_pairs
from storage.generations import GenerationStore, Manifest, MeasuredRecall
from storage.join import pairs_above
from storage.layered import LayeredIndex
from storage.onebit import Margin, OneBitIndex
from storage.rows import RowsWriter, read_rows
from storage.vectors import ExactIndex, Halves, VectorIndex, Vectors, cosines, halved

#: Impostor cosines of real embeddings (10,076 photos of 5,395 people, w600k_mbf): mean and standard deviation.
IMPOSTOR_MEAN, IMPOSTOR_DEVIATION = 0.013, 0.068
#: The recogniser of the default pack: what its card asks of a gallery of that size at FPIR 1e-3 is the threshold.
RECOGNISER, FPIR = "w600k_mbf", 1e-3
#: Queries whose times are told at least, however long they take.
FEWEST_QUERIES: Final = 15
MEMORY_QUERIES: Final = 200
#: Of the whole product without symmetry: the share that is timed.
PRODUCT_SHARE: Final = 0.1
PRODUCT_ROWS: Final = 2_048
#: Sides of the tiles that a scan is cut into.
TILE_ROWS: Final = 8_192
DUPLICATE_SHARE: Final = 0.01
#: Left free of the memory that is there when a comparison is loaded.
SPARE_BYTES: Final = 2 * 2**30
_BLOCK: Final = 16_384
_GALLERY, _EPOCH = "bench", "bench"
_MIB: Final = 2**20

T = TypeVar("T")
#: Told what is going on.
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    pairs: planted, to choose the margin and to count misses by. tail_rows: above the files; as many as a gallery has
    before it publishes anew. queries, seconds: of which a series of times has as many as fit.
    """

    pairs: int = 6_000
    tail_rows: int = 50_000
    queries: int = 400
    seconds: float = 4.0


USUAL_EFFORT: Final = Effort()


class Machine(BaseModel):
    """Where figures were measured, and with what."""

    model_config = ConfigDict(frozen=True)

    processor: str
    cores: int
    memory_gib: float
    python: str
    versions: dict[str, str]


class Figures(BaseModel):
    """One size. Times of single queries in milliseconds, on one thread; None: not installed, or does not fit in memory.

    kind: what a gallery of this size publishes. scan: what scanned: "compiled", "faiss" or "flat". fp32_by: the faster of
    FAISS's flat index and numpy. floor_ms: reading one bit a dimension of all once. misses: planted pairs that an exact
    search finds and the index does not. private_mib: what opening it and 200 queries added to a process, without what is
    mapped. build_s: codes from rows; calibrate_s: margin chosen and proven; publish_s: hashed, synced, renamed; fetch_s:
    copied and verified by a host; open_s: mapped in a new process, first_query_s: from there to the first answer. tail_ms:
    what 50,000 rows more in memory add.
    """

    model_config = ConfigDict(frozen=True)

    n: int
    dim: int
    kind: str
    p50_ms: float
    p99_ms: float
    fp32_p50_ms: float | None
    int8_p50_ms: float | None
    floor_ms: float
    pairs: int
    misses: int
    private_mib: float
    disk_mib: float
    build_s: float
    open_s: float
    qps_all_cores: float
    scan: str
    seed: int
    threshold: float
    fp32_by: str | None
    usearch_i8_p50_ms: float | None
    usearch_f16_p50_ms: float | None
    calibrate_s: float
    publish_s: float
    fetch_s: float
    first_query_s: float
    tail_rows: int
    tail_ms: float


class ScanFigures(BaseModel):
    """Everything against everything, on all cores.

    products_s: blocked float32 products without symmetry, of which products_timed is the share that was timed; the rest
    is extrapolated.
    """

    model_config = ConfigDict(frozen=True)

    n: int
    dim: int
    seed: int
    threshold: float
    planted: int
    found: int
    pairs: int
    join_s: float
    products_s: float
    products_timed: float


class Measured(BaseModel):
    """A line of the results file."""

    model_config = ConfigDict(frozen=True)

    measured_at: AwareDatetime
    machine: Machine
    figures: Figures | None = None
    scan: ScanFigures | None = None


def this_machine() -> Machine:
    """Processor, cores, memory, versions."""
    packages = ("faiss-cpu", "numpy", "numba", "usearch")
    return Machine(
        processor=_processor(),
        cores=_cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        python=platform.python_version(),
        versions={package: metadata.version(package) for package in packages if _is_installed(package)},
    )


def threshold_for(count: int) -> float:
    """What the default recogniser's card asks of a search among so many."""
    known = next(card for card in known_recognisers() if card.title == RECOGNISER)
    card = ModelCard(
        pack=RECOGNISER,
        kind="onnx",
        dimension=512,
        contract="",
        licence=known.licence,
        commercial_use=known.commercial_use,
        impostor_curve=tuple(RatePoint(fmr=fmr, threshold=score) for fmr, score in known.impostor_curve),
        source=known.source,
    )
    return round(threshold_at_fpir(card, FPIR, count), 4)


class Crowd:
    """Unit vectors like those of strangers' faces, turned at random; the same ones for the same seed."""

    def __init__(self, dimension: int, seed: int) -> None:
        self.dimension = dimension
        random = np.random.default_rng(seed)
        turn, _ = np.linalg.qr(random.standard_normal((dimension, dimension)))
        # Their common direction makes the mean; independent directions of falling strength make the spread.
        self._mean = (math.sqrt(IMPOSTOR_MEAN) * turn[0]).astype(np.float32)
        strengths = np.sqrt(_spectrum(dimension) * (1 - IMPOSTOR_MEAN))
        self._spread = (strengths[:, np.newaxis] * turn).astype(np.float32)
        self._random = random

    def draw(self, count: int) -> Vectors:
        """The next `count` of them, (n, d)."""
        drawn = self._random.standard_normal((count, self.dimension), np.float32) @ self._spread + self._mean
        unit: Vectors = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        return unit

    def blocks(self, count: int) -> Iterator[Vectors]:
        """`count` of them in blocks that need little memory."""
        for start in range(0, count, _BLOCK):
            yield self.draw(min(_BLOCK, count - start))


def measure(count: int, dimension: int, seed: int, folder: Path, say: Say, *, effort: Effort = USUAL_EFFORT) -> Figures:
    """Build, publish, open and search an index of so many vectors in the (empty) folder, beside the alternatives."""
    threshold = threshold_for(count)
    kind = kind_for(count)
    store = GenerationStore(folder / "share", folder / "host")
    staged = store.stage(_GALLERY, _EPOCH, 1)
    say(f"{count:,} x {dimension}: drawing vectors; threshold {threshold} ({RECOGNISER} at FPIR {FPIR})")
    crowd = Crowd(dimension, seed)
    with RowsWriter(staged) as rows:
        for block in crowd.blocks(count):
            rows.append(np.arange(rows.count + 1, rows.count + 1 + len(block)), halved(block))
    say("building, calibrating, publishing")
    build_s, calibrate_s, manifest = _built(staged, kind, count, dimension, threshold, seed, effort)
    publish_s, digest = _timed(partial(store.commit_files, staged, manifest))
    fetch_s, (copy, _) = _timed(partial(store.fetch, _GALLERY, _EPOCH, 1, digest))
    disk = sum(file.stat().st_size for file in copy.iterdir())
    source = _Source(copy, kind, dimension, threshold, manifest.margin, seed, effort)

    say("opening in a new process")
    opened = _in_new_process(_opened_anew, source)
    say("one thread: ours, then exact scans")
    alone = _in_new_process(_one_thread, source)
    say(f"{effort.pairs:,} planted pairs on all cores")
    misses, rate = _asked_on_all_cores(source)
    return Figures(
        n=count, dim=dimension, kind=kind, seed=seed, threshold=threshold, scan=opened.scan,
        p50_ms=alone.p50_ms, p99_ms=alone.p99_ms, fp32_p50_ms=alone.fp32_p50_ms, fp32_by=alone.fp32_by,
        int8_p50_ms=alone.int8_p50_ms, floor_ms=alone.floor_ms, usearch_i8_p50_ms=alone.usearch_i8_p50_ms,
        usearch_f16_p50_ms=alone.usearch_f16_p50_ms, pairs=effort.pairs, misses=misses, private_mib=opened.private_mib,
        disk_mib=round(disk / _MIB, 1), build_s=build_s, calibrate_s=calibrate_s, publish_s=publish_s, fetch_s=fetch_s,
        open_s=opened.open_s, first_query_s=opened.first_query_s, tail_rows=effort.tail_rows, tail_ms=alone.tail_ms,
        qps_all_cores=rate,
    )  # fmt: skip


def measure_scan(count: int, dimension: int, seed: int, say: Say) -> ScanFigures:
    """Join `count` vectors with themselves, 1% planted duplicates among them, and time the plain products beside it."""
    threshold = threshold_for(count)
    say(f"whole scan of {count:,} x {dimension}; threshold {threshold}")
    block = np.concatenate([halved(some) for some in Crowd(dimension, seed).blocks(count)])
    random = np.random.default_rng(seed + 1)
    planted = max(1, round(DUPLICATE_SHARE * count))
    copies = count - planted
    doubles = planted_pairs(block[:copies], threshold, planted, random)
    order = random.permutation(planted)  # neighbours should not lie in the same tile more often than others
    block[copies:] = halved(doubles.queries[order])
    wanted = {
        (int(row), copies + place)
        for place, row in enumerate(doubles.rows[order])
        if cosines(block[[row]], block[copies + place].astype(np.float32))[0] >= np.float32(threshold)
    }
    pairs_above(block[:64], block[:64], threshold, same=True)  # compiles
    found: set[tuple[int, int]] = set()

    def work(number: int) -> set[tuple[int, int]]:
        (first, last), (begin, end), same = tile(number, 0, count, TILE_ROWS)
        joined = pairs_above(block[first - 1 : last], block[begin - 1 : end], threshold, same=same)
        lefts, rights = joined.rows_left + first - 1, joined.rows_right + begin - 1
        return set(zip(lefts.tolist(), rights.tolist(), strict=True))

    started = time.perf_counter()
    with ThreadPoolExecutor(_cores()) as pool:
        for some in pool.map(work, range(tile_count(0, count, TILE_ROWS))):
            found |= some
    join_s = time.perf_counter() - started
    say("plain products of matrices")
    timed = min(1.0, max(PRODUCT_SHARE, PRODUCT_ROWS / count))
    products_s = _products_time(block, threshold, round(timed * count)) / timed
    return ScanFigures(
        n=count, dim=dimension, seed=seed, threshold=threshold, planted=len(wanted), found=len(wanted & found),
        pairs=len(found), join_s=round(join_s, 2), products_s=round(products_s, 2), products_timed=timed,
    )  # fmt: skip


@contextmanager
def working_folder(parent: Path | None) -> Iterator[Path]:
    """A folder for files as large as the index three times over, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="idem-index-bench-", dir=parent) as folder:
        yield Path(folder)


@dataclass(frozen=True, slots=True)
class _Source:
    """A published generation on this host."""

    folder: Path
    kind: str
    dimension: int
    threshold: float
    margin: dict[str, float]
    seed: int
    effort: Effort

    def open(self) -> VectorIndex:
        if self.kind == "faiss":
            return OneBitIndex.open(self.folder, self.dimension, margin=Margin(**self.margin))
        index = ExactIndex(self.dimension)
        index.add(*read_rows(self.folder, self.dimension))
        return index

    def queries(self, count: int, series: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """Queries just above the threshold of a row, and the ids of these rows; another series, others."""
        ids, vectors = read_rows(self.folder, self.dimension)
        pairs = planted_pairs(vectors, self.threshold, count, np.random.default_rng([self.seed, series]))
        order = np.random.default_rng(series).permutation(count)  # as they come, not along the file
        return pairs.queries[order], np.asarray(ids[pairs.rows[order]])


class _Opened(NamedTuple):
    open_s: float
    first_query_s: float
    private_mib: float
    scan: str


class _Alone(NamedTuple):
    p50_ms: float
    p99_ms: float
    tail_ms: float
    floor_ms: float
    fp32_p50_ms: float | None
    fp32_by: str | None
    int8_p50_ms: float | None
    usearch_i8_p50_ms: float | None
    usearch_f16_p50_ms: float | None


def _built(
    staged: Path, kind: str, count: int, dimension: int, threshold: float, seed: int, effort: Effort
) -> tuple[float, float, Manifest]:
    build_s = calibrate_s = 0.0
    margin: dict[str, float] = {}
    recall: dict[str, MeasuredRecall] = {}
    if kind == "faiss":
        build_s, _ = _timed(partial(OneBitIndex.build, staged))
        people = np.arange(count)
        calibrate_s, chosen = _timed(
            partial(
                calibrate,
                staged,
                dimension,
                people=people,
                threshold=threshold,
                target=_shown_by(effort.pairs),
                pairs=effort.pairs,
                seed=seed,
            )
        )
        margin = {"faiss": chosen.margin.faiss, "compiled": chosen.margin.compiled}
    manifest = Manifest(
        gallery_id=_GALLERY, epoch=_EPOCH, number=1, contract="drawn", rotation="drawn", dimension=dimension,
        kind="faiss" if kind == "faiss" else "exact", lists=1 if kind == "faiss" else 0, count=count, watermark=count,
        threshold=threshold, margin=margin, probes=None, recall=recall, built_at=datetime.now(UTC), built_by="bench",
    )  # fmt: skip
    return build_s, calibrate_s, manifest


def _opened_anew(source: _Source) -> _Opened:
    queries, _ = source.queries(MEMORY_QUERIES, series=1)
    gc.collect()
    before = _private_bytes()
    open_s, index = _timed(source.open)
    first_query_s, _ = _timed(partial(index.range, queries[:1], source.threshold))
    for query in queries[1:]:
        index.range(query[np.newaxis], source.threshold)
    gc.collect()
    private = (_private_bytes() - before) / _MIB
    scan = "flat"
    if isinstance(index, OneBitIndex):
        scan = "compiled" if index.uses_compiled else "faiss"
    return _Opened(open_s, first_query_s, round(private, 1), scan)


def _one_thread(source: _Source) -> _Alone:
    queries, _ = source.queries(source.effort.queries, series=2)
    _, vectors = read_rows(source.folder, source.dimension)
    ours, tail_ms = _ours(source, queries)
    fp32_by, fp32 = _faster_fp32(vectors, queries, source.threshold)
    return _Alone(
        p50_ms=_milliseconds(ours, 0.5),
        p99_ms=_milliseconds(ours, 0.99),
        tail_ms=tail_ms,
        floor_ms=_floor_ms(len(vectors) * source.dimension // 8),
        fp32_p50_ms=fp32,
        fp32_by=fp32_by,
        int8_p50_ms=_sq8(vectors, queries),
        usearch_i8_p50_ms=_usearch(vectors, queries, "i8"),
        usearch_f16_p50_ms=_usearch(vectors, queries, "f16"),
    )


def _ours(source: _Source, queries: Vectors) -> tuple[list[float], float]:
    """Times of the index, and what a tail adds to their median in milliseconds."""
    index = source.open()
    bare = _times(lambda query: index.range(query[np.newaxis], source.threshold), queries, source.effort.seconds)
    layered = LayeredIndex(source.dimension, index)
    first = np.iinfo(np.int64).max - source.effort.tail_rows
    for block in Crowd(source.dimension, source.seed + 1).blocks(source.effort.tail_rows):
        layered.add(np.arange(first, first + len(block)), halved(block))
        first += len(block)
    with_tail = _times(lambda query: layered.range(query[np.newaxis], source.threshold), queries, source.effort.seconds)
    return bare, round(_milliseconds(with_tail, 0.5) - _milliseconds(bare, 0.5), 4)


def _faster_fp32(vectors: Halves, queries: Vectors, threshold: float) -> tuple[str | None, float | None]:
    """An exact scan of float32: FAISS's range search, and numpy's product with what is over the threshold taken."""
    if not _fits(4 * vectors.size):
        return None, None
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    for start in range(0, len(vectors), _BLOCK):
        flat.add(vectors[start : start + _BLOCK].astype(np.float32))
    matrix = faiss.rev_swig_ptr(flat.get_xb(), vectors.size).reshape(vectors.shape)
    median = {
        "FAISS": _median_ms(lambda query: flat.range_search(query[np.newaxis], threshold), queries),
        "numpy": _median_ms(lambda query: np.flatnonzero(matrix @ query >= threshold), queries),
    }
    faster = min(median, key=lambda name: median[name])
    return faster, median[faster]


def _sq8(vectors: Halves, queries: Vectors) -> float | None:
    """An exact scan of 8-bit numbers, ten nearest, as InsightFace's server does one: by threshold FAISS is far slower here."""
    if not _fits(vectors.size):
        return None
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    flat.train(vectors[:_BLOCK].astype(np.float32))
    for start in range(0, len(vectors), _BLOCK):
        flat.add(vectors[start : start + _BLOCK].astype(np.float32))
    return _median_ms(lambda query: flat.search(query[np.newaxis], 10), queries)


def _usearch(vectors: Halves, queries: Vectors, numbers: str) -> float | None:
    """Usearch's exact search, ten nearest: it has none by threshold."""
    if find_spec("usearch") is None or not _fits(vectors.size * (1 if numbers == "i8" else 2)):
        return None
    usearch = importlib.import_module("usearch.index")  # a developer's dependency
    if numbers == "i8":
        rows: npt.NDArray[Any] = np.empty(vectors.shape, np.int8)
        for start in range(0, len(vectors), _BLOCK):
            rows[start : start + _BLOCK] = np.rint(vectors[start : start + _BLOCK].astype(np.float32) * 127)
        asked: npt.NDArray[Any] = np.rint(queries * 127).astype(np.int8)
    else:
        rows, asked = np.array(vectors), queries.astype(np.float16)
    return _median_ms(
        lambda query: usearch.search(rows, query, 10, usearch.MetricKind.IP, exact=True, threads=1), asked
    )


def _asked_on_all_cores(source: _Source) -> tuple[int, float]:
    """Planted pairs that were not found, and queries a second of as many threads as there are cores."""
    pairs = source.effort.pairs
    index = source.open()
    queries, ids = source.queries(pairs, series=3)
    _, vectors = read_rows(source.folder, source.dimension)
    missed = 0
    lock = threading.Lock()

    def ask(places: range) -> None:
        nonlocal missed
        for place in places:
            (hits,) = index.range(queries[place : place + 1], source.threshold)
            row = ids[place] - 1
            exact = cosines(vectors[row : row + 1], queries[place])[0] >= np.float32(source.threshold)
            if exact and ids[place] not in hits.ids:
                with lock:
                    missed += 1

    ask(range(min(20, pairs)))  # warm
    missed = 0
    cores = _cores()
    with ThreadPoolExecutor(cores) as pool:
        seconds, _ = _timed(lambda: list(pool.map(ask, (range(core, pairs, cores) for core in range(cores)))))
    return missed, round(pairs / seconds, 1)


def _products_time(block: Halves, threshold: float, rows: int) -> float:
    """Seconds for so many left rows against all, in float32 products by as many threads as BLAS takes."""
    wide = block.astype(np.float32)
    out = np.empty((PRODUCT_ROWS, TILE_ROWS), np.float32)
    started = time.perf_counter()
    for first in range(0, rows, PRODUCT_ROWS):
        left = wide[first : min(first + PRODUCT_ROWS, rows)]
        for begin in range(0, len(wide), TILE_ROWS):
            right = wide[begin : begin + TILE_ROWS]
            products = out.ravel()[: len(left) * len(right)].reshape(len(left), len(right))
            np.matmul(left, right.T, out=products)
            np.flatnonzero(products.ravel() >= threshold)
    return time.perf_counter() - started


def _floor_ms(size: int) -> float:
    """Reading so many bytes once by one thread: the best of the loops that numpy has, median of several rounds."""
    words = np.random.default_rng(0).integers(0, 2**63, max(1, size // 8), dtype=np.uint64)
    octets = words.view(np.uint8)
    rounds = np.empty((21, 1), np.float32)
    return min(
        _median_ms(lambda _: np.bitwise_xor.reduce(words), rounds),
        _median_ms(lambda _: np.add.reduce(words), rounds),
        _median_ms(lambda _: np.maximum.reduce(octets), rounds),
    )


def _times(call: Callable[[Any], object], queries: npt.NDArray[Any], seconds: float) -> list[float]:
    """Seconds of each call: all queries, or those that there was time for."""
    for query in queries[:2]:
        call(query)
    times: list[float] = []
    for query in queries:
        started = time.perf_counter()
        call(query)
        times.append(time.perf_counter() - started)
        if len(times) >= FEWEST_QUERIES and sum(times) > seconds:
            break
    return times


def _median_ms(
    call: Callable[[Any], object], queries: npt.NDArray[Any], seconds: float = USUAL_EFFORT.seconds
) -> float:
    return round(statistics.median(_times(call, queries, seconds)) * 1000, 4)


def _milliseconds(times: list[float], share: float) -> float:
    return round(quantile(times, share) * 1000, 4)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = work()
    return round(time.perf_counter() - started, 3), result


def _in_new_process(work: Callable[[_Source], T], source: _Source) -> T:
    """The work's result, from a fresh interpreter whose libraries have one thread."""
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(work, source).result()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _shown_by(pairs: int) -> float:
    """The recall that so many pairs, all found, show with 95% confidence."""
    return float(0.05 ** (1 / pairs))


def _spectrum(dimension: int) -> npt.NDArray[np.float64]:
    """Variances along independent directions, falling like a power and summing to 1, that give the impostors' spread.

    A cosine of two such vectors has a variance of the sum of their squares. Few dimensions have more spread than that
    anyway: there all directions are alike.
    """
    ranks = np.arange(1, dimension + 1, dtype=np.float64)

    def variances(power: float) -> npt.NDArray[np.float64]:
        falling = ranks**-power
        scaled: npt.NDArray[np.float64] = falling / falling.sum()
        return scaled

    low, high = 0.0, 2.0
    for _ in range(50):
        middle = (low + high) / 2
        if np.sum(variances(middle) ** 2) < IMPOSTOR_DEVIATION**2:
            low = middle
        else:
            high = middle
    return variances(low)


def _private_bytes() -> int:
    """What this process holds besides mapped files: Linux calls their pages private too while nobody else maps them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Anonymous:", "Swap:")))


def _fits(size: int) -> bool:
    return psutil.virtual_memory().available > size + SPARE_BYTES


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _processor() -> str:
    names = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return next(names, platform.machine()).partition(":")[2].strip() or platform.machine()


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
