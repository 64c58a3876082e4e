"""Keys: what is sealed opens with its key in its place, and nowhere else."""

import base64
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config import random_secret
from app.domain.spelling import canonical
from app.keys import (
    KEY_BYTES,
    TAG_BYTES,
    DataKey,
    GalleryKey,
    KeyRing,
    SealBroken,
    UnknownKey,
    WrappedKeys,
    generation_of,
    master_key_of,
)

SECRET = random_secret()
RING = KeyRing(SECRET)
RING.adopt_root(os.urandom(KEY_BYTES))
KEYS = RING.new_gallery_keys("north")
GALLERY = RING.gallery_key("north", KEYS)
KEY, WRAPPED = GALLERY.new_data_key("ann")

texts = st.binary(max_size=200)


def another_gallery(name: str = "south") -> GalleryKey:
    return RING.gallery_key(name, RING.new_gallery_keys(name))


def rotated(keys: WrappedKeys, gallery_id: str = "north", ring: KeyRing = RING) -> WrappedKeys:
    """The keys with one more generation, which seals."""
    number = keys.numbers[-1] + 1
    generations = keys.generations | {str(number): ring.new_generation(gallery_id)}
    return WrappedKeys(root=keys.root, generations=generations, sealing=number)


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
    south = another_gallery()
    for gallery, identity in ((GALLERY, "bob"), (south, "ann")):
        with pytest.raises(SealBroken):
            gallery.unwrap(WRAPPED, identity)


def test_a_gallerys_keys_open_with_the_operators_key_for_their_own_gallery() -> None:
    wrapped = RING.new_gallery_keys("east")
    key = RING.gallery_key("east", wrapped)
    with pytest.raises(SealBroken):
        RING.gallery_key("west", wrapped)
    with pytest.raises(UnknownKey):
        KeyRing(random_secret()).gallery_key("east", wrapped)
    for secret in (key.root, key.generations[1]):
        assert secret not in wrapped.root + wrapped.generations["1"]
    swapped = WrappedKeys(root=wrapped.generations["1"], generations={"1": wrapped.root}, sealing=1)
    with pytest.raises(SealBroken):
        KeyRing(SECRET).gallery_key("east", swapped)


@given(st.binary(max_size=60), st.data())
def test_any_flipped_bit_of_a_value_under_the_operators_key_is_refused(plain: bytes, data: st.DataObject) -> None:
    sealed = RING.seal_with_master(plain, b"here")
    assert RING.open_with_master(sealed, b"here") == plain
    at = data.draw(st.integers(0, len(sealed) - 1))
    flipped = sealed[at] ^ (1 << data.draw(st.integers(0, 7)))
    with pytest.raises(SealBroken):
        RING.open_with_master(sealed[:at] + bytes([flipped]) + sealed[at + 1 :], b"here")
    for broken in (sealed[:at], sealed + b"\0", b""):
        with pytest.raises(SealBroken):
            RING.open_with_master(broken, b"here")
    with pytest.raises(SealBroken):
        RING.open_with_master(sealed, b"there")


@given(st.data())
def test_any_flipped_bit_of_a_wrapped_data_key_is_refused(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(WRAPPED) - 1))
    flipped = WRAPPED[at] ^ (1 << data.draw(st.integers(0, 7)))
    for broken in (WRAPPED[:at] + bytes([flipped]) + WRAPPED[at + 1 :], WRAPPED[:at], WRAPPED + b"\0"):
        with pytest.raises(SealBroken):
            GALLERY.unwrap(broken, "ann")


@given(st.lists(st.binary(max_size=40), max_size=5), st.lists(st.binary(max_size=40), max_size=5))
def test_after_a_change_of_the_operators_key_both_open_and_the_newest_seals(old: list[bytes], new: list[bytes]) -> None:
    second = random_secret()
    before, after = KeyRing(SECRET), KeyRing(second, [SECRET])
    sealed = [before.seal_with_master(plain, b"here") for plain in old]
    assert [after.open_with_master(value, b"here") for value in sealed] == old
    resealed = [after.seal_with_master(after.open_with_master(value, b"here"), b"here") for value in sealed]
    resealed += [after.seal_with_master(plain, b"here") for plain in new]
    assert {master_key_of(value) for value in resealed} <= {KeyRing(second).key_id}
    assert [KeyRing(second).open_with_master(value, b"here") for value in resealed] == old + new
    for value in resealed:
        with pytest.raises(UnknownKey):
            before.open_with_master(value, b"here")


def test_a_ring_names_its_keys_and_seals_with_the_first() -> None:
    second = random_secret()
    ring = KeyRing(second, [SECRET, second])
    assert ring.key_ids == [KeyRing(second).key_id, KeyRing(SECRET).key_id]
    assert master_key_of(ring.seal_with_master(b"x", b"here")) == ring.key_id
    with pytest.raises(SealBroken):
        master_key_of(KEY.seal(b"x", b"here"))


def test_a_gallerys_key_is_rotated_with_both_generations_open_and_the_newest_wrapping() -> None:
    ring = KeyRing(SECRET)
    first = ring.new_gallery_keys("north")
    old = ring.gallery_key("north", first)
    ann, wrapped = old.new_data_key("ann")
    second = rotated(first, ring=ring)
    both = ring.gallery_key("north", second)
    assert both.unwrap(wrapped, "ann") == ann
    again = both.wrap(ann, "ann")
    assert (generation_of(wrapped), generation_of(again)) == (1, 2)
    assert old.unwrap(again, "ann") == ann, "what one reader learned, all of the process know"

    alone = second.model_copy(update={"generations": {"2": second.generations["2"]}})
    for reader in (ring, KeyRing(SECRET)):
        late = reader.gallery_key("north", alone)
        assert late.unwrap(again, "ann") == ann
        with pytest.raises(UnknownKey):
            late.unwrap(wrapped, "ann")
        assert late.lookup_hash("external_ref", "x") == old.lookup_hash("external_ref", "x")
        assert np.array_equal(late.rotation("first", 8), old.rotation("first", 8))


