"""A gallery's index under load: searches, enrolments and erasures, while its generations are published and publishers killed.

    harness ── HTTP ──> two API processes ┐
       │                a worker          ├─ one mongod, one redis, one folder of generations
       └─ starts, kills ──> a publisher   ┘

Everything but the face model is the product. Each answer is kept and, at the end, judged by `tests.support.index_oracle`.
"""

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import httpx
import numpy as np

from app.config import Settings, random_secret
from app.documents.events import AuditEvent
from app.documents.galleries import DEFAULT_GALLERY, Gallery
from app.documents.leases import Lease
from app.domain.callers import Role
from app.domain.policy import thresholds_for
from app.leases import release_of
from app.runtime import Runtime, open_runtime
from app.use_cases.keep_users import UserFields, ensure_user
from storage.generations import BadGeneration
from tests.builders import portrait
from tests.fakes import FakeEngine, embedding_of
from tests.support.index_oracle import NEVER, Answer, Ledger, Oracle, Person
from tests.support.index_processes import PUBLISHES_WITHIN_SECONDS, Fleet, Running, running_fleet
from tests.support.population import populate

#: By hand, and so low that one stranger in 30,000 reaches it: most answers hold somebody who only just belongs there.
THRESHOLD: Final = 0.25
#: Nobody publishes but this harness.
TAIL_ROWS: Final = 10_000_000
SHADOW_EVERY: Final = 50
LIMIT: Final = 50
REQUEST_SECONDS: Final = 60.0
VERDICT_SECONDS: Final = 30
SETTLED_WITHIN_SECONDS: Final = 30.0
#: A publication's last steps come after its commit; kills are meant for those as well.
KILL_SPAN: Final = 1.15
#: What a generation's readers may still be doing after its commit.
SWAP_SECONDS: Final = 2.0
#: How many newcomers, and how many of those who left, are asked for again and again.
REMEMBERED: Final = 60
FAULTS_TOLD: Final = 50


