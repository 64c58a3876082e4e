"""What a route may ask for, as Annotated types: the Runtime, an authorised Action, a page, an upload."""

import hashlib
import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Annotated

import pymongo
from fastapi import Depends, Header, Request, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.security import OAuth2PasswordBearer

from app.audit import Action
from app.documents.claims import IdempotencyClaim
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.domain.callers import Role
from app.errors import (
    Advice,
    AlreadyCreated,
    Forbidden,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    NotFound,
    Unauthenticated,
    Validation,
)
from app.runtime import Runtime

_bearer = OAuth2PasswordBearer(tokenUrl="/v1/auth/token", auto_error=False)

IDEMPOTENCY_KEY_MAXIMUM = 255


def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


CurrentRuntime = Annotated[Runtime, Depends(_runtime)]


def client_ip(request: Request) -> str | None:
    """The caller's address; behind a proxy that FORWARDED_ALLOW_IPS names, the one that the proxy tells."""
    return request.client.host if request.client is not None else None


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


def acting(name: str, *roles: Role, is_read: bool = False) -> Callable[..., Awaitable[Action]]:
    """A dependency that gives an authenticated caller's Action; callers without one of the roles are refused.

    Without roles any authenticated caller may pass. is_read: only refusals of access become audit events.
    """

    async def action(
        request: Request, runtime: CurrentRuntime, token: Annotated[str | None, Depends(_bearer)]
    ) -> Action:
        started = Action(
            name=name, caller=None, request_id=request.state.request_id, ip=client_ip(request) or "", is_read=is_read
        )
        request.state.action = started
        if token is None:
            raise Unauthenticated("Send an access token: `Authorization: Bearer ...`.")
        with pymongo.timeout(runtime.settings.mongodb_timeout_seconds):
            started.caller = await runtime.access.authenticate(token)
        if roles and not started.caller.has(*roles):
            raise Forbidden(f"This needs one of the roles: {', '.join(sorted(roles))}.")
        _refuse_unknown_parameters(request)
        return started

    return action


async def visible_gallery(runtime: Runtime, action: Action, name: str) -> Gallery:
    """The gallery of that name. Raises NotFound, also where the caller may not see it."""
    assert action.caller is not None  # noqa: S101 - routes get their Action from `acting`
    gallery = await Gallery.named(name) if action.caller.may_see(name) else None
    if gallery is None:
        raise NotFound(f"There is no gallery {name!r} for you.")
    action.gallery = name
    return gallery


async def gallery_of(action: Action, gallery_id: str) -> Gallery:
    """The gallery that something lies in. Raises NotFound where the caller may not see it."""
    gallery = await Gallery.get(gallery_id)
    if gallery is None or action.caller is None or not action.caller.may_see(gallery.name):
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
        return None
    if claim.fingerprint != fingerprint:
        raise IdempotencyKeyReused("The key came before with another request.")
    if claim.state == "running":
        raise IdempotencyInProgress(retry_after_seconds=1)
    if holds_secret:
        raise AlreadyCreated
    event = None if claim.event_id is None else await AuditEvent.get(claim.event_id)
    if event is None:
        raise NotFound("What the first request made is gone.")
    return event, claim
