"""Somebody else's transaction that stays open where only we should write."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from aiokafka import TopicPartition

from schemas import topics
from streams.engine.restore import Marks
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.load import Plan
from tests.broker.harness import Worker, a_transaction, audited, drained, until

pytestmark = pytest.mark.broker

Workers = Callable[..., Worker]
PLAN = Plan(tenants=40, events=1_000)


@asynccontextmanager
async def left_open(settings: Settings, *tps: TopicPartition) -> AsyncIterator[dict[str, int]]:
    """A transaction with a record on each of some partitions, which is aborted in the end; says
    where it begins, by topic."""
    async with a_transaction(settings, "foreign") as producer:
        written = [
            await producer.send_and_wait(tp.topic, b"not ours", key=b"k", partition=tp.partition)
            for tp in tps
        ]
        yield {one.topic: one.offset for one in written}
        await producer.abort_transaction()


def impatient(workers: Workers, name: str) -> Worker:
    """A worker for which a transaction hangs after three seconds."""
    return workers(name, module="tests.broker.mutant").start(MUTANT="impatient")


async def test_a_partition_with_a_transaction_left_open_stops_by_name_until_it_is_ended(
    installation: Settings, workers: Workers
) -> None:
    ledger = TopicPartition(installation.topics.of(topics.LEDGER), 0)
    changelog = TopicPartition(installation.topics.of(topics.CHANGELOG), 1)
    async with left_open(installation, ledger, changelog):
        worker = impatient(workers, "stopped")
        # The others are served.
        await until(lambda: worker.log.count('"shard_open"') == 2, 60, lambda: worker.log[-3_000:])
        found = [
            f"partition 0 hanging_transaction: a transaction stays open on {ledger.topic}/0",
            f"partition 1 hanging_transaction: a transaction stays open on {changelog.topic}/1",
        ]
        await until(
            lambda: [reason.partition(" at offset")[0] for reason in worker.reasons()] == found,
            30,
            lambda: str(worker.reasons()),
        )
        metrics = worker.probe("/metrics")[1]
        assert 'credits_shard_stopped{reason="hanging_transaction"} 1.0' in metrics
    assert await worker.stop() == 0
    await workers("again").start().ready()
    await load.open_tenants(installation, PLAN, now=datetime.now(UTC))
    await drained(installation)
    await audited(installation)


async def test_a_transaction_left_open_beside_a_running_worker_is_told_and_keeps_it_from_nothing(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    ledger = TopicPartition(installation.topics.of(topics.LEDGER), 0)
    worker = impatient(workers, "worker")
    await worker.ready()
    start = datetime.now(UTC)
    await load.open_tenants(installation, PLAN, now=start)
    await drained(installation)
    async with left_open(installation, ledger) as begins:
        produced = await load.produce(installation, PLAN, start=start)
        load.write_expectation(tmp_path / "e.json", PLAN, start, produced)
        await drained(installation)
        await until(lambda: bool(worker.reasons()), 30, lambda: worker.log[-3_000:])
        [reason] = worker.reasons()
        at = begins[ledger.topic]
        assert reason.startswith(
            f"a transaction stays open on {ledger.topic}/0 at offset {at}: who reads committed"
        )
        assert "credits_hanging_transactions 1.0" in worker.probe("/metrics")[1]
        assert worker.log.count('"output_transaction_open"') == 1
        marks = Marks(installation)
        await marks.start()
        try:
            # Booked, and hidden.
            assert (await marks.stable_ends([ledger]))[ledger] == at
            assert (await marks.ends([ledger]))[ledger] > at + 20
        finally:
            await marks.stop()
    await worker.ready()
    await audited(installation, tmp_path / "e.json")
    assert "credits_hanging_transactions 0.0" in worker.probe("/metrics")[1]
    assert worker.log.count('"assigned"') == 1
    assert "reopening" not in worker.log
