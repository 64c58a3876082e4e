"""Make, change and remove galleries."""

from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from app.audit import Action, record
from app.documents.base import now
from app.documents.galleries import DEFAULT_GALLERY, Gallery, GalleryChange
from app.documents.identities import Identity
from app.documents.scans import Scan
from app.domain.policy import GalleryPolicy
from app.errors import Advice, Conflict, NotReady, Validation
from app.runtime import Runtime


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
            detail={"pack": running},
        )  # fmt: skip
        return gallery

    try:
        return await runtime.transaction(commit)
    except DuplicateKeyError as error:
        raise Conflict(f"There is a gallery {name!r} already.") from error


async def update(runtime: Runtime, action: Action, gallery: Gallery, policy: GalleryPolicy) -> Gallery:
    """Put another policy in force."""

    async def commit(session: AsyncClientSession) -> None:
        changed = await Gallery.get_pymongo_collection().update_one(
            {"_id": gallery.id, "policy_version": gallery.policy_version},
            {"$set": {"policy": policy.model_dump(), "updated_at": now()}, "$inc": {"policy_version": 1}},
            session=session,
        )
        if not changed.matched_count:
            raise NotReady("The policy was changed at the same moment.")
        before = gallery.policy.model_dump()
        names = sorted(name for name, value in policy.model_dump().items() if value != before[name])
        await record(
            session, action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name,
            detail={"fields": ",".join(names), "policy_version": gallery.policy_version + 1},
        )  # fmt: skip

    await runtime.transaction(commit)
    return await Gallery.get(gallery.id) or gallery


async def delete(runtime: Runtime, action: Action, gallery: Gallery) -> None:
    """Remove a gallery in which nobody is left. Raises Conflict otherwise."""
    if gallery.name == DEFAULT_GALLERY:
        raise Conflict("The default gallery stays.")

    async def commit(session: AsyncClientSession) -> None:
        gone = await Gallery.get_pymongo_collection().delete_one({"_id": gallery.id, "identities": 0}, session=session)
        if not gone.deleted_count:
            raise Conflict("The gallery is not empty.")
        mine = {"gallery_id": gallery.id}
        await GalleryChange.get_pymongo_collection().delete_many(mine, session=session)
        await Identity.get_pymongo_collection().delete_many({**mine, "status": "erased"}, session=session)
        await Scan.forget_all_of(gallery.id, session=session)
        await record(session, action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name)

    await runtime.transaction(commit)
