"""Check an NDJSON export of the audit log with nothing but Python: `python verify_audit.py EXPORT --key KEYS [--heads PATH]`.

It shares no line with the product. docs/audit.md says what a line, a leaf, a node and a head are. The tree is RFC 9162's, the
canonical JSON RFC 8785's, the signature Ed25519 (RFC 8032), checked on every head. Exit status: 0 whole, 1 not, 2 wrong use.
"""
# ruff: noqa: ANN001, ANN201, ANN204, BLE001, C901, D101, D102, D103, PLR2004, TRY301

import argparse
import functools
import hmac
import itertools
import json
import pathlib
import re
import sys
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256, sha512

LEAF = {"id", "seq", "time", "actor", "action", "subject", "outcome", "gallery", "request_id", "detail"}
BESIDE = {"leaf_hash", "personal", "skipped"}
HASH, SALT = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")
HEAD = re.compile('{"key_id":"[0-9A-Za-z_-]{1,64}","root_hash":"[0-9a-f]{64}","signature":"[0-9a-f]{128}","size":[0-9]+,'
                  '"time":"[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}[.][0-9]{3}Z"}')  # fmt: skip
P, Q = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493  # Ed25519's field, and the order of its base point
D = -121665 * pow(121666, -1, P) % P


def canonical(value) -> str:  # numbers as ECMAScript writes them
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{canonical(name)}:{canonical(value[name])}" for name in names) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if not isinstance(value, float) or value == 0:
        return json.dumps(int(value) if isinstance(value, float) else value, ensure_ascii=False)
    number = Decimal(json.dumps(value, allow_nan=False)).normalize()
    return f"{number:f}" if 1e-6 <= abs(value) < 1e21 else f"{number:e}"


def added(a, b):  # points of the curve, in extended coordinates
    k, m, c, d = (a[1] - a[0]) * (b[1] - b[0]), (a[1] + a[0]) * (b[1] + b[0]), 2 * a[3] * b[3] * D, 2 * a[2] * b[2]
    e, f, g, h = m - k, d - c, d + c, m + k
    return e * f % P, g * h % P, f * g % P, e * h % P


