"""What the product logs, as tests read it."""

import logging
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import structlog
from structlog._config import BoundLoggerLazyProxy
from structlog.testing import capture_logs


@contextmanager
def captured_logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """The lines of every level that are logged inside the block.

    As structlog's `capture_logs`, but independent of earlier tests. An app that a test has made sets the level of the whole
    process. A logger may keep the configuration of its first line.
    """
    before = structlog.get_config()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in {"app", "storage", "workers"}:
            for value in vars(module).values():
                if isinstance(value, BoundLoggerLazyProxy):
                    value.__dict__.pop("bind", None)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET), cache_logger_on_first_use=False
    )
    try:
        with capture_logs() as lines:
            yield lines
    finally:
        structlog.configure(**before)
