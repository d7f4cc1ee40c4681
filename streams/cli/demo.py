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
from collections.abc import Iterator
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Final, TextIO

import aiohttp
import msgspec
import typer

from streams.cli.operate import seconds_from
from streams.cli.output import EXIT_FAILED, EXIT_USAGE, Output, fail, output_of
from streams.settings import Settings

READY_WITHIN_S: Final = 60
DRAIN_WITHIN_S: Final = 30
RESULT_TIMEOUT_S: Final = 3
TOLD_EVERY_S: Final = 5
SHOWN_TENANTS: Final = 5


class _Stopped(Exception):  # no error: somebody pressed Ctrl-C
    """The demo was interrupted; everything is taken down."""


class _Worker:
    """The worker as a child process in a session of its own."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._log: TextIO | None = None
        self.log_path = folder / "worker.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its log goes to a file."""
        environment = {
            name: text for name, text in os.environ.items() if not name.startswith("CREDITS_")
        }
        environment |= environment_of(self._settings)
        self._log = self.log_path.open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "streams", "worker"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
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


def environment_of(settings: Settings) -> dict[str, str]:
    """The variables that give another process these settings."""
    default = Settings()
    return {
        f"CREDITS_{field.name.upper()}": str(getattr(settings, field.name))
        for field in msgspec.structs.fields(Settings)
        if getattr(settings, field.name) != getattr(default, field.name)
    }


def demo(
    context: typer.Context,
    duration: Annotated[str, typer.Option("--for", help="How long to send, such as 60s.")] = "60s",
    tenants: Annotated[int, typer.Option(min=1, help="How many tenants.")] = 200,
    rate: Annotated[int, typer.Option(min=1, help="Events per second.")] = 500,
    seed: Annotated[int, typer.Option(help="Same seed, same events.")] = 1,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave everything running at the end.")
    ] = False,
) -> None:
    """Show it all: start a real Kafka, send usage, kill the worker half-way, check the books."""
    seconds = seconds_from(duration)
    if seconds < 1:
        fail(EXIT_USAGE, "--for must be at least 1s.")
    output = output_of(context)
    folder = Path(tempfile.mkdtemp(prefix="credits-demo-"))
    code = EXIT_FAILED
    stack = contextlib.ExitStack()
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    try:
        with _stopping():
            code = _run(output, stack, folder, seconds, tenants, rate, seed, keep=keep)
    except _Stopped:
        output.say("stopped; taking everything down")
        code = 130
    finally:
        if keep and code == 0:
            stack.pop_all()
        else:
            # A second Ctrl-C must not leave a broker behind.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            stack.close()
    raise SystemExit(code)


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into one exception, once."""

    def stop(*_: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise _Stopped

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    yield


def _run(
    output: Output,
    stack: contextlib.ExitStack,
    folder: Path,
    seconds: int,
    tenants: int,
    rate: int,
    seed: int,
    *,
    keep: bool,
) -> int:
    from streams import provision
    from streams.testbed import broker as kafka

    bootstrap = kafka.external()
    if bootstrap is None:
        output.say(f"starting Kafka {kafka.KAFKA_VERSION}")
        cluster = kafka.Cluster.start(folder / "kafka")
        stack.callback(cluster.stop)
        bootstrap = cluster.bootstrap
    settings = Settings(
        broker=bootstrap,
        namespace=f"t-{secrets.token_hex(3)}-",
        result_timeout_s=RESULT_TIMEOUT_S,
        metrics_port=kafka.free_port(),
    )
    asyncio.run(provision.apply(settings))
    if kafka.external() is not None:
        stack.callback(lambda: asyncio.run(provision.remove_namespace(settings)))
    worker = _Worker(settings, folder)
    worker.start()
    stack.callback(worker.end, signal.SIGKILL)
    output.say(f"metrics: http://127.0.0.1:{settings.metrics_port}/metrics")
    show = _Show(output, settings)
    held = asyncio.run(
        _play(
            output,
            settings,
            worker,
            show,
            seconds=seconds,
            tenants=tenants,
            rate=rate,
            seed=seed,
            expectation=folder / "expectation.json",
        )
    )
    if not keep:
        worker.end(signal.SIGTERM)
    code = asyncio.run(_verify(output, settings, folder / "expectation.json"))
    if not held:
        output.say("not everything was answered in time; see above")
    if keep:
        pid = worker.process.pid if worker.process else 0
        typer.echo(
            f"left running: broker {settings.broker}, namespace {settings.namespace}, metrics "
            f"http://127.0.0.1:{settings.metrics_port}/metrics, worker pid {pid}, folder {folder}. "
            f"Use it with: export CREDITS_BROKER={settings.broker} "
            f"CREDITS_NAMESPACE={settings.namespace}. Stop it with: kill {pid} {os.getpid()}"
        )
        if code == 0:
            _stay(worker)
    return code


def _stay(worker: _Worker) -> None:
    """Keep the broker's parent alive until the worker ends or somebody stops us."""
    while worker.process is not None and worker.process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(1)


