"""Erase: the data key is destroyed, the vectors leave every answer, the photos are deleted.

One transaction makes a person unmatchable and unreadable, and enters the erasure into the ledger. What other stores have to do
follows at once, or is done by a sweep where one of them is away. See docs/adr/0032.
"""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog
from prometheus_client import Counter, Gauge
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from app.audit import Action, Typed, by_system, record
from app.documents.base import now
from app.documents.budgets import Erasures
from app.documents.cases import Case, Pair
from app.documents.deletions import Deletion
from app.documents.events import AuditEvent, Detail
from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Attempts, Identity, Screening
from app.documents.probes import Probe
from app.documents.proposals import IdentityProposal
from app.documents.renewals import Renewal
from app.documents.scans import ScanPair
from app.errors import DependencyUnavailable, NotFound, NotReady
from app.runtime import Runtime
from app.second_officer import Wanted, agree, propose
from storage.evidence import EvidenceExists, EvidenceUnavailable
from storage.photos import PhotoStoreUnavailable

log = structlog.get_logger(__name__)

#: How long an erasure's answer waits for photos and ledger; what is not done by then is swept.
SETTLE_SECONDS: Final = 2.0
#: An erasure that is younger is still being settled by whoever made it.
SETTLE_GRACE: Final = timedelta(seconds=30)
#: Of each gallery, in one sweep: enrolments wait in the same line.
ERASED_AT_ONCE: Final = 500
SETTLED_AT_ONCE: Final = 500
#: From then on it is no passing trouble, and somebody must look.
LATE: Final = timedelta(hours=24)

UNSETTLED = Gauge(
    "idem_erasures_unsettled", "Erasures whose photos or ledger line are not settled yet, at the last sweep"
)

ALARMS = Counter(
    "idem_erasure_alarms", "Times that one officer's erasures within an hour reached ERASURES_ALARM_PER_HOUR"
)


class _NotYet(Exception):
    """The retention time of this person is not over, by MongoDB's clock."""


@dataclass(frozen=True, slots=True)
class Remainder:
    """Something that stays for a while. until: None where no clock ends it; `note` says what does."""

    what: str
    until: datetime | None
    note: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was erased, and what remains until when. text: the same, signed; None of an erasure that a backup brought along."""

    identity_id: str
    erased_at: datetime
    samples: int
    photos: int
    audit_event_id: str
    index_purge_by: datetime
    remains: tuple[Remainder, ...]
    text: str | None


@dataclass(frozen=True, slots=True)
class _Gone:
    """What an erasure's transaction took."""

    event: AuditEvent
    samples: int
    purge_by: datetime
    photo_keys: list[str]
    requeued: list[tuple[str, str]]


async def ask(
    runtime: Runtime, action: Action, gallery: Gallery, identity_id: str, reason: str
) -> Receipt | IdentityProposal:
    """Erase someone for an officer. If the gallery asks for two officers, propose the erasure."""
    if not gallery.policy.second_review:
        return await erase(runtime, action, gallery, identity_id, reason)

    async def commit(session: AsyncClientSession) -> IdentityProposal:
        identity = await Identity.living(identity_id, session)
        if identity is None:
            raise NotFound
        return await propose(session, action, gallery, identity, Wanted("erasure", reason))

    return await runtime.transaction(commit)


