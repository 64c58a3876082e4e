"""Search for names. A name is folded to the letters that people type, and found from the beginning of any of its words."""

import unicodedata
from collections.abc import Iterator
from typing import Final

from app.domain.spelling import canonical, first_canonical

#: The longest beginning that is looked up. The rest of a longer one is compared after the attributes are decrypted.
PREFIX_CHARACTERS = 12
#: The same for scripts without spaces, where a search may begin at any character of the name.
DENSE_PREFIX_CHARACTERS = 6
#: How many words of a name a search may begin at, and how many characters in scripts without spaces.
NAME_WORDS, DENSE_STARTS = 8, 32

#: Letters with a stroke, hook, or ligature have no decomposition. The values are what people type for them. Most come from
#: CLDR's transform Latin-ASCII.
_LATIN: Final = {
    "æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "ħ": "h", "ı": "i", "ĸ": "q", "ł": "l", "ŋ": "n", "þ": "th", "ŧ": "t",
    "ƀ": "b", "ɓ": "b", "ƈ": "c", "ɖ": "d", "ɗ": "d", "ɛ": "e", "ə": "e", "ƒ": "f", "ɠ": "g", "ɨ": "i", "ƙ": "k", "ɲ": "n",
    "ɔ": "o", "ɵ": "o", "ƥ": "p", "ʈ": "t", "ƭ": "t", "ʉ": "u", "ʋ": "v", "ƴ": "y", "ƶ": "z", "ґ": "г",
}  # fmt: skip
#: Letters that keyboards for Arabic, Persian, Urdu and Kurdish use in place of each other. Lucene's ArabicNormalizer,
#: PersianNormalizer and SoraniNormalizer fold most of them too. NFKD decomposes letters with hamza or madda.
_ARABIC: Final = {
    "ي": "ی", "ى": "ی", "ك": "ک", "ڪ": "ک", "ة": "ه", "ە": "ه", "ہ": "ه", "ۃ": "ه", "ھ": "ه", "ٱ": "ا", "ـ": "",
}  # fmt: skip
#: Forms of Han letters that Japanese registers distinguish and keyboards do not. These are common in names, chosen by hand.
#: The whole list is the MJ shrink map of Japan's character information base.
_HAN: Final = {
    "髙": "高", "﨑": "崎", "𠮷": "吉", "德": "徳", "邊": "辺", "邉": "辺", "濵": "浜", "濱": "浜", "澤": "沢", "廣": "広",
    "齋": "斎", "齊": "斉", "櫻": "桜", "國": "国", "眞": "真", "瀨": "瀬", "黑": "黒", "嶋": "島", "嶌": "島", "槗": "橋",
}  # fmt: skip
#: Letters by category that people use as an apostrophe, such as the okina, and the ain and hamza of transliterated Arabic.
_APOSTROPHES: Final = frozenset("\u02b9\u02ba\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u02ee\ua78b\ua78c")
#: A separate letter. Its decomposition would make it equal to another letter.
_KEPT: Final = frozenset("й")
_KATAKANA: Final = range(0x30A1, 0x30F7)
_TO_HIRAGANA: Final = 0x60
#: Marks that people leave out: accents; the points of Hebrew; the vowels and hamzas of Arabic; of Syriac. Vowels and tones of
#: other scripts are part of the word, and so are the two marks of Japanese.
_MARKS: Final = (
    (0x0300, 0x036F), (0x0483, 0x0487), (0x0591, 0x05BD), (0x05BF, 0x05C7), (0x0610, 0x061A), (0x064B, 0x065F),
    (0x0670, 0x0670), (0x06D6, 0x06DC), (0x06DF, 0x06E8), (0x06EA, 0x06ED), (0x0711, 0x0711), (0x0730, 0x074A),
    (0x08CA, 0x08FF), (0x1AB0, 0x1AFF), (0x1DC0, 0x1DFF), (0x20D0, 0x20FF), (0xFE20, 0xFE2F),
)  # fmt: skip
_LEFT_OUT: Final = frozenset(chr(point) for first, last in _MARKS for point in range(first, last + 1))
#: Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer; kana, Han, Hangul. A search may begin at each letter.
_DENSE: Final = (
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x19E0, 0x19FF), (0x3005, 0x3007),
    (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0xAC00, 0xD7AF),
    (0xF900, 0xFAFF), (0x20000, 0x3FFFD),
)  # fmt: skip
#: After these characters a letter of Thai, Lao, Khmer, or Burmese continues the syllable: leading vowels, and stacking signs.
_GOES_ON: Final = frozenset("เแโใไເແໂໃໄ\u17d2\u1039")
#: Vowels that are letters by category and begin no syllable.
_FOLLOWING: Final = frozenset("ะาำๅๆฯະາຳໆຽ")


