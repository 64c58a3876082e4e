"""What every answer has around it, whatever happened inside."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.types import Message

from app.api import envelope, problems
from app.api.envelope import (
    ANONYMOUS_PART,
    DRAINED_BYTES,
    HEADER_BYTES,
    LONGEST_BODY_SECONDS,
    MOST_HEADERS,
    SECURITY_HEADERS,
    SLOWEST_BYTES_A_SECOND,
    SMALL_BODY,
    Envelope,
)
from app.api.room import Room
from app.audit import Action
from app.domain.callers import Caller
from app.limits import Allowance

BODY_LIMIT = 64
DESK = "https://desk.example"
JSON = {"Content-Type": "application/json"}


def _app(
    *,
    body_limit: int = BODY_LIMIT,
    body_seconds: float = 10,
    room: Room | None = None,
    held: asyncio.Event | None = None,
    origins: frozenset[str] = frozenset(),
) -> FastAPI:
    """held: `/hold` answers when it is set."""
    app = FastAPI(redirect_slashes=False)
    problems.install(app)

    @app.get("/broken")
    async def broken() -> None:
        message = "a secret detail"
        raise RuntimeError(message)

    @app.get("/echo")
    async def quiet(request: Request) -> dict[str, str]:
        request.state.allowance = Allowance(is_granted=True, limit=60, remaining=59, reset_seconds=7)
        return {}

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @app.post("/deaf")
    async def deaf() -> None:
        """Answers without having read what came."""

    @app.post("/photo")
    async def photo(request: Request) -> dict[str, int]:
        """Takes larger bodies, of admitted callers only."""
        caller = Caller("app-1", "client", "app-1", frozenset(), None, "token")
        request.state.admitted = Action(name="face.verify", caller=caller, request_id="", ip="")
        request.state.body_limit = 16 * body_limit
        return {"bytes": len(await request.body())}

    @app.post("/hold")
    async def hold(request: Request) -> None:
        await photo(request)
        if held is not None:
            await held.wait()

    app.add_middleware(Envelope, body_limit=body_limit, body_seconds=body_seconds, room=room, allowed_origins=origins)
    return app


def _client(app: FastAPI | None = None, base_url: str = "http://idem") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app or _app()), base_url=base_url)


async def _dripping(*pieces: bytes, seconds: float) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(seconds)


def _is_problem(answer: httpx.Response, status: int, slug: str) -> bool:
    page = answer.json()
    kind = answer.headers["content-type"]
    return (answer.status_code, kind, page["type"].rpartition(":")[2].rpartition("/")[2]) == (
        status,
        "application/problem+json",
        slug,
    )


async def test_an_unforeseen_fault_is_a_problem_with_a_request_id_and_no_details() -> None:
    async with _client() as client:
        answer = await client.get("/broken", headers={"X-Request-ID": "mine-1"})
    assert _is_problem(answer, 500, "unexpected")
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "mine-1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "secret" not in answer.text


async def test_a_strange_request_id_is_replaced() -> None:
    async with _client() as client:
        answer = await client.get("/nowhere", headers={"X-Request-ID": "a b"})
    assert answer.status_code == 404
    assert len(answer.headers["x-request-id"]) == 36


async def test_another_method_is_told_all_that_are_allowed_on_the_path() -> None:
    async with _client() as client:
        answers = [await client.request(method, "/echo") for method in ("DELETE", "PUT", "TRACE", "BREW")]
        other = await client.delete("/broken")
    for answer in answers:
        assert _is_problem(answer, 405, "method-not-allowed")
        assert answer.headers["allow"] == "GET, POST"
    assert other.headers["allow"] == "GET"


@pytest.mark.parametrize("tail", ["%0a", "%0d", "%00", "/", "//", "%2f", ";a=b", "/%2e", "%20"])
async def test_h43_no_path_has_a_second_spelling(tail: str) -> None:
    async with _client() as client:
        answer = await client.get(f"/echo{tail}")
    assert _is_problem(answer, 404, "not-found")


async def test_h20_a_body_over_the_limit_is_refused_whether_it_was_declared_or_not() -> None:
    body = b"x" * (BODY_LIMIT + 1)
    async with _client() as client:
        declared = await client.post("/echo", content=body)
        chunked = await client.post("/echo", content=_dripping(body[:10], body[10:], seconds=0))
        fitting = await client.post("/echo", content=body[:-1])
    assert _is_problem(declared, 413, "too-large")
    assert _is_problem(chunked, 413, "too-large")
    assert fitting.json() == {"bytes": BODY_LIMIT}


async def test_h22_a_body_that_drips_is_given_up_in_time() -> None:
    async with _client(_app(body_seconds=0.1)) as client:
        answer = await client.post("/echo", content=_dripping(*[b"x"] * 60, seconds=0.05))
    assert _is_problem(answer, 408, "request-timeout")


async def test_g7_a_slow_body_that_keeps_coming_is_taken() -> None:
    """800 kB at 30 KiB/s take 27 seconds. This body is smaller, comes as fast, and takes longer than one without progress may."""
    piece, pieces, pause, body_seconds = b"x" * 160, 120, 0.005, 0.4
    assert len(piece) / pause > SLOWEST_BYTES_A_SECOND
    assert pieces * pause > body_seconds
    async with _client(_app(body_limit=2**20, body_seconds=body_seconds)) as client:
        answer = await client.post("/echo", content=_dripping(*[piece] * pieces, seconds=pause))
    assert answer.json() == {"bytes": pieces * len(piece)}
    assert LONGEST_BODY_SECONDS > 800_000 / (30 * 1024)


@pytest.mark.parametrize("trickle", [b"", b"x"], ids=["nothing", "a byte now and then"])
async def test_a5_bytes_that_came_earlier_give_no_more_time(trickle: bytes) -> None:
    pieces, pause = 100, 0.05
    began = time.monotonic()
    async with _client(_app(body_limit=2**24, body_seconds=0.1)) as client:
        answer = await client.post("/echo", content=_dripping(b"x" * 10**7, *[trickle] * pieces, seconds=pause))
    assert _is_problem(answer, 408, "request-timeout")
    assert time.monotonic() - began < pieces * pause / 2, "the server waited for the whole body"


async def test_a5_no_body_takes_for_ever_however_steadily_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "LONGEST_BODY_SECONDS", 0.2)
    async with _client(_app(body_limit=2**20, body_seconds=0.1)) as client:
        answer = await client.post("/echo", content=_dripping(*[b"x" * 1000] * 200, seconds=0.01))
    assert _is_problem(answer, 408, "request-timeout")


async def test_a5_a_body_that_finds_no_room_is_refused_and_room_is_given_back() -> None:
    room, held = Room(4 * SMALL_BODY, seconds=0.05), asyncio.Event()
    app, size = _app(body_limit=2**20, room=room, held=held), 2 * SMALL_BODY
    async with _client(app) as client:
        holding = asyncio.create_task(client.post("/hold", content=b"x" * size))
        async with asyncio.timeout(10):
            while room.taken < size:
                await asyncio.sleep(0)
        refused = await client.post("/photo", content=b"x" * size)
        undeclared = await client.post("/photo", content=_dripping(*[b"x" * SMALL_BODY] * 4, seconds=0))
        small = await client.post("/photo", content=b"x" * SMALL_BODY)
        assert room.taken == size
        held.set()
        assert (await holding).status_code == 200
        free = await client.post("/photo", content=b"x" * size)
    for answer in (refused, undeclared):
        assert _is_problem(answer, 429, "rate-limited")
        assert answer.headers["retry-after"] == "2"
    assert small.json() == {"bytes": SMALL_BODY}
    assert free.json() == {"bytes": size}
    assert room.taken == 0


@pytest.mark.parametrize(("sent", "taken"), [(1, 0), (SMALL_BODY, 0), (SMALL_BODY + 1, 2), (3 * SMALL_BODY + 1, 3.5)])
async def test_a5_a_body_of_unknown_length_takes_room_for_what_has_come_and_never_more_than_its_limit(
    sent: int, taken: float
) -> None:
    """taken: in units of SMALL_BODY. The limit of the route is 3.5 of them."""
    room, stopped, going_on = Room(2**30), asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"x" * sent
        stopped.set()
        await going_on.wait()

    app = _app(body_limit=SMALL_BODY * 7 // 32, room=room)
    async with _client(app) as client:
        sending = asyncio.create_task(client.post("/photo", content=body()))
        await stopped.wait()
        assert room.taken == int(taken * SMALL_BODY)
        going_on.set()
        assert (await sending).json() == {"bytes": sent}
    assert room.taken == 0


@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "chunked"])
async def test_a5_anonymous_callers_cannot_fill_the_room_of_admitted_ones(*, is_declared: bool) -> None:
    """200 anonymous callers with an address each stop in the middle of the largest body that their route takes."""
    limit, going_on = 4 * SMALL_BODY, asyncio.Event()
    room = Room(64 * SMALL_BODY, seconds=0.05)
    app, headers = _app(body_limit=limit, room=room), {"Content-Length": str(limit)} if is_declared else {}

    async def anonymous(number: int) -> int:
        async def body() -> AsyncIterator[bytes]:
            yield b"x" * (limit - 1)
            await going_on.wait()
            yield b"x"

        transport = httpx.ASGITransport(app, client=(f"192.0.2.{number}", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://idem") as client:
            return (await client.post("/echo", content=body(), headers=headers)).status_code

    sending = [asyncio.create_task(anonymous(number)) for number in range(200)]
    await asyncio.sleep(0.2)
    async with _client(app) as client:
        photo = await client.post("/photo", content=b"x" * (room.most // 4))
    going_on.set()
    statuses = Counter(await asyncio.gather(*sending))
    assert photo.json() == {"bytes": room.most // 4}
    assert statuses == {200: room.most // ANONYMOUS_PART // limit, 503: 200 - room.most // ANONYMOUS_PART // limit}
    assert room.taken == 0


async def test_h21_a_body_that_ends_early_is_nobodys_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    scope = {
        "type": "http", "method": "POST", "path": "/echo", "raw_path": b"/echo", "query_string": b"", "root_path": "",
        "headers": [(b"content-length", b"50")], "client": ("192.0.2.1", 1), "server": ("idem", 80), "scheme": "http",
    }  # fmt: skip
    coming: list[Message] = [
        {"type": "http.request", "body": b"half", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return coming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await _app()(scope, receive, send)
    assert sent[0]["status"] == 408
    assert "unexpected_error" not in caplog.text


async def test_what_is_left_of_a_small_body_is_taken_in_and_of_a_large_one_is_not() -> None:
    async with _client(_app(body_limit=2**30)) as client:
        small = await client.post("/deaf", content=b"x" * DRAINED_BYTES)
        large = await client.post("/deaf", content=b"x" * (DRAINED_BYTES + 1))
        endless = await client.post("/deaf", content=_dripping(*[b"x" * 4096] * 40, seconds=0))
        none = await client.post("/deaf")
        expected = await client.post("/deaf", content=b"x", headers={"Expect": "100-continue"})
    assert [one.headers.get("connection") for one in (small, large, endless, none, expected)] == [
        None, "close", "close", None, "close",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "headers",
    [{"X-Long": "x" * 80_000}, {f"X-{number}": "v" for number in range(1000)}],
    ids=["80 kB", "1000 headers"],
)
async def test_h102_headers_without_measure_are_refused(headers: Mapping[str, str]) -> None:
    async with _client() as client:
        answer = await client.get("/echo", headers=headers)
    assert _is_problem(answer, 431, "headers-too-large")


async def test_headers_with_measure_are_not() -> None:
    long = {"Authorization": "Bearer " + "x" * (HEADER_BYTES // 2)}
    many = {f"X-{number}": "v" for number in range(MOST_HEADERS - 10)}
    async with _client() as client:
        assert (await client.get("/echo", headers=long)).status_code == 200
        assert (await client.get("/echo", headers=many)).status_code == 200


async def test_h103_a_length_that_is_given_in_two_ways_is_refused() -> None:
    both = {"Content-Length": "4", "Transfer-Encoding": "chunked"}
    async with _client() as client:
        answer = await client.post("/echo", content=b"body", headers=both)
    assert _is_problem(answer, 400, "unreadable")
    assert answer.headers["connection"] == "close"


async def test_security_headers_are_on_every_answer() -> None:
    async with _client() as client:
        answers = [
            await client.get("/echo"),
            await client.get("/nowhere"),
            await client.get("/broken"),
            await client.delete("/echo"),
            await client.post("/echo", content=b"x" * 1000),
            await client.get("/echo", headers={"X-Long": "x" * 80_000}),
        ]
    assert [one.status_code for one in answers] == [200, 404, 500, 405, 413, 431]
    for answer in answers:
        for name, value in (SECURITY_HEADERS | {"Cache-Control": "no-store"}).items():
            assert answer.headers[name] == value, answer.status_code
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-request-id"]
        assert "strict-transport-security" not in answer.headers


async def test_a_browser_that_came_by_tls_is_told_to_stay_with_it() -> None:
    async with _client(base_url="https://idem") as client:
        answer = await client.get("/nowhere")
    assert answer.headers["strict-transport-security"].startswith("max-age=31536000")


async def test_what_is_left_of_a_callers_rate_is_told() -> None:
    async with _client() as client:
        answer = await client.get("/echo")
        free = await client.get("/nowhere")
    told = {name: value for name, value in answer.headers.items() if name.startswith("ratelimit")}
    assert told == {"ratelimit-limit": "60", "ratelimit-remaining": "59", "ratelimit-reset": "7"}
    assert not [name for name in free.headers if name.startswith("ratelimit")]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", DESK.upper(), f"{DESK}.evil.example", f"{DESK}/"])
@pytest.mark.parametrize("allowed", [frozenset[str](), frozenset({DESK})])
async def test_h106_a_foreign_page_may_read_nothing(origin: str, allowed: frozenset[str]) -> None:
    async with _client(_app(origins=allowed)) as client:
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        preflight = await client.options("/echo", headers=asked)
        answer = await client.get("/echo", headers={"Origin": origin})
    assert preflight.status_code == 405
    for one in (preflight, answer):
        assert not [name for name in one.headers if name.startswith("access-control")]


async def test_h106_a_page_of_an_allowed_origin_may_ask_and_read_but_brings_no_cookies() -> None:
    async with _client(_app(origins=frozenset({DESK}))) as client:
        asked = {"Origin": DESK, "Access-Control-Request-Method": "PATCH"}
        preflight = await client.options("/nowhere", headers=asked)
        answers = [await client.get(path, headers={"Origin": DESK}) for path in ("/echo", "/broken")]
        plain = await client.get("/echo")
    assert preflight.status_code == 204
    assert "PATCH" in preflight.headers["access-control-allow-methods"]
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    for one in (preflight, *answers):
        assert one.headers["access-control-allow-origin"] == DESK
        assert "access-control-allow-credentials" not in one.headers
    assert plain.headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in plain.headers


async def test_h106_an_unasked_options_is_no_preflight() -> None:
    async with _client(_app(origins=frozenset({DESK}))) as client:
        answer = await client.options("/echo", headers={"Origin": DESK})
    assert answer.status_code == 405
