"""When a gallery's next index generation is due, and which kind it is."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

#: Up to so many vectors an exact scan takes a millisecond, and nothing is gained by codes.
EXACT_ROWS: Final = 10_000
#: Removed vectors still cost a scan; beyond this share they are left behind.
REMOVED_SHARE: Final = 0.02
#: A publication for an erasure's deadline starts when this share of the time is left: a failed one can be tried again.
PURGE_LEAD_SHARE: Final = 0.25
#: A gallery smaller than this is read from the documents in no time: its removals are no reason to publish.
REMOVED_MINIMUM: Final = 100

Reason = Literal["fault", "erasure", "tail", "removals"]


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a gallery's index. tail: changes that no generation holds; removed: of its vectors, gone since."""

    is_published: bool
    is_faulty: bool
    tail: int
    count: int
    removed: int
    purge_by: datetime | None


def reason_to_publish(standing: Standing, *, tail_rows: int, purge_time: timedelta, moment: datetime) -> Reason | None:
    """Why the next generation is due; None when it is not.

    tail_rows: the tail that is long enough; purge_time: how long files may hold an erased person's vectors in all.
    """
    if standing.is_faulty:
        return "fault"
    if standing.purge_by is not None and moment >= standing.purge_by - purge_time * PURGE_LEAD_SHARE:
        return "erasure"
    if standing.tail >= tail_rows:
        return "tail"
    if standing.is_published and standing.removed >= max(REMOVED_MINIMUM, REMOVED_SHARE * standing.count):
        return "removals"
    return None


def kind_for(count: int) -> Literal["exact", "faiss"]:
    """How a generation of so many vectors is searched."""
    return "exact" if count <= EXACT_ROWS else "faiss"
