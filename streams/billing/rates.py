"""Rates: a rate deck in force, its rows, and which of them prices a call."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, final

from mypy_extensions import mypyc_attr

from streams.billing.prefixes import Prefixes
from streams.billing.windows import Window, in_force

_EVER: Final = datetime.min.replace(tzinfo=UTC)
# A country code has up to three digits: rows that share them lie near each other.
_NEAR_DIGITS: Final = 3


class Rounding(NamedTuple):
    """How a cost is rounded, once, at the end: `mode` up, down or half_up to `decimals`."""

    mode: str
    decimals: int


class Step(NamedTuple):
    """A price of a part of the call: from that second on, billed by whole increments of its own."""

    from_s: int
    per_minute: int
    increment_s: int


class Special(NamedTuple):
    """What few rows have: steps instead of one price, windows in which the row is in force (the
    highest weight wins), whether a call is split by windows or priced by the one at its start,
    and the most a call costs (10^-scale). `bands` are all rows of the prefix, best first."""

    steps: tuple[Step, ...] = ()
    windows: tuple[Window, ...] = ()
    weight: int = 0
    split: bool = False
    max_cost: int | None = None
    bands: tuple["Rate", ...] = ()


# A row's members: compiled classes cannot be asked for theirs.
MEMBERS: Final = (
    "prefix",
    "per_minute",
    "connect_fee",
    "scale",
    "initial_increment_s",
    "increment_s",
    "rounding",
    "country",
    "type",
    "per_minute_text",
    "connect_fee_text",
    "risk_class",
    "special",
)


@final
@mypyc_attr(acyclic=True)
class Rate:
    """One row of a deck. Prices are integers of 10^-scale of the currency unit per minute or per
    call; increments are seconds, an initial one of 0 means that every second is billed by the
    following one; the texts are the prices as the deck wrote them. The usual row has nothing
    `special`. Destinations' names stay in the deck's text: nobody asks for them here, and they
    are most of its bytes."""

    __slots__ = MEMBERS

    def __init__(
        self,
        *,
        prefix: str,
        per_minute: int,
        connect_fee: int = 0,
        scale: int = 9,
        initial_increment_s: int = 60,
        increment_s: int = 60,
        rounding: Rounding | None = None,
        country: str = "",
        type: str = "mixed",  # as the deck's column
        per_minute_text: str = "",
        connect_fee_text: str = "0",
        risk_class: str = "",
        special: Special | None = None,
    ) -> None:
        self.prefix = prefix
        self.per_minute = per_minute
        self.connect_fee = connect_fee
        self.scale = scale
        self.initial_increment_s = initial_increment_s
        self.increment_s = increment_s
        self.rounding = rounding
        self.country = country
        self.type = type
        self.per_minute_text = per_minute_text
        self.connect_fee_text = connect_fee_text
        self.risk_class = risk_class
        self.special = special

    def with_special(self, special: Special) -> "Rate":
        """The same row with what few rows have."""
        members: dict[str, Any] = {name: getattr(self, name) for name in MEMBERS}
        return Rate(**members | {"special": special})


def _weight(rate: Rate) -> tuple[int, bool]:
    special = rate.special
    return (0, False) if special is None else (special.weight, bool(special.windows))


def by_prefix(rates: Iterable[Rate]) -> dict[str, Rate]:
    """Rows by prefix. Where several share one, the best stands for all and knows them: highest
    weight first, then one with windows before one without, then the order of the deck."""
    rows: dict[str, Rate] = {}
    several: dict[str, list[Rate]] = {}
    for rate in rates:
        first = rows.setdefault(rate.prefix, rate)
        if first is not rate:
            several.setdefault(rate.prefix, [first]).append(rate)
    for prefix, bands in several.items():
        bands.sort(key=_weight, reverse=True)
        special = (bands[0].special or Special())._replace(bands=tuple(bands))
        rows[prefix] = bands[0].with_special(special)
    return rows


@final
class Tariff:
    """A deck by name and version, ready for look-ups. `effective_from` None: since ever."""

    __slots__ = ("_dearest", "_prefixes", "deck", "effective_from", "version", "warnings")

    def __init__(
        self,
        deck: str,
        version: str,
        rates: dict[str, Rate],
        warnings: tuple[str, ...] = (),
        effective_from: datetime | None = None,
    ) -> None:
        self.deck = deck
        self.version = version
        self.warnings = warnings
        self.effective_from = effective_from
        self._prefixes: Prefixes[Rate] = Prefixes(rates)
        self._dearest: dict[str, Rate] = {}

    def __len__(self) -> int:
        return len(self._prefixes)

    @property
    def rates(self) -> Mapping[str, Rate]:
        """All rows, by prefix."""
        return self._prefixes.rows

    def find(self, digits: str) -> Rate | None:
        """The row for a number's digits (without the plus); None: the number is unrated. One that
        is `special` must be asked for with the instant: `find_at`."""
        return self._prefixes.find(digits)

    def find_at(self, digits: str, at: datetime) -> Rate | None:
        """The row in force at an instant: one whose windows do not cover it is not there, so that
        a shorter prefix may answer."""
        rate = self._prefixes.find(digits)
        while rate is not None and rate.special is not None:
            for band in rate.special.bands or (rate,):
                if band.special is None or in_force(band.special.windows, at):
                    return band
            rate = self._prefixes.find(digits[: len(rate.prefix) - 1])
        return rate

    def windows_of(self, digits: str) -> tuple[Window, ...]:
        """All windows that can have a say in a number's price."""
        found: list[Window] = []
        rate = self._prefixes.find(digits)
        while rate is not None and rate.special is not None:
            for band in rate.special.bands or (rate,):
                if band.special is not None:
                    found += band.special.windows
            rate = self._prefixes.find(digits[: len(rate.prefix) - 1])
        return tuple(found)

    def dearest_near(self, digits: str) -> Rate | None:
        """The dearest row that begins like a number, by its first three digits or fewer: what an
        unrated call may come to. None in an empty deck."""
        if not self._dearest:  # most decks are never asked
            for row in self._prefixes.rows.values():
                for length in range(_NEAR_DIGITS + 1):
                    dearest = self._dearest.setdefault(row.prefix[:length], row)
                    if row.per_minute > dearest.per_minute:
                        self._dearest[row.prefix[:length]] = row
        for length in range(min(len(digits), _NEAR_DIGITS), -1, -1):
            rate = self._dearest.get(digits[:length])
            if rate is not None:
                return rate
        return None


@final
class Decks:
    """All rate decks of an installation: which version is in force for a call.

    The deck of `CREDITS_DECK` is the first version of deck `default`, in force since ever;
    `published` are in the order of their publication. A version of which nothing but its place in
    time is known (no call can start under it any more) is None there.
    """

    __slots__ = ("_versions",)

    def __init__(
        self, file: Tariff, published: Iterable[tuple[str, datetime, Tariff | None]]
    ) -> None:
        self._versions: dict[str, list[tuple[datetime | None, Tariff | None]]] = {
            file.deck: [(None, file)]
        }
        for deck, effective_from, tariff in published:
            self._versions.setdefault(deck, []).append((effective_from, tariff))
        for versions in self._versions.values():
            # Stable: among equals the one published last stays last; latest first for look-ups.
            versions.sort(key=lambda one: (one[0] is not None, one[0] or _EVER))
            versions.reverse()

    def in_force(self, deck: str, at: datetime) -> Tariff | None:
        """The version of a deck for a call that starts at an instant; None: there is none (yet),
        and such a call is unrated."""
        for effective_from, tariff in self._versions.get(deck, ()):
            if effective_from is None or effective_from <= at:
                return tariff
        return None
