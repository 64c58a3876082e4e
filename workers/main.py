"""arq's settings: what this worker runs, how often, and how long a job may take."""

from contextlib import AsyncExitStack
from typing import Any, cast

from arq import cron, func
from arq.typing import StartupShutdown, WorkerCoroutine
from arq.worker import Worker

from app.config import Settings
from app.logs import configure_service_logging
from app.queue import PUBLISH, SCAN, SCREEN, decode_job, encode_job, redis_settings
from app.runtime import open_runtime
from app.use_cases import sequence
from workers import jobs
from workers.steady import SteadyWorker

#: A screening takes milliseconds. arq keeps a killed worker's job for the longest timeout of all jobs (hours), so the sweep of
#: overdue screenings queues it again under another id.
JOB_TIMEOUT_SECONDS = 10
#: One slice of a scan is a few seconds long; the clusters of a million pairs take half a minute.
SCAN_TIMEOUT_SECONDS = 300
#: Erasures stand in line with enrolments, some twenty a second.
ERASURES_TIMEOUT_SECONDS = 300
#: The sweep may list the names of years, and may write a lost store again, object by object.
EVIDENCE_TIMEOUT_SECONDS = 3600
#: After an upgrade that changes the rules of spelling everybody's hashes are made again, some hundred a second.
LOOKUPS_TIMEOUT_SECONDS = 6 * 3600
#: A publisher's lease tells whether it lives; this only bounds what arq remembers of it.
PUBLISH_TIMEOUT_SECONDS = 6 * 3600
#: arq looks for work every half second by default: too slow for an officer who waits.
POLL_SECONDS = 0.05
#: Tries are counted by the use case, which knows which ones count.
UNCOUNTED_TRIES = 1_000_000


def _job(coroutine: object) -> WorkerCoroutine:
    """Arq types its jobs as protocols with untyped arguments; ours name what they take."""
    return cast("WorkerCoroutine", coroutine)


def create_worker(settings: Settings) -> Worker:
    """A worker that opens the same Runtime as the API, without loading the model's weights."""
    configure_service_logging(settings.log_level)
    opened = AsyncExitStack()

    async def start(context: dict[Any, Any]) -> None:
        runtime = await opened.enter_async_context(open_runtime(settings, keep_up=True))
        await opened.enter_async_context(sequence.kept_up(runtime))
        await opened.enter_async_context(worker.beating(runtime.clock))
        worker.serve(runtime.queue.name)
        context["runtime"] = runtime

    async def stop(context: dict[Any, Any]) -> None:
        del context
        await opened.aclose()

    every = set(range(0, 60, settings.sweep_interval_seconds))
    worker = SteadyWorker(
        functions=[
            func(_job(jobs.screen), name=SCREEN, timeout=JOB_TIMEOUT_SECONDS, keep_result=0, max_tries=UNCOUNTED_TRIES),
            func(_job(jobs.scan), name=SCAN, timeout=SCAN_TIMEOUT_SECONDS, keep_result=0, max_tries=UNCOUNTED_TRIES),
            func(_job(jobs.publish), name=PUBLISH, timeout=PUBLISH_TIMEOUT_SECONDS, keep_result=0, max_tries=1),
        ],
        cron_jobs=[
            cron(
                _job(jobs.sweep_overdue), second=every, timeout=JOB_TIMEOUT_SECONDS, run_at_startup=True, keep_result=0
            ),
            cron(_job(jobs.sweep_index), second=every, timeout=JOB_TIMEOUT_SECONDS, keep_result=0),
            cron(_job(jobs.sweep_scans), second=every, timeout=JOB_TIMEOUT_SECONDS, keep_result=0),
            cron(
                _job(jobs.sweep_erasures),
                minute=set(range(0, 60, settings.erasure_sweep_minutes)),
                second=31,
                timeout=ERASURES_TIMEOUT_SECONDS,
                keep_result=0,
            ),
            cron(
                _job(jobs.sweep_lookups), minute=41, timeout=LOOKUPS_TIMEOUT_SECONDS, run_at_startup=True, keep_result=0
            ),
            cron(_job(jobs.sweep_audit_log), second=13, timeout=JOB_TIMEOUT_SECONDS, keep_result=0),
            cron(_job(jobs.sweep_evidence), second={3, 23, 43}, timeout=EVIDENCE_TIMEOUT_SECONDS, keep_result=0),
            cron(_job(jobs.sweep_all_evidence), hour=3, minute=7, timeout=EVIDENCE_TIMEOUT_SECONDS, keep_result=0),
            cron(_job(jobs.sweep_orphan_photos), minute=17, timeout=3600, keep_result=0),
        ],
        queue_name=settings.queue_name,
        redis_settings=redis_settings(settings),
        job_serializer=encode_job,
        job_deserializer=decode_job,
        on_startup=cast("StartupShutdown", start),
        on_shutdown=cast("StartupShutdown", stop),
        max_jobs=settings.worker_max_jobs,
        poll_delay=POLL_SECONDS,
        job_completion_wait=settings.shutdown_grace_seconds - 1,
        keep_result=0,
    )
    return worker
