"""Trace: find the events that name a reference. The log contains references only as keyed hashes."""

from collections.abc import AsyncIterator, Mapping
from typing import Final, NamedTuple

from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.sealed import gallery_key, reference_hashes
from app.domain.log_export import personal_hash
from app.runtime import Runtime

#: Actions that set, propose or remove a reference, or claim to be the person who has it.
ACTIONS: Final = ("identity.enrol", "identity.update", "proposal.create", "face.verify")


class Named(NamedTuple):
    """An event that names the reference. place: the `old` or `new` value of a change, or `given`."""

    event: AuditEvent
    place: str


async def trace_reference(runtime: Runtime, gallery_name: str, reference: str) -> AsyncIterator[Named]:
    """The events of the gallery that name the reference, oldest first. Raises NotFound for an unknown gallery.

    Events from before December 2026 name it as it was spelt: they are found by that spelling.
    Events of erased people cannot be found: their salts are deleted.
    """
    gallery = await Gallery.require(gallery_name)
    hashes = reference_hashes(gallery_key(runtime.keys, gallery), reference)
    either = {hashes.equal.hex(), hashes.exact.hex()}
    events = AuditEvent.find({"gallery": gallery_name, "action": {"$in": ACTIONS}, "personal": {"$ne": None}})
    async for event in events.sort("+time", "+_id"):
        salt = None if event.personal is None else event.personal.salt
        wanted = set() if salt is None else {personal_hash(salt, hashed) for hashed in either}
        for place, value in _references(event).items():
            if value in wanted:
                yield Named(event, place)


def _references(event: AuditEvent) -> Mapping[str, object]:
    changes = event.detail.get("changes")
    change = changes.get("external_ref") if isinstance(changes, dict) else None
    return {"given": event.detail.get("external_ref"), **(change if isinstance(change, dict) else {})}
