"""Around every answer: the request's id, the limits of header and body, who may read it, its figures and its log line."""

import asyncio
import re
import time
from dataclasses import dataclass
from typing import Final

import structlog
from prometheus_client import Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import answer
from app.api.room import NoRoom, Place, Room
from app.api.urlencoded import require_distinct
from app.audit import Action
from app.documents.base import new_id
from app.domain.callers import subscriber
from app.errors import Unreadable
from app.limits import Allowance

log = structlog.get_logger(__name__)

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: Of a request's headers, names and values: ten times what a browser sends. nginx allows half of it.
HEADER_BYTES, MOST_HEADERS = 32 * 1024, 100
#: The slowest body that is accepted, in bytes a second, on average over each stretch of BODY_TIMEOUT_SECONDS.
SLOWEST_BYTES_A_SECOND = 2 * 1024
#: No body takes longer than this to come in, however steadily it does.
LONGEST_BODY_SECONDS = 300.0
#: A body up to SMALL_BODY takes no room: the buffers of a connection are as large. A body of unknown length takes room for the
#: bytes that have come, in steps of the same size.
SMALL_BODY: Final = 64 * 1024
#: Anonymous callers have a room of their own for their bodies. It is as large as the room of the others divided by this.
ANONYMOUS_PART: Final = 8
#: The rest of a refused body is read if its declared size is at most this. Otherwise the connection ends.
DRAINED_BYTES, DRAIN_SECONDS = 64 * 1024, 0.5
#: Pages that bring scripts and styles of their own; everything else is data.
PAGES = ("/", "/docs", "/redoc", "/docs/oauth2-redirect")
DATA_POLICY = "default-src 'none'; base-uri 'none'; frame-ancestors 'none'"
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "worker-src blob:; base-uri 'none'; frame-ancestors 'none'"
)
#: On every answer, whatever it is.
SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
STRICT_TRANSPORT = "max-age=31536000; includeSubDomains"
#: What a page of an allowed origin may send and read; there are no cookies that a browser would add by itself.
CROSS_ORIGIN_METHODS = "DELETE, GET, PATCH, POST"
CROSS_ORIGIN_HEADERS = "Authorization, Content-Type, Idempotency-Key, If-Match, X-Request-ID"
EXPOSED_HEADERS = "ETag, Location, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset, Retry-After, X-Request-ID"
PREFLIGHT_SECONDS = 600
#: The default, the same as of BODIES_MEMORY_MIB.
DEFAULT_ROOM = 320 * 2**20

