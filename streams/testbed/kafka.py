"""Small clients for testbed and command line: one way to write, one to read to the end."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiokafka.record._crecords.default_records as compiled_records
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.codec import lz4_encode
from aiokafka.errors import KafkaError

from streams.consumer import Consumer
from streams.engine.kafka import connection, log_reader
from streams.provision import BrokerAwayError
from streams.settings import Settings


class NamespaceRequiredError(Exception):
    """Load or simulated payments were pointed at an installation without a namespace."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} would write to topics without a namespace, which look like production. Set "
            "CREDITS_NAMESPACE (demo- or another), or say --yes-this-is-not-production."
        )


def require_namespace(settings: Settings, what: str, *, confirmed: bool) -> None:
    """Raise NamespaceRequiredError unless there is a namespace or somebody insists."""
    if not settings.namespace and not confirmed:
        raise NamespaceRequiredError(what)


def compress_fast() -> None:
    """Let the client's own record batches be compressed at level 1, like those of the engine. The
    client has no setting for it; its level 9 costs 2 µs a record."""
    compiled_records.lz4_encode = _lz4_level_1


def _lz4_level_1(payload: Any) -> bytes:
    compressed: bytes = lz4_encode(payload, level=1)
    return compressed


async def started_producer(settings: Settings, **more: Any) -> AIOKafkaProducer:
    """An idempotent producer, started. Raises BrokerAwayError."""
    producer = AIOKafkaProducer(
        **connection(settings),
        acks="all",
        enable_idempotence=True,
        max_request_size=8 << 20,
        **more,
    )
    try:
        await producer.start()
    except (KafkaError, OSError):
        await producer.stop()
        raise BrokerAwayError(settings.broker) from None
    return producer


async def started_reader(settings: Settings) -> Consumer:
    """A read_committed consumer without group, started. Raises BrokerAwayError."""
    reader = log_reader(settings)
    try:
        await reader.start()
    except (KafkaError, OSError):
        await reader.stop()
        raise BrokerAwayError(settings.broker) from None
    return reader


async def ends_of(reader: Consumer, tps: Sequence[TopicPartition]) -> dict[Any, int]:
    """The last stable offsets: as far as a read_committed reader gets."""
    return dict(await reader.end_offsets(list(tps)))


async def read_from_end(reader: Consumer, tps: Sequence[TopicPartition]) -> None:
    """Let a reader begin where partitions end now: it gets what is written from here on."""
    ends = await ends_of(reader, tps)
    reader.assign(list(tps))
    for tp in tps:
        reader.seek(tp, ends[tp])


async def read_to_end(
    settings: Settings, topics: Sequence[str], *, partition: int | None = None
) -> AsyncIterator[Any]:
    """Every committed record of some topics, up to where they end at this moment.

    Within a partition in order. Raises BrokerAwayError.
    """
    reader = await started_reader(settings)
    try:
        partitions = range(settings.partitions) if partition is None else [partition]
        tps = [TopicPartition(topic, number) for topic in topics for number in partitions]
        starts = await reader.beginning_offsets(tps)
        ends = await ends_of(reader, tps)
        waiting = {tp for tp in tps if starts[tp] < ends[tp]}
        if not waiting:
            return
        reader.assign(list(waiting))
        for tp in waiting:
            reader.seek(tp, starts[tp])
        while waiting:
            for tp, records in (await reader.getmany(*waiting, timeout_ms=200)).items():
                for record in records:
                    if record.offset < ends[tp]:
                        yield record
            for tp in list(waiting):
                if await reader.position(tp) >= ends[tp]:
                    waiting.discard(tp)
    finally:
        await reader.stop()
