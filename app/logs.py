"""Log lines: JSON, one event name and its fields; never a photo, an embedding, a token or a name."""

import logging
import sys
from typing import Literal

import structlog

#: A field longer than this says nothing more.
FIELD_CHARACTERS = 256
#: A traceback is long by nature; what an error says of a caller's words is at its end, and may be as long as they are.
TRACEBACK_CHARACTERS = 16_384


def _cut(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Keep any one field from filling the log; JSON escapes control characters by itself."""
    for name, value in event.items():
        if isinstance(value, str) and len(value) > FIELD_CHARACTERS and name != "exception":
            event[name] = value[:FIELD_CHARACTERS] + "…"
    traceback = event.get("exception")
    if isinstance(traceback, str) and len(traceback) > TRACEBACK_CHARACTERS:
        event["exception"] = traceback[:TRACEBACK_CHARACTERS] + "…"
    return event


def configure_logging(level: Literal["debug", "info", "warning", "error"]) -> None:
    """Send the product's events, and the libraries' warnings, to standard output."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _cut,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    renderer = structlog.processors.JSONRenderer()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processor=renderer))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
