"""Generations of the index: published under a lease, committed on the head, opened by every process, healed when bad."""

import asyncio
import errno
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from app import search
from app import vectors as vectors_of
from app.audit import by_system
from app.config import Settings
from app.documents.base import now
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery, GalleryChange, Generation
from app.documents.identities import Identity
from app.documents.leases import Lease
from app.domain import publication
from app.errors import Conflict, GalleryTooLarge, NotReady
from app.leases import Held
from app.runtime import Runtime, open_runtime
from app.search import Limits
from app.use_cases import examine
from app.use_cases.publish import due, keep_promises, publish
from storage.generations import GenerationStore, GenerationStoreUnavailable
from storage.vectors import Hits
from tests.builders import active, another_process, default_gallery, enrolled, erased, identified, known, screened
from tests.fakes import CARD, DIMENSION, FakeEngine
from tests.support.population import alike, populate, strangers

THRESHOLD = 0.5
NOTHING = Hits(np.empty(0, np.int64), np.empty(0, np.float32))


@pytest.fixture
async def other(runtime: Runtime) -> AsyncIterator[Runtime]:
    async with another_process(runtime) as opened:
        yield opened


async def _published(runtime: Runtime, *, rebuild: bool = False) -> Generation:
    gallery = await default_gallery()
    return await publish(runtime, by_system("index.publish"), gallery.id, holder="test", rebuild=rebuild)


async def _in_use(runtime: Runtime, number: int | None) -> None:
    """Ask until the process has that generation in use."""
    async with asyncio.timeout(20):
        while True:
            gallery = await default_gallery()
            await runtime.search.warm(gallery)
            state = runtime.search.state(gallery.id)
            if state is not None and state.generation == number:
                return
            await asyncio.sleep(0.02)


async def _found(runtime: Runtime, probe: np.ndarray, threshold: float = THRESHOLD) -> dict[str, float]:
    hits = await runtime.search.range(await default_gallery(), probe, threshold)
    return {hit.identity_id: hit.score for hit in hits.items}


def _files(runtime: Runtime, gallery_id: str, number: int) -> list[Path]:
    return sorted(f for f in runtime.settings.vector_db_path.glob(f"{gallery_id}/*-{number}/*") if f.is_file())


def _copies(runtime: Runtime, gallery_id: str) -> list[str]:
    return [copy.name for copy in runtime.settings.index_cache_path.glob(f"{gallery_id}/*-*")]


async def test_a_published_gallery_answers_as_before_and_keeps_seeing_newcomers(
    runtime: Runtime, other: Runtime
) -> None:
    people = [await active(runtime, f"person-{i}") for i in range(6)]
    before = {i: (await identified(other, f"person-{i}")).candidates for i in range(6)}
    generation = await _published(runtime)
    assert (generation.kind, generation.count, generation.watermark) == ("exact", 6, 6)
    await _in_use(other, generation.number)
    assert {i: (await identified(other, f"person-{i}")).candidates for i in range(6)} == before
    late = await active(runtime, "late")
    assert [c.identity_id for c in (await identified(other, "late")).candidates] == [late.id]
    state = other.search.state((await default_gallery()).id)
    assert state is not None
    assert (state.vectors, state.tail, state.seen) == (7, 1, 7)
    await erased(runtime, people[0])
    assert (await identified(other, "person-0")).candidates == []
    assert other.search.size((await default_gallery()).id) == 6