#: When a publisher is killed: after this share of the usual time under the lease, or at a step that is over in no time: when
#: its folder is finished and the head does not name it yet, or when the head has just named it.
Strike = float | Literal["written", "committed"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, how large, how often.

    publications: that are begun at least, however long it takes. pause_*: a caller's mean time between an answer and the next
    request. expiry_share: of the killed publishers, how many have their lease expire; of the others it is given back at once,
    as a worker does for its child. planted_pairs: that a publisher measures its index with; None: as many as the product has
    it, which takes both cores some seconds.
    """

    seconds: float
    seed: int
    people: int = 20_000
    publish_seconds: float = 20.0
    publications: int = 1
    kill_share: float = 0.5
    expiry_share: float = 0.3
    planted_pairs: int | None = None
    searchers: int = 4
    pause_search: float = 0.1
    enrollers: int = 2
    pause_enrol: float = 0.4
    pause_erase: float = 0.8


@dataclass(frozen=True, slots=True)
class Latency:
    """Of some of the searches, in milliseconds; zeros when there were none."""

    count: int
    p50_ms: float
    p99_ms: float
    highest_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        """Figures of these."""
        if not seconds:
            return cls(0, 0.0, 0.0, 0.0)
        p50, p99, highest = np.quantile(np.array(seconds) * 1000, (0.5, 0.99, 1.0)).round(1).tolist()
        return cls(len(seconds), p50, p99, highest)


@dataclass(frozen=True, slots=True)
class Report:
    """What a run came to.

    publications: those that ended by themselves, the first and the last one too; kills: where each of them struck; faults: of
    whatever kind, the first of many.
    during_swap: searches at a door between a commit and the moment when that door had the generation in use; around_swap:
    within two seconds of a commit; without_swap: all others; publishing, idle: while a publisher ran, and while none did.
    """

    seconds: float
    searches: int
    named: int
    enrolments: int
    duplicates: int
    erasures: int
    publications: int
    kills: list[str]
    warnings: dict[str, int]
    during_swap: Latency
    around_swap: Latency
    without_swap: Latency
    publishing: Latency
    idle: Latency
    fault_count: int
    faults: list[str]

    @property
    def swap_ratio(self) -> float:
        """The p99 around a swap over the p99 without."""
        return self.around_swap.p99_ms / self.without_swap.p99_ms if self.without_swap.count else 0.0


def load_settings(mongodb_uri: str, redis_url: str, database: str, folder: Path) -> Settings:
    """Settings of a service whose data lies in a folder and in a database of its own."""
    return Settings(
        mongodb_uri=mongodb_uri, mongodb_database=database, mongodb_min_pool_size=0, redis_url=redis_url,
        queue_name=f"load:{database}", key_encryption_key=random_secret(), storage_path=folder / "photos",
        vector_db_path=folder / "index", index_cache_path=folder / "index-copies", index_tail_rows=TAIL_ROWS,
        index_shadow_every=SHADOW_EVERY, evidence_path=folder / "evidence",
    )  # fmt: skip


async def put_under_load(settings: Settings, logs: Path, plan: Plan) -> Report:
    """Fill the gallery `default`, start the processes, load them for as long as planned, and judge what they did."""
    async with (
        open_runtime(settings, FakeEngine()) as runtime,
        running_fleet(settings, logs, plan.planted_pairs) as fleet,
    ):
        policy: dict[str, object] = {"policy.quality": "off", "policy.identify_threshold": THRESHOLD}
        if plan.planted_pairs is not None:
            # What so few pairs can show, with 95% confidence, when all of them are found.
            policy["policy.recall_target"] = 1 - 4 / plan.planted_pairs
        await Gallery.get_pymongo_collection().update_one({"name": DEFAULT_GALLERY}, {"$set": policy})
        gallery = await _gallery()
        password = random_secret()
        await ensure_user(runtime, UserFields("olga", (Role.OFFICER,), None), password)
        labels = [f"citizen-{number}" for number in range(plan.people)]
        embeddings = np.array([embedding_of((label,), 0) for label in labels])
        ids = await populate(runtime, gallery.id, embeddings)
        publications = _Publications(runtime, fleet, plan, gallery.id)
        await publications.one()
        await fleet.start()
        async with _doors(fleet, password) as doors:
            load = _Load(plan, doors)
            for label, id_, embedding in zip(labels, ids, embeddings, strict=True):
                load.people[id_] = Person([embedding])
                load.living[id_] = label
            began = time.time()
            working = asyncio.create_task(load.run())
            try:
                await publications.run()
                await asyncio.sleep(SWAP_SECONDS)
            finally:
                load.is_over = True
                await working
            seconds = time.time() - began
            await publications.one()
            await publications.require_followed()
        faults = [*load.faults, *publications.faults, *_logged_faults(fleet)]
        anchor = thresholds_for((await _gallery()).policy, runtime.engine.card, plan.people).anchor
        faults += Oracle(load.people, await Ledger.read(gallery.id), anchor=anchor).faults(load.answers)
        swaps = await _swaps(fleet, since=began)
        fleet.require_alive()
        await fleet.stop()
    return _report(seconds, load, publications, fleet, swaps, faults)


@dataclass(slots=True)
class _Load:
    """Officers at two doors. living: label of everybody active, by id; busy: who is in somebody's hands at the moment."""

    plan: Plan
    doors: dict[str, httpx.AsyncClient]
    people: dict[str, Person] = field(default_factory=dict)
    living: dict[str, str] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)
    suspects: dict[str, tuple[str, str]] = field(default_factory=dict)
    newest: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    left: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    answers: list[Answer] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    captures: int = 1
    is_over: bool = False

    async def run(self) -> None:
        """Everybody at work until it is over."""
        callers: list[tuple[Callable[[random.Random], Awaitable[None]], float]] = [
            *[(self._search, self.plan.pause_search)] * self.plan.searchers,
            *[(self._enrol, self.plan.pause_enrol)] * self.plan.enrollers,
            (self._erase, self.plan.pause_erase),
        ]

        async def caller(number: int, work: Callable[[random.Random], Awaitable[None]], pause: float) -> None:
            chance = random.Random(f"{self.plan.seed}/{number}")  # noqa: S311 - a seeded load
            while not self.is_over:
                await asyncio.sleep(chance.expovariate(1 / pause))
                await work(chance)

        await asyncio.gather(*(caller(number, *who) for number, who in enumerate(callers)))

    async def _search(self, chance: random.Random) -> None:
        door, capture = chance.choice(sorted(self.doors)), self._next_capture()
        who = self._somebody(chance)
        photo = portrait(*who, capture=capture)
        began = time.time()
        answer = await self._ask(door, "POST", "/v1/identifications", data={"limit": LIMIT}, files=_parts([photo]))
        if answer is None:
            return
        page = answer.json()
        self.answers.append(
            Answer(
                door, embedding_of(who, capture), began, time.time(), page["threshold"], page["as_of_seq"],
                tuple((c["identity_id"], c["score"]) for c in page["candidates"]), LIMIT,
            )
        )  # fmt: skip

    def _somebody(self, chance: random.Random) -> tuple[str, ...]:
        """Whose photo is shown: one person's or several people's mixed, often somebody's who has just come or gone."""
        what = chance.random()
        if what < 0.1:
            return (f"nobody-{self.captures}",)
        if what < 0.4 and self.newest:
            return (chance.choice(self.newest),)
        if what < 0.55 and self.left:
            return (chance.choice(self.left),)
        if what < 0.7 and self.busy:
            known = [self.living[id_] for id_ in sorted(self.busy) if id_ in self.living]
            if known:
                return (chance.choice(known),)
        # A mixture of ten lies about the threshold from each of them.
        several = chance.choice((1, 1, 2, 5, 8, 10, 12))
        return tuple(f"citizen-{chance.randrange(self.plan.people)}" for _ in range(several))

    async def _enrol(self, chance: random.Random) -> None:
        """Somebody new by one photo or two, or somebody once more who is active already."""
        what = chance.random()
        original = self._hold_somebody(chance, unsuspected=True) if what < 0.15 else None
        label = f"newcomer-{self._next_capture()}" if original is None else self.living[original]
        captures = [self._next_capture() for _ in range(2 if what > 0.85 else 1)]
        photos = [portrait(label, capture=capture) for capture in captures]
        self.newest.append(label)
        door, asked = chance.choice(sorted(self.doors)), time.time()
        try:
            answer = await self._ask(
                door, "POST", "/v1/identities", params={"wait": VERDICT_SECONDS}, files=_parts(photos), expected=201
            )
            if answer is None:
                return
            told, page = time.time(), answer.json()
            person = Person([embedding_of((label,), capture) for capture in captures], asked=asked, told=told)
            self.people[page["id"]] = person
            if original is None:
                person.maybe_active, person.active = asked, told
                self.living[page["id"]] = label
                self._count("enrolments", page, "active")
            else:
                person.maybe_active = person.active = NEVER
                self.suspects[original] = (page["id"], label)
                self._count("duplicates", page, "suspected_duplicate")
        finally:
            if original is not None:
                self.busy.discard(original)

    async def _erase(self, chance: random.Random) -> None:
        """Somebody leaves; whoever was suspected only for being like them becomes active then."""
        suspected = [id_ for id_ in sorted(self.suspects) if id_ not in self.busy]
        chosen = chance.choice(suspected) if suspected and chance.random() < 0.25 else self._hold_somebody(chance)
        self.busy.add(chosen)
        person, door = self.people[chosen], chance.choice(sorted(self.doors))
        suspect_id, label = self.suspects.pop(chosen, ("", ""))
        person.leaving = time.time()
        try:
            if suspect_id:
                self.people[suspect_id].maybe_active = person.leaving
            if await self._ask(door, "DELETE", f"/v1/identities/{chosen}", params={"reason": "load"}) is None:
                return
            person.gone = time.time()
            self.counted["erasures"] += 1
            self.left.append(self.living.pop(chosen))
            if suspect_id:
                await self._await_activation(door, suspect_id, label)
        finally:
            self.busy.discard(chosen)

    async def _await_activation(self, door: str, suspect_id: str, label: str) -> None:
        deadline = time.monotonic() + VERDICT_SECONDS
        while time.monotonic() < deadline:
            answer = await self._ask(door, "GET", f"/v1/identities/{suspect_id}")
            if answer is None:
                return
            if answer.json()["status"] == "active":
                self.people[suspect_id].active = time.time()
                self.living[suspect_id] = label
                return
            await asyncio.sleep(0.1)
        self.faults.append(f"{suspect_id} was not screened again after its look-alike had left")

    def _hold_somebody(self, chance: random.Random, *, unsuspected: bool = False) -> str:
        """Somebody active whom nobody else is at work on; held until it is discarded from `busy`."""
        ids = list(self.living)
        while True:
            # Half of them newcomers: those are only in the tail.
            id_ = chance.choice(ids[-REMEMBERED:] if chance.random() < 0.5 else ids)
            if id_ not in self.busy and not (unsuspected and id_ in self.suspects):
                self.busy.add(id_)
                return id_

    async def _ask(
        self,
        door: str,
        method: str,
        path: str,
        *,
        expected: int = 200,
        **more: Any,  # noqa: ANN401 - httpx's own
    ) -> httpx.Response | None:
        """The answer; None, and a fault is noted, when it is not the one that the service owes."""
        try:
            answer = await self.doors[door].request(method, path, **more)
        except httpx.HTTPError as error:
            self.faults.append(f"{door}, {time.time():.3f}: {method} {path} failed with {type(error).__name__}")
            return None
        if answer.status_code != expected:
            self.faults.append(
                f"{door}, {time.time():.3f}: {method} {path} answered {answer.status_code}: {answer.text[:300]}"
            )
            return None
        return answer

    def _count(self, what: str, page: dict[str, Any], status: str) -> None:
        self.counted[what] += 1
        if page["status"] != status:
            self.faults.append(f"{page['id']} is {page['status']} where the screening should have made it {status}")

    def _next_capture(self) -> int:
        self.captures += 1
        return self.captures