async def erase(
    runtime: Runtime,
    action: Action,
    gallery: Gallery,
    identity_id: str,
    reason: str | None,
    *,
    kept_for: timedelta | None = None,
    proposal: IdentityProposal | None = None,
) -> Receipt:
    """Erase someone: unmatchable on every process by the next query. What a store cannot do now is swept later.

    kept_for: the time that must have passed since the enrolment, by MongoDB's clock at the moment of the erasure. proposal: the
    actor agrees to this proposal. Raises NotFound, NotReady, _NotYet before that time is over, and as `second_officer.agree`
    does.
    """

    async def commit(session: AsyncClientSession) -> tuple[Deletion, _Gone]:
        # By MongoDB's clock, in the transaction that erases: a wrong clock of a process must not delete a person's key.
        if kept_for is not None and not await Identity.is_older(identity_id, kept_for, session):
            raise _NotYet
        told: Detail = {} if proposal is None else await agree(session, action, proposal)
        told["reason"] = reason if action.caller is None else Typed.of(reason)
        gone = await _take(runtime, action, gallery, identity_id, told, session)
        deletion = Deletion(
            id=identity_id, gallery_id=gallery.id, erased_at=gone.event.time, event_id=gone.event.id, samples=gone.samples,
            index_purge_by=gone.purge_by, photo_keys=gone.photo_keys, unsettled_since=gone.event.time,
            plain_texts=plain_texts,
        )  # fmt: skip
        deletion.receipt = _signed(runtime, gallery, deletion)
        await deletion.insert(session=session)
        return deletion, gone

    plain_texts = await AuditEvent.has_plain_texts([identity_id, *await Case.ids_about(identity_id)])
    deletion, gone = await runtime.in_line(gallery.id, commit)
    await _afterwards(runtime, deletion, gone)
    if action.caller is not None:
        await _count(runtime, {action.actor_id, action.actor_id if proposal is None else proposal.proposed_by})
    return receipt_of(deletion)


async def _count(runtime: Runtime, officers: set[str]) -> None:
    """Count the erasure for each of its officers. At each multiple of ERASURES_ALARM_PER_HOUR within an hour, raise an alarm."""
    alarm = runtime.settings.erasures_alarm_per_hour
    for officer in sorted(officers):
        try:
            erasures = await Erasures.add(runtime.keys, officer)
            if erasures % alarm:
                continue
            ALARMS.inc()
            log.warning("erasures_alarm", caller=officer, erasures=erasures)
            await record(
                None, by_system("identity.erase.alarm"), subject_kind="caller", subject_id=officer,
                detail={"erasures": erasures},
            )  # fmt: skip
        except PyMongoError as failure:  # the erasure is done: only its count is lost
            log.warning("erasure_not_counted", caller=officer, error=type(failure).__name__)


async def receipt_of_event(event: AuditEvent) -> Receipt:
    """The receipt that an erasure's event stands for: a repetition with its idempotency key gets the same again.

    Raises NotFound.
    """
    deletion = await Deletion.get(event.subject.id)
    if deletion is None:
        raise NotFound
    return receipt_of(deletion)


def receipt_of(deletion: Deletion) -> Receipt:
    """The receipt of an erasure that the ledger holds."""
    purge_by = deletion.index_purge_by or deletion.erased_at
    return Receipt(
        deletion.id, deletion.erased_at, deletion.samples, deletion.samples, deletion.event_id, purge_by,
        _remains(deletion, purge_by), deletion.receipt,
    )  # fmt: skip


async def erase_again(runtime: Runtime, deletion: Deletion) -> bool:
    """Carry out an erasure of the ledger once more: a restored backup is older than it. False when nothing was left to erase.

    The ledger's entry stays as it was, or is entered anew. Safe to do twice, and for somebody whom the backup never knew.
    """
    identity = await Identity.living(deletion.id)
    gallery = None if identity is None else await Gallery.get(identity.gallery_id)
    if gallery is None:
        await _enter(deletion, None)
        return False

    async def commit(session: AsyncClientSession) -> _Gone | None:
        try:
            gone = await _take(
                runtime,
                by_system("identity.erase"),
                gallery,
                deletion.id,
                {"reason": "the ledger of erasures"},
                session,
            )
        except NotFound:  # another process was quicker
            return None
        # A backup does not know of the photos that came after it.
        keys = sorted({*deletion.photo_keys, *gone.photo_keys})
        left = {"photo_keys": keys, "unsettled_since": now(), "index_purge_by": gone.purge_by}
        await _enter(deletion.model_copy(update=left), session)
        return gone

    gone = await runtime.in_line(gallery.id, commit)
    known = await Deletion.get(deletion.id)
    if gone is None or known is None:
        return False
    await _afterwards(runtime, known, gone)
    return True


