"""What one caller does in an hour, in figures: whom it asks about with one face, finds, fails to name, erases and reads.

An hour is one of the clock, so around its turn twice as much may pass within sixty minutes.
"""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import ClassVar, Final

from pymongo import IndexModel, ReturnDocument, WriteConcern
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from app.concurrency import all_of
from app.documents.base import Stored, now
from app.keys import KeyRing

HOUR: Final = timedelta(hours=1)
#: For counts outside of a transaction. A count that is lost with a server only leaves a little more room.
_AT_ONCE: Final = WriteConcern(w=1, j=False)
#: Enough to tell the people of one hour apart.
PERSON_BYTES: Final = 8


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
        cls,
        keys: KeyRing,
        caller_id: str,
        bucket: int,
        identity_id: str,
        limit: int,
        session: AsyncClientSession | None,
    ) -> bool:
        """Whether the identity is among the first `limit` that the caller asks about with the face; from now on it is.

        bucket: the part of the space that the face lies in. False also means that the transaction is over: the caller raises.
        """
        id_, over = cls._of_this_hour(keys, caller_id, bucket)
        identity = keys.keyed_hash("face-budget", f"{id_}|{identity_id}".encode())
        room = {"_id": id_, "$or": [{"identities": identity}, {f"identities.{limit - 1}": {"$exists": False}}]}
        change = {"$addToSet": {"identities": identity}, "$setOnInsert": {"expires_at": over}}
        collection = cls.get_pymongo_collection()
        try:
            await collection.update_one(room, change, upsert=True, session=session)
        except DuplicateKeyError:
            if session is not None:  # in a transaction, two first ones conflict, and the later one starts again
                return False
            # There is no room, or another first one at the same moment has made the document.
            return (await collection.update_one(room, change)).matched_count == 1
        return True

    @classmethod
    async def admits_finds(
        cls, keys: KeyRing, caller_id: str, bucket: int, identity_ids: Sequence[str], limit: int
    ) -> bool:
        """Whether the face has room left; then the identities that a search found with it are among those asked about.

        False does not depend on the identities. The search that reaches the limit is still admitted.
        """
        id_, over = cls._of_this_hour(keys, caller_id, bucket)
        found = [keys.keyed_hash("face-budget", f"{id_}|{identity_id}".encode()) for identity_id in identity_ids]
        room = {"_id": id_, f"identities.{limit - 1}": {"$exists": False}}
        change = {"$addToSet": {"identities": {"$each": found}}, "$setOnInsert": {"expires_at": over}}
        collection = cls.get_pymongo_collection().with_options(write_concern=_AT_ONCE)
        try:
            await collection.update_one(room, change, upsert=True)
        except DuplicateKeyError:  # as in `admits`
            return (await collection.update_one(room, change)).matched_count == 1
        return True

    @staticmethod
    def _of_this_hour(keys: KeyRing, caller_id: str, bucket: int) -> tuple[str, datetime]:
        """The id of the caller's budget for the face in this hour, and when the hour is over."""
        began, over = this_hour()
        return keys.keyed_hash("face-budget", f"{caller_id}|{bucket}|{began.isoformat()}".encode()).hex(), over


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
        id_, over = cls._of_this_hour(keys, caller_id)
        after = await cls.get_pymongo_collection().with_options(write_concern=_AT_ONCE).find_one_and_update(
            {"_id": id_},
            {"$inc": {"total": 1}, "$setOnInsert": {"expires_at": over}},
            upsert=True,
            return_document=ReturnDocument.AFTER,
        )  # fmt: skip
        return 1 if after is None else int(after["total"])

    @classmethod
    async def so_far(cls, keys: KeyRing, caller_id: str) -> int:
        """How many there are in this hour."""
        id_, _ = cls._of_this_hour(keys, caller_id)
        row = await cls.get_pymongo_collection().find_one({"_id": id_}, {"total": 1})
        return 0 if row is None else int(row["total"])

    @classmethod
    def _of_this_hour(cls, keys: KeyRing, caller_id: str) -> tuple[str, datetime]:
        """The id of the caller's count in this hour, and when the hour is over."""
        began, over = this_hour()
        return keys.keyed_hash(cls.LABEL, f"{caller_id}|{began.isoformat()}".encode()).hex(), over


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


class UnknownNames(_CallerHour):
    """How many names that belong to nobody one caller asked about in one hour."""

    LABEL = "unknown-names"

    class Settings(_CallerHour.Settings):
        """Collection and indexes."""

        name = "unknown_names"


class Finds(_CallerHour):
    """How many searches of one caller found one identity in one hour."""

    LABEL = "finds"

    class Settings(_CallerHour.Settings):
        """Collection and indexes."""

        name = "finds"

    @classmethod
    async def add_all(cls, keys: KeyRing, caller_id: str, identity_ids: Sequence[str]) -> dict[str, int]:
        """One more for each of the identities; how many there are now, by identity.

        Counted before it is read: of searches at the same moment no more are admitted than of searches one after the other.
        """
        totals = await all_of(*(cls.add(keys, f"{caller_id}|{identity_id}") for identity_id in identity_ids))
        return dict(zip(identity_ids, totals, strict=True))


class PeopleRead(Stored):
    """Whose attributes one caller was shown in one hour; the id is a keyed hash of the two.

    people: keyed hashes, so that nobody reads here who looked at whom. Not more than an alarm needs. before: how many there were
    before the last ones.
    """

    people: list[bytes]
    before: int
    expires_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "people_read"
        indexes: ClassVar[list[IndexModel]] = [IndexModel("expires_at", expireAfterSeconds=0)]

    @classmethod
    async def reaches(cls, keys: KeyRing, caller_id: str, identity_ids: Collection[str], limit: int) -> bool:
        """Count these people. True for the one call in the hour by which `limit` different people are reached.

        One update of one document decides, so that of calls at the same moment one is told.
        """
        began, over = this_hour()
        id_ = keys.keyed_hash("people-read", f"{caller_id}|{began.isoformat()}".encode()).hex()
        # More of one page cannot matter.
        some = sorted(identity_ids)[:limit]
        shown = [keys.keyed_hash("people-read", f"{id_}|{one}".encode())[:PERSON_BYTES] for one in some]
        known: dict[str, object] = {"$ifNull": ["$people", []]}
        is_full = {"$gte": [{"$size": known}, limit]}
        fields = {
            "people": {"$cond": [is_full, known, {"$setUnion": [known, {"$literal": shown}]}]},
            "before": {"$size": known}, "expires_at": over,
        }  # fmt: skip
        after = await cls.get_pymongo_collection().with_options(write_concern=_AT_ONCE).find_one_and_update(
            {"_id": id_}, [{"$set": fields}], {"before": 1, "total": {"$size": "$people"}}, upsert=True,
            return_document=ReturnDocument.AFTER,
        )  # fmt: skip
        return after is not None and after["before"] < limit <= after["total"]


def this_hour() -> tuple[datetime, datetime]:
    """When the hour began, and when it is over."""
    began = now().replace(minute=0, second=0, microsecond=0)
    return began, began + HOUR
