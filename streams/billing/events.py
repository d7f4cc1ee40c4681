"""Events: everything that can move a balance, with what it needs to be decided.

The door normalises: instants are UTC here, a leg's end and duration are settled. Classes and not
structs: they never leave the process, and compiled code reads their members ten times as fast.
"""

from datetime import datetime
from typing import final

from mypy_extensions import mypyc_attr

from schemas.commands import AnyCommand
from schemas.funding import RechargeResult
from schemas.ledger import CausedBy, LedgerEntry
from schemas.usage import Kind, Phase
from streams.billing.parts import Hold, Payment

# What an event came in is what its entries name.
Cause = CausedBy


@final
@mypyc_attr(acyclic=True)
class UsageEvent:
    """A call leg or conference stay: what `schemas.usage.Usage` says that matters here, under the
    same names. `duration_s` is None when nothing says how long it took, negative when it ended
    before it began; `disagrees`: its times contradict its duration.

    `original`: the entries that the event it corrects has caused. None: it corrects nothing, or
    something that nobody remembers or that is corrected already.

    `leg` names the leg whose hold the event can touch, and `hold` is that hold, when there is one;
    an end whose tenant has no open calls has neither.
    """

    __slots__ = (
        "call_id",
        "call_type",
        "callee",
        "capability",
        "cause",
        "corrects",
        "currency",
        "disagrees",
        "duration_s",
        "ended_at",
        "hold",
        "kind",
        "leg",
        "leg_id",
        "number_type",
        "organizer_id",
        "original",
        "phase",
        "started_at",
        "user_country",
        "user_id",
    )

    def __init__(
        self,
        *,
        cause: Cause,
        kind: Kind | None,
        call_type: str | None,
        number_type: str | None,
        capability: str | None,
        phase: Phase,
        call_id: str,
        leg_id: str | None,
        organizer_id: str | None,
        user_id: str | None,
        user_country: str | None,
        callee: str | None,
        started_at: datetime,
        ended_at: datetime,
        duration_s: int | None,
        currency: str | None,
        corrects: str | None,
        disagrees: bool = False,
        original: tuple[LedgerEntry, ...] | None = None,
        leg: str = "",
        hold: Hold | None = None,
    ) -> None:
        self.cause = cause
        self.kind = kind
        self.call_type = call_type
        self.number_type = number_type
        self.capability = capability
        self.phase = phase
        self.call_id = call_id
        self.leg_id = leg_id
        self.organizer_id = organizer_id
        self.user_id = user_id
        self.user_country = user_country
        self.callee = callee
        self.started_at = started_at
        self.ended_at = ended_at
        self.duration_s = duration_s
        self.currency = currency
        self.corrects = corrects
        self.disagrees = disagrees
        self.original = original
        self.leg = leg
        self.hold = hold

    def about(self, leg: str, hold: Hold | None) -> "UsageEvent":
        """The same event with the leg it can touch and that leg's hold."""
        twin = self._twin()
        twin.leg, twin.hold = leg, hold
        return twin

    def correcting(self, original: tuple[LedgerEntry, ...] | None) -> "UsageEvent":
        """The same event with the entries that the event it corrects has caused."""
        twin = self._twin()
        twin.original = original
        return twin

    def _twin(self) -> "UsageEvent":
        return UsageEvent(
            cause=self.cause,
            kind=self.kind,
            call_type=self.call_type,
            number_type=self.number_type,
            capability=self.capability,
            phase=self.phase,
            call_id=self.call_id,
            leg_id=self.leg_id,
            organizer_id=self.organizer_id,
            user_id=self.user_id,
            user_country=self.user_country,
            callee=self.callee,
            started_at=self.started_at,
            ended_at=self.ended_at,
            duration_s=self.duration_s,
            currency=self.currency,
            corrects=self.corrects,
            disagrees=self.disagrees,
            original=self.original,
            leg=self.leg,
            hold=self.hold,
        )


@final
@mypyc_attr(acyclic=True)
class CommandEvent:
    """A command; `payment` is the row that its payment id names, when there is one."""

    __slots__ = ("cause", "command", "payment")

    def __init__(self, command: AnyCommand, cause: Cause, payment: Payment | None = None) -> None:
        self.command = command
        self.cause = cause
        self.payment = payment


@final
@mypyc_attr(acyclic=True)
class ResultEvent:
    """A payment service's answer; `payment` is the row of its payment, when there is one."""

    __slots__ = ("cause", "payment", "result")

    def __init__(
        self, result: RechargeResult, cause: Cause, payment: Payment | None = None
    ) -> None:
        self.result = result
        self.cause = cause
        self.payment = payment


@final
@mypyc_attr(acyclic=True)
class Tick:
    """A due instant of an account, or of one of its holds."""

    __slots__ = ("at", "cause", "hold")

    def __init__(self, at: datetime, hold: Hold | None = None) -> None:
        self.at = at
        self.hold = hold
        # What time brings has no record; the due instant names it.
        self.cause = Cause("tick", -1, -1, "tick", at.isoformat())


Event = UsageEvent | CommandEvent | ResultEvent | Tick
