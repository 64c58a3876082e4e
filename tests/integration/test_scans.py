"""Whole-gallery scans: nobody is missed or counted twice, whoever dies, pauses, is erased or enrolled in between."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from itertools import combinations

import numpy as np
import pytest
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import AutoReconnect

from app.audit import Action
from app.documents import scans as scan_documents
from app.documents.base import new_id, now
from app.documents.cases import Case, Pair
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Identity
from app.documents.scans import ClusterRun, Scan, ScanPair
from app.domain.policy import Status
from app.errors import Conflict, GalleryTooLarge, ModelMismatch, NotReady
from app.runtime import Runtime
from app.search import Block
from app.use_cases import open_cases as opening_cases
from app.use_cases import scan as scanning
from app.use_cases.open_cases import Opened, open_cases
from tests.builders import (
    active,
    another_process,
    by_officer,
    case_about,
    decided,
    default_gallery,
    enrolled,
    erased,
    known,
    suspected,
)
from tests.fakes import CARD, FakeEngine, embedding_of


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four vectors to a block: a dozen people are a triangle of six tiles."""
    monkeypatch.setattr(scanning, "SEQS_A_BLOCK", 4)


@pytest.fixture
async def other(runtime: Runtime) -> AsyncIterator[Runtime]:
    async with another_process(runtime) as process:
        yield process


def by_scanner() -> Action:
    return by_officer("dedup.scan")


async def missed(
    runtime: Runtime, *people: str, capture: int = 0, photos: int = 1, status: Status = "active"
) -> Identity:
    """Somebody who became active without anybody noticing whom they look like."""
    identity = await enrolled(runtime, *people, capture=capture, photos=photos)
    fields = {"status": status, "samples.$[].status": "active", "outbox_at": None}
    collection = Identity.get_pymongo_collection()
    await collection.update_one({"_id": identity.id}, {"$set": fields, "$inc": {"version": 1}})
    return await known(identity)


async def crowd(runtime: Runtime) -> dict[str, Identity]:
    """Twelve people of whom ann is in three times and bob twice, spread over three blocks."""
    names = ["ann", "cid", "bob", "dan", "eve", "ann-2", "fay", "gus", "bob-2", "hal", "ann-3", "ivy"]
    return {
        name: await missed(runtime, name.partition("-")[0], capture=int(name.partition("-")[2] or 1)) for name in names
    }


async def started(runtime: Runtime, threshold: float | None = None) -> Scan:
    return await scanning.start(runtime, by_scanner(), await default_gallery(), threshold)


async def done(runtime: Runtime, scan: Scan) -> Scan:
    """The scan after as many slices as it takes."""
    for _ in range(100):
        with suppress(NotReady):  # on a busy machine the gallery may take a while to open
            await scanning.run(runtime, scan.id)
        scan = await now_of(scan)
        if scan.state not in ("queued", "running"):
            break
    return scan


async def opened(runtime: Runtime) -> None:
    """The gallery is in the process's memory; on a busy machine that may take longer than one answer."""
    while runtime.search.state((gallery := await default_gallery()).id) is None:
        with suppress(NotReady):
            await runtime.search.warm(gallery)


async def one_tile(runtime: Runtime, scan: Scan) -> None:
    """The next tile, and no more."""
    before = (await now_of(scan)).done
    while (await now_of(scan)).done == before:
        with suppress(NotReady):
            await scanning.run(runtime, scan.id, seconds=0)


async def scanned(runtime: Runtime, threshold: float | None = None) -> Scan:
    scan = await done(runtime, await started(runtime, threshold))
    assert (scan.state, scan.reason) == ("done", None)
    return scan


async def now_of(scan: Scan) -> Scan:
    found = await Scan.get(scan.id)
    assert found is not None
    return found


async def pairs_of(scan: Scan) -> dict[frozenset[str], float]:
    return {frozenset((pair.low, pair.high)): pair.score for pair in await ScanPair.best_of(scan, 1000, None)}


async def silent(scan: Scan) -> None:
    """As if nobody had been heard of for a minute."""
    long_ago = now() - timedelta(minutes=1)
    await Scan.get_pymongo_collection().update_one({"_id": scan.id}, {"$set": {"heartbeat_at": long_ago}})


def among(*people: Identity) -> set[frozenset[str]]:
    """All of them with each other."""
    return {frozenset(two) for two in combinations([person.id for person in people], 2)}