async def erase_expired(runtime: Runtime) -> int:
    """Erase the people whose retention time is over. Returns how many. A large number takes several sweeps.

    Erases no one while this host's clock and MongoDB's differ, and for a day after MongoDB's was set: any of them may be wrong.
    """
    await runtime.clock.measure(runtime.mongo)
    erased = 0
    not_held = {"$or": [{"retention_held_until": None}, {"retention_held_until": {"$lt": now()}}]}
    async for gallery in Gallery.find({"policy.retention_days": {"$ne": None}, **not_held}):
        kept_for = timedelta(days=gallery.policy.retention_days or 0)
        for identity_id in await Identity.kept_since_before(gallery.id, now() - kept_for, ERASED_AT_ONCE):
            if not runtime.clock.may_erase:
                log.error("retention_waits_for_the_clock", **runtime.clock.why_not)
                return erased
            fresh = await Gallery.get(gallery.id)
            if fresh is None or fresh.policy.retention_days != gallery.policy.retention_days:
                break  # an admin removed or changed the retention time
            try:
                await erase(runtime, by_system("identity.erase"), gallery, identity_id, "retention", kept_for=kept_for)
            except (NotFound, _NotYet):  # already erased at the same time, or still kept
                continue
            except (PyMongoError, DependencyUnavailable):
                raise
            except Exception:  # one person's trouble is no reason to keep the others
                log.exception("retention_not_kept", identity=identity_id)
                continue
            erased += 1
    if erased:
        log.info("retention_kept", erased=erased)
    return erased


async def settle_overdue(runtime: Runtime) -> int:
    """Do what the stores could not do when somebody was erased; how many erasures are settled by it."""
    settled = 0
    waiting = await Deletion.unsettled(now() - SETTLE_GRACE, SETTLED_AT_ONCE)
    for identity_id in waiting:
        settled += await _settle_later(runtime, identity_id)
    UNSETTLED.set(len(waiting) - settled)
    return settled


async def _settle_later(runtime: Runtime, identity_id: str) -> bool:
    """Whether it is settled now. Whatever is wrong with one holds up none of the others."""
    deletion = None
    try:
        deletion = await Deletion.get(identity_id)
        if deletion is not None:
            await _settle(runtime, deletion)
    except (PhotoStoreUnavailable, EvidenceUnavailable) as error:
        say = log.error if deletion is not None and deletion.erased_at < now() - LATE else log.warning
        say("erasure_not_settled", identity=identity_id, error=type(error).__name__)
    except Exception:
        log.exception("erasure_not_settled", identity=identity_id)
    else:
        return True
    await Deletion.put_off(identity_id)
    return False


async def _take(
    runtime: Runtime,
    action: Action,
    gallery: Gallery,
    identity_id: str,
    told: Detail,
    session: AsyncClientSession,
) -> _Gone:
    """Remove all data of the person from the documents. told: details for the event. Raises NotFound, NotReady."""
    identity = await Identity.living(identity_id, session)
    if identity is None:
        raise NotFound
    moment = now()
    samples = len(identity.samples)
    seq = await gallery.take_seq(session, samples, identities=-1, samples=-samples, removed=samples)
    if seq is None:
        raise NotReady("The gallery changed its model or epoch in the meantime.")
    keep = timedelta(hours=runtime.settings.index_purge_hours)
    await gallery.purge_files(session, [s.seq for s in identity.samples], moment + keep)
    await GalleryChange.take_out(gallery.id, identity.id, [(s.id, s.seq) for s in identity.samples], seq, session)
    requeued = await _leave_cases(identity, session)
    await Case.forget_reasons(identity.id, session)
    await Pair.forget(identity.id, session)
    await ScanPair.forget(identity.id, session)
    await Probe.forget(identity.id, session)
    await IdentityProposal.forget(identity.id, session)
    await Renewal.forget(identity.id, session)
    gone: dict[str, object] = {
        "status": "erased", "samples": [], "screenings": [], "attributes": None, "external_ref_hash": None,
        "external_ref_equal": None, "name_tags": [], "wrapped_key": None, "key_generation": None, "attempts": Attempts(),
        "outbox_at": None, "erased_at": moment,
    }  # fmt: skip
    if not await identity.change(session, gone):
        raise NotReady("The identity was changed at the same moment.")
    event = await record(
        session, action, subject_kind="identity", subject_id=identity.id, gallery=gallery.name,
        detail={"samples": samples} | told,
    )  # fmt: skip
    return _Gone(event, samples, event.time + keep, [s.photo_key for s in identity.samples], requeued)


