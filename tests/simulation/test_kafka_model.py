"""What the engine relies on in Kafka, asked of the model and of a real broker alike.

A behaviour here that only one of them shows is a fault of the model, and then every schedule that
was played on it proves less than it says.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator
from contextvars import copy_context
from typing import Any, Protocol
from unittest import mock

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.records_to_delete import RecordsToDelete
from aiokafka.errors import (
    CommitFailedError,
    IllegalGenerationError,
    InvalidProducerEpoch,
    OffsetOutOfRangeError,
    ProducerFenced,
)
from aiokafka.structs import OffsetAndMetadata

from schemas import topics
from streams import provision
from streams.engine import kafka, transaction
from streams.engine.errors import FencedError
from streams.engine.restore import Marks
from streams.engine.transaction import Transactor
from streams.settings import Settings
from tests.simulation import clients
from tests.simulation.clients import NETWORK, Fault, Network
from tests.simulation.log import Broker, Partition
from tests.simulation.loop import Loop

FENCED = (ProducerFenced, InvalidProducerEpoch)
GROUP = "behaviours"


class Kafka(Protocol):
    """A cluster, as the behaviours see it; clients are made as the engine makes them."""

    settings: Settings

    def reader(self, *, committed: bool = True) -> Any:
        """A consumer without group, not started."""

    async def delete_before(self, tp: TopicPartition, offset: int) -> None:
        """Move a log's start."""

    async def group_offsets(self) -> dict[TopicPartition, int]:
        """What the group has committed."""

    async def commit_as_member(self, tp: TopicPartition, offset: int, *, behind: int) -> None:
        """Commit as a member of the group whose generation is so many behind the current one."""


Behaviour = Callable[[Kafka], Awaitable[None]]
BEHAVIOURS: dict[str, Behaviour] = {}


def behaviour(told: Behaviour) -> Behaviour:
    BEHAVIOURS[told.__name__] = told
    return told


class Client:
    """A transactional producer and what tests want to say with it."""

    def __init__(self, cluster: Kafka, partition: int = 0) -> None:
        self.transactor = Transactor(cluster.settings, partition)
        self.entries = TopicPartition(cluster.settings.topics.of(topics.LEDGER), 0)
        self.notices = TopicPartition(cluster.settings.topics.of(topics.NOTIFICATION), 0)

    @property
    def producer(self) -> Any:
        return self.transactor._producer

    async def start(self) -> "Client":
        await self.transactor.start()
        return self

    async def send(self, *values: bytes, tp: TopicPartition | None = None) -> None:
        tp = tp or self.entries
        batch = self.producer.create_batch()
        for at, value in enumerate(values):
            batch.append(timestamp=1_000 + at, key=b"k", value=value, headers=[("h", b"1")])
        batch.close()
        await (await self.producer.send_batch(batch, tp.topic, partition=tp.partition))

    async def begin(self) -> None:
        await self.producer.begin_transaction()

    async def commit(self) -> None:
        await self.producer.commit_transaction()

    async def abort(self) -> None:
        await self.producer.abort_transaction()

    async def committed(self, *values: bytes) -> None:
        await self.begin()
        await self.send(*values)
        await self.commit()

    async def aborted(self, *values: bytes) -> None:
        await self.begin()
        await self.send(*values)
        await self.abort()


async def ends(cluster: Kafka, tp: TopicPartition) -> tuple[int, int, int]:
    """Log start, last stable offset, high watermark; a commit's markers may be a little late."""
    async with reading(cluster) as reader, reading(cluster, committed=False) as uncommitted:
        start = (await reader.beginning_offsets([tp]))[tp]
        stable = (await reader.end_offsets([tp]))[tp]
        return start, stable, (await uncommitted.end_offsets([tp]))[tp]


@contextlib.asynccontextmanager
async def reading(cluster: Kafka, *, committed: bool = True) -> Any:
    reader = cluster.reader(committed=committed)
    await reader.start()
    try:
        yield reader
    finally:
        await asyncio.sleep(0.01)
        await reader.stop()


async def settled(cluster: Kafka, tp: TopicPartition) -> tuple[int, int]:
    """Log start and end, once no transaction is open."""
    async with asyncio.timeout(30):
        while True:
            start, stable, end = await ends(cluster, tp)
            if stable == end:
                return start, end
            await asyncio.sleep(0.05)


