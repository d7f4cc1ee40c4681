"""How soon a worker is ready, and what it takes in memory: for rows, and for remembered ids."""

import asyncio
import math
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from time import monotonic, thread_time
from typing import Any, Final

import numpy as np
from aiokafka import AIOKafkaProducer
from msgspec import Struct

from schemas import topics
from streams.billing.account import Account, account_from, encode_row
from streams.billing.parts import AccountRow, Grant, LotKind, Policy
from streams.engine import identity, seen
from streams.engine.position import encode_position
from streams.engine.rows import POSITION_KEY, Totals
from streams.engine.seen import Seen
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.bench.worker import (
    POLL_S,
    READY_WITHIN_S,
    BenchError,
    Place,
    Worker,
    ms,
    running,
    say,
    tenths,
)
from streams.testbed.kafka import started_producer
from streams.testbed.load import Expected, Planned

IDS_A_RECORD: Final = 5_000
GENERATIONS: Final = 6
_LOOKED_UP: Final = 5_000
_LOOK_UPS: Final = 50
_GROWN_IN_MEMORY: Final = 2_000_000
_SENT_AT_ONCE: Final = 64


class Restore(Struct, frozen=True, kw_only=True):
    """Opening all shards on a table of that many rows: from assignment to ready."""

    rows: int
    restore_ms: int
    rows_per_s: int
    start_to_ready_ms: int
    mb_without_tenants: int
    mb_with_tenants: int
    mb_per_million_tenants: int


class Ids(Struct, frozen=True, kw_only=True):
    """Remembered ids. The restore is that of a worker with all partitions, over a log of packed
    ids in six generations; the rest is measured on one partition's set in this process. Bytes an
    id are the most that a set took at any moment while it grew."""

    ids: int
    restore_ms: int
    ids_per_s: int
    worker_mb: int
    worker_mb_at_most: int
    worker_bytes_per_id: int
    bytes_per_id_at_most: str
    look_up_ns: int
    remember_ns: int
    slowest_insert_ms: int


async def measure_restore(settings: Settings, place: Place, rows: int) -> Restore:
    """Write a table of so many tenants, start a worker, and see how soon it is ready.

    It compares row count and digest of every partition itself. Raises BenchError, also when it
    holds another number of rows.
    """
    with running(settings, place) as worker:
        await worker.until_ready()
        empty_bytes = worker.memory_bytes()
    say(f"writing {rows:,} rows")
    await _write_rows(settings, rows)
    say("restoring them")
    with running(settings, place) as worker:
        await worker.until_ready()
        full_bytes = worker.memory_bytes()
        await _holds(worker, "credits_rows", rows)
    restore_ms = max(1, ms(worker.ready - worker.assigned))
    return Restore(
        rows=rows,
        restore_ms=restore_ms,
        rows_per_s=rows * 1_000 // restore_ms,
        start_to_ready_ms=ms(worker.ready - worker.began),
        mb_without_tenants=empty_bytes // 1_000_000,
        mb_with_tenants=full_bytes // 1_000_000,
        mb_per_million_tenants=(full_bytes - empty_bytes) // max(1, rows),
    )


async def _holds(worker: Worker, name: str, count: int) -> None:
    # The gauge is set by the worker's watch, once a second.
    deadline = monotonic() + READY_WITHIN_S
    while (found := await worker.metric(name)) != count:
        if monotonic() > deadline:
            raise BenchError(f"{count} were written, but {name} is {found}")
        await asyncio.sleep(POLL_S)


def _accounts(rows: int, now: datetime) -> Iterator[Account]:
    """Tenants as they are after a first charge: paid, with auto-recharge on."""
    dice = random.Random(1)
    for number in range(1, rows + 1):
        paid = Grant(
            id="g1",
            kind=LotKind.PAID,
            priority=100,
            amount_nanos=125_000_000_000,
            left_nanos=dice.randrange(125_000_000_000),
            effective_at=now,
            expires_at=now + timedelta(days=dice.randrange(1, 365)),
            created_at=now,
        )
        yield account_from(
            AccountRow(
                tenant_id=load.tenant_id(number),
                currency="USD",
                seq=2,
                head=dice.randbytes(32),
                grants=(paid,),
                opened_at=now,
                billing_from=now,
                settings_version=1,
                policy=Policy(
                    version=1,
                    enabled=True,
                    trigger_nanos=1_000_000_000,
                    amount_nanos=50_000_000_000,
                ),
                payment_methods=("card-1",),
            )
        )


async def _write_rows(settings: Settings, rows: int) -> None:
    """A table as a worker leaves it, and position rows that vouch for it."""
    now = datetime.now(UTC)
    totals = [Totals() for _ in range(settings.partitions)]

    def records() -> Iterator[Planned]:
        for account in _accounts(rows, now):
            key, value = account.tenant_id.encode(), encode_row(account)
            row = Planned(topics.CHANGELOG, key, value, (), Expected.BOOK)
            of_partition = totals[load.partition_of(row, settings.partitions)]
            of_partition.row(key, None, value)
            of_partition.tenant(None, account)
            yield row

    await load.preload(settings, records(), now)
    producer = await started_producer(settings)
    try:
        for partition, of_partition in enumerate(totals):
            await _write_position(settings, producer, partition, of_partition, now, 0)
    finally:
        await producer.stop()


