"""Identities: enrol people, see and change what is known of them, erase them."""

from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from app.api.bodies import StrictRoute
from app.api.dependencies import (
    CurrentRuntime,
    IdempotencyKey,
    acting,
    first_answer,
    gallery_of,
    grant_of,
    visible_gallery,
)
from app.api.paging import Page, Paged, cursor_behind, page_of
from app.api.problems import problems
from app.api.shapes import Body, Moment
from app.api.uploads import Upload, body_of, uploaded
from app.audit import Action
from app.documents.claims import IdempotencyClaim
from app.documents.events import AuditEvent, Detail
from app.documents.galleries import DEFAULT_GALLERY, Gallery
from app.documents.identities import Identity, Liveness, Sample
from app.documents.proposals import IdentityProposal
from app.documents.sealed import asked_tags, gallery_key, holders_of, shown_attributes
from app.domain.attributes import AskedRef, BirthDate, GivenAttributes, Json
from app.domain.callers import Role
from app.domain.faces import Box
from app.domain.names import begins_like, canonical_name
from app.domain.policy import Status, Verdict
from app.domain.quality import QualityReport
from app.domain.text import Reason
from app.errors import (
    Advice,
    AnimatedImage,
    Conflict,
    DependencyUnavailable,
    DifferentPeople,
    ExternalRefTaken,
    FaceCropped,
    FaceTooSmall,
    Forbidden,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    LowQuality,
    ModelMismatch,
    MultipleFaces,
    NoFace,
    NotFound,
    NotImplementedYet,
    NotLive,
    NotReady,
    PreconditionFailed,
    TooLarge,
    TooManyPixels,
    Unauthenticated,
    UndecidedCandidates,
    UndecodableImage,
    UnsupportedMediaType,
    Validation,
)
from app.readings import note_answer, note_reading
from app.runtime import Runtime
from app.use_cases import enrol, erase, export_subject, screen, standing, update

PHOTO_PROBLEMS = (
    NoFace, MultipleFaces, FaceTooSmall, FaceCropped, LowQuality, NotLive, UndecodableImage, AnimatedImage, TooManyPixels,
    TooLarge, UnsupportedMediaType, ModelMismatch, NotReady, DependencyUnavailable,
)  # fmt: skip

router = APIRouter(
    route_class=StrictRoute,
    prefix="/v1/identities",
    tags=["identities"],
    responses=problems(Unauthenticated, Forbidden, Validation),
)

MOST_PHOTOS = 5
#: Pages that one search by name opens at most, where the first letters of the name are many people's.
MOST_NAME_PAGES = 10
WAIT_MAXIMUM_SECONDS = 30
#: Of int64, and far from where Python refuses to read a number.
VERSION_DIGITS = 18

Reading = Annotated[Action, Depends(acting("identity.read", Role.OFFICER, is_read=True))]
#: An enroller reads the verdicts of its own enrolments.
VerdictReading = Annotated[Action, Depends(acting("identity.read", Role.OFFICER, Role.ENROLLER, is_read=True))]
Listing = Annotated[Action, Depends(acting("identity.list", Role.OFFICER, is_read=True))]
#: What the event of a list says of each filter: never the text that was looked for.
QUERIES = {
    "external_ref": "reference", "q": "name", "status": "status", "created_after": "time", "created_before": "time",
}  # fmt: skip


class Enrolment(GivenAttributes):
    """The fields of an enrolment beside its photos."""

    gallery: str = DEFAULT_GALLERY


class AttributesPatch(Body):
    """RFC 7396: null removes."""

    external_ref: str | None = None
    full_name: str | None = None
    date_of_birth: BirthDate | None = None
    metadata: dict[str, Json] | None = None


class Because(Body):
    """Why."""

    reason: Reason


