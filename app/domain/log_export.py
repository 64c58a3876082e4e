"""The bytes of the audit log: what a leaf and a head are hashed and signed over, and the lines of an export.

A line is the event as the API shows it, and what is needed to check it with nothing but a public key:

    personal   null, or {fields, salt}: these fields stand in the leaf as HMAC-SHA256 of their text under that salt. A field is
               named by its path: actor.name, detail.reason
    skipped    hashes of the subtrees over the events between the line before and this one; none in a whole export
    end        null; in the last line {head, skipped}: a signed tree head, and the subtrees from here up to its size

An export without events has one line: null in every field but `end`.

A line has exactly one form, so that no byte of it can be changed unseen: canonical JSON (RFC 8785), or the same values in
the cells of a CSV.
"""

import csv
import hmac
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, cast

import rfc8785

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
Line = dict[str, Json]
Form = Literal["ndjson", "csv"]

#: Of an event, in the order of the columns of a CSV.
FIELDS: Final = (
    "id", "seq", "time", "actor", "action", "subject", "outcome", "gallery", "request_id", "detail", "leaf_hash",
    "personal", "skipped", "end",
)  # fmt: skip
#: Not part of the leaf: kept or made beside the event.
BESIDE: Final = ("leaf_hash", "personal", "skipped", "end")
#: What may be personal, by the name that `personal.fields` gives it. Below `detail` any text may be.
PERSONAL: Final = ("actor.name", "actor.ip", "request_id")
IN_DETAIL: Final = "detail."
_CELLS_OF_JSON: Final = frozenset({"actor", "subject", "detail", "personal", "skipped", "end"})
#: What a sheet may take for a formula when a cell begins with it, be it after blanks; full-width forms too.
_FORMULA_STARTS: Final = tuple("=+-@＝＋－＠")
_MISREAD: Final = re.compile("[;\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
#: Of one length only: HMAC pads a key with zeros, so that a longer salt could give the same hashes.
SALT_BYTES: Final = 16
_SALT: Final = re.compile(rf"[0-9a-f]{{{2 * SALT_BYTES}}}")


class BadLine(ValueError):
    """What stands there is no line of an export."""


def canonical(value: Json | Mapping[str, Json]) -> bytes:
    """The one JSON text of a value (RFC 8785). Raises ValueError for what has none (NaN, integers beyond 2**53)."""
    return rfc8785.dumps(cast("dict[str, Json]", value))


def personal_hash(salt: bytes, value: str) -> str:
    """What stands in a leaf for something personal; 64 hex digits."""
    return hmac.digest(salt, value.encode(), "sha256").hex()


def head_bytes(size: int, root_hash: str, time: str, key_id: str) -> bytes:
    """What a tree head's signature is over."""
    return canonical({"size": size, "root_hash": root_hash, "time": time, "key_id": key_id})


def leaf_bytes(line: Mapping[str, Json]) -> bytes:
    """What an exported event's leaf is hashed over. Raises BadLine when its personal fields do not say how."""
    leaf = {name: value for name, value in line.items() if name not in BESIDE}
    match line["personal"]:
        case None:
            return canonical(leaf)
        case {"fields": list(fields), "salt": str(salt), **rest} if not rest and fields:
            key = _from_hex(salt)
        case _:
            message = "`personal` is neither null nor fields and a salt"
            raise BadLine(message)
    names = [name for name in fields if isinstance(name, str)]
    if in_order(names) != fields:
        message = "`personal` names fields that there are not"
        raise BadLine(message)
    for name in names:
        value = value_at(leaf, name)
        if not isinstance(value, str):
            message = f"`personal` names {name}, which is not there"
            raise BadLine(message)
        leaf = replaced(leaf, name, personal_hash(key, value))
    return canonical(leaf)


def in_order(names: Iterable[str]) -> list[str]:
    """The names that `personal.fields` may have, in its one order: those of PERSONAL, then those below `detail` by name."""
    given = set(names)
    return [name for name in PERSONAL if name in given] + sorted(name for name in given if name.startswith(IN_DETAIL))


def value_at(line: Mapping[str, Json], name: str) -> Json:
    """The value that a name of `personal.fields` stands for; None where there is none."""
    value: Json = dict(line)
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def replaced(line: Mapping[str, Json], name: str, value: str) -> Line:
    """The line with another text at that name, which must be there. The given line stays as it is."""
    first, _, rest = name.partition(".")
    inner = line[first]
    return {**line, first: replaced(inner, rest, value) if rest and isinstance(inner, dict) else value}


def _from_hex(text: str) -> bytes:
    if not _SALT.fullmatch(text):
        message = f"a salt is not {2 * SALT_BYTES} digits of lower-case hex"
        raise BadLine(message)
    return bytes.fromhex(text)


def encoded(line: Mapping[str, Json], form: Form) -> bytes:
    """The line as it is exported, with its end of line."""
    return canonical(line) + b"\n" if form == "ndjson" else _row([_cell(name, line[name]) for name in FIELDS])


def without_events(end: Json) -> Line:
    """The one line of an export that holds no event."""
    return dict.fromkeys(FIELDS) | {"end": end}


def heading(form: Form) -> bytes:
    """What stands before the first line."""
    return _row(list(FIELDS)) if form == "csv" else b""


def decoded(raw: bytes, form: Form) -> Line:
    """A line out of its bytes. Raises BadLine, also for bytes that mean the same but are not the line's one form."""
    try:
        line = _from_ndjson(raw) if form == "ndjson" else _from_csv(raw)
        if set(line) == set(FIELDS) and encoded(line, form) == raw:
            return line
    except (ValueError, TypeError, csv.Error, RecursionError) as error:
        message = "it cannot be read"
        raise BadLine(message) from error
    message = "it is not in the one form that a line has"
    raise BadLine(message)


def _from_ndjson(raw: bytes) -> Line:
    return cast("Line", dict(json.loads(raw)))


def _from_csv(raw: bytes) -> Line:
    (cells,) = csv.reader([raw.decode()])
    return {name: _value(name, cell) for name, cell in zip(FIELDS, cells, strict=True)}


def _cell(name: str, value: Json) -> str:
    """One cell. In JSON, what a sheet may take for more than text is escaped.

    Some sheets part cells at a semicolon, and what follows would begin one. Controls of direction show a text in another order.
    """
    if name in _CELLS_OF_JSON:
        return _MISREAD.sub(lambda found: f"\\u{ord(found[0]):04x}", canonical(value).decode())
    text = "" if value is None else str(value)
    # An apostrophe tells a sheet that text follows; one that stands there already gets another, so that it can be taken away.
    return f"'{text}" if text.startswith("'") or text.lstrip().startswith(_FORMULA_STARTS) else text


def _value(name: str, cell: str) -> Json:
    if name in _CELLS_OF_JSON:
        return cast("Json", json.loads(cell))
    text = cell.removeprefix("'")
    if name == "seq":
        return int(text) if text else None
    return text or None


def _row(cells: Sequence[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue().encode()
