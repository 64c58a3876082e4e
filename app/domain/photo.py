"""A photo: from untrusted bytes to upright pixels.

The header is read before anything is decoded, by content and never by name or declared type, and by exactly the one
decoder of its type. `formats` cuts off metadata, colour profiles and appended bytes before the decoder sees the file.
"""

import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeVar

import cv2
import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from app.domain.faces import Box, Face, PhotoFace, Pixels
from app.domain.formats import jpeg, png, webp
from app.domain.formats.parts import Animated, Damaged, Still
from app.errors import (
    Advice,
    AnimatedImage,
    FaceTooSmall,
    Problem,
    TooManyPixels,
    UndecodableImage,
    UnsupportedMediaType,
    Validation,
)

Format = Literal["jpeg", "png", "webp"]
T = TypeVar("T")

#: A photo is halved as long as its long side keeps this many pixels: a face at the detector's limit, a fortieth of the long
#: side, still has the 40 pixels that recognition needs, and a phone's 12 megapixels become 3 before they are all decoded.
WORKING_LONG_SIDE = 1600
_REDUCTIONS = (8, 4, 2)

#: No face of MINIMUM_FACE_SIDE fits into less; beyond the longest side no camera that people hold goes below 25 megapixels.
SHORTEST_SIDE, LONGEST_SIDE = 40, 8000
GREATEST_ASPECT = 4.0
#: Rows that are converted and halved at a time; a multiple of every reduction. A photo of 25 megapixels takes 100 MB once
#: decoded, and each conversion of the whole as much again.
_BAND_ROWS = 64
#: Larger ones that have to be decoded whole take turns: one of 25 megapixels needs 100 to 200 MB meanwhile, so a process keeps
#: room for one, however many come at once. An ordinary JPEG is smaller before it is decoded, and waits for nobody.
_LARGE_PIXELS = 6_000_000
_large_photo = threading.Lock()
_thread = threading.local()

#: Scans of a progressive JPEG times its pixels. Each scan walks over every block, so a small file with thousands of them
#: would hold a core for minutes.
MOST_SCANNED_PIXELS = 500_000_000

STORED_JPEG_QUALITY = 95

_ACCEPTED = "Send a JPEG, PNG or WebP photo."
#: What Pillow raises on bytes that do not hold what their header says. Its words are not passed on: they may quote the photo.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)

_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, 3),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}
_ON_SIDE = (5, 6, 7, 8)
#: Coded data that no picture ends with, and without markers (see `_decoded_jpeg`).
_PADDING = bytes(range(1, 255)) * 2


@dataclass(frozen=True, slots=True)
class Photo:
    """A decoded photo.

    pixels: RGB, upright, halved `reduction` = 1, 2, 4 or 8 times smaller than the photo. width, height: of the upright
    photo as it was sent. Faces are found in `pixels`; `in_photo` gives their place on the photo itself. quarters: by how many
    quarters it was turned counter-clockwise since.
    """

    pixels: Pixels
    format: Format
    width: int
    height: int
    reduction: int
    quarters: int = 0

    def in_photo(self, face: Face) -> PhotoFace:
        """A face that was found in `pixels`, in pixels of the upright photo as it was sent."""
        return PhotoFace.of(face, self.reduction)

    def in_pixels(self, face: PhotoFace) -> Face:
        """Where a face of the photo lies in `pixels`."""
        return face.in_pixels(self.reduction)

    def turned(self, quarters: int) -> Self:
        """The photo turned counter-clockwise by this number of quarters."""
        pixels = np.ascontiguousarray(np.rot90(self.pixels, quarters))
        width, height = (self.height, self.width) if quarters % 2 else (self.width, self.height)
        return replace(self, pixels=pixels, width=width, height=height, quarters=(self.quarters + quarters) % 4)

    def inverted(self) -> Self:
        """The photo with light and dark swapped, as a negative shows it."""
        return replace(self, pixels=np.bitwise_not(self.pixels))


def decode(data: bytes, *, max_pixels: int) -> Photo:
    """The photo in these bytes, upright, as RGB.

    Colour profiles are ignored (their parsers are a risk, recognition does not notice); 16 bits become 8, transparent
    pixels white, CMYK, grey and palettes RGB. Raises Validation (empty), UnsupportedMediaType (not JPEG, PNG or WebP by
    content), AnimatedImage, TooManyPixels (from the header), FaceTooSmall (no face fits), UndecodableImage.
    """
    return _decode(data, max_pixels, _REDUCTIONS[0], lambda photo: photo)


