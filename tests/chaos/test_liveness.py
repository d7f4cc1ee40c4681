"""A worker that cannot go on ends; one that waits, waits; and it is never long until somebody
serves again."""

import asyncio
import json
import re
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic

import pytest

from schemas import topics
from streams.engine import shards
from streams.settings import Settings
from streams.testbed.auditor.reading import verify
from streams.testbed.auditor.view import Options
from streams.testbed.broker import Cluster
from streams.testbed.load import Plan
from tests.broker.harness import Worker, audited, drained, positions, unbooked, until
from tests.broker.test_faults import Ongoing, loaded, opened, passed, unbooked_total
from tests.chaos.stage import Watcher
from tests.chaos.worker import order, taken

pytestmark = pytest.mark.chaos

Workers = Callable[..., Worker]
ENDLESS = 10_000_000
UNSERVED_WITHIN_S = 15


def told(worker: Worker, event: str) -> list[dict[str, object]]:
    """What a worker has logged of an event."""
    lines = [line for line in worker.log.splitlines() if f'"event": "{event}"' in line]
    return [json.loads(line) for line in lines]


def a_plan() -> Plan:
    return Plan(tenants=60, events=ENDLESS, rate=500)


def test_a_minute_without_progress_is_too_long() -> None:
    assert shards.STALLED_AFTER_S == 60.0


