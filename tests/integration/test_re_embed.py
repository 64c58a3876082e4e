"""A gallery moves to another model with its stored photos: completely, once, and in spite of interruptions."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.api.operations import _index
from app.audit import by_system
from app.cli import models
from app.cli import re_embed as command
from app.config import Settings
from app.documents.base import new_id
from app.documents.cases import Case, Pair
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.leases import rekeying
from app.documents.renewals import Renewal
from app.errors import Conflict, ModelMismatch, NotReady
from app.leases import held
from app.runtime import Runtime
from app.use_cases import galleries
from app.use_cases import re_embed as moving
from app.use_cases.identify import identify
from app.use_cases.publish import keep_promises, publish
from app.use_cases.re_embed import Moved, SamplesLost, Stage, Tell, preview, re_embed
from app.use_cases.remove_sample import remove_sample
from app.use_cases.rotate_keys import rotate_gallery_key
from tests.builders import another_process, by_officer, case_about, default_gallery, erased, known
from tests.support.moved_galleries import NEW, OLD, SquaresEngine, claimed, person, photo_of


@pytest.fixture
async def old(runtime: Runtime) -> Runtime:
    """A process of the former model."""
    runtime.engine = SquaresEngine(OLD)
    return runtime


@pytest.fixture
async def new(old: Runtime) -> AsyncIterator[Runtime]:
    """A process of the model that the gallery moves to."""
    async with another_process(old) as process:
        process.engine = SquaresEngine(NEW)
        yield process


@pytest.fixture
def asked(new: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The galleries whose publication the new process asks a queue for. The queue is away."""
    ids: list[str] = []

    async def enqueue(gallery_id: str, **_: str) -> bool:
        ids.append(gallery_id)
        return False

    monkeypatch.setattr(new.queue, "enqueue_publication", enqueue)
    return ids


class Cut(Exception):
    """The move is interrupted here."""


def at(stage: Stage) -> Tell:
    async def tell(reached: Stage, _: int, __: int) -> None:
        if reached == stage:
            raise Cut

    return tell


async def move(new: Runtime, tell: Tell | None = None, *, accept_losses: bool = False) -> Moved | None:
    gallery, action = await default_gallery(), by_system("gallery.re_embed")
    return await re_embed(new, action, gallery.id, accept_losses=accept_losses, tell=tell, settle_seconds=0)


async def found(process: Runtime, *people: str) -> list[str]:
    """The ids of the people that a search with a fresh photo finds."""
    photo = photo_of(*people, capture=8)
    answer = await identify(process, by_officer("face.identify"), await default_gallery(), photo, 10)
    return [candidate.identity_id for candidate in answer.candidates]


async def test_a_moved_gallery_serves_the_new_model_at_once_and_in_every_process(old: Runtime, new: Runtime) -> None:
    ann, bob = await person(old, "ann", photos=2), await person(old, "bob")
    async with another_process(old) as reader:
        reader.engine = SquaresEngine(NEW)
        with pytest.raises(ModelMismatch, match="idem models re-embed --gallery default"):
            await found(reader, "ann")
        before = await default_gallery()
        assert await found(old, "ann") == [ann.id]
        moved = await move(new)
        assert moved is not None
        assert (moved.samples, moved.lost, moved.former) == (3, [], OLD.contract)
        assert await found(reader, "ann") == [ann.id]
        assert await found(new, "bob") == [bob.id]
        assert (await claimed(reader, ann, "ann")).match
        assert not (await claimed(reader, ann, "bob")).match
    after = await default_gallery()
    assert (after.contract, after.pack, after.licence, after.seq) == (NEW.contract, NEW.pack, NEW.licence, before.seq)
    assert after.epoch != before.epoch
    with pytest.raises(ModelMismatch):
        await found(old, "ann")
    newcomer = await person(new, "ann", capture=5)
    assert newcomer.status == "suspected_duplicate"
    event = await AuditEvent.find_one({"action": "gallery.re_embed"})
    assert event is not None
    changed = event.detail["changes"]
    assert isinstance(changed, dict)
    assert (changed["contract"], event.detail["samples"]) == ({"old": OLD.contract, "new": NEW.contract}, 3)
    assert await Renewal.find_all().count() == 0
    assert await move(new) is None


@pytest.mark.parametrize("stage", ["reading photos", "closing", "replacing templates", "measuring pairs"])
async def test_an_interrupted_move_continues(old: Runtime, new: Runtime, stage: Stage) -> None:
    ann = await person(old, "ann", photos=2)
    bob, twin = await person(old, "bob"), await person(old, "bob", capture=5)
    with pytest.raises(Cut):
        await move(new, at(stage))
    if stage == "reading photos":
        assert await found(old, "ann") == [ann.id]
    else:
        for process in (old, new):  # closed: no photo is compared with half a gallery
            with pytest.raises(NotReady, match="re-embed"):
                await found(process, "ann")
    moved = await move(new)
    assert moved is not None
    assert moved.samples == 4
    assert await found(new, "ann") == [ann.id]
    assert await found(new, "bob") == [bob.id]
    assert {sample.contract for sample in (await known(twin)).samples} == {NEW.contract}


