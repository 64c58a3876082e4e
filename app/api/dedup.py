"""De-duplication: jobs, cases for a person to decide; scans have a file of their own."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field

from app.api import identities, scans
from app.api.bodies import StrictRoute
from app.api.dependencies import CurrentRuntime, IdempotencyKey, acting, first_answer, gallery_of, grant_of
from app.api.identities import IdentityView, asked, visible_galleries
from app.api.paging import Page, Paged, cursor_behind, page_of_parts, position_of
from app.api.problems import problems
from app.api.shapes import Body, Moment
from app.audit import Action
from app.documents.cases import Case, CasePage
from app.documents.events import Detail
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.scans import Scan
from app.domain.callers import Role
from app.domain.policy import Decision, Verdict
from app.domain.text import Reason
from app.errors import (
    Conflict,
    Forbidden,
    NotFound,
    Unauthenticated,
    UndecidedCandidates,
    Validation,
)
from app.readings import count_people, note_reading
from app.runtime import Runtime
from app.use_cases import adjudicate

router = APIRouter(
    route_class=StrictRoute,
    prefix="/v1/dedup",
    tags=["de-duplication"],
    responses=problems(Unauthenticated, Forbidden, Validation),
)

Reading = Annotated[Action, Depends(acting("dedup.read", Role.OFFICER, is_read=True))]
#: An enroller reads the verdicts of its own enrolments.
VerdictReading = Annotated[Action, Depends(acting("dedup.read", Role.OFFICER, Role.ENROLLER, is_read=True))]
CaseReading = Annotated[Action, Depends(acting("case.read", Role.OFFICER, is_read=True))]
CaseListing = Annotated[Action, Depends(acting("case.list", Role.OFFICER, is_read=True))]


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
    """A background job. candidates: null for an enroller."""

    id: str
    kind: Literal["enrolment", "scan", "import"]
    state: Literal["queued", "running", "paused", "done", "failed", "cancelled"]
    progress: Progress
    verdict: Verdict | None
    candidates: list[JobCandidate] | None
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
    reason: str | None
    by: str
    at: Moment


class CaseView(BaseModel):
    """A newcomer (or a later sample) and everybody whom it looks like; the newcomer is null when it was erased.

    candidates: in a list the first ones, in a single case one page. candidate_count: how many there are in all.
    candidates_next_cursor: send it as `cursor` to `GET /v1/dedup/cases/{id}`. proposals and proposed_by: only in galleries where
    two officers must agree.
    """

    id: str
    gallery: str
    state: Literal["open", "decided"]
    newcomer: IdentityView | None
    candidates: list[CandidateView]
    candidate_count: int
    candidates_next_cursor: str | None = None
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
    reason: Reason


def _opened(
    runtime: Runtime, galleries: dict[str, Gallery], cases: Sequence[CasePage], people: dict[str, Identity]
) -> Iterator[CaseView]:
    """The cases as answers; each person is decrypted once. Blocking."""
    shown: dict[str, IdentityView | None] = {}

    def view_of(gallery: Gallery, identity_id: str) -> IdentityView | None:
        if identity_id not in shown:
            identity = people.get(identity_id)
            shown[identity_id] = None if identity is None else identities.view(runtime, gallery, identity)
        return shown[identity_id]

    for case in cases:
        gallery = galleries[case.gallery_id]
        candidates = [
            CandidateView(identity=view_of(gallery, c.identity_id), score=c.score, rank=c.rank, decision=c.decision)
            for c in case.candidates
        ]
        yield CaseView(
            id=case.id,
            gallery=gallery.name,
            state=case.state,
            newcomer=view_of(gallery, case.newcomer_id),
            candidates=candidates,
            candidate_count=case.candidate_count,
            threshold=case.threshold,
            created_at=case.created_at,
            decided_at=case.decided_at,
            decided_by=case.decided_by,
            proposed_by=case.proposed_by,
            proposals=[ProposalView(**proposal.model_dump()) for proposal in case.proposals],
            reason=case.reason,
            version=case.version,
        )


async def _people_of(cases: Sequence[CasePage]) -> dict[str, Identity]:
    ids = {case.newcomer_id for case in cases} | {c.identity_id for case in cases for c in case.candidates}
    return await Identity.living_among(sorted(ids))


async def _one(
    runtime: Runtime, request: Request, action: Action, gallery: Gallery, case_id: str, page: Page
) -> CaseView:
    """A case with one page of its candidates. Those whom it shows are counted; if the action has no event, it is a reading.

    Raises NotFound, Validation for a bad cursor.
    """
    place = position_of(runtime.keys, request, page, int)
    skip = 0 if place is None else place[0]
    case = await CasePage.get(case_id, skip, page.limit)
    if case is None:
        raise NotFound
    people = await _people_of([case])
    (shown,) = await runtime.compute(list, _opened(runtime, {gallery.id: gallery}, [case], people))
    if action.is_recorded:
        await count_people(runtime, action, people)
    else:
        detail: Detail = {} if action.is_read else {"answer_to": action.name}
        await note_reading(runtime, replace(action, name="case.read"), dict.fromkeys(people, gallery.name), detail)
    behind = skip + len(case.candidates)
    cursor = cursor_behind(runtime.keys, request, behind, case.id) if behind < case.candidate_count else None
    return shown.model_copy(update={"candidates_next_cursor": cursor})


async def _gallery_of(action: Action, case_id: str) -> Gallery:
    action.about("case", case_id)
    gallery_id = await CasePage.gallery_of(case_id, grant_of(action))
    if gallery_id is None:
        raise NotFound
    return await gallery_of(action, gallery_id)


@router.get("/jobs/{job_id}", responses=problems(NotFound))
async def get_job(job_id: str, action: VerdictReading) -> JobView:
    """A screening's state and what it found, or how far a scan is. An enroller reads the jobs of its own enrolments."""
    is_enroller = action.caller is None or action.caller.sees_own_enrolments_only
    identity = await Identity.by_job(job_id, grant_of(action))
    if identity is None and not is_enroller:
        return await _scan_job(action, job_id)
    screening = None if identity is None else identity.screening(job_id)
    if identity is None or screening is None:
        raise NotFound
    identities.require_own_enrolment(action, identity)
    if is_enroller and job_id != identity.screenings[0].job_id:  # of a photo that an officer added
        raise NotFound
    await gallery_of(action, identity.gallery_id)
    total = len(screening.sample_ids)
    return JobView(
        id=job_id,
        kind="enrolment",
        state=screening.state,
        progress=Progress(done=total if screening.state == "done" else 0, total=total),
        verdict=screening.verdict,
        candidates=None
        if is_enroller
        else [JobCandidate(identity_id=c.identity_id, score=c.score, rank=c.rank) for c in screening.candidates],
        as_of_seq=screening.as_of_seq,
        started_at=screening.started_at,
        finished_at=screening.finished_at,
    )


