"""The audit log: listed, filtered, exported, and proved."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from prometheus_client import Gauge
from pydantic import BaseModel, Field

from app.api.dependencies import CurrentRuntime, acting
from app.api.paging import Page, Paged, page_of
from app.api.problems import problems
from app.api.shapes import Moment
from app.audit import Action, record
from app.config import Settings
from app.documents.base import now
from app.documents.events import AuditEvent, Detail, Outcome
from app.documents.galleries import Gallery
from app.documents.tree import AuditKey, AuditTree, TreeHead, node_hashes, proof
from app.domain.actions import ACTIONS
from app.domain.callers import Role
from app.domain.log_export import Form, Json, Line, encoded, heading, without_events
from app.domain.merkle import consistency_path, inclusion_path, subtrees
from app.errors import Advice, Forbidden, NotFound, NotReady, Unauthenticated, Validation
from app.runtime import Runtime
from app.use_cases.sequence import head_over, sign

router = APIRouter(prefix="/v1/audit", tags=["audit"], responses=problems(Unauthenticated, Forbidden, Validation))

Reading = Annotated[Action, Depends(acting("audit.read", Role.AUDITOR, Role.ADMIN, is_read=True))]

EVENTS = Gauge("idem_audit_events", "Events in the Merkle tree")
UNNUMBERED = Gauge("idem_audit_events_unnumbered", "Events that are not in the Merkle tree yet (counted up to 10,000)")
UNDELIVERED = Gauge(
    "idem_audit_heads_undelivered", "Signed tree heads that should be in the evidence store, and are not"
)
COUNTED_AT_MOST: Final = 10_000

EXPORT_BATCH: Final = 500
#: Beyond this no number fits into what MongoDB counts with.
LARGEST: Final = 2**62


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
    """One event. Names and addresses are shown while they are kept; after that their keyed hashes stand there."""

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


class HeadView(BaseModel):
    """A signed tree head; hashes, and the Ed25519 signature, in hex."""

    size: int
    root_hash: str
    time: str
    key_id: str
    signature: str


class InclusionView(BaseModel):
    """RFC 9162's proof that an event is in the tree of that size; the root comes from a signed head."""

    leaf_index: int
    size: int
    path: list[str]


class ConsistencyView(BaseModel):
    """RFC 9162's proof that the smaller tree is the beginning of the larger one."""

    start: Annotated[int, Field(alias="from")]
    to: int
    path: list[str]


class KeyView(BaseModel):
    """A key that signs tree heads, or did: its raw 32 bytes in hex."""

    key_id: str
    public_key: str
    created_at: Moment
    retired_at: Moment | None


class KeysView(BaseModel):
    """All of them, the newest first."""

    keys: list[KeyView]


def _view(event: AuditEvent) -> EventView:
    return EventView.model_validate(event.shown())


def _head_view(head: TreeHead) -> HeadView:
    return HeadView.model_validate(head.head, from_attributes=True)


async def _within(
    action: Action, after: Moment | None, before: Moment | None, gallery: str | None = None
) -> dict[str, Any]:
    """Filters by time (half-open) and gallery; a caller bound to galleries sees their events only.

    Events name their gallery. So an event from before a gallery was made is that of a former gallery of the same name.
    """
    filters: dict[str, Any] = {}
    times = {name: moment for name, moment in {"$gte": after, "$lt": before}.items() if moment is not None}
    if times:
        filters["time"] = times
    allowed = () if action.caller is None else action.caller.galleries
    if allowed is None:
        return filters if gallery is None else filters | {"gallery": gallery}
    made = await Gallery.made(allowed)
    if gallery is not None and gallery not in made:
        raise NotFound
    names = made if gallery is None else [gallery]
    since = [{"gallery": name, "time": {"$gte": made[name]}} for name in names]
    if not since:
        return filters | {"gallery": {"$in": []}}
    return filters | {"$or": since}


@router.get("/events", responses=problems(NotFound))
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
    if event_action is not None and event_action not in ACTIONS:
        message = "No event has this action."
        raise Validation(message, errors=(Advice("action", "unknown", message),))
    filters = await _within(action, after, before, gallery)
    named = {"actor.id": actor, "action": event_action, "subject.id": subject, "outcome": outcome}
    filters |= {name: value for name, value in named.items() if value is not None}
    items, cursor = await page_of(AuditEvent, filters, page, request, runtime.keys, by="time")
    return Paged(items=[_view(event) for event in items], next_cursor=cursor)


@router.get("/events/{event}", responses=problems(NotFound))
async def get_event(event: str, action: Reading) -> EventView:
    """One event, by its id or its number in the tree."""
    named = {"seq": int(event)} if event.isdecimal() and len(event) < 19 else {"_id": event}  # noqa: PLR2004 - int64
    found = await AuditEvent.find_one({**named, **await _within(action, None, None)})
    if found is None:
        raise NotFound
    return _view(found)


@router.get("/export", response_class=StreamingResponse, responses=problems(NotReady))
async def export_events(
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("audit.export", Role.AUDITOR, Role.ADMIN))],
    after: Moment | None = None,
    before: Moment | None = None,
    form: Annotated[Form, Query(alias="format")] = "ndjson",
) -> StreamingResponse:
    """The events of a time as a stream, in the order of their numbers, with what proves offline that they are as they were.

    It holds everything that was committed before the request, and ends with a signed tree head. Events that are left out (of
    another time, of galleries that the caller may not see) are stood for by hashes. Where no event fits there is one line, null
    in every field but `end`.
    """
    filters = await _within(action, after, before)
    event = await record(None, action, subject_kind="audit", subject_id=None, detail={"format": form})
    head = await head_over(runtime, event.id)
    kind = "application/x-ndjson" if form == "ndjson" else "text/csv; charset=utf-8"
    headers = {"Content-Disposition": f'attachment; filename="audit.{form}"', "Cache-Control": "no-store"}
    return StreamingResponse(_lines(filters, head, form), media_type=kind, headers=headers)


