"""The compiled join: sign bits against sign bits first, 16-bit whole numbers for what is left.

numba (the optional extra `fast`) turns this into machine code; `storage.join` imports it only where numba is there. It
gives candidates: no score leaves from here.

A pair at the threshold has a known share of sign bits that differ, acos(cosine) / pi, because the vectors are turned by
a random rotation. How far a pair of that cosine strays from it is known too (see `storage.onebit.sign_noise`), and
MISS_DEVIATIONS of it are allowed. The bits are kept four rows abreast, word by word, so that one vector instruction
counts in all four; the counting is written in LLVM's own vectors, which every processor has an answer to.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from storage.onebit import differing_signs, sign_noise

#: float16 vectors, seen as their bits.
HalfBits = npt.NDArray[np.uint16]
Rows = npt.NDArray[np.int32]

#: One tail of a normal distribution beyond 5.2 deviations holds 1e-7; the tails here are up to some times as heavy (simulated
#: for 64 to 512 dimensions), and the two random stages together stay under 1e-6.
MISS_DEVIATIONS: Final = 5.2
#: Rows whose bits are counted by one instruction.
ABREAST: Final = 4
#: Groups of four right rows against which all left rows go before the next ones: their bits (64 bytes a row for 512
#: dimensions) stay in the first-level cache, their whole numbers in the second.
BLOCK_GROUPS: Final = 64
WORD_BITS: Final = 64
#: Byte counters hold 255: 31 words of 8 bits each. A wider vector is not what face models give.
MOST_WORDS: Final = 31
#: One in the 16-bit numbers: below 2**15 with room for a length of 1.001, and its square is the largest possible sum.
ONE: Final = 30_000
#: 16-bit numbers that one step sums; each part of a row has whole steps.
NUMBERS_ABREAST: Final = 32
#: A sum is looked at after each: most pairs that have passed the bits by chance are given up half-way.
PARTS: Final = 2

F = TypeVar("F", bound=Callable[..., Any])


def _compiled(function: F) -> F:
    # Sums may be taken in any order: the lengths need no more, and whole numbers do not mind.
    return cast("F", numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})(function))


class Codes:
    """What the compiled join reads of one block of vectors.

    signs: uint64 (groups, words, 4), the sign bits, four rows abreast, zeros after the last row. numbers: int16 (n, width),
    the vectors times ONE, cut to whole numbers, and zeros.
    """

    __slots__ = ("count", "dimension", "numbers", "signs")

    def __init__(self, halves: HalfBits, tolerance: float) -> None:
        """halves: (n, d). Raises ValueError for a row that is not finite or whose length is not 1 within tolerance."""
        self.count, self.dimension = halves.shape
        words = -(-self.dimension // WORD_BITS)
        self.signs = np.zeros((-(-self.count // ABREAST), words, ABREAST), np.uint64)
        self.numbers = np.zeros((self.count, _width(self.dimension)), np.int16)
        squares = np.empty(self.count, np.float32)
        _encode(halves, self.signs, self.numbers, squares)
        if not np.all(np.abs(np.sqrt(squares) - 1) <= tolerance):  # a NaN fails the comparison too
            message = "vectors are finite and of unit length"
            raise ValueError(message)


def can_join(dimension: int) -> bool:
    """Whether sign bits say enough about vectors of so many dimensions, and the counters hold them."""
    return WORD_BITS <= dimension <= MOST_WORDS * WORD_BITS


class Sieve:
    """Which pairs of a threshold pass which stage.

    radius: sign bits that may differ. floors: int64 (PARTS,), what the sums of the first part, the first two, … must
    reach in the 16-bit numbers. The last is a bound; the others are likelihoods, as the radius is.
    """

    __slots__ = ("floors", "radius")

    def __init__(self, threshold: float, dimension: int) -> None:
        spread = MISS_DEVIATIONS * sign_noise(threshold, dimension)
        self.radius = min(dimension, math.ceil(differing_signs(threshold, dimension) + spread))
        cosine = min(1.0, max(-1.0, threshold))
        ends = np.arange(1, PARTS + 1) * (_width(dimension) // PARTS)
        share = np.minimum(ends, dimension) / dimension
        # Of products that are exchangeable and whose sum is the cosine, the first ones are a draw without return.
        noise = np.sqrt(share * (1 - share) * (1 + cosine * cosine) / dimension)
        # |x.y - x'.y'| <= |x - x'| |y| + |x'| |y - y'|, where cutting moves every element by less than 1 / ONE.
        cut = 2.01 * math.sqrt(dimension) / ONE
        floors = threshold * share - MISS_DEVIATIONS * noise - cut
        self.floors = np.floor(floors * ONE * ONE).astype(np.int64)


def candidates(left: Codes, right: Codes, sieve: Sieve, first: int, last: int, *, same: bool) -> tuple[Rows, Rows, int]:
    """The pairs of left rows first..last-1 with right rows that may reach the threshold, and how many passed the bits.

    same: only right rows above the left row. Without the interpreter's lock, in one thread.
    """
    sift = _sieve_of(right.signs.shape[1])
    nothing = np.empty(0, np.int32)
    found_left, found_right, passed = [], [], 0
    block = 0
    row = first
    room = max(1 << 14, 2 * ABREAST * BLOCK_GROUPS)
    while block < len(right.signs):
        out = np.empty((2, room), np.int32)
        count, sifted, block, row = sift(
            left.signs, right.signs, left.numbers, right.numbers, sieve.radius, sieve.floors, first, last, same, block, row, out,
        )  # fmt: skip
        found_left.append(out[0, :count])
        found_right.append(out[1, :count])
        passed += sifted
    return np.concatenate([nothing, *found_left]), np.concatenate([nothing, *found_right]), passed


def _width(dimension: int) -> int:
    """How many numbers a row has, with the zeros at its end."""
    step = PARTS * NUMBERS_ABREAST
    return -(-dimension // step) * step


def _llvm(builder: Any, name: str, result: ir.Type, argument: ir.Type) -> Any:  # noqa: ANN401 - LLVM's
    """A function of LLVM's own."""
    kind = ir.FunctionType(result, [argument])
    return cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]


