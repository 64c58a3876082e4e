"""HEIC and AVIF files: what is the picture, what is not, and what is refused before anything is decoded."""

import contextlib
import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app.domain.formats import heif
from app.domain.formats.boxes import box, full_box
from app.domain.formats.parts import Animated, Damaged, Unsupported
from app.domain.photo import PhotoReader
from app.domain.rows import upright
from app.errors import Problem, TooManyPixels, UnsupportedMediaType
from tests.support.picture_files import heif_file

IMAGE = Image.fromarray(np.arange(96 * 80 * 3, dtype=np.uint8).reshape(96, 80, 3))
PLAIN = {kind: heif_file(IMAGE, kind) for kind in ("HEIF", "AVIF")}
TILED = heif_file(IMAGE.resize((160, 192)), tile_size=64)
CODED = b"coded"


def made(
    *properties: bytes,
    kind: bytes = b"hvc1",
    essential: bool = False,
    brand: bytes = b"heic",
    extents: tuple[tuple[int, int], ...] = ((0, 5),),
    items: tuple[bytes, ...] = (),
    more: tuple[bytes, ...] = (),
    data: bytes = CODED,
) -> bytes:
    """A HEIF file whose primary item 1 has these properties.

    extents: offset in `data`, and length. items: kinds of more items.
    """
    kinds = [
        full_box(b"infe", 2, struct.pack(">HH", n, 0), one, b"\0") for n, one in enumerate((kind, *items), start=1)
    ]
    ipma = bytes([len(properties)]) + bytes(n | (0x80 if essential else 0) for n in range(1, len(properties) + 1))
    before = [
        full_box(b"pitm", 0, struct.pack(">H", 1)),
        full_box(b"iinf", 0, struct.pack(">H", len(kinds)), *kinds),
        box(b"iprp", box(b"ipco", *properties), full_box(b"ipma", 0, struct.pack(">I", 1), b"\0\1", ipma)),
        *more,
    ]
    head = box(b"ftyp", brand, bytes(4), b"mif1")
    size = 8 + 4 + 4 + (6 + 8 * len(extents))
    start = len(head) + 8 + 4 + sum(map(len, before)) + size + 8
    places = b"".join(struct.pack(">II", start + offset, length) for offset, length in extents)
    iloc = full_box(b"iloc", 0, b"\x44\x00", struct.pack(">HHHH", 1, 1, 0, len(extents)), places)
    return head + full_box(b"meta", 0, *before, iloc) + box(b"mdat", data)


def ispe(width: int, height: int) -> bytes:
    """The size of an item."""
    return full_box(b"ispe", 0, struct.pack(">II", width, height))


def clap(*numbers: int) -> bytes:
    """A clean aperture."""
    return box(b"clap", struct.pack(">8i", *numbers))


CONFIGURATION = box(b"hvcC", bytes(23))
SQUARE = (ispe(64, 48), CONFIGURATION)


def test_a_made_file_is_read() -> None:
    still = heif.still(made(*SQUARE))
    assert (still.coding, still.size, still.orientation) == ("heic", (64, 48), 1)
    assert still.data.endswith(CODED)


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("mirror", [None, 0, 1])
@pytest.mark.parametrize("is_mirrored_first", [False, True])
def test_a_picture_is_turned_as_its_properties_say(turn: int, mirror: int | None, *, is_mirrored_first: bool) -> None:
    """Irot turns by quarters counter-clockwise; imir 0 exchanges top and bottom, 1 left and right. In the order of the file."""
    transforms = [box(b"irot", bytes([turn]))]
    if mirror is not None:
        transforms.insert(0 if is_mirrored_first else 1, box(b"imir", bytes([mirror])))
    still = heif.still(made(*SQUARE, *transforms, essential=True))
    pixels = np.arange(64 * 48 * 3, dtype=np.uint32).reshape(48, 64, 3)
    expected = pixels
    for one in transforms:
        flipped = expected[::-1] if mirror == 0 else expected[:, ::-1]
        expected = np.rot90(expected, turn) if one[4:8] == b"irot" else flipped
    assert np.array_equal(upright(pixels, still.orientation), expected)  # type: ignore[arg-type] # wide numbers
    assert b"irot" not in still.data


def test_exif_turns_nothing_here() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = made(*SQUARE, data=CODED + exif.tobytes(), items=(b"Exif",))
    assert heif.still(whole).orientation == 1


def test_padding_is_cut_off() -> None:
    still = heif.still(made(*SQUARE, clap(60, 1, 40, 1, -2, 1, -4, 1)))
    assert (still.coded_size, still.window, still.size) == ((64, 48), (0, 0, 60, 40), (60, 40))
    for wrong in (
        clap(65, 1, 40, 1, 0, 1, 0, 1),
        clap(60, 0, 40, 1, 0, 1, 0, 1),
        clap(60, 1, 40, 1, 9, 1, 0, 1),
        clap(0, 1, 1, 1, 0, 1, 0, 1),
    ):
        with pytest.raises(Damaged):
            heif.still(made(*SQUARE, wrong))