async def test_a_scan_finds_everybody_who_is_in_twice_and_nobody_else(runtime: Runtime) -> None:
    people = await crowd(runtime)
    scan = await scanned(runtime)
    trio, duo = ([people[n] for n in people if n.startswith(name)] for name in ("ann", "bob"))
    assert set(await pairs_of(scan)) == among(*trio) | among(*duo)
    assert (scan.done, scan.total, scan.compared) == (6, 6, 12 * 11 // 2)
    assert (scan.since_seq, scan.upto_seq) == (0, 12)
    assert scan.seconds > 0
    assert scan.finished_at is not None
    assert scan.started_at is not None
    assert scan.started_at <= scan.finished_at
    assert [cluster.members for cluster in await scanning.clusters_of(runtime, scan)] == [
        tuple(sorted(person.id for person in group)) for group in (trio, duo)
    ]


async def test_scores_are_the_cosines_of_the_photos(runtime: Runtime) -> None:
    people = await crowd(runtime)
    found = await pairs_of(await scanned(runtime))
    one, two = embedding_of(("ann",), 1), embedding_of(("ann",), 2)
    assert found[frozenset((people["ann"].id, people["ann-2"].id))] == pytest.approx(float(one @ two), abs=1e-3)


async def test_samples_of_one_identity_are_no_pair_and_several_of_two_are_one(runtime: Runtime) -> None:
    first, second = await missed(runtime, "ann", photos=5), await missed(runtime, "ann", capture=7, photos=3)
    scan = await scanned(runtime)
    best = max(float(embedding_of(("ann",), i) @ embedding_of(("ann",), 7 + j)) for i in range(5) for j in range(3))
    ((pair, score),) = (await pairs_of(scan)).items()
    assert pair == {first.id, second.id}
    assert score == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("threshold", [0.02, 0.3])
async def test_a_scan_finds_what_an_exact_comparison_finds(runtime: Runtime, threshold: float) -> None:
    rng = np.random.default_rng(7)
    names = [tuple(rng.choice(list("abcdef"), 2, replace=False).tolist()) for _ in range(14)]
    people = [await missed(runtime, *name, capture=i) for i, name in enumerate(names)]
    vectors = [embedding_of(name, i).astype(np.float64) for i, name in enumerate(names)]
    found = await pairs_of(await scanned(runtime, threshold))
    for (one, a), (other, b) in combinations(zip(people, vectors, strict=True), 2):
        score = float(a @ b)
        if abs(score - threshold) > 1e-3:  # the index rounds to float16
            assert (frozenset((one.id, other.id)) in found) == (score > threshold)


async def test_an_empty_gallery_is_scanned_in_no_time(runtime: Runtime) -> None:
    scan = await scanned(runtime)
    assert (scan.total, scan.compared, await pairs_of(scan)) == (0, 0, {})
    assert await scanning.clusters_of(runtime, scan) == []


async def test_a_killed_worker_loses_the_tile_in_hand_and_no_other(
    runtime: Runtime, other: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = await crowd(runtime)
    scan = await started(runtime)
    await one_tile(runtime, scan)
    await one_tile(runtime, scan)
    zombie = await Scan.claim(scan.id, "a worker that is killed now")
    assert zombie is not None
    assert zombie.done == 2
    assert not await scanning.run(other, scan.id), "its heartbeat is fresh"
    assert await scanning.sweep(other) == 0
    await silent(scan)
    assert await scanning.sweep(other) == 1
    seen: list[tuple[int, int]] = []
    block = other.search.block

    async def watched(gallery: Gallery, first: int, last: int) -> object:
        seen.append((first, last))
        return await block(gallery, first, last)

    monkeypatch.setattr(other.search, "block", watched)
    scan = await done(other, scan)
    assert (scan.state, scan.done, scan.compared) == ("done", 6, 12 * 11 // 2)
    assert (5, 8) in seen
    assert len(await pairs_of(scan)) == 4
    assert people


async def test_a_worker_that_is_long_at_one_tile_is_not_taken_for_dead(
    runtime: Runtime, other: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "SILENCE", timedelta(milliseconds=30))
    await crowd(runtime)
    scan = await started(runtime)
    await opened(runtime)
    block = runtime.search.block

    async def long(gallery: Gallery, first: int, last: int) -> object:
        await silent(scan)
        await asyncio.sleep(0.3)
        assert not await scanning.run(other, scan.id)
        return await block(gallery, first, last)

    monkeypatch.setattr(runtime.search, "block", long)
    await scanning.run(runtime, scan.id, seconds=0)
    assert (await now_of(scan)).done == 1


async def test_nobody_speaks_up_for_a_scan_that_its_worker_has_left(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the driver has made an error of the cancellation."""
    monkeypatch.setattr(scanning, "SILENCE", timedelta(milliseconds=30))
    await crowd(runtime)
    scan = await started(runtime)
    await opened(runtime)
    beats, block, is_speaking = 0, runtime.search.block, asyncio.Event()

    async def swallowing(_: Scan) -> None:
        nonlocal beats
        beats += 1
        is_speaking.set()
        try:
            await asyncio.sleep(0.5)
        except asyncio.CancelledError:
            raise AutoReconnect from None

    async def slow(gallery: Gallery, first: int, last: int) -> Block:
        await is_speaking.wait()
        return await block(gallery, first, last)

    monkeypatch.setattr(Scan, "beat", swallowing)
    monkeypatch.setattr(runtime.search, "block", slow)
    async with asyncio.timeout(10):
        await scanning.run(runtime, scan.id, seconds=0)
    before = beats
    await asyncio.sleep(0.1)
    assert beats == before


async def test_a_scan_goes_on_by_the_blocks_that_it_began_with(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await crowd(runtime)
    scan = await started(runtime)
    await one_tile(runtime, scan)
    monkeypatch.setattr(scanning, "SEQS_A_BLOCK", 8192)
    assert (await done(runtime, scan)).compared == 12 * 11 // 2


async def test_a_worker_that_was_taken_for_dead_counts_nothing(runtime: Runtime, other: Runtime) -> None:
    await crowd(runtime)
    scan = await started(runtime)
    zombie = await Scan.claim(scan.id, "slow")
    assert zombie is not None
    await silent(scan)
    await one_tile(other, scan)

    async def count(session: AsyncClientSession) -> bool:
        return await zombie.advance(session, compared=6, seconds=1)

    assert not await runtime.transaction(count)
    await zombie.release()
    assert (await now_of(scan)).done == 1


async def test_of_several_workers_one_works_and_nothing_is_counted_twice(runtime: Runtime, other: Runtime) -> None:
    await crowd(runtime)
    scan = await started(runtime)
    for process in (runtime, other):
        await opened(process)
    turns = await asyncio.gather(*(scanning.run(process, scan.id) for process in (runtime, other) * 3))
    assert any(turns)
    scan = await done(other, scan)
    assert (scan.state, scan.done, scan.compared) == ("done", 6, 12 * 11 // 2)


async def test_a_scan_that_the_queue_lost_is_found_again(runtime: Runtime) -> None:
    scan = await started(runtime)
    assert await scanning.sweep(runtime) == 0, "its job may still come"
    await silent(scan)
    assert await scanning.sweep(runtime) == 1
    await done(runtime, scan)
    await silent(scan)
    assert await scanning.sweep(runtime) == 0


async def test_a_paused_scan_goes_on_where_it_was(runtime: Runtime) -> None:
    await crowd(runtime)
    scan = await started(runtime)
    await one_tile(runtime, scan)
    gallery = await default_gallery()
    paused = await scanning.pause(runtime, by_scanner(), gallery, scan.id)
    assert (paused.state, paused.done) == ("paused", 1)
    assert not await scanning.run(runtime, scan.id)
    await silent(scan)
    assert await scanning.sweep(runtime) == 0
    assert (await scanning.resume(runtime, by_scanner(), gallery, scan.id)).state == "queued"
    ended = await done(runtime, scan)
    assert (ended.state, ended.done, ended.compared) == ("done", 6, 12 * 11 // 2)


@pytest.mark.parametrize("stop", [scanning.pause, scanning.cancel])
async def test_a_tile_in_hand_is_not_counted_when_the_scan_is_stopped(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, stop: Callable[..., Awaitable[Scan]]
) -> None:
    await crowd(runtime)
    scan, gallery = await started(runtime), await default_gallery()
    await opened(runtime)
    block = runtime.search.block

    async def stopped_meanwhile(*args: object) -> object:
        monkeypatch.setattr(runtime.search, "block", block)
        await stop(runtime, by_scanner(), gallery, scan.id)
        return await block(*args)

    monkeypatch.setattr(runtime.search, "block", stopped_meanwhile)
    assert await scanning.run(runtime, scan.id)
    scan = await now_of(scan)
    assert (scan.state, scan.done, scan.runner) == (
        f"{stop.__name__}{'d' if stop is scanning.pause else 'led'}",
        0,
        None,
    )
    assert await pairs_of(scan) == {}


async def test_what_the_state_does_not_allow_is_a_conflict(runtime: Runtime) -> None:
    gallery, scan = await default_gallery(), await started(runtime)
    with pytest.raises(Conflict, match="queued"):
        await scanning.resume(runtime, by_scanner(), gallery, scan.id)
    await scanning.cancel(runtime, by_scanner(), gallery, scan.id)
    for step in (scanning.pause, scanning.resume, scanning.cancel):
        with pytest.raises(Conflict, match="cancelled"):
            await step(runtime, by_scanner(), gallery, scan.id)
    assert not await scanning.run(runtime, scan.id)
    assert (await now_of(scan)).finished_at is not None


async def test_a_later_scan_looks_at_what_is_new_and_shows_what_is_known(runtime: Runtime) -> None:
    people = await crowd(runtime)
    first = await scanned(runtime)
    newcomer = await missed(runtime, "bob", capture=9)
    second = await scanned(runtime)
    assert (second.since_seq, second.upto_seq, second.total) == (12, 13, 4)
    assert second.compared == 12
    trio, duo = ([people[n] for n in people if n.startswith(name)] for name in ("ann", "bob"))
    assert set(await pairs_of(second)) == among(*trio) | among(*duo, newcomer)
    assert set(await pairs_of(first)) == among(*trio) | among(*duo), "the newcomer came after it"


async def test_a_later_scan_begins_anew_at_a_lower_threshold_and_not_at_a_higher_one(runtime: Runtime) -> None:
    await crowd(runtime)
    await scanned(runtime, 0.5)
    assert (await scanned(runtime, 0.6)).total == 0
    assert (await scanned(runtime, 0.4)).compared == 12 * 11 // 2


async def test_a_scan_that_was_not_finished_is_not_built_upon(runtime: Runtime) -> None:
    await crowd(runtime)
    scan = await started(runtime)
    await one_tile(runtime, scan)
    await scanning.cancel(runtime, by_scanner(), await default_gallery(), scan.id)
    assert (await scanned(runtime)).since_seq == 0


async def test_whoever_is_erased_leaves_the_pairs_of_every_scan(runtime: Runtime) -> None:
    people = await crowd(runtime)
    scan = await scanned(runtime)
    await erased(runtime, people["ann-2"])
    assert set(await pairs_of(scan)) == among(people["ann"], people["ann-3"]) | among(people["bob"], people["bob-2"])
    assert await ScanPair.find({"$or": [{"low": people["ann-2"].id}, {"high": people["ann-2"].id}]}).count() == 0


async def test_whoever_is_erased_while_a_tile_is_compared_is_in_no_pair(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = await crowd(runtime)
    scan = await started(runtime)
    owners = GalleryChange.owners

    async def read_too_early(gallery_id: str, seqs: list[int]) -> object:
        found = await owners(gallery_id, seqs)
        monkeypatch.setattr(GalleryChange, "owners", owners)
        await erased(runtime, people["ann"])
        return found

    monkeypatch.setattr(GalleryChange, "owners", read_too_early)
    scan = await done(runtime, scan)
    assert set(await pairs_of(scan)) == among(people["ann-2"], people["ann-3"]) | among(people["bob"], people["bob-2"])


async def test_an_erasure_at_the_moment_of_the_commit_leaves_no_pair_behind(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await missed(runtime, "ann"), await missed(runtime, "ann", capture=1)
    scan = await started(runtime)
    statuses = Identity.statuses

    async def erased_after_the_look(*args: object) -> object:
        found = await statuses(*args)
        monkeypatch.setattr(Identity, "statuses", statuses)
        await erased(runtime, first)
        return found

    monkeypatch.setattr(Identity, "statuses", erased_after_the_look)
    scan = await done(runtime, scan)
    assert scan.state == "done"
    assert await ScanPair.find_all().count() == 0
    assert (await known(second)).status == "active"


async def test_a_gallery_of_another_epoch_fails_its_scans(runtime: Runtime) -> None:
    scan = await started(runtime)
    await Gallery.get_pymongo_collection().update_one({"_id": scan.gallery_id}, {"$set": {"epoch": new_id()}})
    ended = await done(runtime, scan)
    assert ended.state == "failed"
    assert "epoch" in (ended.reason or "")


async def test_a_gallery_of_another_model_is_not_scanned(runtime: Runtime) -> None:
    other_model = FakeEngine(
        CARD.__class__(**{name: getattr(CARD, name) for name in CARD.__slots__} | {"contract": "x"})
    )
    scan = await started(runtime)
    runtime.engine, engine = other_model, runtime.engine
    with pytest.raises(ModelMismatch):
        await started(runtime)
    with pytest.raises(ModelMismatch):
        await scanning.run(runtime, scan.id)
    runtime.engine = engine
    assert (await done(runtime, scan)).state == "done", "a worker of the right model has come"


async def test_a_threshold_among_strangers_ends_the_scan_with_a_reason(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "MOST_PAIRS", 3)
    await crowd(runtime)
    ended = await done(runtime, await started(runtime))
    assert ended.state == "failed"
    assert "too low" in (ended.reason or "")
    (event,) = await AuditEvent.find({"action": "dedup.scan", "outcome": "failure"}).to_list()
    assert event.subject.id == ended.id


async def test_a_scan_that_fails_again_and_again_is_given_up(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    await crowd(runtime)
    scan = await started(runtime)

    await opened(runtime)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(scanning, "pairs_above", broken)
    for _ in range(scanning.TRIES - 1):
        with pytest.raises(RuntimeError):
            await scanning.run(runtime, scan.id)
    assert await scanning.run(runtime, scan.id)
    scan = await now_of(scan)
    assert (scan.state, scan.reason) == ("failed", "RuntimeError")


async def test_a_scan_that_is_given_up_says_what_is_to_be_done(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await crowd(runtime)
    scan = await started(runtime)
    monkeypatch.setattr(scanning, "TRIES", 1)

    async def too_large(*args: object) -> None:
        raise GalleryTooLarge("raise INDEX_MEMORY_MIB, or divide the gallery")

    monkeypatch.setattr(runtime.search, "block", too_large)
    assert await scanning.run(runtime, scan.id)
    scan = await now_of(scan)
    assert (scan.state, scan.reason) == ("failed", "raise INDEX_MEMORY_MIB, or divide the gallery")


async def test_a_gallery_that_is_being_opened_is_waited_for_and_counts_as_no_failure(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await crowd(runtime)
    scan = await started(runtime)
    block = runtime.search.block

    async def opening(*args: object) -> None:
        raise NotReady

    monkeypatch.setattr(runtime.search, "block", opening)
    for _ in range(scanning.TRIES + 1):
        with pytest.raises(NotReady):
            await scanning.run(runtime, scan.id)
    monkeypatch.setattr(runtime.search, "block", block)
    assert (await done(runtime, scan)).state == "done"


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
async def test_blocks_that_were_turned_differently_are_never_compared(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """Another rotation with every so many-th block; at every single one nothing could be compared at all."""
    await crowd(runtime)
    scan = await started(runtime)
    await opened(runtime)
    block = runtime.search.block
    turned = 0

    async def turning(gallery: Gallery, first: int, last: int) -> Block:
        nonlocal turned
        known = await block(gallery, first, last)
        rotation = 0 if blocks == 1 and turned > 2 else turned // blocks
        turned += 1
        return Block(known.ids, np.roll(known.vectors, rotation, axis=1), f"turned {rotation} times")

    monkeypatch.setattr(runtime.search, "block", turning)
    scan = await done(runtime, scan)
    assert len(await pairs_of(scan)) == 4
    assert scan.compared == 12 * 11 // 2


async def test_each_step_of_a_scan_is_an_event(runtime: Runtime) -> None:
    await crowd(runtime)
    gallery, scan = await default_gallery(), await started(runtime)
    await scanning.pause(runtime, by_scanner(), gallery, scan.id)
    await scanning.resume(runtime, by_scanner(), gallery, scan.id)
    await done(runtime, scan)
    events = await AuditEvent.find({"action": "dedup.scan"}).sort("_id").to_list()
    assert [event.detail["step"] for event in events] == ["start", "pause", "resume", "done"]
    assert {event.subject.id for event in events} == {scan.id}
    assert [event.actor.kind for event in events] == ["user", "user", "user", "system"]
    assert events[-1].detail["pairs"] == 4


async def test_a_scan_in_this_process_tells_how_far_it_is_and_goes_on_after_an_interruption(runtime: Runtime) -> None:
    await crowd(runtime)
    gallery, told = await default_gallery(), list[tuple[int, int]]()
    task: asyncio.Task[Scan]

    def interrupt(scan: Scan) -> None:
        told.append((scan.done, scan.total))
        if scan.done == 2:
            task.cancel()

    task = asyncio.create_task(scanning.carry_out(runtime, by_scanner(), gallery, None, interrupt))
    with pytest.raises(asyncio.CancelledError):
        await task
    (paused,) = await Scan.find_all().to_list()
    assert (paused.state, paused.done >= 2) == ("paused", True)
    ended = await scanning.carry_out(
        runtime, by_scanner(), gallery, None, lambda scan: told.append((scan.done, scan.total))
    )
    assert (ended.id, ended.state, ended.compared) == (paused.id, "done", 12 * 11 // 2)
    assert told[-1] == (6, 6)


async def test_a_pair_that_somebody_called_distinct_is_no_link(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    twin, case = await suspected(runtime, "ann")
    await decided(runtime, case, "distinct")
    scan = await scanned(runtime)
    assert set(await pairs_of(scan)) == among(ann, twin)
    assert await scanning.clusters_of(runtime, scan) == []


async def pages_of(
    runtime: Runtime, scan: Scan, limit: int, process: Runtime | None = None
) -> list[list[tuple[str, ...]]]:
    """The members of the scan's clusters, page by page."""
    pages: list[list[tuple[str, ...]]] = []
    place = None
    while True:
        found = await scanning.clusters_behind(process or runtime, await now_of(scan), place, limit)
        pages.append([cluster.members for cluster in found.items])
        if not found.is_more:
            return pages
        place = found.items[-1].place


async def grouped(runtime: Runtime, scan: Scan) -> None:
    """Somebody asks for the clusters of many pairs, and a worker makes them."""
    with pytest.raises(NotReady):
        await scanning.clusters_behind(runtime, await now_of(scan), None, 50)
    assert not await scanning.run(runtime, scan.id)


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pairs are many, and five names fill a document."""
    monkeypatch.setattr(scanning, "PAIRS_GROUPED_AT_ONCE", 3)
    monkeypatch.setattr(scan_documents, "NAMES_A_RUN", 5)
    monkeypatch.setattr(scan_documents, "RUNS_AT_ONCE", 2)


async def several(runtime: Runtime) -> list[tuple[str, ...]]:
    """Seven people who are in twice, and one who is in three times: their ids as clusters should show them."""
    groups: dict[str, list[str]] = {}
    for name in [*"abcdefgh", *"abcdefgh", "c"]:
        groups.setdefault(name, []).append((await missed(runtime, name, capture=len(groups.get(name, [])))).id)
    return sorted((tuple(sorted(ids)) for ids in groups.values()), key=lambda ids: (-len(ids), ids))


@pytest.mark.parametrize("limit", [1, 2, 3, 50])
async def test_clusters_of_few_pairs_come_at_once_and_in_pages(runtime: Runtime, limit: int) -> None:
    groups = await several(runtime)
    pages = await pages_of(runtime, await scanned(runtime), limit)
    assert [ids for page in pages for ids in page] == groups
    assert max(len(page) for page in pages) <= limit


@pytest.mark.usefixtures("few_at_once")
async def test_clusters_of_many_pairs_are_made_by_a_worker_and_come_in_the_same_pages(
    runtime: Runtime, other: Runtime
) -> None:
    groups = await several(runtime)
    scan = await scanned(runtime)
    await grouped(other, scan)
    assert await ClusterRun.find_all().count() > 1
    for limit in (1, 2, 3, 50):
        pages = await pages_of(runtime, scan, limit)
        assert [ids for page in pages for ids in page] == groups
        assert max(len(page) for page in pages) <= limit
    assert not await scanning.run(other, scan.id)
    assert (await now_of(scan)).grouping is not None
    assert not (await now_of(scan)).is_grouping_wanted


@pytest.mark.usefixtures("few_at_once")
async def test_clusters_of_many_pairs_are_shown_when_the_scan_has_ended(runtime: Runtime) -> None:
    await several(runtime)
    scan = await started(runtime)
    while await ScanPair.count_of(scan, 100) <= 3:
        await one_tile(runtime, scan)
    with pytest.raises(Conflict, match="has ended"):
        await scanning.clusters_behind(runtime, await now_of(scan), None, 50)
    await scanning.cancel(runtime, by_scanner(), await default_gallery(), scan.id)
    await grouped(runtime, scan)
    assert await pages_of(runtime, scan, 50) != [[]]


async def test_of_too_many_pairs_there_are_no_clusters(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    await crowd(runtime)
    scan = await scanned(runtime)
    monkeypatch.setattr(scanning, "PAIRS_GROUPED_AT_ONCE", 2)
    monkeypatch.setattr(scanning, "MOST_PAIRS", 3)
    with pytest.raises(Conflict, match="more than 3"):
        await scanning.clusters_behind(runtime, scan, None, 50)


@pytest.mark.usefixtures("few_at_once")
async def test_kept_clusters_are_made_anew_after_some_minutes_and_read_until_then(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = await several(runtime)
    scan = await scanned(runtime)
    await grouped(runtime, scan)
    await cases_of(runtime, scan)
    await decided(runtime, await case_about(await known_by(groups[-1][-1])), "distinct")
    assert await pages_of(runtime, scan, 50) == [groups]
    assert not await scanning.run(runtime, scan.id)
    assert await pages_of(runtime, scan, 50) == [groups], "they are new enough"
    monkeypatch.setattr(scanning, "GROUPED_ANEW", timedelta(0))
    assert await pages_of(runtime, scan, 50) == [groups], "a worker has been asked"
    first = (await now_of(scan)).grouping
    assert not await scanning.run(runtime, scan.id)
    assert await pages_of(runtime, scan, 50) == [groups[:-1]]
    assert not await scanning.run(runtime, scan.id)
    assert first is not None
    assert await ClusterRun.find({"grouping": first.id}).count() == 0
    monkeypatch.setattr(scanning, "LAST_READ", timedelta(0))
    with pytest.raises(NotReady):
        await scanning.clusters_behind(runtime, await now_of(scan), None, 50)


async def known_by(identity_id: str) -> Identity:
    found = await Identity.living(identity_id)
    assert found is not None
    return found


@pytest.mark.usefixtures("few_at_once")
async def test_kept_clusters_are_deleted_by_the_store_itself(runtime: Runtime) -> None:
    """So whatever they say of the erased goes, and whatever a killed worker left."""
    indexes = await ClusterRun.get_pymongo_collection().index_information()
    assert runtime
    assert [index["expireAfterSeconds"] for index in indexes.values() if "expireAfterSeconds" in index] == [3600]


async def test_of_a_large_cluster_the_first_members_are_shown(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_documents, "MEMBERS_SHOWN", 2)
    people = await crowd(runtime)
    found = await scanning.clusters_behind(runtime, await scanned(runtime), None, 50)
    trio = sorted(people[name].id for name in ("ann", "ann-2", "ann-3"))
    assert (found.items[0].size, found.items[0].members) == (3, tuple(trio[:2]))
    assert found.items[1].size == 2


async def test_a_page_of_large_clusters_ends_early(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "PEOPLE_A_PAGE", 4)
    groups = await several(runtime)
    pages = await pages_of(runtime, await scanned(runtime), 50)
    assert [ids for page in pages for ids in page] == groups
    assert [len(page) for page in pages] == [1, 2, 2, 2, 1]


async def test_pairs_are_counted_by_whoever_works_and_read_by_everybody_else(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = await crowd(runtime)
    scan = await started(runtime)
    assert await (await now_of(scan)).counted(100) == 0
    scan = await done(runtime, scan)
    await erased(runtime, people["cid"])
    count_of, counts = ScanPair.count_of, 0

    async def counting(scan: Scan, limit: int) -> int:
        nonlocal counts
        counts += 1
        return await count_of(scan, limit)

    monkeypatch.setattr(ScanPair, "count_of", counting)
    assert [await (await now_of(scan)).counted(100) for _ in range(3)] == [4, 4, 4]
    assert counts == 0, "cid was in no pair"
    await erased(runtime, people["ann"])
    assert [await (await now_of(scan)).counted(100) for _ in range(3)] == [2, 2, 2]
    assert counts == 1


async def test_a_count_from_before_an_erasure_is_not_kept(runtime: Runtime) -> None:
    people = await crowd(runtime)
    scan = await scanned(runtime)
    await erased(runtime, people["ann"])
    await scan.keep_count(4)
    assert await (await now_of(scan)).counted(100) == 2


async def test_a_gallery_s_scans_go_with_everything_that_they_found(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await crowd(runtime)
    scan = await scanned(runtime)
    monkeypatch.setattr(scanning, "PAIRS_GROUPED_AT_ONCE", 3)
    await grouped(runtime, scan)

    async def forget(session: AsyncClientSession) -> None:
        await Scan.forget_all_of("another gallery", session)

    await runtime.transaction(forget)
    kinds = (Scan, ScanPair, ClusterRun)
    assert [await kind.find_all().count() for kind in kinds] == [1, 4, 1]

    async def forget_all(session: AsyncClientSession) -> None:
        await Scan.forget_all_of(scan.gallery_id, session)

    await runtime.transaction(forget_all)
    assert [await kind.find_all().count() for kind in kinds] == [0, 0, 0]


async def cases_of(runtime: Runtime, scan: Scan) -> Opened:
    return await open_cases(runtime, by_scanner(), await default_gallery(), scan)


async def test_cases_are_about_who_came_later_and_change_nobody_s_standing(runtime: Runtime) -> None:
    people = await crowd(runtime)
    scan = await scanned(runtime)
    assert await cases_of(runtime, scan) == Opened(opened=3, existing=0, decided=0)
    about_third = await case_about(people["ann-3"])
    assert {c.identity_id for c in about_third.candidates} == {people["ann"].id, people["ann-2"].id}
    assert [c.rank for c in about_third.candidates] == [1, 2]
    assert about_third.candidates[0].score >= about_third.candidates[1].score >= scan.threshold
    assert (await case_about(people["bob-2"])).threshold == scan.threshold
    assert {(await known(person)).status for person in people.values()} == {"active"}
    assert len(await Pair.of(people["ann"].id)) == 2


async def test_cases_asked_for_twice_or_at_once_are_opened_once(runtime: Runtime, other: Runtime) -> None:
    await crowd(runtime)
    scan = await scanned(runtime)
    both = await asyncio.gather(cases_of(runtime, scan), cases_of(other, scan))
    assert sum(result.opened for result in both) == 3
    assert await cases_of(runtime, scan) == Opened(opened=0, existing=3, decided=0)
    assert await Case.find_all().count() == 3


async def test_a_case_about_people_of_several_batches_is_counted_once(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspect's case names two who were enrolled earlier; a third, in between, has a case of its own."""
    await crowd(runtime)
    scan = await scanned(runtime)
    await cases_of(runtime, scan)
    # As a later sample's screening leaves it: the newcomer was enrolled before those whom it looks like.
    case = (await Case.find({"candidates.1": {"$exists": True}}).to_list())[0]
    await Case.find(
        {"_id": {"$ne": case.id}, "newcomer_id": {"$in": [c.identity_id for c in case.candidates]}}
    ).delete()
    first, second, third = sorted([case.newcomer_id, *(c.identity_id for c in case.candidates)])
    turned = [
        c.model_copy(update={"identity_id": id_}) for c, id_ in zip(case.candidates, (second, third), strict=True)
    ]
    await Case.get_pymongo_collection().update_one(
        {"_id": case.id}, {"$set": {"newcomer_id": first, "candidates": [c.model_dump() for c in turned]}}
    )
    monkeypatch.setattr(opening_cases, "CASES_A_TRANSACTION", 1)
    assert (await cases_of(runtime, scan)).existing == 2, "this one, and the one about bob"


async def test_of_a_scan_s_duplicates_the_younger_one_goes(runtime: Runtime) -> None:
    people = await crowd(runtime)
    scan = await scanned(runtime)
    await cases_of(runtime, scan)
    case = await decided(runtime, await case_about(people["bob-2"]), "duplicate", about=people["bob"])
    assert (case.state, case.decided_by) == ("decided", "officer-1")
    assert [(await known(people[name])).status for name in ("bob", "bob-2")] == ["active", "duplicate"]
    assert await cases_of(runtime, scan) == Opened(opened=0, existing=2, decided=1)


async def test_of_a_scan_s_duplicates_the_younger_one_may_be_kept(runtime: Runtime) -> None:
    people = await crowd(runtime)
    await cases_of(runtime, await scanned(runtime))
    case = await decided(
        runtime, await case_about(people["ann-3"]), "duplicate", about=people["ann"], keep=people["ann-3"]
    )
    assert case.state == "open", "the other one is still to be decided"
    assert [(await known(people[name])).status for name in ("ann", "ann-2", "ann-3")] == [
        "duplicate",
        "active",
        "active",
    ]
    case = await decided(runtime, case, "duplicate", about=people["ann-2"], keep=people["ann-3"])
    assert case.state == "decided"
    assert [(await known(people[name])).status for name in ("ann-2", "ann-3")] == ["duplicate", "active"]


async def test_distinct_in_a_scan_s_case_is_recorded_and_both_stay(runtime: Runtime) -> None:
    people = await crowd(runtime)
    scan = await scanned(runtime)
    await cases_of(runtime, scan)
    case = await decided(runtime, await case_about(people["ann-3"]), "distinct", about=people["ann"])
    assert case.state == "open"
    case = await decided(runtime, case, "distinct")
    assert case.state == "decided"
    assert {(await known(people[name])).status for name in ("ann", "ann-2", "ann-3")} == {"active"}
    assert await cases_of(runtime, scan) == Opened(opened=0, existing=2, decided=2)
    members = [cluster.members for cluster in await scanning.clusters_of(runtime, scan)]
    assert tuple(sorted((people["ann"].id, people["ann-2"].id))) in members
    assert all(people["ann-3"].id not in group for group in members)


async def test_a_scan_asks_again_about_a_pair_whose_score_is_far_above_the_one_decided_on(runtime: Runtime) -> None:
    people = await crowd(runtime)
    scan = await scanned(runtime)
    await cases_of(runtime, scan)
    case = await decided(runtime, await case_about(people["bob-2"]), "distinct")
    assert (await cases_of(runtime, scan)).decided == 1
    # As if the decision had been made on two photos with a low score.
    pair = {"_id": ":".join(sorted((people["bob"].id, people["bob-2"].id)))}
    await Pair.get_pymongo_collection().update_one(pair, {"$set": {"decided_score": 0.3}})
    assert await cases_of(runtime, scan) == Opened(opened=1, existing=2, decided=0)
    members = [cluster.members for cluster in await scanning.clusters_of(runtime, scan)]
    assert tuple(sorted((people["bob"].id, people["bob-2"].id))) in members
    again = await case_about(people["bob-2"])
    assert again.id != case.id
    await decided(runtime, again, "distinct")
    assert (await cases_of(runtime, scan)).decided == 1


async def test_a_revoked_newcomer_stays_revoked(runtime: Runtime) -> None:
    await missed(runtime, "ann")
    second = await missed(runtime, "ann", capture=1, status="revoked")
    await cases_of(runtime, await scanned(runtime))
    await decided(runtime, await case_about(second), "distinct")
    assert (await known(second)).status == "revoked"


async def test_nobody_is_asked_about_duplicates_or_twice_about_a_suspect(runtime: Runtime) -> None:
    await missed(runtime, "ann")
    await missed(runtime, "ann", capture=1, status="duplicate")
    await active(runtime, "bob")
    await suspected(runtime, "bob")
    await enrolled(runtime, "bob", capture=5)  # pending: its verdict brings a case
    scan = await scanned(runtime)
    assert len(await pairs_of(scan)) == 4
    assert await cases_of(runtime, scan) == Opened(opened=0, existing=1, decided=0)
    assert await Case.find_all().count() == 1


async def test_a_suspect_s_own_case_waits_for_the_scan_s_case_about_it(runtime: Runtime) -> None:
    bob = await missed(runtime, "bob")
    suspect, own = await suspected(runtime, "ann", "bob")
    assert [c.identity_id for c in own.candidates] == [bob.id]
    assert (await known(suspect)).status == "suspected_duplicate"
    await decided(runtime, own, "distinct")
    assert (await known(suspect)).status == "active"
    ann = await missed(runtime, "ann")
    scan = await scanned(runtime)
    assert await cases_of(runtime, scan) == Opened(opened=1, existing=0, decided=1)
    assert (await case_about(ann)).candidates[0].identity_id == suspect.id


async def test_erasing_a_candidate_leaves_a_scan_s_case_to_the_others(runtime: Runtime) -> None:
    people = await crowd(runtime)
    await cases_of(runtime, await scanned(runtime))
    await erased(runtime, people["ann"])
    case = await case_about(people["ann-3"])
    case = await decided(runtime, case, "distinct", about=people["ann-2"])
    assert case.state == "decided"
    await erased(runtime, people["bob"])
    assert await Case.find({"newcomer_id": people["bob-2"].id, "state": "open"}).count() == 0
