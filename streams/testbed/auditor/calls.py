"""Open calls: which must hold money, and how much.

What nobody can be sure of is left alone: a call that may have died, one that included
minutes may pay for, one of which something came after its end.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any, Final

import msgspec
from msgspec import Struct

from schemas import topics
from streams.testbed.auditor.events import Event
from streams.testbed.auditor.prices import Tariffs
from streams.testbed.auditor.records import EVER, Record, written_at
from streams.testbed.auditor.rows import Held, Rows
from streams.testbed.auditor.tenants import Tenants
from streams.testbed.auditor.view import View

# A hold dies three minutes after its last sign of life. The clocks of those who write and of those
# who read differ, so that the last minute is nobody's.
_SURELY_LIVES: Final = timedelta(minutes=2)
# Of a sign of life so old nothing is left.
_KEPT: Final = timedelta(minutes=10)
# At 5,000 calls of a tenant further ones hold nothing; near that nobody knows which.
_FEW: Final = 4_000
# So many seconds ahead a call that goes on is paid for.
_AHEAD_S: Final = 60


class Leg(Struct):
    """What was told of a leg: its longest duration, when that was a sign of life, and what may be
    held for it. `vague`: less may be, or nothing, or its end came first. `topic` is where it was
    told of: of two nobody knows what was booked first."""

    sign: datetime
    topic: str
    elapsed_s: int = -1
    prices: set[int] = set()
    ended: bool = False
    vague: bool = False


def name_of(source: str, body: Mapping[str, Any]) -> str:
    """The name of a leg in the keys of its rows."""
    named: Any = body.get("leg_id")
    if named is None:
        at = datetime.fromisoformat(body["started_at"])
        named = (source, body.get("call_id"), body.get("callee"), at)
    return hashlib.sha256(msgspec.msgpack.encode(named)).hexdigest()[:32]


class OpenCalls:
    """The open calls of a partition. Tell it what was booked, then ask what is wrong."""

    def __init__(self, view: View, rows: Rows, tenants: Tenants, tariffs: Tariffs) -> None:
        self._view = view
        self._rows = rows
        self._tenants = tenants
        self._tariffs = tariffs
        self._now = view.now or EVER
        self._kept_from = max(self._now, EVER + _KEPT) - _KEPT
        self._legs = {
            (tenant, name): msgspec.convert(leg, Leg)
            for tenant, name, leg in view.remembered("open_calls")
        }
        self._told_of = {tenant for tenant, _ in self._legs}

    def _matters(self, at: datetime) -> bool:
        """Whether a phase that is a sign of life of then can still say something."""
        return at > self._kept_from

    def note(self, record: Record, event: Event, *, again: bool) -> None:
        """What a booked phase of a leg says about what is held for it; `again`: its id was met
        before."""
        phase = event.body.get("phase", "end")
        # Most calls are not told of while they last: their ends say nothing here.
        if phase == "end" and event.tenant not in self._told_of:
            if event.body.get("leg_id") is None or not self._matters(event.ended):
                return
        elif phase == "correction" or (phase != "end" and not self._matters(event.ended)):
            return
        # What is told ahead of time counts from when it is read, and that is after it is written.
        at = min(event.ended, written_at(record))
        leg = self._leg(event.tenant, name_of(event.source, event.body), at, event.place[0])
        if phase == "end":
            # A repeat ends nothing. The one that counts came before all that was told of the leg,
            # or stands in the other topic, and nobody knows when that was booked.
            leg.vague |= again and not leg.ended
            leg.ended = True
            return
        self._told_of.add(event.tenant)
        # Without a name of its own, an end that came first is not remembered.
        leg.vague |= event.tenant in self._tenants.licences or leg.ended
        elapsed_s = event.duration_s or 0
        prices = self._tariffs.prices(event, elapsed_s + _AHEAD_S)
        if elapsed_s > leg.elapsed_s:
            leg.sign, leg.elapsed_s, leg.prices = at, elapsed_s, prices
        elif elapsed_s == leg.elapsed_s:
            leg.sign, leg.prices = max(leg.sign, at), leg.prices | prices

    def _leg(self, tenant: str, name: str, at: datetime, topic: str) -> Leg:
        leg = self._legs.setdefault((tenant, name), Leg(at, topic))
        leg.vague |= leg.topic != topic
        return leg

    def judge(self) -> None:
        """Every open call holds what was told of it, and nothing holds that nobody has told of."""
        for text in self._faults():
            self._view.report.violate("holds", text)

    def _faults(self) -> Iterator[str]:
        rows = self._rows.holds
        held = Counter(tenant for tenant, _ in rows)
        for (tenant, name), leg in self._legs.items():
            row = rows.get((tenant, name), Held(0, ended=True))
            if leg.ended:
                if not row.ended and not leg.vague:
                    yield f"a call of {tenant} has ended, and holds {_units(row.nanos)}"
                continue
            if leg.sign + _SURELY_LIVES <= self._now or held[tenant] > _FEW:
                continue
            said = " or ".join(map(_units, sorted(leg.prices)))
            if row.ended:
                if not leg.vague and 0 not in leg.prices:
                    yield f"an open call of {tenant} holds nothing, where {said} was due"
            elif row.nanos not in leg.prices and not (leg.vague and row.nanos <= max(leg.prices)):
                yield f"an open call of {tenant} holds {_units(row.nanos)}, where {said} was due"
        if self._view.known_since(*topics.USAGE) > self._kept_from:
            return  # some may be of calls that nobody knows any more
        for (tenant, name), row in rows.items():
            if not row.ended and (tenant, name) not in self._legs:
                yield f"{tenant} holds {_units(row.nanos)} for a call that nobody has told of"

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        return {
            "open_calls": [
                [*key, msgspec.to_builtins(leg)]
                for key, leg in self._legs.items()
                if self._matters(leg.sign)
            ]
        }


def _units(nanos: int) -> str:
    return str(Fraction(nanos, 10**9))
