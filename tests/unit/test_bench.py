"""The benchmark's arithmetic."""

import asyncio
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app.devstack.bench import quantile, timed, with_comment


def jpeg() -> bytes:
    """A small photo."""
    encoded = io.BytesIO()
    Image.effect_noise((32, 32), 50).convert("RGB").save(encoded, "JPEG")
    return encoded.getvalue()


def test_a_comment_changes_the_bytes_and_not_the_picture() -> None:
    original = jpeg()
    changed = with_comment(original, b"serial 7")
    assert changed != original
    with Image.open(io.BytesIO(original)) as one, Image.open(io.BytesIO(changed)) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_only_a_jpeg_takes_a_comment() -> None:
    with pytest.raises(ValueError, match="JPEG"):
        with_comment(b"\x89PNG", b"")


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
