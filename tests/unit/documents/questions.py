"""What the documents are asked, as tests: run on mongomock where no server can run, and on mongod.

A module that imports these brings the fixture `store`: Beanie's documents on an empty database.
"""

import os
from datetime import timedelta
from itertools import pairwise
from typing import Any, Literal

import pytest
from fastapi import Request

from app.api.paging import Page, page_of
from app.audit import by_system
from app.config import random_secret
from app.documents.base import new_id, now
from app.documents.cases import Case, CaseCandidate, Pair
from app.documents.claims import Once
from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Identity, ReferenceHashes, Sample, Screening
from app.domain.policy import Decision, GalleryPolicy, Status
from app.domain.quality import QualityReport
from app.errors import Validation
from app.keys import KEY_BYTES, KeyRing, WrappedKeys
from tests.fakes import CARD

QUALITY = QualityReport(score=1, sharpness=1, brightness=0.5, yaw=0, pitch=0, roll=0, face_size=112)
HERE, ELSEWHERE = "gallery-1", "gallery-2"


async def _identity(
    *,
    gallery_id: str = HERE,
    status: Status = "active",
    seq: int = 1,
    ref: bytes | None = None,
    equal: bytes | None = None,
    seconds: int = 0,
) -> Identity:
    """Somebody with one sample and one screening; `seconds` later than now."""
    moment = now() + timedelta(seconds=seconds)
    sample = Sample(
        id=new_id(), seq=seq, status="active", template=b"t", contract=CARD.contract, quality=QUALITY, liveness=None,
        photo_key="k", photo_digest=b"d", created_at=moment,
    )  # fmt: skip
    screening = Screening(job_id=new_id(), sample_ids=[sample.id], due_at=moment)
    identity = Identity(
        gallery_id=gallery_id, status=status, enrol_seq=seq, samples=[sample], screenings=[screening], attributes=b"a",
        external_ref_hash=ref, external_ref_equal=equal, wrapped_key=b"w", outbox_at=moment, created_at=moment,
        created_by="officer-1", updated_at=moment,
    )  # fmt: skip
    await identity.insert()
    return identity


async def _gallery(name: str) -> Gallery:
    wrapped_keys = WrappedKeys(root=b"r", generations={"1": b"w"}, sealing=1)
    gallery = Gallery.fresh(name, CARD, GalleryPolicy(), id_=new_id(), wrapped_keys=wrapped_keys)
    await gallery.insert()
    return gallery


async def _case(newcomer: str, *candidates: str, is_open: bool = True) -> Case:
    case = Case(
        gallery_id=HERE, newcomer_id=newcomer, sample_id=None, job_id="job", state="open" if is_open else "decided",
        candidates=[CaseCandidate(identity_id=c, score=0.8, rank=i) for i, c in enumerate(candidates, 1)],
        threshold=0.4, created_at=now(),
    )  # fmt: skip
    await case.insert()
    return case


async def _pair(one: str, other: str, decision: Decision | None = None) -> Pair:
    low, high = sorted((one, other))
    pair = Pair(id=f"{low}:{high}", gallery_id=HERE, low=low, high=high, score=0.8, decision=decision, created_at=now())
    await pair.insert()
    return pair


def _id(document: Identity | Gallery | None) -> str | None:
    return None if document is None else document.id


async def test_whoever_is_not_erased_is_living(store: None) -> None:
    ann, gone = await _identity(status="revoked"), await _identity(status="erased")
    assert _id(await Identity.living(ann.id)) == ann.id
    assert await Identity.living(gone.id) is None
    assert await Identity.living("nobody") is None


async def test_a_stored_identity_reads_back_as_it_was(store: None) -> None:
    ann = await _identity(ref=b"r")
    read = await Identity.get(ann.id)
    assert read is not None
    assert (
        read.model_dump_json() == ann.model_dump_json()
    )  # mongomock gives bytes as Binary, which is not equal to bytes


async def _with_reference(gallery_id: str, equal: bytes, exact: bytes | None = None) -> list[str]:
    wanted = {gallery_id: ReferenceHashes(equal, exact or equal)}
    return sorted(identity.id for identity in await Identity.with_reference(wanted))


