"""Steps of `migrations` that change what accounts may do. Each change is one transaction with its audit event.

The steps read and write raw documents and raw events, in the form that this version stores.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from app.documents.audiences import settle_claims
from app.documents.base import new_id, now

log = structlog.get_logger(__name__)

Database = AsyncDatabase[dict[str, Any]]
T = TypeVar("T")

_CLIENT_ROLES: Final = ("relying_app", "enroller")
_COLLECTIONS: Final = (("users", "user"), ("clients", "client"))


async def grants_by_id(database: Database) -> int:
    """Replace the names in `galleries` of users and clients by ids. Returns the number of changed accounts.

    Names and ids without a gallery are dropped. An older process may write names again later. A name matches no id, so it
    grants nothing until a process starts and this step runs.
    """
    ids = [row["_id"] async for row in database["galleries"].find({}, {"_id": 1})]
    changed = 0
    for collection, kind in _COLLECTIONS:
        bound = {"galleries": {"$elemMatch": {"$nin": ids}}}
        async for account in database[collection].find(bound, {"galleries": 1}):
            changed += await _with_ids(database, collection, kind, account)
    return changed


async def _with_ids(database: Database, collection: str, kind: str, account: Mapping[str, Any]) -> int:
    """Replace the account's names by ids. Returns 1 if the account changed, else 0."""
    former = account["galleries"]
    # Read after the account: while this process starts, an admin may make a gallery and give it to an account.
    named = {"$or": [{"_id": {"$in": former}}, {"name": {"$in": former}}]}
    galleries = {row["_id"]: row["name"] async for row in database["galleries"].find(named, {"name": 1})}
    ids = {name: id_ for id_, name in galleries.items()}
    kept = list(dict.fromkeys(one if one in galleries else ids[one] for one in former if one in {*galleries, *ids}))
    if kept == former:
        return 0
    # The event shows names. An id without a gallery has no name, so the event shows the id.
    old = sorted(galleries.get(one, one) for one in former)
    new = sorted(galleries[one] for one in kept)
    told = {} if old == new else {"galleries": {"old": old, "new": new}}
    return await _change(database, collection, kind, account, {"galleries": kept}, told)


async def client_roles(database: Database) -> int:
    """Remove roles that clients may not have. Returns the number of changed clients.

    The access tokens of a changed client end, as with any change of roles.
    """
    changed = 0
    async for client in database["clients"].find(
        {"roles": {"$elemMatch": {"$nin": list(_CLIENT_ROLES)}}}, {"roles": 1}
    ):
        kept = [role for role in client["roles"] if role in _CLIENT_ROLES]
        told = {"roles": {"old": sorted(client["roles"]), "new": sorted(kept)}}
        changed += await _change(database, "clients", "client", client, {"roles": kept}, told)
        log.warning("client_lost_roles", client=client["_id"], old=told["roles"]["old"], new=told["roles"]["new"])
    return changed


async def audience_claims(database: Database) -> int:
    """Give each audience its owner (see `settle_claims`). Returns the number of changed claims.

    Every start logs the audiences that several clients have.
    """

    async def body(session: AsyncClientSession) -> tuple[int, list[dict[str, Any]]]:
        changed = await settle_claims(database, session)
        rows = database["audience_claims"].find({"client_id": None}, session=session)
        return changed, [row async for row in rows]

    changed, nobodys = await _transaction(database, body)
    for row in nobodys:
        clients = await database["clients"].distinct("_id", {"audiences": row["_id"]})
        log.warning("audience_of_several_clients", audience=row["_id"], clients=clients)
    return changed


async def _change(
    database: Database,
    collection: str,
    kind: str,
    account: Mapping[str, Any],
    fields: dict[str, Any],
    told: dict[str, Any],
) -> int:
    """Change the account if its fields are still as they were read. Returns 1 if it changed, else 0.

    told: the `changes` of the event. Empty: no event is written.
    """
    unchanged = {"_id": account["_id"], **{name: account[name] for name in fields}}
    update: dict[str, Any] = {"$set": fields}
    if "roles" in fields:
        update["$inc"] = {"access_version": 1}

    async def body(session: AsyncClientSession) -> int:
        result = await database[collection].update_one(unchanged, update, session=session)
        if result.matched_count and told:
            event = _event(f"{kind}.update", kind, account["_id"], {"changes": told})
            await database["audit_events"].insert_one(event, session=session)
        return int(result.matched_count)

    return await _transaction(database, body)


def _event(action: str, kind: str, id_: str, detail: dict[str, Any]) -> dict[str, Any]:
    return {
        "_id": new_id(), "seq": None, "time": now(),
        "actor": {"kind": "system", "id": None, "name": None, "ip": None},
        "action": action, "subject": {"kind": kind, "id": id_}, "outcome": "success", "gallery": None,
        "request_id": None, "detail": detail, "leaf_hash": None, "personal": None,
    }  # fmt: skip


async def _transaction(database: Database, body: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
    async with database.client.start_session() as session:
        return await session.with_transaction(
            body, read_concern=ReadConcern("snapshot"), write_concern=WriteConcern("majority", j=True)
        )
