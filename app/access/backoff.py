"""Failed logins cost time: back-off by where they come from, and never a lock-out.

Each failure counts against the name *at that address*, against the name in the wider networks that the address lies in, and
against the address with whatever name (a user's, a client's, or nobody's: they are not told apart). Only these make somebody
wait. So nobody's failures elsewhere refuse the right password, and every further address brings a guesser few guesses.

Failures also count against the name alone. That number makes nobody wait: a wait of the name would be one that a stranger can
bring about. When it is large, each address gets fewer guesses and longer waits, and operators are told (docs/adr/0047).

An address from which the name succeeded lately stands for itself: there only its own failures with that name count, so that
one person's slips do not make a whole office wait.

Whoever waits learns nothing: not before the password is looked at, and not after it, when the wait began in between.
So however many guesses come at once, no more are answered than were left. Only who shares an address can tell, while it
waits, which names stand for themselves there (docs/adr/0025).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from app.access.passwords import Stranger
from app.config import Settings
from app.documents.failed_logins import NEVER, NOTHING, FailedLogins, Remembered, Waits
from app.domain.callers import subscriber, wider_networks
from app.errors import RateLimited
from app.keys import KeyRing

HOUR_SECONDS: Final = 3600
DAY_SECONDS: Final = 24 * HOUR_SECONDS
#: After this many failures of strangers with one name, it is under attack, until two days without another one.
ATTACK_FAILURES: Final = 20
#: Then an address gets two guesses. 15 minutes of wait follow, doubled by each further failure, a day at most.
UNDER_ATTACK: Final = Waits(2, 900, DAY_SECONDS, DAY_SECONDS)
#: What one name may fail in a network of 24 (IPv6: 48) bits, and in one of 16 (IPv6: 32) bits, before all of it waits.
IN_NETWORK: Final = (Waits(256, 900, DAY_SECONDS, DAY_SECONDS), Waits(4096, 900, DAY_SECONDS, DAY_SECONDS))
#: From so many networks an attack is an alarm. It is looked at after every so many failures.
ALARM_NETWORKS: Final = 5
ALARM_EVERY: Final = 10


@dataclass(frozen=True, slots=True)
class Attack:
    """Failures with one name, within two days of each other, and from how many networks they came."""

    name: str
    failures: int
    networks: int


class Backoff:
    """Counts failed logins in MongoDB, for all processes together. Without MongoDB nobody logs in."""

    def __init__(self, settings: Settings, keys: KeyRing) -> None:
        """Names and addresses are stored as keyed hashes only."""
        first, longest = settings.login_wait_seconds, settings.login_wait_maximum_seconds
        self._by_name = Waits(settings.login_failures_before_wait, first, longest, HOUR_SECONDS)
        self._by_place = Waits(settings.address_failures_before_wait, first, longest, HOUR_SECONDS)
        self._keys = keys

    async def begin(self, name: str, address: str | None) -> "Attempt":
        """An attempt to log in with this name from this address, before anything of it is looked at.

        Raises RateLimited while there is a wait.
        """
        place, networks = subscriber(address or ""), wider_networks(address or "")
        attempt = Attempt(
            name=self._id("name", name),
            place=self._id("place", place),
            here=self._id("name-at-place", f"{name}\0{place}"),
            networks=tuple(self._id("name-in-network", f"{name}\0{network}") for network in networks),
            by_name=self._by_name,
            by_place=self._by_place,
            stranger=Stranger(place, networks[0] if networks else place),
        )
        seen = await FailedLogins.remembered([attempt.name, attempt.place, attempt.here, *attempt.networks])
        attempt = replace(
            attempt,
            is_known_here=seen.get(attempt.here, NOTHING).is_known,
            is_under_attack=seen.get(attempt.name, NOTHING).failures >= ATTACK_FAILURES,
        )
        attempt.require_no_wait(seen)
        return attempt

    async def forgive(self, name: str) -> None:
        """Forget the failures of a name, wherever they were."""
        await FailedLogins.forgive(self._id("name", name))

    def _id(self, kind: str, value: str) -> str:
        return self._keys.keyed_hash(f"login-{kind}", value.encode("utf-8", "backslashreplace")).hex()


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt to log in, whose outcome is to be told: `failed` or `succeeded`, once.

    name, place, here (both together) and networks (the name in each, the narrowest first) are ids of what is remembered of them.
    """

    name: str
    place: str
    here: str
    networks: tuple[str, ...]
    by_name: Waits
    by_place: Waits
    stranger: Stranger
    is_known_here: bool = False
    is_under_attack: bool = False

    @property
    def waits_as(self) -> Stranger | None:
        """In whose place the password waits to be looked at; None goes before all strangers."""
        return None if self.is_known_here else self.stranger

    @property
    def _counted(self) -> dict[str, Waits]:
        """What a failure counts against, and what makes it wait."""
        if self.is_known_here:
            return {self.here: self.by_name}
        here = UNDER_ATTACK if self.is_under_attack else self.by_name
        return {self.here: here, **dict(zip(self.networks, IN_NETWORK, strict=False)), self.place: self.by_place}

    def require_no_wait(self, seen: Mapping[str, Remembered]) -> None:
        """Raises RateLimited while one of what counts has to wait."""
        for id_ in self._counted:
            _require_no_wait(seen.get(id_, NOTHING))

    async def failed(self) -> Attack | None:
        """Count a failure. Returns the attack that it is part of, where an alarm is due.

        Raises RateLimited when a wait began since: then the failure must not be told.
        """
        for id_, waits in self._counted.items():
            of = None if id_ == self.place else self.name
            is_network = id_ in self.networks[:1]
            _require_no_wait(await FailedLogins.note_failure(id_, waits, of, is_network=is_network))
        if self.is_known_here:
            return None
        failures = (await FailedLogins.note_failure(self.name, NEVER)).failures + 1
        if failures < ATTACK_FAILURES or failures % ALARM_EVERY:
            return None
        networks = await FailedLogins.networks_of(self.name)
        return Attack(self.name, failures, networks) if networks >= ALARM_NETWORKS else None

    async def succeeded(self) -> None:
        """Take back the failures of this name from here. Raises RateLimited when a wait began since: nothing must be told."""
        self.require_no_wait(await FailedLogins.remembered(list(self._counted)))
        before = await FailedLogins.make_known(self.here, self.name)
        if not self.is_known_here:
            await FailedLogins.take_back([self.name, self.place, *self.networks], before.failures)


def _require_no_wait(known: Remembered) -> None:
    if known.left_seconds > 0:
        message = "Too many failed logins; please wait and try again."
        raise RateLimited(message, retry_after_seconds=math.ceil(known.left_seconds))
