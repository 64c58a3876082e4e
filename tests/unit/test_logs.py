"""Log lines: whatever a caller writes, one line of JSON that no terminal obeys."""

import json
import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import structlog

from app.logs import FIELD_CHARACTERS, LINE_BYTES, LogOutput, configure_logging

HOSTILE = [
    'a\r\n{"event": "forged"}', "\x1b[2J\x1b[31mred", "\x00\x07\x7f\x9b", "\u2028\u2029\u202e", '"}',
    "Mozilla/" + "A" * 1_000_000,
]  # fmt: skip


@pytest.fixture
def logger(capsys: pytest.CaptureFixture[str]) -> Iterator[structlog.typing.FilteringBoundLogger]:
    """The product's own logging to the captured output. The former configuration is restored afterwards."""
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging("info")
    yield structlog.get_logger("test")
    structlog.configure(**before)
    root.handlers[:], root.level = handlers, level


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_h44_what_a_caller_writes_stays_within_one_escaped_line(
    text: str, logger: structlog.typing.FilteringBoundLogger, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.info("request_answered", agent=text, status=200)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.endswith("\n")
    assert out[:-1].isascii()
    assert out[:-1].isprintable()
    assert len(out) < 2 * FIELD_CHARACTERS * 6
    told = json.loads(out)
    assert told["agent"].removesuffix("…") == text[:FIELD_CHARACTERS]
    assert (told["event"], told["status"]) == ("request_answered", 200)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_h44_the_words_in_an_error_are_cut_and_escaped_too(
    text: str, logger: structlog.typing.FilteringBoundLogger, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        raise ValueError(text)  # noqa: TRY301 - it is to have a traceback
    except ValueError:
        logger.exception("unexpected_error")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out[:-1].isprintable()
    assert len(out) <= LINE_BYTES
    assert json.loads(out)["exception"]


WRITER = """
import logging, sys
from app.logs import configure_service_logging
configure_service_logging("info")
import structlog
log = structlog.get_logger()
for number in range(300):
    log.info("answered", process=sys.argv[1], number=number, text="x" * (number % 250))
    if number % 50 == 0:
        try:
            raise ValueError("y" * 9000)
        except ValueError:
            log.exception("failed")
            logging.getLogger("library").error("of a library", exc_info=True)
raise RuntimeError("not caught")
"""


CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, {"scores": [0.5, math.nan]}, {(1, 2): "pair"}, CIRCLE, np.float64("nan")],
    ids=repr,
)
def test_what_json_cannot_say_is_logged_as_text(
    value: object, logger: structlog.typing.FilteringBoundLogger, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.info("measured", value=value, other=0.5)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    told = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (told["event"], told["value"], told["other"]) == ("measured", repr(value), 0.5)


#: Something happens in the middle of each write: what Python runs between two instructions, such as a signal's handler.
INTERRUPTED = """
import logging, os, signal
import structlog, uvicorn
from app.cli.serve import OneProcess
from app.logs import configure_service_logging

def collect():
    logging.getLogger("asyncio").error("Task exception was never retrieved")

def stop():
    server = OneProcess(uvicorn.Config("no:app", log_config=None))
    signal.signal(signal.SIGTERM, server.handle_exit)
    signal.raise_signal(signal.SIGTERM)

def write(descriptor, data):
    written = really_write(descriptor, data)
    os.write = really_write
    {happens}()
    return written

configure_service_logging("info")
really_write, os.write = os.write, write
structlog.get_logger().info("opening")
"""


@pytest.mark.parametrize(
    ("happens", "events"),
    [("stop", ["opening"]), ("collect", ["opening", "Task exception was never retrieved"])],
    ids=["sigterm while it starts", "garbage collection finds the error of a task"],
)
def test_nothing_that_interrupts_a_write_waits_for_its_end(happens: str, events: list[str]) -> None:
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.format(happens=happens)],
        check=True, timeout=60, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert [json.loads(line)["event"] for line in process.stdout.splitlines()] == events


def test_i4_four_processes_on_one_pipe_never_tear_a_line_and_every_line_is_json() -> None:
    reading, writing = os.pipe()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(number)], stdout=writing, stderr=writing, env=environment)
        for number in range(4)
    ]
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        lines = pipe.read().splitlines()
    for process in processes:
        process.wait()
    records = [json.loads(line) for line in lines]
    assert len(records) == 4 * (300 + 2 * 6 + 1)
    assert sum(record["event"] == "process_failed" for record in records) == 4


def test_r8_a_log_on_a_full_disk_raises_nothing() -> None:
    code = (
        "import logging, os, sys, structlog; from app.logs import configure_logging; configure_logging('info');"
        "structlog.get_logger().error('x'); logging.getLogger('a').error('y'); os.write(2, b'went on')"
    )
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=True)
    assert done.stderr == b"went on"


def test_a_line_that_the_disk_cut_does_not_swallow_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream, os.fdopen(reading, "rb") as pipe:
        output = LogOutput(stream)
        write, calls = os.write, iter([3, OSError("no room")])

        def filling(descriptor: int, data: bytes) -> int:
            match next(calls, None):
                case int(count):
                    return write(descriptor, data[:count])
                case OSError() as error:
                    raise error
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", filling)
        output.write('{"a": 1}\n')
        output.write('{"b": 2}\n')
        stream.close()
        assert pipe.read().splitlines() == [b'{"a', b'{"b": 2}']


def test_threads_share_the_log_without_tearing_it() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream, os.fdopen(reading, "rb") as pipe:
        output = LogOutput(stream)
        work = [threading.Thread(target=lambda: [output.write('{"n": 1}\n') for _ in range(50)]) for _ in range(4)]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        stream.close()
        assert pipe.read().splitlines() == [b'{"n": 1}'] * 200
