"""Verify: is this the person? One selfie against the references of one claimed identity; no index is touched."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, timedelta
from typing import Literal, get_args

import numpy as np
import structlog
from prometheus_client import Counter
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from app.audit import Action, Typed, UnderSalt, by_system, record
from app.documents.base import now
from app.documents.budgets import FaceBudget, NonMatches, this_hour
from app.documents.challenges import NONCE_PREFIX, Challenge, challenge_id
from app.documents.claims import Once
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Attempts, Identity, Liveness
from app.documents.probes import Place, Probe
from app.documents.sealed import data_key, open_likenesses
from app.domain.callers import shown_score
from app.domain.comparison import anchored, scores_with
from app.domain.near_copies import Likeness, bucket, is_near_copy, likeness
from app.domain.policy import AttemptLimits, GalleryPolicy, thresholds_for, wait_before_attempt
from app.domain.quality import QualityReport
from app.domain.subject import FoundFace
from app.domain.thresholds import fmr_at
from app.engine.port import FaceEngine
from app.engine.reading import FaceReading, read_face
from app.errors import (
    Advice,
    AttemptsExhausted,
    NonceInvalid,
    NotFound,
    Problem,
    RateLimited,
    ReplayedPhoto,
    Validation,
)
from app.keys import DataKey
from app.runtime import Runtime

log = structlog.get_logger(__name__)

#: near-copy: of an earlier selfie for the identity; probe-equals-reference: of a photo that it was enrolled by; other-faces: the
#: photo shows more faces than the one that was compared.
Flag = Literal["near-copy", "probe-equals-reference", "other-faces"]
FLAGS: tuple[Flag, ...] = get_args(Flag)

FLAGGED = Counter("idem_verifications_flagged_total", "Verifications with an unusual photo, by flag", ["flag"])
PROBING = Counter("idem_probing_total", "Signs of slow probing: faces over budget, callers over the alarm", ["sign"])

#: How long a relying party may rely on an assertion.
ASSERTION_SECONDS = 60
#: Retry-After where only an officer's reset helps.
A_DAY_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class Claim:
    """Whom the selfie is said to show, and for whom the answer is signed.

    nonce: of a challenge, or the caller's own. is_by_reference: whether the identity was named by its reference.
    """

    identity: Identity
    audience: str | None
    nonce: str | None
    is_by_reference: bool = False

    @property
    def hashed_reference(self) -> UnderSalt | None:
        """The claimed reference as the event records it: another person may have this reference later."""
        reference = self.identity.external_ref_hash if self.is_by_reference else None
        return None if reference is None else UnderSalt(reference.hex())


@dataclass(frozen=True, slots=True)
class Verification:
    """The answer. score is None when nothing was compared: the identity is not active.

    found: the face that was compared. None when an answer of an older version is repeated.
    """

    match: bool
    identity_id: str
    score: float | None
    threshold: float
    fmr: float | None
    liveness: Liveness | None
    quality: QualityReport
    flags: tuple[Flag, ...]
    found: FoundFace | None
    decision_id: str
    assertion: str | None


@dataclass(frozen=True, slots=True)
class _Presented:
    """A selfie for somebody, read and not answered yet.

    challenge: the id of the one that its nonce came in. digest: keyed, of its bytes for this identity. part: of the space that
    its face lies in.
    """

    challenge: str | None
    digest: str
    part: int


@dataclass(frozen=True, slots=True)
class _Compared:
    """What came of the selfie and the references. key: the identity's. is_reference: the selfie is one of their photos."""

    key: DataKey
    score: float
    is_reference: bool


