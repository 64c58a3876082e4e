"""The second factor of people: one-time codes from an authenticator (TOTP, RFC 6238).

A code of six digits holds for its 30 seconds and the ones before and after, and counts once: the time step of the newest one
used is kept with the user.
"""

import hmac
import re
from typing import Final

import pyotp

from app.documents.accounts import User, totp_bound
from app.documents.base import now
from app.keys import KeyRing

ISSUER: Final = "Idem"
STEP_SECONDS: Final = 30
#: For clocks that differ, and people who type slowly.
STEPS_AROUND: Final = (-1, 0, 1)

_CODE = re.compile(r"[0-9]{6}")


def new_totp() -> str:
    """A fresh secret: 160 bits in base32, as authenticators take it."""
    return pyotp.random_base32()


def totp_uri(secret: str, username: str) -> str:
    """What an authenticator reads from a QR code."""
    return pyotp.TOTP(secret, interval=STEP_SECONDS).provisioning_uri(name=username, issuer_name=ISSUER)


def sealed_totp(keys: KeyRing, secret: str, user_id: str) -> bytes:
    """The secret as it is stored with the user."""
    return keys.seal_with_master(secret.encode(), totp_bound(user_id))


def step_of(keys: KeyRing, user: User, code: str | None) -> int | None:
    """The time step whose code this is, later than the last one used; None when it is none, or the user has no secret.

    Whoever accepts the code records the step, in a write that compares the one before it. Raises SealBroken.
    """
    given = (code or "").replace(" ", "")
    if user.sealed_totp is None or _CODE.fullmatch(given) is None:
        return None
    secret = keys.open_with_master(user.sealed_totp, totp_bound(user.id)).decode()
    totp, present = pyotp.TOTP(secret, interval=STEP_SECONDS), int(now().timestamp()) // STEP_SECONDS
    # All three are compared, so that the time does not tell which one it was.
    around = [present + one for one in STEPS_AROUND]
    found = [step for step in around if hmac.compare_digest(totp.generate_otp(step), given)]
    later = [step for step in found if step > user.totp_step]
    return later[0] if later else None
