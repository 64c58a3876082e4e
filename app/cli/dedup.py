"""`idem dedup`: scan a gallery for people who are in it twice."""

import asyncio
import json
from typing import Annotated

import faiss
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from app.audit import by_system
from app.cli._common import explained
from app.cli.stores import DataDirOption, settings_of
from app.config import Settings
from app.documents.galleries import DEFAULT_GALLERY, Gallery
from app.documents.scans import Scan
from app.logs import configure_logging
from app.runtime import open_runtime
from app.use_cases import scan as scanning

#: What a shell says of a command that an interruption ended.
INTERRUPTED = 130

app = typer.Typer(help="Find people who are enrolled twice.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Present, so that typer builds a group of one command."""


@app.command()
def scan(
    gallery: Annotated[str, typer.Option(help="The gallery's name.")] = DEFAULT_GALLERY,
    threshold: Annotated[
        float | None, typer.Option(min=0.01, max=0.99, help="Cosine similarity; default: the gallery's own in force.")
    ] = None,
    data_dir: DataDirOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document at the end instead of text.")] = False,
) -> None:
    """Compare everybody in a gallery with everybody else, here and now; Ctrl-C pauses, the same command goes on."""
    settings = settings_of(data_dir)
    configure_logging("warning")
    faiss.omp_set_num_threads(1)
    console = Console(stderr=as_json)
    try:
        with explained():
            page = asyncio.run(_scan(settings, gallery, threshold, console))
    except KeyboardInterrupt:
        console.print("Paused. The same command goes on where this one stopped.")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(page))
    else:
        typer.echo(
            f"{page['gallery']} at {page['threshold']:.3f}: pairs: {page['pairs']}, clusters: {page['clusters']}, weak links: "
            f"{page['weak_links']}; {page['compared']:,} pairs of vectors in {page['seconds']} s (scan {page['id']})"
        )
    if page["state"] != "done":
        typer.echo(f"The scan is {page['state']}: {page['reason'] or 'somebody else ended it'}.", err=True)
        raise typer.Exit(1)


async def _scan(
    settings: Settings, name: str, threshold: float | None, console: Console
) -> dict[str, str | int | float | None]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tiles, {task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        async with open_runtime(settings) as runtime:
            gallery = await Gallery.require(name)
            task = bar.add_task(gallery.name, total=None, rate="opening")
            ended = await scanning.carry_out(
                runtime, by_system("dedup.scan"), gallery, threshold, lambda known: _show(bar, task, known)
            )
            pairs = await ended.counted(scanning.MOST_PAIRS + 1)
            groups = await scanning.clusters_of(runtime, ended) if ended.state == "done" else []
    return {
        "id": ended.id, "gallery": name, "state": ended.state, "reason": ended.reason, "threshold": ended.threshold,
        "since_seq": ended.since_seq, "upto_seq": ended.upto_seq, "tiles": ended.done, "pairs": pairs,
        "clusters": len(groups), "weak_links": sum(len(group.weak) for group in groups), "compared": ended.compared,
        "seconds": round(ended.seconds, 2), "rate": None if ended.rate is None else round(ended.rate),
    }  # fmt: skip


def _show(bar: Progress, task: TaskID, known: Scan) -> None:
    rate = "" if known.rate is None else f"{known.rate / 1e6:,.0f} M pairs/s"
    bar.update(task, completed=known.done, total=known.total, rate=rate)