async def test_a_shard_that_stands_still_ends_the_process_and_says_why(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    worker = workers(module="tests.broker.mutant").start(MUTANT="hangs")
    await worker.ready()
    plan = a_plan()
    start = datetime.now(UTC)
    writing = Ongoing(installation, plan, start, tmp_path / "e.json")
    assert await worker.ended(60) == 70, worker.log[-3_000:]
    (gave_up,) = told(worker, "gave_up")[:1]
    assert "records waiting and nothing of it was booked for" in str(gave_up["reason"])
    await writing.ended()


async def test_a_leader_that_knew_no_partitions_looks_again_and_assigns_them(
    installation: Settings, workers: Workers
) -> None:
    worker = workers(module="tests.broker.mutant").start(MUTANT="forgets_partitions")
    await until(lambda: bool(told(worker, "assigned")), 60, lambda: worker.log[-3_000:])
    assert told(worker, "assigned")[0]["partitions"] == []
    await until(
        lambda: told(worker, "assigned")[-1]["partitions"] == list(range(installation.partitions)),
        20,
        lambda: worker.log[-3_000:],
    )
    await worker.ready()


async def test_while_the_broker_is_away_nothing_ends_and_nothing_is_ready(
    own_broker: tuple[Cluster, Settings], tmp_path: Path
) -> None:
    # Longer than every time-out there is, and than the minute after which a stalled shard ends.
    away_s = 75
    cluster, settings = own_broker
    pair = [Worker(settings, tmp_path, name).start() for name in ("one", "two")]
    try:
        for worker in pair:
            await worker.ready()
        plan = a_plan()
        start = await opened(settings, plan)
        writing = Ongoing(settings, plan, start, tmp_path / "e.json")
        await until(partial(passed, settings, 500), 60)
        await writing.ended()
        await asyncio.to_thread(cluster.kill)
        began = monotonic()
        for worker in pair:
            await until(lambda: "the broker is away" in worker.reasons(), 60)  # noqa: B023
        while monotonic() - began < away_s:
            for worker in pair:
                assert worker.process is not None
                assert worker.process.poll() is None, worker.log[-3_000:]
                assert worker.probe("/readyz")[0] == 503
                assert worker.probe("/livez")[0] == 200
            await asyncio.sleep(1)
        await asyncio.to_thread(cluster.restart)
        for worker in pair:
            await worker.ready(60)
        await drained(settings)
        await audited(settings, tmp_path / "e.json")
    finally:
        for worker in pair:
            worker.kill()


async def test_sigterm_ends_within_ten_seconds_and_nothing_is_booked_again(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = Plan(
        tenants=60, events=ENDLESS, rate=1_000, duplicates_ppm=0, malformed_ppm=0, late_ppm=0,
        wrong_partition_ppm=0,
    )  # fmt: skip
    worker = workers().start()
    await worker.ready()
    start = await opened(installation, plan)
    writing = Ongoing(installation, plan, start, tmp_path / "e.json")
    await until(partial(passed, installation, 1_000), 60)
    began = monotonic()
    worker.signal(signal.SIGTERM)
    assert await worker.ended(20) == 0, worker.log[-3_000:]
    assert monotonic() - began < 10
    await writing.ended()
    left = await unbooked(installation)
    assert left > 0, "it was to be stopped in the middle"
    following = workers("next").start()
    await following.ready()
    await drained(installation)
    # Its own figures: it took what was left, once, and nothing of what was booked before.
    await until(lambda: usage_taken(following) >= left, 20)
    assert usage_taken(following) == left
    await audited(installation, tmp_path / "e.json")


def usage_taken(worker: Worker) -> int:
    """Usage records that a worker has dealt with, repeats included, by its metrics."""
    page = worker.probe("/metrics")[1]
    return sum(
        int(float(count))
        for topic, count in re.findall(
            r'credits_events_total\{.*topic="([^"]+)"\} ([0-9.e+]+)', page
        )
        if topic in (topics.CALL_USAGE, topics.CONFERENCE_USAGE)
    )


@pytest.mark.alone
async def test_sigterm_during_a_restore_ends_within_ten_seconds_and_loses_nothing(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    plan = Plan(tenants=60, events=2_000, rate=0)
    worker = workers().start()
    await worker.ready()
    start = await opened(installation, plan)
    await loaded(installation, plan, start, tmp_path / "e.json")
    await drained(installation)
    assert await worker.stop() == 0
    order(tmp_path, "restore_50", "stop")
    restoring = workers("restoring", module="tests.chaos.worker")
    restoring.start(CHAOS_FOLDER=str(tmp_path))
    # It stands still in the middle of a restore until it is told to end.
    await until(lambda: taken(tmp_path), 60, lambda: restoring.log[-3_000:])
    restoring.signal(signal.SIGTERM)
    began = monotonic()
    restoring.signal(signal.SIGCONT)
    assert await restoring.ended(20) == 0, restoring.log[-3_000:]
    assert monotonic() - began < 10
    assert len(told(restoring, "shard_open")) < installation.partitions
    await workers("next").start().ready()
    await drained(installation)
    await audited(installation, tmp_path / "e.json")


async def test_after_a_sigkill_others_serve_within_fifteen_seconds(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    # With the session time-out as it comes, not the short one of the other tests.
    as_it_comes = Settings().session_timeout_s
    pair = [workers(name, session_timeout_s=as_it_comes).start() for name in ("one", "two")]
    for worker in pair:
        await worker.ready()
    plan = a_plan()
    start = await opened(installation, plan)
    writing = Ongoing(installation, plan, start, tmp_path / "e.json")
    watcher = Watcher(installation)
    watching = asyncio.ensure_future(watcher.run())
    try:
        partitions = list(range(installation.partitions))
        await until(lambda: all(one in watcher.moved_at for one in partitions), 60)
        killed = [int(one) for one in told(pair[0], "assigned")[-1]["partitions"]]  # type: ignore[attr-defined]
        assert killed
        watcher.lost(killed)
        pair[0].kill()
        await until(lambda: len(watcher.unserved_s) == len(killed), 60)
        assert max(watcher.unserved_s) < UNSERVED_WITHIN_S
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    await writing.ended()
    await drained(installation)
    await audited(installation, tmp_path / "e.json")


# -- fencing ---------------------------------------------------------------------------------------


async def a_stale_batch(
    installation: Settings, workers: Workers, folder: Path, mutant: dict[str, str]
) -> tuple[Worker, Ongoing]:
    """A worker decides a batch, freezes before it writes, loses its partitions to another that
    books the same records, and thaws."""
    orders = folder / "orders"
    others = folder / "others"
    orders.mkdir()
    others.mkdir()
    module = "tests.chaos.worker"
    frozen = workers("frozen", module=module)
    frozen.start(CHAOS_FOLDER=str(orders), **mutant)
    await frozen.ready()
    plan = a_plan()
    start = await opened(installation, plan)
    writing = Ongoing(installation, plan, start, folder / "e.json")
    await until(partial(passed, installation, 500), 60)
    order(orders, "after_compute", "stop", passes=3)
    await until(lambda: taken(orders), 60)
    other = workers("other", module=module)
    other.start(CHAOS_FOLDER=str(others), **mutant)
    await other.ready(90)
    reached = await unbooked_total(installation)
    await until(lambda: far_on(installation, reached), 60)
    frozen.signal(signal.SIGCONT)
    return frozen, writing


async def far_on(settings: Settings, before: int) -> bool:
    """Whether every partition has booked usage since, the frozen batch's among them."""
    rows = await positions(settings)
    return len(rows) == settings.partitions and await unbooked_total(settings) > before + 1_000


async def test_a_stale_batch_of_a_zombie_is_fenced(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    frozen, writing = await a_stale_batch(installation, workers, tmp_path, {})
    await until(lambda: bool(told(frozen, "fenced")), 60, lambda: frozen.log[-3_000:])
    await writing.ended()
    await drained(installation)
    await audited(installation, tmp_path / "e.json")


async def test_without_fencing_a_zombie_charges_twice(
    installation: Settings, workers: Workers, tmp_path: Path
) -> None:
    _, writing = await a_stale_batch(installation, workers, tmp_path, {"MUTANT": "fence"})

    async def charged_twice() -> bool:
        report = await verify(installation, Options())
        return bool(report.findings["at_most_once"].violations)

    await until(charged_twice, 60)
    await writing.ended()
