"""A person's sealed data: templates, photos and attributes, each bound to its place so that it opens nowhere else."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import structlog

from app.documents.galleries import Change, Gallery
from app.documents.identities import Identity, ReferenceHashes, Sample, SealedTemplates
from app.domain.attributes import Attributes
from app.domain.faces import Embedding, Landmarks
from app.domain.names import canonical_name, cut, former_prefix, name_prefixes
from app.domain.near_copies import Likeness
from app.domain.spelling import canonical, first_canonical
from app.keys import DataKey, GalleryKey, KeyRing, SealBroken, UnknownKey

log = structlog.get_logger(__name__)


def gallery_key(keys: KeyRing, gallery: Gallery) -> GalleryKey:
    """The gallery's key. Raises SealBroken."""
    return keys.gallery_key(gallery.id, gallery.wrapped_keys)


def data_key(keys: KeyRing, gallery: Gallery, identity: Identity) -> DataKey:
    """The identity's data key. Raises SealBroken, also when it was destroyed."""
    if identity.wrapped_key is None:
        message = "the data key was destroyed"
        raise SealBroken(message)
    return gallery_key(keys, gallery).unwrap(identity.wrapped_key, identity.id)


def _bound(kind: str, gallery_id: str, identity_id: str, part: str) -> bytes:
    return f"idem/1|{kind}|{gallery_id}|{identity_id}|{part}".encode()


def seal_template(
    key: DataKey, embedding: Embedding, gallery_id: str, identity_id: str, sample_id: str, contract: str
) -> bytes:
    """An embedding (d,) as it is stored."""
    return key.seal(
        embedding.astype("<f4").tobytes(), _bound("template", gallery_id, identity_id, f"{sample_id}|{contract}")
    )


def open_template(key: DataKey, gallery_id: str, identity_id: str, sample: Sample) -> Embedding:
    """A sample's embedding (d,). Raises SealBroken."""
    return _template(key, sample.template, gallery_id, identity_id, sample.id, sample.contract)


def open_vectors(
    key: GalleryKey, contract: str, rows: list[Change], people: dict[str, SealedTemplates], dimension: int
) -> tuple[list[int], Embedding]:
    """The embeddings (n, d) that these rows added, and their seqs; without those of the erased or of another model.

    Raises SealBroken when one does not open: nobody may be passed over in silence.
    """
    seqs: list[int] = []
    vectors: list[Embedding] = []
    data_keys: dict[str, DataKey] = {}
    for row in rows:
        person = people.get(row.identity_id or "")
        sealed = None if person is None else person.samples.get(row.sample_id or "")
        if person is None or person.wrapped_key is None or sealed is None or sealed[1] != contract:
            continue
        owner, sample = row.identity_id or "", row.sample_id or ""
        try:
            if owner not in data_keys:
                data_keys[owner] = key.unwrap(person.wrapped_key, owner)
            vectors.append(_template(data_keys[owner], sealed[0], key.gallery_id, owner, sample, contract))
        except SealBroken as error:
            error.add_note(f"identity {owner}, sample {sample}, seq {row.seq}")
            raise
        seqs.append(row.seq)
    return seqs, np.array(vectors, np.float32).reshape(-1, dimension)


def _template(
    key: DataKey, sealed: bytes, gallery_id: str, identity_id: str, sample_id: str, contract: str
) -> Embedding:
    bound = _bound("template", gallery_id, identity_id, f"{sample_id}|{contract}")
    return np.frombuffer(key.open(sealed, bound), dtype="<f4")


def open_anchors(key: DataKey, identity: Identity) -> Embedding:
    """The embeddings (n, d) of the samples that the identity was enrolled by. Raises SealBroken."""
    return np.array([open_template(key, identity.gallery_id, identity.id, s) for s in identity.anchors], np.float32)


def seal_fingerprint(
    key: DataKey, fingerprint: bytes | None, gallery_id: str, identity_id: str, sample_id: str
) -> bytes | None:
    """A photo's fingerprint as it is stored, if it has one."""
    return None if fingerprint is None else key.seal(fingerprint, _bound("print", gallery_id, identity_id, sample_id))


def open_likenesses(key: DataKey, identity: Identity) -> list[Likeness]:
    """What tells copies of the active samples' photos. Raises SealBroken."""
    gallery_id = identity.gallery_id
    return [
        Likeness(
            open_template(key, gallery_id, identity.id, s),
            None if s.fingerprint is None else key.open(s.fingerprint, _bound("print", gallery_id, identity.id, s.id)),
        )
        for s in identity.active_samples
    ]


def seal_landmarks(key: DataKey, landmarks: Landmarks, gallery_id: str, identity_id: str, sample_id: str) -> bytes:
    """A face's landmarks (5, 2), in pixels of the stored photo, as they are stored."""
    return key.seal(landmarks.astype("<f4").tobytes(), _bound("landmarks", gallery_id, identity_id, sample_id))


