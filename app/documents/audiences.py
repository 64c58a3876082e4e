"""Owners of audiences: each audience belongs to one client application."""

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
    """One audience and its owner. The id is the audience. A client's own id is also an audience, and the client owns it.

    client_id: None while several clients have the audience, as earlier versions allowed. Then none of them owns it, until an
    admin leaves it to one client. `Client.audiences` lists what an admin gave. A client may use only the audiences it owns here.
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
        """Claim these audiences for the client. Raises Conflict for one that another client has.

        If two transactions claim the same audience, one of them conflicts. It starts again, and raises Conflict.
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
        """Release audiences that the client's document no longer lists.

        If exactly one other client has the audience, that client owns it from now on.
        """
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
        """The audiences that a client has but does not own: the audience, its owner or None, and the clients that have it."""
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
    """Make the claims agree with the stored clients: a step of `migrations`. Returns the number of changed claims.

    Needed after an upgrade, after the restore of an older backup, and after an older process has written clients. An owner
    that still has its audience stays the owner. An audience that several clients have, without an earlier owner, has no owner.
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
    # One bulk write: with thousands of clients, single writes would take longer than a transaction may.
    if writes:
        await claims.bulk_write(writes, session=session)
    return len(writes)


def _owner(audience: str, ids: Collection[str], holders: Sequence[str]) -> str | None:
    """The owner of an audience that has no claim yet. None if several clients have it."""
    if audience in ids:
        return audience
    return holders[0] if len(holders) == 1 else None
