"""The ends of the calendar, of a payment's row, and of what may be asked for."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from schemas.commands import Compare, Method
from schemas.funding import Status
from schemas.notices import DeadLetterReason
from streams.billing import ledger
from tests.billing.builders import (
    NOW,
    Book,
    a_call,
    a_command,
    a_result,
    an_account,
    an_adjustment,
    apply,
    decoded,
    minutes,
    opening,
    requested,
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
    assert apply(an_account("1"), forever).label == "applied"


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
    assert [one.count for one in book.account.recharging.hours] == [1]
    assert [decoded(entry)["amount"] for entry in book.entries] == ["-1", "50", "50", "100"][1:]


def test_a_result_is_the_same_whether_its_data_or_its_key_names_the_tenant() -> None:
    named, bare = a_result("r", amount="1"), a_result("r", amount="1", tenant_id=None)
    assert ledger.content(named) == ledger.content(bare)
