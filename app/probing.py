"""Rules for callers that compare faces: nonces, replays, attempts and budgets.

Verification and identification use the same rules. So a caller cannot avoid the rules of one by using the other
(docs/adr/0050).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import structlog
from prometheus_client import Counter
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from app.audit import Action, by_system, record
from app.concurrency import both
from app.config import Settings
from app.documents.base import now
from app.documents.budgets import FaceBudget, Finds, NonMatches, UnknownNames, this_hour
from app.documents.challenges import NONCE_PREFIX, Challenge, challenge_id
from app.documents.claims import Once
from app.documents.events import Detail
from app.documents.identities import Identity
from app.domain.callers import Role
from app.domain.faces import Embedding
from app.domain.near_copies import bucket
from app.domain.policy import AttemptLimits, wait_before_attempt
from app.errors import Advice, AttemptsExhausted, AuditRefused, NonceInvalid, RateLimited, ReplayedPhoto
from app.keys import KeyRing

log = structlog.get_logger(__name__)

PROBING = Counter(
    "idem_probing_total", "Signs of slow probing: faces, names and finds over budget, callers over the alarm", ["sign"]
)
#: Retry-After for an identity that an officer must reset. The time of the reset is not known, so clients ask once a day.
A_DAY_SECONDS: Final = 24 * 3600


@dataclass(frozen=True, slots=True)
class Marks:
    """Digests that show that a photo was presented before.

    picture: digest of its decoded pixels. file: SHA-256 of its bytes. Versions before 2026-12 stored `file` only.
    """

    picture: bytes
    file: bytes


def binds(action: Action) -> bool:
    """Whether the rules of relying applications bind the caller. They bind every caller without the role of officer."""
    return action.caller is not None and not action.caller.has(Role.OFFICER)


class Probing:
    """The rules, with the settings and keys that they need. Each process has one."""

    def __init__(self, settings: Settings, keys: KeyRing) -> None:
        self._settings = settings
        self._keys = keys

    def part_of(self, embedding: Embedding, contract: str) -> int:
        """The part of the space that a face lies in. Copies of a photo mostly share one."""
        return bucket(embedding, self._keys.keyed_hash("face-parts", contract.encode()))

    async def challenge_of(
        self, action: Action, gallery_id: str, identity_id: str | None, nonce: str | None, *, is_required: bool
    ) -> str | None:
        """The id of the challenge that the nonce belongs to. None for a caller's own nonce, and without a nonce.

        identity_id: the claimed identity. None in a search: only a nonce without an identity is valid there. Raises
        NonceInvalid for a nonce that is not valid, before any work on the photo. Only `use` uses the challenge up.
        """
        text = nonce or ""
        if not text.startswith(NONCE_PREFIX):
            if is_required:
                raise _bad_nonce()
            return None
        id_ = challenge_id(self._keys, text)
        if not await Challenge.waits(id_, action.actor_id, gallery_id, identity_id):
            raise _bad_nonce()
        return id_

    async def use(
        self,
        action: Action,
        gallery_id: str,
        identity_id: str | None,
        challenge: str | None,
        session: AsyncClientSession,
    ) -> None:
        """Use the challenge up, if there is one. Raises NonceInvalid if another request has used it already."""
        if challenge is not None and not await Challenge.use(
            challenge, action.actor_id, gallery_id, identity_id, session
        ):
            raise _bad_nonce()

    async def require_new(self, presented_to: str, marks: Marks, session: AsyncClientSession) -> None:
        """Record that the photo was presented. Raises ReplayedPhoto if it was presented here before.

        presented_to: id of the identity or gallery.
        """
        ids = [
            self._keys.keyed_hash("presented-picture", presented_to.encode() + marks.picture).hex(),
            self._keys.keyed_hash("presented", presented_to.encode() + marks.file).hex(),
        ]
        if not await Once.are_first(ids, timedelta(hours=self._settings.replay_window_hours), session):
            raise ReplayedPhoto("Please take a new photo.")

    def wait_for(self, identity: Identity) -> timedelta | None:
        """How long comparisons with the identity are refused. Zero: not at all. None: until an officer resets the attempts."""
        settings, attempts = self._settings, identity.attempts
        limits = AttemptLimits(
            settings.attempts_before_wait,
            timedelta(seconds=settings.attempts_wait_seconds),
            settings.attempts_before_reset,
        )
        return wait_before_attempt(attempts.consecutive, attempts.last_failure, now(), limits)

    def require_attempts_left(self, identity: Identity) -> None:
        """Raises AttemptsExhausted while comparisons with the identity are refused."""
        wait = self.wait_for(identity)
        if wait is None:
            raise AttemptsExhausted(
                "An officer must reset the attempts on this identity.", retry_after_seconds=A_DAY_SECONDS
            )
        if wait > timedelta(0):
            seconds = int(wait.total_seconds()) + 1
            raise AttemptsExhausted(f"Please wait {seconds} seconds.", retry_after_seconds=seconds)

    async def admit_claim(self, action: Action, part: int, name: str, session: AsyncClientSession | None) -> None:
        """Count a claim on a name against the budget of its face. Raises RateLimited beyond the budget.

        name: the identity's id, or a substitute id for a name that no identity has.
        """
        limit = self._settings.probe_identities_per_hour
        if not await FaceBudget.admits(self._keys, action.actor_id, part, name, limit, session):
            raise self._probing(action, "face", "You have asked about too many people with this face.")

    async def admit_finds(self, action: Action, part: int, identity_ids: Sequence[str]) -> set[str]:
        """Count the identities that a search found. Returns those that the caller may see.

        An identity that this caller found too often within the hour is left out. The answer then equals one that does not find
        the identity. Raises RateLimited when the budget of the face is spent, even if the search found no identity.
        """
        settings, keys, caller = self._settings, self._keys, action.actor_id
        # Both run at the same time, because the answer waits for both. Finds count even if the face has no room left. That only
        # makes the rule stricter.
        has_room, totals = await both(
            FaceBudget.admits_finds(keys, caller, part, identity_ids, settings.probe_identities_per_hour),
            Finds.add_all(keys, caller, identity_ids),
        )
        if not has_room:
            raise self._probing(action, "face", "You have asked about too many people with this face.")
        limit = settings.finds_per_identity_per_hour
        for identity_id, total in totals.items():
            if total == limit + 1:
                await self._alarm(action, "find", {"identity_id": identity_id, "finds": limit})
        return {identity_id for identity_id, total in totals.items() if total <= limit}

    async def count_unknown(self, action: Action) -> bool:
        """Count a claim on a name that no identity has, or none that the caller may see. Returns whether the budget has room.

        Officers have no such budget, because they may list all identities. Reaching the limit raises an alarm.
        """
        if not binds(action):
            return True
        limit = self._settings.unknown_names_per_hour
        total = await UnknownNames.add(self._keys, action.actor_id)
        if total == limit:
            await self._alarm(action, "name", {"unknown_names": limit})
        return total <= limit

    async def has_names_left(self, action: Action) -> bool:
        """Whether the caller may still ask about unknown names within the hour. Officers always may."""
        if not binds(action):
            return True
        return await UnknownNames.so_far(self._keys, action.actor_id) < self._settings.unknown_names_per_hour

    async def require_names_left(self, action: Action) -> None:
        """Raises RateLimited where the caller has asked about too many unknown names within the hour."""
        if not await self.has_names_left(action):
            raise self.too_many_names(action)

    def too_many_names(self, action: Action) -> RateLimited:
        """The refusal of a caller that has asked about too many unknown names."""
        return self._probing(action, "name", "You have asked about too many names that no identity has.")

    async def count_non_match(self, action: Action) -> None:
        """Count a non-match for the caller. The count that reaches the limit raises an alarm. The answer does not change."""
        alarm = self._settings.non_matches_alarm_per_hour
        try:
            if await NonMatches.add(self._keys, action.actor_id) == alarm:
                await self._alarm(action, "caller", {"non_matches": alarm})
        except PyMongoError as failure:
            log.warning("non_match_not_counted", caller=action.actor_id, error=type(failure).__name__)

    async def _alarm(self, action: Action, sign: str, detail: Detail) -> None:
        """Raise an alarm about the caller: an audit event, a log line, and the metric."""
        PROBING.labels(sign).inc()
        log.warning("probing_alarm", sign=sign, caller=action.actor_id, **detail)
        kind = "system" if action.caller is None else action.caller.kind
        try:
            await record(
                None, by_system("face.alarm"), subject_kind=kind, subject_id=action.actor_id, detail=detail
            )  # fmt: skip
        except (PyMongoError, AuditRefused) as failure:
            log.warning("alarm_not_recorded", caller=action.actor_id, error=type(failure).__name__)

    def _probing(self, action: Action, sign: str, message: str) -> RateLimited:
        PROBING.labels(sign).inc()
        log.warning("probing_refused", sign=sign, caller=action.actor_id)
        _, over = this_hour()
        return RateLimited(message, retry_after_seconds=int((over - now()).total_seconds()) + 1)


def _bad_nonce() -> NonceInvalid:
    """One refusal for every fault of a nonce. So it does not reveal that another caller has this nonce."""
    message = "Ask for a new nonce (POST /v1/challenges) and send it with a selfie that is taken after that."
    return NonceInvalid(message, errors=(Advice("nonce", "nonce-invalid", message),))
