"""People whom an older version enrolled: found all along, renewed in the background, told apart where they collide."""

import asyncio
import itertools
from collections.abc import Sequence

import httpx
import pytest

from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.leases import renewing_lookups
from app.documents.sealed import LOOKUP_RULES, data_key, gallery_key, seal_attributes
from app.domain.attributes import Attributes
from app.domain.spelling import first_canonical
from app.keys import GalleryKey
from app.leases import Held, release_of
from app.runtime import Runtime
from app.use_cases import renew_lookups as renewing
from app.use_cases.check import check
from app.use_cases.renew_lookups import renew_gallery, renew_lookups
from tests.builders import active, default_gallery, enrolled, erased, known, portrait
from tests.integration.test_subject_access import named


def _former(key: GalleryKey, kept: Attributes) -> dict[str, object]:
    """The lookups as the first version wrote them."""
    reference, name = kept.external_ref, first_canonical(kept.full_name or "")
    return {
        "external_ref_hash": None if reference is None else key.lookup_hash("external_ref", first_canonical(reference)),
        "name_tags": key.lookup_tags("name", {name[:length] for length in range(1, min(len(name), 12) + 1)}),
    }


async def stored_before(
    runtime: Runtime, person: str, reference: str | None, name: str | None = None, *, status: str = "active"
) -> Identity:
    """Somebody as the first version stored them."""
    identity, gallery = await enrolled(runtime, person), await default_gallery()
    kept = Attributes(external_ref=reference, full_name=name)
    sealed = seal_attributes(data_key(runtime.keys, gallery, identity), kept, gallery.id, identity.id)
    fields = {"attributes": sealed, "status": status, **_former(gallery_key(runtime.keys, gallery), kept)}
    await Identity.get_pymongo_collection().update_one(
        {"_id": identity.id}, {"$set": fields, "$unset": {"external_ref_equal": 1}}
    )
    return await known(identity)


async def listed(http: httpx.AsyncClient, reference: str) -> list[str]:
    """The ids of those who have a reference."""
    answer = await http.get("/v1/identities", params={"external_ref": reference})
    assert answer.status_code == 200, answer.text
    return sorted(item["id"] for item in answer.json()["items"])


#: A selfie is taken once.
_CAPTURES = itertools.count(100)


async def claim(http: httpx.AsyncClient, reference: str, person: str) -> int:
    """The status of a verification by reference."""
    photo = {"photo": ("p.png", portrait(person, capture=next(_CAPTURES)))}
    answer = await http.post("/v1/verifications", data={"external_ref": reference}, files=photo)
    return answer.status_code


async def enrol(http: httpx.AsyncClient, person: str, **fields: str) -> httpx.Response:
    """The answer to an enrolment."""
    return await http.post("/v1/identities", data=fields, files={"photo": ("p.png", portrait(person))})


APART = ("NID-4", "NID-\u200c4", "nid\u20134")


@pytest.fixture
async def apart(runtime: Runtime) -> list[Identity]:
    """Three people whom the first rules told apart by spelling, and today's do not."""
    return [await stored_before(runtime, f"person-{i}", reference) for i, reference in enumerate(APART)]


async def test_people_stored_apart_stay_findable_by_the_exact_spelling(
    runtime: Runtime, officer: httpx.AsyncClient, apart: Sequence[Identity]
) -> None:
    for _ in range(2):
        for identity, reference in zip(apart, APART, strict=True):
            assert await listed(officer, reference) == [identity.id]
        await renew_lookups(runtime)
    assert await claim(officer, APART[1], "person-1") == 200
    assert (await enrol(officer, "newcomer", external_ref="NID\u20114")).status_code == 409
    # Nobody's spelling, and three people's reference.
    assert await listed(officer, "NID\u22124") == sorted(identity.id for identity in apart)
    assert await claim(officer, "NID\u22124", "person-1") == 404


