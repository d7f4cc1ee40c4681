"""Records as read, where they belong, and how to read amounts and instants in them."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from functools import lru_cache
from typing import Final

import msgspec
from msgspec import Struct

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# Reads any JSON; three times as fast as the standard library.
PLAIN: Final = msgspec.json.Decoder()
EVER: Final = datetime.min.replace(tzinfo=UTC)

# Topic, partition and offset; of an entry that time brought, `tick`.
Place = tuple[str, int, int]


class Record(Struct, frozen=True, gc=False):
    """A record as read, whatever it holds."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


class Log(Struct, kw_only=True):
    """What was read of one partition. `rows` is the fold of the changelog, read before the rest;
    `starts` the log starts of the topics that do not keep their records, `begun` the offsets at
    which an earlier audit has ended; behind what is open on a topic, if it is `hidden`, more may
    stand. It was read until `read_at`, if that is known."""

    partition: int
    rows: dict[bytes, bytes]
    records: dict[str, Iterable[Record]]
    starts: dict[str, int] = {}
    begun: dict[str, int] = {}
    hidden: frozenset[str] = frozenset()
    read_at: datetime | None = None

    def gone(self, topic: str) -> range:
        """The offsets whose records have left their topic before an audit could read them."""
        return range(self.begun.get(topic, 0), self.starts.get(topic, 0))

    def complete_since(self, topic: str) -> datetime:
        """From when on everything that was written to a topic has been read."""
        if not self.gone(topic):
            return EVER
        first = next(iter(self.records.get(topic, ())), None)
        if first is None:
            return datetime.max.replace(tzinfo=UTC)
        # Clocks of those who write differ a little.
        return written_at(first) + timedelta(hours=1)


def written_at(record: Record) -> datetime:
    """When a record was written, by the clock of who wrote it."""
    return EPOCH + timedelta(milliseconds=record.timestamp)


def murmur2(key: bytes) -> int:
    """Kafka's key hash, written from its description."""
    mask = 0xFFFFFFFF
    mixer = 0x5BD1E995
    value = 0x9747B28C ^ len(key)
    whole = len(key) // 4 * 4
    for at in range(0, whole, 4):
        word = int.from_bytes(key[at : at + 4], "little") * mixer & mask
        word = (word ^ word >> 24) * mixer & mask
        value = (value * mixer & mask) ^ word
    rest = key[whole:]
    if rest:
        value = (value ^ int.from_bytes(rest, "little")) * mixer & mask
    value = (value ^ value >> 13) * mixer & mask
    return value ^ value >> 15


# A tenant has many records, and the same amounts come again and again.
REMEMBERED: Final = 1 << 14


@lru_cache(REMEMBERED)
def home(key: bytes, partitions: int) -> int:
    """The partition a key belongs to."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


@lru_cache(REMEMBERED)
def nanos(text: str) -> int:
    """Decimal text in 10⁻⁹ units; raises ValueError when it is no whole number of them."""
    value = Fraction(text) * 1_000_000_000
    if value.denominator != 1:
        raise ValueError(text)
    return value.numerator


def shown(amount: int) -> str:
    """Nanos as decimal text."""
    sign, amount = ("-" if amount < 0 else ""), abs(amount)
    rest = f"{amount % 10**9:09}".rstrip("0")
    return f"{sign}{amount // 10**9}{'.' + rest if rest else ''}"


@lru_cache(REMEMBERED)
def utc(text: str) -> datetime:
    """An instant in UTC; beyond the calendar's ends its first or last one."""
    at = datetime.fromisoformat(text)
    try:
        return at.astimezone(UTC)
    except OverflowError:
        if at.year == 1:
            return datetime.min.replace(tzinfo=UTC)
        return datetime.max.replace(tzinfo=UTC)
