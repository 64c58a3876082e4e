"""`idem check`: each way in which MongoDB, photos and index can disagree is found and named; what is derived is mended."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from app.audit import by_system, record
from app.documents.base import new_id, now
from app.documents.cases import Case, Pair
from app.documents.deletions import Deletion
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Identity
from app.documents.tree import AuditKey, AuditTree, TreeHead, TreeNode
from app.domain.log_export import canonical
from app.domain.merkle import Growth, leaf_hash
from app.runtime import Runtime
from app.use_cases import check as checking
from app.use_cases import sequence
from app.use_cases.check import Checked, check
from app.use_cases.publish import publish
from tests.builders import active, default_gallery, enrolled, erased, known, screened, suspected, with_sample


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first search opens its gallery, and nothing here is about how long that may take."""
    monkeypatch.setattr("app.search.PATIENCE_SECONDS", 30.0)


async def found(runtime: Runtime, *, repair: bool = False) -> Checked:
    """What a check finds once the log is up to date."""
    while await sequence.grow(runtime):
        pass
    return await check(runtime, lambda *_: None, repair=repair)


async def only(runtime: Runtime, kind: str, subject: str | None) -> None:
    """Fails unless the check finds just this, and says so again until somebody puts it right."""
    looked = await found(runtime)
    assert [(finding.kind, finding.subject) for finding in looked.findings] == [(kind, subject)]
    assert looked.standing == 1


async def test_a_store_in_use_is_clean(runtime: Runtime) -> None:
    ann = await active(runtime, "ann", external_ref="NID-1")
    await with_sample(runtime, ann, "ann")
    await suspected(runtime, "ann", capture=7)
    await erased(runtime, await active(runtime, "bob"))
    await enrolled(runtime, "cleo")
    gallery = await default_gallery()
    await publish(runtime, by_system("index.publish"), gallery.id, holder="test")
    looked = await found(runtime)
    assert looked.findings == []
    assert {name: looked.looked_at[name] for name in ("identities", "samples", "photos", "pairs", "cases")} == {
        "identities": 3, "samples": 4, "photos": 4, "pairs": 1, "cases": 1,
    }  # fmt: skip
    assert (looked.looked_at["generations"], looked.looked_at["erasures"]) == (1, 1)
    assert looked.looked_at["events"] == await AuditEvent.find_all().count()


async def test_h79_a_photo_that_the_store_has_lost_is_found_with_its_identity(runtime: Runtime) -> None:
    ann = await active(runtime, "ann")
    await active(runtime, "bob")
    await runtime.photos.delete([ann.samples[0].photo_key])
    await only(runtime, "photo-missing", ann.id)


async def test_h80_a_photo_with_other_bytes_or_anothers_is_found_with_its_identity(runtime: Runtime) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    key = ann.samples[0].photo_key
    sealed = await runtime.photos.get(key)
    await runtime.photos.put(key, sealed[:-1] + bytes([sealed[-1] ^ 1]))
    await only(runtime, "photo-broken", ann.id)
    await runtime.photos.put(key, await runtime.photos.get(bob.samples[0].photo_key))
    await only(runtime, "photo-broken", ann.id)
    await runtime.photos.put(key, sealed)
    assert (await found(runtime)).findings == []


async def test_counts_that_are_wrong_are_found_and_mended(runtime: Runtime) -> None:
    await active(runtime, "ann")
    await erased(runtime, await active(runtime, "bob"))
    await Gallery.get_pymongo_collection().update_one({}, {"$inc": {"identities": 5, "samples": -1, "removed": 2}})
    gallery = await default_gallery()
    assert (await found(runtime)).counts == {"count": 3}
    mended = await found(runtime, repair=True)
    assert (mended.counts, mended.standing) == ({"count": 3}, 0)
    assert (await found(runtime)).findings == []
    after = await default_gallery()
    assert (after.identities, after.samples, after.removed, after.seq) == (1, 1, 1, gallery.seq)


async def test_a_screening_that_no_sweep_would_find_is_found_and_mended(runtime: Runtime) -> None:
    ann = await enrolled(runtime, "ann")
    await Identity.get_pymongo_collection().update_one({"_id": ann.id}, {"$set": {"outbox_at": None}})
    await only(runtime, "outbox-missing", ann.id)
    assert (await found(runtime, repair=True)).standing == 0
    assert [identity.id for identity in await Identity.overdue(now(), 10)] == [ann.id]
    assert (await screened(runtime, await known(ann))).status == "active"
    assert (await found(runtime)).findings == []


