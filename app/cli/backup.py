"""`idem backup` and `idem restore`: everything out of the stores into a folder, and back."""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Annotated, TypeVar, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from app.backups import OtherKey, Tell
from app.cli._common import explained
from app.cli.settings import read_settings
from app.cli.stores import DataDirOption, stores_of
from app.config import Settings
from app.logs import configure_logging
from app.runtime import Runtime, open_runtime
from app.use_cases import back_up, sequence
from app.use_cases import restore as restoring
from app.use_cases.erase import erase_again
from storage.archive import BackupBroken, BackupBusy, BackupMissing

T = TypeVar("T")

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder of the backups, best on another machine's disk.")
]
SetOption = Annotated[str | None, typer.Option("--set", help="Which backup of the folder; default: the newest.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


def backup(
    folder: Folder,
    set_id: SetOption = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Keep so many backups, this one included. Default: all.")
    ] = None,
    data_dir: DataDirOption = None,
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Make none: read one through, to its last byte.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Back up while the service runs; the same command goes on with one that was cut off."""
    if verify:

        async def proved(settings: Settings, tell: Tell) -> dict[str, object]:
            async with open_runtime(settings) as runtime:
                opened = await back_up.verify(runtime, folder, set_id, tell)
            manifest, photos = opened.manifest, sum(part.documents for part in opened.manifest.photos)
            return {"id": manifest.id, "made_at": manifest.made_at, "documents": manifest.documents, "photos": photos}

        found = _run(data_dir, proved, as_json=as_json)
        _say(
            found,
            "Backup {id} of {made_at:%Y-%m-%d %H:%M:%S} UTC is whole: {documents} documents, {photos} photos.",
            as_json=as_json,
        )
        return

    async def made(settings: Settings, tell: Tell) -> dict[str, object]:
        async with open_runtime(settings) as runtime:
            return dataclasses.asdict(await back_up.back_up(runtime, folder, tell, keep=keep))

    done = _run(data_dir, made, as_json=as_json)
    _say(
        done,
        "Backup {id}: {documents} documents, {photos} photos ({copied} of them new), {bytes} bytes of documents.",
        as_json=as_json,
    )
    if done["missing"]:
        known = ", ".join(map(str, cast("tuple[str, ...]", done["identities"])))
        typer.echo(
            f"{done['missing']} photos are not in the photo store, of identities {known}: see `idem check`.", err=True
        )


def restore(
    folder: Folder,
    set_id: SetOption = None,
    data_dir: DataDirOption = None,
    *,
    replace: Annotated[
        bool, typer.Option("--replace", help="The store may hold people: the backup takes their place.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
    abandon: Annotated[bool, typer.Option("--abandon", help="Forget a restore that has changed nothing yet.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put a backup in place; the same command goes on with a restore that was cut off."""
    if abandon:

        async def forgotten(settings: Settings, tell: Tell) -> bool:
            del tell
            async with open_runtime(settings, restoring=True) as runtime:
                return await restoring.abandon(runtime)

        typer.echo("Forgotten." if _run(data_dir, forgotten, as_json=as_json) else "No restore is under way.")
        return
    if replace and not yes:
        database = read_settings().mongodb_database
        if typer.prompt(f"All that database {database} holds is lost. Type its name to go on") != database:
            typer.echo("Nothing was done.", err=True)
            raise typer.Exit(1)

    async def restored(settings: Settings, tell: Tell) -> dict[str, object]:
        def opened() -> AbstractAsyncContextManager[Runtime]:
            return open_runtime(settings, restoring=True)

        done = await restoring.restore(
            opened, erase_again, sequence.close, folder, tell, set_id=set_id, replace=replace
        )
        return dataclasses.asdict(done)

    done = _run(data_dir, restored, as_json=as_json)
    _say(
        done,
        "Backup {set_id} of {made_at:%Y-%m-%d %H:%M:%S} UTC is in place: {documents} documents, {photos} photos; erased again: "
        "{erased_again}.",
        as_json=as_json,
    )
    if not as_json:
        typer.echo(
            "Accounts are those of the backup now. If `idem up` runs on this store, restart it: it creates the accounts of its "
            "credentials.json again."
        )
        _warn(restoring.Restored(**done))  # type: ignore[arg-type] # its own fields


def _warn(done: restoring.Restored) -> None:
    """Print what the restore could not put right."""
    if done.evidence is not None:
        typer.echo(f"Nothing is written to the evidence store: {done.evidence}.", err=True)
    if done.photos_missing:
        typer.echo(
            f"{done.photos_missing} photos of the backup are not in the photo store. They were not written, because the store "
            "belongs to another store. People who were erased since the backup have none: see `idem check` for the others.",
            err=True,
        )
    for misfit in done.log:
        typer.echo(f"The log: {misfit}.", err=True)
    for name in done.unreadable:
        typer.echo(
            f"The ledger of erasures: {name} is damaged, or another store wrote it. It was ignored: find out whether that person "
            "asked to be erased.",
            err=True,
        )


def _say(found: dict[str, object], text: str, *, as_json: bool) -> None:
    typer.echo(json.dumps(found, default=str) if as_json else text.format(**found))


@contextmanager
def progress(console: Console) -> Iterator[Tell]:
    """A bar for each step of a long work, on the console."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, int] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=None)
            bar.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type] # rich's own NewType of int

        yield tell


def _run(data_dir: Path | None, work: Callable[[Settings, Tell], Awaitable[T]], *, as_json: bool) -> T:
    """Do the work on the stores with bars on the terminal; ends the command with a message where it cannot be done."""
    configure_logging("error")

    async def watched(settings: Settings) -> T:
        with progress(Console(stderr=as_json)) as tell:
            return await work(settings, tell)

    try:
        with explained(), stores_of(data_dir) as settings:
            return asyncio.run(watched(settings))
    except KeyboardInterrupt:
        typer.echo("Interrupted. The same command goes on where this one stopped.", err=True)
        raise typer.Exit(130) from None
    except (
        BackupBroken, BackupBusy, BackupMissing, OtherKey, back_up.MomentGone,
        restoring.EvidenceAway, restoring.NotEmpty, restoring.RestoreBusy, restoring.StillServing,
    ) as refused:  # fmt: skip
        typer.echo(f"{refused}.", err=True)
    raise typer.Exit(1)
