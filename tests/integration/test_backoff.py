"""Failed logins cost time, by name and by address, on all processes together; and nobody is kept out by others."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import httpx
import pytest

from app.access import callers
from app.access.backoff import (
    HOUR_SECONDS,
    Backoff,
)
from app.audit import by_system
from app.documents.accounts import Client, User
from app.documents.base import now
from app.documents.failed_logins import KNOWN_SECONDS, FailedLogins
from app.domain.callers import Role
from app.errors import NotFound, RateLimited
from app.use_cases.keep_users import unlock_user
from tests.support.accounts import ADMIN, ELSEWHERE, HERE, PASSWORD, AccountService, bearer

WRONG = 5


async def pass_time(seconds: float) -> None:
    """As if all failures had happened so much earlier."""
    fields = ("wait_until", "forgotten_at", "known_until")
    earlier = {field: {"$subtract": [f"${field}", int(seconds * 1000)]} for field in fields}
    await FailedLogins.get_pymongo_collection().update_many({}, [{"$set": earlier}])


async def fail(service: AccountService, username: str, times: int = WRONG) -> list[int]:
    """So many wrong passwords; the answers' statuses."""
    return [(await service.try_password(username)).status_code for _ in range(times)]


def waits(answer: httpx.Response) -> int:
    """How long a refusal tells to wait, checked to be the contract's."""
    assert answer.status_code == 429, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"].endswith("rate-limited")
    return int(answer.headers["retry-after"])


@asynccontextmanager
async def strict(service: AccountService, limit: int = WRONG) -> AsyncIterator[None]:
    """As many failures from an address as production grants."""
    runtime = service.runtime
    before = runtime.backoff
    settings = runtime.settings.model_copy(update={"login_failures_before_wait_address": limit})
    runtime.backoff = Backoff(settings, runtime.keys)
    yield
    runtime.backoff = before


async def test_h56_after_five_wrong_passwords_even_the_right_one_has_to_wait(service: AccountService) -> None:
    await service.user("ann")
    assert await fail(service, "ann") == [400] * WRONG
    right = await service.try_password("ann", PASSWORD)
    assert 28 <= waits(right) <= 30
    await pass_time(30)
    await service.log_in("ann")


async def test_h56_an_unknown_user_is_told_the_same_from_the_first_failure_to_the_wait(service: AccountService) -> None:
    await service.user("ann")
    known = [await service.try_password("ann") for _ in range(WRONG + 1)]
    unknown = [await service.try_password("nobody") for _ in range(WRONG + 1)]
    assert [one.status_code for one in known] == [one.status_code for one in unknown] == [400] * WRONG + [429]
    assert [one.json() for one in known[:WRONG]] == [one.json() for one in unknown[:WRONG]]
    assert waits(known[-1]) == pytest.approx(waits(unknown[-1]), abs=2)
    assert known[-1].json()["detail"] == unknown[-1].json()["detail"]


async def test_h56_each_failure_doubles_the_wait_up_to_a_quarter_of_an_hour(service: AccountService) -> None:
    await fail(service, "ann", WRONG - 1)
    seen = []
    for _ in range(8):
        assert await fail(service, "ann", 1) == [400]
        seconds = waits(await service.try_password("ann"))
        seen.append(seconds)
        await pass_time(seconds)
    assert seen == pytest.approx([30, 60, 120, 240, 480, 900, 900, 900], abs=2)


async def test_waiting_itself_costs_nothing_and_a_quiet_hour_forgives(service: AccountService) -> None:
    await fail(service, "ann")
    for _ in range(20):
        assert waits(await service.try_password("ann")) <= 30
    await pass_time(30 + HOUR_SECONDS)
    assert await fail(service, "ann") == [400] * WRONG


async def test_h56_of_many_guesses_at_once_no_more_are_answered_than_were_left(service: AccountService) -> None:
    await service.user("ann")
    answers = await asyncio.gather(*(service.try_password("ann") for _ in range(25)))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(400) == WRONG
    assert statuses.count(429) == 25 - WRONG


async def test_a_failure_that_brings_no_wait_holds_up_no_attempt_that_began_a_moment_before(
    service: AccountService,
) -> None:
    """MongoDB gives a command the time of its beginning. The commands of several attempts may end in another order."""
    await service.user("ann")
    assert (await service.try_password("ann")).status_code == 400
    await service.log_in(ADMIN)
    rows = await FailedLogins.find().to_list()
    assert rows
    assert all(row.wait_until < now() - timedelta(minutes=1) for row in rows)


