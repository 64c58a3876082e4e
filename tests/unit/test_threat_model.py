"""The threat model and the standard's requirements say what is so: every test that they name exists."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from app.config import random_secret
from app.keys import KEY_BYTES, KeyRing
from tests.unit.test_rows import ROWS, all_tests, rows_of

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("threat-model.md", "asvs.md")
#: How many requirements each section of ASVS 5.0.0 has.
SECTIONS = {
    "1.1": 2, "1.2": 10, "1.3": 12, "1.4": 3, "1.5": 3, "2.1": 3, "2.2": 3, "2.3": 5, "2.4": 2, "3.1": 1, "3.2": 3, "3.3": 5,
    "3.4": 8, "3.5": 8, "3.6": 1, "3.7": 5, "4.1": 5, "4.2": 5, "4.3": 2, "4.4": 4, "5.1": 1, "5.2": 6, "5.3": 3, "5.4": 3,
    "6.1": 3, "6.2": 12, "6.3": 8, "6.4": 6, "6.5": 8, "6.6": 4, "6.7": 2, "6.8": 4, "7.1": 3, "7.2": 4, "7.3": 2, "7.4": 5,
    "7.5": 3, "7.6": 2, "8.1": 4, "8.2": 4, "8.3": 3, "8.4": 2, "9.1": 3, "9.2": 4, "10.1": 2, "10.2": 3, "10.3": 5,
    "10.4": 16, "10.5": 5, "10.6": 2, "10.7": 3, "11.1": 4, "11.2": 5, "11.3": 5, "11.4": 4, "11.5": 2, "11.6": 2, "11.7": 2,
    "12.1": 5, "12.2": 2, "12.3": 5, "13.1": 4, "13.2": 6, "13.3": 4, "13.4": 7, "14.1": 2, "14.2": 8, "14.3": 3, "15.1": 5,
    "15.2": 5, "15.3": 7, "15.4": 4, "16.1": 1, "16.2": 5, "16.3": 4, "16.4": 3, "16.5": 4,
}  # fmt: skip
_TEST = re.compile(r"`(test_\w+)`")
_ROW = re.compile(r"`(H\d+)`")
_SPAN = re.compile(r"`H(\d+)` to `H(\d+)`")
_REQUIREMENT = re.compile(r"^\| V(\d+)\.(\d+)\.(\d+) \|(.*)$", re.MULTILINE)


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows_named(text: str) -> set[str]:
    spans = {f"h{n:02}" for first, last in _SPAN.findall(text) for n in range(int(first), int(last) + 1)}
    return spans | {row.lower() for row in _ROW.findall(text)}


@pytest.mark.parametrize("name", PAGES)
def test_every_test_that_a_page_names_exists(name: str) -> None:
    missing = sorted(set(_TEST.findall(page(name))) - set(all_tests()))
    assert missing == []


@pytest.mark.parametrize("name", PAGES)
def test_every_row_that_a_page_names_has_a_test(name: str) -> None:
    proven = frozenset[str]().union(*map(rows_of, all_tests()))
    named = rows_named(page(name))
    assert named
    assert sorted(named - ROWS) == []
    assert sorted(named - proven) == []


def test_every_requirement_is_of_the_standard_stands_once_and_names_what_proves_it() -> None:
    found = [
        (f"{chapter}.{section}", int(number), rest)
        for chapter, section, number, rest in _REQUIREMENT.findall(page("asvs.md"))
    ]
    assert len(found) > 100
    for section, number, rest in found:
        assert 1 <= number <= SECTIONS[section], (section, number)
        proofs = _TEST.findall(rest) + _ROW.findall(rest) + re.findall(r"\]\(([^)]+)\)", rest)
        assert proofs or "not met" in rest.lower(), (section, number)
    assert len({(section, number) for section, number, _ in found}) == len(found)


def test_every_chapter_of_the_standard_is_answered() -> None:
    chapters = {chapter for chapter, *_ in _REQUIREMENT.findall(page("asvs.md"))}
    assert chapters == {str(number) for number in range(1, 17)}


def test_h27_the_rate_of_morphs_that_the_threat_model_tells_is_the_one_that_was_measured() -> None:
    measured = json.loads((DOCS / "morphs.json").read_text(encoding="utf-8"))
    text = page("threat-model.md")
    section = text[text.index("### Morphs, measured") :]
    for rate, share in measured["taken_for_both"].items():
        chosen = measured["chosen_taken_for_both"][rate]
        assert f"| {rate} | {share:.1%} | {chosen:.1%} |" in section
    assert str(measured["pairs"]) in section
    assert measured["taken_for_both"]["0.0001"] > 0, "a limit, and not a promise"


def test_as_many_known_pairs_as_dimensions_reveal_the_rotation() -> None:
    """The documented limit of what turning hides, and that fewer pairs do not reach it."""
    dimension = 128
    ring = KeyRing(random_secret())
    ring.adopt_root(bytes(KEY_BYTES))
    matrix = ring.gallery_key("north", ring.new_gallery_keys("north")).rotation("the first", dimension)
    known = np.random.default_rng(1).standard_normal((dimension, dimension))
    revealed = np.linalg.lstsq(known, known @ matrix, rcond=None)[0]
    assert np.allclose(revealed, matrix, atol=1e-6)
    half = np.linalg.lstsq(known[: dimension // 2], (known @ matrix)[: dimension // 2], rcond=None)[0]
    stranger = np.random.default_rng(2).standard_normal(dimension)
    turned_back = (stranger @ matrix) @ np.linalg.pinv(half)
    cosine = turned_back @ stranger / np.linalg.norm(turned_back) / np.linalg.norm(stranger)
    assert cosine < 0.9
