"""De-duplication: jobs, cases for a person to decide; scans have a file of their own."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field

from app.api import identities, scans
from app.api.bodies import StrictRoute
from app.api.dependencies import CurrentRuntime, IdempotencyKey, acting, first_answer, gallery_of
from app.api.identities import IdentityView, visible_galleries
from app.api.paging import Page, Paged, page_of
from app.api.problems import problems
from app.api.shapes import Body, Moment
from app.audit import Action
from app.documents.cases import Case
from app.documents.events import Subject
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.scans import Scan
from app.domain.callers import Role
from app.domain.policy import Decision, Verdict
from app.errors import (
    Conflict,
    Forbidden,
    NotFound,
    Unauthenticated,
    UndecidedCandidates,
    Validation,
)
from app.runtime import Runtime
from app.use_cases import adjudicate

router = APIRouter(
    route_class=StrictRoute,
    prefix="/v1/dedup",
    tags=["de-duplication"],
    responses=problems(Unauthenticated, Forbidden, Validation),
)

Reading = Annotated[Action, Depends(acting("dedup.read", Role.OFFICER, is_read=True))]


class Progress(BaseModel):
    """How far a job is."""

    done: int
    total: int


class JobCandidate(BaseModel):
    """Somebody who looks alike."""

    identity_id: str
    score: float
    rank: int


class JobView(BaseModel):
    """A background job."""

    id: str
    kind: Literal["enrolment", "scan", "import"]
    state: Literal["queued", "running", "paused", "done", "failed", "cancelled"]
    progress: Progress
    verdict: Verdict | None
    candidates: list[JobCandidate]
    as_of_seq: int | None
    started_at: Moment | None
    finished_at: Moment | None


class CandidateView(BaseModel):
    """A look-alike of a case; null when it was erased."""

    identity: IdentityView | None
    score: float
    rank: int
    decision: Decision | None


class ProposalView(BaseModel):
    """What one officer would decide; it comes into force when another one decides the same. identity_id: null is all."""

    decision: Decision
    identity_id: str | None
    keep: str | None
    reason: str
    by: str
    at: Moment


class CaseView(BaseModel):
    """A newcomer (or a later sample) and everybody whom it looks like; the newcomer is null when it was erased.

    proposals and proposed_by: of galleries where two officers must agree.
    """

    id: str
    gallery: str
    state: Literal["open", "decided"]
    newcomer: IdentityView | None
    candidates: list[CandidateView]
    threshold: float
    created_at: Moment
    decided_at: Moment | None
    decided_by: str | None
    proposed_by: str | None
    proposals: list[ProposalView]
    reason: str | None
    version: int


class DecisionBody(Body):
    """What a person decided about a case or one of its candidates."""

    decision: Decision
    identity_id: Annotated[str, Field(max_length=64)] | None = None
    keep: Annotated[str, Field(max_length=64)] | None = None
    reason: Annotated[str, Field(min_length=1, max_length=1000)]


async def _views(runtime: Runtime, galleries: dict[str, Gallery], cases: list[Case]) -> list[CaseView]:
    ids = {case.newcomer_id for case in cases} | {c.identity_id for case in cases for c in case.candidates}
    people = await Identity.living_among(sorted(ids))

    def shown(gallery: Gallery, identity_id: str) -> IdentityView | None:
        identity = people.get(identity_id)
        return None if identity is None else identities.view(runtime, gallery, identity)

    views = []
    for case in cases:
        gallery = galleries[case.gallery_id]
        candidates = [
            CandidateView(identity=shown(gallery, c.identity_id), score=c.score, rank=c.rank, decision=c.decision)
            for c in case.candidates
        ]
        views.append(
            CaseView(
                id=case.id,
                gallery=gallery.name,
                state=case.state,
                newcomer=shown(gallery, case.newcomer_id),
                candidates=candidates,
                threshold=case.threshold,
                created_at=case.created_at,
                decided_at=case.decided_at,
                decided_by=case.decided_by,
                proposed_by=case.proposed_by,
                proposals=[ProposalView(**proposal.model_dump()) for proposal in case.proposals],
                reason=case.reason,
                version=case.version,
            )
        )
    return views


async def _found(action: Action, case_id: str) -> tuple[Gallery, Case]:
    action.subject = Subject(kind="case", id=case_id)
    case = await Case.get(case_id)
    if case is None:
        raise NotFound
    return await gallery_of(action, case.gallery_id), case


@router.get("/jobs/{job_id}", responses=problems(NotFound))
async def get_job(job_id: str, action: Reading) -> JobView:
    """A screening's state and what it found, or how far a scan is."""
    identity = await Identity.by_job(job_id)
    if identity is None:
        return await _scan_job(action, job_id)
    screening = identity.screening(job_id)
    if screening is None:
        raise NotFound
    await gallery_of(action, identity.gallery_id)
    total = len(screening.sample_ids)
    return JobView(
        id=job_id,
        kind="enrolment",
        state=screening.state,
        progress=Progress(done=total if screening.state == "done" else 0, total=total),
        verdict=screening.verdict,
        candidates=[JobCandidate(identity_id=c.identity_id, score=c.score, rank=c.rank) for c in screening.candidates],
        as_of_seq=screening.as_of_seq,
        started_at=screening.started_at,
        finished_at=screening.finished_at,
    )


