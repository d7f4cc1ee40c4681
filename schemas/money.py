"""Money on the wire: decimal text and a currency, never a JSON number."""

from typing import Annotated

from msgspec import Meta, Struct

from schemas.nanos import AMOUNT_PATTERN

Amount = Annotated[
    str,
    Meta(
        pattern=AMOUNT_PATTERN,
        max_length=21,
        description="Decimal text with at most nine decimals",
        examples=["12.34", "-0.006"],
    ),
]
Currency = Annotated[
    str, Meta(pattern=r"^[A-Z]{3}$(?!\n)", description="ISO 4217 alphabetic code", examples=["USD"])
]


class Money(Struct, frozen=True, kw_only=True, gc=False):
    """An amount in one currency, as the wire carries it."""

    amount: Amount
    currency: Currency
