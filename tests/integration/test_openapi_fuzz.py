"""Schemathesis against the whole API on real stores: whatever it sends, no server error, and every answer is documented."""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from app import main
from app.audit import by_system
from app.config import Settings
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.domain.callers import Role
from app.runtime import Runtime
from app.use_cases import sequence
from app.use_cases.keep_users import UserFields, create_user
from tests.builders import active, suspected

#: `make fuzz` asks for more.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1"))
LIMIT_SECONDS = 600 + 10 * EXAMPLES
REPOSITORY = Path(__file__).parents[2]
PASSWORD = "correct horse battery staple"

#: positive_data_acceptance: what fits the document may still name nobody (404), show no face (415, 422), or come too late.
CONFIGURATION = """
hooks = "tests.support.fuzz_hooks"
continue-on-failure = true
request-timeout = 30

[generation]
database = "none"

[checks.not_a_server_error]
# 501: a call of the contract that is not built yet, and says so.
expected-statuses = ["2xx", "3xx", "4xx", "501"]

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "401", "403", "404", "409", "410", "412", "413", "415", "422", "429", "501"]

[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "409", "412", "413", "415", "422", "429", "431", "501"]
"""


@dataclass(frozen=True, slots=True)
class Fuzzed:
    """The service under test, and what schemathesis is told about it."""

    url: str
    plan: Path
    configuration: Path

    async def run(self, *options: str) -> tuple[int, str]:
        """One run of schemathesis: its exit status, and what it said, as far as it came in time."""
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(self.configuration), "run"]
        said = self.plan.with_name("said.txt")
        with said.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command, f"{self.url}/openapi.json", "--url", self.url, *options, cwd=REPOSITORY,
                env=dict(os.environ) | {"FUZZ_PLAN": str(self.plan), "PYTHONPATH": str(REPOSITORY)},
                stdout=output, stderr=output,
            )  # fmt: skip
            try:
                async with asyncio.timeout(LIMIT_SECONDS):
                    status = await process.wait()
            except TimeoutError:
                process.kill()
                status = await process.wait()
        return status, said.read_text(encoding="utf-8", errors="replace")


@asynccontextmanager
async def serving(runtime: Runtime, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """The service on a free port, over this very Runtime; its address."""

    @asynccontextmanager
    async def opened(*_: object, **__: object) -> AsyncIterator[Runtime]:
        yield runtime

    monkeypatch.setattr(main, "open_runtime", opened)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = main.create_app(settings.model_copy(update={"log_level": "error"}))
        server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_level="warning", access_log=False))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            async with sequence.kept_up(runtime):  # a worker's part: proofs and exports wait for it
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


async def known_things(runtime: Runtime) -> dict[str, list[str]]:
    """Ids and names to be found in paths and questions, by the parameter's name."""
    people = [await active(runtime, f"person-{number}") for number in range(12)]
    cases = [(await suspected(runtime, f"person-{number}"))[1] for number in range(6)]
    events = await AuditEvent.find_all().limit(20).to_list()
    galleries = [gallery.name async for gallery in Gallery.find_all()]
    everybody = await Identity.find_all().to_list()
    return {
        "identity_id": [one.id for one in everybody],
        "sample_id": [one.samples[0].id for one in people],
        "case_id": [case.id for case in cases],
        "job_id": [one.screenings[0].job_id for one in everybody],
        "event": [event.id for event in events],
        "gallery": galleries,
        "name": galleries,
    }


async def tokens(url: str, runtime: Runtime) -> list[str]:
    """Access tokens of callers of every role; the one with all of a person's roles comes most often."""
    everything = (Role.ADMIN, Role.OFFICER, Role.AUDITOR)
    found = []
    async with httpx.AsyncClient(base_url=url) as http:
        for name, roles in {
            "all": everything,
            "admin": (Role.ADMIN,),
            "officer": (Role.OFFICER,),
            "auditor": (Role.AUDITOR,),
        }.items():
            await new_user(runtime, name, roles)
            form = {"grant_type": "password", "username": name, "password": PASSWORD}
            found.append((await http.post("/v1/auth/token", data=form)).json()["access_token"])
        http.headers["Authorization"] = f"Bearer {found[0]}"
        made = (await http.post("/v1/clients", json={"name": "bank", "galleries": None, "audiences": []})).json()
        credentials = {name: made[name] for name in ("client_id", "client_secret")}
        form = {"grant_type": "client_credentials", **credentials}
        found.append((await http.post("/v1/auth/token", data=form)).json()["access_token"])
    return [found[0], found[1], found[0], found[2], found[0], found[3], found[0], found[4]]


async def new_user(runtime: Runtime, name: str, roles: tuple[Role, ...]) -> None:
    await create_user(runtime, by_system("user.create"), UserFields(name, roles, None), PASSWORD)


@pytest.fixture
async def fuzzed(
    runtime: Runtime, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Fuzzed]:
    await runtime.access.load_keys()
    async with serving(runtime, settings, monkeypatch) as url:
        plan, configuration = tmp_path / "plan.json", tmp_path / "schemathesis.toml"
        known = await known_things(runtime)
        plan.write_text(json.dumps({"tokens": await tokens(url, runtime), "known": known}))
        configuration.write_text(CONFIGURATION)
        yield Fuzzed(url, plan, configuration)


async def test_whatever_is_sent_every_answer_is_documented_and_none_is_a_server_error(fuzzed: Fuzzed) -> None:
    status, said = await fuzzed.run(
        "--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES), "--seed", "1", "--workers", "2"
    )  # fmt: skip
    assert status == 0, said[-20_000:]
