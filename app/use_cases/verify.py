"""Verify: is this the person? One selfie against the references of one claimed identity; no index is touched."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, timedelta
from typing import Literal, NoReturn, get_args

import numpy as np
from prometheus_client import Counter
from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, Typed, UnderSalt, record
from app.documents.base import now
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Attempts, Identity, Liveness
from app.documents.probes import Place, Probe
from app.documents.sealed import data_key, open_likenesses
from app.domain.callers import shown_score
from app.domain.comparison import anchored, scores_with
from app.domain.near_copies import Likeness, is_near_copy, likeness, picture_digest
from app.domain.photo import PhotoReader
from app.domain.policy import GalleryPolicy, thresholds_for
from app.domain.quality import QualityReport
from app.domain.subject import FoundFace
from app.domain.thresholds import fmr_at
from app.engine.port import FaceEngine
from app.engine.reading import FaceReading, read_face
from app.errors import Advice, AttemptsExhausted, NotFound, Problem, ReplayedPhoto, Validation
from app.keys import DataKey
from app.probing import Marks
from app.runtime import Runtime

#: near-copy: of an earlier selfie for the identity; probe-equals-reference: of a photo that it was enrolled by; other-faces: the
#: photo shows more faces than the one that was compared.
Flag = Literal["near-copy", "probe-equals-reference", "other-faces"]
FLAGS: tuple[Flag, ...] = get_args(Flag)

FLAGGED = Counter("idem_verifications_flagged_total", "Verifications with an unusual photo, by flag", ["flag"])

#: How long a relying party may rely on an assertion.
ASSERTION_SECONDS = 60
#: Photos are refused with a status below this one; from here on the service itself is at fault.
_SERVER_ERRORS = 500


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
class UnknownClaim:
    """A claim on a name that belongs to nobody whom the caller may see.

    gallery: where it was looked for; None where the caller may not see that either. name: what stands for the name.
    """

    gallery: Gallery | None
    name: str
    audience: str | None
    nonce: str | None


@dataclass(frozen=True, slots=True)
class _Presented:
    """A selfie for somebody, read and not answered yet.

    challenge: the id of the one that its nonce came in. marks: what it is recognised by when it comes again. part: of the space
    that its face lies in.
    """

    challenge: str | None
    marks: Marks
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
    challenge = await runtime.probing.challenge_of(
        action, gallery.id, identity.id, claim.nonce, is_required=gallery.policy.require_nonce
    )
    if identity.status == "active":
        await _require_attempts_left(runtime, action, gallery, identity, photo)
    reading, look, marks = await _read_claimed(runtime, action, gallery, photo)
    limits = thresholds_for(gallery.policy, runtime.engine.card, gallery.samples)
    threshold = limits.verify
    compared = _compare(runtime, gallery, identity, look, limits.anchor) if identity.status == "active" else None
    presented = _Presented(challenge, marks, runtime.probing.part_of(reading.embedding, gallery.contract))

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
            runtime.probing.require_attempts_left(standing)
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
        await runtime.probing.count_non_match(action)
    return answer


async def refuse_unknown(runtime: Runtime, action: Action, claim: UnknownClaim, photo: bytes) -> NoReturn:
    """Refuse a claim on nobody, and count it. Raises NotFound while the caller's budget of unknown names has room.

    Beyond it, the answer depends on the photo as for somebody who is there: RateLimited without a usable face; NotFound within
    the budget of the face. So nobody learns whom the gallery knows by asking on.
    """
    if await runtime.probing.count_unknown(action):
        raise NotFound
    gallery = claim.gallery
    if gallery is None:
        raise runtime.probing.too_many_names(action)
    runtime.require_contract(gallery)
    _audience(action, claim.audience)
    await runtime.probing.challenge_of(
        action, gallery.id, claim.name, claim.nonce, is_required=gallery.policy.require_nonce
    )
    await _admit_face(runtime, action, gallery, claim.name, photo)
    raise NotFound


async def _admit_face(runtime: Runtime, action: Action, gallery: Gallery, name: str, photo: bytes) -> None:
    """Count a claim that is not compared against the budget of its face. Raises RateLimited, also without a usable face."""
    reading, _, _ = await _read_claimed(runtime, action, gallery, photo)
    part = runtime.probing.part_of(reading.embedding, gallery.contract)
    await runtime.probing.admit_claim(action, part, name, None)


async def _require_attempts_left(
    runtime: Runtime, action: Action, gallery: Gallery, identity: Identity, photo: bytes
) -> None:
    """Raises AttemptsExhausted; beyond the budget of unknown names only where a claim on nobody would be NotFound.

    Otherwise a caller could go on to ask for names, and find those of locked people.
    """
    try:
        runtime.probing.require_attempts_left(identity)
    except AttemptsExhausted:
        if not await runtime.probing.has_names_left(action):
            await _admit_face(runtime, action, gallery, identity.id, photo)
        raise


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


async def _read_claimed(
    runtime: Runtime, action: Action, gallery: Gallery, photo: bytes
) -> tuple[FaceReading, Likeness, Marks]:
    """What the photo shows, and what would tell a copy of it.

    Raises the photo's Problems; RateLimited in their place for a caller who has asked about too many unknown names. Such a photo
    would tell whether the name is known, and cost no attempt.
    """
    try:
        return await runtime.compute_long(action.actor_id, _read, runtime.engine, photo, gallery.policy, runtime.reader)
    except Problem as problem:
        if problem.status < _SERVER_ERRORS:
            await runtime.probing.require_names_left(action)
        raise


def _read(
    engine: FaceEngine, photo: bytes, policy: GalleryPolicy, reader: PhotoReader
) -> tuple[FaceReading, Likeness, Marks]:
    """As `_read_claimed`. Blocking."""
    reading = read_face(engine, photo, policy, reader)
    marks = Marks(picture_digest(reading.pixels), hashlib.sha256(photo).digest())
    return reading, likeness(reading.pixels, reading.face.landmarks, reading.embedding), marks


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
    await runtime.probing.require_new(identity.id, presented.marks, session)
    await runtime.probing.use(action, identity.gallery_id, identity.id, presented.challenge, session)
    await runtime.probing.admit_claim(action, presented.part, identity.id, session)


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


async def _count_attempt(identity: Identity, session: AsyncClientSession, *, matched: bool) -> None:
    """Consecutive non-matches count; a match forgets them. Nothing is written where nothing changes."""
    if matched and identity.attempts.consecutive == 0:
        return
    collection = Identity.get_pymongo_collection()
    change: dict[str, object] = {"$set": {"attempts": Attempts().model_dump()}}
    if not matched:
        change = {"$inc": {"attempts.consecutive": 1}, "$set": {"attempts.last_failure": now()}}
    await collection.update_one({"_id": identity.id, "status": "active"}, change, session=session)
