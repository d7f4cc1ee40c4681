"""`credits demo`: a real Kafka, a killed worker, and books that balance to the cent."""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated, Any, Final, TextIO, TypeVar

import msgspec
import typer

from streams.cli.operate import seconds_from, show_report
from streams.cli.output import EXIT_FAILED, EXIT_USAGE, Output, fail, output_of
from streams.settings import PREFIX, Settings

READY_WITHIN_S: Final = 60
DRAIN_WITHIN_S: Final = 30
RESULT_TIMEOUT_S: Final = 3
TOLD_EVERY_S: Final = 5
SHOWN_TENANTS: Final = 5
# So often in a row, half a second apart, nothing may be in flight before all counts as booked:
# the worker's figures are up to a second old.
QUIET_TIMES: Final = 4
# Per cent of requests that are never answered: they stay in flight and are listed.
NEVER_ANSWERED: Final = 1
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG: Final = 1

T = TypeVar("T")


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


class InterruptedDemo(KeyboardInterrupt):
    """Somebody stops the demo. `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Signals:
    """Lets a signal through only where everything that was started can be taken down again.

    Elsewhere it is remembered and comes through at the next such place.
    """

    def __init__(self) -> None:
        self._number = 0
        self._open = False
        self._cancel: Callable[[], object] | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Take the signals; give them back afterwards. What is ignored (nohup) stays ignored."""
        before = {
            number: signal.signal(number, self._take)
            for number in _SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _: Any) -> None:
        first, self._number = not self._number, self._number or number
        if self._cancel is not None:
            self._cancel()
        elif self._open and first:
            self._open = False
            raise InterruptedDemo(number)

    def check(self) -> None:
        """Raise InterruptedDemo when a signal waits."""
        if self._number:
            raise InterruptedDemo(self._number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Code in here may be left at any moment."""
        self._open = True
        try:
            self.check()
            yield
        finally:
            self._open = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; a signal cancels it. Raises InterruptedDemo."""

        async def cancellable() -> T:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            try:
                if self._number:
                    work.close()
                    raise asyncio.CancelledError
                return await work
            finally:
                self._cancel = None

        try:
            result = asyncio.run(cancellable())
        except (asyncio.CancelledError, Exception):
            self.check()  # whatever the cancelling led to, it is what was asked for
            raise
        self.check()
        return result


class _Worker:
    """The worker as a child process in a session of its own."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._log: TextIO | None = None
        self.log_path = folder / "worker.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0

    def start(self) -> None:
        """Start it; its log goes to a file."""
        environment = {
            name: text for name, text in os.environ.items() if not name.startswith(PREFIX)
        }
        # The same code as here, whatever folder we stand in.
        code = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, code))
        self._log = self.log_path.open("a")
        self.started += 1
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "streams", "worker"],
            env=environment | environment_of(self._settings),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            preexec_fn=_dying_with_parent(),
        )

    def end(self, number: signal.Signals, within_s: float = 15) -> int | None:
        """Send a signal and wait; SIGKILL when it does not end in time."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.send_signal(number)
        try:
            code = process.wait(within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if self._log is not None:
            self._log.close()
        return code

    def check(self) -> None:
        """Raise DemoError when it has ended by itself."""
        code = None if self.process is None else self.process.poll()
        if code is not None:
            raise DemoError(f"The worker ended with {code}. {self.tail()}")

    def tail(self) -> str:
        """The end of its log."""
        return "The end of its log:\n" + self.log_path.read_text(errors="replace")[-2_000:]


def _dying_with_parent() -> Callable[[], object] | None:
    """What a child does first, so that it does not outlive a parent that was killed."""
    if sys.platform != "linux":
        return None
    import ctypes

    control = ctypes.CDLL(None).prctl  # found before the fork: the child must not load anything
    return lambda: control(_PR_SET_PDEATHSIG, signal.SIGKILL)


def environment_of(settings: Settings) -> dict[str, str]:
    """The variables that give another process these settings."""
    default = Settings()
    return {
        f"{PREFIX}{field.name.upper()}": str(getattr(settings, field.name))
        for field in msgspec.structs.fields(Settings)
        if getattr(settings, field.name) != getattr(default, field.name)
    }


class _Course(msgspec.Struct, frozen=True, kw_only=True):
    """What the demo does."""

    seconds: int
    tenants: int
    rate: int
    seed: int
    keep: bool


def demo(
    context: typer.Context,
    duration: Annotated[str, typer.Option("--for", help="How long to send, such as 60s.")] = "60s",
    tenants: Annotated[int, typer.Option(min=1, help="How many tenants.")] = 200,
    rate: Annotated[int, typer.Option(min=1, help="Events per second.")] = 500,
    seed: Annotated[int, typer.Option(help="Same seed, same events.")] = 1,
    keep: Annotated[
        bool, typer.Option("--keep", help="Go on running afterwards, until Ctrl-C.")
    ] = False,
) -> None:
    """Show it all: start a real Kafka, send usage, kill the worker half-way, check the books."""
    seconds = seconds_from(duration)
    if seconds < 1:
        fail(EXIT_USAGE, "--for must be at least 1s.")
    course = _Course(seconds=seconds, tenants=tenants, rate=rate, seed=seed, keep=keep)
    output = output_of(context)
    signals = _Signals()
    with signals.installed(), contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="credits-demo-"))
        stack.callback(_remove, folder)
        try:
            code = _run(output, stack, signals, folder, course)
        except InterruptedDemo as interrupted:
            output.say("stopping; nothing stays behind")
            code = 128 + interrupted.number
        except DemoError as error:
            sys.stderr.write(f"{error}\n")
            code = EXIT_FAILED
    raise SystemExit(code)


