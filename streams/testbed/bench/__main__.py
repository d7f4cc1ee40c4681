"""What `make bench` runs: choose the parts, measure, audit, and tell."""

import asyncio
import contextlib
import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from enum import StrEnum
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from time import process_time_ns
from typing import Annotated, Any, Final

import msgspec
import typer
from msgspec import Struct

from streams import provision
from streams.billing import charging
from streams.engine.kafka import tune_client
from streams.settings import Settings
from streams.testbed import broker
from streams.testbed.auditor.reading import verify
from streams.testbed.auditor.verdict import HOLDS, VIOLATED
from streams.testbed.auditor.view import Options
from streams.testbed.bench.restoring import measure_ids, measure_restore
from streams.testbed.bench.side_by_side import measure_side_by_side
from streams.testbed.bench.steady import (
    all_booked,
    measure_idle,
    measure_steady,
    whole_slices,
)
from streams.testbed.bench.takeover import measure_takeover
from streams.testbed.bench.throughput import a_plan, measure_throughput
from streams.testbed.bench.worker import PAGE_BYTES, BenchError, Place, running, say
from streams.testbed.kafka import compress_fast
from streams.testbed.load import Plan, Profile

VERIFIED_WITHIN_S: Final = 3_600
# From here on the broker has cores of its own: two for it, and one at least for a worker.
CORES_TO_SHARE_OUT: Final = 4
# The points of the curves.
TENANTS: Final = (1_000, 10_000, 100_000, 1_000_000)
PARTITIONS: Final = (1, 4, 12, 64)
FETCH_BYTES: Final = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
ROWS: Final = (10_000, 100_000, 1_000_000)


class Part(StrEnum):
    """What can be measured by itself."""

    THROUGHPUT = "throughput"
    LATENCY = "latency"
    TAKEOVER = "takeover"
    RESTORE = "restore"
    IDS = "ids"
    TENANTS = "tenants"
    SKEW = "skew"
    PARTITIONS = "partitions"
    BATCHES = "batches"
    WORKERS = "workers"
    ROWS = "rows"
    KAFKA_STREAMS = "kafka-streams"


SHORT: Final = (Part.THROUGHPUT, Part.LATENCY, Part.RESTORE, Part.IDS)


class Scale(Struct, frozen=True, kw_only=True):
    """How much of everything; `point` is the events of one point of a curve."""

    events: int
    tenants: int
    rows: int
    ids: int
    point: int


class Bar(Struct, frozen=True):
    """What a figure should reach."""

    figure: str
    bound: int
    at_least: bool = False


BARS: Final = (
    Bar("throughput.events_per_s", 100_000, at_least=True),
    Bar("throughput.cpu_us_per_event", 10),
    Bar("latency.p99_ms", 150),
    Bar("latency.at_100.p50_ms", 100),
    Bar("latency.idle_cpu_percent", 2),
    Bar("latency.at_1000.cpu_percent", 25),
    Bar("takeover.unserved_most_ms", 15_000),
    Bar("restore.rows_per_s", 150_000, at_least=True),
    Bar("memory.mb_per_million_tenants", 400),
    Bar("ids.ids_per_s", 1_666_667, at_least=True),
    Bar("ids.bytes_per_id_at_most", 24),
    Bar("ids.look_up_ns", 1_000),
    Bar("ids.slowest_insert_ms", 50),
    Bar("workers.second_adds_percent", 70, at_least=True),
)


