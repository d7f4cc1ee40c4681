"""Partitions are opened beside one another."""

import asyncio
import random

import pytest
from aiokafka import TopicPartition
from prometheus_client import CollectorRegistry

from streams.engine import reader, restore
from streams.engine.deck_view import DeckView
from streams.engine.shards import READ_AT_ONCE, Shards
from streams.engine.transaction import Transactor
from streams.metrics import Meters
from streams.settings import Settings
from tests.billing.builders import some_terms
from tests.broker.harness import until
from tests.simulation import clients
from tests.simulation.clients import NETWORK, Network
from tests.simulation.log import Broker

HEALTHY = 2


async def test_partitions_that_wait_for_replicas_keep_no_other_from_opening(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More wait than may read at once, and they come first."""
    settings = Settings(partitions=READ_AT_ONCE + HEALTHY)
    NETWORK.set(Network(Broker(), random.Random(1)))
    monkeypatch.setattr(restore, "log_reader", clients.restore_reader)
    monkeypatch.setattr(reader, "log_reader", clients.source_reader)
    monkeypatch.setattr(DeckView, "is_old", False)

    async def starts(self: Transactor) -> None:
        if self._partition < READ_AT_ONCE:
            await asyncio.Event().wait()

    async def barrier(*_: object) -> dict[TopicPartition, int]:
        return {}

    monkeypatch.setattr(Transactor, "start", starts)
    monkeypatch.setattr(Transactor, "barrier", barrier)
    ended: list[int] = []
    shards = Shards(
        settings,
        meters=Meters(CollectorRegistry()),
        terms=some_terms(),
        exit_process=ended.append,
    )
    await shards._marks.start()
    await shards._reader.start()
    numbers = range(settings.partitions)
    shards.assigned(
        [TopicPartition(name, number) for name in settings.topics.sources for number in numbers], 1
    )
    try:
        await until(
            lambda: (
                [number for number in numbers if shards._keepers[number].ready]
                == [*numbers[READ_AT_ONCE:]]
            ),
            10,
        )
        assert ended == []
    finally:
        await asyncio.gather(*(shards._release(keeper) for keeper in shards._keepers.values()))
