"""The store's root secret: what every keyed hash comes from. It is sealed, so that key-encryption keys may come and go."""

import os
from contextlib import suppress
from datetime import datetime
from typing import ClassVar, Final

from pydantic import Field
from pymongo import IndexModel
from pymongo.errors import DuplicateKeyError

from app.documents.base import Stored, now
from app.keys import KEY_BYTES, KeyRing

#: There is one.
ROOT_ID: Final = "root"
ROOT_BOUND: Final = b"idem/1|root-secret"


class RootSecret(Stored):
    """32 random bytes, sealed under the key-encryption key."""

    sealed: bytes
    created_at: datetime = Field(default_factory=now)

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "root_secrets"
        indexes: ClassVar[list[IndexModel]] = []


async def open_root(keys: KeyRing) -> None:
    """Have the keys hash under the store's root secret; made here where there is none, one for all that start at once.

    Raises SealBroken when none of the key-encryption keys sealed it.
    """
    stored = await RootSecret.get(ROOT_ID)
    while stored is None:
        fresh = RootSecret(id=ROOT_ID, sealed=keys.seal_with_master(os.urandom(KEY_BYTES), ROOT_BOUND))
        with suppress(DuplicateKeyError):  # another process was quicker: its secret is everybody's
            await fresh.insert()
        stored = await RootSecret.get(ROOT_ID)
    keys.adopt_root(keys.open_with_master(stored.sealed, ROOT_BOUND))
