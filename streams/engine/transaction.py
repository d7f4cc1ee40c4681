"""One Kafka transaction per batch: all outputs of one partition and the offsets they came from.

After any error between begin and commit the outcome is unknown: the producer is dropped, never
aborted and reused, because after some errors an abort sends nothing and the next commit would
publish what was "aborted".
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Mapping, Sequence
from time import monotonic
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    IllegalOperation,
    InvalidProducerEpoch,
    KafkaConnectionError,
    KafkaError,
    ProducerFenced,
)
from aiokafka.structs import OffsetAndMetadata

from streams.engine.errors import FencedError, UnknownOutcomeError
from streams.engine.kafka import TRANSACTION_TIMEOUT_MS, put_off, transactional_producer
from streams.engine.outputs import Outputs
from streams.engine.record_batch import RecordBatch
from streams.settings import Settings

# Longer than the transaction's own time-out: after this its end is certain to be decided.
COMMIT_TIMEOUT_S: Final = 25
START_TIMEOUT_S: Final = 30
STOP_TIMEOUT_S: Final = 3
# No tenant's name and no row's key.
BARRIER_KEY: Final = b"\0barrier"

T = TypeVar("T")
_FENCES: Final = (ProducerFenced, InvalidProducerEpoch)


class Transactor:
    """The transactional producer of one partition."""

    def __init__(self, settings: Settings, partition: int) -> None:
        self._group = settings.app_id
        self._settings = settings
        self._partition = partition
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """InitProducerId: fences any earlier owner and aborts what it left open.

        Raises FencedError or UnknownOutcomeError; then this object must be dropped.
        """
        assert self._producer is None
        self._producer = transactional_producer(self._settings, self._partition)
        await self._guarded(self._producer.start(), START_TIMEOUT_S)

    def outputs(self, timestamp_ms: int) -> Outputs:
        """A new, empty set of record batches."""
        return Outputs(timestamp_ms)

    async def barrier(
        self, tps: Sequence[TopicPartition], timestamp_ms: int
    ) -> dict[TopicPartition, int]:
        """Write a record to each partition in a transaction that is aborted, so that nobody reads
        it; say behind which offset each stands.

        Only the leader that the in-sync replicas follow can have it acknowledged: whatever was
        committed before is below. A broker that stood still or was cut off still believes that it
        leads, and would tell an end of long ago. Raises as `commit` does.
        """
        return await self._guarded(self._barrier(tps, timestamp_ms), COMMIT_TIMEOUT_S)

    async def _barrier(
        self, tps: Sequence[TopicPartition], timestamp_ms: int
    ) -> dict[TopicPartition, int]:
        outputs = self.outputs(timestamp_ms)
        for tp in tps:
            outputs.append(tp.topic, tp.partition, BARRIER_KEY, None)
        assert self._producer is not None
        await self._producer.begin_transaction()
        ends = await _written(self._producer, outputs)
        await self._producer.abort_transaction()
        return {tp: ends[tp.topic, tp.partition] for tp in tps}

    async def commit(
        self, outputs: Outputs, offsets: Mapping[TopicPartition, int]
    ) -> dict[tuple[str, int], int]:
        """Write everything and the offsets in one transaction; return when it is committed. Says
        behind which offset each topic and partition's records end.

        Raises FencedError when another owner has our id, UnknownOutcomeError for everything
        else: the transaction may have been committed all the same.
        """
        return await self._guarded(self._commit(outputs, offsets), COMMIT_TIMEOUT_S)

    async def _commit(
        self, outputs: Outputs, offsets: Mapping[TopicPartition, int]
    ) -> dict[tuple[str, int], int]:
        producer = self._producer
        assert producer is not None
        await producer.begin_transaction()
        ends = await _written(producer, outputs)
        if offsets:
            await producer.send_offsets_to_transaction(
                {tp: OffsetAndMetadata(offset, "") for tp, offset in offsets.items()}, self._group
            )
        await producer.commit_transaction()
        return ends

    async def _guarded(self, work: Awaitable[T], timeout_s: float) -> T:
        started = monotonic()
        producer = self._producer
        put_off(producer)  # what it was told before is of the past
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError as error:
            answer = put_off(producer)
            if answer is None:
                raise UnknownOutcomeError(f"no answer within {timeout_s} s") from error
            raise UnknownOutcomeError(f"not within {timeout_s} s: {answer}") from answer
        except (
            KafkaError,
            KafkaConnectionError,
            IllegalOperation,
            AssertionError,
            OSError,
        ) as error:
            # After a fatal error aiokafka's methods fail with assertions, or say that there is no
            # transaction. The first error counts: who takes a fence for an accident opens again
            # and takes the partition from its new owner.
            if isinstance(error, _FENCES) or isinstance(self._first_error(), _FENCES):
                overdue = monotonic() - started >= TRANSACTION_TIMEOUT_MS / 1000
                name = self._settings.transactional_id(self._partition)
                raise FencedError(name, overdue=overdue) from error
            raise UnknownOutcomeError(f"{type(error).__name__}: {error}") from error

    def _first_error(self) -> BaseException | None:
        """What ended the producer's transaction, if something did."""
        manager = None if self._producer is None else self._producer._txn_manager  # noqa: SLF001
        ended = None if manager is None else manager._transaction_waiter  # noqa: SLF001
        if ended is None or not ended.done() or ended.cancelled():
            return None
        found: BaseException | None = ended.exception()
        return found

    async def stop(self) -> None:
        """End in order; when that takes too long, drop."""
        producer = self._producer
        if producer is None:
            return
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await producer.stop()
        except (TimeoutError, KafkaError, AssertionError, OSError):
            self.drop()
        self._producer = None

    def drop(self) -> None:
        """Throw the producer away at once: no abort, no flush, nothing awaited.

        `stop()` of a producer that has lost its broker never returns, so this takes it apart.
        The next owner of the id (us or another) ends what is open.
        """
        producer, self._producer = self._producer, None
        if producer is None:
            return
        producer._closed = True  # noqa: SLF001  # see above; a contract test watches the names
        sender = producer._sender.sender_task  # noqa: SLF001
        if sender is not None:
            sender.cancel()
        closing = asyncio.ensure_future(_close(producer.client))
        _closings.add(closing)
        closing.add_done_callback(_closings.discard)


