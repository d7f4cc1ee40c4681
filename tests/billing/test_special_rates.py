"""Rows with steps, windows and a maximum; what a deck's text says of them, and what it warns of."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.nanos import text_from
from streams.billing.rates import Rate, Special, Tariff, by_prefix
from streams.billing.rating import price, price_special, take_minutes
from streams.billing.tariff import DeckError, parse_deck, scaled
from streams.billing.windows import Window, in_force, next_change, window_from
from tests.billing.builders import NOW, a_call, an_account, apply, decoded

HEADER = (
    "Destination Name,Destination Type,Country,Prefix,Price / min,Connect fee,Initial increment,"
    "Increment,Rounding,Risk class,Steps,Windows,Weight,Split,Max cost"
)
# London by day and by night, in its own time; a call of ours is on a Monday.
LONDON = [
    "Day,landline,GB,4420,0.10,0,1,1,,,,1-5 08:00-18:00 Europe/London,5,yes,",
    "Night,landline,GB,4420,0.04,0,1,1,,,,,,yes,",
]


def a_deck(*rows: str) -> Tariff:
    return parse_deck("\n".join([HEADER, *rows]) + "\n", deck="d", version="v")


def cost(tariff: Tariff, at: datetime, duration_s: int, digits: str = "442079460018") -> str | None:
    charge = price_special(tariff, digits, at, duration_s)
    return None if charge is None else text_from(charge.amount_nanos)


def test_windows_count_the_time_of_their_own_zone() -> None:
    deck = a_deck(*LONDON)
    winter, summer = datetime(2026, 3, 2, 8, tzinfo=UTC), datetime(2026, 7, 6, 7, tzinfo=UTC)
    for opens in (winter, summer):
        assert cost(deck, opens, 60) == "0.1"
        assert cost(deck, opens - timedelta(seconds=30), 60) == "0.07"


def test_a_call_over_the_night_in_which_clocks_change_is_split_at_the_right_second() -> None:
    night = "N,landline,GB,44,0.60,0,1,1,,,,00:00-03:00 Europe/London,5,yes,"
    deck = a_deck(night, "D,landline,GB,44,0.06,0,1,1,,,,,,yes,")
    spring = datetime(2026, 3, 28, 23, 30, tzinfo=UTC)  # at 01:00 it is 02:00
    assert cost(deck, spring, 4 * 3600) == text_from(scaled("0.60") * 120 + scaled("0.06") * 120)
    autumn = datetime(2026, 10, 24, 22, 30, tzinfo=UTC)  # 23:30 there; at 02:00 it is 01:00
    assert cost(deck, autumn, 5 * 3600) == text_from(scaled("0.60") * 240 + scaled("0.06") * 60)


EDGES = ["00:00", "06:00", "08:30", "18:00", "22:00", "24:00"]
ZONES = ["UTC", "Europe/London", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"]
windows = st.tuples(
    st.lists(st.integers(1, 7), max_size=3, unique=True).map(tuple),
    st.sampled_from([(a, b) for a in EDGES[:-1] for b in EDGES if a != b]),
    st.sampled_from(ZONES),
).map(lambda said: window_from(said[0], said[1][0], said[1][1], "", said[2]))
SPRING = datetime(2026, 3, 1, tzinfo=UTC)
instants = st.integers(0, 249 * 86_400).map(lambda second: SPRING + timedelta(seconds=second))


@given(st.lists(windows, min_size=1, max_size=3).map(tuple), instants, st.integers(1, 90_000))
def test_nothing_begins_or_ends_before_the_next_change(
    among: tuple[Window, ...], at: datetime, offset: int
) -> None:
    following = next_change(among, at)
    assert following is not None
    assert at < following <= at + timedelta(days=1)
    between = at + timedelta(seconds=offset % max(1, (following - at) // timedelta(seconds=1)))
    for window in among:
        assert in_force((window,), between) == in_force((window,), at)


@given(st.lists(windows, max_size=3), instants, st.integers(1, 4_000), st.sampled_from([1, 6, 60]))
def test_a_split_call_costs_what_its_seconds_cost_one_by_one(
    among: list[Window], at: datetime, duration_s: int, increment_s: int
) -> None:
    rates = [
        Rate(
            prefix="44",
            per_minute=(number + 1) * 60,
            initial_increment_s=increment_s,
            increment_s=increment_s,
            special=Special(windows=(window,), weight=number, split=True),
        )
        for number, window in enumerate(among)
    ]
    rates.append(
        Rate(
            prefix="44",
            per_minute=600,
            initial_increment_s=increment_s,
            increment_s=increment_s,
            special=Special(split=True, weight=-1),
        )
    )
    tariff = Tariff("d", "v", by_prefix(rates))
    billed = -(-duration_s // increment_s) * increment_s
    slow = 0
    for second in range(billed):
        rate = tariff.find_at("44", at + timedelta(seconds=second))
        assert rate is not None
        slow += rate.per_minute
    charge = price_special(tariff, "44", at, duration_s)
    assert charge is not None
    assert (charge.billed_s, charge.amount_nanos) == (billed, slow // 60)


@given(st.integers(0, 10**12), st.integers(0, 10**10), st.integers(0, 100_000))
def test_a_row_with_nothing_special_costs_the_same_either_way(
    per_minute: int, fee: int, duration_s: int
) -> None:
    rate = Rate(prefix="44", per_minute=per_minute, connect_fee=fee)
    special = Rate(prefix="44", per_minute=per_minute, connect_fee=fee, special=Special())
    charge = price_special(Tariff("d", "v", {"44": special}), "44", NOW, duration_s)
    assert charge is not None
    assert charge.amount_nanos == price(rate, duration_s).amount_nanos


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 90))
def test_a_pool_gives_whole_blocks_and_never_more_than_it_has(
    rest_s: int, left_s: int, block_s: int
) -> None:
    taken = take_minutes(rest_s, left_s, block_s)
    assert taken % block_s == 0
    assert taken <= left_s
    assert taken - rest_s < block_s
    assert left_s - taken < block_s or taken >= rest_s


@pytest.mark.parametrize("year", [1, 9999])
def test_windows_at_the_calendars_ends_break_nothing(year: int) -> None:
    at = datetime(year, 12 if year == 9999 else 1, 31 if year == 9999 else 1, 23, tzinfo=UTC)
    assert cost(a_deck(*LONDON), at, 7_200) is not None


def test_a_call_of_many_years_is_priced_at_once() -> None:
    deck = a_deck(*LONDON)
    assert cost(deck, datetime(1, 1, 1, tzinfo=UTC), 2_000 * 365 * 86_400) is not None


def test_steps_and_a_maximum_stand_in_the_deck() -> None:
    deck = a_deck("A,m,GB,44,0.10,0.01,60,60,,,0:0.10/60; 300:0.05/30,,,,1.00")
    day = datetime(2026, 3, 2, 10, tzinfo=UTC)
    assert [cost(deck, day, s) for s in (0, 61, 300, 301, 331, 36_000)] == [
        "0", "0.21", "0.51", "0.535", "0.56", "1",
    ]  # fmt: skip


def test_a_disconnecting_maximum_does_not_change_a_finished_call() -> None:
    deck = a_deck("A,m,GB,44,0.10,0,60,60,,,,,,,0.05/disconnect")
    assert cost(deck, NOW, 60) == "0.1"


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        (",,,5:0.1/60,,,,", "steps begin at second 0 and follow one another"),
        (",,,0:0.1/60;0:0.2/60,,,,", "steps begin at second 0 and follow one another"),
        (",,,0:0.1,,,,", "'0:0.1' is no step; write it like 300:0.05/60"),
        (",,,0:-1/60,,,,", "'-1' is no price; write it like 0.015"),
        (",,,0:1/0,,,,", "'0' is no increment; write whole seconds such as 60"),
        (",,,,08:00,,,", "'08:00' are no times; write them like 08:00-18:00"),
        (",,,,08:00:30-18:00,,,", "'08:00:30-18:00' are no times; write them like 08:00-18:00"),
        (",,,,08:00-25:00,,,", "'25:00' is no time of day; the last one is 24:00"),
        (",,,,8:00-8:00,,,", "a window from 8:00 to 8:00 is never open"),
        (",,,,0 08:00-18:00,,,", "a weekday is a number from 1 (Monday) to 7"),
        (",,,,@2-30,,,", "day is out of range for month"),
        (",,,,Mars/Olympus,,,", "'Mars/Olympus' is no time zone; write one like Europe/London"),
        (",,,,,x,,", "'x' is no weight; write a whole number"),
        (",,,,,,maybe,", "'maybe': Split is yes or no"),
        (",,,,,,,1/stop", "'stop': after a maximum stands free or disconnect"),
    ],
)
def test_a_special_row_with_a_fault_is_refused_with_its_line(columns: str, fault: str) -> None:
    with pytest.raises(DeckError) as caught:
        a_deck("Z,m,GB,33,1", f"A,m,GB,44,0.10,0,60,60{columns}")
    assert caught.value.faults == [f"line 3: {fault}"]


def test_rows_of_one_prefix_need_windows_that_tell_them_apart() -> None:
    with pytest.raises(DeckError) as caught:
        a_deck(*LONDON, LONDON[0], LONDON[1])
    assert caught.value.faults == [
        "line 4: prefix 4420 stands there twice",
        "line 5: prefix 4420 stands there twice",
    ]


def test_every_fault_and_every_suspicion_names_its_line() -> None:
    with pytest.raises(DeckError) as caught:
        a_deck("A,m,GB,44,-1", "B,m,GB,4x,1", "C,m")
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "line 2", "line 3", "line 4",
    ]  # fmt: skip
    deck = a_deck(
        "A,mixed,GB,44,0.10", "B,mobile,GB,447,1.01", "C,mixed,GB,4420,0.009",
        "D,mixed,GB,4421,1.00", "E,mobile,FR,336,0.1", "F,mobile,FR,337,0.1",
        "G,mixed,BS,1242,0.2", "H,mixed,JM,187655,0.2",
    )  # fmt: skip
    assert deck.warnings == (
        "line 3: prefix 447: more than ten times the price of its parent 44",
        "line 4: prefix 4420: less than a tenth of the price of its parent 44",
        "line 6: prefix 336 (and 1 more like it): there is no row for 33, so other numbers there "
        "are unrated",
        "line 9: prefix 187655: there is no row for 1876, so other numbers there are unrated",
    )


def test_a_column_that_means_nothing_is_told() -> None:
    text = (
        "Destination Name,Destination Type,Country,Prefix,Price / min,Incremnt\nA,mixed,GB,44,1,6\n"
    )
    deck = parse_deck(text, deck="d", version="v")
    assert deck.warnings == ("line 1: the column 'Incremnt' means nothing here and is ignored",)


def test_a_charge_by_a_special_row_tells_when_the_call_began() -> None:
    deck = a_deck(*LONDON)
    outcome = apply(an_account("10"), a_call(), tariff=deck)
    [entry] = outcome.entries
    rate = decoded(entry)["rate"]
    assert (rate["started_at"], rate["per_minute"]) == ("2026-03-02T09:59:00Z", "0.10")
    assert decoded(entry)["amount"] == "-0.1"
    usual = apply(an_account("10"), a_call())
    assert "started_at" not in decoded(usual.entries[0])["rate"]


def test_an_unrated_call_tells_what_it_may_cost() -> None:
    near = a_call(callee="+441110000000", duration_s=61)
    for deck, exposure in (
        (a_deck("A,m,GB,4420,0.10", "B,m,GB,447,0.20", "C,m,FR,33,9"), "0.4"),
        (a_deck("C,m,FR,33,9"), "18"),
    ):
        refused = apply(an_account("10"), near, tariff=deck).refused
        assert refused is not None
        assert refused.exposure_nanos is not None
        assert (refused.reason, text_from(refused.exposure_nanos)) == ("unrated", exposure)


def test_a_row_out_of_its_windows_leaves_a_call_unrated() -> None:
    outcome = apply(an_account("10"), a_call(), tariff=a_deck(LONDON[0].replace("1-5", "6-7")))
    assert outcome.refused is not None
    assert outcome.refused.reason == "unrated"
