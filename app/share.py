"""The folder that all hosts share: calls to it in threads of its own, behind its boundary.

Whoever calls an NFS that hangs sleeps in the kernel until it is back, and nothing wakes him. So the threads are few, are no
other work's, and end with the process whatever they wait for; and what hangs is not called again beside itself.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

from app.boundary import Boundary
from storage.generations import GenerationStoreUnavailable, Progress

P = ParamSpec("P")
T = TypeVar("T")

THREADS: Final = 4
NICENESS: Final = 10
#: For how many time limits the copying of gigabytes may make no progress.
SILENCE: Final = 3
#: A block of files is read in a millisecond; the event loop need not hear of each.
TOLD_EVERY_SECONDS: Final = 0.2


class Share:
    """The shared folder as one process sees it."""

    def __init__(self, boundary: Boundary, timeout_seconds: float) -> None:
        """timeout_seconds: the boundary's, of what takes a moment."""
        self._boundary = boundary
        self._silence_seconds = SILENCE * timeout_seconds
        self._threads = asyncio.Semaphore(THREADS)
        #: Calls that nobody waits for any more, and that have not come back.
        self._given_up: dict[asyncio.Future[Any], str] = {}

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Do what takes a moment, within the boundary's time limit. Raises what it raises, or GenerationStoreUnavailable."""
        operation = work.__name__
        return await self._boundary.call(lambda: self._in_a_thread(operation, lambda: work(*args, **kwargs)), operation)

    async def run_long(
        self, operation: str, work: Callable[[Progress], T], *, silence_seconds: float | None = None
    ) -> T:
        """Do what may take all the time that it needs, as long as it tells the progress that it makes.

        Raises what it raises, or GenerationStoreUnavailable. Once given up it is stopped where it would tell the next.
        """
        seconds = silence_seconds or self._silence_seconds
        loop, limit = asyncio.get_running_loop(), asyncio.timeout(seconds)
        is_over, told_at = threading.Event(), 0.0

        def push_on() -> None:
            with suppress(RuntimeError):  # it has ended meanwhile
                limit.reschedule(loop.time() + seconds)

        def tell(_done: int, _total: int) -> None:
            nonlocal told_at
            if is_over.is_set():
                raise GenerationStoreUnavailable("it was given up")
            if (moment := time.monotonic()) - told_at >= TOLD_EVERY_SECONDS:
                told_at = moment
                with suppress(RuntimeError):  # the loop has ended meanwhile
                    loop.call_soon_threadsafe(push_on)

        try:
            return await self._boundary.call(
                lambda: self._in_a_thread(operation, partial(work, tell)), operation, limit=limit
            )
        finally:
            is_over.set()

    async def _in_a_thread(self, operation: str, work: Callable[[], T]) -> T:
        if operation in self._given_up.values():
            raise GenerationStoreUnavailable(f"an earlier {operation} of the shared folder still hangs")
        await self._threads.acquire()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[T] = loop.create_future()
        ended.add_done_callback(self._note_end)
        threading.Thread(target=_carry_out, args=(work, loop, ended), name=f"share {operation}", daemon=True).start()
        try:
            await asyncio.wait({ended})
        except asyncio.CancelledError:
            if not ended.done():
                self._given_up[ended] = operation
            raise
        return ended.result()

    def _note_end(self, ended: asyncio.Future[T]) -> None:
        ended.exception()  # of one that was given up nobody else asks
        self._given_up.pop(ended, None)
        self._threads.release()


def _carry_out(work: Callable[[], T], loop: asyncio.AbstractEventLoop, ended: asyncio.Future[T]) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
        tell = partial(ended.set_exception, error)
    else:
        tell = partial(ended.set_result, result)
    with suppress(RuntimeError):  # the loop has ended meanwhile
        loop.call_soon_threadsafe(tell)
