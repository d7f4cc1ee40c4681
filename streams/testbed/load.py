"""The load generator: real-shaped usage, deterministic to the byte, that knows what should come
of every record it writes.

Ids carry the run's name, seed and index, so that an auditor can tell what should exist without
asking anybody, and two loads on one installation do not contradict each other.
"""

import asyncio
import json
import random
from bisect import bisect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from heapq import heappop, heappush
from itertools import accumulate
from pathlib import Path
from time import monotonic
from typing import Any, Final
from uuid import UUID, uuid5

import orjson
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.partitioner import murmur2
from msgspec import Struct

from schemas import topics
from schemas.envelope import STRUCTURED, binary_headers
from schemas.notices import DeadLetterReason, NoticeKind
from streams.settings import Settings
from streams.testbed.kafka import read_from_end, started_producer, started_reader

LOADS: Final = UUID("0b0a6a52-64a0-5d8c-8c11-3c2e5f0f9d21")
SOURCE: Final = "credits-load"
PER_MILLION: Final = 1_000_000
ANSWER_WITHIN_S: Final = 60
BILLED_SINCE: Final = timedelta(days=40)
# Licences change at an instant of the last 35 days; the latest usage is 30 days old.
LICENSED_SINCE: Final = timedelta(days=34)
# So soon one kind of grant begins and another expires: while the load runs, after its opening.
SOON: Final = timedelta(seconds=20)


class Profile(StrEnum):
    """What the traffic looks like."""

    OFFICE_DAY = "office-day"
    EVENING_CONFERENCES = "evening-conferences"
    HOT_TENANT = "hot-tenant"


class Envelope(StrEnum):
    """How events are wrapped."""

    BARE = "bare"
    BINARY = "binary"
    STRUCTURED = "structured"
    MIXED = "mixed"


class Expected(StrEnum):
    """What should come of a record."""

    BOOK = "book"
    DUPLICATE = "duplicate"
    DEAD_LETTER = "dead_letter"


class Plan(Struct, frozen=True, kw_only=True):
    """A load. `rate` in events per second, 0 for as fast as it goes; shares in millionths of
    all records, of tenants for `licensed_ppm` and `granted_ppm`; `zipf`: the n-th tenant has 1/n
    of the traffic of the first. `run` is a name that tells the ids from those of another load with
    the same seed. The `start` and `progress` of an open call come beside its `end`, which is one
    of the `events`. Licences and grants change who pays for a call, and never what becomes of a
    record."""

    tenants: int = 200
    events: int = 30_000
    rate: int = 500
    seed: int = 1
    run: str = ""
    profile: Profile = Profile.OFFICE_DAY
    duplicates_ppm: int = 10_000
    conflicts_ppm: int = 0
    late_ppm: int = 5_000
    malformed_ppm: int = 2_000
    wrong_partition_ppm: int = 1_000
    corrections_ppm: int = 0
    open_calls_ppm: int = 0
    licensed_ppm: int = 0
    granted_ppm: int = 0
    envelope: Envelope = Envelope.MIXED
    zipf: bool = True


