"""Background jobs on a real Redis: tries that count and tries that do not, a lost queue, the sweeps."""

import asyncio
import os
import pickle
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from arq import Retry, func
from arq.worker import Worker

from app.config import Settings
from app.documents.base import new_id, now
from app.documents.events import AuditEvent
from app.documents.identities import Identity
from app.documents.stores import EnrolmentBegun
from app.domain.policy import Status
from app.errors import Conflict
from app.queue import SCREEN, decode_job, encode_job, redis_settings
from app.runtime import Runtime, open_runtime
from app.use_cases import galleries, screen
from tests.builders import (
    active,
    another_process,
    by_officer,
    default_gallery,
    enrolled,
    erased,
    known,
    suspected,
)
from tests.fakes import FakeEngine
from tests.support import services
from workers import jobs

TRIES = 5

# arq closes its connections by a method that redis deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated close:DeprecationWarning")


@pytest.fixture
async def queued(settings: Settings, redis_server: services.Server, database_name: str) -> AsyncIterator[Runtime]:
    """A Runtime with a queue of its own."""
    given = settings.model_copy(update={"redis_url": redis_server.url, "queue_name": database_name})
    async with open_runtime(given, FakeEngine()) as runtime:
        policy = (await default_gallery()).policy.model_copy(update={"quality": "off"})
        await galleries.update(runtime, by_officer("gallery.update"), await default_gallery(), policy, ())
        yield runtime


async def _work(runtime: Runtime) -> None:
    """Let a worker do all that is in the queue."""
    worker = Worker(
        functions=[func(jobs.screen, name=SCREEN, keep_result=0)],
        queue_name=runtime.queue.name,
        redis_settings=redis_settings(runtime.settings),
        job_serializer=encode_job,
        job_deserializer=decode_job,
        ctx={"runtime": runtime},
        burst=True,
        poll_delay=0.02,
        handle_signals=False,
    )
    await worker.async_run()
    await worker.close()


async def _status(identity: Identity) -> Status:
    return (await known(identity)).status


async def _overdue(identity: Identity) -> None:
    """As if its verdict had been due some time ago."""
    earlier = now() - timedelta(minutes=1)
    await Identity.get_pymongo_collection().update_one({"_id": identity.id}, {"$set": {"outbox_at": earlier}})


async def test_an_enrolment_reaches_its_verdict_through_the_queue(queued: Runtime) -> None:
    ann, again = await enrolled(queued, "ann"), await enrolled(queued, "ann", capture=1)
    assert await queued.queue.depth() == 2
    await _work(queued)
    assert [await _status(i) for i in (ann, again)] == ["active", "suspected_duplicate"]


async def test_stores_that_share_a_redis_do_not_take_each_others_jobs(
    queued: Runtime, tmp_path: Path, database_name: str
) -> None:
    folders = {
        name: tmp_path / name for name in ("storage_path", "vector_db_path", "index_cache_path", "evidence_path")
    }
    name = database_name.replace("test", "two")
    drill_settings = queued.settings.model_copy(update={"mongodb_database": name, **folders})
    ann = await enrolled(queued, "ann")
    try:
        async with open_runtime(drill_settings, FakeEngine()) as drill:
            # A copied database has the same ids.
            assert await drill.queue.enqueue_screening(ann.id, ann.screenings[0].job_id)
            assert (await queued.queue.depth(), await drill.queue.depth()) == (1, 1)
            await _work(drill)
            assert (await queued.queue.depth(), await drill.queue.depth()) == (1, 0)
    finally:
        await queued.mongo.drop_database(name)


async def test_h87_job_arguments_are_ids_in_json(queued: Runtime, redis_server: services.Server) -> None:
    ann = await enrolled(queued, "ann")
    with redis.Redis.from_url(redis_server.url) as store:
        (job,) = [store.get(key) for key in store.scan_iter(f"arq:job:*{ann.screenings[0].job_id}*")]
    assert isinstance(job, bytes)
    assert decode_job(job)["a"] == [ann.id, ann.screenings[0].job_id]


