"""What all stored things share: time-ordered ids, UTC times in milliseconds, frozen embedded values."""

import re
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

import uuid_utils.compat as uuids
from beanie import Document
from pydantic import BaseModel, ConfigDict, Field
from pymongo import IndexModel

from app.clock import Clock

_ID: Final = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def new_id() -> str:
    """A UUIDv7 as text: unique everywhere, and ordered by the time of its making."""
    return str(uuids.uuid7())


def is_id(text: str) -> bool:
    """Whether it has the form of an id of ours. Other text in an id's place may be anything that somebody typed."""
    return _ID.fullmatch(text) is not None


def go_by(clock: Clock) -> None:
    """Use this clock from now on. `open_runtime` calls this when it binds the documents to their database."""
    _Present.clock = clock


def now() -> datetime:
    """The present in UTC by MongoDB's clock, cut to milliseconds; the host's clock before a Runtime is opened."""
    return _Present.clock.now()


def as_text(moment: datetime) -> str:
    """A time as the contract writes it: 2026-11-21T09:30:00.123Z."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def within(galleries: Collection[str] | None) -> dict[str, Any]:
    """The filter for what lies in one of these galleries (ids; None means all).

    In the query, so that what lies elsewhere is as quickly answered as what is not there.
    """
    return {} if galleries is None else {"gallery_id": {"$in": list(galleries)}}


class _Present:
    """The clock of the database that the documents of this process are bound to."""

    clock: ClassVar[Clock] = Clock()


class Value(BaseModel):
    """A frozen value embedded in a document."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64")


class Stored(Document):
    """A document with an id of ours. Changed by `$set` of its own fields, never by saving the whole."""

    # Beanie types `id` for ObjectId; ours are UUIDv7 text.
    id: str = Field(default_factory=new_id)  # type: ignore[assignment]

    class Settings:
        """Beanie's hook; each document names its collection and indexes."""

        keep_nulls = True
        indexes: ClassVar[list[IndexModel]] = []
