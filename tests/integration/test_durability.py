"""Order and truth: what an enrolment leaves when stores are away, and what concurrent enrolments leave of the numbers."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from subprocess import PIPE
from typing import TypeVar

import pytest
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from app.access.signing import KEY_RELOAD_SECONDS
from app.devstack.servers import free_port
from app.documents.events import AuditEvent
from app.documents.galleries import GalleryChange
from app.documents.identities import Identity
from app.errors import AuditRefused, Conflict, DependencyUnavailable, ExternalRefTaken, NotFound
from app.runtime import Runtime
from app.use_cases import erase, galleries
from storage.photos import MinioPhotoStore, PhotoStoreUnavailable
from tests.builders import (
    active,
    another_process,
    by_officer,
    decided,
    default_gallery,
    enrolled,
    erased,
    identified,
    known,
    revoked,
    screened,
    suspected,
    verified,
)
from tests.support import services

T = TypeVar("T")


@asynccontextmanager
async def _no_room_for(runtime: Runtime, action: str) -> AsyncIterator[None]:
    """The store refuses this action's events, as if it were broken."""
    database = runtime.mongo[runtime.settings.mongodb_database]
    await database.command("collMod", "audit_events", validator={"action": {"$ne": action}})
    yield
    await database.command("collMod", "audit_events", validator={})


async def _nothing_is_stored() -> None:
    gallery = await default_gallery()
    assert (gallery.seq, gallery.identities, gallery.samples) == (0, 0, 0)
    assert await Identity.count() == await GalleryChange.count() == await AuditEvent.count() == 0


async def test_an_enrolment_is_all_there_when_it_returns(runtime: Runtime) -> None:
    identity = await enrolled(runtime, "ann", photos=2)
    assert await known(identity) == identity
    rows = await GalleryChange.find_all().sort("seq").to_list()
    assert [(r.seq, r.kind, r.identity_id, r.sample_id) for r in rows] == [
        (i, "add", identity.id, sample.id) for i, sample in enumerate(identity.samples, start=1)
    ]
    gallery = await default_gallery()
    assert (gallery.seq, gallery.identities, gallery.samples) == (2, 1, 2)
    (event,) = await AuditEvent.find_all().to_list()
    assert (event.action, event.subject.id, event.actor.id) == ("identity.enrol", identity.id, "officer-1")
    for sample in identity.samples:
        assert sample.photo_key == f"{gallery.id}/{identity.id}/{sample.id}"
        assert await runtime.photos.get(sample.photo_key)


async def test_h97_without_its_audit_event_there_is_no_identity(runtime: Runtime) -> None:
    async with _no_room_for(runtime, "identity.enrol"):
        with pytest.raises(AuditRefused):
            await enrolled(runtime, "ann")
    await _nothing_is_stored()
    assert (await enrolled(runtime, "ann")).enrol_seq == 1