class SampleView(BaseModel):
    """One photo of the person. box: on the upright photo as it was sent. stored_box: on the photo that is stored.

    faces_found and both boxes are null for samples of older versions.
    """

    id: str
    status: Literal["pending", "active"]
    quality: QualityReport
    liveness: Liveness | None
    faces_found: int | None
    box: Box | None
    stored_box: Box | None
    created_at: Moment


class DedupView(BaseModel):
    """The newest screening. For an enroller that of its enrolment, with `case_id` and `candidate_count` null."""

    job_id: str
    state: Literal["queued", "running", "done", "failed"]
    verdict: Verdict | None
    case_id: str | None
    candidate_count: int | None


class IdentityView(BaseModel):
    """Someone known in a gallery."""

    id: str
    gallery: str
    external_ref: str | None
    full_name: str | None
    date_of_birth: date | None
    metadata: dict[str, Json]
    status: Status
    samples: list[SampleView]
    dedup: DedupView
    created_at: Moment
    created_by: str
    updated_at: Moment
    version: int


class RemainderView(BaseModel):
    """Something that stays for a while: until then, or, where no clock ends it, as the note says."""

    what: str
    until: Moment | None
    note: str


class ReceiptView(BaseModel):
    """What was erased, and what remains until when; `receipt` is the same, signed as assertions are."""

    identity_id: str
    erased_at: Moment
    samples: int
    photos: int
    audit_event_id: str
    index_purge_by: Moment
    remains: list[RemainderView]
    receipt: str | None


class ProposedView(BaseModel):
    """The action waits for a second officer: see `/v1/proposals`."""

    proposal_id: str


def view(runtime: Runtime, gallery: Gallery, identity: Identity) -> IdentityView:
    """The identity with its attributes opened."""
    attributes = shown_attributes(runtime.keys, gallery, identity)
    newest = identity.screenings[-1]
    return IdentityView(
        id=identity.id,
        gallery=gallery.name,
        external_ref=attributes.external_ref,
        full_name=attributes.full_name,
        date_of_birth=attributes.date_of_birth,
        metadata=attributes.metadata,
        status=identity.status,
        samples=[_sample(s) for s in identity.samples],
        dedup=DedupView(
            job_id=newest.job_id,
            state=newest.state,
            verdict=newest.verdict,
            case_id=newest.case_id,
            candidate_count=len(newest.candidates),
        ),
        created_at=identity.created_at,
        created_by=identity.created_by,
        updated_at=identity.updated_at,
        version=identity.version,
    )


def _sample(sample: Sample) -> SampleView:
    return SampleView(
        id=sample.id,
        status=sample.status,
        quality=sample.quality,
        liveness=sample.liveness,
        faces_found=None if sample.found is None else sample.found.faces_found,
        box=None if sample.found is None else sample.found.box,
        stored_box=sample.stored_box,
        created_at=sample.created_at,
    )


def verdict_view(gallery: Gallery, identity: Identity) -> IdentityView:
    """The identity as its enroller sees it: status and verdict of the enrolment, and the quality of the photos that it sent.

    What officers learn and change later is not part of it, nor who looks alike, nor how many do.
    """
    screening = identity.screenings[0]
    sent = set(screening.sample_ids)
    return IdentityView(
        id=identity.id,
        gallery=gallery.name,
        external_ref=None,
        full_name=None,
        date_of_birth=None,
        metadata={},
        status=identity.status,
        samples=[_sample(s) for s in identity.samples if s.id in sent],
        dedup=DedupView(
            job_id=screening.job_id,
            state=screening.state,
            verdict=screening.verdict,
            case_id=None,
            candidate_count=None,
        ),
        created_at=identity.created_at,
        created_by=identity.created_by,
        updated_at=identity.updated_at,
        version=identity.version,
    )


def require_own_enrolment(action: Action, identity: Identity) -> None:
    """Raises NotFound for an enroller who did not enrol this person."""
    caller = action.caller
    if caller is None or (caller.sees_own_enrolments_only and identity.created_by != caller.id):
        raise NotFound


