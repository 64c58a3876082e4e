"""Loads on the wire, each in its own process: `python -m tests.support.wire_load KIND PORT [options]`.

Each load prints the line `ready` when all its connections work. It runs until its standard input is closed or its time is over.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPOSITORY = Path(__file__).parents[2]
#: As in the reviews: 24 connections send 390 kB each in one-byte chunks.
CHUNKED: Final = 65_000
MIB: Final = 2**20
EPILOGUE: Final = b"\r\n--b0undary--\r\n"
PROLOGUE: Final = b'--b0undary\r\nContent-Disposition: form-data; name="photo"; filename="p.jpg"\r\n\r\n\xff\xd8\xff'


@dataclass(frozen=True, slots=True)
class Load:
    """The options of a load."""

    port: int
    connections: int
    size: int
    path: str
    token: str
    source: str
    trickle_seconds: float

    def get(self) -> bytes:
        """A small request."""
        return f"GET {self.path or '/health'} HTTP/1.1\r\nHost: x\r\n\r\n".encode()

    def head(self, *lines: str) -> bytes:
        """The header of a POST, with the token if there is one."""
        all_ = [
            f"POST {self.path or '/v1/identities'} HTTP/1.1",
            "Host: x",
            "Content-Type: multipart/form-data; boundary=b0undary",
            *lines,
        ]
        if self.token:
            all_.append(f"Authorization: Bearer {self.token}")
        return "\r\n".join([*all_, "", ""]).encode()


@asynccontextmanager
async def connected(load: Load) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection. Errors at its end are ignored."""
    address = (load.source, 0) if load.source else None
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection("127.0.0.1", load.port, local_addr=address)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def drained(writer: asyncio.StreamWriter) -> None:
    """Wait until more can be sent, or the connection is gone."""
    with contextlib.suppress(OSError):
        await writer.drain()


async def pieces(load: Load, seen: Counter[str], body: bytes, *lines: str) -> None:
    """Send the same request again and again, without regard to the answers."""
    while True:
        async with connected(load) as (reader, writer):
            answer = asyncio.create_task(reader.read(12))
            writer.write(load.head(*lines))
            for start in range(0, len(body), 65_536):
                writer.write(body[start : start + 65_536])
                await asyncio.wait({asyncio.create_task(drained(writer)), answer}, return_when="FIRST_COMPLETED")
                if answer.done():
                    break
            seen[(await answer)[9:12].decode() or "closed"] += 1
        await asyncio.sleep(0.01)


async def chunks(load: Load, seen: Counter[str]) -> None:
    """One-byte chunks."""
    await pieces(load, seen, b"1\r\nx\r\n" * CHUNKED, "Transfer-Encoding: chunked")


async def extensions(load: Load, seen: Counter[str]) -> None:
    """One-byte chunks with long extensions."""
    await pieces(load, seen, (b"1;" + b"x" * 4000 + b"\r\nx\r\n") * 500, "Transfer-Encoding: chunked")


async def trailers(load: Load, seen: Counter[str]) -> None:
    """A short body with trailers that never end."""
    await pieces(load, seen, b"1\r\nx\r\n0\r\n" + b"X: 1\r\n" * CHUNKED, "Transfer-Encoding: chunked")


async def gone(load: Load, seen: Counter[str]) -> None:
    """Whole requests. The callers leave before the answer."""
    while True:
        async with connected(load) as (_, writer):
            writer.write(load.get())
            await drained(writer)
            seen["sent"] += 1
        await asyncio.sleep(0.001)


async def pipeline(load: Load, seen: Counter[str]) -> None:
    """Small requests behind each other on one connection."""
    request = load.get()
    while True:
        async with connected(load) as (reader, writer):
            writer.write(request * 5000)
            while answer := await reader.read(65_536):
                seen["answers"] += answer.count(b"HTTP/1.1 ")


