"""A login's life: it begins with a password or a client's secret, is renewed by refresh tokens, and ends.

Each step and its audit event are one transaction; nothing here knows HTTP.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Literal

import structlog
from prometheus_client import Counter
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from app import audit
from app.access.backoff import Attempt
from app.access.callers import client_as_caller, login_holds, new_secret, secret_digest, user_as_caller
from app.access.second_factor import step_of
from app.access.tokens import LONGEST_LIFE_SECONDS, TokenClaims
from app.audit import Action, by_system
from app.documents.accounts import Client, Login, RefreshToken, RevokedToken, User
from app.documents.base import now
from app.documents.claims import Once
from app.documents.events import Detail
from app.domain.callers import USERNAME_MAXIMUM, username_key
from app.errors import RateLimited, Unauthenticated
from app.runtime import Runtime

log = structlog.get_logger(__name__)

ATTACKED = Counter("idem_logins_under_attack", "Names whose logins failed from many networks, once a day each")
#: One attack is one event in this time.
ALARM_PERIOD: Final = timedelta(days=1)
#: A login is kept for as long as an access token of it may live.
LONGEST_ACCESS: Final = timedelta(seconds=LONGEST_LIFE_SECONDS)

WhyNotRefreshed = Literal["unknown_token", "refresh_reuse", "disabled", "revoked", "expired"]
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


async def log_in(runtime: Runtime, action: Action, username: str, password: str, otp: str | None = None) -> Grant:
    """A person's login by password, and by a one-time code where they have a second factor.

    Raises GrantRefused, with one text and in one time for every reason; RateLimited while failures cost time, whoever asks
    and with whatever password; NotReady when too many passwords are being looked at.
    """
    try:
        return await _log_in(runtime, action, username, password, otp)
    except RateLimited:
        await _record_denied(runtime, action, None, "waiting")
        raise


async def _log_in(runtime: Runtime, action: Action, username: str, password: str, otp: str | None) -> Grant:
    key = username_key(username)
    attempt = await runtime.backoff.begin(f"user:{key}", action.ip)
    user = await User.named(username) if len(username) <= USERNAME_MAXIMUM else None
    matches = await runtime.passwords.matches(password, user.password_hash if user else None, attempt.waits_as)
    if user is None or not matches or user.disabled:
        await _failed(attempt, user)
        reason = "unknown_user" if user is None else "disabled" if matches else "wrong_password"
        await _record_denied(runtime, action, user, reason)
        raise _wrong()
    step = step_of(runtime.keys, user, otp)
    if user.totp_confirmed and step is None:
        await _failed(attempt, user)
        await _record_denied(runtime, action, user, "wrong_code")
        raise _wrong()
    await attempt.succeeded()

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
    factors = "password otp" if user.totp_confirmed else "password"

    async def body(session: AsyncClientSession) -> bool:
        if user.totp_confirmed:
            # Of two logins with one code at the same moment, one conflicts here, starts over, and finds it used.
            fresh = {"_id": user.id, "totp_step": {"$lt": step}}
            used = await User.get_pymongo_collection().update_one(fresh, {"$set": {"totp_step": step}}, session=session)
            if used.matched_count == 0:
                return False
        await login.insert(session=session)
        await _next_refresh_token(runtime, login, secret, moment).insert(session=session)
        await audit.record(session, acting, subject_kind="user", subject_id=user.id, detail={"grant": factors})
        return True

    if not await runtime.transaction(body):
        await _record_denied(runtime, action, user, "used_code")
        raise _wrong()
    return await _grant(runtime, user, login.id, secret)


async def log_in_client(runtime: Runtime, action: Action, client_id: str, client_secret: str) -> Grant:
    """A client application's login by its secret. Raises GrantRefused, and RateLimited while failures cost time."""
    try:
        return await _log_in_client(runtime, action, client_id, client_secret)
    except RateLimited:
        await _record_denied(runtime, action, None, "waiting")
        raise


