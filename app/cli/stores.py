"""`--data-dir`: which stores a command works on: those of the settings, or those of a stack that `idem up` started."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from app.cli.settings import UNUSABLE_CONFIGURATION, read_settings
from app.config import Settings
from app.devstack.stack import embedded_settings

DataDirOption = Annotated[
    Path | None, typer.Option(help="A running `idem up`'s data folder; without it, the stores that the settings name.")
]


def settings_of(data_dir: Path | None) -> Settings:
    """The settings of a command; ends it with a message when they name no stores.

    Without `data_dir` and without MONGODB_URI, the stack on `.data` is meant, as `idem up` has it.
    """
    settings = read_settings()
    if data_dir is None:
        if settings.mongodb_uri:
            return settings
        data_dir = Path(".data")
    try:
        return embedded_settings(settings, data_dir)
    except (OSError, ValidationError):
        typer.echo(f"No stack is running on {data_dir}: start `idem up`, or name its folder with --data-dir.", err=True)
        raise typer.Exit(UNUSABLE_CONFIGURATION) from None
