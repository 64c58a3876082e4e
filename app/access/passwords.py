"""Passwords: their length, their spelling, and Argon2id in a bounded pool of its own.

A hash takes 64 MiB. The pool runs few hashes at once and keeps a short line, so a flood of logins cannot use up the memory.
Faces and searches have another executor, so logins do not delay them. The line serves the origins with the fewest requests
first, so a flood from unknown origins does not delay other people.
"""

import asyncio
import importlib
import os
import secrets
import threading
import time
import unicodedata
from bisect import insort
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final, TypeVar, cast

from passlib.hash import argon2

from app.errors import Advice, NotReady, Validation

T = TypeVar("T")

#: Code points, not bytes: a passphrase in any script counts the same.
PASSWORD_MINIMUM, PASSWORD_MAXIMUM = 8, 256
# The library loads its backend at the first use. Two first uses at the same time, or one within the other, would fail.
argon2.set_backend()
#: OWASP's stronger profile: 64 MiB, three passes, four lanes; 0.15 s on one core.
_ARGON2: Final = argon2.using(type="ID", memory_cost=64 * 1024, rounds=3, parallelism=4)
#: Added to the niceness of a hashing thread, so that the event loop and the stores come first. Linux takes 0 to 19.
_NICENESS: Final = 5
#: Retry-After of a full line. A hash takes 0.15 s, so some of the line is free again after this time.
_RETRY_AFTER_SECONDS: Final = 2
#: Requests of an origin count for this long. More names than this are forgotten sooner, which bounds the memory to some MB.
_COUNTED_SECONDS: Final = 60.0
_MOST_COUNTED: Final = 10_000


@dataclass(frozen=True, slots=True)
class Stranger:
    """The origin of an unknown caller.

    place: the address (IPv6: the network of 64 bits). network: the wider network around it.
    """

    place: str
    network: str


@dataclass(eq=False, slots=True)
class _Turn:
    """One password that waits for a thread. The smallest rank goes first. Equal ranks go in the order of their arrival."""

    rank: tuple[int, int, int]
    work: Callable[[], Any]
    answer: "asyncio.Future[Any]"


class _Asked:
    """Counts the requests of each unknown origin within the last one to two minutes. Refused requests count too."""

    def __init__(self) -> None:
        self._present: Counter[str] = Counter()
        self._former: Counter[str] = Counter()
        self._began = time.monotonic()

    def rank(self, stranger: Stranger | None) -> tuple[int, int, int]:
        """The rank of a request in the line; counts the request.

        Known callers go first. Then the fewest requests from the address decide, then the fewest from the network.
        """
        if stranger is None:
            return 0, 0, 0
        moment = time.monotonic()
        if moment - self._began > _COUNTED_SECONDS or len(self._present) > _MOST_COUNTED:
            is_old = moment - self._began > 2 * _COUNTED_SECONDS
            self._former = Counter() if is_old else self._present
            self._present, self._began = Counter(), moment
        place, network = (self._present[name] + self._former[name] for name in (stranger.place, stranger.network))
        self._present.update({stranger.place, stranger.network})
        return 1, place, network


