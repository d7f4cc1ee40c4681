"""What people hear about a balance, and the signal that suspends what needs money."""

from datetime import timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.notices import Notice, NoticeKind
from schemas.usage import Kind
from streams.billing import alerts, recharge
from streams.billing.account import Account, decode_row, encode_row
from streams.billing.booking import Draft
from streams.billing.coverage import FREE_KINDS
from streams.billing.events import Tick
from streams.billing.parts import (
    AccountRow,
    Grant,
    Policy,
    Recharging,
    Watch,
    sums_of,
)
from tests.billing.builders import (
    NOW,
    Book,
    a_call,
    a_cause,
    a_command,
    a_payment,
    a_result,
    an_account,
    an_adjustment,
    apply,
    closing,
    minutes,
    opening,
    settings,
    with_policy,
)

LEVELS = {
    NoticeKind.BALANCE_LOW,
    NoticeKind.BALANCE_BELOW_TRIGGER,
    NoticeKind.BALANCE_EXHAUSTED,
    NoticeKind.BALANCE_NEGATIVE,
}
SIGNALS = {NoticeKind.SUSPENDED, NoticeKind.RESUMED}


def levels(book: Book) -> list[tuple[str, int | None]]:
    return [(one.notice.value, one.percent) for one in book.notices if one.notice in LEVELS]


def signals(notices: Any) -> list[Notice]:
    return [one for one in notices if one.notice in SIGNALS]


# -- levels ---------------------------------------------------------------------------------------


def test_half_and_a_fifth_of_the_last_funding_are_told_once_each() -> None:
    book = Book(an_account("100"))
    for _ in range(85):
        book.feed(minutes(1))
    assert levels(book) == [("balance_low", 50), ("balance_low", 20)]
    half, fifth = (one for one in book.notices if one.notice is NoticeKind.BALANCE_LOW)
    assert (half.balance, half.level) == ("49", "50")
    assert (fifth.balance, fifth.level) == ("19", "20")


def test_at_a_level_nothing_is_told() -> None:
    book = Book(an_account("100"))
    book.feed(minutes(50))
    assert levels(book) == []


@pytest.mark.parametrize(("up", "again"), [("3.4", False), ("3.5", True)])
def test_a_level_is_told_again_only_after_the_balance_was_five_percent_above_it(
    up: str, again: bool
) -> None:
    book = Book(an_account("100"))
    book.feed(minutes(51))
    # An adjustment is no funding: the level stays where it is.
    book.feed(a_command(an_adjustment(up)))
    book.feed(minutes(10))
    assert levels(book).count(("balance_low", 50)) == 1 + again


def test_the_level_follows_the_last_funding() -> None:
    book = Book(an_account("100"))
    book.feed(a_command(a_payment("1000")))
    book.feed(minutes(601))
    assert levels(book) == [("balance_low", 50)]


def test_below_its_trigger_zero_and_below_zero_are_told_in_one_event_that_crosses_all() -> None:
    book = Book(an_account("200", trigger="100"))
    book.feed(minutes(201))
    assert levels(book) == [
        ("balance_low", 50),
        ("balance_low", 20),
        ("balance_below_trigger", None),
        ("balance_exhausted", None),
        ("balance_negative", None),
    ]


def test_at_zero_is_told_and_below_zero_only_when_it_is() -> None:
    book = Book(an_account("100"))
    book.feed(minutes(100))
    assert levels(book)[-1] == ("balance_exhausted", None)
    book.feed(minutes(1))
    assert levels(book)[-1] == ("balance_negative", None)
    book.feed(minutes(1))
    assert len(levels(book)) == 4


def test_a_trigger_that_is_switched_off_is_not_told() -> None:
    book = Book(an_account("200", trigger="100", enabled=False))
    book.feed(minutes(101))
    assert ("balance_below_trigger", None) not in levels(book)


def test_an_account_that_never_had_money_is_not_told_that_it_has_none() -> None:
    outcome = apply(None, a_command(opening()))
    assert not LEVELS & {one.notice for one in outcome.notices}


def test_a_runway_shorter_than_a_day_is_told_once_until_it_was_longer_again() -> None:
    book = Book(an_account("100"))
    for hour in range(1, 5):
        at = NOW + timedelta(hours=hour)
        book.feed(a_call(started_at=at, duration_s=600), at)
    (told_once,) = (one for one in book.notices if one.notice is NoticeKind.BALANCE_RUNWAY)
    assert (told_once.balance, told_once.hours) == ("90", 9)


def test_use_that_lasts_long_has_no_runway_notice() -> None:
    book = Book(an_account("100"))
    for day in range(1, 9):
        at = NOW + timedelta(days=day)
        book.feed(a_call(started_at=at, duration_s=600), at)
    assert "balance_runway" not in [one.notice for one in book.notices]


