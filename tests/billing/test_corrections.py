"""Corrections: what was booked wrongly is taken back once, and what is right takes its place."""

from datetime import datetime, timedelta
from itertools import permutations
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from schemas.ledger import EntryKind, LedgerEntry
from schemas.nanos import NANOS, text_from
from schemas.notices import DeadLetterReason, NoticeKind, Withheld
from schemas.usage import Kind, Phase
from streams.billing import explain, grants, statement
from streams.billing.account import Account, decode_row, encode_row
from streams.billing.booking import Draft
from streams.billing.events import Event, UsageEvent
from streams.billing.outcomes import Burnt, Outcome
from streams.billing.parts import Grant, LotKind
from tests.billing.builders import (
    NOW,
    Book,
    a_call,
    a_cause,
    a_command,
    a_payment,
    an_account,
    an_adjustment,
    apply,
    chain_holds,
    changed,
    closing,
    corrected,
    decoded,
    entries_of,
    minutes,
    opening,
    requested,
    told,
    usd,
)

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
_read = msgspec.json.Decoder(LedgerEntry).decode


def named(name: str, **changes: Any) -> UsageEvent:
    count = changes.pop("minutes", 1)
    return minutes(count, cause=a_cause(name=name), **changes)


def a_correction(
    of: str, entries: list[bytes] | tuple[bytes, ...], name: str | None = None, **changes: Any
) -> UsageEvent:
    """A correction with what the corrected event has caused, as the engine hands it over."""
    count = changes.pop("minutes", 1)
    event = minutes(
        count,
        cause=a_cause(name=name or f"{of}'"),
        phase=Phase.CORRECTION,
        corrects=of,
        **changes,
    )
    return event.correcting(entries_of(entries, of))


def moved(outcome: Outcome) -> list[tuple[str, str]]:
    return [(kind.value, text_from(nanos)) for kind, nanos in outcome.moved]


def lots(account: Account | None) -> dict[str, str]:
    assert account is not None
    return {grant.id: text_from(grant.left_nanos) for grant in account.grants}


def spending(balance: str, *counts: int, now: datetime = NOW) -> Book:
    """A book of a tenant with money that has made calls of so many minutes: c1, c2, …"""
    book = Book(an_account(balance))
    for number, count in enumerate(counts, 1):
        book.feed(named(f"c{number}", minutes=count), now)
    return book


def test_a_correction_takes_the_charge_back_and_books_the_new_content() -> None:
    book = spending("100", 10)
    outcome = book.feed(a_correction("c1", book.entries, minutes=4))
    assert outcome.label == "corrected"
    assert moved(outcome) == [("reversal", "10"), ("charge", "-4")]
    assert lots(outcome.account) == {"g1": "96"}


def test_entries_name_what_they_reverse_and_what_they_replace() -> None:
    book = spending("100", 10)
    reversal, charge = map(decoded, book.feed(a_correction("c1", book.entries)).entries)
    assert reversal["links"] == charge["links"] == {"corrects": "c1", "entry": 2}
    assert reversal["caused_by"] == charge["caused_by"]
    assert reversal["grants"] == [{"id": "g1", "amount": "10", "left": "100"}]
    assert (reversal["usage_kind"], reversal["callee"]) == ("international", charge["callee"])
    assert reversal["at"] == decoded(book.entries[0])["at"]


@pytest.mark.parametrize(
    "changes", [{"duration_s": 0}, {"kind": Kind.FREE}, {"kind": Kind.VOIP_LEG}]
)
def test_a_correction_that_costs_nothing_only_reverses(changes: dict[str, Any]) -> None:
    book = spending("100", 10)
    event = a_correction("c1", book.entries)
    outcome = book.feed(changed(event, **changes))
    assert moved(outcome) == [("reversal", "10")]
    assert lots(outcome.account) == {"g1": "100"}


def test_what_had_cost_nothing_is_charged_anew_and_reverses_nothing() -> None:
    book = Book(an_account("100"))
    book.feed(named("c1", kind=Kind.FREE))
    outcome = book.feed(a_correction("c1", book.entries))
    assert moved(outcome) == [("charge", "-1")]
    assert decoded(outcome.entries[0])["links"] == {"corrects": "c1"}


