"""The account verbs: logging in and out, and keeping users and client applications.

Each change and its audit event are one transaction. Doors to the API, to the command line and to the development
stack alike; nothing here knows HTTP.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Literal

from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from app import audit
from app.access import (
    TokenClaims,
    check_password,
    client_as_caller,
    hash_password,
    login_holds,
    new_secret,
    password_matches,
    secret_digest,
    user_as_caller,
)
from app.audit import Action, by_system
from app.documents.accounts import Client, Login, RefreshToken, RevokedToken, User
from app.documents.base import new_id, now
from app.domain.callers import Role, username_key
from app.errors import Advice, Conflict, Forbidden, NotFound, Unauthenticated, Validation
from app.runtime import Runtime

#: Longer ones are nobody's; they are not even looked for.
USERNAME_MAXIMUM: Final = 64
#: A login is kept for as long as an access token of it may live (ACCESS_TOKEN_EXPIRE_MINUTES is a day at most).
LONGEST_ACCESS: Final = timedelta(days=1)

GrantError = Literal["invalid_request", "invalid_client", "invalid_grant", "unsupported_grant_type"]


class GrantRefused(Exception):
    """No token is given, in the words of RFC 6749, 5.2."""

    def __init__(self, code: GrantError, description: str) -> None:
        """code: OAuth's; description: for the developer, the same whatever was wrong with a credential."""
        super().__init__(description)
        self.code = code
        self.description = description


@dataclass(frozen=True, slots=True)
class Grant:
    """What a successful login brings. refresh_token: people only. scope: the roles."""

    access_token: str
    expires_in_seconds: int
    refresh_token: str | None
    scope: str


@dataclass(frozen=True, slots=True)
class UserFields:
    """What an admin may change of a user, besides the password."""

    username: str
    roles: tuple[Role, ...]
    galleries: tuple[str, ...] | None
    disabled: bool = False


@dataclass(frozen=True, slots=True)
class ClientFields:
    """What an admin may change of a client application."""

    name: str
    roles: tuple[Role, ...]
    galleries: tuple[str, ...] | None
    audiences: tuple[str, ...] = ()


async def log_in(runtime: Runtime, action: Action, username: str, password: str) -> Grant:
    """A person's login by password. Raises GrantRefused, with one text and in one time for every reason."""
    user = await User.find_one({"username_key": username_key(username)}) if len(username) <= USERNAME_MAXIMUM else None
    matches = await runtime.compute(password_matches, password, user.password_hash if user else None)
    if user is None or not matches or user.disabled:
        reason = "unknown_user" if user is None else "disabled" if matches else "wrong_password"
        await _record_denied(runtime, action, user, reason)
        raise GrantRefused("invalid_grant", "The username or the password is wrong.")

    moment = now()
    ends_at = moment + timedelta(hours=runtime.settings.refresh_token_absolute_hours)
    login = Login(
        user_id=user.id,
        # As it was when the password matched: a change of password in between makes this login void.
        session_version=user.session_version,
        created_at=moment,
        ends_at=ends_at,
        purge_at=ends_at + LONGEST_ACCESS,
    )
    secret = new_secret()
    acting = replace(action, caller=user_as_caller(user, session_id=login.id))

    async def body(session: AsyncClientSession) -> None:
        await login.insert(session=session)
        await _next_refresh_token(runtime, login, secret, moment).insert(session=session)
        await audit.record(session, acting, subject_kind="user", subject_id=user.id, detail={"grant": "password"})

    await runtime.transaction(body)
    return _grant(runtime, user, login.id, secret)


async def log_in_client(runtime: Runtime, action: Action, client_id: str, client_secret: str) -> Grant:
    """A client application's login by its secret. Raises GrantRefused."""
    client = await Client.get(client_id)
    if client is None or not runtime.access.client_secret_matches(client_secret, client):
        await _record_denied(runtime, action, client, "unknown_client" if client is None else "wrong_secret")
        raise GrantRefused("invalid_client", "The client or its secret is wrong.")
    acting = replace(action, caller=client_as_caller(client))

    async def body(session: AsyncClientSession) -> None:
        detail: dict[str, str | int | float | bool | None] = {"grant": "client_credentials"}
        await audit.record(session, acting, subject_kind="client", subject_id=client.id, detail=detail)

    await runtime.transaction(body)
    return _grant(runtime, client, None, None)


