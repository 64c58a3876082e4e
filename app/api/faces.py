"""Face operations: verify, identify, compare, detect, measure; and nonces to bind selfies to."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from app.api.bodies import StrictRoute
from app.api.dependencies import CurrentRuntime, IdempotencyKey, acting, first_answer, grant_of, visible_gallery
from app.api.identities import PHOTO_PROBLEMS, visible_identity
from app.api.problems import problems
from app.api.shapes import Body, Moment
from app.api.uploads import NoFields, Upload, body_of, uploaded
from app.audit import Action
from app.documents.galleries import DEFAULT_GALLERY, Gallery
from app.documents.identities import Identity, Liveness
from app.documents.sealed import holders_of
from app.domain.attributes import AskedRef
from app.domain.callers import Role
from app.domain.faces import Box
from app.domain.policy import Band
from app.domain.quality import QualityReport
from app.domain.subject import FoundFace
from app.domain.text import Nonce
from app.errors import (
    Advice,
    AlreadyCreated,
    AttemptsExhausted,
    Forbidden,
    IdempotencyInProgress,
    NonceInvalid,
    NotFound,
    NotImplementedYet,
    RateLimited,
    ReplayedPhoto,
    Unauthenticated,
    Validation,
)
from app.runtime import Runtime
from app.use_cases import challenge, compare, detect, identify, verify

router = APIRouter(prefix="/v1", tags=["faces"], responses=problems(Unauthenticated, Forbidden, Validation))
#: Without photos.
json_router = APIRouter(route_class=StrictRoute)

CALLERS = (Role.RELYING_APP, Role.OFFICER)
#: Whoever enrols may look at a photo beforehand, to advise the person.
ADVISERS = (*CALLERS, Role.ENROLLER)


class VerificationFields(Body):
    """Whom the selfie is said to show: by id, or by reference in a gallery."""

    identity_id: Annotated[str, Field(max_length=64)] | None = None
    external_ref: AskedRef | None = None
    gallery: str = DEFAULT_GALLERY
    nonce: Nonce | None = None
    audience: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class InGallery(Body):
    """Whose rules hold."""

    gallery: str = DEFAULT_GALLERY


class IdentificationFields(InGallery):
    """Where to look, and how many to name. nonce: where the gallery asks for one, of a challenge that names no identity."""

    limit: Annotated[int, Field(ge=1, le=50)] = 10
    nonce: Nonce | None = None


class VerificationView(BaseModel):
    """The answer to 1:1; `assertion` is signed for the audience, null when there is no match.

    flags: `near-copy` of an earlier selfie for the identity, `probe-equals-reference` where the selfie is an enrolment photo,
    `other-faces` where it shows more faces than the one that was compared. box: of that face, x, y, width, height in pixels
    of the upright photo. faces_found and box are null when a repeated request gets the answer of an older version.
    """

    match: bool
    identity_id: str
    score: float | None
    threshold: float
    fmr: float | None
    liveness: Liveness | None
    quality: QualityReport
    flags: list[verify.Flag]
    faces_found: int | None
    box: Box | None
    decision_id: str
    assertion: str | None


class ChallengeBody(InGallery):
    """Where the nonce will be used, and for whom if that is known."""

    identity_id: Annotated[str, Field(max_length=64)] | None = None


class ChallengeView(BaseModel):
    """A nonce for one verification or identification by the same caller."""

    nonce: str
    expires_at: Moment


class MatchView(BaseModel):
    """Somebody active at or above the threshold. score and fpir are for officers; null for relying applications.

    band: `strong` where strangers reach the score a hundred times as rarely as the threshold, else `near`. rank: strong
    candidates come first, the best one at rank 1. For relying applications the order of near candidates has no meaning.
    """

    identity_id: str
    external_ref: str | None
    band: Band
    score: float | None
    rank: int
    fpir: float | None


class IdentificationView(BaseModel):
    """The answer to 1:N."""

    candidates: list[MatchView]
    threshold: float
    gallery_size: int
    as_of_seq: int
    faces_found: int
    box: Box
    decision_id: str


class ComparisonView(BaseModel):
    """How alike two photos are, and which face of each was compared."""

    match: bool
    score: float
    threshold: float
    fmr: float
    photo_a: FoundFace
    photo_b: FoundFace


class FaceView(BaseModel):
    """One face; box is x, y, width, height, landmarks five x, y, in pixels of the upright photo."""

    box: list[float]
    landmarks: list[list[float]]
    detection_score: float
    quality: QualityReport
    liveness: Liveness | None


class DetectionView(BaseModel):
    """All faces of a photo, largest first."""

    faces: list[FaceView]
    width: int
    height: int


class AdviceView(BaseModel):
    """One thing to do better."""

    code: str
    message: str


class MeasuredView(BaseModel):
    """One face's quality, whether the gallery would take it, and what to do better."""

    quality: QualityReport
    accepted: bool
    advice: list[AdviceView]
    liveness: Liveness | None
    faces_found: int
    box: Box


