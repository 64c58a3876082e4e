"""The documents' read questions on a real MongoDB; the same as in the unit tests."""

import pytest

from app.documents.galleries import Gallery
from app.runtime import Runtime
from tests.unit.documents.questions import *  # noqa: F403 - the tests are what is imported


@pytest.fixture
async def store(runtime: Runtime) -> None:
    """An empty database."""
    await Gallery.get_pymongo_collection().delete_many({})
