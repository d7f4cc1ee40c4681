"""The private names of Faust and aiokafka this engine stands on, watched.

A new version that moves one of them fails here, not in production.
"""

import inspect
import re
from importlib.metadata import version
from typing import Any

import aiokafka.producer.sender
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import PartitionRecords
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.producer import message_accumulator
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.producer.transaction_manager import TransactionManager
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.transport.consumer import Consumer as BaseConsumer
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport

from streams.engine import kafka
from streams.engine.record_batch import RecordBatch


def test_faust_is_the_version_this_was_written_for() -> None:
    assert version("faust-streaming") == "0.15.3"
    assert version("aiokafka").startswith("0.14.")


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (AIOKafkaConsumerThread, "_fetch_records", ["self", "consumer"]),
        (Consumer, "_new_consumer_thread", ["self"]),
        (BaseConsumer, "_drain_messages", ["self", "fetcher"]),
        (BaseConsumer, "perform_seek", ["self"]),
        (BaseConsumer, "force_commit", ["self", "topics"]),
        (Consumer, "verify_event_path", ["self", "now", "tp"]),
        (aiokafka.producer.sender.EndTxnHandler, "do", ["self", "node_id"]),
        (aiokafka.producer.sender.EndTxnHandler, "handle_response", ["self", "resp"]),
        (TransactionManager, "fatal_error", ["self", "exc"]),
        (PartitionRecords, "_consumer_record", ["self", "tp", "record"]),
        (Recovery, "need_recovery", ["self"]),
        (Recovery, "on_recovery_completed", ["self", "generation_id"]),
        (Recovery, "_build_highwaters", ["self"]),
        (Recovery, "_build_offsets", ["self"]),
        (Recovery, "_seek_offsets", ["self"]),
    ],
)
def test_an_overridden_method_still_exists(owner: type, name: str, parameters: list[str]) -> None:
    found = list(inspect.signature(getattr(owner, name)).parameters)
    assert found[: len(parameters)] == parameters


def test_the_recovery_is_still_a_property_that_can_be_replaced() -> None:
    assert isinstance(TableManager.__dict__["recovery"], property)
    assert Transport.Consumer is Consumer


def test_a_producer_can_still_be_taken_apart() -> None:
    source = inspect.getsource(AIOKafkaProducer)
    assert "self._closed" in source
    assert "self._sender" in source
    assert isinstance(aiokafka.producer.sender.Sender.sender_task, property)
    assert isinstance(aiokafka.producer.sender.BACKOFF_OVERRIDE, float)


def test_a_producer_still_keeps_what_ended_its_transaction() -> None:
    assert "self._txn_manager" in inspect.getsource(AIOKafkaProducer)
    assert "_transaction_waiter.set_exception" in inspect.getsource(TransactionManager.fatal_error)


def test_a_consumer_still_keeps_its_fetch_sizes_to_itself() -> None:
    assert "max_partition_fetch_bytes" in inspect.signature(AIOKafkaConsumer).parameters
    asked = inspect.getsource(fetcher.Fetcher._get_actions_per_node)
    for name in ("self._fetch_max_wait_ms,", "self._fetch_min_bytes,", "self._fetch_max_bytes,"):
        assert name in asked


def test_a_consumer_still_can_be_told_to_look_for_leaders_anew() -> None:
    assert "self._client =" in inspect.getsource(AIOKafkaConsumer)
    assert inspect.iscoroutinefunction(AIOKafkaConsumer.beginning_offsets)
    assert "force_metadata_update" in vars(AIOKafkaClient)


def test_a_question_for_log_ends_still_gives_up_after_the_request_time_out() -> None:
    for asked in (AIOKafkaConsumer.beginning_offsets, AIOKafkaConsumer.end_offsets):
        assert "self._request_timeout_ms" in inspect.getsource(asked)
    source = inspect.getsource(fetcher.Fetcher._retrieve_offsets)
    assert "raise KafkaTimeoutError(" in source


class _Place:
    """As much of a consumer's state as a fetch result looks at."""

    active = True
    paused = False

    def __init__(self) -> None:
        self.position = 0

    def state_value(self, _: TopicPartition) -> "_Place":
        return self

    def consumed_to(self, position: int) -> None:
        self.position = position


def _drained(kind: type[PartitionRecords], sizes: list[int | None]) -> list[tuple[Any, ...]]:
    data = b""
    for base in (0, 10):  # offsets 5 to 9 are gone
        builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, 0, 100_000)
        for offset in range(5):
            assert builder.append(offset, 1, key=b"k", value=b"v", headers=[]) is not None
        data += base.to_bytes(8, "big") + bytes(builder.build())[8:]
    place = _Place()
    tp = TopicPartition("t", 0)
    records = kind(tp, MemoryRecords(data), [], 0, None, None, False, 0)
    result = fetcher.FetchResult(tp, assignment=place, partition_records=records, backoff=0)
    told = []
    for size in sizes:
        if result.has_more():
            offsets = [record.offset for record in result.getall(size)]
            told.append((offsets, place.position, result.has_more()))
    return told


@pytest.mark.parametrize("sizes", [[None], [3] * 5, [5] * 3, [10, 10], [2, None]])
def test_plain_records_are_handed_out_as_the_clients_are(sizes: list[int | None]) -> None:
    told = _drained(kafka._PlainRecords, sizes)
    assert told == _drained(PartitionRecords, sizes)
    offsets = [offset for part, _, _ in told for offset in part]
    assert offsets == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert told[-1][1] == 15


def test_a_coordinator_still_says_whether_it_is_in_its_group() -> None:
    source = inspect.getsource(GroupCoordinator)
    for name in ("self.generation", "self.coordinator_id", "self._heartbeat_task"):
        assert f"{name} = " in source
    assert "self.generation = OffsetCommitRequest.DEFAULT_GENERATION_ID" in inspect.getsource(
        GroupCoordinator.reset_generation
    )
    assert "self._coordinator" in inspect.getsource(AIOKafkaConsumer)
    assert "_consumer" in inspect.getsource(AIOKafkaConsumerThread)


def test_the_client_asks_of_a_batch_only_what_ours_answers() -> None:
    source = inspect.getsource(message_accumulator.MessageBatch)
    source += inspect.getsource(message_accumulator.MessageAccumulator)
    asked = set(re.findall(r"_builder\.(\w+)", source))
    assert asked == {"append", "close", "closed", "record_count", "_set_producer_state", "_build"}
    for name in asked - {"append"}:
        ours, theirs = getattr(RecordBatch, name), getattr(BatchBuilder, name)
        assert [*inspect.signature(ours).parameters] == [*inspect.signature(theirs).parameters]
