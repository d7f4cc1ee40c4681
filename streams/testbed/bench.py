"""The benchmark: what one worker process does on this machine, beside a real Kafka.

Run it as `python -m streams.testbed.bench`. The worker is a child process of its own; everything
is measured from outside it: its committed offsets, its CPU seconds and memory as the kernel counts
them, and its committed entries.
"""

import asyncio
import contextlib
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Final

import aiohttp
import msgspec
import orjson
import typer
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from msgspec import Struct

from schemas import topics
from streams import provision
from streams.billing import charging
from streams.engine.kafka import connection, tune_client
from streams.settings import Settings
from streams.testbed import auditor, broker, load
from streams.testbed.kafka import ends_of, started_producer, started_reader
from streams.testbed.load import Envelope, Plan, Planned, events, partition_of

READY_WITHIN_S: Final = 120
DRAINED_WITHIN_S: Final = 600
VERIFIED_WITHIN_S: Final = 1_800
POLL_S: Final = 0.1
LATENCY_FOR_S: Final = 15
# Latency counts from the intended send time, so what a slice waits here is counted too.
SLICE_MS: Final = 20
# Entries of one partition are read for the latency: reading all would cost what is measured.
WATCHED: Final = 0
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class Throughput(Struct, frozen=True, kw_only=True):
    """Booking a prepared topic. CPU is that of the worker process alone."""

    events: int
    seconds_ms: int
    events_per_s: int
    cpu_us_per_event: str


class Restore(Struct, frozen=True, kw_only=True):
    """Opening all shards on a table of that many rows: from assignment to ready."""

    rows: int
    restore_ms: int
    rows_per_s: int
    start_to_ready_ms: int


class Latency(Struct, frozen=True, kw_only=True):
    """From the intended send time to the moment a read_committed reader has the entry."""

    rate: int
    samples: int
    p50_ms: int
    p99_ms: int
    max_ms: int


class Memory(Struct, frozen=True, kw_only=True):
    """Resident memory of the worker process."""

    mb_without_tenants: int
    mb_with_tenants: int
    mb_per_million_tenants: int


class BenchError(Exception):
    """A measurement could not be made; the text says which and why."""


class _Worker:
    """One worker process and what the kernel knows about it."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self._settings = settings
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "streams", "worker"],
            env=_environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self.began = monotonic()
        self.assigned = 0.0
        self.ready = 0.0

    async def until_ready(self) -> None:
        """Wait for /readyz, noting when partitions were assigned. Raises BenchError."""
        url = f"http://127.0.0.1:{self._settings.metrics_port}/readyz"
        async with aiohttp.ClientSession() as session:
            while monotonic() < self.began + READY_WITHIN_S:
                if self._process.poll() is not None:
                    raise BenchError(f"the worker ended; see {self._log.name}")
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(url) as response:
                        text = await response.text()
                    if not self.assigned and "no assignment yet" not in text:
                        self.assigned = monotonic()
                    if response.status == 200:
                        self.ready = monotonic()
                        return
                await asyncio.sleep(0.02)
        raise BenchError(
            f"the worker was not ready within {READY_WITHIN_S} s; see {self._log.name}"
        )

    def cpu_us(self) -> int:
        """User and system time of all its threads so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * 1_000_000 // _TICKS

    def memory_bytes(self) -> int:
        """What of its memory is resident."""
        resident = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(resident) * _PAGE_BYTES

    def stop(self) -> None:
        """Stop it in order, or by force when it takes too long."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _environment(settings: Settings) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("CREDITS_")}
    default = msgspec.structs.asdict(Settings())
    changed = {
        name: value
        for name, value in msgspec.structs.asdict(settings).items()
        if value != default[name]
    }
    return kept | {f"CREDITS_{name.upper()}": str(value) for name, value in changed.items()}


@contextlib.contextmanager
def _running(settings: Settings, folder: Path) -> Iterator[_Worker]:
    worker = _Worker(settings, folder / "worker.log")
    try:
        yield worker
    finally:
        worker.stop()


@contextlib.asynccontextmanager
async def _progress(settings: Settings) -> AsyncIterator["_Progress"]:
    admin = AIOKafkaAdminClient(**connection(settings))
    await admin.start()
    try:
        yield _Progress(settings, admin)
    finally:
        await admin.close()


class _Progress:
    """How far the worker has committed, told from the group's offsets."""

    def __init__(self, settings: Settings, admin: AIOKafkaAdminClient) -> None:
        self._group = settings.app_id
        self._admin = admin

    async def committed(self, names: Sequence[str]) -> int:
        """Records behind the committed offsets of some topics, each read from its beginning."""
        offsets = await self._admin.list_consumer_group_offsets(self._group)
        return sum(max(0, found.offset) for tp, found in offsets.items() if tp.topic in names)

    async def until(self, names: Sequence[str], count: int) -> None:
        """Wait until so many are committed. Raises BenchError."""
        deadline = monotonic() + DRAINED_WITHIN_S
        while (done := await self.committed(names)) < count:
            if monotonic() > deadline:
                raise BenchError(f"{done} of {count} records after {DRAINED_WITHIN_S} s")
            await asyncio.sleep(POLL_S)


