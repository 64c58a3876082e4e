"""Keys: what is sealed opens with its key in its place, and nowhere else."""

import base64
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config import random_secret
from app.domain.attributes import canonical_ref
from app.keys import KEY_BYTES, DataKey, GalleryKey, KeyRing, SealBroken

RING = KeyRing(random_secret())
GALLERY = RING.gallery_key("north", RING.new_gallery_key("north"))
KEY, WRAPPED = GALLERY.new_data_key("ann")

texts = st.binary(max_size=200)


@given(texts, texts)
def test_what_is_sealed_opens_again(plain: bytes, bound: bytes) -> None:
    assert KEY.open(KEY.seal(plain, bound), bound) == plain


@given(st.binary(min_size=1, max_size=60), st.data())
def test_any_flipped_bit_is_refused(plain: bytes, data: st.DataObject) -> None:
    sealed = KEY.seal(plain, b"here")
    at = data.draw(st.integers(0, len(sealed) - 1))
    flipped = sealed[at] ^ (1 << data.draw(st.integers(0, 7)))
    with pytest.raises(SealBroken):
        KEY.open(sealed[:at] + bytes([flipped]) + sealed[at + 1 :], b"here")


@given(texts, st.integers(1, 300))
def test_a_shortened_or_lengthened_value_is_refused(plain: bytes, cut: int) -> None:
    sealed = KEY.seal(plain, b"here")
    for broken in (sealed[: -min(cut, len(sealed))], sealed + b"\0" * cut, b""):
        with pytest.raises(SealBroken):
            KEY.open(broken, b"here")


@given(texts, texts, texts)
def test_a_value_moved_to_another_place_is_refused(plain: bytes, here: bytes, there: bytes) -> None:
    sealed = KEY.seal(plain, here)
    if here != there:
        with pytest.raises(SealBroken):
            KEY.open(sealed, there)


@given(texts)
def test_another_key_opens_nothing(plain: bytes) -> None:
    with pytest.raises(SealBroken):
        DataKey(os.urandom(KEY_BYTES)).open(KEY.seal(plain, b"here"), b"here")


@given(st.binary(min_size=16, max_size=200))
def test_the_same_value_is_never_sealed_alike_and_never_stands_in_the_clear(plain: bytes) -> None:
    one, other = KEY.seal(plain, b"here"), KEY.seal(plain, b"here")
    assert one != other
    assert plain not in one


def test_a_data_key_is_unwrapped_for_its_own_identity_in_its_own_gallery() -> None:
    assert GALLERY.unwrap(WRAPPED, "ann") == KEY
    south = RING.gallery_key("south", RING.new_gallery_key("south"))
    for gallery, identity in ((GALLERY, "bob"), (south, "ann")):
        with pytest.raises(SealBroken):
            gallery.unwrap(WRAPPED, identity)


def test_a_gallery_key_opens_with_the_operators_key_for_its_own_gallery() -> None:
    wrapped = RING.new_gallery_key("east")
    key = RING.gallery_key("east", wrapped)
    with pytest.raises(SealBroken):
        RING.gallery_key("west", wrapped)
    with pytest.raises(SealBroken):
        KeyRing(random_secret()).gallery_key("east", wrapped)
    assert key.key not in wrapped


@given(st.text(max_size=40), st.text(max_size=40))
def test_lookups_are_equal_exactly_for_equal_references(one: str, other: str) -> None:
    def lookup(text: str) -> bytes:
        return GALLERY.lookup_hash("external_ref", canonical_ref(text))

    assert (lookup(one) == lookup(other)) == (canonical_ref(one) == canonical_ref(other))


def test_canonically_equal_references_are_found_under_one_hash() -> None:
    spellings = ["Ångström-1", "A\u030angstro\u0308m-1", "ÅNGSTRÖM-1", "ångström-１"]
    assert len({GALLERY.lookup_hash("external_ref", canonical_ref(s)) for s in spellings}) == 1


def test_a_lookup_tells_fields_and_galleries_apart() -> None:
    south = RING.gallery_key("south", RING.new_gallery_key("south"))
    hashes = {
        GALLERY.lookup_hash("external_ref", "x"), GALLERY.lookup_hash("full_name", "x"), south.lookup_hash("external_ref", "x")
    }  # fmt: skip
    assert len(hashes) == 3


def test_keyed_hashes_differ_by_label_and_by_operator() -> None:
    other = KeyRing(random_secret())
    hashes = {RING.keyed_hash("a", b"x"), RING.keyed_hash("b", b"x"), other.keyed_hash("a", b"x")}
    assert len(hashes) == 3
    assert {len(h) for h in hashes} == {32}


def test_one_secret_gives_one_ring_however_it_is_written() -> None:
    raw = os.urandom(32)
    spellings = [
        base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode(), base64.b64encode(raw).decode().rstrip("=")
    ]  # fmt: skip
    assert len({KeyRing(s).key_id for s in spellings}) == 1
    assert len({KeyRing(s).keyed_hash("a", b"x") for s in spellings}) == 1


def test_a_ring_needs_a_secret_and_does_not_show_it() -> None:
    with pytest.raises(ValueError, match="KEY_ENCRYPTION_KEY"):
        KeyRing("")
    secret = random_secret()
    assert secret not in str(vars(KeyRing(secret)))
    assert KeyRing(secret).key_id == KeyRing(secret).key_id
    assert KeyRing(secret).key_id != KeyRing(random_secret()).key_id


@pytest.mark.parametrize("dimension", [1, 7, 128, 512])
def test_a_rotation_keeps_lengths_and_angles(dimension: int) -> None:
    matrix = GALLERY.rotation("first", dimension)
    assert np.allclose(matrix @ matrix.T, np.eye(dimension), atol=1e-12)


def test_a_rotation_is_the_same_for_the_same_name_and_another_for_another_name_or_key() -> None:
    other = RING.gallery_key("south", RING.new_gallery_key("south"))
    first = GALLERY.rotation("first", 64)
    assert np.array_equal(first, GalleryKey("north", GALLERY.key).rotation("first", 64))
    for strange in (GALLERY.rotation("second", 64), other.rotation("first", 64)):
        assert abs(np.sum(first * strange)) / 64 < 0.1  # as good as independent


def test_a_rotation_spreads_a_single_component_over_all() -> None:
    """What one-bit codes need: no dimension may hold more than its share."""
    turned = GALLERY.rotation("first", 512)[0]
    assert np.abs(turned).max() < 6 / np.sqrt(512)
    assert turned.std() == pytest.approx(1 / np.sqrt(512), rel=0.1)
