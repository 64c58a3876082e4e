"""What a route may ask for, as Annotated types: the Runtime, an authorised Action, a page, an upload."""

import asyncio
import hashlib
import json
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated

import pymongo
from fastapi import Depends, Header, Request, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.security import OAuth2PasswordBearer
from pymongo.errors import PyMongoError

from app.audit import Action
from app.config import RateClass
from app.documents.claims import RENEW_SECONDS, IdempotencyClaim
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.domain.callers import Caller, Role, subscriber
from app.errors import (
    Advice,
    AlreadyCreated,
    Forbidden,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    NotFound,
    RateLimited,
    Unauthenticated,
    Validation,
)
from app.runtime import Runtime

_bearer = OAuth2PasswordBearer(tokenUrl="/v1/auth/token", auto_error=False)

IDEMPOTENCY_KEY_MAXIMUM = 255
#: What looks at faces without being called so.
FACE_ACTIONS = frozenset({"identity.enrol", "identity.import", "sample.add"})
#: Actions that delete a person or a sample for good. An agreement may carry out such an action.
ERASING_ACTIONS = frozenset({"identity.erase", "sample.remove", "proposal.agree"})


def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


CurrentRuntime = Annotated[Runtime, Depends(_runtime)]


def client_ip(request: Request) -> str | None:
    """The caller's address; behind a proxy that FORWARDED_ALLOW_IPS names, the one that the proxy tells."""
    return request.client.host if request.client is not None else None


def unknown_callers(request: Request, name: str, *, is_read: bool = False) -> Action:
    """The Action of somebody who is yet to be known."""
    return Action(
        name=name,
        caller=None,
        request_id=request.state.request_id,
        ip=client_ip(request) or "",
        is_read=is_read,
        has_own_request_id=request.state.has_own_request_id,
    )


def _refuse_unknown_parameters(request: Request) -> None:
    """A filter with a slip in its name would silently list everything. Raises Validation."""
    if not request.query_params:
        return
    known = get_flat_params(request.scope["route"].dependant)
    names = {field.alias for field in known if isinstance(field.field_info, params.Query)}
    unknown = sorted(set(request.query_params) - names)
    if unknown:
        message = "There is no such parameter here."
        raise Validation(message, errors=tuple(Advice(name[:64], "extra_forbidden", message) for name in unknown))


class Admission:
    """Who may come in, and how often. A route has one; it is asked before anything of the body is looked at."""

    async def admit(self, request: Request) -> Action | None:
        """Let the request in, once. Raises the Problem that it is refused with."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Strangers(Admission):
    """Anybody, as often as an address may. action: by whose name a refusal for its rate is recorded; None: it is not."""

    kind: RateClass
    action: str | None = None

    async def __call__(self, request: Request) -> None:
        """As a dependency."""
        await self.admit(request)

    async def admit(self, request: Request) -> None:
        """See Admission. Raises RateLimited, or NotReady for logins that nobody can count."""
        if hasattr(request.state, "allowance"):
            return
        request.state.action = None if self.action is None else unknown_callers(request, self.action)
        await _spend(request, self.kind, f"address:{subscriber(client_ip(request) or '')}")
        request.state.action = None  # whoever came in is the route's to tell of


@dataclass(frozen=True, slots=True)
class Acting(Admission):
    """Authenticated callers with one of the roles (any role, where none is named), as often as a caller may.

    name: the action's. is_read: only refusals of access become audit events.
    """

    name: str
    roles: tuple[Role, ...]
    is_read: bool

    async def __call__(self, request: Request, _: Annotated[str | None, Depends(_bearer)]) -> Action:
        """As a dependency; the token stands there for OpenAPI's sake."""
        return await self.admit(request)

    async def admit(self, request: Request) -> Action:
        """See Admission. Raises Unauthenticated, RateLimited, Forbidden, or Validation for an unknown query parameter."""
        admitted: Action | None = getattr(request.state, "admitted", None)
        if admitted is not None:
            return admitted
        started = unknown_callers(request, self.name, is_read=self.is_read)
        request.state.action = started
        started.caller = await self._authenticated(request)
        await _spend(request, self.kind_of(request.method), started.caller.id)
        if self.roles and not started.caller.has(*self.roles):
            raise Forbidden(f"This needs one of the roles: {', '.join(sorted(self.roles))}.")
        _refuse_unknown_parameters(request)
        request.state.admitted = started
        return started

    def kind_of(self, method: str) -> RateClass:
        """The class of rate that this action counts for, called with this method."""
        if method in ("GET", "HEAD"):
            return "read"
        if self.name.startswith("auth."):
            return "login"
        if self.name in ERASING_ACTIONS:
            return "erase"
        return "face" if self.name.startswith("face.") or self.name in FACE_ACTIONS else "write"

    async def _authenticated(self, request: Request) -> Caller:
        token, runtime = await _bearer(request), _runtime(request)
        refusal = Unauthenticated("Send an access token: `Authorization: Bearer ...`.")
        if token is not None:
            try:
                with pymongo.timeout(runtime.settings.mongodb_timeout_seconds):
                    return await runtime.access.authenticate(token)
            except Unauthenticated as error:
                refusal = error
        # Counted by address, and only now: whoever shares one with somebody who guesses is not refused for it.
        await _spend(request, "read", f"address:{subscriber(client_ip(request) or '')}")
        raise refusal


