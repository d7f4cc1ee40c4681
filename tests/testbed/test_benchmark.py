"""The benchmark itself works: every figure is there, and the books hold afterwards."""

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from streams import provision
from streams.decks import load_deck
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.auditor.verdict import HOLDS, VIOLATED
from streams.testbed.bench import side_by_side, steady, worker
from streams.testbed.bench.__main__ import BARS, SHORT, Part, Run, Scale, share_out, table
from streams.testbed.bench.throughput import Mark, Marks, a_plan, marks_of, pace
from streams.testbed.bench.worker import BenchError, Place, running

THROUGHPUT = {"workers", "events", "seconds_ms", "events_per_s", "cpu_us_per_event"}
STEADY = {"rate", "samples", "p50_ms", "p99_ms", "p99_9_ms", "max_ms", "cpu_percent"}
RATES = ("at_100", "at_1000", "of_tenth", "of_half", "of_four_fifths")
SMALL = Scale(events=60_000, tenants=100, rows=500, ids=20_000, point=20_000)


def a_run(broker: str, folder: Path, scale: Scale = SMALL) -> Run:
    return Run(broker, Place(folder), scale, data=None, verify=True)


@pytest.mark.broker
@pytest.mark.timeout(600)
async def test_a_small_run_measures_everything_and_ends_with_books_that_hold(
    broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steady, "WARM_UP_S", 1)
    monkeypatch.setattr(steady, "STEADY_FOR_S", 2)
    monkeypatch.setattr(steady, "IDLE_FOR_S", 1)
    run = a_run(broker, tmp_path)
    await run.measure(set(SHORT))
    found = run.result
    assert run.code == HOLDS
    assert found["verify"] == {"throughput": 0}
    assert set(found["throughput"]) == THROUGHPUT | {"kafka_bytes_per_event"}
    assert found["throughput"]["events"] <= 60_000
    assert set(found["latency"]) == {"p50_ms", "p99_ms", "idle_cpu_percent", *RATES}
    for name in RATES:
        one = found["latency"][name]
        assert set(one) == STEADY
        assert 0 <= one["p50_ms"] <= one["p99_ms"] <= one["p99_9_ms"] <= one["max_ms"]
    assert found["restore"]["rows"] == 500
    assert found["ids"]["ids"] == 20_000
    told = {line.split()[0] for line in table(found)}
    apart = {"workers.second_adds_percent", "takeover.unserved_most_ms"}
    assert {bar.figure for bar in BARS} - told == apart


