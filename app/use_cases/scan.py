"""Scan: compare everybody in a gallery with everybody else, in tiles, and keep the look-alikes.

The Scan document is the truth: how many tiles are behind it, and who is at it. A tile's pairs and its mark are one
transaction, which holds only while the scan stands where it stood: a tile is counted once, a paused scan stops, and
whoever is killed loses the tile in hand. The queue is a hint: what nobody works on is asked for again.
"""

import asyncio
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import structlog
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import ConnectionFailure, PyMongoError

from app.audit import Action, by_system, record
from app.concurrency import all_of
from app.documents.base import new_id, now
from app.documents.events import Detail, Outcome
from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Identity
from app.documents.scans import (
    CLUSTERS_KEPT,
    LINKS_AT_ONCE,
    SILENCE,
    UNFINISHED,
    ClusterRun,
    ClusterSummary,
    FoundPair,
    Grouping,
    Scan,
    ScanPair,
    ScanState,
    contract_of,
    decisions_on,
    series_of,
)
from app.domain.clusters import Cluster, Link, clusters
from app.domain.policy import margin_of, thresholds_for
from app.domain.tiles import SEQS_A_BLOCK, Tile, tile, tile_count
from app.errors import Conflict, DependencyUnavailable, ModelMismatch, NotFound, NotReady, Problem
from app.processors import processors
from app.runtime import Runtime
from app.search import Block
from storage.join import Joined, pairs_above
from storage.vectors import Halves, Ids, Scores

log = structlog.get_logger(__name__)

#: A worker goes on for so long and then asks for the next slice, so that other jobs and a stop of the worker get their turn.
SLICE_SECONDS: Final = 4.0
#: Rows of a tile that one thread compares at a time: faces and searches wait behind it for a tenth of a second, not a whole.
ROWS_A_PIECE: Final = 2048
#: More is no list of duplicates any more: the threshold was set among strangers.
MOST_PAIRS: Final = 1_000_000
PAIRS_A_TRANSACTION: Final = 2000
#: Beyond a request's limit: a tile's transaction writes up to PAIRS_A_TRANSACTION pairs.
TRANSACTION_SECONDS: Final = 10.0
#: A scan that fails so often in a row, for a reason of its own, is given up.
TRIES: Final = 5
#: How soon a scan of this process is tried again when the gallery or a store was not ready, or somebody else is at it.
RETRY_SECONDS: Final = 0.5
#: Clusters of so many pairs are made for everybody who asks: a second. Those of more are made by a worker, and kept.
PAIRS_GROUPED_AT_ONCE: Final = LINKS_AT_ONCE
#: Clusters that were kept for so long are made anew when somebody asks: until then decisions do not show in them.
GROUPED_ANEW: Final = timedelta(minutes=5)
#: MongoDB deletes kept clusters at any moment after their time: no page should begin with them shortly before.
LAST_READ: Final = CLUSTERS_KEPT - timedelta(minutes=2)
#: A page of clusters ends before it has more people than this, each of whom is read.
PEOPLE_A_PAGE: Final = 500
#: What passes: a store that is away, a gallery that is being opened, a worker of another model.
PASSING: Final = (NotReady, DependencyUnavailable, ModelMismatch, ConnectionFailure, OSError, TimeoutError)

#: The caller of a scan's work, in the threads that callers share fairly.
SCANS: Final = "scans"

Tell = Callable[[Scan], None]


@dataclass(frozen=True, slots=True)
class Clusters:
    """Some of a scan's clusters, and whether there are more. as_of: later pairs and decisions are not in them."""

    items: list[ClusterSummary]
    as_of: datetime
    is_more: bool


class _Stopped(Exception):
    """The scan is not this runner's any more: paused, cancelled, or taken over."""


class _TooMany(Exception):
    """More pairs than a scan may find."""


async def start(
    runtime: Runtime, action: Action, gallery: Gallery, threshold: float | None = None, *, runner: str | None = None
) -> Scan:
    """Begin a scan of everything that the gallery holds now; of what is new only, where a scan has been done before.

    threshold: None for the one in force for de-duplication. runner: who carries it out himself; None for the workers. Raises
    ModelMismatch when another model made the gallery's templates.
    """
    runtime.require_contract(gallery)

    async def insert(session: AsyncClientSession) -> Scan:
        head = await Gallery.get(gallery.id, session=session)
        if head is None:
            raise NotFound
        series = series_of(head)
        limit = _threshold(runtime, head) if threshold is None else threshold
        former = await Scan.latest_done(series, limit)
        since = 0 if former is None else former.upto_seq
        moment = now()
        scan = Scan(
            gallery_id=head.id, series=series, threshold=limit, since_seq=since, upto_seq=head.seq, block=SEQS_A_BLOCK,
            total=tile_count(since, head.seq, SEQS_A_BLOCK), runner=runner, heartbeat_at=moment, created_at=moment,
            created_by=action.actor_id,
        )  # fmt: skip
        await scan.insert(session=session)
        await _tell_of(session, action, gallery, scan, {"step": "start", "threshold": round(limit, 4)}, status_code=202)
        return scan

    scan = await runtime.transaction(insert)
    if runner is None:
        await runtime.queue.enqueue_scan(scan.id)
    return scan


