"""Child processes that are started again when they die, and never outlive their parent. Linux.

Each child leads a session and process group of its own: a Ctrl-C in the terminal does not reach it, and what it has
started itself can be ended with it. The kernel kills a child whose parent was killed (PR_SET_PDEATHSIG); a file of
process ids lets the next start end what is left even so.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Final

import psutil
from pydantic import BaseModel, ConfigDict

#: <linux/prctl.h>
PR_SET_PDEATHSIG: Final = 1
#: Names the stack in the environment of its processes: how a grandchild is told from a stranger.
STACK_MARK: Final = "IDEM_STACK"
#: A child that lived this long is started again at once; one that keeps dying waits longer each time.
HEALTHY_SECONDS: Final = 10.0
PAUSES_SECONDS: Final = (0.0, 0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
#: A log larger than this is set aside as `NAME.log.1` at the next start.
LOG_BYTES: Final = 10 * 1024 * 1024
LOG_TAIL_BYTES: Final = 3000
#: Resolution of a process's start time in /proc is 10 ms.
SAME_TIME_SECONDS: Final = 0.05
LEFTOVER_GRACE_SECONDS: Final = 3.0

# Loaded before any fork: between fork and exec a child must not import or take locks.
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Traces(BaseModel):
    """What is needed to find a child again, and to be sure that it is the same process: `created` in epoch seconds."""

    model_config = ConfigDict(frozen=True)

    pid: int
    created: float
    command: list[str]


class PidFile(BaseModel):
    """The children of one stack, by name."""

    mark: str
    children: dict[str, Traces] = {}

    def save(self, path: Path) -> None:
        """Replace the file in one step."""
        write_privately(path, self.model_dump_json(indent=2))


class Watched:
    """One child, its log, and its restarts. Used from one event loop in the main thread.

    The main thread, because PR_SET_PDEATHSIG means the death of the thread that forked.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        inherited: Iterable[int] = (),
        on_start: Callable[["Watched"], None],
        on_death: Callable[["Watched", str], None],
    ) -> None:
        """on_start, on_death: must not raise. An error would end the supervision."""
        self.name = name
        self.command = command
        self.log = log
        self.deaths = 0
        #: Of its last death.
        self.exit_status: int | None = None
        self._environment = dict(environment)
        self._inherited = tuple(inherited)
        self._on_start = on_start
        self._on_death = on_death
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._quick_deaths = 0

    @property
    def pid(self) -> int | None:
        """The living process; None between a death and the restart."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start the child and watch over it until `stop`. Raises OSError when it cannot be started at all."""
        await self._spawn()
        self._watch = asyncio.create_task(self._keep_running(), name=f"watch {self.name}")

    async def stop(self, *, grace_seconds: float) -> None:
        """SIGTERM, then after the grace SIGKILL for its whole group. Does nothing to one that never ran."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        process = self._process
        if process is None or process.returncode is not None:  # its group was ended when it died
            return
        process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace_seconds)
        end_group(process.pid)
        await process.wait()

    def log_tail(self) -> str:
        """The end of what it wrote last."""
        return tail_of(self.log)

    async def _spawn(self) -> None:
        with self._open_log() as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                pass_fds=self._inherited,
                start_new_session=True,
                preexec_fn=dying_with(os.getpid()),
            )
        self._on_start(self)

    def _open_log(self) -> IO[bytes]:
        """Open the log for appending. Opens the null device on an error of the disk, so that the child still runs."""
        try:
            set_aside_large(self.log)
            return self.log.open("ab")
        except OSError:
            return Path(os.devnull).open("ab")

    async def _keep_running(self) -> None:
        while True:
            process = self._process
            assert process is not None  # noqa: S101 - for the type checker: started before watched
            started = time.monotonic()
            code = await process.wait()
            self.deaths += 1
            self.exit_status = code
            self._quick_deaths = self._quick_deaths + 1 if time.monotonic() - started < HEALTHY_SECONDS else 0
            end_group(process.pid)  # its own children hold ports and memory
            self._on_death(self, describe_exit(code))
            await self._spawn_again()

    async def _spawn_again(self) -> None:
        """Start the child after its pause. Tries until it runs: no error of the system ends the supervision."""
        while True:
            await asyncio.sleep(PAUSES_SECONDS[min(self._quick_deaths, len(PAUSES_SECONDS) - 1)])
            try:
                await self._spawn()
            except OSError as error:  # no process, memory or descriptor is free
                self._quick_deaths += 1
                self._on_death(self, f"cannot be started: {error.strerror or error}")
            else:
                return


def dying_with(parent: int) -> Callable[[], None]:
    """What a forked child runs before it becomes another program, so that it dies with `parent`."""

    def arm() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died between the fork and the line above
            os._exit(1)

    return arm


def describe_exit(code: int) -> str:
    """An exit status in words: `exit status 1`, `SIGKILL`."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def end_group(leader: int) -> None:
    """SIGKILL to what is left of a child's group."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def traces_of(pid: int, command: list[str]) -> Traces | None:
    """What to write down of a child; None when it is gone already."""
    try:
        return Traces(pid=pid, created=psutil.Process(pid).create_time(), command=command)
    except psutil.Error:
        return None


def end_leftovers(path: Path) -> list[str]:
    """End what a killed run left behind; returns the names of what was still there. Blocks up to three seconds.

    A process is ended only when it is certain to be ours: the leader by pid, start time and command line, the others
    by being of its group and carrying the stack's mark in their environment. The file is removed.
    """
    try:
        file = PidFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except ValueError:  # cut by a full disk: then there is nothing to go by
        path.unlink()
        return []
    found = {name: _still_ours(traces, file.mark) for name, traces in file.children.items()}
    processes = [process for group in found.values() for process in group]
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, stubborn = psutil.wait_procs(processes, timeout=LEFTOVER_GRACE_SECONDS)
    for process in stubborn:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(stubborn, timeout=LEFTOVER_GRACE_SECONDS)
    path.unlink()
    return sorted(name for name, group in found.items() if group)


def _still_ours(traces: Traces, mark: str) -> list[psutil.Process]:
    ours = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) != traces.pid:
                continue
            same_time = abs(process.create_time() - traces.created) < SAME_TIME_SECONDS
            if process.pid == traces.pid:
                if not (same_time and process.cmdline() == traces.command):
                    return []  # the id was given to somebody else, and with it the group
            elif process.environ().get(STACK_MARK) != mark:
                continue
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
        ours.append(process)
    return ours


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)  # psutil compares the start time once more
    except psutil.Error:
        return


def tail_of(log: Path) -> str:
    """The end of a log; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return file.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""


def set_aside_large(log: Path) -> None:
    """Keep one older log where the present one has grown large."""
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_name(log.name + ".1"))


def write_privately(path: Path, text: str) -> None:
    """Write a file that only its owner reads (0600), in one step: readers see the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
