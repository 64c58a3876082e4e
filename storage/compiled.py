"""The compiled scan of one-bit codes: numba (the optional extra `fast`) turns these loops into machine code.

Three sieves, each finer and dearer than the one before: how many signs differ from the query's; the sum of the query's
numbers under the signs; the cosine. `storage.onebit` imports this only where numba is there, says how wide the sieves
are, and scores what they leave.

A row of codes, as FAISS writes it (`storage.onebit` compares some with FAISS's own when it opens a file): the signs, one
bit a dimension from the lowest bit of the first byte on, set where a number is positive; then two float32, of which the
second, times the sum of a query's numbers with these signs, over sqrt(d), is the estimate of the cosine.
"""

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, TypeVar, cast

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from storage.vectors import Halves, Ids

#: float32 (d,).
Query = npt.NDArray[np.float32]
Number = np.float32
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]
#: float16 vectors (n, d), seen as their bits.
HalfBits = npt.NDArray[np.uint16]
Distances = npt.NDArray[np.uint16]
Flags = npt.NDArray[np.bool_]

#: The query's numbers, in bits, for the second sieve: adds 1% to the estimate's noise.
_WEIGHT_BITS: Final = 4
_WEIGHT_PLACES: Final = np.arange(_WEIGHT_BITS, dtype=np.uint8)[:, np.newaxis]
#: Rows that go through one sieve before the next: their numbers stay in the first-level cache.
_CHUNK: Final = 2_048
#: Candidates that there is room for at first.
_ROOM: Final = 16_384
_WORD_BITS: Final = 64
#: The two float32 behind a row's signs.
_FACTOR_BYTES: Final = 8
#: More differing signs than any code has.
_OUT_OF_REACH: Final = 65_535

F = TypeVar("F", bound=Callable[..., Any])