async def found(
    cluster: Kafka, tp: TopicPartition, begin: int = 0, *, committed: bool = True
) -> list[tuple[int, bytes]]:
    """Offsets and values from an offset to where a reader of this kind gets; its position must
    get there too, control records at the end included."""
    async with reading(cluster, committed=committed) as reader:
        end = (await reader.end_offsets([tp]))[tp]
        reader.assign([tp])
        reader.seek(tp, begin)
        records = []
        async with asyncio.timeout(30):
            while await reader.position(tp) < end:
                for some in (await reader.getmany(tp, timeout_ms=200)).values():
                    records += [(record.offset, record.value) for record in some]
    return records


async def committed_offset(cluster: Kafka, tp: TopicPartition) -> int:
    """What the group has committed, once there is something."""
    for _ in range(600):
        offsets = await cluster.group_offsets()
        if tp in offsets:
            return offsets[tp]
        await asyncio.sleep(0.05)
    pytest.fail("the group has no offset")


# -- behaviours ----------------------------------------------------------------------------------


@behaviour
async def records_keep_what_they_came_with(cluster: Kafka) -> None:
    client = await Client(cluster).start()
    await client.committed(b"a", b"b")
    await settled(cluster, client.entries)
    async with reading(cluster) as reader:
        reader.assign([client.entries])
        reader.seek(client.entries, 0)
        records: list[Any] = []
        async with asyncio.timeout(30):
            while len(records) < 2:
                for some in (await reader.getmany(timeout_ms=200)).values():
                    records += some
    assert [record.offset for record in records] == [0, 1]
    assert [record.timestamp for record in records] == [1_000, 1_001]
    assert [(record.key, record.value) for record in records] == [(b"k", b"a"), (b"k", b"b")]
    assert [tuple(record.headers) for record in records] == [(("h", b"1"),)] * 2
    client.transactor.drop()


@behaviour
async def the_end_of_a_transaction_takes_an_offset_that_nobody_reads(cluster: Kafka) -> None:
    client = await Client(cluster).start()
    await client.committed(b"a", b"b")
    await client.committed(b"c")
    assert await settled(cluster, client.entries) == (0, 5)
    assert await found(cluster, client.entries) == [(0, b"a"), (1, b"b"), (3, b"c")]
    assert await found(cluster, client.entries, 2) == [(3, b"c")]
    assert await found(cluster, client.entries, 4) == []
    client.transactor.drop()


@behaviour
async def aborted_records_stay_in_the_log_and_only_the_uncommitted_see_them(
    cluster: Kafka,
) -> None:
    client = await Client(cluster).start()
    await client.committed(b"a")
    await client.aborted(b"never", b"never")
    await client.committed(b"b")
    assert await settled(cluster, client.entries) == (0, 7)
    assert await found(cluster, client.entries) == [(0, b"a"), (5, b"b")]
    every = await found(cluster, client.entries, committed=False)
    assert [value for _, value in every] == [b"a", b"never", b"never", b"b"]
    client.transactor.drop()


@behaviour
async def a_log_of_aborted_records_alone_is_read_to_its_end(cluster: Kafka) -> None:
    client = await Client(cluster).start()
    await client.aborted(b"never")
    assert await settled(cluster, client.entries) == (0, 2)
    assert await found(cluster, client.entries) == []
    client.transactor.drop()


@behaviour
async def an_open_transaction_holds_the_stable_offset_and_nothing_of_it_is_read(
    cluster: Kafka,
) -> None:
    client = await Client(cluster).start()
    await client.committed(b"a")
    await settled(cluster, client.entries)
    await client.begin()
    await client.send(b"open")
    other = await Client(cluster, 1).start()
    await other.committed(b"behind it")
    assert (await ends(cluster, client.entries))[:2] == (0, 2)
    assert await found(cluster, client.entries) == [(0, b"a")]
    assert await found(cluster, client.entries, committed=False) == [
        (0, b"a"),
        (2, b"open"),
        (3, b"behind it"),
    ]
    await client.commit()
    assert await settled(cluster, client.entries) == (0, 6)
    assert [value for _, value in await found(cluster, client.entries)] == [
        b"a",
        b"open",
        b"behind it",
    ]
    client.transactor.drop()
    other.transactor.drop()


