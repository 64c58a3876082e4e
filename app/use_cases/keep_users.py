"""Keeping users: making, changing and removing people who may log in.

Each change and its audit event are one transaction. An admin who is bound to galleries keeps the people of those only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from app import audit
from app.access.grants import check_roles, granted, shown
from app.access.passwords import check_password
from app.audit import Action, by_system
from app.documents.accounts import User, kept_account
from app.documents.base import now
from app.documents.events import Detail
from app.domain.callers import USER_ROLES, Role, username_key
from app.domain.changes import FieldValue, changes
from app.errors import Advice, Conflict, NotFound
from app.runtime import Runtime

_WITHOUT_FACTOR: Final[dict[str, object]] = {"sealed_totp": None, "totp_confirmed": False, "totp_step": -1}


@dataclass(frozen=True, slots=True)
class UserFields:
    """What an admin may change of a user, besides the password. galleries: names. has_second_factor: only ever taken away."""

    username: str
    roles: tuple[Role, ...]
    galleries: tuple[str, ...] | None
    disabled: bool = False
    has_second_factor: bool = False

    @classmethod
    def of(cls, user: User, galleries: tuple[str, ...] | None) -> "UserFields":
        """A user's fields as they are, with the names of their galleries."""
        return cls(user.username, tuple(user.roles), galleries, user.disabled, user.totp_confirmed)

    @property
    def is_acting_admin(self) -> bool:
        """Whether this is an admin who may log in."""
        return Role.ADMIN in self.roles and not self.disabled

    @property
    def told(self) -> dict[str, FieldValue]:
        """What events record of the fields. The name is not among them: it is personal."""
        return {
            "roles": sorted(self.roles), "galleries": None if self.galleries is None else sorted(self.galleries),
            "disabled": self.disabled, "second_factor": self.has_second_factor,
        }  # fmt: skip


async def create_user(runtime: Runtime, action: Action, fields: UserFields, password: str) -> User:
    """A new user.

    Raises Validation (password, roles, unknown galleries), Forbidden (galleries that the caller does not have) and Conflict (the
    username is taken).
    """
    check_roles(fields.roles, USER_ROLES)
    check_password(password, refuse_common=runtime.settings.is_production)
    user = User(
        username=fields.username,
        username_key=username_key(fields.username),
        password_hash=await runtime.passwords.hashed(password),
        roles=list(fields.roles),
        galleries=[],
        disabled=fields.disabled,
    )

    async def body(session: AsyncClientSession) -> None:
        user.galleries = await granted(action.caller, fields.galleries, session)
        await _require_free(fields.username, user, session)
        await user.insert(session=session)
        detail: Detail = {"changes": changes({}, fields.told)}
        await audit.record(session, action, subject_kind="user", subject_id=user.id, detail=detail, status_code=201)

    try:
        await runtime.transaction(body)
    except DuplicateKeyError as error:
        raise _username_taken() from error
    return user


async def update_user(
    runtime: Runtime,
    action: Action,
    user_id: str,
    edit: Callable[[UserFields], UserFields],
    password: str | None = None,
) -> User:
    """Change a user. `edit` gives the new fields for the present ones; it may be asked more than once.

    Other roles void the access tokens, another password or disabling ends the logins; another password forgives the failed
    ones. Raises NotFound, Validation, Forbidden (as `create_user`), and Conflict when the username is taken or no enabled
    admin would be left.
    """
    if password is not None:
        check_password(password, refuse_common=runtime.settings.is_production)
    hashed = None if password is None else await runtime.passwords.hashed(password)

    async def body(session: AsyncClientSession) -> User:
        user = await kept_account(User, user_id, action.caller, session)
        before = UserFields.of(user, await shown(user.galleries, session))
        after = edit(before)
        if after.roles != before.roles:
            check_roles(after.roles, USER_ROLES)
        if before.is_acting_admin and not after.is_acting_admin:
            await _require_another_admin(user.id, session)
        has_other_roles = set(after.roles) != set(before.roles)
        ends_logins = hashed is not None or (after.disabled and not before.disabled)
        loses_factor = before.has_second_factor and not after.has_second_factor
        fields: dict[str, object] = {
            **await _renamed(user, after.username, session),
            "roles": list(after.roles),
            "disabled": after.disabled,
            "access_version": user.access_version + has_other_roles,
            "session_version": user.session_version + ends_logins,
            "updated_at": now(),
        }
        if after.galleries != before.galleries:
            fields["galleries"] = await granted(action.caller, after.galleries, session)
        if hashed is not None:
            fields["password_hash"] = hashed
        if loses_factor:
            fields |= _WITHOUT_FACTOR
        await user.update({"$set": fields}, session=session)
        await audit.record(
            session,
            action,
            subject_kind="user",
            subject_id=user.id,
            detail={
                "changes": changes(before.told, after.told),
                "renamed": after.username != before.username,
                "password_changed": hashed is not None,
            },
        )
        return user

    try:
        user = await runtime.transaction(body)
    except DuplicateKeyError as error:
        raise _username_taken() from error
    if hashed is not None:
        await runtime.backoff.forgive(user.backoff_name)
    runtime.access.forget()
    return user


