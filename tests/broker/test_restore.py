"""What is restored from Kafka is what was in memory."""

import asyncio
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from prometheus_client import CollectorRegistry

from schemas import topics
from streams import provision
from streams.engine import seen
from streams.engine.errors import StoppedError
from streams.engine.originals import Originals
from streams.engine.reader import Reader
from streams.engine.restore import Marks, restore
from streams.engine.shard import Shard
from streams.metrics import Meters
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.kafka import read_to_end
from streams.testbed.load import Plan
from tests.billing.builders import some_terms
from tests.broker.harness import until

pytestmark = pytest.mark.broker


async def booked(reader: Reader, shards: list[Shard], ends: dict[TopicPartition, int]) -> bool:
    """Read on; whether the shards have booked everything up to there."""
    for part in await reader.fetch():
        shards[part.tp.partition].deliver(part)
    reached = {tp: at for shard in shards for tp, at in shard.positions().items()}
    return all(reached[tp] >= end for tp, end in ends.items())


def a_shard(settings: Settings, partition: int, marks: Marks) -> Shard:
    return Shard(
        settings,
        partition,
        marks=marks,
        originals=Originals(settings),
        meters=Meters(CollectorRegistry()),
        terms=some_terms(),
        accepted_losses={},
        wall=lambda: datetime.now(UTC),
    )


async def restored_without_ids(settings: Settings, marks: Marks, shards: list[Shard]) -> None:
    """Ids that are too old to be remembered leave their log. A partition that was quiet for so
    long is restored all the same; one whose ids are younger has lost them."""
    for shard in shards:
        shard.drop()
    name = settings.topics.of(topics.SEEN)
    tps = [TopicPartition(name, shard.partition) for shard in shards]
    ends = await marks.ends(tps)
    async with provision._Admin(settings) as admin:
        await admin.delete_records(
            {tp: RecordsToDelete(before_offset=end) for tp, end in ends.items()}
        )
    now = datetime.now(UTC)
    for shard in shards:
        with pytest.raises(StoppedError, match="remembered ids are missing"):
            await restore(settings, shard.partition, marks, {}, now)
        later = now + timedelta(days=topics.SEEN_KEPT_DAYS)
        restored = await restore(settings, shard.partition, marks, {}, later)
        assert (len(restored.seen), len(restored.rows.values)) == (0, shard.row_count)


async def test_a_restored_shard_knows_every_id_and_row_of_the_live_one(
    installation: Settings,
) -> None:
    # Late events spread the ids over all generations; repeats and misplaced records come too.
    plan = Plan(tenants=40, events=8_000, late_ppm=300_000)
    start = datetime.now(UTC)
    marks, reader, gate = Marks(installation), Reader(installation), asyncio.Event()
    await marks.start()
    await reader.start()
    shards = [
        a_shard(installation, partition, marks) for partition in range(installation.partitions)
    ]
    try:
        gate.set()
        for shard in shards:
            await shard.open()
        reader.begin({tp: at for shard in shards for tp, at in shard.positions().items()}, set())
        running = [asyncio.create_task(shard.run(gate, reader)) for shard in shards]
        tps = [tp for shard in shards for tp in shard.positions()]
        for records in (load.openings(plan, start), load.events(plan, start)):
            await load.preload(installation, records, start)
            ends = await marks.ends(tps)
            await until(partial(booked, reader, shards, ends), 60)
        gate.clear()
        for shard in shards:
            assert await shard.settle(10)
        for task in running:
            task.cancel()
        packed: dict[int, list[seen.Ids]] = {number: [] for number in range(len(shards))}
        async for record in read_to_end(installation, [installation.topics.of(topics.SEEN)]):
            packed[record.partition].append(seen.unpack(record.value))
        for partition, shard in enumerate(shards):
            restored = await restore(installation, partition, marks, {}, datetime.now(UTC))
            wanted = [int(one) for ids in packed[partition] for one in ids.fingerprints]
            live = shard._seen
            assert len(live.probe(wanted)) == len(wanted)
            assert restored.seen.probe(wanted) == live.probe(wanted)
            assert restored.seen.digest() == live.digest()
            assert restored.rows.values == shard._rows.values
        # Enough to mean something: ids in several generations, on every partition.
        assert sum(len(shard._seen) for shard in shards) > 1_000
        assert all(len(shard._seen.digest()) > 3 for shard in shards)
        await restored_without_ids(installation, marks, shards)
    finally:
        for shard in shards:
            await shard.stop()
        await reader.stop()
        await marks.stop()
