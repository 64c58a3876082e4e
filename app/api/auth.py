"""Logging in over HTTP: OAuth 2.0 tokens, one's own account, and the public keys."""

import base64
from typing import Annotated, Literal
from urllib.parse import unquote_plus

from fastapi import APIRouter, Depends, Form, Header, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, Field

from app.access.grants import shown
from app.access.signing import PUBLISHED_FOR_SECONDS
from app.access.tokens import TOKEN_CHARACTERS
from app.api.bodies import StrictRoute
from app.api.dependencies import CurrentRuntime, IdempotencyKey, Strangers, acting, first_answer, unknown_callers
from app.api.problems import CHANGES, problems
from app.api.shapes import NO_STORE, Body
from app.audit import Action
from app.domain.callers import Caller, Role
from app.errors import (
    AlreadyCreated,
    Conflict,
    DependencyUnavailable,
    Forbidden,
    NotReady,
    RateLimited,
    Unauthenticated,
    Validation,
)
from app.use_cases.log_in import Grant, GrantRefused, log_in, log_in_client, log_out, refresh
from app.use_cases.own_account import (
    begin_second_factor,
    change_password,
    confirm_second_factor,
    remove_second_factor,
)

router = APIRouter(route_class=StrictRoute)


def _bounded(text: str) -> str:
    # Nothing that is right is longer than a token. What is longer stays wrong when it is cut, and is answered like what is wrong.
    return text[: TOKEN_CHARACTERS + 1]


FormText = Annotated[str, AfterValidator(_bounded)]


class TokenForm(BaseModel):
    """The form of a token request. What is not understood is left aside, as RFC 6749, 3.2 asks."""

    grant_type: FormText | None = Field(None, description="`password`, `client_credentials` or `refresh_token`")
    username: FormText | None = None
    password: FormText | None = None
    otp: Annotated[FormText | None, Field(description="a one-time code, where the user has a second factor")] = None
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


class FactorBeginning(Body):
    """Who begins a second factor proves once more who they are."""

    current_password: str


class FactorSecret(BaseModel):
    """A second factor that waits for its confirmation; shown this once. uri: for an authenticator, as a QR code."""

    secret: Annotated[str, Field(description="base32")]
    uri: Annotated[str, Field(examples=["otpauth://totp/Idem:olga?secret=...&issuer=Idem"])]


class FactorProof(Body):
    """A code of the second factor: six digits."""

    otp: str


class FactorRemoval(Body):
    """Proof of who removes the second factor: the password, or else a code."""

    current_password: str | None = None
    otp: str | None = None


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
_CHANGES = problems(Unauthenticated, Forbidden, RateLimited) | CHANGES
_TOKEN_ANSWERS = problems(Validation, RateLimited, NotReady, DependencyUnavailable)
_TOKEN_ANSWERS[400] = {"model": OAuthError, "description": "OAuth's error object"}


@router.post(
    "/v1/auth/token",
    tags=["auth"],
    responses=_TOKEN_ANSWERS,
    dependencies=[Depends(Strangers("login", "auth.login"))],
)
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


@router.post(
    "/v1/auth/revoke",
    tags=["auth"],
    response_class=Response,
    openapi_extra={"requestBody": {"required": False}},
    responses=problems(Validation, DependencyUnavailable),
    dependencies=[Depends(Strangers("write", "auth.revoke"))],
)
async def revoke_token(request: Request, runtime: CurrentRuntime, form: Annotated[RevocationForm, Form()]) -> Response:
    """Log out with an access or a refresh token (RFC 7009); 200 also for a token that nobody knows."""
    if form.token:
        await log_out(runtime, unknown_callers(request, "auth.revoke"), form.token)
    return Response(status_code=200, headers=NO_STORE)


@router.get("/v1/auth/me", tags=["auth"], responses=_GUARDED)
async def show_me(action: Annotated[Action, Depends(acting("auth.me", is_read=True))]) -> Me:
    """Who the token's bearer is, and what they may do and see."""
    caller = _caller(action)
    names = await shown(caller.galleries)
    galleries = None if names is None else list(names)
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
        await change_password(runtime, action, body.current_password, body.new_password)


@router.post("/v1/auth/totp", tags=["auth"], status_code=201, responses=_CHANGES | problems(Conflict, AlreadyCreated))
async def begin_my_second_factor(
    request: Request,
    response: Response,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("auth.totp.begin"))],
    body: FactorBeginning,
    key: IdempotencyKey = None,
) -> FactorSecret:
    """Begin one's own second factor (TOTP): a secret, shown this once; in force when a code of it was confirmed."""
    await first_answer(runtime, request, action, key, body.model_dump(), holds_secret=True)
    begun = await begin_second_factor(runtime, action, body.current_password)
    response.headers.update(NO_STORE)
    return FactorSecret(secret=begun.secret, uri=begun.uri)


@router.post("/v1/auth/totp/confirm", tags=["auth"], status_code=204, responses=_CHANGES)
async def confirm_my_second_factor(
    request: Request,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("auth.totp.confirm"))],
    body: FactorProof,
    key: IdempotencyKey = None,
) -> None:
    """Confirm one's own second factor by a code; from now on each login by password needs one."""
    if await first_answer(runtime, request, action, key, body.model_dump()) is None:
        await confirm_second_factor(runtime, action, body.otp)


@router.delete("/v1/auth/totp", tags=["auth"], status_code=204, responses=_CHANGES)
async def remove_my_second_factor(
    request: Request,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("auth.totp.remove"))],
    body: FactorRemoval,
    key: IdempotencyKey = None,
) -> None:
    """Remove one's own second factor, by the password or a code."""
    if await first_answer(runtime, request, action, key, body.model_dump()) is None:
        await remove_second_factor(runtime, action, body.current_password, body.otp)


@router.get(
    "/.well-known/jwks.json",
    tags=["auth"],
    responses=problems(DependencyUnavailable),
    dependencies=[Depends(Strangers("read"))],
)
async def show_public_keys(response: Response, runtime: CurrentRuntime) -> Jwks:
    """The public keys of access tokens and assertions."""
    response.headers["Cache-Control"] = f"public, max-age={PUBLISHED_FOR_SECONDS}"
    keys = await runtime.access.public_keys()
    return Jwks(keys=[PublicJwk(kid=key.key_id, x=_base64url(key.raw)) for key in keys])


async def _granted(request: Request, runtime: CurrentRuntime, form: TokenForm, authorization: str | None) -> Grant:
    match form.grant_type:
        case "password":
            action = unknown_callers(request, "auth.login")
            return await log_in(runtime, action, _given(form.username), _given(form.password), form.otp)
        case "client_credentials":
            client_id, secret = _client_credentials(form, authorization)
            return await log_in_client(runtime, unknown_callers(request, "auth.login"), client_id, secret)
        case "refresh_token":
            action = unknown_callers(request, "auth.refresh")
            return await refresh(runtime, action, _given(form.refresh_token))
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
        client_id, _, secret = (unquote_plus(part, errors="strict") for part in text.partition(":"))
    except ValueError as error:
        raise GrantRefused("invalid_request", "The Authorization header cannot be read.") from error
    return _given(client_id), _given(secret)


def _oauth_error(refusal: GrantRefused) -> JSONResponse:
    error = OAuthError(error=refusal.code, error_description=refusal.description)
    return JSONResponse(error.model_dump(), 400, NO_STORE)


def _caller(action: Action) -> Caller:
    if action.caller is None:
        raise Unauthenticated
    return action.caller


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
