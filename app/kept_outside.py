"""Compare the evidence store with what it must contain: public keys, tree heads, lines of the ledger of erasures.

The evidence store must survive a loss of the database. So its own loss must be noticed while the database can still complete
it. Without the ledger, a restored backup brings erased people back.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import structlog

from app.documents.deletions import LEDGER, Deletion
from app.documents.tree import KEYS, AuditKey, TreeHead
from app.keys import KeyRing
from storage.evidence import EvidenceExists, EvidenceNotFound, EvidenceStore

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Lost:
    """An object that is missing from the evidence store. data: its bytes, the same as before."""

    name: str
    data: bytes


async def lost(evidence: EvidenceStore, keys: KeyRing) -> AsyncIterator[Lost]:
    """Everything that is missing. Raises EvidenceUnavailable when the store does not answer."""
    there = set(await evidence.names(KEYS))
    async for key in AuditKey.find({"is_delivered": True}):
        name, data = key.evidence
        if name not in there and await _is_missing(evidence, name):
            yield Lost(name, data)
    there = set(await evidence.names(LEDGER))
    async for deletion in Deletion.outside():
        if deletion.ledger_name not in there and await _is_missing(evidence, deletion.ledger_name):
            yield Lost(deletion.ledger_name, deletion.ledger_line(keys))
    day = ""
    async for head in TreeHead.outside():
        name, data = head.evidence
        if (folder := name.rpartition("/")[0] + "/") != day:
            day, there = folder, set(await evidence.names(folder))
        if name not in there and await _is_missing(evidence, name):
            yield Lost(name, data)


async def lacks_something(evidence: EvidenceStore) -> bool:
    """Whether one of a few names is missing. Raises EvidenceUnavailable.

    Public keys are written once. So they show a loss of the whole store, even if other objects were added since.
    """
    names = [key.evidence[0] async for key in AuditKey.find({"is_delivered": True})]
    if (head := await TreeHead.newest_outside()) is not None:
        names.append(head.evidence[0])
    if (deletion := await Deletion.newest_outside()) is not None:
        names.append(deletion.ledger_name)
    for name in names:
        if await _is_missing(evidence, name):
            return True
    return False


async def write_again(evidence: EvidenceStore, one: Lost) -> None:
    """Put it back. Raises EvidenceUnavailable."""
    try:
        await evidence.append(one.name, one.data)
    except EvidenceExists:  # an object with other bytes is there: an auditor must see it
        log.critical("evidence_contradicted", name=one.name)


async def _is_missing(evidence: EvidenceStore, name: str) -> bool:
    """Whether the object is missing. Reads it by name: a listing may be older than the document."""
    try:
        await evidence.read(name)
    except EvidenceNotFound:
        return True
    return False
