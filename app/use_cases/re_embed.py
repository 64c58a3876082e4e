"""Re-embed: move a gallery to the running model, from the photos that it stores.

    preparing   the running model reads every sample's photo; the new templates are stored in addition to those in use
    closing     the gallery's contract names no model for a while, so the gallery refuses enrolments, screenings and searches
    replacing   the new templates replace the old ones; the scores of recorded pairs are measured again
    opening     one compare-and-set binds the gallery to the new model, under a new epoch

During the preparation, processes of the former model go on serving. Each step stores its results, so an interrupted move
continues where it stopped. See docs/adr/0041.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Final, Literal

import numpy as np
import pymongo
import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, record
from app.concurrency import all_of
from app.documents.base import new_id, now
from app.documents.cases import Case, Pair
from app.documents.galleries import THRESHOLDS_BY_HAND, Gallery, GalleryChange
from app.documents.identities import Identity, Sample
from app.documents.leases import Lease, re_embedding, rekeying
from app.documents.probes import Probe
from app.documents.renewals import Renewal
from app.documents.sealed import data_key, open_landmarks, open_template, seal_landmarks, seal_template
from app.domain.changes import Changes
from app.domain.faces import Embedding, Landmarks, ModelCard
from app.domain.photo import decode_stored
from app.domain.policy import thresholds_for
from app.engine.port import FaceEngine
from app.engine.reading import stored_face
from app.errors import Conflict, NotFound, NotReady, PhotoMissing, PhotoRefused
from app.keys import SealBroken
from app.leases import Held, LeaseLost, held
from app.runtime import Runtime

log = structlog.get_logger(__name__)

Stage = Literal["reading photos", "closing", "replacing templates", "measuring pairs"]
Tell = Callable[[Stage, int, int], Awaitable[None]]

LEASE_SECONDS: Final = 15
#: The pause between closing the gallery and replacing the first template. Requests that read old templates end in this time.
SETTLE_SECONDS: Final = 5.0
#: Identities that are read at a time. Their photos are read and embedded in parallel.
IDENTITIES_AT_ONCE: Final = 16
REPLACED_AT_ONCE: Final = 2000
#: The limit for one large step on MongoDB. No request waits for it, so a store under load may need this long.
BATCH_SECONDS: Final = 60
PAIRS_AT_ONCE: Final = 200
#: How often the preparation reads newcomers again. Enrolments go on during the preparation.
MOST_PASSES: Final = 100


@dataclass(frozen=True, slots=True)
class LostSample:
    """A sample whose photo gives no template under the running model, and why."""

    identity_id: str
    sample_id: str
    reason: str


class SamplesLost(Conflict):
    """Some samples would be lost, and the caller did not accept losses."""

    def __init__(self, gallery: Gallery, lost: Sequence[LostSample]) -> None:
        state = (
            "The gallery stays closed, because an interrupted move has replaced some templates already."
            if gallery.is_replacing
            else "Nothing was moved."
        )
        super().__init__(
            f"{len(lost)} samples of gallery {gallery.name} give no template under the running model. {state} "
            "With --accept-losses the gallery is moved, and these samples no longer match anyone."
        )
        self.lost = tuple(lost)


@dataclass(slots=True)
class Moved:
    """The result of a move. thresholds: those that were set by hand for the former model, and are reset."""

    gallery: str
    former: str
    samples: int = 0
    pairs: int = 0
    lost: list[LostSample] = field(default_factory=list)
    thresholds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PairMove:
    """A recorded pair of look-alikes, with its scores by the former and the new model."""

    low: str
    high: str
    before: float
    after: float


@dataclass(slots=True)
class Preview:
    """What a move would do. read: how many samples were measured.

    same: scores by the new model between two photos of one identity. strangers: between photos of two identities.
    """

    gallery: str
    pack: str
    samples: int
    read: int = 0
    same: list[float] = field(default_factory=list)
    strangers: list[float] = field(default_factory=list)
    pairs: list[PairMove] = field(default_factory=list)
    lost: list[LostSample] = field(default_factory=list)
    thresholds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Read:
    """A sample as the running model reads its photo. reason: why it is lost."""

    identity: Identity
    sample: Sample
    embedding: Embedding | None
    landmarks: Landmarks | None
    reason: str | None


async def chosen(runtime: Runtime, name: str | None) -> list[Gallery]:
    """The gallery of that name, or all that were not made by the running model or have renewals left. Raises NotFound."""
    if name is None:
        return await Gallery.of_another_model(runtime.engine.card.contract, also=await Renewal.gallery_ids())
    return [await Gallery.require(name)]


async def preview(runtime: Runtime, gallery: Gallery, limit: int, tell: Tell | None = None) -> Preview:
    """Measure, on about `limit` samples, what a move would do. Changes nothing."""
    seen = Preview(gallery.name, gallery.pack, gallery.samples, thresholds=_by_hand(gallery))
    vectors: dict[str, list[Embedding]] = {}
    async for people in _people(gallery):
        wanted = [(identity, sample) for identity in people for sample in identity.samples]
        for one in await _read_all(runtime, gallery, wanted):
            seen.read += 1
            if one.embedding is not None:
                vectors.setdefault(one.identity.id, []).append(one.embedding)
            elif one.reason is not None:
                seen.lost.append(LostSample(one.identity.id, one.sample.id, one.reason))
        if tell is not None:
            await tell("reading photos", seen.read, max(seen.read, min(limit, gallery.samples)))
        if seen.read >= limit:
            break
    firsts = np.array([own[0] for own in vectors.values()], np.float32)
    if len(firsts) > 1:
        between = (firsts @ firsts.T)[np.triu_indices(len(firsts), 1)]
        seen.strangers = [float(score) for score in between]
    seen.same = [float(own[0] @ other) for own in vectors.values() for other in own[1:]]
    for pair in await Pair.of_gallery(gallery.id):
        if pair.low in vectors and pair.high in vectors:
            after = _best(vectors[pair.low], vectors[pair.high])
            seen.pairs.append(PairMove(pair.low, pair.high, pair.score, after))
    return seen


async def re_embed(
    runtime: Runtime,
    action: Action,
    gallery_id: str,
    *,
    accept_losses: bool = False,
    tell: Tell | None = None,
    settle_seconds: float = SETTLE_SECONDS,
) -> Moved | None:
    """Move the gallery to the running model. Returns None if it has that model already.

    Continues an interrupted move. Raises SamplesLost, Conflict while another process moves the gallery or rotates its key,
    NotFound, NotReady.
    """
    began = time.monotonic()
    while True:
        try:
            async with held(re_embedding(gallery_id), f"re-embed:{new_id()}", LEASE_SECONDS) as lease:
                if lease is not None:
                    if await Lease.alive(rekeying(gallery_id)):
                        raise Conflict(
                            "The gallery's key is being rotated. Start the move when the rotation has ended."
                        )
                    move = _Move(runtime, action, gallery_id, lease, tell, settle_seconds, accepts_losses=accept_losses)
                    return await move.run()
        except LeaseLost as error:
            raise NotReady("The move was too slow, and another process took over. Finished steps are kept.") from error
        # The lease of a killed process runs out by itself.
        if time.monotonic() - began > LEASE_SECONDS + 1:
            raise Conflict("The gallery is being moved already.")
        await asyncio.sleep(1)


@dataclass(slots=True)
class _Move:
    runtime: Runtime
    action: Action
    gallery_id: str
    lease: Held
    tell: Tell | None
    settle_seconds: float
    accepts_losses: bool

    @property
    def card(self) -> ModelCard:
        """The card of the model that the gallery moves to."""
        return self.runtime.engine.card

    async def run(self) -> Moved | None:
        gallery = await self._gallery()
        if gallery.contract == self.card.contract:
            await self._forget_renewals(gallery)
            return None
        # Photos that were missing at an earlier attempt may be back.
        await self._forget_renewals(gallery, only_lost=True)
        await self._forget_strays(gallery)
        seen = gallery.seq
        await self._prepare(gallery, _people(gallery))
        if gallery.moves_to is None:
            seen = await self._catch_up(seen)
            self._require_no_losses(gallery, await self._lost(gallery))
        if gallery.moves_to != self.card.contract:
            gallery = await self._close(gallery)
        await self._say("closing", 0, 1)
        await asyncio.sleep(self.settle_seconds)
        # The gallery is closed: no more samples can come.
        await self._catch_up(seen)
        lost = await self._lost(gallery)
        if lost and not self.accepts_losses and not gallery.is_replacing:
            await self._change(gallery, gallery.stay)
        self._require_no_losses(gallery, lost)
        gallery = await self._change(gallery, gallery.start_to_replace)
        samples = await self._replace(gallery)
        pairs = await self._measure_pairs(gallery)
        moved = Moved(gallery.name, gallery.moved_from, samples, pairs, lost, _by_hand(gallery))
        await self._open(gallery, moved)
        if gallery.published is not None:  # without a queue, `purge_by` makes the publication due
            await self.runtime.queue.enqueue_publication(gallery.id, again=f":{new_id()}")
        await self._forget_renewals(gallery)
        log.info("gallery_re_embedded", gallery=gallery.name, samples=samples, lost=len(lost), pairs=pairs)
        return moved

    async def _gallery(self) -> Gallery:
        gallery = await Gallery.get(self.gallery_id)
        if gallery is None:
            raise NotFound
        return gallery

    async def _forget_renewals(self, gallery: Gallery, *, only_lost: bool = False) -> None:
        with pymongo.timeout(BATCH_SECONDS):
            await Renewal.forget_gallery(gallery.id, only_lost=only_lost)

    async def _forget_strays(self, gallery: Gallery) -> None:
        """Delete renewals whose samples are gone: a process of a former version removes samples and knows no renewals."""
        last = ""
        while owners := await Renewal.owners_after(gallery.id, last, REPLACED_AT_ONCE):
            last = owners[-1]
            with pymongo.timeout(BATCH_SECONDS):
                await Renewal.forget_others(owners, await Identity.sample_ids_of(owners))

    async def _catch_up(self, seen: int) -> int:
        """Read the samples that came after the `seq` in `seen`, until few are left. Returns the `seq` that was reached."""
        for _ in range(MOST_PASSES):
            gallery = await self._gallery()
            await self._prepare(gallery, _newcomers(gallery, seen))
            came, seen = gallery.seq - seen, gallery.seq
            if came <= IDENTITIES_AT_ONCE:
                return seen
        raise NotReady("The gallery grows faster than it is read. Try again when fewer people enrol.")

    async def _prepare(self, gallery: Gallery, everybody: AsyncIterator[list[Identity]]) -> None:
        """Read the photos of these people's samples that have no template for the model yet."""
        done = 0
        async for people in everybody:
            wanted = [(i, s) for i in people for s in i.samples if s.contract != self.card.contract]
            known = await Renewal.of_samples([sample.id for _, sample in wanted], self.card.contract)
            todo = [(identity, sample) for identity, sample in wanted if sample.id not in known]
            head = await self._gallery()  # read again for its current keys
            read = await _read_all(self.runtime, head, todo)
            await self.runtime.transaction(
                partial(_keep, [self._renewal(head, one) for one in read]), seconds=BATCH_SECONDS
            )
            done += sum(len(identity.samples) for identity in people)
            await self._say("reading photos", done, max(done, gallery.samples))

    def _renewal(self, gallery: Gallery, one: _Read) -> Renewal:
        template = landmarks = None
        if one.embedding is not None and one.landmarks is not None:
            key = data_key(self.runtime.keys, gallery, one.identity)
            place = gallery.id, one.identity.id, one.sample.id
            template = seal_template(key, one.embedding, *place, self.card.contract)
            landmarks = seal_landmarks(key, one.landmarks, *place)
        return Renewal(
            id=one.sample.id, gallery_id=gallery.id, identity_id=one.identity.id, contract=self.card.contract,
            template=template, landmarks=landmarks, reason=one.reason,
        )  # fmt: skip

    async def _lost(self, gallery: Gallery) -> list[LostSample]:
        with pymongo.timeout(BATCH_SECONDS):
            renewals = await Renewal.lost(gallery.id, self.card.contract)
        living = await Identity.living_among([renewal.identity_id for renewal in renewals])
        # Without samples that are gone by now, and samples that an earlier move lost.
        there = {sample.id for identity in living.values() for sample in identity.samples if not sample.is_lost}
        return [LostSample(r.identity_id, r.id, r.reason or "") for r in renewals if r.id in there]

    def _require_no_losses(self, gallery: Gallery, lost: list[LostSample]) -> None:
        if lost and not self.accepts_losses:
            raise SamplesLost(gallery, lost)

    async def _close(self, gallery: Gallery) -> Gallery:
        async def close(session: AsyncClientSession) -> bool:
            return await gallery.start_to_move(self.card.contract, session)

        return await self._change(gallery, close)

    async def _change(self, gallery: Gallery, change: Callable[[AsyncClientSession], Awaitable[bool]]) -> Gallery:
        """Make the change to the gallery. Returns the changed gallery."""

        async def commit(session: AsyncClientSession) -> None:
            await self.lease.require(session)
            if not await change(session):
                raise NotReady(f"Gallery {gallery.name} was changed at the same moment; start the move again.")

        await self.runtime.transaction(commit)
        return await self._gallery()

    async def _replace(self, gallery: Gallery) -> int:
        """Replace the old templates with the new ones. Returns how many samples have a new template."""
        done, last = 0, ""
        while owners := await Renewal.owners_after(gallery.id, last, REPLACED_AT_ONCE):
            last = owners[-1]
            with pymongo.timeout(BATCH_SECONDS):
                await Probe.forget_all(owners)
                await Renewal.put_in_place(gallery.id, self.card.contract, owners)
            done += len(owners)
            await self._say("replacing templates", done, max(done, gallery.identities))
        with pymongo.timeout(BATCH_SECONDS):
            return await Identity.count_samples(gallery.id, self.card.contract)

    async def _measure_pairs(self, gallery: Gallery) -> int:
        """Give recorded pairs, and the open cases about them, the scores of the new model. Returns how many pairs have one."""
        pairs = await Pair.of_gallery(gallery.id)
        scores: dict[tuple[str, str], float] = {}
        for first in range(0, len(pairs), PAIRS_AT_ONCE):
            some = pairs[first : first + PAIRS_AT_ONCE]
            people = await Identity.living_among([side for pair in some for side in (pair.low, pair.high)])
            opened = await self.runtime.compute(self._opened, gallery, people)
            for pair in some:
                own, other = opened.get(pair.low, []), opened.get(pair.high, [])
                if own and other:
                    scores[pair.low, pair.high] = _best(own, other)
            await self._say("measuring pairs", min(first + PAIRS_AT_ONCE, len(pairs)), len(pairs))
        await Pair.measured_anew(scores, self.card.contract)
        threshold = thresholds_for(
            gallery.policy.model_copy(update=dict.fromkeys(THRESHOLDS_BY_HAND)), self.card, gallery.samples
        ).dedup
        await Case.measured_anew(gallery.id, scores, threshold)
        return len(scores)

    def _opened(self, gallery: Gallery, people: dict[str, Identity]) -> dict[str, list[Embedding]]:
        opened = {}
        for identity in people.values():
            key = data_key(self.runtime.keys, gallery, identity)
            opened[identity.id] = [
                open_template(key, gallery.id, identity.id, s)
                for s in identity.samples
                if s.contract == self.card.contract
            ]
        return opened

    async def _open(self, gallery: Gallery, moved: Moved) -> None:
        async def commit(session: AsyncClientSession) -> None:
            await self.lease.require(session)
            # Files of the former model hold everyone. An erasure before the next publication relies on this deadline.
            purge_by = now() + timedelta(hours=self.runtime.settings.index_purge_hours)
            await gallery.purge_files(session, [], purge_by)
            if not await gallery.end_to_move(self.card, session):
                raise NotReady(f"Gallery {gallery.name} was changed at the same moment; start the move again.")
            reset: Changes = {name: {"old": value, "new": None} for name, value in moved.thresholds.items()}
            models: Changes = {
                "pack": {"old": gallery.pack, "new": self.card.pack},
                "contract": {"old": moved.former, "new": self.card.contract},
            }
            await record(
                session, self.action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name,
                detail={
                    "changes": models | reset, "samples": moved.samples, "lost": len(moved.lost), "pairs": moved.pairs,
                },
            )  # fmt: skip

        await self.runtime.transaction(commit)

    async def _say(self, stage: Stage, done: int, total: int) -> None:
        self.lease.report(stage, done, total)
        if self.tell is not None:
            await self.tell(stage, done, total)


