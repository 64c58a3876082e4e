"""The second factor of people: begun, confirmed, asked for, counted once, removed."""

import asyncio
import time
from datetime import UTC, datetime

import httpx
import pyotp
import pytest

from app.access import second_factor
from app.access.second_factor import STEP_SECONDS
from app.audit import by_system
from app.documents.accounts import User
from app.use_cases.keep_users import unlock_user
from tests.support.accounts import ADMIN, PASSWORD, AccountService, bearer


class Clock:
    """The time as the second factor sees it, moved by hand."""

    def __init__(self) -> None:
        self.now = float(int(time.time()) // STEP_SECONDS * STEP_SECONDS)

    def present(self) -> datetime:
        """The present time, as it is stored in documents."""
        return datetime.fromtimestamp(self.now, UTC)

    def next_step(self) -> None:
        """Half a minute later."""
        self.now += STEP_SECONDS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of one-time codes."""
    made = Clock()
    monkeypatch.setattr(second_factor, "now", made.present)
    return made


async def begin(service: AccountService, username: str = "ann") -> tuple[str, dict[str, str]]:
    """A secret that waits for its confirmation, and the header of its owner."""
    owner = bearer((await service.log_in(username)).access)
    answer = await service.http.post("/v1/auth/totp", json={"current_password": PASSWORD}, headers=owner)
    assert answer.status_code == 201, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()["secret"], owner


async def confirm(service: AccountService, code: str, owner: dict[str, str]) -> httpx.Response:
    """Confirm it."""
    return await service.http.post("/v1/auth/totp/confirm", json={"otp": code}, headers=owner)


def code_of(secret: str, clock: Clock, steps: int = 0) -> str:
    """The code of now, or of so many half minutes later."""
    return str(pyotp.TOTP(secret).at(int(clock.now) + steps * STEP_SECONDS))


@pytest.fixture
async def secret(service: AccountService, clock: Clock) -> str:
    """Ann's secret, in force."""
    await service.user("ann")
    secret, owner = await begin(service)
    assert (await confirm(service, code_of(secret, clock), owner)).status_code == 204
    clock.next_step()
    return secret


async def test_a_factor_is_asked_for_once_it_was_confirmed(service: AccountService, clock: Clock) -> None:
    user = await service.user("ann")
    secret, owner = await begin(service)
    await service.log_in("ann")  # not confirmed yet
    assert (await confirm(service, code_of(secret, clock, 5), owner)).status_code == 403
    assert (await confirm(service, code_of(secret, clock), owner)).status_code == 204
    assert (await service.try_password("ann", PASSWORD)).status_code == 400
    clock.next_step()
    await service.log_in("ann", otp=code_of(secret, clock))
    admin = bearer((await service.log_in()).access)
    assert (await service.http.get(f"/v1/users/{user.id}", headers=admin)).json()["second_factor"] is True
    success = [event for event in await service.events("auth.login") if event.outcome == "success"]
    assert [event.detail["grant"] for event in success] == ["password", "password", "password otp", "password"]


async def test_the_secret_suits_any_authenticator_and_lies_nowhere_in_the_clear(
    service: AccountService, clock: Clock
) -> None:
    user = await service.user("ann")
    owner = bearer((await service.log_in("ann")).access)
    page = (await service.http.post("/v1/auth/totp", json={"current_password": PASSWORD}, headers=owner)).json()
    read = pyotp.parse_uri(page["uri"])
    assert isinstance(read, pyotp.TOTP)
    assert (read.secret, read.name, read.issuer, read.digits, read.interval) == (page["secret"], "ann", "Idem", 6, 30)
    assert len(page["secret"]) == 32
    stored = await User.get_pymongo_collection().find_one({"_id": user.id})
    assert page["secret"] not in str(stored)
    assert page["secret"].encode() not in stored["sealed_totp"] if stored else None


async def test_without_or_with_a_wrong_code_the_answer_is_that_of_a_wrong_password(
    service: AccountService, secret: str, clock: Clock
) -> None:
    wrong = "000000" if code_of(secret, clock) != "000000" else "111111"
    answers = [
        await service.try_password("ann"),
        await service.try_password("ann", PASSWORD),
        await service.try_password("ann", PASSWORD, otp=wrong),
        await service.try_password("ann", PASSWORD, otp="not a code"),
    ]
    assert {answer.status_code for answer in answers} == {400}
    assert len({answer.text for answer in answers}) == 1
    # A fifth failure, of whichever kind, and there is a wait.
    assert (await service.try_password("ann", otp=code_of(secret, clock))).status_code == 400
    assert (await service.try_password("ann", PASSWORD, otp=code_of(secret, clock))).status_code == 429
    reasons = [event.detail.get("reason") for event in await service.events("auth.login") if event.outcome == "denied"]
    assert reasons[:5] == ["wrong_password", "wrong_code", "wrong_code", "wrong_code", "wrong_password"]


async def test_a_code_counts_once_also_at_the_same_moment(service: AccountService, secret: str, clock: Clock) -> None:
    code = code_of(secret, clock)
    answers = await asyncio.gather(*(service.try_password("ann", PASSWORD, otp=code) for _ in range(3)))
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400]
    assert (await service.try_password("ann", PASSWORD, otp=code)).status_code == 400
    # Nor does the code that confirmed the factor, or any older one.
    assert (await service.try_password("ann", PASSWORD, otp=code_of(secret, clock, -1))).status_code == 400


