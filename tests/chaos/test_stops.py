"""What no worker may go on after: it stops by a name, and never with a smaller balance."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from schemas import topics
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.kafka import ends_of, started_reader
from streams.testbed.load import Plan
from tests.broker.harness import Worker, audited, drained, positions, until
from tests.broker.test_faults import admin_of, booked_and_stopped

pytestmark = pytest.mark.chaos

Workers = Callable[..., Worker]


async def end_of(settings: Settings, tp: TopicPartition) -> int:
    reader = await started_reader(settings)
    try:
        return (await ends_of(reader, [tp]))[tp]
    finally:
        await reader.stop()


async def test_a_truncated_changelog_stops_the_shard_and_nothing_is_booked(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    await booked_and_stopped(installation, workers, tmp_path)
    before = await positions(installation)
    name = installation.topics.of(topics.CHANGELOG)
    admin = await admin_of(installation)
    try:
        # Records of a compacted topic can only be deleted when it may also be trimmed.
        trimmed = ConfigResource(
            ConfigResourceType.TOPIC, name, configs={"cleanup.policy": "compact,delete"}
        )
        await admin.alter_configs([trimmed])
        tp = TopicPartition(name, 0)
        # Only what has no later value is a loss: delete all but the end, with its position row.
        await admin.delete_records(
            {tp: RecordsToDelete(before_offset=await end_of(installation, tp) - 4)}
        )
    finally:
        await admin.close()
    await load.produce(
        installation, Plan(tenants=60, events=1_000, rate=0, seed=2), start=datetime.now(UTC)
    )
    worker = workers("stopped").start()
    await until(
        lambda: any("partition 0 state_lost" in reason for reason in worker.reasons()),
        60,
        lambda: worker.log[-2_000:],
    )

    async def others_go_on() -> bool:
        after = await positions(installation)
        return all(
            after[number].sources != before[number].sources
            for number in range(1, installation.partitions)
        )

    await until(others_go_on, 60)
    assert (await positions(installation))[0].sources == before[0].sources
    assert worker.probe("/livez")[0] == 200, "a restart would not help"


async def test_a_clock_an_hour_behind_stops_the_shard_until_it_is_right_again(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    await booked_and_stopped(installation, workers, tmp_path)
    before = await positions(installation)
    folder = tmp_path / "wrong"
    folder.mkdir()
    (folder / "clock").write_text("-3600")
    worker = workers("wrong", module="tests.chaos.worker").start(CHAOS_FOLDER=str(folder))
    await until(
        lambda: sum("clock_skew" in one for one in worker.reasons()) == installation.partitions,
        60,
        lambda: worker.log[-2_000:],
    )
    assert await positions(installation) == before
    worker.kill()
    (folder / "clock").unlink()
    right = workers("right", module="tests.chaos.worker").start(CHAOS_FOLDER=str(folder))
    await right.ready()
    await drained(installation)
    await audited(installation, tmp_path / "e.json")
