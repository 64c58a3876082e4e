"""Heartbeats of workers: which of them live, by MongoDB's clock, and how far their hosts' clocks are from it."""

from datetime import datetime, timedelta
from typing import ClassVar, Final, Self

from pymongo import IndexModel

from app.clock import from_now
from app.documents.base import Stored

BEAT_SECONDS: Final = 3.0
#: A worker that has not been heard of for so long is dead, hung, or cut off.
ALIVE_FOR: Final = timedelta(seconds=5 * BEAT_SECONDS)
_KEPT_FOR: Final = timedelta(hours=1)


class Heartbeat(Stored):
    """One worker process; the id names it. beat_at: by MongoDB's clock. clock_offset_seconds: its host's clock ahead of it."""

    beat_at: datetime
    clock_offset_seconds: float
    expires_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "heartbeats"
        indexes: ClassVar[list[IndexModel]] = [IndexModel("expires_at", expireAfterSeconds=0)]

    @classmethod
    async def beat(cls, worker: str, clock_offset_seconds: float) -> None:
        """This worker gets on with its work."""
        fields = {
            "beat_at": "$$NOW", "clock_offset_seconds": clock_offset_seconds, "expires_at": from_now(_KEPT_FOR),
        }  # fmt: skip
        await cls.get_pymongo_collection().update_one({"_id": worker}, [{"$set": fields}], upsert=True)

    @classmethod
    async def end(cls, worker: str) -> None:
        """This worker stops."""
        await cls.get_pymongo_collection().delete_one({"_id": worker})

    @classmethod
    async def alive(cls) -> list[Self]:
        """Those that live. Beats from a time at which MongoDB's clock was ahead tell nothing."""
        lately = [{"$gt": ["$beat_at", from_now(-ALIVE_FOR)]}, {"$lt": ["$beat_at", from_now(ALIVE_FOR)]}]
        return await cls.find({"$expr": {"$and": lately}}).to_list()
