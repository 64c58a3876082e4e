"""What callers send is read as they sent it, or refused: encodings, times, dates, and parameters that come twice."""

import base64
import json

import httpx
import pytest

from app.documents.identities import Identity
from tests.builders import portrait
from tests.integration.conftest import PASSWORD

BOUNDARY = "caseBoundary"


def form(*parts: tuple[str, bytes]) -> bytes:
    """A body of parts: the headers behind `form-data; `, and the bytes."""
    photo = ('name="photo"; filename="a.png"\r\nContent-Type: image/png', portrait("ann"))
    pieces = [
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {headers}\r\n\r\n".encode() + data + b"\r\n"
        for headers, data in (*parts, photo)
    ]
    return b"".join(pieces) + f"--{BOUNDARY}--\r\n".encode()


async def sent(http: httpx.AsyncClient, body: bytes, kind: str = f"multipart/form-data; boundary={BOUNDARY}") -> int:
    """The status of an enrolment with this body."""
    return (await http.post("/v1/identities", content=body, headers={"Content-Type": kind})).status_code


NAME = 'name="full_name"'
#: As in forms that office programs of Thailand, Russia and Egypt send.
OTHER_ENCODINGS = {
    "tis620_name": ((NAME, "สมชาย".encode("tis-620")), 422),
    "windows1251_reference": (('name="external_ref"', "НИИ-7".encode("windows-1251")), 422),
    "utf16_name": ((NAME, "Ann".encode("utf-16")), 422),
    "overlong": ((NAME, b"\xc0\xaf"), 422),
    "half_a_surrogate_pair": ((NAME, b"\xed\xa0\x80"), 422),
    "part_says_windows1256": ((NAME + "\r\nContent-Type: text/plain; charset=windows-1256", "محمد".encode("windows-1256")), 415),
    "part_says_latin1_in_utf8": ((NAME + "\r\nContent-Type: text/plain; charset=iso-8859-1", "Zoë".encode()), 415),
    "quoted_printable": ((NAME + "\r\nContent-Transfer-Encoding: quoted-printable", b"Zo=C3=AB"), 415),
    "base64": ((NAME + "\r\nContent-Transfer-Encoding: base64", b"Wm/Dqw=="), 415),
    "form_says_windows1252": (('name="_charset_"', b"windows-1252"), 415),
    "metadata": (('name="metadata"', '{"a": "é"}'.encode("latin-1")), 422),
}  # fmt: skip


async def test_f3_text_in_another_encoding_is_refused_and_nothing_is_enrolled(officer: httpx.AsyncClient) -> None:
    for case, (part, status) in OTHER_ENCODINGS.items():
        assert await sent(officer, form(part)) == status, case
    assert await sent(officer, form((NAME, b"Ann")), f"multipart/form-data; charset=latin1; boundary={BOUNDARY}") == 415
    for body in ("utf-16", "utf-32", "latin-1"):
        page = json.dumps({"full_name": "Zoë", "photo_base64": "AAAA"}, ensure_ascii=False).encode(body)
        assert await sent(officer, page, "application/json") == 422
    assert await Identity.find_all().count() == 0


async def test_f3_utf_8_is_taken_however_a_form_says_it(officer: httpx.AsyncClient) -> None:
    plain = NAME + "\r\nContent-Type: text/plain; charset=UTF-8\r\nContent-Transfer-Encoding: 8bit"
    for parts in (
        [(plain, "محمد".encode())], [(NAME, "محمد".encode()), ('name="_charset_"', b"utf-8")],
        [(NAME + "\r\nContent-Type: text/plain; charset=us-ascii", b"Ann")],
    ):  # fmt: skip
        assert await sent(officer, form(*parts)) == 202
    page = json.dumps({"full_name": "محمد", "photo_base64": base64.b64encode(portrait("bob")).decode()})
    assert await sent(officer, b"\xef\xbb\xbf" + page.encode(), "application/json") == 202
    names = {item["full_name"] for item in (await officer.get("/v1/identities")).json()["items"]}
    assert names == {"محمد", "Ann"}


