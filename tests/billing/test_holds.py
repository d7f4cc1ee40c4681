"""Open calls: what they hold, for how long, and what that does to what is available."""

from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from schemas.commands import Method, TariffAssignment
from schemas.nanos import MAX_EVENT_NANOS, NANOS
from schemas.notices import DeadLetterReason
from schemas.usage import Kind, Phase
from streams.billing import explain, holds, ledger
from streams.billing.account import NewerRowError, decode_hold, encode_hold
from streams.billing.events import UsageEvent
from streams.billing.holds import MOST_HELD_NANOS, MOST_HOLDS
from streams.billing.outcomes import Outcome
from streams.billing.parts import VERSION
from streams.billing.rates import Decks, Rate, Tariff
from tests.billing.builders import (
    NOW,
    Book,
    a_call,
    a_cause,
    a_command,
    a_fund,
    a_result,
    an_account,
    an_adjustment,
    apply,
    changed,
    closing,
    decoded,
    minutes,
    settings,
    some_terms,
    told,
    usd,
)
from tests.billing.test_special_rates import a_deck

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)


def a_phase(phase: Phase, elapsed_s: int | None = 0, **changes: Any) -> UsageEvent:
    """A sign of life of a call that began just now; a minute of it is one dollar."""
    return a_call(**{"phase": phase, "duration_s": elapsed_s, "started_at": NOW} | changes)


def a_start(**changes: Any) -> UsageEvent:
    return a_phase(Phase.START, None, **changes)


def progress(elapsed_s: int | None, **changes: Any) -> UsageEvent:
    return a_phase(Phase.PROGRESS, elapsed_s, **changes)


def an_end(elapsed_s: int, **changes: Any) -> UsageEvent:
    return a_phase(Phase.END, elapsed_s, **changes)


class Calls(Book):
    """A tenant whose calls are open; `at` seconds after they began."""

    def at(self, second: int, event: UsageEvent) -> Outcome:
        return self.feed(event, NOW + second * SECOND)

    @property
    def exposure(self) -> str:
        assert self.account is not None
        public = ledger.public_balance(self.account, NOW, some_terms().coverage)
        assert usd(public.available) == self.balance_nanos - usd(public.exposure)
        assert public.holds == sum(not hold.ended for hold in self.holds.values())
        return public.exposure


# -- the price of what has elapsed, and a minute more ----------------------------------------------


def test_a_start_holds_the_price_of_a_minute() -> None:
    calls = Calls(an_account("10"))
    outcome = calls.at(1, a_start())
    assert (outcome.label, outcome.entries, calls.exposure) == ("open", (), "1")
    assert calls.balance_nanos == usd("10")


@pytest.mark.parametrize(
    ("elapsed_s", "exposure"), [(0, "1"), (1, "2"), (60, "2"), (61, "3"), (600, "11")]
)
def test_progress_holds_the_price_of_what_has_elapsed_and_a_minute_more(
    elapsed_s: int, exposure: str
) -> None:
    calls = Calls(an_account("20"))
    calls.at(0, a_start())
    calls.at(elapsed_s, progress(elapsed_s))
    assert calls.exposure == exposure


def test_progress_without_a_start_holds_as_well() -> None:
    calls = Calls(an_account("20"))
    calls.at(60, progress(60))
    assert calls.exposure == "2"


