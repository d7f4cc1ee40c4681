"""A worker that has fallen out of its group says so, and only then."""

from collections.abc import Sequence
from math import inf
from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition
from prometheus_client import CollectorRegistry

from streams.engine import shards as module
from streams.engine.deck_view import OLD_AFTER_S
from streams.engine.errors import Stop, StoppedError
from streams.engine.shards import BROKER_AWAY_AFTER_S, NO_MEMBER_AFTER_S, Shards
from streams.metrics import Meters
from streams.settings import Settings
from tests.billing.builders import some_terms


class Clock:
    """A monotonic clock that only a test moves."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Group:
    """Shards without partitions, whose membership a test decides."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.joined = True
        self.shards = Shards(
            Settings(partitions=1), meters=Meters(CollectorRegistry()), terms=some_terms()
        )
        self.shards._reader._consumer = SimpleNamespace(unsubscribe=lambda: None)
        self.shards._marks.ends = self._answers  # type: ignore[assignment, method-assign]
        self.shards._decks._at_end = inf
        self.shards.watch_group(lambda: self.joined)
        self.shards.assigned([], 1)

    async def _answers(self, tps: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(tps, 0)

    async def passes(self, seconds: float, *, broker: bool = True) -> list[str]:
        """Let time pass, a look a second while the broker is there; why it is not ready then."""
        for _ in range(int(seconds)):
            self._clock.now += 1
            if broker:
                await self.shards._look()
        return self.shards.reasons_not_ready()


@pytest.fixture
async def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)
    return Group(clock)


async def test_a_member_is_ready_however_long_it_waits(group: Group) -> None:
    assert await group.passes(1_000) == []


async def test_who_is_out_of_the_group_for_a_minute_is_not_ready_until_it_is_back(
    group: Group,
) -> None:
    group.joined = False
    assert await group.passes(NO_MEMBER_AFTER_S) == []
    assert await group.passes(1) == ["not a member of the group for 61 s"]
    group.joined = True
    assert await group.passes(1) == []


async def test_a_broker_that_was_away_begins_the_minute_anew(group: Group) -> None:
    group.joined = False
    away = await group.passes(BROKER_AWAY_AFTER_S + 100, broker=False)
    assert away == ["the broker is away"]
    assert await group.passes(NO_MEMBER_AFTER_S) == []
    assert len(await group.passes(2)) == 1


async def test_before_the_first_assignment_that_is_the_reason(group: Group) -> None:
    group.shards._assigned_at = -1.0
    group.joined = False
    assert await group.passes(200) == ["no assignment yet"]


async def test_while_the_rate_decks_were_not_read_nothing_is_booked(group: Group) -> None:
    shards = group.shards
    assert shards._gate.is_set()
    shards._decks._at_end = -OLD_AFTER_S
    shards._check_decks()
    assert not shards._gate.is_set()
    [reason] = await group.passes(1)
    assert reason.startswith("rate decks were last read")
    shards._decks._at_end = inf
    shards._check_decks()
    assert shards._gate.is_set()
    await shards.revoked()
    shards._check_decks()
    assert not shards._gate.is_set(), "a rebalance is not over because the decks are read"


async def test_a_shard_that_stopped_is_told_as_long_as_its_partition_is_here(group: Group) -> None:
    def told(reason: Stop) -> float | None:
        registry = group.shards._meters.registry
        return registry.get_sample_value("credits_shard_stopped", {"reason": reason.value})

    keeper = group.shards._keepers[0] = module._Keeper(0)
    keeper.stopped = StoppedError(Stop.CLOCK_SKEW, "an hour behind")
    group.shards._set_state(keeper, "stopped")
    assert told(Stop.CLOCK_SKEW) == 1
    group.shards.assigned([], 2)
    assert told(Stop.CLOCK_SKEW) == 0
    group.shards.assigned([TopicPartition(Settings().topics.sources[0], 0)], 3)
    assert told(Stop.NOT_COPARTITIONED) == 1
    group.shards.assigned([], 4)
    assert told(Stop.NOT_COPARTITIONED) == 0


async def test_partitions_that_somebody_has_added_to_every_source_are_not_opened(
    group: Group,
) -> None:
    group.shards.assigned([TopicPartition(name, 1) for name in Settings().topics.sources], 2)
    [reason, *_] = group.shards.reasons_not_ready()
    assert reason == (
        "not_copartitioned: partitions [1] lack a source topic, or are beyond the 1 of this "
        "installation"
    )
    assert group.shards._keepers == {}
