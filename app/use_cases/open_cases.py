"""Open cases: put what a scan found before a person, one case for everybody who looks like somebody enrolled earlier."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final, NamedTuple

from pymongo.asynchronous.client_session import AsyncClientSession

from app.audit import Action, record
from app.documents.base import new_id, now
from app.documents.cases import Case, CaseCandidate, Pair
from app.documents.galleries import Gallery
from app.documents.identities import Candidate, Identity
from app.documents.scans import Scan, ScanPair, contract_of, decisions_on
from app.domain.clusters import Link
from app.domain.policy import Status, margin_of
from app.runtime import Runtime

CASES_A_TRANSACTION: Final = 100
IDS_AT_ONCE: Final = 5000
#: Beyond a request's limit: a hundred cases with their pairs.
TRANSACTION_SECONDS: Final = 10.0

#: Whoever stands like this is asked about by nobody: gone, or decided already.
SETTLED: Final[tuple[Status, ...]] = ("erased", "duplicate")


@dataclass(frozen=True, slots=True)
class Opened:
    """What became of a scan's pairs.

    opened: cases made now; existing: cases that were open about them already; decided: pairs that a person had decided.
    """

    opened: int
    existing: int
    decided: int


class _Sighting(NamedTuple):
    """Somebody enrolled earlier who looks like a newcomer."""

    identity_id: str
    score: float


Sightings = dict[str, list[_Sighting]]


async def open_cases(runtime: Runtime, action: Action, gallery: Gallery, scan: Scan) -> Opened:
    """A case for each newcomer of the scan's pairs, naming those of the others about whom nobody has been asked yet.

    Of two, the newcomer is who was enrolled later; it keeps its status until a person decides. Nobody is asked about a
    duplicate, or about a newcomer who waits for a verdict: that brings a case of its own. May be repeated at any time.
    """
    sightings, decided = await _sightings(scan, gallery, margin_of(runtime.engine.card))
    newcomers = sorted(sightings)
    opened, existing = 0, set[str]()
    for first in range(0, len(newcomers), CASES_A_TRANSACTION):
        some = {newcomer: sightings[newcomer] for newcomer in newcomers[first : first + CASES_A_TRANSACTION]}
        batch = _Batch(replace(action, claim=None), gallery, scan, some)
        made, known = await runtime.transaction(batch.open, seconds=TRANSACTION_SECONDS)
        opened += made
        existing |= known
    result = Opened(opened, len(existing), decided)

    async def conclude(session: AsyncClientSession) -> None:
        await record(
            session, action, subject_kind="scan", subject_id=scan.id, gallery=gallery.name,
            detail={"step": "cases", **asdict(result)},
        )  # fmt: skip

    await runtime.transaction(conclude)
    return result


async def _sightings(scan: Scan, gallery: Gallery, margin: float) -> tuple[Sightings, int]:
    """Whom each newcomer looks like, of the pairs that nobody has decided; and how many pairs are decided."""
    found: Sightings = {}
    enrolled: dict[str, int] = {}
    decided = 0
    async for links in ScanPair.links_of(scan):
        decisions = await decisions_on(links, contract_of(scan, gallery), margin)
        decided += len(decisions)
        undecided = [link for link in links if link[:2] not in decisions]
        await _learn(enrolled, undecided)
        for low, high, score in undecided:
            if low in enrolled and high in enrolled:
                earlier, later = (low, high) if enrolled[low] < enrolled[high] else (high, low)
                found.setdefault(later, []).append(_Sighting(earlier, score))
    return found, decided


async def _learn(enrolled: dict[str, int], links: Sequence[Link]) -> None:
    """Add when each of these people was enrolled; whoever has just been erased stays unknown."""
    unknown = sorted({id_ for link in links for id_ in link[:2]} - set(enrolled))
    for first in range(0, len(unknown), IDS_AT_ONCE):
        living = {"_id": {"$in": unknown[first : first + IDS_AT_ONCE]}, "status": {"$ne": "erased"}}
        rows = Identity.get_pymongo_collection().find(living, {"enrol_seq": 1})
        enrolled |= {row["_id"]: row["enrol_seq"] async for row in rows}


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some newcomers' cases, in one transaction. action: without an idempotency key, which the whole request settles."""

    action: Action
    gallery: Gallery
    scan: Scan
    sightings: Mapping[str, Sequence[_Sighting]]

    async def open(self, session: AsyncClientSession) -> tuple[int, set[str]]:
        """Returns how many cases were made, and which were there: one may be about people of several batches."""
        ids = sorted({*self.sightings, *(seen.identity_id for some in self.sightings.values() for seen in some)})
        statuses = await Identity.statuses(ids, session)
        living = [id_ for id_ in ids if statuses.get(id_, "erased") != "erased"]
        # A write to each: an erasure in between conflicts, and so does another request for the same cases.
        await Identity.touch_living(living, session)
        standing = await _open_about(ids, session)
        existing: set[str] = set()
        cases = []
        for newcomer, seen in self.sightings.items():
            status = statuses.get(newcomer, "erased")
            if status == "pending" or status in SETTLED:
                continue
            known = {one.identity_id: standing.get(frozenset((newcomer, one.identity_id))) for one in seen}
            existing |= {case_id for case_id in known.values() if case_id is not None}
            fresh = [
                one
                for one in seen
                if known[one.identity_id] is None and statuses.get(one.identity_id, "erased") not in SETTLED
            ]
            if fresh:
                cases.append(await self._record(newcomer, fresh, session))
        if cases:
            await Case.insert_many(cases, session=session)
            await record(
                session, self.action, subject_kind="scan", subject_id=self.scan.id, gallery=self.gallery.name,
                detail={"step": "batch", "opened": len(cases)},
            )  # fmt: skip
        return len(cases), existing

    async def _record(self, newcomer: str, seen: Sequence[_Sighting], session: AsyncClientSession) -> Case:
        """The newcomer's case, its pairs recorded: from now on the decision stands between these people."""
        ordered = sorted(seen, key=lambda one: (-one.score, one.identity_id))
        candidates = [
            Candidate(identity_id=one.identity_id, score=one.score, rank=rank)
            for rank, one in enumerate(ordered, start=1)
        ]
        await Pair.record(self.gallery.id, self.gallery.contract, newcomer, candidates, session)
        return Case(
            id=new_id(), gallery_id=self.gallery.id, newcomer_id=newcomer, sample_id=None, job_id=self.scan.id, state="open",
            candidates=[CaseCandidate(**candidate.model_dump()) for candidate in candidates],
            threshold=self.scan.threshold, created_at=now(),
        )  # fmt: skip


async def _open_about(ids: Sequence[str], session: AsyncClientSession) -> dict[frozenset[str], str]:
    """The open case that asks about two of these people, by the two of them."""
    cases = await Case.find({"state": "open", "newcomer_id": {"$in": list(ids)}}, session=session).to_list()
    return {frozenset((case.newcomer_id, c.identity_id)): case.id for case in cases for c in case.candidates}
