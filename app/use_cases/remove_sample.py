"""Remove a sample: delete its template and photo, and take its vector out of all answers. The identity stays.

See docs/adr/0038.
"""

import asyncio
from datetime import timedelta
from typing import Final

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from app.audit import Action, Typed, record
from app.documents.base import now
from app.documents.cases import Case
from app.documents.events import AuditEvent, Detail
from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Identity, Sample, Screening
from app.documents.proposals import IdentityProposal
from app.documents.removals import SampleRemoval
from app.documents.renewals import Renewal
from app.errors import Conflict, NotFound, NotReady
from app.runtime import Runtime
from app.second_officer import Wanted, agree, propose
from storage.photos import PhotoStoreUnavailable

log = structlog.get_logger(__name__)

#: How long the answer waits for the photo store. A sweep does what is not done by then.
SETTLE_SECONDS: Final = 2.0
#: The sweep leaves a younger removal to its request.
SETTLE_GRACE: Final = timedelta(seconds=30)
SETTLED_AT_ONCE: Final = 500


async def ask(
    runtime: Runtime, action: Action, gallery: Gallery, identity_id: str, sample_id: str, reason: str
) -> SampleRemoval | IdentityProposal:
    """Remove one sample for an officer. If the gallery asks for two officers, propose it. Raises as `remove_sample`."""
    if not gallery.policy.second_review:
        return await remove_sample(runtime, action, gallery, identity_id, sample_id, reason)

    async def commit(session: AsyncClientSession) -> IdentityProposal:
        identity, _ = await _removable(identity_id, sample_id, session)
        return await propose(session, action, gallery, identity, Wanted("sample_removal", reason, sample_id))

    return await runtime.transaction(commit)


async def remove_sample(
    runtime: Runtime,
    action: Action,
    gallery: Gallery,
    identity_id: str,
    sample_id: str,
    reason: str | None,
    *,
    proposal: IdentityProposal | None = None,
) -> SampleRemoval:
    """Remove one sample. Pairs and their scores stay. proposal: the actor agrees to this proposal.

    Raises NotFound. Raises Conflict for the last sample that the identity was enrolled by, while a case about the sample is
    open, and unless the identity is active or revoked. Also raises as `second_officer.agree` does.
    """

    async def commit(session: AsyncClientSession) -> SampleRemoval:
        told: Detail = {} if proposal is None else await agree(session, action, proposal)
        identity, sample = await _removable(identity_id, sample_id, session)
        seq = await gallery.take_seq(session, 1, samples=-1, removed=1)
        if seq is None:
            raise NotReady("The gallery changed its model or epoch in the meantime.")
        purge_by = now() + timedelta(hours=runtime.settings.index_purge_hours)
        await gallery.purge_files(session, [sample.seq], purge_by)
        await Renewal.forget_sample(sample.id, session)
        await GalleryChange.take_out(gallery.id, identity.id, [(sample.id, sample.seq)], seq, session)
        screenings = [_without(screening, sample_id) for screening in identity.screenings]
        due = [s.due_at for s in screenings if s.state in ("queued", "running")]
        fields: dict[str, object] = {
            "samples": [s for s in identity.samples if s.id != sample_id], "screenings": screenings,
            "outbox_at": min(due, default=None),
        }  # fmt: skip
        if not await identity.change(session, fields):
            raise NotReady("The identity was changed at the same moment.")
        event = await record(
            session, action, subject_kind="identity", subject_id=identity.id, gallery=gallery.name,
            detail=told | {"sample_id": sample_id, "seq": seq, "reason": Typed.of(reason)},
        )  # fmt: skip
        removal = SampleRemoval(
            id=sample_id, gallery_id=gallery.id, identity_id=identity.id, removed_at=event.time, event_id=event.id,
            index_purge_by=purge_by, photo_key=sample.photo_key, unsettled_since=event.time,
        )  # fmt: skip
        await removal.insert(session=session)
        return removal

    removal = await runtime.in_line(gallery.id, commit)
    try:
        async with asyncio.timeout(SETTLE_SECONDS):
            await _settle(runtime, removal)
    except (PhotoStoreUnavailable, PyMongoError, TimeoutError) as error:
        log.warning("sample_photo_left_to_the_sweep", sample=removal.id, error=type(error).__name__)
    except Exception:  # the sample is removed: a later failure must not fail the request
        log.exception("sample_photo_left_to_the_sweep", sample=removal.id)
    return removal


async def removal_of_event(event: AuditEvent) -> SampleRemoval:
    """The removal that the event records: a request that is repeated with its idempotency key gets it again. Raises NotFound."""
    removal = await SampleRemoval.get(str(event.detail["sample_id"]))
    if removal is None:
        raise NotFound
    return removal


async def settle_removals(runtime: Runtime) -> int:
    """Delete the photos that the store could not delete when their samples were removed. Returns how many."""
    settled = 0
    for removal in await SampleRemoval.unsettled(now() - SETTLE_GRACE, SETTLED_AT_ONCE):
        try:
            await _settle(runtime, removal)
        except PyMongoError:
            raise
        except Exception as error:  # noqa: BLE001 - a failure with one photo must not stop the others
            log.warning("sample_photo_not_deleted", sample=removal.id, error=type(error).__name__)
            await removal.put_off()
        else:
            settled += 1
    return settled


async def _settle(runtime: Runtime, removal: SampleRemoval) -> None:
    if removal.photo_key is not None:
        await runtime.photos.delete([removal.photo_key])
    await removal.settled()


async def _removable(identity_id: str, sample_id: str, session: AsyncClientSession) -> tuple[Identity, Sample]:
    """The identity, and its sample that may be removed now. Raises NotFound, Conflict."""
    identity = await Identity.living(identity_id, session)
    sample = None if identity is None else next((s for s in identity.samples if s.id == sample_id), None)
    if identity is None or sample is None:
        raise NotFound
    if identity.status not in ("active", "revoked"):
        raise Conflict(f"Samples of an active or revoked identity can be removed; this one is {identity.status}.")
    is_of_enrolment = any(s.id == sample.id for s in identity.enrolment_samples)
    if is_of_enrolment and not any(s.id != sample.id for s in identity.anchors):
        raise Conflict("This is the last photo that the person was enrolled by. Erase the person, or keep the photo.")
    if await Case.is_open_about_sample(identity.id, sample.id, session):
        raise Conflict("A case about this photo or person is open. Decide it first.")
    return identity, sample


def _without(screening: Screening, sample_id: str) -> Screening:
    """The screening after the removal. If it is about this sample alone and has no verdict yet, it ends without one."""
    if screening.sample_ids != [sample_id] or screening.state == "done":
        return screening
    return screening.model_copy(update={"state": "done", "finished_at": now()})
