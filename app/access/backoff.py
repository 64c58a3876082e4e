"""Failed logins make the next login wait. The wait depends on the address, and no account is ever locked.

A failure counts three times: for the name at that address, for the name in each wider network around the address, and for the
address with any name. The name may be a user's, a client's, or unknown. Only these counts cause waits. So failures from other
networks never refuse the right password, and each further address gives an attacker only a few guesses.

A failure also counts for the name alone. This count causes no wait, because then any attacker could lock the user out. When it
is large, each address gets fewer guesses and longer waits, and an alarm informs the operators (docs/adr/0047).

An address is known to a name after a successful login there. At a known address only the failures of that name at that address
count. So the mistakes of one person do not make a whole office wait.

A refused attempt does not reveal whether the password was right. This also applies if the wait began while the password was
checked. So parallel guesses get no more answers than there were guesses left. One thing can be learnt: while an address waits,
its users can find out which names are known there (docs/adr/0025).
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
#: A name is under attack after this many failures at addresses that are not known to it. The attack is over after two days
#: without another failure. The figures of this file are those of docs/adr/0047.
ATTACK_FAILURES: Final = 20
#: During an attack an address gets two guesses. Then it waits 15 minutes. Each further failure doubles the wait, up to a day.
UNDER_ATTACK: Final = Waits(2, 900, DAY_SECONDS, DAY_SECONDS)
#: Failures of one name before a whole network waits: a network of 24 (IPv6: 48) bits, and one of 16 (IPv6: 32) bits.
IN_NETWORK: Final = (Waits(256, 900, DAY_SECONDS, DAY_SECONDS), Waits(4096, 900, DAY_SECONDS, DAY_SECONDS))
#: An attack from this many networks raises an alarm. The networks are counted after every ALARM_EVERY failures.
ALARM_NETWORKS: Final = 5
ALARM_EVERY: Final = 10


@dataclass(frozen=True, slots=True)
class Attack:
    """Failures with one name, within two days of each other, and from how many networks they came."""

    name: str
    failures: int
    networks: int


class Backoff:
    """Counts failed logins in MongoDB, for all processes together. Without MongoDB no login is possible."""

    def __init__(self, settings: Settings, keys: KeyRing) -> None:
        """Names and addresses are stored as keyed hashes only."""
        first, longest = settings.login_wait_seconds, settings.login_wait_maximum_seconds
        self._by_name = Waits(settings.login_failures_before_wait, first, longest, HOUR_SECONDS)
        self._by_place = Waits(settings.address_failures_before_wait, first, longest, HOUR_SECONDS)
        self._keys = keys

    async def begin(self, name: str, address: str | None) -> "Attempt":
        """Begin an attempt to log in with this name from this address. Call it before the password is checked.

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
        """Forget the failures of a name at all addresses."""
        await FailedLogins.forgive(self._id("name", name))

    def _id(self, kind: str, value: str) -> str:
        return self._keys.keyed_hash(f"login-{kind}", value.encode("utf-8", "backslashreplace")).hex()


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt to log in. The caller reports its outcome once, by `failed` or `succeeded`.

    name, place, here and networks are ids of documents in `FailedLogins`. place: the address. here: the name at the address.
    networks: the name in each wider network, the narrowest first.
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
        """The origin that decides how long the password waits for its check. None goes before all unknown origins."""
        return None if self.is_known_here else self.stranger

    @property
    def _counted(self) -> dict[str, Waits]:
        """The ids that a failure counts for, each with its waits."""
        if self.is_known_here:
            return {self.here: self.by_name}
        here = UNDER_ATTACK if self.is_under_attack else self.by_name
        return {self.here: here, **dict(zip(self.networks, IN_NETWORK, strict=False)), self.place: self.by_place}

    def require_no_wait(self, seen: Mapping[str, Remembered]) -> None:
        """Raises RateLimited while one of the counted ids has a wait."""
        for id_ in self._counted:
            _require_no_wait(seen.get(id_, NOTHING))

    async def failed(self) -> Attack | None:
        """Count a failure. Returns the attack that it belongs to if an alarm is due, else None.

        Raises RateLimited if a wait began after `begin`. The answer must not reveal then that the password was wrong.
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
        """Take back the failures of this name at this address.

        Raises RateLimited if a wait began after `begin`. The answer must not reveal then that the password was right.
        """
        self.require_no_wait(await FailedLogins.remembered(list(self._counted)))
        before = await FailedLogins.make_known(self.here, self.name)
        if not self.is_known_here:
            await FailedLogins.take_back([self.name, self.place, *self.networks], before.failures)


def _require_no_wait(known: Remembered) -> None:
    if known.left_seconds > 0:
        message = "Too many failed logins; please wait and try again."
        raise RateLimited(message, retry_after_seconds=math.ceil(known.left_seconds))
