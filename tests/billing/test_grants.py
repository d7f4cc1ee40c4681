"""Grants: lots by command, to come, set back, voided, expired and reopened, merged when full."""

from datetime import timedelta
from typing import Any

import pytest

from schemas.commands import GrantKind
from schemas.notices import NoticeKind
from streams.billing.account import encode_row
from streams.billing.granting import MOST_PLANNED, grant_id_of, next_day, next_month
from streams.billing.grants import MOST_LOTS, lots_of
from streams.billing.outcomes import Outcome
from tests.billing.builders import (
    NOW,
    Book,
    a_call,
    a_cause,
    a_command,
    a_grant,
    a_payment,
    a_void,
    an_account,
    an_adjustment,
    closing,
    decoded,
    minutes,
    opening,
    settings,
    told,
    usd,
)

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)


def given(book: Book, amount: str, **members: Any) -> str:
    """Grant and apply; the lot's id."""
    outcome = book.feed(a_command(a_grant(amount, **members)), members.pop("now", NOW))
    assert outcome.label == "applied", outcome.notices
    grant_id = outcome.notices[0].grant_id
    assert grant_id is not None
    return grant_id


def lots(book: Book) -> dict[str, int]:
    assert book.account is not None
    return {lot.id: lot.left_nanos for lot in book.account.grants}


def booked(book: Book, since: int = 0) -> list[tuple[str, str]]:
    """Kind and amount of entries."""
    entries = [decoded(entry) for entry in book.entries[since:]]
    return [(entry["kind"], entry["amount"]) for entry in entries]


def refusal(outcome: Outcome) -> str | None:
    assert (outcome.label, told(outcome), outcome.entries) == ("refused", ["command_refused"], ())
    assert outcome.notices[0].fix
    return outcome.notices[0].rule


# -- granting ---------------------------------------------------------------------------------


def test_a_grant_is_in_the_balance_at_once_and_its_answer_names_it() -> None:
    book = Book(an_account("0"))
    cause = a_command(a_grant("5")).cause
    assert grant_id_of(cause) == grant_id_of(cause)
    grant_id = given(book, "5")
    assert lots(book) == {grant_id: usd("5")}
    entry = decoded(book.entries[-1])
    assert (entry["kind"], entry["amount"], entry["reason"]) == ("grant", "5", "a gift")


def test_the_same_command_makes_the_same_lot() -> None:
    assert grant_id_of(a_cause(name="x")) == grant_id_of(a_cause(name="x"))
    assert grant_id_of(a_cause(name="x")) != grant_id_of(a_cause(name="y"))


def test_a_grant_first_pays_what_was_overdrawn() -> None:
    book = Book(an_account("0"))
    book.feed(minutes(3))
    grant_id = given(book, "5")
    assert (book.balance_nanos, lots(book)) == (usd("2"), {grant_id: usd("2")})


@pytest.mark.parametrize(
    ("kind", "expires"), [(GrantKind.PAID, "2027-03-02T10:00:00Z"), (GrantKind.PROMOTIONAL, None)]
)
def test_paid_money_expires_after_twelve_months_and_promotional_never(
    kind: GrantKind, expires: str | None
) -> None:
    book = Book(an_account("0"))
    given(book, "5", kind=kind)
    assert decoded(book.entries[-1]).get("expires_at") == expires


def test_a_lower_priority_is_used_up_first() -> None:
    book = Book(an_account("10"))
    first = given(book, "2", priority=1)
    last = given(book, "2", priority=900)
    book.feed(minutes(5))
    assert first not in lots(book)
    assert lots(book)[last] == usd("2")


@pytest.mark.parametrize(
    ("members", "rule"),
    [
        ({"amount": "0"}, "amount_positive"),
        ({"amount": "-1"}, "amount_positive"),
        ({"currency": "EUR"}, "currency_mismatch"),
        ({"expires_at": NOW}, "expires_at"),
        ({"effective_at": NOW + DAY, "expires_at": NOW + DAY}, "expires_at"),
        ({"effective_at": NOW + 6 * 366 * DAY}, "effective_at"),
        ({"effective_at": NOW - 6 * 366 * DAY}, "effective_at"),
        ({"every_days": 1, "every_months": 1}, "recurrence"),
    ],
)
def test_a_grant_that_makes_no_sense_is_refused(members: dict[str, Any], rule: str) -> None:
    book = Book(an_account("10"))
    before = book.account
    amount = members.pop("amount", "5")
    assert refusal(book.feed(a_command(a_grant(amount, **members)))) == rule
    assert book.account == before


