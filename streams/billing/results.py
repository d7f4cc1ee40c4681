"""Results: what the payment service answers, in any order, any number of times.

Money is deduplicated by payment: amounts are cumulative per (payment, status), the effect is the
difference to what is booked. The state machine moves by recharge id.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Final

from msgspec.structs import replace

from schemas.funding import Status
from schemas.ledger import EntryKind
from schemas.nanos import MAX_EVENT_NANOS, nanos_from, text_from
from schemas.notices import DeadLetterReason, NoticeKind
from streams.billing import recharge
from streams.billing.booking import Draft, RefusedError
from streams.billing.events import ResultEvent
from streams.billing.parts import Asked, Payment, UnpaidFund, short

# Thirteen months: longer than card schemes allow a dispute to be opened.
ANSWERED_WITHIN: Final = timedelta(days=396)
# A day longer than an answer may be old, so that no repeat outlives the row that knows it.
PAYMENT_KEPT: Final = ANSWERED_WITHIN + timedelta(days=1)
KEPT_UNPAID: Final = 15

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
    current = account.standing.recharging.asked
    fund = _by_id(account.standing.funds, result.recharge_id)
    is_current = current is not None and current.recharge_id == result.recharge_id
    attempt = recharge.attempt_of(account, result.recharge_id)
    unpaid = None
    if account.standing.unpaid_funds:
        known = short(result.recharge_id)
        unpaid = next((one for one in account.standing.unpaid_funds if one.id == known), None)
    succeeded = result.status is Status.SUCCEEDED
    if result.status in _MONEY:
        if attempt is not None:
            origin = EntryKind.RECHARGE
        elif fund is not None or unpaid is not None:
            origin = EntryKind.PURCHASE
        else:
            origin = EntryKind.ORPHAN
        asked = attempt or fund or unpaid
        _book(draft, event, None if asked is None else asked.amount_nanos, origin)
    if fund is not None:
        _answer_fund(draft, fund, result.status)
    elif unpaid is not None:
        if succeeded:
            _paid_after_all(draft, unpaid)
    elif is_current:
        recharge.answered(draft, result.status, result.decline_code)
    elif attempt is not None and succeeded and (draft.moved or _unsaid(event)):
        recharge.late_success(draft)
    elif attempt is None and succeeded and draft.moved:
        # Nobody's request, but a card that pays is not the one that was declined.
        recharge.paid_by_hand(draft)
    if is_current or fund is not None:
        if succeeded and not draft.moved:
            _tell_known_money(draft, event)
        elif result.status in _NOTICES:
            draft.notify(
                _NOTICES[result.status],
                recharge_id=result.recharge_id,
                payment_id=result.payment_id,
                decline_code=result.decline_code,
                retry_at=draft.account.standing.recharging.until,
            )
    return "credited" if draft.moved else "answered"


def _by_id(known: Iterable[Asked], recharge_id: str) -> Asked | None:
    return next((one for one in known if one.recharge_id == recharge_id), None)


def _tell_known_money(draft: Draft, event: ResultEvent) -> None:
    """A request was paid by money that is booked already."""
    assert event.payment is not None
    draft.notify(
        NoticeKind.RECHARGE_SUCCEEDED,
        amount=text_from(event.payment.booked_nanos.get(Status.SUCCEEDED, 0)),
        balance=text_from(draft.account.balance_nanos),
        recharge_id=event.result.recharge_id,
        payment_id=event.result.payment_id,
    )


def _unsaid(event: ResultEvent) -> bool:
    """Whether nobody has said before that this payment answers this request: its money may have
    been booked by hand."""
    return event.payment is None or event.payment.recharge_id != event.result.recharge_id


def _book(draft: Draft, event: ResultEvent, asked_nanos: int | None, origin: EntryKind) -> None:
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
    amount_nanos = _amount(event, asked_nanos, payment)
    booked_nanos = payment.booked_nanos.get(result.status, 0)
    links: dict[str, Any] = {
        "recharge_id": result.recharge_id,
        "payment_id": result.payment_id,
    }
    fresh_nanos = amount_nanos - booked_nanos
    if result.status is Status.SUCCEEDED and _unsaid(event):
        payment = replace(payment, recharge_id=result.recharge_id)
    if fresh_nanos <= 0:
        draft.payment = None if payment is event.payment else payment
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


def _amount(event: ResultEvent, asked_nanos: int | None, payment: Payment) -> int:
    result = event.result
    if result.amount is None:
        if result.status is Status.SUCCEEDED and asked_nanos is not None:
            return asked_nanos
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
    """Opened debits, won credits back, lost ends in one debit, of a part or of all: in any order,
    so what is held back is worked out from all three and the difference is booked."""
    booked = payment.booked_nanos
    opened = booked.get(Status.DISPUTE_OPENED, 0)
    won = booked.get(Status.DISPUTE_WON, 0)
    lost = booked.get(Status.DISPUTE_LOST, 0)
    held_nanos = max(0, opened - won, lost)
    change_nanos = held_nanos - payment.disputed_nanos
    if change_nanos > 0:
        draft.debit(_DISPUTES[status], change_nanos, draft.now, links)
    elif change_nanos < 0:
        draft.credit(_DISPUTES[status], -change_nanos, details=links)
    return replace(payment, disputed_nanos=held_nanos)


def _answer_fund(draft: Draft, fund: Asked, status: Status) -> None:
    """Funding by hand has no epoch: an answer ends it, or leaves it waiting for a person."""
    others = tuple(
        one for one in draft.account.standing.funds if one.recharge_id != fund.recharge_id
    )
    match status:
        case Status.NEEDS_ACTION:
            waiting = replace(fund, needs_action=True)
            draft.account = draft.account.changed(funds=(*others, waiting))
        case Status.SUCCEEDED | Status.DECLINED | Status.CANCELLED | Status.EXPIRED:
            draft.account = draft.account.changed(funds=others)
            if status is Status.SUCCEEDED:
                recharge.paid_by_hand(draft)
            else:
                keep_unpaid(draft, fund)
        case _:
            pass


def keep_unpaid(draft: Draft, fund: Asked) -> None:
    """Remember funding by hand that came to nothing: a late success is still its payment."""
    kept = draft.account.standing.unpaid_funds[-(KEPT_UNPAID - 1) :]
    unpaid = UnpaidFund(short(fund.recharge_id), fund.amount_nanos)
    draft.account = draft.account.changed(unpaid_funds=(*kept, unpaid))


def _paid_after_all(draft: Draft, fund: UnpaidFund) -> None:
    """A success contradicts the decline of funding by hand. Once: a second payment is an orphan."""
    left = tuple(one for one in draft.account.standing.unpaid_funds if one != fund)
    draft.account = draft.account.changed(unpaid_funds=left)
    recharge.paid_by_hand(draft)
