"""Keys are rotated while people are enrolled, verified, searched and erased; afterwards the former ones open nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from pydantic import SecretStr

from app.api.problems import as_problem
from app.audit import by_system
from app.config import Settings, random_secret
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.master_sealed import MASTER_SEALED
from app.documents.root_secret import RootSecret, open_root
from app.documents.sealed import data_key, open_anchors, open_attributes
from app.errors import Conflict, NotFound
from app.keys import KeyRing, SealBroken, UnknownKey, generation_of, master_key_of
from app.leases import held
from app.runtime import Runtime, open_runtime
from app.use_cases import rotate_keys
from app.use_cases.publish import publish
from tests.builders import (
    active,
    another_process,
    default_gallery,
    enrolled,
    erased,
    identified,
    known,
    screened,
    verified,
    with_sample,
)
from tests.fakes import FakeEngine
from tests.support.population import populate, strangers

ROTATE = by_system("keys.rotate")


async def rotated(runtime: Runtime) -> int:
    """The default gallery's key, rotated; nobody is in the middle of a request, so nobody is waited for."""
    return await rotate_keys.rotate_gallery_key(runtime, ROTATE, (await default_gallery()).id, settle_seconds=0)


@asynccontextmanager
async def with_keys(runtime: Runtime, secret: str, *previous: str) -> AsyncIterator[Runtime]:
    """Another process, with these key-encryption keys."""
    async with another_process(runtime) as other:
        other.keys = KeyRing(secret, previous)
        other.search._keys = other.keys
        yield other


def secret_of(settings: Settings) -> str:
    return settings.key_encryption_secret()


async def opens_everything(keys: KeyRing) -> None:
    """Raises SealBroken where a value does not open with these keys."""
    await open_root(keys)
    for place in MASTER_SEALED:
        async for value in place.values():
            keys.open_with_master(value.sealed, value.bound)
    for gallery in await Gallery.find_all().to_list():
        for identity in await Identity.find({"gallery_id": gallery.id, "status": {"$ne": "erased"}}).to_list():
            key = data_key(keys, gallery, identity)
            open_anchors(key, identity)
            assert identity.attributes is not None
            open_attributes(key, identity.attributes, gallery.id, identity.id)


async def test_a_rotation_wraps_every_data_key_anew_and_destroys_the_former_generation(runtime: Runtime) -> None:
    ann = await active(runtime, "ann", external_ref="NID-1")
    before, former = await default_gallery(), ann.wrapped_key
    assert former is not None
    assert await rotated(runtime) == 1
    gallery, after = await default_gallery(), await known(ann)
    assert (gallery.wrapped_keys.numbers, gallery.wrapped_keys.sealing, after.key_generation) == ([2], 2, 2)
    assert after.wrapped_key is not None
    assert generation_of(after.wrapped_key) == 2
    assert after.version == ann.version, "it is the same person as before: nobody's ETag changes"
    fresh = KeyRing(secret_of(runtime.settings))
    key = fresh.gallery_key(gallery.id, gallery.wrapped_keys)
    with pytest.raises(UnknownKey):
        key.unwrap(former, ann.id)
    # The same bytes under the new generation's number, as from a forger who has an old copy of the database:
    with pytest.raises(SealBroken):
        key.unwrap(former[:1] + (2).to_bytes(4, "big") + former[5:], ann.id)
    assert before.wrapped_keys.generations["1"] not in gallery.wrapped_keys.generations.values()
    await opens_everything(fresh)
    event = await AuditEvent.find_one({"action": "keys.rotate"})
    assert event is not None
    assert (event.subject.id, event.detail) == (gallery.id, {"generation": 2, "identities": 1})


async def test_references_and_names_are_found_throughout_because_their_key_stays(runtime: Runtime) -> None:
    ann = await enrolled(runtime, "ann", external_ref="NID-1", full_name="Ann Example")
    await rotated(runtime)
    after = await known(ann)
    assert (after.external_ref_hash, after.name_tags) == (ann.external_ref_hash, ann.name_tags)
    with pytest.raises(Conflict):
        await enrolled(runtime, "bob", external_ref="nid-1")


