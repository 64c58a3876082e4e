"""Photos from untrusted bytes; ids of the hostile inputs in the tests' names."""

import io
import resource
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from app.domain.faces import Face
from app.domain.photo import PhotoReader, encode
from app.errors import (
    AnimatedImage,
    FaceTooSmall,
    Problem,
    TooManyPixels,
    UndecodableImage,
    UnsupportedMediaType,
    Validation,
)
from tests.support.photos import ASTRONAUT, encoded, pixels_of

READER = PhotoReader()
PORTRAIT = pixels_of(ASTRONAUT)[:256, 100:356]


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def webp_claiming(width: int, height: int, *, animated: bool = False) -> bytes:
    body = (
        bytes([0x02 if animated else 0, 0, 0, 0])
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    chunk = b"VP8X" + len(body).to_bytes(4, "little") + body
    return b"RIFF" + (len(chunk) + 4).to_bytes(4, "little") + b"WEBP" + chunk


def face(x: float, y: float, side: float) -> Face:
    template = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]], dtype=np.float32)
    return Face((x, y, side, side), (template * side + np.array([x, y])).astype(np.float32), 0.9)


@pytest.mark.parametrize(("kind", "name"), [("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp")])
def test_the_three_accepted_types_are_told_by_their_content(kind: str, name: str) -> None:
    photo = READER.decode(encoded(PORTRAIT, kind))
    assert photo.format == name
    assert (photo.width, photo.height, photo.reduction) == (256, 256, 1)
    assert np.abs(photo.pixels.astype(int) - PORTRAIT).mean() < 6


@pytest.mark.parametrize(
    "data",
    [
        encoded(PORTRAIT, "GIF"),
        encoded(PORTRAIT, "TIFF"),
        encoded(PORTRAIT, "BMP"),
        b"\x7fELF" + b"\0" * 100,
        b"%PDF-1.7\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0\0\0\x18ftypheic\0\0\0\0",
        b"x",
    ],
)
def test_h08_h15_h16_h17_anything_else_is_refused_naming_what_is_accepted(data: bytes) -> None:
    with pytest.raises(UnsupportedMediaType, match="JPEG, PNG and WebP") as refusal:
        READER.decode(data)
    assert refusal.value.errors[0].field == "photo"


def test_h06_an_empty_file_is_refused() -> None:
    with pytest.raises(Validation):
        READER.decode(b"")


@pytest.mark.parametrize(
    "bomb", [png_claiming(20000, 20000), png_claiming(9400, 9400), webp_claiming(16383, 16383), png_claiming(50, 65535)]
)
def test_h01_h02_too_many_pixels_are_refused_from_the_header(bomb: bytes) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(TooManyPixels):
        READER.decode(bomb)
    assert time.monotonic() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize(("size", "problem"), [((39, 400), FaceTooSmall), ((401, 100), UndecodableImage)])
def test_h03_a_photo_too_small_or_too_thin_is_refused(size: tuple[int, int], problem: type[Problem]) -> None:
    with pytest.raises(problem):
        READER.decode(png_claiming(*size))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9, 0.99])
def test_h04_a_cut_photo_is_refused(kind: str, share: float) -> None:
    data = encoded(PORTRAIT, kind)
    with pytest.raises(UndecodableImage):
        READER.decode(data[: int(len(data) * share)])


@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(12, 4000), st.binary(min_size=1, max_size=400))
def test_h05_broken_bytes_end_as_a_photo_or_a_refusal(kind: str, position: int, rubbish: bytes) -> None:
    data = bytearray(encoded(PORTRAIT[:64, :64], kind))
    data[position : position + len(rubbish)] = rubbish
    try:
        photo = READER.decode(bytes(data))
    except Problem as problem:
        assert problem.status in {413, 415, 422}  # noqa: PT017 - either end is right, as long as it is one of the two
    else:
        assert photo.pixels.dtype == np.uint8
        assert photo.pixels.shape[2] == 3


def test_h09_appended_bytes_and_metadata_end_here() -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret words"
    polyglot = encoded(PORTRAIT, "JPEG", exif=exif) + b"PK\x03\x04<script>"
    stored = encode(READER.decode(polyglot).pixels)
    assert b"script" not in stored
    assert b"secret" not in stored
    assert stored.startswith(b"\xff\xd8\xff")
    again = READER.decode(stored).pixels
    assert np.abs(again.astype(int) - READER.decode(polyglot).pixels).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_h10_every_exif_orientation_is_turned_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PORTRAIT[:200], kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    photo = READER.decode(data)
    assert np.array_equal(photo.pixels, expected)
    assert (photo.height, photo.width) == expected.shape[:2]


