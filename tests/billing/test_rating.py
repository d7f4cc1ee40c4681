"""What usage costs: increments, fees, rounding, longest prefixes, decks."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.nanos import NANOS, nanos_from, text_from
from streams.billing.prefixes import Prefixes
from streams.billing.rates import Rate, Rounding
from streams.billing.rating import TO_NANOS, billed_seconds, exact_cost, price, rounded
from streams.billing.tariff import DeckError, parse_deck, scaled
from streams.decks import load_deck

HEADER = "Destination Name,Destination Type,Country,Prefix,Price / min"


def a_rate(
    per_minute: str, first: int = 60, step: int = 60, fee: str = "0", **more: object
) -> Rate:
    return Rate(
        prefix="4420",
        per_minute=scaled(per_minute),
        connect_fee=scaled(fee),
        initial_increment_s=first,
        increment_s=step,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("duration_s", "first", "step", "per_minute", "fee", "billed_s", "cost"),
    [
        (219, 60, 60, "0.015", "0", 240, "0.06"),
        (219, 6, 6, "0.015", "0", 222, "0.0555"),
        (219, 1, 1, "0.015", "0", 219, "0.05475"),
        (219, 30, 6, "0.015", "0", 222, "0.0555"),
        (32, 30, 6, "0.006", "0", 36, "0.0036"),
        (57, 30, 6, "0.006", "0", 60, "0.006"),
        (75, 30, 6, "0.006", "0", 78, "0.0078"),
        (61, 60, 60, "0.32", "0", 120, "0.64"),
        (600, 60, 60, "0.223", "0.05", 600, "2.28"),
        (3600, 60, 60, "0.022", "0", 3600, "1.32"),
        (3601, 60, 60, "0.022", "0", 3660, "1.342"),
        (3599, 60, 60, "0.708", "0", 3600, "42.48"),
        (0, 60, 60, "0.5", "0.05", 0, "0"),
    ],
)
def test_a_leg_costs_what_the_published_figures_say(
    duration_s: int, first: int, step: int, per_minute: str, fee: str, billed_s: int, cost: str
) -> None:
    charge = price(a_rate(per_minute, first, step, fee), duration_s)
    assert (charge.billed_s, text_from(charge.amount_nanos)) == (billed_s, cost)


@given(st.integers(0, 100_000), st.integers(1, 600), st.integers(1, 600))
def test_billed_seconds_are_whole_increments_and_never_fewer_than_used(
    duration_s: int, first: int, step: int
) -> None:
    billed_s = billed_seconds(a_rate("1", first, step), duration_s)
    assert billed_s >= duration_s
    assert billed_s == 0 or (billed_s - first) % step == 0
    assert billed_s - duration_s < max(first, step) or billed_s == first


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 100_000))
def test_the_short_way_for_usual_rows_is_the_exact_way(
    per_minute: int, fee: int, duration_s: int
) -> None:
    rate = Rate(prefix="1", per_minute=per_minute, connect_fee=fee)
    billed_s = billed_seconds(rate, duration_s)
    assert price(rate, duration_s).amount_nanos == rounded(*exact_cost(rate, billed_s), TO_NANOS)


@pytest.mark.parametrize(
    ("mode", "decimals", "expected"),
    [("up", 2, "0.06"), ("down", 2, "0.05"), ("half_up", 3, "0.055"), ("half_up", 2, "0.05")],
)
def test_a_cost_is_rounded_once_by_the_rule_of_its_row(
    mode: str, decimals: int, expected: str
) -> None:
    rate = a_rate("0.015", 1, 1, rounding=Rounding(mode, decimals))
    assert text_from(price(rate, 219).amount_nanos) == expected


def test_the_longest_prefix_wins_also_when_it_is_cheaper() -> None:
    prefixes = Prefixes({"1242": "dear", "1242422": "cheap", "91": "a", "919": "b", "7": "one"})
    assert prefixes.find("12424225555") == "cheap"
    assert prefixes.find("12421110000") == "dear"
    assert prefixes.find("9198") == "b"
    assert prefixes.find("79161234567") == "one"
    assert prefixes.find("1") is None
    assert prefixes.find("") is None


@given(
    st.dictionaries(st.text("0123", min_size=1, max_size=6), st.integers(), max_size=30),
    st.text("0123", max_size=8),
)
def test_look_ups_agree_with_trying_every_length(rows: dict[str, int], digits: str) -> None:
    slow = next((rows[digits[:n]] for n in range(len(digits), 0, -1) if digits[:n] in rows), None)
    assert Prefixes(rows).find(digits) == slow


def test_the_packaged_deck_can_be_used_and_names_its_bytes() -> None:
    tariff = load_deck(None)
    assert tariff.version.startswith("file-")
    assert tariff.find("442079460018") is not None
    assert tariff.find("999") is None


def test_a_deck_may_bill_by_the_following_increment_from_the_start() -> None:
    header = f"{HEADER},Initial increment,Increment"
    rate = parse_deck(f"{header}\nA,m,GB,44,0.06,0,6\n", deck="d", version="v").find("44")
    assert rate is not None
    assert [billed_seconds(rate, duration_s) for duration_s in (0, 1, 6, 219)] == [0, 6, 6, 222]


def test_a_deck_whose_following_increment_is_zero_is_refused() -> None:
    header = f"{HEADER},Initial increment,Increment"
    with pytest.raises(DeckError, match=r"^line 2: '0' is no increment"):
        parse_deck(f"{header}\nA,m,GB,44,0.06,60,0\n", deck="d", version="v")


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ("A,mobile,GB,44,x", "line 2: 'x' is no price"),
        ("A,mobile,GB,44,-1", "line 2: '-1' is no price"),
        ("A,mobile,GB,4a,1", "line 2: '4a' is no prefix"),
        ("A,mobile,GB,44,1\nB,mobile,GB,44,2", "line 3: prefix 44 stands there twice"),
        ("A,,GB,44,1", "line 2: the destination type is missing"),
        ("A,mobile,GB,44,0.0000000001", "line 2: '0.0000000001' has more than 9 decimals"),
    ],
)
def test_a_deck_with_a_fault_is_refused_with_its_line(rows: str, fault: str) -> None:
    with pytest.raises(DeckError, match="^" + fault.replace("(", r"\(")):
        parse_deck(f"{HEADER}\n{rows}\n", deck="d", version="v")


def test_a_price_ten_times_that_of_its_parent_is_a_warning() -> None:
    for around in ("0.01", "0"):
        text = f"{HEADER}\nA,mobile,GB,44,{around}\nB,mobile,GB,447,0.11\n"
        assert parse_deck(text, deck="d", version="v").warnings == (
            "line 3: prefix 447: more than ten times the price of its parent 44",
        )


def test_types_and_countries_are_read_in_any_case_and_a_type_of_its_own_is_a_warning() -> None:
    text = f"{HEADER}\nA,Premium,gb,44,1\nB,odd,GB,447,1\nC,odd,GB,448,1\n"
    tariff = parse_deck(text, deck="d", version="v")
    rate = tariff.find("449")
    assert rate is not None
    assert (rate.type, rate.country) == ("premium", "GB")
    assert tariff.warnings == (
        "line 3: the type 'odd' is none of landline, mobile, premium, toll_free, mixed",
    )


ZEROS = st.sampled_from((0, 5, 10, 50, 100, 120)) | st.integers(0, 999)


@given(st.integers(0, 10**10 - 1), st.tuples(ZEROS, ZEROS, ZEROS), st.sampled_from((1, -1)))
def test_money_text_is_the_shortest_and_read_back_as_written(
    units: int, decimals: tuple[int, int, int], sign: int
) -> None:
    thousandths, millionths, billionths = decimals
    nanos = sign * (((units * 1000 + thousandths) * 1000 + millionths) * 1000 + billionths)
    text = text_from(nanos)
    assert nanos_from(text) == nanos
    assert text == f"{Decimal(nanos).scaleb(-9).normalize():f}"


@pytest.mark.parametrize(
    "text",
    ["", "1.", ".5", "+1", "1e3", "01", "1,0", "NaN", "1.0000000000", "12345678901", "1\n", "１"],
)
def test_what_is_no_plain_decimal_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match="an amount is decimal text"):
        nanos_from(text)


def test_one_unit_is_a_billion_nanos() -> None:
    assert nanos_from("1") == NANOS
