"""The product's own processes over an engine that reads names: two API doors, a worker, publishers, each with its log.

`python -m tests.support.index_processes serve | worker | publish GALLERY HOLDER` is what each of them runs: `idem serve`,
`idem worker` or `workers.publisher` as they are, but for `tests.fakes.FakeEngine` in place of the settings' engine. On two
cores a face model would hide everything else.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from app import cli, runtime
from app.config import Settings
from app.devstack.processes import dying_with
from app.devstack.servers import free_port
from app.use_cases import publish
from storage import calibration
from tests.fakes import FakeEngine
from workers import publisher

REPOSITORY = Path(__file__).parents[2]
#: Tells the publisher, in its environment, what `running_fleet` was asked for.
PLANTED_PAIRS = "LOAD_PLANTED_PAIRS"
#: What fewer pairs find to be the smallest margin is too small by more.
WIDE_MARGIN = 2.0
STARTS_WITHIN_SECONDS = 60.0
STOPS_WITHIN_SECONDS = 20.0
PUBLISHES_WITHIN_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a process's log; time in epoch seconds."""

    time: float
    name: str
    level: str
    fields: Mapping[str, Any]


@dataclass(slots=True)
class Running:
    """A process of the product, and where its log is."""

    name: str
    log: Path
    process: asyncio.subprocess.Process

    @property
    def pid(self) -> int:
        """Of the process itself."""
        return self.process.pid

    def events(self, *names: str) -> list[Event]:
        """What it has logged under these names, or at all when none is given, in order."""
        return [event for event in _read(self.log) if not names or event.name in names]

    def kill(self) -> None:
        """End it as a power cut would; nothing happens to one that has ended."""
        if self.process.returncode is None:
            self.process.kill()

    async def stop(self) -> None:
        """End it as an operator would."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOPS_WITHIN_SECONDS):
            await self.process.wait()


@dataclass(slots=True)
class Fleet:
    """Two API processes and a worker over one set of stores, and their publishers. urls: of the doors, by name."""

    environment: Mapping[str, str]
    logs: Path
    urls: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Running] = field(default_factory=dict)
    publishers: list[Running] = field(default_factory=list)

    async def start(self) -> None:
        """Return when both doors are ready to answer and the worker is at work."""
        for name in ("api-1", "api-2"):
            port = free_port()
            self.urls[name] = f"http://127.0.0.1:{port}"
            self.parts[name] = await self._spawn(name, "serve", API_PORT=str(port))
        self.parts["worker"] = await self._spawn("worker", "worker")
        async with asyncio.timeout(STARTS_WITHIN_SECONDS), httpx.AsyncClient(trust_env=False) as http:
            while not all([await _answers(http, url) for url in self.urls.values()]):
                self.require_alive()
                await asyncio.sleep(0.1)

    async def publisher(self, gallery_id: str, holder: str) -> Running:
        """A publication that has just begun."""
        begun = await self._spawn("publisher", "publish", gallery_id, holder)
        self.publishers.append(begun)
        return begun

    def require_alive(self) -> None:
        """Fails with the end of its log when a process has died."""
        for part in self.parts.values():
            assert part.process.returncode is None, f"{part.name} ended: {part.log.read_text()[-2000:]}"

    async def stop(self) -> None:
        """End all of them."""
        await asyncio.gather(*(part.stop() for part in self.parts.values()))

    async def _spawn(self, name: str, *arguments: str, **environment: str) -> Running:
        log = self.logs / f"{name}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", __name__, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, **self.environment, **environment, "PYTHONPATH": str(REPOSITORY)},
                cwd=self.logs,  # where no .env of a developer lies
                start_new_session=True, preexec_fn=dying_with(os.getpid()),
            )  # fmt: skip
        return Running(name, log, process)


@asynccontextmanager
async def running_fleet(settings: Settings, logs: Path, planted_pairs: int | None = None) -> AsyncIterator[Fleet]:
    """The processes over the stores of these settings, not started yet; ended at the exit.

    planted_pairs: with how many a publisher measures its index; None: as the product has it.
    """
    named = {
        "MONGODB_URI": settings.mongodb_uri,
        "MONGODB_DATABASE": settings.mongodb_database,
        "MONGODB_MIN_POOL_SIZE": str(settings.mongodb_min_pool_size),
        "REDIS_URL": settings.redis_url,
        "KEY_ENCRYPTION_KEY": settings.key_encryption_secret(),
        "STORAGE_PATH": str(settings.storage_path),
        "VECTOR_DB_PATH": str(settings.vector_db_path),
        "INDEX_CACHE_PATH": str(settings.index_cache_path),
        "INDEX_TAIL_ROWS": str(settings.index_tail_rows),
        "INDEX_SHADOW_EVERY": str(settings.index_shadow_every),
        "QUEUE_NAME": settings.queue_name,
        "EVIDENCE_PATH": str(settings.evidence_path),
        # A load is what rates are there to keep off.
        **dict.fromkeys(("RATE_LOGIN", "RATE_FACE", "RATE_WRITE", "RATE_READ"), "9999999/minute"),
    }
    if planted_pairs is not None:
        named[PLANTED_PAIRS] = str(planted_pairs)
    fleet = Fleet(named, logs)
    try:
        yield fleet
    finally:
        running = [*fleet.parts.values(), *fleet.publishers]
        for one in running:
            one.kill()
        await asyncio.gather(*(one.process.wait() for one in running))


def _read(log: Path) -> Iterator[Event]:
    """The lines that are events; a traceback between them is none."""
    for line in log.read_text(errors="replace").splitlines():
        try:
            page = json.loads(line)
            moment = datetime.fromisoformat(page["timestamp"]).timestamp()
        except (ValueError, KeyError, TypeError):
            continue
        yield Event(moment, page["event"], page.get("level", "info"), page)


async def _answers(http: httpx.AsyncClient, url: str) -> bool:
    try:
        answer = await http.get(f"{url}/ready", timeout=2)
    except httpx.HTTPError:
        return False
    return answer.status_code == httpx.codes.OK


def main() -> None:
    """Become the process that the command line names."""
    opened = SimpleNamespace(engine=FakeEngine(), reason="it reads names")
    runtime.open_engine = lambda *_, **__: opened  # type: ignore[assignment,attr-defined]
    if PLANTED_PAIRS in os.environ:
        publish.PLANTED_PAIRS = int(os.environ[PLANTED_PAIRS])  # type: ignore[misc]
        calibration.SPARE_MARGIN = WIDE_MARGIN  # type: ignore[misc]
    what, *rest = sys.argv[1:]
    if what == "publish":
        sys.argv = ["publisher", *rest]
        sys.exit(publisher.main())
    sys.argv = ["idem", what]
    cli.main()


if __name__ == "__main__":
    main()
