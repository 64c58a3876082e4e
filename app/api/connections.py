"""The connections of one process: how many there may be, how many one address may have, and which one makes room.

An idle connection costs its caller nothing, and the process one open file. When a limit is reached, the process closes an idle
connection and serves the new one. If the limit of an address is reached, that address loses the connection that has been idle
longest. If the process is full, the address with the most connections loses one. Where no idle connection can be closed, the
new one is refused.
"""

import asyncio
import resource
from collections import Counter as Tally
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import prometheus_client
import structlog

log = structlog.get_logger(__name__)

#: Connections of one process, and of one address in it. An IPv6 address counts as its network of 64 bits.
MOST_CONNECTIONS, MOST_OF_AN_ADDRESS = 2048, 512
#: Requests that go on although their callers left: of one address, and of all callers behind a trusted proxy.
MOST_ABANDONED, MOST_ABANDONED_BEHIND_A_PROXY = 32, 512
#: Open files reserved for the stores: MongoDB's pool (50), Redis, the S3 server, index files, photos, logs.
RESERVED_FILES: Final = 256
#: More open files than this are of no use.
_USEFUL_FILES: Final = 65_536
_FEWEST: Final = 16

OPEN = prometheus_client.Gauge("idem_connections", "Open connections")
CLOSED = prometheus_client.Counter(
    "idem_connections_closed_total", "Connections closed because a limit was reached", ["reason"]
)


ABANDONED = prometheus_client.Counter(
    "idem_abandoned_requests_cancelled_total", "Requests cancelled because too many callers of an address did not wait"
)


class Member(Protocol):
    """One connection."""

    def make_room(self) -> None:
        """Close the connection; no request is being answered on it."""


@dataclass(slots=True)
class Connections:
    """Open connections, by address. Address None stands for proxies: many callers share it, so it has no limit of connections."""

    most: int = MOST_CONNECTIONS
    most_of_an_address: int = MOST_OF_AN_ADDRESS
    _address_of: dict[Member, str | None] = field(default_factory=dict)
    _count: Tally[str | None] = field(default_factory=Tally)
    # By address; the connection that has been idle for the longest time comes first.
    _idle: dict[str | None, OrderedDict[Member, None]] = field(default_factory=dict)
    # By address, the oldest first.
    _abandoned: dict[str | None, OrderedDict["asyncio.Task[None]", None]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._address_of)

    def admit(self, member: Member, address: str | None) -> bool:
        """Add the connection as idle. Closes another one if a limit is reached. Returns False when there is no room."""
        victim: Member | None = None
        is_full = len(self) >= self.most
        if address is not None and self._count[address] >= self.most_of_an_address:
            victim = self._oldest_idle(address)
            if victim is None:
                CLOSED.labels("address-full").inc()
                return False
        elif is_full:
            # The address with the most connections loses one; a proxy only if no other address has an idle one.
            largest = max(self._idle, key=lambda one: (one is not None, self._count[one]), default=None)
            victim = self._oldest_idle(largest)
            if victim is None:
                CLOSED.labels("process-full").inc()
                return False
        if victim is not None:
            CLOSED.labels("idle").inc()
            self.leave(victim)
            victim.make_room()
        self._address_of[member] = address
        self._count[address] += 1
        self.rest(member)
        OPEN.set(len(self))
        return True

    def work(self, member: Member) -> None:
        """Mark the connection as busy: a request came."""
        if member in self._address_of:
            self._forget_idle(member, self._address_of[member])

    def rest(self, member: Member) -> None:
        """Mark the connection as idle: the request was answered."""
        if member in self._address_of:
            self._idle.setdefault(self._address_of[member], OrderedDict())[member] = None

    def leave(self, member: Member) -> None:
        """Remove a connection that has ended. May be called again."""
        if member not in self._address_of:
            return
        address = self._address_of.pop(member)
        self._forget_idle(member, address)
        self._count[address] -= 1
        if not self._count[address]:
            del self._count[address]
        OPEN.set(len(self))

    def abandon(self, request: "asyncio.Task[None]", address: str | None) -> None:
        """Note a request whose caller left before the answer. The request goes on.

        If the address then has more such requests than allowed, the oldest one is cancelled. Without this limit, callers who do
        not wait for answers could pile up work.
        """
        mine = self._abandoned.setdefault(address, OrderedDict())
        mine[request] = None
        request.add_done_callback(partial(self._end_abandoned, address))
        if len(mine) > (MOST_ABANDONED_BEHIND_A_PROXY if address is None else MOST_ABANDONED):
            oldest, _ = mine.popitem(last=False)
            ABANDONED.inc()
            oldest.cancel()

    def _end_abandoned(self, address: str | None, request: "asyncio.Task[None]") -> None:
        mine = self._abandoned.get(address)
        if mine is not None:
            mine.pop(request, None)
            if not mine:
                del self._abandoned[address]

    def _oldest_idle(self, address: str | None) -> Member | None:
        return next(iter(self._idle.get(address, ())), None)

    def _forget_idle(self, member: Member, address: str | None) -> None:
        idle = self._idle.get(address)
        if idle is not None and member in idle:
            del idle[member]
            if not idle:
                del self._idle[address]


def backlog(files: int) -> int:
    """How many connections may wait to be accepted. All of them may be accepted at once, before any is counted."""
    return max(_FEWEST, min(1024, files // 8))


def connections_within(files: int) -> Connections:
    """The limits for a process that may have `files` open files."""
    most = max(_FEWEST, min(MOST_CONNECTIONS, files - RESERVED_FILES - backlog(files)))
    return Connections(most, max(_FEWEST, min(MOST_OF_AN_ADDRESS, most * 3 // 4)))


def raise_open_files() -> int:
    """Raise this process's soft limit of open files up to the hard limit. Returns the limit; logs a warning if it is low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _USEFUL_FILES if hard == resource.RLIM_INFINITY else min(hard, _USEFUL_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    files = open_files()
    allowed = connections_within(files).most
    if allowed < MOST_CONNECTIONS:
        log.warning(
            "open_files_low", open_files=files, connections=allowed, advice="Raise `ulimit -n` (LimitNOFILE) to 4096."
        )
    return files


def open_files() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _USEFUL_FILES if soft == resource.RLIM_INFINITY else soft
