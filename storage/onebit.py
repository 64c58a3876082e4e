"""One bit a dimension: every vector is looked at, almost none is read.

The signs of a randomly turned vector, 64 bytes for 512 dimensions, tell its cosine with a query within a few hundredths.
So a search scans the sign bits of all, takes whatever may reach the threshold, and compares only these vectors exactly.
How far under the threshold an estimate may lie is the `Margin`; `storage.calibration` measures it.

The codes are FAISS's (`IndexIVFRaBitQ`; RaBitQ: Gao and Long, SIGMOD 2024). Where numba is installed (the optional
extra `fast`) and there is one list, `storage.compiled` scans the same codes several times faster.
"""

import importlib
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TypeVar

import faiss
import numpy as np
import numpy.typing as npt

from storage.rows import IDS_FILE, VECTORS_FILE, bytes_per_vector, read_rows
from storage.vectors import (
    Halves,
    Hits,
    Ids,
    ReadersWriterLock,
    Vectors,
    best_first,
    check_count,
    check_ids,
    check_new,
    check_single,
    check_threshold,
    checked_queries,
    cosines,
    gathered,
    scan_floor,
    widened,
)

if TYPE_CHECKING:
    from storage.compiled import Scanner

#: The codes, as FAISS writes an index.
CODES_FILE: Final = "codes.faiss"
#: Fewer sign bits than this say too little, and their noise is not normal: such vectors are all compared exactly.
FEWEST_SIGNS: Final = 64
#: Bits that FAISS rounds the query's numbers to. 4 adds 2% to the noise; 8 takes a half longer and adds nothing. Never
#: 0, which is 150 times slower.
QUERY_BITS: Final = 4
#: Beyond this cosine the noise is not taken to shrink further: signs of numbers near zero flip in the rounding.
_STEEPEST_COSINE: Final = 0.9
#: Rows that are encoded, written or compared at once: bounds the memory besides the index, and how long an exact scan
#: keeps a change waiting.
_BLOCK: Final = 4_096
#: Estimates beyond twice those asked for, so that the k-th best among them is a good floor for the search proper.
_SPARE_NEIGHBOURS: Final = 256
#: k-means needs no more rows a list.
_TRAINING_ROWS_PER_LIST: Final = 64


@dataclass(frozen=True, slots=True)
class Margin:
    """How far under a threshold candidates are taken, in standard deviations of the one-bit estimate's own noise.

    So it holds at any threshold and dimension. faiss: for FAISS's scan; compiled: for both stages of the compiled one.
    """

    faiss: float
    compiled: float


#: Not calibrated: one tail of a normal distribution beyond 5 deviations holds 3e-7.
DEFAULT_MARGIN: Final = Margin(faiss=5.0, compiled=5.0)


def estimate_noise(cosine: float, dimension: int) -> float:
    """Standard deviation of an estimate from one vector's signs, for a pair of this cosine after a random rotation.

    With q = c x + sqrt(1 - c**2) y the estimate is exact in x, and y meets the part of sign(x) that is not along x.
    """
    cosine = min(_STEEPEST_COSINE, max(-_STEEPEST_COSINE, cosine))
    return math.sqrt((math.pi / 2 - 1) * (1 - cosine * cosine) / dimension)


def differing_signs(cosine: float, dimension: int) -> float:
    """How many signs of a pair of this cosine differ, on average: the angle's share of a half turn."""
    return math.acos(min(1.0, max(-1.0, cosine))) / math.pi * dimension


def sign_noise(cosine: float, dimension: int) -> float:
    """Standard deviation of how many signs of a pair of this cosine differ after a random rotation.

    For independent numbers it were binomial. But a rotation keeps both lengths and the cosine, and signs follow the
    products of the numbers, whose sum is thereby fixed. With S = sign(x) sign(y) of a normal pair, x**2, y**2 and xy
    explain (2 / pi)**2 (1 - c**2) of Var S = 1 - (2 / pi asin c)**2; a bit is (1 - S) / 2.
    """
    cosine = min(_STEEPEST_COSINE, max(-_STEEPEST_COSINE, cosine))
    variance = 1 - (2 / math.pi * math.asin(cosine)) ** 2 - (2 / math.pi) ** 2 * (1 - cosine * cosine)
    return math.sqrt(variance * dimension) / 2


@dataclass(frozen=True, slots=True)
class _Mapped:
    codes: faiss.IndexIVFRaBitQ
    ids: Ids
    vectors: Halves


