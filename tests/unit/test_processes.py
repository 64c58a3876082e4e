"""Children are started again when they die, and nothing outlives the stack."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from app.devstack.processes import (
    STACK_MARK,
    PidFile,
    Traces,
    Watched,
    describe_exit,
    dying_with,
    end_leftovers,
    traces_of,
    write_privately,
)

#: Starts a grandchild, says both ids, and waits.
PARENT_OF_ONE = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]
LIMIT_SECONDS = 20.0


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def until(holds: Callable[[], bool]) -> None:
    """Return once it holds."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while not holds():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def watched(folder: Path, command: list[str], deaths: list[str] | None = None) -> AsyncIterator[Watched]:
    """A started child that is ended at the exit."""
    child = Watched(
        "child",
        command,
        environment=dict(os.environ),
        log=folder / "child.log",
        on_start=lambda _: None,
        on_death=lambda _, how: None if deaths is None else deaths.append(how),
    )
    await child.start()
    try:
        yield child
    finally:
        await child.stop(grace_seconds=0.2)


async def test_a_killed_child_is_started_again_at_once(tmp_path: Path) -> None:
    deaths: list[str] = []
    async with watched(tmp_path, SLEEP, deaths) as child:
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: child.pid not in {None, first})
        assert deaths == ["SIGKILL"]


async def test_what_a_dead_child_had_started_is_ended_with_it(tmp_path: Path) -> None:
    async with watched(tmp_path, [sys.executable, "-c", PARENT_OF_ONE]) as child:
        await until(lambda: len(child.log_tail().split()) == 2)
        leader, grandchild = map(int, child.log_tail().split())
        os.kill(leader, signal.SIGKILL)
        await until(lambda: not is_alive(grandchild))


async def test_a_child_that_keeps_dying_waits_longer_each_time(tmp_path: Path) -> None:
    deaths: list[str] = []
    async with watched(tmp_path, [sys.executable, "-c", "raise SystemExit(3)"], deaths) as child:
        await until(lambda: child.deaths >= 3)
        assert set(deaths) == {"exit status 3"}
        # Without a pause some ten more would fit into this time.
        await asyncio.sleep(0.4)
        assert child.deaths <= 4


async def test_stopping_ends_a_child_that_ignores_sigterm(tmp_path: Path) -> None:
    async with watched(tmp_path, STUBBORN) as child:
        await until(lambda: child.log_tail() == "up")
        pid = child.pid
        assert pid is not None
    assert not is_alive(pid)


async def test_a_stopped_child_is_not_started_again(tmp_path: Path) -> None:
    async with watched(tmp_path, SLEEP) as child:
        pid = child.pid
        await child.stop(grace_seconds=5)
        assert child.pid is None
        assert pid is not None
        assert not is_alive(pid)


async def test_a_child_dies_with_its_killed_parent() -> None:
    parent = (
        "import os, subprocess, sys, time\n"
        "from app.devstack.processes import dying_with\n"
        f"child = subprocess.Popen({SLEEP!r}, start_new_session=True, preexec_fn=dying_with(os.getpid()))\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert is_alive(child)
        process.kill()
    await until(lambda: not is_alive(child))


def leftover(folder: Path, mark: str) -> tuple[subprocess.Popen[bytes], Traces]:
    """A running process as a killed stack leaves it."""
    environment = dict(os.environ) | {STACK_MARK: mark}
    process = subprocess.Popen(SLEEP, env=environment, start_new_session=True, cwd=folder)
    traces = traces_of(process.pid, SLEEP)
    assert traces is not None
    return process, traces


def test_leftovers_of_a_killed_run_are_ended_by_their_ids(tmp_path: Path) -> None:
    process, traces = leftover(tmp_path, "stack")
    path = tmp_path / "pids.json"
    PidFile(mark="stack", children={"worker": traces}).save(path)
    assert end_leftovers(path) == ["worker"]
    assert not is_alive(process.pid)
    process.wait()
    assert not path.exists()


def test_an_orphaned_grandchild_is_ended_by_its_group_and_mark(tmp_path: Path) -> None:
    environment = dict(os.environ) | {STACK_MARK: "stack"}
    leader = subprocess.Popen(
        [sys.executable, "-c", PARENT_OF_ONE], env=environment, start_new_session=True, stdout=subprocess.PIPE
    )
    assert leader.stdout is not None
    grandchild = int(leader.stdout.readline().split()[1])
    traces = traces_of(leader.pid, leader.args)  # type: ignore[arg-type] # a list, as it was given
    assert traces is not None
    leader.kill()
    leader.wait()
    leader.stdout.close()
    path = tmp_path / "pids.json"
    PidFile(mark="stack", children={"api-1": traces}).save(path)
    assert end_leftovers(path) == ["api-1"]
    assert not is_alive(grandchild)


@pytest.mark.parametrize("change", ["created", "command"])
def test_a_process_that_was_given_the_same_id_is_left_alone(tmp_path: Path, change: str) -> None:
    process, traces = leftover(tmp_path, "stack")
    try:
        other = traces.model_copy(
            update={"created": traces.created - 60} if change == "created" else {"command": ["x"]}
        )
        path = tmp_path / "pids.json"
        PidFile(mark="stack", children={"worker": other}).save(path)
        assert end_leftovers(path) == []
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_cut_file_of_ids_stops_nobody(tmp_path: Path) -> None:
    path = tmp_path / "pids.json"
    path.write_text('{"mark": "st')
    assert end_leftovers(path) == []


def test_private_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o644)
    write_privately(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_exit_statuses_are_told_in_words() -> None:
    assert (describe_exit(0), describe_exit(-signal.SIGTERM)) == ("exit status 0", "SIGTERM")


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    arm = dying_with(parent=os.getpid() + 1)
    child = os.fork()
    if child == 0:
        arm()
        os._exit(0)  # not reached: this process is not the parent that was named
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


async def test_r3_a_child_is_still_watched_when_its_log_fails(tmp_path: Path) -> None:
    """A full disk, a read-only folder and a removed folder refuse the log file."""
    deaths: list[str] = []
    async with watched(tmp_path, SLEEP, deaths) as child:
        (tmp_path / "child.log").unlink()
        (tmp_path / "child.log").mkdir()
        for round_ in range(3):
            first = child.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await until(lambda first=first: child.pid not in {None, first})
            assert deaths == ["SIGKILL"] * (round_ + 1)


async def test_r3_a_start_that_the_system_refuses_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[str] = []
    spawn, refusals = asyncio.create_subprocess_exec, iter([OSError(28, "No space left on device"), BlockingIOError()])

    async def refusing(*command: str, **options: object) -> asyncio.subprocess.Process:
        if (error := next(refusals, None)) is not None:
            raise error
        return await spawn(*command, **options)  # type: ignore[arg-type]

    async with watched(tmp_path, SLEEP, deaths) as child:
        first = child.pid
        assert first is not None
        monkeypatch.setattr(asyncio, "create_subprocess_exec", refusing)
        os.kill(first, signal.SIGKILL)
        await until(lambda: child.pid not in {None, first})
    assert deaths[1] == "cannot be started: No space left on device"
    assert len(deaths) == 3


async def test_r3_a_full_disk_leaves_no_half_of_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "pids.json"
    target.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_privately(target, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["pids.json"]
