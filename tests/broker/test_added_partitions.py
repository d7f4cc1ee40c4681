"""Partitions that somebody adds: keys move to where no balance is, so nothing may go on."""

from collections.abc import Callable
from datetime import UTC, datetime

import msgspec
import pytest
from aiokafka.admin import NewPartitions

from streams.settings import Settings
from streams.testbed import load
from streams.testbed.load import Plan
from tests.broker.harness import Worker, audited, drained, until
from tests.broker.test_bad_input import entry_ids
from tests.broker.test_faults import admin_of
from tests.cli.conftest import credits_of

pytestmark = pytest.mark.broker

Workers = Callable[..., Worker]


async def test_added_partitions_stop_their_worker_by_name_and_what_is_booked_stays_right(
    installation: Settings, workers: Workers
) -> None:
    now = datetime.now(UTC)
    plan = Plan(tenants=40, events=300)
    worker = workers().start(CONSUMER_METADATA_MAX_AGE_MS="1000")
    await worker.ready()
    await load.open_tenants(installation, plan, now=now)
    await load.produce(installation, plan, start=now)
    await drained(installation)
    before = sorted(await entry_ids(installation))
    more = installation.partitions + 1
    admin = await admin_of(installation)
    try:
        await admin.create_partitions(
            {name: NewPartitions(total_count=more) for name in installation.topics.sources}
        )
    finally:
        await admin.close()
    await until(
        lambda: any("not_copartitioned: partitions [4]" in one for one in worker.reasons()),
        60,
        lambda: worker.log[-3_000:],
    )
    assert 'credits_shard_stopped{reason="not_copartitioned"} 1.0' in worker.probe("/metrics")[1]
    # From now on producers write each key where it belongs among five.
    five = msgspec.structs.replace(installation, partitions=more)
    await load.produce(five, msgspec.structs.replace(plan, seed=2), start=now)
    assert await worker.stop() == 0, worker.log[-3_000:]
    again = workers("again").start()
    assert await again.ended() == 2
    assert "not_copartitioned" in again.log
    assert "partitions, wanted 4, found 5" in credits_of(installation)("doctor").stdout
    assert sorted(await entry_ids(installation)) == before
    await audited(installation)
