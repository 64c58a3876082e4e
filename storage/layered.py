"""A published index with its newcomers: files that never change below, a small index in memory above, as one."""

import threading
from typing import Final

import numpy as np
import numpy.typing as npt

from storage.onebit import DEFAULT_MARGIN, Margin, OneBitIndex
from storage.vectors import (
    BYTES_PER_KEY,
    ExactIndex,
    Halves,
    Hits,
    Ids,
    ReadersWriterLock,
    VectorIndex,
    Vectors,
    best_first,
    check_ids,
    check_new,
    gathered,
)

#: Rows above which the tail is scanned by its sign bits; exact comparison of more would take over a millisecond.
ONE_BIT_ABOVE: Final = 5_000


class LayeredIndex:
    """A base and a tail in memory. See VectorIndex; here a removal is final: whatever was removed is not added again.

    The base is this index's own from now on: removals go through to it.
    """

    def __init__(
        self,
        dimension: int,
        base: VectorIndex | None = None,
        *,
        margin: Margin = DEFAULT_MARGIN,
        one_bit_above: int = ONE_BIT_ABOVE,
    ) -> None:
        """base: None while nothing is published. margin: the tail's. Raises ValueError for a base of another dimension."""
        if base is not None and base.dimension != dimension:
            message = f"a base of {base.dimension} dimensions cannot carry vectors of {dimension}"
            raise ValueError(message)
        self._base: VectorIndex = ExactIndex(dimension) if base is None else base
        self._tail: VectorIndex = ExactIndex(dimension)
        self._margin = margin
        self._one_bit_above = one_bit_above
        self._removed: set[int] = set()
        self._changing = threading.Lock()  # one change at a time; searches go on while a change is prepared
        self._lock = ReadersWriterLock()

    @property
    def dimension(self) -> int:
        """See VectorIndex."""
        return self._base.dimension

    @property
    def bytes(self) -> int:
        """See VectorIndex."""
        return self._base.bytes + self._tail.bytes + len(self._removed) * BYTES_PER_KEY

    @property
    def tail_size(self) -> int:
        """Vectors above the base."""
        return len(self._tail)

    @property
    def removed(self) -> int:
        """Ids that were ever removed here."""
        return len(self._removed)

    def __len__(self) -> int:
        """See VectorIndex."""
        return len(self._base) + len(self._tail)

    def add(self, ids: Ids, vectors: Halves) -> None:
        """See VectorIndex. What the base holds stays as it is, and what was removed stays away."""
        check_new(ids, vectors, self.dimension)
        with self._changing:
            is_new = ~self._base.holds(ids)
            if self._removed:
                is_new &= np.fromiter((one not in self._removed for one in ids.tolist()), np.bool_, len(ids))
            ids, vectors = ids[is_new], vectors[is_new]
            if isinstance(self._tail, ExactIndex) and len(self._tail) + len(ids) > self._one_bit_above:
                grown = OneBitIndex(self.dimension, margin=self._margin)
                every = np.iinfo(np.int64)
                grown.add(*self._tail.within(every.min, every.max))
                grown.add(ids, vectors)
                with self._lock.writing():
                    self._tail = grown
            else:
                self._tail.add(ids, vectors)

    def remove(self, ids: Ids) -> int:
        """See VectorIndex."""
        check_ids(ids)
        with self._changing, self._lock.writing():
            self._removed.update(ids.tolist())
            return self._base.remove(ids) + self._tail.remove(ids)

    def search(self, queries: Vectors, k: int) -> list[Hits]:
        """See VectorIndex."""
        with self._lock.reading():
            layers = zip(self._base.search(queries, k), self._tail.search(queries, k), strict=True)
        return [_merged(below, above, limit=k) for below, above in layers]

    def range(self, queries: Vectors, threshold: float) -> list[Hits]:
        """See VectorIndex."""
        with self._lock.reading():
            layers = zip(self._base.range(queries, threshold), self._tail.range(queries, threshold), strict=True)
        return [_merged(below, above) for below, above in layers]

    def exact_range(self, query: Vectors, threshold: float) -> Hits:
        """See VectorIndex."""
        # Without this index's lock: no vector goes from one layer to the other, and a tail that is followed by another
        # keeps all it had.
        layers = self._base, self._tail
        return gathered(self, [layer.exact_range(query, threshold) for layer in layers])

    def within(self, first: int, last: int) -> tuple[Ids, Halves]:
        """See VectorIndex."""
        with self._lock.reading():
            below, above = self._base.within(first, last), self._tail.within(first, last)
        ids, vectors = np.concatenate([below[0], above[0]]), np.concatenate([below[1], above[1]])
        if len(below[0]) and len(above[0]) and below[0][-1] > above[0][0]:
            order = np.argsort(ids)
            return ids[order], vectors[order]
        return ids, vectors

    def holds(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """See VectorIndex."""
        with self._lock.reading():
            held: npt.NDArray[np.bool_] = self._base.holds(ids) | self._tail.holds(ids)
            return held


def _merged(below: Hits, above: Hits, *, limit: int | None = None) -> Hits:
    ids, scores = np.concatenate([below.ids, above.ids]), np.concatenate([below.scores, above.scores])
    return best_first(ids, scores, limit=limit)
