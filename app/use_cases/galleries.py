"""Make, change and remove galleries. A policy change that acts on enrolled people waits for a second person."""

from collections.abc import Collection
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError, PyMongoError

from app.audit import Action, Typed, by_system, record
from app.documents.accounts import Client, User, bound_to
from app.documents.base import as_text, new_id, now
from app.documents.events import Detail, Scalar
from app.documents.galleries import DEFAULT_GALLERY, Gallery, GalleryChange, PendingChange
from app.documents.identities import Identity
from app.documents.proposals import IdentityProposal
from app.documents.renewals import Renewal
from app.documents.scans import Scan
from app.domain.callers import Role
from app.domain.changes import changes
from app.domain.policy import GalleryPolicy
from app.domain.policy_changes import WAIT, PendingField, waiting_fields
from app.errors import Advice, Conflict, DependencyUnavailable, Forbidden, NotFound, NotReady, Validation
from app.runtime import Runtime

log = structlog.get_logger(__name__)


async def create(runtime: Runtime, action: Action, name: str, pack: str | None, policy: GalleryPolicy) -> Gallery:
    """An empty gallery bound to the running model. Raises Conflict when the name is taken, Validation for another pack."""
    running = runtime.engine.card.pack
    if pack is not None and pack != running:
        message = f"This service runs {running}."
        raise Validation(message, errors=(Advice("pack", "not-running", message),))

    async def commit(session: AsyncClientSession) -> Gallery:
        gallery = await runtime.create_gallery(name, policy, session)
        await record(
            session, action, subject_kind="gallery", subject_id=gallery.id, gallery=name, status_code=201,
            detail={"pack": running, "policy": policy.model_dump()},
        )  # fmt: skip
        return gallery

    try:
        return await runtime.transaction(commit)
    except DuplicateKeyError as error:
        raise Conflict(f"There is a gallery {name!r} already.") from error


async def update(
    runtime: Runtime, action: Action, gallery: Gallery, policy: GalleryPolicy, named: Collection[str]
) -> Gallery:
    """Put another policy in force. A change that must wait becomes pending instead.

    named: the fields that the caller gave. A given value that need not wait cancels a pending change of the same field. Raises
    Validation for two changes that must wait, Conflict while another change is pending.
    """
    waiting = waiting_fields(gallery.policy, policy)
    if len(waiting) > 1:
        message = "Only one change can wait at a time. Ask for the other one when this one is in force or cancelled."
        raise Validation(message, errors=(Advice(f"policy.{waiting[1]}", "one-at-a-time", message),))
    at_once = policy.model_copy(update={name: getattr(gallery.policy, name) for name in waiting})
    standing = gallery.pending
    cancelled = standing if standing is not None and standing.field in named and standing.field not in waiting else None
    kept = None if cancelled is not None else standing

    async def commit(session: AsyncClientSession) -> None:
        pending, detail = kept, _told(gallery, at_once)
        if waiting:
            pending = await _pending(action, gallery, waiting[0], policy, kept, session)
            detail["pending"] = _announced(pending) | {"people": await people(gallery, pending)}
        if cancelled is not None:
            detail["cancelled"] = _announced(cancelled)
        if not await gallery.set_policy(session, at_once, pending):
            raise NotReady("The policy was changed at the same moment.")
        await record(
            session, action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name, detail=detail
        )  # fmt: skip

    await runtime.transaction(commit)
    for name in waiting:
        log.warning("policy_change_pending", gallery=gallery.name, field=name, by=action.actor_id)
    return await Gallery.get(gallery.id) or gallery


async def _pending(
    action: Action,
    gallery: Gallery,
    field: PendingField,
    policy: GalleryPolicy,
    kept: PendingChange | None,
    session: AsyncClientSession,
) -> PendingChange:
    """The change that is pending from now on. If it was pending already, it keeps its time and its agreement."""
    value = getattr(policy, field)
    if kept is not None and (kept.field, kept.value) == (field, value):
        return kept
    if kept is not None:
        raise Conflict(f"A change of {kept.field} is pending. Cancel it before you ask for another one.")
    moment = await gallery.store_time(session)
    return PendingChange(
        id=new_id(), field=field, old=getattr(gallery.policy, field), value=value, asked_by=action.actor_id,
        asked_at=moment, effective_at=moment + WAIT,
    )  # fmt: skip