def _from_half_code(_typing: object, _bits: object) -> tuple[object, object]:
    """The float32 of a float16's bits; infinities and what is no number become large numbers.

    The exponent's bias differs by 112. Not every processor has an instruction for it, and this is as fast.
    """

    def generate(_context: object, builder: Any, _signature: object, arguments: list[Any]) -> Any:  # noqa: ANN401 - LLVM's
        word, single = ir.IntType(32), ir.FloatType()
        bits = builder.zext(arguments[0], word)
        size = builder.shl(builder.and_(bits, ir.Constant(word, 0x7FFF)), ir.Constant(word, 13))
        sign = builder.shl(builder.and_(bits, ir.Constant(word, 0x8000)), ir.Constant(word, 16))
        value = builder.fmul(builder.bitcast(size, single), ir.Constant(single, 2.0**112))
        return builder.bitcast(builder.or_(builder.bitcast(value, word), sign), single)

    return types.float32(types.uint16), generate


def _signs_code(_typing: object, _halves: object) -> tuple[object, object]:
    """The sign bits of 64 float16 from this address on."""

    def generate(_context: object, builder: Any, _signature: object, arguments: list[Any]) -> Any:  # noqa: ANN401 - LLVM's
        halves = ir.VectorType(ir.IntType(16), WORD_BITS)
        read = builder.load(builder.inttoptr(arguments[0], halves.as_pointer()), align=2)
        negative = builder.icmp_signed("<", read, ir.Constant(halves, [0] * WORD_BITS))
        return builder.bitcast(negative, ir.IntType(WORD_BITS))

    return types.uint64(types.int64), generate


def _lowest_bit_code(_typing: object, _bits: object) -> tuple[object, object]:
    """The place of the lowest bit that is set; there is one."""

    def generate(_context: object, builder: Any, _signature: object, arguments: list[Any]) -> Any:  # noqa: ANN401 - LLVM's
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


