"""Check an NDJSON export of the audit log with nothing but Python: `python verify_audit.py EXPORT --key KEYS [--heads PATH]`.

It shares no line with the product. docs/audit.md says what a line, a leaf, a node and a head are. The tree is RFC 9162's, the
canonical JSON RFC 8785's, the signature Ed25519 (RFC 8032). Exit status: 0 whole, 1 something does not fit, 2 wrong use.
"""
# Short, to be read in one sitting beside the RFCs:
# ruff: noqa: ANN001, ANN201, C901, D103, PLR2004

import argparse
import functools
import hmac
import json
import pathlib
import re
import sys
from decimal import Decimal
from hashlib import sha256, sha512

LEAF = {"id", "seq", "time", "actor", "action", "subject", "outcome", "gallery", "request_id", "detail"}
HASH = re.compile("[0-9a-f]{64}")
P, Q = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493  # Ed25519's field, and the order of its base point
D = -121665 * pow(121666, -1, P) % P


def canonical(value) -> str:
    """RFC 8785; numbers as ECMAScript writes them."""
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{canonical(name)}:{canonical(value[name])}" for name in names) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if not isinstance(value, float) or value == 0:
        return json.dumps(int(value) if isinstance(value, float) else value, ensure_ascii=False)
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    text, point = "".join(map(str, digits)), len(digits) + exponent
    if len(text) <= point <= 21:
        text = text.ljust(point, "0")
    elif -6 < point <= 21:
        text = f"{text[:point]}.{text[point:]}" if point > 0 else "0." + "0" * -point + text
    else:
        text = f"{text[0]}{'.' * bool(text[1:])}{text[1:]}e{point - 1:+d}"
    return "-" * sign + text


def added(a, b):
    """The sum of two points of the curve, in extended coordinates."""
    k, m, c, d = (a[1] - a[0]) * (b[1] - b[0]), (a[1] + a[0]) * (b[1] + b[0]), 2 * a[3] * b[3] * D, 2 * a[2] * b[2]
    e, f, g, h = m - k, d - c, d + c, m + k
    return e * f % P, g * h % P, f * g % P, e * h % P


def times(count, point):
    total = (0, 1, 1, 0)
    for bit in f"{count:b}":
        total = added(total, total)
        total = added(total, point) if bit == "1" else total
    return total


