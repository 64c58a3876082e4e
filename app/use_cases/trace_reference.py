"""Trace: find the events that name a reference. The log contains references only as keyed hashes."""

from collections.abc import AsyncIterator, Mapping
from typing import Final, NamedTuple

from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.sealed import gallery_key
from app.domain.attributes import canonical_ref
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

    Events of erased people cannot be found: their salts are deleted.
    """
    gallery = await Gallery.require(gallery_name)
    hashed = gallery_key(runtime.keys, gallery).lookup_hash("external_ref", canonical_ref(reference)).hex()
    events = AuditEvent.find({"gallery": gallery_name, "action": {"$in": ACTIONS}, "personal": {"$ne": None}})
    async for event in events.sort("+time", "+_id"):
        wanted = None if event.personal is None else personal_hash(event.personal.salt, hashed)
        for place, value in _references(event).items():
            if value == wanted:
                yield Named(event, place)


def _references(event: AuditEvent) -> Mapping[str, object]:
    changes = event.detail.get("changes")
    change = changes.get("external_ref") if isinstance(changes, dict) else None
    return {"given": event.detail.get("external_ref"), **(change if isinstance(change, dict) else {})}
