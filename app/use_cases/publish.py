"""Publish: write a gallery's next index generation, and commit it on the gallery's head.

The head's `epoch`, `contract` and `seq` are read before the first vector: that `seq` is the watermark. Files are written
beside the readers' and are nobody's until one transaction, in which the publisher's lease still holds, compares and sets
`published`. A publisher may die at any moment: what it leaves is swept by the next one.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal, TypeVar

import faiss
import numpy as np
import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, by_system, record
from app.documents.base import new_id, now
from app.documents.events import Detail
from app.documents.galleries import Gallery, Generation
from app.documents.identities import Identity
from app.documents.sealed import gallery_key
from app.documents.stores import Store
from app.domain.policy import thresholds_for
from app.domain.publication import Reason, Standing, kind_for, reason_to_publish
from app.errors import Conflict, NotFound, NotReady
from app.leases import Held, LeaseLost, held
from app.runtime import Runtime
from app.vectors import Changes, Turning, changes_of, removals_of
from storage import calibration, rows
from storage.calibration import Calibration
from storage.generations import BadGeneration, Manifest, MeasuredRecall, Progress
from storage.onebit import DEFAULT_MARGIN, OneBitIndex
from storage.vectors import Halves, Ids

log = structlog.get_logger(__name__)

LEASE_SECONDS: Final = 15
#: After this time, every host sees the files of a new generation.
SEEN_EVERYWHERE: Final = timedelta(minutes=2)
#: A deadline that no publication has met is met by force when this share of the time is left: hosts look every minute.
WITHDRAWN_SHARE: Final = 0.05
#: Of a former generation at a time, while its living rows are carried over.
ROWS_AT_ONCE: Final = 50_000
#: How long a step may say nothing: a file that is closed may have gigabytes yet to be written, and codes take minutes.
STEP_SECONDS: Final = 1800
PLANTED_PAIRS: Final = 6000
REAL_PAIRS: Final = 20_000

#: Every vector is compared: there is nothing to measure.
_EXACT: Final = Calibration(DEFAULT_MARGIN, lists=0, probes=None, recall={})

T = TypeVar("T")
Stage = Literal["reading", "building", "measuring", "writing", "checking"]
Tell = Callable[[Stage, int, int], Awaitable[None]]


def standing_of(gallery: Gallery) -> Standing:
    """What is known of the gallery's index, from its head alone."""
    published = gallery.published
    return Standing(
        is_published=published is not None,
        is_faulty=gallery.fault is not None,
        tail=gallery.seq - gallery.watermark,
        count=0 if published is None else published.count,
        removed=0 if published is None else gallery.removed - published.removed,
        purge_by=gallery.purge_by,
    )


async def due(runtime: Runtime) -> list[tuple[Gallery, Reason]]:
    """The galleries of the running model whose next generation is due, the most urgent first."""
    settings, found = runtime.settings, []
    async for gallery in Gallery.find({"contract": runtime.engine.card.contract}):
        reason = reason_to_publish(
            standing_of(gallery), tail_rows=settings.index_tail_rows,
            purge_time=timedelta(hours=settings.index_purge_hours), moment=now(),
        )  # fmt: skip
        if reason is not None:
            found.append((gallery, reason))
    urgency: list[Reason] = ["fault", "erasure", "removals", "tail"]
    return sorted(found, key=lambda one: urgency.index(one[1]))


async def publish(
    runtime: Runtime, action: Action, gallery_id: str, *, holder: str, rebuild: bool = False, tell: Tell | None = None
) -> Generation:
    """Write and commit the gallery's next generation.

    holder: names this publisher in the lease. rebuild: from the documents alone and under a new rotation, not from the former
    generation. Raises Conflict when another publisher is at it, NotReady when the gallery changed its epoch meanwhile or the
    lease was lost.
    """
    known = await Gallery.get(gallery_id)
    if known is None:
        raise NotFound
    try:
        async with held(known.publishing, holder, LEASE_SECONDS) as lease:
            if lease is None:
                raise Conflict("Another publisher is working on the gallery.")
            gallery = await Gallery.get(gallery_id)  # as it is now that nobody else publishes
            if gallery is None:
                raise NotFound
            runtime.require_contract(gallery)
            generation = await _Publication(runtime, action, gallery, lease, rebuild, tell, now()).run()
    except LeaseLost as error:
        raise NotReady("The publisher was too slow, and another took over.") from error
    log.info("index_published", gallery=gallery.name, generation=generation.number, vectors=generation.count)
    return generation


