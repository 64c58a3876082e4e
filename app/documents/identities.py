"""An identity: someone known in a gallery, with the samples and screenings that belong to them."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, Field
from pymongo import IndexModel, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession

from app.clock import from_now
from app.documents.base import Stored, Value, now, within
from app.domain.faces import Box
from app.domain.policy import Status, Verdict
from app.domain.quality import QualityReport
from app.domain.subject import FoundFace


class Liveness(Value):
    """What the passive models said of a photo."""

    score: float
    passed: bool


#: The `contract` of a sample without a template.
NO_CONTRACT: Final = ""


class Sample(Value):
    """One photo with its face.

    template: the sealed embedding; contract: of the model that made it; photo_digest: keyed hash of the bytes as they came;
    fingerprint: sealed, tells copies of the photo, None where there is nothing to tell them by. found: the face that was taken.
    stored_box: where it lies on the stored photo. landmarks: the same of its landmarks, sealed. These three are None for samples
    of older versions.
    """

    id: str
    seq: int
    status: Literal["pending", "active"]
    template: bytes
    contract: str
    quality: QualityReport
    liveness: Liveness | None
    photo_key: str
    photo_digest: bytes
    fingerprint: bytes | None = None
    found: FoundFace | None = None
    stored_box: Box | None = None
    landmarks: bytes | None = None
    created_at: datetime

    @property
    def is_lost(self) -> bool:
        """Whether it has no template: the gallery moved to another model, and the stored photo gave none."""
        return not self.template


class Candidate(Value):
    """Somebody who looks alike: best score over samples, rank from 1."""

    identity_id: str
    score: float
    rank: int


class Screening(Value):
    """One search of one or more samples among all others: the job that the caller can follow."""

    job_id: str
    sample_ids: list[str]
    state: Literal["queued", "running", "done", "failed"] = "queued"
    verdict: Verdict | None = None
    case_id: str | None = None
    candidates: list[Candidate] = Field(default_factory=list)
    as_of_seq: int | None = None
    tries: int = 0
    due_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


class Attempts(Value):
    """Consecutive non-matches on the identity."""

    consecutive: int = 0
    last_failure: datetime | None = None


#: Every status but `erased`.
LIVING: list[Status] = ["pending", "active", "suspected_duplicate", "duplicate", "revoked", "failed"]
#: No screening is put off for longer.
PUT_OFF_AT_MOST: Final = timedelta(minutes=5)
#: So many waiting identities are read to find the oldest due screening.
FIRST_IN_LINE: Final = 50
#: Few among many: found by an index of their own, not by looking at everybody.
_WITH_SEVERAL_SAMPLES = {"samples.1.seq": {"$exists": True}}


@dataclass(frozen=True, slots=True)
class ReferenceHashes:
    """By what a reference is looked up. equal: the same for all its spellings; exact: for this one, under the first rules."""

    equal: bytes
    exact: bytes


@dataclass(frozen=True, slots=True)
class SealedLookups:
    """What the hashes that an identity is found by are made of, and how they are at present."""

    identity_id: str
    wrapped_key: bytes | None
    attributes: bytes
    external_ref_hash: bytes | None
    external_ref_equal: bytes | None

    @property
    def unchanged(self) -> dict[str, object]:
        """The filter for this identity, as long as its attributes are those that were read."""
        return {"_id": self.identity_id, "attributes": self.attributes}


@dataclass(frozen=True, slots=True)
class LookedAt:
    """How far a walk through a gallery has got: this person was the last one."""

    created_at: datetime
    identity_id: str


@dataclass(frozen=True, slots=True)
class SealedTemplates:
    """An identity's data key, wrapped, and the sealed template and model contract of each sample, by the sample's id."""

    wrapped_key: bytes | None
    samples: dict[str, tuple[bytes, str]]


class Identity(Stored):
    """Someone known in a gallery.

    attributes: sealed JSON of external_ref, full_name, date_of_birth, metadata. external_ref_hash: of the reference, unique in
    the gallery. external_ref_equal: set where somebody else has the same reference in another spelling; then external_ref_hash
    is that of this very spelling (docs/adr/0051). name_tags: keyed hashes that a search by the beginning of a name meets, and
    a mark of the rules that they were made by. wrapped_key: the data key; without it nothing of the person opens any more.
    key_generation: of the gallery's key that wrapped it. touch: raised by transactions that rely on this identity's standing,
    so that they conflict with those that change it. outbox_at: when a queued screening is overdue and must be queued again.
    """

    gallery_id: str
    status: Status
    enrol_seq: int
    samples: list[Sample]
    screenings: list[Screening]
    attributes: bytes | None
    external_ref_hash: bytes | None
    external_ref_equal: bytes | None = None
    name_tags: list[bytes] = Field(default_factory=list)
    wrapped_key: bytes | None
    key_generation: int | None = None
    attempts: Attempts = Attempts()
    outbox_at: datetime | None
    touch: int = 0
    version: int = 1
    created_at: datetime
    created_by: str
    updated_at: datetime
    erased_at: datetime | None = None

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "identities"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel(
                [("gallery_id", 1), ("external_ref_hash", 1)],
                unique=True,
                partialFilterExpression={"external_ref_hash": {"$type": "binData"}},
            ),
            IndexModel(
                [("gallery_id", 1), ("external_ref_equal", 1)],
                partialFilterExpression={"external_ref_equal": {"$type": "binData"}},
            ),
            IndexModel([("gallery_id", 1), ("created_at", -1), ("_id", -1)]),
            IndexModel([("gallery_id", 1), ("status", 1), ("created_at", -1), ("_id", -1)]),
            IndexModel([("created_at", -1), ("_id", -1)]),
            IndexModel([("gallery_id", 1), ("name_tags", 1), ("created_at", -1), ("_id", -1)]),
            IndexModel([("gallery_id", 1), ("key_generation", 1)]),
            IndexModel("screenings.job_id"),
            IndexModel([("gallery_id", 1), ("samples.1.seq", 1)], partialFilterExpression=_WITH_SEVERAL_SAMPLES),
            IndexModel("outbox_at", partialFilterExpression={"outbox_at": {"$type": "date"}}),
            IndexModel("status", partialFilterExpression={"status": "failed"}),
        ]

    @property
    def active_samples(self) -> list[Sample]:
        """The samples that serve as references."""
        return [sample for sample in self.samples if sample.status == "active" and not sample.is_lost]

    @property
    def enrolment_samples(self) -> list[Sample]:
        """The samples that the identity was enrolled by, as far as they still exist. Its first screening names them."""
        if not self.screenings:
            return self.samples
        return [sample for sample in self.samples if sample.id in self.screenings[0].sample_ids]

    @property
    def anchors(self) -> list[Sample]:
        """The samples of the enrolment that have a template. All later photos are compared with them."""
        return [sample for sample in self.enrolment_samples if not sample.is_lost]

    def screening(self, job_id: str) -> Screening | None:
        """The screening that this job carries out."""
        return next((s for s in self.screenings if s.job_id == job_id), None)

    def with_screening(self, changed: Screening) -> list[Screening]:
        """The screenings with one of them replaced."""
        return [changed if s.job_id == changed.job_id else s for s in self.screenings]

    @classmethod
    async def living(cls, identity_id: str, session: AsyncClientSession | None = None) -> Self | None:
        """The identity, unless it is unknown or erased."""
        return await cls.find_one({"_id": identity_id, "status": {"$ne": "erased"}}, session=session)

    @classmethod
    async def with_reference(
        cls, wanted: Mapping[str, ReferenceHashes], session: AsyncClientSession | None = None
    ) -> list[Self]:
        """Those who have a reference, in any spelling. wanted: its hashes by gallery."""
        return await cls.find(cls.holding(wanted), session=session).to_list()

    @classmethod
    def holding(cls, wanted: Mapping[str, ReferenceHashes]) -> dict[str, Any]:
        """The filter for those who have a reference, in any spelling."""
        galleries = {"$in": list(wanted)}
        equal = [hashes.equal for hashes in wanted.values()]
        either = list({*equal, *(hashes.exact for hashes in wanted.values())})
        # The types too: without an index's own condition MongoDB would not use it, and read the whole gallery.
        sides = [
            {"gallery_id": galleries, "external_ref_hash": {"$in": either, "$type": "binData"}},
            {"gallery_id": galleries, "external_ref_equal": {"$in": equal, "$type": "binData"}},
        ]
        return {"$or": sides}

    @classmethod
    async def seen(cls, identity_id: str, galleries: Collection[str] | None) -> Self | None:
        """The identity, if it lies in one of the galleries (ids; None: all), unless it is unknown or erased."""
        return await cls.find_one({"_id": identity_id, "status": {"$ne": "erased"}, **within(galleries)})

    @classmethod
    async def by_job(cls, job_id: str, galleries: Collection[str] | None) -> Self | None:
        """The identity that a screening job is about, if it lies in one of the galleries (ids; None: all)."""
        return await cls.find_one({"screenings.job_id": job_id, "status": {"$ne": "erased"}, **within(galleries)})

    @classmethod
    async def living_among(cls, ids: Sequence[str], session: AsyncClientSession | None = None) -> dict[str, Self]:
        """Those of the ids that are not erased, by id."""
        found = cls.find({"_id": {"$in": list(ids)}, "status": {"$ne": "erased"}}, session=session)
        return {identity.id: identity for identity in await found.to_list()}

    @classmethod
    async def sealed_templates(cls, ids: Sequence[str]) -> dict[str, SealedTemplates]:
        """The templates of those of the ids that are not erased, without the rest, which costs ten times as much."""
        rows = cls.get_pymongo_collection().find(
            {"_id": {"$in": list(ids)}, "status": {"$ne": "erased"}},
            {"wrapped_key": 1, "samples.id": 1, "samples.template": 1, "samples.contract": 1},
        )
        return {
            row["_id"]: SealedTemplates(
                row["wrapped_key"], {s["id"]: (s["template"], s["contract"]) for s in row["samples"]}
            )
            async for row in rows
        }

    @classmethod
    async def count_tagged(cls, gallery_id: str, tag: bytes) -> int:
        """How many people have this tag."""
        return await cls.get_pymongo_collection().count_documents({"gallery_id": gallery_id, "name_tags": tag})

    @classmethod
    async def look_through(
        cls, gallery_id: str, tag: bytes, place: LookedAt | None, limit: int
    ) -> tuple[list[SealedLookups], LookedAt | None]:
        """Of the next `limit` people those without this tag who have attributes, and how far this got; None at the end.

        The oldest come first. It reads no more than these, however few of them are without the tag.
        """
        filters: dict[str, Any] = {"gallery_id": gallery_id}
        if place is not None:
            filters["created_at"] = {"$gte": place.created_at}
            behind = {"created_at": place.created_at, "_id": {"$gt": place.identity_id}}
            filters["$or"] = [{"created_at": {"$gt": place.created_at}}, behind]
        is_due = {
            "$and": [
                {"$not": [{"$in": [tag, {"$ifNull": ["$name_tags", []]}]}]},
                {"$eq": [{"$type": "$attributes"}, "binData"]},
            ]
        }
        wanted = ("wrapped_key", "attributes", "external_ref_hash", "external_ref_equal")
        stages: list[dict[str, Any]] = [
            {"$match": filters},
            {"$sort": {"created_at": 1, "_id": 1}},
            {"$limit": limit},
            {"$project": {"created_at": 1} | {name: {"$cond": [is_due, f"${name}", "$$REMOVE"]} for name in wanted}},
        ]
        hint = {"gallery_id": 1, "created_at": -1, "_id": -1}
        rows = await (await cls.get_pymongo_collection().aggregate(stages, hint=hint)).to_list()
        due = [
            SealedLookups(
                row["_id"], row.get("wrapped_key"), row["attributes"], row.get("external_ref_hash"),
                row.get("external_ref_equal"),
            )
            for row in rows
            if "attributes" in row
        ]  # fmt: skip
        return due, LookedAt(rows[-1]["created_at"], rows[-1]["_id"]) if len(rows) == limit else None

    @classmethod
    async def renew_lookups(cls, renewed: Sequence[tuple[SealedLookups, Mapping[str, object]]]) -> int:
        """Set the fields of each, unless its attributes have changed; the number of those that were changed.

        The version stays: what officers know of a person does not change.
        """
        if not renewed:
            return 0
        updates = [UpdateOne(known.unchanged, {"$set": dict(fields)}) for known, fields in renewed]
        return int((await cls.get_pymongo_collection().bulk_write(updates, ordered=False)).modified_count)

    @classmethod
    async def renew_lookup(cls, known: SealedLookups, fields: Mapping[str, object]) -> int:
        """As `renew_lookups`, of one person. Raises DuplicateKeyError where the reference's hash is taken."""
        result = await cls.get_pymongo_collection().update_one(known.unchanged, {"$set": dict(fields)})
        return int(result.modified_count)

    @classmethod
    async def forget_stray_references(cls, gallery_id: str) -> None:
        """Delete what an older process left of an erased person's reference, because it knows one hash only."""
        await cls.get_pymongo_collection().update_many(
            {"gallery_id": gallery_id, "external_ref_equal": {"$type": "binData"}, "status": "erased"},
            {"$set": {"external_ref_equal": None}},
        )

    @classmethod
    async def seqs_of_several(cls, gallery_id: str, limit: int) -> AsyncIterator[list[int]]:
        """The seqs of each identity's samples, for at most `limit` identities that have several."""
        rows = cls.get_pymongo_collection().find(
            {"gallery_id": gallery_id, "status": {"$ne": "erased"}, **_WITH_SEVERAL_SAMPLES}, {"samples.seq": 1}
        )
        async for row in rows.limit(limit):
            yield sorted(sample["seq"] for sample in row["samples"])

    @classmethod
    async def statuses(cls, ids: Sequence[str], session: AsyncClientSession | None = None) -> dict[str, Status]:
        """How each of the ids stands, erased ones too; unknown ones are absent."""
        rows = cls.get_pymongo_collection().find({"_id": {"$in": list(ids)}}, {"status": 1}, session=session)
        return {row["_id"]: row["status"] async for row in rows}

    @classmethod
    async def sample_ids_of(cls, ids: Sequence[str], session: AsyncClientSession | None = None) -> set[str]:
        """The ids of the samples of these identities."""
        rows = cls.get_pymongo_collection().find({"_id": {"$in": list(ids)}}, {"samples.id": 1}, session=session)
        return {sample["id"] async for row in rows for sample in row["samples"]}

    @classmethod
    async def photo_keys_of(cls, ids: Sequence[str]) -> dict[str, tuple[str, set[str]]]:
        """The gallery of each of the ids, erased ones too, and the keys of the photos that its samples name."""
        fields = {"gallery_id": 1, "samples.photo_key": 1}
        rows = cls.get_pymongo_collection().find({"_id": {"$in": list(ids)}}, fields)
        return {row["_id"]: (row["gallery_id"], {s["photo_key"] for s in row["samples"]}) async for row in rows}

    @classmethod
    async def wrapped_before(
        cls, gallery_id: str, generation: int, limit: int, session: AsyncClientSession | None = None
    ) -> list[tuple[str, bytes]]:
        """Identities whose data key an older generation of the gallery's key wrapped, with that wrapped key; at most `limit`."""
        rows = cls.get_pymongo_collection().find(
            {"gallery_id": gallery_id, "key_generation": {"$lt": generation}}, {"wrapped_key": 1}, session=session
        )
        return [(row["_id"], row["wrapped_key"]) async for row in rows.limit(limit)]

    @classmethod
    async def count_by_generation(cls, gallery_id: str) -> dict[int, int]:
        """How many data keys each generation of the gallery's key has wrapped."""
        stages: list[dict[str, Any]] = [
            {"$match": {"gallery_id": gallery_id, "key_generation": {"$type": "number"}}},
            {"$group": {"_id": "$key_generation", "count": {"$sum": 1}}},
        ]
        rows = await cls.get_pymongo_collection().aggregate(stages)
        return {row["_id"]: row["count"] async for row in rows}

    @classmethod
    async def kept_since_before(cls, gallery_id: str, moment: datetime, limit: int) -> list[str]:
        """The ids of those who were enrolled before that moment, the oldest first; at most `limit`."""
        rows = cls.get_pymongo_collection().find(
            {"gallery_id": gallery_id, "status": {"$in": LIVING}, "created_at": {"$lt": moment}}, {"_id": 1}
        )
        return [row["_id"] async for row in rows.sort("created_at").limit(limit)]

    @classmethod
    async def is_older(cls, identity_id: str, span: timedelta, session: AsyncClientSession) -> bool:
        """Whether the enrolment is older than the span, by MongoDB's clock at the moment of this statement."""
        is_over = {"$expr": {"$lt": ["$created_at", from_now(-span)]}}
        found = await cls.get_pymongo_collection().find_one(
            {"_id": identity_id, **is_over}, {"_id": 1}, session=session
        )
        return found is not None

    @classmethod
    async def count_kept_since_before(cls, gallery_id: str, moment: datetime) -> int:
        """How many people were enrolled before that moment and are not erased."""
        return await cls.find(
            {"gallery_id": gallery_id, "status": {"$in": LIVING}, "created_at": {"$lt": moment}}
        ).count()

    @classmethod
    async def after(cls, gallery_id: str, identity_id: str, limit: int) -> list[Self]:
        """The gallery's identities with greater ids than this one, by id, without those erased; at most `limit`."""
        found = cls.find({"gallery_id": gallery_id, "status": {"$ne": "erased"}, "_id": {"$gt": identity_id}})
        return await found.sort("_id").limit(limit).to_list()

    @classmethod
    async def count_samples(cls, gallery_id: str, contract: str) -> int:
        """How many samples of the gallery have a template of that model."""
        stages: list[dict[str, Any]] = [
            {"$match": {"gallery_id": gallery_id, "samples.contract": contract}},
            {"$project": {"count": {"$size": {"$filter": {
                "input": "$samples", "as": "s", "cond": {"$eq": ["$$s.contract", contract]},
            }}}}},
            {"$group": {"_id": None, "count": {"$sum": "$count"}}},
        ]  # fmt: skip
        rows = await (await cls.get_pymongo_collection().aggregate(stages)).to_list()
        return int(rows[0]["count"]) if rows else 0

    @classmethod
    async def overdue(cls, moment: datetime, limit: int) -> list[Self]:
        """Identities whose queued screening should have run by now, if their status allows one.

        A time further ahead than PUT_OFF_AT_MOST was written by a clock that was ahead: it counts as due.
        """
        times = [{"outbox_at": {"$lte": moment}}, {"outbox_at": {"$gt": moment + PUT_OFF_AT_MOST}}]
        due = {"$or": times, "status": {"$in": ["pending", "active"]}}
        return await cls.find(due).sort("outbox_at").limit(limit).to_list()

    @classmethod
    async def longest_due(cls) -> datetime | None:
        """The oldest due time among the screenings that are first in line; None when none waits.

        Sweeps move `outbox_at` on. The screening's own `due_at` stays as it was.
        """
        rows = cls.get_pymongo_collection().find(
            {"outbox_at": {"$type": "date"}, "status": {"$in": ["pending", "active"]}},
            {"screenings.state": 1, "screenings.due_at": 1},
        )
        first = [row async for row in rows.sort("outbox_at").limit(FIRST_IN_LINE)]
        due = [s["due_at"] for row in first for s in row["screenings"] if s["state"] in ("queued", "running")]
        return min(due, default=None)

    @classmethod
    async def count_failed(cls) -> int:
        """Those whose screening was given up: they wait for an operator."""
        return await cls.find({"status": "failed"}).count()

    @classmethod
    async def touch_living(cls, ids: Sequence[str], session: AsyncClientSession) -> bool:
        """Write to each of the ids, so that a transaction that erases or activates one conflicts; False if one is erased."""
        if not ids:
            return True
        result = await cls.get_pymongo_collection().update_many(
            {"_id": {"$in": list(ids)}, "status": {"$ne": "erased"}}, {"$inc": {"touch": 1}}, session=session
        )
        return bool(result.matched_count == len(set(ids)))

    async def change(self, session: AsyncClientSession, fields: dict[str, Any]) -> bool:
        """`$set` the fields and raise the version, if it still is what it was when this was read.

        Values are frozen models or plain BSON values. False when somebody else was first.
        """
        result = await self.get_pymongo_collection().update_one(
            {"_id": self.id, "version": self.version},
            {"$set": {**_plain(fields), "updated_at": now()}, "$inc": {"version": 1}},
            session=session,
        )
        return bool(result.matched_count)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Frozen models as the documents that MongoDB stores."""

    def plain(value: object) -> object:
        if isinstance(value, BaseModel):
            return value.model_dump()
        return [plain(item) for item in value] if isinstance(value, list) else value

    return {name: plain(value) for name, value in fields.items()}
