"""`idem up`: one command to a ready stack, whatever happened to the one before."""

import asyncio
import json
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pymongo
import pytest
import redis
from pymongo.errors import OperationFailure

from app.devstack.client import Account, CallFailed, ClientAccount, ReadyStack, Service
from app.devstack.stack import idem
from tests.support.stacks import RunningStack, running_stack, start

PARTS = ("mongod", "redis", "worker", "api-1")
RECOVERS_WITHIN_SECONDS = 30.0


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory, stack_environment: dict[str, str]) -> Iterator[RunningStack]:
    """A stack that these tests may hurt."""
    folder = tmp_path_factory.mktemp("own") / "data"
    with running_stack(folder, "--no-demo", environment=stack_environment) as running:
        yield running


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, stack_environment: dict[str, str]) -> RunningStack:
    """A stack that was started on an empty folder, with its demo, and stopped; later starts find its folder."""
    folder = tmp_path_factory.mktemp("used") / "data"
    with running_stack(folder, environment=stack_environment) as running:
        running.wait_for_line("Idem is ready")
    return running


async def log_in_everybody(ready: ReadyStack) -> None:
    """Every account of the ready-file holds."""
    credentials = ready.credentials()
    assert credentials is not None
    everybody: tuple[Account | ClientAccount, ...] = (
        credentials.admin,
        credentials.users.officer,
        credentials.users.auditor,
        credentials.client,
    )
    async with Service(ready.url) as service:
        for account in everybody:
            await service.log_in(account)


