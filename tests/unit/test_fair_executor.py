"""Callers share the threads fairly: the caller who has used them least is served next."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest

from app.fair_executor import FairExecutor, TooMuchWaits

#: Far longer than anything takes here.
WITHIN_SECONDS = 10.0


class _Crowded(Exception):
    """The work would have to wait."""


@pytest.fixture
async def one_thread() -> AsyncIterator[FairExecutor]:
    executor = FairExecutor(1, 1000, crowded=_Crowded)
    yield executor
    executor.shutdown()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


class Work:
    """Jobs that note their callers in the order in which they run. A stop job waits until `may_go_on`."""

    def __init__(self, executor: FairExecutor) -> None:
        self.executor = executor
        self.ran: list[str] = []
        self.may_go_on = threading.Event()

    def queue(self, caller: str, count: int, seconds: float) -> "list[asyncio.Task[None]]":
        """Queue `count` jobs of a caller. Each takes `seconds`."""
        return [asyncio.create_task(self.executor.run(caller, lambda: self._do(caller, seconds))) for _ in range(count)]

    def queue_stop(self, caller: str) -> "asyncio.Task[None]":
        """Queue a job that lasts until `may_go_on`."""
        return asyncio.create_task(self.executor.run(caller, lambda: self._stop(caller)))

    def _do(self, caller: str, seconds: float) -> None:
        self.ran.append(caller)
        time.sleep(seconds)

    def _stop(self, caller: str) -> None:
        self.ran.append(caller)
        self.may_go_on.wait(WITHIN_SECONDS)


async def test_a_hundred_jobs_of_one_caller_delay_another_caller_by_one_job(one_thread: FairExecutor) -> None:
    work = Work(one_thread)
    flood = [*work.queue("flood", 20, 0.001), work.queue_stop("flood"), *work.queue("flood", 79, 0.001)]
    await _until(lambda: len(work.ran) == 21)
    other = work.queue("other", 1, 0)
    await asyncio.sleep(0)
    work.may_go_on.set()
    await asyncio.gather(*flood, *other)
    assert work.ran.index("other") == 21, "its job is the next one after the job that was running"


async def test_a_costly_job_counts_for_what_it_cost(one_thread: FairExecutor) -> None:
    """Few large photos against many small ones. After the first large one, the small ones come first.

    Each small job may take up to 13 ms here before a third large one would come first.
    """
    work = Work(one_thread)
    await asyncio.gather(*work.queue("costly", 4, 0.2), *work.queue("cheap", 30, 0.001))
    assert work.ran.count("cheap") == 30
    assert work.ran[:31].count("costly") <= 2, work.ran


async def test_an_idle_caller_does_not_save_up_time(one_thread: FairExecutor) -> None:
    """A late caller has used no time. If that counted against the 200 ms of the other, it would go first more than ten times."""
    work = Work(one_thread)
    busy = [*work.queue("busy", 20, 0.01), work.queue_stop("busy"), *work.queue("busy", 20, 0.01)]
    await _until(lambda: len(work.ran) == 21)
    late = work.queue("late", 10, 0.01)
    await asyncio.sleep(0)
    work.may_go_on.set()
    await asyncio.gather(*busy, *late)
    assert 2 <= work.ran[21:31].count("late") <= 8, "they take turns"


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
        assert isinstance(flood[-1].exception(), TooMuchWaits), "the newest job of the longest line is dropped"
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


async def test_errors_reach_the_caller_and_the_thread_goes_on(one_thread: FairExecutor) -> None:
    def broken() -> None:
        raise KeyError("x")

    for _ in range(3):
        with pytest.raises(KeyError):
            await one_thread.run("a", broken)
    assert await one_thread.run("a", lambda: 1) == 1


async def test_work_that_would_wait_gives_its_thread_to_others_and_starts_again() -> None:
    executor, lock, seen = FairExecutor(2, 100, crowded=_Crowded), threading.Lock(), []
    gate, tried = threading.Event(), list[str]()

    def large(name: str) -> str:
        tried.append(name)
        if not lock.acquire(blocking=False):
            raise _Crowded
        try:
            seen.append(name)
            gate.wait(WITHIN_SECONDS)
        finally:
            lock.release()
        return name

    try:
        first = asyncio.create_task(executor.run("a", lambda: large("first")))
        await _until(lambda: seen == ["first"])
        second = asyncio.create_task(executor.run("a", lambda: large("second")))
        await _until(lambda: "second" in tried)
        assert await asyncio.wait_for(executor.run("b", lambda: "small"), WITHIN_SECONDS / 2) == "small"
        assert seen == ["first"]
        gate.set()
        assert await asyncio.gather(first, second) == ["first", "second"]
        assert seen == ["first", "second"]
    finally:
        gate.set()
        executor.shutdown()


class _Large:
    """Jobs of which one may run at a time. `tries` counts starts. The first one runs until `may_end`."""

    def __init__(self) -> None:
        self.tries: list[str] = []
        self.ended: list[str] = []
        self.may_end = threading.Event()
        self._lock = threading.Lock()

    def job(self, name: str) -> Callable[[], str]:
        """A job that gives its thread back while another one runs."""

        def run() -> str:
            self.tries.append(name)
            if not self._lock.acquire(blocking=False):
                raise _Crowded
            try:
                self.may_end.wait(WITHIN_SECONDS)
                self.ended.append(name)
            finally:
                self._lock.release()
            return name

        return run


async def _quiet() -> None:
    """Time in which an attempt that must not start would have started."""
    await asyncio.sleep(0.05)


async def test_small_jobs_pass_a_large_one_of_the_same_caller_that_cannot_start() -> None:
    executor, large = FairExecutor(2, 100, crowded=_Crowded), _Large()
    try:
        waiting = [asyncio.create_task(executor.run(name, large.job(name))) for name in ("x", "a")]
        await _until(lambda: executor.waiting == 1)
        for _ in range(5):
            assert await asyncio.wait_for(executor.run("a", lambda: "small"), WITHIN_SECONDS / 2) == "small"
        assert large.ended == []
        large.may_end.set()
        await asyncio.gather(*waiting)
        assert large.ended == ["x", "a"]
    finally:
        large.may_end.set()
        executor.shutdown()


async def test_jobs_that_gave_their_threads_back_count_as_waiting() -> None:
    """Threads are free, because no large job can start. Still no more than 4 may wait."""
    executor, large = FairExecutor(2, 4, crowded=_Crowded), _Large()
    try:
        first = asyncio.create_task(executor.run("b", large.job("first")))
        await _until(lambda: large.tries == ["first"])
        flood = [asyncio.create_task(executor.run("a", large.job(str(number)))) for number in range(100)]
        await _until(lambda: sum(task.done() for task in flood) == 96)
        assert executor.waiting == 4
        assert await asyncio.wait_for(executor.run("a", lambda: "small"), WITHIN_SECONDS / 2) == "small"
        other = asyncio.create_task(executor.run("c", large.job("other")))
        await _until(lambda: sum(task.done() for task in flood) == 97)
        assert {type(task.exception()) for task in flood if task.done()} == {TooMuchWaits}
        large.may_end.set()
        assert [*await asyncio.gather(first, other)] == ["first", "other"]
        await asyncio.gather(*flood, return_exceptions=True)
        assert executor.waiting == 0
        numbers = [int(name) for name in large.ended if name.isdecimal()]
        assert numbers == sorted(numbers), "large jobs of one caller keep their order"
    finally:
        large.may_end.set()
        executor.shutdown()


async def test_large_jobs_that_cannot_start_do_not_try_without_end() -> None:
    """Each tries once when it comes. When another job ends, one of them tries again."""
    executor, large = FairExecutor(3, 100, crowded=_Crowded), _Large()
    try:
        names = ["x", *"aaabbb"]
        jobs = [asyncio.create_task(executor.run(name, large.job(name))) for name in names]
        await _until(lambda: executor.waiting == 6 and len(large.tries) >= len(names))
        await _quiet()
        assert sorted(large.tries) == sorted(names)
        await executor.run("c", lambda: None)
        await _until(lambda: len(large.tries) > len(names))
        await _quiet()
        assert len(large.tries) == len(names) + 1
        large.may_end.set()
        await asyncio.gather(*jobs)
        assert sorted(large.ended) == sorted(names)
    finally:
        large.may_end.set()
        executor.shutdown()


async def test_accounts_of_callers_who_left_do_not_pile_up(one_thread: FairExecutor) -> None:
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
