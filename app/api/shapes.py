"""What all bodies share: unknown fields are refused, numbers are finite; times are RFC 3339 in UTC."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from app.domain.callers import CLIENT_ROLES, USER_ROLES, Role
from app.domain.spelling import composed
from app.domain.times import moment_of

#: RFC 6749, 5.1: nobody on the way may keep an answer that holds a secret.
NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}


class Body(BaseModel):
    """A request's fields: exactly those that the contract names."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _read(value: object) -> object:
    # Pydantic itself would take dates, times without a zone, and numbers as seconds since 1970.
    return value if isinstance(value, datetime) else moment_of(str(value))


def _plain(text: str) -> str:
    text = composed(text)
    # Control and invisible characters, half surrogate pairs: two names that look the same must be the same.
    if not text.isprintable() or text != text.strip():
        message = "must have only visible characters, and no space at either end"
        raise ValueError(message)
    return text


#: A name that people read.
PlainText = Annotated[str, Field(max_length=1024), AfterValidator(_plain)]
GalleryName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
#: The galleries that an account is bound to, by name: null means all, [] none.
Galleries = Annotated[tuple[GalleryName, ...], Field(max_length=1000)] | None
UserRoles = Annotated[
    tuple[Literal[Role.ADMIN, Role.OFFICER, Role.AUDITOR], ...], Field(min_length=1, max_length=len(USER_ROLES))
]
ClientRoles = Annotated[
    tuple[Literal[Role.RELYING_APP, Role.ENROLLER], ...], Field(min_length=1, max_length=len(CLIENT_ROLES))
]

#: A time as the contract writes it, always with its zone: 2026-11-21T09:30:00.123Z.
Moment = Annotated[datetime, BeforeValidator(_read), PlainSerializer(_rfc3339, return_type=str, when_used="json")]
