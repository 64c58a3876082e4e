"""Kill parts and inject faults, and add what came of it to a file: `python -m scripts.torture --results docs/torture.jsonl`.

Two kinds of slices, each a line of the results: `plans`, so many seeded stories under fault plans at the boundaries, in processes
side by side; and `kills`, so many `kill -9` over API, workers, Redis and MongoDB under load. Slices that stand there already are
not run again, so it may be ended at any time and goes on where it was. The exit status is 1 when a promise was broken.
`--seed N` plays one story again and prints each fault that it meets.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop

from tests.support import services
from tests.support.fault_stories import Outcome, play_all, story_settings
from tests.support.killing import KillPlan, kill_parts

PLANS, PLANS_A_SLICE = 10_000, 500
KILLS, KILLS_A_SLICE = 1000, 100
#: Matrices of a gallery's rotation are small: more threads only spin.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
#: Before each line that a player says of a story.
STORY = "story "
#: Of broken promises, so many are written down in full.
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of the whole. first and last: seeds of stories; of kills, first is the seed and last how many."""

    kind: str
    first: int
    last: int


def main() -> int:
    """Run the slices that are missing, for as long as was asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("docs/torture.jsonl"))
    parser.add_argument("--minutes", type=float, default=24 * 60, help="begin no slice after this time")
    parser.add_argument("--plans", type=int, default=PLANS, help="seeded fault plans in all")
    parser.add_argument("--kills", type=int, default=KILLS, help="kills in all")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes that play stories side by side"
    )
    parser.add_argument("--seed", type=int, help="play this story only, and tell each fault")
    parser.add_argument("--one-of", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one_of is not None:
        return _play_here(*given.one_of)
    if given.seed is not None:
        return _replay(given.seed)
    began, is_good = time.monotonic(), True
    for part in _missing(given):
        if time.monotonic() - began > given.minutes * 60:
            print("the time is over; the same command goes on")
            break
        line = _plans(part, given.jobs) if part.kind == "plans" else _kills(part)
        given.results.parent.mkdir(parents=True, exist_ok=True)
        with given.results.open("a") as results:
            results.write(json.dumps(line) + "\n")
        print(json.dumps(line))
        is_good = is_good and not line["broken"]
    _tell(given.results)
    return 0 if is_good else 1


def _missing(given: argparse.Namespace) -> list[Slice]:
    """The slices that do not stand in the results, kinds in turn."""
    plans = [
        Slice("plans", first, min(first + PLANS_A_SLICE - 1, given.plans))
        for first in range(1, given.plans + 1, PLANS_A_SLICE)
    ]
    kills = [
        Slice("kills", seed, min(KILLS_A_SLICE, given.kills - done))
        for seed, done in enumerate(range(0, given.kills, KILLS_A_SLICE), start=1)
    ]
    done = {(line["kind"], line["first"], line["last"]) for line in _lines(given.results)}
    in_turn = [part for pair in zip(plans, kills, strict=False) for part in pair]
    rest = [part for part in [*plans, *kills] if part not in in_turn]
    return [part for part in [*in_turn, *rest] if (part.kind, part.first, part.last) not in done]


def _plans(part: Slice, jobs: int) -> dict[str, Any]:
    """The slice's stories, dealt out to processes on one mongod and one Redis."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="idem-torture-") as folder:
        home = Path(folder)
        mongo, redis = _stores(home)
        try:
            players = [
                subprocess.Popen(  # noqa: S603 - ourselves
                    [sys.executable, "-m", "scripts.torture", "--one-of", mongo.url, redis.url, str(home / str(n)),
                     ",".join(str(seed) for seed in range(part.first + n, part.last + 1, jobs))],
                    stdout=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD},
                )
                for n in range(jobs)
            ]  # fmt: skip
            said = [player.communicate()[0] for player in players]
        finally:
            redis.process.close()
            mongo.process.close()
    lines = [line for text in said for line in text.splitlines() if line.startswith(STORY)]  # between them are logs
    outcomes = [json.loads(line.removeprefix(STORY)) for line in lines]
    broken = [f"seed {o['seed']}: {what}" for o in outcomes for what in o["broken"]]
    missing = part.last - part.first + 1 - len(outcomes)
    if missing:
        broken.append(f"{missing} stories did not end; players' exit statuses: {[p.returncode for p in players]}")
    return _line(
        part, broken, began, plans=len(outcomes), faults=_total(o["faults"] for o in outcomes),
        answered=_total(o["answered"] for o in outcomes),
    )  # fmt: skip


def _kills(part: Slice) -> dict[str, Any]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="idem-torture-") as folder:
        report = asyncio.run(kill_parts(Path(folder) / "kills", KillPlan(seed=part.first, kills=part.last)))
    return _line(
        part, report.broken, began, kills=dict(sorted(report.kills.items())), answered=dict(report.answered),
        deeds_per_kill=report.deeds_per_kill, events=report.events, doubtful=report.doubtful,
        settled_seconds=report.settled_seconds,
    )  # fmt: skip


def _line(part: Slice, broken: list[str], began: float, **figures: object) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "kind": part.kind, "first": part.first, "last": part.last,
        "seconds": round(time.monotonic() - began, 1), "broken": len(broken), "examples": broken[:SHOWN], **figures,
    }  # fmt: skip


def _play_here(mongo_url: str, redis_url: str, home: str, seeds: str) -> int:
    """Play these stories in this process; a line of JSON for each."""
    folder = Path(home)
    settings = story_settings(mongo_url, redis_url, f"stories_{folder.name}", folder)

    async def play() -> None:
        async for outcome in play_all(settings, [int(seed) for seed in seeds.split(",") if seed]):
            print(STORY + json.dumps(_told(outcome)), flush=True)

    uvloop.run(play())  # as uvicorn does
    return 0


def _replay(seed: int) -> int:
    with tempfile.TemporaryDirectory(prefix="idem-torture-") as folder:
        home = Path(folder)
        mongo, redis = _stores(home)

        async def play() -> Outcome:
            settings = story_settings(mongo.url, redis.url, "story", home / "story")
            (outcome,) = [outcome async for outcome in play_all(settings, [seed])]
            return outcome

        try:
            outcome = uvloop.run(play())
        finally:
            redis.process.close()
            mongo.process.close()
    print("\n".join(outcome.trace))
    print(json.dumps(_told(outcome), indent=1))
    return 1 if outcome.broken else 0


def _stores(home: Path) -> tuple[services.Server, services.Server]:
    for name in ("mongo", "redis"):
        (home / name).mkdir()
    return services.mongo_server(home / "mongo"), services.redis_server(home / "redis")


def _told(outcome: Outcome) -> dict[str, Any]:
    return {
        "seed": outcome.seed, "broken": outcome.broken, "faults": dict(outcome.faults), "answered": dict(outcome.answered),
    }  # fmt: skip


def _total(counts: Any) -> dict[str, int]:  # noqa: ANN401 - an iterable of JSON objects
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _tell(results: Path) -> None:
    """The sums over all slices so far."""
    lines = _lines(results)
    plans = sum(line["plans"] for line in lines if line["kind"] == "plans")
    kills = sum(sum(line["kills"].values()) for line in lines if line["kind"] == "kills")
    broken = sum(line["broken"] for line in lines)
    print(f"in {results}: {plans} fault plans, {kills} kills, {broken} broken promises")


def _lines(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


if __name__ == "__main__":
    sys.exit(main())