@behaviour
async def a_new_producer_ends_what_the_old_one_left_open_and_fences_it(cluster: Kafka) -> None:
    old = await Client(cluster).start()
    await old.committed(b"a")
    await old.begin()
    await old.send(b"left open")
    new = await Client(cluster).start()
    start, stable, end = await ends(cluster, old.entries)
    assert (start, stable) == (0, end), "nothing is open once the new producer has started"
    with pytest.raises(FENCED):
        await old.commit()
    await new.committed(b"b")
    await settled(cluster, old.entries)
    assert [value for _, value in await found(cluster, old.entries)] == [b"a", b"b"]
    old.transactor.drop()
    new.transactor.drop()


@behaviour
async def a_fenced_producer_can_begin_nothing_new(cluster: Kafka) -> None:
    old = await Client(cluster).start()
    await old.committed(b"a")
    new = await Client(cluster).start()
    await old.begin()
    with pytest.raises(FENCED):
        await old.send(b"of a zombie")
    assert await settled(cluster, old.entries) == (0, 2)
    assert await found(cluster, old.entries, committed=False) == [(0, b"a")]
    old.transactor.drop()
    new.transactor.drop()


@behaviour
async def a_fenced_producer_cannot_write_to_a_partition_it_had_added(cluster: Kafka) -> None:
    old = await Client(cluster).start()
    await old.begin()
    await old.send(b"first")
    new = await Client(cluster).start()
    with pytest.raises(FENCED):
        await old.send(b"of a zombie")
    assert [value for _, value in await found(cluster, old.entries, committed=False)] == [b"first"]
    assert await found(cluster, old.entries) == []
    old.transactor.drop()
    new.transactor.drop()


@behaviour
async def the_engine_calls_a_fence_a_fence(cluster: Kafka) -> None:
    old = await Client(cluster).start()
    new = await Client(cluster).start()
    outputs = old.transactor.outputs(1_000)
    outputs.append(old.entries.topic, 0, b"k", b"of a zombie")
    with pytest.raises(FencedError):
        await old.transactor.commit(outputs, {})
    old.transactor.drop()
    new.transactor.drop()


@behaviour
async def a_transaction_counts_in_all_its_partitions_or_in_none(cluster: Kafka) -> None:
    client = await Client(cluster).start()
    for value, ends_with in ((b"never", client.abort), (b"a", client.commit)):
        await client.begin()
        await client.send(value, tp=client.entries)
        await client.send(value, tp=client.notices)
        await ends_with()
    for tp in (client.entries, client.notices):
        await settled(cluster, tp)
        assert [value for _, value in await found(cluster, tp)] == [b"a"]
    client.transactor.drop()


@behaviour
async def several_batches_of_one_partition_keep_their_order(cluster: Kafka) -> None:
    client = await Client(cluster).start()
    await client.begin()
    for number in range(4):
        await client.send(b"%d" % number)
    await client.commit()
    await settled(cluster, client.entries)
    assert await found(cluster, client.entries) == [(n, b"%d" % n) for n in range(4)]
    client.transactor.drop()


@behaviour
async def offsets_in_a_transaction_count_from_its_commit_on(cluster: Kafka) -> None:
    client = await Client(cluster).start()
    source = client.notices
    for offset, ends_with in ((7, client.abort), (5, client.commit)):
        await client.begin()
        await client.send(b"a")
        await client.producer.send_offsets_to_transaction(
            {source: OffsetAndMetadata(offset, "")}, GROUP
        )
        assert source not in await cluster.group_offsets()
        await ends_with()
        await settled(cluster, client.entries)
    assert await committed_offset(cluster, source) == 5
    client.transactor.drop()


@behaviour
async def offsets_alone_make_a_transaction(cluster: Kafka) -> None:
    client = await Client(cluster).start()
    await client.begin()
    await client.producer.send_offsets_to_transaction(
        {client.notices: OffsetAndMetadata(3, "")}, GROUP
    )
    await client.commit()
    assert await committed_offset(cluster, client.notices) == 3
    client.transactor.drop()


