"""Readings: an event records each answer that shows people's attributes, before the answer is sent.

A caller who reads many people raises an alarm. See docs/adr/0049-reads-are-events.md.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

import structlog
from prometheus_client import Counter as Metric
from pymongo.errors import PyMongoError

from app.audit import Action, by_system, record
from app.documents.budgets import PeopleRead
from app.documents.events import Detail, Scalar, Subject
from app.documents.identities import Identity
from app.errors import AuditRefused
from app.runtime import Runtime

log = structlog.get_logger(__name__)

ALARMS = Metric(
    "idem_bulk_reading_alarms", "Times that one caller read PEOPLE_READ_ALARM_PER_HOUR people within an hour"
)


async def note_reading(
    runtime: Runtime,
    action: Action,
    people: Mapping[str, str],
    detail: Detail | None = None,
    *,
    identity_id: str | None = None,
) -> None:
    """Record that the caller is shown these people. Raises AuditRefused if the log cannot record it: then do not answer.

    people: the name of the gallery, by the id of the identity. detail: more details for the event. identity_id: the subject of
    the event. None: the subject of the action.
    """
    galleries = Counter(people.values())
    told: Detail = {"people": len(people), **(detail or {})}
    if len(galleries) > 1:
        counted: dict[str, Scalar] = {**galleries}
        told["galleries"] = counted
    (gallery,) = galleries if len(galleries) == 1 else (action.gallery,)
    about = action.subject if identity_id is None else Subject(kind="identity", id=identity_id)
    await record(None, action, subject_kind=about.kind, subject_id=about.id, gallery=gallery, detail=told)
    await count_people(runtime, action, people)


async def note_answer(runtime: Runtime, action: Action, gallery_name: str, identity: Identity) -> None:
    """Note that one identity is shown. If the caller's action has its own event, the person is only counted.

    A caller who has just enrolled the person asks for the verdict, and sees what they sent themselves. That is neither
    recorded nor counted.
    """
    is_own_news = action.is_read and identity.status == "pending" and identity.created_by == action.actor_id
    if is_own_news or (action.is_recorded and action.name == "identity.enrol"):
        return
    if action.is_recorded:
        await count_people(runtime, action, [identity.id])
        return
    # A repetition with an idempotency key changes nothing, but it shows the person.
    detail: Detail = {} if action.is_read else {"answer_to": action.name}
    reading = replace(action, name="identity.read")
    await note_reading(runtime, reading, {identity.id: gallery_name}, detail, identity_id=identity.id)


async def count_people(runtime: Runtime, action: Action, identity_ids: Collection[str]) -> None:
    """Count the people that the caller is shown.

    PEOPLE_READ_ALARM_PER_HOUR different people within an hour raise an alarm, once an hour.
    """
    caller, alarm = action.caller, runtime.settings.people_read_alarm_per_hour
    if caller is None or not identity_ids:
        return
    try:
        if not await PeopleRead.reaches(runtime.keys, caller.id, identity_ids, alarm):
            return
        ALARMS.inc()
        log.warning("bulk_reading_alarm", caller=caller.id, people=alarm)
        await record(
            None, by_system("identity.bulk_read"), subject_kind=caller.kind, subject_id=caller.id,
            detail={"people": alarm},
        )  # fmt: skip
    except (PyMongoError, AuditRefused) as failure:  # the action is recorded; only its count is lost
        log.warning("reading_not_counted", caller=caller.id, error=type(failure).__name__)
