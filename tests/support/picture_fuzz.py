"""Mutated pictures of every format, and what reading them costs: `python -m tests.support.picture_fuzz heic 10000`.

Mutations know the formats: most change a length, a size, a count or a reference in a header and keep the rest valid.
"""

import io
import json
import random
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pillow_heif
from PIL import Image

from app.domain.photo import FORMATS, Format, PhotoReader
from app.engine.decoders import IsolatedDecoders
from app.errors import Problem

SEED = 20261201
_NUMBERS = (0, 1, 2, 3, 7, 8, 39, 40, 63, 64, 127, 128, 255, 256, 1000, 4095, 4096, 16384, 32767, 32768, 65534, 65535)
_LARGE = (2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1, 25_000_000, 65_535 << 16)
#: What stands before fields that decide what a decoder does, by format.
_ANCHORS: dict[Format, tuple[bytes, ...]] = {
    "jpeg": (b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xdb", b"\xff\xda", b"\xff\xdd", b"\xff\xe0", b"\xff\xee"),
    "png": (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"acTL"),
    "webp": (b"RIFF", b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANMF"),
    "heic": (b"ftyp", b"meta", b"pitm", b"iloc", b"iinf", b"infe", b"iref", b"dimg", b"auxl", b"ipco", b"ipma", b"ispe",
             b"hvcC", b"irot", b"imir", b"clap", b"pixi", b"colr", b"idat", b"mdat", b"auxC"),
    "avif": (b"ftyp", b"meta", b"pitm", b"iloc", b"iinf", b"infe", b"iref", b"auxl", b"ipco", b"ipma", b"ispe", b"av1C",
             b"irot", b"pixi", b"colr", b"mdat", b"auxC"),
    "jpeg2000": (b"jP  ", b"ftyp", b"jp2h", b"ihdr", b"colr", b"pclr", b"cmap", b"jp2c", b"\xff\x51", b"\xff\x52", b"\xff\x5c",
                 b"\xff\x64", b"\xff\x90", b"\xff\x93"),
}  # fmt: skip


@dataclass(slots=True)
class Cost:
    """What reading the pictures came to. mib: growth of this process's memory at its peak."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_processor_seconds: float = 0
    slowest_seconds: float = 0
    mib: float = 0


def seeds(kind: Format) -> list[bytes]:
    """Small whole pictures of a format, of several kinds."""
    down, across = np.mgrid[0:96, 0:80]
    pixels = np.stack([down * 2, across * 3, (down * across) % 256], axis=-1).astype(np.uint8)
    image = Image.fromarray(pixels)
    grey, clear = image.convert("L"), image.convert("RGBA")
    clear.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112] = 6
    pillow_heif.register_heif_opener()
    made: dict[Format, list[tuple[Image.Image, str, dict[str, object]]]] = {
        "jpeg": [(image, "JPEG", {"exif": exif}), (image, "JPEG", {"progressive": True}), (grey, "JPEG", {}),
                 (image.convert("CMYK"), "JPEG", {}), (image, "JPEG", {"restart_marker_rows": 1, "subsampling": 0})],
        "png": [(image, "PNG", {"exif": exif}), (image.quantize(16), "PNG", {}), (clear, "PNG", {}),
                (Image.fromarray(pixels[..., 0].astype(np.uint16) << 8), "PNG", {})],
        "webp": [(image, "WEBP", {"exif": exif}), (clear, "WEBP", {}), (clear, "WEBP", {"lossless": True})],
        "heic": [(image, "HEIF", {}), (image.resize((160, 192)), "HEIF", {"tile_size": 64}), (clear, "HEIF", {}),
                 (grey, "HEIF", {})],
        "avif": [(image, "AVIF", {"exif": exif, "speed": 10}), (clear, "AVIF", {"speed": 10}), (grey, "AVIF", {"speed": 10})],
        "jpeg2000": [(image, "JPEG2000", {}), (image, "JPEG2000", {"no_jp2": True}), (clear, "JPEG2000", {"tile_size": (32, 32)}),
                     (image, "JPEG2000", {"irreversible": True, "quality_mode": "rates", "quality_layers": [20, 5]})],
    }  # fmt: skip
    files = []
    for picture, name, options in made[kind]:
        buffer = io.BytesIO()
        picture.save(buffer, name, **options)
        files.append(buffer.getvalue())
    return files


def mutated(kind: Format, count: int, seed: int = SEED) -> Iterator[bytes]:
    """So many mutated pictures, the same ones for the same seed."""
    chance = random.Random(f"{seed} {kind}")  # noqa: S311 - to be repeated
    whole = seeds(kind)
    for _ in range(count):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            _mutate(kind, data, chance)
        yield _with_sums(data) if kind == "png" and chance.random() < 0.8 else bytes(data)


def _mutate(kind: Format, data: bytearray, chance: random.Random) -> None:
    how = chance.random()
    if how < 0.6 and _mutate_field(kind, data, chance):
        return
    if how < 0.8:
        for _ in range(chance.choice((1, 2, 8))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how < 0.9:
        start = chance.randrange(len(data))
        piece = data[start : start + chance.choice((1, 4, 16, 100))]
        if chance.random() < 0.5:
            data[start:start] = piece * chance.choice((1, 1, 50))
        else:
            del data[start : start + len(piece)]
    else:
        del data[chance.randrange(len(data)) :]
        data += chance.choice((b"", b"\xff\xd9", bytes(64)))
    if not data:
        data += b"\0"


def _mutate_field(kind: Format, data: bytearray, chance: random.Random) -> bool:
    """Overwrite a number behind an anchor, or the length before it."""
    anchor = chance.choice(_ANCHORS[kind])
    found, at = [], data.find(anchor)
    while at >= 0 and len(found) < 64:
        found.append(at)
        at = data.find(anchor, at + 1)
    if not found:
        return False
    size = chance.choice((1, 2, 2, 4, 4))
    start = chance.choice(found) + chance.choice((-4, *range(len(anchor), len(anchor) + 40)))
    value = chance.choice(_NUMBERS if size < 4 or chance.random() < 0.5 else _LARGE)
    if 0 <= start <= len(data) - size:
        data[start : start + size] = (value % (1 << 8 * size)).to_bytes(size, "little" if kind == "webp" else "big")
    return True


def _with_sums(data: bytearray) -> bytes:
    """The PNG with right checksums, as far as its chunks can be walked."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def read_all(kind: Format, count: int, seed: int = SEED) -> Cost:
    """Read so many mutated pictures, two at a time. Any error but a Problem is raised."""
    cost, reader = Cost(), PhotoReader(isolated=IsolatedDecoders())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def read(data: bytes) -> tuple[str, float, float]:
        began, began_at = time.thread_time(), time.perf_counter()
        try:
            reader.decode(data)
            outcome = "read"
        except Problem as problem:
            outcome = "too-costly" if "takes more" in problem.detail else problem.slug()
        return outcome, time.thread_time() - began, time.perf_counter() - began_at

    try:
        with ThreadPoolExecutor(2) as threads:
            for outcome, processor_seconds, seconds in threads.map(read, mutated(kind, count, seed)):
                cost.outcomes[outcome] += 1
                cost.slowest_processor_seconds = max(cost.slowest_processor_seconds, processor_seconds)
                cost.slowest_seconds = max(cost.slowest_seconds, seconds)
    finally:
        reader.close()
    cost.mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return cost


if __name__ == "__main__":
    (chosen,) = (kind for kind in FORMATS if kind == sys.argv[1])
    cost = read_all(chosen, int(sys.argv[2]))
    print(json.dumps({  # noqa: T201 - its answer
        "format": chosen, "outcomes": cost.outcomes, "slowest_processor_seconds": round(cost.slowest_processor_seconds, 3),
        "slowest_seconds": round(cost.slowest_seconds, 3), "mib": round(cost.mib, 1),
    }))  # fmt: skip
