"""Users over HTTP: the people who may log in, kept by admins."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, with_config
from typing_extensions import TypedDict

from app.access.grants import named
from app.api.bodies import StrictRoute
from app.api.dependencies import CurrentRuntime, IdempotencyKey, acting, first_answer
from app.api.paging import Page, Paged, page_of
from app.api.problems import CHANGES, problems
from app.api.shapes import Body, Galleries, Moment, PlainText, UserRoles
from app.audit import Action
from app.documents.accounts import User, kept_account, kept_by
from app.documents.galleries import Gallery
from app.domain.callers import USERNAME_MAXIMUM, Role
from app.errors import (
    DependencyUnavailable,
    Forbidden,
    NotFound,
    Unauthenticated,
    Validation,
)
from app.use_cases import keep_users
from app.use_cases.keep_users import UserFields

router = APIRouter(
    route_class=StrictRoute,
    prefix="/v1/users",
    tags=["users"],
    responses=problems(Unauthenticated, Forbidden, Validation, DependencyUnavailable),
)

Username = Annotated[PlainText, Field(min_length=1, max_length=USERNAME_MAXIMUM)]


class NewUser(Body):
    """A user to be made. galleries: names; null means all, [] none."""

    username: Username
    password: str
    roles: UserRoles
    galleries: Galleries = None


@with_config(ConfigDict(extra="forbid"))
class UserPatch(TypedDict, total=False):
    """A merge patch (RFC 7396): what is left out stays, `galleries: null` means all.

    second_factor: false takes it away from somebody who lost it; only they themselves can have one.
    """

    username: Username
    password: str
    roles: UserRoles
    galleries: Galleries
    disabled: StrictBool
    second_factor: Literal[False]


class UserAnswer(BaseModel):
    """A user."""

    id: str
    username: str
    roles: list[Role]
    galleries: list[str] | None
    disabled: bool
    second_factor: bool
    created_at: Moment
    updated_at: Moment


_ONE = problems(NotFound)


@router.get("")
async def list_users(
    request: Request,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("user.list", Role.ADMIN, is_read=True))],
    page: Annotated[Page, Depends()],
) -> Paged[UserAnswer]:
    """All users, newest first."""
    users, cursor = await page_of(User, kept_by(action.caller), page, request, runtime.keys)
    names = await Gallery.names_by_id([id_ for user in users for id_ in user.galleries or ()])
    return Paged[UserAnswer](items=[_user(user, names) for user in users], next_cursor=cursor)


@router.post("", status_code=201, responses=CHANGES)
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
        user = await keep_users.create_user(runtime, action, fields, body.password)
    else:
        user = await kept_account(User, first[0].subject.id or "", action.caller)
    response.headers["Location"] = f"/v1/users/{user.id}"
    return await _shown(user)


@router.get("/{user_id}", responses=_ONE)
async def show_user(
    user_id: str, action: Annotated[Action, Depends(acting("user.read", Role.ADMIN, is_read=True))]
) -> UserAnswer:
    """One user."""
    return await _shown(await kept_account(User, user_id, action.caller))


@router.patch("/{user_id}", responses=CHANGES | _ONE)
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
        return await _shown(await kept_account(User, user_id, action.caller))
    password = patch.get("password")
    return await _shown(
        await keep_users.update_user(runtime, action, user_id, lambda old: _patched_user(old, patch), password)
    )


@router.delete("/{user_id}", status_code=204, responses=CHANGES | _ONE)
async def delete_user(
    user_id: str,
    request: Request,
    runtime: CurrentRuntime,
    action: Annotated[Action, Depends(acting("user.delete", Role.ADMIN))],
    key: IdempotencyKey = None,
) -> None:
    """Remove a user; the tokens hold no more."""
    if await first_answer(runtime, request, action, key, None) is None:
        await keep_users.delete_user(runtime, action, user_id)


def _patched_user(old: UserFields, patch: UserPatch) -> UserFields:
    return UserFields(
        username=patch.get("username", old.username),
        roles=patch.get("roles", old.roles),
        galleries=patch.get("galleries", old.galleries),
        disabled=patch.get("disabled", old.disabled),
        has_second_factor=patch.get("second_factor", old.has_second_factor),
    )


async def _shown(user: User) -> UserAnswer:
    return _user(user, await Gallery.names_by_id(user.galleries or ()))


def _user(user: User, names: dict[str, str]) -> UserAnswer:
    return UserAnswer(
        id=user.id,
        username=user.username,
        roles=sorted(user.roles),
        galleries=None if user.galleries is None else list(named(user.galleries, names)),
        disabled=user.disabled,
        second_factor=user.totp_confirmed,
        created_at=user.created_at,
        updated_at=user.updated_at,
    )
