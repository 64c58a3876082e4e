"""Whole-gallery scans: how far each has come, the look-alikes that they found, and who hangs together by them."""

import hashlib
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, Literal, Self

import numpy as np
from beanie import SortDirection
from pymongo import ASCENDING, DESCENDING, IndexModel, ReturnDocument, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import Stored, Value, now, within
from app.documents.cases import Pair
from app.documents.galleries import Gallery
from app.domain.clusters import Cluster, Link
from app.domain.policy import Decision

ScanState = Literal["queued", "running", "paused", "done", "failed", "cancelled"]
UNFINISHED: Final[tuple[ScanState, ...]] = ("queued", "running", "paused")
#: A runner that has said nothing for so long is dead.
SILENCE: Final = timedelta(seconds=15)
LINKS_AT_ONCE: Final = 20_000
HASH_LENGTH: Final = 32
#: Of a cluster that is larger, so many members and weak links are shown: it is no one person, and a page has an end.
MEMBERS_SHOWN, WEAK_LINKS_SHOWN = 200, 50
#: Kept clusters are a copy, which MongoDB deletes after this time, and with it what it says of the erased.
CLUSTERS_KEPT: Final = timedelta(hours=1)
#: Members and ends of weak links in one document: some 100 KiB.
NAMES_A_RUN: Final = 2000
RUNS_AT_ONCE: Final = 50


@dataclass(frozen=True, slots=True)
class FoundPair:
    """Two identities that look alike: the best score of their samples, and the `seq` from which on it was so."""

    low: str
    high: str
    score: float
    seq: int


def series_of(gallery: Gallery) -> str:
    """Names what scans can be compared and added to: one gallery's vectors in one epoch and under one contract."""
    named = f"{gallery.id}|{gallery.epoch}|{gallery.contract}"
    return hashlib.sha256(named.encode()).hexdigest()[:HASH_LENGTH]


def contract_of(scan: "Scan", gallery: Gallery | None) -> str | None:
    """The contract of the model that gave a scan's scores; None for a scan from before the gallery changed its model."""
    return None if gallery is None or scan.series != series_of(gallery) else gallery.contract


class Grouping(Value):
    """A scan's clusters as they were made once. as_of: later pairs and decisions are not in it."""

    id: str
    as_of: datetime