def point_of(data):
    y, odd = int.from_bytes(data, "little") % 2**255, data[31] >> 7
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x, i = pow(square, (P + 3) // 8, P), pow(2, (P - 1) // 4, P)
    (x,) = {r for r in (x, -x % P, x * i % P, -x * i % P) if r * r % P == square and r % 2 == odd and y < P}
    return x, y, 1, x * y % P


@functools.lru_cache(16)
def tables(key):  # what each value of each byte adds, of the base point and the key: a signature costs 64 sums
    (x, y, z, t), rows = point_of(key), []
    for point in (point_of((4 * pow(5, -1, P) % P).to_bytes(32, "little")), (P - x, y, z, P - t)):
        last = point
        for _ in range(32):
            *row, last = itertools.accumulate([last] * 256, added, initial=(0, 1, 1, 0))
            rows.append(row)
    return rows


def is_signed(key, message, signature) -> bool:
    r, s = signature[:32], signature[32:]
    factors = s + (int.from_bytes(sha512(r + key + message).digest(), "little") % Q).to_bytes(32, "little")
    x, y, z, _ = functools.reduce(added, (row[byte] for row, byte in zip(tables(key), factors, strict=True)))
    x, y = x * pow(z, -1, P) % P, y * pow(z, -1, P) % P
    return int.from_bytes(s, "little") < Q and (y + (x % 2 << 255)).to_bytes(32, "little") == r


def head_of(raw, keys):  # a signed head, or some error
    head = json.loads(raw)
    if not HEAD.fullmatch(canonical(head)):
        raise ValueError("no signed head")
    text, key = canonical({name: head[name] for name in head if name != "signature"}), keys.get(head["key_id"])
    if key is None or not is_signed(key, text.encode(), bytes.fromhex(head["signature"])):
        raise ValueError(f"not signed by a key that was given: {text}")
    return head


def parsed(raw, is_first):
    """A line and its leaf hash, None where it is an export's only line and holds no event; some error for any other form."""
    line = json.loads(raw)
    is_alone = is_first and line["end"] is not None and all(line[name] is None for name in LEAF | BESIDE)
    is_numbered = type(line["seq"]) is int and line["seq"] >= 0
    if canonical(line).encode() + b"\n" != raw or set(line) != {*LEAF, *BESIDE, "end"} or not (is_alone or is_numbered):
        raise ValueError("changed")
    leaf = {name: value for name, value in json.loads(raw).items() if name in LEAF}
    if line["personal"] is not None:
        fields, salt = line["personal"]["fields"], line["personal"]["salt"]
        order = [name for name in ("actor.name", "actor.ip", "request_id") if name in fields]
        order += sorted({name for name in fields if name.startswith("detail.")})
        if len(line["personal"]) != 2 or not fields or fields != order or not SALT.fullmatch(salt):
            raise ValueError("changed")
        for *path, key in (name.split(".") for name in fields):
            holder = functools.reduce(dict.get, path, leaf)
            holder[key] = hmac.digest(bytes.fromhex(salt), holder[key].encode(), "sha256").hex()
    return line, None if is_alone else sha256(b"\0" + canonical(leaf).encode()).digest()


class Tree:  # its complete subtrees {size: hash}, the largest first, and the roots at the sizes wanted
    def __init__(self, wanted):
        self.size, self.peaks, self.wanted, self.roots = 0, {}, wanted, {0: sha256().hexdigest()}

    def grow(self, hash_, size=1):
        self.size += size
        while size in self.peaks:
            hash_, size = sha256(b"\1" + self.peaks.pop(size) + hash_).digest(), size * 2
        self.peaks[size] = hash_
        if self.size in self.wanted:
            self.note()

    def note(self):
        hashes = [*reversed(self.peaks.values())] or [sha256().digest()]
        self.roots[self.size] = functools.reduce(lambda b, a: sha256(b"\1" + a + b).digest(), hashes).hex()

    def skip(self, hashes, stop) -> bool:  # whether the hashes, of the fewest subtrees, lead up to event `stop`
        for text in hashes if isinstance(hashes, list) else [None]:
            if self.size >= stop or not isinstance(text, str) or not HASH.fullmatch(text):
                return False
            most = 1 << (stop - self.size).bit_length() - 1
            self.grow(bytes.fromhex(text), min(most, self.size & -self.size or most))
        return self.size == stop


def check(lines, keys, heads=(), *, is_partial=False, taken_at=None):  # what does not fit; and how far the export goes
    found, good, end, size, ahead, known, fits, bad, last = [], [], None, 0, set(), {}, [0], [], {}
    for name, raw in heads:
        try:
            good.append(head_of(raw, keys))
        except Exception as fault:
            found.append(f"{name}: {fault}")
    tree = Tree({head["size"] for head in good})
    for number, raw in enumerate(lines, 1):
        try:
            line, leaf = parsed(raw, number == 1)
            seq = line["seq"] or 0
            if seq < size or end is not None:
                raise ValueError("inserted, doubled, out of order, or behind the end")
            if leaf and (not tree.skip(line["skipped"], seq) or (seq > size and not is_partial)):
                raise ValueError(f"left out, with all up to {seq - 1}")
            ahead |= {line["detail"].get("former")} if leaf and b'"the clock was ahead' in raw else set()
        except Exception as fault:
            why = fault if type(fault) is ValueError else "changed"
            return [*found, f"line {number}, event {size}: {why}"], "not read any further"
        if leaf:
            found += [f"event {seq}: changed, its hash is not its leaf_hash"] * (line["leaf_hash"] != leaf.hex())
            tree.grow(leaf)
        end, size = line["end"], tree.size
    try:
        own = head_of(canonical(end["head"]), keys)
        if len(end) != 2 or not tree.skip(end["skipped"], own["size"]) or (own["size"] > size and not is_partial):
            raise ValueError(f"this does not lead to its head, over {own['size']} events")
    except Exception as fault:
        return [*found, f"event {size}: cut off here: {fault if end else 'there is no end'}"], "nothing is proved"
    tree.note()
    most, at = max((h["size"], h["time"]) for h in [own, *good] if h is own or not taken_at or h["time"] <= taken_at)
    found += [f"event {own['size']}: cut off, with all behind it: {most} were signed at {at}"] * (most > own["size"])
    signed = sorted((h["time"], h["size"], h["root_hash"], h["key_id"]) for h in [own, *good])
    for time, size, hash_, key in signed:  # in the order of their times, except those of a key that was dated ahead
        (then, larger), last[key in ahead and key] = last.get(key in ahead and key, (time, size)), (time, size)
        found += [f"event {size}: set back, from {larger} events at {then} to {size} at {time}"] * (size < larger)
        found += [f"contradiction: two heads over {size} events, {time}"] * (known.setdefault(size, hash_) != hash_)
    for size, time, hash_ in sorted((size, time, hash_) for time, size, hash_, _ in signed if size in tree.roots):
        fits += [size] * (hash_ == tree.roots[size])
        bad += [f"event {fits[-1]}: made anew, by the head of {time} over {size}"] * (hash_ != tree.roots[size])
    told = f"{len(fits) - 1} heads fit, {len(signed) - len(fits) - len(bad) + 1} could not be compared"
    return found + bad[:1], f"up to the head of {own['time']}, over {own['size']} events; {told}"


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("export", type=pathlib.Path)
    asked.add_argument("--key", required=True, type=pathlib.Path, help="lines of ID KEY, or /v1/audit/keys' answer")
    asked.add_argument("--heads", type=pathlib.Path, help="a signed head, or a folder of them")
    asked.add_argument("--at", type=datetime.fromisoformat, help="when it was exported: later heads may be larger")
    asked.add_argument("--partial", action="store_true", help="events may be left out: other times, other galleries")
    if (given := asked.parse_args()).at and given.at.tzinfo is None:
        asked.error("--at: a time has a zone, as 2026-11-21T09:30:00Z")
    at = given.at and given.at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    try:
        text, folder = given.key.read_text(), given.heads
        rows = ((key["key_id"], key["public_key"]) for key in json.loads(text)["keys"]) if text[:1] == "{" else None
        keys = {key_id: bytes.fromhex(key) for key_id, key in rows or map(str.split, text.splitlines())}
        files = folder and ([*folder.glob("heads/**/*.json")] or [*folder.rglob("*.json")] or [folder])
        heads = ((file, file.read_bytes()) for file in sorted(files or []))
        with given.export.open("rb") as lines:
            found, end = check(lines, keys, heads, is_partial=given.partial, taken_at=at)
    except (OSError, LookupError, TypeError, ValueError) as error:
        asked.error(str(error))
    sys.stdout.write("\n".join([*found, end] if found else [f"whole: every event as it was signed, {end}"]) + "\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