async def visible_identity(action: Action, identity_id: str) -> tuple[Gallery, Identity]:
    """The identity and its gallery. Raises NotFound for unknown, erased, and foreign ones alike."""
    action.about("identity", identity_id)
    identity = await Identity.seen(identity_id, grant_of(action))
    if identity is None:
        raise NotFound
    return await gallery_of(action, identity.gallery_id), identity


async def found_identity(action: Action, identity_id: str) -> tuple[Gallery, Identity]:
    """As `visible_identity`, for who reads about the person or changes something. An enroller finds its own enrolments only."""
    gallery, identity = await visible_identity(action, identity_id)
    require_own_enrolment(action, identity)
    return gallery, identity


async def answer_with(
    runtime: Runtime, action: Action, response: Response, gallery: Gallery, identity: Identity
) -> IdentityView:
    """The answer about one identity, as far as the caller may see it; its `ETag` is its version.

    If it shows attributes and the action has no event, it is noted as a reading.
    """
    response.headers["ETag"] = f'"{identity.version}"'
    if action.caller is None or action.caller.sees_own_enrolments_only:
        return verdict_view(gallery, identity)
    await note_answer(runtime, action, gallery.name, identity)
    return view(runtime, gallery, identity)


@router.post(
    "",
    status_code=202,
    openapi_extra=body_of(Enrolment, "photo", most=MOST_PHOTOS),
    responses=problems(
        *PHOTO_PROBLEMS,
        Validation,
        DifferentPeople,
        ExternalRefTaken,
        NotFound,
        IdempotencyInProgress,
        IdempotencyKeyReused,
        http_201={"model": IdentityView, "description": "Screened within `wait`"},
    ),
)
async def enrol_identity(
    runtime: CurrentRuntime,
    request: Request,
    response: Response,
    action: Annotated[Action, Depends(acting("identity.enrol", Role.OFFICER, Role.ENROLLER))],
    upload: Annotated[Upload[Enrolment], Depends(uploaded(Enrolment, "photo", most=MOST_PHOTOS))],
    wait: Annotated[float, Query(ge=0, le=WAIT_MAXIMUM_SECONDS)] = 0,
    key: IdempotencyKey = None,
) -> IdentityView:
    """Enrol someone from one to five photos. 202 means durable; with `wait` the verdict may come along: 201."""
    fields = upload.fields
    gallery = await visible_gallery(runtime, action, fields.gallery)
    first = await first_answer(runtime, request, action, key, fields.model_dump(mode="json"), digests=upload.digests)
    if first is None:
        attributes = GivenAttributes.model_validate(fields.model_dump(exclude={"gallery"}))
        identity = await enrol.enrol(runtime, action, gallery, upload.photos["photo"], attributes)
    else:
        _, identity = await found_identity(action, first[0].subject.id or "")
    upload.discard_photos()
    if wait:
        identity = await enrol.await_verdict(identity, wait)
    if wait and identity.status != "pending":
        response.status_code = 201
    response.headers["Location"] = f"/v1/identities/{identity.id}"
    answer = await answer_with(runtime, action, response, gallery, identity)
    if action.caller is None or action.caller.sees_own_enrolments_only:
        # What it has just sent itself.
        return answer.model_copy(update=fields.model_dump(exclude={"gallery"}))
    return answer


@router.post("/import", status_code=501, responses=problems(NotImplementedYet))
async def import_identities(action: Annotated[Action, Depends(acting("identity.import", Role.OFFICER))]) -> None:
    """Bulk enrolment."""
    raise NotImplementedYet("Bulk import is not built yet.")


