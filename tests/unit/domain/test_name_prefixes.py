"""What of a name can be looked up by: its beginning, and what follows the beginning of each of its words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.names import (
    DENSE_PREFIX_CHARACTERS,
    DENSE_STARTS,
    NAME_WORDS,
    PREFIX_CHARACTERS,
    begins_like,
    canonical_name,
    cut,
    name_prefixes,
)

names = st.text(min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("Ann Example", "a"), ("Ann Example", "ANN EX"), ("Ann Example", "example"), ("Ann  Example ", "ann example"),
        ("Maria del Carmen", "del car"), ("Jean-Pierre O'Brien", "pierre o'b"), ("Jean-Pierre O'Brien", "brien"),
        ("Ángel Ñuñez", "a\u0301ngel"), ("STRASSER", "straß"), ("王小明", "王"), ("Ａｎｎ", "ann"),
        ("Wolfeschlegelsteinhausenbergerdorff", "wolfeschlegelstein"),
    ],
)  # fmt: skip
def test_a_name_is_found_by_its_beginning_and_by_that_of_each_word(name: str, asked: str) -> None:
    wanted = canonical_name(asked)
    assert begins_like(name, wanted)
    assert cut(wanted) in name_prefixes(name)


@pytest.mark.parametrize(
    ("name", "asked"), [("Ann Example", "nn"), ("Ann Example", "ann x"), ("Ann", "anne"), ("Ann", "anx")]
)
def test_a_name_is_not_found_by_what_it_does_not_begin_with(name: str, asked: str) -> None:
    assert not begins_like(name, canonical_name(asked))


@given(names, st.integers(1, 60))
def test_whatever_a_name_begins_with_is_among_its_prefixes(name: str, length: int) -> None:
    wanted = canonical_name(name)[:length]
    if wanted and begins_like(name, wanted):
        assert cut(wanted) in name_prefixes(name)


@given(names)
def test_prefixes_are_few_and_none_is_longer_than_what_is_kept(name: str) -> None:
    prefixes = name_prefixes(name)
    assert len(prefixes) <= NAME_WORDS * PREFIX_CHARACTERS + DENSE_STARTS * DENSE_PREFIX_CHARACTERS
    assert all(1 <= len(prefix) <= PREFIX_CHARACTERS for prefix in prefixes)
    assert all(begins_like(name, prefix) for prefix in prefixes)


@given(names)
def test_a_canonical_name_stays_as_it_is(name: str) -> None:
    assert canonical_name(canonical_name(name)) == canonical_name(name)
