"""Counts of what one caller does in an hour: claims with one face, finds, unknown names, erasures and readings.

An hour is a clock hour. So within sixty minutes across its end, a caller may do twice as much.
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
#: For counts outside a transaction. If a server fails and loses a count, the caller has slightly more room.
_AT_ONCE: Final = WriteConcern(w=1, j=False)
#: 64 bits of the hash. Two of 10,000 people then share a value with a probability of about 3 in 10^12.
PERSON_BYTES: Final = 8


class FaceBudget(Stored):
    """The identities that one caller asked about with one face in one hour. The id is a keyed hash of the three.

    identities: keyed hashes too, so that a reader of the database does not learn who looks like whom.
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
        """Count the identity. Returns whether it is among the first `limit` that the caller asks about with the face.

        bucket: the part of the embedding space that the face lies in. False also ends the transaction, so the caller must raise.
        """
        id_, over = cls._of_this_hour(keys, caller_id, bucket)
        identity = keys.keyed_hash("face-budget", f"{id_}|{identity_id}".encode())
        room = {"_id": id_, "$or": [{"identities": identity}, {f"identities.{limit - 1}": {"$exists": False}}]}
        change = {"$addToSet": {"identities": identity}, "$setOnInsert": {"expires_at": over}}
        collection = cls.get_pymongo_collection()
        try:
            await collection.update_one(room, change, upsert=True, session=session)
        except DuplicateKeyError:
            if session is not None:  # two first claims in transactions conflict instead, so there is no room
                return False
            # There is no room, or another claim has made the document at the same moment.
            return (await collection.update_one(room, change)).matched_count == 1
        return True

    @classmethod
    async def admits_finds(
        cls, keys: KeyRing, caller_id: str, bucket: int, identity_ids: Sequence[str], limit: int
    ) -> bool:
        """Whether the budget of the face has room. If it has, count the identities that a search found with the face.

        The result does not depend on the identities. The search that reaches the limit is still admitted.
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
    """A count for one caller in one hour. The id is a keyed hash of caller and hour, made for the purpose LABEL."""

    LABEL: ClassVar[str]

    total: int
    expires_at: datetime

    class Settings(Stored.Settings):
        """Indexes. Each subclass names its collection."""

        indexes: ClassVar[list[IndexModel]] = [IndexModel("expires_at", expireAfterSeconds=0)]

    @classmethod
    async def add(cls, keys: KeyRing, caller_id: str) -> int:
        """Add one to the count. Returns the new count.

        Runs outside the action's transaction, because there all actions of one caller would conflict.
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
        """The count of this hour."""
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
    """How many claims on unknown names one caller made in one hour."""

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
        """Add one to the count of each identity. Returns the new counts, by identity.

        Each count is raised before it is read. So parallel searches are admitted no more often than successive ones.
        """
        totals = await all_of(*(cls.add(keys, f"{caller_id}|{identity_id}") for identity_id in identity_ids))
        return dict(zip(identity_ids, totals, strict=True))


class PeopleRead(Stored):
    """The people whose attributes one caller was shown in one hour. The id is a keyed hash of caller and hour.

    people: keyed hashes, so that a reader of the database does not learn who looked at whom. No more are stored than an alarm
    needs. before: how many there were before the last call.
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
        """Count these people. True for the one call in the hour that reaches `limit` different people.

        One update of one document decides. So of several parallel calls only one gets True.
        """
        began, over = this_hour()
        id_ = keys.keyed_hash("people-read", f"{caller_id}|{began.isoformat()}".encode()).hex()
        # `limit` people reach the alarm, so more of one page make no difference.
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
