"""Photos and fields of one request: what is read is what was sent, and what it may cost before it is refused."""

import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar

import httpx
import pytest
from fastapi import Depends, FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api import bodies, problems, uploads
from app.api.envelope import Envelope
from app.api.uploads import FIELDS_BYTES, LONGEST_TEXT, MAXIMUM_FIELDS, PARSER_SECONDS, Upload, uploaded
from app.domain.attributes import GivenAttributes

T = TypeVar("T")

LIMIT = 1024 * 1024
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=b0undary"}
LONG = base64.b64encode(b"\xfb\xff\xfe" * LONGEST_TEXT)


class Fields(GivenAttributes):
    """What an enrolment has beside its photos."""

    gallery: str = "default"


def _page(upload: Upload[Fields]) -> dict[str, Any]:
    photos = {name: [data.hex() for data in found] for name, found in upload.photos.items()}
    return {"fields": upload.fields.model_dump(mode="json", exclude_unset=True), "photos": photos}


def _service() -> FastAPI:
    app = FastAPI()
    problems.install(app)

    async def compute(work: Callable[..., T], *arguments: object) -> T:
        return work(*arguments)

    app.state.runtime = SimpleNamespace(settings=SimpleNamespace(max_photo_bytes=LIMIT), compute=compute)

    @app.post("/one")
    async def one(upload: Annotated[Upload[Fields], Depends(uploaded(Fields, "photo"))]) -> dict[str, Any]:
        return _page(upload)

    @app.post("/five")
    async def five(upload: Annotated[Upload[Fields], Depends(uploaded(Fields, "photo", most=5))]) -> dict[str, Any]:
        return _page(upload)

    @app.post("/two")
    async def two(upload: Annotated[Upload[Fields], Depends(uploaded(Fields, "photo_a", "photo_b"))]) -> dict[str, Any]:
        return _page(upload)

    app.add_middleware(Envelope, body_limit=1024)
    return app


SERVICE = _service()


async def _sent(path: str, body: bytes, headers: dict[str, str] = JSON) -> httpx.Response:
    async def pieces() -> AsyncIterator[bytes]:
        for begin in range(0, len(body), 65536):
            yield body[begin : begin + 65536]

    async with httpx.AsyncClient(transport=httpx.ASGITransport(SERVICE), base_url="http://idem") as client:
        return await client.post(path, content=pieces(), headers=headers)


def _part(name: bytes, data: bytes, more: bytes = b"") -> bytes:
    return b'--b0undary\r\nContent-Disposition: form-data; name="' + name + b'"' + more + b"\r\n\r\n" + data + b"\r\n"


def _plain(text: bytes) -> str:
    return text.decode()


def _as_php(text: bytes) -> str:
    return text.decode().replace("/", "\\/")


def _as_dotnet(text: bytes) -> str:
    return text.decode().replace("+", "\\u002B")


def _all_escaped(text: bytes) -> str:
    return "".join(f"\\u{byte:04x}" for byte in text)


SPELLINGS = (_plain, _as_php, _as_dotnet, _all_escaped)
#: Around what is left among the fields, and what is set aside.
SIZES = (1, 2, 3, LONGEST_TEXT // 4 * 3, LONGEST_TEXT // 4 * 3 + 1, LONGEST_TEXT, 3 * LONGEST_TEXT)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("size", SIZES)
async def test_a_photo_in_json_is_read_as_it_was_sent_however_it_is_spelt(
    spelling: Callable[[bytes], str], size: int
) -> None:
    photo = (b"\xfb\xff\xfe" * size)[:size]
    text = spelling(base64.b64encode(photo))
    answer = await _sent("/one", f'{{"full_name": "Nguy\\u1ec5n \\"Ánh\\"", "photo_base64": "{text}"}}'.encode())
    assert answer.json() == {"fields": {"full_name": 'Nguyễn "Ánh"'}, "photos": {"photo": [photo.hex()]}}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from(SPELLINGS)), min_size=1, max_size=5))
async def test_several_photos_keep_their_order(photos: list[tuple[int, Callable[[bytes], str]]]) -> None:
    sent = [bytes([number]) * size for number, (size, _) in enumerate(photos)]
    texts = [f'"{spelling(base64.b64encode(data))}"' for data, (_, spelling) in zip(sent, photos, strict=True)]
    answer = await _sent("/five", f'{{"photos_base64": [{", ".join(texts)}], "gallery": "north"}}'.encode())
    assert answer.json() == {"fields": {"gallery": "north"}, "photos": {"photo": [data.hex() for data in sent]}}


