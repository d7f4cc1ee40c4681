"""Tariffs: how a rate deck's text is read and checked."""

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from io import StringIO
from typing import Final

from streams.billing.rates import Rate, Rounding, Special, Step, Tariff, by_prefix
from streams.billing.windows import Window, window_from

# Columns of the public deck; the others are optional and have defaults.
REQUIRED_COLUMNS: Final = (
    "Destination Name",
    "Destination Type",
    "Country",
    "Prefix",
    "Price / min",
)
SPECIAL_COLUMNS: Final = ("Steps", "Windows", "Weight", "Split", "Max cost")
OPTIONAL_COLUMNS: Final = (
    "Risk class",
    "Connect fee",
    "Initial increment",
    "Increment",
    "Rounding",
    *SPECIAL_COLUMNS,
)
# ITU-T E.164: country codes of two digits; those that begin with 1 and 7 have one, others three.
_TWO_DIGITS: Final = frozenset(
    (
        "20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 "
        "63 64 65 66 81 82 84 86 90 91 92 93 94 95 98"
    ).split()
)
# Published decks have typing errors; a factor of ten is the usual one.
SUSPICIOUS_FACTOR: Final = 10
TYPES: Final = ("landline", "mobile", "premium", "toll_free", "mixed")
MAX_PREFIX_DIGITS: Final = 15