def _threshold(runtime: Runtime, gallery: Gallery) -> float:
    return thresholds_for(gallery.policy, runtime.engine.card, gallery.samples).dedup


async def pause(runtime: Runtime, action: Action, gallery: Gallery, scan_id: str) -> Scan:
    """Stop for now; the tile in hand is not counted. Raises Conflict when it is neither queued nor running."""
    return await _turn(runtime, action, gallery, scan_id, "pause", {"queued": "paused", "running": "paused"})


async def resume(runtime: Runtime, action: Action, gallery: Gallery, scan_id: str, *, queue: bool = True) -> Scan:
    """Go on where it was paused. queue: by the workers. Raises Conflict when it is not paused."""
    scan = await _turn(runtime, action, gallery, scan_id, "resume", {"paused": "queued"})
    if queue:
        await runtime.queue.enqueue_scan(scan.id, again=f":{new_id()}")
    return scan


async def cancel(runtime: Runtime, action: Action, gallery: Gallery, scan_id: str) -> Scan:
    """End it here; what it found stays. Raises Conflict when it has ended already."""
    to: ScanState = "cancelled"
    return await _turn(runtime, action, gallery, scan_id, "cancel", {"queued": to, "running": to, "paused": to})


async def run(
    runtime: Runtime,
    scan_id: str,
    *,
    runner: str | None = None,
    seconds: float = SLICE_SECONDS,
    tell: Tell | None = None,
) -> bool:
    """Work on a scan for a while; nothing when it has ended, is paused, or somebody else is at it. Safe to run twice.

    Of one that has ended it makes the clusters that somebody asks for. runner: who works, when not a worker, who has the
    queue asked for the next slice. tell: hears of every tile. Returns whether it was this runner's turn. Raises NotReady and
    what stores raise; the queue tries again.
    """
    scan = await Scan.claim(scan_id, runner or new_id())
    if scan is None:
        ended = await Scan.to_group(scan_id)
        if ended is not None:
            await _group(runtime, ended)
        return False
    # Ended by an event: a cancellation may come out of MongoDB's driver as an error of its own.
    stop = asyncio.Event()
    beating = asyncio.create_task(_beat(scan, stop))
    try:
        gallery = await Gallery.get(scan.gallery_id)
        if gallery is None or series_of(gallery) != scan.series:
            await _end(runtime, scan, gallery, "failed", "The gallery changed its model or epoch.")
            return True
        runtime.require_contract(gallery)
        try:
            is_over = await _Slice(runtime, gallery, time.monotonic() + seconds, tell).run(scan)
        except _TooMany:
            reason = f"More than {MOST_PAIRS:,} pairs reach {scan.threshold:.3f}: that is too low for this gallery."
            await _end(runtime, scan, gallery, "failed", reason)
            return True
    except _Stopped:
        return True
    except Exception as error:
        if _passes(error) or await scan.count_failure() < TRIES:
            raise
        log.exception("scan_failed", scan=scan_id)
        await _end(runtime, scan, gallery, "failed", str(error) if isinstance(error, Problem) else type(error).__name__)
        return True
    finally:
        stop.set()
        await asyncio.gather(beating, return_exceptions=True)
        await scan.release()
    if not is_over and runner is None:
        await runtime.queue.enqueue_scan(scan_id, again=f":{new_id()}")
    return True


async def carry_out(runtime: Runtime, action: Action, gallery: Gallery, threshold: float | None, tell: Tell) -> Scan:
    """Scan the gallery in this very process, to the end; goes on with an unfinished scan at the same threshold.

    Where a worker is at that one, it is watched. A cancellation of the task pauses the scan. Raises what `start` raises.
    """
    runner = new_id()
    limit = _threshold(runtime, gallery) if threshold is None else threshold
    scan = await Scan.unfinished(series_of(gallery), limit)
    if scan is None:
        scan = await start(runtime, action, gallery, limit, runner=runner)
    elif scan.state == "paused":
        scan = await resume(runtime, action, gallery, scan.id, queue=False)
    try:
        return await _to_the_end(runtime, scan.id, runner, tell)
    except (asyncio.CancelledError, PyMongoError) as error:
        task = asyncio.current_task()
        if task is None or not task.cancelling():
            raise
        with suppress(Conflict):  # it has just ended
            await pause(runtime, action, gallery, scan.id)
        # MongoDB's driver may turn a cancellation into an error of its own.
        raise asyncio.CancelledError from error


