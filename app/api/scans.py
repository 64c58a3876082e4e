"""Whole-gallery scans: every identity against every other, as a job with progress, pairs, clusters and cases."""

from collections.abc import Iterable
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field

from app.api import identities
from app.api.bodies import StrictRoute
from app.api.dependencies import (
    CurrentRuntime,
    IdempotencyKey,
    acting,
    first_answer,
    gallery_of,
    grant_of,
    visible_gallery,
)
from app.api.paging import Page, Paged, cursor_behind, position_of
from app.api.problems import problems
from app.api.shapes import Body, Moment
from app.audit import Action
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.scans import ClusterSummary, Scan, ScanPair, ScanState, contract_of, decisions_on
from app.domain.callers import Role
from app.domain.clusters import Link
from app.domain.policy import Decision, Status, margin_of
from app.errors import (
    Conflict,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    ModelMismatch,
    NotFound,
    NotReady,
)
from app.readings import note_reading
from app.runtime import Runtime
from app.use_cases import open_cases, scan

#: A part of app.api.dedup's router, which gives it the path before, its tags and the problems that all calls share.
router = APIRouter(route_class=StrictRoute, prefix="/scans")

#: A scan's pairs are counted up to here when it is shown; it ends before it has more.
MOST_COUNTED = scan.MOST_PAIRS + 1

Reading = Annotated[Action, Depends(acting("dedup.read", Role.OFFICER, is_read=True))]
PeopleReading = Annotated[Action, Depends(acting("scan.read", Role.OFFICER, is_read=True))]
Scanning = Annotated[Action, Depends(acting("dedup.scan", Role.OFFICER))]


class NewScan(Body):
    """What to scan. threshold: the gallery's own for de-duplication where it is left out."""

    gallery: str
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None


class ScanProgress(BaseModel):
    """Tiles that are behind it, and all of them."""

    done: int
    total: int


class ScanView(BaseModel):
    """A scan as a job.

    since_seq: what came up to here was compared by an earlier scan; upto_seq: what came later is not in it; pairs: pairs of
    identities found, as of a few seconds ago while it works; rate: pairs of vectors compared in a second; reason: why it failed.
    """

    id: str
    kind: Literal["scan"] = "scan"
    gallery: str
    state: ScanState
    progress: ScanProgress
    threshold: float
    since_seq: int
    upto_seq: int
    pairs: int
    rate: float | None
    seconds_left: float | None
    reason: str | None
    created_at: Moment
    created_by: str
    started_at: Moment | None
    finished_at: Moment | None


class PersonView(BaseModel):
    """Somebody of a pair or a cluster."""

    identity_id: str
    external_ref: str | None
    status: Status


class ScanPairView(BaseModel):
    """Two who look alike, the one who was enrolled earlier first; decision: what a person has said about them."""

    identities: tuple[PersonView, PersonView]
    score: float
    decision: Decision | None


class WeakLinkView(BaseModel):
    """A link that alone holds a cluster together, a little over the threshold: the place to look first."""

    identity_ids: tuple[str, str]
    score: float


class ClusterView(BaseModel):
    """Identities that hang together by pairs that nobody called distinct.

    identities: the first 200 of them; size: how many there are; links: how many such pairs there are.
    """

    identities: list[PersonView]
    size: int
    links: int
    weak_links: list[WeakLinkView]


class ClustersView(Paged[ClusterView]):
    """Clusters. as_of: later pairs and decisions are not in them; some minutes ago where the scan has many pairs."""

    as_of: Moment


class OpenedView(BaseModel):
    """opened: cases made now; existing: cases that were open already; decided: pairs that a person has decided."""

    opened: int
    existing: int
    decided: int


