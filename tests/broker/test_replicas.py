"""Three nodes, one of which is dead, or stood still and goes on as if it had led all the time."""

import asyncio
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from time import monotonic

import pytest
from aiokafka.producer import producer, sender

from streams import provision
from streams.billing.parts import microseconds
from streams.engine import transaction
from streams.engine.errors import FencedError, UnknownOutcomeError
from streams.engine.kafka import NO_WRITES_NOW, tune_client
from streams.engine.restore import Marks, restored_from, wait_stable
from streams.engine.transaction import Transactor
from streams.settings import Settings
from streams.testbed import broker
from streams.testbed.broker import Cluster
from tests.broker.test_provision import configure

pytestmark = [
    pytest.mark.broker,
    pytest.mark.timeout(300),
    pytest.mark.skipif(broker.external() is not None, reason="kills and freezes nodes"),
]


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster.start(tmp_path_factory.mktemp("replicas"), nodes=3) as cluster:
        yield cluster


def now_ms() -> int:
    return microseconds(datetime.now(UTC)) // 1000


async def written_elsewhere(settings: Settings) -> int:
    """Fence and write a barrier, as often as it takes the others to find new leaders; where the
    changelog's first partition ends then."""
    [changelog, *_] = restored_from(settings, 0)
    deadline = monotonic() + 120
    while True:
        transactor = Transactor(settings, 0)
        try:
            await transactor.start()
            ends = await transactor.barrier([changelog], now_ms())
            return ends[changelog]
        except (FencedError, UnknownOutcomeError):
            assert monotonic() < deadline
        finally:
            transactor.drop()
            await asyncio.gather(*transaction._closings)


async def test_a_restore_ends_where_the_log_ends_whatever_a_former_leader_says(
    three_nodes: Cluster,
) -> None:
    settings = Settings(
        broker=three_nodes.bootstrap, namespace="t-still-", partitions=1, replication=3
    )
    await provision.apply(settings)
    [changelog, *_] = restored_from(settings, 0)
    marks = Marks(settings)
    await marks.start()
    try:
        assert await marks.ends([changelog]) == {changelog: 0}
        client = marks._uncommitted._client
        leader = client.cluster.leader_for_partition(changelog)
        os.kill(three_nodes.pid(leader), signal.SIGSTOP)
        try:
            end = await written_elsewhere(settings)
            # Asked while it stands, answered as soon as it goes on.
            asked = asyncio.create_task(wait_stable(marks, [changelog], {changelog: end}))
            while not any(
                connection._requests
                for (node, _), connection in client._conns.items()
                if node == leader
            ):
                assert not asked.done(), "somebody else was asked"
                await asyncio.sleep(0.02)
        finally:
            os.kill(three_nodes.pid(leader), signal.SIGCONT)
        ends = await asked
        assert ends[changelog] >= end > 0
    finally:
        await marks.stop()


async def test_without_enough_replicas_a_write_is_waited_for_and_it_is_said_why(
    three_nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BACKOFF_OVERRIDE", "EndTxnHandler", "SendProduceReqHandler", "InitPIDHandler"):
        monkeypatch.setattr(sender, name, getattr(sender, name))
    monkeypatch.setattr(producer, "TransactionManager", producer.TransactionManager)
    tune_client()
    settings = Settings(
        broker=three_nodes.bootstrap, namespace="t-fewer-", partitions=1, replication=3
    )
    await provision.apply(settings)
    [changelog, *_] = restored_from(settings, 0)
    await configure(settings, changelog.topic, {"min.insync.replicas": "3"})
    marks = Marks(settings)
    await marks.start()
    transactor = Transactor(settings, 0)
    three_nodes.kill(2)
    try:
        await marks.ends([changelog])
        cluster = marks._uncommitted._client.cluster
        deadline = monotonic() + 60
        while len(cluster._partitions[changelog.topic][0].isr) > 2:
            assert monotonic() < deadline, "the dead node is still in sync"
            await marks.refresh()
            await asyncio.sleep(0.2)
        await transactor.start()
        monkeypatch.setattr(transaction, "COMMIT_TIMEOUT_S", 3)
        with pytest.raises(UnknownOutcomeError, match="NotEnoughReplicas") as raised:
            await transactor.barrier([changelog], now_ms())
        assert isinstance(raised.value.__cause__, NO_WRITES_NOW)
        transactor.drop()
        # The broker cannot write the end of that transaction either.
        monkeypatch.setattr(transaction, "START_TIMEOUT_S", 3)
        transactor = Transactor(settings, 0)
        with pytest.raises(UnknownOutcomeError, match="ConcurrentTransactions") as raised:
            await transactor.start()
        assert isinstance(raised.value.__cause__, NO_WRITES_NOW)
    finally:
        transactor.drop()
        await marks.stop()
        three_nodes.restart(2)
    assert await written_elsewhere(settings) > 0