async def _write_position(
    settings: Settings,
    producer: AIOKafkaProducer,
    partition: int,
    totals: Totals,
    now: datetime,
    seen_next: int,
) -> None:
    position = totals.position(now=now, sources={}, seen_next=seen_next)
    await producer.send_and_wait(
        settings.topics.of(topics.CHANGELOG),
        encode_position(position),
        key=POSITION_KEY,
        partition=partition,
    )


async def measure_ids(settings: Settings, place: Place, count: int) -> Ids:
    """Write a log of packed ids, let a worker restore it, and compare how many it remembers.

    Raises BenchError, also when the worker remembers another number of ids.
    """
    with running(settings, place) as worker:
        await worker.until_ready()
        empty_bytes = worker.memory_bytes()
    say(f"writing {count:,} packed ids")
    await _write_ids(settings, count)
    say("restoring them")
    with running(settings, place) as worker:
        await worker.until_ready()
        full_bytes, most_bytes = worker.memory_bytes(), worker.most_memory_bytes()
        await _holds(worker, "credits_remembered_ids", count)
    restore_ms = max(1, ms(worker.ready - worker.assigned))
    bytes_per_id, remember_ns, slowest_ms, look_up_ns = _one_set(min(count, _GROWN_IN_MEMORY))
    return Ids(
        ids=count,
        restore_ms=restore_ms,
        ids_per_s=count * 1_000 // restore_ms,
        worker_mb=full_bytes // 1_000_000,
        worker_mb_at_most=most_bytes // 1_000_000,
        worker_bytes_per_id=(full_bytes - empty_bytes) // count,
        bytes_per_id_at_most=bytes_per_id,
        look_up_ns=look_up_ns,
        remember_ns=remember_ns,
        slowest_insert_ms=slowest_ms,
    )


def _packed(dice: np.random.Generator, ordinal: int, count: int, week: int) -> bytes:
    fingerprints = dice.integers(1, 2**64 - 1, size=count, dtype=np.uint64)
    return seen.pack(
        ordinal=ordinal,
        ledger_from=0,
        now_us=0,
        fingerprints=fingerprints,  # type: ignore[arg-type]
        checks=fingerprints.astype(np.uint32),  # type: ignore[arg-type]
        weeks=[week] * count,
    )


async def _write_ids(settings: Settings, count: int) -> None:
    """A log as a worker of five weeks leaves it, and position rows that vouch for it."""
    now = datetime.now(UTC)
    first_week = identity.week_of(now) - GENERATIONS + 1
    dice = np.random.default_rng(1)
    producer = await started_producer(settings, max_batch_size=900_000)
    try:
        share, rest = divmod(count, settings.partitions)
        for partition in range(settings.partitions):
            left = share + (partition < rest)
            total, ordinal, sent = left, 0, list[Any]()
            while left:
                some = min(IDS_A_RECORD, left)
                # Weeks follow one another, as time does.
                week = first_week + (total - left) * GENERATIONS // total
                value = _packed(dice, ordinal, some, week)
                sent.append(
                    await producer.send(
                        settings.topics.of(topics.SEEN), value, key=b"ids", partition=partition
                    )
                )
                left -= some
                ordinal += 1
                if len(sent) >= _SENT_AT_ONCE:
                    await asyncio.gather(*sent)
                    sent.clear()
            await asyncio.gather(*sent)
            await _write_position(settings, producer, partition, Totals(), now, ordinal)
    finally:
        await producer.stop()


def _one_set(count: int) -> tuple[str, int, int, int]:
    """Most bytes an id, mean ns to remember one, the slowest insert in ms, mean ns to look one up
    in all generations, in batches of 5,000 of which one in a hundred is known."""
    dice = np.random.default_rng(2)
    week = identity.week_of(datetime.now(UTC))
    one = Seen()
    most_bytes, slowest_s, spent_s = 0.0, 0.0, 0.0
    known: list[int] = []
    for ordinal in range(count // IDS_A_RECORD):
        generation = week - ordinal * GENERATIONS // (count // IDS_A_RECORD)
        ids = seen.unpack(_packed(dice, ordinal, IDS_A_RECORD, generation))
        known += ids.fingerprints[: _LOOKED_UP // 100].tolist()
        began = thread_time()
        one.remember(ids)
        took_s = thread_time() - began
        slowest_s, spent_s = max(slowest_s, took_s), spent_s + took_s
        if len(one) > count // 10:
            most_bytes = max(most_bytes, one.size_bytes / len(one))
    looked_s = 0.0
    for at in range(_LOOK_UPS):
        some = known[at * 50 % (len(known) - 49) :][:50]
        strangers = dice.integers(1, 2**64 - 1, size=_LOOKED_UP - len(some), dtype=np.uint64)
        wanted = some + strangers.tolist()
        began = thread_time()
        found = one.probe(wanted)
        looked_s += thread_time() - began
        if len(found) != len(some):
            raise BenchError("a remembered id was not found again")
    return (
        tenths(math.ceil(most_bytes * 10)),
        round(spent_s / len(one) * 1e9),
        ms(slowest_s),
        round(looked_s / (_LOOK_UPS * _LOOKED_UP) * 1e9),
    )
