"""Clients of the model log that stand where aiokafka's stand, and the network between them.

Every request can be late, lost on the way there or back, or fail with and without effect. Like
aiokafka they retry what is lost by themselves; what a repeat does is for the broker to say. A
request that is under way arrives whatever becomes of the process that sent it.
"""

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import Context, ContextVar
from functools import partial
from types import SimpleNamespace, coroutine
from typing import Any, Final, TypeVar

from aiokafka import TopicPartition
from aiokafka.errors import (
    ConcurrentTransactions,
    IllegalOperation,
    IllegalStateError,
    InvalidProducerEpoch,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    OffsetOutOfRangeError,
    ProducerFenced,
    RequestTimedOutError,
)
from msgspec import Struct

from streams.engine.kafka import REQUEST_TIMEOUT_MS, TRANSACTION_TIMEOUT_MS
from streams.engine.record_batch import RecordBatch
from streams.settings import Settings
from tests.batches import records_of
from tests.simulation.log import Broker, Content, Record
from tests.simulation.loop import PROCESS, Process

T = TypeVar("T")

# What a request may be called in a fault.
REQUESTS: Final = ("init", "add", "produce", "offsets", "end", "fetch", "marks")


class Fault(Struct):
    """What the next request of a name meets. `how`: `lost` on the way there, `unanswered` (done,
    but the reply is lost; both are repeated after `s`), `fails` (an error, not done),
    `fails_done` (an error, but done), `slow` (the reply takes `s`)."""

    request: str
    how: str
    s: float = 0.0


class Network:
    """What lies between clients and broker. `jitter` of all requests take some time; the others
    none, but the loop turns all the same."""

    def __init__(self, broker: Broker, dice: random.Random, *, jitter: float = 0.0) -> None:
        self.broker = broker
        self.dice = dice
        self.jitter = jitter
        self.most_records = 1_000
        self.faults: list[Fault] = []
        self._still: dict[TopicPartition, tuple[int, int]] = {}
        self._still_answers = 0
        self.cut_until: dict[Process, float] = {}
        self.dead: set[Process] = set()
        self.tell: Callable[[str], None] | None = None

    def stand_still(self, answers: int) -> None:
        """A broker stops here and goes on later, still believing that it leads: so many questions
        will be answered by what it knows, each by chance."""
        self._still = {
            tp: (part.end, part.stable_end) for tp, part in self.broker.partitions.items()
        }
        self._still_answers = answers

    def ends_of_old(self, beyond: Mapping[TopicPartition, int] | None = None) -> Any:
        """Ends and stable ends as the broker knows them that stood still, if it is the one that is
        asked; None otherwise. `beyond`: it is asked only for records behind these offsets, and
        answers for those it does not have."""
        if not self._still_answers:
            return None
        if beyond is not None and all(
            offset <= self._still.get(tp, (0, 0))[0] for tp, offset in beyond.items()
        ):
            return None
        if self.dice.random() < 0.5:
            return None
        self._still_answers -= 1
        return self._still

    def _fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.request == request:
                self.faults.remove(fault)
                return fault
        return None

    def alive(self) -> bool:
        """Whether the process that runs is connected to anything at all."""
        process = PROCESS.get()
        return process is None or process not in self.dead

    async def ask(self, request: str, serve: Callable[[], T], what: str = "") -> T:
        """Send a request and wait for its answer. Raises what the broker raises, and
        KafkaConnectionError in a process that is gone."""
        process = PROCESS.get()
        while True:
            if process is not None:
                if process in self.dead:
                    raise KafkaConnectionError("the process is gone")
                if self.cut_until:
                    cut = self.cut_until.get(process, 0.0) - asyncio.get_running_loop().time()
                    if cut > 0:
                        await asyncio.sleep(cut)
                        continue
            fault = self._fault(request) if self.faults else None
            if self.tell is not None:
                met = "" if fault is None else f"   <- {fault.how} {fault.s:g} s"
                self.tell(f"{'-' if process is None else process.name} {request} {what}{met}")
            try:
                if fault is not None:
                    return await self._ask_in_vain(fault, serve)
                if self.jitter and self.dice.random() < self.jitter:
                    return await self._ask_slowly(serve, self._delay(), self._delay())
                answer = serve()
                await _turn()
                return answer
            except _AgainError:
                continue

    def _delay(self) -> float:
        return self.dice.choice((0.001, 0.005, 0.02, 0.1)) * self.dice.random()

    async def _ask_in_vain(self, fault: Fault, serve: Callable[[], T]) -> T:
        match fault.how:
            case "lost":
                await asyncio.sleep(fault.s)
                raise _AgainError
            case "unanswered":
                try:
                    serve()
                except KafkaError:
                    await asyncio.sleep(0)  # the refusal is lost like any other reply
                await asyncio.sleep(fault.s)
                raise _AgainError
            case "fails":
                await asyncio.sleep(0)
                raise RequestTimedOutError()
            case "fails_done":
                serve()
                await asyncio.sleep(0)
                raise RequestTimedOutError()
            case _:
                return await self._ask_slowly(serve, fault.s * self.dice.random(), fault.s)

    async def _ask_slowly(self, serve: Callable[[], T], there_s: float, back_s: float) -> T:
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[T] = loop.create_future()

        def answer(result: T | None, error: BaseException | None) -> None:
            if reply.done():
                return
            if error is not None:
                reply.set_exception(error)
            else:
                reply.set_result(result)  # type: ignore[arg-type]

        def arrive() -> None:
            result, refusal = None, None
            try:
                result = serve()
            except (KafkaError, AssertionError) as error:
                refusal = error
            loop.call_later(back_s, answer, result, refusal, context=_NOBODY)

        loop.call_later(there_s, arrive, context=_NOBODY)
        return await reply


