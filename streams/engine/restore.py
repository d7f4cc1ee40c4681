"""Restore of one partition from Kafka: rows, position and remembered ids.

Reads to the high watermark by position, never "to the last record": a log ends in control
records. What is read is compared with what the position row says was there, and with the last
entry of the ledger; a difference stops the shard, for going on with a smaller balance is worse
than standing still.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import datetime
from itertools import islice
from time import monotonic
from typing import Any, Final

import msgspec
from aiokafka import TopicPartition
from msgspec import Struct
from xxhash import xxh3_64_hexdigest

from schemas import topics
from streams.billing.account import NewerRowError, decode_row
from streams.billing.parts import microseconds
from streams.consumer import Consumer
from streams.engine import seen
from streams.engine.errors import FencedError, Stop, StoppedError, UnknownOutcomeError
from streams.engine.kafka import log_reader
from streams.engine.position import Position, SourcePosition, decode_position, oldest_kept
from streams.engine.rows import POSITION_KEY, Rows, home_of
from streams.engine.seen import Seen
from streams.settings import Settings

# Larger fetches are no faster, and what several shards hold of them at once is never given back.
RESTORE_FETCH_BYTES: Final = 2 << 20
# A transaction of ours ends by its own time-out after 15 s; one that stands longer hangs.
HANGING_AFTER_S: Final = 30
_POLL_MS: Final = 200
# How often, and how far apart, the end of a log that seems to be cut off is asked for again.
_ASKED_AGAIN: Final = 6
_ASKED_EVERY_S: Final = 0.5
# A fetch holds many more; as objects they would take memory that the rows never give back.
_RECORDS_AT_ONCE: Final = 5_000
# So many tenants are not at home by chance.
_HOMES_LOOKED_AT: Final = 64
# The turn to read of who need not wait for one.
NO_TURN: Final = nullcontext()
# Where the last entry of a ledger is looked for first: a batch and what a few openings leave.
_LOOKED_BACK: Final = 64


class Restored(Struct, kw_only=True):
    """What one partition holds. `position` is None in a partition that never booked."""

    rows: Rows
    seen: Seen
    position: Position | None
    ledger_end: int
    records: int = 0


class _Entry(Struct, frozen=True, gc=False):
    """What of a ledger's entry is needed here."""

    seq: int


_decode_entry: Final = msgspec.json.Decoder(_Entry).decode


def record_hash(key: bytes | None, value: bytes | None) -> str:
    """What the position row keeps of the last record it has booked."""
    return xxh3_64_hexdigest((key or b"") + b"\0" + (value or b""))