@pytest.mark.broker
async def test_a_curve_has_a_point_for_each_value_and_every_point_is_audited(
    broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.testbed.bench.__main__.PARTITIONS", (1, 3))
    run = a_run(broker, tmp_path)
    await run.measure({Part.PARTITIONS})
    assert [point["at"] for point in run.result["partitions"]] == ["1", "3"]
    assert run.result["verify"] == {"partitions 1": 0, "partitions 3": 0}


@pytest.mark.broker
async def test_books_that_do_not_hold_make_a_run_void(
    broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Violated:
        exit_code = VIOLATED

        def lines(self) -> list[str]:
            return ["verdict: VIOLATED"]

    async def verify(*_: Any) -> Violated:
        return Violated()

    monkeypatch.setattr("streams.testbed.bench.__main__.verify", verify)
    run = a_run(broker, tmp_path)
    await run.measure({Part.THROUGHPUT})
    assert run.code == VIOLATED


@pytest.mark.broker
async def test_kafka_streams_books_the_same_events_and_is_compared_with_a_worker(
    broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "VARIANTS", ((2, 100, False),))
    run = a_run(broker, tmp_path)
    await run.measure({Part.KAFKA_STREAMS})
    assert run.code == HOLDS
    assert run.result["verify"] == {"kafka-streams: ours": 0, "kafka-streams: theirs": 0}
    ours, *theirs = run.result["kafka-streams"]
    assert ours["at"] == "credits, one worker"
    assert [side["at"] for side in theirs] == ["kafka streams, 2 threads, 100 ms, defaults"]
    for side in theirs:
        assert float(side["faster"]) == pytest.approx(
            ours["events_per_s"] / side["events_per_s"], abs=0.01
        )
        assert float(side["cheaper"]) > 0


@pytest.mark.broker
async def test_kafka_streams_with_wrong_prices_is_found_out(
    settings: Settings, tmp_path: Path
) -> None:
    await provision.apply(settings)
    plan, start = a_plan(20, 2_000), datetime.now(UTC)
    await load.preload(settings, load.events(plan, start), start)
    tariff, deck = load_deck(None), tmp_path / "deck.csv"
    right = side_by_side.expected_books(tariff, load.events(plan, start))
    faults = []
    for threads, dearer in ((1, ""), (2, "1")):
        side_by_side.write_deck(deck, tariff)
        deck.write_text(deck.read_text().replace("\n1,", f"\n1,{dearer}"))
        variant = side_by_side.Variant(settings.namespace, threads, 100)
        await side_by_side.book(settings, Place(tmp_path), variant, deck, 2_000)
        faults.append(await side_by_side.faults_of(settings, variant, right))
    assert faults[0] == []
    wrong = {fault.partition(" ")[2] for fault in faults[1]}
    assert wrong >= {"entries with a wrong amount", "wrong balances"}
    assert wrong.isdisjoint({"entries twice or of no event", "events without an entry"})


async def test_what_kafka_streams_got_wrong_makes_a_run_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextlib.asynccontextmanager
    async def installation(*_: Any) -> AsyncIterator[None]:
        yield

    async def measured(*_: Any, **__: Any) -> tuple[list[Any], list[str]]:
        return [], ["7 wrong balances"]

    run = a_run("nowhere", tmp_path)
    monkeypatch.setattr(run, "_installation", installation)
    monkeypatch.setattr("streams.testbed.bench.__main__.measure_side_by_side", measured)
    await run.measure({Part.KAFKA_STREAMS})
    assert run.code == VIOLATED
    assert run.result["verify"] == {"kafka-streams: theirs": VIOLATED}
    assert "7 wrong balances" in capsys.readouterr().err


async def test_what_is_lost_twice_or_of_no_event_is_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def entry(event_id: str, nanos: int) -> bytes:
        return orjson.dumps({"source": "s", "event_id": event_id, "amount_nanos": nanos})

    short = side_by_side.TRIGGER_NANOS - 1
    variant = side_by_side.Variant("t-", 1, 100)
    published = {
        variant.entries: [(b"a", entry("1", 5)), (b"a", entry("1", 5)), (b"a", entry("3", 7))],
        variant.balances: [(b"a", short.to_bytes(8, "big") + b"\1")],
        variant.requests: [(b"a", b""), (b"a", b"")],
    }

    async def read_to_end(_: Any, names: list[str]) -> AsyncIterator[Any]:
        for key, value in published[names[0]]:
            yield SimpleNamespace(key=key, value=value)

    monkeypatch.setattr(side_by_side, "read_to_end", read_to_end)
    right = side_by_side.Books({("s", "1"): 5, ("s", "2"): 6, ("s", "3"): 8}, {"a": short})
    assert await side_by_side.faults_of(Settings(), variant, right) == [
        "1 entries twice or of no event",
        "1 entries with a wrong amount",
        "1 events without an entry",
        "1 requests too many or too few",
    ]


@pytest.mark.broker
async def test_a_worker_that_remembers_fewer_ids_than_were_written_is_no_figure(
    broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def metric(*_: Any) -> int:
        return 19_999

    monkeypatch.setattr(worker.Worker, "metric", metric)
    monkeypatch.setattr("streams.testbed.bench.restoring.READY_WITHIN_S", 0)
    with pytest.raises(BenchError, match="20000 were written, but credits_remembered_ids is 19999"):
        await a_run(broker, tmp_path).measure({Part.IDS})


@pytest.mark.broker
async def test_a_worker_that_cannot_start_is_said_so(broker: str, tmp_path: Path) -> None:
    # No topics: the worker refuses to run.
    settings = Settings(broker=broker, namespace="t-nothing-")
    with running(settings, Place(tmp_path)) as made:
        with pytest.raises(BenchError, match=r"the worker ended; see .*worker\.log"):
            await made.until_ready()
        # Nor does anything else wait for its offsets until the deadline.
        watched = worker.Progress(settings, Nobody())
        with pytest.raises(BenchError, match="the worker ended"):
            await watched.until(["any"], 1, [made])


class Nobody:
    """An admin client whose group has committed nothing."""

    async def list_consumer_group_offsets(self, _: str) -> dict[Any, Any]:
        return {}


@pytest.mark.parametrize(
    ("done", "counted"),
    [
        ([0, 0, 10, 40, 60, 80, 95], (10, 60, 95)),
        ([0, 10, 40, 95], (10, 40, 95)),
        ([0, 70, 95], (70, 70, 95)),
        ([0, 0, 100], (0, 0, 100)),
    ],
)
def test_a_load_that_is_booked_in_few_steps_has_a_pace(
    done: list[int], counted: tuple[int, int, int]
) -> None:
    seen = [Mark(second, count, second * 500) for second, count in enumerate(done)]
    marks = marks_of(seen, 50)
    assert marks == Marks(*([mark for mark in seen if mark.done == at][-1] for at in counted))
    for first in (marks.first, marks.half):
        found = pace(first, marks.last)
        assert found.events == marks.last.done - first.done
        assert found.seconds_ms == (marks.last.at_s - first.at_s) * 1_000


def test_a_load_that_was_booked_before_anyone_looked_has_no_pace() -> None:
    with pytest.raises(BenchError, match="all 100 events were booked before anyone looked"):
        marks_of([Mark(0, 100, 0)], 50)


def test_a_figure_beside_its_bar_says_when_it_misses() -> None:
    lines = table({"throughput": {"events_per_s": 99_999, "cpu_us_per_event": "10.0"}})
    assert lines[0].endswith(">= 100,000  MISSED")
    assert lines[1].endswith("<= 10")


def test_a_curve_is_told_as_a_table() -> None:
    lines = table({"skew": [{"at": "uniform", "events": 1_000}, {"at": "one hot", "events": 9}]})
    assert [line.split("  ")[-1].strip() for line in lines] == ["skew", "events", "1,000", "9"]


@pytest.mark.parametrize("cores", [{0}, {0, 1}, {0, 1, 2}])
def test_few_cores_are_shared_and_that_is_said(cores: set[int]) -> None:
    class Here:
        pids: tuple[int, ...] = ()

    assert share_out(Here(), cores, _refuse) == ((), "shared with the workers")  # type: ignore[arg-type]


def test_a_broker_gets_the_last_two_of_enough_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        pids = ("self",)

    given: list[set[int]] = []
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/taskset")
    cores, told = share_out(
        Here(),  # type: ignore[arg-type]
        {0, 1, 4, 5},
        lambda _, own: given.append(own),
    )
    assert (cores, told) == ((0, 1), "4,5")
    assert given
    assert all(own == {4, 5} for own in given)


def _refuse(*_: Any) -> None:
    raise AssertionError("no core was to be given away")


async def test_what_was_sent_while_warming_up_does_not_count() -> None:
    rate, seed = 100, 7
    last_cold = rate * steady.WARM_UP_S - 1
    # Intended send times are counted from there; all entries are seen after the last of them.
    began = monotonic() - steady.WARM_UP_S - 1

    class Reader:
        def __init__(self) -> None:
            indexes = (0, last_cold, last_cold + 1)
            self.entries = [{"call_id": f"at-{seed}-{index}"} for index in indexes]

        async def getmany(self, *, timeout_ms: int) -> dict[Any, list[Any]]:
            told, self.entries = self.entries, []
            return {None: [SimpleNamespace(value=orjson.dumps(one)) for one in told]}

    watched = await steady._watch(Reader(), began, rate, seed, until=monotonic() + 0.2)
    assert len(watched) == 1
    assert 1_000 <= watched[0] < steady.WARM_UP_S * 1_000
