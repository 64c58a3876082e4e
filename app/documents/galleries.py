"""A gallery: a population kept apart, and the head that orders every change of its vectors."""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import ClassVar, Literal, NamedTuple, Self

from beanie import Document
from pydantic import field_validator
from pymongo import IndexModel
from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import Stored, Value, new_id, now
from app.documents.migrations import current_policy
from app.domain.faces import ModelCard
from app.domain.policy import GalleryPolicy
from app.domain.policy_changes import PendingField
from app.errors import NotFound
from app.keys import WrappedKeys

DEFAULT_GALLERY = "default"
OWNERS_AT_ONCE = 5000
#: Beginning of `contract` while a gallery moves; the former and the new contract follow. `replacing`: some templates may have
#: been replaced already.
_MOVING, _REPLACING = "moving|", "replacing|"
#: Fields of the policy that are scores of one model.
THRESHOLDS_BY_HAND = ("verify_threshold", "identify_threshold", "dedup_threshold")


class Generation(Value):
    """Index files that hold every vector up to `watermark`.

    number: the publisher's fence, so it rises and may skip. digest: SHA-256 of the manifest, which holds those of the files.
    rotation: names the secret matrix that turned the vectors. recall: the share of planted and real pairs that the index
    found; recall_bound: what it is at least, with 95% confidence. removed: the head's count of removals when it was built.
    """

    number: int
    digest: str
    kind: Literal["exact", "faiss"]
    rotation: str
    watermark: int
    count: int
    removed: int
    recall: float
    recall_bound: float
    built_at: datetime


class Fault(Value):
    """A generation that a reader refused: it is to be built anew from the documents."""

    number: int
    reason: str
    found_at: datetime


class PendingChange(Value):
    """A policy change that waits. It takes effect after `effective_at`, and only when an officer has agreed.

    old: the field's value when the change was asked for. asked_by, agreed_by: callers' ids, never the same. All times are
    MongoDB's.
    """

    id: str
    field: PendingField
    old: int | bool | None
    value: int | bool
    asked_by: str
    asked_at: datetime
    effective_at: datetime
    agreed_by: str | None = None
    agreed_at: datetime | None = None


