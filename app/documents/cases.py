"""Look-alikes: every pair that a screening recorded, and the cases that a person decides."""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, Field
from pymongo import IndexModel, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import Stored, Value, now, within
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

    identity_id: the candidate it is about; None: all that are undecided. keep: who would stay, of a duplicate. reason: None once
    somebody of the case was erased.
    """

    decision: Decision
    identity_id: str | None
    keep: str | None
    reason: str | None
    by: str
    at: datetime

    def agrees_with(self, other: Self) -> bool:
        """Whether both would do the same, for whatever reason."""
        return (self.decision, self.identity_id, self.keep) == (other.decision, other.identity_id, other.keep)


class CaseFields(BaseModel):
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


def _with(identity_id: str) -> dict[str, Any]:
    """The filter for cases with the identity on either side."""
    return {"$or": [{"newcomer_id": identity_id}, {"candidates.identity_id": identity_id}]}


class Case(CaseFields, Stored):
    """A case as it is stored, with all its candidates; see CaseFields."""

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
        return await cls.find({"state": "open", **_with(identity_id)}, session=session).to_list()

    @classmethod
    async def measured_anew(cls, gallery_id: str, scores: Mapping[tuple[str, str], float], threshold: float) -> None:
        """Set the scores of another model on candidates of the gallery's open cases. scores: by the ordered ids of each pair."""
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

    @classmethod
    async def is_open_about_sample(cls, identity_id: str, sample_id: str, session: AsyncClientSession) -> bool:
        """Whether an open case needs this sample.

        These are: a case about this sample of the newcomer; a case about the newcomer as a whole; a case with the identity as a
        candidate: the adjudicator compares the newcomer with all photos of a candidate.
        """
        as_newcomer = {"newcomer_id": identity_id, "sample_id": {"$in": [sample_id, None]}}
        sides = [as_newcomer, {"candidates.identity_id": identity_id}]
        return await cls.find_one({"state": "open", "$or": sides}, session=session) is not None

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

    @classmethod
    async def ids_about(cls, identity_id: str) -> list[str]:
        """The ids of all cases with the identity on either side."""
        rows = cls.get_pymongo_collection().find(_with(identity_id), {"_id": 1})
        return [row["_id"] async for row in rows]

    @classmethod
    async def forget_reasons(cls, identity_id: str, session: AsyncClientSession) -> None:
        """Delete what officers typed about the identity: the reasons of decisions and proposals of its cases."""
        cases, mine = cls.get_pymongo_collection(), _with(identity_id)
        typed = {"decided_by": {"$ne": None}, "reason": {"$ne": None}}
        await cases.update_many({**mine, **typed}, {"$set": {"reason": None}, "$inc": {"version": 1}}, session=session)
        proposed = {"proposals.reason": {"$type": "string"}}
        blank = {"$set": {"proposals.$[].reason": None}, "$inc": {"version": 1}}
        await cases.update_many({**mine, **proposed}, blank, session=session)

    def proposal_about(self, identity_id: str | None) -> Proposal | None:
        """What somebody proposed about the candidate; None asks about all."""
        return next((proposal for proposal in self.proposals if proposal.identity_id == identity_id), None)


#: Candidates that a case in a list shows.
FIRST_CANDIDATES: Final = 10


class CasePage(CaseFields):
    """A case with some of its candidates: a case may have thousands. candidate_count: of all of them."""

    id: Annotated[str, Field(alias="_id")]
    candidate_count: int

    class Settings:
        """Beanie's hook: what a list reads of each case."""

        projection: ClassVar[dict[str, Any]] = {
            **dict.fromkeys(CaseFields.model_fields, 1),
            "candidates": {"$slice": ["$candidates", FIRST_CANDIDATES]},
            "candidate_count": {"$size": "$candidates"},
        }

    @staticmethod
    async def gallery_of(case_id: str, galleries: Collection[str] | None) -> str | None:
        """The gallery that a case is in; None: none of these galleries (ids; None: all) has such a case."""
        row = await Case.get_pymongo_collection().find_one(
            {"_id": case_id, **within(galleries)}, {"gallery_id": 1}
        )  # fmt: skip
        return None if row is None else str(row["gallery_id"])

    @classmethod
    async def get(cls, case_id: str, skip: int, limit: int) -> Self | None:
        """The case with at most `limit` candidates behind the first `skip`, by rank."""
        fields = {**cls.Settings.projection, "candidates": {"$slice": ["$candidates", skip, limit]}}
        row = await Case.get_pymongo_collection().find_one({"_id": case_id}, fields)
        return None if row is None else cls.model_validate(row)


