"""Heartbeats of workers: which workers are alive, by MongoDB's clock, and how far their hosts' clocks differ from it."""

from datetime import datetime, timedelta
from typing import ClassVar, Final, Self

from pymongo import IndexModel

from app.clock import from_now
from app.documents.base import Stored

BEAT_SECONDS: Final = 3.0
#: A worker without a heartbeat for so long is dead, hung, or cut off.
ALIVE_FOR: Final = timedelta(seconds=5 * BEAT_SECONDS)
_KEPT_FOR: Final = timedelta(hours=1)


class Heartbeat(Stored):
    """One worker process; the id names it.

    beat_at: by MongoDB's clock. clock_offset_seconds: how far the host's clock is ahead of MongoDB's.
    """

    beat_at: datetime
    clock_offset_seconds: float
    expires_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "heartbeats"
        indexes: ClassVar[list[IndexModel]] = [IndexModel("expires_at", expireAfterSeconds=0)]

    @classmethod
    async def beat(cls, worker: str, clock_offset_seconds: float) -> None:
        """Record that this worker is alive."""
        fields = {
            "beat_at": "$$NOW", "clock_offset_seconds": clock_offset_seconds, "expires_at": from_now(_KEPT_FOR),
        }  # fmt: skip
        await cls.get_pymongo_collection().update_one({"_id": worker}, [{"$set": fields}], upsert=True)

    @classmethod
    async def end(cls, worker: str) -> None:
        """Delete the heartbeat: this worker stops."""
        await cls.get_pymongo_collection().delete_one({"_id": worker})

    @classmethod
    async def alive(cls) -> list[Self]:
        """The workers that are alive. A heartbeat from the future does not count: MongoDB's clock was ahead when it came."""
        lately = [{"$gt": ["$beat_at", from_now(-ALIVE_FOR)]}, {"$lt": ["$beat_at", from_now(ALIVE_FOR)]}]
        return await cls.find({"$expr": {"$and": lately}}).to_list()
