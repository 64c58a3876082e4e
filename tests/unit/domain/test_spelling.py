"""When two spellings of one text are one, and what of it is kept."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.spelling import canonical


@pytest.mark.parametrize("one", ["NID-0001", "Ångström", "STRASSE", "ﬁle-7", "①②③", "\u0390-1", "ǰ-1"])
def test_spellings_of_one_reference_are_one(one: str) -> None:
    forms = {unicodedata.normalize(form, one) for form in ("NFC", "NFD", "NFKC", "NFKD")}
    spellings = {text for form in forms for text in (form, form.upper(), form.lower(), form.casefold())}
    assert len({canonical(spelling) for spelling in spellings}) == 1


@pytest.mark.parametrize(("one", "other"), [("NID-1", "NID-2"), ("NID-1", "NID1"), ("a b", "ab"), ("é", "e")])
def test_different_references_stay_different(one: str, other: str) -> None:
    assert canonical(one) != canonical(other)


@given(st.text(max_size=40))
def test_a_canonicalerence_stays_as_it_is(text: str) -> None:
    assert canonical(canonical(text)) == canonical(text)


@given(st.text(max_size=40))
def test_references_that_are_equal_in_unicode_are_looked_up_alike(text: str) -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert canonical(unicodedata.normalize(form, text)) == canonical(text)  # type: ignore[arg-type]
