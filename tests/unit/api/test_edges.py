"""The start and the end of a process: starts that fail, and requests that the end cuts off."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.draining import Drain, Draining
from app.api.edges import Edges
from app.errors import ModelUnavailable, NotReady

HTTP: Scope = {
    "type": "http",
    "path": "/v1/identities",
    "method": "POST",
    "headers": [],
    "state": {"request_id": "r-1"},
}


async def _nothing() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


def _said(sent: list[Message]) -> tuple[int, dict[str, object]]:
    return sent[0]["status"], json.loads(sent[1]["body"])


async def _sent_when_cancelled(app: ASGIApp) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    task = asyncio.create_task(Edges(app)(dict(HTTP), _nothing, send))  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return sent


async def test_a_request_that_the_server_cancels_is_answered_503_and_not_500() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    sent = await _sent_when_cancelled(slow)
    status, page = _said(sent)
    assert (status, page["type"], page["request_id"]) == (503, "urn:idem:problem/not-ready", "r-1")
    assert dict(sent[0]["headers"])[b"retry-after"] == b"1"


async def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    async def begun(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(60)

    assert len(await _sent_when_cancelled(begun)) == 1


@pytest.mark.parametrize("becomes", [RuntimeError("cannot schedule new futures after shutdown"), KeyError("x")])
async def test_an_error_that_a_cancellation_became_is_a_503_too(becomes: Exception) -> None:
    """Drivers and executors turn the end of their task into other errors."""

    async def turning(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise becomes from None

    drain = Drain(0.02)
    task = asyncio.create_task(Draining(turning, drain)(dict(HTTP), _nothing, _ignore))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    drain.begin()
    with pytest.raises(NotReady):
        await task


async def test_a_fault_before_the_end_of_the_grace_time_stays_a_fault() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("x")

    drain = Drain(10)
    drain.begin()
    with pytest.raises(KeyError):
        await Draining(broken, drain)(dict(HTTP), _nothing, _ignore)  # type: ignore[arg-type]


async def test_a_failed_start_gives_the_server_no_traceback_to_print(caplog: pytest.LogCaptureFixture) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "lifespan.startup.failed", "message": "Traceback (most recent call last) ..."})
        raise ModelUnavailable("det_500m.onnx is missing")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    receive: Callable[[], Awaitable[Message]] = _nothing
    with caplog.at_level(logging.CRITICAL), pytest.raises(ModelUnavailable):
        await Edges(failing)({"type": "lifespan"}, receive, send)
    assert sent == [{"type": "lifespan.startup.failed"}]


async def _ignore(message: Message) -> None:
    del message
