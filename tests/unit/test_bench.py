"""The benchmark's arithmetic."""

import asyncio
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app.devstack.bench import MARK_BITS, MARK_SIDE, marked, quantile, timed


def jpeg() -> bytes:
    """A small photo."""
    encoded = io.BytesIO()
    Image.effect_noise((MARK_BITS * MARK_SIDE, 32), 50).convert("RGB").save(encoded, "JPEG")
    return encoded.getvalue()


def test_each_mark_is_another_picture_and_only_the_edge_changes() -> None:
    original, numbers = jpeg(), (0, 1, 2, 3, 2**MARK_BITS - 1)
    shown = []
    for number in numbers:
        with Image.open(io.BytesIO(marked(original, number))) as picture:
            shown.append(np.asarray(picture.convert("L")).astype(int))
    edges = {(picture[:MARK_SIDE] > 128).tobytes() for picture in shown}
    assert len(edges) == len(numbers)
    for picture in shown:
        assert np.abs(picture[2 * MARK_SIDE :] - shown[0][2 * MARK_SIDE :]).max() <= 2


def test_a_narrow_photo_takes_no_mark() -> None:
    narrow = io.BytesIO()
    Image.new("RGB", (MARK_BITS * MARK_SIDE - 1, 32)).save(narrow, "JPEG")
    with pytest.raises(ValueError, match="narrow"):
        marked(narrow.getvalue(), 1)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_a_quantile_is_one_of_the_values_and_grows_with_its_share(
    values: list[float], one: float, other: float
) -> None:
    low, high = sorted((one, other))
    assert quantile(values, low) in values
    assert quantile(values, low) <= quantile(values, high)


def test_the_median_and_the_tail_are_the_nearest_rank() -> None:
    values = [float(number) for number in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.95), quantile(values, 1.0)) == (50.0, 95.0, 100.0)


async def test_calls_run_as_many_at_a_time_as_asked() -> None:
    running = most = 0

    async def call() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(3):
            await asyncio.sleep(0)
        running -= 1

    timing = await timed([call] * 20, 4)
    assert len(timing.each) == 20
    assert most == 4


async def test_a_call_that_fails_ends_the_measurement() -> None:
    async def call() -> None:
        message = "refused"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="refused"):
        await timed([call] * 5, 2)
