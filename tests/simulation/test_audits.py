"""Audits beside workers that go on, each from where the one before it has ended."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import msgspec
import pytest

from schemas import topics
from streams.engine.rows import POSITION_KEY
from streams.testbed.auditor.records import home
from tests.simulation import events
from tests.simulation.invariants import READ, audited, faults_in, rows_of
from tests.simulation.log import Partition
from tests.simulation.schedule import TENANTS, Schedule, Step, draw
from tests.simulation.world import BEGAN, World

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


class Rough(Audited):
    """Much of what seldom happens: records that stray, ids that come again for another tenant, dead
    letters that are replayed, tenants that nobody knows, on two partitions."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(msgspec.structs.replace(schedule, partitions=2, tenants=len(TENANTS)))
        self._rough = random.Random(f"{schedule.seed} is rough")
        self._number = 50_000

    async def take(self, step: Step) -> None:
        """Take a step, after something else."""
        dice = self._rough
        self._number += 1
        tenant, number = dice.choice(TENANTS), dice.choice((self._number, dice.randint(1, 20)))
        match dice.choice(("strays", "broken", "unknown", "command", "replay", "nothing")):
            case "strays":
                away = 1 - self.homes[tenant]
                value = events.usage(number, tenant, BEGAN)
                for _ in range(dice.randint(1, 3)):
                    self.send(dice.choice(topics.USAGE), tenant, value, partition=away)
            case "broken":
                away = 1 - self.homes[tenant]
                self.send(dice.choice(topics.SOURCES), tenant, b"{broken", partition=away)
            case "unknown":
                value = events.usage(number, "nobody", BEGAN)
                there = home(b"nobody", 2)
                self.send(topics.CALL_USAGE, "nobody", value, partition=there)
            case "command":
                word = dice.choice(("fund", "pay", "adjust", "close", "open", "policy", "grant"))
                self.send(topics.COMMAND, tenant, events.command(number, word, tenant, BEGAN))
            case "replay":
                for topic in topics.SOURCES:
                    self._replay(topic)
        await super().take(step)

    def _replay(self, topic: str) -> None:
        """As the command line does it: without what the dead letter says of itself."""
        for number in range(2):
            for letter in self.source(topics.dead_letters_of(topic), number).committed():
                if letter.key is None or self._rough.random() < 0.7:
                    continue
                headers = dict(letter.headers)
                attempt = int(headers.get("credits-dlq-attempt", b"1")) + 1
                own = [one for one in letter.headers if not one[0].startswith("credits-dlq-")]
                own.append(("credits-dlq-attempt", b"%d" % attempt))
                there = home(letter.key, 2)
                name, value = letter.key.decode(), letter.value or b""
                self.send(topic, name, value, headers=tuple(own), partition=there)


@pytest.mark.parametrize(("kind", "schedules"), [(Audited, 300), (Rough, 100)])
def test_audits_that_go_on_from_one_another_judge_everything_once(
    kind: type[Audited], schedules: int
) -> None:
    seen: Counter[str] = Counter()
    for seed in range(1, schedules + 1):
        world = kind(draw(seed))
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
    assert seen["audits"] > 3 * schedules
    assert seen["pending"] > schedules
