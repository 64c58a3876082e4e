"""arq's worker, with the platform's clock: it plans its sweeps by MongoDB's time, and writes its heartbeat to MongoDB.

arq itself uses the clock of its host. If that clock were set back by three days, there would be no sweep for three days. If it
were set ahead by forty days, all sweeps of forty days would run at once.
"""

import asyncio
import os
import platform
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from typing import Any, Final

import structlog
from arq.worker import Worker
from pymongo.errors import PyMongoError

from app.clock import Clock
from app.documents.base import new_id, now
from app.documents.heartbeats import BEAT_SECONDS, Heartbeat
from app.queue import KEPT_FOR, due_at_once

log = structlog.get_logger(__name__)

#: The first worker to claim a sweep's time in Redis carries the sweep out. Workers' times differ by less than the claim lasts.
CLAIM_SECONDS: Final = 120
#: If the time goes back by more than this, the clock was set back, and the times of the next sweeps are planned again.
SET_BACK: Final = timedelta(minutes=1)
#: A worker that has not looked at its queue for this long hangs, even if the rest of its process runs.
LOOKS_WITHIN_SECONDS: Final = 2 * BEAT_SECONDS


class SteadyWorker(Worker):
    """A worker that does not depend on its host's clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - arq's own
        super().__init__(*args, **kwargs)
        self.name = f"{platform.node()}:{os.getpid()}:{new_id()}"
        self._looked_at = time.monotonic()
        self._cron_at: datetime | None = None

    def serve(self, queue_name: str) -> None:
        """Take jobs from this queue. Called before the worker looks for jobs for the first time."""
        self.queue_name = queue_name
        self.health_check_key = f"{queue_name}:health-check"

    async def heart_beat(self) -> None:
        """Called by arq after each look at the queue."""
        self._looked_at = time.monotonic()
        await self.run_cron(now(), 0)

    async def run_cron(self, n: datetime, delay: float, num_windows: int = 2) -> None:
        """Queue each due sweep once, by the platform's clock. Ignores arq's windows, which are for clocks that differ."""
        del delay, num_windows
        was_set_back = self._cron_at is not None and n < self._cron_at - SET_BACK
        self._cron_at = n
        for sweep in self.cron_jobs:
            if sweep.next_run is None and sweep.run_at_startup:
                sweep.next_run = n
            if sweep.next_run is None or was_set_back:
                sweep.calculate_next(n)
            due = sweep.next_run
            if due is None or n < due:
                continue
            # Planned from now, not from when it was due: if the clock jumps ahead, the sweeps in between are left out.
            sweep.calculate_next(n)
            id_ = f"{self.queue_name}:{sweep.name}:{int(due.timestamp() * 1000)}"
            if await self.pool.set(f"{id_}:claimed", b"1", nx=True, ex=CLAIM_SECONDS):
                await self.pool.enqueue_job(
                    sweep.name, _job_id=id_, _queue_name=self.queue_name, _defer_until=due_at_once(), _expires=KEPT_FOR
                )

    @asynccontextmanager
    async def beating(self, clock: Clock) -> AsyncIterator[None]:
        """While the body runs, write the heartbeat, as long as the worker looks at its queue."""
        stopping = asyncio.Event()
        self._looked_at = time.monotonic()
        task = asyncio.create_task(self._beat(clock, stopping))
        try:
            yield
        finally:
            stopping.set()
            await asyncio.gather(task, return_exceptions=True)

    async def _beat(self, clock: Clock, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            if time.monotonic() - self._looked_at < LOOKS_WITHIN_SECONDS:
                try:
                    await Heartbeat.beat(self.name, clock.offset_seconds)
                except PyMongoError as error:
                    log.warning("heartbeat_not_written", error=type(error).__name__)
                except Exception:
                    log.exception("heartbeat_not_written")
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await stopping.wait()
        with suppress(PyMongoError):
            await Heartbeat.end(self.name)
