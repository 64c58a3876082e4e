"""The append-only log: an event for every action, in the action's own transaction, and for every refusal.

Events get their place in the Merkle tree a moment later (`app/use_cases/sequence.py`). What of an event is somebody's stands in
it hashed under a salt, and in the clear beside it, where it can be forgotten.
"""

import hashlib
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, cast

from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import OperationFailure

from app.documents.base import is_id, now
from app.documents.claims import IdempotencyClaim, Once
from app.documents.events import (
    ActorRef,
    AuditEvent,
    Detail,
    Outcome,
    Personal,
    StrangerCount,
    Subject,
    TypedText,
)
from app.documents.tree import AuditKey
from app.domain.callers import Caller, subscriber
from app.domain.log_export import SALT_BYTES, canonical, personal_hash
from app.errors import AuditRefused, IdempotencyInProgress, NotFound, Problem
from app.keys import KeyRing

STRANGER_PERIOD: Final = timedelta(minutes=2)


@dataclass(slots=True)
class Action:
    """Who does what, from where, under which idempotency key.

    name: dotted, "identity.enrol". has_own_request_id: the caller gave the request id, so it is theirs, not ours. subject and
    gallery: filled in as they become known, so that a refusal's event names them. is_read: of its refusals, only those of access
    become events. is_recorded: whether its own event is written.
    """

    name: str
    caller: Caller | None
    request_id: str | None
    ip: str | None
    is_read: bool = False
    has_own_request_id: bool = False
    claim: IdempotencyClaim | None = None
    subject: Subject = field(default_factory=lambda: Subject(kind="none", id=None))
    gallery: str | None = None
    is_recorded: bool = False

    @property
    def actor_id(self) -> str:
        """The caller's id; "system" for what the service does by itself."""
        return self.caller.id if self.caller is not None else "system"

    def about(self, kind: str, named: str) -> None:
        """Set the subject, as the caller names it. Raises NotFound for what is no id: no event keeps its text."""
        self.subject = Subject(kind=kind, id=named if is_id(named) else None)
        if self.subject.id is None:
            raise NotFound


def by_system(name: str) -> Action:
    """An action that no caller asked for at this moment: a verdict, a sweep."""
    return Action(name=name, caller=None, request_id=None, ip=None)


class UnderSalt(str):
    """A text that an event stores only as a keyed hash, under the event's own salt.

    A guess cannot be tested without the salt. Erasure and retention delete the salt.
    """

    __slots__ = ()


class Typed(UnderSalt):
    """A text that somebody typed: a reason, a nonce. It may say anything about anybody.

    An event stores it as UnderSalt. The clear text is kept beside the event, and is deleted with the salt.
    """

    __slots__ = ()

    @classmethod
    def of(cls, text: str | None) -> "Typed | None":
        """The text, if there is one."""
        return None if text is None else cls(text)


def _hashed(value: object, salt: bytes) -> object:
    """The value with each UnderSalt in it replaced by its keyed hash."""
    if isinstance(value, dict):
        return {name: _hashed(one, salt) for name, one in value.items()}
    return personal_hash(salt, value) if isinstance(value, UnderSalt) else value


def _typed(value: object, place: str) -> list[TypedText]:
    """Each Typed in the value, which stands at this place in the event."""
    if isinstance(value, dict):
        return [text for key, one in value.items() for text in _typed(one, f"{place}.{key}")]
    return [TypedText(place=place, text=str(value))] if isinstance(value, Typed) else []


def _event(action: Action, subject: Subject, outcome: Outcome, gallery: str | None, detail: Detail) -> AuditEvent:
    """Raises ValueError for a detail that has no canonical JSON: it could never enter the tree."""
    caller = action.caller
    anonymous = ActorRef(kind="system" if action.ip is None else "anonymous", id=None)
    actor = anonymous if caller is None else ActorRef(kind=caller.kind, id=caller.id)
    personal = Personal(
        salt=os.urandom(SALT_BYTES),
        actor_name=None if caller is None else caller.name,
        actor_ip=action.ip or None,
        request_id=action.request_id if action.has_own_request_id else None,
        texts=_typed(detail, "detail"),
    )
    hashed = {name: personal_hash(personal.salt, value) for name, value in personal.clear.items()}
    told = cast("Detail", _hashed(detail, personal.salt))
    event = AuditEvent(
        time=now(),
        actor=actor.model_copy(update={"name": hashed.get("actor.name"), "ip": hashed.get("actor.ip")}),
        action=action.name,
        subject=subject,
        outcome=outcome,
        gallery=gallery,
        request_id=hashed.get("request_id", action.request_id),
        detail=told,
        # A hash in the detail can be compared only with the salt.
        personal=personal if hashed or told != detail else None,
    )
    canonical(event.leaf(0))
    return event


