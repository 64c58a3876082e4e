"""Keeping client applications: making, changing and removing them, and rotating their secrets.

Each change and its audit event are one transaction. An admin who is bound to galleries keeps the clients of those only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from pymongo.asynchronous.client_session import AsyncClientSession

from app import audit
from app.access.callers import check_grant, new_secret
from app.audit import Action, by_system
from app.documents.accounts import Client, kept_account
from app.documents.base import new_id, now
from app.documents.events import Detail
from app.domain.callers import Role
from app.runtime import Runtime


@dataclass(frozen=True, slots=True)
class ClientFields:
    """What an admin may change of a client application."""

    name: str
    roles: tuple[Role, ...]
    galleries: tuple[str, ...] | None
    audiences: tuple[str, ...] = ()

    @classmethod
    def of(cls, client: Client) -> "ClientFields":
        """A client's fields as they are."""
        galleries = None if client.galleries is None else tuple(client.galleries)
        return cls(client.name, tuple(client.roles), galleries, tuple(client.audiences))


async def create_client(runtime: Runtime, action: Action, fields: ClientFields) -> tuple[Client, str]:
    """A new client application, and its secret, which nobody can read again.

    Raises Validation (roles) and Forbidden (galleries that the caller does not have).
    """
    secret = new_secret()
    client = await _insert(runtime, action, new_id(), secret, fields)
    return client, secret


async def update_client(
    runtime: Runtime, action: Action, client_id: str, edit: Callable[[ClientFields], ClientFields]
) -> Client:
    """Change a client. `edit` gives the new fields for the present ones; it may be asked more than once.

    Other roles void its access tokens. Raises NotFound, Validation and Forbidden (as `create_client`).
    """

    async def body(session: AsyncClientSession) -> Client:
        client = await kept_account(Client, client_id, action.caller, session)
        before = ClientFields.of(client)
        after = edit(before)
        check_grant(action.caller, after.roles, after.galleries)
        has_other_roles = set(after.roles) != set(before.roles)
        changes: dict[str, object] = {
            "name": after.name,
            "roles": list(after.roles),
            "galleries": None if after.galleries is None else list(after.galleries),
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


async def rotate_client_secret(
    runtime: Runtime, action: Action, client_id: str, overlap_hours: int | None = None
) -> tuple[Client, str]:
    """A fresh secret for a client; the one before it holds for `overlap_hours` more (default: the setting).

    With an overlap the client's tokens go on. Without (0: the secret is known to somebody) the former secret, and all tokens
    got with it, hold no more. A secret before the former one never does. Raises NotFound.
    """
    hours = runtime.settings.client_secret_overlap_hours if overlap_hours is None else overlap_hours
    secret = new_secret()
    secret_hash = runtime.access.client_secret_hash(secret)

    async def body(session: AsyncClientSession) -> Client:
        client = await kept_account(Client, client_id, action.caller, session)
        changes: dict[str, object] = {
            "secret_hash": secret_hash,
            "former_hash": client.secret_hash if hours else None,
            "former_until": now() + timedelta(hours=hours) if hours else None,
            "access_version": client.access_version + (hours == 0),
            "updated_at": now(),
        }
        await client.update({"$set": changes}, session=session)
        detail: Detail = {"overlap_hours": hours}
        await audit.record(session, action, subject_kind="client", subject_id=client.id, detail=detail)
        return client

    client = await runtime.transaction(body)
    runtime.access.forget()
    return client, secret


async def delete_client(runtime: Runtime, action: Action, client_id: str) -> None:
    """Remove a client application; its tokens hold no more. Raises NotFound."""

    async def body(session: AsyncClientSession) -> None:
        client = await kept_account(Client, client_id, action.caller, session)
        await client.delete(session=session)
        await audit.record(session, action, subject_kind="client", subject_id=client.id, status_code=204)

    await runtime.transaction(body)
    runtime.access.forget()


async def ensure_client(runtime: Runtime, client_id: str, client_secret: str, fields: ClientFields) -> Client:
    """Make a client of this id and secret, or bring it to them: for development credentials.

    client_secret: 256 random bits as text (`new_secret`), for it is not hashed slowly.
    """
    client = await Client.get(client_id)
    if client is None:
        return await _insert(runtime, by_system("client.create"), client_id, client_secret, fields)
    if not runtime.access.client_secret_matches(client_secret, client):
        secret_hash = runtime.access.client_secret_hash(client_secret)

        async def body(session: AsyncClientSession) -> None:
            await client.update({"$set": {"secret_hash": secret_hash}, "$inc": {"access_version": 1}}, session=session)
            await audit.record(session, by_system("client.rotate"), subject_kind="client", subject_id=client.id)

        await runtime.transaction(body)
    if ClientFields.of(client) != fields:
        return await update_client(runtime, by_system("client.update"), client_id, lambda _: fields)
    return client


async def _insert(runtime: Runtime, action: Action, client_id: str, secret: str, fields: ClientFields) -> Client:
    check_grant(action.caller, fields.roles, fields.galleries)
    client = Client(
        id=client_id,
        name=fields.name,
        secret_hash=runtime.access.client_secret_hash(secret),
        roles=list(fields.roles),
        galleries=None if fields.galleries is None else list(fields.galleries),
        audiences=list(fields.audiences),
    )

    async def body(session: AsyncClientSession) -> None:
        await client.insert(session=session)
        detail: Detail = {"roles": " ".join(sorted(fields.roles))}
        await audit.record(session, action, subject_kind="client", subject_id=client.id, detail=detail, status_code=201)

    await runtime.transaction(body)
    return client
