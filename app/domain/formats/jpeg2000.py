"""JPEG 2000 (ISO/IEC 15444-1): a JP2 file or a bare codestream, as passports keep them.

The file is written again with its header and one codestream, without metadata, profiles, and everything behind the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from app.domain.formats.boxes import MOST_BOXES, BoxAt, Fields, box, boxes
from app.domain.formats.parts import Animated, Damaged, Still, Unsupported

_SIGNATURE: Final = b"\0\0\0\x0cjP  \r\n\x87\n"
_CODESTREAM: Final = b"\xff\x4f\xff\x51"
_SOT, _SIZ, _COD, _COC = 0xFF90, 0xFF51, 0xFF52, 0xFF53
_EOC: Final = b"\xff\xd9"
#: Cameras and chips write one tile. Some scanners write tiles of 256 pixels or more.
_MOST_TILES: Final = 1024
_MOST_PARTS: Final = 8192
_MOST_SEGMENTS: Final = 1024
_MOST_COMPONENTS: Final = 4
_MOST_BITS: Final = 16
_KEPT: Final = frozenset({b"ihdr", b"bpcc", b"pclr", b"cmap", b"cdef"})
#: Colours by number: CMYK, sRGB, grey, sYCC.
_COLOURS: Final = frozenset({12, 16, 17, 18})
_SRGB, _GREY = 16, 17


@dataclass(frozen=True, slots=True)
class Jpeg2000Still(Still):
    """halvings: how many times the decoder can halve the picture while it reads it."""

    halvings: int


def is_jpeg2000(data: bytes) -> bool:
    """Whether the file begins as one of this family."""
    return data.startswith((_SIGNATURE, _CODESTREAM))


def still(data: bytes) -> Jpeg2000Still:
    """The one picture. Raises Damaged, Animated, or Unsupported for films and exotic pictures."""
    if data.startswith(_CODESTREAM):
        return _Codestream(data, 0, len(data)).still()
    header, start, stop = _parts(data)
    plain = _Codestream(data, start, stop)
    found = plain.still()
    colour = _colour(data, header, plain.components)
    first, *others = (box(one.kind, data[one.start : one.end]) for one in header if one.kind in _KEPT)
    # The number of colours comes before the palette: Pillow reads them in this order.
    head = box(b"jp2h", first, colour, *others)
    file = b"".join([_SIGNATURE, box(b"ftyp", b"jp2 ", bytes(4), b"jp2 "), head, box(b"jp2c", found.data)])
    return replace(found, data=file)


def _parts(data: bytes) -> tuple[list[BoxAt], int, int]:
    """The boxes of the header, and where the first codestream starts and stops."""
    header: list[BoxAt] = []
    for one in _top_boxes(data):
        if one.kind == b"jp2h" and not header:
            header = list(boxes(data, one.start, one.end))
        elif one.kind == b"jp2c":
            if not header or header[0].kind != b"ihdr":
                raise Damaged
            return header, one.start, one.end
        elif one.kind == b"moov" or (one.kind == b"ftyp" and data[one.start : one.start + 4] == b"mjp2"):
            raise Animated
    raise Damaged


def _top_boxes(data: bytes) -> Iterator[BoxAt]:
    """As `boxes`; a codestream may be cut in its last bytes, which `_Codestream` judges."""
    start = len(_SIGNATURE)
    for _ in range(MOST_BOXES):
        if start + 8 > len(data):
            return
        size = int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] == b"jp2c" and (size == 0 or start + size > len(data)):
            yield BoxAt(b"jp2c", start + 8, len(data))
            return
        one = next(boxes(data, start, len(data)))
        yield one
        start = one.end
    raise Damaged


def _colour(data: bytes, header: list[BoxAt], components: int) -> bytes:
    """A box that names the colours. Profiles are left out: sRGB or grey is close enough for faces."""
    for one in header:
        fields = Fields(data, one.start, one.end)
        if one.kind == b"colr" and fields.number(1) == 1:
            number = Fields(data, one.start + 3, one.end).number(4)
            if number not in _COLOURS:
                raise Unsupported("It is a JPEG 2000 file in colours that are not read here.")
            return box(b"colr", bytes([1, 0, 0]), number.to_bytes(4, "big"))
    has_palette = any(one.kind == b"pclr" for one in header)
    number = _SRGB if has_palette or components >= 3 else _GREY  # noqa: PLR2004 - red, green, blue
    return box(b"colr", bytes([1, 0, 0]), number.to_bytes(4, "big"))


@dataclass(slots=True)
class _Codestream:
    data: bytes
    start: int
    stop: int
    size: tuple[int, int] | None = None
    components: int = 0
    halvings: int = 32
    tiles: int = 0

    def still(self) -> Jpeg2000Still:
        """The codestream up to the end of its last tile. Raises Damaged where data are missing."""
        end = self._walk()
        assert self.size is not None  # noqa: S101 - `_walk_tiles` refuses a stream without it
        return Jpeg2000Still(self.data[self.start : end] + _EOC, self.size, 1, self.halvings)

    def _walk(self) -> int:
        if self.data[self.start : self.start + 4] != _CODESTREAM:
            raise Damaged
        position = self.start + 2
        for _ in range(_MOST_SEGMENTS):
            marker, body = self._segment(position)
            if marker == _SOT:
                return self._walk_tiles(position)
            if marker == _SIZ:
                self._read_size(body)
            elif marker in (_COD, _COC):
                self._read_levels(marker, body)
            position = body.end
        raise Damaged(self.size)

    def _segment(self, position: int) -> tuple[int, Fields]:
        head = Fields(self.data, position, self.stop)
        marker, length = head.number(2), head.number(2)
        if marker < 0xFF00 or length < 2 or position + 2 + length > self.stop:  # noqa: PLR2004 - markers begin with 0xFF
            raise Damaged(self.size)
        return marker, Fields(self.data, position + 4, position + 2 + length)

    def _read_size(self, body: Fields) -> None:
        body.number(2)
        right, bottom, left, top, across, down, tiles_left, tiles_top = (body.number(4) for _ in range(8))
        self.components = body.number(2)
        if self.size is not None or right <= left or bottom <= top or not across or not down:
            raise Damaged(self.size)
        self.size = right - left, bottom - top
        if not self.components or self.components > _MOST_COMPONENTS or tiles_left > left or tiles_top > top:
            raise Damaged(self.size)
        self.tiles = -(-(right - tiles_left) // across) * -(-(bottom - tiles_top) // down)
        depths = [body.raw(3) for _ in range(self.components)]
        if self.tiles > _MOST_TILES or any((depth[0] & 0x7F) >= _MOST_BITS for depth in depths):
            raise Damaged(self.size)

    def _read_levels(self, marker: int, body: Fields) -> None:
        before = 5 if marker == _COD else 3
        body.raw(before)
        self.halvings = min(self.halvings, body.number(1))

    def _walk_tiles(self, position: int) -> int:
        seen: set[int] = set()
        for _ in range(_MOST_PARTS):
            if position == self.stop or self.data[position : position + 2] == _EOC:
                if self.size is None or len(seen) != self.tiles:
                    raise Damaged(self.size)
                return position
            marker, body = self._segment(position)
            if marker != _SOT:
                raise Damaged(self.size)
            tile, length = body.number(2), body.number(4)
            seen.add(tile)
            # Length 0: up to the end marker, which is then the last thing in the stream.
            end = position + length if length else self._last()
            if tile >= self.tiles or end < position + 14 or end > self.stop:
                raise Damaged(self.size)
            position = end
        raise Damaged(self.size)

    def _last(self) -> int:
        return max(0, self.data.rfind(_EOC, self.start, self.stop))
