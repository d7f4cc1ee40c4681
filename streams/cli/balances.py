"""Commands about money: balance, balances, topup, adjust."""

import re
from typing import Annotated, Any, Final

import msgspec
import typer

from schemas import topics
from streams.cli.commanding import IdOption, WaitOption, home_of, send
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

_TENANT: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_AMOUNT: Final = re.compile(r"-?(0|[1-9][0-9]{0,9})(\.[0-9]{1,9})?")
_CURRENCY: Final = re.compile(r"[A-Z]{3}")


def tenant_from(text: str) -> str:
    """Check a tenant id."""
    if _TENANT.fullmatch(text) is None:
        raise typer.BadParameter(
            f"{text!r} is no tenant id: letters, digits and . _ : - only, up to 64 of them."
        )
    return text


def amount_from(text: str) -> str:
    """Check an amount."""
    if _AMOUNT.fullmatch(text) is None:
        raise typer.BadParameter(f"{text!r} is no amount. Enter one such as 20 or 20.00.")
    return text


def currency_from(text: str) -> str:
    """Check a currency code, in capitals or not."""
    if _CURRENCY.fullmatch(text.upper()) is None:
        raise typer.BadParameter(f"{text!r} is no currency. Enter three letters such as USD.")
    return text.upper()


Tenant = Annotated[str, typer.Argument(help="Tenant id.", callback=given(tenant_from))]
Id = Annotated[str | None, IdOption]
Wait = Annotated[float, WaitOption]
Currency = Annotated[str, typer.Argument(help="ISO 4217 code.", callback=given(currency_from))]
Reason = Annotated[str, typer.Option(help="Why; it stands in the ledger.")]


def require_reason(reason: str, what: str) -> None:
    """End the process with 2 when no reason is given for what changes a balance by hand."""
    if not reason:
        fail(EXIT_USAGE, f"{what} needs a --reason; it stands in the ledger for ever.")


async def balances_of(settings: Settings, tenant: str | None = None) -> dict[str, dict[str, Any]]:
    """The latest public balances, of one tenant or of all.

    Raises BrokerAwayError, ProvisionError.
    """
    from streams import provision
    from streams.testbed.kafka import read_to_end

    name = settings.topics.of(topics.BALANCE)
    await provision.require(settings, [name])
    partition = None if tenant is None else home_of(tenant.encode(), settings.partitions)
    key = None if tenant is None else tenant.encode()
    latest: dict[bytes, bytes] = {}
    async for record in read_to_end(settings, [name], partition=partition):
        if key is None or record.key == key:
            latest[record.key] = record.value
    return {
        tenant_id.decode(): msgspec.json.decode(value)
        for tenant_id, value in latest.items()
        if value is not None
    }


_NO_CALLS: Final = {"exposure": "0", "holds": 0}


def known(tenant: str) -> dict[str, Any]:
    """A tenant's public balance; ends the process with 3 when there is no such tenant."""
    found = wait_for(balances_of(settings_now(), tenant))
    if tenant not in found:
        fail(EXIT_NOT_FOUND, f"No tenant {tenant}. Open it with `credits tenant open {tenant}`.")
    # Left out on the wire while there are no open calls.
    return found[tenant] | {name: found[tenant].get(name, none) for name, none in _NO_CALLS.items()}


def balance(context: typer.Context, tenant: Tenant) -> None:
    """A tenant's balance, as last published; `as_of` says when that was."""
    public = known(tenant)
    shown = (
        "tenant_id", "balance", "available", "exposure", "holds", "currency", "recharge_state",
        "settings_version", "seq", "as_of",
    )  # fmt: skip
    output_of(context).row({name: public.get(name) for name in shown})


def balances(
    context: typer.Context,
    sort: Annotated[str, typer.Option(help="balance or tenant_id.")] = "balance",
    limit: Annotated[int, typer.Option(min=1, help="Most rows to show.")] = 20,
    below: Annotated[
        str | None,
        typer.Option(help="Only balances below this amount.", callback=given(amount_from)),
    ] = None,
) -> None:
    """The lowest balances, as last published."""
    from fractions import Fraction

    if sort not in ("balance", "tenant_id"):
        fail(EXIT_USAGE, f"--sort {sort}: choose balance or tenant_id.")
    rows = list(wait_for(balances_of(settings_now())).values())
    if below is not None:
        most = Fraction(below)
        rows = [row for row in rows if Fraction(row["balance"]) < most]
    rows.sort(
        key=lambda row: (Fraction(row["balance"]) if sort == "balance" else 0, row["tenant_id"])
    )
    shown = ("tenant_id", "balance", "currency", "recharge_state", "as_of")
    output_of(context).table(
        [{name: row.get(name) for name in shown} for row in rows[:limit]],
        "No tenant is open yet. Open one with `credits tenant open TENANT`."
        if below is None
        else f"No balance is below {below}.",
    )


def topup(
    context: typer.Context,
    tenant: Tenant,
    amount: Annotated[
        str, typer.Argument(help="How much, such as 50.00.", callback=given(amount_from))
    ],
    currency: Currency = "USD",
    already_paid: Annotated[
        str | None,
        typer.Option("--already-paid", metavar="REF", help="Book a payment received elsewhere."),
    ] = None,
    payment_method: Annotated[
        str | None, typer.Option(help="A reference, never card data.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="For the record, with --already-paid.")] = None,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Add funds: ask the payment service, or book what was paid already."""
    money = {"amount": amount, "currency": currency}
    if already_paid is None:
        if reason is not None:
            fail(EXIT_USAGE, "--reason goes with --already-paid only.")
        command = {"command": "fund", "amount": money, "payment_method": payment_method}
    else:
        if payment_method is not None:
            fail(EXIT_USAGE, "--payment-method and --already-paid exclude each other.")
        command = {
            "command": "book_payment",
            "payment_id": already_paid,
            "amount": money,
            "reason": reason,
        }
    send(context, tenant, command, command_id, wait)
    if already_paid is None:
        output_of(context).say("The payment service is asked; the balance grows when it has paid.")


def adjust(
    context: typer.Context,
    tenant: Tenant,
    amount: Annotated[
        str, typer.Argument(help="Up or, with a minus, down.", callback=given(amount_from))
    ],
    currency: Currency = "USD",
    reason: Reason = "",
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Correct a balance, with a reason."""
    require_reason(reason, "An adjustment")
    command = {
        "command": "adjustment",
        "amount": {"amount": amount, "currency": currency},
        "reason": reason,
    }
    send(context, tenant, command, command_id, wait)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(balance)
    app.command()(balances)
    app.command()(topup)
    # -2.00 is an amount, not an option.
    app.command(context_settings={"ignore_unknown_options": True})(adjust)
