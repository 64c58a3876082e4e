"""The append-only log: an event for every action, in the action's own transaction, and for every refusal."""

import hashlib
import os
from dataclasses import dataclass, field
from datetime import timedelta

from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import now
from app.documents.claims import IdempotencyClaim, Once
from app.documents.events import ActorRef, AuditEvent, Detail, Outcome, Personal, Subject
from app.domain.callers import Caller
from app.errors import IdempotencyInProgress, Problem, Unauthenticated

SALT_BYTES = 16
STRANGER_PERIOD = timedelta(minutes=2)


@dataclass(slots=True)
class Action:
    """Who does what, from where, under which idempotency key.

    name: dotted, "identity.enrol". subject and gallery: filled in as they become known, so that a refusal's event names them.
    is_read: it is no action of its own; only refusals of access to it become events.
    """

    name: str
    caller: Caller | None
    request_id: str | None
    ip: str | None
    is_read: bool = False
    claim: IdempotencyClaim | None = None
    subject: Subject = field(default_factory=lambda: Subject(kind="none", id=None))
    gallery: str | None = None

    @property
    def actor_id(self) -> str:
        """The caller's id; "system" for what the service does by itself."""
        return self.caller.id if self.caller is not None else "system"


def by_system(name: str) -> Action:
    """An action that no caller asked for at this moment: a verdict, a sweep."""
    return Action(name=name, caller=None, request_id=None, ip=None)


def _event(action: Action, subject: Subject, outcome: Outcome, gallery: str | None, detail: Detail) -> AuditEvent:
    caller = action.caller
    anonymous = ActorRef(kind="system" if action.ip is None else "anonymous", id=None)
    name = None if caller is None else caller.name
    personal = Personal(salt=os.urandom(SALT_BYTES), actor_name=name, actor_ip=action.ip, request_id=action.request_id)
    return AuditEvent(
        time=now(),
        actor=anonymous if caller is None else ActorRef(kind=caller.kind, id=caller.id),
        personal=personal,
        action=action.name,
        subject=subject,
        outcome=outcome,
        gallery=gallery,
        detail=detail,
    )


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
    the event does not hold. If the event cannot be written, the action does not happen. Raises IdempotencyInProgress when
    another request took over the key.
    """
    event = _event(action, Subject(kind=subject_kind, id=subject_id), outcome, gallery, detail or {})
    await event.insert(session=session)
    if action.claim is not None:
        settled = session is not None and await action.claim.settle(session, event.id, status_code or 200, score)
        if not settled:
            raise IdempotencyInProgress(retry_after_seconds=1)
    return event


async def is_first_of_stranger(action: Action) -> bool:
    """Whether nobody unknown was refused the same from the same address in this minute."""
    minute = now().strftime("%Y-%m-%dT%H:%M")
    digest = hashlib.sha256(f"{action.name}|{action.ip}|{minute}".encode()).hexdigest()
    return await Once.is_first(f"stranger:{digest}", STRANGER_PERIOD)


async def refuse(action: Action, problem: Problem) -> None:
    """Record that the action was refused: denied for 401 and 403, a failure otherwise.

    Strangers without a valid token get one event per address and minute, so that they cannot fill the log.
    """
    outcome: Outcome = "denied" if problem.status in (401, 403) else "failure"
    if action.is_read and outcome != "denied":
        return
    if isinstance(problem, Unauthenticated) and action.caller is None and not await is_first_of_stranger(action):
        return
    detail: Detail = {"problem": problem.slug(), "status": problem.status}
    await _event(action, action.subject, outcome, action.gallery, detail).insert()
