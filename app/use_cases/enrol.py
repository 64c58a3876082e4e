"""Enrol: someone new from one to five photos, or one more photo of someone known.

Photo first, then one transaction, then everything else: the transaction is the commit. A photo without a document is
swept later, a pending identity is its own note that a screening is due, so nothing here needs undoing.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError, PyMongoError

from app.audit import Action, UnderSalt, record
from app.concurrency import all_of
from app.documents.base import new_id, now
from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Identity, Liveness, ReferenceHashes, Sample, Screening
from app.documents.sealed import (
    data_key,
    gallery_key,
    name_tags,
    open_anchors,
    reference_hashes,
    seal_attributes,
    seal_fingerprint,
    seal_landmarks,
    seal_photo,
    seal_template,
)
from app.documents.stores import EnrolmentBegun
from app.domain.attributes import GivenAttributes
from app.domain.comparison import anchored, scores_with, show_one_person
from app.domain.near_copies import fingerprint
from app.domain.photo import encode
from app.domain.policy import thresholds_for
from app.domain.times import birth_date_fault
from app.engine.reading import FaceReading, read_face
from app.errors import (
    Advice,
    Conflict,
    DifferentPeople,
    DifferentPerson,
    ExternalRefTaken,
    NotFound,
    NotReady,
    Validation,
)
from app.keys import DataKey
from app.runtime import Runtime

#: After this time from its photo's put an enrolment gives up; the sweep of orphans waits a day, so it never takes a living one's.
GIVE_UP_SECONDS = 60
#: How long the queue has to bring a screening about before the sweep asks again.
OUTBOX_GRACE = timedelta(seconds=5)
#: A screening takes some ten milliseconds; whoever waits looks often at first.
FIRST_LOOK_SECONDS, LONGEST_PAUSE_SECONDS = 0.02, 0.25

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A sample in all but its `seq`, and its sealed photo."""

    sample: Sample
    sealed_photo: bytes


async def enrol(
    runtime: Runtime, action: Action, gallery: Gallery, photos: list[bytes], attributes: GivenAttributes
) -> Identity:
    """Enrol someone: durable when it returns, pending until screened.

    Raises the photos' Problems, DifferentPeople, ExternalRefTaken, ModelMismatch, NotFound when the gallery went away,
    Validation for a date on which nobody alive was born.
    """
    runtime.require_contract(gallery)
    fault = birth_date_fault(attributes.date_of_birth, now())
    if fault is not None:
        raise Validation.of("date_of_birth", "impossible-date", fault)
    key = gallery_key(runtime.keys, gallery)
    reference = attributes.external_ref
    hashes = None if reference is None else reference_hashes(key, reference)
    # For officers only: an enroller could otherwise find out with worthless photos which references are taken.
    is_early = action.caller is None or not action.caller.sees_own_enrolments_only
    if is_early:
        await _require_free(gallery, hashes)
    readings = await _read(runtime, action, gallery, photos)
    thresholds = thresholds_for(gallery.policy, runtime.engine.card, gallery.samples)
    if not show_one_person([reading.embedding for reading in readings], thresholds.verify):
        message = "Please give photos of one person only."
        raise DifferentPeople(message, errors=(Advice("photo", "different-people", message),))
    if not is_early:
        await _require_free(gallery, hashes)

    identity_id, job_id = new_id(), new_id()
    personal_key = DataKey.fresh()
    prepared = await _prepare(runtime, gallery, identity_id, personal_key, readings, photos)
    sealed_attributes = seal_attributes(personal_key, attributes, gallery.id, identity_id)
    tags = name_tags(key, attributes)
    ref_hash = None if hashes is None else hashes.equal

    async def commit(session: AsyncClientSession) -> Identity:
        seq = await gallery.take_seq(session, len(prepared), identities=1, samples=len(prepared))
        if seq is None:
            raise NotFound("The gallery was removed or changed its model in the meantime.")
        # With the keys of this transaction: those that were read before it may be on their way out.
        wrapping = gallery_key(runtime.keys, gallery)
        moment = now()
        samples = [p.sample.model_copy(update={"seq": seq + i}) for i, p in enumerate(prepared)]
        screening = Screening(job_id=job_id, sample_ids=[s.id for s in samples], due_at=moment + OUTBOX_GRACE)
        identity = Identity(
            id=identity_id, gallery_id=gallery.id, status="pending", enrol_seq=seq, samples=samples,
            screenings=[screening], attributes=sealed_attributes, external_ref_hash=ref_hash, name_tags=tags,
            wrapped_key=wrapping.wrap(personal_key, identity_id), key_generation=wrapping.sealing,
            outbox_at=screening.due_at, created_at=moment, created_by=action.actor_id, updated_at=moment,
        )  # fmt: skip
        await identity.insert(session=session)
        await _insert_changes(gallery.id, identity_id, samples, session)
        await record(
            session, action, subject_kind="identity", subject_id=identity_id, gallery=gallery.name, status_code=202,
            detail={
                "samples": len(samples), "job_id": job_id, "seq": seq,
                "external_ref": None if ref_hash is None else UnderSalt(ref_hash.hex()),
            },
        )  # fmt: skip
        return identity

    try:
        begun = EnrolmentBegun.note(identity_id, gallery.id)
        identity = await _store_and_commit(runtime, gallery, prepared, commit, begun)
    except DuplicateKeyError as error:
        if "external_ref_hash" in str(error.details):
            raise _taken(gallery) from error
        raise
    await runtime.queue.enqueue_screening(identity_id, job_id)
    return identity