async def view(gallery: Gallery, known: Scan) -> ScanView:
    """The scan as a job."""
    return ScanView(
        id=known.id,
        gallery=gallery.name,
        state=known.state,
        progress=ScanProgress(done=known.done, total=known.total),
        threshold=known.threshold,
        since_seq=known.since_seq,
        upto_seq=known.upto_seq,
        pairs=await known.counted(MOST_COUNTED),
        rate=None if known.rate is None else round(known.rate),
        seconds_left=None if known.seconds_left is None else round(known.seconds_left, 1),
        reason=known.reason,
        created_at=known.created_at,
        created_by=known.created_by,
        started_at=known.started_at,
        finished_at=known.finished_at,
    )


async def _found(action: Action, scan_id: str) -> tuple[Gallery, Scan]:
    action.about("scan", scan_id)
    known = await Scan.seen(scan_id, grant_of(action))
    if known is None:
        raise NotFound
    return await gallery_of(action, known.gallery_id), known


@router.post(
    "",
    status_code=202,
    responses=problems(NotFound, ModelMismatch, IdempotencyInProgress, IdempotencyKeyReused),
)
async def start_scan(
    runtime: CurrentRuntime,
    request: Request,
    response: Response,
    body: NewScan,
    action: Scanning,
    key: IdempotencyKey = None,
) -> ScanView:
    """Compare everybody in the gallery with everybody else; after a first scan, what is new with everybody."""
    gallery = await visible_gallery(runtime, action, body.gallery)
    first = await first_answer(runtime, request, action, key, body.model_dump())
    if first is None:
        known = await scan.start(runtime, action, gallery, body.threshold)
    else:
        _, known = await _found(action, first[0].subject.id or "")
    response.headers["Location"] = f"/v1/dedup/scans/{known.id}"
    return await view(gallery, known)


@router.get("/{scan_id}", responses=problems(NotFound))
async def get_scan(scan_id: str, action: Reading) -> ScanView:
    """How far it has come, how fast it goes, how long it will take."""
    return await view(*await _found(action, scan_id))


@router.get("/{scan_id}/pairs", responses=problems(NotFound))
async def list_pairs(
    runtime: CurrentRuntime, request: Request, scan_id: str, action: PeopleReading, page: Annotated[Page, Depends()]
) -> Paged[ScanPairView]:
    """The pairs found so far, the best score first."""
    gallery, known = await _found(action, scan_id)
    found = await ScanPair.best_of(known, page.limit + 1, position_of(runtime.keys, request, page, float))
    items = found[: page.limit]
    people = await _people(runtime, gallery, (id_ for pair in items for id_ in (pair.low, pair.high)))
    decisions = await decisions_on(
        [Link(pair.low, pair.high, pair.score) for pair in items],
        contract_of(known, gallery),
        margin_of(runtime.engine.card),
    )
    views = []
    for pair in items:
        if pair.low not in people or pair.high not in people:
            continue  # erased since the page was read
        earlier, later = sorted((people[pair.low], people[pair.high]), key=lambda person: person[0])
        both = (earlier[1], later[1])
        decision = decisions.get((pair.low, pair.high))
        views.append(ScanPairView(identities=both, score=pair.score, decision=decision))
    is_more = len(found) > page.limit
    cursor = cursor_behind(runtime.keys, request, items[-1].score, items[-1].id) if is_more else None
    await _note(runtime, action, gallery, people, "pairs")
    return Paged(items=views, next_cursor=cursor)


@router.get("/{scan_id}/clusters", responses=problems(NotFound, Conflict, NotReady))
async def list_clusters(
    runtime: CurrentRuntime, request: Request, scan_id: str, action: PeopleReading, page: Annotated[Page, Depends()]
) -> ClustersView:
    """Who hangs together, the largest cluster first, with the links to doubt.

    Of a scan with more than 20,000 pairs they are made by a worker: 409 before it has ended, 503 until they are there, and
    decisions show in them some minutes later.
    """
    gallery, known = await _found(action, scan_id)
    found = await scan.clusters_behind(runtime, known, position_of(runtime.keys, request, page, int), page.limit)
    ids = {id_ for one in found.items for id_ in (*one.members, *(end for link in one.weak for end in link[:2]))}
    people = {id_: person for id_, (_, person) in (await _people(runtime, gallery, ids)).items()}
    views = [_cluster(cluster, people) for cluster in found.items]
    cursor = cursor_behind(runtime.keys, request, *found.items[-1].place) if found.is_more else None
    await _note(runtime, action, gallery, people, "clusters")
    # Whoever was erased since they were made is not shown, nor whom that leaves alone.
    return ClustersView(items=[one for one in views if one.size > 1], next_cursor=cursor, as_of=found.as_of)