def _near_mask_code(
    _typing: object,
    _row: object,
    _group: object,
    _radius: object,
    words: Any,  # noqa: ANN401 - numba's
) -> tuple[object, object] | None:
    """Which of a group's four rows differ from a row in at most radius bits: a mask of four bits.

    row: address of its first word, the next ones lie ABREAST words on. group: address of (words, 4). words: a constant.
    """
    if not isinstance(words, types.IntegerLiteral):
        return None
    count = words.literal_value

    def generate(_context: object, builder: Any, _signature: object, arguments: list[Any]) -> Any:  # noqa: ANN401 - LLVM's
        word, index = ir.IntType(64), ir.IntType(32)
        four, octets = ir.VectorType(word, ABREAST), ir.VectorType(ir.IntType(8), 8 * ABREAST)
        ctpop = _llvm(builder, "llvm.ctpop.v32i8", octets, octets)

        def spread(value: Any) -> Any:  # noqa: ANN401 - LLVM's
            lone = builder.insert_element(ir.Constant(four, ir.Undefined), value, ir.Constant(index, 0))
            return builder.shuffle_vector(lone, lone, ir.Constant(ir.VectorType(index, ABREAST), [0] * ABREAST))

        def constant(value: int) -> ir.Constant:
            return ir.Constant(four, [value] * ABREAST)

        row = builder.inttoptr(arguments[0], word.as_pointer())
        group = builder.inttoptr(arguments[1], four.as_pointer())
        counts = ir.Constant(octets, [0] * (8 * ABREAST))
        for place in range(count):
            own = spread(builder.load(builder.gep(row, [ir.Constant(index, ABREAST * place)])))
            others = builder.load(builder.gep(group, [ir.Constant(index, place)]), align=8)
            counts = builder.add(counts, builder.call(ctpop, [builder.bitcast(builder.xor(own, others), octets)]))
        # The eight byte counters of each row are summed: to four of 16 bits, then halves onto halves.
        sums, even = builder.bitcast(counts, four), constant(0x00FF00FF00FF00FF)
        sums = builder.add(builder.and_(sums, even), builder.and_(builder.lshr(sums, constant(8)), even))
        sums = builder.add(sums, builder.lshr(sums, constant(32)))
        sums = builder.and_(builder.add(sums, builder.lshr(sums, constant(16))), constant(0xFFFF))
        near = builder.icmp_signed("<=", sums, spread(arguments[2]))
        return builder.zext(builder.bitcast(near, ir.IntType(ABREAST)), word)

    return types.int64(types.int64, types.int64, types.int64, words), generate


def _sum_code(_typing: object, _one: object, _other: object, _count: object) -> tuple[object, object]:
    """The sum of products of int16 from two addresses on, in 32 bits; count: a multiple of NUMBERS_ABREAST.

    numba alone would sum in 64 bits; this shape LLVM knows as the instruction that multiplies and adds pairs.
    """

    def generate(_context: object, builder: Any, _signature: object, arguments: list[Any]) -> Any:  # noqa: ANN401 - LLVM's
        one_address, other_address, count = arguments
        size, word, lanes = ir.IntType(64), ir.IntType(32), NUMBERS_ABREAST // 2
        read, wide = ir.VectorType(ir.IntType(16), lanes), ir.VectorType(word, lanes)
        one, other = (builder.inttoptr(address, read.as_pointer()) for address in (one_address, other_address))
        zeros = ir.Constant(wide, [0] * lanes)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(2)]  # type: ignore[no-untyped-call]
        steps = builder.udiv(count, ir.Constant(size, NUMBERS_ABREAST))
        with cgutils.for_range(builder, steps, intp=size) as loop:
            for place, total in enumerate(sums):
                at = builder.add(builder.mul(loop.index, ir.Constant(size, 2)), ir.Constant(size, place))
                factors = [
                    builder.sext(builder.load(builder.gep(pointer, [at]), align=2), wide) for pointer in (one, other)
                ]
                builder.store(builder.add(builder.load(total), builder.mul(*factors)), total)
        whole = builder.add(*(builder.load(total) for total in sums))
        added_up = _llvm(builder, f"llvm.vector.reduce.add.v{lanes}i32", word, wide)
        return builder.sext(builder.call(added_up, [whole]), size)

    return types.int64(types.int64, types.int64, types.int64), generate


_from_half: Any = intrinsic(_from_half_code)
_signs: Any = intrinsic(_signs_code)
_lowest_bit: Any = intrinsic(_lowest_bit_code)
_near_mask: Any = intrinsic(prefer_literal=True)(_near_mask_code)
_sum: Any = intrinsic(_sum_code)


