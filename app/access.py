"""Callers: passwords, secrets, the tokens that they carry, and who stands behind a token at this moment.

Access tokens are EdDSA (Ed25519) JWTs. What they prove is who logged in; roles and galleries are read from the
database at each request, through a memory of half a second, so that a change or a revocation holds within a second
on every process. All MongoDB reads here run under the time limit that the caller has opened (`pymongo.timeout`).
"""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import secrets
import time
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Final, cast

import jwt
import pymongo
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from passlib.hash import argon2
from pymongo.errors import DuplicateKeyError

from app.config import Settings
from app.documents.accounts import Client, Login, RevokedToken, SigningKey, User
from app.domain.callers import Caller, CallerKind
from app.errors import Advice, Unauthenticated, Validation
from app.keys import KeyRing

#: Code points, not bytes: a passphrase in any script counts the same.
PASSWORD_MINIMUM, PASSWORD_MAXIMUM = 8, 256
#: OWASP's stronger profile: 64 MiB, three passes, four lanes; 0.15 s on one core.
_ARGON2: Final = argon2.using(type="ID", memory_cost=64 * 1024, rounds=3, parallelism=4)

ALGORITHM: Final = "EdDSA"
ACCESS_TOKEN_TYPE: Final = "at+jwt"  # noqa: S105 - the name of a type (RFC 9068)
ASSERTION_TYPE: Final = "idem-assertion+jwt"
#: Who access tokens are for: this API. An assertion never carries it together with the access tokens' type.
ACCESS_AUDIENCE: Final = "idem-api"
#: Longer ones are refused before any decoding; ours have some 500 characters.
TOKEN_CHARACTERS: Final = 8192
#: For clocks that differ between hosts; expiry itself gets none.
LEEWAY_SECONDS: Final = 5
#: How old a caller's standing may be: "within a second on every process" with time to spare.
STANDING_SECONDS: Final = 0.5
STANDINGS_KEPT: Final = 8192
KEY_RELOAD_SECONDS: Final = 1.0
#: Access tokens live one day at most (ACCESS_TOKEN_EXPIRE_MINUTES), so none can claim more.
_LONGEST_LIFE_SECONDS: Final = 24 * 3600

_COMPACT_JWT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")

ClaimValue = str | int | float | list[str] | None
Claims = Mapping[str, ClaimValue]


def check_password(password: str) -> None:
    """Refuse a new password by its length, before any hashing. Raises Validation."""
    if not PASSWORD_MINIMUM <= len(password) <= PASSWORD_MAXIMUM:
        message = f"A password has {PASSWORD_MINIMUM} to {PASSWORD_MAXIMUM} characters."
        raise Validation(message, errors=(Advice("password", "length", message),))


def hash_password(password: str) -> str:
    """The password's Argon2id hash with its salt and costs. Blocking, 64 MiB and 0.15 s: run it in the executor."""
    return cast("str", _ARGON2.hash(_normal(password)))


def password_matches(password: str, hashed: str | None) -> bool:
    """Whether it is the password; None (there is no such user) costs the same time and is never one. Blocking."""
    if len(password) > PASSWORD_MAXIMUM:
        return False
    matches = cast("bool", _ARGON2.verify(_normal(password), hashed or _decoy_hash()))
    return matches and hashed is not None


def _normal(password: str) -> str:
    # One keyboard sends an umlaut composed, another decomposed (NIST SP 800-63B, 3.1.1.2). Half a surrogate pair
    # cannot be encoded and stands for itself, escaped.
    return unicodedata.normalize("NFKC", password).encode("utf-8", "backslashreplace").decode()


@cache
def _decoy_hash() -> str:
    return hash_password(secrets.token_urlsafe())


def new_secret() -> str:
    """256 random bits as URL-safe text: a client's secret, a refresh token."""
    return secrets.token_urlsafe(32)


def secret_digest(secret: str) -> bytes:
    """SHA-256 of a random secret: how a refresh token is stored. 32 bytes."""
    return hashlib.sha256(secret.encode("utf-8", "backslashreplace")).digest()


@dataclass(frozen=True, slots=True)
class AccessToken:
    """A fresh access token, its id, and for how many seconds it holds."""

    text: str
    token_id: str
    expires_in_seconds: int


