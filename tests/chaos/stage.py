"""What a campaign runs on: brokers behind a network of ours, workers that are started again when
they end, a payment service, a load that can pause, and a reader that watches from beside.
"""

import asyncio
import csv
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib.resources import files
from io import StringIO
from pathlib import Path
from time import monotonic
from typing import Any, Final

import msgspec
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from schemas import topics
from streams import provision
from streams.cli.demo import environment_of
from streams.cli.output import EXIT_CONFLICT
from streams.engine.kafka import log_reader
from streams.engine.position import Position, decode_position
from streams.engine.rows import POSITION_KEY
from streams.provision import BrokerAwayError
from streams.settings import Settings
from streams.testbed import load
from streams.testbed.broker import Cluster, free_port
from streams.testbed.kafka import ends_of, started_producer, started_reader
from streams.testbed.load import Planned, Produced, partition_of
from tests.broker.harness import Worker, unbooked
from tests.chaos import calls, orders
from tests.chaos.calls import LongCalls
from tests.chaos.network import Network
from tests.chaos.orders import FAR, MOBILE, PARTNERS, Answers, Office
from tests.chaos.schedule import Options, Publication

ROOT: Final = Path(__file__).parents[2]
SERVED_WITHIN_S: Final = 240
PUBLISHED_WITHIN_S: Final = 120
RESTART_AFTER_S: Final = 0.5
MOST_UNANSWERED: Final = 20_000
# More than any campaign writes; it stops when it has what it wants.
ENDLESS: Final = 1_000_000_000
SESSION_S: Final = 6
PARTITIONS: Final = 4
# The cleaner looks four times a second, and segments are small: compaction all the time.
BROKER: Final = {
    "log.cleaner.backoff.ms": "250",
    "group.min.session.timeout.ms": "6000",
    "offsets.topic.num.partitions": "5",
    "transaction.state.log.num.partitions": "5",
}
CHANGELOG: Final = {"segment.ms": "5000", "min.cleanable.dirty.ratio": "0.2"}


class StuckError(Exception):
    """Something did not happen within its time."""


async def wait(
    condition: Callable[[], bool | Awaitable[bool]], within_s: float, what: str
) -> float:
    """Wait for a condition; the seconds it took. Raises StuckError."""
    began = monotonic()
    while True:
        holds = condition()
        if not isinstance(holds, bool):
            holds = await holds
        if holds:
            return monotonic() - began
        if monotonic() - began > within_s:
            raise StuckError(f"not within {within_s:.0f} s: {what}")
        await asyncio.sleep(0.1)


def _now() -> datetime:
    return datetime.now(UTC)


