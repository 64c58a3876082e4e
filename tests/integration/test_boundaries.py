"""The boundaries on real stores: every way to MongoDB passes them, a store that is away is left alone, and comes back."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
import pytest
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import AutoReconnect, OperationFailure, PyMongoError

from app.api import operations
from app.api.problems import as_problem
from app.audit import by_system
from app.boundary import Boundaries, BoundedPhotos
from app.config import Settings
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.errors import NotReady
from app.main import create_app
from app.runtime import Runtime
from app.use_cases.publish import publish
from storage.photos import LocalPhotoStore, PhotoStoreUnavailable
from tests.builders import active, default_gallery, enrolled, identified, known, screened, verified
from tests.support import services

T = TypeVar("T")


@dataclass(slots=True)
class _Scripted:
    """Does to the n-th call of an operation what the script says: "error", "cut"; notes every call."""

    script: dict[str, list[str]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    async def around(
        self, dependency: str, operation: str, work: Callable[[], Awaitable[T]], broken: Callable[[str], Exception]
    ) -> T:
        self.calls.append(f"{dependency} {operation}")
        todo = self.script.get(operation, [])
        what = todo.pop(0) if todo else ""
        if what == "error":
            raise broken("nothing was done")
        answer = await work()
        if what == "cut":
            raise broken("the answer was lost")
        return answer


@pytest.fixture
async def watched(runtime: Runtime) -> AsyncIterator[_Scripted]:
    scripted = _Scripted()
    runtime.boundaries.mongo.faults = scripted
    yield scripted
    runtime.boundaries.mongo.faults = None


async def test_every_way_to_mongodb_passes_the_boundary(runtime: Runtime, watched: _Scripted) -> None:
    """It hangs on a method of the driver's own: another release that goes another way must be noticed."""
    galleries = Gallery.get_pymongo_collection()

    async def body(session: AsyncClientSession) -> None:
        await galleries.update_one({}, {"$inc": {"policy_version": 1}}, session=session)

    ways: dict[str, Callable[[], Awaitable[object]]] = {
        "find": Gallery.find_all().to_list,
        "aggregate": Gallery.find_all().count,
        "insert": lambda: AuditEvent.get_pymongo_collection().insert_one({"_id": "x"}),
        "update": lambda: galleries.update_one({}, {"$set": {"x": 1}}),
        "findAndModify": lambda: galleries.find_one_and_update({}, {"$set": {"x": 2}}),
        "bulkWrite": lambda: AuditEvent.get_pymongo_collection().insert_many([{"_id": str(n)} for n in range(200)]),
        "getMore": lambda: AuditEvent.get_pymongo_collection().find({}).batch_size(2).to_list(),
        "delete": lambda: AuditEvent.get_pymongo_collection().delete_many({}),
        "commitTransaction": lambda: runtime.transaction(body),
        "command": lambda: runtime.mongo.admin.command("hello"),
    }
    for way, go in ways.items():
        watched.calls.clear()
        await go()
        assert watched.calls, f"{way} goes past the boundary"


async def test_h74_a_commit_whose_answer_is_lost_is_done_once(runtime: Runtime, watched: _Scripted) -> None:
    watched.script["commitTransaction"] = ["cut", "error", "cut"]
    ann = await enrolled(runtime, "ann")
    assert (await known(ann)).enrol_seq == 1
    assert (await default_gallery()).identities == await AuditEvent.find({"action": "identity.enrol"}).count() == 1


async def test_h74_h76_a_store_that_goes_away_inside_a_transaction_is_asked_again_and_the_caller_sees_one_result(
    runtime: Runtime, watched: _Scripted
) -> None:
    watched.script |= {"update": ["", "error", "cut"], "insert": ["cut", "error"]}
    ann = await enrolled(runtime, "ann")
    assert watched.calls.count("mongo abortTransaction") >= 2
    assert (await default_gallery()).seq == (await known(ann)).enrol_seq == 1
    assert await AuditEvent.find({"action": "identity.enrol"}).count() == await Identity.count() == 1


async def _policy_version() -> int:
    with suppress(PyMongoError):
        return (await default_gallery()).policy_version
    await asyncio.sleep(0.1)
    return await _policy_version()


