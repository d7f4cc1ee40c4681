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
    POLL_S,
    READY_WITHIN_S,
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
    """Raises BenchError when there is too little between them to tell."""
    done, took_ms = last.done - first.done, ms(last.at_s - first.at_s)
    if done <= 0 or not took_ms:
        raise BenchError(f"{last.done} events are too few to measure: all were booked at once")
    return Pace(
        events=done,
        seconds_ms=took_ms,
        events_per_s=done * 1_000 // took_ms,
        cpu_us_per_event=tenths((last.cpu_us - first.cpu_us) * 10 // done),
    )


async def drained(
    watched: Progress,
    names: Sequence[str],
    count: int,
    processes: Sequence[Measured],
    *,
    enough: int,
) -> tuple[Mark, Mark, Mark]:
    """Wait until processes have done so many events; marks at the first that were done, at half of
    them and at `enough`. Raises BenchError."""

    def mark(done: int) -> Mark:
        return Mark(monotonic(), done, sum(process.cpu_us() for process in processes))

    deadline = monotonic() + READY_WITHIN_S
    while not (done := await watched.committed(names)):
        for process in processes:
            process.require_alive()
        if monotonic() > deadline:
            raise BenchError(f"nothing was booked; see {processes[0].log_name}")
        await asyncio.sleep(POLL_S)
    first = mark(done)
    half = mark(await watched.until(names, count // 2, processes))
    last = mark(await watched.until(names, enough, processes))
    await watched.until(names, count, processes)
    return first, half, last


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
            first, _, last = await drained(watched, names, count, started, enough=enough)
    whole = pace(first, last)
    bytes_after = output_bytes(settings, data)
    return Throughput(
        workers=workers,
        **msgspec.structs.asdict(whole),
        kafka_bytes_per_event=None
        if bytes_before is None or bytes_after is None
        else (bytes_after - bytes_before) // count,
    )
