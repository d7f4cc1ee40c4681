"""Where corrections, included minutes, lots and holds meet."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as search
from hypothesis import strategies as st

from schemas.commands import GrantKind
from schemas.nanos import text_from
from schemas.usage import Kind, Phase
from streams.billing import grants
from streams.billing.account import decode_row, encode_row
from streams.billing.events import Event
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
    corrected,
    decoded,
    minutes,
    opening,
    told,
    usd,
)
from tests.billing.test_pools import MONTENEGRO, TERMS, Office, licences

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
POOL = "conference/MCOMEETADV"


def moved(outcome: Outcome) -> list[tuple[str, str]]:
    return [(kind.value, text_from(nanos)) for kind, nanos in outcome.moved]


def lots(book: Book) -> dict[str, str]:
    assert book.account is not None
    return {grant.id: text_from(grant.left_nanos) for grant in book.account.grants}


def sound(book: Book, now: datetime) -> None:
    """The laws of a row: entries sum to it, what is dead keeps nothing, nothing exceeds itself."""
    account = book.account
    assert account is not None
    assert book.moved == book.balance_nanos
    for grant in account.grants:
        assert grants.active(grant, now)
        assert 0 < grant.left_nanos <= grant.amount_nanos, grant
    assert len({grant.id for grant in account.grants}) == len(account.grants)
    assert grants.lots_of(account) + len(account.standing.spent) <= grants.MOST_LOTS
    here = {grant.id for grant in account.grants}
    assert not here & {one.grant.id for one in account.standing.spent}
    assert decode_row(encode_row(account)) == account


# -- corrections and included minutes ------------------------------------------------------------


class Corrected(Office):
    """An office of sixty minutes a month whose calls have names."""

    def __init__(self, balance: str = "10", **account: Any) -> None:
        super().__init__(balance, licences(), **account)

    def dial(self, name: str, minutes: int, now: datetime = NOW, **changes: Any) -> Outcome:
        return self.call(60 * minutes, now, cause=a_cause(name=name), **changes)

    def correct(
        self, of: str, minutes: int, now: datetime = NOW, name: str | None = None, **changes: Any
    ) -> Outcome:
        members = {"kind": Kind.CONF_DIAL_OUT, "started_at": NOW} | changes
        event = a_call(duration_s=60 * minutes, **members)
        return self.feed(corrected(event, of, self.entries, name or f"{of}'"), now, **TERMS)


def pools_of(outcome: Outcome) -> list[list[tuple[str, int, int]]]:
    """Month, minutes and use after it, entry by entry."""
    return [
        [(one["month"], one["minutes"], one["used"]) for one in decoded(entry).get("pools", ())]
        for entry in outcome.entries
    ]


@pytest.mark.parametrize("count", [4, 30])
def test_an_included_call_of_another_length_takes_its_minutes_anew(count: int) -> None:
    office = Corrected()
    office.dial("c1", 10)
    outcome = office.correct("c1", count)
    reversal, pool = map(decoded, outcome.entries)
    assert moved(outcome) == [("reversal", "0"), ("pool", "0")]
    assert pools_of(outcome) == [[("2026-03", -10, 0)], [("2026-03", count, count)]]
    assert reversal["links"] == pool["links"] == {"corrects": "c1", "entry": 2}
    assert office.used() == count


def test_an_included_call_that_was_none_gives_its_minutes_back() -> None:
    office = Corrected()
    office.dial("c1", 10)
    outcome = office.correct("c1", 10, kind=Kind.FREE)
    assert (moved(outcome), office.used()) == ([("reversal", "0")], 0)
    outcome = office.correct("c1'", 3)
    assert (moved(outcome), office.used()) == ([("pool", "0")], 3)
    assert decoded(outcome.entries[0])["links"] == {"corrects": "c1'"}


def test_an_included_call_turns_out_longer_than_the_pool() -> None:
    office = Corrected()
    office.dial("c1", 10)
    outcome = office.correct("c1", 62)
    assert moved(outcome) == [("reversal", "0"), ("charge", "-0.03")]
    assert pools_of(outcome) == [[("2026-03", -10, 0)], [("2026-03", 60, 60)]]
    assert decoded(outcome.entries[1])["links"] == {"corrects": "c1", "entry": 2}
    # And shorter again: minutes and money both come back.
    outcome = office.correct("c1'", 7)
    assert moved(outcome) == [("reversal", "0.03"), ("pool", "0")]
    assert (office.used(), text_from(office.balance_nanos)) == (7, "10")
    assert decoded(outcome.entries[1])["links"] == {"corrects": "c1'", "entry": 4}


def test_a_straddling_call_gives_minutes_and_money_back() -> None:
    office = Corrected()
    office.dial("c0", 58)
    office.dial("c1", 4)
    outcome = office.correct("c1", 4, callee=MONTENEGRO)  # no country of the pool
    assert moved(outcome) == [("reversal", "0.03"), ("charge", "-0.06")]
    assert pools_of(outcome) == [[("2026-03", -2, 58)], []]
    assert office.used() == 58


def test_what_a_correction_gives_back_is_there_for_others() -> None:
    office = Corrected()
    office.dial("c1", 60)
    office.correct("c1", 0)
    assert moved(office.dial("c2", 60)) == [("pool", "0")]


def test_minutes_of_another_month_return_to_it() -> None:
    office = Corrected()
    office.dial("c1", 10)
    april = NOW + 31 * DAY
    outcome = office.correct("c1", 4, april, started_at=april)
    assert pools_of(outcome) == [[("2026-03", -10, 0)], [("2026-04", 4, 4)]]
    assert (office.used(), office.used(month=202604)) == (0, 4)


def test_a_month_that_is_over_for_good_gets_nothing_back() -> None:
    office = Corrected()
    office.dial("c1", 10)
    # March and 35 days more.
    over = datetime(2026, 5, 6, 0, 0, 1, tzinfo=UTC)
    outcome = office.correct("c1", 4, over)
    assert moved(outcome) == [("reversal", "0"), ("charge", "-0.06")]
    assert pools_of(outcome) == [[], []]
    last = over - timedelta(seconds=1)
    office = Corrected()
    office.dial("c1", 10)
    assert pools_of(office.correct("c1", 4, last)) == [[("2026-03", -10, 0)], [("2026-03", 4, 4)]]


def test_a_percentage_is_told_once_a_month_whatever_is_corrected() -> None:
    office = Corrected()
    crossed = [one.percent for one in office.dial("c1", 60).notices]
    assert crossed == [80, 100]
    assert told(office.correct("c1", 10)) == []
    assert told(office.dial("c2", 50)) == []
    # What the new content crosses is told with the correction.
    office = Corrected()
    office.dial("c1", 10)
    assert [one.percent for one in office.correct("c1", 48).notices] == [80]


def test_after_licences_are_gone_minutes_still_return() -> None:
    office = Corrected()
    office.dial("c1", 10)
    office.command(licences(count=0), NOW + HOUR)
    outcome = office.correct("c1", 4, NOW + 2 * HOUR)
    assert pools_of(outcome) == [[("2026-03", -10, 0)], [("2026-03", 4, 4)]]


# -- corrections and lots ------------------------------------------------------------------------


def calling(book: Book, name: str, count: int, now: datetime = NOW) -> Outcome:
    return book.feed(minutes(count, cause=a_cause(name=name)), now)


def correct(
    book: Book, of: str, count: int, now: datetime = NOW, name: str | None = None
) -> Outcome:
    event = minutes(count) if count else minutes(1, kind=Kind.FREE)
    return book.feed(corrected(event, of, book.entries, name or f"{of}'"), now)


def granted(book: Book, amount: str, now: datetime = NOW, **members: Any) -> str:
    outcome = book.feed(a_command(a_grant(amount, **members)), now)
    assert outcome.label == "applied", outcome.notices
    grant_id = outcome.notices[0].grant_id
    assert grant_id is not None
    return grant_id


@pytest.mark.parametrize(("after", "lapsed"), [(2 * HOUR, ["10"]), (50 * HOUR, [])])
def test_what_returns_to_an_expired_lot_joins_what_was_left_of_it(
    after: timedelta, lapsed: list[str]
) -> None:
    book = Book(an_account("100"))
    granted(book, "10", expires_at=NOW + HOUR)
    calling(book, "c1", 6)
    now = NOW + after
    outcome = correct(book, "c1", 0, now)
    assert moved(outcome) == [("reversal", "6"), ("expiry", "-6")]
    assert book.account is not None
    assert [text_from(one.left_nanos) for one in book.account.standing.lapsed] == lapsed
    sound(book, now)


def test_a_lot_that_was_voided_is_voided_again_also_after_its_end() -> None:
    book = Book(an_account("100"))
    lot = granted(book, "10", expires_at=NOW + HOUR)
    calling(book, "c1", 6)
    book.feed(a_command(a_void(lot)))
    now = NOW + 2 * HOUR
    outcome = correct(book, "c1", 2, now)
    assert moved(outcome) == [("reversal", "6"), ("charge", "-2"), ("void", "-4")]
    assert book.account is not None
    # Usage of before its end that comes late finds nothing of it.
    assert book.account.standing.lapsed == ()
    sound(book, now)
    outcome = correct(book, "c1'", 0, now, "again")
    assert moved(outcome) == [("reversal", "2"), ("void", "-2")]
    sound(book, now)


def test_a_voided_lot_stays_so_when_another_dead_one_leaves_before_it() -> None:
    book = Book(an_account("100"))
    granted(book, "2", expires_at=NOW + HOUR)
    lot = granted(book, "10", expires_at=NOW + 9 * DAY)
    calling(book, "c1", 8)
    book.feed(a_command(a_void(lot)))
    now = NOW + 60 * HOUR
    outcome = correct(book, "c1", 4, now)
    assert moved(outcome) == [("reversal", "8"), ("charge", "-4"), ("void", "-4")]
    outcome = correct(book, "c1'", 1, now, "again")
    assert moved(outcome) == [("reversal", "4"), ("charge", "-1"), ("expiry", "-1"), ("void", "-2")]
    sound(book, now)


@pytest.mark.parametrize("right", [0, 3, 8, 9])
def test_an_allowance_that_was_set_back_since_gets_no_more_than_its_amount(right: int) -> None:
    book = Book(an_account("100"))
    lot = granted(book, "10", priority=2, every_months=1)
    calling(book, "c1", 8)
    now = NOW + 31 * DAY
    book.feed(a_call(kind=Kind.FREE), now)
    assert lots(book)[lot] == "10"
    outcome = correct(book, "c1", right, now)
    # What had been of the period before pays the new content, and the rest of it goes.
    assert lots(book)[lot] == "10"
    assert sum(nanos for _, nanos in outcome.moved) == min(0, 8 - right) * usd("1")
    if right == 3:
        assert moved(outcome) == [("reversal", "8"), ("charge", "-3"), ("grant", "-5")]
        assert decoded(outcome.entries[2])["grants"] == [{"id": lot, "amount": "-5", "left": "10"}]
    sound(book, now)
    # The next period is as any other.
    later = NOW + 61 * DAY
    book.feed(a_call(kind=Kind.FREE), later)
    assert lots(book)[lot] == "10"
    sound(book, later)


def test_what_an_allowance_has_too_much_pays_the_new_content_and_no_more_of_it() -> None:
    """As it is with a dead lot: then the burn order."""
    book = Book(an_account("100"))
    first = granted(book, "5", priority=1)
    lot = granted(book, "10", priority=2, every_months=1)
    calling(book, "c1", 13)
    now = NOW + 31 * DAY
    book.feed(a_call(kind=Kind.FREE), now)
    # Five go back to the first, eight to the allowance: it pays eight, the first three.
    outcome = correct(book, "c1", 11, now)
    assert (lots(book)[first], lots(book)[lot]) == ("2", "10")
    assert [one["id"] for one in decoded(outcome.entries[1])["grants"]] == [lot, first]
    sound(book, now)


def full(book: Book, count: int, now: datetime = NOW) -> None:
    """Gifts that end one day after another."""
    for number in range(count):
        book.feed(a_command(an_adjustment("1", expires_at=NOW + (30 + number) * DAY)), now)


def test_a_lot_that_was_put_together_with_another_comes_back_as_one_of_its_own() -> None:
    book = Book(an_account("0"))
    lot = granted(book, "10", kind=GrantKind.PAID, expires_at=NOW + 29 * DAY)
    calling(book, "c1", 6)
    full(book, grants.MOST_LOTS)
    assert lot not in lots(book)
    outcome = correct(book, "c1", 2)
    assert moved(outcome) == [("reversal", "6"), ("charge", "-2")]
    sound(book, NOW)


def test_lots_that_come_back_are_remembered_no_longer() -> None:
    book = Book(an_account("0"))
    full(book, 12)
    calling(book, "c1", 12)
    full(book, 12)
    assert book.account is not None
    assert len(book.account.standing.spent) == 12
    correct(book, "c1", 0)
    assert len(lots(book)) == 24
    sound(book, NOW)


def test_a_lot_that_nobody_remembers_makes_room_for_itself() -> None:
    book = Book(an_account("0"))
    full(book, 4)
    calling(book, "c1", 4)
    full(book, grants.MOST_LOTS)
    assert book.account is not None
    assert book.account.standing.spent == ()
    outcome = correct(book, "c1", 1)
    assert moved(outcome) == [("reversal", "4"), ("charge", "-1")]
    assert len(lots(book)) == grants.MOST_LOTS
    sound(book, NOW)


# -- holds ---------------------------------------------------------------------------------------


def phase(office: Office, what: Phase, elapsed: int, now: datetime = NOW) -> Outcome:
    event = a_call(
        kind=Kind.CONF_DIAL_OUT, phase=what, leg_id="leg", started_at=NOW, duration_s=elapsed
    )
    return office.feed(event, now, **TERMS)


def exposure(book: Book) -> str:
    assert book.account is not None
    return text_from(book.account.standing.exposure_nanos)


def test_included_seconds_hold_nothing_and_a_straddling_call_holds_its_rest() -> None:
    office = Corrected()
    office.dial("c0", 57)
    before = office.account
    assert before is not None
    entries, notices = list(office.entries), list(office.notices)
    phase(office, Phase.START, 0)
    assert (exposure(office), office.account) == ("0", before)
    phase(office, Phase.PROGRESS, 120, NOW + timedelta(seconds=120))
    assert exposure(office) == "0"
    phase(office, Phase.PROGRESS, 180, NOW + timedelta(seconds=180))
    assert exposure(office) == "0.015"
    assert office.account is not None
    assert (office.entries, office.notices) == (entries, notices)
    assert office.account.standing.pools == before.standing.pools
    assert office.used() == 57
    outcome = phase(office, Phase.END, 200, NOW + timedelta(seconds=200))
    assert moved(outcome) == [("charge", "-0.015")]
    assert (exposure(office), office.used()) == ("0", 60)


def test_a_hold_follows_the_minutes_that_are_left() -> None:
    office = Corrected()
    office.dial("c0", 60)
    phase(office, Phase.START, 0)
    assert exposure(office) == "0.015"
    office.correct("c0", 10)
    assert exposure(office) == "0.015"
    phase(office, Phase.PROGRESS, 60, NOW + timedelta(seconds=60))
    assert exposure(office) == "0"


@pytest.mark.parametrize("leg", ["leg", None])
def test_a_correction_neither_places_nor_ends_a_hold(leg: str | None) -> None:
    office = Corrected()
    office.dial("c0", 60)
    office.dial("c1", 3)
    phase(office, Phase.START, 0)
    held = dict(office.holds)
    before = office.account
    outcome = office.correct("c1", 5, leg_id=leg)
    assert outcome.hold is None
    assert (office.holds, exposure(office)) == (held, "0.015")
    assert before is not None
    assert office.account is not None
    assert office.account.standing.holds == before.standing.holds == 1


# -- laws ----------------------------------------------------------------------------------------

ENDS = st.sampled_from([1, 20, 47, 72, 24 * 20, None])
LOTS = st.one_of(
    st.tuples(st.just("gift"), st.integers(1, 9), ENDS, st.integers(1, 3), st.sampled_from("pq")),
    st.tuples(st.just("allowance"), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.just("gifts"), st.integers(3, 12)),
    st.tuples(st.just("void"), st.integers(0, 5)),
    st.tuples(st.just("call"), st.integers(1, 20), st.integers(0, 60)),
    st.tuples(st.just("correct"), st.integers(0, 5), st.integers(0, 20), st.integers(0, 60)),
    st.tuples(st.just("wait"), st.sampled_from([1, 24, 50, 24 * 30])),
    st.tuples(st.just("pay"), st.integers(1, 20)),
)


def told_story(steps: list[Any]) -> Iterator[tuple[Book, datetime]]:
    """A tenant's lots, calls and corrections: the book and the instant after each step."""
    book, now, names = Book(), NOW, list[str]()
    book.feed(a_command(opening(opening_balance="20")), now)
    yield book, now
    for step in steps:
        now += timedelta(seconds=1)
        event: Event
        match step:
            case ("wait", hours):
                now += hours * HOUR
                event = a_call(kind=Kind.FREE)
            case ("gift", amount, hours, priority, kind):
                event = a_command(
                    a_grant(
                        str(amount),
                        priority=priority,
                        kind=GrantKind.PAID if kind == "p" else GrantKind.PROMOTIONAL,
                        expires_at=None if hours is None else now + hours * HOUR,
                    )
                )
            case ("allowance", amount, priority, days):
                event = a_command(a_grant(str(amount), priority=priority, every_days=days))
            case ("gifts", count):
                for number in range(count):
                    ends = now + (40 + number) * DAY
                    book.feed(a_command(an_adjustment("1", expires_at=ends)), now)
                continue
            case ("void", at):
                assert book.account is not None
                grants_now = book.account.grants
                if at >= len(grants_now):
                    continue
                event = a_command(a_void(grants_now[at].id))
            case ("pay", amount):
                event = a_command(a_payment(str(amount), f"wire-{now}"))
            case ("call", count, hours):
                started = now - hours * HOUR - timedelta(minutes=count)
                event = a_call(duration_s=60 * count, started_at=started)
                names.append(event.cause.id)
            case (_, at, count, hours):
                if at >= len(names):
                    continue
                started = now - hours * HOUR - timedelta(minutes=count)
                right = a_call(duration_s=60 * count, started_at=started)
                event = corrected(right, names.pop(at), book.entries, right.cause.id)
                names.append(right.cause.id)
        book.feed(event, now)
        yield book, now


@given(st.lists(LOTS, max_size=25))
@search(max_examples=200)
def test_whatever_becomes_of_lots_before_a_correction_the_books_hold(steps: list[Any]) -> None:
    for book, now in told_story(steps):
        sound(book, now)
