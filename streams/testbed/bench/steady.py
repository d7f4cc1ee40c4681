"""A steady load: latency from the intended send time, and what the worker's CPU does meanwhile."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final

import orjson
from aiokafka import AIOKafkaProducer, TopicPartition
from msgspec import Struct

from schemas import topics
from streams.settings import Settings
from streams.testbed.bench.throughput import a_plan
from streams.testbed.bench.worker import (
    BenchError,
    Worker,
    ms,
    progress,
    say,
    tenths,
    usage_names,
)
from streams.testbed.kafka import ends_of, read_from_end, started_producer, started_reader
from streams.testbed.load import events, partition_of

# A worker that has just restored reads its accounts from their rows, and a broker compiles what it
# runs: nothing of these seconds is counted.
WARM_UP_S: Final = 5
STEADY_FOR_S: Final = 10
IDLE_FOR_S: Final = 10
# Latency counts from the intended send time, so what a slice waits here is counted too.
SLICE_MS: Final = 20
# Above this rate the entries of one partition are read: reading all would cost what is measured.
ALL_WATCHED_BELOW: Final = 2_000
# What was sent stays unread for this long after the last entry before we stop looking.
_SILENCE_S: Final = 2


class Steady(Struct, frozen=True, kw_only=True):
    """A load at a fixed rate, open loop. Latency is from the intended send time to the moment a
    read_committed reader has the entry; CPU is the worker's, in per cent of one core."""

    rate: int
    samples: int
    p50_ms: int
    p99_ms: int
    p99_9_ms: int
    max_ms: int
    cpu_percent: str


def whole_slices(rate: int) -> int:
    """The rate nearest below that gives every slice the same number of events."""
    return max(1, rate * SLICE_MS // 1_000) * 1_000 // SLICE_MS


async def measure_idle(worker: Worker) -> str:
    """CPU of a worker without work, in per cent of one core."""
    before, began = worker.cpu_us(), monotonic()
    await asyncio.sleep(IDLE_FOR_S)
    return _percent(worker.cpu_us() - before, monotonic() - began)


async def measure_steady(
    settings: Settings, worker: Worker, *, tenants: int, rate: int, seed: int
) -> Steady:
    """Send at a rate to a worker that runs, and watch its entries. `seed`: one of its own, for
    its ids must be new ones. Raises BenchError."""
    say(f"{rate:,} events/s for {WARM_UP_S + STEADY_FOR_S} s")
    reader = await started_reader(settings)
    producer = await started_producer(
        settings, max_batch_size=900_000, compression_type="lz4", linger_ms=0
    )
    try:
        slices = slices_of(settings, producer, tenants, rate, seed, WARM_UP_S + STEADY_FOR_S)
        watched = settings.partitions if rate < ALL_WATCHED_BELOW else 1
        tps = [
            TopicPartition(settings.topics.of(topics.LEDGER), number) for number in range(watched)
        ]
        await read_from_end(reader, tps)
        began = monotonic() + 1
        until = began + WARM_UP_S + STEADY_FOR_S
        watching = asyncio.create_task(_watch(reader, began, rate, seed, until=until + 10))
        warm = asyncio.create_task(_cpu_at(worker, began + WARM_UP_S))
        await send_slices(producer, slices, began)
        cpu_us, at = await warm
        cpu_percent = _percent(worker.cpu_us() - cpu_us, monotonic() - at)
        latencies_ms = sorted(await watching)
    finally:
        await producer.stop()
        await reader.stop()
    if not latencies_ms:
        raise BenchError("no entry was seen while latency was measured")
    return Steady(
        rate=rate,
        samples=len(latencies_ms),
        p50_ms=latencies_ms[len(latencies_ms) // 2],
        p99_ms=latencies_ms[len(latencies_ms) * 99 // 100],
        p99_9_ms=latencies_ms[len(latencies_ms) * 999 // 1_000],
        max_ms=latencies_ms[-1],
        cpu_percent=cpu_percent,
    )


async def all_booked(settings: Settings, worker: Worker) -> None:
    """Wait until nothing of a load is left, so that the next one finds an idle worker."""
    reader = await started_reader(settings)
    try:
        tps = [
            TopicPartition(name, number)
            for name in usage_names(settings)
            for number in range(settings.partitions)
        ]
        ends = await ends_of(reader, tps)
    finally:
        await reader.stop()
    async with progress(settings) as watched:
        await watched.until(usage_names(settings), sum(ends.values()), [worker])


async def _cpu_at(worker: Worker, at: float) -> tuple[int, float]:
    """The worker's CPU at an instant, and when that was."""
    await asyncio.sleep(max(0, at - monotonic()))
    return worker.cpu_us(), monotonic()


def _percent(cpu_us: int, seconds: float) -> str:
    return tenths(cpu_us * 1_000 // round(seconds * 1_000_000))


def slices_of(
    settings: Settings,
    producer: AIOKafkaProducer,
    tenants: int,
    rate: int,
    seed: int,
    seconds: int,
) -> list[dict[TopicPartition, Any]]:
    """Record batches, one a slice and partition, made beforehand: making them costs more than
    sending. An event's call id ends in its index, and so says when it was meant to be sent."""
    start = datetime.now(UTC)
    slices: list[dict[TopicPartition, Any]] = [{} for _ in range(seconds * 1_000 // SLICE_MS)]
    per_slice = rate * SLICE_MS // 1_000
    for index, planned in enumerate(events(a_plan(tenants, rate * seconds, seed), start)):
        event = orjson.loads(planned.value or b"{}") | {"call_id": f"at-{seed}-{index}"}
        tp = TopicPartition(
            settings.topics.of(planned.topic), partition_of(planned, settings.partitions)
        )
        batches = slices[index // per_slice]
        batch = batches.get(tp)
        if batch is None:
            batch = batches[tp] = producer.create_batch()
        batch.append(timestamp=None, key=planned.key, value=orjson.dumps(event), headers=[])
    for batches in slices:
        for batch in batches.values():
            batch.close()
    return slices


async def send_slices(
    producer: AIOKafkaProducer, slices: Sequence[dict[TopicPartition, Any]], began: float
) -> None:
    """Send every slice at its time, open loop."""
    acknowledged: list[Any] = []
    for number, batches in enumerate(slices):
        # At the end of the slice: none of its events is sent before its time.
        await asyncio.sleep(max(0, began + (number + 1) * SLICE_MS / 1_000 - monotonic()))
        acknowledged += await asyncio.gather(
            *(
                producer.send_batch(batch, tp.topic, partition=tp.partition)
                for tp, batch in batches.items()
            )
        )
    await asyncio.gather(*acknowledged)


async def _watch(reader: Any, began: float, rate: int, seed: int, *, until: float) -> list[int]:
    """The latency of every entry of ours that was meant to be sent warm, until they cease."""
    mark = f"at-{seed}-"
    latencies_ms: list[int] = []
    seen_at = until
    while monotonic() < until and not (latencies_ms and monotonic() > seen_at + _SILENCE_S):
        for records in (await reader.getmany(timeout_ms=100)).values():
            seen_at = monotonic()
            for record in records:
                call_id = orjson.loads(record.value).get("call_id") or ""
                if call_id.startswith(mark):
                    meant = began + int(call_id.removeprefix(mark)) / rate
                    if meant >= began + WARM_UP_S:
                        latencies_ms.append(ms(seen_at - meant))
    return latencies_ms
