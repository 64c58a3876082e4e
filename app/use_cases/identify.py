"""Identify: who is this? One face against everybody active in a gallery.

For relying applications the locks of verification hold here too (docs/adr/0050). Nobody is refused for whom the photo shows: an
identity that the caller may not be compared with is left out, as if it were not there.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, Typed, record
from app.documents.events import AuditEvent, Detail, Scalar
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.probes import Place, Probe
from app.documents.sealed import data_key, open_anchors, open_likenesses, shown_attributes
from app.domain.callers import found_score
from app.domain.changes import Changes
from app.domain.comparison import anchored, scores_with
from app.domain.faces import Embedding
from app.domain.near_copies import Likeness, is_near_copy, likeness, picture_digest
from app.domain.photo import PhotoReader
from app.domain.policy import Band, GalleryPolicy, Thresholds, band_of, ranked, thresholds_for
from app.domain.subject import FoundFace
from app.domain.thresholds import fpir_at
from app.engine.port import FaceEngine
from app.engine.reading import FaceReading, read_face
from app.errors import ReplayedPhoto
from app.probing import Marks, binds
from app.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Match:
    """Somebody active at or above the threshold. fpir: how often a stranger would score so high in this gallery.

    score, fpir: None for relying applications.
    """

    identity_id: str
    external_ref: str | None
    band: Band
    score: float | None
    rank: int
    fpir: float | None


@dataclass(frozen=True, slots=True)
class Identification:
    """Everybody who may be it, best first."""

    candidates: list[Match]
    threshold: float
    gallery_size: int
    as_of_seq: int
    found: FoundFace
    decision_id: str


@dataclass(frozen=True, slots=True)
class _Found:
    """Everybody active at or above the threshold. scores: by identity."""

    people: dict[str, Identity]
    scores: dict[str, float]
    as_of_seq: int


@dataclass(frozen=True, slots=True)
class _Probe:
    """The photo, read. look, marks: what would tell a copy; None where copies are not looked for."""

    reading: FaceReading
    look: Likeness | None
    marks: Marks | None


async def identify(
    runtime: Runtime, action: Action, gallery: Gallery, photo: bytes, limit: int, nonce: str | None = None
) -> Identification:
    """Search the whole gallery; look-alikes that are not active cannot crowd out one that is.

    Candidates come by range at the threshold, their statuses are read after the scan, then the limit applies. Raises the photo's
    Problems, ModelMismatch; NonceInvalid, ReplayedPhoto and RateLimited for relying applications.
    """
    runtime.require_contract(gallery)
    is_bound = binds(action)
    challenge = await runtime.probing.challenge_of(
        action, gallery.id, None, nonce, is_required=is_bound and gallery.policy.require_nonce
    )
    probe = await runtime.compute_long(
        action.actor_id, _read, runtime.engine, photo, gallery.policy, runtime.reader,
        refuses_copies=is_bound and gallery.policy.near_copies == "refuse",
    )  # fmt: skip
    # The head as it is now: enrolments answered while the photo was read are seen as well.
    head = await Gallery.get(gallery.id) or gallery
    runtime.require_contract(head)
    card = runtime.engine.card
    limits = thresholds_for(head.policy, card, head.samples)
    found = await _search(runtime, head, probe.reading.embedding, limits)
    named, withheld = await _nameable(runtime, action, head, found, probe.reading.embedding, limits, limit)
    candidates = []
    for rank, identity_id in enumerate(named, start=1):
        exact = found.scores[identity_id]
        reference = shown_attributes(runtime.keys, head, found.people[identity_id]).external_ref
        score = found_score(action.caller, exact)
        fpir = None if score is None else fpir_at(card, score, max(head.samples, 1))
        candidates.append(Match(identity_id, reference, band_of(exact, limits), score, rank, fpir))
    told: Changes = {
        one.identity_id: {"rank": one.rank, "band": one.band, "score": round(found.scores[one.identity_id], 2)}
        for one in candidates
    }
    # Withheld or not: by it an erasure finds the searches whose nonce may be about the person.
    best = max(found.scores, key=lambda identity_id: found.scores[identity_id], default=None)
    faces = probe.reading.main.faces_found
    detail: Detail = {
        "candidates": len(candidates), "found": told, "withheld": withheld, "best_identity_id": best,
        "best_score": None if best is None else round(found.scores[best], 2), "threshold": round(limits.identify, 4),
        "as_of_seq": found.as_of_seq, "faces": faces, "nonce": Typed.of(nonce), "challenged": challenge is not None,
        "flags": "other-faces" if faces > 1 else "",
    }  # fmt: skip

    async def commit(session: AsyncClientSession | None) -> AuditEvent:
        if session is not None:
            await runtime.probing.use(action, head.id, None, challenge, session)
            await _require_new(runtime, head, probe, [found.people[one] for one in named], session)
        return await record(
            session, action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name, detail=detail
        )

    uses_up = challenge is not None or probe.marks is not None
    event = await (runtime.transaction(commit) if uses_up else commit(None))
    report = probe.reading.main.report
    return Identification(candidates, limits.identify, head.identities, found.as_of_seq, report, event.id)


async def _search(runtime: Runtime, gallery: Gallery, embedding: Embedding, limits: Thresholds) -> _Found:
    """Everybody active at or above the threshold."""
    hits = await runtime.search.range(gallery, embedding, limits.identify)
    people = await Identity.living_among(sorted({hit.identity_id for hit in hits.items}))
    scores: dict[str, float] = {}
    for hit in hits.items:
        identity = people.get(hit.identity_id)
        if identity is None or identity.status != "active":
            continue
        if any(sample.id == hit.sample_id for sample in identity.active_samples):
            scores[identity.id] = max(hit.score, scores.get(identity.id, -1.0))
    named = [people[identity_id] for identity_id in scores]
    anchors = await runtime.compute(_anchors, runtime, gallery, named, embedding)
    scores = {
        identity_id: score
        for identity_id, score in scores.items()
        if anchored(score, anchors[identity_id], limits.anchor) >= limits.identify
    }
    return _Found(people, scores, hits.as_of_seq)


async def _nameable(
    runtime: Runtime,
    action: Action,
    gallery: Gallery,
    found: _Found,
    embedding: Embedding,
    limits: Thresholds,
    limit: int,
) -> tuple[list[str], dict[str, Scalar]]:
    """The ids of those whom the caller may see, best first, at most `limit`; and why others are withheld, by id.

    A refusal in place of the answer would tell that the photo shows somebody who is withheld.
    """
    if not binds(action):
        return ranked(found.scores, limits, shows_scores=True)[:limit], {}
    withheld: dict[str, Scalar] = {
        id_: "attempts" for id_ in found.scores if runtime.probing.wait_for(found.people[id_]) != timedelta(0)
    }
    free = {id_: score for id_, score in found.scores.items() if id_ not in withheld}
    ordered = ranked(free, limits, shows_scores=False)[:limit]
    shown = await runtime.probing.admit_finds(action, runtime.probing.part_of(embedding, gallery.contract), ordered)
    withheld |= {id_: "finds" for id_ in ordered if id_ not in shown}
    return [id_ for id_ in ordered if id_ in shown], withheld


def _read(
    engine: FaceEngine, photo: bytes, policy: GalleryPolicy, reader: PhotoReader, *, refuses_copies: bool
) -> _Probe:
    """Blocking."""
    reading = read_face(engine, photo, policy, reader)
    if not refuses_copies:
        return _Probe(reading, None, None)
    marks = Marks(picture_digest(reading.pixels), hashlib.sha256(photo).digest())
    return _Probe(reading, likeness(reading.pixels, reading.face.landmarks, reading.embedding), marks)


async def _require_new(
    runtime: Runtime, gallery: Gallery, probe: _Probe, found: Sequence[Identity], session: AsyncClientSession
) -> None:
    """Raises ReplayedPhoto for a photo that was seen in a search of the gallery, or a copy of one known of somebody found.

    Where copies are refused. What is new is remembered, for verifications too.
    """
    if probe.look is None or probe.marks is None:
        return
    await runtime.probing.require_new(gallery.id, probe.marks, session)
    keep = timedelta(hours=runtime.settings.replay_window_hours)
    for identity in found:
        key, place = data_key(runtime.keys, gallery, identity), Place(gallery.id, identity.id, gallery.contract)
        earlier = await Probe.recent(identity.id, session)
        known = [*open_likenesses(key, identity), *(one.opened(key, place) for one in earlier)]
        if any(is_near_copy(probe.look, one) for one in known):
            raise ReplayedPhoto("The photo is a copy of an earlier one. Please take a new photo.")
        await Probe.remember(key, place, probe.look, earlier, keep, session, matched=True)


def _anchors(runtime: Runtime, gallery: Gallery, people: list[Identity], probe: Embedding) -> dict[str, list[float]]:
    """By identity: the scores of the probe with the samples that the person was enrolled by. Blocking."""
    found = {}
    for identity in people:
        references = open_anchors(data_key(runtime.keys, gallery, identity), identity)
        found[identity.id] = scores_with(probe, references)
    return found
