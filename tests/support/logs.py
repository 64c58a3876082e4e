"""What the product logs, as tests read it."""

import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from structlog._config import BoundLoggerLazyProxy
from structlog.testing import capture_logs


@contextmanager
def captured_logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """The lines that are logged meanwhile.

    As structlog's `capture_logs`, whatever ran before: a logger of the product keeps the configuration of its first line, so that
    one used before the last configuration would write past the capture.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in {"app", "storage", "workers"}:
            for value in vars(module).values():
                if isinstance(value, BoundLoggerLazyProxy):
                    value.__dict__.pop("bind", None)
    with capture_logs() as lines:
        yield lines
