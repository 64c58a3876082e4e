"""Scan: compare everybody in a gallery with everybody else, in tiles, and keep the look-alikes.

The Scan document is the truth: how many tiles are behind it, and who is at it. A tile's pairs and its mark are one
transaction, which holds only while the scan stands where it stood: a tile is counted once, a paused scan stops, and
whoever is killed loses the tile in hand. The queue is a hint: what nobody works on is asked for again.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import structlog
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import ConnectionFailure, PyMongoError

from app.audit import Action, by_system, record
from app.documents.base import new_id, now
from app.documents.events import Detail, Outcome
from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Identity
from app.documents.scans import SILENCE, FoundPair, Scan, ScanPair, ScanState, decisions_on, series_of
from app.domain.clusters import Cluster, Link, clusters
from app.domain.policy import thresholds_for
from app.domain.tiles import SEQS_A_BLOCK, Tile, tile, tile_count
from app.errors import Conflict, DependencyUnavailable, ModelMismatch, NotFound, NotReady
from app.runtime import Runtime
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
#: What passes: a store that is away, a gallery that is being opened, a worker of another model.
PASSING: Final = (NotReady, DependencyUnavailable, ModelMismatch, ConnectionFailure, OSError, TimeoutError)

Tell = Callable[[Scan], None]


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
        await runtime.queue.enqueue_scan(scan.id, again=f":{time.time_ns()}")
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

    runner: who works, when not a worker, who has the queue asked for the next slice. tell: hears of every tile. Returns
    whether it was this runner's turn. Raises NotReady and what stores raise; the queue tries again.
    """
    scan = await Scan.claim(scan_id, runner or new_id())
    if scan is None:
        return False
    beating = asyncio.create_task(_beat(scan))
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
        await _end(runtime, scan, gallery, "failed", type(error).__name__)
        return True
    finally:
        beating.cancel()
        await scan.release()
    if not is_over and runner is None:
        await runtime.queue.enqueue_scan(scan_id, again=f":{time.time_ns()}")
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
    except asyncio.CancelledError:
        with suppress(Conflict):  # it has just ended
            await pause(runtime, action, gallery, scan.id)
        raise


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
        await runtime.queue.enqueue_scan(scan.id, again=f":{int(time.time() / SILENCE.total_seconds())}")
    if overdue:
        log.info("overdue_scans_queued", count=len(overdue))
    return len(overdue)


async def clusters_of(runtime: Runtime, scan: Scan) -> list[Cluster]:
    """Who hangs together by a scan's pairs so far, largest first; a pair that a person called distinct is no link."""
    links: list[Link] = []
    async for some in ScanPair.links_of(scan):
        decisions = await decisions_on(some)
        links += [link for link in some if decisions.get(link[:2]) != "distinct"]
    return await runtime.compute(clusters, links, scan.threshold)


async def _beat(scan: Scan) -> None:
    """Speak up between tiles too: the first one waits for its gallery, and for what is compiled at its first use."""
    while True:
        await asyncio.sleep(SILENCE.total_seconds() / 3)
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


_Block = tuple[Ids, Halves]


class _Column(NamedTuple):
    """The right block, which all tiles of a column share, and the generation that it was read from."""

    seqs: tuple[int, int]
    generation: tuple[int | None] | None
    block: _Block


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
        if await ScanPair.count_of(scan, MOST_PAIRS + 1) > MOST_PAIRS:
            raise _TooMany
        is_over = scan.done == scan.total
        if is_over:
            await _end(self.runtime, scan, self.gallery, "done", None)
        return is_over

    async def _compare(self, where: Tile, threshold: float) -> tuple[int, list[FoundPair]]:
        """How many pairs of vectors the tile has, and the identities that look alike in it."""
        (left_ids, left), (right_ids, right) = await self._blocks(where)
        compared = len(left) * (len(left) - 1) // 2 if where.same else len(left) * len(right)
        found = await self._joined(left, right, threshold, same=where.same)
        if not found:
            return compared, []
        ones = left_ids[np.concatenate([rows.rows_left + piece.first_left for piece, rows in found])]
        others = right_ids[np.concatenate([rows.rows_right + piece.first_right for piece, rows in found])]
        scores = np.concatenate([rows.scores for _, rows in found])
        owners = await GalleryChange.owners(self.gallery.id, np.union1d(ones, others).tolist())
        return compared, await self.runtime.compute(_pairs, ones, others, scores, owners)

    async def _blocks(self, where: Tile) -> tuple[_Block, _Block]:
        """The tile's vectors, left and right, turned by one rotation: another generation may bring another one."""
        search, id_ = self.runtime.search, self.gallery.id
        while True:
            state = search.state(id_)
            generation = None if state is None else (state.generation,)
            column = self.column
            if column is None or (column.seqs, column.generation) != (where.right, generation):
                block = await search.block(self.gallery, *where.right)
                column = self.column = _Column(where.right, generation, block)
            left = column.block if where.same else await search.block(self.gallery, *where.left)
            state = search.state(id_)
            if state is not None and generation == (state.generation,):
                return left, column.block

    async def _joined(
        self, left: Halves, right: Halves, threshold: float, *, same: bool
    ) -> list[tuple[_Piece, Joined]]:
        """The rows that look alike; as many pieces side by side as there are cores."""
        found: list[tuple[_Piece, Joined]] = []
        pieces = iter(list(_pieces(left, right, same=same)))

        async def work() -> None:
            for piece in pieces:
                rows = await self.runtime.compute(pairs_above, piece.left, piece.right, threshold, same=piece.same)
                if len(rows.scores):
                    found.append((piece, rows))
                if sum(len(some.scores) for _, some in found) > MOST_PAIRS:
                    raise _TooMany

        await asyncio.gather(*(work() for _ in range(self.runtime.settings.compute_threads or os.cpu_count() or 1)))
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
