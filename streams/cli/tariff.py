"""Commands about rate decks: check, publish, list, compare, assign to a tenant."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer

from schemas import topics
from schemas.decks import Assembly, DeckManifest, DeckName, Version, chunk_key, manifest_key, packed
from schemas.usage import Timestamp
from streams.cli.balances import Id, Tenant, Wait
from streams.cli.commanding import issued_by, send
from streams.cli.output import (
    EXIT_CONFLICT,
    EXIT_FAILED,
    EXIT_NOT_FOUND,
    EXIT_USAGE,
    fail,
    given,
    output_of,
    settings_now,
    wait_for,
)
from streams.settings import Settings

if TYPE_CHECKING:
    from streams.billing.rates import Rate, Tariff

tariff_app = typer.Typer(
    no_args_is_help=True, help="Check, publish, list, compare and assign rate decks."
)

# So long before it begins a version is published, that every worker has read it by then.
AHEAD: Final = timedelta(minutes=10)
_DEFAULT: Final = "default"


def name_from(text: str) -> str:
    """Check a deck's or version's name."""
    try:
        return msgspec.convert(text, DeckName)
    except msgspec.ValidationError:
        raise typer.BadParameter(
            f"{text!r}: a name has 1 to 64 letters, digits and . _ -"
        ) from None


def instant_from(text: str) -> str:
    """Check an instant with an offset."""
    try:
        msgspec.convert(text, Timestamp)
    except msgspec.ValidationError:
        raise typer.BadParameter(
            f"{text!r} is no instant; write one like 2026-04-01T00:00:00Z, with an offset."
        ) from None
    return text


Deck = Annotated[str, typer.Option(help="The deck's name.", callback=name_from)]
At = Annotated[
    str | None,
    typer.Option(
        metavar="INSTANT",
        help="For calls that start then or later, such as 2026-04-01T00:00:00Z.",
        callback=given(instant_from),
        show_default=False,
    ),
]


def _read(path: Path, deck: str = _DEFAULT, version: str = "file") -> "tuple[bytes, Tariff]":
    from streams.billing.tariff import DeckError, parse_deck

    content = path.read_bytes()
    try:
        return content, parse_deck(content.decode("utf-8-sig"), deck=deck, version=version)
    except UnicodeDecodeError as error:
        fail(EXIT_FAILED, f"{path} is no UTF-8 text (byte {error.start}).")
    except DeckError as error:
        more = f" (and {len(error.faults) - 20} more)" if len(error.faults) > 20 else ""
        fail(
            EXIT_FAILED,
            "\n".join(f"{path}: {fault}" for fault in error.faults[:20] or [str(error)]) + more,
        )


@tariff_app.command("check")
def check_deck(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A rate deck as CSV.")],
) -> None:
    """Look for faults (1) and for what is only suspicious (0), each with its line."""
    from streams.billing.tariff import DeckError, parse_deck

    output = output_of(context)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        tariff = parse_deck(text, deck=_DEFAULT, version="file")
        rows, faults, warnings = len(tariff), [], list(tariff.warnings)
    except UnicodeDecodeError as error:
        rows, faults, warnings = 0, [f"line 1: no UTF-8 text (byte {error.start})"], []
    except DeckError as error:
        rows, faults, warnings = 0, error.faults or [str(error)], []
    found = [("error", text) for text in faults] + [("warning", text) for text in warnings]
    output.table(
        [
            {"line": _line_of(text), "level": level, "what": text.partition(": ")[2] or text}
            for level, text in found
        ],
        f"{rows} prefixes, nothing to complain about.",
    )
    output.say(f"{rows} prefixes, {len(faults)} errors, {len(warnings)} warnings")
    if faults:
        raise SystemExit(EXIT_FAILED)


def _line_of(text: str) -> int | None:
    number = text.partition(":")[0].removeprefix("line ")
    return int(number) if number.isdigit() else None


@tariff_app.command("publish")
def publish_deck(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A rate deck as CSV.")],
    deck: Deck = _DEFAULT,
    version: Annotated[
        str | None,
        typer.Option(help="The version's name.", callback=given(name_from), show_default=False),
    ] = None,
    effective_from: At = None,
    retroactive: Annotated[
        bool,
        typer.Option(
            "--retroactive",
            help="Let it begin in less than 10 minutes, or in the past; what is booked stays.",
        ),
    ] = False,
) -> None:
    """Publish a version of a deck; in 10 minutes it is in force, or when you say."""
    now = datetime.now(UTC)
    since = now + AHEAD if effective_from is None else datetime.fromisoformat(effective_from)
    if since < now + AHEAD and not retroactive:
        fail(
            EXIT_USAGE,
            "A version begins at least 10 minutes after it is published, so that every worker has "
            "read it by then. Name a later --effective-from, or say --retroactive.",
        )
    content, tariff = _read(path)
    output = output_of(context)
    for warning in tariff.warnings[:20]:
        output.say(f"{path}: {warning}")
    digest = sha256(content).hexdigest()
    chunks = packed(content)
    manifest = DeckManifest(
        deck=deck,
        version=version or f"{now:%Y%m%dT%H%M%SZ}-{digest[:12]}",
        effective_from=since.astimezone(UTC),
        published_at=now,
        published_by=issued_by(),
        retroactive=since < now + AHEAD,
        rows=len(tariff),
        chunks=len(chunks),
        size=len(content),
        sha256=digest,
    )
    wait_for(_publish(settings_now(), manifest, chunks))
    output.row(_shown(manifest))


async def _publish(settings: Settings, manifest: DeckManifest, chunks: list[bytes]) -> None:
    from streams.testbed.kafka import started_producer

    named = (manifest.deck, manifest.version)
    if any(one.name == named for one in await _versions(settings)):
        fail(
            EXIT_CONFLICT,
            f"{manifest.deck}/{manifest.version} is published already, and a version never "
            "changes. Give it another --version.",
        )
    name = settings.topics.of(topics.TARIFF)
    producer = await started_producer(settings)
    try:
        for number, chunk in enumerate(chunks):
            key = chunk_key(manifest.deck, manifest.version, number)
            await producer.send_and_wait(name, chunk, key=key, partition=0)
        # Last: a version without its manifest is not there.
        await producer.send_and_wait(
            name,
            msgspec.json.encode(manifest),
            key=manifest_key(manifest.deck, manifest.version),
            partition=0,
        )
    finally:
        await producer.stop()


async def _versions(settings: Settings) -> list[Version]:
    """All complete versions, in the order of their publication."""
    from streams import provision
    from streams.testbed.kafka import read_to_end

    name = settings.topics.of(topics.TARIFF)
    await provision.require(settings, [name])
    assembly = Assembly()
    found: list[Version] = []
    async for record in read_to_end(settings, [name], partition=0):
        came = assembly.add(record.key, record.value)
        if isinstance(came, Version):
            found = [one for one in found if one.name != came.name]
            found.append(came)
    return found


def _shown(manifest: DeckManifest) -> dict[str, Any]:
    return {
        "deck": manifest.deck,
        "version": manifest.version,
        "effective_from": manifest.effective_from,
        "published_at": manifest.published_at,
        "published_by": manifest.published_by,
        "retroactive": manifest.retroactive,
        "rows": manifest.rows,
        "sha256": manifest.sha256,
    }


@tariff_app.command("list")
def list_decks(context: typer.Context) -> None:
    """All published versions; `in_force` are those for calls that start now."""
    versions = wait_for(_versions(settings_now()))
    now = datetime.now(UTC)
    in_force: dict[str, DeckManifest] = {}
    for version in versions:
        manifest = version.manifest
        best = in_force.get(manifest.deck)
        begun = manifest.effective_from <= now
        if begun and (best is None or best.effective_from <= manifest.effective_from):
            in_force[manifest.deck] = manifest
    output_of(context).table(
        [
            {
                **_shown(one.manifest),
                "in_force": in_force.get(one.manifest.deck) is one.manifest,
            }
            for one in versions
        ],
        "No version is published: the deck of CREDITS_DECK is in force.",
    )


@tariff_app.command("diff")
def diff_decks(
    context: typer.Context,
    before: Annotated[str, typer.Argument(metavar="FILE|DECK/VERSION")],
    after: Annotated[str, typer.Argument(metavar="FILE|DECK/VERSION")],
) -> None:
    """What another deck changes: prefixes that come, go, or cost something else."""
    old, new = _rates(before), _rates(after)
    rows = []
    for prefix in sorted(old.keys() | new.keys()):
        was, becomes = old.get(prefix), new.get(prefix)
        changed = [] if was is None or becomes is None else _changed(was, becomes)
        if was is not None and becomes is not None and not changed:
            continue
        rows.append(
            {
                "prefix": prefix,
                "what": "new" if was is None else "gone" if becomes is None else "changed",
                "before": None if was is None else was.per_minute_text,
                "after": None if becomes is None else becomes.per_minute_text,
                "changed": changed,
            }
        )
    output = output_of(context)
    output.table(rows, "Both say the same.")
    output.say(f"{len(old)} prefixes before, {len(new)} after, {len(rows)} differ")


def _changed(was: "Rate", becomes: "Rate") -> list[str]:
    """Members that differ by value: 0.10 is 0.1."""
    old, new = _values(was), _values(becomes)
    return [name for name in old if old[name] != new[name]]


def _values(rate: "Rate") -> "dict[str, Any]":
    """What a row says, its other bands included; two rows are never the same object."""
    from streams.billing.rates import MEMBERS

    values = {name: getattr(rate, name) for name in MEMBERS if not name.endswith("_text")}
    special = rate.special
    if special is not None:
        bands = [_values(band) for band in special.bands]
        values["special"] = (special._replace(bands=()), bands)
    return values


def _rates(named: str) -> "Mapping[str, Rate]":
    from streams.billing.tariff import parse_deck

    path = Path(named)
    if path.is_file():
        return _read(path)[1].rates
    # No name of a version: nobody need be asked.
    for one in wait_for(_versions(settings_now())) if "/" in named else ():
        manifest = one.manifest
        if named == f"{manifest.deck}/{manifest.version}":
            text = one.text.decode("utf-8-sig")
            return parse_deck(text, deck=manifest.deck, version=manifest.version).rates
    fail(
        EXIT_NOT_FOUND,
        f"{named} is neither a file nor a published version. `credits tariff list` shows those.",
    )


@tariff_app.command("assign")
def assign_deck(
    context: typer.Context,
    tenant: Tenant,
    deck: Annotated[str, typer.Argument(metavar="DECK", callback=name_from)],
    effective_from: At = None,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Price a tenant's calls by a deck of its own; `default` goes back to the one of all."""
    known = {one.manifest.deck for one in wait_for(_versions(settings_now()))} | {_DEFAULT}
    if deck not in known:
        fail(
            EXIT_NOT_FOUND,
            f"No deck {deck} is published, and until it is, calls would be unrated. Publish it "
            f"first: `credits tariff publish FILE --deck {deck}`.",
        )
    command = {"command": "tariff_assignment", "deck": deck, "effective_from": effective_from}
    send(context, tenant, command, command_id, wait)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(tariff_app, name="tariff")
