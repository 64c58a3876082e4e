"""Text that people type freely, such as reasons. Names and references of people have rules of their own (`attributes`)."""

import unicodedata
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from app.domain.spelling import squeezed

REASON_MAXIMUM: Final = 1000
NONCE_MAXIMUM: Final = 256
#: So many code points become one in NFC at most. What is longer is refused before: to order the marks on one letter takes the
#: square of their number.
COMPOSED_OF: Final = 4
#: Controls, formats, halves of surrogate pairs, separators of lines and paragraphs: they hide text, or show it in another order.
_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
#: Formats that languages are written with: the space without width between Khmer or Thai words (keyboards type it), joiners,
#: and marks of direction, which turn nothing around but themselves.
_WRITTEN: Final = frozenset("\u200b\u200c\u200d\u200e\u200f\u061c")


def clean_text(text: str) -> str:
    """The text in NFC, without blanks at its ends. Raises ValueError for hidden characters, and where nothing can be seen."""
    text = unicodedata.normalize("NFC", text).strip()
    if not squeezed(text):
        message = "must not be empty"
        raise ValueError(message)
    if any(unicodedata.category(character) in _HIDDEN and character not in _WRITTEN for character in text):
        message = "must not contain control characters, or characters that hide text or change its direction"
        raise ValueError(message)
    return text


def exact_text(text: str) -> str:
    """The text as it is: another program compares it. Raises ValueError where `clean_text` would change or refuse it."""
    if clean_text(text) != text:
        message = "must be in Unicode form NFC, without blanks at its ends"
        raise ValueError(message)
    return text


#: Why somebody does something.
Reason = Annotated[
    str,
    Field(max_length=COMPOSED_OF * REASON_MAXIMUM),
    AfterValidator(clean_text),
    Field(min_length=1, max_length=REASON_MAXIMUM),
]
#: What a caller binds an answer to. It comes back exactly as it was sent.
Nonce = Annotated[str, Field(min_length=1, max_length=NONCE_MAXIMUM), AfterValidator(exact_text)]
