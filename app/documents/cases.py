"""Look-alikes: every pair that a screening recorded, and the cases that a person decides."""

from collections.abc import Mapping
from datetime import datetime
from typing import ClassVar, Literal, Self

from pydantic import Field
from pymongo import IndexModel, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import Stored, Value, now
from app.documents.identities import Candidate, Identity
from app.domain.policy import Decision, LookAlike


class CaseCandidate(Value):
    """One look-alike of a case, and what was decided about it."""

    identity_id: str
    score: float
    rank: int
    decision: Decision | None = None


class Proposal(Value):
    """What one officer would decide, where a second one must agree.

    identity_id: the candidate it is about; None: all that are undecided. keep: who would stay, of a duplicate.
    """

    decision: Decision
    identity_id: str | None
    keep: str | None
    reason: str
    by: str
    at: datetime

    def agrees_with(self, other: Self) -> bool:
        """Whether both would do the same, for whatever reason."""
        return (self.decision, self.identity_id, self.keep) == (other.decision, other.identity_id, other.keep)


class Case(Stored):
    """A newcomer (or a later sample, `sample_id`) and everybody whom it looks like, for a person to decide.

    proposals: where two officers must agree, those that wait for the second one, at most one about each candidate and one
    about all. proposed_by: whose proposal the deciding officer agreed with.
    """

    gallery_id: str
    newcomer_id: str
    sample_id: str | None
    job_id: str
    state: Literal["open", "decided"]
    candidates: list[CaseCandidate]
    threshold: float
    created_at: datetime
    decided_at: datetime | None = None
    decided_by: str | None = None
    reason: str | None = None
    proposals: list[Proposal] = Field(default_factory=list)
    proposed_by: str | None = None
    version: int = 1

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "cases"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("gallery_id", 1), ("state", 1), ("created_at", 1), ("_id", 1)]),
            IndexModel([("state", 1), ("created_at", 1), ("_id", 1)]),
            IndexModel([("newcomer_id", 1), ("state", 1)]),
            IndexModel([("candidates.identity_id", 1), ("state", 1)]),
        ]

    @classmethod
    async def open_about(cls, identity_id: str, session: AsyncClientSession) -> list[Self]:
        """Open cases with the identity on either side."""
        sides = [{"newcomer_id": identity_id}, {"candidates.identity_id": identity_id}]
        return await cls.find({"state": "open", "$or": sides}, session=session).to_list()

    @classmethod
    async def measured_anew(cls, gallery_id: str, scores: Mapping[tuple[str, str], float], threshold: float) -> None:
        """Give the candidates of the gallery's open cases the scores of another model, by the ordered ids of each pair."""
        async for case in cls.find({"gallery_id": gallery_id, "state": "open"}):
            writes = []
            for candidate in case.candidates:
                low, high = sorted((case.newcomer_id, candidate.identity_id))
                if (low, high) in scores:
                    of_it = {"_id": case.id, "candidates.identity_id": candidate.identity_id}
                    fields = {"candidates.$.score": scores[low, high], "threshold": threshold}
                    writes.append(UpdateOne(of_it, {"$set": fields}))
            if writes:
                await cls.get_pymongo_collection().bulk_write(writes)

    async def change(self, session: AsyncClientSession, fields: dict[str, object]) -> bool:
        """`$set` the fields and raise the version, if it still is what it was; False when somebody else was first."""
        result = await self.get_pymongo_collection().update_one(
            {"_id": self.id, "version": self.version}, {"$set": fields, "$inc": {"version": 1}}, session=session
        )
        return bool(result.matched_count)

    async def close(self, session: AsyncClientSession, reason: str) -> bool:
        """End the case without a person's decision: what it was about has changed."""
        return await self.change(
            session, {"state": "decided", "decided_at": now(), "reason": reason, "proposals": []}
        )  # fmt: skip

    def proposal_about(self, identity_id: str | None) -> Proposal | None:
        """What somebody proposed about the candidate; None asks about all."""
        return next((proposal for proposal in self.proposals if proposal.identity_id == identity_id), None)


