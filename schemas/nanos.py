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
    if nanos < NANOS:
        if nanos < 0:
            return "-" + text_from(-nanos)
        return f"0.{nanos:09d}".rstrip("0") if nanos else "0"
    # Cutting the digits costs half of what dividing does; every entry writes two amounts.
    digits = str(nanos)
    decimals = digits[-9:].rstrip("0")
    return f"{digits[:-9]}.{decimals}" if decimals else digits[:-9]
