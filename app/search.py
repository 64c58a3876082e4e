"""Who looks like this? A gallery's vectors in memory, caught up with MongoDB at the start of every query.

Each process keeps its own copy. The head (`Gallery.seq`) says how far the changes reach; rows above what the copy has seen
are read in order, and must be contiguous: a hole means a stale read, which is waited for. So a search that starts after
an enrolment was answered sees it, in every process. Status is never kept here.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import ParamSpec, Protocol, TypeVar

import numpy as np
import structlog

from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Identity
from app.documents.sealed import gallery_key, open_template
from app.domain.faces import Embedding
from app.errors import NotReady
from app.keys import DataKey, GalleryKey, KeyRing
from storage.vectors import ExactIndex, VectorIndex

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

ROWS_AT_ONCE = 2000
#: How long a query waits for another one that catches up.
PATIENCE_SECONDS = 2.0
#: A hole in the rows is a read that is not majority-fresh yet: it closes within a replication round trip.
HOLE_RETRIES, HOLE_PAUSE_SECONDS = 20, 0.05


class Compute(Protocol):
    """The Runtime's bounded executor for blocking work."""

    def __call__(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Run the work off the event loop."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One sample at or above the threshold."""

    identity_id: str
    sample_id: str
    seq: int
    score: float


@dataclass(frozen=True, slots=True)
class Hits:
    """Hits, best first, and the `seq` that the search saw."""

    items: list[Hit]
    as_of_seq: int


@dataclass(slots=True)
class _Copy:
    """One gallery's vectors in this process. Vector ids are the samples' `seq`."""

    epoch: str
    contract: str
    index: VectorIndex
    seen: int = 0
    samples: dict[int, tuple[str, str]] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=dict)


class Search:
    """The galleries' vectors in this process."""

    def __init__(self, keys: KeyRing, compute: Compute) -> None:
        self._keys = keys
        self._compute = compute
        self._copies: dict[str, _Copy] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def range(self, gallery: Gallery, probe: Embedding, threshold: float) -> Hits:
        """Every sample of the gallery whose cosine to the probe (d,) is at least the threshold, as of its head.

        gallery: as just read: its `seq` is how far the search must see. Raises NotReady when a hole in the rows stays.
        """
        copy = await self._caught_up(gallery)
        seen = copy.seen
        (found,) = await self._compute(copy.index.range, probe[np.newaxis, :], threshold)
        items = []
        for seq, score in zip(found.ids.tolist(), found.scores.tolist(), strict=True):
            known = copy.samples.get(seq)
            if known is not None:  # removed between the scan and here
                items.append(Hit(identity_id=known[0], sample_id=known[1], seq=seq, score=score))
        return Hits(items=items, as_of_seq=seen)

    async def warm(self, gallery: Gallery) -> int:
        """Catch up without a query; returns how many vectors are in memory."""
        return len((await self._caught_up(gallery)).index)

    def size(self, gallery_id: str) -> int:
        """Vectors of the gallery in this process."""
        copy = self._copies.get(gallery_id)
        return 0 if copy is None else len(copy.index)

    async def _caught_up(self, gallery: Gallery) -> _Copy:
        copy = self._copies.get(gallery.id)
        if (
            copy is not None
            and copy.epoch == gallery.epoch
            and copy.contract == gallery.contract
            and copy.seen >= gallery.seq
        ):
            return copy
        waiting_since = time.monotonic()
        async with self._locks.setdefault(gallery.id, asyncio.Lock()):
            if time.monotonic() - waiting_since > PATIENCE_SECONDS:
                # With MongoDB away, or a gallery that is still being read, each one after the other would wait as long.
                raise NotReady("The gallery cannot be searched at the moment.")
            copy = self._copies.get(gallery.id)
            if copy is None or copy.epoch != gallery.epoch or copy.contract != gallery.contract:
                copy = _Copy(epoch=gallery.epoch, contract=gallery.contract, index=ExactIndex(gallery.dimension))
                self._copies[gallery.id] = copy
            key = gallery_key(self._keys, gallery)
            holes = 0
            while copy.seen < gallery.seq:
                rows = await GalleryChange.after(gallery.id, copy.seen, gallery.seq, ROWS_AT_ONCE)
                run = _contiguous(rows, copy.seen)
                if not run:
                    holes += 1
                    if holes > HOLE_RETRIES:
                        raise NotReady("The gallery's changes cannot be read in full at the moment.")
                    await asyncio.sleep(HOLE_PAUSE_SECONDS)
                    continue
                await self._apply(copy, gallery.id, key, run)
            return copy

    async def _apply(self, copy: _Copy, gallery_id: str, key: GalleryKey, rows: list[GalleryChange]) -> None:
        """Bring rows into the copy. Adds are idempotent by sample; a removal wins over any add of its sample."""
        removed = {row.sample_id for row in rows if row.kind == "remove"}
        added = [row for row in rows if row.kind == "add" and row.sample_id not in removed]
        people = await Identity.living_among(sorted({row.identity_id for row in added if row.identity_id}))
        seqs, samples, vectors = await self._compute(_opened, gallery_id, copy.contract, key, added, people)
        gone = [copy.seqs.pop(sample_id) for sample_id in removed if sample_id in copy.seqs]
        for seq in gone:
            copy.samples.pop(seq, None)
        if gone:
            await self._compute(copy.index.remove, np.array(gone, dtype=np.int64))
        if seqs:
            await self._compute(copy.index.add, np.array(seqs, dtype=np.int64), vectors)
            copy.samples.update(samples)
            copy.seqs.update({sample_id: seq for seq, (_, sample_id) in samples.items()})
        copy.seen = rows[-1].seq


def _contiguous(rows: list[GalleryChange], seen: int) -> list[GalleryChange]:
    """The rows up to the first hole after `seen`."""
    run = []
    for expected, row in enumerate(rows, start=seen + 1):
        if row.seq != expected:
            break
        run.append(row)
    return run


def _opened(
    gallery_id: str, contract: str, key: GalleryKey, rows: list[GalleryChange], people: dict[str, Identity]
) -> tuple[list[int], dict[int, tuple[str, str]], Embedding]:
    """The rows' vectors (n, d), with their seqs and whose they are; rows of the erased are left out."""
    seqs: list[int] = []
    samples: dict[int, tuple[str, str]] = {}
    vectors: list[Embedding] = []
    data_keys: dict[str, DataKey] = {}
    for row in rows:
        identity = people.get(row.identity_id or "")
        if identity is None or identity.wrapped_key is None:
            continue
        sample = next((s for s in identity.samples if s.id == row.sample_id), None)
        if sample is None or sample.contract != contract:
            continue
        if identity.id not in data_keys:
            data_keys[identity.id] = key.unwrap(identity.wrapped_key, identity.id)
        vectors.append(open_template(data_keys[identity.id], gallery_id, identity.id, sample))
        seqs.append(row.seq)
        samples[row.seq] = (identity.id, sample.id)
    return seqs, samples, np.array(vectors, dtype=np.float32)
