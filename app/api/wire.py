"""One connection of the HTTP server: limits on what its bytes may cost, with or without nginx.

uvicorn reads a header without a time limit. Its parser (h11) accepts line ends and folded lines that other parsers read
differently. It parses all pieces of a chunked body at once, before the application asks for them. A caller who still sends
does not receive an answer that comes before the end of the body. This module corrects all four, and limits connections.
"""

import asyncio
import json
import re
import sys
from collections.abc import Callable
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary

import h11
from prometheus_client import Counter
from uvicorn.config import Config
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from app.api.connections import Connections, connections_within, open_files
from app.api.envelope import DATA_POLICY, HEADER_BYTES, MOST_HEADERS, SECURITY_HEADERS
from app.api.problems import TYPE_BASE
from app.documents.base import new_id
from app.domain.callers import subscriber
from app.errors import HeadersTooLarge, NotReady, Problem, TooManyPieces, Unreadable

#: A header comes within so long, and who reads an answer goes on reading within so long.
HEADER_SECONDS, READING_SECONDS = 10.0, 10.0
#: The most pieces of a body that a connection parses before the event loop serves others. Each costs some 25 microseconds.
PIECES_A_TURN: Final = 16
#: A body may have FREE_CHUNKS chunks of any size. Each further chunk must bring BYTES_A_CHUNK bytes on average. Clients that
#: stream send 4 to 64 KiB a chunk.
FREE_CHUNKS, BYTES_A_CHUNK = 256, 512
#: After an answer that ends its connection, at most LINGER_BYTES are read and discarded, for at most LINGER_SECONDS.
LINGER_BYTES, LINGER_SECONDS = 32 * 2**20, 2.0
#: Pause between an answer and the next request, if that request came before the answer was sent.
PIPELINE_SECONDS: Final = 0.05
#: When a caller without a connection should try again.
RETRY_SECONDS: Final = 2

UNREADABLE = Counter("idem_unreadable_requests", "Connections that brought no request that can be read", ["problem"])

_END: Final = b"\r\n\r\n"
#: A line feed alone, a carriage return alone, a line that goes on in the next: two readers may read two requests.
_AMBIGUOUS: Final = re.compile(rb"(?<!\r)\n|\r(?![\n]|\Z)|\r\n[ \t]")
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE)
#: A name or an address, and a port. Anything else, a user name above all, is no host that a client asks for.
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
#: How many bytes before the end of the bytes searched so far a match of _AMBIGUOUS may begin.
_OVERLAP: Final = 3


class _TooManyChunks(h11.RemoteProtocolError):
    """A body has too many small chunks."""


class _Pieces(h11.Connection):
    """h11's parser. It rests after PIECES_A_TURN pieces, and refuses a body with too many small chunks."""

    pieces_left = PIECES_A_TURN
    _chunks = 0
    _body_bytes = 0

    @property
    def is_resting(self) -> bool:
        """Whether it rests: the bytes that have come may contain more pieces."""
        return self.pieces_left <= 0

    def next_event(self) -> Any:  # noqa: ANN401 - as h11's own
        """See h11. While it rests, it answers as if nothing more had come."""
        if self.is_resting:
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._body_bytes = 0
            return in_origin_form(event)
        if isinstance(event, h11.Data):
            self.pieces_left -= 1
            self._chunks += event.chunk_start
            self._body_bytes += len(event.data)
            if self._chunks > FREE_CHUNKS + self._body_bytes // BYTES_A_CHUNK:
                message = "too many small chunks"
                raise _TooManyChunks(message)
        return event


class _Flow(FlowControl):
    """uvicorn's flow control. It reads nothing from the network while there are bytes to parse."""

    def __init__(self, transport: asyncio.Transport, go_on: Callable[[], None]) -> None:
        """go_on: schedules the parsing of more pieces."""
        super().__init__(transport)
        self._go_on = go_on
        self.is_behind = False

    def resume_reading(self) -> None:
        """The application asks for more of the body. Bytes that have come already are parsed first."""
        if self.is_behind:
            self._go_on()
        else:
            super().resume_reading()


