"""Real worker processes for tests, and the questions that tests ask of an installation."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Final

import msgspec
from aiokafka import AIOKafkaProducer, TopicPartition

from schemas import topics
from streams.cli.demo import environment_of
from streams.engine.kafka import connection
from streams.engine.position import Position, decode_position
from streams.engine.rows import POSITION_KEY
from streams.settings import Settings
from streams.testbed.auditor.reading import verify
from streams.testbed.auditor.verdict import HOLDS, Report
from streams.testbed.auditor.view import Options
from streams.testbed.broker import free_port
from streams.testbed.kafka import ends_of, read_to_end, started_reader

READY_WITHIN_S: Final = 60
DRAINED_WITHIN_S: Final = 90


@asynccontextmanager
async def a_transaction(settings: Settings, name: str) -> AsyncIterator[AIOKafkaProducer]:
    """Somebody else's producer in a transaction, which the broker would let be for ten minutes."""
    producer = AIOKafkaProducer(
        **connection(settings),
        transactional_id=f"{settings.namespace}{name}",
        transaction_timeout_ms=600_000,
    )
    await producer.start()
    try:
        await producer.begin_transaction()
        yield producer
    finally:
        await producer.stop()


class Worker:
    """A worker in a session of its own. `module` is what runs: the product, or a mutant of it."""

    def __init__(
        self, settings: Settings, folder: Path, name: str = "worker", *, module: str = "streams"
    ) -> None:
        self.settings = msgspec.structs.replace(settings, metrics_port=free_port())
        self.log_path = folder / f"{name}.log"
        self._module = module
        # The product as it is installed, from sources or compiled; a mutant from the checkout.
        self._found = ("-P",) if module == "streams" else ()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, **environment: str) -> "Worker":
        """Start it; its log goes to a file of its own."""
        inherited = {
            name: text for name, text in os.environ.items() if not name.startswith("CREDITS_")
        }
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self._found, "-m", self._module, "worker", *arguments],
                env={**inherited, **environment_of(self.settings), **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=Path(__file__).parents[2],
            )
        return self

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self.log_path.read_text()

    def probe(self, page: str) -> tuple[int, str]:
        """A page of its listener; status 0 when nobody answers."""
        url = f"http://127.0.0.1:{self.settings.metrics_port}{page}"
        try:
            with urllib.request.urlopen(url, timeout=3) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def reasons(self) -> list[str]:
        """Why it is not ready."""
        status, page = self.probe("/readyz")
        return list(json.loads(page)["reasons"]) if status else ["no answer"]

    async def ready(self, within_s: float = READY_WITHIN_S) -> None:
        """Wait until it is ready."""
        await until(lambda: self.probe("/readyz")[0] == 200, within_s, lambda: self.log[-3_000:])

    async def ended(self, within_s: float = 60) -> int:
        """Wait until it has ended by itself; its exit code."""
        process = self.process
        assert process is not None
        await until(lambda: process.poll() is not None, within_s, lambda: self.log[-3_000:])
        return process.returncode

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and reap."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        if self.process is not None:
            self.process.wait()

    async def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.signal(signal.SIGTERM)
        return await self.ended(20)


async def until(
    condition: Callable[[], bool | Awaitable[bool]],
    within_s: float,
    explain: Callable[[], str] = lambda: "",
) -> None:
    """Wait for a condition, with a deadline."""
    deadline = monotonic() + within_s
    while True:
        holds = condition()
        if not isinstance(holds, bool):
            holds = await holds
        if holds:
            return
        assert monotonic() < deadline, f"not within {within_s} s: {explain()}"
        await asyncio.sleep(0.1)


async def positions(settings: Settings) -> dict[int, Position]:
    """The position row of every partition that has booked."""
    found = {}
    async for record in read_to_end(settings, [settings.topics.of(topics.CHANGELOG)]):
        if record.key == POSITION_KEY:
            found[record.partition] = decode_position(record.value)
    return found


async def unbooked(settings: Settings, reached: dict[int, Position] | None = None) -> int:
    """Records of the source topics that no position row covers yet. `reached` are the position
    rows when somebody has read them already."""
    if reached is None:
        reached = await positions(settings)
    reader = await started_reader(settings)
    waiting = 0
    try:
        tps = [
            TopicPartition(name, number)
            for name in settings.topics.sources
            for number in range(settings.partitions)
        ]
        starts = dict(await reader.beginning_offsets(tps))
        ends = await ends_of(reader, tps)
        for tp in tps:
            position = reached.get(tp.partition)
            source = None if position is None else position.sources.get(tp.topic)
            begin = starts[tp] if source is None else source.next
            if begin >= ends[tp]:
                continue
            # What is left may be control records alone, which nobody books.
            reader.assign([tp])
            reader.seek(tp, max(begin, starts[tp]))
            while await reader.position(tp) < ends[tp]:
                for records in (await reader.getmany(tp, timeout_ms=200)).values():
                    waiting += len(records)
    finally:
        await reader.stop()
    return waiting


async def drained(settings: Settings, within_s: float = DRAINED_WITHIN_S) -> None:
    """Wait until everything written so far is booked."""
    left = -1

    async def nothing_left() -> bool:
        nonlocal left
        left = await unbooked(settings)
        return left == 0

    await until(nothing_left, within_s, lambda: f"{left} records are not booked")


async def audited(settings: Settings, expect: Path | None = None) -> Report:
    """The auditor's report, which must hold."""
    report = await verify(settings, Options(expect=expect))
    assert report.exit_code == HOLDS, "\n".join(report.lines())
    return report
