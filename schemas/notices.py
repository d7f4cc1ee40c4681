"""Notices: what people should hear, and the answers to commands."""

from enum import StrEnum

from msgspec import Struct

from schemas.funding import Count, Reason
from schemas.money import Amount
from schemas.usage import Id, Kind, TenantId, Text, Timestamp


class NoticeKind(StrEnum):
    """What happened. Readers must expect new kinds."""

    COMMAND_APPLIED = "command_applied"
    COMMAND_REFUSED = "command_refused"
    COMMAND_REPEATED = "command_repeated"
    RECHARGE_REQUESTED = "recharge_requested"
    RECHARGE_SUCCEEDED = "recharge_succeeded"
    RECHARGE_DECLINED = "recharge_declined"
    RECHARGE_NEEDS_ACTION = "recharge_needs_action"
    RECHARGE_ENDED = "recharge_ended"
    RECHARGE_OVERDUE = "recharge_overdue"
    RECHARGE_PAUSED = "recharge_paused"
    RECHARGE_WITHHELD = "recharge_withheld"
    RECHARGE_UNRESOLVED = "recharge_unresolved"
    RECHARGE_RESOLVED = "recharge_resolved"
    RECHARGE_NEEDS_APPROVAL = "recharge_needs_approval"
    GRANT_ACTIVE = "grant_active"
    RECHARGE_UNNEEDED = "recharge_unneeded"
    GRANT_EXPIRED = "grant_expired"
    GRANT_EXPIRING = "grant_expiring"
    BALANCE_LOW = "balance_low"
    BALANCE_RUNWAY = "balance_runway"
    BALANCE_BELOW_TRIGGER = "balance_below_trigger"
    BALANCE_EXHAUSTED = "balance_exhausted"
    BALANCE_NEGATIVE = "balance_negative"
    ORPHAN_PAYMENT = "orphan_payment"
    POOL_USED = "pool_used"
    SETTINGS_CHANGED = "settings_changed"
    DECK_CHANGED = "deck_changed"
    HOLDS_EXCEEDED = "holds_exceeded"
    SUSPENDED = "suspended"
    RESUMED = "resumed"


class Withheld(StrEnum):
    """Why no recharge was requested, in the order in which the guards are asked."""

    DISABLED = "disabled"
    ABOVE_TRIGGER = "above_trigger"
    IN_FLIGHT = "in_flight"
    STALE = "stale"
    PAUSED = "paused"
    COOLING = "cooling"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    DAILY_COUNT = "daily_count"
    DAILY_AMOUNT = "daily_amount"
    WEEKLY_AMOUNT = "weekly_amount"
    MONTHLY_AMOUNT = "monthly_amount"
    VELOCITY = "velocity"
    ABOVE_MAX = "above_max"


class GuardAsked(Struct, frozen=True, gc=False, omit_defaults=True):
    """One guard's answer: whether it holds the recharge back, what it found, and its limit.

    Amounts are decimal text in the account's currency, counts are whole numbers.
    """

    guard: Withheld
    holds: bool
    found: Text | None = None
    limit: Text | None = None


class Notice(Struct, kw_only=True, frozen=True, gc=False, omit_defaults=True):
    """One thing to hear: `credits.notification.v1`, key = tenant.

    For an answered command `command_id` names it, `rule` is the named rule that refused it and
    `fix` says in one sentence what to do. `version` is the settings version then in force.
    `guards` are those that were asked before a recharge was requested or withheld, in their order:
    the last one of a withheld recharge holds, all others pass.

    `suspended` and `resumed` are a signal for those who admit calls: for each of its `scopes` the
    highest `signal_version` counts, and a suspension ends with `lease_until` unless it is renewed;
    without one it holds until a higher version. `available` and `exposure` are there while open
    calls hold money. Included minutes go on, whatever is suspended;
    emergency calls are never in it.
    """

    notice: NoticeKind
    tenant_id: TenantId
    at: Timestamp
    caused_by: Text
    command_id: Id | None = None
    rule: Text | None = None
    fix: str | None = None
    version: Count | None = None
    withheld: Withheld | None = None
    balance: Amount | None = None
    amount: Amount | None = None
    recharge_id: Id | None = None
    payment_id: Id | None = None
    decline_code: Text | None = None
    retry_at: Timestamp | None = None
    grant_id: Id | None = None
    guards: list[GuardAsked] = []
    policy_version: Count | None = None
    epoch: Count | None = None
    attempt: Count | None = None
    payment_method: Text | None = None
    reason: Reason | None = None
    level: Amount | None = None
    percent: Count | None = None
    pool: Text | None = None
    month: Text | None = None
    hours: Count | None = None
    expires_at: Timestamp | None = None
    scopes: list[Kind] = []
    signal_version: Count | None = None
    lease_until: Timestamp | None = None
    deck: Text | None = None
    effective_from: Timestamp | None = None
    available: Amount | None = None
    exposure: Amount | None = None


class DeadLetterReason(StrEnum):
    """Why a record was not booked; closed list, also the metric's label."""

    MALFORMED_JSON = "malformed_json"
    SCHEMA_VIOLATION = "schema_violation"
    UNKNOWN_TENANT = "unknown_tenant"
    NOT_BILLABLE = "not_billable"
    CURRENCY_MISMATCH = "currency_mismatch"
    KEY_MISMATCH = "key_mismatch"
    WRONG_PARTITION = "wrong_partition"
    CONFLICT = "conflict"
    TOO_LATE = "too_late"
    FROM_THE_FUTURE = "from_the_future"
    UNRATED = "unrated"
    OVERFLOW = "overflow"
    REFUSED = "refused"
    DEFECT = "defect"
