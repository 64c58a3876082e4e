"""Galleries: populations that are kept apart, with their policies."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.api.bodies import StrictRoute
from app.api.dependencies import CurrentRuntime, IdempotencyKey, acting, first_answer, visible_gallery
from app.api.paging import Page, Paged, page_of
from app.api.problems import problems
from app.api.shapes import Body, Moment
from app.audit import Action
from app.documents.galleries import Gallery
from app.domain.callers import Role
from app.domain.policy import GalleryPolicy, thresholds_for
from app.domain.policy_changes import PendingField
from app.domain.text import Reason
from app.errors import Advice, Conflict, Forbidden, NotFound, Unauthenticated, Validation
from app.runtime import Runtime
from app.use_cases import galleries

router = APIRouter(
    route_class=StrictRoute,
    prefix="/v1/galleries",
    tags=["galleries"],
    responses=problems(Unauthenticated, Forbidden, Validation),
)

READERS = (Role.ADMIN, Role.OFFICER, Role.RELYING_APP, Role.ENROLLER)
Reading = Annotated[Action, Depends(acting("gallery.read", *READERS, is_read=True))]
GALLERY_NAME = r"^[a-z0-9][a-z0-9_-]{0,62}$"


class NewGallery(Body):
    """A gallery to be made; what its policy leaves out is the model's default."""

    name: Annotated[str, Field(pattern=GALLERY_NAME)]
    pack: str | None = None
    policy: dict[str, Any] | None = None


class GalleryPatch(Body):
    """RFC 7396: only a gallery's policy can change; null sets a field back to the model's default."""

    policy: dict[str, Any] = Field(default_factory=dict)


class ModelView(BaseModel):
    """The model that made the gallery's templates."""

    pack: str
    dimension: int
    contract: str
    licence: str


class ThresholdsView(BaseModel):
    """The thresholds in force, and where they come from."""

    verify: float
    identify: float
    dedup: float
    source: str


class Counts(BaseModel):
    """Everybody and everything that is not erased."""

    identities: int
    samples: int


class IndexView(BaseModel):
    """How the gallery is searched. tail: changes that the generation does not hold; recall: as measured at publication."""

    kind: str
    generation: int | None
    vectors: int
    tail: int
    recall: float | None


class PendingView(BaseModel):
    """A pending policy change. It needs an officer's agreement and takes effect at `from` or later.

    people: how many it will erase then. agreed_by: a user's id.
    """

    model_config = ConfigDict(populate_by_name=True)

    field: PendingField
    value: int | bool
    start: Annotated[Moment, Field(alias="from")]
    people: int
    agreed_by: str | None


class Agreement(Body):
    """What the officer agrees to. With `field` or `value`, only a pending change that has them is agreed to."""

    field: PendingField | None = None
    value: int | bool | None = None
    reason: Reason | None = None


class GalleryView(BaseModel):
    """A gallery as the contract gives it."""

    id: str
    name: str
    model: ModelView
    policy: GalleryPolicy
    pending: PendingView | None
    thresholds: ThresholdsView
    counts: Counts
    index: IndexView


async def _pending(gallery: Gallery) -> PendingView | None:
    pending = gallery.pending
    if pending is None:
        return None
    return PendingView(
        field=pending.field, value=pending.value, start=pending.effective_at,
        people=await galleries.people(gallery, pending), agreed_by=pending.agreed_by,
    )  # fmt: skip


async def view(runtime: Runtime, gallery: Gallery) -> GalleryView:
    """The gallery as the contract gives it."""
    card = runtime.engine.card
    limits = thresholds_for(gallery.policy, card, gallery.samples)
    return GalleryView(
        id=gallery.id,
        name=gallery.name,
        model=ModelView(
            pack=gallery.pack, dimension=gallery.dimension, contract=gallery.contract, licence=gallery.licence
        ),
        policy=gallery.policy,
        pending=await _pending(gallery),
        thresholds=ThresholdsView(
            verify=limits.verify, identify=limits.identify, dedup=limits.dedup, source=limits.source
        ),
        counts=Counts(identities=gallery.identities, samples=gallery.samples),
        index=IndexView(
            kind="exact" if gallery.published is None else gallery.published.kind,
            generation=None if gallery.published is None else gallery.published.number,
            vectors=gallery.samples,
            tail=gallery.seq - gallery.watermark,
            recall=1.0 if gallery.published is None else gallery.published.recall,
        ),
    )


def _merged(base: GalleryPolicy, defaults: GalleryPolicy, patch: dict[str, Any]) -> GalleryPolicy:
    known = base.model_dump() | {n: getattr(defaults, n, None) if v is None else v for n, v in patch.items()}
    try:
        return GalleryPolicy.model_validate(known)
    except ValidationError as error:
        advice = tuple(Advice.of_finding(".".join(["policy", *map(str, e["loc"])]), e) for e in error.errors())
        raise Validation("The policy does not fit.", errors=advice) from error


