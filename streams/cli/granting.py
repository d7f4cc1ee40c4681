"""Commands about grants: grant, grants, void."""

from typing import Annotated, Any

import typer

from schemas.commands import GrantKind
from schemas.nanos import text_from
from streams.cli.balances import (
    Currency,
    Id,
    Reason,
    Tenant,
    Wait,
    amount_from,
    require_reason,
)
from streams.cli.commanding import send
from streams.cli.output import given, output_of
from streams.cli.settings import account_known


def kind_from(text: str) -> str:
    """Check a grant's kind."""
    if text not in set(GrantKind):
        raise typer.BadParameter(f"{text!r} is no kind; choose paid or promotional.")
    return text


def grant(
    context: typer.Context,
    tenant: Tenant,
    amount: Annotated[
        str, typer.Argument(help="How much, such as 50.00.", callback=given(amount_from))
    ],
    currency: Currency = "USD",
    kind: Annotated[
        str, typer.Option(help="promotional or paid.", callback=given(kind_from))
    ] = GrantKind.PROMOTIONAL.value,
    priority: Annotated[
        int, typer.Option(min=0, max=1_000, help="Lower ones are used up first.")
    ] = 100,
    effective_at: Annotated[
        str | None, typer.Option(help="From when it counts (RFC 3339); default: now.")
    ] = None,
    expires_at: Annotated[
        str | None,
        typer.Option(help="Until when (RFC 3339); default: paid 12 months, promotional for ever."),
    ] = None,
    every_days: Annotated[
        int | None,
        typer.Option(
            min=1, max=366, help="An allowance, set back to its amount every so many days."
        ),
    ] = None,
    every_months: Annotated[
        int | None, typer.Option(min=1, max=12, help="The same, every so many months.")
    ] = None,
    reason: Reason = "",
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Give money: now or later, once or again and again, with an expiry and a priority."""
    require_reason(reason, "A grant")
    command = {
        "command": "grant",
        "amount": {"amount": amount, "currency": currency},
        "kind": kind,
        "priority": priority,
        "effective_at": effective_at,
        "expires_at": expires_at,
        "every_days": every_days,
        "every_months": every_months,
        "reason": reason,
    }
    send(context, tenant, command, command_id, wait)


def void(
    context: typer.Context,
    tenant: Tenant,
    grant_id: Annotated[str, typer.Argument(help="Its id; see `credits grants`.")],
    reason: Reason = "",
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Take what is left of a grant, and what is still to come of it."""
    require_reason(reason, "Voiding a grant")
    command = {"command": "void", "grant_id": grant_id, "reason": reason}
    send(context, tenant, command, command_id, wait)


def grants(context: typer.Context, tenant: Tenant) -> None:
    """A tenant's grants in the order of use, then those to come."""
    account = account_known(tenant)
    rows: list[dict[str, Any]] = [
        {
            "grant_id": lot.id,
            "state": "active",
            "kind": lot.kind.name.lower(),
            "priority": lot.priority,
            "amount": text_from(lot.amount_nanos),
            "left": text_from(lot.left_nanos),
            "effective_at": lot.effective_at,
            "expires_at": lot.expires_at,
        }
        for lot in account.grants
    ]
    rows += [
        {
            "grant_id": planned.id,
            "state": "planned",
            "kind": planned.kind.name.lower(),
            "priority": planned.priority,
            "amount": text_from(planned.amount_nanos),
            "left": None,
            "effective_at": planned.at,
            "expires_at": planned.expires_at,
        }
        for planned in sorted(account.standing.planned, key=lambda one: one.at)
    ]
    output_of(context).table(rows, f"{tenant} has no money, and none to come.")


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(grant)
    app.command()(grants)
    app.command()(void)
