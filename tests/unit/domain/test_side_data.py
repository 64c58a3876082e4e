"""Side data of photos: blocks that state the orientation are read, everything else is cut off unread."""

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app.domain.formats import jpeg, png, webp
from app.domain.formats.parts import Animated, Damaged
from app.domain.photo import Photo, PhotoReader
from app.errors import AnimatedImage, Problem, TooManyPixels, UndecodableImage
from tests.support.photos import ASTRONAUT, encoded, pixels_of
from tests.support.picture_files import (
    BYTE,
    LONG,
    SHORT,
    exif,
    jpeg_with,
    png_chunk,
    png_with,
    raw_profile,
    segment,
    webp_canvas,
    webp_chunk,
    webp_file,
    webp_frame,
    xmp,
)

READER = PhotoReader()
PORTRAIT = pixels_of(ASTRONAUT)[:120, 130:230]  # 100 wide, 120 high
JPEG, PNG = encoded(PORTRAIT, "JPEG", quality=90), encoded(PORTRAIT, "PNG")
PROGRESSIVE = encoded(PORTRAIT, "JPEG", quality=90, progressive=True)
WEBP = encoded(PORTRAIT, "WEBP", quality=90)
VP8 = WEBP[12:]
CLEAR = encoded(np.dstack([PORTRAIT, np.full(PORTRAIT.shape[:2], 200, np.uint8)]), "WEBP", quality=90)
XAP = b"http://ns.adobe.com/xap/1.0/\0"


def photo_of(data: bytes) -> Photo:
    return READER.decode(data)


def is_upright(data: bytes) -> bool:
    """Whether the photo is as high as the portrait, and not as wide."""
    return photo_of(data).pixels.shape[0] == 120


def app1(body: bytes) -> bytes:
    return segment(0xE1, body)


def jpeg_exif(block: bytes) -> bytes:
    return app1(b"Exif\0\0" + block)


def text(keyword: bytes, body: bytes) -> bytes:
    return png_chunk(b"tEXt", keyword + b"\0" + body)


def packed_text(keyword: bytes, body: bytes) -> bytes:
    return png_chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(body))


def unicode_text(keyword: bytes, body: bytes, *, is_packed: bool = False) -> bytes:
    stored = zlib.compress(body) if is_packed else body
    return png_chunk(b"iTXt", keyword + b"\0" + bytes([is_packed]) + b"\0en\0word\0" + stored)


def webp_with(*chunks: bytes) -> bytes:
    return webp_file(webp_canvas(100, 120, 0x0C), VP8, *chunks)


