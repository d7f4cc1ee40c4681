"""The auditor behind `credits verify`: an independent, slow, obvious reader of all topics.

It shares no code with core or engine: it decodes, prices, hashes and folds by itself, with plain
dicts, integers and fractions. It reads the position rows first, waits until every transaction that
was open then has ended, reads everything else, judges what lies below the positions and calls the
rest pending. What could not be read is never a pass.
"""

import asyncio
import csv
import hashlib
import json
import uuid
import zlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence, Set
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from importlib.resources import files
from io import StringIO
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any, Final
from zoneinfo import ZoneInfo

import msgspec
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from msgspec import Struct
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from schemas import topics
from streams.consumer import Consumer
from streams.settings import Settings
from streams.testbed.minutes import (
    Booked,
    Call,
    Coverage,
    Licence,
    Line,
    Reckoning,
    lines_of,
)
from streams.testbed.recharges import Moved, Recharges
from streams.testbed.shapes import KINDS, TENANT, fits

HOLDS: Final = 0
VIOLATED: Final = 1
UNKNOWN: Final = 75

INVARIANTS: Final = {
    "conservation": "entries sum to every balance, in the row and as published",
    "lots": "no lot is below zero, what has expired pays for nothing later, grants come as asked",
    "at_most_once": "no event is charged twice",
    "at_least_once": "every event is booked, a repeat, or a dead letter byte for byte",
    "one_request": "one id per epoch and attempt, one unanswered auto-recharge at a time",
    "recharge": "what is asked for is needed, told, and what the policy says; recharges were asked",
    "credit_once": "every payment is credited as often and as much as it was paid",
    "answered": "every command has its one answer",
    "sequence": "entries are numbered 1, 2, 3 … without gap or step back",
    "chain": "every entry's hash follows from the one before it",
    "correction": "what is corrected is reversed once, by what it had cost, and linked both ways",
    "price": "every charge is what the deck it names says, and that version was in force for it",
    "pools": "included minutes pay first, as far as licences go and never further",
    "holds": "what is held is the sum of open calls' holds, and none outlives its signs of life",
    "changelog": "rows are the fold of the ledger; the position row has their count and sums",
    "partition": "every record stands on the partition of its key",
    "cause": "every entry names a record that is there and asks for it, and for no more, every "
    "request one that is there",
    "stable": "no transaction stays open",
    "expectation": "what the load generator sent came out as it foresaw",
}
SHOWN: Final = 20

_POSITION: Final = b"\0position"
# Where a tenant's row keeps what its open calls hold, and how many do.
_EXPOSURE: Final = 26
_HELD: Final = 27
_HOLD_LIVES: Final = timedelta(minutes=3)
# Ticks come every second; a shard that has more to do than one batch holds takes a few.
_TICK_WITHIN: Final = timedelta(minutes=1)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST: Final = datetime.min.replace(tzinfo=UTC)
_RECHARGES: Final = uuid.UUID("6f1b2f3e-2f57-5a0c-9a5e-0d1c6f5b7a11")
# What usage costs: money, or included minutes alone.
_CHARGES: Final = ("charge", "pool")
_ID_MEMBER: Final = {
    topics.CALL_USAGE: "event_id",
    topics.CONFERENCE_USAGE: "event_id",
    topics.COMMAND: "command_id",
    topics.RESULT: "result_id",
}
_TERMINAL: Final = {"succeeded", "declined", "cancelled", "expired"}
_CREDITS: Final = {"recharge", "purchase", "orphan"}
_ZEROS: Final = bytes(32)
# For so long an expired lot may pay for usage of before.
_GRACE: Final = timedelta(hours=48)
# Why a record of each topic can be a dead letter; what a command cannot have is a notice's rule.
_OF_ALL: Final = {
    "malformed_json",
    "schema_violation",
    "key_mismatch",
    "wrong_partition",
    "conflict",
    "defect",
}
_DATED: Final = {
    *_OF_ALL,
    "unknown_tenant",
    "currency_mismatch",
    "too_late",
    "from_the_future",
    "overflow",
}
_OF_USAGE_TOPICS: Final = {*_DATED, "unrated", "not_billable", "refused"}
_REASONS: Final[Mapping[str, Set[str]]] = {
    topics.COMMAND: _OF_ALL,
    topics.RESULT: _DATED,
    topics.CALL_USAGE: _OF_USAGE_TOPICS,
    topics.CONFERENCE_USAGE: _OF_USAGE_TOPICS,
}
_USAGE_WITHIN: Final = timedelta(days=35)
_RESULT_WITHIN: Final = timedelta(days=396)
_FUTURE: Final = timedelta(minutes=5)
# One event moves at most the one, a balance is at most the other.
_MOST_MOVED: Final = 999_999_999 * 10**9
_MOST_BALANCE: Final = 9_000_000_000 * 10**9
# Who asked, and when, may differ in a repeat.
_NOT_SAID: Final = {"command_id", "result_id", "source", "tenant_id", "issued_at", "issued_by"}
# Entries that make a lot when they add money.
_MAKES: Final = {"purchase", "recharge", "orphan", "grant", "adjustment", "dispute_won"}
# What a record of each kind can book.
_OF_TICK: Final = {"expiry", "grant"}
_OF_USAGE: Final = {"charge", "pool", "expiry_reopened"}
_OF_CORRECTION: Final = {*_OF_USAGE, "reversal", "void", "expiry", "grant"}
_OF_RESULT: Final[Mapping[str, Set[str]]] = {
    "succeeded": _CREDITS,
    "refunded": {"refund"},
    "dispute_opened": {"dispute_opened"},
    "dispute_won": {"dispute_won"},
    "dispute_lost": {"dispute_lost"},
}
_OF_COMMAND: Final[Mapping[str, Set[str]]] = {
    "open_tenant": {"grant"},
    "book_payment": {"purchase"},
    "adjustment": {"adjustment"},
    "grant": {"grant"},
    "void": {"void"},
    "resolve_recharge": {"recharge", "purchase"},
}
_OF_PAYMENTS: Final = {"book_payment", "resolve_recharge"}
# A worker may not book by a view of the decks that is older, and a batch takes its time.
_SEEN_WITHIN: Final = timedelta(minutes=6)
# An id is remembered to the end of its week, and 35 days.
_CORRECTED_WITHIN: Final = timedelta(days=43)


class Record(Struct, frozen=True, gc=False):
    """A record as read, whatever it holds."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


class Options(Struct, frozen=True, kw_only=True):
    """What to look at, and how long. `start` is a checkpoint of an earlier run."""

    tenant: str | None = None
    partition: int | None = None
    deck: Path | None = None
    coverage: Path | None = None
    expect: Path | None = None
    checkpoint_from: Path | None = None
    checkpoint_to: Path | None = None
    deadline_s: int = 600
    # For so long an open transaction is waited for. The broker ends one of a worker that is gone
    # after 15 s, and looks for such every 10 s.
    open_within_s: int = 30


class Finding(Struct):
    """What became of one invariant."""

    violations: int = 0
    shown: list[str] = []
    unknown: list[str] = []


class Report:
    """The verdict."""

    def __init__(self) -> None:
        self.findings = {name: Finding() for name in INVARIANTS}
        self.counts: dict[str, int] = {}
        self.dead_letters: dict[str, int] = {}
        self.expectation_asked = False

    def violate(self, invariant: str, text: str) -> None:
        """Something is wrong, here."""
        finding = self.findings[invariant]
        finding.violations += 1
        if len(finding.shown) < SHOWN:
            finding.shown.append(text)

    def unknown(self, invariant: str, why: str) -> None:
        """An invariant could not be checked."""
        reasons = self.findings[invariant].unknown
        if why not in reasons and len(reasons) < SHOWN:
            reasons.append(why)

    def count(self, name: str, by: int = 1) -> None:
        """Count what was looked at."""
        self.counts[name] = self.counts.get(name, 0) + by

    @property
    def exit_code(self) -> int:
        """0 holds, 1 violated, 75 unknown: unknown is never a pass."""
        if any(finding.violations for finding in self.findings.values()):
            return VIOLATED
        if any(finding.unknown for finding in self.findings.values()):
            return UNKNOWN
        return HOLDS

    def lines(self) -> list[str]:
        """The verdict for a person."""
        lines = []
        reasons: list[str] = []
        for name, finding in self.findings.items():
            # What many could not be checked for is said once, below the last of them.
            unknown = [] if finding.violations else finding.unknown
            if unknown != reasons:
                lines += [f"          - {text}" for text in reasons]
            reasons = unknown
            if name == "expectation" and not self.expectation_asked:
                lines.append(f"not asked {name}: {INVARIANTS[name]}")
            elif finding.violations:
                lines.append(f"VIOLATED  {name}: {finding.violations} times; {INVARIANTS[name]}")
                lines += [f"          - {text}" for text in finding.shown]
            elif finding.unknown:
                lines.append(f"unknown   {name}: {INVARIANTS[name]}")
            else:
                lines.append(f"holds     {name}: {INVARIANTS[name]}")
        lines += [f"          - {text}" for text in reasons]
        counted = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
        lines.append(f"looked at {counted or 'nothing'}")
        if self.dead_letters:
            letters = ", ".join(f"{n:,} {why}" for why, n in sorted(self.dead_letters.items()))
            lines.append(f"dead letters: {letters}")
        word = {HOLDS: "the books hold", VIOLATED: "VIOLATED", UNKNOWN: "unknown"}
        lines.append(f"verdict: {word[self.exit_code]}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The verdict for a program."""
        return {
            "exit_code": self.exit_code,
            "invariants": {
                name: {
                    "violations": finding.violations,
                    "shown": finding.shown,
                    "unknown": finding.unknown,
                }
                for name, finding in self.findings.items()
            },
            "counts": self.counts,
            "dead_letters": self.dead_letters,
        }


# -- own versions of what the product computes -------------------------------------------------


def murmur2(key: bytes) -> int:
    """Kafka's key hash, written from its description."""
    mask = 0xFFFFFFFF
    mixer = 0x5BD1E995
    value = 0x9747B28C ^ len(key)
    whole = len(key) // 4 * 4
    for at in range(0, whole, 4):
        word = int.from_bytes(key[at : at + 4], "little") * mixer & mask
        word = (word ^ word >> 24) * mixer & mask
        value = (value * mixer & mask) ^ word
    rest = key[whole:]
    if rest:
        value = (value ^ int.from_bytes(rest, "little")) * mixer & mask
    value = (value ^ value >> 13) * mixer & mask
    return value ^ value >> 15


def home(key: bytes, partitions: int) -> int:
    """The partition a key belongs to."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def nanos(text: str) -> int:
    """Decimal text in 10⁻⁹ units; raises ValueError when it is no whole number of them."""
    value = Fraction(text) * 1_000_000_000
    if value.denominator != 1:
        raise ValueError(text)
    return value.numerator


_SPECIAL: Final = ("Steps", "Windows", "Weight", "Split", "Max cost")


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
            self.effective_from = _utc(published["effective_from"])
            self.published_at = _utc(published["published_at"])
        self.rows: dict[str, dict[str, str]] = {}
        self.bands: dict[str, list[dict[str, str]]] = {}
        for read in csv.DictReader(StringIO(content.decode("utf-8-sig"))):
            row = {name: text.strip() for name, text in read.items() if isinstance(text, str)}
            row["Country"] = row.get("Country", "").upper()
            row["Destination Type"] = row.get("Destination Type", "").casefold()
            self.rows[row["Prefix"]] = row
            self.bands.setdefault(row["Prefix"], []).append(row)

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
        for length in range(len(digits), 0, -1):
            inside = [row for row in self.bands.get(digits[:length], ()) if covers(row, at)]
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
        return rounded(total, row)

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
        cost = Fraction(row.get("Connect fee") or "0") + Fraction(row["Price / min"]) * billed / 60
        return rounded(cost, row)


def rounded(cost: Fraction, row: Mapping[str, str]) -> int:
    """A cost in nanos by the row's rule."""
    rule = row.get("Rounding") or "half_up/9"
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


def kind_of(event: Mapping[str, Any]) -> str | None:
    """What was used, as the public call types say it."""
    call_type = event.get("call_type") or ""
    if call_type.startswith("dr_"):
        return "emergency" if call_type == "dr_emergency_out" else "free"
    number_type = str(event.get("number_type") or "").lower().replace("_", "").replace("-", "")
    toll_free = number_type == "tollfree"
    if event.get("kind"):
        return "toll_free_in" if toll_free and event["kind"] == "conf_dial_in" else event["kind"]
    per_minute = event.get("capability") == "MCOMEETACPEA"
    if call_type in ("user_in", "ucap_in"):
        return "toll_free_in" if toll_free else "free"
    if call_type == "conf_in":
        if toll_free:
            return "toll_free_in"
        return "conf_ppm" if per_minute else "conf_dial_in"
    if call_type == "conf_out":
        return "conf_ppm" if per_minute else "conf_dial_out"
    outgoing = ("user_out", "user_out_conf", "user_out_transfer", "user_out_forwarding", "ucap_out")
    if call_type in outgoing:
        if event.get("capability") == "MCOPSTNPP":
            return "payg_out"
        return "international" if event.get("capability") == "MCOPSTN2" else "overage_domestic"
    return None


