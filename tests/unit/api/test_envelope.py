"""What every answer has around it, whatever happened inside."""

import httpx
from fastapi import FastAPI

from app.api import problems
from app.api.envelope import Envelope

BODY_LIMIT = 64


def _client() -> httpx.AsyncClient:
    app = FastAPI()
    problems.install(app)

    @app.get("/broken")
    async def broken() -> None:
        message = "a secret detail"
        raise RuntimeError(message)

    @app.post("/echo")
    async def echo(body: dict[str, str]) -> dict[str, str]:
        return body

    app.add_middleware(Envelope, body_limit=BODY_LIMIT)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://idem")


async def test_an_unforeseen_fault_is_a_problem_with_a_request_id_and_no_details() -> None:
    async with _client() as client:
        answer = await client.get("/broken", headers={"X-Request-ID": "mine-1"})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "mine-1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "secret" not in answer.text


async def test_a_strange_request_id_is_replaced() -> None:
    async with _client() as client:
        answer = await client.get("/nowhere", headers={"X-Request-ID": "a b"})
    assert answer.status_code == 404
    assert len(answer.headers["x-request-id"]) == 36


async def test_another_method_is_told_which_ones_are_allowed() -> None:
    async with _client() as client:
        answer = await client.delete("/echo")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["type"].endswith("method-not-allowed")


async def test_a_body_over_the_limit_is_refused_whether_it_was_declared_or_not() -> None:
    body = b'{"a": "' + b"x" * BODY_LIMIT + b'"}'

    async def in_pieces():  # noqa: ANN202 - an async generator of bytes
        yield body[:10]
        yield body[10:]

    async with _client() as client:
        json = {"Content-Type": "application/json"}
        declared = await client.post("/echo", content=body, headers=json)
        chunked = await client.post("/echo", content=in_pieces(), headers=json)
        fitting = await client.post("/echo", content=b'{"a": "b"}', headers=json)
    assert (declared.status_code, chunked.status_code, fitting.status_code) == (413, 413, 200)
    assert declared.json()["type"].endswith("too-large")
