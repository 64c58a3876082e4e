"""What the commands share: how they open a Runtime for their work, and how they end where it fails."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import typer
from pymongo.errors import PyMongoError

from app.config import Settings
from app.errors import Problem
from app.runtime import Runtime, open_runtime

T = TypeVar("T")


async def in_runtime(settings: Settings, work: Callable[[Runtime], Awaitable[T]]) -> T:
    """Do the work in a Runtime of its own."""
    async with open_runtime(settings) as runtime:
        return await work(runtime)


@contextmanager
def explained(*others: type[Exception], status: int = 1) -> Iterator[None]:
    """End the command with a message and this status where its work fails in a way that an operator can understand.

    others: errors of the work besides Problems and those of stores, files and values.
    """
    understood: tuple[type[Exception], ...] = (*others, PyMongoError, OSError, ValueError)
    try:
        yield
    except Problem as problem:
        typer.echo(f"{problem.title}: {problem.detail}", err=True)
    except understood as error:
        typer.echo(f"{type(error).__name__}: {error!s:.500}", err=True)
    else:
        return
    raise typer.Exit(status)
