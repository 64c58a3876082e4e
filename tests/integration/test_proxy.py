"""The proxy that is shipped, run for real before a small upstream: what it lets through, and what it holds off."""

import asyncio
import json
import os
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from fastapi import FastAPI, Request

from app import errors
from app.api import problems
from app.api.base64_texts import spelt_bytes
from app.api.envelope import DATA_POLICY, SECURITY_HEADERS, Envelope
from app.api.identities import MOST_PHOTOS
from app.api.problems import TYPE_BASE
from app.api.room import Room
from app.api.uploads import FIELDS_BYTES
from app.audit import Action
from app.cli.serve import configuration
from app.config import Settings
from app.devstack.servers import free_port
from app.domain.callers import Caller
from app.main import create_app
from tests.support.services import Proc
from tests.support.wire_load import under_load

REPOSITORY = Path(__file__).parents[2]
CONFIGURATION = (REPOSITORY / "deploy/nginx.conf").read_text(encoding="utf-8")
#: As the configuration has them.
REQUEST_BURST = int(re.findall(r"burst=(\d+)", CONFIGURATION)[0])
(CONNECTIONS,) = {int(most) for most in re.findall(r"limit_conn addresses (\d+);", CONFIGURATION)}
SMALL_BODIES = int(re.findall(r"limit_conn small_bodies (\d+);", CONFIGURATION)[0])
OF_DATA = {"Cache-Control": "no-store", "Content-Security-Policy": DATA_POLICY}
#: How long the rest of a refused body is read at most. The configuration says five seconds.
LINGER_SECONDS = 10
#: A slow caller is let go after so many seconds; a tenth of it here, so that nobody waits.
PATIENCE_SECONDS = 1
#: A body without progress for this long is given up. In production it is ten seconds.
BODY_SECONDS = 1.0
#: A name is looked up again after two seconds.
FOUND_WITHIN_SECONDS = 10.0


@dataclass(slots=True)
class Upstream:
    """What stands where the API stands: remembers each request, and tells what it saw."""

    heads: list[str] = field(default_factory=list)
    connections: set[asyncio.Task[None] | None] = field(default_factory=set)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, kept alive."""
        self.connections.add(asyncio.current_task())
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"^content-length: (\d+)", head, re.IGNORECASE | re.MULTILINE)
                body = await reader.readexactly(int(length[1])) if length else b""
                self.heads.append(head)
                seen = json.dumps({"head": head, "body_bytes": len(body)}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(seen), seen))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running nginx with the shipped configuration."""

    port: int
    upstream: Upstream

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A caller of its own."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=20) as client:
            yield client

    async def raw(self, request: bytes, *, source: str = "127.0.0.1") -> str:
        """The answer to these very bytes, until the connection is closed or reset. source: the caller's address."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0))
        writer.write(request)
        try:
            return (await asyncio.wait_for(reader.read(), 10)).decode()
        except ConnectionResetError:
            return ""
        finally:
            writer.close()


def find_nginx() -> str:
    """On a Debian it is not on everybody's PATH."""
    found = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    assert found, "nginx is missing: apt-get install nginx-light"
    return found


def rendered(
    folder: Path, *, listen: int, upstream: int | str, patience_seconds: int, resolver: str = "127.0.0.1:9"
) -> Path:
    """The shipped configuration with only its addresses, folders and patience changed."""
    changed = CONFIGURATION
    for pattern, by, times in (
        (r"api:8000", upstream if isinstance(upstream, str) else f"127.0.0.1:{upstream}", 1),
        (r"listen 8080", f"listen 127.0.0.1:{listen}", 1),
        (r"/tmp/", f"{folder}/", 6),  # noqa: S108 - the container's
        (r"resolver 127\.0\.0\.11", f"resolver {resolver}", 1),
        (r"/etc/nginx/tls/", f"{folder}/tls/", 1),
        (r"(client_header_timeout|client_body_timeout) 10s", rf"\1 {patience_seconds}s", 2),
    ):
        changed, count = re.subn(pattern, by, changed)
        assert count == times, pattern
    path = folder / "nginx.conf"
    path.write_text(changed, encoding="utf-8")
    return path


