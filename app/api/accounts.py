"""Callers over HTTP: OAuth 2.0 tokens, one's own account, users and client applications, the public keys."""

import base64
from typing import Annotated, Literal
from urllib.parse import unquote_plus

from fastapi import APIRouter, Depends, Form, Header, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, with_config
from typing_extensions import TypedDict

from app.api.bodies import StrictRoute
from app.api.dependencies import CurrentRuntime, IdempotencyKey, acting, client_ip, first_answer
from app.api.paging import Page, Paged, page_of
from app.api.problems import problems
from app.api.shapes import Body, Moment
from app.audit import Action
from app.documents.accounts import Client, User
from app.domain.callers import Caller, Role
from app.errors import (
    AlreadyCreated,
    Conflict,
    DependencyUnavailable,
    Forbidden,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    NotFound,
    NotReady,
    Unauthenticated,
    Validation,
)
from app.use_cases import accounts
from app.use_cases.accounts import USERNAME_MAXIMUM, ClientFields, Grant, GrantRefused, UserFields

router = APIRouter(route_class=StrictRoute)

#: RFC 6749, 5.1: nobody on the way may keep an answer that holds a secret.
NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}
#: Verifiers may keep the keys for so long; a new key is to be published that much before it signs.
JWKS_MAXIMUM_AGE_SECONDS = 60


def _plain(text: str) -> str:
    # Control and invisible characters, half surrogate pairs: two names that look the same must be the same.
    if not text.isprintable() or text != text.strip():
        message = "only visible characters, and no space at either end"
        raise ValueError(message)
    return text


def _storable(text: str) -> str:
    # A form with an odd charset can bring halves of surrogate pairs, which MongoDB cannot even look for.
    if any("\ud800" <= character <= "\udfff" for character in text):
        message = "characters that do not exist"
        raise ValueError(message)
    return text


Username = Annotated[str, Field(min_length=1, max_length=USERNAME_MAXIMUM), AfterValidator(_plain)]
ClientName = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_plain)]
Audience = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_plain)]
GalleryName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Roles = Annotated[tuple[Role, ...], Field(min_length=1, max_length=len(Role))]
Galleries = Annotated[tuple[GalleryName, ...], Field(max_length=1000)] | None
Audiences = Annotated[tuple[Audience, ...], Field(max_length=32)]


FormText = Annotated[str, AfterValidator(_storable)]


class TokenForm(BaseModel):
    """The form of a token request. What is not understood is left aside, as RFC 6749, 3.2 asks."""

    grant_type: FormText | None = Field(None, description="`password`, `client_credentials` or `refresh_token`")
    username: FormText | None = None
    password: FormText | None = None
    client_id: FormText | None = None
    client_secret: FormText | None = None
    refresh_token: FormText | None = None


class RevocationForm(BaseModel):
    """The form of a revocation (RFC 7009); a type hint is not needed, and left aside."""

    token: FormText | None = None


class TokenAnswer(BaseModel):
    """Tokens. refresh_token: people only. scope: the caller's roles."""

    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - the name of a type
    expires_in: Annotated[int, Field(description="seconds")]
    refresh_token: str | None
    scope: str


class OAuthError(BaseModel):
    """Why no token is given, in OAuth's words."""

    error: Literal["invalid_request", "invalid_client", "invalid_grant", "unsupported_grant_type"]
    error_description: str


class Me(BaseModel):
    """The caller, as the service knows them."""

    id: str
    kind: Literal["user", "client"]
    name: str
    roles: list[Role]
    galleries: list[str] | None


class PasswordChange(Body):
    """One's own new password: 8 to 256 characters."""

    current_password: str
    new_password: str


class NewUser(Body):
    """A user to be made. galleries: names; null means all, [] none."""

    username: Username
    password: str
    roles: Roles
    galleries: Galleries = None


@with_config(ConfigDict(extra="forbid"))
class UserPatch(TypedDict, total=False):
    """A merge patch (RFC 7396): what is left out stays, `galleries: null` means all."""

    username: Username
    password: str
    roles: Roles
    galleries: Galleries
    disabled: StrictBool


class UserAnswer(BaseModel):
    """A user."""

    id: str
    username: str
    roles: list[Role]
    galleries: list[str] | None
    disabled: bool
    created_at: Moment
    updated_at: Moment


