"""Screen: compare what is new in a gallery with everything that came before it, and give the verdict.

Each sample is compared with every sample of others that has a lower `seq` and is not erased, whatever its identity's
status. So of two enrolments of one person at the same moment the later one always meets the earlier one, in any two
processes, without a lock. A job may run twice: the verdict is a compare-and-set on the screening.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, by_system, record
from app.documents.base import new_id, now
from app.documents.cases import Case, CaseCandidate, Pair, look_alikes
from app.documents.galleries import Gallery
from app.documents.identities import Candidate, Identity, Sample, Screening
from app.documents.sealed import data_key, open_template
from app.domain.policy import LookAlike, Status, Verdict, margin_of, may_activate, thresholds_for
from app.errors import Conflict, NotFound, NotReady, PhotoMissing
from app.runtime import Runtime

log = structlog.get_logger(__name__)

#: A screening that failed so often for a reason of its own (a kill or an absent store does not count) is given up.
TRIES = 5
RESTARTS = 10
SWEPT_AT_ONCE = 500
#: When a queued screening is asked for once more.
OUTBOX_PERIOD = timedelta(seconds=10)


class _CandidateGone(Exception):
    """A candidate was erased between the search and the verdict: search again."""


@dataclass(frozen=True, slots=True)
class _Found:
    candidates: list[Candidate]
    threshold: float
    as_of_seq: int


async def screen(runtime: Runtime, identity_id: str, job_id: str) -> None:
    """Carry out a screening to its verdict; nothing when it has one already, or its identity is gone.

    Raises NotReady when the gallery keeps changing under it; the queue tries again.
    """
    for _ in range(RESTARTS):
        identity = await Identity.living(identity_id)
        screening = None if identity is None else identity.screening(job_id)
        if identity is None or screening is None or not _is_due(identity, screening):
            return
        gallery = await Gallery.get(identity.gallery_id)
        if gallery is None:
            return
        runtime.require_contract(gallery)
        started_at = now()
        found = await _search(runtime, gallery, identity, screening)
        verdict = _Verdict(gallery, identity.id, job_id, started_at, found, margin_of(runtime.engine.card))
        try:
            await runtime.transaction(verdict.conclude)
        except _CandidateGone:
            continue
        return
    raise NotReady("The candidates keep changing; the screening is tried again.")


async def note_failure(runtime: Runtime, identity_id: str, job_id: str, reason: str) -> bool:
    """Count a try that failed for a reason of its own; True when that was the last and the screening is given up."""
    was_last = False

    async def count(session: AsyncClientSession) -> bool:
        nonlocal was_last
        identity = await Identity.living(identity_id, session)
        screening = None if identity is None else identity.screening(job_id)
        if identity is None or screening is None or screening.state not in ("queued", "running"):
            return True
        tries = screening.tries + 1
        if tries < TRIES:
            await identity.change(session, _with(identity, screening.model_copy(update={"tries": tries})))
            return False
        was_last = True
        ended = screening.model_copy(update={"tries": tries, "state": "failed", "finished_at": now()})
        fields = _with(identity, ended)
        if identity.status == "pending":
            fields["status"] = "failed"
        await identity.change(session, fields)
        gallery = await Gallery.get(identity.gallery_id, session=session)
        await record(
            session, by_system("dedup.verdict"), subject_kind="identity", subject_id=identity_id, outcome="failure",
            gallery=None if gallery is None else gallery.name, detail={"job_id": job_id, "tries": tries, "reason": reason},
        )  # fmt: skip
        return True

    is_over = await runtime.transaction(count)
    if was_last:
        log.error("screening_given_up", identity=identity_id, job=job_id, reason=reason)
    return is_over


async def screen_again(runtime: Runtime, action: Action, gallery: Gallery, identity_id: str) -> Identity:
    """Queue what has no verdict yet: a failed identity becomes pending again. Raises Conflict when all have one."""

    async def requeue(session: AsyncClientSession) -> list[Screening]:
        identity = await Identity.living(identity_id, session)
        if identity is None:
            raise NotFound
        open_ones = [s for s in identity.screenings if s.state != "done"]
        if not open_ones or identity.status == "duplicate":
            raise Conflict("There is nothing to screen: the verdict is there.")
        again = [queued_again(screening) for screening in open_ones]
        renewed = {screening.job_id: screening for screening in again}
        screenings = [renewed.get(s.job_id, s) for s in identity.screenings]
        fields: dict[str, object] = {"screenings": screenings, "outbox_at": again[0].due_at}
        if identity.status == "failed":
            fields["status"] = "pending"
        if not await identity.change(session, fields):
            raise NotReady("The identity was changed at the same moment.")
        await record(
            session, action, subject_kind="identity", subject_id=identity_id, gallery=gallery.name, status_code=202,
            detail={"job_id": again[-1].job_id, "screenings": len(again)},
        )  # fmt: skip
        return again

    for screening in await runtime.transaction(requeue):
        await runtime.queue.enqueue_screening(identity_id, screening.job_id, again=f":{new_id()}")
    known = await Identity.living(identity_id)
    if known is None:
        raise NotFound
    return known


async def sweep_overdue(runtime: Runtime) -> int:
    """Queue every screening that should have run by now: the queue may have lost it, or its worker died."""
    moment = now()
    overdue = await Identity.overdue(moment, SWEPT_AT_ONCE)
    for identity in overdue:
        due = [s for s in identity.screenings if s.state in ("queued", "running")]
        for screening in due:
            # Another queue id each time: the lock of a killed worker's job need not run out first.
            await runtime.queue.enqueue_screening(identity.id, screening.job_id, again=f":{int(moment.timestamp())}")
        next_look = moment + OUTBOX_PERIOD if due else None
        await Identity.get_pymongo_collection().update_one(
            {"_id": identity.id, "version": identity.version}, {"$set": {"outbox_at": next_look}}
        )
    if overdue:
        log.info("overdue_screenings_queued", count=len(overdue))
    return len(overdue)


def queued_again(screening: Screening) -> Screening:
    """The screening as it was before anyone worked on it."""
    return Screening(job_id=screening.job_id, sample_ids=screening.sample_ids, due_at=now())


def _is_due(identity: Identity, screening: Screening) -> bool:
    """Whether its verdict is still asked for: an enrolment's while pending, a later sample's while that is."""
    if screening.state not in ("queued", "running"):
        return False
    return identity.status == "pending" or (identity.status == "active" and screening is not identity.screenings[0])


def _with(identity: Identity, screening: Screening) -> dict[str, object]:
    """The fields that change with one screening."""
    screenings = identity.with_screening(screening)
    due = [s.due_at for s in screenings if s.state in ("queued", "running")]
    return {"screenings": screenings, "outbox_at": min(due, default=None)}


async def _search(runtime: Runtime, gallery: Gallery, identity: Identity, screening: Screening) -> _Found:
    """The best score of each identity that a sample of the screening looks like, among lower `seq`s."""
    threshold = thresholds_for(gallery.policy, runtime.engine.card, gallery.samples).dedup
    key = data_key(runtime.keys, gallery, identity)
    samples = [s for s in identity.samples if s.id in screening.sample_ids and not s.is_lost]
    if not samples:
        raise PhotoMissing("The sample has no template: its photo was lost when the gallery moved to another model.")
    best: dict[str, float] = {}
    as_of_seq = 0
    for sample in samples:
        if gallery.seq < sample.seq:
            raise NotReady("The gallery was read before the sample; the screening is tried again.")
        probe = open_template(key, gallery.id, identity.id, sample)
        hits = await runtime.search.range(gallery, probe, threshold)
        as_of_seq = max(as_of_seq, hits.as_of_seq)
        for hit in hits.items:
            if hit.seq < sample.seq and hit.identity_id != identity.id:
                best[hit.identity_id] = max(hit.score, best.get(hit.identity_id, -1.0))
    ordered = sorted(best.items(), key=lambda item: (-item[1], item[0]))
    candidates = [Candidate(identity_id=i, score=score, rank=rank) for rank, (i, score) in enumerate(ordered, start=1)]
    return _Found(candidates, threshold, as_of_seq)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """One screening's end: everything that must be true together, in one transaction."""

    gallery: Gallery
    identity_id: str
    job_id: str
    started_at: datetime
    found: _Found
    margin: float

    async def conclude(self, session: AsyncClientSession) -> None:
        """Write the verdict, its pairs, its case and its event, if the screening is still due."""
        identity = await Identity.living(self.identity_id, session)
        screening = None if identity is None else identity.screening(self.job_id)
        if identity is None or screening is None or not _is_due(identity, screening):
            return
        if not await self.gallery.stands(session):
            raise NotReady("The gallery changed its model or epoch; the screening is tried again.")
        candidates = self.found.candidates
        if not await Identity.touch_living([c.identity_id for c in candidates], session):
            raise _CandidateGone
        await Pair.record(self.gallery.id, self.gallery.contract, identity.id, candidates, session)
        others = {other.identity_id: other for other in await look_alikes(identity.id, self.margin, session)}
        undecided = [c for c in candidates if others[c.identity_id].decision != "distinct"]
        is_newcomer = identity.status == "pending"
        if is_newcomer and not undecided and not may_activate([], others.values()):
            undecided = await self._blocking(identity, others, session)
        case = self._case(identity, screening, undecided)
        if case is not None:
            await case.insert(session=session)
        verdict: Verdict = "unique" if case is None else "suspected_duplicate"
        ended = screening.model_copy(update={
            "state": "done", "verdict": verdict, "case_id": None if case is None else case.id,
            "candidates": undecided, "as_of_seq": self.found.as_of_seq, "started_at": self.started_at, "finished_at": now(),
        })  # fmt: skip
        fields = _with(identity, ended)
        if is_newcomer:
            status: Status = "active" if case is None else "suspected_duplicate"
            fields["status"] = status
        if case is None:
            fields["samples"] = [_active(s) if s.id in screening.sample_ids else s for s in identity.samples]
        if not await identity.change(session, fields):
            raise NotReady("The identity was changed at the same moment; the screening is tried again.")
        await record(
            session, by_system("dedup.verdict"), subject_kind="identity", subject_id=identity.id, gallery=self.gallery.name,
            detail={
                "verdict": verdict, "job_id": self.job_id, "case_id": ended.case_id, "candidates": len(undecided),
                "best_score": round(undecided[0].score, 2) if undecided else None,
                "threshold": round(self.found.threshold, 4), "as_of_seq": self.found.as_of_seq,
            },
        )  # fmt: skip

    async def _blocking(
        self, identity: Identity, others: dict[str, LookAlike], session: AsyncClientSession
    ) -> list[Candidate]:
        """Active look-alikes that other screenings recorded and nobody called distinct: they stand in the way as well."""
        scores = {pair.other_side(identity.id): pair.score for pair in await Pair.of(identity.id, session)}
        blocking = [o.identity_id for o in others.values() if o.decision != "distinct" and o.status == "active"]
        ordered = sorted(blocking, key=lambda other: (-scores[other], other))
        return [Candidate(identity_id=o, score=scores[o], rank=rank) for rank, o in enumerate(ordered, start=1)]

    def _case(self, identity: Identity, screening: Screening, undecided: list[Candidate]) -> Case | None:
        if not undecided:
            return None
        is_newcomer = identity.status == "pending"
        return Case(
            id=new_id(), gallery_id=self.gallery.id, newcomer_id=identity.id,
            sample_id=None if is_newcomer else screening.sample_ids[0], job_id=self.job_id, state="open",
            candidates=[CaseCandidate(identity_id=c.identity_id, score=c.score, rank=c.rank) for c in undecided],
            threshold=self.found.threshold, created_at=now(),
        )  # fmt: skip


def _active(sample: Sample) -> Sample:
    return sample.model_copy(update={"status": "active"})