def test_a_tiny_use_of_much_money_lasts_beyond_any_calendar() -> None:
    book = Book(an_account("0.00000004"))
    book.feed(a_command(an_adjustment("999999999")))
    at = NOW + timedelta(days=300)
    book.feed(a_call(callee="+33140000000", started_at=at, duration_s=1), at)
    assert book.account is not None
    assert book.account.standing.watch.mark_at == at


# -- suspension -----------------------------------------------------------------------------------


def test_an_account_without_money_is_suspended_from_its_opening_on() -> None:
    outcome = apply(None, a_command(opening()))
    toll_free, paid = signals(outcome.notices)
    assert toll_free.scopes == [Kind.TOLL_FREE_IN]
    assert set(paid.scopes) == {
        Kind.CONF_DIAL_OUT,
        Kind.INTERNATIONAL,
        Kind.OVERAGE_DOMESTIC,
        Kind.PAYG_OUT,
        Kind.CONF_PPM,
    }
    assert toll_free.signal_version == paid.signal_version == 1
    assert toll_free.lease_until == NOW + timedelta(minutes=10)
    # Whatever brings the balance above zero again, such as a correction, leaves the band.
    assert outcome.account is not None
    assert outcome.account.standing.watch.rise_nanos == 1


@given(closed=st.booleans(), balance=st.integers(-5, 5), floor=st.integers(0, 5))
def test_emergency_calls_are_never_suspended(closed: bool, balance: int, floor: int) -> None:
    account = an_account("10")
    book = Book(with_floor(account, str(floor)))
    book.feed(minutes(10 - balance))
    if closed:
        book.feed(a_command(closing()))
    assert not any(Kind.EMERGENCY in one.scopes for one in book.notices)


def test_every_kind_but_emergency_is_in_one_scope() -> None:
    kinds = [kind for scope in (1, 2, 4) for kind in alerts.kinds_of(scope, FREE_KINDS)]
    assert sorted(kinds) == sorted(set(Kind) - {Kind.EMERGENCY})


def with_floor(account: Account, floor: str) -> Account:
    command = settings(account.standing.settings_version, overdraft_floor=floor)
    outcome = apply(account, a_command(command))
    assert outcome.account is not None
    return outcome.account


def test_toll_free_stops_at_zero_and_the_rest_at_the_overdraft_floor() -> None:
    book = Book(with_floor(an_account("10"), "5"))
    assert [one.scopes for one in signals(book.feed(minutes(10)).notices)] == [[Kind.TOLL_FREE_IN]]
    assert signals(book.feed(minutes(4)).notices) == []
    both = signals(book.feed(minutes(1)).notices)
    assert [one.notice for one in both] == [NoticeKind.SUSPENDED] * 2
    assert {one.signal_version for one in both} == {2}


def test_money_resumes_in_the_same_outcome_with_a_higher_version() -> None:
    book = Book(an_account("0"))
    outcome = book.feed(a_command(a_payment("1")))
    resumed = signals(outcome.notices)
    assert [one.notice for one in resumed] == [NoticeKind.RESUMED] * 2
    assert {one.signal_version for one in resumed} == {2}
    assert all(one.lease_until is None for one in resumed)
    assert book.account is not None
    assert book.account.standing.watch.renew_at is None


def test_a_suspension_is_renewed_before_its_lease_ends_while_it_holds() -> None:
    account = an_account("0")
    now = NOW
    for _ in range(3):
        due = account.next_due()
        assert due is not None
        assert now < due < now + timedelta(minutes=10)
        outcome = apply(account, Tick(due), due)
        renewed = signals(outcome.notices)
        assert [one.notice for one in renewed] == [NoticeKind.SUSPENDED] * 2
        assert {one.signal_version for one in renewed} == {1}
        assert {one.lease_until for one in renewed} == {due + timedelta(minutes=10)}
        assert outcome.account is not None
        account, now = outcome.account, due


def test_use_while_suspended_renews_nothing() -> None:
    book = Book(an_account("0"))
    book.feed(minutes(1))
    assert signals(book.feed(minutes(1)).notices) == []


def test_closing_suspends_all_but_emergency_without_a_lease_and_opening_again_ends_it() -> None:
    book = Book(an_account("10"))
    suspended = signals(book.feed(a_command(closing())).notices)
    kinds = {kind for one in suspended for kind in one.scopes}
    assert kinds == set(Kind) - {Kind.EMERGENCY}
    assert {one.lease_until for one in suspended} == {None}
    resumed = signals(book.feed(a_command(opening())).notices)
    assert {one.notice for one in resumed} == {NoticeKind.RESUMED}
    assert {kind for one in resumed for kind in one.scopes} == kinds


def test_opening_again_without_money_keeps_what_needs_money_suspended() -> None:
    book = Book(an_account("0"))
    book.feed(a_command(closing()))
    after = signals(book.feed(a_command(opening())).notices)
    assert [(one.notice.value, len(one.scopes)) for one in after] == [
        ("resumed", 3),
        ("suspended", 1),
        ("suspended", 5),
    ]