def _cluster(cluster: ClusterSummary, people: dict[str, PersonView]) -> ClusterView:
    gone = sum(id_ not in people for id_ in cluster.members)
    return ClusterView(
        identities=[people[id_] for id_ in cluster.members if id_ in people],
        size=cluster.size - gone,
        links=cluster.links,
        weak_links=[
            WeakLinkView(identity_ids=link[:2], score=link.score)
            for link in cluster.weak
            if link.low in people and link.high in people
        ],
    )


@router.post("/{scan_id}/cases", responses=problems(NotFound))
async def open_scan_cases(
    runtime: CurrentRuntime, request: Request, scan_id: str, action: Scanning, key: IdempotencyKey = None
) -> OpenedView:
    """Put the pairs that nobody has decided before a person: a case about each later-enrolled one. May be repeated."""
    gallery, known = await _found(action, scan_id)
    first = await first_answer(runtime, request, action, key, None)
    if first is not None:
        return OpenedView.model_validate(first[0].detail)
    opened = await open_cases.open_cases(runtime, action, gallery, known)
    return OpenedView(opened=opened.opened, existing=opened.existing, decided=opened.decided)


@router.post("/{scan_id}/pause", responses=problems(NotFound, Conflict))
async def pause_scan(
    runtime: CurrentRuntime, request: Request, scan_id: str, action: Scanning, key: IdempotencyKey = None
) -> ScanView:
    """Stop for now, after the tile that is counted last. 409 when it is neither queued nor running."""
    gallery, known = await _found(action, scan_id)
    if await first_answer(runtime, request, action, key, None) is None:
        known = await scan.pause(runtime, action, gallery, scan_id)
    return await view(gallery, known)


@router.post("/{scan_id}/resume", responses=problems(NotFound, Conflict))
async def resume_scan(
    runtime: CurrentRuntime, request: Request, scan_id: str, action: Scanning, key: IdempotencyKey = None
) -> ScanView:
    """Go on where it was paused. 409 when it is not paused."""
    gallery, known = await _found(action, scan_id)
    if await first_answer(runtime, request, action, key, None) is None:
        known = await scan.resume(runtime, action, gallery, scan_id)
    return await view(gallery, known)


@router.post("/{scan_id}/cancel", responses=problems(NotFound, Conflict))
async def cancel_scan(
    runtime: CurrentRuntime, request: Request, scan_id: str, action: Scanning, key: IdempotencyKey = None
) -> ScanView:
    """End it here; what it found stays. 409 when it has ended."""
    gallery, known = await _found(action, scan_id)
    if await first_answer(runtime, request, action, key, None) is None:
        known = await scan.cancel(runtime, action, gallery, scan_id)
    return await view(gallery, known)


async def _note(runtime: Runtime, action: Action, gallery: Gallery, people: Iterable[str], what: str) -> None:
    """Note that the caller is shown these people."""
    if shown := dict.fromkeys(people, gallery.name):
        await note_reading(runtime, action, shown, {"shown": what})


async def _people(runtime: Runtime, gallery: Gallery, ids: Iterable[str]) -> dict[str, tuple[int, PersonView]]:
    """Those of the ids that are not erased, each with the number of its enrolment."""
    living = await Identity.living_among(sorted(set(ids)))

    def shown(identity: Identity) -> PersonView:
        page = identities.view(runtime, gallery, identity)
        return PersonView(identity_id=page.id, external_ref=page.external_ref, status=page.status)

    return {id_: (identity.enrol_seq, shown(identity)) for id_, identity in living.items()}
