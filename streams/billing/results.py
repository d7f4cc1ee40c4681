"""Results: what the payment service answers, in any order, any number of times.

Money is deduplicated by payment: amounts are cumulative per (payment, status), the effect is the
difference to what is booked. The state machine moves by recharge id.
"""

from datetime import timedelta
from typing import Any, Final

from msgspec.structs import replace

from schemas.funding import Status
from schemas.ledger import EntryKind
from schemas.money import MAX_EVENT_NANOS, nanos_from, text_from
from schemas.notices import DeadLetterReason, NoticeKind
from streams.billing import recharge
from streams.billing.account import Account, Asked, Payment
from streams.billing.booking import Draft, RefusedError
from streams.billing.events import ResultEvent

# Thirteen months: longer than card schemes allow a dispute to be opened.
ANSWERED_WITHIN: Final = timedelta(days=396)
# A day longer than an answer may be old, so that no repeat outlives the row that knows it.
PAYMENT_KEPT: Final = ANSWERED_WITHIN + timedelta(days=1)

_DISPUTES: Final = {
    Status.DISPUTE_OPENED: EntryKind.DISPUTE_OPENED,
    Status.DISPUTE_WON: EntryKind.DISPUTE_WON,
    Status.DISPUTE_LOST: EntryKind.DISPUTE_LOST,
}
_MONEY: Final = frozenset({Status.SUCCEEDED, Status.REFUNDED, *_DISPUTES})
_NOTICES: Final = {
    Status.DECLINED: NoticeKind.RECHARGE_DECLINED,
    Status.NEEDS_ACTION: NoticeKind.RECHARGE_NEEDS_ACTION,
    Status.CANCELLED: NoticeKind.RECHARGE_ENDED,
    Status.EXPIRED: NoticeKind.RECHARGE_ENDED,
}


def answer(draft: Draft, event: ResultEvent) -> str:
    """Book an answer and move the state; returns the outcome's label. Raises RefusedError."""
    result = event.result
    account = draft.account
    current = account.recharging.asked
    fund = _fund(account, result.recharge_id)
    is_current = current is not None and current.recharge_id == result.recharge_id
    earlier = any(made.recharge_id == result.recharge_id for made in account.recharging.attempts)
    asked = current if is_current else fund
    moved_before = len(draft.moved)
    if result.status in _MONEY:
        if is_current or earlier:
            origin = EntryKind.RECHARGE
        else:
            origin = EntryKind.PURCHASE if fund is not None else EntryKind.ORPHAN
        _book(draft, event, asked, origin)
    if fund is not None:
        _answer_fund(draft, fund, result.status)
    elif is_current:
        recharge.answered(draft, result.status, result.decline_code)
    elif earlier and result.status is Status.SUCCEEDED and len(draft.moved) > moved_before:
        recharge.late_success(draft)
    if (is_current or fund is not None) and result.status in _NOTICES:
        draft.notify(
            _NOTICES[result.status],
            recharge_id=result.recharge_id,
            payment_id=result.payment_id,
            decline_code=result.decline_code,
            retry_at=draft.account.recharging.until,
        )
    return "credited" if len(draft.moved) > moved_before else "answered"


def _fund(account: Account, recharge_id: str) -> Asked | None:
    return next((fund for fund in account.funds if fund.recharge_id == recharge_id), None)


def _book(draft: Draft, event: ResultEvent, asked: Asked | None, origin: EntryKind) -> None:
    result = event.result
    account = draft.account
    payment = event.payment or Payment(
        payment_id=result.payment_id,
        recharge_id=result.recharge_id,
        currency=account.currency,
        origin=origin,
        booked_nanos={},
        kept_until=draft.now + PAYMENT_KEPT,
    )
    amount_nanos = _amount(event, asked, payment)
    booked_nanos = payment.booked_nanos.get(result.status, 0)
    links: dict[str, Any] = {
        "recharge_id": result.recharge_id,
        "payment_id": result.payment_id,
    }
    fresh_nanos = amount_nanos - booked_nanos
    if fresh_nanos <= 0:
        draft.payment = payment if event.payment is None else None
        return
    payment = replace(
        payment,
        booked_nanos={**payment.booked_nanos, result.status: amount_nanos},
        # From the last booking: a repeat of it must find the row until it is too late itself.
        kept_until=draft.now + PAYMENT_KEPT,
    )
    if result.status is Status.SUCCEEDED:
        draft.credit(payment.origin, fresh_nanos, details=links)
        recharge.count_money(draft, fresh_nanos, again=booked_nanos > 0)
        orphan = payment.origin is EntryKind.ORPHAN
        draft.notify(
            NoticeKind.ORPHAN_PAYMENT if orphan else NoticeKind.RECHARGE_SUCCEEDED,
            amount=text_from(fresh_nanos),
            balance=text_from(draft.account.balance_nanos),
            **links,
        )
    elif result.status is Status.REFUNDED:
        draft.debit(EntryKind.REFUND, fresh_nanos, draft.now, links)
    else:
        payment = _dispute(draft, payment, result.status, links)
    draft.payment = payment


def _amount(event: ResultEvent, asked: Asked | None, payment: Payment) -> int:
    result = event.result
    if result.amount is None:
        if result.status is Status.SUCCEEDED and asked is not None:
            return asked.amount_nanos
        if result.status in _DISPUTES and Status.SUCCEEDED in payment.booked_nanos:
            return payment.booked_nanos[Status.SUCCEEDED]
        raise RefusedError(DeadLetterReason.SCHEMA_VIOLATION, "$.amount")
    if result.amount.currency != payment.currency:
        raise RefusedError(DeadLetterReason.CURRENCY_MISMATCH, "$.amount.currency")
    amount_nanos = nanos_from(result.amount.amount)
    if not 0 < amount_nanos <= MAX_EVENT_NANOS:
        raise RefusedError(DeadLetterReason.SCHEMA_VIOLATION, "$.amount.amount")
    return amount_nanos


def _dispute(draft: Draft, payment: Payment, status: Status, links: dict[str, Any]) -> Payment:
    """Opened debits, won credits back, lost ends in one debit: in any order, so what is held
    back is worked out from all three and the difference is booked."""
    booked = payment.booked_nanos
    opened = booked.get(Status.DISPUTE_OPENED, 0)
    won = booked.get(Status.DISPUTE_WON, 0)
    lost = booked.get(Status.DISPUTE_LOST, 0)
    held_nanos = max(opened, lost) if lost else max(0, opened - won)
    change_nanos = held_nanos - payment.disputed_nanos
    if change_nanos > 0:
        draft.debit(_DISPUTES[status], change_nanos, draft.now, links)
    elif change_nanos < 0:
        draft.credit(_DISPUTES[status], -change_nanos, details=links)
    return replace(payment, disputed_nanos=held_nanos)


def _answer_fund(draft: Draft, fund: Asked, status: Status) -> None:
    """Funding by hand has no epoch: an answer ends it, or leaves it waiting for a person."""
    others = tuple(one for one in draft.account.funds if one.recharge_id != fund.recharge_id)
    match status:
        case Status.NEEDS_ACTION:
            waiting = replace(fund, needs_action=True)
            draft.account = replace(draft.account, funds=(*others, waiting))
        case Status.SUCCEEDED | Status.DECLINED | Status.CANCELLED | Status.EXPIRED:
            draft.account = replace(draft.account, funds=others)
            if status is Status.SUCCEEDED:
                recharge.paid_by_hand(draft)
        case _:
            pass
