"""Rates: how often one caller may ask. Counted in Redis for all processes together; in this one alone while Redis is away.

A window slides (`limits`' counters of this window and the last, weighted), so nobody gets twice the rate around a full minute.
Redis is no truth here either: what it forgets, callers may ask once more. docs/adr/0027-rates-and-what-they-do-without-redis.md
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog
from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from prometheus_client import Counter
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.boundary import Boundary
from app.config import RateClass, Settings
from app.errors import NotReady
from app.keys import KeyRing

log = structlog.get_logger(__name__)

CONNECT_SECONDS = 1
#: Without Redis each process counts alone, and nobody knows how many there are: logins get a tenth of their rate in each.
ALONE_SHARE = 10
#: Counters that one process keeps by itself. The package walks over all of them at each request.
MOST_COUNTED_ALONE = 10_000
#: A refused caller becomes an event once in so long, not at each try.
NEWS_SECONDS = 60.0
MOST_NEWS = 10_000

RATE_LIMITED = Counter("idem_rate_limited", "Requests refused for their rate", ["kind"])
COUNTED_ALONE = Counter("idem_rates_counted_alone", "Requests counted without Redis", ["kind"])

_LOGIN: Final = "login"


@dataclass(frozen=True, slots=True)
class Allowance:
    """One request, counted. limit: of a window; remaining: after this one; reset_seconds: at least 1, until there is more."""

    is_granted: bool
    limit: int
    remaining: int
    reset_seconds: int


class RateLimits:
    """Counts requests by class and caller."""

    def __init__(self, settings: Settings, keys: KeyRing) -> None:
        self._settings = settings
        self._keys = keys
        self._rates: dict[RateClass, RateLimitItem] = {kind: parse(rate) for kind, rate in settings.rates().items()}
        self._boundary = Boundary(
            # A request is answered without being counted by all rather than late.
            "limiter", ConnectionError, counted=(RedisError, OSError), timeout_seconds=settings.queue_timeout_seconds,
            failures=1, pause_seconds=settings.boundary_pause_seconds,
        )  # fmt: skip
        self._pool: ConnectionPool | None = None
        self._shared: SlidingWindowCounterRateLimiter | None = None
        # Apart, so that nobody can keep people from logging in by asking for something else.
        self._logins_alone, self._others_alone = MemoryStorage(), MemoryStorage()
        self._told: dict[tuple[RateClass, str], float] = {}

    async def spend(self, kind: RateClass, who: str) -> Allowance:
        """Count one request of a caller (their id) or of an address (`address:` and `domain.callers.subscriber`).

        Raises NotReady for a login that nobody can count: it fails closed. Whatever else nobody can count is granted.
        """
        name = self._keys.keyed_hash("rate", who.encode()).hex()
        allowance = await self._spend_shared(kind, name)
        if allowance is None:
            COUNTED_ALONE.labels(kind).inc()
            allowance = await self._spend_alone(kind, name)
        if not allowance.is_granted:
            RATE_LIMITED.labels(kind).inc()
        return allowance

    def is_news(self, kind: RateClass, who: str) -> bool:
        """Whether this caller was not refused here within the last minute: an event each would be a way to fill the log."""
        now = time.monotonic()
        told = self._told.get((kind, who))
        if told is not None and now - told < NEWS_SECONDS:
            return False
        if len(self._told) >= MOST_NEWS:
            self._told.clear()
        self._told[kind, who] = now
        return True

    async def close(self) -> None:
        """Let go of the connections."""
        if self._pool is not None:
            await self._pool.aclose()

    async def _spend_shared(self, kind: RateClass, name: str) -> Allowance | None:
        """What Redis counts; None while it is away."""
        if not self._settings.redis_url:
            return None
        try:
            return await self._boundary.call(
                partial(_counted, self._in_redis(), self._rates[kind], kind, name), "count"
            )
        except (RedisError, OSError):
            return None

    async def _spend_alone(self, kind: RateClass, name: str) -> Allowance:
        rate, is_login = self._rates[kind], kind == _LOGIN
        if is_login:
            rate = type(rate)(max(1, rate.amount // ALONE_SHARE), rate.multiples)
        counters = self._logins_alone if is_login else self._others_alone
        if not await _has_room(counters):
            if is_login:
                log.warning("logins_not_counted", counters=len(counters.storage))
                raise NotReady("Logins cannot be counted at the moment.", retry_after_seconds=rate.get_expiry())
            return Allowance(is_granted=True, limit=rate.amount, remaining=rate.amount, reset_seconds=1)
        return await _counted(SlidingWindowCounterRateLimiter(counters), rate, kind, name)

    def _in_redis(self) -> SlidingWindowCounterRateLimiter:
        if self._shared is None:
            self._pool = ConnectionPool.from_url(
                self._settings.redis_url, socket_connect_timeout=CONNECT_SECONDS, retry=Retry(NoBackoff(), 0)
            )
            # The pool knows where Redis is; the address here only names the scheme.
            storage = RedisStorage(
                "async+redis://",
                implementation="redispy",
                key_prefix="idem:rates",
                connection_pool=self._pool,  # type: ignore[arg-type] # documented, and missing from the annotation
            )
            self._shared = SlidingWindowCounterRateLimiter(storage)
        return self._shared


async def _counted(
    limiter: SlidingWindowCounterRateLimiter, rate: RateLimitItem, kind: RateClass, name: str
) -> Allowance:
    is_granted = await limiter.hit(rate, kind, name)
    left = await limiter.get_window_stats(rate, kind, name)
    return Allowance(
        is_granted=is_granted,
        limit=rate.amount,
        remaining=left.remaining,
        reset_seconds=min(rate.get_expiry(), max(1, math.ceil(left.reset_time - time.time()))),
    )


async def _has_room(counters: MemoryStorage) -> bool:
    """Whether one more caller can be counted; clears away what is over, which the package does only while it counts."""
    if len(counters.storage) >= MOST_COUNTED_ALONE:
        now = time.time()
        for key, over_at in list(counters.expirations.items()):
            if over_at <= now:
                await counters.clear(key)
    return len(counters.storage) < MOST_COUNTED_ALONE
