"""Commands about auto-recharge and payment methods."""

from typing import Annotated, Any, Final

import typer

from schemas import topics
from schemas.commands import Compare, Method
from schemas.nanos import text_from
from streams.billing.account import Account, NewerRowError, decode_row
from streams.billing.parts import Policy
from streams.cli.balances import Id, Tenant, Wait, amount_from
from streams.cli.commanding import home_of, send
from streams.cli.output import (
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

settings_app = typer.Typer(no_args_is_help=True, help="Auto-recharge and payment methods.")

_OFF: Final = "none"
_METHODS: Final = ", ".join(Method)


def limit_from(text: str) -> str:
    """Check an amount, or the word that takes a limit away."""
    return text if text == _OFF else amount_from(text)


def method_from(text: str) -> str:
    """Check a method's name."""
    if text not in set(Method):
        raise typer.BadParameter(f"{text!r} is no method; choose one of {_METHODS}.")
    return text


def compare_from(text: str) -> str:
    """Check a comparison's name."""
    if text not in set(Compare):
        raise typer.BadParameter(f"{text!r}: choose lt (strictly below) or le (at it, too).")
    return text


def velocity_from(given: list[str] | None) -> dict[str, str] | None:
    """Limits by risk class; `none` alone takes them all away."""
    if not given:
        return None
    if given == [_OFF]:
        return {}
    limits = {}
    for text in given:
        name, equals, amount = text.partition("=")
        if not name or not equals:
            fail(EXIT_USAGE, f"--velocity {text}: write CLASS=AMOUNT, such as premium=50.")
        limits[name] = amount_from(amount)
    return limits


def levels_from(given: list[str] | None) -> list[int] | None:
    """Percentages; `none` alone takes them all away."""
    if not given:
        return None
    if given == [_OFF]:
        return []
    levels = []
    for text in given:
        percent = text.removesuffix("%")
        if not percent.isdecimal() or not 0 < int(percent) < 100:
            fail(EXIT_USAGE, f"--alert-level {text}: write a percentage from 1 to 99.")
        levels.append(int(percent))
    return levels


Limit = Annotated[
    str | None, typer.Option(metavar="AMOUNT|none", callback=given(limit_from), show_default=False)
]


async def _account_of(settings: Settings, tenant: str) -> Account | None:
    """The tenant's row in the table, where alone the policy stands in full."""
    from streams import provision
    from streams.testbed.kafka import read_to_end

    name = settings.topics.of(topics.CHANGELOG)
    await provision.require(settings, [name])
    key, row = tenant.encode(), None
    async for record in read_to_end(settings, [name], partition=home_of(key, settings.partitions)):
        if record.key == key:
            row = record.value
    return None if row is None else decode_row(row)


def account_known(tenant: str) -> Account:
    """A tenant's row as the table has it; ends the process with 3 when there is no such tenant."""
    try:
        account = wait_for(_account_of(settings_now(), tenant))
    except NewerRowError as error:
        fail(EXIT_FAILED, f"{tenant} cannot be read: {error}.")
    if account is None:
        fail(EXIT_NOT_FOUND, f"No tenant {tenant}. Open it with `credits tenant open {tenant}`.")
    return account


def _wire_of(policy: Policy) -> dict[str, Any]:
    """A policy as a command carries it."""
    limits = {
        name: None if nanos is None else text_from(nanos)
        for name, nanos in (
            ("min_amount", policy.min_nanos),
            ("max_amount", policy.max_nanos),
            ("daily_cap", policy.daily_cap_nanos),
            ("weekly_cap", policy.weekly_cap_nanos),
            ("monthly_cap", policy.monthly_cap_nanos),
        )
    }
    return {
        "enabled": policy.enabled,
        "trigger": text_from(policy.trigger_nanos),
        "compare": policy.compare.value,
        "method": policy.method.value,
        "amount": text_from(policy.amount_nanos) if policy.amount_nanos else None,
        "target": text_from(policy.target_nanos) if policy.target_nanos else None,
        **limits,
        "max_per_day": policy.max_per_day,
        "cooldown_s": policy.cooldown_s,
        "velocity": {name: text_from(nanos) for name, nanos in policy.velocity} or None,
    }


def _sentence(policy: dict[str, Any], currency: str) -> str:
    """What the values mean."""
    if not policy["enabled"]:
        return "Auto-recharge is off: nothing is ever asked for."
    fall = "falls below" if policy["compare"] == Compare.LT else "falls to"
    amount, target = f"{policy['amount']} {currency}", f"{policy['target']} {currency}"
    what = {
        Method.FIXED: f"for {amount}",
        Method.FIXED_MULTIPLE: f"for the fewest times {amount} that bring it back",
        Method.TARGET: f"for what is missing to {target}",
        Method.GAP_PLUS_AMOUNT: f"for what is missing and {amount} more",
    }[Method(policy["method"])]
    return f"When the balance {fall} {policy['trigger']} {currency} we ask {what}."


@settings_app.command("show")
def show_settings(context: typer.Context, tenant: Tenant) -> None:
    """Auto-recharge and payment methods of a tenant, as they are in force."""
    account = account_known(tenant)
    policy = _wire_of(account.standing.policy)
    output = output_of(context)
    output.row(
        {
            "tenant_id": tenant,
            "settings_version": account.standing.settings_version,
            **policy,
            "payment_methods": list(account.standing.payment_methods),
            "decks": [
                {"deck": one.deck, "effective_from": one.effective_from}
                for one in account.standing.decks
            ],
            "overdraft_floor": text_from(account.standing.overdraft_floor_nanos),
            "alert_levels": list(account.standing.alert_levels),
            "recharge_state": account.state,
        }
    )
    output.say(_sentence(policy, account.currency))


@settings_app.command("set")
def set_settings(
    context: typer.Context,
    tenant: Tenant,
    enable: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Auto-recharge on or off.")
    ] = None,
    trigger: Annotated[
        str | None, typer.Option(help="When the balance falls below.", callback=given(amount_from))
    ] = None,
    amount: Annotated[
        str | None, typer.Option(help="Recharge amount.", callback=given(amount_from))
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Recharge up to this level.", callback=given(amount_from))
    ] = None,
    method: Annotated[
        str | None, typer.Option(help=f"{_METHODS}.", callback=given(method_from))
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="lt: below the trigger; le: at it, too.", callback=given(compare_from)),
    ] = None,
    min_amount: Limit = None,
    max_amount: Limit = None,
    daily_cap: Limit = None,
    weekly_cap: Limit = None,
    monthly_cap: Limit = None,
    max_per_day: Annotated[
        int | None, typer.Option(min=1, max=1_000, help="Most recharges in 24 hours.")
    ] = None,
    cooldown_s: Annotated[
        int | None, typer.Option(min=0, max=86_400, help="Seconds of peace after a recharge.")
    ] = None,
    payment_method: Annotated[
        list[str] | None, typer.Option(help="References, in the order to try; replaces them all.")
    ] = None,
    velocity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS=AMOUNT|none",
            help="What may be spent on a risk class in 24 hours before a person must approve.",
        ),
    ] = None,
    overdraft_floor: Annotated[
        str | None, typer.Option(help="How far below zero is meant.", callback=given(amount_from))
    ] = None,
    alert_level: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PERCENT|none",
            help="Tell when the balance falls below this part of the last funding; replaces all.",
        ),
    ] = None,
    expected_version: Annotated[
        int | None,
        typer.Option(min=0, help="Settings version you have seen; default: the one in force."),
    ] = None,
    command_id: Id = None,
    wait: Wait = 10,
) -> None:
    """Change auto-recharge, payment methods, overdraft floor or alert levels; the rest stays."""
    levels = levels_from(alert_level)
    given: dict[str, Any] = {
        "trigger": trigger, "amount": amount, "target": target, "method": method,
        "compare": compare, "min_amount": min_amount, "max_amount": max_amount,
        "daily_cap": daily_cap, "weekly_cap": weekly_cap, "monthly_cap": monthly_cap,
        "max_per_day": max_per_day, "cooldown_s": cooldown_s, "enabled": enable,
        "velocity": velocity_from(velocity),
    }  # fmt: skip
    changed = {name: value for name, value in given.items() if value is not None}
    if not changed and not payment_method and overdraft_floor is None and levels is None:
        fail(EXIT_USAGE, "Nothing to change; see `credits settings set --help`.")
    account = account_known(tenant)
    command: dict[str, Any] = {
        "command": "settings",
        "expected_version": account.standing.settings_version
        if expected_version is None
        else expected_version,
        "payment_methods": payment_method or None,
        "overdraft_floor": overdraft_floor,
        "alert_levels": levels,
    }
    if changed:
        if account.standing.policy.version == 0:
            # The first policy is meant to work, unless somebody says otherwise.
            changed.setdefault("enabled", True)
        if target is not None:
            changed.setdefault("method", Method.TARGET)
        # A policy is set as a whole, so what stays goes along.
        whole = {**_wire_of(account.standing.policy), **changed}
        to_level = whole["method"] == Method.TARGET
        if (amount is not None and to_level) or (target is not None and not to_level):
            fail(
                EXIT_USAGE,
                f"--{'amount' if to_level else 'target'} means nothing with method "
                f"{whole['method']}; say --method as well.",
            )
        command["policy"] = {
            name: value for name, value in whole.items() if value not in (None, _OFF)
        }
    send(context, tenant, command, command_id, wait)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(settings_app, name="settings")
