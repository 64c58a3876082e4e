"""How the commands read the settings, and tell the operator what is wrong with them."""

import typer
from pydantic import ValidationError

from app.config import Settings
from app.engine.opening import open_engine
from app.errors import ModelUnavailable
from app.starting import UNUSABLE_CONFIGURATION

__all__ = ["UNUSABLE_CONFIGURATION", "read_settings", "require_engine"]


def read_settings() -> Settings:
    """The settings of the environment and `.env`; ends the command with a message when they cannot be used."""
    try:
        return Settings()
    except ValidationError as problem:
        for error in problem.errors(include_url=False, include_input=False):
            name = "_".join(str(part) for part in error["loc"]).upper()
            typer.echo(f"{name}: {error['msg']}" if name else error["msg"].removeprefix("Value error, "), err=True)
        raise typer.Exit(UNUSABLE_CONFIGURATION) from None


def require_engine(settings: Settings) -> None:
    """End the command if the model is missing, before any child starts."""
    try:
        open_engine(settings, device=settings.face_device).engine.close()
    except ModelUnavailable as problem:
        typer.echo(f"The face model cannot be used: {problem.detail}", err=True)
        raise typer.Exit(UNUSABLE_CONFIGURATION) from None