def _told(gallery: Gallery, policy: GalleryPolicy) -> Detail:
    """Details for the event of a policy change: every field that takes effect, with its old and its new value."""
    changed = changes(gallery.policy.model_dump(), policy.model_dump())
    return {"fields": ",".join(changed), "changes": changed, "policy_version": gallery.policy_version + 1}


def _announced(pending: PendingChange) -> dict[str, Scalar]:
    return {
        "id": pending.id, "field": pending.field, "old": pending.old, "new": pending.value,
        "from": as_text(pending.effective_at), "asked_by": pending.asked_by, "agreed_by": pending.agreed_by,
    }  # fmt: skip


async def people(gallery: Gallery, pending: PendingChange) -> int:
    """How many of the people who are enrolled now will be erased as soon as the change takes effect."""
    if pending.field != "retention_days":
        return 0
    at = max(pending.effective_at, now())
    return await Identity.count_kept_since_before(gallery.id, at - timedelta(days=pending.value))


class Seen(NamedTuple):
    """The pending change as an officer saw it. None fits any field or value."""

    field: PendingField | None = None
    value: int | bool | None = None

    def fits(self, pending: PendingChange) -> bool:
        """Whether the pending change is the one that the officer saw."""
        return self.field in (None, pending.field) and self.value in (None, pending.value)


async def agree(runtime: Runtime, action: Action, gallery: Gallery, seen: Seen, reason: str | None = None) -> Gallery:
    """Agree to the pending change, as a second person.

    Raises Forbidden for an application. Raises Conflict when nothing is pending, when another change is, when the same user
    asked for it, and when an officer has agreed already.
    """
    if action.caller is None or action.caller.kind != "user":
        raise Forbidden("A person must agree, not an application.")

    async def commit(session: AsyncClientSession) -> None:
        fresh, pending = await _standing(gallery, session)
        if not seen.fits(pending):
            raise Conflict("Another change is pending now. Look at the gallery again.")
        if pending.asked_by == action.actor_id:
            raise Conflict("You asked for this change; another user must agree.")
        if pending.agreed_by is not None:
            raise Conflict("An officer has agreed already.")
        moment = await fresh.store_time(session)
        agreed = pending.model_copy(update={"agreed_by": action.actor_id, "agreed_at": moment})
        told = _announced(agreed) | {"people": await people(fresh, agreed), "reason": Typed.of(reason)}
        await _settle(action, fresh, agreed, told, session)

    await runtime.transaction(commit)
    return await Gallery.get(gallery.id) or gallery


async def cancel(runtime: Runtime, action: Action, gallery: Gallery) -> Gallery:
    """Cancel the pending change, even if an officer has agreed. Raises Conflict when nothing is pending."""

    async def commit(session: AsyncClientSession) -> None:
        fresh, pending = await _standing(gallery, session)
        await _settle(action, fresh, None, _announced(pending), session)

    await runtime.transaction(commit)
    return await Gallery.get(gallery.id) or gallery


async def _standing(gallery: Gallery, session: AsyncClientSession) -> tuple[Gallery, PendingChange]:
    fresh = await Gallery.get(gallery.id, session=session)
    if fresh is None:
        raise NotFound
    if fresh.pending is None:
        raise Conflict("No policy change is pending.")
    return fresh, fresh.pending


async def _settle(
    action: Action,
    gallery: Gallery,
    pending: PendingChange | None,
    told: dict[str, Scalar],
    session: AsyncClientSession,
) -> None:
    """Replace the pending change, with its event. The policy in force stays."""
    if not await gallery.set_policy(session, gallery.policy, pending):
        raise NotReady("The policy was changed at the same moment.")
    await record(
        session, action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name, detail={"pending": told}
    )  # fmt: skip


