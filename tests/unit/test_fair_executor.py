"""Long work is shared fairly: whoever used the threads least is served next."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest

from app.fair_executor import FairExecutor, TooMuchWaits


class _Crowded(Exception):
    """The work would wait."""


@pytest.fixture
async def one_thread() -> AsyncIterator[FairExecutor]:
    executor = FairExecutor(1, 1000, crowded=_Crowded)
    yield executor
    executor.shutdown()


async def test_a_caller_with_a_hundred_jobs_holds_up_another_ones_job_by_one(one_thread: FairExecutor) -> None:
    done: list[str] = []

    async def job(caller: str, seconds: float) -> None:
        await one_thread.run(caller, lambda: time.sleep(seconds))
        done.append(caller)

    flood = [asyncio.create_task(job("flood", 0.005)) for _ in range(100)]
    await asyncio.sleep(0.05)
    before = len(done)
    await job("other", 0.001)
    assert done.index("other") - before <= 2
    await asyncio.gather(*flood)


async def test_a_costly_job_counts_for_what_it_cost(one_thread: FairExecutor) -> None:
    """Ten photos of 25 megapixels against a hundred small ones: the small ones come first, after one large one."""
    done: list[str] = []

    async def job(caller: str, seconds: float) -> None:
        await one_thread.run(caller, lambda: time.sleep(seconds))
        done.append(caller)

    costly = [asyncio.create_task(job("costly", 0.1)) for _ in range(4)]
    cheap = [asyncio.create_task(job("cheap", 0.001)) for _ in range(30)]
    await asyncio.gather(*costly, *cheap)
    assert done.count("cheap") == 30
    assert done[:31].count("costly") <= 2, done


async def test_nobody_saves_up_time_by_staying_idle(one_thread: FairExecutor) -> None:
    async def job(caller: str) -> None:
        await one_thread.run(caller, lambda: time.sleep(0.002))

    busy = [asyncio.create_task(job("busy")) for _ in range(60)]
    await asyncio.sleep(0.06)
    done: list[str] = []

    async def late() -> None:
        await job("late")
        done.append("late")

    async def early(task: "asyncio.Task[None]") -> None:
        await task
        done.append("busy")

    left = [task for task in busy if not task.done()]
    await asyncio.gather(*(late() for _ in range(10)), *(early(task) for task in left))
    first = done[:10]
    assert 3 <= first.count("late") <= 7, "they take turns"


async def test_when_the_lines_are_full_the_longest_one_gives_way() -> None:
    executor, gate = FairExecutor(1, 4), threading.Event()
    try:
        running = asyncio.create_task(executor.run("flood", gate.wait))
        await asyncio.sleep(0.01)
        flood = [asyncio.create_task(executor.run("flood", lambda: None)) for _ in range(4)]
        await asyncio.sleep(0.01)
        with pytest.raises(TooMuchWaits):
            await executor.run("flood", lambda: None)
        other = asyncio.create_task(executor.run("other", lambda: "done"))
        await asyncio.sleep(0.01)
        assert isinstance(flood[-1].exception(), TooMuchWaits), "the newest of the longest line"
        gate.set()
        assert await other == "done"
        await asyncio.gather(running, *flood[:-1])
        assert executor.waiting == 0
    finally:
        gate.set()
        executor.shutdown()


async def test_a_caller_who_left_is_forgotten(one_thread: FairExecutor) -> None:
    gate, begun = threading.Event(), []
    running = asyncio.create_task(one_thread.run("a", gate.wait))
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(one_thread.run("b", lambda: begun.append("b")))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert one_thread.waiting == 0
    gate.set()
    await running
    assert begun == []


async def test_errors_are_the_callers_and_the_thread_serves_on(one_thread: FairExecutor) -> None:
    def broken() -> None:
        raise KeyError("x")

    for _ in range(3):
        with pytest.raises(KeyError):
            await one_thread.run("a", broken)
    assert await one_thread.run("a", lambda: 1) == 1


async def test_work_that_would_wait_gives_its_thread_to_others_and_starts_again() -> None:
    executor, lock, seen = FairExecutor(2, 100, crowded=_Crowded), threading.Lock(), []
    gate = threading.Event()

    def large(name: str) -> str:
        if not lock.acquire(blocking=False):
            raise _Crowded
        try:
            seen.append(name)
            gate.wait(5)
        finally:
            lock.release()
        return name

    try:
        first = asyncio.create_task(executor.run("a", lambda: large("first")))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(executor.run("a", lambda: large("second")))
        await asyncio.sleep(0.02)
        assert await asyncio.wait_for(executor.run("b", lambda: "small"), 1) == "small"
        assert seen == ["first"]
        gate.set()
        assert await asyncio.gather(first, second) == ["first", "second"]
        assert seen == ["first", "second"]
    finally:
        gate.set()
        executor.shutdown()


async def test_accounts_of_those_who_left_do_not_pile_up(one_thread: FairExecutor) -> None:
    gate = threading.Event()
    running = asyncio.create_task(one_thread.run("stays", gate.wait))
    await asyncio.sleep(0.01)
    for number in range(1500):
        task = asyncio.create_task(one_thread.run(f"caller-{number}", lambda: None))
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0.01)
    assert len(one_thread._used) <= 1002
    gate.set()
    await running
