"""An identity's states: every sequence of actions ends as the contract's table says, checked against a small model of it."""

import asyncio
import os
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, ParamSpec, TypeVar

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.documents.cases import Case
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.domain.attributes import GivenAttributes
from app.domain.faces import Embedding
from app.domain.policy import Decision, Status, Thresholds, margin_of, thresholds_for
from app.errors import Conflict, DifferentPerson, NotFound, NotReady, Problem, UndecidedCandidates
from app.runtime import Runtime
from app.use_cases import enrol, erase, screen, standing
from app.use_cases.adjudicate import Judgement, adjudicate
from app.use_cases.identify import identify
from app.use_cases.remove_sample import remove_sample
from tests.builders import by_officer, portrait
from tests.fakes import embedding_of

P = ParamSpec("P")
T = TypeVar("T")

#: `make fuzz` asks for more.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))
STEPS = 40
PATIENCE_SECONDS = 60
#: Two people, one who looks like both, and one who looks more like the first.
PEOPLE = (("ann",), ("bob",), ("ann", "bob"), ("ann", "ann", "bob"))
#: Whether a screening comes at once, as it mostly does.
MOSTLY = st.sampled_from([True, True, False])
#: Scores nearer to a threshold than this are left out: float16 may move them over it.
CLOSE = 0.01


@dataclass
class Sample:
    """A photo as the model knows it. is_new: it waits for its screening, or for a decision about it.

    is_gone: it was removed. It stays in the list, so that the other samples keep their indexes.
    """

    seq: int
    vector: Embedding
    id: str
    is_new: bool = True
    is_gone: bool = False


@dataclass
class Person:
    """An identity as the model knows it. due: the samples whose screening is asked for, by their index."""

    status: Status
    samples: list[Sample]
    due: list[int] = field(default_factory=lambda: [0])

    @property
    def references(self) -> list[Embedding]:
        return [sample.vector for sample in self.samples if not sample.is_new and not sample.is_gone]

    @property
    def anchor(self) -> Embedding:
        """The enrolment photo. In this model, each person is enrolled by one photo."""
        return self.samples[0].vector


@dataclass
class OpenCase:
    """A case as the model knows it: the newcomer, which of its samples, and what was decided about each candidate."""

    newcomer: str
    sample: int
    candidates: dict[str, Decision | None]
    scores: dict[str, float]


@dataclass
class Known:
    """A recorded pair as the model knows it: its best score, and a decision with the score that it was made on."""

    score: float
    decision: Decision | None = None
    made_on: float = -1.0


#: Candidates, and what was decided about each.
Decisions = Collection[tuple[str, Decision | None]]


