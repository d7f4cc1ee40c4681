"""Connections to Kafka as this engine needs them."""

import asyncio
import ssl
from itertools import chain, islice
from time import monotonic
from typing import Any, Final
from weakref import WeakKeyDictionary

import aiokafka.producer.producer
import aiokafka.producer.sender
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.errors import (
    ConcurrentTransactions,
    CoordinatorLoadInProgressError,
    CoordinatorNotAvailableError,
    KafkaError,
    NotEnoughReplicasAfterAppendError,
    NotEnoughReplicasError,
    for_code,
)

from streams.consumer import Consumer
from streams.engine.fetched import Batch, Batches
from streams.settings import Settings

# An unattended transaction blocks every reader until the broker ends it.
TRANSACTION_TIMEOUT_MS: Final = 15_000
REQUEST_TIMEOUT_MS: Final = 15_000
# A broker that says so cannot write now, be it the end of our last transaction, and asks for
# patience; a fresh process changes nothing.
NO_WRITES_NOW: Final = (
    ConcurrentTransactions,
    NotEnoughReplicasError,
    NotEnoughReplicasAfterAppendError,
    CoordinatorNotAvailableError,
    CoordinatorLoadInProgressError,
)
# The greatest sequence number, which is all ones.
_GREATEST_SEQUENCE: Final = 2**31 - 1
# The client asks again without end, every few milliseconds; up to this we let it wait longer.
_PATIENCE_S: Final = 0.1


def connection(settings: Settings) -> dict[str, Any]:
    """The arguments every client of ours takes."""
    if settings.plaintext:
        return {"bootstrap_servers": settings.broker, "security_protocol": "PLAINTEXT"}
    context = ssl.create_default_context(
        cafile=None if settings.broker_ca_file is None else str(settings.broker_ca_file)
    )
    return {
        "bootstrap_servers": settings.broker,
        "security_protocol": "SSL",
        "ssl_context": context,
    }


class _PlainRecords(fetcher.PartitionRecords):  # type: ignore[misc]
    """Hands out records as we parse them. An object of the client's own for each one, and a turn
    of its loop, cost more than all else; who reads a slice knows its topic and partition."""

    _records_iterator: Any

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # The client's loop goes round once a batch, and comes by a list.
        self._records_iterator = chain.from_iterable(self._records_iterator)

    def _consumer_record(self, _: Any, found: Any) -> list[Any]:
        return found.records(self.next_fetch_offset) if isinstance(found, Batch) else [found]

    def __next__(self) -> Any:
        for record in self.take(1):
            return record
        raise StopIteration

    def take(self, most: int | None) -> list[Any]:
        """The next records: so many, or all that are left."""
        records = list(islice(self._records_iterator, most))
        if len(records) == most:
            # The loop, which goes by batches, may be past them.
            self.next_fetch_offset = records[-1].offset + 1
        return records


class _PlainResult(fetcher.FetchResult):  # type: ignore[misc]
    """Hands out plain records without a step for each of them."""

    _partition_records: Any

    def getall(self, max_records: int | None = None) -> list[Any]:
        """What was fetched, or so much of it; the position moves behind that."""
        if not self.check_assignment(self._topic_partition) or not self.has_more():
            return []
        records: list[Any] = self._partition_records.take(max_records)
        self._update_position()
        if max_records is None or len(records) < max_records:
            self._partition_records = None
        return records


class _EndsOnce(aiokafka.producer.sender.EndTxnHandler):  # type: ignore[misc]
    """Asks for a transaction's end once. The client would ask again on another connection when the
    first one breaks; then the first request may arrive late, and commit half of the *next*
    transaction, for ids and epoch are the same. An answer that asks for patience is another
    matter: that request is over."""

    async def do(self, node_id: int) -> bool:
        try:
            answer = await self._sender.client.send(
                node_id, self.create_request(), group=self.group
            )
        except KafkaError as error:
            # Whoever commits learns that the outcome is unknown, and starts a new epoch.
            self._sender._txn_manager.fatal_error(error)  # noqa: SLF001
            return False
        backoff_s = self.handle_response(answer)
        if backoff_s is not None:
            await asyncio.sleep(backoff_s)
        return backoff_s is None


