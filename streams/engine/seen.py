"""Remembered ids: exact for 35 days, bounded, cheap.

An id is a 64-bit fingerprint of (source, id); beside it stand a 32-bit check over what in the
event matters for money, and the ordinal of the packed record it was written in. The same
fingerprint with another check is a conflict and never silently dropped, so a collision cannot
swallow money. Ids live in generations, a week each by the instant they are remembered under; a
generation goes as a whole.
"""

from array import array
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from struct import Struct as Packing
from struct import pack as packed
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streams.engine.identity import EPOCH

REMEMBERED: Final = timedelta(days=35)
WEEK: Final = timedelta(days=7)

_HEADER: Final = Packing("<BIqqI")
_VERSION: Final = 1
_U8, _U4, _U2 = np.dtype("<u8"), np.dtype("<u4"), np.dtype("<u2")
# A bucket's fingerprints are one cache line.
_WIDTH: Final = 8
_FIRST_BUCKETS: Final = 16
# Buckets kept beyond the last: what overflows at the end goes on there.
_SPARE: Final = 16
# Fuller tables make long probes. Growing by a quarter keeps them at least two thirds full: that is
# what holds an id below 24 bytes at the worst moment, for the price of four moves an id. A table of
# less than two megabytes doubles: one move an id, for up to 40 bytes.
_FULL: Final = (85, 100)
_GROWTH: Final = (5, 4)
_SMALL_BUCKETS: Final = 1 << 14
# Buckets moved while a table grows. Four an id end it well before the old part is too full; above
# so many in one insert two an id must do, for a batch waits for them.
_MOVED_PER_ID: Final = 4
_MOVED_AT_LEAST: Final = 256
_MOVED_AT_ONCE: Final = 1 << 14
# Places in the ledger that are kept: eight bytes each.
_MOST_STARTS: Final = 1 << 18
# Ids put into place at once when a log is restored: the loop turns in between.
_LOADED_AT_ONCE: Final = 1 << 16
_UNPACKED_AT_ONCE: Final = 1_000
# Below this, numpy's cost per call is more than Python's per id.
_FEW: Final = 96

Words = NDArray[np.uint64]
Halves = NDArray[np.uint32]

_HALF: Final = np.uint64(32)
_NOWHERE: Final = np.zeros(0, dtype=np.int64)
_NOTHING: Final = np.zeros(0, dtype=np.uint32)


