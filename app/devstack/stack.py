"""`idem up`: MongoDB, Redis, worker and API on one machine, started together, watched, stopped together.

    mongod ─┐ what the settings name is used, what they do not name is embedded
    redis  ─┤
    worker ─┼─ children of one process, each in its own session, started again when they die
    api-1… ─┘ all on one listening socket that the parent holds: a dead API process loses no caller's connection attempt

Start: the lock of the data folder, the leftovers of a killed run, then everything at once; the Python children import
while MongoDB opens its files, and wait for its primary themselves. Stop: worker and API first, then the stores.
"""

import asyncio
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from app.config import PlaceRefused, Settings, random_secret
from app.devstack.client import CallFailed, Credentials, Readiness, ReadyStack, Service
from app.devstack.processes import (
    STACK_MARK,
    PidFile,
    Watched,
    dying_with,
    end_leftovers,
    tail_of,
    traces_of,
    write_privately,
)
from app.devstack.servers import (
    ServerSecret,
    free_port,
    initiate_replica_set,
    mongo_uri,
    mongod_command,
    redis_command,
    redis_url,
    wait_for_redis,
)
from app.starting import UNUSABLE_CONFIGURATION

#: Everything must be down 10 s after the signal. What has begun gets SHUTDOWN_GRACE_SECONDS, but no more than this;
SERVICE_GRACE_SECONDS: Final = 8
SERVICE_KILL_SECONDS: Final = 8.4
#: the stores get what is left until here: mostly all of it. A kill loses nothing that is on their journals.
STOP_SECONDS: Final = 9.7
START_LIMIT_SECONDS: Final = 120.0
#: How long a start waits for the worker's first heartbeat.
WORKER_LIMIT_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.05
#: A child that died this often before the stack was ready will not come.
DEATHS_AT_START: Final = 3
#: How long the children wait for MongoDB's primary.
STORE_WAIT_SECONDS: Final = 60
#: Callers that may wait in the kernel while a process of ours is being started again.
BACKLOG: Final = 1024
#: In the data folder while the stack runs: the ready-file's content, for `idem demo`.
READY_NAME: Final = "ready.json"
#: The accounts of a development stack, kept between starts.
CREDENTIALS_NAME: Final = "credentials.json"
#: The face model that the store was filled with: `auto` stays with it.
MODEL_NAME: Final = "face_model"


#: Where a stack without one of the settings keeps its key-encryption key.
KEY_NAME: Final = "key_encryption_key"


class StackFailed(RuntimeError):
    """The stack cannot start, or came down by itself; the message is for the operator."""


