"""Examine: how good and how whole a gallery's index is, told to its operator."""

import asyncio
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Final

import numpy as np

from app.documents.base import now
from app.documents.galleries import Gallery, Generation
from app.documents.leases import Lease, LeaseProgress
from app.documents.sealed import gallery_key
from app.domain.policy import thresholds_for
from app.runtime import Runtime
from app.vectors import Turning, changes_of
from storage import calibration, rows
from storage.generations import BadGeneration

MIB: Final = 1 << 20
#: Vectors of a generation that `verify` compares with the documents.
COMPARED: Final = 2000
#: Planted pairs on which `tune` measures a probe curve.
CURVE_PAIRS: Final = 6000


@dataclass(frozen=True, slots=True)
class IndexState:
    """One gallery's index as its head, its lease and the disk tell it. recall: None without a generation.

    tail: changes that no generation holds; disk_mib: on the share; trouble: what an operator should know; publishing: the
    stage that a publisher is in.
    """

    gallery: str
    gallery_id: str
    kind: str
    generation: int | None
    vectors: int
    tail: int
    recall: float | None
    recall_bound: float | None
    recall_target: float
    disk_mib: float | None
    built_at: datetime | None
    purge_by: datetime | None
    trouble: str | None
    publishing: LeaseProgress | None


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check of one gallery's files came to."""

    gallery: str
    is_good: bool
    message: str


async def chosen(runtime: Runtime, name: str | None) -> list[Gallery]:
    """The gallery of that name, or all of the running model. Raises NotFound."""
    if name is None:
        return await Gallery.find({"contract": runtime.engine.card.contract}).sort("name").to_list()
    return [await Gallery.require(name)]


async def heads(galleries: list[Gallery] | None = None) -> list[IndexState]:
    """The state of these galleries' indexes, or of all, as MongoDB alone tells it."""
    known = await Gallery.find_all().sort("name").to_list() if galleries is None else galleries
    leases = {lease.id: lease for lease in await Lease.alive(*(gallery.publishing for gallery in known))}
    return [_state(gallery, leases.get(gallery.publishing)) for gallery in known]


async def states(runtime: Runtime, name: str | None = None) -> list[IndexState]:
    """The state of one gallery's index, or of all, with the disk that it takes."""
    found = []
    for state in await heads(None if name is None else await chosen(runtime, name)):
        use = await runtime.share.run(runtime.search.store.disk_use, state.gallery_id)
        found.append(replace(state, disk_mib=round(use.share / MIB, 1)))
    return found


async def verify(runtime: Runtime, name: str | None = None) -> list[Finding]:
    """Read the published files through, and compare a sample of their vectors with the documents'."""
    findings = []
    for gallery in await chosen(runtime, name):
        generation = gallery.published
        if generation is None:
            findings.append(Finding(gallery.name, is_good=True, message="nothing is published"))
            continue
        try:
            wanted = (gallery.id, gallery.epoch, generation.number, generation.digest)
            manifest = await runtime.share.run_long("verify", partial(runtime.search.store.verify, *wanted))
            compared = await _compare(runtime, gallery, generation)
        except (BadGeneration, ValueError) as error:
            await gallery.report(generation.number, str(error))
            findings.append(Finding(gallery.name, is_good=False, message=str(error)))
            continue
        whole = f"generation {generation.number}: {len(manifest.files)} files are what was published"
        message = f"{whole}, {compared} vectors are those of the documents"
        findings.append(Finding(gallery.name, is_good=True, message=message))
    return findings


