"""One run of one schedule: workers (the engine's own `Shards`), their group, a payment service,
the model log, and what breaks.

A worker is a process of the loop: it can be killed or frozen after any of its turns. What Faust
does between the group and the engine (assignments, queues of slices that a rebalance clears)
stands here in a few lines; all else is the engine itself.
"""

import asyncio
import contextlib
import random
import traceback
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from aiokafka import TopicPartition
from aiokafka.errors import ConcurrentTransactions

from schemas import topics
from schemas.envelope import binary_headers
from schemas.funding import RechargeRequest
from streams.billing.outcomes import Terms
from streams.coverage import load_coverage
from streams.engine import (
    originals,
    reader,
    record_batch,
    restore,
    shard,
    shards,
    transaction,
)
from streams.engine.kafka import TRANSACTION_TIMEOUT_MS
from streams.engine.position import Position, decode_position
from streams.engine.reader import Slice
from streams.engine.rows import POSITION_KEY
from streams.engine.shards import Shards
from streams.metrics import Meters
from streams.settings import Settings
from streams.testbed import payments
from streams.testbed.auditor.records import home
from tests.simulation import clients, events
from tests.simulation.clients import NETWORK, Fault, Network
from tests.simulation.log import Broker, Partition, Record
from tests.simulation.loop import PROCESS, Loop, Process, StuckError
from tests.simulation.schedule import SLOTS, TENANTS, Schedule, Step

BEGAN: Final = datetime(2026, 3, 2, 10, 0, tzinfo=UTC)
_BEGAN_MS: Final = BEGAN.timestamp() * 1000
# All faults are over by then; what is not booked after this never will be.
BOOKED_WITHIN_S: Final = 300.0
SESSION_S: Final = 6.0
REJOIN_S: Final = 10.0
RESTART_S: Final = 1.0
# Errors of the engine's log that no schedule may cause: nothing is lost, nobody meddles.
_FORBIDDEN: Final = ("shard_stopped", "shard_failed", "watch_failed", "not_copartitioned", "defect")
# What of the engine's log is worth counting: schedules in which nothing happens prove nothing.
_COUNTED: Final = {
    "shard_open": "openings",
    "fenced": "fences",
    "reopening": "unknown outcomes",
    "batch_did_not_settle": "batches dropped hard",
    "gave_up": "exits",
}
_PAYING: Final = payments.Behaviour(
    decline=20, needs_action=5, never=5, duplicate=20, reorder=20, delay_ms=1_500
)
_REQUEST: Final = msgspec.json.Decoder(RechargeRequest)
_TERMS: Final = Terms(tariff=events.tariff(), result_timeout_s=8, coverage=load_coverage(None))