def test_a_closed_account_is_granted_nothing() -> None:
    book = Book(an_account("10"))
    book.feed(a_command(closing()))
    assert refusal(book.feed(a_command(a_grant("5")))) == "closed"


# -- to come ----------------------------------------------------------------------------------


def test_a_grant_to_come_is_in_no_balance_before_it_is_active() -> None:
    book = Book(an_account("10"))
    grant_id = given(book, "5", effective_at=NOW + DAY)
    book.feed(a_call(kind="free"), NOW + DAY - timedelta(microseconds=1))
    assert (book.balance_nanos, booked(book)) == (usd("10"), [])
    book.feed(a_call(kind="free"), NOW + DAY)
    assert (book.balance_nanos, booked(book)) == (usd("15"), [("grant", "5")])
    assert decoded(book.entries[-1])["at"] == "2026-03-03T10:00:00Z"
    [active] = [one for one in book.notices if one.notice is NoticeKind.GRANT_ACTIVE]
    assert (active.grant_id, active.amount, active.balance) == (grant_id, "5", "15")


def test_a_grant_to_come_pays_what_was_overdrawn_when_it_is_active() -> None:
    book = Book(an_account("0"))
    given(book, "5", effective_at=NOW + DAY)
    book.feed(minutes(3))
    assert book.balance_nanos == usd("-3")
    book.feed(a_call(kind="free"), NOW + DAY)
    assert book.account is not None
    assert (book.balance_nanos, book.account.overdraft_nanos) == (usd("2"), 0)


def test_grants_that_begin_together_pay_in_burn_order() -> None:
    book = Book(an_account("0"))
    last = given(book, "5", effective_at=NOW + DAY, priority=9)
    first = given(book, "5", effective_at=NOW + DAY, priority=1)
    book.feed(minutes(3))
    book.feed(a_call(kind="free"), NOW + DAY)
    assert lots(book) == {first: usd("2"), last: usd("5")}


def test_a_grant_to_come_that_is_over_before_anybody_looks_comes_and_goes() -> None:
    book = Book(an_account("10"))
    given(book, "5", effective_at=NOW + DAY, expires_at=NOW + 2 * DAY)
    book.feed(a_call(kind="free"), NOW + 9 * DAY)
    assert booked(book) == [("grant", "5"), ("expiry", "-5")]
    assert book.account is not None
    assert (book.balance_nanos, book.account.standing.lapsed, book.account.standing.planned) == (
        usd("10"),
        (),
        (),
    )


def test_so_many_grants_may_be_to_come_and_no_more() -> None:
    book = Book(an_account("0"))
    for days in range(MOST_PLANNED):
        given(book, "5", effective_at=NOW + (1 + days) * DAY)
    more = a_command(a_grant("5", effective_at=NOW + DAY))
    assert refusal(book.feed(more)) == "too_many_planned"


# -- again and again ----------------------------------------------------------------------------


def test_an_allowance_is_set_back_to_its_amount_and_never_added_to() -> None:
    book = Book(an_account("0"))
    grant_id = given(book, "10", every_months=1, effective_at=NOW)
    book.feed(minutes(4))
    for month, used in ((4, 0), (5, 0), (6, 12)):
        at = NOW.replace(month=month)
        book.feed(a_call(kind="free"), at)
        assert lots(book) == {grant_id: usd("10")}
        if used:
            book.feed(a_call(started_at=at - timedelta(minutes=used), duration_s=60 * used), at)
    assert book.balance_nanos == usd("-2")
    book.feed(a_call(kind="free"), NOW.replace(month=7))
    assert lots(book) == {grant_id: usd("8")}
    assert booked(book) == [
        ("grant", "10"), ("charge", "-4"), ("grant", "4"), ("charge", "-12"), ("grant", "10"),
    ]  # fmt: skip


