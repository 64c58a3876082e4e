"""`idem`: the operator's commands, one module each.

A command's module is imported when the command is asked for: `idem up` has mongod running before Python has read what
the API needs. `idem --help`, which shows them all, imports them all.
"""

import importlib
import sys
from collections.abc import Mapping
from typing import Final

import typer

from app.config import PlaceRefused
from app.starting import UNUSABLE_CONFIGURATION

#: Command -> where its function, or its typer app of sub-commands, lies.
COMMANDS: Final[Mapping[str, str]] = {
    "up": "app.cli.up:up",
    "demo": "app.cli.demo:demo",
    "bench": "app.cli.bench:bench",
    "serve": "app.cli.serve:serve",
    "worker": "app.cli.worker:worker",
    "users": "app.cli.users:app",
    "models": "app.cli.models:app",
    "index": "app.cli.index:app",
    "dedup": "app.cli.dedup:app",
    "audit": "app.cli.audit:app",
    "keys": "app.cli.keys:app",
    "backup": "app.cli.backup:backup",
    "restore": "app.cli.backup:restore",
    "check": "app.cli.check:check",
    "stores": "app.cli.places:app",
}


def build_app(wanted: str | None) -> typer.Typer:
    """The typer app with one command, or with all when `wanted` is not the name of one (help, a typing error)."""
    app = typer.Typer(
        name="idem",
        help="One person, one identity: enrol people by face, find those who enrol twice, authenticate by selfie.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name in [wanted] if wanted is not None and wanted in COMMANDS else list(COMMANDS):
        module, _, attribute = COMMANDS[name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    return app


def main() -> None:
    """The `idem` command."""
    try:
        build_app(sys.argv[1] if len(sys.argv) > 1 else None)(prog_name="idem")
    except PlaceRefused as refused:
        typer.echo(f"{refused}.", err=True)
        sys.exit(UNUSABLE_CONFIGURATION)


def _root() -> None:
    """Present, so that typer builds a group even of one command."""