@pytest.mark.parametrize("kind", PLAIN)
def test_f2_what_lies_behind_the_picture_is_not_the_picture(kind: str) -> None:
    plain = heif.still(PLAIN[kind])
    for behind in (b"x" * 1000, box(b"mpvd", b"\0" * 500), box(b"free", b"x") + PLAIN["HEIF"], b"SEFH\1\0\0\0"):
        assert heif.still(PLAIN[kind] + behind) == plain


def test_side_data_previews_and_profiles_are_left_out() -> None:
    exif = Image.Exif()
    exif[0x010F] = "somebody's camera"
    whole = heif_file(
        IMAGE, exif=exif, xmp=b"<x:xmpmeta>somebody</x:xmpmeta>", icc_profile=b"a profile" * 99, thumbnails=[32]
    )
    still = heif.still(whole)
    assert b"somebody" in whole
    for gone in (b"somebody", b"a profile", b"Exif", b"thmb"):
        assert gone not in still.data
    assert len(heif.still(heif_file(IMAGE, save_all=True, append_images=[IMAGE] * 3)).data) < 2 * len(PLAIN["HEIF"])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("whole", [*PLAIN.values(), TILED], ids=[*PLAIN, "tiles"])
def test_h04_a_cut_file_is_refused(whole: bytes, share: float) -> None:
    with pytest.raises(Damaged):
        heif.still(whole[: int(len(whole) * share)])


def test_h14_films_are_refused() -> None:
    with pytest.raises(Animated):
        heif.still(heif_file(IMAGE, "AVIF", save_all=True, append_images=[IMAGE]))
    for brand in (b"hevc", b"msf1", b"avis"):
        with pytest.raises(Animated):
            heif.still(made(*SQUARE, brand=brand))
    with pytest.raises(Unsupported):
        heif.still(box(b"ftyp", b"isom", bytes(4)) + box(b"moov", bytes(99)))


@pytest.mark.parametrize("kind", [b"avc1", b"jpeg", b"j2k1", b"unci", b"iovl", b"iden", b"tmap", b"mime"])
def test_other_codings_are_named_and_refused(kind: bytes) -> None:
    with pytest.raises(UnsupportedMediaType, match="neither as HEVC nor as AV1"):
        PhotoReader(isolated=Never()).decode(made(*SQUARE, kind=kind))


def test_an_unknown_property_that_a_reader_must_know_is_refused() -> None:
    unknown = box(b"abcd", bytes(8))
    assert heif.still(made(*SQUARE, unknown)).size == (64, 48)
    with pytest.raises(Unsupported):
        heif.still(made(*SQUARE, unknown, essential=True))


def _grid(rows: int, columns: int, width: int, height: int) -> bytes:
    return bytes([0, 1, rows - 1, columns - 1]) + struct.pack(">II", width, height)


def _reference(kind: bytes, source: int, *targets: int) -> bytes:
    return full_box(b"iref", 0, box(kind, struct.pack(f">HH{len(targets)}H", source, len(targets), *targets)))


BOMBS = {
    "65,535 pixels a side": made(ispe(65_535, 65_535), CONFIGURATION),
    "4 billion pixels a side": made(ispe(2**32 - 1, 2**32 - 1), CONFIGURATION),
    "an extent behind the file": made(*SQUARE, extents=((0, 2**31),)),
    "the same bytes 64 times": made(*SQUARE, extents=((0, 4000),) * 64, data=bytes(4000)),
    "a grid of itself": made(
        ispe(64, 64), kind=b"grid", data=_grid(1, 1, 64, 64), extents=((0, 12),), more=(_reference(b"dimg", 1, 1),)
    ),
    "a grid of 65,536 tiles": made(
        ispe(6400, 2560), kind=b"grid", data=_grid(256, 256, 6400, 2560), extents=((0, 12),), items=(b"hvc1",),
        more=(_reference(b"dimg", 1, *[2] * 4000),),
    ),
    "a grid without tiles": made(ispe(64, 64), kind=b"grid", data=_grid(1, 1, 64, 64), extents=((0, 12),)),
    "transparency of itself": made(*SQUARE, box(b"auxC", bytes(4) + b"urn:mpeg:hevc:2015:auxid:1\0"), kind=b"grid",
                                   more=(_reference(b"auxl", 1, 1),)),
    "no primary item": made(*SQUARE).replace(b"pitm\0\0\0\0\0\1", b"pitm\0\0\0\0\0\7"),
    "boxes without end": box(b"ftyp", b"heic", bytes(4)) + box(b"free") * 100_000,
    "a box shorter than its header": box(b"ftyp", b"heic", bytes(4)) + b"\0\0\0\1meta" + (3).to_bytes(8, "big") + bytes(99),
}  # fmt: skip


