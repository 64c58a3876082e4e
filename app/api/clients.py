"""Client applications over HTTP: who calls on their own behalf, kept by admins."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from app.access.grants import named
from app.api.bodies import StrictRoute
from app.api.dependencies import CurrentRuntime, IdempotencyKey, acting, first_answer
from app.api.paging import Page, Paged, page_of
from app.api.problems import CHANGES, problems
from app.api.shapes import NO_STORE, Body, ClientRoles, Galleries, Moment, PlainText
from app.audit import Action
from app.documents.accounts import Client, kept_account, kept_by
from app.documents.galleries import Gallery
from app.domain.callers import Role
from app.errors import (
    AlreadyCreated,
    Conflict,
    DependencyUnavailable,
    Forbidden,
    IdempotencyInProgress,
    NotFound,
    Unauthenticated,
    Validation,
)
from app.use_cases import keep_clients
from app.use_cases.keep_clients import ClientFields

router = APIRouter(
    route_class=StrictRoute,
    prefix="/v1/clients",
    tags=["clients"],
    responses=problems(Unauthenticated, Forbidden, Validation, DependencyUnavailable),
)

#: A month is long enough to bring a new secret to every kiosk.
OVERLAP_HOURS_MAXIMUM = 720

ClientName = Annotated[PlainText, Field(min_length=1, max_length=128)]
Audience = Annotated[PlainText, Field(min_length=1, max_length=255)]
Audiences = Annotated[tuple[Audience, ...], Field(max_length=32)]


class NewClient(Body):
    """A client application to be made.

    galleries: names, and never left out; null means all. audiences: whom its assertions may address besides itself; each belongs
    to one client.
    """

    name: ClientName
    roles: ClientRoles = (Role.RELYING_APP,)
    galleries: Galleries
    audiences: Audiences = ()


@with_config(ConfigDict(extra="forbid"))
class ClientPatch(TypedDict, total=False):
    """A merge patch (RFC 7396): what is left out stays, `galleries: null` means all."""

    name: ClientName
    roles: ClientRoles
    galleries: Galleries
    audiences: Audiences


class ClientAnswer(BaseModel):
    """A client application."""

    id: str
    client_id: str
    name: str
    roles: list[Role]
    galleries: list[str] | None
    audiences: list[str]
    created_at: Moment
    updated_at: Moment


class ClientWithSecret(ClientAnswer):
    """A client application with its secret, which is shown this once."""

    client_secret: str


class RotatedClient(ClientWithSecret):
    """A client application with its fresh secret, and until when the former one holds too."""

    former_secret_until: Moment | None


class Rotation(Body):
    """How the former secret ends. overlap_hours: 0 at once, with the tokens got with it; left out: the setting."""

    overlap_hours: Annotated[int, Field(ge=0, le=OVERLAP_HOURS_MAXIMUM)] | None = None


_ONE = problems(NotFound)
_SECRET = problems(Conflict, IdempotencyInProgress, AlreadyCreated)


@router.get("")
async def list_clients(
    request: Request,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("client.list", Role.ADMIN, is_read=True))],
    page: Annotated[Page, Depends()],
) -> Paged[ClientAnswer]:
    """All client applications, newest first."""
    clients, cursor = await page_of(Client, kept_by(action.caller), page, request, runtime.keys)
    names = await Gallery.names_by_id([id_ for client in clients for id_ in client.galleries or ()])
    return Paged[ClientAnswer](items=[_client(client, names) for client in clients], next_cursor=cursor)


@router.post("", status_code=201, responses=CHANGES | _SECRET)
async def create_client(
    request: Request,
    response: Response,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("client.create", Role.ADMIN))],
    body: NewClient,
    key: IdempotencyKey = None,
) -> ClientWithSecret:
    """Make a client application; its secret is shown this once."""
    await first_answer(runtime, request, action, key, body.model_dump(), holds_secret=True)
    fields = ClientFields(body.name, body.roles, body.galleries, body.audiences)
    client, secret = await keep_clients.create_client(runtime, action, fields)
    response.headers.update(NO_STORE)
    response.headers["Location"] = f"/v1/clients/{client.id}"
    return ClientWithSecret(**(await _shown(client)).model_dump(), client_secret=secret)


@router.get("/{client_id}", responses=_ONE)
async def show_client(
    client_id: str, action: Annotated[Action, Depends(acting("client.read", Role.ADMIN, is_read=True))]
) -> ClientAnswer:
    """One client application."""
    return await _shown(await kept_account(Client, client_id, action.caller))


@router.patch("/{client_id}", responses=CHANGES | _ONE)
async def update_client(
    client_id: str,
    request: Request,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("client.update", Role.ADMIN))],
    patch: ClientPatch,
    key: IdempotencyKey = None,
) -> ClientAnswer:
    """Change a client application; other roles void its access tokens."""
    if await first_answer(runtime, request, action, key, patch) is not None:
        return await _shown(await kept_account(Client, client_id, action.caller))
    return await _shown(
        await keep_clients.update_client(runtime, action, client_id, lambda old: _patched_client(old, patch))
    )


@router.delete("/{client_id}", status_code=204, responses=CHANGES | _ONE)
async def delete_client(
    client_id: str,
    request: Request,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("client.delete", Role.ADMIN))],
    key: IdempotencyKey = None,
) -> None:
    """Remove a client application; its tokens hold no more."""
    if await first_answer(runtime, request, action, key, None) is None:
        await keep_clients.delete_client(runtime, action, client_id)


@router.post("/{client_id}/rotate", responses=CHANGES | _SECRET | _ONE)
async def rotate_client_secret(
    client_id: str,
    request: Request,
    response: Response,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("client.rotate", Role.ADMIN))],
    body: Rotation | None = None,
    key: IdempotencyKey = None,
) -> RotatedClient:
    """Give a client application a fresh secret; the former one holds beside it for a while, or ends at once."""
    hours = None if body is None else body.overlap_hours
    await first_answer(runtime, request, action, key, {"overlap_hours": hours}, holds_secret=True)
    client, secret = await keep_clients.rotate_client_secret(runtime, action, client_id, hours)
    response.headers.update(NO_STORE)
    shown = (await _shown(client)).model_dump()
    return RotatedClient(**shown, client_secret=secret, former_secret_until=client.former_until)


def _patched_client(old: ClientFields, patch: ClientPatch) -> ClientFields:
    return ClientFields(
        name=patch.get("name", old.name),
        roles=patch.get("roles", old.roles),
        galleries=patch.get("galleries", old.galleries),
        audiences=patch.get("audiences", old.audiences),
    )


async def _shown(client: Client) -> ClientAnswer:
    return _client(client, await Gallery.names_by_id(client.galleries or ()))


def _client(client: Client, names: dict[str, str]) -> ClientAnswer:
    return ClientAnswer(
        id=client.id,
        client_id=client.id,
        name=client.name,
        roles=sorted(client.roles),
        galleries=None if client.galleries is None else list(named(client.galleries, names)),
        audiences=client.audiences,
        created_at=client.created_at,
        updated_at=client.updated_at,
    )
