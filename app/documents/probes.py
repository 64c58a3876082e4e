"""Probes: how the newest selfies presented for an identity looked, so that a near copy of one is noticed."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import ClassVar, Final, Self

import numpy as np
from pymongo import IndexModel
from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import Stored, now
from app.domain.near_copies import FINGERPRINT_BYTES, Likeness
from app.keys import DataKey

#: So many matches and so many non-matches are remembered of an identity: a flood of one kind does not push out the other.
KEPT: Final = 20


@dataclass(frozen=True, slots=True)
class Place:
    """Whose probes, made by which model: a sealed likeness opens nowhere else."""

    gallery_id: str
    identity_id: str
    contract: str

    @property
    def bound(self) -> bytes:
        """What the sealed bytes are tied to."""
        return f"idem/1|probe|{self.gallery_id}|{self.identity_id}|{self.contract}".encode()


class Probe(Stored):
    """One selfie's likeness, sealed under the identity's data key for as long as the selfie itself would be refused.

    The id is the identity's with the number of a slot, so that two matches (or two non-matches) at the same moment want the
    same one and their transactions conflict: neither is overlooked.
    """

    identity_id: str
    likeness: bytes
    presented_at: datetime
    expires_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "probes"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel("identity_id"),
            IndexModel("expires_at", expireAfterSeconds=0),
        ]

    @classmethod
    async def recent(cls, identity_id: str, session: AsyncClientSession | None = None) -> list[Self]:
        """Those of the identity that have not expired."""
        return await cls.find({"identity_id": identity_id, "expires_at": {"$gt": now()}}, session=session).to_list()

    @classmethod
    async def remember(
        cls,
        key: DataKey,
        place: Place,
        likeness: Likeness,
        known: Sequence[Self],
        keep: timedelta,
        session: AsyncClientSession,
        *,
        matched: bool,
    ) -> None:
        """Keep a likeness, in place of the oldest of its kind when there are KEPT. known: `recent` of this transaction."""
        moment = now()
        presented = {probe.id: probe.presented_at for probe in known}
        slots = [f"{place.identity_id}:{'match' if matched else 'other'}:{number}" for number in range(KEPT)]
        slot = min(slots, key=lambda name: (name in presented, presented.get(name, moment)))
        fields = {
            "identity_id": place.identity_id, "likeness": key.seal(_packed(likeness), place.bound),
            "presented_at": moment, "expires_at": moment + keep,
        }  # fmt: skip
        await cls.get_pymongo_collection().update_one({"_id": slot}, {"$set": fields}, upsert=True, session=session)

    @classmethod
    async def forget_all(cls, identity_ids: Sequence[str]) -> None:
        """Delete the probes of these identities: a likeness made by another model cannot be opened any more."""
        await cls.get_pymongo_collection().delete_many({"identity_id": {"$in": list(identity_ids)}})

    @classmethod
    async def forget(cls, identity_id: str, session: AsyncClientSession) -> int:
        """Erase what is remembered of an identity; how many there were."""
        result = await cls.get_pymongo_collection().delete_many({"identity_id": identity_id}, session=session)
        return int(result.deleted_count)

    def opened(self, key: DataKey, place: Place) -> Likeness:
        """How the selfie looked. Raises SealBroken."""
        return _unpacked(key.open(self.likeness, place.bound))


def _packed(likeness: Likeness) -> bytes:
    """Half the precision is plenty: it moves a cosine by less than 1e-6."""
    return (likeness.fingerprint or bytes(FINGERPRINT_BYTES)) + likeness.embedding.astype("<f2").tobytes()


def _unpacked(packed: bytes) -> Likeness:
    fingerprint = packed[:FINGERPRINT_BYTES]
    embedding = np.frombuffer(packed[FINGERPRINT_BYTES:], "<f2").astype(np.float32)
    return Likeness(embedding, fingerprint if any(fingerprint) else None)
