"""Which policy changes wait for a second person, because they act on people who are enrolled already."""

from datetime import timedelta
from typing import Final, Literal

from app.domain.policy import GalleryPolicy

PendingField = Literal["retention_days", "second_review"]

#: The shortest time between the request for such a change and its effect.
WAIT: Final = timedelta(days=7)


def waiting_fields(before: GalleryPolicy, after: GalleryPolicy) -> list[PendingField]:
    """The changed fields that must wait: a new or shorter retention, and the end of second review.

    A longer retention, or none, erases nobody. The start of second review removes no protection. Both take effect at once.
    """
    fields: list[PendingField] = []
    old, new = before.retention_days, after.retention_days
    if new is not None and (old is None or new < old):
        fields.append("retention_days")
    if before.second_review and not after.second_review:
        fields.append("second_review")
    return fields
