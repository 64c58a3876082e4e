"""View a stored photo; each view is an event, written before the photo is given."""

import structlog

from app.audit import Action, record
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.sealed import data_key, open_photo
from app.errors import NotFound, PhotoMissing
from app.keys import SealBroken
from app.runtime import Runtime
from storage.photos import PhotoNotFound

log = structlog.get_logger(__name__)


async def view_photo(runtime: Runtime, action: Action, gallery: Gallery, identity: Identity, sample_id: str) -> bytes:
    """The photo's JPEG bytes. Raises NotFound, PhotoMissing (also when the store gives another's or changed bytes)."""
    sample = next((s for s in identity.samples if s.id == sample_id), None)
    if sample is None:
        raise NotFound
    try:
        sealed = await runtime.photos.get(sample.photo_key)
        key = data_key(runtime.keys, gallery, identity)
        photo = await runtime.compute(open_photo, key, sealed, gallery.id, identity.id, sample_id)
    except PhotoNotFound as error:
        log.error("photo_missing", identity=identity.id, sample=sample_id)  # noqa: TRY400 - its fields tell all
        raise PhotoMissing("The photo store does not hold this photo.") from error
    except SealBroken as error:
        log.error("photo_broken", identity=identity.id, sample=sample_id)  # noqa: TRY400
        raise PhotoMissing("The photo store holds other bytes under this photo's key.") from error
    await record(
        None,
        action,
        subject_kind="identity",
        subject_id=identity.id,
        gallery=gallery.name,
        detail={"sample_id": sample_id},
    )
    return photo
