"""Partitions are opened beside one another."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import RequestTimedOutError
from prometheus_client import CollectorRegistry

from streams.engine import reader, restore
from streams.engine import shards as module
from streams.engine.deck_view import DeckView
from streams.engine.errors import Stop, StoppedError
from streams.engine.shard import Shard
from streams.engine.shards import READ_AT_ONCE, Shards
from streams.engine.transaction import Transactor
from streams.metrics import Meters
from streams.settings import Settings
from tests.billing.builders import some_terms
from tests.broker.harness import until
from tests.simulation import clients
from tests.simulation.clients import NETWORK, Network
from tests.simulation.log import Broker

HEALTHY = 2


@contextlib.asynccontextmanager
async def assigned(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shards]:
    """The shards of a worker that owns all partitions of a model log and does not end."""
    NETWORK.set(Network(Broker(), random.Random(1)))
    monkeypatch.setattr(restore, "log_reader", clients.restore_reader)
    monkeypatch.setattr(reader, "log_reader", clients.source_reader)
    monkeypatch.setattr(DeckView, "is_old", False)
    ended: list[int] = []
    shards = Shards(
        settings,
        meters=Meters(CollectorRegistry()),
        terms=some_terms(),
        exit_process=ended.append,
    )
    await shards._marks.start()
    await shards._reader.start()
    numbers = range(settings.partitions)
    shards.assigned(
        [TopicPartition(name, number) for name in settings.topics.sources for number in numbers], 1
    )
    try:
        yield shards
        assert ended == []
    finally:
        await asyncio.gather(*(shards._release(keeper) for keeper in shards._keepers.values()))


async def test_partitions_that_wait_for_replicas_keep_no_other_from_opening(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More wait than may read at once, and they come first."""
    settings = Settings(partitions=READ_AT_ONCE + HEALTHY)

    async def starts(self: Transactor) -> None:
        if self._partition < READ_AT_ONCE:
            await asyncio.Event().wait()

    async def barrier(*_: object) -> dict[TopicPartition, int]:
        return {}

    monkeypatch.setattr(Transactor, "start", starts)
    monkeypatch.setattr(Transactor, "barrier", barrier)
    numbers = range(settings.partitions)
    async with assigned(settings, monkeypatch) as shards:
        await until(
            lambda: (
                [number for number in numbers if shards._keepers[number].ready]
                == [*numbers[READ_AT_ONCE:]]
            ),
            10,
        )


async def test_a_shard_that_fails_as_it_is_thrown_away_is_opened_once_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several acknowledgements one fails in the very turn in which the wait is cancelled."""
    opened: list[Shard] = []
    waits: list[list[asyncio.Future[None]]] = []

    async def opens(self: Shard, *_: object) -> None:
        opened.append(self)

    async def runs(*_: object) -> None:
        loop = asyncio.get_running_loop()
        waits.append([loop.create_future(), loop.create_future()])
        await asyncio.gather(*waits[-1])

    monkeypatch.setattr(Shard, "open", opens)
    monkeypatch.setattr(Shard, "run", runs)
    monkeypatch.setattr(module, "REOPEN_AFTER_S", 0)
    async with assigned(Settings(partitions=1), monkeypatch) as shards:
        await until(lambda: len(waits) == 1, 10)
        waits[0][0].set_exception(RequestTimedOutError())
        shards._reopen(0, "the log no longer has our offset")
        await until(lambda: len(waits) >= 2, 10)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(opened) == len(waits) == 2
        assert shards._keepers[0].shard is opened[1]


@pytest.mark.parametrize(
    "error", [None, StoppedError(Stop.STATE_LOST, "half of another's batch"), RuntimeError("what")]
)
async def test_a_shard_thrown_away_while_a_client_is_disconnected_does_not_go_on(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client swallows what cancels us while it waits for tasks of its own to end; what is
    found out then is nobody's business any more."""
    opened: list[Shard] = []
    ran: list[Shard] = []
    swallowed = asyncio.Event()

    async def opens(self: Shard, *_: object) -> None:
        opened.append(self)
        if len(opened) == 2:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            swallowed.set()
            if error is not None:
                raise error

    async def runs(self: Shard, *_: object) -> None:
        ran.append(self)
        await asyncio.Event().wait()

    monkeypatch.setattr(Shard, "open", opens)
    monkeypatch.setattr(Shard, "run", runs)
    async with assigned(Settings(partitions=1), monkeypatch) as shards:
        await until(lambda: len(ran) == 1, 10)
        keeper = shards._keepers[0]
        shards._forget(keeper)
        await until(lambda: len(opened) == 2, 10)
        shards._forget(keeper)
        await until(lambda: swallowed.is_set() and keeper.ready, 10)
        for _ in range(20):
            await asyncio.sleep(0)
        assert ran == [opened[0], opened[2]]
        assert (keeper.shard, keeper.stopped, keeper.state) == (opened[2], None, "ready")


class _Offsets:
    """The ends of a log with an open transaction, `(offset, seconds)` one after the other."""

    def __init__(self, *opened: tuple[int, float]) -> None:
        self.now = 0.0
        self._until = []
        until = 0.0
        for offset, lasts_s in opened:
            until += lasts_s
            self._until.append((until, offset))

    async def ends(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(tps, 9)

    async def stable_ends(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        offset = next((one for until, one in self._until if self.now < until), 9)
        return dict.fromkeys(tps, offset)

    async def refresh(self) -> None:
        """Nobody else knows more."""

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("opened", "stops"),
    [([(1, 20), (2, 20), (3, 20)], False), ([(1, 29)], False), ([(1, 20), (2, 31)], True)],
)
async def test_what_hangs_is_one_transaction_and_not_one_after_the_other(
    opened: list[tuple[int, float]], stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen worker that thaws finds its partition another's, which always has one open."""
    log = _Offsets(*opened)
    monkeypatch.setattr(restore, "monotonic", lambda: log.now)
    monkeypatch.setattr(asyncio, "sleep", log.sleep)
    tp = TopicPartition("t", 0)
    waiting = restore.wait_stable(cast("Any", log), [tp], {})
    if stops:
        with pytest.raises(StoppedError, match="stays open on t/0 at offset 2"):
            await waiting
    else:
        assert await waiting == {tp: 9}
