"""Templates of another model, made from the stored photos. They wait until their gallery moves to that model."""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Self

from pymongo import IndexModel, ReplaceOne
from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import Stored
from app.documents.identities import NO_CONTRACT, Identity


class Renewal(Stored):
    """One sample as another model reads its photo. The id is the sample's.

    contract: of that model. template and landmarks: sealed as those of a sample. reason: why there is no template.
    """

    gallery_id: str
    identity_id: str
    contract: str
    template: bytes | None = None
    landmarks: bytes | None = None
    reason: str | None = None

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "renewals"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("gallery_id", 1), ("identity_id", 1)]),
            IndexModel("identity_id"),
        ]

    @classmethod
    async def of_samples(cls, sample_ids: Sequence[str], contract: str) -> dict[str, Self]:
        """The renewals of these samples for that model, by the sample's id."""
        found = await cls.find({"_id": {"$in": list(sample_ids)}, "contract": contract}).to_list()
        return {renewal.id: renewal for renewal in found}

    @classmethod
    async def keep(cls, renewals: Sequence[Self], session: AsyncClientSession | None = None) -> None:
        """Store them; one of another model is replaced."""
        writes = [
            ReplaceOne({"_id": one.id}, {"_id": one.id, **one.model_dump(exclude={"id", "revision_id"})}, upsert=True)
            for one in renewals
        ]
        if writes:
            await cls.get_pymongo_collection().bulk_write(writes, ordered=False, session=session)

    @classmethod
    async def lost(cls, gallery_id: str, contract: str) -> list[Self]:
        """Those without a template."""
        return await cls.find({"gallery_id": gallery_id, "contract": contract, "template": None}).to_list()

    @classmethod
    async def owners_after(cls, gallery_id: str, identity_id: str, limit: int) -> list[str]:
        """The identities with renewals and greater ids than this one, by id. Reads at most `limit` renewals."""
        rows = cls.get_pymongo_collection().find(
            {"gallery_id": gallery_id, "identity_id": {"$gt": identity_id}}, {"_id": 0, "identity_id": 1}
        )
        found = [row["identity_id"] async for row in rows.sort("identity_id").limit(limit)]
        return sorted(set(found))

    @classmethod
    async def put_in_place(cls, gallery_id: str, contract: str, identity_ids: Sequence[str]) -> None:
        """Put the renewed templates into these identities' samples. A sample whose renewal has no template loses its own.

        MongoDB does the work itself, each identity in one step. It may be repeated. The versions of the identities stay: what
        officers know of them does not change.
        """
        mine = {"$filter": {"input": "$$new.renewals", "as": "r", "cond": {"$eq": ["$$r.id", "$$sample.id"]}}}
        renewed = {"template": "$$renewal.template", "landmarks": "$$renewal.landmarks", "contract": contract}
        changed = {"$switch": {
            "branches": [
                {"case": {"$eq": ["$$sample.contract", contract]}, "then": "$$sample"},
                {"case": {"$eq": [{"$type": "$$renewal"}, "missing"]}, "then": "$$sample"},
                {
                    "case": {"$eq": [{"$type": "$$renewal.template"}, "null"]},
                    "then": {"$mergeObjects": ["$$sample", {"template": b"", "contract": NO_CONTRACT}]},
                },
            ],
            "default": {"$mergeObjects": ["$$sample", renewed]},
        }}  # fmt: skip
        one = {"$let": {"vars": {"renewal": {"$first": mine}}, "in": changed}}
        samples = {"$map": {"input": "$samples", "as": "sample", "in": one}}
        fields = {"id": "$_id", "template": "$template", "landmarks": "$landmarks"}
        stages: list[dict[str, Any]] = [
            {"$match": {"gallery_id": gallery_id, "contract": contract, "identity_id": {"$in": list(identity_ids)}}},
            {"$group": {"_id": "$identity_id", "renewals": {"$push": fields}}},
            {"$merge": {
                "into": Identity.get_collection_name(), "whenMatched": [{"$set": {"samples": samples}}],
                "whenNotMatched": "discard",
            }},
        ]  # fmt: skip
        cursor = await cls.get_pymongo_collection().aggregate(stages)
        await cursor.to_list()

    @classmethod
    async def forget(cls, identity_id: str, session: AsyncClientSession) -> None:
        """Delete those of one identity."""
        await cls.get_pymongo_collection().delete_many({"identity_id": identity_id}, session=session)

    @classmethod
    async def forget_sample(cls, sample_id: str, session: AsyncClientSession) -> None:
        """Delete that of one sample."""
        await cls.get_pymongo_collection().delete_one({"_id": sample_id}, session=session)

    @classmethod
    async def forget_others(cls, identity_ids: Sequence[str], sample_ids: Collection[str]) -> None:
        """Delete those of the identities that belong to none of the samples."""
        others = {"identity_id": {"$in": list(identity_ids)}, "_id": {"$nin": list(sample_ids)}}
        await cls.get_pymongo_collection().delete_many(others)

    @classmethod
    async def gallery_ids(cls) -> list[str]:
        """The galleries that have any."""
        ids: list[str] = await cls.get_pymongo_collection().distinct("gallery_id")
        return ids

    @classmethod
    async def forget_gallery(
        cls, gallery_id: str, *, only_lost: bool = False, session: AsyncClientSession | None = None
    ) -> None:
        """Delete those of a gallery. only_lost: those without a template."""
        which = {"gallery_id": gallery_id} | ({"template": None} if only_lost else {})
        await cls.get_pymongo_collection().delete_many(which, session=session)
