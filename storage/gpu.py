"""Every vector is compared on a graphics card, in float16; what may be an answer is scored on the host."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

import faiss
import numpy as np
import numpy.typing as npt

from storage.vectors import (
    ExactIndex,
    Halves,
    Hits,
    Ids,
    ReadersWriterLock,
    Vectors,
    check_count,
    check_new,
    check_threshold,
    checked_queries,
    widened,
)

#: FAISS finds no more neighbours on a card at once, and knows no range search there.
MOST_NEIGHBOURS: Final = 2_048
#: A card rounds the query to float16, too: 2**-11 of its length, and as much again for its sums.
DEVICE_ERROR: Final = 1e-3
#: Rows of the card that no id has any more are tolerated up to this share, then all is sent anew.
_STALE_SHARE: Final = 0.1
_ADDED_AT_ONCE: Final = 65_536

#: A flat FAISS index of inner products for so many dimensions, somewhere fast: `add`, `search`, `reset`.
Device = Callable[[int], Any]


class DeviceLost(RuntimeError):
    """The card failed in the middle of its work: the index answers no more, and is to be opened anew, here or elsewhere."""


def can_use_gpu() -> bool:
    """Whether FAISS was built for graphics cards and there is one."""
    return bool(getattr(faiss, "get_num_gpus", int)())


def first_gpu(dimension: int) -> Any:  # noqa: ANN401 - faiss-cpu has no such class
    """A flat float16 index on the first card."""
    library = cast("Any", faiss)
    options = library.GpuClonerOptions()
    options.useFloat16 = True
    resources = library.StandardGpuResources()
    return library.index_cpu_to_gpu(resources, 0, faiss.IndexFlatIP(dimension), options)


class GpuIndex:
    """See VectorIndex. A query with more hits than a card can find at once is answered by the host, exactly.

    Memory: 2 d bytes a vector on the card, an ExactIndex's on the host. Searches of the card take turns.
    """

    def __init__(self, dimension: int, *, device: Device = first_gpu) -> None:
        """dimension: at least 1."""
        self._host = ExactIndex(dimension)
        self._device = device(dimension)
        self._on_device: Ids = np.empty(0, np.int64)  # the id that each row of the card had when it was sent
        self._lock = ReadersWriterLock()
        self._turn = threading.Lock()  # a card's scratch memory is for one search at a time
        self._is_lost = False

    @property
    def dimension(self) -> int:
        """See VectorIndex."""
        return self._host.dimension

    @property
    def bytes(self) -> int:
        """See VectorIndex."""
        return self._host.bytes + self._on_device.nbytes

    def __len__(self) -> int:
        """See VectorIndex."""
        return len(self._host)

    def add(self, ids: Ids, vectors: Halves) -> None:
        """See VectorIndex."""
        check_new(ids, vectors, self.dimension)
        with self._lock.writing():
            self._host.add(ids, vectors)
            self._send(ids, vectors)
            self._tidy()

    def remove(self, ids: Ids) -> int:
        """See VectorIndex."""
        with self._lock.writing():
            removed = self._host.remove(ids)
            self._tidy()
            return removed

    def search(self, queries: Vectors, k: int) -> list[Hits]:
        """See VectorIndex."""
        check_count(k)
        queries = checked_queries(queries, self.dimension)
        with self._lock.reading():
            return [
                self._answered(query, ids, least_seen, at_least=-np.inf, k=k)
                for query, (ids, least_seen) in zip(queries, self._seen(queries), strict=True)
            ]

    def range(self, queries: Vectors, threshold: float) -> list[Hits]:
        """See VectorIndex."""
        check_threshold(threshold)
        queries = checked_queries(queries, self.dimension)
        with self._lock.reading():
            return [
                self._answered(query, ids, least_seen, at_least=threshold, k=None)
                for query, (ids, least_seen) in zip(queries, self._seen(queries), strict=True)
            ]

    def exact_range(self, query: Vectors, threshold: float) -> Hits:
        """See VectorIndex."""
        return self._host.exact_range(query, threshold)

    def within(self, first: int, last: int) -> tuple[Ids, Halves]:
        """See VectorIndex."""
        return self._host.within(first, last)

    def holds(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """See VectorIndex."""
        return self._host.holds(ids)

    def _seen(self, queries: Vectors) -> list[tuple[Ids, float]]:
        """What the card finds for each query, and the score that nothing else on it exceeds by more than an error."""
        count = min(MOST_NEIGHBOURS, len(self._on_device))
        if not count or not len(queries):
            return [(np.empty(0, np.int64), -np.inf)] * len(queries)
        with self._turn:
            scores, rows = self._on_card(lambda: self._device.search(queries, count))
        is_all = count == len(self._on_device)
        return [
            (self._on_device[of_one], -np.inf if is_all else float(score))
            for of_one, score in zip(rows, scores[:, -1], strict=True)
        ]

    def _answered(
        self, query: npt.NDArray[np.float32], ids: Ids, least_seen: float, *, at_least: float, k: int | None
    ) -> Hits:
        """The exact answer from what the card found, or from the host where something may lie beyond it."""
        found = self._host.among(query, ids, at_least=at_least, limit=k)
        floor = at_least if k is None else float(found.scores[-1]) if len(found.ids) == k else -np.inf
        if least_seen == -np.inf or least_seen + DEVICE_ERROR < floor:
            return found
        asked = query[np.newaxis]
        return (self._host.range(asked, at_least) if k is None else self._host.search(asked, k))[0]

    def _on_card(self, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - faiss-cpu has no such class
        """Do it on the card. What it holds after a failure nobody knows, so from then on it is asked for nothing."""
        if self._is_lost:
            message = "the graphics card failed before"
            raise DeviceLost(message)
        try:
            return work()
        except RuntimeError as error:
            self._is_lost = True
            message = f"the graphics card failed: {error}"
            raise DeviceLost(message) from error

    def _send(self, ids: Ids, vectors: Halves) -> None:
        for start in range(0, len(ids), _ADDED_AT_ONCE):
            part = widened(vectors[start : start + _ADDED_AT_ONCE])
            self._on_card(partial(self._device.add, part))
        self._on_device = np.concatenate([self._on_device, ids])

    def _tidy(self) -> None:
        """Send everything anew when too much of what the card holds is removed or replaced."""
        if len(self._on_device) - len(self._host) > max(MOST_NEIGHBOURS // 2, _STALE_SHARE * len(self._host)):
            self._on_card(self._device.reset)
            self._on_device = np.empty(0, np.int64)
            every = np.iinfo(np.int64)
            self._send(*self._host.within(every.min, every.max))
