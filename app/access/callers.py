"""Who stands behind a token at this moment, and new tokens for who logs in.

What a token proves is who logged in; roles and galleries are read from the database at each request, through a memory
of half a second, so that a change or a revocation holds within a second on every process. All MongoDB reads here run
under the time limit that the caller has opened (`pymongo.timeout`).
"""

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from typing import Final

from app.access.signing import Claims, ClaimValue, PublicKey, SigningKeys
from app.access.tokens import (
    ACCESS_AUDIENCE,
    ACCESS_TOKEN_TYPE,
    ASSERTION_TYPE,
    RECEIPT_TYPE,
    TokenClaims,
    claims_of,
    key_id_of,
    refusal,
)
from app.config import Settings
from app.documents.accounts import Client, Login, RevokedToken, User
from app.documents.audiences import AudienceClaim
from app.documents.base import now
from app.domain.callers import CLIENT_ROLES, USER_ROLES, Caller
from app.keys import KeyRing

#: How old a caller's standing may be: "within a second on every process" with time to spare.
STANDING_SECONDS: Final = 0.5
STANDINGS_KEPT: Final = 8192


@dataclass(frozen=True, slots=True)
class AccessToken:
    """A fresh access token, its id, and for how many seconds it holds."""

    text: str
    token_id: str
    expires_in_seconds: int


@dataclass(frozen=True, slots=True)
class _Standing:
    """Who stood behind a token at `as_of` (monotonic seconds); None: nobody any more."""

    caller: Caller | None
    as_of: float


class Access:
    """Issues and checks tokens; one per process, made by `open_access`."""

    def __init__(self, settings: Settings, keys: KeyRing) -> None:
        """Await `load_keys` before the first token."""
        #: `iss` of everything signed here; other processes of the same settings agree on it.
        self.issuer = settings.public_url.rstrip("/") or f"http://{settings.api_host}:{settings.api_port}"
        self._life_seconds = settings.access_token_expire_minutes * 60
        self._keys = keys
        self._signing = SigningKeys(keys, settings.mongodb_timeout_seconds)
        self._standings: dict[str, _Standing] = {}
        self._changes = 0

    async def authenticate(self, bearer: str) -> Caller:
        """Who sends this token, with the roles and galleries of now.

        Raises Unauthenticated when it is not genuine, expired, revoked, or its owner is gone, disabled, has another role or
        another password since.
        """
        claims = await self.read(bearer)
        known = self._standings.get(claims.token_id)
        if known is None or time.monotonic() - known.as_of >= STANDING_SECONDS:
            known = await self._look_up(claims)
        if known.caller is None:
            raise refusal()
        return known.caller

    async def read(self, token: str) -> TokenClaims:
        """The claims of a genuine access token of ours that has not expired, revoked or not. Raises Unauthenticated."""
        key_id = key_id_of(token)
        public = await self._signing.public(key_id)
        if public is None:
            raise refusal()
        return claims_of(token, public, self.issuer, now().timestamp())

    async def issue(self, principal: User | Client, session_id: str | None = None) -> AccessToken:
        """A fresh access token for a user in one of their logins (its id), or for a client."""
        await self._signing.keep_fresh()
        issued_at, token_id = int(now().timestamp()), secrets.token_urlsafe(16)
        claims: dict[str, ClaimValue] = {
            "iss": self.issuer,
            "aud": ACCESS_AUDIENCE,
            "sub": principal.id,
            "kind": "user" if isinstance(principal, User) else "client",
            "iat": issued_at,
            "exp": issued_at + self._life_seconds,
            "jti": token_id,
            "ver": principal.access_version,
        }
        if session_id is not None:
            claims["sid"] = session_id
        return AccessToken(self._signing.sign(claims, ACCESS_TOKEN_TYPE), token_id, self._life_seconds)

    def sign_assertion(self, claims: Claims) -> str:
        """A verification's result as a JWT that relying parties check with the published keys; `iss` is added.

        The same claims (with their `iat`) give the same text, so that a repeated request can answer what the first one
        answered.
        """
        return self._signing.sign({**claims, "iss": self.issuer}, ASSERTION_TYPE)

    def sign_receipt(self, claims: Claims) -> str:
        """What an erasure promises, as a JWT; as `sign_assertion`, with a type of its own."""
        return self._signing.sign({**claims, "iss": self.issuer}, RECEIPT_TYPE)

    async def public_keys(self) -> tuple[PublicKey, ...]:
        """All keys that a token or an assertion may be signed with, at most a second old."""
        return await self._signing.published()

    def client_secret_hash(self, secret: str) -> bytes:
        """How a client's secret is stored: a keyed SHA-256. 32 bytes."""
        return self._keys.keyed_hash("client-secret", secret.encode("utf-8", "backslashreplace"))

    def client_secret_matches(self, secret: str, client: Client | None) -> bool:
        """Whether it is the client's secret, or the former one while both hold.

        Never where there is no such client, in the same time.
        """
        given, nobodys = self.client_secret_hash(secret), bytes(32)
        present = nobodys if client is None else client.secret_hash
        former = nobodys if client is None or client.former_hash is None else client.former_hash
        is_present, is_former = hmac.compare_digest(given, present), hmac.compare_digest(given, former)
        if client is None:
            return False
        return is_present or (is_former and client.former_until is not None and now() < client.former_until)

    def forget(self) -> None:
        """Forget every standing: after an account or a login changed here, this process sees it at once."""
        self._changes += 1
        self._standings.clear()

    def forget_keys(self) -> None:
        """Load the signing keys again before the next use: they were changed here."""
        self._signing.expire()

    async def load_keys(self) -> None:
        """Load the signing keys; make the first one where there is none, one for all processes that start at once.

        Raises SealBroken when the key-encryption key is not the one that sealed them.
        """
        await self._signing.load()

    async def _look_up(self, claims: TokenClaims) -> _Standing:
        changes, as_of = self._changes, time.monotonic()
        caller = await (_user_behind(claims) if claims.kind == "user" else _client_behind(claims))
        standing = _Standing(caller, as_of)
        # What was read before a change here must not outlive it.
        if changes == self._changes:
            if len(self._standings) >= STANDINGS_KEPT:
                self._standings.clear()
            self._standings[claims.token_id] = standing
        return standing