def test_a_correction_is_corrected_under_its_own_id() -> None:
    book = spending("100", 10)
    book.feed(a_correction("c1", book.entries, "fix", minutes=4))
    outcome = book.feed(a_correction("fix", book.entries, minutes=7))
    assert moved(outcome) == [("reversal", "4"), ("charge", "-7")]
    assert book.balance_nanos == usd("93")
    assert decoded(outcome.entries[0])["links"] == {"corrects": "fix", "entry": 4}


def test_a_correction_that_only_reversed_can_still_be_corrected() -> None:
    book = spending("100", 10)
    book.feed(a_correction("c1", book.entries, "fix", kind=Kind.FREE))
    outcome = book.feed(a_correction("fix", book.entries, minutes=7))
    assert moved(outcome) == [("charge", "-7")]
    assert decoded(outcome.entries[0])["links"] == {"corrects": "fix"}


@pytest.mark.parametrize("corrects", ["c1", None])
def test_without_an_original_it_is_refused(corrects: str | None) -> None:
    account = an_account("100")
    event = a_call(phase=Phase.CORRECTION, corrects=corrects)
    outcome = apply(account, event)
    assert outcome.account is account
    assert outcome.refused is not None
    assert (outcome.refused.reason, outcome.refused.path) == (
        DeadLetterReason.REFUSED,
        "$.corrects",
    )


def test_another_tenants_usage_and_what_is_no_usage_are_not_corrected() -> None:
    book = spending("100", 10)
    event = a_correction("c1", book.entries)
    assert event.original is not None
    [entry] = event.original
    elsewhere = replace(entry, tenant_id="t-2")
    paid = replace(entry, caused_by=replace(entry.caused_by, topic="credits.command.v1"))
    for wrong in (elsewhere, paid):
        outcome = apply(book.account, event.correcting((wrong,)))
        assert outcome.refused is not None
        assert outcome.refused.path == "$.corrects"


def test_new_content_that_cannot_be_booked_reverses_nothing() -> None:
    book = spending("100", 10)
    before = book.account
    outcome = book.feed(a_correction("c1", book.entries, callee="+999"))
    assert outcome.refused is not None
    assert outcome.refused.reason is DeadLetterReason.UNRATED
    assert outcome.account is before
    assert outcome.entries == ()


def test_usage_of_before_a_closing_is_corrected_after_it() -> None:
    book = spending("100", 10)
    book.feed(a_command(closing()))
    outcome = book.feed(a_correction("c1", book.entries, minutes=2))
    assert moved(outcome) == [("reversal", "10"), ("charge", "-2")]


# -- lots ----------------------------------------------------------------------------------------


def test_a_reversal_pays_the_overdraft_first() -> None:
    book = spending("100", 90, 30)
    assert book.balance_nanos == usd("-20")
    outcome = book.feed(a_correction("c1", book.entries, minutes=1))
    reversal, charge = map(decoded, outcome.entries)
    assert reversal.get("overdraft_after", "0") == "0"
    assert reversal["grants"] == [{"id": "g1", "amount": "70", "left": "70"}]
    assert charge["balance_after"] == "69"
    assert lots(outcome.account) == {"g1": "69"}


def test_a_reversal_below_the_overdraft_returns_nothing_to_any_lot() -> None:
    book = spending("10", 10, 30)
    outcome = book.feed(a_correction("c1", book.entries, kind=Kind.FREE))
    [reversal] = map(decoded, outcome.entries)
    assert (reversal["overdraft_after"], reversal.get("grants", [])) == ("20", [])
    assert lots(outcome.account) == {}


def with_lots(*money: tuple[str, timedelta | None]) -> Book:
    """Gifts that end so long from now, in this order."""
    book = Book(an_account())
    for amount, after in money:
        expires_at = None if after is None else NOW + after
        book.feed(a_command(an_adjustment(amount, expires_at=expires_at)))
    return book


