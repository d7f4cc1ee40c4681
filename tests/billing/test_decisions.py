"""What a person decides about recharges: approve, deny, resolve; and what makes no sense."""

from datetime import timedelta
from typing import Any

import pytest

from schemas.commands import Approve, Deny, Method, RechargePolicy
from schemas.funding import Reason, Status
from schemas.ledger import EntryKind
from schemas.notices import NoticeKind, Withheld
from streams.billing import recharge
from streams.billing.account import decode_row, encode_row
from streams.billing.booking import Draft
from streams.billing.parts import short
from tests.billing.builders import (
    NOW,
    Book,
    a_call,
    a_cause,
    a_command,
    a_fund,
    a_payment,
    a_resolution,
    a_result,
    an_account,
    closing,
    requested,
    settings,
    told,
    usd,
)

DAY = timedelta(hours=24)


def approve() -> Approve:
    return Approve(tenant_id="t-1", issued_at=NOW)


def deny() -> Deny:
    return Deny(tenant_id="t-1", issued_at=NOW)


# -- velocity and approval ------------------------------------------------------------------------


def suspected(spent: str = "30", limit: str = "20") -> Book:
    """Below its trigger after much was spent on premium numbers."""
    book = Book(an_account("100", trigger="100", velocity={"premium": limit}))
    spend(book, spent)
    book.feed(a_call())
    return book


def spend(book: Book, amount: str, at: Any = NOW, risk_class: str = "premium") -> None:
    assert book.account is not None
    draft = Draft(book.account, a_cause(), at)
    recharge.spent(draft, risk_class, usd(amount))
    book.account = draft.account


def test_spend_above_a_risk_classs_limit_asks_a_person_and_not_the_payment_service() -> None:
    book = suspected()
    assert book.requests == []
    assert book.stage == "needs_approval"
    assert [one.notice for one in book.notices[-2:]] == [
        NoticeKind.RECHARGE_NEEDS_APPROVAL,
        NoticeKind.RECHARGE_WITHHELD,
    ]
    last = book.notices[-1].guards[-1]
    assert (last.guard, last.holds, last.found, last.limit) == (
        Withheld.VELOCITY,
        True,
        "30",
        "20",
    )


@pytest.mark.parametrize(("spent", "risk_class"), [("20", "premium"), ("500", "satellite")])
def test_spend_at_the_limit_or_on_a_class_without_one_asks_for_money(
    spent: str, risk_class: str
) -> None:
    book = Book(an_account("100", trigger="100", velocity={"premium": "20"}))
    spend(book, spent, risk_class=risk_class)
    book.feed(a_call())
    assert len(book.requests) == 1


def test_spend_is_forgotten_after_a_day() -> None:
    book = Book(an_account("200", trigger="100", velocity={"premium": "20"}))
    spend(book, "30")
    book.feed(a_call(started_at=NOW + timedelta(hours=25), duration_s=101 * 60), NOW + 2 * DAY)
    assert len(book.requests) == 1


def test_an_approved_recharge_goes_out_and_its_retries_need_no_second_approval() -> None:
    book = suspected()
    book.feed(a_command(approve()))
    (request,) = book.requests
    assert request.reason is Reason.APPROVED
    book.feed(a_result(request.recharge_id, Status.DECLINED))
    book.feed(a_call(kind="free"), NOW + timedelta(hours=1))
    assert [one.attempt for one in book.requests] == [1, 2]
    assert book.requests[1].reason is Reason.RETRY


def test_the_next_epoch_needs_an_approval_of_its_own() -> None:
    book = suspected()
    book.feed(a_command(approve()))
    book.feed(a_result(book.requests[0].recharge_id, Status.CANCELLED))
    book.feed(a_call(kind="free"), NOW + timedelta(minutes=15))
    assert book.stage == "needs_approval"
    assert len(book.requests) == 1


def test_a_denied_recharge_pauses() -> None:
    book = suspected()
    outcome = book.feed(a_command(deny()))
    assert book.stage == "paused"
    assert "recharge_paused" in told(outcome)
    assert outcome.withheld is Withheld.PAUSED


