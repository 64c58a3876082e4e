"""Actions on a person that one officer proposed and that wait for a second one."""

from collections.abc import Collection
from datetime import datetime
from typing import ClassVar, Literal, Self

from pymongo import IndexModel
from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import Stored, now, within

ProposalKind = Literal["erasure", "sample_removal", "reference_change"]
#: stale: the identity was changed or erased before a second officer agreed.
ProposalState = Literal["open", "agreed", "withdrawn", "stale"]


class IdentityProposal(Stored):
    """One action on one identity, bound to the version of the identity that its officer saw.

    sample_id: of a sample removal. sealed_patch: of a reference change, the merge patch, sealed under the person's data key.
    decided_by: who agreed or withdrew.
    """

    gallery_id: str
    identity_id: str
    identity_version: int
    kind: ProposalKind
    sample_id: str | None = None
    sealed_patch: bytes | None = None
    reason: str | None = None
    state: ProposalState = "open"
    proposed_by: str
    created_at: datetime
    decided_by: str | None = None
    decided_at: datetime | None = None

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "proposals"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("gallery_id", 1), ("state", 1), ("created_at", -1), ("_id", -1)]),
            IndexModel([("gallery_id", 1), ("created_at", -1), ("_id", -1)]),
            IndexModel("identity_id"),
            # An action has at most one open proposal, even if two officers ask at the same moment.
            IndexModel(
                [("identity_id", 1), ("kind", 1), ("sample_id", 1)],
                unique=True,
                partialFilterExpression={"state": "open"},
            ),
        ]

    @classmethod
    async def seen(cls, proposal_id: str, galleries: Collection[str] | None) -> Self | None:
        """The proposal, if it lies in one of the galleries (ids; None: all)."""
        return await cls.find_one({"_id": proposal_id, **within(galleries)})

    @classmethod
    async def standing(
        cls, identity_id: str, kind: ProposalKind, sample_id: str | None, session: AsyncClientSession
    ) -> Self | None:
        """The open proposal of this action."""
        named = {"identity_id": identity_id, "kind": kind, "sample_id": sample_id, "state": "open"}
        return await cls.find_one(named, session=session)

    async def end(self, session: AsyncClientSession, state: ProposalState, by: str | None) -> bool:
        """Close it. False when it is closed already."""
        fields = {"state": state, "decided_by": by, "decided_at": now()}
        result = await self.get_pymongo_collection().update_one(
            {"_id": self.id, "state": "open"}, {"$set": fields}, session=session
        )
        return bool(result.matched_count)

    @classmethod
    async def forget(cls, identity_id: str, session: AsyncClientSession) -> None:
        """Close the open proposals about an erased person. Delete the personal fields of all proposals about them."""
        mine = {"identity_id": identity_id}
        collection = cls.get_pymongo_collection()
        stale = {"state": "stale", "decided_at": now()}
        await collection.update_many({**mine, "state": "open"}, {"$set": stale}, session=session)
        blank = {"sealed_patch": None, "reason": None}
        await collection.update_many(mine, {"$set": blank}, session=session)
