"""What may be known of a person besides the face, and when two references are one."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.domain.attributes import Attributes, canonical_ref


def _nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {"leaf": 1}
    for _ in range(depth - 1):
        value = {"k": value}
    return value


@pytest.mark.parametrize("one", ["NID-0001", "Ångström", "STRASSE", "ﬁle-7", "①②③", "\u0390-1", "ǰ-1"])
def test_spellings_of_one_reference_are_one(one: str) -> None:
    forms = {unicodedata.normalize(form, one) for form in ("NFC", "NFD", "NFKC", "NFKD")}
    spellings = {text for form in forms for text in (form, form.upper(), form.lower(), form.casefold())}
    assert len({canonical_ref(spelling) for spelling in spellings}) == 1


@pytest.mark.parametrize(("one", "other"), [("NID-1", "NID-2"), ("NID-1", "NID1"), ("a b", "ab"), ("é", "e")])
def test_different_references_stay_different(one: str, other: str) -> None:
    assert canonical_ref(one) != canonical_ref(other)


@given(st.text(max_size=40))
def test_a_canonical_reference_stays_as_it_is(text: str) -> None:
    assert canonical_ref(canonical_ref(text)) == canonical_ref(text)


@given(st.text(max_size=40))
def test_references_that_are_equal_in_unicode_are_looked_up_alike(text: str) -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert canonical_ref(unicodedata.normalize(form, text)) == canonical_ref(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["external_ref", "full_name"])
@pytest.mark.parametrize(
    "text", ["", "   ", "a\0b", "a\nb", "\u202eevil", "\ufeffx", "\ue000", "\ud800", "\u200b", "x" * 257]
)
def test_text_that_is_no_name_is_refused(field: str, text: str) -> None:
    with pytest.raises(ValidationError):
        Attributes.model_validate({field: text})


@pytest.mark.parametrize("name", ["Nguyễn Thị Ánh", "李小龍", "علی‌رضا", "क्‍ष", "O’Brien-Łukasz Jr.", "Ng"])
def test_names_of_the_world_are_taken_as_they_are(name: str) -> None:
    assert Attributes(full_name=name).full_name == unicodedata.normalize("NFC", name)


def test_text_is_trimmed_and_composed() -> None:
    assert Attributes(full_name="  A\u030angstro\u0308m ").full_name == "Ångström"


def test_a_reference_has_at_most_128_characters() -> None:
    assert Attributes(external_ref="x" * 128).external_ref == "x" * 128
    with pytest.raises(ValidationError):
        Attributes(external_ref="x" * 129)


@pytest.mark.parametrize(
    "metadata",
    [
        {"k": "x" * 4096},
        {f"k{i}": 1 for i in range(33)},
        _nested(4),
        {"a": [[[1]]]},
        {"$set": 1},
        {"a": {"b.c": 1}},
        {"a": [{"$where": 1}]},
        {"a": float("nan")},
        {"a": [float("inf")]},
        {"a": "\ud800"},
    ],
)
def test_metadata_that_is_too_large_deep_or_odd_is_refused(metadata: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Attributes.model_validate({"metadata": metadata})


@pytest.mark.parametrize(
    "metadata", [{}, {f"k{i}": i for i in range(32)}, _nested(3), {"a": [1, "b", None, True, 1.5]}]
)
def test_ordinary_metadata_is_kept(metadata: dict[str, object]) -> None:
    assert Attributes.model_validate({"metadata": metadata}).metadata == metadata


def test_the_size_of_metadata_is_counted_in_bytes() -> None:
    assert Attributes(metadata={"k": "x" * 4085}).metadata
    with pytest.raises(ValidationError):
        Attributes(metadata={"k": "ä" * 2100})


def test_a_date_of_birth_is_a_date() -> None:
    with pytest.raises(ValidationError):
        Attributes.model_validate({"date_of_birth": "1990-02-30"})


def test_attributes_know_no_other_fields() -> None:
    with pytest.raises(ValidationError):
        Attributes.model_validate({"shoe_size": 42})
