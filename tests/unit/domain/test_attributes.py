"""What may be known of a person besides the face."""

import unicodedata
from types import SimpleNamespace
from typing import Literal

import pytest
from pydantic import ValidationError

from app.domain import attributes, spelling
from app.domain.attributes import COMPOSED_OF, GivenAttributes


def _nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {"leaf": 1}
    for _ in range(depth - 1):
        value = {"k": value}
    return value


@pytest.mark.parametrize("field", ["external_ref", "full_name"])
@pytest.mark.parametrize("text", ["", "   ", "a\0b", "a\nb", "\u202eevil", "\ud800", "\u200b", "x" * 257])
def test_text_that_is_no_name_is_refused(field: str, text: str) -> None:
    with pytest.raises(ValidationError):
        GivenAttributes.model_validate({field: text})


@pytest.mark.parametrize("name", ["Nguyễn Thị Ánh", "李小龍", "علی‌رضا", "क्‍ष", "O’Brien-Łukasz Jr.", "Ng"])
def test_names_of_the_world_are_taken_as_they_are(name: str) -> None:
    assert GivenAttributes(full_name=name).full_name == unicodedata.normalize("NFC", name)


def test_text_is_trimmed_and_composed() -> None:
    assert GivenAttributes(full_name="  A\u030angstro\u0308m ").full_name == "Ångström"


def test_a_reference_has_at_most_128_characters() -> None:
    assert GivenAttributes(external_ref="x" * 128).external_ref == "x" * 128
    with pytest.raises(ValidationError):
        GivenAttributes(external_ref="x" * 129)


def test_no_letter_is_composed_of_more_code_points_than_is_allowed_for() -> None:
    parts = {len(unicodedata.normalize("NFD", letter)) for letter in map(chr, range(0x30000))}
    assert max(parts) == COMPOSED_OF


@pytest.mark.parametrize(("field", "most"), [("external_ref", 128), ("full_name", 256)])
def test_a_name_s_length_is_that_of_its_composed_form(field: str, most: int) -> None:
    letter = "\u1f82"
    apart = unicodedata.normalize("NFD", letter)
    assert getattr(GivenAttributes.model_validate({field: apart * most}), field) == letter * most
    with pytest.raises(ValidationError):
        GivenAttributes.model_validate({field: apart * most + "a"})


@pytest.mark.parametrize(("field", "most"), [("external_ref", 128), ("full_name", 256)])
@pytest.mark.parametrize("text", ["a" + "\u0301" * 500 + "\u0316" * 500, "a" * 100_000, " " * 100_000])
def test_h31_only_texts_of_a_bounded_length_are_composed(
    field: str, most: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed: list[str] = []

    def normalize(form: Literal["NFC"], text: str) -> str:
        composed.append(text)
        return unicodedata.normalize(form, text)

    monkeypatch.setattr(spelling, "unicodedata", SimpleNamespace(normalize=normalize, category=unicodedata.category))
    with pytest.raises(ValidationError):
        GivenAttributes.model_validate({field: text})
    assert all(len(one) <= COMPOSED_OF * most for one in composed)


@pytest.mark.parametrize("inner", [[[]] * 10_000, [0] * 10_000, {f"k{n}": 0 for n in range(10_000)}])
def test_h37_metadata_that_is_too_large_is_not_looked_at_more_closely(
    inner: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(attributes, "_keys")
    with pytest.raises(ValidationError, match="is larger than 4096 bytes") as refused:
        GivenAttributes.model_validate({"metadata": {"a": inner}})
    assert refused.value.error_count() == 1


@pytest.mark.parametrize("metadata", [{"a": object()}, {1: 2}, [1], "text", 1])
def test_metadata_is_an_object_in_json(metadata: object) -> None:
    with pytest.raises(ValidationError):
        GivenAttributes.model_validate({"metadata": metadata})


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
        GivenAttributes.model_validate({"metadata": metadata})


@pytest.mark.parametrize(
    "metadata", [{}, {f"k{i}": i for i in range(32)}, _nested(3), {"a": [1, "b", None, True, 1.5]}]
)
def test_ordinary_metadata_is_kept(metadata: dict[str, object]) -> None:
    assert GivenAttributes.model_validate({"metadata": metadata}).metadata == metadata


def test_the_size_of_metadata_is_counted_in_bytes() -> None:
    assert GivenAttributes(metadata={"k": "x" * 4085}).metadata
    with pytest.raises(ValidationError):
        GivenAttributes(metadata={"k": "ä" * 2100})


def test_a_date_of_birth_is_a_date() -> None:
    with pytest.raises(ValidationError):
        GivenAttributes.model_validate({"date_of_birth": "1990-02-30"})


def test_attributes_know_no_other_fields() -> None:
    with pytest.raises(ValidationError):
        GivenAttributes.model_validate({"shoe_size": 42})
