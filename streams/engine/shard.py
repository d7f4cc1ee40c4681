"""The shard: owner of one partition of all source topics, its rows, ids, position and producer.

One batch at a time: decide everything (no other batch of this shard can come in between), write
it in one transaction, and only then let memory follow. After any error in between, memory and
producer are thrown away and read again from Kafka, which alone knows what happened.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, Final

import msgspec
import structlog
from aiokafka import TopicPartition

from schemas import topics
from schemas.topics import Names
from streams.billing.outcomes import Terms
from streams.billing.parts import microseconds
from streams.engine.batch import Decider, DefectError
from streams.engine.errors import (
    FencedError,
    GaveUpError,
    Stop,
    StoppedError,
    UnknownOutcomeError,
)
from streams.engine.identity import EPOCH
from streams.engine.lag import Lag
from streams.engine.originals import Originals, wanted_by
from streams.engine.position import Position, SeenMark, SourcePosition
from streams.engine.reader import FULL_BYTES, Reader, Slice, split
from streams.engine.restore import (
    NO_TURN,
    Marks,
    check_sources,
    clock_back_by,
    restore,
    restored_from,
)
from streams.engine.rows import NEVER, Rows, Totals
from streams.engine.seen import Seen
from streams.engine.transaction import Transactor
from streams.engine.unanswered import Unanswered
from streams.engine.work import Candidate, Skipped, Work, fingerprints_of
from streams.metrics import Meters
from streams.settings import Settings

log = structlog.get_logger("credits.shards")

# The loop must turn: heartbeats, the metrics listener and the other shards wait for it.
YIELD_EVERY: Final = 2_000
# What a command or a result costs, in usage events.
COMMAND_COSTS: Final = 10
FULL_BATCH: Final = 4_096
# Records of a batch for which its transaction is most of the cost: the next one waits twice as
# long. Fewer would only be late, and more pay for a transaction of their own.
WAITS_TWICE: Final = range(4, 64)
MOST_RECORDS: Final = 20_000
MOST_TICKS: Final = 2_000
IDLE_TICK_S: Final = 1.0
MOST_DEFECTS_A_MINUTE: Final = 10
# How long the group's offsets may be behind the position row.
TELL_OFFSETS_EVERY_S: Final = 0.5
TELL_OFFSETS_WITHIN_S: Final = 2.0
# Further behind than this, a balance is too old to ask for money by it.
STALE_AFTER_S: Final = 60.0
# No instant is finer.
_A_LITTLE: Final = timedelta(microseconds=1)


class Shard:
    """One partition's owner. See the module's text; `run` is its life."""

    def __init__(
        self,
        settings: Settings,
        partition: int,
        *,
        marks: Marks,
        originals: Originals,
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
        self._places = {topic: TopicPartition(topic, partition) for topic in self._manifest_of}
        self._ranks = {name: rank for rank, name in enumerate(self._manifest_of)}
        self._marks = marks
        self._originals = originals
        self._meters = meters
        self._accepted_losses = accepted_losses
        self._wall = wall
        self._transactor = Transactor(settings, partition)
        self._decider = Decider(settings, partition)
        self._terms = terms
        self._stale_terms = terms.while_behind()
        self._inbox: list[Slice] = []
        self._wake = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._rows = Rows()
        self._decider.rows = self._rows.values
        self._seen = Seen()
        self._totals = Totals()
        self._unanswered = Unanswered()
        self.lag = Lag(monotonic())
        # Change of the balances minus entries written, by currency; anything but 0 is a defect.
        self.drift_nanos: dict[str, int] = {}
        self._sources: dict[str, SourcePosition] = {}
        self._now = EPOCH
        self._seen_next = 0
        self._seen_marks: tuple[SeenMark, ...] = ()
        self._ledger_end = 0
        self._defects: list[float] = []
        self._lingers_until = 0.0
        self._told: dict[str, int] = {}
        self._told_at = 0.0
        self._catch_up: dict[TopicPartition, int] = {}

    # -- opening -----------------------------------------------------------------------------

    async def open(self, turn: AbstractAsyncContextManager[Any] = NO_TURN) -> None:
        """Fence, restore, check the sources. `turn` is taken while the table is read, and not
        while a broker that cannot write now is waited for. Raises StoppedError, FencedError,
        UnknownOutcomeError."""
        started = monotonic()
        await self._transactor.start()
        changelog, _, ledger = restored_from(self._settings, self.partition)
        # The ids are kept by age, and a record that nobody reads would move their log's start: what
        # they must reach is said by the position row.
        least = await self._transactor.barrier(
            [changelog, ledger], microseconds(self._wall()) // 1000
        )
        restored = await restore(
            self._settings, self.partition, self._marks, least, self._wall(), turn
        )
        self._rows, self._seen = restored.rows, restored.seen
        self._decider.rows = self._rows.values
        self.remember_recharges()
        self._ledger_end = restored.ledger_end
        tps = [TopicPartition(name, self.partition) for name in self._names.sources]
        starts = await self._marks.starts(tps)
        if restored.position is not None:
            position = restored.position
            self._sources = await self._sound_sources(position)
            self._totals = Totals.of(position)
            self._now = position.now
            self._seen_next = position.seen_next
            self._seen_marks = position.seen_marks
        for tp in tps:
            # A topic that was never read starts at its beginning, sought explicitly.
            self._sources.setdefault(tp.topic, SourcePosition(next=starts[tp]))
            self.moved_at[tp.topic] = monotonic()
        now = self.now()
        if restored.position is not None:
            # Nothing was booked since: that is how old the balances may be.
            away = now - restored.position.now
            self.lag = Lag(monotonic() - away.total_seconds())
        waiting = [
            TopicPartition(self._names.of(name), self.partition)
            for name in (topics.COMMAND, topics.RESULT)
        ]
        ends = await self._marks.ends(tps)
        self.lag.look(monotonic(), {tp: self.next_of(tp.topic) for tp in tps}, ends)
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

    def use(self, terms: Terms) -> None:
        """Decide by other terms from the next batch on."""
        self._terms = terms
        self._stale_terms = terms.while_behind()

    def next_of(self, topic: str) -> int:
        """The next offset of a source topic (its name on the cluster)."""
        return self._sources[topic].next

    def positions(self) -> dict[TopicPartition, int]:
        """Where to read every source topic from."""
        places = self._places
        return {
            places[topic]: source.next for topic, source in self._sources.items() if topic in places
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

    def remember_recharges(self) -> None:
        """Read from the rows what is in flight and what was withheld for a stale balance."""
        self._unanswered = Unanswered.of(self._rows.values, self._decider.account_of)

    def oldest_request_s(self) -> float:
        """For how long the oldest auto-recharge in flight has waited; 0 without any."""
        return self._unanswered.oldest_age(self._wall()).total_seconds()

    def stale_waits(self) -> bool:
        """Whether recharges were withheld for a stale balance that is a good one by now."""
        return bool(self._unanswered.stale) and not self._stale()

    def _stale(self) -> bool:
        return self.lag.seconds(monotonic()) > STALE_AFTER_S

    def caught_up(self) -> bool:
        """Whether the commands and results that waited on opening are booked."""
        return not self._catch_up

    def reached(self, tp: TopicPartition, offset: int) -> None:
        """A source is booked, or holds nothing that can be booked now, up to an offset."""
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
        if len(self._inbox) == 1 or self._full():  # else it lingers already
            self._wake.set()

    def clear(self) -> None:
        """Forget what waits: a rebalance has begun."""
        self._inbox.clear()

    async def settle(self, timeout_s: float) -> bool:
        """Wait for the running batch; False when it does not end in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._quiet.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Tell the group how far we came, and end the producer, in order or else by force."""
        offsets = self._untold(self._sources)
        try:
            if offsets:
                async with asyncio.timeout(TELL_OFFSETS_WITHIN_S):
                    await self._transactor.commit(self._transactor.outputs(0), offsets)
            await self._transactor.stop()
        except (FencedError, UnknownOutcomeError, TimeoutError):
            # They are a hint; whoever is next tells them after its first batch.
            self._transactor.drop()

    def drop(self) -> None:
        """Throw everything away at once; Kafka decides what became of an open batch."""
        self._transactor.drop()

    # -- booking -----------------------------------------------------------------------------

    def now(self) -> datetime:
        """The instant of the next batch: after that of the last, so that what a batch has decided
        can be told from what the others have.

        Raises StoppedError(`clock_skew`) when the wall clock is far behind it.
        """
        wall = self._wall()
        if clock_back_by(self._now, wall):
            raise StoppedError(
                Stop.CLOCK_SKEW,
                f"this machine's clock says {wall.isoformat()}, but a batch was booked at "
                f"{self._now.isoformat()}; correct the clock (NTP) and restart",
            )
        return max(wall, self._now + _A_LITTLE)

    async def run(self, gate: asyncio.Event, reader: Reader) -> None:
        """Book batch after batch for ever; none begins while `gate` is shut (rebalances).

        Raises what ends a shard's life: StoppedError, FencedError, UnknownOutcomeError,
        GaveUpError.
        """
        while True:
            await self._work_waits(gate)
            taken = self._take()
            self._quiet.clear()
            left: Sequence[Slice] = ()
            try:
                left = await self._book(self._chained(taken, reader))
            finally:
                self._quiet.set()
                # What the batch had to leave goes on being in flight.
                kept = {(part.tp, part.end) for part in left}
                for part in taken:
                    if (part.tp, part.end) not in kept:
                        reader.done(part)
            if left:
                self._inbox[:0] = left
                self._lingers_until = 0.0  # it has lingered already

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
        while True:
            await gate.wait()
            now = monotonic()
            lingered = self._lingers_until - now
            if self._inbox:
                if lingered <= 0 or self._full():
                    return
                timeout = lingered
            else:
                due = self._rows.next_due()
                wait_s = IDLE_TICK_S
                if due != NEVER:
                    wait_s = min(wait_s, (due - microseconds(self._wall())) / 1e6)
                if self._untold(self._sources):
                    wait_s = min(wait_s, self._told_at + TELL_OFFSETS_EVERY_S - now)
                if (wait_s <= 0 or self.stale_waits()) and lingered <= 0:
                    return
                timeout = max(wait_s, lingered, 0.001)
            self._wake.clear()
            # Not a time-out, which cancels and raises: it comes with nearly every batch.
            timer = asyncio.get_running_loop().call_later(timeout, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()

    def _full(self) -> bool:
        return (
            sum(part.size for part in self._inbox) >= FULL_BYTES
            or sum(len(part.records) for part in self._inbox) >= FULL_BATCH
        )

    def _take(self) -> list[Slice]:
        """Slices for one batch: commands, then results, then usage, each in its order."""
        if len(self._inbox) == 1:
            taken, self._inbox = self._inbox, []
            return taken
        waiting = sorted(self._inbox, key=lambda part: self._ranks[part.tp.topic])
        taken = []
        records = 0
        for part in waiting:
            if taken and records + len(part.records) > MOST_RECORDS:
                break
            taken.append(part)
            records += len(part.records)
        left = set(map(id, taken))
        self._inbox = [part for part in self._inbox if id(part) not in left]
        return taken

    async def _book(self, slices: Sequence[Slice]) -> Sequence[Slice]:
        """Book a batch; returns what must wait for the next one."""
        started = monotonic()
        work = await self._decide(slices)
        taken = work.taken
        if work.position is None:
            self._unanswered.stale.difference_update(work.caught_up)
            offsets = self._due_offsets(self._sources)
            if offsets:
                await self._transactor.commit(self._transactor.outputs(0), offsets)
                self._note_told(offsets)
            return work.left
        offsets = self._due_offsets(work.position.sources)
        committing = monotonic()
        ends = await self._transactor.commit(work.outputs, offsets)
        ended = monotonic()
        ledger = (self._names.of(topics.LEDGER), self.partition)
        self._ledger_end = ends.get(ledger, self._ledger_end)
        self._note_told(offsets)
        before = self._sources
        self._publish(work)
        times = 2 if sum(len(part.records) for part in taken) in WAITS_TWICE else 1
        self._lingers_until = started + self._settings.linger_ms / 1000 * times
        self.committed_at = ended
        if not taken:
            # What is due goes first, however long it takes; that is no standstill.
            self.moved_at |= {part.tp.topic: ended for part in work.left}
        for topic, source in work.position.sources.items():
            if source != before.get(topic):
                self.moved_at[topic] = ended
        self._meters["credits_transaction_seconds",].observe(ended - committing)
        self._meters["credits_batch_seconds",].observe(ended - started)
        if taken and taken[-1].records:
            age = microseconds(self._wall()) / 1e6 - taken[-1].records[-1].timestamp / 1000
            self._meters["credits_event_age_seconds",].observe(max(0.0, age))
        work.tally.publish(self._meters)
        return work.left

    def _untold(self, sources: Mapping[str, SourcePosition]) -> dict[TopicPartition, int]:
        """The offsets of the sources that the group has not been told.

        They are a hint for tools that show lag: the position row decides. Telling them with every
        transaction would cost two of its five requests, which is most of a small one.
        """
        told = self._told
        return {
            TopicPartition(topic, self.partition): source.next
            for topic, source in sources.items()
            if source.last >= 0 and told.get(topic) != source.next
        }

    def _due_offsets(self, sources: Mapping[str, SourcePosition]) -> dict[TopicPartition, int]:
        if monotonic() - self._told_at < TELL_OFFSETS_EVERY_S:
            return {}
        return self._untold(sources)

    def _note_told(self, offsets: dict[TopicPartition, int]) -> None:
        if offsets:
            self._told.update((tp.topic, offset) for tp, offset in offsets.items())
            self._told_at = monotonic()

    def _publish(self, work: Work) -> None:
        """Memory follows what is committed."""
        assert work.position is not None
        for key, value in work.rows.items():
            self._rows.put(key, value)
        self._decider.remember(work)
        if work.ids is not None:
            self._seen.remember(work.ids)
        self._seen.forget(work.now)
        self._unanswered.stale.difference_update(work.caught_up)
        for key, account in work.accounts.items():
            before = work.before[key]
            if before is not None and account.standing.recharging is before.standing.recharging:
                continue
            requested_at = self._unanswered.follow(key, account)
            if requested_at is not None:
                waited = work.now - requested_at
                self._meters["credits_recharge_duration_seconds",].observe(waited.total_seconds())
        for currency, sums in work.totals.balances.items():
            moved = sum(sums) - sum(self._totals.balances.get(currency, ()))
            drift = moved - work.tally.booked_nanos.get(currency, 0)
            self.drift_nanos[currency] = self.drift_nanos.get(currency, 0) + drift
        self._totals = work.totals
        self._sources = dict(work.position.sources)
        self._now = work.position.now
        self._seen_next = work.position.seen_next
        self._seen_marks = work.position.seen_marks

    # -- deciding ----------------------------------------------------------------------------

    async def _decide(self, slices: Sequence[Slice]) -> Work:
        now = self.now()
        terms = self._stale_terms if self._stale() else self._terms
        caught_up = [] if terms.stale else sorted(self._unanswered.stale)[:MOST_TICKS]
        skipped = Skipped()
        while True:
            outputs = self._transactor.outputs(microseconds(now) // 1000)
            work = Work(now, terms, outputs, self._totals.copy())
            try:
                due_rows = self._rows.due(microseconds(now), MOST_TICKS)
                self._decider.tick(work, due_rows, caught_up, skipped)
                if len(due_rows) < MOST_TICKS:
                    await self._decide_records(work, slices, skipped)
                else:
                    # More is due, and all of it goes before what has come.
                    work.left = list(slices)
                break
            except DefectError as defect:
                self._note_defect(defect)
                defect.skip(skipped)
        self._decider.close(
            work,
            work.taken,
            self._sources,
            seen_next=self._seen_next,
            seen_marks=self._seen_marks,
            ledger_from=self._ledger_end,
        )
        return work

    async def _decide_records(self, work: Work, slices: Sequence[Slice], skipped: Skipped) -> None:
        """Decide the slices, or as much of them as comes before a correction of what is in this
        very batch: that is not in the ledger yet."""
        reached = {topic: source.next for topic, source in self._sources.items()}
        at_once = 0
        for at, part in enumerate(slices):
            name = part.tp.topic
            topic = self._manifest_of[name]
            cost = 1 if topic in topics.USAGE else COMMAND_COSTS
            step = YIELD_EVERY // cost
            for first in range(0, len(part.records), step):
                records = part.records[first : first + step]
                at_once += len(records) * cost
                if at_once > YIELD_EVERY:
                    await asyncio.sleep(0)
                    at_once = len(records) * cost
                counts = dict(work.tally.counts)
                work.corrects = False
                candidates, fates = self._decider.read(work, topic, records, reached[name], skipped)
                known = self._seen.probe(fingerprints_of(candidates))
                if work.corrects:
                    cut = await self._find_originals(work, candidates, known)
                    if cut is not None:
                        # Read again without what is left for the next batch.
                        work.tally.counts = counts
                        before = [one for one in records if one.offset < cut]
                        candidates, fates = self._decider.read(
                            work, topic, before, reached[name], skipped
                        )
                        self._decider.apply(work, topic, candidates, fates, known)
                        part_taken, part_left = split(part, cut)
                        work.taken += [*slices[:at], *part_taken]
                        work.left += [part_left, *slices[at + 1 :]]
                        return
                self._decider.apply(work, topic, candidates, fates, known)
            reached[name] = max(reached[name], part.end)
        work.taken += slices

    async def _find_originals(
        self, work: Work, candidates: Sequence[Candidate], known: Mapping[int, int]
    ) -> int | None:
        """Read what the corrections among the candidates correct. Returns the offset at which the
        batch must end, if it must."""
        wanted = wanted_by(candidates, known, work.fresh, self._seen, self._ledger_end)
        if wanted.ranges:
            ledger = TopicPartition(self._names.of(topics.LEDGER), self.partition)
            work.originals |= await self._originals.read(ledger, wanted.ranges)
        return None if wanted.cut is None else int(candidates[wanted.cut].record.offset)

    def _note_defect(self, defect: DefectError) -> None:
        cause, now = defect.cause, monotonic()
        log.error("defect", partition=self.partition, place=defect.place, exc_info=cause)
        self._defects = [at for at in self._defects if now - at < 60] + [now]
        if len(self._defects) > MOST_DEFECTS_A_MINUTE:
            raise GaveUpError(
                f"more than {MOST_DEFECTS_A_MINUTE} defects in a minute, the last a "
                f"{type(cause).__name__}; this build must not go on"
            ) from cause