async def test_each_photo_stays_under_its_name() -> None:
    body = b'{"photo_b_base64":"' + LONG + b'","photo_a_base64":"AAAA"}'
    answer = await _sent("/two", body)
    assert answer.json()["photos"] == {"photo_a": ["000000"], "photo_b": [base64.b64decode(LONG).hex()]}


@pytest.mark.parametrize(
    "body",
    [
        b'{"photo_base64":"AAAA","gallery":"%s"}' % LONG,
        b'{"photo_base64":"AAAA","%s":"x"}' % LONG,
        b'{"photo_base64":"%s","gallery":"%s"}' % (LONG, LONG),
        b'{"photo_base64":"AAAA","metadata":{"a":"%s"}}' % LONG,
        b'{"photo_base64":"AAAA","photo_base64":"%s"}' % LONG,
        b'{"photo_base64":"%s","photo_base64":"%s"}' % (LONG, LONG),
        b'{"photo_base64":["%s"]}' % LONG,
        b'{"photo_base64":"AAAA","gallery":"a\\"%s\\"b"}' % LONG,
        b'{"photo_base64":"\\"%s\\""}' % LONG,
        b'{"photo_base64":"%s\\"}' % LONG,
        b'{"photo_base64":"%s\\",\\"gallery\\":\\"north"}' % LONG,
        b'{"photo_base64":"%s\\\\"}' % LONG,
        b'{"photo_base64":"%s\\u00e9"}' % LONG,
        b'{"photo_base64":"%s\\ud800"}' % LONG,
        b'{"photo_base64":"%s\xc3\xa9"}' % LONG,
        b'{"photo_base64":"%s\xff"}' % LONG,
        b'{"photo_base64":"%s\n"}' % LONG,
        b'{"photo_base64":"%s"' % LONG,
        b'{"photo_base64":"%s}' % LONG,
        b'{"photo_base64":%s}' % LONG,
        b'{"photo_base64":%s"AAAA"}' % (b" " * 2 * LONGEST_TEXT),
        b"%s" % LONG,
    ],
    ids=lambda body: body.replace(LONG, b"LONG").decode("latin-1").replace(" " * 2 * LONGEST_TEXT, "SPACES"),
)
async def test_h33_h34_h35_a_long_text_that_is_no_photo_is_refused(body: bytes) -> None:
    answer = await _sent("/one", body)
    assert answer.status_code == 422, answer.text
    assert len(answer.content) < 2000


