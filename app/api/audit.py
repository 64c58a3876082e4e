"""The audit log: listed, filtered, exported."""

import csv
import io
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from app.api.dependencies import CurrentRuntime, acting
from app.api.paging import Page, Paged, page_of
from app.api.problems import problems
from app.api.shapes import Moment
from app.audit import Action, record
from app.documents.events import AuditEvent, Detail, Outcome
from app.domain.callers import Role
from app.errors import Forbidden, NotFound, NotImplementedYet, Unauthenticated, Validation

router = APIRouter(prefix="/v1/audit", tags=["audit"], responses=problems(Unauthenticated, Forbidden, Validation))

Reading = Annotated[Action, Depends(acting("audit.read", Role.AUDITOR, Role.ADMIN, is_read=True))]

EXPORT_BATCH = 500
#: What a sheet would take for a formula when a cell begins with it.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


class ActorView(BaseModel):
    """Who acted."""

    kind: Literal["user", "client", "system", "anonymous"]
    id: str | None
    name: str | None
    ip: str | None


class SubjectView(BaseModel):
    """What it was about."""

    kind: str
    id: str | None


class EventView(BaseModel):
    """One event."""

    id: str
    seq: int | None
    time: Moment
    actor: ActorView
    action: str
    subject: SubjectView
    outcome: Outcome
    gallery: str | None
    request_id: str | None
    detail: Detail
    leaf_hash: str | None


def _view(event: AuditEvent) -> EventView:
    personal = event.personal
    return EventView(
        id=event.id,
        seq=event.seq,
        time=event.time,
        actor=ActorView(
            kind=event.actor.kind,
            id=event.actor.id,
            name=None if personal is None else personal.actor_name,
            ip=None if personal is None else personal.actor_ip,
        ),
        action=event.action,
        subject=SubjectView(kind=event.subject.kind, id=event.subject.id),
        outcome=event.outcome,
        gallery=event.gallery,
        request_id=None if personal is None else personal.request_id,
        detail=event.detail,
        leaf_hash=event.leaf_hash,
    )


def _within(action: Action, after: Moment | None, before: Moment | None, gallery: str | None = None) -> dict[str, Any]:
    """Filters by time (half-open) and gallery; a caller bound to galleries sees their events only."""
    filters: dict[str, Any] = {}
    times = {name: moment for name, moment in {"$gte": after, "$lt": before}.items() if moment is not None}
    if times:
        filters["time"] = times
    allowed = None if action.caller is None else action.caller.galleries
    if gallery is not None:
        if action.caller is None or not action.caller.may_see(gallery):
            raise NotFound
        filters["gallery"] = gallery
    elif allowed is not None:
        filters["gallery"] = {"$in": list(allowed)}
    return filters


@router.get("/events")
async def list_events(
    runtime: CurrentRuntime,
    request: Request,
    action: Reading,
    page: Annotated[Page, Depends()],
    actor: Annotated[str | None, Query(max_length=128)] = None,
    event_action: Annotated[str | None, Query(alias="action", max_length=64)] = None,
    subject: Annotated[str | None, Query(max_length=128)] = None,
    outcome: Outcome | None = None,
    after: Moment | None = None,
    before: Moment | None = None,
    gallery: str | None = None,
) -> Paged[EventView]:
    """Events, the newest first. `actor` and `subject` are ids."""
    filters = _within(action, after, before, gallery)
    named = {"actor.id": actor, "action": event_action, "subject.id": subject, "outcome": outcome}
    filters |= {name: value for name, value in named.items() if value is not None}
    items, cursor = await page_of(AuditEvent, filters, page, request, runtime.keys, by="time")
    return Paged(items=[_view(event) for event in items], next_cursor=cursor)


@router.get("/events/{event}", responses=problems(NotFound))
async def get_event(event: str, action: Reading) -> EventView:
    """One event, by its id or its number in the tree."""
    named = {"seq": int(event)} if event.isdecimal() and len(event) < 19 else {"_id": event}  # noqa: PLR2004 - int64
    found = await AuditEvent.find_one({**named, **_within(action, None, None)})
    if found is None:
        raise NotFound
    return _view(found)


@router.get("/export", response_class=StreamingResponse)
async def export_events(
    action: Annotated[Action, Depends(acting("audit.export", Role.AUDITOR, Role.ADMIN))],
    after: Moment | None = None,
    before: Moment | None = None,
    form: Annotated[Literal["ndjson", "csv"], Query(alias="format")] = "ndjson",
) -> StreamingResponse:
    """All events of a time, the oldest first, as a stream."""
    filters = _within(action, after, before)
    await record(None, action, subject_kind="audit", subject_id=None, detail={"format": form})
    kind = "application/x-ndjson" if form == "ndjson" else "text/csv; charset=utf-8"
    headers = {"Content-Disposition": f'attachment; filename="audit.{form}"', "Cache-Control": "no-store"}
    return StreamingResponse(_lines(filters, form), media_type=kind, headers=headers)


async def _lines(filters: dict[str, Any], form: Literal["ndjson", "csv"]) -> AsyncIterator[str]:
    """Read in batches by (time, id), so that no cursor stays open while a slow reader takes its time."""
    if form == "csv":
        yield _row(list(EventView.model_fields))
    beyond: dict[str, Any] = {}
    while True:
        conditions = [part for part in (filters, beyond) if part]
        query = AuditEvent.find({"$and": conditions} if conditions else {})
        events = await query.sort("+time", "+_id").limit(EXPORT_BATCH).to_list()
        for event in events:
            line = _view(event).model_dump(mode="json")
            yield json.dumps(line, ensure_ascii=False) + "\n" if form == "ndjson" else _row(list(line.values()))
        if len(events) < EXPORT_BATCH:
            return
        last = events[-1]
        beyond = {"$or": [{"time": {"$gt": last.time}}, {"time": last.time, "_id": {"$gt": last.id}}]}


def _row(values: list[Any]) -> str:
    """One CSV line; cells that a sheet would run are defused with an apostrophe."""
    cells = [json.dumps(v, ensure_ascii=False) if isinstance(v, dict) else "" if v is None else str(v) for v in values]
    safe = [f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell for cell in cells]
    line = io.StringIO()
    csv.writer(line).writerow(safe)
    return line.getvalue()


@router.get("/checkpoint", status_code=501, responses=problems(NotImplementedYet))
@router.get("/proofs/inclusion", status_code=501, responses=problems(NotImplementedYet))
@router.get("/proofs/consistency", status_code=501, responses=problems(NotImplementedYet))
async def prove(action: Reading) -> None:
    """Signed tree heads and proofs that nothing was changed, removed or cut off."""
    raise NotImplementedYet("Proofs over the log are not built yet.")
