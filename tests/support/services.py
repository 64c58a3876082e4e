"""Real servers for tests, each a child process on a free port of 127.0.0.1, that a test may kill or freeze.

Programs: the environment's MONGOD and REDIS_SERVER, else the PATH's, else the packages' (see app.devstack.servers); the S3
server is moto's, with the MinIO client's protocol and an empty memory at each start.
"""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from app.devstack import servers

READY_WITHIN_SECONDS = 30.0
STOPS_WITHIN_SECONDS = 20.0


class Proc:
    """A server's process: started ready, stopped, killed, frozen, thawed, started again on the same port and data."""

    def __init__(self, command: list[str], wait_until_ready: Callable[[Callable[[], bool]], None]) -> None:
        """wait_until_ready: returns when the server answers; is given the question whether the process still runs."""
        self._command = command
        self._wait_until_ready = wait_until_ready
        self._log = TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether the process is alive (a frozen one is)."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start and return when it answers; with its log in the error when it does not."""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self._wait_until_ready(lambda: self.is_running)
        except BaseException as problem:
            self.kill()
            self._log.seek(0)
            problem.add_note(self._log.read()[-4000:].decode(errors="replace"))
            raise

    def stop(self) -> None:
        """End it as an operator would, frozen or not."""
        if self.is_running:
            self.thaw()
            self._signal(signal.SIGTERM)
        self._reap()

    def kill(self) -> None:
        """End it as a power cut would (its files stay)."""
        if self.is_running:
            self._signal(signal.SIGKILL)
        self._reap()

    def freeze(self) -> None:
        """Let it hang: connections are still accepted by the kernel, nothing is answered.

        Returns when each of its threads has stopped: the signal alone leaves one on another core time for an answer.
        """
        self._signal(signal.SIGSTOP)
        if self._process is not None:
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop it and drop its log."""
        self.stop()
        self._log.close()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze it for a while."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait(STOPS_WITHIN_SECONDS)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: where it listens, and its process."""

    port: int
    url: str
    process: Proc


@cache
def _secret_folder() -> TemporaryDirectory[str]:
    """Removed when the process ends."""
    return TemporaryDirectory(prefix="idem-servers-")


def secret() -> servers.ServerSecret:
    """The secret of all servers that this process starts."""
    return servers.ServerSecret.kept_in(Path(_secret_folder().name))


def mongo_server(data_dir: Path) -> Server:
    """A one-node replica set that takes writes; `url` makes every write durable before it is acknowledged."""
    port = servers.free_port()
    command = servers.mongod_command(data_dir, port, secret(), program=servers.find_mongod(_named("MONGOD")))

    def wait_until_ready(is_running: Callable[[], bool]) -> None:
        servers.initiate_replica_set(port, secret(), timeout_seconds=READY_WITHIN_SECONDS, is_running=is_running)

    return _started(port, servers.mongo_uri(port, secret()), Proc(command, wait_until_ready))


def redis_server(data_dir: Path) -> Server:
    """A redis-server that keeps its queue over a kill."""
    port = servers.free_port()
    program = servers.find_redis_server(_named("REDIS_SERVER"))
    command = servers.redis_command(data_dir, port, secret(), program=program)

    def wait_until_ready(is_running: Callable[[], bool]) -> None:
        servers.wait_for_redis(port, secret(), timeout_seconds=READY_WITHIN_SECONDS, is_running=is_running)

    return _started(port, servers.redis_url(port, secret()), Proc(command, wait_until_ready))


def s3_server() -> Server:
    """An S3 server, moto's: it takes any key, and forgets everything at a restart (so freeze it, or use a free port)."""
    port = servers.free_port()
    url = f"http://127.0.0.1:{port}"

    def wait_until_ready(is_running: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_WITHIN_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{url}/moto-api/", timeout=1):  # noqa: S310 - http
                    return
            except OSError:
                if not is_running() or time.monotonic() > deadline:
                    raise
                time.sleep(servers.POLL_SECONDS)

    return _started(
        port, url, Proc([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], wait_until_ready)
    )


def _started(port: int, url: str, process: Proc) -> Server:
    try:
        process.start()
    except BaseException:
        process.close()
        raise
    return Server(port, url, process)


def _named(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None
