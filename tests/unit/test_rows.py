"""Every row of the list of hostile inputs, H01 to H108, has a test whose name begins with it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROWS = frozenset(f"h{number:02}" for number in range(1, 109))
#: `test_h01_...`, `test_h15_h16_...`: the rows stand first, whatever sentence follows.
_NAMED = re.compile(r"test_((?:h\d{2,3}_)+)")


def rows_of(name: str) -> frozenset[str]:
    """The rows that a test's name says it proves."""
    found = _NAMED.match(name)
    return frozenset(found[1].rstrip("_").split("_")) if found else frozenset()


def names_in(source: str) -> Iterator[str]:
    """The names of the tests in a file that pytest would collect; one that is always skipped proves nothing."""
    for node in ast.walk(ast.parse(source)):
        is_test = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        if is_test and not any("skip" in ast.unparse(mark) for mark in node.decorator_list):
            yield node.name


def all_tests() -> dict[str, Path]:
    """Every test's name, and the file that it stands in."""
    files = sorted(TESTS.rglob("test_*.py"))
    return {name: file for file in files for name in names_in(file.read_text(encoding="utf-8"))}


def test_every_row_of_the_hostile_inputs_has_a_test_that_begins_with_it() -> None:
    proven = frozenset[str]().union(*map(rows_of, all_tests()))
    missing = sorted(ROWS - proven, key=lambda row: int(row[1:]))
    assert missing == [], f"{len(missing)} rows without a test: {', '.join(missing)}"


def test_no_test_names_a_row_that_is_not_on_the_list() -> None:
    wrong = {name: sorted(rows_of(name) - ROWS) for name in all_tests() if rows_of(name) - ROWS}
    assert wrong == {}


def test_a_name_counts_for_the_rows_that_it_begins_with_and_for_no_others() -> None:
    assert rows_of("test_h01_a_bomb_is_refused") == {"h01"}
    assert rows_of("test_h15_h16_h17_anything_else_is_refused") == {"h15", "h16", "h17"}
    assert rows_of("test_h108_metrics") == {"h108"}
    assert rows_of("test_a_row_in_the_middle_h01_does_not_count") == frozenset()
    assert rows_of("test_hashes_are_told_apart") == frozenset()


def test_a_skipped_test_and_a_helper_do_not_count() -> None:
    source = """
import pytest
def helper(): ...
async def test_h01_counts(): ...
class Rows:
    def test_h02_counts_too(self): ...
@pytest.mark.skip(reason="later")
def test_h03_does_not(): ...
@pytest.mark.skipif(True, reason="x")
def test_h04_neither(): ...
"""
    assert list(names_in(source)) == ["test_h01_counts", "test_h02_counts_too"]