def _depends_on_country(event: Mapping[str, Any], kind: str | None) -> bool:
    """Whether a kind is a guess that the destination's country may overrule."""
    derived = not event.get("kind") and bool(event.get("user_country"))
    return derived and kind in ("international", "overage_domestic")


def kind_by(event: Mapping[str, Any], row: Mapping[str, str] | None) -> str | None:
    """What was used, once the row of the deck says where the call went."""
    kind, home_country = kind_of(event), event.get("user_country")
    country = (row or {}).get("Country")
    if not country or not _depends_on_country(event, kind):
        return kind
    return "overage_domestic" if country == home_country else "international"


def _utc(text: str) -> datetime:
    """An instant in UTC; beyond the calendar's ends its first or last one."""
    at = datetime.fromisoformat(text)
    try:
        return at.astimezone(UTC)
    except OverflowError:
        if at.year == 1:
            return datetime.min.replace(tzinfo=UTC)
        return datetime.max.replace(tzinfo=UTC)


class Event(Struct, gc=False):
    """A source record that is an event, as the auditor understands it."""

    place: tuple[str, int, int]
    tenant: str
    source: str
    id: str
    body: dict[str, Any]

    @property
    def started(self) -> datetime:
        """When the leg began."""
        return _utc(self.body["started_at"])

    @property
    def duration_s(self) -> int | None:
        """How long it took, if anything says so."""
        if self.body.get("duration_s") is not None:
            return int(self.body["duration_s"])
        if self.body.get("ended_at"):
            ended = datetime.fromisoformat(self.body["ended_at"])
            return (ended - self.started) // timedelta(seconds=1)
        return None

    @property
    def ended(self) -> datetime:
        """When it ended."""
        seconds = self.duration_s or 0
        try:
            counted = self.started + timedelta(seconds=seconds)
        except OverflowError:
            counted = datetime.max.replace(tzinfo=UTC)
        if self.body.get("ended_at"):
            ended = _utc(self.body["ended_at"])
            if abs(ended - counted) <= timedelta(seconds=1):
                return ended
        return counted

    @property
    def corrected(self) -> tuple[str, str] | None:
        """The event that this one corrects, by source and id."""
        if self.body.get("phase") != "correction" or not self.body.get("corrects"):
            return None
        return self.source, str(self.body["corrects"])

    @property
    def at(self) -> datetime:
        """The instant by which it is too late or from the future."""
        if self.place[0] == topics.RESULT:
            return _utc(self.body["occurred_at"])
        return self.ended

    def says(self) -> tuple[Any, ...]:
        """What matters for money: a repeat must say the same."""
        if self.place[0] not in topics.USAGE:
            kept = {name: value for name, value in self.body.items() if name not in _NOT_SAID}
            return (json.dumps(kept, sort_keys=True),)
        names = (
            *("kind", "call_type", "number_type", "capability", "user_country", "callee"),
            *("currency", "corrects"),
        )
        texts = [str(self.body.get(name)) for name in names]
        return (*texts, self.body.get("phase") or "end", self.started, self.duration_s)


_PLAIN: Final = msgspec.json.Decoder()


def understand(record: Record, topic: str) -> Event | str:
    """The event a record holds, or the group of reasons for which it can hold none."""
    value = record.value
    if not value:
        return "malformed"
    headers = {name.lower(): content for name, content in record.headers}
    if len(value) > 5 and value[0] == 0 and value[5:6] == b"{":
        value = value[5:]
    try:
        body = _PLAIN.decode(value)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return "malformed"
    event_id = source = subject = None
    if headers.get("content-type", b"").lower().startswith(b"application/cloudevents+json"):
        if not isinstance(body, dict) or "data" not in body:
            return "malformed"
        event_id, source, subject = body.get("id"), body.get("source"), body.get("subject")
        body = body["data"]
    elif "ce_specversion" in headers:
        try:
            event_id = headers.get("ce_id", b"").decode()
            source = headers.get("ce_source", b"").decode()
            subject = headers["ce_subject"].decode() if "ce_subject" in headers else None
        except UnicodeDecodeError:
            return "malformed"
    if not isinstance(body, dict):
        return "malformed"
    event_id = event_id or body.get(_ID_MEMBER[topic])
    source = source or body.get("source") or topic
    tenant = subject or body.get("tenant_id")
    if record.key is None:
        return "key"
    key = record.key.decode(errors="replace")
    if tenant is not None and tenant != key:
        return "key"
    if not isinstance(event_id, str) or not event_id:
        return "malformed"
    place = (topic, record.partition, record.offset)
    return Event(place, key, str(source), event_id, body)


def is_sound(record: Record, event: Event) -> bool:
    """Whether a record is beyond doubt an event of its topic, envelope and all."""
    headers = {name.lower(): content for name, content in record.headers}
    outer: Mapping[str, Any] = {}
    if headers.get("content-type", b"").lower().startswith(b"application/cloudevents+json"):
        value = record.value or b""
        outer = _PLAIN.decode(value[5:] if value[:1] == b"\0" else value)
        if not all(isinstance(outer.get(one), str) for one in ("specversion", "type")):
            return False
    elif "ce_specversion" in headers:
        try:
            outer = {
                name[3:]: headers[name].decode()
                for name in ("ce_id", "ce_source", "ce_subject")
                if name in headers
            }
        except UnicodeDecodeError:
            return False
    inner = (
        event.body.get(_ID_MEMBER[event.place[0]]),
        event.body.get("source"),
        event.body.get("tenant_id"),
    )
    if outer:
        said = (outer.get("id"), outer.get("source"), outer.get("subject"))
        if not all(isinstance(one, str) and one for one in said if one is not None):
            return False
        if said[0] is None or said[1] is None:
            return False
        if any(one not in (None, other) for one, other in zip(inner[:2], said[:2], strict=True)):
            return False
    elif "ce_specversion" in headers:
        return False
    texts = (event.id, event.source)
    return (
        all(len(one.encode()) <= 255 for one in texts)
        and inner[2] in (None, event.tenant)
        and TENANT.fullmatch(event.tenant) is not None
        and fits(event.place[0], event.body)
    )


# -- the audit of one partition ------------------------------------------------------------------


class Entry(Struct, gc=False):
    """What the audit keeps of a ledger entry."""

    tenant: str
    seq: int
    kind: str
    amount: int
    place: tuple[str, int, int]
    identity: tuple[str, str]
    payment: str | None
    at: datetime
    booked_at: datetime
    deck: tuple[str, str] | None
    links: dict[str, Any]
    pools: list[dict[str, Any]] = []
    recharge_id: str | None = None
    # Of what lots it takes or makes, and when the one that it makes ends.
    lots: tuple[str, ...] = ()
    ends: datetime | None = None

    @property
    def name(self) -> str:
        """What it is called in a verdict."""
        return f"{self.tenant}/{self.seq}"

    @property
    def minutes(self) -> int:
        """Included minutes that it took."""
        return sum(one["minutes"] for one in self.pools)


def _deck_of(entry: Mapping[str, Any]) -> tuple[str, str] | None:
    rate = entry.get("rate")
    return None if rate is None else (rate.get("deck", "default"), rate["version"])


class Lot(Struct):
    """What the ledger says of a lot: what is left, when it ends, what was left when it did, and
    whether it was voided."""

    left: int = 0
    ends: datetime | None = None
    lapsed: int = 0
    void: bool = False

    def copy(self) -> "Lot":
        """As it is now."""
        return Lot(self.left, self.ends, self.lapsed, self.void)


class Asked(Struct, gc=False):
    """What commands say of a lot by the name it gets: how much, from when until when, whether it
    comes again, how often it was asked for and how often it came. Not `known` is a lot whose
    command has left its topic, not `dated` one whose end nothing says."""

    amount: int = 0
    again: bool = False
    since: datetime | None = None
    ends: datetime | None = None
    dated: bool = True
    known: bool = True
    times: int = 0
    came: int = 0


class Charge(Struct, gc=False):
    """A charge that may be corrected, of money or of included minutes alone: the number of its
    event's identity, and the entry that has reversed it. `minutes` are pool, month and count."""

    tenant: str
    seq: int
    number: int
    amount: int
    at: datetime
    booked_at: datetime
    taken: int | None = None
    minutes: list[Line] = []


class Fold(Struct):
    """A tenant's ledger, folded; `reopened` are lots that are over and have money by an event,
    `gone` lots that are empty: a correction may give something back to them."""

    seq: int = 0
    balance: int = 0
    overdraft: int = 0
    head: bytes = _ZEROS
    lots: dict[str, Lot] = {}
    cause: tuple[Any, ...] = ()
    reopened: set[str] = set()
    gone: dict[str, Lot] = {}

    def copy(self) -> "Fold":
        """As it is now."""
        lots = {name: lot.copy() for name, lot in self.lots.items()}
        gone = {name: lot.copy() for name, lot in self.gone.items()}
        return Fold(self.seq, self.balance, self.overdraft, self.head, lots, gone=gone)


# What is booked of a payment, the status that says it, and its sign.
_SAID_AS: Final = (
    ("credit", "succeeded", 1),
    ("refund", "refunded", -1),
    ("dispute", "dispute_opened", -1),
)


class Log(Struct, kw_only=True):
    """What was read of one partition. `rows` is the fold of the changelog, read before the rest;
    `starts` the log starts of the topics that do not keep their records, `begun` the offsets at
    which an earlier audit has ended."""

    partition: int
    rows: dict[bytes, bytes]
    records: dict[str, Iterable[Record]]
    starts: dict[str, int] = {}
    begun: dict[str, int] = {}

    def gone(self, topic: str) -> range:
        """The offsets whose records have left their topic before an audit could read them."""
        return range(self.begun.get(topic, 0), self.starts.get(topic, 0))

    def complete_since(self, topic: str) -> datetime:
        """From when on everything that was written to a topic has been read."""
        if not self.gone(topic):
            return _FIRST
        first = next(iter(self.records.get(topic, ())), None)
        if first is None:
            return datetime.max.replace(tzinfo=UTC)
        # Clocks of those who write differ a little.
        return _EPOCH + timedelta(milliseconds=first.timestamp) + timedelta(hours=1)


