"""Any bytes on any input topic: booked, a dead letter byte for byte, or a counted repeat."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from schemas import topics
from streams import provision
from streams.engine.kafka import connection
from streams.engine.record_batch import RecordBatch, header, varint
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.auditor.reading import verify
from streams.testbed.auditor.records import home
from streams.testbed.auditor.verdict import UNKNOWN
from streams.testbed.auditor.view import Options
from streams.testbed.kafka import read_to_end
from streams.testbed.load import SOURCE, VARIETIES, Plan, tenant_id
from tests.broker.harness import Worker, audited, drained, until

pytestmark = pytest.mark.broker

Workers = Callable[..., Worker]
TENANT = tenant_id(1)
KEY = TENANT.encode()


async def writing(settings: Settings) -> AIOKafkaProducer:
    producer = AIOKafkaProducer(**connection(settings), max_request_size=8 << 20)
    await producer.start()
    return producer


def an_event(name: str, now: datetime, **changes: Any) -> dict[str, Any]:
    return {
        "event_id": name,
        "source": SOURCE,
        "tenant_id": TENANT,
        "kind": "international",
        "call_id": "c",
        "callee": "+442079460018",
        "started_at": (now - timedelta(minutes=10)).isoformat(),
        "duration_s": 60,
    } | changes


async def letters(settings: Settings, topic: str) -> list[Any]:
    name = settings.topics.of(topics.dead_letters_of(topic))
    return [record async for record in read_to_end(settings, [name])]


async def entry_ids(settings: Settings) -> list[str]:
    return [
        json.loads(record.value)["caused_by"]["id"]
        async for record in read_to_end(settings, [settings.topics.of(topics.LEDGER)])
    ]


async def test_every_variety_of_nonsense_has_its_fate_and_its_neighbours_are_booked(
    installation: Settings, workers: Workers
) -> None:
    worker = workers().start()
    await worker.ready()
    now = datetime.now(UTC)
    await load.open_tenants(installation, Plan(tenants=1), now=now)
    own = home(KEY, installation.partitions)
    name = installation.topics.of(topics.CALL_USAGE)
    producer = await writing(installation)
    sent: list[tuple[bytes | None, bytes | None, str | None]] = []
    try:
        for number, variety in enumerate(VARIETIES):
            key, value = variety.make(an_event(f"odd-{number}", now), KEY)
            await producer.send_and_wait(name, value, key=key, partition=own)
            sent.append((key, value, None if variety.reason is None else variety.reason.value))
            good = json.dumps(an_event(f"good-{number}", now)).encode()
            await producer.send_and_wait(name, good, key=KEY, partition=own)
    finally:
        await producer.stop()
    await drained(installation)
    found = [
        (record.key, record.value, dict(record.headers)["credits-dlq-reason"].decode())
        for record in await letters(installation, topics.CALL_USAGE)
    ]
    assert sorted(found, key=repr) == sorted((one for one in sent if one[2] is not None), key=repr)
    ids = await entry_ids(installation)
    assert {f"good-{number}" for number in range(len(VARIETIES))} <= set(ids)
    assert (
        'credits_unknown_fields_total{topic="telephony.call.usage.v1"} 1.0'
        in worker.probe("/metrics")[1]
    )
    assert worker.process is not None
    assert worker.process.poll() is None
    await audited(installation)
    assert "442079460018" not in worker.log


async def test_a_flood_of_poison_is_dead_letters_and_good_records_are_booked_meanwhile(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    worker = workers().start()
    await worker.ready()
    now = datetime.now(UTC)
    plan = Plan(tenants=40, events=800, rate=400)
    await load.open_tenants(installation, plan, now=now)
    name = installation.topics.of(topics.CALL_USAGE)
    poison = [b'{"event_id": %d, \xff' % number for number in range(10_000)]

    async def flood() -> None:
        producer = await writing(installation)
        try:
            for number, value in enumerate(poison):
                await producer.send(name, value, key=tenant_id(number % 40 + 1).encode())
            await producer.flush()
        finally:
            await producer.stop()

    produced, _ = await asyncio.gather(load.produce(installation, plan, start=now), flood())
    load.write_expectation(tmp_path / "e.json", plan, now, produced)
    await drained(installation)
    await audited(installation, tmp_path / "e.json")
    found = [one for one in await letters(installation, topics.CALL_USAGE) if one.value in poison]
    assert Counter(one.value for one in found) == Counter(poison)
    assert len({(one.partition, one.timestamp) for one in found}) > installation.partitions
    [*entries] = [
        record
        async for record in read_to_end(installation, [installation.topics.of(topics.LEDGER)])
    ]
    usage = [one for one in entries if json.loads(one.value)["kind"] == "charge"]
    assert min(one.timestamp for one in usage) <= max(one.timestamp for one in found)
    assert worker.reasons() == []
    assert "reopening" not in worker.log
    assert len(worker.log.splitlines()) < 100, "a line for each would fill a disk"


async def test_a_header_whose_name_is_no_text_stops_nobody(
    installation: Settings, workers: Workers
) -> None:
    worker = workers().start()
    await worker.ready()
    now = datetime.now(UTC)
    await load.open_tenants(installation, Plan(tenants=1), now=now)
    own = home(KEY, installation.partitions)
    # The client for Python cannot write such a name; others can.
    odd = varint(1) + header(varint(2) + b"\xff\xfe", b"v")
    batch = RecordBatch(int(now.timestamp() * 1000), 900_000)
    for value in (json.dumps(an_event("e-1", now)).encode(), b"{"):
        assert batch.add(KEY, value, odd)
    assert batch.add(KEY, json.dumps(an_event("e-2", now)).encode())
    producer = AIOKafkaProducer(**connection(installation), transactional_id="platform")
    await producer.start()
    try:
        async with producer.transaction():
            name = installation.topics.of(topics.CALL_USAGE)
            await (await producer.send_batch(batch, name, partition=own))
    finally:
        await producer.stop()

    async def booked() -> bool:
        return set(await entry_ids(installation)) >= {"e-1", "e-2"}

    await until(booked, 30)
    [letter] = await letters(installation, topics.CALL_USAGE)
    assert letter.value == b"{"
    assert dict(letter.headers)["\\xff\\xfe"] == b"v"
    assert worker.process is not None
    assert worker.process.poll() is None
    # The auditor's client cannot read it; what could not be read is never a pass.
    report = await verify(installation, Options())
    assert report.exit_code == UNKNOWN
    [reason] = report.findings["at_least_once"].unknown
    assert "a header whose name is not UTF-8" in reason


@pytest.mark.parametrize("topic", [topics.COMMAND, topics.RESULT])
async def test_nonsense_on_commands_and_results_is_a_dead_letter(
    installation: Settings, workers: Workers, topic: str
) -> None:
    await workers().start().ready()
    own = home(KEY, installation.partitions)
    elsewhere = (own + 1) % installation.partitions
    command = {"command": "close_tenant", "command_id": "c", "issued_at": "2026-03-02T10:00:00Z"}
    producer = await writing(installation)
    name = installation.topics.of(topic)
    try:
        for value in (b"", b"{", b"[]", b'{"command":"dance"}', b"\xff" * 9, None):
            await producer.send_and_wait(name, value, key=KEY, partition=own)
        # A command on a wrong partition is never moved: whoever wrote it must write it again.
        await producer.send_and_wait(
            name, json.dumps(command).encode(), key=KEY, partition=elsewhere
        )
    finally:
        await producer.stop()
    await drained(installation)
    reasons = [
        dict(record.headers)["credits-dlq-reason"].decode()
        for record in await letters(installation, topic)
    ]
    assert reasons.count("malformed_json") == 4
    assert len(reasons) == 7
    assert ("wrong_partition" in reasons) is (topic == topics.COMMAND)


async def largest_accepted(producer: AIOKafkaProducer, name: str, partition: int) -> int:
    """The size of the largest value that the topic takes from this producer; all are written."""

    async def accepted(size: int) -> bool:
        try:
            await producer.send_and_wait(name, b"x" * size, key=KEY, partition=partition)
        except KafkaError:
            return False
        return True

    low, high = topics.MAX_RECORD_BYTES - 400, topics.MAX_RECORD_BYTES
    assert await accepted(low)
    while high - low > 1:
        middle = (low + high) // 2
        if await accepted(middle):
            low = middle
        else:
            high = middle
    return low


async def test_a_record_at_the_topics_exact_limit_fits_the_dead_letters(
    installation: Settings, workers: Workers
) -> None:
    await workers().start().ready()
    own = home(KEY, installation.partitions)
    name = installation.topics.of(topics.CALL_USAGE)
    producer = await writing(installation)
    try:
        size = await largest_accepted(producer, name, own)
        # On a wrong partition it cannot be moved: with one more header it fits its topic no more.
        strayed = (own + 1) % installation.partitions
        await producer.send_and_wait(name, b"x" * size, key=KEY, partition=strayed)
    finally:
        await producer.stop()
    await drained(installation)
    largest = [
        dict(record.headers)["credits-dlq-reason"].decode()
        for record in await letters(installation, topics.CALL_USAGE)
        if record.value == b"x" * size
    ]
    assert sorted(largest) == ["malformed_json", "wrong_partition"]


async def test_dead_letters_are_booked_once_after_their_cause_is_gone(
    installation: Settings, workers: Workers
) -> None:
    await workers().start().ready()
    now = datetime.now(UTC)
    producer = await writing(installation)
    name = installation.topics.of(topics.CALL_USAGE)
    try:
        value = json.dumps(an_event("early", now)).encode()
        await producer.send_and_wait(name, value, key=KEY)
        await drained(installation)
        [letter] = await letters(installation, topics.CALL_USAGE)
        assert dict(letter.headers)["credits-dlq-reason"] == b"unknown_tenant"
        await load.open_tenants(installation, Plan(tenants=1), now=now)
        for _ in range(2):
            await producer.send_and_wait(
                name, value, key=KEY, headers=[("credits-dlq-attempt", b"2")]
            )
    finally:
        await producer.stop()
    await drained(installation)
    assert (await entry_ids(installation)).count("early") == 1
    await audited(installation)


async def test_a_worker_without_topics_or_broker_says_so_in_one_line(
    settings: Settings, tmp_path: Any
) -> None:
    lost = Worker(settings, tmp_path, "no-topics").start()
    assert await lost.ended() == 2
    assert "credits topics apply" in lost.log
    assert len(lost.log.strip().splitlines()) == 1

    import msgspec

    away = msgspec.structs.replace(settings, broker="127.0.0.1:1")
    alone = Worker(away, tmp_path, "no-broker").start()
    assert await alone.ended() == 69
    assert alone.log.startswith("No broker at 127.0.0.1:1.")
    assert len(alone.log.strip().splitlines()) == 1

    await provision.apply(settings)
    other = msgspec.structs.replace(settings, partitions=settings.partitions + 1)
    wrong = Worker(other, tmp_path, "wrong-count").start()
    assert await wrong.ended() == 2
    assert "not_copartitioned" in wrong.log
