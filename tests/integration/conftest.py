"""A Runtime on real stores with a fresh database, and an engine that reads from the pixels whose face is meant."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
from pydantic import SecretStr

from app.config import Settings, random_secret
from app.documents.galleries import Gallery
from app.runtime import Runtime, open_runtime
from tests.fakes import FakeEngine
from tests.support import services

# structlog's own default draws each traceback with colours and locals, which takes a second.
structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()])
pytest.register_assert_rewrite("tests.unit.documents.questions")


@pytest.fixture
def settings(mongo_server: services.Server, database_name: str, tmp_path: Path) -> Settings:
    """A fresh database and photo folder. Nothing listens where the queue should be: jobs are run by the tests."""
    return Settings(
        mongodb_uri=mongo_server.url,
        mongodb_database=database_name,
        mongodb_min_pool_size=0,
        redis_url="redis://127.0.0.1:1/0",
        key_encryption_key=SecretStr(random_secret()),
        storage_path=tmp_path / "photos",
        vector_db_path=tmp_path / "index",
        index_cache_path=tmp_path / "index-copies",
    )


@pytest.fixture
async def runtime(settings: Settings) -> AsyncIterator[Runtime]:
    """What a process owns, with an empty gallery `default` whose photos need no quality."""
    async with open_runtime(settings, FakeEngine()) as opened:
        await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.quality": "off"}})
        yield opened
