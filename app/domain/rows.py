"""Decoded pictures as RGB, reduced, some rows at a time: no conversion needs room for a second picture."""

from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image

from app.domain.faces import Pixels

#: Rows that are converted and halved at a time; a multiple of every reduction. A photo of 25 megapixels takes 100 MB once
#: decoded, and each conversion of the whole as much again.
_BAND_ROWS: Final = 64

_UPRIGHT: Final[dict[int, Callable[[Pixels], Pixels]]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, 3),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}
ON_SIDE: Final = (5, 6, 7, 8)


def by_bands(height: int, reduction: int, band: Callable[[int, int], Pixels]) -> Pixels:
    """The whole picture from `band(top, bottom)`, which gives those rows as RGB, reduced."""
    pixels: Pixels | None = None
    for top in range(0, height, _BAND_ROWS):
        rows = band(top, min(top + _BAND_ROWS, height))
        if pixels is None:
            pixels = np.empty((-(-height // reduction), *rows.shape[1:]), np.uint8)
        pixels[top // reduction : top // reduction + len(rows)] = rows
    assert pixels is not None  # noqa: S101 - no photo is without rows
    return pixels


def rgb(image: Image.Image, reduction: int) -> Pixels:
    """The rows as RGB, reduced. Transparent pixels are white, and 16 bits become 8."""
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


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """The picture as its orientation (1 to 8, the values of EXIF) says that it is shown."""
    turn = _UPRIGHT.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))