class OneBitIndex:
    """Sign bits are scanned, candidates compared exactly. See VectorIndex.

    Vectors must have been turned by a random rotation, or a margin means nothing. In memory (2 d + d / 8 + 25 bytes a
    vector) it may change in every way; opened from a folder everything is mapped, and vectors are only taken out.
    """

    def __init__(
        self,
        dimension: int,
        *,
        margin: Margin = DEFAULT_MARGIN,
        probes: int | None = None,
        compiled: bool = True,
        _mapped: "_Mapped | None" = None,
    ) -> None:
        """An empty one, in memory (see `open` for the other kind).

        dimension: at least 1. probes: lists to look into, all when None. compiled: False leaves the scan to FAISS where the
        compiled one could be used too.
        """
        if dimension < 1:
            message = "a vector has at least one dimension"
            raise ValueError(message)
        self._is_mapped = _mapped is not None
        rows = _mapped or _Mapped(_empty_codes(dimension), np.empty(0, np.int64), np.empty((0, dimension), np.float16))
        self._dimension = dimension
        self._codes = rows.codes  # of row i under the label i
        self._ids = np.asarray(rows.ids)  # of each row, rising
        self._vectors = np.asarray(rows.vectors)
        self._is_gone = np.zeros(len(rows.ids), np.bool_)
        self._living = len(rows.ids)
        self._margin = margin
        self._parameters = faiss.IVFRaBitQSearchParameters()
        self._parameters.nprobe = min(probes or rows.codes.nlist, rows.codes.nlist)
        self._parameters.qb = QUERY_BITS
        self._parameters.centered = True  # rounds the query to steps about zero: faster, and less noise
        self._may_compile = compiled
        self._scanner = self._new_scanner()
        self._lock = ReadersWriterLock()

    @classmethod
    def build(cls, folder: Path, *, lists: int = 1) -> None:
        """Write the codes of the folder's rows (see `storage.rows`; at least one) beside them, with all cores.

        lists: more than one only where `storage.calibration.probe_curve` allows it. Raises OSError, and ValueError for rows
        that do not fit each other.
        """
        ids, vectors = read_rows(folder, _dimension_of(folder))
        dimension = vectors.shape[1]
        if lists == 1:
            codes = _empty_codes(dimension)
        else:
            quantizer = faiss.IndexFlatIP(dimension)
            codes = faiss.IndexIVFRaBitQ(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
            sample = np.sort(np.random.default_rng(0).permutation(len(ids))[: lists * _TRAINING_ROWS_PER_LIST])
            codes.cp.min_points_per_centroid = 1  # a small gallery is no reason for a warning
            codes.train(widened(vectors[sample]))
        for start in range(0, len(ids), _BLOCK):
            codes.add(widened(vectors[start : start + _BLOCK]))
        faiss.write_index(codes, str(folder / CODES_FILE))

    @classmethod
    def open(
        cls,
        folder: Path,
        dimension: int,
        *,
        margin: Margin = DEFAULT_MARGIN,
        probes: int | None = None,
        compiled: bool = True,
    ) -> Self:
        """A folder that `build` completed, mapped: it must not change while it is open.

        Raises OSError, and ValueError for files that do not fit each other or that another FAISS laid out otherwise.
        """
        ids, vectors = read_rows(folder, dimension)
        try:
            codes = faiss.read_index(str(folder / CODES_FILE), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            message = f"{CODES_FILE} is no index that this FAISS reads"
            raise ValueError(message) from error
        if not isinstance(codes, faiss.IndexIVFRaBitQ) or (codes.d, codes.ntotal) != (dimension, len(ids)):
            message = f"{CODES_FILE} does not hold the one-bit codes of these {len(ids)} vectors of {dimension}"
            raise ValueError(message)
        _check_codes(codes, vectors)
        return cls(dimension, margin=margin, probes=probes, compiled=compiled, _mapped=_Mapped(codes, ids, vectors))

    @property
    def dimension(self) -> int:
        """See VectorIndex."""
        return self._dimension

    @property
    def bytes(self) -> int:
        """See VectorIndex."""
        return len(self._ids) * bytes_per_vector(self._dimension)

    @property
    def uses_compiled(self) -> bool:
        """Whether the compiled scan answers, not FAISS's."""
        return self._scanner is not None

    def __len__(self) -> int:
        """See VectorIndex."""
        return self._living

    def add(self, ids: Ids, vectors: Halves) -> None:
        """See VectorIndex. Fastest with ids above all before. Raises ValueError when it was opened from a folder."""
        check_new(ids, vectors, self.dimension)
        if self._is_mapped:
            message = "an index that was opened from files is not added to"
            raise ValueError(message)
        if not len(ids):
            return
        ids, backwards = np.unique(ids[::-1], return_index=True)
        vectors = vectors[::-1][backwards]
        codes = _encoded(self._codes, vectors)
        with self._lock.writing():
            is_known = self._is_row_of(ids)
            rows = np.searchsorted(self._ids, ids)
            if is_known.any():
                known = rows[is_known]
                self._vectors[known] = vectors[is_known]
                _codes_of(self._codes)[known] = codes[is_known]
                self._living += int(np.count_nonzero(self._is_gone[known]))
                self._is_gone[known] = False
            if not is_known.all():
                self._insert(rows[~is_known], ids[~is_known], vectors[~is_known], codes[~is_known])

    def remove(self, ids: Ids) -> int:
        """See VectorIndex. The rows stay, marked, until the next publication."""
        check_ids(ids)
        with self._lock.writing():
            ids = np.unique(ids)
            rows = np.searchsorted(self._ids, ids[self._is_row_of(ids)])
            rows = rows[~self._is_gone[rows]]
            self._is_gone[rows] = True
            self._living -= len(rows)
            return len(rows)

    def search(self, queries: Vectors, k: int) -> list[Hits]:
        """See VectorIndex."""
        check_count(k)
        queries = checked_queries(queries, self.dimension)
        with self._lock.reading():
            return [self._nearest(query, k) for query in queries]

    def range(self, queries: Vectors, threshold: float) -> list[Hits]:
        """See VectorIndex."""
        check_threshold(threshold)
        queries = checked_queries(queries, self.dimension)
        with self._lock.reading():
            candidates = self._candidates(queries, threshold)
            return [self._scored(*one, at_least=threshold) for one in zip(queries, candidates, strict=True)]

    def exact_range(self, query: Vectors, threshold: float) -> Hits:
        """See VectorIndex."""
        check_threshold(threshold)
        check_single(query)
        (only,) = checked_queries(query, self.dimension)
        found = []
        # No row is ever taken out, and newcomers only move the others on: none of those ahead is passed over.
        end = 0
        while end < len(self._ids):
            with self._lock.reading():
                begin, end = end, min(end + _BLOCK, len(self._ids))
                rows = self._all_reaching(only, threshold, begin, end)
                found.append(self._scored(only, rows, at_least=threshold))
        return gathered(self, found)

    def within(self, first: int, last: int) -> tuple[Ids, Halves]:
        """See VectorIndex."""
        with self._lock.reading():
            begin = int(np.searchsorted(self._ids, first))
            end = int(np.searchsorted(self._ids, last, side="right"))
            kept = np.flatnonzero(~self._is_gone[begin:end]) + begin
            return np.asarray(self._ids[kept]), np.asarray(self._vectors[kept])

    def holds(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """See VectorIndex."""
        check_ids(ids)
        with self._lock.reading():
            held = self._is_row_of(ids)
            held[held] = ~self._is_gone[np.searchsorted(self._ids, ids[held])]
            return held

    def _is_row_of(self, ids: Ids) -> npt.NDArray[np.bool_]:
        rows = np.searchsorted(self._ids, ids)
        held = rows < len(self._ids)
        held[held] = self._ids[rows[held]] == ids[held]
        return held

    def _insert(self, at: Ids, ids: Ids, vectors: Halves, codes: npt.NDArray[np.uint8]) -> None:
        """New rows before the rows `at`, which rise."""
        before = len(self._ids)
        total = before + len(ids)
        if at[0] < before:  # not at the end: everything after it moves
            codes = np.insert(_codes_of(self._codes), at, codes, axis=0)
            self._ids = np.insert(self._ids, at, ids)
            self._vectors = np.insert(self._vectors, at, vectors, axis=0)
            self._is_gone = np.insert(self._is_gone, at, False)
            kept = 0
        else:
            self._ids = _grown(self._ids, total)
            self._vectors = _grown(self._vectors, total)
            self._is_gone = _grown(self._is_gone, total)
            self._ids[before:], self._vectors[before:], self._is_gone[before:] = ids, vectors, False
            kept = before
        lists = _lists_of(self._codes)
        lists.resize(0, total)
        self._codes.ntotal = total
        _codes_of(self._codes)[kept:] = codes
        faiss.rev_swig_ptr(lists.get_ids(0), total)[before:] = np.arange(before, total)
        self._living += len(ids)
        self._scanner = self._new_scanner()

    def _new_scanner(self, rows: slice = slice(None)) -> "Scanner | None":
        """The compiled scan of the codes as they lie now, or of some that follow each other."""
        compiled = _compiled_scan() if self._may_compile else None
        if compiled is None or self._codes.nlist != 1 or self.dimension < FEWEST_SIGNS:
            return None
        if not _is_layout_known(self.dimension):
            return None
        return compiled(_codes_of(self._codes)[rows], self.dimension)

    def _candidates(self, queries: Vectors, threshold: float) -> list[Ids]:
        """Living rows that may reach the threshold, all but a rounding error under it sorted out, for each query."""
        if self.dimension < FEWEST_SIGNS or not len(self._ids):
            return [self._rows_reaching(query, threshold, np.arange(len(self._ids))) for query in queries]
        noise = estimate_noise(threshold, self.dimension)
        if self._scanner is None:
            faiss.omp_set_num_threads(1)  # holds for the calling thread only, so it is said here
            floor = threshold - self._margin.faiss * noise
            limits, _, rows = self._codes.range_search(queries, floor, params=self._parameters)
            found = np.split(rows, limits[1:-1].astype(np.int64)) if len(queries) else []
            return [
                self._rows_reaching(query, threshold, np.sort(one)) for query, one in zip(queries, found, strict=True)
            ]
        radius = differing_signs(threshold, self.dimension) + self._margin.compiled * sign_noise(
            threshold, self.dimension
        )
        return [
            self._scanner.reaching(
                self._vectors,
                self._is_gone,
                query,
                min(self.dimension, math.ceil(radius)),
                threshold - self._margin.compiled * noise,
                scan_floor(threshold),
            )
            for query in queries
        ]

    def _nearest(self, query: npt.NDArray[np.float32], k: int) -> Hits:
        """Whatever reaches the k-th score among the best estimates."""
        wanted = 2 * k + _SPARE_NEIGHBOURS
        if wanted < self._living and self.dimension >= FEWEST_SIGNS:
            if self._scanner is not None:
                rows = self._scanner.nearest(self._is_gone, query, wanted)
            else:
                faiss.omp_set_num_threads(1)
                gone = len(self._ids) - self._living
                _, labels = self._codes.search(query[np.newaxis], wanted + gone, params=self._parameters)
                rows = labels[0][labels[0] >= 0]
            best = self._scored(query, rows[~self._is_gone[rows]], limit=k)
            if len(best.ids) == k:
                (rows,) = self._candidates(query[np.newaxis], float(best.scores[-1]))
                return self._scored(query, rows, limit=k)
        return self._scored(query, np.flatnonzero(~self._is_gone), limit=k)

    def _all_reaching(self, query: npt.NDArray[np.float32], threshold: float, begin: int, end: int) -> Ids:
        """Of the rows in [begin, end)."""
        some = slice(begin, end)
        scanner = self._new_scanner(some)
        if scanner is None:
            return self._rows_reaching(query, threshold, np.arange(begin, end))
        return begin + scanner.all_reaching(self._vectors[some], self._is_gone[some], query, scan_floor(threshold))

    def _rows_reaching(self, query: npt.NDArray[np.float32], threshold: float, rows: Ids) -> Ids:
        """Those of the rows, which rise, that live and reach the threshold but for a rounding error."""
        found = [np.empty(0, np.int64)]
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            # A slice, where the rows follow each other, is mapped and not copied.
            run = slice(block[0], block[-1] + 1)
            halves = self._vectors[run] if block[-1] - block[0] == len(block) - 1 else self._vectors[block]
            reaches = widened(halves) @ query >= scan_floor(threshold)
            found.append(block[reaches & ~self._is_gone[block]])
        return np.concatenate(found)

    def _scored(
        self, query: npt.NDArray[np.float32], rows: Ids, *, at_least: float = -math.inf, limit: int | None = None
    ) -> Hits:
        # Rows at a time, for an answer may be the whole gallery; `cosines` gives the same bits either way.
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _BLOCK):
            scores[start : start + _BLOCK] = cosines(self._vectors[rows[start : start + _BLOCK]], query)
        return best_first(self._ids[rows], scores, at_least=at_least, limit=limit)


def can_compile() -> bool:
    """Whether the compiled scan can be used here."""
    return _compiled_scan() is not None


@cache
def _compiled_scan() -> "type[Scanner] | None":
    """The compiled scan, if numba is installed: it takes a second and 60 MiB to load, so only here."""
    try:
        compiled = importlib.import_module("storage.compiled")
    except ImportError:
        return None
    return compiled.Scanner if compiled.is_usable() else None


@cache
def _is_layout_known(dimension: int) -> bool:
    """Whether this FAISS writes a row as the compiled scan reads it; otherwise FAISS itself must scan."""
    vectors = np.random.default_rng(0).normal(size=(16, dimension))
    halves = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    rows = widened(halves).astype(np.float64)
    signs = np.packbits(rows > 0, axis=1, bitorder="little")
    factors = np.sum(rows * rows, axis=1) * math.sqrt(dimension) / np.abs(rows).sum(axis=1)
    encoded = _encoded(_empty_codes(dimension), halves)
    return (
        encoded.shape[1] == signs.shape[1] + 8
        and np.array_equal(encoded[:, : signs.shape[1]], signs)
        and np.allclose(np.ascontiguousarray(encoded[:, -4:]).view(np.float32)[:, 0], factors, rtol=1e-5)
    )


def _dimension_of(folder: Path) -> int:
    """What the files' sizes say. Raises ValueError for empty ones."""
    count = (folder / IDS_FILE).stat().st_size // np.dtype(np.int64).itemsize
    if not count:
        message = "there are no rows to build an index of"
        raise ValueError(message)
    return int((folder / VECTORS_FILE).stat().st_size // (count * np.dtype(np.float16).itemsize))


def _empty_codes(dimension: int) -> faiss.IndexIVFRaBitQ:
    """One list about the origin, so that codes are the signs themselves."""
    origin = faiss.IndexFlatIP(dimension)
    origin.add(np.zeros((1, dimension), np.float32))
    codes = faiss.IndexIVFRaBitQ(origin, dimension, 1, faiss.METRIC_INNER_PRODUCT)
    codes.is_trained = True
    return codes


def _lists_of(codes: faiss.IndexIVFRaBitQ) -> faiss.InvertedLists:
    lists = codes.invlists
    if lists is None:
        message = "the codes have no lists"
        raise ValueError(message)
    return lists


def _codes_of(codes: faiss.IndexIVFRaBitQ) -> npt.NDArray[np.uint8]:
    """The first list's codes (n, bytes), FAISS's own memory: hold the lock."""
    lists = _lists_of(codes)
    size = lists.list_size(0)
    if not size:
        return np.empty((0, codes.code_size), np.uint8)
    held: npt.NDArray[np.uint8] = faiss.rev_swig_ptr(lists.get_codes(0), size * codes.code_size)
    return held.reshape(size, codes.code_size)


def _encoded(codes: faiss.IndexIVFRaBitQ, vectors: Halves) -> npt.NDArray[np.uint8]:
    """FAISS's codes of vectors (n, d), all in the first list."""
    faiss.omp_set_num_threads(1)
    encoded = np.empty((len(vectors), codes.code_size), np.uint8)
    floats, lists = widened(vectors), np.zeros(len(vectors), np.int64)
    codes.encode_vectors(len(vectors), faiss.swig_ptr(floats), faiss.swig_ptr(lists), faiss.swig_ptr(encoded))
    return encoded


def _check_codes(codes: faiss.IndexIVFRaBitQ, vectors: Halves) -> None:
    """Encode some rows again: the file must be of this gallery and this FAISS's layout. Raises ValueError."""
    if codes.nlist != 1 or not len(vectors):
        return
    rows = np.unique(np.linspace(0, len(vectors) - 1, 16).astype(np.int64))
    if not np.array_equal(_encoded(codes, vectors[rows]), _codes_of(codes)[rows]):
        message = f"{CODES_FILE} was laid out otherwise than this FAISS does"
        raise ValueError(message)


T = TypeVar("T", bound=np.generic)


def _grown(array: npt.NDArray[T], rows: int) -> npt.NDArray[T]:
    """The array with so many rows, with room behind it so that most growth copies nothing."""
    room = array.base
    if not isinstance(room, np.ndarray) or len(room) < rows:
        room = np.empty((max(rows, len(array) * 3 // 2), *array.shape[1:]), array.dtype)
        room[: len(array)] = array
    return room[:rows]