class Planned(Struct, frozen=True, gc=False):
    """One record to write. `partition` None means: where the key belongs; `misplaced` otherwise
    shifts it by so many partitions. `reason` is the dead letter's, when one is expected."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    expected: Expected
    reason: DeadLetterReason | None = None
    misplaced: int = 0
    event_id: str = ""


class Variety(Struct, frozen=True):
    """One way to get a record wrong, and the reason its dead letter must carry."""

    name: str
    make: Callable[[dict[str, Any], bytes], tuple[bytes | None, bytes | None]]
    reason: DeadLetterReason | None


def _with(member: str, text: str) -> Callable[[dict[str, Any], bytes], tuple[bytes, bytes]]:
    """Replace a member by raw JSON text, also by such that no encoder would write."""

    def make(event: dict[str, Any], key: bytes) -> tuple[bytes, bytes]:
        event[member] = "\u0001"
        return key, orjson.dumps(event).replace(b'"\\u0001"', text.encode())

    return make


def _raw(value: bytes | None) -> Callable[[dict[str, Any], bytes], tuple[bytes, bytes | None]]:
    return lambda _, key: (key, value)


def _shifted(days: int) -> Callable[[dict[str, Any], bytes], tuple[bytes, bytes]]:
    def make(event: dict[str, Any], key: bytes) -> tuple[bytes, bytes]:
        at = datetime.fromisoformat(event["started_at"]) + timedelta(days=days)
        return key, orjson.dumps({**event, "started_at": at.isoformat()})

    return make


_MALFORMED: Final = DeadLetterReason.MALFORMED_JSON
_SCHEMA: Final = DeadLetterReason.SCHEMA_VIOLATION
_KEY: Final = DeadLetterReason.KEY_MISMATCH

VARIETIES: Final = (
    Variety("empty value", _raw(b""), _MALFORMED),
    Variety("tombstone", _raw(None), _MALFORMED),
    Variety("bad JSON", _raw(b'{"event_id": '), _MALFORMED),
    Variety("invalid UTF-8", _raw(b'{"event_id":"\xff\xfe"}'), _MALFORMED),
    Variety("1,100 deep", _raw(b'{"a":' * 1_100 + b"1" + b"}" * 1_100), _MALFORMED),
    Variety("a list", _raw(b"[]"), _SCHEMA),
    Variety("a number", _raw(b"7"), _SCHEMA),
    Variety("lone surrogate", _with("call_id", '"\\ud800"'), _MALFORMED),
    Variety("NaN", _with("duration_s", "NaN"), _MALFORMED),
    Variety("1e400", _with("duration_s", "1e400"), _SCHEMA),
    Variety("30 digits", _with("duration_s", "1" * 30), _SCHEMA),
    Variety("negative minutes", _with("duration_s", "-60"), _SCHEMA),
    Variety("a float", _with("duration_s", "60.5"), _SCHEMA),
    Variety("text for seconds", _with("duration_s", '"60"'), _SCHEMA),
    Variety("no id", _with("event_id", "null"), _SCHEMA),
    Variety("naive time", _with("started_at", '"2026-01-01T10:00:00"'), _SCHEMA),
    Variety(
        "the last second there is",
        _with("started_at", '"9999-12-31T23:59:59Z"'),
        DeadLetterReason.FROM_THE_FUTURE,
    ),
    Variety(
        "before the first",
        _with("started_at", '"0001-01-01T00:00:00+05:00"'),
        DeadLetterReason.TOO_LATE,
    ),
    Variety("no time", _with("started_at", '"yesterday"'), _SCHEMA),
    Variety("ten decimals", _with("upstream_charge", '"0.0123456789"'), _SCHEMA),
    Variety("amount as number", _with("upstream_charge", "0.1"), _SCHEMA),
    Variety("unknown kind", _with("kind", '"fax"'), _SCHEMA),
    Variety("unknown currency", _with("currency", '"XXX"'), DeadLetterReason.CURRENCY_MISMATCH),
    Variety("lower-case currency", _with("currency", '"usd"'), _SCHEMA),
    Variety("no E.164", _with("callee", '"extension 12"'), DeadLetterReason.UNRATED),
    Variety("unrated", _with("callee", '"+999123456789"'), DeadLetterReason.UNRATED),
    Variety("tenant not the key", _with("tenant_id", '"t-other"'), _KEY),
    Variety(
        "tenant never opened",
        lambda event, _: (b"t-nobody", orjson.dumps({**event, "tenant_id": "t-nobody"})),
        DeadLetterReason.UNKNOWN_TENANT,
    ),
    Variety("null key", lambda event, _: (None, orjson.dumps(event)), _KEY),
    Variety("too old", _shifted(-36), DeadLetterReason.TOO_LATE),
    Variety("from the future", _shifted(1), DeadLetterReason.FROM_THE_FUTURE),
    Variety("correction", _with("phase", '"correction"'), DeadLetterReason.REFUSED),
    Variety("unknown members", _with("favourite_colour", '"blue"'), None),
)

# Numbers that every deck of the world rates: country code, national number's length.
_DESTINATIONS: Final = (
    ("4420", 8), ("447", 9), ("1212", 7), ("1604", 7), ("49", 10), ("4917", 8), ("33", 9),
    ("336", 8), ("34", 9), ("39", 10), ("31", 9), ("32", 8), ("41", 9), ("43", 9), ("45", 8),
    ("46", 9), ("47", 8), ("48", 9), ("351", 9), ("353", 9), ("358", 9), ("61", 9), ("64", 8),
    ("65", 8), ("66", 9), ("81", 9), ("82", 9), ("852", 8), ("86", 10), ("886", 9), ("91", 10),
    ("52", 10), ("54", 10), ("55", 10), ("56", 9), ("27", 9), ("972", 8), ("971", 8), ("263", 9),
    ("382", 8),
)  # fmt: skip
_TOLL_FREE: Final = ("1800", "1888", "1877", "1866")

# Kinds and how often, in hundredths.
_MIXES: Final = {
    Profile.OFFICE_DAY: (
        ("international", 34), ("overage_domestic", 16), ("payg_out", 14), ("toll_free_in", 14),
        ("conf_dial_out", 8), ("conf_dial_in", 6), ("voip_leg", 5), ("free", 2), ("emergency", 1),
    ),
    Profile.EVENING_CONFERENCES: (
        ("conf_dial_out", 40), ("conf_dial_in", 18), ("conf_ppm", 12), ("voip_leg", 20),
        ("toll_free_in", 8), ("emergency", 2),
    ),
    Profile.HOT_TENANT: (("international", 60), ("payg_out", 30), ("toll_free_in", 10)),
}  # fmt: skip
_CONFERENCE_KINDS: Final = frozenset({"conf_dial_out", "conf_dial_in", "conf_ppm", "voip_leg"})
# What calling plans include minutes for.
_PLANNED_KINDS: Final = frozenset({"overage_domestic", "international"})
# Seconds: many short calls, few long ones.
_DURATIONS: Final = (
    0, 4, 17, 32, 45, 57, 61, 75, 93, 118, 140, 180, 219, 301, 480, 733, 1_260, 2_705,
)  # fmt: skip


# A call that is told of while it lasts: its start, a sign of life, its end, so far apart.
PHASES_APART_S: Final = 2
_OPEN_FOR: Final = tuple(one for one in _DURATIONS if 2 * PHASES_APART_S <= one <= 140)
# As fast as it goes, no time passes; the phases of a call are so many records a second apart.
_PACE: Final = 500
_SECOND: Final = timedelta(seconds=1)
# How the ids of phases before the end end.
_EARLY: Final = ("-start", "-progress")


class _Weighted:
    """Draws from weighted choices, by binary search in whole numbers."""

    def __init__(self, choices: Sequence[tuple[str, int]]) -> None:
        self._names = [name for name, _ in choices]
        self._bounds = list(accumulate(weight for _, weight in choices))

    def draw(self, dice: random.Random) -> str:
        return self._names[bisect(self._bounds, dice.randrange(self._bounds[-1]))]


def tenant_id(number: int) -> str:
    """The n-th tenant of a load, counted from 1."""
    return f"t-{number:06d}"


def _chosen(number: int, ppm: int) -> int:
    """The how-many-th of an even share of all tenants the n-th one is, from 1; 0: it is none."""
    before, place = -(-(number - 1) * ppm // PER_MILLION), -(-number * ppm // PER_MILLION)
    return place if place > before else 0


# Plans whose users call, and where they are; a licensed tenant has one of them, and conferences.
_CALLING_PLANS: Final = (("MCOPSTN5", "US"), ("MCOPSTN2", "GB"))
_CONFERENCE_PLAN: Final = "MCOMEETADV"


def _calling_plan(plan: Plan, number: int) -> tuple[str, str] | None:
    """The plan of a tenant's users and their country; None when it has no licences."""
    place = _chosen(number, plan.licensed_ppm)
    return _CALLING_PLANS[place % len(_CALLING_PLANS)] if place else None


