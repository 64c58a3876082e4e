"""Every part killed in the middle of 200 enrolments: what was answered exists once, and gets its verdict."""

import asyncio
import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from app.devstack.demo import sample_people
from tests.support.stacks import RunningStack, running_stack

ENROLMENTS = 200
AT_ONCE = 8
#: Which part dies after so many answers.
KILLS = {40: "worker", 80: "api-1", 120: "redis", 160: "mongod"}
ANSWERED_WITHIN_SECONDS = 120
VERDICTS_WITHIN_SECONDS = 60


@dataclass(slots=True)
class Load:
    """Officers who try again until they get an answer. refused: what an attempt saw while a part was away."""

    http: httpx.AsyncClient
    stack: RunningStack
    headers: dict[str, str]
    answered: dict[str, str] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    seen: Counter[str] = field(default_factory=Counter)
    killed: list[str] = field(default_factory=list)

    async def enrol(self, gallery: str, reference: str, photo: bytes) -> None:
        """Enrol one person, however often it takes; the reference keeps it to one."""
        async with asyncio.timeout(ANSWERED_WITHIN_SECONDS):
            while True:
                try:
                    answer = await self.http.post(
                        "/v1/identities",
                        headers=self.headers,
                        data={"gallery": gallery, "external_ref": reference},
                        files={"photo": ("photo.jpg", photo, "image/jpeg")},
                    )
                except httpx.HTTPError as error:
                    self.seen[type(error).__name__] += 1
                else:
                    self.seen[str(answer.status_code)] += 1
                    assert answer.status_code in {202, 409, 503}, answer.text
                    if answer.status_code == 202:
                        self.answered[reference] = answer.json()["id"]
                        break
                    if answer.status_code == 409:  # an earlier attempt was committed, its answer lost
                        assert answer.json()["type"].endswith("external-ref-taken"), answer.text
                        self.known.add(reference)
                        break
                await asyncio.sleep(0.25)
        done = len(self.answered) + len(self.known)
        if done in KILLS and KILLS[done] not in self.killed:
            self.killed.append(KILLS[done])
            os.kill(self.stack.pid_of(KILLS[done]), signal.SIGKILL)


async def test_h74_h84_what_was_answered_survives_the_death_of_every_part(
    tmp_path: Path, stack_environment: dict[str, str]
) -> None:
    people = sample_people()
    options = ("--no-demo", "--api-workers", "2")
    with running_stack(tmp_path / "data", *options, environment=stack_environment) as stack:
        async with httpx.AsyncClient(base_url=stack.ready.url, timeout=30, trust_env=False) as http:
            officer, admin = await _bearer(http, stack, "officer"), await _bearer(http, stack, "admin")
            load = Load(http, stack, officer)
            jobs = []
            for number in range(ENROLMENTS):
                gallery = f"kill-{number // len(people)}"
                if number % len(people) == 0:
                    (await http.post("/v1/galleries", headers=admin, json={"name": gallery})).raise_for_status()
                jobs.append((gallery, f"K{number}", people[number % len(people)].photo))
            gate = asyncio.Semaphore(AT_ONCE)

            async def one(job: tuple[str, str, bytes]) -> None:
                async with gate:
                    await load.enrol(*job)

            await asyncio.gather(*(one(job) for job in jobs))
            assert load.killed == list(KILLS.values()), load.seen
            statuses = await _verdicts(http, officer)
            found = Counter([reference for reference, _, _ in statuses])
            assert found == Counter([reference for _, reference, _ in jobs]), "each person exists exactly once"
            ids = {reference: id_ for reference, id_, _ in statuses}
            assert {reference: ids[reference] for reference in load.answered} == load.answered
            assert Counter(status for _, _, status in statuses) == Counter({"active": ENROLMENTS}), load.seen


async def _verdicts(http: httpx.AsyncClient, officer: dict[str, str]) -> list[tuple[str, str, str]]:
    """Everybody's reference, id and status, once nobody is pending any more."""
    async with asyncio.timeout(VERDICTS_WITHIN_SECONDS):
        while True:
            everybody: list[tuple[str, str, str]] = []
            query = {"limit": "200"}
            while True:
                answer = await http.get("/v1/identities", headers=officer, params=query)
                answer.raise_for_status()
                page = answer.json()
                everybody += [(i["external_ref"], i["id"], i["status"]) for i in page["items"]]
                if page["next_cursor"] is None:
                    break
                query["cursor"] = page["next_cursor"]
            if all(status != "pending" for _, _, status in everybody):
                return everybody
            await asyncio.sleep(0.5)


async def _bearer(http: httpx.AsyncClient, stack: RunningStack, who: str) -> dict[str, str]:
    credentials = stack.ready.credentials()
    assert credentials is not None
    account = credentials.admin if who == "admin" else credentials.users.officer
    form = {"grant_type": "password", "username": account.username, "password": account.password}
    answer = await http.post("/v1/auth/token", data=form)
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}
