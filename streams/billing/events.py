"""Events: everything that can move a balance, with what it needs to be decided.

The door normalises: instants are UTC here, a leg's end and duration are settled.
"""

from datetime import datetime

from msgspec import Struct

from schemas.commands import AnyCommand
from schemas.funding import RechargeResult
from schemas.ledger import CausedBy, LedgerEntry
from schemas.usage import CallUsage, ConferenceUsage
from streams.billing.account import Hold, Payment

# What an event came in is what its entries name.
Cause = CausedBy


class UsageEvent(Struct, frozen=True, gc=False):
    """A call leg or conference stay. `duration_s` is None when nothing says how long it took,
    negative when it ended before it began; `disagrees`: its times contradict its duration.

    `original`: the entries that the event it corrects has caused. None: it corrects nothing, or
    something that nobody remembers or that is corrected already.

    `leg` names the leg whose hold the event can touch, and `hold` is that hold, when there is one;
    an end whose tenant has no open calls has neither.
    """

    usage: CallUsage | ConferenceUsage
    cause: Cause
    started_at: datetime
    ended_at: datetime
    duration_s: int | None
    disagrees: bool = False
    original: tuple[LedgerEntry, ...] | None = None
    leg: str = ""
    hold: Hold | None = None


class CommandEvent(Struct, frozen=True, gc=False):
    """A command; `payment` is the row that its payment id names, when there is one."""

    command: AnyCommand
    cause: Cause
    payment: Payment | None = None


class ResultEvent(Struct, frozen=True, gc=False):
    """A payment service's answer; `payment` is the row of its payment, when there is one."""

    result: RechargeResult
    cause: Cause
    payment: Payment | None = None


class Tick(Struct, frozen=True, gc=False):
    """A due instant of an account, or of one of its holds."""

    at: datetime
    hold: Hold | None = None

    @property
    def cause(self) -> Cause:
        """What time brings has no record; the due instant names it."""
        return Cause("tick", -1, -1, "tick", self.at.isoformat())


Event = UsageEvent | CommandEvent | ResultEvent | Tick