async def test_a_check_names_those_who_have_one_reference(runtime: Runtime, apart: Sequence[Identity]) -> None:
    before = await check(runtime, lambda *_: None, photos=False)
    assert before.counts["lookup-outdated"] == len(apart)
    await renew_lookups(runtime)
    after = await check(runtime, lambda *_: None, photos=False)
    assert (after.counts["lookup-outdated"], after.counts["reference-twice"]) == (0, 2)
    twice = [finding for finding in after.findings if finding.kind == "reference-twice"]
    assert all(one.id in twice[0].message for one in apart if one.id != twice[0].subject)


async def test_a_collision_ends_when_a_reference_is_changed(
    runtime: Runtime, officer: httpx.AsyncClient, apart: Sequence[Identity]
) -> None:
    await renew_lookups(runtime)
    for identity in apart[1:]:
        path = f"/v1/identities/{identity.id}"
        assert (await officer.patch(path, json={"full_name": "Ann"})).status_code == 200
        assert (await officer.patch(path, json={"external_ref": "NID\u20154"})).status_code == 409
        assert (await officer.patch(path, json={"external_ref": f"NID-{identity.id}"})).status_code == 200
    looked = await check(runtime, lambda *_: None, photos=False)
    assert looked.counts["reference-twice"] == 0
    assert await listed(officer, "NID\u22124") == [apart[0].id]


async def test_an_erasure_leaves_nothing_of_a_reference(runtime: Runtime, apart: Sequence[Identity]) -> None:
    await renew_lookups(runtime)
    for identity in apart:
        await erased(runtime, await known(identity))
    rows = Identity.get_pymongo_collection().find({}, {"external_ref_hash": 1, "external_ref_equal": 1, "name_tags": 1})
    async for row in rows:
        assert (row["external_ref_hash"], row["external_ref_equal"], row["name_tags"]) == (None, None, [])


async def test_everybody_is_found_by_the_new_spelling_once_renewed(
    runtime: Runtime, officer: httpx.AsyncClient
) -> None:
    ann = await stored_before(runtime, "ann", "NID \u2013 \u0663", "Ánna Example")
    assert await listed(officer, "NID \u2013 \u0663") == [ann.id]
    assert await named(officer, "Ánna") == ["Ánna Example"]
    assert await renew_lookups(runtime) == 1
    assert await renew_lookups(runtime) == 0
    assert await listed(officer, "nid - 3 ") == await listed(officer, "NID \u2013 \u0663") == [ann.id]
    assert await named(officer, "anna") == await named(officer, "Ánna") == ["Ánna Example"]
    assert (await known(ann)).version == ann.version


class _KilledError(BaseException):
    """The process is gone."""


