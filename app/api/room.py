"""Room for request bodies: a limit on their bytes in memory, for one process and for each caller.

A photo stays in memory from its first byte until its request is answered or needs it no longer. So bytes are counted, not
requests. A body that finds no room is not read: its bytes stay with the sender. It waits for a few seconds, and is refused
after that.
"""

import asyncio
from collections import Counter as Tally
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import Counter, Gauge
from starlette.exceptions import HTTPException

#: How long a body waits for room, and how many bodies of one caller may wait. Each of them uses at most some 300 kB of buffers.
WAIT_SECONDS, MOST_WAITING = 5.0, 64
#: One caller may use the room divided by this.
CALLERS_PART: Final = 2

HELD = Gauge("idem_body_bytes", "Bytes of request bodies that are held or expected")
REFUSED = Counter("idem_bodies_refused_total", "Bodies that found no room", ["reason"])


class NoRoom(HTTPException):
    """The body found no room in time. 429: its caller uses too much. 503: the process uses too much."""


@dataclass(slots=True)
class Room:
    """The bytes of bodies that one process may have in memory."""

    most: int
    seconds: float = WAIT_SECONDS
    _taken: Tally[str] = field(default_factory=Tally)
    # By caller. The first caller is served next, and goes to the end then.
    _waiting: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = field(default_factory=OrderedDict)

    @property
    def taken(self) -> int:
        """Bytes of all callers."""
        return self._taken.total()

    async def take(self, caller: str, size: int) -> None:
        """Take `size` bytes, as soon as they are free. Raises NoRoom.

        A body that is larger than the whole room is admitted when no other body is there.
        """
        if caller not in self._waiting and self._fits(caller, size):
            self._take(caller, size)
            return
        line = self._waiting.setdefault(caller, deque())
        if len(line) >= MOST_WAITING:
            raise self._refusal(caller, size)
        turn = asyncio.get_running_loop().create_future()
        line.append((size, turn))
        try:
            async with asyncio.timeout(self.seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.give_back(caller, size)
            else:
                self._leave(caller, size, turn)
            if isinstance(error, TimeoutError):
                raise self._refusal(caller, size) from error
            raise

    def give_back(self, caller: str, size: int) -> None:
        """Free the bytes, and admit waiting bodies, one of each caller in turn."""
        self._taken[caller] -= size
        if self._taken[caller] <= 0:
            del self._taken[caller]
        HELD.dec(size)
        self._serve()

    def _serve(self) -> None:
        while sum(self._serve_one(caller) for caller in [*self._waiting]):
            pass

    def _serve_one(self, caller: str) -> bool:
        """Admit the caller's first waiting body. Returns False when there is no room for it."""
        line = self._waiting[caller]
        if not self._fits(caller, line[0][0]):
            return False
        size, turn = line.popleft()
        self._waiting.move_to_end(caller)
        if not line:
            del self._waiting[caller]
        if not turn.done():
            self._take(caller, size)
            turn.set_result(None)
        return True

    def _leave(self, caller: str, size: int, turn: asyncio.Future[None]) -> None:
        turn.cancel()
        line = self._waiting.get(caller)
        if line is not None and (size, turn) in line:
            line.remove((size, turn))
            if not line:
                del self._waiting[caller]
            self._serve()  # it may have blocked the bodies behind it

    def _take(self, caller: str, size: int) -> None:
        self._taken[caller] += size
        HELD.inc(size)

    def _fits(self, caller: str, size: int) -> bool:
        taken, own = self.taken, self._taken[caller]
        return (not taken or taken + size <= self.most) and (not own or own + size <= self.most // CALLERS_PART)

    def _refusal(self, caller: str, size: int) -> NoRoom:
        own = self._taken[caller]
        is_own = bool(own) and own + size > self.most // CALLERS_PART
        REFUSED.labels("caller" if is_own else "process").inc()
        return NoRoom(429 if is_own else 503)


@dataclass(slots=True)
class Place:
    """The room that one request has taken."""

    room: Room
    caller: str
    bytes_: int = 0

    async def hold(self, size: int) -> None:
        """Take room until the request has `size` bytes in all. Raises NoRoom."""
        more = size - self.bytes_
        if more > 0:
            await self.room.take(self.caller, more)
            self.bytes_ += more

    def leave(self) -> None:
        """Give all of it back. May be called again."""
        if self.bytes_:
            held, self.bytes_ = self.bytes_, 0
            self.room.give_back(self.caller, held)
