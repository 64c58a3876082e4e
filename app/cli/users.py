"""`idem users`: people who may log in, made at the command line (the first admin cannot be made over the API)."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import pymongo
import typer
from pydantic import TypeAdapter, ValidationError

from app.access.callers import new_secret
from app.api.shapes import PlainText
from app.audit import by_system
from app.cli.settings import read_settings
from app.cli.stores import DataDirOption, settings_of
from app.cli.waiting import WaitOption, wait_for_mongo
from app.config import Settings
from app.devstack.client import Account, ClientAccount, Credentials, DemoUsers
from app.devstack.processes import write_privately
from app.documents.accounts import mark_for_development
from app.documents.base import new_id
from app.domain.callers import Role
from app.errors import Problem
from app.runtime import open_runtime
from app.use_cases.keep_clients import ClientFields, ensure_client
from app.use_cases.keep_users import UserFields, create_user, ensure_admin, ensure_user, unlock_user

#: Hashing a password takes a third of a second; everything else is a few writes.
WORK_SECONDS = 30

app = typer.Typer(help="Make people who may log in, and let them in again.", no_args_is_help=True)


@app.command()
def create(
    username: str,
    role: Annotated[list[Role], typer.Option(help="Repeat for several: admin, officer, auditor.")],
    gallery: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: all galleries.")] = None,
    data_dir: DataDirOption = None,
    *,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the password from standard input, not from the terminal.")
    ] = False,
) -> None:
    """Make one person; the password is asked for, and never part of the command line."""
    settings = settings_of(data_dir)
    if password_stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        password = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    try:
        username = TypeAdapter[str](PlainText).validate_python(username)
    except ValidationError as refused:
        typer.echo(
            f"The username cannot be used: {refused.errors()[0]['msg'].removeprefix('Value error, ')}.", err=True
        )
        raise typer.Exit(1) from None
    fields = UserFields(username, tuple(dict.fromkeys(role)), tuple(gallery) if gallery else None)
    try:
        asyncio.run(_create(settings, fields, password))
    except Problem as problem:
        typer.echo(f"{problem.title}: {problem.detail}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{username} may log in.")


@app.command()
def unlock(
    username: str,
    data_dir: DataDirOption = None,
    *,
    second_factor: Annotated[
        bool, typer.Option("--remove-second-factor", help="For somebody who lost it; the password is enough then.")
    ] = False,
) -> None:
    """Forgive somebody's failed logins, so that they need not wait."""
    settings = settings_of(data_dir)
    try:
        asyncio.run(_unlock(settings, username, takes_factor=second_factor))
    except Problem as problem:
        typer.echo(f"{problem.title}: {problem.detail}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{username} need not wait." + (" The second factor is removed." if second_factor else ""))


@app.command(hidden=True)
def development(
    credentials: Annotated[Path, typer.Option(help="Kept here (0600) between starts.")],
    wait: WaitOption = 0,
) -> None:
    """Make the accounts of a development stack as the file says; prints the names that are new, as JSON."""
    settings = read_settings()
    if settings.is_production:
        typer.echo("Development accounts are never made in production.", err=True)
        raise typer.Exit(1)
    wait_for_mongo(settings.mongodb_uri, seconds=wait)
    if not credentials.exists():
        write_privately(credentials, _new_credentials().model_dump_json(indent=2))
    accounts = Credentials.model_validate_json(credentials.read_bytes())
    typer.echo(json.dumps(asyncio.run(_ensure(settings, accounts))))


async def _create(settings: Settings, fields: UserFields, password: str) -> None:
    async with open_runtime(settings) as runtime:
        with pymongo.timeout(WORK_SECONDS):
            await create_user(runtime, by_system("user.create"), fields, password)


async def _unlock(settings: Settings, username: str, *, takes_factor: bool) -> None:
    async with open_runtime(settings) as runtime:
        with pymongo.timeout(WORK_SECONDS):
            await unlock_user(runtime, by_system("user.unlock"), username, takes_factor=takes_factor)


async def _ensure(settings: Settings, accounts: Credentials) -> list[str]:
    """Make, or bring to what the file says, one account per role. Returns the names of new admins."""
    admin = UserFields(accounts.admin.username, (Role.ADMIN,), None)
    people = {Role.OFFICER: accounts.users.officer, Role.AUDITOR: accounts.users.auditor}
    application = ClientFields("Demo application", (Role.RELYING_APP,), None)
    async with open_runtime(settings) as runtime:
        with pymongo.timeout(WORK_SECONDS):
            is_new = await ensure_admin(runtime, admin.username, accounts.admin.password)
            if not is_new:
                await ensure_user(runtime, admin, accounts.admin.password)
            for role, person in people.items():
                await ensure_user(runtime, UserFields(person.username, (role,), None), person.password)
            await ensure_client(runtime, accounts.client.client_id, accounts.client.client_secret, application)
            await mark_for_development([admin.username, *(person.username for person in people.values())])
    return [admin.username] if is_new else []


def _new_credentials() -> Credentials:
    """Random passwords and a random client for a development stack."""
    return Credentials(
        admin=Account(username="admin", password=new_secret()),
        users=DemoUsers(
            officer=Account(username="officer", password=new_secret()),
            auditor=Account(username="auditor", password=new_secret()),
        ),
        client=ClientAccount(client_id=new_id(), client_secret=new_secret()),
    )
