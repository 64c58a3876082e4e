"""Leases: who may do now what only one process at a time may do, and how far it has come."""

from datetime import datetime
from typing import Self

from app.documents.base import Stored, Value


def rekeying(gallery_id: str) -> str:
    """The name of the lease for a rotation of the gallery's key."""
    return f"rekey:{gallery_id}"


def re_embedding(gallery_id: str) -> str:
    """The name of the lease for a move of the gallery to another model."""
    return f"re-embed:{gallery_id}"


def renewing_lookups(gallery_id: str) -> str:
    """The name of the lease for making the gallery's lookups again."""
    return f"lookups:{gallery_id}"


class LeaseProgress(Value):
    """How far the holder has come: `done` of `total` in the present stage, which began at `started_at`."""

    stage: str
    done: int
    total: int
    started_at: datetime


class Lease(Stored):
    """One document for each thing that takes turns; its id is the name, `publish:<gallery id>`.

    holder: None when it was given back. fence: how often it was acquired; what the holder writes is good only while this is the
    number that it was given. expires_at: by MongoDB's clock, as `updated_at`. checks: how often a transaction relied on it.
    """

    holder: str | None
    fence: int
    expires_at: datetime
    updated_at: datetime
    checks: int = 0
    progress: LeaseProgress | None = None

    class Settings(Stored.Settings):
        """Collection; asked by id only."""

        name = "leases"

    @classmethod
    async def alive(cls, *names: str) -> list[Self]:
        """Those of these, or of all when none is named, that somebody holds at the moment, by MongoDB's clock."""
        named = {"_id": {"$in": names}} if names else {}
        return await cls.find({**named, "$expr": {"$gt": ["$expires_at", "$$NOW"]}}).to_list()
