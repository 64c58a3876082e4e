"""Passwords: their length, their spelling, and Argon2id in a bounded pool of its own.

A hash takes 64 MiB. Few at once and a short line keep a flood of logins from eating the memory, and from standing in
the way of faces and searches, which have an executor of their own.
"""

import asyncio
import importlib
import os
import secrets
import threading
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final, TypeVar, cast

from passlib.hash import argon2

from app.errors import Advice, NotReady, Validation

T = TypeVar("T")

#: Code points, not bytes: a passphrase in any script counts the same.
PASSWORD_MINIMUM, PASSWORD_MAXIMUM = 8, 256
#: OWASP's stronger profile: 64 MiB, three passes, four lanes; 0.15 s on one core.
_ARGON2: Final = argon2.using(type="ID", memory_cost=64 * 1024, rounds=3, parallelism=4)
#: The event loop and the stores come first.
_NICENESS: Final = 5
#: When a place in the line should be free again.
_RETRY_AFTER_SECONDS: Final = 2


class PasswordPool:
    """Hashes and checks passwords, a few at a time; one per process."""

    def __init__(self, threads: int, line: int) -> None:
        """threads: hashes at once, 64 MiB each. line: how many more may wait for one."""
        self._places = threading.BoundedSemaphore(threads + line)
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="password", initializer=_in_the_background)

    async def hashed(self, password: str) -> str:
        """The password's hash, with its salt and costs in it. Raises NotReady when too many wait already."""
        return await self._run(lambda: hash_password(password))

    async def matches(self, password: str, hashed: str | None) -> bool:
        """As `password_matches`. Raises NotReady when too many wait already."""
        if len(password) > PASSWORD_MAXIMUM:
            return False
        return await self._run(lambda: password_matches(password, hashed))

    async def _run(self, work: Callable[[], T]) -> T:
        if not self._places.acquire(blocking=False):
            message = "Too many people are logging in; please try again in a moment."
            raise NotReady(message, retry_after_seconds=_RETRY_AFTER_SECONDS)
        try:
            running = self._executor.submit(work)
        except RuntimeError:  # the process is stopping
            self._places.release()
            raise
        # Whoever hangs up leaves the line, but a hash that has begun keeps its place until it ends.
        running.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Let go of the threads; who still waits is refused."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def check_password(password: str, *, refuse_common: bool) -> None:
    """Refuse a new password by its length, before any hashing, or as one that everybody tries. Raises Validation.

    refuse_common: in production; a development stack may have a password that its people remember.
    """
    if not PASSWORD_MINIMUM <= len(password) <= PASSWORD_MAXIMUM:
        message = f"A password has {PASSWORD_MINIMUM} to {PASSWORD_MAXIMUM} characters."
        raise Validation(message, errors=(Advice("password", "length", message),))
    if refuse_common and _normal(password).casefold() in _common_passwords():
        message = "This password is among those that are tried first."
        raise Validation(message, errors=(Advice("password", "common", message),))


def hash_password(password: str) -> str:
    """The password's Argon2id hash with its salt and costs. Blocking, 64 MiB and 0.15 s: `PasswordPool` runs it."""
    return cast("str", _ARGON2.hash(_normal(password)))


def password_matches(password: str, hashed: str | None) -> bool:
    """Whether it is the password; None (there is no such user) costs the same time and is never one. Blocking."""
    if len(password) > PASSWORD_MAXIMUM:
        return False
    matches = cast("bool", _ARGON2.verify(_normal(password), hashed or _decoy_hash()))
    return matches and hashed is not None


def _normal(password: str) -> str:
    # One keyboard sends an umlaut composed, another decomposed (NIST SP 800-63B, 3.1.1.2). Half a surrogate pair
    # cannot be encoded and stands for itself, escaped.
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
