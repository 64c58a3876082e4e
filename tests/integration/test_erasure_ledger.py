"""What an erasure leaves: a receipt that says so, a ledger that outlives the database, and work for a store that was away."""

import io
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from minio import Minio
from minio.commonconfig import ENABLED
from minio.versioningconfig import VersioningConfig

from app.access.tokens import RECEIPT_TYPE
from app.audit import Action, by_system
from app.documents.base import new_id, now
from app.documents.deletions import LEDGER, Deletion
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.errors import NotReady
from app.keys import KeyRing
from app.runtime import Runtime
from app.use_cases import erase
from storage.evidence import EvidenceUnavailable
from storage.photos import MinioPhotoStore, PhotoNotFound, PhotoStoreUnavailable
from tests.builders import active, another_process, default_gallery, enrolled, erased, identified, known, verified
from tests.support.services import Server
from workers import jobs


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, str, Exception], None]:
    """Make one method of a store fail; `monkeypatch.undo` brings it back."""

    def fail(store: object, method: str, error: Exception) -> None:
        async def failing(*_: object) -> None:
            raise error

        monkeypatch.setattr(store, method, failing, raising=True)

    return fail


async def ledger_of(runtime: Runtime) -> list[Deletion]:
    """What the evidence store tells of erasures."""
    return [
        Deletion.from_ledger(await runtime.evidence.read(name), runtime.keys)
        for name in await runtime.evidence.names(LEDGER)
    ]


async def waiting() -> list[Deletion]:
    ids = await Deletion.unsettled(now() + timedelta(hours=1), 100)
    return [row for row in [await Deletion.get(id_) for id_ in ids] if row is not None]


async def make_due() -> None:
    """As if whoever made the erasures had been gone for a while."""
    before = {"$set": {"unsettled_since": now() - timedelta(hours=1)}}
    await Deletion.get_pymongo_collection().update_many({"unsettled_since": {"$ne": None}}, before)


