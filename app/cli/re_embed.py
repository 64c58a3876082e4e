"""`idem models re-embed`: move galleries to the running face model, from the photos that they store."""

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.audit import by_system
from app.cli._common import explained, in_runtime
from app.cli.stores import DataDirOption, stores_of
from app.documents.galleries import Gallery
from app.errors import Problem
from app.keys import SealBroken
from app.logs import configure_logging
from app.runtime import Runtime
from app.use_cases import re_embed as moving
from storage.photos import PhotoStoreUnavailable

#: Samples that a dry run reads of each gallery.
SAMPLED = 500
_LISTED = 20


def re_embed(
    gallery: Annotated[
        str | None, typer.Option(help="One gallery's name; default: all that another model made.")
    ] = None,
    data_dir: DataDirOption = None,
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; show how many samples there are and how scores move.")
    ] = False,
    accept_losses: Annotated[
        bool,
        typer.Option(
            "--accept-losses", help="Move a gallery although some photos are missing or show no face any more."
        ),
    ] = False,
) -> None:
    """Read all stored photos with the running model, and move the galleries to it.

    Processes of the former model serve until the new templates are ready. The gallery is then closed for some seconds. An
    interrupted move goes on where it stopped. Exit status 1: a gallery was not moved.
    """
    with _bar(Console(stderr=True)) as bar:
        failed = _run(
            data_dir, lambda runtime: _every(runtime, gallery, bar, dry_run=dry_run, accept_losses=accept_losses)
        )
    if failed:
        raise typer.Exit(1)


def _run(data_dir: Path | None, work: Callable[[Runtime], Awaitable[list[str]]]) -> list[str]:
    """Do the work in a Runtime of its own. Ends the command with a message when that fails."""
    configure_logging("warning")
    with explained(SealBroken), stores_of(data_dir) as settings:
        return asyncio.run(in_runtime(settings, work))


async def _every(runtime: Runtime, name: str | None, bar: Progress, *, dry_run: bool, accept_losses: bool) -> list[str]:
    """Move each gallery, or preview the move. Returns the names of those that were not moved."""
    failed = []
    galleries = await moving.chosen(runtime, name)
    if not galleries:
        typer.echo(f"Every gallery was made by the running model, {runtime.engine.card.pack}: nothing is to be done.")
    for gallery in galleries:
        try:
            await (_look(runtime, gallery, bar) if dry_run else _move(runtime, gallery, bar, accept_losses))
        except moving.SamplesLost as problem:
            failed.append(gallery.name)
            typer.echo(problem.detail, err=True)
            _list_lost(problem.lost)
        except (Problem, PhotoStoreUnavailable) as problem:  # one gallery's trouble is not another's
            failed.append(gallery.name)
            detail = problem.detail if isinstance(problem, Problem) else f"{type(problem).__name__}: {problem}"
            typer.echo(f"{gallery.name}: {detail}", err=True)
    return failed


async def _move(runtime: Runtime, gallery: Gallery, bar: Progress, accept_losses: bool) -> None:  # noqa: FBT001 - from the option
    tell = _teller(gallery, bar)
    action = by_system("gallery.re_embed")
    moved = await moving.re_embed(runtime, action, gallery.id, accept_losses=accept_losses, tell=tell)
    if moved is None:
        typer.echo(f"{gallery.name}: it uses the running model already.")
        return
    typer.echo(
        f"{moved.gallery}: {moved.samples} samples and {moved.pairs} recorded pairs are those of "
        f"{runtime.engine.card.pack} now."
    )
    if moved.thresholds:
        former = ", ".join(f"{name} {value}" for name, value in moved.thresholds.items())
        typer.echo(f"{moved.gallery}: thresholds set by hand belonged to the former model and are reset ({former}).")
    if moved.lost:
        typer.echo(f"{moved.gallery}: {len(moved.lost)} samples no longer match anyone.", err=True)
        _list_lost(moved.lost)
    typer.echo(f"{moved.gallery}: `idem dedup scan --gallery {moved.gallery}` looks for duplicates by the new scores.")


async def _look(runtime: Runtime, gallery: Gallery, bar: Progress) -> None:
    seen = await moving.preview(runtime, gallery, SAMPLED, _teller(gallery, bar))
    table = Table(
        title=f"{seen.gallery}: {seen.samples} samples of {seen.pack}, {seen.read} read", title_justify="left"
    )
    for column in ("scores by the running model", "number", "lowest", "median", "highest"):
        table.add_column(column, justify="left" if column.startswith("scores") else "right")
    after = [pair.after for pair in seen.pairs]
    before = [pair.before for pair in seen.pairs]
    for title, scores in (
        ("photos of one identity", seen.same),
        ("different identities", seen.strangers),
        ("recorded pairs, before", before),
        ("recorded pairs, after", after),
    ):
        figures = (min(scores), statistics.median(scores), max(scores)) if scores else ()
        table.add_row(title, str(len(scores)), *(f"{figure:.3f}" for figure in figures))
    Console().print(table)
    if seen.thresholds:
        typer.echo(f"{seen.gallery}: thresholds set by hand would be reset: {', '.join(seen.thresholds)}.")
    typer.echo(f"{seen.gallery}: {len(seen.lost)} of {seen.read} samples would be lost.")
    _list_lost(seen.lost)


def _list_lost(lost: "list[moving.LostSample] | tuple[moving.LostSample, ...]") -> None:
    for sample in lost[:_LISTED]:
        typer.echo(f"  identity {sample.identity_id}, sample {sample.sample_id}: {sample.reason}", err=True)
    if len(lost) > _LISTED:
        typer.echo(f"  and {len(lost) - _LISTED} more", err=True)


def _teller(gallery: Gallery, bar: Progress) -> moving.Tell:
    tasks = {}

    async def tell(stage: moving.Stage, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(f"{gallery.name}: {stage}", total=None)
        bar.update(tasks[stage], completed=done, total=total)

    return tell


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