class _Partition:
    """The audit of one partition."""

    def __init__(
        self,
        report: Report,
        log: Log,
        *,
        names: Mapping[str, str],
        partitions: int,
        decks: Sequence[Deck],
        options: Options,
        moves: "Moves",
        coverage: Coverage,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        self.report = report
        self.log = log
        self.names = names
        self.partitions = partitions
        self.decks = {(deck.name, deck.version): deck for deck in decks}
        self.assigned: dict[str, set[str]] = {}
        self.options = options
        self.moves = moves
        self.coverage = coverage
        self.zones: dict[str, str] = {}
        self.licences: dict[str, list[Licence]] = {}
        self.calls: dict[tuple[str, int, int], Call] = {}
        self.used: dict[str, dict[tuple[str, str], int]] = {}
        self.rows: dict[str, list[Any]] = {}
        self.held: dict[str, list[int]] = {}
        self.position: dict[str, Any] = {}
        self.folds: dict[str, Fold] = {}
        self.at_row: dict[str, Fold] = {}
        self.entries: dict[tuple[str, int, int], list[Entry]] = {}
        self.by_payment: dict[tuple[str, str, str], int] = {}
        # Lots by tenant and name: the entries that put them in, and what was asked for.
        self.granted: dict[tuple[str, str], list[Entry]] = {}
        self.asked: dict[tuple[str, str], Asked] = {}
        # The answers to commands by the offset of each, and what was answered when to those that
        # do not say it.
        self.answered: dict[int, tuple[str, datetime | None]] = {}
        self.unplaced: dict[tuple[str, str], list[tuple[str, datetime | None]]] = {}
        self.letters: dict[tuple[str, int, int], list[Record]] = {}
        self.requests: dict[str, dict[str, dict[str, Any]]] = {}
        self.answers: dict[str, set[str]] = {}
        self.currencies: dict[str, str] = {}
        self.opened: dict[str, datetime] = {}
        # Since when a tenant is known at the latest, and the most that it had or owed.
        self.known_since: dict[str, datetime] = {}
        self.peaks: dict[str, int] = {}
        # What else comes under the identities of conflicts.
        self.disputed: dict[tuple[str, str], list[Event]] = {}
        self.closed: set[str] = set()
        self.heads: dict[str, Fold] = {}
        self.identities: set[int] = set()
        self.foreign_deck: str | None = None
        self.paid: dict[tuple[str, ...], dict[str, int]] = {}
        # Of payments that commands have booked, how much.
        self.by_hand: dict[tuple[str, str], int] = {}
        # Payments that cannot be reckoned: what was asked for, or answered, has left its topic.
        self.gone: set[tuple[str, str]] = set()
        self._since: dict[str, datetime] = {}
        # Records whose dead letter, if there was one, has left its topic.
        self.lost: set[tuple[str, int, int]] = set()
        # Corrections by identity: those that were neither refused nor strayed, and those refused.
        self.corrections: dict[tuple[str, str], list[Event]] = {}
        self.refused: list[tuple[Event, datetime]] = []
        self.charges: dict[tuple[str, int], Charge] = {}
        self.public: dict[str, dict[str, Any]] = {}
        self.settled: set[tuple[str, str]] = set()
        self.earlier = earlier
        if earlier is not None:
            self.identities = set(earlier["ids"])
            self.assigned = {one: set(decks) for one, decks in earlier.get("assigned", {}).items()}
            self.zones = dict(earlier.get("zones", {}))
            self.licences = {
                tenant: [msgspec.convert(one, Licence) for one in known]
                for tenant, known in earlier.get("licences", {}).items()
            }
            for tenant, pool, month, minutes in earlier.get("used", ()):
                self.used.setdefault(tenant, {})[pool, month] = minutes
            self.requests = {tenant: dict(known) for tenant, known in earlier["requests"].items()}
            self.answers = {one: set(said) for one, said in earlier["answers"].items()}
            self.by_hand = {
                (tenant, payment): amount for tenant, payment, amount in earlier.get("by_hand", ())
            }
            self.paid = {tuple(key.split("\0")): said for key, said in earlier["paid"].items()}
            self.by_payment = {
                (tenant, payment, group): int(amount)
                for tenant, payment, group, amount in earlier["booked"]
            }
            if "by_hand" not in earlier:
                # What no result had said was booked by hand.
                self.by_hand = {
                    (tenant, payment): amount
                    for (tenant, payment, group), amount in self.by_payment.items()
                    if group == "credit" and (tenant, payment) not in self.paid
                }
            self.asked = {
                (tenant, made): msgspec.convert(one, Asked)
                for tenant, made, one in earlier.get("asked", ())
            }
            self.settled = {(key[0], key[1]) for key in (*self.paid, *self.by_payment)}
            known = [msgspec.convert(one, Charge) for one in earlier.get("charges", ())]
            self.charges = {(one.tenant, one.seq): one for one in known}
            self.heads = {
                tenant: Fold(
                    seq,
                    int(balance),
                    int(overdraft),
                    bytes.fromhex(head),
                    {
                        name: Lot(
                            int(left), None if ends is None else _utc(ends), int(lapsed), void
                        )
                        for name, (left, ends, lapsed, void) in lots.items()
                    },
                )
                for tenant, (seq, balance, overdraft, head, lots) in earlier["tenants"].items()
            }
            self.known_since = dict.fromkeys(self.heads, _FIRST)

    def complete_since(self, topic: str) -> datetime:
        """From when on everything that was written to a topic has been read, in this audit or in an
        earlier one; one that did not say so had not read all of it."""
        found = self._since.get(topic)
        if found is None:
            earlier = _FIRST
            if self.earlier is not None and "since" in self.earlier:
                earlier = _utc(self.earlier["since"].get(topic, _FIRST.isoformat()))
            elif self.earlier is not None and self.position:
                earlier = _utc(self.position["now"])
            found = self._since[topic] = max(earlier, self.log.complete_since(topic))
        return found

    def complete(self, topic: str) -> bool:
        """Whether everything that was ever written to a topic has been read."""
        return self.complete_since(topic) == _FIRST

    def wanted(self, tenant: str) -> bool:
        """Whether this tenant is looked at."""
        return self.options.tenant is None or tenant == self.options.tenant

    def next_of(self, topic: str) -> int:
        """Offsets below this are booked."""
        source = self.position.get("sources", {}).get(self.names[topic])
        return int(source["next"]) if source else 0

    def below(self, place: tuple[str, int, int]) -> bool:
        """Whether a place is below the position (ticks have no place and always are)."""
        return place[0] == "tick" or place[2] < self.next_of(place[0])

    def run(self) -> None:
        """Everything, in an order in which each step has what it needs."""
        self._rows()
        self._read_as_far()
        self._ledger()
        self._balances()
        self._letters()
        self._requests()
        self._begin_recharges()
        self._commands()
        self._grants()
        self._results()
        self._usage()
        self._conflicts()
        self._corrections()
        self._pools()
        self._causes()
        self._judge_recharges()

    def _misplaced(self, record: Record, what: str) -> None:
        if record.key is not None and home(record.key, self.partitions) != record.partition:
            self.report.violate(
                "partition", f"{what} at {record.topic}/{record.partition}/{record.offset}"
            )

    # rows and ledger

    def _rows(self) -> None:
        raw = self.log.rows.get(_POSITION)
        rows = {key: value for key, value in self.log.rows.items() if key != _POSITION}
        if raw is None:
            if rows:
                self.report.violate(
                    "changelog", f"partition {self.log.partition} has rows but no position row"
                )
            else:
                self._never_booked()
            return
        self.position = json.loads(raw)
        digest = sum(xxh3_64_intdigest(key + value) for key, value in rows.items()) % 2**64
        if len(rows) != self.position["rows"] or f"{digest:016x}" != self.position["digest"]:
            self.report.violate(
                "changelog",
                f"partition {self.log.partition}: {len(rows)} rows with digest {digest:016x}, the "
                f"position row says {self.position['rows']} with {self.position['digest']}",
            )
        for key, value in rows.items():
            tenant = key.partition(b"\0")[0]
            if home(tenant, self.partitions) != self.log.partition:
                self.report.violate("partition", f"the row of {tenant.decode()}")
            mark = key[len(tenant) :].split(b"\0", 2)[1:2]
            if not mark:
                row = msgspec.msgpack.decode(value[8:])
                self.rows[tenant.decode()] = row
                self.currencies[tenant.decode()] = row[2]
                self.report.count("rows")
            elif mark == [b"hold"]:
                self._one_hold(tenant.decode(), value)
        self._exposures()
        self._sums()

    def _never_booked(self) -> None:
        """Without a changelog nothing was ever booked, or it is gone."""
        if self.heads:
            self.report.violate(
                "changelog", f"partition {self.log.partition} had rows and has none any more"
            )
        outputs = (
            topics.LEDGER,
            topics.BALANCE,
            topics.NOTIFICATION,
            topics.REQUESTED,
            *map(topics.dead_letters_of, topics.SOURCES),
        )
        for topic in outputs:
            if next(iter(self.log.records.get(topic, ())), None) is not None:
                self.report.unknown(
                    "changelog",
                    f"partition {self.log.partition} has no rows, but records in "
                    f"{self.names.get(topic, topic)}: it has just begun, or the changelog is gone",
                )

    def _sums(self) -> None:
        """The position row says what the rows' balances sum to, those below zero apart."""
        sums: dict[str, list[int]] = {}
        for row in self.rows.values():
            balance = sum(grant[4] for grant in row[6]) - row[5]
            sums.setdefault(row[2], [0, 0])[balance < 0] += balance
        told = {
            currency: [int(nanos) for nanos in said]
            for currency, said in self.position["balances"].items()
        }
        if any(told.get(one, [0, 0]) != sums.get(one, [0, 0]) for one in told.keys() | sums.keys()):
            self.report.violate(
                "changelog",
                f"partition {self.log.partition}: the balances sum to {sums}, the position row "
                f"says {told}",
            )

    def _read_as_far(self) -> None:
        """The last record of each source that was booked was read, and is the same, unless it has
        left its topic or an earlier audit has read it."""
        for topic in topics.SOURCES:
            source = self.position.get("sources", {}).get(self.names[topic], {})
            last = source.get("last", -1)
            if last < max(0, self.log.starts.get(topic, 0), self.log.begun.get(topic, 0)):
                continue
            place = f"{self.names[topic]}/{self.log.partition}/{last}"
            found = next(
                (one for one in self.log.records.get(topic, ()) if one.offset == last), None
            )
            if found is None:
                self.report.unknown(
                    "at_least_once", f"{place} was booked; the topic was not read as far as that"
                )
            elif (
                xxh3_64_hexdigest((found.key or b"") + b"\0" + (found.value or b""))
                != (source["hash"])
            ):
                self.report.violate(
                    "at_least_once", f"{place} is another record than the one that was booked"
                )

    def _one_hold(self, tenant: str, value: bytes) -> None:
        _, held, _, _, ended, *_ = msgspec.msgpack.decode(value[8:])
        due = _EPOCH + timedelta(microseconds=int.from_bytes(value[:8], "big"))
        now = _utc(self.position["now"])
        if due + _TICK_WITHIN < now or due > now + _HOLD_LIVES:
            self.report.violate("holds", f"a hold of {tenant} dies at {due}, seen at {now}")
        if ended:
            if held:
                self.report.violate("holds", f"an ended call of {tenant} holds {held}")
            return
        self.report.count("holds")
        self.held.setdefault(tenant, []).append(held)

    def _exposures(self) -> None:
        """Sums and counts, in the tenants' rows and in the position row."""
        sums: dict[str, int] = {}
        count = 0
        for tenant, row in self.rows.items():
            held = self.held.pop(tenant, [])
            said = (row[_EXPOSURE], row[_HELD]) if len(row) > _HELD else (0, 0)
            if self.wanted(tenant) and said != (sum(held), len(held)):
                self.report.violate(
                    "holds",
                    f"{said[1]} calls of {tenant} hold {Fraction(said[0], 10**9)} by its row, "
                    f"{len(held)} hold {Fraction(sum(held), 10**9)} by theirs",
                )
            sums[row[2]] = sums.get(row[2], 0) + sum(held)
            count += len(held)
        for tenant in self.held:
            self.report.violate("holds", f"{tenant} has holds but no row")
        told = {one: int(nanos) for one, nanos in self.position.get("exposures", {}).items()}
        differs = any(told.get(one, 0) != sums.get(one, 0) for one in told.keys() | sums.keys())
        if differs or self.position.get("holds", 0) != count:
            self.report.violate(
                "holds", f"partition {self.log.partition}: the position row sums to {told}"
            )

    def _available(self, what: str, public: Mapping[str, Any]) -> None:
        """What is published as available is the balance without the exposure."""
        if "available" not in public:
            return
        exposure = nanos(public.get("exposure", "0"))
        if exposure < 0 or nanos(public["available"]) != nanos(public["balance"]) - exposure:
            self.report.violate("holds", f"{what} has {public['available']} available")

    def _ledger(self) -> None:
        for record in self.log.records.get(topics.LEDGER, ()):
            value = record.value or b""
            entry = json.loads(value)
            tenant = entry["tenant_id"]
            if not self.wanted(tenant):
                continue
            self.report.count("entries")
            self._misplaced(record, f"entry {tenant}/{entry['seq']}")
            if record.key != tenant.encode():
                self.report.violate("partition", f"the key of entry {tenant}/{entry['seq']}")
            fold = self.folds.get(tenant)
            if fold is None:
                start = self.heads.get(tenant, Fold())
                fold = self.folds[tenant] = start.copy()
                self._note_row(tenant, fold)
            self._one_entry(tenant, fold, entry, value)
            self._note_row(tenant, fold)
        for tenant, fold in self.folds.items():
            self._settled(tenant, fold)
        self._compare_rows()

    def _one_entry(self, tenant: str, fold: Fold, entry: dict[str, Any], value: bytes) -> None:
        name = f"{tenant}/{entry['seq']}"
        if entry["seq"] != fold.seq + 1:
            self.report.violate("sequence", f"{name} follows {tenant}/{fold.seq}")
        body, _, rest = value.rpartition(b',"hash":"')
        head = hashlib.sha256(fold.head + body).digest()
        if rest != head.hex().encode() + b'"}':
            self.report.violate("chain", f"{name} does not hash to what it says")
        cause = entry["caused_by"]
        place = (cause["topic"], cause["partition"], cause["offset"])
        if fold.cause != (*place, cause["id"]):
            self._settled(tenant, fold)
            fold.cause = (*place, cause["id"])
        amount = nanos(entry["amount"])
        fold.seq = entry["seq"]
        fold.balance += amount
        if tenant not in self.known_since:
            self.known_since[tenant] = _utc(entry["booked_at"])
        self.peaks[tenant] = max(self.peaks.get(tenant, 0), abs(fold.balance))
        fold.overdraft = nanos(entry.get("overdraft_after", "0"))
        fold.head = bytes.fromhex(entry["hash"])
        if nanos(entry["balance_after"]) != fold.balance:
            self.report.violate(
                "conservation",
                f"{name} says {entry['balance_after']} after it, the entries sum to "
                f"{Fraction(fold.balance, 10**9)}",
            )
        if self._differs(tenant, entry["currency"]):
            self.report.violate(
                "conservation",
                f"{name} is in {entry['currency']}, the account in {self.currencies[tenant]}",
            )
        moved = sum(nanos(grant["amount"]) for grant in entry.get("grants", ()))
        if abs(moved) > abs(amount):
            self.report.violate("conservation", f"{name} moves grants by more than its amount")
        self._lots(name, fold, entry)
        kept = Entry(
            tenant,
            entry["seq"],
            entry["kind"],
            amount,
            place,
            (cause["source"], cause["id"]),
            entry.get("payment_id"),
            datetime.fromisoformat(entry["at"]),
            datetime.fromisoformat(entry["booked_at"]),
            _deck_of(entry),
            entry.get("links") or {},
            entry.get("pools", []),
            entry.get("recharge_id"),
        )
        if kept.kind not in _CHARGES:
            kept.lots = tuple(used["id"] for used in entry.get("grants", ()))
            kept.ends = None if entry.get("expires_at") is None else _utc(entry["expires_at"])
        if kept.kind == "grant" and amount > 0 and kept.lots:
            self.granted.setdefault((tenant, kept.lots[-1]), []).append(kept)
        self.entries.setdefault(place, []).append(kept)
        if kept.payment is not None and self.below(place):
            group = kept.kind if kept.kind not in _CREDITS else "credit"
            if group.startswith("dispute"):
                group = "dispute"
            key = (tenant, kept.payment, group)
            self.by_payment[key] = self.by_payment.get(key, 0) + amount
        if entry["kind"] in _CHARGES:
            self._price(name, entry, amount, kept.minutes)

    def _differs(self, tenant: str, currency: str | None) -> bool:
        """Whether something is in another currency than a tenant's account, as far as that is
        known."""
        return currency is not None and self.currencies.get(tenant, currency) != currency

    def _lots(self, name: str, fold: Fold, entry: dict[str, Any]) -> None:
        """Fold what an entry does to lots, and hold it against their ends."""
        kind, amount = entry["kind"], nanos(entry["amount"])
        at, booked_at = _utc(entry["at"]), _utc(entry["booked_at"])
        for used in entry.get("grants", ()):
            if used["id"] not in fold.lots:
                fold.lots[used["id"]] = fold.gone.pop(used["id"], Lot())
            lot = fold.lots[used["id"]]
            moved = nanos(used["amount"])
            lot.left += moved
            if lot.left != nanos(used["left"]) or lot.left < 0:
                self._bad_lot(name, f"leaves {used['left']} in {used['id']}, which it cannot have")
                lot.left = nanos(used["left"])
            over = lot.ends is not None and lot.ends <= at and lot.ends <= booked_at
            # A correction may charge what it has given back to a lot that is over.
            if over and moved < 0 and kind == "charge" and not entry.get("links"):
                self._bad_lot(name, f"is paid by {used['id']}, which had expired")
            if kind in ("expiry", "void") and lot.left:
                self._bad_lot(name, f"leaves something in {used['id']}")
            if kind == "void":
                lot.void = True
            elif kind == "reversal" and (lot.void or (lot.ends and lot.ends <= booked_at)):
                fold.reopened.add(used["id"])
            if kind == "expiry":
                lot.lapsed -= moved
                if lot.ends is None or lot.ends != at or booked_at < at:
                    self._bad_lot(name, f"ends {used['id']} at another time than its own")
            elif kind == "expiry_reopened":
                lot.lapsed -= moved
                fold.reopened.add(used["id"])
                late = lot.ends is None or at >= lot.ends or booked_at >= lot.ends + _GRACE
                if late or moved <= 0 or lot.lapsed < 0:
                    self._bad_lot(name, f"takes back from {used['id']} what had not expired")
        makes = kind in _MAKES or (kind == "reversal" and "expires_at" in entry)
        if makes and amount > 0 and entry.get("grants"):
            made = entry["grants"][-1]["id"]
            ends = entry.get("expires_at")
            fold.lots[made].ends = None if ends is None else _utc(ends)
        for used in entry.get("grants", ()):
            known = fold.lots.get(used["id"])
            if known is not None and not known.left and not known.lapsed:
                fold.gone[used["id"]] = fold.lots.pop(used["id"])
        left = sum(lot.left for lot in fold.lots.values())
        if left - fold.overdraft != fold.balance:
            self._bad_lot(name, f"has {Fraction(left, 10**9)} in lots, which is not the balance")

    def _settled(self, tenant: str, fold: Fold) -> None:
        """What must hold between events."""
        for name in fold.reopened:
            if name in fold.lots and fold.lots[name].left:
                self._bad_lot(f"{tenant}/{fold.seq}", f"leaves money in {name}, which is over")
        fold.reopened = set()
        if fold.overdraft and any(lot.left for lot in fold.lots.values()):
            self._bad_lot(f"{tenant}/{fold.seq}", "leaves a lot beside an overdraft")

    def _bad_lot(self, name: str, what: str) -> None:
        self.report.violate("lots", f"{name} {what}")

    def _note_grant(self, event: Event, answered_at: datetime | None) -> None:
        """Remember what a grant that was not refused asks for."""
        body = event.body
        since = _utc(body["effective_at"]) if body.get("effective_at") else None
        ends, dated = None, True
        if body.get("expires_at"):
            ends = _utc(body["expires_at"])
        elif body.get("kind") == "paid":
            # Bought money lasts for a year.
            dated = answered_at is not None
            ends = None if answered_at is None else _a_year_later(max(since or _FIRST, answered_at))
        earlier = self.asked.get((event.tenant, _lot_of(event)), Asked())
        self.asked[event.tenant, _lot_of(event)] = Asked(
            nanos(body["amount"]["amount"]),
            bool(body.get("every_days") or body.get("every_months")),
            since,
            ends,
            dated,
            times=earlier.times + 1,
            came=earlier.came,
        )

    def _grants(self) -> None:
        """Lots came as they were asked for: with their amount, not before their time, to their
        end, and once unless they come again."""
        for (tenant, made), entries in self.granted.items():
            asked = self.asked.get((tenant, made))
            if asked is None:
                by_time = [one for one in entries if one.place[0] == "tick"]
                if by_time and self.complete(topics.COMMAND):
                    self._uncaused(by_time[0], f"puts in {made}, which nobody asked for")
                elif by_time:
                    self.report.unknown("cause", "the commands that gave lots are no longer there")
                    # The next audit judges what comes.
                    self.asked[tenant, made] = Asked(known=False)
                continue
            asked.came += len(entries)
            if not asked.known:
                continue
            if any(
                one.amount > asked.amount or (not asked.again and one.amount != asked.amount)
                for one in entries
            ):
                self._bad_lot(tenant, f"was granted another amount as {made} than asked for")
            if asked.since is not None and any(one.at < asked.since for one in entries):
                self._bad_lot(tenant, f"was granted {made} before its time")
            if asked.dated and any(one.ends != asked.ends for one in entries):
                self._bad_lot(tenant, f"was granted {made} to another end than asked for")
            if not asked.again and asked.came > asked.times:
                self._bad_lot(tenant, f"was granted {made} {asked.came} times")

    def _price(self, name: str, entry: dict[str, Any], amount: int, minutes: int) -> None:
        rate = entry["rate"]
        deck = self.decks.get(_deck_of(entry) or ("", ""))
        if deck is None:
            self.foreign_deck = str(rate["version"])
            self.report.unknown(
                "price", f"the deck {rate['version']} is not at hand; name it with --deck"
            )
            return
        rows = deck.rows_of(rate["prefix"])
        if not rows:
            self.report.violate("price", f"{name}: the deck has no prefix {rate['prefix']}")
            return
        if rate.get("started_at") is not None:
            return  # its price hangs on the instant and on other rows: judged with its event
        row = rows[0]
        rest_s = rate["duration_s"] - 60 * minutes
        costs = [deck.cost(row, rest_s) for row in rows]
        cost = costs[0]
        if -amount not in costs:
            self.report.violate(
                "price",
                f"{name}: {rest_s} s at {row['Price / min']} cost "
                f"{Fraction(cost, 10**9)}, charged {Fraction(-amount, 10**9)}",
            )

    def _note_row(self, tenant: str, fold: Fold) -> None:
        row = self.rows.get(tenant)
        if row is not None and row[3] == fold.seq:
            self.at_row[tenant] = fold.copy()

    def _compare_rows(self) -> None:
        for tenant, row in self.rows.items():
            if not self.wanted(tenant):
                continue
            _, _, _, seq, head, overdraft, grants, *_ = row
            fold = self.at_row.get(tenant)
            if fold is None and tenant in self.heads and self.heads[tenant].seq == seq:
                fold = self.heads[tenant]
            if fold is None and seq == 0:
                fold = Fold()
            if fold is None:
                last = self.folds.get(tenant, Fold()).seq
                self.report.violate(
                    "changelog", f"the row of {tenant} is at seq {seq}, its ledger ends at {last}"
                )
                continue
            if bytes(head) != fold.head:
                self.report.violate("changelog", f"the row of {tenant} has another chain head")
            balance = sum(grant[4] for grant in grants) - overdraft
            if balance != fold.balance or overdraft != fold.overdraft:
                self.report.violate(
                    "conservation",
                    f"the row of {tenant} holds {Fraction(balance, 10**9)}, its entries sum to "
                    f"{Fraction(fold.balance, 10**9)}",
                )
            if any(grant[4] < 0 for grant in grants):
                self.report.violate("conservation", f"a grant of {tenant} is below zero")
            left = {name: lot.left for name, lot in fold.lots.items() if lot.left}
            if {grant[0]: grant[4] for grant in grants} != left:
                self._bad_lot(f"the row of {tenant}", "has other lots than its entries made")
        for tenant in self.folds.keys() - self.rows.keys():
            if any(
                self.below(place)
                for place, entries in self.entries.items()
                if entries[0].tenant == tenant
            ):
                self.report.violate("changelog", f"{tenant} has entries but no row")

    def _balances(self) -> None:
        latest: dict[str, dict[str, Any]] = {}
        for record in self.log.records.get(topics.BALANCE, ()):
            self._misplaced(record, "balance")
            if record.value is not None:
                public = json.loads(record.value)
                latest[public["tenant_id"]] = public
        self.public = {tenant: public for tenant, public in latest.items() if self.wanted(tenant)}
        for tenant, public in latest.items():
            if not self.wanted(tenant):
                continue
            self._available(f"the balance of {tenant}", public)
            if self._differs(tenant, public.get("currency")):
                self.report.violate(
                    "conservation", f"the balance of {tenant} is published in another currency"
                )
            for fold in (self.at_row.get(tenant), self.folds.get(tenant)):
                if fold is not None and fold.seq == public["seq"]:
                    if nanos(public["balance"]) != fold.balance:
                        self.report.violate(
                            "conservation",
                            f"the balance of {tenant} is published as {public['balance']}",
                        )
                    if public["hash"] != fold.head.hex():
                        self.report.violate("chain", f"the published head of {tenant}")
        for tenant in self.rows:
            known = tenant in latest or self.options.checkpoint_from is not None
            if self.wanted(tenant) and not known:
                self.report.violate("conservation", f"no balance of {tenant} is published")

    # dead letters, requests, commands, results

    def _letters(self) -> None:
        for topic in topics.SOURCES:
            for record in self.log.records.get(topics.dead_letters_of(topic), ()):
                headers = dict(record.headers)
                place = (
                    topic,
                    int(headers["credits-dlq-partition"]),
                    int(headers["credits-dlq-offset"]),
                )
                self.letters.setdefault(place, []).append(record)
                reason = headers["credits-dlq-reason"].decode()
                if reason == "conflict":
                    event = understand(record, topic)
                    if not isinstance(event, str):
                        self.disputed.setdefault((event.source, event.id), [])
                letters = self.report.dead_letters
                letters[reason] = letters.get(reason, 0) + 1

    def _requests(self) -> None:
        for record in self.log.records.get(topics.REQUESTED, ()):
            request = json.loads(record.value or b"")
            tenant = request["tenant_id"]
            if not self.wanted(tenant):
                continue
            self.report.count("requests")
            self._misplaced(record, f"request {request['recharge_id']}")
            self._available(f"request {request['recharge_id']}", request)
            of_tenant = self.requests.setdefault(tenant, {})
            request.pop("expires_at")
            first = of_tenant.setdefault(request["recharge_id"], request)
            if first != request:
                self.report.violate(
                    "one_request",
                    f"{request['recharge_id']} of {tenant} was published again, but changed",
                )
        for tenant, of_tenant in self.requests.items():
            attempts: dict[tuple[int, int], str] = {}
            for request in of_tenant.values():
                if request["epoch"] is None:
                    continue
                attempt = (request["epoch"], request["attempt"])
                derived = str(uuid.uuid5(_RECHARGES, f"{tenant}/{attempt[0]}/{attempt[1]}"))
                if attempts.setdefault(attempt, request["recharge_id"]) != request["recharge_id"]:
                    self.report.violate(
                        "one_request", f"{tenant} has two ids for epoch, attempt {attempt}"
                    )
                if derived != request["recharge_id"]:
                    self.report.violate(
                        "one_request", f"{request['recharge_id']} of {tenant} is not derived"
                    )

    def _source(self, topic: str) -> Iterable[tuple[Record, Event | str, bool]]:
        """Source records with what they hold and whether they are below the position."""
        reached = self.next_of(topic)
        for record in self.log.records.get(topic, ()):
            for name, text in record.headers:
                if name == "credits-moved-from":
                    self.moves.arrived(topic, text.decode(), record)
            event = understand(record, topic)
            if (
                not isinstance(event, str)
                and record.offset < reached
                and (event.source, event.id) in self.disputed
            ):
                self.disputed[event.source, event.id].append(event)
            self._note_source(record, event, record.offset < reached)
            yield record, event, record.offset < reached

    # recharges

    def _begin_recharges(self) -> None:
        """Which requests look for their causes."""
        log = self.log
        asked = (topics.REQUESTED, topics.RESULT, topics.NOTIFICATION)
        self.recharges = Recharges(
            until=_utc(self.position["now"]) if self.position else None,
            since={topic: self.complete_since(topic) for topic in asked},
            trimmed=[self.names[topic] for topic in topics.SOURCES if log.gone(topic)],
            whole=self.earlier is None and not log.begun,
            earlier=None if self.earlier is None else self.earlier.get("recharges"),
        )
        self.recharges.wants(self.requests)

    def _note_source(self, record: Record, event: Event | str, below: bool) -> None:
        """What a source record has to do with recharges."""
        if isinstance(event, str) or not self.wanted(event.tenant):
            if not below:
                self.recharges.behind()
            return
        self.recharges.record(
            event.place,
            event.tenant,
            f"{event.source}/{event.id}",
            event.body,
            refused=bool(self._reasons(event.place)) or self._is_misplaced(record),
            below=below,
        )

    def _judge_recharges(self) -> None:
        of_tenant: dict[str, list[Entry]] = {}
        for entries in self.entries.values():
            for one in entries:
                of_tenant.setdefault(one.tenant, []).append(one)
        moved: dict[str, list[Moved]] = {}
        for tenant, entries in of_tenant.items():
            balance = self.heads.get(tenant, Fold()).balance
            moved[tenant] = []
            for one in sorted(entries, key=lambda one: one.seq):
                balance += one.amount
                moved[tenant].append(
                    Moved(
                        one.seq,
                        one.kind,
                        balance,
                        one.booked_at.astimezone(UTC),
                        one.place,
                        "/".join(one.identity),
                        one.payment,
                        one.recharge_id,
                    )
                )
        for fault in self.recharges.judge(
            self.requests, moved, self.public, settled=self.settled, answered=self.answers
        ):
            if fault.proven:
                self.report.violate(fault.invariant, fault.text)
            else:
                self.report.unknown(fault.invariant, fault.text)

    def _notices(self) -> dict[tuple[str, str], int]:
        """Read what was told, the answers to commands among it; how many of these there are by
        tenant and command."""
        counts: dict[tuple[str, str], int] = {}
        for record in self.log.records.get(topics.NOTIFICATION, ()):
            self._misplaced(record, "notice")
            tenant, notice = (record.key or b"").decode(), json.loads(record.value or b"")
            if self.wanted(tenant):
                self.recharges.notice(tenant, notice)
            if not notice["notice"].startswith("command_"):
                continue
            key = (tenant, notice["command_id"])
            counts[key] = counts.get(key, 0) + 1
            at = _utc(notice["at"]) if notice.get("at") else None
            answer = (notice["notice"], at)
            # Its id says to which record it is the answer: tenant/topic/partition/offset/number.
            place = dict(record.headers).get("ce_id", b"").decode().split("/")
            if place[1:3] == [topics.COMMAND, str(self.log.partition)] and len(place) == 5:
                self.answered[int(place[3])] = answer
            else:
                self.unplaced.setdefault(key, []).append(answer)
        return counts

    def _answer_to(self, event: Event) -> tuple[str, datetime | None]:
        """What was answered to a command, and when; nothing where there is no answer yet."""
        if event.place[2] not in self.answered:
            answers = self.unplaced.get((event.tenant, event.id))
            if not answers:
                return "", None
            self.answered[event.place[2]] = answers.pop(0)
        return self.answered[event.place[2]]

    def _commands(self) -> None:
        found = self._notices()
        expected: dict[tuple[str, str], tuple[int, int]] = {}
        for record, event, below in self._source(topics.COMMAND):
            if isinstance(event, str):
                self._must_be_letter(record, topics.COMMAND, below, event)
                continue
            if not self.wanted(event.tenant):
                continue
            self.report.count("commands")
            reasons = self._reasons(event.place)
            self._plausible(record, event, reasons)
            if reasons - {"conflict"}:
                continue
            least, most = expected.get((event.tenant, event.id), (0, 0))
            self._bytes_kept(record, event.place)
            answered = below and event.place not in self.lost
            expected[event.tenant, event.id] = (least + answered, most + 1)
            answer, answered_at = self._answer_to(event)
            if below:
                self._commanded(event, answer, answered_at)
            if "conflict" in reasons:  # refused for the one whose id it took, and nothing else
                continue
            self._note_tenant(event)
            if answer == "command_applied":
                if event.body.get("command") == "open_tenant" and answered_at is not None:
                    known = self.known_since.get(event.tenant, answered_at)
                    self.known_since[event.tenant] = min(known, answered_at)
                self._note_licences(event, answered_at or _FIRST)
                if event.body.get("command") == "resolve_recharge":
                    # A person's word is an answer too.
                    self.answers.setdefault(event.body["recharge_id"], set()).add("resolved")
            if event.body.get("command") == "grant" and answer in ("command_applied", ""):
                self._note_grant(event, answered_at)
        for (tenant, command_id), (least, most) in expected.items():
            answers = found.get((tenant, command_id), 0)
            if not least <= answers <= most:
                self.report.violate(
                    "answered",
                    f"command {command_id} of {tenant}: {least} asked, {answers} answers",
                )

    def _commanded(self, event: Event, answer: str, answered_at: datetime | None) -> None:
        """What a command has booked is what it asks for, once, and nothing unless it was
        applied."""
        body, entries = event.body, self.entries.get(event.place, [])
        if answer != "command_applied":
            # Without an answer nobody can say; that is a fault of its own.
            if answer and entries:
                self._uncaused(entries[0], "has booked though the command was not applied")
            return
        word = str(body.get("command"))
        asked: int | None = None
        least = most = 0
        if word in ("adjustment", "book_payment") or (
            word == "resolve_recharge" and body.get("paid")
        ):
            asked, least, most = nanos(body["amount"]["amount"]), 1, 1
        elif word == "open_tenant":
            asked = nanos(body.get("opening_balance") or "0")
            least = most = int(asked != 0)
        elif word == "grant":
            # How much of which lot: see `_grants`. What begins later is put in by a tick.
            since = _utc(body["effective_at"]) if body.get("effective_at") else None
            least = int(since is None or (answered_at is not None and since <= answered_at))
            most = int(since is None or answered_at is None or since <= answered_at)
        elif word == "void":
            most = 1
        if body.get("payment_id") and asked is not None:
            # Refunds and disputes of it come as results, and so may its success.
            self.by_hand[event.tenant, body["payment_id"]] = asked
        kinds = _OF_COMMAND.get(word, set())
        booked = [one for one in entries if one.kind in kinds]
        for one in entries:
            if one.kind not in kinds and one.kind != "expiry_reopened":
                self._uncaused(one, f"is {one.kind}, which {word} cannot book")
        if not least <= len(booked) <= most:
            self.report.violate(
                "cause", f"{event.id} of {event.tenant} ({word}) was booked {len(booked)} times"
            )
        money = body.get("amount") if word in _OF_COMMAND or word == "fund" else None
        if isinstance(money, dict) and self._differs(event.tenant, money.get("currency")):
            self.report.violate("cause", f"{event.id} of {event.tenant} is in another currency")
        for one in booked:
            if asked is not None and one.amount != asked:
                self._uncaused(one, f"is not the {Fraction(asked, 10**9)} that were asked for")
            named = body.get("payment_id") if word in _OF_PAYMENTS else None
            if one.payment != named:
                self._uncaused(one, f"is of the payment {one.payment}, not of {named}")
            if word == "void" and (one.amount > 0 or one.lots != (body["grant_id"],)):
                self._uncaused(one, f"takes {one.lots}, not {body['grant_id']}")
            if word == "grant" and (one.amount <= 0 or one.lots[-1:] != (_lot_of(event),)):
                self._bad_lot(one.name, f"puts in {one.lots[-1:]}, not {_lot_of(event)}")
            until = body.get("expires_at") if word == "adjustment" and one.amount > 0 else None
            if until is not None and one.ends != _utc(until):
                self._uncaused(one, f"ends at {one.ends}, not at {until}")

    def _caused(self, event: Event, entries: Sequence[Entry]) -> None:
        """What usage or a result has booked is of a kind that it can book. How much is judged with
        prices, corrections and payments."""
        body = event.body
        if event.place[0] == topics.RESULT:
            kinds = _OF_RESULT.get(str(body.get("status")), set())
            booked = [one for one in entries if one.kind in kinds]
            if len(booked) > 1:
                self._uncaused(booked[1], f"is booked after {booked[0].name} by the same result")
            for one in booked:
                if one.payment != body.get("payment_id"):
                    self._uncaused(one, f"is of the payment {one.payment}, not of its result's")
            kinds = {*kinds, "expiry_reopened"}
        elif body.get("phase") == "correction":
            kinds = _OF_CORRECTION
            # What a lot cannot keep goes again; no more than has come back.
            back = sum(one.amount for one in entries if one.kind == "reversal")
            gone = [one for one in entries if one.kind in ("void", "grant")]
            if any(one.amount > 0 for one in gone) or back < -sum(one.amount for one in gone):
                self._uncaused(gone[0], "moves more than the correction has brought back")
        else:
            kinds = _OF_USAGE
        for one in entries:
            if one.kind not in kinds:
                self._uncaused(one, f"is {one.kind}, which a record of {one.place[0]} cannot book")

    def _uncaused(self, entry: Entry, what: str) -> None:
        self.report.violate("cause", f"{entry.name} {what}")

    def _note_tenant(self, event: Event) -> None:
        body = event.body
        if body.get("command") == "open_tenant":
            self.currencies.setdefault(event.tenant, str(body.get("currency")))
            if body.get("billing_from"):
                since = datetime.fromisoformat(body["billing_from"])
                self.opened[event.tenant] = max(since, self.opened.get(event.tenant, since))
        elif body.get("command") == "close_tenant":
            self.closed.add(event.tenant)
        elif body.get("command") == "tariff_assignment":
            self.assigned.setdefault(event.tenant, set()).add(str(body.get("deck")))

    def _note_licences(self, event: Event, at: datetime) -> None:
        body = event.body
        if body.get("command") == "open_tenant":
            self.zones.setdefault(event.tenant, str(body.get("time_zone") or "UTC"))
        elif body.get("command") == "licences":
            since = _utc(body["effective_from"]) if body.get("effective_from") else at
            country = str(body.get("country") or "")
            self.licences.setdefault(event.tenant, []).append(
                Licence(body["capability"], country, body["count"], since, at)
            )

    def _results(self) -> None:
        paid = self.paid
        for record, event, below in self._source(topics.RESULT):
            if isinstance(event, str):
                self._must_be_letter(record, topics.RESULT, below, event)
                continue
            if not self.wanted(event.tenant):
                continue
            self.report.count("results")
            self._bytes_kept(record, event.place)
            reasons = self._reasons(event.place)
            if reasons:
                self._plausible(record, event, reasons)
                continue
            if self._is_misplaced(record):
                if below:
                    self.moves.expect(topics.RESULT, record)
                continue
            body = event.body
            if body["status"] in _TERMINAL:
                # Also one beyond the position: what was asked for after it is looked at, too.
                self.answers.setdefault(body["recharge_id"], set()).add(body["status"])
            if not below:
                continue
            if event.place in self.lost and body["status"] in _OF_RESULT:
                if event.place not in self.entries:
                    self.gone.add((event.tenant, body["payment_id"]))
                    continue
            amount = 0
            if body.get("amount"):
                amount = nanos(body["amount"]["amount"])
                currency = body["amount"]["currency"]
                if body["status"] in _OF_RESULT and self._differs(event.tenant, currency):
                    self.report.violate(
                        "credit_once", f"{event.place} is in {currency}, and was not refused"
                    )
            elif body["status"] == "succeeded":
                asked = self.requests.get(event.tenant, {}).get(body["recharge_id"])
                if asked is None and not self.complete(topics.REQUESTED):
                    self.gone.add((event.tenant, body["payment_id"]))
                amount = nanos(asked["amount"]) if asked else 0
            key = (event.tenant, body["payment_id"])
            of_payment = paid.setdefault(key, {})
            if not body.get("amount") and str(body["status"]).startswith("dispute_"):
                # All of what was paid.
                amount = self._paid(key)
            of_payment[body["status"]] = max(of_payment.get(body["status"], 0), amount)
        self._compare_payments()
        self._one_in_flight()

    def _paid(self, key: tuple[str, str]) -> int:
        """How much of a payment has come, by what results or commands say."""
        return max(self.paid[key].get("succeeded", 0), self.by_hand.get(key, 0))

    def _compare_payments(self) -> None:
        of_results = [
            (entry.tenant, entry.payment, place[2])
            for place, entries in self.entries.items()
            if place[0] == topics.RESULT and self.below(place)
            for entry in entries
            if entry.payment is not None
        ]
        from_results = {(tenant, payment) for tenant, payment, _ in of_results}
        left = self.log.gone(topics.RESULT)
        answered = {(tenant, payment) for tenant, payment, offset in of_results if offset in left}
        for topic, of_topic in ((topics.REQUESTED, self.gone), (topics.RESULT, answered)):
            if of_topic:
                self.report.unknown(
                    "credit_once",
                    f"{self.names[topic]}/{self.log.partition} begins at offset "
                    f"{self.log.starts.get(topic, 0)}; {len(of_topic)} payments are known in part",
                )
        gone = self.gone | answered
        unsaid = {key: booked for key, booked in self.by_payment.items() if key[:2] not in gone}
        for (tenant, payment), said in self.paid.items():
            if (tenant, payment) in gone:
                continue
            refunded = said.get("refunded", 0)
            open_still = said.get("dispute_opened", 0) - said.get("dispute_won", 0)
            held = max(0, open_still, said.get("dispute_lost", 0))
            for group, wanted in (
                ("credit", self._paid((tenant, payment))),
                ("refund", -refunded),
                ("dispute", -held),
            ):
                booked = unsaid.pop((tenant, payment, group), 0)
                if booked != wanted:
                    self.report.violate(
                        "credit_once",
                        f"payment {payment} of {tenant}: {group} {Fraction(booked, 10**9)} booked, "
                        f"{Fraction(wanted, 10**9)} said",
                    )
        for tenant, payment in gone:
            # For the next audit what is booked counts as what was said: it judges what comes.
            self.paid[tenant, payment] = {
                status: sign * self.by_payment.get((tenant, payment, group), 0)
                for group, status, sign in _SAID_AS
            }
        for (tenant, payment, group), booked in unsaid.items():
            if booked and (tenant, payment) in from_results:
                self.report.violate(
                    "credit_once",
                    f"payment {payment} of {tenant}: {group} {Fraction(booked, 10**9)} booked, "
                    "but no result says so",
                )

    def _one_in_flight(self) -> None:
        since = self.complete_since(topics.RESULT)
        for tenant, of_tenant in self.requests.items():
            auto = [one for one in of_tenant.values() if one["epoch"] is not None]
            auto.sort(key=lambda one: (one["epoch"], one["attempt"]))
            for earlier, later in pairwise(auto):
                if self.answers.get(earlier["recharge_id"]):
                    continue
                if _utc(earlier["requested_at"]) < since:
                    self.report.unknown(
                        "one_request", f"answers to requests of {tenant} are no longer there"
                    )
                    self.answers.setdefault(earlier["recharge_id"], set()).add("gone")
                else:
                    self.report.violate(
                        "one_request",
                        f"{tenant} was asked for {later['recharge_id']} while "
                        f"{earlier['recharge_id']} had no answer",
                    )

    # usage

    def _reasons(self, place: tuple[str, int, int]) -> set[str]:
        return {
            dict(letter.headers)["credits-dlq-reason"].decode()
            for letter in self.letters.get(place, ())
        }

    def _bytes_kept(self, record: Record, place: tuple[str, int, int]) -> None:
        letters = self.letters.get(place, [])
        if len(letters) > 1:
            self.report.violate("at_least_once", f"{len(letters)} dead letters of {place}")
        if not letters:
            since = self.complete_since(topics.dead_letters_of(place[0]))
            if _EPOCH + timedelta(milliseconds=record.timestamp) < since:
                self.lost.add(place)
        for letter in letters:
            # A record that is replayed bears the number of its attempts, which its letter has anew.
            kept, sent = (
                {header for header in one.headers if "credits-dlq-" not in header[0]}
                for one in (letter, record)
            )
            if (letter.key, letter.value, kept) != (record.key, record.value, sent):
                self.report.violate("at_least_once", f"the dead letter of {place} is not its bytes")

    def _must_be_letter(self, record: Record, topic: str, below: bool, why: str) -> None:
        place = (topic, record.partition, record.offset)
        if not below:
            self.report.count("pending")
            return
        self._bytes_kept(record, place)
        reasons = self._reasons(place)
        if self._is_misplaced(record):
            if topic == topics.COMMAND:
                # Its answer is awaited where its key belongs, so it is never moved.
                if reasons != {"wrong_partition"}:
                    self.report.violate(
                        "at_least_once", f"{place} strayed, and no dead letter says so"
                    )
            elif not reasons:
                self.moves.expect(topic, record)
            return
        allowed = {
            "malformed": {"malformed_json", "schema_violation"},
            "key": {"key_mismatch", "malformed_json", "schema_violation"},
        }[why]
        if not reasons & allowed:
            self._unrefused(place, f"{place} is no event ({why}), and no dead letter says so")
        if place in self.entries:
            self.report.violate("at_most_once", f"{place} is no event, but was booked")

    def _unrefused(self, place: tuple[str, int, int], what: str) -> None:
        """A record has come to nothing, and is no dead letter as far as those are left."""
        if place in self.lost:
            self.report.unknown("at_least_once", f"dead letters of {place[0]} are no longer there")
        else:
            self.report.violate("at_least_once", what)

    def _is_misplaced(self, record: Record) -> bool:
        return record.key is not None and home(record.key, self.partitions) != record.partition

    def _usage(self) -> None:
        booked: dict[tuple[str, str], tuple[Any, ...]] = {}
        unbooked: dict[tuple[str, str], Event] = {}
        charged: dict[tuple[str, str], int] = {}
        for topic in topics.USAGE:
            for record, event, below in self._source(topic):
                if isinstance(event, str):
                    self.report.count("events")
                    self._must_be_letter(record, topic, below, event)
                    continue
                if not self.wanted(event.tenant):
                    continue
                self.report.count("events")
                if not below:
                    self.report.count("pending")
                    continue
                self._one_usage(record, event, booked, unbooked, charged)
        for identity, event in unbooked.items():
            if identity in booked or _number(identity) in self.identities:
                continue
            self._unrefused(
                event.place,
                f"{event.id} of {event.tenant} at {event.place} was neither booked nor refused",
            )
        for identity, times in charged.items():
            if times > 1:
                self.report.violate("at_most_once", f"{identity[1]} was charged {times} times")
        self.identities |= {_number(identity) for identity in booked}
        self.report.count("distinct_ids", len(booked))

    def _one_usage(
        self,
        record: Record,
        event: Event,
        booked: dict[tuple[str, str], tuple[Any, ...]],
        unbooked: dict[tuple[str, str], Event],
        charged: dict[tuple[str, str], int],
    ) -> None:
        identity = (event.source, event.id)
        entries = self.entries.get(event.place, [])
        self._bytes_kept(record, event.place)
        reasons = self._reasons(event.place)
        if reasons:
            if entries:
                self.report.violate(
                    "at_least_once", f"{event.place} is booked and a dead letter as well"
                )
            self._plausible(record, event, reasons)
            return
        if self._is_misplaced(record):
            self.moves.expect(event.place[0], record)
            if entries:
                self.report.violate("partition", f"{event.place} was booked where it strayed")
            return
        if event.body.get("phase") == "correction":
            self.corrections.setdefault(identity, []).append(event)
        charges = [entry for entry in entries if entry.kind in _CHARGES]
        if len(charges) > 1:
            self.report.violate("at_most_once", f"{event.place} has {len(charges)} charges")
        minutes = charges[0].minutes if charges else 0
        cost = self._cost(event, charges[0].deck if charges else None, minutes)
        if charges and charges[0].deck in self.decks:
            deck = self.decks[charges[0].deck]
            self._right_version(event, deck, charges[0])
            self._note_call(event, deck)
        if self.foreign_deck is not None:
            # Priced by a deck that is not at hand: what this one says proves nothing.
            self.report.unknown("at_least_once", f"the deck {self.foreign_deck} is not at hand")
            cost = -charges[0].amount if charges else 0
        if cost is None:
            if charges:
                self.report.violate("price", f"{event.place} cannot be priced, but was charged")
            else:
                self._unrefused(
                    event.place, f"{event.place} cannot be booked, and no dead letter says so"
                )
            return
        if charges:
            charged[identity] = charged.get(identity, 0) + 1
            if _number(identity) in self.identities:
                self.report.violate("at_most_once", f"{event.id} was charged before as well")
            if charges[0].amount != -cost:
                self.report.violate(
                    "price",
                    f"{event.place} costs {Fraction(cost, 10**9)}, charged "
                    f"{Fraction(-charges[0].amount, 10**9)}",
                )
            booked[identity] = event.says()
            return
        earlier = booked.get(identity)
        if earlier is not None and earlier != event.says():
            self._unrefused(
                event.place, f"{event.place} contradicts an event with its id, unreported"
            )
        elif not cost:
            booked.setdefault(identity, event.says())
        else:
            unbooked[identity] = event

    def _note_call(self, event: Event, deck: Deck) -> None:
        if event.tenant not in self.licences:
            return
        row = deck.at(str(event.body.get("callee") or "")[1:], event.started)
        if row is not None and event.duration_s is not None:
            self.calls[event.place] = Call(
                kind_by(event.body, row) or "",
                event.body.get("capability"),
                event.body.get("user_country"),
                event.started,
                event.duration_s,
                row,
            )

    def _pools(self) -> None:
        """Included minutes, tenant by tenant, in the order of the ledger."""
        of_tenant: dict[str, list[Booked]] = {}
        for place, entries in self.entries.items():
            for one in entries:
                undone = self.charges.get((one.tenant, one.links.get("entry", 0)))
                back = undone.minutes if one.kind == "reversal" and undone is not None else []
                if one.tenant in self.licences or one.pools or back:
                    of_tenant.setdefault(one.tenant, []).append(
                        Booked(
                            one.seq,
                            one.kind,
                            one.amount,
                            one.booked_at,
                            one.pools,
                            self.calls.get(place),
                            None if undone is None else back,
                        )
                    )
        for tenant, booked in of_tenant.items():
            complete = self.complete(topics.COMMAND)
            if not complete and self.earlier is None:
                self.report.unknown("pools", "the commands that gave licences are no longer there")
            reckoning = Reckoning(
                self.coverage,
                self.zones.get(tenant, "UTC"),
                self.licences.get(tenant, []),
                self.used.get(tenant),
            )
            for fault in reckoning.judge(booked, complete=complete):
                self.report.violate("pools", f"{tenant}/{fault}")
            self.used[tenant] = reckoning.used
            self.report.count("included minutes", sum(reckoning.used.values()))

    def _right_version(self, event: Event, deck: Deck, entry: Entry) -> None:
        """The deck an entry names is the tenant's, was in force when the call started, and
        nobody could know of a later one."""
        where = f"{event.place} is priced by {deck.name}/{deck.version}"
        if deck.name not in {"default", *self.assigned.get(event.tenant, ())}:
            self.report.violate("price", f"{where}, which is not its tenant's deck")
        if not deck.began_by(event.started):
            self.report.violate("price", f"{where}, which was not in force yet")
        for other in self.decks.values():
            if (
                other.name == deck.name
                and other.effective_from is not None
                and other.published_at is not None
                and other.began_by(event.started)
                and (deck.effective_from is None or deck.effective_from < other.effective_from)
                and other.published_at + _SEEN_WITHIN < entry.booked_at
            ):
                self.report.violate("price", f"{where}, though {other.version} was in force")

    def _cost(
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
        known = not _depends_on_country(body, kind)
        if phase in ("start", "progress") or (kind in self.coverage.free and known):
            return 0
        if not duration_s:
            return 0
        callee = str(body.get("callee") or "")
        if not callee.startswith("+") or not callee[1:].isdigit():
            return None
        if named is not None and named in self.decks:
            deck = self.decks[named]
            return self._cost_by(event, deck, callee[1:], duration_s, 60 * minutes)
        costs = [
            self._cost_by(event, deck, callee[1:], duration_s) for deck in self._candidates(event)
        ]
        rated = [cost for cost in costs if cost is not None]
        return min(rated) if rated else None

    def _cost_by(
        self, event: Event, deck: Deck, digits: str, duration_s: int, paid_s: int = 0
    ) -> int | None:
        """What a call costs by a deck, which also says whether it went abroad."""
        row = deck.at(digits, event.started)
        if row is not None and kind_by(event.body, row) in self.coverage.free:
            return 0
        return deck.price(digits, event.started, duration_s, paid_s)

    def _candidates(self, event: Event) -> list[Deck]:
        names = {"default", *self.assigned.get(event.tenant, ())}
        return [
            deck
            for deck in self.decks.values()
            if deck.name in names and deck.began_by(event.started)
        ]

    def _plausible(self, record: Record, event: Event, reasons: Set[str]) -> None:
        """Whether a dead letter's reason is one this record can have."""
        for reason in reasons:
            try:
                right = self._right(record, event, reason)
            except (KeyError, TypeError, ValueError):
                right = None  # it has not what it is said to be refused for, as far as we see
            if right is None:
                self.report.unknown(
                    "at_least_once",
                    f"{event.place} is a dead letter for {reason}; the topics cannot tell whether "
                    "it had to be",
                )
            elif not right:
                self.report.violate(
                    "at_least_once", f"{event.place} is a dead letter for {reason}, wrongly"
                )

    def _right(self, record: Record, event: Event, reason: str) -> bool | None:
        """Whether a record had to be refused for a reason; None where nothing says it."""
        letter = dict(self.letters[event.place][0].headers)
        failed_at = datetime.fromisoformat(letter["credits-dlq-failed-at"].decode())
        topic, body = event.place[0], event.body
        right: bool | None = None
        if reason not in _REASONS[topic] or reason == "malformed_json":
            right = False
        elif reason == "schema_violation":
            right = not is_sound(record, event) or self._lacks(event, failed_at)
        elif reason == "key_mismatch":
            right = not is_sound(record, event)
        elif reason == "wrong_partition":
            right = home(event.tenant.encode(), self.partitions) != event.place[1]
        elif reason == "conflict":
            right = True  # judged when everything is read
        elif reason == "unknown_tenant":
            # Opened later, perhaps.
            right = self.known_since.get(event.tenant, failed_at) >= failed_at
        elif reason == "currency_mismatch":
            money = body if topic in topics.USAGE else body.get("amount") or {}
            named = money.get("currency")
            right = named is not None and self.currencies.get(event.tenant) != named
        elif reason == "too_late":
            within = _RESULT_WITHIN if topic == topics.RESULT else _USAGE_WITHIN
            right = event.at < failed_at - within
        elif reason == "from_the_future":
            right = event.at > failed_at + _FUTURE
        elif reason == "overflow":
            near = self.peaks.get(event.tenant, 0) + _MOST_MOVED > _MOST_BALANCE
            right = True if near else None
        elif reason == "unrated":
            right = self._unrated(event)
        elif reason == "not_billable":
            since = self.opened.get(event.tenant)
            right = event.tenant in self.closed or since is None or event.started < since
        elif reason == "refused":
            right = body.get("phase") == "correction"
            self.refused.append((event, failed_at))
        return right

    def _lacks(self, event: Event, failed_at: datetime) -> bool | None:
        """Whether a record of the right shape says too little or too much to be booked."""
        body = event.body
        if event.place[0] in topics.USAGE:
            seconds = 0 if body.get("phase") == "start" else -1
            if event.duration_s is not None:
                seconds = event.duration_s
            return seconds < 0 or kind_of(body) not in KINDS
        if event.place[0] == topics.COMMAND or body["status"] not in _OF_RESULT:
            return False
        if body.get("amount"):
            return not 0 < nanos(body["amount"]["amount"]) <= _MOST_MOVED
        # Without an amount it is that of the request, as long as that is remembered.
        asked = self.requests.get(event.tenant, {}).get(body["recharge_id"])
        if body["status"] != "succeeded" or asked is None:
            return True
        fresh = failed_at - _utc(asked["requested_at"]) < timedelta(days=1)
        return None if fresh else True

    def _conflicts(self) -> None:
        """Who is refused for a conflict contradicts something that came under its identity."""
        for identity, events in self.disputed.items():
            refused = [
                one
                for one in events
                if "conflict" in self._reasons(one.place) and self.wanted(one.tenant)
            ]
            others = [one for one in events if not self._reasons(one.place)]
            for one in refused:
                if any(other.says() != one.says() for other in others):
                    continue
                if not others and _number(identity) in self.identities:
                    continue  # an earlier audit has read it
                trimmed = any(self.log.gone(topic) for topic in topics.SOURCES)
                if self.options.checkpoint_from is not None or trimmed:
                    self.report.unknown(
                        "at_least_once", "what conflicts contradict is no longer there"
                    )
                else:
                    self.report.violate(
                        "at_least_once", f"{one.place} is a dead letter for conflict, wrongly"
                    )

    def _unrated(self, event: Event) -> bool:
        """Whether a deck that can have been in force has no price for a call."""
        if self._cost(event) is None or event.tenant in self.assigned:
            return True
        callee = str(event.body.get("callee") or "")[1:]
        return any(
            deck.price(callee, event.started, event.duration_s or 0) is None
            for deck in self._candidates(event)
        )

    # corrections

    def _corrections(self) -> None:
        booked = [entry for entries in self.entries.values() for entry in entries]
        for one in booked:
            if one.kind in _CHARGES:
                number = _number(one.identity)
                self.charges[one.tenant, one.seq] = Charge(
                    one.tenant,
                    one.seq,
                    number,
                    one.amount,
                    one.at,
                    one.booked_at,
                    minutes=lines_of(one.pools),
                )
        of_event: dict[tuple[str, int], list[Charge]] = {}
        for charge in self.charges.values():
            of_event.setdefault((charge.tenant, charge.number), []).append(charge)
        for back in booked:
            if back.kind == "reversal":
                self.report.count("reversals")
                self._one_reversal(back)
        corrected_by: dict[tuple[str, str], tuple[str, str]] = {}
        for identity, events in self.corrections.items():
            caused = [one for one in events if self.entries.get(one.place)]
            named = events[0].corrected
            if named is None:
                self._wrong(f"{events[0].place} corrects nothing, and is no dead letter")
                continue
            had_cost = of_event.get((events[0].tenant, _number(named)), [])
            if not caused:
                if any(charge.taken is None for charge in had_cost):
                    self.report.violate(
                        "at_least_once", f"{events[0].place} has neither reversed nor been refused"
                    )
                continue
            first = corrected_by.setdefault(named, identity)
            if first != identity:
                self._wrong(f"{named[1]} is corrected by {first[1]} and by {identity[1]}")
            if not had_cost and _number(named) not in self.identities:
                if any(self.log.starts.get(topic) for topic in topics.SOURCES):
                    self.report.unknown("correction", "what was corrected is gone from its topic")
                else:
                    self._wrong(f"{identity[1]} corrects {named[1]}, which was never booked")
            for event in caused:
                self._one_correction(event, had_cost)
        self._refused_rightly(of_event)

    def _one_reversal(self, back: Entry) -> None:
        name = f"{back.tenant}/{back.seq}"
        if back.place[0] not in topics.USAGE or back.links.get("entry") is None:
            self._wrong(f"{name} reverses, but does not say what")
            return
        seq = int(back.links["entry"])
        charge = self.charges.get((back.tenant, seq))
        if charge is None:
            if seq <= self.heads.get(back.tenant, Fold()).seq:
                self.report.unknown("correction", "entries of before the checkpoint were reversed")
            else:
                self._wrong(f"{name} reverses entry {seq}, which is no charge")
            return
        if charge.taken is not None:
            self._wrong(f"{name} reverses entry {seq}, as {charge.taken} did before")
        charge.taken = back.seq
        if charge.amount != -back.amount:
            self._wrong(
                f"{name} gives {Fraction(back.amount, 10**9)} back for a charge of "
                f"{Fraction(-charge.amount, 10**9)}"
            )
        if charge.number != _number((back.identity[0], str(back.links.get("corrects")))):
            self._wrong(f"{name} reverses entry {seq}, but names another event")
        if charge.seq >= back.seq:
            self._wrong(f"{name} reverses an entry that came after it")

    def _one_correction(self, event: Event, had_cost: Sequence["Charge"]) -> None:
        """The entries of one correction: a reversal for each charge there was, and the new one
        says in whose place it stands."""
        entries = self.entries[event.place]
        corrects = event.body["corrects"]
        numbers = {one.seq for one in entries if one.kind == "reversal"}
        for charge in had_cost:
            if charge.seq < entries[0].seq and charge.taken not in numbers:
                self._wrong(f"{event.place} has not reversed {charge.tenant}/{charge.seq}")
        reversed_seqs = [one.links.get("entry") for one in entries if one.kind == "reversal"]
        for entry in entries:
            name = f"{entry.tenant}/{entry.seq}"
            if entry.kind in ("reversal", *_CHARGES) and entry.links.get("corrects") != corrects:
                self._wrong(f"{name} does not say that it corrects {corrects}")
            last = reversed_seqs[-1] if reversed_seqs else None
            if entry.kind in _CHARGES and entry.links.get("entry") != last:
                self._wrong(f"{name} does not say in place of which entry it stands")

    def _refused_rightly(self, of_event: Mapping[tuple[str, int], Sequence["Charge"]]) -> None:
        """No correction is refused of what is on the books, remembered and never reversed."""
        for event, failed_at in self.refused:
            if event.corrected is None:
                continue
            for charge in of_event.get((event.tenant, _number(event.corrected)), ()):
                remembered = failed_at - timedelta(days=35) <= charge.at
                if charge.booked_at < failed_at and remembered and charge.taken is None:
                    self.report.violate(
                        "at_least_once",
                        f"{event.place} is a dead letter, but {charge.tenant}/{charge.seq} could "
                        "have been reversed",
                    )

    def _wrong(self, text: str) -> None:
        self.report.violate("correction", text)

    # causes

    def _causes(self) -> None:
        for place, of_place in self.entries.items():
            for entry in of_place:
                if place[0] == "tick":
                    if entry.kind not in _OF_TICK or (entry.amount < 0) != (entry.kind == "expiry"):
                        self._uncaused(
                            entry,
                            f"is {entry.kind} of {Fraction(entry.amount, 10**9)}, which time "
                            "cannot bring",
                        )
                elif place[0] not in topics.SOURCES:
                    self._uncaused(entry, f"is caused by {place[0]}, which is no source")
        wanted = {
            place: entries
            for place, entries in self.entries.items()
            if place[0] != "tick" and self.below(place)
        }
        for topic in topics.SOURCES:
            start = self.log.starts.get(topic, 0)
            trimmed = [place for place in wanted if place[0] == topic and place[2] < start]
            if trimmed:
                for invariant in ("cause", "at_least_once"):
                    self.report.unknown(
                        invariant,
                        f"{self.names[topic]}/{self.log.partition} begins at offset {start}; "
                        f"{len(trimmed)} entries name records before it",
                    )
            for record in self.log.records.get(topic, ()):
                entries = wanted.get((topic, record.partition, record.offset))
                if not entries:
                    continue
                event = understand(record, topic)
                for entry in entries:
                    if isinstance(event, str) or (
                        (event.tenant, event.source, event.id) != (entry.tenant, *entry.identity)
                    ):
                        self.report.violate(
                            "cause", f"{entry.tenant}/{entry.seq} names a record that is not its"
                        )
                if not isinstance(event, str) and topic != topics.COMMAND:
                    self._caused(event, entries)
                wanted.pop((topic, record.partition, record.offset))
            for place in trimmed:
                wanted.pop(place, None)
        for place, entries in wanted.items():
            if self.options.checkpoint_from is None:
                first = entries[0]
                self.report.violate(
                    "cause", f"{first.tenant}/{first.seq} names {place}, which is not there"
                )

    def checkpoint(self) -> dict[str, Any]:
        """What a later run needs to go on from here."""
        tenants = {**self.heads, **self.folds}
        until = _FIRST
        if self.position:
            until = _utc(self.position["now"]) + timedelta(microseconds=1)
        last = max((one.booked_at for one in self.charges.values()), default=None)
        return {
            "recharges": self.recharges.checkpoint(),
            "charges": [
                msgspec.to_builtins(one)
                for one in self.charges.values()
                if last is not None and one.at >= last - _CORRECTED_WITHIN
            ],
            "ids": sorted(self.identities),
            "assigned": {one: sorted(decks) for one, decks in self.assigned.items()},
            "asked": [[*lot, msgspec.to_builtins(asked)] for lot, asked in self.asked.items()],
            "zones": self.zones,
            "licences": {
                tenant: [msgspec.to_builtins(one) for one in known]
                for tenant, known in self.licences.items()
            },
            "used": [
                [tenant, *bucket, minutes]
                for tenant, used in self.used.items()
                for bucket, minutes in used.items()
            ],
            "requests": self.requests,
            "answers": {one: sorted(said) for one, said in self.answers.items()},
            "since": {
                topic: since.isoformat()
                for topic in self.names
                # What comes after this audit is seen, also where nothing at all is left.
                if (since := min(self.complete_since(topic), until)) != _FIRST
            },
            "by_hand": [[*key, amount] for key, amount in self.by_hand.items()],
            "paid": {"\0".join(key): said for key, said in self.paid.items()},
            "booked": [[*key, str(amount)] for key, amount in self.by_payment.items()],
            "tenants": {
                tenant: [
                    fold.seq,
                    str(fold.balance),
                    str(fold.overdraft),
                    fold.head.hex(),
                    {
                        name: [
                            str(lot.left),
                            None if lot.ends is None else lot.ends.isoformat(),
                            str(lot.lapsed),
                            lot.void,
                        ]
                        for name, lot in (*fold.gone.items(), *fold.lots.items())
                    },
                ]
                for tenant, fold in tenants.items()
            },
        }


def _lot_of(event: Event) -> str:
    """The name of the lot that a grant makes."""
    return "c" + hashlib.sha256(f"{event.source}\0{event.id}".encode()).hexdigest()[:12]


def _a_year_later(at: datetime) -> datetime:
    try:
        return at.replace(year=at.year + 1)
    except ValueError:
        return at.replace(year=at.year + 1, day=28)


def _number(identity: tuple[str, str]) -> int:
    return xxh3_64_intdigest("\0".join(identity).encode())


class Moves:
    """Records that strayed, and where they arrived."""

    def __init__(self) -> None:
        self._expected: dict[tuple[str, str], Record] = {}
        self._arrived: dict[tuple[str, str], list[Record]] = {}

    def expect(self, topic: str, record: Record) -> None:
        """This record must have been moved."""
        self._expected[topic, f"{record.topic}/{record.partition}/{record.offset}"] = record

    def arrived(self, topic: str, origin: str, record: Record) -> None:
        """This record says that it was moved here."""
        self._arrived.setdefault((topic, origin), []).append(record)

    def judge(self, report: Report) -> None:
        """Every strayed record arrived once, with its bytes."""
        for (topic, origin), record in self._expected.items():
            arrivals = self._arrived.get((topic, origin), [])
            if len(arrivals) != 1:
                report.violate("partition", f"{origin} strayed and arrived {len(arrivals)} times")
            elif arrivals[0].value != record.value or arrivals[0].key != record.key:
                report.violate("partition", f"{origin} arrived changed")


def audit(
    logs: Sequence[Log],
    *,
    names: Mapping[str, str],
    partitions: int,
    deck: Deck,
    published: Sequence[Deck] = (),
    options: Options | None = None,
    report: Report | None = None,
    earlier: Mapping[str, Any] | None = None,
    coverage: Coverage | None = None,
) -> tuple[Report, dict[str, Any]]:
    """Audit what was read; the report, and a checkpoint for the next run. Pure."""
    report = report or Report()
    options = options or Options()
    coverage = coverage or Coverage()
    moves = Moves()
    checkpoint: dict[str, Any] = {}
    for log in logs:
        known = (earlier or {}).get(str(log.partition))
        part = _Partition(
            report,
            log,
            names=names,
            partitions=partitions,
            decks=[deck, *published],
            options=options,
            moves=moves,
            coverage=coverage,
            earlier=known,
        )
        part.run()
        checkpoint[str(log.partition)] = part.checkpoint()
    if options.partition is None and options.tenant is None:
        moves.judge(report)
    _expectation(report, options)
    return report, checkpoint


def _expectation(report: Report, options: Options) -> None:
    if options.expect is None:
        return
    report.expectation_asked = True
    expected = json.loads(options.expect.read_text())
    for reason, count in expected["by_reason"].items():
        found = report.dead_letters.get(reason, 0)
        if found != count:
            report.violate("expectation", f"{count} dead letters {reason} foreseen, {found} found")
    found = report.counts.get("distinct_ids", 0)
    if found != expected["distinct_ids"]:
        report.violate(
            "expectation", f"{expected['distinct_ids']} events sent to be booked, {found} found"
        )


# -- reading ---------------------------------------------------------------------------------


class _UnreadableError(Exception):
    """A record that the client cannot take apart."""


class _Reader:
    """Two consumers: one read_committed for records, one for the log's true end."""

    def __init__(self, settings: Settings) -> None:
        security: dict[str, Any] = {}
        if not settings.plaintext:
            import ssl

            security = {
                "security_protocol": "SSL",
                "ssl_context": ssl.create_default_context(
                    cafile=str(settings.broker_ca_file) if settings.broker_ca_file else None
                ),
            }
        common: dict[str, Any] = {
            "bootstrap_servers": settings.broker,
            "group_id": None,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",
            "max_partition_fetch_bytes": 8 << 20,
            **security,
        }
        self.committed = Consumer(isolation_level="read_committed", **common)
        self.uncommitted = Consumer(isolation_level="read_uncommitted", **common)

    async def start(self) -> None:
        await self.committed.start()
        await self.uncommitted.start()

    async def stop(self) -> None:
        await self.committed.stop()
        await self.uncommitted.stop()

    async def settled(
        self, ends: Mapping[TopicPartition, int], sources: Iterable[str], deadline: float
    ) -> dict[TopicPartition, int]:
        """How far committed records go once they go past `ends`, or as far as they go at the
        deadline. The topics of `sources` are asked last: what an output answers is there."""
        while True:
            stable: dict[TopicPartition, int] = {}
            for late in (False, True):
                tps = [tp for tp in ends if (tp.topic in sources) is late]
                stable |= await self.committed.end_offsets(tps)
            if monotonic() > deadline or all(stable[tp] >= end for tp, end in ends.items()):
                return stable
            await asyncio.sleep(0.1)

    async def records(
        self, bounds: dict[TopicPartition, tuple[int, int]], deadline: float
    ) -> AsyncIterator[Record]:
        """Every committed record between the bounds. Raises TimeoutError, _UnreadableError."""
        waiting = {tp for tp, (start, end) in bounds.items() if start < end}
        if not waiting:
            return
        consumer = self.committed
        consumer.assign(list(waiting))
        for tp in waiting:
            consumer.seek(tp, bounds[tp][0])
        while waiting:
            if monotonic() > deadline:
                raise TimeoutError(f"{len(waiting)} partitions were not read to their end")
            try:
                fetched = await consumer.getmany(*waiting, timeout_ms=200)
            except UnicodeDecodeError:
                places = ", ".join(sorted(f"{tp.topic}/{tp.partition}" for tp in waiting))
                raise _UnreadableError(
                    "a record has a header whose name is not UTF-8, and the client reads no "
                    f"further; it is in one of {places}"
                ) from None
            for tp, records in fetched.items():
                end = bounds[tp][1]
                for one in records:
                    if one.offset < end:
                        yield Record(
                            one.topic,
                            one.partition,
                            one.offset,
                            one.timestamp,
                            one.key,
                            one.value,
                            tuple((name, text or b"") for name, text in one.headers),
                        )
            for tp in list(waiting):
                if await consumer.position(tp) >= bounds[tp][1]:
                    waiting.discard(tp)


async def verify(settings: Settings, options: Options) -> Report:
    """Read an installation and audit it; never raises for what it finds."""
    report = Report()
    reader = _Reader(settings)
    try:
        try:
            await reader.start()
            await _verify(settings, options, reader, report)
        finally:
            await reader.stop()
    except (KafkaError, OSError, TimeoutError, _UnreadableError) as error:
        for invariant in INVARIANTS:
            if invariant != "expectation" or options.expect is not None:
                report.unknown(
                    invariant, f"the topics at {settings.broker} cannot be read: {error}"
                )
    return report


async def _verify(settings: Settings, options: Options, reader: _Reader, report: Report) -> None:
    deadline = monotonic() + options.deadline_s
    names = {
        topic.name: settings.topics.of(topic.name)
        for topic in topics.MANIFEST
        if topic.partitions is None
    }
    numbers = range(settings.partitions) if options.partition is None else [options.partition]
    earlier: dict[str, Any] = {}
    if options.checkpoint_from is not None:
        earlier = json.loads(options.checkpoint_from.read_text())
    deck = load_deck(options.deck or settings.deck)
    coverage = Coverage(options.coverage or settings.coverage)
    every = [TopicPartition(name, number) for name in names.values() for number in numbers]

    tariff = TopicPartition(settings.topics.of(topics.TARIFF), 0)
    # The position rows first: whatever is committed later lies at or beyond them.
    changelogs = [TopicPartition(names[topics.CHANGELOG], number) for number in numbers]
    rows: dict[int, dict[bytes, bytes]] = {number: {} for number in numbers}
    starts = dict(await reader.uncommitted.beginning_offsets(every))
    stable = dict(await reader.committed.end_offsets(changelogs))
    bounds = {tp: (starts[tp], stable[tp]) for tp in changelogs}
    async for record in reader.records(bounds, deadline):
        of_partition = rows[record.partition]
        if record.value is None:
            of_partition.pop(record.key or b"", None)
        else:
            of_partition[record.key or b""] = record.value

    # Markers of one commit reach the partitions one by one: what a row tells of may not be there
    # yet elsewhere. What is written after this moment is not waited for.
    ends = dict(await reader.uncommitted.end_offsets(every))
    sources = settings.topics.sources
    until = min(deadline, monotonic() + options.open_within_s)
    stable = await reader.settled(ends, sources, until)
    for tp in every:
        if stable[tp] < ends[tp] and tp.topic not in sources:
            report.unknown(
                "stable",
                f"a transaction is open on {tp.topic}/{tp.partition} at offset {stable[tp]} and "
                f"has not ended within {options.open_within_s} s",
            )
    # After the rows: a version that priced any of them was there by then.
    first = dict(await reader.uncommitted.beginning_offsets([tariff]))
    last = dict(await reader.committed.end_offsets([tariff]))
    bounds = {tariff: (first[tariff], last[tariff])}
    versions = [record async for record in reader.records(bounds, deadline)]
    begun: dict[str, dict[str, int]] = earlier.get("offsets", {})
    reached: dict[str, dict[str, int]] = {}

    logs = []
    read = [name for name in names if name not in (topics.CHANGELOG, topics.SEEN)]
    for number in numbers:
        tps = {TopicPartition(names[name], number): name for name in read}
        bounds = {
            tp: (max(starts[tp], begun.get(str(number), {}).get(name, 0)), stable[tp])
            for tp, name in tps.items()
        }
        records: dict[str, list[Record]] = {name: [] for name in read}
        async for record in reader.records(bounds, deadline):
            records[tps[TopicPartition(record.topic, record.partition)]].append(record)
        logs.append(
            Log(
                partition=number,
                rows=rows[number],
                records=dict(records),
                starts={name: starts[tp] for tp, name in tps.items() if name != topics.LEDGER},
                begun=begun.get(str(number), {}),
            )
        )
        reached[str(number)] = {name: stable[tp] for tp, name in tps.items()}
    _, checkpoint = audit(
        logs,
        names=names,
        partitions=settings.partitions,
        deck=deck,
        published=decks_of(versions),
        options=options,
        report=report,
        earlier=earlier.get("partitions"),
        coverage=coverage,
    )
    if options.checkpoint_to is not None:
        options.checkpoint_to.write_text(
            json.dumps({"version": 1, "offsets": reached, "partitions": checkpoint})
        )