async def _play(
    output: Output,
    settings: Settings,
    worker: _Worker,
    show: "_Show",
    *,
    seconds: int,
    tenants: int,
    rate: int,
    seed: int,
    expectation: Path,
) -> bool:
    """Open, load, kill, restart, drain; True when nothing is left in flight."""
    from streams.testbed import load as generator
    from streams.testbed.payments import Behaviour, Simulator

    await _ready(settings, worker)
    plan = generator.Plan(
        tenants=tenants, events=seconds * rate, rate=rate, seed=seed, conflicts_ppm=500
    )
    start = datetime.now(UTC)
    simulator = Simulator(settings, Behaviour(seed=seed, never=1))
    stop_payments = asyncio.Event()
    payments = asyncio.ensure_future(simulator.run(stop_payments))
    output.say(f"opening {tenants} tenants")
    await generator.open_tenants(settings, plan, now=start)
    showing = asyncio.ensure_future(show.run(simulator))
    killing = asyncio.ensure_future(_kill_and_restart(output, worker, show, seconds / 2))
    try:
        produced = await generator.produce(settings, plan, start=start, on_progress=show.sent)
        generator.write_expectation(expectation, plan, start, produced)
        await killing
        await _ready(settings, worker)
        held = await _drain(output, settings, show)
    finally:
        killing.cancel()
        showing.cancel()
        stop_payments.set()
        await asyncio.gather(payments, showing, killing, return_exceptions=True)
        show.close()
    return held


async def _kill_and_restart(output: Output, worker: _Worker, show: "_Show", after_s: float) -> None:
    await asyncio.sleep(after_s)
    show.note("worker killed (SIGKILL), starting another")
    worker.end(signal.SIGKILL)
    worker.start()


async def _ready(settings: Settings, worker: _Worker) -> None:
    deadline = monotonic() + READY_WITHIN_S
    url = f"http://127.0.0.1:{settings.metrics_port}/readyz"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
            ended = worker.process is None or worker.process.poll() is not None
            if ended or monotonic() > deadline:
                tail = worker.log_path.read_text()[-2_000:]
                raise SystemExit(f"the worker is not ready; the end of its log:\n{tail}")
            await asyncio.sleep(0.2)


async def _drain(output: Output, settings: Settings, show: "_Show") -> bool:
    """Wait until everything is booked and every request answered."""
    from streams.cli.tenants import balances_of

    deadline = monotonic() + DRAIN_WITHIN_S
    waiting: list[dict[str, Any]] = []
    quiet = 0
    while monotonic() < deadline:
        await asyncio.sleep(0.5)
        figures = await show.figures()
        waiting = [
            one
            for one in (await balances_of(settings)).values()
            if one["recharge_state"] == "requested"
        ]
        idle = figures.get("lag", 1) == 0 and not waiting
        quiet = quiet + 1 if idle else 0
        # Twice: a charge that was just booked may have asked for money.
        if quiet >= 2:
            return True
    for one in waiting:
        output.say(f"in flight: {one['tenant_id']} waits for {one['recharge_id']}")
    return not waiting


