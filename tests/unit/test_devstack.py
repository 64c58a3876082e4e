"""What `idem up` decides before any server runs."""

import asyncio
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.cli.settings import read_settings
from app.config import Settings, random_secret
from app.devstack.stack import Stack, StackFailed, Wishes, data_folder, listen, stop_signals


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket as the API processes share it."""
    with listen("127.0.0.1", 0) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine that runs the tests, and no `.env`."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def test_what_no_setting_names_is_embedded(tmp_path: Path, listener: socket.socket) -> None:
    stack = Stack(Settings(), Wishes(data_dir=tmp_path), listener)
    environment = stack.environment()
    secret = (tmp_path / "server_secret").read_text()
    assert stack.mongo_uri.startswith(f"mongodb://__system:{secret}@127.0.0.1:")
    assert stack.redis_url.startswith(f"redis://:{secret}@127.0.0.1:")
    assert not [part for part in stack.parts() if secret in part.address], "a terminal shows no secret"
    assert environment["STORAGE_PATH"] == str(tmp_path / "photos")
    assert environment["VECTOR_DB_PATH"] == str(tmp_path / "index")


def test_tokens_name_the_address_that_the_stack_answers_on(tmp_path: Path, listener: socket.socket) -> None:
    stack = Stack(Settings(_env_file=None), Wishes(tmp_path, port=0), listener)
    assert stack.environment()["PUBLIC_URL"] == stack.url == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_what_a_setting_names_is_used(tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "MONGODB_URI": "mongodb://db.example/?replicaSet=rs0",
        "REDIS_URL": "redis://queue.example",
        "STORAGE_PATH": "/srv/photos",
        "VECTOR_DB_PATH": "/srv/index",
        "KEY_ENCRYPTION_KEY": "given",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    stack = Stack(Settings(), Wishes(data_dir=tmp_path), listener)
    environment = stack.environment()
    assert {name: environment[name] for name in given} == given
    assert "KEY_ENCRYPTION_KEY_FILE" not in environment
    assert not (tmp_path / "key_encryption_key").exists()


def test_the_command_line_wins_over_the_settings(
    tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKERS", "3")
    monkeypatch.setenv("FACE_MODEL", "buffalo_sc")
    settings = Settings()
    from_settings = Stack(settings, Wishes(data_dir=tmp_path), listener).environment()
    from_options = Stack(settings, Wishes(data_dir=tmp_path, api_workers=2, model="dlib"), listener).environment()
    assert (from_settings["WORKERS"], from_settings["FACE_MODEL"]) == ("3", "buffalo_sc")
    assert (from_options["WORKERS"], from_options["FACE_MODEL"]) == ("2", "dlib")


def test_a_generated_key_encryption_key_is_kept_and_private(tmp_path: Path, listener: socket.socket) -> None:
    stack = Stack(Settings(), Wishes(data_dir=tmp_path), listener)
    path = Path(stack.environment()["KEY_ENCRYPTION_KEY_FILE"])
    first = path.read_text()
    assert Path(stack.environment()["KEY_ENCRYPTION_KEY_FILE"]).read_text() == first
    assert len(first) >= 43
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_total_of_mongodb_connections_counts_every_process(tmp_path: Path, listener: socket.socket) -> None:
    stack = Stack(Settings(), Wishes(data_dir=tmp_path, api_workers=2), listener)
    assert stack.connections() == "MongoDB connections: 30 to 150 (3 processes x 10 to 50)"


def test_the_children_stop_sooner_than_the_stack_must(tmp_path: Path, listener: socket.socket) -> None:
    for given, expected in ((8, 8), (25, 8), (3, 3)):
        settings = Settings(shutdown_grace_seconds=given)
        environment = Stack(settings, Wishes(data_dir=tmp_path), listener).environment()
        assert int(environment["SHUTDOWN_GRACE_SECONDS"]) == expected


def test_a_data_folder_serves_one_stack_at_a_time(tmp_path: Path) -> None:
    with data_folder(tmp_path), pytest.raises(StackFailed, match="running"), data_folder(tmp_path):
        pass
    with data_folder(tmp_path) as leftovers:
        assert leftovers == []


def test_a_taken_port_is_named(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(StackFailed, match=rf"{port}.*--port"):
        listen("127.0.0.1", port)


def test_production_never_starts_an_embedded_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ENVIRONMENT", "production")
    with pytest.raises(Exception, match="78"):
        read_settings()
    said = capsys.readouterr().err
    assert "MONGODB_URI" in said
    assert "REDIS_URL" in said
    assert "KEY_ENCRYPTION_KEY" in said


async def test_the_first_signal_stops_and_a_second_changes_nothing() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            async with asyncio.timeout(5):
                await stop.wait()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_auto_stays_with_the_model_that_the_store_was_filled_with(tmp_path: Path, listener: socket.socket) -> None:
    assert Stack(Settings(_env_file=None), Wishes(tmp_path), listener).environment()["FACE_MODEL"] == "auto"
    (tmp_path / "face_model").write_text("dlib")
    assert Stack(Settings(_env_file=None), Wishes(tmp_path), listener).environment()["FACE_MODEL"] == "dlib"
    asked = Stack(Settings(_env_file=None), Wishes(tmp_path, model="buffalo_sc"), listener)
    assert asked.environment()["FACE_MODEL"] == "buffalo_sc"


def test_production_does_not_choose_a_model_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "ENVIRONMENT": "production",
        "MONGODB_URI": "mongodb://db/",
        "REDIS_URL": "redis://queue/0",
        "KEY_ENCRYPTION_KEY": random_secret(),
        "FACE_MODEL": "auto",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="FACE_MODEL=auto"):
        Settings(_env_file=None)
    monkeypatch.setenv("FACE_MODEL", "opencv_zoo")
    assert Settings(_env_file=None).is_production
