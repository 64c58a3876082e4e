"""Who looks like this? A gallery's vectors in memory, caught up with MongoDB at the start of every query.

Each process keeps its own copy: the newest generation that this host has verified, mapped, and the changes since, in
memory. The head (`Gallery.seq`) says how far the changes reach; rows above what the copy has seen are read in order. So a
search that starts after an enrolment was answered sees it, in every process. A newer generation is opened beside the one
in use, and then takes its place by one assignment. Neither status nor ownership is kept here: a hit's row says whose it
is, and an erased person's row is blank.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, ParamSpec, TypeVar

import faiss
import numpy as np
import structlog
from prometheus_client import Counter, Gauge

from app.documents.galleries import Gallery, GalleryChange, Generation
from app.documents.sealed import gallery_key
from app.domain.faces import Embedding
from app.errors import GalleryTooLarge, NotReady
from app.keys import KeyRing, SealBroken
from app.share import Share
from app.vectors import Compute, Turning, changes_of
from storage import rows
from storage.generations import BadGeneration, GenerationStore, Manifest, Progress
from storage.gpu import DeviceLost, GpuIndex, can_use_gpu
from storage.layered import LayeredIndex
from storage.onebit import Margin, OneBitIndex
from storage.vectors import ExactIndex, Halves, Ids, VectorIndex, Vectors
from storage.vectors import Hits as Found

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

#: How long a query waits for another one that catches up, or for a gallery that is being opened.
PATIENCE_SECONDS = 2.0
#: How often the galleries in memory are compared with their heads when nobody searches them.
KEEP_UP_SECONDS: Final = 1.0
#: How often this host's copies are compared with the heads.
TIDY_SECONDS: Final = 60.0
#: How long a look at the share may take before it counts as gone.
SHARE_SECONDS: Final = 0.5
#: Generations that are copied, and copies that are hashed and opened, side by side.
OPENED_AT_ONCE: Final = 2
NICENESS: Final = 10
#: A generation that was refused is looked at again after this time: a share may have been away.
REFUSED_SECONDS: Final = 15.0
MIB: Final = 1 << 20

VECTORS = Gauge("idem_index_vectors", "Vectors of the gallery in this process", ["gallery"])
TAIL = Gauge("idem_index_tail", "Of these, vectors that no generation holds yet", ["gallery"])
GENERATION = Gauge("idem_index_generation", "The generation in use; 0 without one", ["gallery"])
RECALL = Gauge("idem_index_recall", "Share of measured pairs that the generation in use finds", ["gallery"])
RECALL_BOUND = Gauge("idem_index_recall_bound", "What that share is at least, with 95% confidence", ["gallery"])
REFUSED = Counter("idem_index_generations_refused", "Generations that this process refused to load", ["gallery"])
SHADOWED = Counter("idem_index_shadow_searches", "Live searches that were repeated exactly", ["gallery"])
UNREADABLE = Gauge(
    "idem_index_unreadable", "1 while a template of the gallery does not open: it is not searched, so that nobody is missed",
    ["gallery"],
)  # fmt: skip
SHADOW_MISSED = Counter("idem_index_shadow_missed", "Vectors that such a search should have found", ["gallery"])


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


@dataclass(frozen=True, slots=True)
class Block:
    """Vectors (n, d) under their seqs (n,). Cosines between blocks are right when one rotation has turned both."""

    ids: Ids
    vectors: Halves
    rotation: str


@dataclass(frozen=True, slots=True)
class Limits:
    """memory_mib: of all galleries in this process; shadow_every: so many searches for one that is repeated exactly.

    device: where generations are searched.
    """

    memory_mib: int
    shadow_every: int
    device: Literal["cpu", "gpu"] = "cpu"


@dataclass(slots=True)
class _Copy:
    """One gallery's vectors in this process. Vector ids are the samples' `seq`."""

    epoch: str
    contract: str
    turning: Turning
    index: LayeredIndex
    generation: Generation | None
    manifest: Manifest | None
    seen: int = 0
    used_at: float = field(default_factory=time.monotonic)

    def fits(self, gallery: Gallery) -> bool:
        """Whether it is a copy of this very gallery, however far it has seen."""
        return self.epoch == gallery.epoch and self.contract == gallery.contract

    @property
    def number(self) -> int:
        """Of the generation that it is built upon; 0 without one."""
        return 0 if self.generation is None else self.generation.number


@dataclass(frozen=True, slots=True)
class State:
    """How this process holds a gallery. generation: None without one; mib: index memory, mapped files included."""

    generation: int | None
    vectors: int
    tail: int
    seen: int
    mib: float


class Search:
    """The galleries' vectors in this process."""

    def __init__(self, keys: KeyRing, compute: Compute, store: GenerationStore, share: Share, limits: Limits) -> None:
        """Raises ValueError for a device that is not there."""
        if limits.device == "gpu" and not can_use_gpu():
            message = (
                "INDEX_DEVICE=gpu needs a graphics card and the extra `gpu`; neither FAISS nor the driver shows one"
            )
            raise ValueError(message)
        self.store = store
        #: Names of galleries with a template that does not open: they are not searched.
        self.unreadable: set[str] = set()
        self._keys = keys
        self._compute = compute
        self._share = share
        self._limits = limits
        self._copies: dict[str, _Copy] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[tuple[str, int], float] = {}
        self._searches = 0
        self._behind: set[asyncio.Task[None]] = set()
        self._fetching = asyncio.Semaphore(OPENED_AT_ONCE)
        self._aside = ThreadPoolExecutor(OPENED_AT_ONCE, thread_name_prefix="index", initializer=_give_way)

    async def range(self, gallery: Gallery, probe: Embedding, threshold: float) -> Hits:
        """Every sample of the gallery whose cosine to the probe (d,) is at least the threshold, as of its head.

        gallery: as just read: its `seq` is how far the search must see. Raises NotReady when a hole in the rows stays or the
        gallery is still being opened, GalleryTooLarge when it does not fit.
        """
        copy = await self._caught_up(gallery)
        seen = copy.seen
        try:
            turned, found = await self._compute(_searched, copy, probe, threshold)
        except DeviceLost as error:
            # Opened anew by the next query: on the card, if it is there again, else from the documents.
            self._copies.pop(gallery.id, None)
            log.exception("index_device_lost", gallery=gallery.name)
            raise NotReady("The index is being opened anew; please try again in a moment.") from error
        owners = await GalleryChange.owners(gallery.id, found.ids.tolist()) if len(found.ids) else {}
        items = [
            Hit(*owners[seq], seq=seq, score=score)
            for seq, score in zip(found.ids.tolist(), found.scores.tolist(), strict=True)
            if seq <= seen and seq in owners
        ]
        self._searches += 1
        if self._limits.shadow_every and self._searches % self._limits.shadow_every == 0:
            self._in_the_background(self._shadow(gallery.name, copy, turned, threshold, found.ids))
        return Hits(items=items, as_of_seq=seen)

    async def block(self, gallery: Gallery, first: int, last: int) -> Block:
        """The gallery's vectors with these seqs, both ends included, by rising seq."""
        copy = await self._caught_up(gallery)
        ids, vectors = await self._compute(copy.index.within, first, last)
        return Block(ids, vectors, copy.turning.name)

    async def shares(self, gallery: Gallery) -> bool:
        """Whether the gallery's published files are to be seen on the share; searches go on without, and publications do not.

        Also False while the share hangs.
        """
        if gallery.published is None:
            return True
        try:
            async with asyncio.timeout(SHARE_SECONDS):
                listed = await self._share.run(self.store.listed, gallery.id)
        except OSError:  # a TimeoutError is one
            return False
        return (gallery.epoch, gallery.published.number) in listed

    async def warm(self, gallery: Gallery) -> int:
        """Catch up without a query; returns how many vectors are in memory."""
        return len((await self._caught_up(gallery)).index)

    def size(self, gallery_id: str) -> int:
        """Vectors of the gallery in this process."""
        copy = self._copies.get(gallery_id)
        return 0 if copy is None else len(copy.index)

    def state(self, gallery_id: str) -> State | None:
        """How the gallery is held here; None when it is not."""
        copy = self._copies.get(gallery_id)
        if copy is None:
            return None
        number = None if copy.generation is None else copy.generation.number
        return State(number, len(copy.index), copy.index.tail_size, copy.seen, round(_mib(copy), 1))

    @asynccontextmanager
    async def kept_up(self) -> AsyncIterator[None]:
        """Meanwhile, open published galleries before anybody asks, and follow their generations when nobody does."""
        # Ended by an event: a cancellation may come out of MongoDB's driver as an error of its own.
        stop = asyncio.Event()
        following = asyncio.create_task(self._keep_up(stop))
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(following, return_exceptions=True)

    async def close(self) -> None:
        """Stop what runs in the background."""
        running = [*self._behind, *self._opening.values()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._aside.shutdown(wait=False, cancel_futures=True)

    async def _caught_up(self, gallery: Gallery) -> _Copy:
        copy = self._copies.get(gallery.id)
        if copy is None or not copy.fits(gallery):
            copy = await self._first_copy(gallery)
        elif gallery.published is not None and self._is_better(gallery, gallery.published, copy):
            self._open_soon(gallery)  # what is in use answers as rightly meanwhile, by a longer tail
        copy.used_at = time.monotonic()
        if copy.seen >= gallery.seq:
            return copy
        waiting_since = time.monotonic()
        async with self._locks.setdefault(gallery.id, asyncio.Lock()):
            if copy.seen >= gallery.seq:
                return copy
            if time.monotonic() - waiting_since > PATIENCE_SECONDS:
                # With MongoDB away each one after the other would wait as long.
                raise NotReady("The gallery cannot be searched at the moment.")
            await self._follow(copy, gallery)
        return copy

    async def _first_copy(self, gallery: Gallery) -> _Copy:
        """Wait a while for the gallery to be opened; what is not done by then goes on without this query."""
        opening = self._open_soon(gallery)
        await asyncio.wait({opening}, timeout=PATIENCE_SECONDS)
        if not opening.done():
            raise NotReady("The gallery is being opened; please try again in a moment.", retry_after_seconds=2)
        opening.result()
        copy = self._copies.get(gallery.id)
        if copy is None or not copy.fits(gallery):
            raise NotReady("The gallery has just changed its model or epoch.")
        return copy

    def _open_soon(self, gallery: Gallery) -> asyncio.Task[None]:
        """Bring the newest usable generation into use; one at a time for each gallery."""
        running = self._opening.get(gallery.id)
        if running is None or running.done():
            running = self._opening[gallery.id] = asyncio.create_task(self._open(gallery))
            running.add_done_callback(_told)
        return running

    async def _open(self, gallery: Gallery) -> None:
        known = self._copies.get(gallery.id)
        known = known if known is not None and known.fits(gallery) else None
        self._require_room(gallery)
        copy = await self._from_generations(gallery, known)
        if copy is None:
            return
        await self._follow(copy, gallery)
        self._copies[gallery.id] = copy
        self._make_room(gallery.id)
        self._measure(gallery.name, copy)
        if copy.generation is not None:
            log.info("index_in_use", gallery=gallery.name, generation=copy.number, vectors=len(copy.index))
            self._in_the_background(self._tidy([gallery]))

    async def _from_generations(self, gallery: Gallery, known: _Copy | None) -> _Copy | None:
        """A copy of the newest generation that can be trusted, else of none; None when `known` is as good."""
        for generation in (gallery.published, gallery.previous):
            if generation is None or not self._is_better(gallery, generation, known):
                continue
            try:
                return await self._built_upon(gallery, generation)
            except (BadGeneration, OSError, ValueError, RuntimeError) as error:
                head = await Gallery.get(gallery.id)
                if head is not None and head.published not in (gallery.published, None) and head.epoch == gallery.epoch:
                    return await self._from_generations(head, known)  # its files had to go: a newer one has come
                await self._refuse(gallery, generation, error)
        # Not aside: whoever asks waits for this one, and there they may stand behind others, and be nicer than all.
        return None if known is not None else await self._compute(self._copy_of, gallery, None, None, None)

    async def _built_upon(self, gallery: Gallery, generation: Generation) -> _Copy:
        wanted = (gallery.id, gallery.epoch, generation.number, generation.digest)
        # What this host has copied is opened whatever becomes of the share.
        here = await self._run_aside(self.store.copied, *wanted)
        if here is None:
            here = await self._fetched(partial(self.store.fetch, *wanted))
        folder, manifest = here
        base = await self._run_aside(_opened, folder, manifest, self._limits.device)
        return await self._run_aside(self._copy_of, gallery, generation, manifest, base)

    async def _fetched(self, fetch: Callable[[Progress], T]) -> T:
        async with self._fetching:  # before the share's time limit begins
            return await self._share.run_long("fetch", fetch)

    async def _run_aside(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Where this host's copies are hashed for seconds: neither the loop nor photos and searches wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, lambda: work(*args, **kwargs))

    async def _tidy(self, galleries: list[Gallery]) -> None:
        """Delete this host's copies of generations that count no more; what is mapped stays until it is let go of."""
        for gallery in galleries:
            if gallery.files:
                await self._run_aside(self.store.drop_copies, gallery.id, gallery.files)

    def _is_better(self, gallery: Gallery, generation: Generation, known: _Copy | None) -> bool:
        """Whether the generation is newer than what is in use, and was not refused just now."""
        if known is not None and known.number >= generation.number:
            return False
        return self._refused.get((gallery.id, generation.number), 0.0) <= time.monotonic()

    def _copy_of(
        self, gallery: Gallery, generation: Generation | None, manifest: Manifest | None, base: VectorIndex | None
    ) -> _Copy:
        # Before the first generation the vectors are turned as its publisher will turn them.
        name = gallery.rotation if generation is None else generation.rotation
        turning = Turning.of(gallery_key(self._keys, gallery), name, gallery.dimension)
        margin = None if manifest is None or not manifest.margin else Margin(**manifest.margin)
        index = (
            LayeredIndex(gallery.dimension, base)
            if margin is None
            else LayeredIndex(gallery.dimension, base, margin=margin)
        )
        seen = 0 if generation is None else generation.watermark
        return _Copy(gallery.epoch, gallery.contract, turning, index, generation, manifest, seen)

    async def _refuse(self, gallery: Gallery, generation: Generation, error: Exception) -> None:
        """Go on with what there is, raise the alarm, and have the generation built anew."""
        reason = str(error) or type(error).__name__
        self._refused[gallery.id, generation.number] = time.monotonic() + REFUSED_SECONDS
        REFUSED.labels(gallery.name).inc()
        log.error("index_generation_refused", gallery=gallery.name, generation=generation.number, reason=reason)
        # What is this host's own trouble, a share that is away, memory, another FAISS, is not mended by building anew.
        if generation == gallery.published and isinstance(error, BadGeneration) and error.fault != "unreadable":
            await gallery.report(generation.number, reason)

    async def _follow(self, copy: _Copy, gallery: Gallery) -> None:
        """Bring the changes up to the gallery's head into the copy."""
        key = gallery_key(self._keys, gallery)
        try:
            async for changes in changes_of(
                gallery, key, copy.turning, after=copy.seen, upto=gallery.seq, compute=self._compute
            ):
                await self._compute(_apply, copy.index, changes.ids, changes.vectors, changes.removed)
                copy.seen = changes.seen
        except SealBroken as error:
            self._raise_alarm(gallery, error)
            raise
        self.unreadable.discard(gallery.name)
        UNREADABLE.labels(gallery.name).set(0)
        TAIL.labels(gallery.name).set(copy.index.tail_size)
        VECTORS.labels(gallery.name).set(len(copy.index))

    def _raise_alarm(self, gallery: Gallery, error: SealBroken) -> None:
        """One template that does not open stops the searches of its gallery, by intention; somebody must know."""
        if gallery.name in self.unreadable:
            return
        self.unreadable.add(gallery.name)
        UNREADABLE.labels(gallery.name).set(1)
        where = getattr(error, "__notes__", [])
        log.error("template_unreadable", gallery=gallery.name, error=type(error).__name__, where=where)

    def _require_room(self, gallery: Gallery) -> None:
        needed = gallery.samples * rows.bytes_per_vector(gallery.dimension) / MIB
        if needed > self._limits.memory_mib:
            raise GalleryTooLarge(
                f"Gallery {gallery.name} needs {needed:.0f} MiB of index memory and INDEX_MEMORY_MIB allows "
                f"{self._limits.memory_mib}: raise it, or divide the gallery."
            )

    def _make_room(self, needed_id: str) -> None:
        """Let go of the galleries that were searched longest ago, until the rest fits."""
        others = sorted((copy.used_at, id_) for id_, copy in self._copies.items() if id_ != needed_id)
        for _, id_ in others:
            if sum(_mib(copy) for copy in self._copies.values()) <= self._limits.memory_mib:
                return
            del self._copies[id_]
            log.info("index_unloaded", gallery=id_)

    async def _shadow(self, name: str, copy: _Copy, turned: Vectors, threshold: float, answered: Ids) -> None:
        """Repeat a live search exactly, and count what it should have found."""
        exact = await self._compute(copy.index.exact_range, turned, threshold)
        later = await self._compute(copy.index.range, turned, threshold)
        # What came while the exact search ran is in both of the later ones.
        missed = np.setdiff1d(np.setdiff1d(exact.ids, answered), later[0].ids)
        SHADOWED.labels(name).inc()
        if len(missed):
            SHADOW_MISSED.labels(name).inc(len(missed))
            log.error("index_missed", gallery=name, generation=copy.number, missed=len(missed), threshold=threshold)

    def _measure(self, name: str, copy: _Copy) -> None:
        GENERATION.labels(name).set(copy.number)
        RECALL.labels(name).set(1.0 if copy.generation is None else copy.generation.recall)
        RECALL_BOUND.labels(name).set(1.0 if copy.generation is None else copy.generation.recall_bound)

    def _in_the_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)
        task.add_done_callback(_told)

    async def _keep_up(self, stop: asyncio.Event) -> None:
        """At first, open the galleries that have generations; then follow the heads of those in memory, and tidy up."""
        tidied_at = -TIDY_SECONDS
        is_first = True
        while not stop.is_set():
            try:
                galleries = await Gallery.find_all().to_list()
                self.store.remember([gallery.id for gallery in galleries])
                for gallery in galleries:
                    if gallery.id in self._copies or (is_first and gallery.published is not None):
                        await self._caught_up_quietly(gallery)
                for gone in set(self._copies) - {gallery.id for gallery in galleries}:
                    self._copies.pop(gone, None)
                is_first = False
                if time.monotonic() - tidied_at >= TIDY_SECONDS:
                    tidied_at = time.monotonic()
                    self._refused = {key: until for key, until in self._refused.items() if until > tidied_at}
                    published = {gallery.id for gallery in galleries if gallery.published is not None}
                    await self._run_aside(self.store.drop_other_copies, published)
                    await self._tidy(galleries)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next round may do better
                log.warning("index_cannot_keep_up", error=type(error).__name__, reason=str(error)[:200])
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), KEEP_UP_SECONDS)

    async def _caught_up_quietly(self, gallery: Gallery) -> None:
        known = self._copies.get(gallery.id)
        used_at = 0.0 if known is None else known.used_at
        try:
            copy = await self._caught_up(gallery)
        except Exception as error:  # noqa: BLE001 - one gallery's trouble is not another's
            log.warning(
                "index_cannot_keep_up", gallery=gallery.name, error=type(error).__name__, reason=str(error)[:200]
            )
            return
        copy.used_at = used_at  # nobody searched