class Misconfigured(StackFailed):
    """A child refuses a folder or bucket of the settings; the message is the child's."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator asked of `idem up` on the command line; None where the settings decide. port 0: a free one."""

    data_dir: Path
    port: int | None = None
    api_workers: int | None = None
    model: str | None = None
    ready_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the table: what runs, where, and whether it is our child or was given."""

    name: str
    address: str
    pid: int | None


class Stack:
    """One running stack: `start` it once, `stop` it once."""

    def __init__(self, settings: Settings, wishes: Wishes, listener: socket.socket) -> None:
        self._settings = settings
        self._data_dir = wishes.data_dir.resolve()
        self._listener = listener
        self._children: list[Watched] = []
        self._pids = PidFile(mark=str(self._data_dir))
        self._is_starting = True
        self._is_ready = asyncio.Event()
        self._mongo_port = None if settings.mongodb_uri else free_port()
        self._redis_port = None if settings.redis_url else free_port()
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._secret = ServerSecret.kept_in(self._data_dir)
        self._ready_file = wishes.ready_file
        self._model = wishes.model or settings.face_model
        kept = self._data_dir / MODEL_NAME
        if self._model == "auto" and kept.exists():
            # A better pack may have come since; the people in the store were enrolled with this one.
            self._model = kept.read_text(encoding="utf-8")
        self.api_workers = wishes.api_workers or settings.workers
        self.mongo_uri = mongo_uri(self._mongo_port, self._secret) if self._mongo_port else settings.mongodb_uri
        self.redis_url = redis_url(self._redis_port, self._secret) if self._redis_port else settings.redis_url
        self.url = f"http://{_reachable(settings.api_host)}:{listener.getsockname()[1]}"
        self.messages: asyncio.Queue[str] = asyncio.Queue()
        #: Names of the accounts that this start has made.
        self.created: list[str] = []
        self.credentials: Credentials | None = None
        self.start_seconds = 0.0

    @property
    def processes(self) -> int:
        """How many processes hold a MongoDB connection pool."""
        return self.api_workers + 1

    def connections(self) -> str:
        """The total of MongoDB connections, in words."""
        lowest, highest = self._settings.mongodb_min_pool_size, self._settings.mongodb_max_pool_size
        return (
            f"MongoDB connections: {self.processes * lowest} to {self.processes * highest} "
            f"({self.processes} processes x {lowest} to {highest})"
        )

    def parts(self) -> list[Part]:
        """What runs, in the order of its start."""
        # Without the secret: terminals are seen, and kept.
        addresses = {
            "mongod": f"mongodb://127.0.0.1:{self._mongo_port}",
            "redis": f"redis://127.0.0.1:{self._redis_port}",
        }
        given = [
            Part(name, "as configured", None) for name in addresses if name not in {c.name for c in self._children}
        ]
        return given + [
            Part(
                child.name, addresses.get(child.name, self.url if child.name.startswith("api") else "queue"), child.pid
            )
            for child in self._children
        ]

    async def start(self) -> ReadyStack:
        """Bring everything up; returns once `/ready` answers 200 and the accounts are there. Raises StackFailed."""
        begun = time.monotonic()
        self._forget_old_announcements()
        for folder in ("mongo", "redis", "photos", "index", "logs"):
            (self._data_dir / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = self.environment()
        if self._mongo_port is not None:
            command = mongod_command(self._data_dir / "mongo", self._mongo_port, self._secret)
            await self._watch("mongod", command, environment)
        if self._redis_port is not None:
            command = redis_command(self._data_dir / "redis", self._redis_port, self._secret)
            await self._watch("redis", command, environment)
        patience = ["--wait", str(STORE_WAIT_SECONDS)]
        await self._watch("worker", idem("worker", *patience), environment)
        for number in range(1, self.api_workers + 1):
            serve = idem("serve", "--fd", str(self._listener.fileno()), *patience)
            await self._watch(f"api-{number}", serve, environment, inherited=(self._listener.fileno(),))
        accounts = asyncio.create_task(self._accounts(environment))
        try:
            async with asyncio.timeout(START_LIMIT_SECONDS):
                await self._stores_ready()
                await self._until_ready()
                self._is_ready.set()
                await accounts
        except TimeoutError:
            message = f"not ready within {START_LIMIT_SECONDS:g} s\n{self._logs()}"
            raise StackFailed(message) from None
        finally:
            accounts.cancel()
            await asyncio.gather(accounts, return_exceptions=True)
        self._is_starting = False
        self.start_seconds = time.monotonic() - begun
        return self._announce()

    async def stop(self) -> None:
        """End every child: first those that use the stores, then the stores. At most ten seconds."""
        self._is_starting = False
        self._listener.close()
        stores, began = {"mongod", "redis"}, time.monotonic()
        for names, until in ((False, SERVICE_KILL_SECONDS), (True, STOP_SECONDS)):
            group = [child for child in self._children if (child.name in stores) is names]
            left = until - (time.monotonic() - began)
            await asyncio.gather(*(child.stop(grace_seconds=left) for child in group))
        self._forget_old_announcements()
        with suppress(OSError):
            (self._data_dir / "pids.json").unlink(missing_ok=True)

    def environment(self) -> dict[str, str]:
        """The children's environment: ours, with what is embedded filled in; it wins over `.env`."""
        settings = self._settings
        environment = dict(os.environ) | {
            STACK_MARK: str(self._data_dir),
            "MONGODB_URI": self.mongo_uri,
            "REDIS_URL": self.redis_url,
            "FACE_MODEL": self._model,
            "WORKERS": str(self.api_workers),
            "SHUTDOWN_GRACE_SECONDS": str(min(settings.shutdown_grace_seconds, SERVICE_GRACE_SECONDS)),
            "PYTHONUNBUFFERED": "1",
        }
        if not settings.public_url:
            # The issuer of tokens: with a free port, API_PORT would name another one.
            environment["PUBLIC_URL"] = self.url
        if "storage_path" not in settings.model_fields_set:
            environment["STORAGE_PATH"] = str(self._data_dir / "photos")
        if "vector_db_path" not in settings.model_fields_set:
            environment["VECTOR_DB_PATH"] = str(self._data_dir / "index")
        if "index_cache_path" not in settings.model_fields_set:
            environment["INDEX_CACHE_PATH"] = str(self._data_dir / "index-copies")
        if "evidence_path" not in settings.model_fields_set:
            environment["EVIDENCE_PATH"] = str(self._data_dir / "evidence")
        if not settings.key_encryption_secret():
            key = self._data_dir / KEY_NAME
            if not key.exists():
                write_privately(key, random_secret())
            environment["KEY_ENCRYPTION_KEY_FILE"] = str(key)
        return environment

    async def _watch(
        self, name: str, command: list[str], environment: dict[str, str], *, inherited: tuple[int, ...] = ()
    ) -> None:
        child = Watched(
            name,
            command,
            environment=environment,
            log=self._data_dir / "logs" / f"{name}.log",
            inherited=inherited,
            on_start=self._write_down,
            on_death=self._tell,
        )
        self._children.append(child)
        await child.start()

    def _write_down(self, child: Watched) -> None:
        traces = traces_of(child.pid, child.command) if child.pid is not None else None
        if traces is not None:
            self._pids.children[child.name] = traces
            try:
                self._pids.save(self._data_dir / "pids.json")
            except OSError as error:  # the kernel still ends the children when this process dies
                self.messages.put_nowait(f"pids.json cannot be written: {error.strerror or error}")

    def _tell(self, child: Watched, how: str) -> None:
        self.messages.put_nowait(f"{child.name} ended ({how}); starting it again")

    def _is_hopeless(self, name: str) -> bool:
        return any(child.deaths >= DEATHS_AT_START for child in self._children if child.name == name)

    async def _stores_ready(self) -> None:
        """Both embedded stores take writes. The waiting happens in threads; they end when the child is given up."""
        waits = []
        if (port := self._mongo_port) is not None:
            waits.append(
                asyncio.to_thread(
                    initiate_replica_set,
                    port,
                    self._secret,
                    timeout_seconds=STORE_WAIT_SECONDS,
                    is_running=partial(self._may_come, "mongod"),
                )
            )
        if (port := self._redis_port) is not None:
            waits.append(
                asyncio.to_thread(
                    wait_for_redis,
                    port,
                    self._secret,
                    timeout_seconds=STORE_WAIT_SECONDS,
                    is_running=partial(self._may_come, "redis"),
                )
            )
        try:
            await asyncio.gather(*waits)
        except TimeoutError as problem:
            message = f"{problem}\n{self._logs()}"
            raise StackFailed(message) from problem

    def _may_come(self, name: str) -> bool:
        """Whether it is worth waiting for a child any longer."""
        return self._is_starting and not self._is_hopeless(name)

    async def _until_ready(self) -> None:
        async with Service(self.url) as service:
            began = time.monotonic()
            while not ((seen := await service.readiness()) and seen.serves and self._may_begin(seen, began)):
                for child in self._children:
                    if child.exit_status == UNUSABLE_CONFIGURATION and (refusal := _refusal_in(child.log_tail())):
                        raise Misconfigured(refusal)
                    if self._is_hopeless(child.name):
                        message = f"{child.name} keeps dying; its log ends:\n{child.log_tail()}"
                        raise StackFailed(message)
                await asyncio.sleep(POLL_SECONDS)
        filled_with, running = seen.checks["index"].pack, seen.checks["model"].pack
        if filled_with is not None and filled_with != running:
            message = (
                f"{self._data_dir} was filled with another face model than {running}: "
                "name that one with --model, take another --data-dir, or move its galleries with "
                f"`FACE_MODEL={running} idem models re-embed --data-dir {self._data_dir}`"
            )
            raise StackFailed(message)
        if running:
            write_privately(self._data_dir / MODEL_NAME, running)

    def _may_begin(self, seen: Readiness, began: float) -> bool:
        """Whether a worker is alive, or the wait for one was long enough."""
        return seen.checks["worker"].status == "ok" or time.monotonic() - began > WORKER_LIMIT_SECONDS

    async def _accounts(self, environment: dict[str, str]) -> None:
        """See to it that everybody in `credentials.json` can log in; nobody in production.

        The first start makes the accounts while the API is starting. Later ones only try them, which takes a moment,
        and make them again where the store was exchanged or a password changed.
        """
        if self._settings.is_production:
            return
        path = self._data_dir / CREDENTIALS_NAME
        if path.exists():
            await self._is_ready.wait()
            self.credentials = Credentials.model_validate_json(path.read_bytes())
            if await self._holds(self.credentials):
                return
        await self._make_accounts(path, environment)
        self.credentials = Credentials.model_validate_json(path.read_bytes())

    async def _holds(self, credentials: Credentials) -> bool:
        users = credentials.users
        async with Service(self.url) as service:
            try:
                for account in (credentials.admin, users.officer, users.auditor, credentials.client):
                    await service.log_in(account)
            except CallFailed:
                return False
        return True

    async def _make_accounts(self, path: Path, environment: dict[str, str]) -> None:
        """Let a child make what is missing: it needs the whole product, this process little of it."""
        log = self._data_dir / "logs" / "accounts.log"
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *idem("users", "development", "--credentials", str(path), "--wait", str(STORE_WAIT_SECONDS)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
                preexec_fn=dying_with(os.getpid()),
            )
        try:
            answer, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode != 0:
            message = f"the accounts could not be made; the log ends:\n{tail_of(log)}"
            raise StackFailed(message)
        # Only the last line: the first child that opens the store logs that before.
        self.created = [str(name) for name in json.loads(answer.splitlines()[-1])]

    def _announce(self) -> ReadyStack:
        """Write the ready-file, and the same beside the data for `idem demo`."""
        credentials = self.credentials
        ready = ReadyStack(
            url=self.url,
            pid=os.getpid(),
            admin=credentials.admin if credentials else None,
            users=credentials.users if credentials else None,
            client=credentials.client if credentials else None,
            mongo_uri=self.mongo_uri,
            redis_url=self.redis_url,
            data_dir=str(self._data_dir),
        )
        for path in self._announcements():
            write_privately(path, ready.model_dump_json(indent=2))
        return ready

    def _announcements(self) -> list[Path]:
        own = self._data_dir / READY_NAME
        return [own] if self._ready_file is None else [own, self._ready_file]

    def _forget_old_announcements(self) -> None:
        """Whoever waits for the ready-file must not read a killed run's."""
        for path in self._announcements():
            path.unlink(missing_ok=True)

    def _logs(self) -> str:
        return "\n".join(f"--- {child.name}:\n{child.log_tail()}" for child in self._children if child.deaths)


