"""What a restore takes for a loss, and what for somebody else's batch."""

from collections.abc import Iterable
from typing import Any

import pytest
from aiokafka import TopicPartition

from schemas import topics
from streams.engine import restore
from streams.engine.errors import FencedError, Stop, StoppedError, UnknownOutcomeError
from streams.engine.restore import Marks
from streams.settings import Settings

# Where changelog and ids end at first; what is asked later adds to it.
ENDS = 10


class Growing(Marks):
    """Logs that grow by so much with each question after the first."""

    def __init__(self, settings: Settings, grown: list[tuple[int, int]]) -> None:
        super().__init__(settings)
        self._names = (settings.topics.of(topics.CHANGELOG), settings.topics.of(topics.SEEN))
        self._grown = [(0, 0), *grown]

    async def refresh(self) -> None:
        """Nobody else to ask."""

    async def ends(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        grown = self._grown.pop(0) if len(self._grown) > 1 else self._grown[0]
        by_name = dict(zip(self._names, grown, strict=True))
        return {tp: ENDS + by_name.get(tp.topic, 0) for tp in tps}

    async def stable_ends(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(tps, ENDS)


@pytest.mark.parametrize(
    ("grown", "raised"),
    [
        ([(0, 0)], StoppedError),
        ([(1, 1)], FencedError),
        # A batch reaches its logs one by one: its ids may be there before its rows.
        ([(0, 1), (0, 1), (1, 1)], FencedError),
        ([(0, 1)], UnknownOutcomeError),
    ],
)
async def test_what_looks_lost_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, grown: list[tuple[int, int]], raised: type[Exception]
) -> None:
    async def lost(*_: Any) -> Any:
        raise StoppedError(Stop.STATE_LOST, "rows are missing")

    monkeypatch.setattr(restore, "_read", lost)
    monkeypatch.setattr(restore, "_ASKED_EVERY_S", 0)
    settings = Settings(partitions=1)
    with pytest.raises(raised):
        await restore.restore(settings, 0, Growing(settings, grown), {})