async def test_h76_a_primary_that_steps_down_and_comes_back_gives_one_result(runtime: Runtime) -> None:
    tries = 0

    async def body(session: AsyncClientSession) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            await Gallery.get_pymongo_collection().find_one({}, session=session)  # begun: it cannot outlive the step
            with suppress(PyMongoError):
                await runtime.mongo.admin.command("replSetStepDown", 1, force=True)
        await Gallery.get_pymongo_collection().update_one({}, {"$inc": {"policy_version": 1}}, session=session)

    before = await _policy_version()
    async with asyncio.timeout(15):  # on doubt a caller asks again
        while tries == 0 or (await _policy_version()) == before:
            with suppress(PyMongoError):
                await runtime.transaction(body)
    assert tries > 1
    assert (await default_gallery()).policy_version == before + 1


async def test_h75_a_frozen_mongodb_is_left_alone_after_some_failures_and_served_again_when_it_thaws(
    runtime: Runtime, mongo_server: services.Server
) -> None:
    ann = await active(runtime, "ann")
    waiting = await enrolled(runtime, "bob")
    calls = [lambda: known(ann), lambda: identified(runtime, "ann"), lambda: verified(runtime, ann, "ann")]
    with mongo_server.process.frozen():
        failures = runtime.settings.boundary_failures
        await asyncio.gather(*(Gallery.find_all().to_list() for _ in range(failures)), return_exceptions=True)
        assert runtime.boundaries.mongo.state != "closed"
        began = time.monotonic()
        for call in calls:
            with pytest.raises(PyMongoError):
                await call()
        assert time.monotonic() - began < 0.5, "refused at once"
    async with asyncio.timeout(10):
        while True:
            with suppress(PyMongoError):
                await screened(runtime, waiting)
                break
            await asyncio.sleep(0.1)
    assert runtime.boundaries.mongo.state == "closed"
    assert (await known(waiting)).status == "active"


async def test_a_transaction_that_has_begun_ends_though_the_store_is_left_alone_meanwhile(runtime: Runtime) -> None:
    boundary = runtime.boundaries.mongo

    async def body(session: AsyncClientSession) -> None:
        await Gallery.get_pymongo_collection().update_one({}, {"$inc": {"policy_version": 1}}, session=session)
        for _ in range(runtime.settings.boundary_failures):
            boundary._note_failure(AutoReconnect("gone"))
        with pytest.raises(AutoReconnect):
            await Gallery.find_all().to_list()

    before = (await default_gallery()).policy_version
    await runtime.transaction(body)
    assert (await default_gallery()).policy_version == before + 1


async def test_h77_h81_a_photo_store_that_hangs_is_given_up_and_then_left_alone(runtime: Runtime) -> None:
    settings = runtime.settings.model_copy(update={"photo_timeout_seconds": 0.05, "boundary_failures": 2})
    boundary = Boundaries.of(settings).photos

    class _Hanging(LocalPhotoStore):
        is_hanging = True

        async def put(self, key: str, data: bytes) -> None:
            if self.is_hanging:
                await asyncio.Event().wait()
            await super().put(key, data)

    store = _Hanging(settings.storage_path)
    runtime.photos = BoundedPhotos(store, boundary)
    began = time.monotonic()
    for _ in range(6):
        with pytest.raises(PhotoStoreUnavailable):
            await enrolled(runtime, "ann")
    assert time.monotonic() - began < 2
    assert await Identity.count() == 0
    store.is_hanging = False
    await asyncio.sleep(settings.boundary_pause_seconds)
    assert (await enrolled(runtime, "ann")).enrol_seq == 1


async def test_a_listing_of_photos_passes_its_boundary_whole(runtime: Runtime) -> None:
    for name in ("a", "b"):
        await runtime.photos.put(f"g/i/{name}", b"x")
    assert {photo.key async for photo in runtime.photos.list()} == {"g/i/a", "g/i/b"}


