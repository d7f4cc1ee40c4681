"""The shard: owner of one partition of all source topics, its rows, ids, position and producer.

One batch at a time: decide everything (no other batch of this shard can come in between), write
it in one transaction, and only then let memory follow. After any error in between, memory and
producer are thrown away and read again from Kafka, which alone knows what happened.
"""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, Final, TypeVar

import msgspec
from aiokafka import TopicPartition
from aiokafka.partitioner import murmur2
from msgspec import Struct

from schemas import topics
from schemas.codec import Decoded, decoder
from schemas.commands import BookPayment
from schemas.envelope import (
    CAUSED_BY,
    MOVED_FROM,
    TRACE_HEADERS,
    Headers,
    RejectedError,
    binary_headers,
)
from schemas.funding import RechargeResult
from schemas.ledger import Balance, EntryKind
from schemas.money import NANOS
from schemas.notices import DeadLetterReason, Notice, NoticeKind
from schemas.topics import Names
from schemas.usage import CallUsage, ConferenceUsage
from streams import VERSION
from streams.billing import ledger
from streams.billing.account import (
    Account,
    NewerRowError,
    Payment,
    decode_payment,
    decode_row,
    encode_payment,
    encode_row,
)
from streams.billing.events import (
    Cause,
    CommandEvent,
    Event,
    ResultEvent,
    Tick,
    UsageEvent,
    usage_event,
)
from streams.billing.ledger import Outcome, Terms
from streams.engine import seen
from streams.engine.errors import GaveUpError, Stop, StoppedError
from streams.engine.reader import SLICES_IN_FLIGHT, Reader, Slice
from streams.engine.restore import (
    Marks,
    check_sources,
    clock_back_by,
    record_hash,
    restore,
)
from streams.engine.rows import (
    NEVER,
    PAYMENT_MARK,
    POSITION_KEY,
    Position,
    Rows,
    SourcePosition,
    Totals,
    encode_position,
    payment_key,
)
from streams.engine.seen import EPOCH, Seen
from streams.engine.transaction import Outputs, Transactor
from streams.metrics import Meters
from streams.settings import Settings

# The loop must turn: heartbeats, the metrics listener and the other shards wait for it.
YIELD_EVERY: Final = 2_000
FULL_BATCH: Final = 4_096
MOST_RECORDS: Final = 20_000
MOST_TICKS: Final = 2_000
# One account's ticks at one instant: more means that its due time does not move.
MOST_TICKS_OF_ONE: Final = 100
IDLE_TICK_S: Final = 1.0
MOST_DEFECTS_A_MINUTE: Final = 10
# What a moved record's header and the broker's own framing may add to it.
MOVED_HEADROOM_BYTES: Final = 512
DEFECT_RETRY_US: Final = 3_600_000_000

T = TypeVar("T")

_USAGE: Final = (topics.CALL_USAGE, topics.CONFERENCE_USAGE)
_encode: Final = msgspec.json.Encoder().encode


def us_from(at: datetime) -> int:
    """An instant as µs since 1970, exact."""
    return (at - EPOCH) // timedelta(microseconds=1)


def instant_from(us: int) -> datetime:
    """µs since 1970 as an instant."""
    return EPOCH + timedelta(microseconds=us)


class _Candidate(Struct, gc=False):
    """A record that is a sound event of this partition and not too late."""

    record: Any
    topic: str
    decoded: Decoded
    cause: Cause
    event: Event
    fingerprint: int
    check: int


class Tally:
    """What a batch will add to the metrics, once it is committed."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, ...], int] = {}
        self.nanos: dict[tuple[str, ...], int] = {}

    def add(self, *name_and_labels: str, by: int = 1) -> None:
        """Count something."""
        self.counts[name_and_labels] = self.counts.get(name_and_labels, 0) + by

    def moved(self, kind: EntryKind, currency: str, nanos: int) -> None:
        """Sum what was charged."""
        if kind is EntryKind.CHARGE:
            key = ("credits_charged_total", currency, kind.value)
            self.nanos[key] = self.nanos.get(key, 0) - nanos

    def publish(self, meters: Meters) -> None:
        """The batch is committed: tell the metrics."""
        for labels, count in self.counts.items():
            meters[labels].inc(count)
        for labels, nanos in self.nanos.items():
            meters[labels].inc(nanos / NANOS)


class _DefectError(Exception):
    """`ledger.apply` raised: on the candidate at a place in the batch, or on a tenant's tick."""

    def __init__(self, cause: Exception, *, at: int | None = None, key: bytes = b"") -> None:
        super().__init__(type(cause).__name__)
        self.cause = cause
        self.at = at
        self.key = key


