"""Boxes (ISO/IEC 14496-12 and 15444-1): the frame of HEIC, AVIF and JPEG 2000 files."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from app.domain.formats.parts import Damaged

#: The most boxes side by side that are read. A phone's photo has some dozens of properties in one box.
MOST_BOXES: Final = 4096
_SHORT_HEADER, _LONG_HEADER = 8, 16


@dataclass(frozen=True, slots=True)
class BoxAt:
    """A box in a file: its kind, and where its content starts and ends."""

    kind: bytes
    start: int
    end: int


def boxes(data: bytes, start: int, end: int) -> Iterator[BoxAt]:
    """The boxes between two places. Raises Damaged where one does not fit, or there are too many."""
    for _ in range(MOST_BOXES):
        if start + _SHORT_HEADER > end:
            return
        size, header = int.from_bytes(data[start : start + 4], "big"), _SHORT_HEADER
        if size == 1:
            size, header = int.from_bytes(data[start + 8 : start + 16], "big"), _LONG_HEADER
        elif size == 0:
            size = end - start
        if size < header or start + size > end:
            raise Damaged
        yield BoxAt(data[start + 4 : start + 8], start + header, start + size)
        start += size
    raise Damaged


def box(kind: bytes, *contents: bytes) -> bytes:
    """A box with this content."""
    return (_SHORT_HEADER + sum(map(len, contents))).to_bytes(4, "big") + kind + b"".join(contents)


def full_box(kind: bytes, version: int, *contents: bytes) -> bytes:
    """A box with a version and no flags."""
    return box(kind, bytes([version, 0, 0, 0]), *contents)


@dataclass(slots=True)
class Fields:
    """Reads whole numbers one behind the other. Raises Damaged at the end of the content."""

    data: bytes
    at: int
    end: int

    def number(self, size: int) -> int:
        """The next big-endian number of `size` bytes; 0 for a size of 0."""
        if self.at + size > self.end:
            raise Damaged
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at], "big")

    def raw(self, size: int) -> bytes:
        """The next bytes."""
        if self.at + size > self.end:
            raise Damaged
        self.at += size
        return self.data[self.at - size : self.at]

    def version(self) -> tuple[int, int]:
        """The version and the flags of a full box."""
        word = self.number(4)
        return word >> 24, word & 0xFFFFFF
