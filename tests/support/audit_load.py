"""How many events a second the audit log takes, end to end: `python -m tests.support.audit_load`.

Callers record events as actions do, each in a transaction of its own; one process numbers them meanwhile. Counted is what lies
under a signed head in the evidence store. Then a log of many events: how long its root and its proofs take.
"""

import argparse
import asyncio
import json
import secrets
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from dataclasses import asdict, dataclass
from pathlib import Path

import pymongo
import uvloop
from pydantic import SecretStr
from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, record
from app.config import Settings
from app.documents.events import AuditEvent, Detail
from app.documents.tree import AuditTree, TreeHead, TreeNode, proof
from app.domain.callers import Caller, Role
from app.domain.merkle import Growth, consistency_path, inclusion_path, leaf_hash, proves_inclusion
from app.runtime import Runtime, open_runtime
from app.use_cases.sequence import grow, kept_up
from tests.fakes import FakeEngine
from tests.support import services

CALLER = Caller("app-1", "client", "Bank", frozenset({Role.RELYING_APP}), None, "token-1")


@dataclass(frozen=True, slots=True)
class Flow:
    """events: all that were committed. seconds: from the first one's beginning until all lay under a delivered head."""

    events: int
    seconds: float
    events_per_second: float
    longest_wait_seconds: float


@dataclass(frozen=True, slots=True)
class Proofs:
    """Of a log of that size: milliseconds for its root from what is stored, for the slowest proof; the longest path."""

    events: int
    root_ms: float
    inclusion_ms: float
    consistency_ms: float
    longest_path: int


async def call(runtime: Runtime, events: int, callers: int) -> float:
    """Record so many events by so many callers side by side; returns how long the slowest of some waited for its number."""
    left = iter(range(events))
    waits = [0.0]

    async def one() -> None:
        for number in left:
            action = Action("face.verify", CALLER, f"request-{number}", "192.0.2.1", has_own_request_id=True)
            detail: Detail = {"match": True, "score": 0.36, "number": number}

            async def body(session: AsyncClientSession, action: Action = action, detail: Detail = detail) -> AuditEvent:
                return await record(session, action, subject_kind="identity", subject_id="ann", detail=detail)

            event = await runtime.transaction(body, seconds=30)
            if number % 100 == 0:
                waits.append(await _numbered_after(event.id))

    await asyncio.gather(*(one() for _ in range(callers)))
    return max(waits)


async def flow(runtime: Runtime, *, events: int, processes: int, callers: int) -> Flow:
    """Events from so many processes, with callers in each; numbered, signed and delivered by this one."""
    share = events // processes
    settings = runtime.settings
    wanted = [
        settings.mongodb_uri,
        settings.mongodb_database,
        settings.key_encryption_secret(),
        str(share),
        str(callers),
    ]
    children = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.audit_load", "--call", *wanted, stdin=PIPE, stdout=PIPE
        )
        for _ in range(processes)
    ]
    for child in children:
        assert child.stdout is not None
        assert await child.stdout.readline() == b"ready\n"
    async with kept_up(runtime):
        started = time.monotonic()
        waits = [json.loads((await child.communicate(b"go\n"))[0]) for child in children]
        while await TreeHead.find({"size": share * processes, "is_delivered": True}).count() == 0:
            await asyncio.sleep(0.02)
        seconds = time.monotonic() - started
    done = share * processes
    return Flow(done, round(seconds, 2), round(done / seconds, 1), round(max(waits), 2))


async def numbering(runtime: Runtime, events: int) -> float:
    """Events a second that one process numbers when they lie there already."""
    await call_without_waiting(events)
    started = time.monotonic()
    while await grow(runtime):
        pass
    return round(events / (time.monotonic() - started), 1)


async def call_without_waiting(events: int) -> None:
    """So many events at once, as nobody can make them."""
    action = Action("face.verify", CALLER, "request", "192.0.2.1", has_own_request_id=True)
    made = await record(None, action, subject_kind="identity", subject_id="ann", detail={"match": True, "score": 0.36})
    stored = await AuditEvent.get_pymongo_collection().find_one({"_id": made.id})
    assert stored is not None
    copies = [stored | {"_id": f"event-{number:09d}"} for number in range(events - 1)]
    await AuditEvent.get_pymongo_collection().insert_many(copies, ordered=False)