@coroutine
def _turn() -> Iterator[None]:
    """Let the loop turn; `asyncio.sleep` takes longer to say the same."""
    yield


class _AgainError(Exception):
    """The request must be sent again."""


_NOBODY: Final = Context()
# The network of the run that is going on; clients are made deep inside the engine.
NETWORK: Final[ContextVar[Network]] = ContextVar("network")


# -- producing ---------------------------------------------------------------------------------


class Batch:
    """What `create_batch` gives: records of one partition."""

    def __init__(self, contents: list[Content] | None = None) -> None:
        self.contents: list[Content] = [] if contents is None else contents
        self._closed = False

    def append(
        self,
        *,
        timestamp: int,
        key: bytes | None,
        value: bytes | None,
        headers: Iterable[tuple[str, bytes]] = (),
    ) -> object:
        """Add a record; None when the batch is closed."""
        if self._closed:
            return None
        self.contents.append((key, value, tuple(headers), timestamp))
        return self

    def close(self) -> None:
        """Take no more records."""
        self._closed = True

    def record_count(self) -> int:
        """How many records it holds."""
        return len(self.contents)


class Written(Struct):
    """Where an acknowledged batch begins."""

    offset: int


class _Connections:
    async def close(self) -> None:
        """Nothing to close."""


class Producer:
    """A transactional producer, as much of it as the engine uses."""

    def __init__(self, transactional_id: str) -> None:
        self.client = _Connections()
        # Here the first error is the one that is raised; the client's own keeps it in there.
        self._txn_manager = None
        self._network = NETWORK.get()
        self._broker = self._network.broker
        self._loop = asyncio.get_running_loop()
        self._name = transactional_id
        self._closed = False
        self._identity = (-1, -1)
        self._failed: KafkaError | None = None
        self._open = False
        self._touched = False
        self._sequences: dict[TopicPartition, int] = {}
        self._added: set[TopicPartition] = set()
        self._waiting: list[tuple[TopicPartition, Batch, asyncio.Future[Any]]] = []
        self.sender_task: asyncio.Task[None] | None = None

    @property
    def _sender(self) -> "Producer":
        return self

    async def _ask(self, request: str, serve: Callable[[], T], what: str = "") -> T:
        """A request to the coordinator: it may have to wait for an earlier transaction's end."""
        while True:
            try:
                return await self._network.ask(request, serve, what)
            except ConcurrentTransactions:
                await self._broker.transaction_ended(self._name)
            except ProducerFenced as error:
                self._failed = error
                raise

    async def start(self) -> None:
        """InitProducerId."""
        timeout_s = TRANSACTION_TIMEOUT_MS / 1000
        self._identity = await self._ask(
            "init", lambda: self._broker.init_producer(self._name, timeout_s), self._name
        )
        self._sequences.clear()

    async def stop(self) -> None:
        """End; an open transaction stays open, as in aiokafka."""
        self._closed = True
        if self._network.alive():
            await asyncio.sleep(0)

    def unfenced(self) -> bool:
        """Whether no later producer has this id."""
        known = self._broker.transactions.get(self._name)
        return known is not None and (known.producer, known.epoch) == self._identity

    def create_batch(self) -> Batch:
        """An empty batch."""
        return Batch()

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed
        if not self._open:
            raise IllegalOperation("Not in the middle of a transaction")

    async def begin_transaction(self) -> None:
        """Only this client knows of it yet."""
        if self._failed is not None:
            raise self._failed
        assert not self._open, "Invalid state transition"
        await _turn()
        self._open = True
        self._touched = False
        self._added.clear()

    async def send_batch(
        self, batch: Batch | RecordBatch, topic: str, *, partition: int
    ) -> "asyncio.Future[Any]":
        """Queue a batch; the future ends when it is acknowledged."""
        self._check()
        if isinstance(batch, RecordBatch):
            batch = Batch(
                [
                    (record.key, record.value, tuple(record.headers), record.timestamp)
                    for record in records_of(batch)
                ]
            )
        acknowledged: asyncio.Future[Any] = self._loop.create_future()
        self._waiting.append((TopicPartition(topic, partition), batch, acknowledged))
        if self.sender_task is None or self.sender_task.done():
            self.sender_task = self._loop.create_task(self._send())
        return acknowledged

    async def send_and_wait(
        self, topic: str, value: bytes, *, key: bytes | None = None, partition: int = 0
    ) -> Any:
        """One record, acknowledged."""
        batch = Batch()
        batch.append(timestamp=self._broker.clock_ms(), key=key, value=value)
        return await (await self.send_batch(batch, topic, partition=partition))

    async def _send(self) -> None:
        """Add what is new to the transaction, then send to the leaders side by side."""
        await _turn()
        while self._waiting:
            sending: dict[int, list[tuple[TopicPartition, Batch, asyncio.Future[Any]]]] = {}
            left = []
            taken: set[TopicPartition] = set()
            for one in self._waiting:
                if one[0] in taken:
                    left.append(one)  # a second batch of a partition waits for the first
                else:
                    taken.add(one[0])
                    sending.setdefault(len(one[0].topic) % 2, []).append(one)
            self._waiting = left
            try:
                new = sorted(taken - self._added)
                if new:
                    await self._ask("add", partial(self._add, new), f"{len(new)} partitions")
                    self._added.update(new)
                    self._touched = True
            except KafkaError as error:
                _fail([one[2] for group in sending.values() for one in group], error)
                continue
            groups = list(sending.values())
            for group in groups[1:]:
                self._loop.create_task(self._produce(group))  # its process keeps it
            await self._produce(groups[0])

    def _add(self, tps: list[TopicPartition]) -> None:
        self._broker.add_partitions(self._name, *self._identity, tps)

    async def _produce(
        self, group: list[tuple[TopicPartition, Batch, asyncio.Future[Any]]]
    ) -> None:
        first = {tp: self._sequences.get(tp, 0) for tp, _, _ in group}

        def serve() -> list[int]:
            return [
                self._broker.append_in_transaction(
                    self._name, *self._identity, tp, batch.contents, first[tp]
                )
                for tp, batch, _ in group
            ]

        try:
            told = self._network.tell is not None
            offsets = await self._network.ask("produce", serve, _shown(group) if told else "")
        except KafkaError as error:
            self._failed = ProducerFenced() if isinstance(error, InvalidProducerEpoch) else error
            _fail([one[2] for one in group], self._failed)
            return
        for (tp, batch, acknowledged), offset in zip(group, offsets, strict=True):
            self._sequences[tp] = first[tp] + len(batch.contents)
            if not acknowledged.done():
                acknowledged.set_result(Written(offset))

    async def send_offsets_to_transaction(
        self, offsets: Mapping[TopicPartition, Any], group: str
    ) -> None:
        """Offsets that count from the commit on."""
        self._check()
        plain = {tp: getattr(one, "offset", one) for tp, one in offsets.items()}
        self._touched = True
        await self._ask(
            "offsets",
            lambda: self._broker.add_offsets(self._name, *self._identity, group, plain),
            _told(plain) if self._network.tell is not None else "",
        )

    async def commit_transaction(self) -> None:
        """Decide the transaction; its markers may come later."""
        await self._end(commit=True)

    async def abort_transaction(self) -> None:
        """Decide against the transaction."""
        await self._end(commit=False)

    async def _end(self, *, commit: bool) -> None:
        self._check()
        if self._touched:
            await self._ask(
                "end",
                lambda: self._broker.end_transaction(self._name, *self._identity, commit=commit),
                "commit" if commit else "abort",
            )
        self._open = False


