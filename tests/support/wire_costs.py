"""What attacks on the wire cost other callers: `python -m tests.support.wire_costs [--checkout DIR] [--nofile N] [KIND...]`.

Starts a whole stack with one API process, and runs each load in its own process. Prints one line of JSON for each load: how long
`/health` and another client's photo of 3 MB took, the API's memory, and the answers to the attackers.
--checkout: another version of the product, to compare with.
"""

import argparse
import http.client
import json
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import httpx
import psutil

from app.devstack.demo import sample_people
from tests.e2e.builders import Service, open_service
from tests.support.stacks import RunningStack, running_stack
from tests.support.wire_load import Running, under_load

SECONDS: Final = 20.0
PHOTO_BYTES: Final = 3_000_000
MEBIBYTE: Final = 2**20


def large_photo() -> bytes:
    """A portrait of 3 MB: a small one with comments."""
    photo = sample_people()[0].photo
    comment = b"\xff\xfe\xff\xff" + b" " * 65_533
    return photo[:2] + comment * (PHOTO_BYTES // len(comment)) + photo[2:]


@dataclass(slots=True)
class Watch:
    """Figures of one load."""

    service: Service
    api: psutil.Process
    photo: bytes

    def timed(self, ask: Callable[[], int], seconds: float, pause: float) -> tuple[list[float], dict[str, int]]:
        """Ask for this many seconds. Returns how long each answer took, and the statuses."""
        took: list[float] = []
        seen: dict[str, int] = {}
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.perf_counter()
            try:
                status = str(ask())
            except (httpx.HTTPError, http.client.HTTPException, OSError) as error:
                status = type(error).__name__
            took.append(time.perf_counter() - began)
            seen[status] = seen.get(status, 0) + 1
            time.sleep(pause)
        return took, seen

    def health(self) -> int:
        """Ask `/health` on a new connection, as a probe does."""
        connection = http.client.HTTPConnection("127.0.0.1", int(self.service.url.rpartition(":")[2]), timeout=60)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        finally:
            connection.close()

    def detect(self) -> int:
        """Send another client's photo."""
        return self.service.app.post("/v1/faces/detect", files={"photo": ("p.jpg", self.photo)}).status_code

    def measure(self, seconds: float) -> dict[str, object]:
        """Measure all figures for this many seconds. A load may run at the same time."""
        memory, is_over = [self.api.memory_info().rss], threading.Event()

        def look() -> None:
            while not is_over.wait(0.1):
                memory.append(self.api.memory_info().rss)

        results: dict[str, tuple[list[float], dict[str, int]]] = {}

        def ask(name: str, question: Callable[[], int], pause: float) -> None:
            results[name] = self.timed(question, seconds, pause)

        threads = [
            threading.Thread(target=look),
            threading.Thread(target=ask, args=("health", self.health, 0.02)),
            threading.Thread(target=ask, args=("photo", self.detect, 0.2)),
        ]
        for one in threads:
            one.start()
        for one in threads[1:]:
            one.join()
        is_over.set()
        threads[0].join()
        figures: dict[str, object] = {
            "memory_peak_mib": round(max(memory) / MEBIBYTE),
            "memory_end_mib": round(memory[-1] / MEBIBYTE),
        }
        for name, (took, seen) in results.items():
            figures[name] = {
                "p50_ms": round(statistics.median(took) * 1000, 1),
                "p95_ms": round(sorted(took)[int(len(took) * 0.95)] * 1000, 1),
                "longest_ms": round(max(took) * 1000, 1),
                "answers": seen,
            }
        return figures


def tokens(service: Service) -> str:
    """The attacker's token. The photo that is measured belongs to another caller."""
    return str(service.officer.headers["Authorization"]).removeprefix("Bearer ")


def loads(token: str) -> dict[str, dict[str, object]]:
    """The loads by name, with their options."""
    return {
        "A3 chunks": {"kind": "chunks", "connections": 24},
        "A3 extensions": {"kind": "extensions", "connections": 24},
        "A3 trailers": {"kind": "trailers", "connections": 24},
        "A3 gone": {"kind": "gone", "connections": 24, "path": "/v1/identities"},
        "A3 header": {"kind": "header", "connections": 24},
        "A3 pipeline": {"kind": "pipeline", "connections": 24},
        "A3 lines": {"kind": "lines", "connections": 24, "size": 2 * MEBIBYTE, "token": token},
        "A5 stands still": {"kind": "hold", "connections": 60, "size": 10_000_000, "token": token},
        "A5 enrolments of 20 MB": {"kind": "hold", "connections": 60, "size": 20_000_000, "token": token},
        "A5 trickles": {"kind": "hold", "connections": 60, "size": 20_000_000, "token": token, "trickle_seconds": 6},
        "A15 idle": {"kind": "idle", "connections": 1100},
    }


def measure(stack: RunningStack, wanted: list[str]) -> None:
    """Measure one load after the other."""
    with open_service(stack.ready) as service:
        port = int(service.url.rpartition(":")[2])
        api = psutil.Process(next(pid for name, pid in stack.pids().items() if name.startswith("api")))
        watch = Watch(service, api, large_photo())
        for _ in range(5):
            watch.detect()
        tell("alone", watch.measure(8))
        for name, options in loads(tokens(service)).items():
            if wanted and not any(one in name for one in wanted):
                continue
            idle = api.memory_info().rss // MEBIBYTE
            given = {key: value for key, value in options.items() if key != "kind"}
            running: Running
            with under_load(str(options["kind"]), port, **given) as running:
                figures = watch.measure(SECONDS)
            tell(name, figures | {"memory_idle_mib": idle, "attackers": running.answers, "load": os.getloadavg()[0]})
            time.sleep(3)


def tell(name: str, figures: dict[str, object]) -> None:
    """Print one line."""
    sys.stdout.write(json.dumps({"load_name": name, **figures}) + "\n")
    sys.stdout.flush()


def limit_files(most: int) -> None:
    """Limit the open files of the stack and all its processes, as soon as it runs. The loads have no such limit."""
    while not (started := psutil.Process().children()):
        time.sleep(0.01)
    resource.prlimit(started[0].pid, resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("wanted", nargs="*")
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--nofile", type=int)
    given = parser.parse_args()
    if given.nofile:
        threading.Thread(target=limit_files, args=(given.nofile,), daemon=True).start()
    environment = dict(os.environ)
    if given.checkout:
        environment |= {"PYTHONPATH": str(given.checkout), "PYTHONSAFEPATH": "1"}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_stack(Path(folder) / "data", "--no-demo", "--api-workers", "1", environment=environment) as stack,
    ):
        measure(stack, cast("list[str]", given.wanted))


if __name__ == "__main__":
    main()
