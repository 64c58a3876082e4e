"""The start and the end of a process, as its server sees them: a start that fails, and an answer that the end cuts off.

The outermost ASGI layer. Without it, the server would print a traceback for the first, and answer 500 for the second.
"""

import asyncio
import json

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import TYPE_BASE
from app.documents.base import new_id
from app.errors import NotReady
from app.starting import as_sentence

log = structlog.get_logger(__name__)


class Edges:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle the events of the process's life, or answer one request."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without_traceback(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                message = {"type": message["type"]}
            await send(message)

        try:
            await self._app(scope, receive, without_traceback)
        except Exception as error:
            if sentence := as_sentence(error):
                log.critical("service_not_started", reason=sentence, error=type(error).__name__)
            else:
                log.critical("service_not_started", exc_info=error)
            raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            # The server cancels open requests when its grace period ends. Nothing is half done: MongoDB drops a transaction that
            # was not committed. The caller can ask again with the same idempotency key.
            if has_begun:
                raise
            await _say_stopping(scope, send)


async def _say_stopping(scope: Scope, send: Send) -> None:
    problem = NotReady("The service is stopping; please try again.", retry_after_seconds=1)
    request_id = scope.get("state", {}).get("request_id") or new_id()
    page = json.dumps({
        "type": TYPE_BASE + problem.slug(), "title": problem.title, "status": problem.status, "detail": problem.detail,
        "instance": scope["path"], "request_id": request_id, "errors": [],
    }).encode()  # fmt: skip
    headers = [
        (b"content-type", b"application/problem+json"), (b"content-length", str(len(page)).encode()), (b"retry-after", b"1"),
        (b"x-request-id", request_id.encode()), (b"cache-control", b"no-store"), (b"connection", b"close"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": page})
