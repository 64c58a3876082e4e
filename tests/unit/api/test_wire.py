"""The header as bytes: what is no request, or could be two, is refused before it is parsed."""

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.envelope import HEADER_BYTES, MOST_HEADERS
from app.api.wire import HEADER_SECONDS, fault_of, in_origin_form
from app.errors import HeadersTooLarge, Unreadable

GOOD = b"POST /v1/identities HTTP/1.1\r\nHost: idem.example\r\nContent-Length: 4\r\n\r\n"
LINES = st.lists(st.binary(max_size=30).map(lambda line: bytes(c for c in line if c not in b"\r\n\t ")), max_size=20)


@pytest.mark.parametrize(
    "header",
    [
        b"GET / HTTP/1.1\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Folded: a\r\n b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Folded: a\r\n\tb\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\rTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\nHost",
    ],
)
def test_h103_line_ends_that_others_read_otherwise_are_refused(header: bytes) -> None:
    assert fault_of(header) is Unreadable


@pytest.mark.parametrize(
    "header",
    [
        b"GET / HTTP/1.1\r\nX: " + b"x" * HEADER_BYTES + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * HEADER_BYTES,
        b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * (MOST_HEADERS + 1) + b"\r\n",
        b"GET /" + b"x" * HEADER_BYTES,
    ],
    ids=["long", "long and unfinished", "many", "a long path"],
)
def test_h102_a_header_without_measure_is_refused_however_it_comes(header: bytes) -> None:
    assert fault_of(header) is HeadersTooLarge


def test_a_body_is_no_header() -> None:
    assert fault_of(GOOD + b"\n" * HEADER_BYTES * 2) is None


@given(lines=LINES, cut=st.integers(0, 1000))
def test_an_ordinary_header_is_taken_whole_and_while_it_comes(lines: list[bytes], cut: int) -> None:
    header = GOOD[:-2] + b"".join(b"X: " + line + b"\r\n" for line in lines) + b"\r\n"
    assert fault_of(header) is None
    assert fault_of(header[:cut]) is None


@given(before=st.binary(max_size=60), after=st.binary(max_size=60))
def test_what_was_ambiguous_does_not_become_clear_by_what_follows(before: bytes, after: bytes) -> None:
    if fault_of(before) is Unreadable:
        assert fault_of(before + after) is Unreadable


def test_h101_a_header_has_ten_seconds() -> None:
    assert HEADER_SECONDS == 10


def _asking(target: bytes) -> h11.Request:
    return h11.Request(method="GET", target=target, headers=[("host", "other"), ("x", "y")])


@pytest.mark.parametrize(
    ("target", "host", "path"),
    [
        (b"http://idem.example/health", b"idem.example", b"/health"),
        (b"HTTP://Idem.Example:8080/v1/x?q=http://a/b", b"Idem.Example:8080", b"/v1/x?q=http://a/b"),
        (b"https://[2001:db8::1]:443/ready", b"[2001:db8::1]:443", b"/ready"),
        (b"http://idem.example", b"idem.example", b"/"),
        (b"http://idem.example?q=1", b"idem.example", b"/?q=1"),
        (b"http://idem.example//health", b"idem.example", b"//health"),
    ],
)
def test_f16_an_absolute_target_is_a_path_and_its_host_counts(target: bytes, host: bytes, path: bytes) -> None:
    request = in_origin_form(_asking(target))
    assert (request.target, list(request.headers)) == (path, [(b"host", host), (b"x", b"y")])


@pytest.mark.parametrize("target", [b"/health", b"/http://a/health", b"*", b"ftp://a/health", b"http:/health", b"a:80"])
def test_f16_any_other_target_stays_what_it_is(target: bytes) -> None:
    assert in_origin_form(_asking(target)) == _asking(target)


@pytest.mark.parametrize(
    "target",
    [b"http:///health", b"http://me@a/health", b"http://a:b/", b"http://a/x#y", b"http://a%2f/x", b"http://?x"],
)
def test_f16_an_absolute_target_without_a_plain_host_is_refused(target: bytes) -> None:
    with pytest.raises(h11.RemoteProtocolError):
        in_origin_form(_asking(target))