async def recovered(running: RunningStack) -> None:
    """Everything that a login needs answers again."""
    deadline = time.monotonic() + RECOVERS_WITHIN_SECONDS
    while True:
        try:
            return await log_in_everybody(running.ready)
        except (CallFailed, httpx.HTTPError):
            assert time.monotonic() < deadline, running.said


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs any more, shortly."""
    return not psutil.wait_procs(processes, timeout=5)[1]


async def test_the_ready_file_says_where_the_stack_is_and_who_may_log_in(stack: RunningStack) -> None:
    path = stack.data_dir.with_suffix(".ready")
    written = json.loads(path.read_text())
    assert set(written) == {"url", "pid", "admin", "users", "client", "mongo_uri", "redis_url", "data_dir"}
    assert (written["pid"], written["data_dir"]) == (stack.process.pid, str(stack.data_dir))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with Service(written["url"]) as service:
        seen = await service.readiness()
        assert seen is not None
        assert seen.serves
    await log_in_everybody(stack.ready)


def test_credentials_are_private_and_lie_beside_the_data(stack: RunningStack) -> None:
    path = stack.data_dir / "credentials.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text()) == stack.ready.model_dump(include={"admin", "users", "client"})
    assert any((stack.data_dir / "mongo").iterdir())


def test_the_connections_of_all_processes_are_announced(stack: RunningStack) -> None:
    stack.wait_for_line("MongoDB connections: 30 to 150 (3 processes x 10 to 50)")


def test_the_first_start_makes_an_admin_and_shows_the_demo_as_a_table(first_run: RunningStack) -> None:
    said = first_run.said
    assert "Admin made" in said
    assert "suspected_duplicate" in said
    assert "match True" in said
    assert "match False" in said


@pytest.mark.parametrize("part", PARTS)
async def test_a_killed_part_comes_back_by_itself(own_stack: RunningStack, part: str) -> None:
    killed = own_stack.pid_of(part)
    psutil.Process(killed).kill()
    deadline = time.monotonic() + RECOVERS_WITHIN_SECONDS
    while own_stack.pid_of(part) == killed:
        assert time.monotonic() < deadline, own_stack.said
    await recovered(own_stack)
    assert own_stack.process.poll() is None
    assert f"{part} ended (SIGKILL)" in own_stack.said


async def test_r3_a_part_comes_back_although_the_process_file_cannot_be_written(own_stack: RunningStack) -> None:
    """As on a full disk. Before the fix, the second death of the part was not noticed."""
    pids = own_stack.data_dir / "pids.json"
    kept = pids.read_bytes()
    pids.unlink()
    pids.mkdir()
    try:
        for _ in range(2):
            (killed,) = [
                child.pid for child in psutil.Process(own_stack.process.pid).children() if "worker" in child.cmdline()
            ]
            psutil.Process(killed).kill()
            deadline = time.monotonic() + RECOVERS_WITHIN_SECONDS
            while not [
                child.pid
                for child in psutil.Process(own_stack.process.pid).children()
                if child.pid != killed and child.is_running() and "worker" in child.cmdline()
            ]:
                assert time.monotonic() < deadline, own_stack.said
                await asyncio.sleep(0.1)
    finally:
        pids.rmdir()
        pids.write_bytes(kept)
    assert "pids.json cannot be written" in own_stack.said


async def test_a_second_start_keeps_the_credentials_and_repeats_nothing(
    first_run: RunningStack, stack_environment: dict[str, str]
) -> None:
    with running_stack(first_run.data_dir, environment=stack_environment) as second:
        second.wait_for_line("Idem is ready")
        assert "Admin made" not in second.said
        assert "suspected_duplicate" not in second.said
        assert second.ready.credentials() == first_run.ready.credentials()
        await log_in_everybody(second.ready)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_even_when_it_comes_twice(
    first_run: RunningStack, stack_environment: dict[str, str], number: signal.Signals
) -> None:
    with running_stack(first_run.data_dir, "--no-demo", environment=stack_environment) as running:
        processes = running.descendants()
        assert len(processes) >= len(PARTS)
        began = time.monotonic()
        running.process.send_signal(number)
        running.wait_for_line("Stopping")
        running.process.send_signal(number)
        assert running.process.wait(10) == 0
        assert time.monotonic() - began < 10
        assert all_gone(processes)
        assert not (first_run.data_dir / "pids.json").exists()


async def test_nothing_outlives_a_killed_stack_and_the_next_start_is_sound(
    first_run: RunningStack, stack_environment: dict[str, str]
) -> None:
    with running_stack(first_run.data_dir, "--no-demo", environment=stack_environment) as killed:
        processes = killed.descendants()
        killed.process.kill()
        killed.process.wait()
        assert all_gone(processes)
    with running_stack(first_run.data_dir, "--no-demo", environment=stack_environment) as running:
        assert running.ready.credentials() == first_run.ready.credentials()
        await log_in_everybody(running.ready)


def test_a_second_stack_on_the_same_data_is_refused_and_hurts_nobody(stack: RunningStack, tmp_path: Path) -> None:
    before = stack.pids()
    ready, log = tmp_path / "ready", tmp_path / "log"
    assert start(stack.data_dir, ready, log, "--no-demo").wait(30) == 1
    assert "running" in log.read_text()
    assert stack.pids() == before
    assert stack.process.poll() is None


def test_a_signal_during_the_start_leaves_nothing_running(tmp_path: Path, stack_environment: dict[str, str]) -> None:
    data, ready, log = tmp_path / "data", tmp_path / "ready", tmp_path / "log"
    with start(data, ready, log, "--no-demo", environment=stack_environment) as process:
        deadline = time.monotonic() + 30
        while not (data / "pids.json").exists():
            assert time.monotonic() < deadline
        processes = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(10) == 0
    assert all_gone(processes)
    assert not ready.exists()


def test_production_is_refused_without_servers_of_its_own(tmp_path: Path, stack_environment: dict[str, str]) -> None:
    log = tmp_path / "log"
    environment = stack_environment | {"ENVIRONMENT": "production"}
    process = start(tmp_path / "data", tmp_path / "ready", log, environment=environment)
    assert process.wait(30) == 78
    assert "embedded" in log.read_text()
    assert not (tmp_path / "data").exists()


def test_the_command_line_explains_itself(stack_environment: dict[str, str]) -> None:
    page = subprocess.run(idem("--help"), env=stack_environment, capture_output=True, text=True, check=True).stdout
    for command in ("up", "serve", "worker", "demo", "bench", "users", "models"):
        assert command in page


def test_a22_only_the_stack_itself_uses_its_servers(stack: RunningStack, stack_environment: dict[str, str]) -> None:
    """Every user of the machine can connect to the ports. The commands beside the stack find the secret in its folder."""
    mongo_port, redis_port = (
        re.findall(r"127\.0\.0\.1:(\d+)", url)[0] for url in (stack.ready.mongo_uri, stack.ready.redis_url)
    )
    with (
        pymongo.MongoClient[dict[str, object]](f"mongodb://127.0.0.1:{mongo_port}/?directConnection=true") as client,
        pytest.raises(OperationFailure, match="requires authentication"),
    ):
        client["idem"]["users"].update_many({}, {"$set": {"roles": ["admin"]}})
    with redis.Redis(port=int(redis_port)) as client, pytest.raises(redis.RedisError):
        client.config_set("dir", str(stack.data_dir))
    secret = (stack.data_dir / "server_secret").read_text()
    assert secret not in stack.said
    assert not [process for process in stack.descendants() if secret in " ".join(process.cmdline())]
    files = [path for path in stack.data_dir.iterdir() if path.is_file() and secret.encode() in path.read_bytes()]
    assert {path.name for path in files} == {"server_secret", "redis.conf", "ready.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    logs = [path for path in (stack.data_dir / "logs").iterdir() if secret.encode() in path.read_bytes()]
    assert logs == []
    checked = subprocess.run(
        idem("check", "--data-dir", str(stack.data_dir), "--json"), env=stack_environment, capture_output=True, check=False
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    words = ("create", "zoe", "--role", "auditor", "--password-stdin", "--data-dir", str(stack.data_dir))
    made = subprocess.run(
        idem("users", *words), env=stack_environment, input=b"correct horse battery\n", capture_output=True, check=False
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert b"zoe may log in." in made.stdout