def _remove(folder: Path) -> None:
    """Remove the folder, also when a dying process still writes into it."""
    deadline = monotonic() + 5
    while folder.exists() and monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        sleep(0.02)


def _run(
    output: Output, stack: contextlib.ExitStack, signals: _Signals, folder: Path, course: _Course
) -> int:
    from streams import provision
    from streams.testbed import broker as kafka

    bootstrap = kafka.external()
    if bootstrap is None:
        kafka.require_programs()
    output.say(
        f"{course.tenants} tenants, {course.rate} events a second for {course.seconds} s; a minute "
        "more to start, drain and check. Ctrl-C stops it and leaves nothing behind."
    )
    if bootstrap is None:
        output.say(f"starting Kafka {kafka.KAFKA_VERSION}")
        with signals.interruptible():
            cluster = kafka.Cluster.start(folder / "kafka")
        stack.callback(cluster.stop)
        bootstrap = cluster.bootstrap
    settings = Settings(
        broker=bootstrap,
        namespace=f"t-{secrets.token_hex(3)}-",
        result_timeout_s=RESULT_TIMEOUT_S,
        metrics_port=kafka.free_port(),
    )
    if kafka.external() is not None:
        stack.callback(lambda: asyncio.run(provision.remove_namespace(settings)))
    signals.run(provision.apply(settings))
    worker = _Worker(settings, folder)
    stack.callback(worker.end, signal.SIGKILL)
    worker.start()
    output.say(f"metrics: http://127.0.0.1:{settings.metrics_port}/metrics")
    expectation = folder / "expectation.json"
    signals.run(_play(output, settings, worker, course, expectation))
    output.say("stopping the worker (SIGTERM)")
    worker.end(signal.SIGTERM)
    code = signals.run(_verify(output, settings, expectation))
    if course.keep:
        worker.start()
        with contextlib.suppress(InterruptedDemo):  # how this is meant to end
            signals.run(_stay(output, settings, worker, course))
        worker.end(signal.SIGTERM)
    return code


async def _play(
    output: Output, settings: Settings, worker: _Worker, course: _Course, expectation: Path
) -> None:
    """Open, load, kill, restart, drain."""
    from streams.testbed import load as generator
    from streams.testbed.payments import Behaviour, Simulator

    await _ready(settings, worker)
    plan = generator.Plan(
        tenants=course.tenants,
        events=course.seconds * course.rate,
        rate=course.rate,
        seed=course.seed,
        conflicts_ppm=500,
        corrections_ppm=5_000,
        open_calls_ppm=50_000,
        licensed_ppm=300_000,
        granted_ppm=200_000,
    )
    start = datetime.now(UTC)
    simulator = Simulator(settings, Behaviour(seed=course.seed, never=NEVER_ANSWERED))
    show = _Show(output, settings, worker, simulator)
    stop = asyncio.Event()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(simulator.run(stop))
            following = group.create_task(show.follow())
            output.say(f"opening {course.tenants} tenants")
            await generator.open_tenants(settings, plan, now=start)
            showing = group.create_task(show.run())
            killing = group.create_task(_kill_and_restart(worker, show, course.seconds / 2))
            produced = await generator.produce(settings, plan, start=start, on_progress=show.sent)
            generator.write_expectation(expectation, plan, start, produced)
            show.note(f"all {produced.sent:,} events are sent; waiting until they are booked")
            await killing
            await _ready(settings, worker)
            await _drain(worker, show)
            showing.cancel()
            following.cancel()
            stop.set()
    except BaseExceptionGroup as group_of_one:
        raise group_of_one.exceptions[0] from None
    finally:
        show.close()