async def _spend(request: Request, kind: RateClass, who: str) -> None:
    limits = _runtime(request).limits
    allowance = await limits.spend(kind, who)
    request.state.allowance = allowance
    if allowance.is_granted:
        return
    if not limits.is_news(kind, who):
        request.state.action = None  # no event for each: they are what a log would be filled with
    raise RateLimited("Please slow down.", retry_after_seconds=allowance.reset_seconds)


def acting(name: str, *roles: Role, is_read: bool = False) -> Acting:
    """A dependency that gives an authenticated caller's Action; see Acting."""
    return Acting(name, roles, is_read)


def grant_of(action: Action) -> Collection[str] | None:
    """The ids of the galleries that the caller may see; None means all."""
    return () if action.caller is None else action.caller.galleries


async def visible_gallery(runtime: Runtime, action: Action, name: str) -> Gallery:
    """The gallery of that name. Raises NotFound, also where the caller may not see it."""
    gallery = await Gallery.named(name, grant_of(action))
    if gallery is None:
        raise NotFound(f"There is no gallery {name!r} for you.")
    action.gallery = name
    return gallery


async def gallery_of(action: Action, gallery_id: str) -> Gallery:
    """The gallery that something lies in. Raises NotFound where the caller may not see it."""
    if action.caller is None or not action.caller.may_see(gallery_id):
        raise NotFound
    gallery = await Gallery.get(gallery_id)
    if gallery is None:
        raise NotFound
    action.gallery = gallery.name
    return gallery


IdempotencyKey = Annotated[
    str | None, Header(alias="Idempotency-Key", min_length=1, max_length=IDEMPOTENCY_KEY_MAXIMUM)
]


def _canonical(fields: object) -> bytes:
    return json.dumps(fields, sort_keys=True, default=str, separators=(",", ":")).encode()


async def first_answer(
    runtime: Runtime,
    request: Request,
    action: Action,
    key: str | None,
    fields: object,
    *,
    digests: Callable[[], list[bytes]] = list,
    holds_secret: bool = False,
) -> tuple[AuditEvent, IdempotencyClaim] | None:
    """What the first request with this idempotency key did, if there was one; else claim the key for this one.

    The same request means: caller, method, path, query, parsed fields, and the photos' bytes. Raises IdempotencyKeyReused,
    IdempotencyInProgress, or AlreadyCreated where the first answer held a secret.
    """
    if key is None:
        return None
    if not key.isprintable():
        message = "An idempotency key has 1 to 255 printable characters."
        raise Validation(message, errors=(Advice("Idempotency-Key", "unprintable", message),))
    asked = (request.method, request.url.path, request.url.query)
    parts = [*(text.encode() for text in asked), _canonical(fields), *await runtime.compute(digests)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    name = runtime.keys.keyed_hash("idempotency", f"{action.actor_id}\0{key}".encode()).hex()
    fingerprint = runtime.keys.keyed_hash("fingerprint", digest.digest())
    keep = timedelta(hours=runtime.settings.idempotency_hours)
    claim, is_ours = await IdempotencyClaim.begin(name, fingerprint, keep)
    if is_ours:
        action.claim = claim
        _keep_while_running(claim)
        return None
    if claim.fingerprint != fingerprint:
        raise IdempotencyKeyReused("The key came before with another request.")
    if claim.state == "running":
        raise IdempotencyInProgress(retry_after_seconds=claim.seconds_left())
    if holds_secret:
        raise AlreadyCreated
    event = None if claim.event_id is None else await AuditEvent.get(claim.event_id)
    if event is None:
        raise NotFound("What the first request made is gone.")
    return event, claim


def _keep_while_running(claim: IdempotencyClaim) -> None:
    """Renew the claim in the background until it is settled or this request's task ends."""

    async def keep() -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            # The lease may run out during an outage. Another request then does the work, and this one changes nothing.
            with suppress(PyMongoError):
                if not await claim.renew():
                    return

    keeper = asyncio.create_task(keep(), name="idempotency key")
    request = asyncio.current_task()
    if request is not None:
        request.add_done_callback(lambda _: keeper.cancel())
