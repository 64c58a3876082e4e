"""JPEG 2000 files: what is the picture, what is not, and what is refused before anything is decoded."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app.domain.formats import jpeg2000
from app.domain.formats.boxes import box
from app.domain.formats.parts import Animated, Damaged, Unsupported
from app.domain.photo import MOST_JPEG2000_PIXELS, PhotoReader
from app.errors import Problem, TooManyPixels, UnsupportedMediaType
from tests.support.picture_files import jpeg2000_file
from tests.unit.domain.test_heif import Never

IMAGE = Image.fromarray((np.arange(96 * 80 * 3) % 251).astype(np.uint8).reshape(96, 80, 3))
JP2 = jpeg2000_file(IMAGE)
CODESTREAM = jpeg2000_file(IMAGE, no_jp2=True)
TILED = jpeg2000_file(IMAGE, tile_size=(32, 32))
SIZE_AT = JP2.index(b"\xff\x51") + 6


def claiming(width: int, height: int, tile: tuple[int, int] | None = None, whole: bytes = JP2) -> bytes:
    """The file with other sizes in the header of its codestream."""
    at = whole.index(b"\xff\x51") + 6
    across, down = tile or (width, height)
    return whole[:at] + struct.pack(">8I", width, height, 0, 0, across, down, 0, 0) + whole[at + 32 :]


@pytest.mark.parametrize("whole", [JP2, CODESTREAM, TILED], ids=["jp2", "codestream", "tiles"])
def test_g2_the_picture_is_found_and_what_lies_around_it_is_left_out(whole: bytes) -> None:
    plain = jpeg2000.still(whole)
    assert (plain.size, plain.orientation) == ((80, 96), 1)
    for behind in (b"x" * 500, box(b"xml ", b"<somebody/>"), box(b"uuid", bytes(99)), whole):
        assert jpeg2000.still(whole + behind) == plain


def test_the_end_marker_may_be_missing() -> None:
    assert CODESTREAM.endswith(b"\xff\xd9")
    assert jpeg2000.still(CODESTREAM[:-2]) == jpeg2000.still(CODESTREAM)
    assert jpeg2000.still(JP2[:-2]) == jpeg2000.still(JP2)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("whole", [JP2, CODESTREAM, TILED], ids=["jp2", "codestream", "tiles"])
def test_h04_a_cut_file_is_refused(whole: bytes, share: float) -> None:
    cut = whole[: int(len(whole) * share)]
    for data in (cut, cut + b"\xff\xd9"):
        with pytest.raises(Damaged):
            jpeg2000.still(data)


def test_h12_profiles_are_left_out_and_colours_are_named_again() -> None:
    colour = box(b"colr", bytes([1, 0, 0, 0, 0, 0, 16]))
    profiled = JP2.replace(colour, box(b"colr", bytes([2, 0, 0]) + b"abcd"))
    assert profiled != JP2
    assert jpeg2000.still(profiled) == jpeg2000.still(JP2)
    strange = JP2.replace(colour, box(b"colr", bytes([1, 0, 0, 0, 0, 0, 14])))
    with pytest.raises(Unsupported):
        jpeg2000.still(strange)


def test_h14_films_are_refused() -> None:
    with pytest.raises(Animated):
        jpeg2000.still(JP2.replace(b"ftypjp2 ", b"ftypmjp2"))
    with pytest.raises(Animated):
        jpeg2000.still(JP2[:12] + box(b"moov", bytes(20)))


BOMBS = {
    "65,535 pixels a side": claiming(65_535, 65_535),
    "4 billion pixels a side": claiming(2**32 - 1, 2**32 - 1),
    "tiles of one pixel": claiming(5000, 5000, (1, 1)),
    "no tile size": claiming(5000, 5000, (0, 0)),
    "16,384 components": JP2[: SIZE_AT + 32] + b"\x40\x00" + JP2[SIZE_AT + 34 :],
    "38 bits": JP2[: SIZE_AT + 34] + b"\x25" + JP2[SIZE_AT + 35 :],
    "a tile that is not there": TILED.replace(b"\xff\x90\0\x0a\0\1", b"\xff\x90\0\x0a\0\0"),
    "tile parts of no length": CODESTREAM[: CODESTREAM.index(b"\xff\x90")] + b"\xff\x90\0\x0a\0\0\0\0\0\x0c\0\1" * 9000,
    "boxes without end": JP2[:12] + box(b"free") * 100_000,
    "boxes without end before a picture": JP2[:12] + box(b"free") * 100_000 + JP2[12:],
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_h01_bombs_are_refused_before_they_are_decoded(bomb: bytes) -> None:
    with pytest.raises(Problem) as refusal:
        PhotoReader(isolated=Never()).decode(bomb)  # type: ignore[arg-type] # as far as it is used
    assert refusal.value.status in (413, 422)


def test_g3_a_large_one_is_taken_if_its_decoder_can_halve_it() -> None:
    assert jpeg2000.still(JP2).halvings > 0
    plain = jpeg2000_file(IMAGE, num_resolutions=1)
    assert jpeg2000.still(plain).halvings == 0
    with pytest.raises(TooManyPixels, match=f"{MOST_JPEG2000_PIXELS / 1e6:g} megapixels"):
        PhotoReader(isolated=Never()).decode(claiming(4500, 4500, whole=plain))  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        PhotoReader(isolated=Never()).decode(claiming(4500, 4500))  # type: ignore[arg-type]


@given(st.binary(max_size=200))
def test_any_bytes_behind_its_first_bytes_are_read_or_refused(data: bytes) -> None:
    for whole in (JP2[:12] + data, CODESTREAM[:4] + data):
        with pytest.raises((Damaged, Unsupported, Animated)):
            jpeg2000.still(whole)


def test_a_format_that_a_setting_leaves_out_is_named() -> None:
    with pytest.raises(UnsupportedMediaType, match="It is a file in JPEG 2000"):
        PhotoReader(formats=frozenset({"jpeg"})).decode(JP2)