async def test_photos_that_nobody_names_are_found_and_swept_when_they_are_old(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await active(runtime, "ann")
    ours = [f"{ann.gallery_id}/{ann.id}/{new_id()}" for _ in range(2)]
    foreign = [
        f"{ann.gallery_id}/{new_id()}/{new_id()}", f"{new_id()}/{ann.id}/{new_id()}", f"{ann.gallery_id}/{ann.id}/nobody",
        f"{ann.gallery_id}/{ann.id}/{new_id().upper()}", f"{ann.gallery_id}/{ann.id}/{new_id()}/more", "gallery/nobody/sample",
        "neither", "deep/a/b/c/d/e/f",
    ]  # fmt: skip
    for key in (*ours, *foreign):
        await runtime.photos.put(key, b"left")
    assert (await found(runtime)).findings == []
    monkeypatch.setattr(checking, "ORPHAN_AGE", timedelta(seconds=-1))
    looked = await found(runtime)
    assert {f.subject: f.kind for f in looked.findings} == dict.fromkeys(ours, "photo-orphan") | dict.fromkeys(
        foreign, "photo-foreign"
    )
    repaired = await found(runtime, repair=True)
    assert (repaired.counts["photo-orphan"], repaired.standing) == (len(ours), len(foreign))
    assert {photo.key async for photo in runtime.photos.list()} == {ann.samples[0].photo_key, *foreign}


async def test_a_generation_that_is_spoilt_or_ahead_is_found_and_published_anew(runtime: Runtime) -> None:
    await active(runtime, "ann")
    gallery = await default_gallery()
    generation = await publish(runtime, by_system("index.publish"), gallery.id, holder="test")
    share = runtime.settings.vector_db_path / gallery.id / f"{gallery.epoch}-{generation.number}"
    spoilt = next(path for path in share.iterdir() if path.suffix != ".json")
    whole = spoilt.read_bytes()
    spoilt.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    await only(runtime, "index-generation", gallery.id)
    assert (await found(runtime, repair=True)).standing == 0
    assert (await default_gallery()).fault is not None, "the worker publishes it anew"
    await publish(runtime, by_system("index.publish"), gallery.id, holder="test")
    assert (await found(runtime)).findings == []
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"published.watermark": 9}})
    await only(runtime, "index-generation", gallery.id)
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"purge_by": now() - timedelta(hours=1)}})
    assert (await found(runtime)).counts == {"index-generation": 1, "index-purge-late": 1}
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"published": None}})
    assert (await found(runtime)).counts == {"index-purge-late": 1}


async def _change(model: Any, query: dict[str, Any], update: dict[str, Any]) -> None:  # noqa: ANN401
    changed = await model.get_pymongo_collection().update_one(query, update)
    assert changed.modified_count == 1


async def _spoil_template(ann: Identity) -> str:
    await _change(Identity, {"_id": ann.id}, {"$set": {"samples.0.template": b"\x01" + bytes(100)}})
    return ann.id


async def _spoil_key(ann: Identity) -> str:
    await _change(Identity, {"_id": ann.id}, {"$set": {"wrapped_key": b"\x01" + bytes(60)}})
    return ann.id


async def _move_change(ann: Identity) -> str:
    await _change(GalleryChange, {"identity_id": ann.id}, {"$set": {"sample_id": "another"}})
    return ann.id


async def _lose_person(ann: Identity) -> str:
    await Identity.get_pymongo_collection().delete_one({"_id": ann.id})
    return ann.id


async def _lose_change(ann: Identity) -> str:
    await GalleryChange.get_pymongo_collection().delete_one({"identity_id": ann.id})
    return ann.gallery_id


async def _spoil_gallery_key(ann: Identity) -> str:
    await _change(Gallery, {"_id": ann.gallery_id}, {"$set": {"wrapped_keys.root": b"\x02" + bytes(60)}})
    return ann.gallery_id


async def _raise_erased(ann: Identity) -> str:
    await Deletion(id=ann.id, gallery_id=ann.gallery_id, erased_at=now(), event_id="x", unsettled_since=now()).insert()
    return ann.id


