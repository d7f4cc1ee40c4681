"""The position row: how far every source topic has been read, the last `now`, and what a restore
must find again. It stands beside the rows in the changelog."""

from datetime import datetime
from typing import Final

import msgspec
from msgspec import Struct

from schemas import topics

_VERSION: Final = 1
_DAY_US: Final = 86_400_000_000
# An ordinal of the packed ids and the instant it was written at, in µs since 1970.
SeenMark = tuple[int, int]
# All ids since a mark must be there while it is younger than the retention of their log, 43 days.
# What is before the oldest such mark came within 7 days of the mark before that, which is older. So
# none of the last 36 days (less the hour below) is lost unnoticed, and ids matter for 35.
_MARKED_EVERY_US: Final = 7 * _DAY_US
_SEEN_KEPT_US: Final = topics.SEEN_KEPT_DAYS * _DAY_US
# Brokers delete by their own clocks, and ours may have been ahead when the mark was made.
_CLOCKS_US: Final = 3_600_000_000


class SourcePosition(Struct, frozen=True, kw_only=True):
    """How far one source topic has been booked: `next` is the next offset. `last`, `timestamp`
    (ms) and `hash` are those of the last record before it, by which a re-created topic shows."""

    next: int
    last: int = -1
    timestamp: int = -1
    hash: str = ""


class Position(Struct, frozen=True, kw_only=True):
    """The position row. `balances` is (Σ positive, Σ negative) nanos per currency as text."""

    version: int = _VERSION
    now: datetime
    sources: dict[str, SourcePosition]
    rows: int
    digest: str
    balances: dict[str, tuple[str, str]]
    tenants: dict[str, int]
    seen_next: int
    # What open calls hold, in nanos per currency as text, and how many do.
    exposures: dict[str, str] = {}
    holds: int = 0
    # By these a restore tells ids that were lost from ids that are too old to be kept. A program
    # of before them reads the row and leaves them out; then they begin anew.
    seen_marks: tuple[SeenMark, ...] = ()


def marked(marks: tuple[SeenMark, ...], ordinal: int, now_us: int) -> tuple[SeenMark, ...]:
    """The marks of a position row after a batch whose ids were written with that ordinal."""
    if marks and now_us - marks[-1][1] < _MARKED_EVERY_US:
        return marks
    marks += ((ordinal, now_us),)
    past = sum(now_us - at >= _SEEN_KEPT_US for _, at in marks)
    return marks[max(0, past - 1) :]


def oldest_kept(marks: tuple[SeenMark, ...], now_us: int) -> int | None:
    """The ordinal from which on the packed ids must all be there, if any must."""
    kept_us = _SEEN_KEPT_US - _CLOCKS_US
    return next((ordinal for ordinal, at in marks if now_us - at < kept_us), None)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Position)


def encode_position(position: Position) -> bytes:
    """The position row's value."""
    return _encoder.encode(position)


def decode_position(value: bytes) -> Position:
    """Read a position row. Raises msgspec.DecodeError or ValueError when it is none of ours."""
    position = _decoder.decode(value)
    if position.version > _VERSION:
        raise ValueError(f"a position row of version {position.version}, newer than this program")
    return position
