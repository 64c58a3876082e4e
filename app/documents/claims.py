"""What may happen once only: requests with an idempotency key, and selfies presented for an identity."""

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, Literal, Self

from pymongo import IndexModel, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import BulkWriteError, DuplicateKeyError

from app.documents.base import Stored, new_id, now

#: A claim whose process died is free after this time. A running process renews its claim.
CLAIM_LEASE = timedelta(seconds=5)
RENEW_SECONDS = 1.5
#: MongoDB's code for a second document with the same key.
_DUPLICATE_KEY = 11000


class IdempotencyClaim(Stored):
    """One idempotency key of one caller: first held while the request runs, then pointing at the action's event.

    It holds a reference, not the answer: `event_id` names the audit event, whose subject is what was made.
    """

    fingerprint: bytes
    owner: str
    state: Literal["running", "done"]
    event_id: str | None = None
    status_code: int | None = None
    score: float | None = None
    lease_until: datetime
    expires_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "idempotency_claims"
        indexes: ClassVar[list[IndexModel]] = [IndexModel("expires_at", expireAfterSeconds=0)]

    @classmethod
    async def begin(cls, key: str, fingerprint: bytes, keep: timedelta) -> tuple[Self, bool]:
        """Claim a key. Returns the claim that stands, and whether it is ours to carry out."""
        moment = now()
        ours = cls(
            id=key,
            fingerprint=fingerprint,
            owner=new_id(),
            state="running",
            lease_until=moment + CLAIM_LEASE,
            expires_at=moment + keep,
        )
        try:
            await ours.insert()
        except DuplicateKeyError:
            fields = ours.model_dump(exclude={"id", "revision_id"})
            dead = {
                "_id": key,
                "$or": [
                    {"state": "running", "lease_until": {"$lt": moment}},
                    {"expires_at": {"$lt": moment}},
                ],
            }
            taken = await cls.get_pymongo_collection().update_one(dead, {"$set": fields})
            if taken.matched_count:
                return ours, True
            standing = await cls.get(key)
            return (standing, False) if standing is not None else await cls.begin(key, fingerprint, keep)
        return ours, True

    async def renew(self) -> bool:
        """Keep the key for another lease. False when the claim is settled, given back or lost."""
        mine = {"_id": self.id, "owner": self.owner, "state": "running"}
        renewed = {"$set": {"lease_until": now() + CLAIM_LEASE}}
        return bool((await self.get_pymongo_collection().update_one(mine, renewed)).matched_count)

    def seconds_left(self) -> int:
        """Whole seconds until another request may take the key, at least 1, unless its owner renews it."""
        return max(1, min(math.ceil((self.lease_until - now()).total_seconds()), int(CLAIM_LEASE.total_seconds())))

    async def settle(self, session: AsyncClientSession, event_id: str, status_code: int, score: float | None) -> bool:
        """Point at the action's event, in its transaction; False when the claim was lost to another request."""
        done = {"state": "done", "event_id": event_id, "status_code": status_code, "score": score}
        result = await self.get_pymongo_collection().update_one(
            {"_id": self.id, "owner": self.owner, "state": "running"}, {"$set": done}, session=session
        )
        return bool(result.matched_count)

    async def abandon(self) -> None:
        """Give the key back: the request was refused, and refusals are not kept."""
        mine = {"_id": self.id, "owner": self.owner, "state": "running"}
        await self.get_pymongo_collection().delete_one(mine)


class Once(Stored):
    """Something that counts once within a time: a selfie presented for an identity, a stranger's refusals in a minute.

    The id is a keyed hash of what it stands for.
    """

    expires_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "once"
        indexes: ClassVar[list[IndexModel]] = [IndexModel("expires_at", expireAfterSeconds=0)]

    @classmethod
    async def is_first(cls, id_: str, keep: timedelta, session: AsyncClientSession | None = None) -> bool:
        """Whether it had not been seen within the time; from now on it has.

        In a transaction, False also means that the transaction is over: the caller raises.
        """
        expired, fresh = _unseen(id_, keep)
        try:
            await cls.get_pymongo_collection().update_one(expired, fresh, upsert=True, session=session)
        except DuplicateKeyError:
            return False
        return True

    @classmethod
    async def are_first(cls, ids: Sequence[str], keep: timedelta, session: AsyncClientSession) -> bool:
        """Whether none of them had been seen within the time; from now on all have. As `is_first`, in one call to MongoDB."""
        try:
            await cls.get_pymongo_collection().bulk_write(
                [UpdateOne(*_unseen(id_, keep), upsert=True) for id_ in ids], session=session
            )
        except BulkWriteError as error:
            if all(one["code"] == _DUPLICATE_KEY for one in error.details["writeErrors"]):
                return False
            raise
        return True


def _unseen(id_: str, keep: timedelta) -> tuple[dict[str, Any], dict[str, Any]]:
    """The update that succeeds where the id had not been seen within the time."""
    moment = now()
    # MongoDB's expiry runs once a minute, so what has expired may still be there, and counts as unseen.
    return {"_id": id_, "expires_at": {"$lte": moment}}, {"$set": {"expires_at": moment + keep}}
