"""Users and applications that are logged in. They call the whole application without a server in between."""

from functools import cache

import httpx
from fastapi import FastAPI

from app.audit import by_system
from app.documents.accounts import Client
from app.domain.callers import CLIENT_ROLES, Role
from app.main import create_app
from app.runtime import Runtime
from app.use_cases.keep_clients import ClientFields, create_client
from app.use_cases.keep_users import UserFields, create_user

NEW_PASSWORD = "correct horse battery"


@cache
def _app() -> FastAPI:
    return create_app()


def app_on(runtime: Runtime) -> FastAPI:
    """The application on this Runtime. It is made once: its routes take longer to build than most tests to run."""
    app = _app()
    app.state.runtime = runtime
    return app


def http_of(app: FastAPI, token: str | None) -> httpx.AsyncClient:
    """An HTTP client of the application with this access token."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    transport = httpx.ASGITransport(app, client=("192.0.2.7", 1))
    return httpx.AsyncClient(transport=transport, base_url="http://idem.test", headers=headers)


async def token_of(runtime: Runtime, app: FastAPI, name: str, role: str, galleries: tuple[str, ...] | None) -> str:
    """The access token of a new caller with this role."""
    if Role(role) in CLIENT_ROLES:
        return await machine_token_of(runtime, app, name, role, galleries)
    await create_user(runtime, by_system("user.create"), UserFields(name, (Role(role),), galleries), NEW_PASSWORD)
    return await _granted(app, {"grant_type": "password", "username": name, "password": NEW_PASSWORD})


async def machine_token_of(
    runtime: Runtime, app: FastAPI, name: str, role: str, galleries: tuple[str, ...] | None
) -> str:
    """The access token of a new application with this role."""
    fields = ClientFields(name, (Role(role),), galleries)
    client, secret = await create_client(runtime, by_system("client.create"), fields)
    return await _granted(app, {"grant_type": "client_credentials", "client_id": client.id, "client_secret": secret})


async def former_officer_of(runtime: Runtime, app: FastAPI, name: str) -> str:
    """The access token of an application that an earlier version gave the officer's role."""
    token = await machine_token_of(runtime, app, name, "relying_app", None)
    await Client.get_pymongo_collection().update_one({"name": name}, {"$set": {"roles": ["officer"]}})
    runtime.access.forget()
    return token


async def _granted(app: FastAPI, form: dict[str, str]) -> str:
    async with http_of(app, None) as http:
        return str((await http.post("/v1/auth/token", data=form)).json()["access_token"])
