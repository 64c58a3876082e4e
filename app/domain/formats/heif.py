"""HEIF (ISO/IEC 23008-12): the primary picture of a HEIC or AVIF file, whole or as a grid of tiles.

The file is written again with the items that make the picture: its tiles and its transparency. Side data, previews, depth and
gain maps, other pictures and videos are left out. The decoder reads our boxes. Only the coded data are the sender's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from app.domain.formats.boxes import Fields, box, boxes, full_box
from app.domain.formats.parts import Animated, Damaged, Still, Unsupported

Coding = Literal["heic", "avif"]

#: A phone's photo of 48 megapixels in tiles of 512 pixels has 192 of them, and as many of its gain map.
_MOST_ITEMS: Final = 4096
_MOST_TILES: Final = 1024
_MOST_EXTENTS: Final = 64
#: Places of all items, and targets of all references. They may take no bytes of the file, and each takes a hundred of memory.
_MOST_PLACES, _MOST_TARGETS = 1 << 14, 1 << 16
#: Tiles stand out of the picture by less than a row and a column. So they have at most this many times its pixels, and some.
_MOST_TILED, _FREE_PIXELS = 2, 1 << 22
_SEQUENCES: Final = frozenset({b"hevc", b"hevx", b"hevm", b"hevs", b"msf1", b"avis", b"avcs"})
_STILLS: Final = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"mif1", b"mif2", b"miaf", b"avif", b"avio", b"MiHE", b"MiHB"}
)
_CODINGS: Final[dict[bytes, Coding]] = {b"hvc1": "heic", b"av01": "avif"}
_CONFIGURATIONS: Final[dict[Coding, bytes]] = {"heic": b"hvcC", "avif": b"av1C"}
_TRANSFORMS: Final = (b"clap", b"irot", b"imir")
_ALPHA: Final = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0", b"urn:mpeg:hevc:2015:auxid:1\0")
_LONGEST_ALPHA: Final = 4 + max(map(len, _ALPHA))
_NO_HANDLER: Final = bytes(4) + b"pict" + bytes(13)

#: Orientations as EXIF counts them, by quarters counter-clockwise, and those that are mirrored after that: top and bottom
#: exchanged, left and right exchanged.
_TURNED: Final = (1, 8, 3, 6)
_MIRRORED: Final = ((4, 5, 2, 7), (2, 7, 4, 5))


@dataclass(frozen=True, slots=True)
class HeifStill(Still):
    """coding: of its pixels. coded_size: width and height of what the decoder returns.

    window: left, top, right, bottom of the picture there; the rest is padding. size: of the window.
    """

    coding: Coding
    coded_size: tuple[int, int]
    window: tuple[int, int, int, int]


@dataclass(slots=True)
class _Item:
    kind: bytes = b""
    extents: list[tuple[int, int]] = field(default_factory=list)
    #: Numbers of properties, each with whether it is essential.
    properties: list[tuple[int, bool]] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Part:
    """An item of the file that is written. properties: whole boxes, each with whether it is essential."""

    kind: bytes
    coded: bytes
    properties: list[tuple[bytes, bool]]
    tiles: list["_Part"]


def is_heif(data: bytes) -> bool:
    """Whether the file begins as one of this family."""
    return data[4:8] == b"ftyp"


def still(data: bytes) -> HeifStill:
    """The primary picture. Raises Damaged, Animated, or Unsupported for other codings than HEVC and AV1.

    EXIF does not turn a picture here: the properties of the file do.
    """
    return _File(data).still()


@dataclass(slots=True)
class _File:
    data: bytes
    primary: int = -1
    items: dict[int, _Item] = field(default_factory=dict)
    #: The kind of each property, and its content.
    properties: list[tuple[bytes, bytes]] = field(default_factory=list)
    boxed: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    #: Numbers of auxiliary items of the primary one.
    auxiliary: list[int] = field(default_factory=list)
    #: Where the content of `idat` starts and ends.
    inner: tuple[int, int] = (0, 0)
    #: Bytes of coded data that may still be taken: items may name the same bytes again and again.
    left: int = 0

    def still(self) -> HeifStill:
        self.left = len(self.data)
        self._read_meta()
        primary = self._item(self.primary)
        coded_size = self._size(primary)
        try:
            coding = self._coding(primary)
            alpha = next((self._item(number) for number in self.auxiliary if self._is_alpha(self._item(number))), None)
            parts = [self._part(one, coding, is_top=True) for one in (primary, alpha) if one is not None]
            window, orientation = self._transforms(primary, coded_size)
        except Damaged:
            raise Damaged(coded_size) from None
        size = window[2] - window[0], window[3] - window[1]
        return HeifStill(_file(parts, coding), size, orientation, coding, coded_size, window)

    def _read_meta(self) -> None:
        brand = self.data[8:12]
        if brand in _SEQUENCES:
            raise Animated
        if brand not in _STILLS:
            raise Unsupported("It is a video, or another file of that family.")
        for one in boxes(self.data, 0, len(self.data)):
            if one.kind == b"meta":
                self._read_boxes(one.start + 4, one.end)
                return
        raise Damaged

    def _read_boxes(self, start: int, end: int) -> None:
        readers: dict[bytes, Callable[[Fields], None]] = {
            b"pitm": self._read_primary, b"iinf": self._read_kinds, b"iloc": self._read_places, b"iref": self._read_references,
            b"ipco": self._read_properties, b"ipma": self._read_associations,
        }  # fmt: skip
        # References and places name items, so kinds are read first; each box counts once.
        found: dict[bytes, Fields] = {}
        for one in boxes(self.data, start, end):
            is_first_of_properties = one.kind == b"iprp" and b"iprp" not in found
            found.setdefault(one.kind, Fields(self.data, one.start, one.end))
            for each in boxes(self.data, one.start, one.end) if is_first_of_properties else ():
                found.setdefault(each.kind, Fields(self.data, each.start, each.end))
        if b"idat" in found:
            self.inner = found[b"idat"].at, found[b"idat"].end
        for kind, read in readers.items():
            if kind in found:
                read(found[kind])

    def _read_primary(self, fields: Fields) -> None:
        version, _ = fields.version()
        self.primary = fields.number(2 if version == 0 else 4)

    def _read_kinds(self, fields: Fields) -> None:
        version, _ = fields.version()
        fields.number(2 if version == 0 else 4)
        for one in boxes(self.data, fields.at, fields.end):
            entry = Fields(self.data, one.start, one.end)
            version, _ = entry.version()
            if one.kind != b"infe" or version not in (2, 3):
                continue
            number = entry.number(2 if version == 2 else 4)  # noqa: PLR2004 - as the standard counts
            entry.number(2)
            self.items.setdefault(number, _Item(entry.raw(4)))

    def _read_places(self, fields: Fields) -> None:
        version, _ = fields.version()
        sizes = fields.number(2)
        of_offset, of_length, of_base, of_index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        left = _MOST_PLACES
        for _ in range(_within(fields.number(4 if version == 2 else 2), _MOST_ITEMS)):  # noqa: PLR2004
            number = fields.number(4 if version == 2 else 2)  # noqa: PLR2004
            method = fields.number(2) & 15 if version else 0
            source = fields.number(2)
            base = fields.number(of_base)
            # Data in another file, or in another item, is nothing that cameras write.
            start, end = {0: (0, len(self.data)), 1: self.inner}.get(method if source == 0 else -1, (0, 0))
            extents = []
            count = _within(fields.number(2), left)
            left -= count
            for _ in range(count):
                fields.number(of_index if version else 0)
                begin = start + base + fields.number(of_offset)
                length = fields.number(of_length) or max(0, end - begin)
                # An item that lies outside the file is an error only where the picture needs it.
                extents.append((begin, begin + length if begin + length <= end else -1))
            if number in self.items and not self.items[number].extents:
                self.items[number].extents = extents

    def _read_references(self, fields: Fields) -> None:
        version, _ = fields.version()
        size, left = 2 if version == 0 else 4, _MOST_TARGETS
        for one in boxes(self.data, fields.at, fields.end):
            entry = Fields(self.data, one.start, one.end)
            source = entry.number(size)
            count = _within(entry.number(2), min(left, _MOST_ITEMS))
            left -= count
            targets = [entry.number(size) for _ in range(count)]
            if one.kind == b"dimg" and source in self.items and not self.items[source].tiles:
                self.items[source].tiles = targets
            elif one.kind == b"auxl" and self.primary in targets:
                self.auxiliary.append(source)

    def _read_properties(self, fields: Fields) -> None:
        self.properties = [
            (one.kind, self.data[one.start : one.end]) for one in boxes(self.data, fields.at, fields.end)
        ]

    def _read_associations(self, fields: Fields) -> None:
        version, flags = fields.version()
        size = 2 if flags & 1 else 1
        top = 1 << (8 * size - 1)
        for _ in range(_within(fields.number(4), _MOST_ITEMS)):
            number = fields.number(2 if version == 0 else 4)
            found = [fields.number(size) for _ in range(fields.number(1))]
            if number in self.items and not self.items[number].properties:
                self.items[number].properties = [(value & (top - 1), bool(value & top)) for value in found]

    def _item(self, number: int) -> _Item:
        if number not in self.items:
            raise Damaged
        return self.items[number]

    def _properties_of(self, item: _Item) -> list[tuple[bytes, bytes, bool]]:
        """Kind, content, and whether it is essential, in order."""
        found = [(number, essential) for number, essential in item.properties if 0 < number <= len(self.properties)]
        return [(*self.properties[number - 1], essential) for number, essential in found]

    def _size(self, item: _Item) -> tuple[int, int]:
        for kind, content, _ in self._properties_of(item):
            if kind == b"ispe":
                fields = Fields(content, 4, len(content))
                return fields.number(4), fields.number(4)
        raise Damaged

    def _coding(self, item: _Item) -> Coding:
        first = self._item(item.tiles[0]) if item.kind == b"grid" and item.tiles else item
        if first.kind not in _CODINGS:
            raise Unsupported("It is a HEIF file whose picture is coded neither as HEVC nor as AV1.")
        return _CODINGS[first.kind]

    def _is_alpha(self, item: _Item) -> bool:
        # Told by its length first: a long one would be copied each time that somebody names it.
        return any(
            kind == b"auxC" and len(content) <= _LONGEST_ALPHA and content[4:] in _ALPHA
            for kind, content, _ in self._properties_of(item)
        )

    def _part(self, item: _Item, coding: Coding, *, is_top: bool) -> _Part:
        """The item with what it needs. is_top: it may be a grid."""
        if item.kind != b"grid":
            if _CODINGS.get(item.kind) != coding:
                raise Damaged
            return _Part(item.kind, self._coded(item), self._kept(item, coding), [])
        if not is_top:
            raise Damaged
        coded = self._coded(item)
        tiles = [self._item(number) for number in item.tiles[: _MOST_TILES + 1]]
        self._check_grid(coded, tiles, self._size(item))
        parts = [self._part(tile, coding, is_top=False) for tile in tiles]
        return _Part(b"grid", coded, self._kept(item, coding), parts)

    def _check_grid(self, coded: bytes, tiles: list[_Item], size: tuple[int, int]) -> None:
        """Raises Damaged unless so many tiles of one size make a picture of this size."""
        fields = Fields(coded, 1, len(coded))
        length = 4 if fields.number(1) & 1 else 2
        rows, columns = fields.number(1) + 1, fields.number(1) + 1
        if (fields.number(length), fields.number(length)) != size or rows * columns != len(tiles):
            raise Damaged
        width, height = self._size(tiles[0])
        if any(self._size(tile) != (width, height) for tile in tiles):
            raise Damaged
        if not 0 <= columns * width - size[0] < width or not 0 <= rows * height - size[1] < height:
            raise Damaged
        if len(tiles) > _MOST_TILES or width * height * len(tiles) > _MOST_TILED * size[0] * size[1] + _FREE_PIXELS:
            raise Damaged

    def _coded(self, item: _Item) -> bytes:
        if not item.extents or len(item.extents) > _MOST_EXTENTS:
            raise Damaged
        self.left -= sum(end - begin for begin, end in item.extents)
        if any(end < begin for begin, end in item.extents) or self.left < 0:
            raise Damaged
        return b"".join(self.data[begin:end] for begin, end in item.extents)

    def _kept(self, item: _Item, coding: Coding) -> list[tuple[bytes, bool]]:
        """The properties that make the pixels. Profiles are left out, and transforms are applied later."""
        kept = []
        for kind, content, essential in self._properties_of(item):
            is_points = kind == b"colr" and content[:4] == b"nclx"
            if kind in {b"ispe", b"pixi", b"auxC", _CONFIGURATIONS[coding]} or is_points:
                kept.append((self._boxed(kind, content), essential))
            elif essential and kind not in {*_TRANSFORMS, b"colr"}:
                raise Unsupported("It is a HEIF file with a property that is not known here.")
        return kept

    def _boxed(self, kind: bytes, content: bytes) -> bytes:
        """The whole box, made once: an item may name it 255 times, and each of a thousand tiles again."""
        # By identity: the content may have megabytes. `properties` keeps it alive.
        place = kind, id(content)
        if place not in self.boxed:
            self.boxed[place] = box(kind, content)
        return self.boxed[place]

    def _transforms(self, item: _Item, size: tuple[int, int]) -> tuple[tuple[int, int, int, int], int]:
        """The window of the picture, and its orientation."""
        window, quarters, mirror = (0, 0, *size), 0, None
        seen: list[bytes] = []
        for kind, content, _ in self._properties_of(item):
            if kind not in _TRANSFORMS:
                continue
            if kind in seen or (kind == b"clap" and seen) or not content:
                raise Damaged
            seen.append(kind)
            if kind == b"clap":
                window = _window(content, size)
            elif kind == b"irot":
                # After a mirror, a turn goes the other way round.
                quarters = content[0] & 3 if mirror is None else -(content[0] & 3) % 4
            else:
                mirror = content[0] & 1
        return window, (_TURNED if mirror is None else _MIRRORED[mirror])[quarters]


def _within(count: int, most: int) -> int:
    if count > most:
        raise Damaged
    return count


def _window(content: bytes, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The clean aperture: width, height, and the offset of its centre from the picture's, each as a fraction."""
    fields = Fields(content, 0, len(content))
    numbers = [fields.number(4) for _ in range(8)]
    if not all(numbers[1::2]):
        raise Damaged
    sides = [numbers[0] // numbers[1], numbers[2] // numbers[3]]
    edges = []
    for side, whole, above, below in zip(sides, size, numbers[4::2], numbers[5::2], strict=True):
        offset = (above - (1 << 32) if above >> 31 else above) / below
        edges.append(round(offset + (whole - side) / 2))
        if side < 1 or edges[-1] < 0 or edges[-1] + side > whole:
            raise Damaged
    return edges[0], edges[1], edges[0] + sides[0], edges[1] + sides[1]


def _file(parts: list[_Part], coding: Coding) -> bytes:
    """A file of these items: the picture and, where it has one, its transparency."""
    items: list[_Part] = []
    references: list[bytes] = []
    tops: list[int] = []
    for part in parts:
        items.append(part)
        tops.append(len(items))
        if part.tiles:
            items += part.tiles
            numbers = range(tops[-1] + 1, len(items) + 1)
            references.append(box(b"dimg", _short(tops[-1]), _short(len(numbers)), *map(_short, numbers)))
    if len(tops) > 1:
        references.append(box(b"auxl", _short(tops[1]), _short(1), _short(tops[0])))
    kept: list[bytes] = []
    places: dict[bytes, int] = {}
    associations = []
    for number, item in enumerate(items, start=1):
        found = []
        for one, essential in item.properties[:255]:
            if one not in places:
                kept.append(one)
                places[one] = len(kept)
            found.append(_short(places[one] | (0x8000 if essential else 0)))
        associations.append(_short(number) + bytes([len(found)]) + b"".join(found))
    kinds = [
        full_box(b"infe", 2, _short(number), b"\0\0", item.kind, b"\0") for number, item in enumerate(items, start=1)
    ]
    brand = b"heic" if coding == "heic" else b"avif"
    head = box(b"ftyp", brand, bytes(4), b"mif1", brand, b"miaf")
    before = [
        full_box(b"hdlr", 0, _NO_HANDLER), full_box(b"pitm", 0, _short(1)),
        full_box(b"iinf", 0, _short(len(kinds)), *kinds),
        *([full_box(b"iref", 0, *references)] if references else []),
        box(b"iprp", box(b"ipco", *kept),
            box(b"ipma", bytes([0, 0, 0, 1]), len(items).to_bytes(4, "big"), *associations)),
    ]  # fmt: skip
    # Each place: number, no other file, one extent with offset and length.
    places_size = 8 + 4 + 2 + 2 + 14 * len(items)
    at = len(head) + 8 + 4 + sum(map(len, before)) + places_size + 8
    rows = []
    for number, item in enumerate(items, start=1):
        rows.append(_short(number) + bytes(2) + _short(1) + at.to_bytes(4, "big") + len(item.coded).to_bytes(4, "big"))
        at += len(item.coded)
    locations = full_box(b"iloc", 0, b"\x44\x00", _short(len(items)), *rows)
    return head + full_box(b"meta", 0, *before, locations) + box(b"mdat", *(item.coded for item in items))


def _short(number: int) -> bytes:
    return number.to_bytes(2, "big")