class Model:
    """The contract's table of states, the rule that makes anybody active, and nothing of how either is done."""

    def __init__(self, limits: Thresholds, margin: float) -> None:
        self.threshold = limits.dedup
        self.limits = limits
        self.margin = margin
        self.people: dict[str, Person] = {}
        self.pairs: dict[frozenset[str], Known] = {}
        self.cases: dict[str, OpenCase] = {}
        self.seq = 0

    def alike(self, one: Embedding, other: Embedding) -> bool:
        return float(one @ other) >= self.threshold

    def candidates(self, identity_id: str, index: int) -> dict[str, float]:
        """The people whom the sample looks like, with scores, among earlier samples that are not erased or removed."""
        mine = self.people[identity_id].samples[index]
        found = {}
        for other, person in self.people.items():
            earlier = [s.vector for s in person.samples if s.seq < mine.seq and not s.is_gone]
            if other != identity_id and any(self.alike(one, mine.vector) for one in earlier):
                found[other] = max(float(one @ mine.vector) for one in earlier)
        return found

    def is_distinct(self, *two: str) -> bool:
        """Whether an officer called the two distinct, on a score that is not far below the best one seen."""
        known = self.pairs.get(frozenset(two))
        return known is not None and known.decision == "distinct" and known.score <= known.made_on + self.margin

    def in_the_way(self, identity_id: str) -> set[str]:
        """Recorded look-alikes that are active and that nobody called distinct."""
        others = {other for pair in self.pairs if identity_id in pair for other in pair - {identity_id}}
        return {o for o in others if not self.is_distinct(identity_id, o) and self.people[o].status == "active"}

    def score_with(self, person: Person, vector: Embedding) -> float:
        """The score that counts: with the best photo, if the score with the enrolment photo reaches the anchor's threshold."""
        best = max(float(one @ vector) for one in person.references)
        anchor = float(person.anchor @ vector)
        return best if anchor >= self.limits.anchor else min(best, anchor)

    def waits(self, candidates: Decisions) -> bool:
        """Whether somebody is still to be decided about."""
        return any(
            decision is None and other in self.people and self.people[other].status != "duplicate"
            for other, decision in candidates
        )

    def may_activate(self, identity_id: str, candidates: Decisions) -> bool:
        return not self.waits(candidates) and not self.in_the_way(identity_id)

    def screened(self, identity_id: str) -> tuple[int, str] | None:
        """The sample whose screening is due, and its verdict; None when there is nothing to do."""
        person = self.people[identity_id]
        is_newcomer = person.status == "pending"
        ripe = {i for i in person.due if (is_newcomer if i == 0 else person.status == "active")}
        if not ripe:
            return None
        index = min(ripe)
        found = self.candidates(identity_id, index)
        for other, score in found.items():
            known = self.pairs.setdefault(frozenset((identity_id, other)), Known(score))
            known.score = max(known.score, score)
        undecided = {other for other in found if not self.is_distinct(identity_id, other)}
        if is_newcomer and not undecided:
            undecided = self.in_the_way(identity_id)
        person.due.remove(index)
        if undecided:
            scores = {other: found.get(other, self.pairs[frozenset((identity_id, other))].score) for other in undecided}
            self.cases[f"{identity_id}/{index}"] = OpenCase(identity_id, index, dict.fromkeys(undecided), scores)
        else:
            person.samples[index].is_new = False
        if is_newcomer:
            person.status = "suspected_duplicate" if undecided else "active"
        return index, "suspected_duplicate" if undecided else "unique"

    def decided(
        self, name: str, decision: Decision, about: str | None, *, keep_newcomer: bool | None
    ) -> type[Problem] | None:
        """Carry out a decision; the refusal that it meets instead, which changes nothing."""
        case = self.cases[name]
        newcomer = self.people[case.newcomer]
        targets = [other for other, known in case.candidates.items() if known is None] if about is None else [about]
        if about is not None and case.candidates[about] is not None:
            return Conflict
        candidates = case.candidates | dict.fromkeys(targets, decision)
        loser = None
        if decision == "duplicate":
            assert about is not None
            younger = max(case.newcomer, about, key=lambda one: self.people[one].samples[0].seq)
            older = about if younger == case.newcomer else case.newcomer
            chosen = {None: younger, True: about, False: case.newcomer}[keep_newcomer]
            loser = chosen if chosen in (older, younger) else None
        # What the decision would make of everybody, on copies: a refusal changes nothing.
        before = (
            {pair: replace(known) for pair, known in self.pairs.items()},
            {one: person.status for one, person in self.people.items()},
        )
        self._say(case, targets, decision)
        if loser is not None:
            self.people[loser].status = "duplicate"
        refusal = None
        is_over = loser == case.newcomer
        if not is_over:
            is_over, refusal = self._settled(case, candidates, newcomer, loser)
        if refusal is not None:
            self.pairs = before[0]
            for one, status in before[1].items():
                self.people[one].status = status
            return refusal
        case.candidates = candidates
        if is_over:
            del self.cases[name]
        if loser is not None:
            for other in [n for n, c in self.cases.items() if c.newcomer == loser and n != name]:
                del self.cases[other]
        return None

    def _say(self, case: OpenCase, targets: list[str], decision: Decision) -> None:
        for other in targets:
            known = self.pairs[frozenset((case.newcomer, other))]
            known.made_on = max(known.made_on if known.decision == decision else -1.0, case.scores[other])
            known.decision = decision

    def _settled(
        self, case: OpenCase, candidates: dict[str, Decision | None], newcomer: Person, loser: str | None
    ) -> tuple[bool, type[Problem] | None]:
        if self.waits(candidates.items()):
            return False, None if loser is None else UndecidedCandidates
        if case.sample == 0:
            if newcomer.status != "suspected_duplicate":
                return False, Conflict
            if not self.may_activate(case.newcomer, candidates.items()):
                return False, UndecidedCandidates
            newcomer.status = "active"
        newcomer.samples[case.sample].is_new = False
        return True, None

    def removed(self, identity_id: str, index: int) -> type[Problem] | None:
        person = self.people[identity_id]
        if person.samples[index].is_gone:
            return NotFound
        is_in_a_case = f"{identity_id}/{index}" in self.cases or any(
            identity_id in c.candidates for c in self.cases.values()
        )
        if person.status not in ("active", "revoked") or index == 0 or is_in_a_case:
            return Conflict
        person.samples[index].is_gone = True
        if index in person.due:
            person.due.remove(index)
        return None

    def reinstated(self, identity_id: str) -> type[Problem] | None:
        person = self.people[identity_id]
        if person.status != "revoked":
            return Conflict
        own = [decided for c in self.cases.values() if c.newcomer == identity_id for decided in c.candidates.items()]
        if not self.may_activate(identity_id, own):
            return UndecidedCandidates
        person.status = "active"
        return None

    def erased(self, identity_id: str) -> None:
        del self.people[identity_id]
        self.pairs = {pair: known for pair, known in self.pairs.items() if identity_id not in pair}
        for name, case in list(self.cases.items()):
            if identity_id in {case.newcomer, *case.candidates}:
                del self.cases[name]
            if identity_id in case.candidates and case.newcomer != identity_id:
                newcomer = self.people[case.newcomer]
                newcomer.due.append(case.sample)
                if newcomer.status == "suspected_duplicate":
                    newcomer.status = "pending"


