"""How long nobody serves the partitions of a worker that is killed."""

import asyncio
from itertools import pairwise
from time import monotonic
from typing import Any, Final

from aiokafka import TopicPartition
from msgspec import Struct

from schemas import topics
from streams.settings import Settings
from streams.testbed.bench.steady import send_slices, slices_of
from streams.testbed.bench.worker import BenchError, Place, Worker, ms, running, say
from streams.testbed.kafka import read_from_end, started_producer, started_reader

RATE: Final = 1_000
SEED: Final = 97
KILLED_AFTER_S: Final = 5
WATCHED_FOR_S: Final = 45
# At this rate every partition has entries several times a second.
_SILENT_MS: Final = 2_000


class Takeover(Struct, frozen=True, kw_only=True):
    """A SIGKILL of one worker of two under a steady load: for how long the partitions it had got
    no entry, and what the rows and ids in memory were at that time."""

    rate: int
    rows: int
    ids: int
    partitions: int
    unserved_median_ms: int
    unserved_most_ms: int


async def measure_takeover(settings: Settings, place: Place, tenants: int) -> Takeover:
    """Kill one of two workers and watch the ledger. Raises BenchError."""
    say(f"a worker is killed at {RATE:,} events/s")
    with running(settings, place) as first, running(settings, place) as second:
        await asyncio.gather(first.until_ready(), second.until_ready())
        gaps_ms = sorted(await _gaps(settings, tenants, first))
        if not gaps_ms:
            raise BenchError("the killed worker had no partition")
        return Takeover(
            rate=RATE,
            rows=await second.metric("credits_rows"),
            ids=await second.metric("credits_remembered_ids"),
            partitions=len(gaps_ms),
            unserved_median_ms=gaps_ms[len(gaps_ms) // 2],
            unserved_most_ms=gaps_ms[-1],
        )


async def _gaps(settings: Settings, tenants: int, victim: Worker) -> list[int]:
    reader = await started_reader(settings)
    producer = await started_producer(
        settings, max_batch_size=900_000, compression_type="lz4", linger_ms=0
    )
    try:
        slices = slices_of(settings, producer, tenants, RATE, SEED, WATCHED_FOR_S)
        tps = [
            TopicPartition(settings.topics.of(topics.LEDGER), number)
            for number in range(settings.partitions)
        ]
        await read_from_end(reader, tps)
        began = monotonic() + 1
        sending = asyncio.create_task(send_slices(producer, slices, began))
        arrivals = await _watch(reader, victim, began)
        await sending
    finally:
        await producer.stop()
        await reader.stop()
    gaps_ms: list[int] = []
    for tp in tps:
        times = arrivals.get(tp, [])
        if not times or times[-1] < began + WATCHED_FOR_S - _SILENT_MS / 1_000:
            raise BenchError(f"{tp.topic}/{tp.partition} was not served again")
        longest = max(after - before for before, after in pairwise(times))
        if ms(longest) > _SILENT_MS:
            gaps_ms.append(ms(longest))
    return gaps_ms


async def _watch(reader: Any, victim: Worker, began: float) -> dict[TopicPartition, list[float]]:
    """When entries came, by partition; the worker is killed in between."""
    arrivals: dict[TopicPartition, list[float]] = {}
    alive = True
    while monotonic() < began + WATCHED_FOR_S:
        if alive and monotonic() > began + KILLED_AFTER_S:
            victim.kill()
            alive = False
        for tp in await reader.getmany(timeout_ms=50):
            arrivals.setdefault(tp, []).append(monotonic())
    return arrivals
