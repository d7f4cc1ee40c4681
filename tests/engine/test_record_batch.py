"""Record batches: the client's own parser and builder say what they must be."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.codec import lz4_encode
from aiokafka.producer.message_accumulator import BatchBuilder, MessageAccumulator
from aiokafka.producer.transaction_manager import TransactionManager
from aiokafka.record import default_records
from hypothesis import example, given
from hypothesis import strategies as st

from streams.engine import record_batch
from streams.engine.outputs import MAX_BATCH_BYTES, Outputs
from streams.engine.record_batch import (
    NO_HEADERS,
    RecordBatch,
    encode_each,
    encode_headers,
    varint,
)
from tests.batches import parsed, records_of

STAMP_MS = 1_790_000_000_000
PLACE = TopicPartition("ledger", 3)
LZ4 = 3
# Where a varint grows by a byte.
BORDERS = (0, 63, 64, 8_191, 8_192, 1 << 20)

Headers = list[tuple[str, bytes | None]]
Record = tuple[bytes | None, bytes | None, Headers]

texts = st.none() | st.binary(max_size=80) | st.sampled_from(BORDERS[:-1]).map(bytes)
headers = st.lists(st.tuples(st.text(max_size=40), texts), max_size=70)
records = st.lists(st.tuples(texts, texts, headers), min_size=1, max_size=80)


def batch_of(written: list[Record], limit_bytes: int = 1 << 30) -> RecordBatch:
    """As many of the records as there is room for."""
    batch = RecordBatch(STAMP_MS, limit_bytes)
    for key, value, some in written:
        if not batch.add(key, value, encode_headers(some)):
            break
    batch.close()
    return batch


def clients_batch_of(written: list[Record], limit_bytes: int = 1 << 30, codec: int = 0) -> Any:
    batch = BatchBuilder(limit_bytes, codec, is_transactional=True)
    for key, value, some in written:
        if batch.append(timestamp=STAMP_MS, key=key, value=value, headers=some) is None:
            break
    return batch


def built(batch: Any) -> bytes:
    """As the broker gets it from producer 7 in its epoch 3."""
    batch._set_producer_state(7, 3, 1_000)
    return bytes(batch._build())


def border_records() -> list[Record]:
    return [
        (bytes(size), b"", [("", None), ("é" * (size // 2), bytes(size))]) for size in BORDERS
    ] + [(None, bytes(size), []) for size in BORDERS]


@given(records)
@example(border_records())
@example([(None, None, [])] * 8_200)
def test_the_client_reads_back_what_was_added(written: list[Record]) -> None:
    batch, found = parsed(built(batch_of(written)))
    assert [(one.key, one.value, list(one.headers)) for one in found] == written
    assert [one.offset for one in found] == list(range(len(written)))
    assert {one.timestamp for one in found} == {STAMP_MS}
    assert batch.is_transactional
    assert not batch.is_control_batch


@given(records)
@example(border_records())
@example([(None, None, [])] * 8_200)
def test_uncompressed_it_is_the_clients_batch_byte_for_byte(written: list[Record]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_batch, "lz4_encode", lambda payload, **_: payload)
        assert built(batch_of(written)) == built(clients_batch_of(written))


@given(records)
@example(border_records())
@example([(b"", b"", [])])
def test_it_is_the_clients_batch_at_level_1_where_that_is_smaller(written: list[Record]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        compiled = default_records.DefaultRecordBatchBuilder.__module__
        patch.setattr(f"{compiled}.lz4_encode", lambda payload: lz4_encode(payload, level=1))
        plain, compressed = (built(clients_batch_of(written, codec=codec)) for codec in (0, LZ4))
    assert built(batch_of(written)) == min(plain, compressed, key=len)


@given(records, st.data())
def test_it_is_full_when_the_clients_is(written: list[Record], data: st.DataObject) -> None:
    fitting = data.draw(st.integers(1, len(written)))
    limit_bytes = len(built(clients_batch_of(written[:fitting]))) + data.draw(st.integers(-1, 1))
    batch = batch_of(written, limit_bytes)
    assert batch.record_count() == clients_batch_of(written, limit_bytes).record_count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_batch, "lz4_encode", lambda payload, **_: payload)
        assert len(built(batch)) < limit_bytes or batch.record_count() == 1


@given(headers, headers)
def test_headers_can_be_encoded_in_parts(some: Headers, others: Headers) -> None:
    parts = varint(len(some) + len(others)) + encode_each(some) + encode_each(others)
    assert parts == encode_headers([*some, *others])


def test_a_record_without_headers_says_that_it_has_none() -> None:
    assert encode_headers([]) == NO_HEADERS


def test_a_closed_batch_takes_no_more() -> None:
    for end in (RecordBatch.close, RecordBatch._build):
        batch = RecordBatch(STAMP_MS, MAX_BATCH_BYTES)
        assert batch.add(b"k", b"v")
        end(batch)
        with pytest.raises(AssertionError):
            batch.add(b"k", b"w")
        assert [one.value for one in records_of(batch)] == [b"v"]


def test_a_negative_length_is_never_written() -> None:
    with pytest.raises(AssertionError):
        varint(-1)


async def test_the_client_sends_it_like_a_batch_of_its_own() -> None:
    """Through the client's accumulator, as its producer and its sender go."""
    manager = TransactionManager("t-0", 1_000)
    manager.set_pid_and_epoch(7, 3)
    manager.begin_transaction()
    cluster = SimpleNamespace(leader_for_partition=lambda _: 1)
    accumulator = MessageAccumulator(cluster, 1_000, LZ4, 30, txn_manager=manager)
    for sequence in (0, 2):
        batch = batch_of([(b"k", b"first", []), (b"k", b"second", [("h", b"1")])])
        acknowledged = await accumulator.add_batch(batch, PLACE, 1)
        [[sent]] = [nodes.values() for nodes in accumulator.drain_by_nodes(())[0].values()]
        once = sent.get_data_buffer()
        head, found = parsed(once)
        assert [one.value for one in found] == [b"first", b"second"]
        assert (head.producer_id, head.producer_epoch, head.base_sequence) == (7, 3, sequence)
        # Asked to send it again, the client sends the same: the broker knows it by its sequence.
        accumulator.reenqueue(sent)
        [[again]] = [nodes.values() for nodes in accumulator.drain_by_nodes(())[0].values()]
        assert again is sent
        assert sent.get_data_buffer() == once
        sent.done(40)
        assert (await acknowledged).offset == 40
    await asyncio.wait_for(accumulator.flush_for_commit(), 1)