async def test_h56_a_right_guess_among_many_tells_nothing_once_the_wait_began(service: AccountService) -> None:
    await service.user("ann")
    attempt = await service.runtime.backoff.begin("user:ann", HERE)
    assert await fail(service, "ann") == [400] * WRONG
    with pytest.raises(RateLimited):
        await attempt.succeeded()


async def test_h56_whoever_logged_in_from_an_address_lately_is_not_kept_out_by_failures_elsewhere(
    service: AccountService,
) -> None:
    await service.user("ann")
    await service.log_in("ann")
    async with service.at(ELSEWHERE) as elsewhere:
        assert await fail(elsewhere, "ann", WRONG + 1) == [400] * WRONG + [429]
        await service.log_in("ann")
        # The attacker gains nothing by her login, and she does from there only after the wait.
        waits(await elsewhere.try_password("ann", PASSWORD))
        # At her own address her own failures count.
        assert await fail(service, "ann", WRONG + 1) == [400] * WRONG + [429]
        # Neither there nor here does it matter later on what somebody does at the other address.
        await pass_time(KNOWN_SECONDS)
        await fail(elsewhere, "ann")
        await service.log_in("ann")


async def test_h56_many_names_from_one_address_have_to_wait_and_its_own_people_do_not(
    service: AccountService,
) -> None:
    for name in ("ann", "bob"):
        await service.user(name)
    await service.log_in("ann")
    async with strict(service):
        statuses = [(await service.try_password(f"user{number}")).status_code for number in range(40)]
        assert statuses == [400] * WRONG + [429] * (40 - WRONG)
        await service.log_in("ann")  # who logged in from there lately
        waits(await service.try_password("bob", PASSWORD))
        async with service.at(ELSEWHERE) as elsewhere:
            await elsewhere.log_in("bob")
        await pass_time(30)
        await service.log_in("bob")


async def test_h56_an_outsiders_address_that_waits_does_not_tell_who_logs_in_elsewhere(service: AccountService) -> None:
    await service.user("ann")
    await service.log_in("ann")
    async with strict(service), service.at(ELSEWHERE) as elsewhere:
        for number in range(WRONG):
            await elsewhere.try_password(f"user{number}")
        known, unknown = await elsewhere.try_password("ann"), await elsewhere.try_password("nobody")
        assert waits(known) == pytest.approx(waits(unknown), abs=2)
        assert known.json()["detail"] == unknown.json()["detail"]


async def test_a_success_takes_back_from_the_address_what_this_name_cost_it_and_no_more(
    service: AccountService,
) -> None:
    await service.user("ann")
    async with strict(service):
        await fail(service, "nobody", 2)
        await fail(service, "ann", 2)
        await service.log_in("ann")
        assert await fail(service, "somebody", 4) == [400, 400, 400, 429]


async def test_in_development_one_address_may_fail_more_often(service: AccountService) -> None:
    statuses = [(await service.try_password(f"user{number}")).status_code for number in range(2 * WRONG)]
    assert statuses == [400] * (2 * WRONG)


async def test_addresses_of_one_subscriber_count_as_one(service: AccountService) -> None:
    async with strict(service):
        for number in range(WRONG):
            await (await service.runtime.backoff.begin(f"user:{number}", f"2001:db8:0:1::{number}")).failed()
        with pytest.raises(RateLimited):
            await service.runtime.backoff.begin("user:x", "2001:db8:0:1:ffff::9")
        await service.runtime.backoff.begin("user:x", "2001:db8:0:2::1")


async def test_all_processes_count_together(service: AccountService) -> None:
    elsewhere = Backoff(service.runtime.settings, service.runtime.keys)
    await fail(service, "ann", 3)
    for _ in range(2):
        await (await elsewhere.begin("user:ann", HERE)).failed()
    waits(await service.try_password("ann"))


async def test_a_clients_wrong_secrets_cost_time_too(service: AccountService) -> None:
    client, form = await service.client()
    wrong = form | {"client_secret": "wrong"}
    statuses = [(await service.token(**wrong)).status_code for _ in range(WRONG)]
    assert statuses == [400] * WRONG
    waits(await service.token(**form))
    assert await Client.count() == 1
    await pass_time(30)
    assert (await service.token(**form)).status_code == 200
    unknown = form | {"client_id": "nobody"}
    assert [(await service.token(**unknown)).status_code for _ in range(WRONG + 1)] == [400] * WRONG + [429]
    assert {event.actor.id for event in await service.events("auth.login")} >= {client.id}


