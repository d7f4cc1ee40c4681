"""Worker processes under measurement, and how far they have come."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Final

import aiohttp
import msgspec
import typer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError

from schemas import topics
from streams.engine.kafka import connection
from streams.settings import Settings
from streams.testbed import broker, load
from streams.testbed.load import Planned

READY_WITHIN_S: Final = 300
DRAINED_WITHIN_S: Final = 900
POLL_S: Final = 0.1
OPENED_AT_ONCE: Final = 24_000
_TICKS: Final = os.sysconf("SC_CLK_TCK")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class BenchError(Exception):
    """A measurement could not be made; the text says which and why."""


def say(text: str) -> None:
    """Tell the one who waits."""
    typer.echo(text, err=True)


def ms(seconds: float) -> int:
    """Seconds as whole milliseconds."""
    return round(seconds * 1_000)


def tenths(count: int) -> str:
    """A number of tenths as decimal text."""
    return f"{count // 10}.{count % 10}"


class Measured:
    """One process under measurement and what the kernel knows about it."""

    called = "the worker"

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], log: Path, cores: Sequence[int]
    ) -> None:
        self._log = log.open("ab")
        pinned = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
        self._process = subprocess.Popen(  # noqa: S603
            [*pinned, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self.began = monotonic()

    @property
    def log_name(self) -> str:
        """The file that has what it said."""
        return self._log.name

    def require_alive(self) -> None:
        """Raises BenchError when the process has ended."""
        if self._process.poll() is not None:
            raise BenchError(f"{self.called} ended; see {self._log.name}")

    def cpu_us(self) -> int:
        """User and system time of all its threads so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * 1_000_000 // _TICKS

    def memory_bytes(self) -> int:
        """What of its memory is resident."""
        resident = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(resident) * PAGE_BYTES

    def most_memory_bytes(self) -> int:
        """The most that was ever resident."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1_024

    def kill(self) -> None:
        """SIGKILL: it has no last word."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Stop it in order, or by force when it takes too long."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Worker(Measured):
    """One worker process."""

    def __init__(self, settings: Settings, log: Path, cores: Sequence[int] = ()) -> None:
        command = [sys.executable, "-P", "-m", "streams", "worker"]
        super().__init__(command, _environment(settings), log, cores)
        self._settings = settings
        self.assigned = 0.0
        self.ready = 0.0

    async def until_ready(self) -> None:
        """Wait for /readyz, noting when partitions were assigned. Raises BenchError."""
        async with aiohttp.ClientSession() as session:
            while monotonic() < self.began + READY_WITHIN_S:
                self.require_alive()
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(self._url("readyz")) as response:
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

    async def metric(self, name: str) -> int:
        """A metric without labels, in whole numbers. Raises BenchError when there is none."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(self._url("metrics")) as response,
        ):
            text = await response.text()
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        if found is None:
            raise BenchError(f"the worker has no metric {name}")
        return round(float(found[1]))

    def _url(self, page: str) -> str:
        return f"http://127.0.0.1:{self._settings.metrics_port}/{page}"


def _environment(settings: Settings) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("CREDITS_")}
    default = msgspec.structs.asdict(Settings())
    changed = {
        name: value
        for name, value in msgspec.structs.asdict(settings).items()
        if value != default[name]
    }
    return kept | {f"CREDITS_{name.upper()}": str(value) for name, value in changed.items()}


class Place(msgspec.Struct, frozen=True):
    """Where a measurement happens: a folder for logs, and the workers' cores (none: any)."""

    folder: Path
    cores: tuple[int, ...] = ()


@contextlib.contextmanager
def running(settings: Settings, place: Place) -> Iterator[Worker]:
    """A worker of its own, stopped in the end. Two may run side by side."""
    settings = msgspec.structs.replace(settings, metrics_port=broker.free_port())
    worker = Worker(settings, place.folder / "worker.log", place.cores)
    try:
        yield worker
    finally:
        worker.stop()


class Progress:
    """How far a group has committed: that of the workers unless another is named."""

    def __init__(
        self, settings: Settings, admin: AIOKafkaAdminClient, group: str | None = None
    ) -> None:
        self._group = group or settings.app_id
        self._admin = admin

    async def committed(self, names: Sequence[str]) -> int:
        """Records behind the committed offsets of some topics, each read from its beginning."""
        try:
            offsets = await self._admin.list_consumer_group_offsets(self._group)
        except GroupCoordinatorNotAvailableError:
            return 0  # a new broker has none until its first group
        return sum(max(0, found.offset) for tp, found in offsets.items() if tp.topic in names)

    async def steps(
        self, names: Sequence[str], count: int, processes: Sequence[Measured]
    ) -> AsyncIterator[int]:
        """How many are committed, asked again and again until it is so many or more. Raises
        BenchError, at once when a process ends."""
        deadline = monotonic() + DRAINED_WITHIN_S
        while True:
            done = await self.committed(names)
            yield done
            if done >= count:
                return
            for process in processes:
                process.require_alive()
            if monotonic() > deadline:
                raise BenchError(f"{done} of {count} records after {DRAINED_WITHIN_S} s")
            await asyncio.sleep(POLL_S)

    async def until(self, names: Sequence[str], count: int, processes: Sequence[Measured]) -> None:
        """Wait until so many are committed. Raises BenchError, at once when a process ends."""
        async for _ in self.steps(names, count, processes):
            pass


@contextlib.asynccontextmanager
async def progress(settings: Settings, group: str | None = None) -> AsyncIterator[Progress]:
    """Watch the offsets of an installation's workers, or of another group."""
    admin = AIOKafkaAdminClient(**connection(settings))
    await admin.start()
    try:
        yield Progress(settings, admin, group)
    finally:
        await admin.close()


def usage_names(settings: Settings) -> list[str]:
    """The topics that a load of usage is written to."""
    return [settings.topics.of(topics.CALL_USAGE), settings.topics.of(topics.CONFERENCE_USAGE)]


async def open_tenants(settings: Settings, place: Place, records: Iterable[Planned]) -> None:
    """Let a worker book opening commands, so many at a time: how it does with a million of them
    waiting is another measurement."""
    with running(settings, place) as worker:
        await worker.until_ready()
        async with progress(settings) as watched:
            count = 0
            waiting = iter(records)
            while some := list(islice(waiting, OPENED_AT_ONCE)):
                count += await load.preload(settings, some, datetime.now(UTC))
                await watched.until([settings.topics.of(topics.COMMAND)], count, [worker])