async def _people(gallery: Gallery) -> AsyncIterator[list[Identity]]:
    """Everybody in the gallery, some at a time, by rising id, so that the pass includes people who enrol during it."""
    last = ""
    while people := await Identity.after(gallery.id, last, IDENTITIES_AT_ONCE):
        yield people
        last = people[-1].id


async def _newcomers(gallery: Gallery, seen: int) -> AsyncIterator[list[Identity]]:
    """The people who got a sample after the `seq` in `seen`, some at a time."""
    while rows := await GalleryChange.after(gallery.id, seen, gallery.seq, IDENTITIES_AT_ONCE):
        seen = rows[-1].seq
        came = {row.identity_id for row in rows if row.kind == "add" and row.identity_id is not None}
        yield list((await Identity.living_among(sorted(came))).values())


async def _keep(renewals: list[Renewal], session: AsyncClientSession) -> None:
    """Store the renewals of samples that are still there. A removal of one of these at the same time conflicts."""
    owners = sorted({renewal.identity_id for renewal in renewals})
    await Identity.touch_living(owners, session)
    there = await Identity.sample_ids_of(owners, session)
    await Renewal.keep([renewal for renewal in renewals if renewal.id in there], session)


async def _read_all(runtime: Runtime, gallery: Gallery, wanted: list[tuple[Identity, Sample]]) -> list[_Read]:
    return await all_of(*(_read(runtime, gallery, identity, sample) for identity, sample in wanted))