def _searched(copy: _Copy, probe: Embedding, threshold: float) -> tuple[Vectors, Found]:
    """The probe, turned (1, d), and what it found."""
    turned = copy.turning.turned(probe[np.newaxis, :])
    return turned, copy.index.range(turned, threshold)[0]


def _apply(index: LayeredIndex, ids: Ids, vectors: Halves, removed: list[int]) -> None:
    if removed:
        index.remove(np.array(removed, np.int64))
    if len(ids):
        index.add(ids, vectors)


def _opened(folder: Path, manifest: Manifest, device: Literal["cpu", "gpu"]) -> VectorIndex:
    """The index in a verified folder. Raises ValueError, OSError or RuntimeError when it cannot be used after all."""
    if manifest.kind == "faiss" and device == "cpu":
        return OneBitIndex.open(folder, manifest.dimension, margin=Margin(**manifest.margin), probes=manifest.probes)
    index: VectorIndex = ExactIndex(manifest.dimension) if device == "cpu" else GpuIndex(manifest.dimension)
    index.add(*rows.read_rows(folder, manifest.dimension))
    return index


def _give_way() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    faiss.omp_set_num_threads(1)


def _mib(copy: _Copy) -> float:
    return copy.index.bytes / MIB


def _told(task: "asyncio.Task[None]") -> None:
    """A task that nobody waits for must not fail in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("index_task_failed", error=type(error).__name__, reason=str(error)[:200])