class NewClient(Body):
    """A client application to be made. audiences: whom its assertions may address besides itself."""

    name: ClientName
    roles: Roles = (Role.RELYING_APP,)
    galleries: Galleries = None
    audiences: Audiences = ()


@with_config(ConfigDict(extra="forbid"))
class ClientPatch(TypedDict, total=False):
    """A merge patch (RFC 7396): what is left out stays, `galleries: null` means all."""

    name: ClientName
    roles: Roles
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


class PublicJwk(BaseModel):
    """A public key as a JWK (RFC 8037)."""

    kty: Literal["OKP"] = "OKP"
    crv: Literal["Ed25519"] = "Ed25519"
    use: Literal["sig"] = "sig"
    alg: Literal["EdDSA"] = "EdDSA"
    kid: str
    x: Annotated[str, Field(description="the 32 bytes in base64url")]


class Jwks(BaseModel):
    """The public keys of access tokens and assertions."""

    keys: list[PublicJwk]


_GUARDED = problems(Unauthenticated, Forbidden, Validation, DependencyUnavailable)
_CHANGES = _GUARDED | problems(
    Unauthenticated, Conflict, IdempotencyInProgress, Validation, IdempotencyKeyReused, NotReady, DependencyUnavailable
)
_ONE = problems(NotFound)
_TOKEN_ANSWERS = problems(Validation, NotReady, DependencyUnavailable)
_TOKEN_ANSWERS[400] = {"model": OAuthError, "description": "OAuth's error object"}


@router.post("/v1/auth/token", tags=["auth"], responses=_TOKEN_ANSWERS)
async def give_token(
    request: Request,
    response: Response,
    runtime: CurrentRuntime,
    form: Annotated[TokenForm, Form()],
    authorization: Annotated[str | None, Header()] = None,
) -> TokenAnswer:
    """Log in: a person by password, a client by its secret (HTTP Basic or form), or anew by a refresh token."""
    try:
        grant = await _granted(request, runtime, form, authorization)
    except GrantRefused as refusal:
        return _oauth_error(refusal)  # type: ignore[return-value] # a response of its own, as FastAPI allows
    response.headers.update(NO_STORE)
    return TokenAnswer(
        access_token=grant.access_token,
        expires_in=grant.expires_in_seconds,
        refresh_token=grant.refresh_token,
        scope=grant.scope,
    )


@router.post("/v1/auth/revoke", tags=["auth"], responses=problems(Validation, DependencyUnavailable))
async def revoke_token(request: Request, runtime: CurrentRuntime, form: Annotated[RevocationForm, Form()]) -> Response:
    """Log out with an access or a refresh token (RFC 7009); 200 also for a token that nobody knows."""
    if form.token:
        await accounts.log_out(runtime, _unauthenticated(request, "auth.revoke"), form.token)
    return Response(status_code=200, headers=NO_STORE)


@router.get("/v1/auth/me", tags=["auth"], responses=_GUARDED)
async def show_me(action: Annotated[Action, Depends(acting("auth.me", is_read=True))]) -> Me:
    """Who the token's bearer is, and what they may do and see."""
    caller = _caller(action)
    galleries = None if caller.galleries is None else list(caller.galleries)
    return Me(id=caller.id, kind=caller.kind, name=caller.name, roles=sorted(caller.roles), galleries=galleries)


@router.post("/v1/auth/password", tags=["auth"], status_code=204, responses=_CHANGES)
async def change_my_password(
    request: Request,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("auth.password"))],
    body: PasswordChange,
    key: IdempotencyKey = None,
) -> None:
    """Change one's own password; all other logins of the same person end."""
    if await first_answer(runtime, request, action, key, body.model_dump()) is None:
        await accounts.change_password(runtime, action, body.current_password, body.new_password)


@router.get("/.well-known/jwks.json", tags=["auth"], responses=problems(DependencyUnavailable))
async def show_public_keys(response: Response, runtime: CurrentRuntime) -> Jwks:
    """The public keys of access tokens and assertions."""
    response.headers["Cache-Control"] = f"public, max-age={JWKS_MAXIMUM_AGE_SECONDS}"
    keys = await runtime.access.public_keys()
    return Jwks(keys=[PublicJwk(kid=key.key_id, x=_base64url(key.raw)) for key in keys])


