"""Officers' desks under torture: what each asked for, what it was told, and whether MongoDB agrees with that in the end.

A desk works on a gallery of its own, one deed after another, each under its own idempotency key. A deed without an answer is in
doubt: it is asked for again, with the same key, until it has one. `broken_promises` then compares the desk's book with the store.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Any, Protocol

import httpx

from app.documents.cases import Case, Pair
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Identity
from app.documents.tree import AuditTree, TreeHead
from app.domain.log_export import canonical
from app.domain.merkle import EMPTY_ROOT, Growth, leaf_hash
from app.runtime import Runtime
from storage.photos import PhotoNotFound
from tests.builders import portrait

SETTLES_WITHIN_SECONDS = 90.0
#: What a desk does, and how often; screening is the workers', except where there are none.
DEEDS = {
    "enrol": 38,
    "enrol_two": 8,
    "decide": 16,
    "verify": 14,
    "erase": 10,
    "stand": 5,
    "add_sample": 6,
    "identify": 3,
}
#: Answers after which a caller tries again: away, or the first try is still being worked on.
NOT_YET = {429, 502, 503, 504}


class Ask(Protocol):
    """One request under one idempotency key, tried again for a while; None: no answer came."""

    async def __call__(
        self,
        method: str,
        path: str,
        *,
        key: str,
        seconds: float,
        **content: Any,  # noqa: ANN401 - httpx's
    ) -> httpx.Response | None:
        """The final answer."""


@dataclass(slots=True)
class Person:
    """Somebody whom a desk wanted to enrol. id: as it was told."""

    reference: str
    face: str
    id: str | None = None
    is_erased: bool = False


@dataclass(slots=True)
class Deed:
    """One request, and what is to be done with its answer."""

    kind: str
    method: str
    path: str
    key: str
    content: dict[str, Any]
    told: Callable[[httpx.Response], None]


@dataclass(slots=True)
class Desk:
    """One officer at work.

    faces: how many there are in the gallery's world; the fewer, the more look-alikes. deeds: what is done how often.
    """

    gallery: str
    dice: Random
    ask: Ask
    faces: int = 6
    deeds: Mapping[str, int] = field(default_factory=lambda: DEEDS)
    people: list[Person] = field(default_factory=list)
    doubtful: list[Deed] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    decided: set[str] = field(default_factory=set)
    verified: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    _count: int = 0

    async def work(self) -> None:
        """One deed, chosen by the dice; an enrolment while there is nobody to do anything else with."""
        kind = self.dice.choices(list(self.deeds), list(self.deeds.values()))[0]
        if kind == "enrol_two":
            face = self._face()
            await asyncio.gather(self._do(self._enrolment(face)), self._do(self._enrolment(face)))
            return
        deed = None if kind == "enrol" else await self._deed(kind)
        await self._do(deed or self._enrolment(self._face()))

    async def settle(self) -> None:
        """Ask for what is in doubt until every deed has its answer."""
        async with asyncio.timeout(SETTLES_WITHIN_SECONDS):
            while self.doubtful:
                waiting, self.doubtful = self.doubtful, []
                for deed in waiting:
                    await self._do(deed)

    async def _do(self, deed: Deed) -> None:
        answer = await self.ask(deed.method, deed.path, key=deed.key, **deed.content)
        if answer is None:
            self.doubtful.append(deed)
            return
        if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR or answer.status_code == httpx.codes.UNAUTHORIZED:
            self.broken.append(f"{deed.kind} was answered {answer.status_code}: {answer.text[:300]}")
            return
        self.answered[deed.kind] += 1
        deed.told(answer)

    async def _deed(self, kind: str) -> Deed | None:
        known = [p for p in self.people if p.id is not None and not p.is_erased]
        if not known:
            return None
        person = self.dice.choice(known)
        if kind == "decide":
            return await self._decision()
        if kind == "verify":
            return self._verification(person)
        if kind == "erase":
            return self._erasure(person)
        return self._other(kind, person)

    def _other(self, kind: str, person: Person) -> Deed:
        """A deed of which only its traces in the store are checked."""
        if kind == "stand":
            verb = self.dice.choice(["revoke", "reinstate"])
            return self._new(verb, "POST", f"/v1/identities/{person.id}/{verb}", _heard, json={"reason": "torture"})
        photo = self._photo(person.face)
        if kind == "add_sample":
            return self._new(kind, "POST", f"/v1/identities/{person.id}/samples", _heard, files=photo)
        return self._new(kind, "POST", "/v1/identifications", _heard, data={"gallery": self.gallery}, files=photo)

    def _enrolment(self, face: str) -> Deed:
        self._count += 1
        person = Person(f"{self.gallery}-{self._count}", face)
        self.people.append(person)

        def told(answer: httpx.Response) -> None:
            if answer.status_code != httpx.codes.ACCEPTED:
                self.broken.append(f"enrolment of {person.reference}: {answer.status_code} {answer.text[:300]}")
            else:
                person.id = answer.json()["id"]

        fields = {"gallery": self.gallery, "external_ref": person.reference}
        return self._new("enrol", "POST", "/v1/identities", told, data=fields, files=self._photo(face))

    async def _decision(self) -> Deed | None:
        query = {"gallery": self.gallery, "state": "open", "limit": "20"}
        page = await self.ask("GET", "/v1/dedup/cases", key="", params=query)
        if page is None or page.status_code != httpx.codes.OK or not page.json()["items"]:
            return None
        case = self.dice.choice(page.json()["items"])
        body: dict[str, Any] = {"decision": "distinct", "reason": "looked"}
        if self.dice.random() < 0.5:
            candidate = self.dice.choice(case["candidates"])["identity"]
            # One of them may be on its way out of the world.
            if candidate is not None:
                body = {"decision": "duplicate", "identity_id": candidate["id"], "reason": "looked"}
                if self.dice.random() < 0.3:
                    body["keep"] = case["newcomer"]["id"]

        def told(answer: httpx.Response) -> None:
            if answer.status_code == httpx.codes.OK:
                self.decided.add(case["id"])

        return self._new("decide", "POST", f"/v1/dedup/cases/{case['id']}/decision", told, json=body)

    def _verification(self, person: Person) -> Deed:
        def told(answer: httpx.Response) -> None:
            if person.is_erased and answer.status_code == httpx.codes.NOT_FOUND:
                return  # it was in doubt, and is asked for again after the erasure
            if answer.status_code != httpx.codes.OK:
                self.broken.append(f"verification of {person.reference}: {answer.status_code} {answer.text[:300]}")
            else:
                self.verified.append(answer.json()["decision_id"])

        fields = {"identity_id": str(person.id)}
        return self._new("verify", "POST", "/v1/verifications", told, data=fields, files=self._photo(person.face))

    def _erasure(self, person: Person) -> Deed:
        # Whether or not the answer comes, nothing else is asked about them.
        person.is_erased = True

        def told(answer: httpx.Response) -> None:
            if answer.status_code != httpx.codes.OK:
                self.broken.append(f"erasure of {person.reference}: {answer.status_code} {answer.text[:300]}")

        return self._new("erase", "DELETE", f"/v1/identities/{person.id}", told, params={"reason": "torture"})

    def _new(
        self,
        kind: str,
        method: str,
        path: str,
        told: Callable[[httpx.Response], None],
        **content: Any,  # noqa: ANN401 - httpx's
    ) -> Deed:
        self._count += 1
        return Deed(kind, method, path, f"{self.gallery}-{self._count}", content, told)

    def _face(self) -> str:
        return f"{self.gallery}-face-{self.dice.randrange(self.faces)}"

    def _photo(self, face: str) -> dict[str, tuple[str, bytes, str]]:
        self._count += 1
        return {"photo": ("photo.png", portrait(face, capture=self._count), "image/png")}


def _heard(_: httpx.Response) -> None:
    """Whatever it is, it is an answer."""


async def broken_promises(runtime: Runtime, desk: Desk) -> list[str]:
    """What does not hold, once nothing is in doubt and every verdict is there; an empty list is what is hoped for."""
    broken = list(desk.broken)
    gallery = await Gallery.named(desk.gallery)
    assert gallery is not None
    everybody = await Identity.find({"gallery_id": gallery.id}).to_list()
    living = {i.id: i for i in everybody if i.status != "erased"}
    events = await AuditEvent.find({"gallery": gallery.name, "outcome": "success"}).to_list()
    cases = await Case.find({"gallery_id": gallery.id}).to_list()
    broken += _people(desk, everybody)
    broken += await _active_look_alikes(desk, living)
    broken += _events_of_people(desk, everybody, living, events)
    broken += _events_of_cases(living, cases, events)
    broken += await _numbers(gallery, living)
    for identity in living.values():
        for sample in identity.samples:
            try:
                await runtime.photos.get(sample.photo_key)
            except PhotoNotFound:
                broken.append(f"the photo of {identity.id} is lost")
    return broken


def _people(desk: Desk, everybody: list[Identity]) -> list[str]:
    """Who was enrolled exists exactly once; who was erased is gone; nobody else is there."""
    told = {p.id: p for p in desk.people}
    stored = {i.id: i for i in everybody}
    broken = [f"{p.reference} was enrolled as {p.id}, and is lost" for p in desk.people if p.id not in stored]
    broken += [f"{i} exists, and nobody was told of it" for i in stored if i not in told]
    if len(told) != len(desk.people):
        broken.append("two enrolments were answered with one id")
    for identity in everybody:
        person = told.get(identity.id)
        if person is not None and person.is_erased != (identity.status == "erased"):
            broken.append(f"{person.reference}: erased is {person.is_erased}, its status {identity.status}")
        if identity.status in ("pending", "failed"):
            broken.append(f"{identity.id} has no verdict: {identity.status}")
    return broken


async def _active_look_alikes(desk: Desk, living: dict[str, Identity]) -> list[str]:
    """Of two that look alike and that nobody called distinct, at most one is active."""
    faces = {p.id: p.face for p in desk.people}
    active = [i for i, identity in sorted(living.items()) if identity.status == "active"]
    alike = [(a, b) for a, b in combinations(active, 2) if faces.get(a) == faces.get(b)]
    pairs = {p.id: p.decision for p in await Pair.find({"_id": {"$in": [f"{a}:{b}" for a, b in alike]}}).to_list()}
    return [f"{a} and {b} are both active, undecided" for a, b in alike if pairs.get(f"{a}:{b}") != "distinct"]


def _events_of_people(
    desk: Desk, everybody: list[Identity], living: dict[str, Identity], events: list[AuditEvent]
) -> list[str]:
    """No action without its event, and no event without its action."""

    def subjects(action: str) -> Counter[str | None]:
        return Counter(event.subject.id for event in events if event.action == action)

    broken = []
    if subjects("identity.enrol") != Counter([i.id for i in everybody]):
        broken.append(f"enrolments and their events differ: {subjects('identity.enrol')}")
    erased = Counter([i.id for i in everybody if i.status == "erased"])
    if subjects("identity.erase") != erased:
        broken.append(f"erasures and their events differ: {subjects('identity.erase')} for {erased}")
    samples, revoked, back = subjects("sample.add"), subjects("identity.revoke"), subjects("identity.reinstate")
    for identity in living.values():
        if samples[identity.id] != len(identity.samples) - 1 or len(identity.screenings) != len(identity.samples):
            broken.append(f"{identity.id} has {len(identity.samples)} samples and {samples[identity.id]} events")
        out = revoked[identity.id] - back[identity.id]
        if identity.status in ("active", "revoked") and out != (identity.status == "revoked"):
            broken.append(f"{identity.id} is {identity.status} after {out} revocations")
    ids = {event.id for event in events if event.action == "face.verify"}
    return broken + [f"verification {decision} has no event" for decision in desk.verified if decision not in ids]


def _events_of_cases(living: dict[str, Identity], cases: list[Case], events: list[AuditEvent]) -> list[str]:
    """A verdict has one event, a case came of one verdict, and a decision ended it."""
    broken: list[str] = []
    verdicts = [event for event in events if event.action == "dedup.verdict"]
    of_case = Counter(event.detail["case_id"] for event in verdicts if event.detail["case_id"] is not None)
    if of_case != Counter([case.id for case in cases]):
        broken.append(f"cases and the verdicts that opened them differ: {of_case} for {[c.id for c in cases]}")
    unique = Counter(event.detail["job_id"] for event in verdicts if event.detail["verdict"] == "unique")
    for identity in living.values():
        broken += [
            f"{identity.id}: verdict {screening.verdict}, and {unique[screening.job_id]} events say unique"
            for screening in identity.screenings
            if unique[screening.job_id] != (screening.verdict == "unique")
        ]
    ended = Counter(e.subject.id for e in events if e.action == "dedup.decide" and e.detail["decided"])
    decided = Counter([case.id for case in cases if case.state == "decided" and case.decided_by is not None])
    if ended != decided:
        broken.append(f"decisions and their events differ: {ended} for {decided}")
    return broken


async def _numbers(gallery: Gallery, living: dict[str, Identity]) -> list[str]:
    """The gallery's changes are numbered without a hole, and its counts are right."""
    rows = await GalleryChange.find({"gallery_id": gallery.id}).sort("seq").to_list()
    broken = []
    if [row.seq for row in rows] != list(range(1, gallery.seq + 1)):
        broken.append(f"the numbers of {gallery.name} have holes")
    counted = (len(living), sum(len(i.samples) for i in living.values()))
    if (gallery.identities, gallery.samples) != counted:
        broken.append(f"{gallery.name} counts {gallery.identities}, {gallery.samples}; there are {counted}")
    return broken