def _verification(answer: verify.Verification) -> VerificationView:
    return VerificationView(
        match=answer.match, identity_id=answer.identity_id, score=answer.score, threshold=answer.threshold, fmr=answer.fmr,
        liveness=answer.liveness, quality=answer.quality, flags=list(answer.flags),
        faces_found=None if answer.found is None else answer.found.faces_found,
        box=None if answer.found is None else answer.found.box, decision_id=answer.decision_id, assertion=answer.assertion,
    )  # fmt: skip


async def _claimed(
    runtime: Runtime, action: Action, fields: VerificationFields
) -> tuple[Gallery, Identity] | verify.UnknownClaim:
    """The claimed identity, or the claim on nobody. Raises Validation unless it is named once, NotFound for the gallery."""
    if (fields.identity_id is None) == (fields.external_ref is None):
        message = "Name the identity by identity_id or by external_ref."
        raise Validation(message, errors=(Advice("identity_id", "one-of", message),))
    if fields.identity_id is not None:
        try:
            return await visible_identity(action, fields.identity_id)
        except NotFound:
            # Of somebody unknown nobody knows the gallery: the one that the request names stands for it.
            gallery = await Gallery.named(fields.gallery, grant_of(action))
            return verify.UnknownClaim(gallery, f"id|{fields.identity_id}", fields.audience, fields.nonce)
    gallery = await visible_gallery(runtime, action, fields.gallery)
    holders = await holders_of(runtime.keys, [gallery], fields.external_ref or "")
    if len(holders) != 1:  # several have it in other spellings: which of them is meant is open
        name = f"reference|{gallery.id}|{fields.external_ref}"
        return verify.UnknownClaim(gallery, name, fields.audience, fields.nonce)
    (identity,) = holders
    action.about("identity", identity.id)
    return gallery, identity


@router.post(
    "/verifications",
    openapi_extra=body_of(VerificationFields, "photo"),
    responses=problems(
        *PHOTO_PROBLEMS, Validation, NotFound, ReplayedPhoto, NonceInvalid, AttemptsExhausted, RateLimited
    ),
)
async def verify_identity(
    runtime: CurrentRuntime,
    request: Request,
    action: Annotated[Action, Depends(acting("face.verify", *CALLERS))],
    upload: Annotated[Upload[VerificationFields], Depends(uploaded(VerificationFields, "photo"))],
    key: IdempotencyKey = None,
) -> VerificationView:
    """Is this the person? A non-match is an answer, not an error."""
    fields = upload.fields
    claimed = await _claimed(runtime, action, fields)
    # Before anything tells whether the name is known.
    first = await first_answer(runtime, request, action, key, fields.model_dump(), digests=upload.digests)
    if isinstance(claimed, verify.UnknownClaim):
        await verify.refuse_unknown(runtime, action, claimed, upload.photos["photo"][0])
    gallery, identity = claimed
    if first is not None:
        return _verification(verify.answer_of(runtime, gallery, fields.nonce, first[0], first[1].score))
    claim = verify.Claim(identity, fields.audience, fields.nonce, is_by_reference=fields.external_ref is not None)
    return _verification(await verify.verify(runtime, action, gallery, claim, upload.photos["photo"][0]))


@router.post(
    "/identifications",
    openapi_extra=body_of(IdentificationFields, "photo"),
    responses=problems(*PHOTO_PROBLEMS, Validation, NotFound, ReplayedPhoto, NonceInvalid, RateLimited),
)
async def identify_face(
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("face.identify", *CALLERS))],
    upload: Annotated[Upload[IdentificationFields], Depends(uploaded(IdentificationFields, "photo"))],
) -> IdentificationView:
    """Who is this? Everybody active at or above the threshold, strong candidates first.

    Relying applications get no score. Where the gallery asks for it, their nonces and copies of photos are looked at. They do not
    find a person whose attempts are used up, or whom they have found too often within the hour.
    """
    fields = upload.fields
    gallery = await visible_gallery(runtime, action, fields.gallery)
    found = await identify.identify(runtime, action, gallery, upload.photos["photo"][0], fields.limit, fields.nonce)
    return IdentificationView(
        candidates=[
            MatchView(
                identity_id=c.identity_id,
                external_ref=c.external_ref,
                band=c.band,
                score=c.score,
                rank=c.rank,
                fpir=c.fpir,
            )
            for c in found.candidates
        ],
        threshold=found.threshold,
        gallery_size=found.gallery_size,
        as_of_seq=found.as_of_seq,
        faces_found=found.found.faces_found,
        box=found.found.box,
        decision_id=found.decision_id,
    )


