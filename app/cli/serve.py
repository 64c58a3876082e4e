"""`idem serve`: the HTTP API in production's shape."""

import os
import signal
import socket
import time
from types import FrameType
from typing import Annotated

import structlog
import typer
import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from app.api.connections import backlog, open_files, raise_open_files
from app.api.envelope import HEADER_BYTES
from app.api.wire import Connection
from app.cli.settings import UNUSABLE_CONFIGURATION, read_settings, require_engine
from app.cli.waiting import WaitOption, wait_for_mongo
from app.config import Settings
from app.logs import configure_service_logging

log = structlog.get_logger(__name__)

#: Idle connections are kept a little longer than nginx keeps its own, so that nginx closes first.
KEEP_ALIVE_SECONDS = 75
#: A worker process that is busy with faces answers its supervisor late; that is no reason to kill it.
SILENCE_SECONDS = 60
#: The parent waits for a child at most so long at a time. So it notices a signal, or the death of another child, soon.
LOOK_SECONDS = 0.2
#: Pauses before a child that died is started again; the last one repeats. A child that lived longer than that starts at once.
PAUSES_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0)
#: From the end of the grace period to the kill of a child that still runs.
KILL_SECONDS = 3


def serve(
    fd: Annotated[int | None, typer.Option("--fd", hidden=True, help="Serve on this inherited socket.")] = None,
    wait: WaitOption = 0,
) -> None:
    """Run the HTTP API on API_HOST:API_PORT with WORKERS processes."""
    settings = read_settings()
    configure_service_logging(settings.log_level)
    raise_open_files()
    config = configuration(settings)
    if fd is not None or settings.workers == 1:
        config.load_app()  # the long imports, while MongoDB may still be starting
        wait_for_mongo(settings.mongodb_uri, seconds=wait)
        if os.getpid() == 1:
            # After its end, the server raises the signal again for the handler that was there before. The kernel's default does
            # nothing to process 1, so the process ends with status 0.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            OneProcess(config).run(sockets=None if fd is None else [socket.socket(fileno=fd)])
        except SystemExit as end:
            raise typer.Exit(UNUSABLE_CONFIGURATION if end.code == STARTUP_FAILURE else 1) from None
        return
    require_engine(settings)
    try:
        listener = config.bind_socket()
    except SystemExit:  # it has logged the reason
        typer.echo(f"API_HOST, API_PORT: cannot listen on {settings.api_host}:{settings.api_port}", err=True)
        raise typer.Exit(UNUSABLE_CONFIGURATION) from None
    wait_for_mongo(settings.mongodb_uri, seconds=wait)
    parent = SeveralProcesses(config, sockets=[listener])
    parent.run()
    if parent.has_failed:
        raise typer.Exit(UNUSABLE_CONFIGURATION)


def configuration(
    settings: Settings, *, app: ASGIApp | None = None, connection: type[Connection] = Connection
) -> uvicorn.Config:
    """How the server runs. app: another one than the API; connection: another patience."""
    return uvicorn.Config(
        app or "app.main:create_app",
        factory=app is None,
        host=settings.api_host,
        port=settings.api_port,
        workers=settings.workers,
        http=connection,
        ws="none",
        h11_max_incomplete_event_size=HEADER_BYTES,
        backlog=backlog(open_files()),
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.shutdown_grace_seconds,
        timeout_worker_healthcheck=SILENCE_SECONDS,
        proxy_headers=True,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        server_header=False,
        access_log=False,
        log_config=None,  # the server's own lines go through ours: JSON
        log_level=settings.log_level,
    )


class OneProcess(uvicorn.Server):
    """A server that ends at once on a signal during its start: there is nothing to finish yet."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End at once during the start; afterwards as uvicorn does.

        It logs nothing: a signal may come in the middle of a log line, and would wait for its lock.
        """
        if not self.started:
            os._exit(0)
        super().handle_exit(sig, frame)


class _Child(Process):
    """One process of the API."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        super().__init__(config, sockets)
        self.started_at = time.monotonic()
        self._is_asked = False

    @property
    def server(self) -> uvicorn.Server:
        """The server that this process runs."""
        if self._server is None:
            self._server = OneProcess(config=self.config)
        return self._server

    def answers_within(self, seconds: float) -> bool | None:
        """Whether it serves; None when no answer came in time. Raises EOFError when the child is gone."""
        try:
            if not self._is_asked:
                self.parent_conn.send(b"ping")
                self._is_asked = True
            if not self.parent_conn.poll(seconds):
                return None
            self._is_asked = False
            serves: bool = self.parent_conn.recv()
        except OSError as error:
            raise EOFError from error
        return serves


class SeveralProcesses(Multiprocess):
    """The parent of several API processes.

    It differs from uvicorn's own in how it handles faults. It handles a signal and a child's death at once, also while it waits
    for an answer. It ends with `has_failed` when a child cannot start and none has ever served. Once a child has served, it
    starts dead children again and again, for example during an outage of MongoDB.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        super().__init__(config, sockets)
        self.has_failed = False
        self._has_served = False
        self._quick_deaths = 0

    def init_processes(self) -> None:
        """Start all."""
        for _ in range(self.processes_num):
            self.processes.append(self._started())

    def keep_subprocess_alive(self) -> None:
        """Look at each child, and replace those that died or have been silent for too long."""
        for index, process in enumerate(self.processes):
            assert isinstance(process, _Child)  # noqa: S101 - for the type checker
            if self.should_exit.is_set() or self.signal_queue or self._lives(process):
                continue
            process.kill()
            process.join()
            if process.exitcode == STARTUP_FAILURE and not self._has_served:
                # The child has logged the reason. Each further try would end in the same way.
                self.has_failed = True
                self.should_exit.set()
                return
            lived = time.monotonic() - process.started_at
            self._quick_deaths = self._quick_deaths + 1 if lived < PAUSES_SECONDS[-1] else 0
            log.error("process_died", pid=process.pid, exit_code=process.exitcode)
            if self.should_exit.wait(PAUSES_SECONDS[min(self._quick_deaths, len(PAUSES_SECONDS) - 1)]):
                return
            self.processes[index] = self._started()

    def join_all(self) -> None:
        """Wait for the children to end; kill those that do not."""
        deadline = time.monotonic() + (self.config.timeout_graceful_shutdown or 0) + KILL_SECONDS
        for process in self.processes:
            process.process.join(max(0.0, deadline - time.monotonic()))
            if process.process.is_alive():
                log.error("process_killed", pid=process.pid)
                process.process.kill()
                process.process.join()

    def _started(self) -> _Child:
        process = _Child(self.config, self.sockets)
        process.start()
        return process

    def _lives(self, process: _Child) -> bool:
        deadline = time.monotonic() + self.config.timeout_worker_healthcheck
        while time.monotonic() < deadline:
            if not process.process.is_alive():
                return False
            try:
                serves = process.answers_within(LOOK_SECONDS)
            except EOFError:
                return False
            if serves is not None:
                self._has_served = self._has_served or serves
                return True
            if self.signal_queue:
                return True  # checked again after the signal is handled
        return False
