"""What an ONNX file takes and gives, read from its header without loading the network.

A reader of protobuf's wire format for the few fields that tell a detector from a recogniser (onnx.proto3: ModelProto,
GraphProto, NodeProto, ValueInfoProto). Weights are skipped by their length, so 260 MB cost as little as 2 MB, and neither
`onnx` nor `onnxruntime` is imported for a look.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Field numbers of onnx.proto3.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALISER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_NAME = 3
_TENSOR_NAME = 8
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIMENSION, _DIMENSION_VALUE = 1, 2, 1, 1

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
#: InsightFace looks for the normalisation among the first eight nodes.
_FIRST_NODES = 8


class NotOnnx(ValueError):
    """The bytes are not an ONNX model that can be read."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output: its name and its dimensions, 0 where the graph leaves one open."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """The outside of a network, and the names of its first nodes."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    first_nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Field:
    number: int
    kind: int
    start: int
    end: int
    value: int


def read_graph(file: Path) -> Graph:
    """Inputs, outputs and first node names of an ONNX file. Raises NotOnnx, or OSError when it cannot be read."""
    with file.open("rb") as handle:
        if file.stat().st_size == 0:
            message = f"{file.name} is empty"
            raise NotOnnx(message)
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _graph(data)
            except (IndexError, UnicodeDecodeError) as error:
                message = f"{file.name} is not an ONNX model, or it is cut"
                raise NotOnnx(message) from error


def _graph(data: mmap.mmap) -> Graph:
    graph = next((f for f in _fields(data, 0, len(data)) if f.number == _MODEL_GRAPH and f.kind == _BYTES), None)
    if graph is None:
        raise IndexError
    weights: set[str] = set()
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    nodes: list[str] = []
    for field in _fields(data, graph.start, graph.end):
        if field.number == _GRAPH_NODE and len(nodes) < _FIRST_NODES:
            nodes.append(_text(data, field, _NODE_NAME))
        elif field.number == _GRAPH_INITIALISER:
            weights.add(_text(data, field, _TENSOR_NAME))
        elif field.number == _GRAPH_INPUT:
            inputs.append(_tensor(data, field))
        elif field.number == _GRAPH_OUTPUT:
            outputs.append(_tensor(data, field))
    # Older exports list their weights among the inputs.
    return Graph(tuple(i for i in inputs if i.name not in weights), tuple(outputs), tuple(nodes))


def _tensor(data: mmap.mmap, value: _Field) -> Tensor:
    shape: list[int] = []
    for kind in _inside(data, value, _VALUE_TYPE):
        for tensor in _inside(data, kind, _TYPE_TENSOR):
            for dimensions in _inside(data, tensor, _TENSOR_SHAPE):
                for dimension in _inside(data, dimensions, _SHAPE_DIMENSION):
                    sizes = (
                        f.value for f in _fields(data, dimension.start, dimension.end) if f.number == _DIMENSION_VALUE
                    )
                    shape.append(next(sizes, 0))
    return Tensor(_text(data, value, _VALUE_NAME), tuple(shape))


def _inside(data: mmap.mmap, parent: _Field, number: int) -> Iterator[_Field]:
    return (f for f in _fields(data, parent.start, parent.end) if f.number == number and f.kind == _BYTES)


def _text(data: mmap.mmap, parent: _Field, number: int) -> str:
    field = next(_inside(data, parent, number), None)
    return "" if field is None else data[field.start : field.end].decode("utf-8")


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    """The fields of one message; raises IndexError where the bytes do not follow the format."""
    position = start
    while position < end:
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, after = _varint(data, position)
            yield _Field(number, kind, position, after, value)
        elif kind == _BYTES:
            length, position = _varint(data, position)
            after = position + length
            yield _Field(number, kind, position, after, 0)
        elif kind in (_FIXED32, _FIXED64):
            after = position + (4 if kind == _FIXED32 else 8)
        else:
            raise IndexError
        if number == 0 or after > end:
            raise IndexError
        position = after


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the continuation bit
            return value, position
        shift += 7
        if shift > 63:  # noqa: PLR2004 - a varint has at most ten bytes
            raise IndexError
