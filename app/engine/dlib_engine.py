"""The engine that every machine has: dlib's detector and ResNet, with weights from PyPI, in child processes."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from app.domain.faces import Embedding, Face, ModelCard, Pixels
from app.engine.detectors import largest_first, shrunk, size_for_small_faces, surest, with_others
from app.engine.dlib_child import ANSWER, DETECT, EMBED, PING, REQUEST
from app.engine.liveness import LivenessModels, LivenessWeights
from app.engine.packs import Pack
from app.engine.port import Search
from app.engine.sessions import Device
from app.engine.vectors import unit_embedding
from app.errors import ModelUnavailable
from app.processors import processors

#: dlib's chip of 150 pixels with its padding is cut from a face of about 100; twice that keeps all it can use.
_EMBED_FACE_SIDE = 200
#: How much of the box's side is sent around it, for the chip's padding and a turned head.
_EMBED_MARGIN = 0.75

#: HOG sees faces in creases and badges too, with a score of 0.1 beside 0.7 for the real one; a real face beside others got a
#: third of the surest one's.
_GHOST_SHARE = 1 / 5

#: HOG finds faces of 80 pixels and more.
_HOG_PIXELS = 80

#: HOG gives 99% of upside-down faces at most 0.31, and 99% of upright ones at least 0.37.
_UPRIGHT_SCORE = 0.45

#: Nose tip and mouth from the nose base, by its parts along and square to the eye line; half the mouth's width in eye
#: distances. Fitted to SCRFD's landmarks on 1,074 photos, spread 0.05 eye distances along the eye line and 0.12 down.
_TIP_ALONG, _TIP_DOWN = 1.36, 0.75
_MOUTH_ALONG, _MOUTH_DOWN = 0.21, 1.42
_HALF_MOUTH = 0.44


class _ChildGone(Exception):
    """The child ended in the middle of a request."""


class _Child:
    """One dlib process; asked by one thread at a time."""

    def __init__(self, pack: Pack) -> None:
        # A session of its own: Ctrl-C on a terminal is the parent's affair, which then closes the pipe.
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module, paths from the pack
            [sys.executable, "-m", "app.engine.dlib_child", str(pack.detector.path), str(pack.recogniser.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def ask(self, operation: bytes, pixels: Pixels, edges: tuple[float, float, float, float] = (0, 0, 0, 0)) -> object:
        """One request and its answer. Raises _ChildGone when the process is not there any more."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise _ChildGone
        try:
            stdin.write(REQUEST.pack(operation, pixels.shape[0], pixels.shape[1], *edges))
            stdin.write(np.ascontiguousarray(pixels).data)
            stdin.flush()
            head = stdout.read(ANSWER.size)
            if len(head) < ANSWER.size:
                raise _ChildGone
            (length,) = ANSWER.unpack(head)
            body = stdout.read(length)
        except (OSError, ValueError) as error:
            raise _ChildGone from error
        if len(body) < length:
            raise _ChildGone
        return json.loads(body)

    def end(self) -> None:
        """End the process now: it holds nothing worth saving."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    # What was still unsent has no reader any more.
                    continue


class DlibEngine:
    """A FaceEngine over dlib. Children start when they are first needed, up to `processes` (0: as many as cores)."""

    def __init__(
        self, pack: Pack, liveness: tuple[LivenessWeights, ...], device: Device, *, processes: int = 0
    ) -> None:
        if pack.centring_mean is None:
            message = "dlib's templates need a centring mean"
            raise ModelUnavailable(message)
        self._pack = pack
        self._mean = np.array(pack.centring_mean, dtype=np.float32)
        self._liveness_files = liveness
        self._device: Device = device
        self._liveness: LivenessModels | None = None
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        self._children: set[_Child] = set()
        self._closed = False
        for _ in range(processes or processors()):
            self._idle.put(None)  # a place for a child that nobody has needed yet

    @property
    def card(self) -> ModelCard:
        """The model's card."""
        return self._pack.card

    @property
    def has_liveness(self) -> bool:
        """Whether both liveness models are there."""
        return bool(self._liveness_files)

    @property
    def device(self) -> str:
        """Dlib runs on the processor."""
        return "cpu"

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The children that live now."""
        with self._lock:
            return tuple(sorted(child.pid for child in self._children))

    def warm(self) -> None:
        """Check the weights, start one child, and run it once. Raises ModelUnavailable when a file is not what it was."""
        self._pack.detector.read()
        self._pack.recogniser.read()
        self._liveness_models()
        self._ask(PING, np.zeros((8, 8, 3), dtype=np.uint8))

    def detect(self, pixels: Pixels, *, search: Search = "usual") -> list[Face]:
        """All upright faces in these pixels, largest first. A quick search is a usual one."""
        usual = min(max(self._pack.detection_sizes), max(pixels.shape[:2]))
        found = self._at(pixels, usual)
        if search == "thorough" and found and (larger := size_for_small_faces(found[0], pixels, _HOG_PIXELS)) > usual:
            found = with_others(found, self._at(pixels, larger))
        return _without_ghosts(found)

    def is_upright(self, face: Face, length: float | None) -> bool:
        """Whether the score is high enough. The length of dlib's vectors says nothing."""
        del length
        return face.detection_score >= _UPRIGHT_SCORE

    def embed(self, pixels: Pixels, face: Face) -> tuple[Embedding, float]:
        """The face's embedding, centred and of unit length, and the raw vector's length."""
        crop, edges = _cut(pixels, face)
        raw = np.asarray(self._ask(EMBED, crop, edges), dtype=np.float32)
        return unit_embedding(raw, self._mean)

    def liveness(self, pixels: Pixels, face: Face) -> float | None:
        """The mean of the two models' probability of a live face; None without them."""
        models = self._liveness_models()
        return None if models is None else models.score(pixels, face)

    def close(self) -> None:
        """End every child; requests under way fail with ModelUnavailable."""
        with self._lock:
            self._closed = True
            children, self._children = self._children, set()
            self._liveness = None
        for child in children:
            child.end()

    def _at(self, pixels: Pixels, long_side: int) -> list[Face]:
        small, scale = shrunk(pixels, long_side)
        rows = np.asarray(self._ask(DETECT, small), dtype=np.float64).reshape(-1, 15)
        return largest_first(
            Face(
                box=tuple((row[:2] / scale).tolist() + ((row[2:4] - row[:2]) / scale).tolist()),
                landmarks=(_five_landmarks(row[5:].reshape(5, 2)) / scale).astype(np.float32),
                # HOG gives a margin from 0 on; squashed, it keeps its order.
                detection_score=float(-np.expm1(-max(0.0, row[4]))),
            )
            for row in rows
        )

    def _liveness_models(self) -> LivenessModels | None:
        if not self._liveness_files:
            return None
        with self._lock:
            if self._liveness is None:
                self._liveness = LivenessModels(self._liveness_files, self._device)
            return self._liveness

    def _ask(self, operation: bytes, pixels: Pixels, edges: tuple[float, float, float, float] = (0, 0, 0, 0)) -> object:
        for _ in range(2):  # a dead child is replaced, and asked once more
            with self._borrowed() as child:
                try:
                    return child.ask(operation, pixels, edges)
                except _ChildGone:
                    self._drop(child)
        message = "dlib's process ended twice on the same photo"
        raise ModelUnavailable(message)

    @contextmanager
    def _borrowed(self) -> Iterator[_Child]:
        child = self._idle.get()
        try:
            if child is None or child not in self._children:
                child = self._start()
            yield child
        finally:
            self._idle.put(child if child in self._children else None)

    def _start(self) -> _Child:
        with self._lock:
            if self._closed:
                message = "the face engine is closed"
                raise ModelUnavailable(message)
            child = _Child(self._pack)
            self._children.add(child)
            return child

    def _drop(self, child: _Child) -> None:
        with self._lock:
            self._children.discard(child)
        child.end()