async def test_h87_a_pickle_in_the_queue_is_not_loaded_and_the_jobs_behind_it_run(
    queued: Runtime, redis_server: services.Server, tmp_path: Path
) -> None:
    trace = tmp_path / "was-run"

    class _Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (trace,)

    ann = await enrolled(queued, "ann")
    with redis.Redis.from_url(redis_server.url) as store:
        (key,) = store.scan_iter(f"arq:job:*{ann.screenings[0].job_id}*")
        job = {"t": 1, "f": SCREEN, "a": (_Evil(),), "k": {}, "et": int(time.time() * 1000)}
        store.set(key, pickle.dumps(job), keepttl=True)
    bob = await enrolled(queued, "bob")
    await _work(queued)
    assert not trace.exists()
    assert await _status(bob) == "active"
    pickle.loads(pickle.dumps(_Evil()))  # noqa: S301 - that it would have been run
    assert trace.exists()
    await _overdue(ann)
    await screen.sweep_overdue(queued)
    await _work(queued)
    assert await _status(ann) == "active", "the sweep asks for what was lost to it"


async def test_h83_what_a_flushed_queue_forgot_is_queued_again_within_a_minute(
    queued: Runtime, redis_server: services.Server
) -> None:
    """After the queue's grace, at the sweep's next round, and every ten seconds from then on, should Redis forget it again."""
    ann = await enrolled(queued, "ann")
    for forgotten in range(2):
        with redis.Redis.from_url(redis_server.url) as store:
            store.flushdb()
        due = (await known(ann)).outbox_at
        assert due is not None
        waits = due - now() + timedelta(seconds=queued.settings.sweep_interval_seconds)
        assert waits < timedelta(seconds=60), forgotten
        await _overdue(ann)
        assert await screen.sweep_overdue(queued) == 1
    await _work(queued)
    assert await _status(ann) == "active"


async def test_h82_h83_with_redis_away_enrolment_returns_and_the_sweep_brings_the_verdict(
    queued: Runtime, redis_server: services.Server
) -> None:
    with redis_server.process.frozen():
        started = time.monotonic()
        ann = await enrolled(queued, "ann")
        bob = await enrolled(queued, "bob")
        assert time.monotonic() - started < 2
        assert (ann.status, bob.status) == ("pending", "pending")
    with redis.Redis.from_url(redis_server.url) as store:
        store.flushdb()
    assert await screen.sweep_overdue(queued) == 0, "a queue has some seconds to bring the verdict"
    for waiting in (ann, bob):
        await _overdue(waiting)
    async with another_process(queued) as other:  # its queue has not met a dead Redis
        assert await screen.sweep_overdue(other) == 2
        assert await screen.sweep_overdue(other) == 0, "it was queued a moment ago"
    await _work(queued)
    assert [await _status(i) for i in (ann, bob)] == ["active", "active"]
    for waiting in (ann, bob):
        assert (await known(waiting)).outbox_at is None


async def test_h84_the_sweep_queues_what_is_overdue_once_more_even_beside_a_dead_workers_job(queued: Runtime) -> None:
    ann = await enrolled(queued, "ann")
    await _overdue(ann)
    await screen.sweep_overdue(queued)
    assert await queued.queue.depth() == 2
    await _work(queued)
    assert await _status(ann) == "active"
    assert await AuditEvent.find({"action": "dedup.verdict"}).count() == 1


async def _break(identity: Identity) -> dict[str, object]:
    """Change one byte of a stored template, so that no search can read the gallery; returns what repairs it."""
    (sample,) = identity.samples
    broken = sample.template[:-1] + bytes([sample.template[-1] ^ 1])
    await Identity.get_pymongo_collection().update_one({"_id": identity.id}, {"$set": {"samples.0.template": broken}})
    return {"samples.0.template": sample.template}


async def _try(runtime: Runtime, identity: Identity) -> bool:
    """Run the newest screening as a worker does; whether it asks to be run again."""
    try:
        await jobs.screen(jobs.Context(runtime=runtime), identity.id, identity.screenings[-1].job_id)
    except Retry:
        return True
    return False


