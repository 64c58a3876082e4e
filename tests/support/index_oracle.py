"""What every answer of a search must be: an exact oracle, from what the asker alone knows.

Nothing here asks the index. Whose face a vector is, when each person came and went, and which answer began and ended when, is
the asker's own knowledge; only the `seq` of each vector is read from the store afterwards. All times are epoch seconds.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from app.documents.galleries import GalleryChange
from app.domain.faces import Embedding

#: An index holds float16 vectors; their cosines differ from the exact ones by about 1e-5, never by so much.
ROUNDING = 1e-4
NEVER, ALWAYS = float("inf"), float("-inf")
#: No row reaches this score: it stands for a vector that the answer could not have seen.
UNSEEN = -2.0
ANSWERS_AT_ONCE = 256


@dataclass(slots=True)
class Person:
    """Somebody enrolled. embeddings: of their samples, by rising seq; all of them are photos of the enrolment.

    asked, told: when the request that brought them in began and was answered. Active surely from `active` to `leaving`, surely
    not before `maybe_active` and after `gone`: what lies between happened inside of a request.
    """

    embeddings: list[Embedding]
    asked: float = ALWAYS
    told: float = ALWAYS
    maybe_active: float = ALWAYS
    active: float = ALWAYS
    leaving: float = NEVER
    gone: float = NEVER


@dataclass(frozen=True, slots=True)
class Answer:
    """One identification. door: who was asked; candidates: (identity, score) by rank; limit: how many could be named."""

    door: str
    probe: Embedding
    began: float
    ended: float
    threshold: float
    as_of_seq: int
    candidates: tuple[tuple[str, float], ...]
    limit: int


@dataclass(slots=True)
class Ledger:
    """In which order the gallery changed. added: the seqs of each person's vectors; removed: of the rows that took them out."""

    added: dict[str, list[int]] = field(default_factory=dict)
    removed: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    async def read(cls, gallery_id: str) -> "Ledger":
        """From the gallery's changes; an erased person's own rows are blank, the rows that removed them tell theirs."""
        ledger = cls()
        rows = GalleryChange.get_pymongo_collection().find(
            {"gallery_id": gallery_id, "kind": {"$in": ["add", "remove"]}}
        )
        async for row in rows.sort("seq"):
            if row["kind"] == "remove":
                ledger.removed.setdefault(row["identity_id"], []).append(row["seq"])
            seq = row["seq"] if row["kind"] == "add" else row["removes"]
            ledger.added.setdefault(row["identity_id"], []).append(seq)
        for seqs in ledger.added.values():
            seqs.sort()
        return ledger