def test_h11_broken_exif_is_no_reason_to_refuse() -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 3) + b"\x01\x12\0\x07\xff\xff\xff\xff\0\0\0\x08" * 3
    assert READER.decode(encoded(PORTRAIT, "JPEG", exif=exif)).pixels.shape == PORTRAIT.shape


def test_h12_a_broken_colour_profile_is_ignored() -> None:
    assert READER.decode(encoded(PORTRAIT, "JPEG", icc_profile=b"rubbish" * 5000)).width == 256


def test_h13_sixteen_bits_of_grey_are_scaled_not_cut() -> None:
    grey = np.asarray(Image.fromarray(PORTRAIT).convert("L"))
    buffer = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 257).save(buffer, "PNG")
    assert np.array_equal(READER.decode(buffer.getvalue()).pixels[..., 1], grey)


def test_h13_what_is_transparent_becomes_white() -> None:
    buffer = io.BytesIO()
    clear = Image.fromarray(PORTRAIT).convert("RGBA")
    clear.putalpha(0)
    clear.save(buffer, "PNG")
    assert READER.decode(buffer.getvalue()).pixels.min() == 255


@pytest.mark.parametrize(("mode", "kind"), [("1", "PNG"), ("P", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("CMYK", "JPEG")])
def test_h13_other_colour_modes_become_rgb(mode: str, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PORTRAIT).convert(mode).save(buffer, kind)
    pixels = READER.decode(buffer.getvalue()).pixels
    assert pixels.shape == PORTRAIT.shape
    assert abs(float(pixels.mean()) - float(PORTRAIT.mean())) < 12


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_h14_an_animation_is_refused(kind: str) -> None:
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.roll(PORTRAIT, 40 * step, axis=1)) for step in range(3)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=10)
    with pytest.raises(AnimatedImage):
        READER.decode(buffer.getvalue())


def test_h14_an_animation_of_many_pixels_is_refused_before_its_frames() -> None:
    with pytest.raises(AnimatedImage):
        READER.decode(webp_claiming(4000, 4000, animated=True))


def test_h19_a_jpeg_of_thousands_of_passes_is_refused_undecoded() -> None:
    plain = encoded(PORTRAIT, "JPEG", progressive=True)
    scans = plain[plain.index(b"\xff\xda") : -2]
    began = time.monotonic()
    with pytest.raises(UndecodableImage, match="passes"):
        READER.decode(plain[:-2] + scans * 500 + plain[-2:])
    assert time.monotonic() - began < 1


def test_an_ordinary_progressive_jpeg_is_decoded() -> None:
    assert READER.decode(encoded(PORTRAIT, "JPEG", progressive=True)).width == 256


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_large_photo_is_reduced_and_says_so(kind: str) -> None:
    large = np.asarray(Image.fromarray(PORTRAIT).resize((3301, 2200)))
    photo = READER.decode(encoded(large, kind))
    assert (photo.width, photo.height, photo.reduction) == (3301, 2200, 2)
    assert photo.pixels.shape == (1100, 1651, 3)
    there = photo.in_photo(face(10, 20, 100))
    assert there.box == (20, 40, 200, 200)
    assert there.landmarks[0] == pytest.approx([80, 120])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1700, 1601), (3200, 1025), (3300, 2047)])
def test_a_photo_converted_by_bands_is_the_photo_converted_whole(kind: str, mode: str, size: tuple[int, int]) -> None:
    grain = np.random.default_rng(1).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    picture = Image.fromarray(grain, mode)
    photo = READER.decode(encoded(grain, kind, lossless=True, method=0, quality=0))
    whole = picture.reduce(photo.reduction) if photo.reduction > 1 else picture
    if mode == "RGBA":
        whole = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
    assert np.array_equal(photo.pixels, np.asarray(whole.convert("RGB")))


