"""`python -m workers.publisher GALLERY HOLDER`: one publication, in a process that may take all the time it needs."""

import asyncio
import os
import sys

import faiss
import structlog

from app.audit import by_system
from app.config import PlaceRefused, Settings
from app.errors import Problem
from app.logs import configure_service_logging
from app.runtime import open_runtime
from app.use_cases.publish import publish
from storage.generations import GenerationStoreUnavailable

log = structlog.get_logger(__name__)

#: Searches and faces go first.
NICENESS = 10


async def _publish(settings: Settings, gallery_id: str, holder: str) -> None:
    async with open_runtime(settings) as runtime:
        await publish(runtime, by_system("index.publish"), gallery_id, holder=holder)


def main() -> int:
    """Publish the gallery that the command line names; the exit status tells whether it came to anything."""
    gallery_id, holder = sys.argv[1:]
    os.nice(NICENESS)
    faiss.omp_set_num_threads(1)
    settings = Settings()
    configure_service_logging(settings.log_level)
    try:
        asyncio.run(_publish(settings, gallery_id, holder))
    except (Problem, GenerationStoreUnavailable, PlaceRefused) as problem:
        log.warning("publication_given_up", gallery=gallery_id, reason=str(problem))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