async def verify(runtime: Runtime, action: Action, gallery: Gallery, claim: Claim, photo: bytes) -> Verification:
    """Compare a selfie with the claimed identity. "No" is an answer, not an error.

    Raises the photo's Problems, AttemptsExhausted, ReplayedPhoto, NonceInvalid, RateLimited, ModelMismatch, Validation for a
    foreign audience.
    """
    runtime.require_contract(gallery)
    audience = _audience(action, claim.audience)
    identity = claim.identity
    challenge = await _challenge(runtime, action, gallery, claim)
    if identity.status == "active":
        _require_attempts_left(runtime, identity)
    reading, look = await runtime.compute_long(
        action.actor_id, _read, runtime.engine, photo, gallery.policy, runtime.settings.max_photo_pixels
    )
    limits = thresholds_for(gallery.policy, runtime.engine.card, gallery.samples)
    threshold = limits.verify
    compared = _compare(runtime, gallery, identity, look, limits.anchor) if identity.status == "active" else None
    presented = _Presented(
        challenge,
        runtime.keys.keyed_hash("presented", identity.id.encode() + hashlib.sha256(photo).digest()).hex(),
        bucket(reading.embedding, runtime.keys.keyed_hash("face-parts", gallery.contract.encode())),
    )

    async def commit(session: AsyncClientSession) -> tuple[AuditEvent, float | None]:
        # As the identity stands now: it may have been revoked or erased while the photo was read, and of many
        # claims made at once no more may be compared than there are attempts left.
        standing = await Identity.living(identity.id, session)
        if standing is None:
            raise NotFound
        await _admit(runtime, action, standing, presented, session)
        score, matched = None, False
        flags: tuple[Flag, ...] = ()
        if compared is not None and standing.status == "active":
            _require_attempts_left(runtime, standing)
            # Decided on the exact score, whatever the caller may see of it.
            matched = compared.score >= threshold
            score = shown_score(action.caller, compared.score)
            flags = await _flags(runtime, gallery, standing, look, compared, session, matched=matched)
            await _count_attempt(standing, session, matched=matched)
        found = reading.main.report
        if found.faces_found > 1:
            flags = (*flags, "other-faces")
        # Both: the rate leads back to the score.
        coarse = None if score is None else round(score, 2)
        event = await record(
            session, action, subject_kind="identity", subject_id=identity.id, gallery=gallery.name, score=score,
            detail={
                "match": matched, "score": coarse, "threshold": threshold,
                "fmr": None if coarse is None else fmr_at(runtime.engine.card, coarse), "flags": ",".join(flags),
                "audience": audience, "nonce": Typed.of(claim.nonce), "challenged": challenge is not None,
                "external_ref": claim.hashed_reference,
                "quality": reading.quality.coarse().model_dump_json(),
                "liveness": None if reading.liveness is None else round(reading.liveness, 2),
                "live": None if reading.liveness is None else reading.is_live, "found": found.model_dump_json(),
            },
        )  # fmt: skip
        return event, score

    answer = answer_of(runtime, gallery, claim.nonce, *await runtime.in_line(identity.id, commit))
    for flag in answer.flags:
        FLAGGED.labels(flag).inc()
    if answer.score is not None and not answer.match:
        await _count_non_match(runtime, action)
    return answer


def answer_of(
    runtime: Runtime, gallery: Gallery, nonce: str | None, event: AuditEvent, score: float | None
) -> Verification:
    """The answer that an event stands for: what the first request got, a repetition with its idempotency key gets again.

    nonce: the request's own. The event has only its hash, and a repetition brings the same one.
    """
    detail = event.facts
    matched, threshold, fmr = bool(detail["match"]), float(detail["threshold"] or 0), detail["fmr"]
    live, found = detail["liveness"], detail.get("found")
    return Verification(
        match=matched,
        identity_id=event.subject.id or "",
        score=score,
        threshold=threshold,
        fmr=None if fmr is None else float(fmr),
        liveness=None if live is None else Liveness(score=float(live), passed=bool(detail["live"])),
        quality=QualityReport.model_validate_json(str(detail["quality"])),
        flags=tuple(flag for flag in FLAGS if flag in str(detail["flags"]).split(",")),
        found=None if found is None else FoundFace.model_validate_json(str(found)),
        decision_id=event.id,
        assertion=_assertion(runtime, gallery, nonce, event) if matched else None,
    )


