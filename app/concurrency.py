"""Awaiting several pieces of work at once."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")
S = TypeVar("S")


async def all_of(*work: Awaitable[T]) -> list[T]:
    """The results, in the order of the arguments. The first error cancels the rest, and is raised when all have ended.

    After an error, `asyncio.gather` lets the rest go on, and a TaskGroup raises a group of errors.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():  # a second time would break off what it does at its end
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        tasks.clear()  # their error refers to this frame: both would stay until garbage collection


async def both(first: Awaitable[T], second: Awaitable[S]) -> tuple[T, S]:
    """As `all_of`, for two results of different types."""
    results: list[Any] = await all_of(first, second)
    return results[0], results[1]
