"""A photo: from untrusted bytes to upright pixels.

The header is read before anything is decoded, by content and never by name or declared type, and by exactly the one
decoder of its type. `formats` cuts off metadata, colour profiles and appended bytes before the decoder sees the file.
"""

import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol, Self, TypeVar, get_args

import cv2
import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from app.domain.faces import Box, Face, PhotoFace, Pixels
from app.domain.formats import heif, jpeg, jpeg2000, png, webp
from app.domain.formats.heif import HeifStill
from app.domain.formats.jpeg import StillJpeg
from app.domain.formats.jpeg2000 import Jpeg2000Still
from app.domain.formats.parts import Animated, Damaged, Still, TooCostly, Unsupported
from app.domain.rows import ON_SIDE, by_bands, rgb, upright
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

Format = Literal["jpeg", "png", "webp", "heic", "avif", "jpeg2000"]
FORMATS: Final[tuple[Format, ...]] = get_args(Format)
_NAMES: Final[dict[Format, str]] = {
    "jpeg": "JPEG", "png": "PNG", "webp": "WebP", "heic": "HEIC", "avif": "AVIF", "jpeg2000": "JPEG 2000",
}  # fmt: skip
T = TypeVar("T")

#: A photo is halved as long as its long side keeps this many pixels: a face at the detector's limit, a fortieth of the long
#: side, still has the 40 pixels that recognition needs, and a phone's 12 megapixels become 3 before they are all decoded.
WORKING_LONG_SIDE = 1600
_REDUCTIONS = (8, 4, 2)

#: No face of MINIMUM_FACE_SIDE fits into less.
SHORTEST_SIDE = 40
GREATEST_ASPECT = 4.0
#: Larger ones that have to be decoded whole take turns: one of 25 megapixels needs 100 to 200 MB meanwhile, so a process keeps
#: room for one, however many come at once. An ordinary JPEG is smaller before it is decoded, and waits for nobody.
_LARGE_PIXELS = 6_000_000
_large_photo = threading.Lock()
_thread = threading.local()

#: Scans of a progressive JPEG times its pixels. Each scan walks over every block, so a small file with thousands of them
#: would hold a core for minutes.
MOST_SCANNED_PIXELS = 500_000_000
#: What the decoder of JPEG 2000 makes at once takes 20 bytes a pixel. It halves a picture while it reads it.
MOST_JPEG2000_PIXELS = 12_500_000

STORED_JPEG_QUALITY = 95

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

#: Coded data that no picture ends with, and without markers (see `_decoded_jpeg`).
_PADDING = bytes(range(1, 255)) * 2
#: Sixteen bytes of ones, as coded data write them. They fill a decoder's buffer of bits. No code is all ones, so it takes them
#: for three blocks at most.
_ONES = b"\xff\0" * 16
#: A colour by bands that no picture has all over its last row. A grey one may have the first, and then not the other.
_UNWRITTEN: Final = (1, 254, 77, 3)
_UNWRITTEN_ELSE: Final = (254, 1, 3, 77)
#: Width and height, as stored, of the corner that is looked at for rows that a decoder invented.
_INVENTED_ACROSS, _INVENTED_DOWN = 64, 8


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


class IsolatedDecoder(Protocol):
    """Decodes pictures outside this process."""

    def decode(self, still: HeifStill | Jpeg2000Still, reduction: int) -> Pixels:
        """The picture as stored, as RGB, `reduction` times smaller. Raises Damaged, TooCostly, or a Problem."""

    def close(self) -> None:
        """End what runs outside this process."""


