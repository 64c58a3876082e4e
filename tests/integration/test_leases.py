"""Leases on a real mongod: one holder at a time, by the server's clock, and none that slept can commit."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from beanie import init_beanie
from pymongo import AsyncMongoClient
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

import app.leases
from app.config import Settings
from app.documents.leases import Lease
from app.leases import Held, LeaseLost, held, release_of

NAME = "publish:a-gallery"
#: Time enough for every step of a test on a busy machine.
LONG = 60.0
#: Over before the next step of a test.
SHORT = 0.2

Mongo = AsyncMongoClient[dict[str, Any]]


@pytest.fixture(autouse=True)
async def mongo(settings: Settings) -> AsyncIterator[Mongo]:
    """A database with nothing but leases."""
    client: Mongo = AsyncMongoClient(settings.mongodb_uri, timeoutMS=5000, tz_aware=True)
    await init_beanie(database=client[settings.mongodb_database], document_models=[Lease])
    yield client
    await client.close()


async def acquired(holder: str = "ann", ttl_seconds: float = LONG, name: str = NAME) -> Held:
    lease = await Held.acquire(name, holder, ttl_seconds)
    assert lease is not None
    return lease


async def standing(name: str = NAME) -> Lease:
    found = await Lease.get(name)
    assert found is not None
    return found


async def expired(lease: Held) -> None:
    """Wait until the lease has run out, by the server's clock."""
    async with asyncio.timeout(10):
        while await Lease.alive(lease.name):
            await asyncio.sleep(0.02)


@asynccontextmanager
async def transaction(mongo: Mongo) -> AsyncIterator[AsyncClientSession]:
    async with mongo.start_session() as session, await session.start_transaction():
        yield session


async def commit_under(lease: Held, mongo: Mongo, written: str) -> None:
    """What a publisher does at the end."""

    async def body(session: AsyncClientSession) -> None:
        await lease.require(session)
        await _work(mongo).insert_one({"_id": written}, session=session)

    async with mongo.start_session() as session:
        await session.with_transaction(body)


def _work(mongo: Mongo) -> Any:  # noqa: ANN401 - pymongo's own generics
    return Lease.get_pymongo_collection().database["work"]


async def test_of_twenty_contenders_one_wins() -> None:
    for fence in (1, 2, 3):
        contenders = [Held.acquire(NAME, f"contender-{number}", LONG) for number in range(20)]
        winners = [lease for lease in await asyncio.gather(*contenders) if lease is not None]
        assert [lease.fence for lease in winners] == [fence]
        assert (await standing()).holder == winners[0].holder
        await winners[0].release()


async def test_of_twenty_contenders_for_an_expired_lease_one_wins_with_a_higher_fence() -> None:
    first = await acquired(ttl_seconds=SHORT)
    await expired(first)
    contenders = [Held.acquire(NAME, f"contender-{number}", LONG) for number in range(20)]
    winners = [lease for lease in await asyncio.gather(*contenders) if lease is not None]
    assert [lease.fence for lease in winners] == [first.fence + 1]


async def test_a_lease_is_not_taken_while_it_is_alive_not_even_by_its_own_holder() -> None:
    await acquired("ann")
    assert await Held.acquire(NAME, "bob", LONG) is None
    assert await Held.acquire(NAME, "ann", LONG) is None
    assert (await acquired("bob", name="publish:another")).fence == 1, "another name is another lease"


async def test_a_released_lease_is_free_at_once_and_only_its_holder_can_release_it() -> None:
    ann = await acquired("ann")
    await ann.release()
    bob = await acquired("bob")
    assert bob.fence == ann.fence + 1
    await ann.release()
    assert await Held.acquire(NAME, "eve", LONG) is None, "a late release frees nobody else's"


async def test_a_parent_frees_the_lease_of_its_dead_child_and_nobody_elses() -> None:
    await acquired("child")
    assert not await release_of(NAME, "another-child")
    assert await Held.acquire(NAME, "next", LONG) is None
    assert await release_of(NAME, "child")
    assert not await release_of(NAME, "child")
    assert (await acquired("next")).fence == 2


async def test_renewing_prolongs_and_tells_when_the_lease_is_lost() -> None:
    ann = await acquired("ann", ttl_seconds=SHORT)
    ann.ttl_seconds = LONG
    assert await ann.renew()
    await asyncio.sleep(2 * SHORT)
    assert await Held.acquire(NAME, "bob", LONG) is None
    ann.ttl_seconds = SHORT
    assert await ann.renew()
    await expired(ann)
    assert await ann.renew(), "nobody took it meanwhile"
    await expired(ann)
    await acquired("bob")
    assert not await ann.renew()
    assert (await standing()).holder == "bob"