async def test_a_late_process_starts_from_the_generation_and_the_tail(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        await active(runtime, f"person-{i}")
    generation = await _published(runtime)
    await active(runtime, "late")
    asked = []
    changes_of = search.changes_of

    def counted(*args: object, after: int, **rest: object) -> object:
        asked.append(after)
        return changes_of(*args, after=after, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "changes_of", counted)
    async with another_process(runtime) as late:
        assert len((await identified(late, "late")).candidates) == 1
        assert len((await identified(late, "person-1")).candidates) == 1
    assert asked == [generation.watermark]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Galleries count as large from 500 vectors on."""
    monkeypatch.setattr(publication, "EXACT_ROWS", 500)


@pytest.mark.usefixtures("large")
async def test_a_large_gallery_is_searched_through_codes_and_misses_nobody(runtime: Runtime, other: Runtime) -> None:
    gallery = await default_gallery()
    vectors = strangers(3000, DIMENSION, seed=1)
    people = await populate(runtime, gallery.id, vectors)
    probes = alike(vectors[::30], 0.55, seed=2)
    exact = [await _found(other, probe) for probe in probes]
    assert all(people[30 * i] in found for i, found in enumerate(exact))
    generation = await _published(runtime)
    assert (generation.kind, generation.count, generation.recall) == ("faiss", 3000, 1.0)
    assert generation.recall_bound >= 0.9995
    await _in_use(other, generation.number)
    assert [await _found(other, probe) for probe in probes] == exact  # the very same scores


@pytest.mark.usefixtures("large")
async def test_the_next_generation_carries_the_living_over_and_leaves_the_erased_behind(
    runtime: Runtime, other: Runtime
) -> None:
    gallery = await default_gallery()
    vectors = strangers(800, DIMENSION, seed=3)
    people = await populate(runtime, gallery.id, vectors)
    first = await _published(runtime)
    for i in (0, 17, 799):
        await erased(runtime, await known(people[i]))
    more = strangers(50, DIMENSION, seed=4)
    newcomers = await populate(runtime, gallery.id, more)
    second = await _published(runtime)
    assert second.number > first.number
    assert (second.count, second.watermark) == (847, 853)
    await _in_use(other, second.number)
    assert people[17] not in await _found(other, vectors[17])
    assert list(await _found(other, vectors[18], 0.99)) == [people[18]]
    assert list(await _found(other, more[49], 0.99)) == [newcomers[49]]
    rebuilt = await _published(runtime, rebuild=True)
    assert rebuilt.rotation != second.rotation
    await _in_use(other, rebuilt.number)
    assert rebuilt.count == 847
    assert list(await _found(other, vectors[18], 0.99)) == [people[18]]


async def test_files_with_an_erased_person_do_not_stay_for_a_rollback(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await active(runtime, "bob")
    first = await _published(runtime)
    second = await _published(runtime)
    gallery = await default_gallery()
    assert (gallery.published, gallery.previous) == (second, first)
    assert [n.number for n in runtime.search.store.listed(gallery.id)] == [first.number, second.number]
    await erased(runtime, ann)
    gallery = await default_gallery()
    assert gallery.purge_by is not None
    assert gallery.purge_by <= now() + timedelta(hours=runtime.settings.index_purge_hours)
    third = await _published(runtime)
    gallery = await default_gallery()
    assert (gallery.published, gallery.previous, gallery.purge_by) == (third, None, None)
    assert [n.number for n in runtime.search.store.listed(gallery.id)] == [third.number]
    await _in_use(runtime, third.number)
    async with asyncio.timeout(10):  # the former copy goes behind the scenes
        while _copies(runtime, gallery.id) != [f"{gallery.epoch}-{third.number}"]:
            await asyncio.sleep(0.02)


async def test_an_erasure_during_a_publication_keeps_a_deadline(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await active(runtime, "ann")
    await active(runtime, "bob")
    commit_files = runtime.search.store.commit_files
    loop = asyncio.get_running_loop()

    def erase_then_commit(*args: object) -> str:
        asyncio.run_coroutine_threadsafe(erased(runtime, ann), loop).result(10)
        return commit_files(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime.search.store, "commit_files", erase_then_commit)
    generation = await _published(runtime)
    gallery = await default_gallery()
    assert generation.count == 2
    assert gallery.purge_by is not None
    await _in_use(runtime, generation.number)
    assert (await identified(runtime, "ann")).candidates == []


async def test_h91_two_publishers_do_not_get_into_each_others_way(runtime: Runtime) -> None:
    gallery = await default_gallery()
    lease = await Held.acquire(gallery.publishing, "somebody", 30)
    assert lease is not None
    with pytest.raises(Conflict):
        await _published(runtime)
    await lease.release()
    assert (await _published(runtime)).count == 0


async def test_h91_a_publisher_whose_lease_was_taken_over_commits_nothing(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await active(runtime, "ann")
    gallery = await default_gallery()
    commit_files = runtime.search.store.commit_files
    loop = asyncio.get_running_loop()

    async def take_over() -> None:
        past = {"expires_at": now() - timedelta(seconds=1)}
        await Lease.get_pymongo_collection().update_one({"_id": gallery.publishing}, {"$set": past})
        assert await Held.acquire(gallery.publishing, "successor", 30) is not None

    def lose_then_commit(*args: object) -> str:
        asyncio.run_coroutine_threadsafe(take_over(), loop).result(10)
        return commit_files(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime.search.store, "commit_files", lose_then_commit)
    with pytest.raises(NotReady):
        await _published(runtime)
    assert (await default_gallery()).published is None


async def test_a_publication_into_another_epoch_is_given_up(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    await active(runtime, "ann")
    commit_files = runtime.search.store.commit_files
    loop = asyncio.get_running_loop()

    async def restore() -> None:
        await Gallery.get_pymongo_collection().update_one({}, {"$set": {"epoch": "another"}})

    def restore_then_commit(*args: object) -> str:
        asyncio.run_coroutine_threadsafe(restore(), loop).result(10)
        return commit_files(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime.search.store, "commit_files", restore_then_commit)
    with pytest.raises(NotReady):
        await _published(runtime)
    assert (await default_gallery()).published is None


async def test_a_publication_is_an_event(runtime: Runtime) -> None:
    generation = await _published(runtime)
    event = await AuditEvent.find_one({"action": "index.publish"})
    assert event is not None
    assert event.detail["generation"] == generation.number


@pytest.mark.usefixtures("large")
async def test_h88_h89_a_corrupt_generation_is_refused_told_of_and_replaced(runtime: Runtime) -> None:
    gallery = await default_gallery()
    vectors = strangers(700, DIMENSION, seed=5)
    people = await populate(runtime, gallery.id, vectors)
    first = await _published(runtime)
    await populate(runtime, gallery.id, strangers(10, DIMENSION, seed=6))
    second = await _published(runtime)
    shutil.rmtree(runtime.settings.index_cache_path, ignore_errors=True)
    for file in _files(runtime, gallery.id, second.number):
        if file.name != "MANIFEST.json":
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.chmod(0o600)
            file.write_bytes(data)
    async with another_process(runtime) as late:
        assert list(await _found(late, vectors[3], 0.99)) == [people[3]]
        state = late.search.state(gallery.id)
        assert state is not None
        assert (state.generation, state.vectors) == (first.number, 710)  # the last good one, and a longer tail
        told = await default_gallery()
        assert told.fault is not None
        assert told.fault.number == second.number
        assert [reason for _, reason in await due(late)] == ["fault"]
        (examined,) = await examine.heads()
        assert examined.trouble is not None
        third = await _published(late)
        assert (await default_gallery()).fault is None
        await _in_use(late, third.number)
        assert list(await _found(late, vectors[3], 0.99)) == [people[3]]
        assert await due(late) == []


async def test_with_no_good_generation_left_the_documents_are_read(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    generation = await _published(runtime)
    gallery = await default_gallery()
    shutil.rmtree(runtime.settings.vector_db_path / gallery.id)
    shutil.rmtree(runtime.settings.index_cache_path, ignore_errors=True)
    async with another_process(runtime) as late:
        assert [c.identity_id for c in (await identified(late, "ann")).candidates] == [ann.id]
        state = late.search.state(gallery.id)
        assert state is not None
        assert state.generation is None
    fault = (await default_gallery()).fault
    assert fault is not None
    assert fault.number == generation.number


async def test_verification_of_the_files_finds_a_changed_byte(runtime: Runtime) -> None:
    for i in range(3):
        await active(runtime, f"person-{i}")
    generation = await _published(runtime)
    gallery = await default_gallery()
    assert [finding.is_good for finding in await examine.verify(runtime)] == [True]
    victim = _files(runtime, gallery.id, generation.number)[-1]
    data = bytearray(victim.read_bytes())
    data[7] ^= 64
    victim.chmod(0o600)
    victim.write_bytes(data)
    assert [finding.is_good for finding in await examine.verify(runtime)] == [False]
    assert (await default_gallery()).fault is not None


async def test_a_gallery_beyond_the_memory_budget_is_refused_in_words(runtime: Runtime) -> None:
    gallery = await default_gallery()
    await populate(runtime, gallery.id, strangers(3000, DIMENSION, seed=7))
    runtime.search._limits = Limits(memory_mib=1, shadow_every=0)
    with pytest.raises(GalleryTooLarge, match="INDEX_MEMORY_MIB"):
        await _found(runtime, strangers(1, DIMENSION, seed=8)[0])


async def test_the_gallery_that_was_searched_longest_ago_makes_room(runtime: Runtime) -> None:
    galleries = [await default_gallery()]
    for name in ("second", "third"):
        galleries.append(await runtime.create_gallery(name, galleries[0].policy))
    for gallery in galleries:
        await populate(runtime, gallery.id, strangers(1500, DIMENSION, seed=9))
    runtime.search._limits = Limits(memory_mib=4, shadow_every=0)  # 1.6 MiB each
    for gallery in [*galleries, galleries[1]]:
        head = await Gallery.get(gallery.id)
        assert head is not None
        await runtime.search.warm(head)
    assert [runtime.search.state(g.id) is not None for g in galleries] == [False, True, True]


@pytest.mark.usefixtures("large")
async def test_a_live_search_that_misses_somebody_is_noticed(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = await default_gallery()
    vectors = strangers(700, DIMENSION, seed=10)
    await populate(runtime, gallery.id, vectors)
    runtime.search._limits = Limits(memory_mib=1000, shadow_every=2)
    missed = search.SHADOW_MISSED.labels(gallery.name)
    shadowed = search.SHADOWED.labels(gallery.name)
    before, repeated = missed._value.get(), shadowed._value.get()
    for _ in range(4):
        await _found(runtime, vectors[0])
    await asyncio.gather(*runtime.search._behind)
    assert (missed._value.get(), shadowed._value.get()) == (before, repeated + 2)
    copy = runtime.search._copies[gallery.id]
    monkeypatch.setattr(type(copy.index), "range", lambda *_: [NOTHING])
    for _ in range(2):
        await _found(runtime, vectors[0])
    await asyncio.gather(*runtime.search._behind)
    assert missed._value.get() > before


async def test_screening_meets_look_alikes_in_a_generation(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    generation = await _published(runtime)
    await _in_use(runtime, generation.number)
    newcomer = await screened(runtime, await enrolled(runtime, "ann", capture=1))
    assert newcomer.status == "suspected_duplicate"
    assert [c.identity_id for c in newcomer.screenings[0].candidates] == [ann.id]


def _on_share(runtime: Runtime, gallery_id: str) -> list[str]:
    return sorted(path.name for path in (runtime.settings.vector_db_path / gallery_id).iterdir())


def _full(*_: object) -> str:
    raise GenerationStoreUnavailable(errno.ENOSPC, "the disk is full")


async def test_a_publisher_killed_right_after_its_commit_leaves_no_files_of_the_erased(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await active(runtime, "ann")
    await active(runtime, "bob")
    await _published(runtime)
    await erased(runtime, ann)
    swept = 0
    drop = runtime.search.store.drop

    def dies_after_the_commit(*args: object) -> object:
        nonlocal swept
        swept += 1
        return drop(*args) if swept == 1 else _full()  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(runtime.search.store, "drop", dies_after_the_commit)
        with pytest.raises(GenerationStoreUnavailable):
            await _published(runtime)
    gallery = await default_gallery()
    assert gallery.published is not None
    assert len(_on_share(runtime, gallery.id)) == 2
    await keep_promises(runtime)
    assert _on_share(runtime, gallery.id) == [f"{gallery.epoch}-{gallery.published.number}"]


async def test_what_a_failed_publication_wrote_goes_with_the_next_sweep(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await active(runtime, "ann")
    gallery = await default_gallery()
    with monkeypatch.context() as patch:
        patch.setattr(runtime.search.store, "commit_files", _full)
        for _ in range(3):
            with pytest.raises(GenerationStoreUnavailable):
                await _published(runtime)
    assert len(_on_share(runtime, gallery.id)) == 1  # each try clears away what the one before it left
    await keep_promises(runtime)
    assert _on_share(runtime, gallery.id) == []


async def test_a_folder_whose_publisher_died_before_its_commit_goes(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await active(runtime, "ann")
    first = await _published(runtime)

    async def dies(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "transaction", dies)
        with pytest.raises(RuntimeError):
            await _published(runtime)
    gallery = await default_gallery()
    assert len(_on_share(runtime, gallery.id)) == 2
    await erased(runtime, ann)
    await keep_promises(runtime)
    assert _on_share(runtime, gallery.id) == [f"{gallery.epoch}-{first.number}"]


async def test_a_deadline_that_no_publication_meets_is_met_without_an_index(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    generation = await _published(runtime)
    await _in_use(runtime, generation.number)
    await erased(runtime, ann)
    gallery = await default_gallery()
    await keep_promises(runtime)
    assert _on_share(runtime, gallery.id) == [f"{gallery.epoch}-{generation.number}"]
    await Gallery.get_pymongo_collection().update_one({"_id": gallery.id}, {"$set": {"purge_by": now()}})
    await keep_promises(runtime)
    gallery = await default_gallery()
    assert (gallery.published, gallery.purge_by) == (None, None)
    assert _on_share(runtime, gallery.id) == []
    async with another_process(runtime) as late:
        assert [c.identity_id for c in (await identified(late, "bob")).candidates] == [bob.id]
    assert (await _published(runtime)).count == 1


async def test_copies_of_former_generations_do_not_stay_on_a_host(runtime: Runtime) -> None:
    """Neither those that only a publisher has read, nor those of a gallery that was let go of."""
    gallery = await default_gallery()
    for name in ("ann", "bob", "cid"):
        await active(runtime, name)
        await _published(runtime)
    assert len(_copies(runtime, gallery.id)) <= 1
    await runtime.search.warm(await default_gallery())
    runtime.search._copies.clear()
    await erased(runtime, (await Identity.find_all().to_list())[0])
    async with another_process(runtime) as publisher:
        publisher.search.store = GenerationStore(runtime.settings.vector_db_path, runtime.settings.storage_path)
        last = await publish(publisher, by_system("index.publish"), gallery.id, holder="elsewhere")
    async with runtime.search.kept_up(), asyncio.timeout(10):
        while _copies(runtime, gallery.id) != [f"{gallery.epoch}-{last.number}"]:
            await asyncio.sleep(0.02)


async def test_a_rebuilt_index_keeps_its_new_rotation_when_it_has_to_be_mended(runtime: Runtime) -> None:
    await active(runtime, "ann")
    await _published(runtime)
    rebuilt = await _published(runtime, rebuild=True)
    await (await default_gallery()).report(rebuilt.number, "bad")
    assert (await _published(runtime)).rotation == rebuilt.rotation != (await default_gallery()).epoch


async def test_h92_h95_a_hosts_own_trouble_is_not_told_as_the_generations_fault(
    runtime: Runtime, other: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await active(runtime, "ann")
    await _published(runtime)

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(search, "_opened", out_of_memory)
    assert [c.identity_id for c in (await identified(other, "ann")).candidates] == [ann.id]
    assert (await default_gallery()).fault is None


async def test_a_removal_that_cannot_be_read_stops_the_publication(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the erased person would be carried over, and never asked for again."""
    ann = await active(runtime, "ann")
    await _published(runtime)
    await erased(runtime, ann)
    monkeypatch.setattr(vectors_of, "HOLE_RETRIES", 2)
    await GalleryChange.get_pymongo_collection().delete_one({"kind": "remove"})
    with pytest.raises(NotReady):
        await _published(runtime)


async def test_one_gallerys_trouble_does_not_end_the_following_of_the_others(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await active(runtime, "ann")
    first = await _published(runtime)
    rounds = 0

    def refuses(*_: object) -> None:
        nonlocal rounds
        rounds += 1
        raise GenerationStoreUnavailable(errno.EACCES, "the cache is closed")

    monkeypatch.setattr(search, "KEEP_UP_SECONDS", 0.01)
    monkeypatch.setattr(search, "TIDY_SECONDS", 0.0)
    monkeypatch.setattr(runtime.search.store, "drop_copies", refuses)
    async with runtime.search.kept_up(), asyncio.timeout(10):
        while rounds < 3:
            await asyncio.sleep(0.01)
        await _in_use(runtime, first.number)


async def test_an_unused_gallery_that_follows_a_change_of_model_leaves_its_generation_behind(
    runtime: Runtime, settings: Settings
) -> None:
    await _published(runtime)
    newer = FakeEngine(replace(CARD, contract="sha256:newer"))
    async with open_runtime(settings, newer) as reopened:
        gallery = await default_gallery()
        assert (gallery.contract, gallery.published) == ("sha256:newer", None)
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
        ann = await active(reopened, "ann")
        assert (await _published(reopened)).count == 1
        assert [c.identity_id for c in (await identified(reopened, "ann")).candidates] == [ann.id]


async def test_a_recall_below_the_gallerys_target_is_told_as_trouble(runtime: Runtime) -> None:
    await active(runtime, "ann")
    await _published(runtime)
    (state,) = await examine.heads()
    assert (state.recall, state.trouble) == (1.0, None)
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"published.recall_bound": 0.9994}})
    (state,) = await examine.heads()
    assert state.trouble is not None
    assert "0.9995" in state.trouble