async def _read(runtime: Runtime, gallery: Gallery, identity: Identity, sample: Sample) -> _Read:
    """Read the sample's photo with the running model. The result says why a sample is lost."""
    try:
        photo = await runtime.stored_photo(gallery, identity, sample)
        near = None
        if sample.landmarks is not None:
            key = data_key(runtime.keys, gallery, identity)
            near = open_landmarks(key, sample.landmarks, gallery.id, identity.id, sample.id)
        embedding, landmarks = await runtime.compute_long("re-embed", _embedded, runtime.engine, photo, near)
    except (PhotoMissing, PhotoRefused, SealBroken) as problem:
        if await Identity.living(identity.id) is None:
            return _Read(identity, sample, None, None, "erased")
        return _Read(identity, sample, None, None, getattr(problem, "detail", None) or str(problem))
    return _Read(identity, sample, embedding, landmarks, None)


def _embedded(engine: FaceEngine, photo: bytes, near: Landmarks | None) -> tuple[Embedding, Landmarks]:
    """The embedding and the landmarks of the stored photo's face. Does not judge the photo again. Blocking."""
    stored = stored_face(engine, decode_stored(photo), near)
    return engine.embed(stored.pixels, stored.face)[0], stored.landmarks


def _best(own: list[Embedding], other: list[Embedding]) -> float:
    return float((np.array(own) @ np.array(other).T).max())


def _by_hand(gallery: Gallery) -> dict[str, float]:
    """The thresholds that were set by hand."""
    set_by_hand = {name: getattr(gallery.policy, name) for name in THRESHOLDS_BY_HAND}
    return {name: value for name, value in set_by_hand.items() if value is not None}