EXIF_TEXT, XMP_TEXT = b"Raw profile type exif", b"XML:com.adobe.xmp"
SIX = exif(6)
ON_ITS_SIDE = {
    "JPEG, EXIF": jpeg_with(JPEG, jpeg_exif(SIX)),
    "JPEG, EXIF behind another application": jpeg_with(JPEG, app1(b"QVCI\0"), jpeg_exif(SIX)),
    "JPEG, XMP attribute": jpeg_with(JPEG, app1(XAP + xmp(6))),
    "JPEG, XMP element": jpeg_with(JPEG, app1(XAP + xmp(6, as_element=True))),
    "JPEG, XMP with another prefix": jpeg_with(JPEG, app1(XAP + xmp(6, prefix="t"))),
    "JPEG, XMP in UTF-16": jpeg_with(JPEG, app1(XAP + xmp(6).decode().encode("utf-16"))),
    "JPEG, the first EXIF block states nothing": jpeg_with(JPEG, jpeg_exif(exif(0)), jpeg_exif(SIX)),
    "JPEG, EXIF states nothing, XMP does": jpeg_with(JPEG, jpeg_exif(exif(9)), app1(XAP + xmp(6))),
    "JPEG, EXIF and XMP disagree": jpeg_with(JPEG, app1(XAP + xmp(1)), jpeg_exif(SIX)),
    "JPEG, two EXIF blocks": jpeg_with(JPEG, jpeg_exif(SIX), jpeg_exif(exif(1))),
    "JPEG, two XMP blocks": jpeg_with(JPEG, app1(XAP + xmp(6)), app1(XAP + xmp(1))),
    "PNG, eXIf": png_with(PNG, png_chunk(b"eXIf", SIX)),
    "PNG, eXIf with JPEG's prefix": png_with(PNG, png_chunk(b"eXIf", b"Exif\0\0" + SIX)),
    "PNG, eXIf behind the pixels": png_with(PNG, png_chunk(b"eXIf", SIX), before=b"IEND"),
    "PNG, eXIf with a bad checksum": png_with(PNG, png_chunk(b"eXIf", SIX, checksum=7)),
    "PNG, raw profile, packed": png_with(PNG, packed_text(EXIF_TEXT, raw_profile(b"exif", b"Exif\0\0" + SIX))),
    "PNG, raw profile, plain": png_with(PNG, text(EXIF_TEXT, raw_profile(b"exif", SIX))),
    "PNG, raw profile behind the pixels": png_with(PNG, text(EXIF_TEXT, raw_profile(b"exif", SIX)), before=b"IEND"),
    "PNG, raw profile in Unicode": png_with(PNG, unicode_text(EXIF_TEXT, raw_profile(b"exif", SIX), is_packed=True)),
    "PNG, raw profile APP1": png_with(PNG, packed_text(b"Raw profile type APP1", raw_profile(b"generic", b"Exif\0\0" + SIX))),
    "PNG, raw profile APP1 with XMP": png_with(PNG, text(b"Raw profile type APP1", raw_profile(b"app1", XAP + xmp(6)))),
    "PNG, raw profile xmp": png_with(PNG, text(b"Raw profile type xmp", raw_profile(b"xmp", xmp(6)))),
    "PNG, raw profile of 60 kB": png_with(PNG, packed_text(EXIF_TEXT, raw_profile(b"exif", SIX + bytes(60_000)))),
    "PNG, XMP": png_with(PNG, unicode_text(XMP_TEXT, xmp(6))),
    "PNG, XMP, packed": png_with(PNG, unicode_text(XMP_TEXT, xmp(6), is_packed=True)),
    "PNG, XMP of 2 MB": png_with(PNG, unicode_text(XMP_TEXT, xmp(6) + b" " * 2_000_000, is_packed=True)),
    "PNG, eXIf and text disagree": png_with(PNG, text(EXIF_TEXT, raw_profile(b"exif", exif(1))), png_chunk(b"eXIf", SIX)),
    "PNG, EXIF and XMP disagree": png_with(PNG, unicode_text(XMP_TEXT, xmp(1)), text(EXIF_TEXT, raw_profile(b"exif", SIX))),
    "PNG, two eXIf chunks": png_with(PNG, png_chunk(b"eXIf", SIX), png_chunk(b"eXIf", exif(1))),
    "WebP, EXIF": webp_with(webp_chunk(b"EXIF", SIX)),
    "WebP, EXIF with JPEG's prefix": webp_with(webp_chunk(b"EXIF", b"Exif\0\0" + SIX)),
    "WebP, XMP": webp_with(webp_chunk(b"XMP ", xmp(6))),
    "WebP, EXIF and XMP disagree": webp_with(webp_chunk(b"XMP ", xmp(1)), webp_chunk(b"EXIF", SIX)),
    "WebP, two EXIF chunks": webp_with(webp_chunk(b"EXIF", SIX), webp_chunk(b"EXIF", exif(1))),
    "WebP, one frame, EXIF": webp_file(
        webp_canvas(100, 120, 0x0A), webp_frame(100, 120, VP8), webp_chunk(b"EXIF", SIX)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_ITS_SIDE)
def test_the_orientation_is_read_wherever_it_is_written(name: str) -> None:
    assert not is_upright(ON_ITS_SIDE[name])


@pytest.mark.parametrize("kind", [BYTE, SHORT, LONG])
@pytest.mark.parametrize("big_endian", [True, False])
@pytest.mark.parametrize("value", range(1, 9))
def test_an_orientation_may_be_a_byte_a_short_or_a_long(value: int, kind: int, *, big_endian: bool) -> None:
    block = exif(value, kind=kind, big_endian=big_endian)
    expected = photo_of(jpeg_with(JPEG, jpeg_exif(exif(value)))).pixels
    assert np.array_equal(photo_of(jpeg_with(JPEG, jpeg_exif(block))).pixels, expected)
    assert photo_of(png_with(PNG, png_chunk(b"eXIf", block))).pixels.shape == expected.shape
    assert photo_of(webp_with(webp_chunk(b"EXIF", block))).pixels.shape == expected.shape


@pytest.mark.parametrize(
    "data",
    [
        jpeg_with(JPEG, jpeg_exif(exif(1)), jpeg_exif(SIX)),
        jpeg_with(JPEG, jpeg_exif(exif(1)), app1(XAP + xmp(6))),
        png_with(PNG, png_chunk(b"eXIf", exif(1)), text(EXIF_TEXT, raw_profile(b"exif", SIX))),
        webp_with(webp_chunk(b"EXIF", exif(1)), webp_chunk(b"XMP ", xmp(6))),
        # Nothing here is a valid orientation.
        jpeg_with(JPEG, jpeg_exif(exif(0)), jpeg_exif(exif(255))),
        jpeg_with(JPEG, jpeg_exif(b"XX" + SIX[2:])),
        jpeg_with(JPEG, jpeg_exif(SIX[:4] + b"\xff\xff\xff\xff" + SIX[8:])),
        png_with(PNG, text(EXIF_TEXT, b"\nexif\n 12\nno digits")),
        png_with(PNG, text(b"Comment", raw_profile(b"exif", SIX))),
        png_with(PNG, png_chunk(b"zTXt", EXIF_TEXT + b"\0\0rubbish")),
        webp_with(webp_chunk(b"XMP ", b"tiff:Orientation=6")),
    ],
)
def test_the_first_block_with_an_orientation_counts_and_invalid_blocks_do_not(data: bytes) -> None:
    assert is_upright(data)


BOMB = zlib.compress(bytes(100_000_000), 9)
SIDE_CHUNKS = {
    "profile of 100 MB": png_chunk(b"iCCP", b"icc\0\0" + BOMB),
    "packed text of 100 MB": png_chunk(b"zTXt", b"Comment\0\0" + BOMB),
    "raw profile of 100 MB": png_chunk(b"zTXt", EXIF_TEXT + b"\0\0" + BOMB),
    "packed XMP of 100 MB": png_chunk(b"iTXt", XMP_TEXT + b"\0\1\0\0\0" + BOMB),
    "comment with a bad checksum": png_chunk(b"tEXt", b"Comment\0words", checksum=1),
    "time with a bad checksum": png_chunk(b"tIME", bytes(7), checksum=1),
    "gamma of the wrong length": png_chunk(b"gAMA", b"\1"),
    "resolution of the wrong length": png_chunk(b"pHYs", b"\1"),
    "broken profile": png_chunk(b"iCCP", b"no end of the name"),
    "chunk of a later standard": png_chunk(b"cICP", b"\1\2\3\4"),
    "a thousand comments": png_chunk(b"tEXt", b"Comment\0" + b"words " * 200) * 1000,
}


@pytest.mark.parametrize("name", SIDE_CHUNKS)
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_side_chunks_of_a_png_change_nothing_and_are_not_unpacked(name: str, before: bytes) -> None:
    data = png_with(PNG, SIDE_CHUNKS[name], before=before)
    tracemalloc.start()
    try:
        photo = photo_of(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(photo.pixels, PORTRAIT)
    assert peak < 4_000_000


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_a_png_of_any_colours_is_the_same_without_its_side_chunks(mode: str) -> None:
    picture = Image.fromarray(PORTRAIT).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **({"transparency": 3} if mode in {"L", "P"} else {}))
    plain = photo_of(buffer.getvalue()).pixels
    dressed = png_with(buffer.getvalue(), *SIDE_CHUNKS.values())
    assert np.array_equal(photo_of(dressed).pixels, plain)


def test_a_png_may_lack_its_end_chunk_and_nothing_else() -> None:
    at = PNG.index(b"IEND") - 4
    for end in range(at, len(PNG)):
        assert np.array_equal(photo_of(PNG[:end]).pixels, PORTRAIT)
    for end in (at - 1, at - 5, at - 40):
        with pytest.raises(UndecodableImage):
            photo_of(PNG[:end])


def frame_control(sequence: int) -> bytes:
    return png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", sequence, 100, 120, 0, 0, 1, 10, 0, 0))


def test_the_animation_chunk_decides_whether_a_png_is_animated() -> None:
    one, two, none = (png_chunk(b"acTL", struct.pack(">II", frames, 0)) for frames in (1, 2, 0))
    other = png_chunk(b"fdAT", struct.pack(">I", 1) + zlib.compress(bytes(120 * 301)))
    assert np.array_equal(photo_of(png_with(PNG, one, frame_control(0))).pixels, PORTRAIT)
    assert np.array_equal(photo_of(png_with(PNG, none)).pixels, PORTRAIT)
    # Without the animation chunk, frame data are an ordinary side chunk. Behind the pixels, the animation chunk does not count.
    assert np.array_equal(photo_of(png_with(PNG, other, before=b"IEND")).pixels, PORTRAIT)
    assert np.array_equal(photo_of(png_with(PNG, two, before=b"IEND")).pixels, PORTRAIT)
    for animated in (png_with(PNG, two, frame_control(0)), png_with(png_with(PNG, one), other, before=b"IEND")):
        with pytest.raises(AnimatedImage):
            photo_of(animated)


def video(length: int = 3000) -> bytes:
    """A movie file whose content has many start-of-scan and a few end markers."""
    noise = np.random.default_rng(5).integers(0, 256, length, dtype=np.uint8).tobytes()
    content = b"".join(noise[at : at + 24] + b"\xff\xda" for at in range(0, length, 24))
    return b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + struct.pack(">I", 8 + len(content)) + b"mdat" + content


TRAILERS = {
    "video": b"MotionPhoto_Data" + video(),
    "large video": video(400_000),
    "gain map": encoded(PORTRAIT[::2, ::2], "JPEG"),
    "multi-picture second image": jpeg_with(JPEG, segment(0xE2, b"MPF\0MM\0*\0\0\0\x08")),
    "zeros": bytes(5000),
    "end markers": b"\xff\xd9" * 50,
    "archive": b"PK\x03\x04<script>",
}


@pytest.mark.parametrize("name", TRAILERS)
@pytest.mark.parametrize("picture", [JPEG, PROGRESSIVE], ids=["baseline", "progressive"])
def test_bytes_behind_the_picture_change_nothing(picture: bytes, name: str) -> None:
    found = jpeg.still(picture + TRAILERS[name])
    assert (found.data, found.scans, found.has_end) == (jpeg.still(picture).data, jpeg.still(picture).scans, True)
    assert np.array_equal(photo_of(picture + TRAILERS[name]).pixels, photo_of(picture).pixels)


def test_a_preview_inside_the_side_data_is_not_the_picture() -> None:
    data = jpeg_with(JPEG, jpeg_exif(SIX + encoded(PORTRAIT[::4, ::4], "JPEG")), segment(0xFE, b"\xff\xd9\xff\xda"))
    assert photo_of(data).pixels.shape == (100, 120, 3)


@pytest.mark.parametrize("trailer", [b"", b"\xff", b"\xff\xff", *TRAILERS.values()])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
def test_a_jpeg_may_lack_its_end_marker(options: dict[str, object], trailer: bytes) -> None:
    whole = encoded(PORTRAIT, "JPEG", quality=90, **options)
    assert np.array_equal(photo_of(whole[:-2] + trailer).pixels, photo_of(whole).pixels)


@pytest.mark.parametrize("trailer", [b"", TRAILERS["video"], TRAILERS["gain map"]], ids=["", "video", "gain map"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.98, 0.99])
@pytest.mark.parametrize("picture", [JPEG, PROGRESSIVE], ids=["baseline", "progressive"])
def test_h04_a_jpeg_cut_in_its_rows_stays_refused(picture: bytes, share: float, trailer: bytes) -> None:
    with pytest.raises(UndecodableImage):
        photo_of(picture[: int(len(picture) * share)] + trailer)


def test_h04_a_progressive_jpeg_without_its_last_passes_stays_refused() -> None:
    last = PROGRESSIVE.rindex(b"\xff\xda")
    with pytest.raises(UndecodableImage):
        photo_of(PROGRESSIVE[:last])


@pytest.mark.parametrize("plain", [WEBP, CLEAR], ids=["opaque", "transparent"])
def test_a_webp_of_one_frame_in_an_animations_box_is_a_still_picture(plain: bytes) -> None:
    chunks = plain[12:] if plain is WEBP else plain[30:]
    boxed = webp_file(webp_canvas(100, 120, 0x12), webp_chunk(b"ANIM", bytes(6)), webp_frame(100, 120, chunks))
    assert np.array_equal(photo_of(boxed).pixels, photo_of(plain).pixels)


def test_a_webp_of_two_frames_is_an_animation() -> None:
    frame = webp_frame(100, 120, VP8)
    with pytest.raises(AnimatedImage):
        photo_of(webp_file(webp_canvas(100, 120, 0x02), webp_chunk(b"ANIM", bytes(6)), frame, frame))


def test_a_webp_keeps_nothing_but_its_picture() -> None:
    dressed = webp_with(webp_chunk(b"ICCP", b"secret" * 500), webp_chunk(b"EXIF", exif(1)), webp_chunk(b"odd ", b"x"))
    assert webp.still(dressed + b"appended").data == WEBP
    assert np.array_equal(photo_of(dressed + b"appended").pixels, photo_of(WEBP).pixels)
    # The bytes that are missing here come after the picture, so the picture is complete.
    assert np.array_equal(photo_of(dressed[:-10]).pixels, photo_of(WEBP).pixels)


def starts_of_segments(data: bytes) -> list[int]:
    """Where the segments of a JPEG's header start, from the second one on; the last one starts the picture."""
    starts = [2]
    while data[starts[-1] + 1] != 0xDA:
        length = int.from_bytes(data[starts[-1] + 2 : starts[-1] + 4], "big")
        starts.append(starts[-1] + 2 + length)
    return starts[1:]


@pytest.mark.parametrize("stray", [b"\0", b"\0\0\0", b"\xff\0", b"\0\xff", b"\xff\xff", b"text " * 10_000])
@pytest.mark.parametrize("picture", [JPEG, PROGRESSIVE], ids=["baseline", "progressive"])
def test_stray_bytes_between_the_segments_of_a_header_are_left_out(picture: bytes, stray: bytes) -> None:
    for at in starts_of_segments(picture):
        data = picture[:at] + stray + picture[at:]
        assert jpeg.still(data) == jpeg.still(picture)
        assert np.array_equal(photo_of(data).pixels, photo_of(picture).pixels)


def test_a_header_with_too_many_stray_bytes_is_refused() -> None:
    at = starts_of_segments(JPEG)[0]
    with pytest.raises(UndecodableImage):
        photo_of(JPEG[:at] + bytes(100_000) + JPEG[at:])


@pytest.mark.parametrize("data", [jpeg_with(JPEG, segment(0xE1, bytes(60_000)))[:40_000], JPEG[:300]])
def test_a_jpeg_cut_in_its_header_is_refused(data: bytes) -> None:
    with pytest.raises(UndecodableImage):
        photo_of(data)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "fill bytes": lambda: b"\xff\xd8" + b"\xff" * 20_000_000,
    "stray bytes": lambda: b"\xff\xd8\xff" + b"\0\xff" * 10_000_000,
    "stray bytes between segments": lambda: jpeg_with(JPEG, *[segment(0xFE, b"") + bytes(5000)] * 4000),
    "segments": lambda: b"\xff\xd8" + segment(0xE1, b"Exif\0\0") * 1_500_000,
    "directories": lambda: jpeg_with(JPEG, *[jpeg_exif(b"MM\0*\0\0\0\x08\x02\0" + bytes(6144))] * 3000),
    "stuffed bytes": lambda: JPEG[:-2] + b"\xff\x00" * 10_000_000,
    "restart markers": lambda: JPEG[:-2] + b"\xff\xd0" * 10_000_000,
    "spaces in XMP": lambda: jpeg_with(JPEG, *[app1(XAP + b"<tiff:Orientation" + b" " * 60_000)] * 300),
    "prefixes in XMP": lambda: jpeg_with(JPEG, *[app1(XAP + b" tiff:Orientation" * 3000)] * 300),
    "empty chunks": lambda: png_with(PNG, png_chunk(b"tEXt", b"") * 1_600_000),
    "empty pixels": lambda: png_with(PNG, png_chunk(b"IDAT", b"") * 1_600_000, before=b"IEND"),
    "texts": lambda: png_with(PNG, packed_text(EXIF_TEXT, b"0 " * 2_000_000) * 4000),
    "profile of digits": lambda: png_with(PNG, text(EXIF_TEXT, b"\nexif\n1\n" + b"f " * 9_000_000)),
    "chunks of a WebP": lambda: webp_with(webp_chunk(b"XMP ", b"") * 2_000_000),
    "large XMP of a WebP": lambda: webp_with(*[webp_chunk(b"XMP ", b" tiff:Orientation= " * 200_000)] * 5),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_side_data_made_to_cost_time_cost_little(name: str) -> None:
    data = HOSTILE[name]()
    began = time.process_time()
    with suppress(UndecodableImage):
        photo_of(data)
    assert time.process_time() - began < 2


def test_the_size_that_a_broken_file_claims_is_judged_first() -> None:
    frame = struct.pack(">BHHB", 8, 20_000, 20_000, 3) + b"\1\x22\0\2\x11\1\3\x11\1"
    with pytest.raises(TooManyPixels):
        photo_of(b"\xff\xd8" + segment(0xC0, frame))


WHOLE: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "jpeg": (jpeg.still, jpeg_with(JPEG, jpeg_exif(SIX), app1(XAP + xmp(6))) + TRAILERS["gain map"]),
    "progressive": (jpeg.still, PROGRESSIVE),
    "png": (png.still, png_with(PNG, png_chunk(b"eXIf", SIX), packed_text(EXIF_TEXT, raw_profile(b"exif", SIX)))),
    "webp": (webp.still, webp_file(webp_canvas(100, 120, 2), webp_frame(100, 120, VP8), webp_chunk(b"EXIF", SIX))),
}
EDITS = st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 6), st.binary(max_size=6)), min_size=1, max_size=6)


