"""WebP (RFC 9649): the one picture of its container, still or alone in an animation."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from app.domain.formats import orientation
from app.domain.formats.parts import Animated, Damaged, Still

#: A photo has five or six.
_MOST_CHUNKS: Final = 4096
_ANIMATION, _ALPHA = 0x02, 0x10
_CHUNK_HEADER, _FRAME_HEADER, _CANVAS_BYTES = 8, 16, 10
_SIGNATURE_VP8L: Final = 0x2F
_START_CODE_VP8: Final = b"\x9d\x01\x2a"


@dataclass(slots=True)
class _Picture:
    """The chunks that make one picture: the coded pixels and, for VP8, their transparency."""

    alpha: bytes | None = None
    kind: bytes | None = None
    coded: bytes = b""

    def add(self, kind: bytes, body: bytes, *, is_whole: bool) -> None:
        if self.kind is not None:
            return
        if kind == b"ALPH" and self.alpha is None:
            self.alpha = body
        elif kind in {b"VP8 ", b"VP8L"}:
            if not is_whole:
                raise Damaged
            self.kind, self.coded = kind, body


@dataclass(slots=True)
class _Found:
    picture: _Picture = field(default_factory=_Picture)
    frames: list[bytes] = field(default_factory=list)
    canvas: tuple[int, int] | None = None
    is_animation: bool = False
    exif: list[bytes] = field(default_factory=list)
    xmp: list[bytes] = field(default_factory=list)

    def picture_in(self, data: bytes) -> _Picture:
        """The file's picture, or that of an animation's only frame."""
        for kind, body, is_whole in _chunks(data, 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))):
            if kind == b"VP8X" and self.canvas is None:
                self.canvas = _canvas(body)
                self.is_animation = bool(body[0] & _ANIMATION)
            elif kind == b"ANMF":
                self.frames.append(body)
            elif kind == b"EXIF":
                self.exif.append(body)
            elif kind == b"XMP ":
                self.xmp.append(body)
            else:
                self.picture.add(kind, body, is_whole=is_whole)
        if self.picture.kind is not None or not self.is_animation:
            return self.picture
        if len(self.frames) != 1:
            raise Animated
        picture = _Picture()
        for kind, body, is_whole in _chunks(self.frames[0], _FRAME_HEADER, len(self.frames[0])):
            picture.add(kind, body, is_whole=is_whole)
        return picture


def still(data: bytes) -> Still:
    """The one picture without its side chunks. Raises Damaged or Animated.

    An animation of a single frame is a still picture. The orientation is the first that EXIF chunks, then XMP chunks state.
    """
    found = _Found()
    try:
        picture = found.picture_in(data)
        size = _coded_size(picture)
    except Damaged:
        raise Damaged(found.canvas) from None
    stated = orientation.first_stated((orientation.of_exif, found.exif), (orientation.of_xmp, found.xmp))
    return Still(_file(picture, size), size, stated)


def _chunks(data: bytes, position: int, end: int) -> Iterator[tuple[bytes, bytes, bool]]:
    """Kind and content of each chunk, and whether the file has all of it."""
    for _ in range(_MOST_CHUNKS):
        if position + _CHUNK_HEADER > end:
            return
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        start = position + _CHUNK_HEADER
        yield data[position : position + 4], data[start : min(start + size, end)], start + size <= end
        position = start + size + size % 2
    raise Damaged


def _canvas(body: bytes) -> tuple[int, int]:
    if len(body) < _CANVAS_BYTES:
        raise Damaged
    return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")


def _coded_size(picture: _Picture) -> tuple[int, int]:
    """Width and height from the header of the coded pixels, as the decoder reads them."""
    body = picture.coded
    if picture.kind == b"VP8L" and body[:1] == bytes([_SIGNATURE_VP8L]) and len(body) > 5:  # noqa: PLR2004 - header and data
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if picture.kind == b"VP8 " and body[3:6] == _START_CODE_VP8 and len(body) >= _CANVAS_BYTES:
        size = int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
        if all(size):
            return size
    raise Damaged


def _file(picture: _Picture, size: tuple[int, int]) -> bytes:
    """A WebP file with these chunks alone."""
    assert picture.kind is not None  # noqa: S101 - `_coded_size` refuses a picture without one
    chunks = [_chunk(picture.kind, picture.coded)]
    if picture.alpha is not None and picture.kind == b"VP8 ":
        sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
        chunks = [_chunk(b"VP8X", bytes([_ALPHA, 0, 0, 0]) + sides), _chunk(b"ALPH", picture.alpha), *chunks]
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def _chunk(kind: bytes, body: bytes) -> bytes:
    return kind + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)
