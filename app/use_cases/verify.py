"""Verify: is this the person? One selfie against the references of one claimed identity; no index is touched."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, timedelta

from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, record
from app.documents.base import now
from app.documents.claims import Once
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Attempts, Identity, Liveness
from app.documents.sealed import data_key, open_references
from app.domain.callers import shown_score
from app.domain.comparison import best_similarity
from app.domain.policy import AttemptLimits, thresholds_for, wait_before_attempt
from app.domain.quality import QualityReport
from app.domain.thresholds import fmr_at
from app.engine.reading import read_face
from app.errors import Advice, AttemptsExhausted, NotFound, ReplayedPhoto, Validation
from app.runtime import Runtime

#: How long a relying party may rely on an assertion.
ASSERTION_SECONDS = 60
#: Retry-After where only an officer's reset helps.
A_DAY_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class Claim:
    """Whom the selfie is said to show, and for whom the answer is signed."""

    identity: Identity
    audience: str | None
    nonce: str | None


@dataclass(frozen=True, slots=True)
class Verification:
    """The answer. score is None when nothing was compared: the identity is not active."""

    match: bool
    identity_id: str
    score: float | None
    threshold: float
    fmr: float | None
    liveness: Liveness | None
    quality: QualityReport
    decision_id: str
    assertion: str | None


async def verify(runtime: Runtime, action: Action, gallery: Gallery, claim: Claim, photo: bytes) -> Verification:
    """Compare a selfie with the claimed identity. "No" is an answer, not an error.

    Raises the photo's Problems, AttemptsExhausted, ReplayedPhoto, ModelMismatch, Validation for a foreign audience.
    """
    runtime.require_contract(gallery)
    audience = _audience(action, claim.audience)
    identity = claim.identity
    if identity.status == "active":
        _require_attempts_left(runtime, identity)
    reading = await runtime.compute(read_face, runtime.engine, photo, gallery.policy, runtime.settings.max_photo_pixels)
    threshold = thresholds_for(gallery.policy, runtime.engine.card, gallery.samples).verify
    exact = None
    if identity.status == "active":
        references = open_references(data_key(runtime.keys, gallery, identity), identity)
        exact = best_similarity(reading.embedding, references)
    presented = runtime.keys.keyed_hash("presented", identity.id.encode() + hashlib.sha256(photo).digest()).hex()

    async def commit(session: AsyncClientSession) -> tuple[AuditEvent, float | None]:
        # As the identity stands now: it may have been revoked or erased while the photo was read, and of many
        # claims made at once no more may be compared than there are attempts left.
        standing = await Identity.living(identity.id, session)
        if standing is None:
            raise NotFound
        if not await Once.is_first(presented, timedelta(hours=runtime.settings.replay_window_hours), session):
            raise ReplayedPhoto("Please take a new photo.")
        score, matched = None, False
        if exact is not None and standing.status == "active":
            _require_attempts_left(runtime, standing)
            # Decided on the exact score, whatever the caller may see of it.
            matched = exact >= threshold
            score = shown_score(action.caller, exact)
            await _count_attempt(standing, session, matched=matched)
        event = await record(
            session, action, subject_kind="identity", subject_id=identity.id, gallery=gallery.name, score=score,
            detail={
                "match": matched, "score": None if score is None else round(score, 2), "threshold": threshold,
                "fmr": None if score is None else fmr_at(runtime.engine.card, score),
                "audience": audience, "nonce": claim.nonce,
                "quality": reading.quality.coarse().model_dump_json(),
                "liveness": None if reading.liveness is None else round(reading.liveness, 2), "live": reading.is_live,
            },
        )  # fmt: skip
        return event, score

    return answer_of(runtime, gallery, *await runtime.transaction(commit))


def answer_of(runtime: Runtime, gallery: Gallery, event: AuditEvent, score: float | None) -> Verification:
    """The answer that an event stands for: what the first request got, a repetition with its idempotency key gets again."""
    detail = event.detail
    matched, threshold, fmr = bool(detail["match"]), float(detail["threshold"] or 0), detail["fmr"]
    live = detail["liveness"]
    return Verification(
        match=matched,
        identity_id=event.subject.id or "",
        score=score,
        threshold=threshold,
        fmr=None if fmr is None else float(fmr),
        liveness=None if live is None else Liveness(score=float(live), passed=bool(detail["live"])),
        quality=QualityReport.model_validate_json(str(detail["quality"])),
        decision_id=event.id,
        assertion=_assertion(runtime, gallery, event) if matched else None,
    )


def _assertion(runtime: Runtime, gallery: Gallery, event: AuditEvent) -> str:
    """The signed answer for relying parties; the same event gives the same text."""
    issued_at = int(event.time.astimezone(UTC).timestamp())
    detail = event.detail
    return runtime.access.sign_assertion({
        "sub": event.subject.id, "aud": str(detail["audience"]), "iat": issued_at, "exp": issued_at + ASSERTION_SECONDS,
        "jti": event.id, "nonce": None if detail["nonce"] is None else str(detail["nonce"]), "amr": ["face"],
        "score": float(detail["score"] or 0), "fmr": float(detail["fmr"] or 0), "gallery": gallery.name,
        "contract": gallery.contract,
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
