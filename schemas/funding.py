"""Recharge requests and the payment service's answers."""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from schemas.money import Amount, Currency, Money
from schemas.usage import Id, TenantId, Text, Timestamp

Count = Annotated[int, Meta(ge=0)]


class Reason(StrEnum):
    """Why money is asked for."""

    BELOW_TRIGGER = "below_trigger"
    RETRY = "retry"
    APPROVED = "approved"
    FUND = "fund"


class Status(StrEnum):
    """How a payment stands; accepted in any order, any number of times."""

    SUCCEEDED = "succeeded"
    DECLINED = "declined"
    NEEDS_ACTION = "needs_action"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    REFUNDED = "refunded"
    DISPUTE_OPENED = "dispute_opened"
    DISPUTE_WON = "dispute_won"
    DISPUTE_LOST = "dispute_lost"


class RechargeRequest(Struct, kw_only=True, frozen=True, gc=False):
    """Ask the payment service for money: `payments.recharge.requested.v1`.

    Keep `recharge_id` for as long as the topic keeps its records and pay one id once: a request
    without an answer is published again, unchanged but for `expires_at`. `amount` is rounded up
    to the currency's minor unit; `amount_minor` and `exponent` say the same in integers.
    """

    recharge_id: Id
    tenant_id: TenantId
    epoch: Count | None = None
    attempt: Count | None = None
    amount: Amount
    amount_minor: Count
    exponent: Annotated[int, Meta(ge=0, le=9)]
    currency: Currency
    trigger: Amount | None = None
    balance: Amount
    available: Amount
    exposure: Amount
    reason: Reason
    payment_method: Text | None = None
    requested_at: Timestamp
    expires_at: Timestamp
    policy_version: Count
    caused_by: Text


class RechargeResult(Struct, kw_only=True, frozen=True, gc=False):
    """An answer of the payment service: `payments.recharge.result.v1`.

    `amount` is cumulative per (`payment_id`, `status`). `result_id` and `source` may be absent
    where the CloudEvents envelope carries `id` and `source`.
    """

    result_id: Id | None = None
    source: Id | None = None
    tenant_id: TenantId | None = None
    recharge_id: Id
    payment_id: Id
    status: Status
    amount: Money | None = None
    payment_method: Text | None = None
    decline_code: Text | None = None
    occurred_at: Timestamp