@dataclass(slots=True)
class _Publications:
    """One publisher after the other, some of them killed. ran: when each began and ended."""

    runtime: Runtime
    fleet: Fleet
    plan: Plan
    gallery_id: str
    done: int = 0
    kills: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    ran: list[tuple[float, float]] = field(default_factory=list)
    usual_seconds: float = 1.0

    async def run(self) -> None:
        """In every period one publication, killed or not as chance has it, until the time is over."""
        chance = random.Random(f"{self.plan.seed}/publications")  # noqa: S311 - a seeded load
        deadline, number = time.monotonic() + self.plan.seconds, 0
        next_at = time.monotonic() + self.plan.publish_seconds
        while next_at < deadline or number < self.plan.publications:
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            self.fleet.require_alive()
            moment, is_killed = chance.uniform(0, KILL_SPAN), chance.random() < self.plan.kill_share
            strike: Strike = chance.choice((moment, moment, "written", "committed"))
            await self.one(strike if is_killed else None, expires=chance.random() < self.plan.expiry_share)
            number, next_at = number + 1, max(time.monotonic(), next_at + self.plan.publish_seconds)

    async def one(self, strike: Strike | None = None, *, expires: bool = False) -> None:
        """Start a publisher, kill it when it is time if it is to be killed, and look at what is left.

        expires: nobody gives back a killed publisher's lease.
        """
        holder = f"load:{self.done}:{time.time_ns()}"
        before, began = await _gallery(), time.time()
        publisher = await self.fleet.publisher(self.gallery_id, holder)
        async with asyncio.timeout(PUBLISHES_WITHIN_SECONDS):
            await self._await_lease(publisher, holder, before.publishing)
            since = time.monotonic()
            if strike is not None:
                while publisher.process.returncode is None and not await self._is_time(strike, since, before):
                    await asyncio.sleep(0.005)
                if publisher.process.returncode is None:
                    publisher.kill()
                    await publisher.process.wait()
                    await self._note_kill(strike, before, since)
            status = await publisher.process.wait()
            took = time.monotonic() - since
        self.ran.append((began, time.time()))
        head = await _gallery()
        if status == 0:
            self.done += 1
            self.usual_seconds = took
            self._require_tidy(head)
        elif status > 0:
            self.faults.append(f"a publisher gave up: {publisher.log.read_text()[-1000:]}")
        elif not expires:
            await release_of(head.publishing, holder)
        else:
            while await Lease.alive(head.publishing):
                await asyncio.sleep(0.1)
        await self._require_whole(head)

    async def _await_lease(self, publisher: Running, holder: str, name: str) -> None:
        """Return when the publisher has begun its work, or has ended without."""
        while publisher.process.returncode is None:
            lease = await Lease.get(name)
            if lease is not None and lease.holder == holder:
                return
            await asyncio.sleep(0.01)

    async def _is_time(self, strike: Strike, since: float, before: Gallery) -> bool:
        if isinstance(strike, float):
            return time.monotonic() - since >= strike * self.usual_seconds
        # The folder comes first, and looking for that costs the servers nothing.
        is_written = self._unnamed(before) != []
        return is_written and (strike == "written" or (await _gallery()).published != before.published)

    async def _note_kill(self, strike: Strike, before: Gallery, since: float) -> None:
        """Where it struck, by what is on the share and in the head."""
        head, folders = await _gallery(), [entry for entry in self._entries() if entry.name.endswith(".tmp")]
        if head.published != before.published:
            where = "after the commit"
        elif self._unnamed(before):
            where = "between the finished folder and the commit"
        elif folders:
            where = (
                f"with {sorted(file.name for folder in folders for file in folder.iterdir())} in the unfinished folder"
            )
        else:
            where = "before the first file"
        aim = f"aimed at {strike}" if isinstance(strike, str) else f"at {strike:.2f} of the usual time"
        self.kills.append(f"{where}; {aim}, after {time.monotonic() - since:.2f} s")

    def _unnamed(self, head: Gallery) -> list[str]:
        """Finished folders that are newer than what the head names."""
        newest = 0 if head.published is None else head.published.number
        finished = [entry.name for entry in self._entries() if not entry.name.startswith(".")]
        return [name for name in finished if int(name.rpartition("-")[2]) > newest]

    def _entries(self) -> list[Path]:
        folder = self.runtime.settings.vector_db_path / self.gallery_id
        return list(folder.iterdir()) if folder.exists() else []

    async def _require_whole(self, head: Gallery) -> None:
        """What the head names is on the share, byte for byte."""
        assert head.published is not None
        number, digest = head.published.number, head.published.digest
        try:
            await asyncio.to_thread(self.runtime.search.store.verify, head.id, head.epoch, number, digest)
        except BadGeneration as fault:
            self.faults.append(f"generation {number} is the head's, and bad: {fault}")
        if head.fault is not None:
            self.faults.append(f"generation {head.fault.number} was refused: {head.fault.reason}")

    def _require_tidy(self, head: Gallery) -> None:
        """After a publication nothing lies on the share but what the head names: no half-written folder, no former one."""
        named = {f"{head.epoch}-{g.number}" for g in (head.published, head.previous) if g is not None}
        found = {entry.name for entry in self._entries()}
        if found != named:
            self.faults.append(f"on the share lie {sorted(found)}, and the head names {sorted(named)}")

    async def require_followed(self) -> None:
        """Soon all processes have the newest generation in use, and this host keeps no copy of another one."""
        head = await _gallery()
        assert head.published is not None
        copies = self.runtime.settings.index_cache_path / head.id
        only = {f"{head.epoch}-{head.published.number}"}
        behind, kept, deadline = set(self.fleet.parts), set[str](), time.monotonic() + SETTLED_WITHIN_SECONDS
        while (behind or kept != only) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            for name, part in self.fleet.parts.items():
                if any(e.fields["generation"] == head.published.number for e in part.events("index_in_use")):
                    behind.discard(name)
            kept = {entry.name for entry in copies.iterdir() if entry.is_dir()}
        if behind:
            self.faults.append(f"{sorted(behind)} never had generation {head.published.number} in use")
        if kept != only:
            self.faults.append(f"this host keeps copies {sorted(kept)}, where {sorted(only)} is in use")


