"""Keeping client applications: making, changing and removing them, and rotating their secrets.

Each change and its audit event are one transaction. An admin who is bound to galleries keeps the clients of those only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from pymongo.asynchronous.client_session import AsyncClientSession

from app import audit
from app.access.callers import new_secret
from app.access.grants import check_roles, granted, shown
from app.audit import Action, by_system
from app.documents.accounts import Client, kept_account
from app.documents.audiences import AudienceClaim
from app.documents.base import new_id, now
from app.documents.events import Detail
from app.domain.callers import CLIENT_ROLES, Role
from app.domain.changes import FieldValue, changes
from app.errors import Advice, Forbidden
from app.runtime import Runtime


@dataclass(frozen=True, slots=True)
class ClientFields:
    """What an admin may change of a client application. galleries: names."""

    name: str
    roles: tuple[Role, ...]
    galleries: tuple[str, ...] | None
    audiences: tuple[str, ...] = ()

    @classmethod
    def of(cls, client: Client, galleries: tuple[str, ...] | None) -> "ClientFields":
        """A client's fields as they are, with the names of its galleries."""
        return cls(client.name, tuple(client.roles), galleries, tuple(client.audiences))

    @property
    def told(self) -> dict[str, FieldValue]:
        """What events record of the fields."""
        return {
            "roles": sorted(self.roles), "galleries": None if self.galleries is None else sorted(self.galleries),
            "audiences": sorted(self.audiences),
        }  # fmt: skip


async def create_client(runtime: Runtime, action: Action, fields: ClientFields) -> tuple[Client, str]:
    """A new client application, and its secret, which nobody can read again.

    Raises Validation (roles, unknown galleries), Forbidden (galleries that the caller does not have; audiences, where the caller
    is bound to galleries) and Conflict (an audience of another client).
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
        before = ClientFields.of(client, await shown(client.galleries, session))
        after = edit(before)
        if after.roles != before.roles:
            check_roles(after.roles, CLIENT_ROLES)
        has_other_roles = set(after.roles) != set(before.roles)
        fields: dict[str, object] = {
            "name": after.name,
            "roles": list(after.roles),
            "audiences": list(after.audiences),
            "access_version": client.access_version + has_other_roles,
            "updated_at": now(),
        }
        if after.galleries != before.galleries:
            fields["galleries"] = await granted(action.caller, after.galleries, session)
        await client.update({"$set": fields}, session=session)
        await _move_audiences(action, client.id, before.audiences, after.audiences, session)
        await audit.record(
            session,
            action,
            subject_kind="client",
            subject_id=client.id,
            detail={"changes": changes(before.told, after.told), "renamed": after.name != before.name},
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
        fields: dict[str, object] = {
            "secret_hash": secret_hash,
            "former_hash": client.secret_hash if hours else None,
            "former_until": now() + timedelta(hours=hours) if hours else None,
            "access_version": client.access_version + (hours == 0),
            "updated_at": now(),
        }
        await client.update({"$set": fields}, session=session)
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
        fields = ClientFields.of(client, await shown(client.galleries, session))
        await client.delete(session=session)
        await AudienceClaim.release(client.id, [client.id, *client.audiences], session)
        detail: Detail = {"changes": changes(fields.told, {})}
        await audit.record(session, action, subject_kind="client", subject_id=client.id, detail=detail, status_code=204)

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
    if ClientFields.of(client, await shown(client.galleries)) != fields:
        return await update_client(runtime, by_system("client.update"), client_id, lambda _: fields)
    return client


async def _insert(runtime: Runtime, action: Action, client_id: str, secret: str, fields: ClientFields) -> Client:
    check_roles(fields.roles, CLIENT_ROLES)
    client = Client(
        id=client_id,
        name=fields.name,
        secret_hash=runtime.access.client_secret_hash(secret),
        roles=list(fields.roles),
        galleries=[],
        audiences=list(fields.audiences),
    )

    async def body(session: AsyncClientSession) -> None:
        client.galleries = await granted(action.caller, fields.galleries, session)
        await client.insert(session=session)
        await AudienceClaim.take(client.id, [client.id], session)
        await _move_audiences(action, client.id, (), fields.audiences, session)
        detail: Detail = {"changes": changes({}, fields.told)}
        await audit.record(session, action, subject_kind="client", subject_id=client.id, detail=detail, status_code=201)

    await runtime.transaction(body)
    return client


async def _move_audiences(
    action: Action, client_id: str, before: Sequence[str], after: Sequence[str], session: AsyncClientSession
) -> None:
    """Claim the audiences that the client gets, and release those that it loses. The client's document says so already.

    Raises Forbidden for an admin who is bound to galleries: a relying party that checks the audience alone would take an
    assertion about people of those galleries for one about its own people. Raises Conflict for another client's audience.
    """
    gained, lost = set(after) - set(before), set(before) - set(after)
    if not gained and not lost:
        return
    if action.caller is not None and action.caller.galleries is not None:
        message = "Only an admin who is not bound to galleries can give or take audiences."
        raise Forbidden(message, errors=(Advice("audiences", "not-yours", message),))
    await AudienceClaim.take(client_id, gained, session)
    await AudienceClaim.release(client_id, lost - {client_id}, session)
