"""The worker as the campaign runs it: the product, with named points at which it can be told to die
or to stand still, and a wall clock that can be set wrong.

Run as `python -m tests.chaos.worker worker`. CHAOS_FOLDER names a folder: a file `order` in it says
what happens where ("after_send kill 3": at the fourth time), and is renamed to `taken` the moment
before it happens; a file `clock` says by how many seconds the wall clock is off. CHAOS_GROUP makes
it a member of another consumer group, MUTANT takes a protection out (see tests/broker/mutant.py).
Test-only: the product has no such switches.
"""

import os
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import aiokafka.producer.sender
import faust
from aiokafka import AIOKafkaProducer

from streams.engine import restore, shards, transaction
from tests.broker.mutant import MUTANTS

BATCH_POINTS: Final = (
    "after_compute",
    "after_begin",
    "after_send",
    "after_offsets",
    "before_commit_returns",
    "after_commit",
)
RESTORE_POINTS: Final = ("restore_0", "restore_50", "restore_99")
REBALANCE_POINTS: Final = ("in_assignment", "in_revocation")
POINTS: Final = BATCH_POINTS + RESTORE_POINTS + REBALANCE_POINTS
SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
# A restore in small fetches, so that there is a middle to die in.
FETCH_BYTES: Final = 32_768


def order(folder: Path, point: str, action: str, passes: int = 0) -> None:
    """Tell the worker of a folder what shall happen at a point."""
    (folder / "taken").unlink(missing_ok=True)
    made = folder / "order.new"
    made.write_text(f"{point} {action} {passes}")
    made.rename(folder / "order")


def taken(folder: Path) -> bool:
    """Whether the order was carried out."""
    return (folder / "taken").exists()


class _Points:
    """Looks for an order at every point that is passed."""

    def __init__(self, folder: Path) -> None:
        self._order = folder / "order"
        self._taken = folder / "taken"
        self._passed = 0

    def reached(self, point: str) -> None:
        """A point is passed: carry out the order if there is one for it."""
        try:
            wanted, action, passes = self._order.read_text().split()
        except FileNotFoundError:
            return
        if wanted != point:
            return
        if self._passed < int(passes):
            self._passed += 1
            return
        self._passed = 0
        self._order.rename(self._taken)
        os.kill(os.getpid(), SIGNALS[action])


def _replace(owner: Any, name: str, new: Any) -> None:
    setattr(owner, name, new)


def _points_of_a_batch(points: _Points) -> None:
    commit = transaction.Transactor.commit
    begin = AIOKafkaProducer.begin_transaction
    offsets = AIOKafkaProducer.send_offsets_to_transaction
    answered = aiokafka.producer.sender.EndTxnHandler.handle_response

    async def committed(self: Any, *arguments: Any) -> dict[tuple[str, int], int]:
        points.reached("after_compute")
        ends = await commit(self, *arguments)
        points.reached("after_commit")
        return ends

    async def begun(self: Any) -> None:
        await begin(self)
        points.reached("after_begin")

    async def with_offsets(self: Any, *arguments: Any) -> None:
        points.reached("after_send")
        await offsets(self, *arguments)
        points.reached("after_offsets")

    def answer(self: Any, response: Any) -> Any:
        points.reached("before_commit_returns")
        return answered(self, response)

    _replace(transaction.Transactor, "commit", committed)
    _replace(AIOKafkaProducer, "begin_transaction", begun)
    _replace(AIOKafkaProducer, "send_offsets_to_transaction", with_offsets)
    _replace(aiokafka.producer.sender.EndTxnHandler, "handle_response", answer)


def _points_of_a_restore(points: _Points) -> None:
    records_of = restore.records_of

    async def watched(consumer: Any, ends: Any) -> AsyncIterator[Any]:
        total = sum(ends.values())
        done = dict.fromkeys(ends, 0)
        points.reached("restore_0")
        async for tp, records in records_of(consumer, ends):
            yield tp, records
            done[tp] = records[-1].offset + 1
            if total and sum(done.values()) >= total / 2:
                points.reached("restore_50")
        points.reached("restore_99")

    _replace(restore, "RESTORE_FETCH_BYTES", FETCH_BYTES)
    _replace(restore, "records_of", watched)


def _points_of_a_rebalance(points: _Points) -> None:
    assigned = shards.Shards.assigned
    settle = shards.Shards._settle

    def assigning(self: Any, *arguments: Any) -> None:
        assigned(self, *arguments)
        points.reached("in_assignment")

    async def settling(self: Any, timeout_s: float) -> Any:
        # The gate is shut and the slices are gone, but batches run.
        points.reached("in_revocation")
        return await settle(self, timeout_s)

    _replace(shards.Shards, "assigned", assigning)
    _replace(shards.Shards, "_settle", settling)


def _wrong_clock(path: Path) -> None:
    start = shards.Shards.__init__

    def wall() -> datetime:
        try:
            off = int(path.read_text() or "0")
        except FileNotFoundError:
            off = 0
        return datetime.now(UTC) + timedelta(seconds=off)

    def started(self: Any, *arguments: Any, **more: Any) -> None:
        start(self, *arguments, wall=wall, **more)

    _replace(shards.Shards, "__init__", started)


def _other_group(group: str) -> None:
    start = faust.App.__init__

    def started(self: Any, _: str, *arguments: Any, **more: Any) -> None:
        start(self, group, *arguments, **more)

    _replace(faust.App, "__init__", started)


def main() -> None:
    """Set the points up and run the command line."""
    folder = Path(os.environ["CHAOS_FOLDER"])
    points = _Points(folder)
    _points_of_a_batch(points)
    _points_of_a_restore(points)
    _points_of_a_rebalance(points)
    _wrong_clock(folder / "clock")
    if "CHAOS_GROUP" in os.environ:
        _other_group(os.environ["CHAOS_GROUP"])
    if "MUTANT" in os.environ:
        MUTANTS[os.environ["MUTANT"]]()
    from streams.cli import run

    run()


if __name__ == "__main__":
    main()
