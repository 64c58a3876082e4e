"""The product's processes, forked from one that has imported everything: a killed one is back in a second, not in four.

`python -m tests.support.nursery` reads a line of JSON for each process that it is to start, `{"name", "arguments", "environment",
"log"}`, and says `{"name", "pid"}` when it has, and `{"name", "ended"}` when it is no more. What a child runs is `idem serve` or
`idem worker` as they are, but for `tests.fakes.FakeEngine` in place of the settings' engine.
"""

import asyncio
import json
import os
import random
import select
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, Self

from app.devstack.processes import dying_with
from tests.support import skew

REPOSITORY = Path(__file__).parents[2]
TICK_SECONDS = 0.02


@dataclass(slots=True)
class Nursery:
    """The parent of all processes, and who of them lives; `on_end` hears of every end, by whatever cause."""

    process: asyncio.subprocess.Process
    logs: Path
    on_end: Callable[[str], None]
    pids: dict[str, int] = field(default_factory=dict)
    _started: dict[str, asyncio.Event] = field(default_factory=dict)

    @classmethod
    async def open(
        cls, logs: Path, on_end: Callable[[str], None], environment: Mapping[str, str] | None = None
    ) -> Self:
        """Open the nursery. It imports everything before the first child. environment: further variables, for all of them."""
        with (logs / "nursery.log").open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=errors, cwd=logs, env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
                start_new_session=True, preexec_fn=dying_with(os.getpid()),
            )  # fmt: skip
        return cls(process, logs, on_end)

    async def start(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        """Start the process of that name; returns once it exists."""
        told = self._started[name] = asyncio.Event()
        order = {
            "name": name,
            "arguments": arguments,
            "environment": dict(environment),
            "log": str(self.logs / f"{name}.log"),
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        await self.process.stdin.drain()
        await told.wait()

    async def listen(self) -> None:
        """Hear what the nursery says until it ends."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            said = json.loads(line)
            name = said["name"]
            if "pid" in said:
                self.pids[name] = said["pid"]
                self._started[name].set()
            else:
                self.pids.pop(name, None)
                self.on_end(name)

    async def close(self) -> None:
        """End it, and with it all children."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


def main() -> NoReturn:
    """Fork a child for every line."""
    # Imported before the first fork: that is what a nursery is for. None of it starts a thread.
    from app import cli, runtime  # noqa: F401
    from app.main import create_app  # noqa: F401
    from tests.fakes import FakeEngine
    from workers import main as worker  # noqa: F401

    opened = SimpleNamespace(engine=FakeEngine(), reason="it reads names")
    runtime.open_engine = lambda *_, **__: opened  # type: ignore[assignment,attr-defined]
    children: dict[int, str] = {}
    lines = os.fdopen(0, "rb", buffering=0)
    while True:
        readable, _, _ = select.select([lines], [], [], TICK_SECONDS)
        if readable:
            order = json.loads(lines.readline())
            pid = os.fork()
            if pid == 0:
                _become(order)
            children[pid] = order["name"]
            _say({"name": order["name"], "pid": pid})
        while children:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            _say({"name": children.pop(pid), "ended": pid})


def _say(what: Mapping[str, object]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _become(order: Mapping[str, object]) -> NoReturn:
    status = 1
    try:
        parent = os.getppid()
        os.setsid()
        dying_with(parent)()
        log = os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        environment, arguments = order["environment"], order["arguments"]
        assert isinstance(environment, dict)
        assert isinstance(arguments, list)
        os.environ.update(environment)
        if skew.VARIABLE in environment:
            skew.follow(environment[skew.VARIABLE])
        random.seed()
        sys.argv = ["idem", *arguments]
        from app import cli

        cli.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - the child ends here, whatever it is
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
