"""When a gallery's next generation is due."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from app.domain.publication import EXACT_ROWS, Standing, kind_for, reason_to_publish

MOMENT = datetime(2026, 5, 1, 12, tzinfo=UTC)
DAY = timedelta(hours=24)
QUIET = Standing(is_published=True, is_faulty=False, tail=10, count=100_000, removed=0, purge_by=None)


def reason(standing: Standing) -> str | None:
    return reason_to_publish(standing, tail_rows=50_000, purge_time=DAY, moment=MOMENT)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"tail": 49_999}, None),
        ({"tail": 50_000}, "tail"),
        ({"tail": 50_000, "is_published": False, "count": 0}, "tail"),
        ({"removed": 1_999}, None),
        ({"removed": 2_000}, "removals"),
        ({"removed": 99, "count": 500}, None),
        ({"removed": 100, "count": 500}, "removals"),
        ({"removed": 5_000, "is_published": False}, None),
        ({"purge_by": MOMENT + timedelta(hours=7)}, None),
        ({"purge_by": MOMENT + timedelta(hours=6)}, "erasure"),
        ({"purge_by": MOMENT - timedelta(hours=1)}, "erasure"),
        ({"is_faulty": True, "purge_by": MOMENT, "tail": 50_000}, "fault"),
    ],
)
def test_a_generation_is_due_for_one_reason_at_a_time(changed: dict[str, object], expected: str | None) -> None:
    assert reason(replace(QUIET, **changed)) == expected  # type: ignore[arg-type]


def test_an_erasure_leaves_a_quarter_of_its_time_for_a_second_try() -> None:
    late = replace(QUIET, purge_by=MOMENT + DAY)
    due_at = next(h for h in range(25) if reason_to_publish(
        late, tail_rows=50_000, purge_time=DAY, moment=MOMENT + timedelta(hours=h)
    ))  # fmt: skip
    assert due_at == 18


def test_small_galleries_are_searched_exactly() -> None:
    assert [kind_for(n) for n in (0, EXACT_ROWS, EXACT_ROWS + 1)] == ["exact", "exact", "faiss"]
