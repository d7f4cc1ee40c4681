"""Rate decks, and what usage costs by them."""

import csv
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from fractions import Fraction
from functools import lru_cache
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

from streams.testbed.auditor.events import Event, depends_on_country, kind_by, kind_of
from streams.testbed.auditor.minutes import Coverage
from streams.testbed.auditor.records import REMEMBERED, Record, utc
from streams.testbed.auditor.shapes import KINDS
from streams.testbed.auditor.tenants import Tenants
from streams.testbed.auditor.view import View

_exact: Final = lru_cache(REMEMBERED)(Fraction)
# What a row says when its price hangs on more than the length of a call.
_SPECIAL: Final = ("Steps", "Windows", "Weight", "Split", "Max cost")
# A worker may not book by a view of the decks that is older, and a batch takes its time.
_SEEN_WITHIN: Final = timedelta(minutes=6)


class Deck:
    """A rate deck read from CSV: the file's, with the version its bytes give it, or a published
    one. `rows` has one row of each prefix, `bands` all of them, `line` in the deck's order."""

    def __init__(self, content: bytes, published: Mapping[str, Any] | None = None) -> None:
        self.name = "default"
        self.version = "file-" + hashlib.sha256(content).hexdigest()[:12]
        self.effective_from: datetime | None = None
        self.published_at: datetime | None = None
        if published is not None:
            self.name, self.version = published["deck"], published["version"]
            self.effective_from = utc(published["effective_from"])
            self.published_at = utc(published["published_at"])
        self.rows: dict[str, dict[str, str]] = {}
        self.bands: dict[str, list[dict[str, str]]] = {}
        for read in csv.DictReader(StringIO(content.decode("utf-8-sig"))):
            row = {name: text.strip() for name, text in read.items() if isinstance(text, str)}
            row["Country"] = row.get("Country", "").upper()
            row["Destination Type"] = row.get("Destination Type", "").casefold()
            self.rows[row["Prefix"]] = row
            self.bands.setdefault(row["Prefix"], []).append(row)
        # A number has more digits than there are lengths of prefixes.
        self._lengths = sorted({len(prefix) for prefix in self.bands if prefix}, reverse=True)
        self.has_risks = any(row.get("Risk class") for rows in self.bands.values() for row in rows)

    def began_by(self, at: datetime) -> bool:
        """Whether it can be in force for a call that starts then."""
        return self.effective_from is None or self.effective_from <= at

    def find(self, digits: str) -> tuple[str, dict[str, str]] | None:
        """The row of the longest prefix."""
        for length in range(len(digits), 0, -1):
            row = self.rows.get(digits[:length])
            if row is not None:
                return digits[:length], row
        return None

    def at(self, digits: str, at: datetime) -> dict[str, str] | None:
        """The row in force at an instant: of the longest prefix that has one, the heaviest."""
        for length in self._lengths:
            rows = self.bands.get(digits[:length]) if length <= len(digits) else None
            inside = [row for row in rows or () if covers(row, at)]
            if inside:
                # max() gives the first of equals, which is the deck's order.
                return max(inside, key=lambda row: (weight(row), bool(row.get("Windows"))))
        return None

    def price(self, digits: str, started: datetime, duration_s: int, begin: int = 0) -> int | None:
        """What a call costs in nanos; None when it is unrated. Its seconds before `begin` were
        included: the rest is billed like a call of its own, at the prices of its place."""
        row = self.at(digits, started)
        if row is None:
            return None
        if not any(row.get(name) for name in _SPECIAL):
            return self.cost(row, duration_s - begin)
        if duration_s <= begin:
            return 0
        total = Fraction(row.get("Connect fee") or "0")
        for low, high in billed_parts(row, duration_s, begin):
            if row.get("Split") != "yes":
                total += (high - low) * per_minute(row, low) / 60
                continue
            for first, last, one in self._pieces(digits, started, low, high):
                if one is None:
                    return None
                total += (last - first) * per_minute(one, low) / 60
        most = row.get("Max cost") or ""
        if most and not most.endswith("/disconnect"):
            total = min(total, Fraction(most.removesuffix("/free")))
        return rounded(total, _rounding(row))

    def _pieces(
        self, digits: str, started: datetime, low: int, high: int
    ) -> Iterable[tuple[int, int, dict[str, str] | None]]:
        """Seconds [low, high) of a call, minute of the clock by minute of the clock."""
        second = low
        while second < high:
            # A second belongs to the row in force when it begins.
            at = started + timedelta(seconds=second)
            last = min(high, second + 60 - at.second)
            yield second, last, self.at(digits, at)
            second = last

    def rows_of(self, prefix: str) -> list[dict[str, str]]:
        """The row of a prefix; where its end is hidden, all rows it may stand for."""
        known = prefix.rstrip("x")
        if known == prefix:
            return [self.rows[prefix]] if prefix in self.rows else []
        return [
            row
            for one, row in self.rows.items()
            if len(one) == len(prefix) and one.startswith(known)
        ]

    def cost(self, row: Mapping[str, str], duration_s: int) -> int:
        """The price of a leg in nanos: exact, rounded once."""
        if duration_s <= 0:
            return 0
        first = int(row.get("Initial increment") or 60)
        step = int(row.get("Increment") or 60)
        beyond = max(0, duration_s - first)
        billed = first - step * (-beyond // step)
        fee, price = row.get("Connect fee") or "0", row["Price / min"]
        return _cost(fee, price, billed, _rounding(row))


@lru_cache(REMEMBERED)
def _cost(fee: str, price: str, billed_s: int, rule: str) -> int:
    return rounded(_exact(fee) + _exact(price) * billed_s / 60, rule)


def _rounding(row: Mapping[str, str]) -> str:
    return row.get("Rounding") or "half_up/9"


def rounded(cost: Fraction, rule: str) -> int:
    """A cost in nanos by a row's rule."""
    mode, _, decimals = rule.partition("/")
    scaled = cost * 10 ** int(decimals)
    whole = scaled.numerator // scaled.denominator
    rest = scaled - whole
    if rest and (mode == "up" or (mode == "half_up" and rest >= Fraction(1, 2))):
        whole += 1
    return int(Fraction(whole, 10 ** int(decimals)) * 1_000_000_000)


def weight(row: Mapping[str, str]) -> int:
    """Which of several rows wins."""
    return int(row.get("Weight") or 0)


def steps_of(row: Mapping[str, str]) -> list[tuple[int, Fraction, int]]:
    """From which second on what a minute costs, and in which increments."""
    steps = []
    for text in filter(None, (row.get("Steps") or "").split(";")):
        start, _, rest = text.strip().partition(":")
        price, _, increment = rest.partition("/")
        steps.append((int(start), Fraction(price), int(increment)))
    return steps


def per_minute(row: Mapping[str, str], second: int) -> Fraction:
    """The price in the step that a second falls into."""
    price = Fraction(row["Price / min"])
    for start, step_price, _ in steps_of(row):
        if start <= second:
            price = step_price
    return price


def billed_parts(row: Mapping[str, str], duration_s: int, begin: int = 0) -> list[tuple[int, int]]:
    """The seconds from `begin` on that are paid for; each step rounds its own up."""
    steps = steps_of(row)
    if not steps:
        first = int(row.get("Initial increment") or 60)
        step = int(row.get("Increment") or 60)
        beyond = max(0, duration_s - begin - first)
        return [(begin, begin + first - step * (-beyond // step))]
    parts = []
    for (start, _, increment), following in zip(steps, [*steps[1:], None], strict=True):
        end = duration_s if following is None else min(duration_s, following[0])
        start = max(start, begin)
        if start < end:
            parts.append((start, start - increment * (-(end - start) // increment)))
    return parts


def covers(row: Mapping[str, str], at: datetime) -> bool:
    """Whether a row is in force at an instant: `1-5 08:00-18:00 Europe/London; @12-25`."""
    texts = row.get("Windows") or ""
    return not texts or any(_inside(text.split(), at) for text in texts.split(";"))


def _inside(words: Sequence[str], at: datetime) -> bool:
    zones = [word for word in words if word[0].isalpha()]
    try:
        local = at.astimezone(ZoneInfo(zones[0])) if zones else at
    except OverflowError:  # beyond the calendar's ends there is no local time
        local = at
    days: set[int] = set()
    for word in words:
        if word[0] == "@":
            month, _, day = word[1:].removeprefix("--").rpartition("-")
            if (int(month or local.month), int(day)) != (local.month, local.day):
                return False
        elif ":" in word:
            start, end = (_minute_of(time) for time in word.split("-"))
            minute = local.hour * 60 + local.minute
            inside = start <= minute < end if start < end else minute >= start or minute < end
            if not inside:
                return False
        elif word[0].isdigit():
            for part in word.split(","):
                first, _, last = part.partition("-")
                days |= set(range(int(first), int(last or first) + 1))
    return not days or local.isoweekday() in days


def _minute_of(time: str) -> int:
    hours, _, minutes = time.partition(":")
    return int(hours) * 60 + int(minutes)


def decks_of(records: Iterable[Record]) -> list[Deck]:
    """The complete versions among the records of the deck topic, in their order."""
    chunks: dict[tuple[str, str], dict[str, bytes]] = {}
    decks: list[Deck] = []
    for record in records:
        deck, version, part = (record.key or b"").decode().split("/")
        of_version = chunks.setdefault((deck, version), {})
        if part != "manifest":
            of_version[part] = record.value or b""
            continue
        manifest = json.loads(record.value or b"null")
        if manifest is None:
            continue
        try:
            packed = b"".join(of_version[str(number)] for number in range(manifest["chunks"]))
            text = zlib.decompress(packed)
            if hashlib.sha256(text).hexdigest() == manifest["sha256"]:
                decks.append(Deck(text, manifest))
        except (KeyError, ValueError, zlib.error):
            continue  # as good as not there: what it priced is then unknown
    return decks


def load_deck(path: Path | None) -> Deck:
    """The deck file the product would use."""
    if path is not None:
        return Deck(path.read_bytes())
    return Deck(files("streams").joinpath("default_deck.csv").read_bytes())


def deck_of(rate: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """Name and version of the deck that an entry's rate names."""
    return None if rate is None else (rate.get("deck", "default"), rate["version"])


class Tariffs:
    """The decks at hand, and what they make of usage. `foreign` is a deck that an entry names and
    that is not at hand."""

    def __init__(
        self, view: View, tenants: Tenants, decks: Sequence[Deck], coverage: Coverage
    ) -> None:
        self._view = view
        self._report = view.report
        self._tenants = tenants
        self._decks = {(deck.name, deck.version): deck for deck in decks}
        self._coverage = coverage
        self.foreign: str | None = None

    def of(self, named: tuple[str, str] | None) -> Deck | None:
        """The deck of a name and version, if it is at hand."""
        return None if named is None else self._decks.get(named)

    def judge_entry(self, name: str, rate: Mapping[str, Any], amount: int, minutes: int) -> None:
        """What an entry charges is what its deck says of the seconds that it names."""
        deck = self.of(deck_of(rate))
        if deck is None:
            self.foreign = str(rate["version"])
            self._report.unknown(
                "price", f"the deck {rate['version']} is not at hand; name it with --deck"
            )
            return
        rows = deck.rows_of(rate["prefix"])
        if not rows:
            self._report.violate("price", f"{name}: the deck has no prefix {rate['prefix']}")
            return
        if rate.get("started_at") is not None:
            return  # its price hangs on the instant and on other rows: judged with its event
        row = rows[0]
        rest_s = rate["duration_s"] - 60 * minutes
        costs = [deck.cost(row, rest_s) for row in rows]
        cost = costs[0]
        if -amount not in costs:
            self._report.violate(
                "price",
                f"{name}: {rest_s} s at {row['Price / min']} cost "
                f"{Fraction(cost, 10**9)}, charged {Fraction(-amount, 10**9)}",
            )

    def judge_version(self, event: Event, deck: Deck, booked_at: datetime) -> None:
        """The deck an entry names is the tenant's, was in force when the call started, and
        nobody could know of a later one."""
        where = f"{event.place} is priced by {deck.name}/{deck.version}"
        of_tenant = self._tenants.names(event.tenant)
        if self._view.knows_commands:
            of_tenant = self._tenants.decks_of(event.tenant, event.started, booked_at)
        if deck.name not in of_tenant:
            self._report.violate("price", f"{where}, which is not its tenant's deck")
        if not deck.began_by(event.started):
            self._report.violate("price", f"{where}, which was not in force yet")
        for other in self._decks.values():
            if (
                other.name == deck.name
                and other.effective_from is not None
                and other.published_at is not None
                and other.began_by(event.started)
                and (deck.effective_from is None or deck.effective_from < other.effective_from)
                and other.published_at + _SEEN_WITHIN < booked_at
            ):
                self._report.violate("price", f"{where}, though {other.version} was in force")

    def cost(
        self, event: Event, named: tuple[str, str] | None = None, minutes: int = 0
    ) -> int | None:
        """What a sound event costs; None when it must not be booked. Without the deck that an
        entry names, any that can have been in force: then free wins, and unrated loses."""
        body = event.body
        phase = body.get("phase", "end")
        if phase not in ("start", "progress", "end", "correction"):
            return None
        kind, duration_s = kind_of(body), event.duration_s
        if phase == "start" and duration_s is None:
            duration_s = 0
        if kind not in KINDS or duration_s is None or duration_s < 0:
            return None
        known = not depends_on_country(body, kind)
        if phase in ("start", "progress") or (kind in self._coverage.free and known):
            return 0
        if not duration_s:
            return 0
        callee = str(body.get("callee") or "")
        if not callee.startswith("+") or not callee[1:].isdigit():
            return None
        if named is not None and named in self._decks:
            deck = self._decks[named]
            return self._cost_by(event, deck, callee[1:], duration_s, 60 * minutes)
        costs = [
            self._cost_by(event, deck, callee[1:], duration_s) for deck in self._candidates(event)
        ]
        rated = [cost for cost in costs if cost is not None]
        return min(rated) if rated else None

    def prices(self, event: Event, duration_s: int) -> set[int]:
        """What an open call may hold: by any deck that can price it. What has no price is free."""
        kind, callee = kind_of(event.body), str(event.body.get("callee") or "")
        known = not depends_on_country(event.body, kind)
        rated = callee.startswith("+") and callee[1:].isdigit()
        if not rated or (kind in self._coverage.free and known):
            return {0}
        return {
            self._cost_by(event, deck, callee[1:], duration_s) or 0
            for deck in self._candidates(event)
        }

    def _cost_by(
        self, event: Event, deck: Deck, digits: str, duration_s: int, paid_s: int = 0
    ) -> int | None:
        """What a call costs by a deck, which also says whether it went abroad."""
        row = deck.at(digits, event.started)
        if row is not None and kind_by(event.body, row) in self._coverage.free:
            return 0
        return deck.price(digits, event.started, duration_s, paid_s)

    def _candidates(self, event: Event) -> list[Deck]:
        names = self._tenants.names(event.tenant)
        return [
            deck
            for deck in self._decks.values()
            if deck.name in names and deck.began_by(event.started)
        ]

    def can_be_unrated(self, event: Event) -> bool:
        """Whether a deck that can have been in force has no price for a call."""
        if self.cost(event) is None or event.tenant in self._tenants.assigned:
            return True
        callee = str(event.body.get("callee") or "")[1:]
        return any(
            deck.price(callee, event.started, event.duration_s or 0) is None
            for deck in self._candidates(event)
        )
