"""The border of each dependency: a time limit, a circuit breaker, and the one place where tests put faults.

    closed ── so many failures in a row ──> open ── a pause ──> half-open ── one call tries: well ──> closed
                                              ^                     └────────── badly ──────────────────┘

While it is open every call is refused at once, with what the dependency itself would raise: a caller gets its 503 in
microseconds, and a store that is coming back is not met by everybody at once. Nothing is tried again here: the drivers do that.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, Protocol, Self, TypeVar

import structlog
from prometheus_client import Counter, Gauge
from pymongo import AsyncMongoClient
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import AutoReconnect, ConnectionFailure
from redis.exceptions import RedisError

from app.config import Settings
from storage.evidence import EvidenceStore, EvidenceUnavailable
from storage.generations import GenerationStoreUnavailable
from storage.ownership import NotOurs
from storage.photos import PhotoStore, PhotoStoreUnavailable, StoredPhoto

log = structlog.get_logger(__name__)

T = TypeVar("T")
State = Literal["closed", "half-open", "open"]

STATE = Gauge("idem_boundary_state", "0 closed, 1 half-open, 2 open: calls are refused", ["dependency"])
FAILED = Counter(
    "idem_boundary_failures", "Calls that the dependency failed or did not answer", ["dependency", "error"]
)
REFUSED = Counter("idem_boundary_refusals", "Calls refused at once while the dependency rests", ["dependency"])
_LEVELS: Final[dict[State, int]] = {"closed": 0, "half-open": 1, "open": 2}
#: How a transaction ends. A lost answer of these two is the driver's to clear up: the transaction may have been committed.
_ENDINGS: Final = ("commitTransaction", "abortTransaction")


class Faults(Protocol):
    """What tests put between a boundary and its dependency."""

    async def around(
        self, dependency: str, operation: str, work: Callable[[], Awaitable[T]], broken: Callable[[str], Exception]
    ) -> T:
        """Do the work, late or not at all; or do it and lose its answer. broken: makes what the dependency would raise."""


class Boundary:
    """One dependency as one process sees it."""

    def __init__(
        self,
        name: str,
        broken: Callable[[str], Exception],
        *,
        counted: tuple[type[Exception], ...],
        timeout_seconds: float | None,
        failures: int = 5,
        pause_seconds: float = 1.0,
    ) -> None:
        """broken: makes the error that this dependency's callers know. counted: errors that mean that it is away.

        timeout_seconds: of one call; None where the driver has its own. failures: in a row, before it is left alone.
        """
        self.name = name
        self.faults: Faults | None = None
        self._broken = broken
        self._counted = counted
        self._timeout_seconds = timeout_seconds
        self._limit = failures
        self._pause_seconds = pause_seconds
        self._failures = 0
        self._rests_until: float | None = None
        self._probing_until = 0.0
        STATE.labels(name).set(0)

    @property
    def state(self) -> State:
        """Whether calls pass, are refused, or one is let through to see."""
        if self._rests_until is None:
            return "closed"
        return "open" if time.monotonic() < self._rests_until else "half-open"

    def require_open(self) -> None:
        """Raises what the dependency raises, while it is left alone."""
        if self.state == "open":
            self._refuse()

    async def call(
        self,
        work: Callable[[], Awaitable[T]],
        operation: str = "call",
        *,
        is_part_of_more: bool = False,
        limit: asyncio.Timeout | None = None,
    ) -> T:
        """Do the work within the time limit. Raises what it raises, or the dependency's own error when refused or late.

        is_part_of_more: of something that was let through before, which must come to its end. limit: instead of the
        dependency's own, for whoever moves it on while the work gets on.
        """
        if not is_part_of_more:
            self._admit()
        limit = limit or asyncio.timeout(self._timeout_seconds)
        try:
            async with limit:
                answer = await self._carry_out(work, operation)
        except NotOurs:
            raise  # the store answers, and refuses
        except self._counted as error:
            self._note_failure(error)
            raise
        except TimeoutError as error:
            if not limit.expired():
                raise
            self._note_failure(error)
            raise self._broken("it did not answer in time") from error
        self._note_success()
        return answer

    async def _carry_out(self, work: Callable[[], Awaitable[T]], operation: str) -> T:
        if self.faults is None:
            return await work()
        return await self.faults.around(self.name, operation, work, self._broken)

    def _admit(self) -> None:
        if self._rests_until is None:
            return
        if self.state == "open" or time.monotonic() < self._probing_until:
            self._refuse()
        # One call at a time tries. It is not waited for for ever: whoever makes it may be cancelled.
        self._probing_until = time.monotonic() + self._pause_seconds
        STATE.labels(self.name).set(_LEVELS["half-open"])

    def _refuse(self) -> None:
        REFUSED.labels(self.name).inc()
        raise self._broken(f"it is left alone after {self._failures} failures")

    def _note_failure(self, error: Exception) -> None:
        FAILED.labels(self.name, type(error).__name__).inc()
        self._failures += 1
        if self._failures < self._limit:
            return
        was_closed = self._rests_until is None
        self._rests_until = time.monotonic() + self._pause_seconds
        self._probing_until = 0.0
        STATE.labels(self.name).set(_LEVELS["open"])
        if was_closed:  # after the state: a log that cannot be written must not keep the breaker closed
            log.error(
                "dependency_left_alone", dependency=self.name, failures=self._failures, error=type(error).__name__
            )

    def _note_success(self) -> None:
        self._failures = 0
        if self._rests_until is not None:
            self._rests_until = None
            STATE.labels(self.name).set(_LEVELS["closed"])
            log.info("dependency_is_back", dependency=self.name)


@dataclass(frozen=True, slots=True)
class Boundaries:
    """All of one process."""

    mongo: Boundary
    queue: Boundary
    photos: Boundary
    evidence: Boundary
    share: Boundary

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As the settings want them, all closed."""
        often = partial(Boundary, failures=settings.boundary_failures, pause_seconds=settings.boundary_pause_seconds)
        return cls(
            # pymongo.timeout bounds what a request does as a whole.
            mongo=often("mongo", AutoReconnect, counted=(ConnectionFailure,), timeout_seconds=None),
            # A hint that is not given costs little, and an enrolment must not wait for it again and again: one failure is enough.
            queue=Boundary(
                "queue", ConnectionError, counted=(RedisError, OSError), timeout_seconds=settings.queue_timeout_seconds,
                failures=1, pause_seconds=settings.boundary_pause_seconds,
            ),
            photos=often(
                "photos", PhotoStoreUnavailable, counted=(PhotoStoreUnavailable,),
                timeout_seconds=settings.photo_timeout_seconds,
            ),
            # The store has a deadline of its own.
            evidence=often("evidence", EvidenceUnavailable, counted=(EvidenceUnavailable,), timeout_seconds=None),
            share=often(
                "share", GenerationStoreUnavailable, counted=(GenerationStoreUnavailable,),
                timeout_seconds=settings.share_timeout_seconds,
            ),
        )  # fmt: skip

    def states(self) -> dict[str, State]:
        """The state of each, by the dependency's name."""
        return {one.name: one.state for one in (self.mongo, self.queue, self.photos, self.evidence, self.share)}


