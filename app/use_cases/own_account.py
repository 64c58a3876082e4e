"""What people do with their own account: another password, and the second factor.

Who wants to change either proves once more who they are: a token left behind, or stolen, is not enough. Wrong proofs cost
time like failed logins.
"""

from dataclasses import dataclass

from pymongo.asynchronous.client_session import AsyncClientSession

from app import audit
from app.access.passwords import check_password
from app.access.second_factor import new_totp, sealed_totp, step_of, totp_uri
from app.audit import Action
from app.documents.accounts import Login, User
from app.documents.base import now
from app.documents.events import Detail
from app.domain.changes import changes
from app.errors import Advice, Conflict, Forbidden
from app.runtime import Runtime


@dataclass(frozen=True, slots=True)
class NewFactor:
    """A second factor that was begun: its secret, and the same for an authenticator; shown this once."""

    secret: str
    uri: str


async def change_password(runtime: Runtime, action: Action, current: str, new: str) -> None:
    """A person's own change of password; all other logins of theirs end, the one that they use goes on.

    Raises Validation (length), Forbidden (the current one is wrong, or a client asks), RateLimited, Conflict.
    """
    session_id = None if action.caller is None else action.caller.session_id
    check_password(new, refuse_common=runtime.settings.is_production)
    user = await _person(action)
    await _require_password(runtime, action, user, current)
    hashed = await runtime.passwords.hashed(new)
    seen = user.session_version

    async def body(session: AsyncClientSession) -> None:
        changed = await User.get_pymongo_collection().update_one(
            {"_id": user.id, "session_version": seen, "disabled": False},
            {"$set": {"password_hash": hashed, "session_version": seen + 1, "updated_at": now()}},
            session=session,
        )
        if changed.matched_count == 0:
            raise _changed()
        await Login.get_pymongo_collection().update_one(
            {"_id": session_id}, {"$set": {"session_version": seen + 1}}, session=session
        )
        detail: Detail = {"password_changed": True}
        await audit.record(session, action, subject_kind="user", subject_id=user.id, detail=detail)

    await runtime.transaction(body)
    runtime.access.forget()


async def begin_second_factor(runtime: Runtime, action: Action, current_password: str) -> NewFactor:
    """A fresh secret, in force once a code of it was confirmed; one begun before is forgotten.

    Raises Forbidden (wrong password, or a client asks), RateLimited, and Conflict where one is in force.
    """
    user = await _person(action)
    await _require_password(runtime, action, user, current_password)
    secret = new_totp()
    fields = {"sealed_totp": sealed_totp(runtime.keys, secret, user.id), "totp_step": -1, "updated_at": now()}

    async def body(session: AsyncClientSession) -> None:
        begun = await User.get_pymongo_collection().update_one(
            {"_id": user.id, "totp_confirmed": {"$ne": True}}, {"$set": fields}, session=session
        )
        if begun.matched_count == 0:
            message = "A second factor is in force already; remove it first."
            raise Conflict(message)
        await audit.record(session, action, subject_kind="user", subject_id=user.id)

    await runtime.transaction(body)
    return NewFactor(secret, totp_uri(secret, user.username))


async def confirm_second_factor(runtime: Runtime, action: Action, otp: str) -> None:
    """From now on a login needs a code. Raises Forbidden (wrong code), RateLimited, and Conflict where none was begun."""
    user = await _person(action)
    if user.sealed_totp is None or user.totp_confirmed:
        message = "No second factor waits for its confirmation."
        raise Conflict(message)
    step = await _require_code(runtime, action, user, otp)
    fields = {"totp_confirmed": True, "totp_step": step, "updated_at": now()}
    await _change_factor(runtime, action, user, {"totp_confirmed": {"$ne": True}}, fields)


async def remove_second_factor(runtime: Runtime, action: Action, current_password: str | None, otp: str | None) -> None:
    """The password is enough from now on; proved by the password, or else by a code.

    Raises Forbidden (neither is right), RateLimited, and Conflict where there is no second factor.
    """
    user = await _person(action)
    if user.sealed_totp is None:
        message = "There is no second factor."
        raise Conflict(message)
    if current_password is not None:
        await _require_password(runtime, action, user, current_password)
    else:
        await _require_code(runtime, action, user, otp)
    fields: dict[str, object] = {"sealed_totp": None, "totp_confirmed": False, "totp_step": -1, "updated_at": now()}
    await _change_factor(runtime, action, user, {}, fields)


async def _change_factor(
    runtime: Runtime, action: Action, user: User, condition: dict[str, object], fields: dict[str, object]
) -> None:
    # The very secret that was looked at: another one may have been begun in the meantime.
    same = {"_id": user.id, "sealed_totp": user.sealed_totp, "totp_step": user.totp_step, **condition}

    async def body(session: AsyncClientSession) -> None:
        changed = await User.get_pymongo_collection().update_one(same, {"$set": fields}, session=session)
        if changed.matched_count == 0:
            raise _changed()
        told = changes({"second_factor": user.totp_confirmed}, {"second_factor": bool(fields["totp_confirmed"])})
        await audit.record(session, action, subject_kind="user", subject_id=user.id, detail={"changes": told})

    await runtime.transaction(body)


async def _person(action: Action) -> User:
    caller = action.caller
    user = await User.get(caller.id) if caller is not None and caller.kind == "user" else None
    if user is None:
        message = "Only people have a password and a second factor; a client's secret is rotated by an admin."
        raise Forbidden(message)
    return user


async def _require_password(runtime: Runtime, action: Action, user: User, password: str) -> None:
    attempt = await runtime.backoff.begin(user.backoff_name, action.ip)
    if not await runtime.passwords.matches(password, user.password_hash):
        await attempt.failed()
        message = "The current password is wrong."
        raise Forbidden(message, errors=(Advice("current_password", "wrong", message),))
    await attempt.succeeded()


async def _require_code(runtime: Runtime, action: Action, user: User, otp: str | None) -> int:
    attempt = await runtime.backoff.begin(user.backoff_name, action.ip)
    step = step_of(runtime.keys, user, otp)
    if step is None:
        await attempt.failed()
        message = "The one-time code is wrong, or was used before."
        raise Forbidden(message, errors=(Advice("otp", "wrong", message),))
    await attempt.succeeded()
    return step


def _changed() -> Conflict:
    message = "The account was changed in the meantime; please log in again."
    return Conflict(message)