def test_an_allowance_ends_with_its_expiry() -> None:
    book = Book(an_account("0"))
    given(book, "10", every_days=1, expires_at=NOW + 3 * DAY)
    for days in range(1, 5):
        at = NOW + days * DAY - HOUR
        book.feed(a_call(started_at=at, duration_s=60), at)
    assert booked(book)[-1] == ("charge", "-1")
    assert [kind for kind, _ in booked(book)].count("grant") == 3
    assert book.account is not None
    assert (book.balance_nanos, book.account.standing.planned) == (usd("-1"), ())


def test_an_allowance_rests_while_the_account_is_closed() -> None:
    book = Book(an_account("0"))
    given(book, "10", every_days=1)
    book.feed(minutes(4))
    book.feed(a_command(closing()))
    book.feed(a_command(opening()), NOW + 3 * DAY + HOUR)
    assert book.balance_nanos == usd("6")
    book.feed(a_call(kind="free"), NOW + 4 * DAY)
    assert book.balance_nanos == usd("10")


@pytest.mark.parametrize(
    ("anchor", "every", "after", "following"),
    [
        ("2026-01-31", 1, "2026-01-31", "2026-02-28"),
        ("2026-01-31", 1, "2026-02-28", "2026-03-31"),
        ("2026-01-31", 3, "2026-05-01", "2026-07-31"),
        ("2024-02-29", 12, "2026-01-01", "2026-02-28"),
        ("2026-12-15", 1, "2026-12-20", "2027-01-15"),
        ("2026-01-15", 1, "2026-03-14", "2026-03-15"),
    ],
)
def test_months_count_from_the_anchor(anchor: str, every: int, after: str, following: str) -> None:
    at = [NOW.fromisoformat(text) for text in (anchor, after, following)]
    assert next_month(at[0], every, at[1]) == at[2]


@pytest.mark.parametrize(
    ("every", "after", "following"), [(1, 0, 1), (7, 7, 14), (7, 6, 7), (30, -1, 0), (30, -31, -30)]
)
def test_days_count_from_the_anchor(every: int, after: int, following: int) -> None:
    assert next_day(NOW, every, NOW + after * DAY) == NOW + following * DAY


# -- void ---------------------------------------------------------------------------------------


def test_voiding_takes_what_is_left() -> None:
    book = Book(an_account("0"))
    grant_id = given(book, "5")
    book.feed(minutes(2))
    outcome = book.feed(a_command(a_void(grant_id)))
    assert told(outcome)[0] == "command_applied"
    assert outcome.notices[0].grant_id == grant_id
    assert booked(book)[-1] == ("void", "-3")
    assert (book.balance_nanos, lots(book)) == (0, {})


def test_voiding_a_grant_to_come_moves_nothing() -> None:
    book = Book(an_account("1"))
    grant_id = given(book, "5", effective_at=NOW + DAY)
    assert book.feed(a_command(a_void(grant_id))).label == "applied"
    book.feed(a_call(kind="free"), NOW + 2 * DAY)
    assert booked(book) == []


def test_voiding_an_allowance_ends_it() -> None:
    book = Book(an_account("0"))
    grant_id = given(book, "5", every_days=1)
    book.feed(a_command(a_void(grant_id)))
    book.feed(a_call(kind="free"), NOW + 5 * DAY)
    assert booked(book) == [("grant", "5"), ("void", "-5")]


def test_what_is_gone_or_never_was_cannot_be_voided() -> None:
    book = Book(an_account("0"))
    used = given(book, "2")
    book.feed(minutes(2))
    void = given(book, "2")
    book.feed(a_command(a_void(void)))
    expired = given(book, "2", expires_at=NOW + HOUR)
    for grant_id, rule in (
        (used, "nothing_left"),
        (void, "nothing_left"),
        ("g1", "nothing_left"),
        ("g999", "unknown_grant"),
        ("something", "unknown_grant"),
        (expired, "grant_expired"),
    ):
        assert refusal(book.feed(a_command(a_void(grant_id)), NOW + HOUR)) == rule


