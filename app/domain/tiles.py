"""Tiles: everything against everything, cut into pieces of work that can be done one after the other, and gone on with.

Vectors are known by the number of the change that brought them, their `seq`. Blocks of so many of them stand along both
sides of a square, of which only the upper triangle is worked on: a pair is a pair in either order. Tiles go column by
column, so that the columns of what is new come last, and a tile's number is all that has to be remembered.
"""

import math
from typing import Final, NamedTuple

#: A tile is 67 million pairs at most: some tenths of a second on two cores, and 16 MiB of vectors.
SEQS_A_BLOCK: Final = 8192


class Tile(NamedTuple):
    """Two runs of seqs, ends included: each of `left` with each of `right`; `same`: each two of the one run."""

    left: tuple[int, int]
    right: tuple[int, int]
    same: bool


def tile_count(since: int, upto: int, block: int = SEQS_A_BLOCK) -> int:
    """How many tiles compare what came in (since, upto] with each other and with everything before. block: its seqs."""
    if upto <= since:
        return 0
    first, blocks = since // block, -(-upto // block)
    return _before(blocks) - _before(first)


def tile(number: int, since: int, upto: int, block: int = SEQS_A_BLOCK) -> Tile:
    """The tile of that number, from 0. Every pair with a later one above `since` lies in exactly one of them.

    Some also hold pairs of older ones, in the block that `since` lies in. Raises ValueError for a number that is none.
    """
    if not 0 <= number < tile_count(since, upto, block):
        message = f"there is no tile {number} between {since} and {upto}"
        raise ValueError(message)
    place = number + _before(since // block)
    column = (math.isqrt(8 * place + 1) - 1) // 2
    row = place - _before(column)
    right = _run(column, upto, block)
    if row == column:
        return Tile(right, right, same=True)
    return Tile(_run(row, upto, block), (max(right[0], since + 1), right[1]), same=False)


def _before(column: int) -> int:
    """How many tiles lie in the columns before this one."""
    return column * (column + 1) // 2


def _run(number: int, upto: int, block: int) -> tuple[int, int]:
    return number * block + 1, min(upto, (number + 1) * block)
