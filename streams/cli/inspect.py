"""Commands that look: dead letters, configuration, the doctor."""

import platform
import sys
from collections import Counter
from importlib.metadata import version as installed
from typing import Annotated, Any, Final

import msgspec
import typer

from schemas import topics
from streams.cli.output import (
    EXIT_FAILED,
    EXIT_NOT_FOUND,
    EXIT_USAGE,
    fail,
    output_of,
    settings_now,
    wait_for,
)
from streams.settings import PREFIX, Settings

dlq_app = typer.Typer(no_args_is_help=True, help="Dead letters: list, show, replay.")
config_app = typer.Typer(no_args_is_help=True, help="Settings of this installation.")

_HEADER: Final = "credits-dlq-"
Reason = Annotated[str | None, typer.Option(help="Only this reason.")]
TenantOption = Annotated[str | None, typer.Option(help="Only this tenant.")]
TopicOption = Annotated[str | None, typer.Option(help="Only of this source topic.")]


class _Letter(msgspec.Struct, frozen=True):
    record: Any
    source: str
    partition: int
    offset: int
    reason: str
    path: str
    attempt: int
    failed_at: str

    @property
    def tenant(self) -> str | None:
        return None if self.record.key is None else self.record.key.decode(errors="replace")


async def _letters(
    settings: Settings, reason: str | None, tenant: str | None, topic: str | None
) -> list[_Letter]:
    from streams.testbed.kafka import read_to_end

    names = [settings.topics.of(topics.dead_letters_of(source)) for source in topics.SOURCES]
    letters = []
    async for record in read_to_end(settings, names):
        headers = {name: (text or b"").decode() for name, text in record.headers}
        letter = _Letter(
            record,
            headers[f"{_HEADER}topic"],
            int(headers[f"{_HEADER}partition"]),
            int(headers[f"{_HEADER}offset"]),
            headers[f"{_HEADER}reason"],
            headers[f"{_HEADER}path"],
            int(headers[f"{_HEADER}attempt"]),
            headers[f"{_HEADER}failed-at"],
        )
        if (
            (reason is None or letter.reason == reason)
            and (tenant is None or letter.tenant == tenant)
            and (topic is None or letter.source == topic)
        ):
            letters.append(letter)
    return letters


@dlq_app.command("list")
def list_letters(
    context: typer.Context,
    reason: Reason = None,
    tenant: TenantOption = None,
    topic: TopicOption = None,
    limit: Annotated[int, typer.Option(min=1, help="Most rows to show.")] = 50,
) -> None:
    """Records that could not be booked."""
    letters = wait_for(_letters(settings_now(), reason, tenant, topic))
    output = output_of(context)
    counts = Counter(letter.reason for letter in letters)
    output.table(
        [
            {
                "topic": letter.source,
                "partition": letter.partition,
                "offset": letter.offset,
                "reason": letter.reason,
                "path": letter.path,
                "tenant_id": letter.tenant,
                "attempt": letter.attempt,
                "failed_at": letter.failed_at,
            }
            for letter in letters[-limit:]
        ],
        "No dead letters.",
    )
    if letters:
        told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        output.say(f"{len(letters)} in all: {told}")


@dlq_app.command("show")
def show_letter(
    context: typer.Context,
    place: Annotated[
        str, typer.Argument(metavar="TOPIC/PARTITION/OFFSET", help="The source record.")
    ],
    value: Annotated[
        bool, typer.Option("--value", help="Print the value; it may hold personal data.")
    ] = False,
) -> None:
    """One dead letter, by the place of its source record."""
    topic, _, rest = place.partition("/")
    partition, _, offset = rest.partition("/")
    if not partition.isdecimal() or not offset.isdecimal():
        fail(EXIT_USAGE, f"{place!r} is no TOPIC/PARTITION/OFFSET; see `credits dlq list`.")
    letters = wait_for(_letters(settings_now(), None, None, topic))
    for letter in letters:
        if (letter.partition, letter.offset) == (int(partition), int(offset)):
            row: dict[str, Any] = {
                name: (text or b"").decode(errors="replace") for name, text in letter.record.headers
            }
            row["key"] = letter.tenant
            row["value_bytes"] = len(letter.record.value or b"")
            if value:
                row["value"] = (letter.record.value or b"").decode(errors="backslashreplace")
            output_of(context).row(row)
            return
    fail(EXIT_NOT_FOUND, f"No dead letter of {place}. See `credits dlq list`.")