def test_h02_the_largest_photos_of_any_kind_take_turns_and_little_memory() -> None:
    """Of five at once only one is decoded whole at a time; a process of its own, whose peak is theirs."""
    program = """
import io, resource, threading
from PIL import Image
from app.domain.photo import PhotoReader
flat = io.BytesIO()
Image.new("RGBA", (5000, 5000), (90, 120, 150, 128)).save(flat, "WEBP", lossless=True, method=0, quality=0)
open("/proc/self/clear_refs", "w").write("5")
peak = lambda name: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = peak("VmRSS:")
threads = [threading.Thread(target=PhotoReader().decode, args=(flat.getvalue(),)) for _ in range(5)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print((peak("VmHWM:") - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 300  # MiB


def test_every_refusal_advises_the_person() -> None:
    with pytest.raises(Problem) as refusal:
        READER.decode(b"GIF89a")
    assert refusal.value.errors[0].field == "photo"
    assert refusal.value.errors[0].code == refusal.value.slug()
    assert refusal.value.errors[0].message


def _flat_jpeg(width: int, height: int, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 150)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_g3_a_jpeg_of_60_megapixels_is_read_reduced_and_takes_little_memory() -> None:
    """In a process of its own, whose peak is its. A close-up of it is read at half its size, so as not to decode it whole."""
    program = """
import io, sys
from app.domain.photo import PhotoReader
peak = lambda name: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) // 1024
data, reader = sys.stdin.buffer.read(), PhotoReader()
open("/proc/self/clear_refs", "w").write("5")
before = peak("VmRSS:")
photo = reader.decode(data)
part = reader.decode_part(data, photo, (100, 100, 900, 900), 1)
print(photo.width, photo.height, photo.reduction, part.width, part.reduction, peak("VmHWM:") - before)
"""
    data = _flat_jpeg(8900, 6700)
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, timeout=60, check=True)
    *found, mib = map(int, done.stdout.split())
    assert found == [8900, 6700, 4, 900, 2]
    assert mib < 300


@pytest.mark.parametrize(
    ("data", "limit"),
    [
        (_flat_jpeg(6000, 4200, progressive=True), "25 megapixels"),
        (_flat_jpeg(8000, 7600), "60 megapixels"),
        (_flat_jpeg(12_001, 3100), "12000 pixels a side"),
        (png_claiming(6000, 4200), "25 megapixels"),
        (webp_claiming(6000, 4200), "25 megapixels"),
    ],
    ids=["progressive", "more than 60", "a long side", "PNG", "WebP"],
)
def test_g3_a_photo_of_too_many_pixels_is_refused_with_the_limit_for_its_kind(data: bytes, limit: str) -> None:
    with pytest.raises(TooManyPixels, match=limit) as refusal:
        READER.decode(data)
    assert refusal.value.errors[0].code == "too-many-pixels"


def test_g3_the_limits_are_the_readers() -> None:
    small = PhotoReader(max_pixels=10_000, max_jpeg_pixels=250 * 250, max_side=260)
    assert small.decode(_flat_jpeg(250, 250)).width == 250
    for data in (_flat_jpeg(261, 200), _flat_jpeg(255, 255), encoded(PORTRAIT, "PNG")):
        with pytest.raises(TooManyPixels):
            small.decode(data)


@pytest.mark.parametrize("shade", [0, 1, 2, 253, 254, 255])
def test_g9_a_grey_photo_may_end_in_any_one_shade(shade: int) -> None:
    grey = np.asarray(Image.fromarray(PORTRAIT).convert("L")).copy()
    grey[-32:] = shade
    assert READER.decode(encoded(grey, "JPEG", quality=95)).pixels[-1].max() <= shade + 2


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"progressive": True}], ids=str
)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 0.9])
def test_h04_a_cut_jpeg_is_refused_whether_an_end_marker_was_added_or_not(
    options: dict[str, object], share: float
) -> None:
    """A decoder fills missing rows with grey and says nothing. Of a progressive one the last pass alone may be cut."""
    whole = encoded(PORTRAIT, "JPEG", quality=90, **options)
    cut = whole[: int(len(whole) * share)]
    if "progressive" in options and share > 0.5:
        cut = whole[: whole.rindex(b"\xff\xda")]
    for end in (b"", b"\xff\xd9", b"\xff\xff\xd9", bytes(1000) + b"\xff\xd9"):
        with pytest.raises(UndecodableImage):
            READER.decode(cut + end)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (1, 254, 77)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_whole_jpeg_of_one_colour_is_read(colour: tuple[int, int, int], mode: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (200, 200), colour).convert(mode).save(buffer, "JPEG", quality=100)
    assert READER.decode(buffer.getvalue()).width == 200
