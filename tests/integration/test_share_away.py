"""The index's shared folder behind its boundary: it hangs, for ever if need be, and only what needs it waits."""

import asyncio
import functools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import pytest

from app.audit import by_system
from app.config import Settings
from app.documents.base import now
from app.documents.galleries import Gallery, Generation
from app.runtime import Runtime, open_runtime
from app.share import THREADS
from app.use_cases.publish import SEEN_EVERYWHERE, due, keep_promises, publish
from storage.generations import GenerationStore, GenerationStoreUnavailable
from tests.builders import active, another_process, default_gallery, identified
from tests.fakes import FakeEngine
from tests.support.fault_plans import FaultPlan
from workers import jobs

T = TypeVar("T")


class _ShareServer:
    """Of an NFS: while it is away, whoever asks for something on the share waits, for ever if need be."""

    ASKED = (
        "stage", "commit_files", "fetch", "verify", "galleries", "listed", "drop", "has_others", "drop_gallery", "disk_use",
    )  # fmt: skip

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.is_there = threading.Event()
        self.is_there.set()
        self.waiting = 0
        for name in self.ASKED:
            patch.setattr(GenerationStore, name, self._asked(getattr(GenerationStore, name)))

    def _asked(self, work: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(work)
        def waits(*args: object, **kwargs: object) -> T:
            self.waiting += 1
            assert self.is_there.wait(60)
            self.waiting -= 1
            return work(*args, **kwargs)

        return waits


async def _published(runtime: Runtime) -> Generation:
    return await publish(runtime, by_system("index.publish"), (await default_gallery()).id, holder="test")


async def _opened(runtime: Runtime, number: int) -> None:
    """Ask until the process has that generation in use."""
    async with asyncio.timeout(20):
        while True:
            gallery = await default_gallery()
            await runtime.search.warm(gallery)
            state = runtime.search.state(gallery.id)
            if state is not None and state.generation == number:
                return
            await asyncio.sleep(0.02)


@pytest.fixture
def share_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_ShareServer]:
    server = _ShareServer(monkeypatch)
    yield server
    server.is_there.set()


@pytest.fixture
async def hasty(settings: Settings, share_server: _ShareServer) -> AsyncIterator[Runtime]:
    """A process that is sooner done with the share than others, with a published gallery."""
    limits = {"share_timeout_seconds": 0.5, "boundary_pause_seconds": 0.1}
    async with open_runtime(settings.model_copy(update=limits), FakeEngine()) as runtime:
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
        await active(runtime, "ann")
        number = (await _published(runtime)).number
        await _opened(runtime, number)
        yield runtime


async def _sweep_as_a_worker_does(runtime: Runtime) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            await jobs.sweep_index({"runtime": runtime})


async def test_h92_a_share_that_hangs_starves_nobody_and_is_used_again_when_it_is_back(
    hasty: Runtime, share_server: _ShareServer
) -> None:
    ann = (await identified(hasty, "ann")).candidates[0].identity_id
    published = (await default_gallery()).published
    assert published is not None
    share_server.is_there.clear()
    for _ in range(3):
        await asyncio.gather(*(_sweep_as_a_worker_does(hasty) for _ in range(20)))
    assert share_server.waiting <= THREADS, "sweeps do not pile up"
    assert hasty.boundaries.share.state != "closed"
    assert not await hasty.search.shares(await default_gallery())
    async with asyncio.timeout(2):
        assert await asyncio.get_running_loop().getaddrinfo("localhost", 1), "the process's own threads are free"
    bob = await active(hasty, "bob")
    async with another_process(hasty) as late:  # it opens the copy that this host has
        for name, id_ in (("ann", ann), ("bob", bob.id)):
            for runtime in (hasty, late):
                assert [c.identity_id for c in (await identified(runtime, name)).candidates] == [id_]
        state = late.search.state((await default_gallery()).id)
        assert state is not None
        assert state.generation == published.number
    began = time.monotonic()
    with pytest.raises(GenerationStoreUnavailable):
        await _published(hasty)
    assert time.monotonic() - began < 3
    assert (await default_gallery()).published == published
    share_server.is_there.set()
    async with asyncio.timeout(10):
        while not await hasty.search.shares(await default_gallery()):
            await asyncio.sleep(0.05)
    assert hasty.boundaries.share.state == "closed"
    await keep_promises(hasty)
    assert (await _published(hasty)).count == 2


async def test_h92_while_the_share_hangs_a_host_without_a_copy_reads_the_documents(
    hasty: Runtime, share_server: _ShareServer
) -> None:
    share_server.is_there.clear()
    shutil.rmtree(hasty.settings.index_cache_path)
    async with another_process(hasty) as late:
        assert len((await identified(late, "ann")).candidates) == 1
        state = late.search.state((await default_gallery()).id)
        assert state is not None
        assert state.generation is None