def is_usable() -> bool:
    """Whether this processor converts float16 itself: otherwise the machine code would lack a function."""
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return platform.machine().lower() in {"aarch64", "arm64"}
    return bool(llvmlite.binding.get_host_cpu_features().get("f16c", False))


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled loops for one dimension."""

    sift: Callable[..., tuple[int, int]]
    measure: Callable[..., None]
    compare: Callable[..., None]


class Scanner:
    """The scan over one list of codes, which must stay where they are while it is used. Several threads may."""

    def __init__(self, codes: Bytes, dimension: int) -> None:
        """codes: (n, bytes), in C order."""
        self._codes = codes.reshape(-1)
        self._count = len(codes)
        self._dimension = dimension
        self._kernels = _kernels(dimension)

    def reaching(self, vectors: Halves, is_gone: Flags, query: Query, radius: int, floor: float, least: float) -> Ids:
        """Rows, rising, of the vectors (n, d) whose float32 cosine with the query is at least `least`, in any order of summing.

        radius: signs that may differ. floor: what the estimate must reach. is_gone: (n,), rows that are passed over.
        """
        signs, planes, step = self._sieves(query)
        # factor * (total - 2 step weight) / sqrt(d) >= floor, where weight sums what differs
        total = float(np.abs(query).sum())
        scale = math.sqrt(self._dimension)
        found = []
        row, room = 0, _ROOM
        while row < self._count:
            out = np.empty(room, np.int64)
            filled, row = self._kernels.sift(
                self._codes, signs, planes, radius, np.float32(total / scale), np.float32(2 * step / scale),
                np.float32(floor), vectors.view(np.uint16), is_gone, query, np.float32(least), row, out,
            )  # fmt: skip
            found.append(out[:filled])
            room *= 4
        return np.concatenate(found)

    def nearest(self, is_gone: Flags, query: Query, count: int) -> Ids:
        """`count` rows or more whose signs differ least from the query's, or all when there are fewer."""
        signs, _, _ = self._sieves(query)
        distances = np.empty(self._count, np.uint16)
        self._kernels.measure(self._codes, signs, is_gone, distances)
        heights = np.cumsum(np.bincount(distances, minlength=self._dimension + 1)[: self._dimension + 1])
        radius = min(int(np.searchsorted(heights, count)), self._dimension)
        return np.flatnonzero(distances <= radius)

    def all_reaching(self, vectors: Halves, is_gone: Flags, query: Query, least: float) -> Ids:
        """What `reaching` gives, without the sieves: every vector is read."""
        reaches = np.empty(self._count, np.bool_)
        self._kernels.compare(vectors.view(np.uint16), is_gone, query, np.float32(least), reaches)
        return np.flatnonzero(reaches)

    def _sieves(self, query: Query) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], float]:
        """The query's signs (words,), its numbers' sizes in whole steps, bit by bit (bits, words), and the step."""
        sizes = np.abs(query)
        step = max(float(sizes.max()), 1e-9) / (2**_WEIGHT_BITS - 1)
        bits = np.zeros((1 + _WEIGHT_BITS, -(-self._dimension // _WORD_BITS) * _WORD_BITS), np.uint8)
        bits[0, : self._dimension] = query > 0
        bits[1:, : self._dimension] = (np.rint(sizes / step).astype(np.uint8) >> _WEIGHT_PLACES) & 1
        words = np.packbits(bits, axis=1, bitorder="little").view("<u8")
        return words[0], words[1:], step


def _word_at_code(_typing: object, codes: Any, offset: Any) -> tuple[Any, Any]:  # noqa: ANN401 - numba's
    """Eight bytes from anywhere, as a number: FAISS aligns its rows to nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ANN401 - numba's
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(array.data, [arguments[1]])
        word = builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()))
        word.align = 1
        return word

    return types.uint64(codes, offset), generate


def _float_at_code(_typing: object, codes: Any, offset: Any) -> tuple[Any, Any]:  # noqa: ANN401 - numba's
    """Four bytes from anywhere, as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ANN401 - numba's
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(array.data, [arguments[1]])
        number = builder.load(builder.bitcast(place, ir.FloatType().as_pointer()))
        number.align = 1
        return number

    return types.float32(codes, offset), generate


def _ones_code(_typing: object, word: Any) -> tuple[Any, Any]:  # noqa: ANN401 - numba's
    """How many bits of the word are set."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:  # noqa: ANN401 - numba's
        return builder.ctpop(arguments[0])

    return types.uint64(word), generate


def _from_half_code(_typing: object, bits: Any) -> tuple[Any, Any]:  # noqa: ANN401 - numba's
    """The float32 of a float16's bits: the processor's own conversion."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:  # noqa: ANN401 - numba's
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), generate


_word_at: Any = intrinsic(_word_at_code)
_float_at: Any = intrinsic(_float_at_code)
_ones: Any = intrinsic(_ones_code)
_from_half: Any = intrinsic(_from_half_code)

_PAIR = cast("Any", types).UniTuple(types.int64, 2)
_BYTES = types.Array(types.uint8, 1, "C", readonly=True)
_WORDS = types.Array(types.uint64, 1, "C", readonly=True)
_PLANES = types.Array(types.uint64, 2, "C", readonly=True)
_HALVES = types.Array(types.uint16, 2, "C", readonly=True)
_FLAGS = types.Array(types.boolean, 1, "C", readonly=True)
_QUERY = types.Array(types.float32, 1, "C", readonly=True)


@cache
def _kernels(dimension: int) -> Kernels:  # noqa: C901 - four plain loops, side by side
    """The loops for vectors of this dimension: as it is known here, those over a row's words are unrolled."""
    words = -(-dimension // _WORD_BITS)
    last_word = words - 1
    odd = dimension % _WORD_BITS
    every = np.uint64(2**_WORD_BITS - 1)
    last_mask = np.uint64(2**odd - 1) if odd else every
    row_bytes = -(-dimension // 8) + _FACTOR_BYTES
    factor_at = row_bytes - 4

    def sift(  # noqa: PLR0913 - a kernel takes plain values
        codes: Bytes, signs: Words, planes: Words, radius: int, total: Number, twice_step: Number, floor: Number,
        vectors: HalfBits, is_gone: Flags, query: Query, least: Number, first: int, out: Ids,
    ) -> tuple[int, int]:  # fmt: skip
        """Fill `out` with rows from `first` on that pass all sieves; returns how many, and where to go on."""
        near = np.empty(_CHUNK, np.int64)
        filled = 0
        row = first
        while row < len(is_gone) and filled + _CHUNK <= len(out):
            end = min(row + _CHUNK, len(is_gone))
            count = 0
            for one in range(row, end):
                start = one * row_bytes
                differing = np.uint64(0)
                for word in range(words):
                    mask = last_mask if word == last_word else every
                    differing += _ones((_word_at(codes, start + 8 * word) ^ signs[word]) & mask)
                near[count] = one  # written whether it passes or not: a branch would be guessed wrong
                count += 1 if differing <= radius else 0
            kept = 0
            for place in range(count):
                one = near[place]
                start = one * row_bytes
                weight = np.uint64(0)
                for word in range(words):
                    differs = _word_at(codes, start + 8 * word) ^ signs[word]
                    for bit in range(_WEIGHT_BITS):
                        weight += _ones(differs & planes[bit, word]) << np.uint64(bit)
                estimate = _float_at(codes, start + factor_at) * (total - twice_step * np.float32(weight))
                near[kept] = one
                kept += 1 if estimate >= floor else 0
            for place in range(kept):
                one = near[place]
                cosine = np.float32(0)
                for number in range(dimension):
                    cosine += _from_half(vectors[one, number]) * query[number]
                if cosine >= least and not is_gone[one]:
                    out[filled] = one
                    filled += 1
            row = end
        return filled, row

    def measure(codes: Bytes, signs: Words, is_gone: Flags, distances: Distances) -> None:
        """How many signs differ, row by row; out of reach for what is gone."""
        for row in range(len(distances)):
            differing = np.uint64(0)
            for word in range(words):
                mask = last_mask if word == last_word else every
                differing += _ones((_word_at(codes, row * row_bytes + 8 * word) ^ signs[word]) & mask)
            distances[row] = _OUT_OF_REACH if is_gone[row] else differing

    def compare(vectors: HalfBits, is_gone: Flags, query: Query, least: Number, reaches: Flags) -> None:
        for row in range(len(reaches)):
            cosine = np.float32(0)
            for number in range(dimension):
                cosine += _from_half(vectors[row, number]) * query[number]
            reaches[row] = cosine >= least and not is_gone[row]

    return Kernels(
        sift=_compiled(
            _PAIR(
                _BYTES, _WORDS, _PLANES, types.int64, types.float32, types.float32, types.float32,
                _HALVES, _FLAGS, _QUERY, types.float32, types.int64, types.Array(types.int64, 1, "C"),
            ),
            sift,
        ),
        measure=_compiled(types.void(_BYTES, _WORDS, _FLAGS, types.Array(types.uint16, 1, "C")), measure),
        compare=_compiled(
            types.void(_HALVES, _FLAGS, _QUERY, types.float32, types.Array(types.boolean, 1, "C")), compare
        ),
    )  # fmt: skip


def _compiled(signature: object, function: F) -> F:
    """Compile now: no query should wait. The result is kept on disk where the package's folder is writable."""
    options: dict[str, Any] = {
        "nogil": True, "error_model": "numpy", "boundscheck": False,
        "fastmath": {"reassoc", "contract", "nsz"},  # sums in any order
    }  # fmt: skip
    try:
        return cast("F", numba.njit([signature], cache=True, **options)(function))
    except RuntimeError:  # nowhere to keep it
        return cast("F", numba.njit([signature], **options)(function))