def _read(engine: FaceEngine, photo: bytes, policy: GalleryPolicy, max_pixels: int) -> tuple[FaceReading, Likeness]:
    """What the photo shows, and what would tell a copy of it. Blocking."""
    reading = read_face(engine, photo, policy, max_pixels)
    return reading, likeness(reading.pixels, reading.face.landmarks, reading.embedding)


def _compare(runtime: Runtime, gallery: Gallery, identity: Identity, look: Likeness, floor: float) -> _Compared:
    key = data_key(runtime.keys, gallery, identity)
    references = open_likenesses(key, identity)
    scores = scores_with(look.embedding, np.array([one.embedding for one in references], np.float32))
    enrolled_by = {sample.id for sample in identity.anchors}
    anchors = [score for sample, score in zip(identity.active_samples, scores, strict=True) if sample.id in enrolled_by]
    score = anchored(max(scores, default=-1.0), anchors, floor)
    return _Compared(key, score, any(is_near_copy(look, one) for one in references))


async def _admit(
    runtime: Runtime, action: Action, identity: Identity, presented: _Presented, session: AsyncClientSession
) -> None:
    """Let the selfie pass as a new one, with its nonce, within the caller's budget for the face.

    Raises ReplayedPhoto, NonceInvalid, RateLimited; then nothing of it counts.
    """
    settings = runtime.settings
    if not await Once.is_first(presented.digest, timedelta(hours=settings.replay_window_hours), session):
        raise ReplayedPhoto("Please take a new photo.")
    if presented.challenge is not None and not await Challenge.use(
        presented.challenge, action.actor_id, identity.gallery_id, identity.id, session
    ):
        raise _bad_nonce()
    limit = settings.probe_identities_per_hour
    if not await FaceBudget.admits(runtime.keys, action.actor_id, presented.part, identity.id, limit, session):
        raise _probing(action)


async def _flags(
    runtime: Runtime,
    gallery: Gallery,
    identity: Identity,
    look: Likeness,
    compared: _Compared,
    session: AsyncClientSession,
    *,
    matched: bool,
) -> tuple[Flag, ...]:
    """What the selfie is a copy of; it is remembered for those that come later. Raises ReplayedPhoto where copies are refused."""
    place = Place(gallery.id, identity.id, gallery.contract)
    earlier = await Probe.recent(identity.id, session)
    flags: list[Flag] = []
    if any(is_near_copy(look, probe.opened(compared.key, place)) for probe in earlier):
        flags.append("near-copy")
    if compared.is_reference:
        flags.append("probe-equals-reference")
    if flags and gallery.policy.near_copies == "refuse":
        raise ReplayedPhoto("The photo is a copy of an earlier one. Please take a new photo.")
    keep = timedelta(hours=runtime.settings.replay_window_hours)
    await Probe.remember(compared.key, place, look, earlier, keep, session, matched=matched)
    return tuple(flags)


async def _challenge(runtime: Runtime, action: Action, gallery: Gallery, claim: Claim) -> str | None:
    """The challenge that the claim's nonce was given in; None for a nonce of the caller's own.

    Raises NonceInvalid where it does not hold, before any work on the photo; only the transaction uses it up.
    """
    nonce = claim.nonce or ""
    if not nonce.startswith(NONCE_PREFIX):
        if gallery.policy.require_nonce:
            raise _bad_nonce()
        return None
    id_ = challenge_id(runtime.keys, nonce)
    if not await Challenge.waits(id_, action.actor_id, gallery.id, claim.identity.id):
        raise _bad_nonce()
    return id_


def _bad_nonce() -> NonceInvalid:
    """The same whatever is wrong with it: a nonce of somebody else's is nobody's business."""
    message = "Ask for a new nonce (POST /v1/challenges) and send it with a selfie taken since."
    return NonceInvalid(message, errors=(Advice("nonce", "nonce-invalid", message),))


