"""Galleries of many people, written straight into the documents: what enrolment would leave, without photos and verdicts."""

from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from app.documents.base import new_id
from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Identity
from app.documents.sealed import gallery_key, seal_template
from app.runtime import Runtime

AT_ONCE = 2000
QUALITY = {
    "score": 0.9, "sharpness": 0.6, "brightness": 0.5, "yaw": 0.0, "pitch": 0.0, "roll": 0.0, "face_size": 112, "issues": [],
}  # fmt: skip


def strangers(count: int, dimension: int, seed: int) -> npt.NDArray[np.float32]:
    """Unit vectors (n, d) in directions of their own."""
    vectors = np.random.default_rng(seed).standard_normal((count, dimension), np.float32)
    scaled: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def alike(vectors: npt.NDArray[np.float32], cosine: float, seed: int) -> npt.NDArray[np.float32]:
    """One unit vector for each of these (n, d), at that cosine to it."""
    noise = strangers(len(vectors), vectors.shape[1], seed)
    noise -= np.sum(noise * vectors, axis=1, keepdims=True) * vectors
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    turned: npt.NDArray[np.float32] = (cosine * vectors + np.sqrt(1 - cosine**2) * noise).astype(np.float32)
    return turned


async def populate(
    runtime: Runtime, gallery_id: str, embeddings: npt.NDArray[np.float32], *, samples_each: int = 1
) -> list[str]:
    """Enrol active people with these embeddings (n, d), so many rows for each; returns the identities' ids.

    Nobody else may write to the gallery meanwhile.
    """
    gallery = await Gallery.get(gallery_id)
    assert gallery is not None
    key, moment, seq, people = gallery_key(runtime.keys, gallery), datetime.now(UTC), gallery.seq, []
    for first in range(0, len(embeddings), AT_ONCE * samples_each):
        identities, changes = [], []
        some = embeddings[first : first + AT_ONCE * samples_each]
        for mine in np.split(some, range(samples_each, len(some), samples_each)):
            identity_id = new_id()
            data_key, wrapped = key.new_data_key(identity_id)
            samples = []
            for embedding in mine:
                seq, sample_id = seq + 1, new_id()
                template = seal_template(data_key, embedding, gallery.id, identity_id, sample_id, gallery.contract)
                samples.append({
                    "id": sample_id, "seq": seq, "status": "active", "template": template, "contract": gallery.contract,
                    "quality": QUALITY, "liveness": None, "photo_key": f"{gallery.id}/{identity_id}/{sample_id}",
                    "photo_digest": bytes(32), "created_at": moment,
                })  # fmt: skip
                changes.append({
                    "gallery_id": gallery.id, "seq": seq, "kind": "add", "identity_id": identity_id,
                    "sample_id": sample_id, "removes": None,
                })  # fmt: skip
            people.append(identity_id)
            identities.append({
                "_id": identity_id, "gallery_id": gallery.id, "status": "active", "enrol_seq": samples[0]["seq"],
                "samples": samples, "screenings": [], "attributes": None, "external_ref_hash": None, "name_tags": [],
                "wrapped_key": wrapped, "key_generation": key.sealing,
                "attempts": {"consecutive": 0, "last_failure": None}, "outbox_at": None, "touch": 0, "version": 1,
                "created_at": moment, "created_by": "test", "updated_at": moment, "erased_at": None,
            })  # fmt: skip
        await Identity.get_pymongo_collection().insert_many(identities, ordered=False)
        await GalleryChange.get_pymongo_collection().insert_many(changes, ordered=False)
        await Gallery.get_pymongo_collection().update_one(
            {"_id": gallery.id},
            {"$set": {"seq": seq}, "$inc": {"identities": len(identities), "samples": len(changes)}},
        )
    return people
