"""One connection of the HTTP server: what a request's header may cost before there is a request, with or without nginx.

uvicorn reads a header for ever, and its parser (h11) takes line ends and folded lines that other readers take for something
else. Both end here; whatever nginx holds off as well, this holds off alone.
"""

import asyncio
import json
import re
import sys
from typing import ClassVar, Final

import h11
from prometheus_client import Counter
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.envelope import DATA_POLICY, HEADER_BYTES, MOST_HEADERS, SECURITY_HEADERS
from app.api.problems import TYPE_BASE
from app.documents.base import new_id
from app.errors import HeadersTooLarge, Problem, Unreadable

#: A header comes within so long, and who reads an answer goes on reading within so long.
HEADER_SECONDS, READING_SECONDS = 10.0, 10.0

UNREADABLE = Counter("idem_unreadable_requests", "Connections that brought no request that can be read", ["problem"])

_END: Final = b"\r\n\r\n"
#: A line feed alone, a carriage return alone, a line that goes on in the next: two readers may read two requests.
_AMBIGUOUS: Final = re.compile(rb"(?<!\r)\n|\r(?![\n]|\Z)|\r\n[ \t]")


class Connection(H11Protocol):
    """uvicorn's connection with limits on the header and on callers who do not read."""

    header_seconds: ClassVar[float] = HEADER_SECONDS
    reading_seconds: ClassVar[float] = READING_SECONDS
    _header_timer: asyncio.TimerHandle | None = None
    _reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's own
        """Whoever connects has something to say."""
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(self.header_seconds, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more to wait for."""
        self._stop_timers()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Look at the header as bytes before it is parsed; called whenever something came, and after each answer."""
        if self.conn.their_state is h11.IDLE:
            fault = fault_of(self.conn.trailing_data[0])
            if fault is not None:
                self._refuse(fault)
                return
        super().handle_events()
        self._watch_header()

    def send_400_response(self, msg: str) -> None:
        """What the parser refuses, as a problem; called while its exception is handled."""
        del msg
        error = sys.exception()
        is_too_large = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == HeadersTooLarge.status
        self._refuse(HeadersTooLarge if is_too_large else Unreadable)

    def pause_writing(self) -> None:
        """The caller reads more slowly than we write."""
        super().pause_writing()
        self._reading_timer = self.loop.call_later(self.reading_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The caller reads on."""
        super().resume_writing()
        if self._reading_timer is not None:
            self._reading_timer.cancel()

    def _watch_header(self) -> None:
        is_awaited = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not is_awaited and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        elif is_awaited and self._header_timer is None:
            # Runs on whatever comes: a byte now and then buys no time.
            self._header_timer = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _stop_timers(self) -> None:
        for timer in (self._header_timer, self._reading_timer):
            if timer is not None:
                timer.cancel()

    def _refuse(self, kind: type[Problem]) -> None:
        UNREADABLE.labels(kind.slug()).inc()
        if self.transport.is_closing():
            return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # the answer has begun
            return
        for event in _page(kind):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def fault_of(received: bytes) -> type[Problem] | None:
    """What is wrong with the header at the beginning of these bytes, as far as it came; None where nothing is."""
    end = received.find(_END)
    header = received if end < 0 else received[:end]
    if _AMBIGUOUS.search(header):
        return Unreadable
    if len(header) > HEADER_BYTES or header.count(b"\r\n") > MOST_HEADERS:
        return HeadersTooLarge
    return None


def _page(kind: type[Problem]) -> tuple[h11.Response, h11.Data, h11.EndOfMessage]:
    request_id = new_id()
    page = {
        "type": TYPE_BASE + kind.slug(), "title": kind.title, "status": kind.status, "detail": kind.title, "instance": "",
        "request_id": request_id, "errors": [],
    }  # fmt: skip
    body = json.dumps(page).encode()
    headers = SECURITY_HEADERS | {
        "Content-Type": "application/problem+json", "Content-Length": str(len(body)), "Content-Security-Policy": DATA_POLICY,
        "Cache-Control": "no-store", "X-Request-ID": request_id, "Connection": "close",
    }  # fmt: skip
    response = h11.Response(status_code=kind.status, headers=list(headers.items()))
    return response, h11.Data(data=body), h11.EndOfMessage()
