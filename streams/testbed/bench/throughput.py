"""How many events a second workers book, and what an event costs: CPU, and bytes in Kafka."""

import asyncio
import contextlib
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from msgspec import Struct

from schemas import topics
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.bench.worker import (
    POLL_S,
    READY_WITHIN_S,
    BenchError,
    Place,
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


async def measure_throughput(
    settings: Settings, place: Place, plan: Plan, *, workers: int = 1, data: Path | None = None
) -> Throughput:
    """Open the tenants, stop, prepare the topics, start cold, and watch it drain.

    With several workers the watch begins when all are ready and ends before the first of them
    has nothing left to do. Raises BenchError.
    """
    start = datetime.now(UTC)
    say(f"opening {plan.tenants:,} tenants")
    await open_tenants(settings, place, load.openings(plan, start))
    say(f"writing {plan.events:,} events")
    began = monotonic()
    count = await load.preload(settings, events(plan, start), start)
    say(f"written at {int(count / (monotonic() - began)):,} events/s; booking them")
    names = usage_names(settings)
    # The group hears of the last batches late; so does it of those before, all through the run.
    enough = count * 9 // 10 if workers == 1 else count * 4 // 5
    bytes_before = output_bytes(settings, data)
    async with progress(settings) as watched:
        with contextlib.ExitStack() as stack:
            started = [stack.enter_context(running(settings, place)) for _ in range(workers)]
            if workers > 1:
                await asyncio.gather(*(worker.until_ready() for worker in started))
            deadline = monotonic() + READY_WITHIN_S
            while not (first := await watched.committed(names)):
                if monotonic() > deadline:
                    raise BenchError(f"nothing was booked; see {place.folder / 'worker.log'}")
                await asyncio.sleep(POLL_S)
            began, cpu_us = monotonic(), sum(worker.cpu_us() for worker in started)
            last = await watched.until(names, enough, started)
            took_ms = ms(monotonic() - began)
            cpu_us = sum(worker.cpu_us() for worker in started) - cpu_us
            await watched.until(names, count, started)
    done = last - first
    if done <= 0 or not took_ms:
        raise BenchError(f"{count} events are too few to measure: all were booked at once")
    bytes_after = output_bytes(settings, data)
    return Throughput(
        workers=workers,
        events=done,
        seconds_ms=took_ms,
        events_per_s=done * 1_000 // took_ms,
        cpu_us_per_event=tenths(cpu_us * 10 // done),
        kafka_bytes_per_event=None
        if bytes_before is None or bytes_after is None
        else (bytes_after - bytes_before) // count,
    )
