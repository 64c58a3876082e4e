"""Nobody serves while a restore puts documents in place: who is running leaves, who starts waits, and the restore sees them go.

A process holds more than its connections: keys, galleries' vectors, who may call. So it does not pause for a restore, it
ends itself as if by SIGTERM, with its requests in flight answered, and is started again by whatever watches over it.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import structlog
from pymongo import AsyncMongoClient
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import PyMongoError
from pymongo.read_concern import ReadConcern

from app.documents.restores import is_closed
from app.errors import NotReady

log = structlog.get_logger(__name__)

LOOK_SECONDS: Final = 1.0

Database = AsyncDatabase[dict[str, Any]]


def application_name(database: str, *, restoring: bool = False) -> str:
    """How MongoDB knows the connections of a process that works on that database."""
    return f"idem-restore:{database}" if restoring else f"idem:{database}"


async def admitted(database: Database, *, waits: bool) -> None:
    """Return once no restore forbids it. Raises NotReady while one does, for whoever does not wait."""
    told = False
    while await is_closed(database):
        if not waits:
            raise NotReady("A backup is being put in place: `idem restore` must come to its end first.")
        if not told:
            log.warning("restore_awaited")
            told = True
        await asyncio.sleep(LOOK_SECONDS)


@asynccontextmanager
async def leaving_for_a_restore(database: Database) -> AsyncIterator[None]:
    """End this process, in its own good order, when a restore begins to put documents in place."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            with suppress(PyMongoError):  # it is away: then a restore cannot go on either, until it sees us
                if await is_closed(database):
                    log.warning("leaving_for_a_restore")
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def still_here(mongo: "AsyncMongoClient[Any]", database: str) -> list[str]:
    """The addresses of those who are connected and work on that database, whatever they do at the moment; sorted.

    Those of other users of MongoDB are not seen, unless this one may see them.
    """
    connected = await mongo.get_database("admin", read_concern=ReadConcern("local")).aggregate([
        {"$currentOp": {"idleConnections": True, "idleSessions": False}},
        {"$match": {"appName": application_name(database)}},
        {"$group": {"_id": "$client"}},
    ])  # fmt: skip
    return sorted([str(row["_id"]).rpartition(":")[0] async for row in connected])
