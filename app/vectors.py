"""A gallery's vectors out of MongoDB: its changes in order, their templates opened, turned and rounded for an index.

Rows are contiguous in `seq`: a hole means a read that is not majority-fresh yet. It is waited for, so nobody is passed over.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from app.documents.galleries import Change, Gallery, GalleryChange
from app.documents.identities import Identity
from app.documents.sealed import open_vectors
from app.domain.faces import Embedding
from app.errors import NotReady
from app.keys import GalleryKey, UnknownKey
from storage.vectors import Halves, Ids, Vectors, halved

P = ParamSpec("P")
T = TypeVar("T")

ROWS_AT_ONCE: Final = 2000
#: A hole closes within a replication round trip.
HOLE_RETRIES, HOLE_PAUSE_SECONDS = 20, 0.05


class Compute(Protocol):
    """The Runtime's bounded executor for blocking work."""

    def __call__(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Run the work off the event loop."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What a run of rows did: vectors (n, d) under their seqs, vectors taken out, and how far the run reaches."""

    ids: Ids
    vectors: Halves
    removed: list[int]
    seen: int


@dataclass(frozen=True, slots=True)
class Turning:
    """How a gallery's vectors are turned before they enter an index: by a secret rotation of that name."""

    name: str
    matrix: npt.NDArray[np.float64]

    @classmethod
    def of(cls, key: GalleryKey, name: str, dimension: int) -> "Turning":
        """The rotation of that name under the gallery's key."""
        return cls(name, key.rotation(name, dimension))

    def turned(self, vectors: Embedding) -> Vectors:
        """The vectors (n, d), turned; lengths and cosines stay.

        In float64, so that one vector gets the same bits whatever came along in the batch.
        """
        turned: Vectors = (vectors.astype(np.float64) @ self.matrix).astype(np.float32)
        return turned


async def changes_of(
    gallery: Gallery, key: GalleryKey, turning: Turning, *, after: int, upto: int, compute: Compute
) -> AsyncIterator[Changes]:
    """The changes in (after, upto], in runs. Raises NotReady when a hole stays, SealBroken for an unreadable template."""
    async for rows in _runs(gallery.id, after, upto):
        added = [row for row in rows if row.kind == "add"]
        people = await Identity.sealed_templates(sorted({row.identity_id for row in added if row.identity_id}))
        try:
            seqs, embeddings = await compute(open_vectors, key, gallery.contract, added, people, gallery.dimension)
        except UnknownKey:  # the gallery's key was rotated since the gallery was read: a publication takes its time
            head = await Gallery.get(gallery.id)
            if head is None:
                raise
            key = key.learn(head.wrapped_keys)
            seqs, embeddings = await compute(open_vectors, key, gallery.contract, added, people, gallery.dimension)
        vectors = await compute(lambda some: halved(turning.turned(some)), embeddings)
        yield Changes(np.array(seqs, np.int64), vectors, _removed(rows), rows[-1].seq)


async def removals_of(gallery: Gallery, *, after: int, upto: int) -> Ids:
    """The vectors (n,) that the changes in (after, upto] took out. Raises NotReady when a hole stays."""
    removed = [seq async for rows in _runs(gallery.id, after, upto) for seq in _removed(rows)]
    return np.array(sorted(removed), np.int64)


async def _runs(gallery_id: str, after: int, upto: int) -> AsyncIterator[list[Change]]:
    """The rows in (after, upto], in order and without a hole."""
    seen, holes = after, 0
    while seen < upto:
        rows = _contiguous(await GalleryChange.after(gallery_id, seen, upto, ROWS_AT_ONCE), seen)
        if not rows:
            holes += 1
            if holes > HOLE_RETRIES:
                raise NotReady("The gallery's changes cannot be read in full at the moment.")
            await asyncio.sleep(HOLE_PAUSE_SECONDS)
            continue
        seen = rows[-1].seq
        yield rows


def _removed(rows: list[Change]) -> list[int]:
    return [row.removes for row in rows if row.removes is not None]


def _contiguous(rows: list[Change], seen: int) -> list[Change]:
    """The rows up to the first hole after `seen`."""
    run = []
    for expected, row in enumerate(rows, start=seen + 1):
        if row.seq != expected:
            break
        run.append(row)
    return run
