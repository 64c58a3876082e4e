"""What a gallery knows of a person besides the face; kept sealed."""

import json
import re
from datetime import date, datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from typing_extensions import TypeAliasType

from app.domain.spelling import composed, require_known, squeezed, without_formats
from app.domain.text import COMPOSED_OF

METADATA_BYTES, METADATA_KEYS, METADATA_DEPTH = 4096, 32, 3
REFERENCE_MAXIMUM, NAME_MAXIMUM = 128, 256

Json = TypeAliasType("Json", "str | int | float | bool | list[Json] | dict[str, Json] | None")


def _reference(text: str) -> str:
    return require_known(composed(text))


def _depth(value: Json) -> int:
    if isinstance(value, dict):
        return 1 + max((_depth(item) for item in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((_depth(item) for item in value), default=0)
    return 0


def _keys(value: Json) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(key for item in value.values() for key in _keys(item))]
    return [key for item in value for key in _keys(item)] if isinstance(value, list) else []


def _small(metadata: object) -> object:
    try:
        size = len(json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, TypeError, UnicodeEncodeError, RecursionError) as error:
        message = "contains numbers or text that JSON does not allow"
        raise ValueError(message) from error
    if size > METADATA_BYTES:
        message = f"is larger than {METADATA_BYTES} bytes"
        raise ValueError(message)
    return metadata


def _simple(metadata: dict[str, Json]) -> dict[str, Json]:
    keys = _keys(metadata)
    faults = {
        f"has more than {METADATA_KEYS} keys": len(keys) > METADATA_KEYS,
        f"is nested deeper than {METADATA_DEPTH}": _depth(metadata) > METADATA_DEPTH,
        "has a key that begins with $ or holds a dot": any(key.startswith("$") or "." in key for key in keys),
    }
    for message, is_so in faults.items():
        if is_so:
            raise ValueError(message)
    return metadata


#: Its size comes first: to tell the type of each value takes a thousand times as long.
Metadata = Annotated[dict[str, Json], BeforeValidator(_small), AfterValidator(_simple)]
#: A number or mark of a document: text in NFC, without formats and private use, trimmed. Kept as typed; see `canonical`.
ExternalRef = Annotated[
    str,
    AfterValidator(without_formats),
    Field(max_length=COMPOSED_OF * REFERENCE_MAXIMUM),
    AfterValidator(_reference),
    Field(min_length=1, max_length=REFERENCE_MAXIMUM),
]
#: Text in NFC, without formats, trimmed. Letters that this Python does not know are letters, and so are those of private use.
FullName = Annotated[
    str,
    AfterValidator(without_formats),
    Field(max_length=COMPOSED_OF * NAME_MAXIMUM),
    AfterValidator(composed),
    Field(min_length=1, max_length=NAME_MAXIMUM),
]


def _bounded(text: str) -> str:
    if len(squeezed(text)) > COMPOSED_OF * REFERENCE_MAXIMUM:
        message = f"must have at most {REFERENCE_MAXIMUM} characters"
        raise ValueError(message)
    return text


#: A reference that is asked for. It is not held to the rules for new ones: older rules may have let it in.
AskedRef = Annotated[str, AfterValidator(_bounded), Field(min_length=1)]


_WRITTEN_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def _written_out(value: object) -> object:
    """A date as text; a number, also in text, would be taken for seconds since 1970, and a time would lose its hour."""
    is_date = isinstance(value, date) and not isinstance(value, datetime)
    is_written = is_date or (isinstance(value, str) and _WRITTEN_DATE.fullmatch(value) is not None)
    if not is_written:
        message = "must be a date, written as YYYY-MM-DD"
        raise ValueError(message)
    return value


#: A day of the Gregorian calendar, as text. Whether somebody may have been born on it: `times.birth_date_fault`.
BirthDate = Annotated[date, BeforeValidator(_written_out)]


class Attributes(BaseModel):
    """The attributes of one identity, as they are kept.

    They obey no rules: rules change, and what was right when it came in stays readable. New ones are GivenAttributes.
    """

    model_config = ConfigDict(frozen=True)

    external_ref: str | None = None
    full_name: str | None = None
    date_of_birth: date | None = None
    metadata: dict[str, Json] = {}


class GivenAttributes(Attributes):
    """The attributes of one identity, as an officer gives them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    external_ref: ExternalRef | None = None
    full_name: FullName | None = None
    date_of_birth: BirthDate | None = None
    metadata: Annotated[Metadata, BeforeValidator(lambda metadata: {} if metadata is None else metadata)] = {}
