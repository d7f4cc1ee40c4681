"""Rating: what a piece of usage costs. Knows tariffs; knows nothing of balances."""

from datetime import datetime, timedelta
from typing import Final

from schemas.nanos import NANOS
from streams.billing.money import ceil_div
from streams.billing.outcomes import Charge, Exact
from streams.billing.rates import Rate, Rounding, Tariff
from streams.billing.windows import next_change

_MINUTE_S: Final = 60
_MICROSECOND: Final = timedelta(microseconds=1)
# A call is split by windows so often at most, some years of it; the rest costs as its last part.
MOST_PARTS: Final = 10_000
# A charge without a rule of its own is rounded once to what the ledger can hold.
TO_NANOS: Final = Rounding("half_up", 9)


def billed_seconds(rate: Rate, duration_s: int) -> int:
    """Whole started increments: the first one, then the following ones. Nothing for nothing."""
    if duration_s <= 0:
        return 0
    first = rate.initial_increment_s
    if duration_s <= first:
        return first
    return first + ceil_div(duration_s - first, rate.increment_s) * rate.increment_s


def exact_cost(rate: Rate, billed_s: int) -> tuple[int, int]:
    """Connect fee + billed seconds × price / 60 as an exact fraction of the currency unit."""
    if billed_s == 0:
        return 0, 1
    return rate.connect_fee * _MINUTE_S + billed_s * rate.per_minute, _MINUTE_S * 10**rate.scale


def rounded(numerator: int, denominator: int, rule: Rounding) -> int:
    """A fraction ≥ 0 as an integer of 10^-decimals, rounded by the rule."""
    scaled: int = numerator * 10**rule.decimals
    match rule.mode:
        case "up":
            return ceil_div(scaled, denominator)
        case "down":
            return scaled // denominator
        case _:
            return (2 * scaled + denominator) // (2 * denominator)


def price(rate: Rate, duration_s: int) -> Charge:
    """The charge for a leg by a row that is not special: exact arithmetic, rounded once."""
    billed_s = billed_seconds(rate, duration_s)
    if rate.rounding is None and rate.scale == 9:
        # The usual row: numerator is nanos × 60, so half up is one shift and one division.
        nanos = 0
        if billed_s:
            nanos = (rate.connect_fee * 60 + billed_s * rate.per_minute + 30) // 60
        return Charge(nanos, rate, billed_s)
    rule = rate.rounding or TO_NANOS
    numerator, denominator = exact_cost(rate, billed_s)
    amount = rounded(numerator, denominator, rule)
    return Charge(amount * NANOS // 10**rule.decimals, rate, billed_s)


def take_minutes(rest_s: int, left_s: int, block_s: int) -> int:
    """What a pool gives to a call: whole blocks, the last part of a call takes a whole one, and
    a part block that is left in the pool stays there."""
    return min(left_s // block_s, ceil_div(rest_s, block_s)) * block_s


def _spans(rate: Rate, begin: int, end: int) -> list[tuple[int, int, int]]:
    """Billed seconds of [begin, end): from, to, and the second that chooses the step."""
    steps = () if rate.special is None else rate.special.steps
    if not steps:
        return [(begin, begin + billed_seconds(rate, end - begin), begin)]
    spans: list[tuple[int, int, int]] = []
    last = len(steps) - 1
    for at, step in enumerate(steps):
        low = max(step.from_s, begin)
        high = end if at == last else min(end, steps[at + 1].from_s)
        if low < high:
            billed = ceil_div(high - low, step.increment_s) * step.increment_s
            spans.append((low, low + billed, low))
    return spans


def _per_minute(rate: Rate, second: int) -> int:
    """The price of a row in the step that a second of the call falls into."""
    price_of: int = rate.per_minute
    if rate.special is not None:
        for step in rate.special.steps:
            if step.from_s <= second:
                price_of = step.per_minute
    return price_of


def _split(
    tariff: Tariff, digits: str, started_at: datetime, end: int, per_second: int
) -> list[tuple[int, Rate]] | None:
    """Which row prices the call from which second on; None when one of them has no row."""
    windows = tariff.windows_of(digits)
    parts: list[tuple[int, Rate]] = []
    at, second = started_at, 0
    while second < end:
        rate = tariff.find_at(digits, at)
        if rate is None:
            return None
        parts.append((second, rate))
        following = next_change(windows, at)
        if following is None or len(parts) == MOST_PARTS:
            break
        at = following
        # A second belongs to the row in force when it begins.
        second = ceil_div((at - started_at) // _MICROSECOND * per_second, 1_000_000)
    return parts


def exact_special(
    tariff: Tariff,
    digits: str,
    started_at: datetime,
    duration: int,
    *,
    per_second: int = 1,
    begin: int = 0,
) -> Exact | None:
    """The exact cost by rows with steps, windows or a maximum; None when no row is in force.

    The row in force at the start gives fee, increments, steps' ends, rounding and maximum. When
    it says so, every billed second has the price of the row in force as it begins. `duration`
    and the rows' seconds count 1/`per_second` s. What lies before `begin` is paid otherwise (by
    a pool): the rest is billed like a call of its own, but at the prices of its place in this one.
    """
    rate = tariff.find_at(digits, started_at)
    if rate is None:
        return None
    denominator: int = _MINUTE_S * per_second * 10**rate.scale
    if duration <= 0:
        return Exact(rate, 0, 0, denominator)
    numerator: int = rate.connect_fee * _MINUTE_S * per_second
    spans = _spans(rate, begin, duration) if begin < duration else []
    special = rate.special
    if special is not None and special.split and spans:
        parts = _split(tariff, digits, started_at, spans[-1][1], per_second)
        if parts is None:
            return None
    else:
        parts = [(0, rate)]
    billed = 0
    for low, high, chooses in spans:
        billed += high - low
        for at, (first, one) in enumerate(parts):
            upto = parts[at + 1][0] if at + 1 < len(parts) else high
            shared = min(high, upto) - max(low, first)
            if shared > 0:
                numerator += shared * _per_minute(one, chooses)
    if special is not None and special.max_cost is not None:
        numerator = min(numerator, special.max_cost * _MINUTE_S * per_second)
    return Exact(rate, billed, numerator, denominator)


def price_special(
    tariff: Tariff, digits: str, started_at: datetime, duration_s: int, begin: int = 0
) -> Charge | None:
    """The charge for a leg by a row that is special; None when no row is in force. What lies
    before second `begin` is paid otherwise."""
    found = exact_special(tariff, digits, started_at, duration_s, begin=begin)
    if found is None:
        return None
    rule = found.rate.rounding or TO_NANOS
    amount = rounded(found.numerator, found.denominator, rule)
    return Charge(amount * NANOS // 10**rule.decimals, found.rate, found.billed)