class Pair(Stored):
    """Two identities that look alike, under their ordered ids, with the best score seen and what a person decided.

    contract: of the model that gave the score; None in older pairs. decided_score, decided_contract: score and model that the
    decision is based on; None: the same as `score` and `contract`. proposed_by: the other officer, where two had to agree.
    """

    gallery_id: str
    low: str
    high: str
    score: float
    contract: str | None = None
    decision: Decision | None = None
    decided_score: float | None = None
    decided_contract: str | None = None
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

    def decision_on(self, score: float, contract: str | None, margin: float) -> Decision | None:
        """The decision, if it covers this score. None: a person must decide (again).

        The decision `distinct` is about the photos of its time. It covers scores of the same model up to the score that it was
        made on plus the margin. The decision `duplicate` covers every score.
        """
        if self.decision != "distinct":
            return self.decision
        made_on = self.score if self.decided_score is None else self.decided_score
        made_by = self.decided_contract
        is_comparable = made_by is None or contract is None or made_by == contract
        return "distinct" if is_comparable and score <= made_on + margin else None

    def standing_decision(self, margin: float) -> Decision | None:
        """The decision, if it covers the best score seen."""
        return self.decision_on(self.score, self.contract, margin)

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
        """Set the scores of another model for the same photos. scores: by the ordered ids of each pair.

        A decision covers as much as before: the score that it was made on moves with the pair's score.
        """
        kept, by = {"$ifNull": ["$decided_score", "$score"]}, {"$ifNull": ["$decided_contract", "$contract"]}
        moves = {"$and": [
            {"$eq": ["$decision", "distinct"]},
            {"$eq": [{"$ifNull": [by, None]}, {"$ifNull": ["$contract", {"$ifNull": [by, None]}]}]},
        ]}  # fmt: skip
        writes = []
        for (low, high), score in scores.items():
            made_on = {"$subtract": [score, {"$max": [0, {"$subtract": ["$score", kept]}]}]}
            fields = {
                "score": score, "contract": contract,
                "decided_score": {"$cond": [moves, made_on, {"$ifNull": ["$decided_score", None]}]},
                "decided_contract": {"$cond": [moves, contract, {"$ifNull": ["$decided_contract", None]}]},
            }  # fmt: skip
            writes.append(UpdateOne({"_id": f"{low}:{high}"}, [{"$set": fields}]))
        if writes:
            await cls.get_pymongo_collection().bulk_write(writes, ordered=False)

    @classmethod
    async def record(
        cls, gallery_id: str, contract: str, identity_id: str, candidates: list[Candidate], session: AsyncClientSession
    ) -> None:
        """Store the pairs with scores of this model. A known pair keeps its decision and its best score."""
        writes = []
        for candidate in candidates:
            low, high = sorted((identity_id, candidate.identity_id))
            first = {"gallery_id": gallery_id, "low": low, "high": high, "decision": None, "created_at": now()}
            # Scores of different models cannot be compared: the newer one counts.
            is_same = {"$eq": [{"$ifNull": ["$contract", contract]}, contract]}
            best = {"$cond": [is_same, {"$max": ["$score", candidate.score]}, candidate.score]}
            # An older decision has no score of its own. It was made on the pair's score of that time, at most.
            made_on = {"$cond": [{"$eq": ["$decision", "distinct"]}, {"$ifNull": ["$decided_score", "$score"]}, None]}
            fields = {name: {"$ifNull": [f"${name}", value]} for name, value in first.items()}
            update = {"$set": {**fields, "score": best, "contract": contract, "decided_score": made_on}}
            writes.append(UpdateOne({"_id": f"{low}:{high}"}, [update], upsert=True))
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
        score: float,
        proposed_by: str | None = None,
    ) -> None:
        """Store a decision on a recorded pair, made on this score. proposed_by: the first officer, where two had to agree."""
        low, high = sorted((one, other))
        # Two cases may ask about one pair. The decision then covers the higher of their scores.
        is_repeated = {"$and": [
            {"$eq": ["$decision", decision]},
            {"$eq": [{"$ifNull": ["$decided_contract", None]}, {"$ifNull": ["$contract", None]}]},
        ]}  # fmt: skip
        made_on = {"$cond": [is_repeated, {"$max": ["$decided_score", score]}, score]}
        fields = {
            "decision": decision, "decided_score": made_on, "decided_contract": {"$ifNull": ["$contract", None]},
            "decided_by": by, "proposed_by": proposed_by, "decided_at": now(),
        }  # fmt: skip
        await cls.get_pymongo_collection().update_one({"_id": f"{low}:{high}"}, [{"$set": fields}], session=session)

    @classmethod
    async def forget(cls, identity_id: str, session: AsyncClientSession) -> None:
        """Erase every pair with the identity."""
        sides = {"$or": [{"low": identity_id}, {"high": identity_id}]}
        await cls.get_pymongo_collection().delete_many(sides, session=session)


async def look_alikes(identity_id: str, margin: float, session: AsyncClientSession) -> list[LookAlike]:
    """The other side of every recorded pair, as this transaction sees it, with the decision that covers its score.

    margin: see `domain.policy.margin_of`.
    Each one that is not erased is also written to, so that two transactions that make two look-alikes active conflict.
    """
    pairs = await Pair.of(identity_id, session)
    decisions = {pair.other_side(identity_id): pair.standing_decision(margin) for pair in pairs}
    statuses = await Identity.statuses(list(decisions), session)
    living = [other for other, status in statuses.items() if status != "erased"]
    await Identity.touch_living(living, session)
    return [LookAlike(other, statuses.get(other, "erased"), decision) for other, decision in decisions.items()]
