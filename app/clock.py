"""The platform's time: MongoDB's, as this process knows it. See docs/adr/0036.

    host's clock    can be set by anyone: its difference from MongoDB's decides whether this host is trusted
    steady seconds  cannot be set: they continue MongoDB's time between two measurements, and during an outage

A statement that cannot be undone (an erasure) also uses MongoDB's `$$NOW`. If MongoDB's time itself jumps against the steady
seconds, one of its clocks was set. Then nothing is erased by time for a day.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pymongo
import structlog
from bson.codec_options import CodecOptions
from prometheus_client import Gauge
from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError

log = structlog.get_logger(__name__)

#: A host erases nobody and signs no checkpoints while its clock differs from MongoDB's by more than this.
APART_SECONDS: Final = 60.0
#: Time between two measurements. Quartz drifts by less than a millisecond in it. A new primary may have another clock.
PERIOD_SECONDS: Final = 5.0
MEASURED_WITHIN_SECONDS: Final = 2.0
#: After a jump of MongoDB's time, nothing is erased by time for this long. An operator can correct the clock before.
HELD_AFTER_JUMP_SECONDS: Final = 86_400.0
#: MongoDB cuts its time to milliseconds.
_RESOLUTION_SECONDS: Final = 0.001
_AWARE: Final[CodecOptions[Mapping[str, Any]]] = CodecOptions(tz_aware=True)

OFFSET = Gauge(
    "idem_clock_offset_seconds",
    "How far the host's clock is ahead of MongoDB's: alert beyond a minute, nobody is erased then",
)


def steady_seconds() -> float:
    """Seconds since a fixed moment, by a clock that cannot be set. Where the system supports it, sleep counts as well."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


def host_seconds() -> float:
    """Seconds since 1970, by this host's clock."""
    return time.time()


