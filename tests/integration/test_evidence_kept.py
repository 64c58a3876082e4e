"""The evidence store is kept complete, and does not grow by a file a second."""

import asyncio
import shutil
from datetime import timedelta

import pytest

from app.audit import by_system, record
from app.documents.base import now
from app.documents.deletions import LEDGER
from app.documents.galleries import Gallery
from app.documents.stores import Store
from app.documents.tree import HEADS, KEYS, TreeHead
from app.kept_outside import Lost, write_again
from app.runtime import Runtime
from app.use_cases import check as checking
from app.use_cases import keep_evidence as keeping
from app.use_cases import sequence
from app.use_cases.erase import erase
from app.use_cases.keep_evidence import keep_evidence
from storage.evidence import EvidenceStore, EvidenceUnavailable
from storage.ownership import Standing
from tests.builders import active, by_officer, default_gallery
from workers.jobs import sweep_all_evidence, sweep_evidence


async def _told(runtime: Runtime) -> None:
    await runtime.transaction(lambda session: record(session, by_system("test"), subject_kind="none", subject_id=None))


async def _kept(runtime: Runtime) -> dict[str, bytes]:
    names = [name for prefix in (KEYS, HEADS, LEDGER) for name in await runtime.evidence.names(prefix)]
    return {name: await runtime.evidence.read(name) for name in names}


async def _with_evidence(runtime: Runtime) -> dict[str, bytes]:
    """A key, two heads, and the line of a person who was erased."""
    gallery: Gallery = await default_gallery()
    ann = await active(runtime, "ann")
    for _ in range(2):
        await _told(runtime)
        while await sequence.grow(runtime):
            pass
        await sequence.sign(runtime)
        assert await sequence.deliver(runtime) == 0
    await erase(runtime, by_officer("identity.erase"), gallery, ann.id, "asked to")
    kept = await _kept(runtime)
    assert [sum(name.startswith(prefix) for name in kept) for prefix in (KEYS, HEADS, LEDGER)] == [1, 2, 1]
    return kept


async def _findings(runtime: Runtime, *, repair: bool = False) -> checking.Checked:
    return await checking.check(runtime, lambda *_: None, repair=repair)


async def test_r5_a_lost_evidence_store_is_found_by_the_check_and_written_again_by_its_repair(runtime: Runtime) -> None:
    before = await _with_evidence(runtime)
    shutil.rmtree(runtime.settings.evidence_path)
    found = await _findings(runtime)
    assert found.counts["evidence-missing"] == len(before)
    assert found.standing >= len(before)
    assert await _kept(runtime) == {}, "a check without repair writes nothing"
    mended = await _findings(runtime, repair=True)
    assert mended.counts["evidence-missing"] == len(before)
    assert await _kept(runtime) == before, "byte by byte"
    assert (await _findings(runtime)).counts["evidence-missing"] == 0


async def test_r5_a_lost_evidence_store_is_written_again_by_itself(runtime: Runtime) -> None:
    before = await _with_evidence(runtime)
    shutil.rmtree(runtime.settings.evidence_path)
    # A new head is delivered first, so the store is no longer empty.
    await _told(runtime)
    while await sequence.grow(runtime):
        pass
    await sequence.sign(runtime)
    await sequence.deliver(runtime)
    await sweep_evidence({"runtime": runtime})
    after = await _kept(runtime)
    assert before.items() <= after.items()


@pytest.mark.parametrize("prefix", [KEYS, HEADS, LEDGER])
async def test_r5_one_lost_file_of_each_kind_is_written_again_once_a_day(runtime: Runtime, prefix: str) -> None:
    before = await _with_evidence(runtime)
    name = next(name for name in before if name.startswith(prefix))
    (runtime.settings.evidence_path / name).unlink()
    assert await keep_evidence(runtime, whole=True) == 1
    assert await _kept(runtime) == before
    assert await keep_evidence(runtime, whole=True) == 0


