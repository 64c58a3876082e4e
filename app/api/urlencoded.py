"""Names and values in a URL or a form, percent-encoded: UTF-8, each name once.

The parsers of Python and Starlette are more forgiving: of two equal names one wins, bytes that are not UTF-8 become U+FFFD, and
bytes that are not encoded are read as Latin-1. Each of these changes the question in silence.
"""

from typing import Final
from urllib.parse import parse_qsl

from app.errors import UnsupportedMediaType, Validation

#: A form has fewer fields, and a URL has no room for more.
MOST_PAIRS: Final = 1000
#: The field in which an HTML form names the encoding that it was sent in.
CHARSET_FIELD: Final = "_charset_"
_UTF8: Final = ("utf-8", "utf8")


def require_distinct(data: bytes, where: str) -> None:
    """Let a query or a form pass. where: `query` or `body`. Raises Validation, and UnsupportedMediaType for another charset."""
    if not data:
        return
    if data.count(b"&") >= MOST_PAIRS:
        message = f"At most {MOST_PAIRS} parameters are taken."
        raise Validation.of(where, "too-many-values", message)
    try:
        pairs = parse_qsl(data.decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError as error:
        message = "Send text in UTF-8, percent-encoded."
        raise Validation.of(where, "not-utf-8", message) from error
    seen: set[str] = set()
    for name, value in pairs:
        if name in seen:
            message = "The parameter came twice."
            raise Validation.of(name[:64], "repeated", message)
        seen.add(name)
        if where == "body" and name == CHARSET_FIELD:
            require_utf8(value)


def require_utf8(charset: str) -> None:
    """Raises UnsupportedMediaType for the name of any charset but UTF-8."""
    if charset.strip().lower() not in _UTF8:
        raise UnsupportedMediaType("Send text in UTF-8.")
