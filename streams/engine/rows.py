"""The rows of one partition: bytes until touched, counted, digested, with their due times.

A row's value begins with 8 bytes, its next due instant, so that the index of due times needs no
decoding. The position row stands beside the rows in the changelog: how far every source topic
has been read, the last `now`, and what a restore must find again.
"""

import heapq
from collections.abc import Iterable
from datetime import datetime
from typing import Final

from aiokafka.partitioner import murmur2
from xxhash import xxh3_64_intdigest

from streams.billing.account import Account
from streams.engine.position import Position, SeenMark, SourcePosition

POSITION_KEY: Final = b"\0position"
# What a key says after its tenant, whose name holds no NUL; what follows is the outside world's.
PAYMENT_MARK: Final = b"\0pay\0"
HOLD_MARK: Final = b"\0hold\0"
NEVER: Final = 0xFFFF_FFFF_FFFF_FFFF
_WRAP: Final = 1 << 64
# Due times are kept exactly for the hour that runs, else only by the hour (2^32 µs are 72 minutes):
# most rows are due in months, and a pair in a heap takes 100 bytes.
_HOUR_BITS: Final = 32
# Entries of the index that nobody needs any more are suffered up to this number beside one a row.
_MOST_STALE: Final = 1_024


def payment_key(tenant_id: str, payment_id: str) -> bytes:
    """Where the row of one payment stands."""
    return b"".join((tenant_id.encode(), PAYMENT_MARK, payment_id.encode()))


def hold_key(tenant: bytes, leg: str) -> bytes:
    """Where the row of one leg's hold stands."""
    return b"".join((tenant, HOLD_MARK, leg.encode()))


def owner_of(key: bytes) -> tuple[bytes, bytes]:
    """The tenant of a row, and its mark: none for the tenant's own row."""
    at = key.find(b"\0")
    if at < 0:
        return key, b""
    return key[:at], key[at : key.index(b"\0", at + 1) + 1]


def home_of(key: bytes, partitions: int) -> int:
    """The partition a tenant's records belong to, of so many."""
    home: int = (murmur2(key) & 0x7FFF_FFFF) % partitions
    return home


def row_digest(key: bytes, value: bytes) -> int:
    """One row's part in the digest of a partition."""
    return xxh3_64_intdigest(key + value)


def due_of(value: bytes) -> int:
    """When a row wants to be looked at again, µs since 1970; NEVER when it does not."""
    return int.from_bytes(value[:8], "big")


class Totals:
    """What the position row says of all rows; kept up incrementally, never recounted."""

    def __init__(self) -> None:
        self.rows = 0
        self.digest = 0
        self.balances: dict[str, list[int]] = {}
        self.tenants: dict[str, int] = {}
        self.exposures: dict[str, int] = {}
        self.holds = 0

    def copy(self) -> "Totals":
        """The same totals, to be changed without touching these."""
        twin = Totals()
        twin.rows, twin.digest = self.rows, self.digest
        twin.balances = {currency: list(sums) for currency, sums in self.balances.items()}
        twin.tenants = dict(self.tenants)
        twin.exposures, twin.holds = dict(self.exposures), self.holds
        return twin

    def row(self, key: bytes, before: bytes | None, after: bytes | None) -> None:
        """A row was added, changed or (after None) deleted."""
        if before is not None:
            self.rows -= 1
            self.digest -= row_digest(key, before)
        if after is not None:
            self.rows += 1
            self.digest += row_digest(key, after)
        self.digest %= _WRAP

    def tenant(self, before: Account | None, after: Account) -> None:
        """A tenant came, or went from one state and balance to another."""
        if before is not None:
            self._tenant(before, -1)
        self._tenant(after, 1)

    def _tenant(self, account: Account, sign: int) -> None:
        state = account.state
        self.tenants[state] = self.tenants.get(state, 0) + sign
        sums = self.balances.get(account.currency)
        if sums is None:
            sums = self.balances[account.currency] = [0, 0]
        balance_nanos = account.balance_nanos
        sums[0 if balance_nanos >= 0 else 1] += sign * balance_nanos
        if account.standing.holds:
            self.holds += sign * account.standing.holds
            held_nanos = self.exposures.get(account.currency, 0)
            self.exposures[account.currency] = held_nanos + sign * account.standing.exposure_nanos

    def position(
        self,
        *,
        now: datetime,
        sources: dict[str, SourcePosition],
        seen_next: int,
        seen_marks: tuple[SeenMark, ...] = (),
    ) -> Position:
        """The position row that names these totals."""
        return Position(
            now=now,
            sources=sources,
            rows=self.rows,
            digest=f"{self.digest:016x}",
            balances={
                currency: (str(positive), str(negative))
                for currency, (positive, negative) in self.balances.items()
            },
            tenants={state: count for state, count in self.tenants.items() if count},
            seen_next=seen_next,
            exposures={currency: str(nanos) for currency, nanos in self.exposures.items()},
            holds=self.holds,
            seen_marks=seen_marks,
        )

    @classmethod
    def of(cls, position: Position) -> "Totals":
        """The totals a position row names."""
        totals = cls()
        totals.rows = position.rows
        totals.digest = int(position.digest, 16)
        totals.balances = {
            currency: [int(positive), int(negative)]
            for currency, (positive, negative) in position.balances.items()
        }
        totals.tenants = dict(position.tenants)
        totals.exposures = {one: int(nanos) for one, nanos in position.exposures.items()}
        totals.holds = position.holds
        return totals


