"""Commands that run things: worker, topics, load, payments, verify, vectors."""

import asyncio
import re
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import typer

from schemas import topics
from streams.cli.output import (
    EXIT_FAILED,
    EXIT_USAGE,
    Output,
    fail,
    output_of,
    settings_now,
    wait_for,
)

topics_app = typer.Typer(no_args_is_help=True, help="Plan, apply, check the topics.")
payments_app = typer.Typer(no_args_is_help=True, help="The simulated payment service.")

_DURATION: Final = re.compile(r"(\d+)(s|m|h)?")
NotProduction = Annotated[
    bool,
    typer.Option("--yes-this-is-not-production", help="Allow an installation without a namespace."),
]


def seconds_from(text: str) -> int:
    """Read a duration such as 20s, 5m or 1h."""
    found = _DURATION.fullmatch(text)
    if found is None:
        fail(EXIT_USAGE, f"{text!r} is no duration. Write one such as 20s, 5m or 1h.")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2] or "s"]


def ppm_from(text: str, name: str) -> int:
    """Read a share in per cent, such as 0.5, as millionths."""
    units, _, decimals = text.partition(".")
    if not units.isdecimal() or (decimals and not decimals.isdecimal()) or len(decimals) > 4:
        fail(EXIT_USAGE, f"--{name} {text}: give per cent, such as 1 or 0.5.")
    ppm = int(units) * 10_000 + int(decimals.ljust(4, "0") or "0")
    if ppm > 1_000_000:
        fail(EXIT_USAGE, f"--{name} {text}: more than 100 per cent.")
    return ppm


def worker(
    accept_source_loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOPIC:P:OFFSET",
            help="Go on from this offset although records before it are gone.",
        ),
    ] = None,
) -> None:
    """Run a worker: book what arrives until told to stop."""
    from streams.app import run_worker

    raise SystemExit(run_worker(settings_now(), accept_source_loss=accept_source_loss or ()))


# -- topics ------------------------------------------------------------------------------------


def _rows(differences: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            "topic": one.topic,
            "what": one.what,
            "wanted": one.wanted,
            "found": one.found,
            "remedy": one.remedy or "credits topics apply",
        }
        for one in differences
    ]


@topics_app.command("plan")
def plan_topics(context: typer.Context) -> None:
    """What differs from the manifest."""
    from streams import provision

    differences = wait_for(provision.plan(settings_now()))
    output_of(context).table(_rows(differences), "All topics are as they should be.")


@topics_app.command("apply")
def apply_topics(context: typer.Context) -> None:
    """Create what is missing, set what differs."""
    from streams import provision

    done = wait_for(provision.apply(settings_now()))
    output_of(context).table(_rows(done), "All topics are as they should be.")


@topics_app.command("check")
def check_topics(context: typer.Context) -> None:
    """Like plan, but ends with 1 when something differs."""
    from streams import provision

    differences = wait_for(provision.plan(settings_now()))
    output_of(context).table(_rows(differences), "All topics are as they should be.")
    if differences:
        raise SystemExit(EXIT_FAILED)


# -- load and payments -------------------------------------------------------------------------


