"""What rows consist of: a tenant's, those of its payments and of its open calls.

Every history in a row has a bound, and what grows to it is kept short: instants as differences,
references that only have to be known again as eight bytes. How long a row may get is a law, see
docs/design.md.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from hashlib import blake2b
from itertools import accumulate
from typing import Final

from msgspec import Struct

from schemas.commands import Compare, Method
from schemas.funding import Reason, Status
from schemas.ledger import EntryKind
from schemas.notices import Withheld

VERSION: Final = 1
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
NO_HASH: Final = bytes(32)
# People are told so long before a lot expires.
WARNINGS: Final = (timedelta(days=30), timedelta(days=7))
# The same by how many are still to come.
AHEAD: Final = (timedelta(), *reversed(WARNINGS))


def microseconds(at: datetime) -> int:
    """An instant in microseconds since 1970."""
    return (at - _EPOCH) // _MICROSECOND


def short(reference: str) -> bytes:
    """What a row keeps of a reference that only has to be known again."""
    return blake2b(reference.encode(), digest_size=8).digest()


class LotKind(IntEnum):
    """Whose money a lot is, as a row says it; its names are those of the wire's `GrantKind`."""

    PAID = 0
    PROMOTIONAL = 1


class Grant(Struct, frozen=True, gc=False, array_like=True):
    """Money put in, with its own priority and expiry; active on [effective_at, expires_at)."""

    id: str
    kind: LotKind
    priority: int
    amount_nanos: int
    left_nanos: int
    effective_at: datetime
    expires_at: datetime | None
    created_at: datetime
    # How many of `WARNINGS` are still to come, the last ones.
    warnings: int = 0

    @property
    def warn_at(self) -> datetime | None:
        """When people are told next that it will expire."""
        if not self.warnings or self.expires_at is None:
            return None
        return self.expires_at - AHEAD[self.warnings]


class Planned(Struct, frozen=True, gc=False, array_like=True):
    """A lot that is put in at an instant to come, and, with a period, set back to its amount again
    and again. Until then it is in no balance. `begins_at` is what the periods count from."""

    id: str
    kind: LotKind
    priority: int
    amount_nanos: int
    at: datetime
    begins_at: datetime
    expires_at: datetime | None
    created_at: datetime
    every_days: int = 0
    every_months: int = 0


class Spent(Struct, frozen=True, gc=False, array_like=True):
    """A lot that has left the row, as it was, so that a correction can bring it back: used up or
    expired, or `voided`; `day` since 1970 is when."""

    grant: Grant
    day: int
    voided: bool = False