async def test_f14_a_parameter_that_comes_twice_is_refused_everywhere(officer: httpx.AsyncClient) -> None:
    for path in (
        "/v1/identities?q=a&q=b", "/v1/identities?limit=1&limit=1", "/v1/identities?q=%E9", "/v1/auth/me?a=1&a=2",
        "/v1/identities/x?reason=a&reason=b", "/.well-known/jwks.json?a=1&%61=2", "/nothing?a=1&a=2",
    ):  # fmt: skip
        refused = await officer.get(path)
        assert (refused.status_code, refused.json()["type"]) == (422, "urn:idem:problem/validation"), path
    assert await sent(officer, form((NAME, b"Ann"), (NAME, b"Bob"))) == 422
    assert (
        await sent(officer, b'{"full_name": "Ann", "full_name": "Bob", "photo_base64": ""}', "application/json") == 422
    )


async def test_f14_a_login_form_is_read_as_it_was_sent_or_refused(officer: httpx.AsyncClient) -> None:
    async def asked(body: bytes, kind: str = "application/x-www-form-urlencoded") -> int:
        answer = await officer.post("/v1/auth/token", content=body, headers={"Content-Type": kind})
        return answer.status_code

    right = f"grant_type=password&username=olga&password={PASSWORD.replace(' ', '+')}".encode()
    assert await asked(right) == 200
    assert await asked(right + b"&_charset_=UTF-8") == 200
    for wrong in (right + b"&username=olga", right + b"&otp=%E9", right + b"&otp=\xc3\xa9", right + b"&%75sername=ann"):
        assert await asked(wrong) == 422
    assert await asked(right + b"&_charset_=latin1") == 415
    assert await asked(right, "text/plain") == 415
    basic = base64.b64encode(b"%E9:x").decode()
    client = {"grant_type": "client_credentials"}
    answer = await officer.post("/v1/auth/token", data=client, headers={"Authorization": f"Basic {basic}"})
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


async def test_f10_a_filter_takes_times_with_a_zone_only(officer: httpx.AsyncClient) -> None:
    for text in (
        "2026-11-30T17:00:00",
        "2026-11-30",
        "1764547200",
        "0",
        "2026-11-30T17:00:00 07:00",
        "0000-01-01T00:00:00Z",
    ):
        for name in ("created_after", "created_before"):
            refused = await officer.get("/v1/identities", params={name: text})
            assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, name), text
            assert "time" in refused.json()["errors"][0]["message"]
    for text in ("2026-11-30T17:00:00Z", "2026-11-30t17:00:00z", "2016-12-31T23:59:60Z", "2026-12-01T00:00:00+07:00"):
        assert (await officer.get("/v1/identities", params={"created_after": text})).status_code == 200, text


async def test_f8_a_date_of_birth_is_a_day_that_has_been(officer: httpx.AsyncClient) -> None:
    photo = base64.b64encode(portrait("ann")).decode()
    ann = await officer.post("/v1/identities", json={"date_of_birth": "1990-01-31", "photo_base64": photo})
    assert ann.status_code == 202
    path = f"/v1/identities/{ann.json()['id']}"
    wrong: list[object] = [
        "2533-01-31",
        "2999-01-01",
        "1700-01-01",
        631152000,
        0,
        "631152000",
        "1990-01-31T00:00:00Z",
        "31/01/1990",
        True,
    ]
    for born in wrong:
        for answer in (
            await officer.patch(path, json={"date_of_birth": born}),
            await officer.post("/v1/identities", json={"date_of_birth": born, "photo_base64": photo}),
        ):
            assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "date_of_birth"), born
    buddhist = await officer.patch(path, json={"date_of_birth": "2533-01-31"})
    assert "write 1990 instead of 2533" in buddhist.json()["detail"]
    assert (await officer.get(path)).json()["date_of_birth"] == "1990-01-31"
    for born in ("1991-02-28", None):
        assert (await officer.patch(path, json={"date_of_birth": born})).json()["date_of_birth"] == born


@pytest.mark.parametrize("stored", ["2533-01-31", "1700-01-01"])
async def test_f8_a_date_that_is_kept_already_stays(officer: httpx.AsyncClient, stored: str) -> None:
    photo = base64.b64encode(portrait("ann")).decode()
    with pytest.MonkeyPatch.context() as former:
        former.setattr("app.use_cases.enrol.birth_date_fault", lambda *_: None)
        ann = await officer.post("/v1/identities", json={"date_of_birth": stored, "photo_base64": photo})
    path = f"/v1/identities/{ann.json()['id']}"
    changed = await officer.patch(path, json={"full_name": "Ann"})
    assert (changed.status_code, changed.json()["date_of_birth"]) == (200, stored)
    assert (await officer.get(f"{path}/export")).json()["identity"]["date_of_birth"] == stored
