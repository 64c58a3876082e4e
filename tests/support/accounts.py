"""The account routes over a real store, called from addresses of the test's choice."""

import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import httpx
from fastapi import FastAPI

from app.api import audit, auth, clients, galleries, users
from app.api.envelope import Envelope
from app.api.problems import install
from app.audit import by_system
from app.documents.accounts import Client, User
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.domain.callers import Role
from app.runtime import Runtime
from app.use_cases.keep_clients import ClientFields, create_client
from app.use_cases.keep_users import UserFields, create_user

ADMIN, PASSWORD, WRONG = "root", "correct horse battery", "a wrong horse"
HERE, ELSEWHERE = "192.0.2.7", "198.51.100.9"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a login brought."""

    access: str
    refresh: str


@dataclass(frozen=True, slots=True)
class AccountService:
    """The routes as one address reaches them, and what a test needs to look behind them."""

    runtime: Runtime
    app: FastAPI
    http: httpx.AsyncClient

    @asynccontextmanager
    async def at(self, address: str) -> AsyncIterator["AccountService"]:
        """The same service, from another address."""
        async with _client(self.app, address) as http:
            yield replace(self, http=http)

    async def token(self, **form: str) -> httpx.Response:
        """Ask for tokens."""
        return await self.http.post("/v1/auth/token", data=form)

    async def try_password(self, username: str, password: str = WRONG, **more: str) -> httpx.Response:
        """A login by a password, by default a wrong one."""
        return await self.token(grant_type="password", username=username, password=password, **more)

    async def log_in(self, username: str = ADMIN, password: str = PASSWORD, **more: str) -> Tokens:
        """A person's login that must succeed."""
        answer = await self.try_password(username, password, **more)
        assert answer.status_code == 200, answer.text
        return Tokens(answer.json()["access_token"], answer.json()["refresh_token"])

    async def refresh(self, refresh_token: str) -> httpx.Response:
        """Use a refresh token."""
        return await self.token(grant_type="refresh_token", refresh_token=refresh_token)

    async def holds(self, access_token: str) -> bool:
        """Whether the API takes the token."""
        answer = await self.http.get("/v1/auth/me", headers=bearer(access_token))
        assert answer.status_code in (200, 401)
        return answer.status_code == 200

    async def gallery(self, name: str) -> Gallery:
        """A new, empty gallery."""
        return await self.runtime.create_gallery(name, self.runtime.starting_policy())

    async def user(self, username: str, *roles: Role, galleries: tuple[str, ...] | None = None) -> User:
        """A new user with the one password."""
        fields = UserFields(username, roles or (Role.OFFICER,), galleries)
        return await create_user(self.runtime, by_system("user.create"), fields, PASSWORD)

    async def client(self, galleries: tuple[str, ...] | None = None) -> tuple[Client, dict[str, str]]:
        """A new client application, and the form of its login."""
        fields = ClientFields("kiosk", (Role.RELYING_APP,), galleries, ("kiosk.example",))
        client, secret = await create_client(self.runtime, by_system("client.create"), fields)
        return client, {"grant_type": "client_credentials", "client_id": client.id, "client_secret": secret}

    async def events(self, action: str) -> list[AuditEvent]:
        """The audit events of an action, oldest first."""
        return await AuditEvent.find({"action": action}).sort("_id").to_list()


@asynccontextmanager
async def open_accounts(runtime: Runtime) -> AsyncIterator[AccountService]:
    """The account routes of a runtime."""
    await runtime.access.load_keys()
    app = FastAPI()
    app.state.runtime = runtime
    for door in (audit, auth, users, clients, galleries):
        app.include_router(door.router)
    install(app)
    app.add_middleware(Envelope, body_limit=runtime.settings.max_json_bytes)
    async with _client(app, HERE) as http:
        yield AccountService(runtime, app, http)


def _client(app: FastAPI, address: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://idem.test")


def bearer(token: str) -> dict[str, str]:
    """The header that carries an access token."""
    return {"Authorization": f"Bearer {token}"}


def basic(client_id: str, secret: str) -> Mapping[str, str]:
    """HTTP Basic."""
    return {"Authorization": "Basic " + base64.b64encode(f"{client_id}:{secret}".encode()).decode()}
