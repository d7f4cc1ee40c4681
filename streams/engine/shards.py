"""All shards of one worker: who is owned, opened, kept, dropped; and one reader for them.

Faust tells of assignments; from there on the rules are these. Nothing is closed on revocation
but the gate: running batches settle, the rest is dropped. Which shards to give up is known on
assignment; one that stays is kept, for had anyone else owned it, its next commit would be
fenced. An error between begin and commit means opening again from Kafka.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final

import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError, KafkaError, OffsetOutOfRangeError
from msgspec import Struct

from schemas import topics
from streams.billing.outcomes import Terms
from streams.billing.rates import Decks
from streams.engine.deck_view import DeckView
from streams.engine.errors import (
    FencedError,
    GaveUpError,
    Stop,
    StoppedError,
    UnknownOutcomeError,
)
from streams.engine.kafka import NO_WRITES_NOW
from streams.engine.originals import Originals
from streams.engine.reader import Reader, Slice
from streams.engine.restore import HANGING_AFTER_S, Marks, OpenSince, open_since, outputs_of
from streams.engine.shard import Shard
from streams.metrics import Meters
from streams.settings import Settings

# More tables read beside one another are no sooner there, and take more memory.
READ_AT_ONCE: Final = 4
REOPEN_AFTER_S: Final = 1.0
FENCED_WAIT_S: Final = 30.0
# Twice within a day, it is no late request of a former owner any more.
FENCED_AGAIN_S: Final = 86_400.0
SETTLE_IN_REVOKE_S: Final = 8.0
SETTLE_ON_STOP_S: Final = 6.0
SAME_ERROR_LIMIT: Final = 3
WATCH_EVERY_S: Final = 1.0
LOST_SLICE_AFTER_S: Final = 5.0
# A source that has stood for so long may wait for a transaction that a producer has left open.
ASKED_AFTER_S: Final = 5.0
STALLED_AFTER_S: Final = 60.0
OUTPUTS_EVERY_S: Final = 5.0
OUTPUTS_WITHIN_S: Final = 3.0
BROKER_AWAY_AFTER_S: Final = 15.0
NO_MEMBER_AFTER_S: Final = 60.0
EXIT_GAVE_UP: Final = 70
TENANT_STATES: Final = ("idle", "requested", "cooling", "paused", "needs_approval", "closed")

_STOPS: Final = tuple((reason, reason.value) for reason in Stop)

log = structlog.get_logger("credits.shards")


class Loss(Struct, frozen=True):
    """An operator's word that a source's records are gone: go on from `offset`."""

    topic: str
    partition: int
    offset: int


def loss_from(text: str) -> Loss:
    """Read TOPIC:PARTITION:OFFSET. Raises ValueError."""
    topic, _, rest = text.rpartition(":")
    topic, _, partition = topic.rpartition(":")
    if not topic or not partition.isdecimal() or not rest.isdecimal():
        raise ValueError(f"{text!r} is not TOPIC:PARTITION:OFFSET")
    return Loss(topic, int(partition), int(rest))


# After these a shard is opened again.
_REOPENS: Final = (FencedError, UnknownOutcomeError, KafkaError, OSError)


class _Keeper:
    """One owned partition and the task that keeps its shard going."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.shard: Shard | None = None
        self.ready = False
        self.state = "opening"
        self.released = False
        self.stopped: StoppedError | None = None
        self.opened_at = -1.0
        self.task: asyncio.Task[None] | None = None
        self.errors: list[tuple[str, int]] = []
        # Why it is opened again; empty once it is open.
        self.trouble = ""
        # When somebody last took its transactional id although nobody else owns the partition.
        self.robbed_at = float("-inf")