async def keep_promises(runtime: Runtime) -> None:
    """See to it that no files stay that should not: a dead publisher's, and those of erased people whose time is over.

    A gallery whose deadline passes while no publication succeeds goes without an index until one does.
    """
    store, share = runtime.search.store, runtime.share
    # First what needs no share, which may be away.
    margin = timedelta(hours=runtime.settings.index_purge_hours) * WITHDRAWN_SHARE
    for late in await Gallery.find({"purge_by": {"$lte": now() + margin}}).to_list():
        await _put_right(late, partial(_withdraw, runtime, late))
    on_share = set(await share.run(store.galleries))
    living = {gallery.id: gallery async for gallery in Gallery.find_all()}
    had = set((await Store.remember(living)).galleries)
    store.remember(had)
    for gone in (on_share & had) - living.keys():
        await share.run(store.drop_gallery, gone)
    runtime.places.note_strangers(await share.run(store.strangers))
    await _notice_lost_files(runtime, [gallery for gallery in living.values() if gallery.published is not None])
    for gallery in living.values():
        if gallery.id in on_share and await share.run(store.has_others, gallery.id, gallery.files):
            await _put_right(gallery, partial(_sweep, runtime))


async def _notice_lost_files(runtime: Runtime, published: list[Gallery]) -> None:
    """Report generations whose files were removed from the share, so that they are written again.

    Reports none if the folder exists without the store's mark: the share may not be mounted.
    """
    store, share = runtime.search.store, runtime.share
    is_removed = await share.run(store.is_removed)
    if not is_removed and (await share.run(runtime.places.guards["index"].look)).state != "ours":
        return
    for gallery in published:
        # On a network file system, a host may see a new file late.
        is_settled = gallery.published is not None and gallery.published.built_at < now() - SEEN_EVERYWHERE
        if gallery.published is None or not (is_removed or is_settled):
            continue
        named = (gallery.epoch, gallery.published.number)
        is_lost = is_removed or named not in await share.run(store.listed, gallery.id)
        if is_lost and await gallery.report(named[1], "its files were removed from the folder of the index"):
            log.error("index_files_lost", gallery=gallery.name, generation=named[1])


async def _put_right(gallery: Gallery, work: Callable[[Gallery, Held], Awaitable[None]]) -> None:
    """Do it to the head as it is by now; not while a publisher is at work, who sees to it himself."""
    try:
        async with held(gallery.publishing, f"sweep:{new_id()}", LEASE_SECONDS) as lease:
            head = None if lease is None else await Gallery.get(gallery.id)
            if lease is not None and head is not None:
                await work(head, lease)
    except LeaseLost:
        log.warning("index_sweep_given_up", gallery=gallery.name)


async def _withdraw(runtime: Runtime, late: Gallery, head: Gallery, lease: Held) -> None:
    """Take the published generations back: every search reads the documents, until the next publication."""
    if head.purge_by == late.purge_by:
        await runtime.transaction(partial(_take_back, head, lease))


async def _take_back(gallery: Gallery, lease: Held, session: AsyncClientSession) -> None:
    await lease.require(session)
    await Gallery.get_pymongo_collection().update_one(
        {"_id": gallery.id, "purge_by": gallery.purge_by},
        {"$set": {"published": None, "previous": None, "fault": None, "purge_by": None}},
        session=session,
    )
    detail: Detail = {"reason": "the deadline of an erasure", "generation": None}
    if gallery.published is not None:
        detail["generation"] = gallery.published.number
    await record(
        session, by_system("index.withdraw"), subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name,
        outcome="failure", detail=detail,
    )  # fmt: skip
    log.error("index_withdrawn", gallery=gallery.name)


async def _sweep(runtime: Runtime, gallery: Gallery, lease: Held) -> None:
    """Delete what the head does not name. Under the lease: nobody else is writing, so all of lower numbers is left over."""
    keep = gallery.files | {(gallery.epoch, lease.fence)}
    await runtime.share.run_long("drop", lambda _: runtime.search.store.drop(gallery.id, keep))


