"""Time windows of a deck's row: when it is in force, and when that may change next.

A window counts local time in a zone of its own. One over midnight (from 22:00 to 06:00) looks at
the day of the instant, not at the day on which it began.
"""

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from msgspec import Struct

DAY_S: Final = 86_400
_QUARTER_S: Final = 900


class Window(Struct, frozen=True, gc=False):
    """Seconds of a local day, `to_s` exclusive, on ISO weekdays (none: all), on one day of the
    year as (month, day), or both; month 0 is any month."""

    days: tuple[int, ...] = ()
    from_s: int = 0
    to_s: int = DAY_S
    month_day: tuple[int, int] | None = None
    zone: str = "UTC"


def window_from(
    days: tuple[int, ...], start: str, end: str, month_day: str, zone: str = "UTC"
) -> Window:
    """A window as decks write it: `08:00`, `24:00`, `12-25` (or `25`, of any month); an empty text
    means any.

    Raises ValueError.
    """
    from_s = _second(start) if start else 0
    to_s = _second(end) if end else DAY_S
    if from_s == to_s or from_s == DAY_S:
        raise ValueError(f"a window from {start} to {end} is never open")
    if any(not 1 <= day <= 7 for day in days):
        raise ValueError("a weekday is a number from 1 (Monday) to 7")
    zone_of(zone)
    return Window(days, from_s, to_s, _month_day(month_day) if month_day else None, zone)


def _second(text: str) -> int:
    hours, _, rest = text.partition(":")
    minutes, _, seconds = rest.partition(":")
    parts = (hours, minutes, seconds or "0")
    if not all(part.isascii() and part.isdigit() and len(part) <= 2 for part in parts):
        raise ValueError(f"{text!r} is no time of day; write it like 08:00")
    second = int(hours) * 3_600 + int(minutes) * 60 + int(parts[2])
    if second > DAY_S or int(minutes) > 59 or int(parts[2]) > 59:
        raise ValueError(f"{text!r} is no time of day; the last one is 24:00")
    return second


def _month_day(text: str) -> tuple[int, int]:
    month, dash, day = text.removeprefix("--").partition("-")
    if not dash and month.isascii() and month.isdigit() and 1 <= int(month) <= 31:
        return 0, int(month)
    if not (month.isascii() and month.isdigit() and day.isascii() and day.isdigit()):
        raise ValueError(f"{text!r} is no day of the year; write it like 12-25")
    datetime(2024, int(month), int(day), tzinfo=UTC)  # a leap year knows every day
    return int(month), int(day)


@lru_cache(maxsize=256)
def zone_of(name: str) -> ZoneInfo:
    """A time zone by its IANA name. Raises ValueError when there is none."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{name!r} is no time zone; write one like Europe/London") from None


def _local(at: datetime, zone: str) -> datetime:
    if zone == "UTC":
        return at
    try:
        return at.astimezone(zone_of(zone))
    except OverflowError:  # beyond the calendar's ends there is no local time
        return at


def _second_of_day(local: datetime) -> int:
    return local.hour * 3_600 + local.minute * 60 + local.second


def in_force(windows: tuple[Window, ...], at: datetime) -> bool:
    """Whether one of them covers an instant; without windows always."""
    if not windows:
        return True
    for window in windows:
        local = _local(at, window.zone)
        if window.days and local.isoweekday() not in window.days:
            continue
        if window.month_day is not None and window.month_day not in (
            (local.month, local.day),
            (0, local.day),
        ):
            continue
        second = _second_of_day(local)
        if window.from_s <= window.to_s:
            if window.from_s <= second < window.to_s:
                return True
        elif second >= window.from_s or second < window.to_s:
            return True
    return False


def next_change(windows: tuple[Window, ...], at: datetime) -> datetime | None:
    """An instant after `at` before which none of them begins or ends: the next edge or midnight
    of their local days, or, where clocks are put forward or back before that, the next quarter of
    an hour. None at the end of the calendar."""
    wait_s = DAY_S
    for window in windows:
        local = _local(at, window.zone)
        second = _second_of_day(local)
        edges = (window.from_s, window.to_s, DAY_S)
        here_s = min(edge for edge in edges if edge > second) - second
        try:
            moved = _local(at + timedelta(0, here_s), window.zone).utcoffset() != local.utcoffset()
        except OverflowError:
            return None
        if moved:
            here_s = _QUARTER_S - second % _QUARTER_S
        wait_s = min(wait_s, here_s)
    try:
        return at.replace(microsecond=0) + timedelta(0, wait_s)
    except OverflowError:
        return None
