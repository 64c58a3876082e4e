"""A process that cannot start says why in one sentence and ends with status 78. SIGTERM ends it while it waits."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil
import pytest

from app.devstack.servers import free_port
from tests.support import services

CONFIGURATION = 78
#: The promise is ten seconds on an idle machine; the tests' machine is busy.
ENDS_WITHIN_SECONDS = 60.0
#: How long it waits for MongoDB if it is not ended, and how long a busy machine may need to end it (far less).
WAITS_SECONDS, HEEDS_SIGTERM_WITHIN_SECONDS = 60, 15.0
REASONS = ("MONGODB_URI: ", "REDIS_URL: ", "The face model cannot be used: ")
#: Runs a command as process 1 of a namespace, as a container does.
AS_PROCESS_ONE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
MISSING_PACK = {"FACE_MODEL": "buffalo_l"}


def _environment(tmp_path: Path, **others: str) -> dict[str, str]:
    known = {name: text for name, text in os.environ.items() if name not in {"MODEL_DIR", "FACE_MODEL"}}
    return (
        known
        | {
            "MONGODB_URI": f"mongodb://127.0.0.1:{free_port()}/?directConnection=true",
            "REDIS_URL": f"redis://127.0.0.1:{free_port()}/0",
            "KEY_ENCRYPTION_KEY": "k" * 20 + "0123456789abcdefghijklmnopqrst",
            "MODEL_DIR": str(tmp_path / "models"),
            "FACE_MODEL": "dlib",
            "STORAGE_PATH": str(tmp_path / "photos"),
            "VECTOR_DB_PATH": str(tmp_path / "index"),
            "INDEX_CACHE_PATH": str(tmp_path / "cache"),
            "EVIDENCE_PATH": str(tmp_path / "evidence"),
            "API_PORT": str(free_port()),
            "PYTHONUNBUFFERED": "1",
        }
        | others
    )


def _idem(*arguments: str, environment: dict[str, str], prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-m", "app.cli", *arguments]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )


def _end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=ENDS_WITHIN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"it did not end: {process.communicate()[0]}")
    return process.returncode, said


def _wait_for_connection(process: subprocess.Popen[str], port: int) -> None:
    """Return when the process, or a child of it, has a connection to that port."""
    until = time.monotonic() + ENDS_WITHIN_SECONDS
    seen = psutil.Process(process.pid)

    def ports() -> set[int]:
        connections = [one for member in (seen, *seen.children()) for one in member.net_connections("tcp")]
        return {one.raddr.port for one in connections if one.raddr}

    while port not in ports():
        assert process.poll() is None, _end_of(process)
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("command", "others"),
    [
        ("serve", {"WORKERS": "1"}), ("serve", {"WORKERS": "2"}), ("worker", {}),
        ("serve", {"WORKERS": "2", **MISSING_PACK}), ("worker", MISSING_PACK),
    ],
    ids=["one process", "two processes", "worker", "two processes, no model", "worker, no model"],
)  # fmt: skip
def test_i3_a_process_that_cannot_start_says_one_sentence_and_ends_with_status_78(
    tmp_path: Path, command: str, others: dict[str, str]
) -> None:
    status, said = _end_of(_idem(command, environment=_environment(tmp_path, **others)))
    assert status == CONFIGURATION, said
    assert "Traceback" not in said
    reasons = [line for line in said.splitlines() if any(part in line for part in REASONS)]
    assert 1 <= len(reasons) <= int(others.get("WORKERS", "1")), said
    for line in said.splitlines():
        if line.startswith("{"):
            json.loads(line)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_i3_a_process_that_waits_for_its_stores_ends_at_once_on_sigterm(
    tmp_path: Path, mongo_server: services.Server, workers: str
) -> None:
    """MongoDB hangs: it accepts connections and answers nothing."""
    environment = _environment(tmp_path, WORKERS=workers, MONGODB_URI=mongo_server.url)
    mongo_server.process.freeze()
    try:
        process = _idem("serve", "--wait", str(WAITS_SECONDS), environment=environment)
        _wait_for_connection(process, mongo_server.port)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        status, said = _end_of(process)
        assert time.monotonic() - began < HEEDS_SIGTERM_WITHIN_SECONDS, said
        assert status in {0, -signal.SIGTERM}, said
    finally:
        mongo_server.process.thaw()


def _may_unshare() -> bool:
    return subprocess.run([*AS_PROCESS_ONE, "true"], check=False, stderr=subprocess.DEVNULL).returncode == 0


@pytest.mark.skipif(not _may_unshare(), reason="This machine allows no namespaces of processes.")
@pytest.mark.parametrize("command", ["serve", "worker"])
def test_i3_process_one_of_a_container_ends_on_sigterm_while_it_waits(tmp_path: Path, command: str) -> None:
    """The kernel ignores signals that process 1 does not handle."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        environment = _environment(tmp_path, MONGODB_URI=f"mongodb://127.0.0.1:{port}/")
        process = _idem(command, "--wait", str(WAITS_SECONDS), environment=environment, prefix=AS_PROCESS_ONE)
        _wait_for_connection(process, port)
        (one,) = psutil.Process(process.pid).children()
        began = time.monotonic()
        one.send_signal(signal.SIGTERM)
        status, said = _end_of(process)
    assert time.monotonic() - began < HEEDS_SIGTERM_WITHIN_SECONDS, said
    assert status == 128 + signal.SIGTERM, said


