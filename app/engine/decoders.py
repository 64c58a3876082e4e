"""Decode pictures outside the server: each by a process that reads this picture, computes, and ends (docs/adr/0053)."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

import numpy as np
import structlog
from prometheus_client import Counter

from app.domain.faces import Pixels
from app.domain.formats.heif import HeifStill
from app.domain.formats.jpeg2000 import Jpeg2000Still
from app.domain.formats.parts import Damaged, TooCostly
from app.engine.decoder_frames import ANSWER, AVIF, HEIC, JPEG2000, READY, READY_WITHOUT_FILTER, REQUEST, TICKET
from app.errors import DependencyUnavailable

log = structlog.get_logger(__name__)

#: Processor time for any picture, and for each megapixel: five times what slow machines need.
_SECONDS, _SECONDS_A_MEGAPIXEL = 2, 0.5
#: How much longer than its processor time a picture may take on a busy machine.
_PATIENCE: Final = 3
#: Memory for any picture, for each byte of its file, and for each decoded pixel.
_MIB, _BYTES_A_PIXEL = 64, 24
_MOST_MIB: Final = 300
_SHORTEST_LIFE_SECONDS: Final = 1.0
#: How long the process may take to start on a busy machine. The next pictures do not wait for that.
_START_SECONDS: Final = 30.0

_NAMES: Final = {HEIC: "heic", AVIF: "avif", JPEG2000: "jpeg2000"}

DECODED = Counter(
    "idem_isolated_pictures_total", "Pictures that were decoded outside the server, by outcome", ["kind", "outcome"]
)


class IsolatedDecoders:
    """The decoders of HEIC, AVIF and JPEG 2000. Their process starts with the first picture. Safe for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False
        self._is_warned = False

    @property
    def process_id(self) -> int | None:
        """The process that forks for each picture; None before the first one."""
        return None if self._process is None else self._process.pid

    def decode(self, still: HeifStill | Jpeg2000Still, reduction: int) -> Pixels:
        """The picture as RGB, as stored, `reduction` = 1, 2, 4 or 8 times smaller.

        Raises Damaged, TooCostly (it took too much memory or time), DependencyUnavailable.
        """
        if isinstance(still, HeifStill):
            kind, halvings, size = (HEIC if still.coding == "heic" else AVIF), 0, still.coded_size
        else:
            kind, halvings, size = JPEG2000, min(still.halvings, reduction.bit_length() - 1), still.size
        seconds = round(_SECONDS + _SECONDS_A_MEGAPIXEL * size[0] * size[1] / 1e6)
        bytes_ = 2 * len(still.data) + (_BYTES_A_PIXEL * size[0] * size[1] >> 2 * halvings)
        mib = min(_MOST_MIB, _MIB + bytes_ // 2**20)
        request = REQUEST.pack(kind, reduction, halvings, *size, len(still.data))
        try:
            pixels = self._ask(TICKET.pack(seconds, _PATIENCE * seconds, mib), request, still.data, size, reduction)
        except (Damaged, TooCostly) as error:
            DECODED.labels(_NAMES[kind], "damaged" if isinstance(error, Damaged) else "too_costly").inc()
            raise
        DECODED.labels(_NAMES[kind], "decoded").inc()
        if isinstance(still, HeifStill):
            left, top, right, bottom = (-(-edge // reduction) for edge in still.window)
            return pixels[top:bottom, left:right]
        return pixels

    def close(self) -> None:
        """End the process, and with it all pictures."""
        with self._lock:
            self._closed = True
            self._end()

    def _ask(self, ticket: bytes, request: bytes, data: bytes, size: tuple[int, int], reduction: int) -> Pixels:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._hand_over(ticket, theirs)
            ours.settimeout(_START_SECONDS)
            try:
                _receive(ours, memoryview(first := bytearray(len(READY))))
            except (OSError, EOFError):
                log.warning("decoder_not_started")
                raise _cannot_start() from None
            if first == READY_WITHOUT_FILTER and not self._is_warned:
                self._is_warned = True
                log.warning("decoder_calls_not_filtered")
            ours.settimeout(2 * TICKET.unpack(ticket)[1])
            try:
                ours.sendall(request)
                ours.sendall(data)
                head = bytearray(ANSWER.size)
                _receive(ours, memoryview(head))
                width, height = ANSWER.unpack(head)
                if (width, height) == (0, 0):
                    raise Damaged(size)
                # The process may have been taken over: nothing but pixels of the expected size is taken from it.
                if (width, height) != (-(-size[0] // reduction), -(-size[1] // reduction)):
                    raise Damaged(size)
                pixels = np.empty((height, width, 3), np.uint8)
                _receive(ours, pixels.data.cast("B"))
            except (OSError, EOFError):
                if self._has_ended():
                    raise _cannot_start() from None
                # The fork was ended at one of its limits, or crashed.
                raise TooCostly from None
        return pixels

    def _hand_over(self, ticket: bytes, connection: socket.socket) -> None:
        """Give the socket to the process, which is started again if it has ended."""
        with self._lock:
            for _ in range(2):
                if self._closed:
                    break
                control = self._control or self._start()
                try:
                    socket.send_fds(control, [ticket], [connection.fileno()])
                except OSError:
                    log.warning("decoder_process_ended")
                    self._end()
                else:
                    return
        raise _cannot_start()

    def _has_ended(self) -> bool:
        """Whether the process was killed, and its forks with it."""
        process = self._process
        return self._closed or process is None or process.poll() is not None

    def _start(self) -> socket.socket:
        # Messages stay whole, however many threads send them.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = Path(__file__).parents[2]
        # No setting and no secret of this process. One arena of memory, because a fork has one thread.
        kept = {
            name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV") if name in os.environ
        }
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-P", "-m", "app.engine.decoder_child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=kept | {"PYTHONPATH": str(root), "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
                cwd="/",
                start_new_session=True,
            )
        self._control = ours
        return ours

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            try:
                self._process.wait(_SHORTEST_LIFE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._control = self._process = None


def _cannot_start() -> DependencyUnavailable:
    return DependencyUnavailable("The decoder of this format cannot be started. Send the photo as a JPEG.")


def _receive(connection: socket.socket, into: memoryview) -> None:
    """Fill the memory. Raises EOFError where the other side ends before."""
    while into:
        got = connection.recv_into(into)
        if not got:
            raise EOFError
        into = into[got:]
