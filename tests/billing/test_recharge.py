"""When money is asked for, how much, and why it is not."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from schemas.commands import Compare, Method
from schemas.funding import Reason, Status
from schemas.ledger import EntryKind
from schemas.notices import NoticeKind, Withheld
from schemas.usage import Phase
from streams.billing.account import Account
from streams.billing.events import Tick
from streams.billing.parts import Declines, Policy, Recharging, short
from streams.billing.recharge import GUARDS, recharge_id, wanted
from tests.billing.builders import (
    NOW,
    Book,
    a_call,
    a_command,
    a_fund,
    a_payment,
    a_result,
    an_account,
    an_adjustment,
    apply,
    closing,
    minutes,
    requested,
    settings,
    some_terms,
    told,
    usd,
    with_policy,
)

COOLDOWN = timedelta(seconds=900)


def test_every_reason_has_a_guard_and_they_are_asked_in_the_documented_order() -> None:
    assert [reason for reason, _ in GUARDS] == list(Withheld)


def test_a_balance_exactly_at_the_trigger_asks_for_nothing() -> None:
    assert apply(an_account("101", trigger="100"), a_call()).requests == ()


def test_a_balance_below_the_trigger_asks_once() -> None:
    account, request = requested(an_account("100.50", trigger="100", amount="200"))
    assert (request.amount, request.amount_minor, request.exponent) == ("200", 20_000, 2)
    assert (request.reason, request.balance, request.trigger) == (
        Reason.BELOW_TRIGGER,
        "99.5",
        "100",
    )
    again = apply(account, a_call())
    assert again.requests == ()
    assert again.withheld is Withheld.IN_FLIGHT


def test_compare_le_asks_at_the_trigger_too() -> None:
    account = an_account("101", trigger="100", compare=Compare.LE)
    assert len(apply(account, a_call()).requests) == 1


@pytest.mark.parametrize(
    ("policy", "balance", "amount"),
    [
        ({"method": Method.FIXED, "amount": "200", "trigger": "100"}, "99.99", "200"),
        ({"method": Method.FIXED_MULTIPLE, "amount": "20", "trigger": "100"}, "10", "100"),
        ({"method": Method.FIXED_MULTIPLE, "amount": "20", "trigger": "100"}, "99.99", "20"),
        ({"method": Method.TARGET, "target": "50", "trigger": "25"}, "21", "29"),
        ({"method": Method.TARGET, "target": "50", "trigger": "5"}, "4.90", "45.1"),
        ({"method": Method.GAP_PLUS_AMOUNT, "amount": "104", "trigger": "104"}, "50", "158"),
        ({"method": Method.FIXED, "amount": "10", "trigger": "9", "min": "50"}, "1", "50"),
        ({"method": Method.FIXED, "amount": "90", "trigger": "9", "max": "60"}, "1", "60"),
        ({"method": Method.TARGET, "target": "90", "trigger": "9", "max": "60"}, "1", "89"),
        ({"method": Method.TARGET, "target": "50", "trigger": "25"}, "21.005", "29"),
    ],
)
def test_methods_ask_for_what_the_published_figures_say(
    policy: dict[str, str], balance: str, amount: str
) -> None:
    made = Policy(
        method=Method(policy["method"]),
        trigger_nanos=usd(policy["trigger"]),
        amount_nanos=usd(policy.get("amount", "0")),
        target_nanos=usd(policy.get("target", "0")),
        min_nanos=usd(policy["min"]) if "min" in policy else None,
        max_nanos=usd(policy["max"]) if "max" in policy else None,
    )
    assert wanted(made, usd(balance), "USD") == usd(amount)


@pytest.mark.parametrize(
    ("currency", "asked"), [("JPY", "30"), ("USD", "29.01"), ("KWD", "29.001")]
)
def test_a_request_is_rounded_up_to_the_minor_unit(currency: str, asked: str) -> None:
    policy = Policy(method=Method.TARGET, trigger_nanos=usd("25"), target_nanos=usd("50"))
    assert wanted(policy, usd("20.9991"), currency) == usd(asked)


def test_the_same_shortage_has_the_same_id_however_often_it_is_asked() -> None:
    account = an_account("100", trigger="100")
    one = apply(account, a_call()).requests[0]
    two = apply(account, a_call()).requests[0]
    assert one.recharge_id == two.recharge_id == recharge_id("t-1", 1, 1)


def test_a_success_credits_cools_and_then_a_new_epoch_may_begin() -> None:
    account, request = requested(an_account("100", trigger="100", amount="50"))
    outcome = apply(account, a_result(request.recharge_id, amount="50"))
    book = Book(outcome.account)
    assert book.balance_nanos == usd("149")
    assert told(outcome) == ["recharge_succeeded"]
    withheld = book.feed(minutes(50), NOW)
    assert withheld.withheld is Withheld.COOLING
    book.feed(a_call(), NOW + COOLDOWN)
    assert [(one.epoch, one.attempt) for one in book.requests] == [(2, 1)]


def test_a_partial_success_credits_what_came() -> None:
    account, request = requested(an_account("100", trigger="100", amount="200"))
    outcome = apply(account, a_result(request.recharge_id, amount="120.50"))
    assert outcome.account is not None
    assert outcome.account.balance_nanos == usd("219.5")


def declined(book: Book, now: object, code: str = "insufficient_funds") -> None:
    assert book.account is not None
    asked = book.account.standing.recharging.asked
    assert asked is not None
    book.feed(
        a_result(
            asked.recharge_id,
            Status.DECLINED,
            payment_id=f"p-{asked.attempt}",
            decline_code=code,
            occurred_at=now,
        ),
        now,  # type: ignore[arg-type]
    )


def test_declines_are_retried_after_one_three_and_seven_hours_and_then_paused() -> None:
    book = Book(an_account("100", trigger="100"))
    book.feed(a_call())
    now = NOW
    for hours in (1, 2, 4):
        declined(book, now)
        assert book.account is not None
        assert book.account.standing.recharging.until == now + timedelta(hours=hours)
        now += timedelta(hours=hours)
        book.feed(a_call(kind="free", started_at=now, duration_s=0), now)
    assert [(one.epoch, one.attempt) for one in book.requests] == [(1, 1), (1, 2), (1, 3), (1, 4)]
    assert book.requests[-1].reason is Reason.RETRY
    declined(book, now)
    assert book.account is not None
    assert book.account.state == "paused"
    assert "recharge_paused" in [notice.notice.value for notice in book.notices]


@pytest.mark.parametrize(
    "code", ["lost_card", "stolen_card", "fraud", "authentication_required", "expired_card"]
)
def test_a_terminal_decline_pauses_at_once(code: str) -> None:
    book = Book(an_account("100", trigger="100"))
    book.feed(a_call())
    declined(book, NOW, code)
    assert book.account is not None
    assert book.account.state == "paused"


def test_the_next_payment_method_is_asked_at_once_in_the_same_epoch() -> None:
    book = Book(an_account("100", trigger="100", methods=["card-1", "card-2"]))
    book.feed(a_call())
    declined(book, NOW, "expired_card")
    assert [(one.attempt, one.payment_method) for one in book.requests] == [
        (1, "card-1"),
        (2, "card-2"),
    ]


def paused() -> Book:
    book = Book(an_account("100", trigger="100", methods=["card-1"]))
    book.feed(a_call())
    declined(book, NOW, "lost_card")
    return book


def test_a_new_payment_method_clears_a_pause_and_asks() -> None:
    book = paused()
    book.feed(a_command(settings(1, payment_methods=["card-9"])))
    assert book.requests[-1].payment_method == "card-9"
    assert book.requests[-1].epoch == 2


def test_money_by_hand_clears_a_pause() -> None:
    book = paused()
    book.feed(a_command(a_payment("500")))
    assert book.account is not None
    assert book.account.state == "idle"


def test_a_late_success_of_a_declined_attempt_is_credited_and_cools() -> None:
    book = Book(an_account("100", trigger="100", amount="200"))
    book.feed(a_call())
    first = book.requests[0].recharge_id
    declined(book, NOW)
    book.feed(a_result(first, amount="200", payment_id="p-1"))
    assert book.balance_nanos == usd("299")
    assert book.account is not None
    assert book.account.state == "cooling"
    assert book.account.standing.recharging.declines_in_row == 0
    assert not book.account.standing.recharging.retry


def test_a_late_success_whose_money_was_booked_by_hand_still_moves_the_state_once() -> None:
    book = Book(an_account("100", trigger="100", amount="200", methods=["card-1"]))
    book.feed(a_call())
    first = book.requests[0].recharge_id
    declined(book, NOW, "lost_card")
    # Less than the trigger, so that the pause is what holds the next request back.
    assert book.account is not None
    book.account = with_policy(book.account, trigger="500", amount="200").changed(
        recharging=book.account.standing.recharging
    )
    book.feed(a_command(a_payment("200", "p-1")))
    book.account = book.account.changed(
        recharging=replace(
            book.account.standing.recharging, stage="paused", asked=None, until=None
        ),
    )
    asked_before = len(book.requests)
    book.feed(a_result(first, amount="200", payment_id="p-1"))
    assert book.balance_nanos == usd("299")
    assert (book.account.state, book.account.standing.recharging.declines_in_row) == ("cooling", 0)
    until = book.account.standing.recharging.until
    assert until == NOW + COOLDOWN
    # The same answer under another id, once the cooldown is over: the next request goes out.
    later = NOW + COOLDOWN
    book.feed(a_result(first, amount="200", payment_id="p-1", occurred_at=later), later)
    assert book.account.state == "requested"
    assert len(book.requests) == asked_before + 1


def test_a_success_of_the_past_that_is_repeated_starts_no_cooldown() -> None:
    account, request = requested(an_account("100", trigger="100", amount="200"))
    book = Book(account)
    book.feed(a_result(request.recharge_id, amount="200"))
    later = NOW + 2 * COOLDOWN
    book.feed(a_result(request.recharge_id, amount="200", occurred_at=later), later)
    assert book.account is not None
    assert book.account.state == "idle"


def test_a_late_success_without_an_amount_credits_what_its_attempt_asked_for() -> None:
    book = Book(an_account("100", trigger="100", amount="200"))
    book.feed(a_call())
    declined(book, NOW)
    book.feed(a_result(book.requests[0].recharge_id, payment_id="p-1"))
    assert book.balance_nanos == usd("299")


def test_money_that_brings_the_balance_back_ends_the_epoch_between_tries() -> None:
    book = Book(an_account("100", trigger="100"))
    book.feed(a_call())
    declined(book, NOW)
    book.feed(a_command(a_payment("500")))
    assert book.account is not None
    assert (book.account.state, book.account.standing.recharging.retry) == ("idle", False)
    book.feed(minutes(550), NOW)
    assert (book.requests[-1].epoch, book.requests[-1].attempt) == (2, 1)


def test_a_request_without_answer_is_published_again_word_for_word() -> None:
    book = Book(an_account("100", trigger="100"))
    book.feed(a_call())
    book.feed(a_call(), NOW + timedelta(minutes=16))
    first, second = book.requests
    assert replace(second, expires_at=first.expires_at) == first
    assert "recharge_overdue" in [notice.notice.value for notice in book.notices]


def test_after_a_day_without_answer_a_person_decides() -> None:
    book = Book(an_account("100", trigger="100"))
    book.feed(a_call())
    book.feed(a_call(), NOW + timedelta(hours=30))
    published = len(book.requests)
    assert book.account is not None
    book.feed(a_call(), NOW + timedelta(hours=90))
    assert len(book.requests) == published
    assert book.account.state == "requested"


def test_needs_action_stays_in_flight_and_is_not_published_again() -> None:
    account, request = requested(an_account("100", trigger="100"))
    book = Book(account)
    book.feed(a_result(request.recharge_id, Status.NEEDS_ACTION))
    book.feed(a_call(), NOW + timedelta(hours=2))
    assert book.requests == []
    assert book.account is not None
    assert book.account.state == "requested"


@pytest.mark.parametrize("status", [Status.CANCELLED, Status.EXPIRED])
def test_a_cancelled_or_expired_request_ends_the_epoch(status: Status) -> None:
    account, request = requested(an_account("100", trigger="100"))
    book = Book(account)
    book.feed(a_result(request.recharge_id, status))
    book.feed(a_call(), NOW + COOLDOWN)
    assert [(one.epoch, one.attempt) for one in book.requests] == [(2, 1)]


def with_spent(account: Account, *amounts: str) -> Account:
    book = Book(account)
    for at, amount in enumerate(amounts):
        book.feed(a_command(a_payment(amount, f"wire-{at}")))
    assert book.account is not None
    return book.account


@pytest.mark.parametrize(
    ("policy", "spent", "reason"),
    [
        ({"monthly_cap": "500"}, ["475"], Withheld.MONTHLY_AMOUNT),
        ({"monthly_cap": "525"}, ["475"], None),
        ({"weekly_cap": "500"}, ["475"], Withheld.WEEKLY_AMOUNT),
        ({"daily_cap": "500"}, ["475"], Withheld.DAILY_AMOUNT),
        ({"max_per_day": 2}, ["50", "50"], Withheld.DAILY_COUNT),
        ({"max_per_day": 3}, ["50", "50"], None),
    ],
)
def test_caps_withhold_above_them_and_pass_at_them(
    policy: dict[str, Any], spent: list[str], reason: Withheld | None
) -> None:
    account = with_spent(an_account("0"), *spent)
    account = with_policy(account, amount="50", trigger="1000", **policy)
    outcome = apply(account, a_call(), NOW)
    if reason is None:
        assert account.standing.recharging.asked is not None
    else:
        assert account.standing.recharging.withheld is reason
        assert outcome.requests == ()


def test_a_cap_looks_back_over_whole_days_and_then_forgets() -> None:
    account = with_policy(
        with_spent(an_account("0"), "475"), amount="50", trigger="1000", monthly_cap="500"
    )
    book = Book(account)
    book.feed(a_call(kind="free"), NOW + timedelta(days=30))
    assert book.requests == []
    book.feed(a_call(), NOW + timedelta(days=31))
    assert len(book.requests) == 1


@pytest.mark.parametrize(
    ("policy", "spent", "opens_at"),
    [
        ({"daily_cap": "500"}, ["475"], timedelta(hours=25)),
        ({"max_per_day": 2}, ["50", "50"], timedelta(hours=25)),
        ({"weekly_cap": "500"}, ["475"], timedelta(days=8)),
        ({"monthly_cap": "500"}, ["475"], timedelta(days=31)),
    ],
)
def test_a_recharge_that_a_cap_withheld_goes_out_when_its_window_opens_without_any_event(
    policy: dict[str, Any], spent: list[str], opens_at: timedelta
) -> None:
    account = with_policy(
        with_spent(an_account("0"), *spent), amount="50", trigger="1000", **policy
    )
    hour = NOW.replace(minute=0, second=0)
    whole = hour if opens_at < timedelta(days=2) else hour.replace(hour=0)
    assert account.next_due() == whole + opens_at
    outcome = apply(account, Tick(whole + opens_at), whole + opens_at)
    assert len(outcome.requests) == 1


def test_a_cap_that_opens_bit_by_bit_is_looked_at_each_time_and_told_once() -> None:
    book = Book(an_account("0"))
    for day in range(3):
        book.feed(a_command(a_payment("200", f"wire-{day}")), NOW + timedelta(days=day))
    assert book.account is not None
    book.account = with_policy(book.account, amount="400", trigger="1000", weekly_cap="600")
    last = NOW + timedelta(days=2)
    book.feed(a_call(started_at=last, duration_s=0), last)
    midnight = NOW.replace(hour=0, minute=0, second=0)
    for left in range(2):
        at = midnight + timedelta(days=8 + left)
        assert book.account.next_due() == at
        outcome = apply(book.account, Tick(at), at)
        assert (told(outcome), len(outcome.requests)) == (
            ([], 0) if left == 0 else (["recharge_requested"], 1)
        )
        assert outcome.account is not None
        book.account = outcome.account


def test_a_cap_that_the_amount_alone_is_above_waits_for_no_instant() -> None:
    account = with_policy(an_account("0"), amount="50", trigger="1000", daily_cap="40")
    assert account.standing.recharging.withheld is Withheld.DAILY_AMOUNT
    assert account.standing.recharging.opens_at is None


def test_a_window_is_forgotten_when_the_account_is_above_its_trigger_again() -> None:
    account = with_policy(
        with_spent(an_account("0"), "475"), amount="50", trigger="1000", daily_cap="500"
    )
    outcome = apply(account, a_command(a_payment("900", "wire-9")))
    assert outcome.account is not None
    assert outcome.account.standing.recharging.opens_at is None


def test_declines_of_another_card_exhaust_nothing() -> None:
    account = an_account("100", trigger="100", methods=["card-1", "card-2"])
    day = (NOW - datetime(1970, 1, 1, tzinfo=UTC)).days
    often = (day, *[0] * 14)
    one = Declines(short("card-1"), often)
    other = Declines(short("card-2"), (day + 1, *[0] * 14))
    for worn, asked in ((other, "card-1"), (one, "card-2")):
        recharging = replace(account.standing.recharging, method_index=1, declines=(worn,))
        outcome = apply(account.changed(recharging=recharging), a_call())
        assert [request.payment_method for request in outcome.requests] == [asked]
    recharging = replace(account.standing.recharging, declines=(other, one))
    outcome = apply(account.changed(recharging=recharging), a_call())
    assert outcome.withheld is Withheld.ATTEMPTS_EXHAUSTED
    assert outcome.account is not None
    opens_at = outcome.account.next_due()
    assert opens_at == NOW.replace(hour=0, minute=0, second=0) + timedelta(days=31)
    [request] = apply(outcome.account, Tick(opens_at), opens_at).requests
    assert request.payment_method == "card-1"


def test_a_card_that_is_always_declined_does_not_stand_before_one_that_pays() -> None:
    book = Book(an_account("150", trigger="100", amount="60", methods=["bad", "good"]))
    for day in range(30):
        now = NOW + timedelta(days=day)
        book.feed(a_command(an_adjustment("-60")), now)
        while book.stage == "requested":
            if book.requests[-1].payment_method == "bad":
                declined(book, now)
            else:
                last = book.requests[-1].recharge_id
                book.feed(a_result(last, amount="60", occurred_at=now), now)
    assert book.balance_nanos == usd("150")
    assert [one.payment_method for one in book.requests].count("bad") == 15


def test_the_next_card_is_not_one_that_is_worn_out() -> None:
    account = an_account("100", trigger="100", methods=["card-1", "card-2", "card-3"])
    day = (NOW - datetime(1970, 1, 1, tzinfo=UTC)).days
    worn = Declines(short("card-2"), (day, *[0] * 14))
    book = Book(account.changed(recharging=replace(account.standing.recharging, declines=(worn,))))
    book.feed(a_call())
    declined(book, NOW)
    assert [one.payment_method for one in book.requests] == ["card-1", "card-3"]


def test_an_expired_card_pauses_only_where_there_is_no_other() -> None:
    book = Book(an_account("100", trigger="100", methods=["card-1", "card-2"]))
    book.feed(a_call())
    declined(book, NOW)
    declined(book, NOW, "expired_card")
    assert book.stage == "cooling"
    alone = Book(an_account("100", trigger="100", methods=["card-1"]))
    alone.feed(a_call())
    declined(alone, NOW, "expired_card")
    assert alone.stage == "paused"


def test_money_that_came_while_a_request_was_in_flight_ends_its_epoch_with_a_decline() -> None:
    book = Book(an_account("100", trigger="100", amount="200", methods=["card-1", "card-2"]))
    book.feed(a_call())
    book.feed(a_command(a_payment("50")))
    book.feed(minutes(60))
    assert book.stage == "requested"
    declined(book, NOW)
    assert [(one.epoch, one.attempt, one.reason, one.payment_method) for one in book.requests] == [
        (1, 1, Reason.BELOW_TRIGGER, "card-1"),
        (2, 1, Reason.BELOW_TRIGGER, "card-1"),
    ]


def test_what_an_open_call_sets_free_is_no_money_that_came() -> None:
    book = Book(an_account("100", trigger="100", amount="200", methods=["card-1", "card-2"]))
    for number in range(2):
        leg: dict[str, Any] = {"leg_id": f"leg-{number}", "duration_s": 60}
        book.feed(a_call(phase=Phase.PROGRESS, **leg))
        book.feed(a_call(phase=Phase.END, **{**leg, "duration_s": 0}))
        assert book.stage == "requested"
        book.feed(a_call(phase=Phase.PROGRESS, leg_id=f"next-{number}"))
        declined(book, NOW)
        book.feed(a_call(phase=Phase.END, leg_id=f"next-{number}", duration_s=0))
    assert [(one.epoch, one.attempt, one.payment_method) for one in book.requests] == [
        (1, 1, "card-1"),
        (1, 2, "card-2"),
    ]


def test_a_row_of_before_knows_nothing_of_money_in_flight() -> None:
    account, _ = requested(an_account("100", trigger="100"))
    members = list(msgspec.to_builtins(account.standing.recharging))
    assert members.pop() is False
    assert msgspec.convert(members, Recharging) == account.standing.recharging


def test_a_payment_that_nobody_asked_for_clears_a_pause_too() -> None:
    book = paused()
    book.feed(a_result("nobodys", amount="0.5"))
    assert book.stage == "requested"
    assert (
        book.requests[-1].epoch,
        book.account and book.account.standing.recharging.declines_in_row,
    ) == (
        2,
        0,
    )


def test_a_request_paid_by_money_that_was_booked_before_is_told_to_have_succeeded() -> None:
    book = Book(an_account("100", trigger="100", amount="200"))
    book.feed(a_call())
    book.feed(a_command(a_payment("200", "p-1")))
    outcome = book.feed(a_result(book.requests[0].recharge_id, amount="200", payment_id="p-1"))
    [notice] = [one for one in outcome.notices if one.notice is NoticeKind.RECHARGE_SUCCEEDED]
    assert (notice.amount, notice.balance, outcome.entries) == ("200", "299", ())
    assert book.stage == "cooling"


def test_funding_that_was_paid_by_money_booked_before_is_told_too() -> None:
    book = Book(an_account("100"))
    book.feed(a_command(a_fund("60"), "fund-1"))
    book.feed(a_command(a_payment("60", "p-9")))
    asked = book.requests[0].recharge_id
    outcome = book.feed(a_result(asked, amount="60", payment_id="p-9"))
    assert told(outcome) == [NoticeKind.RECHARGE_SUCCEEDED]
    assert book.balance_nanos == usd("160")


def test_a_payment_can_be_booked_after_its_refund_was_told() -> None:
    book = Book(an_account("100"))
    book.feed(a_result("u", Status.REFUNDED, amount="4", payment_id="wire-1"))
    assert book.balance_nanos == usd("96")
    assert book.feed(a_command(a_payment("10"))).label == "applied"
    assert book.balance_nanos == usd("106")
    assert book.feed(a_command(a_payment("10"))).label == "refused"
    book.feed(a_result("u", Status.REFUNDED, amount="4", payment_id="wire-1"))
    assert book.balance_nanos == usd("106")


def test_a_late_success_cools_although_its_payment_was_refunded_and_booked_by_hand() -> None:
    book = Book(an_account("100", trigger="100", amount="200"))
    book.feed(a_call())
    first = book.requests[0].recharge_id
    declined(book, NOW)
    book.feed(a_result(first, Status.REFUNDED, amount="4", payment_id="wire-1"))
    book.feed(a_command(a_payment("200")))
    book.feed(a_result(first, amount="200", payment_id="wire-1"))
    assert book.stage == "cooling"


def test_no_request_for_a_target_is_below_the_minimum() -> None:
    account = an_account("25", trigger="25", method=Method.TARGET, target="25.5", amount=None)
    [request] = apply(account, minutes(1)).requests
    assert request.amount == "50"
    assert account.standing.policy.min_nanos is None, "nobody has set one"


def test_a_stale_balance_asks_for_nothing() -> None:
    outcome = apply(an_account("100", trigger="100"), a_call(), stale=True)
    assert outcome.withheld is Withheld.STALE


def test_a_reason_is_told_on_the_edge_and_not_with_every_event() -> None:
    book = Book(an_account("100", trigger="100"))
    for _ in range(4):
        book.feed(a_call())
    assert [n.withheld for n in book.notices if n.withheld] == [Withheld.IN_FLIGHT]


def test_a_policy_that_is_switched_on_below_the_trigger_asks_at_once() -> None:
    outcome = apply(
        an_account("50"),
        a_command(settings(0, policy=_policy(trigger="100", amount="200"))),
    )
    assert len(outcome.requests) == 1


def _policy(**members: object) -> object:
    from schemas.commands import RechargePolicy

    return RechargePolicy(enabled=True, **members)  # type: ignore[arg-type]


def test_a_closed_account_asks_for_nothing_and_publishes_nothing_again() -> None:
    account, request = requested(an_account("100", trigger="100", amount="200"))
    book = Book(account)
    book.feed(a_command(closing()))
    book.feed(a_call(kind="free", started_at=NOW - timedelta(hours=1)), NOW + timedelta(hours=2))
    assert book.requests == []
    book.feed(a_result(request.recharge_id, amount="200"), NOW + timedelta(hours=2))
    assert book.balance_nanos == usd("299")


def test_funding_by_hand_asks_under_the_commands_id_and_has_no_epoch() -> None:
    outcome = apply(an_account("0"), a_command(a_fund("75"), "my-own-id"))
    request = outcome.requests[0]
    assert (request.recharge_id, request.epoch, request.attempt, request.trigger) == (
        "my-own-id",
        None,
        None,
        None,
    )
    assert request.reason is Reason.FUND
    credited = apply(outcome.account, a_result("my-own-id", amount="75"))
    assert credited.account is not None
    assert credited.account.balance_nanos == usd("75")
    assert credited.account.standing.funds == ()
    assert credited.moved[0][0].value == "purchase"


@pytest.mark.parametrize("ended", [Status.DECLINED, Status.CANCELLED, Status.EXPIRED])
@pytest.mark.parametrize("amount", ["75", None])
def test_funding_that_was_declined_and_is_paid_after_all_is_its_own_payment(
    ended: Status, amount: str | None
) -> None:
    book = paused()
    book.feed(a_command(a_fund("75"), "my-own-id"))
    book.feed(a_result("my-own-id", ended, payment_id="p-1"))
    assert book.account is not None
    assert book.account.standing.funds == ()
    outcome = book.feed(a_result("my-own-id", amount=amount, payment_id="p-2"))
    assert outcome.moved == ((EntryKind.PURCHASE, usd("75")),)
    assert "recharge_succeeded" in told(outcome)
    assert book.account.state != "paused"
    refund = book.feed(a_result("my-own-id", Status.REFUNDED, amount="75", payment_id="p-2"))
    assert refund.moved == ((EntryKind.REFUND, -usd("75")),)


def test_a_second_payment_for_one_funding_is_an_orphan() -> None:
    book = Book(an_account("0"))
    book.feed(a_command(a_fund("75"), "my-own-id"))
    book.feed(a_result("my-own-id", Status.DECLINED, payment_id="p-1"))
    book.feed(a_result("my-own-id", amount="75", payment_id="p-1"))
    outcome = book.feed(a_result("my-own-id", amount="75", payment_id="p-2"))
    assert outcome.moved == ((EntryKind.ORPHAN, usd("75")),)


def test_only_the_last_fundings_that_came_to_nothing_are_kept() -> None:
    book = Book(an_account("0"))
    for at in range(20):
        book.feed(a_command(a_fund("75"), f"f-{at}"))
        book.feed(a_result(f"f-{at}", Status.DECLINED))
    assert book.account is not None
    assert [one.id for one in book.account.standing.unpaid_funds] == [
        short(f"f-{at}") for at in range(5, 20)
    ]


def test_funding_may_run_beside_an_auto_recharge() -> None:
    account, _ = requested(an_account("100", trigger="100"))
    assert len(apply(account, a_command(a_fund("75"))).requests) == 1


def test_a_ninth_open_funding_is_refused() -> None:
    book = Book(an_account("0"))
    for _ in range(8):
        assert book.feed(a_command(a_fund("50"))).label == "applied"
    outcome = book.feed(a_command(a_fund("50")))
    assert (outcome.label, outcome.notices[0].rule) == ("refused", "too_many_open")


def test_terms_say_how_long_an_answer_may_take() -> None:
    account = an_account("100", trigger="100")
    outcome = apply(account, a_call(), result_timeout_s=3)
    assert outcome.requests[0].expires_at == NOW + timedelta(seconds=3)
    assert some_terms().result_timeout_s == 900