class IdentityStates(RuleBasedStateMachine):
    """Real use cases on real stores beside the model; after each step they agree."""

    runtime: Runtime
    loop: asyncio.AbstractEventLoop
    count = 0

    enrolled = Bundle("enrolled")
    gone = Bundle("gone")

    def __init__(self) -> None:
        super().__init__()
        type(self).count += 1
        name = f"states-{type(self).count}"
        policy = self.runtime.starting_policy().model_copy(update={"quality": "off"})
        self.gallery = self.run(self.runtime.create_gallery, name, policy)
        limits = thresholds_for(policy, self.runtime.engine.card, 0)
        assert limits.identify == limits.dedup
        self.model = Model(limits, margin_of(self.runtime.engine.card))
        self.captures = 0
        self.events = 0

    def run(self, work: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await it on the Runtime's loop; once more while a busy machine answers that it is not ready."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return asyncio.run_coroutine_threadsafe(work(*args, **kwargs), self.loop).result(PATIENCE_SECONDS)
            except NotReady:
                if time.monotonic() > deadline:
                    raise

    def did(
        self,
        expected: type[Problem] | None,
        work: Callable[P, Coroutine[Any, Any, T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T | None:
        """What came of an action that must succeed, or be refused just so; only one that succeeds leaves an event."""
        result, refusal = None, None
        try:
            result = self.run(work, *args, **kwargs)
        except Problem as problem:
            refusal = problem
        assert (None if refusal is None else type(refusal)) is expected, (refusal, expected)
        self.events += expected is None
        return result

    def fresh(self) -> Gallery:
        gallery = self.run(Gallery.get, self.gallery.id)
        assert gallery is not None
        return gallery

    def capture(self, people: tuple[str, ...]) -> tuple[bytes, Embedding] | None:
        """A photo that nobody has seen before; None when it would lie too near to a threshold to foretell."""
        self.captures += 1
        vector = embedding_of(people, self.captures)
        others = [sample.vector for person in self.model.people.values() for sample in person.samples]
        limits = self.model.limits
        bounds = [known.made_on + self.model.margin for known in self.model.pairs.values() if known.decision]
        for threshold in (limits.dedup, limits.verify, limits.join, limits.anchor, *bounds):
            if others and np.abs(np.stack(others) @ vector - threshold).min() < CLOSE:
                return None
        return portrait(*people, capture=self.captures), vector

    @initialize(target=enrolled, several=st.lists(st.tuples(st.sampled_from(PEOPLE), MOSTLY), min_size=2, max_size=4))
    def begin(self, several: list[tuple[tuple[str, ...], bool]]) -> object:
        return multiple(*(id_ for people, is_screened in several for id_ in self.enrolled_from(people, is_screened)))

    @rule(target=enrolled, people=st.sampled_from(PEOPLE), is_screened=MOSTLY)
    def enrol(self, people: tuple[str, ...], is_screened: bool) -> object:
        return multiple(*self.enrolled_from(people, is_screened))

    def enrolled_from(self, people: tuple[str, ...], is_screened: bool) -> list[str]:
        taken = self.capture(people)
        if taken is None:
            return []
        photo, vector = taken
        action = by_officer("identity.enrol")
        identity = self.did(None, enrol.enrol, self.runtime, action, self.fresh(), [photo], GivenAttributes())
        assert identity is not None
        self.model.seq += 1
        self.model.people[identity.id] = Person("pending", [Sample(self.model.seq, vector, identity.samples[0].id)])
        if is_screened:
            self.screened(identity.id)
        return [identity.id]

    @rule(identity_id=enrolled, people=st.sampled_from(PEOPLE), is_screened=MOSTLY)
    def add_sample(self, identity_id: str, people: tuple[str, ...], is_screened: bool) -> None:
        """A later photo, of the person or of somebody who looks like them and like another."""
        person = self.model.people[identity_id]
        taken = self.capture(people)
        if taken is None:
            return
        photo, vector = taken
        identity = self.run(Identity.living, identity_id)
        assert identity is not None
        expected: type[Problem] | None = None
        if person.status != "active":
            expected = Conflict
        elif float(person.anchor @ vector) < self.model.limits.join:
            expected = DifferentPerson
        action = by_officer("sample.add")
        known = self.did(expected, enrol.add_sample, self.runtime, action, self.fresh(), identity, photo)
        if known is not None:
            self.model.seq += 1
            person.samples.append(Sample(self.model.seq, vector, known.samples[-1].id))
            person.due.append(len(person.samples) - 1)
            if is_screened:
                self.screened(identity_id)

    @rule(identity_id=enrolled, data=st.data())
    def remove_sample(self, identity_id: str, data: st.DataObject) -> None:
        samples = self.model.people[identity_id].samples
        index = data.draw(st.integers(0, len(samples) - 1))
        expected = self.model.removed(identity_id, index)
        action, gallery = by_officer("sample.remove"), self.fresh()
        self.did(
            expected, remove_sample, self.runtime, action, gallery, identity_id, samples[index].id, "not the person"
        )
        self.model.seq += expected is None

    @rule(identity_id=enrolled)
    def screen(self, identity_id: str) -> None:
        self.screened(identity_id)

    def screened(self, identity_id: str) -> None:
        identity = self.run(Identity.living, identity_id)
        assert identity is not None
        expected = self.model.screened(identity_id)
        if expected is None:  # nothing comes of a job that is not due
            for screening in identity.screenings:
                self.run(screen.screen, self.runtime, identity_id, screening.job_id)
            return
        index, verdict = expected
        self.run(screen.screen, self.runtime, identity_id, identity.screenings[index].job_id)
        self.events += 1
        known = self.run(Identity.living, identity_id)
        assert known is not None
        assert known.screenings[index].verdict == verdict

    @rule(identity_id=enrolled)
    def fail_five_times(self, identity_id: str) -> None:
        """A screening that cannot be done: failed after five tries, and pending again when somebody asks."""
        person = self.model.people[identity_id]
        identity = self.run(Identity.living, identity_id)
        assert identity is not None
        if person.status != "pending":
            return
        job_id = identity.screenings[0].job_id
        ended = [self.run(screen.note_failure, self.runtime, identity_id, job_id, "broken") for _ in range(5)]
        assert ended == [False] * 4 + [True]
        self.events += 1
        person.status = "failed"

    @rule(identity_id=enrolled)
    def screen_again(self, identity_id: str) -> None:
        person = self.model.people[identity_id]
        refused = not person.due or person.status == "duplicate"
        action = by_officer("identity.screen")
        self.did(Conflict if refused else None, screen.screen_again, self.runtime, action, self.fresh(), identity_id)
        if person.status == "failed":
            person.status = "pending"

    @rule(identity_id=enrolled)
    def revoke(self, identity_id: str) -> None:
        person = self.model.people[identity_id]
        expected = None if person.status == "active" else Conflict
        action = by_officer("identity.revoke")
        self.did(expected, standing.revoke, self.runtime, action, self.fresh(), identity_id, "card lost")
        if person.status == "active":
            person.status = "revoked"

    @rule(identity_id=enrolled)
    def reinstate(self, identity_id: str) -> None:
        expected = self.model.reinstated(identity_id)
        action = by_officer("identity.reinstate")
        self.did(expected, standing.reinstate, self.runtime, action, self.fresh(), identity_id, "card found")

    @precondition(lambda self: self.model.cases)
    @rule(
        data=st.data(), decision=st.sampled_from(["distinct", "duplicate"]), keep=st.sampled_from([None, True, False])
    )
    def decide(self, data: st.DataObject, decision: Decision, keep: bool | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.cases)))
        case = self.model.cases[name]
        choices: list[str | None] = [*sorted(case.candidates)] if decision == "duplicate" else [None, *case.candidates]
        about = data.draw(st.sampled_from(choices))
        newcomer = case.newcomer
        kept = None if decision == "distinct" or keep is None else (newcomer if keep else about)
        expected = self.model.decided(name, decision, about, keep_newcomer=None if decision == "distinct" else keep)
        found = self.run(self.open_case, newcomer, name)
        judgement = Judgement(decision, about, kept, "looked at both")
        self.did(expected, adjudicate, self.runtime, by_officer("dedup.decide"), self.fresh(), found.id, judgement)

    async def open_case(self, newcomer: str, name: str) -> Case:
        identity = await Identity.living(newcomer)
        assert identity is not None
        index = int(name.partition("/")[2])
        sample_id = self.model.people[newcomer].samples[index].id if index else None
        cases = await Case.find({"newcomer_id": newcomer, "state": "open"}).to_list()
        (case,) = [c for c in cases if c.sample_id == sample_id]
        return case

    @rule(target=gone, identity_id=consumes(enrolled))
    def erase(self, identity_id: str) -> str:
        action = by_officer("identity.erase")
        self.did(None, erase.erase, self.runtime, action, self.fresh(), identity_id, "asked for")
        self.model.erased(identity_id)
        return identity_id

    @rule(identity_id=gone)
    def nothing_can_be_done_with_the_erased(self, identity_id: str) -> None:
        gallery = self.fresh()
        self.did(NotFound, erase.erase, self.runtime, by_officer("identity.erase"), gallery, identity_id, None)
        self.did(NotFound, standing.revoke, self.runtime, by_officer("identity.revoke"), gallery, identity_id, "x")
        assert self.run(Identity.living, identity_id) is None

    @precondition(lambda self: self.model.people)
    @rule(people=st.sampled_from(PEOPLE))
    def search(self, people: tuple[str, ...]) -> None:
        """Everybody active who looks like the photo is found, and nobody else."""
        taken = self.capture(people)
        if taken is None:
            return
        photo, vector = taken
        found = self.did(None, identify, self.runtime, by_officer("face.identify"), self.fresh(), photo, 50)
        assert found is not None
        assert {match.identity_id for match in found.candidates} == {
            identity_id
            for identity_id, person in self.model.people.items()
            if person.status == "active" and self.model.score_with(person, vector) >= self.model.threshold
        }

    @invariant()
    def statuses_are_the_models(self) -> None:
        rows = self.run(lambda: Identity.find({"gallery_id": self.gallery.id}).to_list())
        living = {row.id: row.status for row in rows if row.status != "erased"}
        assert living == {identity_id: person.status for identity_id, person in self.model.people.items()}

    @invariant()
    def no_two_undecided_look_alikes_are_active(self) -> None:
        active = [(i, p) for i, p in self.model.people.items() if p.status == "active"]
        for (one, first), (other, second) in combinations(active, 2):
            score = max(float(a @ b) for a in first.references for b in second.references)
            if score >= self.model.threshold:
                known = self.model.pairs[frozenset((one, other))]
                assert known.decision == "distinct"
                assert score <= known.made_on + self.model.margin

    @invariant()
    def the_gallery_counts_who_is_there(self) -> None:
        head = self.fresh()
        samples = sum(not sample.is_gone for person in self.model.people.values() for sample in person.samples)
        assert (head.identities, head.samples) == (len(self.model.people), samples)

    @invariant()
    def every_action_has_its_event(self) -> None:
        assert self.run(lambda: AuditEvent.find({"gallery": self.gallery.name}).count()) == self.events


async def test_whatever_is_done_to_identities_they_are_as_the_contracts_table_says(runtime: Runtime) -> None:
    IdentityStates.runtime, IdentityStates.loop = runtime, asyncio.get_running_loop()
    is_drawn_anew = EXAMPLES > 30  # `make fuzz`, which also makes what it finds small
    bounds = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        phases=list(Phase) if is_drawn_anew else [Phase.generate],
        derandomize=not is_drawn_anew,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    await asyncio.to_thread(run_state_machine_as_test, IdentityStates, settings=bounds)