async def test_h92_the_deadline_of_an_erasure_is_met_though_the_share_hangs(
    hasty: Runtime, share_server: _ShareServer
) -> None:
    share_server.is_there.clear()
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"purge_by": now()}})
    with pytest.raises(GenerationStoreUnavailable):
        await keep_promises(hasty)
    assert (await default_gallery()).published is None
    share_server.is_there.set()
    async with asyncio.timeout(10):
        while any(hasty.settings.vector_db_path.glob("*/*")):
            with suppress(GenerationStoreUnavailable):
                await keep_promises(hasty)
            await asyncio.sleep(0.05)


async def test_h92_h98_a_process_leaves_on_sigterm_though_the_share_hangs(hasty: Runtime) -> None:
    settings = hasty.settings
    program = """
import asyncio, signal, threading
from app.config import Settings
from app.runtime import open_runtime
from storage.generations import GenerationStore
from tests.fakes import FakeEngine
from workers import jobs

GenerationStore.galleries = GenerationStore.listed = lambda *_: threading.Event().wait()

async def main():
    asked_to_leave = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked_to_leave.set)
    async with open_runtime(Settings(), FakeEngine(), keep_up=True) as runtime:
        for _ in range(3):
            await jobs.sweep_index({"runtime": runtime})
        print("swept", flush=True)
        await asked_to_leave.wait()

asyncio.run(main())
"""
    environment = {
        "MONGODB_URI": settings.mongodb_uri, "MONGODB_DATABASE": settings.mongodb_database, "REDIS_URL": settings.redis_url,
        "KEY_ENCRYPTION_KEY": settings.key_encryption_secret(), "SHARE_TIMEOUT_SECONDS": "0.2",
        "STORAGE_PATH": str(settings.storage_path), "VECTOR_DB_PATH": str(settings.vector_db_path),
        "INDEX_CACHE_PATH": str(settings.index_cache_path), "EVIDENCE_PATH": str(settings.evidence_path),
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, env=os.environ | environment, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            while (line := await process.stdout.readline()) != b"swept\n":
                assert line, "it died"
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(settings.shutdown_grace_seconds):
            assert await process.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the lost answer was an open file
async def test_whatever_the_share_does_to_a_publication_the_index_is_right_afterwards(hasty: Runtime) -> None:
    met: set[str] = set()
    bob = await active(hasty, "bob")
    for seed in range(30):
        plan = FaultPlan(seed)
        # MongoDB is no part of this.
        with plan.at(replace(hasty.boundaries, mongo=hasty.boundaries.evidence)), plan.armed("publication"):
            with suppress(GenerationStoreUnavailable):
                await _published(hasty)
            with suppress(GenerationStoreUnavailable):
                await keep_promises(hasty)
        met |= set(plan.seen)
        assert [c.identity_id for c in (await identified(hasty, "bob")).candidates] == [bob.id], seed
    assert {"share error", "share cut", "share delay"} <= met
    await asyncio.sleep(hasty.settings.boundary_pause_seconds)
    await _published(hasty)
    await keep_promises(hasty)
    head = await default_gallery()
    on_share = {path.name for path in hasty.settings.vector_db_path.glob("*/*")}
    assert on_share == {f"{epoch}-{number}" for epoch, number in head.files}


async def _removed_and_made_anew(runtime: Runtime, remove: Callable[[], None]) -> bool:
    """Whether the worker's sweep notices that files were removed, and a publication writes them again."""
    remove()
    await keep_promises(runtime)
    if not await due(runtime):
        return False
    await _published(runtime)
    return await runtime.search.shares(await default_gallery())


async def test_a_removed_index_folder_is_written_again(runtime: Runtime) -> None:
    await active(runtime, "ann")
    await _published(runtime)
    assert await _removed_and_made_anew(runtime, lambda: shutil.rmtree(runtime.settings.vector_db_path))
    assert (await identified(runtime, "ann")).candidates


async def test_removed_files_of_a_marked_index_folder_are_written_again(runtime: Runtime) -> None:
    await active(runtime, "ann")
    generation = await _published(runtime)
    gallery = await default_gallery()

    def remove() -> None:
        shutil.rmtree(runtime.settings.vector_db_path / gallery.id)

    assert not await _removed_and_made_anew(runtime, remove), "a host may see a new file late"
    earlier = {"$set": {"published.built_at": generation.built_at - 2 * SEEN_EVERYWHERE}}
    await Gallery.get_pymongo_collection().update_one({"_id": gallery.id}, earlier)
    assert await _removed_and_made_anew(runtime, lambda: None)


async def test_an_empty_folder_without_the_mark_may_be_a_share_that_is_not_mounted(runtime: Runtime) -> None:
    await active(runtime, "ann")
    await _published(runtime)
    folder = runtime.settings.vector_db_path

    def unmount() -> None:
        shutil.rmtree(folder)
        folder.mkdir()

    assert not await _removed_and_made_anew(runtime, unmount)
    assert list(folder.iterdir()) == []
    assert (await identified(runtime, "ann")).candidates
