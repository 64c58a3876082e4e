"""The store's own id, and what it has had. They prove that a place, a photo or an index file is ours.

No backup contains them, and a restore leaves them as they are. The id says which database owns the folders and buckets. So
two databases with the same content must not have the same id.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, Self

import structlog
from pydantic import Field
from pymongo import IndexModel, ReturnDocument
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import DuplicateKeyError
from pymongo.write_concern import WriteConcern

from app.documents.base import Stored, new_id, now
from app.documents.identities import Identity

log = structlog.get_logger(__name__)

#: The id of the only document.
STORE: Final = "store"


class Store(Stored):
    """Which store this database is.

    store_id: the id in the marks of its folders and buckets. collection: MongoDB's own id of this collection, which a copy of
    the database does not have. copied_from: the store id that a copy came with. adopted: stores whose places it took over.
    galleries: the ids of all galleries that the store has or had. places: the folders and buckets
    that carry its mark, each after the name of its setting. lacks_evidence: lost files of the evidence store are being
    written again, and not all of them are there yet.
    """

    store_id: str
    collection: str
    copied_from: list[str] = Field(default_factory=list)
    adopted: list[str] = Field(default_factory=list)
    galleries: list[str] = Field(default_factory=list)
    places: list[str] = Field(default_factory=list)
    lacks_evidence: bool = False
    created_at: datetime = Field(default_factory=now)

    class Settings(Stored.Settings):
        """Collection; asked by id only."""

        name = "stores"

    @classmethod
    async def opened(cls, database: "AsyncDatabase[dict[str, Any]]", galleries: Iterable[str]) -> Self:
        """The store; it is created if it is missing. It remembers these galleries from now on.

        A database that was copied by other means than `idem restore` (mongodump, another name) becomes a store of its own.
        """
        collection = await _collection_id(database)
        fresh = cls(id=STORE, store_id=new_id(), collection=collection)
        known = await cls.get(STORE)
        while known is None:
            try:
                await fresh.insert()
            except DuplicateKeyError:  # another process was quicker
                pass
            else:
                log.info("store_created", store=fresh.store_id)
            known = await cls.get(STORE)
        if known.collection != collection:
            mine = {"_id": STORE, "store_id": known.store_id, "collection": known.collection}
            # Its places belong to the original.
            fields = {"store_id": new_id(), "collection": collection, "places": list[str]()}
            update = {"$set": fields, "$push": {"copied_from": known.store_id}}
            if (await cls.get_pymongo_collection().update_one(mine, update)).modified_count:
                log.warning("store_is_a_copy", store=fields["store_id"], copied_from=known.store_id)
        return await cls.remember(galleries)

    @classmethod
    async def ids(cls) -> set[str]:
        """Its id, and those of the stores whose places it took over."""
        known = await cls.get(STORE)
        return set() if known is None else {known.store_id, *known.adopted}

    @classmethod
    async def took_over(cls, stores: Iterable[str]) -> None:
        """Record that this store took over the places of these stores."""
        update = {"$addToSet": {"adopted": {"$each": sorted(stores)}}}
        await cls.get_pymongo_collection().update_one({"_id": STORE}, update)

    @classmethod
    async def remember_places(cls, names: Iterable[str]) -> None:
        """Record that these places carry the store's mark."""
        update = {"$addToSet": {"places": {"$each": sorted(names)}}}
        await cls.get_pymongo_collection().update_one({"_id": STORE}, update)

    @classmethod
    async def note_evidence(cls, *, lacks_some: bool) -> None:
        """Record whether the evidence store still lacks lost files."""
        update = {"$set": {"lacks_evidence": lacks_some}}
        await cls.get_pymongo_collection().update_one({"_id": STORE}, update)

    @classmethod
    async def remember(cls, galleries: Iterable[str]) -> Self:
        """Store these ids of galleries for good. Returns the updated store."""
        row = await cls.get_pymongo_collection().find_one_and_update(
            {"_id": STORE}, {"$addToSet": {"galleries": {"$each": sorted(galleries)}}},
            return_document=ReturnDocument.AFTER,
        )  # fmt: skip
        found: Self = cls.model_validate(row)
        return found


async def _collection_id(database: "AsyncDatabase[dict[str, Any]]") -> str:
    """MongoDB's id of the collection, which is created if it is missing."""
    name = Store.Settings.name
    while True:
        async for found in await database.list_collections(filter={"name": name}):
            return bytes(found["info"]["uuid"]).hex()
        await database[name].update_one({"_id": "made"}, {"$setOnInsert": {"at": now()}}, upsert=True)
        await database[name].delete_one({"_id": "made"})


class EnrolmentBegun(Stored):
    """An enrolment that put photos, or is about to; its id is the identity's.

    A process may die between the photos and the document. This entry then proves that the photos are ours. The sweep of
    photos removes it after two days: by then it has deleted the photos that no document names.
    """

    gallery_id: str
    begun_at: datetime = Field(default_factory=now)

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "enrolments_begun"
        indexes: ClassVar[list[IndexModel]] = [IndexModel("begun_at")]

    @classmethod
    async def note(cls, identity_id: str, gallery_id: str) -> None:
        """Write the entry. The photos are written at the same time."""
        # If the entry is lost, the photo is only reported and not deleted. So the word of one node is enough.
        rows = cls.get_pymongo_collection().with_options(write_concern=WriteConcern(1))
        fields = {"gallery_id": {"$literal": gallery_id}, "begun_at": "$$NOW"}
        await rows.update_one({"_id": identity_id}, [{"$set": fields}], upsert=True)

    @classmethod
    async def note_all(cls, people: dict[str, Any]) -> None:
        """Write an entry for each identity that the filter finds, before a restore drops them."""
        fields = {"gallery_id": 1, "begun_at": "$$NOW"}
        into = {"into": cls.get_collection_name(), "whenMatched": "keepExisting"}
        async for _ in await Identity.get_pymongo_collection().aggregate([
            {"$match": people}, {"$project": fields}, {"$merge": into},
        ]):  # fmt: skip
            pass

    @classmethod
    async def older_than(cls, age: timedelta, limit: int) -> list[Self]:
        """Those that began longer ago, by MongoDB's clock, the oldest first."""
        oldest = {"$subtract": ["$$NOW", age // timedelta(milliseconds=1)]}
        return await cls.find({"$expr": {"$lt": ["$begun_at", oldest]}}).sort("begun_at").limit(limit).to_list()

    @classmethod
    async def galleries_of(cls, ids: Sequence[str]) -> dict[str, str]:
        """The galleries of these identities, as far as they have an entry."""
        rows = cls.get_pymongo_collection().find({"_id": {"$in": list(ids)}}, {"gallery_id": 1})
        return {row["_id"]: row["gallery_id"] async for row in rows}

    @classmethod
    async def forget(cls, ids: Sequence[str]) -> None:
        """Delete their entries: nothing is left to prove."""
        await cls.get_pymongo_collection().delete_many({"_id": {"$in": list(ids)}})
