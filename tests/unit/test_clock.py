"""The platform's clock: MongoDB's time, even if the host's clock is set."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.clock import APART_SECONDS, HELD_AFTER_JUMP_SECONDS, Clock, from_now, in_words

START = datetime(2026, 11, 30, 12, tzinfo=UTC)
DAY = 86_400.0


class Host:
    """A host and a MongoDB server. Time passes for both, and a test may set either clock."""

    def __init__(self) -> None:
        self.steady, self.wall, self.server = 500.0, START.timestamp(), START.timestamp()
        self.clock = Clock(lambda: self.wall, lambda: self.steady)

    def wait(self, seconds: float) -> None:
        self.steady += seconds
        self.wall += seconds
        self.server += seconds

    def measure(self, there: float = 0.001, back: float = 0.001) -> None:
        """Ask the server. there, back: how many seconds the request and the answer travel."""
        asked = self.steady
        self.wait(there)
        told = datetime.fromtimestamp(int(self.server * 1000) / 1000, UTC)
        self.wait(back)
        self.clock.learn(asked, self.steady, told)

    @property
    def error(self) -> float:
        return self.clock.time() - self.server


def test_before_the_first_measurement_the_time_is_the_hosts() -> None:
    host = Host()
    assert host.clock.now() == START
    assert (host.clock.offset_seconds, host.clock.agrees, host.clock.measured_seconds_ago) == (0, True, None)


@pytest.mark.parametrize("offset", [40 * DAY, -3 * DAY, 600, 61, -61])
def test_a_host_that_differs_by_more_than_a_minute_is_noticed_and_corrected(offset: float) -> None:
    host = Host()
    host.wall += offset
    host.measure()
    assert abs(host.error) < 0.01
    assert host.clock.offset_seconds == pytest.approx(offset, abs=0.01)
    assert not host.clock.agrees
    assert host.clock.difference is not None


@pytest.mark.parametrize("offset", [0, 20, -20, 59, -59])
def test_a_host_that_differs_by_less_is_corrected_as_well(offset: float) -> None:
    host = Host()
    host.wall += offset
    host.measure()
    assert abs(host.error) < 0.01
    assert (host.clock.agrees, host.clock.difference) == (True, None)


def test_a_jump_between_two_measurements_is_noticed_at_once_and_changes_no_time() -> None:
    host = Host()
    host.measure()
    before = host.clock.now()
    host.wall += 40 * DAY
    assert host.clock.now() == before
    assert not host.clock.agrees
    host.wall -= 40 * DAY
    assert host.clock.agrees


def test_while_mongodb_does_not_answer_the_monotonic_clock_continues_its_time() -> None:
    host = Host()
    host.wall += 3600
    host.measure()
    host.wait(7200)
    host.wall -= DAY
    assert abs(host.error) < 0.01
    assert host.clock.measured_seconds_ago == pytest.approx(7200)


def test_a_slow_answer_does_not_spoil_a_quick_measurement() -> None:
    host = Host()
    host.measure()
    host.wait(5)
    host.measure(there=1.9, back=0.05)
    assert abs(host.error) < 0.01


def test_another_primary_with_another_clock_is_followed() -> None:
    host = Host()
    host.measure()
    host.server -= 120
    host.measure()
    assert abs(host.error) < 0.01
    assert not host.clock.agrees, "either of the two clocks may be wrong"


@pytest.mark.parametrize("jump", [40 * DAY, -3 * DAY, 61])
def test_nothing_is_erased_for_a_day_after_all_clocks_were_set_together(jump: float) -> None:
    host = Host()
    host.measure()
    assert (host.clock.may_erase, host.clock.jump) == (True, None)
    host.wait(5)
    host.wall += jump
    host.server += jump
    host.measure()
    assert host.clock.agrees
    assert not host.clock.may_erase
    assert host.clock.jump_seconds == pytest.approx(jump, abs=0.1)
    for _ in range(3):
        host.wait(HELD_AFTER_JUMP_SECONDS / 4)
        host.measure()
        assert not host.clock.may_erase
    host.wait(HELD_AFTER_JUMP_SECONDS / 4)
    assert (host.clock.may_erase, host.clock.jump) == (True, None)


def test_clocks_that_were_set_back_to_the_true_time_are_trusted_at_once() -> None:
    host = Host()
    host.measure()
    for jump in (40 * DAY, -40 * DAY):
        host.wall += jump
        host.server += jump
        host.measure()
    assert host.clock.may_erase


def test_a_clock_that_is_corrected_in_small_steps_is_trusted() -> None:
    host = Host()
    host.measure()
    for _ in range(10):
        host.wait(5)
        host.wall += 10
        host.server += 10
        host.measure()
    assert host.clock.may_erase


def test_a_jump_is_put_into_words() -> None:
    host = Host()
    host.measure()
    host.server -= 3 * DAY
    host.wall -= 3 * DAY
    host.measure()
    assert host.clock.jump == "MongoDB's clock was set back by 3 days, 0:00:00."


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2), st.floats(-1e7, 1e7)), min_size=1, max_size=8))
def test_the_error_is_never_larger_than_the_travel_time_of_the_last_answer(
    steps: list[tuple[float, float, float]],
) -> None:
    host = Host()
    for there, back, jump in steps:
        host.wall += jump
        host.measure(there, back)
        host.wait(5)
        assert abs(host.error) <= there + back + 0.002


def test_a_difference_is_put_into_words() -> None:
    assert in_words(40 * DAY + 1) == "40 days, 0:00:01 ahead of"
    assert in_words(-APART_SECONDS) == "0:01:00 behind"


def test_mongodb_computes_a_moment_itself() -> None:
    assert from_now(timedelta(minutes=10)) == {"$add": ["$$NOW", 600_000]}
    assert from_now(-timedelta(days=30)) == {"$add": ["$$NOW", -2_592_000_000]}
