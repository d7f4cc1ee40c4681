"""Commands about statements: write one, and check one without any server."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from schemas import topics
from streams.billing import statement
from streams.cli.balances import Tenant, known
from streams.cli.explain import values_of
from streams.cli.output import (
    EXIT_FAILED,
    EXIT_UNKNOWN,
    EXIT_USAGE,
    fail,
    given,
    output_of,
    settings_now,
    wait_for,
)

statement_app = typer.Typer(no_args_is_help=True, help="Write statements, and check them.")


def instant_from(text: str) -> str:
    """Check a day or an instant."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no day or instant. Enter one such as 2026-03-01 or "
            "2026-03-01T00:00:00+01:00."
        ) from None
    return text


def _instant(text: str | None) -> datetime | None:
    if text is None:
        return None
    at = datetime.fromisoformat(text)
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


When = Annotated[str | None, typer.Option(metavar="TIME", callback=given(instant_from))]


@statement_app.command("show")
def show_statement(
    context: typer.Context,
    tenant: Tenant,
    since: When = None,
    until: When = None,
) -> None:
    """Write a statement as CSV: what was booked from --since (included) to --until (excluded), in
    UTC unless the time says otherwise; all of it when neither is given."""
    settings = settings_now()
    public = known(tenant)
    values = wait_for(values_of(settings, topics.LEDGER, tenant))
    text = statement.compose(
        tenant, public["currency"], values, since=_instant(since), until=_instant(until)
    )
    checked = statement.check(text)
    if checked.faults:
        fail(EXIT_FAILED, f"The ledger itself is at fault: {'; '.join(checked.faults)}.")
    if checked.closing_seq == public["seq"] and checked.head != public["hash"]:
        fail(EXIT_FAILED, f"The ledger does not lead to the published balance of {tenant}.")
    sys.stdout.write(text)
    output_of(context).say(
        f"Entries {checked.opening_seq + 1} to {checked.closing_seq}: "
        f"{checked.opening_balance} to {checked.closing_balance} {checked.currency}. Keep the "
        "last hash: it proves later that nothing was changed."
    )


@statement_app.command("verify")
def verify_statement(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A statement as it was written.")],
    head: Annotated[
        str | None, typer.Option(help="A hash kept from before, such as last month's.")
    ] = None,
    earlier: Annotated[
        Path | None, typer.Option(help="An earlier statement; its last hash is the head.")
    ] = None,
) -> None:
    """Check a statement's sums and its chain of hashes, against an earlier head; needs no server.

    Ends with 1 when something is wrong, 75 when it does not reach to the earlier head.
    """
    if head is not None and earlier is not None:
        fail(EXIT_USAGE, "--head and --earlier exclude each other.")
    kept: Any = head
    try:
        if earlier is not None:
            kept = statement.ends_with(_text(earlier))
        checked = statement.check(_text(file), earlier=kept)
    except statement.StatementError as error:
        fail(EXIT_FAILED, f"This is no statement: {error}.")
    output = output_of(context)
    output.row(msgspec.to_builtins(checked))
    if checked.faults:
        fail(EXIT_FAILED, "The statement was changed, or made wrong: see its faults.")
    if checked.earlier is False:
        fail(
            EXIT_FAILED,
            "The earlier head is not in this chain: entries were changed since, or it is of "
            "another tenant or an older period.",
        )
    if kept is not None and checked.earlier is None:
        fail(
            EXIT_UNKNOWN,
            "The statement does not reach to the earlier head; write one that begins before it.",
        )
    output.say("Every sum and every hash is right.")


def _text(path: Path) -> str:
    # As it is: a reader that changes line ends would change a quoted cell.
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise statement.StatementError("it is no text in UTF-8") from None


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(statement_app, name="statement")
