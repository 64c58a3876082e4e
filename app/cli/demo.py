"""`idem demo`: the main job, once, on a stack that runs."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from app.devstack.client import Credentials, ReadyStack
from app.devstack.demo import DemoFailed, demonstrate, people_in, sample_people
from app.devstack.stack import CREDENTIALS_NAME, READY_NAME


def demo(
    photos: Annotated[
        Path | None, typer.Option(help="One folder per person; default: sample photos of the dependencies.")
    ] = None,
    url: Annotated[str, typer.Option(help="Default: the stack that runs on --data-dir.")] = "",
    data_dir: Annotated[Path, typer.Option(help="The data folder of a running `idem up`.")] = Path(".data"),
    credentials: Annotated[
        Path | None, typer.Option(help="JSON as `idem up` writes it; default: the running stack's.")
    ] = None,
) -> None:
    """Enrol people, find one who enrols twice, authenticate one by selfie, refuse an impostor, read the audit trail."""
    console = Console(highlight=False)
    try:
        address, accounts = _stack(url, data_dir, credentials)
        people = sample_people() if photos is None else people_in(photos)
        console.print(asyncio.run(demonstrate(address, accounts, people, console)))
    except DemoFailed as problem:
        typer.echo(f"idem demo: {problem}", err=True)
        raise typer.Exit(1) from None


def _stack(url: str, data_dir: Path, credentials: Path | None) -> tuple[str, Credentials]:
    """Where the service is, and who may log in there. Raises DemoFailed."""
    path = credentials or data_dir / (CREDENTIALS_NAME if url else READY_NAME)
    try:
        text = path.read_bytes()
        accounts = Credentials.model_validate_json(text)
        return url or ReadyStack.model_validate_json(text).url, accounts
    except FileNotFoundError:
        message = f"{path} is missing: start a stack with `idem up`, or name one with --url and --credentials"
        raise DemoFailed(message) from None
    except ValidationError:
        message = f"{path} does not hold the accounts of a development stack"
        raise DemoFailed(message) from None