async def refresh(runtime: Runtime, action: Action, refresh_token: str) -> Grant:
    """New tokens for a refresh token, which is used up by it.

    One that was used before ends its whole login: either the thief or the owner holds a copy. Of two uses at the same
    moment exactly one wins, and the other one ends the login. Raises GrantRefused.
    """
    digest, secret = secret_digest(refresh_token), new_secret()

    async def body(session: AsyncClientSession) -> tuple[User, Login] | None:
        presented = await RefreshToken.get(digest, session=session)
        login = None if presented is None else await Login.get(presented.login_id, session=session)
        user = None if login is None else await User.get(login.user_id, session=session)
        if presented is None or login is None or user is None:
            return None
        moment = now()
        acting = replace(action, caller=user_as_caller(user, session_id=login.id))
        reason = _why_not_refreshed(presented, login, user, moment)
        if reason is not None:
            if reason == "reuse":
                await login.update({"$set": {"revoked_at": moment}}, session=session)
            detail: dict[str, str | int | float | bool | None] = {"reason": reason}
            await audit.record(
                session, acting, subject_kind="login", subject_id=login.id, outcome="denied", detail=detail
            )
            return None
        # A second use at the same moment conflicts here, starts over, and finds it used.
        await presented.update({"$set": {"used_at": moment}}, session=session)
        await _next_refresh_token(runtime, login, secret, moment).insert(session=session)
        await audit.record(session, acting, subject_kind="login", subject_id=login.id)
        return user, login

    refreshed = await runtime.transaction(body)
    if refreshed is None:
        runtime.access.forget()
        raise GrantRefused("invalid_grant", "The refresh token does not hold (any more).")
    user, login = refreshed
    return _grant(runtime, user, login.id, secret)


async def log_out(runtime: Runtime, action: Action, token: str) -> None:
    """Revoke an access or a refresh token; a person's login ends as a whole, with all its tokens.

    A token that is not genuine, or revoked already, changes nothing and is no error (RFC 7009).
    """
    try:
        claims = await runtime.access.read(token)
    except Unauthenticated:
        presented = await RefreshToken.get(secret_digest(token))
        if presented is not None:
            await _end_login(runtime, action, presented.login_id)
    else:
        if claims.kind == "client":
            await _revoke_client_token(runtime, action, claims)
        elif claims.session_id is not None:
            await _end_login(runtime, action, claims.session_id)
    runtime.access.forget()


async def change_password(runtime: Runtime, action: Action, current: str, new: str) -> None:
    """A person's own change of password; all other logins of theirs end, the one that they use goes on.

    Raises Validation (length), Forbidden (the current one is wrong, or a client asks), Conflict.
    """
    caller = action.caller
    if caller is None or caller.kind != "user" or caller.session_id is None:
        message = "Only people have a password; a client's secret is rotated by an admin."
        raise Forbidden(message)
    check_password(new)
    user = await User.get(caller.id)
    if user is None or not await runtime.compute(password_matches, current, user.password_hash):
        message = "The current password is wrong."
        raise Forbidden(message, errors=(Advice("current_password", "wrong", message),))
    hashed = await runtime.compute(hash_password, new)
    session_id, seen = caller.session_id, user.session_version

    async def body(session: AsyncClientSession) -> None:
        changed = await User.get_pymongo_collection().update_one(
            {"_id": user.id, "session_version": seen, "disabled": False},
            {"$set": {"password_hash": hashed, "session_version": seen + 1, "updated_at": now()}},
            session=session,
        )
        if changed.matched_count == 0:
            message = "The account was changed in the meantime; please log in again."
            raise Conflict(message)
        await Login.get_pymongo_collection().update_one(
            {"_id": session_id}, {"$set": {"session_version": seen + 1}}, session=session
        )
        await audit.record(session, action, subject_kind="user", subject_id=user.id)

    await runtime.transaction(body)
    runtime.access.forget()


