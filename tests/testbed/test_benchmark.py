"""The benchmark itself works: every figure is there, and the books hold afterwards."""

from pathlib import Path

import pytest

from streams.settings import Settings
from streams.testbed import bench

FIGURES = {
    "throughput": {"events", "seconds_ms", "events_per_s", "cpu_us_per_event"},
    "latency": {"rate", "samples", "p50_ms", "p99_ms", "max_ms"},
    "restore": {"rows", "restore_ms", "rows_per_s", "start_to_ready_ms"},
    "memory": {"mb_without_tenants", "mb_with_tenants", "mb_per_million_tenants"},
}


@pytest.mark.broker
async def test_a_small_run_measures_everything_and_ends_with_books_that_hold(
    broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "LATENCY_FOR_S", 2)
    result, code = await bench._measure(
        broker, tmp_path, count=20_000, tenants=100, rows=500, skip_verify=False
    )
    assert code == 0
    assert {name: set(result[name]) for name in FIGURES} == FIGURES
    latency = result["latency"]
    assert 0 <= latency["p50_ms"] <= latency["p99_ms"] <= latency["max_ms"]
    assert result["throughput"]["events"] <= 20_000
    assert result["restore"]["rows"] == 500


@pytest.mark.broker
async def test_a_worker_that_cannot_start_is_said_so(broker: str, tmp_path: Path) -> None:
    # No topics: the worker refuses to run.
    settings = Settings(broker=broker, namespace="t-nothing-", metrics_port=0)
    with bench._running(settings, tmp_path) as worker:
        with pytest.raises(bench.BenchError, match=r"the worker ended; see .*worker\.log"):
            await worker.until_ready()
