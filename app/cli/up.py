"""`idem up`: one command from nothing to a running, demonstrated platform."""

import asyncio
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from app.cli.settings import UNUSABLE_CONFIGURATION, read_settings
from app.config import Settings
from app.devstack.client import ReadyStack, Service
from app.devstack.demo import DemoFailed, demonstrate, sample_people
from app.devstack.stack import (
    CREDENTIALS_NAME,
    Misconfigured,
    Stack,
    StackFailed,
    Wishes,
    data_folder,
    listen,
    stop_signals,
)


def up(
    data_dir: Annotated[Path, typer.Option(help="Where everything is kept between runs.")] = Path(".data"),
    *,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: a free one. Default: API_PORT.")] = None,
    api_workers: Annotated[int | None, typer.Option(min=1, max=64, help="API processes. Default: WORKERS.")] = None,
    model: Annotated[str | None, typer.Option(help="Face model pack. Default: FACE_MODEL.")] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Written once the stack is ready: where it is, and who may log in.")
    ] = None,
    demo: Annotated[bool, typer.Option(help="Run the demo once, on an empty store.")] = True,
) -> None:
    """Start MongoDB, Redis, worker and API on this machine, and serve until Ctrl-C."""
    settings = read_settings()
    wishes = Wishes(data_dir=data_dir, port=port, api_workers=api_workers, model=model, ready_file=ready_file)
    console = Console(highlight=False)
    try:
        with data_folder(data_dir) as leftovers:
            if leftovers:
                console.print(f"A killed run had left {', '.join(leftovers)} running: ended.")
            with listen(settings.api_host, settings.api_port if port is None else port) as listener:
                asyncio.run(_run(Stack(settings, wishes, listener), settings, console, with_demo=demo))
    except (StackFailed, DemoFailed, OSError) as problem:
        sys.stdout.flush()
        typer.echo(f"idem up: {problem}", err=True)
        raise typer.Exit(UNUSABLE_CONFIGURATION if isinstance(problem, Misconfigured) else 1) from None


async def _run(stack: Stack, settings: Settings, console: Console, *, with_demo: bool) -> None:
    """Serve until a signal comes; raises what went wrong. Whatever happens, nothing is left running."""
    with stop_signals() as stop:
        work = asyncio.create_task(_serve(stack, settings, console, with_demo=with_demo))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                console.print("Stopping …")
        finally:
            failure = work.exception() if work.done() and not work.cancelled() else None
            work.cancel()
            stopping.cancel()
            await stack.stop()
            await asyncio.gather(work, stopping, return_exceptions=True)
        if failure is not None:
            raise failure


async def _serve(stack: Stack, settings: Settings, console: Console, *, with_demo: bool) -> None:
    with console.status("Starting MongoDB, Redis, worker and API …"):
        ready = await stack.start()
    _show(stack, ready, settings, console)
    credentials = ready.credentials()
    if with_demo and credentials is not None:
        async with Service(ready.url) as service:
            is_empty = not await (await service.log_in(credentials.users.officer)).has_identities()
        if is_empty:
            console.print(await demonstrate(ready.url, credentials, sample_people(), console))
    console.print(f"[bold]Idem is ready at {ready.url}[/bold]  Ctrl-C ends it.", soft_wrap=True)
    while True:
        message = await stack.messages.get()
        with suppress(OSError):  # a full disk or a closed terminal must not end the stack
            console.print(message, style="yellow")


def _show(stack: Stack, ready: ReadyStack, settings: Settings, console: Console) -> None:
    table = Table(title=f"Started in {stack.start_seconds:.1f} s", title_justify="left")
    for column in ("part", "where", "process"):
        table.add_column(column, overflow="fold")
    for part in stack.parts():
        table.add_row(part.name, part.address, "" if part.pid is None else str(part.pid))
    table.add_row("data", ready.data_dir, "")
    console.print(table)
    console.print(stack.connections())
    if ready.admin is not None and ready.admin.username in stack.created:
        name, password = ready.admin.username, ready.admin.password
        console.print(f"Admin made: [bold]{name}[/bold], password [bold]{password}[/bold] (shown once)", soft_wrap=True)
    if ready.credentials() is not None:
        console.print(f"Development accounts: {ready.data_dir}/{CREDENTIALS_NAME}", soft_wrap=True)
    elif settings.is_production:
        console.print(
            "Production: no account is made here; make the first one with `idem users create NAME --role admin`."
        )