class Run:
    """One run of the benchmark: its broker, its installations, what it found."""

    def __init__(
        self, bootstrap: str, place: Place, scale: Scale, *, data: Path | None, verify: bool
    ) -> None:
        self.result: dict[str, Any] = {}
        self.code = HOLDS
        self._bootstrap = bootstrap
        self._place = place
        self._scale = scale
        self._data = data
        self._verify = verify

    async def measure(self, parts: set[Part]) -> None:
        """Measure the parts, each in installations of its own. Raises BenchError."""
        if parts & {Part.THROUGHPUT, Part.LATENCY, Part.TAKEOVER}:
            await self._throughput_and_latency(parts)
        if Part.RESTORE in parts:
            restored = await self._restore(self._scale.rows)
            per_million = restored.pop("mb_per_million_tenants")
            self.result |= {"restore": restored, "memory": {"mb_per_million_tenants": per_million}}
        if Part.IDS in parts:
            async with self._installation("ids", audited=False) as settings:
                ids = await measure_ids(settings, self._place, self._scale.ids)
                self.result["ids"] = msgspec.to_builtins(ids)
        if Part.TENANTS in parts:
            await self._curve(
                Part.TENANTS,
                {str(count): self._plan(tenants=count) for count in TENANTS},
            )
        if Part.SKEW in parts:
            hot = msgspec.structs.replace(self._plan(), profile=Profile.HOT_TENANT)
            await self._curve(
                Part.SKEW,
                {"uniform": self._plan(zipf=False), "zipf 1.0": self._plan(), "one hot": hot},
            )
        if Part.PARTITIONS in parts:
            await self._settings_curve(Part.PARTITIONS, "partitions", PARTITIONS)
        if Part.BATCHES in parts:
            await self._settings_curve(Part.BATCHES, "fetch_bytes", FETCH_BYTES)
        if Part.WORKERS in parts:
            await self._workers()
        if Part.ROWS in parts:
            self.result["rows"] = [await self._restore(rows) for rows in ROWS]
        if Part.KAFKA_STREAMS in parts:
            await self._kafka_streams()

    @contextlib.asynccontextmanager
    async def _installation(
        self, name: str, changes: dict[str, Any] | None = None, *, audited: bool = True
    ) -> AsyncIterator[Settings]:
        """Fresh topics; audited in the end, for a fast wrong run is void, and then removed."""
        settings = Settings(
            broker=self._bootstrap, namespace=f"t-{secrets.token_hex(3)}-", **(changes or {})
        )
        await provision.apply(settings)
        try:
            yield settings
            if audited and self._verify:
                await self._audit(name, settings)
        finally:
            await provision.remove_namespace(settings)

    async def _audit(self, name: str, settings: Settings) -> None:
        say("checking the books from the topics alone")
        report = await verify(settings, Options(deadline_s=VERIFIED_WITHIN_S))
        self.result.setdefault("verify", {})[name] = report.exit_code
        lines = report.lines()
        for line in lines if report.exit_code else lines[-1:]:
            say(line)
        self.code = max(self.code, report.exit_code)

    def _plan(self, tenants: int | None = None, *, zipf: bool = True) -> Plan:
        return a_plan(tenants or self._scale.tenants, self._scale.point, zipf=zipf)

    async def _throughput_and_latency(self, parts: set[Part]) -> None:
        async with self._installation("throughput") as settings:
            tenants = self._scale.tenants
            throughput = await measure_throughput(
                settings, self._place, a_plan(tenants, self._scale.events), data=self._data
            )
            self.result["throughput"] = msgspec.to_builtins(throughput)
            if Part.TAKEOVER in parts:
                takeover = await measure_takeover(settings, self._place, tenants)
                self.result["takeover"] = msgspec.to_builtins(takeover)
            if Part.LATENCY not in parts:
                return
            most = throughput.events_per_s
            rates = {
                "at_100": 100,
                "at_1000": 1_000,
                "of_tenth": whole_slices(most // 10),
                "of_half": whole_slices(most // 2),
                "of_four_fifths": whole_slices(most * 4 // 5),
            }
            found: dict[str, Any] = {}
            with running(settings, self._place) as worker:
                await worker.until_ready()
                say("an idle worker")
                found["idle_cpu_percent"] = await measure_idle(worker)
                for seed, (name, rate) in enumerate(rates.items(), start=2):
                    steady = await measure_steady(
                        settings, worker, tenants=tenants, rate=rate, seed=seed
                    )
                    found[name] = msgspec.to_builtins(steady)
                    await all_booked(settings, worker)
            half = found["of_half"]
            self.result["latency"] = {"p50_ms": half["p50_ms"], "p99_ms": half["p99_ms"], **found}

    async def _restore(self, rows: int) -> dict[str, Any]:
        say(f"restore of {rows:,} rows")
        # Nothing was booked, so there is nothing to audit; the worker compares every digest.
        async with self._installation("restore", audited=False) as settings:
            restore: dict[str, Any] = msgspec.to_builtins(
                await measure_restore(settings, self._place, rows)
            )
            return restore

    async def _point(
        self,
        part: Part,
        name: str,
        plan: Plan,
        changes: dict[str, Any] | None = None,
        *,
        workers: int = 1,
    ) -> dict[str, Any]:
        say(f"{part.value}: {name}")
        async with self._installation(f"{part.value} {name}", changes) as settings:
            found = await measure_throughput(
                settings, self._place, plan, workers=workers, data=self._data
            )
            cpu_us = found.cpu_us_per_event
            say(f"{found.events_per_s:,} events/s, {cpu_us} µs of CPU an event")
            return {"at": name, **msgspec.to_builtins(found)}

    async def _curve(self, part: Part, plans: dict[str, Plan]) -> None:
        self.result[part.value] = [
            await self._point(part, name, plan) for name, plan in plans.items()
        ]

    async def _settings_curve(self, part: Part, setting: str, values: tuple[int, ...]) -> None:
        self.result[part.value] = [
            await self._point(part, str(value), self._plan(), {setting: value}) for value in values
        ]

    async def _workers(self) -> None:
        """All partitions alike, so that two workers have as much to do each."""
        plan = self._plan(zipf=False)
        one = await self._point(Part.WORKERS, "1", plan)
        two = await self._point(Part.WORKERS, "2", plan, workers=2)
        added = (two["events_per_s"] - one["events_per_s"]) * 100 // one["events_per_s"]
        self.result["workers"] = {"second_adds_percent": added, "curve": [one, two]}

    async def _kafka_streams(self) -> None:
        part = Part.KAFKA_STREAMS.value
        async with self._installation(f"{part}: ours") as settings:
            sides, faults = await measure_side_by_side(
                settings,
                self._place,
                a_plan(self._scale.tenants, self._scale.events),
                verify=self._verify,
            )
            self.result[part] = msgspec.to_builtins(sides)
        if self._verify:
            code = VIOLATED if faults else HOLDS
            self.result.setdefault("verify", {})[f"{part}: theirs"] = code
            self.code = max(self.code, code)
        for fault in faults:
            say(fault)


# -- telling ----------------------------------------------------------------------------------


def _machine(cores: str) -> dict[str, Any]:
    found = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(": ")[2] for line in found if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "cores_of_the_broker": cores,
        "memory_mb": os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES // 1_000_000,
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 1),
        "reference_us": _reference_us(),
    }


def _reference_us() -> int:
    """CPU time of a fixed piece of work, the shortest of ten: the measure of a machine's speed.

    Interpreter, JSON, hash and memory have a part each, as in the worker. Shared machines of one
    name differ by half, so that figures of two runs compare only when divided by it.
    """
    times = []
    for _ in range(10):
        began = process_time_ns()
        rows = [
            {"tenant": f"t{number}", "balance": str(number), "at": number}
            for number in range(5_000)
        ]
        head = b""
        for row in rows:
            head = sha256(head + msgspec.json.encode(row)).digest()
        times.append((process_time_ns() - began) // 1_000)
    return min(times)


def _versions() -> dict[str, str]:
    packages = ("aiokafka", "faust-streaming", "msgspec", "orjson", "numpy", "uvloop", "xxhash")
    return {
        "python": platform.python_version(),
        "kafka": broker.external() or broker.KAFKA_VERSION,
        "hot_path": "sources" if charging.__file__.endswith(".py") else "compiled",
        **{name: version(name) for name in packages},
    }


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            name: one
            for member, inner in value.items()
            for name, one in _flat(f"{prefix}.{member}" if prefix else member, inner).items()
        }
    return {prefix: value}


def table(result: dict[str, Any]) -> list[str]:
    """The figures as lines, with the bar beside those that have one."""
    bars = {bar.figure: bar for bar in BARS}
    lines: list[str] = []
    for figure, value in _flat("", result).items():
        if isinstance(value, list):
            lines += _curve_lines(figure, value)
            continue
        bar = bars.get(figure)
        told = ""
        if bar is not None:
            reached = Decimal(str(value))
            holds = reached >= bar.bound if bar.at_least else reached <= bar.bound
            told = f"  {'>=' if bar.at_least else '<='} {bar.bound:,}"
            told += "" if holds else "  MISSED"
        lines.append(f"{figure:<40}{_shown(value):>24}{told}")
    return lines


def _curve_lines(figure: str, points: list[dict[str, Any]]) -> list[str]:
    names = list(points[0])
    widths = [max(len(name), 12) for name in names]
    rows = [names, *([_shown(point[name]) for name in names] for point in points)]
    return [
        figure,
        *(
            "  " + "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
            for row in rows
        ),
    ]


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def share_out(
    cluster: broker.Cluster | None, cores: set[int], set_affinity: Callable[[int, set[int]], None]
) -> tuple[tuple[int, ...], str]:
    """Give a broker of ours cores that the workers do not have, where there are enough. Returns
    the workers' cores (none: any) and what to say of it."""
    if cluster is None:
        return (), "not ours"
    if len(cores) < CORES_TO_SHARE_OUT or shutil.which("taskset") is None:
        return (), "shared with the workers"
    own = set(sorted(cores)[-2:])
    for pid in cluster.pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            set_affinity(int(task.name), own)
    return tuple(sorted(cores - own)), ",".join(map(str, sorted(own)))


def main(
    only: Annotated[
        list[Part] | None, typer.Option(help="A part; may be repeated. Default: the first four.")
    ] = None,
    events: Annotated[int, typer.Option(min=1_000, help="Events to book.")] = 1_000_000,
    tenants: Annotated[int, typer.Option(min=1, help="Tenants, Zipf 1.0.")] = 100_000,
    rows: Annotated[int, typer.Option(min=1, help="Rows to restore.")] = 1_000_000,
    ids: Annotated[int, typer.Option(min=10_000, help="Ids to restore.")] = 10_000_000,
    point: Annotated[
        int, typer.Option(min=1_000, help="Events of one point of a curve.")
    ] = 300_000,
    skip_verify: Annotated[bool, typer.Option("--skip-verify", help="Do not audit.")] = False,
    out: Annotated[Path, typer.Option(help="Where to store it.")] = Path("build/bench.json"),
) -> None:
    """Measure workers on this machine: throughput, latency, restore, ids; and curves."""
    tune_client()
    compress_fast()
    scale = Scale(events=events, tenants=tenants, rows=rows, ids=ids, point=point)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="credits-bench-")))
        bootstrap, data, cluster = broker.external(), None, None
        if bootstrap is None:
            say(f"starting Kafka {broker.KAFKA_VERSION}")
            cluster = stack.enter_context(broker.Cluster.start(folder / "kafka"))
            bootstrap, data = cluster.bootstrap, folder / "kafka" / "node-0" / "data"
        cores, told = share_out(cluster, os.sched_getaffinity(0), os.sched_setaffinity)
        machine = _machine(told)
        run = Run(bootstrap, Place(folder, cores), scale, data=data, verify=not skip_verify)
        run.result |= {"machine": machine, "versions": _versions()}
        try:
            asyncio.run(run.measure(set(only or SHORT)))
        except BenchError as error:
            log = folder / "worker.log"
            if log.exists():
                say("".join(log.read_text().splitlines(keepends=True)[-20:]))
            say(str(error))
            raise SystemExit(1) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(run.result, indent=2) + "\n")
    for line in table(run.result):
        typer.echo(line)
    say(f"stored in {out}")
    if run.code:
        say("the books do not hold: these figures are void")
    raise SystemExit(run.code)


if __name__ == "__main__":
    typer.run(main)