async def _lines(filters: dict[str, Any], head: TreeHead, form: Form) -> AsyncIterator[bytes]:
    """Read in batches by number, so that no cursor stays open while a slow reader takes its time."""
    yield heading(form)
    last: Line | None = None
    async for line in _exported(filters, head.size):
        if last is not None:
            yield encoded(last, form)
        last = line
    number = -1 if last is None else last["seq"]
    assert isinstance(number, int)  # noqa: S101 - of an event in the tree
    rest = list(subtrees(number + 1, head.size))
    hashes = await node_hashes(rest)
    end: Json = {"head": head.head.as_json(), "skipped": [hashes[node].hex() for node in rest]}
    yield encoded(without_events(end) if last is None else last | {"end": end}, form)


async def _exported(filters: dict[str, Any], size: int) -> AsyncIterator[Line]:
    beyond, stop = -1, size
    if "time" in filters:
        # Times are nearly in the order of numbers; without these bounds all numbers would be looked through.
        bounds = {"$group": {"_id": None, "first": {"$min": "$seq"}, "last": {"$max": "$seq"}}}
        rows = await (await AuditEvent.get_pymongo_collection().aggregate([{"$match": filters}, bounds])).to_list()
        if not rows or rows[0]["first"] is None:
            return
        beyond, stop = rows[0]["first"] - 1, min(size, rows[0]["last"] + 1)
    before = 0
    while True:
        query = AuditEvent.find({**filters, "seq": {"$gt": beyond, "$lt": stop}})
        events = await query.sort("+seq").limit(EXPORT_BATCH).to_list()
        numbers = [event.seq for event in events if event.seq is not None]
        starts = [before, *(number + 1 for number in numbers)]
        skipped = [list(subtrees(start, number)) for start, number in zip(starts, numbers, strict=False)]
        hashes = await node_hashes([node for nodes in skipped for node in nodes])
        for event, nodes in zip(events, skipped, strict=True):
            yield event.exported() | {"skipped": [hashes[node].hex() for node in nodes]}
        if len(events) < EXPORT_BATCH:
            return
        beyond, before = numbers[-1], numbers[-1] + 1


@router.get("/checkpoint")
async def get_checkpoint(runtime: CurrentRuntime, action: Reading) -> HeadView:
    """The newest signed tree head. An empty log has one too: of size 0, its root SHA-256 of nothing."""
    return _head_view(await TreeHead.newest() or await sign(runtime))


@router.get("/keys")
async def get_keys(action: Reading) -> KeysView:
    """The public keys of tree heads, replaced ones too. Ask for them once, and keep them where nobody here can reach them."""
    keys = await AuditKey.find_all().sort("-created_at").to_list()
    return KeysView(
        keys=[
            KeyView(key_id=k.id, public_key=k.public.hex(), created_at=k.created_at, retired_at=k.retired_at)
            for k in keys
        ]
    )


Size = Annotated[int | None, Query(ge=0, le=LARGEST)]


@router.get("/proofs/inclusion", responses=problems(NotFound))
async def prove_inclusion(
    runtime: CurrentRuntime, action: Reading, seq: Annotated[int, Query(ge=0, le=LARGEST)], size: Size = None
) -> InclusionView:
    """That event `seq` (the first is 0) is in the tree of `size` events; by default the size of the newest signed head."""
    tree = await AuditTree.current()
    if seq >= tree.size:
        raise NotFound(f"No event has the number {seq} yet.")
    size = await _signed_size(runtime, seq + 1) if size is None else size
    if not seq < size <= tree.size:
        raise _unfit("size", f"With this event the tree had {seq + 1} to {tree.size} events.")
    path = await proof(inclusion_path(seq, size))
    return InclusionView(leaf_index=seq, size=size, path=[hash_.hex() for hash_ in path])


@router.get("/proofs/consistency")
async def prove_consistency(
    runtime: CurrentRuntime,
    action: Reading,
    start: Annotated[int, Query(alias="from", ge=0, le=LARGEST)],
    to: Size = None,
) -> ConsistencyView:
    """That the tree of `from` events is the beginning of the one of `to`; by default the size of the newest signed head."""
    tree = await AuditTree.current()
    if start > tree.size:
        raise _unfit("from", f"The tree has {tree.size} events.")
    to = await _signed_size(runtime, start) if to is None else to
    if not start <= to <= tree.size:
        raise _unfit("to", f"From {start} to {tree.size}, please.")
    path = await proof(consistency_path(start, to))
    return ConsistencyView.model_validate({"from": start, "to": to, "path": [hash_.hex() for hash_ in path]})


async def _signed_size(runtime: Runtime, least: int) -> int:
    """The size of the newest signed head that is over so many events."""
    newest = await TreeHead.newest()
    return (newest if newest is not None and newest.size >= least else await sign(runtime)).size


async def refresh_figures(settings: Settings) -> None:
    """Ask the store how the log is doing; the same figures in every process."""
    EVENTS.set((await AuditTree.current()).size)
    waiting = {"seq": {"$type": "null"}}
    UNNUMBERED.set(await AuditEvent.get_pymongo_collection().count_documents(waiting, limit=COUNTED_AT_MOST))
    UNDELIVERED.set(await TreeHead.waiting(now() - timedelta(seconds=2 * settings.audit_checkpoint_seconds)))


def _unfit(field: str, message: str) -> Validation:
    return Validation(message, errors=(Advice(field, "out_of_range", message),))