async def test_a_reference_belongs_to_one_gallery(store: None) -> None:
    ann = await _identity(ref=b"r")
    other = await _identity(ref=b"r", gallery_id=ELSEWHERE)
    assert await _with_reference(HERE, b"r") == [ann.id]
    assert await _with_reference(ELSEWHERE, b"r") == [other.id]
    assert await _with_reference(HERE, b"s") == []


async def test_a_reference_is_found_by_the_hash_of_either_rules(store: None) -> None:
    ann, bob = await _identity(ref=b"r"), await _identity(ref=b"former", equal=b"r")
    assert await _with_reference(HERE, b"new", exact=b"former") == [bob.id]
    assert await _with_reference(HERE, b"r") == sorted([ann.id, bob.id])


async def test_a_job_leads_to_its_identity_until_that_is_erased(store: None) -> None:
    ann, bob = await _identity(), await _identity()
    assert _id(await Identity.by_job(bob.screenings[0].job_id, None)) == bob.id
    await Identity.get_pymongo_collection().update_one({"_id": bob.id}, {"$set": {"status": "erased"}})
    assert await Identity.by_job(bob.screenings[0].job_id, None) is None
    assert _id(await Identity.by_job(ann.screenings[0].job_id, None)) == ann.id


async def test_the_living_among_some_come_by_their_id(store: None) -> None:
    ann, gone, bob = await _identity(), await _identity(status="erased"), await _identity(status="duplicate")
    living = await Identity.living_among([ann.id, gone.id, bob.id, "nobody"])
    assert {id_: identity.id for id_, identity in living.items()} == {ann.id: ann.id, bob.id: bob.id}
    assert await Identity.living_among([]) == {}


async def test_statuses_tell_of_the_erased_too_and_leave_out_the_unknown(store: None) -> None:
    ann, gone = await _identity(status="failed"), await _identity(status="erased")
    assert await Identity.statuses([ann.id, gone.id, "nobody"]) == {ann.id: "failed", gone.id: "erased"}


async def test_overdue_are_the_oldest_that_wait_and_may_still_be_screened(store: None) -> None:
    moment = now()
    late, later = await _identity(seconds=-60), await _identity(seconds=-120, status="pending")
    await _identity(seconds=60)
    for status in ("duplicate", "revoked", "erased", "suspected_duplicate", "failed"):
        await _identity(seconds=-60, status=status)
    done = await _identity(seconds=-60)
    await Identity.get_pymongo_collection().update_one({"_id": done.id}, {"$set": {"outbox_at": None}})
    assert [i.id for i in await Identity.overdue(moment, 10)] == [later.id, late.id]
    assert [i.id for i in await Identity.overdue(moment, 1)] == [later.id]


async def test_active_samples_and_a_screening_are_found_in_the_identity(store: None) -> None:
    ann = await _identity()
    (sample,), (screening,) = ann.samples, ann.screenings
    waiting = ann.model_copy(update={"samples": [sample, sample.model_copy(update={"status": "pending"})]})
    assert waiting.active_samples == [sample]
    assert ann.screening(screening.job_id) == screening
    assert ann.screening("other") is None
    done = screening.model_copy(update={"state": "done"})
    assert ann.with_screening(done) == [done]


async def test_a_gallery_is_found_by_its_name(store: None) -> None:
    north, south = await _gallery("north"), await _gallery("south")
    assert _id(await Gallery.named("north")) == north.id
    assert await Gallery.named("nor") is None
    assert await Gallery.names_by_id([north.id, south.id, "other"]) == {north.id: "north", south.id: "south"}