class _Lingering:
    """A transport that closes late: a caller who still sends gets the answer, and not a reset.

    After `close` nothing is written. Incoming bytes are discarded until the caller stops, for LINGER_SECONDS at most.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, is_sending: Callable[[], bool]
    ) -> None:
        """is_sending: whether the caller may be in the middle of a body."""
        self._transport = transport
        self._loop = loop
        self._is_sending = is_sending
        self._left = LINGER_BYTES
        self._is_lingering = False
        self._timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a transport's
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether writing has ended."""
        return self._is_lingering or self._transport.is_closing()

    def close(self) -> None:
        """Close the connection as soon as the caller stops sending."""
        if self.is_closing() or not self._is_sending() or not self._transport.can_write_eof():
            self._transport.close()
            return
        try:
            self._transport.write_eof()
        except OSError:  # the caller is gone
            self._transport.close()
            return
        self._is_lingering = True
        self._transport.resume_reading()
        self._timer = self._loop.call_later(LINGER_SECONDS, self._transport.close)

    def throw_away(self, size: int) -> None:
        """Count bytes that came after `close`. Too many of them end the connection."""
        self._left -= size
        if self._left < 0:
            self._transport.close()

    def ended(self) -> None:
        """Stop the timer: the connection has ended."""
        if self._timer is not None:
            self._timer.cancel()


