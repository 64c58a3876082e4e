"""The restore that is under way, if one is: while it puts documents in place, nobody else serves."""

from datetime import datetime
from typing import Any, Final, Literal, Self

from pymongo.asynchronous.database import AsyncDatabase

from app.documents.base import Stored, now

RESTORE: Final = "restore"
COLLECTION: Final = "restores"

#: loading: beside what is in use. Then everybody is sent away (closing), the documents change places (switching), and what
#: a backup cannot know is put right (mending).
RestoreState = Literal["loading", "closing", "switching", "mending"]
_CLOSED: Final = ("closing", "switching", "mending")


class Restore(Stored):
    """The one document of its collection.

    parts, photos: the names of those of the backup `set_id` that are in already. photos_missing: photos of these
    that a restore drill did not find. to_publish: the galleries that had an index.
    """

    set_id: str
    state: RestoreState
    parts: list[str]
    photos: list[str]
    photos_missing: int = 0
    to_publish: list[str]
    started_at: datetime

    class Settings(Stored.Settings):
        """Collection; asked by id only."""

        name = COLLECTION

    @classmethod
    async def standing(cls) -> Self | None:
        """The restore that is under way, or was when its process died."""
        return await cls.get(RESTORE)

    @classmethod
    async def begin(cls, set_id: str) -> Self:
        """Begin to load that backup, in place of one that was loaded in part."""
        restore = cls(id=RESTORE, set_id=set_id, state="loading", parts=[], photos=[], to_publish=[], started_at=now())
        fields = restore.model_dump(exclude={"id", "revision_id"})
        await cls.get_pymongo_collection().update_one({"_id": RESTORE}, {"$set": fields}, upsert=True)
        return restore

    async def turn(self, state: RestoreState) -> None:
        """Go over into another state."""
        await self.get_pymongo_collection().update_one({"_id": RESTORE}, {"$set": {"state": state}})
        self.state = state

    async def publish_later(self, gallery_ids: list[str]) -> None:
        """Remember the galleries that had an index when the backup was made."""
        await self.get_pymongo_collection().update_one({"_id": RESTORE}, {"$set": {"to_publish": gallery_ids}})
        self.to_publish = gallery_ids

    async def loaded(self, kind: Literal["parts", "photos"], name: str, missing: int = 0) -> None:
        """Remember that a part, or the photos of a list, are in: durably, and with them all that was written before.

        missing: how many of the photos are not.
        """
        update = {"$addToSet": {kind: name}, "$inc": {"photos_missing": missing}}
        await self.get_pymongo_collection().update_one({"_id": RESTORE}, update)
        getattr(self, kind).append(name)
        self.photos_missing += missing

    @classmethod
    async def end(cls) -> None:
        """Let everybody serve."""
        await cls.get_pymongo_collection().delete_one({"_id": RESTORE})


async def is_closed(database: "AsyncDatabase[dict[str, Any]]") -> bool:
    """Whether a restore is putting documents in place, so that nobody may work on them. Asked before documents are bound."""
    found = await database[COLLECTION].find_one({"_id": RESTORE, "state": {"$in": list(_CLOSED)}}, {"_id": 1})
    return found is not None


async def is_in_between(database: "AsyncDatabase[dict[str, Any]]") -> bool:
    """Whether a restore was cut off while collections changed places: some are the backup's, others are not yet."""
    return await database[COLLECTION].find_one({"_id": RESTORE, "state": "switching"}, {"_id": 1}) is not None