@pytest.mark.skipif(not _may_unshare(), reason="This machine allows no namespaces of processes.")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_process_one_of_a_container_that_has_served_ends_with_status_0(
    tmp_path: Path, mongo_server: services.Server, redis_server: services.Server, database_name: str, workers: str
) -> None:
    port = free_port()
    environment = _environment(
        tmp_path, MONGODB_URI=mongo_server.url, MONGODB_DATABASE=database_name, REDIS_URL=redis_server.url,
        API_PORT=str(port), WORKERS=workers,
    )  # fmt: skip
    process = _idem("serve", environment=environment, prefix=AS_PROCESS_ONE)
    until = time.monotonic() + ENDS_WITHIN_SECONDS
    while not _answers(port):
        assert process.poll() is None, _end_of(process)
        assert time.monotonic() < until
        time.sleep(0.1)
    (one,) = psutil.Process(process.pid).children()
    one.send_signal(signal.SIGTERM)
    status, said = _end_of(process)
    assert status == 0, said


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_a_port_that_is_taken_ends_the_parent_of_several_processes_with_status_78(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, said = _end_of(_idem("serve", environment=_environment(tmp_path, WORKERS="2", API_PORT=port)))
    assert status == CONFIGURATION, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "API_PORT" in line]
    assert port in line


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MINIO_ENDPOINT", "http://127.0.0.1:9000"), ("MINIO_ENDPOINT", "127.0.0.1:9000/path"), ("MINIO_ENDPOINT", ""),
        ("MINIO_ENDPOINT", "user@host"), ("MINIO_BUCKET", "Idem_Photos"), ("REDIS_URL", "127.0.0.1:6379"),
        ("MONGODB_URI", "127.0.0.1:27017"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [["serve"], ["up", "--no-demo"]], ids=["serve", "up"])
def test_f15_a_setting_that_cannot_work_is_named_at_once(
    tmp_path: Path, name: str, text: str, command: list[str]
) -> None:
    others = {"PHOTO_STORE": "minio", "MINIO_ENDPOINT": "127.0.0.1:9000", name: text}
    if command[0] == "up":
        command = [*command, "--data-dir", str(tmp_path / "data")]
    status, said = _end_of(_idem(*command, environment=_environment(tmp_path, **others)))
    assert status == CONFIGURATION, said
    (line,) = said.splitlines()
    assert name in line
    assert not (tmp_path / "data").exists()
