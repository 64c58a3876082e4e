"""A Runtime on real stores with a fresh database, and an engine that reads from the pixels whose face is meant."""

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pymongo
import pytest
import structlog
from fastapi import FastAPI
from passlib.hash import argon2
from pydantic import SecretStr

from app.access import passwords
from app.api import audit, auth, faces, identities, problems
from app.api.envelope import Envelope
from app.audit import by_system
from app.config import Settings, random_secret
from app.documents.galleries import Gallery
from app.domain.callers import Role
from app.runtime import Runtime, open_runtime
from app.use_cases.keep_users import UserFields, create_user, ensure_admin
from tests.fakes import FakeEngine
from tests.support import services
from tests.support.accounts import ADMIN, PASSWORD, AccountService, open_accounts

# structlog's own default draws each traceback with colours and locals, which takes a second.
structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()])
pytest.register_assert_rewrite("tests.unit.documents.questions")


@pytest.fixture(scope="session")
def shared_database() -> str:
    """A name for the tests that take turns with one database."""
    return f"test_{uuid.uuid4().hex}"


@pytest.fixture
def empty_database(mongo_server: services.Server, shared_database: str) -> str:
    """A database with nothing in it but the indexes of the test before, which take longer to make than most tests."""
    with pymongo.MongoClient[dict[str, object]](mongo_server.url) as client:
        database = client[shared_database]
        for collection in database.list_collections():
            if collection["options"] or "." in collection["name"]:  # a validator that is still there, half a restore
                database.drop_collection(collection["name"])
            else:
                database[collection["name"]].delete_many({})
    return shared_database


@pytest.fixture
def settings(mongo_server: services.Server, empty_database: str, tmp_path: Path) -> Settings:
    """A fresh database and photo folder. Nothing listens where the queue should be: jobs are run by the tests."""
    return Settings(
        mongodb_uri=mongo_server.url,
        mongodb_database=empty_database,
        mongodb_min_pool_size=0,
        redis_url="redis://127.0.0.1:1/0",
        key_encryption_key=SecretStr(random_secret()),
        storage_path=tmp_path / "photos",
        evidence_path=tmp_path / "evidence",
        vector_db_path=tmp_path / "index",
        index_cache_path=tmp_path / "index-copies",
    )


@pytest.fixture
async def runtime(settings: Settings) -> AsyncIterator[Runtime]:
    """What a process owns, with an empty gallery `default` whose photos need no quality."""
    async with open_runtime(settings, FakeEngine()) as opened:
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
        yield opened


@pytest.fixture
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hashes that take a millisecond: what they cost in earnest is the unit tests' matter."""
    monkeypatch.setattr(passwords, "_ARGON2", argon2.using(type="ID", memory_cost=64, rounds=1, parallelism=1))
    passwords._decoy_hash.cache_clear()
    yield
    passwords._decoy_hash.cache_clear()


@pytest.fixture
async def service(runtime: Runtime, cheap_passwords: None) -> AsyncIterator[AccountService]:
    """The account routes over a fresh store with one admin."""
    await ensure_admin(runtime, ADMIN, PASSWORD)
    async with open_accounts(runtime) as opened:
        yield opened


@pytest.fixture
async def officer(runtime: Runtime) -> AsyncIterator[httpx.AsyncClient]:
    """The routes about people and faces as an officer reaches them."""
    await runtime.access.load_keys()
    app = FastAPI()
    app.state.runtime = runtime
    for door in (auth, identities, faces, audit):
        app.include_router(door.router)
    problems.install(app)
    app.add_middleware(Envelope, body_limit=runtime.settings.max_json_bytes)
    await create_user(runtime, by_system("user.create"), UserFields("olga", (Role.OFFICER,), None), PASSWORD)
    transport = httpx.ASGITransport(app, client=("192.0.2.7", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://idem.test") as http:
        form = {"grant_type": "password", "username": "olga", "password": PASSWORD}
        token = (await http.post("/v1/auth/token", data=form)).json()["access_token"]
        http.headers["Authorization"] = f"Bearer {token}"
        yield http