@behaviour
async def the_offsets_of_a_fenced_producer_do_not_count(cluster: Kafka) -> None:
    old = await Client(cluster).start()
    await old.begin()
    await old.send(b"a")
    await old.producer.send_offsets_to_transaction({old.notices: OffsetAndMetadata(9, "")}, GROUP)
    new = await Client(cluster).start()
    with pytest.raises(FENCED):
        await old.commit()
    assert old.notices not in await cluster.group_offsets()
    old.transactor.drop()
    new.transactor.drop()


@behaviour
async def a_transaction_without_anything_in_it_leaves_no_trace(cluster: Kafka) -> None:
    client = await Client(cluster).start()
    await client.begin()
    await client.commit()
    await client.committed(b"a")
    assert await settled(cluster, client.entries) == (0, 2)
    client.transactor.drop()


@behaviour
async def a_transaction_that_stays_open_is_ended_by_the_broker_and_its_producer_is_fenced(
    cluster: Kafka,
) -> None:
    client = await Client(cluster).start()
    await client.begin()
    await client.send(b"left open")
    async with asyncio.timeout(60):
        while True:
            _, stable, end = await ends(cluster, client.entries)
            if stable == end:
                break
            await asyncio.sleep(0.5)
    assert await found(cluster, client.entries) == []
    with pytest.raises(FENCED):
        await client.commit()
    client.transactor.drop()


@behaviour
async def what_is_deleted_moves_the_start_and_cannot_be_read(cluster: Kafka) -> None:
    client = await Client(cluster).start()
    await client.committed(b"a", b"b")
    await client.committed(b"c")
    await settled(cluster, client.entries)
    await cluster.delete_before(client.entries, 2)
    assert await settled(cluster, client.entries) == (2, 5)
    assert await found(cluster, client.entries, 2) == [(3, b"c")]
    with pytest.raises(OffsetOutOfRangeError):
        await found(cluster, client.entries, 1)
    client.transactor.drop()


@behaviour
async def an_offset_beyond_the_end_is_out_of_range(cluster: Kafka) -> None:
    client = await Client(cluster).start()
    await client.committed(b"a")
    await settled(cluster, client.entries)
    async with reading(cluster) as reader:
        reader.assign([client.entries])
        reader.seek(client.entries, 100)
        with pytest.raises(OffsetOutOfRangeError):
            await reader.getmany(client.entries, timeout_ms=30_000)
    client.transactor.drop()


@behaviour
async def marks_are_told_by_a_consumer_that_reads_nothing(cluster: Kafka) -> None:
    client = await Client(cluster).start()
    await client.committed(b"a")
    await settled(cluster, client.entries)
    await client.begin()
    await client.send(b"open")
    marks = Marks(cluster.settings)
    await marks.start()
    tps = [client.entries, client.notices]
    assert await marks.starts(tps) == dict.fromkeys(tps, 0)
    assert await marks.ends(tps) == {client.entries: 3, client.notices: 0}
    assert await marks.stable_ends(tps) == {client.entries: 2, client.notices: 0}
    await marks.stop()
    client.transactor.drop()


@behaviour
async def a_member_of_an_older_generation_commits_no_offsets(cluster: Kafka) -> None:
    tp = Client(cluster).entries
    await cluster.commit_as_member(tp, 4, behind=0)
    assert (await cluster.group_offsets())[tp] == 4
    with pytest.raises((IllegalGenerationError, CommitFailedError)):
        await cluster.commit_as_member(tp, 2, behind=1)
    assert (await cluster.group_offsets())[tp] == 4


# -- on the model --------------------------------------------------------------------------------


class OnModel:
    """The model, reached as the engine would."""

    def __init__(self, broker: Broker) -> None:
        self.settings = Settings(namespace="t-", partitions=2)
        self._broker = broker
        self._broker.group(GROUP).generation = 3

    def reader(self, *, committed: bool = True) -> Any:
        return clients.source_reader(self.settings, committed=committed)

    async def delete_before(self, tp: TopicPartition, offset: int) -> None:
        self._broker.partition(tp).delete_before(offset)

    async def group_offsets(self) -> dict[TopicPartition, int]:
        return dict(self._broker.group(GROUP).offsets)

    async def commit_as_member(self, tp: TopicPartition, offset: int, *, behind: int) -> None:
        generation = self._broker.group(GROUP).generation - behind
        self._broker.commit_offsets(GROUP, {tp: offset}, generation)


