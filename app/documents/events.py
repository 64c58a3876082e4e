"""What happened: one audit event for every action and every refusal."""

from datetime import datetime
from typing import ClassVar, Literal

from pymongo import IndexModel

from app.documents.base import Stored, Value

Outcome = Literal["success", "denied", "failure"]
Detail = dict[str, str | int | float | bool | None]


class Subject(Value):
    """What an action was about."""

    kind: str
    id: str | None


class ActorRef(Value):
    """Who acted: a user, a client, the system, or nobody known."""

    kind: Literal["user", "client", "system", "anonymous"]
    id: str | None


class Personal(Value):
    """What of an event is somebody's: it stands in the event's leaf as HMAC under `salt`; without the salt it is gone."""

    salt: bytes
    actor_name: str | None
    actor_ip: str | None
    request_id: str | None


class AuditEvent(Stored):
    """One event, never changed; `seq` and `leaf_hash` are given when it enters the Merkle tree."""

    seq: int | None = None
    time: datetime
    actor: ActorRef
    personal: Personal | None
    action: str
    subject: Subject
    outcome: Outcome
    gallery: str | None
    detail: Detail
    leaf_hash: str | None = None

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "audit_events"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("time", -1), ("_id", -1)]),
            IndexModel([("action", 1), ("time", -1)]),
            IndexModel([("actor.id", 1), ("time", -1)]),
            IndexModel([("subject.id", 1), ("time", -1)]),
            IndexModel([("gallery", 1), ("time", -1)]),
            IndexModel("seq", partialFilterExpression={"seq": {"$type": "number"}}, unique=True),
        ]