async def _written(producer: AIOKafkaProducer, outputs: Outputs) -> dict[tuple[str, int], int]:
    """Send every batch and wait until all are acknowledged; say behind which offset each topic
    and partition's records end."""
    sent: list[Awaitable[Any]] = []
    order: list[tuple[str, int, RecordBatch]] = []
    waiting: list[tuple[str, int, RecordBatch]] = []
    seen: set[tuple[str, int]] = set()
    for topic, partition, batch in outputs.batches():
        if (topic, partition) in seen:
            # A second batch of a partition waits for the first; start all firsts before.
            waiting.append((topic, partition, batch))
            continue
        seen.add((topic, partition))
        order.append((topic, partition, batch))
        sent.append(await _sent(producer, topic, partition, batch))
    for topic, partition, batch in waiting:
        sent.append(await _sent(producer, topic, partition, batch))
    order += waiting
    # Every one: a failed batch alone does not fail the commit.
    acknowledged = await asyncio.gather(*sent)
    if any(written.offset < 0 for written in acknowledged):
        raise UnknownOutcomeError("a batch was acknowledged without its offset")
    return {
        (topic, partition): written.offset + batch.record_count()
        for (topic, partition, batch), written in zip(order, acknowledged, strict=True)
    }


async def _sent(
    producer: AIOKafkaProducer, topic: str, partition: int, batch: RecordBatch
) -> Awaitable[Any]:
    future: asyncio.Future[Any] = await producer.send_batch(batch, topic, partition=partition)
    # One error ends the transaction and is told; the others are the same and need no line each.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


_closings: set[asyncio.Future[None]] = set()


async def _close(client: Any) -> None:
    with contextlib.suppress(TimeoutError, KafkaError, OSError):
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await client.close()