async def test_guessing_the_current_password_with_a_stolen_token_costs_time(service: AccountService) -> None:
    tokens = await service.log_in()
    change = {"current_password": "a guess", "new_password": "an even better horse"}
    answers = [
        await service.http.post("/v1/auth/password", json=change, headers=bearer(tokens.access))
        for _ in range(WRONG + 1)
    ]
    assert [answer.status_code for answer in answers] == [403] * WRONG + [429]
    waits(answers[-1])


async def test_another_password_by_an_admin_forgives_wherever_it_was(service: AccountService) -> None:
    user = await service.user("ann")
    await service.log_in("ann")
    async with service.at(ELSEWHERE) as elsewhere:
        await fail(service, "ann")
        await fail(elsewhere, "ann")
        admin = bearer((await service.log_in()).access)
        change = {"password": "another horse"}
        assert (await service.http.patch(f"/v1/users/{user.id}", json=change, headers=admin)).status_code == 200
        await service.log_in("ann", "another horse")
        await elsewhere.log_in("ann", "another horse")


async def test_an_operator_lets_somebody_in_again(service: AccountService) -> None:
    await service.user("ann")
    await service.log_in("ann")
    await fail(service, "ann")
    await unlock_user(service.runtime, by_system("user.unlock"), "ANN")
    await service.log_in("ann")
    assert [event.actor.kind for event in await service.events("user.unlock")] == ["system"]
    with pytest.raises(NotFound):
        await unlock_user(service.runtime, by_system("user.unlock"), "nobody")


async def test_those_who_wait_are_in_the_log_once_a_minute_and_their_names_nowhere(service: AccountService) -> None:
    await fail(service, "my pass phrase", WRONG + 5)
    events = await service.events("auth.login")
    assert 1 <= len(events) <= 3
    assert {event.outcome for event in events} == {"denied"}
    stored = str(await FailedLogins.get_pymongo_collection().find().to_list())
    assert "pass phrase" not in stored
    assert HERE not in stored


async def test_h60_a_clock_that_jumps_neither_ends_a_wait_nor_makes_one_longer(
    service: AccountService, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fail(service, "ann")
    for jump in (3600, -3600, 86_400):
        real = time.time()
        monkeypatch.setattr(time, "time", lambda at=real + jump: at)
        assert 20 <= waits(await service.try_password("ann")) <= 30
        monkeypatch.undo()


async def test_h60_what_is_known_of_a_caller_ages_by_the_monotonic_clock(
    service: AccountService, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = await service.log_in()
    assert await service.holds(tokens.access)
    reads = 0
    behind = callers._user_behind

    async def counted(claims: callers.TokenClaims) -> callers.Caller | None:
        nonlocal reads
        reads += 1
        return await behind(claims)

    monkeypatch.setattr(callers, "_user_behind", counted)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 600)  # within the token's life
    assert await service.holds(tokens.access)
    assert reads == 0
    monkeypatch.setattr(time, "time", lambda: real() + 3600)  # beyond it, by this host's clock alone
    assert await service.holds(tokens.access)
    assert reads == 0
    monkeypatch.setattr(time, "time", real)
    await asyncio.sleep(callers.STANDING_SECONDS)
    assert await service.holds(tokens.access)
    assert reads == 1


async def test_a_known_address_is_forgotten_after_a_month(service: AccountService) -> None:
    await service.log_in(ADMIN)
    row = await FailedLogins.find_one({"known_until": {"$ne": None}})
    assert row is not None
    assert row.known_until is not None
    assert row.expires_at == row.known_until
    assert timedelta(days=29) < row.known_until - now() <= timedelta(days=30)


async def test_h56_a_failed_login_takes_as_long_for_a_name_that_nobody_bears(service: AccountService) -> None:
    # Hashes are cheap here: what is left is all that the two could differ in.
    names = [(f"known{number}", f"unknown{number}") for number in range(60)]
    hashed = await service.runtime.passwords.hashed(PASSWORD)
    roles = [Role.OFFICER]
    await User.insert_many(
        [User(username=known, username_key=known, password_hash=hashed, roles=roles) for known, _ in names]
    )

    async def milliseconds(name: str) -> float:
        began = time.perf_counter()
        assert (await service.try_password(name)).status_code == 400
        return (time.perf_counter() - began) * 1000

    async with strict(service, limit=1000):
        pairs = [(await milliseconds(known), await milliseconds(unknown)) for known, unknown in names]
    # The fastest quarter of them: what a busy machine adds says nothing.
    known, unknown = (statistics.quantiles(side, n=4)[0] for side in zip(*pairs, strict=True))
    assert abs(known - unknown) < max(5, known / 8), (known, unknown)
