"""Tariffs: a rate deck in force, its rows, and how a deck's text is read and checked."""

import csv
from collections.abc import Iterator
from io import StringIO
from typing import Final

from msgspec import Struct

from streams.billing.prefixes import Prefixes

# Columns of the public deck; the others are optional and have defaults.
REQUIRED_COLUMNS: Final = (
    "Destination Name",
    "Destination Type",
    "Country",
    "Prefix",
    "Price / min",
)
OPTIONAL_COLUMNS: Final = ("Connect fee", "Initial increment", "Increment", "Rounding")
# Published decks have typing errors; a factor of ten is the usual one.
SUSPICIOUS_FACTOR: Final = 10
MAX_PREFIX_DIGITS: Final = 15


class DeckError(Exception):
    """A deck cannot be used. `faults` are sentences, each with its line number."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        super().__init__((faults[0] if faults else "the deck is empty") + more)


class Rounding(Struct, frozen=True, gc=False):
    """How a cost is rounded, once, at the end: `mode` up, down or half_up to `decimals`."""

    mode: str
    decimals: int


class Rate(Struct, frozen=True, kw_only=True, gc=False):
    """One row of a deck. Prices are integers of 10^-scale of the currency unit per minute or per
    call; increments are seconds, an initial one of 0 means that every second is billed by the
    following one; the texts are the prices as the deck wrote them."""

    prefix: str
    per_minute: int
    connect_fee: int = 0
    scale: int = 9
    initial_increment_s: int = 60
    increment_s: int = 60
    rounding: Rounding | None = None
    destination: str = ""
    country: str = ""
    type: str = "mixed"
    per_minute_text: str = ""
    connect_fee_text: str = "0"


class Tariff:
    """A deck by name and version, ready for look-ups."""

    __slots__ = ("_prefixes", "deck", "version", "warnings")

    def __init__(
        self, deck: str, version: str, rates: dict[str, Rate], warnings: tuple[str, ...] = ()
    ) -> None:
        self.deck = deck
        self.version = version
        self.warnings = warnings
        self._prefixes = Prefixes(rates)

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, digits: str) -> Rate | None:
        """The row for a number's digits (without the plus); None: the number is unrated."""
        return self._prefixes.find(digits)


def scaled(text: str, scale: int = 9) -> int:
    """Decimal text as an integer of 10^-scale. Raises ValueError when it is no plain decimal or
    has more decimals than fit."""
    units, _, decimals = text.partition(".")
    if (
        not units.isascii()
        or not units.isdigit()
        or (decimals and not (decimals.isascii() and decimals.isdigit()))
        or text.endswith(".")
    ):
        raise ValueError(f"{text!r} is no price; write it like 0.015")
    if len(decimals) > scale:
        raise ValueError(f"{text!r} has more than {scale} decimals")
    power: int = 10**scale
    return int(units) * power + int(decimals.ljust(scale, "0") or "0")


def rounding_from(text: str) -> Rounding | None:
    """Read a deck's rounding rule: empty, or like `up/4`, `down/2`, `half_up/3`."""
    if not text:
        return None
    mode, _, decimals = text.partition("/")
    if mode not in ("up", "down", "half_up") or not decimals.isdecimal() or int(decimals) > 9:
        raise ValueError(f"{text!r} is no rounding; write it like half_up/4")
    return Rounding(mode, int(decimals))


def _seconds(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit()) or not least <= int(text) <= 3_600:
        raise ValueError(f"{text!r} is no increment; write whole seconds such as 60")
    return int(text)


def _rate(row: dict[str, str]) -> Rate:
    prefix = row["Prefix"].strip()
    if not (prefix.isascii() and prefix.isdigit()) or len(prefix) > MAX_PREFIX_DIGITS:
        raise ValueError(f"{prefix!r} is no prefix; it has digits only")
    kind = row["Destination Type"].strip()
    if not kind:
        raise ValueError("the destination type is missing")
    price = row["Price / min"].strip()
    fee = (row.get("Connect fee") or "").strip() or "0"
    return Rate(
        prefix=prefix,
        per_minute=scaled(price),
        connect_fee=scaled(fee),
        initial_increment_s=_seconds((row.get("Initial increment") or "").strip() or "60", 0),
        increment_s=_seconds((row.get("Increment") or "").strip() or "60", 1),
        rounding=rounding_from((row.get("Rounding") or "").strip()),
        destination=row["Destination Name"].strip(),
        country=row["Country"].strip(),
        type=kind,
        per_minute_text=price,
        connect_fee_text=fee,
    )


def parse_deck(text: str, *, deck: str, version: str) -> Tariff:
    """Read a deck from CSV text.

    Raises DeckError with every fault (duplicate prefixes, prices that are no prices, digits that
    are none). What is only suspicious stands in the tariff's `warnings`.
    """
    reader = csv.DictReader(StringIO(text.removeprefix("\ufeff")))
    missing = [name for name in REQUIRED_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise DeckError([f"line 1: the column {missing[0]!r} is missing"])
    rates: dict[str, Rate] = {}
    faults: list[str] = []
    for row in reader:
        try:
            rate = _rate(row)
        except (ValueError, AttributeError) as error:
            faults.append(f"line {reader.line_num}: {error or 'too few columns'}")
            continue
        if rate.prefix in rates:
            faults.append(f"line {reader.line_num}: prefix {rate.prefix} stands there twice")
        rates[rate.prefix] = rate
    if faults or not rates:
        raise DeckError(faults)
    return Tariff(deck, version, rates, tuple(_suspicions(rates)))


def _suspicions(rates: dict[str, Rate]) -> Iterator[str]:
    for prefix, rate in rates.items():
        parent = next(
            (
                rates[prefix[:length]]
                for length in range(len(prefix) - 1, 0, -1)
                if prefix[:length] in rates
            ),
            None,
        )
        if parent is None or not parent.per_minute:
            continue
        if rate.per_minute > SUSPICIOUS_FACTOR * parent.per_minute:
            yield f"prefix {prefix}: more than ten times the price of its parent {parent.prefix}"
        elif rate.per_minute * SUSPICIOUS_FACTOR < parent.per_minute:
            yield f"prefix {prefix}: less than a tenth of the price of its parent {parent.prefix}"
