"""Every problem a caller can meet, as RFC 9457 names them.

Problem
├── Unreadable 400, TooManyPieces 400, RequestTimeout 408, HeadersTooLarge 431
├── Unauthenticated 401, Forbidden 403, NotFound 404, MethodNotAllowed 405, PreconditionFailed 412
├── Conflict 409
│   ├── ExternalRefTaken, ModelMismatch, DifferentPerson, ReplayedPhoto, NonceInvalid, UndecidedCandidates
│   └── IdempotencyInProgress, AlreadyCreated
├── PhotoMissing 410, TooLarge 413, TooManyPixels 413, UnsupportedMediaType 415
├── Validation 422
│   ├── IdempotencyKeyReused
│   └── PhotoRefused: NoFace, MultipleFaces, FaceTooSmall, FaceCropped, LowQuality, NotLive,
│       UndecodableImage, AnimatedImage, DifferentPeople
├── RateLimited 429, AttemptsExhausted 429
└── Unexpected 500, NotImplementedYet 501, NotReady 503, GalleryTooLarge 503,
    DependencyUnavailable 503, AuditRefused 503, ModelUnavailable 503

The slug in `type` is made from the class name (`LowQuality` -> `low-quality`), so a name is a promise to
clients. Any layer may raise these; only `app.api.problems` knows how they look over HTTP.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

#: How Pydantic writes a member of an enumeration; its value is what callers send.
_ENUM_MEMBER: Final = re.compile(r"<\w+\.\w+: ('[^']*')>")


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing that was wrong, and what to do about it.

    field: the request's field; code: stable, for programs; message: for the person.
    """

    field: str
    code: str
    message: str

    @classmethod
    def of_finding(cls, field: str, finding: Mapping[str, Any]) -> Self:
        """What Pydantic found in a field, as a sentence. finding: one of `ValidationError.errors()`.

        Our validators say how a value must be or what is wrong with it: "must not be empty".
        """
        code, message = finding["type"], finding["msg"]
        if code == "value_error":
            message = f"This {message.removeprefix('Value error, ')}."
        return cls(field, code, _ENUM_MEMBER.sub(r"\1", message))