@dataclass(frozen=True, slots=True)
class PhotoReader:
    """Reads photos: which formats, and how large they may be.

    max_pixels: of a photo that is decoded whole. max_jpeg_pixels: of a JPEG that its decoder reduces while it reads it. max_side:
    in pixels. isolated: the decoder of HEIC, AVIF and JPEG 2000. Without it, these formats are not read.
    """

    max_pixels: int = 25_000_000
    max_jpeg_pixels: int = 60_000_000
    max_side: int = 12_000
    formats: frozenset[Format] = frozenset(FORMATS)
    isolated: IsolatedDecoder | None = None

    def decode(self, data: bytes) -> Photo:
        """The photo in these bytes, upright, as RGB. Blocking.

        Colour profiles are ignored (their parsers are a risk, recognition does not notice); 16 bits become 8, transparent
        pixels white, CMYK, grey and palettes RGB. Raises Validation (empty), UnsupportedMediaType (by content), AnimatedImage,
        TooManyPixels (from the header), FaceTooSmall (no face fits), UndecodableImage.
        """
        return self._decode(data, _REDUCTIONS[0], lambda photo: photo)

    def decode_part(self, data: bytes, whole: Photo, box: Box, reduction: int) -> Photo:
        """The part of a photo within a box, as a photo of its own, reduced by `reduction`, or more where it is very large.

        whole: what `decode` made of the same bytes, turned or not; the part is turned as it is. box: x, y, width, height in
        pixels of `whole` as sent; what lies outside is left out.
        """
        x, y, width, height = (round(value) for value in box)
        left, top = max(0, x), max(0, y)
        right, bottom = min(whole.width, x + width), min(whole.height, y + height)

        def cut(photo: Photo) -> Photo:
            k = photo.reduction
            part = np.rot90(photo.pixels, whole.quarters)[top // k : -(-bottom // k), left // k : -(-right // k)].copy()
            return Photo(part, photo.format, part.shape[1] * k, part.shape[0] * k, k, whole.quarters)

        return self._decode(data, reduction, cut)

    def _decode(self, data: bytes, most_reduced: int, use: Callable[[Photo], T]) -> T:
        """Decode the photo, and return what `use` makes of it. `use` runs before the next large photo is decoded."""
        if not data:
            raise _refusal(Validation, "file-empty", "The photo is empty.", "Choose the photo again.")
        kind, still = self._still(data)
        self._check_size(still)
        if isinstance(still, StillJpeg):
            _check_scans(still)
        width, height = still.size
        # A photo that is too large to be decoded whole is reduced in any case.
        most_whole = MOST_JPEG2000_PIXELS if kind == "jpeg2000" else self.max_pixels
        least = next((k for k in (1, 2, 4) if width * height <= most_whole * k * k), 8)
        reduction = max(least, min(_reduction(width, height), most_reduced))
        is_streamed = isinstance(still, StillJpeg) and still.is_streamed and most_reduced == _REDUCTIONS[0]
        with _room_for(still.size, is_streamed=is_streamed):
            try:
                pixels = self._pixels(kind, still, reduction)
            except Damaged:
                raise _damaged() from None
            except TooCostly:
                raise _too_costly() from None
            if still.orientation in ON_SIDE:
                width, height = height, width
            return use(Photo(upright(pixels, still.orientation), kind, width, height, reduction))

    def _still(self, data: bytes) -> tuple[Format, Still]:
        """The format and the file without its side data.

        Raises AnimatedImage, UnsupportedMediaType, UndecodableImage, and what the size that it claims forbids.
        """
        kind = _sniff(data)
        if kind is None:
            raise self._unsupported("It is something else.")
        if kind == "heic" and not {"heic", "avif"} & set(self.accepted):
            raise self._unsupported("It is a HEIC or AVIF file.", of_a_phone=True)
        if kind not in self.accepted and kind != "heic":
            raise self._unsupported(f"It is a file in {_NAMES[kind]}.")
        try:
            still: Still = _TAKE_APART[kind](data)
        except Animated:
            message = "The image has more than one frame."
            raise _refusal(AnimatedImage, "animated-image", message, "Send a still photo.") from None
        except Unsupported as unsupported:
            raise self._unsupported(str(unsupported)) from None
        except Damaged as damaged:
            if damaged.size is not None:
                self._check_sides(*damaged.size, self.max_jpeg_pixels if kind == "jpeg" else self.max_pixels)
            raise _damaged() from None
        if isinstance(still, HeifStill) and still.coding not in self.accepted:
            raise self._unsupported(f"It is a file in {_NAMES[still.coding]}.", of_a_phone=True)
        return still.coding if isinstance(still, HeifStill) else kind, still

    def close(self) -> None:
        """End what runs outside this process."""
        if self.isolated is not None:
            self.isolated.close()

    @property
    def accepted(self) -> tuple[Format, ...]:
        """The formats that are read."""
        isolated = ("heic", "avif", "jpeg2000")
        return tuple(kind for kind in FORMATS if kind in self.formats and (self.isolated or kind not in isolated))

    def _unsupported(self, found: str, *, of_a_phone: bool = False) -> Problem:
        names = [_NAMES[kind] for kind in self.accepted]
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
        advice = f"Send a photo as {names[0]}."
        if of_a_phone and names[0] == "JPEG":
            advice = "Set the camera to its most compatible format, JPEG."
        return _refusal(UnsupportedMediaType, "unsupported-media-type", f"Accepted are {listed}. {found}", advice)

    def _check_size(self, still: Still) -> None:
        most = self.max_pixels
        if isinstance(still, StillJpeg) and still.is_streamed:
            most = max(most, self.max_jpeg_pixels)
        elif isinstance(still, Jpeg2000Still):
            most = min(most, MOST_JPEG2000_PIXELS << 2 * min(still.halvings, 3))
        self._check_sides(*still.size, most)

    def _check_sides(self, width: int, height: int, most: int) -> None:
        if width * height > most or max(width, height) > self.max_side:
            limits = f"{most / 1e6:g} megapixels and {self.max_side} pixels a side are accepted for such a file"
            detail = f"The photo has {width} x {height} pixels; {limits}."
            advice = "Choose a smaller picture size in the camera's settings."
            if most < self.max_jpeg_pixels and "jpeg" in self.formats and width * height <= self.max_jpeg_pixels:
                advice = f"Send an ordinary JPEG, which may have {self.max_jpeg_pixels / 1e6:g} megapixels, or a smaller picture."
            raise _refusal(TooManyPixels, "too-many-pixels", detail, advice)
        if min(width, height) < SHORTEST_SIDE:
            detail = f"The photo has {width} x {height} pixels; at least {SHORTEST_SIDE} a side are needed."
            raise _refusal(FaceTooSmall, "face-too-small", detail, "Send a larger photo.")
        if max(width, height) > GREATEST_ASPECT * min(width, height):
            detail = f"The photo's sides, {width} x {height}, are too unequal; {GREATEST_ASPECT:g} to 1 is accepted."
            advice = "Send an ordinary portrait photo, not a panorama."
            raise _refusal(UndecodableImage, "undecodable-image", detail, advice)

    def _pixels(self, kind: Format, still: Still, reduction: int) -> Pixels:
        """The picture as stored, reduced. Raises Damaged or TooCostly."""
        if isinstance(still, StillJpeg):
            return _decoded_jpeg(still, reduction)
        if kind == "png":
            return _decoded(still, PngImageFile, reduction)
        if kind == "webp":
            return _decoded_webp(still, reduction)
        assert self.isolated is not None  # noqa: S101 - `accepted` has the others only with it
        assert isinstance(still, HeifStill | Jpeg2000Still)  # noqa: S101
        return self.isolated.decode(still, reduction)


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


_TAKE_APART: Final[dict[Format, Callable[[bytes], Still]]] = {
    "jpeg": jpeg.still, "png": png.still, "webp": webp.still, "heic": heif.still, "avif": heif.still, "jpeg2000": jpeg2000.still,
}  # fmt: skip


def _sniff(data: bytes) -> Format | None:
    """The format by content. HEIC stands for AVIF as well: `heif.still` tells them apart."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if jpeg2000.is_jpeg2000(data):
        return "jpeg2000"
    return "heic" if heif.is_heif(data) else None


def _check_scans(still: StillJpeg) -> None:
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


def _decoded_jpeg(still: StillJpeg, reduction: int) -> Pixels:
    """The decoded picture. Raises Damaged if rows are missing at its end: a decoder that meets the end marker invents them.

    A decoder that writes rows as it reads them gets other bytes in place of the end marker. They do not change whole coded data.
    If the last row is not written then, rows are missing. Any other picture is decoded with the end marker. If it ends in one
    colour, or had no end marker, it is decoded again with these bytes before the marker. If the pictures differ, rows are
    missing.
    """
    # Coded data do not end with 0xFF, which would make a marker of what follows.
    coded = still.data.removesuffix(jpeg.END).rstrip(b"\xff")
    if still.is_streamed:
        endless = replace(still, data=coded + _ONES)
        try:
            return _decoded(endless, JpegImageFile, reduction, unwritten=_UNWRITTEN)
        except Damaged:
            return _decoded(endless, JpegImageFile, reduction, unwritten=_UNWRITTEN_ELSE)
    pixels = _decoded(replace(still, data=coded + jpeg.END), JpegImageFile, reduction)
    if not still.has_end or _ends_in_one_colour(pixels, reduction):
        padded = _decoded(replace(still, data=coded + _PADDING + jpeg.END), JpegImageFile, reduction)
        if not np.array_equal(pixels, padded):
            raise Damaged
    return pixels


def _ends_in_one_colour(pixels: Pixels, reduction: int) -> bool:
    across, down = max(1, _INVENTED_ACROSS // reduction), max(1, _INVENTED_DOWN // reduction)
    corner = pixels[-down:, -across:]
    return bool((corner == corner[-1, -1]).all())


def _decoded(
    still: Still, reader: type[JpegImageFile | PngImageFile], reduction: int, *, unwritten: tuple[int, ...] = ()
) -> Pixels:
    """By Pillow's reader of this type alone; `Image.open` would try others, and count pixels by a rule of its own.

    unwritten: given if the reader does not meet the end of the picture. It complains then, and has written all the rows that
    it has; others have this colour.
    """
    width, height = still.size
    try:
        with reader(io.BytesIO(still.data)) as image:
            if image.size != still.size:
                raise Damaged
            # Asks the decoder of a JPEG for the smaller picture: a quarter of the time and memory.
            image.draft(None, (width // reduction, height // reduction))
            if unwritten:
                _load_rows(image, unwritten)
            else:
                image.load()
            left = reduction // max(1, round(width / image.size[0]))
            across, down = image.size
            return by_bands(down, left, lambda top, bottom: rgb(image.crop((0, top, across, bottom)), left))
    except _DECODING_ERRORS:
        raise Damaged from None


def _load_rows(image: ImageFile, unwritten: tuple[int, ...]) -> None:
    """Load a picture without an end. Raises Damaged unless its last row was written. unwritten: no colour of the whole row."""
    bands = len(image.getbands())
    colour = unwritten[:bands] if bands > 1 else unwritten[0]
    image.im = Image.new(image.mode, image.size, colour).im
    with suppress(OSError):
        image.load()
    image.tile = []
    across, down = image.size
    if image.crop((0, down - 1, across, down)).getcolors(1) == [(across, colour)]:
        raise Damaged


def _decoded_webp(still: Still, reduction: int) -> Pixels:
    """By OpenCV's reader: Pillow's has one for animations only, which holds a photo four times over (382 MB of 25 megapixels)."""
    width, height = still.size
    try:
        picture = cv2.imdecode(np.frombuffer(still.data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        raise Damaged from None
    if picture is None or picture.shape[:2] != (height, width) or picture.ndim != 3:  # noqa: PLR2004 - rows, columns, colours
        raise Damaged
    colours = [2, 1, 0, 3][: picture.shape[2]]

    def band(top: int, bottom: int) -> Pixels:
        return rgb(Image.fromarray(np.ascontiguousarray(picture[top:bottom, :, colours])), reduction)

    return by_bands(height, reduction, band)


def _reduction(width: int, height: int) -> int:
    return next((k for k in _REDUCTIONS if max(width, height) >= k * WORKING_LONG_SIDE), 1)


def _damaged() -> Problem:
    detail = "The photo is damaged or incomplete."
    return _refusal(UndecodableImage, "undecodable-image", detail, "Take or send the photo again.")


def _too_costly() -> Problem:
    detail = "The photo takes more memory or time to read than one photo may take."
    return _refusal(UndecodableImage, "undecodable-image", detail, "Send it as an ordinary JPEG.")


def _refusal(problem: type[Problem], code: str, detail: str, advice: str) -> Problem:
    return problem(detail, errors=(Advice("photo", code, advice),))
