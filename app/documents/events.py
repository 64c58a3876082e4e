"""What happened: one audit event for every action and every refusal."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, Final, Literal, cast

from pydantic import Field
from pymongo import IndexModel
from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import Stored, Value, as_text
from app.domain.changes import Changes
from app.domain.log_export import SALT_BYTES, Json, Line, in_order, personal_hash, replaced, value_at

Outcome = Literal["success", "denied", "failure"]
Scalar = str | int | float | bool | None
Detail = dict[str, Scalar | dict[str, Scalar] | Changes]


class Subject(Value):
    """What an action was about."""

    kind: str
    id: str | None


class ActorRef(Value):
    """Who acted: a user, a client, the system, or nobody known. name and ip: their HMACs under the event's salt."""

    kind: Literal["user", "client", "system", "anonymous"]
    id: str | None
    name: str | None = None
    ip: str | None = None


class TypedText(Value):
    """A text that somebody typed, and its place in the event: "detail.reason"."""

    place: str
    text: str


class Personal(Value):
    """What of an event is somebody's, in the clear, and the salt under which it stands in the leaf; deleted to forget them.

    request_id: where the caller gave it; else it is ours, and nobody's. texts: what people typed; none in events of older
    versions, which have it in the leaf.
    """

    salt: bytes
    actor_name: str | None
    actor_ip: str | None
    request_id: str | None
    texts: list[TypedText] = Field(default_factory=list)

    @property
    def clear(self) -> dict[str, str]:
        """The values that stand hashed in the leaf, by the names that an export gives them, in its order."""
        named = {"actor.name": self.actor_name, "actor.ip": self.actor_ip, "request_id": self.request_id}
        given = {name: value for name, value in named.items() if value is not None}
        given |= {typed.place: typed.text for typed in self.texts}
        return {name: given[name] for name in in_order(given)}


#: What stands in a leaf for something personal.
_PERSONAL_HASH: Final = re.compile("^[0-9a-f]{64}$")


def _about(ids: Sequence[str]) -> dict[str, Any]:
    """The filter for events about these identities and cases."""
    return {"subject.id": {"$in": list(ids)}, "subject.kind": {"$in": ["identity", "case"]}}