class Problem(Exception):
    """Something that a caller is told about."""

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Something went wrong"
    slug_override: ClassVar[str | None] = None

    def __init__(
        self, detail: str = "", *, errors: tuple[Advice, ...] = (), retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.errors = errors
        self.retry_after_seconds = retry_after_seconds

    @classmethod
    def slug(cls) -> str:
        """The stable name in `type`: `low-quality` for LowQuality."""
        return cls.slug_override or re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()


class Unauthenticated(Problem):
    """No token, or one that does not hold."""

    status, title = 401, "Please log in"


class Forbidden(Problem):
    """The caller is known, and may not do this."""

    status, title = 403, "You may not do this"


class NotFound(Problem):
    """Nothing there, or in a gallery that the caller may not see."""

    status, title = 404, "There is no such thing"


class MethodNotAllowed(Problem):
    """The path exists, not with this method."""

    status, title = 405, "This method is not offered here"


class PreconditionFailed(Problem):
    """If-Match names another version."""

    status, title = 412, "It was changed in the meantime"


class RequestTimeout(Problem):
    """The body did not come in time, or not whole."""

    status, title = 408, "The request did not come in time"


class HeadersTooLarge(Problem):
    """More or longer headers than any honest request has."""

    status, title = 431, "The request's headers are too large"


class Unreadable(Problem):
    """Bytes that two readers could read in two ways, or that are no request at all."""

    status, title = 400, "The request cannot be read"


class TooManyPieces(Problem):
    """A chunked body whose chunks are so small that reading them costs more than what they bring."""

    status, title = 400, "The body comes in too many small chunks"


class Conflict(Problem):
    """The state of things does not allow it."""

    status, title = 409, "The present state does not allow this"


class ExternalRefTaken(Conflict):
    """Another identity of the gallery holds this reference."""

    title = "This external reference is taken"


class ModelMismatch(Conflict):
    """The gallery's templates were made by another model."""

    title = "The gallery belongs to another face model"


class DifferentPerson(Conflict):
    """A later sample that does not show the identity's person."""

    title = "The photo shows somebody else"


class ReplayedPhoto(Conflict):
    """The very same selfie was presented before; or a near copy, where the gallery refuses those."""

    title = "This photo was presented before"


class NonceInvalid(Conflict):
    """The gallery asks for a nonce and there is none; or it was used, is too old, or was given for something else."""

    title = "The nonce does not hold"


class UndecidedCandidates(Conflict):
    """It would make two undecided look-alikes active."""

    title = "Look-alikes are still undecided"


class IdempotencyInProgress(Conflict):
    """The first request with this key still runs."""

    title = "The first request with this key is still running"


class AlreadyCreated(Conflict):
    """The first answer held a secret that is shown once."""

    title = "It was created by the first request; its secret is shown once"


class PhotoMissing(Problem):
    """The photo store does not hold the photo any more."""

    status, title = 410, "The stored photo is missing"


class TooLarge(Problem):
    """More bytes than the limit."""

    status, title = 413, "The upload is too large"


class TooManyPixels(Problem):
    """More pixels than the limit; read from the header, before any decoding."""

    status, title = 413, "The photo has too many pixels"


class UnsupportedMediaType(Problem):
    """Not a JPEG, PNG or WebP by its content; or a body of another type."""

    status, title = 415, "This media type is not accepted"


class Validation(Problem):
    """The request is not of the form that the contract gives."""

    status, title = 422, "The request does not fit"

    @classmethod
    def of(cls, field: str, code: str, message: str) -> Self:
        """The refusal of one field."""
        return cls(message, errors=(Advice(field, code, message),))


class IdempotencyKeyReused(Validation):
    """The same key came with another request."""

    title = "This idempotency key belongs to another request"


class PhotoRefused(Problem):
    """A photo that cannot serve; `errors` advise the person in front of the camera."""

    status, title = 422, "The photo cannot be used"


class NoFace(PhotoRefused):
    """No face was found."""

    title = "No face was found"


class MultipleFaces(PhotoRefused):
    """A second face is large enough to be meant."""

    title = "More than one face was found"


class FaceTooSmall(PhotoRefused):
    """Too few pixels on the face."""

    title = "The face is too small"


class FaceCropped(PhotoRefused):
    """The face is cut by the photo's border."""

    title = "The face is cut off"


class LowQuality(PhotoRefused):
    """The one face on the photo is too poor; `errors` tell the person what to do."""

    title = "The photo is not good enough"


class NotLive(PhotoRefused):
    """It looks like a photo of a photo, and the gallery requires a live face."""

    title = "The photo does not seem to show a live person"


class UndecodableImage(PhotoRefused):
    """The bytes begin like a photo and cannot be decoded."""

    title = "The photo cannot be decoded"


class AnimatedImage(PhotoRefused):
    """More than one frame."""

    title = "Animated images are not accepted"


class DifferentPeople(PhotoRefused):
    """The photos of one enrolment do not show one person."""

    title = "The photos show different people"


class RateLimited(Problem):
    """Too many requests."""

    status, title = 429, "Too many requests"


class AttemptsExhausted(Problem):
    """Too many consecutive non-matches on one identity."""

    status, title = 429, "Too many attempts on this identity"


class Unexpected(Problem):
    """A fault of ours; the log knows more under the request's id."""

    status, title = 500, "Something went wrong on our side"


class NotImplementedYet(Problem):
    """Part of the contract, not built yet."""

    status, title, slug_override = 501, "This is not built yet", "not-implemented"


class NotReady(Problem):
    """Overloaded, starting, or not caught up; trying again helps."""

    status, title = 503, "Not ready"

    def __init__(self, detail: str = "", *, retry_after_seconds: int = 1) -> None:
        super().__init__(detail, retry_after_seconds=retry_after_seconds)


class GalleryTooLarge(Problem):
    """A gallery needs more index memory than a process may use."""

    status, title = 503, "The gallery does not fit into this process"


class DependencyUnavailable(Problem):
    """A store cannot be reached."""

    status, title = 503, "A part of the service is away"

    def __init__(self, detail: str = "", *, retry_after_seconds: int = 2) -> None:
        super().__init__(detail, retry_after_seconds=retry_after_seconds)


class AuditRefused(Problem):
    """The store answers, and does not take the action's audit event: the action did not happen."""

    status, title = 503, "A part of the service is away"
    slug_override = "dependency-unavailable"

    def __init__(self) -> None:
        super().__init__("The audit log cannot be written; nothing was done.", retry_after_seconds=5)


class ModelUnavailable(Problem):
    """The face model cannot be used."""

    status, title = 503, "The face model is not available"

    def __init__(self, detail: str = "", *, retry_after_seconds: int = 5) -> None:
        super().__init__(detail, retry_after_seconds=retry_after_seconds)