async def _numbered_after(event_id: str) -> float:
    started = time.monotonic()
    while await AuditEvent.find({"_id": event_id, "seq": {"$ne": None}}).count() == 0:
        await asyncio.sleep(0.02)
    return time.monotonic() - started


def _settings(uri: str, database: str, key: str, folder: Path) -> Settings:
    return Settings(
        mongodb_uri=uri, mongodb_database=database, redis_url="redis://127.0.0.1:1/0", key_encryption_key=SecretStr(key),
        storage_path=folder / "photos", evidence_path=folder / "evidence", vector_db_path=folder / "index",
        index_cache_path=folder / "copies",
    )  # fmt: skip


async def _child(uri: str, database: str, key: str, events: int, callers: int, folder: Path) -> None:
    async with open_runtime(_settings(uri, database, key, folder), FakeEngine()) as runtime:
        print("ready", flush=True)  # noqa: T201
        await asyncio.to_thread(sys.stdin.readline)
        print(json.dumps(await call(runtime, events, callers)))  # noqa: T201


async def filled(events: int) -> None:
    """A tree of so many leaves, put into the store without events that anybody made."""
    growth, nodes, leaves = Growth(), [], []
    for number in range(events):
        hash_ = leaf_hash(str(number).encode())
        nodes += [{"_id": TreeNode.name(node), "hash": value} for node, value in growth.add(hash_)]
        leaves.append({"_id": f"event-{number:09d}", "seq": number, "leaf_hash": hash_.hex()})
    await TreeNode.get_pymongo_collection().insert_many(nodes, ordered=False)
    await AuditEvent.get_pymongo_collection().insert_many(leaves, ordered=False)
    await AuditTree.get_pymongo_collection().update_one(
        {}, {"$set": {"size": events, "peaks": growth.peaks, "signed_size": None}}
    )


async def proofs(events: int, *, asked: int = 50) -> Proofs:
    """The root and proofs of the log as it stands."""
    started = time.perf_counter()
    root = (await AuditTree.current()).growth().root
    root_ms = (time.perf_counter() - started) * 1000
    slowest, longest, slowest_consistency = 0.0, 0, 0.0
    for step in range(asked):
        seq = (step * 7919 + 1) % events
        started = time.perf_counter()
        path = await proof(inclusion_path(seq, events))
        slowest = max(slowest, (time.perf_counter() - started) * 1000)
        longest = max(longest, len(path))
        assert proves_inclusion(leaf_hash(str(seq).encode()), seq, events, path, root)
        started = time.perf_counter()
        await proof(consistency_path(seq, events))
        slowest_consistency = max(slowest_consistency, (time.perf_counter() - started) * 1000)
    return Proofs(events, round(root_ms, 2), round(slowest, 2), round(slowest_consistency, 2), longest)


async def measure(events: int, processes: int, callers: int, tree: int, folder: Path) -> dict[str, object]:
    """All of it, on a mongod of its own."""
    (folder / "mongo").mkdir()
    server = services.mongo_server(folder / "mongo")
    settings = _settings(server.url, "flow", secrets.token_urlsafe(32), folder)
    try:
        async with open_runtime(settings, FakeEngine()) as runtime:
            flowing = await flow(runtime, events=events, processes=processes, callers=callers)
        with pymongo.timeout(120):
            async with open_runtime(
                settings.model_copy(update={"mongodb_database": "numbered"}), FakeEngine()
            ) as runtime:
                rate = await numbering(runtime, 5000)
            async with open_runtime(settings.model_copy(update={"mongodb_database": "filled"}), FakeEngine()):
                await filled(tree)
                proving = await proofs(tree)
    finally:
        server.process.close()
    return {"flow": asdict(flowing), "numbered_per_second": rate, "proofs": asdict(proving)}


def main() -> None:
    """Print the figures as one JSON document."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--events", type=int, default=10_000)
    asked.add_argument("--processes", type=int, default=2)
    asked.add_argument("--callers", type=int, default=32)
    asked.add_argument("--tree", type=int, default=100_000)
    asked.add_argument("--call", nargs=5, help=argparse.SUPPRESS)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.call is not None:
            uri, database, key, events, callers = given.call
            # The loop that uvicorn takes for `idem serve`.
            uvloop.run(_child(uri, database, key, int(events), int(callers), Path(folder)))
            return
        work = measure(given.events, given.processes, given.callers, given.tree, Path(folder))
        print(json.dumps(asyncio.run(work)))  # noqa: T201


if __name__ == "__main__":
    main()