# -- expiry with grace ----------------------------------------------------------------------------


def test_late_usage_of_before_the_expiry_takes_what_it_needs_of_the_expired_lot() -> None:
    book = Book(an_account("0"))
    grant_id = given(book, "10", expires_at=NOW + HOUR)
    book.feed(a_command(an_adjustment("5")))
    book.feed(minutes(3), NOW + 2 * HOUR)
    assert booked(book, 2) == [("expiry", "-10"), ("expiry_reopened", "3"), ("charge", "-3")]
    reopened, charge = (decoded(entry) for entry in book.entries[-2:])
    assert reopened["grants"] == [{"id": grant_id, "amount": "3", "left": "3"}]
    assert charge["grants"] == [{"id": grant_id, "amount": "-3", "left": "0"}]
    assert reopened["caused_by"] == charge["caused_by"]
    assert book.balance_nanos == usd("5")


def test_a_lot_is_reopened_until_it_is_empty_and_then_the_others_pay() -> None:
    book = Book(an_account("0"))
    given(book, "10", expires_at=NOW + HOUR)
    book.feed(a_command(an_adjustment("5")))
    for _ in range(3):
        book.feed(minutes(4), NOW + 2 * HOUR)
    assert booked(book)[3:] == [
        ("expiry_reopened", "4"), ("charge", "-4"), ("expiry_reopened", "4"), ("charge", "-4"),
        ("expiry_reopened", "2"), ("charge", "-4"),
    ]  # fmt: skip
    assert book.balance_nanos == usd("3")
    assert book.account is not None
    assert book.account.standing.lapsed == ()


def test_what_would_have_burnt_before_the_expired_lot_still_does() -> None:
    book = Book(an_account("0"))
    given(book, "10", expires_at=NOW + HOUR, priority=5)
    first = given(book, "2", priority=1)
    book.feed(minutes(3), NOW + 2 * HOUR)
    assert booked(book)[-2:] == [("expiry_reopened", "1"), ("charge", "-3")]
    assert first not in lots(book)


@pytest.mark.parametrize(
    ("ended", "arrives"),
    [
        # It ended at the expiry, or later; or it came when the grace was over.
        (HOUR, 2 * HOUR),
        (HOUR + timedelta(seconds=1), 2 * HOUR),
        (timedelta(0), HOUR + timedelta(hours=48)),
    ],
)
def test_an_expired_lot_pays_for_nothing_else(ended: timedelta, arrives: timedelta) -> None:
    book = Book(an_account("0"))
    given(book, "10", expires_at=NOW + HOUR)
    book.feed(a_call(started_at=NOW + ended - timedelta(seconds=60)), NOW + arrives)
    assert booked(book)[1:] == [("expiry", "-10"), ("charge", "-1")]
    assert book.balance_nanos == usd("-1")


def test_the_rest_of_an_expired_lot_leaves_the_row_after_two_days() -> None:
    book = Book(an_account("0"))
    given(book, "10", expires_at=NOW + HOUR)
    book.feed(a_call(kind="free"), NOW + HOUR + timedelta(hours=48) - timedelta(microseconds=1))
    assert book.account is not None
    assert [lot.left_nanos for lot in book.account.standing.lapsed] == [usd("10")]
    book.feed(a_call(kind="free"), NOW + HOUR + timedelta(hours=48))
    assert book.account.standing.lapsed == ()


# -- a full row -----------------------------------------------------------------------------------


def filled(count: int = MOST_LOTS, **members: Any) -> Book:
    """A row with that many lots of one dollar, which expire a day apart, from the tenth day on."""
    book = Book(an_account("0"))
    for number in range(count):
        given(book, "1", expires_at=NOW + (10 + number * (number + 1)) * DAY, **members)
    return book


