"""Names and arguments of background jobs. Putting one in the queue is a hint: MongoDB knows what is due."""

import json
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

from arq.connections import ArqRedis, RedisSettings
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.boundary import Boundary
from app.config import Settings
from app.documents.base import now

SCREEN: Final = "screen"
PUBLISH: Final = "publish"
SCAN: Final = "scan"
CONNECT_SECONDS = 1
#: How long Redis keeps a job that no worker takes. The sweeps ask for the work again long before that.
KEPT_FOR: Final = timedelta(days=1)


def encode_job(job: dict[str, object]) -> bytes:
    """Jobs travel as JSON: arq's default, pickle, would run whatever somebody wrote into Redis."""
    return json.dumps(job, default=str).encode()


def decode_job(data: bytes) -> dict[str, object]:
    """What `encode_job` wrote."""
    decoded: dict[str, object] = json.loads(data)
    return decoded


def redis_settings(settings: Settings) -> RedisSettings:
    """Arq's connection settings, with short time limits and no retries of its own."""
    redis = RedisSettings.from_dsn(settings.redis_url)
    redis.conn_retries, redis.conn_timeout = 0, CONNECT_SECONDS
    return redis


def due_at_once() -> datetime:
    """The time that a job is queued for when it is due now: a moment in January 1970, later for a later job.

    arq keeps jobs in the order of their times, and its worker takes those that are not ahead of its own host's clock. A present
    time would keep a job waiting for as long as that clock is behind ours.
    """
    return datetime.fromtimestamp(now().timestamp() / 1000, UTC)


class Queue:
    """Puts jobs where the workers of this store look. Job arguments are ids.

    name: Redis' key. It contains the store's id, because a restore drill or another deployment may use the same Redis. A worker
    of another store would take the job, and would not find the person in its own database.
    """

    def __init__(self, settings: Settings, boundary: Boundary, store_id: str) -> None:
        self.name = f"{settings.queue_name}:{store_id}"
        self._settings = settings
        self._boundary = boundary
        self._redis: ArqRedis | None = None

    async def enqueue_screening(self, identity_id: str, job_id: str, *, again: str = "") -> bool:
        """Ask a worker to screen. False when Redis is away: the sweep will find the identity in MongoDB.

        again: makes the queue's own id another one, so that a job whose worker was killed need not wait for its lock.
        """
        return await self._enqueue(SCREEN, identity_id, job_id, queue_id=f"{job_id}{again}")

    async def enqueue_publication(self, gallery_id: str, *, again: str = "") -> bool:
        """Ask a worker to publish the gallery's next generation. False when Redis is away: the sweep asks again."""
        return await self._enqueue(PUBLISH, gallery_id, queue_id=f"{PUBLISH}:{gallery_id}{again}")

    async def enqueue_scan(self, scan_id: str, *, again: str = "") -> bool:
        """Ask a worker to go on with a scan. False when Redis is away: the sweep finds it in MongoDB."""
        return await self._enqueue(SCAN, scan_id, queue_id=f"{scan_id}{again}")

    async def _enqueue(self, job: str, *ids: str, queue_id: str) -> bool:
        redis = self._connection()
        put = partial(
            redis.enqueue_job, job, *ids, _job_id=f"{self.name}:{queue_id}", _queue_name=self.name,
            _defer_until=due_at_once(), _expires=KEPT_FOR,
        )  # fmt: skip
        try:
            await self._boundary.call(put, "enqueue")
        except (RedisError, OSError):
            return False
        return True

    async def depth(self) -> int:
        """Jobs that wait. Raises RedisError or OSError when Redis is away."""
        redis = self._connection()
        return int(await self._boundary.call(partial(redis.zcard, self.name), "depth"))

    async def close(self) -> None:
        """Let go of the connections."""
        if self._redis is not None:
            await self._redis.aclose(close_connection_pool=True)

    def _connection(self) -> ArqRedis:
        # Not by arq's create_pool: it waits for an answer, and loses its socket when Redis is too slow to give one.
        if self._redis is None:
            pool = ConnectionPool.from_url(
                self._settings.redis_url, socket_connect_timeout=CONNECT_SECONDS, retry=Retry(NoBackoff(), 0)
            )
            self._redis = ArqRedis(pool, job_serializer=encode_job, job_deserializer=decode_job)
        return self._redis
