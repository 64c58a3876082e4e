"""Connections: within the limits, the longest idle one makes room, and a busy one never does."""

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.connections import (
    MOST_ABANDONED,
    MOST_CONNECTIONS,
    MOST_OF_AN_ADDRESS,
    RESERVED_FILES,
    Connections,
    backlog,
    connections_within,
)


@dataclass(eq=False, slots=True)
class Line:
    """A connection."""

    name: str
    is_closed: bool = False

    def make_room(self) -> None:
        self.is_closed = True


def test_the_longest_idle_connection_of_the_address_makes_room() -> None:
    all_, lines = Connections(10, 3), [Line(f"a{n}") for n in range(4)]
    assert all(all_.admit(line, "a") for line in lines[:3])
    all_.work(lines[0])
    all_.rest(lines[0])
    assert all_.admit(lines[3], "a")
    assert [line.is_closed for line in lines] == [False, True, False, False]


def test_the_address_with_the_most_connections_makes_room_and_a_proxy_last() -> None:
    all_ = Connections(8, 5)
    crowd, proxy, other = [Line(f"a{n}") for n in range(4)], [Line("p1"), Line("p2"), Line("p3")], Line("b")
    for line in proxy:
        assert all_.admit(line, None)
    for line in crowd:
        assert all_.admit(line, "a")
    assert all_.admit(other, "b")
    assert all_.admit(Line("c"), "c")
    assert [line.name for line in (*crowd, *proxy, other) if line.is_closed] == ["a0"]


async def test_the_oldest_request_that_callers_of_an_address_left_is_cancelled() -> None:
    all_, never = Connections(), asyncio.Event()
    mine = [asyncio.create_task(_waits(never)) for _ in range(MOST_ABANDONED + 2)]
    others = [asyncio.create_task(_waits(never)) for _ in range(MOST_ABANDONED)]
    for address, requests in (("a", mine), ("b", others)):
        for request in requests:
            all_.abandon(request, address)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [request.cancelled() for request in mine] == [True] * 2 + [False] * MOST_ABANDONED
    assert not any(request.cancelled() for request in others)
    never.set()
    await asyncio.gather(*mine, *others, return_exceptions=True)
    assert all_._abandoned == {}, "requests that have ended are forgotten"


async def _waits(event: asyncio.Event) -> None:
    await event.wait()


def test_a_newcomer_is_refused_when_all_connections_are_busy() -> None:
    all_, lines = Connections(4, 2), [Line("a1"), Line("a2"), Line("b1"), Line("b2")]
    for line in lines:
        assert all_.admit(line, line.name[0])
        all_.work(line)
    assert not all_.admit(Line("a3"), "a")
    assert not all_.admit(Line("c1"), "c")
    all_.leave(lines[0])
    assert all_.admit(Line("c1"), "c")
    assert not any(line.is_closed for line in lines)


@given(story=st.lists(st.tuples(st.sampled_from("awrl"), st.integers(0, 9), st.sampled_from(["x", "y", None]))))
def test_the_limits_are_never_exceeded(story: list[tuple[str, int, str | None]]) -> None:
    all_, lines, here = Connections(6, 3), [Line(str(n)) for n in range(10)], dict[int, str | None]()
    for what, number, address in story:
        line = lines[number]
        if what == "a" and number not in here:
            line.is_closed = False
            if all_.admit(line, address):
                here[number] = address
        elif what == "w":
            all_.work(line)
        elif what == "r":
            all_.rest(line)
        elif what == "l":
            all_.leave(line)
            here.pop(number, None)
        here = {n: where for n, where in here.items() if not lines[n].is_closed}
        assert len(all_) == len(here) <= 6
        assert all([*here.values()].count(one) <= 3 for one in ("x", "y"))


@pytest.mark.parametrize("files", [256, 512, 1024, 4096, 20_000])
def test_open_files_are_reserved_for_the_stores(files: int) -> None:
    most = connections_within(files).most
    assert most + backlog(files) + RESERVED_FILES <= max(files, RESERVED_FILES + 48)


def test_with_enough_files_the_limits_are_as_documented() -> None:
    assert connections_within(4096) == Connections(MOST_CONNECTIONS, MOST_OF_AN_ADDRESS)
    assert connections_within(1024).most == 640
