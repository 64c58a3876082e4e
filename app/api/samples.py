"""Samples: add a photo of an identity, see it, see the face that is compared, remove it."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from app.api.bodies import StrictRoute
from app.api.dependencies import CurrentRuntime, IdempotencyKey, acting, first_answer
from app.api.identities import (
    PHOTO_PROBLEMS,
    PROPOSED,
    IdentityView,
    ProposedView,
    answer_with,
    first_proposed,
    found_identity,
    proposed,
)
from app.api.problems import problems
from app.api.shapes import Moment
from app.api.uploads import NoFields, Upload, body_of, uploaded
from app.audit import Action
from app.documents.proposals import IdentityProposal
from app.documents.removals import SampleRemoval
from app.domain.callers import Role
from app.domain.text import Reason
from app.errors import (
    Conflict,
    DependencyUnavailable,
    DifferentPerson,
    Forbidden,
    NoFace,
    NotFound,
    NotReady,
    PhotoMissing,
    Unauthenticated,
    Validation,
)
from app.use_cases import enrol, view_photo
from app.use_cases import remove_sample as removing

router = APIRouter(
    route_class=StrictRoute,
    prefix="/v1/identities/{identity_id}/samples",
    tags=["identities"],
    responses=problems(Unauthenticated, Forbidden, Validation),
)


class SampleReceiptView(BaseModel):
    """A sample that was removed. index_purge_by: until then index files may hold its rotated vector."""

    identity_id: str
    sample_id: str
    removed_at: Moment
    photos: int
    audit_event_id: str
    index_purge_by: Moment


@router.post(
    "",
    status_code=202,
    openapi_extra=body_of(NoFields, "photo"),
    responses=problems(*PHOTO_PROBLEMS, Validation, NotFound, Conflict, DifferentPerson),
)
async def add_sample(
    runtime: CurrentRuntime,
    request: Request,
    response: Response,
    identity_id: str,
    action: Annotated[Action, Depends(acting("sample.add", Role.OFFICER))],
    upload: Annotated[Upload[NoFields], Depends(uploaded(NoFields, "photo"))],
    key: IdempotencyKey = None,
) -> IdentityView:
    """One more photo of an active identity; pending until it is screened."""
    gallery, identity = await found_identity(action, identity_id)
    if await first_answer(runtime, request, action, key, {}, digests=upload.digests) is None:
        identity = await enrol.add_sample(runtime, action, gallery, identity, upload.photos["photo"][0])
    response.headers["Location"] = f"/v1/identities/{identity.id}"
    return await answer_with(runtime, action, response, gallery, identity)


def _sample_receipt(removal: SampleRemoval) -> SampleReceiptView:
    return SampleReceiptView(
        identity_id=removal.identity_id, sample_id=removal.id, removed_at=removal.removed_at, photos=1,
        audit_event_id=removal.event_id, index_purge_by=removal.index_purge_by,
    )  # fmt: skip


@router.delete("/{sample_id}", responses=problems(NotFound, Conflict, http_202=PROPOSED))
async def remove_sample(
    runtime: CurrentRuntime,
    request: Request,
    response: Response,
    identity_id: str,
    sample_id: str,
    action: Annotated[Action, Depends(acting("sample.remove", Role.OFFICER))],
    reason: Reason,
    key: IdempotencyKey = None,
) -> SampleReceiptView | ProposedView:
    """Remove one sample of an active or revoked identity; never the last one that it was enrolled by.

    In a gallery with `second_review` it is proposed: 202.
    """
    first = await first_answer(runtime, request, action, key, None)
    if first is None:
        gallery, _ = await found_identity(action, identity_id)
        done = await removing.ask(runtime, action, gallery, identity_id, sample_id, reason)
        return proposed(response, done.id) if isinstance(done, IdentityProposal) else _sample_receipt(done)
    proposal_id = first_proposed(first)
    if proposal_id is not None:
        return proposed(response, proposal_id)
    return _sample_receipt(await removing.removal_of_event(first[0]))


@router.get(
    "/{sample_id}/photo",
    response_class=Response,
    responses=problems(
        NotFound,
        PhotoMissing,
        DependencyUnavailable,
        http_200={"content": {"image/jpeg": {}}, "description": "The stored photo"},
    ),
)
async def get_photo(
    runtime: CurrentRuntime,
    identity_id: str,
    sample_id: str,
    action: Annotated[Action, Depends(acting("identity.photo.view", Role.OFFICER))],
) -> Response:
    """The stored photo; each view is audited."""
    gallery, identity = await found_identity(action, identity_id)
    photo = await view_photo.view_photo(runtime, action, gallery, identity, sample_id)
    headers = {"Cache-Control": "no-store", "Content-Disposition": f'attachment; filename="{sample_id}.jpg"'}
    return Response(photo, media_type="image/jpeg", headers=headers)


@router.get(
    "/{sample_id}/crop",
    response_class=Response,
    responses=problems(
        NotFound,
        PhotoMissing,
        NoFace,
        NotReady,
        DependencyUnavailable,
        http_200={"content": {"image/png": {}}, "description": "The face as it is compared"},
    ),
)
async def get_crop(
    runtime: CurrentRuntime,
    identity_id: str,
    sample_id: str,
    action: Annotated[Action, Depends(acting("identity.photo.view", Role.OFFICER))],
) -> Response:
    """The face as the recogniser gets it, 112 pixels a side; each view is audited."""
    gallery, identity = await found_identity(action, identity_id)
    crop = await view_photo.view_crop(runtime, action, gallery, identity, sample_id)
    headers = {"Cache-Control": "no-store", "Content-Disposition": f'attachment; filename="{sample_id}-crop.png"'}
    return Response(crop, media_type="image/png", headers=headers)