async def take_effect(runtime: Runtime) -> int:
    """Put the pending changes in force that are due and that an officer has agreed to. Returns how many.

    An agreement lapses when its officer no longer has the account or the role. Nothing takes effect while this host's clock and
    MongoDB's differ, and for a day after MongoDB's was set: any of them may be wrong.
    """
    done, waiting = 0, await Gallery.with_pending()
    if waiting:
        await runtime.clock.measure(runtime.mongo)
    if not runtime.clock.may_erase:
        log.error("policy_changes_wait_for_the_clock", **runtime.clock.why_not)
        return 0
    for gallery in waiting:
        try:
            done += await runtime.transaction(partial(_take_effect, gallery.id))
        except (PyMongoError, DependencyUnavailable):
            raise
        except Exception:  # a failure in one gallery must not stop the others
            log.exception("policy_change_failed", gallery=gallery.name)
    return done


async def _take_effect(gallery_id: str, session: AsyncClientSession) -> bool:
    gallery = await Gallery.get(gallery_id, session=session)
    pending = None if gallery is None else gallery.pending
    if gallery is None or pending is None or pending.agreed_by is None:
        return False
    officer = await User.get(pending.agreed_by, session=session)
    if officer is None or not officer.may(Role.OFFICER, gallery.id):
        log.warning("policy_agreement_lapsed", gallery=gallery.name, field=pending.field, by=pending.agreed_by)
        open_again = pending.model_copy(update={"agreed_by": None, "agreed_at": None})
        await _settle(by_system("gallery.pending.lapse"), gallery, open_again, _announced(pending), session)
        return False
    if await gallery.store_time(session) < pending.effective_at:
        return False
    policy = gallery.policy.model_copy(update={pending.field: pending.value})
    detail = _told(gallery, policy) | {"pending": _announced(pending) | {"people": await people(gallery, pending)}}
    if not await gallery.set_policy(session, policy, None):
        raise NotReady("The policy was changed at the same moment.")
    await record(
        session, by_system("gallery.update"), subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name,
        detail=detail,
    )  # fmt: skip
    log.warning("policy_change_took_effect", gallery=gallery.name, field=pending.field)
    return True


async def delete(runtime: Runtime, action: Action, gallery: Gallery) -> None:
    """Remove a gallery in which nobody is left, with all rights to it. Raises Conflict otherwise."""
    if gallery.name == DEFAULT_GALLERY:
        raise Conflict("The default gallery stays.")

    async def commit(session: AsyncClientSession) -> None:
        gone = await Gallery.get_pymongo_collection().delete_one({"_id": gallery.id, "identities": 0}, session=session)
        if not gone.deleted_count:
            raise Conflict("The gallery is not empty.")
        mine = {"gallery_id": gallery.id}
        await GalleryChange.get_pymongo_collection().delete_many(mine, session=session)
        await Identity.get_pymongo_collection().delete_many({**mine, "status": "erased"}, session=session)
        await IdentityProposal.get_pymongo_collection().delete_many(mine, session=session)
        await Renewal.forget_gallery(gallery.id, session=session)
        await Scan.forget_all_of(gallery.id, session=session)
        await record(session, action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name)
        await _withdraw_grants(action, gallery, session)

    await runtime.transaction(commit)
    runtime.access.forget()


async def _withdraw_grants(action: Action, gallery: Gallery, session: AsyncClientSession) -> None:
    """Take the gallery out of every account that is bound to it, each with an event."""
    users = await bound_to(User, gallery.id, session)
    clients = await bound_to(Client, gallery.id, session)
    ids = {id_ for account in (*users, *clients) for id_ in account.galleries or ()}
    names = await Gallery.names_by_id(ids, session) | {gallery.id: gallery.name}
    for account in (*users, *clients):
        kind = "user" if isinstance(account, User) else "client"
        former = account.galleries or []
        kept = [id_ for id_ in former if id_ != gallery.id]
        old, new = (sorted(names[id_] for id_ in side if id_ in names) for side in (former, kept))
        await account.update({"$set": {"galleries": kept}}, session=session)
        await record(
            session, replace(action, name=f"{kind}.update", claim=None), subject_kind=kind, subject_id=account.id,
            gallery=gallery.name, detail={"changes": changes({"galleries": old}, {"galleries": new})},
        )  # fmt: skip
