"""A gallery: a population kept apart, and the head that orders every change of its vectors."""

from collections.abc import Sequence
from datetime import datetime
from typing import ClassVar, Self

from beanie import Document
from pymongo import IndexModel
from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import Stored, new_id, now
from app.domain.faces import ModelCard
from app.domain.policy import GalleryPolicy

DEFAULT_GALLERY = "default"


class Gallery(Stored):
    """One document, read by every query: the head is `epoch`, `seq`, `contract`, `policy_version`, `generation`.

    `seq` is taken in the transaction that changes vectors, so its order is commit order. `epoch` is random and new
    after a restore or re-creation: whatever belongs to another epoch is refused. `identities` and `samples` count
    what is not erased, kept by the same transactions.
    """

    name: str
    pack: str
    dimension: int
    contract: str
    licence: str
    policy: GalleryPolicy
    policy_version: int = 1
    epoch: str
    seq: int = 0
    generation: int | None = None
    identities: int = 0
    samples: int = 0
    wrapped_key: bytes
    key_id: str
    created_at: datetime
    updated_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "galleries"
        indexes: ClassVar[list[IndexModel]] = [IndexModel("name", unique=True)]

    @classmethod
    def fresh(
        cls, name: str, card: ModelCard, policy: GalleryPolicy, *, id_: str, wrapped_key: bytes, key_id: str
    ) -> Self:
        """A new, empty gallery bound to a model."""
        moment = now()
        return cls(
            id=id_,
            name=name,
            pack=card.pack,
            dimension=card.dimension,
            contract=card.contract,
            licence=card.licence,
            policy=policy,
            epoch=new_id(),
            wrapped_key=wrapped_key,
            key_id=key_id,
            created_at=moment,
            updated_at=moment,
        )

    @classmethod
    async def named(cls, name: str) -> Self | None:
        """The gallery of that name."""
        return await cls.find_one({"name": name})

    @classmethod
    async def names_by_id(cls, ids: Sequence[str]) -> dict[str, str]:
        """Names for answers, by id."""
        rows = cls.get_pymongo_collection().find({"_id": {"$in": list(ids)}}, {"name": 1})
        return {row["_id"]: row["name"] async for row in rows}

    async def take_seq(
        self, session: AsyncClientSession, rows: int, *, identities: int = 0, samples: int = 0
    ) -> int | None:
        """Take `rows` numbers for changes in this transaction; returns the first.

        None when the gallery is gone, or of another epoch or contract than when it was read.
        """
        head = await self.get_pymongo_collection().find_one_and_update(
            {"_id": self.id, "epoch": self.epoch, "contract": self.contract},
            {"$inc": {"seq": rows, "identities": identities, "samples": samples}},
            projection={"seq": 1},
            session=session,
        )
        return None if head is None else int(head["seq"]) + 1

    async def stands(self, session: AsyncClientSession) -> bool:
        """Whether epoch and contract still are what they were when the gallery was read."""
        found = await self.get_pymongo_collection().find_one(
            {"_id": self.id, "epoch": self.epoch, "contract": self.contract}, {"_id": 1}, session=session
        )
        return found is not None


class GalleryChange(Document):
    """One change of a gallery's vectors. Rows are contiguous in `seq`; erasure blanks a row and keeps it."""

    gallery_id: str
    seq: int
    kind: str  # add | remove | blank
    identity_id: str | None
    sample_id: str | None

    class Settings:
        """Collection and indexes."""

        name = "gallery_changes"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("gallery_id", 1), ("seq", 1)], unique=True),
            IndexModel([("gallery_id", 1), ("identity_id", 1)]),
        ]

    @classmethod
    async def after(cls, gallery_id: str, seq: int, upto: int, limit: int) -> list[Self]:
        """The rows in (seq, upto], in order; at most `limit`."""
        query = cls.find({"gallery_id": gallery_id, "seq": {"$gt": seq, "$lte": upto}}).sort("seq").limit(limit)
        return await query.to_list()
