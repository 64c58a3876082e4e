"""Where values lie that the key-encryption key itself has sealed: what a change of that key must seal anew."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from beanie import Document

from app.documents.accounts import SigningKey, User, signing_key_bound, totp_bound
from app.documents.galleries import Gallery
from app.documents.root_secret import ROOT_BOUND, RootSecret
from app.documents.tree import AuditKey
from app.keys import gallery_key_bound, gallery_root_bound

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MasterSealed:
    """One field of one kind of document.

    field: dotted; a last part `*` stands for every name in that object. bound: what the value is tied to, from the document as
    it is stored.
    """

    document: type[Document]
    field: str
    bound: Callable[[Row], bytes]

    async def values(self) -> AsyncIterator["SealedValue"]:
        """Every value of the field that there is."""
        parent = self.field.removesuffix(".*")
        async for row in self.document.get_pymongo_collection().find({parent: {"$ne": None}}).sort("_id"):
            for field, sealed in self._in(row):
                yield SealedValue(self.document, row["_id"], field, sealed, self.bound(row))

    def _in(self, row: Row) -> Iterator[tuple[str, bytes]]:
        parent = self.field.removesuffix(".*")
        value: Any = row
        for part in parent.split("."):
            value = value[part]
        if parent == self.field:
            yield self.field, value
        else:
            yield from ((f"{parent}.{name}", sealed) for name, sealed in value.items())


@dataclass(frozen=True, slots=True)
class SealedValue:
    """One sealed value, where it lies, and what it is bound to."""

    document: type[Document]
    id: Any
    field: str
    sealed: bytes
    bound: bytes


#: Whoever stores what `KeyRing.seal_with_master` gave adds a line.
MASTER_SEALED: Final[tuple[MasterSealed, ...]] = (
    MasterSealed(RootSecret, "sealed", lambda _: ROOT_BOUND),
    MasterSealed(Gallery, "wrapped_keys.root", lambda row: gallery_root_bound(row["_id"])),
    MasterSealed(Gallery, "wrapped_keys.generations.*", lambda row: gallery_key_bound(row["_id"])),
    MasterSealed(SigningKey, "sealed_private", lambda row: signing_key_bound(row["_id"])),
    MasterSealed(User, "sealed_totp", lambda row: totp_bound(row["_id"])),
    MasterSealed(AuditKey, "sealed_private", lambda row: AuditKey.bound(row["_id"])),
)