class PasswordPool:
    """Hashes and checks passwords, a few at a time; one per process. Used from one event loop.

    The line is in the order of `_Asked.rank`. During a flood others wait for the hashes that already run, and for one request
    of each new network.
    """

    def __init__(self, threads: int, line: int) -> None:
        """threads: hashes at once, 64 MiB each. line: how many more may wait for one."""
        self._free, self._line = threads, line
        self._waiting: list[_Turn] = []
        self._asked = _Asked()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="password", initializer=_in_the_background)

    async def hashed(self, password: str) -> str:
        """The password's hash, with its salt and costs. Raises NotReady when the line is full."""
        return await self._run(lambda: hash_password(password))

    async def matches(self, password: str, hashed: str | None, stranger: Stranger | None = None) -> bool:
        """As `password_matches`. stranger: the origin; None for a known caller. Raises NotReady when the line is full."""
        if len(password) > PASSWORD_MAXIMUM:
            return False
        return await self._run(lambda: password_matches(password, hashed), stranger)

    async def _run(self, work: Callable[[], T], stranger: Stranger | None = None) -> T:
        turn = _Turn(self._asked.rank(stranger), work, asyncio.get_running_loop().create_future())
        insort(self._waiting, turn, key=lambda one: one.rank)
        self._start()
        if len(self._waiting) > self._line:
            self._refuse(self._waiting[-1])
        try:
            answer: T = await turn.answer
        finally:
            # A caller that disconnects leaves the line. A hash that has begun keeps its thread until it ends.
            if turn in self._waiting:
                self._waiting.remove(turn)
        return answer

    def close(self) -> None:
        """Stop the threads, and refuse the requests that still wait."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for turn in tuple(self._waiting):
            self._refuse(turn)

    def _start(self) -> None:
        while self._free and self._waiting:
            turn = self._waiting.pop(0)
            running = self._executor.submit(turn.work)  # RuntimeError while the process is stopping
            self._free -= 1
            running.add_done_callback(partial(_call_soon, asyncio.get_running_loop(), self._end, turn))

    def _end(self, turn: _Turn, done: "Future[Any]") -> None:
        self._free += 1
        if not turn.answer.done():
            error = None if done.cancelled() else done.exception()
            if done.cancelled():
                turn.answer.cancel()
            elif error is not None:
                turn.answer.set_exception(error)
            else:
                turn.answer.set_result(done.result())
        self._start()

    def _refuse(self, turn: _Turn) -> None:
        self._waiting.remove(turn)
        if not turn.answer.done():
            message = "Too many people are logging in; please try again in a moment."
            turn.answer.set_exception(NotReady(message, retry_after_seconds=_RETRY_AFTER_SECONDS))


def _call_soon(loop: asyncio.AbstractEventLoop, work: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(work, *arguments)
    except RuntimeError:  # the loop has ended: no caller waits
        return


def check_password(password: str, *, refuse_common: bool) -> None:
    """Raises Validation for a new password of the wrong length, or a common one. Hashes nothing.

    refuse_common: true in production. A development stack may have a password that is easy to remember.
    """
    if not PASSWORD_MINIMUM <= len(password) <= PASSWORD_MAXIMUM:
        message = f"A password has {PASSWORD_MINIMUM} to {PASSWORD_MAXIMUM} characters."
        raise Validation(message, errors=(Advice("password", "length", message),))
    if refuse_common and _normal(password).casefold() in _common_passwords():
        message = "This password is too common, so attackers try it first. Choose another one."
        raise Validation(message, errors=(Advice("password", "common", message),))


def hash_password(password: str) -> str:
    """The password's Argon2id hash with its salt and costs. Blocking, 64 MiB and 0.15 s: `PasswordPool` runs it."""
    return cast("str", _ARGON2.hash(_normal(password)))


def password_matches(password: str, hashed: str | None) -> bool:
    """Whether the password belongs to the hash. Blocking.

    hashed: None if there is no such user. The check then takes the same time, and returns False.
    """
    if len(password) > PASSWORD_MAXIMUM:
        return False
    matches = cast("bool", _ARGON2.verify(_normal(password), hashed or _decoy_hash()))
    return matches and hashed is not None


def _normal(password: str) -> str:
    # Some keyboards send an umlaut composed, others decomposed (NIST SP 800-63B, 3.1.1.2). Half a surrogate pair cannot be
    # encoded, so it is escaped.
    return unicodedata.normalize("NFKC", password).encode("utf-8", "backslashreplace").decode()


@cache
def _decoy_hash() -> str:
    return hash_password(secrets.token_urlsafe())


@cache
def _common_passwords() -> frozenset[str]:
    """The most common ones of zxcvbn's list (30,000) that are long enough, in lower case. The package takes 0.1 s to load."""
    listed = importlib.import_module("zxcvbn.frequency_lists").FREQUENCY_LISTS["passwords"]
    return frozenset(password for password in listed if len(password) >= PASSWORD_MINIMUM)


def _in_the_background() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
