"""Commands about tenants: accounts, balances, funds, settings."""

import csv
import re
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import typer

from schemas import topics
from streams.cli.commanding import IdOption, WaitOption, home_of, new_id, report, send
from streams.cli.output import (
    EXIT_CONFLICT,
    EXIT_FAILED,
    EXIT_NOT_FOUND,
    EXIT_USAGE,
    fail,
    output_of,
    settings_now,
    wait_for,
)
from streams.settings import Settings

_TENANT: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_AMOUNT: Final = re.compile(r"-?(0|[1-9][0-9]{0,9})(\.[0-9]{1,9})?")
_SOURCE_REPLAY: Final = "credits dlq replay --reason unknown_tenant --tenant"

tenant_app = typer.Typer(no_args_is_help=True, help="Open, close, show, import tenants.")
settings_app = typer.Typer(no_args_is_help=True, help="Auto-recharge and payment methods.")

Tenant = Annotated[str, typer.Argument(help="Tenant id.")]
Id = Annotated[str | None, IdOption]
Wait = Annotated[float, WaitOption]


def _tenant(text: str) -> str:
    if _TENANT.fullmatch(text) is None:
        fail(
            EXIT_USAGE,
            f"{text!r} is no tenant id: letters, digits and . _ : - only, up to 64 of them.",
        )
    return text


def _amount(text: str) -> str:
    if _AMOUNT.fullmatch(text) is None:
        fail(EXIT_USAGE, f"{text!r} is no amount. Enter one such as 20 or 20.00.")
    return text


def _command(
    context: typer.Context,
    tenant: str,
    command: dict[str, Any],
    command_id: str | None,
    wait: float,
) -> None:
    command_id = command_id or new_id()
    given = {name: value for name, value in command.items() if value is not None}
    notice = wait_for(
        send(settings_now(), _tenant(tenant), given, command_id=command_id, wait_s=wait)
    )
    report(output_of(context), notice, command_id)


async def balances_of(settings: Settings, tenant: str | None = None) -> dict[str, dict[str, Any]]:
    """The latest public balances, of one tenant or of all. Raises BrokerAwayError."""
    from streams.testbed.kafka import read_to_end

    partition = None if tenant is None else home_of(tenant.encode(), settings.partitions)
    found: dict[str, dict[str, Any]] = {}
    async for record in read_to_end(
        settings, [settings.topics.of(topics.BALANCE)], partition=partition
    ):
        if record.value is None:
            continue
        public = orjson.loads(record.value)
        if tenant is None or public["tenant_id"] == tenant:
            found[public["tenant_id"]] = public
    return found


def _known(tenant: str) -> dict[str, Any]:
    found = wait_for(balances_of(settings_now(), _tenant(tenant)))
    if tenant not in found:
        fail(EXIT_NOT_FOUND, f"No tenant {tenant}. Open it with `credits tenant open {tenant}`.")
    return found[tenant]


@tenant_app.command("open")
def open_tenant(
    context: typer.Context,
    tenant: Tenant,
    currency: Annotated[str, typer.Option(help="ISO 4217 code, fixed for ever.")] = "USD",
    opening_balance: Annotated[str | None, typer.Option(help="Money to begin with.")] = None,
    billing_from: Annotated[
        str | None, typer.Option(help="Usage that started before is not billed (RFC 3339).")
    ] = None,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Open an account, or re-open a closed one."""
    _command(
        context,
        tenant,
        {
            "command": "open_tenant",
            "currency": currency.upper(),
            "opening_balance": None if opening_balance is None else _amount(opening_balance),
            "billing_from": billing_from,
        },
        command_id,
        wait,
    )
    output_of(context).say(
        f"Usage that came too early waits in the dead letters: {_SOURCE_REPLAY} {tenant}"
    )


@tenant_app.command("close")
def close_tenant(
    context: typer.Context,
    tenant: Tenant,
    reason: Annotated[str | None, typer.Option(help="Why, for the record.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Close an account: nothing new is charged or requested."""
    if not yes:
        fail(EXIT_USAGE, f"Closing {tenant} ends its service. Say --yes if that is meant.")
    _command(context, tenant, {"command": "close_tenant", "reason": reason}, command_id, wait)


@tenant_app.command("show")
def show_tenant(context: typer.Context, tenant: Tenant) -> None:
    """Everything public about a tenant."""
    output_of(context).row(_known(tenant))


@tenant_app.command("import")
def import_tenants(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="CSV: tenant_id, currency, opening_balance, trigger, amount.")
    ],
    wait: Wait = 30,
) -> None:
    """Open many tenants from a CSV file; running it again opens nothing twice."""
    output = output_of(context)
    try:
        content = file.read_bytes()
    except OSError as error:
        fail(EXIT_USAGE, f"{file} cannot be read: {error.strerror}.")
    rows, faults = _import_rows(content)
    if faults:
        for fault in faults:
            output.say(fault)
        fail(EXIT_USAGE, f"{len(faults)} faults in {file}; nothing was sent.")
    answers = wait_for(_import(settings_now(), rows, wait))
    output.table(answers, "The file has no rows.")
    if any(answer["answer"] == "refused" for answer in answers):
        raise SystemExit(EXIT_CONFLICT)
    if any(answer["answer"] == "none" for answer in answers):
        raise SystemExit(EXIT_FAILED)