async def record(  # noqa: PLR0913 - an event is that wide
    session: AsyncClientSession | None,
    action: Action,
    *,
    subject_kind: str,
    subject_id: str | None,
    outcome: Outcome = "success",
    gallery: str | None = None,
    detail: Detail | None = None,
    status_code: int | None = None,
    score: float | None = None,
) -> AuditEvent:
    """Insert the action's event in its transaction, and settle the action's idempotency key with it.

    session: None for what only reads and answers. status_code and score: what an idempotent repetition must answer and
    the event does not hold. If the event cannot be written, the action does not happen: raises AuditRefused when the store
    answers and does not take it. Raises IdempotencyInProgress when another request took over the key.
    """
    event = _event(action, Subject(kind=subject_kind, id=subject_id), outcome, gallery, detail or {})
    try:
        await event.enter(session)
    except OperationFailure as error:
        # A conflict or an election is the transaction's to try again, and a time limit is the caller's.
        if error.timeout or error.has_error_label("TransientTransactionError"):
            raise
        raise AuditRefused from error
    action.is_recorded = True
    if action.claim is not None:
        settled = session is not None and await action.claim.settle(session, event.id, status_code or 200, score)
        if not settled:
            raise IdempotencyInProgress(retry_after_seconds=1)
    return event


async def is_first_of_stranger(action: Action) -> bool:
    """Count a refusal of somebody unknown; whether it is the first from that address in this minute, and so an event by itself.

    All addresses of one IPv6 network of 64 bits are one. What comes after it in the minute is told by one event more
    (`tell_of_strangers`).
    """
    minute = now().replace(second=0, microsecond=0)
    # An IPv6 subscriber has more addresses than a log has room.
    address = subscriber(action.ip) if action.ip else ""
    digest = hashlib.sha256(f"{address}|{minute:%Y-%m-%dT%H:%M}".encode()).hexdigest()
    counted = {"$inc": {"refused": 1}, "$setOnInsert": {"minute": minute, "ip": address, "action": action.name}}
    await StrangerCount.get_pymongo_collection().update_one({"_id": f"{digest}|{action.name}"}, counted, upsert=True)
    return await Once.is_first(f"stranger:{digest}", STRANGER_PERIOD)


async def tell_of_strangers(session: AsyncClientSession) -> bool:
    """One event for an address's refusals in a minute that is over, where there was more than the first; False when none is left.

    In one transaction: what was counted is told once.
    """
    over = now() - STRANGER_PERIOD
    oldest = await StrangerCount.find({"minute": {"$lt": over}}, session=session).sort("+minute").first_or_none()
    if oldest is None:
        return False
    of_it = {"minute": oldest.minute, "ip": oldest.ip}
    rows = await StrangerCount.find(of_it, session=session).sort("+action").to_list()
    total = sum(row.refused for row in rows)
    if total > 1:
        action = Action(name="auth.strangers", caller=None, request_id=None, ip=oldest.ip)
        detail: Detail = {
            "refused": total,
            "minute": f"{oldest.minute:%Y-%m-%dT%H:%MZ}",
            "actions": ", ".join(f"{row.action} {row.refused}" for row in rows),
        }
        await record(session, action, subject_kind="none", subject_id=None, outcome="denied", detail=detail)
    await StrangerCount.get_pymongo_collection().delete_many(of_it, session=session)
    return True


async def refuse(action: Action, problem: Problem) -> None:
    """Record that the action was refused: denied for 401 and 403, a failure otherwise.

    Strangers, who have no valid token or none at all, get one event per address and minute at once, so that they cannot fill
    the log; the others are counted.
    """
    outcome: Outcome = "denied" if problem.status in (401, 403) else "failure"
    if action.is_read and outcome != "denied":
        return
    if action.caller is None and not await is_first_of_stranger(action):
        return
    detail: Detail = {"problem": problem.slug(), "status": problem.status}
    await _event(action, action.subject, outcome, action.gallery, detail).enter()


async def rotate_key(session: AsyncClientSession, keys: KeyRing, action: Action, reason: str) -> AuditKey:
    """A new key for tree heads in place of the one in use, which signs nothing any more; recorded in the same transaction.

    reason: what an auditor is to read, 200 characters at most. Heads of the former key stay good.
    """
    former, fresh = await AuditKey.active(session), AuditKey.fresh(keys)
    retired = {"is_active": False, "retired_at": now(), "sealed_private": None}
    await AuditKey.get_pymongo_collection().update_one({"_id": former.id}, {"$set": retired}, session=session)
    await fresh.insert(session=session)
    detail: Detail = {"former": former.id, "reason": reason[:200]}
    await record(session, action, subject_kind="audit_key", subject_id=fresh.id, detail=detail)
    return fresh