def events(
    plan: Plan, start: datetime, clock: Callable[[], datetime] | None = None
) -> Iterator[Planned]:
    """The records of a load, in order. The same plan and start give the same bytes, unless a
    `clock` says when open calls begin: for who does not write at the plan's rate."""
    dice = random.Random(plan.seed)
    kinds = _Weighted(_MIXES[plan.profile])
    scale = 1_000_000_000
    weights = list(
        accumulate(scale // number if plan.zipf else 1 for number in range(1, plan.tenants + 1))
    )
    recent: list[Planned] = []
    corrected: set[str] = set()
    # What is still to be said of open calls, by the index at which it is.
    waiting: list[tuple[int, int, Planned]] = []
    gap = PHASES_APART_S * (plan.rate or _PACE)
    opened = 0
    for index in range(plan.events):
        while waiting and waiting[0][0] <= index:
            planned = heappop(waiting)[2]
            _remember(dice, recent, planned)
            yield planned
        roll = dice.randrange(PER_MILLION)
        if roll < plan.duplicates_ppm and recent:
            planned = dice.choice(recent)
            yield Planned(
                planned.topic, planned.key, planned.value, planned.headers,
                Expected.DUPLICATE, None, 0, planned.event_id,
            )  # fmt: skip
            continue
        if plan.profile is Profile.HOT_TENANT and dice.randrange(10):
            number = 1
        else:
            number = 1 + bisect(weights, dice.randrange(weights[-1]))
        tenant = tenant_id(number)
        event = _usage(plan, dice, index, tenant, kinds.draw(dice), start)
        calling = _calling_plan(plan, number)
        if calling is not None and event["kind"] in _PLANNED_KINDS:
            event["capability"], event["user_country"] = calling
        if plan.open_calls_ppm and dice.randrange(PER_MILLION) < plan.open_calls_ppm:
            # When this one is written, those of earlier calls beside it included.
            written = (index + 2 * opened) // plan.rate if plan.rate else 0
            at = clock() if clock is not None else start + written * _SECOND
            opened += 1
            for phase, told in enumerate(_phases(dice, index, event, at)):
                planned = _wrapped(plan, dice, told, tenant, 0)
                heappush(waiting, (index + phase * gap, 3 * index + phase, planned))
            continue
        roll = dice.randrange(PER_MILLION)
        if roll < plan.malformed_ppm:
            yield _malformed(dice, event, tenant)
            continue
        roll -= plan.malformed_ppm
        if 0 <= roll < plan.late_ppm:
            at = start - timedelta(days=dice.randrange(3, 30), seconds=dice.randrange(86_400))
            event["started_at"] = at.isoformat()
        roll -= plan.late_ppm
        if 0 <= roll < plan.conflicts_ppm and recent:
            yield _conflict(dice, recent)
            continue
        roll -= plan.conflicts_ppm
        if 0 <= roll < plan.corrections_ppm and recent:
            earlier = dice.choice(recent)
            if earlier.event_id not in corrected and not _told_early(earlier):
                corrected.add(earlier.event_id)
                planned = _correction(dice, earlier, event["event_id"])
                recent[dice.randrange(len(recent))] = planned
                yield planned
                continue
        roll -= plan.corrections_ppm
        misplaced = 0
        if 0 <= roll < plan.wrong_partition_ppm:
            misplaced = 1 + dice.randrange(3)
        planned = _wrapped(plan, dice, event, tenant, misplaced)
        if not misplaced:
            _remember(dice, recent, planned)
        yield planned
    while waiting:
        yield heappop(waiting)[2]


def _told_early(planned: Planned) -> bool:
    """Whether a record is of a call that lasts: it has cost nothing that could be corrected."""
    return planned.event_id.endswith(_EARLY)


def _remember(dice: random.Random, recent: list[Planned], planned: Planned) -> None:
    """Keep a record that can be repeated or contradicted."""
    if len(recent) < 1_000:
        recent.append(planned)
    else:
        recent[dice.randrange(1_000)] = planned


def _phases(
    dice: random.Random, index: int, event: dict[str, Any], at: datetime
) -> list[dict[str, Any]]:
    """A call that has been open for a while when its start is told; a sign of life and its end
    follow as they happen. Every second one has a leg id."""
    duration_s = dice.choice(_OPEN_FOR)
    ends = at + 2 * PHASES_APART_S * _SECOND
    event |= {"duration_s": duration_s, "started_at": (ends - duration_s * _SECOND).isoformat()}
    name = event["event_id"]
    if index % 2:
        event["leg_id"] = f"l-{name}"
    started = {one: value for one, value in event.items() if one != "duration_s"}
    elapsed_s = duration_s - PHASES_APART_S
    start, progress = (f"{name}{early}" for early in _EARLY)
    return [
        started | {"event_id": start, "phase": "start"},
        event | {"event_id": progress, "phase": "progress", "duration_s": elapsed_s},
        event | {"phase": "end"},
    ]


def _usage(
    plan: Plan, dice: random.Random, index: int, tenant: str, kind: str, start: datetime
) -> dict[str, Any]:
    prefix, length = dice.choice(_DESTINATIONS)
    if kind == "toll_free_in":
        prefix, length = dice.choice(_TOLL_FREE), 7
    number = dice.randrange(10 ** (length - 1), 10**length)
    name = f"{plan.run}-{plan.seed}" if plan.run else str(plan.seed)
    duration_s = dice.choice(_DURATIONS)
    began = start - timedelta(seconds=duration_s + dice.randrange(5, 600))
    event: dict[str, Any] = {
        "event_id": f"e-{name}-{index}",
        "source": SOURCE,
        "tenant_id": tenant,
        "kind": kind,
        "call_id": f"c-{name}-{index // 2}",
        "callee": f"+{prefix}{number}",
        "started_at": began.isoformat(),
        "duration_s": duration_s,
    }
    if kind in _CONFERENCE_KINDS:
        event["conference_id"] = f"m-{name}-{index // 5}"
        event["organizer_id"] = f"u-{index % 97}"
    return event


def _topic_of(event: dict[str, Any]) -> str:
    return topics.CONFERENCE_USAGE if "conference_id" in event else topics.CALL_USAGE


def _wrapped(
    plan: Plan, dice: random.Random, event: dict[str, Any], tenant: str, misplaced: int
) -> Planned:
    form = plan.envelope
    if form is Envelope.MIXED:
        form = (Envelope.BARE, Envelope.BINARY, Envelope.STRUCTURED)[dice.randrange(3)]
    topic = _topic_of(event)
    headers: tuple[tuple[str, bytes], ...] = ()
    value = orjson.dumps(event)
    if form is Envelope.BINARY:
        kept = {name: text for name, text in event.items() if name not in ("event_id", "source")}
        value = orjson.dumps(kept)
        headers = tuple(binary_headers(topic, source=event["source"], event_id=event["event_id"]))
    elif form is Envelope.STRUCTURED:
        value = orjson.dumps(
            {
                "specversion": "1.0",
                "type": topic,
                "source": event["source"],
                "id": event["event_id"],
                "subject": tenant,
                "data": event,
            }
        )
        headers = (("content-type", STRUCTURED),)
    return Planned(
        topic, tenant.encode(), value, headers, Expected.BOOK, None, misplaced, event["event_id"]
    )


def _malformed(dice: random.Random, event: dict[str, Any], tenant: str) -> Planned:
    variety = dice.choice(VARIETIES)
    topic = _topic_of(event)
    key = tenant.encode()
    event_id = event["event_id"]
    # So that its fate does not depend on what kind and length were drawn.
    event |= {"kind": "conf_dial_out" if "conference_id" in event else "international"}
    event["duration_s"] = event["duration_s"] or 1
    made_key, value = variety.make(event, key)
    if variety.reason is None:
        return Planned(topic, made_key, value, (), Expected.BOOK, None, 0, event_id)
    return Planned(topic, made_key, value, (), Expected.DEAD_LETTER, variety.reason, 0, event_id)


def _conflict(dice: random.Random, recent: Sequence[Planned]) -> Planned:
    """The id of an earlier event, with another duration."""
    bare = [one for one in recent if not one.headers and one.value] or list(recent)
    earlier = dice.choice(bare)
    event = orjson.loads(earlier.value or b"{}")
    data = event.get("data", event)
    data["duration_s"] = int(data.get("duration_s", 0)) + 1
    return Planned(
        earlier.topic, earlier.key, orjson.dumps(event), earlier.headers,
        Expected.DEAD_LETTER, DeadLetterReason.CONFLICT, 0, earlier.event_id,
    )  # fmt: skip


def _correction(dice: random.Random, earlier: Planned, event_id: str) -> Planned:
    """What an earlier event should have said: another duration, or that it was free. It goes
    where that went, and so comes after it; a correction may be corrected like anything else."""
    event = orjson.loads(earlier.value or b"{}")
    data = event.get("data", event)
    named = {"event_id": event_id, "source": SOURCE}
    data |= named | {"phase": "correction", "corrects": earlier.event_id}
    # Never longer, or it would end in the future.
    data["duration_s"] = dice.randrange(int(data.get("duration_s", 0)) + 1)
    if not dice.randrange(4):
        data["kind"] = "free"
    key = earlier.key or b""
    return Planned(
        earlier.topic, key, orjson.dumps(data), (), Expected.BOOK, None, 0, event_id
    )  # fmt: skip


# -- writing ---------------------------------------------------------------------------------


class Produced(Struct, kw_only=True):
    """What was written and acknowledged."""

    sent: int = 0
    by_expected: dict[str, int] = {}
    by_reason: dict[str, int] = {}
    ids: int = 0
    seconds: int = 0

    def count(self, planned: Planned) -> None:
        """One more record is acknowledged."""
        self.sent += 1
        name = planned.expected.value
        self.by_expected[name] = self.by_expected.get(name, 0) + 1
        if planned.reason is not None:
            reason = planned.reason.value
            self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
        if planned.expected is Expected.BOOK:
            self.ids += 1


def partition_of(planned: Planned, partitions: int) -> int:
    """Where a record goes: where its key belongs, or on purpose elsewhere."""
    if planned.key is None:
        return 0
    home: int = (murmur2(planned.key) & 0x7FFF_FFFF) % partitions
    if not planned.misplaced or partitions == 1:
        return home
    # Never by a multiple of the count, which would lead home again.
    return (home + 1 + (planned.misplaced - 1) % (partitions - 1)) % partitions


async def produce(
    settings: Settings,
    plan: Plan,
    *,
    start: datetime | None = None,
    on_progress: Callable[[Produced], None] | None = None,
    stop: asyncio.Event | None = None,
) -> Produced:
    """Write a load, at its rate (open loop: late records do not slow down the ones after).

    Returns when every record is acknowledged. Raises BrokerAwayError, and the first KafkaError
    of a record that was not.
    """
    producer = await started_producer(settings, linger_ms=5, max_batch_size=131_072)
    produced = Produced()
    began = monotonic()
    pending: set[asyncio.Future[Any]] = set()
    failed: list[BaseException] = []

    def settled(planned: Planned, future: asyncio.Future[Any]) -> None:
        pending.discard(future)
        error = None if future.cancelled() else future.exception()
        if error is not None:
            failed.append(error)
        elif not future.cancelled():
            produced.count(planned)

    try:
        for index, planned in enumerate(events(plan, start or datetime.now(UTC))):
            if failed or (stop is not None and stop.is_set()):
                break
            if plan.rate:
                ahead = index / plan.rate - (monotonic() - began)
                if ahead > 0:
                    await asyncio.sleep(ahead)
            future = await producer.send(
                settings.topics.of(planned.topic),
                key=planned.key,
                value=planned.value,
                headers=list(planned.headers),
                partition=partition_of(planned, settings.partitions),
            )
            pending.add(future)
            future.add_done_callback(partial(settled, planned))
            if index % 100 == 0:
                await asyncio.sleep(0)
                if on_progress is not None:
                    on_progress(produced)
        if pending:
            await asyncio.wait(pending)
        await asyncio.sleep(0)  # the last callbacks
        if failed:
            raise failed[0]
    finally:
        await producer.stop()
    produced.seconds = int(monotonic() - began)
    if on_progress is not None:
        on_progress(produced)
    return produced


async def preload(settings: Settings, records: Iterable[Planned], start: datetime) -> int:
    """Write records as fast as this machine can, in whole record batches; returns how many.

    For the benchmark: a prepared topic, no rate. Raises BrokerAwayError.
    """
    producer = await started_producer(
        settings, max_batch_size=900_000, compression_type="lz4", linger_ms=0
    )
    builders: dict[TopicPartition, Any] = {}
    pending: list[Any] = []
    stamp = int(start.timestamp() * 1000)
    count = 0
    try:
        for planned in records:
            tp = TopicPartition(
                settings.topics.of(planned.topic), partition_of(planned, settings.partitions)
            )
            builder = builders.get(tp)
            if builder is None:
                builder = builders[tp] = producer.create_batch()
            row = {
                "timestamp": stamp, "key": planned.key, "value": planned.value,
                "headers": list(planned.headers),
            }  # fmt: skip
            if builder.append(**row) is None:
                pending.append(await _send(producer, tp, builder))
                builder = builders[tp] = producer.create_batch()
                builder.append(**row)
            count += 1
        for tp, builder in builders.items():
            pending.append(await _send(producer, tp, builder))
        await asyncio.gather(*pending)
    finally:
        await producer.stop()
    return count


async def _send(producer: AIOKafkaProducer, tp: TopicPartition, builder: Any) -> Any:
    builder.close()
    return await producer.send_batch(builder, tp.topic, partition=tp.partition)


def write_expectation(path: Path, plan: Plan, start: datetime, produced: Produced) -> None:
    """Store what should come out, for `credits verify --expect`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "schema_version": 1,
                "source": SOURCE,
                "seed": plan.seed,
                "run": plan.run,
                "start": start.isoformat(),
                "sent": produced.sent,
                "distinct_ids": produced.ids,
                "by_expected": produced.by_expected,
                "by_reason": produced.by_reason,
            },
            indent=2,
        )
        + "\n"
    )


# -- opening tenants --------------------------------------------------------------------------


def opening_commands(plan: Plan, now: datetime) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(tenant, command id, command) for every tenant: an account, then a policy of its own, then
    the licences and the grant of those that have any.

    The ids tell the start as well: `billing_from` follows from it, and one id never says two
    things.
    """
    name = f"{plan.seed}/{now.isoformat()}"
    for number in range(1, plan.tenants + 1):
        for what, command in _commands_of(plan, number, now):
            issued = {"issued_at": now.isoformat(), "issued_by": SOURCE}
            command_id = str(uuid5(LOADS, f"{name}/{number}/{what}"))
            yield tenant_id(number), command_id, command | issued


def _commands_of(plan: Plan, number: int, now: datetime) -> Iterator[tuple[str, dict[str, Any]]]:
    yield (
        "open",
        {
            "command": "open_tenant",
            "currency": "USD",
            "opening_balance": str(105 + number % 7 * 20),
            "billing_from": (now - BILLED_SINCE).isoformat(),
        },
    )
    yield (
        "settings",
        {
            "command": "settings",
            "expected_version": 0,
            "policy": _policy(number),
            "payment_methods": ["card-1", "card-2"][: 1 + number % 2],
        },
    )
    calling = _calling_plan(plan, number)
    if calling is not None:
        licences = {
            "command": "licences",
            "count": 1,
            "effective_from": (now - LICENSED_SINCE).isoformat(),
        }
        capability, country = calling
        yield "calling", licences | {"capability": capability, "country": country}
        yield "conferences", licences | {"capability": _CONFERENCE_PLAN}
    place = _chosen(number, plan.granted_ppm)
    if place:
        yield "grant", {"command": "grant"} | _grant(place, now)


def _grant(place: int, now: datetime) -> dict[str, Any]:
    """One of four in turn: money that expires while the load runs, and whose rest late usage still
    finds; an allowance; money that is to come; and a gift."""
    usd = {"currency": "USD"}
    match place % 4:
        case 1:
            lasts = {
                "effective_at": (now - timedelta(days=1)).isoformat(),
                "expires_at": (now + SOON).isoformat(),
            }
            return lasts | {"amount": usd | {"amount": "15"}, "reason": "trial"}
        case 2:
            since = {"effective_at": (now - BILLED_SINCE).isoformat(), "every_months": 1}
            return since | {"amount": usd | {"amount": "5"}, "reason": "monthly allowance"}
        case 3:
            comes = {"kind": "paid", "effective_at": (now + SOON).isoformat()}
            return comes | {"amount": usd | {"amount": "25"}, "reason": "paid in advance"}
        case _:
            ends = {"priority": 10, "expires_at": (now + timedelta(days=30)).isoformat()}
            return ends | {"amount": usd | {"amount": "10"}, "reason": "welcome"}


def _policy(number: int) -> dict[str, Any]:
    base: dict[str, Any] = {"enabled": number % 10 != 9, "trigger": "100", "cooldown_s": 5}
    match number % 4:
        case 0:
            return base | {"method": "fixed", "amount": "200", "max_per_day": 1_000}
        case 1:
            return base | {"method": "fixed_multiple", "amount": "50", "max_per_day": 1_000}
        case 2:
            return base | {"method": "target", "target": "250", "monthly_cap": "500"}
        case _:
            return base | {"method": "fixed", "amount": "60", "max_per_day": 3}


def openings(plan: Plan, now: datetime) -> Iterator[Planned]:
    """The opening commands as records."""
    for tenant, command_id, command in opening_commands(plan, now):
        headers = binary_headers(topics.COMMAND, source=SOURCE, event_id=command_id)
        yield Planned(
            topics.COMMAND, tenant.encode(), orjson.dumps(command), tuple(headers), Expected.BOOK,
            None, 0, command_id,
        )  # fmt: skip


async def open_tenants(settings: Settings, plan: Plan, *, now: datetime | None = None) -> int:
    """Open every tenant of a plan and wait until each command is answered; returns how many were
    refused. Raises TimeoutError naming the first tenant without an answer."""
    now = now or datetime.now(UTC)
    name = settings.topics.of(topics.NOTIFICATION)
    reader = await started_reader(settings)
    producer = await started_producer(settings, linger_ms=5)
    try:
        tps = [TopicPartition(name, number) for number in range(settings.partitions)]
        await read_from_end(reader, tps)
        waiting: dict[str, str] = {}
        sends: list[Awaitable[Any]] = []
        for planned in openings(plan, now):
            waiting[planned.event_id] = (planned.key or b"").decode()
            sends.append(
                await producer.send(
                    settings.topics.of(topics.COMMAND),
                    key=planned.key,
                    value=planned.value,
                    headers=list(planned.headers),
                )
            )
        await asyncio.gather(*sends)
        return await _await_answers(reader, waiting)
    finally:
        await producer.stop()
        await reader.stop()


async def _await_answers(reader: Any, waiting: dict[str, str]) -> int:
    refused = 0
    # From the last answer on: many tenants take their time, a worker that is away says nothing.
    deadline = monotonic() + ANSWER_WITHIN_S
    while waiting:
        if monotonic() > deadline:
            raise TimeoutError(
                f"{len(waiting)} commands have no answer, and none came for {ANSWER_WITHIN_S} s; "
                f"that of {next(iter(waiting.values()))} is among them; is a worker running?"
            )
        for records in (await reader.getmany(timeout_ms=200)).values():
            for record in records:
                notice = orjson.loads(record.value)
                if waiting.pop(notice.get("command_id", ""), None) is not None:
                    deadline = monotonic() + ANSWER_WITHIN_S
                    refused += notice["notice"] == NoticeKind.COMMAND_REFUSED
    return refused
