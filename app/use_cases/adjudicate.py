"""Adjudicate: a person decides whether the look-alikes of a case are the same person."""

from dataclasses import dataclass

from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, record
from app.documents.base import now
from app.documents.cases import Case, CaseCandidate, Pair, look_alikes
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.domain.policy import Decision, LookAlike, may_activate
from app.errors import Advice, Conflict, NotFound, UndecidedCandidates, Validation
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

    Raises Conflict when it is decided already, UndecidedCandidates when two undecided look-alikes would become active,
    Validation when the judgement does not fit the case.
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
        by = action.actor_id
        for target in targets:
            await Pair.decide(newcomer.id, target.identity_id, judgement.decision, by, session)
        decided = {t.identity_id for t in targets}
        candidates = [
            c.model_copy(update={"decision": judgement.decision}) if c.identity_id in decided else c
            for c in case.candidates
        ]
        loser = await _loser(newcomer, targets[0], judgement, session) if judgement.decision == "duplicate" else None
        if loser is not None:
            await _make_duplicate(loser, case, session)
        is_over = await _settle(newcomer, case, candidates, loser, session)
        fields: dict[str, object] = {"candidates": [c.model_dump() for c in candidates]}
        if is_over:
            fields |= {"state": "decided", "decided_at": now(), "decided_by": by, "reason": judgement.reason}
        if not await case.change(session, fields):
            raise Conflict("The case was changed at the same moment.")
        await record(
            session, action, subject_kind="case", subject_id=case.id, gallery=gallery.name,
            detail={
                "decision": judgement.decision, "newcomer_id": newcomer.id, "identity_id": judgement.identity_id,
                "duplicate_id": None if loser is None else loser.id, "decided": is_over, "reason": judgement.reason,
            },
        )  # fmt: skip

    await runtime.transaction(decide)
    case = await Case.get(case_id)
    if case is None:
        raise NotFound
    return case


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
    newcomer: Identity, case: Case, candidates: list[CaseCandidate], loser: Identity | None, session: AsyncClientSession
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
        if not may_activate(own, await look_alikes(newcomer.id, session)):
            raise UndecidedCandidates("An active identity looks alike, and nobody has called the two distinct.")
        fields["status"] = "active"
        activated = {sample_id for s in newcomer.screenings[:1] for sample_id in s.sample_ids}
    fields["samples"] = [
        s.model_copy(update={"status": "active"}) if s.id in activated else s for s in newcomer.samples
    ]
    if not await newcomer.change(session, fields):
        raise Conflict("The newcomer was changed at the same moment.")
    return True
