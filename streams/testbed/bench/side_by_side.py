"""A worker side by side with Kafka Streams: one preloaded topic, one broker, one run.

The program in `kafka_streams/` does less than a worker: it prices by the longest prefix, remembers
ids, debits one number, and writes an entry an event and a request a shortage. What it published
must be right to the nano, for a fast wrong run is void.
"""

import contextlib
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import orjson
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from msgspec import Struct

from streams.billing.rates import Tariff
from streams.billing.rating import TO_NANOS, price
from streams.decks import load_deck
from streams.engine.kafka import connection
from streams.settings import Settings
from streams.testbed import broker
from streams.testbed.bench.throughput import Marks, drained, pace, prepare
from streams.testbed.bench.worker import (
    BenchError,
    Measured,
    Place,
    progress,
    running,
    say,
    usage_names,
)
from streams.testbed.kafka import read_to_end
from streams.testbed.load import Expected, Plan, Planned, events

KAFKA_STREAMS_VERSION: Final = "4.2.1"
# Threads, and the milliseconds of a transaction: as a worker of ours by default (its linger), and
# as one would have them who cares for throughput alone. Then as Kafka Streams comes.
VARIANTS: Final = ((1, 100, True), (2, 100, True), (1, 1_000, True), (1, 100, False))
OURS: Final = "credits, one worker"
OPENING_NANOS: Final = 105_000_000_000
TRIGGER_NANOS: Final = 100_000_000_000
_PROGRAM: Final = Path(__file__).parent / "kafka_streams"
_JVM: Final = ("-Xms1g", "-Xmx2g", "-XX:+UseParallelGC")


class Side(Struct, frozen=True, kw_only=True):
    """One program on the same topic, from its first commit until nine tenths are done; `warm` is
    from one half on for the JVM, and the whole for a worker, which compiles nothing while it runs
    and books in steps too long for a part of it to be told. `faster` and `cheaper`: how many times
    the events/s of this side, and what part of its CPU, a worker of ours has in the same run; above
    1 is to our favour."""

    at: str
    events_per_s: int
    cpu_us_per_event: str
    warm_events_per_s: int
    warm_cpu_us_per_event: str
    mb: int
    faster: str = "1.00"
    cheaper: str = "1.00"
    warm_faster: str = "1.00"
    warm_cheaper: str = "1.00"


class KafkaStreams(Measured):
    """One process of the program in `kafka_streams/`."""

    called = "Kafka Streams"


# -- the program ------------------------------------------------------------------------------