@given(st.sampled_from(sorted(WHOLE)), EDITS, st.integers(0, 12_000))
def test_mutated_files_are_taken_apart_or_refused(kind: str, edits: list[tuple[int, int, bytes]], end: int) -> None:
    still, whole = WHOLE[kind]
    data = bytearray(whole)
    for position, removed, inserted in edits:
        # Half of the edits hit the first bytes, where the structure is.
        at = position % len(data) if position % 2 else position % 400
        data[at : at + removed] = inserted
    data = bytearray(whole[:12] + data[12:]) if end % 3 else data[:end]
    with suppress(Damaged, Animated):
        still(bytes(data))
    try:
        photo = photo_of(bytes(data))
    except Problem as problem:
        assert problem.status in {413, 415, 422}  # noqa: PT017 - a refusal or a photo is right
    else:
        assert photo.pixels.shape[2] == 3


def test_a_webp_of_no_pixels_is_refused() -> None:
    """With transparency its canvas is written again, and a side of 0 has no place there."""
    whole = bytearray(encoded(np.dstack([PORTRAIT, PORTRAIT[..., :1]]), "WEBP"))
    at = whole.index(b"\x9d\x01\x2a") + 3
    whole[at : at + 2] = b"\0\0"
    with pytest.raises(UndecodableImage):
        photo_of(bytes(whole))
