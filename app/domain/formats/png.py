"""PNG (ISO/IEC 15948) and its animations: only the chunks that make the pixels are kept."""

import zlib
from collections.abc import Iterator
from typing import Final

from app.domain.formats import orientation
from app.domain.formats.parts import Animated, Damaged, Still

#: A photo of 20 MiB in pieces of 512 bytes has 40,960.
_MOST_CHUNKS: Final = 65_536
_HEADER: Final = b"\0\0\0\x0dIHDR"
#: Signature, and the chunk IHDR with its length, kind and checksum.
_FIRST_CHUNK: Final = 8 + 25

_END: Final = b"\0\0\0\0IEND\xae\x42\x60\x82"
_TEXT_KINDS: Final = (b"tEXt", b"zTXt", b"iTXt")
#: Keywords in lower case, in order of precedence, each with the reader of its text.
_TEXTS: Final[dict[bytes, orientation.Reader]] = {
    b"raw profile type exif": orientation.of_text_profile,
    b"raw profile type app1": orientation.of_text_profile,
    b"xml:com.adobe.xmp": orientation.of_xmp,
    b"raw profile type xmp": orientation.of_text_profile,
}
_LONGEST_KEYWORD: Final = 79


def still(data: bytes) -> Still:
    """The picture without its side chunks (profiles, texts, times) and everything behind the end. Raises Damaged or Animated.

    Side chunks are not unpacked, and their checksums do not matter. The orientation is the first that is stated by eXIf
    chunks, EXIF written as text, XMP.
    """
    if data[8:16] != _HEADER or len(data) < _FIRST_CHUNK:
        raise Damaged
    size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    view = memoryview(data)
    kept: list[bytes | memoryview] = [view[:_FIRST_CHUNK]]
    exif: list[bytes] = []
    texts: list[tuple[bytes, bytes]] = []
    frames, has_pixels, has_frame_data = 0, False, False
    for kind, start, end in _chunks(data, size):
        if kind == b"IDAT" or (kind in {b"PLTE", b"tRNS"} and not has_pixels):
            has_pixels = has_pixels or kind == b"IDAT"
            kept.append(view[start - 8 : end + 4])
        elif kind == b"acTL" and not has_pixels:
            frames = int.from_bytes(data[start : start + 4], "big")
        elif kind == b"fdAT":
            has_frame_data = True
        elif kind == b"eXIf" and len(exif) < orientation.MOST_BLOCKS:
            exif.append(data[start:end][: orientation.MOST_BYTES])
        elif kind in _TEXT_KINDS and len(texts) < orientation.MOST_BLOCKS:
            texts += _text(data, kind, start, end)
    # A frame apart from IDAT is another picture: browsers show that one, other programs show IDAT.
    if frames > 1 or (frames and has_frame_data):
        raise Animated
    if not has_pixels:
        raise Damaged(size)
    in_texts = [(read, [text for keyword, text in texts if keyword == wanted]) for wanted, read in _TEXTS.items()]
    stated = orientation.first_stated((orientation.of_exif, exif), *in_texts)
    return Still(b"".join([*kept, _END]), size, stated)


def _chunks(data: bytes, size: tuple[int, int]) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk's content after the first. A file may lack the end chunk, and nothing else."""
    position = _FIRST_CHUNK
    for _ in range(_MOST_CHUNKS):
        head = data[position : position + len(_END)]
        start, end = position + 8, position + 8 + int.from_bytes(head[:4], "big")
        if head[4:8] == b"IEND" or _END.startswith(head):
            return
        if end + 4 > len(data):
            break
        yield head[4:8], start, end
        position = end + 4
    raise Damaged(size)


def _text(data: bytes, kind: bytes, start: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """The keyword and the beginning of the text, if the keyword is one of _TEXTS."""
    keyword, separator, _ = data[start : min(end, start + _LONGEST_KEYWORD + 1)].partition(b"\0")
    if not separator or keyword.lower() not in _TEXTS:
        return
    body = data[start + len(keyword) + 1 : end][: orientation.MOST_BYTES]
    is_packed = kind == b"zTXt"
    if kind == b"iTXt":
        is_packed = body[:1] == b"\x01"
        body = body[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif is_packed:
        body = body[1:]
    yield keyword.lower(), _unpacked(body) if is_packed else body


def _unpacked(packed: bytes) -> bytes:
    """Unpack the beginning, at most MOST_BYTES, however large the whole would be."""
    try:
        return zlib.decompressobj().decompress(packed, orientation.MOST_BYTES)
    except zlib.error:
        return b""