async def _log_in_client(runtime: Runtime, action: Action, client_id: str, client_secret: str) -> Grant:
    attempt = await runtime.backoff.begin(f"client:{client_id}", action.ip)
    client = await Client.get(client_id)
    matches = runtime.access.client_secret_matches(client_secret, client)
    if client is None or not matches:
        await _failed(attempt, client)
        await _record_denied(runtime, action, client, "unknown_client" if client is None else "wrong_secret")
        raise GrantRefused("invalid_client", "The client or its secret is wrong.")
    await attempt.succeeded()
    acting = replace(action, caller=client_as_caller(client))

    async def body(session: AsyncClientSession) -> None:
        detail: Detail = {"grant": "client_credentials"}
        await audit.record(session, acting, subject_kind="client", subject_id=client.id, detail=detail)

    await runtime.transaction(body)
    return await _grant(runtime, client, None, None)


async def refresh(runtime: Runtime, action: Action, refresh_token: str) -> Grant:
    """New tokens for a refresh token, which is used up by it.

    One that was used before ends its whole login: either the thief or the owner holds a copy. Of two uses at the same
    moment exactly one wins, and the other one ends the login. Raises GrantRefused.
    """
    digest, secret = secret_digest(refresh_token), new_secret()

    async def body(session: AsyncClientSession) -> tuple[User, Login] | WhyNotRefreshed:
        presented = await RefreshToken.get(digest, session=session)
        login = None if presented is None else await Login.get(presented.login_id, session=session)
        user = None if login is None else await User.get(login.user_id, session=session)
        if presented is None or login is None or user is None:
            return "unknown_token"
        moment = now()
        acting = replace(action, caller=user_as_caller(user, session_id=login.id))
        reason = _why_not_refreshed(presented, login, user, moment)
        if reason is not None:
            if reason == "refresh_reuse":
                await login.update({"$set": {"revoked_at": moment}}, session=session)
            detail: Detail = {"reason": reason}
            await audit.record(
                session, acting, subject_kind="login", subject_id=login.id, outcome="denied", detail=detail
            )
            return reason
        # A second use at the same moment conflicts here, starts over, and finds it used.
        await presented.update({"$set": {"used_at": moment}}, session=session)
        await _next_refresh_token(runtime, login, secret, moment).insert(session=session)
        await audit.record(session, acting, subject_kind="login", subject_id=login.id)
        return user, login

    refreshed = await runtime.transaction(body)
    if isinstance(refreshed, str):
        if refreshed == "unknown_token":
            await _record_denied(runtime, action, None, refreshed)
        else:
            runtime.access.forget()
        raise GrantRefused("invalid_grant", "The refresh token does not hold (any more).")
    user, login = refreshed
    return await _grant(runtime, user, login.id, secret)


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


async def _grant(runtime: Runtime, principal: User | Client, session_id: str | None, secret: str | None) -> Grant:
    token = await runtime.access.issue(principal, session_id)
    return Grant(token.text, token.expires_in_seconds, secret, " ".join(sorted(principal.roles)))


def _wrong() -> GrantRefused:
    # Whether there is a second factor, and whether the password was right without it, is nobody's business.
    return GrantRefused("invalid_grant", "The username, the password or the one-time code is wrong.")


def _next_refresh_token(runtime: Runtime, login: Login, secret: str, moment: datetime) -> RefreshToken:
    sliding = moment + timedelta(hours=runtime.settings.refresh_token_sliding_hours)
    return RefreshToken(
        id=secret_digest(secret),
        login_id=login.id,
        expires_at=min(sliding, login.ends_at),
        purge_at=login.purge_at,
    )


def _why_not_refreshed(presented: RefreshToken, login: Login, user: User, moment: datetime) -> WhyNotRefreshed | None:
    if presented.used_at is not None:
        return "refresh_reuse"
    if user.disabled:
        return "disabled"
    if not login_holds(login, user):
        return "revoked"
    return "expired" if moment >= presented.expires_at else None


async def _failed(attempt: Attempt, principal: User | Client | None) -> None:
    """Count the failure. An attack on the name becomes an event once a day, also if nobody bears the name."""
    attack = await attempt.failed()
    if attack is None or not await Once.is_first(f"login-attack:{attack.name}", ALARM_PERIOD):
        return
    ATTACKED.inc()
    kind = "none" if principal is None else "user" if isinstance(principal, User) else "client"
    id_ = None if principal is None else principal.id
    log.warning("logins_under_attack", subject=kind, id=id_, failures=attack.failures, networks=attack.networks)
    detail: Detail = {"failures": attack.failures, "networks": attack.networks}
    await audit.record(None, by_system("auth.alarm"), subject_kind=kind, subject_id=id_, detail=detail)


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
