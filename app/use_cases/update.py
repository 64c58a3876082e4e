"""Update: change what is known of a person besides the face."""

from collections.abc import Mapping

from pydantic import ValidationError
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from app.audit import Action, record
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.sealed import data_key, gallery_key, name_tags, open_attributes, seal_attributes
from app.domain.attributes import Attributes, Json, canonical_ref
from app.errors import Advice, ExternalRefTaken, NotFound, NotReady, PreconditionFailed, Validation
from app.runtime import Runtime


async def update(
    runtime: Runtime,
    action: Action,
    gallery: Gallery,
    identity_id: str,
    patch: Mapping[str, Json],
    if_version: int | None,
) -> Identity:
    """Apply an RFC 7396 merge patch to the attributes.

    Raises PreconditionFailed when the version is another, ExternalRefTaken, Validation when the result does not fit.
    """

    async def commit(session: AsyncClientSession) -> None:
        identity = await Identity.living(identity_id, session)
        if identity is None or identity.attributes is None:
            raise NotFound
        if if_version is not None and identity.version != if_version:
            raise PreconditionFailed(f"The identity is at version {identity.version}.")
        key = data_key(runtime.keys, gallery, identity)
        known = open_attributes(key, identity.attributes, gallery.id, identity.id).model_dump(mode="json")
        attributes = _validated({name: value for name, value in _merged(known, patch).items() if value is not None})
        ref = attributes.external_ref
        lookup = gallery_key(runtime.keys, gallery)
        fields = {
            "attributes": seal_attributes(key, attributes, gallery.id, identity.id),
            "external_ref_hash": None if ref is None else lookup.lookup_hash("external_ref", canonical_ref(ref)),
            "name_tags": name_tags(lookup, attributes),
        }
        if not await identity.change(session, fields):
            raise NotReady("The identity was changed at the same moment.")
        await record(
            session, action, subject_kind="identity", subject_id=identity_id, gallery=gallery.name,
            detail={"fields": ",".join(sorted(patch))},
        )  # fmt: skip

    try:
        await runtime.transaction(commit)
    except DuplicateKeyError as error:
        raise ExternalRefTaken(f"In gallery {gallery.name} this reference belongs to somebody already.") from error
    identity = await Identity.living(identity_id)
    if identity is None:
        raise NotFound
    return identity


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


def _validated(merged: dict[str, Json]) -> Attributes:
    try:
        return Attributes.model_validate(merged)
    except ValidationError as error:
        advice = tuple(Advice(".".join(map(str, e["loc"])), e["type"], e["msg"]) for e in error.errors())
        raise Validation(errors=advice) from error
