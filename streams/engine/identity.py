"""What an id and an event's content are remembered by."""

from datetime import UTC, datetime
from typing import Final

from xxhash import xxh3_64_intdigest, xxh32_intdigest

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_DAY: Final = EPOCH.toordinal()


def fingerprint(source: str, event_id: str) -> int:
    """The 64 bits that stand for an identity; never 0, which marks an empty slot.

    The seed tells ("a", "b NUL c") from ("a NUL b", "c").
    """
    return xxh3_64_intdigest(f"{source}\0{event_id}".encode(), len(source)) or 1


def corrected(source: str, event_id: str) -> int:
    """The 64 bits that say that an event is corrected already. No event has a source as long as
    the seed says, so that no event can take the place."""
    return xxh3_64_intdigest(f"corrected\0{source}\0{event_id}".encode(), 1 << 32) or 1


def check_of(content: bytes, tenant: bytes = b"") -> int:
    """The 32 bits that stand for what an event says about money, and about whose."""
    return xxh32_intdigest(content + tenant)


def week_of(at: datetime) -> int:
    """The generation an instant (in UTC) belongs to: whole weeks since 1970."""
    return (at.toordinal() - _FIRST_DAY) // 7