def test_a_lot_that_was_used_up_comes_back_as_it_was() -> None:
    book = with_lots(("5", 9 * DAY), ("20", 60 * DAY))
    assert book.account is not None
    first = book.account.grants[0]
    book.feed(named("c1", minutes=8))
    assert lots(book.account) == {"g2": "17"}
    assert book.account is not None
    # Also from a row that was written and read again.
    book.account = decode_row(encode_row(book.account))
    book.feed(a_correction("c1", book.entries, minutes=1))
    assert book.account is not None
    back = book.account.grants[0]
    assert replace(back, left_nanos=first.left_nanos) == first
    assert lots(book.account) == {"g1": "4", "g2": "20"}


def test_what_lots_gave_last_comes_back_first_when_the_overdraft_takes_of_it() -> None:
    book = with_lots(("5", 9 * DAY), ("5", 60 * DAY))
    book.feed(named("c1", minutes=10))
    book.feed(named("c2", minutes=6))
    book.feed(a_correction("c1", book.entries, kind=Kind.FREE))
    # As if only c2 had been: it would have burnt all of g1 and one of g2.
    assert lots(book.account) == {"g2": "4"}


def test_an_expired_lot_pays_the_new_content_and_the_rest_expires_again() -> None:
    book = with_lots(("10", HOUR), ("10", 60 * DAY))
    book.feed(named("c1", minutes=12))
    later = NOW + 2 * HOUR
    outcome = book.feed(a_correction("c1", book.entries, minutes=3), later)
    assert moved(outcome) == [("reversal", "12"), ("charge", "-3"), ("expiry", "-7")]
    assert lots(outcome.account) == {"g2": "10"}
    assert NoticeKind.GRANT_EXPIRED in told(outcome)
    expiry = decoded(outcome.entries[2])
    assert datetime.fromisoformat(expiry["at"]) == NOW + HOUR
    assert expiry["grants"] == [{"id": "g1", "amount": "-7", "left": "0"}]


def test_new_content_takes_more_than_an_expired_lot_has() -> None:
    book = with_lots(("10", HOUR), ("10", 60 * DAY))
    book.feed(named("c1", minutes=12))
    outcome = book.feed(a_correction("c1", book.entries, minutes=15), NOW + 2 * HOUR)
    assert moved(outcome) == [("reversal", "12"), ("charge", "-15")]
    assert lots(outcome.account) == {"g2": "5"}


def voided(account: Account, grant_id: str, now: datetime) -> Account:
    """The account after a lot was voided."""
    draft = Draft(account, a_cause(), now)
    [grant] = (one for one in account.grants if one.id == grant_id)
    kept = tuple(one for one in account.grants if one is not grant)
    gone = ((replace(grant, left_nanos=0), -grant.left_nanos),)
    draft.book(EntryKind.VOID, -grant.left_nanos, Burnt(kept, 0, gone), now)
    return draft.account


def test_a_voided_lot_pays_the_new_content_and_the_rest_is_voided_again() -> None:
    book = with_lots(("10", 60 * DAY), ("10", 90 * DAY))
    book.feed(named("c1", minutes=6))
    assert book.account is not None
    book.account = voided(book.account, "g1", NOW)
    outcome = book.feed(a_correction("c1", book.entries, "fix", minutes=2))
    assert moved(outcome) == [("reversal", "6"), ("charge", "-2"), ("void", "-4")]
    assert lots(outcome.account) == {"g2": "10"}
    # Voided it stays, also after it was used up to the last cent in between.
    book.feed(a_correction("fix", book.entries, "again", minutes=2))
    outcome = book.feed(a_correction("again", book.entries, kind=Kind.FREE))
    assert moved(outcome) == [("reversal", "2"), ("void", "-2")]


