"""Failed logins cost time: back-off by name and by address, and never a lock-out.

Each failure counts against the name (a user's, a client's, or nobody's: they are not told apart) and against the
address. An address from which the name succeeded lately stands for itself: there only its own failures with that name
count, so that nobody elsewhere can keep somebody out, and one person's slips do not make a whole office wait.

Whoever waits learns nothing: not before the password is looked at, and not after it, when the wait began in between.
So however many guesses come at once, no more are answered than were left. Only who shares an address can tell, while it
waits, which names stand for themselves there (docs/adr/0025).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from app.config import Settings
from app.documents.failed_logins import NOTHING, FailedLogins, Remembered, Waits
from app.domain.callers import subscriber
from app.errors import RateLimited
from app.keys import KeyRing


class Backoff:
    """Counts failed logins in MongoDB, for all processes together. Without MongoDB nobody logs in."""

    def __init__(self, settings: Settings, keys: KeyRing) -> None:
        """Names and addresses are stored as keyed hashes only."""
        first, longest = settings.login_wait_seconds, settings.login_wait_maximum_seconds
        self._by_name = Waits(settings.login_failures_before_wait, first, longest)
        self._by_place = Waits(settings.address_failures_before_wait, first, longest)
        self._keys = keys

    async def begin(self, name: str, address: str | None) -> "Attempt":
        """An attempt to log in with this name from this address, before anything of it is looked at.

        Raises RateLimited while there is a wait.
        """
        place = subscriber(address or "")
        attempt = Attempt(
            name=self._id("name", name),
            place=self._id("place", place),
            here=self._id("name-at-place", f"{name}\0{place}"),
            by_name=self._by_name,
            by_place=self._by_place,
        )
        seen = await FailedLogins.remembered([attempt.name, attempt.place, attempt.here])
        attempt = replace(attempt, is_known_here=seen.get(attempt.here, NOTHING).is_known)
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

    name, place and here (both together) are ids of what is remembered of them.
    """

    name: str
    place: str
    here: str
    by_name: Waits
    by_place: Waits
    is_known_here: bool = False

    @property
    def _counted(self) -> dict[str, Waits]:
        """What a failure counts against, and what makes it wait."""
        return {self.here: self.by_name} if self.is_known_here else {self.name: self.by_name, self.place: self.by_place}

    def require_no_wait(self, seen: Mapping[str, Remembered]) -> None:
        """Raises RateLimited while one of what counts has to wait."""
        for id_ in self._counted:
            _require_no_wait(seen.get(id_, NOTHING))

    async def failed(self) -> None:
        """Count a failure. Raises RateLimited when a wait began since: then the failure must not be told."""
        for id_, waits in self._counted.items():
            _require_no_wait(await FailedLogins.note_failure(id_, waits))
        if not self.is_known_here:
            # What a success takes back from the address.
            await FailedLogins.note_failure(self.here, self.by_name, self.name)

    async def succeeded(self) -> None:
        """Take back the failures of this name. Raises RateLimited when a wait began since: nothing must be told."""
        self.require_no_wait(await FailedLogins.remembered(list(self._counted)))
        before = await FailedLogins.make_known(self.here, self.name)
        if not self.is_known_here:
            await FailedLogins.forget(self.name)
            await FailedLogins.take_back(self.place, before.failures)


def _require_no_wait(known: Remembered) -> None:
    if known.left_seconds > 0:
        message = "Too many failed logins; please wait and try again."
        raise RateLimited(message, retry_after_seconds=math.ceil(known.left_seconds))