# -- lots that expire -----------------------------------------------------------------------------


def test_expiry_is_told_thirty_and_seven_days_before_it() -> None:
    ends = NOW + timedelta(days=90)
    book = Book(an_account("0"))
    book.feed(a_command(an_adjustment("50", expires_at=ends)))
    told_at = {}
    for day in range(1, 90):
        at = NOW + timedelta(days=day)
        for one in book.feed(a_call(kind="free", started_at=at, duration_s=0), at).notices:
            assert one.notice is not NoticeKind.GRANT_EXPIRING, "a tick tells, not a call"
    for one in book.notices:
        if one.notice is NoticeKind.GRANT_EXPIRING:
            told_at[ends - one.at] = (one.amount, one.expires_at)
    assert told_at == {timedelta(days=30): ("50", ends), timedelta(days=7): ("50", ends)}


def test_a_lot_that_lives_for_a_day_has_no_warning() -> None:
    book = Book(an_account("0"))
    book.feed(a_command(an_adjustment("50", expires_at=NOW + timedelta(days=1))))
    assert book.account is not None
    assert book.account.grants[0].warn_at is None


# -- the band -------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.integers(1, 120)),
        st.tuples(st.just("pay"), st.integers(1, 300)),
        st.tuples(st.just("floor"), st.integers(0, 50)),
        st.tuples(st.just("trigger"), st.integers(5, 200)),
        st.tuples(st.just("time"), st.integers(1, 2_000)),
    ),
    max_size=14,
)


@example(steps=[("use", 1), ("use", 80), ("use", 120), ("use", 10)])
@given(steps=STEPS)
def test_inside_the_band_a_review_would_tell_nothing(steps: list[tuple[str, int]]) -> None:
    book, now = Book(an_account("200")), NOW
    for at, (what, size) in enumerate(steps):
        account = book.account
        assert account is not None
        match what:
            case "use":
                book.feed(minutes(size), now)
            case "pay":
                book.feed(a_command(a_payment(str(size), f"w-{at}")), now)
            case "floor":
                change = settings(account.standing.settings_version, overdraft_floor=str(size))
                book.feed(a_command(change), now)
            case "trigger":
                book.account = with_policy(account, trigger=str(size))
            case _:
                now += timedelta(minutes=size)
                book.feed(a_call(kind="free", started_at=now, duration_s=0), now)
        after = book.account
        assert after is not None
        assert (
            after.standing.watch.fall_nanos < after.balance_nanos < after.standing.watch.rise_nanos
        )
        draft = Draft(after, a_cause(), now)
        alerts.review(draft, FREE_KINDS)
        assert draft.notices == ()
        assert draft.account is after


def test_a_free_call_tells_nothing_and_leaves_the_account_as_it_is() -> None:
    account = an_account("100", trigger="50")
    outcome = apply(account, a_call(kind="emergency"))
    assert (outcome.account, outcome.notices) == (account, ())
    assert outcome.account is account


# -- rows -----------------------------------------------------------------------------------------


def test_rows_of_before_the_members_that_came_later_are_read() -> None:
    book = Book(an_account("100", trigger="100"))
    book.feed(a_call())
    assert book.account is not None
    value = encode_row(book.account)
    row = msgspec.msgpack.decode(value[8:])
    names = [field.name for field in msgspec.structs.fields(AccountRow)]
    del row[names.index("watch") :]
    grants, policy, recharging = (
        row[names.index(name)] for name in ("grants", "policy", "recharging")
    )
    for grant in grants:
        del grant[len(msgspec.structs.fields(Grant)) - 1 :]
    del policy[len(msgspec.structs.fields(Policy)) - 1 :]
    asked = recharging[[field.name for field in msgspec.structs.fields(Recharging)].index("asked")]
    del asked[-1], recharging[-2:]
    older = decode_row(value[:8] + msgspec.msgpack.encode(row))
    assert older.standing.watch == Watch()
    assert older.balance_nanos == book.account.balance_nanos
    assert older.standing.recharging.asked == book.account.standing.recharging.asked
    # The first event looks at it as if it were new: armed where it stands, and nothing told.
    outcome = apply(older, a_call(kind="free"))
    assert not LEVELS & {one.notice for one in outcome.notices}
    answer = a_result(book.requests[0].recharge_id, amount="200")
    assert apply(older, answer).label == "credited"


def test_spend_on_risk_classes_is_kept_for_a_day_and_no_longer() -> None:
    draft = Draft(an_account("10", trigger="5", velocity={"a": "1"}), a_cause(), NOW)
    for hour in range(100):
        draft.now = NOW + timedelta(hours=hour)
        recharge.spent(draft, "a", 1)
    (risk,) = draft.account.standing.recharging.risks
    blocks = sums_of(risk.blocks)
    assert len(blocks) == 7
    assert 24 <= sum(one.nanos for one in blocks) <= 28
