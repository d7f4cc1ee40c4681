"""How many events a second workers book, and what an event costs: CPU, and bytes in Kafka."""

import asyncio
import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

import msgspec
from msgspec import Struct

from schemas import topics
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.bench.worker import (
    BenchError,
    Measured,
    Place,
    Progress,
    ms,
    open_tenants,
    progress,
    running,
    say,
    tenths,
    usage_names,
)
from streams.testbed.load import Envelope, Plan, events


class Throughput(Struct, frozen=True, kw_only=True):
    """Booking a prepared topic. CPU is that of all worker processes, without the broker's.
    `kafka_bytes_per_event` is what the outputs took on the broker's disk, compressed; None when
    the broker's folder is not ours to look into."""

    workers: int
    events: int
    seconds_ms: int
    events_per_s: int
    cpu_us_per_event: str
    kafka_bytes_per_event: int | None


def a_plan(tenants: int, count: int, seed: int = 1, *, zipf: bool = True) -> Plan:
    """Bare JSON, 1 % repeats, nothing malformed: what a healthy installation gets."""
    return Plan(
        tenants=tenants,
        events=count,
        seed=seed,
        duplicates_ppm=10_000,
        late_ppm=0,
        malformed_ppm=0,
        wrong_partition_ppm=0,
        envelope=Envelope.BARE,
        zipf=zipf,
    )


def output_bytes(settings: Settings, data: Path | None) -> int | None:
    """What the output topics of an installation take on the broker's disk (RF 1)."""
    if data is None:
        return None
    outputs = [
        settings.topics.of(topic.name)
        for topic in topics.MANIFEST
        if topic.direction is not topics.Direction.IN
    ]
    return sum(
        log.stat().st_size
        for name in outputs
        for number in range(settings.partitions)
        for log in (data / f"{name}-{number}").glob("*.log")
    )


class Mark(Struct, frozen=True):
    """How far processes were at a moment: seconds on a clock, events done, CPU time of them all."""

    at_s: float
    done: int
    cpu_us: int


class Pace(Struct, frozen=True, kw_only=True):
    """What happened between two marks."""

    events: int
    seconds_ms: int
    events_per_s: int
    cpu_us_per_event: str


def pace(first: Mark, last: Mark) -> Pace:
    """What a process did from one mark to a later one with more events done."""
    done, took_ms = last.done - first.done, ms(last.at_s - first.at_s)
    return Pace(
        events=done,
        seconds_ms=took_ms,
        events_per_s=done * 1_000 // took_ms,
        cpu_us_per_event=tenths((last.cpu_us - first.cpu_us) * 10 // done),
    )


class Marks(Struct, frozen=True):
    """The first events that were done, half of them, and enough of them to end."""

    first: Mark
    half: Mark
    last: Mark


def marks_of(seen: Sequence[Mark], half: int) -> Marks:
    """The marks that count of all that were taken until there were enough events.

    Offsets are committed in steps, and one step of a small load may pass two of them: the mark
    before the last step stands for what came no earlier. Raises BenchError when there is none.
    """
    *before, last = seen
    if not before:
        raise BenchError(f"all {last.done} events were booked before anyone looked")

    def from_(least: int) -> Mark:
        return next((mark for mark in before if mark.done >= least), before[-1])

    return Marks(from_(1), from_(half), last)


async def drained(
    watched: Progress,
    names: Sequence[str],
    count: int,
    processes: Sequence[Measured],
    *,
    enough: int,
) -> Marks:
    """Wait until processes have done so many events, and say how they came to `enough` of them.
    Raises BenchError."""
    seen = [
        Mark(monotonic(), done, sum(process.cpu_us() for process in processes))
        async for done in watched.steps(names, enough, processes)
    ]
    await watched.until(names, count, processes)
    return marks_of(seen, count // 2)


async def prepare(settings: Settings, place: Place, plan: Plan, start: datetime) -> int:
    """Open the tenants and write the events; returns how many. Raises BenchError."""
    say(f"opening {plan.tenants:,} tenants")
    await open_tenants(settings, place, load.openings(plan, start))
    say(f"writing {plan.events:,} events")
    began = monotonic()
    count = await load.preload(settings, events(plan, start), start)
    say(f"written at {int(count / (monotonic() - began)):,} events/s; booking them")
    return count


async def measure_throughput(
    settings: Settings, place: Place, plan: Plan, *, workers: int = 1, data: Path | None = None
) -> Throughput:
    """Open the tenants, stop, prepare the topics, start cold, and watch it drain.

    With several workers the watch begins when all are ready and ends before the first of them
    has nothing left to do. Raises BenchError.
    """
    count = await prepare(settings, place, plan, datetime.now(UTC))
    # The group hears of the last batches late; so does it of those before, all through the run.
    enough = count * 9 // 10 if workers == 1 else count * 4 // 5
    bytes_before = output_bytes(settings, data)
    async with progress(settings) as watched:
        with contextlib.ExitStack() as stack:
            started = [stack.enter_context(running(settings, place)) for _ in range(workers)]
            if workers > 1:
                await asyncio.gather(*(worker.until_ready() for worker in started))
            names = usage_names(settings)
            marks = await drained(watched, names, count, started, enough=enough)
    whole = pace(marks.first, marks.last)
    bytes_after = output_bytes(settings, data)
    return Throughput(
        workers=workers,
        **msgspec.structs.asdict(whole),
        kafka_bytes_per_event=None
        if bytes_before is None or bytes_after is None
        else (bytes_after - bytes_before) // count,
    )