def _import_rows(content: bytes) -> tuple[list[tuple[str, str, dict[str, Any]]], list[str]]:
    """(tenant, command id, command) of every row, and the faults with their line numbers."""
    commands: list[tuple[str, str, dict[str, Any]]] = []
    faults: list[str] = []
    try:
        reader = csv.DictReader(content.decode("utf-8-sig").splitlines())
    except UnicodeDecodeError:
        return [], ["the file is no UTF-8 text"]
    for row in reader:
        tenant = (row.get("tenant_id") or "").strip()
        line = f"line {reader.line_num}: "
        if _TENANT.fullmatch(tenant) is None:
            faults.append(f"{line}{tenant!r} is no tenant id")
            continue
        amounts = {
            name: (row.get(name) or "").strip() or None
            for name in ("opening_balance", "trigger", "amount")
        }
        wrong = [
            name
            for name, text in amounts.items()
            if text is not None and _AMOUNT.fullmatch(text) is None
        ]
        if wrong:
            faults.append(f"{line}{wrong[0]} {amounts[wrong[0]]!r} is no amount such as 20.00")
            continue
        # The same row gives the same ids, so that a file can be run again.
        mark = sha256(repr((tenant, sorted(row.items()))).encode()).hexdigest()[:24]
        opening = {
            "command": "open_tenant",
            "currency": (row.get("currency") or "USD").strip().upper(),
            "opening_balance": amounts["opening_balance"],
        }
        commands.append((tenant, f"import-{mark}-open", opening))
        if amounts["trigger"] is not None:
            policy = {
                "enabled": True,
                "trigger": amounts["trigger"],
                "method": "fixed",
                "amount": amounts["amount"],
            }
            commands.append(
                (
                    tenant,
                    f"import-{mark}-settings",
                    {"command": "settings", "expected_version": 0, "policy": policy},
                )
            )
    return commands, faults


async def _import(
    settings: Settings, commands: list[tuple[str, str, dict[str, Any]]], wait_s: float
) -> list[dict[str, Any]]:
    answers = []
    for tenant, command_id, command in commands:
        given = {name: value for name, value in command.items() if value is not None}
        notice = await send(settings, tenant, given, command_id=command_id, wait_s=wait_s)
        answers.append(
            {
                "tenant_id": tenant,
                "command": command["command"],
                "answer": "none" if notice is None else notice["notice"].removeprefix("command_"),
                "fix": None if notice is None else notice.get("fix"),
            }
        )
    return answers


def balance(context: typer.Context, tenant: Tenant) -> None:
    """A tenant's balance, as last published."""
    public = _known(tenant)
    output_of(context).row(
        {
            name: public.get(name)
            for name in (
                "tenant_id",
                "balance",
                "available",
                "currency",
                "recharge_state",
                "settings_version",
                "seq",
                "as_of",
            )
        }
    )


def balances(
    context: typer.Context,
    sort: Annotated[str, typer.Option(help="balance or tenant_id.")] = "balance",
    limit: Annotated[int, typer.Option(min=1, help="Most rows to show.")] = 20,
    below: Annotated[str | None, typer.Option(help="Only balances below this amount.")] = None,
) -> None:
    """The lowest balances."""
    from fractions import Fraction

    if sort not in ("balance", "tenant_id"):
        fail(EXIT_USAGE, f"--sort {sort}: choose balance or tenant_id.")
    rows = list(wait_for(balances_of(settings_now())).values())
    if below is not None:
        most = Fraction(_amount(below))
        rows = [row for row in rows if Fraction(row["balance"]) < most]
    rows.sort(
        key=lambda row: (Fraction(row["balance"]) if sort == "balance" else 0, row["tenant_id"])
    )
    shown = ("tenant_id", "balance", "currency", "recharge_state", "as_of")
    output_of(context).table(
        [{name: row.get(name) for name in shown} for row in rows[:limit]],
        "No tenant is open yet. Open one with `credits tenant open TENANT`.",
    )


