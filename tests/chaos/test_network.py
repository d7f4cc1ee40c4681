"""The bad network, and what a late request may not do. On a real broker."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest
from aiokafka import TopicPartition

from schemas import topics
from streams import provision
from streams.engine.errors import UnknownOutcomeError
from streams.engine.kafka import log_reader, tune_client
from streams.engine.transaction import Transactor
from streams.settings import Settings
from streams.testbed.broker import Cluster, free_port
from streams.testbed.kafka import read_to_end
from tests.chaos.network import END_TXN, PRODUCE, Network
from tests.chaos.stage import StuckError, wait

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def behind_a_front(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Cluster, dict[int, int]]]:
    """A node that sends its clients to a port where a network is to stand."""
    ports = {0: free_port()}
    cluster = Cluster.start(tmp_path_factory.mktemp("fronted"), front=ports)
    yield cluster, ports
    cluster.stop(kill=True)


@pytest.fixture
async def fronted(
    behind_a_front: tuple[Cluster, dict[int, int]],
) -> AsyncIterator[tuple[Settings, Settings, Network]]:
    """An installation seen directly, the same seen through a network, and that network."""
    tune_client()
    cluster, ports = behind_a_front
    network = Network(ports, cluster.behind)
    try:
        await network.start()
        namespace = f"t-{secrets.token_hex(4)}-"
        direct = Settings(broker=cluster.bootstrap, namespace=namespace, partitions=1)
        await provision.apply(direct)
        yield direct, msgspec.structs.replace(direct, broker=network.bootstrap), network
    finally:
        await network.stop()


async def ledger(settings: Settings) -> list[bytes]:
    return [
        record.value async for record in read_to_end(settings, [settings.topics.of(topics.LEDGER)])
    ]


async def comes_to_hold(settings: Settings, *values: bytes) -> None:
    """A commit is answered before its marks are written, so readers see it a little later."""

    async def holds() -> bool:
        return await ledger(settings) == list(values)

    await wait(holds, 20, f"the ledger holds {values}")


async def started(settings: Settings) -> Transactor:
    transactor = Transactor(settings, 0)
    await transactor.start()
    return transactor


async def committed(transactor: Transactor, settings: Settings, value: bytes) -> None:
    outputs = transactor.outputs(0)
    outputs.append(settings.topics.of(topics.LEDGER), 0, b"t", value)
    await transactor.commit(outputs, {})


async def test_a_commit_that_arrives_late_commits_nothing_of_the_next_transaction(
    fronted: tuple[Settings, Settings, Network],
) -> None:
    direct, settings, network = fronted
    transactor = await started(settings)
    network.hold = {END_TXN: (3.0, 1)}
    network.hold_and_reset = True
    try:
        await committed(transactor, settings, b"first")
    except UnknownOutcomeError:
        transactor.drop()
        transactor = await started(settings)

    async def half_is_seen() -> bool:
        return b"half" in await ledger(direct)

    # Half of the next one is written when the late request arrives.
    producer = transactor._producer
    assert producer is not None
    await producer.begin_transaction()
    sent = await producer.send(direct.topics.of(topics.LEDGER), b"half", key=b"t", partition=0)
    await sent
    await wait(
        lambda: network.counts["held_requests_answered"] == 1, 20, "the late request arrives"
    )
    try:
        with pytest.raises(StuckError):
            await wait(half_is_seen, 2, "half of a transaction is committed")
    finally:
        transactor.drop()


async def test_an_answer_that_is_lost_after_the_append_leaves_one_record(
    fronted: tuple[Settings, Settings, Network],
) -> None:
    direct, settings, network = fronted
    transactor = await started(settings)
    network.lose = {PRODUCE: 2}
    await committed(transactor, settings, b"once")
    assert network.counts["answers_lost"] == 2
    await comes_to_hold(direct, b"once")
    await transactor.stop()


async def test_a_commit_whose_answer_is_lost_is_unknown_and_was_done(
    fronted: tuple[Settings, Settings, Network],
) -> None:
    direct, settings, network = fronted
    transactor = await started(settings)
    network.lose = {END_TXN: 1}
    with pytest.raises(UnknownOutcomeError):
        await committed(transactor, settings, b"done")
    transactor.drop()
    transactor = await started(settings)
    await comes_to_hold(direct, b"done")
    await transactor.stop()


@pytest.mark.parametrize("up", [True, False])
async def test_a_cut_in_one_direction_lets_nothing_through_until_it_is_mended(
    fronted: tuple[Settings, Settings, Network], up: bool
) -> None:
    direct, settings, network = fronted
    transactor = await started(settings)
    network.cut(up=up)
    committing = asyncio.ensure_future(committed(transactor, settings, b"late"))
    await asyncio.wait({committing}, timeout=1)
    assert not committing.done()
    network.clear()
    await committing
    await comes_to_hold(direct, b"late")
    await transactor.stop()


async def test_a_consumer_ends_while_it_rests_after_a_failed_fetch(
    fronted: tuple[Settings, Settings, Network],
) -> None:
    _, settings, network = fronted
    consumer = log_reader(settings)
    await consumer.start()
    tp = TopicPartition(settings.topics.of(topics.LEDGER), 0)
    consumer.assign([tp])
    consumer.seek(tp, 0)
    # It rests for longer than this test may take.
    consumer._fetcher._retry_backoff = 3_600

    def waits_in() -> list[str]:
        coroutines = [task.get_coro().cr_await for task in consumer._fetcher._pending_tasks]
        return [one.__qualname__ for one in coroutines if one is not None]

    async def fetches() -> bool:
        return waits_in() == ["AIOKafkaClient.send"]

    async def rests() -> bool:
        return waits_in() == ["sleep"]

    await wait(fetches, 30, "a fetch is under way")
    await network.stop()
    await wait(rests, 30, "the fetch has failed")
    await asyncio.wait_for(consumer.stop(), 30)
    assert all(task.done() for task in consumer._fetcher._pending_tasks)
