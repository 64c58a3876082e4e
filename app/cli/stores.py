"""`--data-dir`: which stores a command works on: those of the settings, or those of a stack that `idem up` started."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from app.cli.settings import UNUSABLE_CONFIGURATION, read_settings
from app.config import Settings
from app.devstack.client import ReadyStack
from app.devstack.processes import dying_with, write_privately
from app.devstack.servers import ServerSecret, free_port, initiate_replica_set, mongo_uri, mongod_command, redis_url
from app.devstack.stack import READY_NAME, StackFailed, data_folder, embedded_settings

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


@contextmanager
def stores_of(data_dir: Path | None) -> Iterator[Settings]:
    """As `settings_of`; where no stack runs on the folder, its MongoDB alone is started for as long as the body runs.

    So a restore that a power cut ended goes on, although nobody serves before its end.
    """
    folder = Path(".data") if data_dir is None else data_dir
    is_elsewhere = data_dir is None and bool(read_settings().mongodb_uri)
    with ExitStack() as held:
        if is_elsewhere or not (folder / "mongo").is_dir():
            yield settings_of(data_dir)
            return
        try:
            held.enter_context(data_folder(folder))
        except StackFailed:  # it is running
            yield settings_of(data_dir)
            return
        with _mongo_alone(folder.resolve()):
            yield settings_of(folder)


@contextmanager
def _mongo_alone(folder: Path) -> Iterator[None]:
    """The MongoDB of a stack that does not run, announced where the stack would be, without an address to call."""
    port, secret = free_port(), ServerSecret.kept_in(folder)
    process = subprocess.Popen(  # noqa: S603 - our own command line
        mongod_command(folder / "mongo", port, secret), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=dying_with(os.getpid()),  # noqa: PLW1509 - as the stack's own
    )  # fmt: skip
    try:
        initiate_replica_set(port, secret, is_running=lambda: process.poll() is None)
        announced = ReadyStack(
            url="", pid=os.getpid(), admin=None, users=None, client=None, mongo_uri=mongo_uri(port, secret),
            redis_url=redis_url(free_port(), secret), data_dir=str(folder),
        )  # fmt: skip
        write_privately(folder / READY_NAME, announced.model_dump_json())
        yield
    finally:
        (folder / READY_NAME).unlink(missing_ok=True)
        process.terminate()
        process.wait()
