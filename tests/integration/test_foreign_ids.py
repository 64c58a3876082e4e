"""What lies in a gallery that the caller may not see is asked for with the same commands as what is nowhere."""

from collections.abc import AsyncIterator
from functools import partial

import pytest
from pymongo.monitoring import CommandFailedEvent, CommandListener, CommandStartedEvent, CommandSucceededEvent

from app import runtime as runtimes
from app.config import Settings
from app.documents.base import now
from app.documents.cases import Case
from app.documents.galleries import Gallery
from app.documents.proposals import IdentityProposal
from app.runtime import Runtime, open_runtime
from app.use_cases import scan
from tests.builders import by_officer, enrolled, portrait, screened
from tests.fakes import FakeEngine
from tests.support.callers import app_on, http_of, token_of

NOBODY = "01a1fc00-0000-7000-8000-000000000000"
#: Who calls, and the keys of tokens, are remembered for half a second: these reads come or do not come.
OF_CALLERS = {"users", "logins", "clients", "revoked_tokens", "signing_keys"}


class Commands(CommandListener):
    """The commands that are sent to MongoDB: name and collection of each."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def started(self, event: CommandStartedEvent) -> None:
        """Note it."""
        told = (event.command_name, str(event.command.get(event.command_name)))
        if told[1] not in OF_CALLERS:
            self.seen.append(told)

    def succeeded(self, event: CommandSucceededEvent) -> None:
        """Nothing to note."""

    def failed(self, event: CommandFailedEvent) -> None:
        """Nothing to note."""


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Those of the runtime's client."""
    listener = Commands()
    client = partial(runtimes.BoundedMongoClient, event_listeners=[listener])
    monkeypatch.setattr(runtimes, "BoundedMongoClient", client)
    return listener


@pytest.fixture
async def runtime(settings: Settings, commands: Commands) -> AsyncIterator[Runtime]:
    """A Runtime whose commands are noted."""
    async with open_runtime(settings, FakeEngine()) as opened:
        await Gallery.get_pymongo_collection().update_one({}, {"$set": {"policy.quality": "off"}})
        yield opened


async def _foreign(runtime: Runtime) -> dict[str, str]:
    """The ids of a person, job, case, scan and proposal in a gallery of their own."""
    policy = runtime.starting_policy().model_copy(update={"quality": "off"})
    other = await runtime.create_gallery("other", policy)
    ann = await screened(runtime, await enrolled(runtime, "ann", gallery=other))
    twin = await screened(runtime, await enrolled(runtime, "ann", capture=1, gallery=other))
    (case,) = await Case.find({"newcomer_id": twin.id}).to_list()
    scanned = await scan.start(runtime, by_officer("dedup.scan"), other, None)
    proposal = IdentityProposal(
        gallery_id=other.id,
        identity_id=ann.id,
        identity_version=1,
        kind="erasure",
        proposed_by="officer-1",
        created_at=now(),
    )
    await proposal.insert()
    return {
        "identity": ann.id, "sample": ann.samples[0].id, "job": ann.screenings[0].job_id, "case": case.id,
        "scan": scanned.id, "proposal": proposal.id, "gallery": "other",
    }  # fmt: skip


OFFICERS = [
    ("GET", "/v1/identities/{identity}"),
    ("PATCH", "/v1/identities/{identity}"),
    ("DELETE", "/v1/identities/{identity}?reason=asked"),
    ("GET", "/v1/identities/{identity}/samples/{sample}/photo"),
    ("GET", "/v1/identities/{identity}/export"),
    ("POST", "/v1/identities/{identity}/revoke"),
    ("POST", "/v1/identities/{identity}/attempts:reset"),
    ("GET", "/v1/dedup/jobs/{job}"),
    ("GET", "/v1/dedup/jobs/{scan}"),
    ("GET", "/v1/dedup/cases/{case}"),
    ("POST", "/v1/dedup/cases/{case}/decision"),
    ("GET", "/v1/dedup/scans/{scan}"),
    ("GET", "/v1/dedup/scans/{scan}/pairs"),
    ("GET", "/v1/proposals/{proposal}"),
    ("GET", "/v1/galleries/{gallery}"),
    ("GET", "/v1/identities?gallery={gallery}"),
]
APPLICATIONS = [
    ("POST", "/v1/verifications {identity}"),
    ("POST", "/v1/challenges {identity}"),
    ("POST", "/v1/identifications {gallery}"),
]
BODIES: dict[str, dict[str, str]] = {
    "PATCH": {"full_name": "Ann"},
    "decision": {"decision": "distinct", "reason": "looked"},
    "revoke": {"reason": "lost"},
}


@pytest.mark.parametrize(("role", "routes"), [("officer", OFFICERS), ("relying_app", APPLICATIONS)])
async def test_a23_foreign_ids_cost_the_same_commands_as_unknown_ones(
    runtime: Runtime, commands: Commands, cheap_passwords: None, role: str, routes: list[tuple[str, str]]
) -> None:
    foreign = await _foreign(runtime)
    unknown = dict.fromkeys(foreign, NOBODY) | {"gallery": "nowhere"}
    app = app_on(runtime)
    async with http_of(app, await token_of(runtime, app, "bound", role, ("default",))) as http:

        async def asked(method: str, path: str, ids: dict[str, str]) -> tuple[int, list[tuple[str, str]]]:
            target, _, named = path.format(**ids).partition(" ")
            commands.seen.clear()
            if not named:
                body = BODIES.get(method) or BODIES.get(target.rpartition("/")[2])
                answer = await http.request(method, target, json=body)
            elif target == "/v1/challenges":
                answer = await http.post(target, json={"gallery": "default", "identity_id": named})
            else:
                field = "gallery" if "{gallery}" in path else "identity_id"
                answer = await http.post(target, data={field: named}, files={"photo": portrait("ann", capture=4)})
            return answer.status_code, list(commands.seen)

        for method, path in routes:
            ways = [await asked(method, path, ids) for ids in (unknown, foreign)]
            assert ways[0] == ways[1], (method, path)
            assert ways[0][0] == 404, (method, path)
            assert ways[0][1], "there was something to compare"