class _WrapsSequences(aiokafka.producer.producer.TransactionManager):  # type: ignore[misc]
    """Numbers the records of a partition as Kafka does: 0 comes after the greatest number. The
    client's own goes on below zero, which a broker refuses. A partition with 12,500 records a
    second is there after two days of one epoch."""

    _sequence_numbers: dict[TopicPartition, int]

    def increment_sequence_number(self, tp: TopicPartition, increment: int) -> None:
        self._sequence_numbers[tp] = (self.sequence_number(tp) + increment) & _GREATEST_SEQUENCE


# What a broker last answered each producer that is to ask again, and since when it is put off.
_put_off: Final[WeakKeyDictionary[Any, tuple[float, KafkaError]]] = WeakKeyDictionary()


def _patience_s(sender: Any, answer: KafkaError, backoff_s: float) -> float:
    """Note why a producer has to ask again, and say when: the longer it has waited, the later."""
    now = monotonic()
    since, _ = _put_off.get(sender, (now, answer))
    _put_off[sender] = since, answer
    return max(backoff_s, min(now - since, _PATIENCE_S))


class _ProducesPatiently(aiokafka.producer.sender.SendProduceReqHandler):  # type: ignore[misc]
    """Keeps why a batch is not written yet, which the client only logs."""

    _default_backoff: float

    def _can_retry(self, error: KafkaError, batch: Any) -> bool:
        self._default_backoff = _patience_s(self._sender, error, self._default_backoff)
        retries: bool = super()._can_retry(error, batch)
        return retries


class _StartsPatiently(aiokafka.producer.sender.InitPIDHandler):  # type: ignore[misc]
    """Keeps why there is no producer id yet."""

    def handle_response(self, resp: Any) -> float | None:
        backoff_s: float | None = super().handle_response(resp)
        if backoff_s is None:
            return None
        return _patience_s(self._sender, for_code(resp.error_code)(), backoff_s)


def put_off(producer: AIOKafkaProducer | None) -> KafkaError | None:
    """What a broker last answered this producer instead of doing what it asked for, if anything;
    told once."""
    sender = None if producer is None else producer._sender  # noqa: SLF001
    if sender is None or sender not in _put_off:
        return None
    _, answer = _put_off.pop(sender)
    return answer


def tune_client() -> None:
    """Set what aiokafka has no setting for; call once, before the first producer.

    20 ms between transactional requests are most of a small transaction. A commit is asked for
    once. What keeps a producer waiting is kept. Sequence numbers begin anew after the greatest.
    """
    aiokafka.producer.producer.TransactionManager = _WrapsSequences
    sender = aiokafka.producer.sender
    sender.BACKOFF_OVERRIDE = 0.002
    sender.EndTxnHandler = _EndsOnce
    sender.SendProduceReqHandler = _ProducesPatiently
    sender.InitPIDHandler = _StartsPatiently


def hand_out_plain_records() -> None:
    """Let every consumer of this process hand out `fetched.Record`s, for a worker's speed; call
    before the first one. They have neither topic nor partition."""
    fetcher.MemoryRecords = Batches
    fetcher.PartitionRecords = _PlainRecords
    fetcher.FetchResult = _PlainResult


def transactional_producer(settings: Settings, partition: int) -> AIOKafkaProducer:
    """The only producer that may write partition `partition` of our outputs."""
    return AIOKafkaProducer(
        **connection(settings),
        client_id=settings.transactional_id(partition),
        transactional_id=settings.transactional_id(partition),
        transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
        retry_backoff_ms=5,
        max_request_size=8 << 20,
        linger_ms=0,
    )


def log_reader(settings: Settings, *, committed: bool = True) -> Consumer:
    """A consumer without group: it is told what to read, and never moves by itself."""
    return Consumer(
        **connection(settings),
        client_id=f"{settings.app_id}-reader",
        group_id=None,
        isolation_level="read_committed" if committed else "read_uncommitted",
        auto_offset_reset="none",
        enable_auto_commit=False,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
        fetch_max_bytes=32 << 20,
        max_partition_fetch_bytes=settings.fetch_bytes,
        fetch_max_wait_ms=100,
        retry_backoff_ms=20,
    )