def accepts(port: int) -> Callable[[Callable[[], bool]], None]:
    """Waits until somebody listens on the port."""

    def wait_until_ready(is_running: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                if not is_running() or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return

    return wait_until_ready


@contextmanager
def running_nginx(
    folder: Path, *, upstream: int | str, patience_seconds: int = PATIENCE_SECONDS, resolver: str = "127.0.0.1:9"
) -> Iterator[int]:
    """The proxy as it is shipped, in front of an upstream's port or name. Yields the proxy's port."""
    listen = free_port()
    configuration = rendered(
        folder, listen=listen, upstream=upstream, patience_seconds=patience_seconds, resolver=resolver
    )
    # Started as root it would become nobody, who may not write into this folder.
    globally = "daemon off; user root;" if os.getuid() == 0 else "daemon off;"
    nginx = Proc([find_nginx(), "-c", str(configuration), "-g", globally], accepts(listen))
    nginx.start()
    try:
        yield listen
    finally:
        nginx.close()


@pytest.fixture(scope="module")
async def proxy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proxy]:
    upstream = Upstream()
    async with await asyncio.start_server(upstream.answer, "127.0.0.1", 0, limit=2**20) as server:
        with running_nginx(tmp_path_factory.mktemp("nginx"), upstream=server.sockets[0].getsockname()[1]) as port:
            yield Proxy(port, upstream)
        await asyncio.gather(*filter(None, upstream.connections))


@asynccontextmanager
async def own_proxy(folder: Path) -> AsyncIterator[Proxy]:
    """One that nobody has asked anything yet, and with a minute's patience."""
    upstream = Upstream()
    async with await asyncio.start_server(upstream.answer, "127.0.0.1", 0, limit=2**20) as server:
        port_of_upstream = server.sockets[0].getsockname()[1]
        with running_nginx(folder, upstream=port_of_upstream, patience_seconds=60) as port:
            yield Proxy(port, upstream)
        await asyncio.gather(*filter(None, upstream.connections))


async def test_a_request_reaches_the_api_with_its_callers_address_and_id(proxy: Proxy) -> None:
    async with proxy.client() as client:
        answer = await client.get("/v1/identities?q=ann", headers={"X-Request-ID": "my-id.1", "Host": "idem.example"})
    head = answer.json()["head"]
    assert head.startswith("GET /v1/identities?q=ann HTTP/1.1\r\n")
    for line in (
        "Host: idem.example",
        "X-Request-ID: my-id.1",
        "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Proto: http",
    ):
        assert f"{line}\r\n" in head


async def test_h105_what_a_caller_claims_of_its_own_address_is_dropped(proxy: Proxy) -> None:
    claims = {
        "X-Forwarded-For": "6.6.6.6",
        "X-Forwarded-Proto": "gopher",
        "X-Forwarded-Port": "666",
        "X-Real-IP": "6.6.6.6",
        "Forwarded": "for=6.6.6.6",
    }
    async with proxy.client() as client:
        head = (await client.get("/", headers=claims)).json()["head"].lower()
    assert "6.6.6.6" not in head
    assert "gopher" not in head
    assert "666" not in head


@pytest.mark.parametrize("wrong", ["", "a b", "x" * 129, 'a"b', "ä"])
async def test_a_request_without_a_proper_id_is_given_one(proxy: Proxy, wrong: str) -> None:
    async with proxy.client() as client:
        head = (await client.get("/", headers=[(b"X-Request-ID", wrong.encode())])).json()["head"]
    given = re.search(r"^X-Request-ID: (.*)\r$", head, re.MULTILINE)
    assert given
    assert re.fullmatch(r"[0-9a-f]{32}", given[1])