class Oracle:
    """Judges answers, once all people and their seqs are known."""

    def __init__(self, people: Mapping[str, Person], ledger: Ledger, *, anchor: float) -> None:
        """people: everybody who was ever enrolled, by identity id. Raises KeyError for one without a seq.

        anchor: the score that a match reaches with every photo of the enrolment (see docs/adr/0038).
        """
        self._anchor = anchor
        self._ids = list(people)
        self._places = {id_: place for place, id_ in enumerate(self._ids)}
        known = [people[id_] for id_ in self._ids]
        seqs = [ledger.added[id_] for id_ in self._ids]
        assert all(len(mine) == len(person.embeddings) for mine, person in zip(seqs, known, strict=True))
        self._rows = np.array([e for person in known for e in person.embeddings], np.float32)
        self._seqs = np.array([seq for mine in seqs for seq in mine], np.int64)
        self._starts = np.cumsum([0, *(len(mine) for mine in seqs[:-1])])
        self._maybe_active = np.array([person.maybe_active for person in known])
        self._active = np.array([person.active for person in known])
        self._leaving = np.array([person.leaving for person in known])
        self._gone = np.array([person.gone for person in known])
        told = [(person.told, max(mine)) for person, mine in zip(known, seqs, strict=True)]
        told += [(people[id_].gone, max(rows)) for id_, rows in ledger.removed.items() if id_ in people]
        asked = [(person.asked, min(mine)) for person, mine in zip(known, seqs, strict=True)]
        asked += [(people[id_].leaving, min(rows)) for id_, rows in ledger.removed.items() if id_ in people]
        self._told, self._least = _running(told)
        self._asked, self._most = _running_back(asked)

    def faults(self, answers: Sequence[Answer]) -> Iterator[str]:
        """What is wrong with these answers, in words; nothing when all are right."""
        for first in range(0, len(answers), ANSWERS_AT_ONCE):
            some = answers[first : first + ANSWERS_AT_ONCE]
            scores = np.array([answer.probe for answer in some], np.float32) @ self._rows.T
            for answer, row in zip(some, scores, strict=True):
                for fault in self._faults(answer, row):
                    yield f"{answer.door}, {answer.began:.3f} to {answer.ended:.3f}, as of {answer.as_of_seq}: {fault}"

    def _faults(self, answer: Answer, row: npt.NDArray[np.float32]) -> Iterator[str]:
        yield from self._faults_of_seq(answer)
        best = np.maximum.reduceat(np.where(self._seqs <= answer.as_of_seq, row, UNSEEN), self._starts)
        weakest = np.minimum.reduceat(row, self._starts)
        # What counts of a score, at least and at most: beside the anchor the rounding decides.
        least = np.where(weakest >= self._anchor + ROUNDING, best, np.minimum(best, weakest))
        most = np.where(weakest >= self._anchor - ROUNDING, best, np.minimum(best, weakest))
        surely = (self._active <= answer.began) & (answer.ended <= self._leaving)
        maybe = (self._maybe_active <= answer.ended) & (answer.began <= self._gone)
        named = dict(answer.candidates)
        lowest = min(named.values(), default=answer.threshold) if len(named) >= answer.limit else answer.threshold
        for place in np.flatnonzero(surely & (least >= answer.threshold + ROUNDING) & (best >= lowest + ROUNDING)):
            if self._ids[place] not in named:
                yield f"{self._ids[place]} is missing, at {best[place]:.5f}"
        for id_, score in named.items():
            if id_ not in self._places:
                yield f"{id_} is nobody"
                continue
            mine = self._places[id_]
            if not maybe[mine]:
                yield f"{id_} was not active at that time"
            elif abs(score - best[mine]) > ROUNDING:
                yield f"{id_} was given {score:.5f} and has {best[mine]:.5f}"
            elif most[mine] < answer.threshold - ROUNDING:
                yield f"{id_} is unlike a photo of the enrolment, at {weakest[mine]:.5f}"
        shown = [score for _, score in answer.candidates]
        if len(named) != len(shown) or any(a < b for a, b in pairwise(shown)):
            yield "the candidates are not in order, or one is named twice"
        if any(score < answer.threshold for score in shown):
            yield "a candidate lies below the threshold"

    def _faults_of_seq(self, answer: Answer) -> Iterator[str]:
        before = bisect_left(self._told, answer.began)
        if before and answer.as_of_seq < self._least[before - 1]:
            yield f"change {self._least[before - 1]} was told of before the question, and is not in the answer"
        after = bisect_left(self._asked, answer.ended)
        if after < len(self._most) and answer.as_of_seq >= self._most[after]:
            yield f"change {self._most[after]} was asked for after the answer, and is in it"


def _running(moments: Iterable[tuple[float, int]]) -> tuple[list[float], list[int]]:
    """The moments in order, and the highest seq up to each."""
    ordered = sorted(moments)
    return [moment for moment, _ in ordered], list(accumulate((seq for _, seq in ordered), max))


def _running_back(moments: Iterable[tuple[float, int]]) -> tuple[list[float], list[int]]:
    """The moments in order, and the lowest seq from each on."""
    ordered = sorted(moments)
    lowest = list(accumulate((seq for _, seq in reversed(ordered)), min))
    return [moment for moment, _ in ordered], lowest[::-1]
