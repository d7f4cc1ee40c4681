"""Reading an installation: its topics and how far they go, and the audit of what was read."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from schemas import topics
from streams.consumer import Consumer
from streams.settings import Settings
from streams.testbed.auditor.audit import audit
from streams.testbed.auditor.minutes import Coverage
from streams.testbed.auditor.prices import decks_of, load_deck
from streams.testbed.auditor.records import Log, Record
from streams.testbed.auditor.verdict import INVARIANTS, Report
from streams.testbed.auditor.view import Options


class _UnreadableError(Exception):
    """A record that the client cannot take apart."""


class _Reader:
    """Two consumers: one read_committed for records, one for the log's true end."""

    def __init__(self, settings: Settings) -> None:
        security: dict[str, Any] = {}
        if not settings.plaintext:
            import ssl

            security = {
                "security_protocol": "SSL",
                "ssl_context": ssl.create_default_context(
                    cafile=str(settings.broker_ca_file) if settings.broker_ca_file else None
                ),
            }
        common: dict[str, Any] = {
            "bootstrap_servers": settings.broker,
            "group_id": None,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",
            "max_partition_fetch_bytes": 8 << 20,
            **security,
        }
        self.committed = Consumer(isolation_level="read_committed", **common)
        self.uncommitted = Consumer(isolation_level="read_uncommitted", **common)

    async def start(self) -> None:
        await self.committed.start()
        await self.uncommitted.start()

    async def stop(self) -> None:
        await self.committed.stop()
        await self.uncommitted.stop()

    async def settled(
        self, ends: Mapping[TopicPartition, int], sources: Iterable[str], deadline: float
    ) -> dict[TopicPartition, int]:
        """How far committed records go once they go past `ends`, or as far as they go at the
        deadline. The topics of `sources` are asked last: what an output answers is there."""
        while True:
            stable: dict[TopicPartition, int] = {}
            for late in (False, True):
                tps = [tp for tp in ends if (tp.topic in sources) is late]
                stable |= await self.committed.end_offsets(tps)
            if monotonic() > deadline or all(stable[tp] >= end for tp, end in ends.items()):
                return stable
            await asyncio.sleep(0.1)

    async def records(
        self, bounds: dict[TopicPartition, tuple[int, int]], deadline: float
    ) -> AsyncIterator[Record]:
        """Every committed record between the bounds. Raises TimeoutError, _UnreadableError."""
        waiting = {tp for tp, (start, end) in bounds.items() if start < end}
        if not waiting:
            return
        consumer = self.committed
        consumer.assign(list(waiting))
        for tp in waiting:
            consumer.seek(tp, bounds[tp][0])
        while waiting:
            if monotonic() > deadline:
                raise TimeoutError(f"{len(waiting)} partitions were not read to their end")
            try:
                fetched = await consumer.getmany(*waiting, timeout_ms=200)
            except UnicodeDecodeError:
                places = ", ".join(sorted(f"{tp.topic}/{tp.partition}" for tp in waiting))
                raise _UnreadableError(
                    "a record has a header whose name is not UTF-8, and the client reads no "
                    f"further; it is in one of {places}"
                ) from None
            for tp, records in fetched.items():
                end = bounds[tp][1]
                for one in records:
                    if one.offset < end:
                        yield Record(
                            one.topic,
                            one.partition,
                            one.offset,
                            one.timestamp,
                            one.key,
                            one.value,
                            tuple((name, text or b"") for name, text in one.headers),
                        )
            for tp in list(waiting):
                if await consumer.position(tp) >= bounds[tp][1]:
                    waiting.discard(tp)


async def verify(settings: Settings, options: Options) -> Report:
    """Read an installation and audit it; never raises for what it finds."""
    report = Report()
    reader = _Reader(settings)
    try:
        try:
            await reader.start()
            await _verify(settings, options, reader, report)
        finally:
            await reader.stop()
    except (KafkaError, OSError, TimeoutError, _UnreadableError) as error:
        for invariant in INVARIANTS:
            if invariant != "expectation" or options.expect is not None:
                report.unknown(
                    invariant, f"the topics at {settings.broker} cannot be read: {error}"
                )
    return report


