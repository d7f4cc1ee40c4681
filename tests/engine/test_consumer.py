"""Our consumer where the client's own would be lost."""

import asyncio

from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import Fetcher

from streams.consumer import Consumer

ONE = TopicPartition("usage", 0)


async def test_partitions_that_are_taken_back_at_once_do_not_end_the_fetcher() -> None:
    consumer = Consumer(bootstrap_servers="127.0.0.1:1")
    fetcher = consumer._fetcher = Fetcher(consumer._client, consumer._subscription)
    consumer.unsubscribe()
    for _ in range(3):
        await asyncio.sleep(0)
    consumer.assign([ONE])
    consumer.unsubscribe()
    for _ in range(3):
        await asyncio.sleep(0)
    assert consumer.assignment() == set()
    assert not fetcher._fetch_task.done(), "nothing would ever be read again"
    await consumer.stop()
