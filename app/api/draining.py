"""SIGTERM: what has begun is finished, or answered 503 in time; nobody's connection is just closed."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import NotReady

log = structlog.get_logger(__name__)

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
#: Kept of the grace for the answers themselves, each with its event (fifty took over a second), and for letting go of the stores.
RESERVE_SECONDS: Final = 2.5


class Drain:
    """The end of one process's requests: each has an own time limit, which begins to run with the signal."""

    def __init__(self, grace_seconds: float) -> None:
        """grace_seconds: from the signal to the end of the process."""
        self._seconds = max(grace_seconds - RESERVE_SECONDS, grace_seconds / 2)
        self._ends_at: float | None = None
        self._in_flight: set[asyncio.Timeout] = set()

    def begin(self) -> None:
        """From now on what is in flight has its time, and what still comes shares it. Called on the event loop."""
        if self._ends_at is not None:
            return
        self._ends_at = asyncio.get_running_loop().time() + self._seconds
        log.info("draining", in_flight=len(self._in_flight), seconds=self._seconds)
        for limit in self._in_flight:
            limit.reschedule(self._ends_at)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Meanwhile, begin when the process is told to end; whoever listened before, the server, still hears it."""
        if threading.current_thread() is not threading.main_thread():
            yield  # a test's server; signals are not ours here
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def told(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self.begin)
            listener = before[signal.Signals(number)]
            if callable(listener):
                listener(number, frame)

        for number in SIGNALS:
            signal.signal(number, told)
        try:
            yield
        finally:
            for number, listener in before.items():
                if signal.getsignal(number) is told:
                    signal.signal(number, listener)

    @contextmanager
    def counting(self, limit: asyncio.Timeout) -> Iterator[None]:
        """Meanwhile, this request is in flight."""
        self._in_flight.add(limit)
        if self._ends_at is not None:
            limit.reschedule(self._ends_at)
        try:
            yield
        finally:
            self._in_flight.discard(limit)


class Draining:
    """ASGI middleware, inside the Envelope, which renders the 503."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, in time."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        limit = asyncio.timeout(None)
        try:
            async with limit:
                with self._drain.counting(limit):
                    await self._app(scope, receive, noted)
        except Exception as error:
            # Drivers turn a task's cancellation into errors of their own.
            if not limit.expired() or has_begun:
                raise
            # Nothing is half done: a transaction that was not committed is none, and on doubt the idempotency key tells.
            raise NotReady("The service is stopping; please try again.", retry_after_seconds=1) from error