class _Table:
    """A hash table over numpy arrays that is at least two thirds full once it is large, and never
    stops to grow.

    Buckets of eight, in the order of the fingerprints: bucket = fingerprint * buckets / 2^64; what
    a full bucket has no place for goes into the next. Because of the order a larger table can be
    made in place, from its end downwards, a part at a time: fingerprints whose bucket would have
    been `_kept` or higher stand where the new count of buckets wants them, all others where the
    old one did.
    """

    def __init__(self, ids: int = 0) -> None:
        """`ids`: how many will come, if that is known; then it need not grow on the way."""
        full, of = _FULL
        self._buckets = max(_FIRST_BUCKETS, -(-ids * of // (full * _WIDTH)) + 1)
        self._former = self._kept = self._buckets
        self.count = 0
        slots = (self._buckets + _SPARE, _WIDTH)
        self._fingerprints: Words = np.zeros(slots, dtype=np.uint64)
        self._checks: Halves = np.zeros(slots, dtype=np.uint32)
        self._ordinals: Halves = np.zeros(slots, dtype=np.uint32)
        self._used = np.zeros(slots[0], dtype=np.uint8)

    @property
    def size_bytes(self) -> int:
        """What the table takes in memory."""
        columns = (self._fingerprints, self._checks, self._ordinals, self._used)
        return sum(column.nbytes for column in columns)

    def _homes(self, fingerprints: Words) -> NDArray[np.int64]:
        """The buckets they belong to."""
        high = fingerprints >> _HALF
        homes = (high * np.uint64(self._former)) >> _HALF
        if self._former != self._buckets:
            grown = (high * np.uint64(self._buckets)) >> _HALF
            homes = np.where(homes >= np.uint64(self._kept), grown, homes)
        return homes.astype(np.int64)

    def find(self, wanted: Words) -> tuple[NDArray[np.int64], Halves, Halves]:
        """Which of the fingerprints are here (their places, in no order), their checks and their
        ordinals."""
        places: list[NDArray[np.int64]] = []
        slots: list[NDArray[np.int64]] = []
        buckets = self._homes(wanted)
        pending: NDArray[np.int64] | None = None
        while buckets.size:
            content = self._fingerprints.take(buckets, axis=0)
            # Eight truths of a byte each are one word: whether any is true is one comparison.
            hit = np.flatnonzero((content == wanted[:, np.newaxis]).view(np.uint64))
            if hit.size:
                places.append(hit if pending is None else pending[hit])
                inside = (content[hit] == wanted[hit, np.newaxis]).argmax(axis=1)
                slots.append(buckets[hit] * _WIDTH + inside)
            # An id that is not in a bucket with room is nowhere.
            full = content[:, -1] != 0
            full[hit] = False
            onward = np.flatnonzero(full)
            pending = onward if pending is None else pending[onward]
            buckets, wanted = buckets[onward] + 1, wanted[onward]
        if not places:
            return _NOWHERE, _NOTHING, _NOTHING
        at = np.concatenate(slots)
        return np.concatenate(places), self._checks.ravel()[at], self._ordinals.ravel()[at]

    def _home(self, fingerprint: int) -> int:
        """The bucket it belongs to."""
        home = ((fingerprint >> 32) * self._former) >> 32
        return home if home < self._kept else ((fingerprint >> 32) * self._buckets) >> 32

    def find_one(self, wanted: int) -> tuple[int, int] | None:
        """The check and ordinal of one fingerprint, or None."""
        bucket = self._home(wanted)
        while True:
            content = self._fingerprints[bucket].tolist()
            if wanted in content:
                at = bucket, content.index(wanted)
                return self._checks.item(at), self._ordinals.item(at)
            if not content[-1]:
                return None
            bucket += 1

    def insert(self, fingerprints: Words, checks: Halves, ordinals: Halves) -> None:
        """Add distinct fingerprints that are not here yet."""
        if len(fingerprints) <= _FEW:
            self.insert_few(fingerprints.tolist(), checks.tolist(), ordinals.tolist())
            return
        self._make_room(len(fingerprints))
        self._place(fingerprints, checks, ordinals)

    def insert_few(
        self, fingerprints: Sequence[int], checks: Sequence[int], ordinals: Sequence[int]
    ) -> None:
        """The same for so few that arrays of them would take longer to make."""
        self._make_room(len(fingerprints))
        for fingerprint, check, ordinal in zip(fingerprints, checks, ordinals, strict=True):
            self._place_one(fingerprint, check, ordinal)

    def _make_room(self, count: int) -> None:
        self.count += count
        full, of = _FULL
        while self.count * of > self._buckets * _WIDTH * full:
            # Only a batch that is large beside the table comes here twice.
            self._move(self._kept)
            self._begin_growth()
        if self._former != self._buckets:
            step = min(count * _MOVED_PER_ID, max(count * _MOVED_PER_ID // 2, _MOVED_AT_ONCE))
            self._move(max(step, _MOVED_AT_LEAST))

    def _place_one(self, fingerprint: int, check: int, ordinal: int) -> None:
        bucket = self._home(fingerprint)
        while self._used.item(bucket) == _WIDTH:
            bucket += 1
            if bucket + 1 >= len(self._used):
                self._resize(len(self._used) + _SPARE)
        slot = self._used.item(bucket)
        self._fingerprints[bucket, slot] = fingerprint
        self._checks[bucket, slot] = check
        self._ordinals[bucket, slot] = ordinal
        self._used[bucket] = slot + 1

    def _place(self, fingerprints: Words, checks: Halves, ordinals: Halves) -> None:
        homes = self._homes(fingerprints)
        order = np.argsort(homes)
        buckets, fingerprints = homes[order], fingerprints[order]
        checks, ordinals = checks[order], ordinals[order]
        while buckets.size:
            if int(buckets[-1]) + 1 >= len(self._used):
                self._resize(len(self._used) + _SPARE)
            # Those that share a bucket stand beside each other and take one place after another.
            ranks = np.arange(len(buckets))
            firsts = np.where(np.diff(buckets, prepend=-1) != 0, ranks, 0)
            slots = self._used[buckets] + ranks - np.maximum.accumulate(firsts)
            fits = slots < _WIDTH
            at = buckets[fits] * _WIDTH + slots[fits]
            self._fingerprints.reshape(-1)[at] = fingerprints[fits]
            self._checks.reshape(-1)[at] = checks[fits]
            self._ordinals.reshape(-1)[at] = ordinals[fits]
            # Of several writes to one bucket the last stays, and that is the highest place.
            self._used[buckets[fits]] = slots[fits] + 1
            over = ~fits
            buckets, fingerprints = buckets[over] + 1, fingerprints[over]
            checks, ordinals = checks[over], ordinals[over]

    def _begin_growth(self) -> None:
        more, of = _GROWTH if self._buckets >= _SMALL_BUCKETS else (2, 1)
        self._former = self._kept = self._buckets
        self._buckets = self._buckets * more // of
        self._resize(max(self._buckets + _SPARE, len(self._used)))

    def _resize(self, buckets: int) -> None:
        # In place: the kernel moves the pages of a large array, it does not copy them.
        for column in (self._fingerprints, self._checks, self._ordinals):
            column.resize((buckets, _WIDTH), refcheck=False)
        self._used.resize(buckets, refcheck=False)

    def _move(self, buckets: int) -> None:
        """Move the uppermost buckets not yet moved to where the larger table wants them."""
        if self._former == self._buckets:
            return
        end = self._kept
        first = max(0, end - buckets)
        # What belongs into them may stand behind them, up to the first bucket with room.
        while self._used[end - 1] == _WIDTH:
            end += 1
        part = slice(first, end)
        live = self._fingerprints[part] != 0
        taken = self._fingerprints[part][live], self._checks[part][live], self._ordinals[part][live]
        self._fingerprints[part] = 0
        self._used[part] = 0
        self._kept = first
        if not first:
            self._former = self._kept = self._buckets
        self._place(*taken)

    def digest(self) -> int:
        """All that is here, in any order, as one number."""
        beside = (self._checks.astype(np.uint64) << _HALF) | self._ordinals
        return int((self._fingerprints * (beside << np.uint64(1) | np.uint64(1))).sum())


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
    count = len(fingerprints)
    return _HEADER.pack(_VERSION, ordinal, ledger_from, now_us, count) + packed(
        f"<{count}Q{count}I{count}H", *fingerprints, *checks, *weeks
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
        np.frombuffer(value, _U8, count, at),
        np.frombuffer(value, _U4, count, at + 8 * count),
        np.frombuffer(value, _U2, count, at + 12 * count),
    )


class _Starts:
    """Where in the ledger the entries of batches begin, by ordinal: of every batch, or of every
    second, fourth … when there are too many, so that it stays within two megabytes."""

    def __init__(self) -> None:
        self._first = -1
        self._step = 1
        self._offsets = array("q")

    def note(self, ordinal: int, ledger_from: int) -> None:
        """One more batch; they come in their order."""
        if self._first < 0:
            self._first = ordinal
        if (ordinal - self._first) // self._step < len(self._offsets):
            return
        self._offsets.append(ledger_from)
        if len(self._offsets) >= _MOST_STARTS:
            self._offsets = self._offsets[::2]
            self._step *= 2

    def range_of(self, ordinal: int, end: int) -> tuple[int, int]:
        """Offsets of the ledger between which a batch's entries are; `end` is the ledger's."""
        at = (ordinal - self._first) // self._step
        following = at + 1
        if following < len(self._offsets):
            end = self._offsets[following]
        return self._offsets[at], end


class Seen:
    """All remembered ids of one partition."""

    def __init__(self) -> None:
        self._generations: dict[int, _Table] = {}
        self._starts = _Starts()

    def __len__(self) -> int:
        return sum(table.count for table in self._generations.values())

    @property
    def size_bytes(self) -> int:
        """What the tables take in memory."""
        return sum(table.size_bytes for table in self._generations.values())

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
            places, checks, _ = table.find(wanted_all)
            known.update(zip(places.tolist(), checks.tolist(), strict=True))
        return known

    def ordinal_of(self, fingerprint: int) -> int | None:
        """Which packed record an id came in; None when it is not remembered."""
        for table in self._generations.values():
            hit = table.find_one(fingerprint)
            if hit is not None:
                return hit[1]
        return None

    def ledger_range(self, ordinal: int, ledger_end: int) -> tuple[int, int]:
        """The offsets of the ledger, the second excluded, between which are the entries of the
        batch with that packed record. `ledger_end` is where the ledger ends."""
        return self._starts.range_of(ordinal, ledger_end)

    def remember(self, ids: Ids) -> None:
        """Add the ids of a committed batch."""
        self._starts.note(ids.ordinal, ids.ledger_from)
        if len(ids.weeks) <= _FEW and _is_one_week(ids):
            fingerprints, ordinals = ids.fingerprints.tolist(), [ids.ordinal] * len(ids.weeks)
            table = self._table(int(ids.weeks[0]))
            table.insert_few(fingerprints, ids.checks.tolist(), ordinals)
            return
        for week in _weeks_of(ids):
            self._table(week).insert(*_of_week(ids, week))

    def load(self, log: list[Ids], now: datetime) -> Iterator[None]:
        """Take all ids of a log at once, as `remember` one by one would have; what is over at
        `now` is left out. The list is emptied, so that the ids stand in memory only once. Yields
        between steps of some 10 ms, for others have work to do."""
        by_week: dict[int, list[Ids]] = {}
        totals: dict[int, int] = {}
        for number, ids in enumerate(log):
            self._starts.note(ids.ordinal, ids.ledger_from)
            for week in _weeks_of(ids):
                by_week.setdefault(week, []).append(ids)
                totals[week] = totals.get(week, 0) + _count_of(ids, week)
            if number % _UNPACKED_AT_ONCE == 0:
                yield
        log.clear()
        for week in sorted(by_week):
            parts = by_week.pop(week)
            if _over(week, now):
                continue
            table = self._table(week, totals[week])
            columns: list[tuple[Words, Halves, Halves]] = []
            count = 0
            for ids in parts:
                columns.append(_of_week(ids, week))
                count += len(columns[-1][0])
                if count >= _LOADED_AT_ONCE:
                    _insert_all(table, columns)
                    columns, count = [], 0
                    yield
            if columns:
                _insert_all(table, columns)
                yield

    def _table(self, week: int, ids: int = 0) -> _Table:
        table = self._generations.get(week)
        if table is None:
            table = self._generations[week] = _Table(ids)
        return table

    def forget(self, now: datetime) -> None:
        """Drop every generation whose week ended more than 35 days before `now`."""
        for week in [week for week in self._generations if _over(week, now)]:
            del self._generations[week]

    def digest(self) -> dict[int, int]:
        """An order-free digest per generation: equal sets give equal digests."""
        return {
            week: table.digest() for week, table in sorted(self._generations.items()) if table.count
        }


def _weeks_of(ids: Ids) -> list[int]:
    weeks = ids.weeks
    if _is_one_week(ids):
        return [int(weeks[0])]
    if len(weeks) <= _FEW:
        return sorted(set(weeks.tolist()))
    return [int(week) for week in np.unique(weeks)]


def _is_one_week(ids: Ids) -> bool:
    """Whether all ids are of the same week, as those of nearly all batches are."""
    weeks = ids.weeks.tobytes()
    return bool(weeks) and weeks == weeks[:2] * (len(weeks) // 2)


def _count_of(ids: Ids, week: int) -> int:
    return len(ids.weeks) if _is_one_week(ids) else int(np.count_nonzero(ids.weeks == week))


def _of_week(ids: Ids, week: int) -> tuple[Words, Halves, Halves]:
    """Fingerprints, checks and ordinals of one generation."""
    fingerprints, checks = ids.fingerprints, ids.checks
    if not _is_one_week(ids):
        of_week = ids.weeks == week
        fingerprints, checks = fingerprints[of_week], checks[of_week]
    return fingerprints, checks, np.full(len(fingerprints), ids.ordinal, dtype=np.uint32)


def _insert_all(table: _Table, columns: list[tuple[Words, Halves, Halves]]) -> None:
    fingerprints, checks, ordinals = zip(*columns, strict=True)
    table.insert(np.concatenate(fingerprints), np.concatenate(checks), np.concatenate(ordinals))


def _over(week: int, now: datetime) -> bool:
    return EPOCH + (week + 1) * WEEK + REMEMBERED < now