class Never:
    """A decoder that must not be asked."""

    def decode(self, *_: object) -> None:  # type: ignore[override]
        raise AssertionError

    def close(self) -> None:
        """Nothing to end."""


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_h01_bombs_are_refused_before_they_are_decoded(bomb: bytes) -> None:
    began = time.process_time()
    with pytest.raises(Problem) as refusal:
        PhotoReader(isolated=Never()).decode(bomb)  # type: ignore[arg-type] # as far as it is used
    assert refusal.value.status in (413, 415, 422)
    assert time.process_time() - began < 2


def _named_again_and_again(*properties: bytes, items: int) -> bytes:
    """A file of so many items, each of which names each property 40 times or more."""
    numbers = bytes([len(properties) * 40, *[n for n in range(1, len(properties) + 1) for _ in range(40)]])
    kinds = [full_box(b"infe", 2, struct.pack(">HH", n, 0), b"hvc1", b"\0") for n in range(1, items + 1)]
    named = b"".join(struct.pack(">H", n) + numbers for n in range(1, items + 1))
    auxiliary = b"".join(box(b"auxl", struct.pack(">HHH", n, 1, 1)) for n in range(2, items + 1))
    return box(b"ftyp", b"heic", bytes(4), b"mif1") + full_box(
        b"meta", 0, full_box(b"pitm", 0, struct.pack(">H", 1)), full_box(b"iinf", 0, struct.pack(">H", items), *kinds),
        box(b"iprp", box(b"ipco", *properties), full_box(b"ipma", 0, struct.pack(">I", items), named)),
        full_box(b"iref", 0, auxiliary),
        full_box(b"iloc", 0, b"\x44\x00", struct.pack(">HHHHII", 1, 1, 0, 1, 0, 5)),
    )  # fmt: skip


def _places_of_no_bytes(items: int) -> bytes:
    kinds = [full_box(b"infe", 2, struct.pack(">HH", n, 0), b"hvc1", b"\0") for n in range(1, items + 1)]
    places = b"".join(struct.pack(">HHH", n, 0, 65_535) for n in range(1, items + 1))
    return box(b"ftyp", b"heic", bytes(4), b"mif1") + full_box(
        b"meta", 0, full_box(b"iinf", 0, struct.pack(">H", items), *kinds),
        full_box(b"iloc", 0, b"\0\0", struct.pack(">H", items), places),
    )  # fmt: skip


COSTLY = {
    "65,535 places of no bytes for each item": _places_of_no_bytes(60),
    "one large configuration named again and again": _named_again_and_again(
        ispe(64, 64), box(b"hvcC", bytes(2_000_000)), items=1
    ),
    "one large note on what an item is": _named_again_and_again(
        ispe(64, 64), box(b"auxC", bytes(4_000_000)), items=100
    ),
    "properties in many boxes": box(b"ftyp", b"heic", bytes(4), b"mif1")
    + full_box(b"meta", 0, *[box(b"iprp", *[box(b"free")] * 2000)] * 200),
    "references of everybody to everybody": box(b"ftyp", b"heic", bytes(4), b"mif1")
    + full_box(b"meta", 0, full_box(b"iref", 0, *[box(b"thmb", struct.pack(">HH", 1, 4000), bytes(8000))] * 400)),
}


@pytest.mark.parametrize("costly", COSTLY.values(), ids=COSTLY)
def test_h01_no_file_costs_the_server_much_more_than_its_bytes(costly: bytes) -> None:
    began = time.process_time()
    with contextlib.suppress(Damaged):
        heif.still(costly)
    assert time.process_time() - began < 0.4
    tracemalloc.start()
    with contextlib.suppress(Damaged):
        heif.still(costly)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(costly) + 8_000_000


def test_g3_the_limit_of_such_a_file_is_said() -> None:
    with pytest.raises(TooManyPixels, match=r"7000 x 4000 pixels; 25 megapixels and 12000 pixels a side") as refusal:
        PhotoReader(isolated=Never()).decode(made(ispe(7000, 4000), CONFIGURATION))  # type: ignore[arg-type]
    assert "ordinary JPEG" in refusal.value.errors[0].message


@given(st.binary(max_size=200))
def test_any_bytes_behind_its_first_box_are_read_or_refused(data: bytes) -> None:
    for whole in (box(b"ftyp", b"heic", bytes(4)) + data, box(b"ftyp", b"heic", bytes(4)) + full_box(b"meta", 0, data)):
        with pytest.raises((Damaged, Unsupported, Animated)):
            heif.still(whole)


@pytest.mark.parametrize(
    ("formats", "names"),
    [(("jpeg", "png"), "JPEG and PNG"), (("avif",), "AVIF"), (("jpeg", "webp", "avif"), "JPEG, WebP and AVIF")],
)
def test_a_format_that_a_setting_leaves_out_is_named(formats: tuple[str, ...], names: str) -> None:
    reader = PhotoReader(formats=frozenset(formats), isolated=Never())  # type: ignore[arg-type]
    with pytest.raises(
        UnsupportedMediaType, match=rf"Accepted are {names}\. It is a (file in HEIC|HEIC or AVIF file)\."
    ):
        reader.decode(PLAIN["HEIF"])
