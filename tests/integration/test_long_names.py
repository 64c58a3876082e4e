"""Texts of any length at the doors where nobody is known yet, and in headers."""

import unicodedata
from types import SimpleNamespace
from typing import Literal

import pytest

from app.api.identities import _version
from app.domain import spelling
from app.domain.callers import USERNAME_MAXIMUM
from app.errors import PreconditionFailed
from tests.support.accounts import ADMIN, PASSWORD, AccountService

#: Each of the second kind belongs before all of the first.
UNORDERED = "\u0301" * 1000 + "\u0316" * 1000


async def test_h31_h56_a_login_s_name_costs_no_more_for_its_length(
    service: AccountService, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalized: list[int] = []

    def normalize(form: Literal["NFKC"], text: str) -> str:
        normalized.append(len(text))
        return unicodedata.normalize(form, text)

    monkeypatch.setattr(spelling, "unicodedata", SimpleNamespace(normalize=normalize))
    wrong = await service.try_password("nobody")
    for name in (ADMIN + UNORDERED, "a" * 200_000, UNORDERED):
        answer = await service.try_password(name, PASSWORD)
        assert (answer.status_code, answer.json()) == (wrong.status_code, wrong.json())
    assert 0 < max(normalized) <= USERNAME_MAXIMUM


@pytest.mark.parametrize("charset", ["punycode", "idna", "undefined", "utf-16", "no-such"])
async def test_h30_no_charset_is_asked_for_a_form_s_text(service: AccountService, charset: str) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="grant_type"\r\n\r\npassword-\r\n--b--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    for path in ("/v1/auth/token", "/v1/auth/revoke"):
        answer = await service.http.post(path, content=body, headers=headers)
        assert answer.status_code == 415, answer.text


@pytest.mark.parametrize("digits", [19, 5000, 30_000])
def test_h34_a_version_of_many_digits_is_no_version(digits: int) -> None:
    assert _version('"999999999999999999"') == 10**18 - 1
    with pytest.raises(PreconditionFailed):
        _version('"' + "9" * digits + '"')
