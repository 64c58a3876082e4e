"""Erase: the data key is destroyed, the vectors leave every answer, the photos are deleted."""

from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, record
from app.documents.base import now
from app.documents.cases import Case, Pair
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Identity, Screening
from app.documents.scans import ScanPair
from app.errors import NotFound, NotReady
from app.runtime import Runtime
from storage.photos import PhotoStoreUnavailable

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was erased, and by when index files that held the vectors are gone."""

    identity_id: str
    erased_at: datetime
    samples: int
    photos: int
    audit_event_id: str
    index_purge_by: datetime


@dataclass(frozen=True, slots=True)
class _Erased:
    receipt: Receipt
    photo_keys: list[str]
    requeued: list[tuple[str, str]]


async def erase(runtime: Runtime, action: Action, gallery: Gallery, identity_id: str, reason: str | None) -> Receipt:
    """Erase someone: unmatchable on every process by the next query. Photos that the store cannot delete now are swept later."""

    async def commit(session: AsyncClientSession) -> _Erased:
        identity = await Identity.living(identity_id, session)
        if identity is None:
            raise NotFound
        moment = now()
        samples = len(identity.samples)
        seq = await gallery.take_seq(session, samples, identities=-1, samples=-samples, removed=samples)
        if seq is None:
            raise NotReady("The gallery changed its model or epoch in the meantime.")
        purge_by = moment + timedelta(hours=runtime.settings.index_purge_hours)
        await gallery.purge_files(session, [s.seq for s in identity.samples], purge_by)
        await _blank_changes(gallery.id, identity, seq, session)
        requeued = await _leave_cases(identity, session)
        await Pair.forget(identity.id, session)
        await ScanPair.forget(identity.id, session)
        gone: dict[str, object] = {
            "status": "erased", "samples": [], "screenings": [], "attributes": None, "external_ref_hash": None,
            "wrapped_key": None, "outbox_at": None, "erased_at": moment,
        }  # fmt: skip
        if not await identity.change(session, gone):
            raise NotReady("The identity was changed at the same moment.")
        event = await record(
            session, action, subject_kind="identity", subject_id=identity.id, gallery=gallery.name,
            detail={"samples": samples, "reason": reason},
        )  # fmt: skip
        return _Erased(receipt_of(runtime, event), [s.photo_key for s in identity.samples], requeued)

    erased = await runtime.in_line(gallery.id, commit)
    try:
        await runtime.photos.delete(erased.photo_keys)
    except PhotoStoreUnavailable:
        # Their key is gone, so they are noise already; the sweep of photos without a document takes them.
        log.warning("photos_left_to_the_sweep", identity=identity_id, count=len(erased.photo_keys))
    for newcomer_id, job_id in erased.requeued:
        await runtime.queue.enqueue_screening(newcomer_id, job_id, again=f":{erased.receipt.audit_event_id}")
    return erased.receipt


def receipt_of(runtime: Runtime, event: AuditEvent) -> Receipt:
    """The receipt that an erasure's event stands for: a repetition with its idempotency key gets the same again."""
    samples = int(event.detail["samples"] or 0)
    purge_by = event.time + timedelta(hours=runtime.settings.index_purge_hours)
    return Receipt(event.subject.id or "", event.time, samples, samples, event.id, purge_by)


async def _blank_changes(gallery_id: str, identity: Identity, seq: int, session: AsyncClientSession) -> None:
    """Blank the rows that brought the person in, and add the rows that take the vectors out of every process's memory."""
    mine = {"gallery_id": gallery_id, "identity_id": identity.id}
    blank = {"$set": {"kind": "blank", "identity_id": None, "sample_id": None}}
    await GalleryChange.get_pymongo_collection().update_many(mine, blank, session=session)
    removals = [
        GalleryChange(
            gallery_id=gallery_id,
            seq=seq + i,
            kind="remove",
            identity_id=identity.id,
            sample_id=sample.id,
            removes=sample.seq,
        )
        for i, sample in enumerate(identity.samples)
    ]
    if removals:
        await GalleryChange.insert_many(removals, session=session)


async def _leave_cases(identity: Identity, session: AsyncClientSession) -> list[tuple[str, str]]:
    """Close the open cases about the person; whoever was only suspected because of them is screened once more."""
    requeued = []
    for case in await Case.open_about(identity.id, session):
        if case.newcomer_id == identity.id:
            await case.close(session, "the newcomer was erased")
            continue
        newcomer = await Identity.living(case.newcomer_id, session)
        screening = None if newcomer is None else newcomer.screening(case.job_id)
        if newcomer is None or screening is None:  # a scan's case, about whoever else is in it
            if all(c.decision is not None or c.identity_id == identity.id for c in case.candidates):
                await case.close(session, "the last candidate was erased")
            continue
        await case.close(session, "a candidate was erased; the newcomer is screened again")
        again = Screening(job_id=screening.job_id, sample_ids=screening.sample_ids, due_at=now())
        fields: dict[str, object] = {"screenings": newcomer.with_screening(again), "outbox_at": again.due_at}
        if newcomer.status == "suspected_duplicate":
            fields["status"] = "pending"
        if not await newcomer.change(session, fields):
            raise NotReady("A newcomer was changed at the same moment.")
        requeued.append((newcomer.id, screening.job_id))
    return requeued
