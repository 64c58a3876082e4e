"""Proposals about people: agree to one, or withdraw one."""

from dataclasses import replace

from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, record
from app.documents.galleries import Gallery
from app.documents.proposals import IdentityProposal
from app.errors import Conflict, Forbidden, NotFound
from app.runtime import Runtime
from app.use_cases import erase, remove_sample, update


async def agree(runtime: Runtime, action: Action, gallery: Gallery, proposal: IdentityProposal) -> IdentityProposal:
    """Carry out what another officer proposed. The event is that of the action, and names both officers.

    Raises Forbidden for an application, Conflict for the officer who proposed it, for a closed proposal and for an identity that
    has changed since.
    """
    if proposal.kind == "erasure":
        by_both = replace(action, name="identity.erase")
        await erase.erase(runtime, by_both, gallery, proposal.identity_id, proposal.reason, proposal=proposal)
    elif proposal.kind == "reference_change":
        await update.carry_out(runtime, replace(action, name="identity.update"), gallery, proposal)
    elif proposal.sample_id is not None:
        by_both = replace(action, name="sample.remove")
        await remove_sample.remove_sample(
            runtime, by_both, gallery, proposal.identity_id, proposal.sample_id, proposal.reason, proposal=proposal
        )
    return await _known(proposal.id)


async def withdraw(runtime: Runtime, action: Action, gallery: Gallery, proposal: IdentityProposal) -> IdentityProposal:
    """Withdraw a proposal of the actor. Raises Forbidden for one of another officer, Conflict for a closed one."""
    if proposal.proposed_by != action.actor_id:
        raise Forbidden("Only the officer who proposed it can withdraw it.")

    async def commit(session: AsyncClientSession) -> None:
        if not await proposal.end(session, "withdrawn", action.actor_id):
            raise Conflict("The proposal is closed already.")
        await record(
            session, action, subject_kind="identity", subject_id=proposal.identity_id, gallery=gallery.name,
            detail={"proposal_id": proposal.id, "kind": proposal.kind},
        )  # fmt: skip

    await runtime.transaction(commit)
    return await _known(proposal.id)


async def _known(proposal_id: str) -> IdentityProposal:
    proposal = await IdentityProposal.get(proposal_id)
    if proposal is None:
        raise NotFound
    return proposal
