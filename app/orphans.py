"""Photos that no document names. A sweep deletes those of this store. Those of an unknown owner stay."""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog
from prometheus_client import Gauge

from app.backups import in_groups
from app.documents.base import now
from app.documents.deletions import Deletion
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.stores import EnrolmentBegun, Store
from app.domain.ownership import SortedKeys, photo_of, sort_keys
from storage.photos import PhotoStore

log = structlog.get_logger(__name__)

#: An enrolment puts its photos before its document, and gives up after a minute.
ORPHAN_AGE: Final = timedelta(hours=24)
KEYS_AT_ONCE: Final = 200
#: Keys that a log line shows.
SHOWN: Final = 5

FOREIGN = Gauge(
    "idem_photos_foreign",
    "Objects in the photo store that cannot be proved to be this store's, at the last sweep: they are left alone",
)


async def old_keys(photos: PhotoStore, *, age: timedelta, size: int = KEYS_AT_ONCE) -> AsyncIterator[list[str]]:
    """The keys of objects in the photo store that are older than `age`, some at a time.

    They must be old by this host's clock and by MongoDB's, so that one wrong clock makes nothing old.
    """
    oldest = min(now(), datetime.now(UTC)) - age

    async def old() -> AsyncIterator[str]:
        async for photo in photos.list():
            if photo.modified < oldest:
                yield photo.key

    async for keys in in_groups(old(), size):
        yield keys


async def known_galleries() -> set[str]:
    """The ids of the galleries that this store has or had."""
    ids = [row["_id"] async for row in Gallery.get_pymongo_collection().find({}, {"_id": 1})]
    return set((await Store.remember(ids)).galleries)


async def sorted_by_owner(keys: Sequence[str], galleries: set[str]) -> SortedKeys:
    """Which of the keys are orphans of this store, and which are not its own. galleries: see `known_galleries`."""
    owners = [owner.identity_id for key in keys if (owner := photo_of(key)) is not None]
    had = await EnrolmentBegun.galleries_of(owners) | await Deletion.galleries_of(owners)
    # The documents are read last, so that they name what an enrolment has committed by then.
    known = await Identity.photo_keys_of(owners)
    had |= {identity_id: gallery_id for identity_id, (gallery_id, _) in known.items()}
    named = {key for _, keys_of in known.values() for key in keys_of}
    return sort_keys(keys, named=named, had=had, galleries=galleries)
