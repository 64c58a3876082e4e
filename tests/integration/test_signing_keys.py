"""The keys that sign tokens: one for all processes, and another one in mid-traffic without one valid token refused."""

import asyncio
import time
from datetime import timedelta

import jwt
import pytest

from app.access.callers import Access
from app.access.signing import PUBLISHED_FOR_SECONDS, SIGNING_LEAD_SECONDS, new_signing_key
from app.access.tokens import LONGEST_LIFE_SECONDS
from app.audit import by_system
from app.config import random_secret
from app.documents.accounts import SigningKey, User
from app.documents.base import now
from app.errors import Conflict, Unauthenticated
from app.keys import KeyRing, SealBroken
from app.use_cases.rotate_signing_key import rotate_signing_key
from tests.support.accounts import ADMIN, AccountService, Tokens, bearer

ROTATION = by_system("key.rotate")


def signer(text: str) -> str:
    """The `kid` of a token."""
    return str(jwt.get_unverified_header(text)["kid"])


async def another_access(service: AccountService) -> Access:
    """Access as another process has it."""
    access = Access(service.runtime.settings, service.runtime.keys)
    await access.load_keys()
    return access


async def published(service: AccountService) -> list[str]:
    """The `kid`s that verifiers find."""
    return [key["kid"] for key in (await service.http.get("/.well-known/jwks.json")).json()["keys"]]


async def the_admin() -> User:
    """The one user."""
    admin = await User.find_one({})
    assert admin is not None
    return admin


async def test_processes_that_start_at_once_agree_on_one_signing_key(service: AccountService) -> None:
    await SigningKey.delete_all()
    processes = [Access(service.runtime.settings, service.runtime.keys) for _ in range(6)]
    await asyncio.gather(*(access.load_keys() for access in processes))
    assert await SigningKey.count() == 1
    assert len({await access.public_keys() for access in processes}) == 1
    assert len({access.sign_assertion({"sub": "x"}) for access in processes}) == 1


async def test_a_private_signing_key_opens_with_the_operators_key_only(service: AccountService) -> None:
    with pytest.raises(SealBroken):
        await Access(service.runtime.settings, KeyRing(random_secret())).load_keys()


async def test_nothing_is_signed_before_the_keys_are_loaded(service: AccountService) -> None:
    with pytest.raises(RuntimeError, match="not loaded"):
        Access(service.runtime.settings, service.runtime.keys).sign_assertion({"sub": "x"})


async def test_h51_an_assertion_is_the_same_for_the_same_claims_and_no_access_token(service: AccountService) -> None:
    access, tokens = service.runtime.access, await service.log_in()
    claims = jwt.decode(tokens.access, options={"verify_signature": False})
    assertion, receipt = access.sign_assertion(claims), access.sign_receipt(claims)
    assert assertion == access.sign_assertion(dict(reversed(claims.items())))
    assert jwt.get_unverified_header(assertion)["typ"] == "idem-assertion+jwt"
    assert jwt.get_unverified_header(receipt)["typ"] == "idem-receipt+jwt"
    assert not await service.holds(assertion)
    assert not await service.holds(receipt)


async def test_h59_a_new_key_is_published_before_it_signs_and_the_old_one_verifies_as_long_as_its_tokens_live(
    service: AccountService,
) -> None:
    tokens = await service.log_in()
    began = now()
    fresh = await rotate_signing_key(service.runtime, ROTATION)
    assert await published(service) == [signer(tokens.access), fresh.id]
    assert fresh.signs_from - began >= timedelta(seconds=PUBLISHED_FOR_SECONDS)
    old = await SigningKey.get(signer(tokens.access))
    assert old is not None
    assert old.verifies_until is not None
    assert old.verifies_until - fresh.signs_from >= timedelta(seconds=LONGEST_LIFE_SECONDS)
    assert fresh.verifies_until is None
    # Until then the old one goes on.
    assert signer((await service.log_in()).access) == old.id
    with pytest.raises(Conflict, match="signs from"):
        await rotate_signing_key(service.runtime, ROTATION)
    assert [event.subject.id for event in await service.events("key.rotate")] == [fresh.id]


async def test_h59_the_same_claims_give_the_same_assertion_before_and_after_a_rotation(service: AccountService) -> None:
    access = service.runtime.access
    claims = {"sub": "x", "iat": int(time.time())}
    before = access.sign_assertion(claims)
    await asyncio.sleep(1)
    fresh = await rotate_signing_key(service.runtime, ROTATION, lead_seconds=0)
    await access.public_keys()
    assert access.sign_assertion(claims) == before
    assert signer(access.sign_assertion({"sub": "x"})) == fresh.id