def load(
    context: typer.Context,
    tenants: Annotated[int, typer.Option(min=1, help="How many tenants.")] = 200,
    rate: Annotated[
        int, typer.Option(min=0, help="Events per second; 0: as fast as it goes.")
    ] = 500,
    duration: Annotated[str, typer.Option("--for", help="How long, such as 60s.")] = "60s",
    count: Annotated[
        int | None, typer.Option("--events", min=1, help="How many, instead of --for.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same events.")] = 1,
    run: Annotated[
        str | None,
        typer.Option(help="Name in all ids, or its start. Used twice, events conflict."),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="office-day, evening-conferences, hot-tenant.")
    ] = "office-day",
    envelope: Annotated[str, typer.Option(help="bare, binary, structured, mixed.")] = "mixed",
    duplicates: Annotated[str, typer.Option(help="Per cent that repeat an earlier one.")] = "1",
    conflicts: Annotated[str, typer.Option(help="Per cent with an earlier one's id.")] = "0",
    late: Annotated[str, typer.Option(help="Per cent days late.")] = "0.5",
    corrections: Annotated[str, typer.Option(help="Per cent that correct an earlier one.")] = "0",
    malformed: Annotated[str, typer.Option(help="Per cent that are broken.")] = "0.2",
    wrong_partition: Annotated[str, typer.Option(help="Per cent on a wrong partition.")] = "0.1",
    open_calls: Annotated[
        str, typer.Option(help="Per cent of calls with start and progress before their end.")
    ] = "0",
    licences: Annotated[str, typer.Option(help="Per cent of tenants with included minutes.")] = "0",
    grants: Annotated[str, typer.Option(help="Per cent of tenants that are given a grant.")] = "0",
    open_first: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the tenants first.")
    ] = True,
    expect: Annotated[Path, typer.Option(help="Where to store what should come out.")] = Path(
        "build/expectation.json"
    ),
    not_production: NotProduction = False,
) -> None:
    """Write real-shaped usage, and store what should come of it for `verify --expect`."""
    from streams import provision
    from streams.testbed import load as generator
    from streams.testbed.kafka import require_namespace

    settings = settings_now()
    require_namespace(settings, "The load generator", confirmed=not_production)
    start = datetime.now(UTC)
    try:
        if run is not None and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", run) is None:
            raise ValueError("--run is a name of at most 64 letters, digits and . _ -")
        plan = generator.Plan(
            tenants=tenants,
            events=count if count is not None else seconds_from(duration) * (rate or 1_000),
            rate=rate,
            seed=seed,
            run=run or f"{start:%Y%m%dT%H%M%S}{start.microsecond // 1000:03d}Z",
            profile=generator.Profile(profile),
            envelope=generator.Envelope(envelope),
            duplicates_ppm=ppm_from(duplicates, "duplicates"),
            conflicts_ppm=ppm_from(conflicts, "conflicts"),
            late_ppm=ppm_from(late, "late"),
            corrections_ppm=ppm_from(corrections, "corrections"),
            malformed_ppm=ppm_from(malformed, "malformed"),
            wrong_partition_ppm=ppm_from(wrong_partition, "wrong-partition"),
            open_calls_ppm=ppm_from(open_calls, "open-calls"),
            licensed_ppm=ppm_from(licences, "licences"),
            granted_ppm=ppm_from(grants, "grants"),
        )
    except ValueError as error:
        fail(EXIT_USAGE, f"{error}; see `credits load --help`.")
    output = output_of(context)

    async def write() -> Any:
        await provision.require(settings, settings.topics.sources)
        if open_first:
            output.say(f"opening {tenants} tenants")
            await generator.open_tenants(settings, plan, now=start)
        output.say(f"writing {plan.events} events")
        return await generator.produce(settings, plan, start=start)

    try:
        produced = wait_for(write())
    except TimeoutError as error:
        fail(EXIT_FAILED, str(error))
    generator.write_expectation(expect, plan, start, produced)
    output.row(
        {
            "run": plan.run,
            "sent": produced.sent,
            **produced.by_expected,
            **{f"dead_letter_{reason}": n for reason, n in produced.by_reason.items()},
            "expectation": str(expect),
        }
    )


@payments_app.command("run")
def run_payments(
    context: typer.Context,
    seed: Annotated[int, typer.Option(help="Same seed, same answers.")] = 1,
    decline: Annotated[int, typer.Option(min=0, max=100, help="Per cent declined.")] = 10,
    needs_action: Annotated[
        int, typer.Option(min=0, max=100, help="Per cent left to a person.")
    ] = 0,
    never: Annotated[int, typer.Option(min=0, max=100, help="Per cent never answered.")] = 0,
    duplicate: Annotated[int, typer.Option(min=0, max=100, help="Per cent answered twice.")] = 10,
    reorder: Annotated[
        int, typer.Option(min=0, max=100, help="Per cent with a stray decline.")
    ] = 10,
    delay_ms: Annotated[int, typer.Option(min=0, help="Longest delay of an answer.")] = 300,
    not_production: NotProduction = False,
) -> None:
    """Answer recharge requests as a payment service would, until stopped."""
    from streams import provision
    from streams.testbed.kafka import require_namespace
    from streams.testbed.payments import Behaviour, Simulator

    settings = settings_now()
    require_namespace(settings, "The payment simulator", confirmed=not_production)
    behaviour = Behaviour(
        seed=seed,
        decline=decline,
        needs_action=needs_action,
        never=never,
        duplicate=duplicate,
        reorder=reorder,
        delay_ms=delay_ms,
    )
    simulator = Simulator(settings, behaviour)

    async def run() -> None:
        await provision.require(
            settings, [settings.topics.of(name) for name in (topics.REQUESTED, topics.RESULT)]
        )
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        output_of(context).say("answering recharge requests")
        await simulator.run(stop)

    wait_for(run())
    output_of(context).row({"requests": simulator.requests, "results": simulator.results})