def test_a_reader_with_an_older_document_learns_the_generation_that_it_lacks() -> None:
    ring = KeyRing(SECRET)
    second = rotated(KEYS)
    bob, wrapped = RING.gallery_key("north", second).new_data_key("bob")
    reader = ring.gallery_key("north", KEYS)
    with pytest.raises(UnknownKey):
        reader.unwrap(wrapped, "bob")
    assert reader.learn(second).unwrap(wrapped, "bob") == bob


def test_a_key_that_is_not_wrapped_is_not_unwrapped() -> None:
    for broken in (b"", KEY.key, KEY.seal(KEY.key, b"here"), RING.seal_with_master(KEY.key, b"here")):
        with pytest.raises(SealBroken):
            GALLERY.unwrap(broken, "ann")


@given(st.lists(st.text(max_size=10), max_size=8))
def test_tags_are_short_each_once_and_in_an_order_that_tells_nothing(values: list[str]) -> None:
    tags = GALLERY.lookup_tags("name", values)
    assert tags == sorted(set(tags))
    assert len(tags) == len(set(values))  # by chance fewer once in a hundred million examples
    assert {len(tag) for tag in tags} <= {TAG_BYTES}
    assert GALLERY.lookup_tags("name", reversed(values)) == tags
    assert not set(tags) & set(another_gallery().lookup_tags("name", values))


@given(st.text(max_size=40), st.text(max_size=40))
def test_lookups_are_equal_exactly_for_equal_references(one: str, other: str) -> None:
    def lookup(text: str) -> bytes:
        return GALLERY.lookup_hash("external_ref", canonical(text))

    assert (lookup(one) == lookup(other)) == (canonical(one) == canonical(other))


def test_canonically_equal_references_are_found_under_one_hash() -> None:
    spellings = ["Ångström-1", "A\u030angstro\u0308m-1", "ÅNGSTRÖM-1", "ångström-１"]
    assert len({GALLERY.lookup_hash("external_ref", canonical(s)) for s in spellings}) == 1


def test_a_lookup_tells_fields_and_galleries_apart() -> None:
    south = another_gallery()
    hashes = {
        GALLERY.lookup_hash("external_ref", "x"), GALLERY.lookup_hash("full_name", "x"), south.lookup_hash("external_ref", "x")
    }  # fmt: skip
    assert len(hashes) == 3


def test_keyed_hashes_differ_by_label_and_by_store() -> None:
    other = KeyRing(SECRET)
    other.adopt_root(os.urandom(KEY_BYTES))
    hashes = {RING.keyed_hash("a", b"x"), RING.keyed_hash("b", b"x"), other.keyed_hash("a", b"x")}
    assert len(hashes) == 3
    assert {len(h) for h in hashes} == {32}


def test_keyed_hashes_outlive_the_operators_key_and_need_the_stores_root() -> None:
    root = os.urandom(KEY_BYTES)
    rings = [KeyRing(SECRET), KeyRing(random_secret(), [SECRET]), KeyRing(random_secret())]
    with pytest.raises(RuntimeError, match="root secret"):
        rings[0].keyed_hash("a", b"x")
    for ring in rings:
        ring.adopt_root(root)
    assert len({ring.keyed_hash("a", b"x") for ring in rings}) == 1


def test_one_secret_gives_one_ring_however_it_is_written() -> None:
    raw = os.urandom(32)
    spellings = [
        base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode(), base64.b64encode(raw).decode().rstrip("=")
    ]  # fmt: skip
    assert len({KeyRing(s).key_id for s in spellings}) == 1
    sealed = KeyRing(spellings[0]).seal_with_master(b"x", b"here")
    assert {KeyRing(s).open_with_master(sealed, b"here") for s in spellings} == {b"x"}


@pytest.mark.parametrize("secret", ["abcde", "a pass-phrase, and no base64", "ü" * 43, random_secret()[:-1]])
def test_whatever_the_operator_gives_is_a_key(secret: str) -> None:
    sealed = KeyRing(secret).seal_with_master(b"x", b"here")
    assert KeyRing(secret).open_with_master(sealed, b"here") == b"x"
    with pytest.raises(UnknownKey):
        KeyRing(secret + "x").open_with_master(sealed, b"here")


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
    other = another_gallery()
    first = GALLERY.rotation("first", 64)
    assert np.array_equal(first, KeyRing(SECRET).gallery_key("north", KEYS).rotation("first", 64))
    for strange in (GALLERY.rotation("second", 64), other.rotation("first", 64)):
        assert abs(np.sum(first * strange)) / 64 < 0.1  # as good as independent


def test_a_rotation_spreads_a_single_component_over_all() -> None:
    """What one-bit codes need: no dimension may hold more than its share."""
    turned = GALLERY.rotation("first", 512)[0]
    assert np.abs(turned).max() < 6 / np.sqrt(512)
    assert turned.std() == pytest.approx(1 / np.sqrt(512), rel=0.1)