async def test_h20_as_much_as_the_api_takes_goes_through_and_no_more(tmp_path: Path) -> None:
    settings = Settings(_env_file=None)
    most = MOST_PHOTOS * spelt_bytes(settings.max_photo_bytes) + FIELDS_BYTES
    limit = int(re.findall(r"client_max_body_size (\d+)m;", CONFIGURATION)[0]) * 2**20
    assert most <= limit < most + 2**20
    async with own_proxy(tmp_path) as proxy, proxy.client() as client:
        assert (await client.post("/v1/identities", content=b"x" * most)).json()["body_bytes"] == most
        before = len(proxy.upstream.heads)
        refused = await client.post("/v1/identities", content=b"x" * (limit + 1))
        assert (await client.post("/v1/galleries", content=b"x" * settings.max_json_bytes)).status_code == 200
        small = await client.post("/v1/galleries", content=b"x" * (settings.max_json_bytes + 1))
    assert_is_problem(refused, errors.TooLarge, "/v1/identities")
    assert_is_problem(small, errors.TooLarge, "/v1/galleries")
    assert len(proxy.upstream.heads) == before + 1


def photo_routes() -> list[str]:
    """The paths that take photos, with an id in the place of a parameter."""
    schema = create_app(Settings(_env_file=None, docs_enabled=True)).openapi()
    return [
        re.sub(r"\{[^}]*\}", "01a1fc00-0000-7000-8000-000000000000", path)
        for path, item in schema["paths"].items()
        if "multipart/form-data" in item.get("post", {}).get("requestBody", {}).get("content", {})
    ]


async def test_a4_exactly_the_routes_with_photos_take_large_bodies(proxy: Proxy) -> None:
    routes = photo_routes()
    assert len(routes) == 7
    others = [
        *(f"{path}x" for path in routes),
        "/health",
        "/v1/auth/token",
        "/v1/identities/import",
        "/v1/identities/a",
    ]
    async with proxy.client() as client:
        taken = {path: (await client.post(path, content=b"x" * 300_000)).status_code for path in (*routes, *others)}
    assert taken == dict.fromkeys(routes, 200) | dict.fromkeys(others, 413)


def assert_is_problem(answer: httpx.Response, kind: type[errors.Problem], path: str) -> None:
    assert answer.headers["content-type"] == "application/problem+json"
    page = answer.json()
    assert set(page) == {"type", "title", "status", "detail", "instance", "request_id", "errors"}
    assert (page["type"], page["title"], page["status"]) == (TYPE_BASE + kind.slug(), kind.title, kind.status)
    assert (page["instance"], page["errors"]) == (path, [])
    assert answer.status_code == kind.status
    assert answer.headers["x-request-id"] == page["request_id"] != ""