async def create_user(runtime: Runtime, action: Action, fields: UserFields, password: str) -> User:
    """A new user. Raises Validation (password, roles) and Conflict (the username is taken)."""
    _check_user_roles(fields.roles)
    check_password(password)
    user = User(
        username=fields.username,
        username_key=username_key(fields.username),
        password_hash=await runtime.compute(hash_password, password),
        roles=list(fields.roles),
        galleries=_listed(fields.galleries),
        disabled=fields.disabled,
    )

    async def body(session: AsyncClientSession) -> None:
        await user.insert(session=session)
        detail: dict[str, str | int | float | bool | None] = {"roles": " ".join(sorted(fields.roles))}
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

    Other roles void the access tokens, another password or disabling ends the logins. Raises NotFound, Validation, and
    Conflict when the username is taken or no enabled admin would be left.
    """
    if password is not None:
        check_password(password)
    hashed = None if password is None else await runtime.compute(hash_password, password)

    async def body(session: AsyncClientSession) -> User:
        user = await User.get(user_id, session=session)
        if user is None:
            raise NotFound
        before = UserFields(user.username, tuple(user.roles), _frozen(user.galleries), user.disabled)
        after = edit(before)
        _check_user_roles(after.roles)
        if _is_acting_admin(before) and not _is_acting_admin(after):
            await _require_another_admin(user.id, session)
        has_other_roles = set(after.roles) != set(before.roles)
        ends_logins = hashed is not None or (after.disabled and not before.disabled)
        changes: dict[str, object] = {
            "username": after.username,
            "username_key": username_key(after.username),
            "roles": list(after.roles),
            "galleries": _listed(after.galleries),
            "disabled": after.disabled,
            "access_version": user.access_version + has_other_roles,
            "session_version": user.session_version + ends_logins,
            "updated_at": now(),
        }
        if hashed is not None:
            changes["password_hash"] = hashed
        await user.update({"$set": changes}, session=session)
        await audit.record(
            session,
            action,
            subject_kind="user",
            subject_id=user.id,
            detail={
                "roles": " ".join(sorted(after.roles)),
                "disabled": after.disabled,
                "renamed": after.username != before.username,
                "galleries_changed": after.galleries != before.galleries,
                "password_changed": hashed is not None,
            },
        )
        return user

    try:
        user = await runtime.transaction(body)
    except DuplicateKeyError as error:
        raise _username_taken() from error
    runtime.access.forget()
    return user


async def delete_user(runtime: Runtime, action: Action, user_id: str) -> None:
    """Remove a user; their tokens hold no more. Raises NotFound, and Conflict for the last enabled admin."""

    async def body(session: AsyncClientSession) -> None:
        user = await User.get(user_id, session=session)
        if user is None:
            raise NotFound
        if Role.ADMIN in user.roles and not user.disabled:
            await _require_another_admin(user.id, session)
        await user.delete(session=session)
        await audit.record(session, action, subject_kind="user", subject_id=user.id, status_code=204)

    await runtime.transaction(body)
    runtime.access.forget()


async def create_client(runtime: Runtime, action: Action, fields: ClientFields) -> tuple[Client, str]:
    """A new client application, and its secret, which nobody can read again. Raises Validation (roles)."""
    secret = new_secret()
    client = await _insert_client(runtime, action, new_id(), secret, fields)
    return client, secret


async def update_client(
    runtime: Runtime, action: Action, client_id: str, edit: Callable[[ClientFields], ClientFields]
) -> Client:
    """Change a client; `edit` as in `update_user`. Other roles void its access tokens. Raises NotFound, Validation."""

    async def body(session: AsyncClientSession) -> Client:
        client = await Client.get(client_id, session=session)
        if client is None:
            raise NotFound
        before = ClientFields(client.name, tuple(client.roles), _frozen(client.galleries), tuple(client.audiences))
        after = edit(before)
        _check_roles(after.roles)
        has_other_roles = set(after.roles) != set(before.roles)
        changes: dict[str, object] = {
            "name": after.name,
            "roles": list(after.roles),
            "galleries": _listed(after.galleries),
            "audiences": list(after.audiences),
            "access_version": client.access_version + has_other_roles,
            "updated_at": now(),
        }
        await client.update({"$set": changes}, session=session)
        await audit.record(
            session,
            action,
            subject_kind="client",
            subject_id=client.id,
            detail={
                "roles": " ".join(sorted(after.roles)),
                "renamed": after.name != before.name,
                "galleries_changed": after.galleries != before.galleries,
                "audiences_changed": after.audiences != before.audiences,
            },
        )
        return client

    client = await runtime.transaction(body)
    runtime.access.forget()
    return client


async def rotate_client_secret(runtime: Runtime, action: Action, client_id: str) -> tuple[Client, str]:
    """A fresh secret for a client; the old one and all tokens got with it hold no more. Raises NotFound."""
    secret = new_secret()
    secret_hash = runtime.access.client_secret_hash(secret)

    async def body(session: AsyncClientSession) -> Client:
        client = await Client.get(client_id, session=session)
        if client is None:
            raise NotFound
        changes = {"secret_hash": secret_hash, "access_version": client.access_version + 1, "updated_at": now()}
        await client.update({"$set": changes}, session=session)
        await audit.record(session, action, subject_kind="client", subject_id=client.id)
        return client

    client = await runtime.transaction(body)
    runtime.access.forget()
    return client, secret


async def delete_client(runtime: Runtime, action: Action, client_id: str) -> None:
    """Remove a client application; its tokens hold no more. Raises NotFound."""

    async def body(session: AsyncClientSession) -> None:
        client = await Client.get(client_id, session=session)
        if client is None:
            raise NotFound
        await client.delete(session=session)
        await audit.record(session, action, subject_kind="client", subject_id=client.id, status_code=204)

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
    user = await User.find_one({"username_key": username_key(fields.username)})
    if user is None:
        return await create_user(runtime, by_system("user.create"), fields, password)
    is_same_password = await runtime.compute(password_matches, password, user.password_hash)
    stored = UserFields(user.username, tuple(user.roles), _frozen(user.galleries), user.disabled)
    if is_same_password and stored == fields:
        return user
    new_password = None if is_same_password else password
    return await update_user(runtime, by_system("user.update"), user.id, lambda _: fields, new_password)


async def ensure_client(runtime: Runtime, client_id: str, client_secret: str, fields: ClientFields) -> Client:
    """Make a client of this id and secret, or bring it to them: for development credentials.

    client_secret: 256 random bits as text (`access.new_secret`), for it is not hashed slowly.
    """
    client = await Client.get(client_id)
    if client is None:
        return await _insert_client(runtime, by_system("client.create"), client_id, client_secret, fields)
    if not runtime.access.client_secret_matches(client_secret, client):
        secret_hash = runtime.access.client_secret_hash(client_secret)

        async def body(session: AsyncClientSession) -> None:
            await client.update({"$set": {"secret_hash": secret_hash}, "$inc": {"access_version": 1}}, session=session)
            await audit.record(session, by_system("client.rotate"), subject_kind="client", subject_id=client.id)

        await runtime.transaction(body)
    stored = ClientFields(client.name, tuple(client.roles), _frozen(client.galleries), tuple(client.audiences))
    if stored != fields:
        return await update_client(runtime, by_system("client.update"), client_id, lambda _: fields)
    return client


async def _insert_client(runtime: Runtime, action: Action, client_id: str, secret: str, fields: ClientFields) -> Client:
    _check_roles(fields.roles)
    client = Client(
        id=client_id,
        name=fields.name,
        secret_hash=runtime.access.client_secret_hash(secret),
        roles=list(fields.roles),
        galleries=_listed(fields.galleries),
        audiences=list(fields.audiences),
    )

    async def body(session: AsyncClientSession) -> None:
        await client.insert(session=session)
        detail: dict[str, str | int | float | bool | None] = {"roles": " ".join(sorted(fields.roles))}
        await audit.record(session, action, subject_kind="client", subject_id=client.id, detail=detail, status_code=201)

    await runtime.transaction(body)
    return client


def _grant(runtime: Runtime, principal: User | Client, session_id: str | None, secret: str | None) -> Grant:
    token = runtime.access.issue(principal, session_id)
    return Grant(token.text, token.expires_in_seconds, secret, " ".join(sorted(principal.roles)))


def _next_refresh_token(runtime: Runtime, login: Login, secret: str, moment: datetime) -> RefreshToken:
    sliding = moment + timedelta(hours=runtime.settings.refresh_token_sliding_hours)
    return RefreshToken(
        id=secret_digest(secret),
        login_id=login.id,
        expires_at=min(sliding, login.ends_at),
        purge_at=login.purge_at,
    )


def _why_not_refreshed(presented: RefreshToken, login: Login, user: User, moment: datetime) -> str | None:
    if presented.used_at is not None:
        return "reuse"
    if user.disabled:
        return "disabled"
    if not login_holds(login, user):
        return "revoked"
    return "expired" if moment >= presented.expires_at else None


async def _record_denied(runtime: Runtime, action: Action, principal: User | Client | None, reason: str) -> None:
    """The refusal's event. A name that nobody bears is not kept: people type their passwords there."""
    match principal:
        case User():
            action, kind = replace(action, caller=user_as_caller(principal)), "user"
        case Client():
            action, kind = replace(action, caller=client_as_caller(principal)), "client"
        case None:
            kind = "none"
            if not await audit.is_first_of_stranger(action):
                return

    async def body(session: AsyncClientSession) -> None:
        await audit.record(
            session,
            action,
            subject_kind=kind,
            subject_id=None if principal is None else principal.id,
            outcome="denied",
            detail={"reason": reason},
        )

    await runtime.transaction(body)


