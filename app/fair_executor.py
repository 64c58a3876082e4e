"""Threads for long work, shared fairly: the caller who used them least is served next.

Each caller has a line of its own. A caller's account is the time that its work took on a thread. So a photo of 25 megapixels,
or one with a thousand faces, counts with its real cost. The caller with the smallest account goes next. This is fair queueing
by measured cost, as the Completely Fair Scheduler of Linux shares a processor (Molnar, 2007).
"""

import asyncio
import time
from bisect import insort
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from prometheus_client import Counter, Gauge

T = TypeVar("T")

WAITING = Gauge("idem_compute_waiting", "Photos that wait for a thread")
REFUSED = Counter("idem_compute_refused", "Photos that were refused because too many waited")
#: An account starts at the smallest one of the callers who wait or run, so that idle time earns nothing.
_NOTHING: Final = 0.0
#: Accounts of callers who are gone are dropped beyond this number.
_MOST_ACCOUNTS: Final = 1000


class TooMuchWaits(Exception):
    """The line is full, and this caller's is the longest."""


@dataclass(eq=False, slots=True)
class _Job:
    caller: str
    work: Callable[[], Any]
    answer: "asyncio.Future[Any]"
    #: Jobs of one caller start in the order of their numbers.
    number: int
    #: It gave its thread back, because it would have waited for another job.
    gave_back: bool = False


class FairExecutor:
    """A pool of threads with one line for each caller. Used from one event loop."""

    def __init__(
        self,
        threads: int,
        most_waiting: int,
        *,
        initializer: Callable[[], None] | None = None,
        crowded: type[Exception] | None = None,
    ) -> None:
        """most_waiting: jobs of all callers. crowded: raised by work that would wait for other work; such work starts again."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="photos", initializer=initializer)
        self._free = threads
        self._most_waiting = most_waiting
        self._crowded = crowded
        self._lines: dict[str, list[_Job]] = {}
        self._running: dict[str, int] = {}
        self._used: dict[str, float] = {}
        self._number = 0
        # Jobs that have ended, without those that gave their threads back; and their number at the start of the last attempt that
        # failed or may fail. A job that gave its thread back starts again when the first is larger than the second. So one such
        # job tries again each time when a job ends.
        self._ended = 1
        self._crowded_at = 0

    async def run(self, caller: str, work: Callable[[], T]) -> T:
        """Do the work on a thread when it is this caller's turn; returns or raises what it does.

        Raises TooMuchWaits when the lines are full and no other caller's line is longer. If one is longer, its newest job is
        dropped, and that job's caller gets TooMuchWaits.
        """
        self._number += 1
        job = _Job(caller, work, asyncio.get_running_loop().create_future(), self._number)
        self._join(caller)
        self._line_up(job)
        try:
            answer: T = await job.answer
        finally:
            if not job.answer.done() or job.answer.cancelled():
                self._forget(job)
            del job  # its error refers to this frame: both would stay until garbage collection
        return answer

    @property
    def waiting(self) -> int:
        """Jobs that have no thread yet."""
        return sum(map(len, self._lines.values()))

    def shutdown(self) -> None:
        """End the threads after the work that they have begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _line_up(self, job: _Job) -> None:
        """Put the job into its caller's line, and start what may start. If too many wait then, drop one."""
        insort(self._lines.setdefault(job.caller, []), job, key=lambda one: one.number)
        self._start_next()
        if self.waiting <= self._most_waiting:
            return
        REFUSED.inc()
        longest = max(self._lines, key=lambda name: (len(self._lines[name]), name == job.caller))
        newest = self._lines[longest][-1]
        self._forget(newest)
        if not newest.answer.done():
            newest.answer.set_exception(TooMuchWaits())

    def _join(self, caller: str) -> None:
        """A caller who comes starts with at least the smallest account of the callers who are there."""
        if caller in self._lines or caller in self._running:
            return
        present = [self._used[name] for name in {*self._lines, *self._running} if name in self._used]
        self._used[caller] = max(self._used.get(caller, _NOTHING), min(present, default=_NOTHING))
        if not present:  # no other caller is there
            self._used = {caller: _NOTHING}
        elif len(self._used) > _MOST_ACCOUNTS:
            self._used = {name: self._used[name] for name in {caller, *self._lines, *self._running}}

    def _start_next(self) -> None:
        while self._free > 0:
            ready = [job for job in map(self._first_ready, self._lines.values()) if job is not None]
            if not ready:
                break
            # Among equal accounts, the caller with fewer running jobs goes first: else one caller would get all free threads.
            job = min(ready, key=lambda one: (self._used[one.caller], self._running.get(one.caller, 0)))
            caller = job.caller
            self._forget(job)
            if job.gave_back:
                self._crowded_at = self._ended
            self._free -= 1
            self._running[caller] = self._running.get(caller, 0) + 1
            began = time.monotonic()
            ended = partial(_call_soon, asyncio.get_running_loop(), self._end, job, began, self._ended)
            self._executor.submit(job.work).add_done_callback(ended)
        WAITING.set(self.waiting)

    def _first_ready(self, line: list[_Job]) -> _Job | None:
        """The first job that may start."""
        return next((job for job in line if not job.gave_back or self._crowded_at < self._ended), None)

    def _end(self, job: _Job, began: float, ended_before: int, done: "Future[Any]") -> None:
        self._free += 1
        self._used[job.caller] = self._used.get(job.caller, _NOTHING) + time.monotonic() - began
        self._running[job.caller] -= 1
        if not self._running[job.caller]:
            del self._running[job.caller]
        error = None if done.cancelled() else done.exception()
        is_crowded = self._crowded is not None and isinstance(error, self._crowded)
        if not is_crowded or not self._running:  # if nothing runs, no job has to wait for another one
            self._ended += 1
        if is_crowded and not job.answer.done():
            job.gave_back = True
            self._crowded_at = max(self._crowded_at, ended_before)
            self._line_up(job)
            return
        if not job.answer.done():
            if done.cancelled():
                job.answer.cancel()
            elif error is not None:
                job.answer.set_exception(error)
            else:
                job.answer.set_result(done.result())
        self._start_next()

    def _forget(self, job: _Job) -> None:
        line = self._lines.get(job.caller)
        if line is not None and job in line:
            line.remove(job)
            if not line:
                del self._lines[job.caller]
            WAITING.set(self.waiting)


def _call_soon(loop: asyncio.AbstractEventLoop, work: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(work, *arguments)
    except RuntimeError:  # the loop has ended: no caller waits
        return