@contextlib.contextmanager
def on_the_model() -> Iterator[None]:
    with (
        mock.patch.object(transaction, "transactional_producer", clients.transactional_producer),
        mock.patch("streams.engine.restore.log_reader", clients.restore_reader),
    ):
        yield


async def tell(name: str, cluster: Any) -> None:
    await BEHAVIOURS[name](cluster)
    await asyncio.gather(*transaction._closings)


@pytest.mark.parametrize("how", ["at-once", "markers-late", "replies-lost"])
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_the_model_behaves_like_kafka(name: str, how: str) -> None:
    loop = Loop()
    broker = Broker(lambda: int(loop.time() * 1000))
    network = Network(broker, random.Random(1), jitter=0.3)
    if how == "markers-late":
        broker.marker_delay = lambda: 0.3
    if how == "replies-lost":
        # A client repeats what was not answered, and the broker knows a repeat.
        asked = ("init", "add", "produce", "offsets", "end") * 3
        network.faults = [Fault(request, "unanswered", 0.2) for request in asked]
    context = copy_context()
    context.run(NETWORK.set, network)

    with on_the_model(), contextlib.closing(loop):
        loop.run_until_complete(loop.create_task(tell(name, OnModel(broker)), context=context))


def test_compaction_keeps_the_last_committed_record_of_a_key_and_leaves_the_unstable() -> None:
    """Only the model's: a real broker compacts when it likes."""
    part = Partition("table", 0)
    part.append([(b"a", b"1", (), 0), (b"b", b"1", (), 0), (b"a", b"2", (), 0)])
    part.append([(b"a", b"never", (), 0)], producer=1, epoch=0, sequence=0, transactional=True)
    part.mark(1, 0, commit=False, timestamp=0)
    part.append([(b"b", b"open", (), 0)], producer=2, epoch=0, sequence=0, transactional=True)
    part.append([(b"b", b"behind it", (), 0)])
    before = part.committed()
    part.compact()
    assert [(one.offset, one.key, one.value) for one in part.committed()] == [
        (1, b"b", b"1"),
        (2, b"a", b"2"),
    ]
    assert dict((one.key, one.value) for one in before) == {b"b": b"1", b"a": b"2"}
    part.mark(2, 0, commit=True, timestamp=0)
    assert [one.value for one in part.committed()] == [b"1", b"2", b"open", b"behind it"]


# -- on a real broker ----------------------------------------------------------------------------


class OnBroker:
    """A real cluster."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._group = f"{settings.namespace}{GROUP}"

    def reader(self, *, committed: bool = True) -> Any:
        return kafka.log_reader(self.settings, committed=committed)

    @contextlib.asynccontextmanager
    async def _admin(self) -> Any:
        admin = AIOKafkaAdminClient(**kafka.connection(self.settings))
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()

    async def delete_before(self, tp: TopicPartition, offset: int) -> None:
        async with self._admin() as admin:
            await admin.delete_records({tp: RecordsToDelete(before_offset=offset)})

    async def group_offsets(self) -> dict[TopicPartition, int]:
        async with self._admin() as admin:
            listed = await admin.list_consumer_group_offsets(GROUP)
        return {tp: one.offset for tp, one in listed.items() if one.offset >= 0}

    async def commit_as_member(self, tp: TopicPartition, offset: int, *, behind: int) -> None:
        member = AIOKafkaConsumer(
            tp.topic,
            **kafka.connection(self.settings),
            group_id=GROUP,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        await member.start()
        try:
            async with asyncio.timeout(30):
                while tp not in member.assignment():
                    await member.getmany(timeout_ms=100)
            member._coordinator.generation -= behind
            await member.commit({tp: offset})
        finally:
            member._coordinator.generation += behind
            await member.stop()


@pytest.fixture
async def cluster(settings: Settings) -> Any:
    """An installation's topics in a fresh namespace."""
    await provision.apply(settings)
    return OnBroker(settings)


@pytest.mark.broker
@pytest.mark.parametrize("name", BEHAVIOURS)
async def test_kafka_behaves_like_the_model(name: str, cluster: OnBroker) -> None:
    await tell(name, cluster)