def open_landmarks(key: DataKey, sealed: bytes, gallery_id: str, identity_id: str, sample_id: str) -> Landmarks:
    """The landmarks (5, 2) of the sample's face. Raises SealBroken."""
    opened = key.open(sealed, _bound("landmarks", gallery_id, identity_id, sample_id))
    return np.frombuffer(opened, dtype="<f4").reshape(5, 2)


def seal_photo(key: DataKey, data: bytes, gallery_id: str, identity_id: str, sample_id: str) -> bytes:
    """A photo's bytes as the photo store holds them."""
    return key.seal(data, _bound("photo", gallery_id, identity_id, sample_id))


def open_photo(key: DataKey, sealed: bytes, gallery_id: str, identity_id: str, sample_id: str) -> bytes:
    """A stored photo's bytes. Raises SealBroken when they are another's or changed."""
    return key.open(sealed, _bound("photo", gallery_id, identity_id, sample_id))


def seal_attributes(key: DataKey, attributes: Attributes, gallery_id: str, identity_id: str) -> bytes:
    """The attributes as they are stored."""
    return key.seal(attributes.model_dump_json().encode(), _bound("attributes", gallery_id, identity_id, ""))


def open_attributes(key: DataKey, sealed: bytes, gallery_id: str, identity_id: str) -> Attributes:
    """The attributes. Raises SealBroken, ValueError where what opens is none."""
    return Attributes.model_validate_json(key.open(sealed, _bound("attributes", gallery_id, identity_id, "")))


def shown_attributes(keys: KeyRing, gallery: Gallery, identity: Identity) -> Attributes:
    """The attributes; unknown ones where they do not open. One broken person must not take a list of people along.

    Raises UnknownKey: for a key that this process is about to learn of.
    """
    if identity.attributes is None:
        return Attributes()
    try:
        return open_attributes(data_key(keys, gallery, identity), identity.attributes, gallery.id, identity.id)
    except UnknownKey:
        raise
    except (SealBroken, ValueError) as error:
        log.error("attributes_broken", identity=identity.id, reason=str(error)[:200])  # noqa: TRY400 - its fields say all
        return Attributes()


def seal_patch(key: DataKey, patch: bytes, gallery_id: str, identity_id: str) -> bytes:
    """A proposed change of the attributes as it is stored."""
    return key.seal(patch, _bound("proposed-patch", gallery_id, identity_id, ""))


def open_patch(key: DataKey, sealed: bytes, gallery_id: str, identity_id: str) -> bytes:
    """A proposed change of the attributes. Raises SealBroken."""
    return key.open(sealed, _bound("proposed-patch", gallery_id, identity_id, ""))


#: Among a person's name tags: the rules of `domain.spelling` and `domain.names` that made them and the hash of the reference.
#: Older processes, and older backups, write tags without it. Raise the number with each change of the rules. Tags of names are
#: longer.
LOOKUP_RULES: Final = bytes([2])


def name_tags(key: GalleryKey, attributes: Attributes, *, is_current: bool = True) -> list[bytes]:
    """What a search by the beginning of a name meets; see docs/adr/0052. is_current: the reference's hash is of today's rules."""
    name = attributes.full_name
    tags = [] if name is None else key.lookup_tags("name", name_prefixes(name))
    return [LOOKUP_RULES, *tags] if is_current else tags


def asked_tags(key: GalleryKey, asked: str) -> list[bytes]:
    """The tags of those whose name begins like this, by the present rules and by the former ones."""
    return key.lookup_tags("name", {cut(canonical_name(asked)), former_prefix(asked)} - {""})


def reference_hashes(key: GalleryKey, reference: str) -> ReferenceHashes:
    """By what a reference is looked up in the gallery."""
    return ReferenceHashes(
        key.lookup_hash("external_ref", canonical(reference)),
        key.lookup_hash("external_ref", first_canonical(reference)),
    )


async def holders_of(keys: KeyRing, galleries: Sequence[Gallery], reference: str) -> list[Identity]:
    """Who has this reference: one person a gallery, or nobody.

    More where people were stored apart under the first rules and none of them has this very spelling. Raises SealBroken.
    """
    wanted = {gallery.id: reference_hashes(gallery_key(keys, gallery), reference) for gallery in galleries}
    people = await Identity.with_reference(wanted)
    found: list[Identity] = []
    for gallery in galleries:
        here = [identity for identity in people if identity.gallery_id == gallery.id]
        exact = [one for one in here if _is_spelt(keys, gallery, one, reference)] if len(here) > 1 else []
        found += exact or here
    return found


def _is_spelt(keys: KeyRing, gallery: Gallery, identity: Identity, reference: str) -> bool:
    kept = shown_attributes(keys, gallery, identity).external_ref
    return kept is not None and first_canonical(kept) == first_canonical(reference)