@router.get("", responses=problems(NotFound))
async def list_identities(
    runtime: CurrentRuntime,
    request: Request,
    action: Listing,
    page: Annotated[Page, Depends()],
    gallery: str | None = None,
    external_ref: AskedRef | None = None,
    status: Literal["pending", "active", "suspected_duplicate", "duplicate", "revoked", "failed"] | None = None,
    q: Annotated[str | None, Query(min_length=1, max_length=256)] = None,
    created_after: Moment | None = None,
    created_before: Moment | None = None,
) -> Paged[IdentityView]:
    """Everybody whom the caller may see, newest first."""
    galleries = await visible_galleries(runtime, action, gallery)
    filters: dict[str, Any] = {"gallery_id": {"$in": list(galleries)}, "status": status or {"$ne": "erased"}}
    if external_ref is not None:
        holders = await holders_of(runtime.keys, list(galleries.values()), external_ref)
        filters["_id"] = {"$in": [holder.id for holder in holders]}
    times = {"$gte": created_after, "$lt": created_before}
    times = {name: moment for name, moment in times.items() if moment is not None}
    if times:
        filters["created_at"] = times
    if q is not None:
        found = await _named(runtime, request, galleries, filters, page, q)
    else:
        items, cursor = await page_of(Identity, filters, page, request, runtime.keys)
        found = Paged(items=[view(runtime, galleries[i.gallery_id], i) for i in items], next_cursor=cursor)
    if found.items or q is not None or external_ref is not None:
        # Whether somebody of a name is there is an answer too.
        await note_reading(runtime, action, {one.id: one.gallery for one in found.items}, asked(request, QUERIES))
    return found


def asked(request: Request, kinds: Mapping[str, str]) -> Detail:
    """What the event of a list says of its query: which kinds of filters it had."""
    return {"query": ",".join(sorted({kinds[name] for name in request.query_params if name in kinds})) or "all"}


async def _named(
    runtime: Runtime, request: Request, galleries: dict[str, Gallery], filters: dict[str, Any], page: Page, q: str
) -> Paged[IdentityView]:
    """Those whose name, or whose name from one of its words on, begins like `q`.

    A tag stands for the first letters only, and may be another's by chance: each one found is opened and looked at. A page may
    hold fewer than were asked for when many were found in vain.
    """
    wanted = canonical_name(q)
    if not wanted:
        message = "A name prefix has a letter."
        raise Validation(message, errors=(Advice("q", "empty", message),))
    tags = [tag for gallery in galleries.values() for tag in asked_tags(gallery_key(runtime.keys, gallery), q)]
    tagged = filters | {"name_tags": {"$in": tags}}
    found: list[IdentityView] = []
    for _ in range(MOST_NAME_PAGES):
        items, cursor = await page_of(Identity, tagged, page, request, runtime.keys)
        views = [view(runtime, galleries[i.gallery_id], i) for i in items]
        found += [one for one in views if one.full_name is not None and begins_like(one.full_name, wanted)]
        if len(found) > page.limit:
            found = found[: page.limit]
            cursor = cursor_behind(runtime.keys, request, found[-1].created_at.isoformat(), found[-1].id)
        if cursor is None or len(found) == page.limit:
            break
        page = Page(page.limit, cursor)
    return Paged(items=found, next_cursor=cursor)


async def visible_galleries(runtime: Runtime, action: Action, name: str | None) -> dict[str, Gallery]:
    """The galleries that the caller may see, by id; with a name, that one or NotFound."""
    if name is not None:
        gallery = await visible_gallery(runtime, action, name)
        return {gallery.id: gallery}
    allowed = None if action.caller is None else action.caller.galleries
    found = Gallery.find({} if allowed is None else {"_id": {"$in": list(allowed)}})
    return {gallery.id: gallery for gallery in await found.to_list()}


@router.get("/{identity_id}", responses=problems(NotFound))
async def get_identity(
    runtime: CurrentRuntime, response: Response, identity_id: str, action: VerdictReading
) -> IdentityView:
    """One identity; its `ETag` is its version. An enroller sees the verdicts of its own enrolments."""
    return await answer_with(runtime, action, response, *await found_identity(action, identity_id))


