"""View a stored photo, or the crop of it that is compared. Each view is an event, which is recorded before the answer."""

from app.audit import Action
from app.documents.galleries import Gallery
from app.documents.identities import Identity, Sample
from app.documents.sealed import data_key, open_landmarks
from app.domain.alignment import aligned_crop
from app.domain.faces import Landmarks
from app.domain.photo import decode_stored, encode_lossless
from app.engine.port import FaceEngine
from app.engine.reading import stored_face
from app.errors import NotFound
from app.readings import note_reading
from app.runtime import Runtime


async def view_photo(runtime: Runtime, action: Action, gallery: Gallery, identity: Identity, sample_id: str) -> bytes:
    """The photo's JPEG bytes. Raises NotFound, PhotoMissing (also when the store gives another's or changed bytes)."""
    photo = await runtime.stored_photo(gallery, identity, _sample(identity, sample_id))
    await note_reading(
        runtime, action, {identity.id: gallery.name}, {"sample_id": sample_id}, identity_id=identity.id
    )  # fmt: skip
    return photo


async def view_crop(runtime: Runtime, action: Action, gallery: Gallery, identity: Identity, sample_id: str) -> bytes:
    """The face as the recogniser gets it, a PNG. Raises NotFound, PhotoMissing, or NoFace if an old sample shows none."""
    sample = _sample(identity, sample_id)
    photo = await runtime.stored_photo(gallery, identity, sample)
    landmarks = None
    if sample.landmarks is not None:
        key = data_key(runtime.keys, gallery, identity)
        landmarks = open_landmarks(key, sample.landmarks, gallery.id, identity.id, sample_id)
    crop = await runtime.compute_long(action.actor_id, _crop, runtime.engine, photo, landmarks)
    await note_reading(
        runtime, action, {identity.id: gallery.name}, {"sample_id": sample_id, "crop": True}, identity_id=identity.id
    )  # fmt: skip
    return crop


def _sample(identity: Identity, sample_id: str) -> Sample:
    sample = next((s for s in identity.samples if s.id == sample_id), None)
    if sample is None:
        raise NotFound
    return sample


def _crop(engine: FaceEngine, photo: bytes, landmarks: Landmarks | None) -> bytes:
    pixels = decode_stored(photo)
    if landmarks is None:
        landmarks = stored_face(engine, pixels).landmarks
    return encode_lossless(aligned_crop(pixels, landmarks))
