"""JPEG (ITU T.81): walked marker by marker to the true end of the picture."""

import re
from dataclasses import dataclass, field
from typing import Final

from app.domain.formats import orientation
from app.domain.formats.parts import Damaged, Still

#: Cameras write about ten passes; the walk stops beyond this many.
MOST_SCANS: Final = 100
#: Segments of a header and between passes. A photo has some dozens; a profile or an extended XMP packet may take some hundreds.
_MOST_SEGMENTS: Final = 4096

END: Final = b"\xff\xd9"
_APP0, _APP1, _APP14, _APP15 = 0xE0, 0xE1, 0xEE, 0xEF
_COMMENT, _SOI, _EOI, _SOS, _TEM = 0xFE, 0xD8, 0xD9, 0xDA, 0x01
_RESTARTS: Final = range(0xD0, 0xD8)
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: Baseline, extended and progressive Huffman coding: what cameras write.
_HUFFMAN: Final = frozenset({0xC0, 0xC1, 0xC2})
_PROGRESSIVE: Final = 0xC2
_COEFFICIENTS: Final = 64
_EXIF, _XMP = b"Exif\0", b"http://ns.adobe.com/xap/1.0/\0"
_MARKER = re.compile(rb"\xff([^\x00\xff])")
#: Most stray bytes before a segment of the header. libjpeg skips any number of them.
_MOST_STRAY: Final = 65_536
#: In coded data 0xFF is followed by 0x00 or a restart marker; several in a row count as one.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
#: How the videos of phones begin. Behind a picture without end marker they would be taken for its last rows.
_VIDEO = re.compile(rb"MotionPhoto_Data|[\x00-\xff]{4}ftyp")


@dataclass(frozen=True, slots=True)
class StillJpeg(Still):
    """scans: in how many passes the picture is coded. is_progressive: it is not coded from top to bottom.

    has_end: whether the end marker was there. Without it `data` ends with the coded data of the last pass, which may be cut.
    """

    scans: int
    is_progressive: bool
    has_end: bool

    @property
    def is_streamed(self) -> bool:
        """Whether the decoder keeps some rows only, and reduces the picture while it reads it."""
        return self.scans == 1 and not self.is_progressive


def still(data: bytes) -> StillJpeg:
    """The picture without application segments, comments and everything behind its end marker. Raises Damaged.

    What decides the colours stays: APP0 (JFIF) and APP14 (Adobe). A picture that has all its passes but no end marker is
    returned with `has_end` false. The walk stops after MOST_SCANS + 1 passes.
    """
    return _Walk(data).run()


@dataclass(slots=True)
class _Walk:
    data: bytes
    kept: list[memoryview] = field(default_factory=list)
    exif: list[bytes] = field(default_factory=list)
    xmp: list[bytes] = field(default_factory=list)
    scans: int = 0
    frame: int | None = None
    size: tuple[int, int] | None = None
    #: How many segments and scans had been read when the last necessary pass began.
    complete: tuple[int, int] | None = None
    #: For each component, how many bits each of its 64 coefficients still lacks; None: all of them.
    missing: dict[int, list[int | None]] = field(default_factory=dict)

    def run(self) -> StillJpeg:
        kept, scans = self.kept, 0
        try:
            has_end, scans = self._walk(), self.scans
        except Damaged:
            if self.complete is None:
                raise
            has_end, (segments, scans) = False, self.complete
            last = self.kept[segments - 1]
            video = _VIDEO.search(last)
            kept = [*kept[: segments - 1], last if video is None else last[: video.start()]]
        if self.frame is None or self.size is None or scans == 0:
            raise Damaged(self.size)
        # A progressive picture whose last passes were cut off, and an end marker added.
        if self.frame == _PROGRESSIVE and self.complete is None and scans <= MOST_SCANS:
            raise Damaged(self.size)
        stated = orientation.first_stated((orientation.of_exif, self.exif), (orientation.of_xmp, self.xmp))
        plain = b"".join([self.data[:2], *kept, END if has_end else b""])
        return StillJpeg(plain, self.size, stated, scans, self.frame not in {0xC0, 0xC1}, has_end)

    def _walk(self) -> bool:
        """Walk to the end marker, or until there are too many passes. Raises Damaged where the file breaks off."""
        position = 2
        for _ in range(_MOST_SEGMENTS):
            marker, position = self._marker(position)
            if marker == _EOI or self.scans > MOST_SCANS:
                return True
            if marker in _RESTARTS or marker == _TEM:
                continue
            end = position + int.from_bytes(self.data[position : position + 2], "big")
            if marker == _SOI or end < position + 2 or end > len(self.data):
                break
            body = self.data[position + 2 : end]
            if marker == _SOS:
                self._start_scan(body)
                following = _NEXT_MARKER.search(self.data, end)
                end = len(self.data) if following is None else following.start()
            elif marker in _FRAMES:
                self._start_frame(marker, body)
            self._keep(marker, position, end, body)
            position = end
        raise Damaged(self.size)

    def _marker(self, position: int) -> tuple[int, int]:
        """The next marker, and where its segment starts. Fill bytes may come before it; in the header, stray bytes too."""
        marker = _MARKER.search(self.data, position, position + _MOST_STRAY)
        if marker is None:
            raise Damaged(self.size)
        # Behind a pass they may be the trailer of a picture without an end marker.
        if self.scans and self.data[position : marker.start()].strip(b"\xff"):
            raise Damaged(self.size)
        return marker[1][0], marker.end()

    def _keep(self, marker: int, position: int, end: int, body: bytes) -> None:
        if marker == _APP1 and body.startswith(_EXIF):
            self.exif.append(body)
        elif marker == _APP1 and body.startswith(_XMP):
            self.xmp.append(body)
        if not (_APP0 < marker <= _APP15 and marker != _APP14) and marker != _COMMENT:
            self.kept.append(memoryview(self.data)[position - 2 : end])
        if self.complete is None and marker == _SOS and self._is_complete():
            self.complete = len(self.kept), self.scans

    def _start_frame(self, marker: int, body: bytes) -> None:
        count = body[5] if len(body) > 5 else 0  # noqa: PLR2004 - precision, height, width, number of components
        if self.frame is not None or not count or len(body) != 6 + 3 * count:
            raise Damaged(self.size)
        self.frame = marker
        self.size = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
        self.missing = {component: [None] * _COEFFICIENTS for component in body[6::3]}

    def _start_scan(self, body: bytes) -> None:
        """Note which coefficients this pass brings, and to which bit."""
        count = body[0] if body else 0
        components = body[1 : 1 + 2 * count : 2]
        if not count or len(body) != 4 + 2 * count or any(one not in self.missing for one in components):
            raise Damaged(self.size)
        self.scans += 1
        first, last, low = body[-3], body[-2], body[-1] & 0x0F
        if first <= last < _COEFFICIENTS:
            for component in components:
                self.missing[component][first : last + 1] = [low] * (last + 1 - first)

    def _is_complete(self) -> bool:
        """Whether passes for every bit of every coefficient have begun: then only the end of the last one can be missing."""
        return self.frame in _HUFFMAN and all(bit == 0 for bits in self.missing.values() for bit in bits)
