"""Commands about recharges: what a person decides."""

from typing import Annotated

import typer

from streams.cli.balances import Id, Tenant, Wait, amount_from, currency_from
from streams.cli.commanding import send
from streams.cli.output import EXIT_USAGE, fail, given

recharge_app = typer.Typer(no_args_is_help=True, help="Approve, deny or resolve a recharge.")

Reason = Annotated[str | None, typer.Option(help="Why, for the record.")]


@recharge_app.command("approve")
def approve(
    context: typer.Context,
    tenant: Tenant,
    reason: Reason = None,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """What looked like fraud is none: ask for the money that is missing."""
    command = {"command": "approve", "reason": reason}
    send(context, tenant, command, command_id, wait)


@recharge_app.command("deny")
def deny(
    context: typer.Context,
    tenant: Tenant,
    reason: Reason = None,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """It may be fraud: pause auto-recharge until money comes or a payment method is added."""
    command = {"command": "deny", "reason": reason}
    send(context, tenant, command, command_id, wait)


@recharge_app.command("resolve")
def resolve(
    context: typer.Context,
    tenant: Tenant,
    recharge_id: Annotated[str, typer.Argument(help="The request nobody answered.")],
    paid: Annotated[
        bool | None,
        typer.Option("--paid/--not-paid", help="What the payment service's own books say."),
    ] = None,
    payment_id: Annotated[str | None, typer.Option(help="With --paid: which payment.")] = None,
    amount: Annotated[
        str | None, typer.Option(help="With --paid: what came.", callback=given(amount_from))
    ] = None,
    currency: Annotated[
        str, typer.Option(help="ISO 4217 code.", callback=given(currency_from))
    ] = "USD",
    reason: Reason = None,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Say what became of a request that was not answered for a day."""
    if paid is None:
        fail(EXIT_USAGE, "Say --paid or --not-paid; the payment service's own books know.")
    if paid is (payment_id is None) or paid is (amount is None):
        fail(EXIT_USAGE, "--paid needs --payment-id and --amount; --not-paid takes neither.")
    command = {
        "command": "resolve_recharge",
        "recharge_id": recharge_id,
        "paid": paid,
        "payment_id": payment_id,
        "amount": None if amount is None else {"amount": amount, "currency": currency},
        "reason": reason,
    }
    send(context, tenant, command, command_id, wait)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(recharge_app, name="recharge")
