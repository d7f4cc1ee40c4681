"""Commands about tenants: open, close, show, import."""

import csv
import io
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from streams.cli.balances import Id, Tenant, Wait, amount_from, currency_from, known, tenant_from
from streams.cli.commanding import Order, ask, send
from streams.cli.output import (
    EXIT_CONFLICT,
    EXIT_UNKNOWN,
    EXIT_USAGE,
    fail,
    given,
    output_of,
    settings_now,
    wait_for,
)
from streams.cli.tariff import At

tenant_app = typer.Typer(
    no_args_is_help=True, help="Open, close, show, import tenants; their licences."
)

_OPENING: Final = ("currency", "opening_balance", "billing_from", "time_zone")
_POLICY: Final = (
    "trigger", "method", "amount", "target", "min_amount", "max_amount", "daily_cap",
    "weekly_cap", "monthly_cap", "max_per_day", "cooldown_s",
)  # fmt: skip
# Several in one cell, by semicolon.
_METHODS: Final = "payment_methods"
_COLUMNS: Final = ("tenant_id", *_OPENING, *_POLICY, _METHODS)


@tenant_app.command("open")
def open_tenant(
    context: typer.Context,
    tenant: Tenant,
    currency: Annotated[
        str, typer.Option(help="ISO 4217 code, fixed for ever.", callback=given(currency_from))
    ] = "USD",
    opening_balance: Annotated[
        str | None, typer.Option(help="Money to begin with.", callback=given(amount_from))
    ] = None,
    billing_from: Annotated[
        str | None, typer.Option(help="Usage that started before is not billed (RFC 3339).")
    ] = None,
    time_zone: Annotated[
        str | None, typer.Option(help="Where its days begin, such as Europe/Paris.")
    ] = None,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Open an account, or re-open a closed one."""
    command = {
        "command": "open_tenant",
        "currency": currency,
        "opening_balance": opening_balance,
        "billing_from": billing_from,
        "time_zone": time_zone,
    }
    send(context, tenant, command, command_id, wait)
    output_of(context).say(
        "Usage that came before it was open waits in the dead letters. Book it with: credits dlq "
        f"replay --reason unknown_tenant --tenant {tenant}"
    )


@tenant_app.command("close")
def close_tenant(
    context: typer.Context,
    tenant: Tenant,
    reason: Annotated[str | None, typer.Option(help="Why, for the record.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it.")] = False,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Close an account: nothing new is charged or requested."""
    if not yes:
        fail(EXIT_USAGE, f"Closing {tenant} ends its service. Say --yes if that is meant.")
    command = {"command": "close_tenant", "reason": reason}
    send(context, tenant, command, command_id, wait)


@tenant_app.command("show")
def show_tenant(context: typer.Context, tenant: Tenant) -> None:
    """Everything public about a tenant."""
    output = output_of(context)
    public = known(tenant)
    output.row(public if output.as_json else with_pools_as_lines(public))


def with_pools_as_lines(public: dict[str, Any]) -> dict[str, Any]:
    """A public balance for a person: each pool is a line of its own."""
    lines = {name: value for name, value in public.items() if name != "pools"}
    for pool in public.get("pools", ()):
        ended = not pool["left"] and pool["used"] < pool["included"]
        lines[f"pool {pool['pool']}"] = (
            f"{pool['used']} of {pool['included']} minutes of {pool['month']} used, "
            f"{pool['left']} left{': it ended with another pool of its plan' if ended else ''}"
        )
    return lines


@tenant_app.command("licences")
def set_licences(
    context: typer.Context,
    tenant: Tenant,
    capability: Annotated[
        str, typer.Argument(metavar="plan", help="The plan, such as MCOMEETADV or MCOPSTN1.")
    ],
    count: Annotated[int, typer.Argument(min=0, help="How many there are from then on.")],
    country: Annotated[
        str | None, typer.Option(help="Where its users are, such as US; for calling plans.")
    ] = None,
    effective_from: At = None,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Set how many licences of a plan a tenant has; their minutes pay before credits."""
    command = {
        "command": "licences",
        "capability": capability,
        "count": count,
        "country": country,
        "effective_from": effective_from,
    }
    send(context, tenant, command, command_id, wait)


@tenant_app.command("import")
def import_tenants(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="CSV with a header; only tenant_id is required.")],
    wait: Wait = 30,
) -> None:
    """Open many tenants from a CSV file, each once however often it is run.

    Columns: tenant_id, currency, opening_balance, billing_from, time_zone; for auto-recharge
    trigger, method, amount, target, min_amount, max_amount, daily_cap, weekly_cap, monthly_cap,
    max_per_day, cooldown_s; payment_methods (several by semicolon).
    """
    output = output_of(context)
    settings = settings_now()
    orders, faults = orders_from(file.read_bytes())
    if faults:
        for fault in faults:
            output.say(fault)
        fail(EXIT_USAGE, f"{len(faults)} faults in {file}; nothing was sent.")
    answers = wait_for(ask(settings, orders, wait_s=wait)) if orders else {}
    rows = [_answer_row(order, answers.get(order.command_id)) for order in orders]
    output.table(rows, f"{file} has no rows.")
    told = {row["answer"] for row in rows}
    if "none" in told:
        fail(
            EXIT_UNKNOWN,
            "Not all are answered yet. The commands are written and will be answered when a "
            "worker runs; run the import again to see.",
        )
    if "refused" in told:
        raise SystemExit(EXIT_CONFLICT)


def _answer_row(order: Order, notice: dict[str, Any] | None) -> dict[str, Any]:
    notice = notice or {}
    return {
        "tenant_id": order.tenant_id,
        "command": order.command["command"],
        "answer": notice.get("notice", "none").removeprefix("command_"),
        "repeated": bool(notice.get("repeated")),
        "rule": notice.get("rule"),
        "fix": notice.get("fix"),
    }


def orders_from(content: bytes) -> tuple[list[Order], list[str]]:
    """The commands of every row, and the faults with their line numbers."""
    orders: list[Order] = []
    faults: list[str] = []
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return [], ["the file is no UTF-8 text"]
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line_of: dict[str, int] = {}
    try:
        columns = reader.fieldnames or []
        unknown = [name for name in columns if name not in _COLUMNS]
        if unknown or "tenant_id" not in columns:
            what = f"{unknown[0]!r} is no column" if unknown else "there is no column tenant_id"
            return [], [f"line 1: {what}; known are {', '.join(_COLUMNS)}"]
        for row in reader:
            line = reader.line_num
            made, fault = _orders_of(row)
            if fault is None and made[0].tenant_id in line_of:
                fault = f"{made[0].tenant_id} stands in line {line_of[made[0].tenant_id]} already"
            if fault is not None:
                faults.append(f"line {line}: {fault}")
                continue
            line_of[made[0].tenant_id] = line
            orders += made
    except csv.Error as error:
        faults.append(f"line {reader.line_num}: {error}")
    return orders, faults


def _orders_of(row: dict[str, Any]) -> tuple[list[Order], str | None]:
    """The commands of one row, or what is wrong with it."""
    if None in row:
        return [], "more cells than the header has columns"
    cells = {name: (cell or "").strip() or None for name, cell in row.items()}
    try:
        tenant = tenant_from(cells["tenant_id"] or "")
        opening: dict[str, Any] = {name: cells.get(name) for name in _OPENING}
        opening["currency"] = currency_from(opening["currency"] or "USD")
    except typer.BadParameter as error:
        return [], error.message
    policy: dict[str, Any] = {name: cells[name] for name in _POLICY if cells.get(name)}
    for name in ("max_per_day", "cooldown_s"):
        if name in policy and policy[name].isdecimal():
            policy[name] = int(policy[name])
    if policy:
        missing = "target" if policy.get("method") == "target" else "amount"
        absent = [name for name in ("trigger", missing) if name not in policy]
        if absent:
            return [], f"auto-recharge needs {absent[0]}"
    methods = [one.strip() for one in (cells.get(_METHODS) or "").split(";") if one.strip()]
    # The same row gives the same ids, so that a file can be run again.
    mark = sha256(repr(sorted(cells.items())).encode()).hexdigest()[:32]
    orders = [
        Order(
            tenant_id=tenant,
            command_id=f"import-{mark}-open",
            command={"command": "open_tenant", **opening},
        )
    ]
    if policy or methods:
        settings = {
            "command": "settings",
            "expected_version": 0,
            "policy": {"enabled": True, **policy} if policy else None,
            "payment_methods": methods or None,
        }
        orders.append(
            Order(tenant_id=tenant, command_id=f"import-{mark}-settings", command=settings)
        )
    for order in orders:
        fault = order.fault()
        if fault is not None:
            return [], fault
    return orders, None


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(tenant_app, name="tenant")