def canonical_name(name: str) -> str:
    """The name in the form for look-ups: as people type it, without marks, apostrophes, hyphens, or blanks."""
    return "".join(character for character, _ in _folded(name))


def name_prefixes(full_name: str) -> set[str]:
    """All beginnings of the canonical name, starting at each of its words, up to the length that `cut` allows."""
    return {rest[:length] for rest in _rests(full_name) for length in range(1, len(cut(rest)) + 1)}


def cut(canonical_prefix: str) -> str:
    """The part of a beginning that is looked up. The rest is compared after the attributes are decrypted."""
    is_dense = _is_dense(canonical_prefix[:1])
    return canonical_prefix[: DENSE_PREFIX_CHARACTERS if is_dense else PREFIX_CHARACTERS]


def begins_like(full_name: str, canonical_prefix: str) -> bool:
    """Whether the name begins with these letters at one of its words."""
    return any(rest.startswith(canonical_prefix) for rest in _rests(full_name))


def former_prefix(asked: str) -> str:
    """The form for look-ups of versions before December 2026. Stored tags may have this form."""
    return " ".join(first_canonical(asked).split())[:PREFIX_CHARACTERS]


def _rests(full_name: str) -> list[str]:
    """The canonical name from each of its words on."""
    folded = list(_folded(full_name))
    name = "".join(character for character, _ in folded)
    words = [place for place, (_, begins) in enumerate(folded) if begins][:NAME_WORDS]
    letters = [place for place in range(len(name)) if _begins_syllable(name, place)][:DENSE_STARTS]
    return [name[place:] for place in sorted({*words, *letters})]


def _folded(name: str) -> Iterator[tuple[str, bool]]:
    """The canonical name's characters, each with whether it begins a word."""
    begins = True
    # In place of a zero-width non-joiner people often type a space, or nothing.
    for word in name.replace("\u200c", " ").replace("\u200b", " ").split():
        for character in unicodedata.normalize("NFC", "".join(map(_letter, canonical(word)))):
            if _separates(character):
                begins = True
            else:
                yield character, begins
                begins = False
        begins = True


def _letter(character: str) -> str:
    if character in _KEPT:
        return character
    apart = (one for one in unicodedata.normalize("NFKD", character) if one not in _LEFT_OUT)
    return "".join(map(_plain, apart))


def _plain(character: str) -> str:
    if ord(character) in _KATAKANA:
        return chr(ord(character) - _TO_HIRAGANA)
    return _LATIN.get(character) or _ARABIC.get(character, _HAN.get(character, character))


def _separates(character: str) -> bool:
    """Whether the character is no part of a word: punctuation, a symbol, a space, an apostrophe, a format character."""
    kind = unicodedata.category(character)
    return character in _APOSTROPHES or kind[0] in "PSZ" or kind in ("Cc", "Cf", "Cs")


def _is_dense(character: str) -> bool:
    return bool(character) and any(first <= ord(character) <= last for first, last in _DENSE)


def _begins_syllable(name: str, place: int) -> bool:
    character = name[place]
    if not _is_dense(character) or character in _FOLLOWING or unicodedata.category(character)[0] == "M":
        return False
    return place == 0 or name[place - 1] not in _GOES_ON