def _without_ghosts(faces: list[Face]) -> list[Face]:
    return [face for face in faces if face.detection_score >= _GHOST_SHARE * surest(faces)]


def _five_landmarks(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Eyes, nose tip and mouth corners from dlib's five points: two corners of each eye, and the base of the nose.

    dlib's five-point model knows no mouth, and the one with 68 points costs 100 MB a process. What stands here serves
    boxes and quality (it shows yaw and roll, never pitch); the embedding is aligned by dlib's own five points.
    """
    left, right, base = points[2:4].mean(axis=0), points[0:2].mean(axis=0), points[4]
    middle, eyes = (left + right) / 2, right - left
    across = eyes / max(float(np.hypot(*eyes)), 1.0)
    square = np.array([-across[1], across[0]])
    along, down = float((base - middle) @ across), float((base - middle) @ square)
    tip = middle + _TIP_ALONG * along * across + _TIP_DOWN * down * square
    mouth = middle + _MOUTH_ALONG * along * across + _MOUTH_DOWN * down * square
    return np.stack([left, right, tip, mouth - _HALF_MOUTH * eyes, mouth + _HALF_MOUTH * eyes])


def _cut(pixels: Pixels, face: Face) -> tuple[Pixels, tuple[float, float, float, float]]:
    """The face with a margin, no larger than dlib can use; and its box there."""
    x, y, width, height = face.box
    margin = _EMBED_MARGIN * max(width, height)
    left, top = max(0, int(x - margin)), max(0, int(y - margin))
    right, bottom = int(np.ceil(x + width + margin)), int(np.ceil(y + height + margin))
    crop = pixels[top:bottom, left:right]
    if not crop.size:
        crop, left, top = pixels, 0, 0
    edges = (x - left, y - top, x + width - left, y + height - top)
    factor = min(1.0, _EMBED_FACE_SIDE / max(width, height, 1.0))
    small, scale = shrunk(crop, max(8, round(max(crop.shape[:2]) * factor)))
    return small, (edges[0] * scale, edges[1] * scale, edges[2] * scale, edges[3] * scale)
