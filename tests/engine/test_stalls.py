"""When a worker must end because nothing moves, and when it must not."""

import contextlib
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any, cast

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    CoordinatorNotAvailableError,
    KafkaConnectionError,
    KafkaError,
    NotEnoughReplicasError,
    NotLeaderForPartitionError,
)
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from streams.billing.outcomes import Terms
from streams.decks import load_deck
from streams.engine import shards
from streams.engine.errors import GaveUpError, UnknownOutcomeError
from streams.engine.lag import Lag
from streams.engine.restore import restored_from
from streams.engine.shard import Shard
from streams.engine.shards import Shards
from streams.metrics import Meters
from streams.settings import Settings

TOPIC = Settings().topics.sources[0]
TP = TopicPartition(TOPIC, 0)


class Standing:
    """A shard with records waiting that has not moved since long ago."""

    idle = True
    waiting = 0

    def __init__(self, since: float) -> None:
        self.moved_at = {TOPIC: since}
        self.committed_at = since
        self.lag = Lag(since)
        self.up_to = 0

    def caught_up(self) -> bool:
        return True

    def positions(self) -> dict[TopicPartition, int]:
        return {TP: 5}

    def reached(self, tp: TopicPartition, offset: int) -> None:
        self.up_to = max(self.up_to, offset)


async def looked_at(
    assigned_s_ago: float,
    monkeypatch: pytest.MonkeyPatch,
    stable_ends: Sequence[int] = (100, 100),
) -> list[int]:
    """The exit codes after looks, a second apart, at a shard that has stood for two minutes with 95
    records waiting; each time they may be read up to one of `stable_ends`."""
    ended: list[int] = []
    made = Shards(
        Settings(),
        meters=Meters(CollectorRegistry()),
        terms=Terms(tariff=load_deck(None), result_timeout_s=3),
        exit_process=ended.append,
    )
    now = monotonic()
    monkeypatch.setattr(made, "_broker_back_at", now - 1_000)
    monkeypatch.setattr(made, "_assigned_at", now - assigned_s_ago)
    made._gate.set()
    shard = cast("Shard", Standing(now - 120))

    told = iter(stable_ends)

    async def told_next(_: Any) -> dict[TopicPartition, int]:
        return {TP: next(told)}

    monkeypatch.setattr(made._marks, "stable_ends", told_next)
    for look in range(len(stable_ends)):
        await made._look_at(shards._Keeper(0), shard, {TP: 100}, now + look)
    return ended


async def test_a_minute_without_progress_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await looked_at(90, monkeypatch) == [70, 70]


async def test_a_transaction_that_a_producer_leaves_open_is_waited_for_and_told_once_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with capture_logs() as logs:
        assert await looked_at(90, monkeypatch, (5, 5)) == []
    [line] = logs
    assert line["event"] == "source_transaction_open"
    assert (line["topic"], line["partition"], line["offset"]) == (TOPIC, 0, 5)


async def test_what_a_producer_has_ended_just_now_has_a_minute_to_be_booked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await looked_at(90, monkeypatch, (5, 5, *[100] * 60)) == []
    assert await looked_at(90, monkeypatch, (5, 5, *[100] * 61)) == [70]


async def test_records_before_an_open_transaction_must_be_booked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await looked_at(90, monkeypatch, (6, 6)) == [70, 70]


async def hanging_after(
    stable_ends: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[str]]:
    """How many reasons there are after looks, half a minute apart, at output partitions that end at
    100 and of which one may be read up to these offsets; and what was logged."""
    made = Shards(
        Settings(), meters=Meters(CollectorRegistry()), terms=Terms(tariff=load_deck(None))
    )
    told = iter(stable_ends)
    [changelog, *_] = restored_from(Settings(), 0)

    async def ends(tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(tps, 100)

    async def stable(tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        return {**dict.fromkeys(tps, 100), changelog: next(told)}

    monkeypatch.setattr(made._marks, "ends", ends)
    monkeypatch.setattr(made._marks, "stable_ends", stable)
    with capture_logs() as logs:
        for look in range(len(stable_ends)):
            made._outputs_at = look * 31.0
            await made._look_at_outputs([0], look * 31.0)
    named = [reason for reason in made.reasons_not_ready() if f"{changelog.topic}/0" in reason]
    return len(named), [line["event"] for line in logs]


@pytest.mark.parametrize(
    ("stable_ends", "reasons", "lines"),
    [
        ((5,), 0, 0),
        ((5, 5), 1, 1),
        ((5, 5, 5, 5), 1, 2),  # once a minute
        ((5, 7, 9), 0, 0),  # ours, one after the other
        ((5, 100, 5), 0, 0),
        ((5, 5, 100), 0, 1),
    ],
)
async def test_a_transaction_that_stays_open_on_an_output_partition_is_told(
    stable_ends: Sequence[int], reasons: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await hanging_after(stable_ends, monkeypatch) == (
        reasons,
        ["output_transaction_open"] * lines,
    )


async def test_the_minute_begins_when_a_rebalance_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await looked_at(2, monkeypatch) == []


@pytest.mark.parametrize(
    ("cause", "gives_up"),
    [
        (KafkaConnectionError("refused"), False),
        (NotEnoughReplicasError(), False),
        (CoordinatorNotAvailableError(), False),
        (NotLeaderForPartitionError("odd"), True),
    ],
)
def test_the_same_error_again_and_again_ends_the_process_unless_no_broker_can_write(
    cause: KafkaError, gives_up: bool
) -> None:
    made = Shards(
        Settings(), meters=Meters(CollectorRegistry()), terms=Terms(tariff=load_deck(None))
    )
    keeper = shards._Keeper(0)
    error = UnknownOutcomeError("no commit")
    error.__cause__ = cause
    made._count_error(keeper, error, 7)
    made._count_error(keeper, error, 7)
    with pytest.raises(GaveUpError) if gives_up else contextlib.nullcontext():
        made._count_error(keeper, error, 7)


async def fenced_at(
    instants: Iterable[float], monkeypatch: pytest.MonkeyPatch, *, member: bool = True
) -> None:
    """Let an owner be fenced at these instants although no generation is over."""
    now = 0.0
    monkeypatch.setattr(shards, "monotonic", lambda: now)
    monkeypatch.setattr(shards, "FENCED_WAIT_S", 0.001)
    made = Shards(
        Settings(), meters=Meters(CollectorRegistry()), terms=Terms(tariff=load_deck(None))
    )
    made.watch_group(lambda: member)
    keeper, shard = shards._Keeper(0), cast("Shard", Standing(0))
    for now in instants:
        keeper.opened_at = now
        await made._after_fence(keeper, shard, overdue=False)


async def test_who_takes_an_id_once_does_not_end_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    await fenced_at((1_000, 1_001 + shards.FENCED_AGAIN_S), monkeypatch)


async def test_who_takes_an_id_again_and_again_ends_its_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(GaveUpError, match="CREDITS_NAMESPACE"):
        await fenced_at((1_000, 1_000 + shards.FENCED_AGAIN_S), monkeypatch)


async def test_who_is_out_of_the_group_takes_no_id_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GaveUpError, match="out of its group"):
        await fenced_at((1_000,), monkeypatch, member=False)
