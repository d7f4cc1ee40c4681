"""Remembered ids: exact for 35 days, bounded, cheap.

An id is a 64-bit fingerprint of (source, id); beside it stand a 32-bit check over what in the
event matters for money, and the ordinal of the packed record it was written in. The same
fingerprint with another check is a conflict and never silently dropped, so a collision cannot
swallow money. Ids live in generations, a week each by the instant they are remembered under; a
generation goes as a whole.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from struct import Struct as Packing
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh32_intdigest

REMEMBERED: Final = timedelta(days=35)
WEEK: Final = timedelta(days=7)
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_DAY: Final = EPOCH.toordinal()

_HEADER: Final = Packing("<BIqqI")
_VERSION: Final = 1
_FIRST_SLOTS: Final = 1 << 10
# Fuller tables make long probes; emptier ones cost more than 24 bytes an id.
_FULL_IN_EIGHTHS: Final = 6
# Slots moved to a larger table per insert: growth never stalls a batch for long.
_MOVED_AT_ONCE: Final = 1 << 16
# Below this, numpy's cost per call is more than Python's per id.
_FEW: Final = 24

Words = NDArray[np.uint64]
Halves = NDArray[np.uint32]


def fingerprint(source: str, event_id: str) -> int:
    """The 64 bits that stand for an identity; never 0, which marks an empty slot.

    The seed tells ("a", "b NUL c") from ("a NUL b", "c").
    """
    return xxh3_64_intdigest(f"{source}\0{event_id}".encode(), len(source)) or 1


def check_of(content: bytes) -> int:
    """The 32 bits that stand for what an event says about money."""
    return xxh32_intdigest(content)


def week_of(at: datetime) -> int:
    """The generation an instant (in UTC) belongs to: whole weeks since 1970."""
    return (at.toordinal() - _FIRST_DAY) // 7


class _Table:
    """Open addressing over numpy arrays, linear probing; grows without a long stop."""

    def __init__(self, slots: int = _FIRST_SLOTS) -> None:
        self._old: _Table | None = None
        self._moved = 0
        self._allocate(slots)

    def _allocate(self, slots: int) -> None:
        self.fingerprints: Words = np.zeros(slots, dtype=np.uint64)
        self.checks: Halves = np.zeros(slots, dtype=np.uint32)
        self.ordinals: Halves = np.zeros(slots, dtype=np.uint32)
        self.count = 0  # ids in these arrays; those not yet moved are counted by `__len__`

    def __len__(self) -> int:
        if self._old is None:
            return self.count
        return self.count + int(np.count_nonzero(self._old.fingerprints[self._moved :]))

    def find(self, wanted: Words) -> tuple[NDArray[np.bool_], Halves, Halves]:
        """For each fingerprint: whether it is here, its check and its ordinal."""
        found, checks, ordinals = self._find_here(wanted)
        if self._old is not None:
            found_old, checks_old, ordinals_old = self._old.find(wanted)
            checks = np.where(found, checks, checks_old)
            ordinals = np.where(found, ordinals, ordinals_old)
            found = found | found_old
        return found, checks, ordinals

    def _find_here(self, wanted: Words) -> tuple[NDArray[np.bool_], Halves, Halves]:
        mask = np.uint64(len(self.fingerprints) - 1)
        slots = (wanted & mask).astype(np.int64)
        found = np.zeros(len(wanted), dtype=np.bool_)
        at = np.zeros(len(wanted), dtype=np.int64)
        pending = np.arange(len(wanted))
        while pending.size:
            here = slots[pending]
            content = self.fingerprints[here]
            hit = content == wanted[pending]
            hits = pending[hit]
            found[hits] = True
            at[hits] = here[hit]
            pending = pending[~hit & (content != 0)]
            slots[pending] = (slots[pending] + 1) & int(mask)
        return found, self.checks[at], self.ordinals[at]

    def find_one(self, wanted: int) -> tuple[int, int] | None:
        """The check and ordinal of one fingerprint, or None."""
        mask = len(self.fingerprints) - 1
        slot = wanted & mask
        item = self.fingerprints.item
        while content := item(slot):
            if content == wanted:
                return self.checks.item(slot), self.ordinals.item(slot)
            slot = (slot + 1) & mask
        return None if self._old is None else self._old.find_one(wanted)

    def insert(self, fingerprints: Words, checks: Halves, ordinals: Halves) -> None:
        """Add distinct fingerprints that are not here yet."""
        if self._old is not None:
            self._move(_MOVED_AT_ONCE + len(fingerprints))
        while (len(self) + len(fingerprints)) * 8 > len(self.fingerprints) * _FULL_IN_EIGHTHS:
            self._grow()
        self._place(fingerprints, checks, ordinals)

    def _place(self, fingerprints: Words, checks: Halves, ordinals: Halves) -> None:
        mask = np.uint64(len(self.fingerprints) - 1)
        slots = (fingerprints & mask).astype(np.int64)
        pending = np.arange(len(fingerprints))
        while pending.size:
            here = slots[pending]
            free = self.fingerprints[here] == 0
            # Of several that want one slot the last written wins; the others see it and go on.
            self.fingerprints[here[free]] = fingerprints[pending[free]]
            won = self.fingerprints[here] == fingerprints[pending]
            winners = pending[won]
            self.checks[here[won]] = checks[winners]
            self.ordinals[here[won]] = ordinals[winners]
            pending = pending[~won]
            slots[pending] = (slots[pending] + 1) & int(mask)
        self.count += len(fingerprints)

    def _grow(self) -> None:
        while self._old is not None:
            self._move(len(self._old.fingerprints))
        old = _Table(0)
        old.fingerprints, old.checks, old.ordinals = self.fingerprints, self.checks, self.ordinals
        self._allocate(len(old.fingerprints) * 2)
        self._old = old
        self._moved = 0
        if len(old.fingerprints) <= _MOVED_AT_ONCE:
            self._move(len(old.fingerprints))

    def digest(self) -> int:
        """All fingerprints, in any order, as one number."""
        total = int(np.bitwise_xor.reduce(self.fingerprints))
        if self._old is not None:
            total ^= int(np.bitwise_xor.reduce(self._old.fingerprints[self._moved :]))
        return total

    def _move(self, slots: int) -> None:
        old = self._old
        assert old is not None
        part = slice(self._moved, self._moved + slots)
        live = old.fingerprints[part] != 0
        self._place(old.fingerprints[part][live], old.checks[part][live], old.ordinals[part][live])
        self._moved += slots
        if self._moved >= len(old.fingerprints):
            self._old = None


class Ids(Struct, frozen=True, gc=False):
    """The ids of one batch, as one packed record carries them."""

    ordinal: int
    ledger_from: int
    fingerprints: Words
    checks: Halves
    weeks: NDArray[np.uint16]


def pack(
    *,
    ordinal: int,
    ledger_from: int,
    now_us: int,
    fingerprints: Sequence[int],
    checks: Sequence[int],
    weeks: Sequence[int],
) -> bytes:
    """One record for all ids of a batch. `ledger_from` is a lower bound of the offsets of the
    batch's ledger entries, so that a correction finds its original."""
    return b"".join(
        (
            _HEADER.pack(_VERSION, ordinal, ledger_from, now_us, len(fingerprints)),
            np.array(fingerprints, dtype="<u8").tobytes(),
            np.array(checks, dtype="<u4").tobytes(),
            np.array(weeks, dtype="<u2").tobytes(),
        )
    )