class Clock:
    """MongoDB's time in one process. Before the first measurement it is the host's."""

    def __init__(self, wall: Callable[[], float] = host_seconds, steady: Callable[[], float] = steady_seconds) -> None:
        """wall: the host's clock, in seconds since 1970. steady: seconds that only ever grow."""
        self._wall = wall
        self._steady = steady
        self._base: float | None = None  # MongoDB's time less the steady seconds
        self._measured_at = steady()
        self._jump = 0.0  # of MongoDB's time, in sum; see `jump_seconds`
        self._jumped_at = steady()
        self._was_in_agreement = True

    def time(self) -> float:
        """The present in seconds since 1970."""
        return self._wall() if self._base is None else self._base + self._steady()

    def now(self) -> datetime:
        """The present in UTC, cut to the milliseconds that MongoDB keeps."""
        moment = datetime.fromtimestamp(self.time(), UTC)
        return moment.replace(microsecond=moment.microsecond // 1000 * 1000)

    @property
    def offset_seconds(self) -> float:
        """How far the host's clock is ahead of MongoDB's at this moment; negative: behind."""
        return self._wall() - self.time()

    @property
    def agrees(self) -> bool:
        """Whether host and MongoDB agree within a minute. A clock that is set between two measurements is seen at once."""
        return abs(self.offset_seconds) <= APART_SECONDS

    @property
    def jump_seconds(self) -> float:
        """How far MongoDB's time was set ahead within the last day; negative: back. 0 if its jumps cancel out within a minute."""
        return self._jump if self._is_held and abs(self._jump) > APART_SECONDS else 0.0

    @property
    def may_erase(self) -> bool:
        """Whether this process may erase by time: the clocks agree, and MongoDB's was not set within the last day."""
        return self.agrees and self.jump_seconds == 0

    @property
    def measured_seconds_ago(self) -> float | None:
        """How old the last measurement is; None before the first."""
        return None if self._base is None else self._steady() - self._measured_at

    @property
    def difference(self) -> str | None:
        """A sentence for the operator; None while host and MongoDB agree."""
        offset = self.offset_seconds
        return f"The host's clock is {in_words(offset)} MongoDB's." if abs(offset) > APART_SECONDS else None

    @property
    def why_not(self) -> dict[str, float]:
        """The figures behind `may_erase`, for a log line."""
        return {"offset_seconds": round(self.offset_seconds, 3), "jump_seconds": round(self.jump_seconds, 3)}

    @property
    def jump(self) -> str | None:
        """A sentence for the operator, if MongoDB's time was set within the last day; else None."""
        seconds = self.jump_seconds
        if seconds == 0:
            return None
        by = timedelta(seconds=round(abs(seconds)))
        return f"MongoDB's clock was set {'ahead' if seconds > 0 else 'back'} by {by}."

    def learn(self, asked: float, answered: float, server: datetime) -> None:
        """Use one answer of MongoDB. asked, answered: steady seconds before and after the question.

        The answer gives a lower and an upper bound. The estimate moves only as far as the bounds require. So a slow answer, with
        its wide bounds, does not spoil a precise estimate.
        """
        told = server.timestamp()
        least, most = told - answered, told + _RESOLUTION_SECONDS - asked
        before = (least + most) / 2 if self._base is None else self._base
        self._base = min(max(before, least), most)
        self._measured_at = answered
        if abs(step := self._base - before) > APART_SECONDS:
            self._jump = self._jump + step if self._is_held else step
            self._jumped_at = answered
            log.error("mongodb_clock_was_set", seconds=round(step, 3))
        OFFSET.set(self.offset_seconds)

    @property
    def _is_held(self) -> bool:
        return self._steady() - self._jumped_at < HELD_AFTER_JUMP_SECONDS

    async def measure(self, mongo: AsyncMongoClient[dict[str, Any]]) -> None:
        """Ask the primary for its time. Raises PyMongoError when it does not answer: the last estimate stays in use."""
        asked = self._steady()
        with pymongo.timeout(MEASURED_WITHIN_SECONDS):
            # Commands do not use the client's own codec options. Without these the answer would be read as local time.
            hello: Mapping[str, Any] = await mongo.admin.command("hello", codec_options=_AWARE)
        self.learn(asked, self._steady(), hello["localTime"])

    @asynccontextmanager
    async def kept_right(self, mongo: AsyncMongoClient[dict[str, Any]]) -> AsyncIterator[None]:
        """While the body runs: measure every PERIOD_SECONDS, and log when host and MongoDB start or stop agreeing."""
        stopping = asyncio.Event()
        task = asyncio.create_task(self._keep_right(mongo, stopping))
        try:
            yield
        finally:
            # The task is asked to end, not cancelled: the driver may turn a cancellation into an error of the connection.
            stopping.set()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep_right(self, mongo: AsyncMongoClient[dict[str, Any]], stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            try:
                await self.measure(mongo)
            except PyMongoError as error:
                log.debug("clock_not_measured", error=type(error).__name__)
            except Exception:
                log.exception("clock_not_measured")
            self._tell()
            with suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_SECONDS):
                    await stopping.wait()

    def _tell(self) -> None:
        offset, agrees = self.offset_seconds, self.agrees
        OFFSET.set(offset)
        if agrees != self._was_in_agreement:
            say = log.info if agrees else log.error
            say("clock_agrees" if agrees else "clock_differs", offset_seconds=round(offset, 3))
        self._was_in_agreement = agrees


def in_words(seconds: float) -> str:
    """An offset as text, to be followed by the name of the other clock: "3 days, 0:00:01 behind"."""
    return f"{timedelta(seconds=round(abs(seconds)))} {'ahead of' if seconds > 0 else 'behind'}"


def from_now(span: timedelta) -> Mapping[str, Any]:
    """MongoDB's present plus a span, which may be negative, as an aggregation expression."""
    return {"$add": ["$$NOW", int(span.total_seconds() * 1000)]}
