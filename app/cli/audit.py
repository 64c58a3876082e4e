"""`idem audit`: prove offline that the log is whole, and what is needed for it: public keys and signed tree heads."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Final, TypeVar, cast

import typer

from app.cli._common import explained, in_runtime
from app.cli.stores import DataDirOption, settings_of
from app.documents.base import as_text
from app.documents.galleries import DEFAULT_GALLERY
from app.documents.tree import AuditKey, TreeHead
from app.domain.log_check import Head, Report, check_export
from app.domain.log_export import Form, Json
from app.domain.times import moment_of
from app.logs import configure_logging
from app.runtime import Runtime
from app.use_cases.trace_reference import Named, trace_reference
from storage.evidence import EvidenceUnavailable

T = TypeVar("T")

NEWEST: Final = 20
PUBLIC_KEY_BYTES: Final = 32

app = typer.Typer(
    help="The audit log: public keys, signed heads, and the proof that an export is whole.", no_args_is_help=True
)


@app.command()
def verify(
    export: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What /v1/audit/export answered.")],
    key: Annotated[
        list[Path],
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Public keys, as `idem audit key` prints or /v1/audit/keys answers them; repeat for several files.",
        ),
    ],
    heads: Annotated[
        Path | None,
        typer.Option(exists=True, help="Signed heads kept elsewhere: a file with one, or a folder of such files."),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            help="When the export was asked for, as 2026-11-21T09:30:00Z: heads signed later may be over more events.",
        ),
    ] = None,
    form: Annotated[str | None, typer.Option("--format", help="ndjson or csv; default: by the file's name.")] = None,
    *,
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Events may be left out, as from the export of a time or of some galleries."),
    ] = False,
) -> None:
    """Find and name what was edited, deleted, inserted, put out of order or cut off, without asking any server.

    Exit status 1: something does not fit.
    """
    wanted = form or ("csv" if export.suffix == ".csv" else "ndjson")
    if wanted not in {"ndjson", "csv"}:
        message = "ndjson or csv"
        raise typer.BadParameter(message, param_hint="--format")
    known = {key_id: public for path in key for key_id, public in _keys_in(path)}
    taken_at = None if at is None else _moment(at)
    kept = {} if heads is None else {path: _head_in(path) for path in _files(heads)}
    with export.open("rb") as lines:
        good = [head for head in kept.values() if head is not None]
        report = check_export(lines, cast("Form", wanted), known, good, is_partial=partial, taken_at=taken_at)
    for path in [path for path, head in kept.items() if head is None]:
        report.find(None, f"{path} does not hold a signed tree head")
    _tell(report, at)
    if report.findings:
        raise typer.Exit(1)


@app.command()
def key(data_dir: DataDirOption = None) -> None:
    """The public keys of tree heads, a line each: id and key in hex. Keep them where nobody of the service can reach them.

    `idem keys rotate --audit` puts a new one in place.
    """
    for known in _run(data_dir, lambda _: AuditKey.find_all().sort("+created_at").to_list()):
        typer.echo(f"{known.id} {known.public.hex()}")


@app.command()
def heads(
    data_dir: DataDirOption = None,
    *,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = NEWEST,
) -> None:
    """The newest signed heads, a JSON line each, with whether the evidence store holds them."""
    for head in _run(data_dir, lambda _: TreeHead.find_all().sort("-time").limit(limit).to_list()):
        typer.echo(json.dumps(head.head.as_json() | {"delivered": head.is_delivered}))


@app.command()
def reference(
    text: Annotated[str, typer.Argument(help="The reference, as it was given.")],
    gallery: Annotated[str, typer.Option(help="Its gallery.")] = DEFAULT_GALLERY,
    data_dir: DataDirOption = None,
) -> None:
    """List the events that name this reference, one JSON line each. The log itself stores only keyed hashes of references.

    `as` is `given` for an enrolment or a claim, `old` or `new` for a change.
    """

    async def traced(runtime: Runtime) -> list[Named]:
        return [named async for named in trace_reference(runtime, gallery, text)]

    for event, place in _run(data_dir, traced):
        typer.echo(json.dumps({
            "seq": event.seq, "time": as_text(event.time), "action": event.action, "as": place,
            "identity_id": event.subject.id, "actor_id": event.actor.id,
        }))  # fmt: skip


def _keys_in(path: Path) -> list[tuple[str, bytes]]:
    try:
        text = path.read_text(encoding="ascii")
        if text.startswith("{"):
            lines = [(known["key_id"], known["public_key"]) for known in json.loads(text)["keys"]]
        else:
            lines = [(key_id, public) for key_id, public in map(str.split, filter(str.strip, text.splitlines()))]
        found = [(key_id, bytes.fromhex(public)) for key_id, public in lines]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = []
    if not found or any(len(public) != PUBLIC_KEY_BYTES for _, public in found):
        message = f"{path} does not hold lines of an id and a public key in hex"
        raise typer.BadParameter(message, param_hint="--key")
    return found


def _moment(text: str) -> str:
    """The time as heads have theirs."""
    try:
        return as_text(moment_of(text))
    except ValueError as error:
        message = f"{text} is no time with a zone, like 2026-11-21T09:30:00Z"
        raise typer.BadParameter(message, param_hint="--at") from error


def _files(heads: Path) -> list[Path]:
    """The files of heads; in a whole evidence folder they have one of their own."""
    if heads.is_file():
        return [heads]
    found = sorted((heads / "heads" if (heads / "heads").is_dir() else heads).rglob("*.json"))
    if not found:  # whoever names the wrong folder must not be told that all is well
        message = f"there are no heads in {heads}"
        raise typer.BadParameter(message, param_hint="--heads")
    return found


def _head_in(path: Path) -> Head | None:
    try:
        return Head.of(cast("Json", json.loads(path.read_bytes())))
    except (OSError, ValueError, RecursionError):
        return None


def _tell(report: Report, at: str | None) -> None:
    for finding in report.findings:
        where = "" if finding.seq is None else f"event {finding.seq}: "
        typer.echo(f"{where}{finding.what}", err=True)
    typer.echo(f"{report.events} events read, {report.heads} signed heads fit")
    for start, stop in report.left_out:
        typer.echo(f"left out of the export, and unchanged by their hashes: {start} to {stop - 1}")
    if report.unplaced:
        typer.echo(f"{report.unplaced} heads end where this export tells nothing, and were not compared with it")
    if report.newer:
        typer.echo(
            f"{report.newer} heads were signed after it was taken, over more events, and were not compared with it"
        )
    if report.beyond and not at:
        typer.echo("if it was taken before those heads were signed, say when (--at)")
    if report.head is not None:
        told = "the export's own head is that" if report.findings else "whole up to the head"
        typer.echo(f"{told} of {report.head.time}, over {report.head.size} events")


def _run(data_dir: Path | None, work: Callable[[Runtime], Awaitable[T]]) -> T:
    """Do the work in a Runtime of its own; ends the command with a message where that cannot be."""
    settings = settings_of(data_dir)
    configure_logging("warning")
    with explained(EvidenceUnavailable):
        return asyncio.run(in_runtime(settings, work))