async def _require_free(gallery: Gallery, hashes: ReferenceHashes | None) -> None:
    """Raises ExternalRefTaken where somebody has the reference, in whatever spelling.

    The unique index keeps out those who enrol at the same moment, and does not know all spellings of older references.
    """
    if hashes is not None and await Identity.with_reference({gallery.id: hashes}):
        raise _taken(gallery)


def _taken(gallery: Gallery) -> ExternalRefTaken:
    return ExternalRefTaken(f"In gallery {gallery.name} this reference belongs to somebody already.")


async def add_sample(runtime: Runtime, action: Action, gallery: Gallery, identity: Identity, photo: bytes) -> Identity:
    """One more photo of an active identity; it serves as a reference once it is screened.

    Raises the photo's Problems, DifferentPerson, Conflict when the identity is not active or has all the samples it may have.
    """
    runtime.require_contract(gallery)
    _require_room(runtime, identity)
    readings = await _read(runtime, action, gallery, [photo])
    personal_key = data_key(runtime.keys, gallery, identity)
    thresholds = thresholds_for(gallery.policy, runtime.engine.card, gallery.samples)
    # Not with later samples: a chain of small steps could lead to another person.
    scores = scores_with(readings[0].embedding, open_anchors(personal_key, identity))
    if anchored(max(scores, default=-1.0), scores, thresholds.anchor) < thresholds.join:
        raise DifferentPerson("The photo does not match the photos that the person was enrolled by.")
    anchors = [sample.id for sample in identity.anchors]
    job_id = new_id()
    (prepared,) = await _prepare(runtime, gallery, identity.id, personal_key, readings, [photo])

    async def commit(session: AsyncClientSession) -> Identity:
        fresh = await Identity.living(identity.id, session)
        if fresh is None:
            raise NotFound
        _require_room(runtime, fresh)
        if [sample.id for sample in fresh.anchors] != anchors:
            raise NotReady("The identity was changed at the same moment.")
        seq = await gallery.take_seq(session, 1, samples=1)
        if seq is None:
            raise NotFound("The gallery was removed or changed its model in the meantime.")
        sample = prepared.sample.model_copy(update={"seq": seq})
        screening = Screening(job_id=job_id, sample_ids=[sample.id], due_at=now() + OUTBOX_GRACE)
        changed = {
            "samples": [*fresh.samples, sample], "screenings": [*fresh.screenings, screening],
            "outbox_at": min(filter(None, [fresh.outbox_at, screening.due_at])),
        }  # fmt: skip
        if not await fresh.change(session, changed):
            raise NotReady("The identity was changed at the same moment.")
        await _insert_changes(gallery.id, identity.id, [sample], session)
        await record(
            session, action, subject_kind="identity", subject_id=identity.id, gallery=gallery.name, status_code=202,
            detail={"sample_id": sample.id, "job_id": job_id, "seq": seq},
        )  # fmt: skip
        return fresh

    await _store_and_commit(runtime, gallery, [prepared], commit)
    await runtime.queue.enqueue_screening(identity.id, job_id)
    known = await Identity.living(identity.id)
    if known is None:
        raise NotFound
    return known


