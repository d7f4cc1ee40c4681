"""The position row: how far every source topic has been read, the last `now`, and what a restore
must find again. It stands beside the rows in the changelog."""

from datetime import datetime
from typing import Final

import msgspec
from msgspec import Struct

_VERSION: Final = 1


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