def _probing(action: Action) -> Problem:
    """Too many people were asked about with one face."""
    PROBING.labels("face").inc()
    log.warning("probing_refused", caller=action.actor_id)
    _, over = this_hour()
    return RateLimited(
        "You have asked about too many people with this face.",
        retry_after_seconds=int((over - now()).total_seconds()) + 1,
    )


async def _count_non_match(runtime: Runtime, action: Action) -> None:
    """Count it for the caller; the one that reaches the alarm becomes an event of its own. The answer stands in any case."""
    alarm = runtime.settings.non_matches_alarm_per_hour
    try:
        if await NonMatches.add(runtime.keys, action.actor_id) != alarm:
            return
        PROBING.labels("caller").inc()
        log.warning("non_matches_alarm", caller=action.actor_id, non_matches=alarm)
        kind = "system" if action.caller is None else action.caller.kind
        await record(
            None, by_system("face.alarm"), subject_kind=kind, subject_id=action.actor_id, detail={"non_matches": alarm}
        )
    except PyMongoError as failure:
        log.warning("non_match_not_counted", caller=action.actor_id, error=type(failure).__name__)


def _assertion(runtime: Runtime, gallery: Gallery, nonce: str | None, event: AuditEvent) -> str:
    """The signed answer for relying parties; the same event gives the same text."""
    issued_at = int(event.time.astimezone(UTC).timestamp())
    detail = event.facts
    return runtime.access.sign_assertion({
        "sub": event.subject.id, "aud": str(detail["audience"]), "iat": issued_at, "exp": issued_at + ASSERTION_SECONDS,
        "jti": event.id, "nonce": nonce, "amr": ["face"],
        "score": float(detail["score"] or 0), "fmr": float(detail["fmr"] or 0), "gallery": gallery.name,
        "contract": gallery.contract, "flags": [flag for flag in str(detail["flags"]).split(",") if flag],
        "challenged": bool(detail["challenged"]), "live": None if detail["live"] is None else bool(detail["live"]),
    })  # fmt: skip


def _audience(action: Action, asked: str | None) -> str:
    """For whom the assertion is: one of the client's audiences, by default itself."""
    caller = action.caller
    own = () if caller is None else (caller.id, *caller.audiences)
    if asked is not None and asked not in own:
        message = "The audience is none of yours."
        raise Validation(message, errors=(Advice("audience", "foreign-audience", message),))
    return asked or own[0]


def _require_attempts_left(runtime: Runtime, identity: Identity) -> None:
    settings, attempts = runtime.settings, identity.attempts
    limits = AttemptLimits(
        settings.attempts_before_wait, timedelta(seconds=settings.attempts_wait_seconds), settings.attempts_before_reset
    )
    wait = wait_before_attempt(attempts.consecutive, attempts.last_failure, now(), limits)
    if wait is None:
        raise AttemptsExhausted(
            "An officer must reset the attempts on this identity.", retry_after_seconds=A_DAY_SECONDS
        )
    if wait > timedelta(0):
        seconds = int(wait.total_seconds()) + 1
        raise AttemptsExhausted(f"Please wait {seconds} seconds.", retry_after_seconds=seconds)


async def _count_attempt(identity: Identity, session: AsyncClientSession, *, matched: bool) -> None:
    """Consecutive non-matches count; a match forgets them. Nothing is written where nothing changes."""
    if matched and identity.attempts.consecutive == 0:
        return
    collection = Identity.get_pymongo_collection()
    change: dict[str, object] = {"$set": {"attempts": Attempts().model_dump()}}
    if not matched:
        change = {"$inc": {"attempts.consecutive": 1}, "$set": {"attempts.last_failure": now()}}
    await collection.update_one({"_id": identity.id, "status": "active"}, change, session=session)
