"""`idem index`: the state of the galleries' index files, and what an operator does about them."""

import asyncio
import dataclasses
import json
import os
import platform
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import faiss
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.audit import by_system
from app.cli._common import explained, in_runtime
from app.cli.index_bench import bench
from app.cli.stores import DataDirOption, settings_of
from app.documents.base import new_id
from app.documents.galleries import Gallery, Generation
from app.errors import Problem
from app.logs import configure_logging
from app.runtime import Runtime
from app.use_cases import examine
from app.use_cases.publish import Stage, publish
from storage.generations import BadGeneration

T = TypeVar("T")

GalleryOption = Annotated[str | None, typer.Option(help="One gallery's name; default: all of the running model.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]

app = typer.Typer(help="The galleries' index files: state, publication, proof.", no_args_is_help=True)
app.command("bench")(bench)


@app.command()
def status(gallery: GalleryOption = None, data_dir: DataDirOption = None, *, as_json: JsonOption = False) -> None:
    """What is published, how long the tail is, how good the index is, who is publishing."""
    rows = _run(data_dir, lambda runtime: examine.states(runtime, gallery))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], default=str))
        return
    table = Table(title="Index", title_justify="left")
    table.add_column("gallery", no_wrap=True, min_width=max((len(row.gallery) for row in rows), default=0))
    for column in ("kind", "generation", "vectors", "tail", "recall", "at least", "disk MiB", "state"):
        table.add_column(column, justify="left" if column in {"kind", "state"} else "right")
    for row in rows:
        figures = (
            row.gallery,
            row.kind,
            row.generation,
            row.vectors,
            row.tail,
            row.recall,
            row.recall_bound,
            row.disk_mib,
        )
        table.add_row(*("" if figure is None else str(figure) for figure in figures), _standing(row))
    Console().print(table)


@app.command("publish")
def publish_now(gallery: GalleryOption = None, data_dir: DataDirOption = None, *, as_json: JsonOption = False) -> None:
    """Publish the next generation, of a gallery of any size."""
    _publish(gallery, data_dir, rebuild=False, as_json=as_json)


@app.command()
def rebuild(gallery: GalleryOption = None, data_dir: DataDirOption = None, *, as_json: JsonOption = False) -> None:
    """Publish from the documents alone, under a new secret rotation: nothing of the former files is used."""
    _publish(gallery, data_dir, rebuild=True, as_json=as_json)


@app.command()
def verify(gallery: GalleryOption = None, data_dir: DataDirOption = None) -> None:
    """Check every byte of the published files, and a sample of their vectors against the documents."""
    findings = _run(data_dir, lambda runtime: examine.verify(runtime, gallery))
    for finding in findings:
        typer.echo(f"{finding.gallery}: {finding.message}", err=not finding.is_good)
    if not all(finding.is_good for finding in findings):
        raise typer.Exit(1)


@app.command()
def tune(gallery: GalleryOption = None, data_dir: DataDirOption = None, *, as_json: JsonOption = False) -> None:
    """Measure on the gallery's own vectors how much must be read to miss nobody; publication chooses by the same figures."""
    rows = [dataclasses.asdict(row) for row in _run(data_dir, lambda runtime: examine.tune(runtime, gallery))]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        table = Table(title=str(row.pop("gallery")), title_justify="left", show_header=False)
        for name, value in row.items():
            table.add_row(name.replace("_", " "), str(value))
        Console().print(table)


def _standing(state: examine.IndexState) -> str:
    doing = [] if state.publishing is None else [f"publishing: {state.publishing.stage}"]
    return ", ".join(doing + ([] if state.trouble is None else [state.trouble])) or "ok"


def _publish(name: str | None, data_dir: Path | None, *, rebuild: bool, as_json: bool) -> None:
    faiss.omp_set_num_threads(1)
    console = Console(stderr=as_json)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:

        async def every(runtime: Runtime) -> tuple[dict[str, Generation], dict[str, Problem]]:
            done, failed = {}, {}
            for gallery in await examine.chosen(runtime, name):
                try:
                    done[gallery.name] = await _one(runtime, gallery, bar, rebuild=rebuild)
                except Problem as problem:  # one that is being published already is no reason to leave out the rest
                    failed[gallery.name] = problem
            return done, failed

        published, failed = _run(data_dir, every)
    for gallery_name, problem in failed.items():
        typer.echo(f"{gallery_name}: {problem.detail}", err=True)
    if as_json:
        typer.echo(json.dumps({n: g.model_dump(mode="json") for n, g in published.items()}))
    else:
        for gallery_name, generation in published.items():
            console.print(
                f"{gallery_name}: generation {generation.number} ({generation.kind}), {generation.count} vectors up to change "
                f"{generation.watermark}, recall {generation.recall:.4f} (at least {generation.recall_bound:.4f})"
            )
    if failed:
        raise typer.Exit(1)


async def _one(runtime: Runtime, gallery: Gallery, bar: Progress, *, rebuild: bool) -> Generation:
    tasks = {"reading": bar.add_task(f"{gallery.name}: reading", total=None)}

    async def tell(stage: Stage, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(f"{gallery.name}: {stage}", total=None)
        bar.update(tasks[stage], completed=done, total=total)

    holder = f"{platform.node()}:{os.getpid()}:{new_id()}"
    return await publish(runtime, by_system("index.publish"), gallery.id, holder=holder, rebuild=rebuild, tell=tell)


def _run(data_dir: Path | None, work: Callable[[Runtime], Awaitable[T]]) -> T:
    """Do the work in a Runtime of its own; ends the command with a message where that cannot be."""
    settings = settings_of(data_dir)
    configure_logging("warning")
    with explained(BadGeneration):
        return asyncio.run(in_runtime(settings, work))