def test_what_was_overdrawn_and_paid_since_comes_back_as_a_lot_of_its_own() -> None:
    book = spending("10", 30)
    book.feed(a_command(a_payment("50")))
    assert lots(book.account) == {"g3": "30"}
    outcome = book.feed(a_correction("c1", book.entries, kind=Kind.FREE))
    assert lots(outcome.account) == {"g1": "10", "g3": "30", "g4": "20"}
    [reversal] = map(decoded, outcome.entries)
    assert [used["id"] for used in reversal["grants"]] == ["g1", "g4"]
    assert reversal["expires_at"]


def test_a_lot_that_nobody_remembers_comes_back_as_a_lot_of_its_own() -> None:
    book = spending("10", 10)
    assert book.account is not None
    book.account = book.account.changed(spent=())
    outcome = book.feed(a_correction("c1", book.entries, minutes=4))
    assert lots(outcome.account) == {"g3": "6"}


def test_lots_that_left_the_row_are_kept_for_43_days_and_never_too_many() -> None:
    account = an_account()
    a_lot = Grant("g", LotKind.PAID, 100, 1, 1, NOW, None, NOW)
    for number in range(grants.MOST_LOTS + 5):
        account = grants.with_spent(account, (replace(a_lot, id=f"g{number}"),), NOW, void=False)
    assert grants.lots_of(account) + len(account.standing.spent) == grants.MOST_LOTS
    assert account.standing.spent[-1].grant.id == f"g{grants.MOST_LOTS + 4}"
    later = NOW + grants.SPENT_KEPT
    account = grants.with_spent(account, (replace(a_lot, id="x"),), later, void=False)
    assert [one.grant.id for one in account.standing.spent] == ["x"]


# -- recharge ------------------------------------------------------------------------------------


def test_a_recharge_that_would_not_have_been_needed_is_reported_and_not_undone() -> None:
    book = Book(an_account("100", trigger="100", amount="200"))
    book.feed(named("c1", minutes=10))
    [request] = book.requests
    outcome = book.feed(a_correction("c1", book.entries, kind=Kind.FREE))
    [notice] = [one for one in outcome.notices if one.notice is NoticeKind.RECHARGE_UNNEEDED]
    assert (notice.recharge_id, notice.amount) == (request.recharge_id, "200")
    assert book.stage == "requested"
    assert outcome.requests == ()


@pytest.mark.parametrize("count", [1, 10, 12])
def test_a_recharge_that_was_needed_all_the_same_is_not_reported(count: int) -> None:
    book = Book(an_account("100", trigger="100", amount="200"))
    book.feed(named("c1", minutes=10))
    outcome = book.feed(a_correction("c1", book.entries, minutes=count))
    assert NoticeKind.RECHARGE_UNNEEDED not in told(outcome)


@pytest.mark.parametrize(("count", "unneeded"), [(9, False), (11, False), (0, True)])
def test_what_open_calls_hold_counts_when_it_is_asked_whether_a_recharge_was_needed(
    count: int, unneeded: bool
) -> None:
    book = Book(an_account("160", trigger="100", amount="200"))
    book.feed(named("c1", minutes=10))
    started_at = NOW - timedelta(seconds=3_060)
    # 52 minutes are held, so 98 dollars are available.
    book.feed(a_call(phase=Phase.PROGRESS, leg_id="leg", started_at=started_at, duration_s=3_060))
    assert len(book.requests) == 1
    outcome = book.feed(a_correction("c1", book.entries, minutes=count))
    assert (NoticeKind.RECHARGE_UNNEEDED in told(outcome)) is unneeded


def test_a_recharge_of_before_the_wrong_charge_is_not_reported() -> None:
    account, _ = requested(an_account("100", trigger="100", amount="200"))
    book = Book(account)
    book.feed(named("c1", minutes=10), NOW + HOUR)
    outcome = book.feed(a_correction("c1", book.entries, kind=Kind.FREE), NOW + HOUR)
    assert NoticeKind.RECHARGE_UNNEEDED not in told(outcome)


def test_a_call_of_no_length_needs_no_price_to_take_the_first_one_back() -> None:
    book = Book(an_account("100"))
    book.feed(named("c1", minutes=10))
    nothing = a_call(duration_s=0, callee="+999123", started_at=NOW)
    assert book.feed(nothing).label == "free"
    outcome = book.feed(corrected(nothing, "c1", book.entries, "c2"))
    assert (outcome.label, book.balance_nanos) == ("corrected", 100 * NANOS)