async def test_changes_come_in_order_above_a_number_up_to_another(store: None) -> None:
    for seq in (3, 1, 5, 2, 4):
        for gallery in (HERE, ELSEWHERE):
            change = GalleryChange(gallery_id=gallery, seq=seq, kind="add", identity_id=f"i{seq}", sample_id=f"s{seq}")
            await change.insert()
    assert [row.seq for row in await GalleryChange.after(HERE, 0, 5, 10)] == [1, 2, 3, 4, 5]
    assert [row.seq for row in await GalleryChange.after(HERE, 2, 4, 10)] == [3, 4]
    assert [row.seq for row in await GalleryChange.after(HERE, 1, 5, 2)] == [2, 3]
    assert await GalleryChange.after(HERE, 5, 5, 10) == []
    assert [row.identity_id for row in await GalleryChange.after(HERE, 0, 5, 10)] == ["i1", "i2", "i3", "i4", "i5"]


async def test_a_vectors_row_tells_whose_it_is_until_it_is_blank(store: None) -> None:
    for seq, kind in ((1, "add"), (2, "blank"), (3, "remove")):
        who = (None, None) if kind == "blank" else (f"i{seq}", f"s{seq}")
        removes = 2 if kind == "remove" else None
        for gallery in (HERE, ELSEWHERE):
            await GalleryChange(
                gallery_id=gallery, seq=seq, kind=kind, identity_id=who[0], sample_id=who[1], removes=removes
            ).insert()
    assert await GalleryChange.owners(HERE, [1, 2, 3, 4]) == {1: ("i1", "s1")}
    assert [row.removes for row in await GalleryChange.after(HERE, 0, 3, 10)] == [None, None, 2]


async def test_open_cases_are_found_from_either_side(store: None) -> None:
    own, other = await _case("ann", "bob"), await _case("cid", "bob", "ann")
    await _case("ann", "bob", is_open=False)
    await _case("cid", "bob")
    found: list[Case] = await Case.open_about("ann", None)  # type: ignore[arg-type] # mongomock knows no sessions
    assert {case.id for case in found} == {own.id, other.id}


async def test_pairs_are_found_from_either_side(store: None) -> None:
    one, two = await _pair("ann", "bob"), await _pair("cid", "ann", "distinct")
    await _pair("bob", "cid")
    assert {p.id: p.other_side("ann") for p in await Pair.of("ann")} == {one.id: "bob", two.id: "cid"}
    assert await Pair.of("dan") == []


async def test_something_is_first_once_within_its_time(store: None) -> None:
    hour = timedelta(hours=1)
    assert [await Once.is_first(id_, hour) for id_ in ("a", "a", "b", "a")] == [True, False, True, False]


async def test_what_has_expired_counts_as_unseen(store: None) -> None:
    assert await Once.is_first("a", timedelta(seconds=-1))
    assert await Once.is_first("a", timedelta(hours=1))
    assert not await Once.is_first("a", timedelta(hours=1))


def _ring() -> KeyRing:
    ring = KeyRing(random_secret())
    ring.adopt_root(os.urandom(KEY_BYTES))
    return ring


KEYS = _ring()


def _request(path: str = "/v1/identities", query: str = "") -> Request:
    request = Request({"type": "http", "path": path, "query_string": query.encode(), "headers": [], "state": {}})
    request.state.action = by_system("identity.read")
    return request


async def _all_pages(
    filters: dict[str, Any], limit: int, order: Literal["newest", "oldest"] = "newest"
) -> list[list[str]]:
    pages, cursor = [], None
    while True:
        items, cursor = await page_of(Identity, filters, Page(limit, cursor), _request(), KEYS, order=order)
        pages.append([item.id for item in items])
        if cursor is None:
            return pages