class FailedError(Exception):
    """The engine broke a promise. `what` names it, the text says how it showed."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(f"{what}: {text}")
        self.what = what


class Worker(Process):
    """A process that runs the engine for one worker."""

    def __init__(self, world: "World", name: str, slot: int) -> None:
        super().__init__(name)
        self.slot = slot
        self.world = world
        self.member = False
        self.queue: deque[Slice] = deque()
        self.arrived = asyncio.Event()
        self.flow = asyncio.Event()
        self.relieves: tuple[Worker, int] | None = None
        self.lose = 0
        self.again = 0
        self.started = False
        self.context = world.context.copy()
        self.context.run(PROCESS.set, self)
        began = BEGAN + timedelta(milliseconds=world.dice.randrange(-900, 900))
        now = world.loop.time
        self.shards = self.context.run(
            lambda: Shards(
                world.settings,
                meters=_UNREAD,
                terms=_TERMS,
                wall=lambda: began + timedelta(seconds=now()),
                exit_process=self.exits,
            )
        )
        self.shards.watch_group(lambda: self.member)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task of this process."""
        return self.world.loop.create_task(work, context=self.context)

    def exits(self, _: int) -> None:
        """The engine ended its process; a supervisor starts another."""
        if self not in self.world.network.dead:
            self.world.kill(self)
            self.world.restart_soon(self.slot)

    async def run(self) -> None:
        """What Faust does: start, then carry slices from the reader to the shards."""
        await self.shards.start()
        self.started = self.member = True
        self.world.regroup()
        self.start(self.deliver())
        while True:
            await self.flow.wait()  # Faust, too, stops carrying while the group assigns anew
            fetched = await self.shards.fetch()
            for part in fetched:
                if self.lose:
                    self.lose -= 1
                    self.world.say(f"{self.name} loses {_shown(part)}")
                    continue
                self.queue.append(part)
                if self.again:
                    self.again -= 1
                    self.queue.append(part)
            if self.queue:
                self.arrived.set()
                await asyncio.sleep(0)

    async def deliver(self) -> None:
        """The agent."""
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            while self.queue:
                part = self.queue.popleft()
                if self.world.trace is not None:
                    self.world.say(f"{self.name} takes {_shown(part)}")
                self.shards.deliver(part)

    async def revoked(self) -> None:
        """The group is about to assign anew."""
        self.flow.clear()
        await self.shards.revoked()

    async def assigned(self, numbers: list[int], generation: int) -> None:
        """What this worker owns from now on; its queues were cleared."""
        self.queue.clear()
        tps = [TopicPartition(name, p) for name in self.world.sources for p in numbers]
        self.shards.assigned(tps, generation)
        self.flow.set()
        if self.relieves is not None:
            (frozen, turns), self.relieves = self.relieves, None
            self.world.doom(self, turns, lambda _: self.world.thaw(frozen))


def _shown(part: Slice) -> str:
    return f"{part.tp.topic}/{part.tp.partition} [{part.follows}, {part.end}) epoch {part.epoch}"


