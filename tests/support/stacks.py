"""Whole stacks for tests: `idem up` as a child process, as an operator runs it."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from app.devstack.client import ReadyStack
from app.devstack.processes import PidFile
from app.devstack.stack import idem

STARTS_WITHIN_SECONDS = 120.0
STOPS_WITHIN_SECONDS = 20.0


@dataclass(slots=True)
class RunningStack:
    """An `idem up` that has announced itself. start_seconds: from the command to the ready-file."""

    process: subprocess.Popen[bytes]
    ready: ReadyStack
    data_dir: Path
    log: Path
    start_seconds: float

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def pid_of(self, name: str) -> int:
        """The present process of one part: mongod, redis, worker, api-1."""
        return self.pids()[name]

    def pids(self) -> dict[str, int]:
        """The present process of every part."""
        file = PidFile.model_validate_json((self.data_dir / "pids.json").read_bytes())
        return {name: traces.pid for name, traces in file.children.items()}

    def descendants(self) -> list[psutil.Process]:
        """Every process that the stack has started, theirs too."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for_line(self, text: str) -> None:
        """Return once it has printed this; fails when it ends without."""
        deadline = time.monotonic() + STARTS_WITHIN_SECONDS
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it as an operator would; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(STOPS_WITHIN_SECONDS)


@contextmanager
def running_stack(
    data_dir: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[RunningStack]:
    """`idem up` on a free port, once its ready-file is there; ended at the exit, if it still runs then."""
    data_dir.mkdir(parents=True, exist_ok=True)
    ready_file, log = data_dir.with_suffix(".ready"), data_dir.with_name(f"{data_dir.name}-{time.monotonic_ns()}.log")
    ready_file.unlink(missing_ok=True)  # a killed stack could not remove its own
    began = time.monotonic()
    process = start(data_dir, ready_file, log, *options, environment=environment)
    try:
        while not ready_file.exists():
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() - began < STARTS_WITHIN_SECONDS, log.read_text(errors="replace")
            time.sleep(0.02)
        took = time.monotonic() - began
        yield RunningStack(process, ReadyStack.model_validate_json(ready_file.read_bytes()), data_dir, log, took)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOPS_WITHIN_SECONDS)


def start(
    data_dir: Path, ready_file: Path, log: Path, *options: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """The bare process, not waited for."""
    command = idem("up", "--data-dir", str(data_dir), "--port", "0", "--ready-file", str(ready_file), *options)
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=dict(os.environ) | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