PROGRAM = """
import asyncio, os, sys
from pydantic import SecretStr
from app.audit import by_system
from app.config import Settings
from app.runtime import open_runtime
from app.use_cases import re_embed
from tests.builders import default_gallery
from tests.support.moved_galleries import NEW, SquaresEngine

re_embed.LEASE_SECONDS = 1

async def main():
    async with open_runtime(Settings.model_validate_json(sys.argv[1]), SquaresEngine(NEW)) as runtime:
        runtime.settings.key_encryption_key  # as given
        gallery = await default_gallery()
        async def tell(stage, done, total):
            if stage == sys.argv[2]:
                print(stage, flush=True)
                await asyncio.sleep(60)
        await re_embed.re_embed(runtime, by_system("gallery.re_embed"), gallery.id, tell=tell, settle_seconds=0)

asyncio.run(main())
"""


@pytest.mark.parametrize("stage", ["replacing templates"])
async def test_a_killed_move_continues(old: Runtime, new: Runtime, settings: Settings, stage: str) -> None:
    ann = await person(old, "ann", photos=2)
    bob = await person(old, "bob")
    secret = settings.key_encryption_key
    assert secret is not None
    environment = os.environ | {"KEY_ENCRYPTION_KEY": secret.get_secret_value()}
    given = settings.model_dump_json(exclude={"key_encryption_key"}, exclude_unset=True)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, given, stage], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        try:
            assert child.stdout is not None
            line = await asyncio.wait_for(asyncio.to_thread(child.stdout.readline), 60)
            assert line.strip() == stage
        finally:
            child.send_signal(signal.SIGKILL)
    await asyncio.sleep(1.2)  # the lease of the killed process runs out
    moved = await move(new)
    assert moved is not None
    assert moved.samples == 3
    assert (await found(new, "ann"), await found(new, "bob")) == ([ann.id], [bob.id])


async def test_people_enrolled_during_a_move_are_moved_and_erased_people_are_not(old: Runtime, new: Runtime) -> None:
    ann, bob, cid = [await person(old, name) for name in ("ann", "bob", "cid")]
    came: list[Identity] = []

    async def meanwhile(stage: Stage, _: int, __: int) -> None:
        if stage == "reading photos" and not came:
            came.append(await person(old, "dan"))
            await erased(old, bob)
        if stage == "replacing templates" and (await Identity.get(cid.id)) and await Identity.living(cid.id):
            await erased(old, cid)
        if stage == "closing":
            with pytest.raises(NotReady):
                await person(old, "eve")

    moved = await move(new, meanwhile)
    assert moved is not None
    assert moved.lost == []
    assert await found(new, "ann") == [ann.id]
    assert await found(new, "dan") == [came[0].id]
    assert await found(new, "bob") == await found(new, "cid") == await found(new, "eve") == []
    assert (await default_gallery()).samples == 2
    assert await Renewal.find_all().count() == 0


async def test_a_moved_gallery_is_published_again_and_keeps_no_index_files_of_the_former_model(
    old: Runtime, new: Runtime, asked: list[str]
) -> None:
    ann, _ = await person(old, "ann"), await person(old, "bob")
    before = await default_gallery()
    await publish(old, by_system("index.publish"), before.id, holder="test")
    await move(new)
    receipt = await erased(new, ann)
    head = await default_gallery()
    assert asked == [before.id]
    assert head.purge_by is not None, "the sweep asks for the publication as well"
    assert head.purge_by <= receipt.index_purge_by
    await keep_promises(new)
    assert new.search.store.listed(head.id) == []
    generation = await publish(new, by_system("index.publish"), head.id, holder="test")
    head = await default_gallery()
    assert new.search.store.listed(head.id) == [(head.epoch, generation.number)]
    assert head.purge_by is None


async def test_a_gallery_without_an_index_is_not_published_by_a_move(
    old: Runtime, new: Runtime, asked: list[str]
) -> None:
    await person(old, "ann")
    await move(new)
    assert (asked, (await default_gallery()).purge_by) == ([], None)


