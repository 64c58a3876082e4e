"""Problems as application/problem+json (RFC 9457); the only place that makes HTTP out of an error."""

from collections.abc import Sequence
from typing import Annotated, Any

import pymongo
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from pymongo.errors import (
    AutoReconnect,
    ConnectionFailure,
    ExecutionTimeout,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
    WaitQueueTimeoutError,
)
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from app.api.room import NoRoom
from app.audit import Action, refuse
from app.errors import (
    Advice,
    Conflict,
    DependencyUnavailable,
    HeadersTooLarge,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    MethodNotAllowed,
    NotFound,
    NotReady,
    Problem,
    RateLimited,
    RequestTimeout,
    TooLarge,
    Unexpected,
    UnsupportedMediaType,
    Validation,
)
from app.keys import UnknownKey
from storage.evidence import EvidenceUnavailable
from storage.photos import PhotoStoreUnavailable

log = structlog.get_logger(__name__)

METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
TYPE_BASE = "urn:idem:problem/"
#: MongoDB on a full disk: OutOfDiskSpace.
NO_ROOM = 14031
#: A refusal's event must not keep the caller waiting when MongoDB is slow.
REFUSAL_SECONDS = 1.0


class FieldError(BaseModel):
    """One thing that was wrong."""

    field: str
    code: str
    message: str


class ProblemPage(BaseModel):
    """RFC 9457, with the request's id and what was wrong field by field."""

    type: Annotated[str, Field(examples=[TYPE_BASE + "low-quality"])]
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    errors: list[FieldError]


Responses = dict[int | str, dict[str, Any]]


def problems(*kinds: type[Problem], **others: dict[str, Any]) -> Responses:
    """A route's `responses=` for OpenAPI: the problems it may answer, and others as `http_201={...}`."""
    pages: Responses = {int(status.removeprefix("http_")): page for status, page in others.items()}
    for kind in kinds:
        page = pages.setdefault(kind.status, {
            "model": ProblemPage, "content": {"application/problem+json": {}}, "description": "",
        })  # fmt: skip
        page["description"] = " · ".join(filter(None, [page["description"], f"`{kind.slug()}`"]))
    return pages


#: What a change of users, client applications or one's own account may answer besides its own.
CHANGES = problems(Conflict, IdempotencyInProgress, Validation, IdempotencyKeyReused, NotReady, DependencyUnavailable)


def render(request: Request, problem: Problem) -> JSONResponse:
    """The problem as its page."""
    page = ProblemPage(
        type=TYPE_BASE + problem.slug(),
        title=problem.title,
        status=problem.status,
        detail=problem.detail,
        instance=request.url.path,
        request_id=request.state.request_id,
        errors=[FieldError(field=e.field, code=e.code, message=e.message) for e in problem.errors],
    )
    headers = {}
    if problem.retry_after_seconds is not None:
        headers["Retry-After"] = str(problem.retry_after_seconds)
    if problem.status == 401:  # noqa: PLR2004
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(page.model_dump(), problem.status, headers, media_type="application/problem+json")


def as_problem(error: Exception) -> Problem:  # noqa: C901, PLR0911, PLR0912 - one table
    """What a caller is told about any exception."""
    match error:
        case Problem():
            return error
        case RequestValidationError():
            return Validation(
                "Some fields are not of the form that the contract gives.", errors=_advice(error.errors())
            )
        case EvidenceUnavailable():
            return DependencyUnavailable("The place for evidence cannot be reached.")
        case PhotoStoreUnavailable():
            return DependencyUnavailable("The photo store cannot be reached.")
        case UnknownKey():  # sealed under a key that this process learns of with its next reading, or its next start
            return NotReady("A key has just been renewed; please try again.", retry_after_seconds=2)
        case AutoReconnect() | ConnectionFailure() | NetworkTimeout() | ExecutionTimeout() | WaitQueueTimeoutError():
            return DependencyUnavailable("The document store cannot be reached.")
        case PyMongoError() if error.timeout or error.has_error_label("TransientTransactionError"):
            return DependencyUnavailable("The document store did not answer in time.")
        case OperationFailure(code=code) if code == NO_ROOM:
            return DependencyUnavailable("The document store has no room left.")
        case HTTPException(status_code=404):
            return NotFound("No such path.")
        case HTTPException(status_code=405):
            return MethodNotAllowed()
        case HTTPException(status_code=408) | ClientDisconnect():
            return RequestTimeout()
        case NoRoom(status_code=429):
            return RateLimited(
                "Your requests use too much memory at the moment. Wait for their answers, then try again.",
                retry_after_seconds=2,
            )
        case NoRoom():
            return NotReady("Too many photos are being worked on; please try again.", retry_after_seconds=2)
        case HTTPException(status_code=431):
            return HeadersTooLarge()
        case HTTPException(status_code=413):
            return TooLarge()
        case HTTPException(status_code=415):
            return UnsupportedMediaType()
        case HTTPException(status_code=400):
            return Validation("The body cannot be read.", errors=(Advice("body", "unreadable", str(error.detail)),))
        case _:
            return Unexpected()


def _advice(errors: Sequence[Any]) -> tuple[Advice, ...]:
    """Pydantic's findings, without the values that were sent."""
    found = []
    for error in errors:
        path = [str(part) for part in error["loc"] if part not in ("body", "query", "path", "header")]
        found.append(Advice.of_finding(".".join(path) or str(error["loc"][0]), error))
    return tuple(found)


async def answer(request: Request, error: Exception) -> JSONResponse:
    """Render the error, give back its idempotency key, and record the refusal."""
    problem = as_problem(error)
    if isinstance(problem, Unexpected):
        log.error("unexpected_error", request_id=request.state.request_id, exc_info=error)
    action: Action | None = getattr(request.state, "action", None)
    page = render(request, problem)
    if isinstance(problem, MethodNotAllowed):
        page.headers["Allow"] = ", ".join(_methods_of(request))
    if action is not None and isinstance(error, PyMongoError):
        # Most likely MongoDB is away: waiting for it once more would keep the caller beyond the 3 s that they were promised.
        page.background = BackgroundTask(_settle, action, problem)
    elif action is not None:
        await _settle(action, problem)
    return page


def _methods_of(request: Request) -> list[str]:
    """Every method that the path is offered with; the router itself names those of the first route that fits."""
    path = {name: request.scope[name] for name in ("type", "path", "root_path", "headers")}
    routes = request.app.router.routes
    return [
        method for method in METHODS if any(one.matches({**path, "method": method})[0] is Match.FULL for one in routes)
    ]


async def _settle(action: Action, problem: Problem) -> None:
    """Give back the action's idempotency key and record the refusal, if MongoDB lets us."""
    try:
        with pymongo.timeout(REFUSAL_SECONDS):
            if action.claim is not None:
                await action.claim.abandon()
            await refuse(action, problem)
    except PyMongoError as failure:
        log.warning("refusal_not_recorded", action=action.name, error=type(failure).__name__)


def install(app: FastAPI) -> None:
    """Let every error of the app be answered here."""
    # What nobody foresaw goes through to the Envelope, which answers it with the same headers as everything else.
    for kind in (
        Problem, RequestValidationError, HTTPException, PyMongoError, PhotoStoreUnavailable, EvidenceUnavailable,
        ClientDisconnect,
    ):  # fmt: skip
        app.add_exception_handler(kind, answer)
