"""Challenge: a nonce for one verification, so that its answer belongs to this moment and this caller.

Nothing of it is in the pixels: that a selfie was taken since is the caller's word.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, record
from app.documents.challenges import Challenge
from app.documents.galleries import Gallery
from app.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Nonce:
    """A single-use text, and until when it holds."""

    nonce: str
    expires_at: datetime


async def challenge(runtime: Runtime, action: Action, gallery: Gallery, identity_id: str | None) -> Nonce:
    """A nonce for the caller's next verification in the gallery; of this identity, where one is named."""
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