class BoundedMongoClient(AsyncMongoClient[dict[str, object]]):
    """The driver's client, with every command behind the boundary, whoever sends it: a transaction, Beanie, a cursor.

    A command of a running transaction always passes: refusing a commit would only make its outcome unknown.
    """

    def __init__(self, boundary: Boundary, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the driver's own
        self._boundary = boundary
        super().__init__(*args, **kwargs)

    async def _retry_internal(
        self,
        func: Any,  # noqa: ANN401 - the driver's own
        session: AsyncClientSession | None,
        bulk: Any,  # noqa: ANN401
        operation: str,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """The one way that the driver's commands take, around its own single retry."""
        is_in_transaction = session is not None and session.in_transaction
        work = partial(super()._retry_internal, func, session, bulk, operation, *args, **kwargs)
        try:
            # Some operations are named by an enumeration of the driver's.
            return await self._boundary.call(
                work, str(getattr(operation, "value", operation)), is_part_of_more=is_in_transaction
            )
        except ConnectionFailure as error:
            if is_in_transaction and operation not in _ENDINGS:
                error._add_error_label("TransientTransactionError")  # noqa: SLF001 - as the driver marks its own
            raise


class BoundedPhotos:
    """A photo store behind its boundary."""

    def __init__(self, store: PhotoStore, boundary: Boundary) -> None:
        self._store = store
        self._boundary = boundary

    async def put(self, key: str, data: bytes) -> None:
        """See PhotoStore."""
        await self._boundary.call(partial(self._store.put, key, data), "put")

    async def get(self, key: str) -> bytes:
        """See PhotoStore."""
        return await self._boundary.call(partial(self._store.get, key), "get")

    async def delete(self, keys: Iterable[str]) -> int:
        """See PhotoStore."""
        return await self._boundary.call(partial(self._store.delete, list(keys)), "delete")

    async def list(self, prefix: str = "") -> AsyncIterator[StoredPhoto]:
        """See PhotoStore. The time limit is each step's, not the whole listing's."""
        found = self._store.list(prefix)
        while (photo := await self._boundary.call(partial(anext, found, None), "list")) is not None:
            yield photo

    async def check(self) -> None:
        """See PhotoStore."""
        await self._boundary.call(self._store.check, "check")

    async def close(self) -> None:
        """See PhotoStore."""
        await self._store.close()


class BoundedEvidence:
    """An evidence store behind its boundary."""

    def __init__(self, store: EvidenceStore, boundary: Boundary) -> None:
        self._store = store
        self._boundary = boundary

    async def append(self, name: str, data: bytes) -> None:
        """See EvidenceStore."""
        await self._boundary.call(partial(self._store.append, name, data), "append")

    async def read(self, name: str) -> bytes:
        """See EvidenceStore."""
        return await self._boundary.call(partial(self._store.read, name), "read")

    async def names(self, prefix: str = "") -> list[str]:
        """See EvidenceStore."""
        return await self._boundary.call(partial(self._store.names, prefix), "names")

    async def entries(self, folder: str = "") -> list[str]:
        """See EvidenceStore."""
        return await self._boundary.call(partial(self._store.entries, folder), "entries")

    async def close(self) -> None:
        """See EvidenceStore."""
        await self._store.close()
