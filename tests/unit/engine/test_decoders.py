"""Decoders outside the server: what they return, what they may not do, and how they end."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np
import psutil
import pytest
from PIL import Image

from app.domain.formats import heif, jpeg2000
from app.domain.formats.heif import HeifStill
from app.domain.formats.jpeg2000 import Jpeg2000Still
from app.domain.formats.parts import Damaged, TooCostly
from app.engine import confinement, decoder_child, decoders
from app.engine.confinement import Allowance, confine
from app.engine.decoder_frames import READY, TICKET
from app.engine.decoders import IsolatedDecoders
from app.errors import DependencyUnavailable
from tests.support.logs import captured_logs
from tests.support.photos import ASTRONAUT, pixels_of
from tests.support.picture_files import heif_file, jpeg2000_file

PORTRAIT = pixels_of(ASTRONAUT)[:256, 100:340]
ENDS_WITHIN_SECONDS = 10.0


@pytest.fixture(scope="module")
def isolated() -> Iterator[IsolatedDecoders]:
    opened = IsolatedDecoders()
    yield opened
    opened.close()


@cache
def _stills() -> dict[str, HeifStill | Jpeg2000Still]:
    image = Image.fromarray(PORTRAIT)
    return {
        "heic": heif.still(heif_file(image, quality=95)),
        "heic of tiles": heif.still(heif_file(image, quality=95, tile_size=64)),
        "avif": heif.still(heif_file(image, "AVIF", quality=95)),
        "jpeg2000": jpeg2000.still(jpeg2000_file(image)),
    }


@pytest.mark.parametrize("kind", _stills())
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_g1_g2_the_picture_comes_as_it_is_or_reduced(isolated: IsolatedDecoders, kind: str, reduction: int) -> None:
    pixels = isolated.decode(_stills()[kind], reduction)
    expected = Image.fromarray(PORTRAIT).reduce(reduction) if reduction > 1 else Image.fromarray(PORTRAIT)
    assert pixels.shape == np.asarray(expected).shape
    # JPEG 2000 halves by its own filter, which keeps more grain.
    assert np.abs(pixels.astype(int) - np.asarray(expected)).mean() < (20 if kind == "jpeg2000" else 4)


def test_many_pictures_at_a_time_are_not_mixed_up(isolated: IsolatedDecoders) -> None:
    stills = [heif.still(heif_file(Image.new("RGB", (64, 64), (shade, shade, shade)))) for shade in range(0, 250, 25)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda still: isolated.decode(still, 1).mean(), stills * 3))
    assert np.allclose(found, [*range(0, 250, 25)] * 3, atol=3)


def test_a_picture_of_another_size_than_its_header_says_is_refused(isolated: IsolatedDecoders) -> None:
    for kind in ("heic", "avif"):
        whole = _stills()[kind]
        assert isinstance(whole, HeifStill)
        with pytest.raises(Damaged):
            isolated.decode(replace(whole, coded_size=(64, 64), window=(0, 0, 64, 64)), 1)


def test_a_picture_that_costs_too_much_is_given_up_and_others_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    isolated = IsolatedDecoders()
    large = heif.still(heif_file(Image.effect_noise((1600, 1600), 90).convert("RGB")))
    try:
        with monkeypatch.context() as patched:
            patched.setattr(decoders, "_MIB", 4)
            patched.setattr(decoders, "_BYTES_A_PIXEL", 0)
            with pytest.raises((TooCostly, Damaged)):
                isolated.decode(large, 1)
        assert isolated.decode(_stills()["heic"], 1).shape == PORTRAIT.shape
        (process_id,) = {isolated.process_id}
        assert process_id is not None
        deadline = time.monotonic() + ENDS_WITHIN_SECONDS
        while psutil.Process(process_id).children():
            assert time.monotonic() < deadline, "a fork, or a zombie, is left"
            time.sleep(0.05)
    finally:
        isolated.close()


def test_its_process_is_started_again_after_it_was_killed_and_ends_with_close() -> None:
    isolated = IsolatedDecoders()
    assert isolated.process_id is None, "nothing runs before the first picture"
    isolated.decode(_stills()["avif"], 1)
    first = isolated.process_id
    assert first is not None
    os.kill(first, signal.SIGKILL)
    psutil.Process(first).wait(ENDS_WITHIN_SECONDS)
    isolated.decode(_stills()["avif"], 1)
    second = isolated.process_id
    assert second is not None
    assert second != first
    isolated.close()
    assert not psutil.pid_exists(second)
    with pytest.raises(DependencyUnavailable):
        isolated.decode(_stills()["avif"], 1)


def test_a_picture_whose_decoders_were_killed_is_no_fault_of_its_sender() -> None:
    isolated = IsolatedDecoders()
    isolated.decode(_stills()["heic"], 1)
    first = isolated.process_id
    assert first is not None
    large = heif.still(heif_file(Image.effect_noise((1600, 1600), 90).convert("RGB")))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(isolated.decode, large, 1)
        while not psutil.Process(first).children() and not waiting.done():
            time.sleep(0.001)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(DependencyUnavailable):
            waiting.result(ENDS_WITHIN_SECONDS)
    assert isolated.decode(_stills()["heic"], 1).shape == PORTRAIT.shape
    isolated.close()


def test_its_process_ends_with_its_parent_however_that_ends() -> None:
    program = (
        "import os, signal\nfrom app.engine.decoders import IsolatedDecoders\nfrom app.domain.formats import heif\n"
        "import sys\nd = IsolatedDecoders()\nd.decode(heif.still(sys.stdin.buffer.read()), 1)\n"
        "print(d.process_id, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    data = heif_file(Image.fromarray(PORTRAIT))
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, timeout=60, check=False)
    process_id = int(done.stdout)
    deadline = time.monotonic() + ENDS_WITHIN_SECONDS
    while psutil.pid_exists(process_id):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_learns_no_secret_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_ENCRYPTION_KEY", "a secret of the server")
    isolated = IsolatedDecoders()
    isolated.decode(_stills()["avif"], 1)
    process = psutil.Process(isolated.process_id)
    assert "a secret of the server" not in str(process.environ())
    assert {one.fd for one in process.open_files()} == set(), "no file of the server is open there"
    isolated.close()


@pytest.mark.parametrize("executable", ["/bin/false", "/bin/true"])
def test_a_decoder_that_does_not_start_is_no_fault_of_the_photo(
    executable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolated = IsolatedDecoders()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(sys, "executable", executable)
            for _ in range(2):
                with pytest.raises(DependencyUnavailable):
                    isolated.decode(_stills()["heic"], 1)
        assert isolated.decode(_stills()["heic"], 1).shape == PORTRAIT.shape
    finally:
        isolated.close()


def _asked(control: socket.socket) -> bytes:
    """The first bytes from the fork of a new ticket."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            socket.send_fds(control, [TICKET.pack(2, 6, 64)], [theirs.fileno()])
        ours.settimeout(ENDS_WITHIN_SECONDS)
        return ours.recv(len(READY))


