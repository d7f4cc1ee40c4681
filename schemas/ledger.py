"""Ledger entries and public balances: what other systems read about money."""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from schemas.funding import Count
from schemas.money import Amount, Currency
from schemas.usage import Id, TenantId, Text, Timestamp

Ordinal = Annotated[int, Meta(ge=1)]
# Pool, plan and, for a calling plan, the users' country.
Pool = Annotated[str, Meta(max_length=64, examples=["domestic/MCOPSTN1/US"])]
Month = Annotated[str, Meta(pattern=r"^[0-9]{4}-[0-9]{2}$(?!\n)", examples=["2026-03"])]
Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Pseudonym = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$(?!\n)")]


class EntryKind(StrEnum):
    """Why money moved."""

    CHARGE = "charge"
    POOL = "pool"
    PURCHASE = "purchase"
    RECHARGE = "recharge"
    GRANT = "grant"
    ADJUSTMENT = "adjustment"
    EXPIRY = "expiry"
    EXPIRY_REOPENED = "expiry_reopened"
    REVERSAL = "reversal"
    REFUND = "refund"
    DISPUTE_OPENED = "dispute_opened"
    DISPUTE_WON = "dispute_won"
    DISPUTE_LOST = "dispute_lost"
    VOID = "void"
    ORPHAN = "orphan"


class CausedBy(Struct, frozen=True, gc=False):
    """The record that moved the money: topic by its name in the manifest, place, identity. A tick
    has topic `tick`, its id is the due instant."""

    topic: str
    partition: int
    offset: int
    source: str
    id: str


class RateUsed(Struct, frozen=True, gc=False, omit_defaults=True):
    """The row of the deck that priced a usage event, and how.

    `prefix` is that of the row; where it is the whole number that was called, its end is hidden
    by x, for numbers are personal data. `started_at` is there when the row has steps, windows or
    a maximum: the prices are then those of the row in force at that instant, and what each
    second cost follows from the deck.
    """

    deck: str
    version: str
    prefix: str
    per_minute: str
    connect_fee: str
    initial_increment_s: int
    increment_s: int
    billed_s: int
    duration_s: int
    started_at: Timestamp | None = None


class GrantUsed(Struct, frozen=True, gc=False):
    """A grant that an entry touched: what it gave (negative) or got, and what is left in it."""

    id: str
    amount: Amount
    left: Amount


class Links(Struct, frozen=True, gc=False, omit_defaults=True):
    """What a correction has to do with what it corrects. `corrects` is the id of the corrected
    event, whose source is that of `caused_by`; `entry` is the number of the entry it had caused: a
    reversal takes it back, a charge stands in its place. Absent when it had cost nothing."""

    corrects: Id
    entry: Ordinal | None = None


class PoolUsed(Struct, frozen=True, gc=False, omit_defaults=True):
    """Included minutes that an entry took (positive) or gave back (negative): which pool, which
    month of the tenant's time zone, and the minutes used in that month after it. `included` is
    the allowance that the use was held against."""

    pool: Pool
    month: Month
    minutes: int
    used: Count
    included: Count | None = None


class LedgerEntry(Struct, frozen=True, gc=False, omit_defaults=True):
    """One booked movement: `credits.ledger.entry.v1`, key = tenant.

    `seq` counts 1, 2, 3 … per tenant without a gap. `amount` is what the balance changed by;
    `balance_after` is the sum of all amounts so far. `hash` is the last member: SHA-256 over the
    previous entry's hash (32 bytes; zeros before the first) and this value's bytes up to
    `,"hash"`. `pools` are the included minutes of a call: of kind `pool` when they paid all of it,
    a `charge` when they ended within it and money paid the rest. `user` and `organizer` stand for
    persons of the event, and are there for tenants that have a key for them.
    """

    tenant_id: TenantId
    seq: Ordinal
    kind: EntryKind
    amount: Amount
    currency: Currency
    balance_after: Amount
    at: Timestamp
    booked_at: Timestamp
    caused_by: CausedBy
    overdraft_after: Amount = "0"
    grants: list[GrantUsed] = []
    usage_kind: str | None = None
    call_id: str | None = None
    callee: str | None = None
    late: bool = False
    duration_disagrees: bool = False
    rate: RateUsed | None = None
    recharge_id: str | None = None
    payment_id: str | None = None
    expires_at: Timestamp | None = None
    reason: str | None = None
    links: Links | None = None
    pools: tuple[PoolUsed, ...] = ()
    user: Pseudonym | None = None
    organizer: Pseudonym | None = None
    hash: Hash | None = None


class PoolState(Struct, frozen=True, gc=False):
    """A pool in the month of the balance's `as_of`: minutes included, used and left. A pool that
    is coupled to one that has ended has nothing left either."""

    pool: Pool
    month: Month
    included: Count
    used: Count
    left: Count


class Balance(Struct, kw_only=True, frozen=True, gc=False, omit_defaults=True):
    """The latest public state of a tenant: `credits.balance.v1`, compacted, key = tenant.

    `available` is the balance without `exposure`, which is what `holds` open calls hold.
    """

    tenant_id: TenantId
    currency: Currency
    balance: Amount
    available: Amount
    overdraft: Amount = "0"
    seq: Count
    hash: Hash
    recharge_state: Text
    recharge_id: Id | None = None
    settings_version: Count
    policy_version: Count = 0
    closed: bool = False
    pools: list[PoolState] = []
    as_of: Timestamp
    exposure: Amount = "0"
    holds: Count = 0