async def test_losses_are_refused_unless_they_are_accepted(old: Runtime, new: Runtime) -> None:
    ann, bob, cid = await person(old, "ann", photos=2), await person(old, "bob"), await person(old, "cid")
    await old.photos.delete([ann.samples[0].photo_key])
    engine = new.engine
    assert isinstance(engine, SquaresEngine)
    engine.blind_to = {"bob"}
    with pytest.raises(SamplesLost) as refusal:
        await move(new)
    assert {lost.sample_id for lost in refusal.value.lost} == {ann.samples[0].id, bob.samples[0].id}
    assert all(lost.reason for lost in refusal.value.lost)
    assert await found(old, "bob") == [bob.id]  # nothing was moved
    moved = await move(new, accept_losses=True)
    assert moved is not None
    assert len(moved.lost) == 2
    assert await found(new, "cid") == [cid.id]
    engine.blind_to = set()
    assert await found(new, "bob") == []
    assert not (await claimed(new, bob, "bob")).match
    assert await found(new, "ann") == [ann.id]
    assert (await claimed(new, ann, "ann")).match
    assert [sample.is_lost for sample in (await known(ann)).samples] == [True, False]


async def test_a_loss_that_is_found_after_closing_opens_the_gallery_again(old: Runtime, new: Runtime) -> None:
    ann = await person(old, "ann")

    async def meanwhile(stage: Stage, _: int, __: int) -> None:
        if stage == "closing":
            renewal = await Renewal.get(ann.samples[0].id)
            assert renewal is not None
            await renewal.set({"template": None, "reason": "lost"})

    with pytest.raises(SamplesLost):
        await move(new, meanwhile)
    assert (await default_gallery()).contract == OLD.contract
    assert await found(old, "ann") == [ann.id]
    assert await move(new) is not None


async def test_a_half_replaced_gallery_does_not_open_for_its_former_model(old: Runtime, new: Runtime) -> None:
    ann, bob = await person(old, "ann"), await person(old, "bob")
    with pytest.raises(Cut):
        await move(new, at("replacing templates"))
    async with another_process(old) as third:
        third.engine = SquaresEngine(replace(OLD, pack="fake-3", contract="sha256:fake-3"))
        third.engine.blind_to = {"bob"}
        with pytest.raises(SamplesLost, match="stays closed") as refusal:
            await move(third)
        assert "Nothing was moved" not in refusal.value.detail
        for process in (old, new, third):
            with pytest.raises(NotReady):
                await found(process, "ann")
    assert await move(new) is not None
    assert (await found(new, "ann"), await found(new, "bob")) == ([ann.id], [bob.id])


@pytest.mark.parametrize("is_cut", [True, False])
async def test_a_gallery_can_move_back_and_has_its_lost_samples_again(
    old: Runtime, new: Runtime, *, is_cut: bool
) -> None:
    ann, bob = await person(old, "ann", photos=2), await person(old, "bob")
    await old.photos.delete([ann.samples[1].photo_key])
    assert isinstance(new.engine, SquaresEngine)
    new.engine.blind_to = {"bob"}
    with pytest.raises(Cut) if is_cut else nullcontext():
        await move(new, at("replacing templates") if is_cut else None, accept_losses=True)
    moved = await move(old)
    assert moved is not None
    assert moved.samples == 2
    assert (await found(old, "ann"), await found(old, "bob")) == ([ann.id], [bob.id])
    assert (await claimed(old, ann, "ann")).match


