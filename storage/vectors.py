"""Vectors under ids, searched by cosine: the port, what all kinds share, and the exact index for small galleries.

An index holds float16 vectors and is asked with float32 ones. A score is the cosine of the two, summed in float64 and
given as float32, by one function for all kinds: the same bits in each of them, so a threshold cuts the same way.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import faiss
import numpy as np
import numpy.typing as npt

#: int64 (n,).
Ids = npt.NDArray[np.int64]
#: float32 (n, d), each row of unit length: what an index is asked with.
Vectors = npt.NDArray[np.float32]
#: float16 (n, d), each row of unit length but for the rounding: what an index holds.
Halves = npt.NDArray[np.float16]
#: float32 (n,), cosines in [-1, 1].
Scores = npt.NDArray[np.float32]

#: How far a vector's length may be from 1: rounding to float16 takes it at most 5e-4 away.
LENGTH_TOLERANCE: Final = 1e-3
#: Scans sum in float32, in an order that depends on the batch. Bound of that error for unit vectors of up to 1,024
#: dimensions in four lanes: 1,024 / 4 * 2**-24 = 1.5e-5 (for the 512 of today's models a half of that).
SUM_ERROR: Final = 2e-5
#: Rows that are compared, or scored, at once: bounds the memory of an answer that holds a whole gallery, and how long an
#: exact scan keeps a change waiting (two milliseconds).
_ROWS_AT_ONCE: Final = 4_096
#: What Python takes for one id in a dictionary of rows, and in a set: the numbers and their share of the table.
BYTES_PER_KEY: Final = 100


@dataclass(frozen=True, slots=True)
class Hits:
    """What one query found: best score first, equal scores by rising id. Both (n,)."""

    ids: Ids
    scores: Scores


class VectorIndex(Protocol):
    """Unit vectors under ids. Safe from several threads: searches run side by side, changes exclude them.

    Every method raises ValueError for arrays of another dtype or shape, not finite, or not of unit length. `len`, `bytes` and
    `dimension` wait for nobody; beside a change they tell of before, after or amid it.
    """

    @property
    def dimension(self) -> int:
        """d: how many numbers a vector has."""

    @property
    def bytes(self) -> int:
        """Of this host's memory, mapped files with the rest; to within a tenth."""

    def add(self, ids: Ids, vectors: Halves) -> None:
        """Put `vectors` (n, d) under `ids` (n,).

        What lies under an id already is replaced, and the last one of a call wins: adding again changes nothing.
        """

    def remove(self, ids: Ids) -> int:
        """Forget these; unknown ids are fine. Returns how many were there."""

    def search(self, queries: Vectors, k: int) -> list[Hits]:
        """The `k` (at least 1) nearest of each query, or all when there are fewer."""

    def range(self, queries: Vectors, threshold: float) -> list[Hits]:
        """All whose float32 cosine is at least float32(`threshold`), for each query."""

    def exact_range(self, query: Vectors, threshold: float) -> Hits:
        """What `range` answers to one query (1, d), found without any short cut: every vector is compared.

        Changes go on between its steps. It finds all that was there the whole time, and nothing that is gone at the end; of
        what came or was replaced meanwhile it may know or not.
        """

    def within(self, first: int, last: int) -> tuple[Ids, Halves]:
        """The vectors with first <= id <= last, (n,) and (n, d), by rising id."""

    def holds(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which of these it has, (n,)."""

    def __len__(self) -> int:
        """How many vectors it holds."""


def halved(vectors: npt.NDArray[np.float32]) -> Halves:
    """Vectors (n, d) rounded to what an index holds."""
    return vectors.astype(np.float16)


def widened(halves: Halves) -> Vectors:
    """The same numbers as float32, in C order; five times as fast as numpy's own way. Finite numbers only."""
    bits = np.left_shift(halves.view(np.int16), 13, dtype=np.int32, order="C").view(np.uint32)
    # Sign, exponent and fraction are in place now; the two exponents count from 112 apart.
    np.bitwise_and(bits, 0x8FFF_E000, out=bits)
    floats: Vectors = bits.view(np.float32)
    return np.multiply(floats, np.float32(2.0**112), out=floats)


def cosines(vectors: Halves | Vectors, query: npt.NDArray[np.float32]) -> Scores:
    """The scores (n,) of held vectors (n, d) with a query (d,): the one function that all kinds score with.

    A pair's score is the same bits whatever else is scored with it.
    """
    scores = np.empty(len(vectors), np.float32)
    wide = query.astype(np.float64)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        # einsum without BLAS sums each row by itself, in one order; cast beforehand, as its own casts cut rows up.
        rows = vectors[start : start + _ROWS_AT_ONCE]
        sums = np.einsum("nd,d->n", rows.astype(np.float64, order="C"), wide, optimize=False)
        scores[start : start + _ROWS_AT_ONCE] = np.minimum(np.maximum(sums, -1), 1)
    return scores


def scan_floor(threshold: float) -> float:
    """The float32 product from which a scan takes candidates: a rounding error under the threshold.

    Lengths are not quite 1, so a product may lie below -1 where the score does not.
    """
    return threshold - SUM_ERROR if threshold > SUM_ERROR - 1 else -2.0


def best_first(ids: Ids, scores: Scores, *, at_least: float = -np.inf, limit: int | None = None) -> Hits:
    """Scored vectors as an answer: those of float32(`at_least`) and over, ordered, the first `limit` of them."""
    kept = np.flatnonzero(scores >= np.float32(at_least))
    ids, scores = ids[kept], scores[kept]
    order = np.lexsort((ids, -scores))[:limit]
    return Hits(ids[order], scores[order])


def gathered(index: VectorIndex, parts: Sequence[Hits]) -> Hits:
    """What a query found in parts while the index could change, as one answer: each id once, and none that is gone."""
    ids = np.concatenate([np.empty(0, np.int64), *(part.ids for part in parts)])
    scores = np.concatenate([np.empty(0, np.float32), *(part.scores for part in parts)])
    ids, first = np.unique(ids, return_index=True)
    held = index.holds(ids)
    return best_first(ids[held], scores[first[held]])


class ExactIndex:
    """Every vector is compared, in float32, by FAISS; the scores that leave are those of `cosines`.

    One thread a search: callers bring their own. Memory: 4 d + 108 bytes a vector.
    """

    def __init__(self, dimension: int) -> None:
        """dimension: at least 1."""
        if dimension < 1:
            message = "a vector has at least one dimension"
            raise ValueError(message)
        self._flat = faiss.IndexFlatIP(dimension)
        self._ids: Ids = np.empty(0, np.int64)  # of each row of _flat
        self._rows: dict[int, int] = {}  # of each id
        self._lock = ReadersWriterLock()

    @property
    def dimension(self) -> int:
        """See VectorIndex."""
        return int(self._flat.d)

    @property
    def bytes(self) -> int:
        """See VectorIndex."""
        return len(self._ids) * (4 * self.dimension + self._ids.itemsize + BYTES_PER_KEY)

    def __len__(self) -> int:
        """See VectorIndex."""
        return len(self._ids)

    def add(self, ids: Ids, vectors: Halves) -> None:
        """See VectorIndex."""
        check_new(ids, vectors, self.dimension)
        wide = widened(vectors)
        last = {int(one): position for position, one in enumerate(ids)}
        with self._lock.writing():
            fresh = [position for one, position in last.items() if one not in self._rows]
            known = [(self._rows[one], position) for one, position in last.items() if one in self._rows]
            if known:
                rows, positions = np.array(known).T
                self._matrix()[rows] = wide[positions]
            if fresh:
                self._rows.update((int(ids[position]), row) for row, position in enumerate(fresh, len(self._ids)))
                self._ids = np.concatenate([self._ids, ids[fresh]])
                self._flat.add(wide[fresh])

    def remove(self, ids: Ids) -> int:
        """See VectorIndex. The rest moves up: milliseconds for 10,000 vectors, so remove in batches."""
        check_ids(ids)
        with self._lock.writing():
            rows = np.array([self._rows[one] for one in set(ids.tolist()) if one in self._rows], np.int64)
            if len(rows):
                self._flat.remove_ids(faiss.IDSelectorBatch(rows))
                self._ids = np.delete(self._ids, rows)
                self._rows = {one: row for row, one in enumerate(self._ids.tolist())}
            return len(rows)

    def search(self, queries: Vectors, k: int) -> list[Hits]:
        """See VectorIndex."""
        check_count(k)
        queries = checked_queries(queries, self.dimension)
        with self._lock.reading():
            if k >= len(self._ids):
                everything = np.arange(len(self._ids))
                return [self._scored(query, everything) for query in queries]
            # One more than asked for shows whether the last place is contested, by an equal or by a rounding error.
            faiss.omp_set_num_threads(1)  # holds for the calling thread only, so it is said here
            scores, rows = self._flat.search(queries, k + 1)
            floors = np.minimum(scores[:, k - 1], 1) - SUM_ERROR  # all products over 1 are the score 1
            floors = np.array([scan_floor(float(floor)) for floor in floors])  # and all under -1 are -1
            contested = np.flatnonzero(scores[:, k] >= floors)
            candidates = list(rows)
            for position in contested:
                candidates[position] = self._rows_above(queries[position : position + 1], floors[position])[0]
            return [self._scored(query, found, limit=k) for query, found in zip(queries, candidates, strict=True)]

    def range(self, queries: Vectors, threshold: float) -> list[Hits]:
        """See VectorIndex."""
        check_threshold(threshold)
        queries = checked_queries(queries, self.dimension)
        with self._lock.reading():
            candidates = self._rows_above(queries, scan_floor(threshold))
            return [
                self._scored(query, found, at_least=threshold) for query, found in zip(queries, candidates, strict=True)
            ]

    def exact_range(self, query: Vectors, threshold: float) -> Hits:
        """See VectorIndex."""
        check_threshold(threshold)
        check_single(query)
        (only,) = checked_queries(query, self.dimension)
        found = []
        # From the last row to the first: a removal moves the rows behind it up, so none of those ahead is passed over.
        end = sys.maxsize
        while end:
            with self._lock.reading():
                end = min(end, len(self._ids))
                start = max(0, end - _ROWS_AT_ONCE)
                rows = start + np.flatnonzero(self._matrix()[start:end] @ only >= scan_floor(threshold))
                found.append(self._scored(only, rows, at_least=threshold))
                end = start
        return gathered(self, found)

    def among(self, query: npt.NDArray[np.float32], ids: Ids, *, at_least: float, limit: int | None = None) -> Hits:
        """What `range` answers for a query (d,), were these ids the only ones. Unknown ones are left out."""
        with self._lock.reading():
            rows = np.array([self._rows[one] for one in set(ids.tolist()) if one in self._rows], np.int64)
            return self._scored(query, rows, at_least=at_least, limit=limit)

    def within(self, first: int, last: int) -> tuple[Ids, Halves]:
        """See VectorIndex."""
        with self._lock.reading():
            rows = np.flatnonzero((self._ids >= first) & (self._ids <= last))
            rows = rows[np.argsort(self._ids[rows])]
            return self._ids[rows], self._matrix()[rows].astype(np.float16)

    def holds(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """See VectorIndex."""
        check_ids(ids)
        with self._lock.reading():
            return np.fromiter((one in self._rows for one in ids.tolist()), np.bool_, len(ids))

    def _rows_above(self, queries: Vectors, floor: float) -> list[Ids]:
        faiss.omp_set_num_threads(1)
        limits, _, rows = self._flat.range_search(queries, float(floor))
        return np.split(rows, limits[1:-1].astype(np.int64)) if len(queries) else []

    def _scored(
        self, query: npt.NDArray[np.float32], rows: Ids, *, limit: int | None = None, at_least: float = -np.inf
    ) -> Hits:
        return best_first(self._ids[rows], cosines(self._matrix()[rows], query), at_least=at_least, limit=limit)

    def _matrix(self) -> Vectors:
        """FAISS's own rows, not a copy: hold the lock."""
        held: Vectors = faiss.rev_swig_ptr(self._flat.get_xb(), self._flat.ntotal * self._flat.d)
        return held.reshape(self._flat.ntotal, self._flat.d)


class ReadersWriterLock:
    """Many readers or one writer; a waiting writer goes before new readers: searches cannot starve an erasure."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writers_waiting = 0
        self._is_writing = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Side by side with other readers."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_writing and not self._writers_waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone."""
        with self._changed:
            self._writers_waiting += 1
            try:
                self._changed.wait_for(lambda: not self._is_writing and not self._readers)
            finally:
                self._writers_waiting -= 1
            self._is_writing = True
        try:
            yield
        finally:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()


def check_ids(ids: Ids) -> None:
    """Raise ValueError for what are no ids."""
    if ids.dtype != np.int64 or ids.ndim != 1:
        message = f"ids are int64 (n,), not {ids.dtype} {ids.shape}"
        raise ValueError(message)


def check_new(ids: Ids, vectors: Halves, dimension: int) -> None:
    """Raise ValueError for what an index must not hold."""
    check_ids(ids)
    _check_rows(vectors, np.dtype(np.float16), dimension)
    if len(ids) != len(vectors):
        message = f"{len(ids)} ids came with {len(vectors)} vectors"
        raise ValueError(message)


def checked_queries(queries: Vectors, dimension: int) -> Vectors:
    """The queries in C order. Raises ValueError for what an index cannot be asked with."""
    _check_rows(queries, np.dtype(np.float32), dimension)
    return np.ascontiguousarray(queries)


def check_single(query: Vectors) -> None:
    """Raise ValueError for anything but one query."""
    if len(query) != 1:
        message = f"one query is asked here, not {len(query)}"
        raise ValueError(message)


def check_threshold(threshold: float) -> None:
    """Raise ValueError for a threshold that is no number."""
    if not np.isfinite(threshold):
        message = "a threshold is a finite number"
        raise ValueError(message)


def check_count(k: int) -> None:
    """Raise ValueError for a number of neighbours that cannot be asked for."""
    if k < 1:
        message = "k is at least 1"
        raise ValueError(message)


def _check_rows(rows: Halves | Vectors, dtype: np.dtype[np.float16] | np.dtype[np.float32], dimension: int) -> None:
    if rows.dtype != dtype or rows.ndim != 2 or rows.shape[1] != dimension:  # noqa: PLR2004 - rows and columns
        message = f"vectors are {dtype} (n, {dimension}), not {rows.dtype} {rows.shape}"
        raise ValueError(message)
    lengths = np.linalg.norm(rows.astype(np.float32, copy=False), axis=1)
    if not np.all(np.abs(lengths - 1) <= LENGTH_TOLERANCE):  # a NaN or an infinity fails the comparison too
        message = "vectors are finite and of unit length"
        raise ValueError(message)
