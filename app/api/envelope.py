"""Around every answer: the request's id, its body's limit, security headers, its figures and its log line."""

import re
import time

import structlog
from prometheus_client import Counter, Gauge, Histogram
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import answer
from app.documents.base import new_id

log = structlog.get_logger(__name__)

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
#: Pages that bring scripts and styles of their own; everything else is data.
PAGES = ("/", "/docs", "/redoc", "/docs/oauth2-redirect")
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "worker-src blob:; frame-ancestors 'none'"
)

REQUESTS = Counter("idem_requests_total", "Answers, by route and status", ["method", "route", "status"])
SECONDS = Histogram(
    "idem_request_duration_seconds", "Time to answer, by route", ["method", "route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)  # fmt: skip
IN_FLIGHT = Gauge("idem_requests_in_flight", "Requests being answered")


class Envelope:
    """ASGI middleware; the outermost."""

    def __init__(self, app: ASGIApp, body_limit: int) -> None:
        """body_limit: bytes of a body; a route that takes photos raises `request.state.body_limit` before it reads."""
        self._app = app
        self._body_limit = body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given.decode() if REQUEST_ID.fullmatch(given) else new_id()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["body_limit"] = self._body_limit
        started = time.perf_counter()
        status: int | None = None
        declared = dict(scope["headers"]).get(b"content-length", b"")
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            too_long = declared.isdigit() and int(declared) > state["body_limit"]
            if too_long or read > state["body_limit"]:
                raise HTTPException(413)
            return message

        async def sealed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Frame-Options"] = "DENY"
                headers["Content-Security-Policy"] = PAGE_POLICY if scope["path"] in PAGES else DATA_POLICY
            await send(message)

        IN_FLIGHT.inc()
        try:
            await self._app(scope, bounded, sealed)
        except Exception as error:
            # A fault of ours that no route foresaw; where the answer has begun, it can only be cut off.
            if status is not None:
                raise
            page = await answer(Request(scope, bounded), error)
            await page(scope, bounded, sealed)
        finally:
            IN_FLIGHT.dec()
            seconds = time.perf_counter() - started
            # The route's template, not the path: paths hold ids, and there is no end of them.
            route = getattr(scope.get("route"), "path", "unmatched")
            REQUESTS.labels(scope["method"], route, str(status)).inc()
            SECONDS.labels(scope["method"], route).observe(seconds)
            log.info(
                "request_answered", request_id=request_id, method=scope["method"], route=route, status=status,
                milliseconds=round(seconds * 1000, 1),
            )  # fmt: skip
