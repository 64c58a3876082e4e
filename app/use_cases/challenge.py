"""Challenge: a nonce for one verification or identification, so that its answer belongs to this moment and this caller.

Nothing of it is in the pixels: that a selfie was taken since is the caller's word.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, record
from app.documents.challenges import Challenge
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.errors import NotFound
from app.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Nonce:
    """A single-use text, and until when it holds."""

    nonce: str
    expires_at: datetime


async def require_known(runtime: Runtime, action: Action, gallery: Gallery, identity_id: str) -> None:
    """Raises NotFound where the gallery does not know the identity, and counts it; RateLimited for everybody beyond the budget.

    A caller beyond its budget of unknown names still gets nonces that name nobody.
    """
    await runtime.probing.require_names_left(action)
    if await Identity.seen(identity_id, [gallery.id]) is None:
        await runtime.probing.count_unknown(action)
        raise NotFound


async def challenge(runtime: Runtime, action: Action, gallery: Gallery, identity_id: str | None) -> Nonce:
    """A nonce for the caller's next photo in the gallery; for a verification of this identity, where one is named."""
    keep = timedelta(seconds=runtime.settings.challenge_seconds)

    async def commit(session: AsyncClientSession) -> Nonce:
        nonce, made = await Challenge.issue(
            runtime.keys, action.actor_id, gallery.id, identity_id, keep, session
        )  # fmt: skip
        kind, subject_id = ("gallery", gallery.id) if identity_id is None else ("identity", identity_id)
        await record(
            session, action, subject_kind=kind, subject_id=subject_id, gallery=gallery.name, status_code=201
        )  # fmt: skip
        return Nonce(nonce, made.expires_at)

    return await runtime.transaction(commit)
