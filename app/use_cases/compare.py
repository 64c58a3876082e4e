"""Compare: do two photos show one person?"""

from dataclasses import dataclass, replace

import numpy as np

from app.audit import Action, record
from app.concurrency import all_of
from app.documents.galleries import Gallery
from app.domain.callers import shown_score
from app.domain.comparison import best_similarity
from app.domain.policy import thresholds_for
from app.domain.subject import FoundFace
from app.domain.thresholds import fmr_at
from app.engine.reading import FaceReading, read_face
from app.errors import Problem
from app.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Comparison:
    """How alike the two are, and what it means at the gallery's threshold. fmr: how often strangers are so alike."""

    match: bool
    score: float
    threshold: float
    fmr: float
    photo_a: FoundFace
    photo_b: FoundFace


async def compare(runtime: Runtime, action: Action, gallery: Gallery, photo_a: bytes, photo_b: bytes) -> Comparison:
    """Compare two photos by the gallery's rules; nothing is kept of them."""
    runtime.require_contract(gallery)
    one, other = await all_of(
        _read(runtime, action, gallery, "photo_a", photo_a), _read(runtime, action, gallery, "photo_b", photo_b)
    )
    exact = best_similarity(one.embedding, other.embedding[np.newaxis, :])
    card = runtime.engine.card
    threshold = thresholds_for(gallery.policy, card, gallery.samples).verify
    score = shown_score(action.caller, exact)
    answer = Comparison(exact >= threshold, score, threshold, fmr_at(card, score), one.main.report, other.main.report)
    await record(
        None, action, subject_kind="gallery", subject_id=gallery.id, gallery=gallery.name,
        detail={"match": answer.match, "score": round(score, 2), "threshold": round(threshold, 4)},
    )  # fmt: skip
    return answer


async def _read(runtime: Runtime, action: Action, gallery: Gallery, field: str, photo: bytes) -> FaceReading:
    """Read one of the two; a refusal's advice names which."""
    try:
        return await runtime.compute_long(
            action.actor_id, read_face, runtime.engine, photo, gallery.policy, runtime.reader
        )
    except Problem as problem:
        problem.errors = tuple(replace(advice, field=field) for advice in problem.errors)
        raise
