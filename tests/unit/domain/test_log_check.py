"""An export against its signed heads: whole when nothing was touched, and every tampering found and named, by two programs."""

import csv
import importlib.util
import io
import json
import random
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain import log_check
from app.domain.log_check import Finding, Head, check_export
from app.domain.log_export import (
    BadLine,
    Form,
    Json,
    canonical,
    decoded,
    encoded,
    heading,
    leaf_bytes,
    personal_hash,
    replaced,
    value_at,
)
from app.domain.merkle import leaf_hash
from tests.support.audit_exports import Log, as_file, rehashed, resigned, tampered

_spec = importlib.util.spec_from_file_location(
    "verify_audit", Path(__file__).parents[3] / "scripts" / "verify_audit.py"
)
assert _spec is not None
assert _spec.loader is not None
#: The stand-alone program, which shares no line with the product.
script: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

LOG = Log(seed=4)
LOG.grow(9).sign()
LOG.grow(20).sign()
LOG.grow(8).sign()
LINES = LOG.exported()
#: Of a tree of 37 events: some in a row, one alone, none at either end.
PART = LOG.exported([3, 4, 5, 11, 30])
SALT = "0a" * 16
FORMS: tuple[Form, ...] = ("ndjson", "csv")

texts = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def as_files(heads: list[Head]) -> list[tuple[str, bytes]]:
    """As the script reads them: names and bytes."""
    return [(f"{place}.json", canonical(head.as_json())) for place, head in enumerate(heads)]


def findings(
    lines: list[bytes], heads: list[Head] | None = None, *, partial: bool = False, taken_at: str | None = None
) -> list[Finding]:
    """What the product finds; the script finds something exactly when it does, and has compared as many heads."""
    report = check_export(lines, "ndjson", LOG.keys, heads or [], is_partial=partial, taken_at=taken_at)
    told, end = script.check(lines, LOG.keys, as_files(heads or []), is_partial=partial, taken_at=taken_at)
    assert bool(told) == bool(report.findings), (told, report.findings)
    if not told:
        assert report.head is not None
        assert end.startswith(f"up to the head of {report.head.time}, over {report.head.size} events; ")
        assert end.endswith(f"; {report.heads} heads fit, {report.unplaced + report.newer} could not be compared")
    return report.findings


@pytest.mark.parametrize("form", FORMS)
def test_an_untouched_export_is_whole(form: Form) -> None:
    report = check_export(as_file(LINES, form), form, LOG.keys, LOG.heads)
    assert (report.findings, report.events, report.heads, report.left_out) == ([], 37, 4, [])
    assert report.head == LOG.heads[-1]
    assert findings(as_file(LINES), LOG.heads) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_export_of_a_time_is_checked_as_far_as_it_goes(form: Form) -> None:
    report = check_export(as_file(PART, form), form, LOG.keys, LOG.heads, is_partial=True)
    assert (report.findings, report.events) == ([], 5)
    assert report.left_out == [(0, 3), (6, 11), (12, 30), (31, 37)]
    assert (report.heads, report.unplaced) == (2, 2)
    assert findings(as_file(PART), LOG.heads, partial=True) == []
    assert findings(as_file(PART)) == [Finding(0, "events 0 to 2 were left out of the export")]
    assert findings(as_file(PART), partial=True) == []
    changed = [PART[0], rehashed(PART[1] | {"action": "another"}), *PART[2:]]
    assert findings(as_file(changed), partial=True), "the hashes of what is left out still lead to the root"