class Scan(Stored):
    """Everything in (0, upto_seq] against everything, of which `done` of `total` tiles are behind it.

    since_seq: what came up to here was compared by an earlier scan of the series, at this threshold or a lower one.
    block: seqs along a tile's side, kept here because tiles are counted by it.
    runner: who is at it, as long as `heartbeat_at` is fresh. compared: pairs of vectors, which took `seconds` of work.
    failures: tries in a row that came to nothing. pairs: as of the last slice of work; None when somebody has to count them.
    erasures: raised with every erasure that took pairs away, so that no older count is kept.
    grouping: the clusters that are kept, where they are too many to be made anew for everybody who asks.
    """

    gallery_id: str
    series: str
    state: ScanState = "queued"
    threshold: float
    since_seq: int
    upto_seq: int
    block: int
    done: int = 0
    total: int
    compared: int = 0
    seconds: float = 0.0
    runner: str | None = None
    heartbeat_at: datetime
    failures: int = 0
    reason: str | None = None
    pairs: int | None = None
    erasures: int = 0
    grouping: Grouping | None = None
    is_grouping_wanted: bool = False
    created_at: datetime
    created_by: str
    started_at: datetime | None = None
    finished_at: datetime | None = None

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "scans"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("series", ASCENDING), ("state", ASCENDING), ("upto_seq", DESCENDING)]),
            IndexModel([("state", ASCENDING), ("heartbeat_at", ASCENDING)]),
        ]

    @classmethod
    async def seen(cls, scan_id: str, galleries: Collection[str] | None) -> Self | None:
        """The scan, if it lies in one of the galleries (ids; None: all)."""
        return await cls.find_one({"_id": scan_id, **within(galleries)})

    @property
    def rate(self) -> float | None:
        """Pairs of vectors compared in a second of work."""
        return self.compared / self.seconds if self.seconds else None

    @property
    def seconds_left(self) -> float | None:
        """How long the rest will take at the pace so far; None where nobody knows, or nothing is to be done any more."""
        if self.state not in UNFINISHED or not self.done:
            return None
        return self.seconds / self.done * (self.total - self.done)

    @classmethod
    async def latest_done(cls, series: str, threshold: float) -> Self | None:
        """The scan that reached furthest, of those that found everything at this threshold."""
        wide_enough = {"series": series, "state": "done", "threshold": {"$lte": threshold}}
        return await cls.find(wide_enough).sort([("upto_seq", SortDirection.DESCENDING)]).first_or_none()

    @classmethod
    async def unfinished(cls, series: str, threshold: float) -> Self | None:
        """The newest one at this very threshold that somebody may go on with."""
        same = {"series": series, "state": {"$in": list(UNFINISHED)}, "threshold": threshold}
        return await cls.find(same).sort([("_id", SortDirection.DESCENDING)]).first_or_none()

    @classmethod
    async def overdue(cls) -> list[Self]:
        """Those that somebody should be working on, and of which nobody has heard for a while."""
        silent = {"state": {"$in": ["queued", "running"]}, "heartbeat_at": {"$lt": now() - SILENCE}}
        return await cls.find(silent).sort("heartbeat_at").limit(100).to_list()

    @classmethod
    async def claim(cls, scan_id: str, runner: str) -> Self | None:
        """Become the one who works on it; None when somebody else is, or nothing is to be done."""
        moment = now()
        free = [{"runner": {"$in": [None, runner]}}, {"heartbeat_at": {"$lt": moment - SILENCE}}]
        row = await cls.get_pymongo_collection().find_one_and_update(
            {"_id": scan_id, "state": {"$in": ["queued", "running"]}, "$or": free},
            [{"$set": {
                "state": "running", "runner": runner, "heartbeat_at": moment,
                "started_at": {"$ifNull": ["$started_at", moment]},
            }}],
            return_document=ReturnDocument.AFTER,
        )  # fmt: skip
        return None if row is None else cls.model_validate(row)

    async def beat(self) -> None:
        """Tell that the one who works on it lives."""
        mine = {"_id": self.id, "state": "running", "runner": self.runner}
        await self.get_pymongo_collection().update_one(mine, {"$set": {"heartbeat_at": now()}})

    async def release(self) -> None:
        """Let somebody else go on at once."""
        mine = {"_id": self.id, "state": "running", "runner": self.runner}
        await self.get_pymongo_collection().update_one(mine, {"$set": {"runner": None, "heartbeat_at": now()}})

    async def advance(self, session: AsyncClientSession, *, compared: int, seconds: float) -> bool:
        """Count the present tile as done; False when the scan is not this runner's any more, or not at this tile."""
        here = {"_id": self.id, "state": "running", "runner": self.runner, "done": self.done}
        step = {"done": 1, "compared": compared, "seconds": seconds}
        result = await self.get_pymongo_collection().update_one(
            here, {"$inc": step, "$set": {"heartbeat_at": now(), "failures": 0}}, session=session
        )
        return bool(result.matched_count)

    async def turn(
        self, session: AsyncClientSession, state: ScanState, *, reason: str | None = None, by_runner: bool = False
    ) -> bool:
        """Go over into another state, from the one that was read; False when that is past.

        by_runner: only while this runner still is the one who works on it.
        """
        here: dict[str, Any] = {"_id": self.id, "state": self.state}
        if by_runner:
            here["runner"] = self.runner
        moment = now()
        fields = {
            "state": state, "reason": reason, "runner": None, "heartbeat_at": moment, "failures": 0, "pairs": None,
        }  # fmt: skip
        if state not in UNFINISHED:
            fields["finished_at"] = moment
        result = await self.get_pymongo_collection().update_one(here, {"$set": fields}, session=session)
        return bool(result.matched_count)

    async def count_failure(self) -> int:
        """One more try came to nothing; returns how many in a row."""
        row = await self.get_pymongo_collection().find_one_and_update(
            {"_id": self.id}, {"$inc": {"failures": 1}}, return_document=ReturnDocument.AFTER
        )
        return 0 if row is None else int(row["failures"])

    async def keep_count(self, pairs: int) -> None:
        """Keep what its runner has counted, unless somebody of these pairs was erased since the scan was read."""
        here = {"_id": self.id, "erasures": self.erasures}
        await self.get_pymongo_collection().update_one(here, {"$set": {"pairs": pairs}})

    async def counted(self, limit: int) -> int:
        """How many pairs it has, as of the last slice of work; counted now, up to the limit, where nobody has."""
        if self.pairs is not None:
            return self.pairs
        pairs = await ScanPair.count_of(self, limit)
        here = {"_id": self.id, "erasures": self.erasures, "state": self.state, "pairs": None}
        await self.get_pymongo_collection().update_one(here, {"$set": {"pairs": pairs}})
        return pairs

    async def want_grouping(self) -> None:
        """Leave word for the workers that somebody asks for its clusters."""
        await self.get_pymongo_collection().update_one({"_id": self.id}, {"$set": {"is_grouping_wanted": True}})

    @classmethod
    async def to_group(cls, scan_id: str) -> Self | None:
        """The scan, when it has ended and somebody asks for its clusters."""
        return await cls.find_one({"_id": scan_id, "state": {"$nin": list(UNFINISHED)}, "is_grouping_wanted": True})

    async def keep_grouping(self, grouping: Grouping) -> None:
        """Show these clusters from now on. The ones before stay for whoever is reading them; older ones go."""
        fields = {"grouping": grouping.model_dump(), "is_grouping_wanted": False}
        await self.get_pymongo_collection().update_one({"_id": self.id}, {"$set": fields})
        kept = [grouping.id] if self.grouping is None else [grouping.id, self.grouping.id]
        older = {"scan_id": self.id, "grouping": {"$nin": kept}}
        await ClusterRun.get_pymongo_collection().delete_many(older)

    @classmethod
    async def forget_all_of(cls, gallery_id: str, session: AsyncClientSession) -> None:
        """Delete a gallery's scans with everything that they found."""
        mine = {"gallery_id": gallery_id}
        rows = cls.get_pymongo_collection().find(mine, {"series": 1}, session=session)
        known = [(row["_id"], row["series"]) async for row in rows]
        series = {"series": {"$in": sorted({name for _, name in known})}}
        await ScanPair.get_pymongo_collection().delete_many(series, session=session)
        runs = {"scan_id": {"$in": [id_ for id_, _ in known]}}
        await ClusterRun.get_pymongo_collection().delete_many(runs, session=session)
        await cls.get_pymongo_collection().delete_many(mine, session=session)