@pytest.mark.parametrize(
    ("enabled", "reason"), [(False, Withheld.DISABLED), (True, Withheld.IN_FLIGHT)]
)
def test_money_given_back_ends_what_was_withheld(enabled: bool, reason: Withheld) -> None:
    book = Book(an_account("101", trigger="100", amount="200", enabled=enabled))
    book.feed(named("c1", minutes=3))
    book.feed(named("c2", minutes=1))
    assert book.account is not None
    assert book.account.standing.recharging.withheld is reason
    book.feed(a_correction("c1", book.entries, minutes=0))
    assert book.account.standing.recharging.withheld is None


def test_new_content_that_costs_more_asks_for_money() -> None:
    book = Book(an_account("101", trigger="100", amount="200"))
    book.feed(named("c1", minutes=1))
    outcome = book.feed(a_correction("c1", book.entries, minutes=3))
    assert len(outcome.requests) == 1


# -- laws ----------------------------------------------------------------------------------------

Lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def played(steps: list[Any], balance: str) -> Book:
    """Feed steps: events, or corrections by what they correct, which find their original."""
    book = Book()
    book.feed(a_command(opening(opening_balance=balance)))
    for step in steps:
        if isinstance(step, tuple):
            of, name, count = step
            event: Event = a_correction(of, book.entries, name, minutes=count)
            if not count:
                event = a_correction(of, book.entries, name, kind=Kind.FREE)
            book.feed(event)
        else:
            book.feed(step)
    return book


@given(st.integers(0, 60), Lengths, st.data())
def test_a_corrected_call_costs_as_if_it_had_been_right_at_once(
    money: int, lengths: list[int], data: st.DataObject
) -> None:
    """One lot, money before and between: the order makes no difference to the total."""
    wrong = data.draw(st.integers(0, len(lengths) - 1))
    right = data.draw(st.integers(0, 40))
    calls: list[Any] = [named(f"c{at}", minutes=count) for at, count in enumerate(lengths)]
    paid = a_command(a_payment("30"))
    place = data.draw(st.integers(0, len(calls)))
    steps = [*calls[:place], paid, *calls[place:]]
    after = steps.index(calls[wrong]) + 1
    at = data.draw(st.integers(after, len(steps)))
    steps.insert(at, (f"c{wrong}", "fix", right))
    book = played(steps, str(money))
    assert book.balance_nanos == (money + 30 - sum(lengths) + lengths[wrong] - right) * NANOS
    assert chain_holds(book.entries)
    assert book.moved == book.balance_nanos


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 60))
def test_a_chain_of_corrections_ends_in_what_the_last_one_says(says: list[int], money: int) -> None:
    steps: list[Any] = [named("c0", minutes=7)]
    steps += [(f"c{at}", f"c{at + 1}", count) for at, count in enumerate(says)]
    book = played(steps, str(money))
    assert book.balance_nanos == (money - says[-1]) * NANOS
    charges = [one for one in map(_read, book.entries) if one.kind is EntryKind.CHARGE]
    undone = [one for one in map(_read, book.entries) if one.kind is EntryKind.REVERSAL]
    assert [one.links.entry for one in undone if one.links] == [
        one.seq for one in charges if one.caused_by.id != f"c{len(says)}"
    ]


