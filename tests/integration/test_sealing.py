"""What lies on disk tells nothing of anybody, and opens nowhere but in its own place."""

import io
from datetime import date
from pathlib import Path

import bson
import pytest
from bson.raw_bson import RawBSONDocument
from PIL import Image

from app.config import random_secret
from app.documents.identities import Identity
from app.documents.sealed import data_key, gallery_key, open_anchors, open_attributes, open_photo, open_template
from app.domain.photo import encode
from app.keys import KeyRing, SealBroken
from app.runtime import Runtime
from tests.builders import active, another_process, default_gallery, enrolled, known, settled
from tests.fakes import embedding_of, inscribed

#: Any so many bytes of a template or photo that stood in the clear would be found.
PIECE = 24


async def _raw_dump(runtime: Runtime) -> bytes:
    """Every document of every collection, as it is stored."""
    database = runtime.mongo[runtime.settings.mongodb_database]
    dump = b""
    for name in await database.list_collection_names():
        raw = database.get_collection(name, bson.CodecOptions(document_class=RawBSONDocument))
        dump += b"".join([document.raw async for document in raw.find()])
    return dump


def _pieces(data: bytes) -> list[bytes]:
    return [data[i : i + PIECE] for i in range(0, len(data) - PIECE, PIECE)]


async def test_nothing_of_a_person_stands_in_the_clear(runtime: Runtime) -> None:
    ann = await enrolled(
        runtime, "ann", external_ref="NID-0001", full_name="Ann Example", date_of_birth=date(1990, 1, 31)
    )
    await settled(runtime, "ann", capture=1, external_ref="NID-0002")
    template = embedding_of(("ann",), 0).astype("<f4").tobytes()
    photo = encode(inscribed("ann|0"))
    key = data_key(runtime.keys, await default_gallery(), ann)
    assert open_template(key, ann.gallery_id, ann.id, ann.samples[0]).tobytes() == template
    folder = Path(runtime.settings.storage_path)
    files = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    dump = await _raw_dump(runtime) + files
    assert ann.id.encode() in dump, "the dump holds the documents"
    assert len(files) > len(photo), "and the photos"
    for text in ("NID-0001", "nid-0001", "NID-0002", "Ann Example", "1990-01-31", "Example"):
        assert text.encode() not in dump, text
    assert not [piece for piece in _pieces(template) if piece in dump]
    # JPEG's header and tables are the same in every file, so only what is between them could tell of one.
    assert photo[:PIECE] not in files
    assert not [piece for piece in set(_pieces(photo)) if piece in files]
    assert key.key not in dump
    opened = gallery_key(runtime.keys, await default_gallery())
    for secret in (opened.root, *opened.generations.values()):
        assert secret not in dump


async def test_the_same_reference_is_stored_differently_in_two_galleries_and_under_two_operators_keys() -> None:
    rings = [KeyRing(random_secret()), KeyRing(random_secret())]
    places = [(rings[0], "north"), (rings[0], "south"), (rings[1], "north")]
    keys = [ring.gallery_key(name, ring.new_gallery_keys(name)) for ring, name in places]
    assert len({key.lookup_hash("external_ref", "nid-1") for key in keys}) == 3


async def test_a_template_moved_to_another_identity_does_not_open(runtime: Runtime) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    gallery = await default_gallery()
    collection = Identity.get_pymongo_collection()
    moved = {"samples.0.template": bob.samples[0].template}
    await collection.update_one({"_id": ann.id}, {"$set": moved})
    forged = await known(ann)
    with pytest.raises(SealBroken):
        open_anchors(data_key(runtime.keys, gallery, forged), forged)
    await collection.update_one({"_id": ann.id}, {"$set": {**moved, "wrapped_key": bob.wrapped_key}})
    forged = await known(ann)
    with pytest.raises(SealBroken):
        data_key(runtime.keys, gallery, forged)


async def test_nothing_opens_in_another_place_than_its_own(runtime: Runtime) -> None:
    ann = await enrolled(runtime, "ann", photos=2, full_name="Ann")
    gallery = await default_gallery()
    key = data_key(runtime.keys, gallery, ann)
    first, second = ann.samples
    assert ann.attributes is not None
    sealed = await runtime.photos.get(first.photo_key)
    assert Image.open(io.BytesIO(open_photo(key, sealed, gallery.id, ann.id, first.id))).size == (160, 160)
    assert open_attributes(key, ann.attributes, gallery.id, ann.id).full_name == "Ann"
    swapped = first.model_copy(update={"template": second.template})
    misread = first.model_copy(update={"contract": "sha256:other"})
    for broken in (
        lambda: open_template(key, gallery.id, ann.id, swapped),
        lambda: open_template(key, gallery.id, ann.id, misread),
        lambda: open_template(key, "elsewhere", ann.id, first),
        lambda: open_photo(key, sealed, gallery.id, ann.id, second.id),
        lambda: open_photo(key, first.template, gallery.id, ann.id, first.id),
        lambda: open_attributes(key, first.template, gallery.id, ann.id),
        lambda: open_attributes(key, ann.attributes or b"", gallery.id, "somebody-else"),
    ):
        with pytest.raises(SealBroken):
            broken()


async def test_another_operators_key_opens_no_gallery(runtime: Runtime) -> None:
    await active(runtime, "ann")
    async with another_process(runtime) as other:
        other.keys = KeyRing(random_secret())
        with pytest.raises(SealBroken):
            await settled(other, "bob")
    assert await Identity.count() == 1