class ScanPair(Stored):
    """Two identities that a scan of the series found, under their ordered ids.

    Nobody's activation waits for them: what is to be decided becomes a case, and its pairs `Pair`s. score: the best that any
    scan saw; seq: the smallest from which on two of their samples were alike. A scan's pairs are those that reach its
    threshold and its `upto_seq`, whichever scan found them, so that one after another need look at what is new only.
    """

    series: str
    low: str
    high: str
    score: float
    seq: int
    found_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "scan_pairs"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("series", ASCENDING), ("score", DESCENDING), ("_id", DESCENDING), ("seq", ASCENDING)]),
            IndexModel("low"),
            IndexModel("high"),
        ]

    @staticmethod
    def of(scan: Scan) -> dict[str, Any]:
        """The filter for a scan's pairs. Scores are float32, so the threshold that they reached is its float32 too."""
        threshold = float(np.float32(scan.threshold))
        return {"series": scan.series, "score": {"$gte": threshold}, "seq": {"$lte": scan.upto_seq}}

    @classmethod
    async def record(cls, series: str, pairs: Iterable[FoundPair], session: AsyncClientSession) -> None:
        """Keep the pairs; of one that is known the better score and the smaller `seq`."""
        moment = now()
        writes = [
            UpdateOne(
                {"_id": f"{series}:{pair.low}:{pair.high}"},
                {
                    "$setOnInsert": {"series": series, "low": pair.low, "high": pair.high, "found_at": moment},
                    "$max": {"score": pair.score},
                    "$min": {"seq": pair.seq},
                },
                upsert=True,
            )
            for pair in pairs
        ]
        if writes:
            await cls.get_pymongo_collection().bulk_write(writes, ordered=False, session=session)

    @classmethod
    async def count_of(cls, scan: Scan, limit: int) -> int:
        """How many pairs a scan has, counted up to the limit."""
        return int(await cls.get_pymongo_collection().count_documents(cls.of(scan), limit=limit))

    @classmethod
    async def best_of(cls, scan: Scan, limit: int, after: tuple[float, str] | None) -> list[Self]:
        """A scan's pairs, the best score first, equal ones by falling id; those behind the one of this score and id."""
        query = cls.of(scan)
        if after is not None:
            score, id_ = after
            query = {"$and": [query, {"$or": [{"score": {"$lt": score}}, {"score": score, "_id": {"$lt": id_}}]}]}
        best_first = [("score", SortDirection.DESCENDING), ("_id", SortDirection.DESCENDING)]
        return await cls.find(query).sort(best_first).limit(limit).to_list()

    @classmethod
    async def links_of(cls, scan: Scan) -> AsyncIterator[list[Link]]:
        """All of a scan's pairs, some at a time."""
        shown = {"low": 1, "high": 1, "score": 1}
        after: Mapping[str, Any] = {}
        while True:
            query = {"$and": [cls.of(scan), after]} if after else cls.of(scan)
            cursor = cls.get_pymongo_collection().find(query, shown)
            rows = [r async for r in cursor.sort([("score", DESCENDING), ("_id", DESCENDING)]).limit(LINKS_AT_ONCE)]
            yield [Link(row["low"], row["high"], row["score"]) for row in rows]
            if len(rows) < LINKS_AT_ONCE:
                return
            last = rows[-1]
            after = {
                "score": {"$lte": last["score"]},
                "$or": [{"score": {"$lt": last["score"]}}, {"_id": {"$lt": last["_id"]}}],
            }

    @classmethod
    async def forget(cls, identity_id: str, session: AsyncClientSession) -> None:
        """Erase every pair with the identity; whoever asks next counts the rest."""
        sides = {"$or": [{"low": identity_id}, {"high": identity_id}]}
        series = await cls.get_pymongo_collection().distinct("series", sides, session=session)
        if not series:
            return
        await cls.get_pymongo_collection().delete_many(sides, session=session)
        await Scan.get_pymongo_collection().update_many(
            {"series": {"$in": series}}, {"$inc": {"erasures": 1}, "$set": {"pairs": None}}, session=session
        )


