"""Log lines: JSON, one event name and its fields; never a photo, an embedding, a token or a name.

Several processes write to one pipe or file. A record is one write of at most PIPE_BUF bytes, so no record tears another. A
log that cannot be written never fails the work that it describes.
"""

import json
import logging
import os
import sys
import threading
from types import TracebackType
from typing import Any, Final, Literal, TextIO

import structlog

#: A field longer than this says nothing more.
FIELD_CHARACTERS: Final = 256
#: The most bytes that POSIX writes to a pipe in one piece (PIPE_BUF of Linux). The line feed counts.
LINE_BYTES: Final = 4096
_LONG_FIELDS: Final = ("exception", "stack")


def _cut(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Keep any one field from filling the log; JSON escapes control characters by itself."""
    for name, value in event.items():
        if isinstance(value, str) and len(value) > FIELD_CHARACTERS and name not in _LONG_FIELDS:
            event[name] = value[:FIELD_CHARACTERS] + "…"
    return event


def _render(_: object, __: str, event: structlog.typing.EventDict) -> str:
    """One line of JSON without its line feed, in ASCII, short enough for one write.

    A traceback loses its beginning first: its end names the error.
    """
    for name in _LONG_FIELDS:
        text = event.get(name)
        while isinstance(text, str) and text and (excess := _excess(event)) > 0:
            text = text[min(len(text), max(1, excess // 6 + 1)) :]
            event[name] = "…" + text
    line = _dumps(event)
    if _excess(event) <= 0:
        return line
    # Too many fields: the event's own name and level remain.
    return _dumps({name: event[name] for name in ("event", "level", "timestamp") if name in event} | {"is_cut": True})


def _excess(event: structlog.typing.EventDict) -> int:
    return len(_dumps(event)) + 1 - LINE_BYTES


def _dumps(event: structlog.typing.EventDict) -> str:
    try:
        return json.dumps(event, default=repr, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps({name: _as_json_can(value) for name, value in event.items()}, default=repr)


def _as_json_can(value: object) -> object:
    """The value, or how Python shows it if JSON has no such value: NaN, keys that are not text, a list inside itself."""
    try:
        json.dumps(value, default=repr, allow_nan=False)
    except (TypeError, ValueError):
        return repr(value)[:FIELD_CHARACTERS]
    return value


_SHARED: Final[list[structlog.typing.Processor]] = [
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
    _cut,
]
#: One list for the whole process: loggers that are in use already keep the list that they were made with.
_PROCESSORS: Final[list[structlog.typing.Processor]] = [*_SHARED, _render]


class LogOutput:
    """Standard output as a log: each text is one write, and errors are ignored.

    A full disk, a closed pipe or a closed stream loses lines. It must not turn an answer into an error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._is_stdout = stream is sys.stdout
        self._stream = stream
        # Reentrant: garbage collection may run in the middle of a write, and log the error of a task that was not awaited.
        self._lock = threading.RLock()
        self._is_torn = False
        try:
            self._descriptor: int | None = stream.fileno()
        except (OSError, ValueError):  # not a file: standard output of a test or of a notebook
            self._descriptor = None

    def write(self, text: str) -> int:
        """Write whole lines at once. Never raises OSError."""
        try:
            if self._descriptor is None or (self._is_stdout and sys.stdout is not self._stream):  # redirected since
                sys.stdout.write(text)
                sys.stdout.flush()
            else:
                self._write(self._descriptor, text.encode())
        except (OSError, ValueError):
            pass
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered here."""

    def _write(self, descriptor: int, data: bytes) -> None:
        with self._lock:
            if self._is_torn:  # the last line was cut off: start a new one
                data = b"\n" + data
            written = 0
            try:
                while written < len(data):
                    written += os.write(descriptor, data[written:])
            finally:
                self._is_torn = 0 < written < len(data) or (self._is_torn and written == 0)


def configure_logging(level: Literal["debug", "info", "warning", "error"]) -> None:
    """Send the product's events, and the libraries' warnings and errors, to standard output, one JSON line each."""
    output = LogOutput(sys.stdout)
    structlog.configure(
        processors=_PROCESSORS,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(output),  # type: ignore[arg-type] # it writes, and needs no more
        cache_logger_on_first_use=True,
    )
    handler: logging.StreamHandler[Any] = logging.StreamHandler(output)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=_SHARED, processor=_render))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)


def configure_service_logging(level: Literal["debug", "info", "warning", "error"]) -> None:
    """As `configure_logging`. An uncaught error becomes a JSON line as well."""
    configure_logging(level)
    sys.excepthook = _log_uncaught


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Log the error that ends the process, in one line."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    structlog.get_logger(__name__).critical("process_failed", exc_info=(kind, error, trace))
