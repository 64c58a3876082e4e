"""Vectors under ids, searched by cosine: the port, and the exact index that small galleries and newcomers use."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import faiss
import numpy as np
import numpy.typing as npt

#: int64 (n,).
Ids = npt.NDArray[np.int64]
#: float32 (n, d), each row of unit length.
Vectors = npt.NDArray[np.float32]
#: float32 (n,), cosines in [-1, 1].
Scores = npt.NDArray[np.float32]

#: How far a vector's length may be from 1: float16 templates come back within 5e-4 of it.
LENGTH_TOLERANCE: Final = 1e-3
#: FAISS sums in float32, in an order that depends on the batch. Bound of its error for unit vectors of up to 1,024
#: dimensions in four lanes: 1,024 / 4 * 2**-24 = 1.5e-5 (for the 512 of today's models a half of that).
_SUM_ERROR: Final = 2e-5


@dataclass(frozen=True, slots=True)
class Hits:
    """What one query found: best score first, equal scores by rising id. Both (n,)."""

    ids: Ids
    scores: Scores


class VectorIndex(Protocol):
    """Unit vectors under ids. Safe from several threads: searches run side by side, changes exclude them.

    Every method raises ValueError for arrays of another dtype or shape, not finite, or not of unit length.
    """

    @property
    def dimension(self) -> int:
        """d: how many numbers a vector has."""

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Put `vectors` (n, d) under `ids` (n,).

        What lies under an id already is replaced, and the last one of a call wins: adding again changes nothing.
        """

    def remove(self, ids: Ids) -> int:
        """Forget these; unknown ids are fine. Returns how many were there."""

    def search(self, queries: Vectors, k: int) -> list[Hits]:
        """The `k` (at least 1) nearest of each query, or all when there are fewer."""

    def range(self, queries: Vectors, threshold: float) -> list[Hits]:
        """All whose float32 cosine is at least float32(`threshold`), for each query."""

    def __len__(self) -> int:
        """How many vectors it holds."""