def unpack(value: bytes) -> Ids:
    """Read a packed record. Raises ValueError when it is none of ours."""
    if len(value) < _HEADER.size or value[0] != _VERSION:
        raise ValueError("no packed ids of a version this program knows")
    _, ordinal, ledger_from, _, count = _HEADER.unpack_from(value)
    if len(value) != _HEADER.size + count * 14:
        raise ValueError("packed ids of a wrong length")
    at = _HEADER.size
    return Ids(
        ordinal,
        ledger_from,
        np.frombuffer(value, dtype="<u8", count=count, offset=at),
        np.frombuffer(value, dtype="<u4", count=count, offset=at + 8 * count),
        np.frombuffer(value, dtype="<u2", count=count, offset=at + 12 * count),
    )


class Seen:
    """All remembered ids of one partition."""

    def __init__(self) -> None:
        self._generations: dict[int, _Table] = {}

    def __len__(self) -> int:
        return sum(len(table) for table in self._generations.values())

    def probe(self, fingerprints: Sequence[int]) -> dict[int, int]:
        """The checks of those fingerprints that are remembered, by position in the sequence."""
        known: dict[int, int] = {}
        if len(fingerprints) <= _FEW:
            for at, wanted in enumerate(fingerprints):
                for table in self._generations.values():
                    hit = table.find_one(wanted)
                    if hit is not None:
                        known[at] = hit[0]
            return known
        wanted_all = np.array(fingerprints, dtype=np.uint64)
        for table in self._generations.values():
            found, checks, _ = table.find(wanted_all)
            for at in np.flatnonzero(found).tolist():
                known[at] = int(checks[at])
        return known

    def remember(self, ids: Ids) -> None:
        """Add the ids of a committed batch."""
        for week in np.unique(ids.weeks).tolist():
            of_week = ids.weeks == week
            table = self._generations.setdefault(week, _Table())
            fingerprints = ids.fingerprints[of_week]
            table.insert(
                fingerprints,
                ids.checks[of_week],
                np.full(len(fingerprints), ids.ordinal, dtype=np.uint32),
            )

    def forget(self, now: datetime) -> None:
        """Drop every generation whose week ended more than 35 days before `now`."""
        for week in [week for week in self._generations if _over(week, now)]:
            del self._generations[week]

    def digest(self) -> dict[int, int]:
        """An order-free digest per generation: equal sets give equal digests."""
        return {
            week: table.digest() for week, table in sorted(self._generations.items()) if len(table)
        }


def _over(week: int, now: datetime) -> bool:
    return EPOCH + (week + 1) * WEEK + REMEMBERED < now
