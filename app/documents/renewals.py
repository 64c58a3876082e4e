"""Templates of another model, made from the stored photos and kept beside those in use until a gallery moves to them."""

from collections.abc import Sequence
from typing import ClassVar, Self

from pymongo import IndexModel, ReplaceOne
from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import Stored


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
        indexes: ClassVar[list[IndexModel]] = [IndexModel("gallery_id"), IndexModel("identity_id")]

    @classmethod
    async def of_samples(cls, sample_ids: Sequence[str], contract: str) -> dict[str, Self]:
        """The renewals of these samples for that model, by the sample's id."""
        found = await cls.find({"_id": {"$in": list(sample_ids)}, "contract": contract}).to_list()
        return {renewal.id: renewal for renewal in found}

    @classmethod
    async def keep(cls, renewals: Sequence[Self]) -> None:
        """Store them; one of another model is replaced."""
        writes = [
            ReplaceOne({"_id": one.id}, {"_id": one.id, **one.model_dump(exclude={"id", "revision_id"})}, upsert=True)
            for one in renewals
        ]
        if writes:
            await cls.get_pymongo_collection().bulk_write(writes, ordered=False)

    @classmethod
    async def lost(cls, gallery_id: str, contract: str) -> list[Self]:
        """Those without a template."""
        return await cls.find({"gallery_id": gallery_id, "contract": contract, "template": None}).to_list()

    @classmethod
    async def forget(cls, identity_id: str, session: AsyncClientSession) -> None:
        """Delete those of one identity."""
        await cls.get_pymongo_collection().delete_many({"identity_id": identity_id}, session=session)

    @classmethod
    async def forget_sample(cls, sample_id: str, session: AsyncClientSession) -> None:
        """Delete that of one sample."""
        await cls.get_pymongo_collection().delete_one({"_id": sample_id}, session=session)

    @classmethod
    async def forget_gallery(cls, gallery_id: str, *, only_lost: bool = False) -> None:
        """Delete those of a gallery. only_lost: those without a template."""
        which = {"gallery_id": gallery_id} | ({"template": None} if only_lost else {})
        await cls.get_pymongo_collection().delete_many(which)
