"""Proposals: actions on people that wait for a second officer."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from app.api.bodies import StrictRoute
from app.api.dependencies import CurrentRuntime, IdempotencyKey, acting, first_answer, gallery_of, grant_of
from app.api.identities import ReceiptView, asked, receipt_view, visible_galleries
from app.api.paging import Page, Paged, page_of
from app.api.problems import problems
from app.api.shapes import Moment
from app.audit import Action
from app.documents.deletions import Deletion
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.proposals import IdentityProposal, ProposalKind, ProposalState
from app.domain.attributes import Json
from app.domain.callers import Role
from app.errors import Conflict, ExternalRefTaken, Forbidden, NotFound, Unauthenticated, Validation
from app.readings import note_reading
from app.runtime import Runtime
from app.use_cases import erase, proposals, update

router = APIRouter(
    route_class=StrictRoute,
    prefix="/v1/proposals",
    tags=["proposals"],
    responses=problems(Unauthenticated, Forbidden, Validation),
)

Reading = Annotated[Action, Depends(acting("proposal.read", Role.OFFICER, is_read=True))]
Listing = Annotated[Action, Depends(acting("proposal.list", Role.OFFICER, is_read=True))]


class ChangeView(BaseModel):
    """One attribute, as it is and as it would be."""

    old: Json
    new: Json


class ProposalView(BaseModel):
    """What one officer proposed about a person; another officer's agreement carries it out.

    is_current: whether the identity still is as it was; else nobody can agree. changes: of a reference change that is open; null
    where today's rules refuse it, so that it can only be withdrawn. samples: how many samples and photos would go. receipt: of
    an erasure that was carried out.
    """

    id: str
    gallery: str
    kind: ProposalKind
    state: ProposalState
    identity_id: str
    sample_id: str | None
    changes: dict[str, ChangeView] | None
    samples: int
    reason: str | None
    is_current: bool
    proposed_by: str
    created_at: Moment
    decided_by: str | None
    decided_at: Moment | None
    receipt: ReceiptView | None


def _changes(
    runtime: Runtime, gallery: Gallery, identity: Identity, proposal: IdentityProposal
) -> dict[str, ChangeView] | None:
    if proposal.kind != "reference_change":
        return None
    change = update.shown_change(runtime, gallery, identity, proposal)
    if change is None:
        return None
    before, after = (one.model_dump(mode="json") for one in (change.before, change.after))
    return {name: ChangeView(old=before[name], new=after[name]) for name in before if before[name] != after[name]}


def _samples(identity: Identity, proposal: IdentityProposal) -> int:
    return {"erasure": len(identity.samples), "sample_removal": 1, "reference_change": 0}[proposal.kind]


def _view(runtime: Runtime, gallery: Gallery, proposal: IdentityProposal, identity: Identity | None) -> ProposalView:
    is_current = (
        proposal.state == "open" and identity is not None and identity.version == proposal.identity_version
    )  # fmt: skip
    shown = identity if is_current else None
    return ProposalView(
        id=proposal.id,
        gallery=gallery.name,
        kind=proposal.kind,
        state=proposal.state,
        identity_id=proposal.identity_id,
        sample_id=proposal.sample_id,
        changes=None if shown is None else _changes(runtime, gallery, shown, proposal),
        samples=0 if shown is None else _samples(shown, proposal),
        reason=proposal.reason,
        is_current=is_current,
        proposed_by=proposal.proposed_by,
        created_at=proposal.created_at,
        decided_by=proposal.decided_by,
        decided_at=proposal.decided_at,
        receipt=None,
    )


async def _whole(runtime: Runtime, gallery: Gallery, proposal: IdentityProposal) -> ProposalView:
    """The one proposal, with the receipt of the erasure that it led to."""
    view = _view(runtime, gallery, proposal, await Identity.living(proposal.identity_id))
    is_erased = proposal.kind == "erasure" and proposal.state == "agreed"
    deletion = await Deletion.get(proposal.identity_id) if is_erased else None
    if deletion is None:
        return view
    return view.model_copy(update={"receipt": receipt_view(erase.receipt_of(deletion))})


async def _found(action: Action, proposal_id: str) -> tuple[Gallery, IdentityProposal]:
    action.about("proposal", proposal_id)
    proposal = await IdentityProposal.seen(proposal_id, grant_of(action))
    if proposal is None:
        raise NotFound
    return await gallery_of(action, proposal.gallery_id), proposal


@router.get("", responses=problems(NotFound))
async def list_proposals(
    runtime: CurrentRuntime,
    request: Request,
    action: Listing,
    page: Annotated[Page, Depends()],
    state: ProposalState | None = None,
    gallery: str | None = None,
) -> Paged[ProposalView]:
    """Proposals in the galleries that the caller may see, newest first."""
    galleries = await visible_galleries(runtime, action, gallery)
    filters: dict[str, Any] = {"gallery_id": {"$in": list(galleries)}}
    if state is not None:
        filters["state"] = state
    items, cursor = await page_of(IdentityProposal, filters, page, request, runtime.keys)
    people = await Identity.living_among([item.identity_id for item in items])
    views = [_view(runtime, galleries[item.gallery_id], item, people.get(item.identity_id)) for item in items]
    if shown := {one.identity_id: one.gallery for one in views if one.identity_id in people}:
        await note_reading(runtime, action, shown, asked(request, {"state": "state"}))
    return Paged(items=views, next_cursor=cursor)


@router.get("/{proposal_id}", responses=problems(NotFound))
async def get_proposal(runtime: CurrentRuntime, proposal_id: str, action: Reading) -> ProposalView:
    """One proposal, with what it would do."""
    gallery, proposal = await _found(action, proposal_id)
    found = await _whole(runtime, gallery, proposal)
    if found.changes is not None or found.reason is not None:
        await note_reading(runtime, action, {found.identity_id: found.gallery})
    return found


@router.post("/{proposal_id}/agree", responses=problems(NotFound, Conflict, ExternalRefTaken))
async def agree_to_proposal(
    runtime: CurrentRuntime,
    request: Request,
    proposal_id: str,
    action: Annotated[Action, Depends(acting("proposal.agree", Role.OFFICER))],
    key: IdempotencyKey = None,
) -> ProposalView:
    """Carry out what another officer proposed; 409 when the identity was changed since."""
    gallery, proposal = await _found(action, proposal_id)
    if await first_answer(runtime, request, action, key, None) is None:
        proposal = await proposals.agree(runtime, action, gallery, proposal)
    return await _whole(runtime, gallery, proposal)


@router.post("/{proposal_id}/withdraw", responses=problems(NotFound, Conflict))
async def withdraw_proposal(
    runtime: CurrentRuntime,
    request: Request,
    proposal_id: str,
    action: Annotated[Action, Depends(acting("proposal.withdraw", Role.OFFICER))],
    key: IdempotencyKey = None,
) -> ProposalView:
    """Take one's own proposal back."""
    gallery, proposal = await _found(action, proposal_id)
    if await first_answer(runtime, request, action, key, None) is None:
        proposal = await proposals.withdraw(runtime, action, gallery, proposal)
    return await _whole(runtime, gallery, proposal)