class Gallery(Stored):
    """One document, read by every query: the head is `epoch`, `seq`, `contract`, `policy_version`, `published`.

    `seq` is taken in the transaction that changes vectors, so its order is commit order. `epoch` is random and new
    after a restore or re-creation: whatever belongs to another epoch is refused. `identities` and `samples` count
    what is not erased, `removed` the vectors ever taken out, kept by the same transactions. `published` is the newest
    generation of the index, `previous` the one before it, as long as its files may stay; `fault` what is wrong with the newest.
    `purge_by`: when index files that hold an erased person's vectors must be gone. `wrapped_keys`: what opens its people's data
    keys, and what it looks up by. `policy` is in force; `pending` is a change of it that waits.
    `retention_held_until`: retention erases nobody before this time.
    """

    name: str
    pack: str
    dimension: int
    contract: str
    licence: str
    policy: GalleryPolicy
    policy_version: int = 1
    pending: PendingChange | None = None
    retention_held_until: datetime | None = None
    epoch: str
    seq: int = 0
    published: Generation | None = None
    previous: Generation | None = None
    fault: Fault | None = None
    purge_by: datetime | None = None
    identities: int = 0
    samples: int = 0
    removed: int = 0
    wrapped_keys: WrappedKeys
    created_at: datetime
    updated_at: datetime

    @field_validator("policy", mode="before")
    @classmethod
    def _in_todays_shape(cls, policy: object) -> object:
        return current_policy(policy) if isinstance(policy, dict) else policy

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "galleries"
        indexes: ClassVar[list[IndexModel]] = [IndexModel("name", unique=True)]

    @classmethod
    def fresh(cls, name: str, card: ModelCard, policy: GalleryPolicy, *, id_: str, wrapped_keys: WrappedKeys) -> Self:
        """A new, empty gallery bound to a model."""
        moment = now()
        return cls(
            id=id_,
            name=name,
            pack=card.pack,
            dimension=card.dimension,
            contract=card.contract,
            licence=card.licence,
            policy=policy,
            epoch=new_id(),
            wrapped_keys=wrapped_keys,
            created_at=moment,
            updated_at=moment,
        )

    @classmethod
    async def named(cls, name: str, galleries: Collection[str] | None = None) -> Self | None:
        """The gallery of that name, if it is one of these (ids; None: all)."""
        return await cls.find_one(
            {"name": name} if galleries is None else {"name": name, "_id": {"$in": list(galleries)}}
        )

    @classmethod
    async def require(cls, name: str) -> Self:
        """The gallery of that name. Raises NotFound."""
        gallery = await cls.named(name)
        if gallery is None:
            raise NotFound(f"There is no gallery {name!r}.")
        return gallery

    @classmethod
    async def names_by_id(cls, ids: Collection[str], session: AsyncClientSession | None = None) -> dict[str, str]:
        """Names for answers, by id. A gallery that is gone is left out."""
        if not ids:
            return {}
        rows = cls.get_pymongo_collection().find({"_id": {"$in": sorted(set(ids))}}, {"name": 1}, session=session)
        return {row["_id"]: row["name"] async for row in rows}

    @classmethod
    async def ids_by_name(cls, names: Collection[str], session: AsyncClientSession | None = None) -> dict[str, str]:
        """Ids by name. A name that no gallery has is left out."""
        if not names:
            return {}
        rows = cls.get_pymongo_collection().find({"name": {"$in": sorted(set(names))}}, {"name": 1}, session=session)
        return {row["name"]: row["_id"] async for row in rows}

    @classmethod
    async def made(cls, ids: Collection[str]) -> dict[str, datetime]:
        """When these galleries were made, by name."""
        rows = cls.get_pymongo_collection().find({"_id": {"$in": sorted(ids)}}, {"name": 1, "created_at": 1})
        return {row["name"]: row["created_at"] async for row in rows}

    @classmethod
    async def of_another_model(cls, contract: str, *, also: Sequence[str] = ()) -> list[Self]:
        """The galleries whose templates were made under another contract, or that are being moved; by name. also: further ids."""
        chosen = [{"contract": {"$ne": contract}}, {"_id": {"$in": list(also)}}]
        return await cls.find({"$or": chosen}).sort("name").to_list()

    @property
    def moves_to(self) -> str | None:
        """The contract that the gallery is being moved to; None outside a move."""
        return self.contract.rpartition("|")[2] if self.contract.startswith((_MOVING, _REPLACING)) else None

    @property
    def is_replacing(self) -> bool:
        """Whether some of its templates may be those of another model than `moved_from`."""
        return self.contract.startswith(_REPLACING)

    @property
    def moved_from(self) -> str:
        """The contract of the gallery's templates; during a move, the former one."""
        return self.contract if self.moves_to is None else self.contract.split("|")[1]

    async def start_to_move(self, contract: str, session: AsyncClientSession) -> bool:
        """Close the gallery for a move. False when its contract or epoch has changed since it was read.

        `contract` then names no model. So processes of every version refuse to enrol, screen and search.
        """
        state = _REPLACING if self.is_replacing else _MOVING
        return await self._bind(f"{state}{self.moved_from}|{contract}", {}, session)

    async def start_to_replace(self, session: AsyncClientSession) -> bool:
        """Note, before the first template is replaced, that the gallery can no longer open under its former model."""
        return await self._bind(f"{_REPLACING}{self.moved_from}|{self.moves_to}", {}, session)

    async def stay(self, session: AsyncClientSession) -> bool:
        """Open a closed gallery again under its former model. It must not be replacing templates already."""
        return await self._bind(self.moved_from, {}, session)

    async def end_to_move(self, card: ModelCard, session: AsyncClientSession) -> bool:
        """Bind the gallery to the model under a new epoch, so that every process loads its vectors again.

        Thresholds that were set by hand are reset: they were scores of the former model.
        """
        fields: dict[str, object] = {
            "pack": card.pack, "dimension": card.dimension, "licence": card.licence, "epoch": new_id(),
            "published": None, "previous": None, "fault": None, "updated_at": now(),
            **{f"policy.{name}": None for name in THRESHOLDS_BY_HAND},
        }  # fmt: skip
        return await self._bind(card.contract, fields, session)

    async def _bind(self, contract: str, fields: dict[str, object], session: AsyncClientSession) -> bool:
        changed = await self.get_pymongo_collection().update_one(
            {"_id": self.id, "contract": self.contract, "epoch": self.epoch},
            {"$set": {**fields, "contract": contract}, "$inc": {"policy_version": 1 if fields else 0}},
            session=session,
        )
        return bool(changed.matched_count)

    async def take_seq(
        self, session: AsyncClientSession, rows: int, *, identities: int = 0, samples: int = 0, removed: int = 0
    ) -> int | None:
        """Take `rows` numbers for changes in this transaction; returns the first.

        None when the gallery is gone, or of another epoch or contract than when it was read. Afterwards `wrapped_keys` are those
        of this transaction: a data key that is wrapped now is not wrapped with one that is about to go.
        """
        head = await self.get_pymongo_collection().find_one_and_update(
            {"_id": self.id, "epoch": self.epoch, "contract": self.contract},
            {"$inc": {"seq": rows, "identities": identities, "samples": samples, "removed": removed}},
            projection={"seq": 1, "wrapped_keys": 1},
            session=session,
        )
        if head is None:
            return None
        self.wrapped_keys = WrappedKeys.model_validate(head["wrapped_keys"])
        return int(head["seq"]) + 1

    async def purge_files(self, session: AsyncClientSession, seqs: Sequence[int], deadline: datetime) -> None:
        """Have index files that hold one of these vectors gone by the deadline, or by the earlier one that is set already."""
        await self.get_pymongo_collection().update_one(
            {"_id": self.id, "published.watermark": {"$gte": min(seqs, default=0)}, "purge_by": None},
            {"$set": {"purge_by": deadline}},
            session=session,
        )

    @property
    def publishing(self) -> str:
        """The name of the lease that the publisher of its index holds."""
        return f"publish:{self.id}"

    @property
    def files(self) -> set[tuple[str, int]]:
        """The generations whose files stay, by epoch and number."""
        return {(self.epoch, g.number) for g in (self.published, self.previous) if g is not None}

    @property
    def rotation(self) -> str:
        """The name of the rotation that turns its vectors."""
        return self.epoch if self.published is None else self.published.rotation

    @property
    def watermark(self) -> int:
        """How far the newest generation reaches; 0 without one."""
        return 0 if self.published is None else self.published.watermark

    async def report(self, number: int, reason: str) -> bool:
        """Tell that the newest generation is unusable; False when it is the newest no more, or told of already."""
        fault = Fault(number=number, reason=reason, found_at=now())
        result = await self.get_pymongo_collection().update_one(
            {"_id": self.id, "epoch": self.epoch, "published.number": number, "fault": None},
            {"$set": {"fault": fault.model_dump()}},
        )
        return bool(result.modified_count)

    async def set_policy(
        self, session: AsyncClientSession, policy: GalleryPolicy, pending: PendingChange | None
    ) -> bool:
        """Put a policy in force, and store the change that waits. False when another request changed either at the same time."""
        result = await self.get_pymongo_collection().update_one(
            {"_id": self.id, "policy_version": self.policy_version},
            {
                "$set": {
                    "policy": policy.model_dump(),
                    "pending": None if pending is None else pending.model_dump(),
                    "updated_at": now(),
                },
                "$inc": {"policy_version": 1},
            },
            session=session,
        )
        return bool(result.matched_count)

    @classmethod
    async def with_pending(cls) -> list[Self]:
        """The galleries whose policy has a change that waits."""
        return await cls.find({"pending": {"$type": "object"}}).to_list()

    async def store_time(self, session: AsyncClientSession | None = None) -> datetime:
        """The present by MongoDB's clock: a host whose clock is wrong must not shorten a wait."""
        rows = await self.get_pymongo_collection().aggregate(
            [{"$match": {"_id": self.id}}, {"$project": {"now": "$$NOW"}}], session=session
        )
        async for row in rows:
            moment: datetime = row["now"]
            return moment
        raise NotFound

    async def stands(self, session: AsyncClientSession) -> bool:
        """Whether epoch and contract still are what they were when the gallery was read."""
        found = await self.get_pymongo_collection().find_one(
            {"_id": self.id, "epoch": self.epoch, "contract": self.contract}, {"_id": 1}, session=session
        )
        return found is not None


