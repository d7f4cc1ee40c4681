"""Amounts inside: integers of 10⁻⁹ of the currency unit ("nanos").

These two functions are the only way from the wire's decimal text and back. No float is ever
involved.
"""

import re
from typing import Final

NANOS: Final = 1_000_000_000

# A record's amount; ten digits would not fit the row once it is multiplied by 10⁹.
# `$(?!\n)` and not `$`: Python lets `$` match before a closing newline.
AMOUNT_PATTERN: Final = r"^-?(0|[1-9][0-9]{0,9})(\.[0-9]{1,9})?$(?!\n)"
_AMOUNT: Final = re.compile(AMOUNT_PATTERN)
_DIGITS: Final = tuple(f"{number:03d}" for number in range(1_000))
_STRIPPED: Final = tuple(digits.rstrip("0") for digits in _DIGITS)
# One event moves at most this much (a typo must not become a fortune).
MAX_EVENT_NANOS: Final = 999_999_999 * NANOS


def nanos_from(text: str) -> int:
    """Read decimal text as nanos, exactly.

    Raises ValueError when the text is not in the wire's form (ten digits, nine decimals).
    """
    if _AMOUNT.fullmatch(text) is None:
        raise ValueError("an amount is decimal text such as 12.34, with at most nine decimals")
    units, _, decimals = text.partition(".")
    nanos = int(units.lstrip("-")) * NANOS + int(decimals.ljust(9, "0") or "0")
    return -nanos if text.startswith("-") else nanos


def text_from(nanos: int) -> str:
    """Write nanos as the shortest decimal text: 12500000000 becomes 12.5."""
    if nanos < 0:
        return "-" + text_from(-nanos)
    units = nanos // NANOS
    decimals = nanos % NANOS
    if not decimals:
        return str(units)
    # Three digits at a time: to format and strip a number costs three times as much, and every
    # entry writes two amounts.
    first, rest = decimals // 1_000_000, decimals % 1_000_000
    if not rest:
        return f"{units}.{_STRIPPED[first]}"
    second, third = rest // 1_000, rest % 1_000
    if not third:
        return f"{units}.{_DIGITS[first]}{_STRIPPED[second]}"
    return f"{units}.{_DIGITS[first]}{_DIGITS[second]}{_STRIPPED[third]}"