@router.post(
    "/comparisons",
    openapi_extra=body_of(InGallery, "photo_a", "photo_b"),
    responses=problems(*PHOTO_PROBLEMS, Validation, NotFound),
)
async def compare_faces(
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("face.compare", *CALLERS))],
    upload: Annotated[Upload[InGallery], Depends(uploaded(InGallery, "photo_a", "photo_b"))],
) -> ComparisonView:
    """Do two photos show one person? Nothing is kept."""
    gallery = await visible_gallery(runtime, action, upload.fields.gallery)
    (photo_a,), (photo_b,) = upload.photos["photo_a"], upload.photos["photo_b"]
    answer = await compare.compare(runtime, action, gallery, photo_a, photo_b)
    return ComparisonView(
        match=answer.match,
        score=answer.score,
        threshold=answer.threshold,
        fmr=answer.fmr,
        photo_a=answer.photo_a,
        photo_b=answer.photo_b,
    )


@router.post("/faces/detect", openapi_extra=body_of(NoFields, "photo"), responses=problems(*PHOTO_PROBLEMS, Validation))
async def detect_faces(
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("face.detect", *ADVISERS))],
    upload: Annotated[Upload[NoFields], Depends(uploaded(NoFields, "photo"))],
) -> DetectionView:
    """All faces of a photo."""
    found = await detect.detect(runtime, action, upload.photos["photo"][0])
    faces = [
        FaceView(
            box=[round(float(v), 2) for v in f.face.box],
            landmarks=[[round(float(x), 2), round(float(y), 2)] for x, y in f.face.landmarks],
            detection_score=round(f.face.detection_score, 4),
            quality=f.quality,
            liveness=f.liveness,
        )
        for f in found.faces
    ]
    return DetectionView(faces=faces, width=found.width, height=found.height)


@router.post(
    "/faces/quality",
    openapi_extra=body_of(InGallery, "photo"),
    responses=problems(*PHOTO_PROBLEMS, Validation, NotFound),
)
async def measure_quality(
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("face.quality", *ADVISERS))],
    upload: Annotated[Upload[InGallery], Depends(uploaded(InGallery, "photo"))],
) -> MeasuredView:
    """One face's quality by the gallery's rules, with advice to the person in front of the camera."""
    gallery = await visible_gallery(runtime, action, upload.fields.gallery)
    found = await detect.assess(runtime, action, gallery, upload.photos["photo"][0])
    advice = [AdviceView(code=a.code, message=a.message) for a in found.advice]
    report = found.main.report
    return MeasuredView(
        quality=found.quality,
        accepted=not advice,
        advice=advice,
        liveness=found.liveness,
        faces_found=report.faces_found,
        box=report.box,
    )


@json_router.post(
    "/challenges", status_code=201, responses=problems(NotFound, RateLimited, IdempotencyInProgress, AlreadyCreated)
)
async def create_challenge(
    runtime: CurrentRuntime,
    request: Request,
    body: ChallengeBody,
    action: Annotated[Action, Depends(acting("face.challenge", *CALLERS))],
    key: IdempotencyKey = None,
) -> ChallengeView:
    """A nonce to bind a selfie to: it serves one verification or, where it names nobody, identification, by this caller, soon."""
    gallery = await visible_gallery(runtime, action, body.gallery)
    if body.identity_id is not None:
        action.about("identity", body.identity_id)
        await challenge.require_known(runtime, action, gallery, body.identity_id)
    await first_answer(runtime, request, action, key, body.model_dump(), holds_secret=True)
    made = await challenge.challenge(runtime, action, gallery, body.identity_id)
    return ChallengeView(nonce=made.nonce, expires_at=made.expires_at)


@router.post("/faces/detect:batch", status_code=501, responses=problems(NotImplementedYet))
async def detect_batch(action: Annotated[Action, Depends(acting("face.detect", *CALLERS))]) -> None:
    """Detection on many photos."""
    raise NotImplementedYet("Batches are not built yet.")


@router.post("/verifications:batch", status_code=501, responses=problems(NotImplementedYet))
async def verify_batch(action: Annotated[Action, Depends(acting("face.verify", *CALLERS))]) -> None:
    """Many verifications."""
    raise NotImplementedYet("Batches are not built yet.")


router.include_router(json_router)