async def header(load: Load, seen: Counter[str]) -> None:
    """A header of 30 kB, byte by byte."""
    while True:
        async with connected(load) as (reader, writer):
            writer.transport.get_extra_info("socket").setsockopt(6, 1, 1)
            for _ in range(30_000):
                writer.write(b"x")
                await asyncio.sleep(0)
                if reader.at_eof():
                    break
            seen["sent"] += 1


async def lines(load: Load, seen: Counter[str]) -> None:
    """A multipart body of one-byte lines. Needs a token."""
    body = b"--b0undary\r\n" + b"X: 1\r\n" * (load.size // 6)
    await pieces(load, seen, body, f"Content-Length: {len(body)}")


async def hold(load: Load, seen: Counter[str]) -> None:
    """Send most of a photo quickly; then nothing, or a byte now and then."""
    most = load.size * 19 // 20
    length = len(PROLOGUE) + load.size + len(EPILOGUE)
    while True:
        began = time.monotonic()
        async with connected(load) as (reader, writer):
            answer = asyncio.create_task(reader.read(12))
            writer.write(load.head(f"Content-Length: {length}") + PROLOGUE)
            sent, piece = 0, b"x" * 65_536
            while sent < most and not answer.done():
                writer.write(piece)
                sent += len(piece)
                await asyncio.wait({asyncio.create_task(drained(writer)), answer}, return_when="FIRST_COMPLETED")
            seen["sent"] += 1
            while load.trickle_seconds and not answer.done():
                writer.write(b"x")
                await asyncio.wait({answer}, timeout=load.trickle_seconds)
            status = (await answer)[9:12].decode() or "closed"
            seen[status] += 1
            seen[f"{status} seconds"] = max(seen[f"{status} seconds"], round(time.monotonic() - began))
        if load.trickle_seconds == 0:
            await asyncio.Event().wait()  # sent only once: the test looks at what the server keeps now
        await asyncio.sleep(0.2)


async def idle(load: Load, seen: Counter[str]) -> None:
    """One request, and then nothing."""
    async with connected(load) as (reader, writer):
        writer.write(load.get())
        seen[(await reader.readuntil(b"\r\n"))[9:12].decode()] += 1
        await reader.read()
        while await reader.read(65_536):
            pass
    seen["closed"] += 1
    await asyncio.Event().wait()


KINDS = {one.__name__: one for one in (chunks, extensions, trailers, gone, pipeline, header, lines, hold, idle)}


async def run(kind: str, load: Load) -> Counter[str]:
    """Run all connections at once until the standard input ends. Returns the number of answers by status."""
    seen: Counter[str] = Counter()
    tasks = []
    for number in range(load.connections):
        tasks.append(asyncio.create_task(KINDS[kind](load, seen)))
        await asyncio.sleep(0.01 if number % 10 == 0 else 0)
    await asyncio.sleep(0.3)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return seen


@dataclass(slots=True)
class Running:
    """A load in its own process. answers: number by status, once the load has ended."""

    process: subprocess.Popen[str]
    answers: dict[str, int]


@contextmanager
def under_load(kind: str, port: int, **options: object) -> Iterator[Running]:
    """While the body runs, the load runs."""
    command = [sys.executable, "-m", "tests.support.wire_load", kind, str(port)]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    running = Running(process, {})
    try:
        assert process.stdout.readline() == "ready\n"
        yield running
        said, _ = process.communicate(timeout=20)
        running.answers.update(json.loads(said))
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=24)
    parser.add_argument("--size", type=int, default=20 * MIB)
    parser.add_argument("--path", default="")
    parser.add_argument("--token", default="")
    parser.add_argument("--source", default="", help="The address to connect from, for example 127.0.0.2.")
    parser.add_argument("--trickle-seconds", type=float, default=0)
    given = vars(parser.parse_args())
    kind = given.pop("kind")
    sys.stdout.write(json.dumps(asyncio.run(run(kind, Load(**given)))))


if __name__ == "__main__":
    main()
