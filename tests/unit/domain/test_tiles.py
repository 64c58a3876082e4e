"""Tiles as a law: every pair of which one is new is compared once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.tiles import tile, tile_count

#: Small, so that a triangle of blocks can be counted out.
BLOCK = 4


@pytest.mark.parametrize("since", range(0, 22, 3))
@pytest.mark.parametrize("upto", range(22))
def test_every_pair_whose_later_one_is_new_lies_in_exactly_one_tile(since: int, upto: int) -> None:
    compared: list[tuple[int, int]] = []
    for number in range(tile_count(since, upto, BLOCK)):
        left, right, same = tile(number, since, upto, BLOCK)
        for one in range(left[0], left[1] + 1):
            compared += [(one, other) for other in range(right[0], right[1] + 1) if not same or one < other]
    assert len(compared) == len(set(compared)), "nothing twice"
    assert all(one < other <= upto for one, other in compared)
    assert set(compared) >= {(one, other) for other in range(since + 1, upto + 1) for one in range(1, other)}


@given(st.integers(0, 10**9), st.integers(0, 10**5))
def test_what_is_new_costs_a_column_of_tiles_and_not_the_whole_triangle(since: int, new: int) -> None:
    columns = new // BLOCK + 2
    assert tile_count(since, since + new, BLOCK) <= columns * ((since + new) // BLOCK + 1)


@given(st.integers(-5, 5), st.integers(0, 40), st.integers(0, 40))
def test_a_number_that_is_no_tile_is_refused(beyond: int, since: int, upto: int) -> None:
    count = tile_count(since, upto, BLOCK)
    number = count + beyond if beyond >= 0 else beyond
    with pytest.raises(ValueError, match="no tile"):
        tile(number, since, upto, BLOCK)