def _refusal_in(log: str) -> str | None:
    """Why a child refuses a folder or bucket, by the last line of its log; None when it ended for another reason."""
    try:
        line = json.loads(log.rpartition("\n")[2])
        return str(line["reason"]) if line["error"] == PlaceRefused.__name__ else None
    except (ValueError, KeyError, TypeError):
        return None


def embedded_settings(settings: Settings, data_dir: Path) -> Settings:
    """The settings that the processes of the stack running on that folder have. Raises OSError or ValidationError."""
    folder = data_dir.resolve()
    ready = ReadyStack.model_validate_json((folder / READY_NAME).read_bytes())
    filled: dict[str, object] = {"mongodb_uri": ready.mongo_uri, "redis_url": ready.redis_url}
    places = {
        "storage_path": "photos",
        "vector_db_path": "index",
        "index_cache_path": "index-copies",
        "evidence_path": "evidence",
    }
    filled |= {name: folder / place for name, place in places.items() if name not in settings.model_fields_set}
    key, model = folder / KEY_NAME, folder / MODEL_NAME
    if not settings.key_encryption_secret():
        filled["key_encryption_key_file"] = key
    if settings.face_model == "auto" and model.exists():
        filled["face_model"] = model.read_text(encoding="utf-8")
    return settings.model_copy(update=filled)


