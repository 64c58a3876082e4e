"""The log beside the signed heads that are kept outside of the database: what these do not bear out, in words.

A restore asks about the newest and is waited for; a check asks about all.
"""

import json
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Self

from app.backups import Tell
from app.documents.base import as_text, now
from app.documents.events import AuditEvent
from app.documents.tree import HEADS, AuditKey, AuditTree, KeptHead, node_hashes
from app.domain.log_check import CLOCK_AHEAD, Head
from app.domain.merkle import fold, subtrees
from storage.evidence import EvidenceNotFound, EvidenceStore

#: Days of heads that a restore lists at most to find one of the log that it puts in place.
DAYS_BACK: Final = 7
#: Heads have the time of the host that signed them, a restore has its own host's.
CLOCKS_APART: Final = timedelta(hours=1)


@dataclass(slots=True)
class HeadsOutside:
    """What the names of the heads outside tell, whatever lies under them.

    last: for each day, and for each key that was dated ahead, the last head over at most the events that were asked about.
    misfits: what contradicts the log already.
    """

    last: list[KeptHead] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)


async def heads_outside(evidence: EvidenceStore, size: int, tell: Tell) -> HeadsOutside:
    """Look at the names of all heads outside, day by day: each has the size of the log then. size: of the log to be compared."""
    found, strays = HeadsOutside(), list[str]()
    restores, days = await _Restores.known(), await _days(evidence, strays)
    # Heads are in the order of their times. Only heads of a clock that was ahead have an order of their own, for each key.
    ahead, before = await _dated_ahead(), dict[str, KeptHead]()
    largest: KeptHead | None = None
    for done, day in enumerate(days, start=1):
        heads = [head for head in await _heads_of(evidence, day, strays) if not restores.excuse(head)]
        for head in heads:
            order = head.key_id if head.key_id in ahead else ""
            former = before.get(order, head)
            if head.size < former.size:
                found.misfits.append(
                    f"the log was set back from {former.size} events ({former.name}) to {head.size} ({head.name})"
                )
            before[order] = head
            if largest is None or head.size > largest.size:
                largest = head
        orders = {head.key_id if head.key_id in ahead else "": head for head in heads if head.size <= size}
        found.last += orders.values()
        tell("tree heads outside, days", done, len(days))
    if largest is not None:  # the log may have grown while they were listed
        found.misfits += _cut_off(largest, (await AuditTree.current()).size)
    found.misfits += _told(strays)
    return found


async def misfit_of(evidence: EvidenceStore, kept: KeptHead, root: bytes | None) -> str | None:
    """What is wrong with a head outside, in words. root: of the log's first events, as many as it is over; None: not known."""
    try:
        head = Head.of(json.loads(await evidence.read(kept.name)))
    except (ValueError, RecursionError, EvidenceNotFound):
        return f"{kept.name} is no tree head"
    if KeptHead.name_of(head) != kept.name:
        return f"{kept.name} holds the head of another time, size or key"
    key = await AuditKey.get(head.key_id)
    if key is None:
        return f"{kept.name} is signed by key {head.key_id}, which the store does not know"
    if not head.is_signed_by(key.public):
        return f"{kept.name} does not bear the signature of its key"
    if root is None or root.hex() != head.root_hash:
        return f"the first {kept.size} events are not those that {kept.name} was signed over"
    return None


