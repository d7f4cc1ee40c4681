"""Legs: when one began and ended, and how long it took."""

from datetime import UTC, datetime, timedelta
from typing import Final

from schemas.usage import CallUsage, ConferenceUsage
from streams.billing.events import Cause, UsageEvent

# Times of different clocks may differ by a second; beyond that the duration is believed.
_AGREES: Final = timedelta(seconds=1)
_SECOND: Final = timedelta(seconds=1)
# Most legs are short, and to make a span costs more than to add it.
_SPANS: Final = tuple(timedelta(0, seconds) for seconds in range(3_600))
_FIRST: Final = datetime.min.replace(tzinfo=UTC)
_LAST: Final = datetime.max.replace(tzinfo=UTC)


def utc(at: datetime) -> datetime:
    """The same instant in UTC; one beyond the calendar's ends is its first or last instant."""
    if at.tzinfo is UTC:
        return at
    try:
        return at.astimezone(UTC)
    except OverflowError:
        return _FIRST if at.year == 1 else _LAST


def _later(at: datetime, seconds: int) -> datetime:
    try:
        if 0 <= seconds < len(_SPANS):
            return at + _SPANS[seconds]
        return at + timedelta(0, seconds)
    except OverflowError:
        return _LAST


def usage_event(usage: CallUsage | ConferenceUsage, cause: Cause) -> UsageEvent:
    """Settle when a leg ended and how long it took: `duration_s` wins over the times."""
    started_at = usage.started_at
    if started_at.tzinfo is not UTC:
        started_at = utc(started_at)
    duration_s = usage.duration_s
    if usage.ended_at is None:
        if duration_s is None:
            return UsageEvent(usage, cause, started_at, started_at, None)
        return UsageEvent(usage, cause, started_at, _later(started_at, duration_s), duration_s)
    ended_at = utc(usage.ended_at)
    if duration_s is None:
        return UsageEvent(usage, cause, started_at, ended_at, (ended_at - started_at) // _SECOND)
    counted = _later(started_at, duration_s)
    if abs(counted - ended_at) > _AGREES:
        return UsageEvent(usage, cause, started_at, counted, duration_s, True)
    return UsageEvent(usage, cause, started_at, ended_at, duration_s)
