"""What the reader asks for, and when it has room for more."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition

from streams.engine import reader as module
from streams.engine.reader import FULL_BYTES, SLICES_IN_FLIGHT, SMALL_SLICES_IN_FLIGHT, Reader
from streams.settings import Settings

ONE, TWO = TopicPartition("usage", 0), TopicPartition("command", 1)


class _Consumer:
    """Hands out what it is told to, and remembers which partitions were asked for."""

    def __init__(self) -> None:
        self._fetcher = SimpleNamespace(_fetch_min_bytes=0, _fetch_max_wait_ms=0)
        self.asked: list[tuple[TopicPartition, ...]] = []
        self.waiting: dict[TopicPartition, list[Any]] = {}

    def assign(self, tps: list[TopicPartition]) -> None:
        pass

    def seek(self, tp: TopicPartition, offset: int) -> None:
        pass

    async def getmany(self, *tps: TopicPartition, timeout_ms: int) -> dict[TopicPartition, Any]:
        self.asked.append(tps)
        waiting, self.waiting = self.waiting, {}
        return waiting


@pytest.fixture
def read() -> tuple[Reader, _Consumer]:
    reader, consumer = Reader(Settings()), _Consumer()
    reader._consumer = consumer
    reader.begin({ONE: 0, TWO: 0}, held=set())
    return reader, consumer


def _records(first: int, count: int, size: int) -> list[Any]:
    return [SimpleNamespace(offset=first + at, value=b"x" * size) for at in range(count)]


async def test_many_small_slices_are_no_more_than_one_large_one(
    read: tuple[Reader, _Consumer],
) -> None:
    reader, consumer = read
    for first in range(3 * SLICES_IN_FLIGHT):
        consumer.waiting = {ONE: _records(first, 1, 300)}
        assert len(await reader.fetch()) == 1
    assert all(ONE in asked for asked in consumer.asked)


async def test_a_partition_with_large_slices_in_flight_must_wait_for_room(
    read: tuple[Reader, _Consumer],
) -> None:
    reader, consumer = read
    slices = []
    for first in range(SLICES_IN_FLIGHT):
        consumer.waiting = {ONE: _records(first, 1, FULL_BYTES // SLICES_IN_FLIGHT)}
        slices += await reader.fetch()
    await reader.fetch()
    assert consumer.asked[-1] == (TWO,)
    assert consumer._fetcher._fetch_max_wait_ms == module._COLLECT_MS  # soon there is room again
    reader.done(slices[0])
    await reader.fetch()
    assert set(consumer.asked[-1]) == {ONE, TWO}


async def test_records_without_a_value_do_not_pile_up(read: tuple[Reader, _Consumer]) -> None:
    reader, consumer = read
    for first in range(SMALL_SLICES_IN_FLIGHT):
        consumer.waiting = {ONE: _records(first, 1, 0)}
        await reader.fetch()
    await reader.fetch()
    assert consumer.asked[-1] == (TWO,)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1_000])
async def test_a_slice_of_many_records_weighs_what_they_do(
    read: tuple[Reader, _Consumer], count: int
) -> None:
    reader, consumer = read
    consumer.waiting = {ONE: _records(0, count, 300)}
    [part] = await reader.fetch()
    assert part.size == count * 400


async def test_a_new_epoch_does_not_wait_for_the_silence_of_the_old_one(
    read: tuple[Reader, _Consumer],
) -> None:
    reader, consumer = read
    await reader.fetch()
    assert consumer._fetcher._fetch_max_wait_ms == module._SILENCE_MS
    reader.begin({ONE: 0}, held=set())
    assert consumer._fetcher._fetch_max_wait_ms == module._COLLECT_MS


async def test_the_broker_collects_while_records_come_and_hands_out_the_first_after_a_silence(
    read: tuple[Reader, _Consumer],
) -> None:
    reader, consumer = read
    pace = consumer._fetcher
    consumer.waiting = {ONE: _records(0, 1, 300)}
    await reader.fetch()
    assert (pace._fetch_min_bytes, pace._fetch_max_wait_ms) == (
        module._COLLECT_BYTES,
        module._COLLECT_MS,
    )
    await reader.fetch()
    assert (pace._fetch_min_bytes, pace._fetch_max_wait_ms) == (1, module._SILENCE_MS)


async def test_slices_of_a_topic_stand_beside_each_other(read: tuple[Reader, _Consumer]) -> None:
    reader, consumer = read
    more = TopicPartition("command", 0)
    reader.begin(dict.fromkeys((ONE, TWO, more), 0), held=set())
    consumer.waiting = {tp: _records(0, 1, 300) for tp in (TWO, ONE, more)}
    assert [part.tp for part in await reader.fetch()] == [more, TWO, ONE]