async def test_a_pass_that_is_killed_goes_on_where_it_stopped(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = [await stored_before(runtime, f"person-{i}", f"N\u2013{i}") for i in range(5)]
    monkeypatch.setattr(renewing, "PEOPLE_AT_ONCE", 2)
    move, moves = renewing._move, 0

    async def moved(gallery: Gallery, one: renewing._Renewed) -> int:
        nonlocal moves
        moves += 1
        if moves == 4:
            raise _KilledError
        return await move(gallery, one)

    monkeypatch.setattr(renewing, "_move", moved)
    gallery = await default_gallery()
    with pytest.raises(_KilledError):
        await renew_gallery(runtime, gallery.id)
    assert [LOOKUP_RULES in (await known(one)).name_tags for one in people] == [True, True, True, False, False]
    assert await renew_gallery(runtime, gallery.id) == 2
    key = gallery_key(runtime.keys, gallery)
    hashes = [(await known(one)).external_ref_hash for one in people]
    assert hashes == [key.lookup_hash("external_ref", f"n-{i}") for i in range(5)]


async def test_the_lease_of_a_process_that_was_killed_is_waited_for(
    runtime: Runtime, apart: Sequence[Identity]
) -> None:
    gallery = await default_gallery()
    lease = renewing_lookups(gallery.id)
    assert await Held.acquire(lease, "killed", 60) is not None
    assert await renew_lookups(runtime, wait_seconds=0) == 0
    done, _ = await asyncio.gather(renew_lookups(runtime, wait_seconds=1), release_of(lease, "killed"))
    assert done == len(apart)


async def test_several_processes_renew_at_once(runtime: Runtime, apart: Sequence[Identity]) -> None:
    gallery = await default_gallery()
    await asyncio.gather(*(renew_gallery(runtime, gallery.id) for _ in range(4)))
    renewed = [await known(one) for one in apart]
    assert all(LOOKUP_RULES in one.name_tags for one in renewed)
    assert len({one.external_ref_hash for one in renewed}) == len(apart)


async def test_what_an_older_process_writes_is_renewed_too(runtime: Runtime, officer: httpx.AsyncClient) -> None:
    ann, gallery = await active(runtime, "ann", external_ref="NID-1"), await default_gallery()
    kept = Attributes(external_ref="NID\u20149", full_name="Zoë")
    sealed = seal_attributes(data_key(runtime.keys, gallery, ann), kept, gallery.id, ann.id)
    fields = {"attributes": sealed, **_former(gallery_key(runtime.keys, gallery), kept)}
    await Identity.get_pymongo_collection().update_one({"_id": ann.id}, {"$set": fields, "$inc": {"version": 1}})
    assert await listed(officer, "NID\u20149") == [ann.id]
    assert await renew_lookups(runtime) == 1
    assert await listed(officer, "NID-9") == [ann.id]
    assert await named(officer, "zoe") == ["Zoë"]


async def test_a_change_of_the_name_leaves_an_older_reference_to_be_renewed(
    runtime: Runtime, officer: httpx.AsyncClient
) -> None:
    ann = await stored_before(runtime, "ann", "NID\u20149", "Zoë")
    assert (await officer.patch(f"/v1/identities/{ann.id}", json={"full_name": "Łukasz"})).status_code == 200
    assert await named(officer, "lukasz") == ["Łukasz"]
    assert await renew_lookups(runtime) == 1
    assert await listed(officer, "NID-9") == await listed(officer, "NID\u20149") == [ann.id]


async def test_a_person_who_changes_meanwhile_is_left_to_the_next_pass(
    runtime: Runtime, officer: httpx.AsyncClient
) -> None:
    ann, gallery = await stored_before(runtime, "ann", "NID\u20149"), await default_gallery()
    (read,), _ = await Identity.look_through(gallery.id, LOOKUP_RULES, None, 10)
    assert (await officer.patch(f"/v1/identities/{ann.id}", json={"external_ref": "NID-7"})).status_code == 200
    assert await Identity.renew_lookups([(read, {"external_ref_hash": b"old"})]) == 0
    assert await listed(officer, "NID-7") == [ann.id]


@pytest.mark.parametrize("reference", ["NID-7", None])
async def test_what_an_older_process_gives_in_place_of_a_shared_reference_leaves_nothing_of_it(
    runtime: Runtime, officer: httpx.AsyncClient, apart: Sequence[Identity], reference: str | None
) -> None:
    await renew_lookups(runtime)
    gallery, (first, *others) = await default_gallery(), apart
    for place, one in enumerate(others):
        kept = Attributes(external_ref=None if reference is None else f"{reference}{place}")
        sealed = seal_attributes(data_key(runtime.keys, gallery, one), kept, gallery.id, one.id)
        fields = {"attributes": sealed, **_former(gallery_key(runtime.keys, gallery), kept)}
        await Identity.get_pymongo_collection().update_one({"_id": one.id}, {"$set": fields})
    await renew_lookups(runtime)
    assert await listed(officer, "NID\u22124") == [first.id]
    assert (await officer.patch(f"/v1/identities/{first.id}", json={"external_ref": None})).status_code == 200
    assert (await enrol(officer, "newcomer", external_ref="NID-4")).status_code == 202


async def test_few_who_are_due_among_many_are_found_in_small_steps(runtime: Runtime) -> None:
    people = [await enrolled(runtime, f"person-{i}") for i in range(5)]
    gallery, collection = await default_gallery(), Identity.get_pymongo_collection()
    # All of one moment, so that the ids decide.
    await collection.update_many({}, {"$set": {"created_at": people[0].created_at}})
    await collection.update_one({"_id": people[3].id}, {"$set": {"name_tags": []}})
    steps, place = [], None
    for _ in range(3):
        due, place = await Identity.look_through(gallery.id, LOOKUP_RULES, place, 2)
        steps.append([one.identity_id for one in due])
    assert (steps, place) == ([[], [people[3].id], []], None)
    assert await renew_lookups(runtime) == 1


REFUSED_TODAY = [
    Attributes(external_ref="\u3164", full_name="\u200d"),
    Attributes(external_ref="NID-7\ufe0f", full_name="\u202eolleh"),
    Attributes(external_ref="\ue000" * 200, full_name="a\nb", metadata={"$set": 1, "many": "x" * 5000}),
    Attributes(full_name="\U0002ebf0\U00031350\U000323b0某"),
]


@pytest.mark.parametrize("kept", REFUSED_TODAY, ids=range(len(REFUSED_TODAY)))
async def test_f7_what_was_stored_under_other_rules_stays_readable_exportable_and_erasable(
    runtime: Runtime, officer: httpx.AsyncClient, kept: Attributes
) -> None:
    ann, gallery = await active(runtime, "ann"), await default_gallery()
    sealed = seal_attributes(data_key(runtime.keys, gallery, ann), kept, gallery.id, ann.id)
    fields = {"attributes": sealed, **_former(gallery_key(runtime.keys, gallery), kept)}
    await Identity.get_pymongo_collection().update_one({"_id": ann.id}, {"$set": fields})
    await renew_lookups(runtime)
    path = f"/v1/identities/{ann.id}"
    page = (await officer.get(path)).json()
    assert (page["external_ref"], page["full_name"], page["metadata"]) == (
        kept.external_ref, kept.full_name, kept.metadata,
    )  # fmt: skip
    assert [item["id"] for item in (await officer.get("/v1/identities")).json()["items"]] == [ann.id]
    if kept.external_ref is not None:
        assert await listed(officer, kept.external_ref) == [ann.id]
    assert (await officer.get(f"{path}/export")).json()["identity"]["full_name"] == kept.full_name
    assert (await officer.patch(path, json={"date_of_birth": "1990-01-31"})).status_code == 200
    assert (await officer.delete(path, params={"reason": "asked"})).status_code == 200


async def test_f7_one_broken_person_does_not_take_the_others_along(
    runtime: Runtime, officer: httpx.AsyncClient
) -> None:
    ann, bob = await active(runtime, "ann", external_ref="NID-1"), await active(runtime, "bob", external_ref="NID-2")
    gallery, people = await default_gallery(), Identity.get_pymongo_collection()
    key = data_key(runtime.keys, gallery, ann)
    other = key.seal(b'{"date_of_birth": "no date"}', f"idem/1|attributes|{gallery.id}|{ann.id}|".encode())
    for broken in (b"\x01" + bytes(40), other):
        await people.update_one({"_id": ann.id}, {"$set": {"attributes": broken}})
        items = (await officer.get("/v1/identities")).json()["items"]
        assert {item["id"]: item["external_ref"] for item in items} == {ann.id: None, bob.id: "NID-2"}
        photo = {"photo": ("p.png", portrait("ann", capture=7))}
        found = (await officer.post("/v1/identifications", files=photo)).json()["candidates"]
        assert [(one["identity_id"], one["external_ref"]) for one in found] == [(ann.id, None)]
        assert (await officer.get(f"/v1/identities/{ann.id}/export")).json()["samples"][0]["photo_base64"]
        looked = await check(runtime, lambda *_: None, photos=False)
        assert looked.counts["attributes-broken"] == 1
    assert (await officer.delete(f"/v1/identities/{ann.id}", params={"reason": "asked"})).status_code == 200