class DeckError(Exception):
    """A deck cannot be used. `faults` are sentences, each with its line number."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        super().__init__((faults[0] if faults else "the deck is empty") + more)


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
    if mode not in ("up", "down", "half_up") or not _is_number(decimals) or int(decimals) > 9:
        raise ValueError(f"{text!r} is no rounding; write it like half_up/4")
    return Rounding(mode, int(decimals))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _seconds(text: str, least: int) -> int:
    if not _is_number(text) or not least <= int(text) <= 3_600:
        raise ValueError(f"{text!r} is no increment; write whole seconds such as 60")
    return int(text)


def _steps_from(text: str) -> tuple[Step, ...]:
    """Read `0:0.10/60; 300:0.05/30`: from that second on, price a minute / increment."""
    steps: list[Step] = []
    for part in text.split(";"):
        start, colon, rest = part.strip().partition(":")
        per_minute, slash, increment = rest.partition("/")
        if not colon or not slash or not _is_number(start):
            raise ValueError(f"{part.strip()!r} is no step; write it like 300:0.05/60")
        if int(start) <= steps[-1].from_s if steps else int(start) != 0:
            raise ValueError("steps begin at second 0 and follow one another")
        steps.append(Step(int(start), scaled(per_minute), _seconds(increment, 1)))
    return tuple(steps)


def _windows_from(text: str) -> tuple[Window, ...]:
    """Read `1-5 08:00-18:00 Europe/London; @12-25`: weekdays, times, a day of the year and a
    zone, each of which may be absent."""
    windows: list[Window] = []
    for part in text.split(";"):
        days: list[int] = []
        start = end = month_day = ""
        zone = "UTC"
        words = part.split()
        if not words:
            raise ValueError("a window is empty; write it like 1-5 08:00-18:00 Europe/London")
        for word in words:
            if word.startswith("@"):
                month_day = word[1:]
            elif ":" in word:
                start, dash, end = word.partition("-")
                if not dash or word.count(":") != 2:  # decks have no seconds there
                    raise ValueError(f"{word!r} are no times; write them like 08:00-18:00")
            elif word[0].isdigit():
                days += _days_from(word)
            else:
                zone = word
        windows.append(window_from(tuple(days), start, end, month_day, zone))
    return tuple(windows)


def _days_from(text: str) -> list[int]:
    days: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise ValueError(f"{text!r} are no weekdays; write them like 1-5 or 6,7")
        days += range(int(first), int(last or first) + 1)
    return days


def _special_from(row: Mapping[str, str]) -> Special | None:
    """What the columns that few rows fill say. Raises ValueError."""
    steps = row.get("Steps", "")
    windows = row.get("Windows", "")
    weight = row.get("Weight", "")
    split = row.get("Split", "")
    max_cost, _, strategy = row.get("Max cost", "").partition("/")
    if not (steps or windows or weight or split or max_cost or strategy):
        return None
    if weight and not _is_number(weight):
        raise ValueError(f"{weight!r} is no weight; write a whole number")
    if split not in ("", "yes", "no"):
        raise ValueError(f"{split!r}: Split is yes or no")
    if strategy not in ("", "free", "disconnect"):
        raise ValueError(f"{strategy!r}: after a maximum stands free or disconnect")
    most = scaled(max_cost) if max_cost else None
    return Special(
        steps=_steps_from(steps) if steps else (),
        windows=_windows_from(windows) if windows else (),
        weight=int(weight or 0),
        split=split == "yes",
        # To disconnect is a matter of admission: a finished call costs what it costs.
        max_cost=None if strategy == "disconnect" else most,
    )


class _Reader:
    """Reads the rows of one deck. Decks repeat themselves: what was read once is kept, which
    saves time and, above all, the memory of a second copy."""

    def __init__(self, header: Sequence[str]) -> None:
        places = {name: at for at, name in enumerate(header)}
        self._type, self._country, self._prefix, self._price = (
            places[name] for name in REQUIRED_COLUMNS[1:]
        )
        self._risk = places.get("Risk class")
        # A column that is not there lies beyond the end of every row.
        self._more = [
            places.get(name, sys.maxsize)
            for name in ("Connect fee", "Initial increment", "Increment", "Rounding")
        ]
        self._special = {name: places[name] for name in SPECIAL_COLUMNS if name in places}
        self._prices: dict[tuple[str, ...], tuple[int, int, int, int, Rounding | None]] = {}
        self._texts: dict[str, str] = {}

    def rate(self, row: list[str]) -> Rate:
        """One row. Raises ValueError, IndexError when it is too short."""
        prefix = row[self._prefix].strip()
        if not (prefix.isascii() and prefix.isdigit()) or len(prefix) > MAX_PREFIX_DIGITS:
            raise ValueError(f"{prefix!r} is no prefix; it has digits only")
        text = self._texts.setdefault
        kind = row[self._type].strip().casefold()
        if not kind:
            raise ValueError("the destination type is missing")
        price = row[self._price].strip()
        fee, first, step, rule = [row[at].strip() if at < len(row) else "" for at in self._more]
        said = (price, fee, first, step, rule)
        known = self._prices.get(said)
        if known is None:
            known = self._prices[said] = (
                scaled(price),
                scaled(fee or "0"),
                _seconds(first or "60", 0),
                _seconds(step or "60", 1),
                rounding_from(rule),
            )
        special = None
        if self._special:
            special = _special_from(
                {
                    name: row[at].strip()
                    for name, at in self._special.items()
                    if at < len(row) and row[at]
                }
            )
        country, fee = row[self._country].strip().upper(), fee or "0"
        risk = "" if self._risk is None or self._risk >= len(row) else row[self._risk].strip()
        return Rate(
            prefix=prefix,
            per_minute=known[0],
            connect_fee=known[1],
            initial_increment_s=known[2],
            increment_s=known[3],
            rounding=known[4],
            country=text(country, country),
            type=text(kind, kind),
            per_minute_text=text(price, price),
            connect_fee_text=text(fee, fee),
            risk_class=text(risk, risk),
            special=special,
        )


def parse_deck(
    text: str, *, deck: str, version: str, effective_from: datetime | None = None
) -> Tariff:
    """Read a deck from CSV text.

    Raises DeckError with every fault (duplicate prefixes, prices that are no prices, digits that
    are none). What is only suspicious stands in the tariff's `warnings`. Both name lines.
    """
    reader = csv.reader(StringIO(text.removeprefix("\ufeff")))
    header = next(reader, [])
    missing = [name for name in REQUIRED_COLUMNS if name not in header]
    if missing:
        raise DeckError([f"line 1: the column {missing[0]!r} is missing"])
    read = _Reader(header).rate
    rates: dict[str, Rate] = {}
    lines: dict[str, int] = {}
    several: dict[str, list[Rate]] = {}
    faults: list[str] = []
    for row in reader:
        if not row:
            continue
        try:
            rate = read(row)
        except (ValueError, IndexError) as error:
            why = "too few columns" if isinstance(error, IndexError) else error
            faults.append(f"line {reader.line_num}: {why}")
            continue
        prefix = rate.prefix
        if prefix not in rates:
            rates[prefix] = rate
            lines[prefix] = reader.line_num
            continue
        others = several.setdefault(prefix, [rates[prefix]])
        if any(_same_time(rate, other) for other in others):
            faults.append(f"line {reader.line_num}: prefix {prefix} stands there twice")
        others.append(rate)
    if faults or not rates:
        raise DeckError(faults)
    if several:
        rates.update(by_prefix(rate for bands in several.values() for rate in bands))
    warnings = (*_unknown(header), *_odd_types(rates, lines), *_suspicions(rates, lines))
    return Tariff(deck, version, rates, warnings, effective_from)


def _same_time(one: Rate, other: Rate) -> bool:
    """Whether nothing tells when which of two rows of a prefix is in force."""
    mine, its = one.special or Special(), other.special or Special()
    if not mine.windows and not its.windows:
        return True
    return (mine.windows, mine.weight) == (its.windows, its.weight)


def _unknown(header: Sequence[str]) -> Iterator[str]:
    for name in header:
        if name not in REQUIRED_COLUMNS and name not in OPTIONAL_COLUMNS:
            yield f"line 1: the column {name!r} means nothing here and is ignored"


def _odd_types(rates: Mapping[str, Rate], lines: Mapping[str, int]) -> Iterator[str]:
    """Types that no coverage table knows: a pool that leaves out premium numbers pays for them."""
    told = set(TYPES)
    for prefix, rate in rates.items():
        if rate.type not in told:
            told.add(rate.type)
            yield f"line {lines[prefix]}: the type {rate.type!r} is none of {', '.join(TYPES)}"


def _suspicions(rates: Mapping[str, Rate], lines: Mapping[str, int]) -> list[str]:
    """Prices far from those of the prefix around them (published typing errors look like this),
    and prefixes longer than their country code without a shorter row: numbers beside them are
    unrated. Those are told once a country code, or area code in North America, which has no row
    of its own in any deck."""
    found: list[str] = []
    orphans: dict[str, list[str]] = {}
    for prefix, rate in rates.items():
        parent = None
        for length in range(len(prefix) - 1, 0, -1):
            parent = rates.get(prefix[:length])
            if parent is not None:
                break
        if parent is None:
            root = _root(prefix)
            if len(prefix) > len(root):
                orphans.setdefault(root, []).append(prefix)
            continue
        price, around = rate.per_minute, parent.per_minute
        if price > SUSPICIOUS_FACTOR * around:
            how = "more than ten times"
        elif price * SUSPICIOUS_FACTOR < around:
            how = "less than a tenth of"
        else:
            continue
        found.append(
            f"line {lines[prefix]}: prefix {prefix}: {how} the price of its parent {parent.prefix}"
        )
    for root, prefixes in orphans.items():
        more = f" (and {len(prefixes) - 1} more like it)" if len(prefixes) > 1 else ""
        found.append(
            f"line {lines[prefixes[0]]}: prefix {prefixes[0]}{more}: there is no row for {root}, "
            "so other numbers there are unrated"
        )
    return found


def _root(prefix: str) -> str:
    """Where a deck should have a row that covers a prefix: its country code, in North America
    its area code."""
    if prefix[0] == "1":
        return prefix[:4]
    return prefix[: 1 if prefix[0] == "7" else 2 if prefix[:2] in _TWO_DIGITS else 3]