def topup(
    context: typer.Context,
    tenant: Tenant,
    amount: Annotated[str, typer.Argument(help="How much, such as 50.00.")],
    currency: Annotated[str, typer.Argument(help="ISO 4217 code.")] = "USD",
    already_paid: Annotated[
        str | None,
        typer.Option("--already-paid", metavar="REF", help="Book a payment received elsewhere."),
    ] = None,
    payment_method: Annotated[
        str | None, typer.Option(help="A reference, never card data.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="For the record.")] = None,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Add funds: ask the payment service, or book what was paid already."""
    money = {"amount": _amount(amount), "currency": currency.upper()}
    if already_paid is None:
        command = {"command": "fund", "amount": money, "payment_method": payment_method}
    else:
        command = {
            "command": "book_payment",
            "payment_id": already_paid,
            "amount": money,
            "reason": reason,
        }
    _command(context, tenant, command, command_id, wait)


def adjust(
    context: typer.Context,
    tenant: Tenant,
    amount: Annotated[str, typer.Argument(help="Up or, with a minus, down.")],
    currency: Annotated[str, typer.Argument(help="ISO 4217 code.")] = "USD",
    reason: Annotated[str, typer.Option(help="Why; it stands in the ledger.")] = "",
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Correct a balance, with a reason."""
    if not reason:
        fail(EXIT_USAGE, "An adjustment needs a --reason; it stands in the ledger for ever.")
    money = {"amount": _amount(amount), "currency": currency.upper()}
    _command(
        context,
        tenant,
        {"command": "adjustment", "amount": money, "reason": reason},
        command_id,
        wait,
    )


@settings_app.command("show")
def show_settings(context: typer.Context, tenant: Tenant) -> None:
    """The settings version and the recharge state of a tenant."""
    public = _known(tenant)
    shown = ("tenant_id", "settings_version", "policy_version", "recharge_state", "recharge_id")
    output_of(context).row({name: public.get(name) for name in shown})


@settings_app.command("set")
def set_settings(
    context: typer.Context,
    tenant: Tenant,
    trigger: Annotated[str | None, typer.Option(help="When the balance falls below.")] = None,
    amount: Annotated[str | None, typer.Option(help="Recharge amount.")] = None,
    target: Annotated[str | None, typer.Option(help="Recharge up to this level.")] = None,
    method: Annotated[
        str | None, typer.Option(help="fixed, fixed_multiple, target, gap_plus_amount.")
    ] = None,
    monthly_cap: Annotated[str | None, typer.Option(help="At most this much in 30 days.")] = None,
    max_per_day: Annotated[int, typer.Option(min=1, help="Most recharges in 24 hours.")] = 3,
    enable: Annotated[bool, typer.Option("--enable/--disable", help="Auto-recharge.")] = True,
    payment_method: Annotated[
        list[str] | None, typer.Option(help="References, in the order to try.")
    ] = None,
    expected_version: Annotated[
        int | None, typer.Option(help="Settings version you have seen; default: the latest.")
    ] = None,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Change auto-recharge or payment methods."""
    if expected_version is None:
        expected_version = int(_known(tenant)["settings_version"])
    command: dict[str, Any] = {
        "command": "settings",
        "expected_version": expected_version,
        "payment_methods": payment_method or None,
    }
    if trigger is not None or not enable:
        policy = {
            "enabled": enable,
            "trigger": None if trigger is None else _amount(trigger),
            "method": method or ("target" if target else "fixed"),
            "amount": None if amount is None else _amount(amount),
            "target": None if target is None else _amount(target),
            "monthly_cap": None if monthly_cap is None else _amount(monthly_cap),
            "max_per_day": max_per_day,
        }
        command["policy"] = {name: value for name, value in policy.items() if value is not None}
    elif amount is not None or target is not None:
        fail(EXIT_USAGE, "Say --trigger as well: a policy is set as a whole.")
    _command(context, tenant, command, command_id, wait)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(tenant_app, name="tenant")
    app.add_typer(settings_app, name="settings")
    app.command()(balance)
    app.command()(balances)
    app.command()(topup)
    app.command()(adjust)
