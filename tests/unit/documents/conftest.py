"""Beanie's documents on mongomock: for read questions only, where no server can run."""

from collections.abc import Generator, Mapping
from typing import TypeVar

import mongomock.database
import mongomock_motor
import pytest
from beanie import init_beanie

from app.runtime import DOCUMENTS

pytest.register_assert_rewrite("tests.unit.documents.questions")

_list_collection_names = mongomock.database.Database.list_collection_names

Cursor = TypeVar("Cursor")


def _list_without_options(
    database: mongomock.database.Database,
    filter: Mapping[str, object] | None = None,  # noqa: A002 - PyMongo's name
    session: object = None,
    **_: object,
) -> list[str]:
    names: list[str] = _list_collection_names(database, filter=filter, session=session)
    return names


def _awaited(cursor: Cursor) -> Generator[None, None, Cursor]:
    return cursor
    yield


@pytest.fixture
async def store(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty database without indexes: mongomock knows no partial ones.

    What Beanie 2 asks for beyond what mongomock-motor 0.0.36 knows is added for the test.
    """
    monkeypatch.setattr(mongomock.database.Database, "list_collection_names", _list_without_options)
    monkeypatch.setattr(mongomock_motor.AsyncLatentCommandCursor, "__await__", _awaited, raising=False)
    client = mongomock_motor.AsyncMongoMockClient(tz_aware=True)
    await init_beanie(database=client["questions"], document_models=DOCUMENTS, skip_indexes=True)
