"""What all bodies share: unknown fields are refused, numbers are finite; times are RFC 3339 in UTC."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, PlainSerializer


class Body(BaseModel):
    """A request's fields: exactly those that the contract names."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


#: A time as the contract writes it: 2026-11-21T09:30:00.123Z.
Moment = Annotated[datetime, PlainSerializer(_rfc3339, return_type=str, when_used="json")]