PROPOSED = {"model": ProposedView, "description": "Proposed: a second officer must agree"}


def proposed(response: Response, proposal_id: str) -> ProposedView:
    """The answer where a second officer must agree."""
    response.status_code = 202
    response.headers["Location"] = f"/v1/proposals/{proposal_id}"
    return ProposedView(proposal_id=proposal_id)


def first_proposed(first: tuple[AuditEvent, IdempotencyClaim]) -> str | None:
    """The proposal that the first request with this idempotency key made, if it made one."""
    event, _ = first
    return str(event.detail["proposal_id"]) if event.action == "proposal.create" else None


@router.patch(
    "/{identity_id}",
    responses=problems(NotFound, Conflict, ExternalRefTaken, PreconditionFailed, http_202=PROPOSED),
)
async def update_identity(
    runtime: CurrentRuntime,
    request: Request,
    response: Response,
    identity_id: str,
    body: AttributesPatch,
    action: Annotated[Action, Depends(acting("identity.update", Role.OFFICER))],
    if_match: Annotated[str | None, Header()] = None,
    key: IdempotencyKey = None,
) -> IdentityView | ProposedView:
    """Change attributes; with `If-Match` only at that version.

    In a gallery with `second_review` a change of `external_ref` is proposed: 202.
    """
    gallery, identity = await found_identity(action, identity_id)
    patch = body.model_dump(mode="json", exclude_unset=True)
    first = await first_answer(runtime, request, action, key, patch)
    if first is None:
        updated = await update.update(runtime, action, gallery, identity_id, patch, _version(if_match))
        if isinstance(updated, IdentityProposal):
            return proposed(response, updated.id)
        identity = updated
    elif (proposal_id := first_proposed(first)) is not None:
        return proposed(response, proposal_id)
    return await answer_with(runtime, action, response, gallery, identity)


def _version(if_match: str | None) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().removeprefix("W/").strip('"')
    if not text.isdecimal() or len(text) > VERSION_DIGITS:
        raise PreconditionFailed("If-Match is the version in quotes, as ETag gave it.")
    return int(text)


def receipt_view(receipt: erase.Receipt) -> ReceiptView:
    """The receipt as the contract gives it."""
    return ReceiptView(
        identity_id=receipt.identity_id, erased_at=receipt.erased_at, samples=receipt.samples, photos=receipt.photos,
        audit_event_id=receipt.audit_event_id, index_purge_by=receipt.index_purge_by,
        remains=[RemainderView(what=r.what, until=r.until, note=r.note) for r in receipt.remains], receipt=receipt.text,
    )  # fmt: skip


@router.delete("/{identity_id}", responses=problems(NotFound, http_202=PROPOSED))
async def erase_identity(
    runtime: CurrentRuntime,
    request: Request,
    response: Response,
    identity_id: str,
    action: Annotated[Action, Depends(acting("identity.erase", Role.OFFICER))],
    reason: Reason,
    key: IdempotencyKey = None,
) -> ReceiptView | ProposedView:
    """Erase someone: keys destroyed, photos deleted, unmatchable at once.

    In a gallery with `second_review` it is proposed: 202.
    """
    first = await first_answer(runtime, request, action, key, None)
    if first is None:
        gallery, _ = await found_identity(action, identity_id)
        done = await erase.ask(runtime, action, gallery, identity_id, reason)
        return proposed(response, done.id) if isinstance(done, IdentityProposal) else receipt_view(done)
    proposal_id = first_proposed(first)
    if proposal_id is not None:
        return proposed(response, proposal_id)
    return receipt_view(await erase.receipt_of_event(first[0]))