async def _verify(settings: Settings, options: Options, reader: _Reader, report: Report) -> None:
    deadline = monotonic() + options.deadline_s
    names = {
        topic.name: settings.topics.of(topic.name)
        for topic in topics.MANIFEST
        if topic.partitions is None
    }
    numbers = range(settings.partitions) if options.partition is None else [options.partition]
    earlier: dict[str, Any] = {}
    if options.checkpoint_from is not None:
        earlier = json.loads(options.checkpoint_from.read_text())
    deck = load_deck(options.deck or settings.deck)
    coverage = Coverage(options.coverage or settings.coverage)
    every = [TopicPartition(name, number) for name in names.values() for number in numbers]

    tariff = TopicPartition(settings.topics.of(topics.TARIFF), 0)
    # The position rows first: whatever is committed later lies at or beyond them.
    changelogs = [TopicPartition(names[topics.CHANGELOG], number) for number in numbers]
    rows: dict[int, dict[bytes, bytes]] = {number: {} for number in numbers}
    starts = dict(await reader.uncommitted.beginning_offsets(every))
    stable = dict(await reader.committed.end_offsets(changelogs))
    bounds = {tp: (starts[tp], stable[tp]) for tp in changelogs}
    async for record in reader.records(bounds, deadline):
        of_partition = rows[record.partition]
        if record.value is None:
            of_partition.pop(record.key or b"", None)
        else:
            of_partition[record.key or b""] = record.value

    # Markers of one commit reach the partitions one by one: what a row tells of may not be there
    # yet elsewhere. What is written after this moment is not waited for.
    ends = dict(await reader.uncommitted.end_offsets(every))
    sources = settings.topics.sources
    until = min(deadline, monotonic() + options.open_within_s)
    stable = await reader.settled(ends, sources, until)
    for tp in every:
        if stable[tp] < ends[tp] and tp.topic not in sources:
            report.unknown(
                "stable",
                f"a transaction is open on {tp.topic}/{tp.partition} at offset {stable[tp]} and "
                f"has not ended within {options.open_within_s} s",
            )
    # After the rows: a version that priced any of them was there by then.
    first = dict(await reader.uncommitted.beginning_offsets([tariff]))
    last = dict(await reader.committed.end_offsets([tariff]))
    bounds = {tariff: (first[tariff], last[tariff])}
    versions = [record async for record in reader.records(bounds, deadline)]
    begun: dict[str, dict[str, int]] = earlier.get("offsets", {})
    reached: dict[str, dict[str, int]] = {}

    logs = []
    read = [name for name in names if name not in (topics.CHANGELOG, topics.SEEN)]
    for number in numbers:
        tps = {TopicPartition(names[name], number): name for name in read}
        bounds = {
            tp: (max(starts[tp], begun.get(str(number), {}).get(name, 0)), stable[tp])
            for tp, name in tps.items()
        }
        records: dict[str, list[Record]] = {name: [] for name in read}
        async for record in reader.records(bounds, deadline):
            records[tps[TopicPartition(record.topic, record.partition)]].append(record)
        logs.append(
            Log(
                partition=number,
                rows=rows[number],
                records=dict(records),
                starts={name: starts[tp] for tp, name in tps.items() if name != topics.LEDGER},
                begun=begun.get(str(number), {}),
                hidden=frozenset(name for tp, name in tps.items() if stable[tp] < ends[tp]),
                read_at=datetime.now(UTC),
            )
        )
        reached[str(number)] = {name: stable[tp] for tp, name in tps.items()}
    _, checkpoint = audit(
        logs,
        names=names,
        partitions=settings.partitions,
        deck=deck,
        published=decks_of(versions),
        options=options,
        report=report,
        earlier=earlier.get("partitions"),
        coverage=coverage,
    )
    if options.checkpoint_to is not None:
        for name, known in checkpoint.items():
            reached[name] |= known.pop("ends")
        options.checkpoint_to.write_text(
            json.dumps({"version": 1, "offsets": reached, "partitions": checkpoint})
        )
