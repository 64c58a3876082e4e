"""Photos as text: base64 (RFC 4648) in the spellings that client libraries write."""

import base64
import binascii
import re
from typing import Final

#: Photos in PEM's lines: 64 letters for 48 bytes, and a line end that JSON escapes as four characters.
_LINE_BYTES, _LINE_LETTERS = 48, 68
_MOST_PADDING: Final = 2
_BLANKS: Final = b" \t\r\n"
_STANDARD: Final = bytes.maketrans(b"-_", b"+/")
_DATA_URL: Final = re.compile(r"data:([^,]{0,200}),", re.IGNORECASE)
_LETTERS: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


class NotBase64(ValueError):
    """The text is not base64. The message says what is wrong with it, and quotes nothing of it."""


def spelt_bytes(size: int) -> int:
    """The most bytes that so many bytes take as base64 in JSON, line ends included."""
    return -(-size // _LINE_BYTES) * _LINE_LETTERS


def decoded(text: object) -> bytes:
    """The bytes of a text in base64.

    Standard or URL-safe letters, with or without padding and line breaks, or a `data:` URL, whose type does not matter. Raises
    NotBase64.
    """
    if not isinstance(text, str):
        raise NotBase64("A photo is a text in base64.")
    if text[:5].lower() == "data:":
        text = _behind_comma(text)
    try:
        letters = text.encode("ascii").translate(_STANDARD, _BLANKS)
    except UnicodeEncodeError:
        raise NotBase64("The text of the photo is not base64: it has letters outside ASCII.") from None
    padding = len(letters) - len(letters := letters.rstrip(b"="))
    if strange := letters.translate(None, _LETTERS):
        where = "'=' before its end" if strange.strip(b"=") == b"" else "characters that base64 does not use"
        raise NotBase64(f"The text of the photo is not base64: it has {where}.")
    if len(letters) % 4 == 1 or padding > _MOST_PADDING or (padding and (len(letters) + padding) % 4):
        raise NotBase64("The text of the photo is not whole base64: characters are missing at its end.")
    try:
        return base64.b64decode(letters + b"=" * (-len(letters) % 4))
    except binascii.Error:
        raise NotBase64("The text of the photo is not base64.") from None


def _behind_comma(text: str) -> str:
    head = _DATA_URL.match(text)
    if head is None:
        raise NotBase64("The data: URL of the photo has no comma before its data.")
    if not head[1].lower().endswith(";base64"):
        raise NotBase64("The data: URL of the photo is not in base64.")
    return text[head.end() :]