async def test_a_record_of_the_clients_own_waits_until_ours_is_sent() -> None:
    manager = TransactionManager("t-0", 1_000)
    manager.set_pid_and_epoch(7, 3)
    manager.begin_transaction()
    cluster = SimpleNamespace(leader_for_partition=lambda _: 1)
    accumulator = MessageAccumulator(cluster, 1_000, LZ4, 30, txn_manager=manager)
    await accumulator.add_batch(batch_of([(b"k", b"first", [])]), PLACE, 1)
    waiting = asyncio.ensure_future(accumulator.add_message(PLACE, b"k", b"other", 1))
    await asyncio.sleep(0)
    [[sent]] = [nodes.values() for nodes in accumulator.drain_by_nodes(())[0].values()]
    await waiting
    [[other]] = [nodes.values() for nodes in accumulator.drain_by_nodes(())[0].values()]
    buffers = [bytes(batch.get_data_buffer()) for batch in (sent, other)]
    assert [one.value for buffer in buffers for one in parsed(buffer)[1]] == [b"first", b"other"]


def test_outputs_keep_the_records_of_a_place_in_order() -> None:
    outputs = Outputs(STAMP_MS)
    # The last one names its topic by an equal string, not by the same.
    again = "".join(["led", "ger"])
    places = [("ledger", 0), ("ledger", 1), ("b", 1), ("b", 0), ("b", 0), ("ledger", 1), (again, 1)]
    for number, (topic, partition) in enumerate(places):
        outputs.append(topic, partition, b"k", b"%d" % number)
    found = [
        (topic, partition, [one.value for one in records_of(batch)])
        for topic, partition, batch in outputs.batches()
    ]
    assert found == [
        ("ledger", 0, [b"0"]),
        ("ledger", 1, [b"1", b"5", b"6"]),
        ("b", 1, [b"2"]),
        ("b", 0, [b"3", b"4"]),
    ]


def test_a_full_batch_is_followed_by_another_and_a_large_record_stands_alone() -> None:
    outputs = Outputs(STAMP_MS)
    sizes = [400_000, 400_000, 400_000, 2_000_000, 1]
    for size in sizes:
        outputs.append("a", 0, b"k", bytes(size))
    batches = [batch for _, _, batch in outputs.batches()]
    assert all(batch.closed() for batch in batches)
    assert [batch.record_count() for batch in batches] == [2, 1, 1, 1]
    found = [len(one.value) for batch in batches for one in records_of(batch)]
    assert found == sizes
