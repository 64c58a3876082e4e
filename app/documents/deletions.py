"""The ledger of erasures: who was erased, when, and what of it is still to be done.

An entry is made in the erasure's transaction, and written to the evidence store afterwards: a restored backup knows of
neither, so the copy outside tells whom to erase again. It names ids only, and bears a tag that only this store can make: who
can write there must not be able to have somebody erased.
"""

import hmac
import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, Field
from pymongo import IndexModel

from app.documents.base import Stored, now
from app.keys import KeyRing

#: Where the entries lie in the evidence store.
LEDGER: Final = "deletions/"


class LedgerLine(BaseModel):
    """An entry as the evidence store holds it. tag: over the others, in hex, under a key from the store's root secret."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    identity_id: str
    gallery_id: str
    erased_at: datetime
    event_id: str
    tag: str = ""

    def expected_tag(self, keys: KeyRing) -> str:
        """The tag that it has when this store wrote it."""
        told = json.dumps(self.model_dump(mode="json", exclude={"tag"}), sort_keys=True)
        return keys.keyed_hash("erasure-ledger", told.encode()).hex()


class Deletion(Stored):
    """One erasure; its id is the erased identity's.

    receipt: the signed answer, as it was given. photo_keys: photos that the store could not delete yet. unsettled_since: when
    there was something left to do, None once nothing is: photos, personal parts of events, the entry outside. plain_texts:
    whether events of an older version contain typed text about the person in the clear; None: nobody looked.
    """

    gallery_id: str
    erased_at: datetime
    event_id: str
    samples: int = 0
    index_purge_by: datetime | None = None
    receipt: str | None = None
    photo_keys: list[str] = Field(default_factory=list)
    unsettled_since: datetime | None = None
    plain_texts: bool | None = None

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "deletions"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel("unsettled_since", partialFilterExpression={"unsettled_since": {"$type": "date"}}),
            IndexModel([("gallery_id", 1), ("erased_at", 1)]),
        ]

    @property
    def ledger_name(self) -> str:
        """Its name in the evidence store: by time, then by identity."""
        moment = self.erased_at.astimezone(UTC)
        return f"{LEDGER}{moment:%Y%m%dT%H%M%S}{moment.microsecond // 1000:03d}Z-{self.id}.json"

    def ledger_line(self, keys: KeyRing) -> bytes:
        """Its bytes in the evidence store: the same for the same erasure."""
        line = LedgerLine(
            identity_id=self.id, gallery_id=self.gallery_id, erased_at=self.erased_at, event_id=self.event_id
        )
        tagged = line.model_copy(update={"tag": line.expected_tag(keys)})
        return json.dumps(tagged.model_dump(mode="json"), sort_keys=True).encode()

    @classmethod
    def from_ledger(cls, data: bytes, keys: KeyRing) -> Self:
        """The erasure that a line of the evidence store tells of. Raises ValueError when this store did not write it so."""
        line = LedgerLine.model_validate_json(data)
        if not hmac.compare_digest(line.tag.encode(), line.expected_tag(keys).encode()):
            message = "the line does not bear this store's tag"
            raise ValueError(message)
        return cls(id=line.identity_id, gallery_id=line.gallery_id, erased_at=line.erased_at, event_id=line.event_id)

    @classmethod
    async def unsettled(cls, before: datetime, limit: int) -> list[str]:
        """The ids of those with something left to do since before that moment, the longest waiting first."""
        waiting = cls.get_pymongo_collection().find({"unsettled_since": {"$lt": before}}, {"_id": 1})
        return [row["_id"] async for row in waiting.sort("unsettled_since").limit(limit)]

    @classmethod
    async def outside(cls) -> AsyncIterator[Self]:
        """All deletions whose line should be in the evidence store."""
        async for one in cls.find({"unsettled_since": None}):
            yield one

    @classmethod
    async def newest_outside(cls) -> Self | None:
        """The deletion of the person enrolled last, among those whose line should be in the evidence store."""
        return await cls.find({"unsettled_since": None}).sort("-_id").first_or_none()

    @classmethod
    async def galleries_of(cls, ids: Sequence[str]) -> dict[str, str]:
        """The galleries of these identities, as far as the ledger has them."""
        rows = cls.get_pymongo_collection().find({"_id": {"$in": list(ids)}}, {"gallery_id": 1})
        return {row["_id"]: row["gallery_id"] async for row in rows}

    async def photos_are_gone(self) -> None:
        """The store holds none of its photos any more."""
        await self.get_pymongo_collection().update_one({"_id": self.id}, {"$set": {"photo_keys": []}})

    async def settled(self) -> None:
        """Nothing is left to do."""
        await self.get_pymongo_collection().update_one({"_id": self.id}, {"$set": {"unsettled_since": None}})

    @classmethod
    async def put_off(cls, id_: str) -> None:
        """Something could not be done; whoever waits behind it comes first next time."""
        await cls.get_pymongo_collection().update_one({"_id": id_}, {"$set": {"unsettled_since": now()}})