async def test_h59_no_valid_token_is_refused_while_keys_change_in_mid_traffic(service: AccountService) -> None:
    processes = [service.runtime.access, await another_access(service)]
    admin, login = await the_admin(), await service.log_in()
    session_id = (await processes[0].authenticate(login.access)).session_id
    ends = time.monotonic() + 5
    given: set[str] = set()
    refused = checked = 0

    async def call(number: int) -> None:
        nonlocal refused, checked
        issuer, verifier = processes[number % 2], processes[(number + 1) % 2]
        while time.monotonic() < ends:
            token = (await issuer.issue(admin, session_id)).text
            given.add(signer(token))
            for text in (token, login.access):
                try:
                    await verifier.authenticate(text)
                except Unauthenticated:
                    refused += 1
                checked += 1
            await asyncio.sleep(0.02)

    async def rotate() -> None:
        for _ in range(2):
            await asyncio.sleep(0.5)
            await rotate_signing_key(service.runtime, ROTATION, lead_seconds=1.2)
            await asyncio.sleep(1.2)

    await asyncio.gather(rotate(), *(call(number) for number in range(4)))
    assert refused == 0
    assert checked > 40
    assert len(given) == 3


async def test_h59_a_key_made_a_moment_ago_is_waited_for_and_an_unknown_one_refused(service: AccountService) -> None:
    elsewhere = await another_access(service)
    tokens = await service.log_in()
    assert (await elsewhere.authenticate(tokens.access)).name == ADMIN
    # The other process has just loaded the keys, and may not load them again within this second.
    await rotate_signing_key(service.runtime, ROTATION, is_compromised=True)
    session_id = (await service.log_in()).access
    assert (await elsewhere.authenticate(session_id)).name == ADMIN

    stranger = new_signing_key(service.runtime.keys, generation=9, signs_from=now())
    header, _, rest = session_id.partition(".")
    forged = jwt.encode({"sub": "x"}, "k" * 32, headers={"typ": "at+jwt", "kid": stranger.id}).partition(".")[0]
    assert header != forged
    began = time.monotonic()
    results = await asyncio.gather(
        *(elsewhere.authenticate(f"{forged}.{rest}") for _ in range(50)), return_exceptions=True
    )
    assert {type(result) for result in results} == {Unauthenticated}
    assert time.monotonic() - began < 2


async def test_h48_a_key_id_that_is_no_thumbprint_is_not_even_looked_for(service: AccountService) -> None:
    token = (await service.log_in()).access
    rest = token.partition(".")[2]
    keys = service.runtime.access._signing
    loaded_at = keys._loaded_at
    for kid in ("../../dev/null", "' OR 1=1", "", "k1"):
        header = jwt.encode({}, "k" * 32, headers={"typ": "at+jwt", "kid": kid}).partition(".")[0]
        assert not await service.holds(f"{header}.{rest}")
    assert keys._loaded_at == loaded_at


async def test_a_compromised_key_ends_every_token_on_every_process_within_a_second(service: AccountService) -> None:
    elsewhere, tokens = await another_access(service), await service.log_in()
    await elsewhere.authenticate(tokens.access)
    fresh = await rotate_signing_key(service.runtime, ROTATION, is_compromised=True)
    done = asked = good_at = time.monotonic()
    with pytest.raises(Unauthenticated):
        while True:
            await elsewhere.authenticate(tokens.access)
            good_at = asked
            await asyncio.sleep(0.02)
            asked = time.monotonic()
    # By when it was last asked with success: how long a busy machine takes to answer is not what counts.
    assert good_at - done < 1
    assert not await service.holds(tokens.access)
    assert await published(service) == [fresh.id]
    # People do not have to log in again: their refresh tokens were signed by nobody.
    assert (await service.refresh(tokens.refresh)).status_code == 200
    again: Tokens = await service.log_in()
    assert signer(again.access) == fresh.id


async def test_a_key_past_its_time_verifies_no_more_and_is_not_published(service: AccountService) -> None:
    tokens = await service.log_in()
    fresh = await rotate_signing_key(service.runtime, ROTATION, lead_seconds=0)
    past = {"$set": {"verifies_until": now() - timedelta(seconds=1)}}
    await SigningKey.get_pymongo_collection().update_one({"_id": signer(tokens.access)}, past)
    service.runtime.access.forget_keys()
    assert not await service.holds(tokens.access)
    assert await published(service) == [fresh.id]
    assert (await service.http.get("/v1/auth/me", headers=bearer((await service.log_in()).access))).status_code == 200


async def test_two_rotations_at_once_make_one_key(service: AccountService) -> None:
    results = await asyncio.gather(
        *(rotate_signing_key(service.runtime, ROTATION) for _ in range(3)), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in results) == ["Conflict", "Conflict", "SigningKey"]
    assert await SigningKey.count() == 2


def test_a_new_key_is_published_longer_than_verifiers_keep_the_old_ones() -> None:
    assert SIGNING_LEAD_SECONDS > PUBLISHED_FOR_SECONDS
