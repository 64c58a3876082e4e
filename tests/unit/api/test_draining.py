"""SIGTERM at the door: what has begun is finished, or answered 503 before the grace is over."""

import asyncio
import signal
import time
from types import FrameType

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from app.api import draining
from app.api.draining import Drain, Draining
from app.api.envelope import Envelope

IN_FLIGHT = 50
GRACE_SECONDS = 0.6


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers after as many seconds as the path says."""
    if scope["path"] == "/begun":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(5)
    await asyncio.sleep(float(scope["path"].removeprefix("/")))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


@pytest.fixture
def drain(monkeypatch: pytest.MonkeyPatch) -> Drain:
    monkeypatch.setattr(draining, "RESERVE_SECONDS", GRACE_SECONDS / 2)
    return Drain(GRACE_SECONDS)


def _http(drain: Drain) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(Envelope(Draining(_app, drain), 1000), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://idem.test")


async def test_h98_of_fifty_requests_in_flight_the_quick_ones_end_and_the_slow_ones_are_answered_503(
    drain: Drain,
) -> None:
    async with _http(drain) as http:
        calls = [asyncio.create_task(http.get(f"/{0.05 if n % 2 else 30}")) for n in range(IN_FLIGHT)]
        await asyncio.sleep(0.02)
        began = time.monotonic()
        drain.begin()
        drain.begin()
        answers = await asyncio.gather(*calls)
        assert time.monotonic() - began < GRACE_SECONDS
    assert [answer.status_code for answer in answers] == [503, 200] * (IN_FLIGHT // 2)
    assert answers[0].headers["retry-after"] == "1"
    assert answers[0].json()["type"].endswith("not-ready")


async def test_a_request_that_comes_after_the_signal_shares_what_is_left(drain: Drain) -> None:
    async with _http(drain) as http:
        drain.begin()
        assert (await http.get("/0.01")).status_code == 200
        assert (await http.get("/30")).status_code == 503


async def test_without_a_signal_nothing_is_cut_short(drain: Drain) -> None:
    async with _http(drain) as http:
        assert (await http.get(f"/{GRACE_SECONDS + 0.1}")).status_code == 200


async def test_an_answer_that_has_begun_is_not_followed_by_another(drain: Drain) -> None:
    async with _http(drain) as http:
        call = asyncio.create_task(http.get("/begun"))
        await asyncio.sleep(0.02)
        drain.begin()
        answer = await call
    assert (answer.status_code, answer.content) == (200, b""), "cut off: a 503 inside of a 200 would be worse"


async def test_a_signal_begins_it_and_the_server_still_hears_it(drain: Drain) -> None:
    heard: list[int] = []

    def server(number: int, frame: FrameType | None) -> None:
        del frame
        heard.append(number)

    before = signal.signal(signal.SIGTERM, server)
    try:
        with drain.on_signals():
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(0.01)
        assert signal.getsignal(signal.SIGTERM) is server
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert drain._ends_at is not None
