"""A model of Kafka's log with transactions: what a broker promises, in memory, without a network.

One replica, never lost. Partitions with control records, last stable offset, aborted records,
sequence numbers of idempotent producers; a transaction coordinator with epochs, markers that may
come late, and time-outs; group offsets with generations; compaction and deletion. The suite in
`test_kafka_model.py` runs on this and on a real broker.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import Context
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka.errors import (
    ConcurrentTransactions,
    IllegalGenerationError,
    InvalidProducerEpoch,
    InvalidTxnState,
    OffsetOutOfRangeError,
    OutOfOrderSequenceNumber,
    ProducerFenced,
)
from msgspec import Struct

Headers = tuple[tuple[str, bytes], ...]
# Key, value, headers and timestamp (ms) of a record that is to be appended.
Content = tuple[bytes | None, bytes | None, Headers, int]


class Record(Struct, frozen=True, gc=False):
    """A record as it stands in the log; `control` marks the end of a producer's transaction."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    producer: int = -1
    control: str = ""


class Producing(Struct):
    """What a partition knows of a producer: its epoch and its last batch, for a repeat of it."""

    epoch: int
    first_sequence: int
    next_sequence: int
    first_offset: int


class Partition:
    """One partition's log."""

    def __init__(self, topic: str, number: int) -> None:
        self.topic = topic
        self.number = number
        self.records: list[Record] = []
        self.start = 0
        self.end = 0
        self.aborted: set[int] = set()
        self._open: dict[int, list[int]] = {}
        self._producers: dict[int, Producing] = {}

    @property
    def stable_end(self) -> int:
        """Where the first open transaction begins, else the log's end."""
        if not self._open:
            return self.end
        return min(offsets[0] for offsets in self._open.values())

    def append(
        self,
        contents: Iterable[Content],
        *,
        producer: int = -1,
        epoch: int = -1,
        sequence: int = -1,
        transactional: bool = False,
    ) -> int:
        """Append a batch and return its first offset; a repeated batch is known by its sequence.

        Raises InvalidProducerEpoch, OutOfOrderSequenceNumber.
        """
        contents = list(contents)
        first = self.end
        if producer >= 0:
            known = self._producers.get(producer)
            if known is not None and epoch < known.epoch:
                raise InvalidProducerEpoch()
            if known is not None and epoch == known.epoch and known.next_sequence >= 0:
                if sequence == known.first_sequence < known.next_sequence:
                    return known.first_offset
                if sequence != known.next_sequence:
                    raise OutOfOrderSequenceNumber()
            elif sequence:
                raise OutOfOrderSequenceNumber()
            following = sequence + len(contents)
            self._producers[producer] = Producing(epoch, sequence, following, first)
        topic, number = self.topic, self.number
        self.records += [
            Record(topic, number, offset, timestamp, key, value, headers, producer)
            for offset, (key, value, headers, timestamp) in enumerate(contents, first)
        ]
        self.end += len(contents)
        if transactional:
            self._open.setdefault(producer, []).extend(range(first, self.end))
        return first

    def mark(self, producer: int, epoch: int, *, commit: bool, timestamp: int) -> None:
        """Write a control record: the transaction of a producer ends here."""
        written = self._open.pop(producer, [])
        if not commit:
            self.aborted.update(written)
        known = self._producers.get(producer)
        if known is None or epoch > known.epoch:
            # From its marker on a partition refuses the epochs before.
            self._producers[producer] = Producing(epoch, -1, -1, -1)
        ended = "commit" if commit else "abort"
        self.records.append(
            Record(self.topic, self.number, self.end, timestamp, None, None, (), producer, ended)
        )
        self.end += 1

    def read(self, offset: int, *, committed: bool, most: int) -> tuple[list[Record], int]:
        """Records from an offset on, and where to go on. Raises OffsetOutOfRangeError."""
        if not self.start <= offset <= self.end:
            raise OffsetOutOfRangeError({TopicPartition(self.topic, self.number): offset})
        end = self.stable_end if committed else self.end
        if offset >= end:
            return [], offset
        aborted = self.aborted if committed else _NONE
        records = self.records[self._place(offset) : self._place(end)]
        taken = [one for one in records if not one.control and one.offset not in aborted]
        if len(taken) > most:
            return taken[:most], taken[most - 1].offset + 1
        return taken, end

    def _place(self, offset: int) -> int:
        """How many records come before an offset."""
        records = self.records
        if not records or offset > records[-1].offset:
            return len(records)
        # Where nothing is missing behind it, which is nearly always, it need not be looked for.
        place = len(records) - (records[-1].offset + 1 - offset)
        if place >= 0 and records[place].offset == offset:
            return place
        return bisect_left(records, offset, key=_offset_of)

    def committed(self) -> list[Record]:
        """Every record a read_committed reader would get."""
        return self.read(self.start, committed=True, most=len(self.records))[0]

    def committed_backwards(self) -> Iterator[Record]:
        """The same from the last one on, for who looks for one that stands near the end."""
        stable = self.stable_end
        for record in reversed(self.records):
            if record.offset < stable and not record.control and record.offset not in self.aborted:
                yield record

    def delete_before(self, offset: int) -> None:
        """Move the log's start."""
        self.start = max(self.start, min(offset, self.end))
        self.records = [record for record in self.records if record.offset >= self.start]

    def compact(self) -> None:
        """Keep the last committed record of every key; what is not stable yet stays as it is."""
        stable = self.stable_end
        last: dict[bytes | None, int] = {}
        for record in self.records:
            if record.offset < stable and not record.control:
                if record.offset not in self.aborted:
                    last[record.key] = record.offset
        kept = set(last.values())
        self.records = [
            record
            for record in self.records
            if record.offset >= stable or record.control or record.offset in kept
        ]


