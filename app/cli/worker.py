"""`idem worker`: screening and sweeps, from the queue."""

import asyncio

import structlog
import typer

from app.cli.settings import read_settings, require_engine
from app.cli.waiting import WaitOption, wait_for_mongo
from app.starting import UNUSABLE_CONFIGURATION, as_sentence
from workers.main import create_worker

log = structlog.get_logger(__name__)


def worker(wait: WaitOption = 0) -> None:
    """Run one worker process until SIGTERM; it finishes the jobs that it has begun."""
    settings = read_settings()
    require_engine(settings)
    wait_for_mongo(settings.mongodb_uri, seconds=wait)
    asyncio.set_event_loop(asyncio.new_event_loop())  # arq asks for one while it is being built
    process = create_worker(settings)
    try:
        process.run()
    except Exception as error:
        sentence = as_sentence(error)
        if sentence is None:
            raise
        has_worked = "runtime" in process.ctx
        event = "worker_ended" if has_worked else "worker_not_started"
        log.critical(event, reason=sentence, error=type(error).__name__)
        raise typer.Exit(1 if has_worked else UNUSABLE_CONFIGURATION) from None
