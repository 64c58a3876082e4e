"""All pairs above a threshold between two blocks of vectors: what a scan of a whole gallery is made of.

Two ways to one answer: products of float32 matrices, and, where numba is installed (the extra `fast`), sign bits first.
Both only find candidates. A pair's score is summed in float64, where products of float16 numbers add up without any
rounding: all are multiples of 2**-48 and no sum of unit vectors' leaves 49 bits. So it is the same number in any order, and
a threshold cuts as it does in every index.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, NamedTuple

import numpy as np

from storage.vectors import LENGTH_TOLERANCE, Halves, Ids, Scores, Vectors, check_threshold

#: Left rows between two looks at how many pairs pass the bits.
_STRIPE: Final = 1_024
#: Above this share, measured, products of matrices are faster: a pair that passes costs 20 times one that does not.
_MOST_PASSING: Final = 0.25
#: Rows of a product: 16 MiB of float32, made and read while they are in the cache that the cores share.
_LEFT_ROWS, _RIGHT_ROWS = 1_024, 4_096
#: Pairs scored at once: bounds the memory.
_SCORED_AT_ONCE: Final = 4_096

Way = Literal["matrix", "compiled"]


@dataclass(frozen=True, slots=True)
class Joined:
    """Pairs of rows and their cosines, all (n,); by rising left row, then right row."""

    rows_left: Ids
    rows_right: Ids
    scores: Scores


class _Pairs(NamedTuple):
    left: Ids
    right: Ids


def pairs_above(left: Halves, right: Halves, threshold: float, *, same: bool = False, way: Way | None = None) -> Joined:
    """Every pair of a row of left (n, d) with one of right (m, d) whose float32 cosine is at least float32(threshold).

    The compiled way takes the vectors to be turned by a random rotation, as a gallery's are, and then misses less than
    one in a million of the pairs that lie at the very threshold; products of matrices miss none. It runs in the calling
    thread without the interpreter's lock: split the work to use more cores; products take as many as BLAS was given. A row of
    512 takes 2 KiB of memory meanwhile, a product 16 MiB.

    same: left and right are one block, and a pair is named once, its smaller row left. way: None takes the faster one.
    Raises ValueError for what an index could not hold, and for a way that is not to be had.
    """
    check_threshold(threshold)
    dimension = _dimension(left, right, same=same)
    if way is None:
        way = "compiled" if is_compiled(dimension) else "matrix"
    elif way == "compiled" and not is_compiled(dimension):
        message = f"there is no compiled join of {dimension} dimensions here"
        raise ValueError(message)
    # Candidates may lie under the threshold by what rounding its score to float32 can add.
    least = float(np.float32(threshold)) - 2.0**-24
    find = _by_bits if way == "compiled" else _by_products
    candidates = find(np.ascontiguousarray(left), np.ascontiguousarray(right), least, same=same)
    return _scored(left, right, candidates, threshold)


def is_compiled(dimension: int) -> bool:
    """Whether vectors of so many dimensions can be joined by their sign bits here."""
    if not _has_numba():
        return False
    from storage import compiled_join  # noqa: PLC0415 - there only with the extra `fast`, and a second to import

    return compiled_join.can_join(dimension)


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def _dimension(left: Halves, right: Halves, *, same: bool) -> int:
    for rows in (left, right):
        if rows.dtype != np.float16 or rows.ndim != 2:  # noqa: PLR2004 - rows and columns
            message = f"blocks are float16 (n, d), not {rows.dtype} {rows.shape}"
            raise ValueError(message)
    if left.shape[1] != right.shape[1] or not left.shape[1]:
        message = f"vectors of {left.shape[1]} and of {right.shape[1]} dimensions cannot be compared"
        raise ValueError(message)
    if same and len(left) != len(right):
        message = f"{len(left)} and {len(right)} vectors are not the same"
        raise ValueError(message)
    return int(left.shape[1])


def _by_bits(left: Halves, right: Halves, least: float, *, same: bool) -> _Pairs:
    from storage import compiled_join  # noqa: PLC0415 - see is_compiled

    own = compiled_join.Codes(left.view(np.uint16), LENGTH_TOLERANCE)
    others = own if same else compiled_join.Codes(right.view(np.uint16), LENGTH_TOLERANCE)
    sieve = compiled_join.Sieve(least, left.shape[1])
    found: list[_Pairs] = []
    for first in range(0, len(left), _STRIPE):
        last = min(first + _STRIPE, len(left))
        rows_left, rows_right, passed = compiled_join.candidates(own, others, sieve, first, last, same=same)
        found.append(_Pairs(rows_left.astype(np.int64), rows_right.astype(np.int64)))
        compared = (last - first) * (len(right) - (first + last) // 2 * same)
        if passed > _MOST_PASSING * compared and last < len(left):
            begin = last if same else 0
            rest = _by_products(left[last:], right[begin:], least, same=same)
            found.append(_Pairs(rest.left + last, rest.right + begin))
            break
    return _joined(found)


def _by_products(left: Halves, right: Halves, least: float, *, same: bool) -> _Pairs:
    own = _widened(left)
    others = own if same else _widened(right)
    # The bound for a sum of d products in float32, in whatever order BLAS takes, of vectors as long as they may be.
    floor = np.float32(least - 1.01 * left.shape[1] * 2.0**-24)
    found: list[_Pairs] = []
    for first in range(0, len(own), _LEFT_ROWS):
        block = own[first : first + _LEFT_ROWS]
        for begin in range(first if same else 0, len(others), _RIGHT_ROWS):
            products = block @ others[begin : begin + _RIGHT_ROWS].T
            width = products.shape[1]
            rows_left, rows_right = np.divmod(np.flatnonzero(products.ravel() >= floor), max(width, 1))
            pairs = _Pairs(rows_left + first, rows_right + begin)
            kept = pairs.left < pairs.right if same else slice(None)
            found.append(_Pairs(pairs.left[kept], pairs.right[kept]))
    return _joined(found)


def _widened(rows: Halves) -> Vectors:
    wide = rows.astype(np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    if not np.all(np.abs(lengths - 1) <= LENGTH_TOLERANCE):  # a NaN or an infinity fails the comparison too
        message = "vectors are finite and of unit length"
        raise ValueError(message)
    return wide


def _joined(parts: list[_Pairs]) -> _Pairs:
    if not parts:
        return _Pairs(np.empty(0, np.int64), np.empty(0, np.int64))
    return _Pairs(np.concatenate([part.left for part in parts]), np.concatenate([part.right for part in parts]))


def _scored(left: Halves, right: Halves, pairs: _Pairs, threshold: float) -> Joined:
    scores = np.empty(len(pairs.left), np.float32)
    for start in range(0, len(scores), _SCORED_AT_ONCE):
        some = slice(start, start + _SCORED_AT_ONCE)
        one, other = (rows.astype(np.float64) for rows in (left[pairs.left[some]], right[pairs.right[some]]))
        scores[some] = np.clip(np.einsum("nd,nd->n", one, other), -1, 1)
    kept = np.flatnonzero(scores >= np.float32(threshold))
    kept = kept[np.lexsort((pairs.right[kept], pairs.left[kept]))]
    return Joined(pairs.left[kept], pairs.right[kept], scores[kept])
