"""Whatever dies when: the books hold. Real workers, a real broker, the independent auditor."""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete

from schemas import topics
from streams import provision
from streams.engine.kafka import connection
from streams.engine.rows import POSITION_KEY
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.auditor.reading import verify
from streams.testbed.auditor.records import home
from streams.testbed.auditor.view import Options
from streams.testbed.broker import Cluster
from streams.testbed.kafka import read_to_end
from streams.testbed.load import Plan, Produced
from tests.broker.harness import (
    Worker,
    a_transaction,
    audited,
    drained,
    positions,
    unbooked,
    until,
)
from tests.broker.mutant import LEFT_OF_SEQUENCES

pytestmark = pytest.mark.broker

Workers = Callable[..., Worker]
# More events than any test waits for; the load is stopped when enough was seen.
ENDLESS = 10_000_000


def a_plan(events: int = 6_000, *, rate: int = 0, seed: int = 1, tenants: int = 60) -> Plan:
    return Plan(tenants=tenants, events=events, rate=rate, seed=seed, conflicts_ppm=2_000)


async def opened(settings: Settings, plan: Plan) -> datetime:
    start = datetime.now(UTC)
    await load.open_tenants(settings, plan, now=start)
    return start


async def loaded(settings: Settings, plan: Plan, start: datetime, path: Path) -> Produced:
    produced = await load.produce(settings, plan, start=start)
    load.write_expectation(path, plan, start, produced)
    return produced


class Ongoing:
    """A load that goes on until the test has seen what it waits for: no test may need luck."""

    def __init__(self, settings: Settings, plan: Plan, start: datetime, path: Path) -> None:
        self._plan, self._start, self._path = plan, start, path
        self._stop = asyncio.Event()
        self._writing = asyncio.ensure_future(
            load.produce(settings, plan, start=start, stop=self._stop)
        )

    async def ended(self) -> Produced:
        """Stop writing; what was written stands beside the test for the auditor."""
        self._stop.set()
        produced = await self._writing
        load.write_expectation(self._path, self._plan, self._start, produced)
        return produced


