"""Nonces: each serves one selfie, for whom it was given, while it is fresh."""

import asyncio

import pytest

from app.documents.base import now
from app.documents.challenges import Challenge
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.errors import LowQuality, NonceInvalid, ReplayedPhoto
from app.runtime import Runtime
from app.use_cases import verify
from app.use_cases.challenge import challenge
from app.use_cases.verify import Claim, Verification
from tests.builders import (
    active,
    another_process,
    by_app,
    by_officer,
    default_gallery,
    known,
    portrait,
    revoked,
)


async def _require_nonces() -> None:
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"policy.require_nonce": True}})


async def _nonce(runtime: Runtime, identity: Identity | None = None) -> str:
    given = by_app("face.challenge")
    return (await challenge(runtime, given, await default_gallery(), identity.id if identity else None)).nonce


async def _verified(runtime: Runtime, identity: Identity, nonce: str | None, capture: int = 9) -> Verification:
    """Whether a fresh photo of ann, sent with the nonce, shows the identity."""
    claim = Claim(await known(identity), audience=None, nonce=nonce)
    gallery = await Gallery.get(identity.gallery_id)
    assert gallery is not None
    return await verify.verify(runtime, by_app("face.verify"), gallery, claim, portrait("ann", capture=capture))


async def _attempts(identity: Identity) -> int:
    return (await known(identity)).attempts.consecutive


async def test_h64_a_nonce_serves_one_selfie(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await _require_nonces()
    nonce = await _nonce(runtime)
    assert (await _verified(runtime, ann, nonce)).match
    with pytest.raises(NonceInvalid):
        await _verified(runtime, ann, nonce, capture=10)
    assert (await _verified(runtime, ann, await _nonce(runtime), capture=10)).match


async def test_h64_a_gallery_that_requires_a_nonce_refuses_a_selfie_without_one(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await _require_nonces()
    for nothing in (None, "", "4711", "idem-nonce-made-up"):
        with pytest.raises(NonceInvalid):
            await _verified(runtime, ann, nothing)
    assert await _attempts(ann) == 0
    assert await AuditEvent.find({"action": "face.verify"}).count() == 0


async def test_h64_an_old_nonce_is_refused_before_the_store_has_dropped_it(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    nonce = await _nonce(runtime)
    (given,) = await Challenge.find_all().to_list()
    assert 118 < (given.expires_at - now()).total_seconds() <= 120
    await Challenge.get_pymongo_collection().update_many({}, {"$set": {"expires_at": now()}})
    with pytest.raises(NonceInvalid):
        await _verified(runtime, ann, nonce)


async def test_h64_a_nonce_of_another_client_identity_or_gallery_is_refused(runtime: Runtime) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    other = await runtime.create_gallery("other", runtime.starting_policy())
    gallery = await default_gallery()
    officers = (await challenge(runtime, by_officer("face.challenge"), gallery, None)).nonce
    elsewhere = (await challenge(runtime, by_app("face.challenge"), other, None)).nonce
    for nonce in (officers, elsewhere, await _nonce(runtime, bob)):
        with pytest.raises(NonceInvalid):
            await _verified(runtime, ann, nonce)
    assert (await _verified(runtime, ann, await _nonce(runtime, ann))).match
    assert await Challenge.find_all().count() == 3, "what was refused is not used up"


async def test_h64_of_one_nonce_sent_with_ten_selfies_at_once_one_is_answered(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    nonce = await _nonce(runtime)
    async with another_process(runtime) as other:
        tries = [_verified([runtime, other][i % 2], ann, nonce, capture=20 + i) for i in range(10)]
        ended = await asyncio.gather(*tries, return_exceptions=True)
    assert sorted(type(e).__name__ for e in ended) == ["NonceInvalid"] * 9 + ["Verification"]


async def test_h64_a_refused_selfie_leaves_its_nonce_for_the_next_one(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await _verified(runtime, ann, None, capture=9)
    nonce = await _nonce(runtime)
    with pytest.raises(ReplayedPhoto):
        await _verified(runtime, ann, nonce, capture=9)
    gallery = await default_gallery()
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"policy.quality": "standard"}})
    with pytest.raises(LowQuality):
        await _verified(runtime, ann, nonce, capture=11)
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"policy.quality": gallery.policy.quality}})
    assert (await _verified(runtime, ann, nonce, capture=12)).match


async def test_h64_a_claim_on_somebody_who_is_not_active_uses_the_nonce_up(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await revoked(runtime, ann)
    nonce = await _nonce(runtime)
    assert not (await _verified(runtime, ann, nonce)).match
    with pytest.raises(NonceInvalid):
        await _verified(runtime, ann, nonce, capture=10)


async def test_a_nonce_stands_nowhere_in_the_store_until_it_is_used(runtime: Runtime) -> None:
    nonce = await _nonce(runtime, await active(runtime, "ann"))
    database = runtime.mongo[runtime.settings.mongodb_database]
    for name in await database.list_collection_names():
        assert nonce not in str(await database[name].find().to_list()), name
    (event,) = await AuditEvent.find({"action": "face.challenge"}).to_list()
    assert event.subject.kind == "identity"


async def test_where_no_challenge_is_required_a_nonce_of_the_caller_s_own_is_passed_on(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    answer = await _verified(runtime, ann, "4711")
    assert answer.match
    event = await AuditEvent.get(answer.decision_id)
    assert event is not None
    assert (event.told["nonce"], event.detail["challenged"]) == ("4711", False)