def _shown(group: list[tuple[TopicPartition, Batch, asyncio.Future[Any]]]) -> str:
    return ", ".join(f"{tp.topic}/{tp.partition} +{len(batch.contents)}" for tp, batch, _ in group)


def _told(offsets: Mapping[TopicPartition, int]) -> str:
    return ", ".join(f"{tp.topic}/{tp.partition}={offset}" for tp, offset in offsets.items())


def _fail(waiting: list["asyncio.Future[Any]"], error: KafkaError) -> None:
    for one in waiting:
        if not one.done():
            one.set_exception(error)
            one.exception()  # who sent it may be gone; then nobody asks


# -- consuming ---------------------------------------------------------------------------------


class _Metadata:
    async def force_metadata_update(self) -> bool:
        """Everybody knows the leaders here; who answers all the same is the network's affair."""
        await asyncio.sleep(0)
        return True


class Consumer:
    """A consumer without group, as much of it as the engine uses."""

    def __init__(self, *, committed: bool) -> None:
        self._network = NETWORK.get()
        self._broker = self._network.broker
        self._loop = asyncio.get_running_loop()
        self._committed = committed
        self._positions: dict[TopicPartition, int] = {}
        self._moves = 0
        self._waiter: asyncio.Future[None] | None = None
        # Takes how long the broker may collect; the model hands out at once.
        self._fetcher = SimpleNamespace()
        self._client = _Metadata()

    async def start(self) -> None:
        """Connect."""
        await asyncio.sleep(0)

    async def stop(self) -> None:
        """Disconnect."""
        if self._network.alive():
            await asyncio.sleep(0)

    def assign(self, tps: Iterable[TopicPartition]) -> None:
        """Read these from now on; every position must be sought again."""
        self._positions = dict.fromkeys(tps, -1)
        self._moved()

    def unsubscribe(self) -> None:
        """Read nothing."""
        self.assign([])

    def seek(self, tp: TopicPartition, offset: int) -> None:
        """Go on reading at an offset; what was fetched before is void."""
        if tp not in self._positions:
            raise IllegalStateError(f"No current assignment for partition {tp}")
        self._positions[tp] = offset
        self._moved()

    def _moved(self) -> None:
        self._moves += 1
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def position(self, tp: TopicPartition) -> int:
        """The next offset that will be read."""
        if tp not in self._positions:
            raise IllegalStateError(f"Partition {tp} is not assigned")
        return self._positions[tp]

    async def getmany(
        self, *tps: TopicPartition, timeout_ms: int = 0, max_records: int | None = None
    ) -> dict[TopicPartition, list[Record]]:
        """Records of these partitions, or nothing after the time-out. What was fetched is handed
        out in one turn, unless its partition was sought meanwhile.

        Raises OffsetOutOfRangeError.
        """
        loop = self._loop
        deadline = loop.time() + timeout_ms / 1000
        while True:
            moves = self._moves
            wanted = {
                tp: self._positions[tp]
                for tp in sorted(tps or self._positions)
                if self._positions.get(tp, -1) >= 0
            }
            if self._something_to_say(wanted):
                most = min(self._network.most_records, max_records or self._network.most_records)
                fetched = await self._network.ask("fetch", lambda: self._fetch(wanted, most))  # noqa: B023
                if moves != self._moves:
                    continue  # void; it is not known of which partition, so all is fetched again
                found = {}
                for tp, (records, following) in fetched.items():
                    self._positions[tp] = following
                    if records:
                        found[tp] = records
                if found:
                    return found
                continue
            left = deadline - loop.time()
            if left <= 0 or not self._network.alive():
                if not self._network.alive():
                    raise KafkaConnectionError("the process is gone")
                return {}
            self._waiter = self._broker.wait_for_change(wanted)
            timer = loop.call_later(left, _wake, self._waiter)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter.cancel()
                self._waiter = None
            if not any(tp in self._positions for tp in tps):
                return {}

    def _something_to_say(self, wanted: Mapping[TopicPartition, int]) -> bool:
        """Whether the broker has records for these positions, or an error."""
        for tp, offset in wanted.items():
            part = self._broker.partitions[tp]
            if offset != part.end and (
                offset < (part.stable_end if self._committed else part.end)
                or not part.start <= offset <= part.end
            ):
                return True
        return False

    def _fetch(
        self, wanted: Mapping[TopicPartition, int], most: int
    ) -> dict[TopicPartition, tuple[list[Record], int]]:
        old = self._network.ends_of_old(wanted)
        if old is not None:
            raise OffsetOutOfRangeError(
                {tp: offset for tp, offset in wanted.items() if offset > old.get(tp, (0, 0))[0]}
            )
        return {
            tp: self._broker.partitions[tp].read(offset, committed=self._committed, most=most)
            for tp, offset in wanted.items()
        }

    async def beginning_offsets(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Log starts."""
        return await self._marks(lambda: {tp: self._broker.partitions[tp].start for tp in tps})

    async def end_offsets(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """High watermarks, or last stable offsets for one that reads committed."""

        def serve() -> dict[TopicPartition, int]:
            old = self._network.ends_of_old()
            if old is not None:
                return {tp: old.get(tp, (0, 0))[self._committed] for tp in tps}
            parts = {tp: self._broker.partitions[tp] for tp in tps}
            if self._committed:
                return {tp: part.stable_end for tp, part in parts.items()}
            return {tp: part.end for tp, part in parts.items()}

        return await self._marks(serve)

    async def _marks(self, serve: Callable[[], T]) -> T:
        # What `asyncio.timeout` does, which takes longer than the whole request.
        task = asyncio.current_task(self._loop)
        assert task is not None
        cancelled_before, late = task.cancelling(), False

        def give_up() -> None:
            nonlocal late
            late = True
            task.cancel()

        timer = self._loop.call_later(REQUEST_TIMEOUT_MS / 1000, give_up)
        try:
            return await self._network.ask("marks", serve)
        except asyncio.CancelledError as error:
            if late and task.cancelling() - 1 <= cancelled_before:
                raise KafkaTimeoutError("no offsets in time") from error
            raise
        finally:
            timer.cancel()
            if late:
                task.uncancel()


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


# -- where the engine makes its clients --------------------------------------------------------


def transactional_producer(settings: Settings, partition: int) -> Producer:
    """Stands for `streams.engine.kafka.transactional_producer`."""
    return Producer(settings.transactional_id(partition))


def source_reader(settings: Settings, *, committed: bool = True) -> Consumer:
    """Stands for `streams.engine.kafka.log_reader` where sources are read."""
    return Consumer(committed=committed)


def restore_reader(settings: Settings, *, committed: bool = True) -> Consumer:
    """Stands for `streams.engine.kafka.log_reader` where the table is read."""
    return Consumer(committed=committed)