@pytest.mark.parametrize(("steps", "status"), [(-2, 400), (0, 200), (1, 200), (2, 400)])
async def test_codes_of_half_a_minute_around_count(
    service: AccountService, secret: str, clock: Clock, steps: int, status: int
) -> None:
    clock.next_step()
    clock.next_step()
    code = code_of(secret, clock, steps)
    assert (await service.try_password("ann", PASSWORD, otp=f"{code[:3]} {code[3:]}")).status_code == status


@pytest.mark.parametrize("proof", ["password", "code"])
async def test_the_owner_removes_it_by_the_password_or_a_code(
    service: AccountService, secret: str, clock: Clock, proof: str
) -> None:
    owner = bearer((await service.log_in("ann", otp=code_of(secret, clock))).access)
    clock.next_step()
    for wrong in ({}, {"current_password": "a wrong horse"}, {"otp": "x"}):
        answer = await service.http.request("DELETE", "/v1/auth/totp", json=wrong, headers=owner)
        assert answer.status_code == 403
    right = {"current_password": PASSWORD} if proof == "password" else {"otp": code_of(secret, clock)}
    assert (await service.http.request("DELETE", "/v1/auth/totp", json=right, headers=owner)).status_code == 204
    assert (await service.http.request("DELETE", "/v1/auth/totp", json=right, headers=owner)).status_code == 409
    await service.log_in("ann")


async def test_a_factor_in_force_is_not_replaced_and_one_that_was_not_begun_not_confirmed(
    service: AccountService, secret: str, clock: Clock
) -> None:
    owner = bearer((await service.log_in("ann", otp=code_of(secret, clock))).access)
    again = await service.http.post("/v1/auth/totp", json={"current_password": PASSWORD}, headers=owner)
    assert again.status_code == 409
    assert (await confirm(service, code_of(secret, clock), owner)).status_code == 409
    admin = bearer((await service.log_in()).access)
    assert (await confirm(service, "000000", admin)).status_code == 409


async def test_who_begins_one_proves_once_more_who_they_are(service: AccountService) -> None:
    owner = bearer((await service.log_in()).access)
    answers = [
        await service.http.post("/v1/auth/totp", json={"current_password": "a guess"}, headers=owner) for _ in range(6)
    ]
    assert [answer.status_code for answer in answers] == [403] * 5 + [429]
    _, form = await service.client()
    async with service.at("192.0.2.77") as elsewhere:
        app = bearer((await elsewhere.token(**form)).json()["access_token"])
    refused = await service.http.post("/v1/auth/totp", json={"current_password": "x"}, headers=app)
    assert refused.status_code == 403


async def test_a_secret_begun_anew_makes_the_former_one_void(service: AccountService, clock: Clock) -> None:
    await service.user("ann")
    first, owner = await begin(service)
    second, _ = await begin(service)
    assert (await confirm(service, code_of(first, clock), owner)).status_code == 403
    assert (await confirm(service, code_of(second, clock), owner)).status_code == 204


async def test_of_two_confirmations_at_the_same_moment_one_counts(service: AccountService, clock: Clock) -> None:
    await service.user("ann")
    secret, owner = await begin(service)
    code = code_of(secret, clock)
    answers = await asyncio.gather(*(confirm(service, code, owner) for _ in range(3)))
    assert sorted(answer.status_code for answer in answers) == [204, 409, 409]


async def test_an_admin_takes_it_from_somebody_who_lost_it_and_can_give_nobody_one(
    service: AccountService, secret: str
) -> None:
    user = await User.find_one({"username": "ann"})
    assert user is not None
    admin = bearer((await service.log_in(ADMIN)).access)
    path = f"/v1/users/{user.id}"
    assert (await service.http.patch(path, json={"second_factor": True}, headers=admin)).status_code == 422
    other = await service.http.patch(path, json={"galleries": None}, headers=admin)
    assert other.json()["second_factor"] is True
    answer = await service.http.patch(path, json={"second_factor": False}, headers=admin)
    assert answer.json()["second_factor"] is False
    await service.log_in("ann")
    (*_, event) = await service.events("user.update")
    assert event.detail["changes"] == {"second_factor": {"old": True, "new": False}}


async def test_an_operator_takes_it_away_at_the_command_line(service: AccountService, secret: str) -> None:
    await unlock_user(service.runtime, by_system("user.unlock"), "ann", takes_factor=True)
    await service.log_in("ann")
