"""The private names of Faust and aiokafka this engine stands on, watched.

A new version that moves one of them fails here, not in production.
"""

import inspect
import re
from importlib.metadata import version
from typing import Any

import aiokafka.producer.sender
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import PartitionRecords
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.producer import message_accumulator
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.producer.transaction_manager import TransactionManager
from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.transport.consumer import Consumer as BaseConsumer
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport

from streams.engine import fetched, kafka
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
        (aiokafka.producer.sender.SendProduceReqHandler, "_can_retry", ["self", "error", "batch"]),
        (aiokafka.producer.sender.InitPIDHandler, "handle_response", ["self", "resp"]),
        (TransactionManager, "fatal_error", ["self", "exc"]),
        (TransactionManager, "increment_sequence_number", ["self", "tp", "increment"]),
        (PartitionRecords, "_consumer_record", ["self", "tp", "record"]),
        (fetcher.FetchResult, "getall", ["self", "max_records"]),
        (fetcher.FetchResult, "check_assignment", ["self", "tp"]),
        (fetcher.FetchResult, "_update_position", ["self"]),
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


def test_a_producer_still_waits_as_long_as_its_handler_says() -> None:
    source = inspect.getsource(aiokafka.producer.sender.SendProduceReqHandler.do)
    assert "asyncio.sleep(self._default_backoff)" in source


def test_a_producer_still_counts_sequences_by_a_name_that_can_be_replaced() -> None:
    assert "self._txn_manager = TransactionManager(" in inspect.getsource(AIOKafkaProducer)
    assert "self._sequence_numbers[tp]" in inspect.getsource(TransactionManager.sequence_number)


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


def test_plain_records_stand_where_the_client_looks_for_its_own() -> None:
    source = inspect.getsource(fetcher)
    for taken in (
        "records = MemoryRecords(part_data[-1])",
        "partition_records = PartitionRecords(\n",
        "= FetchResult(\n",
        "if type(res_or_error) is FetchResult:",
    ):
        assert taken in source
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MemoryRecords", "PartitionRecords", "FetchResult"):
            patch.setattr(fetcher, name, getattr(fetcher, name))
        kafka.hand_out_plain_records()
        assert fetcher.MemoryRecords is fetched.Batches
        assert fetcher.PartitionRecords is kafka._PlainRecords
        assert fetcher.FetchResult is kafka._PlainResult


def test_the_client_asks_of_batches_only_what_ours_can_tell() -> None:
    source = inspect.getsource(PartitionRecords)
    asked = set(re.findall(r"\bnext_batch\.(\w+)", source))
    assert "producer_id" in asked
    assert asked | {"__iter__", "offset"} <= set(dir(fetched.Batch))
    asked = set(re.findall(r"\brecords\.(\w+)\(", inspect.getsource(fetcher)))
    assert asked == {"has_next", "next_batch", "size_in_bytes"} <= set(dir(fetched.Batches))


def test_batches_of_the_client_still_tell_what_ours_need() -> None:
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, 0, 100_000)
    assert builder.append(0, 1, key=b"k", value=b"v", headers=[]) is not None
    batch: Any = MemoryRecords(bytes(builder.build())).next_batch()
    assert type(batch) is DefaultRecordBatch
    assert (batch.compression_type, batch.timestamp_type) == (0, 0)
    assert (batch.first_timestamp, batch.max_timestamp) == (1, 1)
    assert (batch.is_control_batch, batch.is_transactional, batch.producer_id) == (False, False, -1)
    assert (batch.base_offset, batch.next_offset, batch.validate_crc()) == (0, 1, True)


def test_the_client_still_goes_round_a_batch_and_hands_out_a_fetch_as_it_did() -> None:
    loop = inspect.getsource(PartitionRecords._unpack_records)
    for line in (
        "            for record in next_batch:",
        "                if record.offset < self.next_fetch_offset:",
        "                consumer_record = self._consumer_record(tp, record)",
        "                self.next_fetch_offset = record.offset + 1",
        "                yield consumer_record",
        "            self.next_fetch_offset = next_batch.next_offset",
    ):
        assert f"{line}\n" in loop
    assert "self._records_iterator = self._unpack_records()" in inspect.getsource(PartitionRecords)
    whole = " ".join(inspect.getsource(fetcher.FetchResult.getall).split())
    assert whole == (
        "def getall(self, max_records=None): tp = self._topic_partition "
        "if not self.check_assignment(tp) or not self.has_more(): return [] "
        "ret_list = [] for msg in self._partition_records: ret_list.append(msg) "
        "if max_records is not None and len(ret_list) >= max_records: "
        "self._update_position() break "
        "else: self._update_position() self._partition_records = None return ret_list"
    )


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