class Pair(Stored):
    """Two identities that look alike, under their ordered ids, with the best score seen and what a person decided.

    proposed_by: the other officer, where two had to agree.
    """

    gallery_id: str
    low: str
    high: str
    score: float
    decision: Decision | None = None
    decided_by: str | None = None
    proposed_by: str | None = None
    decided_at: datetime | None = None
    created_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "pairs"
        indexes: ClassVar[list[IndexModel]] = [IndexModel("low"), IndexModel("high")]

    def other_side(self, identity_id: str) -> str:
        """The one that the identity looks like."""
        return self.high if self.low == identity_id else self.low

    @classmethod
    async def of(cls, identity_id: str, session: AsyncClientSession | None = None) -> list[Self]:
        """Every recorded pair with the identity on either side."""
        return await cls.find({"$or": [{"low": identity_id}, {"high": identity_id}]}, session=session).to_list()

    @classmethod
    async def of_gallery(cls, gallery_id: str) -> list[Self]:
        """Every recorded pair of a gallery."""
        return await cls.find({"gallery_id": gallery_id}).to_list()

    @classmethod
    async def measured_anew(cls, scores: Mapping[tuple[str, str], float], contract: str) -> None:
        """Give these pairs, by their ordered ids, the scores of another model."""
        writes = [
            UpdateOne({"_id": f"{low}:{high}"}, {"$set": {"score": score, "contract": contract}})
            for (low, high), score in scores.items()
        ]
        if writes:
            await cls.get_pymongo_collection().bulk_write(writes, ordered=False)

    @classmethod
    async def record(
        cls, gallery_id: str, identity_id: str, candidates: list[Candidate], session: AsyncClientSession
    ) -> None:
        """Keep the pairs; one that is known keeps its decision and its best score."""
        writes = []
        for candidate in candidates:
            low, high = sorted((identity_id, candidate.identity_id))
            first = {"gallery_id": gallery_id, "low": low, "high": high, "decision": None, "created_at": now()}
            update = {"$setOnInsert": first, "$max": {"score": candidate.score}}
            writes.append(UpdateOne({"_id": f"{low}:{high}"}, update, upsert=True))
        if writes:
            await cls.get_pymongo_collection().bulk_write(writes, session=session)

    @classmethod
    async def decide(
        cls,
        one: str,
        other: str,
        decision: Decision,
        by: str,
        session: AsyncClientSession,
        *,
        proposed_by: str | None = None,
    ) -> None:
        """Keep what a person said about a recorded pair; or two, the first of whom proposed it."""
        low, high = sorted((one, other))
        fields = {"decision": decision, "decided_by": by, "proposed_by": proposed_by, "decided_at": now()}
        await cls.get_pymongo_collection().update_one({"_id": f"{low}:{high}"}, {"$set": fields}, session=session)

    @classmethod
    async def forget(cls, identity_id: str, session: AsyncClientSession) -> None:
        """Erase every pair with the identity."""
        sides = {"$or": [{"low": identity_id}, {"high": identity_id}]}
        await cls.get_pymongo_collection().delete_many(sides, session=session)


async def look_alikes(identity_id: str, session: AsyncClientSession) -> list[LookAlike]:
    """The other side of every recorded pair, as it stands in this transaction.

    Each one that is not erased is also written to, so that two transactions that make two look-alikes active conflict.
    """
    decisions = {pair.other_side(identity_id): pair.decision for pair in await Pair.of(identity_id, session)}
    statuses = await Identity.statuses(list(decisions), session)
    living = [other for other, status in statuses.items() if status != "erased"]
    await Identity.touch_living(living, session)
    return [LookAlike(other, statuses.get(other, "erased"), decision) for other, decision in decisions.items()]