async def test_h86_a_screening_that_fails_five_times_is_given_up_and_can_be_asked_for_again(runtime: Runtime) -> None:
    bob = await enrolled(runtime, "bob")
    repair = await _break(bob)
    ann = await enrolled(runtime, "ann")
    for tries in range(1, TRIES):
        assert await _try(runtime, ann)
        now_known = await known(ann)
        assert (now_known.status, now_known.screenings[0].tries) == ("pending", tries)
    assert not await _try(runtime, ann)
    failed = await known(ann)
    assert (failed.status, failed.screenings[0].state, failed.outbox_at) == ("failed", "failed", None)
    (event,) = await AuditEvent.find({"action": "dedup.verdict"}).to_list()
    assert (event.outcome, event.subject.id, event.detail["reason"]) == ("failure", ann.id, "SealBroken")
    assert not await _try(runtime, ann), "nothing is left to do"

    await Identity.get_pymongo_collection().update_one({"_id": bob.id}, {"$set": repair})
    again = await screen.screen_again(runtime, by_officer("identity.screen"), await default_gallery(), ann.id)
    assert (again.status, again.screenings[0].state, again.screenings[0].tries) == ("pending", "queued", 0)
    assert again.outbox_at is not None
    assert not await _try(runtime, again)
    assert await _status(ann) == "active"


async def test_a_failed_identity_is_a_look_alike_for_newcomers(runtime: Runtime) -> None:
    ann = await enrolled(runtime, "ann")
    await Identity.get_pymongo_collection().update_one({"_id": ann.id}, {"$set": {"status": "failed"}})
    _, case = await suspected(runtime, "ann")
    assert [c.identity_id for c in case.candidates] == [ann.id]


async def test_a_verdict_cannot_be_asked_for_twice(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    held, _ = await suspected(runtime, "ann")
    gallery = await default_gallery()
    for settled in (ann, held):
        with pytest.raises(Conflict):
            await screen.screen_again(runtime, by_officer("identity.screen"), gallery, settled.id)
    assert await known(held) == held


async def test_h86_a_try_that_an_absent_store_ended_does_not_count(
    runtime: Runtime, mongo_server: services.Server
) -> None:
    ann = await enrolled(runtime, "ann")
    with mongo_server.process.frozen():
        assert await _try(runtime, ann)
    assert (await known(ann)).screenings[0].tries == 0
    assert not await _try(runtime, ann)
    assert await _status(ann) == "active"


async def test_a_store_that_refuses_for_good_counts_as_a_failure(runtime: Runtime) -> None:
    """It is not away: waiting for it would never end."""
    ann = await enrolled(runtime, "ann")
    database = runtime.mongo[runtime.settings.mongodb_database]
    await database.command("collMod", "audit_events", validator={"detail.verdict": {"$exists": False}})
    for _ in range(TRIES - 1):
        assert await _try(runtime, ann)
    assert not await _try(runtime, ann)
    assert await _status(ann) == "failed"


async def test_h78_photos_that_no_document_names_are_swept_after_a_day(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    kept, nobody = ann.samples[0].photo_key, new_id()
    await EnrolmentBegun.note(nobody, ann.gallery_id)  # by a process that died before the document
    old = [f"{ann.gallery_id}/{ann.id}/{new_id()}", f"{ann.gallery_id}/{nobody}/{new_id()}"]
    new = f"{ann.gallery_id}/{ann.id}/{new_id()}"
    for key in (*old, new):
        await runtime.photos.put(key, b"x")
    long_ago = time.time() - 25 * 3600
    for key in (kept, *old):
        os.utime(Path(runtime.settings.storage_path) / key, (long_ago, long_ago))
    await jobs.sweep_orphan_photos(jobs.Context(runtime=runtime))
    assert {photo.key async for photo in runtime.photos.list()} == {kept, new}


async def test_screening_and_erasing_many_at_once_through_two_workers_ends_settled(queued: Runtime) -> None:
    """Twelve people enrol twice in one moment, a third of them are erased meanwhile: nobody is left without a verdict."""
    async with another_process(queued) as other:
        doors = [queued, other]
        people = await asyncio.gather(*(enrolled(doors[i % 2], f"person-{i // 2}", capture=i % 2) for i in range(24)))
        await asyncio.gather(_work(queued), _work(other), *(erased(other, p) for p in people[::6]))
        await asyncio.gather(_work(queued), _work(other))
    for first, second in zip(people[::2], people[1::2], strict=True):
        left = [i for i in (await Identity.living(first.id), await Identity.living(second.id)) if i is not None]
        statuses = sorted(i.status for i in left)
        assert statuses in (["active"], ["active", "suspected_duplicate"]), statuses