async def _end_login(runtime: Runtime, action: Action, login_id: str) -> None:
    async def body(session: AsyncClientSession) -> None:
        login = await Login.get(login_id, session=session)
        if login is None or login.revoked_at is not None:
            return
        await login.update({"$set": {"revoked_at": now()}}, session=session)
        user = await User.get(login.user_id, session=session)
        acting = action if user is None else replace(action, caller=user_as_caller(user, session_id=login.id))
        await audit.record(session, acting, subject_kind="login", subject_id=login.id)

    await runtime.transaction(body)


async def _revoke_client_token(runtime: Runtime, action: Action, claims: TokenClaims) -> None:
    async def body(session: AsyncClientSession) -> None:
        client = await Client.get(claims.subject, session=session)
        if client is None or await RevokedToken.get(claims.token_id, session=session) is not None:
            return
        await RevokedToken(id=claims.token_id, purge_at=now() + LONGEST_ACCESS).insert(session=session)
        acting = replace(action, caller=client_as_caller(client, token_id=claims.token_id))
        await audit.record(session, acting, subject_kind="client", subject_id=client.id)

    try:
        await runtime.transaction(body)
    except DuplicateKeyError:
        return  # revoked by a request at the same moment


def _is_acting_admin(fields: UserFields) -> bool:
    return Role.ADMIN in fields.roles and not fields.disabled


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


def _check_roles(roles: tuple[Role, ...]) -> None:
    if not roles or len(set(roles)) != len(roles):
        message = "One or more different roles are needed."
        raise Validation(message, errors=(Advice("roles", "roles", message),))


def _check_user_roles(roles: tuple[Role, ...]) -> None:
    _check_roles(roles)
    if Role.RELYING_APP in roles:
        message = "`relying_app` is a role of client applications only."
        raise Validation(message, errors=(Advice("roles", "clients-only", message),))


def _username_taken() -> Conflict:
    message = "The username is taken."
    return Conflict(message, errors=(Advice("username", "taken", message),))


def _frozen(names: list[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def _listed(names: tuple[str, ...] | None) -> list[str] | None:
    return None if names is None else list(names)
