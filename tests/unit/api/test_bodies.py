"""Strict JSON: one object, bounded, that no two readers read differently."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api import bodies
from app.api.bodies import DEEPEST, MOST_MARKS, parsed
from app.errors import Validation

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def _nested(depth: int, opening: str = '{"a":', innermost: str = "1") -> bytes:
    """An object with others inside, `depth` in all."""
    closing = "}" if opening.startswith("{") else "]"
    inside = opening * (depth - 1) + innermost + closing * (depth - 1)
    return f'{{"a":{inside}}}'.encode()


@given(st.dictionaries(TEXT, PLAIN, max_size=4))
def test_an_ordinary_object_is_read_as_it_was_written(value: dict[str, object]) -> None:
    for is_ascii in (True, False):
        assert parsed("body", json.dumps(value, ensure_ascii=is_ascii).encode()) == value


@pytest.mark.parametrize("opening", ['{"a":', "["])
def test_h34_objects_and_lists_lie_in_each_other_only_so_deep(opening: str) -> None:
    parsed("body", _nested(DEEPEST, opening))
    for depth in (DEEPEST + 1, 500, 100_000):
        with pytest.raises(Validation):
            parsed("body", _nested(depth, opening))


@pytest.mark.parametrize("value", ["[],", "{},", "0,", '"",', '"a":0,', '\\",'])
def test_h34_a_crowd_of_values_is_refused_before_it_is_parsed(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(bodies, "json")  # whoever asks for it now fails otherwise
    with pytest.raises(Validation):
        parsed("body", f'{{"a": [{value * MOST_MARKS}0]}}'.encode())


def test_an_account_with_all_that_it_may_have_is_no_crowd() -> None:
    account = {
        "name": '"' * 128,
        "roles": ["admin", "officer", "relying_app", "auditor"],
        "galleries": [f"{number:063}" for number in range(1000)],
        "audiences": ["," * 255] * 32,
    }
    assert parsed("body", json.dumps(account).encode()) == account


@pytest.mark.parametrize("body", ['{"a": 1, "a": 1}', '{"a": {"b": 1, "b": 2}}', '{"a": [{"b": 1, "\\u0062": 2}]}'])
def test_h33_no_key_comes_twice_however_it_is_written(body: str) -> None:
    with pytest.raises(Validation):
        parsed("body", body.encode())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "9" * 5000])
def test_h29_h34_numbers_are_json_s_and_of_a_length(number: str) -> None:
    with pytest.raises(Validation):
        parsed("body", f'{{"a": {number}}}'.encode())


@given(st.text(st.characters(categories=["Cs"]), min_size=1, max_size=1))
def test_h30_half_a_surrogate_pair_is_no_text(half: str) -> None:
    for body in (json.dumps({"a": half}), json.dumps({half: "a"}), json.dumps({"a": [{"b": half}]})):
        with pytest.raises(Validation):
            parsed("body", body.encode())
    with pytest.raises(Validation):
        parsed("body", f'{{"a": "{half}"}}'.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b'"x"',
        b"{",
        b"{}{}",
        b"\xef\xbb\xbf",
        b"\xef\xbb\xbf\xef\xbb\xbf{}",
        b"\xff\xfe{\0}\0",
    ],
)
def test_a_body_is_one_object_in_utf_8(body: bytes) -> None:
    with pytest.raises(Validation):
        parsed("body", body)


def test_g11_a_byte_order_mark_before_the_object_is_left_out() -> None:
    assert bodies.parsed("body", b'\xef\xbb\xbf{"gallery":"north"}') == {"gallery": "north"}
