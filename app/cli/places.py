"""`idem stores`: which store owns the folders and buckets of the settings, and how a store takes one over."""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from app.audit import by_system, record
from app.cli._common import explained
from app.cli.stores import DataDirOption, stores_of
from app.config import Settings
from app.documents.events import Detail
from app.documents.stores import Store
from app.logs import configure_logging
from app.ownership import PLACES
from app.runtime import Runtime, open_runtime
from storage.ownership import Standing, State

T = TypeVar("T")

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]
STATES: Final[dict[State, str]] = {
    "ours": "this store's",
    "foreign": "ANOTHER STORE'S: nothing is written or deleted there",
    "free": "free: the next start marks it",
    "unmarked": "NOT MARKED, and it contains what this database does not know",
    "emptied": "EMPTY, although this store marked it before: is its share mounted?",
    "absent": "not there yet",
    "away": "it does not answer",
}

app = typer.Typer(
    help="The folders and buckets of the settings: which store owns each, and taking one over.", no_args_is_help=True
)


@app.command()
def status(data_dir: DataDirOption = None, *, as_json: JsonOption = False) -> None:
    """Show the owner of each place. Exit status 1: a place belongs to another store, or may do so."""
    store, standings = _run(data_dir, lambda runtime: runtime.places.standings())
    _show(store, standings, as_json=as_json)
    if any(standing.is_refused for standing in standings):
        raise typer.Exit(1)


@app.command()
def adopt(
    place: Annotated[
        list[str] | None, typer.Option(help=f"Only this place; repeat for several: {', '.join(PLACES)}. Default: all.")
    ] = None,
    data_dir: DataDirOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Make this database's store the owner of its places, even if another store owns them. Nothing in them is deleted.

    Use it only when the former store is gone for good. If it still runs, it is refused there from now on.
    """
    if unknown := sorted(set(place or ()) - set(PLACES)):
        raise typer.BadParameter(f"{unknown[0]} is no place; choose from {', '.join(PLACES)}", param_hint="--place")

    async def adopted(runtime: Runtime) -> list[Standing]:
        before = {one.setting: one for one in await runtime.places.standings()}
        after = await runtime.places.adopt(set(place or PLACES))
        taken = [one.setting for one in after if one.state == "ours" and before[one.setting].state != "ours"]
        if taken:
            former = sorted({owner for name in taken if (owner := before[name].store) is not None})
            await Store.took_over(former)
            detail: Detail = {"places": ", ".join(taken), "from": ", ".join(former) or None}
            await record(None, by_system("stores.adopt"), subject_kind="none", subject_id=None, detail=detail)
        return after

    store, standings = _run(data_dir, adopted)
    _show(store, standings, as_json=as_json)
    if any(standing.state != "ours" for standing in standings):
        raise typer.Exit(1)


def _show(store: str, standings: list[Standing], *, as_json: bool) -> None:
    if as_json:
        places = [dataclasses.asdict(standing) for standing in standings]
        typer.echo(json.dumps({"store": store, "places": places}, default=str))
        return
    console = Console()
    table = Table(title=f"Places of store {store}", title_justify="left")
    for column in ("setting", "where", "state", "owner", "since"):
        table.add_column(column, overflow="fold")
    for one in standings:
        since = "" if one.marked_at is None else f"{one.marked_at:%Y-%m-%d}"
        table.add_row(one.setting, one.where, STATES[one.state], one.store or "", since)
    console.print(table)
    for one in standings:
        if one.is_refused or one.state == "emptied" or one.trouble is not None:
            typer.echo(f"{one.sentence}.")


def _run(data_dir: Path | None, work: Callable[[Runtime], Awaitable[T]]) -> tuple[str, T]:
    """Do the work in a Runtime that claims no place. Returns the store's id, and the result."""
    configure_logging("error")

    async def opened(settings: Settings) -> tuple[str, T]:
        async with open_runtime(settings, claims=False) as runtime:
            return runtime.places.owner.id, await work(runtime)

    with explained(status=2), stores_of(data_dir) as settings:
        return asyncio.run(opened(settings))
