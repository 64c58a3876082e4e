"""`idem worker`: screening and sweeps, from the queue."""

import asyncio

from app.cli.settings import read_settings
from app.cli.waiting import WaitOption, wait_for_mongo
from workers.main import create_worker


def worker(wait: WaitOption = 0) -> None:
    """Run one worker process until SIGTERM; it finishes the jobs that it has begun."""
    settings = read_settings()
    wait_for_mongo(settings.mongodb_uri, seconds=wait)
    asyncio.set_event_loop(asyncio.new_event_loop())  # arq asks for one while it is being built
    create_worker(settings).run()
