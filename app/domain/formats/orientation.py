"""The orientation of a photo, from the blocks of side data that cameras and programs write it to.

The first block that states a valid orientation counts. EXIF counts before XMP. Of several blocks of one kind the first in
the file counts. Readers take untrusted bytes and raise nothing. They return None where the block states no orientation.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal

#: The most bytes that are read of a block of side data. A camera writes the orientation near the start.
MOST_BYTES: Final = 1 << 18
#: The most blocks that are read of one kind. Photos have one or two.
MOST_BLOCKS: Final = 8

_EXIF_PREFIX: Final = b"Exif\0"
_ORIENTATION_TAG, _MOST_ENTRIES, _ENTRY_BYTES, _HEADER_BYTES = 0x0112, 512, 12, 8
#: Whole numbers of TIFF 6.0 by type: BYTE, SHORT, LONG and their signed forms, with their lengths. SHORT is the right one.
_LENGTHS: Final = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}
_VALUE_BYTES: Final = 4
_PROFILE = re.compile(rb"\s*([A-Za-z0-9]{1,16})\s+\d{1,10}\s+([0-9A-Fa-f\s]*)")
_XAP: Final = b"http://ns.adobe.com/xap/1.0/\0"
_TIFF_PREFIX = re.compile(rb"""xmlns:([A-Za-z0-9_.-]{1,32})\s*=\s*["']http://ns\.adobe\.com/tiff/1\.0/["']""")


Reader = Callable[[bytes], int | None]


def first_stated(*kinds: tuple[Reader, Sequence[bytes]]) -> int:
    """The first orientation that a block states; 1 (upright) where none does. kinds: readers with their blocks, in order."""
    return next((value for value in _stated(kinds) if value is not None), 1)


def of_exif(block: bytes) -> int | None:
    """The orientation in the first directory of an EXIF block (TIFF 6.0), with or without its `Exif` prefix."""
    if block.startswith(_EXIF_PREFIX):
        block = block[len(_EXIF_PREFIX) + 1 :]
    if block[:2] not in (b"II", b"MM"):
        return None
    order: Literal["big", "little"] = "big" if block[:2] == b"MM" else "little"
    first = int.from_bytes(block[4:8], order)
    if first < _HEADER_BYTES:
        return None
    entries = int.from_bytes(block[first : first + 2], order)
    for index in range(min(entries, _MOST_ENTRIES)):
        start = first + 2 + _ENTRY_BYTES * index
        entry = block[start : start + _ENTRY_BYTES]
        if len(entry) < _ENTRY_BYTES:
            return None
        if int.from_bytes(entry[:2], order) == _ORIENTATION_TAG:
            return _value(entry, order)
    return None


def of_xmp(packet: bytes) -> int | None:
    """`tiff:Orientation` of an XMP packet, as an attribute or an element. The packet is searched, never parsed as XML."""
    # Without zero bytes, UTF-16 and UTF-32 read like UTF-8.
    text = packet.removeprefix(_XAP).replace(b"\0", b"")
    bound = _TIFF_PREFIX.search(text)
    name = re.escape(bound[1] if bound else b"tiff") + b":Orientation"
    found = re.search(rb"<" + name + rb"\s*>\s*([1-8])\s*<|\s" + name + rb"""\s*=\s*["']\s*([1-8])\s*["']""", text)
    return int(found[1] or found[2]) if found else None


def of_text_profile(text: bytes) -> int | None:
    """The orientation in a profile that was written as text (`Raw profile type exif`, `APP1` or `xmp`): a name, a length, hex."""
    profile = _PROFILE.match(text)
    if profile is None:
        return None
    digits = b"".join(profile[2].split())
    block = bytes.fromhex(digits[: len(digits) // 2 * 2].decode("ascii"))
    return of_xmp(block) if block.startswith(_XAP) or profile[1].lower() == b"xmp" else of_exif(block)


def _stated(kinds: Sequence[tuple[Reader, Sequence[bytes]]]) -> Iterator[int | None]:
    for read, blocks in kinds:
        for block in blocks[:MOST_BLOCKS]:
            yield read(block[:MOST_BYTES])


def _value(entry: bytes, order: Literal["big", "little"]) -> int | None:
    length = _LENGTHS.get(int.from_bytes(entry[2:4], order))
    count = int.from_bytes(entry[4:8], order)
    # A value that does not fit is stored elsewhere in the block: that is no orientation.
    if length is None or count * length > _VALUE_BYTES:
        return None
    value = int.from_bytes(entry[8 : 8 + length], order)
    return value if 1 <= value <= 8 else None  # noqa: PLR2004 - the eight values of EXIF