async def test_h91_a_holder_that_slept_while_another_took_over_cannot_commit(mongo: Mongo) -> None:
    ann = await acquired("ann", ttl_seconds=SHORT)
    await expired(ann)
    bob = await acquired("bob")
    with pytest.raises(LeaseLost, match="fence 1"):
        await commit_under(ann, mongo, "ann's")
    await commit_under(bob, mongo, "bob's")
    assert [row["_id"] async for row in _work(mongo).find()] == ["bob's"]


async def test_the_same_holders_old_fence_cannot_commit_either(mongo: Mongo) -> None:
    before = await acquired("ann", ttl_seconds=SHORT)
    await expired(before)
    after = await acquired("ann")
    with pytest.raises(LeaseLost):
        await commit_under(before, mongo, "before")
    await before.release()
    await commit_under(after, mongo, "after")


async def test_an_expired_lease_does_not_commit_though_nobody_took_it(mongo: Mongo) -> None:
    ann = await acquired("ann", ttl_seconds=SHORT)
    await expired(ann)
    with pytest.raises(LeaseLost):
        await commit_under(ann, mongo, "late")


async def test_an_acquisition_waits_for_a_commit_that_relies_on_the_lease(mongo: Mongo) -> None:
    """The lease expires in the middle of the holder's transaction: the successor comes after it, never beside it."""
    ann = await acquired("ann", ttl_seconds=1)
    async with transaction(mongo) as session:
        await ann.require(session)
        await _work(mongo).insert_one({"_id": "ann's"}, session=session)
        await expired(ann)
        waiting = asyncio.create_task(Held.acquire(NAME, "bob", LONG))
        await asyncio.sleep(3 * SHORT)
        assert not waiting.done()
        await session.commit_transaction()
    bob = await waiting
    assert bob is not None
    assert bob.fence == ann.fence + 1
    assert await _work(mongo).count_documents({}) == 1


async def test_an_acquisition_during_the_transaction_of_its_predecessor_makes_it_fail(mongo: Mongo) -> None:
    ann = await acquired("ann", ttl_seconds=SHORT)
    async with mongo.start_session() as session:
        await session.start_transaction()
        await _work(mongo).insert_one({"_id": "ann's"}, session=session)  # the transaction sees the world of now
        await expired(ann)
        await acquired("bob")
        with pytest.raises((LeaseLost, PyMongoError)):
            await ann.require(session)
        await session.abort_transaction()
    assert await _work(mongo).count_documents({}) == 0


@pytest.mark.parametrize("hours", [-24, 24])
async def test_a_holders_wrong_clock_does_not_matter(hours: int, monkeypatch: pytest.MonkeyPatch, mongo: Mongo) -> None:
    wrong = datetime.now(UTC) + timedelta(hours=hours)
    monkeypatch.setattr(app.leases, "now", lambda: wrong)
    monkeypatch.setattr("app.documents.base.now", lambda: wrong)
    monkeypatch.setattr(time, "time", wrong.timestamp)
    ann = await acquired("ann")
    server = (await mongo.admin.command("hello"))["localTime"].replace(tzinfo=UTC)
    assert abs((await standing()).expires_at - server - timedelta(seconds=LONG)) < timedelta(seconds=10)
    ann.report("building", 1, 2)
    assert await ann.renew()
    assert await Held.acquire(NAME, "bob", LONG) is None
    await commit_under(ann, mongo, "ann's")
    ann.ttl_seconds = SHORT
    await ann.renew()
    await expired(ann)
    assert await Held.acquire(NAME, "bob", LONG) is not None


async def test_names_that_look_like_expressions_are_names() -> None:
    ann = await acquired("$fence")
    ann.report("$$NOW", 1, 2)
    assert await ann.renew()
    found = await standing()
    assert found.holder == "$fence"
    assert found.progress is not None
    assert found.progress.stage == "$$NOW"


# --- held, for as long as a body runs --------------------------------------------------------------------------------


