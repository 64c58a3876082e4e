"""Export: everything that is kept about one person, for their access request; the export is an event itself.

Written piece by piece: a person may have many photos and thousands of events. Of other people it holds ids only. Templates are
told of and not given: nobody can read one, and whoever steals it could pass for the person.
"""

import base64
import json
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

from app.audit import Action
from app.documents.base import now
from app.documents.cases import Case, Pair
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.documents.identities import Identity, Sample, Screening
from app.documents.probes import Probe
from app.documents.proposals import IdentityProposal
from app.documents.removals import SampleRemoval
from app.documents.sealed import data_key, open_photo, shown_attributes
from app.errors import NotFound
from app.keys import DataKey, KeyRing, SealBroken
from app.readings import note_reading
from app.runtime import Runtime
from storage.photos import PhotoNotFound, PhotoStoreUnavailable

#: Scores in the log and in answers have two decimals; this one is as coarse.
SCORE_DECIMALS: Final = 2


async def export_subject(runtime: Runtime, action: Action, gallery: Gallery, identity_id: str) -> AsyncIterator[bytes]:
    """The export as the pieces of one JSON document. The event is written before the first. Raises NotFound, SealBroken."""
    identity = await Identity.living(identity_id)
    if identity is None:
        raise NotFound
    key = data_key(runtime.keys, gallery, identity)
    pages = {
        "exported_at": now(),
        "identity": _person(identity, gallery, runtime.keys),
        "screenings": [_screening(screening) for screening in identity.screenings],
        "pairs": [_pair(pair, identity.id) for pair in await Pair.of(identity.id)],
        "cases": [_case(case, identity.id) for case in await _cases_of(identity.id)],
        "proposals": [_proposal(one) for one in await IdentityProposal.find({"identity_id": identity.id}).to_list()],
        "probes": {"count": len(await Probe.recent(identity.id)), "kept_hours": runtime.settings.replay_window_hours},
        "removed_samples": [{"removed_at": moment} for moment in await SampleRemoval.of(identity.id)],
        "deletion": _deletion(runtime, gallery, identity),
    }
    await note_reading(
        runtime, action, {identity.id: gallery.name}, {"samples": len(identity.samples)}, identity_id=identity.id
    )  # fmt: skip
    return _written(runtime, identity, key, pages)


async def _written(
    runtime: Runtime, identity: Identity, key: DataKey, pages: Mapping[str, object]
) -> AsyncIterator[bytes]:
    yield b"{" + b",".join(_json(name) + b":" + _json(page) for name, page in pages.items())
    yield b',"samples":['
    for number, sample in enumerate(identity.samples):
        page = _sample(sample) | {"photo_base64": await _photo(runtime, identity, sample, key)}
        yield (b"," if number else b"") + _json(page)
    yield b'],"events":['
    is_first = True
    events = AuditEvent.find({"subject.kind": "identity", "subject.id": identity.id}).sort("time", "_id")
    async for event in events:
        yield (b"" if is_first else b",") + _json(_event(event))
        is_first = False
    yield b"]}"


def _person(identity: Identity, gallery: Gallery, keys: KeyRing) -> dict[str, object]:
    attributes = shown_attributes(keys, gallery, identity)
    return {
        "id": identity.id, "gallery": gallery.name, **attributes.model_dump(), "status": identity.status,
        "created_at": identity.created_at, "created_by": identity.created_by, "updated_at": identity.updated_at,
        "version": identity.version, "attempts": identity.attempts.model_dump(),
    }  # fmt: skip


def _sample(sample: Sample) -> dict[str, object]:
    return {
        "id": sample.id, "status": sample.status, "created_at": sample.created_at, "quality": sample.quality.model_dump(),
        "liveness": None if sample.liveness is None else sample.liveness.model_dump(),
        "found": None if sample.found is None else sample.found.model_dump(),
        "template": {"model": sample.contract, "bytes": len(sample.template), "given": False},
    }  # fmt: skip


async def _photo(runtime: Runtime, identity: Identity, sample: Sample, key: DataKey) -> str | None:
    """The photo's JPEG in base64; None where the store does not give it."""
    try:
        sealed = await runtime.photos.get(sample.photo_key)
        photo = await runtime.compute(open_photo, key, sealed, identity.gallery_id, identity.id, sample.id)
    except (PhotoNotFound, PhotoStoreUnavailable, SealBroken):
        return None  # the export has begun: it tells of the sample, and that its photo is missing
    return base64.b64encode(photo).decode()


def _screening(screening: Screening) -> dict[str, object]:
    page = screening.model_dump(exclude={"candidates", "due_at", "tries"})
    page["candidates"] = [
        {"identity_id": c.identity_id, "score": round(c.score, SCORE_DECIMALS), "rank": c.rank}
        for c in screening.candidates
    ]
    return page


def _pair(pair: Pair, identity_id: str) -> dict[str, object]:
    return {
        "identity_id": pair.other_side(identity_id), "score": round(pair.score, SCORE_DECIMALS), "decision": pair.decision,
        "decided_score": None if pair.decided_score is None else round(pair.decided_score, SCORE_DECIMALS),
        "decided_by": pair.decided_by, "decided_at": pair.decided_at, "created_at": pair.created_at,
    }  # fmt: skip


async def _cases_of(identity_id: str) -> list[Case]:
    sides = [{"newcomer_id": identity_id}, {"candidates.identity_id": identity_id}]
    return await Case.find({"$or": sides}).sort("created_at").to_list()


def _case(case: Case, identity_id: str) -> dict[str, object]:
    """A case that is about somebody else tells of this person's part in it only."""
    is_newcomer = case.newcomer_id == identity_id
    return {
        "id": case.id, "state": case.state, "newcomer_id": case.newcomer_id, "created_at": case.created_at,
        "decided_at": case.decided_at, "decided_by": case.decided_by, "reason": case.reason,
        "candidates": [
            {"identity_id": c.identity_id, "score": round(c.score, SCORE_DECIMALS), "decision": c.decision}
            for c in case.candidates if is_newcomer or c.identity_id == identity_id
        ],
    }  # fmt: skip


def _proposal(proposal: IdentityProposal) -> dict[str, object]:
    return {
        "id": proposal.id, "kind": proposal.kind, "state": proposal.state, "sample_id": proposal.sample_id,
        "reason": proposal.reason, "proposed_by": proposal.proposed_by, "created_at": proposal.created_at,
        "decided_by": proposal.decided_by, "decided_at": proposal.decided_at,
    }  # fmt: skip


def _event(event: AuditEvent) -> dict[str, object]:
    """Without who acted by name or from where: that is somebody else's."""
    return {
        "id": event.id, "seq": event.seq, "time": event.time, "action": event.action, "outcome": event.outcome,
        "actor": {"kind": event.actor.kind, "id": event.actor.id}, "detail": event.told,
    }  # fmt: skip


def _deletion(runtime: Runtime, gallery: Gallery, identity: Identity) -> dict[str, object]:
    days = gallery.policy.retention_days
    return {
        "retention_days": days,
        "erased_after": None if days is None else identity.created_at + timedelta(days=days),
        "index_purge_hours": runtime.settings.index_purge_hours,
        "audit_personal_days": runtime.settings.audit_personal_days,
    }


def _json(value: object) -> bytes:
    return json.dumps(value, default=_plain, ensure_ascii=False, separators=(",", ":")).encode()


def _plain(value: Any) -> str:  # noqa: ANN401 - json's own signature
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, date):
        return value.isoformat()
    message = f"{type(value).__name__} is not exported"
    raise TypeError(message)
