"""Update: change what is known of a person besides the face."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog
from pydantic import ValidationError
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from app.audit import Action, UnderSalt, record
from app.documents.base import now
from app.documents.events import Detail
from app.documents.galleries import Gallery
from app.documents.identities import Identity, ReferenceHashes
from app.documents.proposals import IdentityProposal
from app.documents.sealed import (
    LOOKUP_RULES,
    data_key,
    gallery_key,
    name_tags,
    open_attributes,
    open_patch,
    reference_hashes,
    seal_attributes,
    seal_patch,
)
from app.domain.attributes import Attributes, GivenAttributes, Json
from app.domain.changes import FieldValue
from app.domain.times import birth_date_fault
from app.errors import Advice, Conflict, ExternalRefTaken, NotFound, NotReady, PreconditionFailed, Validation
from app.keys import DataKey, GalleryKey, SealBroken, UnknownKey
from app.runtime import Runtime
from app.second_officer import Wanted, agree, propose

log = structlog.get_logger(__name__)

Patch = Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Change:
    """The effect of a merge patch on the attributes of an identity."""

    identity: Identity
    key: DataKey
    lookup: GalleryKey
    patch: Patch
    before: Attributes
    after: Attributes

    @property
    def is_of_reference(self) -> bool:
        """Whether it sets, changes or removes the reference."""
        return self.before.external_ref != self.after.external_ref

    def hashes_of(self, reference: str | None) -> ReferenceHashes | None:
        """By what a reference is looked up in the gallery."""
        return None if reference is None else reference_hashes(self.lookup, reference)

    @property
    def told(self) -> Detail:
        """Details for the event: the names of the fields. For a reference also both values, as keyed hashes."""
        fields: Detail = {"fields": ",".join(sorted(self.patch))}
        if not self.is_of_reference:
            return fields
        values = {"old": self.hashes_of(self.before.external_ref), "new": self.hashes_of(self.after.external_ref)}
        hashed: dict[str, FieldValue] = {
            name: None if value is None else UnderSalt(value.equal.hex()) for name, value in values.items()
        }
        return fields | {"changes": {"external_ref": hashed}}


def change_of(runtime: Runtime, gallery: Gallery, identity: Identity, patch: Patch) -> Change:
    """Apply an RFC 7396 merge patch, in memory only. Raises NotFound, Validation when what it changes does not fit.

    What it leaves alone may have come in under other rules.
    """
    if identity.attributes is None:
        raise NotFound
    key = data_key(runtime.keys, gallery, identity)
    before = open_attributes(key, identity.attributes, gallery.id, identity.id)
    merged = _merged(before.model_dump(mode="json"), patch)
    given = _validated({name: merged[name] for name in patch if merged.get(name) is not None})
    fault = birth_date_fault(given.date_of_birth, now())
    if fault is not None:
        raise Validation.of("date_of_birth", "impossible-date", fault)
    after = before.model_copy(update={name: getattr(given, name) for name in patch})
    return Change(identity, key, gallery_key(runtime.keys, gallery), patch, before, after)


def proposed_change(runtime: Runtime, gallery: Gallery, identity: Identity, proposal: IdentityProposal) -> Change:
    """The effect that a proposal would have on the attributes. Raises NotFound when its patch was erased with the person."""
    if proposal.sealed_patch is None:
        raise NotFound
    key = data_key(runtime.keys, gallery, identity)
    patch: Patch = json.loads(open_patch(key, proposal.sealed_patch, gallery.id, identity.id))
    return change_of(runtime, gallery, identity, patch)


def shown_change(runtime: Runtime, gallery: Gallery, identity: Identity, proposal: IdentityProposal) -> Change | None:
    """The effect of a proposal; None if its patch does not fit today's rules, or something does not open.

    It can be withdrawn then, and not be agreed to. Raises UnknownKey.
    """
    try:
        return proposed_change(runtime, gallery, identity, proposal)
    except UnknownKey:
        raise
    except (NotFound, Validation, SealBroken, ValueError) as error:
        log.warning("proposal_does_not_fit", proposal=proposal.id, error=type(error).__name__)
        return None


async def update(
    runtime: Runtime, action: Action, gallery: Gallery, identity_id: str, patch: Patch, if_version: int | None
) -> Identity | IdentityProposal:
    """Apply an RFC 7396 merge patch to the attributes.

    If the gallery asks for two officers, a patch that sets, changes or removes the reference is proposed as a whole. Raises
    PreconditionFailed when the identity has another version, ExternalRefTaken, Validation when the result does not fit.
    """

    async def commit(session: AsyncClientSession) -> IdentityProposal | None:
        identity = await _found(identity_id, session)
        if if_version is not None and identity.version != if_version:
            raise PreconditionFailed(f"The identity is at version {identity.version}.")
        change = change_of(runtime, gallery, identity, patch)
        if change.is_of_reference and gallery.policy.second_review:
            return await _proposed(session, runtime, action, gallery, change)
        await _write(session, action, gallery, change, {})
        return None

    proposal = await _committed(runtime, gallery, commit)
    return proposal or await _found(identity_id)


async def carry_out(runtime: Runtime, action: Action, gallery: Gallery, proposal: IdentityProposal) -> None:
    """Apply the patch that another officer proposed. Raises as `second_officer.agree` does, and ExternalRefTaken."""

    async def commit(session: AsyncClientSession) -> None:
        told = await agree(session, action, proposal)
        identity = await _found(proposal.identity_id, session)
        await _write(session, action, gallery, proposed_change(runtime, gallery, identity, proposal), told)

    await _committed(runtime, gallery, commit)


async def _proposed(
    session: AsyncClientSession, runtime: Runtime, action: Action, gallery: Gallery, change: Change
) -> IdentityProposal:
    identity = change.identity
    await _require_free(session, gallery, change)
    sealed = seal_patch(change.key, json.dumps(dict(change.patch)).encode(), gallery.id, identity.id)

    def is_same(known: IdentityProposal) -> bool:
        standing = shown_change(runtime, gallery, identity, known)
        return standing is not None and standing.after == change.after

    asked = Wanted("reference_change", sealed_patch=sealed, told=change.told)
    return await propose(session, action, gallery, identity, asked, is_same=is_same)


async def _write(session: AsyncClientSession, action: Action, gallery: Gallery, change: Change, told: Detail) -> None:
    identity, after = change.identity, change.after
    # A reference that stays keeps its hash, of whatever rules that is: `renew_lookups` sees to it.
    is_current = LOOKUP_RULES in identity.name_tags or change.is_of_reference or after.external_ref is None
    fields: dict[str, object] = {
        "attributes": seal_attributes(change.key, after, gallery.id, identity.id),
        "name_tags": name_tags(change.lookup, after, is_current=is_current),
    }
    if change.is_of_reference:
        await _require_free(session, gallery, change)
        hashes = change.hashes_of(after.external_ref)
        fields |= {"external_ref_hash": None if hashes is None else hashes.equal, "external_ref_equal": None}
    if not await identity.change(session, fields):
        raise NotReady("The identity was changed at the same moment.")
    await record(
        session,
        action,
        subject_kind="identity",
        subject_id=identity.id,
        gallery=gallery.name,
        detail=change.told | told,
    )


async def _require_free(session: AsyncClientSession, gallery: Gallery, change: Change) -> None:
    """Raises ExternalRefTaken where somebody else has the new reference, in whatever spelling."""
    hashes = change.hashes_of(change.after.external_ref)
    holders = [] if hashes is None else await Identity.with_reference({gallery.id: hashes}, session)
    if any(holder.id != change.identity.id for holder in holders):
        raise _taken(gallery)


async def _committed(
    runtime: Runtime, gallery: Gallery, commit: Callable[[AsyncClientSession], Awaitable[IdentityProposal | None]]
) -> IdentityProposal | None:
    try:
        return await runtime.transaction(commit)
    except DuplicateKeyError as error:
        if "external_ref_hash" in str(error.details):
            raise _taken(gallery) from error
        raise Conflict("The same change was proposed at the same moment.") from error


async def _found(identity_id: str, session: AsyncClientSession | None = None) -> Identity:
    identity = await Identity.living(identity_id, session)
    if identity is None:
        raise NotFound
    return identity


def _taken(gallery: Gallery) -> ExternalRefTaken:
    return ExternalRefTaken(f"In gallery {gallery.name} this reference belongs to somebody already.")


def _merged(target: Mapping[str, Json], patch: Mapping[str, Json]) -> dict[str, Json]:
    """RFC 7396: null removes, objects merge, everything else replaces."""
    merged = dict(target)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            inner = merged.get(name)
            merged[name] = _merged(inner if isinstance(inner, dict) else {}, value)
        else:
            merged[name] = value
    return merged


def _validated(merged: dict[str, Json]) -> GivenAttributes:
    try:
        return GivenAttributes.model_validate(merged)
    except ValidationError as error:
        advice = tuple(Advice.of_finding(".".join(map(str, e["loc"])), e) for e in error.errors())
        raise Validation(errors=advice) from error