async def _kill_and_restart(worker: _Worker, show: "_Show", after_s: float) -> None:
    await asyncio.sleep(after_s)
    worker.check()
    show.note("the worker is killed (SIGKILL); another takes over when Kafka has given it up")
    worker.end(signal.SIGKILL)
    worker.start()


async def _ready(settings: Settings, worker: _Worker) -> None:
    import aiohttp

    deadline = monotonic() + READY_WITHIN_S
    url = f"http://127.0.0.1:{settings.metrics_port}/readyz"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
            worker.check()
            if monotonic() > deadline:
                raise DemoError(f"The worker is not ready in {READY_WITHIN_S} s. {worker.tail()}")
            await asyncio.sleep(0.2)


async def _drain(worker: _Worker, show: "_Show") -> None:
    """Wait until everything is booked and every request answered; tell what is not."""
    deadline = monotonic() + DRAIN_WITHIN_S
    quiet = 0
    while monotonic() < deadline:
        await asyncio.sleep(0.5)
        worker.check()
        figures = await show.figures()
        idle = figures.get("lag", 1) == 0 and not show.in_flight()
        quiet = quiet + 1 if idle else 0
        if quiet == QUIET_TIMES:
            show.note("everything is booked and answered")
            return
    if figures.get("lag", 1):
        show.note(f"not booked in {DRAIN_WITHIN_S} s: {figures.get('lag', 0):,.0f} records")
    for one in show.in_flight():
        show.note(f"in flight: {one['tenant_id']} waits for the answer to {one['recharge_id']}")


async def _verify(output: Output, settings: Settings, expectation: Path) -> int:
    from streams.testbed.auditor.reading import verify
    from streams.testbed.auditor.view import Options

    output.say("checking the books from the topics alone")
    report = await verify(settings, Options(expect=expectation))
    show_report(output, report)
    return report.exit_code


async def _stay(output: Output, settings: Settings, worker: _Worker, course: _Course) -> None:
    """Keep everything running until somebody stops us."""
    from streams.testbed.payments import Behaviour, Simulator

    await _ready(settings, worker)
    assert worker.process is not None
    output.row(
        {
            "broker": settings.broker,
            "namespace": settings.namespace,
            "metrics": f"http://127.0.0.1:{settings.metrics_port}/metrics",
            "worker_pid": worker.process.pid,
            "worker_log": str(worker.log_path),
            "use": f"export CREDITS_BROKER={settings.broker} "
            f"CREDITS_NAMESPACE={settings.namespace}",
            "stop": "Ctrl-C here, which also removes its folder",
        }
    )
    sys.stdout.flush()
    answering = Simulator(settings, Behaviour(seed=course.seed, never=NEVER_ANSWERED))
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(answering.run(asyncio.Event()))
            while True:
                await asyncio.sleep(0.5)
                worker.check()
    except BaseExceptionGroup as group_of_one:
        raise group_of_one.exceptions[0] from None