def _wide(piece: bytes, size: int = LIMIT) -> bytes:
    return piece * (size // len(piece))


def crowded_bodies() -> dict[str, bytes]:
    """A megabyte beside a photo of three bytes, in many little values."""
    keys = ",".join(f'"k{number}":0' for number in range(LIMIT // 12)).encode()
    return {
        "lists": b'"nonce":[' + _wide(b"[],") + b"0]",
        "objects": b'"nonce":[' + _wide(b"{},") + b"0]",
        "numbers": b'"metadata":{"a":[' + _wide(b"0,") + b"0]}",
        "long numbers": b'"metadata":{"a":[' + _wide(b"9" * 4000 + b",") + b"0]}",
        "texts": b'"metadata":{"a":[' + _wide(b'"a",') + b'"a"]}',
        "texts of a length": b'"metadata":{"a":[' + _wide(b'"' + b"a" * LONGEST_TEXT + b'",') + b'"a"]}',
        "keys": keys,
        "keys of metadata": b'"metadata":{' + keys + b"}",
        "deep and wide": b'"metadata":{"a":' + _wide(b"[" * 10 + b"0" + b"]" * 10 + b",").join([b"[", b"0]"]) + b"}",
        "escapes": b'"full_name":"' + _wide(b"\\u0041") + b'"',
        "quotes": b'"full_name":"' + _wide(b'\\"') + b'"',
        "spaces": b'"gallery":' + b" " * LIMIT + b'"north"',
        "photos": b'"photos_base64":[' + _wide(b'"",') + b'""]',
    }


@pytest.mark.parametrize("kind", crowded_bodies())
async def test_h34_a_crowd_beside_a_photo_is_refused_before_it_is_parsed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_to_parser: list[str] = []

    def loads(text: str, **how: Any) -> object:  # noqa: ANN401 - as json's own
        given_to_parser.append(text)
        return json.loads(text, **how)

    monkeypatch.setattr(bodies, "json", SimpleNamespace(loads=loads, dumps=json.dumps))
    answer = await _sent("/five", b'{"photo_base64":"AAAA",' + crowded_bodies()[kind] + b"}")
    assert answer.status_code in (413, 422), answer.text
    assert sum(map(len, given_to_parser)) <= FIELDS_BYTES + 5 * LONGEST_TEXT


async def test_h34_letters_that_take_four_bytes_do_not_make_photos_take_them() -> None:
    """Beside one such letter Python keeps four bytes for each character of a text."""
    body = '{"full_name":"\U00020bb7","photo_base64":"'.encode() + LONG + b'"}'
    answer = await _sent("/one", body)
    assert answer.json()["fields"] == {"full_name": "\U00020bb7"}


@pytest.mark.parametrize("text", [b"A" * 4 * LIMIT, b"\\u0041" * LIMIT, b"\\/" * 2 * LIMIT])
async def test_a_photo_s_text_of_more_than_a_photo_is_refused(text: bytes) -> None:
    answer = await _sent("/five", b'{"photo_base64":"' + text + b'"}')
    assert answer.status_code == 413, answer.text


async def test_h34_what_stands_beside_the_photos_has_its_own_limit() -> None:
    answer = await _sent("/one", b'{"photo_base64":"AAAA"' + b" " * LONGEST_TEXT + b"," + b" " * LONGEST_TEXT)
    assert answer.status_code == 422
    spaces = b"".join(b'"k%d":"%s",' % (number, b"a" * 30_000) for number in range(4))
    answer = await _sent("/one", b"{" + spaces + b'"photo_base64":"AAAA"}')
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("begin", "filling"), [(b"\r\n--b0undary", b" "), (b"\r\n--b0undary", b"\t"), (b"", b"\r\n--b0undaryx")]
)
async def test_h23_a_form_s_parser_works_for_a_bounded_time(begin: bytes, filling: bytes) -> None:
    began = time.thread_time()
    body = _part(b"photo", begin + _wide(filling, 5 * LIMIT), b'; filename="a"') + b"--b0undary--\r\n"
    assert (await _sent("/five", body, FORM)).status_code in (413, 422)
    assert time.thread_time() - began < 3 * PARSER_SECONDS


async def test_five_photos_take_a_small_part_of_that_time(monkeypatch: pytest.MonkeyPatch) -> None:
    body = _part(b"photo", bytes(range(256)) * 4000, b'; filename="a"') * 5 + b"--b0undary--\r\n"
    monkeypatch.setattr(uploads, "PARSER_SECONDS", PARSER_SECONDS / 5)
    assert (await _sent("/five", body, FORM)).status_code == 200
    monkeypatch.setattr(uploads, "PARSER_SECONDS", 0.0)
    assert (await _sent("/five", body, FORM)).status_code == 422


async def test_as_many_fields_as_a_form_may_have_come_through() -> None:
    body = b"".join(_part(b"k%d" % number, b"x") for number in range(MAXIMUM_FIELDS))
    answer = await _sent("/five", body + _part(b"photo", b"x", b'; filename="a"') * 5 + b"--b0undary--\r\n", FORM)
    assert {error["code"] for error in answer.json()["errors"]} == {"extra_forbidden"}


@pytest.mark.parametrize("charset", ["punycode", "idna", "undefined", "utf-16", "latin-1", "no-such", ""])
async def test_h30_a_form_is_utf_8(charset: str) -> None:
    body = _part(b"photo", b"x", b'; filename="a"') + _part(b"full_name", "Ánh".encode()) + b"--b0undary--\r\n"
    for spelling in (f"charset={charset}", f'Charset="{charset.upper()}"'):
        kind = {"Content-Type": f"{FORM['Content-Type']}; {spelling}"}
        assert (await _sent("/one", body, kind)).status_code == 415
    for spelling in ("charset=utf-8", 'CHARSET="UTF-8"', "charset=utf8"):
        kind = {"Content-Type": f"{FORM['Content-Type']}; {spelling}"}
        assert (await _sent("/one", body, kind)).json()["fields"] == {"full_name": "Ánh"}


BLANK_PARTS = {
    "texts": _part(b"full_name", b"")
    + _part(b"gallery", b" ")
    + _part(b"metadata", b"")
    + _part(b"date_of_birth", b"\t"),
    "no file": _part(b"photo", b"", b'; filename=""\r\nContent-Type: application/octet-stream'),
    "a text for a file": _part(b"photo", b""),
}


@pytest.mark.parametrize("blank", BLANK_PARTS.values(), ids=BLANK_PARTS)
@pytest.mark.parametrize("is_first", [True, False])
async def test_g10_a_field_of_a_form_that_was_left_blank_counts_as_absent(blank: bytes, *, is_first: bool) -> None:
    photo = _part(b"photo", b"x", b'; filename="a"')
    body = (blank + photo if is_first else photo + blank) + b"--b0undary--\r\n"
    answer = await _sent("/one", body, FORM)
    assert answer.json() == {"fields": {}, "photos": {"photo": ["78"]}}


async def test_g10_a_form_without_any_photo_is_refused_as_such() -> None:
    answer = await _sent("/one", BLANK_PARTS["no file"] + b"--b0undary--\r\n", FORM)
    assert [error["code"] for error in answer.json()["errors"]] == ["photo-missing"]


async def test_g10_an_empty_file_with_a_name_is_no_blank_field() -> None:
    body = _part(b"photo", b"", b'; filename="a"') + _part(b"photo", b"x", b'; filename="b"') + b"--b0undary--\r\n"
    answer = await _sent("/five", body, FORM)
    assert [error["code"] for error in answer.json()["errors"]] == ["photo-missing"]


PHOTO = bytes(range(256)) * 9 + b"\xfb\xff\xfe\xfb"


def _in_lines(text: bytes, letters: int, end: bytes) -> bytes:
    return b"".join(text[at : at + letters] + end for at in range(0, len(text), letters))


BASE64_SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "lines of 76 and CRLF, as MIME": base64.encodebytes,
    "lines of 64 and CRLF": lambda data: _in_lines(base64.b64encode(data), 64, b"\r\n"),
    "no padding": lambda data: base64.b64encode(data).rstrip(b"="),
    "URL-safe": base64.urlsafe_b64encode,
    "URL-safe, no padding": lambda data: base64.urlsafe_b64encode(data).rstrip(b"="),
    "a data URL": lambda data: b"data:image/jpeg;base64," + base64.b64encode(data),
    "a data URL with a parameter": lambda data: b"DATA:image/heic;name=a;Base64," + base64.b64encode(data),
}


@pytest.mark.parametrize("spelling", BASE64_SPELLINGS.values(), ids=BASE64_SPELLINGS)
@pytest.mark.parametrize("size", [1, 2, 3, len(PHOTO), LIMIT])
async def test_g11_base64_is_read_as_client_libraries_write_it(spelling: Callable[[bytes], bytes], size: int) -> None:
    photo = (PHOTO * -(-size // len(PHOTO)))[:size]
    answer = await _sent("/one", json.dumps({"photo_base64": spelling(photo).decode()}).encode())
    assert answer.json()["photos"] == {"photo": [photo.hex()]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("AAA=A", "'=' before its end"),
        ("AAAAA", "missing at its end"),
        ("AA===", "missing at its end"),
        ("AAAA=", "missing at its end"),
        ("AA*A", "characters that base64 does not use"),
        ("AAA\u00e9", "outside ASCII"),
        ("data:image/jpeg;base64AAAA", "no comma"),
        ("data:image/jpeg,AAAA", "not in base64"),
        (7, "a text in base64"),
    ],
)
async def test_g11_what_is_wrong_with_a_text_is_said(text: object, says: str) -> None:
    answer = await _sent("/one", json.dumps({"photo_base64": text}).encode())
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert (error["field"], error["code"]) == ("photo_base64", "base64")
    assert says in error["message"]


async def test_g11_a_body_in_json_may_begin_with_a_byte_order_mark() -> None:
    assert (await _sent("/one", b'\xef\xbb\xbf{"photo_base64":"AAAA"}')).json()["photos"] == {"photo": ["000000"]}


PREAMBLES = {
    "a line": b"This is a message in several parts.\r\n",
    "an empty line": b"\r\n",
    "what begins like a boundary": b"--b0und\r\n--b0undar\r\n",
    "many lines": b"x\r\n" * 3000,
}


@pytest.mark.parametrize("preamble", PREAMBLES.values(), ids=PREAMBLES)
@pytest.mark.parametrize("epilogue", [b"", b"\r\n", b"Nothing follows.\r\n", b"\r\n--b0undary--\r\n"])
@pytest.mark.parametrize("size", [1, 7, 100_000])
async def test_f16_what_comes_before_and_behind_the_parts_means_nothing(
    preamble: bytes, epilogue: bytes, size: int
) -> None:
    body = preamble + _part(b"photo", b"x", b'; filename="a"') + b"--b0undary--\r\n" + epilogue

    async def pieces() -> AsyncIterator[bytes]:
        for begin in range(0, len(body), size):
            yield body[begin : begin + size]

    async with httpx.AsyncClient(transport=httpx.ASGITransport(SERVICE), base_url="http://idem") as client:
        answer = await client.post("/one", content=pieces(), headers=FORM)
    assert answer.json() == {"fields": {}, "photos": {"photo": ["78"]}}


@pytest.mark.parametrize("body", [b"", b"x", b"--b0undar", b"x" * 2 * uploads.PREAMBLE_BYTES, b"\n--b0undary--\r\n"])
async def test_f16_a_body_without_a_boundary_is_refused(body: bytes) -> None:
    answer = await _sent("/one", body, FORM)
    assert answer.status_code == 422
    assert [error["code"] for error in answer.json()["errors"]] == ["multipart"]
