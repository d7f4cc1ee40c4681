"""What must hold after every schedule, judged from the model's log alone, and what the live shards
must hold beside it."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from schemas import topics
from streams.engine.errors import FencedError, StoppedError
from streams.engine.restore import Marks, Restored, restore
from streams.engine.rows import POSITION_KEY
from streams.testbed.auditor.audit import audit
from streams.testbed.auditor.minutes import Coverage
from streams.testbed.auditor.prices import Deck
from streams.testbed.auditor.records import Log, Record
from streams.testbed.auditor.verdict import Report
from streams.testbed.auditor.view import Options
from tests.simulation import events
from tests.simulation.world import FailedError, World

# A batch may settle for six seconds, and a producer take three to stop.
GHOSTS_GONE_WITHIN_S: Final = 15
# What an audit reads beside the rows, and of that what workers write.
READ: Final = [
    topic.name
    for topic in topics.MANIFEST
    if topic.partitions is None and topic.name not in (topics.CHANGELOG, topics.SEEN)
]
OUTPUTS: Final = [name for name in READ if name not in topics.SOURCES]
_DECK: Final = Deck(events.DECK)
_COVERAGE: Final = Coverage()


def _rows(world: World, number: int) -> dict[bytes, bytes]:
    """The changelog, folded."""
    rows: dict[bytes, bytes] = {}
    for record in world.source(topics.CHANGELOG, number).committed():
        key = record.key or b""
        if record.value is None:
            rows.pop(key, None)
        else:
            rows[key] = record.value
    return rows


def rows_of(world: World) -> list[dict[bytes, bytes]]:
    """The changelog of every partition, folded."""
    return [_rows(world, number) for number in range(world.settings.partitions)]


def audited(
    world: World,
    rows: Sequence[dict[bytes, bytes]],
    begun: Mapping[str, Mapping[str, int]] | None = None,
    earlier: Mapping[str, Any] | None = None,
) -> tuple[Report, dict[str, Any]]:
    """What the auditor, which shares no code with the engine, says of the log from `begun` on, and
    of rows that were read before; what it hands on."""
    logs = []
    for number, of_partition in enumerate(rows):
        start = {} if begun is None else dict(begun[str(number)])
        records: dict[str, Iterable[Record]] = {}
        for name in READ:
            committed = cast("list[Record]", world.source(name, number).committed())
            records[name] = [one for one in committed if one.offset >= start.get(name, 0)]
        starts = {name: world.source(name, number).start for name in topics.SOURCES}
        logs.append(
            Log(partition=number, rows=of_partition, records=records, starts=starts, begun=start)
        )
    return audit(
        logs,
        names=world.names,
        partitions=world.settings.partitions,
        deck=_DECK,
        coverage=_COVERAGE,
        options=Options(checkpoint_from=None if earlier is None else Path("earlier")),
        earlier=earlier,
    )


def faults_in(report: Report) -> Iterator[tuple[str, str]]:
    """What an audit found wrong, or could not tell."""
    for name, finding in report.findings.items():
        if finding.violations or finding.unknown:
            yield name, "; ".join([*finding.shown, *finding.unknown])


def check_log(world: World) -> None:
    """The books, by the auditor."""
    for number in range(world.settings.partitions):
        for name in OUTPUTS:
            part = world.source(name, number)
            if part.stable_end < part.end:
                world.fail("stable", f"a transaction is open on {name}/{number}")
    report, _ = audited(world, rows_of(world))
    for name, text in faults_in(report):
        world.fail(name, text)
    counts = report.counts
    world.happened["entries"] += counts.get("entries", 0)
    world.happened["events"] += counts.get("events", 0)
    world.happened["repeats"] += counts.get("events", 0) - counts.get("distinct_ids", 0)
    world.happened["corrections"] += counts.get("reversals", 0)
    world.happened["requests"] += counts.get("requests", 0)
    world.happened["included minutes"] += counts.get("included minutes", 0)
    world.happened["open calls"] += counts.get("holds", 0)
    world.happened["aborted transactions"] += sum(
        bool(part.aborted) for part in world.broker.partitions.values()
    )


async def check_live(world: World) -> None:
    """What a shard has in memory is what the log says, and what a restore finds."""
    for _ in range(GHOSTS_GONE_WITHIN_S):
        ghosts = _ghosts(world)
        if not ghosts:
            break
        await asyncio.sleep(1)
    else:
        world.fail("ghost", f"{ghosts} keep partitions that are not theirs any more")
    marks = Marks(world.settings)
    await marks.start()
    for number in range(world.settings.partitions):
        try:
            shard, restored = await _restored(world, number, marks)
        except StoppedError as error:
            world.fail(error.reason.value, str(error))
            return
        except FailedError as error:
            world.fail(error.what, str(error))
            return
        rows = _rows(world, number)
        rows.pop(POSITION_KEY, None)
        live: dict[bytes, bytes] = shard._rows.values
        if live != rows:
            _differ(world, number, "rows in memory and in the log", live, rows)
        if restored.rows.values != rows:
            _differ(world, number, "rows restored and in the log", restored.rows.values, rows)
        if shard._seen.digest() != restored.seen.digest():
            world.fail("restored", f"partition {number}: other ids in memory than restored")
        if restored.position is None:
            if shard._sources.keys() and any(one.last >= 0 for one in shard._sources.values()):
                world.fail("restored", f"partition {number} has no position")
        elif dict(restored.position.sources) != shard._sources:
            world.fail("restored", f"partition {number}: another position than restored")
        elif restored.position.seen_marks != shard._seen_marks:
            world.fail("restored", f"partition {number}: other marks than restored")
    await marks.stop()


def _ghosts(world: World) -> list[str]:
    """Workers in which a released partition is still being kept."""
    found = []
    for worker in world.live():
        keeping = sum(
            not task.done() and getattr(task.get_coro(), "__qualname__", "") == "Shards._keep"
            for task in worker.tasks
        )
        if keeping > len(worker.shards._keepers):
            found.append(worker.name)
    return found


async def _restored(world: World, number: int, marks: Marks) -> tuple[Any, Restored]:
    """A shard and a restore of its partition, with no batch (of ticks, say) in between."""
    changelog = world.source(topics.CHANGELOG, number)
    while True:
        shard, end = await world.owner(number), changelog.end
        try:
            restored = await restore(world.settings, number, marks, {}, world.wall())
        except FencedError:
            # A loss, or half of a batch of the shard that goes on meanwhile: that is seen anew.
            continue
        if changelog.end == end and shard.idle and changelog.stable_end == end:
            return shard, restored
        await asyncio.sleep(0.05)


def _differ(world: World, number: int, what: str, one: dict[bytes, Any], other: Any) -> None:
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    world.fail("restored", f"partition {number}: {what} differ at {keys[:3]}")


__all__ = ["FailedError", "check_live", "check_log"]
