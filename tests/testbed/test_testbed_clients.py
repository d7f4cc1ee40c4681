"""The testbed's clients on a real Kafka: what is written, and what is read to the end."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.codec import lz4_encode
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from msgspec.structs import replace

from schemas import topics
from schemas.funding import Reason, RechargeRequest, RechargeResult, Status
from streams import provision
from streams.engine.kafka import connection
from streams.provision import BrokerAwayError
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.broker import free_port
from streams.testbed.kafka import (
    NamespaceRequiredError,
    compress_fast,
    read_to_end,
    require_namespace,
    started_producer,
)
from streams.testbed.load import Plan, events, partition_of
from streams.testbed.payments import Behaviour, Simulator

NOW = datetime(2026, 3, 2, 10, tzinfo=UTC)
WITHIN_S = 60
USAGE = (topics.CALL_USAGE, topics.CONFERENCE_USAGE)


def test_without_namespace_nothing_is_written_unless_somebody_insists() -> None:
    with pytest.raises(NamespaceRequiredError, match="--yes-this-is-not-production"):
        require_namespace(Settings(), "The load generator", confirmed=False)
    require_namespace(Settings(), "The load generator", confirmed=True)
    require_namespace(Settings(namespace="demo-"), "The load generator", confirmed=False)


async def test_a_broker_that_is_away_is_named() -> None:
    settings = Settings(broker=f"127.0.0.1:{free_port()}")
    with pytest.raises(BrokerAwayError, match=settings.broker):
        await started_producer(settings)
    with pytest.raises(BrokerAwayError, match=settings.broker):
        await anext(read_to_end(settings, [topics.LEDGER]))


@pytest.fixture
async def installation(settings: Settings) -> Settings:
    """An installation on the real broker with all its topics."""
    await provision.apply(settings)
    return settings


async def values_of(settings: Settings, topic: str) -> list[bytes | None]:
    async with asyncio.timeout(WITHIN_S):
        return [record.value async for record in read_to_end(settings, [settings.topics.of(topic)])]


@pytest.mark.broker
async def test_reading_to_the_end_of_nothing_ends(installation: Settings) -> None:
    assert await values_of(installation, topics.LEDGER) == []


@asynccontextmanager
async def transactional(settings: Settings) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(
        **connection(settings), transactional_id=f"{settings.namespace}test", acks="all"
    )
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


@pytest.mark.broker
async def test_only_what_was_committed_is_read_and_markers_do_not_hang_the_end(
    installation: Settings,
) -> None:
    name = installation.topics.of(topics.LEDGER)
    async with transactional(installation) as producer:
        for value, committed in ((b"1", True), (b"2", False), (None, True), (b"4", False)):
            await producer.begin_transaction()
            await producer.send_and_wait(name, value=value, key=b"t-000001", partition=3)
            if committed:
                await producer.commit_transaction()
            else:
                await producer.abort_transaction()
    assert await values_of(installation, topics.LEDGER) == [b"1", None]


@pytest.mark.broker
async def test_what_is_still_open_is_not_waited_for(installation: Settings) -> None:
    name = installation.topics.of(topics.LEDGER)
    async with transactional(installation) as producer:
        async with producer.transaction():
            await producer.send_and_wait(name, value=b"1", key=b"t-000001", partition=3)
        await producer.begin_transaction()
        await producer.send_and_wait(name, value=b"2", key=b"t-000001", partition=3)
        assert await values_of(installation, topics.LEDGER) == [b"1"]
        await producer.abort_transaction()


async def written(settings: Settings) -> Counter[tuple[Any, ...]]:
    names = {settings.topics.of(topic): topic for topic in USAGE}
    async with asyncio.timeout(WITHIN_S):
        return Counter(
            [
                (names[record.topic], record.partition, record.key, record.value, record.headers)
                async for record in read_to_end(settings, list(names))
            ]
        )


def planned(settings: Settings, plan: Plan) -> Counter[tuple[Any, ...]]:
    return Counter(
        (one.topic, partition_of(one, settings.partitions), one.key, one.value, one.headers)
        for one in events(plan, NOW)
    )


PLAN = Plan(
    events=2_000,
    tenants=50,
    rate=0,
    duplicates_ppm=50_000,
    conflicts_ppm=20_000,
    malformed_ppm=100_000,
    wrong_partition_ppm=50_000,
)


@pytest.mark.broker
async def test_a_load_is_written_record_for_record(installation: Settings) -> None:
    produced = await load.produce(installation, PLAN, start=NOW)
    assert produced.sent == PLAN.events
    assert await written(installation) == planned(installation, PLAN)


@pytest.mark.broker
async def test_a_preloaded_topic_holds_what_the_load_would_have_written(
    installation: Settings,
) -> None:
    plan = replace(PLAN, events=30_000)  # more than one batch holds
    assert await load.preload(installation, events(plan, NOW), NOW) == plan.events
    assert await written(installation) == planned(installation, plan)


@pytest.mark.broker
async def test_a_load_keeps_its_rate_and_stops_when_told(installation: Settings) -> None:
    stop = asyncio.Event()
    plan = replace(PLAN, rate=200, events=1_000_000)

    def stop_at(produced: load.Produced) -> None:
        if produced.sent > 300:
            stop.set()

    began = monotonic()
    produced = await load.produce(installation, plan, start=NOW, on_progress=stop_at, stop=stop)
    assert monotonic() - began >= 300 / 200
    assert produced.sent < 1_000
    assert sum((await written(installation)).values()) == produced.sent


@pytest.mark.broker
async def test_opening_says_who_has_no_answer(
    installation: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "ANSWER_WITHIN_S", 1)
    with pytest.raises(TimeoutError, match=r"6 commands .* t-000001 .* is a worker running"):
        await load.open_tenants(installation, Plan(tenants=3))


# -- payments ---------------------------------------------------------------------------------


def a_request(number: int) -> RechargeRequest:
    return RechargeRequest(
        recharge_id=f"r-{number}",
        tenant_id=load.tenant_id(number),
        epoch=1,
        attempt=1,
        amount="200",
        amount_minor=20_000,
        exponent=2,
        currency="USD",
        balance="0",
        available="0",
        exposure="0",
        reason=Reason.BELOW_TRIGGER,
        requested_at=NOW,
        expires_at=NOW + timedelta(minutes=15),
        policy_version=1,
        caused_by="test/1",
    )


async def ask(settings: Settings, *numbers: int) -> None:
    producer = await started_producer(settings)
    try:
        for number in numbers:
            await producer.send_and_wait(
                settings.topics.of(topics.REQUESTED),
                key=load.tenant_id(number).encode(),
                value=msgspec.json.encode(a_request(number)),
            )
    finally:
        await producer.stop()


async def results_of(settings: Settings) -> list[RechargeResult]:
    results = []
    async with asyncio.timeout(WITHIN_S):
        async for record in read_to_end(settings, [settings.topics.of(topics.RESULT)]):
            result = msgspec.json.decode(record.value, type=RechargeResult)
            assert record.key == (result.tenant_id or "").encode()
            results.append(result)
    return results


async def simulate(settings: Settings, behaviour: Behaviour, *, requests: int) -> Simulator:
    """Run a simulator until it has answered so many requests, then stop it in order."""
    simulator = Simulator(settings, behaviour)
    stop = asyncio.Event()
    running = asyncio.create_task(simulator.run(stop))
    async with asyncio.timeout(WITHIN_S):
        while simulator.requests < requests and not running.done():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        stop.set()
        await running
    return simulator


@pytest.mark.broker
async def test_every_request_is_answered_under_its_tenant(installation: Settings) -> None:
    await ask(installation, *range(1, 31))
    behaviour = Behaviour(decline=30, duplicate=0, reorder=0, delay_ms=20)
    await simulate(installation, behaviour, requests=30)
    results = await results_of(installation)
    assert {(one.recharge_id, one.tenant_id) for one in results} == {
        (f"r-{number}", load.tenant_id(number)) for number in range(1, 31)
    }
    assert len(results) == 30
    assert {one.status for one in results} == {Status.SUCCEEDED, Status.DECLINED}


@pytest.mark.broker
async def test_a_simulator_that_comes_back_goes_on_where_it_stopped(
    installation: Settings,
) -> None:
    behaviour = Behaviour(decline=0, duplicate=0, reorder=0, delay_ms=0)
    await ask(installation, 1, 2)
    await simulate(installation, behaviour, requests=2)
    await ask(installation, 3)
    second = await simulate(installation, behaviour, requests=1)
    assert second.requests == 1
    assert Counter(one.recharge_id for one in await results_of(installation)) == {
        "r-1": 1,
        "r-2": 1,
        "r-3": 1,
    }


@pytest.mark.broker
async def test_a_request_published_again_is_answered_with_the_same_payment(
    installation: Settings,
) -> None:
    behaviour = Behaviour(decline=0, duplicate=0, reorder=0, delay_ms=0)
    await ask(installation, 7, 7)
    await simulate(installation, behaviour, requests=2)
    results = await results_of(installation)
    assert len(results) == 2
    assert len({(one.result_id, one.payment_id) for one in results}) == 1


def test_producers_can_be_made_to_compress_at_level_1(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = "aiokafka.record._crecords.default_records.lz4_encode"
    values = [b"%d" % (number * number) for number in range(2_000)]

    def built() -> bytes:
        batch = DefaultRecordBatchBuilder(2, 3, 0, -1, -1, 0, 100_000)
        for offset, value in enumerate(values):
            assert batch.append(offset, 1, key=b"k", value=value, headers=[]) is not None
        return bytes(batch.build())

    monkeypatch.setattr(compiled, lz4_encode)
    thorough = built()
    compress_fast()
    assert len(built()) > len(thorough)