def test_the_fee_is_held_too() -> None:
    deck = Tariff(
        "default", "fee", {"44": Rate(prefix="44", per_minute=NANOS, connect_fee=NANOS // 2)}
    )
    outcome = apply(an_account("20"), as_known(a_start()), tariff=deck)
    assert outcome.account is not None
    assert outcome.account.standing.exposure_nanos == usd("1.5")


def as_known(event: UsageEvent) -> UsageEvent:
    leg = holds.leg_of(event)
    return event.about(leg, event.hold)


def test_the_deck_in_force_when_the_call_started_prices_its_hold() -> None:
    terms = some_terms()
    dear = Tariff("default", "dear", {"44": Rate(prefix="44", per_minute=5 * NANOS)})
    decks = Decks(terms.tariff, [("default", NOW + 30 * SECOND, dear)])
    for began, exposure in ((NOW, "3"), (NOW + 30 * SECOND, "15")):
        event = as_known(progress(120, started_at=began))
        outcome = apply(an_account("50"), event, began + 2 * MINUTE, decks=decks)
        assert outcome.account is not None
        assert outcome.account.standing.exposure_nanos == usd(exposure)


def test_the_tenants_own_deck_prices_its_holds() -> None:
    calls = Calls(an_account("50"))
    assign = TariffAssignment(
        tenant_id="t-1", issued_at=NOW, deck="partners", effective_from=NOW - MINUTE
    )
    calls.feed(a_command(assign))
    terms = some_terms()
    cheap = Tariff("partners", "1", {"44": Rate(prefix="44", per_minute=NANOS // 10)})
    decks = Decks(terms.tariff, [("partners", NOW - MINUTE, cheap)])
    calls.feed(a_start(), decks=decks)
    assert calls.exposure == "0.1"
    # Not published any more: another deck's price would be wrong, and none is held.
    calls.feed(a_start(call_id="other"))
    assert calls.exposure == "0.1"


# -- the end ---------------------------------------------------------------------------------------


def test_an_end_releases_the_hold_and_books_the_whole_leg() -> None:
    calls = Calls(an_account("20"))
    calls.at(0, a_start())
    calls.at(100, progress(100))
    outcome = calls.at(130, an_end(130))
    assert decoded(outcome.entries[0])["amount"] == "-3"
    assert (outcome.label, calls.exposure, calls.balance_nanos) == ("charged", "0", usd("17"))


def test_an_end_without_a_start_just_books() -> None:
    calls = Calls(an_account("20"))
    outcome = calls.at(60, an_end(60))
    assert (outcome.label, outcome.hold, calls.holds) == ("charged", None, {})


@pytest.mark.parametrize("changes", [{"kind": Kind.FREE}, {"duration_s": 0}, {"callee": "+3360"}])
def test_an_end_releases_whatever_it_costs(changes: dict[str, Any]) -> None:
    calls = Calls(an_account("20"))
    leg = {"leg_id": "leg-1"}
    calls.at(0, a_start(**leg))
    calls.at(1, a_call(**{"started_at": NOW, "duration_s": 1} | leg | changes))
    assert calls.exposure == "0"


def test_an_end_that_becomes_a_dead_letter_releases_nothing_and_the_hold_dies_by_itself() -> None:
    calls = Calls(an_account("20"))
    calls.at(0, a_start(leg_id="leg-1"))
    assert calls.at(1, an_end(1, leg_id="leg-1", callee="+999")).refused is not None
    assert calls.exposure == "1"
    calls.at(180, a_call(kind=Kind.FREE))
    assert calls.exposure == "0"


def test_phases_belong_to_a_leg_by_its_id_or_by_all_that_names_it() -> None:
    pbx = replace(a_cause(), source="pbx")
    legs = [
        holds.leg_of(event)
        for event in (
            a_start(cause=pbx),
            a_start(cause=replace(pbx, source="other")),
            a_start(cause=pbx, call_id="c-2"),
            a_start(cause=pbx, callee="+33123456789"),
            a_start(cause=pbx, started_at=NOW - SECOND),
            a_start(cause=pbx, leg_id="leg-1"),
        )
    ]
    assert len(set(legs)) == len(legs)
    offset = datetime.fromisoformat("2026-03-02T12:00:00+02:00")
    assert holds.leg_of(a_start(cause=pbx, started_at=offset)) == legs[0]
    named = a_start(cause=replace(pbx, source="other"), leg_id="leg-1", call_id="c-2")
    assert holds.leg_of(named) == legs[-1]
    # Neither an id as long as it may be nor a number stands in a row.
    assert {len(leg) for leg in legs} == {32}


# -- out of order, and out of time -----------------------------------------------------------------


@given(st.permutations([(0, "start"), (60, "progress"), (120, "progress"), (170, "progress")]))
def test_a_hold_stands_for_the_latest_sign_of_life_in_any_order(
    arrivals: list[tuple[int, str]],
) -> None:
    calls = Calls(an_account("20"))
    for elapsed_s, phase in arrivals:
        calls.at(170, a_start() if phase == "start" else progress(elapsed_s))
    assert calls.exposure == "4"
    [hold] = calls.holds.values()
    assert hold.until == NOW + 170 * SECOND + 3 * MINUTE


@given(st.permutations([0, 30, 60, 90]), st.integers(0, 4))
def test_an_ended_leg_takes_no_more_holds(elapsed: list[int], at: int) -> None:
    """The end comes anywhere among the phases of a leg with an id."""
    leg = {"leg_id": "leg-1"}
    events = [progress(second, **leg) for second in elapsed]
    events.insert(at, an_end(100, **leg))
    calls = Calls(an_account("20"))
    for event in events:
        calls.at(100, event)
    assert (calls.exposure, calls.balance_nanos) == ("0", usd("18"))
    # As long as a phase could still be alive, its end is remembered, and no longer.
    assert [hold.ended for hold in calls.holds.values()] == [True]
    calls.at(280, a_call(kind=Kind.FREE))
    assert calls.holds == {}
    calls.at(281, progress(99, **leg))
    assert (calls.exposure, calls.holds) == ("0", {})


def test_an_end_that_comes_late_is_not_remembered_for_no_phase_is_alive_any_more() -> None:
    calls = Calls(an_account("20"))
    calls.at(180 + 60, an_end(60, leg_id="leg-1"))
    assert calls.holds == {}


@pytest.mark.parametrize(("age_s", "exposure"), [(179, "2"), (180, "0"), (3_600, "0")])
def test_a_sign_of_life_older_than_three_minutes_holds_nothing(age_s: int, exposure: str) -> None:
    calls = Calls(an_account("20"))
    outcome = calls.at(60 + age_s, progress(60))
    assert (outcome.label, calls.exposure) == ("open", exposure)


def test_a_hold_dies_three_minutes_after_the_last_sign_of_life() -> None:
    calls = Calls(an_account("20"))
    calls.at(0, a_start())
    calls.at(100, progress(100))
    calls.at(279, a_call(kind=Kind.FREE))
    assert calls.exposure == "3"
    calls.at(280, a_call(kind=Kind.FREE))
    assert (calls.exposure, calls.holds) == ("0", {})
    # The call goes on after all.
    calls.at(290, progress(290))
    assert calls.exposure == "6"


def test_a_platform_whose_clock_is_ahead_holds_no_longer() -> None:
    calls = Calls(an_account("20"))
    calls.at(0, progress(240))
    [hold] = calls.holds.values()
    assert (calls.exposure, hold.until) == ("5", NOW + 3 * MINUTE)


# -- what holds nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": Kind.FREE},
        {"kind": Kind.EMERGENCY},
        {"kind": Kind.VOIP_LEG},
        {"kind": Kind.CONF_DIAL_IN},
        {"callee": "+999123456789"},
        {"callee": "extension 12"},
    ],
)
def test_free_kinds_and_calls_without_a_price_hold_nothing(changes: dict[str, Any]) -> None:
    calls = Calls(an_account("20"))
    outcome = calls.at(0, a_start(**changes))
    assert (outcome.label, outcome.refused, calls.exposure) == ("open", None, "0")


def test_a_price_of_nothing_holds_nothing() -> None:
    free = Tariff("default", "free", {"44": Rate(prefix="44", per_minute=0)})
    outcome = apply(an_account("20"), as_known(a_start()), tariff=free)
    assert (outcome.hold, outcome.label) == (None, "open")


def test_rows_with_steps_windows_and_a_maximum_price_holds_as_they_price_calls() -> None:
    # NOW is a Monday, ten o'clock.
    deck = a_deck(
        "Day,landline,GB,44,1,0.5,60,60,,,0:1/60;60:3/60,1-5 08:00-18:00 UTC,5,,",
        "Capped,landline,FR,33,1,0,60,60,,,,,,,2",
        "Weekend,landline,DE,49,1,0,60,60,,,,6-7 08:00-18:00 UTC,5,,",
    )
    for callee, exposure in (("+4420", "7.5"), ("+3312", "2"), ("+4912", "0")):
        outcome = apply(an_account("20"), as_known(progress(120, callee=callee)), tariff=deck)
        assert outcome.account is not None
        assert outcome.account.standing.exposure_nanos == usd(exposure)


@pytest.mark.parametrize(
    ("event", "reason", "path"),
    [
        (progress(None), DeadLetterReason.SCHEMA_VIOLATION, "$.duration_s"),
        (
            progress(None, ended_at=NOW - SECOND),
            DeadLetterReason.SCHEMA_VIOLATION,
            "$.duration_s",
        ),
        (a_start(kind=None), DeadLetterReason.SCHEMA_VIOLATION, "$.kind"),
        (a_start(currency="EUR"), DeadLetterReason.CURRENCY_MISMATCH, "$.currency"),
        (
            a_start(started_at=NOW - timedelta(days=41)),
            DeadLetterReason.NOT_BILLABLE,
            "$.started_at",
        ),
    ],
)
def test_a_phase_that_could_not_be_booked_is_a_dead_letter_like_an_end(
    event: UsageEvent, reason: DeadLetterReason, path: str
) -> None:
    refused = apply(an_account("20"), event).refused
    assert refused is not None
    assert (refused.reason, refused.path) == (reason, path)


def test_a_call_that_starts_after_closing_holds_nothing() -> None:
    calls = Calls(an_account("20"))
    calls.at(0, a_start(call_id="before", started_at=NOW - SECOND))
    calls.feed(a_command(closing()))
    assert calls.at(1, a_start()).refused is not None
    assert calls.exposure == "1"
    calls.at(100, progress(101, call_id="before", started_at=NOW - SECOND))
    assert calls.exposure == "3"


def test_holds_that_no_amount_can_show_are_refused() -> None:
    dear = Tariff("default", "dear", {"44": Rate(prefix="44", per_minute=MAX_EVENT_NANOS)})
    calls = Calls(an_account("20"))
    calls.feed(a_start(), tariff=dear)
    assert calls.account is not None
    assert calls.account.standing.exposure_nanos == MOST_HELD_NANOS
    refused = calls.feed(a_start(call_id="c-2"), tariff=dear).refused
    assert refused is not None
    assert refused.reason is DeadLetterReason.OVERFLOW


# -- very many -------------------------------------------------------------------------------------


def test_beyond_five_thousand_the_sum_is_kept_and_people_are_told_once() -> None:
    account = an_account("20000")
    crowded = account.changed(holds=MOST_HOLDS, exposure_nanos=MOST_HOLDS * usd("1"))
    first = apply(crowded, as_known(a_start(call_id="c-1")))
    assert (told(first), first.hold) == (["holds_exceeded"], None)
    assert first.notices[0].exposure == "5000"
    assert first.account is not None
    assert first.account.standing.exposure_nanos == crowded.standing.exposure_nanos
    second = apply(first.account, as_known(a_start(call_id="c-2")))
    assert (told(second), second.hold) == ([], None)
    # Those that hold already go on, and are told again only after there was room.
    hold = apply(account, as_known(a_start())).hold
    assert hold is not None
    moved = changed(as_known(progress(60)), hold=hold)
    assert second.account is not None
    outcome = apply(second.account, moved)
    assert outcome.account is not None
    assert outcome.account.standing.exposure_nanos == crowded.standing.exposure_nanos + usd("1")
    ended = changed(as_known(an_end(60)), hold=hold)
    for held, stays in ((MOST_HOLDS, True), (4_751, False)):
        before = second.account.changed(holds=held)
        after = apply(before, ended).account
        assert after is not None
        assert after.standing.holds_told is stays


# -- what it does to what is available -------------------------------------------------------------


def test_the_recharge_fires_during_the_call() -> None:
    calls = Calls(an_account("103", trigger="100", amount="200"))
    assert calls.at(0, a_start()).requests == ()
    assert calls.at(60, progress(60)).requests == ()
    [request] = calls.at(130, progress(130)).requests
    assert (request.balance, request.available, request.exposure) == ("103", "99", "4")
    assert (request.trigger, request.amount) == ("100", "200")


def test_what_another_call_costs_is_asked_for_while_a_call_is_open() -> None:
    calls = Calls(an_account("102.5", trigger="100", amount="200"))
    assert calls.at(0, a_start()).requests == ()
    outcome = calls.at(1, minutes(2))
    assert calls.balance_nanos == usd("100.5"), "above the trigger, but a dollar of it is held"
    assert len(outcome.requests) == 1


@pytest.mark.parametrize(
    ("policy", "amount"),
    [
        ({"method": Method.TARGET, "target": "150"}, "101"),
        ({"method": Method.GAP_PLUS_AMOUNT, "amount": "60"}, "111"),
        ({"method": Method.FIXED_MULTIPLE, "amount": "50"}, "100"),
    ],
)
def test_a_gap_is_closed_as_seen_from_what_is_available(
    policy: dict[str, Any], amount: str
) -> None:
    calls = Calls(an_account("100", trigger="100", **{"amount": None} | policy))
    [request] = calls.at(50 * 60, progress(50 * 60)).requests
    assert (request.available, request.amount) == ("49", amount)


def test_a_request_is_published_again_word_for_word_when_the_call_has_ended_long_ago() -> None:
    calls = Calls(an_account("100", trigger="100", amount="200"))
    [request] = calls.at(0, a_start()).requests
    calls.at(60, an_end(60))
    calls.feed(a_call(kind=Kind.FREE), NOW + timedelta(minutes=16))
    again = calls.requests[-1]
    assert again.expires_at > request.expires_at
    assert msgspec.structs.replace(again, expires_at=request.expires_at) == request


def test_funding_by_hand_tells_what_is_available() -> None:
    calls = Calls(an_account("10"))
    calls.at(0, a_start())
    [request] = calls.feed(a_command(a_fund("50"))).requests
    assert (request.balance, request.available, request.exposure) == ("10", "9", "1")


def test_why_nothing_was_asked_for_names_the_exposure() -> None:
    calls = Calls(an_account("100", trigger="100", amount="200", enabled=False))
    [notice] = [one for one in calls.at(0, a_start()).notices if one.withheld is not None]
    assert (notice.balance, notice.available, notice.exposure) == ("100", "99", "1")
    told_why = explain.decision(msgspec.to_builtins(notice))
    exposed = "1 of the balance of 100 is held for open calls"
    assert told_why.why == "disabled: auto-recharge is off"
    assert exposed in told_why.considered


def test_why_money_was_asked_for_names_the_exposure() -> None:
    calls = Calls(an_account("100", trigger="100", amount="200"))
    [notice] = [one for one in calls.at(0, a_start()).notices if one.epoch == 1]
    told_why = explain.decision(msgspec.to_builtins(notice))
    assert told_why.considered[0] == "1 of the balance of 100 is held for open calls"
    assert "above_trigger: 99 is available, short of the trigger of 100" in told_why.considered


def test_a_call_that_ends_below_what_it_held_covers_the_trigger_again() -> None:
    calls = Calls(an_account("100.5", trigger="100", amount="200", enabled=False))
    calls.at(0, a_start())
    assert calls.account is not None
    assert calls.account.standing.recharging.withheld == "disabled"
    calls.at(0, an_end(0))
    assert calls.account.standing.recharging.withheld is None


def test_a_hold_that_dies_makes_its_money_available_again() -> None:
    calls = Calls(an_account("1"))
    calls.at(0, a_start())
    outcome = calls.feed(a_call(kind=Kind.FREE), NOW + 3 * MINUTE)
    assert outcome.label == "free"
    assert scopes(calls) == []
    assert [one.notice for one in calls.notices] == ["suspended", "resumed"]


def scopes(calls: Calls) -> list[Kind]:
    """The kinds that are suspended now."""
    held: list[Kind] = []
    version = 0
    for notice in calls.notices:
        if notice.notice not in ("suspended", "resumed"):
            continue
        if notice.signal_version > version:
            version, held = notice.signal_version, []
        if notice.notice == "suspended":
            held += notice.scopes
    return held


def test_open_calls_suspend_what_needs_credits_but_not_toll_free() -> None:
    calls = Calls(an_account("2"))
    calls.at(0, a_start())
    assert scopes(calls) == []
    calls.at(60, progress(60))
    assert Kind.INTERNATIONAL in scopes(calls)
    assert Kind.TOLL_FREE_IN not in scopes(calls)
    suspended = next(one for one in calls.notices if one.notice == "suspended")
    assert (suspended.balance, suspended.available, suspended.exposure) == ("2", "0", "2")
    calls.at(61, an_end(61))
    assert {Kind.INTERNATIONAL, Kind.TOLL_FREE_IN} <= set(scopes(calls))


def test_the_overdraft_floor_counts_from_what_is_available() -> None:
    calls = Calls(an_account("2"))
    calls.feed(a_command(settings(0, overdraft_floor="1")))
    calls.at(60, progress(60))
    assert scopes(calls) == []
    calls.at(61, progress(61))
    assert Kind.INTERNATIONAL in scopes(calls)


def test_ordinary_usage_beside_open_calls_crosses_the_same_ends() -> None:
    calls = Calls(an_account("5"))
    calls.at(60, progress(60, call_id="long"))
    calls.feed(minutes(2), NOW + MINUTE)
    assert scopes(calls) == []
    calls.feed(minutes(1), NOW + MINUTE)
    assert Kind.INTERNATIONAL in scopes(calls)
    assert Kind.TOLL_FREE_IN not in scopes(calls)
    calls.feed(a_command(an_adjustment("1")), NOW + MINUTE)
    assert scopes(calls) == []


def test_money_that_came_for_a_call_in_progress_is_there_when_it_ends() -> None:
    calls = Calls(an_account("100", trigger="100", amount="200"))
    [request] = calls.at(0, a_start()).requests
    calls.feed(a_result(request.recharge_id, amount="200"))
    assert (calls.exposure, calls.stage) == ("1", "cooling")
    calls.at(120, an_end(120))
    assert (calls.exposure, calls.balance_nanos) == ("0", usd("298"))


# -- rows ------------------------------------------------------------------------------------------


def test_a_holds_row_is_read_back_as_written_and_is_due_when_it_dies() -> None:
    calls = Calls(an_account("20"))
    calls.at(0, a_start())
    [hold] = calls.holds.values()
    value = encode_hold(hold)
    assert decode_hold(value) == hold
    due_us = int.from_bytes(value[:8], "big")
    assert due_us == int(hold.until.timestamp()) * 1_000_000
    newer = msgspec.structs.replace(hold, version=VERSION + 1)
    with pytest.raises(NewerRowError):
        decode_hold(encode_hold(newer))


def test_a_cause_does_not_decide_what_a_leg_holds() -> None:
    calls = Calls(an_account("20"))
    calls.at(0, a_start(cause=a_cause(name="one")))
    calls.at(0, a_start(cause=a_cause(name="two")))
    assert calls.exposure == "1"