async def test_what_was_published_and_searched_before_a_rotation_is_searched_after_it(runtime: Runtime) -> None:
    gallery = await default_gallery()
    await populate(runtime, gallery.id, strangers(300, gallery.dimension, 1))
    ann = await active(runtime, "ann")
    await publish(runtime, by_system("index.publish"), gallery.id, holder="test")
    assert await rotated(runtime) == 301
    async with another_process(runtime) as other:
        for process in (runtime, other):
            assert [c.identity_id for c in (await identified(process, "ann")).candidates] == [ann.id]


async def test_people_come_and_go_during_a_rotation_through_two_processes_and_nothing_fails(runtime: Runtime) -> None:
    """Serving at each step of a rotation, with the galleries that the processes read before it."""
    ann = await active(runtime, "ann")
    bob = await active(runtime, "bob")
    kept = [ann]
    async with another_process(runtime) as other, another_process(runtime) as rotating:
        stop = asyncio.Event()

        async def serve(process: Runtime, name: str) -> int:
            rounds = 0
            while not stop.is_set():
                newcomer = await screened(
                    process, await enrolled(process, f"{name}{rounds}", full_name=f"{name} {rounds}")
                )
                assert newcomer.status == "active"
                assert (await verified(process, newcomer, f"{name}{rounds}")).match
                assert (await verified(process, ann, "ann", capture=100 + rounds * 2 + len(name))).match
                found = (await identified(process, f"{name}{rounds}")).candidates
                assert [c.identity_id for c in found] == [newcomer.id]
                if rounds % 2:
                    await erased(process, newcomer)
                else:
                    kept.append(newcomer)
                rounds += 1
            return rounds

        gallery = await default_gallery()
        serving = [asyncio.create_task(serve(runtime, "x")), asyncio.create_task(serve(other, "yy"))]
        try:
            for _ in range(2):
                await asyncio.sleep(0.3)
                await rotate_keys.rotate_gallery_key(rotating, ROTATE, gallery.id, settle_seconds=0.3)
            await with_sample(runtime, bob, "bob")
        finally:
            stop.set()
            rounds = await asyncio.gather(*serving)
    assert min(rounds) >= 2
    assert (await default_gallery()).wrapped_keys.numbers == [3]
    assert {(await known(identity)).key_generation for identity in kept} == {3}
    await opens_everything(KeyRing(secret_of(runtime.settings)))


async def test_an_enrolment_that_was_prepared_before_a_rotation_is_not_lost(runtime: Runtime) -> None:
    """Its gallery was read, its photo put, when the key was rotated to the end: its data key is wrapped at the commit."""
    stale = await default_gallery()
    put = runtime.photos.put

    async def put_late(key: str, data: bytes) -> None:
        await rotated(runtime)
        await put(key, data)

    runtime.photos.put = put_late  # type: ignore[method-assign]
    ann = await enrolled(runtime, "ann", full_name="Ann", gallery=stale)
    assert (await known(ann)).key_generation == 2
    await opens_everything(KeyRing(secret_of(runtime.settings)))


async def test_a_reader_that_is_slower_than_a_rotation_looks_again_for_the_generation(runtime: Runtime) -> None:
    await active(runtime, "ann")
    async with another_process(runtime) as reader:
        stale = await default_gallery()
        reader.keys.gallery_key(stale.id, stale.wrapped_keys)
        await rotated(runtime)
        assert await reader.search.warm(stale) == 1


