"""Whose an audience is: each belongs to one client application."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from pymongo import DeleteOne, IndexModel, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase

from app.documents.accounts import Client
from app.documents.base import Stored
from app.errors import Advice, Conflict


class AudienceClaim(Stored):
    """One audience and its owner; the id is the audience. A client's own id is an audience too, and its own.

    client_id: None while several clients have the audience, as earlier versions allowed. It is nobody's until an admin leaves it
    to one of them. `Client.audiences` says what an admin gave; only what is claimed here may be used.
    """

    client_id: str | None

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "audience_claims"
        indexes: ClassVar[list[IndexModel]] = [IndexModel("client_id", name="client")]

    @classmethod
    async def usable_by(cls, client: Client) -> tuple[str, ...]:
        """The audiences that the client may use, its own id first."""
        if not client.audiences:  # most clients: nothing needs to be read
            return (client.id,)
        query = {"_id": {"$in": client.audiences}, "client_id": client.id}
        mine = {row["_id"] async for row in cls.get_pymongo_collection().find(query, {"_id": 1})}
        return (client.id, *(one for one in client.audiences if one in mine and one != client.id))

    @classmethod
    async def take(cls, client_id: str, audiences: Collection[str], session: AsyncClientSession) -> None:
        """Claim these for the client. Raises Conflict for another client's.

        Of two transactions that claim the same audience, one conflicts, starts again, and finds it taken.
        """
        wanted = sorted(set(audiences))
        rows = cls.get_pymongo_collection().find({"_id": {"$in": wanted}}, session=session)
        known = {row["_id"]: row["client_id"] async for row in rows}
        taken = [one for one in wanted if known.get(one, client_id) != client_id]
        if taken:
            message = "Another client has this audience. First take it away from that client."
            raise Conflict(message, errors=tuple(Advice("audiences", "taken", f"{message} ({one})") for one in taken))
        fresh = [{"_id": one, "client_id": client_id} for one in wanted if one not in known]
        if fresh:
            await cls.get_pymongo_collection().insert_many(fresh, session=session)

    @classmethod
    async def release(cls, client_id: str, audiences: Collection[str], session: AsyncClientSession) -> None:
        """The client has these no longer; its own document says so already. What one other client has becomes that client's."""
        claims = cls.get_pymongo_collection()
        for audience in sorted(set(audiences)):
            holders = await Client.get_pymongo_collection().distinct(
                "_id", {"audiences": audience, "_id": {"$ne": client_id}}, session=session
            )
            mine = {"_id": audience, "client_id": {"$in": [client_id, None]}}
            if holders:
                heir = holders[0] if len(holders) == 1 else None
                await claims.update_one(mine, {"$set": {"client_id": heir}}, session=session)
            else:
                await claims.delete_one(mine, session=session)

    @classmethod
    async def contested(cls, session: AsyncClientSession | None = None) -> list[tuple[str, str | None, list[str]]]:
        """The audiences that a client has without owning them: the audience, its owner or None, and the clients that have it."""
        rows = Client.get_pymongo_collection().find(
            {"audiences.0": {"$exists": True}}, {"audiences": 1}, session=session
        )
        holders: dict[str, set[str]] = defaultdict(set)
        async for row in rows:
            for audience in row["audiences"]:
                holders[audience].add(row["_id"])
        claims = cls.get_pymongo_collection().find({"_id": {"$in": sorted(holders)}}, session=session)
        owners = {row["_id"]: row["client_id"] async for row in claims}
        return [
            (audience, owners.get(audience), sorted(who))
            for audience, who in sorted(holders.items())
            if who != {owners.get(audience)}
        ]


async def settle_claims(database: AsyncDatabase[dict[str, Any]], session: AsyncClientSession) -> int:
    """Bring the claims to what the stored clients have: a step of `migrations`. Returns how many it changed.

    Needed after an upgrade, after the restore of an older backup, and after an older process has written clients. An owner
    that still has its audience stays the owner. What several clients have, and none of them owned before, is nobody's.
    """
    claims, clients = database["audience_claims"], database["clients"]
    holders: dict[str, list[str]] = defaultdict(list)
    ids: set[str] = set()
    async for row in clients.find({}, {"audiences": 1}, session=session).sort("_id", 1):
        ids.add(row["_id"])
        for audience in dict.fromkeys(row.get("audiences") or []):
            holders[audience].append(row["_id"])
    right = {one: _owner(one, ids, holders[one]) for one in (*holders, *ids)}
    known = {row["_id"]: row["client_id"] async for row in claims.find({}, session=session)}
    writes: list[UpdateOne | DeleteOne] = []
    for audience, owner in right.items():
        former = known.get(audience)
        stays = former is not None and (former in holders.get(audience, ()) and audience not in ids)
        if audience in known and (stays or former == owner):
            continue
        writes.append(UpdateOne({"_id": audience}, {"$set": {"client_id": owner}}, upsert=True))
    writes += [DeleteOne({"_id": one}) for one in known if one not in right]
    # Few calls: a store with thousands of clients would else take longer than a transaction may.
    if writes:
        await claims.bulk_write(writes, session=session)
    return len(writes)


def _owner(audience: str, ids: Collection[str], holders: Sequence[str]) -> str | None:
    """Whose an audience is that nobody has claimed yet."""
    if audience in ids:
        return audience
    return holders[0] if len(holders) == 1 else None
