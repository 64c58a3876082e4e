"""Challenges: nonces that callers were given, each to bind one selfie to."""

import secrets
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, Self

from pymongo import IndexModel
from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import Stored, now
from app.keys import KeyRing

#: Ours begin like this. Any other nonce is the caller's own and is passed on as it came, where no challenge is required.
NONCE_PREFIX: Final = "idem-nonce-"
NONCE_BYTES: Final = 24


class Challenge(Stored):
    """A nonce that waits for its selfie; used, it is gone. The id is its keyed hash: the nonce itself is kept nowhere.

    identity_id: whom the selfie must be said to show; None for anybody in the gallery.
    """

    caller_id: str
    gallery_id: str
    identity_id: str | None
    expires_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "challenges"
        indexes: ClassVar[list[IndexModel]] = [IndexModel("expires_at", expireAfterSeconds=0)]

    @classmethod
    async def issue(
        cls,
        keys: KeyRing,
        caller_id: str,
        gallery_id: str,
        identity_id: str | None,
        keep: timedelta,
        session: AsyncClientSession,
    ) -> tuple[str, Self]:
        """A fresh nonce and its challenge."""
        nonce = NONCE_PREFIX + secrets.token_urlsafe(NONCE_BYTES)
        challenge = cls(
            id=challenge_id(keys, nonce), caller_id=caller_id, gallery_id=gallery_id, identity_id=identity_id,
            expires_at=now() + keep,
        )  # fmt: skip
        await challenge.insert(session=session)
        return nonce, challenge

    @classmethod
    async def waits(cls, id_: str, caller_id: str, gallery_id: str, identity_id: str | None) -> bool:
        """Whether the nonce still holds for this."""
        found = await cls.get_pymongo_collection().find_one(
            _fitting(id_, caller_id, gallery_id, identity_id), {"_id": 1}
        )
        return found is not None

    @classmethod
    async def use(
        cls, id_: str, caller_id: str, gallery_id: str, identity_id: str | None, session: AsyncClientSession
    ) -> bool:
        """Use the nonce up; False when it does not hold for this, or not any more."""
        mine = _fitting(id_, caller_id, gallery_id, identity_id)
        result = await cls.get_pymongo_collection().delete_one(mine, session=session)
        return bool(result.deleted_count)


def challenge_id(keys: KeyRing, nonce: str) -> str:
    """What stands for a nonce in the store."""
    return keys.keyed_hash("challenge", nonce.encode()).hex()


def _fitting(id_: str, caller_id: str, gallery_id: str, identity_id: str | None) -> dict[str, Any]:
    """identity_id: None for a search: only a challenge that names nobody fits."""
    # MongoDB's expiry runs once a minute, so what has expired may still be there.
    return {
        "_id": id_, "caller_id": caller_id, "gallery_id": gallery_id, "identity_id": {"$in": [None, identity_id]},
        "expires_at": {"$gt": now()},
    }  # fmt: skip
