"""Picture files built piece by piece: chunks, segments, and blocks that state an orientation."""

import io
import struct
import zlib

import pillow_heif
from PIL import Image

#: TIFF types with their lengths: BYTE, SHORT, LONG.
BYTE, SHORT, LONG = 1, 3, 4
_LENGTHS = {BYTE: 1, SHORT: 2, LONG: 4}


def exif(orientation: int, *, kind: int = SHORT, big_endian: bool = True) -> bytes:
    """An EXIF block without prefix whose first directory has a maker's name and the orientation."""
    order = ">" if big_endian else "<"
    value = orientation.to_bytes(_LENGTHS[kind], "big" if big_endian else "little").ljust(4, b"\0")
    entries = struct.pack(order + "HHI", 0x010F, 2, 4) + b"abc\0" + struct.pack(order + "HHI", 0x0112, kind, 1) + value
    head = (b"MM" if big_endian else b"II") + struct.pack(order + "HI", 42, 8)
    return head + struct.pack(order + "H", 2) + entries + b"\0" * 4


def xmp(orientation: int, *, prefix: str = "tiff", as_element: bool = False) -> bytes:
    """An XMP packet that states the orientation."""
    name = f"{prefix}:Orientation"
    attribute = "" if as_element else f' {name}="{orientation}"'
    element = f"<{name}>{orientation}</{name}>" if as_element else ""
    return (
        "<?xpacket begin='\ufeff' id='W5M0MpCehiHzreSzNTczkc9d'?><x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF "
        "xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'><rdf:Description rdf:about='' "
        f"xmlns:{prefix}='http://ns.adobe.com/tiff/1.0/'{attribute}>{element}</rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def segment(marker: int, body: bytes) -> bytes:
    """A JPEG segment."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_with(jpeg: bytes, *segments: bytes) -> bytes:
    """The JPEG with these segments right behind its first marker."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def png_chunk(kind: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    """A PNG chunk."""
    summed = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", summed)


def png_with(png: bytes, *chunks: bytes, before: bytes = b"IDAT") -> bytes:
    """The PNG with these chunks before its first chunk of a kind."""
    at = png.index(before) - 4
    return png[:at] + b"".join(chunks) + png[at:]


def raw_profile(name: bytes, block: bytes) -> bytes:
    """A profile as text, as ImageMagick writes it."""
    digits = block.hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    return b"\n" + name + b"\n%8d\n" % len(block) + lines.encode() + b"\n"


def webp_chunk(kind: bytes, body: bytes) -> bytes:
    """A WebP chunk."""
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def webp_file(*chunks: bytes) -> bytes:
    """A WebP file of these chunks."""
    return b"RIFF" + struct.pack("<I", 4 + sum(map(len, chunks))) + b"WEBP" + b"".join(chunks)


def webp_canvas(width: int, height: int, flags: int) -> bytes:
    """The chunk VP8X."""
    sides = b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
    return webp_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + sides)


def webp_frame(width: int, height: int, *chunks: bytes) -> bytes:
    """A frame of an animation, at the canvas' corner."""
    sides = b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
    return webp_chunk(b"ANMF", bytes(6) + sides + b"\x64\0\0\0" + b"".join(chunks))


def heif_file(image: Image.Image, kind: str = "HEIF", **options: object) -> bytes:
    """The picture as HEIC, or as AVIF."""
    pillow_heif.register_heif_opener()
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg2000_file(image: Image.Image, **options: object) -> bytes:
    """The picture as JP2, or as a bare codestream with `no_jp2`."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG2000", **options)
    return buffer.getvalue()
