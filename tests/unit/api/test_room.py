"""Room for bodies: never more bytes than the room has, at most half of it for one caller, and callers in turn."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api import room as rooms
from app.api.room import NoRoom, Place, Room

MOST = 100


async def test_a_body_that_fits_takes_room_at_once_and_gives_it_back() -> None:
    room = Room(MOST)
    place = Place(room, "ann")
    await place.hold(20)
    await place.hold(50)
    assert room.taken == 50
    place.leave()
    place.leave()
    assert room.taken == 0


@pytest.mark.parametrize(("caller", "status"), [("ann", 429), ("cid", 503)])
async def test_a_caller_beyond_its_half_gets_429_and_beyond_the_whole_room_503(caller: str, status: int) -> None:
    room = Room(MOST, seconds=0.02)
    await room.take("ann", 50)
    await room.take("bob", 50)
    with pytest.raises(NoRoom) as refused:
        await room.take(caller, 10)
    assert refused.value.status_code == status
    assert room.taken == 100
    room.give_back("ann", 50)
    await room.take(caller, 10)


async def test_a_body_larger_than_all_the_room_is_taken_alone() -> None:
    room = Room(MOST, seconds=0.02)
    await room.take("ann", 10)
    with pytest.raises(NoRoom):
        await room.take("bob", MOST + 1)
    room.give_back("ann", 10)
    await room.take("bob", MOST + 1)


async def test_one_callers_many_bodies_do_not_keep_another_waiting() -> None:
    room, order = Room(MOST, seconds=5), []
    for caller in ("ann", "bob"):
        await room.take(caller, 50)

    async def work(caller: str) -> None:
        await room.take(caller, 50)
        order.append(caller)
        room.give_back(caller, 50)

    waiting = [asyncio.create_task(work(caller)) for caller in (*["ann"] * 5, "cid")]
    await asyncio.sleep(0)
    room.give_back("ann", 50)
    await asyncio.gather(*waiting)
    assert "cid" in order[:2]


async def test_no_more_than_a_few_bodies_of_a_caller_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "MOST_WAITING", 3)
    room = Room(MOST, seconds=5)
    await room.take("ann", 50)
    waiting = [asyncio.create_task(room.take("ann", 10)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(NoRoom):
        await room.take("ann", 10)
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    room.give_back("ann", 50)
    assert room.taken == 0


Story = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, MOST), st.integers(0, 3), st.booleans()), max_size=30)


@given(story=Story)
async def test_the_sum_is_always_right_and_all_room_is_given_back(
    story: list[tuple[str, int, int, bool]],
) -> None:
    room = Room(MOST, seconds=0.01)

    async def request(caller: str, size: int, turns: int) -> None:
        place = Place(room, caller)
        try:
            await place.hold(size)
            assert room.taken <= MOST
            for _ in range(turns):
                await asyncio.sleep(0)
        finally:
            place.leave()

    tasks = []
    for caller, size, turns, is_cancelled in story:
        tasks.append(asyncio.create_task(request(caller, size, turns)))
        await asyncio.sleep(0)
        if is_cancelled:
            tasks[len(tasks) // 2].cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert outcome is None or isinstance(outcome, NoRoom | asyncio.CancelledError)
    assert room.taken == 0
    assert not room._waiting