def point_of(data):
    y, odd = int.from_bytes(data, "little") % 2**255, data[31] >> 7
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if x * x % P == square else x * pow(2, (P - 1) // 4, P) % P
    if y >= P or x * x % P != square or (x == 0 and odd):
        raise ValueError(data)
    x = x if x % 2 == odd else P - x
    return x, y, 1, x * y % P


@functools.lru_cache
def is_signed(key, message, signature) -> bool:
    s, base = int.from_bytes(signature[32:], "little"), point_of((4 * pow(5, -1, P) % P).to_bytes(32, "little"))
    h = int.from_bytes(sha512(signature[:32] + key + message).digest(), "little") % Q
    left, right = times(s, base), added(point_of(signature[:32]), times(h, point_of(key)))
    return s < Q and all((left[axis] * right[2] - right[axis] * left[2]) % P == 0 for axis in (0, 1))


def why_not(head, keys) -> str:
    """What is wrong with a signed head by itself; "" when nothing is."""
    try:
        text = canonical({name: head[name] for name in ("size", "root_hash", "time", "key_id")})
        if head["key_id"] not in keys:
            return f"a head is signed by a key that was not given, {head['key_id']}"
        signature = bytes.fromhex(head["signature"])
        is_head = len(head) == 5 and type(head["size"]) is int and HASH.fullmatch(head["root_hash"])
        is_head = is_head and head["size"] >= 0 and signature.hex() == head["signature"] and len(signature) == 64
        return "" if is_head and is_signed(keys[head["key_id"]], text.encode(), signature) else f"not signed: {text}"
    except (KeyError, TypeError, ValueError):
        return "a head is none"


def parsed(raw):
    """A line and its leaf hash; some error for anything but the one form that a line has."""
    line = json.loads(raw)
    if canonical(line).encode() + b"\n" != raw or type(line["seq"]) is not int or line["seq"] < 0:
        raise ValueError(raw)
    leaf = {name: value for name, value in line.items() if name in LEAF}
    if set(line) - LEAF != {"leaf_hash", "personal", "skipped", "end"} or len(leaf) != len(LEAF):
        raise ValueError(raw)
    if line["personal"] is not None:
        fields, salt, leaf["actor"] = line["personal"]["fields"], line["personal"]["salt"], dict(leaf["actor"])
        order = [name for name in ("actor.name", "actor.ip", "request_id") if name in fields]
        if len(line["personal"]) != 2 or not fields or fields != order or not salt or bytes.fromhex(salt).hex() != salt:
            raise ValueError(raw)
        for name in fields:
            holder, key = leaf if name == "request_id" else leaf["actor"], name.removeprefix("actor.")
            holder[key] = hmac.digest(bytes.fromhex(salt), holder[key].encode(), "sha256").hex()
    return line, sha256(b"\0" + canonical(leaf).encode()).digest()


def grow(peaks, hash_, size) -> None:
    """Add a subtree to the complete subtrees [(size, hash)], and join those of one size."""
    while peaks and peaks[-1][0] == size:
        hash_, size = sha256(b"\1" + peaks.pop()[1] + hash_).digest(), size * 2
    peaks.append((size, hash_))


def skip(peaks, hashes, stop) -> bool:
    """Go on up to event `stop` by the hashes of the fewest subtrees between; False when they do not lead there."""
    at = sum(size for size, _ in peaks)
    for text in hashes if isinstance(hashes, list) else [None]:
        if at >= stop or not isinstance(text, str) or not HASH.fullmatch(text):
            return False
        size = min(1 << (stop - at).bit_length() - 1, at & -at or stop)
        grow(peaks, bytes.fromhex(text), size)
        at += size
    return at == stop


def root(peaks) -> str:
    hashes = [hash_ for _, hash_ in reversed(peaks)] or [sha256().digest()]
    return functools.reduce(lambda right, left: sha256(b"\1" + left + right).digest(), hashes).hex()


def check(lines, keys, heads=(), *, is_partial=False) -> list[str]:
    """What does not fit, the first thing first; [] when the export is whole."""
    found, size, is_ordered, end, peaks, roots = [w for h in heads if (w := why_not(h, keys))], 0, True, None, [], {}
    for number, raw in enumerate(lines, 1):
        try:
            line, leaf = parsed(raw)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            found.append(f"line {number}" + f", event {size}" * is_ordered + ": changed")
            is_ordered = False
            continue
        seq, left_out = line["seq"], f"event {size}: left out, with all up to {line['seq'] - 1}"
        found += [f"event {seq}: behind the end of the export"] * (end is not None)
        found += [f"event {seq}: changed, its hash is not its leaf_hash"] * (line["leaf_hash"] != leaf.hex())
        end = line["end"]
        if is_ordered and (seq < size or not skip(peaks, line["skipped"], seq)):
            found.append(left_out if seq > size else f"event {seq}: inserted, doubled or out of order")
            is_ordered = False
        elif is_ordered:
            found += [left_out] if seq > size and not is_partial else []
            roots[seq], size = root(peaks), seq + 1
            grow(peaks, leaf, 1)
            roots[size] = root(peaks)
    own = end.get("head") if isinstance(end, dict) and len(end) == 2 else None
    if end is None or (why := why_not(own, keys)):
        return [*found, f"event {size}: cut off" if end is None else f"the export's end: {why}"]
    if is_ordered and (own["size"] < size or not skip(peaks, end.get("skipped"), own["size"])):
        found.append(f"event {size}: this does not lead to the export's head, over {own['size']} events")
        is_ordered = False
    found += [f"event {size}: left out, with all behind it"] if own["size"] > size and not is_partial else []
    roots |= {own["size"]: root(peaks), 0: root([])} if is_ordered else {}
    good, largest, fitting = [own, *(head for head in heads if not why_not(head, keys))], {"size": 0}, 0
    for head in sorted(good, key=lambda head: (head["time"], head["size"])):
        what = f"the head of {head['time']} over {head['size']} events"
        if head["size"] < largest["size"]:
            found.append(f"set back: {what} is behind {largest['size']} events at {largest['time']}")
        if any(head["size"] == other["size"] and head["root_hash"] != other["root_hash"] for other in good):
            found.append(f"contradiction: {what} and another one")
        if is_ordered and roots.get(head["size"], head["root_hash"]) != head["root_hash"]:
            found.append(f"event {fitting}: {what} does not fit, from here on the log was made anew")
            is_ordered = False
        fitting = head["size"] if is_ordered and head["size"] in roots else fitting
        largest = head if head["size"] >= largest["size"] else largest
    return found


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("export", type=pathlib.Path)
    asked.add_argument("--key", required=True, type=pathlib.Path, help="lines of: KEY_ID PUBLIC_KEY_IN_HEX")
    asked.add_argument("--heads", type=pathlib.Path, help="a signed head, or a folder of them")
    asked.add_argument("--partial", action="store_true", help="events may be left out: other times, other galleries")
    given = asked.parse_args()
    keys = dict(line.split() for line in given.key.read_text().splitlines() if line.strip())
    files = [] if given.heads is None else [given.heads, *sorted(given.heads.rglob("*.json"))]
    heads = [json.loads(file.read_bytes()) for file in files if file.is_file()]
    keys = {key_id: bytes.fromhex(key) for key_id, key in keys.items()}
    with given.export.open("rb") as lines:
        found = check(lines, keys, heads, is_partial=given.partial)
    sys.stdout.write("\n".join(found or ["whole: every event as it was signed"]) + "\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