async def _scan_job(action: Action, job_id: str) -> JobView:
    known = await Scan.get(job_id)
    if known is None:
        raise NotFound
    await gallery_of(action, known.gallery_id)
    return JobView(
        id=known.id,
        kind="scan",
        state=known.state,
        progress=Progress(done=known.done, total=known.total),
        verdict=None,
        candidates=[],
        as_of_seq=known.upto_seq,
        started_at=known.started_at,
        finished_at=known.finished_at,
    )


@router.get("/cases", responses=problems(NotFound))
async def list_cases(
    runtime: CurrentRuntime,
    request: Request,
    action: Reading,
    page: Annotated[Page, Depends()],
    state: Literal["open", "decided"] | None = None,
    gallery: str | None = None,
) -> Paged[CaseView]:
    """Cases, the oldest first: it waits the longest."""
    galleries = await visible_galleries(runtime, action, gallery)
    filters: dict[str, Any] = {"gallery_id": {"$in": list(galleries)}}
    if state is not None:
        filters["state"] = state
    items, cursor = await page_of(Case, filters, page, request, runtime.keys, order="oldest")
    return Paged(items=await _views(runtime, galleries, items), next_cursor=cursor)


@router.get("/cases/{case_id}", responses=problems(NotFound))
async def get_case(runtime: CurrentRuntime, response: Response, case_id: str, action: Reading) -> CaseView:
    """One case, with everybody in it."""
    gallery, case = await _found(action, case_id)
    response.headers["ETag"] = f'"{case.version}"'
    return (await _views(runtime, {gallery.id: gallery}, [case]))[0]


@router.post("/cases/{case_id}/decision", responses=problems(NotFound, Conflict, UndecidedCandidates))
async def decide_case(
    runtime: CurrentRuntime,
    request: Request,
    case_id: str,
    body: DecisionBody,
    action: Annotated[Action, Depends(acting("dedup.decide", Role.OFFICER))],
    key: IdempotencyKey = None,
) -> CaseView:
    """Decide a case: `distinct` for all or one of the candidates, or `duplicate` of one.

    In a gallery with `second_review` the first decision is a proposal, which another officer's equal one brings into force.
    """
    gallery, case = await _found(action, case_id)
    if await first_answer(runtime, request, action, key, body.model_dump()) is None:
        judgement = adjudicate.Judgement(body.decision, body.identity_id, body.keep, body.reason)
        case = await adjudicate.adjudicate(runtime, action, gallery, case_id, judgement)
    return (await _views(runtime, {gallery.id: gallery}, [case]))[0]


router.include_router(scans.router)
