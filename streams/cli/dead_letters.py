"""Commands about dead letters: list, show, replay."""

from collections import Counter
from typing import Annotated, Any, Final

import msgspec
import typer

from schemas import topics
from schemas.notices import DeadLetterReason
from streams.cli.output import (
    EXIT_NOT_FOUND,
    EXIT_USAGE,
    fail,
    given,
    output_of,
    settings_now,
    wait_for,
)
from streams.settings import Settings

dlq_app = typer.Typer(no_args_is_help=True, help="Dead letters: list, show, replay.")

_HEADER: Final = "credits-dlq-"
_ATTEMPT: Final = f"{_HEADER}attempt"


def reason_from(text: str) -> str:
    """Check a reason's name."""
    if text not in set(DeadLetterReason):
        raise typer.BadParameter(f"{text!r} is no reason: {', '.join(DeadLetterReason)}.")
    return text


Reason = Annotated[str | None, typer.Option(help="Only this reason.", callback=given(reason_from))]
TenantOption = Annotated[str | None, typer.Option(help="Only this tenant.")]
TopicOption = Annotated[
    str | None, typer.Option(help="Only of this source topic, with or without its namespace.")
]


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter, as its headers tell it. `source` is the topic it came from, in the manifest."""

    record: Any
    source: str
    topic: str
    partition: int
    offset: int
    reason: str
    path: str
    attempt: int
    failed_at: str
    exposure: str | None

    @property
    def tenant(self) -> str | None:
        """The record's key as text."""
        return None if self.record.key is None else self.record.key.decode(errors="replace")


def letter_from(record: Any, source: str) -> Letter | None:
    """Read a record of a dead letter topic; None when it is none of ours."""
    told = {
        name.removeprefix(_HEADER): (text or b"").decode(errors="replace")
        for name, text in record.headers
        if name.startswith(_HEADER)
    }
    partition, offset = told.get("partition", ""), told.get("offset", "")
    if "topic" not in told or not partition.isdecimal() or not offset.isdecimal():
        return None
    attempt = told.get("attempt", "")
    return Letter(
        record=record,
        source=source,
        topic=told["topic"],
        partition=int(partition),
        offset=int(offset),
        reason=told.get("reason", ""),
        path=told.get("path", ""),
        attempt=int(attempt) if attempt.isdecimal() else 1,
        failed_at=told.get("failed-at", ""),
        exposure=told.get("exposure"),
    )


def sources_from(settings: Settings, topic: str | None) -> list[str]:
    """The source topics that are meant, by their names in the manifest."""
    if topic is None:
        return list(topics.SOURCES)
    for source in topics.SOURCES:
        if topic in (source, settings.topics.of(source)):
            return [source]
    fail(EXIT_USAGE, f"{topic} is no source topic: {', '.join(topics.SOURCES)}.")


async def _letters(
    settings: Settings, reason: str | None, tenant: str | None, topic: str | None
) -> list[Letter]:
    from streams import provision
    from streams.testbed.kafka import read_to_end

    of = {
        settings.topics.of(topics.dead_letters_of(source)): source
        for source in sources_from(settings, topic)
    }
    await provision.require(settings, list(of))
    letters = []
    async for record in read_to_end(settings, list(of)):
        letter = letter_from(record, of[record.topic])
        if (
            letter is not None
            and (reason is None or letter.reason == reason)
            and (tenant is None or letter.tenant == tenant)
        ):
            letters.append(letter)
    letters.sort(key=lambda letter: letter.failed_at)
    return letters


@dlq_app.command("list")
def list_letters(
    context: typer.Context,
    reason: Reason = None,
    tenant: TenantOption = None,
    topic: TopicOption = None,
    count: Annotated[
        bool, typer.Option("--count", help="Only how many, by topic and reason.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Most rows to show, the latest.")] = 50,
) -> None:
    """Records that could not be booked. Those that were replayed stay until they expire."""
    letters = wait_for(_letters(settings_now(), reason, tenant, topic))
    output = output_of(context)
    if count:
        counts = Counter((letter.source, letter.reason) for letter in letters)
        rows = [
            {"topic": name, "reason": why, "letters": number}
            for (name, why), number in sorted(counts.items())
        ]
        output.table(rows, "No dead letters.")
        return
    output.table(
        [
            {
                "place": f"{letter.source}/{letter.partition}/{letter.offset}",
                "reason": letter.reason,
                "path": letter.path,
                "exposure": letter.exposure,
                "tenant_id": letter.tenant,
                "attempt": letter.attempt,
                "failed_at": letter.failed_at,
            }
            for letter in letters[-limit:]
        ],
        "No dead letters.",
    )
    if letters:
        told = ", ".join(
            f"{number} {why}"
            for why, number in Counter(letter.reason for letter in letters).most_common()
        )
        output.say(f"{len(letters)} in all: {told}. One of them: credits dlq show PLACE")


