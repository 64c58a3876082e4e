"""Whose photo a key names. A sweep deletes only what it can prove to be its own."""

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, NamedTuple

_UUID: Final = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_PHOTO: Final = re.compile(rf"({_UUID})/({_UUID})/({_UUID})")


class PhotoOf(NamedTuple):
    """The gallery and the identity that a photo's key names."""

    gallery_id: str
    identity_id: str


def photo_of(key: str) -> PhotoOf | None:
    """Whose photo the key names; None when the key is not three UUIDs as this product writes them."""
    found = _PHOTO.fullmatch(key)
    return None if found is None else PhotoOf(found[1], found[2])


@dataclass(frozen=True, slots=True)
class SortedKeys:
    """orphans: photos of ours that no document names. foreign: what cannot be proved to be ours, and stays."""

    orphans: list[str]
    foreign: list[str]


def sort_keys(
    keys: Sequence[str], *, named: AbstractSet[str], had: Mapping[str, str], galleries: AbstractSet[str]
) -> SortedKeys:
    """Divide the keys of the photo store by their owner.

    named: keys that documents name. had: identities that this store has or had, with their galleries. galleries: those that it
    has or had. A photo is ours when its key is three UUIDs of such a gallery and of such an identity of it.
    """
    orphans: list[str] = []
    foreign: list[str] = []
    for key in keys:
        if key in named:
            continue
        owner = photo_of(key)
        is_ours = owner is not None and owner.gallery_id in galleries and had.get(owner.identity_id) == owner.gallery_id
        (orphans if is_ours else foreign).append(key)
    return SortedKeys(orphans, foreign)
