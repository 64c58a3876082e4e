"""Stored failed logins: how many there were in a row, and when the next attempt may be made.

Times come from MongoDB (`$$NOW`). So all processes share one clock, and a wrong clock of a process has no effect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar

from pymongo import ASCENDING, IndexModel, ReturnDocument
from pymongo.errors import DuplicateKeyError

from app.documents.base import Stored

#: How long an address is known to a name after a successful login there.
KNOWN_SECONDS = 30 * 24 * 3600
#: 2 to this power seconds is longer than any wait.
_DOUBLINGS = 20

#: Means no wait. `$$NOW` cannot mean it: a command that began a millisecond earlier would read it as a wait.
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
#: No wait is longer (see LOGIN_WAIT_MAXIMUM_SECONDS). A longer one was written while MongoDB's clock was ahead, so it counts
#: as over.
LONGEST_WAIT_SECONDS = 86_400
_UNTIL = {"$subtract": [{"$ifNull": ["$wait_until", _LONG_AGO]}, "$$NOW"]}
_LEFT = {"$cond": [{"$gt": [_UNTIL, LONGEST_WAIT_SECONDS * 1000]}, 0, _UNTIL]}
_IS_WAITING = {"$gt": [_LEFT, 0]}
_IS_FORGOTTEN = {"$lte": [{"$ifNull": ["$forgotten_at", _LONG_AGO]}, "$$NOW"]}
_IS_KNOWN = {"$gt": [{"$ifNull": ["$known_until", _LONG_AGO]}, "$$NOW"]}


@dataclass(frozen=True, slots=True)
class Waits:
    """The waits for failures. After `failures` failures the wait is `first_seconds`.

    Each further failure doubles the wait, up to `longest_seconds`. forgotten_after_seconds: the failures are forgotten after
    this time without another failure, counted from the end of the last wait.
    """

    failures: int
    first_seconds: int
    longest_seconds: int
    forgotten_after_seconds: int


#: For counts that cause no wait. They are kept for longer than any wait, so that they outlast an attacker who waits.
NEVER = Waits(2**31, 0, 0, 2 * LONGEST_WAIT_SECONDS)


@dataclass(frozen=True, slots=True)
class Remembered:
    """The state of a name, an address, or a name at an address. left_seconds: of the wait; 0 without a wait."""

    failures: int
    left_seconds: float
    is_known: bool


NOTHING = Remembered(failures=0, left_seconds=0, is_known=False)


class FailedLogins(Stored):
    """Failures of one name, of one address, or of one name in one place or network. The id is a keyed hash of these.

    of: for a name in a place or network, the id of the name. is_network: whether this is the narrowest network around one
    subscriber. known_until: the address is known to the name until then.
    """

    of: str | None = None
    is_network: bool = False
    failures: int
    wait_until: datetime
    forgotten_at: datetime
    known_until: datetime | None = None
    expires_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "failed_logins"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0, name="purge"),
            IndexModel([("of", ASCENDING)], sparse=True, name="of"),
        ]

    @classmethod
    async def remembered(cls, ids: Sequence[str]) -> dict[str, Remembered]:
        """The present state of each of these ids. Ids without a document are left out."""
        cursor = await cls.get_pymongo_collection().aggregate(
            [{"$match": {"_id": {"$in": list(ids)}}}, {"$project": _SEEN}]
        )
        return {row["_id"]: _remembered(row) async for row in cursor}

    @classmethod
    async def note_failure(
        cls, id_: str, waits: Waits, of: str | None = None, *, is_network: bool = False
    ) -> Remembered:
        """Count a failure, unless there is a wait. Returns the state before: if it has a wait, the failure did not count."""
        beyond = {"$max": [0, {"$min": [_DOUBLINGS, {"$subtract": ["$$n", waits.failures]}]}]}
        seconds = {"$min": [waits.longest_seconds, {"$multiply": [waits.first_seconds, {"$pow": [2, beyond]}]}]}
        wait = {"$cond": [{"$lt": ["$$n", waits.failures]}, 0, {"$multiply": [1000, seconds]}]}
        forgotten_at = {"$add": ["$$NOW", "$$wait", waits.forgotten_after_seconds * 1000]}
        counted: dict[str, Any] = {
            "failures": "$$n",
            "wait_until": {"$cond": [{"$eq": ["$$wait", 0]}, _LONG_AGO, {"$add": ["$$NOW", "$$wait"]}]},
            "forgotten_at": forgotten_at,
            "expires_at": {"$max": ["$expires_at", forgotten_at]},
        }
        if of is not None:
            counted |= {"of": of, "is_network": is_network}
        number = {"$cond": [_IS_FORGOTTEN, 1, {"$add": ["$failures", 1]}]}
        merged = {"$mergeObjects": ["$$ROOT", counted]}
        then = {"$let": {"vars": {"n": number}, "in": {"$let": {"vars": {"wait": wait}, "in": merged}}}}
        return await cls._change(id_, [{"$replaceWith": {"$cond": [_IS_WAITING, "$$ROOT", then]}}])

    @classmethod
    async def make_known(cls, id_: str, of: str) -> Remembered:
        """Forget the failures of a name at an address where it has just succeeded. Returns the state before."""
        known_until = {"$add": ["$$NOW", KNOWN_SECONDS * 1000]}
        fresh = {"failures": 0, "wait_until": _LONG_AGO, "forgotten_at": "$$NOW", "known_until": known_until}
        return await cls._change(id_, [{"$set": {"of": of, **fresh, "expires_at": known_until}}])

    @classmethod
    async def take_back(cls, ids: Sequence[str], failures: int) -> None:
        """Subtract this number of failures from each."""
        left = {"$max": [0, {"$subtract": ["$failures", failures]}]}
        await cls.get_pymongo_collection().update_many({"_id": {"$in": list(ids)}}, [{"$set": {"failures": left}}])

    @classmethod
    async def networks_of(cls, name: str) -> int:
        """How many networks have failures of the name that are not forgotten."""
        rows = await cls.get_pymongo_collection().aggregate(
            [
                {"$match": {"of": name, "is_network": True, "failures": {"$gt": 0}}},
                {"$match": {"$expr": {"$not": [_IS_FORGOTTEN]}}},
                {"$count": "n"},
            ]
        )
        return sum([row["n"] async for row in rows])

    @classmethod
    async def forgive(cls, name: str) -> None:
        """Forget the failures of a name at all addresses."""
        await cls.get_pymongo_collection().delete_one({"_id": name})
        none = {"failures": 0, "wait_until": _LONG_AGO}
        await cls.get_pymongo_collection().update_many({"of": name}, [{"$set": none}])

    @classmethod
    async def _change(cls, id_: str, pipeline: list[dict[str, Any]]) -> Remembered:
        try:
            row = await cls.get_pymongo_collection().find_one_and_update(
                {"_id": id_}, pipeline, _SEEN, upsert=True, return_document=ReturnDocument.BEFORE
            )
        except DuplicateKeyError:  # two first failures at the same moment: the other one has inserted it
            return await cls._change(id_, pipeline)
        return NOTHING if row is None else _remembered(row)


#: The fields of `Remembered`, calculated with MongoDB's clock.
_SEEN: Mapping[str, Any] = {
    "failures": {"$cond": [_IS_FORGOTTEN, 0, "$failures"]},
    "left": {"$max": [0, _LEFT]},
    "is_known": _IS_KNOWN,
}


def _remembered(row: Mapping[str, Any]) -> Remembered:
    return Remembered(int(row["failures"]), float(row["left"]) / 1000, bool(row["is_known"]))