async def credits_command(settings: Settings, *arguments: str) -> tuple[int, str]:
    """Run the product's command line; its exit code and what it told."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("CREDITS_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "streams", *arguments,
        env={**inherited, **environment_of(settings)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )  # fmt: skip
    _, told = await process.communicate()
    assert process.returncode is not None
    return process.returncode, told.decode()


# From this price of a minute on, a destination is of a risk class.
_DEAR: Final = Decimal("0.2")


def repriced(percent: int) -> str:
    """The packaged deck with all prices in hundredths of what they are, and with risk classes:
    velocity limits look at what is spent on them."""
    text = (files("streams") / "default_deck.csv").read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(StringIO(text)))
    made = StringIO()
    writer = csv.DictWriter(made, [*rows[0], "Risk class"])
    writer.writeheader()
    for row in rows:
        price = Decimal(row["Price / min"]) * percent / 100
        writer.writerow(row | {"Price / min": f"{price:f}", "Risk class": _risk_of(row)})
    return made.getvalue()


def _risk_of(row: Mapping[str, str]) -> str:
    """Mobile numbers are one class, other calls to where a minute is dear are another."""
    if row["Destination Type"] == "mobile":
        return MOBILE
    return FAR if Decimal(row["Price / min"]) >= _DEAR else ""


class Slot:
    """A place for a worker: whoever is in it has the same folder, log and port."""

    def __init__(self, settings: Settings, folder: Path, name: str) -> None:
        self.name = name
        self.folder = folder / name
        self.folder.mkdir()
        self.worker = Worker(settings, folder, name, module="tests.chaos.worker")
        self.worker.log_path.touch()
        self.wanted = False
        self.held = False
        self.started_at = 0.0
        self.starts = 0
        # Where the log of the process that runs begins.
        self.began = 0

    @property
    def running(self) -> bool:
        """Whether its process lives (a stopped one does)."""
        process = self.worker.process
        return process is not None and process.poll() is None

    def start(self, **environment: str) -> None:
        """Start its worker."""
        self.starts += 1
        self.began = self.mark()
        self.started_at = monotonic()
        self.worker.start(CHAOS_FOLDER=str(self.folder), **environment)

    def mark(self) -> int:
        """Where its log ends now."""
        return self.worker.log_path.stat().st_size if self.worker.log_path.exists() else 0

    def told(self, since: int, event: str) -> list[dict[str, Any]]:
        """The lines of an event since a mark."""
        with self.worker.log_path.open("rb") as log:
            log.seek(since)
            text = log.read().decode(errors="replace")
        lines = []
        for line in text.splitlines():
            if f'"{event}"' in line:
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    continue  # half a line of a process that was killed while writing it
        return [line for line in lines if line.get("event") == event]

    def last_line(self) -> str:
        """Where the log of its worker ends, shortened."""
        with self.worker.log_path.open("rb") as log:
            log.seek(self.began)
            lines = log.read().decode(errors="replace").splitlines()
        return lines[-1][:300] if lines else "nothing was logged"

    def partitions(self) -> list[int]:
        """What its worker was last assigned."""
        told = self.told(0, "assigned")
        return list(told[-1]["partitions"]) if told else []

    async def ready(self) -> bool:
        """Whether its worker says it is ready."""
        return (await asyncio.to_thread(self.worker.probe, "/readyz"))[0] == 200


class Payments:
    """The simulated payment service as a process of its own."""

    def __init__(self, settings: Settings, folder: Path, seed: int) -> None:
        self._settings, self._seed = settings, seed
        self._log = folder / "payments.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.wanted = False

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it."""
        inherited = {
            name: text for name, text in os.environ.items() if not name.startswith("CREDITS_")
        }
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "streams", "payments", "run", "--seed", str(self._seed)],
                env={**inherited, **environment_of(self._settings)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=ROOT,
            )

    def kill(self) -> None:
        """SIGKILL, and reap."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def rest(self) -> None:
        """End in order, until it is wanted again."""
        self.wanted = False
        if self.process is not None and self.running:
            self.process.send_signal(signal.SIGTERM)
            try:
                await wait(lambda: not self.running, 20, "the payment service ends")
            except StuckError:
                self.kill()


class Watcher:
    """A read_committed reader of the changelog that goes along while things break.

    It keeps the last position of every partition and when it moved. Positions that step back are a
    violation that an audit afterwards could not see.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._next: dict[TopicPartition, int] = {
            TopicPartition(settings.topics.of(topics.CHANGELOG), number): 0
            for number in range(settings.partitions)
        }
        self.positions: dict[int, Position] = {}
        self.moved_at: dict[int, float] = {}
        self.violations: list[str] = []
        self.unserved_s: list[float] = []
        self._waiting: dict[int, float] = {}

    def lost(self, partitions: list[int]) -> None:
        """These lose their owner now; until they move again they are not served."""
        for partition in partitions:
            self._waiting.setdefault(partition, monotonic())

    def forget_waiting(self) -> None:
        """What waits now waits for something else: for records, or for its broker."""
        self._waiting.clear()

    def booked(self) -> int:
        """Source offsets passed, summed."""
        return sum(
            source.next for row in self.positions.values() for source in row.sources.values()
        )

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            reader = log_reader(self._settings)
            try:
                await reader.start()
                reader.assign(list(self._next))
                for tp, offset in self._next.items():
                    reader.seek(tp, offset)
                while True:
                    for tp, records in (await reader.getmany(timeout_ms=100)).items():
                        self._take(tp, records)
            except (KafkaError, OSError):
                await asyncio.sleep(0.5)
            finally:
                await asyncio.sleep(0)
                await reader.stop()

    def _take(self, tp: TopicPartition, records: list[Any]) -> None:
        self._next[tp] = records[-1].offset + 1
        now = monotonic()
        for record in records:
            if record.key != POSITION_KEY:
                continue
            row = decode_position(record.value)
            before = self.positions.get(tp.partition)
            self.positions[tp.partition] = row
            if before is None:
                continue
            for topic, source in before.sources.items():
                if topic not in row.sources or row.sources[topic].next < source.next:
                    self.violations.append(
                        f"{topic}/{tp.partition} stepped back from {source.next} at changelog "
                        f"offset {record.offset}"
                    )
            if row.seen_next < before.seen_next or row.now < before.now:
                self.violations.append(f"ids or time of {tp.partition} stepped back")
            if row.sources != before.sources:
                self.moved_at[tp.partition] = now
                began = self._waiting.pop(tp.partition, None)
                if began is not None:
                    self.unserved_s.append(now - began)


