"""The pool that hashes passwords: a few at a time, a short line, and the same cost for everybody."""

import asyncio
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest
from passlib.hash import argon2

from app.access import passwords
from app.access.passwords import PasswordPool, Stranger, hash_password, password_matches
from app.errors import NotReady

HASH_MIB = 64


async def test_h58_of_200_logins_at_once_some_wait_some_are_refused_and_memory_stays_bounded() -> None:
    pool, hashed = PasswordPool(threads=2, line=4), hash_password("correct horse")
    password_matches("warming up", None)
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)

    with ThreadPoolExecutor(1) as watcher:
        watching = watcher.submit(watch)
        results = await asyncio.gather(
            *(pool.matches("correct horse", hashed) for _ in range(200)), return_exceptions=True
        )
        done.set()
        watching.result()
    refused = [result for result in results if isinstance(result, NotReady)]
    assert results.count(True) == 6
    assert len(refused) == 194
    assert {problem.retry_after_seconds for problem in refused} == {2}
    assert (peak - before) / 2**20 < 3 * HASH_MIB
    # Afterwards everybody is let in again.
    assert await pool.matches("correct horse", hashed)
    pool.close()


async def test_h58_whoever_hangs_up_leaves_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "_ARGON2", argon2.using(type="ID", memory_cost=64, rounds=1, parallelism=1))
    pool, may_go_on = PasswordPool(threads=1, line=1), threading.Event()
    running = asyncio.create_task(pool._run(may_go_on.wait))
    waiting = asyncio.create_task(pool.hashed("correct horse"))
    await asyncio.sleep(0.05)
    with pytest.raises(NotReady):
        await pool.hashed("correct horse")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.sleep(0.05)
    again = asyncio.create_task(pool.hashed("correct horse"))
    await asyncio.sleep(0.05)
    may_go_on.set()
    assert await running
    assert (await again).startswith("$argon2id$")
    pool.close()
    with pytest.raises(RuntimeError):
        await pool.hashed("correct horse")


async def test_a10_strangers_are_served_by_how_often_their_address_and_network_asked() -> None:
    pool, gate, served = PasswordPool(threads=1, line=8), threading.Event(), []
    first = asyncio.create_task(pool._run(gate.wait))
    await asyncio.sleep(0)
    waiting = [
        ("flood 1", Stranger("10.0.0.1", "10.0.0.0/24")), ("flood 2", Stranger("10.0.0.1", "10.0.0.0/24")),
        ("flood 3", Stranger("10.0.0.1", "10.0.0.0/24")), ("neighbour", Stranger("10.0.0.2", "10.0.0.0/24")),
        ("elsewhere", Stranger("192.0.2.7", "192.0.2.0/24")), ("known", None),
    ]  # fmt: skip
    tasks = []
    for name, stranger in waiting:
        tasks.append(asyncio.create_task(pool._run(partial(served.append, name), stranger)))
        await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, *tasks)
    assert served == ["known", "flood 1", "elsewhere", "neighbour", "flood 2", "flood 3"]
    pool.close()


async def test_a10_the_line_is_full_for_those_who_fill_it() -> None:
    pool, gate = PasswordPool(threads=1, line=3), threading.Event()
    tasks = [asyncio.create_task(pool._run(gate.wait, Stranger("10.0.0.1", "10.0.0.0/24"))) for _ in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(NotReady):
        await pool._run(gate.wait, Stranger("10.0.0.1", "10.0.0.0/24"))
    newcomer = asyncio.create_task(pool._run(gate.wait, Stranger("192.0.2.7", "192.0.2.0/24")))
    known = asyncio.create_task(pool._run(gate.wait))
    await asyncio.sleep(0)
    gate.set()
    answers = await asyncio.gather(*tasks, newcomer, known, return_exceptions=True)
    assert [answer is True for answer in answers] == [True, True, False, False, True, True]
    pool.close()


async def test_h57_an_overlong_password_takes_no_place_in_the_line() -> None:
    pool = PasswordPool(threads=1, line=0)
    taken = asyncio.create_task(pool.matches("correct horse", None))
    await asyncio.sleep(0)
    assert not await pool.matches("x" * 1_000_000, None)
    assert not await taken
    pool.close()


def test_h56_an_unknown_user_costs_what_a_known_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # Hashes of half a millisecond: whatever else differed between the two would stand out all the more.
    monkeypatch.setattr(passwords, "_ARGON2", argon2.using(type="ID", memory_cost=256, rounds=1, parallelism=1))
    passwords._decoy_hash.cache_clear()
    hashed = hash_password("correct horse")
    password_matches("warming up", None)

    def milliseconds(stored: str | None) -> float:
        began = time.perf_counter()
        assert not password_matches("wrong horse", stored)
        return (time.perf_counter() - began) * 1000

    pairs = [(milliseconds(hashed), milliseconds(None)) for _ in range(1000)]
    known, unknown = (statistics.median(side) for side in zip(*pairs, strict=True))
    passwords._decoy_hash.cache_clear()
    assert abs(known - unknown) < 0.2
