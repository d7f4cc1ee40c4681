"""Workers with one protection taken out: what the tests must notice.

Run as `python -m tests.broker.mutant worker` with MUTANT naming what is missing. Test-only: the
product has no such switches.
"""

import asyncio
import os
import secrets
import signal
from collections.abc import Callable
from typing import Any, Final

from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.producer.transaction_manager import TransactionManager

from streams.billing import account, parts
from streams.engine import batch, position, restore, seen, shard, shards, transaction, transport

# So many records are left until the numbers of a partition begin anew.
LEFT_OF_SEQUENCES: Final = 100
OLD_EPOCH_SEQUENCE: Final = 2**31 - LEFT_OF_SEQUENCES


def _replace(owner: Any, name: str, new: Any) -> None:
    setattr(owner, name, new)


def position_check() -> None:
    """Book records below the position again (and read the topics from their start)."""
    original = shard.Shard.positions

    def from_the_start(self: Any) -> Any:
        return dict.fromkeys(original(self), 0)

    def chained(self: Any, taken: Any, _: Any) -> list[Any]:
        for topic, source in list(self._sources.items()):
            self._sources[topic] = position.SourcePosition(next=0, last=source.last)
        return list(taken)

    _replace(shard.Shard, "positions", from_the_start)
    _replace(shard.Shard, "_chained", chained)
    seen_ids()


def seen_ids() -> None:
    """Recognise nothing: every repeat is new."""
    _replace(seen.Seen, "probe", lambda *_: {})


def offsets_first() -> None:
    """Commit the offsets in a transaction before that of the rows, and go by them. They are
    told with every batch, as they would be if they counted."""
    _replace(shard, "TELL_OFFSETS_EVERY_S", 0.0)
    original = transaction.Transactor.commit
    group_position: dict[Any, int] = {}

    async def split(self: Any, outputs: Any, offsets: Any) -> Any:
        await original(self, self.outputs(0), offsets)
        group_position.update(offsets)
        if os.environ.get("MUTANT_DIES") and sum(group_position.values()) > 500:
            os.kill(os.getpid(), signal.SIGKILL)
        return await original(self, outputs, {})

    _replace(transaction.Transactor, "commit", split)

    async def by_the_group(self: Any, *turn: Any) -> None:
        await opened(self, *turn)
        from aiokafka.admin import AIOKafkaAdminClient

        from streams.engine.kafka import connection

        admin = AIOKafkaAdminClient(**connection(self._settings))
        await admin.start()
        committed = await admin.list_consumer_group_offsets(self._settings.app_id)
        await admin.close()
        for tp, found in committed.items():
            if tp.partition == self.partition and tp.topic in self._sources and found.offset > 0:
                self._sources[tp.topic] = position.SourcePosition(next=found.offset)

    opened = shard.Shard.open
    _replace(shard.Shard, "open", by_the_group)


def broken_chain() -> None:
    """Lose a quarter of the slices of usage on the way, and take whatever comes after them."""
    keeps_chain = "MUTANT_KEEPS_CHAIN" in os.environ
    deliver = shards.Shards.deliver

    def lossy(self: Any, part: Any) -> None:
        if "usage" in part.tp.topic and secrets.randbelow(4) == 0:
            if not keeps_chain:
                self._reader.done(part)
            return
        deliver(self, part)

    def chained(self: Any, taken: Any, _: Any) -> list[Any]:
        return list(taken)

    _replace(shards.Shards, "deliver", lossy)
    if not keeps_chain:
        _replace(shard.Shard, "_chained", chained)


def fence() -> None:
    """Write without transactional id protection: a producer that cannot be fenced."""
    from streams.settings import Settings

    def unshared(self: Any, partition: int) -> str:
        return f"{self.app_id}-{partition}-{os.getpid()}"

    _replace(Settings, "transactional_id", unshared)


def silent_member() -> None:
    """Join the group and never poll: out of it after the poll interval, without a word."""
    join = GroupCoordinator.__init__

    def impatient(self: Any, *arguments: Any, **named: Any) -> None:
        join(self, *arguments, **{**named, "max_poll_interval_ms": 6_000})

    _replace(GroupCoordinator, "__init__", impatient)
    _replace(shards, "NO_MEMBER_AFTER_S", 5.0)
    if "MUTANT_POLLS" not in os.environ:
        _replace(transport, "_POLL_EVERY_S", 3_600.0)


def hangs() -> None:
    """Book nothing more after the first hundred records, and say nothing of it; be found out in
    eight seconds instead of a minute."""
    book = shard.Shard._book
    booked = 0

    async def stands(self: Any, taken: Any) -> Any:
        nonlocal booked
        booked += sum(len(part.records) for part in taken)
        if booked > 100:
            await asyncio.Event().wait()
        return await book(self, taken)

    _replace(shard.Shard, "_book", stands)
    _replace(shards, "STALLED_AFTER_S", 8.0)


def forgets_partitions() -> None:
    """Not a protection taken out: a leader that knows no topic when it assigns for the first time,
    as when its broker has just come back."""
    from faust.assignor.partition_assignor import PartitionAssignor

    assign = PartitionAssignor._perform_assignment
    calls = 0

    def forgetful(self: Any, cluster: Any, members: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            cluster._partitions.clear()
        return assign(self, cluster, members)

    _replace(PartitionAssignor, "_perform_assignment", forgetful)


def newer_rows() -> None:
    """Not a protection taken out: a later program, whose rows are of the next version and which
    reads those of this one. Mutants run from source: compiled code has the number in it."""
    encode, version = account.encode_row, parts.VERSION + 1
    _replace(account, "VERSION", version)
    _replace(batch, "encode_row", lambda one: encode(one.changed(version=version)))


def impatient() -> None:
    """Not a protection taken out: a transaction that is open for three seconds hangs."""
    for module in (restore, shards):
        _replace(module, "HANGING_AFTER_S", 3)
    _replace(shards, "OUTPUTS_EVERY_S", 0.5)


def old_epoch() -> None:
    """Not a protection taken out: producers of a first epoch number their records as if they had
    written for days."""
    number = TransactionManager.sequence_number

    def late(self: Any, tp: Any) -> Any:
        if self.producer_epoch == 0 and tp not in self._sequence_numbers:
            self._sequence_numbers[tp] = OLD_EPOCH_SEQUENCE
        return number(self, tp)

    _replace(TransactionManager, "sequence_number", late)


MUTANTS: Final[dict[str, Callable[[], None]]] = {
    "position_check": position_check,
    "seen_ids": seen_ids,
    "offsets_first": offsets_first,
    "broken_chain": broken_chain,
    "fence": fence,
    "silent_member": silent_member,
    "hangs": hangs,
    "forgets_partitions": forgets_partitions,
    "newer_rows": newer_rows,
    "old_epoch": old_epoch,
    "impatient": impatient,
}


def main() -> None:
    """Take one protection out and run the command line."""
    MUTANTS[os.environ["MUTANT"]]()
    from streams.cli import run

    run()


if __name__ == "__main__":
    main()