def compiled(place: Place) -> str:
    """Fetch the jars and compile the program, once; returns its class path. Raises BenchError."""
    try:
        jars = broker.fetch_jars(_PROGRAM / "pom.xml", f"kafka-streams-{KAFKA_STREAMS_VERSION}")
    except broker.BrokerError as error:
        raise BenchError(str(error)) from None
    classes = place.folder / "kafka-streams-classes"
    path = ":".join(str(jar) for jar in sorted(jars.glob("*.jar")))
    if classes.is_dir():
        return f"{classes}:{path}"
    # The compiler is one of the jars: a Java runtime is enough.
    done = subprocess.run(  # noqa: S603
        [
            *(_java(), "-cp", path, "org.eclipse.jdt.internal.compiler.batch.Main"),
            *("-17", "-proc:none", "-nowarn", "-cp", path, "-d", str(classes)),
            str(_PROGRAM / "UsageLedger.java"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"UsageLedger.java does not compile: {done.stdout}{done.stderr}")
    return f"{classes}:{path}"


def _java() -> str:
    return shutil.which("java") or "java"


def write_deck(path: Path, tariff: Tariff) -> None:
    """Write prefix, price and connect fee in nanos, increments and rounding. Raises BenchError when
    a row has more than the program can price."""
    with path.open("w") as file:
        for rate in tariff.rates.values():
            rounding = rate.rounding or TO_NANOS
            if rate.scale != 9 or rounding.decimals > 9 or rate.special is not None:
                raise BenchError(f"the row of {rate.prefix} is none that both sides can price")
            row = (
                *(rate.prefix, rate.per_minute, rate.connect_fee),
                *(rate.initial_increment_s, rate.increment_s),
                *(10 ** (9 - rounding.decimals), rounding.mode),
            )
            file.write(",".join(map(str, row)) + "\n")


class Variant(Struct, frozen=True):
    """How the program is run, and what it then calls its group and topics. `tuned`: with
    `streams.properties` and its state in memory, else with Kafka Streams' defaults and RocksDB."""

    namespace: str
    threads: int
    commit_ms: int
    tuned: bool = True

    @property
    def at(self) -> str:
        """What to call it."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        defaults = "" if self.tuned else ", defaults"
        return f"kafka streams, {threads}, {self.commit_ms} ms{defaults}"

    @property
    def group(self) -> str:
        """Kafka Streams' application."""
        tuned = "tuned" if self.tuned else "defaults"
        return f"{self.namespace}kafka-streams-{self.threads}-{self.commit_ms}-{tuned}"

    @property
    def entries(self) -> str:
        """An entry an event."""
        return f"{self.group}-entries"

    @property
    def requests(self) -> str:
        """A request a shortage."""
        return f"{self.group}-requests"

    @property
    def balances(self) -> str:
        """The changelog of the balances: Kafka Streams makes it and gives it its name."""
        return f"{self.group}-balances-changelog"


@contextlib.contextmanager
def _kafka_streams(
    settings: Settings, place: Place, variant: Variant, class_path: str, deck: Path
) -> Iterator[KafkaStreams]:
    given = {
        "bootstrap.servers": settings.broker,
        "application.id": variant.group,
        "num.stream.threads": variant.threads,
        "commit.interval.ms": variant.commit_ms,
        "replication.factor": settings.replication,
        "state.dir": place.folder / variant.group,
        "work.usage": ",".join(usage_names(settings)),
        "work.entries": variant.entries,
        "work.requests": variant.requests,
        "work.deck": deck,
        "work.opening": OPENING_NANOS,
        "work.trigger": TRIGGER_NANOS,
    }
    process = KafkaStreams(
        [
            *(_java(), *_JVM, "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"),
            *("-cp", class_path, "UsageLedger"),
            str(_PROGRAM / ("streams.properties" if variant.tuned else "defaults.properties")),
            *(f"{name}={value}" for name, value in given.items()),
        ],
        dict(os.environ),
        place.folder / "worker.log",
        place.cores,
    )
    try:
        yield process
    finally:
        process.stop()


async def _make_topics(settings: Settings, variant: Variant) -> None:
    admin = AIOKafkaAdminClient(**connection(settings))
    await admin.start()
    try:
        made = await admin.create_topics(
            [
                NewTopic(
                    name=name,
                    num_partitions=settings.partitions,
                    replication_factor=settings.replication,
                )
                for name in (variant.entries, variant.requests)
            ]
        )
    finally:
        await admin.close()
    for name, code, *_ in made.topic_errors:
        if code:
            raise BenchError(f"{name} cannot be created: {code}")


# -- what is right ----------------------------------------------------------------------------


class Books(Struct, frozen=True):
    """What must come out: the amount of every id, and what every tenant has left."""

    amounts: Mapping[tuple[str, str], int]
    balances: Mapping[str, int]


def expected_books(tariff: Tariff, planned: Iterable[Planned]) -> Books:
    """Price every event once, by the same deck. Raises BenchError for an unrated one."""
    amounts: dict[tuple[str, str], int] = {}
    balances: dict[str, int] = {}
    for one in planned:
        if one.expected is Expected.DUPLICATE:
            continue
        event = orjson.loads(one.value or b"")
        rate = tariff.find(event["callee"][1:])
        if rate is None:
            raise BenchError(f"{event['callee']} has no rate")
        nanos = price(rate, event["duration_s"]).amount_nanos
        amounts[event["source"], event["event_id"]] = nanos
        tenant = event["tenant_id"]
        balances[tenant] = balances.get(tenant, OPENING_NANOS) - nanos
    return Books(amounts, balances)


async def faults_of(settings: Settings, variant: Variant, right: Books) -> list[str]:
    """What is wrong with what the program published: entries, balances, requests."""
    waiting = dict(right.amounts)
    faults: Counter[str] = Counter()
    async for record in read_to_end(settings, [variant.entries]):
        entry = orjson.loads(record.value)
        amount = waiting.pop((entry["source"], entry["event_id"]), None)
        if amount is None:
            faults["entries twice or of no event"] += 1
        elif amount != entry["amount_nanos"]:
            faults["entries with a wrong amount"] += 1
    faults["events without an entry"] = len(waiting)
    left: dict[str, int] = {}
    async for record in read_to_end(settings, [variant.balances]):
        left[record.key.decode()] = int.from_bytes(record.value[:8], "big", signed=True)
    faults["wrong balances"] = sum(
        left.get(tenant) != right.balances.get(tenant)
        for tenant in left.keys() | right.balances.keys()
    )
    # A balance only falls here: who is short in the end has asked, once.
    short = {tenant for tenant, nanos in right.balances.items() if nanos < TRIGGER_NANOS}
    asked: Counter[str] = Counter()
    async for record in read_to_end(settings, [variant.requests]):
        asked[record.key.decode()] += 1
    faults["requests too many or too few"] = sum(
        asked[tenant] != (tenant in short) for tenant in asked.keys() | short
    )
    return [f"{count} {what}" for what, count in faults.items() if count]


# -- the measurement --------------------------------------------------------------------------


class Booked(Struct, frozen=True):
    """How a process came to nine tenths of the events, and the most of its memory that was ever
    resident."""

    marks: Marks
    memory_bytes: int


async def _booked(
    settings: Settings, process: Measured, count: int, group: str | None = None
) -> Booked:
    async with progress(settings, group) as watched:
        marks = await drained(
            watched, usage_names(settings), count, [process], enough=count * 9 // 10
        )
    return Booked(marks, process.most_memory_bytes())


async def book(
    settings: Settings, place: Place, variant: Variant, deck: Path, count: int
) -> Booked:
    """Let the program book what is in the usage topics: so many events. Raises BenchError."""
    class_path = compiled(place)
    await _make_topics(settings, variant)
    with _kafka_streams(settings, place, variant, class_path, deck) as process:
        return await _booked(settings, process, count, variant.group)


def side_of(at: str, booked: Booked, *, compiles: bool = True) -> Side:
    """The figures of one program: from its first events, and warm from half of them if it compiles
    itself."""
    marks = booked.marks
    whole = pace(marks.first, marks.last)
    warm = pace(marks.half, marks.last) if compiles else whole
    return Side(
        at=at,
        events_per_s=whole.events_per_s,
        cpu_us_per_event=whole.cpu_us_per_event,
        warm_events_per_s=warm.events_per_s,
        warm_cpu_us_per_event=warm.cpu_us_per_event,
        mb=booked.memory_bytes // 1_000_000,
    )


def _hundredths(above: int, below: int) -> str:
    count = above * 100 // max(1, below)
    return f"{count // 100}.{count % 100:02d}"


def _tenths_of(text: str) -> int:
    return int(text.replace(".", ""))


def compared(side: Side, ours: Side) -> Side:
    """A side with how a worker of ours did beside it."""
    return msgspec.structs.replace(
        side,
        faster=_hundredths(ours.events_per_s, side.events_per_s),
        cheaper=_hundredths(_tenths_of(side.cpu_us_per_event), _tenths_of(ours.cpu_us_per_event)),
        warm_faster=_hundredths(ours.warm_events_per_s, side.warm_events_per_s),
        warm_cheaper=_hundredths(
            _tenths_of(side.warm_cpu_us_per_event), _tenths_of(ours.warm_cpu_us_per_event)
        ),
    )


async def measure_side_by_side(
    settings: Settings, place: Place, plan: Plan, *, verify: bool
) -> tuple[list[Side], list[str]]:
    """Prepare one topic; let the program and a worker book it one after the other, each alone and
    from a cold start. Returns the sides, the worker first, and what the program got wrong
    (nothing, unless it is to be verified). Raises BenchError."""
    tariff = load_deck(None)
    deck = place.folder / "kafka-streams-deck.csv"
    write_deck(deck, tariff)
    compiled(place)  # before the long part: a machine that cannot says so at once
    start = datetime.now(UTC)
    count = await prepare(settings, place, plan, start)
    variants = [Variant(settings.namespace, *numbers) for numbers in VARIANTS]
    sides: list[Side] = []
    for variant in variants:
        say(variant.at)
        sides.append(side_of(variant.at, await book(settings, place, variant, deck, count)))
    say(OURS)
    with running(settings, place) as worker:
        ours = side_of(OURS, await _booked(settings, worker, count), compiles=False)
    faults: list[str] = []
    if verify:
        say("checking what Kafka Streams booked")
        right = expected_books(tariff, events(plan, start))
        for variant in variants:
            faults += [
                f"{variant.at}: {fault}" for fault in await faults_of(settings, variant, right)
            ]
    return [ours, *(compared(one, ours) for one in sides)], faults