async def test_a_sigkill_mid_batch_loses_and_doubles_nothing(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(ENDLESS, rate=500)
    worker = workers().start()
    await worker.ready()
    start = await opened(installation, plan)
    writing = Ongoing(installation, plan, start, tmp_path / "e.json")
    for kill in range(3):
        before = await unbooked_total(installation)
        await until(partial(passed, installation, before), 60)
        worker.kill()
        worker = workers(f"after-kill-{kill}").start()
        await worker.ready()
    await writing.ended()
    await drained(installation)
    report = await audited(installation, tmp_path / "e.json")
    assert report.counts["distinct_ids"] > 1_000


async def test_a_rolling_upgrade_goes_forward_and_an_older_program_keeps_its_hands_off(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(ENDLESS, rate=500)
    older = workers("older").start()
    await older.ready()
    start = await opened(installation, plan)
    writing = Ongoing(installation, plan, start, tmp_path / "e.json")
    newer = await mutated(workers, "newer_rows", "newer")
    before = await unbooked_total(installation)
    await until(lambda: passed(installation, before + 900), 60)
    # It dies half-way through the upgrade: the older one gets rows that it must not read.
    newer.kill()
    await until(partial(has_logged, older, "newer_rows"), 60, lambda: older.log[-3_000:])
    await mutated(workers, "newer_rows", "newer-again")
    older.signal(signal.SIGTERM)
    await older.ended()
    await writing.ended()
    await drained(installation)
    await audited(installation, tmp_path / "e.json")


async def unbooked_total(settings: Settings) -> int:
    return sum(
        source.next
        for position in (await positions(settings)).values()
        for source in position.sources.values()
    )


async def passed(settings: Settings, before: int) -> bool:
    return await unbooked_total(settings) > before + 100


def has_logged(worker: Worker, word: str) -> bool:
    return word in worker.log


async def test_a_sigkill_during_restore_only_costs_time(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(8_000)
    worker = workers().start()
    await worker.ready()
    start = await opened(installation, plan)
    await loaded(installation, plan, start, tmp_path / "e.json")
    await drained(installation)
    worker.kill()
    for kill in range(3):
        restoring = workers(f"restoring-{kill}").start()
        await until(partial(has_logged, restoring, "assigned"), 60)
        restoring.kill()
    last = workers("last").start()
    await last.ready()
    await audited(installation, tmp_path / "e.json")


async def test_a_zombie_is_fenced_and_books_nothing_more(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(ENDLESS, rate=500)
    frozen = workers("frozen").start()
    await frozen.ready()
    start = await opened(installation, plan)
    writing = Ongoing(installation, plan, start, tmp_path / "e.json")
    await until(lambda: passed(installation, 500), 60)
    frozen.signal(signal.SIGSTOP)
    other = workers("other").start()
    await other.ready(90)
    at_takeover = await unbooked_total(installation)
    await until(lambda: passed(installation, at_takeover), 60)
    frozen.signal(signal.SIGCONT)
    await until(
        lambda: "fenced" in frozen.log or "assigned" in frozen.log.rpartition("shard_open")[2],
        60,
        lambda: frozen.log[-3_000:],
    )
    await writing.ended()
    await drained(installation)
    await audited(installation, tmp_path / "e.json")


async def members(settings: Settings) -> int:
    """How many workers the group has, as its coordinator sees it."""
    admin = await admin_of(settings)
    try:
        [answer] = await admin.describe_consumer_groups([settings.app_id])
        [group] = answer.to_object()["groups"]
        return len(group["members"])
    finally:
        await admin.close()


async def has_members(settings: Settings, count: int) -> bool:
    return await members(settings) == count


async def test_workers_frozen_one_by_one_and_thawed_in_another_order_book_everything_once(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(ENDLESS, rate=500)
    first, second, third = (workers(name).start() for name in ("first", "second", "third"))
    for worker in (first, second, third):
        await worker.ready()
    start = await opened(installation, plan)
    writing = Ongoing(installation, plan, start, tmp_path / "e.json")
    await until(lambda: passed(installation, 500), 60)
    # Each before the others have taken over from the one before it, and so long that the group
    # has none of them any more.
    for worker in (first, second, third):
        worker.signal(signal.SIGSTOP)
    await until(lambda: has_members(installation, 0), 60)
    await writing.ended()
    for worker in (second, third, first):
        worker.signal(signal.SIGCONT)
    for worker in (first, second, third):
        await worker.ready(90)
    await drained(installation)
    await audited(installation, tmp_path / "e.json")
    for worker in (first, second, third):
        assert worker.process is not None
        assert worker.process.poll() is None, worker.log[-3_000:]


async def test_workers_join_and_leave_under_load(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(ENDLESS, rate=500)
    first = workers("first").start()
    await first.ready()
    start = await opened(installation, plan)
    writing = Ongoing(installation, plan, start, tmp_path / "e.json")
    second = workers("second").start()
    third = workers("third").start()
    await second.ready()
    await third.ready()
    assert await first.stop() == 0, first.log[-3_000:]
    await second.ready()
    assert await third.stop() == 0, third.log[-3_000:]
    await writing.ended()
    await drained(installation)
    await audited(installation, tmp_path / "e.json")
    assert await second.stop() == 0


async def test_sigterm_ends_in_order_and_nothing_is_booked_again(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(ENDLESS, rate=500)
    worker = workers().start()
    await worker.ready()
    start = await opened(installation, plan)
    writing = Ongoing(installation, plan, start, tmp_path / "e.json")
    await until(lambda: passed(installation, 500), 60)
    worker.signal(signal.SIGTERM)
    worker.signal(signal.SIGTERM)
    assert await worker.ended(10) == 0, worker.log[-3_000:]
    await writing.ended()
    await workers("next").start().ready()
    await drained(installation)
    await audited(installation, tmp_path / "e.json")


@pytest.mark.parametrize("how", ["kill", "freeze"])
async def test_a_broker_that_goes_away_and_comes_back(
    own_broker: tuple[Cluster, Settings], tmp_path: Path, how: str
) -> None:
    cluster, settings = own_broker
    plan = a_plan(6_000, rate=1_000)
    worker = Worker(settings, tmp_path).start()
    try:
        await worker.ready()
        start = await opened(settings, plan)
        await loaded(settings, plan, start, tmp_path / "e.json")
        before = await unbooked(settings)
        if how == "kill":
            await asyncio.to_thread(cluster.kill)
            await until(lambda: "the broker is away" in worker.reasons(), 60)
            assert worker.process is not None
            assert worker.process.poll() is None, "a waiting worker must not be restarted"
            await asyncio.to_thread(cluster.restart)
        else:
            await asyncio.to_thread(cluster.freeze)
            await until(lambda: "the broker is away" in worker.reasons(), 60)
            await asyncio.to_thread(cluster.thaw)
        if worker.process is None or worker.process.poll() is not None:
            worker.start()
        await worker.ready(120)
        await drained(settings)
        await audited(settings, tmp_path / "e.json")
        assert before >= 0
    finally:
        worker.kill()


# -- things that must stop a shard ----------------------------------------------------------------


async def booked_and_stopped(settings: Settings, workers: Workers, tmp_path: Path) -> None:
    plan = a_plan(2_000)
    worker = workers().start()
    await worker.ready()
    start = await opened(settings, plan)
    await loaded(settings, plan, start, tmp_path / "e.json")
    await drained(settings)
    assert await worker.stop() == 0


async def admin_of(settings: Settings) -> AIOKafkaAdminClient:
    admin = AIOKafkaAdminClient(**connection(settings))
    await admin.start()
    return admin


async def test_source_records_deleted_unread_stop_the_shard_until_an_operator_accepts(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    await booked_and_stopped(installation, workers, tmp_path)
    name = installation.topics.of(topics.CALL_USAGE)
    reached = (await positions(installation))[0].sources[name].next
    start = datetime.now(UTC)
    await load.produce(installation, a_plan(2_000, seed=2), start=start)
    admin = await admin_of(installation)
    try:
        tp = TopicPartition(name, 0)
        await admin.delete_records({tp: RecordsToDelete(before_offset=reached + 5)})
    finally:
        await admin.close()
    worker = workers("stopped").start()
    await until(
        lambda: any("source_truncated" in reason for reason in worker.reasons()),
        60,
        lambda: worker.log[-2_000:],
    )
    status, metrics = worker.probe("/metrics")
    assert status == 200
    assert 'credits_shard_stopped{reason="source_truncated"} 1.0' in metrics
    worker.kill()
    accepted = workers("accepted").start("--accept-source-loss", f"{name}:0:{reached + 5}")
    await accepted.ready()
    await drained(installation)


async def test_a_source_topic_made_anew_stops_the_shard(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    await booked_and_stopped(installation, workers, tmp_path)
    name = installation.topics.of(topics.CONFERENCE_USAGE)
    admin = await admin_of(installation)
    try:
        await admin.delete_topics([name])
        await until(lambda: gone(admin, name), 30)
        await admin.create_topics(
            [NewTopic(name, num_partitions=installation.partitions, replication_factor=1)]
        )
    finally:
        await admin.close()
    worker = workers("stopped").start()
    await until(
        lambda: any("source_lost" in reason for reason in worker.reasons()),
        60,
        lambda: worker.log[-2_000:],
    )


async def gone(admin: AIOKafkaAdminClient, name: str) -> bool:
    return name not in await admin.list_topics()


async def changelog_row(
    settings: Settings, partition: int, key: bytes, value: bytes | None
) -> None:
    producer = AIOKafkaProducer(**connection(settings))
    await producer.start()
    try:
        await producer.send_and_wait(
            settings.topics.of(topics.CHANGELOG), key=key, value=value, partition=partition
        )
    finally:
        await producer.stop()


@pytest.mark.parametrize(
    "damage", ["a row altered", "a row gone", "no position row", "no ids", "the first ids gone"]
)
async def test_a_damaged_changelog_stops_the_shard(
    installation: Settings, workers: Workers, tmp_path: Path, damage: str
) -> None:
    await booked_and_stopped(installation, workers, tmp_path)
    partition, tenant = next(
        (number, number_tenant)
        for number_tenant in (load.tenant_id(n) for n in range(1, 61))
        for number in [home(number_tenant.encode(), installation.partitions)]
    )
    if damage == "a row altered":
        await changelog_row(installation, partition, tenant.encode(), b"\xff" * 8 + b"\x90")
    elif damage == "a row gone":
        await changelog_row(installation, partition, tenant.encode(), None)
    elif damage == "no position row":
        await changelog_row(installation, partition, POSITION_KEY, None)
    else:
        admin = await admin_of(installation)
        try:
            tp = TopicPartition(installation.topics.of(topics.SEEN), partition)
            # They are minutes old, so nothing but a loss has them gone. -1: all of them.
            before = -1 if damage == "no ids" else 1
            await admin.delete_records({tp: RecordsToDelete(before_offset=before)})
        finally:
            await admin.close()
    worker = workers("stopped").start()
    await until(
        lambda: any("state_lost" in reason for reason in worker.reasons()),
        60,
        lambda: worker.log[-2_000:],
    )
    assert worker.probe("/livez")[0] == 200, "a restart would not help"


async def test_an_older_copy_of_table_and_ids_stops_the_shard(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    """What an operator may do who restores a backup: it is sound in itself, but more was booked."""
    await booked_and_stopped(installation, workers, tmp_path)
    names = [installation.topics.of(topic) for topic in (topics.CHANGELOG, topics.SEEN)]
    copy = [record async for record in read_to_end(installation, names)]
    worker = workers("later").start()
    await worker.ready()
    await load.produce(installation, a_plan(500, seed=2), start=datetime.now(UTC))
    await drained(installation)
    assert await worker.stop() == 0
    admin = await admin_of(installation)
    try:
        await admin.delete_topics(names)
        for name in names:
            await until(partial(gone, admin, name), 30)
    finally:
        await admin.close()
    await provision.apply(installation)
    producer = AIOKafkaProducer(**connection(installation))
    await producer.start()
    try:
        for one in copy:
            await producer.send(one.topic, one.value, key=one.key, partition=one.partition)
        await producer.flush()
    finally:
        await producer.stop()
    worker = workers("stopped").start()
    await until(
        lambda: all(
            any(f"partition {number} state_lost" in reason for reason in worker.reasons())
            for number in range(installation.partitions)
        ),
        60,
        lambda: worker.log[-2_000:],
    )
    assert "is older than the ledger" in "".join(worker.reasons())


async def test_an_aborted_source_transaction_is_not_booked(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(500, tenants=10)
    worker = workers().start()
    await worker.ready()
    start = await opened(installation, plan)
    producer = AIOKafkaProducer(
        **connection(installation), transactional_id=f"{installation.namespace}a-producer"
    )
    await producer.start()
    event = {
        "event_id": "never-happened",
        "source": "a-platform",
        "kind": "international",
        "call_id": "c",
        "callee": "+442079460018",
        "started_at": (start - timedelta(hours=1)).isoformat(),
        "duration_s": 600,
    }
    key = load.tenant_id(1).encode()
    name = installation.topics.of(topics.CALL_USAGE)
    try:
        await producer.begin_transaction()
        await producer.send_and_wait(name, json.dumps(event).encode(), key=key)
        await producer.abort_transaction()
        await producer.begin_transaction()
        kept = json.dumps({**event, "event_id": "happened"}).encode()
        await producer.send_and_wait(name, kept, key=key)
        await producer.commit_transaction()
    finally:
        await producer.stop()
    await loaded(installation, plan, start, tmp_path / "e.json")
    await drained(installation)
    await audited(installation)
    entries = [
        json.loads(record.value)["caused_by"]["id"]
        async for record in auditor_read(installation, topics.LEDGER)
    ]
    assert entries.count("happened") == 1
    assert "never-happened" not in entries


async def test_an_open_transaction_of_commands_does_not_hold_back_usage(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    """A partition that is opened books the commands that wait before any usage; one that nobody
    may read yet is not waited for."""
    plan = a_plan(500, tenants=10)
    worker = workers().start()
    await worker.ready()
    start = await opened(installation, plan)
    await drained(installation)
    worker.kill()
    await loaded(installation, plan, start, tmp_path / "e.json")
    usage = await unbooked(installation)
    key = load.tenant_id(1).encode()
    name = installation.topics.of(topics.COMMAND)
    command = {
        "command": "licences",
        "command_id": "late",
        "issued_at": start.isoformat(),
        "capability": "MCOMEETADV",
        "count": 1,
    }
    async with a_transaction(installation, "a-console") as producer:
        await producer.send_and_wait(name, json.dumps(command).encode(), key=key)
        assert await unbooked(installation) == usage, "an open transaction hides what it wrote"
        again = workers("again").start()
        await drained(installation)
        assert again.probe("/readyz")[0] == 200
        await producer.commit_transaction()
    await drained(installation)
    await audited(installation, tmp_path / "e.json")


def auditor_read(settings: Settings, topic: str):  # type: ignore[no-untyped-def]
    return read_to_end(settings, [settings.topics.of(topic)])


# -- mutants: each protection, taken out, must be missed -------------------------------------------


async def broken(settings: Settings) -> set[str]:
    """The invariants that the auditor finds violated."""
    report = await verify(settings, Options())
    return {name for name, finding in report.findings.items() if finding.violations}


async def mutated(workers: Workers, mutant: str, name: str = "mutant", **more: str) -> Worker:
    worker = workers(name, module="tests.broker.mutant").start(MUTANT=mutant, **more)
    await worker.ready()
    return worker


async def test_without_the_position_check_events_are_charged_twice(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    await booked_and_stopped(installation, workers, tmp_path)
    await mutated(workers, "position_check")
    await until(lambda: charged_twice(installation), 60)


async def charged_twice(settings: Settings) -> bool:
    return "at_most_once" in await broken(settings)


async def test_without_remembered_ids_repeats_are_charged_twice(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(3_000)
    await mutated(workers, "seen_ids")
    start = await opened(installation, plan)
    await loaded(installation, plan, start, tmp_path / "e.json")
    await drained(installation)
    assert "at_most_once" in await broken(installation)


async def test_a_worker_that_fell_out_of_its_group_is_not_ready(workers: Workers) -> None:
    silent = await mutated(workers, "silent_member", "silent")
    polls = await mutated(workers, "silent_member", "polls", MUTANT_POLLS="1")
    await until(
        lambda: any("not a member" in one for one in silent.reasons()),
        40,
        lambda: str(silent.reasons()),
    )
    await polls.ready()


async def test_offsets_committed_before_the_changelog_lose_events(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(3_000)
    worker = await mutated(workers, "offsets_first", MUTANT_DIES="1")
    start = await opened(installation, plan)
    await loaded(installation, plan, start, tmp_path / "e.json")
    await worker.ended()
    await mutated(workers, "offsets_first", "again")
    await drained(installation)
    assert "at_least_once" in await broken(installation)


async def test_a_producer_whose_sequence_numbers_come_to_their_end_goes_on(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(2_000)
    worker = await mutated(workers, "old_epoch")
    start = await opened(installation, plan)
    await loaded(installation, plan, start, tmp_path / "e.json")
    await drained(installation)
    await audited(installation, tmp_path / "e.json")
    written = Counter(
        [record.partition async for record in auditor_read(installation, topics.LEDGER)]
    )
    assert len(written) == installation.partitions
    assert min(written.values()) > LEFT_OF_SEQUENCES
    assert not has_logged(worker, "reopening"), worker.log[-3_000:]
    assert await worker.stop() == 0


async def test_a_broken_chain_loses_events(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(8_000, rate=2_000)
    await mutated(workers, "broken_chain")
    start = await opened(installation, plan)
    await loaded(installation, plan, start, tmp_path / "e.json")
    await until(lambda: lost_some(installation), 60)


async def lost_some(settings: Settings) -> bool:
    return "at_least_once" in await broken(settings)


async def test_with_the_chain_kept_lost_slices_are_read_again(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = a_plan(8_000, rate=2_000)
    worker = await mutated(workers, "broken_chain", MUTANT_KEEPS_CHAIN="1")
    start = await opened(installation, plan)
    await loaded(installation, plan, start, tmp_path / "e.json")
    await drained(installation)
    await audited(installation, tmp_path / "e.json")
    assert 'credits_slices_dropped_total{reason="gap"} 0.0' not in worker.probe("/metrics")[1]