async def broken_log(runtime: Runtime) -> list[str]:
    """What does not hold of the audit log as a whole: its numbers, its tree, and the heads that were signed and brought out.

    As of one moment: a worker may be numbering meanwhile.
    """
    async with runtime.mongo.start_session(snapshot=True) as session:
        events = await AuditEvent.find({"seq": {"$ne": None}}, session=session).sort("seq").to_list()
        heads = await TreeHead.find_all(session=session).to_list()
        tree = await AuditTree.current(session)
    broken = []
    if [event.seq for event in events] != list(range(len(events))):
        broken.append("the events' numbers have holes")
    growth, roots = Growth(), {0: EMPTY_ROOT.hex()}
    sizes = {head.size for head in heads}
    for number, event in enumerate(events):
        hash_ = leaf_hash(canonical(event.leaf(number)))
        if hash_.hex() != event.leaf_hash:
            broken.append(f"event {number} is not what its leaf says")
        growth.add(hash_)
        if growth.size in sizes:
            roots[growth.size] = growth.root.hex()
    if (tree.size, tree.peaks) != (growth.size, growth.peaks):
        broken.append(f"the tree of {tree.size} is not that of the {growth.size} events")
    broken += [f"the head of {h.size} is not over these events" for h in heads if roots.get(h.size) != h.root_hash]
    kept = set(await runtime.evidence.names("heads"))
    outside = [h for h in heads if h.evidence[0] in kept]
    for head in heads:
        if head.is_superseded and not any(h.key_id == head.key_id and h.size >= head.size for h in outside):
            broken.append(f"no head outside proves the head of {head.size}")
        if head.is_delivered and not head.is_superseded and head.evidence[0] not in kept:
            broken.append(f"the head of {head.size} is not outside")
    return broken