@dataclass(frozen=True, slots=True)
class TokenClaims:
    """What a genuine access token says. expires_at: seconds since 1970."""

    subject: str
    kind: CallerKind
    token_id: str
    session_id: str | None
    access_version: int
    expires_at: int


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key of tokens and assertions: its `kid`, and the 32 raw bytes of Ed25519."""

    key_id: str
    raw: bytes


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
        self._timeout_seconds = settings.mongodb_timeout_seconds
        self._life_seconds = settings.access_token_expire_minutes * 60
        self._keys = keys
        self._public: dict[str, Ed25519PublicKey] = {}
        self._signing: Ed25519PrivateKey | None = None
        self._signing_id = ""
        self._loaded_at = float("-inf")
        self._loading = asyncio.Lock()
        self._standings: dict[str, _Standing] = {}
        self._changes = 0

    async def authenticate(self, bearer: str | None) -> Caller:
        """Who sends this token, with the roles and galleries of now.

        Raises Unauthenticated when it is missing, not genuine, expired, revoked, or its owner is gone, disabled,
        has another role or another password since.
        """
        if bearer is None:
            message = "This call needs a bearer token."
            raise Unauthenticated(message)
        claims = await self.read(bearer)
        known = self._standings.get(claims.token_id)
        if known is None or time.monotonic() - known.as_of >= STANDING_SECONDS:
            known = await self._look_up(claims)
        if known.caller is None:
            raise _refusal()
        return known.caller

    async def read(self, token: str) -> TokenClaims:
        """The claims of a genuine access token of ours that has not expired, revoked or not. Raises Unauthenticated."""
        key_id = key_id_of(token)
        if key_id not in self._public:
            await self._reload()
        public = self._public.get(key_id)
        if public is None:
            raise _refusal()
        return claims_of(token, public, self.issuer)

    def issue(self, principal: User | Client, session_id: str | None = None) -> AccessToken:
        """A fresh access token for a user in one of their logins (its id), or for a client."""
        issued_at, token_id = int(time.time()), secrets.token_urlsafe(16)
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
        return AccessToken(self._sign(claims, ACCESS_TOKEN_TYPE), token_id, self._life_seconds)

    def sign_assertion(self, claims: Claims) -> str:
        """A verification's result as a JWT that relying parties check with the published keys; `iss` is added.

        The same claims give the same text, so that a repeated request can answer what the first one answered.
        """
        return self._sign({**claims, "iss": self.issuer}, ASSERTION_TYPE)

    async def public_keys(self) -> tuple[PublicKey, ...]:
        """All keys that a token or an assertion may be signed with, at most a second old."""
        await self._reload()
        return tuple(PublicKey(key_id, key.public_bytes_raw()) for key_id, key in self._public.items())

    def client_secret_hash(self, secret: str) -> bytes:
        """How a client's secret is stored: a keyed SHA-256. 32 bytes."""
        return self._keys.keyed_hash("client-secret", secret.encode("utf-8", "backslashreplace"))

    def client_secret_matches(self, secret: str, client: Client | None) -> bool:
        """Whether it is the client's secret; never where there is no such client, in the same time."""
        expected = client.secret_hash if client is not None else bytes(32)
        return hmac.compare_digest(self.client_secret_hash(secret), expected) and client is not None

    def forget(self) -> None:
        """Forget every standing: after an account or a login changed here, this process sees it at once."""
        self._changes += 1
        self._standings.clear()

    async def load_keys(self) -> None:
        """Load the signing keys; make the first one where there is none, one for all processes that start at once.

        Raises SealBroken when the key-encryption key is not the one that sealed them.
        """
        await self._reload()
        if self._signing is None:
            fresh = Ed25519PrivateKey.generate()
            public = fresh.public_key().public_bytes_raw()
            key_id = _thumbprint(public)
            sealed = self._keys.seal_with_master(fresh.private_bytes_raw(), _key_bound(key_id))
            with suppress(DuplicateKeyError):  # another process was quicker: its key is everybody's
                await SigningKey(id=key_id, generation=1, public=public, sealed_private=sealed).insert()
            self._loaded_at = float("-inf")
            await self._reload()

    def _sign(self, claims: Claims, token_type: str) -> str:
        if self._signing is None:
            message = "the signing keys are not loaded"
            raise RuntimeError(message)
        # Sorted: the order in which claims were put together must not show.
        ordered = dict(sorted(claims.items()))
        return jwt.encode(ordered, self._signing, ALGORITHM, headers={"typ": token_type, "kid": self._signing_id})

    async def _reload(self) -> None:
        # The limit begins before the lock: those who wait for it must not each wait for a frozen store once more.
        with pymongo.timeout(self._timeout_seconds):
            await self._load_once_a_second()

    async def _load_once_a_second(self) -> None:
        async with self._loading:
            if time.monotonic() - self._loaded_at < KEY_RELOAD_SECONDS:
                return
            stored = await SigningKey.find_all().sort("generation").to_list()
            self._loaded_at = time.monotonic()
            self._public = {key.id: Ed25519PublicKey.from_public_bytes(key.public) for key in stored}
            if stored and stored[-1].id != self._signing_id:
                newest = stored[-1]
                private = self._keys.open_with_master(newest.sealed_private, _key_bound(newest.id))
                self._signing = Ed25519PrivateKey.from_private_bytes(private)
                self._signing_id = newest.id

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
    return client_as_caller(client, token_id=claims.token_id)


