"""Rating: what a piece of usage costs. Knows tariffs; knows nothing of balances."""

from typing import Final

from schemas.money import NANOS
from streams.billing.money import ceil_div
from streams.billing.outcomes import Charge
from streams.billing.tariff import Rate, Rounding

_MINUTE_S: Final = 60
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
    """The charge for a leg: exact arithmetic, rounded once."""
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