@pytest.mark.parametrize(
    ("command", "rule"), [(approve(), "nothing_to_approve"), (deny(), "nothing_to_deny")]
)
def test_where_nothing_waits_there_is_nothing_to_decide(command: Any, rule: str) -> None:
    outcome = apply_to(an_account("200", trigger="100"), command)
    assert (outcome.label, outcome.notices[0].rule) == ("refused", rule)
    assert "auto-recharge is idle" in (outcome.notices[0].fix or "")


def apply_to(account: Any, command: Any) -> Any:
    return Book(account).feed(a_command(command))


# -- resolve --------------------------------------------------------------------------------------


def unanswered() -> tuple[Book, str]:
    account, request = requested(an_account("100", trigger="100", amount="200"))
    return Book(account), request.recharge_id


def test_after_a_day_a_person_is_asked_once() -> None:
    book, _ = unanswered()
    at = NOW
    while book.account is not None and at < NOW + 2 * DAY:
        at += timedelta(minutes=15)
        book.feed(a_call(kind="free", started_at=at, duration_s=0), at)
    asked = [one for one in book.notices if one.notice is NoticeKind.RECHARGE_UNRESOLVED]
    assert len(asked) == 1
    assert asked[0].at - NOW >= DAY
    assert len(book.requests) == 95
    assert len({one.recharge_id for one in book.requests}) == 1


def test_a_request_that_was_never_paid_is_resolved_after_a_day_and_the_next_epoch_follows() -> None:
    book, name = unanswered()
    early = book.feed(a_command(a_resolution(name, paid=False)), NOW + timedelta(hours=23))
    assert (early.label, early.notices[0].rule) == ("refused", "too_early")
    assert "2026-03-03T10:00:00+00:00" in (early.notices[0].fix or "")
    outcome = book.feed(a_command(a_resolution(name, paid=False)), NOW + DAY)
    assert "recharge_resolved" in told(outcome)
    assert book.stage == "cooling"
    later = NOW + DAY + timedelta(minutes=15)
    book.feed(a_call(kind="free", started_at=later, duration_s=0), later)
    assert (book.requests[-1].epoch, book.requests[-1].attempt) == (2, 1)


def test_money_of_a_request_resolved_as_unpaid_is_credited_when_it_comes_after_all() -> None:
    book, name = unanswered()
    book.feed(a_command(a_resolution(name, paid=False)), NOW + DAY)
    outcome = book.feed(a_result(name, amount="200", occurred_at=NOW + DAY), NOW + DAY)
    assert outcome.moved == ((EntryKind.RECHARGE, usd("200")),)


def test_a_request_resolved_as_paid_is_credited_once() -> None:
    book, name = unanswered()
    resolution = a_resolution(name, paid=True, payment_id=f"p-{name}", amount="200")
    assert book.feed(a_command(resolution)).moved == ((EntryKind.RECHARGE, usd("200")),)
    assert book.stage == "cooling"
    assert book.feed(a_result(name, amount="200")).moved == ()
    refunded = book.feed(a_result(name, Status.REFUNDED, amount="50"))
    assert refunded.moved == ((EntryKind.REFUND, usd("-50")),)


def test_a_second_resolution_of_the_same_request_is_refused() -> None:
    book, name = unanswered()
    resolution = a_resolution(name, paid=True, payment_id="p-1", amount="200")
    book.feed(a_command(resolution))
    outcome = book.feed(a_command(resolution))
    assert (outcome.label, outcome.notices[0].rule) == ("refused", "not_in_flight")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"paid": True}, "payment_missing"),
        ({"paid": True, "payment_id": "p-1"}, "payment_missing"),
        ({"paid": True, "payment_id": "p-1", "amount": "0"}, "amount_positive"),
        ({"paid": True, "payment_id": "p-1", "amount": "-5"}, "amount_positive"),
        (
            {"paid": True, "payment_id": "p-1", "amount": "5", "currency": "EUR"},
            "currency_mismatch",
        ),
        ({"paid": False, "payment_id": "p-1"}, "not_paid"),
        ({"paid": False, "amount": "5"}, "not_paid"),
    ],
)
def test_a_resolution_that_makes_no_sense_changes_nothing(
    changes: dict[str, Any], rule: str
) -> None:
    book, name = unanswered()
    before = book.account
    outcome = book.feed(a_command(a_resolution(name, **changes)))
    assert (outcome.label, outcome.notices[0].rule) == ("refused", rule)
    assert outcome.notices[0].fix
    assert book.account is before


