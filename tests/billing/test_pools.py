"""Included minutes: what pools pay, what is left for credits, and when a month is over."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from schemas.commands import Licences
from schemas.ledger import EntryKind, LedgerEntry, PoolUsed
from schemas.usage import Kind, Phase
from streams.billing import explain, pools, statement
from streams.billing.booking import Draft
from streams.billing.events import UsageEvent
from streams.billing.ledger import public_balance
from streams.billing.outcomes import Outcome
from streams.billing.rates import Rate, Special, Step, Tariff
from streams.coverage import load_coverage
from tests.billing.builders import (
    LONDON,
    NOW,
    Book,
    a_call,
    a_cause,
    a_command,
    an_account,
    chain_holds,
    decoded,
    opening,
    told,
    usd,
)

COVERAGE = load_coverage(None)
CENT_AND_HALF = 15_000_000
RATES = [
    Rate(
        prefix="4420",
        per_minute=CENT_AND_HALF,
        per_minute_text="0.015",
        country="GB",
        type="landline",
    ),
    Rate(prefix="449", per_minute=CENT_AND_HALF, country="GB", type="premium"),
    Rate(prefix="382", per_minute=CENT_AND_HALF, country="ME", type="mobile"),
    Rate(prefix="33", per_minute=CENT_AND_HALF, country="FR", connect_fee=50_000_000),
    Rate(
        prefix="34",
        per_minute=CENT_AND_HALF,
        country="ES",
        initial_increment_s=30,
        increment_s=6,
        risk_class="dear",
    ),
    Rate(
        prefix="39",
        per_minute=0,
        country="IT",
        special=Special(steps=(Step(0, 0, 60), Step(120, 60_000_000, 60))),
    ),
    Rate(prefix="1800", per_minute=0, country="US", type="toll_free"),
]
TERMS: dict[str, Any] = {
    "coverage": COVERAGE,
    "tariff": Tariff("default", "file-test", {rate.prefix: rate for rate in RATES}),
}
FRANCE, SPAIN, ITALY, MONTENEGRO = "+33140000000", "+34910000000", "+390600000000", "+38267000000"


def licences(capability: str = "MCOMEETADV", count: int = 1, **changes: Any) -> Licences:
    return Licences(tenant_id="t-1", issued_at=NOW, capability=capability, count=count, **changes)


class Office(Book):
    """A tenant whose usage is covered as the packaged table says."""

    def __init__(self, balance: str = "10", *commands: Licences, **account: Any) -> None:
        super().__init__(an_account(balance).changed(**account))
        for command in commands:
            assert self.command(command).label == "applied"

    def command(self, command: Licences, now: datetime = NOW) -> Outcome:
        return self.feed(a_command(command), now, **TERMS)

    def call(self, duration_s: int = 60, now: datetime = NOW, **changes: Any) -> Outcome:
        return self.feed(dial_out(duration_s, **{"started_at": now} | changes), now, **TERMS)

    def used(self, name: str = "conference/MCOMEETADV", month: int = 202603) -> int:
        assert self.account is not None
        found = 0
        for held in self.account.standing.pools:
            for one in held.uses:
                if pools.name_of(one.pool, held) == name and one.month == month:
                    found = one.minutes
        return found


def dial_out(duration_s: int, **changes: Any) -> UsageEvent:
    members = {"kind": Kind.CONF_DIAL_OUT, "duration_s": duration_s, "started_at": NOW} | changes
    return a_call(**members)


def domestic(country: str | None = None, capability: str = "MCOPSTN1") -> dict[str, Any]:
    return {
        "kind": Kind.OVERAGE_DOMESTIC,
        "capability": capability,
        "user_country": country,
    }


def the_entry(outcome: Outcome) -> dict[str, Any]:
    (entry,) = outcome.entries
    return decoded(entry)


def refusal(outcome: Outcome) -> tuple[str | None, str | None]:
    assert outcome.label == "refused"
    return outcome.notices[0].rule, outcome.notices[0].fix


# -- who pays -------------------------------------------------------------------------------------


def test_a_covered_call_takes_minutes_and_no_money() -> None:
    office = Office("10", licences())
    outcome = office.call(219)
    entry = the_entry(outcome)
    assert outcome.label == "included"
    assert (entry["kind"], entry["amount"], entry["balance_after"]) == ("pool", "0", "10")
    assert entry["pools"] == [
        {"pool": "conference/MCOMEETADV", "month": "2026-03", "minutes": 4, "used": 4,
         "included": 60},
    ]  # fmt: skip
    assert (entry["rate"]["billed_s"], entry["rate"]["duration_s"]) == (0, 219)
    assert "grants" not in entry


def test_entries_of_pools_stand_in_the_chain_like_any_other() -> None:
    book = Book(None)
    book.feed(a_command(opening(opening_balance="10")))
    book.feed(a_command(licences()), **TERMS)
    for seconds in (58 * 60, 219, 60):
        book.feed(dial_out(seconds), **TERMS)
    assert [decoded(one)["kind"] for one in book.entries] == ["grant", "pool", "charge", "charge"]
    assert chain_holds(book.entries)


def test_a_straddling_call_pays_whole_minutes_from_the_pool_and_the_rest_from_credits() -> None:
    office = Office("10", licences())
    office.call(58 * 60)
    outcome = office.call(219)
    entry = the_entry(outcome)
    assert outcome.label == "charged"
    assert (entry["kind"], entry["amount"], entry["balance_after"]) == ("charge", "-0.03", "9.97")
    assert [one["minutes"] for one in entry["pools"]] == [2]
    assert (entry["rate"]["billed_s"], entry["rate"]["duration_s"]) == (120, 219)
    assert office.used() == 60


def test_after_the_pool_has_ended_credits_pay_all_of_it() -> None:
    office = Office("10", licences())
    office.call(60 * 60)
    entry = the_entry(office.call(219))
    assert (entry["kind"], entry["amount"]) == ("charge", "-0.06")
    assert "pools" not in entry


def test_licences_fill_one_pool_of_the_whole_tenant() -> None:
    office = Office("10", licences(count=115))
    assert the_entry(office.call(60))["pools"][0]["included"] == 6_900


@pytest.mark.parametrize(
    ("callee", "pays"),
    [
        ("+442079460018", "pool"),
        ("+449011234567", "charge"),  # premium
        (MONTENEGRO, "charge"),  # not in Zone A
    ],
)
def test_conference_minutes_are_for_zone_a_and_no_premium_number(callee: str, pays: str) -> None:
    entry = the_entry(Office("10", licences()).call(60, callee=callee))
    assert entry["kind"] == pays


@pytest.mark.parametrize("kind", [Kind.PAYG_OUT, Kind.CONF_PPM, Kind.TOLL_FREE_IN])
def test_kinds_without_a_pool_are_charged_from_the_first_minute(kind: Kind) -> None:
    office = Office("10", licences(), licences("MCOPSTN1", country="US"))
    assert the_entry(office.call(60, kind=kind, capability="MCOPSTN1"))["kind"] == "charge"


def test_international_minutes_need_a_capability_that_has_them() -> None:
    office = Office("10", licences("MCOPSTN2", country="FR"), licences("MCOPSTN1", country="FR"))
    for capability, pays in (("MCOPSTN2", "pool"), ("MCOPSTN1", "charge"), (None, "charge")):
        call: dict[str, Any] = {
            "kind": Kind.INTERNATIONAL,
            "capability": capability,
            "user_country": "FR",
        }
        assert the_entry(office.call(60, **call))["kind"] == pays


@pytest.mark.parametrize(
    ("capability", "country", "callee", "kind", "pool"),
    [
        ("MCOPSTN1", "GB", LONDON, "overage_domestic", "domestic/MCOPSTN1/GB"),
        ("MCOPSTN1", "FR", LONDON, "international", None),
        ("MCOPSTN2", "FR", LONDON, "international", "international/MCOPSTN2/FR"),
        ("MCOPSTN2", "FR", FRANCE, "overage_domestic", "domestic/MCOPSTN2/FR"),
        ("MCOPSTN1", None, LONDON, "overage_domestic", "domestic/MCOPSTN1/FR"),
    ],
)
def test_whether_a_call_went_abroad_is_derived_from_where_it_went(
    capability: str, country: str | None, callee: str, kind: str, pool: str | None
) -> None:
    office = Office("10", licences(capability, country=country or "FR"))
    call: dict[str, Any] = {
        "kind": None,
        "call_type": "user_out",
        "capability": capability,
        "user_country": country,
        "callee": callee,
    }
    entry = the_entry(office.call(60, **call))
    assert entry["usage_kind"] == kind
    assert [one["pool"] for one in entry.get("pools", ())] == ([] if pool is None else [pool])
    # What the pool can pay is not held.
    office.call(60, phase=Phase.PROGRESS, leg_id="leg", **call)
    assert office.account is not None
    assert bool(office.account.standing.exposure_nanos) is (pool is None)


def test_a_table_that_makes_domestic_calls_free_frees_no_call_abroad() -> None:
    free = replace(COVERAGE, free=COVERAGE.free | {Kind.OVERAGE_DOMESTIC})
    call: dict[str, Any] = {
        "kind": None,
        "call_type": "user_out",
        "capability": "MCOPSTN1",
        "user_country": "GB",
    }
    for callee, label in ((LONDON, "free"), (FRANCE, "charged")):
        for phase in (Phase.PROGRESS, Phase.END):
            book = Book(an_account("10"))
            event = dial_out(60, callee=callee, phase=phase, leg_id="leg", **call)
            outcome = book.feed(event, NOW, **{**TERMS, "coverage": free})
            assert outcome.label == (label if phase is Phase.END else "open")
            assert book.account is not None
            held = phase is Phase.PROGRESS and label == "charged"
            assert bool(book.account.standing.exposure_nanos) is held


def test_dialling_in_is_free_on_an_ordinary_number_only() -> None:
    office = Office("10")
    for number_type, label in ((None, "free"), ("toll", "free"), ("toll_free", "charged")):
        assert office.call(60, kind=Kind.CONF_DIAL_IN, number_type=number_type).label == label


def test_calling_plans_have_a_pool_for_each_country_of_their_users() -> None:
    office = Office("10", licences("MCOPSTN1", country="US"), licences("MCOPSTN1", country="FR"))
    assert the_entry(office.call(60, **domestic("US")))["pools"][0]["included"] == 3_000
    assert the_entry(office.call(60, **domestic("FR")))["pools"][0] == {
        "pool": "domestic/MCOPSTN1/FR", "month": "2026-03", "minutes": 1, "used": 1,
        "included": 1_200,
    }  # fmt: skip
    assert the_entry(office.call(60, **domestic("DE")))["kind"] == "charge"
    assert the_entry(office.call(60, **domestic(None)))["kind"] == "charge"


def test_an_event_without_a_country_means_the_only_one_there_is() -> None:
    office = Office("10", licences("MCOPSTN5", country="US"))
    office.command(licences("MCOPSTN5", country="FR", effective_from=NOW + timedelta(days=1)))
    entry = the_entry(office.call(60, **domestic(None, "MCOPSTN5")))
    assert entry["pools"][0]["pool"] == "domestic/MCOPSTN5/US"
    entry = the_entry(office.call(60, NOW + timedelta(days=1), **domestic(None, "MCOPSTN5")))
    assert entry["kind"] == "charge"


def test_a_coupled_pool_ends_both_when_one_ends() -> None:
    office = Office("10", licences("MCOPSTN2", country="GB"))
    abroad: dict[str, Any] = {
        "kind": Kind.INTERNATIONAL,
        "capability": "MCOPSTN2",
        "user_country": "GB",
    }
    office.call(600 * 60, **abroad)
    assert office.used("international/MCOPSTN2/GB") == 600
    assert the_entry(office.call(60, **domestic("GB", "MCOPSTN2")))["kind"] == "charge"
    # In a country that does not couple them each goes on alone.
    apart = Office("10", licences("MCOPSTN2", country="FR"))
    apart.call(600 * 60, **abroad | {"user_country": "FR"})
    assert the_entry(apart.call(60, **domestic("FR", "MCOPSTN2")))["kind"] == "pool"


def test_what_costs_nothing_takes_no_minutes() -> None:
    office = Office("10", licences())
    assert office.call(60, callee="+18005550100").label == "free"
    assert office.call(0).label == "free"
    assert office.used() == 0


# -- the paid rest --------------------------------------------------------------------------------


def test_a_connect_fee_is_paid_only_when_credits_pay_a_part() -> None:
    office = Office("10", licences())
    assert the_entry(office.call(58 * 60, callee=FRANCE))["amount"] == "0"
    assert the_entry(office.call(219, callee=FRANCE))["amount"] == "-0.08"


def test_the_rest_is_billed_by_its_rows_increments() -> None:
    office = Office("10", licences())
    office.call(58 * 60)
    entry = the_entry(office.call(219, callee=SPAIN))
    # 99 s are left: 30 s, then twelve times 6 s.
    assert (entry["rate"]["billed_s"], entry["amount"]) == (102, "-0.0255")


def test_only_money_counts_for_the_velocity_of_a_risk_class() -> None:
    office = Office("10", licences())
    assert office.account is not None
    office.call(60, callee=SPAIN)
    assert office.account.standing.recharging.risks == ()


def test_the_rest_costs_what_its_place_in_the_call_costs() -> None:
    office = Office("10", licences())
    office.call(57 * 60)
    # Free up to the second minute, 0.06 a minute after it: minutes 4 and 5 are paid.
    entry = the_entry(office.call(300, callee=ITALY))
    assert (entry["amount"], entry["pools"][0]["minutes"]) == ("-0.12", 3)


def test_a_rest_that_costs_nothing_makes_no_charge() -> None:
    office = Office("10", licences())
    office.call(59 * 60)
    entry = the_entry(office.call(121, callee=ITALY))
    assert (entry["kind"], entry["amount"]) == ("charge", "-0.06")
    free_rest = Rate(
        prefix="39",
        per_minute=0,
        country="IT",
        special=Special(steps=(Step(0, 60_000_000, 60), Step(60, 0, 60))),
    )
    other = Office("10", licences())
    other.call(59 * 60)
    terms = TERMS | {"tariff": Tariff("default", "file-test", {"39": free_rest})}
    outcome = other.feed(dial_out(121, callee=ITALY), NOW, **terms)
    assert (the_entry(outcome)["kind"], other.used()) == ("pool", 60)


def test_an_overdrawn_tenant_still_has_its_minutes() -> None:
    office = Office("0", licences(), overdraft_nanos=usd("1"))
    assert the_entry(office.call(60))["balance_after"] == "-1"


# -- months ---------------------------------------------------------------------------------------


def test_a_month_is_that_of_the_calls_start_in_the_tenants_time_zone() -> None:
    office = Office("10", licences(), time_zone="America/New_York")
    start = datetime(2026, 4, 1, 3, 59, 50, tzinfo=UTC)
    entry = the_entry(office.call(60, start + timedelta(minutes=1), started_at=start))
    assert entry["pools"][0]["month"] == "2026-03"
    entry = the_entry(office.call(60, start + timedelta(seconds=10)))
    assert entry["pools"][0]["month"] == "2026-04"


def test_nothing_rolls_over() -> None:
    office = Office("10", licences())
    office.call(10 * 60)
    entry = the_entry(office.call(70 * 60, NOW + timedelta(days=31)))
    assert (entry["pools"][0]["minutes"], entry["pools"][0]["included"]) == (60, 60)


def test_a_late_call_takes_minutes_of_its_own_month() -> None:
    office = Office("10", licences())
    office.call(60 * 60, started_at=NOW - timedelta(days=5))
    assert (office.used(month=202602), office.used()) == (0, 0)  # no licence then
    office = Office("10", licences(effective_from=NOW - timedelta(days=20)))
    office.call(60 * 60, started_at=NOW - timedelta(days=5))
    assert the_entry(office.call(60))["kind"] == "pool"
    assert (office.used(month=202602), office.used()) == (60, 1)


def test_a_month_is_kept_for_35_days_after_its_end_and_dropped_at_the_next_touch() -> None:
    office = Office("10", licences())
    office.call(60)
    last = datetime(2026, 5, 6, tzinfo=UTC)  # April begins, and 35 days
    assert pools.closes_at(202603, "UTC") == last
    office.call(60, last)
    assert office.used(month=202603) == 1
    office.call(60, last + timedelta(seconds=1))
    assert office.used(month=202603) == 0
    assert office.used(month=202605) == 2


def test_a_month_that_is_over_for_good_gives_no_minutes() -> None:
    office = Office("10", licences())
    after = datetime(2026, 5, 6, 0, 0, 1, tzinfo=UTC)
    # A call of six days that began in March.
    start = datetime(2026, 3, 31, 23, 0, tzinfo=UTC)
    late = the_entry(office.call(6 * 86_400, after, started_at=start))
    assert (late["kind"], "pools" in late) == ("charge", False)
    in_time = Office("10", licences())
    entry = the_entry(in_time.call(6 * 86_400, after - timedelta(seconds=1), started_at=start))
    assert entry["pools"][0]["minutes"] == 60


@pytest.mark.parametrize(
    ("month", "zone", "closes"),
    [
        (202612, "UTC", "2027-02-05T00:00:00Z"),
        (202603, "Asia/Kolkata", "2026-05-05T18:30:00Z"),
        (999912, "UTC", "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_a_month_closes_35_days_after_its_end_in_the_time_zone(
    month: int, zone: str, closes: str
) -> None:
    assert pools.closes_at(month, zone) == datetime.fromisoformat(closes)


# -- licences -------------------------------------------------------------------------------------


def test_licences_change_at_an_instant_and_the_calls_start_counts() -> None:
    office = Office("10", licences())
    later = NOW + timedelta(hours=2)
    office.command(licences(count=3, effective_from=later))
    assert the_entry(office.call(60))["pools"][0]["included"] == 60
    assert the_entry(office.call(60, later))["pools"][0]["included"] == 180
    # It came late, but started before the change.
    entry = the_entry(office.call(60, later, started_at=later - timedelta(seconds=61)))
    assert entry["pools"][0]["included"] == 60


def test_licences_taken_away_leave_what_was_used_and_give_nothing_more() -> None:
    office = Office("10", licences(count=2))
    office.call(90 * 60)
    office.command(licences(count=1, effective_from=NOW))
    assert the_entry(office.call(60))["kind"] == "charge"
    assert office.used() == 90
    office.command(licences(count=0, effective_from=NOW))
    assert the_entry(office.call(60))["kind"] == "charge"


def test_a_plan_without_licences_is_forgotten_when_no_call_can_ask_for_it() -> None:
    office = Office("10", licences())
    office.command(licences(count=0), NOW + timedelta(days=1))
    assert office.account is not None
    assert len(office.account.standing.pools) == 1
    office.command(licences("MCOPSTN5", country="US"), NOW + timedelta(days=80))
    assert [held.plan for held in office.account.standing.pools] == ["MCOPSTN5"]


@pytest.mark.parametrize(
    ("command", "rule", "fix"),
    [
        (licences("MCOPSTN9"), "unknown_plan", "known are MCOMEETADV, MCOPSTN1"),
        (licences(country="US"), "country", "give no country"),
        (licences("MCOPSTN1"), "country", "say where its users are"),
        (licences("MCOPSTN1", country="BR"), "country", "includes no minutes in BR; it does in AT"),
        (
            licences(effective_from=NOW - timedelta(days=36)),
            "effective_from",
            "last 35 days",
        ),
    ],
)
def test_licences_that_make_no_sense_are_refused(command: Licences, rule: str, fix: str) -> None:
    found, said = refusal(Office().command(command))
    assert found == rule
    assert said is not None
    assert fix in said


def test_licences_change_so_often_and_of_so_many_plans_at_most() -> None:
    office = Office()
    for hour in range(12):
        command = licences(count=hour, effective_from=NOW + timedelta(hours=hour))
        assert office.command(command).label == "applied"
    again = licences(effective_from=NOW + timedelta(hours=12))
    assert refusal(office.command(again))[0] == "too_many_changes"
    countries = sorted(COVERAGE.plans["MCOPSTN1"].minutes["domestic"])
    answers = [office.command(licences("MCOPSTN1", country=country)).label for country in countries]
    assert answers.count("applied") == 23
    assert refusal(office.command(licences("MCOPSTN2", country="GB")))[0] == "too_many_plans"


def test_a_tenants_time_zone_must_exist() -> None:
    outcome = Book(None).feed(a_command(opening(time_zone="Europe/Londn")))
    rule, fix = refusal(outcome)
    assert (rule, outcome.account) == ("time_zone", None)
    assert fix is not None
    assert "'Europe/Londn' is no time zone" in fix


# -- telling --------------------------------------------------------------------------------------


def test_80_and_100_percent_are_told_once_for_a_pool_and_month() -> None:
    office = Office("10", licences())
    assert "pool_used" not in told(office.call(47 * 60))
    outcome = office.call(60)
    (notice,) = [one for one in outcome.notices if one.notice == "pool_used"]
    assert (notice.pool, notice.month, notice.percent) == ("conference/MCOMEETADV", "2026-03", 80)
    assert "pool_used" not in told(office.call(11 * 60))
    (notice,) = [one for one in office.call(219).notices if one.notice == "pool_used"]
    assert notice.percent == 100
    office.command(licences(count=2, effective_from=NOW))
    assert "pool_used" not in told(office.call(60 * 60))
    percents = [
        one.percent
        for one in office.call(60 * 60 * 2, NOW + timedelta(days=31)).notices
        if one.notice == "pool_used"
    ]
    assert percents == [80, 100]


def test_everybody_can_read_what_is_left() -> None:
    office = Office("10", licences(), licences("MCOPSTN2", country="GB"))
    office.call(4 * 60)
    office.call(
        600 * 60, kind=Kind.INTERNATIONAL, capability="MCOPSTN2", user_country="GB"
    )  # ends its domestic minutes too
    assert office.account is not None
    public = public_balance(office.account, NOW, COVERAGE)
    assert [(one.pool, one.included, one.used, one.left) for one in public.pools] == [
        ("conference/MCOMEETADV", 60, 4, 56),
        ("domestic/MCOPSTN2/GB", 1_200, 0, 0),
        ("international/MCOPSTN2/GB", 600, 600, 0),
    ]
    following = public_balance(office.account, NOW + timedelta(days=31), COVERAGE)
    assert {(one.month, one.used) for one in following.pools} == {("2026-04", 0)}


def test_entries_with_pools_are_what_the_wire_promises() -> None:
    office = Office("10", licences())
    office.call(58 * 60)
    office.call(219)
    for value in office.entries:
        assert msgspec.json.encode(msgspec.json.decode(value, type=LedgerEntry)) == value


def test_an_explanation_and_a_statement_name_the_minutes() -> None:
    office = Office("10", licences())
    office.call(58 * 60)
    covered, straddling = (explain.entry(decoded(office.call(s).entries[0])) for s in (60, 219))
    assert covered.why == "1 included minute paid all of it"
    assert covered.considered[0] == (
        "pool conference/MCOMEETADV gave 1 minute of 2026-03; used after it: 59 of 60"
    )
    assert straddling.why == (
        "included: 1 minute; the other 180 s at 0.015 a minute and a fee of 0 come to 0.045 USD"
    )
    assert "increments 60/60: 159 s are billed as 180 s" in straddling.considered
    text = statement.compose("t-1", "USD", office.entries)
    assert "1 min conference/MCOMEETADV" in text
    entry = decoded(office.entries[0])
    entry["pools"][0]["minutes"] = -entry["pools"][0]["minutes"]
    assert "got back 58 minutes of 2026-03" in explain.entry(entry).considered[0]


@pytest.mark.parametrize("pools_said", [5, {"a": 1}, [5], [{"minutes": 1}]])
def test_a_statement_with_odd_pools_is_checked_like_any_other(pools_said: object) -> None:
    office = Office("10", licences())
    office.call(60)
    odd = msgspec.json.encode(decoded(office.entries[0]) | {"pools": pools_said})
    checked = statement.check(statement.compose("t-1", "USD", [odd]))
    assert any("hash" in fault for fault in checked.faults)


# -- giving back ----------------------------------------------------------------------------------


def given_back(office: Office, taken: tuple[PoolUsed, ...], now: datetime) -> tuple[PoolUsed, ...]:
    assert office.account is not None
    draft = Draft(office.account, a_cause(), now)
    back = pools.give_back(draft, taken)
    office.account = draft.account
    return back


def test_minutes_return_to_their_own_month() -> None:
    office = Office("10", licences())
    entry = msgspec.json.decode(office.call(60 * 60).entries[0], type=LedgerEntry)
    april = NOW + timedelta(days=31)
    office.call(60, april)
    back = given_back(office, entry.pools, april)
    assert back == (PoolUsed("conference/MCOMEETADV", "2026-03", -60, 0),)
    assert (office.used(), office.used(month=202604)) == (0, 1)
    assert the_entry(office.call(60, april, started_at=NOW))["kind"] == "pool"


def test_a_month_that_is_over_for_good_gets_nothing_back() -> None:
    office = Office("10", licences())
    entry = msgspec.json.decode(office.call(60).entries[0], type=LedgerEntry)
    assert given_back(office, entry.pools, datetime(2026, 5, 7, tzinfo=UTC)) == ()
    assert office.used() == 1


def test_kinds_of_entries_that_pools_make() -> None:
    office = Office("10", licences())
    kinds = [office.call(seconds).moved for seconds in (58 * 60, 219, 60)]
    assert kinds == [
        ((EntryKind.POOL, 0),),
        ((EntryKind.CHARGE, -30_000_000),),
        ((EntryKind.CHARGE, -15_000_000),),
    ]