async def _enter(deletion: Deletion, session: AsyncClientSession | None) -> None:
    """Have the ledger hold the erasure; what it holds of it already stays, but for what is to be done now."""
    stored = deletion.model_dump(exclude={"id", "revision_id", "photo_keys", "unsettled_since"})
    todo: dict[str, object] = {"unsettled_since": deletion.unsettled_since or now()}
    (todo if deletion.photo_keys else stored)["photo_keys"] = deletion.photo_keys
    await Deletion.get_pymongo_collection().update_one(
        {"_id": deletion.id}, {"$set": todo, "$setOnInsert": stored}, upsert=True, session=session
    )


async def _afterwards(runtime: Runtime, deletion: Deletion, gone: _Gone) -> None:
    """What follows the transaction. Nothing of it fails the erasure, which has happened."""
    try:
        async with asyncio.timeout(SETTLE_SECONDS):
            await _settle(runtime, deletion)
    except (PhotoStoreUnavailable, EvidenceUnavailable, PyMongoError, TimeoutError) as error:
        # The photos' key is gone, so they are noise already.
        log.warning("erasure_left_to_the_sweep", identity=deletion.id, error=type(error).__name__)
    except Exception:
        log.exception("erasure_left_to_the_sweep", identity=deletion.id)
    for newcomer_id, job_id in gone.requeued:
        await runtime.queue.enqueue_screening(newcomer_id, job_id, again=f":{gone.event.id}")


async def _settle(runtime: Runtime, deletion: Deletion) -> None:
    """Write the ledger's line outside; forget what of the person's events is personal; delete the photos, every version.

    The line comes first: without it, whoever puts a backup in place of a lost database brings the person back. But nothing
    else waits until it can be written.
    """
    trouble = None
    try:
        await runtime.evidence.append(deletion.ledger_name, deletion.ledger_line(runtime.keys))
    except (EvidenceUnavailable, EvidenceExists) as error:
        trouble = error
    await AuditEvent.forget_about([deletion.id, *await Case.ids_about(deletion.id)])
    if deletion.photo_keys:
        await runtime.photos.delete(deletion.photo_keys)
        await deletion.photos_are_gone()
    if trouble is not None:
        raise trouble
    await deletion.settled()


def _remains(deletion: Deletion, purge_by: datetime) -> tuple[Remainder, ...]:
    remains = (
        Remainder(
            "index_files", purge_by, "Index files, and their copies on hosts, may hold the turned vectors until then."
        ),
        Remainder(
            "wrapped_keys", None,
            "MongoDB's oplog and backups may hold the wrapped data key. It opens nothing once the gallery's key was rotated "
            "and the key-encryption key of that time was destroyed.",
        ),
        Remainder(
            "audit_events", None,
            "That something happened to this id stays in the log, without names, addresses and typed text. MongoDB's oplog, "
            "backups and exports of the log may hold these until they are deleted.",
        ),
        Remainder("ledger", None, "That this id was erased stays in the ledger, for the restoration of backups."),
    )  # fmt: skip
    if deletion.plain_texts is False:
        return remains
    return *remains, Remainder(
        "audit_texts", None,
        "Events of an older version may contain reasons and nonces about this id in the clear. An event cannot be changed.",
    )  # fmt: skip


def _signed(runtime: Runtime, gallery: Gallery, deletion: Deletion) -> str:
    receipt = receipt_of(deletion)
    return runtime.access.sign_receipt({
        "sub": receipt.identity_id, "jti": receipt.audit_event_id, "gallery": gallery.name,
        "iat": int(receipt.erased_at.astimezone(UTC).timestamp()), "erased_at": _written(receipt.erased_at),
        "samples": receipt.samples, "photos": receipt.photos, "index_purge_by": _written(receipt.index_purge_by),
        "remains": [f"{r.what} until {_written(r.until)}" if r.until else r.what for r in receipt.remains],
    })  # fmt: skip


def _written(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


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