class _Show:
    """What happens, live: a table on a terminal, a line now and then elsewhere."""

    def __init__(self, output: Output, settings: Settings, worker: _Worker, simulator: Any) -> None:
        self._output = output
        self._settings = settings
        self._worker = worker
        self._simulator = simulator
        self._sent = 0
        self._balances: dict[str, dict[str, Any]] = {}
        # A new worker counts from zero: which one was asked last, what it had counted then, and
        # what all those before it had.
        self._counted = worker.started
        self._earlier: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._live: Any = None

    def sent(self, produced: Any) -> None:
        """The load's progress."""
        self._sent = produced.sent

    def note(self, text: str) -> None:
        """Something worth a line."""
        if self._live is None:
            self._output.say(text)
        else:
            self._live.console.print(text, highlight=False)

    def in_flight(self) -> list[dict[str, Any]]:
        """The tenants whose recharge waits for an answer."""
        return [one for one in self._balances.values() if one["recharge_state"] == "requested"]

    async def follow(self) -> None:
        """Keep the latest public balance of every tenant, until cancelled."""
        import orjson
        from aiokafka import TopicPartition

        from schemas import topics
        from streams.testbed.kafka import started_reader

        name = self._settings.topics.of(topics.BALANCE)
        tps = [TopicPartition(name, number) for number in range(self._settings.partitions)]
        reader = await started_reader(self._settings)
        try:
            reader.assign(tps)
            for tp in tps:
                reader.seek(tp, 0)
            while True:
                for records in (await reader.getmany(timeout_ms=200)).values():
                    for record in records:
                        self._balances[record.key.decode()] = orjson.loads(record.value)
        finally:
            await reader.stop()

    async def figures(self) -> dict[str, float]:
        """What the worker's metrics say now, counters over all workers; empty while it is down."""
        import aiohttp

        url = f"http://127.0.0.1:{self._settings.metrics_port}/metrics"
        timeout = aiohttp.ClientTimeout(total=2)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as page:
                text = await page.text()
        except (aiohttp.ClientError, TimeoutError, OSError):
            return {}
        found = dict.fromkeys(("lag", "ready", "events", "dead", "holds"), 0.0)
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            for start, figure in (
                ("credits_lag_records{", "lag"),
                ('credits_shards{state="ready"', "ready"),
                ("credits_events_total{", "events"),
                ("credits_dead_letters_total{", "dead"),
                ("credits_holds", "holds"),
            ):
                if name.startswith(start) and 'topic="tick"' not in name:
                    found[figure] += float(value)
        if found["ready"] < self._settings.partitions:
            return {}  # it has counted nothing yet, and its lag is not known
        for counter in ("events", "dead"):
            if self._counted != self._worker.started:
                self._earlier[counter] = self._earlier.get(counter, 0) + self._last.get(counter, 0)
            self._last[counter] = found[counter]
            found[counter] += self._earlier.get(counter, 0)
        self._counted = self._worker.started
        return found

    async def run(self) -> None:
        """Show until cancelled."""
        terminal = sys.stderr.isatty() and not self._output.quiet
        if terminal:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4)
            self._live.start()
        dead = events = 0.0
        at = monotonic()
        while True:
            await asyncio.sleep(1 if terminal else TOLD_EVERY_S)
            figures = await self.figures()
            now = monotonic()
            per_second = (figures.get("events", events) - events) / (now - at)
            events, at, dead = figures.get("events", events), now, figures.get("dead", dead)
            told = {
                "sent": f"{self._sent:,}",
                "booked/s": f"{per_second:,.0f}",
                "lag": f"{figures['lag']:,.0f}" if figures else "no worker",
                "recharges requested": f"{self._simulator.requests:,}",
                "answers": f"{self._simulator.results:,}",
                "dead letters": f"{dead:,.0f}",
                "open calls": f"{figures.get('holds', 0):,.0f}",
            }
            lowest = sorted(self._balances.values(), key=lambda one: Fraction(one["balance"]))
            if terminal:
                self._live.update(_table(told, lowest[:SHOWN_TENANTS]))
                continue
            if lowest:
                told["lowest balance"] = f"{lowest[0]['balance']} ({lowest[0]['tenant_id']})"
            self._output.say(" · ".join(f"{name} {text}" for name, text in told.items()))

    def close(self) -> None:
        """End the live table."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _table(told: dict[str, str], lowest: list[dict[str, Any]]) -> Any:
    from rich.console import Group
    from rich.table import Table

    figures = Table(box=None)
    for name in told:
        figures.add_column(name, justify="right")
    figures.add_row(*told.values())
    tenants = Table("lowest balances", "balance", "held for open calls", "recharge", box=None)
    for one in lowest:
        tenants.add_row(
            one["tenant_id"],
            f"{one['balance']} {one['currency']}",
            one.get("exposure", "0"),
            one["recharge_state"],
        )
    return Group(figures, tenants)


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(demo)
