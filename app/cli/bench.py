"""`idem bench`: start-up, enrolment and verification, measured on a stack of its own."""

import asyncio
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.table import Table

from app.cli.settings import read_settings
from app.config import Settings
from app.devstack.bench import Bench, BenchFailed, Figures, Report, usable_people
from app.devstack.client import CallFailed, ReadyStack, Service
from app.devstack.processes import dying_with
from app.devstack.stack import idem
from app.engine.opening import open_engine, open_reader
from app.errors import Problem

START_LIMIT_SECONDS = 180.0
STOP_LIMIT_SECONDS = 20.0
POLL_SECONDS = 0.02
#: A stack for measuring is its own: what the operator's settings name must not be written to. It runs in a folder of
#: its own, too, where no `.env` lies.
OWN = frozenset(
    {
        "MONGODB_URI",
        "REDIS_URL",
        "STORAGE_PATH",
        "VECTOR_DB_PATH",
        "PHOTO_STORE",
        "KEY_ENCRYPTION_KEY",
        "KEY_ENCRYPTION_KEY_FILE",
    }
)


def bench(
    faces: Annotated[Path, typer.Option(help="One folder with photos per person.")],
    model: Annotated[str | None, typer.Option(help="Face model pack. Default: FACE_MODEL.")] = None,
    concurrency: Annotated[str, typer.Option(help="How many callers at a time.")] = "1,4,8",
    requests: Annotated[int, typer.Option(min=8, help="Calls of each kind at each concurrency.")] = 60,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One object on one line, the last of the output.")] = False,
) -> None:
    """Measure start-up, enrolment and verification beside the bare model, on the same photos in the same run."""
    console = Console(stderr=as_json, highlight=False)
    try:
        levels = [int(level) for level in concurrency.split(",")]
    except ValueError:
        message = "give whole numbers with commas between: 1,4,8"
        raise typer.BadParameter(message, param_hint="--concurrency") from None
    if min(levels) < 1:
        message = "at least one caller at a time"
        raise typer.BadParameter(message, param_hint="--concurrency")
    try:
        report = asyncio.run(_measure(faces, model, levels, requests, console))
    except (BenchFailed, CallFailed, Problem, httpx.HTTPError) as problem:
        typer.echo(f"idem bench: {problem!s:.4000}", err=True)
        raise typer.Exit(1) from None
    console.print(_table(report))
    if as_json:
        typer.echo(report.model_dump_json())


async def _measure(faces: Path, model: str | None, levels: list[int], requests: int, console: Console) -> Report:
    settings = read_settings()
    if model is not None:
        settings = settings.model_copy(update={"face_model": model})
    opened = open_engine(settings)
    opened.engine.warm()
    console.print(f"Model: {opened.pack.card.pack} ({opened.reason})")
    reader = open_reader(settings)
    people, refused = usable_people(faces, opened.engine, needed=requests * len(levels), reader=reader)
    console.print(f"{len(people)} people, {refused} passed over (no face, several, too small)")
    figures: dict[str, Figures] = {}
    with (
        tempfile.TemporaryDirectory(prefix="idem-bench-") as folder,
        _own_stack(Path(folder), settings) as (ready, start_s),
    ):
        credentials = ready.credentials()
        if credentials is None:
            message = "the stack made no accounts: a benchmark is not for production"
            raise BenchFailed(message)
        async with Service(ready.url, connections=max(levels)) as service:
            run = await Bench.connect(service, credentials, ready.mongo_uri, opened.engine)
            await run.warm_up(people)
            for number, level in enumerate(levels):
                console.print(f"{level} at a time …")
                share = [people[(number * requests + i) % len(people)] for i in range(requests)]
                figures[str(level)] = await run.measure(share, level, reader=reader)
    return Report(start_s=start_s, pack=opened.pack.card.pack, people=len(people), refused=refused, concurrency=figures)


@contextmanager
def _own_stack(folder: Path, settings: Settings) -> Iterator[tuple[ReadyStack, float]]:
    """A fresh `idem up` on a free port; yields where it is and how long it took. Ended at the exit."""
    ready_file = folder / "ready"
    command = idem(
        "up", "--data-dir", str(folder / "data"), "--port", "0", "--no-demo", "--ready-file", str(ready_file)
    )
    environment = {name: value for name, value in os.environ.items() if name not in OWN} | {
        "FACE_MODEL": settings.face_model,
        "MODEL_DIR": str(settings.model_dir.resolve()),
    }
    began = time.monotonic()
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - our own command, of our own making
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=dying_with(os.getpid()),  # noqa: PLW1509 - it takes no lock
        )
    try:
        while not ready_file.exists():
            if process.poll() is not None or time.monotonic() - began > START_LIMIT_SECONDS:
                message = "the stack did not start:\n" + (folder / "up.log").read_text(errors="replace")
                raise BenchFailed(message)
            time.sleep(POLL_SECONDS)
        yield ReadyStack.model_validate_json(ready_file.read_bytes()), round(time.monotonic() - began, 2)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _table(report: Report) -> Table:
    table = Table(title=f"{report.pack}: ready in {report.start_s:.1f} s", title_justify="left")
    table.add_column("")
    for level in report.concurrency:
        table.add_column(f"{level} at a time", justify="right")
    rows = [figures.model_dump() for figures in report.concurrency.values()]
    for name, label in LABELS.items():
        table.add_row(label, *(f"{row[name]:g}" for row in rows))
    return table


LABELS = {
    "enrol_per_s": "enrolments/s",
    "screened_per_s": "enrolments/s with their verdicts",
    "enrol_p50_ms": "enrolment p50 ms",
    "enrol_p95_ms": "enrolment p95 ms",
    "verify_per_s": "verifications/s",
    "verify_p50_ms": "verification p50 ms",
    "verify_p95_ms": "verification p95 ms",
    "bare_per_s": "bare model: photos/s",
    "bare_p50_ms": "bare model: p50 ms",
    "transaction_p50_ms": "one journaled transaction p50 ms",
    "verify_ratio": "verification p50 / (bare + transaction)",
    "verify_rate_ratio": "bare rate / verification rate",
}