class AuditEvent(Stored):
    """One event, never changed; `seq` and `leaf_hash` are given when it enters the Merkle tree.

    personal: kept beside the event and no part of its leaf, so that it can be deleted and the leaf still holds.
    """

    seq: int | None = None
    time: datetime
    actor: ActorRef
    action: str
    subject: Subject
    outcome: Outcome
    gallery: str | None
    request_id: str | None = None
    detail: Detail
    leaf_hash: str | None = None
    personal: Personal | None

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "audit_events"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("time", -1), ("_id", -1)]),
            IndexModel([("action", 1), ("time", -1)]),
            IndexModel([("actor.id", 1), ("time", -1)]),
            IndexModel([("subject.id", 1), ("time", -1)]),
            IndexModel([("gallery", 1), ("time", -1)]),
            # Of searches only: an erasure looks for those that found the person.
            IndexModel(
                "detail.best_identity_id", partialFilterExpression={"detail.best_identity_id": {"$type": "string"}}
            ),
            IndexModel("seq", partialFilterExpression={"seq": {"$type": "number"}}, unique=True),
            # Holds only those that wait for their number, which is next to nothing.
            IndexModel([("seq", 1), ("_id", 1)], partialFilterExpression={"seq": {"$type": "null"}}),
        ]

    async def enter(self, session: AsyncClientSession | None = None) -> None:
        """Insert it by the driver alone: every request does it, and Beanie's way takes a third more of the processor."""
        fields = self.model_dump()
        if self.personal is not None and not self.personal.texts:
            # A process of an older version reads events without typed text, and no others.
            del fields["personal"]["texts"]
        await self.get_pymongo_collection().insert_one({"_id": fields.pop("id"), **fields}, session=session)

    @classmethod
    async def unnumbered(cls, limit: int, session: AsyncClientSession | None = None) -> list["AuditEvent"]:
        """Events that are not in the tree yet, about in the order of their making."""
        query = cls.find({"seq": {"$type": "null"}}, session=session)
        return await query.sort("+seq", "+_id").limit(limit).to_list()

    @classmethod
    async def longest_unnumbered(cls) -> datetime | None:
        """The time of the first event without a number; None when every event has one."""
        first = await cls.unnumbered(1)
        return first[0].time if first else None

    @classmethod
    async def forget_personal(cls, filters: Mapping[str, Any], session: AsyncClientSession | None = None) -> int:
        """Delete salts and clear values of the events that fit; what stands in their leaves can never be undone again.

        Returns how many events had any.
        """
        forgotten = await cls.get_pymongo_collection().update_many(
            {**filters, "personal": {"$ne": None}}, {"$set": {"personal": None}}, session=session
        )
        return forgotten.modified_count

    @classmethod
    async def forget_about(cls, ids: Sequence[str]) -> None:
        """Delete salts and clear values of all events about these identities and cases, and of searches that found them."""
        found = {"detail.best_identity_id": {"$in": list(ids), "$type": "string"}}
        await cls.forget_personal({"$or": [_about(ids), found]})

    @classmethod
    async def has_plain_texts(cls, ids: Sequence[str]) -> bool:
        """Whether the leaf of an event about these identities and cases has typed text in the clear, as in older versions."""
        plain = {"$type": "string", "$not": _PERSONAL_HASH}
        typed = {"$or": [{"detail.reason": plain}, {"detail.nonce": plain}]}
        by_somebody = {"actor.kind": {"$in": ["user", "client"]}}
        return (
            await cls.get_pymongo_collection().find_one({**_about(ids), **by_somebody, **typed}, {"_id": 1}) is not None
        )

    def leaf(self, seq: int) -> Line:
        """What the leaf at `seq` is hashed over, as JSON."""
        return {
            "id": self.id, "seq": seq, "time": as_text(self.time),
            "actor": {"kind": self.actor.kind, "id": self.actor.id, "name": self.actor.name, "ip": self.actor.ip},
            "action": self.action, "subject": {"kind": self.subject.kind, "id": self.subject.id}, "outcome": self.outcome,
            "gallery": self.gallery, "request_id": self.request_id, "detail": cast("Line", self.detail),
        }  # fmt: skip

    @property
    def facts(self) -> dict[str, Scalar]:
        """The plain values of `detail`, without the nested ones. Typed texts are keyed hashes."""
        return {name: value for name, value in self.detail.items() if not isinstance(value, dict)}

    @property
    def told(self) -> Detail:
        """`detail` as readers see it: typed texts in the clear while they are kept."""
        return cast("Detail", self.shown()["detail"])

    @property
    def borne_out(self) -> dict[str, str]:
        """Of the values kept in the clear those that the leaf bears out: what lies beside an event proves nothing by itself."""
        if self.personal is None or len(self.personal.salt) != SALT_BYTES:
            return {}
        salt, leaf = self.personal.salt, self.leaf(0)
        kept = self.personal.clear
        return {name: value for name, value in kept.items() if personal_hash(salt, value) == value_at(leaf, name)}

    def shown(self) -> Line:
        """The event as readers see it: with the clear values while they are kept and true, and their hashes else."""
        line = self.leaf(0)
        for name, value in self.borne_out.items():
            line = replaced(line, name, value)
        return line | {"seq": self.seq, "leaf_hash": self.leaf_hash}

    def exported(self) -> Line:
        """The event in an export: with what its leaf can be hashed again from; `skipped` and `end` are the export's to fill."""
        personal: Json = None
        if self.personal is not None and self.borne_out:
            personal = {"fields": list(self.borne_out), "salt": self.personal.salt.hex()}
        return self.shown() | {"personal": personal, "skipped": [], "end": None}


class StrangerCount(Stored):
    """How often nobody known was refused an action, from one address in one minute; until an event tells it."""

    minute: datetime
    ip: str
    action: str
    refused: int

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "stranger_counts"
        indexes: ClassVar[list[IndexModel]] = [IndexModel([("minute", 1), ("ip", 1)])]
