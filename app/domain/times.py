"""Times and dates as callers write them: RFC 3339, with a zone; dates of birth in the Gregorian calendar."""

import re
from datetime import UTC, date, datetime, timedelta
from typing import Final

_WRITTEN: Final = re.compile(
    r"(?P<minute>\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}):(?P<second>\d{2})(?P<fraction>\.\d+)?"
    r"(?:(?P<utc>[Zz])|(?P<sign>[+-])(?P<hours>\d{2}):(?P<minutes>\d{2}))",
    re.ASCII,
)
_LEAP_SECOND: Final = 60
_LAST_HOUR, _LAST_MINUTE = 23, 59
#: On this side of the date line a day begins first.
_EARLIEST_ZONE: Final = timedelta(hours=14)
#: The longest proven life was 122 years. An earlier date of birth is a slip, or a year of another calendar.
LONGEST_LIFE_YEARS: Final = 130
#: So many years a Thai date is ahead of a Gregorian one.
_BUDDHIST_YEARS: Final = 543
#: Years in which people of today were born, in the Islamic and the Persian calendar.
_LUNAR_AND_PERSIAN: Final = range(1270, 1500)


def moment_of(text: str) -> datetime:
    """The time in UTC, to the microsecond, as RFC 3339 writes it: `2026-11-21T09:30:00Z` or `2026-11-21T16:30:00+07:00`.

    A leap second is the beginning of the next second, as on every clock that has none. Raises ValueError.
    """
    parts = _WRITTEN.fullmatch(text)
    if parts is None:
        message = (
            "must be a time with its zone, as 2026-11-21T09:30:00Z or 2026-11-21T16:30:00%2B07:00 (a + in a URL is %2B)"
        )
        raise ValueError(message)
    second, fraction = int(parts["second"]), (parts["fraction"] or ".0")[1:7].ljust(6, "0")
    is_leap = second == _LEAP_SECOND
    try:
        hours, minutes = int(parts["hours"] or 0), int(parts["minutes"] or 0)
        if hours > _LAST_HOUR or minutes > _LAST_MINUTE:
            raise ValueError  # noqa: TRY301 - no such zone, and so no such time
        zone = timedelta(hours=hours, minutes=minutes) * (-1 if parts["sign"] == "-" else 1)
        read = datetime.fromisoformat(f"{parts['minute'].upper()}:{second - is_leap:02}+00:00") - zone
        return read + (timedelta(seconds=1) if is_leap else timedelta(microseconds=int(fraction)))
    except (ValueError, OverflowError) as error:
        message = "must be a time that exists"
        raise ValueError(message) from error


def birth_date_fault(born: date | None, moment: datetime) -> str | None:
    """Why nobody alive was born on this day; None when somebody may have been, or the day is unknown. moment: the present.

    The day is over when it has begun anywhere on earth: an officer in Kiribati enrols a child born today.
    """
    if born is None:
        return None
    today = (moment.astimezone(UTC) + _EARLIEST_ZONE).date()
    if born > today:
        gregorian = born.year - _BUDDHIST_YEARS
        if today.year - LONGEST_LIFE_YEARS <= gregorian <= today.year:
            return (
                f"This looks like a year of the Buddhist calendar; write {gregorian} instead of {born.year}, "
                "the year of the Gregorian calendar."
            )
        return "This date is in the future."
    if born.year < today.year - LONGEST_LIFE_YEARS:
        if born.year in _LUNAR_AND_PERSIAN:
            return (
                "This looks like a year of the Islamic or Persian calendar; write the date of the Gregorian calendar."
            )
        return f"This date is more than {LONGEST_LIFE_YEARS} years ago."
    return None
