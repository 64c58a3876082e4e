"""The Merkle tree over the audit log: its size, its nodes, its signed heads, and the keys that sign them."""

import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import ClassVar, Final, NamedTuple, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field
from pymongo import IndexModel
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from app.documents.base import Stored, as_text, now
from app.documents.events import AuditEvent
from app.domain.log_check import Head
from app.domain.log_export import canonical, head_bytes
from app.domain.merkle import Growth, Node, fold
from app.keys import KeyRing

#: Where heads and public keys lie in the evidence store.
HEADS: Final = "heads/"
KEYS: Final = "keys/"

_TREE_ID: Final = "tree"
_HEAD_NAME: Final = re.compile(
    rf"{HEADS}[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}/[0-9]{{9}}-([0-9]{{12,18}})-([0-9a-f]{{16}})\.json"
)


class AuditTree(Stored):
    """The one tree: every growth compares and sets this document, so that no event is numbered twice or passed over.

    peaks: hashes of its complete subtrees, the largest first. signed_*: of the newest head, None before the first.
    forgotten_until: events before that have no personal values left.
    """

    size: int = 0
    peaks: list[bytes] = Field(default_factory=list)
    signed_size: int | None = None
    signed_at: datetime | None = None
    signed_by: str | None = None
    forgotten_until: datetime | None = None

    class Settings(Stored.Settings):
        """Collection; asked by its id only."""

        name = "audit_tree"

    @classmethod
    async def current(cls, session: AsyncClientSession | None = None) -> Self:
        """The tree as it stands."""
        tree = await cls.get(_TREE_ID, session=session)
        assert tree is not None  # noqa: S101 - made when a process opens the store
        return tree

    @classmethod
    async def ensure(cls) -> None:
        """Make the empty tree where there is none."""
        if await cls.get(_TREE_ID) is None:
            try:
                await cls(id=_TREE_ID).insert()
            except DuplicateKeyError:
                return  # another process was faster

    def growth(self) -> Growth:
        """The tree, to be grown."""
        return Growth(self.size, self.peaks)


class TreeNode(Stored):
    """The hash of one complete subtree above the leaves; its id is `level:place`. Written once."""

    hash: bytes

    class Settings(Stored.Settings):
        """Collection; asked by id only."""

        name = "audit_nodes"

    @staticmethod
    def name(node: Node) -> str:
        """A node's id."""
        return f"{node[0]}:{node[1]}"


class AuditKey(Stored):
    """A key that signs tree heads; its id is the beginning of its public key's SHA-256. One is in use, none is ever deleted.

    sealed_private: under the key-encryption key; None once it was replaced, so that it signs nothing any more. is_delivered:
    whether its public part lies in the evidence store, where a restore does not forget it.
    """

    public: bytes
    sealed_private: bytes | None
    is_active: bool = True
    is_delivered: bool = False
    created_at: datetime
    retired_at: datetime | None = None

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "audit_keys"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel("is_active", unique=True, partialFilterExpression={"is_active": True})
        ]

    @classmethod
    def fresh(cls, keys: KeyRing) -> Self:
        """A new key, sealed."""
        private = Ed25519PrivateKey.generate()
        public = private.public_key().public_bytes_raw()
        id_ = hashlib.sha256(public).hexdigest()[:16]
        sealed = keys.seal_with_master(private.private_bytes_raw(), cls.bound(id_))
        return cls(id=id_, public=public, sealed_private=sealed, created_at=now())

    @classmethod
    async def active(cls, session: AsyncClientSession | None = None) -> Self:
        """The key in use."""
        key = await cls.find_one({"is_active": True}, session=session)
        assert key is not None  # noqa: S101 - made when a process opens the store
        return key

    @classmethod
    async def ensure(cls, keys: KeyRing) -> None:
        """Make the first key where there is none."""
        if await cls.find_one({"is_active": True}) is None:
            try:
                await cls.fresh(keys).insert()
            except DuplicateKeyError:
                return  # another process was faster

    @classmethod
    async def undelivered(cls) -> list[Self]:
        """Keys whose public part the evidence store does not hold yet."""
        return await cls.find({"is_delivered": {"$ne": True}}).to_list()

    @property
    def evidence(self) -> tuple[str, bytes]:
        """The name and the bytes that its public part has in the evidence store: a line as `idem audit key` prints it."""
        return f"{KEYS}{self.id}.txt", f"{self.id} {self.public.hex()}\n".encode()

    def sign(self, keys: KeyRing, message: bytes) -> bytes:
        """The message's Ed25519 signature; 64 bytes. Raises SealBroken; ValueError when the key is no longer in use."""
        if self.sealed_private is None:
            message_ = f"audit key {self.id} was replaced"
            raise ValueError(message_)
        return Ed25519PrivateKey.from_private_bytes(
            keys.open_with_master(self.sealed_private, self.bound(self.id))
        ).sign(message)

    @staticmethod
    def bound(key_id: str) -> bytes:
        """Where the sealed private key opens, and nowhere else."""
        return f"idem/1|audit-key|{key_id}".encode()