async def _half_erase(ann: Identity) -> str:
    await _change(Identity, {"_id": ann.id}, {"$set": {"status": "erased"}})
    return ann.id


async def _dangling_pair(ann: Identity) -> str:
    pair = Pair(
        id=f"{ann.id}:x", gallery_id=ann.gallery_id, low=ann.id, high="x", score=0.5, created_at=now()
    )  # fmt: skip
    await pair.insert()
    return pair.id


async def _dangling_case(ann: Identity) -> str:
    case = Case(
        gallery_id=ann.gallery_id, newcomer_id="x", sample_id=None, job_id="x", state="open", candidates=[], threshold=0.4,
        created_at=now(),
    )  # fmt: skip
    await case.insert()
    return case.id


@pytest.mark.parametrize(
    ("spoil", "kinds"),
    [
        (_spoil_template, {"template-broken"}),
        (_spoil_key, {"attributes-broken"}),
        (_move_change, {"change-missing", "change-unknown"}),
        (_lose_person, {"change-unknown", "count"}),
        (_lose_change, {"change-missing", "change-hole"}),
        (_spoil_gallery_key, {"gallery-key"}),
        (_raise_erased, {"erased-living"}),
        (_half_erase, {"erasure-unfinished", "change-unknown", "count"}),
        (_dangling_pair, {"pair-dangling"}),
        (_dangling_case, {"case-dangling"}),
    ],
)
async def test_what_cannot_be_mended_is_named_and_left_alone(
    runtime: Runtime, spoil: Callable[[Identity], Awaitable[str]], kinds: set[str]
) -> None:
    ann = await active(runtime, "ann", external_ref="NID-1")
    await active(runtime, "bob")
    if spoil is _spoil_gallery_key:
        runtime.keys.__init__(runtime.settings.key_encryption_secret())  # type: ignore[misc] # as a new process has it
    subject = await spoil(ann)
    looked = await found(runtime)
    assert set(looked.counts) == kinds
    assert subject in {finding.subject for finding in looked.findings}
    left = await found(runtime, repair=True)
    assert set(left.counts) == kinds
    assert left.standing == sum(count for kind, count in left.counts.items() if kind != "count")


async def test_a_log_that_was_changed_cut_or_not_numbered_is_found(runtime: Runtime) -> None:
    await active(runtime, "ann")
    await active(runtime, "bob")
    while await sequence.grow(runtime):
        pass
    event = await AuditEvent.find_one({"seq": 0})
    assert event is not None
    await _change(AuditEvent, {"_id": event.id}, {"$set": {"outcome": "denied"}})
    await only(runtime, "log-event-changed", event.id)
    await _change(AuditEvent, {"_id": event.id}, {"$set": {"outcome": event.outcome, "leaf_hash": "00" * 32}})
    assert (await found(runtime)).counts == {"log-event-changed": 1, "log-tree": 1}
    await _change(AuditEvent, {"_id": event.id}, {"$set": {"leaf_hash": event.leaf_hash}})
    tree = await AuditTree.current()
    await _change(AuditTree, {}, {"$set": {"peaks": [bytes(32) for _ in tree.peaks]}})
    looked = await found(runtime)
    assert set(looked.counts) == {"log-tree"}
    await _change(AuditTree, {}, {"$set": {"peaks": tree.peaks}})
    last = await AuditEvent.find_one({"seq": tree.size - 1})
    assert last is not None
    await last.delete()
    assert (await found(runtime)).counts == {"log-cut": 1}
    await event.delete()
    looked = await check(runtime, lambda *_: None)
    assert {finding.kind for finding in looked.findings} == {"log-hole"}


