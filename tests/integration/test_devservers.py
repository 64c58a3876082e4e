"""The servers of a trial: found, started on any port, stopped and killed without losing what they acknowledged."""

import stat
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pymongo
import pytest
import redis
from pymongo.errors import PyMongoError
from pymongo.write_concern import WriteConcern

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
        assert client.info("memory")["maxmemory_policy"] == "noeviction"
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


def _deeds_in_mongod(client: "pymongo.MongoClient[dict[str, object]]") -> list[Callable[[], object]]:
    """What a stranger on the machine may want to do."""
    users, admin = client["trial"]["users"], client["admin"]
    return [
        partial(users.update_one, {"_id": "olga"}, {"$set": {"roles": ["admin"]}}),
        partial(users.find_one, {}),
        client.list_database_names,
        # The first user of a mongod could be made by anybody on its machine.
        partial(admin.command, "createUser", "mallory", pwd="m", roles=["root"]),
        partial(admin.command, "shutdown"),
    ]


@pytest.mark.parametrize("credentials", ["", "__system:guessed@", "mallory:m@"])
def test_a22_nobody_without_the_secret_reads_or_writes_in_mongod(
    mongo_server: services.Server, credentials: str
) -> None:
    olga: dict[str, object] = {"_id": "olga", "roles": ["officer"]}
    address = (
        f"mongodb://{credentials}127.0.0.1:{mongo_server.port}/?directConnection=true&serverSelectionTimeoutMS=2000"
    )
    with (
        pymongo.MongoClient[dict[str, object]](mongo_server.url) as owner,
        pymongo.MongoClient[dict[str, object]](address + "&authSource=local" * bool(credentials)) as stranger,
    ):
        owner["trial"]["users"].insert_one(olga)
        for deed in _deeds_in_mongod(stranger):
            with pytest.raises(PyMongoError, match=r"requires authentication|Authentication failed"):
                deed()
        assert owner["trial"]["users"].find_one({}) == olga
        owner.drop_database("trial")


def test_a22_nobody_without_the_secret_uses_redis_and_nobody_at_all_writes_files_by_it(
    redis_server: services.Server, tmp_path: Path
) -> None:
    with redis.Redis(port=redis_server.port) as stranger:
        for words in (("PING",), ("CONFIG", "SET", "dir", str(tmp_path)), ("SAVE",), ("FLUSHALL",)):
            with pytest.raises(redis.RedisError, match=r"Authentication required|unknown command"):
                stranger.execute_command(*words)
    with redis.Redis.from_url(redis_server.url) as owner:
        assert owner.ping() is True
        for name in servers.REDIS_REMOVED:
            with pytest.raises(redis.ResponseError, match="unknown command"):
                owner.execute_command(name, "GET", "dir")
    assert list(tmp_path.iterdir()) == []


def test_a22_only_its_owner_reads_the_secret(tmp_path: Path) -> None:
    secret = servers.ServerSecret.kept_in(tmp_path)
    assert servers.ServerSecret.kept_in(tmp_path) == secret
    assert {stat.S_IMODE(path.stat().st_mode) for path in (secret.key_file, secret.redis_config)} == {0o600}
    assert len(secret.text) == 64
    other = tmp_path / "other"
    other.mkdir()
    assert servers.ServerSecret.kept_in(other).text != secret.text
    commands = [servers.mongod_command(tmp_path, 1, secret), servers.redis_command(tmp_path, 2, secret)]
    # Every user sees the command lines of all processes.
    assert not [word for command in commands for word in command if secret.text in word]


def test_a22_the_data_of_a_trial_without_a_secret_opens_with_one(tmp_path: Path) -> None:
    """As an older version left it, with a killed mongod."""
    port, secret = servers.free_port(), services.secret()
    words = servers.mongod_command(tmp_path, port, secret)
    older = [word for word in words if word not in {"--keyFile", str(secret.key_file)}]
    older = [word.replace("enableLocalhostAuthBypass=false", "ttlMonitorEnabled=true") for word in older]
    process = subprocess.Popen(older, stdout=subprocess.DEVNULL)
    try:
        with pymongo.MongoClient[dict[str, object]]("127.0.0.1", port, directConnection=True) as client:
            member = {"_id": 0, "host": f"127.0.0.1:{port}"}
            client.admin.command("replSetInitiate", {"_id": servers.REPLICA_SET, "members": [member]})
            while not client.admin.command("hello")["isWritablePrimary"]:
                time.sleep(servers.POLL_SECONDS)
            client["trial"]["rows"].with_options(write_concern=WriteConcern("majority", j=True)).insert_one({"_id": 1})
    finally:
        process.kill()
        process.wait()
    server = services.mongo_server(tmp_path)
    with pymongo.MongoClient[dict[str, object]](server.url) as client:
        assert client["trial"]["rows"].find_one({}) == {"_id": 1}
    server.process.close()