async def test_h97_without_its_audit_event_there_is_no_verdict_decision_erasure_or_answer(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    waiting = await enrolled(runtime, "ann", capture=1)
    async with _no_room_for(runtime, "dedup.verdict"):
        with pytest.raises(AuditRefused):
            await screened(runtime, waiting)
    assert await known(waiting) == waiting
    held = await screened(runtime, waiting)
    _, case = await suspected(runtime, "ann", capture=2)
    async with _no_room_for(runtime, "dedup.decide"):
        with pytest.raises(AuditRefused):
            await decided(runtime, case, "duplicate", about=held)
    async with _no_room_for(runtime, "identity.erase"):
        with pytest.raises(AuditRefused):
            await erased(runtime, ann)
    async with _no_room_for(runtime, "face.verify"):
        with pytest.raises(AuditRefused):
            await verified(runtime, ann, "ann")
    assert [(await known(i)).status for i in (ann, held)] == ["active", "suspected_duplicate"]
    assert (await verified(runtime, ann, "ann")).match, "the refused answer had not used up the selfie"


async def test_numbers_stay_contiguous_under_fifty_enrolments_at_once(runtime: Runtime) -> None:
    async with another_process(runtime) as other:
        doors = [runtime, other]
        people = await asyncio.gather(*(enrolled(doors[i % 2], f"person-{i}") for i in range(50)))
    rows = await GalleryChange.find_all().sort("seq").to_list()
    assert [row.seq for row in rows] == list(range(1, 51))
    assert {row.seq: row.identity_id for row in rows} == {p.enrol_seq: p.id for p in people}
    gallery = await default_gallery()
    assert (gallery.seq, gallery.identities, gallery.samples) == (50, 50, 50)


async def test_numbers_stay_contiguous_while_others_are_erased(runtime: Runtime) -> None:
    async with another_process(runtime) as other:
        people = [await enrolled(runtime, f"person-{i}") for i in range(8)]
        await asyncio.gather(
            *(erased(other, person) for person in people), *(enrolled(runtime, f"later-{i}") for i in range(8))
        )
    rows = await GalleryChange.find_all().sort("seq").to_list()
    assert [row.seq for row in rows] == list(range(1, 25))
    assert sorted(row.kind for row in rows) == ["add"] * 8 + ["blank"] * 8 + ["remove"] * 8


async def test_h76_of_many_enrolments_under_one_reference_exactly_one_wins(runtime: Runtime) -> None:
    async with another_process(runtime) as other:
        doors = [runtime, other]
        spellings = ["NID-1", "nid-1", "ＮＩＤ-1", "Nid-1"]
        tries = [enrolled(doors[i % 2], f"person-{i}", external_ref=spellings[i % 4]) for i in range(8)]
        ended = await asyncio.gather(*tries, return_exceptions=True)
    assert sorted(type(e).__name__ for e in ended) == ["ExternalRefTaken"] * 7 + ["Identity"]
    gallery = await default_gallery()
    assert (gallery.seq, gallery.identities) == (1, 1)
    with pytest.raises(ExternalRefTaken):
        await enrolled(runtime, "late", external_ref="nId-1")


async def test_one_reference_may_stand_in_two_galleries(runtime: Runtime) -> None:
    await enrolled(runtime, "ann", external_ref="NID-1")
    north = await galleries.create(
        runtime, by_officer("gallery.create"), "north", None, (await default_gallery()).policy
    )
    other = await enrolled(runtime, "ann", capture=1, external_ref="NID-1", gallery=north)
    assert (await screened(runtime, other)).status == "active", "galleries are kept apart"


async def test_a_gallery_is_removed_only_when_nobody_is_left(runtime: Runtime) -> None:
    policy = (await default_gallery()).policy
    north = await galleries.create(runtime, by_officer("gallery.create"), "north", None, policy)
    await galleries.delete(runtime, by_officer("gallery.delete"), north)
    with pytest.raises(NotFound):
        await enrolled(runtime, "ann", gallery=north)
    assert await Identity.count() == 0
    south = await galleries.create(runtime, by_officer("gallery.create"), "south", None, policy)
    ann = await enrolled(runtime, "ann", gallery=south)
    with pytest.raises(Conflict):
        await galleries.delete(runtime, by_officer("gallery.delete"), south)
    await erase.erase(runtime, by_officer("identity.erase"), south, ann.id, None)
    await galleries.delete(runtime, by_officer("gallery.delete"), south)
    assert await Identity.count() == await GalleryChange.count() == 0


async def test_h77_with_the_photo_store_away_nothing_is_enrolled_and_searches_go_on(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    before = await default_gallery()
    away = MinioPhotoStore(
        endpoint=f"127.0.0.1:{free_port()}", access_key="a", secret_key="b" * 8, bucket="photos", region="us-east-1",
        secure=False,
    )  # fmt: skip
    async with another_process(runtime, photos=away) as other:
        with pytest.raises(PhotoStoreUnavailable):
            await enrolled(other, "bob")
        assert (await verified(other, ann, "ann")).match
        assert [c.identity_id for c in (await identified(other, "ann")).candidates] == [ann.id]
        assert await default_gallery() == before
        receipt = await erase.erase(other, by_officer("identity.erase"), before, ann.id, None)
    await away.close()
    assert receipt.identity_id == ann.id
    assert await Identity.count() == 1
    assert await Identity.living(ann.id) is None


async def test_h78_a_photo_put_before_a_refused_enrolment_is_all_that_is_left(runtime: Runtime) -> None:
    """No key that opens it is kept, and the sweep takes it."""
    async with _no_room_for(runtime, "identity.enrol"):
        with pytest.raises(AuditRefused):
            await enrolled(runtime, "ann")
    photos = [photo async for photo in runtime.photos.list()]
    assert len(photos) == 1
    assert await Identity.find({"samples.photo_key": photos[0].key}).count() == 0


async def test_h75_with_mongod_frozen_every_use_case_ends_within_three_seconds(
    runtime: Runtime, mongo_server: services.Server
) -> None:
    ann = await active(runtime, "ann")
    waiting = await enrolled(runtime, "bob")
    gallery = await default_gallery()
    with mongo_server.process.frozen():
        started = time.monotonic()
        ended = await asyncio.gather(
            enrolled(runtime, "cid"),
            screened(runtime, waiting),
            erase.erase(runtime, by_officer("identity.erase"), gallery, ann.id, None),
            identified(runtime, "ann"),
            return_exceptions=True,
        )
        seconds = time.monotonic() - started
    assert all(isinstance(e, PyMongoError | DependencyUnavailable) for e in ended), ended
    assert seconds < 3
    assert [(await known(i)).status for i in (ann, waiting)] == ["active", "pending"]
    assert (await screened(runtime, waiting)).status == "active"


async def _free_again(seconds: float, change: Callable[[], Awaitable[T]]) -> T:
    """What the change gives once nothing holds its documents any more."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                return await change()
            except PyMongoError:
                await asyncio.sleep(0.1)


async def test_h75_those_who_wait_for_each_other_do_not_each_wait_for_a_frozen_store(
    runtime: Runtime, mongo_server: services.Server
) -> None:
    gallery = await default_gallery()
    await asyncio.sleep(KEY_RELOAD_SECONDS)  # so that the keys are asked for again

    async def take_a_number(session: AsyncClientSession) -> None:
        await gallery.take_seq(session, 1)

    with mongo_server.process.frozen():
        started = time.monotonic()
        ended = await asyncio.gather(
            *(runtime.in_line(gallery.id, take_a_number) for _ in range(8)),
            *(runtime.access.public_keys() for _ in range(4)),
            return_exceptions=True,
        )
        seconds = time.monotonic() - started
    assert all(isinstance(e, PyMongoError | DependencyUnavailable) for e in ended), ended
    assert seconds < 3
    await _free_again(10, lambda: runtime.in_line(gallery.id, take_a_number))


async def test_h74_h75_mongod_frozen_in_the_middle_of_a_transaction_ends_it_within_three_seconds(
    runtime: Runtime, mongo_server: services.Server
) -> None:
    ann = await active(runtime, "ann")

    async def body(session: AsyncClientSession) -> None:
        assert await ann.change(session, {"status": "failed"})
        mongo_server.process.freeze()
        await Identity.find_all(session=session).to_list()

    started = time.monotonic()
    try:
        with pytest.raises(PyMongoError):
            await runtime.transaction(body)
        seconds = time.monotonic() - started
    finally:
        mongo_server.process.thaw()
    assert seconds < 3
    assert (await _free_again(10, lambda: revoked(runtime, ann))).status == "revoked"


async def test_h74_a_process_killed_in_the_middle_of_a_transaction_holds_up_its_gallery_for_seconds_only(
    runtime: Runtime, mongo_server: services.Server
) -> None:
    taking_a_number = f"""
import pymongo, sys
session = pymongo.MongoClient("{mongo_server.url}").start_session()
session.start_transaction()
galleries = session.client["{runtime.settings.mongodb_database}"].galleries
assert galleries.update_one({{}}, {{"$inc": {{"seq": 1}}}}, session=session).matched_count == 1
print("taken", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", taking_a_number], stdin=PIPE, stdout=PIPE) as other:
        assert other.stdout is not None
        assert await asyncio.to_thread(other.stdout.readline) == b"taken\n"
        other.kill()
    assert (await _free_again(10, lambda: enrolled(runtime, "ann"))).enrol_seq == 1


async def test_h74_what_was_answered_survives_a_kill_of_mongod(runtime: Runtime, mongo_server: services.Server) -> None:
    people = await asyncio.gather(*(enrolled(runtime, f"person-{i}") for i in range(10)))
    mongo_server.process.kill()
    mongo_server.process.start()
    assert {i.id for i in await Identity.find_all().to_list()} == {p.id for p in people}
    assert [(await screened(runtime, person)).status for person in people] == ["active"] * 10
