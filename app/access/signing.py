"""The keys that sign access tokens, assertions and receipts, and how one takes over from another.

A new key is published before it signs, and the old one verifies for as long as a token of it may live: so nobody who
holds a valid token is refused while keys change. What a process knows of the keys is at most a second old.
"""

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import jwt
import pymongo
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pymongo.errors import DuplicateKeyError

from app.access.tokens import ALGORITHM, LONGEST_LIFE_SECONDS
from app.documents.accounts import SigningKey, signing_key_bound
from app.documents.base import now
from app.keys import KeyRing

#: How old the known keys may be; also the least time between two loads.
KEY_RELOAD_SECONDS: Final = 1.0
#: Verifiers may keep the published keys for so long.
PUBLISHED_FOR_SECONDS: Final = 60
#: How long a new key is published before it signs: what verifiers keep is renewed by then, clocks may differ a little.
SIGNING_LEAD_SECONDS: Final = PUBLISHED_FOR_SECONDS + 30
#: How long a key verifies after the next one has begun to sign: as long as any token may live, and the same little.
VERIFIES_ON: Final = timedelta(seconds=LONGEST_LIFE_SECONDS + 60)

_THUMBPRINT = re.compile(r"[A-Za-z0-9_-]{43}")

ClaimValue = str | int | float | list[str] | None
Claims = Mapping[str, ClaimValue]


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key of tokens and assertions: its `kid`, and the 32 raw bytes of Ed25519."""

    key_id: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class _Known:
    """A key as this process knows it. signs_from, verifies_until: seconds since 1970."""

    key_id: str
    private: Ed25519PrivateKey
    public: Ed25519PublicKey
    signs_from: float
    verifies_until: float


class SigningKeys:
    """The store's signing keys in this process."""

    def __init__(self, keys: KeyRing, timeout_seconds: float) -> None:
        """timeout_seconds: for a load. Await `load` before the first signature."""
        self._keys = keys
        self._timeout_seconds = timeout_seconds
        self._known: dict[str, _Known] = {}  # oldest first
        self._loaded_at = float("-inf")
        self._loading = asyncio.Lock()

    async def load(self) -> None:
        """Load the keys; make the first one where there is none, one for all processes that start at once.

        Raises SealBroken when the key-encryption key is not the one that sealed them.
        """
        await self.keep_fresh()
        if not self._known:
            with suppress(DuplicateKeyError):  # another process was quicker: its key is everybody's
                await new_signing_key(self._keys, generation=1, signs_from=now()).insert()
            self.expire()
            await self.keep_fresh()

    def expire(self) -> None:
        """Load the keys again before the next use: they were changed here."""
        self._loaded_at = float("-inf")

    async def keep_fresh(self) -> None:
        """Load the keys again when they were loaded more than a second ago. Raises PyMongoError."""
        await self._reload(time.monotonic() - KEY_RELOAD_SECONDS)

    async def public(self, key_id: str) -> Ed25519PublicKey | None:
        """The key of this `kid`, while it verifies; None for one that nobody knows.

        A key that is not known here is looked for in a load that began after this call, which may wait for a second: it may
        have been made just now.
        """
        if _THUMBPRINT.fullmatch(key_id) is None:
            return None
        asked = time.monotonic()
        await self.keep_fresh()
        if key_id not in self._known:
            await self._reload(asked)
        known = self._known.get(key_id)
        return None if known is None or known.verifies_until <= now().timestamp() else known.public

    async def published(self) -> tuple[PublicKey, ...]:
        """All keys that a token or an assertion may be signed with, now or soon."""
        await self.keep_fresh()
        moment = now().timestamp()
        return tuple(
            PublicKey(known.key_id, known.public.public_bytes_raw())
            for known in self._known.values()
            if known.verifies_until > moment
        )

    def sign(self, claims: Claims, token_type: str) -> str:
        """The claims as a JWT, by the key that signed at the moment of their `iat`, if it is still there.

        So the same claims give the same text, whatever happened to the keys in between.
        """
        if not self._known:
            message = "the signing keys are not loaded"
            raise RuntimeError(message)
        moment = claims.get("iat")
        known = self._signing_at(moment if isinstance(moment, int) else now().timestamp())
        # Sorted: the order in which claims were put together must not show.
        ordered = dict(sorted(claims.items()))
        return jwt.encode(ordered, known.private, ALGORITHM, headers={"typ": token_type, "kid": known.key_id})

    def _signing_at(self, moment: float) -> _Known:
        known, present = list(self._known.values()), now().timestamp()
        alive = [key for key in known if key.verifies_until > present] or known
        begun = [key for key in alive if key.signs_from <= moment]
        return begun[-1] if begun else alive[0]

    async def _reload(self, since: float) -> None:
        """Load the keys, unless a load began after this moment (monotonic seconds); one at a time, one a second."""
        if self._loaded_at > since:
            return
        # The limit begins before the lock: those who wait for it must not each wait for a frozen store once more.
        with pymongo.timeout(self._timeout_seconds):
            async with self._loading:
                if self._loaded_at > since:
                    return
                await asyncio.sleep(self._loaded_at + KEY_RELOAD_SECONDS - time.monotonic())
                began = time.monotonic()
                stored = await SigningKey.find_all().sort("generation").to_list()
                self._known = {key.id: self._as_known(key) for key in stored}
                self._loaded_at = began

    def _as_known(self, key: SigningKey) -> _Known:
        before = self._known.get(key.id)
        private = self._opened(key) if before is None else before.private
        until = float("inf") if key.verifies_until is None else key.verifies_until.timestamp()
        return _Known(key.id, private, private.public_key(), key.signs_from.timestamp(), until)

    def _opened(self, key: SigningKey) -> Ed25519PrivateKey:
        raw = self._keys.open_with_master(key.sealed_private, signing_key_bound(key.id))
        return Ed25519PrivateKey.from_private_bytes(raw)


def new_signing_key(keys: KeyRing, *, generation: int, signs_from: datetime) -> SigningKey:
    """A fresh key, to be inserted."""
    private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    key_id = _thumbprint(public)
    sealed = keys.seal_with_master(private.private_bytes_raw(), signing_key_bound(key_id))
    return SigningKey(id=key_id, generation=generation, public=public, sealed_private=sealed, signs_from=signs_from)


def _thumbprint(public: bytes) -> str:
    """The key's RFC 7638 thumbprint: members in lexical order, no spaces, SHA-256, base64url without padding."""
    member = base64.urlsafe_b64encode(public).rstrip(b"=").decode()
    canonical = json.dumps({"crv": "Ed25519", "kty": "OKP", "x": member}, separators=(",", ":"))
    return base64.urlsafe_b64encode(hashlib.sha256(canonical.encode()).digest()).rstrip(b"=").decode()