def _usage_names(settings: Settings) -> list[str]:
    return [settings.topics.of(topics.CALL_USAGE), settings.topics.of(topics.CONFERENCE_USAGE)]


def _plan(tenants: int, count: int, seed: int = 1) -> Plan:
    return Plan(
        tenants=tenants,
        events=count,
        seed=seed,
        duplicates_ppm=10_000,
        late_ppm=0,
        malformed_ppm=0,
        wrong_partition_ppm=0,
        envelope=Envelope.BARE,
    )


async def _open(settings: Settings, worker: _Worker, records: Iterable[Planned]) -> None:
    count = await load.preload(settings, records, datetime.now(UTC))
    async with _progress(settings) as progress:
        await progress.until([settings.topics.of(topics.COMMAND)], count)


async def measure_throughput(settings: Settings, folder: Path, plan: Plan) -> Throughput:
    """Open the tenants, stop, prepare the topics, start cold, and watch it drain."""
    start = datetime.now(UTC)
    with _running(settings, folder) as worker:
        await worker.until_ready()
        await _open(settings, worker, load.openings(plan, start))
    _say(f"writing {plan.events:,} events")
    began = monotonic()
    count = await load.preload(settings, events(plan, start), start)
    _say(f"written at {int(count / (monotonic() - began)):,} events/s; booking them")
    names = _usage_names(settings)
    async with _progress(settings) as progress:
        with _running(settings, folder) as worker:
            while not (first := await progress.committed(names)):
                if monotonic() > worker.began + READY_WITHIN_S:
                    raise BenchError(f"nothing was booked; see {folder / 'worker.log'}")
                await asyncio.sleep(POLL_S)
            began, cpu_us = monotonic(), worker.cpu_us()
            await progress.until(names, count)
            took_ms, cpu_us = _ms(monotonic() - began), worker.cpu_us() - cpu_us
    done = count - first
    if not done or not took_ms:
        raise BenchError(f"{count} events are too few to measure: all were booked at once")
    return Throughput(
        events=done,
        seconds_ms=took_ms,
        events_per_s=done * 1_000 // took_ms,
        cpu_us_per_event=_tenths(cpu_us * 10 // done),
    )


# -- latency ----------------------------------------------------------------------------------


async def measure_latency(settings: Settings, folder: Path, plan: Plan, rate: int) -> Latency:
    """Send at a rate, open loop, to a worker that runs, and watch one partition's entries."""
    with _running(settings, folder) as worker:
        await worker.until_ready()
        reader = await started_reader(settings)
        producer = await started_producer(
            settings, max_batch_size=900_000, compression_type="lz4", linger_ms=0
        )
        try:
            slices = _slices(settings, producer, plan, rate)
            tp = TopicPartition(settings.topics.of(topics.LEDGER), WATCHED)
            reader.assign([tp])
            reader.seek(tp, (await ends_of(reader, [tp]))[tp])
            began = monotonic() + 1
            watching = asyncio.create_task(
                _watch(reader, began, rate, until=began + LATENCY_FOR_S + 10)
            )
            await _send_slices(producer, slices, began)
            latencies_ms = sorted(await watching)
        finally:
            await producer.stop()
            await reader.stop()
    if not latencies_ms:
        raise BenchError("no entry was seen while latency was measured")
    return Latency(
        rate=rate,
        samples=len(latencies_ms),
        p50_ms=latencies_ms[len(latencies_ms) // 2],
        p99_ms=latencies_ms[len(latencies_ms) * 99 // 100],
        max_ms=latencies_ms[-1],
    )


def _slices(
    settings: Settings, producer: AIOKafkaProducer, plan: Plan, rate: int
) -> list[dict[TopicPartition, Any]]:
    """Record batches, one a slice and partition, made beforehand: making them costs more than
    sending. An event's call id is its index, and so says when it was meant to be sent."""
    start = datetime.now(UTC)
    slices: list[dict[TopicPartition, Any]] = [{} for _ in range(LATENCY_FOR_S * 1_000 // SLICE_MS)]
    per_slice = rate * SLICE_MS // 1_000
    for index, planned in enumerate(events(plan, start)):
        event = orjson.loads(planned.value or b"{}") | {"call_id": f"at-{index}"}
        tp = TopicPartition(
            settings.topics.of(planned.topic), partition_of(planned, settings.partitions)
        )
        batches = slices[index // per_slice]
        batch = batches.get(tp)
        if batch is None:
            batch = batches[tp] = producer.create_batch()
        batch.append(timestamp=None, key=planned.key, value=orjson.dumps(event), headers=[])
    for batches in slices:
        for batch in batches.values():
            batch.close()
    return slices


async def _send_slices(
    producer: AIOKafkaProducer, slices: list[dict[TopicPartition, Any]], began: float
) -> None:
    acknowledged: list[Any] = []
    for number, batches in enumerate(slices):
        # At the end of the slice: none of its events is sent before its time.
        await asyncio.sleep(max(0, began + (number + 1) * SLICE_MS / 1_000 - monotonic()))
        acknowledged += await asyncio.gather(
            *(
                producer.send_batch(batch, tp.topic, partition=tp.partition)
                for tp, batch in batches.items()
            )
        )
    await asyncio.gather(*acknowledged)


async def _watch(reader: Any, began: float, rate: int, *, until: float) -> list[int]:
    """The latency of every entry of ours, until they cease."""
    latencies_ms: list[int] = []
    seen_at = until
    while monotonic() < until and not (latencies_ms and monotonic() > seen_at + 2):
        for records in (await reader.getmany(timeout_ms=100)).values():
            seen_at = monotonic()
            for record in records:
                call_id = orjson.loads(record.value).get("call_id") or ""
                if call_id.startswith("at-"):
                    meant = began + int(call_id.removeprefix("at-")) / rate
                    latencies_ms.append(_ms(seen_at - meant))
    return latencies_ms


# -- restore and memory -----------------------------------------------------------------------


async def measure_restore(settings: Settings, folder: Path, rows: int) -> tuple[Restore, Memory]:
    """Open so many tenants, stop, start again, and see how soon the worker is ready."""
    start = datetime.now(UTC)
    with _running(settings, folder) as worker:
        await worker.until_ready()
        empty_bytes = worker.memory_bytes()
        # Every other command is the settings that follow an opening.
        opened = islice(load.openings(_plan(rows, 0), start), 0, None, 2)
        await _open(settings, worker, opened)
    with _running(settings, folder) as worker:
        await worker.until_ready()
        full_bytes = worker.memory_bytes()
    restore_ms = max(1, _ms(worker.ready - worker.assigned))
    restore = Restore(
        rows=rows,
        restore_ms=restore_ms,
        rows_per_s=rows * 1_000 // restore_ms,
        start_to_ready_ms=_ms(worker.ready - worker.began),
    )
    memory = Memory(
        mb_without_tenants=empty_bytes // 1_000_000,
        mb_with_tenants=full_bytes // 1_000_000,
        mb_per_million_tenants=(full_bytes - empty_bytes) // max(1, rows),
    )
    return restore, memory


# -- the run ----------------------------------------------------------------------------------


def _ms(seconds: float) -> int:
    return round(seconds * 1_000)


def _tenths(count: int) -> str:
    return f"{count // 10}.{count % 10}"


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _machine() -> dict[str, Any]:
    found = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(": ")[2] for line in found if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_mb": os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES // 1_000_000,
        "system": platform.system(),
        "load_before": os.getloadavg()[0],
    }


def _versions() -> dict[str, str]:
    packages = ("aiokafka", "faust-streaming", "msgspec", "orjson", "numpy", "uvloop", "xxhash")
    return {
        "python": platform.python_version(),
        "kafka": broker.external() or broker.KAFKA_VERSION,
        "hot_path": "sources" if charging.__file__.endswith(".py") else "compiled",
        **{name: version(name) for name in packages},
    }


async def _measure(
    bootstrap: str, folder: Path, *, count: int, tenants: int, rows: int, skip_verify: bool
) -> tuple[dict[str, Any], int]:
    def installation() -> Settings:
        return Settings(
            broker=bootstrap,
            namespace=f"t-{secrets.token_hex(3)}-",
            metrics_port=broker.free_port(),
        )

    result: dict[str, Any] = {"machine": _machine(), "versions": _versions()}
    made: list[Settings] = []
    code = 0
    try:
        settings = installation()
        made.append(settings)
        await provision.apply(settings)
        _say(f"opening {tenants:,} tenants")
        throughput = await measure_throughput(settings, folder, _plan(tenants, count))
        result["throughput"] = msgspec.to_builtins(throughput)
        # Whole slices, so that every event has one.
        per_slice = max(1, throughput.events_per_s // 2 * SLICE_MS // 1_000)
        rate = per_slice * 1_000 // SLICE_MS
        _say(f"latency at {rate:,} events/s")
        # A seed of its own: its ids must be new ones.
        plan = _plan(tenants, rate * LATENCY_FOR_S, seed=2)
        result["latency"] = msgspec.to_builtins(await measure_latency(settings, folder, plan, rate))
        if not skip_verify:
            _say("checking the books from the topics alone")
            report = await auditor.verify(settings, auditor.Options(deadline_s=VERIFIED_WITHIN_S))
            for line in report.lines():
                _say(line)
            code = report.exit_code
            result["verify"] = code
        settings = installation()
        made.append(settings)
        await provision.apply(settings)
        _say(f"restore of {rows:,} rows")
        restore, memory = await measure_restore(settings, folder, rows)
        result["restore"] = msgspec.to_builtins(restore)
        result["memory"] = msgspec.to_builtins(memory)
    finally:
        if broker.external() is not None:
            for settings in made:
                await provision.remove_namespace(settings)
    return result, code


def main(
    count: Annotated[int, typer.Option("--events", min=1_000, help="Events to book.")] = 1_000_000,
    tenants: Annotated[int, typer.Option(min=1, help="Tenants, Zipf 1.0.")] = 100_000,
    rows: Annotated[int, typer.Option(min=1, help="Rows to restore.")] = 1_000_000,
    skip_verify: Annotated[bool, typer.Option("--skip-verify", help="Do not audit.")] = False,
    out: Annotated[Path, typer.Option(help="Where to store it.")] = Path("build/bench.json"),
) -> None:
    """Measure throughput, latency, restore and memory of one worker process."""
    tune_client()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="credits-bench-")))
        bootstrap = broker.external()
        if bootstrap is None:
            _say(f"starting Kafka {broker.KAFKA_VERSION}")
            bootstrap = stack.enter_context(broker.Cluster.start(folder / "kafka")).bootstrap
        try:
            result, code = asyncio.run(
                _measure(
                    bootstrap,
                    folder,
                    count=count,
                    tenants=tenants,
                    rows=rows,
                    skip_verify=skip_verify,
                )
            )
        except BenchError as error:
            log = folder / "worker.log"
            if log.exists():
                _say("".join(log.read_text().splitlines(keepends=True)[-20:]))
            _say(str(error))
            raise SystemExit(1) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    for group in ("throughput", "latency", "restore", "memory"):
        for name, value in result[group].items():
            shown = f"{value:,}" if isinstance(value, int) else value
            typer.echo(f"{group + '.' + name:<36}{shown:>16}")
    _say(f"stored in {out}")
    raise SystemExit(code)


if __name__ == "__main__":
    typer.run(main)