class World:
    """See the module's text; `play` is the whole life of one."""

    def __init__(self, schedule: Schedule, *, trace: list[str] | None) -> None:
        self.schedule = schedule
        self.loop = Loop()
        self.context = copy_context()
        self.dice = random.Random(schedule.seed * 2 + 1)
        self.trace = trace
        self.settings = Settings(
            namespace="t-", partitions=schedule.partitions, linger_ms=20, result_timeout_s=8
        )
        self.broker = Broker(self.clock_ms)
        self.broker.append_time = frozenset({self.settings.topics.of(topics.SEEN)})
        self.network = Network(self.broker, self.dice, jitter=schedule.jitter)
        self.network.most_records = schedule.most
        self.network.tell = None if trace is None else self.say
        names = self.settings.topics
        self.names = {topic.name: names.of(topic.name) for topic in topics.MANIFEST}
        self.sources = names.sources
        self.workers: list[Worker] = []
        self.places: list[Worker | None] = [None] * SLOTS
        self.generation = 0
        self.failure: FailedError | None = None
        self.happened: Counter[str] = Counter()
        self._payments_due = 0
        # As far as the payment service has read the requests.
        self.asked_up_to: dict[TopicPartition, int] = {}
        self._paid: dict[int, int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._regroup = asyncio.Event()
        self._over = False
        self.homes = {tenant: home(tenant.encode(), schedule.partitions) for tenant in TENANTS}

    # -- small things --------------------------------------------------------------------------

    def wall(self) -> datetime:
        """The true time."""
        return BEGAN + timedelta(seconds=self.loop.time())

    def clock_ms(self) -> int:
        """The true time in ms since 1970."""
        return int(_BEGAN_MS + self.loop.time() * 1000)

    def say(self, text: str) -> None:
        """Note what happens, when somebody wants to know."""
        if self.trace is not None:
            self.trace.append(f"{self.loop.time():9.3f}  {text}")

    def fail(self, what: str, text: str) -> None:
        """The first failure counts."""
        self.say(f"FAILED {what}: {text}")
        if self.failure is None:
            self.failure = FailedError(what, text)

    def noticed(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """The engine has logged something."""
        process = PROCESS.get()
        assert process is not None
        if process in self.network.dead:
            return
        if self.trace is not None:
            said = " ".join(f"{name}={value}" for name, value in fields.items())
            self.say(f"{process.name} logs {level} {event} {said}")
        if event in _COUNTED:
            self.happened[_COUNTED[event]] += 1
        if level == "exception" and self.trace is not None:
            self.say(traceback.format_exc())
        if event in _FORBIDDEN or (event == "gave_up" and self._is_groundless(fields["reason"])):
            self.fail(event, str(fields))

    def _is_groundless(self, reason: str) -> bool:
        """Whether nothing in this schedule is a ground for a worker to give up like this."""
        if "another process" in reason:
            # Zombies that open once more can be it, or requests of those that are gone.
            fenced = any(step.do == "fence" for step in self.schedule.steps)
            return len(self.workers) == 1 and not fenced
        return "defect" in reason

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task of nobody's process."""
        task = self.loop.create_task(work, context=self.context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def source(self, topic: str, number: int) -> Partition:
        """One partition of a topic of the manifest."""
        return self.broker.partition(TopicPartition(self.names[topic], number))

    def send(
        self,
        topic: str,
        tenant: str,
        value: bytes,
        *,
        headers: tuple[tuple[str, bytes], ...] = (),
        partition: int | None = None,
    ) -> None:
        """Append to a source topic."""
        number = self.homes[tenant] if partition is None else partition
        if self.trace is not None:
            self.say(f"sent to {topic}/{number}: {value[:70].decode(errors='replace')}")
        content = (tenant.encode(), value, headers, self.clock_ms())
        self.broker.append(TopicPartition(self.names[topic], number), [content])

    # -- processes -----------------------------------------------------------------------------

    def start(self, slot: int) -> None:
        """Start a worker in a place, if none is there."""
        if self.places[slot] is not None:
            return
        worker = Worker(self, f"w{slot}.{len(self.workers)}", slot)
        self.say(f"{worker.name} starts")
        self.workers.append(worker)
        self.places[slot] = worker
        worker.start(worker.run())

    def kill(self, worker: Worker) -> None:
        """SIGKILL: nothing of it reaches the broker any more. Its tasks are unwound only so that
        Python does not complain about them."""
        if worker in self.network.dead:
            return
        self.say(f"{worker.name} is killed after {worker.turns} turns")
        self.happened["kills"] += not self._over
        self.network.dead.add(worker)
        if self.places[worker.slot] is worker:
            self.places[worker.slot] = None
        self.loop.thaw(worker)
        for task in list(worker.tasks):
            task.cancel()
        self._silent(worker)

    def freeze(self, worker: Worker) -> None:
        """SIGSTOP."""
        if worker in self.network.dead or worker.frozen:
            return
        self.say(f"{worker.name} is frozen after {worker.turns} turns")
        self.happened["freezes"] += 1
        worker.frozen = True
        self._silent(worker)

    def thaw(self, worker: Worker) -> None:
        """SIGCONT: it goes on as if nothing had happened, and learns of it a little later."""
        if worker.frozen:
            self.say(f"{worker.name} is thawed")
            self.loop.thaw(worker)
            if not worker.member:
                self.loop.call_later(
                    3 * self.dice.random(), self._rejoin, worker, context=self.context
                )

    def _rejoin(self, worker: Worker) -> None:
        if worker not in self.network.dead and not worker.frozen and not self._over:
            worker.member = True
            self.regroup()

    def _silent(self, worker: Worker) -> None:
        # A place in the group is lost after the session's time-out, not at once.
        after_s = SESSION_S * self.dice.choice((0.1, 1.0))
        self.loop.call_later(after_s, self._missed, worker, context=self.context)

    def _missed(self, worker: Worker) -> None:
        if worker.member and (worker.frozen or worker in self.network.dead):
            self.say(f"{worker.name} has left the group")
            worker.member = False
            self.regroup()

    def restart_soon(self, slot: int) -> None:
        """What a supervisor does with a worker that ended by itself."""
        self.loop.call_later(RESTART_S, self._restart, slot, context=self.context)

    def _restart(self, slot: int) -> None:
        if not self._over:
            self.start(slot)

    async def stop(self, worker: Worker) -> None:
        """SIGTERM."""
        self.say(f"{worker.name} stops")
        stopping = worker.start(worker.shards.stop())
        await asyncio.wait([stopping], timeout=30)
        if stopping.done() and not stopping.cancelled() and stopping.exception() is not None:
            error = stopping.exception()
            if worker not in self.network.dead:
                self.fail("stop", f"{type(error).__name__}: {error}")
        self.kill(worker)
        self._missed(worker)

    # -- the group -----------------------------------------------------------------------------

    def regroup(self) -> None:
        """A member has come or gone."""
        self._regroup.set()

    async def coordinate(self) -> None:
        """The eager protocol: everything is revoked, then everything is assigned."""
        while True:
            await self._regroup.wait()
            await asyncio.sleep(self.dice.choice((0.0, 0.05, 0.5)))
            self._regroup.clear()
            members = [worker for worker in self.workers if worker.member]
            if not members:
                continue
            leaving = {worker: worker.start(worker.revoked()) for worker in members}
            await asyncio.wait(leaving.values(), timeout=REJOIN_S)
            joined = []
            for worker, task in leaving.items():
                if task.done() and not worker.frozen and worker not in self.network.dead:
                    joined.append(worker)
                elif worker.member and (worker.frozen or worker in self.network.dead):
                    worker.member = False
                elif worker.member:
                    worker.member = False
                    self.loop.call_later(1.0, self._rejoin, worker, context=self.context)
            self.generation += 1
            self.dice.shuffle(joined)
            self.say(f"generation {self.generation}: {', '.join(w.name for w in joined)}")
            for place, worker in enumerate(joined):
                mine = [p for p in range(self.settings.partitions) if p % len(joined) == place]
                worker.start(worker.assigned(mine, self.generation))

    # -- the payment service -------------------------------------------------------------------

    async def pay(self) -> None:
        """Answer every request; a repeated request gets the same answers again."""
        numbers = range(self.settings.partitions)
        tps = [TopicPartition(self.names[topics.REQUESTED], number) for number in numbers]
        behaviour = msgspec.structs.replace(_PAYING, seed=self.schedule.seed)
        reached = self.asked_up_to = dict.fromkeys(tps, 0)
        while True:
            for tp in tps:
                records, reached[tp] = self.broker.partition(tp).read(
                    reached[tp], committed=True, most=1_000
                )
                for record in records:
                    for answer in payments.answers(_REQUEST.decode(record.value or b""), behaviour):
                        self._payments_due += 1
                        self.loop.call_later(
                            answer.delay_ms / 1000, self._answer, answer, context=self.context
                        )
            await self.broker.wait_for_change(tps)

    def _answer(self, answer: payments.Answer) -> None:
        self._payments_due -= 1
        result = answer.result
        members = msgspec.to_builtins(result)
        value = msgspec.json.encode({name: one for name, one in members.items() if one is not None})
        headers = binary_headers(
            topics.RESULT, source=payments.SOURCE, event_id=result.result_id or ""
        )
        self.send(topics.RESULT, result.tenant_id or "", value, headers=tuple(headers))

    # -- playing -------------------------------------------------------------------------------

    def play(self) -> None:
        """Run the schedule and judge it. Raises FailedError."""
        from tests.simulation import invariants

        self.context.run(NETWORK.set, self.network)
        self.loop.set_exception_handler(self._unhandled)
        task = self.loop.create_task(self._play(), context=self.context)
        with _engine_on_the_model(self):
            try:
                self.loop.run_until_complete(task)
            except StuckError as error:
                task.cancel()
                self.fail("stuck", str(error))
        if self.failure is None:
            invariants.check_log(self)
        if self.failure is not None:
            raise self.failure

    def _unhandled(self, _: Any, details: dict[str, Any]) -> None:
        error = details.get("exception")
        if "never retrieved" in details["message"]:
            return  # of a process that is gone
        self.fail("unhandled", f"{details['message']}: {type(error).__name__}: {error}")

    async def _play(self) -> None:
        try:
            self.spawn(self.coordinate())
            self.spawn(self.pay())
            self._open_tenants()
            await self.story()
        finally:
            self._over = True
            for worker in self.workers:
                self.kill(worker)
            for task in list(self._tasks):
                task.cancel()
            left = [task for worker in self.workers for task in worker.tasks if not task.done()]
            left += self._tasks
            if left:
                await asyncio.wait(left, timeout=200)
            # What was dropped hard is closed in tasks of its own; let the loop turn.
            await asyncio.sleep(0)

    def _open_tenants(self) -> None:
        for number, tenant in enumerate(TENANTS[: self.schedule.tenants]):
            words = ("open", "policy", "licences") if number else ("open", "policy")
            for place, word in enumerate(words):
                identity = 1_000 + 10 * number + place
                value = events.command(identity, word, tenant, BEGAN)
                self.send(topics.COMMAND, tenant, value)

    async def take(self, step: Step) -> None:
        """Do one step."""
        if self.trace is not None:
            self.say(f"STEP {step}")
        tenant = TENANTS[step.n % self.schedule.tenants]
        worker = self.places[step.slot]
        match step.do:
            case "usage" | "repeat":
                value = events.usage(step.n, tenant, BEGAN)
                self.send(events.topic_of(step.word), tenant, value)
            case "conflict":
                value = events.usage(step.n, tenant, BEGAN, conflict=True)
                self.send(events.topic_of(step.word), tenant, value)
            case "correct":
                value = events.correction(step.n, int(step.word), tenant, BEGAN)
                self.send(topics.CALL_USAGE, tenant, value)
            case "command":
                self.send(topics.COMMAND, tenant, events.command(step.n, step.word, tenant, BEGAN))
            case "junk":
                self.send(topics.CALL_USAGE, tenant, b"{broken")
            case "stray":
                value = events.usage(step.n, tenant, BEGAN)
                strayed = (self.homes[tenant] + 1) % self.settings.partitions
                self.send(topics.CALL_USAGE, tenant, value, partition=strayed)
            case "aborted":
                self._aborted_source(step.n, tenant)
            case "start":
                self.start(step.slot)
            case "rebalance":
                self.regroup()
            case "markers":
                longest = step.s
                self.broker.marker_delay = lambda: longest * self.dice.random()
            case "fence":
                name = self.settings.transactional_id(step.n)
                with contextlib.suppress(ConcurrentTransactions):
                    self.broker.init_producer(name)
                self.regroup()
            case "compact":
                for topic in (topics.CHANGELOG, topics.BALANCE):
                    self.source(topic, step.n).compact()
            case "rewind":
                group = self.broker.group(self.settings.app_id)
                group.offsets = dict.fromkeys(group.offsets, 0)
            case "still":
                self.network.stand_still(step.n)
            case "wait":
                pass
            case "lost" | "unanswered" | "fails" | "fails_done" | "slow":
                self.network.faults.append(Fault(step.word, step.do, step.s))
            case _ if worker is not None:
                self._to_worker(step, worker)

    def _to_worker(self, step: Step, worker: Worker) -> None:
        match step.do:
            case "kill":
                self.doom(worker, step.n, self.kill)
            case "freeze":
                self.doom(worker, step.n, self.freeze)
            case "thaw":
                self.thaw(worker)
            case "relieve":
                other = self.places[int(step.word)]
                if other is not None:
                    other.relieves = (worker, step.n)
            case "stop":
                if worker.started and not worker.frozen:
                    self.spawn(self.stop(worker))
            case "cut":
                self.network.cut_until[worker] = self.loop.time() + step.s
            case "lose":
                worker.lose += 1
            case "again":
                worker.again += 1
            case _:
                raise AssertionError(step)

    def doom(self, worker: Worker, turns: int, fate: Callable[[Worker], object]) -> None:
        """Something happens to a worker, or because of it, after so many turns of it."""
        worker.doomed_at = worker.turns + turns
        worker.doom = lambda: fate(worker)

    def _aborted_source(self, number: int, tenant: str) -> None:
        """A producer of usage that writes in transactions gives one up."""
        tp = TopicPartition(self.names[topics.CALL_USAGE], self.homes[tenant])
        name = f"pbx-{number}"
        identity = self.broker.init_producer(name)
        self.broker.add_partitions(name, *identity, [tp])
        value = events.usage(number, tenant, BEGAN)
        content = (tenant.encode(), value, (), self.clock_ms())
        self.broker.append_in_transaction(name, *identity, tp, [content], 0)
        self.broker.end_transaction(name, *identity, commit=False)

    async def story(self) -> None:
        """What happens, from the first step to the last worker's end."""
        await self.take_all(self.schedule.steps)
        if self.failure is None:
            await self.settle()

    async def take_all(self, steps: Iterable[Step]) -> None:
        """Take steps, up to the first failure."""
        for step in steps:
            if step.gap:
                await asyncio.sleep(step.gap)
            await self.take(step)
            if self.failure is not None:
                return

    async def settle(self) -> None:
        """Let everything get booked, look at the shards, and stop the workers."""
        from tests.simulation import invariants

        await self._calm()
        if self.failure is None:
            await invariants.check_live(self)
        await asyncio.gather(*(self.stop(one) for one in self.places if one and one.started))
        parts = self.broker.partitions.values()
        if any(part.stable_end < part.end for part in parts):
            # One that is stopped while it opens leaves its barrier to the broker.
            await asyncio.sleep(TRANSACTION_TIMEOUT_MS / 1000 + 1)

    # -- the end -------------------------------------------------------------------------------

    async def _calm(self) -> None:
        """Nothing breaks any more: everything must get booked."""
        self.say("from here on nothing breaks")
        self.network.faults.clear()
        self.network.stand_still(0)
        self.network.cut_until.clear()
        self.network.jitter = 0.0
        self.network.most_records = 1_000
        self.broker.marker_delay = lambda: 0.0
        for worker in self.workers:
            worker.doomed_at = -1
            worker.lose = worker.again = 0
            self.thaw(worker)
        deadline = self.loop.time() + BOOKED_WITHIN_S
        while True:
            self._staff()
            left = self.unbooked()
            if self.failure is not None or not left:
                return
            if self.loop.time() > deadline:
                self.fail("not_booked", ", ".join(left))
                return
            await asyncio.sleep(0.5)

    def _staff(self) -> None:
        if not any(self.places):
            self.start(0)

    def positions(self) -> dict[int, Position]:
        """The committed position rows."""
        found: dict[int, Position] = {}
        for number in range(self.settings.partitions):
            for record in self.source(topics.CHANGELOG, number).committed_backwards():
                if record.key == POSITION_KEY and record.value is not None:
                    found[number] = decode_position(record.value)
                    break
        return found

    def unbooked(self) -> list[str]:
        """What is not booked yet, said per source partition; payments on their way count too."""
        if self._payments_due:
            return [f"{self._payments_due} payments"]
        left = [
            f"{tp.topic}/{tp.partition} has an open transaction"
            for tp, part in self.broker.partitions.items()
            if part.stable_end < part.end
        ]
        if left:
            return left
        reached = self.positions()
        for number in range(self.settings.partitions):
            for name in self.sources:
                part = self.broker.partition(TopicPartition(name, number))
                last = next(part.committed_backwards(), None)
                if last is None:
                    continue
                position = reached.get(number)
                source = None if position is None else position.sources.get(name)
                if source is None or source.next <= last.offset:
                    at = 0 if source is None else source.next
                    left.append(f"{name}/{number} from {at} to {last.offset + 1}")
        return left

    def live(self) -> list[Worker]:
        """The workers that run and are in the group."""
        return [
            worker
            for worker in self.workers
            if worker.member and not worker.frozen and worker not in self.network.dead
        ]

    async def owner(self, number: int) -> shard.Shard:
        """The open, idle shard of a partition that nobody has fenced.

        One that was fenced while it had nothing to do learns of it with its next commit; so a
        record comes now and then. Raises FailedError when no shard turns up.
        """
        tp = TopicPartition(self.names[topics.CALL_USAGE], number)
        for wait in range(400):
            self._staff()
            for worker in self.live():
                keeper = worker.shards._keepers.get(number)
                found = None if keeper is None or not keeper.ready else keeper.shard
                if found is not None and found.idle:
                    producer: Any = found._transactor._producer
                    if producer is not None and producer.unfenced():
                        return found
            if wait % 40 == 0:
                self.broker.append(tp, [(None, b"{more", (), self.clock_ms())])
            await asyncio.sleep(0.25)
        raise FailedError("not_booked", f"no shard of partition {number} is ready")


class _Unread(Meters):
    """Metrics nobody looks at; the real ones take more time than the rest of a worker."""

    def __init__(self) -> None:
        """Nothing is registered."""

    def __getitem__(self, _: tuple[str, ...]) -> Any:
        return _NO_METER


class _NoMeter:
    def inc(self, _: float = 1) -> None:
        """Count nothing."""

    set = observe = inc


_NO_METER: Final = _NoMeter()
_UNREAD: Final = _Unread()


class _EngineLog:
    """Stands for the engine's logger."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, level: str) -> Callable[..., None]:
        return lambda event, **fields: self._world.noticed(level, event, fields)


class _NoDecks:
    """Stands for the view of published decks: there are none, and that is known at once."""

    is_old = False
    age_s = 0.0

    def __init__(self, *_: Any, **__: Any) -> None:
        """Needs nothing."""

    async def start(self) -> None:
        """Nothing to read."""

    stop = start


def _as_it_is(records: bytes, *, level: int) -> bytes:
    """Stands for a compression: of what becomes no shorter the engine keeps the original."""
    return records


@contextlib.contextmanager
def _engine_on_the_model(world: World) -> Iterator[None]:
    """Put the model's clients and clock where the engine reaches for the world's."""
    places: list[tuple[Any, str, Any]] = [
        (module, "monotonic", world.loop.time) for module in (shard, shards, restore, transaction)
    ]
    places += [
        (reader, "log_reader", clients.source_reader),
        (restore, "log_reader", clients.restore_reader),
        (originals, "log_reader", clients.restore_reader),
        (transaction, "transactional_producer", clients.transactional_producer),
        *((module, "log", _EngineLog(world)) for module in (shard, shards)),
        (shards, "DeckView", _NoDecks),
        # No broker keeps them here: that they can be compressed is for the tests of the batches.
        (record_batch, "lz4_encode", _as_it_is),
        # A poll that finds nothing costs turns and shows nothing.
        (reader, "_ROOM_WAIT_MS", 2_000),
        (reader, "_SILENCE_MS", 2_000),
        (reader, "_COLLECT_MS", 2_000),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, put in places:
        setattr(owner, name, put)
    try:
        yield
    finally:
        for owner, name, was in before:
            setattr(owner, name, was)


def run(schedule: Schedule, trace: list[str] | None = None) -> World:
    """Play a schedule to its end and judge it. Raises FailedError."""
    world = World(schedule, trace=trace)
    try:
        world.play()
    finally:
        world.loop.close()
    return world


__all__ = ["FailedError", "Record", "World", "run"]
