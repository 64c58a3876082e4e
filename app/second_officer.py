"""Where a gallery asks for two officers, an action on a person is proposed first and carried out when another officer agrees.

Each kind of action has a use case of its own. It asks here, in its own transaction, for the proposal and for the agreement.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, record
from app.documents.base import new_id, now
from app.documents.events import Detail
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.proposals import IdentityProposal, ProposalKind
from app.errors import Conflict, Forbidden, NotFound


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an officer asks for. sealed_patch: of a reference change; told: what the event tells besides."""

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
    """The open proposal of this action, with its event. It is the known one where the same was proposed already.

    is_same: whether a known proposal of this kind wants the same. Raises Conflict when it wants something else.
    """
    proposal = await IdentityProposal.standing(identity.id, wanted.kind, wanted.sample_id, session)
    if proposal is not None and proposal.identity_version != identity.version:
        await proposal.end(session, "stale", None)
        proposal = None
    if proposal is not None and not is_same(proposal):
        raise Conflict(f"Another change is proposed already ({proposal.id}): have it agreed to or withdrawn first.")
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
        "reason": wanted.reason,
    }
    await record(
        session, replace(action, name="proposal.create"), subject_kind="identity", subject_id=identity.id,
        gallery=gallery.name, status_code=202, detail=told | wanted.told,
    )  # fmt: skip
    return proposal


async def agree(session: AsyncClientSession, action: Action, proposal: IdentityProposal) -> Detail:
    """Close the proposal as agreed to by the actor; what the action's own event tells of it.

    Raises Forbidden for an application, Conflict for the officer who proposed it, for one that is closed, and when the identity
    was changed since, NotFound when it was erased.
    """
    if action.caller is None or action.caller.kind != "user":
        raise Forbidden("A person must agree, not an application.")
    if proposal.proposed_by == action.actor_id:
        raise Conflict("You proposed this; another officer must agree.")
    identity = await Identity.living(proposal.identity_id, session)
    if identity is None:
        raise NotFound
    if identity.version != proposal.identity_version:
        raise Conflict("The identity was changed since this was proposed: look at it, and propose it again.")
    if not await proposal.end(session, "agreed", action.actor_id):
        raise Conflict("The proposal is closed already.")
    return {"proposal_id": proposal.id, "proposed_by": proposal.proposed_by}