class Change(NamedTuple):
    """A row as the index reads it; see GalleryChange."""

    seq: int
    kind: str
    identity_id: str | None
    sample_id: str | None
    removes: int | None


class GalleryChange(Document):
    """One change of a gallery's vectors. Rows are contiguous in `seq`; erasure blanks a row and keeps it.

    removes: the `seq` of the vector that a `remove` row takes out; that vector's own row is blank by then.
    """

    gallery_id: str
    seq: int
    kind: str  # add | remove | blank
    identity_id: str | None
    sample_id: str | None
    removes: int | None = None

    class Settings:
        """Collection and indexes."""

        name = "gallery_changes"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("gallery_id", 1), ("seq", 1)], unique=True),
            IndexModel([("gallery_id", 1), ("identity_id", 1)]),
        ]

    @classmethod
    async def after(cls, gallery_id: str, seq: int, upto: int, limit: int) -> list[Change]:
        """The rows in (seq, upto], in order; at most `limit`."""
        rows = cls.get_pymongo_collection().find(
            {"gallery_id": gallery_id, "seq": {"$gt": seq, "$lte": upto}}, {"_id": 0}
        )
        return [
            Change(row["seq"], row["kind"], row["identity_id"], row["sample_id"], row.get("removes"))
            async for row in rows.sort("seq").limit(limit)
        ]

    @classmethod
    async def take_out(
        cls,
        gallery_id: str,
        identity_id: str,
        samples: Sequence[tuple[str, int]],
        seq: int,
        session: AsyncClientSession,
    ) -> None:
        """Blank the rows that added these samples (id, seq). Add rows, from `seq` on, that remove their vectors."""
        if not samples:
            return
        added = {"gallery_id": gallery_id, "kind": "add", "seq": {"$in": [own for _, own in samples]}}
        blank = {"$set": {"kind": "blank", "identity_id": None, "sample_id": None}}
        await cls.get_pymongo_collection().update_many(added, blank, session=session)
        removals = [
            cls(gallery_id=gallery_id, seq=seq + i, kind="remove", identity_id=identity_id, sample_id=id_, removes=own)
            for i, (id_, own) in enumerate(samples)
        ]
        await cls.insert_many(removals, session=session)

    @classmethod
    async def owners(cls, gallery_id: str, seqs: Sequence[int]) -> dict[int, tuple[str, str]]:
        """Whose these vectors are, by seq: (identity, sample). A blank row's is absent: that person was erased."""
        owners: dict[int, tuple[str, str]] = {}
        for first in range(0, len(seqs), OWNERS_AT_ONCE):
            some = list(seqs[first : first + OWNERS_AT_ONCE])
            rows = cls.get_pymongo_collection().find(
                {"gallery_id": gallery_id, "seq": {"$in": some}, "kind": "add"},
                {"_id": 0, "seq": 1, "identity_id": 1, "sample_id": 1},
            )
            async for row in rows:
                owners[row["seq"]] = (row["identity_id"], row["sample_id"])
        return owners
