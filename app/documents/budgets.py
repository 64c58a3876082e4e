"""Slow probing in figures: whom one caller asked about with one face, and how often in vain, in each hour.

An hour is one of the clock, so around its turn twice as much may pass within sixty minutes.
"""

from datetime import datetime, timedelta
from typing import ClassVar, Final

from pymongo import IndexModel, ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from app.documents.base import Stored, now
from app.keys import KeyRing

HOUR: Final = timedelta(hours=1)


class FaceBudget(Stored):
    """Whom one caller asked about with one face in one hour; the id is a keyed hash of the three.

    identities: keyed hashes too, so that nobody reads here who looks like whom.
    """

    identities: list[bytes]
    expires_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "face_budgets"
        indexes: ClassVar[list[IndexModel]] = [IndexModel("expires_at", expireAfterSeconds=0)]

    @classmethod
    async def admits(
        cls, keys: KeyRing, caller_id: str, bucket: int, identity_id: str, limit: int, session: AsyncClientSession
    ) -> bool:
        """Whether the identity is among the first `limit` that the caller asks about with the face; from now on it is.

        bucket: the part of the space that the face lies in. False also means that the transaction is over: the caller raises.
        """
        began, over = this_hour()
        id_ = keys.keyed_hash("face-budget", f"{caller_id}|{bucket}|{began.isoformat()}".encode()).hex()
        identity = keys.keyed_hash("face-budget", f"{id_}|{identity_id}".encode())
        room = {"_id": id_, "$or": [{"identities": identity}, {f"identities.{limit - 1}": {"$exists": False}}]}
        change = {"$addToSet": {"identities": identity}, "$setOnInsert": {"expires_at": over}}
        try:
            await cls.get_pymongo_collection().update_one(room, change, upsert=True, session=session)
        except DuplicateKeyError:
            return False
        return True


class _CallerHour(Stored):
    """How often something happened for one caller in one hour. The id is a keyed hash of caller and hour, under LABEL."""

    LABEL: ClassVar[str]

    total: int
    expires_at: datetime

    class Settings(Stored.Settings):
        """Indexes; each count names its collection."""

        indexes: ClassVar[list[IndexModel]] = [IndexModel("expires_at", expireAfterSeconds=0)]

    @classmethod
    async def add(cls, keys: KeyRing, caller_id: str) -> int:
        """One more; how many there are now.

        Outside the action's transaction: there all actions of one caller would conflict.
        """
        began, over = this_hour()
        id_ = keys.keyed_hash(cls.LABEL, f"{caller_id}|{began.isoformat()}".encode()).hex()
        after = await cls.get_pymongo_collection().find_one_and_update(
            {"_id": id_},
            {"$inc": {"total": 1}, "$setOnInsert": {"expires_at": over}},
            upsert=True,
            return_document=ReturnDocument.AFTER,
        )
        return 1 if after is None else int(after["total"])


class NonMatches(_CallerHour):
    """How many verifications ended without a match for one caller in one hour."""

    LABEL = "non-matches"

    class Settings(_CallerHour.Settings):
        """Collection and indexes."""

        name = "non_matches"


class Erasures(_CallerHour):
    """How many people one caller erased in one hour."""

    LABEL = "erasures"

    class Settings(_CallerHour.Settings):
        """Collection and indexes."""

        name = "erasures"


def this_hour() -> tuple[datetime, datetime]:
    """When the hour began, and when it is over."""
    began = now().replace(minute=0, second=0, microsecond=0)
    return began, began + HOUR
