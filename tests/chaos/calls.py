"""Calls that go on while everything breaks: told of again and again, for as long as a campaign
takes. Some end; of the others the holds die when nobody tells of them for three minutes."""

import random
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any, Final

import orjson
from msgspec import Struct

from schemas import topics
from streams.testbed.load import Expected, Planned, tenant_id

SOURCE: Final = "chaos-calls"
# One word about a call for so many records of usage, on average, and so many calls at a time.
USAGE_TO_ONE: Final = 40
MOST: Final = 30
_CALLEES: Final = ("+442055501234", "+12125550100", "+4915155501234", "+81355501234")


class _Call(Struct, frozen=True):
    tenant: str
    name: str
    callee: str
    since: datetime


class LongCalls:
    """What is told of long calls of a load's tenants, in order. Which call and what follows from
    the seed; how long it has lasted is what `clock` says."""

    def __init__(self, seed: int, tenants: int, clock: Callable[[], datetime]) -> None:
        self._dice = random.Random(f"calls/{seed}")
        self._seed, self._tenants, self._clock = seed, tenants, clock
        self._open: list[_Call] = []
        self._told = 0

    def following(self) -> Iterator[Planned]:
        """The next record to write, and again."""
        dice = self._dice
        while True:
            self._told += 1
            if len(self._open) < MOST and not dice.randrange(3):
                tenant = tenant_id(1 + dice.randrange(self._tenants))
                name = f"{self._seed}-{self._told}"
                call = _Call(tenant, name, dice.choice(_CALLEES), self._clock())
                self._open.append(call)
                yield self._phase(call, "start")
            elif self._open:
                at = dice.randrange(len(self._open))
                if dice.randrange(12):
                    yield self._phase(self._open[at], "progress")
                else:
                    yield self._phase(self._open.pop(at), "end")

    def _phase(self, call: _Call, phase: str) -> Planned:
        event_id = f"long-{self._seed}-{self._told}"
        event: dict[str, Any] = {
            "event_id": event_id,
            "source": SOURCE,
            "tenant_id": call.tenant,
            "kind": "international",
            "phase": phase,
            "leg_id": f"leg-{call.name}",
            "call_id": f"call-{call.name}",
            "callee": call.callee,
            "started_at": call.since.isoformat(),
        }
        if phase != "start":
            event["duration_s"] = (self._clock() - call.since) // timedelta(seconds=1)
        return Planned(
            topics.CALL_USAGE, call.tenant.encode(), orjson.dumps(event), (), Expected.BOOK, None,
            0, event_id,
        )  # fmt: skip