async def misfits_outside(evidence: EvidenceStore, tree: AuditTree) -> list[str]:
    """What of the newest heads outside the log as it stands does not bear out, in words: a restore waits for the answer.

    The newest of all tells what is lost; the newest within the log, what was changed. No more days are listed than must be.
    """
    strays: list[str] = []
    days = (await _days(evidence, strays))[::-1]
    # The log tells itself when its last head was signed.
    until = None if tree.signed_at is None else KeptHead.names_at(as_text(tree.signed_at))
    nearby = [day for day in days if until is None or day <= until]
    # Heads of a clock that was ahead are in folders of future days. The newest head of all is in another folder.
    today = KeptHead.names_at(as_text(now() + CLOCKS_APART))
    tops = list(dict.fromkeys([*days[:1], *[day for day in days if day <= today][:1]]))
    newest: KeptHead | None = None
    within: KeptHead | None = None
    for looked_at, day in enumerate(dict.fromkeys([*tops, *nearby[:DAYS_BACK], *days[1:DAYS_BACK]]), start=1):
        heads = await _heads_of(evidence, day, strays)
        if heads and (newest is None or heads[-1].name > newest.name or (day in tops and heads[-1].size > newest.size)):
            newest = heads[-1]
        if within is None:
            within = next((head for head in reversed(heads) if 0 < head.size <= tree.size), None)
        if newest is not None and within is not None and looked_at >= len(tops):
            break
    misfits = [] if newest is None else _cut_off(newest, tree.size)
    if within is not None:
        misfit = await misfit_of(evidence, within, await _root(within.size))
        misfits += [] if misfit is None else [misfit]
    return misfits + _told(strays)


@dataclass(frozen=True, slots=True)
class _Restores:
    """The restores that the log tells of. Each left honest heads behind, over events that are lost."""

    active: str
    known_keys: frozenset[str]
    #: How names of heads begin that were surely signed after it, and how much of the log was in its backup.
    by: tuple[tuple[str, int], ...]

    @classmethod
    async def known(cls) -> Self:
        """By the log as it stands."""
        told = AuditEvent.find({"action": "backup.restore", "outcome": "success"})
        by = [(KeptHead.names_at(as_text(one.time + CLOCKS_APART)), one.detail.get("log_size")) async for one in told]
        sizes = [(after, size) for after, size in by if isinstance(size, int)]
        keys = frozenset([key.id async for key in AuditKey.find_all()])
        return cls((await AuditKey.active()).id, keys, tuple(sizes))

    def excuse(self, head: KeptHead) -> bool:
        """Whether the log need not bear out this head. Never one of the key in use, for each restore brings a new one.

        A key that the documents do not know was made in a log that a later restore put away wholly.
        """
        if head.key_id == self.active:
            return False
        is_foreign = head.key_id not in self.known_keys
        return any(head.name < after and (is_foreign or head.size > size) for after, size in self.by)


async def _dated_ahead() -> frozenset[str]:
    """The keys that the log says were replaced because the clock was ahead."""
    told = AuditEvent.find({"action": "audit.rotate_key", "outcome": "success"})
    return frozenset([
        str(one.detail.get("former")) async for one in told if str(one.detail.get("reason")).startswith(CLOCK_AHEAD)
    ])  # fmt: skip


async def _days(evidence: EvidenceStore, strays: list[str]) -> list[str]:
    """The folders of heads, a day each, from the oldest."""
    found = [HEADS + entry for entry in await evidence.entries(HEADS)]
    strays += [name for name in found if not name.endswith("/")]
    return [name for name in found if name.endswith("/")]


async def _heads_of(evidence: EvidenceStore, day: str, strays: list[str]) -> list[KeptHead]:
    """A day's heads, from the oldest; strays: names there that no head has."""
    named = [(name, KeptHead.named(name)) for name in await evidence.names(day)]
    strays += [name for name, head in named if head is None]
    return [head for _, head in named if head is not None]


def _cut_off(head: KeptHead, size: int) -> list[str]:
    if head.size <= size:
        return []
    lost = f"event {size} is lost" if head.size - 1 == size else f"events {size} to {head.size - 1} are lost"
    return [f"the log ends after {size} events, and a head over {head.size} is known ({head.name}): {lost}"]


def _told(strays: list[str]) -> list[str]:
    if not strays:
        return []
    more = f", nor are {len(strays) - 1} more names there" if strays[1:] else ""
    return [f"{strays[0]} is no tree head{more}"]


async def _root(size: int) -> bytes | None:
    """The root over the first events, from the tree's own nodes; None when some of them are gone."""
    nodes = list(subtrees(0, size))
    try:
        hashes = await node_hashes(nodes)
    except KeyError:
        return None
    return fold([hashes[node] for node in nodes])