REQUESTS = Counter("idem_requests_total", "Answers, by route and status", ["method", "route", "status"])
SECONDS = Histogram(
    "idem_request_duration_seconds", "Time to answer, by route", ["method", "route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)  # fmt: skip
IN_FLIGHT = Gauge("idem_requests_in_flight", "Requests being answered")
#: Whoever invents methods must not invent series of figures.
KNOWN_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


@dataclass(frozen=True, slots=True)
class _Rooms:
    """Room for the bodies of admitted callers, and for those of anonymous callers."""

    admitted: Room
    anonymous: Room

    def place(self, scope: Scope) -> Place:
        """A place for the body of this request, by its caller. An anonymous caller stands for its address."""
        action: Action | None = scope["state"].get("admitted")
        if action is not None and action.caller is not None:
            return Place(self.admitted, action.caller.id)
        client = scope.get("client")
        return Place(self.anonymous, subscriber(client[0] if client else ""))


@dataclass(slots=True)
class _Body:
    """A request's body while it comes in."""

    receive: Receive
    headers: Headers
    scope: Scope
    seconds: float
    rooms: _Rooms
    read: int = 0
    is_whole: bool = False
    is_ambiguous: bool = False
    has_stopped: bool = False
    _place: Place | None = None
    # Time spent waiting for the sender. Time that our own work takes does not count.
    _waited: float = 0
    _waited_for_progress: float = 0
    _progress: int = 0

    def __post_init__(self) -> None:
        self.is_whole = not self.declared and "transfer-encoding" not in self.headers

    @property
    def declared(self) -> int:
        """Bytes, as the caller says."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isdecimal() else 0

    async def next(self) -> Message:
        """The next piece.

        Raises HTTPException 413 over the limit, 408 when it comes too slowly, 429 or 503 when it finds no room.
        """
        if self.is_whole:
            return await self.receive()  # what comes now is that the caller goes away
        if self.declared > self._limit:
            raise HTTPException(413)
        await self._find_room()
        message = await self._received()
        self.is_whole = message["type"] != "http.request" or not message.get("more_body", False)
        if self.read > self._limit:
            raise HTTPException(413)
        return message

    @property
    def _limit(self) -> int:
        limit: int = self.scope["state"]["body_limit"]
        return limit

    async def _find_room(self) -> None:
        # A body with a declared length takes all its room at once, so it is not stopped half-way.
        needed = self.declared or min(self._limit, -(-self.read // SMALL_BODY) * SMALL_BODY)
        if needed <= SMALL_BODY:
            return
        if self._place is None:
            self._place = self.rooms.place(self.scope)
            self.scope["state"]["release_body"] = self._place.leave
        try:
            await self._place.hold(needed)
        except NoRoom:
            self.scope["state"]["action"] = None  # no event for each refusal: a flood would fill the log
            raise

    async def _received(self) -> Message:
        patience = min(self.seconds - self._waited_for_progress, LONGEST_BODY_SECONDS - self._waited)
        began = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, patience)):
                message = await self.receive()
        except TimeoutError as error:
            self.has_stopped = True
            raise HTTPException(408) from error
        waited = time.monotonic() - began
        self._waited += waited
        self._waited_for_progress += waited
        size = len(message.get("body", b""))
        self.read += size
        self._progress += size
        if self._progress >= SLOWEST_BYTES_A_SECOND * self.seconds:
            self._progress, self._waited_for_progress = 0, 0.0
        return message

    async def drain(self) -> None:
        """Take in the little that nobody asked for, so that the connection can serve on."""
        is_chunked = "transfer-encoding" in self.headers
        if self.declared > DRAINED_BYTES or is_chunked or self.has_stopped or "expect" in self.headers:
            return
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self.is_whole:
                    message = await self.receive()
                    self.is_whole = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            return

    def leave(self) -> None:
        """Give the room of the body back."""
        if self._place is not None:
            self._place.leave()


class Envelope:
    """ASGI middleware; the outermost."""

    def __init__(
        self,
        app: ASGIApp,
        body_limit: int,
        *,
        body_seconds: float = 10,
        room: Room | None = None,
        allowed_origins: frozenset[str] = frozenset(),
    ) -> None:
        """body_limit: bytes of a body; a route that takes photos raises `request.state.body_limit` before it reads.

        body_seconds: how long a body may make no progress. room: for the bodies of admitted callers.
        allowed_origins: whose pages may read answers.
        """
        self._app = app
        self._body_limit = body_limit
        self._body_seconds = body_seconds
        room = room or Room(DEFAULT_ROOM)
        self._rooms = _Rooms(room, Room(room.most // ANONYMOUS_PART, room.seconds))
        self._allowed_origins = allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "").encode("latin-1")
        is_given = REQUEST_ID.fullmatch(given) is not None
        request_id = given.decode() if is_given else new_id()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["has_own_request_id"] = is_given
        state["body_limit"] = self._body_limit
        started = time.perf_counter()
        status: int | None = None
        body = _Body(receive, headers, scope, self._body_seconds, self._rooms)

        async def sealed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not body.is_whole:
                    await body.drain()
                is_over = body.is_ambiguous or not body.is_whole
                self._seal(scope, MutableHeaders(scope=message), headers, is_over=is_over)
            await send(message)

        IN_FLIGHT.inc()
        try:
            preflight = self._preflight(scope, headers)
            if preflight is not None:
                await preflight(scope, body.next, sealed)
            else:
                _check_header(scope)
                await self._app(scope, body.next, sealed)
        except Exception as error:
            # A fault of ours that no route foresaw; where the answer has begun, it can only be cut off.
            if status is not None:
                raise
            # Where it ends is doubtful, and so is whether what follows is a request of the same caller.
            body.is_ambiguous = isinstance(error, Unreadable)
            page = await answer(Request(scope, body.next), error)
            await page(scope, body.next, sealed)
        finally:
            body.leave()
            IN_FLIGHT.dec()
            seconds = time.perf_counter() - started
            # The route's template, not the path: paths hold ids, and there is no end of them.
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in KNOWN_METHODS else "other"
            REQUESTS.labels(method, route, str(status)).inc()
            SECONDS.labels(method, route).observe(seconds)
            log.info(
                "request_answered", request_id=request_id, method=method, route=route, status=status,
                milliseconds=round(seconds * 1000, 1),
            )  # fmt: skip

    def _seal(self, scope: Scope, out: MutableHeaders, asked: Headers, *, is_over: bool) -> None:
        """The headers of every answer. is_over: nothing that follows on the connection will be read."""
        out.update(SECURITY_HEADERS)
        out["X-Request-ID"] = scope["state"]["request_id"]
        out["Content-Security-Policy"] = PAGE_POLICY if scope["path"] in PAGES else DATA_POLICY
        # Nearly all answers are about people; what may be kept says so itself.
        out.setdefault("Cache-Control", "no-store")
        if scope.get("scheme") == "https":
            out["Strict-Transport-Security"] = STRICT_TRANSPORT
        if is_over:
            out["Connection"] = "close"
        allowance: Allowance | None = scope["state"].get("allowance")
        if allowance is not None:
            out["RateLimit-Limit"] = str(allowance.limit)
            out["RateLimit-Remaining"] = str(allowance.remaining)
            out["RateLimit-Reset"] = str(allowance.reset_seconds)
        if self._allowed_origins:
            out.add_vary_header("Origin")
            if asked.get("origin") in self._allowed_origins:
                out["Access-Control-Allow-Origin"] = asked["origin"]
                out["Access-Control-Expose-Headers"] = EXPOSED_HEADERS

    def _preflight(self, scope: Scope, headers: Headers) -> Response | None:
        """What a browser is told that asks for a page of an allowed origin; None for any other request."""
        is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if not is_preflight or headers.get("origin") not in self._allowed_origins:
            return None
        return Response(status_code=204, headers={
            "Access-Control-Allow-Methods": CROSS_ORIGIN_METHODS,
            "Access-Control-Allow-Headers": CROSS_ORIGIN_HEADERS,
            "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
        })  # fmt: skip


def _check_header(scope: Scope) -> None:
    """Raises what a request is refused with whatever it asks for."""
    pairs = scope["headers"]
    if len(pairs) > MOST_HEADERS or sum(len(name) + len(value) for name, value in pairs) > HEADER_BYTES:
        raise HTTPException(431)
    if _CONTROL.search(scope["path"]):
        raise HTTPException(404)  # routes' patterns would overlook a line feed at the end
    names = [name for name, _ in pairs]
    if b"content-length" in names and b"transfer-encoding" in names:
        raise Unreadable("The body's length is given in two ways.")
    require_distinct(scope["query_string"], "query")