@router.get("/v1/users", tags=["users"], responses=_GUARDED | problems(Validation))
async def list_users(
    request: Request,
    runtime: CurrentRuntime,
    _: Annotated[Action, Depends(acting("user.list", Role.ADMIN, is_read=True))],
    page: Annotated[Page, Depends()],
) -> Paged[UserAnswer]:
    """All users, newest first."""
    users, cursor = await page_of(User, {}, page, request, runtime.keys)
    return Paged[UserAnswer](items=[_user(user) for user in users], next_cursor=cursor)


@router.post("/v1/users", tags=["users"], status_code=201, responses=_CHANGES)
async def create_user(
    request: Request,
    response: Response,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("user.create", Role.ADMIN))],
    body: NewUser,
    key: IdempotencyKey = None,
) -> UserAnswer:
    """Make a user."""
    first = await first_answer(runtime, request, action, key, body.model_dump())
    if first is None:
        fields = UserFields(body.username, body.roles, body.galleries)
        user = await accounts.create_user(runtime, action, fields, body.password)
    else:
        user = await _user_of(first[0].subject.id)
    response.headers["Location"] = f"/v1/users/{user.id}"
    return _user(user)


@router.get("/v1/users/{user_id}", tags=["users"], responses=_GUARDED | _ONE)
async def show_user(
    user_id: str, _: Annotated[Action, Depends(acting("user.read", Role.ADMIN, is_read=True))]
) -> UserAnswer:
    """One user."""
    return _user(await _user_of(user_id))


@router.patch("/v1/users/{user_id}", tags=["users"], responses=_CHANGES | _ONE)
async def update_user(
    user_id: str,
    request: Request,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("user.update", Role.ADMIN))],
    patch: UserPatch,
    key: IdempotencyKey = None,
) -> UserAnswer:
    """Change a user: other roles void the access tokens, another password or disabling ends the logins."""
    if await first_answer(runtime, request, action, key, patch) is not None:
        return _user(await _user_of(user_id))
    password = patch.get("password")
    return _user(await accounts.update_user(runtime, action, user_id, lambda old: _patched_user(old, patch), password))


@router.delete("/v1/users/{user_id}", tags=["users"], status_code=204, responses=_CHANGES | _ONE)
async def delete_user(
    user_id: str,
    request: Request,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("user.delete", Role.ADMIN))],
    key: IdempotencyKey = None,
) -> None:
    """Remove a user; the tokens hold no more."""
    if await first_answer(runtime, request, action, key, None) is None:
        await accounts.delete_user(runtime, action, user_id)


@router.get("/v1/clients", tags=["clients"], responses=_GUARDED | problems(Validation))
async def list_clients(
    request: Request,
    runtime: CurrentRuntime,
    _: Annotated[Action, Depends(acting("client.list", Role.ADMIN, is_read=True))],
    page: Annotated[Page, Depends()],
) -> Paged[ClientAnswer]:
    """All client applications, newest first."""
    clients, cursor = await page_of(Client, {}, page, request, runtime.keys)
    return Paged[ClientAnswer](items=[_client(client) for client in clients], next_cursor=cursor)


@router.post("/v1/clients", tags=["clients"], status_code=201, responses=_CHANGES | problems(Conflict, AlreadyCreated))
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
    client, secret = await accounts.create_client(runtime, action, fields)
    response.headers.update(NO_STORE)
    response.headers["Location"] = f"/v1/clients/{client.id}"
    return ClientWithSecret(**_client(client).model_dump(), client_secret=secret)


@router.get("/v1/clients/{client_id}", tags=["clients"], responses=_GUARDED | _ONE)
async def show_client(
    client_id: str, _: Annotated[Action, Depends(acting("client.read", Role.ADMIN, is_read=True))]
) -> ClientAnswer:
    """One client application."""
    return _client(await _client_of(client_id))


@router.patch("/v1/clients/{client_id}", tags=["clients"], responses=_CHANGES | _ONE)
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
        return _client(await _client_of(client_id))
    return _client(await accounts.update_client(runtime, action, client_id, lambda old: _patched_client(old, patch)))


@router.delete("/v1/clients/{client_id}", tags=["clients"], status_code=204, responses=_CHANGES | _ONE)
async def delete_client(
    client_id: str,
    request: Request,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("client.delete", Role.ADMIN))],
    key: IdempotencyKey = None,
) -> None:
    """Remove a client application; its tokens hold no more."""
    if await first_answer(runtime, request, action, key, None) is None:
        await accounts.delete_client(runtime, action, client_id)


