"""The shared folder's threads: what hangs there is borne, by nobody else, and not for ever by the process."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from app import share as module
from app.boundary import Boundary
from app.share import THREADS, Share
from storage.generations import BadGeneration, GenerationStoreUnavailable, Progress

LIMIT_SECONDS = 0.1
PAUSE_SECONDS = 0.05


def _share(failures: int = 1000) -> tuple[Share, Boundary]:
    boundary = Boundary(
        "test-share", GenerationStoreUnavailable, counted=(GenerationStoreUnavailable,), timeout_seconds=LIMIT_SECONDS,
        failures=failures, pause_seconds=PAUSE_SECONDS,
    )  # fmt: skip
    return Share(boundary, LIMIT_SECONDS), boundary


class _Hung:
    """What waits until it is let go, as one does on an NFS whose server is away."""

    def __init__(self) -> None:
        self.server_is_back = threading.Event()
        self.calls = 0

    def called(self, name: str) -> Callable[[], str]:
        def work() -> str:
            self.calls += 1
            assert self.server_is_back.wait(30)
            return name

        work.__name__ = name
        return work


@pytest.fixture
def hung() -> Iterator[_Hung]:
    hung = _Hung()
    yield hung
    hung.server_is_back.set()


def _threads() -> int:
    return sum(thread.name.startswith("share ") for thread in threading.enumerate())


async def _all_back() -> None:
    async with asyncio.timeout(5):
        while _threads():
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.02)  # and told


async def test_what_hangs_is_given_up_and_not_called_again_beside_itself(hung: _Hung) -> None:
    share, _ = _share()
    with pytest.raises(GenerationStoreUnavailable, match="in time"):
        await share.run(hung.called("look"))
    for _ in range(50):
        with pytest.raises(GenerationStoreUnavailable, match="look of the shared folder still hangs"):
            await share.run(hung.called("look"))
    assert (hung.calls, _threads()) == (1, 1)
    hung.server_is_back.set()
    await _all_back()
    assert await share.run(hung.called("look")) == "look"


async def test_a_caller_who_left_early_leaves_one_thread_behind_and_no_failure(hung: _Hung) -> None:
    share, boundary = _share(failures=1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await share.run(hung.called("look"))
    assert boundary.state == "closed"
    with pytest.raises(GenerationStoreUnavailable):
        await share.run(hung.called("look"))
    assert hung.calls == 1


async def test_h92_however_much_hangs_its_threads_are_few_and_none_of_the_processs_own(hung: _Hung) -> None:
    share, _ = _share()
    looks = (share.run(hung.called(f"look {n}")) for n in range(40))
    assert all(
        isinstance(one, GenerationStoreUnavailable) for one in await asyncio.gather(*looks, return_exceptions=True)
    )
    assert (hung.calls, _threads()) == (THREADS, THREADS)
    async with asyncio.timeout(2):
        assert await asyncio.get_running_loop().getaddrinfo("localhost", 1)
        assert await asyncio.to_thread(lambda: "free") == "free"
    hung.server_is_back.set()
    await _all_back()
    assert await share.run(hung.called("look")) == "look"


async def test_it_is_left_alone_after_some_failures_and_used_again_when_it_is_back(hung: _Hung) -> None:
    share, boundary = _share(failures=2)
    for _ in range(2):
        with pytest.raises(GenerationStoreUnavailable):
            await share.run(hung.called("look"))
    with pytest.raises(GenerationStoreUnavailable, match="left alone"):
        await share.run(hung.called("another"))
    hung.server_is_back.set()
    await _all_back()
    await asyncio.sleep(PAUSE_SECONDS)
    assert await share.run(hung.called("look")) == "look"
    assert boundary.state == "closed"


async def test_long_work_has_time_as_long_as_it_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLD_EVERY_SECONDS", 0.0)
    share, _ = _share()

    def copies(tell: Progress) -> str:
        for step in range(10):
            time.sleep(0.05)
            tell(step, 10)
        return "copied"

    assert await share.run_long("copy", copies, silence_seconds=0.2) == "copied"


async def test_long_work_that_stands_still_is_given_up_and_stops_where_it_would_tell_the_next(hung: _Hung) -> None:
    share, _ = _share()
    steps = 0

    def copies(tell: Progress) -> None:
        nonlocal steps
        while True:
            tell(steps, 10)
            steps += 1
            hung.called("copy")()

    with pytest.raises(GenerationStoreUnavailable, match="in time"):
        await share.run_long("copy", copies, silence_seconds=0.05)
    hung.server_is_back.set()
    await _all_back()
    assert steps == 1


async def test_what_the_files_are_like_is_told_and_is_no_failure_of_the_share() -> None:
    share, boundary = _share(failures=1)

    def verify(_: Progress) -> None:
        raise BadGeneration("corrupt", "other bytes")

    with pytest.raises(BadGeneration):
        await share.run_long("verify", verify)
    assert boundary.state == "closed"


def test_h92_h98_a_process_ends_though_a_call_hangs_for_ever() -> None:
    program = """
import asyncio, threading
from app.boundary import Boundary
from app.share import Share
from storage.generations import GenerationStoreUnavailable as Away

async def main():
    share = Share(Boundary("share", Away, counted=(Away,), timeout_seconds=0.1), 0.1)
    try:
        await share.run(threading.Event().wait)
    except Away:
        print("given up")

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=20)
    assert ended.stdout == b"given up\n"


def test_a_call_that_comes_back_after_the_loop_has_ended_is_no_error(hung: _Hung) -> None:
    async def gives_up() -> None:
        with pytest.raises(GenerationStoreUnavailable):
            await _share()[0].run(hung.called("look"))

    asyncio.run(gives_up())
    hung.server_is_back.set()
    for thread in threading.enumerate():
        if thread.name.startswith("share "):
            thread.join(5)
    assert _threads() == 0
