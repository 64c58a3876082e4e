"""Samples that were removed from identities, and what is still to be done for each."""

from collections.abc import Sequence
from datetime import datetime
from typing import ClassVar

from pymongo import IndexModel

from app.documents.base import Stored, now


class SampleRemoval(Stored):
    """One sample that was removed; its id is the sample's.

    photo_key: of the photo, until it is deleted. unsettled_since: since when the deletion is due; None when it is done.
    """

    gallery_id: str
    identity_id: str
    removed_at: datetime
    event_id: str
    index_purge_by: datetime
    photo_key: str | None
    unsettled_since: datetime | None

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "sample_removals"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel("unsettled_since", partialFilterExpression={"unsettled_since": {"$type": "date"}}),
            IndexModel("identity_id"),
        ]

    @classmethod
    async def of(cls, identity_id: str) -> list[datetime]:
        """When samples of the identity were removed, the oldest first."""
        return [one.removed_at for one in await cls.find({"identity_id": identity_id}).sort("removed_at").to_list()]

    @classmethod
    async def unsettled(cls, before: datetime, limit: int) -> Sequence["SampleRemoval"]:
        """Those with something left to do since before that moment, the longest waiting first; at most `limit`."""
        return await cls.find({"unsettled_since": {"$lt": before}}).sort("unsettled_since").limit(limit).to_list()

    async def settled(self) -> None:
        """Record that nothing is left to do."""
        done = {"photo_key": None, "unsettled_since": None}
        await self.get_pymongo_collection().update_one({"_id": self.id}, {"$set": done})

    async def put_off(self) -> None:
        """Put it behind the others: it could not be done now."""
        await self.get_pymongo_collection().update_one({"_id": self.id}, {"$set": {"unsettled_since": now()}})