@pytest.mark.parametrize("form", FORMS)
def test_h96_a_thousand_random_tamperings_are_found_by_both_programs(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Most lines of most files are the same bytes, and need not be read a thousand times.
    monkeypatch.setattr(script, "parsed", lru_cache(None)(script.parsed))
    monkeypatch.setattr(script, "is_signed", lru_cache(None)(script.is_signed))
    monkeypatch.setattr(log_check, "decoded", lru_cache(None)(decoded))
    chance = random.Random(96)  # noqa: S311 - to be had again
    log = Log(seed=5)
    for more in (4, 5, 4, 3):
        log.grow(more).sign()
    lines, keys, missed = log.exported(), log.keys, []
    for number in range(1000 if form == "ndjson" else 300):
        how, file, heads = tampered(chance, log, lines, form)
        found = check_export(file, form, keys, heads).findings
        if not found or (form == "ndjson" and not script.check(file, keys, as_files(heads))[0]):
            missed.append((number, how))
    assert missed == []


@pytest.mark.parametrize(
    ("place", "change", "named"),
    [
        (5, {"action": "identity.update"}, "it was changed: its hash is another than its leaf_hash"),
        (5, {"leaf_hash": "00" * 32}, "it was changed: its hash is another than its leaf_hash"),
        (5, {"leaf_hash": "x"}, "it was changed: its hash is another than its leaf_hash"),
        (7, {"seq": True}, "line 8 was changed: it has no number"),
        (7, {"seq": -1}, "line 8 was changed: it has no number"),
        (7, {"more": 1}, "line 8 was changed: it is not in the one form that a line has"),
        (7, {"personal": {"fields": [], "salt": SALT}}, "line 8 was changed: `personal` is neither null nor fields and a salt"),
        (7, {"personal": {"fields": ["actor.ip"], "salt": ""}}, "line 8 was changed: a salt is not 32 digits of lower-case hex"),
        (7, {"personal": {"fields": ["actor.ip"], "salt": SALT + "00"}},
         "line 8 was changed: a salt is not 32 digits of lower-case hex"),
        (7, {"personal": {"fields": ["actor.ip"], "salt": SALT.upper()}},
         "line 8 was changed: a salt is not 32 digits of lower-case hex"),
        (7, {"personal": {"fields": ["id"], "salt": SALT}}, "line 8 was changed: `personal` names fields that there are not"),
        (7, {"actor": "x", "personal": {"fields": ["actor.ip"], "salt": SALT}},
         "line 8 was changed: `personal` names actor.ip, which is not there"),
        (7, {"detail": {"reason": 1}, "personal": {"fields": ["detail.reason"], "salt": SALT}},
         "line 8 was changed: `personal` names detail.reason, which is not there"),
        (7, {"detail": {"reason": "x"}, "personal": {"fields": ["detail.reason.x"], "salt": SALT}},
         "line 8 was changed: `personal` names detail.reason.x, which is not there"),
        (7, {"personal": {"fields": ["detail.why", "actor.ip"], "salt": SALT}},
         "line 8 was changed: `personal` names fields that there are not"),
        (7, {"personal": {"fields": ["detail.why", "detail.why"], "salt": SALT}},
         "line 8 was changed: `personal` names fields that there are not"),
        (7, {"request_id": None, "personal": {"fields": ["request_id"], "salt": SALT}},
         "line 8 was changed: `personal` names request_id, which is not there"),
        (9, {"skipped": ["00" * 32]}, "what is skipped does not add up"),
        (9, {"skipped": None}, "what is skipped does not add up"),
    ],
)  # fmt: skip
def test_h96_the_first_changed_event_is_named(place: int, change: dict[str, Any], named: str) -> None:
    lines = list(LINES)
    lines[place] = lines[place] | change
    file = [canonical(line) + b"\n" for line in lines]
    first = findings(file)[0]
    assert first == Finding(place, named)


def test_h96_deleted_doubled_reordered_and_cut_off_events_are_named() -> None:
    assert findings(as_file([*LINES[:6], *LINES[7:]]))[0] == Finding(6, "event 6 was missing")
    assert findings(as_file([*LINES[:6], *LINES[9:]]))[0] == Finding(6, "events 6 to 8 were missing")
    doubled = findings(as_file([*LINES[:7], *LINES[6:]]))[0]
    assert doubled == Finding(6, "it stands where event 7 belongs: inserted, doubled or out of order")
    swapped = findings(as_file([*LINES[:6], LINES[7], LINES[6], *LINES[8:]]))
    assert swapped[0] == Finding(6, "event 6 was missing")
    assert findings(as_file(LINES[:20])) == [Finding(20, "cut off: the export has no end")]
    moved = [*LINES[:20], LINES[20] | {"end": LINES[-1]["end"]}]
    assert findings(as_file(moved))[0] == Finding(21, "events 21 to 36 were missing")
    assert findings([]) == [Finding(0, "cut off: the export has no end")]
    assert findings([*as_file(LINES), *as_file(LINES[-1:])])[0] == Finding(36, "it stands behind the end of the export")
    assert check_export(as_file(LINES, "csv")[1:], "csv", LOG.keys).findings[0] == Finding(
        None, "the first line is not the heading of an export"
    )


def test_h96_an_end_that_is_none_is_named() -> None:
    head = LOG.heads[-1].as_json()
    for end in (
        "x",
        {"head": head},
        {"head": {**head, "size": -1}, "skipped": []},
        {"head": 1, "skipped": []},
        {"head": {**head, "more": 1}, "skipped": []},
    ):
        changed = [*LINES[:-1], LINES[-1] | {"end": end}]
        assert findings(as_file(changed))[0].what.startswith("the export's end was changed")
    more = [*LINES[:-1], LINES[-1] | {"end": {"head": LOG.heads[0].as_json(), "skipped": []}}]
    assert findings(as_file(more))[0] == Finding(9, "there are 37 events, and the export's head is over 9")


def test_h96_a_log_made_anew_is_found_by_the_heads_kept_elsewhere() -> None:
    """Whoever has the database and the key can make a tree of other events; not undo what was signed before."""
    forged = Log(seed=4)
    forged.key = LOG.key
    for line in LINES:
        forged.add({**line, "end": None} | ({"action": "other"} if line["seq"] == 12 else {}))
    lines = forged.exported()
    assert findings(as_file(lines)) == []
    found = findings(as_file(lines), LOG.heads)
    assert found[0].seq == 9, "the head over 9 events fits, the one over 29 does not"
    assert "made anew" in found[0].what
    assert any("contradict each other" in finding.what for finding in found), "two signatures over one size prove it"


def test_h96_rows_cut_off_are_found_by_a_larger_head_that_was_signed_before() -> None:
    short = Log(seed=4)
    short.key = LOG.key
    for line in LINES[:30]:
        short.add({**line, "end": None})
    short.sign(time="2026-11-21T11:00:00.000Z")
    lines = short.exported()
    assert findings(as_file(lines)) == []
    assert findings(as_file(lines), LOG.heads) == [
        Finding(30, "events 30 to 36 were cut off: 37 were signed at 2026-11-21T10:00:02.000Z"),
        Finding(
            30,
            "the log was set back: 37 events were signed at 2026-11-21T10:00:02.000Z, 30 at 2026-11-21T11:00:00.000Z",
        ),
    ]


@pytest.mark.parametrize("partial", [False, True])
def test_h96_rows_cut_off_are_found_though_the_head_over_the_rest_is_genuine(*, partial: bool) -> None:
    first, second, third = LOG.heads
    chosen = [3, 4, 5] if partial else None
    file = as_file(LOG.exported(chosen, head=first))
    assert findings(file, partial=partial) == [], "without any other head nobody can tell; its size and time are told"
    assert findings(file, [first], partial=partial) == []
    gone = Finding(9, f"events 9 to 36 were cut off: 37 were signed at {third.time}")
    assert findings(file, LOG.heads, partial=partial) == [gone]
    assert findings(file, LOG.heads, partial=partial, taken_at=third.time) == [gone]
    # Whoever asked for it after the second head, and before the third, was owed the events of the second.
    short = Finding(9, f"events 9 to 28 were cut off: 29 were signed at {second.time}")
    assert findings(file, LOG.heads, partial=partial, taken_at="2026-11-21T10:00:01.500Z") == [short]
    assert findings(as_file(LOG.exported(chosen, head=first)), [second, third], partial=partial) == [gone]


def test_heads_signed_after_the_export_was_taken_are_no_fault() -> None:
    first, second, _ = LOG.heads
    lines = as_file(LOG.exported(head=second))
    report = check_export(lines, "ndjson", LOG.keys, LOG.heads, taken_at=second.time)
    assert (report.findings, report.heads, report.unplaced, report.newer) == ([], 3, 0, 1)
    assert findings(lines, LOG.heads, taken_at=second.time) == []
    assert findings(lines, LOG.heads, taken_at=first.time) == []


def test_a_log_that_was_set_back_once_is_told_of_once() -> None:
    restored = Log(seed=4)
    restored.key = LOG.key
    for line in LINES[:9]:
        restored.add({**line, "end": None})
    for number in range(3):
        restored.grow(1).sign(time=f"2026-11-21T12:00:0{number}.000Z")
    told = [finding.what for finding in findings(as_file(restored.exported()), [*LOG.heads, *restored.heads])]
    assert [what for what in told if "set back" in what] == [
        "the log was set back: 37 events were signed at 2026-11-21T10:00:02.000Z, 10 at 2026-11-21T12:00:00.000Z"
    ]


@pytest.mark.parametrize("told", [True, False], ids=["the log says so", "the log does not"])
def test_a_clock_that_was_ahead_is_no_fault_if_the_log_says_so(*, told: bool) -> None:
    log = Log(seed=5)
    ahead, keys = log.grow(4).sign(time="2027-01-09T10:00:00.000Z"), log.keys
    reason = "the clock was ahead: its heads are dated up to 2027-01-09T10:00:00.001Z" if told else "renewed"
    log.add(
        log.event() | {"action": "audit.rotate_key", "detail": {"former": "key-1", "reason": reason}, "personal": None}
    )
    log.key, log.key_id = Ed25519PrivateKey.generate(), "key-2"
    right = log.grow(3).sign(time="2026-11-30T10:00:00.000Z")
    keys, lines = keys | log.keys, as_file(log.exported())
    found = check_export(lines, "ndjson", keys, [ahead, right]).findings
    assert ["the log was set back: 8 events" in finding.what for finding in found] == ([] if told else [True])
    assert len(script.check(lines, keys, as_files([ahead, right]))[0]) == len(found)


@pytest.mark.parametrize("form", FORMS)
def test_an_export_without_events_is_one_line_that_holds_the_head(form: Form) -> None:
    file = as_file(LOG.exported([]), form)
    report = check_export(file, form, LOG.keys, LOG.heads, is_partial=True)
    assert (report.findings, report.events, report.left_out) == ([], 0, [(0, 37)])
    assert report.head == LOG.heads[-1]
    (alone,) = as_file(LOG.exported([]))
    assert findings([alone], LOG.heads, partial=True) == []
    assert findings([alone]) == [Finding(0, "events 0 to 36 were left out of the export")]
    assert findings([alone], [resigned(LOG, LOG.heads[-1], root_hash="00" * 32)], partial=True)
    first, second = LOG.heads[:2]
    assert findings(as_file(LOG.exported([], head=first)), [second], partial=True) == [
        Finding(9, f"events 9 to 28 were cut off: 29 were signed at {second.time}")
    ]


def test_h96_a_line_without_an_event_stands_alone_or_is_a_fault() -> None:
    (alone,) = as_file(LOG.exported([]))
    without_end = as_file([*LINES[:-1], LINES[-1] | {"end": None}])
    assert findings([*without_end, alone])[0] == Finding(37, "line 38 was changed: it has no number")
    assert findings([alone, *as_file(LINES)], partial=True)[0] == Finding(0, "it stands behind the end of the export")
    assert findings([alone.replace(b'"seq":null', b'"seq":0')], partial=True)
    assert findings([alone.replace(b'"action":null', b'"action":"x"')], partial=True)
    assert findings(
        [alone[: alone.index(b'"end":')] + b'"end":null' + alone[alone.index(b',"gallery"') :]], partial=True
    )


def test_h96_two_heads_of_one_size_are_a_contradiction_by_themselves() -> None:
    other = resigned(LOG, LOG.heads[0], root_hash="00" * 32, time="2026-11-21T12:00:00.000Z")
    found = findings(as_file(LINES), [*LOG.heads, other])
    assert found[0].what == "the signed head of 2026-11-21T12:00:00.000Z over 9 events does not fit"
    assert any("two signed heads contradict each other" in finding.what for finding in found)


def test_h96_a_head_counts_only_with_a_signature_of_a_known_key() -> None:
    good = LOG.heads[0]
    stranger = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    wrong = [
        Head(good.size, good.root_hash, good.time, good.key_id, "00" * 64),
        Head(good.size, good.root_hash, good.time, "key-2", good.signature),
    ]
    assert [finding.what for finding in findings(as_file(LINES), wrong)] == [
        f"the signature on the head of {good.time} over 9 events is wrong",
        f"the head of {good.time} over 9 events is signed by key-2, a key not given",
    ]
    assert check_export(as_file(LINES), "ndjson", {"key-1": stranger}).findings
    assert script.check(as_file(LINES), {"key-1": stranger})[0]


def test_an_empty_log_has_a_root_that_heads_are_checked_with() -> None:
    empty = Log(seed=4)
    empty.sign(time="2026-11-21T08:00:00.000Z")
    assert empty.heads[0].root_hash == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert findings(as_file(LINES), [*empty.heads, *LOG.heads]) == []
    other = resigned(LOG, empty.heads[0], root_hash="00" * 32)
    assert findings(as_file(LINES), [other])[0].what.endswith("over 0 events does not fit")


def test_a_forgotten_name_leaves_the_hash_as_it_was() -> None:
    line = next(line for line in LINES if "Zo" in str(line["detail"]))
    personal = line["personal"]
    assert isinstance(personal, dict)
    assert isinstance(personal["fields"], list)
    salt, forgotten = bytes.fromhex(str(personal["salt"])), line | {"personal": None}
    for name in map(str, personal["fields"]):
        forgotten = replaced(forgotten, name, personal_hash(salt, str(value_at(line, name))))
    assert "detail.reason" in personal["fields"]
    assert leaf_bytes(forgotten) == leaf_bytes(line)
    assert leaf_hash(leaf_bytes(forgotten)).hex() == line["leaf_hash"]


@given(json_values)
def test_both_programs_write_the_same_canonical_json(value: Json) -> None:
    assert script.canonical(value).encode() == canonical(value)


@settings(max_examples=25, deadline=None)  # each key has a table made for it
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=64), st.integers(0, 511))
def test_both_programs_agree_on_signatures(seed: bytes, message: bytes, bit: int) -> None:
    key = Ed25519PrivateKey.from_private_bytes(seed)
    public, signature = key.public_key().public_bytes_raw(), bytearray(key.sign(message))
    assert script.is_signed(public, message, bytes(signature))
    signature[bit // 8] ^= 1 << bit % 8
    with suppress(ValueError):  # the first half is no point of the curve: as good as wrong
        assert not script.is_signed(public, message, bytes(signature))


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1", "＋1", "－1", "＠SUM", "'x", "'=1", "plain", "x;=1"],
)
@pytest.mark.parametrize("name", ["action", "gallery", "request_id"])
def test_h45_no_cell_of_a_csv_begins_as_a_formula(name: str, text: str) -> None:
    line = LINES[3] | {name: text, "detail": {"reason": text, "also": f"a;{text}"}, "personal": None}
    raw = encoded(line, "csv")
    (cells,) = csv.reader([raw.decode()]) if "\r" not in text else csv.reader(io.StringIO(raw.decode(), newline=""))
    for cell in cells:
        assert not cell.lstrip().startswith(tuple("=+-@＝＋－＠")), cell
    # Some sheets part a line at semicolons, and take no notice of the quotes.
    json_cells = [cell for cell in cells if cell.startswith(("{", "["))]
    assert json_cells
    assert all(";" not in cell for cell in json_cells)
    assert dict(zip(heading("csv").decode().strip().split(","), cells, strict=True))[name].removeprefix("'") == text
    if "\r" not in text:
        assert decoded(raw, "csv") == line


def test_a24_no_cell_of_a_csv_turns_its_text_around() -> None:
    """Events of older versions may contain reasons with controls that show a text in another order."""
    turned = "paid \u202e001\u202c \u2066x\u2069"
    line = LINES[3] | {"detail": {"reason": turned}, "personal": None}
    raw = encoded(line, "csv")
    assert not set(raw.decode()) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert decoded(raw, "csv") == line


@given(st.binary(max_size=200))
def test_what_is_no_line_is_refused_as_one(raw: bytes) -> None:
    for form in FORMS:
        with pytest.raises(BadLine):
            decoded(raw, form)


def test_a_line_has_one_form_only() -> None:
    raw = encoded(LINES[0], "ndjson")
    spaced = json.dumps(json.loads(raw)).encode() + b"\n"
    doubled = b'{"action":"first",' + raw[1:]
    for other in (spaced, doubled, raw.removesuffix(b"\n"), raw + b"\n", raw.replace(b"null", b"NaN", 1)):
        with pytest.raises(BadLine):
            decoded(other, "ndjson")
    with pytest.raises(BadLine):
        decoded(b"[" * 100_000 + b"\n", "ndjson")
