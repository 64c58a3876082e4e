"""A stranger's failures refuse the right password nowhere but where the stranger is; and guessing stays slow."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from app.access import backoff, passwords
from app.access.backoff import DAY_SECONDS, Backoff
from app.access.passwords import PasswordPool
from app.documents.events import AuditEvent
from app.documents.failed_logins import FailedLogins, Waits
from app.errors import RateLimited
from tests.support.accounts import AccountService

#: Addresses of documentation, each in a network of its own.
NEW_ADDRESSES = ("203.0.113.7", "2001:db8:ffff::7")


def scattered() -> Iterator[str]:
    """Addresses without end, IPv4 and IPv6 in turn, no two of one network."""
    for number in itertools.count(1):
        yield f"10.{number % 200}.{number // 200}.9" if number % 2 else f"2a00:{number:x}:0:1::9"


def of_one_network() -> Iterator[str]:
    """The addresses of an IPv4 network of 24 bits."""
    return (f"198.51.100.{number}" for number in range(1, 255))


@dataclass(slots=True)
class Guesser:
    """Somebody who guesses one name's password as fast as they are let, by a clock of their own."""

    backoff: Backoff
    name: str
    second: float = 0.0
    guesses: int = 0

    async def guess(self, address: str) -> float:
        """Guess from there until there is a wait. Returns for how many seconds."""
        while True:
            try:
                attempt = await self.backoff.begin(self.name, address)
                await attempt.failed()
            except RateLimited as wait:
                return float(wait.retry_after_seconds or 0)
            self.guesses += 1

    async def sleep(self, seconds: float) -> None:
        """Let the time pass, as if everything had happened so much earlier."""
        self.second += seconds
        fields = ("wait_until", "forgotten_at", "known_until")
        earlier = {field: {"$subtract": [f"${field}", int(seconds * 1000)]} for field in fields}
        await FailedLogins.get_pymongo_collection().update_many({}, [{"$set": earlier}])

    async def for_a_day(self, addresses: list[str]) -> int:
        """How many guesses one day brings from all of these addresses."""
        self.guesses, end = 0, self.second + DAY_SECONDS
        ready = dict.fromkeys(addresses, self.second)
        while True:
            soonest = min(ready.values())
            if soonest >= end:
                await self.sleep(end - self.second)
                return self.guesses
            await self.sleep(max(0.0, soonest - self.second))
            for address in [one for one, moment in ready.items() if moment <= self.second]:
                ready[address] = self.second + await self.guess(address)


@pytest.fixture
def guesser(service: AccountService) -> Guesser:
    """Somebody who guesses as production lets them."""
    settings = service.runtime.settings.model_copy(update={"login_failures_before_wait_address": 5})
    return Guesser(Backoff(settings, service.runtime.keys), "user:ann")


@pytest.mark.parametrize("who", ["known", "unknown"])
async def test_a10_a_right_password_is_taken_from_a_new_address_whatever_strangers_do_elsewhere(
    service: AccountService, guesser: Guesser, who: str
) -> None:
    if who == "known":
        await service.user("ann")
    await service.user("bob")
    one, many = ["192.0.2.66"], list(itertools.islice(scattered(), 60))
    for addresses in (one, many, list(of_one_network())[:40]):
        for address in addresses:
            await guesser.guess(address)
        new = NEW_ADDRESSES[len(addresses) % 2]
        async with service.at(new) as there:
            await there.log_in("bob")
            if who == "known":
                await there.log_in("ann")
            # A slip counts there only, and is answered as ever.
            wrong = await there.try_password("bob" if who == "unknown" else "ann")
            assert wrong.status_code == 400


async def test_a10_a_client_s_right_secret_is_taken_too(service: AccountService, guesser: Guesser) -> None:
    client, form = await service.client()
    guesser.name = f"client:{client.id}"
    for address in itertools.islice(scattered(), 30):
        await guesser.guess(address)
    async with service.at(NEW_ADDRESSES[0]) as there:
        assert (await there.token(**form)).status_code == 200


async def test_a10_a_name_under_attack_gets_fewer_guesses_from_each_address_and_longer_waits(guesser: Guesser) -> None:
    addresses = scattered()
    for _ in range(4):
        before = guesser.guesses
        assert await guesser.guess(next(addresses)) == 30
        assert guesser.guesses - before == 5
    fresh, before, seen = next(addresses), guesser.guesses, []
    for _ in range(9):
        seen.append(await guesser.guess(fresh))
        await guesser.sleep(seen[-1])
    assert guesser.guesses - before == 10
    assert seen == pytest.approx([900 * 2**n for n in range(7)] + [DAY_SECONDS] * 2, abs=3)
    # Two days of quiet end it.
    await guesser.sleep(2 * DAY_SECONDS)
    before = guesser.guesses
    assert await guesser.guess(next(addresses)) == 30
    assert guesser.guesses - before == 5