class Connection(H11Protocol):
    """uvicorn's connection with limits on the header, on pieces, on callers who do not read, and on connections."""

    header_seconds: ClassVar[float] = HEADER_SECONDS
    reading_seconds: ClassVar[float] = READING_SECONDS
    _of_servers: ClassVar[WeakKeyDictionary[ServerState, Connections]] = WeakKeyDictionary()
    _header_timer: asyncio.TimerHandle | None = None
    _reading_timer: asyncio.TimerHandle | None = None
    _next_turn: asyncio.Handle | None = None
    _pause: asyncio.TimerHandle | None = None
    _request: asyncio.Task[None] | None = None
    _is_between = False
    _looked_at = 0
    conn: _Pieces
    flow: _Flow
    transport: Any

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """As uvicorn's own."""
        super().__init__(config, server_state, app_state, _loop)
        self._served, self.app = self.app, self._unless_refused
        self.conn = _Pieces(h11.SERVER, HEADER_BYTES)
        if server_state not in self._of_servers:
            self._of_servers[server_state] = self.limits()
        self._all = self._of_servers[server_state]

    @staticmethod
    def limits() -> Connections:
        """The limits of one server."""
        return connections_within(open_files())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's own
        """Accept the connection if there is room for it."""
        super().connection_made(transport)
        self.transport = _Lingering(transport, self.loop, self._is_sending)
        self.flow = _Flow(self.transport, self._take_a_turn)
        if not self._all.admit(self, self._address()):
            self._refuse(NotReady)
            return
        self._header_timer = self.loop.call_later(self.header_seconds, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers, and free the place of the connection."""
        if self._request is not None and self.cycle is not None and not self.cycle.response_complete:
            self._all.abandon(self._request, self._address())
        self._all.leave(self)
        self._stop_timers()
        self.transport.ended()
        super().connection_lost(exc)

    def make_room(self) -> None:
        """Close this idle connection to make room for another one; see Connections."""
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse the bytes that came; after `close`, discard them."""
        if self.transport.is_closing():
            self.transport.throw_away(len(data))
            return
        super().data_received(data)

    def handle_events(self) -> None:
        """Look at the header as bytes before it is parsed; called whenever something came, and after each answer."""
        if self.transport.is_closing():
            return
        if self._is_between and self.conn.trailing_data[0]:
            self.flow.pause_reading()
            self._pause = self.loop.call_later(PIPELINE_SECONDS, self._after_pause)
            return
        if self.conn.their_state is h11.IDLE:
            fault = fault_of(self.conn.trailing_data[0], self._looked_at)
            if fault is not None:
                self._refuse(fault)
                return
        self.conn.pieces_left = PIECES_A_TURN
        super().handle_events()
        if self.transport.is_closing():
            return
        self._rest_or_read()
        waiting = self.conn.trailing_data[0] if self.conn.their_state is h11.IDLE else b""
        self._looked_at = len(waiting)
        self._watch_header(is_awaited=bool(waiting))
        if self.cycle is not None and not self.cycle.response_complete:
            self._all.work(self)

    def on_response_complete(self) -> None:
        """The answer was sent. A request that came before it waits for PIPELINE_SECONDS: only floods send two at a time."""
        self._all.rest(self)
        self._is_between = True
        super().on_response_complete()
        self._is_between = False

    def send_400_response(self, msg: str) -> None:
        """What the parser refuses, as a problem; called while its exception is handled."""
        del msg
        error = sys.exception()
        if isinstance(error, _TooManyChunks):
            self._refuse(TooManyPieces)
            return
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

    def _address(self) -> str | None:
        """The caller's address. None for a proxy that FORWARDED_ALLOW_IPS names, and for a socket without addresses."""
        if self.client is None:
            return None
        host, app = self.client[0], self._served
        is_proxy = isinstance(app, ProxyHeadersMiddleware) and host in app.trusted_hosts
        return None if is_proxy else subscriber(host)

    async def _unless_refused(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - as ASGI has them
        """The application, unless the request was refused, or its caller left, before its task began.

        The parser takes header, body and trailers apart in one go. A flood of refused requests would otherwise leave one task
        each, and no connection waits for their answers.
        """
        if self.cycle is None or self.cycle.disconnected:
            return
        self._request = asyncio.current_task()
        try:
            await self._served(scope, receive, send)
        finally:
            self._request = None

    def _is_sending(self) -> bool:
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def _rest_or_read(self) -> None:
        """While there are bytes to parse, read no more until the application asks for them."""
        if self.conn.is_resting:
            self.flow.pause_reading()
            self.flow.is_behind = True
        elif self.flow.is_behind:
            self.flow.is_behind = False
            is_reading = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
            if is_reading and (self.cycle is None or len(self.cycle.body) <= HIGH_WATER_LIMIT):
                self.flow.resume_reading()

    def _take_a_turn(self) -> None:
        if self._next_turn is None:
            self._next_turn = self.loop.call_soon(self._go_on)

    def _after_pause(self) -> None:
        self._pause = None
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self.handle_events()

    def _go_on(self) -> None:
        self._next_turn = None
        self.handle_events()

    def _watch_header(self, *, is_awaited: bool) -> None:
        if not is_awaited and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        elif is_awaited and self._header_timer is None:
            # Runs on whatever comes: a byte now and then buys no time.
            self._header_timer = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _stop_timers(self) -> None:
        for timer in (self._header_timer, self._reading_timer, self._next_turn, self._pause):
            if timer is not None:
                timer.cancel()

    def _refuse(self, kind: type[Problem]) -> None:
        UNREADABLE.labels(kind.slug()).inc()
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # The application learns that its caller is gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # the answer has begun
            return
        for event in _page(kind):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._all.rest(self)


def fault_of(received: bytes, looked_at: int = 0) -> type[Problem] | None:
    """What is wrong with the header at the beginning of these bytes, as far as it has come; None if nothing is.

    looked_at: how many of the bytes were checked before. So a header that comes byte by byte costs no more than one that comes at
    once.
    """
    end = received.find(_END, max(0, looked_at - _OVERLAP))
    header = received if end < 0 else received[:end]
    if _AMBIGUOUS.search(header, max(0, looked_at - _OVERLAP)):
        return Unreadable
    if len(header) > HEADER_BYTES or header.count(b"\r\n") > MOST_HEADERS:
        return HeadersTooLarge
    return None


def in_origin_form(request: h11.Request) -> h11.Request:
    """The request with a path as its target. A server must take absolute targets (RFC 9112, 3.2.2), and then ignore `Host`.

    Raises h11.RemoteProtocolError for a target without a host, with a user name, or with a fragment.
    """
    target = _ABSOLUTE.match(request.target)
    if target is None:
        return request
    host, path = target[1], target[2]
    if not _HOST.fullmatch(host) or b"#" in path:
        message = "illegal request target"
        raise h11.RemoteProtocolError(message)
    headers = [(name, value) for name, value in request.headers if name != b"host"]
    target_path = path if path.startswith(b"/") else b"/" + path
    return h11.Request(
        method=request.method,
        target=target_path,
        headers=[(b"host", host), *headers],
        http_version=request.http_version,
    )


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
    if kind is NotReady:
        headers["Retry-After"] = str(RETRY_SECONDS)
    response = h11.Response(status_code=kind.status, headers=list(headers.items()))
    return response, h11.Data(data=body), h11.EndOfMessage()