async def test_an_evidence_store_that_does_not_answer_does_not_count_as_lost(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await _with_evidence(runtime)

    async def away(*_: object) -> list[str]:
        raise EvidenceUnavailable("the server does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(runtime.evidence, "names", away)
        assert await keep_evidence(runtime, whole=True) == 0
        with pytest.raises(EvidenceUnavailable):
            await _findings(runtime)
    assert (await _findings(runtime)).counts["evidence-missing"] == 0
    assert await _kept(runtime) == before


async def test_sweeps_do_not_write_the_same_loss_again_side_by_side(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep starts every 20 seconds. After a loss each would fill a slot of the worker, and no screening would run."""
    before = await _with_evidence(runtime)
    shutil.rmtree(runtime.settings.evidence_path)
    writing, may_go_on, written = asyncio.Event(), asyncio.Event(), list[str]()

    async def slow(evidence: EvidenceStore, one: Lost) -> None:
        writing.set()
        await may_go_on.wait()
        written.append(one.name)
        await write_again(evidence, one)

    monkeypatch.setattr(keeping, "write_again", slow)
    first = asyncio.create_task(sweep_evidence({"runtime": runtime}))
    async with asyncio.timeout(20):
        await writing.wait()
        await sweep_evidence({"runtime": runtime})
        await sweep_all_evidence({"runtime": runtime})
        may_go_on.set()
        await first
    assert sorted(written) == sorted(before)
    assert await _kept(runtime) == before


async def test_a_killed_sweep_is_continued_by_the_next_short_sweep(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if new objects were added after the kill. Then the few names that a short sweep checks are all there."""
    before = await _with_evidence(runtime)
    dan = await active(runtime, "dan")
    shutil.rmtree(runtime.settings.evidence_path)

    async def killed(evidence: EvidenceStore, one: Lost) -> None:
        if not one.name.startswith(KEYS):
            raise asyncio.CancelledError
        await write_again(evidence, one)

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "write_again", killed)
        with pytest.raises(asyncio.CancelledError):
            await sweep_evidence({"runtime": runtime})
    await erase(runtime, by_officer("identity.erase"), await default_gallery(), dan.id, "asked to")
    while await sequence.grow(runtime):
        pass
    await sequence.sign(runtime)
    await sequence.deliver(runtime)
    assert not before.items() <= (await _kept(runtime)).items()
    await sweep_evidence({"runtime": runtime})
    assert before.items() <= (await _kept(runtime)).items()
    assert await keep_evidence(runtime, whole=True) == 0


async def test_short_sweeps_do_not_compare_the_evidence_of_another_store(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could write nothing there, so an unfinished comparison would begin again every 20 seconds."""
    await _with_evidence(runtime)
    await Store.note_evidence(lacks_some=True)
    places = runtime.places.evidence
    monkeypatch.setattr(places, "standing", Standing("EVIDENCE_PATH", "/there", "foreign", "another"))

    def compared(*_: object) -> None:
        pytest.fail("it compares all objects")

    monkeypatch.setattr(keeping, "lost", compared)
    await sweep_evidence({"runtime": runtime})


async def test_r11_one_head_a_minute_is_uploaded_however_many_are_signed(runtime: Runtime) -> None:
    """Earlier, there was a file for each second with an event: up to 86,400 a day."""
    runtime.settings.audit_head_seconds = 0.05
    runtime.settings.audit_checkpoint_seconds = 60
    async with sequence.kept_up(runtime), asyncio.timeout(60):
        while await TreeHead.count() < 8:
            await _told(runtime)
            await asyncio.sleep(0.02)
        assert len(await runtime.evidence.names(HEADS)) == 1
        assert await TreeHead.waiting() >= 6
        # A minute later, the newest head is uploaded. It proves the heads before it.
        (first,) = [head async for head in TreeHead.outside()]
        past = {"$set": {"time": now() - timedelta(seconds=61)}}
        await TreeHead.get_pymongo_collection().update_one({"_id": first.id}, past)
        while len(await runtime.evidence.names(HEADS)) < 2:
            await asyncio.sleep(0.05)
    newest = await TreeHead.newest_outside()
    assert newest is not None
    assert newest.size > first.size + 3
