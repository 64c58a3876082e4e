"""`idem check`: whether MongoDB, photos and index agree."""

import asyncio
import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console

from app.cli._common import explained
from app.cli.backup import progress
from app.cli.stores import DataDirOption, stores_of
from app.config import Settings
from app.logs import configure_logging
from app.runtime import open_runtime
from app.use_cases import check as checking
from storage.photos import PhotoStoreUnavailable


def check(
    data_dir: DataDirOption = None,
    *,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is derived from the documents.")] = False,
    photos: Annotated[bool, typer.Option(help="Read every photo, too.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
) -> None:
    """Compare MongoDB, the photos and the index while the service runs. Exit status 1: something does not fit."""
    configure_logging("error")
    with explained(PhotoStoreUnavailable, status=2), stores_of(data_dir) as settings:
        found = asyncio.run(_check(settings, repair=repair, photos=photos, console=Console(stderr=as_json)))
    if as_json:
        findings = [dataclasses.asdict(finding) for finding in found.findings]
        page = {"looked_at": found.looked_at, "counts": found.counts, "standing": found.standing, "findings": findings}
        typer.echo(json.dumps(page))
    else:
        for finding in found.findings:
            where = " ".join(filter(None, [finding.gallery, finding.subject]))
            typer.echo(f"{finding.kind}: {where}: {finding.message}{' (mended)' if finding.is_mended else ''}")
        looked = ", ".join(f"{count} {what}" for what, count in found.looked_at.items())
        typer.echo(f"Looked at {looked}: {sum(found.counts.values())} findings, of which {found.standing} stand.")
    if found.standing:
        raise typer.Exit(1)


async def _check(settings: Settings, *, repair: bool, photos: bool, console: Console) -> checking.Checked:
    with progress(console) as tell:
        async with open_runtime(settings) as runtime:
            return await checking.check(runtime, tell, repair=repair, photos=photos)