def _require_room(runtime: Runtime, identity: Identity) -> None:
    if identity.status != "active":
        raise Conflict(f"Photos can be added to an active identity; this one is {identity.status}.")
    if len(identity.samples) >= runtime.settings.max_samples:
        raise Conflict(f"An identity has at most {runtime.settings.max_samples} samples.")


async def _read(runtime: Runtime, action: Action, gallery: Gallery, photos: list[bytes]) -> list[FaceReading]:
    caller = action.actor_id
    reading = [
        runtime.compute_long(caller, read_face, runtime.engine, photo, gallery.policy, runtime.reader)
        for photo in photos
    ]
    return await all_of(*reading)


async def _prepare(
    runtime: Runtime, gallery: Gallery, identity_id: str, key: DataKey, readings: list[FaceReading], photos: list[bytes]
) -> list[_Prepared]:
    def seal(reading: FaceReading, data: bytes) -> _Prepared:
        sample_id = new_id()
        template = seal_template(key, reading.embedding, gallery.id, identity_id, sample_id, gallery.contract)
        mark = fingerprint(reading.pixels, reading.face.landmarks)
        liveness = None
        if reading.liveness is not None:
            liveness = Liveness(score=round(reading.liveness, 4), passed=reading.is_live)
        sample = Sample(
            id=sample_id, seq=0, status="pending", template=template, contract=gallery.contract, quality=reading.quality,
            liveness=liveness, photo_key=f"{gallery.id}/{identity_id}/{sample_id}",
            photo_digest=runtime.keys.keyed_hash("photo", data), created_at=now(),
            fingerprint=seal_fingerprint(key, mark, gallery.id, identity_id, sample_id), found=reading.main.report,
            stored_box=reading.stored_box,
            landmarks=seal_landmarks(key, reading.face.landmarks, gallery.id, identity_id, sample_id),
        )  # fmt: skip
        # Stored are our own pixels, encoded again: whatever else the file carried stays outside.
        return _Prepared(sample, seal_photo(key, encode(reading.pixels), gallery.id, identity_id, sample_id))

    return [await runtime.compute(seal, reading, data) for reading, data in zip(readings, photos, strict=True)]


async def _store_and_commit(
    runtime: Runtime,
    gallery: Gallery,
    prepared: list[_Prepared],
    commit: Callable[[AsyncClientSession], Awaitable[T]],
    *besides: Awaitable[None],
) -> T:
    """Store the photos, and await `besides` at the same time. Then commit."""
    try:
        async with asyncio.timeout(GIVE_UP_SECONDS):
            puts = (runtime.photos.put(p.sample.photo_key, p.sealed_photo) for p in prepared)
            await all_of(*besides, *puts)
            return await runtime.in_line(gallery.id, commit)
    except TimeoutError as error:
        raise NotReady("The stores took too long; nothing was enrolled.", retry_after_seconds=5) from error


async def _insert_changes(
    gallery_id: str, identity_id: str, samples: list[Sample], session: AsyncClientSession
) -> None:
    rows = [
        GalleryChange(gallery_id=gallery_id, seq=s.seq, kind="add", identity_id=identity_id, sample_id=s.id)
        for s in samples
    ]
    await GalleryChange.insert_many(rows, session=session)


async def await_verdict(identity: Identity, seconds: float) -> Identity:
    """The identity once it has its verdict, or as it is when the time is over."""
    deadline = time.monotonic() + seconds
    pause = FIRST_LOOK_SECONDS
    while identity.status == "pending" and time.monotonic() < deadline:
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS, max(FIRST_LOOK_SECONDS, deadline - time.monotonic()))
        try:
            known = await Identity.living(identity.id)
        except PyMongoError:
            return identity  # it is enrolled, and that must be answered, whatever became of the store since
        if known is None:
            raise NotFound
        identity = known
    return identity