@pytest.mark.parametrize("step", ["begun", "sealing", "half", "wrapped"])
async def test_a_rotation_that_was_cut_off_is_finished_by_the_next(runtime: Runtime, step: str) -> None:
    people = [await screened(runtime, await enrolled(runtime, f"p{i}", full_name=f"P {i}")) for i in range(3)]
    gallery = await default_gallery()
    keys = gallery.wrapped_keys
    begun = keys.model_copy(update={"generations": keys.generations | {"2": runtime.keys.new_generation(gallery.id)}})
    left = begun if step == "begun" else begun.model_copy(update={"sealing": 2})
    await Gallery.get_pymongo_collection().update_one(
        {"_id": gallery.id}, {"$set": {"wrapped_keys": left.model_dump()}}
    )
    key = runtime.keys.gallery_key(gallery.id, left)
    done = {"begun": 0, "sealing": 0, "half": 1, "wrapped": 3}[step]
    for identity in people[:done]:
        assert identity.wrapped_key is not None
        again = key.wrap(key.unwrap(identity.wrapped_key, identity.id), identity.id)
        fields = {"wrapped_key": again, "key_generation": 2}
        await Identity.get_pymongo_collection().update_one({"_id": identity.id}, {"$set": fields})
    async with another_process(runtime) as other:
        assert await rotate_keys.rotate_gallery_key(other, ROTATE, gallery.id, settle_seconds=0) == 3 - done
    assert (await default_gallery()).wrapped_keys.numbers == [2]
    await opens_everything(KeyRing(secret_of(runtime.settings)))


async def test_a_gallerys_key_is_rotated_by_one_at_a_time(runtime: Runtime) -> None:
    gallery = await default_gallery()
    async with held(f"rekey:{gallery.id}", "somebody else") as lease:
        assert lease is not None
        with pytest.raises(Conflict):
            await rotated(runtime)
    assert await rotated(runtime) == 0
    with pytest.raises(NotFound):
        await rotate_keys.rotate_gallery_key(runtime, ROTATE, "nowhere", settle_seconds=0)


async def test_a_data_key_that_does_not_open_stops_the_rotation_before_anything_is_destroyed(runtime: Runtime) -> None:
    ann, bob = await active(runtime, "ann"), await active(runtime, "bob")
    collection = Identity.get_pymongo_collection()
    await collection.update_one({"_id": ann.id}, {"$set": {"wrapped_key": bob.wrapped_key}})
    with pytest.raises(SealBroken, match=ann.id):
        await rotated(runtime)
    assert (await default_gallery()).wrapped_keys.numbers == [1, 2]
    await collection.update_one({"_id": ann.id}, {"$set": {"wrapped_key": ann.wrapped_key}})
    await rotated(runtime)
    assert (await default_gallery()).wrapped_keys.numbers == [2]


async def test_the_operators_key_is_changed_while_serving_and_the_former_one_opens_nothing_any_more(
    runtime: Runtime,
) -> None:
    old, new = secret_of(runtime.settings), random_secret()
    ann = await active(runtime, "ann", external_ref="NID-1")
    hashed = runtime.keys.keyed_hash("photo", b"x")
    async with with_keys(runtime, old, new) as cautious, with_keys(runtime, new, old) as changed:
        for process in (cautious, changed):
            await open_root(process.keys)
        # Every process knows both; those that have changed over seal with the new one, and everybody reads it.
        later = await changed.create_gallery("later", changed.starting_policy())
        assert master_key_of(later.wrapped_keys.root) == changed.keys.key_id
        cautious.keys.gallery_key(later.id, later.wrapped_keys)
        uses = {use.key_id: use.values for use in await rotate_keys.key_use(changed)}
        assert min(uses.values()) >= 2

        said: list[tuple[str, int, int]] = []

        async def tell(stage: str, done: int, total: int) -> None:
            said.append((stage, done, total))

        count = await rotate_keys.rewrap(changed, by_system("keys.rewrap"), tell)
        assert (count, said) == (uses[KeyRing(old).key_id], [("sealing", count, count)])
        assert {use.key_id: use.values for use in await rotate_keys.key_use(changed)} == {
            KeyRing(new).key_id: sum(uses.values()), KeyRing(old).key_id: 0,
        }  # fmt: skip
        for process in (cautious, changed):
            assert (await identified(process, "ann")).candidates[0].identity_id == ann.id
            assert process.keys.keyed_hash("photo", b"x") == hashed
        assert await rotate_keys.rewrap(changed, by_system("keys.rewrap")) == 0
    alone = KeyRing(new)
    await opens_everything(alone)
    assert alone.keyed_hash("photo", b"x") == hashed
    with pytest.raises(UnknownKey):
        await opens_everything(KeyRing(old))
    settings = runtime.settings.model_copy(update={"key_encryption_key": SecretStr(new)})
    async with open_runtime(settings, FakeEngine()) as reopened:
        assert (await identified(reopened, "ann")).candidates[0].identity_id == ann.id