@given(st.permutations(range(4)), st.integers(1, 40), st.integers(0, 40))
def test_charges_corrections_and_money_end_in_the_same_total_in_any_order(
    order: list[int], wrong: int, right: int
) -> None:
    """Lots that nobody can tell apart, whole dollars, no pool: nothing here hangs on the order."""
    steps: list[Any] = [
        named("c1", minutes=wrong),
        ("c1", "fix", right),
        a_command(a_payment("25")),
        named("c2", minutes=9),
    ]
    drawn = [steps[at] for at in order]
    if drawn.index(steps[1]) < drawn.index(steps[0]):
        drawn.remove(steps[0])
        drawn.insert(drawn.index(steps[1]), steps[0])
    book = played(drawn, "10")
    assert book.balance_nanos == (10 + 25 - right - 9) * NANOS


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=4),
    st.lists(st.integers(1, 25), min_size=1, max_size=4),
    st.data(),
)
def test_whatever_lots_expire_in_between_the_books_hold(
    money: list[tuple[int, int]], lengths: list[int], data: st.DataObject
) -> None:
    """Sum of entries is the balance, no lot gets more than it gave, no dead lot stays."""
    book = with_lots(*((str(amount), days * DAY) for amount, days in money))
    opened = book.balance_nanos
    for at, count in enumerate(lengths):
        book.feed(named(f"c{at}", minutes=count))
    now = NOW
    for at in range(len(lengths)):
        now += data.draw(st.integers(0, 3)) * DAY
        count = data.draw(st.integers(0, 30))
        event = a_correction(f"c{at}", book.entries, minutes=count or 1)
        if not count:
            event = a_correction(f"c{at}", book.entries, kind=Kind.FREE)
        book.feed(event, now)
        account = book.account
        assert account is not None
        assert book.moved == book.balance_nanos
        for grant in account.grants:
            assert grants.active(grant, now)
            assert 0 < grant.left_nanos <= grant.amount_nanos
    assert opened == sum(amount for amount, _ in money) * NANOS


def test_where_lots_make_the_order_matter_the_order_of_arrival_decides() -> None:
    """The same four facts, every order: what differs is which money expires, and the rule is the
    order of arrival, never the order of event times."""
    ends = NOW + HOUR
    totals = set()
    for order in permutations(("gift", "call", "correction")):
        if order.index("correction") < order.index("call"):
            continue
        book = Book(an_account("100"))
        for what in order:
            match what:
                case "gift":
                    book.feed(a_command(an_adjustment("10", expires_at=ends)))
                case "call":
                    book.feed(named("c1", minutes=8))
                case _:
                    book.feed(a_correction("c1", book.entries, minutes=3))
        book.feed(named("c9", kind=Kind.FREE), NOW + 2 * HOUR)
        totals.add((order.index("gift"), text_from(book.balance_nanos)))
    # First, the gift pays the call; in between it is new to the call that is corrected; last it
    # pays nothing and expires whole.
    assert totals == {(0, "100"), (1, "100"), (2, "97")}


# -- reading -------------------------------------------------------------------------------------


def test_an_explanation_leads_from_each_entry_of_a_correction_to_the_others() -> None:
    book = spending("100", 10)
    book.feed(a_correction("c1", book.entries, "fix", minutes=4))
    entries = [decoded(one) for one in book.entries]
    wrong, reversal, charge = entries
    assert explain.entry(wrong, entries).considered[2:4] == [
        "taken back by entry 3: test/fix",
        "replaced by entry 4: test/fix",
    ]
    told = explain.entry(reversal, entries)
    assert told.why == "a correction gives back 10 USD"
    assert told.considered[:2] == [
        "correction: takes back what test/c1 had caused, entry 2",
        "together with entry 4: charge",
    ]
    assert "lot g1 got 10, 100 left in it" in told.considered
    told = explain.entry(charge, entries)
    assert "correction: stands in place of what test/c1 had caused, entry 2" in told.considered
    assert "together with entry 3: reversal" in told.considered


def test_a_statement_shows_what_was_corrected_and_foots() -> None:
    book = Book()
    book.feed(a_command(opening(opening_balance="100")))
    book.feed(named("c1", minutes=10))
    book.feed(a_correction("c1", book.entries, "fix", minutes=4))
    text = statement.compose("t-1", "USD", book.entries)
    checked = statement.check(text)
    assert (checked.faults, checked.closing_balance) == ([], "96")
    reversal, charge = text.splitlines()[-3:-1]
    assert "corrects c1,10,100,USD" in reversal
    assert "corrects c1,-4,96,USD" in charge