@_compiled
def _encode(
    halves: HalfBits, signs: npt.NDArray[np.uint64], numbers: npt.NDArray[np.int16], squares: npt.NDArray[np.float32]
) -> None:
    count, dimension = halves.shape
    whole_words = dimension // WORD_BITS
    for row in range(count):
        total = np.float32(0)
        for place in range(dimension):
            value = _from_half(halves[row, place])
            total += value * value
            # A value that is no number, or far over 1, is refused by its square: what it turns into is not used.
            numbers[row, place] = np.int16(np.int32(value * np.float32(ONE)))
        squares[row] = total
        address = halves.ctypes.data + 2 * row * dimension
        for word in range(whole_words):
            signs[row // ABREAST, word, row % ABREAST] = _signs(address + 2 * WORD_BITS * word)
        bits = np.uint64(0)
        for place in range(whole_words * WORD_BITS, dimension):
            bits |= np.uint64(halves[row, place] >> 15) << np.uint64(place - whole_words * WORD_BITS)
        if whole_words < signs.shape[1]:
            signs[row // ABREAST, whole_words, row % ABREAST] = bits


@cache
def _near_of(words: int) -> Callable[..., int]:
    """The loop over groups for rows of so many words: the machine code knows the number, and needs no loop over them."""

    @_compiled
    def near_rows(row: int, groups: int, first: int, last: int, radius: int, near: Rows) -> int:
        count = 0
        for group in range(first, last):
            mask = _near_mask(row, groups + group * (8 * ABREAST * words), radius, words)
            while mask:
                near[count] = ABREAST * group + _lowest_bit(mask)
                count += 1
                mask &= mask - 1
        return count

    return near_rows


@cache
def _sieve_of(words: int) -> Callable[..., tuple[int, int, int, int]]:
    """The loop over pairs for rows of so many words."""
    near_rows = _near_of(words)

    @_compiled
    def sift(  # noqa: PLR0913 - a compiled loop takes its state as numbers and arrays
        left_signs: npt.NDArray[np.uint64],
        right_signs: npt.NDArray[np.uint64],
        left: npt.NDArray[np.int16],
        right: npt.NDArray[np.int16],
        radius: int,
        floors: npt.NDArray[np.int64],
        first: int,
        last: int,
        same: bool,  # noqa: FBT001 - as above
        block: int,
        row: int,
        out: Rows,
    ) -> tuple[int, int, int, int]:
        """Goes on at left `row` of the block of groups that starts at `block`, until all is done or `out` is nearly full.

        Returns how many pairs lie in `out`, how many passed the bits, and where to go on (block: the end when all is done).
        """
        left_address, right_address = left_signs.ctypes.data, right_signs.ctypes.data
        width = left.shape[1]
        part_bytes = 2 * width // len(floors)
        near = np.empty(ABREAST * BLOCK_GROUPS, np.int32)
        found = passed = 0
        while block < right_signs.shape[0]:
            end = min(block + BLOCK_GROUPS, right_signs.shape[0])
            while row < last:
                if found + ABREAST * BLOCK_GROUPS > out.shape[1]:
                    return found, passed, block, row
                begin = min(end, max(block, (row + 1) // ABREAST)) if same else block
                own_signs = left_address + 8 * (row // ABREAST * ABREAST * words + row % ABREAST)
                count = near_rows(own_signs, right_address, begin, end, radius, near)
                passed += count
                own = left.ctypes.data + 2 * width * row
                for place in range(count):
                    other = near[place]
                    if other >= right.shape[0] or (same and other <= row):
                        continue  # the zeros after the last row, and what lies in the same group as the row itself
                    theirs = right.ctypes.data + 2 * width * other
                    total, part = 0, 0
                    while part < len(floors):
                        total += _sum(own + part * part_bytes, theirs + part * part_bytes, part_bytes // 2)
                        if total < floors[part]:
                            break
                        part += 1
                    if part == len(floors):
                        out[0, found] = row
                        out[1, found] = other
                        found += 1
                row += 1
            row = first
            block = end
        return found, passed, block, row

    return sift