class TreeHead(Stored):
    """A signed tree head; at most one for each size and key.

    is_delivered: whether nothing is left to upload for it. is_superseded: whether it is not in the evidence store itself. A
    head of the same key over at least as many events is there, and proves it.
    """

    size: int
    root_hash: str
    time: datetime
    key_id: str
    signature: str
    is_delivered: bool = False
    is_superseded: bool = False

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "audit_heads"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("size", -1), ("time", -1)]),
            IndexModel([("is_delivered", 1), ("time", 1)], partialFilterExpression={"is_delivered": False}),
        ]

    @classmethod
    def signed(cls, tree: AuditTree, key: AuditKey, keys: KeyRing, time: datetime) -> Self:
        """A head over the tree as it stands. Raises SealBroken."""
        root = fold(tree.peaks).hex()
        signature = key.sign(keys, head_bytes(tree.size, root, as_text(time), key.id)).hex()
        id_ = f"{tree.size:012d}-{key.id}"
        return cls(id=id_, size=tree.size, root_hash=root, time=time, key_id=key.id, signature=signature)

    @classmethod
    async def newest(cls) -> Self | None:
        """The newest head: the one over the most events. None before the first.

        Times do not decide: a clock that was ahead may have given an older head a later time.
        """
        return await cls.find_all().sort("-size", "-time").first_or_none()

    @classmethod
    async def undelivered(cls) -> Self | None:
        """Among the heads that are still to be uploaded, the one over the most events."""
        return await cls.find({"is_delivered": False}).sort("-size", "-time").first_or_none()

    @classmethod
    async def waiting(cls, before: datetime | None = None) -> int:
        """How many heads are still to be uploaded. before: only heads signed before that moment."""
        late = {} if before is None else {"time": {"$lt": before}}
        return await cls.get_pymongo_collection().count_documents({"is_delivered": False, **late})

    @classmethod
    async def newest_outside(cls) -> Self | None:
        """Among the heads in the evidence store, the one over the most events."""
        outside = {"is_delivered": True, "is_superseded": {"$ne": True}}
        return await cls.find(outside).sort("-size", "-time").first_or_none()

    @classmethod
    async def outside(cls) -> AsyncIterator[Self]:
        """All heads that should be in the evidence store, by size."""
        async for head in cls.find({"is_delivered": True, "is_superseded": {"$ne": True}}).sort("+size", "+time"):
            yield head

    async def delivered(self) -> None:
        """Mark the head as uploaded. It proves heads of the same key over no more events: they need no upload any more."""
        heads = self.get_pymongo_collection()
        await heads.update_one({"_id": self.id}, {"$set": {"is_delivered": True}})
        earlier = {"is_delivered": False, "key_id": self.key_id, "size": {"$lte": self.size}}
        await heads.update_many(earlier, {"$set": {"is_delivered": True, "is_superseded": True}})

    @property
    def head(self) -> Head:
        """The head as it is shown and checked."""
        return Head(self.size, self.root_hash, as_text(self.time), self.key_id, self.signature)

    @property
    def evidence(self) -> tuple[str, bytes]:
        """The name and the bytes that it has in the evidence store."""
        return KeptHead.name_of(self.head), canonical(self.head.as_json())


class KeptHead(NamedTuple):
    """A head in the evidence store, by its name alone. Names are in the order of the heads' times."""

    name: str
    size: int
    key_id: str

    @classmethod
    def named(cls, name: str) -> Self | None:
        """None for a name that no head has."""
        known = _HEAD_NAME.fullmatch(name)
        return None if known is None else cls(name, int(known[1]), known[2])

    @classmethod
    def name_of(cls, head: Head) -> str:
        """The name that a head has there."""
        return f"{cls.names_at(head.time)}-{head.size:012d}-{head.key_id}.json"

    @staticmethod
    def names_at(time: str) -> str:
        """How the names of heads of that time (as the contract writes it) begin."""
        day, _, clock = time.partition("T")
        return HEADS + day + "/" + clock.translate(str.maketrans("", "", ":.Z"))


TREE_DOCUMENTS = [AuditTree, TreeNode, AuditKey, TreeHead]


async def node_hashes(nodes: Sequence[Node]) -> dict[Node, bytes]:
    """The hashes of these nodes, which must be complete: leaves from their events, the others from where growth put them.

    Raises KeyError when one is missing, which no growth leaves behind.
    """
    found: dict[Node, bytes] = {}
    if leaves := [place for level, place in nodes if level == 0]:
        rows = AuditEvent.get_pymongo_collection().find({"seq": {"$in": leaves}}, {"seq": 1, "leaf_hash": 1, "_id": 0})
        found |= {(0, row["seq"]): bytes.fromhex(row["leaf_hash"]) async for row in rows}
    if inner := {TreeNode.name(node): node for node in nodes if node[0]}:
        rows = TreeNode.get_pymongo_collection().find({"_id": {"$in": list(inner)}})
        found |= {inner[row["_id"]]: row["hash"] async for row in rows}
    return {node: found[node] for node in nodes}


async def proof(path: Sequence[Sequence[Node]]) -> list[bytes]:
    """The hashes of a path, each folded from its subtrees; a few reads in two questions, whatever the tree's size."""
    hashes = await node_hashes([node for parts in path for node in parts])
    return [fold([hashes[node] for node in parts]) for parts in path]
