"""Queries and forms: UTF-8, percent-encoded, each name once."""

import pytest

from app.api.urlencoded import MOST_PAIRS, require_distinct
from app.errors import UnsupportedMediaType, Validation


@pytest.mark.parametrize(
    "text", [b"", b"q=a", b"q=&gallery=", b"q=%C3%A9", b"a=1&b=1", b"q=%zz", b"q=a+b", b"_charset_=UTF-8&q=a"]
)
def test_what_is_meant_once_passes(text: bytes) -> None:
    require_distinct(text, "body")


@pytest.mark.parametrize(
    "text", [b"q=a&q=b", b"q=a&q=a", b"q=a&%71=b", b"q=&q=a", b"q&q", b"q=%E9", b"q=\xc3\xa9", b"q=\xe9", b"%E9=a"]
)
def test_f14_what_comes_twice_or_in_another_encoding_is_refused(text: bytes) -> None:
    for where in ("query", "body"):
        with pytest.raises(Validation):
            require_distinct(text, where)


def test_a_crowd_of_parameters_is_refused_before_it_is_read() -> None:
    require_distinct(b"&".join(b"a%d=" % i for i in range(MOST_PAIRS)), "query")
    with pytest.raises(Validation):
        require_distinct(b"&" * MOST_PAIRS, "query")


def test_f3_a_form_that_names_another_encoding_is_refused() -> None:
    with pytest.raises(UnsupportedMediaType):
        require_distinct(b"_charset_=windows-1252&username=ann", "body")