class ExactIndex:
    """Every vector is compared, in float32, by FAISS; the scores that leave are summed anew in float64.

    So a pair's score is the same bits whatever else is in the index or in the batch, and a threshold cuts cleanly. One
    thread a search: callers bring their own. Memory: 4 d bytes a vector.
    """

    def __init__(self, dimension: int) -> None:
        """dimension: at least 1."""
        if dimension < 1:
            message = "a vector has at least one dimension"
            raise ValueError(message)
        self._flat = faiss.IndexFlatIP(dimension)
        self._ids: Ids = np.empty(0, np.int64)  # of each row of _flat
        self._rows: dict[int, int] = {}  # of each id
        self._lock = _ReadersWriterLock()

    @property
    def dimension(self) -> int:
        """See VectorIndex."""
        return int(self._flat.d)

    def __len__(self) -> int:
        """See VectorIndex."""
        return len(self._rows)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """See VectorIndex."""
        _check_ids(ids)
        vectors = _checked_vectors(vectors, self.dimension)
        if len(ids) != len(vectors):
            message = f"{len(ids)} ids came with {len(vectors)} vectors"
            raise ValueError(message)
        last = {int(one): position for position, one in enumerate(ids)}
        with self._lock.writing():
            fresh = [position for one, position in last.items() if one not in self._rows]
            known = [(self._rows[one], position) for one, position in last.items() if one in self._rows]
            if known:
                rows, positions = np.array(known).T
                self._matrix()[rows] = vectors[positions]
            if fresh:
                self._rows.update((int(ids[position]), row) for row, position in enumerate(fresh, len(self._ids)))
                self._ids = np.concatenate([self._ids, ids[fresh]])
                self._flat.add(vectors[fresh])

    def remove(self, ids: Ids) -> int:
        """See VectorIndex. The rest moves up: milliseconds for 10,000 vectors, so remove in batches."""
        _check_ids(ids)
        with self._lock.writing():
            rows = np.array([self._rows[one] for one in set(ids.tolist()) if one in self._rows], np.int64)
            if len(rows):
                self._flat.remove_ids(faiss.IDSelectorBatch(rows))
                self._ids = np.delete(self._ids, rows)
                self._rows = {one: row for row, one in enumerate(self._ids.tolist())}
            return len(rows)

    def search(self, queries: Vectors, k: int) -> list[Hits]:
        """See VectorIndex."""
        if k < 1:
            message = "k is at least 1"
            raise ValueError(message)
        queries = _checked_vectors(queries, self.dimension)
        with self._lock.reading():
            if k >= len(self._ids):
                everything = np.arange(len(self._ids))
                return [self._scored(query, everything) for query in queries]
            # One more than asked for shows whether the last place is contested, by an equal or by a rounding error.
            faiss.omp_set_num_threads(1)  # holds for the calling thread only, so it is said here
            scores, rows = self._flat.search(queries, k + 1)
            floors = scores[:, k - 1] - 2 * _SUM_ERROR
            contested = np.flatnonzero(scores[:, k] >= floors)
            candidates = list(rows)
            for position in contested:
                candidates[position] = self._rows_above(queries[position : position + 1], floors[position])[0]
            return [self._scored(query, found, limit=k) for query, found in zip(queries, candidates, strict=True)]

    def range(self, queries: Vectors, threshold: float) -> list[Hits]:
        """See VectorIndex."""
        queries = _checked_vectors(queries, self.dimension)
        if not np.isfinite(threshold):
            message = "a threshold is a finite number"
            raise ValueError(message)
        with self._lock.reading():
            candidates = self._rows_above(queries, threshold - _SUM_ERROR)
            return [
                self._scored(query, found, at_least=threshold) for query, found in zip(queries, candidates, strict=True)
            ]

    def _rows_above(self, queries: Vectors, floor: float) -> list[Ids]:
        faiss.omp_set_num_threads(1)
        limits, _, rows = self._flat.range_search(queries, float(floor))
        return np.split(rows, limits[1:-1].astype(np.int64)) if len(queries) else []

    def _scored(
        self, query: npt.NDArray[np.float32], rows: Ids, *, limit: int | None = None, at_least: float = -np.inf
    ) -> Hits:
        # einsum without BLAS sums each row by itself, in one order.
        cosines = np.einsum("nd,d->n", self._matrix()[rows], query, dtype=np.float64, optimize=False)
        scores = np.clip(cosines, -1, 1).astype(np.float32)
        kept = np.flatnonzero(scores >= np.float32(at_least))
        ids, scores = self._ids[rows[kept]], scores[kept]
        order = np.lexsort((ids, -scores))[:limit]
        return Hits(ids[order], scores[order])

    def _matrix(self) -> Vectors:
        """FAISS's own rows, not a copy: hold the lock."""
        held: Vectors = faiss.rev_swig_ptr(self._flat.get_xb(), self._flat.ntotal * self._flat.d)
        return held.reshape(self._flat.ntotal, self._flat.d)


class _ReadersWriterLock:
    """Many readers or one writer; a waiting writer goes before new readers: searches cannot starve an erasure."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writers_waiting = 0
        self._is_writing = False

    @contextmanager
    def reading(self) -> Iterator[None]:
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


def _check_ids(ids: Ids) -> None:
    if ids.dtype != np.int64 or ids.ndim != 1:
        message = f"ids are int64 (n,), not {ids.dtype} {ids.shape}"
        raise ValueError(message)


def _checked_vectors(vectors: Vectors, dimension: int) -> Vectors:
    """The vectors in C order. Raises ValueError for what an index must not hold."""
    if vectors.dtype != np.float32 or vectors.ndim != 2 or vectors.shape[1] != dimension:  # noqa: PLR2004
        message = f"vectors are float32 (n, {dimension}), not {vectors.dtype} {vectors.shape}"
        raise ValueError(message)
    lengths = np.linalg.norm(vectors, axis=1)
    if not np.all(np.abs(lengths - 1) <= LENGTH_TOLERANCE):  # a NaN or an infinity fails the comparison too
        message = "vectors are finite and of unit length"
        raise ValueError(message)
    return np.ascontiguousarray(vectors)