@asynccontextmanager
async def _doors(fleet: Fleet, password: str) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    """A client for each door, with an officer's token."""
    doors = {
        n: httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, trust_env=False) for n, url in fleet.urls.items()
    }
    try:
        for door in doors.values():
            form = {"grant_type": "password", "username": "olga", "password": password}
            answer = await door.post("/v1/auth/token", data=form)
            answer.raise_for_status()
            door.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
            # The first of anything is slow, and nothing that is measured here.
            warm = await door.post("/v1/identifications", files=_parts([portrait("nobody")]))
            warm.raise_for_status()
        yield doors
    finally:
        await asyncio.gather(*(door.aclose() for door in doors.values()))


async def _gallery() -> Gallery:
    gallery = await Gallery.named(DEFAULT_GALLERY)
    assert gallery is not None
    return gallery


def _parts(photos: list[bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("photo", ("photo.png", photo, "image/png")) for photo in photos]


def _logged_faults(fleet: Fleet) -> list[str]:
    """What the processes themselves called an error: a refused generation, a missed vector, a failed request.

    The limiter may be left alone: a busy machine may exceed its short time, and no answer needs it.
    """
    bad = [
        (p.name, e)
        for p in fleet.parts.values()
        for e in p.events()
        if e.level in {"error", "critical"} and e.fields.get("dependency") != "limiter"
    ]
    return [f"{name} logged {event.fields}" for name, event in bad]


async def _swaps(fleet: Fleet, since: float) -> dict[str, list[tuple[float, float]]]:
    """For each door, from when to when it went over to each generation that was committed since."""
    events = await AuditEvent.find({"action": "index.publish", "outcome": "success"}).to_list()
    commits = {e.detail["generation"]: e.time.timestamp() for e in events if e.time.timestamp() >= since}
    return {
        door: [
            (commits[event.fields["generation"]], event.time)
            for event in fleet.parts[door].events("index_in_use")
            if event.fields["generation"] in commits
        ]
        for door in fleet.urls
    }


def _report(
    seconds: float,
    load: _Load,
    publications: _Publications,
    fleet: Fleet,
    swaps: dict[str, list[tuple[float, float]]],
    faults: list[str],
) -> Report:
    around = {door: [(start, start + SWAP_SECONDS) for start, _ in spans] for door, spans in swaps.items()}
    ran = dict.fromkeys(swaps, publications.ran)

    def took(spans: dict[str, list[tuple[float, float]]], *, inside: bool) -> Latency:
        return Latency.of([
            answer.ended - answer.began
            for answer in load.answers
            if any(start <= answer.ended and answer.began <= end for start, end in spans[answer.door]) is inside
        ])  # fmt: skip

    warnings = Counter(
        f"{part.name}: {event.name}"
        for part in fleet.parts.values()
        for event in part.events()
        if event.level == "warning"
    )
    return Report(
        seconds=round(seconds, 1), searches=len(load.answers), named=sum(len(a.candidates) for a in load.answers),
        enrolments=load.counted["enrolments"], duplicates=load.counted["duplicates"], erasures=load.counted["erasures"],
        publications=publications.done, kills=publications.kills, warnings=dict(warnings),
        during_swap=took(swaps, inside=True), around_swap=took(around, inside=True), without_swap=took(around, inside=False),
        publishing=took(ran, inside=True), idle=took(ran, inside=False),
        fault_count=len(faults), faults=faults[:FAULTS_TOLD],
    )  # fmt: skip