async def delete_user(runtime: Runtime, action: Action, user_id: str) -> None:
    """Remove a user; their tokens hold no more. Raises NotFound, and Conflict for the last enabled admin."""

    async def body(session: AsyncClientSession) -> None:
        user = await kept_account(User, user_id, action.caller, session)
        fields = UserFields.of(user, await shown(user.galleries, session))
        if fields.is_acting_admin:
            await _require_another_admin(user.id, session)
        await user.delete(session=session)
        detail: Detail = {"changes": changes(fields.told, {})}
        await audit.record(session, action, subject_kind="user", subject_id=user.id, detail=detail, status_code=204)

    await runtime.transaction(body)
    runtime.access.forget()


async def ensure_admin(runtime: Runtime, username: str, password: str) -> bool:
    """Make the first admin; nothing where an enabled one is there already. Returns whether one was made.

    Raises Validation (password) and Conflict (the name is a user's who is no admin, or disabled).
    """
    if await User.find_one({"roles": Role.ADMIN.value, "disabled": False}) is not None:
        return False
    await create_user(runtime, by_system("user.create"), UserFields(username, (Role.ADMIN,), None), password)
    return True


async def ensure_user(runtime: Runtime, fields: UserFields, password: str) -> User:
    """Make a user, or bring the one of this name to these fields and this password: for development credentials.

    Changes nothing, and ends no login, where all is so already.
    """
    user = await User.named(fields.username)
    if user is None:
        return await create_user(runtime, by_system("user.create"), fields, password)
    is_same_password = await runtime.passwords.matches(password, user.password_hash)
    if is_same_password and UserFields.of(user, await shown(user.galleries)) == fields:
        return user
    new_password = None if is_same_password else password
    return await update_user(runtime, by_system("user.update"), user.id, lambda _: fields, new_password)


async def unlock_user(runtime: Runtime, action: Action, username: str, *, takes_factor: bool = False) -> User:
    """Forgive a user's failed logins; takes_factor: and take their second factor away. Raises NotFound."""

    async def body(session: AsyncClientSession) -> User:
        user = await User.named(username, session)
        if user is None:
            message = f"There is no user {username}."
            raise NotFound(message)
        before = user.totp_confirmed
        if takes_factor:
            await user.update({"$set": _WITHOUT_FACTOR}, session=session)
        after = before and not takes_factor
        detail: Detail = {"changes": changes({"second_factor": before}, {"second_factor": after})}
        await audit.record(session, action, subject_kind="user", subject_id=user.id, detail=detail)
        return user

    user = await runtime.transaction(body)
    await runtime.backoff.forgive(user.backoff_name)
    return user


async def _require_another_admin(user_id: str, session: AsyncClientSession) -> None:
    """Raises Conflict when no other enabled admin is there.

    The other one is written to, so that two admins who remove each other at the same moment conflict, and the later
    one sees what the earlier one did.
    """
    other = await User.get_pymongo_collection().find_one_and_update(
        {"_id": {"$ne": user_id}, "roles": Role.ADMIN.value, "disabled": False}, {"$inc": {"touch": 1}}, session=session
    )
    if other is None:
        message = "This is the last enabled admin; make another one first."
        raise Conflict(message)


async def _renamed(user: User, username: str, session: AsyncClientSession) -> dict[str, str]:
    """The fields of a new name. A name that stays keeps the key by which its user logs in."""
    if username == user.username:
        return {}
    await _require_free(username, user, session)
    return {"username": username, "username_key": username_key(username)}


async def _require_free(username: str, user: User, session: AsyncClientSession) -> None:
    """Raises Conflict where another user has the name. The unique index does not know all spellings of older names."""
    holder = await User.named(username, session)
    if holder is not None and holder.id != user.id:
        raise _username_taken()


def _username_taken() -> Conflict:
    message = "The username is taken."
    return Conflict(message, errors=(Advice("username", "taken", message),))