def test_in_a_full_row_the_two_that_expire_nearest_become_one() -> None:
    book = filled()
    assert book.account is not None
    sooner, later = book.account.grants[:2]
    grant_id = given(book, "1", expires_at=NOW + 900 * DAY)
    assert lots_of(book.account) == MOST_LOTS
    assert sooner.id not in lots(book)
    merged = next(lot for lot in book.account.grants if lot.id == later.id)
    assert (merged.left_nanos, merged.expires_at) == (usd("2"), later.expires_at)
    assert decoded(book.entries[-1])["grants"] == [
        {"id": sooner.id, "amount": "-1", "left": "0"},
        {"id": later.id, "amount": "1", "left": "2"},
        {"id": grant_id, "amount": "1", "left": "1"},
    ]
    assert book.balance_nanos == usd("25")


def test_what_is_left_of_expired_lots_goes_before_any_two_become_one() -> None:
    book = filled()
    first = next(iter(lots(book)))
    at = NOW + 10 * DAY
    given_id = book.feed(a_command(a_grant("1")), at).notices[0].grant_id
    assert book.account is not None
    assert (first in lots(book), book.account.standing.lapsed) == (False, ())
    assert lots_of(book.account) == MOST_LOTS
    assert given_id in lots(book)


def test_lots_of_different_priority_stay_apart_and_a_grant_is_then_refused() -> None:
    book = Book(an_account("0"))
    for priority in range(MOST_LOTS):
        given(book, "1", priority=priority)
    assert refusal(book.feed(a_command(a_grant("1", priority=99)))) == "too_many_grants"
    planned = a_command(a_grant("1", effective_at=NOW + DAY))
    assert refusal(book.feed(planned)) == "too_many_grants"


def test_money_that_came_is_never_refused_for_want_of_room() -> None:
    book = Book(an_account("0"))
    for priority in range(MOST_LOTS):
        given(book, "1", priority=priority)
    assert book.feed(a_command(a_payment("7"))).label == "applied"
    assert book.account is not None
    assert (lots_of(book.account), book.balance_nanos) == (MOST_LOTS, usd("31"))


def test_an_allowance_never_becomes_part_of_another_lot() -> None:
    book = Book(an_account("0"))
    allowances = {given(book, "1", every_days=300) for _ in range(MOST_PLANNED)}
    for _ in range(30):
        given(book, "1", expires_at=NOW + 900 * DAY)
    assert book.account is not None
    assert lots_of(book.account) == MOST_LOTS
    assert allowances <= lots(book).keys()
    assert book.balance_nanos == usd("38")
    book.feed(a_call(kind="free"), NOW + 300 * DAY)
    assert book.balance_nanos == usd("38")


def test_the_lots_of_a_full_row_take_two_kilobytes_at_most() -> None:
    book = Book(an_account("0"))
    amount = "123456.123456789"
    for number in range(MOST_PLANNED):
        given(book, amount, every_months=1, expires_at=NOW + (400 + number) * DAY)
    for number in range(MOST_LOTS):
        given(book, amount, expires_at=NOW + (100 + number) * DAY)
    assert book.account is not None
    assert lots_of(book.account) == MOST_LOTS
    assert len(encode_row(book.account)) <= 2_304


# -- alert levels ---------------------------------------------------------------------------------


def test_alert_levels_can_be_set() -> None:
    book = Book(an_account("100"))
    book.feed(a_command(settings(0, alert_levels=[10, 75])))
    percents = []
    for _ in range(19):
        outcome = book.feed(minutes(5))
        percents += [one.percent for one in outcome.notices if one.percent is not None]
    assert percents == [75, 10]


def test_a_level_the_balance_is_below_already_is_not_told() -> None:
    book = Book(an_account("100"))
    book.feed(minutes(40))
    outcome = book.feed(a_command(settings(0, alert_levels=[90, 60])))
    assert "balance_low" not in told(outcome)
    assert "balance_low" in told(book.feed(minutes(1)))


def test_no_alert_level_is_a_choice() -> None:
    book = Book(an_account("100"))
    book.feed(a_command(settings(0, alert_levels=[])))
    assert "balance_low" not in told(book.feed(minutes(90)))


def test_a_level_named_twice_is_refused() -> None:
    book = Book(an_account("100"))
    assert refusal(book.feed(a_command(settings(0, alert_levels=[5, 5])))) == "alert_levels"