async def _to_the_end(runtime: Runtime, scan_id: str, runner: str, tell: Tell) -> Scan:
    while True:
        try:
            is_ours = await run(runtime, scan_id, runner=runner, tell=tell)
        except (NotReady, DependencyUnavailable):
            is_ours = False
        scan = await Scan.get(scan_id)
        if scan is None:
            raise NotFound
        tell(scan)
        if scan.state not in ("queued", "running"):
            return scan
        if not is_ours:
            await asyncio.sleep(RETRY_SECONDS)


async def sweep(runtime: Runtime) -> int:
    """Queue every scan that nobody works on: the queue may have lost it, or its worker died."""
    overdue = await Scan.overdue()
    for scan in overdue:
        # The same queue id for a while: jobs that wait behind a busy worker should not pile up.
        await runtime.queue.enqueue_scan(scan.id, again=f":{int(now().timestamp() / SILENCE.total_seconds())}")
    if overdue:
        log.info("overdue_scans_queued", count=len(overdue))
    return len(overdue)


async def clusters_behind(runtime: Runtime, scan: Scan, place: tuple[int, str] | None, limit: int) -> Clusters:
    """The next clusters after this place, the largest first; fewer than the limit where they are of many people.

    Up to PAIRS_GROUPED_AT_ONCE pairs they are as of now. Of more, a worker makes them when somebody asks, and they are shown
    until they are older than GROUPED_ANEW and made anew. Raises NotReady while they are made for the first time, Conflict when
    there are that many pairs and the scan has not ended, or has too many.
    """
    pairs = await scan.counted(MOST_PAIRS + 1)
    if pairs <= PAIRS_GROUPED_AT_ONCE:
        moment, found = now(), await clusters_of(runtime, scan)
        places = [(-len(one.members), one.members[0]) for one in found]
        first = 0 if place is None else bisect_right(places, place)
        return _page([ClusterSummary.of(one) for one in found[first : first + limit + 1]], moment, limit)
    if pairs > MOST_PAIRS:
        raise Conflict(f"There are no clusters of more than {MOST_PAIRS:,} pairs.")
    if scan.state in UNFINISHED:
        raise Conflict(f"Clusters of more than {PAIRS_GROUPED_AT_ONCE:,} pairs are shown when the scan has ended.")
    age = timedelta.max if scan.grouping is None else now() - scan.grouping.as_of
    if age > GROUPED_ANEW:
        await scan.want_grouping()
        await runtime.queue.enqueue_scan(scan.id, again=":clusters")
    if scan.grouping is None or age > LAST_READ:
        raise NotReady(f"A worker groups {pairs:,} pairs; please ask again.", retry_after_seconds=5)
    return _page(await ClusterRun.behind(scan.id, scan.grouping, place, limit), scan.grouping.as_of, limit)


def _page(found: Sequence[ClusterSummary], as_of: datetime, limit: int) -> Clusters:
    people = 0
    for number, cluster in enumerate(found):
        people += len(cluster.members)
        if number == limit or (number and people > PEOPLE_A_PAGE):
            return Clusters(list(found[:number]), as_of, is_more=True)
    return Clusters(list(found), as_of, is_more=False)


async def _group(runtime: Runtime, scan: Scan) -> None:
    """Make the scan's clusters and keep them."""
    grouping = Grouping(id=new_id(), as_of=now())
    found = await clusters_of(runtime, scan)
    await ClusterRun.keep(await runtime.compute_long(SCANS, ClusterRun.runs_of, scan.id, grouping, found))
    await scan.keep_grouping(grouping)
    log.info(
        "scan_grouped", scan=scan.id, clusters=len(found), seconds=round((now() - grouping.as_of).total_seconds(), 1)
    )


async def clusters_of(runtime: Runtime, scan: Scan) -> list[Cluster]:
    """Who hangs together by a scan's pairs so far, largest first; a pair that a person called distinct is no link.

    Takes half a minute for a million pairs.
    """
    contract, margin = contract_of(scan, await Gallery.get(scan.gallery_id)), margin_of(runtime.engine.card)
    links: list[Link] = []
    async for some in ScanPair.links_of(scan):
        decisions = await decisions_on(some, contract, margin)
        links += [link for link in some if decisions.get(link[:2]) != "distinct"]
    return await runtime.compute_long(SCANS, clusters, links, scan.threshold)