@router.post("/v1/clients/{client_id}/rotate", tags=["clients"], responses=_CHANGES | _ONE)
async def rotate_client_secret(
    client_id: str,
    request: Request,
    response: Response,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("client.rotate", Role.ADMIN))],
    key: IdempotencyKey = None,
) -> ClientWithSecret:
    """Give a client application a fresh secret; the old one and the tokens got with it hold no more."""
    await first_answer(runtime, request, action, key, None, holds_secret=True)
    client, secret = await accounts.rotate_client_secret(runtime, action, client_id)
    response.headers.update(NO_STORE)
    return ClientWithSecret(**_client(client).model_dump(), client_secret=secret)


async def _granted(request: Request, runtime: CurrentRuntime, form: TokenForm, authorization: str | None) -> Grant:
    match form.grant_type:
        case "password":
            action = _unauthenticated(request, "auth.login")
            return await accounts.log_in(runtime, action, _given(form.username), _given(form.password))
        case "client_credentials":
            client_id, secret = _client_credentials(form, authorization)
            return await accounts.log_in_client(runtime, _unauthenticated(request, "auth.login"), client_id, secret)
        case "refresh_token":
            action = _unauthenticated(request, "auth.refresh")
            return await accounts.refresh(runtime, action, _given(form.refresh_token))
        case None:
            raise GrantRefused("invalid_request", "grant_type is missing.")
        case _:
            raise GrantRefused("unsupported_grant_type", "password, client_credentials or refresh_token, please.")


def _given(value: str | None) -> str:
    if not value:
        raise GrantRefused("invalid_request", "A field that this grant type needs is missing.")
    return value


def _client_credentials(form: TokenForm, authorization: str | None) -> tuple[str, str]:
    """The client's id and secret, from HTTP Basic or the form; both at once are refused (RFC 6749, 2.3)."""
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return _given(form.client_id), _given(form.client_secret)
    if form.client_secret is not None:
        raise GrantRefused("invalid_request", "Send the client's secret once: by HTTP Basic or in the form.")
    try:
        text = base64.b64decode(value.strip(), validate=True).decode()
    except ValueError as error:
        raise GrantRefused("invalid_request", "The Authorization header cannot be read.") from error
    client_id, _, secret = text.partition(":")
    return _given(unquote_plus(client_id)), _given(unquote_plus(secret))


def _oauth_error(refusal: GrantRefused) -> JSONResponse:
    error = OAuthError(error=refusal.code, error_description=refusal.description)
    return JSONResponse(error.model_dump(), 400, NO_STORE)


def _unauthenticated(request: Request, name: str) -> Action:
    """The Action of somebody who is yet to be known."""
    return Action(name=name, caller=None, request_id=request.state.request_id, ip=client_ip(request) or "")


def _caller(action: Action) -> Caller:
    if action.caller is None:
        raise Unauthenticated
    return action.caller


def _patched_user(old: UserFields, patch: UserPatch) -> UserFields:
    return UserFields(
        username=patch.get("username", old.username),
        roles=patch.get("roles", old.roles),
        galleries=patch.get("galleries", old.galleries),
        disabled=patch.get("disabled", old.disabled),
    )


def _patched_client(old: ClientFields, patch: ClientPatch) -> ClientFields:
    return ClientFields(
        name=patch.get("name", old.name),
        roles=patch.get("roles", old.roles),
        galleries=patch.get("galleries", old.galleries),
        audiences=patch.get("audiences", old.audiences),
    )


async def _user_of(user_id: str | None) -> User:
    user = None if user_id is None else await User.get(user_id)
    if user is None:
        message = "There is no such user."
        raise NotFound(message)
    return user


async def _client_of(client_id: str) -> Client:
    client = await Client.get(client_id)
    if client is None:
        message = "There is no such client."
        raise NotFound(message)
    return client


def _user(user: User) -> UserAnswer:
    return UserAnswer(
        id=user.id,
        username=user.username,
        roles=sorted(user.roles),
        galleries=user.galleries,
        disabled=user.disabled,
        created_at=user.created_at,
        updated_at=user.updated_at,
    )


def _client(client: Client) -> ClientAnswer:
    return ClientAnswer(
        id=client.id,
        client_id=client.id,
        name=client.name,
        roles=sorted(client.roles),
        galleries=client.galleries,
        audiences=client.audiences,
        created_at=client.created_at,
        updated_at=client.updated_at,
    )


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
