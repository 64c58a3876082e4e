"""Who calls, and what they may do and see."""

import ipaddress
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

from app.domain.spelling import canonical, first_canonical

CallerKind = Literal["user", "client"]

#: A provider gives at least this much of IPv6 to one customer (RFC 6177), who may use any address of it.
_IPV6_PREFIX: Final = 64
#: The wider networks that one party may have many addresses of: what a site and what a provider is given (RFC 6177), and the
#: sizes of IPv4 networks that are routed and rented out.
_WIDER: Final = {4: (24, 16), 6: (48, 32)}
#: Longer usernames are nobody's: they are not even looked for, and compared as they are.
USERNAME_MAXIMUM: Final = 64


class Role(StrEnum):
    """What a caller may do; one or more per caller. An admin is not an officer unless given that role too."""

    ADMIN = "admin"
    OFFICER = "officer"
    RELYING_APP = "relying_app"
    AUDITOR = "auditor"
    ENROLLER = "enroller"


#: Roles for people, and roles for client applications. No role is for both.
USER_ROLES: Final = frozenset({Role.ADMIN, Role.OFFICER, Role.AUDITOR})
CLIENT_ROLES: Final = frozenset({Role.RELYING_APP, Role.ENROLLER})


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller, as the database knew them at most half a second ago.

    galleries: ids, because a later gallery may have the same name; None means all, () none. token_id: the access token's
    `jti`; session_id: the login that a person's token belongs to, None for clients. audiences: what a client may ask an
    assertion to be made for, its own id first; () for people.
    """

    id: str
    kind: CallerKind
    name: str
    roles: frozenset[Role]
    galleries: tuple[str, ...] | None
    token_id: str
    session_id: str | None = None
    audiences: tuple[str, ...] = ()

    def has(self, *roles: Role) -> bool:
        """Whether the caller has one of these very roles; no role contains another."""
        return not self.roles.isdisjoint(roles)

    @property
    def sees_own_enrolments_only(self) -> bool:
        """Whether they may read the verdicts of their own enrolments and nothing else about people."""
        return self.has(Role.ENROLLER) and not self.has(Role.OFFICER)

    def may_see(self, gallery_id: str) -> bool:
        """Whether the gallery of this id is among theirs."""
        return may_see(self.galleries, gallery_id)

    def may_keep(self, galleries: Sequence[str] | None) -> bool:
        """Whether they may make, change or see an account that is bound to these galleries (ids; None: to none).

        Nobody gives more than they have, or takes over somebody who has more.
        """
        if self.galleries is None:
            return True
        return galleries is not None and set(galleries) <= set(self.galleries)


def may_see(galleries: Collection[str] | None, gallery_id: str) -> bool:
    """Whether a grant contains the gallery of this id. galleries: ids; None means all."""
    return galleries is None or gallery_id in galleries


def found_score(caller: Caller | None, score: float) -> float | None:
    """What the caller may see of a search's score: officers all of it, relying apps nothing.

    A search has no claimed identity whose attempts it could use up, so it shows no score that could be climbed.
    """
    return score if caller is not None and caller.has(Role.OFFICER) else None


def shown_score(caller: Caller | None, score: float) -> float:
    """What the caller may see of a score: officers all of it, relying apps two decimals.

    A fine score would guide somebody who changes a photo step by step until it matches.
    """
    return score if caller is not None and caller.has(Role.OFFICER) else round(score, 2)


def username_key(username: str) -> str:
    """A username as it is compared: two spellings that are one for `spelling.canonical` do not tell two people apart."""
    if len(username) > USERNAME_MAXIMUM:
        return username  # to order the marks on one letter takes the square of their number, while everybody waits
    return canonical(username)


def former_username_key(username: str) -> str:
    """A username as it was compared before December 2026. Users who were made then may have this key."""
    return username if len(username) > USERNAME_MAXIMUM else first_canonical(username)


def subscriber(address: str) -> str:
    """Whom an address stands for: itself, or the network that an IPv6 subscriber is given. Odd text stands for itself."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64] or "nowhere"
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))


def wider_networks(address: str) -> tuple[str, ...]:
    """The networks that a subscriber's address lies in, the narrowest first. Odd text lies in none."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ()
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return tuple(str(ipaddress.ip_network((parsed, bits), strict=False)) for bits in _WIDER[parsed.version])
