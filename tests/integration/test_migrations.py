"""Stored documents of older versions are migrated at the start."""

import asyncio
from functools import partial
from typing import Any

import pymongo
import pymongo.monitoring
import pytest

from app.boundary import BoundedMongoClient
from app.config import Settings
from app.documents import migrations
from app.documents.galleries import Gallery
from app.domain.policy import GalleryPolicy
from app.runtime import Runtime, open_runtime
from tests.fakes import FakeEngine


async def make_old(runtime: Runtime, name: str, share: float) -> None:
    """A gallery as the version before stored it."""
    gallery = await runtime.create_gallery(name, GalleryPolicy(quality="strict"))
    await Gallery.get_pymongo_collection().update_one(
        {"_id": gallery.id},
        {
            "$set": {"policy.second_face_share": share, "policy_version": 3},
            "$unset": {"policy.second_face_prominence": 1, "policy.faces": 1},
        },
    )


def raw(settings: Settings) -> dict[str, dict[str, Any]]:
    """The stored galleries, by name."""
    with pymongo.MongoClient[dict[str, Any]](settings.mongodb_uri) as client:
        return {row["name"]: row for row in client[settings.mongodb_database]["galleries"].find()}


@pytest.fixture
async def old_store(settings: Settings) -> Settings:
    """A store with galleries of an older version."""
    async with open_runtime(settings, FakeEngine()) as runtime:
        for name, share in (("usual", 0.25), ("strict", 0.1), ("loose", 1.0)):
            await make_old(runtime, name, share)
    return settings


async def test_a_policy_keeps_a_share_set_by_hand_and_gets_the_new_default_otherwise(old_store: Settings) -> None:
    async with open_runtime(old_store, FakeEngine()):
        found = {g.name: g.policy.second_face_prominence for g in await Gallery.find_all().to_list()}
        assert found == {"default": 0.33, "usual": 0.33, "strict": 0.1, "loose": 1.0}
    for name, stored in raw(old_store).items():
        assert "second_face_share" not in stored["policy"]
        assert stored["policy_version"] == (1 if name == "default" else 4)
        assert stored["policy"]["quality"] == ("standard" if name == "default" else "strict")


async def test_processes_that_start_together_migrate_once(old_store: Settings) -> None:
    async def start() -> None:
        # Only the migration step, because the models of one process are bound to one client.
        async with pymongo.AsyncMongoClient[dict[str, Any]](old_store.mongodb_uri) as client:
            await migrations.migrate(client[old_store.mongodb_database])

    await asyncio.gather(*(start() for _ in range(4)))
    assert {name: stored["policy_version"] for name, stored in raw(old_store).items() if name != "default"} == {
        "usual": 4, "strict": 4, "loose": 4,
    }  # fmt: skip


async def test_documents_of_an_older_process_are_read_and_migrated_at_the_next_start(
    settings: Settings,
) -> None:
    async with open_runtime(settings, FakeEngine()) as runtime:
        await make_old(runtime, "late", 0.5)
        late = await Gallery.named("late")
        assert late is not None
        assert late.policy.second_face_prominence == 0.5
    async with open_runtime(settings, FakeEngine()):
        pass
    assert raw(settings)["late"]["policy"]["second_face_prominence"] == 0.5


async def test_a_migrated_store_is_not_written_to(old_store: Settings) -> None:
    async with open_runtime(old_store, FakeEngine()) as runtime:
        before = raw(old_store)
        await migrations.migrate(runtime.mongo[old_store.mongodb_database])
    assert raw(old_store) == before


async def test_a_start_has_time_to_build_the_indexes_of_a_large_store(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pymongo.AsyncMongoClient[dict[str, Any]](settings.mongodb_uri) as client:
        events = client[settings.mongodb_database]["audit_events"]
        await events.drop()
        asked: list[float] = []
        # As MongoDB is told with each command how long it may take.
        listener = _Given(asked, "createIndexes")
        monkeypatch.setattr("app.runtime.BoundedMongoClient", partial(BoundedMongoClient, event_listeners=[listener]))
        async with open_runtime(settings, FakeEngine()):
            assert "detail.best_identity_id_1" in await events.index_information()
    assert min(asked) > 600_000


class _Given(pymongo.monitoring.CommandListener):
    """Notes how many milliseconds MongoDB is given for each command of that name."""

    def __init__(self, asked: list[float], name: str) -> None:
        self._asked, self._name = asked, name

    def started(self, event: pymongo.monitoring.CommandStartedEvent) -> None:
        if event.command_name == self._name:
            self._asked.append(event.command["maxTimeMS"])

    def succeeded(self, event: pymongo.monitoring.CommandSucceededEvent) -> None:
        """Nothing to note."""

    def failed(self, event: pymongo.monitoring.CommandFailedEvent) -> None:
        """Nothing to note."""
