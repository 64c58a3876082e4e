"""The child process that runs dlib for its parent: `python -m app.engine.dlib_child PREDICTOR RECOGNISER`.

dlib holds the interpreter's lock while it works (140 ms a face), so threads would wait for each other. A plain
subprocess and not multiprocessing: that imports the parent's main module again, which here is a whole web server.

Frames on standard input: operation, height, width, four box numbers, then the RGB pixels. Answers on standard output:
a length and that much JSON. End of input is the end of the child, so none outlives its parent.
"""

import json
import os
import struct
import sys
from typing import BinaryIO

import dlib
import numpy as np
import numpy.typing as npt

#: operation, height, width, box left, top, right, bottom.
REQUEST = struct.Struct("<cIIdddd")
ANSWER = struct.Struct("<I")
DETECT, EMBED, PING = b"d", b"e", b"p"

_CHIP_SIDE, _CHIP_PADDING = 150, 0.25
#: The parent sends a face of at most twice the chip's scale (see `dlib_engine._EMBED_FACE_SIDE`).
_OVERSAMPLING = 2


class _Networks:
    def __init__(self, predictor: str, recogniser: str) -> None:
        self._detector = dlib.get_frontal_face_detector()
        self._predictor = dlib.shape_predictor(predictor)
        self._recogniser = dlib.face_recognition_model_v1(recogniser)

    def detect(self, pixels: npt.NDArray[np.uint8]) -> list[list[float]]:
        """Rows of left, top, right, bottom, score and five points; doubled in size once when nothing is found."""
        for doublings in (0, 1):
            boxes, scores, _ = self._detector.run(pixels, doublings, 0.0)
            if boxes:
                return [
                    [*_edges(box), float(score), *self._points(pixels, box)]
                    for box, score in zip(boxes, scores, strict=True)
                ]
        return []

    def embed(self, pixels: npt.NDArray[np.uint8], edges: tuple[float, float, float, float]) -> list[float]:
        """The 128 raw numbers of the face in the box."""
        box = dlib.rectangle(*(round(edge) for edge in edges))
        shape = self._predictor(pixels, box)
        fine = dlib.get_face_chip(pixels, shape, size=_CHIP_SIDE * _OVERSAMPLING, padding=_CHIP_PADDING)
        # dlib's own chip skips some pixels. The average of a finer chip uses all of them.
        squares = fine.reshape(_CHIP_SIDE, _OVERSAMPLING, _CHIP_SIDE, _OVERSAMPLING, 3)
        chip = np.rint(squares.mean(axis=(1, 3))).astype(np.uint8)
        return [float(value) for value in self._recogniser.compute_face_descriptor(chip)]

    def _points(self, pixels: npt.NDArray[np.uint8], box: "dlib.rectangle") -> list[float]:
        shape = self._predictor(pixels, box)
        return [float(value) for point in shape.parts() for value in (point.x, point.y)]


def _edges(box: "dlib.rectangle") -> tuple[float, float, float, float]:
    return float(box.left()), float(box.top()), float(box.right()), float(box.bottom())


def _read(stream: BinaryIO, count: int) -> bytes | None:
    data = stream.read(count)
    return data if len(data) == count else None


def serve(predictor: str, recogniser: str) -> None:
    """Answer requests until the parent closes the pipe."""
    # Whatever a library prints must not fall between the frames.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    networks = _Networks(predictor, recogniser)
    requests = sys.stdin.buffer
    while (head := _read(requests, REQUEST.size)) is not None:
        operation, height, width, *edges = REQUEST.unpack(head)
        data = _read(requests, height * width * 3)
        if data is None:
            return
        pixels = np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)
        answer: object = []
        if operation == DETECT:
            answer = networks.detect(pixels)
        elif operation == EMBED:
            answer = networks.embed(pixels, (edges[0], edges[1], edges[2], edges[3]))
        body = json.dumps(answer).encode()
        answers.write(ANSWER.pack(len(body)) + body)
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
