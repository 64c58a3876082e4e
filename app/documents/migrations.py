"""Steps that bring stored documents into the shape that this version reads.

They run whenever a process starts, before anything else is read: after an upgrade, and after the restore of an old backup.
So each step finds by itself what is still in the old shape. It changes each document in one atomic update, and does nothing
on a migrated store. Several processes may run the same step at once. A step works on raw documents, because models change
later. Steps are dated and run in order; a new one is appended.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.write_concern import WriteConcern

from app.documents import account_migrations

log = structlog.get_logger(__name__)

Database = AsyncDatabase[dict[str, Any]]
#: Changes what is in the old shape; returns how many documents it changed.
Step = Callable[[Database], Awaitable[int]]

#: People whose data one step of a migration changes before the next ones.
_AT_ONCE: Final = 500
#: The former default of `second_face_share`, and the default that replaces it.
_FORMER_SHARE, _PROMINENCE = 0.25, 0.33


def current_policy(policy: dict[str, Any]) -> dict[str, Any]:
    """A stored policy in today's shape.

    The start migrates the store. A process of an older version that still runs may write the old shape again.
    """
    if "second_face_share" not in policy:
        return policy
    share = policy["second_face_share"]
    known = {name: value for name, value in policy.items() if name != "second_face_share"}
    return {"second_face_prominence": _PROMINENCE if share == _FORMER_SHARE else share, **known}


async def _second_face_prominence(database: Database) -> int:
    """`policy.second_face_share` of galleries becomes `policy.second_face_prominence`.

    A share that was never set by hand becomes the new default. Another share keeps its number: for two faces equally far from
    the centre, a share of area is a share of prominence. The policy's version rises, so that an older process cannot write
    its copy of the old policy back.
    """
    changed = await database.get_collection("galleries", write_concern=WriteConcern("majority", j=True)).update_many(
        {"policy.second_face_share": {"$exists": True}},
        [
            {"$set": {
                "policy.second_face_prominence": {"$ifNull": [
                    "$policy.second_face_prominence",
                    {"$cond": [{"$eq": ["$policy.second_face_share", _FORMER_SHARE]}, _PROMINENCE, "$policy.second_face_share"]},
                ]},
                "policy_version": {"$add": [{"$ifNull": ["$policy_version", 1]}, 1]},
            }},
            {"$unset": "policy.second_face_share"},
        ],
    )  # fmt: skip
    return changed.modified_count


async def _reasons_about_erased_people(database: Database) -> int:
    """What officers typed about people who were erased by an older version is deleted from cases, and beside their events.

    A deletion without `plain_texts` is one of an older version.
    """
    majority = WriteConcern("majority", j=True)
    deletions, cases, events = (
        database.get_collection(name, write_concern=majority) for name in ("deletions", "cases", "audit_events")
    )
    older, done = {"plain_texts": {"$exists": False}}, 0
    while ids := [row["_id"] async for row in deletions.find(older, {"_id": 1}).limit(_AT_ONCE)]:
        sides = {"$or": [{"newcomer_id": {"$in": ids}}, {"candidates.identity_id": {"$in": ids}}]}
        about = [row["_id"] async for row in cases.find(sides, {"_id": 1})]
        decided = {"_id": {"$in": about}, "decided_by": {"$ne": None}, "reason": {"$ne": None}}
        await cases.update_many(decided, {"$set": {"reason": None}, "$inc": {"version": 1}})
        proposed = {"_id": {"$in": about}, "proposals.reason": {"$type": "string"}}
        await cases.update_many(proposed, {"$set": {"proposals.$[].reason": None}, "$inc": {"version": 1}})
        told = {"subject.kind": "case", "subject.id": {"$in": about}, "personal": {"$ne": None}}
        await events.update_many(told, {"$set": {"personal": None}})
        # Last: a start that is killed before begins with these people again.
        await deletions.update_many({"_id": {"$in": ids}, **older}, {"$set": {"plain_texts": None}})
        done += len(ids)
    return done


#: By the day on which they were written, the oldest first.
STEPS: Final[tuple[tuple[str, Step], ...]] = (
    ("2026-11-30 second_face_prominence", _second_face_prominence),
    ("2026-12-01 reasons_about_erased_people", _reasons_about_erased_people),
    ("2026-12-01 grants_by_id", account_migrations.grants_by_id),
    ("2026-12-01 client_roles", account_migrations.client_roles),
    ("2026-12-01 audience_claims", account_migrations.audience_claims),
)


async def migrate(database: Database) -> None:
    """Run every step. Raises PyMongoError when the store is away; the next start goes on."""
    for name, step in STEPS:
        changed = await step(database)
        if changed:
            log.info("documents_migrated", step=name, documents=changed)