async def test_h71_the_receipt_is_signed_and_says_what_remains_until_when(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    receipt = await erased(runtime, ann)
    assert receipt.text is not None
    (public,) = await runtime.access.public_keys()
    header = jwt.get_unverified_header(receipt.text)
    assert (header["typ"], header["kid"], header["alg"]) == (RECEIPT_TYPE, public.key_id, "EdDSA")
    claims: dict[str, Any] = jwt.decode(receipt.text, Ed25519PublicKey.from_public_bytes(public.raw), ["EdDSA"])
    assert (claims["sub"], claims["jti"], claims["iss"]) == (ann.id, receipt.audit_event_id, runtime.access.issuer)
    assert (claims["samples"], claims["photos"], "exp" in claims) == (1, 1, False)
    remains = {one.what: one.until for one in receipt.remains}
    assert remains == {
        "index_files": receipt.index_purge_by, "wrapped_keys": None, "audit_events": None, "ledger": None,
    }  # fmt: skip
    assert [text.split()[0] for text in claims["remains"]] == list(remains)
    event = await AuditEvent.get(receipt.audit_event_id)
    assert event is not None
    assert await erase.receipt_of_event(event) == receipt


async def test_h71_the_ledger_outlives_the_database_and_names_ids_only(runtime: Runtime) -> None:
    ann = await enrolled(runtime, "ann", external_ref="NID-1", full_name="Ann Example")
    receipt = await erased(runtime, ann)
    (line,) = await ledger_of(runtime)
    assert (line.id, line.gallery_id, line.erased_at, line.event_id) == (
        ann.id, ann.gallery_id, receipt.erased_at, receipt.audit_event_id,
    )  # fmt: skip
    (name,) = await runtime.evidence.names(LEDGER)
    assert name == line.ledger_name
    assert await waiting() == []


async def test_h71_nobodys_name_or_address_stays_in_the_events_about_an_erased_person(runtime: Runtime) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    await verified(runtime, ann, "ann")
    await erased(runtime, ann)
    events = await AuditEvent.find({"subject.id": ann.id}).to_list()
    assert {event.action for event in events} >= {"identity.enrol", "face.verify", "identity.erase"}
    for event in events:
        text = event.model_dump_json()
        assert "Olga" not in text, event.action
        assert "192.0.2" not in text, event.action
    (untouched,) = await AuditEvent.find({"subject.id": bob.id, "action": "identity.enrol"}).to_list()
    assert "Olga" in untouched.model_dump_json()


async def test_h71_photos_that_the_store_could_not_delete_are_deleted_when_it_is_back(
    runtime: Runtime, away: Callable[[object, str, Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await active(runtime, "ann")
    away(runtime.photos, "delete", PhotoStoreUnavailable("gone"))
    receipt = await erased(runtime, ann)
    assert receipt.photos == 1
    (left,) = await waiting()
    assert left.photo_keys == [ann.samples[0].photo_key]
    assert await erase.settle_overdue(runtime) == 0, "its own process may still be at it"
    await make_due()
    assert await erase.settle_overdue(runtime) == 0
    monkeypatch.undo()
    await make_due()
    await jobs.sweep_erasures({"runtime": runtime})
    with pytest.raises(PhotoNotFound):
        await runtime.photos.get(ann.samples[0].photo_key)
    assert await waiting() == []
    assert [line.id for line in await ledger_of(runtime)] == [ann.id]


async def test_a_ledger_that_cannot_be_written_holds_up_no_erasure_and_is_written_later(
    runtime: Runtime, away: Callable[[object, str, Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await active(runtime, "ann")
    away(runtime.evidence, "append", EvidenceUnavailable("full"))
    await erased(runtime, ann)
    assert (await identified(runtime, "ann")).candidates == []
    await Deletion.get_pymongo_collection().update_one({}, {"$set": {"erased_at": now() - timedelta(days=2)}})
    await make_due()
    assert await erase.settle_overdue(runtime) == 0
    monkeypatch.undo()
    assert await ledger_of(runtime) == []
    await make_due()
    assert await erase.settle_overdue(runtime) == 1
    assert [line.id for line in await ledger_of(runtime)] == [ann.id]


async def test_h71_the_ledgers_line_is_outside_before_the_first_photo_is_touched(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await active(runtime, "ann")
    outside: list[str] = []

    async def hanging(keys: list[str]) -> int:
        outside.extend(await runtime.evidence.names(LEDGER))
        raise PhotoStoreUnavailable("gone")

    monkeypatch.setattr(runtime.photos, "delete", hanging)
    await erased(runtime, ann)
    assert [name.endswith(f"{ann.id}.json") for name in outside] == [True]


async def test_h71_photos_do_not_wait_for_an_evidence_store_that_is_away(
    runtime: Runtime, away: Callable[[object, str, Exception], None]
) -> None:
    ann = await active(runtime, "ann")
    away(runtime.evidence, "append", EvidenceUnavailable("full"))
    await erased(runtime, ann)
    assert [photo.key async for photo in runtime.photos.list()] == []
    (left,) = await waiting()
    assert (left.id, left.photo_keys) == (ann.id, [])


async def test_an_erasure_that_cannot_be_settled_holds_up_neither_the_others_nor_retention(
    runtime: Runtime, keeps_thirty_days: None
) -> None:
    old = await active(runtime, "old")
    await _enrolled_days_ago(old, 31)
    for name in ("../no name of a file", "someone"):
        await erase.erase_again(runtime, Deletion(id=name, gallery_id="g", erased_at=now(), event_id="e"))
    torn = {"_id": "torn", "unsettled_since": now()}
    await Deletion.get_pymongo_collection().insert_one(torn)
    await make_due()
    await jobs.sweep_erasures({"runtime": runtime})
    assert sorted(line.id for line in await ledger_of(runtime)) == sorted(["someone", old.id])
    assert await Identity.living(old.id) is None
    left = await Deletion.get_pymongo_collection().find({"unsettled_since": {"$ne": None}}).to_list()
    assert sorted(row["_id"] for row in left) == ["../no name of a file", "torn"]


async def test_a_person_who_cannot_be_erased_holds_up_no_other_whose_time_is_over(
    runtime: Runtime, keeps_thirty_days: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = [await active(runtime, name) for name in ("ann", "bob", "cleo")]
    for days, identity in enumerate(people):
        await _enrolled_days_ago(identity, 60 - days)
    troubles = {people[0].id: NotReady("changed at the same moment"), people[1].id: ValueError("torn")}
    carried_out = erase.erase

    async def troubled(
        runtime: Runtime, action: Action, gallery: Gallery, identity_id: str, why: str, *, kept_for: timedelta
    ) -> erase.Receipt:
        if identity_id in troubles:
            raise troubles[identity_id]
        return await carried_out(runtime, action, gallery, identity_id, why, kept_for=kept_for)

    monkeypatch.setattr(erase, "erase", troubled)
    assert await erase.erase_expired(runtime) == 1
    assert [await Identity.living(one.id) is None for one in people] == [False, False, True]


@pytest.mark.parametrize("changed", ["identity_id", "gallery_id", "erased_at", "event_id", "tag", None])
async def test_h100_a_line_of_the_ledger_that_was_changed_or_is_another_stores_is_none(
    runtime: Runtime, changed: str | None
) -> None:
    """None: nothing of it; the store is another one."""
    ann = Deletion(id="ann", gallery_id="g", erased_at=now(), event_id="e")
    line = json.loads(ann.ledger_line(runtime.keys))
    assert Deletion.from_ledger(json.dumps(line).encode(), runtime.keys).id == "ann"
    keys = runtime.keys
    if changed is None:
        keys = KeyRing("another")
        keys.adopt_root(bytes(32))
    else:
        line[changed] = {"erased_at": "2026-11-21T09:30:00.123Z"}.get(changed, "ab" * 32)
    with pytest.raises(ValueError, match="tag"):
        Deletion.from_ledger(json.dumps(line).encode(), keys)


async def test_h71_every_version_of_an_erased_persons_photos_is_gone_from_a_versioned_bucket(
    runtime: Runtime, s3_server: Server
) -> None:
    address, bucket = f"127.0.0.1:{s3_server.port}", f"bucket-{new_id()}"
    client = Minio(address, "a-key", "a-secret-key", secure=False, region="us-east-1")
    client.make_bucket(bucket)
    client.set_bucket_versioning(bucket, VersioningConfig(ENABLED))
    store = MinioPhotoStore(
        endpoint=address, access_key="a-key", secret_key="a-secret-key", bucket=bucket, region="us-east-1", secure=False
    )
    async with another_process(runtime, photos=store) as process:
        ann, bob = await active(process, "ann"), await active(process, "bob")
        key = ann.samples[0].photo_key
        client.put_object(bucket, key, io.BytesIO(b"another version"), 15)
        client.remove_object(bucket, key)  # hidden behind a delete marker, as by a clean-up of the operator's
        await erased(process, ann)
    left = list(client.list_objects(bucket, recursive=True, include_version=True))
    assert [found.object_name for found in left] == [bob.samples[0].photo_key]
    await store.close()


async def test_a_restored_person_is_erased_again_by_the_ledger_as_often_as_it_is_replayed(runtime: Runtime) -> None:
    ann = await active(runtime, "ann", external_ref="NID-1")
    collection = Identity.get_pymongo_collection()
    (yesterday,) = await collection.find({"_id": ann.id}).to_list()
    first = await erased(runtime, ann)
    # What a restoration of yesterday's backup brings: the person, and no entry in the ledger.
    yesterday["samples"][0]["seq"] = 100
    await collection.replace_one({"_id": ann.id}, yesterday)
    await Gallery.get_pymongo_collection().update_one(
        {}, {"$inc": {"identities": 1, "samples": 1}, "$set": {"seq": 100}}
    )
    await Deletion.get_pymongo_collection().delete_many({})
    (line,) = await ledger_of(runtime)
    assert [await erase.erase_again(runtime, line) for _ in range(2)] == [True, False]
    assert await Identity.living(ann.id) is None
    gallery = await default_gallery()
    assert (gallery.identities, gallery.samples) == (0, 0)
    entry = await Deletion.get(ann.id)
    assert entry is not None
    assert (entry.erased_at, entry.event_id) == (first.erased_at, first.audit_event_id)
    events = await AuditEvent.find({"action": "identity.erase"}).sort("time").to_list()
    assert (len(events), events[1].detail["reason"]) == (2, "the ledger of erasures")
    assert [found.ledger_line(runtime.keys) for found in await ledger_of(runtime)] == [line.ledger_line(runtime.keys)]


async def test_the_ledger_is_kept_also_for_somebody_whom_the_backup_never_knew(runtime: Runtime) -> None:
    stranger = Deletion(id="nobody", gallery_id="nowhere", erased_at=now(), event_id="event-1")
    for _ in range(2):
        assert not await erase.erase_again(runtime, stranger)
    await make_due()
    assert await erase.settle_overdue(runtime) == 1
    (line,) = await ledger_of(runtime)
    assert (line.id, line.erased_at) == ("nobody", stranger.erased_at)


@pytest.fixture
async def keeps_thirty_days(runtime: Runtime) -> None:
    """The default gallery keeps nobody for longer."""
    await Gallery.get_pymongo_collection().update_one({"name": "default"}, {"$set": {"policy.retention_days": 30}})


async def _enrolled_days_ago(identity: Identity, days: float) -> None:
    moment = now() - timedelta(days=days)
    await Identity.get_pymongo_collection().update_one({"_id": identity.id}, {"$set": {"created_at": moment}})


async def test_whose_time_is_over_is_erased_by_the_sweep_and_nobody_else(
    runtime: Runtime, keeps_thirty_days: None
) -> None:
    old, young = await active(runtime, "old"), await active(runtime, "young")
    pending = await enrolled(runtime, "pending")
    await _enrolled_days_ago(old, 30.01)
    await _enrolled_days_ago(pending, 31)
    await _enrolled_days_ago(young, 29.99)
    await jobs.sweep_erasures({"runtime": runtime})
    assert [await Identity.living(one.id) is None for one in (old, pending, young)] == [True, True, False]
    events = await AuditEvent.find({"action": "identity.erase"}).to_list()
    assert {(event.subject.id, event.detail["reason"], event.actor.kind) for event in events} == {
        (old.id, "retention", "system"), (pending.id, "retention", "system"),
    }  # fmt: skip
    assert sorted(line.id for line in await ledger_of(runtime)) == sorted([old.id, pending.id])
    assert await erase.erase_expired(runtime) == 0


async def test_a_gallery_without_a_period_keeps_everybody(runtime: Runtime) -> None:
    old = await active(runtime, "old")
    await _enrolled_days_ago(old, 36_500)
    assert await erase.erase_expired(runtime) == 0
    assert (await known(old)).status == "active"


async def test_a_sweep_that_meets_another_goes_on_with_the_next(
    runtime: Runtime, keeps_thirty_days: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    for identity, days in ((ann, 50), (bob, 40)):
        await _enrolled_days_ago(identity, days)
    found = await Identity.kept_since_before(ann.gallery_id, now(), 10)
    assert found == [ann.id, bob.id]
    await erase.erase(runtime, by_system("identity.erase"), await default_gallery(), ann.id, "retention")

    async def stale(*_: object) -> list[str]:
        return found

    monkeypatch.setattr(Identity, "kept_since_before", stale)
    assert await erase.erase_expired(runtime) == 1
    assert await Identity.living(bob.id) is None