async def test_a_process_that_lacks_a_new_key_asks_for_another_try_and_tells_of_no_key(runtime: Runtime) -> None:
    gallery = await default_gallery()
    with pytest.raises(UnknownKey) as unknown:
        KeyRing(random_secret()).gallery_key(gallery.id, gallery.wrapped_keys)
    problem = as_problem(unknown.value)
    assert (problem.status, problem.retry_after_seconds) == (503, 2)
    assert runtime.keys.key_id not in problem.detail


async def test_a_value_that_changes_while_it_is_sealed_anew_keeps_its_change(runtime: Runtime) -> None:
    old, new = secret_of(runtime.settings), random_secret()
    async with with_keys(runtime, new, old) as changed:
        (place,) = [place for place in MASTER_SEALED if place.document is RootSecret]
        (value,) = [value async for value in place.values()]
        newer = runtime.keys.seal_with_master(b"another root, of 32 bytes in all", value.bound)
        await RootSecret.get_pymongo_collection().update_one({}, {"$set": {"sealed": newer}})

        async def seal_anew(session: object) -> int:
            return await rotate_keys._reseal(changed, by_system("keys.rewrap"), [value], session)  # type: ignore[arg-type]

        assert await changed.transaction(seal_anew) == 0
    stored = await RootSecret.find_all().to_list()
    assert [secret.sealed for secret in stored] == [newer]


async def test_a_value_under_an_unknown_key_is_named_and_nothing_is_lost(runtime: Runtime) -> None:
    async with with_keys(runtime, random_secret()) as stranger:
        use = {use.key_id: (use.values > 0, use.known) for use in await rotate_keys.key_use(stranger)}
        assert use == {stranger.keys.key_id: (False, True), runtime.keys.key_id: (True, False)}
        with pytest.raises(UnknownKey, match=runtime.keys.key_id):
            await rotate_keys.rewrap(stranger, by_system("keys.rewrap"))
    await opens_everything(KeyRing(secret_of(runtime.settings)))


async def test_processes_that_start_together_agree_on_one_root_secret(runtime: Runtime) -> None:
    await RootSecret.get_pymongo_collection().delete_many({})
    rings = [KeyRing(secret_of(runtime.settings)) for _ in range(8)]
    await asyncio.gather(*(open_root(ring) for ring in rings))
    assert len({ring.keyed_hash("a", b"x") for ring in rings}) == 1
    assert await RootSecret.count() == 1


async def test_every_sealed_field_of_the_store_is_in_the_list(runtime: Runtime) -> None:
    """Whatever begins like a value under the operator's key must be found by the list, or it is lost at a rotation."""
    await active(runtime, "ann")
    mark = b"\x02" + bytes.fromhex(runtime.keys.key_id)
    listed = {value.sealed for place in MASTER_SEALED async for value in place.values()}
    assert len(listed) >= 4

    def sealed_in(value: object) -> list[bytes]:
        if isinstance(value, dict):
            return [found for item in value.values() for found in sealed_in(item)]
        if isinstance(value, list):
            return [found for item in value for found in sealed_in(item)]
        return [value] if isinstance(value, bytes) and value.startswith(mark) else []

    database = runtime.mongo[runtime.settings.mongodb_database]
    for name in await database.list_collection_names():
        async for row in database[name].find():
            assert not [value for value in sealed_in(row) if value not in listed], name


def test_the_former_keys_are_read_from_the_settings_or_a_file(settings: Settings) -> None:
    assert settings.key_encryption_previous_secrets() == []
    given = settings.model_copy(update={"key_encryption_key_previous": SecretStr("one, two\nthree")})
    assert given.key_encryption_previous_secrets() == ["one", "two", "three"]
    path = settings.storage_path.parent / "previous"
    path.write_text("four\nfive\n")
    of_file = given.model_copy(update={"key_encryption_key_previous_file": path})
    assert of_file.key_encryption_previous_secrets() == ["four", "five"]