@dlq_app.command("replay")
def replay_letters(
    context: typer.Context,
    reason: Reason = None,
    tenant: TenantOption = None,
    topic: TopicOption = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be sent.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Send dead letters to their source topic again, under their old ids."""
    settings = settings_now()
    letters = [
        letter
        for letter in wait_for(_letters(settings, reason, tenant, topic))
        if letter.record.key is not None
    ]
    output = output_of(context)
    if not letters:
        output.say("Nothing to replay.")
        return
    if not dry_run and not yes:
        fail(EXIT_USAGE, f"{len(letters)} records would be sent again. Say --yes, or --dry-run.")
    if not dry_run:
        wait_for(_replay(settings, letters))
    output.row({"replayed": 0 if dry_run else len(letters), "found": len(letters)})


async def _replay(settings: Settings, letters: list[_Letter]) -> None:
    from streams.cli.commanding import home_of
    from streams.testbed.kafka import started_producer

    producer = await started_producer(settings)
    try:
        for letter in letters:
            record = letter.record
            headers = [
                (name, text) for name, text in record.headers if not name.startswith(_HEADER)
            ]
            headers.append((f"{_HEADER}attempt", str(letter.attempt + 1).encode()))
            await producer.send_and_wait(
                letter.source,
                key=record.key,
                value=record.value,
                headers=headers,
                partition=home_of(record.key, settings.partitions),
            )
    finally:
        await producer.stop()


# -- configuration -----------------------------------------------------------------------------


@config_app.command("show")
def show_config(context: typer.Context) -> None:
    """Every setting: its variable, its value now, its default, what it means."""
    settings = settings_now()
    rows = []
    for field in msgspec.structs.fields(Settings):
        meta = _meta(field.type)
        value = getattr(settings, field.name)
        rows.append(
            {
                "variable": PREFIX + field.name.upper(),
                "value": None if value is None else str(value),
                "default": None if field.default is None else str(field.default),
                "meaning": meta,
            }
        )
    output_of(context).table(rows, "")


def _meta(kind: Any) -> str:
    for extra in getattr(kind, "__metadata__", ()):
        if isinstance(extra, msgspec.Meta) and extra.description:
            return extra.description
    return ""


# -- doctor ------------------------------------------------------------------------------------


def doctor(context: typer.Context) -> None:
    """One line a check, each with its remedy."""
    settings = settings_now()
    rows = wait_for(_checks(settings))
    output = output_of(context)
    if output.as_json:
        output.table(rows, "")
    else:
        for row in rows:
            mark = "✔" if row["ok"] else "✖"
            remedy = "" if row["ok"] else f"  → {row['remedy']}"
            sys.stdout.write(f"{mark} {row['check']}: {row['found']}{remedy}\n")
    if not all(row["ok"] for row in rows):
        raise SystemExit(EXIT_FAILED)


def _row(check: str, found: str, ok: bool = True, remedy: str = "") -> dict[str, Any]:
    return {"check": check, "ok": ok, "found": found, "remedy": remedy}


async def _checks(settings: Settings) -> list[dict[str, Any]]:
    from streams import VERSION, provision

    rows = [
        _row("credits", VERSION),
        _row(
            "python",
            platform.python_version(),
            sys.version_info >= (3, 11),
            "Install Python 3.11 or newer.",
        ),
        _row(
            "libraries",
            ", ".join(f"{name} {installed(name)}" for name in ("faust-streaming", "aiokafka")),
        ),
    ]
    try:
        differences = await provision.plan(settings)
    except provision.BrokerAwayError as error:
        return [*rows, _row("broker", settings.broker, False, str(error))]
    rows.append(_row("broker", f"{settings.broker} answers"))
    rows.append(
        _row(
            "topics",
            "as they should be"
            if not differences
            else f"{len(differences)} differ, {differences[0].topic} {differences[0].what} first",
            not differences,
            "credits topics plan",
        )
    )
    if not any(one.what in ("missing", "partitions") for one in differences):
        rows.append(await _open_transactions(settings))
    rows.append(await _readyz(settings))
    return rows


async def _open_transactions(settings: Settings) -> dict[str, Any]:
    from streams.engine.restore import Marks

    marks = Marks(settings)
    await marks.start()
    try:
        from aiokafka import TopicPartition

        tps = [
            TopicPartition(settings.topics.of(topic.name), partition)
            for topic in topics.MANIFEST
            for partition in range(settings.partitions)
        ]
        ends = await marks.ends(tps)
        stable = await marks.stable_ends(tps)
    finally:
        await marks.stop()
    hanging = [tp for tp in tps if stable[tp] < ends[tp]]
    return _row(
        "transactions",
        "none open" if not hanging else f"{len(hanging)} partitions have one open",
        not hanging,
        "Ask again in a minute; if it stays, kafka-transactions.sh find-hanging.",
    )


async def _readyz(settings: Settings) -> dict[str, Any]:
    import aiohttp

    host = "127.0.0.1" if settings.metrics_host == "0.0.0.0" else settings.metrics_host  # noqa: S104
    url = f"http://{host}:{settings.metrics_port}/readyz"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3)) as session,
            session.get(url) as answer,
        ):
            body = await answer.json()
    except (aiohttp.ClientError, TimeoutError, OSError):
        return _row("worker", f"no answer at {url}", False, "Start one: credits worker.")
    found = "ready" if body["ok"] else "; ".join(body["reasons"])
    return _row("worker", found, body["ok"], "See its log.")


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(dlq_app, name="dlq")
    app.add_typer(config_app, name="config")
    app.command()(doctor)
