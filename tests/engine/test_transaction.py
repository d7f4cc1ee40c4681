"""How the client's errors are read. What a real broker does: tests/chaos/test_network.py."""

from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    CoordinatorLoadInProgressError,
    IllegalOperation,
    KafkaConnectionError,
    KafkaError,
    ProducerFenced,
)
from aiokafka.producer.transaction_manager import TransactionManager

from streams.engine import kafka, transaction
from streams.engine.errors import FencedError, UnknownOutcomeError
from streams.engine.outputs import Outputs
from streams.engine.transaction import Transactor
from streams.settings import Settings


class EndedWhileSending:
    """A producer whose background task has failed when the next batch is handed to it."""

    def __init__(self, first_error: Exception, then: Exception) -> None:
        self._sender = None
        self._txn_manager = TransactionManager("t-0", 1_000)
        self._txn_manager.set_pid_and_epoch(1, 0)
        self._first_error = first_error
        self._then = then

    async def begin_transaction(self) -> None:
        self._txn_manager.begin_transaction()

    async def send_batch(self, *_: Any, **__: Any) -> None:
        self._txn_manager.fatal_error(self._first_error)
        raise self._then


class OneBatch(Outputs):
    def __init__(self) -> None:
        pass

    def batches(self) -> list[tuple[str, int, Any]]:
        return [("topic", 0, None)]


async def committed_by(
    monkeypatch: pytest.MonkeyPatch, first_error: Exception, then: Exception
) -> None:
    async def nothing() -> None:
        """Starting takes no broker here."""

    producer = EndedWhileSending(first_error, then)
    monkeypatch.setattr(producer, "start", nothing, raising=False)
    monkeypatch.setattr(transaction, "transactional_producer", lambda *_: producer)
    transactor = Transactor(Settings(), 0)
    await transactor.start()
    await transactor.commit(OneBatch(), {})


# What the client says first, and what it says to whoever goes on.
NO_TRANSACTION = IllegalOperation("Can't send messages while not in transaction")


@pytest.mark.parametrize("then", [NO_TRANSACTION, KafkaError("failed"), AssertionError()])
async def test_a_fence_found_out_while_sending_is_a_fence(
    monkeypatch: pytest.MonkeyPatch, then: Exception
) -> None:
    with pytest.raises(FencedError):
        await committed_by(monkeypatch, ProducerFenced(), then)


@pytest.mark.parametrize("then", [NO_TRANSACTION, KafkaError("failed"), AssertionError()])
async def test_any_other_end_while_sending_is_an_unknown_outcome(
    monkeypatch: pytest.MonkeyPatch, then: Exception
) -> None:
    with pytest.raises(UnknownOutcomeError):
        await committed_by(monkeypatch, KafkaConnectionError("reset"), then)


@pytest.mark.parametrize(
    ("before", "records", "after"),
    [
        (0, 3, 3),
        (2**31 - 4, 3, 2**31 - 1),
        (2**31 - 3, 3, 0),
        (2**31 - 1, 1, 0),
        (2**31 - 2, 5, 3),
    ],
)
async def test_sequence_numbers_wrap_as_those_of_kafka_do(
    before: int, records: int, after: int
) -> None:
    # DefaultRecordBatch.incrementSequence of Kafka's own client.
    tp = TopicPartition("ledger", 0)
    counts = kafka._WrapsSequences("t-0", 1_000)
    counts.increment_sequence_number(tp, before)
    counts.increment_sequence_number(tp, records)
    assert counts.sequence_number(tp) == after


def test_who_is_put_off_asks_again_later_the_longer_it_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1_000.0
    monkeypatch.setattr(kafka, "monotonic", lambda: now)

    class Asked:
        """A producer, and what sends for it."""

        _sender: Any

    producer: Any = Asked()
    producer._sender = Asked()
    busy = CoordinatorLoadInProgressError()

    def waits_s() -> float:
        return kafka._patience_s(producer._sender, busy, 0.005)

    assert kafka.put_off(producer) is None
    assert waits_s() == 0.005
    now += 0.03
    assert waits_s() == pytest.approx(0.03)
    now += 10
    assert waits_s() == kafka._PATIENCE_S
    assert kafka.put_off(producer) is busy
    # Told once: what follows is another wait.
    assert kafka.put_off(producer) is None
    assert waits_s() == 0.005
