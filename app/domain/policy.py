"""A gallery's rules: what it asks for in error rates, and what follows from scores and statuses."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.domain import thresholds
from app.domain.faces import ModelCard
from app.domain.subject import Faces

Status = Literal["pending", "active", "suspected_duplicate", "duplicate", "revoked", "failed", "erased"]
Decision = Literal["distinct", "duplicate"]
Verdict = Literal["unique", "suspected_duplicate"]
#: How far above the threshold of a search somebody was found.
Band = Literal["strong", "near"]

#: A later photo must match the enrolment at a tenth of the gallery's false match rate. A photo that matches any sample must also
#: reach the anchor score with each photo of the enrolment. Strangers reach it ten times as often as a match. docs/adr/0038.
JOIN_FACTOR = 0.1
ANCHOR_FACTOR = 10.0
#: Strangers reach a strong candidate's score a hundred times as rarely as the threshold of the search. docs/adr/0050.
STRONG_FACTOR = 0.01
#: A decision on a pair covers scores up to the distance in which strangers become a hundred times as rare. docs/adr/0038.
MARGIN_RATES = (1e-4, 1e-6)
#: The highest rate of strangers to compute with: a threshold set by hand may let in nearly all of them.
LARGEST_RATE = 0.5

#: Thresholds of a young gallery are those of one of this many samples, and they move only when a gallery doubles:
#: two screenings a moment apart should not differ by what was enrolled in between.
SMALLEST_GALLERY = 128

Rate = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Threshold = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class GalleryPolicy(BaseModel):
    """What a gallery asks for. A threshold set by hand wins over the rate that it stands for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verify_fmr: Rate = 1e-4
    identify_fpir: Rate = 1e-3
    dedup_fpir: Rate = 1e-3
    verify_threshold: Threshold | None = None
    identify_threshold: Threshold | None = None
    dedup_threshold: Threshold | None = None
    liveness: Literal["required", "observe", "off"] = "off"
    quality: Literal["strict", "standard", "off"] = "standard"
    faces: Faces = "prominent"
    second_face_prominence: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.33
    recall_target: Annotated[float, Field(gt=0, le=1)] = 0.9995
    require_nonce: bool = False
    near_copies: Literal["flag", "refuse"] = "flag"
    second_review: bool = False
    retention_days: Annotated[int, Field(ge=1, le=36500)] | None = None


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Cosine similarities from which on two faces count as the same, for each purpose.

    join: between a later photo and the enrolment. anchor: at most `verify`; a match reaches it with each enrolment photo.
    strong: at least `identify`; from there on a candidate of a search is `strong`.
    """

    verify: float
    identify: float
    strong: float
    dedup: float
    join: float
    anchor: float
    source: Literal["calibrated", "model_card", "manual"]


def effective_size(samples: int) -> int:
    """The gallery size that thresholds are made for: the next power of two, at least SMALLEST_GALLERY."""
    return int(2 ** math.ceil(math.log2(max(samples, SMALLEST_GALLERY))))


def thresholds_for(policy: GalleryPolicy, card: ModelCard, samples: int) -> Thresholds:
    """The thresholds in force in a gallery of so many samples; growing stricter as it grows, for 1:N."""
    size = effective_size(samples)

    def for_fpir(by_hand: float | None, fpir: float) -> float:
        if by_hand is not None:
            return by_hand
        return thresholds.threshold_at_fmr(card, thresholds.fmr_for_fpir(fpir, size))

    verify = policy.verify_threshold
    if verify is None:
        verify = thresholds.threshold_at_fmr(card, policy.verify_fmr)
    rate = policy.verify_fmr if policy.verify_threshold is None else thresholds.fmr_at(card, verify)
    identify = for_fpir(policy.identify_threshold, policy.identify_fpir)
    by_hand = (policy.verify_threshold, policy.identify_threshold, policy.dedup_threshold)
    return Thresholds(
        verify=verify,
        identify=identify,
        strong=max(
            identify,
            thresholds.threshold_at_fmr(card, min(thresholds.fmr_at(card, identify), LARGEST_RATE) * STRONG_FACTOR),
        ),
        dedup=for_fpir(policy.dedup_threshold, policy.dedup_fpir),
        join=max(verify, thresholds.threshold_at_fmr(card, min(rate, LARGEST_RATE) * JOIN_FACTOR)),
        anchor=min(verify, thresholds.threshold_at_fmr(card, min(rate * ANCHOR_FACTOR, LARGEST_RATE))),
        source="model_card" if None in by_hand else "manual",
    )


def band_of(score: float, limits: Thresholds) -> Band:
    """How clearly a candidate of a search is above the threshold."""
    return "strong" if score >= limits.strong else "near"


def ranked(scores: Mapping[str, float], limits: Thresholds, *, shows_scores: bool) -> list[str]:
    """The candidates of a search, best first.

    Without scores the order must not tell them either: near candidates, whose scores somebody might climb, follow the strong
    ones in the order of their ids. Strong ones stay in the order of their scores, so that the first one is the best.
    """

    def place(identity_id: str) -> tuple[bool, float, str]:
        is_near = band_of(scores[identity_id], limits) == "near"
        shown = 0.0 if is_near and not shows_scores else -scores[identity_id]
        return (is_near, shown, identity_id)

    return sorted(scores, key=place)


@dataclass(frozen=True, slots=True)
class LookAlike:
    """The other side of a recorded pair: its status now, and the decision that covers the pair's score."""

    identity_id: str
    status: Status
    decision: Decision | None


def margin_of(card: ModelCard) -> float:
    """How far the score of a pair may rise above the score of its decision and still be covered, in cosine."""
    usual, rare = MARGIN_RATES
    return thresholds.threshold_at_fmr(card, rare) - thresholds.threshold_at_fmr(card, usual)


def may_activate(own_candidates: Iterable[LookAlike], pairs: Iterable[LookAlike]) -> bool:
    """The one rule that makes anybody active, whether by verdict, decision or reinstatement.

    own_candidates: of its own case; pairs: every recorded pair with this identity on either side. Refused while a candidate
    is undecided (unless it is erased or a duplicate already), or while the other side of a pair that nobody called
    distinct is active.
    """
    waits = any(c.decision is None and c.status not in ("erased", "duplicate") for c in own_candidates)
    meets = any(p.decision != "distinct" and p.status == "active" for p in pairs)
    return not waits and not meets


@dataclass(frozen=True, slots=True)
class AttemptLimits:
    """After `before_wait` consecutive non-matches each further try waits; at `before_reset` an officer must help."""

    before_wait: int
    wait: timedelta
    before_reset: int


def wait_before_attempt(
    consecutive: int, last_failure: datetime | None, moment: datetime, limits: AttemptLimits
) -> timedelta | None:
    """How long the next claim on an identity must wait: zero for none, None for until an officer resets it."""
    if consecutive >= limits.before_reset:
        return None
    if consecutive < limits.before_wait or last_failure is None:
        return timedelta(0)
    # Never longer than the wait itself: a clock that was ahead may have dated the failure.
    return max(timedelta(0), min(limits.wait, last_failure + limits.wait - moment))
