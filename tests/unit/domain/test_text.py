"""Free text: one rule for everything that people type."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from app.domain.text import NONCE_MAXIMUM, REASON_MAXIMUM, Nonce, Reason

REASON = TypeAdapter[str](Reason)
NONCE = TypeAdapter[str](Nonce)


@pytest.mark.parametrize(
    "text",
    [
        "", "  ", "\u200b", "\u200d", "\u200f \u200c",
        "line one\nline two", "a\tb", "nul\x00", "\x1b[31mred", "paid \u202e001", "\u2066x\u2069",
        "half \ud83d", "\u2028", "\U000e0041hidden tag", "\x85", "x" * (REASON_MAXIMUM + 1),
        "a" + "\u0301" * 5000,
    ],
)  # fmt: skip
def test_a24_hidden_and_unbounded_text_is_refused(text: str) -> None:
    for form in (REASON, NONCE):
        with pytest.raises(ValidationError):
            form.validate_python(text)


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("  moved away ", "moved away"), ("Zoe\u0308", "Zo\u00eb"),
        ("ប្តូរ\u200bទីលំនៅ", "ប្តូរ\u200bទីលំនៅ"), ("می\u200cخواهم", "می\u200cخواهم"),
        ("(\u200fעברית)", "(\u200fעברית)"), ("कार्य क्\u200dष", "कार्य क्\u200dष"), ("𰻝𰻝麵 \U00031350", "𰻝𰻝麵 \U00031350"),
    ],
)  # fmt: skip
def test_text_of_all_languages_is_kept_in_one_form(typed: str, kept: str) -> None:
    assert REASON.validate_python(typed) == kept


@pytest.mark.parametrize("text", [" n-1", "n-1 ", "Zoe\u0308"])
def test_a_nonce_is_kept_as_it_is_or_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        NONCE.validate_python(text)
    assert NONCE.validate_python("n-1 \u00eb") == "n-1 \u00eb"
    assert len(NONCE.validate_python("n" * NONCE_MAXIMUM)) == NONCE_MAXIMUM


@given(st.text(max_size=50))
def test_what_is_kept_is_kept_again(text: str) -> None:
    try:
        kept = REASON.validate_python(text)
    except ValidationError:
        return
    assert REASON.validate_python(kept) == kept == unicodedata.normalize("NFC", kept)
