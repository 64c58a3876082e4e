"""Standing: take an identity out of service and back, and let it be tried again."""

from collections.abc import Awaitable, Callable

from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, Typed, record
from app.documents.cases import Case, look_alikes
from app.documents.galleries import Gallery
from app.documents.identities import Attempts, Identity
from app.domain.policy import LookAlike, margin_of, may_activate
from app.errors import Conflict, NotFound, NotReady, UndecidedCandidates
from app.runtime import Runtime


async def revoke(runtime: Runtime, action: Action, gallery: Gallery, identity_id: str, reason: str) -> Identity:
    """Active to revoked: it matches no more. Raises Conflict from any other status."""

    async def change(identity: Identity, session: AsyncClientSession) -> dict[str, object]:
        del session
        if identity.status != "active":
            raise Conflict(f"Only an active identity can be revoked; this one is {identity.status}.")
        return {"status": "revoked"}

    return await _change(runtime, action, gallery, identity_id, change, reason)


async def reinstate(runtime: Runtime, action: Action, gallery: Gallery, identity_id: str, reason: str) -> Identity:
    """Revoked to active. Raises Conflict from any other status, UndecidedCandidates while an active look-alike is undecided."""

    async def change(identity: Identity, session: AsyncClientSession) -> dict[str, object]:
        if identity.status != "revoked":
            raise Conflict(f"Only a revoked identity can be reinstated; this one is {identity.status}.")
        own = [
            c
            for case in await Case.open_about(identity.id, session)
            if case.newcomer_id == identity.id
            for c in case.candidates
        ]
        statuses = await Identity.statuses([c.identity_id for c in own], session)
        candidates = [LookAlike(c.identity_id, statuses.get(c.identity_id, "erased"), c.decision) for c in own]
        if not may_activate(candidates, await look_alikes(identity.id, margin_of(runtime.engine.card), session)):
            raise UndecidedCandidates("A look-alike is active or undecided, and nobody has called the two distinct.")
        return {"status": "active"}

    return await _change(runtime, action, gallery, identity_id, change, reason)


async def reset_attempts(runtime: Runtime, action: Action, gallery: Gallery, identity_id: str) -> Identity:
    """Forget the consecutive non-matches, so that the person can be verified again."""

    async def change(identity: Identity, session: AsyncClientSession) -> dict[str, object]:
        del identity, session
        return {"attempts": Attempts()}

    return await _change(runtime, action, gallery, identity_id, change, None)


async def _change(
    runtime: Runtime,
    action: Action,
    gallery: Gallery,
    identity_id: str,
    change: Callable[[Identity, AsyncClientSession], Awaitable[dict[str, object]]],
    reason: str | None,
) -> Identity:
    async def commit(session: AsyncClientSession) -> None:
        identity = await Identity.living(identity_id, session)
        if identity is None:
            raise NotFound
        if not await identity.change(session, await change(identity, session)):
            raise NotReady("The identity was changed at the same moment.")
        detail = {} if reason is None else {"reason": Typed(reason)}
        await record(
            session, action, subject_kind="identity", subject_id=identity_id, gallery=gallery.name, detail={**detail}
        )

    await runtime.transaction(commit)
    identity = await Identity.living(identity_id)
    if identity is None:
        raise NotFound
    return identity
