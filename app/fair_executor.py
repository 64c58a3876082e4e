"""Threads for long work, shared fairly: the caller who used them least is served next.

Each caller has a line of its own. A caller's account is the time that its work took on a thread. So a photo of 25 megapixels,
or one with a thousand faces, counts with its real cost. The caller with the smallest account goes next. This is fair queueing
by measured cost, as the Completely Fair Scheduler of Linux shares a processor (Molnar, 2007).
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
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
    #: It gave its thread back because it would have waited for another job. It starts again when one ends.
    is_crowded: bool = field(default=False)


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
        self._lines: dict[str, deque[_Job]] = {}
        self._running: dict[str, int] = {}
        self._used: dict[str, float] = {}

    async def run(self, caller: str, work: Callable[[], T]) -> T:
        """Do the work on a thread when it is this caller's turn; returns or raises what it does.

        Raises TooMuchWaits when the lines are full and no other caller's line is longer. If one is longer, its newest job is
        dropped, and that job's caller gets TooMuchWaits.
        """
        self._make_room(caller)
        job = _Job(caller, work, asyncio.get_running_loop().create_future())
        self._join(caller)
        self._lines.setdefault(caller, deque()).append(job)
        WAITING.set(self.waiting)
        self._start_next()
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

    def _make_room(self, caller: str) -> None:
        if self._free > 0 or self.waiting < self._most_waiting:
            return
        REFUSED.inc()
        longest = max(self._lines.values(), key=len)
        if len(self._lines.get(caller, ())) + 1 >= len(longest):
            raise TooMuchWaits
        newest = longest[-1]
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
            ready = [name for name, line in self._lines.items() if not line[0].is_crowded]
            if not ready:
                return
            # Among equal accounts, the caller with fewer running jobs goes first: else one caller would get all free threads.
            caller = min(ready, key=lambda name: (self._used[name], self._running.get(name, 0)))
            job = self._pop(caller)
            self._free -= 1
            self._running[caller] = self._running.get(caller, 0) + 1
            began = time.monotonic()
            ended = partial(_call_soon, asyncio.get_running_loop(), self._end, job, began)
            self._executor.submit(job.work).add_done_callback(ended)
        WAITING.set(self.waiting)

    def _end(self, job: _Job, began: float, done: "Future[Any]") -> None:
        self._free += 1
        self._used[job.caller] = self._used.get(job.caller, _NOTHING) + time.monotonic() - began
        self._running[job.caller] -= 1
        if not self._running[job.caller]:
            del self._running[job.caller]
        for line in self._lines.values():
            line[0].is_crowded = False
        error = None if done.cancelled() else done.exception()
        is_alone = not self._running
        if self._crowded is not None and isinstance(error, self._crowded) and not job.answer.done():
            # The work that it would have waited for may have ended since. If nothing runs, there is none.
            job.is_crowded = not is_alone
            self._lines.setdefault(job.caller, deque()).appendleft(job)
        elif not job.answer.done():
            if done.cancelled():
                job.answer.cancel()
            elif error is not None:
                job.answer.set_exception(error)
            else:
                job.answer.set_result(done.result())
        self._start_next()
        WAITING.set(self.waiting)

    def _pop(self, caller: str) -> _Job:
        line = self._lines[caller]
        job = line.popleft()
        if not line:
            del self._lines[caller]
        return job

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