_NONE: Final[frozenset[int]] = frozenset()


def _offset_of(record: Record) -> int:
    return record.offset


class _Partitions(dict[TopicPartition, Partition]):
    """Every partition that is asked for is there."""

    def __missing__(self, tp: TopicPartition) -> Partition:
        made = self[tp] = Partition(tp.topic, tp.partition)
        return made


# Where a transactional id stands. Plain words: a member of an enumeration takes long to look up.
EMPTY: Final = "empty"
ONGOING: Final = "ongoing"
COMMITTING: Final = "committing"
ABORTING: Final = "aborting"
COMMITTED: Final = "committed"
ABORTED: Final = "aborted"
_DECIDED: Final = (COMMITTING, ABORTING)


class Transaction:
    """What the coordinator keeps of one transactional id."""

    def __init__(self, producer: int) -> None:
        self.producer = producer
        self.epoch = -1
        self.timeout_s = 15.0
        self.state = EMPTY
        self.partitions: dict[TopicPartition, None] = {}
        self.offsets: dict[tuple[str, TopicPartition], int] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.ended: list[asyncio.Future[None]] = []


class Group(Struct):
    """A consumer group's offsets. A commit that names a generation must name the current one."""

    generation: int = 0
    offsets: dict[TopicPartition, int] = {}


