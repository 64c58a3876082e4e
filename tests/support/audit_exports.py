"""An audit log without a service: events, their tree, signed heads, exports whole and in part, and ways to tamper with them."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.domain.log_check import Head
from app.domain.log_export import (
    SALT_BYTES,
    Form,
    Json,
    Line,
    canonical,
    encoded,
    head_bytes,
    heading,
    leaf_bytes,
    without_events,
)
from app.domain.merkle import Growth, Node, leaf_hash, subtrees

ACTIONS = ("auth.login", "identity.enrol", "face.verify", "dedup.verdict", "identity.erase")


@dataclass
class Log:
    """A log that grows by events from a seed."""

    seed: int
    key_id: str = "key-1"
    lines: list[Line] = field(default_factory=list)
    nodes: dict[Node, bytes] = field(default_factory=dict)
    heads: list[Head] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)  # noqa: S311 - to be had again
        self.key = Ed25519PrivateKey.from_private_bytes(self.chance.randbytes(32))
        self.growth = Growth()

    @property
    def keys(self) -> dict[str, bytes]:
        return {self.key_id: self.key.public_key().public_bytes_raw()}

    def grow(self, count: int) -> "Log":
        """Add events, some by nobody or by the system, some whose names were forgotten."""
        for _ in range(count):
            self.add(self.event())
        return self

    def add(self, line: Line) -> None:
        """Add one event, with its hash."""
        line["seq"] = self.growth.size
        line["leaf_hash"] = leaf_hash(leaf_bytes(line)).hex()
        self.nodes[0, self.growth.size] = bytes.fromhex(str(line["leaf_hash"]))
        self.nodes |= dict(self.growth.add(self.nodes[0, self.growth.size]))
        self.lines.append(line)

    def event(self) -> Line:
        """An event that is not in the tree yet."""
        chance, seq = self.chance, self.growth.size
        kind = chance.choice(["user", "client", "anonymous", "system"])
        name = f"Zoë {chance.randrange(99)}" if kind in ("user", "client") else None
        ip = f"192.0.2.{chance.randrange(256)}" if kind != "system" else None
        own = f"request-{chance.randrange(999)}" if chance.random() < 0.5 else None
        reason = f"asked for by Zoë {chance.randrange(99)}" if kind == "user" else None
        named = {
            "actor.name": name, "actor.ip": ip, "request_id": own, "detail.pending.reason": reason, "detail.reason": reason,
        }  # fmt: skip
        fields: list[Json] = [field_name for field_name, value in named.items() if value is not None]
        personal: Json = {"fields": fields, "salt": chance.randbytes(SALT_BYTES).hex()} if fields else None
        actor: Json = {"kind": kind, "id": chance.choice([None, "id-1"]), "name": name, "ip": ip}
        return {
            "id": f"0000-{seq}-{chance.randrange(10**6)}", "seq": seq,
            "time": f"2026-11-21T09:{seq // 60:02d}:{seq % 60:02d}.000Z", "actor": actor, "action": chance.choice(ACTIONS),
            "subject": {"kind": "identity", "id": f"person-{chance.randrange(9)}"},
            "outcome": chance.choice(["success", "denied", "failure"]), "gallery": chance.choice([None, "default", "north"]),
            "request_id": own or f"ours-{seq}", "detail": {
                "score": chance.choice([0.36, 1.0, -1, None]), "why": "a;=b",
                "changes": {"verify_fmr": {"old": 0.0001, "new": 1e-7}, "retention_days": {"old": None, "new": 30}},
                "reason": reason, "pending": {"reason": reason},
            },
            "leaf_hash": "", "personal": personal, "skipped": [], "end": None,
        }  # fmt: skip

    def sign(self, time: str | None = None) -> Head:
        """A head over the log as it stands."""
        size, root = self.growth.size, self.growth.root.hex()
        time = time or f"2026-11-21T10:{len(self.heads) // 60:02d}:{len(self.heads) % 60:02d}.000Z"
        signature = self.key.sign(head_bytes(size, root, time, self.key_id)).hex()
        self.heads.append(Head(size, root, time, self.key_id, signature))
        return self.heads[-1]

    def exported(self, chosen: Sequence[int] | None = None, head: Head | None = None) -> list[Line]:
        """The lines of an export: of all events or those that are chosen; under a head over all, or as it was at an older one."""
        if head is None:
            head = self.heads[-1] if self.heads and self.heads[-1].size == self.growth.size else self.sign()
        lines: list[Line] = []
        before = 0
        for seq in chosen if chosen is not None else range(head.size):
            lines.append(self.lines[seq] | {"skipped": self._hashes(before, seq)})
            before = seq + 1
        end: Json = {"head": head.as_json(), "skipped": self._hashes(before, head.size)}
        return [*lines[:-1], lines[-1] | {"end": end}] if lines else [without_events(end)]

    def _hashes(self, start: int, stop: int) -> list[Json]:
        return [self.nodes[node].hex() for node in subtrees(start, stop)]


def as_file(lines: Sequence[Line], form: Form = "ndjson") -> list[bytes]:
    """The export's file, line by line."""
    return [part for part in (heading(form), *(encoded(line, form) for line in lines)) if part]


def rehashed(line: Line) -> Line:
    """A line whose leaf_hash was put right by whoever changed it."""
    return line | {"leaf_hash": leaf_hash(leaf_bytes(line)).hex()}


