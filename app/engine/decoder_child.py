"""The process that decodes pictures whose decoders are not trusted in the server: `python -m app.engine.decoder_child FD`.

It imports the decoders, and forks for each picture. A fork reads one picture from a socket of its own, and ends. It may use
memory and that socket, and nothing else. So a picture that takes over its decoder reaches no other picture, no file, and no
network. This process reads no picture itself. It kills forks that take too long, and ends together with its parent.
"""

import gc
import io
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import pillow_heif
from PIL import AvifImagePlugin, Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile

from app.domain.faces import Pixels
from app.domain.rows import by_bands, rgb
from app.engine.confinement import Allowance, confine
from app.engine.decoder_frames import ANSWER, AVIF, HEIC, JPEG2000, READY, READY_WITHOUT_FILTER, REQUEST, TICKET

#: How often ended forks are looked for, while there are any.
_REAP_SECONDS: Final = 0.05


def _heic(data: bytes, size: tuple[int, int], reduction: int, _: int) -> Pixels:
    image = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)[0]
    coded, mode = image.data, image.mode
    if image.size != size:
        raise ValueError
    rows = np.frombuffer(coded, np.uint8).reshape(size[1], image.stride)
    if mode.endswith(";16"):
        # Grey of more than 8 bits, as 16 bits.
        mode, rows = "L", rows[:, 1::2]
    return _reduced(rows[:, : size[0] * Image.getmodebands(mode)], mode, reduction)


def _avif(data: bytes, size: tuple[int, int], reduction: int, _: int) -> Pixels:
    with AvifImageFile(io.BytesIO(data)) as image:
        if image.size != size:
            raise ValueError
        # Pillow's `load` would copy the whole picture once more.
        coded, *_ = image._decoder.get_frame(0)  # noqa: SLF001 - as `load` does
        rows = np.frombuffer(coded, np.uint8).reshape(size[1], -1)
        return _reduced(rows, image.mode, reduction)


def _jpeg2000(data: bytes, size: tuple[int, int], reduction: int, halvings: int) -> Pixels:
    with Jpeg2KImageFile(io.BytesIO(data)) as image:
        if image.size != size:
            raise ValueError
        image.reduce = halvings
        image.load()
        left, (across, down) = reduction >> halvings, image.size
        return by_bands(down, left, lambda top, bottom: rgb(image.crop((0, top, across, bottom)), left))


def _reduced(rows: Pixels, mode: str, reduction: int) -> Pixels:
    """rows: (height, bytes of a row)."""
    width = rows.shape[1] // Image.getmodebands(mode)

    def band(top: int, bottom: int) -> Pixels:
        return rgb(Image.frombytes(mode, (width, bottom - top), rows[top:bottom].tobytes()), reduction)

    return by_bands(len(rows), reduction, band)


_DECODERS: Final[dict[bytes, Callable[[bytes, tuple[int, int], int, int], Pixels]]] = {
    HEIC: _heic,
    AVIF: _avif,
    JPEG2000: _jpeg2000,
}


def _decode_one(connection: socket.socket, allowance: Allowance) -> None:
    """Decode the one picture of this connection, confined. Runs in a fork."""
    # Standard error is the server's log. Input and output lead nowhere already.
    os.dup2(0, 2)
    is_filtered = confine(allowance)
    # Files, not sockets: their calls are `read` and `write` alone.
    with os.fdopen(connection.detach(), "r+b", buffering=0) as stream:
        stream.write(READY if is_filtered else READY_WITHOUT_FILTER)
        kind, reduction, halvings, width, height, length = REQUEST.unpack(_read(stream, REQUEST.size))
        data = _read(stream, length)
        try:
            pixels = _DECODERS[kind](data, (width, height), reduction, halvings)
            head = ANSWER.pack(pixels.shape[1], pixels.shape[0])
        except Exception:  # noqa: BLE001 - a decoder may raise anything; none of its words are passed on
            stream.write(ANSWER.pack(0, 0))
            return
        for part in (memoryview(head), pixels.data.cast("B")):
            sent = 0
            while sent < len(part):
                sent += stream.write(part[sent:]) or 0


def _read(stream: io.FileIO, size: int) -> bytes:
    data = bytearray(size)
    at = 0
    while at < size:
        got = stream.readinto(memoryview(data)[at:])
        if not got:
            raise EOFError
        at += got
    return bytes(data)


def serve(control: socket.socket) -> None:
    """Fork for each socket that comes, until the parent closes its end."""
    deadlines: dict[int, float] = {}
    watched = select.poll()
    watched.register(control, select.POLLIN)
    while True:
        is_ready = watched.poll(1000 * _REAP_SECONDS if deadlines else None)
        _reap(deadlines)
        if not is_ready:
            continue
        ticket, descriptors, *_ = socket.recv_fds(control, TICKET.size, 1)
        if not ticket:
            break
        processor_seconds, seconds, mib = TICKET.unpack(ticket)
        connection = socket.socket(fileno=descriptors[0])
        try:
            child = os.fork()
        except OSError:
            # No process or memory is left for it. The pictures that are being decoded go on.
            connection.close()
            continue
        if child == 0:
            control.close()
            _decode_and_exit(connection, Allowance(processor_seconds, mib))
        connection.close()
        deadlines[child] = time.monotonic() + seconds
    for child in deadlines:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _decode_and_exit(connection: socket.socket, allowance: Allowance) -> None:
    status = 1
    try:
        _decode_one(connection, allowance)
        status = 0
    finally:
        # Neither tracebacks, which may quote the picture, nor the parent's handlers.
        os._exit(status)


def _reap(deadlines: dict[int, float]) -> None:
    """Forget forks that have ended, and kill those that took too long."""
    for child, deadline in [*deadlines.items()]:
        if os.waitpid(child, os.WNOHANG)[0] == child:
            del deadlines[child]
        elif time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)


def main(descriptor: int) -> None:
    """Prepare everything that a fork cannot load any more, and serve."""
    # A terminal's Ctrl-C is the parent's affair. It closes the socket then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.options.THUMBNAILS = pillow_heif.options.DEPTH_IMAGES = pillow_heif.options.AUX_IMAGES = False
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    Image.MAX_IMAGE_PIXELS = None
    # What forks share with this process stays shared.
    gc.freeze()
    serve(socket.socket(fileno=descriptor))


if __name__ == "__main__":
    main(int(sys.argv[1]))