class Traffic:
    """A load that pauses and goes on. Whatever it has taken from its plan it writes, once, unless
    its producer breaks: then what was not acknowledged is written again."""

    def __init__(self, settings: Settings, plan: load.Plan, start: datetime) -> None:
        self._settings, self._plan, self.start = settings, plan, start
        self.office = Office(plan, start)
        self._records: Iterator[Planned] = self._all(plan)
        self._pending: dict[int, Planned] = {}
        self._flows = asyncio.Event()
        self._taken = 0
        self.rate = plan.rate
        self.produced = Produced()
        # Orders that are acknowledged, by id, and how often.
        self.ordered: Counter[str] = Counter()
        self.uncertain: Counter[str] = Counter()
        self.broken = 0
        self.idle = True

    def _all(self, plan: load.Plan) -> Iterator[Planned]:
        """Usage, and administrators' orders and long calls between. Calls that are open are open
        now: a load that pauses is soon behind its plan."""
        dice = random.Random(f"traffic/{plan.seed}")
        of_office = self.office.following()
        long_calls = LongCalls(plan.seed, plan.tenants, _now).following()
        for planned in load.events(plan, self.start, _now):
            yield planned
            if not dice.randrange(orders.USAGE_TO_ONE):
                yield next(of_office)
            if not dice.randrange(calls.USAGE_TO_ONE):
                yield next(long_calls)

    def go(self) -> None:
        """Write."""
        self._flows.set()

    def wrote(self, count: int) -> bool:
        """Whether so many records are acknowledged."""
        return self.produced.sent >= count

    async def pause(self) -> None:
        """Write no more; return when all is acknowledged. Raises StuckError."""
        self._flows.clear()
        await wait(
            lambda: self.idle and not self._pending, 90, "what the load wrote is acknowledged"
        )

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            try:
                producer = await started_producer(
                    self._settings, linger_ms=5, max_batch_size=131_072, request_timeout_ms=30_000
                )
            except BrokerAwayError:
                await asyncio.sleep(0.5)
                continue
            try:
                await self._write(producer)
            except KafkaError:
                self.broken += 1
                for planned in self._pending.values():
                    self.uncertain[planned.reason.value if planned.reason else "booked"] += 1
            finally:
                try:
                    await asyncio.wait_for(producer.stop(), 10)
                except (TimeoutError, KafkaError):
                    producer._closed = True

    async def _write(self, producer: Any) -> None:
        failed: list[BaseException] = []

        def settled(number: int, future: asyncio.Future[Any]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is not None:
                failed.append(error)
            elif not future.cancelled() and number in self._pending:
                planned = self._pending.pop(number)
                self.produced.count(planned)
                if planned.topic == topics.COMMAND:
                    self.ordered[planned.event_id] += 1

        async def send(number: int, planned: Planned) -> None:
            future = await producer.send(
                self._settings.topics.of(planned.topic),
                key=planned.key,
                value=planned.value,
                headers=list(planned.headers),
                partition=partition_of(planned, self._settings.partitions),
            )
            future.add_done_callback(lambda one: settled(number, one))

        for number, planned in list(self._pending.items()):
            await send(number, planned)
        began, sent = monotonic(), 0
        while True:
            if failed:
                raise failed[0]
            if not self._flows.is_set():
                self.idle = True
                await asyncio.sleep(0.05)
                began, sent = monotonic(), 0
                continue
            self.idle = False
            ahead = sent / self.rate - (monotonic() - began)
            if ahead > 0 or len(self._pending) > MOST_UNANSWERED:
                await asyncio.sleep(max(ahead, 0.01))
                if ahead < -5:
                    began, sent = monotonic(), 0  # a broker was away: no flood after it
                continue
            planned = next(self._records)
            self._taken += 1
            sent += 1
            self._pending[self._taken] = planned
            await send(self._taken, planned)

    def expect(self, path: Path) -> None:
        """Write down what should have come of it. How often a record with a dead letter was
        written is not known when its acknowledgement was lost."""
        made = msgspec.structs.replace(
            self.produced,
            by_reason={
                reason: count
                for reason, count in self.produced.by_reason.items()
                if reason not in self.uncertain
            },
        )
        load.write_expectation(path, self._plan, self.start, made)


class Stage:
    """All of it, and what happened to it."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.dice = random.Random(f"stage/{options.seed}")
        self.counts: Counter[str] = Counter()
        self.points: Counter[str] = Counter()
        self.exits: Counter[str] = Counter()
        self.violations: list[str] = []
        self.rough = 0  # faults of brokers or network that go on now
        self._tasks: list[asyncio.Task[None]] = []
        self._marks: dict[str, int] = {}
        self.answers = Answers()
        self._heard: dict[TopicPartition, int] = {}

    async def open(self) -> None:
        """Start everything; return when every worker is ready and the tenants are open."""
        ports = {node: free_port() for node in range(self.options.brokers)}
        self.cluster = await asyncio.to_thread(
            Cluster.start,
            self.folder / "kafka",
            nodes=self.options.brokers,
            properties=BROKER,
            front=ports,
        )
        self.network = Network(ports, self.cluster.behind)
        await self.network.start()
        self.settings = Settings(
            broker=self.cluster.bootstrap,
            namespace="t-chaos-",
            partitions=PARTITIONS,
            replication=min(3, self.options.brokers),
            linger_ms=50,
            session_timeout_s=SESSION_S,
            result_timeout_s=3,
        )
        await provision.apply(self.settings)
        await self.configure(self.settings.topics.of(topics.CHANGELOG), CHANGELOG)
        fronted = msgspec.structs.replace(self.settings, broker=self.network.bootstrap)
        count = max(3, self.options.workers + 1)
        self.slots = [Slot(fronted, self.folder, f"worker-{n}") for n in range(1, count + 1)]
        self.payments = Payments(self.settings, self.folder, self.options.seed)
        plan = load.Plan(
            tenants=self.options.tenants,
            events=ENDLESS,
            rate=max(200, self.options.events // max(1, self.options.for_s)),
            seed=self.options.seed,
            conflicts_ppm=2_000,
            corrections_ppm=5_000,
            open_calls_ppm=30_000,
            licensed_ppm=300_000,
            granted_ppm=200_000,
        )
        self.watcher = Watcher(self.settings)
        self._go(self.watcher.run())
        self._go(self._supervise())
        # Before any worker: a tenant that is given a deck that nobody has read has calls unrated.
        await self.publish("first", Publication(0, 80, 60 * 86_400), PARTNERS)
        self.payments.wanted = True
        for slot in self.base:
            slot.wanted = True
        await self.served(*self.base)
        start = datetime.now(UTC)
        await load.open_tenants(self.settings, plan, now=start)
        self.traffic = Traffic(self.settings, plan, start)
        self._go(self.traffic.run())

    def _go(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.append(task)

    def check_tasks(self) -> None:
        """Raise what ended one of the stage's own tasks: a defect of the campaign."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def close(self) -> None:
        """Stop everything; nothing is left behind."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in getattr(self, "slots", []):
            slot.worker.kill()
        if hasattr(self, "payments"):
            self.payments.kill()
        if hasattr(self, "network"):
            await self.network.stop()
        if hasattr(self, "cluster"):
            await asyncio.to_thread(self.cluster.stop, kill=True)

    # -- the fleet ---------------------------------------------------------------------------

    @property
    def base(self) -> list[Slot]:
        """The workers there should be when nothing is wrong."""
        return self.slots[: self.options.workers]

    @property
    def spare(self) -> Slot:
        """A place beside the base, for one more."""
        return self.slots[-1]

    def running(self) -> list[Slot]:
        """Workers that a fault may be done to."""
        return [slot for slot in self.slots if slot.wanted and slot.running and not slot.held]

    async def any_worker(self) -> Slot:
        """One that runs; waits for one. Raises StuckError."""
        await wait(lambda: bool(self.running()), SERVED_WITHIN_S, "some worker runs")
        return self.dice.choice(self.running())

    async def served(self, *slots: Slot) -> float:
        """Wait until these workers are ready; the seconds it took. Raises StuckError."""
        took = 0.0
        for slot in slots:
            took += await wait(slot.ready, SERVED_WITHIN_S, f"{slot.name} is ready")
        return took

    def kill(self, slot: Slot) -> None:
        """SIGKILL; it is started again."""
        self.watcher.lost(slot.partitions())
        slot.worker.kill()
        self.counts["sigkills"] += 1

    async def stop(self, slot: Slot, times: int = 1) -> None:
        """SIGTERM, and wait; it must end in order, and with a sound broker in ten seconds."""
        slot.held = True
        try:
            if not slot.running:
                return
            began = monotonic()
            for _ in range(times):
                slot.worker.signal(signal.SIGTERM)
                self.counts["sigterms"] += 1
            rough = bool(self.rough)
            await wait(lambda: not slot.running, 60, f"{slot.name} ends on SIGTERM")
            took, process = monotonic() - began, slot.worker.process
            assert process is not None
            self.exits[f"{process.returncode} on SIGTERM"] += 1
            # A worker that is still importing has nothing to end in order.
            young = began - slot.started_at < 10
            if not (rough or self.rough or young) and (took > 10 or process.returncode):
                self.violations.append(
                    f"{slot.name} took {took:.1f} s on SIGTERM and ended with {process.returncode}"
                )
        finally:
            slot.held = False

    async def _supervise(self) -> None:
        """Start again what ended, as an init system does."""
        while True:
            for slot in self.slots:
                if slot.wanted and not slot.held:
                    self.revive(slot)
            if self.payments.wanted and not self.payments.running:
                self.payments.start()
            await asyncio.sleep(0.1)

    async def publish(self, version: str, one: Publication, deck: str = "default") -> None:
        """Publish a version of a deck as an operator would, and again until it is there: an answer
        may be lost like any other. Raises StuckError."""
        path = self.folder / f"{deck}-{version}.csv"
        path.write_text(repriced(one.percent))
        since = datetime.now(UTC) - timedelta(seconds=one.back_s)
        arguments = (
            *("tariff", "publish", str(path), "--deck", deck, "--version", version),
            *("--effective-from", since.isoformat(), "--retroactive"),
        )
        began = monotonic()
        while True:
            code, told = await credits_command(self.settings, *arguments)
            if code in (0, EXIT_CONFLICT):
                break
            if monotonic() - began > PUBLISHED_WITHIN_S:
                raise StuckError(f"{deck}/{version} cannot be published ({code}): {told}")
            await asyncio.sleep(0.5)
        self.counts["decks_published"] += 1

    def unread(self, version: str) -> list[str]:
        """Workers of the base that have not read a version of the deck since they were started."""
        return [
            slot.name
            for slot in self.base
            if not any(one["version"] == version for one in slot.told(slot.began, "deck_read"))
        ]

    def revive(self, slot: Slot) -> None:
        """Start a worker again that has ended, but not at once."""
        if not slot.running and monotonic() - slot.started_at >= RESTART_AFTER_S:
            self._note_exit(slot)
            slot.start()

    def _note_exit(self, slot: Slot) -> None:
        process = slot.worker.process
        if process is None or process.returncode in (0, None):
            return
        why = ""
        if process.returncode == 70:
            told = slot.told(slot.began, "gave_up")
            # Whoever ends without a word of its own has at least a last line.
            why = f": {told[-1]['reason'] if told else slot.last_line()}"
        self.exits[f"{process.returncode}{why}"] += 1
        slot.worker.process = None

    def read_logs(self) -> None:
        """Look for what no worker may ever log here."""
        for path in sorted(self.folder.glob("*.log")):
            with path.open("rb") as log:
                log.seek(self._marks.get(path.name, 0))
                text = log.read().decode(errors="replace")
                self._marks[path.name] = log.tell()
            if path.name == "payments.log":
                continue
            for line in text.splitlines():
                for word in ("shard_stopped", "shard_failed", "watch_failed", "worker_failed"):
                    if f'"{word}"' in line:
                        self.violations.append(f"{path.name}: {line[:1_000]}")
                if '"fenced"' in line and '"partition"' in line:
                    self.counts["fenced"] += 1

    # -- the brokers -------------------------------------------------------------------------

    async def configure(self, topic: str, config: dict[str, str]) -> None:
        """Set a topic's configuration beside what it has."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.settings.broker)
        await admin.start()
        try:
            names = {self.settings.topics.of(one.name): one for one in topics.MANIFEST}
            wanted = {**provision.wanted_config(names[topic], self.settings), **config}
            resource_ = ConfigResource(ConfigResourceType.TOPIC, topic, configs=wanted)
            for response in await admin.alter_configs([resource_]):
                assert not any(one[0] for one in response.resources), response
        finally:
            await admin.close()

    def limit_files(self, node: int, size: int) -> None:
        """Let a node write no file beyond a size: to it, a disk that is full."""
        hard = resource.prlimit(self.cluster.pid(node), resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.cluster.pid(node), resource.RLIMIT_FSIZE, (size, hard))

    async def node_of(self, role: str, partition: int) -> int:
        """The node that leads a partition of the ledger, or coordinates its group or producer."""
        if self.options.brokers == 1:
            return 0
        admin = AIOKafkaAdminClient(bootstrap_servers=self.settings.broker)
        await admin.start()
        try:
            if role == "leader":
                name = self.settings.topics.of(topics.LEDGER)
                (described,) = await admin.describe_topics([name])
                leaders = {one["partition"]: one["leader"] for one in described["partitions"]}
                return int(leaders[partition])
            if role == "group":
                return int(await admin.find_coordinator(self.settings.app_id))
            return int(await admin.find_coordinator(self.settings.transactional_id(partition), 1))
        finally:
            await admin.close()

    async def in_sync(self) -> bool:
        """Whether every replica of every partition is in sync."""
        if self.options.brokers == 1:
            return True
        admin = AIOKafkaAdminClient(bootstrap_servers=self.settings.broker)
        try:
            await admin.start()
            described = await admin.describe_topics()
        except (KafkaError, OSError):
            return False
        finally:
            await admin.close()
        return all(
            len(one["isr"]) == len(one["replicas"])
            for found in described
            for one in found["partitions"]
        )

    # -- what must come back -----------------------------------------------------------------

    async def lag(self) -> int:
        """Source records that are not booked."""
        return await unbooked(self.settings, self.watcher.positions)

    async def told_offsets(self) -> list[str]:
        """Offsets that the group has committed beyond what the position rows say is booked. They
        may lag, being a hint; ahead of the books they would tell of no lag where there is some.
        For when nothing is left to book, as far as the watcher sees. Raises StuckError."""
        committed: dict[TopicPartition, Any] = {}

        async def asked() -> bool:
            # The group's coordinator may have just come back.
            admin = AIOKafkaAdminClient(bootstrap_servers=self.settings.broker)
            try:
                await admin.start()
                committed.update(await admin.list_consumer_group_offsets(self.settings.app_id))
            except (KafkaError, OSError):
                return False
            finally:
                await admin.close()
            return True

        await wait(asked, 60, "the group's coordinator tells what is committed")
        ahead = []
        for tp, found in committed.items():
            if tp.topic not in self.settings.topics.sources or found.offset <= 0:
                continue
            row = self.watcher.positions.get(tp.partition)
            source = None if row is None else row.sources.get(tp.topic)
            booked = 0 if source is None else source.next
            self.counts["offsets_compared"] += 1
            self.counts["offsets_behind"] += found.offset < booked
            if found.offset > booked:
                ahead.append(
                    f"the group has committed {tp.topic}/{tp.partition} up to {found.offset}, "
                    f"booked is what is below {booked}"
                )
        return ahead

    async def hear_answers(self) -> list[str]:
        """Read what was answered since the last time; what is wrong with it. For when nothing is
        left to book."""
        name = self.settings.topics.of(topics.NOTIFICATION)
        known = self.traffic.office.orders
        tps = [TopicPartition(name, number) for number in range(self.settings.partitions)]
        reader = await started_reader(self.settings)
        try:
            ends = await ends_of(reader, tps)
            waiting = {tp for tp in tps if self._heard.get(tp, 0) < ends[tp]}
            reader.assign(list(waiting))
            for tp in waiting:
                reader.seek(tp, self._heard.get(tp, 0))
            while waiting:
                for records in (await reader.getmany(*waiting, timeout_ms=200)).values():
                    for record in records:
                        self.answers.take(json.loads(record.value), known)
                for tp in list(waiting):
                    self._heard[tp] = await reader.position(tp)
                    if self._heard[tp] >= ends[tp]:
                        waiting.discard(tp)
        finally:
            await reader.stop()
        return list(self.answers.faults(self.traffic.ordered, known))

    async def open_transactions(self) -> list[str]:
        """Partitions whose last stable offset is not their end."""
        committed = await started_reader(self.settings)
        uncommitted = log_reader(self.settings, committed=False)
        try:
            await uncommitted.start()
            tps = [
                TopicPartition(self.settings.topics.of(topic.name), number)
                for topic in topics.MANIFEST
                for number in range(topic.partitions or self.settings.partitions)
            ]
            stable = await committed.end_offsets(tps)
            ends = await uncommitted.end_offsets(tps)
        finally:
            await committed.stop()
            await uncommitted.stop()
        return [f"{tp.topic}/{tp.partition}" for tp in tps if stable[tp] < ends[tp]]