class Rows:
    """The rows of one partition in memory, as bytes, and the index of their due times.

    The index may name a row more than once and at instants that are not its own any more: what
    counts is what the row says when its time has come.
    """

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self._hour = -1  # up to this one, due times stand in `_near`, a heap
        self._clear_index()

    def _clear_index(self) -> None:
        self._near: list[tuple[int, bytes]] = []
        self._later: dict[int, list[bytes]] = {}
        self._hours: list[int] = []
        self._filed = 0

    def load(self, records: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Take changelog records in their order; None deletes."""
        values = self.values
        for key, value in records:
            if value is None:
                values.pop(key, None)
            else:
                values[key] = value

    def index_due(self) -> None:
        """Build the index, once after the last `load`."""
        self._clear_index()
        for key, value in self.values.items():
            due = due_of(value)
            if due != NEVER:
                self._file(due, key)

    def _file(self, due: int, key: bytes) -> None:
        self._filed += 1
        hour = due >> _HOUR_BITS
        if hour <= self._hour:
            heapq.heappush(self._near, (due, key))
            return
        keys = self._later.get(hour)
        if keys is None:
            self._later[hour] = [key]
            heapq.heappush(self._hours, hour)
        else:
            keys.append(key)

    def _begin_hour(self) -> None:
        self._hour = heapq.heappop(self._hours)
        keys = self._later.pop(self._hour)
        self._filed -= len(keys)
        for key in keys:
            value = self.values.get(key)
            if value is not None:
                due = due_of(value)
                # What is due at another time was filed again when that was written.
                if due >> _HOUR_BITS == self._hour:
                    self._filed += 1
                    self._near.append((due, key))
        heapq.heapify(self._near)

    def put(self, key: bytes, value: bytes | None) -> None:
        """Publish a row that is committed; None deletes it."""
        before = self.values.get(key)
        if value is None:
            self.values.pop(key, None)
            return
        self.values[key] = value
        due = due_of(value)
        if due != NEVER and (before is None or due_of(before) != due):
            self._file(due, key)
            if self._filed > 2 * len(self.values) + _MOST_STALE:
                self.index_due()

    def next_due(self) -> int:
        """No row is due before this, µs since 1970; NEVER when nothing is due at any time. It is
        exact once `due` was asked for that instant, else the beginning of an hour."""
        heap = self._near
        while heap:
            due, key = heap[0]
            value = self.values.get(key)
            if value is not None and due_of(value) == due:
                return due
            heapq.heappop(heap)  # the row has changed since
            self._filed -= 1
        return self._hours[0] << _HOUR_BITS if self._hours else NEVER

    def due(self, until_us: int, most: int) -> list[tuple[int, bytes]]:
        """The rows due at or before an instant, earliest first, at most `most`. They stay due
        until `put` gives them another instant or deletes them."""
        while self._hours and self._hours[0] << _HOUR_BITS <= until_us:
            self._begin_hour()
        taken: list[tuple[int, bytes]] = []
        while len(taken) < most and self.next_due() <= until_us:
            entry = heapq.heappop(self._near)
            if not taken or taken[-1] != entry:
                taken.append(entry)
            else:
                self._filed -= 1
        for entry in taken:
            heapq.heappush(self._near, entry)
        return taken

    def totals(self) -> tuple[int, int]:
        """Row count and digest, recounted from the bytes: what a restore compares."""
        digest = 0
        for key, value in self.values.items():
            digest += row_digest(key, value)
        return len(self.values), digest % _WRAP