def _serving(prepare: Callable[[], None]) -> tuple[socket.socket, int]:
    """The control socket and the id of a process that serves, after `prepare`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()
        try:
            prepare()
            decoder_child.serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    return ours, child


def test_where_no_process_is_left_the_decoder_goes_on() -> None:
    def one_fork_fails() -> None:
        forks, fork = iter([BlockingIOError]), os.fork

        def failing() -> int:
            for error in forks:
                raise error
            return fork()

        os.fork = failing

    control, child = _serving(one_fork_fails)
    with control:
        assert _asked(control) == b"", "the server learns that nobody decodes its picture"
        assert _asked(control) == READY
    os.waitpid(child, 0)


def test_what_a_fork_writes_does_not_reach_the_log() -> None:
    reading, writing = os.pipe()

    def forging(*_: object) -> bytes:
        os.write(2, b"a forged line of the log")
        raise EOFError

    def log_is_a_pipe() -> None:
        # As `IsolatedDecoders` starts it: nothing is read from standard input, and standard error is the server's.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(writing, 2)
        decoder_child._read = forging

    control, child = _serving(log_is_a_pipe)
    with control:
        assert _asked(control) == READY
    os.waitpid(child, 0)
    os.close(writing)
    assert os.read(reading, 100) == b""
    os.close(reading)


def test_a_machine_without_filters_of_calls_is_logged_once() -> None:
    def no_filters() -> None:
        confinement.platform.machine = lambda: "sparc64"  # type: ignore[attr-defined]

    control, child = _serving(no_filters)
    isolated = IsolatedDecoders()
    isolated._control = control
    isolated._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with captured_logs() as lines:
            for _ in range(2):
                assert isolated.decode(_stills()["avif"], 1).shape == PORTRAIT.shape
        assert [line["event"] for line in lines] == ["decoder_calls_not_filtered"]
    finally:
        isolated.close()
        os.waitpid(child, 0)


def _open_a_file() -> None:
    os.open("/etc/hostname", os.O_RDONLY)


def _open_a_socket() -> None:
    socket.socket()


def _start_a_process() -> None:
    os._exit(0) if os.fork() == 0 else None


def _signal_a_process() -> None:
    os.kill(os.getppid(), 0)


def _take_memory() -> None:
    bytearray(256 * 2**20)


def _compute_for_ever() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("attempt", "ends"),
    [
        (_open_a_file, PermissionError.__name__),
        (_open_a_socket, PermissionError.__name__),
        (_start_a_process, PermissionError.__name__),
        (_signal_a_process, PermissionError.__name__),
        (_take_memory, MemoryError.__name__),
        (_compute_for_ever, signal.SIGKILL),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_confined_process_may_compute_and_nothing_else(attempt: Callable[[], None], ends: str | int) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            confine(Allowance(1, 64))
            attempt()
        except (OSError, MemoryError) as error:
            os.write(writing, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writing)
    said = os.read(reading, 100).decode()
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if isinstance(ends, str):
        assert said == ends
    else:
        assert os.WTERMSIG(status) in (ends, signal.SIGXCPU)
