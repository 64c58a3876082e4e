"""`idem keys`: which keys the store needs, and how they are renewed while it serves."""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.audit import by_system, rotate_key
from app.cli._common import explained, in_runtime
from app.cli.index import rebuild
from app.cli.stores import DataDirOption, settings_of
from app.documents.galleries import Gallery
from app.documents.tree import AuditKey
from app.keys import SealBroken
from app.logs import configure_logging
from app.runtime import Runtime
from app.use_cases import rotate_keys
from app.use_cases.rotate_signing_key import rotate_signing_key

T = TypeVar("T")

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]

app = typer.Typer(
    help="The keys of the store: what each one opens, and their renewal while it serves.", no_args_is_help=True
)


@app.command()
def status(data_dir: DataDirOption = None, *, as_json: JsonOption = False) -> None:
    """How many values each key-encryption key has sealed, and how many data keys each generation of a gallery's key.

    A former key-encryption key that seals nothing any more may go from KEY_ENCRYPTION_KEY_PREVIOUS, and be destroyed. Ends with 1
    when something is sealed under a key that is not known here.
    """

    async def seen(runtime: Runtime) -> tuple[list[rotate_keys.KeyUse], list[rotate_keys.GalleryKeyUse]]:
        return await rotate_keys.key_use(runtime), await rotate_keys.gallery_key_use()

    keys, galleries = _run(data_dir, seen)
    if as_json:
        pages = {
            "keys": [dataclasses.asdict(key) for key in keys],
            "galleries": [dataclasses.asdict(g) for g in galleries],
        }
        typer.echo(json.dumps(pages))
    else:
        _show(keys, galleries)
    if not all(key.known for key in keys):
        raise typer.Exit(1)


def _show(keys: list[rotate_keys.KeyUse], galleries: list[rotate_keys.GalleryKeyUse]) -> None:
    console = Console()
    table = Table(title="Key-encryption keys", title_justify="left")
    for column in ("key", "values sealed", "state"):
        table.add_column(column, justify="right" if column == "values sealed" else "left")
    for key in keys:
        table.add_row(key.key_id, str(key.values), _standing(key))
    console.print(table)
    table = Table(title="Galleries", title_justify="left")
    for column in ("gallery", "generation", "data keys", "state"):
        table.add_column(column, justify="right" if column in {"generation", "data keys"} else "left")
    for gallery in galleries:
        for number, count in sorted(gallery.generations.items()):
            state = "in use" if number == gallery.sealing else "being rotated"
            table.add_row(gallery.gallery, str(number), str(count), state)
    console.print(table)


def _standing(key: rotate_keys.KeyUse) -> str:
    if not key.known:
        return "NOT KNOWN HERE: give it in KEY_ENCRYPTION_KEY_PREVIOUS"
    if key.newest:
        return "in use"
    return "still needed: `idem keys rewrap`" if key.values else "opens nothing any more"


@app.command()
def rewrap(data_dir: DataDirOption = None) -> None:
    """Seal anew, under KEY_ENCRYPTION_KEY, what a former key sealed; every process must know the new one before."""
    with _bar() as bar:
        task = bar.add_task("rewrapping", total=None)

        async def tell(_: rotate_keys.Stage, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        count = _run(data_dir, lambda runtime: rotate_keys.rewrap(runtime, by_system("keys.rewrap"), tell))
    typer.echo(f"{count} values are sealed anew; `idem keys status` tells what the former key still opens.")


@app.command()
def rotate(
    gallery: Annotated[str | None, typer.Option(help="This gallery only; default: all.")] = None,
    data_dir: DataDirOption = None,
    *,
    galleries: Annotated[bool, typer.Option("--galleries", help="The keys that wrap people's data keys.")] = False,
    index: Annotated[bool, typer.Option("--index", help="The secret rotation of the index's vectors.")] = False,
    signing: Annotated[bool, typer.Option("--signing", help="The key that signs tokens and receipts.")] = False,
    audit: Annotated[bool, typer.Option("--audit", help="The key that signs the heads of the audit log.")] = False,
    compromised: Annotated[
        bool, typer.Option("--compromised", help="With --signing: former access tokens are refused at once.")
    ] = False,
) -> None:
    """Renew keys while the service runs: by default those of the galleries.

    A gallery's key gets a new generation, all data keys are wrapped with it, the former one is destroyed: a wrapped data key from
    a backup or the oplog opens no more with what the store holds. Cut off, the same command goes on.
    """
    if signing:
        action = by_system("keys.rotate")
        key = _run(data_dir, lambda runtime: rotate_signing_key(runtime, action, is_compromised=compromised))
        typer.echo(f"{key.id} is published, and signs from {key.signs_from:%Y-%m-%d %H:%M:%S} UTC.")
    if audit:
        fresh = _run(data_dir, _rotate_audit_key)
        typer.echo(f"{fresh.id} {fresh.public.hex()}: auditors need it from now on, beside the former ones.")
    if index:
        rebuild(gallery, data_dir)
    if galleries or gallery is not None or not (signing or audit or index):
        _rotate_galleries(gallery, data_dir)


async def _rotate_audit_key(runtime: Runtime) -> AuditKey:
    action = by_system("audit.rotate_key")
    return await runtime.transaction(
        lambda session: rotate_key(session, runtime.keys, action, "renewed by the operator")
    )


def _rotate_galleries(name: str | None, data_dir: Path | None) -> None:
    with _bar() as bar:

        async def every(runtime: Runtime) -> dict[str, int | BaseException]:
            galleries = await rotate_keys.chosen(name)
            # Side by side: most of the time each only waits. One that fails keeps none of the others from its end.
            ended = await asyncio.gather(
                *(_rotate_gallery(runtime, gallery, bar) for gallery in galleries), return_exceptions=True
            )
            return {gallery.name: outcome for gallery, outcome in zip(galleries, ended, strict=True)}

        rotated = _run(data_dir, every)
    for gallery_name, outcome in rotated.items():
        if isinstance(outcome, BaseException):
            typer.echo(f"{gallery_name}: {type(outcome).__name__}: {outcome!s:.500}", err=True)
        else:
            typer.echo(f"{gallery_name}: {outcome} data keys are wrapped anew, and the former key is destroyed.")
    if any(isinstance(outcome, BaseException) for outcome in rotated.values()):
        raise typer.Exit(1)


async def _rotate_gallery(runtime: Runtime, gallery: Gallery, bar: Progress) -> int:
    task = bar.add_task(gallery.name, total=None)

    async def tell(stage: rotate_keys.Stage, done: int, total: int) -> None:
        bar.update(task, description=f"{gallery.name}: {stage}", completed=done, total=total)

    return await rotate_keys.rotate_gallery_key(runtime, by_system("keys.rotate"), gallery.id, tell)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _run(data_dir: Path | None, work: Callable[[Runtime], Awaitable[T]]) -> T:
    """Do the work in a Runtime of its own; ends the command with a message where that cannot be."""
    settings = settings_of(data_dir)
    configure_logging("warning")
    with explained(SealBroken):
        return asyncio.run(in_runtime(settings, work))
