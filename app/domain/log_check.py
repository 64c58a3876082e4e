"""What an auditor can find out offline, with an export, public keys and signed tree heads: whether the log is whole.

Everything here is also in `scripts/verify_audit.py`, which an auditor can read in a sitting and which shares no line with this.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from app.domain.log_export import BadLine, Form, Json, Line, decoded, head_bytes, heading, leaf_bytes, without_events
from app.domain.merkle import Growth, leaf_hash, subtrees

_HASH: Final = re.compile(r"[0-9a-f]{64}")
_SIGNATURE: Final = re.compile(r"[0-9a-f]{128}")
#: The logged reason of a key change begins like this when the heads of the former key are dated ahead.
CLOCK_AHEAD: Final = "the clock was ahead"
#: The one form of a time, so that text order is time order.
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z")
_KEY_ID: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Head:
    """A signed tree head. time: as it was signed, RFC 3339 in UTC with milliseconds; hashes in hex."""

    size: int
    root_hash: str
    time: str
    key_id: str
    signature: str

    @classmethod
    def of(cls, value: Json) -> "Head":
        """A head out of its JSON. Raises BadLine for anything else."""
        match value:
            case {
                "size": int(size), "root_hash": str(root), "time": str(time), "key_id": str(key), "signature": str(sign),
                **rest,
            } if not rest and not isinstance(size, bool) and size >= 0:  # fmt: skip
                is_hex = _HASH.fullmatch(root) and _SIGNATURE.fullmatch(sign)
                if is_hex and _TIME.fullmatch(time) and _KEY_ID.fullmatch(key):
                    return cls(size, root, time, key, sign)
        message = "this is no signed tree head"
        raise BadLine(message)

    def as_json(self) -> dict[str, Json]:
        """Its JSON."""
        return {
            "size": self.size, "root_hash": self.root_hash, "time": self.time, "key_id": self.key_id,
            "signature": self.signature,
        }  # fmt: skip

    def is_signed_by(self, public_key: bytes) -> bool:
        """Whether the signature is that key's (32 bytes), over this very head."""
        message = head_bytes(self.size, self.root_hash, self.time, self.key_id)
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(bytes.fromhex(self.signature), message)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not fit. seq: of the first event that it is about, None where it is about none."""

    seq: int | None
    what: str


@dataclass(slots=True)
class Report:
    """What was found, and what was looked at.

    findings: the first one first. left_out: (from, up to) of events that the export does not hold, and whose hashes it does, so
    that nothing could be changed there either. heads: how many signed heads fitted; unplaced: how many were not compared,
    because they end among events left out; newer: because they were signed after the export was taken. beyond: how many should
    have been within it, and are not. head: the export's own.
    """

    findings: list[Finding] = field(default_factory=list)
    events: int = 0
    left_out: list[tuple[int, int]] = field(default_factory=list)
    heads: int = 0
    unplaced: int = 0
    newer: int = 0
    beyond: int = 0
    head: Head | None = None

    def find(self, seq: int | None, what: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(seq, what))


def check_export(
    lines: Iterable[bytes],
    form: Form,
    keys: Mapping[str, bytes],
    heads: Sequence[Head] = (),
    *,
    is_partial: bool = False,
    taken_at: str | None = None,
) -> Report:
    """Check an export, line by line as it lies in its file, against its own signed head and any others.

    keys: public keys by their ids. is_partial: events may be left out, as from the export of a time or of some galleries; not
    behind its own head. taken_at: when it was asked for, as heads have their times: later heads may be over more events than its
    own head is. Without it none may, since an older head is as genuine as the newest.
    """
    report = Report()
    trusted = [head for head in heads if _check_signature(report, head, keys)]
    reading = _Reading(report, trusted)
    own = reading.read(lines, form)
    if own is not None and _check_signature(report, own, keys):
        report.head = own
        reading.compare(own)
        _check_reach(report, own, trusted, taken_at)
        trusted.append(own)
    report.unplaced = reading.unplaced(report.head)
    _check_against_each_other(report, trusted, reading.ahead)
    if report.left_out and not is_partial:
        start, stop = report.left_out[0]
        report.find(start, f"{_events(start, stop)} left out of the export")
    return report


class _Reading:
    """One pass over an export's lines, growing the tree anew."""

    def __init__(self, report: Report, heads: Sequence[Head]) -> None:
        self._report = report
        self._tree = Growth()
        self._is_ordered = True
        #: Keys that were replaced because their heads are dated ahead, as the export says.
        self.ahead: set[str] = set()
        self._fitting = 0
        self._fit = True
        self._waiting: dict[int, list[Head]] = {}
        for head in heads:
            self._waiting.setdefault(head.size, []).append(head)
        self._reach()

    def read(self, lines: Iterable[bytes], form: Form) -> Head | None:
        """Read all of them; returns the head at the end, None where the end is missing."""
        end: Json = None
        remaining = iter(lines)
        if form == "csv" and next(remaining, b"") != heading(form):
            self._report.find(None, "the first line is not the heading of an export")
        first = 2 if form == "csv" else 1
        for number, raw in enumerate(remaining, first):
            try:
                line = decoded(raw, form)
                if number == first and line["end"] is not None and line == without_events(line["end"]):
                    end = line["end"]
                    continue
                seq, leaf = _number(line), leaf_hash(leaf_bytes(line))
            except BadLine as problem:
                # Its place is known only while all before it were in order.
                self._report.find(
                    self._tree.size if self._is_ordered else None, f"line {number} was changed: {problem}"
                )
                self._is_ordered = False
                continue
            if end is not None:
                self._report.find(seq, "it stands behind the end of the export")
            end = line["end"]
            self._take(line, seq, leaf)
        return self._finish(end)

    def compare(self, head: Head) -> None:
        """Compare the tree, as it stands, with a head of its size."""
        if self._is_ordered and head.size == self._tree.size:
            self._fits(head)
        elif self._is_ordered:
            self._report.find(
                head.size, f"there are {self._tree.size} events, and the export's head is over {head.size}"
            )

    def _take(self, line: Line, seq: int, leaf: bytes) -> None:
        stated = str(line["leaf_hash"])
        if leaf.hex() != stated:
            self._report.find(seq, "it was changed: its hash is another than its leaf_hash")
            # The tree tells whether it was the event or the hash: it goes on with the latter.
            leaf = bytes.fromhex(stated) if _HASH.fullmatch(stated) else leaf
        self._report.events += 1
        match line["detail"]:
            case {"former": str(former), "reason": str(reason)} if reason.startswith(CLOCK_AHEAD):
                self.ahead.add(former)
        if not self._is_ordered:
            return
        if seq < self._tree.size:
            self._report.find(
                seq, f"it stands where event {self._tree.size} belongs: inserted, doubled or out of order"
            )
            self._is_ordered = False
            return
        self._skip(line["skipped"], seq)
        if self._is_ordered:
            self._tree.add(leaf)
            self._reach()

    def _skip(self, skipped: Json, stop: int) -> None:
        """Go over the events up to `stop` by the hashes of their subtrees."""
        start, parts = self._tree.size, list(subtrees(self._tree.size, stop))
        hashes = skipped if isinstance(skipped, list) else [skipped]
        if len(hashes) != len(parts) or not all(isinstance(part, str) and _HASH.fullmatch(part) for part in hashes):
            missing = not hashes and start < stop
            self._report.find(
                start, f"{_events(start, stop)} missing" if missing else "what is skipped does not add up"
            )
            self._is_ordered = False
            return
        for (level, _), part in zip(parts, hashes, strict=True):
            self._tree.add(bytes.fromhex(str(part)), level)
            self._reach()
        if start < stop:
            self._report.left_out.append((start, stop))

    def _finish(self, end: Json) -> Head | None:
        match end:
            case None:
                self._report.find(self._tree.size, "cut off: the export has no end")
                return None
            case {"head": head, "skipped": skipped, **rest} if not rest:
                try:
                    own = Head.of(head)
                except BadLine as problem:
                    self._report.find(None, f"the export's end was changed: {problem}")
                    return None
                if self._is_ordered and own.size >= self._tree.size:
                    self._skip(skipped, own.size)
                return own
        self._report.find(None, "the export's end was changed")
        return None

    def _reach(self) -> None:
        for head in self._waiting.pop(self._tree.size, []):
            self._fits(head)

    def _fits(self, head: Head) -> None:
        """Compare a head with the tree at its size; once one does not fit, no later one can."""
        if head.root_hash == self._tree.root.hex():
            self._fitting = head.size
            self._report.heads += 1
        elif self._fit:
            self._fit = False
            what = f"the signed head of {head.time} over {head.size} events does not fit"
            if self._fitting < head.size:
                self._report.find(self._fitting, f"{what}: {_events(self._fitting, head.size)} made anew")
            else:
                self._report.find(None, what)

    def unplaced(self, own: Head | None) -> int:
        """How many heads, of those up to the export's own, end where it tells nothing."""
        return sum(len(heads) for size, heads in self._waiting.items() if own is None or size <= own.size)