def login_holds(login: Login, user: User) -> bool:
    """Whether the login is this user's, unrevoked, and made with their present password."""
    return login.user_id == user.id and login.revoked_at is None and login.session_version == user.session_version


def user_as_caller(user: User, *, token_id: str = "", session_id: str | None = None) -> Caller:
    """The user as a caller, with the token that they came with."""
    galleries = None if user.galleries is None else tuple(user.galleries)
    return Caller(user.id, "user", user.username, frozenset(user.roles), galleries, token_id, session_id)


def client_as_caller(client: Client, *, token_id: str = "") -> Caller:
    """The client as a caller, with the token that it came with."""
    galleries = None if client.galleries is None else tuple(client.galleries)
    audiences = (client.id, *client.audiences)
    return Caller(client.id, "client", client.name, frozenset(client.roles), galleries, token_id, None, audiences)


def key_id_of(token: str) -> str:
    """The `kid` that a well-formed access token names; it is only ever a key into a map. Raises Unauthenticated."""
    if len(token) > TOKEN_CHARACTERS or _COMPACT_JWT.fullmatch(token) is None:
        raise _refusal()
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError as error:
        raise _refusal() from error
    key_id = header.get("kid")
    # `crit` announces something that must be understood, and nothing is; jku, x5u and jwk are never looked at.
    if header.get("typ") != ACCESS_TOKEN_TYPE or "crit" in header or not isinstance(key_id, str):
        raise _refusal()
    return key_id


def claims_of(token: str, public: Ed25519PublicKey, issuer: str) -> TokenClaims:
    """What a token says that was signed with this key, by this issuer, for this API, and has not expired.

    Raises Unauthenticated.
    """
    try:
        claims = jwt.decode(
            token,
            public,
            algorithms=[ALGORITHM],
            issuer=issuer,
            audience=ACCESS_AUDIENCE,
            leeway=LEEWAY_SECONDS,
            options={"require": ["iss", "aud", "sub", "iat", "exp", "jti"], "strict_aud": True},
        )
    except jwt.PyJWTError as error:
        raise _refusal() from error
    return _checked(claims)


def _refusal() -> Unauthenticated:
    # One text for every reason: which check failed helps only those who forge.
    return Unauthenticated("The token does not hold (any more).")


def _checked(claims: Mapping[str, object]) -> TokenClaims:
    """The claims with their types; PyJWT would take `"exp": "123"` for a number. Raises Unauthenticated."""
    subject, kind, token_id = claims.get("sub"), claims.get("kind"), claims.get("jti")
    session_id, version = claims.get("sid"), claims.get("ver")
    issued_at, expires_at = claims.get("iat"), claims.get("exp")
    if (
        not isinstance(subject, str)
        or not isinstance(token_id, str)
        or not (session_id is None or isinstance(session_id, str))
        or kind not in ("user", "client")
        or type(version) is not int
        or type(issued_at) is not int
        or type(expires_at) is not int
        or not 0 < expires_at - issued_at <= _LONGEST_LIFE_SECONDS
        or expires_at <= time.time()
    ):
        raise _refusal()
    return TokenClaims(subject, kind, token_id, session_id, version, expires_at)


def _thumbprint(public: bytes) -> str:
    """The key's RFC 7638 thumbprint: members in lexical order, no spaces, SHA-256, base64url without padding."""
    member = base64.urlsafe_b64encode(public).rstrip(b"=").decode()
    canonical = json.dumps({"crv": "Ed25519", "kty": "OKP", "x": member}, separators=(",", ":"))
    return base64.urlsafe_b64encode(hashlib.sha256(canonical.encode()).digest()).rstrip(b"=").decode()


def _key_bound(key_id: str) -> bytes:
    return f"idem/1|signing-key|{key_id}".encode()