def test_a_payment_booked_before_is_not_booked_by_a_resolution() -> None:
    book, name = unanswered()
    book.feed(a_command(a_payment("200", "wire-1")))
    paid = a_resolution(name, paid=True, payment_id="wire-1", amount="200")
    outcome = book.feed(a_command(paid))
    assert (outcome.label, outcome.notices[0].rule) == ("refused", "already_booked")


def test_funding_by_hand_is_resolved_too() -> None:
    book = Book(an_account("0"))
    book.feed(a_command(a_fund("75"), "one"))
    book.feed(a_command(a_fund("75"), "two"))
    paid = a_resolution("one", paid=True, payment_id="p-1", amount="75")
    assert book.feed(a_command(paid)).moved == ((EntryKind.PURCHASE, usd("75")),)
    book.feed(a_command(a_resolution("two", paid=False)), NOW + DAY)
    assert book.account is not None
    assert book.account.standing.funds == ()
    assert [one.id for one in book.account.standing.unpaid_funds] == [short("two")]


def test_a_closed_accounts_request_can_be_resolved() -> None:
    book, name = unanswered()
    book.feed(a_command(closing()))
    assert book.feed(a_command(a_resolution(name, paid=False)), NOW + DAY).label == "applied"


# -- settings that make no sense ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "rule", "fix"),
    [
        ({"trigger": "4.99"}, "trigger_minimum", "Trigger must be at least 5.00 USD."),
        ({"amount": "49.99"}, "amount_minimum", "Recharge amount must be at least 50.00 USD."),
        ({"amount": "100000.01"}, "amount_maximum", "at most 100000.00 USD"),
        ({"min_amount": "60", "max_amount": "55"}, "min_above_max", "min_amount"),
        ({"min_amount": "100001"}, "amount_maximum", "min_amount"),
        ({"max_amount": "49"}, "amount_minimum", "max_amount"),
        ({"method": Method.TARGET, "target": "99"}, "target_below_trigger", "100.00 USD"),
        (
            {"method": Method.TARGET, "target": "100", "min_amount": "9", "max_amount": "8"},
            "min_above_max",
            "min_amount",
        ),
        ({"daily_cap": "-1"}, "daily_cap", "negative"),
        ({"velocity": {"premium": "-1"}}, "velocity", "negative"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_with_rule_and_fix(
    policy: dict[str, Any], rule: str, fix: str
) -> None:
    members: dict[str, Any] = {"enabled": True, "trigger": "100", "amount": "200"} | policy
    account = an_account("500")
    outcome = apply_to(account, settings(0, policy=RechargePolicy(**members)))
    assert (outcome.label, outcome.notices[0].rule) == ("refused", rule)
    assert fix in (outcome.notices[0].fix or "")
    assert outcome.account is account


@pytest.mark.parametrize("methods", [["card-1", "card-1"], ["card-1", " "], [""]])
def test_payment_methods_are_named_once_and_not_empty(methods: list[str]) -> None:
    outcome = apply_to(an_account("500"), settings(0, payment_methods=methods))
    assert (outcome.label, outcome.notices[0].rule) == ("refused", "payment_methods")


def test_funding_above_the_ceiling_is_refused() -> None:
    outcome = apply_to(an_account("0"), a_fund("100000.01"))
    assert (outcome.label, outcome.notices[0].rule) == ("refused", "amount_maximum")


def test_the_row_keeps_what_a_decision_needs() -> None:
    book = suspected()
    assert book.account is not None
    assert decode_row(encode_row(book.account)) == book.account