async def _verify(output: Output, settings: Settings, expectation: Path) -> int:
    from streams.testbed import auditor

    output.say("checking the books from the topics alone")
    report = await auditor.verify(settings, auditor.Options(expect=expectation))
    for line in report.lines():
        typer.echo(line)
    return report.exit_code


class _Show:
    """What happens, live: a table on a terminal, a line now and then when piped."""

    def __init__(self, output: Output, settings: Settings) -> None:
        self._output = output
        self._settings = settings
        self._sent = 0
        self._booked = 0
        self._notes: list[str] = []
        self._live: Any = None

    def sent(self, produced: Any) -> None:
        """The load's progress."""
        self._sent = produced.sent

    def note(self, text: str) -> None:
        """Something worth a line."""
        self._notes.append(text)
        if self._live is None:
            self._output.say(text)

    async def figures(self) -> dict[str, float]:
        """What the worker's metrics say now; empty while it is down."""
        url = f"http://127.0.0.1:{self._settings.metrics_port}/metrics"
        timeout = aiohttp.ClientTimeout(total=2)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as page:
                text = await page.text()
        except (aiohttp.ClientError, TimeoutError, OSError):
            return {}
        figures: dict[str, float] = {"lag": 0, "events": 0, "requests": 0, "results": 0, "dead": 0}
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            for start, figure in (
                ("credits_lag_records{", "lag"),
                ("credits_events_total{", "events"),
                ("credits_recharge_requests_total{", "requests"),
                ("credits_recharge_results_total{", "results"),
                ("credits_dead_letters_total{", "dead"),
            ):
                if name.startswith(start):
                    figures[figure] += float(value)
        return figures

    async def run(self, simulator: Any) -> None:
        """Show until cancelled."""
        from streams.cli.tenants import balances_of

        terminal = sys.stdout.isatty() and not self._output.as_json
        if terminal:
            from rich.live import Live

            self._live = Live(refresh_per_second=4)
            self._live.start()
        before, at = 0.0, monotonic()
        while True:
            await asyncio.sleep(1 if terminal else TOLD_EVERY_S)
            figures = await self.figures()
            now = monotonic()
            events = figures.get("events", before)
            # A new worker counts from zero.
            per_second = max(0.0, events - before) / (now - at) if events >= before else 0.0
            before, at = events, now
            told = {
                "sent": f"{self._sent:,}",
                "events/s": f"{per_second:,.0f}",
                "lag": f"{figures['lag']:,.0f}" if figures else "worker is down",
                "recharges requested": f"{simulator.requests:,}",
                "answered": f"{simulator.results:,}",
                "dead letters": f"{figures.get('dead', 0):,.0f}",
            }
            if terminal:
                lowest = sorted(
                    (await balances_of(self._settings)).values(),
                    key=lambda one: Fraction(one["balance"]),
                )[:SHOWN_TENANTS]
                self._live.update(self._table(told, lowest))
            else:
                self._output.say("  ".join(f"{name} {text}" for name, text in told.items()))

    def _table(self, told: dict[str, str], lowest: list[dict[str, Any]]) -> Any:
        from rich.console import Group
        from rich.table import Table

        figures = Table(box=None)
        for name in told:
            figures.add_column(name, justify="right")
        figures.add_row(*told.values())
        tenants = Table("lowest balances", "balance", "recharge", box=None)
        for one in lowest:
            tenants.add_row(
                one["tenant_id"], f"{one['balance']} {one['currency']}", one["recharge_state"]
            )
        return Group(figures, tenants, *self._notes)

    def close(self) -> None:
        """End the live table."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(demo)
