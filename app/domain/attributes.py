"""What a gallery knows of a person besides the face; kept sealed."""

import json
import re
import unicodedata
from datetime import date
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from typing_extensions import TypeAliasType

#: Beginnings of names are looked up by so many characters at most; what is longer is compared after opening.
PREFIX_CHARACTERS = 12
#: Words of a name from which on it can be looked up.
NAME_WORDS = 8
METADATA_BYTES, METADATA_KEYS, METADATA_DEPTH = 4096, 32, 3
REFERENCE_MAXIMUM, NAME_MAXIMUM = 128, 256
#: So many code points become one in NFC at most. What is longer is refused before: to order the marks on one letter takes the
#: square of their number.
COMPOSED_OF = 4
#: General categories that have no place in a name or a reference: controls, formats, surrogates, private use, unassigned.
UNCLEAN = ("Cc", "Cf", "Cs", "Co", "Cn")
#: Zero-width joiner and non-joiner are formats that Persian and Indic names are spelt with.
JOINERS = "\u200c\u200d"

Json = TypeAliasType("Json", "str | int | float | bool | list[Json] | dict[str, Json] | None")


def _clean(text: str) -> str:
    text = unicodedata.normalize("NFC", text).strip()
    if not text:
        message = "must not be empty"
        raise ValueError(message)
    if any(unicodedata.category(character) in UNCLEAN and character not in JOINERS for character in text):
        message = "holds characters that do not belong into text"
        raise ValueError(message)
    return text


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
        message = "holds numbers or text that JSON cannot"
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
#: Text without control, format or broken characters, in NFC, trimmed, not empty.
ExternalRef = Annotated[
    str,
    Field(max_length=COMPOSED_OF * REFERENCE_MAXIMUM),
    AfterValidator(_clean),
    Field(min_length=1, max_length=REFERENCE_MAXIMUM),
]
FullName = Annotated[
    str,
    Field(max_length=COMPOSED_OF * NAME_MAXIMUM),
    AfterValidator(_clean),
    Field(min_length=1, max_length=NAME_MAXIMUM),
]


WRITTEN_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def _written_out(value: object) -> object:
    """A date as text; a number, also in text, would be taken for seconds since 1970."""
    is_written = isinstance(value, date) or (isinstance(value, str) and WRITTEN_DATE.fullmatch(value))
    if not is_written:
        message = "a date is written as YYYY-MM-DD"
        raise ValueError(message)
    return value


class Attributes(BaseModel):
    """The attributes of one identity, as an officer gave them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    external_ref: ExternalRef | None = None
    full_name: FullName | None = None
    date_of_birth: Annotated[date, BeforeValidator(_written_out)] | None = None
    metadata: Annotated[Metadata, BeforeValidator(lambda metadata: {} if metadata is None else metadata)] = {}


def canonical_ref(external_ref: str) -> str:
    """How a reference is looked up: NFKC and case folded, so that two spellings of one are one."""
    # Once more, because folding takes some letters apart: capital and small forms of U+0390 would stay two.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", external_ref).casefold())


#: A word begins a name, or follows a space, a hyphen or an apostrophe.
_WORD_BEGINS = re.compile(r"(?:^|(?<=[\s\-\u2010\u2011'\u2019]))[^\s\-\u2010\u2011'\u2019]")


def canonical_name(name: str) -> str:
    """How a name is looked up: as a reference is, with one space where there are several, and none around it."""
    return " ".join(canonical_ref(name).split())


def _rests(full_name: str) -> list[str]:
    """The canonical name from each of its words on."""
    name = canonical_name(full_name)
    return [name[found.start() :] for found in _WORD_BEGINS.finditer(name)][:NAME_WORDS]


def name_prefixes(full_name: str) -> set[str]:
    """Every beginning of the canonical name, and of it from each of its words on, up to PREFIX_CHARACTERS long."""
    rests = _rests(full_name)
    return {rest[:length] for rest in rests for length in range(1, min(len(rest), PREFIX_CHARACTERS) + 1)}


def begins_like(full_name: str, canonical_prefix: str) -> bool:
    """Whether the name, or it from one of its words on, begins with these letters."""
    return any(rest.startswith(canonical_prefix) for rest in _rests(full_name))