async def _beat(scan: Scan, stop: asyncio.Event) -> None:
    """Speak up between tiles too: the first one waits for its gallery, and for what is compiled at its first use."""
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), SILENCE.total_seconds() / 3)
        if stop.is_set():
            return
        with suppress(PyMongoError):  # the work itself will meet it
            await scan.beat()


def _passes(error: Exception) -> bool:
    """Whether waiting helps: then it does not count as a failure."""
    if isinstance(error, PyMongoError) and (error.timeout or error.has_error_label("TransientTransactionError")):
        return True
    return isinstance(error, PASSING)


class _Piece(NamedTuple):
    """Rows of both blocks, from which row on, and whether they are the same rows."""

    left: Halves
    right: Halves
    first_left: int
    first_right: int
    same: bool


class _Column(NamedTuple):
    """The right block, which all tiles of a column share."""

    seqs: tuple[int, int]
    block: Block


@dataclass(slots=True)
class _Slice:
    """Tiles until the time is over, at least one."""

    runtime: Runtime
    gallery: Gallery
    until: float
    tell: Tell | None
    column: _Column | None = None

    async def run(self, scan: Scan) -> bool:
        """Returns whether the scan is over. Raises _Stopped, _TooMany."""
        while scan.done < scan.total:
            began = time.monotonic()
            where = tile(scan.done, scan.since_seq, scan.upto_seq, scan.block)
            compared, pairs = await self._compare(where, scan.threshold)
            await self._commit(scan, pairs, compared, began)
            scan.done += 1
            scan.compared += compared
            scan.seconds += time.monotonic() - began
            if self.tell is not None:
                self.tell(scan)
            if time.monotonic() > self.until:
                break
        count = await ScanPair.count_of(scan, MOST_PAIRS + 1)
        await scan.keep_count(count)
        if count > MOST_PAIRS:
            raise _TooMany
        is_over = scan.done == scan.total
        if is_over:
            await _end(self.runtime, scan, self.gallery, "done", None)
        return is_over

    async def _compare(self, where: Tile, threshold: float) -> tuple[int, list[FoundPair]]:
        """How many pairs of vectors the tile has, and the identities that look alike in it."""
        left, right = await self._blocks(where)
        compared = len(left.ids) * (len(left.ids) - 1) // 2 if where.same else len(left.ids) * len(right.ids)
        found = await self._joined(left.vectors, right.vectors, threshold, same=where.same)
        if not found:
            return compared, []
        ones = left.ids[np.concatenate([rows.rows_left + piece.first_left for piece, rows in found])]
        others = right.ids[np.concatenate([rows.rows_right + piece.first_right for piece, rows in found])]
        scores = np.concatenate([rows.scores for _, rows in found])
        owners = await GalleryChange.owners(self.gallery.id, np.union1d(ones, others).tolist())
        return compared, await self.runtime.compute_long(SCANS, _pairs, ones, others, scores, owners)

    async def _blocks(self, where: Tile) -> tuple[Block, Block]:
        """The tile's vectors, left and right, turned by one rotation: another generation may bring another one."""
        block = partial(self.runtime.search.block, self.gallery)
        while True:
            left = None if where.same else await block(*where.left)
            column = self.column
            if (
                column is None
                or column.seqs != where.right
                or (left is not None and left.rotation != column.block.rotation)
            ):
                column = self.column = _Column(where.right, await block(*where.right))
            right = column.block
            if left is None:
                return right, right
            if left.rotation == right.rotation:
                return left, right

    async def _joined(
        self, left: Halves, right: Halves, threshold: float, *, same: bool
    ) -> list[tuple[_Piece, Joined]]:
        """The rows that look alike; as many pieces side by side as there are cores."""
        found: list[tuple[_Piece, Joined]] = []
        pieces = iter(list(_pieces(left, right, same=same)))

        async def work() -> None:
            for piece in pieces:
                rows = await self.runtime.compute_long(
                    SCANS, pairs_above, piece.left, piece.right, threshold, same=piece.same
                )
                if len(rows.scores):
                    found.append((piece, rows))
                if sum(len(some.scores) for _, some in found) > MOST_PAIRS:
                    raise _TooMany

        await all_of(*(work() for _ in range(self.runtime.settings.compute_threads or processors())))
        return found

    async def _commit(self, scan: Scan, pairs: Sequence[FoundPair], compared: int, began: float) -> None:
        """Keep the pairs and count the tile, in one transaction; what is too much for one goes before it."""
        first = 0
        while len(pairs) - first > PAIRS_A_TRANSACTION:
            some = pairs[first : first + PAIRS_A_TRANSACTION]
            await self.runtime.transaction(partial(_keep, scan, some), seconds=TRANSACTION_SECONDS)
            first += PAIRS_A_TRANSACTION

        async def conclude(session: AsyncClientSession) -> None:
            await _keep(scan, pairs[first:], session)
            if not await scan.advance(session, compared=compared, seconds=time.monotonic() - began):
                raise _Stopped

        await self.runtime.transaction(conclude, seconds=TRANSACTION_SECONDS)


