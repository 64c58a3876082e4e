"""Servers that tests ask for by name; each is started once a session, at its first use."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pymongo
import pytest

from tests.support import services
from tests.support.packs import weights_dir


@pytest.fixture(scope="session")
def mongo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.Server]:
    """A real mongod, a one-node replica set."""
    server = services.mongo_server(tmp_path_factory.mktemp("mongo"))
    yield server
    server.process.close()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.Server]:
    """A real redis-server."""
    server = services.redis_server(tmp_path_factory.mktemp("redis"))
    yield server
    server.process.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[services.Server]:
    """An S3 server that speaks the MinIO client's protocol."""
    server = services.s3_server()
    yield server
    server.process.close()


@pytest.fixture
def database_name(mongo_server: services.Server) -> Iterator[str]:
    """A name that no other test has; the database is dropped after the test."""
    name = f"test_{uuid.uuid4().hex}"
    yield name
    with pymongo.MongoClient[dict[str, object]](mongo_server.url) as client:
        client.drop_database(name)


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """Where the weights lie (see `weights_dir`), else a folder that need not exist."""
    return weights_dir() or Path("~/.insightface/models").expanduser()
