"""What a batch holds while it is decided: the records as events, and all it will write."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, final

from mypy_extensions import mypyc_attr

from schemas.ledger import EntryKind, LedgerEntry
from schemas.nanos import NANOS
from schemas.notices import DeadLetterReason
from streams.billing.account import Account
from streams.billing.events import Event
from streams.billing.outcomes import Terms
from streams.billing.parts import Hold, Payment
from streams.engine.outputs import Outputs
from streams.engine.position import Position
from streams.engine.reader import Slice
from streams.engine.rows import Totals
from streams.engine.seen import Ids
from streams.metrics import Meters


@final
@mypyc_attr(acyclic=True)
class Candidate:
    """A record that is a sound event of this partition and not too late."""

    __slots__ = ("check", "event", "fingerprint", "record")

    def __init__(self, record: Any, event: Event, fingerprint: int, check: int) -> None:
        self.record = record
        self.event = event
        self.fingerprint = fingerprint
        self.check = check


def fingerprints_of(candidates: Sequence[Candidate]) -> list[int]:
    """What the candidates' ids are remembered by, in their order."""
    return [candidate.fingerprint for candidate in candidates]


@final
@mypyc_attr(acyclic=True)
class Fate:
    """A record that is not booked here: it goes to the dead letters for a reason, or without one
    to the partition where it belongs. `place` is how many candidates come before it."""

    __slots__ = ("path", "place", "reason", "record", "target")

    def __init__(
        self,
        record: Any,
        place: int,
        reason: DeadLetterReason | None,
        path: str = "",
        target: int = -1,
    ) -> None:
        self.record = record
        self.place = place
        self.reason = reason
        self.path = path
        self.target = target


class Skipped:
    """What has made `ledger.apply` raise in this batch: records by topic and offset, and tenants
    whose tick it was."""

    def __init__(self) -> None:
        self.records: set[tuple[str, int]] = set()
        self.ticks: set[bytes] = set()


class Tally:
    """What a batch will add to the metrics, once it is committed."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, ...], int] = {}
        self.booked_nanos: dict[str, int] = {}
        self.charged_nanos: dict[str, int] = {}

    def add(self, *name_and_labels: str, by: int = 1) -> None:
        """Count something."""
        self.counts[name_and_labels] = self.counts.get(name_and_labels, 0) + by

    def publish(self, meters: Meters) -> None:
        """The batch is committed: tell the metrics."""
        for labels, count in self.counts.items():
            meters[labels].inc(count)
        for currency, nanos in self.charged_nanos.items():
            charged = meters["credits_charged_total", currency, EntryKind.CHARGE.value]
            charged.inc(nanos / NANOS)


class Work:
    """A batch that is decided but not committed."""

    def __init__(self, now: datetime, terms: Terms, outputs: Outputs, totals: Totals) -> None:
        self.now = now
        self.terms = terms
        self.outputs = outputs
        self.totals = totals
        self.tally = Tally()
        self.accounts: dict[bytes, Account] = {}
        self.before: dict[bytes, Account | None] = {}
        self.payments: dict[bytes, Payment] = {}
        self.holds: dict[bytes, Hold] = {}
        self.rows: dict[bytes, bytes | None] = {}
        self.fresh: dict[int, int] = {}
        self.weeks: list[int] = []
        self.notices = 0
        # Whether a correction was read; entries of corrected events by (source, id) of the event.
        self.corrects = False
        self.originals: dict[tuple[str, str], tuple[LedgerEntry, ...]] = {}
        # What this batch takes, and what must wait for the next one.
        self.taken: list[Slice] = []
        self.left: list[Slice] = []
        # Tenants whose recharge had been withheld for a stale balance, asked again.
        self.caught_up: list[bytes] = []
        # None: nothing was decided, not even an offset moves.
        self.position: Position | None = None
        self.ids: Ids | None = None
