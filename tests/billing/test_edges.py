"""The ends of the calendar, of a payment's row, and of what may be asked for."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from schemas.commands import Compare, Method, RechargePolicy
from schemas.funding import Status
from schemas.notices import DeadLetterReason
from streams.billing import ledger
from streams.billing.events import Event
from streams.billing.parts import sums_of
from tests.billing.builders import (
    NOW,
    Book,
    a_call,
    a_command,
    a_fund,
    a_result,
    an_account,
    an_adjustment,
    apply,
    decoded,
    minutes,
    opening,
    requested,
    settings,
)

DAY = timedelta(days=1)
# Instants whose UTC form the calendar does not have.
BEFORE_ALL = datetime.min.replace(tzinfo=timezone(timedelta(hours=5)))
AFTER_ALL = datetime.max.replace(microsecond=0, tzinfo=timezone(timedelta(hours=-5)))


@pytest.mark.parametrize(
    ("started_at", "reason"),
    [
        (BEFORE_ALL, DeadLetterReason.TOO_LATE),
        (AFTER_ALL, DeadLetterReason.FROM_THE_FUTURE),
        (datetime.max.replace(tzinfo=UTC), DeadLetterReason.FROM_THE_FUTURE),
    ],
)
@pytest.mark.parametrize("ended", [False, True])
def test_usage_at_the_ends_of_the_calendar_is_a_dead_letter_and_no_crash(
    started_at: datetime, reason: DeadLetterReason, ended: bool
) -> None:
    event = a_call(started_at=started_at, ended_at=started_at if ended else None)
    assert ledger.Punctuality(NOW).judge(event) is reason


def test_a_command_with_an_instant_beyond_the_calendar_is_answered() -> None:
    assert apply(None, a_command(opening(billing_from=BEFORE_ALL))).label == "applied"
    forever = a_command(an_adjustment("5", expires_at=AFTER_ALL))
    assert apply(an_account("1"), forever).label == "refused"  # within a hundred years


def test_a_repeated_refund_finds_its_payment_as_long_as_it_is_not_too_late() -> None:
    account, request = requested(an_account("100", enabled=True))
    book = Book(account)
    book.feed(a_result(request.recharge_id, amount="200"))
    refunded_at = NOW + 390 * DAY
    refund = a_result(request.recharge_id, Status.REFUNDED, amount="200", occurred_at=refunded_at)
    book.feed(refund, now=refunded_at)
    payment = book.payments[refund.result.payment_id]
    assert ledger.Punctuality(payment.kept_until).judge(refund) is DeadLetterReason.TOO_LATE


def test_an_answer_from_the_future_is_a_dead_letter() -> None:
    late = a_result("r", amount="1", occurred_at=NOW + timedelta(minutes=6))
    assert ledger.Punctuality(NOW).judge(late) is DeadLetterReason.FROM_THE_FUTURE
    on_edge = a_result("r", amount="1", occurred_at=NOW + timedelta(minutes=5))
    assert ledger.Punctuality(NOW).judge(on_edge) is None


def test_a_target_that_is_reached_exactly_asks_for_nothing() -> None:
    account = an_account(
        "101", method=Method.TARGET, target="100", trigger="100", compare=Compare.LE, amount=None
    )
    assert apply(account, minutes(1)).requests == ()


def test_partial_captures_of_one_payment_count_as_one_recharge() -> None:
    account, request = requested(an_account("100", enabled=True))
    book = Book(account)
    for captured in ("50", "100", "200"):
        book.feed(a_result(request.recharge_id, amount=captured))
    assert book.account is not None
    assert [one.count for one in sums_of(book.account.standing.recharging.hours)] == [1]
    assert [decoded(entry)["amount"] for entry in book.entries] == ["-1", "50", "50", "100"][1:]


def test_a_result_is_the_same_whether_its_data_or_its_key_names_the_tenant() -> None:
    named, bare = a_result("r", amount="1"), a_result("r", amount="1", tenant_id=None)
    assert ledger.content(named) == ledger.content(bare)


PLUS_TWO = timezone(timedelta(hours=2))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (a_result("r", amount="1"), a_result("r", amount="1.0")),
        (a_result("r", amount="1.50"), a_result("r", amount="1.500000000")),
        (a_result("r"), a_result("r", occurred_at=NOW.astimezone(PLUS_TWO))),
        (a_command(a_fund("50")), a_command(a_fund("50.00"))),
        (
            a_command(opening(opening_balance="5")),
            a_command(
                opening(
                    opening_balance="5.0",
                    billing_from=(NOW - timedelta(days=40)).astimezone(PLUS_TWO),
                )
            ),
        ),
        (
            a_command(settings(1, policy=RechargePolicy(trigger="100", daily_cap="7"))),
            a_command(settings(1, policy=RechargePolicy(trigger="100.00", daily_cap="7.0"))),
        ),
    ],
)
def test_the_same_amount_or_instant_written_otherwise_is_the_same_content(
    one: Event, other: Event
) -> None:
    assert ledger.content(one) == ledger.content(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (a_result("r", amount="1"), a_result("r", amount="1.01")),
        (a_result("1.0"), a_result("1")),
        (a_result("r"), a_result("r", occurred_at=NOW + timedelta(seconds=1))),
        (a_command(a_fund("50")), a_command(a_fund("50", currency="EUR"))),
        (
            a_command(settings(1, payment_methods=["1"])),
            a_command(settings(1, payment_methods=["1.0"])),
        ),
    ],
)
def test_another_amount_instant_or_text_is_another_content(one: Event, other: Event) -> None:
    assert ledger.content(one) != ledger.content(other)
