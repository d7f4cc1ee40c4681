"""Why: an entry's amount, a recharge that was asked for, and one that was not."""

from typing import Annotated, Any

import msgspec
import typer

from schemas import topics
from schemas.notices import NoticeKind
from streams.billing import explain as why
from streams.cli.balances import Tenant, known
from streams.cli.commanding import home_of
from streams.cli.output import (
    EXIT_NOT_FOUND,
    EXIT_USAGE,
    Output,
    fail,
    output_of,
    settings_now,
    wait_for,
)
from streams.settings import Settings


async def values_of(settings: Settings, topic: str, tenant: str) -> list[bytes]:
    """Every value of a tenant in an output topic, in order. Raises BrokerAwayError,
    ProvisionError."""
    from streams import provision
    from streams.testbed.kafka import read_to_end

    name = settings.topics.of(topic)
    await provision.require(settings, [name])
    key = tenant.encode()
    return [
        record.value
        async for record in read_to_end(
            settings, [name], partition=home_of(key, settings.partitions)
        )
        if record.key == key
    ]


def explain(
    context: typer.Context,
    tenant: Tenant,
    entry: Annotated[int | None, typer.Option(help="An entry's number.", min=1)] = None,
    recharge: Annotated[str | None, typer.Option(help="A recharge's id.")] = None,
) -> None:
    """Why a recharge was or was not requested; with --entry, why an entry has its amount."""
    if entry is not None and recharge is not None:
        fail(EXIT_USAGE, "--entry and --recharge exclude each other.")
    settings = settings_now()
    public = known(tenant)
    output = output_of(context)

    def read(topic: str) -> list[dict[str, Any]]:
        return [
            msgspec.json.decode(value) for value in wait_for(values_of(settings, topic, tenant))
        ]

    if entry is not None:
        entries = read(topics.LEDGER)
        booked = next((one for one in entries if one["seq"] == entry), None)
        if booked is None:
            fail(EXIT_NOT_FOUND, f"{tenant} has no entry {entry}; the last one is {public['seq']}.")
        show(output, why.entry(booked, entries))
        return
    notices = read(topics.NOTIFICATION)
    if recharge is None:
        last = why.last_decision(notices)
        if last is None:
            fail(
                EXIT_NOT_FOUND,
                f"{tenant} was never below its trigger in the 90 days that notices are kept; its "
                f"balance is {public['balance']} {public['currency']}.",
            )
        if last["notice"] == NoticeKind.RECHARGE_WITHHELD:
            show(output, why.decision(last))
            return
        recharge = last["recharge_id"]
    story = why.recharge(recharge, notices, read(topics.LEDGER))
    if story is None:
        fail(EXIT_NOT_FOUND, f"{tenant} has no recharge {recharge} in its notices or entries.")
    show(output, story)


def show(output: Output, explanation: why.Explanation) -> None:
    """One explanation: an object, or some lines on a terminal."""
    if output.as_json:
        output.row(msgspec.to_builtins(explanation))
        return
    output.line(f"{explanation.about} of {explanation.tenant_id}, {explanation.at}")
    output.line(explanation.why)
    place = ""
    if explanation.topic not in (None, "tick"):
        place = f" ({explanation.topic}/{explanation.partition}/{explanation.offset})"
    output.line(f"caused by {explanation.caused_by}{place}")
    for line in explanation.considered:
        output.line(f"  {line}")


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(explain)