@pytest.fixture
async def door(runtime: Runtime, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(settings)
    app.state.runtime = runtime
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://idem.test") as http:
        yield http


async def test_readiness_and_figures_tell_the_state_of_the_boundaries(
    runtime: Runtime, door: httpx.AsyncClient
) -> None:
    checks = (await door.get("/ready")).json()["checks"]
    assert {name: check.get("boundary") for name, check in checks.items()} == {
        "model": None, "mongo": "closed", "queue": "open", "photos": "closed", "index": None, "clock": None, "worker": None,
    }  # fmt: skip
    for _ in range(runtime.settings.boundary_failures):
        runtime.boundaries.photos._note_failure(PhotoStoreUnavailable("gone"))
    page = (await door.get("/ready")).json()
    assert (page["status"], page["checks"]["photos"]["status"]) == ("degraded", "down")
    figures = (await door.get("/metrics")).text
    assert 'idem_boundary_state{dependency="photos"} 2.0' in figures
    assert 'idem_boundary_state{dependency="mongo"} 0.0' in figures


async def _warm(runtime: Runtime) -> None:
    """So that the checks' time limits are not spent on opening the gallery."""
    async with asyncio.timeout(30):
        while True:
            with suppress(NotReady):
                await runtime.search.warm(await default_gallery())
                return


async def test_a_template_that_does_not_open_stops_its_gallery_and_is_told(
    runtime: Runtime, door: httpx.AsyncClient, capsys: pytest.CaptureFixture[str]
) -> None:
    await _warm(runtime)
    ann = await enrolled(runtime, "ann")
    (sample,) = ann.samples
    broken = sample.template[:-1] + bytes([sample.template[-1] ^ 1])
    await Identity.get_pymongo_collection().update_one({"_id": ann.id}, {"$set": {"samples.0.template": broken}})
    page = (await door.get("/ready")).json()
    assert (page["status"], page["checks"]["index"]["status"]) == ("degraded", "degraded")
    assert "default" in page["checks"]["index"]["reason"]
    assert ann.id not in str(page)
    assert 'idem_index_unreadable{gallery="default"} 1.0' in (await door.get("/metrics")).text
    said = capsys.readouterr().out
    assert "template_unreadable" in said
    assert ann.id in said, "the operator finds whom it is about"
    await Identity.get_pymongo_collection().update_one(
        {"_id": ann.id}, {"$set": {"samples.0.template": sample.template}}
    )
    assert (await door.get("/ready")).json()["checks"]["index"]["status"] == "ok"
    assert (await screened(runtime, ann)).status == "active"


async def test_h92_without_the_folder_of_the_index_searches_go_on_and_readiness_tells_it(
    runtime: Runtime, door: httpx.AsyncClient
) -> None:
    await _warm(runtime)
    ann = await active(runtime, "ann")
    await publish(runtime, by_system("index.publish"), (await default_gallery()).id, holder="test")
    assert [c.identity_id for c in (await identified(runtime, "ann")).candidates] == [ann.id]
    share, aside = runtime.settings.vector_db_path, runtime.settings.vector_db_path.with_name("aside")
    share.rename(aside)
    bob = await active(runtime, "bob")
    for person, name in ((ann, "ann"), (bob, "bob")):
        assert [c.identity_id for c in (await identified(runtime, name)).candidates] == [person.id]
    page = (await door.get("/ready")).json()
    assert (page["status"], page["checks"]["index"]["status"]) == ("degraded", "degraded")
    assert "folder" in page["checks"]["index"]["reason"]
    before = (await default_gallery()).published
    share.write_text("not a folder")  # root may write everywhere, but not below a file
    with pytest.raises(OSError):
        await publish(runtime, by_system("index.publish"), (await default_gallery()).id, holder="test")
    assert (await default_gallery()).published == before, "no new generation without its files"
    share.unlink()
    aside.rename(share)
    assert (await door.get("/ready")).json()["checks"]["index"]["status"] == "ok"


async def test_h93_with_mongodbs_disk_full_nothing_is_enrolled_and_the_caller_hears_503(runtime: Runtime) -> None:
    class _Full:
        async def around(
            self, dependency: str, operation: str, work: Callable[[], Awaitable[T]], broken: Callable[[str], Exception]
        ) -> T:
            del dependency, broken
            if operation in ("insert", "update"):
                raise OperationFailure("no space left on device", 14031, {"codeName": "OutOfDiskSpace"})
            return await work()

    runtime.boundaries.mongo.faults = _Full()
    with pytest.raises(OperationFailure) as full:
        await enrolled(runtime, "ann")
    runtime.boundaries.mongo.faults = None
    problem = as_problem(full.value)
    assert (problem.status, problem.retry_after_seconds is not None) == (503, True)
    assert (await default_gallery()).seq == await Identity.count() == await AuditEvent.count() == 0
    assert (await enrolled(runtime, "ann")).enrol_seq == 1


async def test_h86_screenings_that_were_given_up_are_counted_for_an_alert(
    runtime: Runtime, door: httpx.AsyncClient
) -> None:
    assert "idem_screenings_failed 0.0" in (await door.get("/metrics")).text
    ann = await enrolled(runtime, "ann")
    await Identity.get_pymongo_collection().update_one({"_id": ann.id}, {"$set": {"status": "failed"}})
    assert "idem_screenings_failed 1.0" in (await door.get("/metrics")).text
    assert operations.FAILED_SCREENINGS._value.get() == 1
