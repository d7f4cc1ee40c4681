"""Rows: the table as its changelog has it, held against the position row, and open calls' holds."""

from datetime import timedelta
from fractions import Fraction
from typing import Any, Final

import msgspec
from msgspec import Struct
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from schemas import topics
from streams.testbed.auditor.records import EPOCH, home, utc
from streams.testbed.auditor.tenants import Tenants
from streams.testbed.auditor.view import POSITION, View

# Where a tenant's row keeps what its open calls hold, and how many do.
EXPOSURE: Final = 26
HELD: Final = 27
_HOLD_LIVES: Final = timedelta(minutes=3)
# Ticks come every second; a shard that has more to do than one batch holds takes a few.
_TICK_WITHIN: Final = timedelta(minutes=1)


class Held(Struct, frozen=True):
    """A hold as its row says it."""

    nanos: int
    ended: bool


class Rows:
    """The rows of a partition: those of tenants are kept, by tenant, and those of open calls, by
    tenant and leg (`holds`)."""

    def __init__(self, view: View, tenants: Tenants) -> None:
        self._view = view
        self._report = view.report
        self._log = view.log
        self._position = view.position
        self._tenants = tenants
        self.of_tenant: dict[str, list[Any]] = {}
        self.holds: dict[tuple[str, str], Held] = {}
        self._held: dict[str, list[int]] = {}

    def judge(self) -> None:
        """Read the rows; count, digest and sums are those of the position row."""
        raw = self._log.rows.get(POSITION)
        rows = {key: value for key, value in self._log.rows.items() if key != POSITION}
        if raw is None:
            if rows:
                self._report.violate(
                    "changelog", f"partition {self._log.partition} has rows but no position row"
                )
            else:
                self._never_booked()
            return
        digest = sum(xxh3_64_intdigest(key + value) for key, value in rows.items()) % 2**64
        if len(rows) != self._position["rows"] or f"{digest:016x}" != self._position["digest"]:
            self._report.violate(
                "changelog",
                f"partition {self._log.partition}: {len(rows)} rows with digest {digest:016x}, the "
                f"position row says {self._position['rows']} with {self._position['digest']}",
            )
        for key, value in rows.items():
            tenant = key.partition(b"\0")[0]
            if home(tenant, self._view.partitions) != self._log.partition:
                self._report.violate("partition", f"the row of {tenant.decode()}")
            mark = key[len(tenant) :].split(b"\0", 2)[1:2]
            if not mark:
                row = msgspec.msgpack.decode(value[8:])
                self.of_tenant[tenant.decode()] = row
                self._tenants.currencies[tenant.decode()] = row[2]
                self._report.count("rows")
            elif mark == [b"hold"]:
                self._one_hold(tenant.decode(), key[len(tenant) + 6 :].decode(), value)
        self._exposures()
        self._sums()

    def _never_booked(self) -> None:
        """Without a changelog nothing was ever booked, or it is gone."""
        if self._view.remembered("tenants"):
            self._report.violate(
                "changelog", f"partition {self._log.partition} had rows and has none any more"
            )
        outputs = (
            topics.LEDGER,
            topics.BALANCE,
            topics.NOTIFICATION,
            topics.REQUESTED,
            *map(topics.dead_letters_of, topics.SOURCES),
        )
        for topic in outputs:
            if next(iter(self._view.records(topic)), None) is not None:
                self._report.unknown(
                    "changelog",
                    f"partition {self._log.partition} has no rows, but records in "
                    f"{self._view.names[topic]}: it has just begun, or the changelog is gone",
                )

    def _sums(self) -> None:
        """The position row says what the rows' balances sum to, those below zero apart."""
        sums: dict[str, list[int]] = {}
        for row in self.of_tenant.values():
            balance = sum(grant[4] for grant in row[6]) - row[5]
            sums.setdefault(row[2], [0, 0])[balance < 0] += balance
        told = {
            currency: [int(nanos) for nanos in said]
            for currency, said in self._position["balances"].items()
        }
        if any(told.get(one, [0, 0]) != sums.get(one, [0, 0]) for one in told.keys() | sums.keys()):
            self._report.violate(
                "changelog",
                f"partition {self._log.partition}: the balances sum to {sums}, the position row "
                f"says {told}",
            )

    def judge_sources(self) -> None:
        """The last record of each source that was booked was read, and is the same, unless it has
        left its topic or an earlier audit has read it."""
        for topic in topics.SOURCES:
            source = self._position.get("sources", {}).get(self._view.names[topic], {})
            last = source.get("last", -1)
            if last < max(0, self._log.starts.get(topic, 0), self._log.begun.get(topic, 0)):
                continue
            place = f"{self._view.where(topic)}/{last}"
            found = next((one for one in self._view.records(topic) if one.offset == last), None)
            if found is None:
                self._report.unknown(
                    "at_least_once", f"{place} was booked; the topic was not read as far as that"
                )
            elif (
                xxh3_64_hexdigest((found.key or b"") + b"\0" + (found.value or b""))
                != (source["hash"])
            ):
                self._report.violate(
                    "at_least_once", f"{place} is another record than the one that was booked"
                )

    def _one_hold(self, tenant: str, leg: str, value: bytes) -> None:
        _, held, _, _, ended, *_ = msgspec.msgpack.decode(value[8:])
        if self._view.wanted(tenant):
            self.holds[tenant, leg] = Held(held, ended)
        due = EPOCH + timedelta(microseconds=int.from_bytes(value[:8], "big"))
        now = utc(self._position["now"])
        if due + _TICK_WITHIN < now or due > now + _HOLD_LIVES:
            self._report.violate("holds", f"a hold of {tenant} dies at {due}, seen at {now}")
        if ended:
            if held:
                self._report.violate("holds", f"an ended call of {tenant} holds {held}")
            return
        self._report.count("holds")
        self._held.setdefault(tenant, []).append(held)

    def _exposures(self) -> None:
        """Sums and counts, in the tenants' rows and in the position row."""
        sums: dict[str, int] = {}
        count = 0
        for tenant, row in self.of_tenant.items():
            held = self._held.pop(tenant, [])
            said = (row[EXPOSURE], row[HELD]) if len(row) > HELD else (0, 0)
            if self._view.wanted(tenant) and said != (sum(held), len(held)):
                self._report.violate(
                    "holds",
                    f"{said[1]} calls of {tenant} hold {Fraction(said[0], 10**9)} by its row, "
                    f"{len(held)} hold {Fraction(sum(held), 10**9)} by theirs",
                )
            sums[row[2]] = sums.get(row[2], 0) + sum(held)
            count += len(held)
        for tenant in self._held:
            self._report.violate("holds", f"{tenant} has holds but no row")
        told = {one: int(nanos) for one, nanos in self._position.get("exposures", {}).items()}
        differs = any(told.get(one, 0) != sums.get(one, 0) for one in told.keys() | sums.keys())
        if differs or self._position.get("holds", 0) != count:
            self._report.violate(
                "holds", f"partition {self._log.partition}: the position row sums to {told}"
            )