async def _scan_job(action: Action, job_id: str) -> JobView:
    known = await Scan.seen(job_id, grant_of(action))
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


@router.get("/cases", response_model=Paged[CaseView], responses=problems(NotFound))
async def list_cases(
    runtime: CurrentRuntime,
    request: Request,
    action: CaseListing,
    page: Annotated[Page, Depends()],
    state: Literal["open", "decided"] | None = None,
    gallery: str | None = None,
) -> Response:
    """Cases, the oldest first. Each has its first candidates and the number of all its candidates."""
    galleries = await visible_galleries(runtime, action, gallery)
    filters: dict[str, Any] = {"gallery_id": {"$in": list(galleries)}}
    if state is not None:
        filters["state"] = state
    items, cursor = await page_of_parts(Case, CasePage, filters, page, request, runtime.keys)
    people = await _people_of(items)

    def written() -> bytes:
        # Written here, in a thread: FastAPI would do it on the event loop, and a page may contain two thousand people.
        cases = [case.model_dump_json() for case in _opened(runtime, galleries, items, people)]
        return f'{{"items":[{",".join(cases)}],"next_cursor":{json.dumps(cursor)}}}'.encode()

    answer = Response(await runtime.compute(written), media_type="application/json")
    if people:
        shown = {id_: galleries[identity.gallery_id].name for id_, identity in people.items()}
        await note_reading(runtime, action, shown, {**asked(request, {"state": "state"}), "cases": len(items)})
    return answer


@router.get("/cases/{case_id}", responses=problems(NotFound))
async def get_case(
    runtime: CurrentRuntime,
    request: Request,
    response: Response,
    case_id: str,
    action: CaseReading,
    page: Annotated[Page, Depends()],
) -> CaseView:
    """One case, with a page of its candidates, the best score first."""
    gallery = await _gallery_of(action, case_id)
    case = await _one(runtime, request, action, gallery, case_id, page)
    response.headers["ETag"] = f'"{case.version}"'
    return case


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
    gallery = await _gallery_of(action, case_id)
    if await first_answer(runtime, request, action, key, body.model_dump()) is None:
        judgement = adjudicate.Judgement(body.decision, body.identity_id, body.keep, body.reason)
        await adjudicate.adjudicate(runtime, action, gallery, case_id, judgement)
    return await _one(runtime, request, action, gallery, case_id, Page())


router.include_router(scans.router)
