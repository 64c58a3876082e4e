"""Log lines: whatever a caller writes, one line of JSON that no terminal obeys."""

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from app.logs import FIELD_CHARACTERS, TRACEBACK_CHARACTERS, configure_logging

HOSTILE = [
    'a\r\n{"event": "forged"}', "\x1b[2J\x1b[31mred", "\x00\x07\x7f\x9b", "\u2028\u2029\u202e", '"}',
    "Mozilla/" + "A" * 1_000_000,
]  # fmt: skip


@pytest.fixture
def logger() -> Iterator[structlog.typing.FilteringBoundLogger]:
    """The product's own logging; what was there before is put back."""
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
    assert len(json.loads(out)["exception"]) <= TRACEBACK_CHARACTERS + 1