async def test_a10_guesses_a_day_are_those_that_the_decision_states(guesser: Guesser) -> None:
    """ADR 0047 has these figures."""
    assert [await guesser.for_a_day(["192.0.2.66"]) for _ in range(2)] == [21, 1]
    guesser.name = "user:bob"
    scattered_ones = list(itertools.islice(scattered(), 40))
    first = await guesser.for_a_day(scattered_ones)
    assert 8 * 36 < first <= 20 + 9 * 36
    assert await guesser.for_a_day(scattered_ones) <= 40


async def test_a10_a_full_network_gets_256_guesses_and_then_waits_as_a_whole(guesser: Guesser) -> None:
    wait = 0.0
    for address in of_one_network():
        wait = await guesser.guess(address)
    assert guesser.guesses == backoff.IN_NETWORK[0].failures
    assert 0 < wait <= 900
    # A new address of it waits too, and one of the next network does not.
    assert await guesser.guess("198.51.100.255") <= 900
    before = guesser.guesses
    await guesser.guess("198.51.101.1")
    assert guesser.guesses - before == 2


@pytest.mark.parametrize(
    ("inside", "outside"),
    [("2001:db8:0:{:x}::1", "2001:db8:1:{:x}::1"), ("10.7.0.{}", "10.7.1.{}")],
)
async def test_a10_the_networks_of_both_kinds_of_addresses_are_counted(
    guesser: Guesser, monkeypatch: pytest.MonkeyPatch, inside: str, outside: str
) -> None:
    day = DAY_SECONDS
    monkeypatch.setattr(backoff, "IN_NETWORK", (Waits(12, 900, day, day), Waits(20, 900, day, day)))
    for number in range(1, 9):
        await guesser.guess(inside.format(number))
    assert guesser.guesses == 12
    for number in range(3):
        await guesser.guess(outside.format(number))
    assert guesser.guesses == 20, "the next network is in the same wide one"


async def test_a10_a_success_takes_back_its_own_slips_from_the_networks_and_no_others(service: AccountService) -> None:
    await service.user("ann")
    async with service.at("198.51.100.9") as stranger:
        for _ in range(3):
            await stranger.try_password("ann")
    for _ in range(2):
        await service.try_password("ann")
    await service.log_in("ann")
    counted = [row.failures for row in await FailedLogins.find({"is_network": True}).to_list()]
    assert sorted(counted) == [0, 3]


async def test_a10_an_attack_from_many_networks_is_one_alarm(service: AccountService) -> None:
    ann = await service.user("ann")
    for name in ("ann", "nobody"):
        for address in itertools.islice(scattered(), 12):
            async with service.at(address) as stranger:
                for _ in range(3):
                    await stranger.try_password(name)
    events = await service.events("auth.alarm")
    assert [(event.actor.kind, event.subject.kind, event.subject.id) for event in events] == [
        ("system", "user", ann.id), ("system", "none", None),
    ]  # fmt: skip
    assert all(event.detail["failures"] >= 20 and event.detail["networks"] >= 5 for event in events)


async def test_a10_an_attack_from_one_address_is_no_alarm_of_many_networks(guesser: Guesser) -> None:
    await guesser.for_a_day(["192.0.2.66"])
    assert await AuditEvent.find({"action": "auth.alarm"}).count() == 0


@asynccontextmanager
async def attacked(service: AccountService, strangers: int) -> AsyncIterator[None]:
    """So many strangers guess without a pause, each from ever new addresses of one network, all names alike."""
    over = asyncio.Event()

    async def guess(number: int) -> None:
        for host in itertools.cycle(range(1, 255)):
            if over.is_set():
                return
            async with service.at(f"10.9.{number}.{host}") as stranger:
                await stranger.try_password(f"user{number}-{host}")

    tasks = [asyncio.create_task(guess(number)) for number in range(strangers)]
    try:
        yield
    finally:
        over.set()
        await asyncio.gather(*tasks)


async def test_a10_a_flood_of_guesses_does_not_take_the_line_of_the_password_pool(
    service: AccountService, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.user("ann")
    matches = passwords.password_matches

    def slow(password: str, hashed: str | None) -> bool:
        time.sleep(0.25)
        return matches(password, hashed)

    monkeypatch.setattr(passwords, "password_matches", slow)
    monkeypatch.setattr(service.runtime, "passwords", PasswordPool(threads=1, line=4))
    async with attacked(service, 12):
        await asyncio.sleep(1)
        for number in range(5):
            async with service.at(f"203.0.{number}.7") as there:
                await there.log_in("ann")
