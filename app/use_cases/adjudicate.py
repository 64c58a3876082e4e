"""Adjudicate: a person decides whether the look-alikes of a case are the same person; or two, where the gallery asks for it."""

from dataclasses import dataclass

from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, Typed, record
from app.documents.base import now
from app.documents.cases import Case, CaseCandidate, Pair, Proposal, look_alikes
from app.documents.events import Detail
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.domain.policy import Decision, LookAlike, margin_of, may_activate
from app.errors import Advice, Conflict, Forbidden, NotFound, UndecidedCandidates, Validation
from app.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the person said. identity_id: the candidate it is about; None: all of them. keep: who stays, of a duplicate."""

    decision: Decision
    identity_id: str | None
    keep: str | None
    reason: str


async def adjudicate(runtime: Runtime, action: Action, gallery: Gallery, case_id: str, judgement: Judgement) -> Case:
    """Decide a case, or one candidate of it; the last decision ends the case and settles who is active.

    Under the policy `second_review` a decision is a proposal at first: it comes into force when another officer decides the
    same, and another officer's different decision takes its place as a proposal.

    Raises Forbidden when an application agrees to a proposal, Conflict when the case is decided already or the same officer
    proposed the decision, UndecidedCandidates when two undecided look-alikes would become active, Validation when the judgement
    does not fit the case.
    """

    async def decide(session: AsyncClientSession) -> None:
        case = await Case.get(case_id, session=session)
        if case is None:
            raise NotFound
        if case.state != "open":
            raise Conflict("The case is decided already.")
        newcomer = await Identity.living(case.newcomer_id, session)
        if newcomer is None:
            raise Conflict("The newcomer was erased.")
        targets = _targets(case, judgement)
        loser = await _loser(newcomer, targets[0], judgement, session) if judgement.decision == "duplicate" else None
        wanted = _proposal(action, judgement, newcomer, targets, loser)
        proposed = case.proposal_about(wanted.identity_id) if gallery.policy.second_review else None
        detail: Detail = {
            "decision": judgement.decision, "newcomer_id": newcomer.id, "identity_id": judgement.identity_id,
            "duplicate_id": None if loser is None else loser.id, "reason": Typed(judgement.reason),
        }  # fmt: skip
        if gallery.policy.second_review and (proposed is None or not _seconds(wanted, proposed)):
            others = [p for p in case.proposals if p.identity_id != wanted.identity_id]
            fields: dict[str, object] = {"proposals": [p.model_dump() for p in (*others, wanted)]}
            detail |= {"step": "proposal", "decided": False, "contradicts": None if proposed is None else proposed.by}
        else:
            if proposed is not None and (action.caller is None or action.caller.kind != "user"):
                raise Forbidden("A person must agree, not an application.")
            by = None if proposed is None else proposed.by
            review = _Review(wanted, by, margin_of(runtime.engine.card))
            fields = await _decided(case, newcomer, targets, loser, review, session)
            detail |= {"decided": fields.get("state") == "decided", "proposed_by": by}
        if not await case.change(session, fields):
            raise Conflict("The case was changed at the same moment.")
        await record(
            session, action, subject_kind="case", subject_id=case.id, gallery=gallery.name, detail=detail
        )  # fmt: skip

    await runtime.transaction(decide)
    case = await Case.get(case_id)
    if case is None:
        raise NotFound
    return case


@dataclass(frozen=True, slots=True)
class _Review:
    """A decision that comes into force, as its officer gave it.

    proposed_by: whose proposal it agreed with, if it needed one. margin: see `margin_of`.
    """

    given: Proposal
    proposed_by: str | None
    margin: float


def _proposal(
    action: Action, judgement: Judgement, newcomer: Identity, targets: list[CaseCandidate], loser: Identity | None
) -> Proposal:
    """The judgement in one form for whatever means the same: "all" of one candidate is that one, who stays has a name."""
    about, keep = judgement.identity_id, None
    if about is None and len(targets) == 1:
        about = targets[0].identity_id
    if loser is not None:
        keep = newcomer.id if loser.id != newcomer.id else targets[0].identity_id
    return Proposal(
        decision=judgement.decision, identity_id=about, keep=keep, reason=judgement.reason, by=action.actor_id, at=now()
    )


def _seconds(wanted: Proposal, proposed: Proposal) -> bool:
    """Whether another officer now wants what was proposed. Raises Conflict for the same officer."""
    if wanted.by == proposed.by:
        raise Conflict("You proposed a decision already; another officer must agree or propose another one.")
    return wanted.agrees_with(proposed)


async def _decided(
    case: Case,
    newcomer: Identity,
    targets: list[CaseCandidate],
    loser: Identity | None,
    review: _Review,
    session: AsyncClientSession,
) -> dict[str, object]:
    """Carry the decision out on the people; what of the case changes with it."""
    given = review.given
    for target in targets:
        await Pair.decide(
            newcomer.id, target.identity_id, given.decision, given.by, session,
            score=target.score, proposed_by=review.proposed_by,
        )  # fmt: skip
    decided = {t.identity_id for t in targets}
    candidates = [
        c.model_copy(update={"decision": given.decision}) if c.identity_id in decided else c for c in case.candidates
    ]
    if loser is not None:
        await _make_duplicate(loser, case, session)
    is_over = await _settle(newcomer, case, candidates, loser, review.margin, session)
    waiting = [] if is_over else [p for p in case.proposals if p.identity_id not in {given.identity_id, *decided}]
    fields: dict[str, object] = {
        "candidates": [c.model_dump() for c in candidates], "proposals": [p.model_dump() for p in waiting],
    }  # fmt: skip
    if is_over:
        fields |= {
            "state": "decided", "decided_at": now(), "decided_by": given.by, "proposed_by": review.proposed_by,
            "reason": given.reason,
        }  # fmt: skip
    return fields


def _targets(case: Case, judgement: Judgement) -> list[CaseCandidate]:
    """The candidates that the judgement is about, none of them decided before."""
    if judgement.identity_id is None:
        if judgement.decision == "duplicate":
            raise _unfit("identity_id", "A duplicate is a duplicate of somebody: name the candidate.")
        return [c for c in case.candidates if c.decision is None]
    target = next((c for c in case.candidates if c.identity_id == judgement.identity_id), None)
    if target is None:
        raise _unfit("identity_id", "This identity is not a candidate of the case.")
    if target.decision is not None:
        raise Conflict("This candidate is decided already.")
    return [target]


def _unfit(field: str, message: str) -> Validation:
    return Validation(message, errors=(Advice(field, "unfit", message),))


async def _loser(
    newcomer: Identity, target: CaseCandidate, judgement: Judgement, session: AsyncClientSession
) -> Identity:
    """Whom the decision makes a duplicate: by default the younger of the two."""
    candidate = await Identity.living(target.identity_id, session)
    if candidate is None:
        raise Conflict("The candidate was erased.")
    older, younger = sorted((newcomer, candidate), key=lambda identity: identity.enrol_seq)
    if judgement.keep is None or judgement.keep == older.id:
        return younger
    if judgement.keep == younger.id:
        return older
    raise _unfit("keep", "Keep is one of the two: the newcomer or the candidate.")


async def _make_duplicate(loser: Identity, case: Case, session: AsyncClientSession) -> None:
    """From whatever status; its own other open cases are about nothing any more."""
    if loser.status != "duplicate" and not await loser.change(session, {"status": "duplicate"}):
        raise Conflict("An identity of the case was changed at the same moment.")
    for other in await Case.open_about(loser.id, session):
        if other.id != case.id and other.newcomer_id == loser.id:
            await other.close(session, "the newcomer was decided to be a duplicate in another case")


async def _settle(
    newcomer: Identity,
    case: Case,
    candidates: list[CaseCandidate],
    loser: Identity | None,
    margin: float,
    session: AsyncClientSession,
) -> bool:
    """Whether the case is over; if so and the newcomer stays, it (or its later sample) becomes active."""
    if loser is not None and loser.id == newcomer.id:
        return True
    statuses = await Identity.statuses([c.identity_id for c in candidates], session)
    own = [LookAlike(c.identity_id, statuses.get(c.identity_id, "erased"), c.decision) for c in candidates]
    waits = any(c.decision is None and c.status not in ("erased", "duplicate") for c in own)
    if newcomer.screening(case.job_id) is None:  # a scan's case is about people who have their standing, and keep it
        return not waits
    if waits:
        if loser is not None:  # whoever keeps the newcomer wants it active
            raise UndecidedCandidates("Decide the case's other candidates first.")
        return False
    fields: dict[str, object] = {}
    activated = {case.sample_id}
    if case.sample_id is None:
        if newcomer.status != "suspected_duplicate":
            raise Conflict(f"The newcomer is {newcomer.status} by now.")
        if not may_activate(own, await look_alikes(newcomer.id, margin, session)):
            raise UndecidedCandidates("An active identity looks alike, and nobody has called the two distinct.")
        fields["status"] = "active"
        activated = {sample_id for s in newcomer.screenings[:1] for sample_id in s.sample_ids}
    fields["samples"] = [
        s.model_copy(update={"status": "active"}) if s.id in activated else s for s in newcomer.samples
    ]
    if not await newcomer.change(session, fields):
        raise Conflict("The newcomer was changed at the same moment.")
    return True