@router.get("")
async def list_galleries(
    runtime: CurrentRuntime, request: Request, action: Reading, page: Annotated[Page, Depends()]
) -> Paged[GalleryView]:
    """The galleries that the caller may see, newest first."""
    allowed = None if action.caller is None else action.caller.galleries
    filters = {} if allowed is None else {"_id": {"$in": list(allowed)}}
    items, cursor = await page_of(Gallery, filters, page, request, runtime.keys)
    return Paged(items=[await view(runtime, gallery) for gallery in items], next_cursor=cursor)


@router.post("", status_code=201, responses=problems(Conflict))
async def create_gallery(
    runtime: CurrentRuntime,
    request: Request,
    response: Response,
    body: NewGallery,
    action: Annotated[Action, Depends(acting("gallery.create", Role.ADMIN))],
    key: IdempotencyKey = None,
) -> GalleryView:
    """Make an empty gallery, bound to the model that is running. Only an admin who is not bound to galleries can."""
    if action.caller is not None and action.caller.galleries is not None:
        raise Forbidden("Only an admin who is not bound to galleries can make one.")
    first = await first_answer(runtime, request, action, key, body.model_dump())
    if first is not None:
        known = await Gallery.get(first[0].subject.id)
        if known is None:
            raise NotFound
        gallery = known
    else:
        policy = _merged(runtime.starting_policy(), runtime.starting_policy(), body.policy or {})
        gallery = await galleries.create(runtime, action, body.name, body.pack, policy)
    response.headers["Location"] = f"/v1/galleries/{gallery.name}"
    return await view(runtime, gallery)


@router.get("/{name}", responses=problems(NotFound))
async def get_gallery(runtime: CurrentRuntime, name: str, action: Reading) -> GalleryView:
    """One gallery."""
    return await view(runtime, await visible_gallery(runtime, action, name))


@router.patch("/{name}", responses=problems(NotFound, Conflict))
async def update_gallery(
    runtime: CurrentRuntime,
    request: Request,
    name: str,
    body: GalleryPatch,
    action: Annotated[Action, Depends(acting("gallery.update", Role.ADMIN))],
    key: IdempotencyKey = None,
) -> GalleryView:
    """Change the policy. Every process applies it from its next request on.

    A new or shorter `retention_days`, and the end of `second_review`, become `pending`.
    """
    gallery = await visible_gallery(runtime, action, name)
    if await first_answer(runtime, request, action, key, body.model_dump()) is None:
        policy = _merged(gallery.policy, runtime.starting_policy(), body.policy)
        gallery = await galleries.update(runtime, action, gallery, policy, set(body.policy))
    return await view(runtime, gallery)


@router.post("/{name}/pending/agree", responses=problems(NotFound, Conflict))
async def agree_to_change(
    runtime: CurrentRuntime,
    request: Request,
    name: str,
    action: Annotated[Action, Depends(acting("gallery.pending.agree", Role.OFFICER))],
    body: Agreement | None = None,
    key: IdempotencyKey = None,
) -> GalleryView:
    """Agree to the pending policy change, as another user than the one who asked for it.

    With a body, the pending change must be the one that the body names.
    """
    gallery = await visible_gallery(runtime, action, name)
    action.about("gallery", gallery.id)
    given = body or Agreement()
    if await first_answer(runtime, request, action, key, given.model_dump()) is None:
        seen = galleries.Seen(given.field, given.value)
        gallery = await galleries.agree(runtime, action, gallery, seen, given.reason)
    return await view(runtime, gallery)


@router.post("/{name}/pending/cancel", responses=problems(NotFound, Conflict))
async def cancel_change(
    runtime: CurrentRuntime,
    request: Request,
    name: str,
    action: Annotated[Action, Depends(acting("gallery.pending.cancel", Role.OFFICER, Role.ADMIN))],
    key: IdempotencyKey = None,
) -> GalleryView:
    """Cancel the pending policy change. The policy in force stays."""
    gallery = await visible_gallery(runtime, action, name)
    action.about("gallery", gallery.id)
    if await first_answer(runtime, request, action, key, None) is None:
        gallery = await galleries.cancel(runtime, action, gallery)
    return await view(runtime, gallery)


@router.delete("/{name}", status_code=204, responses=problems(NotFound, Conflict))
async def delete_gallery(
    runtime: CurrentRuntime,
    request: Request,
    name: str,
    action: Annotated[Action, Depends(acting("gallery.delete", Role.ADMIN))],
    key: IdempotencyKey = None,
) -> None:
    """Remove an empty gallery."""
    if await first_answer(runtime, request, action, key, None) is None:
        await galleries.delete(runtime, action, await visible_gallery(runtime, action, name))