class Broker:
    """The log and its coordinators. Nothing here waits; who calls sees the effect at once.

    `marker_delay` gives the seconds until a transaction's marker is written to a partition, in
    the order of the partitions; the reply to the end of a transaction does not wait for them.
    """

    def __init__(self, clock_ms: Callable[[], int] = lambda: 0) -> None:
        self.partitions = _Partitions()
        self.groups: dict[str, Group] = {}
        self.transactions: dict[str, Transaction] = {}
        self.marker_delay: Callable[[], float] = lambda: 0.0
        self.append_time: frozenset[str] = frozenset()
        self.clock_ms = clock_ms
        self._waiting: dict[asyncio.Future[None], frozenset[TopicPartition]] = {}

    def partition(self, tp: TopicPartition) -> Partition:
        """A partition; the model has every topic that is asked for."""
        return self.partitions[tp]

    # -- producing -----------------------------------------------------------------------------

    def append(self, tp: TopicPartition, contents: Sequence[Content], **producing: Any) -> int:
        """Append a batch; see Partition.append."""
        if tp.topic in self.append_time:
            now = self.clock_ms()
            contents = [(key, value, headers, now) for key, value, headers, _ in contents]
        first = self.partitions[tp].append(contents, **producing)
        self._changed(tp)
        return first

    def append_in_transaction(
        self,
        name: str,
        producer: int,
        epoch: int,
        tp: TopicPartition,
        contents: Sequence[Content],
        sequence: int,
    ) -> int:
        """Append to a partition that was added to the transaction of this producer and epoch.

        Raises InvalidProducerEpoch, InvalidTxnState.
        """
        transaction = self._known(name, producer, epoch)
        if transaction.state != ONGOING or tp not in transaction.partitions:
            raise InvalidTxnState()
        return self.append(
            tp, contents, producer=producer, epoch=epoch, sequence=sequence, transactional=True
        )

    # -- coordinating transactions ---------------------------------------------------------------

    def init_producer(self, name: str, timeout_s: float = 15.0) -> tuple[int, int]:
        """A producer id and a new epoch; earlier epochs are fenced, and what they left open is
        aborted first. Raises ConcurrentTransactions until that is done."""
        transaction = self.transactions.get(name)
        if transaction is None:
            transaction = self.transactions[name] = Transaction(1_000 + len(self.transactions))
        if transaction.state == ONGOING:
            transaction.epoch += 1
            self._end(transaction, commit=False)
        if transaction.state in _DECIDED:
            raise ConcurrentTransactions()
        transaction.epoch += 1
        transaction.state = EMPTY
        transaction.partitions.clear()
        transaction.offsets.clear()
        transaction.timeout_s = timeout_s
        return transaction.producer, transaction.epoch

    def add_partitions(
        self, name: str, producer: int, epoch: int, tps: Iterable[TopicPartition]
    ) -> None:
        """Begin a transaction, or let it reach further.

        Raises ProducerFenced, ConcurrentTransactions.
        """
        transaction = self._owned(name, producer, epoch)
        self._go_on(transaction)
        transaction.partitions.update(dict.fromkeys(tps))

    def add_offsets(
        self,
        name: str,
        producer: int,
        epoch: int,
        group: str,
        offsets: Mapping[TopicPartition, int],
    ) -> None:
        """Group offsets that count from the commit on. They carry no generation: only the
        transactional id protects them. Raises ProducerFenced, ConcurrentTransactions."""
        transaction = self._owned(name, producer, epoch)
        self._go_on(transaction)
        for tp, offset in offsets.items():
            transaction.offsets[group, tp] = offset

    def _go_on(self, transaction: Transaction) -> None:
        if transaction.state in _DECIDED:
            raise ConcurrentTransactions()
        if transaction.state != ONGOING:
            transaction.state = ONGOING
            transaction.partitions.clear()
            transaction.offsets.clear()
            transaction.timer = _later(transaction.timeout_s, self._expire, transaction)

    def end_transaction(self, name: str, producer: int, epoch: int, *, commit: bool) -> None:
        """Decide a transaction. Asked again it says the same. Raises ProducerFenced,
        ConcurrentTransactions, InvalidTxnState."""
        transaction = self._owned(name, producer, epoch)
        going = COMMITTING if commit else ABORTING
        if transaction.state in _DECIDED:
            if transaction.state == going:
                raise ConcurrentTransactions()
            raise InvalidTxnState()
        if transaction.state != ONGOING:
            if transaction.state == (COMMITTED if commit else ABORTED):
                return
            raise InvalidTxnState()
        self._end(transaction, commit=commit)

    def _expire(self, transaction: Transaction) -> None:
        if transaction.state == ONGOING:
            transaction.epoch += 1
            self._end(transaction, commit=False)

    def _end(self, transaction: Transaction, *, commit: bool) -> None:
        if transaction.timer is not None:
            transaction.timer.cancel()
            transaction.timer = None
        transaction.state = COMMITTING if commit else ABORTING
        left = dict(transaction.partitions)
        if not left:
            self._completed(transaction, commit=commit)
        for tp in list(left):
            delay_s = self.marker_delay()
            if delay_s:
                _later(delay_s, self._mark, transaction, tp, left, commit)
            else:
                self._mark(transaction, tp, left, commit)

    def _mark(
        self,
        transaction: Transaction,
        tp: TopicPartition,
        left: dict[TopicPartition, None],
        commit: bool,
    ) -> None:
        self.partitions[tp].mark(
            transaction.producer, transaction.epoch, commit=commit, timestamp=self.clock_ms()
        )
        del left[tp]
        if not left:
            self._completed(transaction, commit=commit)
        self._changed(tp)

    def _completed(self, transaction: Transaction, *, commit: bool) -> None:
        transaction.state = COMMITTED if commit else ABORTED
        if commit:
            for (group, tp), offset in transaction.offsets.items():
                self.group(group).offsets[tp] = offset
        waiting, transaction.ended = transaction.ended, []
        for one in waiting:
            if not one.done():
                one.set_result(None)

    def transaction_ended(self, name: str) -> asyncio.Future[None]:
        """Done when the markers of an id's decided transaction are written."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        transaction = self.transactions[name]
        if transaction.state in _DECIDED:
            transaction.ended.append(ended)
        else:
            ended.set_result(None)
        return ended

    def _known(self, name: str, producer: int, epoch: int) -> Transaction:
        transaction = self.transactions.get(name)
        if transaction is None or transaction.producer != producer or transaction.epoch != epoch:
            raise InvalidProducerEpoch()
        return transaction

    def _owned(self, name: str, producer: int, epoch: int) -> Transaction:
        try:
            return self._known(name, producer, epoch)
        except InvalidProducerEpoch:
            raise ProducerFenced() from None

    # -- groups --------------------------------------------------------------------------------

    def group(self, name: str) -> Group:
        """A consumer group, made when first asked for."""
        found = self.groups.get(name)
        if found is None:
            found = self.groups[name] = Group()
        return found

    def commit_offsets(
        self, group: str, offsets: Mapping[TopicPartition, int], generation: int = -1
    ) -> None:
        """Commit group offsets outside a transaction; a generation that is named must be the
        current one. Raises IllegalGenerationError."""
        found = self.group(group)
        if generation >= 0 and generation != found.generation:
            raise IllegalGenerationError()
        found.offsets.update(offsets)

    # -- reading -------------------------------------------------------------------------------

    def _changed(self, tp: TopicPartition) -> None:
        # A waiter is let go of in a turn of its own, not while this goes on.
        for waiter, tps in self._waiting.items():
            if tp in tps and not waiter.done():
                waiter.set_result(None)

    def wait_for_change(self, tps: Iterable[TopicPartition]) -> asyncio.Future[None]:
        """Done when one of the partitions has grown or become more stable."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = frozenset(tps)
        waiter.add_done_callback(lambda done: self._waiting.pop(done, None))
        return waiter


def _later(delay_s: float, call: Callable[..., object], *arguments: Any) -> asyncio.TimerHandle:
    # A context of nobody: the broker goes on when the process that asked is gone.
    return asyncio.get_running_loop().call_later(delay_s, call, *arguments, context=_NOBODY)


_NOBODY: Final = Context()
