"""Put the index under load for minutes and add what came of it to a file: `python -m scripts.index_soak --results FILE`.

The servers and the product's processes are children of this command; see `tests.support.index_load`. Each lap is one run on
fresh stores with a seed of its own, and one line of the results; laps that stand there already, by the same plan, are not run
again. The exit status is 1 when a lap of this run broke a promise.
"""

import argparse
import asyncio
import json
import platform
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tests.support import services
from tests.support.index_load import Plan, Report, load_settings, put_under_load

#: The p99 around a change of generation may be so many times the p99 without.
HIGHEST_SWAP_RATIO = 2.0


def main() -> int:
    """Run the laps that are missing, and tell how each went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="one JSON object a line, one line a lap")
    parser.add_argument("--laps", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--people", type=int, default=20_000)
    parser.add_argument("--publish-seconds", type=float, default=20.0)
    given = parser.parse_args()
    done = [json.loads(line)["plan"] for line in _lines(given.results)]
    is_good = True
    for seed in range(1, given.laps + 1):
        plan = Plan(seconds=given.minutes * 60, seed=seed, people=given.people, publish_seconds=given.publish_seconds)
        if asdict(plan) in done:
            print(f"lap {seed} stands in {given.results}")
            continue
        report = _lap(plan)
        broken = _broken(report)
        line = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.processor() or platform.machine(),
            "plan": asdict(plan), "broken": broken, "swap_ratio": round(report.swap_ratio, 2), **asdict(report),
        }  # fmt: skip
        given.results.parent.mkdir(parents=True, exist_ok=True)
        with given.results.open("a") as results:
            results.write(json.dumps(line) + "\n")
        print(json.dumps(line, indent=1))
        is_good = is_good and not broken
    return 0 if is_good else 1


def _lap(plan: Plan) -> Report:
    with tempfile.TemporaryDirectory(prefix="idem-soak-") as folder:
        home = Path(folder)
        mongo = services.mongo_server(_made(home / "mongo"))
        redis = services.redis_server(_made(home / "redis"))
        try:
            settings = load_settings(mongo.url, redis.url, "soak", home)
            return asyncio.run(put_under_load(settings, home, plan))
        finally:
            redis.process.close()
            mongo.process.close()


def _broken(report: Report) -> list[str]:
    """Which promises did not hold."""
    broken = []
    if report.fault_count:
        broken.append(f"{report.fault_count} faults")
    if report.swap_ratio > HIGHEST_SWAP_RATIO:
        broken.append(f"p99 around a swap is {report.swap_ratio:.2f} times the p99 without")
    if not report.kills:
        broken.append("no publisher was killed")
    return broken


def _lines(results: Path) -> list[str]:
    return results.read_text().splitlines() if results.exists() else []


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())