class Work:
    """A batch that is decided but not committed."""

    def __init__(self, now: datetime, outputs: Outputs, totals: Totals) -> None:
        self.now = now
        self.outputs = outputs
        self.totals = totals
        self.tally = Tally()
        self.accounts: dict[bytes, Account] = {}
        self.before: dict[bytes, Account | None] = {}
        self.payments: dict[bytes, Payment] = {}
        self.rows: dict[bytes, bytes | None] = {}
        self.fresh: dict[int, int] = {}
        self.weeks: list[int] = []
        self.notices = 0
        self.position: Position | None = None
        self.ids: seen.Ids | None = None

    @property
    def empty(self) -> bool:
        """Nothing was decided: not even an offset moves."""
        return self.position is None


class Shard:
    """One partition's owner. See the module's text; `run` is its life."""

    def __init__(
        self,
        settings: Settings,
        partition: int,
        *,
        marks: Marks,
        meters: Meters,
        terms: Terms,
        accepted_losses: dict[str, int],
        wall: Callable[[], datetime],
    ) -> None:
        self.partition = partition
        self.committed_at = -1.0
        # When each source topic was last read further, or had nothing more; ticks do not count.
        self.moved_at: dict[str, float] = {}
        self._settings = settings
        self._names: Names = settings.topics
        self._manifest_of = {self._names.of(name): name for name in topics.SOURCES}
        self._marks = marks
        self._meters = meters
        self._terms = terms
        self._accepted_losses = accepted_losses
        self._wall = wall
        self._ledger_topic = self._names.of(topics.LEDGER)
        self._entry_headers = [
            ("ce_specversion", b"1.0"),
            ("content-type", b"application/json"),
            ("ce_type", topics.LEDGER.encode()),
            ("ce_source", settings.app_id.encode()),
        ]
        self._transactor = Transactor(settings, partition)
        self._decoders = {name: decoder(name) for name in topics.SOURCES}
        self._inbox: list[Slice] = []
        self._wake = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._rows = Rows()
        self._seen = Seen()
        self._totals = Totals()
        self._sources: dict[str, SourcePosition] = {}
        self._now = EPOCH
        self._seen_next = 0
        self._ledger_end = 0
        self._defects: list[float] = []
        self._last_commit = 0.0
        self._catch_up: dict[TopicPartition, int] = {}

    # -- opening -----------------------------------------------------------------------------

    async def open(self) -> None:
        """Fence, restore, check the sources. Raises StoppedError, FencedError,
        UnknownOutcomeError."""
        started = monotonic()
        await self._transactor.start()
        restored = await restore(self._settings, self.partition, self._marks)
        self._rows, self._seen = restored.rows, restored.seen
        self._ledger_end = restored.ledger_end
        tps = [TopicPartition(name, self.partition) for name in self._names.sources]
        starts = await self._marks.starts(tps)
        if restored.position is not None:
            position = restored.position
            self._sources = await self._sound_sources(position)
            self._totals = Totals.of(position)
            self._now = position.now
            self._seen_next = position.seen_next
        for tp in tps:
            # A topic that was never read starts at its beginning, sought explicitly.
            self._sources.setdefault(tp.topic, SourcePosition(next=starts[tp]))
            self.moved_at[tp.topic] = monotonic()
        self.now()
        waiting = [
            TopicPartition(self._names.of(name), self.partition)
            for name in (topics.COMMAND, topics.RESULT)
        ]
        ends = await self._marks.ends(waiting)
        self._catch_up = {tp: ends[tp] for tp in waiting if self.next_of(tp.topic) < ends[tp]}
        self._meters["credits_restore_seconds",].observe(monotonic() - started)

    async def _sound_sources(self, position: Position) -> dict[str, SourcePosition]:
        """The source positions, once every topic is found to be what it was. Where it is not
        and an operator has accepted that, the position he named; elsewhere it stays as it was,
        so that the option may be left on a command line."""
        accepted = dict(self._accepted_losses)
        while True:
            try:
                await check_sources(self._settings, self.partition, position, self._marks)
                return dict(position.sources)
            except StoppedError as error:
                if error.topic not in accepted:
                    raise
                lost = SourcePosition(next=accepted.pop(error.topic))
                sources = {**position.sources, error.topic: lost}
                position = msgspec.structs.replace(position, sources=sources)

    def next_of(self, topic: str) -> int:
        """The next offset of a source topic (its name on the cluster)."""
        return self._sources[topic].next

    def positions(self) -> dict[TopicPartition, int]:
        """Where to read every source topic from."""
        return {
            TopicPartition(topic, self.partition): source.next
            for topic, source in self._sources.items()
            if topic in self._manifest_of
        }

    @property
    def row_count(self) -> int:
        """Rows in memory."""
        return len(self._rows.values)

    @property
    def remembered(self) -> int:
        """Ids in memory."""
        return len(self._seen)

    @property
    def totals(self) -> Totals:
        """What the position row says of all rows."""
        return self._totals

    @property
    def last_now(self) -> datetime:
        """The `now` of the last batch."""
        return self._now

    def caught_up(self) -> bool:
        """Whether the commands and results that waited on opening are booked."""
        return not self._catch_up

    def reached(self, tp: TopicPartition, offset: int) -> None:
        """A source is booked, or holds nothing more to book, up to an offset."""
        if offset >= self._catch_up.get(tp, offset + 1):
            del self._catch_up[tp]

    # -- inbox -------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Slices in the inbox."""
        return len(self._inbox)

    @property
    def idle(self) -> bool:
        """No batch is being decided or committed."""
        return self._quiet.is_set()

    def deliver(self, part: Slice) -> None:
        """Take a slice; it is booked by the shard's own task."""
        self._inbox.append(part)
        self._wake.set()

    def clear(self) -> None:
        """Forget what waits: a rebalance has begun."""
        self._inbox.clear()

    async def settle(self, timeout_s: float) -> bool:
        """Wait for the running batch; False when it does not end in time."""
        try:
            await asyncio.wait_for(self._quiet.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End the producer in order."""
        await self._transactor.stop()

    def drop(self) -> None:
        """Throw everything away at once; Kafka decides what became of an open batch."""
        self._transactor.drop()

    # -- booking -----------------------------------------------------------------------------

    def now(self) -> datetime:
        """The instant of the next batch: never before that of the last.

        Raises StoppedError(`clock_skew`) when the wall clock is far behind it.
        """
        wall = self._wall()
        if clock_back_by(self._now, wall):
            raise StoppedError(
                Stop.CLOCK_SKEW,
                f"this machine's clock says {wall.isoformat()}, but a batch was booked at "
                f"{self._now.isoformat()}; correct the clock (NTP) and restart",
            )
        return max(wall, self._now)

    async def run(self, gate: asyncio.Event, reader: Reader) -> None:
        """Book batch after batch for ever; none begins while `gate` is shut (rebalances).

        Raises what ends a shard's life: StoppedError, FencedError, UnknownOutcomeError,
        GaveUpError.
        """
        while True:
            await self._work_waits(gate)
            taken = self._take()
            self._quiet.clear()
            try:
                await self._book(self._chained(taken, reader))
            finally:
                self._quiet.set()
                for part in taken:
                    reader.done(part)

    def _chained(self, taken: Sequence[Slice], reader: Reader) -> list[Slice]:
        """The slices that continue, without a gap, what this shard has booked."""
        reached = {topic: source.next for topic, source in self._sources.items()}
        chained: list[Slice] = []
        for part in taken:
            topic = part.tp.topic
            if not reader.current(part):
                self._meters["credits_slices_dropped_total", "old"].inc()
            elif part.follows > reached[topic]:
                # Something before it was lost on the way: read again from where we stand.
                reader.seek(part.tp, reached[topic])
                self._meters["credits_slices_dropped_total", "gap"].inc()
            else:
                chained.append(part)
                reached[topic] = max(reached[topic], part.end)
        return chained

    async def _work_waits(self, gate: asyncio.Event) -> None:
        linger_s = self._settings.linger_ms / 1000
        while True:
            await gate.wait()
            now = monotonic()
            lingered = self._last_commit + linger_s - now
            if self._inbox:
                if lingered <= 0 or self._full():
                    return
                timeout = lingered
            else:
                due = self._rows.next_due()
                wait_s = IDLE_TICK_S
                if due != NEVER:
                    wait_s = min(wait_s, (due - us_from(self._wall())) / 1e6)
                if wait_s <= 0 and lingered <= 0:
                    return
                timeout = max(wait_s, lingered, 0.001)
            self._wake.clear()
            try:
                # Not `wait_for`: Python 3.11's loses a cancellation that comes with the wake-up.
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _full(self) -> bool:
        return (
            len(self._inbox) >= SLICES_IN_FLIGHT
            or sum(len(part.records) for part in self._inbox) >= FULL_BATCH
        )

    def _take(self) -> list[Slice]:
        """Slices for one batch: commands, then results, then usage, each in its order."""
        order = {self._names.of(name): rank for rank, name in enumerate(topics.SOURCES)}
        waiting = sorted(self._inbox, key=lambda part: order[part.tp.topic])
        taken: list[Slice] = []
        records = 0
        for part in waiting:
            if taken and records + len(part.records) > MOST_RECORDS:
                break
            taken.append(part)
            records += len(part.records)
        left = set(map(id, taken))
        self._inbox = [part for part in self._inbox if id(part) not in left]
        return taken

    async def _book(self, taken: Sequence[Slice]) -> None:
        started = monotonic()
        work = await self._decide(taken)
        if work.empty:
            return
        assert work.position is not None
        offsets = {
            TopicPartition(topic, self.partition): source.next
            for topic, source in work.position.sources.items()
            if source != self._sources.get(topic)
        }
        committing = monotonic()
        await self._transactor.commit(work.outputs, offsets)
        ended = monotonic()
        self._publish(work)
        self._last_commit = ended
        self.committed_at = ended
        for tp in offsets:
            self.moved_at[tp.topic] = ended
        self._meters["credits_transaction_seconds",].observe(ended - committing)
        self._meters["credits_batch_seconds",].observe(ended - started)
        if taken and taken[-1].records:
            age = us_from(self._wall()) / 1e6 - taken[-1].records[-1].timestamp / 1000
            self._meters["credits_event_age_seconds",].observe(max(0.0, age))
        work.tally.publish(self._meters)

    def _publish(self, work: Work) -> None:
        """Memory follows what is committed."""
        assert work.position is not None
        for key, value in work.rows.items():
            self._rows.put(key, value)
        if work.ids is not None:
            self._seen.remember(work.ids)
        self._seen.forget(work.now)
        self._totals = work.totals
        self._sources = dict(work.position.sources)
        self._now = work.position.now
        self._seen_next = work.position.seen_next

    # -- deciding ----------------------------------------------------------------------------

    async def _decide(self, taken: Sequence[Slice]) -> Work:
        now = self.now()
        fates: list[tuple[Any, str, DeadLetterReason, str]] = []
        moves: list[tuple[Any, str, int]] = []
        tally = Tally()
        candidates = await self._read(taken, now, fates, moves, tally)
        known = self._seen.probe([candidate.fingerprint for candidate in candidates])
        defects: set[int] = set()
        bad_ticks: set[bytes] = set()
        while True:
            work = Work(now, self._transactor.outputs(us_from(now) // 1000), self._totals.copy())
            work.tally.counts = dict(tally.counts)
            try:
                self._tick(work, bad_ticks)
                await self._apply(work, candidates, known, defects)
                break
            except _DefectError as defect:
                self._note_defect(defect)
                if defect.at is None:
                    bad_ticks.add(defect.key)
                else:
                    defects.add(defect.at)
        for at in sorted(defects):
            candidate = candidates[at]
            fates.append((candidate.record, candidate.topic, DeadLetterReason.DEFECT, ""))
        for record, topic, reason, path in fates:
            self._bury(work, record, topic, reason, path)
        for record, topic, target in moves:
            self._move(work, record, topic, target)
        self._close(work, taken)
        return work

    async def _read(
        self,
        taken: Sequence[Slice],
        now: datetime,
        fates: list[tuple[Any, str, DeadLetterReason, str]],
        moves: list[tuple[Any, str, int]],
        tally: Tally,
    ) -> list[_Candidate]:
        """Decode every record not booked yet; those that are no event of ours get their fate."""
        candidates: list[_Candidate] = []
        reached = {topic: source.next for topic, source in self._sources.items()}
        rows = self._rows.values
        count = 0
        for part in taken:
            topic = self._manifest_of[part.tp.topic]
            decode = self._decoders[topic]
            first = reached[part.tp.topic]
            usage = topic in _USAGE
            for record in part.records:
                if record.offset < first:
                    continue
                count += 1
                if count % YIELD_EVERY == 0:
                    await asyncio.sleep(0)
                key = record.key
                # A row of this partition proves the key belongs here; hashing costs more.
                if key is not None and key not in rows:
                    target = (murmur2(key) & 0x7FFF_FFFF) % self._settings.partitions
                    if target != self.partition:
                        tally.add("credits_wrong_partition_total", topic)
                        if usage or topic == topics.RESULT:
                            moves.append((record, topic, target))
                        else:
                            fates.append((record, topic, DeadLetterReason.WRONG_PARTITION, ""))
                        continue
                try:
                    decoded = decode(key, record.value, record.headers)
                except RejectedError as error:
                    fates.append((record, topic, error.reason, error.path))
                    continue
                if decoded.unknown_fields:
                    tally.add("credits_unknown_fields_total", topic)
                cause = Cause(topic, self.partition, record.offset, decoded.source, decoded.id)
                try:
                    event = _event(decoded, cause)
                    late = ledger.lateness(event, now)
                    check = seen.check_of(ledger.content(event))
                except Exception as error:
                    # A record that breaks us is one dead letter, not a worker that never starts.
                    self._note_defect(_DefectError(error))
                    fates.append((record, topic, DeadLetterReason.DEFECT, ""))
                    continue
                if late is not None:
                    fates.append((record, topic, late, ""))
                    continue
                fingerprint = seen.fingerprint(decoded.source, decoded.id)
                candidates.append(
                    _Candidate(record, topic, decoded, cause, event, fingerprint, check)
                )
            reached[part.tp.topic] = max(first, part.end)
        return candidates

    def _tick(self, work: Work, bad: set[bytes]) -> None:
        """Everything that is due at or before `now` goes before the batch's events."""
        now_us = us_from(work.now)
        for due, key in self._rows.due(now_us, MOST_TICKS):
            if PAYMENT_MARK in key:
                work.rows[key] = None
                continue
            if key in bad:
                # Looked at again in an hour; the row itself stays as it was.
                value = self._rows.values[key]
                work.rows[key] = (now_us + DEFECT_RETRY_US).to_bytes(8, "big") + value[8:]
                continue
            for _ in range(MOST_TICKS_OF_ONE):
                account = self._account(work, key)
                assert account is not None
                at = instant_from(due)
                try:
                    outcome = ledger.apply(account, Tick(at), self._terms, work.now)
                except StoppedError:
                    raise
                except Exception as error:
                    raise _DefectError(error, key=key) from error
                cause = Cause("tick", -1, -1, "tick", at.isoformat())
                self._announce(work, key, outcome, cause, ())
                work.tally.add("credits_events_total", "tick", outcome.label)
                following = work.accounts[key].next_due()
                if following is None or us_from(following) > now_us:
                    break
                due = us_from(following)

    async def _apply(
        self,
        work: Work,
        candidates: Sequence[_Candidate],
        known: dict[int, int],
        defects: set[int],
    ) -> None:
        fresh = work.fresh
        weeks = work.weeks
        tally = work.tally
        outcomes: dict[tuple[str, str], int] = {}
        this_week = seen.week_of(work.now)
        for at, candidate in enumerate(candidates):
            if at % YIELD_EVERY == YIELD_EVERY - 1:
                await asyncio.sleep(0)
            if at in defects:
                continue
            key = candidate.record.key
            earlier = known.get(at)
            if earlier is None:
                earlier = fresh.get(candidate.fingerprint)
            if earlier is not None:
                label = self._repeat(work, candidate, conflict=earlier != candidate.check)
            else:
                try:
                    account = self._account(work, key)
                    event = candidate.event
                    if not isinstance(event, UsageEvent):
                        event = self._with_payment(work, event, candidate.decoded.tenant_id)
                    outcome = ledger.apply(account, event, self._terms, work.now)
                except StoppedError:
                    raise
                except Exception as error:
                    raise _DefectError(error, at=at) from error
                label = outcome.label
                if isinstance(event, ResultEvent):
                    tally.add("credits_recharge_results_total", event.result.status.value)
                if outcome.refused is not None:
                    self._bury(
                        work,
                        candidate.record,
                        candidate.topic,
                        outcome.refused.reason,
                        outcome.refused.path,
                    )
                else:
                    fresh[candidate.fingerprint] = candidate.check
                    # Usage is remembered under the week it ended in, all else under this one.
                    weeks.append(
                        seen.week_of(event.ended_at) if isinstance(event, UsageEvent) else this_week
                    )
                self._announce(work, key, outcome, candidate.cause, candidate.record.headers)
            counted = (candidate.topic, label)
            outcomes[counted] = outcomes.get(counted, 0) + 1
        for (topic, label), count in outcomes.items():
            tally.add("credits_events_total", topic, label, by=count)

    def _account(self, work: Work, key: bytes) -> Account | None:
        account = work.accounts.get(key)
        if account is None:
            value = self._rows.values.get(key)
            if value is None:
                return None
            account = self._decoded(decode_row, key, value)
            work.accounts[key] = account
            work.before[key] = account
        return account

    def _decoded(self, decode: Callable[[bytes], T], key: bytes, value: bytes) -> T:
        """A row of ours. One that cannot be read is no event's fault: the shard stops."""
        name = key.partition(b"\0")[0].decode()
        try:
            return decode(value)
        except NewerRowError as error:
            raise StoppedError(Stop.NEWER_ROWS, f"the row of {name}: {error}") from None
        except msgspec.DecodeError as error:
            raise StoppedError(
                Stop.STATE_LOST, f"the row of {name} cannot be read: {error}"
            ) from None

    def _with_payment(self, work: Work, event: Event, tenant_id: str) -> Event:
        """What an event touches enters with it."""
        match event:
            case ResultEvent(result=result, cause=cause):
                return ResultEvent(result, cause, self._payment(work, tenant_id, result.payment_id))
            case CommandEvent(command=BookPayment() as command, cause=cause):
                payment = self._payment(work, tenant_id, command.payment_id)
                return CommandEvent(command, cause, payment)
            case _:
                return event

    def _payment(self, work: Work, tenant_id: str, payment_id: str) -> Payment | None:
        key = payment_key(tenant_id, payment_id)
        payment = work.payments.get(key)
        if payment is None:
            value = self._rows.values.get(key)
            payment = None if value is None else self._decoded(decode_payment, key, value)
        return payment

    # -- announcing --------------------------------------------------------------------------

    def _announce(
        self, work: Work, key: bytes, outcome: Outcome, cause: Cause, headers: Headers
    ) -> None:
        """Keep the new account and add what there is to tell to the batch's outputs."""
        account = outcome.account
        if account is None and not outcome.notices:
            return
        if account is not None:
            # Free usage changes nothing and tells nothing; a refused command must be answered.
            if account is work.accounts.get(key) and not outcome.notices:
                return
            work.before.setdefault(key, None)
            work.accounts[key] = account
        tenant_id = key.decode()
        caused_by = f"{cause.source}/{cause.id}"
        traced = [header for header in headers if header[0] in TRACE_HEADERS] if headers else []
        if outcome.payment is not None:
            work.payments[payment_key(tenant_id, outcome.payment.payment_id)] = outcome.payment
        if outcome.entries:
            assert account is not None
            first = account.seq - len(outcome.entries) + 1
            for index, entry in enumerate(outcome.entries):
                work.outputs.append(
                    self._ledger_topic,
                    self.partition,
                    key,
                    entry,
                    [
                        *self._entry_headers,
                        ("ce_id", f"{tenant_id}/{first + index}".encode()),
                        (CAUSED_BY, caused_by.encode()),
                        *traced,
                    ],
                )
            for kind, nanos in outcome.moved:
                work.tally.moved(kind, account.currency, nanos)
        for request in outcome.requests:
            stamp = us_from(request.expires_at)
            work.outputs.append(
                self._names.of(topics.REQUESTED),
                self.partition,
                key,
                _encode(request),
                [
                    *binary_headers(
                        topics.REQUESTED,
                        source=self._settings.app_id,
                        event_id=f"{request.recharge_id}/{stamp}",
                        caused_by=caused_by,
                    ),
                    *traced,
                ],
            )
            work.tally.add("credits_recharge_requests_total", request.reason.value)
        for notice in outcome.notices:
            self._notify(work, key, notice, cause)
        if outcome.withheld is not None:
            work.tally.add("credits_recharges_withheld_total", outcome.withheld.value)

    def _notify(self, work: Work, key: bytes, notice: Notice, cause: Cause) -> None:
        work.notices += 1
        place = f"{cause.topic}/{cause.partition}/{cause.offset}"
        if cause.topic == "tick":
            place = f"tick/{cause.id}"
        work.outputs.append(
            self._names.of(topics.NOTIFICATION),
            self.partition,
            key,
            _encode(notice),
            binary_headers(
                topics.NOTIFICATION,
                source=self._settings.app_id,
                event_id=f"{notice.tenant_id}/{place}/{work.notices}",
                caused_by=f"{cause.source}/{cause.id}",
            ),
        )

    def _repeat(self, work: Work, candidate: _Candidate, *, conflict: bool) -> str:
        """An id we have booked: counted when it says the same, a dead letter when it does not."""
        command = candidate.decoded.event if candidate.topic == topics.COMMAND else None
        if conflict:
            self._bury(work, candidate.record, candidate.topic, DeadLetterReason.CONFLICT, "")
        if command is not None:
            account = self._account(work, candidate.record.key)
            notice = Notice(
                notice=NoticeKind.COMMAND_REFUSED if conflict else NoticeKind.COMMAND_REPEATED,
                tenant_id=candidate.decoded.tenant_id,
                at=work.now,
                caused_by=f"{candidate.cause.source}/{candidate.cause.id}",
                command_id=candidate.decoded.id,
                rule="conflict" if conflict else "repeated",
                fix="This id was used for another command; make a new one."
                if conflict
                else "The first answer stands.",
                version=None if account is None else account.settings_version,
            )
            self._notify(work, candidate.record.key, notice, candidate.cause)
        return "conflict" if conflict else "duplicate"

    def _bury(
        self, work: Work, record: Any, topic: str, reason: DeadLetterReason, path: str
    ) -> None:
        """Into the dead letters, byte for byte, with the reason in headers."""
        headers = list(record.headers or ())
        attempt = next((text for name, text in headers if name == "credits-dlq-attempt"), b"1")
        kept = [header for header in headers if not header[0].startswith("credits-dlq-")]
        work.outputs.append(
            self._names.of(topics.dead_letters_of(topic)),
            self.partition,
            record.key,
            record.value,
            [
                *kept,
                ("credits-dlq-topic", self._names.of(topic).encode()),
                ("credits-dlq-partition", str(self.partition).encode()),
                ("credits-dlq-offset", str(record.offset).encode()),
                ("credits-dlq-timestamp", str(record.timestamp).encode()),
                ("credits-dlq-reason", reason.value.encode()),
                ("credits-dlq-path", path.encode()),
                ("credits-dlq-attempt", attempt),
                ("credits-dlq-app-version", VERSION.encode()),
                ("credits-dlq-failed-at", work.now.isoformat().encode()),
            ],
        )
        work.tally.add("credits_dead_letters_total", topic, reason.value)

    def _move(self, work: Work, record: Any, topic: str, target: int) -> None:
        """Publish a misplaced record again where its key belongs, value and headers unchanged."""
        headers = list(record.headers or ())
        size = (
            len(record.key)
            + len(record.value or b"")
            + sum(len(name) + len(text or b"") + 16 for name, text in headers)
        )
        moved_before = any(name == MOVED_FROM for name, _ in headers)
        if moved_before or size + MOVED_HEADROOM_BYTES > topics.MAX_RECORD_BYTES:
            self._bury(work, record, topic, DeadLetterReason.WRONG_PARTITION, "")
            work.tally.add("credits_events_total", topic, "rejected")
            return
        name = self._names.of(topic)
        work.outputs.append(
            name,
            target,
            record.key,
            record.value,
            [*headers, (MOVED_FROM, f"{name}/{self.partition}/{record.offset}".encode())],
        )
        work.tally.add("credits_events_total", topic, "moved")

    # -- closing a batch ---------------------------------------------------------------------

    def _close(self, work: Work, taken: Sequence[Slice]) -> None:
        """Rows, ids and position of a decided batch."""
        changelog = self._names.of(topics.CHANGELOG)
        balance = self._names.of(topics.BALANCE)
        totals = work.totals
        for key, account in work.accounts.items():
            before = work.before[key]
            if before is account:
                continue
            work.rows[key] = encode_row(account)
            if before is not None:
                totals.tenant(before.state, before.currency, before.balance_nanos, -1)
            totals.tenant(account.state, account.currency, account.balance_nanos, 1)
            public = ledger.public_balance(account, work.now)
            work.outputs.append(
                balance, self.partition, key, _encode(public), self._balance_headers(public)
            )
        for key, payment in work.payments.items():
            work.rows[key] = encode_payment(payment)
        for key, value in work.rows.items():
            totals.row(key, self._rows.values.get(key), value)
            work.outputs.append(changelog, self.partition, key, value)

        sources = dict(self._sources)
        for part in taken:
            last = part.records[-1]
            if last.offset >= sources[part.tp.topic].next:
                sources[part.tp.topic] = SourcePosition(
                    next=part.end,
                    last=last.offset,
                    timestamp=last.timestamp,
                    hash=record_hash(last.key, last.value),
                )
        if not work.rows and sources == self._sources:
            return
        seen_next = self._seen_next
        if work.fresh:
            value = seen.pack(
                ordinal=seen_next,
                ledger_from=self._ledger_end,
                now_us=us_from(work.now),
                fingerprints=list(work.fresh),
                checks=list(work.fresh.values()),
                weeks=work.weeks,
            )
            work.ids = seen.unpack(value)
            work.outputs.append(self._names.of(topics.SEEN), self.partition, b"ids", value)
            seen_next += 1
        work.position = Position(
            now=work.now,
            sources=sources,
            rows=totals.rows,
            digest=f"{totals.digest:016x}",
            balances={
                currency: (str(positive), str(negative))
                for currency, (positive, negative) in totals.balances.items()
            },
            tenants={state: count for state, count in totals.tenants.items() if count},
            seen_next=seen_next,
        )
        work.outputs.append(changelog, self.partition, POSITION_KEY, encode_position(work.position))

    def _balance_headers(self, public: Balance) -> list[tuple[str, bytes]]:
        return binary_headers(
            topics.BALANCE,
            source=self._settings.app_id,
            event_id=f"{public.tenant_id}/{public.seq}",
        )

    def _note_defect(self, defect: _DefectError) -> None:
        now = monotonic()
        self._defects = [at for at in self._defects if now - at < 60] + [now]
        if len(self._defects) > MOST_DEFECTS_A_MINUTE:
            raise GaveUpError(
                f"more than {MOST_DEFECTS_A_MINUTE} defects in a minute, the last a "
                f"{type(defect.cause).__name__}; this build must not go on"
            ) from defect.cause


def _event(decoded: Decoded, cause: Cause) -> Event:
    """What the core decides on. A tenant that only the envelope or the key named is filled in."""
    event = decoded.event
    if isinstance(event, (CallUsage, ConferenceUsage)):  # faster than a union
        return usage_event(event, cause)
    if isinstance(event, RechargeResult):
        return ResultEvent(event, cause)
    if event.tenant_id is None:
        event = msgspec.structs.replace(event, tenant_id=decoded.tenant_id)
    return CommandEvent(event, cause)