def _edited(chance: random.Random, lines: list[Line]) -> list[Line]:
    """One value of one event, with or without a new hash."""
    place = chance.randrange(len(lines))
    line: Line = json.loads(canonical(lines[place]))
    holder: dict[str, Json] = line
    path = chance.choice([name for name in line if name not in ("personal", "skipped", "end", "seq")])
    while isinstance(inner := holder[path], dict):
        holder, path = inner, chance.choice(list(inner))
    old = holder[path]
    holder[path] = chance.choice([value for value in ("changed", None, 7, 0.25, True) if value != old])
    try:
        lines[place] = rehashed(line) if chance.random() < 0.5 and path != "leaf_hash" else line
    except ValueError:
        lines[place] = line
    return lines


def _without_names(chance: random.Random, lines: list[Line]) -> list[Line]:
    """The salt changed, or lengthened by what keeps its HMACs, or the list of what it hashes gone."""
    places = [place for place, line in enumerate(lines) if line["personal"] is not None]
    place = chance.choice(places)
    line: Line = json.loads(canonical(lines[place]))
    personal = line["personal"]
    assert isinstance(personal, dict)
    if chance.random() < 0.6:
        personal["salt"] = chance.choice([chance.randbytes(SALT_BYTES).hex(), f"{personal['salt']}00"])
    else:
        line["personal"] = None
    lines[place] = line
    return lines


def _deleted(chance: random.Random, lines: list[Line]) -> list[Line]:
    """Some events in a row gone, not the last one."""
    start = chance.randrange(len(lines) - 1)
    del lines[start : min(start + chance.choice([1, 1, 2, 5]), len(lines) - 1)]
    return lines


def _cut(chance: random.Random, lines: list[Line]) -> list[Line]:
    """The last events gone, with or without the end moved up."""
    kept = lines[: -chance.randrange(1, len(lines))]
    if chance.random() < 0.5:
        kept[-1] = kept[-1] | {"end": lines[-1]["end"]}
    return kept


def _inserted(chance: random.Random, lines: list[Line]) -> list[Line]:
    """An event doubled, or one that never was, with a number of its own or none."""
    place = chance.randrange(len(lines) + 1)
    new = rehashed(chance.choice(lines) | {"end": None} | chance.choice([{}, {"id": "never"}, {"seq": place}]))
    return [*lines[:place], new, *lines[place:]]


def _reordered(chance: random.Random, lines: list[Line]) -> list[Line]:
    """Two events in each other's place, their numbers with them or not."""
    one, other = sorted(chance.sample(range(len(lines)), 2))
    keeps = {"end"} | ({"seq"} if chance.random() < 0.5 else set())
    first, second = lines[one], lines[other]
    lines[one] = rehashed(second | {name: first[name] for name in keeps})
    lines[other] = rehashed(first | {name: second[name] for name in keeps})
    return lines


def _forged_end(chance: random.Random, lines: list[Line]) -> list[Line]:
    """The head at the end changed, as far as one can without the key."""
    end = lines[-1]["end"]
    assert isinstance(end, dict)
    head = end["head"]
    assert isinstance(head, dict)
    changed = {
        "size": chance.randrange(len(lines)), "root_hash": chance.randbytes(32).hex(), "time": "2026-11-21T23:00:00.000Z",
        "key_id": "key-2", "signature": chance.randbytes(64).hex(),
    }  # fmt: skip
    name = chance.choice(list(changed))
    lines[-1] = lines[-1] | {"end": {**end, "head": {**head, name: changed[name]}}}
    return lines


def older(chance: random.Random, log: Log) -> list[Line]:
    """The whole export as it was before the last events, under the head that was signed then."""
    return log.exported(head=chance.choice([head for head in log.heads if 0 < head.size < log.growth.size]))


LINE_TAMPERINGS: tuple[Callable[[random.Random, list[Line]], list[Line]], ...] = (
    _edited, _edited, _edited, _without_names, _deleted, _cut, _inserted, _reordered, _forged_end,
)  # fmt: skip


def tampered(
    chance: random.Random, log: Log, lines: Sequence[Line], form: Form = "ndjson"
) -> tuple[str, list[bytes], list[Head]]:
    """What was done, the export's file after it (by events, or one byte of it), and the heads that it takes to find it."""
    what = chance.random()
    if what < 0.1:
        return "older", as_file(older(chance, log), form), log.heads
    if what < 0.3:
        text = bytearray(b"".join(as_file(lines, form)))
        place = chance.randrange(len(text))
        text[place] ^= 1 << chance.randrange(8)
        return f"byte {place}", _as_lines(bytes(text)), []
    while True:
        how = chance.choice(LINE_TAMPERINGS)
        changed = how(chance, list(lines))
        if changed != list(lines):
            return how.__name__, as_file(changed, form), []


def _as_lines(text: bytes) -> list[bytes]:
    """As a file is read: apart at line feeds only."""
    parts = text.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def resigned(log: Log, head: Head, **changed: object) -> Head:
    """The head with other values, signed with the log's own key."""
    new = replace(head, **changed)  # type: ignore[arg-type]
    signature = log.key.sign(head_bytes(new.size, new.root_hash, new.time, new.key_id)).hex()
    return replace(new, signature=signature)
