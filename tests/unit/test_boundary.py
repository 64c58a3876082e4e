"""The border of a dependency: when calls pass, when they are refused, and when one is let through to see."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from app import boundary as module
from app.boundary import Boundary

T = TypeVar("T")
FAILURES, PAUSE_SECONDS = 3, 1.0


class _Away(Exception):
    """The dependency is away."""


class _Clock:
    """Monotonic seconds that move when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def _boundary(timeout_seconds: float | None = None, failures: int = FAILURES) -> Boundary:
    return Boundary(
        "test", _Away, counted=(_Away,), timeout_seconds=timeout_seconds, failures=failures, pause_seconds=PAUSE_SECONDS
    )


async def _well() -> str:
    return "done"


async def _badly() -> str:
    raise _Away("gone")


async def _ends(boundary: Boundary, work: Callable[[], Awaitable[str]]) -> str:
    """How one call ends: done, failed, or refused without having been made."""
    made = False

    async def watched() -> str:
        nonlocal made
        made = True
        return await work()

    try:
        return await boundary.call(watched)
    except _Away:
        return "failed" if made else "refused"


async def test_calls_pass_until_so_many_failed_in_a_row(clock: _Clock) -> None:
    boundary = _boundary()
    for work in (_badly, _badly, _well, _badly, _badly):
        await _ends(boundary, work)
        assert boundary.state == "closed"
    assert await _ends(boundary, _badly) == "failed"
    assert boundary.state == "open"
    assert await _ends(boundary, _well) == "refused"
    with pytest.raises(_Away):
        boundary.require_open()


async def test_after_the_pause_one_call_tries_while_the_others_are_refused(clock: _Clock) -> None:
    boundary = _boundary(failures=1)
    await _ends(boundary, _badly)
    clock.now += PAUSE_SECONDS
    assert boundary.state == "half-open"
    gate = asyncio.Event()

    async def slowly() -> str:
        await gate.wait()
        return "done"

    trying = asyncio.create_task(_ends(boundary, slowly))
    await asyncio.sleep(0)
    assert [await _ends(boundary, _well) for _ in range(3)] == ["refused"] * 3
    gate.set()
    assert await trying == "done"
    assert boundary.state == "closed"
    assert await _ends(boundary, _well) == "done"


async def test_a_try_that_fails_begins_another_pause(clock: _Clock) -> None:
    boundary = _boundary()
    for _ in range(FAILURES):
        await _ends(boundary, _badly)
    for _ in range(3):
        clock.now += PAUSE_SECONDS
        assert await _ends(boundary, _badly) == "failed"
        assert boundary.state == "open"
        assert await _ends(boundary, _well) == "refused"
    clock.now += PAUSE_SECONDS
    assert await _ends(boundary, _well) == "done"


async def test_a_try_that_was_cancelled_does_not_keep_the_others_out_for_ever(clock: _Clock) -> None:
    boundary = _boundary(failures=1)
    await _ends(boundary, _badly)
    clock.now += PAUSE_SECONDS
    trying = asyncio.create_task(boundary.call(asyncio.Event().wait))
    await asyncio.sleep(0)
    trying.cancel()
    await asyncio.gather(trying, return_exceptions=True)
    assert await _ends(boundary, _well) == "refused"
    clock.now += PAUSE_SECONDS
    assert await _ends(boundary, _well) == "done"


async def test_what_was_let_in_before_comes_to_its_end_while_others_are_refused(clock: _Clock) -> None:
    boundary = _boundary(failures=1)
    await _ends(boundary, _badly)
    assert await boundary.call(_well, is_part_of_more=True) == "done"


async def test_an_error_that_is_no_absence_opens_nothing(clock: _Clock) -> None:
    boundary = _boundary(failures=1)

    async def refused_for_good() -> str:
        raise ValueError

    for _ in range(3):
        with pytest.raises(ValueError):
            await boundary.call(refused_for_good)
    assert boundary.state == "closed"


async def test_h81_a_call_that_takes_too_long_is_given_up_and_counts() -> None:
    boundary = _boundary(timeout_seconds=0.02, failures=1)
    with pytest.raises(_Away, match="in time"):
        await boundary.call(asyncio.Event().wait)
    assert boundary.state == "open"


async def test_a_time_limit_of_the_callers_own_is_not_the_dependencys_fault() -> None:
    boundary = _boundary(timeout_seconds=5, failures=1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await boundary.call(asyncio.Event().wait)
    assert boundary.state == "closed"


async def test_faults_stand_between_the_boundary_and_the_dependency() -> None:
    class _Cut:
        async def around(
            self, dependency: str, operation: str, work: Callable[[], Awaitable[T]], broken: Callable[[str], Exception]
        ) -> T:
            await work()
            raise broken(f"{operation} at {dependency}")

    done: list[str] = []

    async def work() -> None:
        done.append("once")

    boundary = _boundary(failures=1)
    boundary.faults = _Cut()
    with pytest.raises(_Away, match="put at test"):
        await boundary.call(work, "put")
    assert done == ["once"], "the work is done, its answer lost"
    assert boundary.state == "open", "a fault counts as the real thing"


async def test_its_state_is_told_to_prometheus(clock: _Clock) -> None:
    def told() -> float | None:
        return REGISTRY.get_sample_value("idem_boundary_state", {"dependency": "test"})

    boundary = _boundary(failures=1)
    assert told() == 0
    await _ends(boundary, _badly)
    assert told() == 2
    clock.now += PAUSE_SECONDS
    await _ends(boundary, _well)
    assert told() == 0


@given(st.lists(st.sampled_from(["well", "badly", "wait"]), max_size=40))
def test_whatever_happens_it_refuses_only_after_enough_failures_and_never_for_longer_than_a_pause(
    story: list[str],
) -> None:
    clock = _Clock()

    async def run() -> None:
        boundary = _boundary()
        in_a_row, waited = 0, True
        for what in story:
            if what == "wait":
                clock.now += PAUSE_SECONDS
                waited = True
                continue
            ended = await _ends(boundary, _well if what == "well" else _badly)
            assert (ended == "refused") == (in_a_row >= FAILURES and not waited)
            if ended != "refused":
                in_a_row = 0 if ended == "done" else in_a_row + 1
                waited = in_a_row < FAILURES

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
        asyncio.run(run())


@pytest.mark.parametrize("level", ["error", "info"])
async def test_r8_a_log_that_cannot_be_written_changes_no_state(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    boundary = _boundary(failures=1)
    if level == "error":
        monkeypatch.setattr(module.log, "error", full)
        with pytest.raises(OSError, match="space"):
            await boundary.call(_badly)
        assert boundary.state == "open"
        return
    await _ends(boundary, _badly)
    clock.now += PAUSE_SECONDS
    monkeypatch.setattr(module.log, "info", full)
    with pytest.raises(OSError, match="space"):
        await boundary.call(_well)
    assert boundary.state == "closed"