async def _compare(runtime: Runtime, gallery: Gallery, generation: Generation) -> int:
    """Compare the first and the last vectors with the documents'; returns how many. Raises ValueError when one differs."""
    wanted = (gallery.id, gallery.epoch, generation.number, generation.digest)
    folder, _ = await runtime.share.run_long("fetch", partial(runtime.search.store.fetch, *wanted))
    ids, vectors = rows.read_rows(folder, gallery.dimension)
    key = gallery_key(runtime.keys, gallery)
    turning = Turning.of(key, generation.rotation, gallery.dimension)
    starts = {0, max(0, generation.watermark - COMPARED // 2)}
    compared = 0
    for start in sorted(starts):
        upto = min(generation.watermark, start + COMPARED // 2)
        async for changes in changes_of(gallery, key, turning, after=start, upto=upto, compute=runtime.compute):
            places = np.searchsorted(ids, changes.ids)
            places[places == len(ids)] = 0
            if len(changes.ids) and not (
                np.array_equal(ids[places], changes.ids) and np.array_equal(vectors[places], changes.vectors)
            ):
                message = f"generation {generation.number} does not hold the documents' vectors after change {start}"
                raise ValueError(message)
            compared += len(changes.ids)
    return compared


def _state(gallery: Gallery, lease: Lease | None) -> IndexState:
    published = gallery.published
    trouble = None
    if gallery.fault is not None:
        trouble = f"generation {gallery.fault.number} was refused: {gallery.fault.reason}"
    elif gallery.purge_by is not None and gallery.purge_by < now():
        trouble = f"files that hold somebody erased should have been gone by {gallery.purge_by:%Y-%m-%d %H:%M} UTC"
    elif published is not None and published.recall_bound < gallery.policy.recall_target:
        trouble = f"recall is at least {published.recall_bound:.5f}, the target {gallery.policy.recall_target}"
    return IndexState(
        gallery=gallery.name,
        gallery_id=gallery.id,
        kind="exact" if published is None else published.kind,
        generation=None if published is None else published.number,
        vectors=gallery.samples,
        tail=gallery.seq - gallery.watermark,
        recall=None if published is None else published.recall,
        recall_bound=None if published is None else published.recall_bound,
        recall_target=gallery.policy.recall_target,
        disk_mib=None,
        built_at=None if published is None else published.built_at,
        purge_by=gallery.purge_by,
        trouble=trouble,
        publishing=None if lease is None else lease.progress,
    )


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a gallery's own vectors say about how much must be read to miss nobody.

    probe_shares: of the rows that a division into `lists` would read to find these shares of the pairs; None for a gallery
    that is compared exactly or has no generation yet. chosen: what publication does with it.
    """

    gallery: str
    vectors: int
    threshold: float
    recall_target: float
    margin: dict[str, float] | None
    lists: int | None
    probe_shares: dict[float, float] | None
    chosen: str


async def tune(runtime: Runtime, name: str | None = None) -> list[Tuning]:
    """Measure the probe curve of one published gallery, or of all. Raises BadGeneration."""
    return [await _tuned(runtime, gallery) for gallery in await chosen(runtime, name)]


async def _tuned(runtime: Runtime, gallery: Gallery) -> Tuning:
    limits = thresholds_for(gallery.policy, runtime.engine.card, gallery.samples)
    threshold, target = min(limits.identify, limits.dedup), gallery.policy.recall_target
    generation = gallery.published
    if generation is None or generation.kind == "exact":
        word = "nothing is published yet" if generation is None else "every vector is compared exactly"
        return Tuning(gallery.name, gallery.samples, threshold, target, None, None, None, word)
    wanted = (gallery.id, gallery.epoch, generation.number, generation.digest)
    folder, manifest = await runtime.share.run_long("fetch", partial(runtime.search.store.fetch, *wanted))

    def measured() -> calibration.ProbeCurve:
        _, vectors = rows.read_rows(folder, gallery.dimension)
        random = np.random.default_rng(generation.number)
        pairs = calibration.planted_pairs(vectors, threshold, CURVE_PAIRS, random)
        at = tuple(sorted({0.95, 0.99, 0.999, target}))
        return calibration.probe_curve(vectors, pairs, lists=round(generation.count**0.5), at=at)

    curve = await asyncio.to_thread(measured)
    pays = curve.shares[target] < calibration.WORTHWHILE_SHARE
    return Tuning(
        gallery.name, generation.count, threshold, target, dict(manifest.margin), curve.lists, curve.shares,
        f"{curve.probes[target]} of {curve.lists} lists" if pays else "one list, scanned whole",
    )  # fmt: skip
