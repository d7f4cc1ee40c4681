"""Commands: what an administrator or operator asks of a tenant's account.

Written to `credits.command.v1` by the API and the command line only. Every command is answered
by exactly one notice: `command_applied`, `command_refused` or, for a repeat, `command_repeated`.
"""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from schemas.decks import DeckName
from schemas.funding import Count
from schemas.money import Amount, Currency, Money
from schemas.usage import Country, Id, TenantId, Text, Timestamp


class Method(StrEnum):
    """How much an auto-recharge asks for."""

    FIXED = "fixed"
    FIXED_MULTIPLE = "fixed_multiple"
    TARGET = "target"
    GAP_PLUS_AMOUNT = "gap_plus_amount"


class Compare(StrEnum):
    """When the trigger fires: strictly below (lt), or at it too (le)."""

    LT = "lt"
    LE = "le"


class GrantKind(StrEnum):
    """Whose money a grant is."""

    PAID = "paid"
    PROMOTIONAL = "promotional"


class RechargePolicy(Struct, kw_only=True, frozen=True, gc=False):
    """Auto-recharge: "when the balance falls below `trigger`, add `amount`".

    Amounts are in the account's currency. `target` is the level to reach for method `target`.
    Caps and limits that are absent are off, except `max_per_day`. `velocity` says what may be
    spent in a day on each risk class of destinations before a person has to approve a recharge.
    """

    enabled: bool = False
    trigger: Amount = "0"
    compare: Compare = Compare.LT
    method: Method = Method.FIXED
    amount: Amount | None = None
    target: Amount | None = None
    min_amount: Amount | None = None
    max_amount: Amount | None = None
    daily_cap: Amount | None = None
    weekly_cap: Amount | None = None
    monthly_cap: Amount | None = None
    max_per_day: Annotated[int, Meta(ge=1, le=1_000)] = 3
    cooldown_s: Annotated[int, Meta(ge=0, le=86_400)] = 900
    velocity: Annotated[dict[str, Amount], Meta(max_length=3)] = {}


class Command(Struct, kw_only=True, frozen=True, gc=False, tag_field="command"):
    """What every command carries. `command_id` is made by the caller (UUIDv7) and is the
    identity of the command: sent twice, it is answered once."""

    command_id: Id | None = None
    source: Id | None = None
    tenant_id: TenantId | None = None
    issued_at: Timestamp
    issued_by: Text | None = None


class OpenTenant(Command, kw_only=True, frozen=True, gc=False, tag="open_tenant"):
    """Open an account, or re-open a closed one. The currency is fixed for ever."""

    currency: Currency
    billing_from: Timestamp | None = None
    opening_balance: Amount | None = None
    time_zone: Text = "UTC"


class CloseTenant(Command, kw_only=True, frozen=True, gc=False, tag="close_tenant"):
    """Close an account: nothing new is charged or requested, what is left expires as ever."""

    reason: Text | None = None


class Settings(Command, kw_only=True, frozen=True, gc=False, tag="settings"):
    """Change auto-recharge, payment methods or alert levels; what is absent stays.

    `expected_version` is the settings version the caller has seen; another one in force refuses
    the command (`version_conflict`) and changes nothing. `payment_methods` are references the
    payment service understands, in the order to try; never card data. `alert_levels` are
    percentages of the last funding: people are told when the balance falls below one.
    """

    expected_version: Count
    policy: RechargePolicy | None = None
    payment_methods: Annotated[list[Text], Meta(max_length=5)] | None = None
    overdraft_floor: Amount | None = None
    alert_levels: Annotated[list[Annotated[int, Meta(ge=1, le=99)]], Meta(max_length=4)] | None = (
        None
    )


class Fund(Command, kw_only=True, frozen=True, gc=False, tag="fund"):
    """Add funds by hand: asks the payment service under the command's own id."""

    amount: Money
    payment_method: Text | None = None


class BookPayment(Command, kw_only=True, frozen=True, gc=False, tag="book_payment"):
    """Book money that was received elsewhere, once per `payment_id`."""

    payment_id: Id
    amount: Money
    reason: Text | None = None


class Adjustment(Command, kw_only=True, frozen=True, gc=False, tag="adjustment"):
    """Correct the balance up or down, with a reason."""

    amount: Money
    reason: Annotated[str, Meta(min_length=1, max_length=255)]
    expires_at: Timestamp | None = None


class Grant(Command, kw_only=True, frozen=True, gc=False, tag="grant"):
    """Put money in as a lot of its own: active on [`effective_at`, `expires_at`), burnt by
    `priority` (lowest first).

    Before `effective_at` (now, when absent) it is in no balance. Without `expires_at` paid money
    expires after twelve months and promotional money never. With `every_days` or `every_months` it
    is an allowance: counted from `effective_at`, the lot is set back to `amount`, never added to.
    The lot's id is derived from the command's; the answer names it.
    """

    amount: Money
    kind: GrantKind = GrantKind.PROMOTIONAL
    priority: Annotated[int, Meta(ge=0, le=1_000)] = 100
    effective_at: Timestamp | None = None
    expires_at: Timestamp | None = None
    every_days: Annotated[int, Meta(ge=1, le=366)] | None = None
    every_months: Annotated[int, Meta(ge=1, le=12)] | None = None
    reason: Annotated[str, Meta(min_length=1, max_length=255)]


class Void(Command, kw_only=True, frozen=True, gc=False, tag="void"):
    """Take what is left of a lot, and what is still to come of it."""

    grant_id: Id
    reason: Annotated[str, Meta(min_length=1, max_length=255)]


class TariffAssignment(Command, kw_only=True, frozen=True, gc=False, tag="tariff_assignment"):
    """Price a tenant's calls that start at `effective_from` (now, when absent) or later by a rate
    deck of its own; `default` goes back to the one of all. A deck need not be published yet:
    until it is, calls are unrated."""

    deck: DeckName
    effective_from: Timestamp | None = None


class Licences(Command, kw_only=True, frozen=True, gc=False, tag="licences"):
    """How many licences of a plan a tenant has from `effective_from` (now, when absent) on.

    `capability` is the plan, such as MCOMEETADV or MCOPSTN1; `country` is where its users are, for
    calling plans, whose minutes are counted by country.
    """

    capability: Annotated[str, Meta(min_length=1, max_length=32)]
    count: Annotated[int, Meta(ge=0, le=1_000_000)]
    country: Country | None = None
    effective_from: Timestamp | None = None


class Approve(Command, kw_only=True, frozen=True, gc=False, tag="approve"):
    """What looked like fraud is none: ask for the money that is missing."""

    reason: Text | None = None


class Deny(Command, kw_only=True, frozen=True, gc=False, tag="deny"):
    """It may be fraud: auto-recharge is paused until money comes or a method is added."""

    reason: Text | None = None


class ResolveRecharge(Command, kw_only=True, frozen=True, gc=False, tag="resolve_recharge"):
    """A person decides what became of a request that nobody answered.

    `paid` books `amount` under `payment_id`, as a result would have, once; otherwise the request
    counts as never paid, which is refused for its first 24 hours. Should it be paid later all the
    same, that result is credited.
    """

    recharge_id: Id
    paid: bool
    payment_id: Id | None = None
    amount: Money | None = None
    reason: Text | None = None


AnyCommand = (
    OpenTenant
    | CloseTenant
    | Settings
    | Fund
    | BookPayment
    | Adjustment
    | Grant
    | Void
    | TariffAssignment
    | Licences
    | Approve
    | Deny
    | ResolveRecharge
)