@router.post("/{identity_id}/screen", status_code=202, responses=problems(NotFound, Conflict))
async def screen_identity(
    runtime: CurrentRuntime,
    request: Request,
    response: Response,
    identity_id: str,
    action: Annotated[Action, Depends(acting("identity.screen", Role.OFFICER))],
    key: IdempotencyKey = None,
) -> IdentityView:
    """Queue the screening again: of a failed identity, or of a sample without a verdict."""
    gallery, identity = await found_identity(action, identity_id)
    if await first_answer(runtime, request, action, key, {}) is None:
        identity = await screen.screen_again(runtime, action, gallery, identity_id)
    return await answer_with(runtime, action, response, gallery, identity)


@router.post("/{identity_id}/revoke", responses=problems(NotFound, Conflict))
async def revoke_identity(
    runtime: CurrentRuntime,
    request: Request,
    response: Response,
    identity_id: str,
    body: Because,
    action: Annotated[Action, Depends(acting("identity.revoke", Role.OFFICER))],
    key: IdempotencyKey = None,
) -> IdentityView:
    """Take an active identity out of service."""
    gallery, identity = await found_identity(action, identity_id)
    if await first_answer(runtime, request, action, key, body.model_dump()) is None:
        identity = await standing.revoke(runtime, action, gallery, identity_id, body.reason)
    return await answer_with(runtime, action, response, gallery, identity)


@router.post("/{identity_id}/reinstate", responses=problems(NotFound, Conflict, UndecidedCandidates))
async def reinstate_identity(
    runtime: CurrentRuntime,
    request: Request,
    response: Response,
    identity_id: str,
    body: Because,
    action: Annotated[Action, Depends(acting("identity.reinstate", Role.OFFICER))],
    key: IdempotencyKey = None,
) -> IdentityView:
    """Bring a revoked identity back."""
    gallery, identity = await found_identity(action, identity_id)
    if await first_answer(runtime, request, action, key, body.model_dump()) is None:
        identity = await standing.reinstate(runtime, action, gallery, identity_id, body.reason)
    return await answer_with(runtime, action, response, gallery, identity)


@router.post("/{identity_id}/attempts:reset", responses=problems(NotFound))
async def reset_attempts(
    runtime: CurrentRuntime,
    request: Request,
    response: Response,
    identity_id: str,
    action: Annotated[Action, Depends(acting("identity.attempts.reset", Role.OFFICER))],
    key: IdempotencyKey = None,
) -> IdentityView:
    """Let the identity be verified again after too many non-matches."""
    gallery, identity = await found_identity(action, identity_id)
    if await first_answer(runtime, request, action, key, None) is None:
        identity = await standing.reset_attempts(runtime, action, gallery, identity_id)
    return await answer_with(runtime, action, response, gallery, identity)


@router.get(
    "/{identity_id}/export",
    response_class=Response,
    responses=problems(
        NotFound,
        http_200={"content": {"application/json": {"schema": {"type": "object"}}}, "description": "One JSON document"},
    ),
)
async def export_identity(
    runtime: CurrentRuntime,
    identity_id: str,
    action: Annotated[Action, Depends(acting("identity.export", Role.OFFICER))],
) -> Response:
    """Everything that is kept about the person, for an access request; of others it holds ids only. Each export is audited."""
    gallery, _ = await found_identity(action, identity_id)
    pieces = await export_subject.export_subject(runtime, action, gallery, identity_id)
    headers = {"Cache-Control": "no-store", "Content-Disposition": f'attachment; filename="{identity_id}.json"'}
    return StreamingResponse(pieces, media_type="application/json", headers=headers)


imports = APIRouter(
    prefix="/v1/imports",
    tags=["identities"],
    responses=problems(Unauthenticated, Forbidden, NotFound, Validation, NotImplementedYet),
)


@imports.get("/{import_id}", status_code=501)
@imports.get("/{import_id}/results", status_code=501)
async def get_import(import_id: str, action: Reading) -> None:
    """A bulk enrolment's progress and verdicts."""
    raise NotImplementedYet("Bulk import is not built yet.")