def idem(*arguments: str) -> list[str]:
    """The command line of one of our own commands, run by this very Python."""
    return [sys.executable, "-m", "app.cli", *arguments]


@contextmanager
def data_folder(path: Path) -> Iterator[list[str]]:
    """The data folder, held by this process alone; yields what a killed run had left running. Raises StackFailed."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (path / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"a stack is running on {path} already; stop it, or choose another folder with --data-dir"
            raise StackFailed(message) from None
        yield end_leftovers(path / "pids.json")


def listen(host: str, port: int) -> socket.socket:
    """The socket that all API processes share. Raises StackFailed when the port is taken."""
    try:
        return socket.create_server((host, port), backlog=BACKLOG, reuse_port=False)
    except OSError as problem:
        message = f"cannot listen on {host}:{port} ({problem.strerror}); choose another with --port (0: a free one)"
        raise StackFailed(message) from problem


@contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGINT, SIGTERM and SIGHUP set; after the first they are ignored, so that stopping is whole."""
    stop = asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    loop = asyncio.get_running_loop()

    def begin_to_stop() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        stop.set()

    for number in numbers:
        loop.add_signal_handler(number, begin_to_stop)
    yield stop


def _reachable(host: str) -> str:
    """An address that a caller on this machine can use for a server that listens on `host`."""
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