@pytest.mark.parametrize(
    ("name", "request_bytes"),
    [
        ("a header that never ends", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "),
        ("a body that stops", b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf"),
        ("chunks that stop", b"POST /slow HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel"),
    ],
)
async def test_h101_h21_h22_a_slow_request_is_ended_by_the_proxy(proxy: Proxy, name: str, request_bytes: bytes) -> None:
    started = time.monotonic()
    await proxy.raw(request_bytes)
    assert time.monotonic() - started < PATIENCE_SECONDS + 4, name


async def test_h101_a_header_that_trickles_is_cut_off_too(proxy: Proxy) -> None:
    """The limit is on the whole header: a byte now and then buys no time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")

    async def trickle() -> None:
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.1)

    started, trickling = time.monotonic(), asyncio.create_task(trickle())
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), PATIENCE_SECONDS + 4)
    assert time.monotonic() - started >= PATIENCE_SECONDS * 0.9
    trickling.cancel()
    writer.close()


@pytest.mark.parametrize("patience", ["client_header_timeout", "client_body_timeout", "send_timeout"])
def test_h101_the_shipped_patience_is_ten_seconds(patience: str) -> None:
    assert re.findall(rf"^ *{patience} (\w+);", CONFIGURATION, re.MULTILINE) == ["10s"]


@pytest.mark.parametrize("headers", [{"X-Long": "x" * 80_000}, {f"X-Header-{n:04}": "a value" for n in range(1_000)}])
async def test_h102_headers_without_measure_are_refused(proxy: Proxy, headers: dict[str, str]) -> None:
    async with proxy.client() as client:
        answer = await client.get("/", headers=headers)
    assert answer.status_code == 431
    assert answer.headers["content-type"] == "application/problem+json"


async def test_a_long_token_is_no_long_header(proxy: Proxy) -> None:
    async with proxy.client() as client:
        answer = await client.get("/", headers={"Authorization": "Bearer " + "x" * 6_000})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: -5",
        "Content-Length: 5, 5",
        "Transfer-Encoding: chunked, identity",
        "Host: y",
        "Bad Name: 1",
        "X-Nul: a\0b",
    ],
)
async def test_h103_a_request_that_could_be_read_in_two_ways_is_refused(proxy: Proxy, lines: str) -> None:
    before = len(proxy.upstream.heads)
    smuggled = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await proxy.raw(f"POST / HTTP/1.1\r\nHost: x\r\n{lines}\r\nConnection: close\r\n\r\n".encode() + smuggled)
    assert re.match(r"HTTP/1.1 (400|501) ", answer), answer
    assert not [head for head in proxy.upstream.heads[before:] if "/smuggled" in head]


async def test_h43_trace_is_not_offered(proxy: Proxy) -> None:
    async with proxy.client() as client:
        answer = await client.request("TRACE", "/v1/auth/me")
    assert_is_problem(answer, errors.MethodNotAllowed, "/v1/auth/me")


async def test_h108_figures_of_the_installation_are_not_shown_outside(proxy: Proxy) -> None:
    async with proxy.client() as client:
        answer = await client.get("/metrics")
    assert_is_problem(answer, errors.NotFound, "/metrics")


async def test_over_tls_the_proxy_and_the_api_behind_it_tell_browsers_to_stay_there(tmp_path: Path) -> None:
    port, tls = free_port(), tmp_path / "tls"
    tls.mkdir()
    certify(tls)
    (tls / "https.conf").write_text(
        f"listen 127.0.0.1:{port} ssl; ssl_certificate {tls}/cert.pem; ssl_certificate_key {tls}/key.pem;"
    )
    async with own_proxy(tmp_path) as proxy, httpx.AsyncClient(verify=False) as browser:  # noqa: S501 - its own
        for path, status in (("/health", 200), ("/metrics", 404)):
            answer = await browser.get(f"https://127.0.0.1:{port}{path}")
            assert answer.status_code == status
            assert answer.headers["strict-transport-security"] == "max-age=31536000; includeSubDomains"
            plain = await browser.get(f"http://127.0.0.1:{proxy.port}{path}")
            assert (plain.status_code, plain.headers.get("strict-transport-security")) == (status, None)


def certify(folder: Path) -> None:
    """A certificate that nobody trusts, and its key."""
    key, moment = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "idem.test")])
    unsigned = x509.CertificateBuilder(name, name, key.public_key(), 1, moment, moment + timedelta(days=1))
    (folder / "cert.pem").write_bytes(unsigned.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


async def test_a_path_that_json_could_not_hold_is_not_repeated(proxy: Proxy) -> None:
    answer = await proxy.raw(b'TRACE /a"b\\c HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n')
    assert json.loads(answer.partition("\r\n\r\n")[2])["instance"] == "/a"


async def test_h104_more_requests_than_one_address_may_ask_are_told_so(tmp_path: Path) -> None:
    ask = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    flood = (ask + b"\r\n") * (REQUEST_BURST - 1) + ask + b"Connection: close\r\n\r\n"
    async with own_proxy(tmp_path) as proxy:
        flooded = "".join(await asyncio.gather(*(proxy.raw(flood) for _ in range(3))))
    assert set(re.findall(r"HTTP/1.1 (\d+)", flooded)) == {"200", "429"}
    assert "urn:idem:problem/rate-limited" in flooded
    assert "Retry-After: 5" in flooded


async def test_h104_more_connections_than_one_address_may_have_are_told_so(tmp_path: Path) -> None:
    async with own_proxy(tmp_path) as proxy:
        held = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(CONNECTIONS)]
        for _, writer in held:
            writer.write(b"POST /v1/faces/detect HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nx")
        await asyncio.sleep(0.2)
        crowded = await proxy.raw(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        for _, writer in held:
            writer.close()
    assert crowded.startswith("HTTP/1.1 429 ")


@pytest.mark.parametrize("name", [*SECURITY_HEADERS, "Cache-Control", "Content-Security-Policy"])
async def test_what_nginx_answers_by_itself_has_the_same_headers(proxy: Proxy, name: str) -> None:
    async with proxy.client() as client:
        for answer in (await client.request("TRACE", "/"), await client.get("/metrics")):
            assert answer.headers[name] == (SECURITY_HEADERS | OF_DATA)[name]


async def test_an_api_that_is_away_is_told_as_such(tmp_path: Path) -> None:
    with running_nginx(tmp_path, upstream=free_port()) as port:
        async with Proxy(port, Upstream()).client() as client:
            answer = await client.get("/v1/auth/me")
    assert_is_problem(answer, errors.DependencyUnavailable, "/v1/auth/me")
    assert answer.headers["retry-after"] == "2"


class Names(asyncio.DatagramProtocol):
    """A name server that answers every question with one address, which may change."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        question = data[12 : data.index(b"\0", 12) + 5]
        head = data[:2] + b"\x81\x80" + b"\0\1\0\1\0\0\0\0"
        answer = b"\xc0\x0c\0\1\0\1" + (600).to_bytes(4, "big") + b"\0\4" + socket.inet_aton(self.address)
        assert self._transport is not None
        self._transport.sendto(head + question + answer, addr)


@asynccontextmanager
async def naming(address: str) -> AsyncIterator[tuple[Names, str]]:
    """A name server on loopback, and its address."""
    loop = asyncio.get_running_loop()
    transport, names = await loop.create_datagram_endpoint(lambda: Names(address), ("127.0.0.1", 0))
    try:
        yield names, f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"
    finally:
        transport.close()


async def test_i5_an_api_that_came_back_with_another_address_is_found(tmp_path: Path) -> None:
    first, second = Upstream(), Upstream()
    async with (
        naming("127.0.0.1") as (names, resolver),
        await asyncio.start_server(first.answer, "127.0.0.1", 0) as one,
    ):
        port = one.sockets[0].getsockname()[1]
        async with await asyncio.start_server(second.answer, "127.0.0.2", port):
            with running_nginx(tmp_path, upstream=f"api.idem.test:{port}", resolver=resolver) as listen:
                async with Proxy(listen, first).client() as client:
                    assert (await client.get("/v1/a%2Fb?c=%20d")).status_code == 200
                    one.close()
                    names.address = "127.0.0.2"
                    began = time.monotonic()
                    while (await client.get("/ready")).status_code != 200:
                        assert time.monotonic() - began < FOUND_WITHIN_SECONDS
                        await asyncio.sleep(0.1)
            await asyncio.gather(*filter(None, first.connections | second.connections))
    assert first.heads[0].startswith("GET /v1/a%2Fb?c=%20d HTTP/1.1\r\n")
    assert second.heads[0].startswith("GET /ready HTTP/1.1\r\n")


def guarded_api() -> FastAPI:
    """An app that reads bodies as the API does: with its limits, by caller. Refuses a caller without a token unread."""
    app = FastAPI()
    problems.install(app)

    @app.post("/v1/auth/token")
    async def token(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @app.post("/v1/{name}")
    async def take(name: str, request: Request) -> dict[str, int]:
        who = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not who:
            raise errors.Unauthenticated
        caller = Caller(who, "client", who, frozenset(), None, "token")
        request.state.admitted = Action(name=name, caller=caller, request_id="", ip="")
        request.state.body_limit = 67 * 2**20
        return {"bytes": sum([len(piece) async for piece in request.stream()])}

    app.add_middleware(Envelope, body_limit=2**18, body_seconds=BODY_SECONDS, room=Room(10 * 2**20, seconds=1.0))
    return app


def spooled(folder: Path) -> int:
    """Bytes that nginx keeps in files."""
    return sum(path.stat().st_size for path in folder.glob("client_body/**/*") if path.is_file())


@pytest.mark.parametrize("token", ["", "attacker"], ids=["a stranger", "a caller"])
async def test_a4_nobody_fills_the_proxy_with_photos_that_never_end(tmp_path: Path, token: str) -> None:
    """57 connections send most of a photo quickly and the rest slowly. Another client's photo of 3 MB still gets through."""
    async with serving(guarded_api()) as upstream:
        with running_nginx(tmp_path, upstream=upstream, patience_seconds=10) as port:
            load = under_load("hold", port, connections=57, size=2_000_000, token=token, trickle_seconds=0.5)
            running = await asyncio.to_thread(load.__enter__)
            async with Proxy(port, Upstream()).client() as client:
                for _ in range(3):
                    photo = await client.post(
                        "/v1/verifications", content=b"x" * 3_000_000, headers={"Authorization": "Bearer victim"}
                    )
                    assert photo.json() == {"bytes": 3_000_000}
                    assert spooled(tmp_path) == 0
                    await asyncio.sleep(0.3)
            await asyncio.sleep(2.5 if token else 0)  # until the first ones are given up
            await asyncio.to_thread(load.__exit__, None, None, None)
    # Slow bodies are ended. Callers without room or without a token get an answer.
    assert running.answers.keys() & ({"408", "429"} if token else {"401"}), running.answers


@asynccontextmanager
async def trickling(port: int, source: str, connections: int) -> AsyncIterator[Counter[str]]:
    """Connections of one address. Each announces 200 kB, sends 70, and then a byte now and then. Yields the statuses so far."""
    statuses: Counter[str] = Counter()

    async def send() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        answer = asyncio.create_task(reader.read(12))
        writer.write(b"POST /v1/auth/token HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + b"x" * 70_000)
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=0.2)
                writer.write(b"x")
            with suppress(ConnectionError):
                statuses[(await answer)[9:12].decode()] += 1
        finally:
            answer.cancel()
            writer.close()

    sending = [asyncio.create_task(send()) for _ in range(connections)]
    try:
        yield statuses
    finally:
        for one in sending:
            one.cancel()
        await asyncio.gather(*sending, return_exceptions=True)


async def test_a4_small_bodies_that_trickle_are_not_spooled_and_the_api_ends_them(tmp_path: Path) -> None:
    async with serving(guarded_api()) as upstream:
        with running_nginx(tmp_path, upstream=upstream, patience_seconds=10) as port:
            async with trickling(port, "127.0.1.1", 3) as statuses:
                await asyncio.sleep(0.5)
                assert spooled(tmp_path) == 0
                async with asyncio.timeout(BODY_SECONDS + 5):
                    while statuses.total() < 3:
                        await asyncio.sleep(0.1)
    assert statuses == {"408": 3}


async def test_a4_one_address_may_send_only_a_few_small_bodies_at_a_time(tmp_path: Path) -> None:
    """Nine addresses send as many as they can. Each is stopped at its own limit, and another one is served."""
    post = b"POST /v1/auth/token HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
    async with own_proxy(tmp_path) as proxy, AsyncExitStack() as stack:
        several = [
            await stack.enter_async_context(trickling(proxy.port, f"127.0.1.{number}", SMALL_BODIES + 2))
            for number in range(1, 10)
        ]
        async with asyncio.timeout(10):
            while any(statuses.total() < 2 for statuses in several):
                await asyncio.sleep(0.1)
        crowded = await proxy.raw(post, source="127.0.1.1")
        reading = await proxy.raw(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", source="127.0.1.1")
        other = await proxy.raw(post, source="127.0.1.10")
        assert all(statuses == {"429": 2} for statuses in several)
    assert crowded.startswith("HTTP/1.1 429 ")
    assert reading.startswith("HTTP/1.1 200 ")
    assert other.startswith("HTTP/1.1 200 ")


async def test_a4_a_refused_body_that_trickles_on_does_not_keep_its_connection(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"POST /v1/auth/token HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    began = time.monotonic()
    with suppress(ConnectionError):
        while time.monotonic() - began < LINGER_SECONDS + 5:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.2)
    writer.close()
    assert time.monotonic() - began < LINGER_SECONDS


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[int]:
    """The app behind the API's own server. Yields its port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = configuration(Settings(_env_file=None, log_level="error"), app=app)
        config.lifespan = "off"
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task