def decode_part(data: bytes, whole: Photo, box: Box, reduction: int, *, max_pixels: int) -> Photo:
    """The part of a photo within a box, as a photo of its own, reduced by at most `reduction`.

    whole: what `decode` made of the same bytes, turned or not; the part is turned as it is. box: x, y, width, height in pixels of
    `whole` as sent; what lies outside is left out.
    """
    x, y, width, height = (round(value) for value in box)
    left, top = max(0, x), max(0, y)
    right, bottom = min(whole.width, x + width), min(whole.height, y + height)

    def cut(photo: Photo) -> Photo:
        k = photo.reduction
        part = np.rot90(photo.pixels, whole.quarters)[top // k : -(-bottom // k), left // k : -(-right // k)].copy()
        return Photo(part, photo.format, part.shape[1] * k, part.shape[0] * k, k, whole.quarters)

    return _decode(data, max_pixels, reduction, cut)


def _decode(data: bytes, max_pixels: int, most_reduced: int, use: Callable[[Photo], T]) -> T:
    """Decode the photo, and return what `use` makes of it. `use` runs before the next large photo is decoded."""
    if not data:
        raise _refusal(Validation, "file-empty", "The photo is empty.", "Choose the photo again.")
    kind = _sniff(data)
    still = _still(kind, data, max_pixels)
    _check_size(*still.size, max_pixels)
    if isinstance(still, jpeg.StillJpeg):
        _check_scans(still)
        is_streamed = still.scans == 1 and not still.is_progressive and most_reduced == _REDUCTIONS[0]
        with _room_for(still.size, is_streamed=is_streamed):
            return use(_decoded_jpeg(still, most_reduced))
    with _room_for(still.size, is_streamed=False):
        return use(_decoded_webp(still, most_reduced) if kind == "webp" else _decoded(still, "png", most_reduced))


def encode(pixels: Pixels) -> bytes:
    """The pixels as a JPEG without any metadata: what is stored is ours, not the sender's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=STORED_JPEG_QUALITY)
    return buffer.getvalue()


def decode_stored(data: bytes) -> Pixels:
    """The pixels of a photo that `encode` made. Today's limits for new photos do not apply."""
    try:
        with JpegImageFile(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"), dtype=np.uint8)
    except _DECODING_ERRORS:
        raise _damaged() from None


def encode_lossless(pixels: Pixels) -> bytes:
    """The pixels as a PNG without any metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _sniff(data: bytes) -> Format:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    found = "It is a HEIC or AVIF file." if data[4:8] == b"ftyp" else "It is something else."
    advice = "Set the camera to its most compatible format, JPEG." if data[4:8] == b"ftyp" else _ACCEPTED
    raise _refusal(UnsupportedMediaType, "unsupported-media-type", f"Accepted are JPEG, PNG and WebP. {found}", advice)


def _still(kind: Format, data: bytes, max_pixels: int) -> Still:
    """The file without its side data. Raises AnimatedImage, UndecodableImage, and what the size that it claims forbids."""
    take_apart: dict[Format, Callable[[bytes], Still]] = {"jpeg": jpeg.still, "png": png.still, "webp": webp.still}
    try:
        return take_apart[kind](data)
    except Animated:
        message = "The image has more than one frame."
        raise _refusal(AnimatedImage, "animated-image", message, "Send a still photo.") from None
    except Damaged as damaged:
        if damaged.size is not None:
            _check_size(*damaged.size, max_pixels)
        raise _damaged() from None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels or max(width, height) > LONGEST_SIDE:
        limits = f"{max_pixels / 1e6:g} megapixels and {LONGEST_SIDE} pixels a side are accepted"
        detail = f"The photo has {width} x {height} pixels; {limits}."
        raise _refusal(
            TooManyPixels, "too-many-pixels", detail, "Choose a smaller picture size in the camera's settings."
        )
    if min(width, height) < SHORTEST_SIDE:
        detail = f"The photo has {width} x {height} pixels; at least {SHORTEST_SIDE} a side are needed."
        raise _refusal(FaceTooSmall, "face-too-small", detail, "Send a larger photo.")
    if max(width, height) > GREATEST_ASPECT * min(width, height):
        detail = f"The photo's sides, {width} x {height}, are too unequal; {GREATEST_ASPECT:g} to 1 is accepted."
        raise _refusal(
            UndecodableImage, "undecodable-image", detail, "Send an ordinary portrait photo, not a panorama."
        )


def _check_scans(still: jpeg.StillJpeg) -> None:
    """Refuse a JPEG that is coded in more passes than a camera needs."""
    passes, pixels = still.scans, still.size[0] * still.size[1]
    if passes > jpeg.MOST_SCANS or passes * pixels > max(MOST_SCANNED_PIXELS, 2 * pixels):
        more = "more than " if passes > jpeg.MOST_SCANS else ""
        detail = f"The photo is coded in {more}{min(passes, jpeg.MOST_SCANS)} passes."
        raise _refusal(
            UndecodableImage, "undecodable-image", detail, "Take a new photo, and send it as the camera saved it."
        )


class NoRoomYet(Exception):
    """Another large photo is being decoded."""


@contextmanager
def giving_way() -> Iterator[None]:
    """While the body runs, a large photo on this thread raises NoRoomYet instead of waiting for another one."""
    _thread.gives_way = True
    try:
        yield
    finally:
        _thread.gives_way = False


@contextmanager
def _room_for(size: tuple[int, int], *, is_streamed: bool) -> Iterator[None]:
    """Wait for the turn of a large photo. is_streamed: its decoder holds a few rows at a time."""
    if is_streamed or size[0] * size[1] <= _LARGE_PIXELS:
        yield
    else:
        if not _large_photo.acquire(blocking=not getattr(_thread, "gives_way", False)):
            raise NoRoomYet
        try:
            yield
        finally:
            _large_photo.release()


def _decoded_jpeg(still: jpeg.StillJpeg, most_reduced: int) -> Photo:
    """The decoded picture. One without an end marker is accepted if no row is missing.

    A decoder invents missing rows and does not say so. So the picture is decoded again with bytes added behind it. They do not
    change whole coded data. Where rows are missing, the decoder reads them as rows, and the pictures differ.
    """
    photo = _decoded(replace(still, data=still.data if still.has_end else still.data + jpeg.END), "jpeg", most_reduced)
    if not still.has_end:
        padded = _decoded(replace(still, data=still.data + _PADDING + jpeg.END), "jpeg", most_reduced)
        if not np.array_equal(photo.pixels, padded.pixels):
            raise _damaged()
    return photo


def _decoded(still: Still, kind: Literal["jpeg", "png"], most_reduced: int) -> Photo:
    """By Pillow's reader of this type alone; `Image.open` would try others, and count pixels by a rule of its own."""
    reader = JpegImageFile if kind == "jpeg" else PngImageFile
    width, height = still.size
    reduction = min(_reduction(width, height), most_reduced)
    try:
        with reader(io.BytesIO(still.data)) as image:
            if image.size != still.size:
                raise _damaged()
            if kind == "jpeg":
                # Asks the decoder for the smaller picture: a quarter of the time and memory.
                image.draft(None, (width // reduction, height // reduction))
            image.load()
            left = reduction // max(1, round(width / image.size[0]))
            across, down = image.size
            pixels = _by_bands(down, left, lambda top, bottom: _rgb(image.crop((0, top, across, bottom)), left))
    except _DECODING_ERRORS:
        raise _damaged() from None
    return _upright(pixels, kind, still, reduction)


def _decoded_webp(still: Still, most_reduced: int) -> Photo:
    """By OpenCV's reader: Pillow's has one for animations only, which holds a photo four times over (382 MB of 25 megapixels)."""
    width, height = still.size
    try:
        picture = cv2.imdecode(np.frombuffer(still.data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        raise _damaged() from None
    if picture is None or picture.shape[:2] != (height, width) or picture.ndim != 3:  # noqa: PLR2004 - rows, columns, colours
        raise _damaged()
    colours, reduction = [2, 1, 0, 3][: picture.shape[2]], min(_reduction(width, height), most_reduced)

    def band(top: int, bottom: int) -> Pixels:
        return _rgb(Image.fromarray(np.ascontiguousarray(picture[top:bottom, :, colours])), reduction)

    return _upright(_by_bands(height, reduction, band), "webp", still, reduction)


def _reduction(width: int, height: int) -> int:
    return next((k for k in _REDUCTIONS if max(width, height) >= k * WORKING_LONG_SIDE), 1)


def _by_bands(height: int, reduction: int, band: Callable[[int, int], Pixels]) -> Pixels:
    """The whole picture from `band(top, bottom)`, which gives those rows as RGB, reduced."""
    pixels: Pixels | None = None
    for top in range(0, height, _BAND_ROWS):
        rows = band(top, min(top + _BAND_ROWS, height))
        if pixels is None:
            pixels = np.empty((-(-height // reduction), *rows.shape[1:]), np.uint8)
        pixels[top // reduction : top // reduction + len(rows)] = rows
    assert pixels is not None  # noqa: S101 - no photo is without rows
    return pixels


def _upright(pixels: Pixels, kind: Format, still: Still, reduction: int) -> Photo:
    upright = _UPRIGHT.get(still.orientation)
    width, height = still.size[::-1] if still.orientation in _ON_SIDE else still.size
    return Photo(
        pixels=pixels if upright is None else np.ascontiguousarray(upright(pixels)),
        format=kind,
        width=width,
        height=height,
        reduction=reduction,
    )


def _rgb(image: Image.Image, reduction: int) -> Pixels:
    if image.mode.startswith("I"):
        # 16 bits of grey: Pillow's own conversion cuts everything above 255 to white.
        grey = np.asarray(image)
        shallow = (grey >> 8).clip(0, 255).astype(np.uint8) if grey.dtype.itemsize > 1 else grey.astype(np.uint8)
        image = Image.fromarray(shallow)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if reduction > 1:
            image = image.reduce(reduction)
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
        reduction = 1
    if image.mode != "RGB":
        image = image.convert("RGB")
    if reduction > 1:
        image = image.reduce(reduction)
    return np.array(image, dtype=np.uint8)


def _damaged() -> Problem:
    detail = "The photo is damaged or incomplete."
    return _refusal(UndecodableImage, "undecodable-image", detail, "Take or send the photo again.")


def _refusal(problem: type[Problem], code: str, detail: str, advice: str) -> Problem:
    return problem(detail, errors=(Advice("photo", code, advice),))
