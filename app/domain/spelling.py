"""Text that people type: what of it is kept, and when two spellings are one.

Equality is Unicode's identifier caseless match (Unicode 3.13, D147: NFKC_Casefold), in which default-ignorable code points do not
count. On top of it digits of all scripts, hyphens, and blanks are alike. That is the Nickname profile of RFC 8266 (blanks, case,
NFKC) and more; RFC 8264 itself would refuse letters that documents of some countries bear. See docs/adr/0051.
"""

import re
import unicodedata
from typing import Final

#: Ranges of Default_Ignorable_Code_Point, from DerivedCoreProperties.txt of Unicode 17.0. They are the same since Unicode 14.0,
#: and unassigned code points are among them, so the table is good for later versions. Python's own tables lack the property.
DEFAULT_IGNORABLE: Final = (
    (0x00AD, 0x00AD), (0x034F, 0x034F), (0x061C, 0x061C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F),
    (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip
#: Those that names are spelt with: joiners (Persian, Sinhala), selectors of a letter's form (Japanese, Mongolian), fillers of old
#: Hangul, the grapheme joiner, two vowels of Khmer.
_SPELT_WITH: Final = (
    (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200C, 0x200D), (0x3164, 0x3164),
    (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF),
)  # fmt: skip
#: They show the letters behind them in another order than that in which they are stored.
_OVERRIDES: Final = frozenset((0x202D, 0x202E))
#: Marks around annotations, which belong to no plain text.
_ANNOTATION: Final = frozenset(range(0xFFF9, 0xFFFC))
#: Blank without being a space: a Braille cell without dots, a note without a head.
_BLANK: Final = frozenset((0x2800, 0x1D159))
#: Of Unicode's property Dash, what stands between the parts of a number. (NFKC makes some others into these.)
_HYPHENS: Final = (
    "\u058a\u05be\u1400\u1806\u2010\u2012\u2013\u2014\u2015\u2043\u2212\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u2e5d"
    "\U00010d6e\U00010ead"
)
#: Thai and Lao vowels with a tone between their two halves: typed in either order, they look the same, and Unicode does not
#: order them.
_SARA_AM: Final = re.compile("([\u0e4d\u0ecd])([\u0e48-\u0e4b\u0ec8-\u0ecb])([\u0e32\u0eb2])")
#: Planes of Han letters. They have no case and no other form, whether or not Python knows them.
_HAN_PLANES: Final = range(0x20000, 0x3FFFE)
#: The last two code points of each plane, and these, are not characters and never will be.
_NONCHARACTERS: Final = range(0xFDD0, 0xFDF0)
_LAST_OF_PLANE: Final = 0xFFFE


def _points(ranges: tuple[tuple[int, int], ...]) -> frozenset[int]:
    return frozenset(point for first, last in ranges for point in range(first, last + 1))


_IGNORABLE: Final = _points(DEFAULT_IGNORABLE)
_IGNORED: Final = dict.fromkeys(_IGNORABLE)
_DROPPED: Final = dict.fromkeys(_IGNORABLE - _points(_SPELT_WITH) - _OVERRIDES)
_ALIKE: Final = dict.fromkeys(map(ord, _HYPHENS), "-") | dict.fromkeys(_BLANK, " ")


def canonical(text: str) -> str:
    """What all spellings of one text have in common. Text of which nothing can be seen is compared as it is spelt.

    Takes the square of the length for marks on one letter: bound the text before.
    """
    if text.isascii():
        return " ".join(text.lower().split()) or first_canonical(text)
    seen = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).translate(_IGNORED))
    # Once more, because folding takes some letters apart: capital and small forms of U+0390 would stay two.
    folded = unicodedata.normalize("NFKC", seen.casefold())
    alike = _SARA_AM.sub(r"\2\1\3", "".join(map(_digit, folded)).translate(_ALIKE))
    return " ".join(alike.split()) or first_canonical(text)


def first_canonical(text: str) -> str:
    """Equality as it was before December 2026: NFKC and case folding only. Stored hashes may have been made by it."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def squeezed(text: str) -> str:
    """The text without what does not count: ignorable code points, and blanks beside blanks. Takes linear time."""
    return " ".join(text.translate(_IGNORED).split())


def without_formats(text: str) -> str:
    """The text without code points that neither show nor change a letter, and without blanks around it. Takes linear time.

    Dropped are soft hyphens, zero-width spaces, marks of direction, embeddings and isolates, byte order marks, tags.
    """
    return text.translate(_DROPPED).strip()


def composed(text: str) -> str:
    """The text in NFC. Raises ValueError where a character has no place in text, or where nothing can be seen."""
    text = unicodedata.normalize("NFC", text)
    if not any(map(_is_seen, text)):
        message = "must contain a visible character"
        raise ValueError(message)
    if not all(map(_is_text, text)):
        message = "must not contain control characters, line breaks, or characters that change the direction of text"
        raise ValueError(message)
    return text


def require_known(text: str) -> str:
    """Raises ValueError for code points that have no meaning everywhere: private use, and those that Python does not know.

    Unicode may give an unknown one a small form or a decomposition later; then its equality would change. Han letters have
    neither.
    """
    if any(unicodedata.category(c) in ("Co", "Cn") and ord(c) not in _HAN_PLANES for c in text):
        message = "must not contain characters of private use, or unknown ones"
        raise ValueError(message)
    return text


def _digit(character: str) -> str:
    return str(unicodedata.decimal(character)) if character.isdecimal() else character


def _is_seen(character: str) -> bool:
    point = ord(character)
    return not (
        point in _IGNORABLE or point in _BLANK or character.isspace() or unicodedata.category(character)[0] in "MZ"
    )


def _is_text(character: str) -> bool:
    point = ord(character)
    is_noncharacter = point in _NONCHARACTERS or point & _LAST_OF_PLANE == _LAST_OF_PLANE
    is_odd = is_noncharacter or point in _OVERRIDES or point in _ANNOTATION
    return not is_odd and unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