class Shards:
    """The worker's side of the group: what Faust assigns is owned here."""

    def __init__(
        self,
        settings: Settings,
        *,
        meters: Meters,
        terms: Terms,
        losses: Iterable[Loss] = (),
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self._settings = settings
        self._meters = meters
        self._terms = terms
        self._losses = tuple(losses)
        self._wall = wall
        self._exit = exit_process
        self._marks = Marks(settings)
        self._originals = Originals(settings)
        self._reader = Reader(settings)
        # Open while this worker is in its group and knows the rate decks.
        self._gate = asyncio.Event()
        self._assigned = False
        self._decks = DeckView(settings, terms.tariff, self._use_decks, wall=wall)
        self._turns = asyncio.Semaphore(READ_AT_ONCE)
        names = settings.topics
        self._manifest_of = {names.of(name): name for name in topics.SOURCES}
        self._usage = [names.of(name) for name in topics.USAGE]
        self._keepers: dict[int, _Keeper] = {}
        self._generation = -1
        self._new_generation = asyncio.Event()
        self._assigned_at = -1.0
        self._stopping = False
        self._broker_seen_at = monotonic()
        self._broker_back_at = monotonic()
        self._member_at = monotonic()
        self._is_member: Callable[[], bool] = lambda: True
        self._watcher: asyncio.Task[None] | None = None
        self._farewells: set[asyncio.Future[Any]] = set()
        self._unfit: list[int] = []
        # When a producer's open transaction was last waited for, and when that was last told.
        self._waited_at: dict[TopicPartition, float] = {}
        self._wait_told_at: dict[TopicPartition, float] = {}
        # Output partitions with an open transaction.
        self._open: OpenSince = {}
        self._open_seen_at = 0.0
        self._outputs_at = float("-inf")
        self._open_told_at: dict[TopicPartition, float] = {}

    # -- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect. Opens nothing yet: that is for `assigned`."""
        await self._marks.start()
        await self._reader.start()
        await self._decks.start()
        self._watcher = asyncio.ensure_future(self._watch())

    async def stop(self) -> None:
        """End in order: no new batch, running ones settle, producers and reader stop."""
        self._stopping = True
        self._close_gate()
        if self._watcher is not None:
            self._watcher.cancel()
        await self._settle(SETTLE_ON_STOP_S)
        await asyncio.gather(*(self._release(keeper) for keeper in self._keepers.values()))
        self._keepers.clear()
        await asyncio.gather(*self._farewells)
        await self._decks.stop()
        await self._reader.stop()
        await self._marks.stop()
        await self._originals.stop()

    def give_up(self, why: str) -> None:
        """End the process (70): a supervisor starts a fresh one, Kafka has the truth."""
        log.error("gave_up", reason=why)
        self._exit(EXIT_GAVE_UP)

    def watch_group(self, is_member: Callable[[], bool]) -> None:
        """Be told by whom to ask whether this worker is in its group."""
        self._is_member = is_member

    # -- Faust's side ------------------------------------------------------------------------

    async def fetch(self) -> list[Slice]:
        """The next slices for the agent."""
        if not self._gate.is_set():
            await asyncio.sleep(0.05)
            return []
        try:
            return await self._reader.fetch()
        except OffsetOutOfRangeError as error:
            for tp in error.args[0] if error.args else ():
                self._reopen(tp.partition, f"the log of {tp.topic} no longer has our offset")
            await asyncio.sleep(0.1)
            return []
        except KafkaError as error:
            log.warning("fetch_failed", error=type(error).__name__)
            await asyncio.sleep(0.5)
            return []

    def deliver(self, part: Slice) -> None:
        """A slice came through the agent: give it to its shard."""
        keeper = self._keepers.get(part.tp.partition)
        if keeper is None or not keeper.ready or keeper.shard is None:
            self._meters["credits_slices_dropped_total", "old"].inc()
            self._reader.done(part)
            return
        keeper.shard.deliver(part)

    async def revoked(self) -> None:
        """A rebalance begins: settle, own nothing new, read nothing."""
        self._close_gate()
        self._reader.begin({}, set())
        for keeper in self._keepers.values():
            if keeper.shard is not None:
                keeper.shard.clear()
        for keeper in await self._settle(SETTLE_IN_REVOKE_S):
            log.warning("batch_did_not_settle", partition=keeper.partition)
            self._forget(keeper)

    def assigned(self, assignment: Iterable[Any], generation: int) -> None:
        """The assignment of a generation is known: give up, keep, open."""
        if self._stopping:
            return
        sources = set(self._settings.topics.sources)
        by_partition: dict[int, set[str]] = {}
        for tp in assignment:
            if tp.topic in sources:
                by_partition.setdefault(tp.partition, set()).add(tp.topic)
        # Where somebody has added partitions, keys have moved to where no balance is.
        most = self._settings.partitions
        self._unfit = sorted(
            p for p, names in by_partition.items() if names != sources or p >= most
        )
        if self._unfit:
            log.error("not_copartitioned", partitions=self._unfit)
            self._show_states()
            return
        self._generation = generation
        self._assigned_at = monotonic()
        for partition in set(self._keepers) - set(by_partition):
            farewell = asyncio.ensure_future(self._release(self._keepers.pop(partition)))
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)
        new = sorted(set(by_partition) - set(self._keepers))
        for partition in new:
            keeper = self._keepers[partition] = _Keeper(partition)
            keeper.task = asyncio.ensure_future(self._keep(keeper))
        self._show_states()
        log.info("assigned", generation=generation, partitions=sorted(by_partition), new=new)
        signal, self._new_generation = self._new_generation, asyncio.Event()
        signal.set()
        self._assigned = True
        self._check_decks()
        self._begin_epoch()

    def _close_gate(self) -> None:
        self._assigned = False
        self._gate.clear()

    # -- rate decks --------------------------------------------------------------------------

    def _use_decks(self, decks: Decks) -> None:
        """Other versions are published: the next batch of every shard is decided by them."""
        self._terms = self._terms.with_decks(decks)
        for keeper in self._keepers.values():
            if keeper.shard is not None:
                keeper.shard.use(self._terms)

    def _check_decks(self) -> None:
        """Book only while the view of the decks is a good one: a version may be in force that is
        not read yet."""
        if not self._assigned:
            return
        if self._decks.is_old:
            if self._gate.is_set():
                log.error("decks_old", age_s=round(self._decks.age_s))
            self._gate.clear()
            # Nobody can book meanwhile; the minute for a stall begins anew.
            self._broker_back_at = monotonic()
        else:
            self._gate.set()

    # -- keeping shards ----------------------------------------------------------------------

    def _begin_epoch(self) -> None:
        positions: dict[TopicPartition, int] = {}
        held: set[TopicPartition] = set()
        for keeper in self._keepers.values():
            if not keeper.ready or keeper.shard is None:
                continue
            keeper.shard.clear()
            positions |= keeper.shard.positions()
            if not keeper.shard.caught_up():
                held |= self._usage_of(keeper.partition)
        self._reader.begin(positions, held)

    def _usage_of(self, partition: int) -> set[TopicPartition]:
        return {TopicPartition(name, partition) for name in self._usage}

    def _set_state(self, keeper: _Keeper, state: str) -> None:
        keeper.state = state
        self._show_states()

    def _show_states(self) -> None:
        keepers = self._keepers.values()
        states = [keeper.state for keeper in keepers]
        for name in ("opening", "ready", "reopening", "fenced", "stopped"):
            self._meters["credits_shards", name].set(states.count(name))
        reasons = {keeper.stopped.reason for keeper in keepers if keeper.stopped is not None}
        if self._unfit:
            reasons.add(Stop.NOT_COPARTITIONED)
        for reason, word in _STOPS:
            self._meters["credits_shard_stopped", word].set(int(reason in reasons))

    def _forget(self, keeper: _Keeper) -> None:
        """Throw a keeper's shard away and let its task open another."""
        if keeper.task is not None:
            keeper.task.cancel()
        if keeper.shard is not None:
            keeper.shard.drop()
        keeper.shard = None
        keeper.ready = False
        keeper.task = asyncio.ensure_future(self._keep(keeper))

    def _reopen(self, partition: int, why: str) -> None:
        keeper = self._keepers.get(partition)
        if keeper is not None and keeper.ready:
            log.warning("reopening", partition=partition, reason=why)
            self._meters["credits_reopened_total", "offset_gone"].inc()
            self._forget(keeper)
            self._begin_epoch()

    async def _keep(self, keeper: _Keeper) -> None:
        """Open the partition's shard and keep it going until the partition is given up."""
        try:
            # A batch that fails while it settles must not open what is another worker's by now.
            while not keeper.released:
                await self._gate.wait()
                self._set_state(keeper, "opening")
                keeper.opened_at = monotonic()
                shard = keeper.shard = self._new_shard(keeper.partition)
                try:
                    await shard.open(self._turns)
                    await self._gate.wait()
                    # A cancellation can be lost: the client ends its tasks by cancelling them, and
                    # takes ours for theirs.
                    if keeper.shard is not shard:
                        return
                    keeper.ready = True
                    keeper.trouble = ""
                    self._set_state(keeper, "ready")
                    log.info(
                        "shard_open",
                        partition=keeper.partition,
                        rows=shard.row_count,
                        ids=shard.remembered,
                    )
                    self._begin_epoch()
                    await shard.run(self._gate, self._reader)
                except Exception as error:
                    # Of what is awaited together, one that fails in the turn in which we are
                    # cancelled is all that asyncio tells us.
                    if keeper.shard is not shard:
                        name = f"{type(error).__name__}: {error}"
                        log.warning("left_shard_failed", partition=keeper.partition, error=name)
                        return
                    if not isinstance(error, _REOPENS):
                        raise
                    await self._failed(keeper, shard, error)
        except StoppedError as error:
            keeper.stopped = error
            await self._dropped(keeper, "stopped")
            log.error("shard_stopped", partition=keeper.partition, reason=str(error))
        except GaveUpError as error:
            self.give_up(str(error))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("shard_failed", partition=keeper.partition)
            self.give_up(f"a defect in the engine: {type(error).__name__}")

    def _new_shard(self, partition: int) -> Shard:
        return Shard(
            self._settings,
            partition,
            marks=self._marks,
            originals=self._originals,
            meters=self._meters,
            terms=self._terms,
            accepted_losses={
                loss.topic: loss.offset for loss in self._losses if loss.partition == partition
            },
            wall=self._wall,
        )

    async def _failed(self, keeper: _Keeper, shard: Shard, error: Exception) -> None:
        """Throw a shard away that has failed, and wait until it may be opened again."""
        if isinstance(error, FencedError):
            self._meters["credits_fenced_total",].inc()
            keeper.trouble = "its transactional id was taken or its transaction overdue"
            await self._dropped(keeper, "fenced")
            await self._after_fence(keeper, shard, overdue=error.overdue)
            return
        at = sum(shard.positions().values())
        await self._dropped(keeper, "reopening")
        self._count_error(keeper, error, at)
        await asyncio.sleep(REOPEN_AFTER_S)

    async def _dropped(self, keeper: _Keeper, state: str) -> None:
        shard, keeper.shard = keeper.shard, None
        keeper.ready = False
        if shard is not None:
            shard.drop()
        self._set_state(keeper, state)
        self._begin_epoch()

    async def _after_fence(self, keeper: _Keeper, shard: Shard, *, overdue: bool) -> None:
        """Who fenced us? After a rebalance we were away for: the former owner's successor, and
        the partition is ours again. In the middle of a generation: somebody with our id; or,
        when our transaction was overdue, the broker, if the partition is still ours by the time
        at which we would have learned that it is not.

        A former owner that was frozen while it opened may take the id once when it thaws, and then
        learns that the partition is not its own. Raises GaveUpError when it comes again, or when
        it is we who are out of the group.
        """
        fresh = max(keeper.opened_at, shard.committed_at) > self._assigned_at
        log.warning("fenced", partition=keeper.partition, waits=fresh, overdue=overdue)
        if not fresh:
            return
        generation = self._generation
        try:
            async with asyncio.timeout(
                self._settings.session_timeout_s if overdue else FENCED_WAIT_S
            ):
                while self._generation == generation:
                    await self._new_generation.wait()
        except TimeoutError:
            if overdue:
                return
            name = self._settings.transactional_id(keeper.partition)
            if not self._is_member():
                raise GaveUpError(
                    f"another process has taken the transactional id {name}, and this worker has "
                    "fallen out of its group: the partition is another's by now"
                ) from None
            if monotonic() - keeper.robbed_at > FENCED_AGAIN_S:
                keeper.robbed_at = monotonic()
                log.error("transactional_id_taken", partition=keeper.partition, id=name)
                return
            raise GaveUpError(
                f"another process has twice taken the transactional id {name} although this "
                "worker owns its partition: two installations with one CREDITS_NAMESPACE?"
            ) from None

    def _count_error(self, keeper: _Keeper, error: Exception, at: int) -> None:
        name = keeper.trouble = f"{type(error).__name__}: {error}"
        log.warning("reopening", partition=keeper.partition, reason=name)
        self._meters["credits_reopened_total", "error"].inc()
        keeper.errors = [*keeper.errors, (name, at)][-SAME_ERROR_LIMIT:]
        same = len(keeper.errors) == SAME_ERROR_LIMIT and len(set(keeper.errors)) == 1
        # A refused connection fails at once, three times within the seconds that the watch needs to
        # see that the broker is away; a fresh process would not reach it either, nor would a
        # partition without enough replicas take its writes.
        if isinstance(error.__cause__ or error, (KafkaConnectionError, *NO_WRITES_NOW)):
            return
        if same and monotonic() - self._broker_seen_at < 2 * WATCH_EVERY_S:
            raise GaveUpError(f"{name}, {SAME_ERROR_LIMIT} times at the same position")

    async def _settle(self, timeout_s: float) -> list[_Keeper]:
        """Wait for running batches; return the keepers whose batch did not end in time."""
        busy = [keeper for keeper in self._keepers.values() if keeper.shard is not None]
        settled = await asyncio.gather(
            *(keeper.shard.settle(timeout_s) for keeper in busy if keeper.shard is not None)
        )
        return [keeper for keeper, ended in zip(busy, settled, strict=True) if not ended]

    async def _release(self, keeper: _Keeper) -> None:
        """The partition is no longer ours."""
        keeper.released = True
        shard, keeper.shard = keeper.shard, None
        open_before, keeper.ready = keeper.ready, False
        settled = shard is None or await shard.settle(SETTLE_ON_STOP_S)
        if keeper.task is not None:
            keeper.task.cancel()
        if shard is not None:
            if settled and open_before:
                await shard.stop()
            else:
                shard.drop()

    # -- watching ----------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Lag, lost slices, stalls: what no single batch can see."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            self._check_decks()
            try:
                async with asyncio.timeout(10):
                    await self._look()
            except (KafkaError, TimeoutError, OSError) as error:
                log.warning("broker_away", error=type(error).__name__)
            except Exception as error:
                log.exception("watch_failed")
                self.give_up(f"a defect in the watch: {type(error).__name__}")

    async def _look(self) -> None:
        ready = [keeper for keeper in self._keepers.values() if keeper.ready and keeper.shard]
        tps = [tp for keeper in ready if keeper.shard for tp in keeper.shard.positions()]
        if not tps:
            # Without a shard to ask for, any partition will do: whether somebody answers is what
            # counts while they all open again.
            tps = [TopicPartition(self._settings.topics.sources[0], 0)]
        ends = await self._marks.ends(tps)
        now = monotonic()
        if now - self._broker_seen_at > BROKER_AWAY_AFTER_S:
            # Nobody could book while it was away; the minute for a stall begins anew.
            self._broker_back_at = now
        self._broker_seen_at = now
        if self._is_member():
            self._member_at = now
        oldest = 0.0
        rows = remembered = 0
        balances: dict[tuple[str, str], int] = {}
        tenants: dict[str, int] = {}
        drift: dict[str, int] = {}
        exposures: dict[str, int] = {}
        holds = 0
        oldest_request_s = 0.0
        for keeper in ready:
            shard = keeper.shard
            if shard is None:
                continue
            oldest = max(oldest, await self._look_at(keeper, shard, ends, now))
            rows += shard.row_count
            remembered += shard.remembered
            for currency, (positive, negative) in shard.totals.balances.items():
                for sign, nanos in (("positive", positive), ("negative", negative)):
                    balances[currency, sign] = balances.get((currency, sign), 0) + nanos
            for state, count in shard.totals.tenants.items():
                tenants[state] = tenants.get(state, 0) + count
            for currency, nanos in shard.totals.exposures.items():
                exposures[currency] = exposures.get(currency, 0) + nanos
            holds += shard.totals.holds
            for currency, nanos in shard.drift_nanos.items():
                drift[currency] = drift.get(currency, 0) + abs(nanos)
            oldest_request_s = max(oldest_request_s, shard.oldest_request_s())
        self._meters["credits_recharge_oldest_in_flight_seconds",].set(oldest_request_s)
        for currency, nanos in drift.items():
            self._meters["credits_conservation_drift", currency].set(nanos / 1_000_000_000)
        for currency, nanos in exposures.items():
            self._meters["credits_exposure", currency].set(nanos / 1_000_000_000)
        self._meters["credits_holds",].set(holds)
        self._publish(oldest, rows, remembered, balances, tenants)
        if now - self._outputs_at >= OUTPUTS_EVERY_S:
            self._outputs_at = now
            try:
                # The client waits long for a partition without a leader; the rest must not.
                async with asyncio.timeout(OUTPUTS_WITHIN_S):
                    await self._look_at_outputs([keeper.partition for keeper in ready], now)
            except (KafkaError, TimeoutError, OSError) as error:
                log.warning("outputs_not_seen", error=type(error).__name__)

    async def _look_at_outputs(self, partitions: Iterable[int], now: float) -> None:
        """Whether somebody else's open transaction hides what we write. It keeps us from nothing,
        but who reads committed records gets none that come after it."""
        tps = [tp for number in partitions for tp in outputs_of(self._settings, number)]
        if not tps:
            self._open = {}
        else:
            # In this order: what is open at the second answer was written before the first.
            ends = await self._marks.ends(tps)
            stable = await self._marks.stable_ends(tps)
            self._open = open_since(ends, stable, self._open, now)
        self._open_seen_at = now
        hanging = self._hanging()
        self._meters["credits_hanging_transactions",].set(len(hanging))
        self._open_told_at = {tp: at for tp, at in self._open_told_at.items() if tp in hanging}
        for tp, offset in hanging.items():
            if now - self._open_told_at.get(tp, float("-inf")) >= STALLED_AFTER_S:
                self._open_told_at[tp] = now
                log.error(
                    "output_transaction_open", topic=tp.topic, partition=tp.partition, offset=offset
                )

    def _hanging(self) -> dict[TopicPartition, int]:
        """Output partitions on which one transaction stays open, and the offset it begins at. Ours
        end by their time-out long before."""
        return {
            tp: begins
            for tp, (begins, since) in self._open.items()
            if self._open_seen_at - since > HANGING_AFTER_S
        }

    async def _look_at(
        self, keeper: _Keeper, shard: Shard, ends: Mapping[TopicPartition, int], now: float
    ) -> float:
        """One shard's lag, lost slices and stalls; for how long its worst source has stood."""
        held = self._usage_of(keeper.partition) if not shard.caught_up() else set()
        oldest = 0.0
        booked: dict[TopicPartition, int] = {}
        for tp, position in shard.positions().items():
            reached = booked[tp] = max(position, await self._reader.read_up_to(tp))
            shard.reached(tp, reached)
            behind = max(0, ends.get(tp, 0) - reached)
            self._lag(tp).set(behind)
            if not behind or tp in held:
                shard.moved_at[tp.topic] = now
                continue
            # Nobody books during a rebalance either, which may take a minute by itself.
            since = max(shard.moved_at[tp.topic], self._broker_back_at, self._assigned_at)
            stood = now - since
            oldest = max(oldest, stood)
            fetched = self._reader.in_flight(tp)
            if fetched and shard.idle and not shard.waiting and stood > LOST_SLICE_AFTER_S:
                # Nothing came after the lost slice, so no gap can show.
                self._meters["credits_slices_dropped_total", "lost"].inc()
                self._reader.seek(tp, position)
            if not self._gate.is_set() or stood <= ASKED_AFTER_S:
                continue
            if await self._waits_for_producer(tp, reached):
                self._waited_at[tp] = now
                # What that transaction hides is nothing that usage could wait for.
                shard.reached(tp, ends[tp])
                told_at = self._wait_told_at.get(tp, float("-inf"))
                if stood > STALLED_AFTER_S and now - told_at >= STALLED_AFTER_S:
                    self._wait_told_at[tp] = now
                    log.error(
                        "source_transaction_open",
                        topic=tp.topic,
                        partition=tp.partition,
                        offset=reached,
                        records_behind=behind,
                    )
                continue
            # What was left open may have ended just now, and much may have happened while we asked.
            stood = min(stood, now - self._waited_at.get(tp, float("-inf")))
            moved = not self._gate.is_set() or shard.positions().get(tp) != position
            if stood > STALLED_AFTER_S and not moved:
                self.give_up(
                    f"{tp.topic}/{tp.partition} has {behind} records waiting and nothing of it "
                    f"was booked for {STALLED_AFTER_S:.0f} s"
                )
        shard.lag.look(now, booked, {tp: ends[tp] for tp in booked if tp in ends})
        if held and shard.caught_up():
            self._reader.release_held(list(held))
        return oldest

    async def _waits_for_producer(self, tp: TopicPartition, reached: int) -> bool:
        """Whether all that is behind comes after a transaction that a producer has left open."""
        stable = await self._marks.stable_ends([tp])
        return reached >= stable[tp]

    def _publish(
        self,
        oldest: float,
        rows: int,
        remembered: int,
        balances: Mapping[tuple[str, str], int],
        tenants: Mapping[str, int],
    ) -> None:
        meters = self._meters
        meters["credits_oldest_unprocessed_seconds",].set(oldest)
        meters["credits_rows",].set(rows)
        meters["credits_remembered_ids",].set(remembered)
        meters["credits_recharges_in_flight",].set(tenants.get("requested", 0))
        for (currency, sign), nanos in balances.items():
            meters["credits_balance", currency, sign].set(nanos / 1_000_000_000)
        for state in TENANT_STATES:
            meters["credits_tenants", state].set(tenants.get(state, 0))

    def _lag(self, tp: TopicPartition) -> Any:
        manifest = self._manifest_of[tp.topic]
        return self._meters["credits_lag_records", manifest, str(tp.partition)]

    def reasons_not_ready(self) -> list[str]:
        """Why this worker is not ready; empty when it is."""
        reasons = []
        if self._unfit:
            reasons.append(
                f"not_copartitioned: partitions {self._unfit} lack a source topic, or are beyond "
                f"the {self._settings.partitions} of this installation"
            )
        if self._assigned_at < 0:
            reasons.append("no assignment yet")
        elif not self._assigned:
            reasons.append("rebalancing")
        if self._decks.is_old:
            reasons.append(f"rate decks were last read {self._decks.age_s:.0f} s ago")
        if monotonic() - self._broker_seen_at > BROKER_AWAY_AFTER_S:
            reasons.append("the broker is away")
        elif self._assigned_at >= 0:
            # Faust says nothing when it loses its place; others own our partitions by then.
            alone_s = self._broker_seen_at - max(self._member_at, self._broker_back_at)
            if alone_s > NO_MEMBER_AFTER_S:
                reasons.append(f"not a member of the group for {alone_s:.0f} s")
        for tp, offset in self._hanging().items():
            reasons.append(
                f"a transaction stays open on {tp.topic}/{tp.partition} at offset {offset}: who "
                "reads committed records gets none that come after it"
            )
        for keeper in self._keepers.values():
            if keeper.stopped is not None:
                reasons.append(f"partition {keeper.partition} {keeper.stopped}")
            elif not keeper.ready:
                why = keeper.trouble and f" after {keeper.trouble}"
                reasons.append(f"partition {keeper.partition} is {keeper.state}{why}")
        return reasons