@dataclass(slots=True)
class _Publication:
    runtime: Runtime
    action: Action
    gallery: Gallery
    lease: Held
    rebuild: bool
    tell: Tell | None
    started_at: datetime

    async def run(self) -> Generation:
        store, gallery = self.runtime.search.store, self.gallery
        former = None if self.rebuild or gallery.fault is not None else gallery.published
        name = new_id() if self.rebuild else gallery.rotation
        turning = Turning.of(gallery_key(self.runtime.keys, gallery), name, gallery.dimension)
        await _sweep(self.runtime, gallery, self.lease)  # first: what a dead publisher left may fill the disk
        staged = await self.runtime.share.run(store.stage, gallery.id, gallery.epoch, self.lease.fence)
        count = await self._write_rows(staged, former, turning)
        kind = kind_for(count)
        measured = await self._build(staged) if kind == "faiss" else _EXACT
        target = gallery.policy.recall_target
        manifest = Manifest(
            format=1, gallery_id=gallery.id, epoch=gallery.epoch, number=self.lease.fence, contract=gallery.contract,
            rotation=turning.name, dimension=gallery.dimension, kind=kind, lists=measured.lists, count=count,
            watermark=gallery.seq, threshold=self._threshold(), margin=asdict(measured.margin), probes=measured.probes,
            recall={
                scanner: MeasuredRecall(pairs=r.pairs, misses=r.misses, lower_bound=r.lower_bound, target=target)
                for scanner, r in measured.recall.items()
            },
            built_at=now(), built_by=f"idem {version('idem')}, faiss {faiss.__version__}",
        )  # fmt: skip
        await self._say("writing", 0, 1)
        digest = await self._step("commit_files", partial(store.commit_files, staged, manifest))
        await self._say("checking", 0, 1)
        # Read back: what cannot be read must not become the head's.
        verify = partial(store.verify, gallery.id, gallery.epoch, manifest.number, digest)
        await self.runtime.share.run_long("verify", verify)
        recall, bound = _poorest(measured)
        generation = Generation(
            number=manifest.number, digest=digest, kind=kind, rotation=turning.name, watermark=gallery.seq, count=count,
            removed=gallery.removed, recall=recall, recall_bound=bound, built_at=manifest.built_at,
        )  # fmt: skip
        await self.runtime.transaction(lambda session: self._commit(session, generation))
        head = await Gallery.get(gallery.id)
        if head is not None:
            await _sweep(self.runtime, head, self.lease)
            await asyncio.to_thread(store.drop_copies, head.id, head.files)
        return generation

    async def _write_rows(self, staged: Path, former: Generation | None, turning: Turning) -> int:
        """The living vectors up to the head's `seq`, in order: those of the former generation, then what came after.

        What was removed up to that `seq` has a blank row by now; what is removed meanwhile is the readers' tail.
        """
        gallery = self.gallery
        base = None if former is None else await self._rows_of(former)
        start = 0 if base is None or former is None else former.watermark
        async with self._writer(staged) as writer:
            if base is not None:
                gone = await removals_of(gallery, after=start, upto=gallery.seq)
                await self._step("append", partial(_carry_over, writer, *base, gone))
            async for changes in changes_of(
                gallery, gallery_key(self.runtime.keys, gallery), turning, after=start, upto=gallery.seq,
                compute=self.runtime.compute,
            ):  # fmt: skip
                await self._append(writer, changes)
                await self._say("reading", changes.seen, gallery.seq)
            return writer.count

    async def _append(self, writer: rows.RowsWriter, changes: Changes) -> None:
        await self._step("append", lambda _: writer.append(changes.ids, changes.vectors))

    @asynccontextmanager
    async def _writer(self, staged: Path) -> AsyncIterator[rows.RowsWriter]:
        writer = await self.runtime.share.run(rows.RowsWriter, staged)
        try:
            yield writer
        except BaseException:
            with suppress(OSError):  # what was written counts no more
                await self.runtime.share.run(writer.close)
            raise
        await self._step("close", lambda _: writer.close())

    async def _rows_of(self, former: Generation) -> tuple[Ids, Halves] | None:
        """The former generation's rows; None when its files are not what they should be: then the documents are read."""
        gallery, store = self.gallery, self.runtime.search.store
        try:
            fetch = partial(store.fetch, gallery.id, gallery.epoch, former.number, former.digest)
            folder, _ = await self.runtime.share.run_long("fetch", fetch)
            return rows.read_rows(folder, gallery.dimension)
        except (BadGeneration, OSError, ValueError) as error:
            log.warning("index_former_unusable", gallery=gallery.name, generation=former.number, reason=str(error))
            return None

    async def _build(self, staged: Path) -> Calibration:
        """The codes, and the margin that finds every pair, measured on the gallery's own vectors."""
        await self._say("building", 0, 1)
        await self._step("build", lambda _: OneBitIndex.build(staged))
        # Read, not mapped: else the event loop would meet the share.
        ids = await self._step("read_rows", lambda _: np.array(rows.read_rows(staged, self.gallery.dimension)[0]))
        people = await self._people(ids)
        loop = asyncio.get_running_loop()

        def measured(progress: Progress) -> Calibration:
            def told(done: int, total: int) -> None:
                asyncio.run_coroutine_threadsafe(self._say("measuring", done, total), loop)
                progress(done, total)

            return calibration.calibrate(
                staged, self.gallery.dimension, people=people, threshold=self._threshold(),
                target=self.gallery.policy.recall_target, pairs=PLANTED_PAIRS, progress=told,
            )  # fmt: skip

        return await self._step("calibrate", measured)

    async def _people(self, ids: Ids) -> Ids:
        """Which rows belong together (n,): samples of one identity carry the same number."""
        people = np.arange(len(ids), dtype=np.int64)
        async for seqs in Identity.seqs_of_several(self.gallery.id, REAL_PAIRS):
            places = np.searchsorted(ids, seqs)
            mine = [p for p, seq in zip(places, seqs, strict=True) if p < len(ids) and ids[p] == seq]
            people[mine] = mine[0] if mine else 0
        return people

    def _threshold(self) -> float:
        """The lowest threshold that a search of this gallery starts from."""
        limits = thresholds_for(self.gallery.policy, self.runtime.engine.card, self.gallery.samples)
        return min(limits.identify, limits.dedup)

    async def _commit(self, session: AsyncClientSession, generation: Generation) -> None:
        """Compare and set the head under the lease."""
        gallery = self.gallery
        await self.lease.require(session)
        head = await Gallery.get(gallery.id, session=session)
        if head is None or (head.epoch, head.contract, head.published) != (
            gallery.epoch,
            gallery.contract,
            gallery.published,
        ):
            raise NotReady("The gallery changed its model, epoch or index in the meantime.")
        # Whoever was erased since the watermark is in the new files too: the deadline of the first such erasure is kept
        # on the safe side, and a former generation that holds anybody erased may not stay for a rollback.
        hours = timedelta(hours=self.runtime.settings.index_purge_hours)
        purge_by = self.started_at + hours if head.removed != gallery.removed else None
        former = gallery.published if gallery.fault is None else None
        previous = former if former is not None and former.removed == head.removed and not self.rebuild else None
        await Gallery.get_pymongo_collection().update_one(
            {"_id": gallery.id},
            {"$set": {
                "published": generation.model_dump(), "previous": None if previous is None else previous.model_dump(),
                "fault": None, "purge_by": purge_by,
            }},
            session=session,
        )  # fmt: skip
        await record(
            session, self.action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name,
            detail={
                "generation": generation.number, "kind": generation.kind, "vectors": generation.count,
                "watermark": generation.watermark, "recall": round(generation.recall, 4), "rebuilt": self.rebuild,
            },
        )  # fmt: skip

    async def _step(self, operation: str, work: Callable[[Progress], T]) -> T:
        return await self.runtime.share.run_long(operation, work, silence_seconds=STEP_SECONDS)

    async def _say(self, stage: Stage, done: int, total: int) -> None:
        self.lease.report(stage, done, total)
        if self.tell is not None:
            await self.tell(stage, done, total)


def _poorest(measured: Calibration) -> tuple[float, float]:
    """The recall of the poorest scan that a reader may use, and what that is at least."""
    scans = measured.recall.values()
    share = min((1 - scan.misses / scan.pairs for scan in scans), default=1.0)
    return share, min((scan.lower_bound for scan in scans), default=1.0)


def _carry_over(writer: rows.RowsWriter, ids: Ids, vectors: Halves, gone: Ids, progress: Progress) -> None:
    for first in range(0, len(ids), ROWS_AT_ONCE):
        some = ids[first : first + ROWS_AT_ONCE]
        living = ~np.isin(some, gone)
        writer.append(some[living], vectors[first : first + ROWS_AT_ONCE][living])
        progress(first + len(some), len(ids))