async def test_events_that_nobody_numbers_are_found(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    await active(runtime, "ann")
    monkeypatch.setattr(checking, "NUMBERED_WITHIN", timedelta(seconds=-1))
    looked = await check(runtime, lambda *_: None)
    assert looked.counts == {"log-unnumbered": 1}


async def test_a_head_outside_that_the_log_does_not_bear_out_is_found(runtime: Runtime) -> None:
    await active(runtime, "ann")
    while await sequence.grow(runtime):
        pass
    head = await sequence.sign(runtime)
    await sequence.deliver(runtime)
    assert (await found(runtime)).findings == []
    await active(runtime, "bob")
    await _change(AuditEvent, {"seq": head.size - 1}, {"$set": {"leaf_hash": "00" * 32}})
    await TreeNode.get_pymongo_collection().update_many({}, {"$set": {"hash": bytes(32)}})
    looked = await found(runtime)
    assert looked.counts["log-head"] == 1
    assert any("not those that" in finding.message for finding in looked.findings)


async def _told(count: int) -> None:
    """So many events more."""
    for _ in range(count):
        await record(None, by_system("x"), subject_kind="none", subject_id=None)


async def _kept(runtime: Runtime) -> TreeHead:
    """Every event in the tree, under a head that is kept outside."""
    while await sequence.grow(runtime):
        pass
    head = await sequence.sign(runtime)
    await sequence.deliver(runtime)
    return head


async def _made_anew(size: int) -> None:
    """What whoever has the database does: the first events as they are now, and the tree and its heads made to fit them."""
    await AuditEvent.get_pymongo_collection().delete_many({"seq": {"$gte": size}})
    await TreeNode.get_pymongo_collection().delete_many({})
    await TreeHead.get_pymongo_collection().delete_many({})
    growth = Growth()
    for event in await AuditEvent.find_all().sort("+seq").to_list():
        hash_ = leaf_hash(canonical(event.leaf(growth.size)))
        nodes = [{"_id": TreeNode.name(node), "hash": value} for node, value in growth.add(hash_)]
        if nodes:
            await TreeNode.get_pymongo_collection().insert_many(nodes)
        await AuditEvent.get_pymongo_collection().update_one({"_id": event.id}, {"$set": {"leaf_hash": hash_.hex()}})
    fields = {"size": growth.size, "peaks": growth.peaks, "signed_size": None, "signed_at": None, "signed_by": None}
    await AuditTree.get_pymongo_collection().update_one({}, {"$set": fields})


async def test_h96_a_log_that_was_set_back_is_found_however_it_has_grown_since(runtime: Runtime) -> None:
    await _told(6)
    before = await _kept(runtime)
    await _made_anew(4)
    assert (await found(runtime)).counts == {"log-head": 1}
    await _told(1)
    after = await _kept(runtime)
    looked = await found(runtime)
    assert {finding.kind for finding in looked.findings} == {"log-head"}
    assert any("event 5 is lost" in finding.message for finding in looked.findings)
    await _told(3)
    await _kept(runtime)
    (finding,) = (await found(runtime)).findings
    assert (finding.kind, "was set back from 6 events" in finding.message) == ("log-head", True)
    assert before.evidence[0] in finding.message
    assert after.evidence[0] in finding.message


async def test_h96_a_log_made_anew_is_found_by_the_heads_of_former_days(runtime: Runtime) -> None:
    await _told(5)
    while await sequence.grow(runtime):
        pass
    tree, key = await AuditTree.current(), await AuditKey.active()
    yesterday = TreeHead.signed(tree, key, runtime.keys, now() - timedelta(days=1))
    await runtime.evidence.append(*yesterday.evidence)
    await _told(1)
    await _kept(runtime)
    looked = await found(runtime)
    assert (looked.findings, looked.looked_at["tree heads"]) == ([], 2)
    await _change(AuditEvent, {"seq": 2}, {"$set": {"outcome": "denied"}})
    await _made_anew(6)
    await _told(1)
    await _kept(runtime)
    (finding,) = (await found(runtime)).findings
    assert finding.message == f"the first 5 events are not those that {yesterday.evidence[0]} was signed over"


async def test_nodes_left_as_they_were_do_not_hide_changed_events(runtime: Runtime) -> None:
    await _told(4)
    await _kept(runtime)
    nodes = await TreeNode.find_all().to_list()
    await _change(AuditEvent, {"seq": 0}, {"$set": {"outcome": "denied"}})
    await _made_anew(4)
    await TreeNode.get_pymongo_collection().delete_many({})
    await TreeNode.insert_many(nodes)
    (finding,) = (await found(runtime)).findings
    assert "the first 4 events are not those" in finding.message


async def test_many_findings_of_a_kind_are_counted_and_some_are_told(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "LISTED", 1)
    for person in ("ann", "bob", "cleo"):
        someone = await active(runtime, person)
        await runtime.photos.delete([someone.samples[0].photo_key])
    looked = await found(runtime)
    assert (len(looked.findings), looked.counts, looked.standing) == (1, {"photo-missing": 3}, 3)
