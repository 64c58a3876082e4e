"""Identify: who is this? One face against everybody active in a gallery."""

from dataclasses import dataclass

from app.audit import Action, record
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.sealed import data_key, open_anchors, open_attributes
from app.domain.callers import shown_score
from app.domain.comparison import anchored, scores_with
from app.domain.faces import Embedding
from app.domain.policy import thresholds_for
from app.domain.subject import FoundFace
from app.domain.thresholds import fpir_at
from app.engine.reading import read_face
from app.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Match:
    """Somebody active at or above the threshold. fpir: how often a stranger would score so high in this gallery."""

    identity_id: str
    external_ref: str | None
    score: float
    rank: int
    fpir: float


@dataclass(frozen=True, slots=True)
class Identification:
    """Everybody who may be it, best first."""

    candidates: list[Match]
    threshold: float
    gallery_size: int
    as_of_seq: int
    found: FoundFace
    decision_id: str


async def identify(runtime: Runtime, action: Action, gallery: Gallery, photo: bytes, limit: int) -> Identification:
    """Search the whole gallery; look-alikes that are not active cannot crowd out one that is.

    Candidates come by range at the threshold, their statuses are read after the scan, then the limit applies.
    """
    runtime.require_contract(gallery)
    reading = await runtime.compute_long(
        action.actor_id, read_face, runtime.engine, photo, gallery.policy, runtime.settings.max_photo_pixels
    )
    # The head as it is now: enrolments answered while the photo was read are seen as well.
    head = await Gallery.get(gallery.id) or gallery
    runtime.require_contract(head)
    card = runtime.engine.card
    limits = thresholds_for(head.policy, card, head.samples)
    threshold = limits.identify
    hits = await runtime.search.range(head, reading.embedding, threshold)
    people = await Identity.living_among(sorted({hit.identity_id for hit in hits.items}))
    best: dict[str, float] = {}
    for hit in hits.items:
        identity = people.get(hit.identity_id)
        if identity is None or identity.status != "active":
            continue
        if any(sample.id == hit.sample_id for sample in identity.active_samples):
            best[identity.id] = max(hit.score, best.get(identity.id, -1.0))
    named = [people[identity_id] for identity_id in best]
    anchors = await runtime.compute(_anchors, runtime, head, named, reading.embedding)
    best = {
        identity_id: score
        for identity_id, score in best.items()
        if anchored(score, anchors[identity_id], limits.anchor) >= threshold
    }
    ordered = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:limit]
    candidates = []
    for rank, (identity_id, score) in enumerate(ordered, start=1):
        shown = shown_score(action.caller, score)
        reference = _external_ref(runtime, head, people[identity_id])
        candidates.append(Match(identity_id, reference, shown, rank, fpir_at(card, shown, max(head.samples, 1))))
    event = await record(
        None, action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name,
        detail={
            "candidates": len(candidates), "best_identity_id": candidates[0].identity_id if candidates else None,
            "best_score": round(candidates[0].score, 2) if candidates else None, "threshold": round(threshold, 4),
            "as_of_seq": hits.as_of_seq, "faces": reading.main.faces_found,
        },
    )  # fmt: skip
    return Identification(candidates, threshold, head.identities, hits.as_of_seq, reading.main.report, event.id)


def _anchors(runtime: Runtime, gallery: Gallery, people: list[Identity], probe: Embedding) -> dict[str, list[float]]:
    """By identity: the scores of the probe with the samples that the person was enrolled by. Blocking."""
    found = {}
    for identity in people:
        references = open_anchors(data_key(runtime.keys, gallery, identity), identity)
        found[identity.id] = scores_with(probe, references)
    return found


def _external_ref(runtime: Runtime, gallery: Gallery, identity: Identity) -> str | None:
    if identity.attributes is None:
        return None
    key = data_key(runtime.keys, gallery, identity)
    return open_attributes(key, identity.attributes, gallery.id, identity.id).external_ref