@pytest.mark.parametrize("order", ["newest", "oldest"])
async def test_pages_hold_everybody_once_in_order_also_where_times_are_equal(
    store: None, order: Literal["newest", "oldest"]
) -> None:
    people = [await _identity(seconds=i // 3) for i in range(8)]
    moment = people[0].created_at
    for i, person in enumerate(people):
        at = moment + timedelta(seconds=i // 3)
        await Identity.get_pymongo_collection().update_one({"_id": person.id}, {"$set": {"created_at": at}})
    expected = [p.id for p in people] if order == "oldest" else [p.id for p in reversed(people)]
    for limit in (1, 3, 4, 8, 9):
        pages = await _all_pages({}, limit, order)
        assert [id_ for page in pages for id_ in page] == expected
        assert all(len(page) == limit for page in pages[:-1])
        assert pages[-1]


async def test_pages_hold_only_what_fits(store: None) -> None:
    here = [await _identity(seconds=i) for i in range(3)]
    await _identity(gallery_id=ELSEWHERE)
    pages = await _all_pages({"gallery_id": HERE}, 2)
    assert [id_ for page in pages for id_ in page] == [i.id for i in reversed(here)]
    assert await _all_pages({"gallery_id": "empty"}, 2) == [[]]


async def test_what_is_added_meanwhile_does_not_shift_the_pages(store: None) -> None:
    people = [await _identity(seconds=i) for i in range(4)]
    first, cursor = await page_of(Identity, {}, Page(2, None), _request(), KEYS)
    await _identity(seconds=60)
    second, _ = await page_of(Identity, {}, Page(2, cursor), _request(), KEYS)
    assert [i.id for i in [*first, *second]] == [i.id for i in reversed(people)]
    assert all(a.created_at > b.created_at for a, b in pairwise([*first, *second]))


async def test_a_cursor_serves_its_own_list_and_key_only(store: None) -> None:
    for i in range(3):
        await _identity(seconds=i)
    _, cursor = await page_of(Identity, {}, Page(1, None), _request(query="status=active"), KEYS)
    assert cursor is not None
    again, _ = await page_of(Identity, {}, Page(1, cursor), _request(query="limit=1&status=active&cursor=x"), KEYS)
    assert len(again) == 1
    foreign = [
        (_request(query="status=pending"), KEYS, cursor),
        (_request(path="/v1/other", query="status=active"), KEYS, cursor),
        (_request(query="status=active"), _ring(), cursor),
        (_request(query="status=active"), KEYS, cursor[:-2] + ("AA" if cursor[-2:] != "AA" else "BB")),
        (_request(query="status=active"), KEYS, "not base64 at all"),
        (_request(query="status=active"), KEYS, ""),
    ]
    for request, keys, given in foreign:
        with pytest.raises(Validation):
            await page_of(Identity, {}, Page(1, given), request, keys)


async def test_those_whose_time_is_over_are_the_living_that_were_enrolled_before_it_the_oldest_first(
    store: None,
) -> None:
    old = [await _identity(seconds=-100 - i, status=status) for i, status in enumerate(("active", "failed", "revoked"))]
    await _identity(seconds=-500, status="erased")
    await _identity(gallery_id=ELSEWHERE, seconds=-500)
    await _identity(seconds=100)
    expected = [identity.id for identity in reversed(old)]
    assert await Identity.kept_since_before(HERE, now(), 10) == expected
    assert await Identity.kept_since_before(HERE, now(), 2) == expected[:2]


async def test_those_wrapped_with_an_older_generation_are_told_with_their_wrapped_key(store: None) -> None:
    people = [await _identity() for _ in range(3)]
    for identity, generation in zip(people, (1, 2, None), strict=True):
        await identity.set({"key_generation": generation})
    ((id_, wrapped),) = await Identity.wrapped_before(HERE, 2, 10)
    assert (id_, bytes(wrapped)) == (people[0].id, b"w")
    assert len(await Identity.wrapped_before(HERE, 3, 10)) == 2
    assert len(await Identity.wrapped_before(HERE, 3, 1)) == 1
    assert await Identity.wrapped_before(ELSEWHERE, 3, 10) == []


async def test_those_with_several_samples_are_found_among_many(store: None) -> None:
    ann, bob, cid = await _identity(seq=1), await _identity(seq=2), await _identity(seq=3, status="erased")
    await _identity(gallery_id=ELSEWHERE, seq=4)
    for person in (bob, cid):
        second = person.samples[0].model_copy(update={"id": new_id(), "seq": 9})
        await person.set({"samples": [second.model_dump(), person.samples[0].model_dump()]})
    assert len(ann.samples) == 1
    assert [seqs async for seqs in Identity.seqs_of_several(HERE, 10)] == [[2, 9]]
