"""What an access token says: an EdDSA (Ed25519) JWT from a stranger's hands, read with a public key and nothing else."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from app.domain.callers import CallerKind
from app.errors import Unauthenticated

ALGORITHM: Final = "EdDSA"
ACCESS_TOKEN_TYPE: Final = "at+jwt"  # noqa: S105 - the name of a type (RFC 9068)
ASSERTION_TYPE: Final = "idem-assertion+jwt"
RECEIPT_TYPE: Final = "idem-receipt+jwt"
#: Who access tokens are for: this API. An assertion never carries it together with the access tokens' type.
ACCESS_AUDIENCE: Final = "idem-api"
#: Longer ones are refused before any decoding; ours have some 500 characters.
TOKEN_CHARACTERS: Final = 8192
#: For clocks that differ between hosts; expiry itself gets none.
LEEWAY_SECONDS: Final = 5
#: Access tokens live one day at most (ACCESS_TOKEN_EXPIRE_MINUTES), so none can claim more.
LONGEST_LIFE_SECONDS: Final = 24 * 3600

_HEADER: Final = {"alg", "typ", "kid"}
_COMPACT_JWT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class TokenClaims:
    """What a genuine access token says. expires_at: seconds since 1970."""

    subject: str
    kind: CallerKind
    token_id: str
    session_id: str | None
    access_version: int
    expires_at: int


def key_id_of(token: str) -> str:
    """The `kid` that a well-formed access token names; it is only ever a key into a map. Raises Unauthenticated."""
    if len(token) > TOKEN_CHARACTERS or _COMPACT_JWT.fullmatch(token) is None:
        raise refusal()
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError as error:
        raise refusal() from error
    key_id = header.get("kid")
    # Ours say nothing more: no key to be fetched (jku, x5u, jwk), and nothing that must be understood (crit).
    if set(header) != _HEADER or header["typ"] != ACCESS_TOKEN_TYPE or not isinstance(key_id, str):
        raise refusal()
    return key_id


def claims_of(token: str, public: Ed25519PublicKey, issuer: str, present: float) -> TokenClaims:
    """What a token says that was signed with this key, by this issuer, for this API, and has not expired.

    present: seconds since 1970, by the platform's clock and not the host's. Raises Unauthenticated.
    """
    try:
        claims = jwt.decode(
            token,
            public,
            algorithms=[ALGORITHM],
            issuer=issuer,
            audience=ACCESS_AUDIENCE,
            # The times are checked below, because the package would use the host's clock.
            options={
                "require": ["iss", "aud", "sub", "iat", "exp", "jti"],
                "strict_aud": True,
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
            },
        )
    except jwt.PyJWTError as error:
        raise refusal() from error
    return _checked(claims, present)


def refusal() -> Unauthenticated:
    """The one text for every reason: which check failed helps only those who forge."""
    return Unauthenticated("The token does not hold (any more).")


def _checked(claims: Mapping[str, object], present: float) -> TokenClaims:
    """The claims with their types; PyJWT would take `"exp": "123"` for a number. Raises Unauthenticated."""
    subject, kind, token_id = claims.get("sub"), claims.get("kind"), claims.get("jti")
    session_id, version = claims.get("sid"), claims.get("ver")
    issued_at, expires_at, not_before = claims.get("iat"), claims.get("exp"), claims.get("nbf")
    if (
        not isinstance(subject, str)
        or not isinstance(token_id, str)
        or not (session_id is None or isinstance(session_id, str))
        or kind not in ("user", "client")
        or type(version) is not int
        or type(issued_at) is not int
        or type(expires_at) is not int
        or not 0 < expires_at - issued_at <= LONGEST_LIFE_SECONDS
        or expires_at <= present
        or issued_at > present + LEEWAY_SECONDS
        # Our own tokens have no `nbf`.
        or not (not_before is None or (type(not_before) is int and not_before <= present + LEEWAY_SECONDS))
    ):
        raise refusal()
    return TokenClaims(subject, kind, token_id, session_id, version, expires_at)