@dlq_app.command("show")
def show_letter(
    context: typer.Context,
    place: Annotated[
        str,
        typer.Argument(metavar="TOPIC/PARTITION/OFFSET", help="The place of the source record."),
    ],
    value: Annotated[
        bool, typer.Option("--value", help="Print the value; it may hold personal data.")
    ] = False,
) -> None:
    """One dead letter: its headers, and its value if that is asked for."""
    topic, _, rest = place.partition("/")
    partition, _, offset = rest.partition("/")
    if not partition.isdecimal() or not offset.isdecimal():
        fail(EXIT_USAGE, f"{place!r} is no TOPIC/PARTITION/OFFSET; see `credits dlq list`.")
    settings = settings_now()
    for letter in wait_for(_letters(settings, None, None, topic)):
        if (letter.partition, letter.offset) == (int(partition), int(offset)):
            output_of(context).row(_told(letter, value=value))
            return
    fail(EXIT_NOT_FOUND, f"No dead letter of {place}. See `credits dlq list`.")


def _told(letter: Letter, *, value: bool) -> dict[str, Any]:
    record = letter.record
    row: dict[str, Any] = {
        "key": letter.tenant,
        "headers": {
            name: None if text is None else text.decode(errors="backslashreplace")
            for name, text in record.headers
        },
        "value_bytes": None if record.value is None else len(record.value),
    }
    if value and record.value is not None:
        try:
            row["value"] = record.value.decode()
        except UnicodeDecodeError:
            row["value_hex"] = record.value.hex()
    return row


@dlq_app.command("replay")
def replay_letters(
    context: typer.Context,
    reason: Reason = None,
    tenant: TenantOption = None,
    topic: TopicOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be sent.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it.")] = False,
) -> None:
    """Send dead letters to their source topics again, under their old ids.

    What was booked since is a repeat and moves nothing; what still cannot be booked comes back.
    """
    settings = settings_now()
    output = output_of(context)
    found = wait_for(_letters(settings, reason, tenant, topic))
    letters = replayable(found)
    if found and not letters:
        output.say(f"{len(found)} found, none of them has a key: nobody could book them.")
    if not letters:
        output.say("Nothing to replay.")
    elif not dry_run and not yes:
        fail(EXIT_USAGE, f"{len(letters)} records would be sent again. Say --yes, or --dry-run.")
    elif not dry_run:
        wait_for(_replay(settings, letters))
    output.row({"found": len(found), "replayed": 0 if dry_run else len(letters)})


def replayable(letters: list[Letter]) -> list[Letter]:
    """Those that can be sent again: with a key; of a record that failed again, the last one."""
    latest: dict[Any, Letter] = {}
    for letter in letters:
        record = letter.record
        if record.key is not None:
            own = tuple(one for one in record.headers if not one[0].startswith(_HEADER))
            latest[letter.source, record.key, record.value, own] = letter
    return list(latest.values())


def headers_again(letter: Letter) -> list[tuple[str, bytes]]:
    """The headers of a replayed record: its own ones, and which attempt this is."""
    own = [one for one in letter.record.headers if not one[0].startswith(_HEADER)]
    return [*own, (_ATTEMPT, str(letter.attempt + 1).encode())]


async def _replay(settings: Settings, letters: list[Letter]) -> None:
    import asyncio

    from streams import provision
    from streams.cli.commanding import home_of
    from streams.testbed.kafka import started_producer

    names = sorted({settings.topics.of(letter.source) for letter in letters})
    await provision.require(settings, names)
    producer = await started_producer(settings, linger_ms=5)
    try:
        sent = [
            await producer.send(
                settings.topics.of(letter.source),
                key=letter.record.key,
                value=letter.record.value,
                headers=headers_again(letter),
                partition=home_of(letter.record.key, settings.partitions),
            )
            for letter in letters
        ]
        await asyncio.gather(*sent)
    finally:
        await producer.stop()


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(dlq_app, name="dlq")