# -- verify and vectors ------------------------------------------------------------------------


def verify(
    context: typer.Context,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant.")] = None,
    partition: Annotated[int | None, typer.Option(min=0, help="Only this partition.")] = None,
    deck: Annotated[Path | None, typer.Option(help="The rate deck that was in force.")] = None,
    coverage: Annotated[
        Path | None, typer.Option(help="The coverage table that was in force.")
    ] = None,
    expect: Annotated[Path | None, typer.Option(help="What a load foresaw.")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="CHECKPOINT", help="Go on from here.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Write a checkpoint here.")] = None,
    deadline: Annotated[str, typer.Option(help="Give up after, such as 10m.")] = "10m",
) -> None:
    """Audit the books from the topics alone: 0 holds, 1 violated, 75 unknown."""
    from streams.testbed.auditor.reading import verify
    from streams.testbed.auditor.view import Options

    options = Options(
        tenant=tenant,
        partition=partition,
        deck=deck,
        coverage=coverage,
        expect=expect,
        checkpoint_from=start,
        checkpoint_to=checkpoint,
        deadline_s=seconds_from(deadline),
    )
    if checkpoint is not None and (tenant is not None or partition is not None):
        fail(EXIT_USAGE, "A checkpoint is of everything: leave --tenant and --partition out.")
    for path in (deck, coverage, expect, start):
        if path is not None and not path.is_file():
            fail(EXIT_USAGE, f"{path} is no file.")
    report = wait_for(verify(settings_now(), options))
    show_report(output_of(context), report)
    raise SystemExit(report.exit_code)


def show_report(output: Output, report: Any) -> None:
    """Print an audit's report: lines for a person, one JSON line for a program."""
    if output.as_json:
        output.row(report.to_json())
    for line in report.lines():
        if output.as_json:
            output.say(line)
        else:
            output.line(line)


def vectors(
    context: typer.Context,
    paths: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Golden-case files.")],
    deck: Annotated[Path | None, typer.Option(help="Deck for e164 cases.")] = None,
) -> None:
    """Check golden cases with the functions that book real events."""
    from streams.billing import vectors as golden

    passed = failed = skipped = 0
    for path in paths:
        try:
            document = orjson.loads(path.read_bytes())
            results = golden.run_file(document, deck_text=_deck_text(document, path, deck))
        except OSError as error:
            fail(EXIT_USAGE, f"{path} cannot be read: {error.strerror}.")
        except (orjson.JSONDecodeError, golden.VectorError) as error:
            fail(EXIT_USAGE, f"{path}: {error}")
        for result in results:
            passed += result.status == "pass"
            failed += result.status == "fail"
            skipped += result.status == "skipped"
            typer.echo(
                orjson.dumps(
                    {
                        "id": result.id,
                        "status": result.status,
                        "expected": result.expected,
                        "got": result.got,
                        "missing": list(result.missing),
                    }
                ).decode()
            )
    typer.echo(f"{passed} passed, {failed} failed, {skipped} skipped")
    if failed:
        raise SystemExit(EXIT_FAILED)


def _deck_text(document: Any, path: Path, deck: Path | None) -> str | None:
    """The deck an e164 file names, looked for in its folder and the folders above."""
    if deck is not None:
        return deck.read_text(encoding="utf-8-sig")
    named = document.get("deck") if isinstance(document, dict) else None
    if not isinstance(named, dict) or "file" not in named:
        return None
    for folder in path.resolve().parents:
        candidate = folder / str(named["file"])
        if candidate.is_file():
            return candidate.read_text(encoding="utf-8-sig")
    fail(EXIT_USAGE, f"{path} names the deck {named['file']}, which is nowhere above it.")


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(worker)
    app.add_typer(topics_app, name="topics")
    app.command()(load)
    app.add_typer(payments_app, name="payments")
    app.command()(verify)
    app.command()(vectors)