async def test_no_renewal_stays_of_a_sample_that_is_removed_while_its_photo_is_read(
    old: Runtime, new: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, gallery = await person(old, "ann", photos=2), await default_gallery()
    read_all = moving._read_all

    async def read_and_remove(*arguments: object) -> object:
        read = await read_all(*arguments)  # type: ignore[arg-type] # the same arguments
        await remove_sample(old, by_officer("sample.remove"), gallery, ann.id, ann.samples[1].id, "test")
        return read

    monkeypatch.setattr(moving, "_read_all", read_and_remove)
    with pytest.raises(Cut):
        await move(new, at("reading photos"))
    assert [renewal.id for renewal in await Renewal.find_all().to_list()] == [ann.samples[0].id]


async def test_renewals_whose_samples_a_former_version_removed_are_deleted_at_the_start(
    old: Runtime, new: Runtime
) -> None:
    ann, bob = await person(old, "ann"), await person(old, "bob")
    with pytest.raises(Cut):
        await move(new, at("closing"))
    (left,) = await Renewal.find({"identity_id": bob.id}).to_list()
    await erased(old, bob)
    await Renewal.keep([left, left.model_copy(update={"id": new_id(), "identity_id": ann.id})])
    with pytest.raises(Cut):
        await move(new, at("reading photos"))
    assert [renewal.id for renewal in await Renewal.find_all().to_list()] == [ann.samples[0].id]


async def test_no_renewal_outlives_its_gallery(old: Runtime) -> None:
    gallery = await galleries.create(old, by_officer("gallery.create"), "north", None, old.starting_policy())
    await Renewal(id=new_id(), gallery_id=gallery.id, identity_id=new_id(), contract=NEW.contract).insert()
    await galleries.delete(old, by_officer("gallery.delete"), gallery)
    assert await Renewal.find_all().count() == 0


async def test_the_command_deletes_what_a_move_that_was_killed_at_its_end_has_left(
    old: Runtime, new: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await person(old, "ann")
    gallery = await default_gallery()
    forget = Renewal.forget_gallery

    async def dies(gallery_id: str, *, only_lost: bool = False) -> None:
        if not only_lost:
            raise Cut
        await forget(gallery_id, only_lost=True)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Renewal, "forget_gallery", dies)
        await move(new)
    assert await Renewal.find_all().count() == 1
    assert [one.id for one in await moving.chosen(new, None)] == [gallery.id]
    assert await move(new) is None
    assert await Renewal.find_all().count() == 0
    assert await moving.chosen(new, None) == []


async def test_a_move_and_a_rotation_of_the_gallerys_key_exclude_each_other(old: Runtime, new: Runtime) -> None:
    await person(old, "ann")
    gallery, action = await default_gallery(), by_system("key.rotate")

    async def rotated() -> None:
        await rotate_gallery_key(old, action, gallery.id, settle_seconds=0)

    async def meanwhile(stage: Stage, _: int, __: int) -> None:
        if stage == "reading photos":
            with pytest.raises(Conflict, match="moved"):
                await rotated()

    async with held(rekeying(gallery.id), "rotation"):
        with pytest.raises(Conflict, match="rotated"):
            await move(new)
    assert await move(new, meanwhile) is not None
    await rotated()


async def test_recorded_pairs_and_open_cases_get_the_scores_of_the_new_model(old: Runtime, new: Runtime) -> None:
    await person(old, "ann")
    twin = await person(old, "ann", "bob", capture=3)
    case = await case_about(twin)
    (pair,) = await Pair.find_all().to_list()
    await Gallery.get_pymongo_collection().update_one({}, {"$set": {"policy.dedup_threshold": 0.3}})
    moved = await move(new)
    assert moved is not None
    assert (moved.pairs, moved.thresholds) == (1, {"dedup_threshold": 0.3})
    (again,) = await Pair.find_all().to_list()
    assert again.score != pytest.approx(pair.score, abs=1e-6)
    (same,) = await Case.find({"state": "open"}).to_list()
    assert same.id == case.id
    assert same.candidates[0].score == again.score
    gallery = await default_gallery()
    assert gallery.policy.dedup_threshold is None


async def test_a_preview_measures_and_changes_nothing(old: Runtime, new: Runtime) -> None:
    ann, _ = await person(old, "ann", photos=2), await person(old, "bob")
    await old.photos.delete([ann.samples[1].photo_key])
    before = await default_gallery()
    seen = await preview(new, before, 100)
    assert (seen.samples, seen.read, len(seen.lost), len(seen.strangers)) == (3, 3, 1, 1)
    assert await default_gallery() == before
    assert await Renewal.find_all().count() == 0


async def test_the_command_shows_moves_and_lists_what_would_be_lost(
    old: Runtime, new: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(command, "_run", lambda _, work: asyncio.run_coroutine_threadsafe(work(new), loop).result())
    monkeypatch.setattr(moving, "re_embed", partial(re_embed, settle_seconds=0))

    async def run(*arguments: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, models.app, ["re-embed", *arguments])

    ann, _ = await person(old, "ann", photos=2), await person(old, "bob")
    seen = await run("--dry-run")
    assert (seen.exit_code, "0 of 3 samples would be lost" in seen.output) == (0, True)
    await old.photos.delete([ann.samples[0].photo_key])
    refused = await run("--gallery", "default")
    assert (refused.exit_code, ann.samples[0].id in refused.output) == (1, True)
    assert "--accept-losses" in refused.output
    assert (await default_gallery()).contract == OLD.contract
    moved = await run("--accept-losses")
    assert (moved.exit_code, "2 samples" in moved.output, "no longer match" in moved.output) == (0, True, True)
    again = await run()
    assert (again.exit_code, "nothing is to be done" in again.output) == (0, True)
    assert (await run("--gallery", "nowhere")).exit_code == 1


async def test_ready_names_the_galleries_of_another_model_and_the_command(old: Runtime, new: Runtime) -> None:
    await person(old, "ann")
    seen = await _index(new)
    assert seen["status"] == "degraded"
    assert "default" in str(seen["reason"])
    assert "idem models re-embed" in str(seen["reason"])
    await move(new)
    assert "status" not in await _index(new)
