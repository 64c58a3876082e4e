"""In a gallery that asks for two officers, one officer proposes an action on a person and another officer agrees to it.

The action is carried out when the other officer agrees. Each kind of action has its own use case. The use case calls `propose`
and `agree` in its own transaction.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, Typed, record
from app.documents.base import new_id, now
from app.documents.events import Detail
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.proposals import IdentityProposal, ProposalKind
from app.errors import Conflict, Forbidden, NotFound


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an officer asks for. sealed_patch: the patch of a reference change. told: further details for the event."""

    kind: ProposalKind
    reason: str | None = None
    sample_id: str | None = None
    sealed_patch: bytes | None = None
    told: Detail = field(default_factory=dict)


async def propose(
    session: AsyncClientSession,
    action: Action,
    gallery: Gallery,
    identity: Identity,
    wanted: Wanted,
    *,
    is_same: Callable[[IdentityProposal], bool] = lambda _: True,
) -> IdentityProposal:
    """Record a proposal of this action, with its event. Returns the open proposal if the same was proposed already.

    is_same: whether an open proposal of this kind asks for the same. Raises Conflict when it asks for something else.
    """
    proposal = await IdentityProposal.standing(identity.id, wanted.kind, wanted.sample_id, session)
    if proposal is not None and proposal.identity_version != identity.version:
        await proposal.end(session, "stale", None)
        proposal = None
    if proposal is not None and not is_same(proposal):
        raise Conflict(f"Another change is proposed already ({proposal.id}). First agree to it or withdraw it.")
    if proposal is None:
        proposal = IdentityProposal(
            id=new_id(), gallery_id=gallery.id, identity_id=identity.id, identity_version=identity.version,
            kind=wanted.kind, sample_id=wanted.sample_id, sealed_patch=wanted.sealed_patch, reason=wanted.reason,
            proposed_by=action.actor_id, created_at=now(),
        )  # fmt: skip
        await proposal.insert(session=session)
    told: Detail = {
        "proposal_id": proposal.id,
        "kind": wanted.kind,
        "version": identity.version,
        "reason": Typed.of(wanted.reason),
    }
    await record(
        session, replace(action, name="proposal.create"), subject_kind="identity", subject_id=identity.id,
        gallery=gallery.name, status_code=202, detail=told | wanted.told,
    )  # fmt: skip
    return proposal


async def agree(session: AsyncClientSession, action: Action, proposal: IdentityProposal) -> Detail:
    """Close the proposal as agreed to by the actor. Returns details for the event of the action.

    Raises Forbidden for an application, and NotFound when the person was erased. Raises Conflict for the officer who proposed
    it, for a closed proposal, and when the identity has changed since the proposal.
    """
    if action.caller is None or action.caller.kind != "user":
        raise Forbidden("A person must agree, not an application.")
    if proposal.proposed_by == action.actor_id:
        raise Conflict("You proposed this; another officer must agree.")
    identity = await Identity.living(proposal.identity_id, session)
    if identity is None:
        raise NotFound
    if identity.version != proposal.identity_version:
        raise Conflict(
            "The identity has changed since the proposal. Look at the identity, and propose the action again."
        )
    if not await proposal.end(session, "agreed", action.actor_id):
        raise Conflict("The proposal is closed already.")
    return {"proposal_id": proposal.id, "proposed_by": proposal.proposed_by}