class Marks:
    """Log starts and ends, asked with a consumer that is never assigned anything (one a worker)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._uncommitted: Any = None
        self._committed: Any = None

    async def start(self) -> None:
        """Connect."""
        self._uncommitted = log_reader(self._settings, committed=False)
        self._committed = log_reader(self._settings)
        await self._uncommitted.start()
        await self._committed.start()

    async def stop(self) -> None:
        """Disconnect."""
        for consumer in (self._uncommitted, self._committed):
            if consumer is not None:  # the broker may be gone before it was ever there
                await consumer.stop()

    async def refresh(self) -> None:
        """Look for the partitions' leaders anew."""
        for consumer in (self._uncommitted, self._committed):
            await consumer._client.force_metadata_update()  # noqa: SLF001  # a contract test watches it

    async def starts(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """The first offset that still exists."""
        return dict(await self._uncommitted.beginning_offsets(list(tps)))

    async def ends(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """High watermarks: where the log ends, open transactions included."""
        return dict(await self._uncommitted.end_offsets(list(tps)))

    async def stable_ends(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Last stable offsets: where the first open transaction begins, else the log's end."""
        return dict(await self._committed.end_offsets(list(tps)))


# Where a transaction begins that is open on a partition, and since when that is known.
OpenSince = dict[TopicPartition, tuple[int, float]]


def open_since(
    ends: Mapping[TopicPartition, int],
    stable: Mapping[TopicPartition, int],
    before: OpenSince,
    now: float,
) -> OpenSince:
    """The partitions that end (`ends`) beyond their last stable offset. One that begins elsewhere
    than that of the last look (`before`) is another one, and open since now."""
    found: OpenSince = {}
    for tp, begins in stable.items():
        if begins < ends[tp]:
            known = before.get(tp)
            found[tp] = known if known is not None and known[0] == begins else (begins, now)
    return found


async def wait_stable(
    marks: Marks, tps: list[TopicPartition], least: Mapping[TopicPartition, int]
) -> dict[TopicPartition, int]:
    """Wait until no transaction is open on any of the partitions; return their ends. An answer
    below `least` comes from a broker that does not know its log's end any more: ask again.

    Raises StoppedError(`hanging_transaction`) when one stays open longer than any of ours can,
    UnknownOutcomeError when nobody who knows the ends answers.
    """
    deadline = monotonic() + HANGING_AFTER_S
    opened: OpenSince = {}
    looked_anew = False
    while True:
        ends = await marks.ends(tps)
        stable = await marks.stable_ends(tps)
        now = monotonic()
        opened = open_since(ends, stable, opened, now)
        behind = [tp for tp, end in least.items() if ends[tp] < end]
        if not opened and not behind:
            return {tp: max(ends[tp], stable[tp]) for tp in tps}
        if behind:
            await marks.refresh()
            if now > deadline:
                raise UnknownOutcomeError(f"who answers for {behind[0]} is behind its leader")
        # One transaction, not one after the other: whoever stood still may find that its
        # partition is another's by now, which goes on.
        hanging = [tp for tp, (_, since) in opened.items() if now - since > HANGING_AFTER_S]
        if hanging and not behind:
            if not looked_anew:
                # What looks open may be what a former leader remembers.
                await marks.refresh()
                looked_anew = True
                continue
            tp = hanging[0]
            raise StoppedError(
                Stop.HANGING_TRANSACTION,
                f"a transaction stays open on {tp.topic}/{tp.partition} at offset {stable[tp]}; "
                "find it with kafka-transactions.sh find-hanging and abort it",
            )
        await asyncio.sleep(0.1)


async def records_of(
    consumer: Consumer, ends: dict[TopicPartition, int]
) -> AsyncIterator[tuple[TopicPartition, list[Any]]]:
    """Records of assigned partitions until every position has reached its end."""
    remaining = set(ends)
    for tp in list(remaining):
        if await consumer.position(tp) >= ends[tp]:
            remaining.discard(tp)
    silent_since = monotonic()
    while remaining:
        fetched = await consumer.getmany(
            *remaining, timeout_ms=_POLL_MS, max_records=_RECORDS_AT_ONCE
        )
        for tp, records in fetched.items():
            if records:
                yield tp, records
        if fetched:
            silent_since = monotonic()
        elif monotonic() - silent_since > HANGING_AFTER_S:
            raise UnknownOutcomeError("the log cannot be read to its end")
        for tp in list(remaining):
            if await consumer.position(tp) >= ends[tp]:
                remaining.discard(tp)


def restored_from(settings: Settings, partition: int) -> list[TopicPartition]:
    """The partitions that a restore reads, or that tell it something by their ends."""
    names = settings.topics
    return [
        TopicPartition(names.of(topic), partition)
        for topic in (topics.CHANGELOG, topics.SEEN, topics.LEDGER)
    ]


def outputs_of(settings: Settings, partition: int) -> list[TopicPartition]:
    """The partitions that the owner of a partition writes, and nobody else."""
    names = settings.topics
    return [
        TopicPartition(names.of(topic.name), partition)
        for topic in topics.MANIFEST
        if topic.direction is not topics.Direction.IN
    ]


async def restore(
    settings: Settings,
    partition: int,
    marks: Marks,
    least: Mapping[TopicPartition, int],
    wall: datetime,
    turn: AbstractAsyncContextManager[Any] = NO_TURN,
) -> Restored:
    """Read one partition's table and remembered ids from the log's start to its end, which is no
    less than `least` says (see `Transactor.barrier`). `wall` is the time; `turn` is taken while
    records are read, and not while a transaction of others is waited for.

    The producer with the partition's id must have been started before: from then on nobody
    else can add to what is read without fencing us. Raises StoppedError; FencedError when
    somebody has; UnknownOutcomeError when the end cannot be learnt.
    """
    changelog, ids, ledger = restored_from(settings, partition)
    ends = await wait_stable(marks, outputs_of(settings, partition), least)
    try:
        async with turn:
            return await _read(settings, partition, marks, changelog, ids, ledger, ends, wall)
    except StoppedError:
        # Only its owner writes to a partition, and no batch comes without a position row. Where the
        # table has grown it has another one by now, and what looked like a loss was half of its
        # batch; where nothing but ids or entries has, who answered before was behind.
        logs = [changelog, ids, ledger]
        now = await _ends_once(marks, logs, lambda now: now[changelog] > ends[changelog])
        if now[changelog] > ends[changelog]:
            raise FencedError(settings.transactional_id(partition)) from None
        for tp in (ids, ledger):
            if now[tp] > ends[tp]:
                raise UnknownOutcomeError(f"who answered for {tp} was behind") from None
        raise


async def _ends_once(
    marks: Marks,
    tps: Iterable[TopicPartition],
    sound: Callable[[Mapping[TopicPartition, int]], bool],
) -> dict[TopicPartition, int]:
    """Where logs end, asked for again while the answer is not sound: a broker that stood still may
    give it before it learns that it leads no more. The last answer, sound or not."""
    ends = await marks.ends(tps)
    for _ in range(_ASKED_AGAIN):
        if sound(ends):
            break
        await asyncio.sleep(_ASKED_EVERY_S)
        await marks.refresh()
        ends = await marks.ends(tps)
    return ends


async def _read(
    settings: Settings,
    partition: int,
    marks: Marks,
    changelog: TopicPartition,
    ids: TopicPartition,
    ledger: TopicPartition,
    ends: dict[TopicPartition, int],
    wall: datetime,
) -> Restored:
    starts = await marks.starts([changelog, ids, ledger])
    restored = Restored(rows=Rows(), seen=Seen(), position=None, ledger_end=ends[ledger])
    position_row: bytes | None = None
    found: range | None = None
    batches: list[seen.Ids] = []
    reader = log_reader(settings)
    reader._fetch_max_bytes = RESTORE_FETCH_BYTES  # noqa: SLF001
    reader._max_partition_fetch_bytes = RESTORE_FETCH_BYTES  # noqa: SLF001
    await reader.start()
    try:
        reader.assign([changelog, ids])
        for tp in (changelog, ids):
            reader.seek(tp, starts[tp])
        async for tp, records in records_of(reader, {tp: ends[tp] for tp in (changelog, ids)}):
            restored.records += len(records)
            if tp == ids:
                for record in records:
                    batches.append(_unpacked(record, tp))
                    found = _followed(found, batches[-1].ordinal, tp)
            else:
                restored.rows.load((record.key, record.value) for record in records)
            await asyncio.sleep(0)
        position_row = restored.rows.values.pop(POSITION_KEY, None)
        if position_row is None and await _ever_committed(
            reader, {tp: (starts[tp], ends[tp]) for tp in (ledger, ids)}
        ):
            raise StoppedError(
                Stop.STATE_LOST,
                f"partition {partition} has booked before, but its position row is gone from "
                f"{changelog.topic}; restore the topic from a backup",
            )
        last = await _last_entry(reader, ledger, starts[ledger], ends[ledger])
    finally:
        await reader.stop()
    restored.rows.index_due()
    if position_row is not None:
        restored.position = _checked(position_row, restored, partition, changelog.topic)
        _check_home(restored.rows, partition, settings.partitions)
        retired = starts[ids] == ends[ids] > 0
        _check_ids(restored.position, found, ids, wall, retired=retired)
        if last is not None:
            _check_ledger(restored.rows, *last, changelog)
        if batches:
            _check_offsets(ledger, ends[ledger], batches[-1].ledger_from)
        # All at once, when their number is known: a table made to measure need not grow.
        for _ in restored.seen.load(batches, restored.position.now):
            await asyncio.sleep(0)
    elif restored.rows.values:
        raise StoppedError(
            Stop.STATE_LOST,
            f"partition {partition} of {changelog.topic} has rows but no position row",
        )
    return restored


def _check_home(rows: Rows, partition: int, partitions: int) -> None:
    """Whether the tenants of some rows belong here. When somebody has changed the number of
    partitions, about every second of them does not."""
    tenants = (key for key in rows.values if b"\0" not in key)
    for tenant in islice(tenants, _HOMES_LOOKED_AT):
        home = home_of(tenant, partitions)
        if home != partition:
            raise StoppedError(
                Stop.NOT_COPARTITIONED,
                f"{tenant.decode(errors='replace')} is booked here, and of {partitions} partitions "
                f"it belongs to {home}: the number of partitions was changed. Set "
                "CREDITS_PARTITIONS to what it was",
            )


def _unpacked(record: Any, tp: TopicPartition) -> seen.Ids:
    try:
        return seen.unpack(record.value or b"")
    except ValueError as error:
        raise StoppedError(
            Stop.STATE_LOST,
            f"{tp.topic}/{tp.partition} offset {record.offset} is damaged: {error}",
        ) from None


def _checked(value: bytes, restored: Restored, partition: int, topic: str) -> Position:
    try:
        position = decode_position(value)
    except (msgspec.DecodeError, ValueError) as error:
        newer = isinstance(error, ValueError) and not isinstance(error, msgspec.DecodeError)
        raise StoppedError(
            Stop.NEWER_ROWS if newer else Stop.STATE_LOST,
            f"the position row of {topic}/{partition} cannot be read: {error}",
        ) from None
    rows, digest = restored.rows.totals()
    if rows != position.rows or digest != int(position.digest, 16):
        raise StoppedError(
            Stop.STATE_LOST,
            f"{topic}/{partition} holds {rows} rows with digest {digest:016x}; its position row "
            f"says {position.rows} rows with digest {position.digest}; restore the topic",
        )
    return position


def _followed(found: range | None, ordinal: int, tp: TopicPartition) -> range:
    """The ordinals found so far, with the next one. Raises StoppedError when one is missing."""
    if found is None:
        return range(ordinal, ordinal + 1)
    if ordinal != found.stop:
        raise _ids_lost(tp, f"goes on at ordinal {ordinal} where {found.stop} should be")
    return range(found.start, ordinal + 1)


def _check_ids(
    position: Position,
    found: range | None,
    tp: TopicPartition,
    wall: datetime,
    *,
    retired: bool,
) -> None:
    """Whether the remembered ids are there that must be: up to where the position row says, and
    from the oldest of its marks on that is younger than their log's retention. `retired`: there
    is nothing in the log any more, but there was."""
    needed = oldest_kept(position.seen_marks, microseconds(max(wall, position.now)))
    if found is None:
        lost = (
            needed is not None if position.seen_marks else (not retired and position.seen_next > 0)
        )
    else:
        lost = found.stop != position.seen_next or (needed is not None and found.start > needed)
    if lost:
        held = "no ordinal" if found is None else f"ordinals {found.start} to {found.stop - 1}"
        since = "" if needed is None else f", and all from {needed} on must be there"
        raise _ids_lost(
            tp, f"holds {held}; the position row says that {position.seen_next} comes next{since}"
        )


def _ids_lost(tp: TopicPartition, what: str) -> StoppedError:
    return StoppedError(
        Stop.STATE_LOST,
        f"{tp.topic}/{tp.partition} {what}: remembered ids are missing, repeats would be charged "
        "again; restore the topic from a mirror or a backup that has them",
    )


async def _last_entry(
    reader: Consumer, ledger: TopicPartition, start: int, end: int
) -> tuple[bytes, int] | None:
    """Tenant and number of the last committed entry of a ledger; None when there is none. Its end
    may be barriers and batches that were aborted, as many as there were openings."""
    reader.assign([ledger])
    back, until = _LOOKED_BACK, end
    while until > start:
        first = max(start, end - back)
        reader.seek(ledger, first)
        last: tuple[bytes, int] | None = None
        async for _, records in records_of(reader, {ledger: until}):
            for record in records:
                # What comes after the end is of somebody who has fenced us.
                if record.offset < until:
                    last = _entry(record) or last
            await asyncio.sleep(0)
        if last is not None:
            return last
        back, until = 2 * back, first
    return None


def _entry(record: Any) -> tuple[bytes, int] | None:
    try:
        entry = _decode_entry(record.value or b"")
    except msgspec.DecodeError:
        return None  # not ours, so it says nothing of our rows
    return None if record.key is None else (record.key, entry.seq)


def _check_ledger(rows: Rows, tenant: bytes, seq: int, changelog: TopicPartition) -> None:
    """Whether the table is as new as the ledger: entries and rows are written together. A copy of
    the table and the ids that was taken earlier is sound in itself, and with it everything since
    would be booked again, under the same numbers."""
    value, name = rows.values.get(tenant), tenant.decode(errors="replace")
    try:
        held = 0 if value is None else decode_row(value).seq
    except NewerRowError as error:
        raise StoppedError(Stop.NEWER_ROWS, f"the row of {name}: {error}") from None
    except msgspec.DecodeError as error:
        raise StoppedError(Stop.STATE_LOST, f"the row of {name} cannot be read: {error}") from None
    if held < seq:
        raise StoppedError(
            Stop.STATE_LOST,
            f"in the ledger {name} has entry {seq}, the table {held or 'none'}: "
            f"{changelog.topic}/{changelog.partition} is older than the ledger, and what was "
            "booked since would be booked again; restore a newer copy of it and of the "
            "remembered ids",
        )


def _check_offsets(ledger: TopicPartition, end: int, named: int) -> None:
    """Whether the ledger still has the offsets that the remembered ids name: by these a correction
    finds what it corrects. Made anew from its entries alone it is shorter, for it had control
    records, too."""
    if end < named:
        raise StoppedError(
            Stop.STATE_LOST,
            f"{ledger.topic}/{ledger.partition} ends at {end}, but the remembered ids name entries "
            f"from {named} on: it was made anew with other offsets, and a correction would take "
            "nothing back; restore it with the offsets it had",
        )


async def _ever_committed(reader: Consumer, bounds: dict[TopicPartition, tuple[int, int]]) -> bool:
    """Whether a committed record exists. A high watermark above 0 may be an aborted
    transaction; records deleted since (a log start above 0) were committed once."""
    if any(start > 0 for start, _ in bounds.values()):
        return True
    filled = {tp: end for tp, (_, end) in bounds.items() if end > 0}
    if not filled:
        return False
    reader.assign(list(filled))
    for tp in filled:
        reader.seek(tp, 0)
    async for _ in records_of(reader, filled):
        return True
    return False


async def check_sources(
    settings: Settings, partition: int, position: Position, marks: Marks
) -> None:
    """Whether each source topic is still the one that was read, up to where it was read.

    Raises StoppedError(`source_truncated`, `source_lost`).
    """
    known = {
        TopicPartition(topic, partition): source
        for topic, source in position.sources.items()
        if topic in settings.topics.sources
    }
    if not known:
        return
    starts = await marks.starts(known)
    ends = await _ends_once(
        marks, known, lambda now: all(now[tp] >= source.next for tp, source in known.items())
    )
    for tp, source in known.items():
        if starts[tp] > source.next:
            raise StoppedError(
                Stop.SOURCE_TRUNCATED,
                f"{tp.topic}/{tp.partition} begins at offset {starts[tp]}, but only what is "
                f"before {source.next} is booked: {starts[tp] - source.next} records were deleted "
                "unread. Find them elsewhere, or go on without them: `credits worker "
                f"--accept-source-loss {tp.topic}:{tp.partition}:{starts[tp]}`",
                tp.topic,
            )
        if ends[tp] < source.next:
            raise _lost(tp, source, f"ends at {ends[tp]}", ends[tp])
    held = {tp: source for tp, source in known.items() if source.last >= starts[tp] and source.hash}
    if held:
        await _check_last_records(settings, held, ends)


def _lost(tp: TopicPartition, source: SourcePosition, seen_now: str, offset: int) -> StoppedError:
    return StoppedError(
        Stop.SOURCE_LOST,
        f"{tp.topic}/{tp.partition} {seen_now}, but it was read up to {source.next}: it is not "
        "the topic it was. If it was made anew on purpose, name the offset to go on from: "
        f"`credits worker --accept-source-loss {tp.topic}:{tp.partition}:{offset}`",
        tp.topic,
    )


async def _check_last_records(
    settings: Settings,
    held: dict[TopicPartition, SourcePosition],
    ends: dict[TopicPartition, int],
) -> None:
    reader = log_reader(settings)
    await reader.start()
    try:
        reader.assign(list(held))
        for tp, source in held.items():
            reader.seek(tp, source.last)
        waiting = dict(held)
        async for tp, records in records_of(
            reader, {tp: min(source.last + 1, ends[tp]) for tp, source in held.items()}
        ):
            source = waiting.pop(tp, None)
            if source is None:
                continue
            first = records[0]
            if (first.offset, first.timestamp, record_hash(first.key, first.value)) != (
                source.last,
                source.timestamp,
                source.hash,
            ):
                raise _lost(tp, source, f"holds another record at offset {source.last}", 0)
        for tp, source in waiting.items():
            raise _lost(tp, source, f"has no record at offset {source.last}", 0)
    finally:
        await reader.stop()


def clock_back_by(stored: datetime, wall: datetime) -> bool:
    """Whether the wall clock is too far behind the last `now` to go on."""
    return (stored - wall).total_seconds() > 300