def _pieces(left: Halves, right: Halves, *, same: bool) -> Iterator[_Piece]:
    for first in range(0, len(left), ROWS_A_PIECE):
        last = min(len(left), first + ROWS_A_PIECE)
        rows = left[first:last]
        if not same:
            yield _Piece(rows, right, first, 0, same=False)
            continue
        yield _Piece(rows, rows, first, first, same=True)
        if last < len(right):
            yield _Piece(rows, right[last:], first, last, same=False)


def _pairs(ones: Ids, others: Ids, scores: Scores, owners: Mapping[int, tuple[str, str]]) -> list[FoundPair]:
    """The identities behind the samples: each two once, by their best score; nobody with himself, nobody erased.

    ones, others, scores: (n,), the seqs of samples that look alike. owners: identity and sample of each seq.
    """
    best: dict[tuple[str, str], tuple[float, int]] = {}
    for one, other, score in zip(ones.tolist(), others.tolist(), scores.tolist(), strict=True):
        if one not in owners or other not in owners:
            continue
        mine, theirs = owners[one][0], owners[other][0]
        if mine == theirs:
            continue
        key = (mine, theirs) if mine < theirs else (theirs, mine)
        known, seq = best.get(key, (score, max(one, other)))
        best[key] = (max(known, score), min(seq, max(one, other)))
    return [FoundPair(low, high, score, seq) for (low, high), (score, seq) in best.items()]


async def _keep(scan: Scan, pairs: Sequence[FoundPair], session: AsyncClientSession) -> None:
    """Record the pairs of those who are not erased; writes to each, so that an erasure in between conflicts."""
    ids = sorted({id_ for pair in pairs for id_ in (pair.low, pair.high)})
    statuses = await Identity.statuses(ids, session) if ids else {}
    living = {id_ for id_ in ids if statuses.get(id_, "erased") != "erased"}
    await Identity.touch_living(sorted(living), session)
    await ScanPair.record(scan.series, [p for p in pairs if p.low in living and p.high in living], session)


async def _end(runtime: Runtime, scan: Scan, gallery: Gallery | None, state: ScanState, reason: str | None) -> None:
    """Done or failed, if it still is this runner's."""
    pairs = await ScanPair.count_of(scan, MOST_PAIRS + 1)

    async def conclude(session: AsyncClientSession) -> bool:
        if not await scan.turn(session, state, reason=reason, by_runner=True):
            return False
        detail: Detail = {"step": state, "pairs": pairs, "seconds": round(scan.seconds, 1), "reason": reason}
        await _tell_of(session, by_system("dedup.scan"), gallery, scan, detail)
        return True

    if await runtime.transaction(conclude):
        await scan.keep_count(pairs)
        log.info("scan_ended", scan=scan.id, state=state, pairs=pairs, reason=reason)


async def _turn(
    runtime: Runtime, action: Action, gallery: Gallery, scan_id: str, step: str, to: Mapping[ScanState, ScanState]
) -> Scan:
    async def change(session: AsyncClientSession) -> None:
        scan = await Scan.get(scan_id, session=session)
        if scan is None:
            raise NotFound
        if scan.state not in to:
            raise Conflict(f"The scan is {scan.state}.")
        if not await scan.turn(session, to[scan.state]):
            raise NotReady("The scan was changed at the same moment.")
        await _tell_of(session, action, gallery, scan, {"step": step})

    await runtime.transaction(change)
    scan = await Scan.get(scan_id)
    if scan is None:
        raise NotFound
    return scan


async def _tell_of(
    session: AsyncClientSession, action: Action, gallery: Gallery | None, scan: Scan, detail: Detail,
    *, status_code: int | None = None,
) -> None:  # fmt: skip
    outcome: Outcome = "failure" if detail.get("step") == "failed" else "success"
    await record(
        session, action, subject_kind="scan", subject_id=scan.id, outcome=outcome, status_code=status_code,
        gallery=None if gallery is None else gallery.name, detail=detail,
    )  # fmt: skip