class ClusterSummary(Value):
    """A cluster as it is shown: its size, its first members, and the weak links that lie lowest."""

    size: int
    members: tuple[str, ...]
    links: int
    weak: tuple[Link, ...]

    @classmethod
    def of(cls, cluster: Cluster) -> Self:
        """What is shown of the cluster."""
        lowest_first = sorted(cluster.weak, key=lambda link: (link.score, link))
        return cls(
            size=len(cluster.members), members=cluster.members[:MEMBERS_SHOWN], links=cluster.links,
            weak=tuple(lowest_first[:WEAK_LINKS_SHOWN]),
        )  # fmt: skip

    @property
    def place(self) -> tuple[int, str]:
        """Where it stands among the others: the largest is first."""
        return -self.size, self.members[0]


class ClusterRun(Stored):
    """Clusters of one grouping that follow each other; size, first: of its last one, by which a page finds its run."""

    scan_id: str
    grouping: str
    number: int
    size: int
    first: str
    clusters: list[ClusterSummary]
    made_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "scan_clusters"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("scan_id", ASCENDING), ("grouping", ASCENDING), ("number", ASCENDING)]),
            IndexModel("made_at", expireAfterSeconds=int(CLUSTERS_KEPT.total_seconds())),
        ]

    @classmethod
    def runs_of(cls, scan_id: str, grouping: Grouping, clusters: Iterable[Cluster]) -> list[Self]:
        """The clusters, in their order, in documents of bounded size."""
        runs: list[list[ClusterSummary]] = []
        names = NAMES_A_RUN
        for cluster in clusters:
            shown = ClusterSummary.of(cluster)
            if names >= NAMES_A_RUN:
                runs.append([])
                names = 0
            runs[-1].append(shown)
            names += len(shown.members) + 2 * len(shown.weak)
        return [
            cls(
                scan_id=scan_id, grouping=grouping.id, number=number, size=run[-1].size, first=run[-1].members[0],
                clusters=run, made_at=grouping.as_of,
            )
            for number, run in enumerate(runs)
        ]  # fmt: skip

    @classmethod
    async def keep(cls, runs: Sequence[Self]) -> None:
        """Insert the runs; they are shown when the scan names their grouping."""
        for first in range(0, len(runs), RUNS_AT_ONCE):
            await cls.insert_many(list(runs[first : first + RUNS_AT_ONCE]))

    @classmethod
    async def behind(
        cls, scan_id: str, grouping: Grouping, place: tuple[int, str] | None, limit: int
    ) -> list[ClusterSummary]:
        """The clusters behind this place: more than the limit, or all that are left."""
        query: dict[str, Any] = {"scan_id": scan_id, "grouping": grouping.id}
        if place is not None:
            size, first = -place[0], place[1]
            query["$or"] = [{"size": {"$lt": size}}, {"size": size, "first": {"$gt": first}}]
        found: list[ClusterSummary] = []
        # Two are enough as a rule: the place may be the last but one of the first.
        async with cls.get_pymongo_collection().find(query).sort("number").batch_size(2) as rows:
            async for row in rows:
                run = cls.model_validate(row)
                found += [cluster for cluster in run.clusters if place is None or cluster.place > place]
                if len(found) > limit:
                    break
        return found


async def decisions_on(links: Sequence[Link], contract: str | None, margin: float) -> dict[tuple[str, str], Decision]:
    """The decisions on these pairs, by the two ids. A pair without a decision that covers its score is absent.

    contract: of the model that gave the links' scores; None: unknown. margin: see `domain.policy.margin_of`.
    """
    scores = {f"{link.low}:{link.high}": link.score for link in links}
    found: dict[tuple[str, str], Decision] = {}
    async for pair in Pair.find({"_id": {"$in": list(scores)}, "decision": {"$ne": None}}):
        decision = pair.decision_on(scores[pair.id], contract, margin) and pair.standing_decision(margin)
        if decision is not None:
            found[pair.low, pair.high] = decision
    return found


SCAN_DOCUMENTS: Final = (Scan, ScanPair, ClusterRun)