async def test_a_lease_is_held_beyond_its_time_for_as_long_as_the_body_runs() -> None:
    async with held(NAME, "ann", 0.6) as lease:
        assert lease is not None
        for _ in range(8):
            await asyncio.sleep(0.2)
            assert await Held.acquire(NAME, "bob", LONG) is None
    assert await Held.acquire(NAME, "bob", LONG) is not None, "and given back at once"


async def test_the_second_holder_is_told_that_there_is_a_first() -> None:
    async with held(NAME, "ann") as first, held(NAME, "bob") as second:
        assert first is not None
        assert second is None
    assert await Lease.alive(NAME) == []


async def test_progress_is_seen_within_a_second_or_so_and_gone_at_the_end() -> None:
    async with held(NAME, "ann") as lease:
        assert lease is not None
        await asyncio.to_thread(lease.report, "building", 10, 100)
        first = lease.progress
        lease.report("building", 20, 100)
        async with asyncio.timeout(5):
            while not (seen := (await standing()).progress):
                await asyncio.sleep(0.05)
        assert first is not None
        assert (seen.stage, seen.done, seen.total, seen.started_at) == ("building", 20, 100, first.started_at)
        (alive,) = await Lease.alive(NAME, "publish:another")
        assert alive.progress == seen
        lease.report("writing", 0, 1)
        assert lease.progress is not None
        assert lease.progress.started_at >= seen.started_at
    assert (await standing()).progress is None


async def test_much_progress_is_few_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    renewals = 0
    renew = Held.renew

    async def counted(self: Held) -> bool:
        nonlocal renewals
        renewals += 1
        return await renew(self)

    monkeypatch.setattr(Held, "renew", counted)
    async with held(NAME, "ann") as lease:
        assert lease is not None
        for done in range(250):
            lease.report("building", done, 250)
            await asyncio.sleep(0.01)
    assert 1 <= renewals <= 3


async def test_the_body_is_cancelled_when_the_lease_is_lost() -> None:
    reached_the_end = False
    with pytest.raises(LeaseLost):
        async with held(NAME, "ann", 0.6) as lease:
            assert lease is not None
            await release_of(NAME, "ann")
            await acquired("bob")
            await asyncio.sleep(20)
            reached_the_end = True
    assert not reached_the_end
    assert (await standing()).holder == "bob"
    await asyncio.sleep(0)  # the task itself goes on uncancelled
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_the_body_is_cancelled_when_the_lease_cannot_be_renewed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(self: Held) -> bool:
        raise PyMongoError

    monkeypatch.setattr(Held, "renew", away)
    started = time.monotonic()
    with pytest.raises(LeaseLost):
        async with held(NAME, "ann", 0.6):
            await asyncio.sleep(20)
    assert 0.6 <= time.monotonic() - started < 5


async def test_a_store_that_is_away_for_a_moment_loses_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    renew, failures = Held.renew, iter([True, True])

    async def flaky(self: Held) -> bool:
        if next(failures, False):
            raise PyMongoError
        return await renew(self)

    monkeypatch.setattr(Held, "renew", flaky)
    async with held(NAME, "ann", 1.5) as lease:
        await asyncio.sleep(2.5)
        assert lease is not None
        assert await Held.acquire(NAME, "bob", LONG) is None


async def test_a_renewal_on_its_way_when_the_body_ends_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    renewals = 0

    async def slow(self: Held) -> bool:
        nonlocal renewals
        renewals += 1
        try:
            await asyncio.sleep(0.3)
        except asyncio.CancelledError as error:  # as the driver does at times
            raise PyMongoError from error
        return True

    monkeypatch.setattr(Held, "renew", slow)
    async with asyncio.timeout(10):
        async with held(NAME, "ann", 0.3):
            while not renewals:
                await asyncio.sleep(0.01)
    assert renewals == 1
    assert await Held.acquire(NAME, "bob", LONG) is not None


async def test_a_lost_lease_is_told_even_when_the_cancellation_came_out_as_an_error_of_the_store() -> None:
    with pytest.raises(LeaseLost):
        async with held(NAME, "ann", 0.6):
            await release_of(NAME, "ann")
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError as error:
                raise PyMongoError from error


@pytest.mark.parametrize("problem", [ValueError, TimeoutError, asyncio.CancelledError])
async def test_what_the_body_raises_comes_out_and_the_lease_is_given_back(problem: type[BaseException]) -> None:
    with pytest.raises(problem):
        async with held(NAME, "ann"):
            raise problem
    assert await Held.acquire(NAME, "bob", LONG) is not None
