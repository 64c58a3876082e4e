"""Times have a zone, and people are born on days that somebody alive may have been born on."""

from datetime import UTC, date, datetime

import pytest

from app.domain.times import birth_date_fault, moment_of

NOON = datetime(2026, 12, 1, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-21T09:30:00Z", datetime(2026, 11, 21, 9, 30, tzinfo=UTC)),
        ("2026-11-21t09:30:00.123456789z", datetime(2026, 11, 21, 9, 30, 0, 123456, tzinfo=UTC)),
        ("2026-11-21T16:30:00+07:00", datetime(2026, 11, 21, 9, 30, tzinfo=UTC)),
        ("2026-11-20T23:30:00.5-10:00", datetime(2026, 11, 21, 9, 30, 0, 500000, tzinfo=UTC)),
        ("2026-11-21T09:30:00-00:00", datetime(2026, 11, 21, 9, 30, tzinfo=UTC)),
        ("2016-12-31T23:59:60Z", datetime(2017, 1, 1, tzinfo=UTC)),
        ("2017-01-01T05:29:60.9+05:30", datetime(2017, 1, 1, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC)),
    ],
)
def test_f10_a_time_is_read_in_its_zone(text: str, moment: datetime) -> None:
    assert moment_of(text) == moment


@pytest.mark.parametrize(
    "text",
    [
        "", "2026-11-21", "2026-11-30T17:00:00", "2026-11-30T17:00Z", "2026-11-30 17:00:00Z", "1764547200", "-1", "1764547200.5",
        "2026-11-30T17:00:00 07:00", "2026-11-30T17:00:00+0700", "2026-11-30T17:00:00+24:00", "2026-11-30T17:00:00+00:60",
        "2026-11-30T17:00:00+07", "2026-02-30T00:00:00Z", "2026-11-30T24:00:00Z", "2026-11-30T23:59:61Z",
        "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-01:00", "9999-12-31T23:59:60Z",
        "10000-01-01T00:00:00Z", "２０２６-11-21T09:30:00Z", "2026-11-21T09:30:00.Z", "20261121T093000Z", "now",
        "2026-11-21T09:30:00Z\n", "\n2026-11-21T09:30:00Z",
    ],
)  # fmt: skip
def test_f10_what_is_no_time_with_a_zone_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="time"):
        moment_of(text)


@pytest.mark.parametrize("born", ["1896-01-01", "1990-01-31", "2024-02-29", "2026-12-01", "2026-12-02", None])
def test_f8_somebody_may_have_been_born_on_this_day(born: str | None) -> None:
    assert birth_date_fault(None if born is None else date.fromisoformat(born), NOON) is None


@pytest.mark.parametrize(
    ("born", "why"),
    [
        ("2533-01-31", "Buddhist calendar; write 1990 instead of 2533"), ("2569-12-01", "write 2026"),
        ("2439-01-01", "write 1896"),
        ("2027-01-01", "in the future"), ("2026-12-03", "in the future"), ("2999-01-01", "in the future"),
        ("9999-12-31", "in the future"),
        ("1895-12-31", "more than 130 years ago"), ("0001-01-01", "more than 130"), ("1410-06-01", "Islamic or Persian"),
        ("1369-01-01", "Islamic or Persian"),
    ],
)  # fmt: skip
def test_f8_nobody_alive_was_born_on_this_day(born: str, why: str) -> None:
    assert why in (birth_date_fault(date.fromisoformat(born), NOON) or "")


def test_f8_a_day_has_come_when_it_has_begun_anywhere() -> None:
    morning, evening = datetime(2026, 12, 1, 9, 59, tzinfo=UTC), datetime(2026, 12, 1, 10, 0, tzinfo=UTC)
    assert birth_date_fault(date(2026, 12, 2), morning) is not None
    assert birth_date_fault(date(2026, 12, 2), evening) is None
