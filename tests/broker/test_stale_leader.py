"""A broker that stood still goes on as if it led all the time: nobody may believe it."""

import asyncio
import os
import signal
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

import pytest

from streams import provision
from streams.billing.parts import microseconds
from streams.engine.errors import FencedError, UnknownOutcomeError
from streams.engine.restore import Marks, restored_from, wait_stable
from streams.engine.transaction import Transactor
from streams.settings import Settings
from streams.testbed import broker
from streams.testbed.broker import Cluster

pytestmark = [
    pytest.mark.broker,
    pytest.mark.timeout(300),
    pytest.mark.skipif(broker.external() is not None, reason="freezes one of three nodes"),
]


async def written_elsewhere(settings: Settings) -> int:
    """Fence and write a barrier, as often as it takes the others to find new leaders; where the
    changelog's first partition ends then."""
    [changelog, *_] = restored_from(settings, 0)
    deadline = monotonic() + 120
    while True:
        transactor = Transactor(settings, 0)
        try:
            await transactor.start()
            ends = await transactor.barrier([changelog], microseconds(datetime.now(UTC)) // 1000)
            return ends[changelog]
        except (FencedError, UnknownOutcomeError):
            assert monotonic() < deadline
        finally:
            transactor.drop()


async def test_a_restore_ends_where_the_log_ends_whatever_a_former_leader_says(
    tmp_path: Path,
) -> None:
    with Cluster.start(tmp_path, nodes=3) as cluster:
        settings = Settings(
            broker=cluster.bootstrap, namespace="t-still-", partitions=1, replication=3
        )
        await provision.apply(settings)
        [changelog, *_] = restored_from(settings, 0)
        marks = Marks(settings)
        await marks.start()
        try:
            assert await marks.ends([changelog]) == {changelog: 0}
            client = marks._uncommitted._client
            leader = client.cluster.leader_for_partition(changelog)
            os.kill(cluster.pid(leader), signal.SIGSTOP)
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
                os.kill(cluster.pid(leader), signal.SIGCONT)
            ends = await asked
            assert ends[changelog] >= end > 0
        finally:
            await marks.stop()
