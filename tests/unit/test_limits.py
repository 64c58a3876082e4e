"""Rates while Redis is away: each process counts alone, and logins fail closed."""

import time
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app import limits
from app.config import DEVELOPMENT_RATE, PRODUCTION_RATES, Settings
from app.domain.callers import subscriber
from app.errors import NotReady
from app.keys import KeyRing
from app.limits import ALONE_SHARE, RateLimits


def _limits(**settings: str) -> RateLimits:
    keys = KeyRing("a key-encryption key of a test, long enough")
    keys.adopt_root(bytes(32))
    return RateLimits(Settings(_env_file=None).model_copy(update=settings), keys)


@pytest.fixture
async def alone() -> AsyncIterator[RateLimits]:
    opened = _limits(rate_login="30/hour", rate_read="5/hour")
    yield opened
    await opened.close()


async def test_a_caller_gets_the_rate_and_no_more_and_others_are_not_touched(alone: RateLimits) -> None:
    spent = [await alone.spend("read", "ann") for _ in range(7)]
    assert [one.is_granted for one in spent] == [True] * 5 + [False] * 2
    assert [one.remaining for one in spent] == [4, 3, 2, 1, 0, 0, 0]
    assert {one.limit for one in spent} == {5}
    assert all(1 <= one.reset_seconds <= 3600 for one in spent)
    assert (await alone.spend("read", "bob")).is_granted
    assert (await alone.spend("write", "ann")).is_granted


async def test_logins_get_a_tenth_of_their_rate_in_each_process(alone: RateLimits) -> None:
    spent = [await alone.spend("login", "ann") for _ in range(4)]
    assert [one.is_granted for one in spent] == [True] * (30 // ALONE_SHARE) + [False]


async def test_a_slow_login_rate_still_lets_one_in() -> None:
    slow = _limits(rate_login="2/hour")
    assert [(await slow.spend("login", "ann")).is_granted for _ in range(2)] == [True, False]


async def test_a_login_that_nobody_can_count_is_refused_and_a_read_is_not(
    alone: RateLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MOST_COUNTED_ALONE", 3)
    for number in range(3):
        assert (await alone.spend("login", f"login {number}")).is_granted
        assert (await alone.spend("read", f"read {number}")).is_granted
    with pytest.raises(NotReady) as refusal:
        await alone.spend("login", "one more")
    assert refusal.value.retry_after_seconds
    assert (await alone.spend("read", "one more")).is_granted


async def test_what_is_over_makes_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_COUNTED_ALONE", 2)
    quick = _limits(rate_login="10/second")
    for name in ("ann", "bob"):
        await quick.spend("login", name)
    with pytest.raises(NotReady):
        await quick.spend("login", "eve")
    later = time.time() + 10
    monkeypatch.setattr(time, "time", lambda: later)
    assert (await quick.spend("login", "eve")).is_granted


def test_a_refusal_is_news_once_in_a_minute(alone: RateLimits, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [alone.is_news("read", "ann") for _ in range(3)] == [True, False, False]
    assert alone.is_news("read", "bob")
    assert alone.is_news("login", "ann")
    later = time.monotonic() + limits.NEWS_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert alone.is_news("read", "ann")


def test_news_are_bounded(alone: RateLimits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_NEWS", 2)
    assert all(alone.is_news("read", name) for name in ("ann", "bob", "eve", "ann"))


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_h105_an_ipv6_subscriber_is_one_caller_whatever_address_they_choose(network: int, one: int, other: int) -> None:
    addresses = [":".join(f"{network << 64 | host:032x}"[i : i + 4] for i in range(0, 32, 4)) for host in (one, other)]
    assert len({subscriber(address) for address in addresses}) == 1 or network == 0


@given(st.ip_addresses(v=4), st.ip_addresses(v=4))
def test_h105_ipv4_addresses_are_callers_each_however_they_are_written(one: object, other: object) -> None:
    assert (subscriber(str(one)) == subscriber(str(other))) == (one == other)
    assert subscriber(f"::ffff:{one}") == subscriber(str(one))


@pytest.mark.parametrize("odd", ["", "unknown", "x" * 10_000, "1.2.3.4.5", "fe80::1%eth0"])
def test_h105_odd_text_for_an_address_is_somebody_too(odd: str) -> None:
    assert 0 < len(subscriber(odd)) < 100


def test_production_has_rates_of_its_own() -> None:
    assert set(Settings(_env_file=None).rates().values()) == {DEVELOPMENT_RATE}
    given_one = Settings(_env_file=None, rate_face="7/second").model_copy(update={"environment": "production"})
    assert given_one.rates() == PRODUCTION_RATES | {"face": "7/second"}


@pytest.mark.parametrize(
    "rate", ["", "0/minute", "-1/minute", "60", "60/fortnight", "60/minute;1/second", "1e9/minute"]
)
def test_a_rate_is_a_number_per_second_minute_or_hour(rate: str) -> None:
    with pytest.raises(ValidationError):
        Settings(_env_file=None, rate_login=rate)


@pytest.mark.parametrize(
    "origins", ["*", "null", "desk.example", "https://desk.example/", "https://*.example", "https://a b"]
)
def test_h106_an_origin_is_named_in_full(origins: str) -> None:
    with pytest.raises(ValidationError):
        Settings(_env_file=None, cors_origins=origins)


def test_h106_several_origins_are_named_with_commas() -> None:
    several = Settings(_env_file=None, cors_origins="https://a.example, http://127.0.0.1:3000")
    assert several.allowed_origins == {"https://a.example", "http://127.0.0.1:3000"}
    assert Settings(_env_file=None).allowed_origins == frozenset()
