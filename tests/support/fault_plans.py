"""Faults by seed, put at the boundaries (`app.boundary.Boundary.faults`): calls that fail, come late, or lose their answer.

Each armed stretch of work draws from dice of its own, so that what else runs at the time does not change what it meets, and a
seed meets the same faults again.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from app.boundary import Boundaries

T = TypeVar("T")

#: How often a call meets a fault, by plan.
RATES = (0.01, 0.03, 0.08, 0.15)
#: In a row, on one dependency: more than a boundary bears.
OUTAGE_CALLS = 8
SHORT_SECONDS = 0.01
#: Beyond the time limits that `tests.support.fault_stories` gives to photos, queue and share.
LONG_SECONDS = 0.4

_DICE: ContextVar[Random | None] = ContextVar("dice", default=None)


@dataclass(slots=True)
class FaultPlan:
    """What one seed does to the calls of the work that it is armed for."""

    seed: int
    seen: Counter[str] = field(default_factory=Counter)
    trace: list[str] = field(default_factory=list)
    _outages: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """The share of calls that meet a fault."""
        return Random(f"rate {self.seed}").choice(RATES)  # noqa: S311 - chance, not secrecy

    @contextmanager
    def armed(self, stretch: str) -> Iterator[None]:
        """Meanwhile, calls of this task and its children meet faults. stretch: names the dice."""
        token = _DICE.set(Random(f"{self.seed} {stretch}"))  # noqa: S311
        self.trace.append(stretch)
        try:
            yield
        finally:
            _DICE.reset(token)
            self._outages.clear()

    @contextmanager
    def at(self, *boundaries: Boundaries) -> Iterator[None]:
        """Meanwhile, stand at all of these."""
        all_of_them = [
            b for some in boundaries for b in (some.mongo, some.queue, some.photos, some.evidence, some.share)
        ]
        for boundary in all_of_them:
            boundary.faults = self
        try:
            yield
        finally:
            for boundary in all_of_them:
                boundary.faults = None

    async def around(
        self, dependency: str, operation: str, work: Callable[[], Awaitable[T]], broken: Callable[[str], Exception]
    ) -> T:
        """See app.boundary.Faults."""
        dice = _DICE.get()
        if dice is None:
            return await work()
        kind = self._kind(dice, dependency)
        if kind is None:
            return await work()
        self.seen[f"{dependency} {kind}"] += 1
        self.trace.append(f"  {dependency} {operation}: {kind}")
        if kind == "error":
            raise broken("a fault of the plan: nothing was done")
        if kind == "cut":
            await work()
            raise broken("a fault of the plan: the answer was lost")
        long = dependency in ("photos", "queue", "share") and kind == "hang"
        await asyncio.sleep(LONG_SECONDS if long else SHORT_SECONDS * dice.random())
        return await work()

    def _kind(self, dice: Random, dependency: str) -> str | None:
        if self._outages.get(dependency):
            self._outages[dependency] -= 1
            return "error"
        if dice.random() >= self.rate:
            return None
        kind = dice.choices(["error", "cut", "delay", "hang", "outage"], [35, 40, 20, 1, 4])[0]
        if kind == "outage":
            self._outages[dependency] = OUTAGE_CALLS
            return "error"
        return kind