class Policy(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """Auto-recharge as it is in force; amounts in nanos. `version` counts its changes."""

    version: int = 0
    enabled: bool = False
    trigger_nanos: int = 0
    compare: Compare = Compare.LT
    method: Method = Method.FIXED
    amount_nanos: int = 0
    target_nanos: int = 0
    min_nanos: int | None = None
    max_nanos: int | None = None
    daily_cap_nanos: int | None = None
    weekly_cap_nanos: int | None = None
    monthly_cap_nanos: int | None = None
    max_per_day: int = 3
    cooldown_s: int = 900
    # Risk classes of destinations and what may be spent on each in a day, in nanos.
    velocity: tuple[tuple[str, int], ...] = ()


class Asked(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """A recharge request without a final answer. `epoch` is None for funding by hand.

    It keeps all that was published, for it is published again word for word.
    """

    recharge_id: str
    amount_nanos: int
    epoch: int | None = None
    attempt: int | None = None
    method: str | None = None
    policy_version: int = 0
    reason: Reason
    trigger_nanos: int | None = None
    balance_nanos: int
    caused_by: str
    requested_at: datetime
    expires_at: datetime
    needs_action: bool = False
    overdue: bool = False
    # A day has passed without an answer: a person decides, and nothing is due any more.
    unresolved: bool = False
    # What open calls held when it was asked for.
    exposure_nanos: int = 0


class Attempt(Struct, frozen=True, gc=False, array_like=True):
    """An auto-recharge that was asked for; kept so that a late answer is known. Its id is derived,
    so a row does without it."""

    epoch: int
    attempt: int
    amount_nanos: int
    # When it was asked for, and how far below the trigger what was available stood then.
    requested_at: datetime | None = None
    short_nanos: int = 0


class Period(Struct, frozen=True, gc=False, array_like=True):
    """A time in which the account was open: since when usage was billed, until it was closed."""

    since: datetime
    until: datetime


class UnpaidFund(Struct, frozen=True, gc=False, array_like=True):
    """Funding by hand that was answered without money; kept so that a late success is known by
    its id (see `short`)."""

    id: bytes
    amount_nanos: int


class Sum(Struct, frozen=True, gc=False):
    """Money of one whole hour, day or block of hours since 1970: how often and how much."""

    at: int
    count: int
    nanos: int


# Sums in the order of `at`, number after number: each has its difference to the one before in its
# place. Half as long as arrays of arrays, and read twice as fast.
Sums = tuple[int, ...]


def sums_of(flat: Sums) -> list[Sum]:
    """The sums a row keeps."""
    sums: list[Sum] = []
    at = 0
    for place in range(0, len(flat), 3):
        at += flat[place]
        sums.append(Sum(at, flat[place + 1], flat[place + 2]))
    return sums


def flat_from(sums: Iterable[Sum]) -> Sums:
    """Sums as a row keeps them."""
    flat: list[int] = []
    before = 0
    for one in sums:
        flat += (one.at - before, one.count, one.nanos)
        before = one.at
    return tuple(flat)


class Declines(Struct, frozen=True, gc=False, array_like=True):
    """Declined attempts of one payment method (see `short`): the day since 1970 of the first, and
    of each that followed how many days after the one before."""

    method: bytes
    gaps: tuple[int, ...]

    @property
    def days(self) -> list[int]:
        """The day of each."""
        return list(accumulate(self.gaps))


class Risk(Struct, frozen=True, gc=False, array_like=True):
    """Money charged for destinations of one risk class, by four hours since 1970."""

    name: str
    blocks: Sums


class Recharging(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """Where auto-recharge stands. `stage` is idle, requested, cooling, paused or needs_approval;
    `until` ends a cooling stage; `retry` says that the epoch goes on after it. `opens_at`: the
    guard that withholds is asked again then, for the window it looks at has moved on. `approved`: a
    person has approved this epoch, so `velocity` is not asked again. `covered`: the balance was
    above the trigger while the request in flight was, so a decline of it ends the epoch."""

    stage: str = "idle"
    epoch: int = 0
    attempt: int = 0
    asked: Asked | None = None
    until: datetime | None = None
    retry: bool = False
    method_index: int = 0
    rounds: int = 0
    declines_in_row: int = 0
    withheld: Withheld | None = None
    attempts: tuple[Attempt, ...] = ()
    hours: Sums = ()
    days: Sums = ()
    declines: tuple[Declines, ...] = ()
    opens_at: datetime | None = None
    approved: bool = False
    risks: tuple[Risk, ...] = ()
    covered: bool = False


class Watch(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """What has been told about a balance, and the band in which there is nothing to tell: above
    `fall_nanos` and below `rise_nanos` (see `alerts`). The default is no band: look at once.

    `armed` and `scopes` are bits: levels that will be told, what is suspended now. `mark` is where
    the use for the runway is counted from, `check_nanos` where it was last worked out.
    """

    fall_nanos: int = 0
    rise_nanos: int = 0
    armed: int = 0
    funding_nanos: int = 0
    mark_at: datetime | None = None
    mark_nanos: int = 0
    check_nanos: int = 0
    scopes: int = 0
    version: int = 0
    renew_at: datetime | None = None


class Assignment(Struct, frozen=True, gc=False, array_like=True):
    """The rate deck of a tenant's calls that start at that instant or later."""

    deck: str
    effective_from: datetime


class LicenceCount(Struct, frozen=True, gc=False):
    """How many licences there are from an instant on."""

    since: datetime
    count: int


class Used(Struct, frozen=True, gc=False):
    """Minutes of a pool used in a month (202603). `told` are bits of what has been told."""

    pool: str
    month: int
    minutes: int
    told: int = 0


class PoolUse(Struct, frozen=True, gc=False, array_like=True):
    """What was used of one pool, number after number: the months since the year 0, the minutes
    and what has been told, again and again."""

    pool: str
    months: tuple[int, ...]


class Licensed(Struct, frozen=True, gc=False, array_like=True):
    """Licences of one plan, in one country where the plan counts by country, and what was used of
    the pools they fill. `counts` are instants, in microseconds since 1970, with the licences from
    then on, in that order; `used` is in the order of pools and months."""

    plan: str
    country: str | None
    counts: tuple[int, ...] = ()
    used: tuple[PoolUse, ...] = ()

    @property
    def changes(self) -> list[LicenceCount]:
        """How many licences there are, change by change."""
        return [
            LicenceCount(_EPOCH + self.counts[at] * _MICROSECOND, self.counts[at + 1])
            for at in range(0, len(self.counts), 2)
        ]

    @property
    def uses(self) -> list[Used]:
        """What was used, by pool and month."""
        uses = []
        for one in self.used:
            for at in range(0, len(one.months), 3):
                year, month = divmod(one.months[at], 12)
                minutes, told = one.months[at + 1], one.months[at + 2]
                uses.append(Used(one.pool, year * 100 + month + 1, minutes, told))
        return uses


def counts_from(changes: Iterable[LicenceCount]) -> tuple[int, ...]:
    """Changes of licences as a row keeps them."""
    flat: list[int] = []
    for one in changes:
        flat += (microseconds(one.since), one.count)
    return tuple(flat)


def used_from(uses: Iterable[Used]) -> tuple[PoolUse, ...]:
    """Uses as a row keeps them."""
    months: dict[str, tuple[int, ...]] = {}
    for one in sorted(uses, key=lambda one: (one.pool, one.month)):
        month = one.month // 100 * 12 + one.month % 100 - 1
        months[one.pool] = (*months.get(one.pool, ()), month, one.minutes, one.told)
    return tuple(PoolUse(pool, flat) for pool, flat in months.items())


class AccountRow(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """One tenant, as it is written: see `Account`, which has the same members in this order. The
    first seven keep their places for ever: other programs read them."""

    version: int = VERSION
    tenant_id: str
    currency: str
    seq: int = 0
    head: bytes = NO_HASH
    overdraft_nanos: int = 0
    grants: tuple[Grant, ...] = ()
    opened_at: datetime
    billing_from: datetime
    closed_at: datetime | None = None
    time_zone: str = "UTC"
    settings_version: int = 0
    overdraft_floor_nanos: int = 0
    policy: Policy = Policy()
    payment_methods: tuple[str, ...] = ()
    recharging: Recharging = Recharging()
    funds: tuple[Asked, ...] = ()
    unpaid_funds: tuple[UnpaidFund, ...] = ()
    former: tuple[Period, ...] = ()
    # In the order of `effective_from`; none: the default deck.
    decks: tuple[Assignment, ...] = ()
    watch: Watch = Watch()
    # Lots to come; `grants` holds only what is active.
    planned: tuple[Planned, ...] = ()
    # What was left of lots when they expired, for usage of before it that comes late.
    lapsed: tuple[Grant, ...] = ()
    # Percentages of the last funding below which people want to know.
    alert_levels: tuple[int, ...] = (50, 20)
    # In the order in which they left the row.
    spent: tuple[Spent, ...] = ()
    pools: tuple[Licensed, ...] = ()
    # Of the tenant's open calls: what they hold, how many do, and whether people were told that
    # no more calls can.
    exposure_nanos: int = 0
    holds: int = 0
    holds_told: bool = False


# Usage reports arrive up to 48 hours late: so long an expired lot can pay for usage of before.
LAPSED_KEPT: Final = timedelta(hours=48)


def forgotten_at(lapsed: Grant) -> datetime:
    """When what was left of an expired lot leaves the row."""
    assert lapsed.expires_at is not None
    return lapsed.expires_at + LAPSED_KEPT


# After this long without an answer a person decides; the request is not published again.
UNANSWERED_FOR: Final = timedelta(hours=24)


def overdue_at(asked: Asked) -> datetime | None:
    """When a request without an answer wants to be looked at; None when a person has to act."""
    if asked.needs_action or asked.unresolved:
        return None
    return min(asked.expires_at, asked.requested_at + UNANSWERED_FOR)


class Payment(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """What is booked of one payment, by status, cumulative; each effect once, in any order.

    `origin` is the kind under which its money came in; `disputed_nanos` what disputes hold back.
    """

    version: int = VERSION
    payment_id: str
    recharge_id: str | None = None
    currency: str
    origin: EntryKind
    booked_nanos: dict[Status, int]
    disputed_nanos: int = 0
    kept_until: datetime


class Hold(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """Money set aside for an open leg, which was `elapsed_s` seconds old at its last sign of life.
    It dies at `until`. Of a leg that has ended the row holds nothing and is kept until then, so
    that phases which come late place no hold again.
    """

    version: int = VERSION
    nanos: int
    elapsed_s: int
    until: datetime
    ended: bool = False
