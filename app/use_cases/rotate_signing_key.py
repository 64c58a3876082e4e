"""Another key begins to sign tokens and assertions, while the service runs and without one valid token refused."""

from datetime import timedelta

from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from app import audit
from app.access.signing import SIGNING_LEAD_SECONDS, VERIFIES_ON, new_signing_key
from app.audit import Action
from app.documents.accounts import SigningKey
from app.documents.base import now
from app.errors import Conflict
from app.runtime import Runtime


async def rotate_signing_key(
    runtime: Runtime, action: Action, *, is_compromised: bool = False, lead_seconds: float = SIGNING_LEAD_SECONDS
) -> SigningKey:
    """Make the next key; its `signs_from` tells when it takes over.

    It is published at once, and signs after `lead_seconds`, when every verifier has it. The keys before it verify for as long
    as a token of theirs may live, then they go. is_compromised: it signs at once and they go at once, and with them every access
    token and assertion; refresh tokens, which no key signs, bring new ones. Raises Conflict when a key that does not sign yet
    is there.
    """

    async def body(session: AsyncClientSession) -> SigningKey:
        moment = now()
        newest = await SigningKey.find_all(session=session).sort("-generation").first_or_none()
        if newest is not None and newest.signs_from > moment and not is_compromised:
            message = f"A new key is there already; it signs from {newest.signs_from:%H:%M:%S} UTC."
            raise Conflict(message)
        signs_from = moment if is_compromised else moment + timedelta(seconds=lead_seconds)
        generation = 1 if newest is None else newest.generation + 1
        fresh = new_signing_key(runtime.keys, generation=generation, signs_from=signs_from)
        stored = SigningKey.get_pymongo_collection()
        if is_compromised:
            await stored.delete_many({}, session=session)
        else:
            until = {"$set": {"verifies_until": signs_from + VERIFIES_ON}}
            await stored.update_many({"verifies_until": None}, until, session=session)
        await fresh.insert(session=session)
        await audit.record(
            session, action, subject_kind="signing_key", subject_id=fresh.id, detail={"compromised": is_compromised}
        )
        return fresh

    try:
        fresh = await runtime.transaction(body)
    except DuplicateKeyError as error:
        message = "Another rotation has just made a new key."
        raise Conflict(message) from error
    runtime.access.forget_keys()
    return fresh
