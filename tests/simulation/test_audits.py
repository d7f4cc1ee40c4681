"""Audits beside workers that go on, each from where the one before it has ended."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from streams.engine.rows import POSITION_KEY
from tests.simulation.invariants import READ, audited, faults_in, rows_of
from tests.simulation.log import Partition
from tests.simulation.schedule import Schedule, Step, draw
from tests.simulation.world import World

SCHEDULES: Final = 300
# A reader gives an open transaction so long to end.
OPEN_WITHIN_S: Final = 30


class Audited(World):
    """A schedule during which somebody audits, now and then and in the end."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule, trace=None)
        self._when = random.Random(f"{schedule.seed} audits")
        self._earlier: dict[str, Any] | None = None
        self._begun: dict[str, dict[str, int]] = {}
        self.seen: Counter[str] = Counter()

    async def take(self, step: Step) -> None:
        """Take a step; perhaps the rows are read before it, and the rest some time after."""
        rows = rows_of(self)
        # Where nothing was ever booked an audit cannot tell whether the changelog is gone.
        looks = self._when.random() < 0.3 and all(POSITION_KEY in one for one in rows)
        ends = self._offsets(lambda part: part.end)
        await super().take(step)
        if not looks:
            return
        await asyncio.sleep(self._when.choice((0.0, 0.01, 0.3)))
        for _ in range(OPEN_WITHIN_S):
            stable = self._offsets(lambda part: part.stable_end)
            if all(stable[one][name] >= ends[one][name] for one in ends for name in READ):
                self.look(rows)
                return
            await asyncio.sleep(1)

    def look(self, rows: list[dict[bytes, bytes]]) -> None:
        """Audit what stands in the log now, from the last audit on."""
        reached = self._offsets(lambda part: part.stable_end)
        report, checkpoint = audited(self, rows, self._begun or None, self._earlier)
        for name, text in faults_in(report):
            self.fail(f"an audit on the way: {name}", text)
        self.seen += Counter(report.counts)
        self.seen["audits"] += 1
        for number, known in checkpoint.items():
            reached[number] |= known.pop("ends")
        self._begun, self._earlier = reached, checkpoint

    def _offsets(self, which: Callable[[Partition], int]) -> dict[str, dict[str, int]]:
        return {
            str(number): {name: which(self.source(name, number)) for name in READ}
            for number in range(self.settings.partitions)
        }


def test_audits_that_go_on_from_one_another_judge_everything_once() -> None:
    seen: Counter[str] = Counter()
    for seed in range(1, SCHEDULES + 1):
        world = Audited(draw(seed))
        try:
            world.play()
            world.look(rows_of(world))
            assert world.failure is None, f"seed {seed}"
        finally:
            world.loop.close()
        whole, _ = audited(world, rows_of(world))
        for what in ("events", "commands", "results", "entries"):
            assert world.seen[what] == whole.counts.get(what, 0), f"seed {seed}: {what}"
        seen += world.seen
    assert seen["audits"] > 3 * SCHEDULES
    assert seen["pending"] > SCHEDULES
