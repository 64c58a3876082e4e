"""What a stranger finds open: in production neither the API's pages nor its figures, unless somebody asked for them."""

import re
from types import SimpleNamespace

import httpx
import pytest
from pymongo.errors import AutoReconnect

from app.api.operations import VERSION
from app.config import Settings
from app.documents.identities import Identity
from app.keys import KeyRing
from app.limits import RateLimits
from app.main import create_app

PAGES = ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect")


@pytest.fixture(autouse=True)
def nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures ask MongoDB for some, and go without where it is away."""

    async def away() -> int:
        raise AutoReconnect

    monkeypatch.setattr(Identity, "count_failed", away)


async def _found(*paths: str, **settings: object) -> set[str]:
    """Those of the paths that answer 200."""
    known = Settings(_env_file=None).model_copy(update=settings)
    app = create_app(known)
    keys = KeyRing("a key-encryption key of a test, long enough")
    keys.adopt_root(bytes(32))
    app.state.runtime = SimpleNamespace(settings=known, limits=RateLimits(known, keys))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://idem") as client:
        answers = {path: await client.get(path) for path in paths}
    assert {one.status_code for one in answers.values()} <= {200, 404}
    return {path for path, answer in answers.items() if answer.status_code == 200}


async def test_h108_production_shows_neither_pages_nor_figures() -> None:
    assert await _found(*PAGES, "/metrics", environment="production") == set()


async def test_h108_an_operator_may_ask_for_either() -> None:
    assert await _found(*PAGES, "/metrics", environment="production", metrics_enabled=True) == {"/metrics"}
    assert await _found(*PAGES, "/metrics", environment="production", docs_enabled=True) == set(PAGES)


@pytest.mark.parametrize("closed", [{"docs_enabled": False}, {"metrics_enabled": False}])
async def test_development_shows_both_unless_told_otherwise(closed: dict[str, bool]) -> None:
    expected = {"docs_enabled": {"/metrics"}, "metrics_enabled": set(PAGES)}[next(iter(closed))]
    assert await _found(*PAGES, "/metrics", **closed) == expected
    assert await _found(*PAGES, "/metrics") == {*PAGES, "/metrics"}


@pytest.mark.parametrize("environment", ["development", "production"])
async def test_the_front_page_leads_to_what_there_is_and_tells_strangers_no_version(environment: str) -> None:
    app = create_app(Settings(_env_file=None).model_copy(update={"environment": environment}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://idem") as client:
        page = (await client.get("/")).text
    links = set(re.findall(r'href="([^"]+)"', page)) - {"/ready"}
    assert await _found(*links, environment=environment) == links
    assert (VERSION in page) is bool(links) is (environment == "development")