def _number(line: Line) -> int:
    seq = line["seq"]
    if not isinstance(seq, int) or isinstance(seq, bool) or seq < 0:
        message = "it has no number"
        raise BadLine(message)
    return seq


def _check_signature(report: Report, head: Head, keys: Mapping[str, bytes]) -> bool:
    key = keys.get(head.key_id)
    if key is None:
        report.find(
            None, f"the head of {head.time} over {head.size} events is signed by {head.key_id}, a key not given"
        )
        return False
    if not head.is_signed_by(key):
        report.find(None, f"the signature on the head of {head.time} over {head.size} events is wrong")
        return False
    return True


def _check_reach(report: Report, own: Head, heads: Iterable[Head], taken_at: str | None) -> None:
    """The export reaches as far as any head that was signed before it was taken."""
    larger = [head for head in heads if head.size > own.size]
    beyond = [head for head in larger if taken_at is None or head.time <= taken_at]
    report.beyond, report.newer = len(beyond), len(larger) - len(beyond)
    if beyond:
        largest = max(beyond, key=lambda head: head.size)
        cut = _events(own.size, largest.size)
        report.find(own.size, f"{cut} cut off: {largest.size} were signed at {largest.time}")


def _check_against_each_other(report: Report, heads: Sequence[Head], ahead: AbstractSet[str]) -> None:
    """Two signed heads prove by themselves that the log was not one: of one size and two roots, or smaller with time.

    ahead: keys whose heads are dated ahead, as the log says. Their heads are ordered for each such key alone.
    """
    roots: dict[int, Head] = {}
    ordered = sorted(heads, key=lambda head: (head.time, head.size))
    for head in ordered:
        other = roots.setdefault(head.size, head)
        if other.root_hash != head.root_hash:
            report.find(
                None,
                f"two signed heads contradict each other: {other.time} and {head.time}, both over {head.size} events",
            )
    before: dict[str, Head] = {}
    for head in ordered:
        order = head.key_id if head.key_id in ahead else ""
        former = before.get(order, head)
        before[order] = head
        if head.size < former.size:
            report.find(
                head.size,
                f"the log was set back: {former.size} events were signed at {former.time}, {head.size} at {head.time}",
            )


def _events(start: int, stop: int) -> str:
    """Words for the events from `start` up to `stop`, with their verb."""
    return f"event {start} was" if stop - start == 1 else f"events {start} to {stop - 1} were"