async def open_access(settings: Settings, keys: KeyRing) -> Access:
    """An Access with its signing keys loaded, the first one made where there is none.

    Raises SealBroken when the key-encryption key is not the one that sealed them.
    """
    access = Access(settings, keys)
    await access.load_keys()
    return access


def new_secret() -> str:
    """256 random bits as URL-safe text: a client's secret, a refresh token."""
    return secrets.token_urlsafe(32)


def secret_digest(secret: str) -> bytes:
    """SHA-256 of a random secret: how a refresh token is stored. 32 bytes."""
    return hashlib.sha256(secret.encode("utf-8", "backslashreplace")).digest()


async def _user_behind(claims: TokenClaims) -> Caller | None:
    user = await User.get(claims.subject)
    if user is None or user.disabled or user.access_version != claims.access_version or claims.session_id is None:
        return None
    login = await Login.get(claims.session_id)
    if login is None or not login_holds(login, user):
        return None
    return user_as_caller(user, token_id=claims.token_id, session_id=login.id)


async def _client_behind(claims: TokenClaims) -> Caller | None:
    client = await Client.get(claims.subject)
    if client is None or client.access_version != claims.access_version:
        return None
    if await RevokedToken.get(claims.token_id) is not None:
        return None
    return client_as_caller(client, token_id=claims.token_id, audiences=await AudienceClaim.usable_by(client))


def login_holds(login: Login, user: User) -> bool:
    """Whether the login is this user's, unrevoked, and made with their present password."""
    return login.user_id == user.id and login.revoked_at is None and login.session_version == user.session_version


def user_as_caller(user: User, *, token_id: str = "", session_id: str | None = None) -> Caller:
    """The user as a caller, with the token that they came with."""
    galleries = None if user.galleries is None else tuple(user.galleries)
    # An older process may have written a role that is not for people.
    roles = USER_ROLES.intersection(user.roles)
    return Caller(user.id, "user", user.username, roles, galleries, token_id, session_id)


def client_as_caller(client: Client, *, token_id: str = "", audiences: tuple[str, ...] = ()) -> Caller:
    """The client as a caller, with the token that it came with."""
    galleries = None if client.galleries is None else tuple(client.galleries)
    roles = CLIENT_ROLES.intersection(client.roles)
    return Caller(client.id, "client", client.name, roles, galleries, token_id, None, audiences or (client.id,))
